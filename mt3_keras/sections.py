"""Long recordings in sections, which workers transcribe side by side, and their notes joined.

A section begins `WARM_UP` before the notes that it is to give and ends `RUN_OUT` after them: what
a network and its decoder remember (the level of the music, a recurrent state) is then about what it
would be had they begun at the start, and notes that sound past the border end where they end.
How near the notes are to those of the whole recording is measured, not implied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import SAMPLE_RATE_HZ, STEPS_PER_SECOND, ModelConfig
from mt3_keras.notes import Note, sort_notes
from mt3_keras.recording import Transcription

WARM_UP = 60.0  # seconds
RUN_OUT = 20.0


class Section(NamedTuple):
    """A section of a recording.

    Attributes:
      start: seconds in the recording at which `samples` begin.
      first: seconds; onsets before it belong to the section before.
      end: seconds; onsets from it on belong to the section after. Infinite in the last one.
      samples: float32 [n], 16 kHz mono.
    """

    start: float
    first: float
    end: float
    samples: NDArray[np.float32]


def cut_sections(
    blocks: Iterable[NDArray[np.float32]], config: ModelConfig, seconds: float
) -> Iterator[Section]:
    """Cuts a recording; holds one section and one block at a time.

    All begin where a segment of the whole recording begins, and on the grid of a token network's
    times, so that both cut the same segments and round times alike.

    Args:
      blocks: float32 [n] of 16 kHz mono, any lengths.
      config: of the network.
      seconds: length of a section without warm-up and run-out, about.
    """
    num_samples = config.network.segment_frames * config.spectrogram.hop_samples
    segment = Fraction(num_samples, SAMPLE_RATE_HZ)
    grid = segment * (segment * STEPS_PER_SECOND).denominator

    def on_grid(length: float) -> int:
        return int(math.ceil(length / grid) * grid * SAMPLE_RATE_HZ)

    size, warm_up, run_out = map(on_grid, (seconds, WARM_UP, RUN_OUT))
    start = first = 0
    held = np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while start + held.size >= first + size + run_out:
            end = first + size
            samples = held[: end + run_out - start]
            yield _make_section(start, first, end, samples)
            first, begin = end, max(0, end - warm_up)
            held, start = held[begin - start :], begin
    yield _make_section(start, first, math.inf, held)


def _make_section(start: int, first: int, end: float, samples: NDArray[np.float32]) -> Section:
    rate = SAMPLE_RATE_HZ
    return Section(start / rate, first / rate, end / rate, samples)


def join_sections(parts: Sequence[tuple[Section, Transcription]]) -> Transcription:
    """The notes of a recording, of its sections' notes in order; sections may lack their samples.

    Each gives the notes whose onsets are its own. Token networks' segments are not joined.
    """
    notes: list[Note] = []
    confidences: dict[Note, float] = {}
    for section, found in parts:
        for note in found.notes:
            onset, offset = (round(section.start + time, 7) for time in note[:2])
            if section.first <= onset < section.end:
                moved = note._replace(onset=onset, offset=offset)
                notes.append(moved)
                if note in found.confidences:
                    confidences[moved] = found.confidences[note]
    section, found = parts[-1]
    return Transcription(
        notes=sort_notes(notes),
        segments=[],
        invalid_events=sum(found.invalid_events for _, found in parts),
        dropped_events=sum(found.dropped_events for _, found in parts),
        duration=round(section.start + found.duration, 7),
        confidences=confidences,
    )
