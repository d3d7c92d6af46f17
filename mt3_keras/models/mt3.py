"""MT3Backbone: T5 over spectrogram frames.

Shape letters: B batch, T frames, L tokens, C cached positions, D width, H heads, K head width,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from mt3_keras.grammar import MASKED
from mt3_keras.models.catalog import register_presets
from mt3_keras.models.config import MT3Config, T5Config, TokenConfig
from mt3_keras.models.layers import Configured, DecoderLayer, Encoder, Logits
from mt3_keras.models.token_backbone import (
    Cache,
    Memory,
    TokenBackbone,
    TokenDecoder,
    kept_for_layer,
)

TAG = "tag"  # the part of the memory that says which decoder this is: float [B, D]


@keras.saving.register_keras_serializable(package="mt3_keras")
class Decoder(TokenDecoder):
    """T5's decoder: see `TokenDecoder`.

    `tag` [B, D], of a network that has one, is added to every token's embedding; in `step` it is
    part of the memory.
    """

    config_type = T5Config
    config: T5Config
    layer_type = DecoderLayer

    def make_logits(self) -> Logits:
        return Logits(
            self.config.vocabulary_rows,
            use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(1.0, "fan_in"),
            dtype=self.dtype_policy,
            name="logits",
        )

    def call(self, tokens: Any, encoded: Any, tag: Any = None, training: Any = None) -> Any:
        x_BLD = self.embed(tokens, training)
        if tag is not None:
            x_BLD = x_BLD + tag[:, None]
        positions_L = ops.arange(ops.shape(tokens)[1])
        bias_LL = ops.where(positions_L[None, :] > positions_L[:, None], MASKED, 0.0)
        for layer in self.layers:
            x_BLD = layer(x_BLD, encoded, bias_LL[None, None], training=training)
        return self.predict(x_BLD, training)

    def step(
        self, tokens_B: Any, positions_B: Any, cache: Cache, bias_BC: Any, memory: Memory
    ) -> tuple[Any, Cache]:
        x_BD = self.embed_one(tokens_B, positions_B)
        if TAG in memory:
            x_BD = x_BD + memory[TAG]
        rows = {}
        for i, layer in enumerate(self.layers):
            x_BD, rows[f"keys_{i}"], rows[f"values_{i}"] = layer.step(
                x_BD,
                (cache[f"keys_{i}"], cache[f"values_{i}"]),
                bias_BC,
                kept_for_layer(memory, i),
            )
        return self.logits(self.norm(x_BD)), rows


@keras.saving.register_keras_serializable(package="mt3_keras")
class MT3Backbone(TokenBackbone):
    """The network of MT3 (Gardner et al., ICLR 2022): T5 over spectrogram frames.

    How it is called and what it is made of: see `TokenBackbone`, with an `MT3Config`. The cache of
    `decode_step` has "keys_i" and "values_i" for every layer i, each [B, H, C, K]; a token adds
    rows [B, H, K]. The memory has no state.
    """

    config_type: type[TokenConfig] = MT3Config
    encoder_type: type[Configured] = Encoder
    decoder_type: type[Configured] = Decoder

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        net = self.model_config.network
        shape = (batch_size, net.num_heads, length, net.head_width)
        names = [
            f"{kind}_{i}" for i in range(net.num_decoder_layers) for kind in ("keys", "values")
        ]
        return {name: ops.zeros(shape, self.compute_dtype) for name in names}


register_presets(MT3Backbone)
