"""TracksInBackbone: an encoder for each separated track, and one decoder.

Shape letters: B batch, S tracks, T frames, M mels, P positions, D width.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from mt3_keras.models.catalog import register_presets
from mt3_keras.models.config import TracksInConfig, TracksInNetworkConfig
from mt3_keras.models.layers import Configured, Encoder
from mt3_keras.models.mt3 import MT3Backbone


@keras.saving.register_keras_serializable(package="mt3_keras")
class TrackEncoders(Configured):
    """A T5 encoder for each track: spectra [B, S, T, M] -> encoded positions [B, P, D] of all.

    A learned tag, added to each frame of a spectrum, says what the track is. The encoders' weights
    are those of all tracks, or each its own. What they give is added up, frame by frame: so a
    token costs the decoder the same however many tracks there are, and silent ones do no harm.

    Args:
      config: sizes of the whole network.
    """

    config_type = TracksInNetworkConfig
    config: TracksInNetworkConfig

    def __init__(self, config: TracksInNetworkConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        net, policy = self.config, self.dtype_policy
        self.num_tracks = len(net.tracks)
        self.encoders = [
            Encoder(net, dtype=policy, name=f"encoder_{i}")
            for i in range(self.num_tracks if net.own_encoders else 1)
        ]

    def build(self, shape: Any) -> None:
        for encoder in self.encoders:
            encoder.build((None, *shape[2:]))
        self.tags = self.add_weight(
            shape=(self.num_tracks, 1, shape[-1]), initializer="normal", name="tags"
        )

    def call(self, spectra: Any, training: Any = None) -> Any:
        tagged = spectra + ops.cast(self.tags, spectra.dtype)
        if len(self.encoders) == 1:
            rows = ops.reshape(tagged, (-1, *tagged.shape[2:]))
            encoded = self.encoders[0](rows, training=training)
            apart_BSPD = ops.reshape(encoded, (-1, self.num_tracks, *encoded.shape[1:]))
            total_BPD = ops.sum(apart_BSPD, axis=1)
        else:
            parts = enumerate(self.encoders)
            total_BPD = sum(encoder(tagged[:, i], training=training) for i, encoder in parts)
        return total_BPD / self.num_tracks**0.5


@keras.saving.register_keras_serializable(package="mt3_keras")
class TracksInBackbone(MT3Backbone):
    """MT3's T5 with an encoder for each separated track, such as drums, bass, vocals and other.

    What it is called with and gives is that of `TokenBackbone`, with a `TracksInConfig`, except
    for "samples", float32 [B, S, input_samples]: the tracks of `network.tracks`, in this order,
    zeros where one is missing.
    """

    config_type = TracksInConfig
    encoder_type = TrackEncoders

    def to_positions(self, samples: Any, num_frames: Any, training: Any = None) -> Any:
        """Samples [B, S, input_samples] -> encoded positions [B, P, D]."""
        rows = ops.reshape(samples, (-1, samples.shape[-1]))
        spectra = self.log_mel(rows, ops.repeat(num_frames, samples.shape[1]))
        apart = ops.reshape(spectra, (-1, samples.shape[1], *spectra.shape[1:]))
        return self.encoder(apart, training=training)


register_presets(TracksInBackbone)
