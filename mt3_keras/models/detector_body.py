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

from typing import Any

import keras
import numpy as np
from keras import ops

from mt3_keras.models.config import NUM_PITCHES, PITCH_HEADS, BodyConfig
from mt3_keras.models.detector_layers import (
    INPUT_SCALE,
    DetectorPart,
    batch_norm,
    convolution_along_time,
    initial_logits,
    rectified_dense,
)

OCTAVE = 12
INITIAL_LOGITS = {"onset": -4.0, "unison": -6.0, "offset": -4.0, "frame": -2.0, "strength": 0.0}


@keras.saving.register_keras_serializable(package="mt3_keras")
class DetectorBody(DetectorPart):
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
      for `SecondLook`. "states" is a dict of the forward states after each step,
      "pitches" [B, P, NUM_PITCHES, recurrent_width] and "context" [B, P, context_width].
    """

    def __init__(
        self, config: BodyConfig | dict[str, Any], unroll: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(config, unroll, **kwargs)
        net = self.config
        channels, policy = net.channels, self.dtype_policy

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

        steps = net.frames_per_step
        self.spectrum = keras.layers.Dense(
            net.spectrum_channels,
            activation="relu",
            kernel_initializer=keras.initializers.VarianceScaling(2 * INPUT_SCALE**2),
            dtype=policy,
            name="spectrum",
        )
        self.first = convolution("first", (2 * steps + 1, 3), strides=(steps, 1))
        self.near = [convolution(f"near_{i}", (3, 3)) for i in range(2)]
        self.long = convolution("long", (net.long_steps, 1), channels // 2)
        self.octaves = convolution("octaves", (1, 3), channels // 2, dilation_rate=(1, OCTAVE))
        self.to_intervals = convolution("to_intervals", (1, 1), net.interval_channels)
        self.join = convolution("join", (1, 1))
        self.norms = [batch_norm(f"norm_{i}", policy) for i in range(7)]
        self.to_frame = convolution("to_frame", (1, 1), 8)
        self.frame = keras.layers.Dense(
            net.frame_width, kernel_initializer="he_normal", dtype=policy, name="frame"
        )
        self.to_noise = keras.layers.Dense(6, dtype=policy, name="to_noise")
        self.noise = rectified_dense(net.frame_width // 2, "noise", policy)
        self.strokes = convolution_along_time(
            net.frame_width, 2 * steps + 1, "strokes", policy, strides=steps, use_bias=False
        )
        self.context = self.recurrent_over_steps(net.context_width, "context")
        self.add_context = keras.layers.Dense(channels, dtype=policy, name="add_context")
        self.recurrent = self.recurrent_over_steps(net.recurrent_width, "recurrent")
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


def _flatten(x: Any) -> Any:
    """[B, T, N, C] -> [B, T, N * C]."""
    return ops.reshape(x, (-1, ops.shape(x)[1], x.shape[2] * x.shape[3]))
