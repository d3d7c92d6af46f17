"""TokenBackbone: samples and tokens in, token logits out; `mt3` and `recurrent` are its networks.

Shape letters: B batch, P encoded positions, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import keras_hub
from keras import ops

from mt3_keras.models.config import LogMelConfig, TokenConfig, VocabularyConfig
from mt3_keras.models.layers import (
    Configured,
    Logits,
    broadcast_dropout,
    embed_tokens,
    rms_norm,
    sinusoid_positions,
)
from mt3_keras.models.spectrogram import LogMel

Memory = dict[str, Any]  # what the decoder needs of a segment: name -> tensor [B, ...]
Cache = dict[str, Any]  # keys and values of past positions: name -> tensor [B, H, C, K]


class TokenDecoder(Configured):
    """Tokens so far [B, L] and encoded positions [B, P, D] -> logits of the next tokens [B, L, V].

    A subclass names the layers' type, each with a `cross_attention` to the encoded positions, and
    calls them: whole sequences in `call`, one token in `step`.

    Args:
      config: sizes of the whole network.
    """

    layer_type: type[Configured]

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        net, policy = self.config, self.dtype_policy
        self.embedding = keras.layers.Embedding(
            net.vocabulary_rows,
            net.width,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
            dtype=policy,
            name="embedding",
        )
        self.layers = [
            self.layer_type(net, dtype=policy, name=f"layer_{i}")
            for i in range(net.num_decoder_layers)
        ]
        self.norm = rms_norm("norm", policy)
        self.logits = self.make_logits()
        self.dropout = broadcast_dropout(net.dropout, policy)
        self._positions = sinusoid_positions(net.max_tokens, net.width)
        self.for_edge = False

    def make_logits(self) -> Logits:
        """The last projection."""
        return Logits(self.config.vocabulary_rows, dtype=self.dtype_policy, name="logits")

    def build(self, tokens_shape: Any, encoded_shape: Any) -> None:
        self.embedding.build(tokens_shape)
        shape = (*tokens_shape, self.config.width)
        for layer in self.layers:
            layer.build(shape, encoded_shape)
        self.norm.build(shape)
        self.logits.build(shape)

    def compute_output_spec(self, tokens: Any, encoded: Any, training: Any = None) -> Any:
        return keras.KerasTensor((*tokens.shape, self.config.vocabulary_rows), dtype="float32")

    def embed(self, tokens: Any, training: Any) -> Any:
        """Whole sequences [B, L] -> [B, L, D]."""
        positions_L = ops.arange(ops.shape(tokens)[1])
        x_BLD = embed_tokens(self.embedding, self._positions, tokens, positions_L)
        return self.dropout(x_BLD, training=training)

    def embed_one(self, tokens_B: Any, positions_B: Any) -> Any:
        """One token of each sequence -> [B, D]."""
        return embed_tokens(
            self.embedding,
            self._positions,
            tokens_B[:, None],
            positions_B[:, None],
            for_edge=self.for_edge,
        )[:, 0]

    def predict(self, x: Any, training: Any) -> Any:
        """What the last layer gives of whole sequences [B, L, D] -> logits [B, L, V]."""
        return self.logits(self.dropout(self.norm(x), training=training))

    def memory(self, encoded_BPD: Any) -> Memory:
        """Keys and values of a segment for every layer's cross-attention, computed once for it."""
        memory = {}
        for i, layer in enumerate(self.layers):
            keys, values = layer.cross_attention.keys_and_values(encoded_BPD)
            memory[f"cross_keys_{i}"], memory[f"cross_values_{i}"] = keys, values
        return memory

    def step(
        self, tokens_B: Any, positions_B: Any, cache: Cache, bias_BC: Any, memory: Memory
    ) -> tuple[Any, Cache]:
        """See `TokenBackbone.decode_step`."""
        raise NotImplementedError


def kept_for_layer(memory: Memory, i: int) -> tuple[Any, Any]:
    """The keys and values that `TokenDecoder.memory` made for one layer."""
    return memory[f"cross_keys_{i}"], memory[f"cross_values_{i}"]


class TokenBackbone(keras_hub.models.Backbone):
    """A log-mel spectrum, an encoder of it, and a decoder that writes tokens.

    Called with a dict it gives teacher-forced logits [B, L, V] in the policy's compute dtype
    (`forward` gives them in float32):

    - "samples": float32 [B, input_samples], 16 kHz mono
    - "num_frames": int32 [B], spectrogram frames that are real (see `LogMel`)
    - "decoder_tokens": int32 [B, L], the targets shifted right, beginning with 0

    For decoding, `encode` turns samples into a named set of tensors, the memory, and
    `decode_step` takes one token further.

    Args:
      spectrogram: of a `config_type`, or a dict of its fields.
      vocabulary: likewise.
      network: likewise.
      dtype: policy of the network; spectrogram and logits are computed in float32 always.

    Attributes:
      state_names: parts of the memory that each `decode_step` replaces.
    """

    config_type: type[TokenConfig]
    encoder_type: type[Configured]  # of `config.network`: spectrum -> encoded positions [B, P, D]
    decoder_type: type[Configured]  # likewise: a `TokenDecoder`, or what is called as one
    state_names: tuple[str, ...] = ()

    def __init__(
        self,
        spectrogram: LogMelConfig | dict[str, Any] | None = None,
        vocabulary: VocabularyConfig | dict[str, Any] | None = None,
        network: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        config = self.config_type.from_parts(
            spectrogram=spectrogram, vocabulary=vocabulary, network=network
        )

        # === Layers ===
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        self.log_mel = LogMel(config.spectrogram, dtype=policy, name="log_mel")
        self.encoder = self.encoder_type(config.network, dtype=policy, name="encoder")
        self.decoder = self.decoder_type(config.network, dtype=policy, name="decoder")

        # === Functional Model ===
        samples = keras.Input(config.samples_shape, dtype="float32", name="samples")
        num_frames = keras.Input((), dtype="int32", name="num_frames")
        tokens = keras.Input(self.tokens_shape(config), dtype="int32", name="decoder_tokens")
        inputs = {"samples": samples, "num_frames": num_frames, "decoder_tokens": tokens}
        super().__init__(
            inputs=inputs,
            outputs=ops.cast(self.forward(inputs), policy.compute_dtype),
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.model_config = config

    def tokens_shape(self, config: TokenConfig) -> tuple[int | None, ...]:
        """Of an example's tokens; L is open."""
        return (None,)

    def forward(self, inputs: dict[str, Any], training: Any = None) -> Any:
        """The logits of a call, float32 [B, L, V]."""
        encoded = self.to_positions(inputs["samples"], inputs["num_frames"], training)
        return self.decoder(inputs["decoder_tokens"], encoded, training=training)

    def to_positions(self, samples: Any, num_frames: Any, training: Any = None) -> Any:
        """Samples [B, input_samples] -> encoded positions [B, P, D]."""
        return self.encoder(self.log_mel(samples, num_frames), training=training)

    def encode(self, samples: Any, num_frames: Any) -> Memory:
        """Samples [B, input_samples], int32 [B] -> memory, tensors [B, ...] by name."""
        return self.decoder.memory(self.to_positions(samples, num_frames))

    def decode_step(
        self, tokens: Any, positions: Any, cache: Cache, bias: Any, memory: Memory
    ) -> tuple[Any, Cache]:
        """Takes every sequence of a batch one token further.

        Args:
          tokens: int [B], the last tokens (0 at the start).
          positions: int [B], how many tokens came before them.
          cache: of `empty_cache`, with what earlier steps returned.
          bias: float32 [B, C], 0 for cached positions to be attended to, `grammar.MASKED` for all
            others. Where in the cache a past position stands does not matter.
          memory: what `encode` gave, its `state_names` as the last step returned them.

        Returns:
          Logits float32 [B, V]; and by name what these tokens replace in the memory, and the rows
          that they add to the cache, which the caller writes.
        """
        return self.decoder.step(tokens, positions, cache, bias, memory)

    def step_by_name(self, inputs: dict[str, Any]) -> tuple[Any, Cache]:
        """`decode_step`, given all that it takes by name: as a served model and a bundle are asked.

        Args:
          inputs: "tokens", "positions", "bias" if there is a cache, and the tensors of cache and
            memory by their names.
        """
        cache = {name: inputs[name] for name in self.empty_cache(1, 1)}
        others = {"tokens", "positions", "bias", *cache}
        memory = {name: kept for name, kept in inputs.items() if name not in others}
        return self.decode_step(
            inputs["tokens"], inputs["positions"], cache, inputs.get("bias"), memory
        )

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        """Zeros for `decode_step`: room for `length` past positions."""
        raise NotImplementedError

    def empty_memory(self, batch_size: int) -> Memory:
        """Zeros of the shapes that `encode` gives of so many segments."""
        samples = keras.KerasTensor((batch_size, *self.model_config.samples_shape), "float32")
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
        try:
            self.set_edge_form(True)
            yield
        finally:
            self.set_edge_form(False)

    def set_edge_form(self, is_edge: bool) -> None:
        """What `for_edge` does at its beginning and its end."""
        self.decoder.for_edge = is_edge
        for layer in self.decoder.layers:
            for attention in layer.attentions():
                attention.positions_last = is_edge

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.model_config.to_dict()}
