"""Names of a piece: which program plays each note, decided for all notes of a piece together.

A network names each note by itself, from half a second of sound, and often wrongly. A piece is
played by few instruments, so its notes are a mixture of few kinds: expectation-maximisation finds
how many notes each instrument has, and with them which one plays each note. NumPy alone;
`class_chances`, `weigh`, `mix` and `find_programs` also compute in a served graph, with `keras.ops`
(`xp`) and its loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import NUM_CLASSES, PROGRAMS_PER_CLASS
from mt3_keras.rows import Rows

Chances = NDArray[np.float32]

# How far a note's own chances count; the share of the notes that an instrument loses in every
# round, so that those with few notes vanish; rounds.
TEMPER, SHRINK, ROUNDS = 1.5, 0.0, 60
LEAST = 1e-4  # of a note's chance for any instrument: one sure mistake should not decide a piece
LEAST_SPREAD, SPREAD_WEIGHT = 4.0, 8.0  # semitones; notes' worth of the spread before any is seen
WIDEST = 12.0  # semitones, the spread of an instrument of which nothing is known
BASS, HIGH_BASS = 4, 34.0  # the class, and the pitch above which basses play less
BASS_SPREAD = 10.0  # semitones, how fast; chosen on 120 validation pieces with their own programs
RECENT, RECENT_ROUNDS = 300, 10  # notes by which one is named while the piece goes on; rounds then


class PiecePrograms:
    """The General MIDI program of each note of a piece.

    The notes are first shared out to classes of instruments (`find_shares`); the notes of a class
    then have one program, the likeliest of all of them together.

    Args:
      allowed: programs that may play; None: all.
      num_instruments, shrink: as of `find_shares`, of classes.

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
        self._find_shares = functools.partial(
            find_shares, allowed=self._classes, num_instruments=num_instruments, shrink=shrink
        )
        nothing = np.zeros((0, NUM_CLASSES), np.float32)
        self._find_shares(nothing, nothing[:, 0])  # refuses what cannot be
        self.most = min(2, len(self._classes), num_instruments or 2)
        self._notes = Rows(("f4", NUM_CLASSES * PROGRAMS_PER_CLASS + 1))  # chances, and the pitch
        self._num_forgotten = 0
        self._recent: list[list[int]] | None = None

    def add(self, chances: Chances, pitches: NDArray[np.float32]) -> int:
        """Takes more notes of the piece and returns the number of the first of them.

        Args:
          chances: float32 [n, 128], of each program; rows that sum to 1.
          pitches: float [n], MIDI pitches.
        """
        first = self._num_forgotten + len(self._notes)
        self._notes.append(np.column_stack((chances, pitches)))
        self._recent = None
        return first

    def programs(self, notes: Sequence[tuple[int, int]]) -> list[int]:
        """The program of each note, given all of the piece; (number, 1) is a note's second one."""
        found = self._decide(0, len(self._notes), ROUNDS)
        return [found[number - self._num_forgotten][rank] for number, rank in notes]

    def recent_programs(self, notes: Sequence[tuple[int, int]]) -> list[int]:
        """As `programs`, given the newest notes alone; of older ones, each by itself."""
        if not notes:
            return []
        since = max(0, len(self._notes) - RECENT)
        if self._recent is None:
            self._recent = self._decide(since, len(self._notes), RECENT_ROUNDS)
        found = []
        for number, rank in notes:
            row = number - self._num_forgotten
            if row >= since:
                found.append(self._recent[row - since][rank])
            else:
                found.append(self._decide(row, row + 1, RECENT_ROUNDS)[0][rank])
        return found

    def forget_old(self, needed_from: int | None) -> None:
        """Forgets all but the newest notes and those from a number on."""
        first = max(0, len(self._notes) - RECENT)
        if needed_from is not None:
            first = min(first, needed_from - self._num_forgotten)
        if first:
            rest = self._notes.read(first, len(self._notes))
            self._notes = Rows(self._notes.dtype)
            self._notes.append(rest)
            self._num_forgotten += first

    def _decide(self, first: int, end: int, rounds: int) -> list[list[int]]:
        """The likeliest programs, `most` of each, of the notes first to end."""
        notes = self._notes.read(first, end)
        chances, pitches = notes[:, :-1], notes[:, -1]
        own = class_chances(chances, pitches, np)
        shares = self._find_shares(own, pitches, rounds=rounds)
        found = find_programs(chances, shares, self._allowed, self.most, np)
        programs: list[list[int]] = found.tolist()
        return programs


def class_chances(chances: Any, pitches: Any, xp: Any) -> Any:
    """How likely each class plays each note by itself, float32 [n, NUM_CLASSES], not normalised.

    The network was trained on instruments at any pitch, so that it takes low chords for a bass; of
    it alone the register is known well enough to count.

    Args:
      chances: float32 [n, 128], of each program by the network.
      pitches: float [n], MIDI pitches.
      xp: the module that computes, `numpy` or `keras.ops`.
    """
    by_class = xp.sum(xp.reshape(chances, (-1, NUM_CLASSES, PROGRAMS_PER_CLASS)), axis=-1)
    above = xp.maximum(pitches - HIGH_BASS, 0.0) / BASS_SPREAD
    is_bass = np.arange(NUM_CLASSES) == BASS
    return by_class * xp.where(is_bass, xp.exp(-0.5 * above**2)[:, None], 1.0)


def find_shares(
    chances: Chances,
    pitches: NDArray[np.float32],
    *,
    allowed: Collection[int] | None = None,
    num_instruments: int | None = None,
    shrink: float = SHRINK,
    rounds: int = ROUNDS,
) -> Chances:
    """How likely each instrument plays each note, given all of a piece: float32 [n, instruments].

    Args:
      chances: float32 [n, instruments], of each note by itself; rows that sum to 1.
      pitches: float [n], MIDI pitches.
      allowed: instruments that may play, by column of the chances; None: all.
      num_instruments: that play at most; None: as many as are found.
      shrink: see `mix`.
      rounds: see `mix`.

    Raises:
      ValueError: no instrument may play, or one that there is not.
    """
    columns = sorted(set(range(chances.shape[1]) if allowed is None else allowed))
    if num_instruments is not None and num_instruments < 1:
        raise ValueError(f"num_instruments must be at least 1: got {num_instruments}")
    if not columns:
        raise ValueError("allowed must name at least one instrument: got none")
    if columns[0] < 0 or columns[-1] >= chances.shape[1]:
        raise ValueError(f"allowed must be 0 to {chances.shape[1] - 1}: got {columns}")
    if not len(chances):
        return chances
    own = weigh(chances, columns, np).astype(np.float64)
    heights = pitches.astype(np.float64)
    found = mix(own, heights, shrink, rounds)
    if num_instruments is not None:
        weights = found.sum(axis=0)
        least = np.sort(weights)[::-1][:num_instruments][-1]
        found = mix(np.where(weights >= max(least, 1e-12), own, 0), heights, shrink, rounds)
    shares: Chances = found.astype(np.float32)
    return shares


def weigh(chances: Any, allowed: Sequence[int], xp: Any) -> Any:
    """How far each note's own chances [n, instruments] count; 0 for those not allowed."""
    is_allowed = np.isin(np.arange(chances.shape[1]), allowed)
    return xp.where(is_allowed, xp.maximum(chances, LEAST) ** TEMPER, 0.0)


def _repeat(first: int, end: int, step: Callable[[int, Any], Any], state: Any) -> Any:
    for i in range(first, end):
        state = step(i, state)
    return state


def mix(
    own: Any,
    pitches: Any,
    shrink: float,
    rounds: int = ROUNDS,
    xp: Any = np,
    loop: Callable[..., Any] = _repeat,
) -> Any:
    """Expectation-maximisation: likelihoods [n, instruments] -> responsibilities of each note.

    Args:
      own: float64, of each note by itself.
      pitches: float64 [n].
      shrink: share of the notes that an instrument loses in every round.
      rounds: of estimating all shares anew.
      xp: the module that computes, `numpy` or `keras.ops`.
      loop: as `keras.ops.fori_loop`.
    """

    def improve(_: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        _, in_range, shares = state
        found = own * in_range * shares
        found = found / xp.maximum(xp.matmul(found, every_instrument), 1e-300)
        sums = xp.matmul(moments, found)
        kept = xp.maximum(sums[0] - shrink * num_notes, 0)
        alone = xp.where(sums[0] == xp.max(sums[0]), 1.0, 0.0)  # where none has its least share
        shares = xp.where(xp.sum(kept) > 0, kept, alone)
        shares = shares / xp.sum(shares)
        return found, _in_range(sums, pitches, xp), shares

    # Sums over the notes are products, which are faster than sums of narrow rows.
    every_instrument = np.ones((own.shape[1], 1))
    moments = xp.stack([xp.ones_like(pitches), pitches, pitches**2])
    num_notes = xp.sum(moments[0])  # in a graph the shape is not known
    shares = np.full(own.shape[1], 1 / own.shape[1])
    found, _, _ = loop(0, rounds, improve, (own, xp.ones_like(own), shares))
    return found


def _in_range(sums: Any, pitches: Any, xp: Any) -> Any:
    """How well each note's pitch fits each instrument's, a normal density [n, instruments].

    The sums [3, instruments] are those of all notes' shares, and of these times their pitches and
    the squares of these.
    """
    weights, first, second = sums[0], sums[1], sums[2]
    means = first / xp.maximum(weights, 1e-9)
    variance = second - first * means + SPREAD_WEIGHT * WIDEST**2
    variance = xp.maximum(variance / (weights + SPREAD_WEIGHT), LEAST_SPREAD**2)
    away = (pitches[:, None] - means) ** 2
    return xp.maximum(xp.exp(away * (-0.5 / variance)) * variance**-0.5, 1e-6)


def find_programs(chances: Any, shares: Any, allowed: Sequence[int], most: int, xp: Any) -> Any:
    """The likeliest programs of each note, int [n, most], given its classes.

    Args:
      chances: float32 [n, 128], of each program.
      shares: float32 [n, NUM_CLASSES], what `mix` found.
      allowed: programs that may play.
      most: instruments of a note, at most as many as there are classes of `allowed`.
      xp: the module that computes, `numpy` or `keras.ops`.
    """
    by_class = xp.reshape(chances, (-1, NUM_CLASSES, PROGRAMS_PER_CLASS))
    within = xp.log(xp.maximum(by_class, LEAST))
    within = within - xp.max(within, axis=-1, keepdims=True, initial=-np.inf)
    scores = xp.multiply(shares[:, :, None] * within, np.ones(1))  # to be summed in float64
    scores = xp.sum(scores, axis=0)
    is_allowed = np.isin(np.arange(128), allowed).reshape(NUM_CLASSES, PROGRAMS_PER_CLASS)
    program = xp.argmax(xp.where(is_allowed, scores, -np.inf), axis=1)
    program = program + np.arange(0, 128, PROGRAMS_PER_CLASS, dtype=np.int32)
    left = xp.where(is_allowed.any(axis=1), shares, -1.0)
    own, found = xp.sum(by_class, axis=-1), []
    for _ in range(most):
        # Of those that have no share in the note, the likelier one by its own chances.
        is_best = left == xp.max(left, axis=1, keepdims=True, initial=-2.0)
        best = xp.argmax(xp.where(is_best, own, -1.0), axis=1)
        found.append(xp.take(program, best))
        left = xp.where(best[:, None] == np.arange(NUM_CLASSES, dtype=np.int32), -2.0, left)
    return xp.stack(found, axis=1)
