"""RecurrentBackbone: convolutions and recurrent layers in the place of the transformer.

Shape letters: B batch, T frames, P positions, L tokens, D width, M mels, N layers, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from mt3_keras.models.catalog import register_presets
from mt3_keras.models.config import RecurrentConfig, RecurrentNetworkConfig
from mt3_keras.models.layers import (
    Attention,
    Configured,
    broadcast_dropout,
    make_attention,
    rms_norm,
    sinusoid_positions,
)
from mt3_keras.models.token_backbone import (
    Cache,
    Memory,
    TokenBackbone,
    TokenDecoder,
    kept_for_layer,
)

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
class RecurrentEncoder(Configured):
    """Log-mel spectrum [B, T, M] -> encoded positions [B, P, D].

    Two convolutions over time, each with ReLU and max-pooling, then recurrent layers over time;
    fixed sinusoids say where a position is.

    Args:
      config: sizes of the whole network.
    """

    config_type = RecurrentNetworkConfig
    config: RecurrentNetworkConfig

    def __init__(self, config: RecurrentNetworkConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        net, policy = self.config, self.dtype_policy
        self.convolutions = [
            keras.layers.Conv1D(
                filters,
                net.kernel_frames,
                padding="causal" if net.causal else "same",
                activation="relu",
                dtype=policy,
                name=f"convolution_{i}",
            )
            for i, filters in enumerate(net.filters)
        ]
        self.pool = keras.layers.MaxPooling1D(net.pool_frames, dtype=policy)
        self.forward = [self._recurrent(f"forward_{i}") for i in range(net.num_encoder_layers)]
        self.backward = [
            self._recurrent(f"backward_{i}", go_backwards=True)
            for i in range(0 if net.causal else net.num_encoder_layers)
        ]
        self.norm = rms_norm("norm", policy)
        self.dropout = keras.layers.Dropout(net.dropout, dtype=policy)
        self._positions = sinusoid_positions(net.num_positions, net.width)

    def _recurrent(self, name: str, **options: Any) -> keras.layers.GRU:
        units = self.config.width // (1 if self.config.causal else 2)
        return _gated_units(units, name, self.dtype_policy, **options)

    def build(self, shape: Any) -> None:
        for convolution in self.convolutions:
            convolution.build(shape)
            shape = (*shape[:-1], convolution.filters)
        for i, layer in enumerate(self.forward):
            layer.build(shape)
            if self.backward:
                self.backward[i].build(shape)
            shape = (*shape[:-1], self.config.width)
        self.norm.build(shape)

    def call(self, log_mel_BTM: Any, training: Any = None) -> Any:
        config = self.config
        x = (log_mel_BTM - config.log_mel_mean) / config.log_mel_deviation
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


@keras.saving.register_keras_serializable(package="mt3_keras")
class RecurrentDecoderLayer(Configured):
    """Recurrent units over the tokens so far, then attention over the encoder's output.

    Both are pre-norm residuals: x [B, L, D], encoded [B, P, D] -> [B, L, D].
    """

    config_type = RecurrentNetworkConfig
    config: RecurrentNetworkConfig

    def __init__(self, config: RecurrentNetworkConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        net, policy = self.config, self.dtype_policy
        self.recurrent_norm = rms_norm("recurrent_norm", policy)
        self.recurrent = _gated_units(net.width, "recurrent", policy)
        self.cross_norm = rms_norm("cross_norm", policy)
        self.cross_attention = make_attention(net, "cross_attention", policy)
        self.dropout = broadcast_dropout(net.dropout, policy)

    def build(self, x_shape: Any, encoded_shape: Any) -> None:
        for part in (self.recurrent_norm, self.recurrent, self.cross_norm):
            part.build(x_shape)
        self.cross_attention.build(x_shape, encoded_shape)

    def call(self, x: Any, encoded: Any, training: Any = None) -> Any:
        states = self.recurrent(self.recurrent_norm(x), training=training)
        x = x + self.dropout(states, training=training)
        attended = self.cross_attention(self.cross_norm(x), encoded, training=training)
        return x + self.dropout(attended, training=training)

    def step(self, x_BD: Any, state_BD: Any, memory: tuple[Any, Any]) -> tuple[Any, Any]:
        """One token; returns the output [B, D] and the state [B, D] after it."""
        state_BD, _ = self.recurrent.cell(self.recurrent_norm(x_BD), [state_BD])
        x_BD = x_BD + state_BD
        attended_BD = self.cross_attention.attend_memory(self.cross_norm(x_BD), *memory)
        return x_BD + attended_BD, state_BD

    def attentions(self) -> list[Attention]:
        return [self.cross_attention]


@keras.saving.register_keras_serializable(package="mt3_keras")
class RecurrentDecoder(TokenDecoder):
    """Recurrent layers with attention: see `TokenDecoder`."""

    config_type = RecurrentNetworkConfig
    config: RecurrentNetworkConfig
    layer_type = RecurrentDecoderLayer

    def call(self, tokens: Any, encoded: Any, training: Any = None) -> Any:
        x_BLD = self.embed(tokens, training)
        for layer in self.layers:
            x_BLD = layer(x_BLD, encoded, training=training)
        return self.predict(x_BLD, training)

    def memory(self, encoded_BPD: Any) -> Memory:
        """Keys and values of a segment for every layer's attention, and the state to begin with."""
        state = ops.zeros_like(encoded_BPD[:, : len(self.layers)])
        return {**super().memory(encoded_BPD), STATE: state}

    def step(
        self, tokens_B: Any, positions_B: Any, cache: Cache, bias_BC: Any, memory: Memory
    ) -> tuple[Any, Memory]:
        x_BD = self.embed_one(tokens_B, positions_B)
        states = []
        for i, layer in enumerate(self.layers):
            x_BD, state_BD = layer.step(x_BD, memory[STATE][:, i], kept_for_layer(memory, i))
            states.append(state_BD)
        return self.logits(self.norm(x_BD)), {STATE: ops.stack(states, axis=1)}


@keras.saving.register_keras_serializable(package="mt3_keras")
class RecurrentBackbone(TokenBackbone):
    """Convolutions and recurrent layers in the place of MT3's transformer.

    The encoder has convolutions of 128 and 64 filters with max-pooling and gated recurrent units
    (Cho et al., EMNLP 2014) over time, the decoder gated recurrent units over tokens with attention
    of 8 heads over the encoder's output. Spectrum, vocabulary and training are those of
    `MT3Backbone`.

    How it is called and what it is made of: see `TokenBackbone`, with a `RecurrentConfig`. What
    came before a token is in the memory's "state" [B, N, D], which every `decode_step` replaces;
    the cache is empty and its bias not read. So a token costs the same however many came before it.
    """

    config_type = RecurrentConfig
    encoder_type, decoder_type = RecurrentEncoder, RecurrentDecoder
    state_names = (STATE,)

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        """Nothing, whatever the size: see the class."""
        return {}

    def set_edge_form(self, is_edge: bool) -> None:
        """Besides, the encoder's layers are unrolled: LiteRT's loops copy their state each step."""
        super().set_edge_form(is_edge)
        for loop in (*self.encoder.forward, *self.encoder.backward):
            loop.unroll = is_edge


register_presets(RecurrentBackbone)
