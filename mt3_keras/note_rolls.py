"""What the encoder's heads say of single notes: how strong, how sure, and notes not told by tokens.

NumPy alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mt3_keras.config import HEADS, LOWEST_PITCH, NUM_PITCHES, STEPS_PER_SECOND

NOTE_HEADS = ("onset", "drum", "strength", "frame", "program")  # side by side in `NoteRolls.values`
_ENDS = list(itertools.accumulate(HEADS[head] for head in NOTE_HEADS))
_COLUMNS = dict(zip(NOTE_HEADS, map(slice, [0, *_ENDS], _ENDS), strict=True))
NUM_COLUMNS = _ENDS[-1]
REACH = 3  # frames from a token's time to the onset it means: times are rounded, chords joined
PEAK_REACH = 2  # frames in which an onset is the likeliest of its pitch
PROGRAM_FRAMES = 8  # from an onset on, by which its program is known
SOUNDING = 0.5  # a note lasts while its frame's probability is at least this


class Strike(NamedTuple):
    """The beginning of a note: MIDI velocity, and the onset's score from 0 to 1."""

    velocity: int
    confidence: float


class HeardNote(NamedTuple):
    """A note as the heads hear it: times in steps of 10 ms; `end` is None if it sounds on."""

    step: int
    end: int | None
    pitch: int
    program: int
    is_drum: bool
    strike: Strike


class NoteRolls:
    """The rolls of a segment, read at the notes that its tokens tell.

    Args:
      values: float32 [F, NUM_COLUMNS], probabilities of `NOTE_HEADS` (see `heads`).
      frames_per_second: of the rolls.
    """

    def __init__(self, values: NDArray[np.float32], frames_per_second: float) -> None:
        self.values = values
        self._frames_per_second = frames_per_second

    def roll(self, head: str) -> NDArray[np.float32]:
        """The probabilities of one head, float32 [F, N]."""
        return self.values[:, _COLUMNS[head]]

    def strike(self, step: int, pitch: int, *, is_drum: bool) -> Strike | None:
        """The likeliest onset near a step of the segment; None for pitches without a column.

        The confidence is what the head gives, which training taught to rather tell one onset too
        many than to miss one.
        """
        if not is_drum and not 0 <= pitch - LOWEST_PITCH < NUM_PITCHES:
            return None
        column = pitch if is_drum else pitch - LOWEST_PITCH
        frame = self._to_frame(step)
        first = max(0, min(frame, len(self.values)) - REACH)
        onsets = self.roll("drum" if is_drum else "onset")[:, column]
        best = first + int(np.argmax(onsets[first : frame + REACH + 1]))
        return self._strike_at(best, column, is_drum=is_drum)

    def notes(self, least: float, programs: Iterable[int], *, drums: bool) -> list[HeardNote]:
        """Notes whose onset's score is at least `least` and a peak.

        Args:
          programs, drums: what may appear.
        """
        allowed = np.array(sorted(programs), int)
        heard = []
        for is_drum in (False, True) if drums else (False,):
            onsets = self.roll("drum" if is_drum else "onset")
            padded = np.pad(onsets, ((PEAK_REACH, PEAK_REACH), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * PEAK_REACH + 1, axis=0)
            for frame, column in np.argwhere((onsets >= least) & (onsets >= windows.max(axis=-1))):
                strike = self._strike_at(frame, column, is_drum=is_drum)
                if is_drum:
                    step = self._to_step(frame)
                    heard.append(HeardNote(step, step + 1, int(column), 0, True, strike))
                elif allowed.size:
                    heard.append(self._heard_pitch(frame, column, allowed, strike))
        return sorted(heard, key=lambda note: (note.step, note.is_drum, note.pitch))

    def _heard_pitch(
        self, frame: int, column: int, allowed: NDArray[np.int_], strike: Strike
    ) -> HeardNote:
        programs = self.roll("program")[frame : frame + PROGRAM_FRAMES, allowed].mean(axis=0)
        program = int(allowed[np.argmax(programs)])
        pitch = int(column) + LOWEST_PITCH
        return HeardNote(
            self._to_step(frame), self._end(frame, column), pitch, program, False, strike
        )

    def end(self, step: int, pitch: int) -> int | None:
        """The step at which a pitch that sounds at `step` falls silent; None if it sounds on."""
        if not 0 <= pitch - LOWEST_PITCH < NUM_PITCHES:
            return None
        return self._end(self._to_frame(step), pitch - LOWEST_PITCH)

    def _end(self, frame: int, column: int) -> int | None:
        silent = np.flatnonzero(self.roll("frame")[frame + 1 :, column] < SOUNDING)
        return self._to_step(frame + 1 + int(silent[0])) if silent.size else None

    def _to_frame(self, step: int) -> int:
        return int(max(0.0, step - 0.5) / STEPS_PER_SECOND * self._frames_per_second)

    def _to_step(self, frame: int) -> int:
        return round((int(frame) + 0.5) / self._frames_per_second * STEPS_PER_SECOND)

    def _strike_at(self, frame: int, column: int, *, is_drum: bool) -> Strike:
        confidence = self.roll("drum" if is_drum else "onset")[frame, column]
        strength = self.roll("strength")[frame, NUM_PITCHES if is_drum else column]
        velocity = int(np.clip(round(float(127 * strength)), 1, 127))
        return Strike(velocity, float(confidence))


class SegmentTokens(list[int]):
    """Tokens of a segment up to and with EOS, and its rolls where the network has heads."""

    rolls: NoteRolls | None = None
