"""The detector's drums: the whole spectrum of each frame -> rolls of drum strokes.

Drums have no pitch, so what the body makes of harmonics would tell little: here convolutions along
time see how the spectrum begins and fades, and a recurrent layer follows the beat.

Shape letters: B batch, T frames, P steps of `frames_per_step` frames, M bins of both spectra.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from mt3_keras.models.config import NUM_DRUMS, BodyConfig
from mt3_keras.models.detector_layers import (
    INPUT_SCALE,
    DetectorPart,
    batch_norm,
    convolution_along_time,
    initial_logits,
    rectified_dense,
)

INITIAL_LOGIT = -5.0


@keras.saving.register_keras_serializable(package="mt3_keras")
class Drums(DetectorPart):
    """Spectra -> logits of strokes in each frame.

    Call arguments:
      spectrum: float32 [B, T, M] of `spectrogram.Harmonics.spectrum`.
      state, margin_steps: as of `DetectorBody`; the state is [B, drum_context_width].

    Returns:
      A dict: float32 logits "drum" [B, T, NUM_DRUMS] of the keys from `config.LOWEST_DRUM` on and
      "drum_strength" [B, T, 1], of which the sigmoid is velocity / 127, without the margins;
      "states" [B, P, drum_context_width], the forward states after each step.
    """

    def __init__(
        self, config: BodyConfig | dict[str, Any], unroll: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(config, unroll, **kwargs)
        net = self.config
        steps, width, policy = net.frames_per_step, net.drum_width, self.dtype_policy
        self.reduce = rectified_dense(width // 2, "reduce", policy)
        self.strokes = [
            convolution_along_time(
                width, size, f"strokes_{i}", policy, strides=strides, use_bias=False
            )
            for i, (size, strides) in enumerate([(2 * steps + 1, steps), (3, 1)])
        ]
        self.norms = [batch_norm(f"norm_{i}", policy) for i in range(2)]
        self.recurrent = self.recurrent_over_steps(net.drum_context_width, "recurrent")
        self.hidden = keras.layers.Dense(width, activation="relu", dtype=policy, name="hidden")
        initial = np.tile([*[INITIAL_LOGIT] * NUM_DRUMS, 0.0], steps)
        self.logits = initial_logits("logits", initial, policy)

    def build(self, spectrum_shape: Any) -> None:
        config, width = self.config, self.config.drum_width
        self.reduce.build(spectrum_shape)
        self.strokes[0].build((None, None, width // 2))
        self.strokes[1].build((None, None, width))
        for norm in self.norms:
            norm.build((None, None, width))
        self.recurrent.build((None, None, width))
        self.hidden.build((None, None, width + config.directions * config.drum_context_width))
        self.logits.build((None, None, width))

    def call(
        self,
        spectrum: Any,
        state: Any = None,
        margin_steps: tuple[int, int] = (0, 0),
        training: Any = None,
    ) -> dict[str, Any]:
        x = self.reduce(ops.cast(spectrum, self.compute_dtype) * INPUT_SCALE)
        x = ops.relu(self.norms[0](self.strokes[0](x), training=training))
        x = x + ops.relu(self.norms[1](self.strokes[1](x), training=training))
        if any(margin_steps):
            x = x[:, margin_steps[0] : x.shape[1] - margin_steps[1]]
        context = self.recurrent(ops.transpose(x, (1, 0, 2)), state)
        context = ops.transpose(context, (1, 0, 2))
        logits = self.logits(self.hidden(ops.concatenate([context, x], axis=-1)))
        num_steps, columns = ops.shape(logits)[1], NUM_DRUMS + 1
        frames = num_steps * self.config.frames_per_step
        logits = ops.reshape(logits, (-1, frames, columns))
        return {
            "drum": logits[..., :NUM_DRUMS],
            "drum_strength": logits[..., NUM_DRUMS:],
            "states": context[..., : self.config.drum_context_width],
        }
