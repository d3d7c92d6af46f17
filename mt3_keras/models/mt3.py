"""MT3Backbone: samples and tokens in, token logits out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import keras_hub
from keras import ops

from mt3_keras.grammar import MASKED
from mt3_keras.models.catalog import register_presets
from mt3_keras.models.config import LogMelConfig, MT3Config, T5Config, VocabularyConfig
from mt3_keras.models.layers import (
    DecoderLayer,
    Encoder,
    Logits,
    broadcast_dropout,
    embed_tokens,
    rms_norm,
    sinusoid_positions,
)
from mt3_keras.models.spectrogram import LogMel

Memory = dict[str, Any]  # what the decoder needs of a segment: name -> tensor [B, ...]
Cache = dict[str, Any]  # keys and values of past positions: name -> tensor [B, H, C, K]


@keras.saving.register_keras_serializable(package="mt3_keras")
class Decoder(keras.layers.Layer):
    """Tokens so far [B, L] and encoded positions [B, T, D] -> logits of the next tokens [B, L, V].

    Args:
      network: sizes, or a dict of its fields.
    """

    def __init__(self, network: T5Config | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.network = network = T5Config(**network) if isinstance(network, dict) else network
        self.embedding = keras.layers.Embedding(
            network.vocabulary_rows,
            network.width,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
            dtype=policy,
            name="embedding",
        )
        self.layers = [
            DecoderLayer(
                network.width,
                network.num_heads,
                network.head_width,
                network.mlp_width,
                network.dropout,
                dtype=policy,
                name=f"layer_{i}",
            )
            for i in range(network.num_decoder_layers)
        ]
        self.norm = rms_norm("norm", policy)
        self.logits = Logits(
            network.vocabulary_rows,
            use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(1.0, "fan_in"),
            dtype=policy,
            name="logits",
        )
        self.dropout = broadcast_dropout(network.dropout, policy)
        self._positions = sinusoid_positions(network.max_tokens, network.width)
        self.for_edge = False

    def build(self, tokens_shape: Any, encoded_shape: Any) -> None:
        self.embedding.build(tokens_shape)
        shape = (*tokens_shape, self.network.width)
        for layer in self.layers:
            layer.build(shape, encoded_shape)
        self.norm.build(shape)
        self.logits.build(shape)

    def call(self, tokens: Any, encoded: Any, training: Any = None) -> Any:
        positions_L = ops.arange(ops.shape(tokens)[1])
        x_BLD = embed_tokens(self.embedding, self._positions, tokens, positions_L)
        x_BLD = self.dropout(x_BLD, training=training)
        bias_LL = ops.where(positions_L[None, :] > positions_L[:, None], MASKED, 0.0)
        for layer in self.layers:
            x_BLD = layer(x_BLD, encoded, bias_LL[None, None], training=training)
        return self.logits(self.dropout(self.norm(x_BLD), training=training))

    def compute_output_spec(self, tokens: Any, encoded: Any, training: Any = None) -> Any:
        return keras.KerasTensor((*tokens.shape, self.network.vocabulary_rows), dtype="float32")

    def memory(self, encoded_BTD: Any) -> Memory:
        """Keys and values of a segment for every layer's cross-attention, computed once for it."""
        memory = {}
        for i, layer in enumerate(self.layers):
            keys, values = layer.cross_attention.keys_and_values(encoded_BTD)
            memory[f"cross_keys_{i}"], memory[f"cross_values_{i}"] = keys, values
        return memory

    def step(
        self, tokens_B: Any, positions_B: Any, cache: Cache, bias_BC: Any, memory: Memory
    ) -> tuple[Any, Cache]:
        """See `MT3Backbone.decode_step`."""
        x_BD = embed_tokens(
            self.embedding,
            self._positions,
            tokens_B[:, None],
            positions_B[:, None],
            for_edge=self.for_edge,
        )[:, 0]
        rows = {}
        for i, layer in enumerate(self.layers):
            x_BD, rows[f"keys_{i}"], rows[f"values_{i}"] = layer.step(
                x_BD,
                (cache[f"keys_{i}"], cache[f"values_{i}"]),
                bias_BC,
                (memory[f"cross_keys_{i}"], memory[f"cross_values_{i}"]),
            )
        return self.logits(self.norm(x_BD)), rows

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "network": dataclasses.asdict(self.network)}


@keras.saving.register_keras_serializable(package="mt3_keras")
class MT3Backbone(keras_hub.models.Backbone):
    """The network of MT3 (Gardner et al., ICLR 2022): T5 over spectrogram frames.

    Called with a dict it gives teacher-forced logits [B, L, V] in the policy's compute dtype
    (`forward` gives them in float32):

    - "samples": float32 [B, input_samples], 16 kHz mono
    - "num_frames": int32 [B], spectrogram frames that are real (see `LogMel`)
    - "decoder_tokens": int32 [B, L], the targets shifted right, beginning with 0

    For decoding, `encode` turns samples into a named set of tensors, the memory, and
    `decode_step` takes one token further.

    Args:
      spectrogram: of an `MT3Config`, or a dict of its fields.
      vocabulary: likewise.
      network: likewise.
      dtype: policy of the network; spectrogram and logits are computed in float32 always.

    Attributes:
      state_names: parts of the memory that each `decode_step` replaces: none, its past positions
        are in the cache.
    """

    state_names: tuple[str, ...] = ()

    def __init__(
        self,
        spectrogram: LogMelConfig | dict[str, Any] | None = None,
        vocabulary: VocabularyConfig | dict[str, Any] | None = None,
        network: T5Config | dict[str, Any] | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        config = MT3Config.from_parts(
            spectrogram=spectrogram, vocabulary=vocabulary, network=network
        )

        # === Layers ===
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        net = config.network
        self.log_mel = LogMel(config.spectrogram, dtype=policy, name="log_mel")
        self.encoder = Encoder(
            net.num_encoder_layers,
            net.segment_frames,
            net.width,
            net.num_heads,
            net.head_width,
            net.mlp_width,
            net.dropout,
            dtype=policy,
            name="encoder",
        )
        self.decoder = Decoder(net, dtype=policy, name="decoder")

        # === Functional Model ===
        samples = keras.Input((config.input_samples,), dtype="float32", name="samples")
        num_frames = keras.Input((), dtype="int32", name="num_frames")
        tokens = keras.Input((None,), dtype="int32", name="decoder_tokens")
        inputs = {"samples": samples, "num_frames": num_frames, "decoder_tokens": tokens}
        super().__init__(
            inputs=inputs,
            outputs=ops.cast(self.forward(inputs), policy.compute_dtype),
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.model_config = config

    def forward(self, inputs: dict[str, Any], training: Any = None) -> Any:
        """The logits of a call, float32 [B, L, V]."""
        spectrum = self.log_mel(inputs["samples"], inputs["num_frames"])
        encoded = self.encoder(spectrum, training=training)
        return self.decoder(inputs["decoder_tokens"], encoded, training=training)

    def encode(self, samples: Any, num_frames: Any) -> Memory:
        """Samples [B, input_samples], int32 [B] -> memory, tensors [B, ...] by name."""
        return self.decoder.memory(self.encoder(self.log_mel(samples, num_frames)))

    def decode_step(
        self, tokens: Any, positions: Any, cache: Cache, bias: Any, memory: Memory
    ) -> tuple[Any, Cache]:
        """Takes every sequence of a batch one token further.

        Where in the cache a past position stands does not matter; only `bias` masks it or not.

        Args:
          tokens: int [B], the last tokens (0 at the start).
          positions: int [B], how many tokens came before them.
          cache: "keys_i", "values_i" for every layer i, each [B, H, C, K].
          bias: float32 [B, C], 0 for cached rows to be attended to, `layers.MASKED` for all others.
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
        samples = keras.KerasTensor((batch_size, self.model_config.input_samples), "float32")
        num_frames = keras.KerasTensor((batch_size,), "int32")
        memory = self.encode(samples, num_frames)  # symbolic
        return {name: ops.zeros(spec.shape, spec.dtype) for name, spec in memory.items()}

    @contextlib.contextmanager
    def for_edge(self) -> Iterator[None]:
        """Within it, decoding takes the form that is small and fast on LiteRT.

        Tables whose rows are taken would stay in float32 there, so that the embedding is a
        product, which is quantised, and positions are computed. Attention: see its
        `positions_last`.
        """
        attentions = [
            attention
            for layer in self.decoder.layers
            for attention in (layer.self_attention, layer.cross_attention)
        ]

        def set_form(is_edge: bool) -> None:
            for attention in attentions:
                attention.positions_last = is_edge
            self.decoder.for_edge = is_edge

        try:
            set_form(True)
            yield
        finally:
            set_form(False)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.model_config.to_dict()}


register_presets(MT3Backbone)
