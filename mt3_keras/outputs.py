"""What a network predicts of one segment: tokens, or notes that may have begun and ended."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class TokenOutput(NamedTuple):
    """Of an `MT3Backbone` or a `RecurrentBackbone`: token ids up to and including EOS."""

    tokens: list[int]


class RollOutput(NamedTuple):
    """Of a `NoteDetector`, as its `detect` says, without the batch axis.

    Attributes:
      onsets: float32 [K, 5]: frame, MIDI pitch, probability, velocity, probability of a unison.
      programs: float32 [K, 128], of each onset.
      strokes: float32 [D, 4]: frame, MIDI key of the drum, probability, velocity.
      ended: float32 [F, NUM_PITCHES], that a note has ended.
    """

    onsets: Floats
    programs: Floats
    strokes: Floats
    ended: Floats


Output = TokenOutput | RollOutput
