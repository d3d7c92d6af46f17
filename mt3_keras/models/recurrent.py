"""RecurrentBackbone: samples and tokens in, token logits out, by convolutions and recurrent layers.

Shape letters: B batch, T frames, P positions, L tokens, D width, M mels, N layers, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import keras_hub
from keras import ops

from mt3_keras.models.catalog import register_presets
from mt3_keras.models.config import (
    LogMelConfig,
    RecurrentConfig,
    RecurrentNetworkConfig,
    VocabularyConfig,
)
from mt3_keras.models.layers import (
    Attention,
    Logits,
    broadcast_dropout,
    embed_tokens,
    rms_norm,
    sinusoid_positions,
)
from mt3_keras.models.spectrogram import LogMel

Memory = dict[str, Any]  # what the decoder needs of a segment: name -> tensor [B, ...]
STATE = "state"  # the part of the memory that each token replaces: float [B, N, D]


def _gated_units(units: int, name: str, dtype: Any, **options: Any) -> keras.layers.GRU:
    """Gated recurrent units over a sequence.

    Without cuDNN, whose form of them neither XLA nor LiteRT can run. Weights begin as those of the
    other layers: orthogonal ones cannot be made in bfloat16.
    """
    return keras.layers.GRU(
        units,
        recurrent_initializer="glorot_uniform",
        return_sequences=True,
        use_cudnn=False,
        dtype=dtype,
        name=name,
        **options,
    )


@keras.saving.register_keras_serializable(package="mt3_keras")
class RecurrentEncoder(keras.layers.Layer):
    """Log-mel spectrum [B, T, M] -> encoded positions [B, P, D].

    Two convolutions over time, each with ReLU and max-pooling, then recurrent layers over time;
    fixed sinusoids say where a position is.

    Args:
      network: sizes, or a dict of its fields.
    """

    def __init__(self, network: RecurrentNetworkConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.network = network = _to_config(network)
        self.convolutions = [
            keras.layers.Conv1D(
                filters,
                network.kernel_frames,
                padding="causal" if network.causal else "same",
                activation="relu",
                dtype=policy,
                name=f"convolution_{i}",
            )
            for i, filters in enumerate(network.filters)
        ]
        self.pool = keras.layers.MaxPooling1D(network.pool_frames, dtype=policy)
        self.forward = [self._recurrent(f"forward_{i}") for i in range(network.num_encoder_layers)]
        self.backward = [
            self._recurrent(f"backward_{i}", go_backwards=True)
            for i in range(0 if network.causal else network.num_encoder_layers)
        ]
        self.norm = rms_norm("norm", policy)
        self.dropout = keras.layers.Dropout(network.dropout, dtype=policy)
        self._positions = sinusoid_positions(network.num_positions, network.width)

    def _recurrent(self, name: str, **options: Any) -> keras.layers.GRU:
        units = self.network.width // (1 if self.network.causal else 2)
        return _gated_units(units, name, self.dtype_policy, **options)

    def build(self, shape: Any) -> None:
        for convolution in self.convolutions:
            convolution.build(shape)
            shape = (*shape[:-1], convolution.filters)
        for i, layer in enumerate(self.forward):
            layer.build(shape)
            if self.backward:
                self.backward[i].build(shape)
            shape = (*shape[:-1], self.network.width)
        self.norm.build(shape)

    def call(self, log_mel_BTM: Any, training: Any = None) -> Any:
        network = self.network
        x = (log_mel_BTM - network.log_mel_mean) / network.log_mel_deviation
        for convolution in self.convolutions:
            x = self.pool(convolution(x))
        for i, layer in enumerate(self.forward):
            states = [layer(x, training=training)]
            if self.backward:
                states.append(ops.flip(self.backward[i](x, training=training), axis=1))
            x = ops.concatenate(states, axis=-1)
        x_BPD = self.norm(x)
        x_BPD = x_BPD + ops.cast(self._positions, x_BPD.dtype)
        return self.dropout(x_BPD, training=training)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "network": dataclasses.asdict(self.network)}


@keras.saving.register_keras_serializable(package="mt3_keras")
class RecurrentDecoderLayer(keras.layers.Layer):
    """Recurrent units over the tokens so far, then attention over the encoder's output.

    Both are pre-norm residuals: x [B, L, D], encoded [B, P, D] -> [B, L, D].
    """

    def __init__(
        self, width: int, num_heads: int, head_width: int, dropout: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.sizes = {
            "width": width,
            "num_heads": num_heads,
            "head_width": head_width,
            "dropout": dropout,
        }
        self.recurrent_norm = rms_norm("recurrent_norm", policy)
        self.recurrent = _gated_units(width, "recurrent", policy)
        self.attention_norm = rms_norm("attention_norm", policy)
        self.attention = Attention(
            width, num_heads, head_width, dropout, dtype=policy, name="attention"
        )
        self.dropout = broadcast_dropout(dropout, policy)

    def build(self, x_shape: Any, encoded_shape: Any) -> None:
        for part in (self.recurrent_norm, self.recurrent, self.attention_norm):
            part.build(x_shape)
        self.attention.build(x_shape, encoded_shape)

    def call(self, x: Any, encoded: Any, training: Any = None) -> Any:
        states = self.recurrent(self.recurrent_norm(x), training=training)
        x = x + self.dropout(states, training=training)
        attended = self.attention(self.attention_norm(x), encoded, training=training)
        return x + self.dropout(attended, training=training)

    def step(self, x_BD: Any, state_BD: Any, memory: tuple[Any, Any]) -> tuple[Any, Any]:
        """One token; returns the output [B, D] and the state [B, D] after it."""
        state_BD, _ = self.recurrent.cell(self.recurrent_norm(x_BD), [state_BD])
        x_BD = x_BD + state_BD
        return x_BD + self.attention.attend_memory(self.attention_norm(x_BD), *memory), state_BD

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.sizes}


@keras.saving.register_keras_serializable(package="mt3_keras")
class RecurrentDecoder(keras.layers.Layer):
    """Tokens so far [B, L] and encoded positions [B, P, D] -> logits of the next tokens [B, L, V].

    Args:
      network: sizes, or a dict of its fields.
    """

    def __init__(self, network: RecurrentNetworkConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.network = network = _to_config(network)
        self.embedding = keras.layers.Embedding(
            network.vocabulary_rows,
            network.width,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
            dtype=policy,
            name="embedding",
        )
        self.layers = [
            RecurrentDecoderLayer(
                network.width,
                network.num_heads,
                network.head_width,
                network.dropout,
                dtype=policy,
                name=f"layer_{i}",
            )
            for i in range(network.num_decoder_layers)
        ]
        self.norm = rms_norm("norm", policy)
        self.logits = Logits(network.vocabulary_rows, dtype=policy, name="logits")
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
        for layer in self.layers:
            x_BLD = layer(x_BLD, encoded, training=training)
        return self.logits(self.dropout(self.norm(x_BLD), training=training))

    def compute_output_spec(self, tokens: Any, encoded: Any, training: Any = None) -> Any:
        return keras.KerasTensor((*tokens.shape, self.network.vocabulary_rows), dtype="float32")

    def memory(self, encoded_BPD: Any) -> Memory:
        """Keys and values of a segment for every layer's attention, and the state to begin with."""
        memory = {}
        for i, layer in enumerate(self.layers):
            keys, values = layer.attention.keys_and_values(encoded_BPD)
            memory[f"cross_keys_{i}"], memory[f"cross_values_{i}"] = keys, values
        memory[STATE] = ops.zeros_like(encoded_BPD[:, : len(self.layers)])
        return memory

    def step(self, tokens_B: Any, positions_B: Any, memory: Memory) -> tuple[Any, Memory]:
        """See `RecurrentBackbone.decode_step`."""
        x_BD = embed_tokens(
            self.embedding,
            self._positions,
            tokens_B[:, None],
            positions_B[:, None],
            for_edge=self.for_edge,
        )[:, 0]
        states = []
        for i, layer in enumerate(self.layers):
            kept = (memory[f"cross_keys_{i}"], memory[f"cross_values_{i}"])
            x_BD, state_BD = layer.step(x_BD, memory[STATE][:, i], kept)
            states.append(state_BD)
        return self.logits(self.norm(x_BD)), {STATE: ops.stack(states, axis=1)}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "network": dataclasses.asdict(self.network)}


def _to_config(network: RecurrentNetworkConfig | dict[str, Any]) -> RecurrentNetworkConfig:
    return RecurrentNetworkConfig(**network) if isinstance(network, dict) else network


@keras.saving.register_keras_serializable(package="mt3_keras")
class RecurrentBackbone(keras_hub.models.Backbone):
    """Convolutions and recurrent layers in the place of MT3's transformer.

    The encoder has convolutions of 128 and 64 filters with max-pooling and gated recurrent units
    (Cho et al., EMNLP 2014) over time, the decoder gated recurrent units over tokens with attention
    of 8 heads over the encoder's output. Spectrum, vocabulary and training are those of
    `MT3Backbone`, and so are its inputs: see there. What a token costs does not depend on how many
    came before it.

    Args:
      spectrogram: of a `RecurrentConfig`, or a dict of its fields.
      vocabulary: likewise.
      network: likewise.
      dtype: policy of the network; spectrogram and logits are computed in float32 always.
    """

    state_names = (STATE,)

    def __init__(
        self,
        spectrogram: LogMelConfig | dict[str, Any] | None = None,
        vocabulary: VocabularyConfig | dict[str, Any] | None = None,
        network: RecurrentNetworkConfig | dict[str, Any] | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        config = RecurrentConfig.from_parts(
            spectrogram=spectrogram, vocabulary=vocabulary, network=network
        )

        # === Layers ===
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        self.log_mel = LogMel(config.spectrogram, dtype=policy, name="log_mel")
        self.encoder = RecurrentEncoder(config.network, dtype=policy, name="encoder")
        self.decoder = RecurrentDecoder(config.network, dtype=policy, name="decoder")

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
        """Samples [B, input_samples], int32 [B] -> memory, tensors [B, ...] by name.

        "state" is the recurrent state before the first token.
        """
        return self.decoder.memory(self.encoder(self.log_mel(samples, num_frames)))

    def decode_step(
        self, tokens: Any, positions: Any, cache: Memory, bias: Any, memory: Memory
    ) -> tuple[Any, Memory]:
        """Takes every sequence of a batch one token further.

        Args:
          tokens: int [B], the last tokens (0 at the start).
          positions: int [B], how many tokens came before them.
          cache: empty: what came before is in the state.
          bias: not read, for the same reason.
          memory: what `encode` gave, "state" replaced by what the last step returned.

        Returns:
          Logits float32 [B, V], and {"state": [B, N, D]} after these tokens.
        """
        return self.decoder.step(tokens, positions, memory)

    def empty_cache(self, batch_size: int, length: int) -> Memory:
        """Nothing, whatever the size: see `decode_step`."""
        return {}

    def empty_memory(self, batch_size: int) -> Memory:
        """Zeros of the shapes that `encode` gives."""
        samples = keras.KerasTensor((batch_size, self.model_config.input_samples), "float32")
        num_frames = keras.KerasTensor((batch_size,), "int32")
        memory = self.encode(samples, num_frames)  # symbolic
        return {name: ops.zeros(spec.shape, spec.dtype) for name, spec in memory.items()}

    @contextlib.contextmanager
    def for_edge(self) -> Iterator[None]:
        """Within it, the network takes the form that is small and fast on LiteRT.

        As that of `MT3Backbone`; besides, the encoder's recurrent layers are unrolled, for LiteRT's
        loops copy their state at every step.
        """
        attentions = [layer.attention for layer in self.decoder.layers]
        loops = [*self.encoder.forward, *self.encoder.backward]

        def set_form(is_edge: bool) -> None:
            for attention in attentions:
                attention.positions_last = is_edge
            for loop in loops:
                loop.unroll = is_edge
            self.decoder.for_edge = is_edge

        try:
            set_form(True)
            yield
        finally:
            set_form(False)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.model_config.to_dict()}


register_presets(RecurrentBackbone)
