"""What a network predicts of one segment: tokens, or notes that may have begun and ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mt3_keras.codec import EOS

Floats = NDArray[np.float32]


class TokenOutput(NamedTuple):
    """Of a network that emits tokens: token ids up to and including EOS.

    Of one with several decoders, the sequences of all one after the other, each with its EOS.
    """

    tokens: list[int]


def join_sequences(sequences: Sequence[Sequence[int]]) -> TokenOutput:
    """What the decoders of a segment emitted, each row up to its EOS; an only one may lack it."""
    ended = [list(row[: row.index(EOS)]) if EOS in row else list(row) for row in sequences]
    if len(ended) == 1:
        return TokenOutput(ended[0] + [EOS] * (EOS in sequences[0]))
    return TokenOutput([token for row in ended for token in (*row, EOS)])


def split_sequences(tokens: Iterable[int], number: int) -> list[list[int]]:
    """Inverse of `join_sequences` for several decoders; what is too much is left out."""
    sequences: list[list[int]] = [[]]
    for token in tokens:
        sequences[-1].append(token)
        if token == EOS:
            sequences.append([])
    sequences += [[] for _ in range(number)]
    return sequences[:number]


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
