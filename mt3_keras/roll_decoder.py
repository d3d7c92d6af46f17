"""Rolls of successive segments -> notes. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import STEPS_PER_SECOND
from mt3_keras.note_encoder import time_to_step
from mt3_keras.note_rolls import Crossfade, NoteRolls, RollDecoding
from mt3_keras.notes import MIN_DURATION, Note, OpenNote, map_program, sort_notes


class RollDecoder:
    """Reads the rolls of successive segments and keeps what still sounds between them.

    Args:
      frames_per_second: of the rolls.
      decoding: how they are read.
      least_confidence: that an onset needs to become a note, 0 to 1; None lets it follow the music
        (`AdaptiveLimit`).
      programs: that may play; each is taken for the first of its General MIDI class, which is all
        that the rolls tell apart. None allows all.
      drums: whether drums may.

    Attributes:
      notes: all notes ended so far, in the order in which they ended.
      confidences: of these notes' onsets.
      invalid_events, dropped_events: 0, as rolls hold no events (see `NoteDecoder`).
    """

    invalid_events = dropped_events = 0

    def __init__(
        self,
        frames_per_second: float,
        decoding: RollDecoding,
        *,
        least_confidence: float | None = None,
        programs: Collection[int] | None = None,
        drums: bool = True,
    ) -> None:
        self._frames_per_second, self._decoding = frames_per_second, decoding
        allowed = range(128) if programs is None else programs
        self._programs = sorted({map_program(program, "midi_class") for program in allowed})
        self._drums = drums
        self._fixed = least_confidence
        self._limit = AdaptiveLimit(decoding)
        self._crossfade = Crossfade()
        self.notes: list[Note] = []
        self.confidences: dict[Note, float] = {}
        self._struck: dict[tuple[int, bool], float] = {}  # last onset of a pitch or drum
        self._open: dict[tuple[int, int], OpenNote] = {}  # (program, pitch)
        self._time = 0.0

    @property
    def open_notes(self) -> dict[tuple[int, int], OpenNote]:
        """Notes that still sound, by (program, pitch)."""
        return dict(self._open)

    def feed(
        self, start: float, rolls: NDArray[np.float32], end: float | None = None
    ) -> list[Note]:
        """Reads one segment.

        Args:
          start: of the segment, in seconds; segments are fed in order.
          rolls: float32 [F, NUM_COLUMNS], which may reach past `end`.
          end: start of the next segment, None for the last.

        Returns:
          The notes that ended in this segment.
        """
        num_before = len(self.notes)
        num_frames = None if end is None else round((end - start) * self._frames_per_second)
        values, own = self._crossfade.join(rolls, num_frames)
        segment = NoteRolls(values, self._frames_per_second, self._decoding, own)
        first_step = time_to_step(start, STEPS_PER_SECOND)

        def time_at(step: int) -> float:
            return (first_step + step) / STEPS_PER_SECOND

        self._play(segment, time_at)
        for key in list(self._open):
            self._end_silent(key, segment, time_at)
        self._time = max(self._time, time_at(segment.num_steps))
        return self.notes[num_before:]

    def finish(self) -> list[Note]:
        """Ends all sounding notes where the audio ends and returns all notes, ordered."""
        for note in self._open.values():
            self._time = max(self._time, note.onset + MIN_DURATION)
        for key in list(self._open):
            self._close(key, self._time)
        return sort_notes(self.notes)

    def _play(self, segment: NoteRolls, time_at: Callable[[int], float]) -> None:
        """Begins the notes of a segment."""
        limits = self._limit.update(segment)
        if self._fixed is not None:
            limits = Limits(self._fixed, self._fixed)
        onsets = segment.onsets(limits.pitched, limits.drum, self._programs, drums=self._drums)
        for onset in sorted(onsets, key=lambda onset: onset.step):
            time, same = time_at(onset.step), (onset.pitch, onset.is_drum)
            if time - self._struck.get(same, -math.inf) <= self._decoding.same_strike:
                continue
            self._struck[same] = time
            if onset.is_drum:
                hit = Note(time, time + MIN_DURATION, onset.pitch, onset.velocity, 0, True)
                self._add(hit, onset.confidence)
                continue
            for key in [key for key in self._open if key[1] == onset.pitch]:  # of any program
                self._end_silent(key, segment, time_at, time)
            begun = OpenNote(time, onset.velocity, onset.confidence)
            self._open[onset.program, onset.pitch] = begun

    def _end_silent(
        self,
        key: tuple[int, int],
        segment: NoteRolls,
        time_at: Callable[[int], float],
        latest: float = math.inf,
    ) -> None:
        """Ends a note where the rolls say it falls silent, and at `latest`."""
        begun = round((self._open[key].onset - time_at(0)) * STEPS_PER_SECOND)
        end = segment.end(begun, key[1])
        time = min(latest, math.inf if end is None else time_at(end))
        if time < math.inf:
            self._close(key, time)

    def _close(self, key: tuple[int, int], time: float) -> None:
        note = self._open.pop(key)
        self._add(note.end(time, *key), note.confidence)

    def _add(self, note: Note, confidence: float | None) -> None:
        self.notes.append(note)
        if confidence is not None:
            self.confidences[note] = confidence


class Limits(NamedTuple):
    """Confidence that an onset needs to become a note."""

    pitched: float
    drum: float


class AdaptiveLimit:
    """The confidence that an onset needs, as the music goes.

    On a solo guitar the network is confident of true and false onsets alike; in an orchestra it is
    confident of neither. So the limit is a share of a high quantile of the confidences of the last
    half minute, and the lower the more pitches sound at once.
    """

    def __init__(self, decoding: RollDecoding) -> None:
        self._decoding = decoding
        nothing = np.zeros((0, 2), np.float32)
        self._onsets = [nothing, nothing]  # of pitches, of drums: confidence, weight
        self._sounding = np.zeros(2)  # pitches summed over the frames in which any sounds; frames

    def update(self, segment: NoteRolls) -> Limits:
        """Takes a segment into account and returns the limits for its own onsets."""
        decoding, num_sounding = self._decoding, segment.num_sounding
        kept = decoding.kept_per_second**segment.seconds
        self._sounding = kept * self._sounding + (num_sounding.sum(), (num_sounding > 0).sum())
        pitches = self._sounding[0] / max(self._sounding[1], 1.0)
        lower = decoding.polyphony_step * (pitches - decoding.polyphony_free)
        return Limits(self._limit(segment, False, lower), self._limit(segment, True, 0.0))

    def _limit(self, segment: NoteRolls, is_drum: bool, lower: float) -> float:
        decoding = self._decoding
        new = segment.peak_confidences(is_drum)
        kept = np.array((1, decoding.kept_per_second**segment.seconds), np.float32)
        old = self._onsets[is_drum] * kept
        onsets = np.concatenate([old[old[:, 1] > 0.02], np.stack([new, np.ones_like(new)], axis=1)])
        self._onsets[is_drum] = onsets = onsets[np.argsort(onsets[:, 0])]
        if not len(onsets):
            return decoding.start_limit
        weights = np.cumsum(onsets[:, 1])
        sure = onsets[np.searchsorted(weights, decoding.limit_quantile * weights[-1]), 0]
        limit = decoding.limit_share * sure - lower
        weight = weights[-1] / (weights[-1] + decoding.start_weight)
        limit = weight * limit + (1 - weight) * decoding.start_limit
        return float(np.clip(limit, decoding.lowest_limit, decoding.highest_limit))
