"""NoteDetector: samples in, rolls of notes out. The network of `small`.

Harmonic front end, convolutions over time and pitch, a T5 encoder, output heads. Every output head
is a roll, logits float32 [B, F, N]: F is `segment_frames`, N the head's columns in `config.HEADS`.
Frame i stands for the samples [i * hop, (i + 1) * hop) from the segment's start (`lead_samples` of
the network's input come before). Its target is 1 in frame

- "onset", "offset": floor(time * frames_per_second) of a note's on or off, column
  pitch - `LOWEST_PITCH`, notes of all programs together, drums left out;
- "frame": from the onset's frame to the offset's, without the latter but at least one, columns
  as above;
- "drum": of a drum note's onset, column its MIDI pitch 0 to 127;
- "program": in which a note of the program sounds (as "frame"), drums left out, column the first
  program of its General MIDI class.

"strength" has a target in the frames of onsets only: the note's MIDI velocity / 127, columns as
"onset", and in one more column that of the strongest drum. "class" has one where a pitch sounds (as
"frame"): 1 for the General MIDI classes of the notes there, `NUM_CLASSES` columns for each pitch.

Pitches off the piano have no columns of their own and are left out of onset, offset and frame. Of a
note that began before the segment only what lies inside is marked.

Shape letters: B batch, F frames, P positions of the encoder, N pitches, C channels, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.models.catalog import register_presets
from mt3_keras.models.config import (
    HEADS,
    NUM_CLASSES,
    NUM_PITCHES,
    DetectorBodyConfig,
    DetectorConfig,
    HarmonicConfig,
)
from mt3_keras.models.layers import Encoder, Logits, dense
from mt3_keras.models.spectrogram import Harmonics
from mt3_keras.note_rolls import NOTE_HEADS

Rolls = dict[str, Any]  # head -> logits [B, F, N]

STEM_HEADS = ("onset", "offset", "frame")  # those of single pitches, which the stem predicts too
ENCODER_HEADS = {head: size for head, size in HEADS.items() if head != "class"}
INITIAL_LOGIT = -4.0  # most of a roll is empty
COURSE_POSITIONS, COURSE_STEP = 5, 3  # kernel and dilation over time of the class head


class _Part(keras.layers.Layer):
    """A layer made from the detector's sizes, which `get_config` gives back."""

    def __init__(self, network: DetectorBodyConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network = DetectorBodyConfig(**network) if isinstance(network, dict) else network

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "network": dataclasses.asdict(self.network)}


@keras.saving.register_keras_serializable(package="mt3_keras")
class ConvStem(_Part):
    """Three convolutions over time and pitch; the last has a stride of `frames_per_position`.

    Call arguments:
      harmonics_BFNC: float [B, F, N, channels of `Harmonics`].

    Returns:
      A dict: "features" [B, P, N * stem_channels] for the encoder; "map" [B, F, N, stem_channels],
      what the last convolution is given; "rolls" float32 [B, F, 3 * N], logits of `STEM_HEADS`.
    """

    def __init__(self, network: DetectorBodyConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        policy = self.dtype_policy
        self.convolutions = [
            keras.layers.Conv2D(
                self.network.stem_channels,
                3,
                strides=(stride, 1),
                padding="same",
                activation="relu",
                kernel_initializer="he_normal",
                data_format="channels_last",  # whatever keras.json asks for
                dtype=policy,
                name=f"convolution_{i}",
            )
            for i, stride in enumerate((1, 1, self.network.frames_per_position))
        ]
        self.norms = [
            keras.layers.BatchNormalization(dtype=policy, name=f"norm_{i}") for i in range(3)
        ]
        self.rolls = Logits(3, use_bias=False, dtype=policy, name="rolls")

    def build(self, shape: Any) -> None:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            convolution.build(shape)
            shape = (*shape[:-1], convolution.filters)
            norm.build(shape)
        self.rolls.build(shape)

    def call(self, harmonics_BFNC: Any, training: Any = None) -> dict[str, Any]:
        *first, last = zip(self.convolutions, self.norms, strict=True)
        x_BFNC = harmonics_BFNC
        for convolution, norm in first:
            x_BFNC = norm(convolution(x_BFNC), training=training)
        convolution, norm = last
        return {
            "map": x_BFNC,
            "rolls": _join_last(ops.transpose(self.rolls(x_BFNC), (0, 1, 3, 2))),
            "features": _join_last(norm(convolution(x_BFNC), training=training)),
        }


def _join_last(x: Any) -> Any:
    """[B, T, M, N] -> [B, T, M * N]."""
    return ops.reshape(x, (-1, x.shape[1], x.shape[2] * x.shape[3]))


@keras.saving.register_keras_serializable(package="mt3_keras")
class PitchMixer(_Part):
    """Corrects the logits of each pitch by those of the others: octaves, overtones.

    The stem's map [B, F, N, C] and logits of `STEM_HEADS` [B, F, 3 * N] -> logits to be added to
    these. A convolution of each channel over all pitches, between two layers that see each cell by
    itself.
    """

    def __init__(self, network: DetectorBodyConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(network, autocast=False, **kwargs)
        network, policy = self.network, self.dtype_policy
        self.timbre = dense(network.mixer_channels, "timbre", policy)
        self.found = dense(network.mixer_channels, "found", policy)
        self.hidden = keras.layers.Dense(
            network.mixer_width, activation="relu", dtype=policy, name="hidden"
        )
        self.logits = Logits(
            len(STEM_HEADS), kernel_initializer="zeros", dtype=policy, name="logits"
        )
        pitch = np.arange(NUM_PITCHES)
        self._intervals = pitch[:, None] - pitch[None, :] + NUM_PITCHES - 1

    def build(self, map_BFNC_shape: Any = None, logits_shape: Any = None) -> None:
        network = self.network
        self.timbre.build((None, network.stem_channels))
        self.found.build((None, len(STEM_HEADS)))
        self.intervals = self.add_weight(
            shape=(network.mixer_channels, 2 * NUM_PITCHES - 1),
            initializer=keras.initializers.RandomNormal(stddev=0.05),
            name="intervals",
        )
        self.hidden.build((None, 2 * network.mixer_channels))
        self.logits.build((None, network.mixer_width))

    def call(self, map_BFNC: Any, logits: Any) -> Any:
        logits_BF3N = ops.reshape(logits, (-1, logits.shape[1], len(STEM_HEADS), NUM_PITCHES))
        found_BF3N = ops.cast(ops.sigmoid(logits_BF3N), self.compute_dtype)
        found_BFN3 = ops.transpose(found_BF3N, (0, 1, 3, 2))
        x_BFNC = ops.relu(self.timbre(map_BFNC) + self.found(found_BFN3))
        kernel = ops.cast(self.intervals, self.compute_dtype)
        kernel_CNM = ops.take(kernel, self._intervals, axis=1)
        mixed = ops.einsum("bfnc,cnm->bfmc", x_BFNC, kernel_CNM)
        added_BFN3 = self.logits(self.hidden(ops.concatenate([x_BFNC, mixed], axis=-1)))
        return ops.reshape(ops.transpose(added_BFN3, (0, 1, 3, 2)), (-1, *logits.shape[1:]))


@keras.saving.register_keras_serializable(package="mt3_keras")
class ClassHead(_Part):
    """The instrument of each pitch: encoded [B, P, D] -> logits float32 [B, F, N * NUM_CLASSES].

    It combines the encoder's output, the stem's features of the pitch and the shape of its
    spectrum, whatever the level; then it covers a fifth of a second from there on, which separates
    a guitar from a piano.

    Call arguments:
      encoded: of the encoder.
      features: [B, P, N * stem_channels], of the stem.
      harmonics: [B, F, N, C], of the front end.
    """

    def __init__(self, network: DetectorBodyConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(network, autocast=False, **kwargs)
        policy, width = self.dtype_policy, self.network.class_width
        self.context = dense(width, "context", policy)
        self.timbre = dense(width, "timbre", policy)
        self.spectrum_hidden = keras.layers.Dense(
            self.network.spectrum_width, activation="relu", dtype=policy, name="spectrum_hidden"
        )
        self.spectrum = keras.layers.Dense(
            width, use_bias=False, kernel_initializer="zeros", dtype=policy, name="spectrum"
        )
        self.course = keras.layers.Conv2D(
            width,
            (COURSE_POSITIONS, 1),
            dilation_rate=(COURSE_STEP, 1),
            padding="same",
            activation="relu",
            kernel_initializer="he_normal",
            data_format="channels_last",
            dtype=policy,
            name="course",
        )
        self.logits = Logits(NUM_CLASSES, dtype=policy, name="logits")

    def build(self, encoded_shape: Any, features_shape: Any, harmonics_shape: Any) -> None:
        network = self.network
        self.context.build(encoded_shape)
        self.timbre.build((None, network.stem_channels))
        self.spectrum_hidden.build((None, harmonics_shape[-1]))
        self.spectrum.build((None, network.spectrum_width))
        self.register = self.add_weight(
            shape=(NUM_PITCHES, network.class_width), initializer="zeros", name="register"
        )
        self.course.build((None, network.num_positions, NUM_PITCHES, network.class_width))
        self.logits.build((None, 2 * network.class_width))

    def call(self, encoded: Any, features: Any, harmonics: Any) -> Any:
        network = self.network
        hidden = self.context(encoded)[:, :, None] + ops.cast(self.register, self.compute_dtype)
        shape = (-1, network.num_positions, NUM_PITCHES, network.stem_channels)
        hidden += self.timbre(ops.reshape(features, shape))
        hidden += self.spectrum(self.spectrum_hidden(self._position_spectra(harmonics)))
        hidden = ops.relu(hidden)
        logits = self.logits(ops.concatenate([hidden, self.course(hidden)], axis=-1))
        logits = ops.reshape(logits, (-1, network.num_positions, HEADS["class"]))
        return ops.repeat(logits, network.frames_per_position, axis=1)

    def _position_spectra(self, harmonics_BFNC: Any) -> Any:
        """The harmonics of each pitch [B, P, N, C], their mean taken off."""
        network = self.network
        channels = harmonics_BFNC.shape[-1]
        apart = (-1, network.num_positions, network.frames_per_position, NUM_PITCHES, channels)
        spectra = ops.mean(ops.reshape(harmonics_BFNC, apart), axis=2)
        return ops.cast(spectra - ops.mean(spectra, axis=-1, keepdims=True), self.compute_dtype)


@keras.saving.register_keras_serializable(package="mt3_keras")
class Heads(_Part):
    """Encoded positions and what the stem gave -> all rolls.

    The logits of pitches are the sum of the stem's, sharp in time, of the encoder's, which knows
    the context, and of `PitchMixer`'s, which compares pitches.

    Call arguments:
      encoded: [B, P, D].
      harmonics, features: as of `ClassHead`.
      cells: the stem's "map".
      stem_rolls: float32 [B, F, 3 * N], the stem's "rolls".
    """

    def __init__(self, network: DetectorBodyConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(network, autocast=False, **kwargs)  # the stem's logits stay float32
        network, policy = self.network, self.dtype_policy
        self.rolls = Logits(
            network.frames_per_position * sum(ENCODER_HEADS.values()),
            bias_initializer=keras.initializers.Constant(self._initial_logits()),
            dtype=policy,
            name="rolls",
        )
        self.classes = ClassHead(network, dtype=policy, name="class")
        self.mixer = PitchMixer(network, dtype=policy, name="mixer")

    def _initial_logits(self) -> NDArray[np.float32]:
        initial = dict.fromkeys(ENCODER_HEADS, INITIAL_LOGIT) | {"strength": 0.0}
        one_frame = np.repeat(list(initial.values()), list(ENCODER_HEADS.values()))
        return np.tile(one_frame, self.network.frames_per_position).astype(np.float32)

    def build(
        self,
        encoded_shape: Any,
        harmonics_shape: Any,
        cells_shape: Any,
        features_shape: Any,
        stem_rolls_shape: Any,
    ) -> None:
        self.rolls.build(encoded_shape)
        self.classes.build(encoded_shape, features_shape, harmonics_shape)
        self.mixer.build()

    def call(
        self, encoded: Any, harmonics: Any, cells: Any, features: Any, stem_rolls: Any
    ) -> Rolls:
        num_columns = sum(ENCODER_HEADS.values())
        logits_BFN = ops.reshape(
            self.rolls(encoded), (-1, self.network.segment_frames, num_columns)
        )
        num_pitched = len(STEM_HEADS) * NUM_PITCHES
        pitched = logits_BFN[..., :num_pitched] + stem_rolls
        pitched += self.mixer(cells, pitched)
        logits_BFN = ops.concatenate([pitched, logits_BFN[..., num_pitched:]], axis=-1)
        ends = np.cumsum(list(ENCODER_HEADS.values())).tolist()
        starts = [0, *ends[:-1]]
        rolls = {
            head: logits_BFN[..., start:end]
            for head, start, end in zip(ENCODER_HEADS, starts, ends, strict=True)
        }
        return rolls | {"class": self.classes(encoded, features, harmonics)}


@keras.saving.register_keras_serializable(package="mt3_keras")
class NoteDetector(keras_hub.models.Backbone):
    """Detects the notes of a segment: onsets, ends, strengths and instruments, as rolls.

    Called with {"samples": float32 [B, input_samples]}, 16 kHz mono from `lead_samples` before the
    segment on, it gives f"{head}_logits" [B, F, N] for each head of `config.HEADS`, in the policy's
    compute dtype (`forward` gives them in float32).

    Args:
      spectrogram: of a `DetectorConfig`, or a dict of its fields.
      network: likewise.
      dtype: policy of the network; spectrum and logits are computed in float32 always.
    """

    def __init__(
        self,
        spectrogram: HarmonicConfig | dict[str, Any] | None = None,
        network: DetectorBodyConfig | dict[str, Any] | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        config = DetectorConfig.from_parts(spectrogram=spectrogram, network=network)

        # === Layers ===
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        net = config.network
        self.harmonics = Harmonics(config.spectrogram, dtype=policy, name="harmonics")
        self.stem = ConvStem(net, dtype=policy, name="stem")
        self.encoder = Encoder(
            net.num_encoder_layers,
            net.num_positions,
            net.width,
            net.num_heads,
            net.head_width,
            net.mlp_width,
            net.dropout,
            dtype=policy,
            name="encoder",
        )
        self.heads = Heads(net, dtype=policy, name="heads")

        # === Functional Model ===
        samples = keras.Input((config.input_samples,), dtype="float32", name="samples")
        rolls = self.forward({"samples": samples})
        super().__init__(
            inputs={"samples": samples},
            outputs={name: ops.cast(roll, policy.compute_dtype) for name, roll in rolls.items()},
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.model_config = config

    def forward(self, inputs: dict[str, Any], training: Any = None) -> Rolls:
        """The outputs of a call, float32."""
        harmonics = self.harmonics(inputs["samples"])
        stem = self.stem(harmonics, training=training)
        encoded = self.encoder(stem["features"], training=training)
        rolls = self.heads(encoded, harmonics, stem["map"], stem["features"], stem["rolls"])
        return {f"{head}_logits": roll for head, roll in rolls.items()}

    def detect(self, samples: Any) -> Any:
        """Samples [B, input_samples] -> probabilities of `NOTE_HEADS`, float32 [B, F, N].

        The columns are those of `note_rolls.NoteRolls.values`.
        """
        outputs = self.forward({"samples": samples}, training=False)
        logits = [outputs[f"{head}_logits"] for head in NOTE_HEADS]
        return ops.sigmoid(ops.concatenate(logits, axis=-1))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.model_config.to_dict()}


register_presets(NoteDetector)
