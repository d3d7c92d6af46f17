"""MT3Backbone: samples and tokens in, token logits out."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import keras_hub
from keras import ops

from mt3_keras.config import ModelConfig, NetworkConfig, SpectrogramConfig, VocabularyConfig
from mt3_keras.layers import (
    MASKED,
    DecoderLayer,
    EncoderLayer,
    broadcast_dropout,
    dense,
    rms_norm,
    sinusoid_positions,
)
from mt3_keras.spectrogram import LogMel

Memory = dict[str, Any]  # what the decoder needs of a segment: name -> tensor [B, ...]
Cache = dict[str, Any]  # keys and values of past positions: name -> tensor [B, H, C, K]


class Encoder(keras.layers.Layer):
    """Spectrogram frames [B, T, M] -> encoded frames [B, T, D]."""

    def __init__(self, network: NetworkConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.projection = dense(network.width, "projection", policy, truncated=True)
        self.layers = [
            EncoderLayer(network, dtype=policy, name=f"layer_{i}")
            for i in range(network.num_encoder_layers)
        ]
        self.norm = rms_norm("norm", policy)
        self.dropout = broadcast_dropout(network.dropout, policy)
        self.output_dropout = keras.layers.Dropout(network.dropout, dtype=policy)
        self._positions = sinusoid_positions(network.segment_frames, network.width)

    def build(self, shape: Any) -> None:
        self.projection.build(shape)
        shape = (*shape[:-1], self.projection.units)
        for layer in self.layers:
            layer.build(shape)
        self.norm.build(shape)

    def call(self, frames_BTM: Any, training: Any = None) -> Any:
        x_BTD = self.projection(frames_BTM)
        x_BTD = x_BTD + ops.cast(self._positions[: x_BTD.shape[1]], x_BTD.dtype)
        x_BTD = self.dropout(x_BTD, training=training)
        for layer in self.layers:
            x_BTD = layer(x_BTD, training=training)
        return self.output_dropout(self.norm(x_BTD), training=training)


class Decoder(keras.layers.Layer):
    """Tokens so far [B, L] and encoded frames [B, T, D] -> logits of the next tokens [B, L, V]."""

    def __init__(self, network: NetworkConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.network = network
        self.embedding = keras.layers.Embedding(
            network.vocabulary_rows,
            network.width,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
            dtype=policy,
            name="embedding",
        )
        self.layers = [
            DecoderLayer(network, dtype=policy, name=f"layer_{i}")
            for i in range(network.num_decoder_layers)
        ]
        self.norm = rms_norm("norm", policy)
        self.logits = dense(network.vocabulary_rows, "logits", "float32", truncated=True)
        self.dropout = broadcast_dropout(network.dropout, policy)
        self._positions = sinusoid_positions(network.max_tokens, network.width)

    def build(self, tokens_shape: Any, encoded_shape: Any) -> None:
        self.embedding.build(tokens_shape)
        shape = (*tokens_shape, self.network.width)
        for layer in self.layers:
            layer.build(shape, encoded_shape)
        self.norm.build(shape)
        self.logits.build(shape)

    def call(self, tokens: Any, encoded: Any, training: Any = None) -> Any:
        positions_L = ops.arange(ops.shape(tokens)[1])
        x_BLD = self._embed(tokens, positions_L)
        x_BLD = self.dropout(x_BLD, training=training)
        bias_LL = ops.where(positions_L[None, :] > positions_L[:, None], MASKED, 0.0)
        for layer in self.layers:
            x_BLD = layer(x_BLD, encoded, bias_LL[None, None], training=training)
        return self.logits(self.dropout(self.norm(x_BLD), training=training))

    def compute_output_spec(self, tokens: Any, encoded: Any, training: Any = None) -> Any:
        return keras.KerasTensor((*tokens.shape, self.network.vocabulary_rows), dtype="float32")

    def _embed(self, tokens: Any, positions: Any) -> Any:
        x = self.embedding(tokens)
        return x + ops.cast(ops.take(self._positions, positions, axis=0), x.dtype)

    def memory(self, encoded_BTD: Any) -> Memory:
        """Cross-attention keys and values, computed once for a segment."""
        memory = {}
        for i, layer in enumerate(self.layers):
            keys, values = layer.cross_attention.keys_and_values(encoded_BTD)
            memory[f"cross_keys_{i}"], memory[f"cross_values_{i}"] = keys, values
        return memory

    def step(
        self, tokens_B: Any, positions_B: Any, cache: Cache, bias_BC: Any, memory: Memory
    ) -> tuple[Any, Cache]:
        """See `MT3Backbone.decode_step`."""
        x_BD = self._embed(tokens_B, positions_B)
        rows = {}
        for i, layer in enumerate(self.layers):
            x_BD, rows[f"keys_{i}"], rows[f"values_{i}"] = layer.step(
                x_BD,
                (cache[f"keys_{i}"], cache[f"values_{i}"]),
                bias_BC,
                (memory[f"cross_keys_{i}"], memory[f"cross_values_{i}"]),
            )
        return self.logits(self.norm(x_BD)), rows


@keras.saving.register_keras_serializable(package="mt3_keras")
class MT3Backbone(keras_hub.models.Backbone):
    """The network of MT3 (Gardner et al., ICLR 2022): T5 over spectrogram frames.

    Called with a dict it gives teacher-forced logits, float32 [B, L, V]:

    - "samples": float32 [B, segment_samples + overhang_samples], 16 kHz mono
    - "num_frames": int32 [B], spectrogram frames that are real (see `LogMel`)
    - "decoder_tokens": int32 [B, L], the targets shifted right, beginning with 0

    For decoding, `encode` turns samples into a named set of tensors, the memory, and
    `decode_step` takes one token further.

    Args:
      spectrogram, vocabulary, network: parts of a `ModelConfig`, or dicts of their fields.
      dtype: policy of the network; the spectrogram and the logits are float32 always.
    """

    def __init__(
        self,
        spectrogram: SpectrogramConfig | dict[str, Any] | None = None,
        vocabulary: VocabularyConfig | dict[str, Any] | None = None,
        network: NetworkConfig | dict[str, Any] | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        config = ModelConfig.from_dict(
            {
                "spectrogram": _to_dict(spectrogram),
                "vocabulary": _to_dict(vocabulary),
                "network": _to_dict(network),
            }
        )

        # === Layers ===
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        self.log_mel = LogMel(config.spectrogram, name="log_mel")
        self.encoder = Encoder(config.network, dtype=policy, name="encoder")
        self.decoder = Decoder(config.network, dtype=policy, name="decoder")

        # === Functional Model ===
        num_samples = config.segment_samples + config.spectrogram.overhang_samples
        samples = keras.Input((num_samples,), dtype="float32", name="samples")
        num_frames = keras.Input((), dtype="int32", name="num_frames")
        tokens = keras.Input((None,), dtype="int32", name="decoder_tokens")
        encoded = self.encoder(self.log_mel(samples, num_frames))
        super().__init__(
            inputs={"samples": samples, "num_frames": num_frames, "decoder_tokens": tokens},
            outputs=self.decoder(tokens, encoded),
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.model_config = config

    def encode(self, samples: Any, num_frames: Any) -> Memory:
        """Samples [B, segment_samples + overhang_samples] -> memory, tensors [B, ...] by name."""
        return self.decoder.memory(self.encoder(self.log_mel(samples, num_frames)))

    def decode_step(
        self, tokens: Any, positions: Any, cache: Cache, bias: Any, memory: Memory
    ) -> tuple[Any, Cache]:
        """Takes every sequence of a batch one token further.

        Where in the cache a past position stands does not matter; only `bias` says what is seen.

        Args:
          tokens: int [B], the last tokens (0 at the start).
          positions: int [B], how many tokens came before them.
          cache: "keys_i", "values_i" for every layer i, each [B, H, C, K].
          bias: float32 [B, C], 0 for cached rows to be seen, `layers.MASKED` for all others.
          memory: what `encode` gave.

        Returns:
          Logits float32 [B, V], and the rows [B, H, K] that these tokens add to the cache, which
          the caller writes.
        """
        return self.decoder.step(tokens, positions, cache, bias, memory)

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        """Zeros for `decode_step`: room for `length` past positions."""
        net = self.model_config.network
        shape = (batch_size, net.num_heads, length, net.head_width)
        names = [
            f"{kind}_{i}" for i in range(net.num_decoder_layers) for kind in ("keys", "values")
        ]
        return {name: ops.zeros(shape, self.compute_dtype) for name in names}

    def empty_memory(self, batch_size: int) -> Memory:
        """Zeros of the shapes that `encode` gives."""
        net = self.model_config.network
        shape = (batch_size, net.num_heads, net.segment_frames, net.head_width)
        names = [
            f"cross_{kind}_{i}"
            for i in range(net.num_decoder_layers)
            for kind in ("keys", "values")
        ]
        return {name: ops.zeros(shape, self.compute_dtype) for name in names}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.model_config.to_dict()}


def _to_dict(part: Any) -> dict[str, Any]:
    return dataclasses.asdict(part) if dataclasses.is_dataclass(part) else dict(part or {})
