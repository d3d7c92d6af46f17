"""A minute detector with random weights, for all tests that need one."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.models.config import SMALL, DetectorBodyConfig, DetectorConfig
from mt3_keras.models.detector import NoteDetector
from mt3_keras.note_rolls import RollDecoding

MINI = dataclasses.replace(
    SMALL,
    network=DetectorBodyConfig(
        width=16,
        num_heads=2,
        head_width=8,
        num_encoder_layers=1,
        mlp_width=16,
        segment_frames=16,
        stem_channels=4,
    ),
)

# By it even an untrained network has notes.
EAGER = RollDecoding(start_limit=0.02, lowest_limit=0.02, highest_limit=0.02)


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
