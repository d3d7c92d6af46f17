"""What the encoder's heads say of single notes: how sure, how strong, how long, what plays them.

NumPy alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import HEADS, LOWEST_PITCH, NUM_CLASSES, NUM_PITCHES, STEPS_PER_SECOND

# Side by side in `NoteRolls.values`.
NOTE_HEADS = ("onset", "drum", "strength", "frame", "offset", "class")
_ENDS = list(itertools.accumulate(HEADS[head] for head in NOTE_HEADS))
_COLUMNS = dict(zip(NOTE_HEADS, map(slice, [0, *_ENDS], _ENDS), strict=True))
NUM_COLUMNS = _ENDS[-1]
NUM_SCORES = _COLUMNS["class"].start  # columns of all heads but "class"
NUM_PACKED = NUM_SCORES + NUM_PITCHES
REACH = 3  # frames from a token's time to the onset it means: times are rounded, chords joined
PEAK_REACH = 4  # frames in which an onset is the likeliest of its pitch
HIT_REACH = 2  # the same of drums
CLASS_FRAMES = 8  # from an onset on, by which its instrument is known
CONTEXT_FRAMES = 16  # beside a segment's own, more than all of these look at
SOUNDING = 0.5  # a frame of which the head is less sure is silent
FADED = 0.25  # log odds of "frame" below which a note rather is silent; training had it sound on
OFFSET_WEIGHT = 10  # of the log odds of "offset", against those of "frame" summed over frames
CERTAIN_END = 4  # log odds, summed since then, that make an end certain
LEAST_HEARD = 0.3  # onsets of which the heads are less sure say nothing about the music
AFTER_FRAMES, BEFORE_FRAMES = (1, 6), (-5, -1)  # from an onset, where "frame" speaks for it
FOR, AGAINST, DOUBT = 0.5, 0.25, 0.5  # weights of its log odds there, and what is taken off
# One of each of these is struck at a time, mostly: bass drums, snares, hi-hats and cymbals.
LIKE_DRUMS = ([35, 36], [38, 40], [42, 44, 46, 49, 51, 52, 53, 55, 57, 59])


class HeardNote(NamedTuple):
    """A note that begins in a segment, as the heads hear it.

    Attributes:
      step: 10 ms each, from the segment's start.
      velocity: as in MIDI.
      confidence: what the heads give the onset, from 0 to 1: training taught them to rather tell
        one onset too many than to miss one.
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
      own: the frames of the segment; those before and after are there for the context. None: all.
    """

    def __init__(
        self,
        values: NDArray[np.float32],
        frames_per_second: float,
        own: tuple[int, int] | None = None,
    ) -> None:
        self.values = values
        self.frames_per_second = frames_per_second
        self._first, self._end = own or (0, len(values))

    @functools.cached_property
    def confidences(self) -> NDArray[np.float32]:
        """How sure of each pitch's onset the heads are together, float32 [F, NUM_PITCHES].

        A pitch begins where "onset" says so, "frame" hears it from there on, and did not before.
        The two err at different places: together they were worth two points of F1.
        """
        frames = self.roll("frame")
        sums = np.pad(np.cumsum(frames, axis=0), ((1, 0), (0, 0)))

        def log_odds_in(window: tuple[int, int]) -> NDArray[np.float32]:
            now = np.arange(len(frames))
            first, end = (np.clip(now + edge, 0, len(frames)) for edge in window)
            num = (end - first)[:, None]
            mean = (sums[end] - sums[first]) / np.maximum(num, 1)
            return np.where(num > 0, _log_odds(mean), 0)

        support = FOR * log_odds_in(AFTER_FRAMES) - AGAINST * log_odds_in(BEFORE_FRAMES)
        sure = 1 / (1 + np.exp(DOUBT - support - _log_odds(self.roll("onset"))))
        return sure.astype(np.float32)

    @functools.cached_property
    def hits(self) -> NDArray[np.float32]:
        """How sure the head is of each drum's hit, float32 [F, 128].

        Where it wavers between two snares there is one of them, as surely as there is any: the
        likelier one, and of these the one that is heard around it too.
        """
        hits = self.roll("drum").copy()
        for like in LIKE_DRUMS:
            near = _windows(hits[:, like], HIT_REACH).max(axis=-1)
            any_of_them = 1 - np.prod(1 - near, axis=1, keepdims=True)
            chances = near * np.sqrt(np.mean(near**2, axis=0))
            surest = chances >= chances.max(axis=1, keepdims=True)
            hits[:, like] *= np.where(surest, any_of_them / np.maximum(near, 1e-6), 0)
        return hits

    @classmethod
    def unpack(cls, packed: NDArray[np.uint8], frames_per_second: float) -> NoteRolls:
        """Rolls of a served model, [F, NUM_PACKED] (see `export.served_model`)."""
        scores, classes = packed[:, :NUM_SCORES], packed[:, NUM_SCORES:]
        chances = classes[:, :, None] == np.arange(NUM_CLASSES)
        values = np.empty((len(packed), NUM_COLUMNS), np.float32)
        values[:, :NUM_SCORES] = scores / np.float32(255)
        values[:, NUM_SCORES:] = chances.reshape(len(packed), -1)
        return cls(values, frames_per_second)

    def since(self, frame: int) -> NoteRolls:
        """What the heads say from a frame on."""
        return NoteRolls(self.values[frame:], self.frames_per_second)

    def roll(self, head: str) -> NDArray[np.float32]:
        """The probabilities of one head, float32 [F, N]."""
        return self.values[:, _COLUMNS[head]]

    @property
    def seconds(self) -> float:
        """That the segment lasts."""
        return (self._end - self._first) / self.frames_per_second

    @property
    def num_steps(self) -> int:
        """Whole steps of the segment."""
        return math.floor(self.seconds * STEPS_PER_SECOND)

    @property
    def num_sounding(self) -> NDArray[np.int64]:
        """Pitches that sound in each frame of the segment, int64 [F]."""
        sounds: NDArray[np.bool_] = self.roll("frame")[self._first : self._end] >= SOUNDING
        return sounds.sum(axis=1)

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
        first = max(self._first, min(frame, self._end) - REACH)
        onsets = self._onset_roll(is_drum)[first : frame + REACH + 1, column]
        best = first + int(np.argmax(onsets))
        return self._note_at(best, column, programs, is_drum=is_drum)

    def notes(self, least: Limits, programs: Sequence[int], *, drums: bool) -> list[HeardNote]:
        """Notes whose onset's score is at least `least` and a peak.

        Args:
          programs, drums: what may appear.
        """
        heard = []
        for is_drum, may_appear in ((False, programs), (True, drums)):
            if not may_appear:
                continue
            heard += [
                self._note_at(frame, column, programs, is_drum=is_drum)
                for frame, column in np.argwhere(self._onsets(least[is_drum], is_drum)).tolist()
            ]
        return heard

    def heard(self, is_drum: bool) -> NDArray[np.float32]:
        """How sure the heads are of each onset that they hear, be it one or not, [n]."""
        return self._onset_roll(is_drum)[self._onsets(LEAST_HEARD, is_drum)]

    def end(self, step: int, pitch: int) -> int | None:
        """The step at which a pitch that sounds at `step` falls silent; None if it sounds on.

        It ends where that is likeliest: "frame" hears it until there and not much longer, and
        "offset" says so.

        Args:
          step: below 0 for a pitch that began before the segment.
        """
        first = self._to_frame(step) + 1 if step >= 0 else self._first
        if first >= self._end:
            return None
        begun = max(0, self._first + math.floor(step / STEPS_PER_SECOND * self.frames_per_second))
        column = pitch - LOWEST_PITCH
        sounds = _log_odds(self.roll("frame")[first:, column]) - FADED
        until = np.cumsum(sounds) - sounds
        # A note is gone, as people write it down, a frame after its key is let go.
        let_go = np.pad(self.roll("offset")[begun:, column], (1, 0))[first - begun : -1]
        offsets = OFFSET_WEIGHT * _log_odds(let_go)
        ended = np.maximum.accumulate(until + np.maximum(offsets, 0)) - until - sounds
        certain = np.flatnonzero(ended > CERTAIN_END)
        if not certain.size:
            return None
        end = first + int(np.argmax((until + offsets)[: certain[0] + 1]))
        return self._to_step(end) if end < self._end else None

    def _onsets(self, least: float, is_drum: bool) -> NDArray[np.bool_]:
        """Where the heads are at least so sure of an onset, and surer than around it, [F, N]."""
        peaks = _peaks(self._onset_roll(is_drum), least, HIT_REACH if is_drum else PEAK_REACH)
        peaks[: self._first] = peaks[self._end :] = False
        return peaks

    def _onset_roll(self, is_drum: bool) -> NDArray[np.float32]:
        return self.hits if is_drum else self.confidences

    def _to_frame(self, step: int) -> int:
        since = int(max(0.0, step - 0.5) / STEPS_PER_SECOND * self.frames_per_second)
        return self._first + since

    def _to_step(self, frame: int) -> int:
        since = frame - self._first + 0.5
        return round(since / self.frames_per_second * STEPS_PER_SECOND)

    def _note_at(
        self, frame: int, column: int, programs: Sequence[int], *, is_drum: bool
    ) -> HeardNote:
        """The note whose onset is in a cell."""
        confidence = self._onset_roll(is_drum)[frame, column]
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


def _log_odds(chances: NDArray[np.float32]) -> NDArray[np.float32]:
    clipped = np.clip(chances, 0.01, 0.99)
    odds: NDArray[np.float32] = np.log(clipped / (1 - clipped))
    return odds


def _windows(roll: NDArray[np.float32], reach: int) -> NDArray[np.float32]:
    """What is within `reach` frames of each cell of a roll, [F, N, 2 * reach + 1]."""
    padded = np.pad(roll, ((reach, reach), (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0)


def _peaks(roll: NDArray[np.float32], least: float, reach: int) -> NDArray[np.bool_]:
    """Where a roll [F, N] is at least `least` and highest within `reach` frames."""
    peaks: NDArray[np.bool_] = (roll >= least) & (roll >= _windows(roll, reach).max(axis=-1))
    return peaks


class Crossfade:
    """Joins what segments that overlap hear of the same frames.

    Where a segment ends the network knows least of what comes; the next one, which knows, fades in.
    (Heard twice, every frame, 120 pieces of held-out music scored .734 onset F1 where they scored
    .727, and .389 with offsets where .382.)
    """

    def __init__(self) -> None:
        nothing = np.zeros((0, NUM_COLUMNS), np.float32)
        self._before, self._ahead = nothing, nothing  # of the next segment's start

    def join(self, rolls: NoteRolls, num_frames: int | None) -> NoteRolls:
        """What a segment and the one before it say until the next begins.

        Args:
          num_frames: from its start to the next one's; None for the last.
        """
        values, num_faded = rolls.values, len(self._ahead)
        fade_in = (np.arange(num_faded, dtype=np.float32) + 0.5)[:, None] / max(num_faded, 1)
        faded = (1 - fade_in) * self._ahead + fade_in * values[:num_faded]
        values = np.concatenate([self._before, faded, values[num_faded:]])
        first = len(self._before)
        end = len(values) if num_frames is None else first + num_frames
        self._before, self._ahead = values[max(0, end - CONTEXT_FRAMES) : end], values[end:]
        return NoteRolls(values[: end + CONTEXT_FRAMES], rolls.frames_per_second, (first, end))


class Limits(NamedTuple):
    """How sure the heads must be of an onset."""

    pitched: float
    drum: float


class Certainty:
    """How sure the heads must be of an onset in the music that they hear.

    Of one guitar they are sure, of what is false nearly as sure as of what is true in an orchestra.
    So the limit is a share of what they give the surest quarter of the onsets of the last half
    minute, and lower the more pitches sound at once. (On the 27 recordings of the model card worth
    nearly a point of onset F1 over the best fixed limit, and more in dense music.)

    Args:
      start: the limit before anything is heard.
      least: the lowest.
    """

    SHARE = 0.5
    SUREST = 0.75  # quantile
    CROWDED = 0.04  # lower for each pitch that sounds beside
    ALONE = 3  # pitches
    KEPT = 0.95  # of the weight of what was heard, a second later
    START_WEIGHT = 10  # onsets
    HIGHEST = 0.75

    def __init__(self, start: float, least: float) -> None:
        self._start, self._least = start, least
        self._onsets = [np.zeros((0, 2), np.float32)] * 2  # pitched, drums: confidence, weight
        self._sounding = np.zeros(2)  # pitches summed over the frames in which any sounds; frames

    def hear(self, rolls: NoteRolls) -> Limits:
        """Takes a segment into account; the limits for its own onsets."""
        num_sounding = rolls.num_sounding
        kept = self.KEPT**rolls.seconds
        self._sounding = kept * self._sounding + (num_sounding.sum(), (num_sounding > 0).sum())
        pitches = self._sounding[0] / max(self._sounding[1], 1.0)
        crowd = self.CROWDED * (pitches - self.ALONE)
        return Limits(self._limit(rolls, False, crowd), self._limit(rolls, True, 0.0))

    def _limit(self, rolls: NoteRolls, is_drum: bool, lower: float) -> float:
        new = rolls.heard(is_drum)
        old = self._onsets[is_drum] * np.array((1, self.KEPT**rolls.seconds), np.float32)
        onsets = np.concatenate([old[old[:, 1] > 0.02], np.stack([new, np.ones_like(new)], axis=1)])
        self._onsets[is_drum] = onsets = onsets[np.argsort(onsets[:, 0])]
        if not len(onsets):
            return self._start
        weights = np.cumsum(onsets[:, 1])
        surest = onsets[np.searchsorted(weights, self.SUREST * weights[-1]), 0]
        limit = self.SHARE * surest - lower
        weight = weights[-1] / (weights[-1] + self.START_WEIGHT)
        limit = weight * limit + (1 - weight) * self._start
        return float(np.clip(limit, self._least, self.HIGHEST))


class SegmentTokens(list[int]):
    """Tokens of a segment up to and with EOS, and its rolls where the network has heads."""

    rolls: NoteRolls | None = None
