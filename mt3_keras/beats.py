"""Beats and bars of a piece, and the positions of its notes in them.

NumPy at most.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEAST_BAR_CONFIDENCE = 0.8  # below it a wrong metre is so likely that none is better


@dataclasses.dataclass(frozen=True)
class Beats:
    """The beats of a piece.

    Attributes:
      times: of each beat, in seconds, increasing; at least two.
      numbers: of each beat in its most probable bar, from 1; all 0 where nothing is known of bars.
      is_compound: whether a beat is a dotted quarter, of three eighths, and not a quarter.
      confidence: from 0 to 1, that most beats are right.
      bar_confidence: from 0 to 1, that most bar lines are right.
    """

    times: tuple[float, ...]
    numbers: tuple[int, ...]
    is_compound: bool = False
    confidence: float = 1.0
    bar_confidence: float = 1.0

    def __post_init__(self) -> None:
        if len(self.times) < 2 or len(self.times) != len(self.numbers):
            raise ValueError(
                "beats need two times or more and as many numbers:"
                f" got {len(self.times)} and {len(self.numbers)}"
            )
        if not np.all(np.diff(self.times) > 0):
            raise ValueError("times of beats must increase")

    @property
    def has_bars(self) -> bool:
        """Whether bars are known with enough confidence to state a metre."""
        return self.numbers[0] > 0 and self.bar_confidence >= LEAST_BAR_CONFIDENCE

    @property
    def beats_per_bar(self) -> int:
        """Of most bars, as `numbers` has them."""
        ends = [n for n, after in zip(self.numbers, self.numbers[1:], strict=False) if after == 1]
        counts = np.bincount(ends or [max(self.numbers)])
        return int(counts.argmax())

    @property
    def beats_per_minute(self) -> float:
        """In the median."""
        return 60 / float(np.median(np.diff(self.times)))

    @property
    def downbeats(self) -> tuple[float, ...]:
        """Times of the first beats of bars, in seconds."""
        return tuple(t for t, number in zip(self.times, self.numbers, strict=True) if number == 1)

    def positions(self, times: ArrayLike) -> NDArray[np.float64]:
        """Seconds -> beats from the first, with fractions; tempo goes on at both ends."""
        seconds = np.asarray(times, np.float64)
        beats = np.asarray(self.times)
        left = np.clip(np.searchsorted(beats, seconds, "right") - 1, 0, len(beats) - 2)
        return left + (seconds - beats[left]) / (beats[left + 1] - beats[left])
