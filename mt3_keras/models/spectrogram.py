"""Samples -> spectrogram frames, as Keras layers: `LogMel` of MT3, `Harmonics` of the detector."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.models.config import (
    NUM_PITCHES,
    SAMPLE_RATE_HZ,
    HarmonicConfig,
    LogMelConfig,
)
from mt3_keras.models.layers import Configured

EPSILON = 1e-5
NUM_BANDS = 8
A0_HZ = 27.5  # the lowest of the pitches with harmonics of their own


def hann(window_samples: int) -> NDArray[np.float32]:
    """Periodic Hann window, computed in float32 as the original does.

    Its rounding is what a pure tone leaves in the bands far from it.
    """
    angles = np.float32(2 * np.pi) * np.arange(window_samples, dtype=np.float32) / window_samples
    return np.float32(0.5) - np.float32(0.5) * np.cos(angles.astype(np.float32))


def magnitudes(samples: Any, window: NDArray[np.float32], hop_samples: int) -> Any:
    """Samples [B, n] -> Fourier magnitudes float32 [B, T, bins] of the windows that fit."""
    frames_BTN = ops.extract_sequences(ops.cast(samples, "float32"), len(window), hop_samples)
    real, imaginary = ops.rfft(frames_BTN * window)
    return ops.sqrt(real * real + imaginary * imaginary)


def mel_matrix(config: LogMelConfig) -> NDArray[np.float32]:
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


@keras.saving.register_keras_serializable(package="mt3_keras")
class LogMel(Configured):
    """Natural logarithm of the mel spectrum of magnitudes, float32 whatever the dtype policy.

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

    config_type = LogMelConfig
    config: LogMelConfig

    def __init__(self, config: LogMelConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **{"autocast": False, **kwargs})
        self._window = hann(self.config.window_samples)
        self._mel_matrix = mel_matrix(self.config)

    def call(self, samples: Any, num_frames: Any = None) -> Any:
        config = self.config
        magnitudes_BTN = magnitudes(samples, self._window, config.hop_samples)
        mel_BTM = ops.matmul(magnitudes_BTN, self._mel_matrix)
        if config.log_floor == "clamp":
            log_mel = ops.log(ops.maximum(mel_BTM, EPSILON))
        else:
            log_mel = ops.log(ops.where(mel_BTM <= 0, EPSILON, mel_BTM))
        if num_frames is None:
            return log_mel
        is_real_BT = ops.arange(log_mel.shape[1])[None, :] < num_frames[:, None]
        return ops.where(is_real_BT[:, :, None], log_mel, 0.0)

    def compute_output_spec(self, samples: Any, num_frames: Any = None) -> Any:
        frames = (samples.shape[1] - self.config.window_samples) // self.config.hop_samples + 1
        return keras.KerasTensor((samples.shape[0], frames, self.config.num_mels), dtype="float32")


def log_frequency_matrix(config: HarmonicConfig, window_samples: int) -> NDArray[np.float32]:
    """Fourier bins -> log-frequency bins from A0 up, float32 [window_samples // 2 + 1, bins].

    Triangles of peak 1 that reach to the neighbouring bins; where Fourier bins lie further apart,
    linear interpolation between them.
    """
    num_bins = int(config.bins_per_octave * np.log2(config.fmax_hz / A0_HZ)) + 1
    ratio = 2 ** (1 / config.bins_per_octave)
    centres = A0_HZ * ratio ** np.arange(num_bins)
    fourier_hz = np.linspace(0.0, SAMPLE_RATE_HZ / 2, window_samples // 2 + 1)
    reach = np.maximum(centres * (ratio - 1), fourier_hz[1])
    return np.maximum(0.0, 1 - np.abs(fourier_hz[:, None] - centres) / reach).astype(np.float32)


def _bands(matrix: NDArray[np.float32]) -> list[tuple[slice, NDArray[np.float32]]]:
    """A matrix of narrow triangles in parts: the rows that matter to some columns, and these.

    The product of the parts takes a quarter of the time.
    """
    parts = np.array_split(matrix, NUM_BANDS, axis=1)
    found = []
    for part in parts:
        rows = np.flatnonzero(part.any(axis=1))
        reach = slice(int(rows[0]), int(rows[-1]) + 1)
        found.append((reach, np.ascontiguousarray(part[reach])))
    return found


@keras.saving.register_keras_serializable(package="mt3_keras")
class Harmonics(Configured):
    """For each pitch of the piano the strength of its harmonics, seen through two windows.

    Harmonic stacking as in Basic Pitch (Bittner et al., ICASSP 2022), here of two logarithmic
    spectra, one of a long window for the pitch and one of a short window for the time. The bins
    of each harmonic (a semitone: itself and its neighbours) are channels, so that the pitch axis
    is short. Values are log(1 + amplitude / floor): silence is 0, as is all beyond the range.

    Call arguments:
      samples: float32 [B, lead + T * hop + overhang], 16 kHz mono; windows are centred on hops.

    Returns:
      float32 [B, T, NUM_PITCHES, channels], whatever the dtype policy.
    """

    config_type = HarmonicConfig
    config: HarmonicConfig

    def __init__(self, config: HarmonicConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **{"autocast": False, **kwargs})
        own = self.config
        self._lengths = (own.window_samples, own.short_window_samples)
        self._windows = [hann(n) / (n / 4) for n in self._lengths]  # a full-scale sine becomes 1
        matrices = [log_frequency_matrix(own, n) / own.floor for n in self._lengths]
        self._bands = [_bands(matrix) for matrix in matrices]
        per_octave = own.bins_per_octave
        width = per_octave // 12
        first = np.array([round(per_octave * np.log2(h)) - width // 2 for h in own.harmonics])
        bins = first[:, None] + np.arange(width)  # of the lowest pitch
        pitches = np.arange(NUM_PITCHES)[:, None, None] * width
        num_bins = matrices[0].shape[1]
        outside = len(self._lengths) * num_bins  # a column of zeros
        indices = bins + pitches  # [88, harmonics, width]
        self._indices = np.concatenate(
            [
                np.where((indices >= 0) & (indices < num_bins), indices + i * num_bins, outside)
                for i in range(len(self._lengths))
            ],
            axis=1,
        ).reshape(NUM_PITCHES, -1)
        self.built = True  # no weights; its parts are also called by themselves

    def call(self, samples: Any) -> Any:
        return self.stack(self.spectrum(samples))

    def stack(self, spectrum: Any) -> Any:
        """Spectra [B, T, M] -> the harmonics of each pitch."""
        return ops.take(ops.pad(spectrum, [(0, 0), (0, 0), (0, 1)]), self._indices, axis=-1)

    def spectrum(self, samples: Any) -> Any:
        """Samples -> both logarithmic spectra side by side, float32 [B, T, M]."""
        config = self.config
        spectra = []
        for length, window, bands in zip(self._lengths, self._windows, self._bands, strict=True):
            inset = (config.window_samples - length) // 2
            inner = samples[:, inset : samples.shape[1] - inset]
            found = magnitudes(inner, window, config.hop_samples)
            spectra += [ops.matmul(found[..., reach], matrix) for reach, matrix in bands]
        return ops.log1p(ops.concatenate(spectra, axis=-1))

    def compute_output_spec(self, samples: Any) -> Any:
        frames = (samples.shape[1] - self.config.window_samples) // self.config.hop_samples + 1
        return keras.KerasTensor((samples.shape[0], frames, *self._indices.shape), dtype="float32")
