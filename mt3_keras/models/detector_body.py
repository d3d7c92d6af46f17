"""Convolutional-recurrent network of `small`: harmonics of each pitch -> rolls of notes and drums.

Convolutions see how the harmonics of a pitch begin and go on beside those of its neighbours, a
product with one weight for each interval compares it with all other pitches, and one recurrent
layer along time, the same for each of the 88 pitches, predicts its notes. A second recurrent layer
follows the whole frame: it predicts drums and adds its context to every pitch.

Published neighbours: Onsets and Frames (Hawthorne et al., ISMIR 2018) for the convolutions, the
recurrent layer and the heads, Basic Pitch (Bittner et al., ICASSP 2022) for the harmonics. Here the
recurrent layer is shared by the pitches, as in HPPNet (Wei et al., ISMIR 2022).

Shape letters: B batch, T frames, P steps of `frames_per_step` frames, N pitches, C channels,
K notes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from mt3_keras.models.config import LOWEST_DRUM as LOWEST_DRUM
from mt3_keras.models.config import NUM_CLASSES, NUM_PITCHES
from mt3_keras.models.config import NUM_DRUMS as NUM_DRUMS

PITCH_HEADS = ("onset", "unison", "offset", "frame", "strength")
PROGRAMS_PER_CLASS = 8
INPUT_SCALE = 0.25  # brings `Harmonics`, 0 to about 8, near unit variance
OCTAVE = 12
INITIAL_LOGITS = {"onset": -4.0, "unison": -6.0, "offset": -4.0, "frame": -2.0, "strength": 0.0}
INITIAL_DRUM_LOGIT = -5.0
# Of `NoteNames`: frames before and from an onset on, and the pitches whose harmonics it compares:
# its own, and those of which the first harmonic is its third and fourth.
NAME_FRAMES = (4, 28)
NAME_INTERVALS = (0, 19, 24)


@dataclasses.dataclass(frozen=True)
class BodyConfig:
    """Sizes of `DetectorBody` and `NoteNames`.

    Attributes:
      spectrum_channels: that the harmonics of each pitch in each frame are reduced to.
      channels: of the convolutions.
      recurrent_width: units of the recurrent layer of each pitch, in each direction.
      directions: 2 to read time both ways, 1 to read it forwards alone.
      long_steps: steps that the longest convolution along time sees, half of them ahead.
      frames_per_step: frames that the first convolution joins; the rolls have all frames again.
      interval_channels: channels that are compared over all pitches.
      context_width: units of the recurrent layer of the whole frame, in each direction.
      frame_width: of what the whole frame is reduced to before that layer.
      names_width: channels of `NoteNames`.
    """

    spectrum_channels: int = 24
    channels: int = 32
    recurrent_width: int = 32
    directions: int = 2
    long_steps: int = 7
    frames_per_step: int = 2
    interval_channels: int = 16
    context_width: int = 96
    frame_width: int = 192
    names_width: int = 128

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be positive: got {getattr(self, field.name)}")


@keras.saving.register_keras_serializable(package="mt3_keras")
class DetectorBody(keras.layers.Layer):
    """Harmonics -> logits of what each pitch and each drum does in each frame.

    Call arguments:
      harmonics: float32 [B, T, NUM_PITCHES, C] of `spectrogram.Harmonics`; `frames_per_step`
        divides T.
      state: None to begin with silence, or what `states` held at the step before the first one
        that is predicted: "pitches" [B, NUM_PITCHES, recurrent_width], "context"
        [B, context_width].
      margin_steps: first and last steps of `harmonics` that the convolutions see beside the
        predicted ones and the recurrent layers do not.

    Returns:
      A dict of float32 logits: those of `PITCH_HEADS` [B, T, NUM_PITCHES], "drum"
      [B, T, NUM_DRUMS] of the keys from `LOWEST_DRUM` on and "drum_strength" [B, T, 1], without
      the margins. "unison" says that two notes of one pitch begin together; of "strength" the
      sigmoid is velocity / 127. "states" is a dict of the forward states after each step,
      "pitches" [B, P, NUM_PITCHES, recurrent_width] and "context" [B, P, context_width].
    """

    def __init__(self, config: BodyConfig, unroll: bool = False, **kwargs: Any) -> None:
        """`unroll` builds the recurrent layers without a loop, for LiteRT; T must be static."""
        super().__init__(**kwargs)
        self.config, self.unroll = config, unroll
        channels, policy = config.channels, self.dtype_policy

        def convolution(name: str, size: tuple[int, int], num: int = channels, **more: Any) -> Any:
            return keras.layers.Conv2D(
                num,
                size,
                padding="same",
                use_bias=False,
                kernel_initializer="he_normal",
                dtype=policy,
                name=name,
                **more,
            )

        def norm(name: str) -> Any:
            return keras.layers.BatchNormalization(momentum=0.98, dtype=policy, name=name)

        steps = config.frames_per_step
        self.spectrum = keras.layers.Dense(
            config.spectrum_channels,
            activation="relu",
            kernel_initializer=keras.initializers.VarianceScaling(2 * INPUT_SCALE**2),
            dtype=policy,
            name="spectrum",
        )
        self.first = convolution("first", (2 * steps + 1, 3), strides=(steps, 1))
        self.near = [convolution(f"near_{i}", (3, 3)) for i in range(2)]
        self.long = convolution("long", (config.long_steps, 1), channels // 2)
        self.octaves = convolution("octaves", (1, 3), channels // 2, dilation_rate=(1, OCTAVE))
        self.to_intervals = convolution("to_intervals", (1, 1), config.interval_channels)
        self.join = convolution("join", (1, 1))
        self.norms = [norm(f"norm_{i}") for i in range(6)]
        self.to_frame = convolution("to_frame", (1, 1), 8)
        self.frame = keras.layers.Dense(
            config.frame_width, kernel_initializer="he_normal", dtype=policy, name="frame"
        )
        self.context = Recurrent(
            config.context_width, config.directions, unroll, dtype=policy, name="context"
        )
        self.add_context = keras.layers.Dense(channels, dtype=policy, name="add_context")
        self.recurrent = Recurrent(
            config.recurrent_width, config.directions, unroll, dtype=policy, name="recurrent"
        )
        initial = np.tile([INITIAL_LOGITS[head] for head in PITCH_HEADS], steps)
        self.pitch_logits = _logits("pitch_logits", initial)
        drums = np.tile([*[INITIAL_DRUM_LOGIT] * NUM_DRUMS, 0.0], steps)
        self.drum_hidden = keras.layers.Dense(
            config.frame_width, activation="relu", dtype=policy, name="drum_hidden"
        )
        self.drum_logits = _logits("drum_logits", drums)
        pitch = np.arange(NUM_PITCHES)
        self._intervals = pitch[:, None] - pitch[None, :] + NUM_PITCHES - 1

    def build(self, harmonics_shape: Any) -> None:
        config = self.config
        maps = (None, None, NUM_PITCHES, config.channels)
        self.spectrum.build(harmonics_shape)
        self.first.build((*maps[:-1], config.spectrum_channels))
        for layer in (*self.near, self.long, self.octaves, self.to_intervals, self.to_frame):
            layer.build(maps)
        joined = config.channels + 2 * (config.channels // 2) + config.interval_channels
        self.join.build((*maps[:-1], joined))
        for layer in self.norms[:4]:
            layer.build(maps)
        self.norms[4].build((*maps[:-1], config.interval_channels))
        self.norms[5].build((None, None, config.frame_width))
        self.frame.build((None, None, NUM_PITCHES * 8))
        self.context.build((None, None, config.frame_width))
        self.add_context.build((None, None, config.directions * config.context_width))
        self.recurrent.build((None, None, config.channels))
        self.pitch_logits.build(
            (None, None, config.directions * config.recurrent_width + config.channels)
        )
        whole = config.directions * config.context_width + config.frame_width
        self.drum_hidden.build((None, None, whole))
        self.drum_logits.build((None, None, config.frame_width))
        self.intervals = self.add_weight(
            shape=(config.interval_channels, 2 * NUM_PITCHES - 1),
            initializer=keras.initializers.RandomNormal(stddev=0.05),
            name="intervals",
        )

    def call(
        self,
        harmonics: Any,
        state: dict[str, Any] | None = None,
        margin_steps: tuple[int, int] = (0, 0),
        training: Any = None,
    ) -> dict[str, Any]:
        features = self._convolve(harmonics, training)  # [B, P, N, C]
        last = features.shape[1] - margin_steps[1] if any(margin_steps) else None
        features = features[:, margin_steps[0] : last]
        state = state or {}
        frame = ops.relu(self.to_frame(features))
        num_steps = ops.shape(frame)[1]
        flat = ops.reshape(frame, (-1, num_steps, NUM_PITCHES * frame.shape[-1]))
        frame = ops.relu(self.norms[5](self.frame(flat), training=training))
        context = self.context(ops.transpose(frame, (1, 0, 2)), state.get("context"))
        context = ops.transpose(context, (1, 0, 2))
        features = ops.relu(features + self.add_context(context)[:, :, None])
        pitches = self._along_time(features, state.get("pitches"))
        pitch_logits = self.pitch_logits(ops.concatenate([pitches, features], axis=-1))
        whole = self.drum_hidden(ops.concatenate([context, frame], axis=-1))
        drum_logits = self._to_frames(self.drum_logits(whole), 1)
        rolls = ops.split(self._to_frames(pitch_logits, NUM_PITCHES), len(PITCH_HEADS), axis=-1)
        return {
            **{head: roll[..., 0] for head, roll in zip(PITCH_HEADS, rolls, strict=True)},
            "drum": drum_logits[:, :, 0, :NUM_DRUMS],
            "drum_strength": drum_logits[:, :, 0, NUM_DRUMS:],
            "states": {
                "pitches": pitches[..., : self.config.recurrent_width],
                "context": context[..., : self.config.context_width],
            },
        }

    def _convolve(self, harmonics: Any, training: Any) -> Any:
        """Harmonics [B, T, N, C] -> features [B, P, N, channels], before their activation."""
        x = self.spectrum(ops.cast(harmonics, self.compute_dtype))
        x = ops.relu(self.norms[0](self.first(x), training=training))
        for near, norm in zip(self.near, self.norms[1:3], strict=True):
            x = x + ops.relu(norm(near(x), training=training))
        long, octaves = ops.relu(self.long(x)), ops.relu(self.octaves(x))
        compared = ops.relu(self.norms[4](self._compare(x), training=training))
        joined = ops.concatenate([x, long, octaves, compared], axis=-1)
        return self.norms[3](self.join(joined), training=training)

    def _compare(self, x: Any) -> Any:
        """Each channel at each pitch, summed over all pitches by its interval's weight."""
        kernel = ops.take(ops.cast(self.intervals, self.compute_dtype), self._intervals, axis=1)
        return ops.einsum("bpnc,cnm->bpmc", ops.relu(self.to_intervals(x)), kernel)

    def _along_time(self, features: Any, state: Any) -> Any:
        """The recurrent layer of each pitch: [B, P, N, C] -> [B, P, N, directions * width]."""
        num_steps, channels = ops.shape(features)[1], features.shape[-1]
        time_first = ops.reshape(ops.transpose(features, (1, 0, 2, 3)), (num_steps, -1, channels))
        if state is not None:
            state = ops.reshape(state, (-1, self.config.recurrent_width))
        outputs = self.recurrent(time_first, state)
        outputs = ops.reshape(outputs, (num_steps, -1, NUM_PITCHES, outputs.shape[-1]))
        return ops.transpose(outputs, (1, 0, 2, 3))

    def _to_frames(self, logits: Any, num_rows: int) -> Any:
        """Logits of steps, those of each of their frames side by side -> [B, T, rows, columns]."""
        steps = self.config.frames_per_step
        columns = logits.shape[-1] // steps
        num_steps = ops.shape(logits)[1]
        apart = ops.reshape(logits, (-1, num_steps, num_rows, steps, columns))
        apart = ops.transpose(apart, (0, 1, 3, 2, 4))
        return ops.reshape(apart, (-1, num_steps * steps, num_rows, columns))

    def get_config(self) -> dict[str, Any]:
        own = {"config": dataclasses.asdict(self.config), "unroll": self.unroll}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DetectorBody:
        return cls(**{**config, "config": BodyConfig(**config["config"])})


class Recurrent(keras.layers.Layer):
    """Gated recurrent units along time: [P, R, C] -> outputs [P, R, directions * width].

    The reset gate is applied after the recurrent product, and input projections are made for all
    steps at once, so that a step is one matrix product and few element-wise operations.

    Call arguments:
      x: [P, R, C], P steps of R independent rows: time first, as the loop takes it.
      state: of the forward direction before the first step, [R, width]; None for zeros. The
        backward one always begins with zeros.

    Returns:
      The outputs, the forward states first; these are what a later call may go on from.
    """

    def __init__(self, width: int, directions: int, unroll: bool = False, **kwargs: Any) -> None:
        """`unroll` writes the steps one by one into the graph: P must be static."""
        super().__init__(**kwargs)
        self.width, self.directions, self.unroll = width, directions, unroll

    def build(self, shape: Any) -> None:
        width, names = self.width, ("forward", "backward")[: self.directions]
        self.kernels = [
            self.add_weight(
                shape=(shape[-1], 3 * width), initializer="glorot_uniform", name=f"{name}_kernel"
            )
            for name in names
        ]
        self.recurrent_kernels = [
            self.add_weight(
                shape=(width, 3 * width), initializer="orthogonal", name=f"{name}_recurrent_kernel"
            )
            for name in names
        ]
        self.biases = [
            self.add_weight(shape=(3 * width,), initializer="zeros", name=f"{name}_bias")
            for name in names
        ]

    def call(self, x: Any, state: Any = None) -> Any:
        outputs = []
        for i in range(self.directions):
            inputs = ops.matmul(x, self.kernels[i]) + self.biases[i]
            if i:
                inputs, state = ops.flip(inputs, axis=0), None
            if state is None:
                state = ops.zeros_like(inputs[0, :, : self.width])
            found = self._run(inputs, state, self.recurrent_kernels[i])
            outputs.append(ops.flip(found, axis=0) if i else found)
        return ops.concatenate(outputs, axis=-1)

    def _run(self, inputs: Any, state: Any, kernel: Any) -> Any:
        """Projected inputs [P, R, 3 * width] -> states [P, R, width]."""
        kernel = ops.cast(kernel, self.compute_dtype)

        def step(state: Any, projected: Any) -> tuple[Any, Any]:
            kept, reset, new = ops.split(projected, 3, axis=-1)
            kept_by, reset_by, new_by = ops.split(ops.matmul(state, kernel), 3, axis=-1)
            kept, reset = ops.sigmoid(kept + kept_by), ops.sigmoid(reset + reset_by)
            new = ops.tanh(new + reset * new_by)
            state = new + kept * (state - new)
            return state, state

        if not self.unroll:
            return ops.scan(step, state, inputs)[1]
        states = []
        for projected in ops.unstack(inputs, axis=0):
            state, _ = step(state, projected)
            states.append(state)
        return ops.stack(states)


def _logits(name: str, initial: Any) -> Any:
    return keras.layers.Dense(
        len(initial),
        bias_initializer=keras.initializers.Constant(np.asarray(initial, np.float32)),
        dtype="float32",
        name=name,
    )


@keras.saving.register_keras_serializable(package="mt3_keras")
class NoteNames(keras.layers.Layer):
    """What plays each note found: logits of instrument classes and of the programs within each.

    It looks at the harmonics of the note's pitch for half a second around its onset, at those of
    two pitches above it for harmonics up to the 28th, and at the pitch itself.

    Call arguments:
      harmonics: float32 [B, T, NUM_PITCHES, C] of `spectrogram.Harmonics`.
      cells: int32 [B, K, 2], frame and pitch column (from 0) of each note's onset.

    Returns:
      float32 logits [B, K, NUM_CLASSES] and [B, K, NUM_CLASSES, PROGRAMS_PER_CLASS].
    """

    def __init__(self, config: BodyConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        width, policy = config.names_width, self.dtype_policy
        self.spectrum = keras.layers.Dense(
            width // 2,
            activation="relu",
            kernel_initializer="he_normal",
            dtype=policy,
            name="spectrum",
        )
        self.course = [
            keras.layers.Conv1D(
                width,
                5 if i == 0 else 3,
                strides=2,
                padding="same",
                activation="relu",
                kernel_initializer="he_normal",
                dtype=policy,
                name=f"course_{i}",
            )
            for i in range(4)
        ]
        self.norms = [
            keras.layers.BatchNormalization(momentum=0.98, dtype=policy, name=f"norm_{i}")
            for i in range(4)
        ]
        self.hidden = keras.layers.Dense(
            width, activation="relu", kernel_initializer="he_normal", dtype=policy, name="hidden"
        )
        self.dropout = keras.layers.Dropout(0.2, dtype=policy)
        self.pitches = keras.layers.Embedding(NUM_PITCHES, width, dtype=policy, name="pitches")
        self.classes = keras.layers.Dense(NUM_CLASSES, dtype="float32", name="classes")
        self.programs = keras.layers.Dense(
            NUM_CLASSES * PROGRAMS_PER_CLASS, dtype="float32", name="programs"
        )

    def build(self, harmonics_shape: Any, cells_shape: Any = None) -> None:
        width, frames = self.config.names_width, sum(NAME_FRAMES)
        self.spectrum.build((None, frames, len(NAME_INTERVALS) * harmonics_shape[-1]))
        for i, (course, norm) in enumerate(zip(self.course, self.norms, strict=True)):
            course.build((None, frames // 2**i, width // 2 if i == 0 else width))
            norm.build((None, frames // 2 ** (i + 1), width))
        self.pitches.build(())
        self.hidden.build((None, (frames // 16 + 1) * width))
        self.classes.build((None, width))
        self.programs.build((None, width))

    def call(self, harmonics: Any, cells: Any, training: Any = None) -> tuple[Any, Any]:
        num_notes = ops.shape(cells)[1]
        looks = self.gather(harmonics, cells)
        classes, programs = self.classify(looks, ops.reshape(cells[..., 1], (-1,)), training)
        return (
            ops.reshape(classes, (-1, num_notes, NUM_CLASSES)),
            ops.reshape(programs, (-1, num_notes, NUM_CLASSES, PROGRAMS_PER_CLASS)),
        )

    def gather(self, harmonics: Any, cells: Any) -> Any:
        """What `classify` looks at: float32 [B * K, frames, intervals * C], 0 beyond the edges."""
        before, after = NAME_FRAMES
        channels = harmonics.shape[-1]
        padded = ops.pad(harmonics, ((0, 0), (before, after), (0, max(NAME_INTERVALS)), (0, 0)))
        num_frames, num_columns = ops.shape(padded)[1], NUM_PITCHES + max(NAME_INTERVALS)
        frames = ops.cast(cells[..., 0, None, None], "int32") + np.arange(before + after)[:, None]
        columns = ops.cast(cells[..., 1, None, None], "int32") + np.array(NAME_INTERVALS)
        rows = ops.arange(ops.shape(cells)[0])[:, None, None, None] * num_frames
        flat = (rows + frames) * num_columns + columns  # [B, K, frames, intervals]
        looks = ops.take(ops.reshape(padded, (-1, channels)), flat, axis=0)
        return ops.reshape(looks, (-1, before + after, len(NAME_INTERVALS) * channels))

    def classify(self, looks: Any, columns: Any, training: Any = None) -> tuple[Any, Any]:
        """Looks of `gather`, pitch columns int [K] -> logits [K, classes], [K, all programs]."""
        own = looks[..., : looks.shape[-1] // len(NAME_INTERVALS)]
        x = looks - ops.mean(own, axis=(1, 2), keepdims=True)
        x = self.spectrum(ops.cast(x, self.compute_dtype) * (2 * INPUT_SCALE))
        for course, norm in zip(self.course, self.norms, strict=True):
            x = norm(course(x), training=training)
        flat = ops.reshape(x, (-1, x.shape[1] * x.shape[2]))
        x = self.hidden(ops.concatenate([flat, self.pitches(columns)], axis=-1))
        x = self.dropout(x, training=training)
        return self.classes(x), self.programs(x)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "config": dataclasses.asdict(self.config)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoteNames:
        return cls(**{**config, "config": BodyConfig(**config["config"])})
