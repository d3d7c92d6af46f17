"""What the encoder's heads say of single notes: how strong, and how sure. NumPy alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mt3_keras.config import HEADS, LOWEST_PITCH, NUM_PITCHES, STEPS_PER_SECOND

NOTE_HEADS = ("onset", "drum", "strength")  # side by side in `NoteRolls.values`
NUM_COLUMNS = sum(HEADS[head] for head in NOTE_HEADS)
REACH = 3  # frames from a token's time to the onset it means: times are rounded, chords joined


class Strike(NamedTuple):
    """The beginning of a note: MIDI velocity, and the onset's score from 0 to 1."""

    velocity: int
    confidence: float


class NoteRolls:
    """The rolls of a segment, read at the notes that its tokens tell.

    Args:
      values: float32 [F, NUM_COLUMNS], probabilities of `NOTE_HEADS` (see `heads`).
      frames_per_second: of the rolls.
    """

    def __init__(self, values: NDArray[np.float32], frames_per_second: float) -> None:
        self.values = values
        self._frames_per_second = frames_per_second

    def strike(self, step: int, pitch: int, *, is_drum: bool) -> Strike | None:
        """The likeliest onset near a step of the segment; None for pitches without a column.

        The confidence is what the head gives, which training taught to rather tell one onset too
        many than to miss one.
        """
        if not is_drum and not 0 <= pitch - LOWEST_PITCH < NUM_PITCHES:
            return None
        column = HEADS["onset"] + pitch if is_drum else pitch - LOWEST_PITCH
        strength = HEADS["onset"] + HEADS["drum"]
        strength += NUM_PITCHES if is_drum else pitch - LOWEST_PITCH
        frame = int((step - 0.5) / STEPS_PER_SECOND * self._frames_per_second)
        first = max(0, min(frame, len(self.values)) - REACH)
        nearby = self.values[first : frame + REACH + 1, column]
        best = first + int(np.argmax(nearby))
        velocity = int(np.clip(round(float(127 * self.values[best, strength])), 1, 127))
        return Strike(velocity, float(self.values[best, column]))


class SegmentTokens(list[int]):
    """Tokens of a segment up to and with EOS, and its rolls where the network has heads."""

    rolls: NoteRolls | None = None
