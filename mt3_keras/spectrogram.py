"""LogMel: samples -> log-mel frames, the front end of MT3 as a Keras layer."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.config import SAMPLE_RATE_HZ, SpectrogramConfig

EPSILON = 1e-5


def mel_matrix(config: SpectrogramConfig) -> NDArray[np.float32]:
    """Fourier bins -> mel bands, float32 [window_samples // 2 + 1, num_mels].

    HTK scale, triangles linear in mel, no area normalisation, bin 0 left out: as
    `tf.signal.linear_to_mel_weight_matrix`, which the original calls. With the defaults bands 1
    and 10 fall between Fourier bins and are always empty.
    """

    def to_mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1127.0 * np.log1p(hz / 700.0)

    num_bins = config.window_samples // 2 + 1
    bins = to_mel(np.linspace(0.0, SAMPLE_RATE_HZ / 2, num_bins))[1:, None]
    low, high = to_mel(np.array([config.fmin_hz, config.fmax_hz]))
    edges = np.linspace(low, high, config.num_mels + 2)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    weights = np.maximum(0.0, np.minimum(rising, falling))
    return np.pad(weights, ((1, 0), (0, 0))).astype(np.float32)


class LogMel(keras.layers.Layer):
    """Natural logarithm of the mel spectrum of magnitudes, always in float32.

    Frame i covers samples [i * hop, i * hop + window); nothing is centred, normalised or padded:
    the caller brings `overhang_samples` more samples than frames * hop, zeros (as the original
    does at the end of every segment) or the audio that really follows.

    Call arguments:
      samples: float32 [B, T * hop + overhang], 16 kHz mono.
      num_frames: int32 [B] or None. Frames from this one on become 0.0 *after* the logarithm, as
        the original pads a short last segment.

    Returns:
      float32 [B, T, M].
    """

    def __init__(self, config: SpectrogramConfig, **kwargs: Any) -> None:
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.config = config
        n = np.arange(config.window_samples)
        window = 0.5 - 0.5 * np.cos(2 * np.pi * n / config.window_samples)  # periodic Hann
        self._window = window.astype(np.float32)
        self._mel_matrix = mel_matrix(config)

    def call(self, samples: Any, num_frames: Any = None) -> Any:
        config = self.config
        frames_BTN = ops.extract_sequences(samples, config.window_samples, config.hop_samples)
        real, imaginary = ops.rfft(frames_BTN * self._window)
        magnitude = ops.sqrt(real * real + imaginary * imaginary)
        mel_BTM = ops.matmul(magnitude, self._mel_matrix)
        if config.log_floor == "clamp":
            log_mel = ops.log(ops.maximum(mel_BTM, EPSILON))
        else:
            log_mel = ops.log(ops.where(mel_BTM <= 0, EPSILON, mel_BTM))
        if num_frames is None:
            return log_mel
        is_real_BT = ops.arange(log_mel.shape[1])[None, :] < num_frames[:, None]
        return ops.where(is_real_BT[:, :, None], log_mel, 0.0)

    def compute_output_shape(self, samples_shape: Any, num_frames_shape: Any = None) -> Any:
        batch, num_samples = samples_shape
        num_frames = (num_samples - self.config.window_samples) // self.config.hop_samples + 1
        return batch, num_frames, self.config.num_mels

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "config": self.config.__dict__}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LogMel:
        return cls(**{**config, "config": SpectrogramConfig(**config["config"])})
