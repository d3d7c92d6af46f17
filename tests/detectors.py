"""A minute detector with random weights, for all tests that need one."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.models.config import SMALL, BodyConfig, DetectorConfig
from mt3_keras.models.detector import NoteDetector
from mt3_keras.note_rolls import RollDecoding

MINI = dataclasses.replace(
    SMALL,
    network=BodyConfig(
        spectrum_channels=4,
        channels=4,
        recurrent_width=3,
        interval_channels=2,
        context_width=3,
        frame_width=5,
        drum_width=6,
        drum_context_width=3,
        look_width=4,
        look_heads=2,
        segment_frames=16,
        frames_before=8,
        frames_after=8,
        max_onsets=12,
        max_strokes=6,
    ),
)

# By it even an untrained network has notes.
EAGER = RollDecoding(onset_limit=0.02, stroke_limit=0.02)


def build(config: DetectorConfig = MINI, dtype: str | None = None) -> NoteDetector:
    """A detector whose weights are all random, those too that begin at zero."""
    keras.utils.set_random_seed(0)
    model = NoteDetector(**config.to_dict(), dtype=dtype)
    random = np.random.default_rng(0)
    for weight in model.weights:
        if not np.any(ops.convert_to_numpy(weight)):
            weight.assign(random.normal(0, 0.1, weight.shape))
    return model


def random_samples(config: DetectorConfig = MINI, num_rows: int = 2) -> NDArray[np.float32]:
    """Quiet noise, [num_rows, input_samples]."""
    random = np.random.default_rng(1)
    return random.normal(0, 0.1, (num_rows, config.input_samples)).astype(np.float32)
