"""MT3Backbone: samples and tokens in, token logits out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from mt3_keras.grammar import STATE, Grammar, Rules
from mt3_keras.models.config import ModelConfig, NetworkConfig, SpectrogramConfig, VocabularyConfig
from mt3_keras.models.heads import Heads, Rolls
from mt3_keras.models.layers import (
    MASKED,
    ConvStem,
    DecoderLayer,
    EncoderLayer,
    StateInputs,
    broadcast_dropout,
    dense,
    rms_norm,
    sinusoid_frequencies,
    sinusoid_positions,
)
from mt3_keras.models.pointer import Pointer, step_to_index
from mt3_keras.models.spectrogram import Harmonics, LogMel
from mt3_keras.note_rolls import NOTE_HEADS

Memory = dict[str, Any]  # what the decoder needs of a segment: name -> tensor [B, ...]
Cache = dict[str, Any]  # keys and values of past positions: name -> tensor [B, H, C, K]
State = dict[str, Any]  # what the tokens so far imply (see `Grammar`): name -> int32 [B]


def without_rolls(memory: Memory) -> Memory:
    """What `decode_step` reads of a memory: all but the rolls that notes are read from."""
    return {name: memory[name] for name in memory if name != "note_rolls"}


class Encoder(keras.layers.Layer):
    """Spectrogram frames [B, F, M] -> encoded positions [B, T, D]."""

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
        self._positions = sinusoid_positions(network.num_positions, network.width)

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

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # the heads' logits stay float32
        policy = self.dtype_policy
        self.network = network = config.network
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
        self._for_edge = False
        self.state_inputs = self.pointer = None
        if network.state_inputs:
            self.state_inputs = StateInputs(config, dtype=policy, name="state_inputs")
        if network.pointer:
            self.pointer = Pointer(config, name="pointer")
        self._grammar = Grammar(config, Rules(), ops)
        self._places = step_to_index(
            config, network.num_positions / config.segment_seconds, network.num_positions
        )

    def build(self, tokens_shape: Any, encoded_shape: Any) -> None:
        self.embedding.build(tokens_shape)
        shape = (*tokens_shape, self.network.width)
        for layer in self.layers:
            layer.build(shape, encoded_shape)
        self.norm.build(shape)
        self.logits.build(shape)
        if self.state_inputs:
            self.state_inputs.build()
        if self.pointer:
            self.pointer.build(self.network.width)

    def call(self, tokens: Any, encoded: Any, rolls: Any = None, training: Any = None) -> Any:
        positions_L = ops.arange(ops.shape(tokens)[1])
        state = self._grammar.follow(tokens) if self.uses_state else None
        x_BLD, place_BLT = self._embed(tokens, positions_L, state, encoded)
        x_BLD = self.dropout(x_BLD, training=training)
        bias_LL = ops.where(positions_L[None, :] > positions_L[:, None], MASKED, 0.0)
        for layer in self.layers:
            x_BLD = layer(x_BLD, encoded, bias_LL[None, None], place_BLT, training=training)
        x_BLD = self.dropout(self.norm(x_BLD), training=training)
        logits = self.logits(x_BLD)
        if self.pointer:
            logits += self.pointer(x_BLD, tokens, state, self.pointer.tables(encoded, rolls))
        return logits

    def compute_output_spec(
        self, tokens: Any, encoded: Any, rolls: Any = None, training: Any = None
    ) -> Any:
        return keras.KerasTensor((*tokens.shape, self.network.vocabulary_rows), dtype="float32")

    @property
    def uses_state(self) -> bool:
        return self.network.state_inputs or self.network.time_bias or self.network.pointer

    def _embed(self, tokens: Any, positions: Any, state: Any, encoded_BTD: Any) -> tuple[Any, Any]:
        """Tokens [B, L] -> the first layer's input, and where in `encoded` each is, one-hot."""
        x = self._embed_tokens(tokens, positions)
        if self.state_inputs:
            x = x + self.state_inputs(state)
        if not self.network.time_bias:
            return x, None
        place = ops.take(self._places, ops.minimum(state["time"], len(self._places) - 1))
        place_BLT = ops.one_hot(place, self.network.num_positions, dtype=x.dtype)
        return x + ops.matmul(place_BLT, encoded_BTD), place_BLT

    def _embed_tokens(self, tokens: Any, positions: Any) -> Any:
        if self._for_edge:
            one_hot = ops.one_hot(tokens, self.network.vocabulary_rows, dtype=self.compute_dtype)
            one_hot = ops.reshape(one_hot, (-1, self.network.vocabulary_rows))
            frequencies = sinusoid_frequencies(self.network.width).astype(np.float32)
            angles = ops.cast(positions, "float32")[..., None] * frequencies
            sinusoids = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)
            embedded = ops.matmul(one_hot, self.embedding.embeddings)
            return ops.reshape(embedded, (-1, 1, self.network.width)) + sinusoids  # one position
        x = self.embedding(tokens)
        return x + ops.cast(ops.take(self._positions, positions, axis=0), x.dtype)

    @contextlib.contextmanager
    def for_edge(self) -> Iterator[None]:
        """Within it, decoding takes the form that is small and fast on LiteRT.

        Tables whose rows are taken would stay in float32 there, so that the embedding is a
        product, which is quantised, and positions are computed. Attention: see its
        `positions_last`.
        """
        attentions = [
            attention
            for layer in self.layers
            for attention in (layer.self_attention, layer.cross_attention)
        ]
        try:
            for part in attentions:
                part.positions_last = True
            self._for_edge = True
            yield
        finally:
            for part in attentions:
                part.positions_last = False
            self._for_edge = False

    def memory(self, encoded_BTD: Any, rolls: Rolls) -> Memory:
        """What decoding needs of a segment, computed once for it."""
        memory = {}
        for i, layer in enumerate(self.layers):
            keys, values = layer.cross_attention.keys_and_values(encoded_BTD)
            memory[f"cross_keys_{i}"], memory[f"cross_values_{i}"] = keys, values
        if self.network.time_bias:
            memory["encoded"] = encoded_BTD
        if self.pointer:
            memory |= self.pointer.tables(encoded_BTD, rolls)
        if rolls:
            logits = ops.concatenate([rolls[head] for head in NOTE_HEADS], axis=-1)
            memory["note_rolls"] = ops.sigmoid(logits)
        return memory

    def step(
        self,
        tokens_B: Any,
        positions_B: Any,
        cache: Cache,
        bias_BC: Any,
        memory: Memory,
        state: State | None,
    ) -> tuple[Any, Cache]:
        """See `MT3Backbone.decode_step`."""
        if self.uses_state:
            if state is None:
                raise ValueError("decode_step of this network needs the state of the tokens so far")
            state = {name: state[name][:, None] for name in STATE}  # a sequence of one token
        x_B1D, place_B1T = self._embed(
            tokens_B[:, None], positions_B[:, None], state, memory.get("encoded")
        )
        x_BD = x_B1D[:, 0]
        rows = {}
        for i, layer in enumerate(self.layers):
            x_BD, rows[f"keys_{i}"], rows[f"values_{i}"] = layer.step(
                x_BD,
                (cache[f"keys_{i}"], cache[f"values_{i}"]),
                bias_BC,
                (memory[f"cross_keys_{i}"], memory[f"cross_values_{i}"]),
                place_B1T,
            )
        x_BD = self.norm(x_BD)
        logits = self.logits(x_BD)
        if self.pointer:
            logits += self.pointer(x_BD[:, None], tokens_B[:, None], state, memory)[:, 0]
        return logits, rows


@keras.saving.register_keras_serializable(package="mt3_keras")
class MT3Backbone(keras_hub.models.Backbone):
    """The network of MT3 (Gardner et al., ICLR 2022): T5 over spectrogram frames.

    Called with a dict it gives teacher-forced logits, float32 [B, L, V]; with heads, a dict of
    these, "logits", and the rolls, f"{head}_logits" (see `heads`):

    - "samples": float32 [B, input_samples], 16 kHz mono, from `lead_samples` before the segment on
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
        if config.spectrogram.front_end == "harmonic":
            self.harmonics = Harmonics(config.spectrogram, name="harmonics")
            self.stem = ConvStem(config.network, dtype=policy, name="stem")
        else:
            self.log_mel = LogMel(config.spectrogram, name="log_mel")
        self.encoder = Encoder(config.network, dtype=policy, name="encoder")
        if config.network.heads:
            self.heads = Heads(config, dtype=policy, name="heads")
        self.decoder = Decoder(config, dtype=policy, name="decoder")
        self.model_config = config

        # === Functional Model ===
        samples = keras.Input((config.input_samples,), dtype="float32", name="samples")
        num_frames = keras.Input((), dtype="int32", name="num_frames")
        tokens = keras.Input((None,), dtype="int32", name="decoder_tokens")
        encoded, rolls = self._encode(samples, num_frames)
        logits = self.decoder(tokens, encoded, rolls)
        heads = _to_outputs(rolls)
        super().__init__(
            inputs={"samples": samples, "num_frames": num_frames, "decoder_tokens": tokens},
            outputs={"logits": logits, **heads} if heads else logits,
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.model_config = config

    def _encode(self, samples: Any, num_frames: Any, training: Any = None) -> tuple[Any, Rolls]:
        """Samples -> encoded positions [B, T, D] and the heads' rolls."""
        network, stem = self.model_config.network, None
        if self.model_config.spectrogram.front_end == "harmonic":
            stem = self.stem(self.harmonics(samples), training=training)
            frames = stem["features"]
        else:
            frames = self.log_mel(samples, num_frames)
            width = network.frames_per_position * frames.shape[-1]
            frames = ops.reshape(frames, (-1, network.num_positions, width))
        encoded = self.encoder(frames, training=training)
        return self.heads(encoded, stem) if network.heads else (encoded, {})

    def hear(self, samples: Any, num_frames: Any, training: Any = None) -> dict[str, Any]:
        """What a call gives besides the logits, without the decoder: f"{head}_logits" by name."""
        return _to_outputs(self._encode(samples, num_frames, training)[1])

    def encode(self, samples: Any, num_frames: Any) -> Memory:
        """Samples [B, input_samples] -> memory, tensors [B, ...] by name.

        With heads it also holds "note_rolls" float32 [B, F, N] (see `note_rolls`), which
        `decode_step` does not read.
        """
        return self.decoder.memory(*self._encode(samples, num_frames))

    def decode_step(
        self,
        tokens: Any,
        positions: Any,
        cache: Cache,
        bias: Any,
        memory: Memory,
        state: State | None = None,
    ) -> tuple[Any, Cache]:
        """Takes every sequence of a batch one token further.

        Where in the cache a past position stands does not matter; only `bias` says what is seen.

        Args:
          tokens: int [B], the last tokens (0 at the start).
          positions: int [B], how many tokens came before them.
          cache: "keys_i", "values_i" for every layer i, each [B, H, C, K].
          bias: float32 [B, C], 0 for cached rows to be seen, `layers.MASKED` for all others.
          memory: what `encode` gave.
          state: int32 [B] each, what the tokens so far, these included, imply: "time", "program",
            "velocity", "section" of `Grammar`'s state. None where the network does not ask.

        Returns:
          Logits float32 [B, V], and the rows [B, H, K] that these tokens add to the cache, which
          the caller writes.
        """
        return self.decoder.step(tokens, positions, cache, bias, memory, state)

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

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.model_config.to_dict()}


def _to_outputs(rolls: Rolls) -> dict[str, Any]:
    return {f"{head}_logits": roll for head, roll in rolls.items()}


def _to_dict(part: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return dataclasses.asdict(part)
    return dict(part or {})
