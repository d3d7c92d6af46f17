"""Samples -> segments: the same however they come."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from mt3_keras.audio import read_blocks
from mt3_keras.models.config import (
    MT3,
    BodyConfig,
    DetectorConfig,
    HarmonicConfig,
    LogMelConfig,
    ModelConfig,
    MT3Config,
    T5Config,
)
from mt3_keras.segments import AudioError, check_samples, cut_segments

# ---------------------------------------------------------------- arrays


def test_float_arrays_become_float32() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        checked = check_samples(np.array([0, 0.5], dtype))
        assert checked.dtype == np.float32
        np.testing.assert_array_equal(checked, [0, 0.5])
    assert check_samples(np.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        (np.zeros((2, 100)), r"one-dimensional.*\(2, 100\)"),
        (np.float32(1), "one-dimensional"),
        (np.zeros(3, np.int16), "floating point.*int16"),
        (np.zeros(3, bool), "floating point.*bool"),
        (np.zeros(3, complex), "floating point.*complex"),
        (np.array(["a"]), "floating point"),
        (np.array([0, 0, np.nan]), "finite.*nan"),
        (np.array([0, np.inf]), "finite.*inf"),
        (np.array([0, 1e300]), "finite"),
    ],
)
def test_unusable_arrays_are_refused_by_name(samples: np.ndarray, complaint: str) -> None:
    with pytest.raises(AudioError, match="^song .*" + complaint):
        check_samples(samples, "song")


# ---------------------------------------------------------------- segments


def small_config(hop: int, window: int, frames: int, front_end: str) -> ModelConfig:
    """With windows that begin with their hop ("mel") or are centred on it ("harmonic")."""
    if front_end == "mel":
        return MT3Config(LogMelConfig(hop, window), network=T5Config(segment_frames=frames))
    return DetectorConfig(
        HarmonicConfig(hop, max(window, hop), short_window_samples=hop),
        BodyConfig(segment_frames=frames, frames_per_step=1, frames_before=3, frames_after=2),
    )


def segments_of_whole(
    samples: np.ndarray, config: ModelConfig, context: str
) -> list[tuple[float, list[float], int]]:
    """The original's steps on the whole recording: pad, frame, split."""
    hop = config.spectrogram.hop_samples
    frames = np.pad(samples, (0, hop - samples.size % hop)).reshape(-1, hop)
    lead = config.lead_samples
    padded = np.pad(frames.ravel(), (lead, 10_000))
    segments = []
    for first in range(0, len(frames), config.network.segment_frames):
        part = padded[first * hop :][: config.input_samples]
        if context == "segment":
            place = np.arange(part.size) - lead
            part = np.where((place >= 0) & (place < config.segment_samples), part, 0)
        num_frames = len(frames[first : first + config.network.segment_frames])
        start = first / config.spectrogram.frames_per_second
        segments.append((start, part.tolist(), num_frames))
    return segments


@given(
    num_samples=st.integers(0, 200),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 70), st.integers(1, 6)),
    context=st.sampled_from(["segment", "full"]),
    front_end=st.sampled_from(["mel", "harmonic"]),
)
def test_segments_in_any_blocks_are_those_of_the_whole(
    num_samples: int, cuts: list[int], sizes: tuple[int, int, int], context: str, front_end: str
) -> None:
    samples = np.arange(1, num_samples + 1, dtype=np.float32)
    config = small_config(*sizes, front_end)
    blocks = np.split(samples, sorted(min(cut, num_samples) for cut in cuts))
    segments = list(cut_segments(blocks, config, context))
    assert [(s.start, s.samples.tolist(), s.num_frames) for s in segments] == segments_of_whole(
        samples, config, context
    )


@pytest.mark.parametrize(
    ("num_samples", "num_frames"),
    [(0, [1]), (127, [1]), (128, [2]), (32767, [256]), (32768, [256, 1]), (65535, [256, 256])],
)
def test_one_more_hop_is_always_appended(num_samples: int, num_frames: list[int]) -> None:
    for context in ("segment", "full"):
        segments = list(cut_segments([np.ones(num_samples, np.float32)], MT3, context))
        assert [segment.num_frames for segment in segments] == num_frames
        assert all(segment.samples.shape == (32768 + 1920,) for segment in segments)
        assert all(segment.samples.dtype == np.float32 for segment in segments)


def test_starts_are_those_of_the_first_frames() -> None:
    segments = list(cut_segments([np.zeros(32768 * 20)], MT3, "segment"))
    assert [segment.start for segment in segments] == [256 * i / 125 for i in range(21)]


def test_segments_stay_as_they_were_given() -> None:
    segments = cut_segments([np.ones(70_000, np.float32)], MT3, "full")
    first = next(segments)
    before = first.samples.copy()
    list(segments)
    np.testing.assert_array_equal(first.samples, before)


def test_segments_come_as_soon_as_they_are_complete() -> None:
    def blocks() -> Iterator[np.ndarray]:
        yield np.zeros(32768, np.float32)
        pytest.fail("more was read than the first segment needs")

    assert next(cut_segments(blocks(), MT3, "segment")).num_frames == 256


def test_unknown_context_is_refused() -> None:
    with pytest.raises(ValueError, match="context must be 'segment' or 'full': got 'none'"):
        list(cut_segments([], MT3, "none"))


def test_clips_of_the_original_have_its_segments(shared: pathlib.Path) -> None:
    path = shared / "golden" / "band.flac"
    expected, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_array_equal(
        np.concatenate(list(read_blocks(path, block_seconds=1.0))), expected
    )
    segments = list(cut_segments(read_blocks(path), MT3, "segment"))
    assert [segment.num_frames for segment in segments] == [256] * 10 + [1]


def test_samples_at_the_scale_of_integers_are_warned_of(caplog):
    check_samples(np.array([0.0, 15.0], np.float32))
    assert not caplog.messages
    check_samples(np.array([0.0, -20_000.0]))
    assert "reach 20000 where 1 is full scale" in caplog.text
