"""Samples -> the content of a WAV file, as a model server takes it."""

from __future__ import annotations

import io
import wave

import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import SAMPLE_RATE_HZ

FULL_SCALE = 2**15


def fits_wav(samples: NDArray[np.float32]) -> bool:
    """Whether 16 bits hold the samples: there are some, and none is beyond full scale."""
    return bool(samples.size) and float(np.abs(samples).max()) <= 1.0


def to_wav(samples: NDArray[np.float32]) -> bytes:
    """16 kHz mono in [-1, 1], float32 [n] -> a WAV file, PCM of 16 bits."""
    pcm = np.clip(np.round(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype("<i2")
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(pcm.tobytes())
    return content.getvalue()
