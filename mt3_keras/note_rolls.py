"""What the encoder's heads say of single notes: how sure, how strong, how long, what plays them.

NumPy alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mt3_keras.config import HEADS, LOWEST_PITCH, NUM_CLASSES, NUM_PITCHES, STEPS_PER_SECOND

# Side by side in `NoteRolls.values`.
NOTE_HEADS = ("onset", "drum", "strength", "frame", "offset", "class")
_ENDS = list(itertools.accumulate(HEADS[head] for head in NOTE_HEADS))
_COLUMNS = dict(zip(NOTE_HEADS, map(slice, [0, *_ENDS], _ENDS), strict=True))
NUM_COLUMNS = _ENDS[-1]
NUM_SCORES = _COLUMNS["class"].start  # columns of all heads but "class"
NUM_PACKED = NUM_SCORES + NUM_PITCHES
REACH = 3  # frames from a token's time to the onset it means: times are rounded, chords joined
PEAK_REACH = 2  # frames in which an onset or offset is the likeliest of its pitch
CLASS_FRAMES = 8  # from an onset on, by which its instrument is known
SOUNDING = 0.5  # a frame of which the head is less sure is silent
PAUSE_FRAMES = 4  # of silence that end a note
FADING = 0.75  # a note ends at an offset in a frame of which the head is less sure
LEAST_OFFSET = 0.2


class HeardNote(NamedTuple):
    """A note that begins in a segment, as the heads hear it.

    Attributes:
      step: 10 ms each, from the segment's start.
      velocity: as in MIDI.
      confidence: what the head gives the onset, from 0 to 1: training taught it to rather tell one
        onset too many than to miss one.
    """

    step: int
    pitch: int
    program: int
    is_drum: bool
    velocity: int
    confidence: float


class NoteRolls:
    """The rolls of a segment.

    Args:
      values: float32 [F, NUM_COLUMNS], probabilities of `NOTE_HEADS` (see `heads`).
      frames_per_second: of the rolls.
    """

    def __init__(self, values: NDArray[np.float32], frames_per_second: float) -> None:
        self.values = values
        self._frames_per_second = frames_per_second

    @classmethod
    def unpack(cls, packed: NDArray[np.uint8], frames_per_second: float) -> NoteRolls:
        """Rolls of a served model, [F, NUM_PACKED] (see `export.served_model`)."""
        scores, classes = packed[:, :NUM_SCORES], packed[:, NUM_SCORES:]
        chances = classes[:, :, None] == np.arange(NUM_CLASSES)
        values = np.empty((len(packed), NUM_COLUMNS), np.float32)
        values[:, :NUM_SCORES] = scores / np.float32(255)
        values[:, NUM_SCORES:] = chances.reshape(len(packed), -1)
        return cls(values, frames_per_second)

    def roll(self, head: str) -> NDArray[np.float32]:
        """The probabilities of one head, float32 [F, N]."""
        return self.values[:, _COLUMNS[head]]

    @property
    def num_steps(self) -> int:
        """Whole steps that the rolls cover."""
        return math.floor(len(self.values) / self._frames_per_second * STEPS_PER_SECOND)

    @staticmethod
    def has_column(pitch: int) -> bool:
        """Whether the heads know of a pitch, drums apart."""
        return 0 <= pitch - LOWEST_PITCH < NUM_PITCHES

    def find(self, step: int, pitch: int, programs: Sequence[int], *, is_drum: bool) -> HeardNote:
        """The likeliest onset of a pitch or drum near a step of the segment.

        Args:
          programs: that may play it.
        """
        column = pitch if is_drum else pitch - LOWEST_PITCH
        frame = self._to_frame(step)
        first = max(0, min(frame, len(self.values)) - REACH)
        onsets = self.roll("drum" if is_drum else "onset")[:, column]
        best = first + int(np.argmax(onsets[first : frame + REACH + 1]))
        return self._note_at(best, column, programs, is_drum=is_drum)

    def notes(self, least: float, programs: Sequence[int], *, drums: bool) -> list[HeardNote]:
        """Notes whose onset's score is at least `least` and a peak.

        Args:
          programs, drums: what may appear.
        """
        heard = []
        for is_drum, may_appear in ((False, programs), (True, drums)):
            if not may_appear:
                continue
            onsets = self.roll("drum" if is_drum else "onset")
            heard += [
                self._note_at(frame, column, programs, is_drum=is_drum)
                for frame, column in np.argwhere(_peaks(onsets, least)).tolist()
            ]
        return heard

    def end(self, step: int, pitch: int) -> int | None:
        """The step at which a pitch that sounds at `step` falls silent; None if it sounds on.

        Args:
          step: below 0 for a pitch that began before the segment.
        """
        first = self._to_frame(step) + 1 if step >= 0 else 0
        if first >= len(self.values):
            return None
        column = slice(pitch - LOWEST_PITCH, pitch - LOWEST_PITCH + 1)
        sounds = self.roll("frame")[first:, column]
        ends = _peaks(self.roll("offset")[first:, column], LEAST_OFFSET) & (sounds < FADING)
        if len(sounds) >= PAUSE_FRAMES:
            silent = np.lib.stride_tricks.sliding_window_view(sounds < SOUNDING, PAUSE_FRAMES, 0)
            ends[: len(silent)] |= silent.all(axis=-1)
        return self._to_step(first + int(np.argmax(ends))) if ends.any() else None

    def _to_frame(self, step: int) -> int:
        return int(max(0.0, step - 0.5) / STEPS_PER_SECOND * self._frames_per_second)

    def _to_step(self, frame: int) -> int:
        return round((frame + 0.5) / self._frames_per_second * STEPS_PER_SECOND)

    def _note_at(
        self, frame: int, column: int, programs: Sequence[int], *, is_drum: bool
    ) -> HeardNote:
        """The note whose onset is in a cell."""
        confidence = self.roll("drum" if is_drum else "onset")[frame, column]
        strength = self.roll("strength")[frame, NUM_PITCHES if is_drum else column]
        return HeardNote(
            self._to_step(frame),
            column if is_drum else column + LOWEST_PITCH,
            0 if is_drum else self._likeliest(frame, column, programs),
            is_drum,
            int(np.clip(round(float(127 * strength)), 1, 127)),
            float(confidence),
        )

    def _likeliest(self, frame: int, column: int, programs: Sequence[int]) -> int:
        """The program that plays the pitch of a column from a frame on."""
        classes = self.roll("class").reshape(-1, NUM_PITCHES, NUM_CLASSES)
        chances = classes[frame : frame + CLASS_FRAMES, column].mean(axis=0)
        return max(programs, key=lambda program: chances[program // 8])


def _peaks(roll: NDArray[np.float32], least: float) -> NDArray[np.bool_]:
    """Where a roll [F, N] is at least `least` and highest within `PEAK_REACH` frames."""
    padded = np.pad(roll, ((PEAK_REACH, PEAK_REACH), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * PEAK_REACH + 1, axis=0)
    peaks: NDArray[np.bool_] = (roll >= least) & (roll >= windows.max(axis=-1))
    return peaks


class SegmentTokens(list[int]):
    """Tokens of a segment up to and with EOS, and its rolls where the network has heads."""

    rolls: NoteRolls | None = None
