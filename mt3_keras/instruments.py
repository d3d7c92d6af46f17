"""Names of a piece: which program plays each note, decided for all notes of a piece together.

A network names each note by itself, from half a second of sound, and often wrongly. A piece is
played by few instruments, so its notes are a mixture of few kinds: expectation-maximisation finds
how many notes each instrument has, and with them which one plays each note. NumPy alone.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import NUM_CLASSES, PROGRAMS_PER_CLASS

Chances = NDArray[np.float32]

# How far a note's own chances count; the share of the notes that an instrument loses in every
# round, so that those with few notes vanish; rounds.
TEMPER, SHRINK, ROUNDS = 1.5, 0.0, 60
LEAST = 1e-4  # of a note's chance for any instrument: one sure mistake should not decide a piece
LEAST_SPREAD, SPREAD_WEIGHT = 4.0, 8.0  # semitones; notes' worth of the spread before any is seen
WIDEST = 12.0  # semitones, the spread of an instrument of which nothing is known
RECENT = 300  # notes by which one is named while the piece goes on


class PiecePrograms:
    """The General MIDI program of each note of a piece.

    The notes are first shared out to classes of instruments (`PieceNames`); the notes of a class
    then have one program, the likeliest of all of them together.

    Args:
      allowed: programs that may play; None: all.
      num_instruments, shrink: as of `PieceNames`, of classes.

    Attributes:
      most: instruments that may begin one note together.
    """

    def __init__(
        self,
        *,
        allowed: Collection[int] | None = None,
        num_instruments: int | None = None,
        shrink: float = SHRINK,
    ) -> None:
        every = range(NUM_CLASSES * PROGRAMS_PER_CLASS)
        self._allowed = sorted(set(every if allowed is None else allowed))
        self._classes = sorted({program // PROGRAMS_PER_CLASS for program in self._allowed})
        self._open_piece = functools.partial(
            PieceNames, allowed=self._classes, num_instruments=num_instruments, shrink=shrink
        )
        self._open_piece()  # refuses what cannot be
        self.most = min(2, len(self._classes), num_instruments or 2)
        self._chances: list[Chances] = []  # of each note, and so its pitch
        self._pitches: list[float] = []
        self._num_forgotten = 0
        self._recent: list[list[int]] | None = None

    def add(self, chances: Chances, pitches: NDArray[np.float32]) -> int:
        """Takes more notes of the piece and returns the number of the first of them.

        Args:
          chances: float32 [n, 128], of each program; rows that sum to 1.
          pitches: float [n], MIDI pitches.
        """
        first = self._num_forgotten + len(self._pitches)
        self._chances.extend(np.asarray(chances, np.float32))
        self._pitches.extend(np.asarray(pitches, np.float32).tolist())
        self._recent = None
        return first

    def programs(self, notes: Sequence[tuple[int, int]]) -> list[int]:
        """The program of each note, given all of the piece; (number, 1) is a note's second one."""
        found = self._decide(0)
        return [found[number - self._num_forgotten][rank] for number, rank in notes]

    def recent_programs(self, notes: Sequence[tuple[int, int]]) -> list[int]:
        """As `programs`, given the newest notes alone; of older ones, each by itself."""
        if not notes:
            return []
        since = max(0, len(self._pitches) - RECENT)
        if self._recent is None:
            self._recent = self._decide(since)
        found = []
        for number, rank in notes:
            row = number - self._num_forgotten
            if row >= since:
                found.append(self._recent[row - since][rank])
            else:
                found.append(self._decide(row, row + 1)[0][rank])
        return found

    def forget_old(self, needed_from: int | None) -> None:
        """Forgets all but the newest notes and those from a number on."""
        first = max(0, len(self._pitches) - RECENT)
        if needed_from is not None:
            first = min(first, needed_from - self._num_forgotten)
        if first:
            self._chances, self._pitches = self._chances[first:], self._pitches[first:]
            self._num_forgotten += first

    def _decide(self, first: int, end: int | None = None) -> list[list[int]]:
        """The likeliest programs, `most` of each, of the notes first to end."""
        chances = np.array(self._chances[first:end], np.float32)
        by_class = chances.reshape(-1, NUM_CLASSES, PROGRAMS_PER_CLASS)
        own = by_class.sum(axis=-1)
        piece = self._open_piece()
        piece.add(own, np.array(self._pitches[first:end], np.float32))
        shares = piece.shares()
        within = np.log(np.maximum(by_class, LEAST))
        scores = np.einsum("nc,ncp->cp", shares, within - within.max(axis=-1, keepdims=True))
        barred = np.ones(scores.size, bool)
        barred[self._allowed] = False
        scores[barred.reshape(scores.shape)] = -np.inf
        program_of = PROGRAMS_PER_CLASS * np.arange(NUM_CLASSES) + scores.argmax(axis=1)
        classes = np.array(self._classes)
        # Of those that have no share in the note, the likelier one by its own chances.
        order = np.lexsort((-own[:, classes], -shares[:, classes]))
        likeliest = classes[order[:, : self.most]]
        programs: list[list[int]] = program_of[likeliest].tolist()
        return programs


class PieceNames:
    """Names the notes of a piece as they come, better the more are known.

    A file gives all notes at once and reads them once; a stream gives them as they are found, and
    `names` gives the best names of all notes so far, also of those that it named before.

    Args:
      allowed: instruments that may play, by column of the chances; None: all.
      num_instruments: that play at most; None: as many as are found.
      use_register: also find the range of pitches of each instrument, for bass and guitar.
    """

    def __init__(
        self,
        *,
        allowed: Collection[int] | None = None,
        num_instruments: int | None = None,
        use_register: bool = True,
        temper: float = TEMPER,
        shrink: float = SHRINK,
    ) -> None:
        if num_instruments is not None and num_instruments < 1:
            raise ValueError(f"num_instruments must be at least 1: got {num_instruments}")
        if allowed is not None and not allowed:
            raise ValueError("allowed must name at least one instrument: got none")
        self.allowed = None if allowed is None else sorted(set(allowed))
        self.num_instruments = num_instruments
        self.use_register, self.temper, self.shrink = use_register, temper, shrink
        self._chances: list[Chances] = []
        self._pitches: list[NDArray[np.float32]] = []

    def add(self, chances: Chances, pitches: NDArray[np.float32]) -> None:
        """Takes more notes of the piece.

        Args:
          chances: float32 [n, instruments], of each note by itself; rows that sum to 1.
          pitches: float [n], MIDI pitches.
        """
        self._chances.append(np.asarray(chances, np.float32))
        self._pitches.append(np.asarray(pitches, np.float32))

    def shares(self) -> Chances:
        """How likely each instrument plays each note so far, float32 [n, instruments]."""
        chances = np.concatenate(self._chances) if self._chances else np.zeros((0, 1), np.float32)
        pitches = np.concatenate(self._pitches) if self._pitches else np.zeros(0, np.float32)
        if not len(chances):
            return chances
        if self.allowed is not None:
            if self.allowed[0] < 0 or self.allowed[-1] >= chances.shape[1]:
                raise ValueError(f"allowed must be 0 to {chances.shape[1] - 1}: got {self.allowed}")
            barred = np.ones(chances.shape[1], bool)
            barred[self.allowed] = False
            chances = np.where(barred, 0, np.maximum(chances, LEAST))
        else:
            chances = np.maximum(chances, LEAST)
        own = (chances**self.temper).astype(np.float64)
        found = _mix(own, pitches, self.shrink, self.use_register)
        if self.num_instruments is not None:
            weights = found.sum(axis=0)
            least = np.sort(weights)[::-1][: self.num_instruments][-1]
            own = np.where(weights >= max(least, 1e-12), own, 0)
            found = _mix(own, pitches, self.shrink, self.use_register)
        return found.astype(np.float32)

    def names(self) -> NDArray[np.int64]:
        """The instrument of each note so far, int64 [n]: the column of its chances."""
        found = self.shares()
        return found.argmax(axis=1) if len(found) else np.zeros(0, np.int64)


def _mix(
    own: NDArray[np.float64], pitches: NDArray[np.float32], shrink: float, use_register: bool
) -> NDArray[np.float64]:
    """Expectation-maximisation: likelihoods [n, instruments] -> responsibilities of each note."""
    shares = np.ones(own.shape[1]) / own.shape[1]
    found = own / own.sum(axis=1, keepdims=True)
    in_range = np.ones_like(own)
    for _ in range(ROUNDS):
        found = own * in_range * shares
        found /= np.maximum(found.sum(axis=1, keepdims=True), 1e-300)
        shares = np.maximum(found.sum(axis=0) - shrink * len(own), 0)
        if not shares.sum():  # no instrument has its least share: the likeliest alone
            shares = (found.sum(axis=0) == found.sum(axis=0).max()).astype(np.float64)
        shares /= shares.sum()
        if use_register:
            in_range = _in_range(found, pitches)
    return found


def _in_range(found: NDArray[np.float64], pitches: NDArray[np.float32]) -> NDArray[np.float64]:
    """How well each note's pitch fits each instrument's, a normal density [n, instruments]."""
    weights = found.sum(axis=0)
    means = (found * pitches[:, None]).sum(axis=0) / np.maximum(weights, 1e-9)
    away = (pitches[:, None] - means) ** 2
    variance = (found * away).sum(axis=0) + SPREAD_WEIGHT * WIDEST**2
    variance = np.maximum(variance / (weights + SPREAD_WEIGHT), LEAST_SPREAD**2)
    density: NDArray[np.float64] = np.exp(-0.5 * away / variance) / np.sqrt(variance)
    return np.maximum(density, 1e-6)
