"""TracksOutBackbone: one encoder, and a decoder for each group of instruments.

Shape letters: B segments, G groups, R = B * G rows of decoders, P positions, L tokens, D width,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from mt3_keras.models.catalog import register_presets
from mt3_keras.models.config import TokenConfig, TracksOutConfig, TracksOutNetworkConfig
from mt3_keras.models.layers import Configured
from mt3_keras.models.mt3 import TAG, Decoder, MT3Backbone
from mt3_keras.models.token_backbone import Cache, Memory


@keras.saving.register_keras_serializable(package="mt3_keras")
class GroupDecoders(Configured):
    """A T5 decoder for each group, side by side.

    Tokens [B, G, L], encoded positions [B, P, D] -> logits [B, G, L, V]. A learned tag,
    added to every token, says which group a decoder is for. Its weights are those of all, or its
    own. Where there are rows, those of a segment's groups stand together, in order.

    Args:
      config: sizes of the whole network.
    """

    config_type = TracksOutNetworkConfig
    config: TracksOutNetworkConfig

    def __init__(self, config: TracksOutNetworkConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        net = self.config
        self.num_groups = len(net.tracks)
        self.decoders = [
            Decoder(net, dtype=self.dtype_policy, name=f"decoder_{i}")
            for i in range(self.num_groups if net.own_decoders else 1)
        ]

    def build(self, tokens_shape: Any, encoded_shape: Any) -> None:
        for decoder in self.decoders:
            decoder.build((None, tokens_shape[-1]), encoded_shape)
        shape = (self.num_groups, self.config.width)
        self.tags = self.add_weight(shape=shape, initializer="normal", name="tags")

    def compute_output_spec(self, tokens: Any, encoded: Any, training: Any = None) -> Any:
        return keras.KerasTensor((*tokens.shape, self.config.vocabulary_rows), dtype="float32")

    @property
    def layers(self) -> list[Any]:
        """Of all decoders."""
        return [layer for decoder in self.decoders for layer in decoder.layers]

    @property
    def for_edge(self) -> bool:
        """As of a `TokenDecoder`."""
        return self.decoders[0].for_edge

    @for_edge.setter
    def for_edge(self, is_edge: bool) -> None:
        for decoder in self.decoders:
            decoder.for_edge = is_edge

    def call(self, tokens: Any, encoded: Any, training: Any = None) -> Any:
        length = ops.shape(tokens)[2]
        rows_RL = ops.reshape(tokens, (-1, length))
        encoded_RPD = ops.repeat(encoded, self.num_groups, axis=0)
        tags_RD = self._tag_rows(encoded)
        parts = [
            decoder(
                *(self._rows_of(i, x) for x in (rows_RL, encoded_RPD, tags_RD)), training=training
            )
            for i, decoder in enumerate(self.decoders)
        ]
        logits_RLV = self._join(parts)
        shape = (-1, self.num_groups, length, self.config.vocabulary_rows)
        return ops.reshape(logits_RLV, shape)

    def memory(self, encoded_BPD: Any) -> Memory:
        """What all decoders need of B segments, R rows: see `TokenDecoder.memory`."""
        own = [decoder.memory(encoded_BPD) for decoder in self.decoders]
        rows = {name: self._join([memory[name] for memory in own]) for name in own[0]}
        if len(own) == 1:
            rows = {name: ops.repeat(kept, self.num_groups, axis=0) for name, kept in rows.items()}
        return {**rows, TAG: self._tag_rows(encoded_BPD)}

    def step(
        self, tokens_R: Any, positions_R: Any, cache: Cache, bias_RC: Any, memory: Memory
    ) -> tuple[Any, Cache]:
        """See `TokenBackbone.decode_step`."""
        steps = []
        for i, decoder in enumerate(self.decoders):
            kept, own = (
                {name: self._rows_of(i, rows) for name, rows in tensors.items()}
                for tensors in (cache, memory)
            )
            tokens, positions = (self._rows_of(i, x) for x in (tokens_R, positions_R))
            bias = bias_RC if bias_RC.shape[0] == 1 else self._rows_of(i, bias_RC)
            steps.append(decoder.step(tokens, positions, kept, bias, own))
        rows = {name: self._join([new[name] for _, new in steps]) for name in steps[0][1]}
        return self._join([logits for logits, _ in steps]), rows

    def _tag_rows(self, encoded_BPD: Any) -> Any:
        """The tags [G, D] for every segment, [R, D]."""
        zeros_BGD = ops.zeros_like(encoded_BPD[:, :1]) + ops.cast(self.tags, encoded_BPD.dtype)
        return ops.reshape(zeros_BGD, (-1, self.config.width))

    def _rows_of(self, i: int, rows: Any) -> Any:
        """The rows that decoder `i` works on."""
        return rows if len(self.decoders) == 1 else rows[i :: self.num_groups]

    def _join(self, parts: list[Any]) -> Any:
        """The rows of all decoders; inverse of `_rows_of`."""
        if len(parts) == 1:
            return parts[0]
        stacked = ops.stack(parts, axis=1)
        sizes = [stacked.shape[i] or ops.shape(stacked)[i] for i in range(2, len(stacked.shape))]
        return ops.reshape(stacked, (-1, *sizes))


@keras.saving.register_keras_serializable(package="mt3_keras")
class TracksOutBackbone(MT3Backbone):
    """MT3's T5 with a decoder for each group of instruments, such as drums, bass and keys.

    Each emits the tokens of its own group's notes, side by side in one batch, so that sequences
    are shorter; `TrackDecoder` puts the notes together. What the network is called with and gives
    is that of `TokenBackbone`, with a `TracksOutConfig`, except that there are G sequences a
    segment: "decoder_tokens" [B, G, L] and logits [B, G, L, V]; `encode` gives B * G rows of
    memory, and `decode_step` works on whole segments, their rows in order of groups.
    """

    config_type = TracksOutConfig
    decoder_type = GroupDecoders

    def tokens_shape(self, config: TokenConfig) -> tuple[int | None, ...]:
        return (config.num_decoders, None)


register_presets(TracksOutBackbone)
