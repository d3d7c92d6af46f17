"""Heads on the encoder: what sounds, from when to when, how strong, by which instrument.

Every head is a roll, logits float32 [B, F, N]: F is `segment_frames`, N the head's columns in
`config.HEADS`. Frame i stands for the samples [i * hop, (i + 1) * hop) from the segment's start
(`lead_samples` of the network's input come before). Its target is 1 in frame

- "onset", "offset": floor(time * frames_per_second) of a note's on or off, column
  pitch - `LOWEST_PITCH`, notes of all programs together, drums left out;
- "frame": from the onset's frame to the offset's, without the latter but at least one, columns
  as above;
- "drum": of a drum note's onset, column its MIDI pitch 0 to 127;
- "program": in which a note of the program sounds (as "frame"), drums left out, column the program
  0 to 127 after the granularity's map.

"strength" has a target in the frames of onsets only: the note's MIDI velocity / 127, columns as
"onset", and in one more column that of the strongest drum. "class" has one where a pitch sounds (as
"frame"): 1 for the General MIDI classes of the notes there, `NUM_CLASSES` columns for each pitch.

Pitches off the piano have no columns of their own and are left out of onset, offset and frame. Of a
note that began before the segment only what lies inside is marked. In training the model's output
holds a roll as f"{head}_logits" beside the tokens' "logits"; the target's name is the head's.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.models.config import (
    ENCODER_HEADS,
    HEADS,
    NUM_CLASSES,
    NUM_PITCHES,
    ModelConfig,
    NetworkConfig,
)
from mt3_keras.models.layers import dense
from mt3_keras.models.spectrogram import num_channels

Rolls = dict[str, Any]  # head -> logits [B, F, N]

STEM_HEADS = ("onset", "offset", "frame")  # those of single pitches, which the stem predicts too
INITIAL_LOGIT = -4.0  # most of a roll is empty
NUM_FED_BACK = sum(ENCODER_HEADS.values()) - HEADS["strength"]  # all but the last
CLASS_WIDTH, SPECTRUM_WIDTH = 48, 64
COURSE_POSITIONS, COURSE_STEP = 5, 3  # that a convolution sees, and how far apart
MIXER_CHANNELS, MIXER_WIDTH = 16, 24


class Heads(keras.layers.Layer):
    """Encoded frames [B, P, D] -> the same with what the heads found, and the rolls.

    The logits of pitches are the sum of the stem's, sharp in time, of the encoder's, which knows
    the context, and of `PitchMixer`'s, which knows what the two found at other pitches.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # the stem's logits stay float32
        self.network = config.network
        self.rolls = keras.layers.Dense(
            self.network.frames_per_position * sum(ENCODER_HEADS.values()),
            bias_initializer=keras.initializers.Constant(self._initial_logits()),
            dtype="float32",
            name="rolls",
        )
        self.classes = ClassHead(config, dtype=self.dtype_policy, name="class")
        self.mixer = None
        if config.spectrogram.front_end == "harmonic":
            self.mixer = PitchMixer(self.network, dtype=self.dtype_policy, name="mixer")
        self.num_fed_back = self.network.frames_per_position * NUM_FED_BACK
        self.feedback = None
        if self.network.head_feedback:
            self.feedback = keras.layers.Dense(
                self.network.width,
                use_bias=False,
                kernel_initializer="zeros",
                dtype=self.dtype_policy,
                name="feedback",
            )

    def _initial_logits(self) -> NDArray[np.float32]:
        initial = dict.fromkeys(ENCODER_HEADS, INITIAL_LOGIT) | {"strength": 0.0}
        one_frame = np.repeat(list(initial.values()), list(ENCODER_HEADS.values()))
        return np.tile(one_frame, self.network.frames_per_position).astype(np.float32)

    def build(self, encoded_shape: Any) -> None:
        self.rolls.build(encoded_shape)
        self.classes.build(encoded_shape)
        if self.mixer:
            self.mixer.build()
        if self.feedback:
            self.feedback.build((*encoded_shape[:-1], self.num_fed_back))

    def call(self, encoded: Any, stem: dict[str, Any] | None = None) -> tuple[Any, Rolls]:
        """`stem` is what `layers.ConvStem` gave, None for a network without."""
        num_columns = sum(ENCODER_HEADS.values())
        logits_BFN = ops.reshape(
            self.rolls(encoded), (-1, self.network.segment_frames, num_columns)
        )
        class_logits = self.classes(encoded, stem)
        if stem and self.mixer:
            num_pitched = len(STEM_HEADS) * NUM_PITCHES
            pitched = logits_BFN[..., :num_pitched] + stem["rolls"]
            pitched += self.mixer(stem["map"], pitched)
            logits_BFN = ops.concatenate([pitched, logits_BFN[..., num_pitched:]], axis=-1)
        if self.feedback:
            found = ops.cast(ops.sigmoid(logits_BFN[..., :NUM_FED_BACK]), self.compute_dtype)
            found = ops.reshape(found, (-1, self.network.num_positions, self.num_fed_back))
            encoded = encoded + self.feedback(found)
        ends = np.cumsum(list(ENCODER_HEADS.values())).tolist()
        starts = [0, *ends[:-1]]
        rolls = {
            head: logits_BFN[..., start:end]
            for head, start, end in zip(ENCODER_HEADS, starts, ends, strict=True)
        }
        return encoded, rolls | {"class": class_logits}


class PitchMixer(keras.layers.Layer):
    """Corrects the logits of each pitch by what is found at the others: octaves, overtones.

    The stem's map [B, F, NUM_PITCHES, C] and logits of `STEM_HEADS` [B, F, 3 * NUM_PITCHES] ->
    logits to be added to these. A convolution of each channel over all pitches, between two layers
    that look at each cell by itself.
    """

    def __init__(self, network: NetworkConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.network = network
        self.timbre = dense(MIXER_CHANNELS, "timbre", self.dtype_policy)
        self.found = dense(MIXER_CHANNELS, "found", self.dtype_policy)
        self.hidden = keras.layers.Dense(
            MIXER_WIDTH, activation="relu", dtype=self.dtype_policy, name="hidden"
        )
        self.logits = keras.layers.Dense(
            len(STEM_HEADS), kernel_initializer="zeros", dtype="float32", name="logits"
        )
        pitch = np.arange(NUM_PITCHES)
        self._intervals = pitch[:, None] - pitch[None, :] + NUM_PITCHES - 1

    def build(self) -> None:
        self.timbre.build((None, self.network.stem_channels))
        self.found.build((None, len(STEM_HEADS)))
        self.intervals = self.add_weight(
            shape=(MIXER_CHANNELS, 2 * NUM_PITCHES - 1),
            initializer=keras.initializers.RandomNormal(stddev=0.05),
            name="intervals",
        )
        self.hidden.build((None, 2 * MIXER_CHANNELS))
        self.logits.build((None, MIXER_WIDTH))

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


def mixer_products(stem_channels: int) -> int:
    """Multiplications of `PitchMixer` for each pitch of each frame."""
    first = MIXER_CHANNELS * (stem_channels + len(STEM_HEADS))
    mixed = MIXER_CHANNELS * NUM_PITCHES
    return first + mixed + MIXER_WIDTH * (2 * MIXER_CHANNELS + len(STEM_HEADS))


class ClassHead(keras.layers.Layer):
    """The instrument of each pitch: encoded [B, P, D] -> logits float32 [B, F, 88 * NUM_CLASSES].

    It looks at the encoder's output for the context and, where there is a stem, at the stem's
    features of the pitch and at the shape of its spectrum, whatever the level; then at how all that
    goes on for a fifth of a second, which tells a guitar from a piano.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.network, policy = config.network, self.dtype_policy
        self.context = dense(CLASS_WIDTH, "context", policy)
        self.timbre = None
        if config.spectrogram.front_end == "harmonic":
            self.num_harmonics = num_channels(config.spectrogram)
            self.timbre = dense(CLASS_WIDTH, "timbre", policy)
            self.spectrum_hidden = keras.layers.Dense(
                SPECTRUM_WIDTH, activation="relu", dtype=policy, name="spectrum_hidden"
            )
            self.spectrum = keras.layers.Dense(
                CLASS_WIDTH,
                use_bias=False,
                kernel_initializer="zeros",
                dtype=policy,
                name="spectrum",
            )
        self.course = keras.layers.Conv2D(
            CLASS_WIDTH,
            (COURSE_POSITIONS, 1),
            dilation_rate=(COURSE_STEP, 1),
            padding="same",
            activation="relu",
            kernel_initializer="he_normal",
            dtype=policy,
            name="course",
        )
        self.logits = keras.layers.Dense(NUM_CLASSES, dtype="float32", name="logits")

    def build(self, encoded_shape: Any) -> None:
        self.context.build(encoded_shape)
        if self.timbre:
            self.timbre.build((None, self.network.stem_channels))
            self.spectrum_hidden.build((None, self.num_harmonics))
            self.spectrum.build((None, SPECTRUM_WIDTH))
        self.register = self.add_weight(
            shape=(NUM_PITCHES, CLASS_WIDTH), initializer="zeros", name="register"
        )
        self.course.build((None, self.network.num_positions, NUM_PITCHES, CLASS_WIDTH))
        self.logits.build((None, 2 * CLASS_WIDTH))

    def call(self, encoded: Any, stem: dict[str, Any] | None = None) -> Any:
        """`stem` is what `layers.ConvStem` gave."""
        network = self.network
        hidden = self.context(encoded)[:, :, None] + ops.cast(self.register, self.compute_dtype)
        if stem and self.timbre:
            shape = (-1, network.num_positions, NUM_PITCHES, network.stem_channels)
            hidden += self.timbre(ops.reshape(stem["features"], shape))
            hidden += self.spectrum(self.spectrum_hidden(self._position_spectra(stem["harmonics"])))
        hidden = ops.relu(hidden)
        logits = self.logits(ops.concatenate([hidden, self.course(hidden)], axis=-1))
        logits = ops.reshape(logits, (-1, network.num_positions, HEADS["class"]))
        return ops.repeat(logits, network.frames_per_position, axis=1)

    def _position_spectra(self, harmonics_BFNC: Any) -> Any:
        """The harmonics of each pitch [B, P, N, C], their mean taken off."""
        frames = self.network.frames_per_position
        apart = (-1, self.network.num_positions, frames, NUM_PITCHES, self.num_harmonics)
        spectra = ops.mean(ops.reshape(harmonics_BFNC, apart), axis=2)
        return ops.cast(spectra - ops.mean(spectra, axis=-1, keepdims=True), self.compute_dtype)
