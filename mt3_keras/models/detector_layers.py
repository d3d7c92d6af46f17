"""What the detector's networks are made of.

Shape letters: B batch, P steps of `frames_per_step` frames, C channels, R recurrent rows.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from mt3_keras.models.config import BodyConfig
from mt3_keras.models.layers import Configured, Logits

INPUT_SCALE = 0.25  # brings `Harmonics`, 0 to about 8, near unit variance


class DetectorPart(Configured):
    """A network of the detector with recurrent layers over its steps.

    Args:
      config: sizes.
      unroll: build the recurrent layers without a loop; the number of frames must be static.
    """

    config_type = BodyConfig
    config: BodyConfig

    def __init__(
        self, config: BodyConfig | dict[str, Any], unroll: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(config, **kwargs)
        self.unroll = unroll

    def recurrent_over_steps(self, width: int, name: str) -> Recurrent:
        """A recurrent layer as the config and `unroll` say."""
        directions, policy = self.config.directions, self.dtype_policy
        return Recurrent(width, directions, self.unroll, dtype=policy, name=name)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "unroll": self.unroll}


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


def convolution_along_time(
    channels: int, size: int, name: str, policy: Any, **options: Any
) -> keras.layers.Conv1D:
    """Over [B, P, C]; `options` are those of `keras.layers.Conv1D`."""
    return keras.layers.Conv1D(
        channels,
        size,
        padding="same",
        data_format="channels_last",
        kernel_initializer="he_normal",
        dtype=policy,
        name=name,
        **options,
    )


def rectified_dense(units: int, name: str, policy: Any) -> keras.layers.Dense:
    """A dense layer with ReLU."""
    return keras.layers.Dense(
        units, activation="relu", kernel_initializer="he_normal", dtype=policy, name=name
    )


def batch_norm(name: str, policy: Any) -> keras.layers.BatchNormalization:
    """Batch normalisation whose means follow within a hundred steps."""
    return keras.layers.BatchNormalization(momentum=0.98, dtype=policy, name=name)


def initial_logits(name: str, initial: Any, policy: Any) -> Any:
    """An output layer whose logits begin at these."""
    return Logits(
        len(initial),
        bias_initializer=keras.initializers.Constant(np.asarray(initial, np.float32)),
        dtype=policy,
        name=name,
    )
