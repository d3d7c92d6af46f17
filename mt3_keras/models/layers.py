"""The blocks of MT3's T5: pre-norm residuals, no biases, fixed sinusoid positions.

Shape letters: B batch, T frames, L tokens, C cached positions, D width, H heads, K head width.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.models.config import ModelConfig, NetworkConfig

MASKED = -1e10  # added to scores of positions that must not be seen, as in the original


def sinusoid_frequencies(width: int) -> NDArray[np.float64]:
    """Radians per position [width / 2], from 1 to exactly 1/10000.

    The exponent is i / (width / 2 - 1).
    """
    half = width // 2
    return np.exp(np.arange(half) * (-math.log(10_000.0) / max(half - 1, 1)))


def sinusoid_positions(num_positions: int, width: int) -> NDArray[np.float32]:
    """Fixed position table [num_positions, width]: sines, then cosines."""
    angles = np.arange(num_positions)[:, None] * sinusoid_frequencies(width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def dense(
    units: int, name: str, dtype: Any, *, truncated: bool = False, scale: float = 1.0
) -> keras.layers.Dense:
    """A projection without bias, its weights of variance scale / fan-in, as in T5X.

    Queries have a scale of 1 / head_width: attention itself is not scaled.
    """
    shape = "truncated_normal" if truncated else "untruncated_normal"
    initializer = keras.initializers.VarianceScaling(scale, "fan_in", shape)
    return keras.layers.Dense(
        units, use_bias=False, kernel_initializer=initializer, dtype=dtype, name=name
    )


def rms_norm(name: str, dtype: Any) -> Any:
    """Root-mean-square norm with a scale, no mean and no bias (epsilon 1e-6)."""
    return keras.layers.RMSNormalization(epsilon=1e-6, dtype=dtype, name=name)


def broadcast_dropout(rate: float, dtype: Any) -> Any:
    """Dropout [B, L, D] whose mask is shared by all positions of a sequence, as in T5X."""
    return keras.layers.Dropout(rate, noise_shape=(None, 1, None), dtype=dtype)


class Attention(keras.layers.Layer):
    """Multi-head attention with the projections apart, so that keys and values can be kept.

    `call` is training's whole-sequence form. Decoding uses `keys_and_values`, `attend_memory` and
    `attend_cache`.

    Attributes:
      positions_last: decode with keys and values [B, H, K, T] instead of [B, H, T, K], by products
        and sums instead of matrix products. For LiteRT on processors, whose matrix products copy
        the keys at every call.
    """

    positions_last = False

    def __init__(self, network: NetworkConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads, self.head_width = network.num_heads, network.head_width
        inner = self.num_heads * self.head_width
        self.query = dense(inner, "query", self.dtype_policy, scale=1 / self.head_width)
        self.key = dense(inner, "key", self.dtype_policy)
        self.value = dense(inner, "value", self.dtype_policy)
        self.out = dense(network.width, "out", self.dtype_policy)
        # One mask for all queries of a head.
        self.dropout = keras.layers.Dropout(
            network.dropout, noise_shape=(None, None, 1, None), dtype=self.dtype_policy
        )

    def build(self, query_shape: Any, memory_shape: Any = None) -> None:
        memory_shape = memory_shape or query_shape
        self.query.build(query_shape)
        self.key.build(memory_shape)
        self.value.build(memory_shape)
        self.out.build((*query_shape[:-1], self.num_heads * self.head_width))

    def heads(self, projected_BLJ: Any) -> Any:
        """[B, L, H * K] -> [B, H, L, K]."""
        length = ops.shape(projected_BLJ)[1]  # not static in buckets
        split = ops.reshape(projected_BLJ, (-1, length, self.num_heads, self.head_width))
        return ops.transpose(split, (0, 2, 1, 3))

    def keys_and_values(self, memory_BTD: Any) -> tuple[Any, Any]:
        """Keys and values [B, H, T, K] of a sequence, to be kept for decoding."""
        keys, values = self.heads(self.key(memory_BTD)), self.heads(self.value(memory_BTD))
        if self.positions_last:
            return ops.transpose(keys, (0, 1, 3, 2)), ops.transpose(values, (0, 1, 3, 2))
        return keys, values

    def _scores(self, query_BHK: Any, keys: Any) -> Any:
        """One query, kept keys -> scores [B, H, T]."""
        if self.positions_last:
            return ops.sum(ops.expand_dims(query_BHK, -1) * keys, axis=2)
        return ops.einsum("bhk,bhtk->bht", query_BHK, keys)

    def _mix(self, weights_BHT: Any, values: Any) -> Any:
        """The weighted mean of kept values [B, H, K]."""
        if self.positions_last:
            return ops.sum(ops.expand_dims(weights_BHT, 2) * values, axis=3)
        return ops.einsum("bht,bhtk->bhk", weights_BHT, values)

    def call(self, query: Any, memory: Any = None, bias: Any = None, training: Any = None) -> Any:
        memory = query if memory is None else memory
        keys_BHTK, values_BHTK = self.heads(self.key(memory)), self.heads(self.value(memory))
        scores_BHLT = ops.einsum("bhlk,bhtk->bhlt", self.heads(self.query(query)), keys_BHTK)
        if bias is not None:
            scores_BHLT += ops.cast(bias, scores_BHLT.dtype)
        weights = self.dropout(ops.softmax(scores_BHLT), training=training)
        return self.merge(ops.einsum("bhlt,bhtk->bhlk", weights, values_BHTK))

    def merge(self, attended_BHLK: Any) -> Any:
        """[B, H, L, K] -> output projection [B, L, D]."""
        length = ops.shape(attended_BHLK)[2]
        joined = ops.transpose(attended_BHLK, (0, 2, 1, 3))
        return self.out(ops.reshape(joined, (-1, length, self.num_heads * self.head_width)))

    def attend_memory(self, query_BD: Any, keys: Any, values: Any, bias_BHT: Any = None) -> Any:
        """One position attends over kept keys and values: [B, D] -> [B, D]."""
        query_BHK = ops.reshape(self.query(query_BD), (-1, self.num_heads, self.head_width))
        scores_BHT = self._scores(query_BHK, keys)
        if bias_BHT is not None:
            scores_BHT += bias_BHT
        attended = self._mix(ops.softmax(scores_BHT), values)
        return self.out(ops.reshape(attended, (-1, self.num_heads * self.head_width)))

    def attend_cache(
        self, query_BD: Any, keys: Any, values: Any, bias_BC: Any
    ) -> tuple[Any, Any, Any]:
        """One position attends over cached positions and itself.

        Args:
          query_BD: the position's input.
          keys, values: of cached positions; those to be ignored have a bias of `MASKED`.

        Returns:
          The output [B, D] and the position's own key and value rows [B, H, K], which the caller
          writes into the cache: copying whole caches would cost more than the arithmetic.
        """
        shape = (-1, self.num_heads, self.head_width)
        query_BHK = ops.reshape(self.query(query_BD), shape)
        key_BHK = ops.reshape(self.key(query_BD), shape)
        value_BHK = ops.reshape(self.value(query_BD), shape)
        scores_BHC = self._scores(query_BHK, keys) + ops.expand_dims(bias_BC, 1)
        own_BH1 = ops.sum(query_BHK * key_BHK, axis=-1, keepdims=True)
        weights = ops.softmax(ops.concatenate([scores_BHC, own_BH1], axis=-1))
        attended = self._mix(weights[..., :-1], values)
        attended += weights[..., -1:] * value_BHK
        output = self.out(ops.reshape(attended, (-1, self.num_heads * self.head_width)))
        return output, key_BHK, value_BHK


class GatedMLP(keras.layers.Layer):
    """gelu(x wi_0) * (x wi_1), then wo; gelu by its tanh approximation."""

    def __init__(self, network: NetworkConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mlp_width = network.mlp_width
        self.wi_0 = dense(network.mlp_width, "wi_0", self.dtype_policy, truncated=True)
        self.wi_1 = dense(network.mlp_width, "wi_1", self.dtype_policy, truncated=True)
        self.wo = dense(network.width, "wo", self.dtype_policy, truncated=True)
        self.dropout = broadcast_dropout(network.dropout, self.dtype_policy)

    def build(self, shape: Any) -> None:
        self.wi_0.build(shape)
        self.wi_1.build(shape)
        self.wo.build((*shape[:-1], self.mlp_width))

    def call(self, x: Any, training: Any = None) -> Any:
        gated = ops.gelu(self.wi_0(x), approximate=True) * self.wi_1(x)
        if training:  # decoding has no length axis to share a mask over
            gated = self.dropout(gated, training=training)
        return self.wo(gated)


class EncoderLayer(keras.layers.Layer):
    """Self-attention and MLP, [B, T, D] -> [B, T, D]; every frame sees every frame."""

    def __init__(self, network: NetworkConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.attention_norm = rms_norm("attention_norm", policy)
        self.attention = Attention(network, dtype=policy, name="attention")
        self.mlp_norm = rms_norm("mlp_norm", policy)
        self.mlp = GatedMLP(network, dtype=policy, name="mlp")
        self.dropout = broadcast_dropout(network.dropout, policy)

    def build(self, shape: Any) -> None:
        for part in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            part.build(shape)

    def call(self, x: Any, training: Any = None) -> Any:
        attended = self.attention(self.attention_norm(x), training=training)
        x = x + self.dropout(attended, training=training)
        return x + self.dropout(self.mlp(self.mlp_norm(x), training=training), training=training)


class TimeBias(keras.layers.Layer):
    """A learned bias of attention by the distance of an encoder position from the current one."""

    def __init__(self, network: NetworkConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads, num_positions = network.num_heads, network.num_positions
        position = np.arange(num_positions)
        self._distances = position[None, :] - position[:, None] + num_positions - 1

    def build(self) -> None:
        num_distances = 2 * len(self._distances) - 1
        self.bias = self.add_weight(
            shape=(self.num_heads, num_distances), initializer="zeros", name="bias"
        )

    def call(self, place_BLP: Any) -> Any:
        """The current position of each token, one-hot -> bias [B, H, L, T]."""
        bias_HPT = ops.take(ops.cast(self.bias, self.compute_dtype), self._distances, axis=1)
        return ops.einsum("blp,hpt->bhlt", place_BLP, bias_HPT)


class StateInputs(keras.layers.Layer):
    """What the tokens so far imply -> an input of the decoder [..., D]."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embeddings = {
            name: keras.layers.Embedding(
                num_values,
                config.network.width,
                embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
                dtype=self.dtype_policy,
                name=name,
            )
            for name, num_values in (
                ("time", config.max_step + 1),
                ("program", 129),
                ("velocity", 3),
                ("section", 2),
            )
        }

    def build(self) -> None:
        for embedding in self.embeddings.values():
            embedding.build(None)

    def call(self, state: dict[str, Any]) -> Any:
        """`state`: "time", "program", "velocity", "section" as in `grammar.Grammar`."""
        indices = {
            "time": ops.minimum(state["time"], self.embeddings["time"].input_dim - 1),
            "program": state["program"] + 1,
            "velocity": ops.clip(state["velocity"], -1, 1) + 1,  # not yet said, off, on
            "section": state["section"],
        }
        time, *others = [self.embeddings[name](index) for name, index in indices.items()]
        return sum(others, time)


class ConvStem(keras.layers.Layer):
    """Harmonics of pitches [B, T, N, C] -> "features" for the encoder [B, P, N * channels].

    Three convolutions over time and pitch; the last one steps over `frames_per_position` frames.
    Before it come `stem_blocks` residual blocks, each with twice the reach in time of the one
    before. With heads, the input is handed on, "harmonics", and what the last convolution is given
    too, "map" [B, T, N, channels], and "rolls" made of it, logits float32 [B, T, 3 * N].
    """

    def __init__(self, network: NetworkConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.convolutions = [
            _convolution(network, f"convolution_{i}", dtype=policy, strides=(stride, 1))
            for i, stride in enumerate((1, 1, network.frames_per_position))
        ]
        self.norms = [
            keras.layers.BatchNormalization(dtype=policy, name=f"norm_{i}") for i in range(3)
        ]
        self.blocks = [
            ResidualBlock(network, 2**i, dtype=policy, name=f"block_{i}")
            for i in range(network.stem_blocks)
        ]
        self.rolls = None
        if network.heads:
            self.rolls = keras.layers.Dense(3, use_bias=False, dtype="float32", name="rolls")

    def build(self, shape: Any) -> None:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            convolution.build(shape)
            shape = (*shape[:-1], convolution.filters)
            norm.build(shape)
        for block in self.blocks:
            block.build(shape)
        if self.rolls:
            self.rolls.build(shape)

    def call(self, x_BTNC: Any, training: Any = None) -> dict[str, Any]:
        outputs = {"harmonics": x_BTNC} if self.rolls else {}
        *first, last = zip(self.convolutions, self.norms, strict=True)
        for convolution, norm in first:
            x_BTNC = norm(convolution(x_BTNC), training=training)
        for block in self.blocks:
            x_BTNC = block(x_BTNC, training=training)
        if self.rolls:
            outputs["map"] = x_BTNC
            outputs["rolls"] = _join_last(ops.transpose(self.rolls(x_BTNC), (0, 1, 3, 2)))
        convolution, norm = last
        return {"features": _join_last(norm(convolution(x_BTNC), training=training)), **outputs}


class ResidualBlock(keras.layers.Layer):
    """Two convolutions whose output is added to their input [B, T, N, C], at first nothing.

    `step` is the distance in frames that the first of them looks to either side.
    """

    def __init__(self, network: NetworkConfig, step: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.inner = _convolution(network, "inner", dtype=policy, dilation_rate=(step, 1))
        self.norm = keras.layers.BatchNormalization(dtype=policy, name="norm")
        self.outer = _convolution(
            network, "outer", dtype=policy, activation=None, kernel_initializer="zeros"
        )

    def build(self, shape: Any) -> None:
        for part in (self.inner, self.norm, self.outer):
            part.build(shape)

    def call(self, x_BTNC: Any, training: Any = None) -> Any:
        return x_BTNC + self.outer(self.norm(self.inner(x_BTNC), training=training))


def _convolution(network: NetworkConfig, name: str, **options: Any) -> keras.layers.Conv2D:
    options = {"activation": "relu", "kernel_initializer": "he_normal", **options}
    return keras.layers.Conv2D(network.stem_channels, 3, padding="same", name=name, **options)


def _join_last(x: Any) -> Any:
    """[B, T, M, N] -> [B, T, M * N]."""
    return ops.reshape(x, (-1, x.shape[1], x.shape[2] * x.shape[3]))


class DecoderLayer(keras.layers.Layer):
    """Causal self-attention, cross-attention and MLP, [B, L, D] -> [B, L, D]."""

    def __init__(self, network: NetworkConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.self_norm = rms_norm("self_norm", policy)
        self.self_attention = Attention(network, dtype=policy, name="self_attention")
        self.cross_norm = rms_norm("cross_norm", policy)
        self.cross_attention = Attention(network, dtype=policy, name="cross_attention")
        self.time_bias = None
        if network.time_bias:
            self.time_bias = TimeBias(network, dtype=policy, name="time_bias")
        self.mlp_norm = rms_norm("mlp_norm", policy)
        self.mlp = GatedMLP(network, dtype=policy, name="mlp")
        self.dropout = broadcast_dropout(network.dropout, policy)

    def build(self, x_shape: Any, encoded_shape: Any) -> None:
        for part in (self.self_norm, self.self_attention, self.cross_norm, self.mlp_norm, self.mlp):
            part.build(x_shape)
        self.cross_attention.build(x_shape, encoded_shape)
        if self.time_bias:
            self.time_bias.build()

    def call(self, x: Any, encoded: Any, bias: Any, place: Any = None, training: Any = None) -> Any:
        """Whole sequences; `bias` [B, 1, L, L] hides what a position must not see.

        `place` [B, L, T] is the current position in `encoded`, one-hot, for `time_bias`.
        """
        attended = self.self_attention(self.self_norm(x), bias=bias, training=training)
        x = x + self.dropout(attended, training=training)
        bias = self.time_bias(place) if self.time_bias else None
        attended = self.cross_attention(self.cross_norm(x), encoded, bias=bias, training=training)
        x = x + self.dropout(attended, training=training)
        return x + self.dropout(self.mlp(self.mlp_norm(x), training=training), training=training)

    def step(
        self,
        x_BD: Any,
        cache: tuple[Any, Any],
        bias_BC: Any,
        memory: tuple[Any, Any],
        place_B1T: Any = None,
    ) -> Any:
        """One position; returns the output [B, D] and its key and value rows [B, H, K]."""
        attended, key, value = self.self_attention.attend_cache(
            self.self_norm(x_BD), *cache, bias_BC
        )
        x_BD = x_BD + attended
        bias_BHT = self.time_bias(place_B1T)[:, :, 0] if self.time_bias else None
        attended = self.cross_attention.attend_memory(self.cross_norm(x_BD), *memory, bias_BHT)
        x_BD = x_BD + attended
        return x_BD + self.mlp(self.mlp_norm(x_BD)), key, value
