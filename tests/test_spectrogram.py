"""The log-mel front end against the figures of the original's code."""

from __future__ import annotations

import numpy as np
import pytest
from keras import ops

from mt3_keras.models.config import LogMelConfig
from mt3_keras.models.spectrogram import LogMel, mel_matrix

CONFIG = LogMelConfig()
TIME = np.arange(32_768) / 16_000


def log_mel(samples, num_frames=None, **settings):
    """[T, M] of one segment with zeros after it."""
    padded = np.pad(samples, (0, CONFIG.overhang_samples)).astype(np.float32)[None]
    counts = None if num_frames is None else np.array([num_frames], np.int32)
    return ops.convert_to_numpy(LogMel(LogMelConfig(**settings))(padded, counts))[0]


def test_the_mel_matrix_is_that_of_the_original():
    matrix = mel_matrix(CONFIG)
    assert matrix.shape == (1025, 512)
    assert np.flatnonzero(matrix.sum(axis=0) == 0).tolist() == [1, 10]
    assert matrix.max() == pytest.approx(0.99944, abs=1e-5)
    assert matrix.sum() == pytest.approx(967.769, abs=1e-2)
    used = np.flatnonzero(matrix.sum(axis=1))
    assert (used.min(), used.max()) == (3, 972)
    assert (matrix > 0).sum(axis=0).max() == 10


def test_a_sine_has_the_originals_spectrum():
    values = log_mel(0.5 * np.sin(2 * np.pi * 440 * TIME))
    assert values.shape == (256, 512)
    assert values[100].argmax() == 95
    assert values[100].max() == pytest.approx(5.44411, abs=1e-3)
    assert values[:, [1, 10]] == pytest.approx(np.log(1e-5), abs=1e-5)
    assert values.mean() == pytest.approx(-9.083181, abs=2e-3)


def test_a_sweep_has_the_originals_spectrum():
    values = log_mel(0.3 * np.sin(2 * np.pi * (100 * TIME + 900 * TIME**2)))
    for cell, value in {(0, 0): -3.46728, (0, 50): 3.86873, (255, 511): -4.31330}.items():
        assert values[cell] == pytest.approx(value, abs=1e-3)
    # Far from the tone there is little but the rounding of the transform itself.
    for cell, value in {(64, 100): -9.82229, (128, 200): -10.06152, (200, 300): -9.58731}.items():
        assert values[cell] == pytest.approx(value, abs=0.05)
    assert values.mean() == pytest.approx(-10.074821, abs=1e-3)


def test_the_floors_differ_only_below_1e_5():
    samples = np.random.default_rng(0).normal(size=32_768) * 1e-6
    zero, clamp = log_mel(samples), log_mel(samples, log_floor="clamp")
    assert clamp.min() == pytest.approx(np.log(1e-5), abs=1e-5)
    assert zero.min() < clamp.min() - 0.1
    assert np.maximum(zero, np.float32(np.log(1e-5))) == pytest.approx(clamp, abs=1e-5)


def test_silence_is_the_logarithm_of_the_floor():
    assert log_mel(np.zeros(32_768)) == pytest.approx(np.log(1e-5), abs=1e-5)


def test_frames_past_the_end_are_zero_after_the_logarithm():
    samples = np.random.default_rng(0).normal(size=32_768)
    whole, cut = log_mel(samples, 256), log_mel(samples, 100)
    assert (cut[100:] == 0).all()
    assert (cut[:100] == whole[:100]).all()
    assert np.abs(whole[100:]).min(axis=1).min() > 0


def test_only_the_last_15_frames_reach_what_follows_a_segment():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(1, 32_768 + CONFIG.overhang_samples)).astype(np.float32)
    alone = samples.copy()
    alone[:, 32_768:] = 0
    layer = LogMel(CONFIG)
    differs = np.any(ops.convert_to_numpy(layer(samples) != layer(alone))[0], axis=1)
    assert np.flatnonzero(differs).min() == 241


@pytest.mark.parametrize(
    "settings",
    [{"log_floor": "none"}, {"fmax_hz": 9000.0}, {"fmin_hz": 8000.0}, {"num_mels": 0}],
)
def test_impossible_spectrograms_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings)).split("_")[0]):
        LogMelConfig(**settings)
