"""The blocks of MT3's T5: pre-norm residuals, no biases, fixed sinusoid positions.

Shape letters: B batch, T positions, L tokens, C cached positions, D width, H attention heads,
K head width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.models.config import T5Config


class Configured(keras.layers.Layer):
    """A layer that one config describes.

    Args:
      config: a `config_type`, or a dict of its fields.
    """

    config_type: type[Any]
    config: Any  # a `config_type`

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = self.config_type(**config) if isinstance(config, dict) else config

    def get_config(self) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(self.config_type)]
        config = {name: getattr(self.config, name) for name in names}  # it may have more of them
        return {**super().get_config(), "config": config}


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


def embed_tokens(
    embedding: keras.layers.Embedding,
    positions_table: NDArray[np.float32],
    tokens: Any,
    positions: Any,
    *,
    for_edge: bool = False,
) -> Any:
    """Tokens [..., L] at positions [..., L] -> [..., L, D].

    Args:
      embedding: of the tokens.
      positions_table: of `sinusoid_positions`.
      tokens: int.
      positions: int.
      for_edge: write it by products and sines, without tables whose rows are taken; L is 1.
    """
    if for_edge:
        num_rows, width = embedding.input_dim, embedding.output_dim
        one_hot = ops.one_hot(tokens, num_rows, dtype=embedding.compute_dtype)
        one_hot = ops.reshape(one_hot, (-1, num_rows))
        frequencies = sinusoid_frequencies(width).astype(np.float32)
        angles = ops.cast(positions, "float32")[..., None] * frequencies
        sinusoids = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)
        embedded = ops.matmul(one_hot, embedding.embeddings)
        return ops.reshape(embedded, (-1, 1, width)) + sinusoids
    x = embedding(tokens)
    return x + ops.cast(ops.take(positions_table, positions, axis=0), x.dtype)


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


@keras.saving.register_keras_serializable(package="mt3_keras")
class Logits(keras.layers.Dense):
    """A projection computed in float32, whatever the dtype policy; its output is float32.

    Half precision would round scores that differ in their last digits to ties.
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(units, **{"autocast": False, **kwargs})

    def call(self, inputs: Any, training: Any = None) -> Any:
        x = ops.matmul(ops.cast(inputs, "float32"), ops.cast(self.kernel, "float32"))
        return x if self.bias is None else ops.add(x, ops.cast(self.bias, "float32"))

    def compute_output_spec(self, inputs: Any, training: Any = None) -> Any:
        return keras.KerasTensor((*inputs.shape[:-1], self.units), dtype="float32")


def rms_norm(name: str, dtype: Any) -> Any:
    """Root-mean-square norm with a scale, no mean and no bias (epsilon 1e-6)."""
    return keras.layers.RMSNormalization(epsilon=1e-6, dtype=dtype, name=name)


def broadcast_dropout(rate: float, dtype: Any) -> Any:
    """Dropout [B, L, D] whose mask is shared by all positions of a sequence, as in T5X."""
    return keras.layers.Dropout(rate, noise_shape=(None, 1, None), dtype=dtype)


@keras.saving.register_keras_serializable(package="mt3_keras")
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

    def __init__(
        self, width: int, num_heads: int, head_width: int, dropout: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.width, self.num_heads, self.head_width = width, num_heads, head_width
        self.dropout_rate = dropout
        inner = num_heads * head_width
        self.query = dense(inner, "query", self.dtype_policy, scale=1 / self.head_width)
        self.key = dense(inner, "key", self.dtype_policy)
        self.value = dense(inner, "value", self.dtype_policy)
        self.out = dense(width, "out", self.dtype_policy)
        # One mask for all queries of a head.
        self.dropout = keras.layers.Dropout(
            dropout, noise_shape=(None, None, 1, None), dtype=self.dtype_policy
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

    def attend_memory(self, query_BD: Any, keys: Any, values: Any) -> Any:
        """One position attends over kept keys and values: [B, D] -> [B, D]."""
        query_BHK = ops.reshape(self.query(query_BD), (-1, self.num_heads, self.head_width))
        attended = self._mix(ops.softmax(self._scores(query_BHK, keys)), values)
        return self.out(ops.reshape(attended, (-1, self.num_heads * self.head_width)))

    def attend_cache(
        self, query_BD: Any, keys: Any, values: Any, bias_BC: Any
    ) -> tuple[Any, Any, Any]:
        """One position attends over cached positions and itself.

        Args:
          query_BD: the position's input.
          keys: of cached positions, [B, H, K, C].
          values: likewise.
          bias_BC: added to the scores; `grammar.MASKED` where a position is to be ignored.

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

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "width": self.width,
            "num_heads": self.num_heads,
            "head_width": self.head_width,
            "dropout": self.dropout_rate,
        }


def make_attention(net: Any, name: str, dtype: Any) -> Attention:
    """Attention of the sizes of a network's config."""
    return Attention(net.width, net.num_heads, net.head_width, net.dropout, dtype=dtype, name=name)


@keras.saving.register_keras_serializable(package="mt3_keras")
class GatedMLP(Configured):
    """gelu(x wi_0) * (x wi_1), then wo; gelu by its tanh approximation."""

    config_type = T5Config
    config: T5Config

    def __init__(self, config: T5Config | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        net, policy = self.config, self.dtype_policy
        self.wi_0 = dense(net.mlp_width, "wi_0", policy, truncated=True)
        self.wi_1 = dense(net.mlp_width, "wi_1", policy, truncated=True)
        self.wo = dense(net.width, "wo", policy, truncated=True)
        self.dropout = broadcast_dropout(net.dropout, policy)

    def build(self, shape: Any) -> None:
        self.wi_0.build(shape)
        self.wi_1.build(shape)
        self.wo.build((*shape[:-1], self.config.mlp_width))

    def call(self, x: Any, training: Any = None) -> Any:
        gated = ops.gelu(self.wi_0(x), approximate=True) * self.wi_1(x)
        if training:  # decoding has no length axis to share a mask over
            gated = self.dropout(gated, training=training)
        return self.wo(gated)


class T5Layer(Configured):
    """A layer whose parts are pre-norm residuals, a gated MLP the last of them."""

    config_type = T5Config
    config: T5Config

    def add_mlp(self) -> None:
        """Makes the last part, after the others: seeds are drawn in the order of making."""
        net, policy = self.config, self.dtype_policy
        self.mlp_norm = rms_norm("mlp_norm", policy)
        self.mlp = GatedMLP(net, dtype=policy, name="mlp")
        self.dropout = broadcast_dropout(net.dropout, policy)

    def through_mlp(self, x: Any, training: Any) -> Any:
        """Whole sequences [B, L, D] through the last part."""
        return x + self.dropout(self.mlp(self.mlp_norm(x), training=training), training=training)


@keras.saving.register_keras_serializable(package="mt3_keras")
class EncoderLayer(T5Layer):
    """Self-attention and MLP, [B, T, D] -> [B, T, D]; every frame sees every frame."""

    def __init__(self, config: T5Config | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        policy = self.dtype_policy
        self.attention_norm = rms_norm("attention_norm", policy)
        self.attention = make_attention(self.config, "attention", policy)
        self.add_mlp()

    def build(self, shape: Any) -> None:
        for part in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            part.build(shape)

    def call(self, x: Any, training: Any = None) -> Any:
        attended = self.attention(self.attention_norm(x), training=training)
        return self.through_mlp(x + self.dropout(attended, training=training), training)


@keras.saving.register_keras_serializable(package="mt3_keras")
class Encoder(Configured):
    """Spectrum [B, T, M] -> encoded positions [B, T, D]: a projection and `EncoderLayer`s.

    Args:
      config: sizes of the whole network; T is `segment_frames` at most.
    """

    config_type = T5Config
    config: T5Config

    def __init__(self, config: T5Config | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        net, policy = self.config, self.dtype_policy
        self.projection = dense(net.width, "projection", policy, truncated=True)
        self.layers = [
            EncoderLayer(net, dtype=policy, name=f"layer_{i}")
            for i in range(net.num_encoder_layers)
        ]
        self.norm = rms_norm("norm", policy)
        self.dropout = broadcast_dropout(net.dropout, policy)
        self.output_dropout = keras.layers.Dropout(net.dropout, dtype=policy)
        self._positions = sinusoid_positions(net.segment_frames, net.width)

    def build(self, shape: Any) -> None:
        self.projection.build(shape)
        shape = (*shape[:-1], self.projection.units)
        for layer in self.layers:
            layer.build(shape)
        self.norm.build(shape)

    def call(self, spectrum_BTM: Any, training: Any = None) -> Any:
        x_BTD = self.projection(spectrum_BTM)
        x_BTD = x_BTD + ops.cast(self._positions[: x_BTD.shape[1]], x_BTD.dtype)
        x_BTD = self.dropout(x_BTD, training=training)
        for layer in self.layers:
            x_BTD = layer(x_BTD, training=training)
        return self.output_dropout(self.norm(x_BTD), training=training)


@keras.saving.register_keras_serializable(package="mt3_keras")
class DecoderLayer(T5Layer):
    """Causal self-attention, cross-attention and MLP, [B, L, D] -> [B, L, D]."""

    def __init__(self, config: T5Config | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        net, policy = self.config, self.dtype_policy
        self.self_norm = rms_norm("self_norm", policy)
        self.self_attention = make_attention(net, "self_attention", policy)
        self.cross_norm = rms_norm("cross_norm", policy)
        self.cross_attention = make_attention(net, "cross_attention", policy)
        self.add_mlp()

    def build(self, x_shape: Any, encoded_shape: Any, bias_shape: Any = None) -> None:
        for part in (self.self_norm, self.self_attention, self.cross_norm, self.mlp_norm, self.mlp):
            part.build(x_shape)
        self.cross_attention.build(x_shape, encoded_shape)

    def call(self, x: Any, encoded: Any, bias: Any, training: Any = None) -> Any:
        """Whole sequences; `bias` [B, 1, L, L] masks what a position must not attend to."""
        attended = self.self_attention(self.self_norm(x), bias=bias, training=training)
        x = x + self.dropout(attended, training=training)
        attended = self.cross_attention(self.cross_norm(x), encoded, training=training)
        return self.through_mlp(x + self.dropout(attended, training=training), training)

    def step(self, x_BD: Any, cache: tuple[Any, Any], bias_BC: Any, memory: tuple[Any, Any]) -> Any:
        """One position; returns the output [B, D] and its key and value rows [B, H, K]."""
        attended, key, value = self.self_attention.attend_cache(
            self.self_norm(x_BD), *cache, bias_BC
        )
        x_BD = x_BD + attended
        x_BD = x_BD + self.cross_attention.attend_memory(self.cross_norm(x_BD), *memory)
        return x_BD + self.mlp(self.mlp_norm(x_BD)), key, value

    def attentions(self) -> list[Attention]:
        return [self.self_attention, self.cross_attention]
