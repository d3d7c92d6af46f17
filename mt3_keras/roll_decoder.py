"""What a detector predicts of successive segments -> notes. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from mt3_keras.instruments import PiecePrograms
from mt3_keras.models.config import LOWEST_PITCH
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.notes import MIN_DURATION, Note, OpenNote, sort_notes
from mt3_keras.outputs import Floats, RollOutput
from mt3_keras.rows import Rows


class _Begun(NamedTuple):
    """A note that sounds, and its row in `PiecePrograms`."""

    note: OpenNote
    row: int
    rank: int  # 1 for the second note of a unison


_Ended = tuple[_Begun, int, float]  # with pitch and end


class _Kept:
    """All notes of a recording in 27 bytes each: a recording may last for days."""

    def __init__(self) -> None:
        # Onset, end, confidence, row, pitch, velocity, rank.
        self._rows = Rows("f8, f8, f4, i4, u1, u1, u1")

    def add(self, begun: _Begun, pitch: int, end: float) -> None:
        """Takes a note, or with the row -1 a stroke."""
        onset, velocity, confidence = begun.note
        row = (onset, end, confidence or 0.0, begun.row, pitch, velocity, begun.rank)
        self._rows.append([row])

    def __iter__(self) -> Iterator[_Ended]:
        for onset, end, confidence, row, pitch, velocity, rank in self._rows.read().tolist():
            yield _Begun(OpenNote(onset, velocity, confidence), row, rank), pitch, end


class RollDecoder:
    """Reads the outputs of successive segments and keeps what still sounds between them.

    Notes that are told as they end are named as far as the piece is known then; `finish` names
    them all anew.

    Args:
      frames_per_second: of the outputs.
      decoding: how they are read.
      least_confidence: that an onset or stroke needs to become a note, 0 to 1; None takes those
        of `decoding`.
      programs: that may play; None allows all.
      drums: whether drums may.
      num_instruments: that play at most, drums not counted; None: as many as are found.
      keeps_notes: whether `finish` names all notes; otherwise only the newest are remembered, by
        which the next are named, as a stream without an end needs it.
      tells_notes: as they end; otherwise `finish` alone does, which saves naming them twice.

    Attributes:
      notes: that ended in the segment fed last, in the order in which they ended; after `finish`
        all, strokes first.
      confidences: of these notes' onsets.
      invalid_events, dropped_events: 0, as there are no events (see `NoteDecoder`).
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
        num_instruments: int | None = None,
        keeps_notes: bool = True,
        tells_notes: bool = True,
    ) -> None:
        self._frames_per_second, self._decoding = frames_per_second, decoding
        limits = (decoding.onset_limit, decoding.stroke_limit)
        self._onset_limit, self._stroke_limit = (
            limit if least_confidence is None else least_confidence for limit in limits
        )
        self._first_like = {
            key: like[0] for like in reversed(decoding.similar_drums) for key in like
        }
        self._has_pitches, self._drums = programs is None or bool(programs), drums
        self._names = PiecePrograms(
            allowed=programs or None, num_instruments=num_instruments, shrink=decoding.shrink
        )
        self._keeps_notes, self._tells_notes = keeps_notes, tells_notes
        self.notes: list[Note] = []
        self.confidences: dict[Note, float] = {}
        self._kept = _Kept()
        self._struck: dict[tuple[int, bool], float] = {}  # last onset of a pitch or drum
        self._open: dict[int, list[_Begun]] = {}  # by pitch
        self._time = 0.0

    @property
    def open_notes(self) -> dict[tuple[int, int], OpenNote]:
        """Notes that still sound, by (program, pitch)."""
        begun = [(pitch, one) for pitch, ones in self._open.items() for one in ones]
        programs = self._names.recent_programs([(one.row, one.rank) for _, one in begun])
        return {
            (program, pitch): one.note
            for program, (pitch, one) in zip(programs, begun, strict=True)
        }

    def feed(self, start: float, output: RollOutput, end: float | None = None) -> list[Note]:
        """Reads one segment.

        Args:
          start: of the segment, in seconds; segments are fed in order.
          output: of the network, which may reach past `end`.
          end: of the segment, None for that of `output`.

        Returns:
          The notes that ended in this segment, if they are told.
        """
        self.notes, self.confidences = [], {}
        rate = self._frames_per_second
        num_frames = len(output.ended) if end is None else round((end - start) * rate)
        onsets = self._begin(output, num_frames)
        closed: list[_Ended] = []
        for time, pitch, begun in sorted(onsets, key=lambda found: found[0]):
            if self._strikes_again(start + time, pitch, False):
                closed += self._close_ended(pitch, start, output.ended[:num_frames], start + time)
                self._open[pitch] = [
                    one._replace(note=one.note._replace(onset=start + time)) for one in begun
                ]
        for pitch in list(self._open):
            closed += self._close_ended(pitch, start, output.ended[:num_frames], math.inf)
        self._add(closed)
        self._strike(start, output.strokes, num_frames)
        self._time = max(self._time, start + num_frames / rate)
        return list(self.notes)

    def finish(self) -> list[Note]:
        """Ends all sounding notes where the audio ends and returns all notes, ordered.

        They are then named together, `notes` too.
        """
        for begun in (one for ones in self._open.values() for one in ones):
            self._time = max(self._time, begun.note.onset + MIN_DURATION)
        closed = [(one, pitch, self._time) for pitch, ones in self._open.items() for one in ones]
        self._open = {}
        self._add(closed)
        if self._keeps_notes:
            self._name_anew()
        return sort_notes(self.notes)

    def _begin(self, output: RollOutput, num_frames: int) -> list[tuple[float, int, list[_Begun]]]:
        """Seconds from the segment's start, pitch and notes of each onset."""
        frame, chance = output.onsets[:, 0], output.onsets[:, 2]
        is_found = (chance >= self._onset_limit) & (chance > 0) & (frame < num_frames)
        if not self._has_pitches or not is_found.any():
            return []
        onsets = output.onsets[is_found]
        first = self._names.add(output.programs[is_found], onsets[:, 1])
        found = []
        for i, (at, pitch, confidence, velocity, unison) in enumerate(onsets.tolist()):
            note = OpenNote(0.0, round(velocity), confidence)
            together = self._names.most if unison >= self._decoding.unison_limit else 1
            begun = [_Begun(note, first + i, rank) for rank in range(together)]
            found.append(((at + 0.5) / self._frames_per_second, round(pitch), begun))
        return found

    def _strike(self, start: float, strokes: Floats, num_frames: int) -> None:
        if not self._drums:
            return
        found: list[tuple[float, int, float, float]] = []  # the surest first
        for frame, key, confidence, velocity in sorted(strokes.tolist(), key=lambda s: -s[2]):
            time = start + (frame + 0.5) / self._frames_per_second
            if confidence < self._stroke_limit or not confidence or frame >= num_frames:
                continue
            near = self._decoding.same_strike
            drum = self._drum_of(round(key))
            if all(drum != self._drum_of(k) or abs(time - t) > near for t, k, *_ in found):
                found.append((time, round(key), confidence, velocity))
        for time, key, confidence, velocity in sorted(found):
            if self._strikes_again(time, self._drum_of(key), True):
                hit = _Begun(OpenNote(time, round(velocity), confidence), -1, 0)
                if self._tells_notes:
                    self._write_hit(hit, key)
                if self._keeps_notes:
                    self._kept.add(hit, key, time)

    def _write_hit(self, hit: _Begun, key: int) -> None:
        time, velocity, confidence = hit.note
        note = Note(time, time + MIN_DURATION, key, velocity, 0, True)
        self.notes.append(note)
        self.confidences[note] = confidence or 0.0

    def _drum_of(self, key: int) -> int:
        """The first key of those like a drum's, of which one at a time is struck."""
        return self._first_like.get(key, key)

    def _strikes_again(self, time: float, pitch: int, is_drum: bool) -> bool:
        """Whether an onset is another one than the last of its pitch; remembers it."""
        last = self._struck.get((pitch, is_drum), -math.inf)
        if time - last <= self._decoding.same_strike:
            return False
        self._struck[pitch, is_drum] = time
        return True

    def _close_ended(self, pitch: int, start: float, ended: Floats, latest: float) -> list[_Ended]:
        """Takes the open notes of a pitch away if they end in this segment, and at `latest`."""
        begun = self._open.get(pitch)
        if not begun:
            return []
        rate, decoding = self._frames_per_second, self._decoding
        first = max(0, round((begun[0].note.onset - start) * rate - 0.5) + decoding.shortest)
        ends = np.flatnonzero(ended[first:, pitch - LOWEST_PITCH] >= decoding.end_limit)
        found = start + (first + int(ends[0]) + 0.5) / rate if ends.size else math.inf
        time = min(latest, found)
        if time == math.inf:
            return []
        del self._open[pitch]
        return [(one, pitch, time) for one in begun]

    def _add(self, closed: list[_Ended]) -> None:
        """Notes that have ended, named as far as the piece is known."""
        if self._tells_notes:
            rows = [(one.row, one.rank) for one, _, _ in closed]
            self._write(closed, self._names.recent_programs(rows))
        if self._keeps_notes:
            for one in closed:
                self._kept.add(*one)
        else:
            sounding = [one.row for ones in self._open.values() for one in ones]
            self._names.forget_old(min(sounding, default=None))

    def _name_anew(self) -> None:
        """Gives all notes the names that the whole piece gives them."""
        self.notes, self.confidences = [], {}
        for hit, key, _ in self._kept:
            if hit.row < 0:
                self._write_hit(hit, key)
        ended = [one for one in self._kept if one[0].row >= 0]
        if ended:
            rows = [(one.row, one.rank) for one, _, _ in ended]
            self._write(ended, self._names.programs(rows))

    def _write(self, ended: list[_Ended], programs: list[int]) -> None:
        for (begun, pitch, end), program in zip(ended, programs, strict=True):
            note = begun.note.end(end, program, pitch)
            self.notes.append(note)
            if begun.note.confidence is not None:
                self.confidences[note] = begun.note.confidence
