"""What a network predicts of one segment: tokens or rolls."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class TokenOutput(NamedTuple):
    """Of an `MT3Backbone` or a `RecurrentBackbone`: token ids up to and including EOS."""

    tokens: list[int]


class RollOutput(NamedTuple):
    """Of a `NoteDetector`: float32 [F, NUM_COLUMNS], probabilities (see `note_rolls.NoteRolls`)."""

    rolls: NDArray[np.float32]


Output = TokenOutput | RollOutput
