"""16 kHz mono samples -> the segments that a network is given."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mt3_keras.models.config import SAMPLE_RATE_HZ, ModelConfig

MAX_ABS_SAMPLE = 2.0**32  # full scale is 1; beyond this float32 spectra overflow
INTEGER_PEAK = 16.0  # 24 dB beyond full scale: no recording in floating point goes there

_Samples = NDArray[np.float32]
_logger = logging.getLogger(__name__)


class AudioError(ValueError):
    """Audio that cannot be used; one line that names it and the cure."""


class AudioSegment(NamedTuple):
    """What the network is given at once.

    Attributes:
      start: seconds from the start of the audio.
      samples: float32 [*samples_shape]: the segment, with `lead_samples` before and
        `overhang_samples` after it for the windows of its first and last frames.
      num_frames: frames of this segment; below `segment_frames` only in the last one.
    """

    start: float
    samples: _Samples
    num_frames: int


def check_samples(samples: ArrayLike, name: str = "samples") -> _Samples:
    """A caller's 16 kHz mono samples as float32 [n]; n may be 0.

    Integers are refused, not scaled: whether int32 holds 16, 24 or 32 bits is not known.

    Raises:
      AudioError: not one-dimensional, not floating point, or not finite.
    """
    array = np.asarray(samples)
    if array.ndim != 1:
        raise AudioError(
            f"{name} must be one-dimensional, 16 kHz mono: got shape {array.shape};"
            " average the channels"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise AudioError(
            f"{name} must be floating point in [-1, 1]: got {array.dtype};"
            " divide integers by their full scale, e.g. int16 by 32768"
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    check_finite(array, name, 0.0, SAMPLE_RATE_HZ)
    if (peak := float(np.abs(array).max(initial=0))) > INTEGER_PEAK:
        text = "%s reach %.0f where 1 is full scale: divide integers by theirs, as int16 by 32768"
        _logger.warning(text, name, peak)
    return array


def check_finite(samples: _Samples, name: str, start: float, rate_hz: float) -> None:
    """Refuses NaN and values beyond any scale; `start` is the time of the first sample."""
    if not np.abs(samples).max(initial=0) <= MAX_ABS_SAMPLE:  # NaN fails every comparison
        with np.errstate(invalid="ignore"):
            first = int(np.argmin(np.abs(samples) <= MAX_ABS_SAMPLE))
        raise AudioError(
            f"{name} must be finite and nominally in [-1, 1]:"
            f" got {samples[first]} at {start + first / rate_hz:.3f} s; repair or export it again"
        )


def check_context(context: str) -> None:
    """Refuses what `SegmentCutter` does not know, with a ValueError."""
    if context not in ("segment", "full"):
        raise ValueError(f"context must be 'segment' or 'full': got {context!r}")


def cut_segments(
    blocks: Iterable[NDArray[np.floating]],
    config: ModelConfig,
    context: str,
) -> Iterator[AudioSegment]:
    """Cuts 16 kHz mono into the segments of MT3; holds one segment and one block at a time.

    As in the original there are floor(n / hop) + 1 frames in all, hop being the distance between
    frames: the last one is filled up with zeros, and where nothing is left to fill, one of zeros
    follows.

    Args:
      blocks: float [n], any lengths, on which the result does not depend; [T, n] for a network
        that is given T tracks.
      config: see `SegmentCutter`, as of the others.
      context: what surrounds a segment.

    Yields:
      The segments in order, at least one.

    Raises:
      ValueError: on iteration: unknown context.
    """
    cutter = SegmentCutter(config, context)
    for block in blocks:
        yield from cutter.push(block)
    yield from cutter.flush()


class SegmentCutter:
    """Cuts samples as they come.

    Args:
      config: sizes of hop, segment, lead and overhang.
      context: what surrounds a segment: "segment" is zeros (the original computes each segment's
        spectrogram alone), "full" is the audio around it, zeros beyond its start and end.

    Raises:
      ValueError: unknown context.
    """

    def __init__(self, config: ModelConfig, context: str) -> None:
        check_context(context)
        self._config, self._context = config, context
        self._lead = config.lead_samples
        # A segment is given once its window holds so many samples.
        self._reach = config.input_samples
        if context == "segment":
            self._reach = self._lead + config.segment_samples
        self.reset()

    def reset(self) -> None:
        """Forgets all samples: the next one is the first."""
        self._window = np.zeros(self._config.samples_shape, np.float32)
        self._num_filled, self._index = self._lead, 0  # zeros lie before the start

    def push(self, block: NDArray[np.floating]) -> Iterator[AudioSegment]:
        """Takes float samples [n], or [T, n], and yields the segments that they complete."""
        while block.size:
            taken = block[..., : self._reach - self._num_filled]
            num_filled = self._num_filled + taken.shape[-1]
            self._window[..., self._num_filled : num_filled] = taken
            block = block[..., taken.shape[-1] :]
            self._num_filled = num_filled
            if self._num_filled == self._reach:
                yield self._segment()
                self._advance()

    def flush(self) -> Iterator[AudioSegment]:
        """Yields what is left, filled up with zeros, and forgets all."""
        ended = False
        while not ended:
            ended = self._num_filled - self._lead < self._config.segment_samples
            yield self._segment()
            self._advance()
        self.reset()

    def _segment(self) -> AudioSegment:
        config, window = self._config, self._window.copy()
        if self._context == "segment":
            window[..., : self._lead] = 0
        num_left = self._num_filled - self._lead
        num_frames = num_left // config.spectrogram.hop_samples + 1
        start = self._index * config.network.segment_frames / config.spectrogram.frames_per_second
        return AudioSegment(start, window, min(config.network.segment_frames, num_frames))

    def _advance(self) -> None:
        step = self._config.segment_samples
        self._window = np.roll(self._window, -step, axis=-1)
        self._window[..., -step:] = 0
        self._num_filled -= step
        self._index += 1
