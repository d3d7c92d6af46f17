"""The detector's body: harmonics of each pitch -> rolls of notes.

Convolutions see how the harmonics of a pitch begin and go on beside those of its neighbours, a
product with one weight for each interval compares it with all other pitches, and one recurrent
layer along time, the same for each of the 88 pitches, predicts its notes. A second recurrent layer
follows the whole frame and adds its context to every pitch.

Published neighbours: Onsets and Frames (Hawthorne et al., ISMIR 2018) for the convolutions, the
recurrent layer and the heads, Basic Pitch (Bittner et al., ICASSP 2022) for the harmonics. Here the
recurrent layer is shared by the pitches, as in HPPNet (Wei et al., ISMIR 2022).

Shape letters: B batch, T frames, P steps of `frames_per_step` frames, N pitches, C channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from mt3_keras.models.config import NUM_PITCHES, PITCH_HEADS, BodyConfig
from mt3_keras.models.layers import Logits

INPUT_SCALE = 0.25  # brings `Harmonics`, 0 to about 8, near unit variance
OCTAVE = 12
INITIAL_LOGITS = {"onset": -4.0, "unison": -6.0, "offset": -4.0, "frame": -2.0, "strength": 0.0}


@keras.saving.register_keras_serializable(package="mt3_keras")
class DetectorBody(keras.layers.Layer):
    """Harmonics -> logits of what each pitch does in each frame.

    Call arguments:
      harmonics: float32 [B, T, NUM_PITCHES, C] of `spectrogram.Harmonics`; `frames_per_step`
        divides T.
      state: None to begin with silence, or what `states` held at the step before the first one
        that is predicted: "pitches" [B, NUM_PITCHES, recurrent_width], "context"
        [B, context_width].
      margin_steps: first and last steps of `harmonics` that the convolutions see beside the
        predicted ones and the recurrent layers do not.

    Returns:
      A dict of float32 logits: those of `PITCH_HEADS` [B, T, NUM_PITCHES], without the margins.
      "unison" says that two notes of one pitch begin together; of "strength" the sigmoid is
      velocity / 127. "features" [B, P, NUM_PITCHES, num_features] are what these were made of,
      for `NoteNames`. "states" is a dict of the forward states after each step,
      "pitches" [B, P, NUM_PITCHES, recurrent_width] and "context" [B, P, context_width].
    """

    def __init__(
        self, config: BodyConfig | dict[str, Any], unroll: bool = False, **kwargs: Any
    ) -> None:
        """`unroll` builds the recurrent layers without a loop; T must be static."""
        super().__init__(**kwargs)
        self.config = config = BodyConfig(**config) if isinstance(config, dict) else config
        self.unroll = unroll
        channels, policy = config.channels, self.dtype_policy

        def convolution(name: str, size: tuple[int, int], num: int = channels, **more: Any) -> Any:
            return keras.layers.Conv2D(
                num,
                size,
                padding="same",
                use_bias=False,
                kernel_initializer="he_normal",
                data_format="channels_last",
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
        self.norms = [norm(f"norm_{i}") for i in range(7)]
        self.to_frame = convolution("to_frame", (1, 1), 8)
        self.frame = keras.layers.Dense(
            config.frame_width, kernel_initializer="he_normal", dtype=policy, name="frame"
        )
        self.to_noise = keras.layers.Dense(6, dtype=policy, name="to_noise")
        self.noise = keras.layers.Dense(
            config.frame_width // 2,
            activation="relu",
            kernel_initializer="he_normal",
            dtype=policy,
            name="noise",
        )
        self.strokes = keras.layers.Conv1D(
            config.frame_width,
            2 * steps + 1,
            strides=steps,
            padding="same",
            data_format="channels_last",
            use_bias=False,
            kernel_initializer="he_normal",
            dtype=policy,
            name="strokes",
        )
        self.context = Recurrent(
            config.context_width, config.directions, unroll, dtype=policy, name="context"
        )
        self.add_context = keras.layers.Dense(channels, dtype=policy, name="add_context")
        self.recurrent = Recurrent(
            config.recurrent_width, config.directions, unroll, dtype=policy, name="recurrent"
        )
        initial = np.tile([INITIAL_LOGITS[head] for head in PITCH_HEADS], steps)
        self.pitch_logits = initial_logits("pitch_logits", initial, policy)
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
        for layer in self.norms[5:]:
            layer.build((None, None, config.frame_width))
        self.frame.build((None, None, NUM_PITCHES * 8))
        self.to_noise.build(harmonics_shape)
        self.noise.build((None, None, NUM_PITCHES * self.to_noise.units))
        self.strokes.build((None, None, config.frame_width // 2))
        self.context.build((None, None, 2 * config.frame_width))
        self.add_context.build((None, None, config.directions * config.context_width))
        self.recurrent.build((None, None, config.channels))
        self.pitch_logits.build((None, None, config.num_features))
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
        strokes = self._find_strokes(harmonics, training)  # [B, P, frame_width]
        if any(margin_steps):
            own = slice(margin_steps[0], features.shape[1] - margin_steps[1])
            features, strokes = features[:, own], strokes[:, own]
        state = state or {}
        frame = _flatten(ops.relu(self.to_frame(features)))
        frame = ops.relu(self.norms[5](self.frame(frame), training=training))
        frame = ops.concatenate([frame, strokes], axis=-1)
        context = self.context(ops.transpose(frame, (1, 0, 2)), state.get("context"))
        context = ops.transpose(context, (1, 0, 2))
        features = ops.relu(features + self.add_context(context)[:, :, None])
        pitches = self._along_time(features, state.get("pitches"))
        features = ops.concatenate([pitches, features], axis=-1)
        pitch_logits = self.pitch_logits(features)
        rolls = ops.split(self._to_frames(pitch_logits), len(PITCH_HEADS), axis=-1)
        return {
            **{head: roll[..., 0] for head, roll in zip(PITCH_HEADS, rolls, strict=True)},
            "features": features,
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

    def _find_strokes(self, harmonics: Any, training: Any) -> Any:
        """The spectrum of each frame, pitch or none, as the noise of drums has: [B, P, C]."""
        noise = self.to_noise(ops.cast(harmonics, self.compute_dtype) * INPUT_SCALE)
        noise = self.strokes(self.noise(_flatten(noise)))
        return ops.relu(self.norms[6](noise, training=training))

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

    def _to_frames(self, logits: Any) -> Any:
        """Logits of steps, those of each of their frames side by side -> [B, T, N, columns]."""
        steps = self.config.frames_per_step
        columns = logits.shape[-1] // steps
        num_steps = ops.shape(logits)[1]
        apart = ops.reshape(logits, (-1, num_steps, NUM_PITCHES, steps, columns))
        apart = ops.transpose(apart, (0, 1, 3, 2, 4))
        return ops.reshape(apart, (-1, num_steps * steps, NUM_PITCHES, columns))

    def get_config(self) -> dict[str, Any]:
        own = {"config": dataclasses.asdict(self.config), "unroll": self.unroll}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="mt3_keras")
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
                shape=(width, 3 * width),
                initializer="glorot_uniform",  # in bfloat16 too, unlike orthogonal ones
                name=f"{name}_recurrent_kernel",
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
        return ops.cast(ops.concatenate(outputs, axis=-1), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        own = {"width": self.width, "directions": self.directions, "unroll": self.unroll}
        return {**super().get_config(), **own}

    def _run(self, inputs: Any, state: Any, kernel: Any) -> Any:
        """Projected inputs [P, R, 3 * width] -> states [P, R, width]."""
        kernel, width = ops.cast(kernel, self.compute_dtype), self.width
        gates, new = inputs[..., : 2 * width], inputs[..., 2 * width :]  # update, reset; new

        def step(state: Any, projected: Any) -> tuple[Any, Any]:
            gates, new = projected
            to_gates, to_new = ops.split(ops.matmul(state, kernel), [2 * width], axis=-1)
            kept, reset = ops.split(ops.sigmoid(gates + to_gates), 2, axis=-1)
            new = ops.tanh(new + reset * to_new)
            state = new + kept * (state - new)
            return state, state

        if not self.unroll:
            return ops.scan(step, state, (gates, new))[1]
        states = []
        for projected in zip(ops.unstack(gates, axis=0), ops.unstack(new, axis=0), strict=True):
            state, _ = step(state, projected)
            states.append(state)
        return ops.stack(states)


def _flatten(x: Any) -> Any:
    """[B, T, N, C] -> [B, T, N * C]."""
    return ops.reshape(x, (-1, ops.shape(x)[1], x.shape[2] * x.shape[3]))


def initial_logits(name: str, initial: Any, policy: Any) -> Any:
    """An output layer whose logits begin at these."""
    return Logits(
        len(initial),
        bias_initializer=keras.initializers.Constant(np.asarray(initial, np.float32)),
        dtype=policy,
        name=name,
    )
