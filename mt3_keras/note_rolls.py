"""Rolls of a segment -> its note onsets, their confidence, strength, instrument and end.

NumPy alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import (
    HEADS,
    LOWEST_PITCH,
    NUM_CLASSES,
    NUM_PITCHES,
    STEPS_PER_SECOND,
)

# Side by side in `NoteRolls.values`.
NOTE_HEADS = ("onset", "drum", "strength", "frame", "offset", "class")
_ENDS = list(itertools.accumulate(HEADS[head] for head in NOTE_HEADS))
_COLUMNS = dict(zip(NOTE_HEADS, map(slice, [0, *_ENDS], _ENDS), strict=True))
NUM_COLUMNS = _ENDS[-1]
NUM_SCORES = _COLUMNS["class"].start  # columns of all heads but "class"
NUM_PACKED = NUM_SCORES + NUM_PITCHES
CONTEXT_FRAMES = 16  # beside a segment's own, more than any window of `RollDecoding`


@dataclasses.dataclass(frozen=True)
class RollDecoding:
    """How a detector's rolls are read as notes; the defaults are a start for a new network.

    They fit one network's weights and stand beside them in `decoding.json`, with what each was
    chosen on and when. Windows are in frames, probabilities from 0 to 1.

    Attributes:
      peak_frames: an onset is the most confident of its pitch within so many frames.
      hit_frames: the same of drums.
      class_frames: from an onset on, over which its instrument is averaged.
      sounding: probability of "frame" from which a pitch counts as sounding.
      frame_bias: log odds subtracted from those of "frame", which training biased toward "on".
      offset_weight: of the log odds of "offset", against those of "frame" summed over frames.
      certain_end: summed log odds at which a note's end is certain.
      support_window, before_window: frames after and before an onset in which "frame" is averaged
        as evidence for and against it.
      support_weight, before_weight: of the log odds of these averages.
      onset_bias: constant subtracted from an onset's log odds.
      similar_drums: keys of which one at a time is struck: bass drums, snares, cymbals.
      same_strike: seconds within which two onsets of a pitch are one.
      least_onset: onsets below it are left out of the statistics of `AdaptiveLimit`.
      start_limit: confidence that an onset needs before anything is known of the music.
      lowest_limit, highest_limit: bounds of the limit that follows the music.
      limit_share: the limit, as a share of the confidence of a surely played onset.
      limit_quantile: the quantile of recent onsets that stands for a surely played one.
      polyphony_step: how much lower the limit is for each pitch that sounds beside others.
      polyphony_free: pitches at which it is not lowered.
      kept_per_second: share of the statistics' weight that is left a second later.
      start_weight: onsets that `start_limit` counts as.
    """

    peak_frames: int = 4
    hit_frames: int = 2
    class_frames: int = 8
    sounding: float = 0.5
    frame_bias: float = 0.25
    offset_weight: float = 10.0
    certain_end: float = 4.0
    support_window: tuple[int, int] = (1, 6)
    before_window: tuple[int, int] = (-5, -1)
    support_weight: float = 0.5
    before_weight: float = 0.25
    onset_bias: float = 0.5
    similar_drums: tuple[tuple[int, ...], ...] = (
        (35, 36),
        (38, 40),
        (42, 44, 46, 49, 51, 52, 53, 55, 57, 59),
    )
    same_strike: float = 0.06
    least_onset: float = 0.3
    start_limit: float = 0.45
    lowest_limit: float = 0.2
    highest_limit: float = 0.75
    limit_share: float = 0.5
    limit_quantile: float = 0.75
    polyphony_step: float = 0.04
    polyphony_free: float = 3.0
    kept_per_second: float = 0.95
    start_weight: float = 10.0

    def __post_init__(self) -> None:
        windows = (self.peak_frames, self.hit_frames, self.class_frames)
        edges = (*self.support_window, *self.before_window)
        if min(windows) < 0 or max(*windows, *map(abs, edges)) > CONTEXT_FRAMES:
            raise ValueError(
                f"windows must be 0 to {CONTEXT_FRAMES} frames: got {windows}, {edges}"
            )
        for name in ("sounding", "least_onset", "start_limit", "lowest_limit", "highest_limit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1]: got {getattr(self, name)}")

    @classmethod
    def read(cls, folder: str | pathlib.Path) -> RollDecoding:
        """Reads `decoding.json` of a preset or bundle; the defaults where there is none.

        Raises:
          ValueError: the file is none of this kind; one line that names it.
        """
        path = pathlib.Path(folder) / "decoding.json"
        if not path.exists():
            return cls()
        try:
            stored = json.loads(path.read_text())
            return cls(**{name: _to_tuple(entry["value"]) for name, entry in stored.items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: cannot be used ({error}); copy it again") from error

    def to_json(self, provenance: dict[str, dict[str, str]] | None = None) -> str:
        """The content of `decoding.json`.

        Args:
          provenance: field -> what its value was chosen on ("tuned_on") and when ("date").
        """
        unknown = {"tuned_on": "default of a new network, not tuned", "date": ""}
        entries = {
            name: {"value": value, **(provenance or {}).get(name, unknown)}
            for name, value in dataclasses.asdict(self).items()
        }
        return json.dumps(entries, indent=1) + "\n"


def _to_tuple(value: Any) -> Any:
    return tuple(map(_to_tuple, value)) if isinstance(value, list) else value


class NoteOnset(NamedTuple):
    """A note that begins in a segment.

    Attributes:
      step: 10 ms each, from the segment's start.
      velocity: as in MIDI.
      confidence: of the onset, from 0 to 1; training taught the network to rather predict one
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
      values: float32 [F, NUM_COLUMNS], probabilities of `NOTE_HEADS` (see `models.detector`).
      frames_per_second: of the rolls.
      decoding: how they are read.
      own: the frames of the segment; those before and after are context. None: all.
    """

    def __init__(
        self,
        values: NDArray[np.float32],
        frames_per_second: float,
        decoding: RollDecoding,
        own: tuple[int, int] | None = None,
    ) -> None:
        self.values = values
        self.frames_per_second = frames_per_second
        self.decoding = decoding
        self._first, self._end = own or (0, len(values))

    @functools.cached_property
    def onset_confidences(self) -> NDArray[np.float32]:
        """Confidence of each pitch's onset by all heads together, float32 [F, NUM_PITCHES].

        A pitch begins where "onset" is high, "frame" is high from there on, and was not before.
        The two err at different places.
        """
        decoding, frames = self.decoding, self.roll("frame")
        sums = np.pad(np.cumsum(frames, axis=0), ((1, 0), (0, 0)))

        def log_odds_in(window: tuple[int, int]) -> NDArray[np.float32]:
            now = np.arange(len(frames))
            first, end = (np.clip(now + edge, 0, len(frames)) for edge in window)
            num = (end - first)[:, None]
            mean = (sums[end] - sums[first]) / np.maximum(num, 1)
            return np.where(num > 0, _log_odds(mean), 0)

        after = decoding.support_weight * log_odds_in(decoding.support_window)
        support = after - decoding.before_weight * log_odds_in(decoding.before_window)
        sure = 1 / (1 + np.exp(decoding.onset_bias - support - _log_odds(self.roll("onset"))))
        return sure.astype(np.float32)

    @functools.cached_property
    def drum_confidences(self) -> NDArray[np.float32]:
        """Confidence of each drum's hit, float32 [F, 128].

        Where the probability is split between two snares, one of them is struck, as surely as any
        is: the likelier one, and of these the one with the higher probability around it too.
        """
        hits = self.roll("drum").copy()
        for similar in map(list, self.decoding.similar_drums):
            near = _windows(hits[:, similar], self.decoding.hit_frames).max(axis=-1)
            any_of_them = 1 - np.prod(1 - near, axis=1, keepdims=True)
            chances = near * np.sqrt(np.mean(near**2, axis=0))
            surest = chances >= chances.max(axis=1, keepdims=True)
            hits[:, similar] *= np.where(surest, any_of_them / np.maximum(near, 1e-6), 0)
        return hits

    def roll(self, head: str) -> NDArray[np.float32]:
        """The probabilities of one head, float32 [F, N]."""
        return self.values[:, _COLUMNS[head]]

    @property
    def seconds(self) -> float:
        """Length of the segment."""
        return (self._end - self._first) / self.frames_per_second

    @property
    def num_steps(self) -> int:
        """Whole steps of the segment."""
        return math.floor(self.seconds * STEPS_PER_SECOND)

    @property
    def num_sounding(self) -> NDArray[np.int64]:
        """Pitches that sound in each frame of the segment, int64 [F]."""
        frames = self.roll("frame")[self._first : self._end]
        sounds: NDArray[np.bool_] = frames >= self.decoding.sounding
        return sounds.sum(axis=1)

    def onsets(
        self, pitched_limit: float, drum_limit: float, programs: Sequence[int], *, drums: bool
    ) -> list[NoteOnset]:
        """Onsets whose confidence is a peak and at least the limit.

        Args:
          pitched_limit: least confidence of an onset of a pitch.
          drum_limit: least confidence of a drum stroke.
          programs: that may appear; empty for none.
          drums: whether drums may.
        """
        found = []
        for is_drum, limit, may_appear in (
            (False, pitched_limit, bool(programs)),
            (True, drum_limit, drums),
        ):
            if may_appear:
                found += [
                    self._onset_at(frame, column, programs, is_drum=is_drum)
                    for frame, column in np.argwhere(self._peaks(limit, is_drum)).tolist()
                ]
        return found

    def peak_confidences(self, is_drum: bool) -> NDArray[np.float32]:
        """Confidence of each onset from `least_onset` on, whether it becomes a note or not, [n]."""
        return self._confidences(is_drum)[self._peaks(self.decoding.least_onset, is_drum)]

    def end(self, step: int, pitch: int) -> int | None:
        """The step at which a pitch that sounds at `step` ends; None if it sounds on.

        It ends where that is likeliest: "frame" is high until there and not much longer, and
        "offset" is high.

        Args:
          step: below 0 for a pitch that began before the segment.
        """
        decoding = self.decoding
        first = self._to_frame(step) + 1 if step >= 0 else self._first
        if first >= self._end:
            return None
        begun = max(0, self._first + math.floor(step / STEPS_PER_SECOND * self.frames_per_second))
        column = pitch - LOWEST_PITCH
        sounds = _log_odds(self.roll("frame")[first:, column]) - decoding.frame_bias
        until = np.cumsum(sounds) - sounds
        # As people write notes down, one ends a frame after its key is released.
        released = np.pad(self.roll("offset")[begun:, column], (1, 0))[first - begun : -1]
        offsets = decoding.offset_weight * _log_odds(released)
        ended = np.maximum.accumulate(until + np.maximum(offsets, 0)) - until - sounds
        certain = np.flatnonzero(ended > decoding.certain_end)
        if not certain.size:
            return None
        end = first + int(np.argmax((until + offsets)[: certain[0] + 1]))
        return self._to_step(end) if end < self._end else None

    def _peaks(self, least: float, is_drum: bool) -> NDArray[np.bool_]:
        """Where a confidence is at least `least` and the highest around, bool [F, N]."""
        decoding = self.decoding
        reach = decoding.hit_frames if is_drum else decoding.peak_frames
        confidences = self._confidences(is_drum)
        highest = _windows(confidences, reach).max(axis=-1)
        peaks: NDArray[np.bool_] = (confidences >= least) & (confidences >= highest)
        peaks[: self._first] = peaks[self._end :] = False
        return peaks

    def _confidences(self, is_drum: bool) -> NDArray[np.float32]:
        return self.drum_confidences if is_drum else self.onset_confidences

    def _to_frame(self, step: int) -> int:
        since = int(max(0.0, step - 0.5) / STEPS_PER_SECOND * self.frames_per_second)
        return self._first + since

    def _to_step(self, frame: int) -> int:
        since = frame - self._first + 0.5
        return round(since / self.frames_per_second * STEPS_PER_SECOND)

    def _onset_at(
        self, frame: int, column: int, programs: Sequence[int], *, is_drum: bool
    ) -> NoteOnset:
        """The note whose onset is in a cell."""
        strength = self.roll("strength")[frame, NUM_PITCHES if is_drum else column]
        return NoteOnset(
            self._to_step(frame),
            column if is_drum else column + LOWEST_PITCH,
            0 if is_drum else self._likeliest(frame, column, programs),
            is_drum,
            int(np.clip(round(float(127 * strength)), 1, 127)),
            float(self._confidences(is_drum)[frame, column]),
        )

    def _likeliest(self, frame: int, column: int, programs: Sequence[int]) -> int:
        """The program that plays the pitch of a column from a frame on."""
        classes = self.roll("class").reshape(-1, NUM_PITCHES, NUM_CLASSES)
        chances = classes[frame : frame + self.decoding.class_frames, column].mean(axis=0)
        return max(programs, key=lambda program: chances[program // 8])


def unpack_rolls(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rolls of a served model, uint8 [F, NUM_PACKED] -> float32 [F, NUM_COLUMNS].

    `export.served_model` packs them: probabilities times 255, and the likeliest class alone.
    """
    scores, classes = packed[:, :NUM_SCORES], packed[:, NUM_SCORES:]
    chances = classes[:, :, None] == np.arange(NUM_CLASSES)
    values = np.empty((len(packed), NUM_COLUMNS), np.float32)
    values[:, :NUM_SCORES] = scores / np.float32(255)
    values[:, NUM_SCORES:] = chances.reshape(len(packed), -1)
    return values


def _log_odds(chances: NDArray[np.float32]) -> NDArray[np.float32]:
    clipped = np.clip(chances, 0.01, 0.99)
    odds: NDArray[np.float32] = np.log(clipped / (1 - clipped))
    return odds


def _windows(roll: NDArray[np.float32], reach: int) -> NDArray[np.float32]:
    """What is within `reach` frames of each cell of a roll, [F, N, 2 * reach + 1]."""
    padded = np.pad(roll, ((reach, reach), (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0)


class Crossfade:
    """Joins what overlapping segments predict of the same frames.

    At a segment's end the network does not know what follows; the next segment, which does, fades
    in.
    """

    def __init__(self) -> None:
        nothing = np.zeros((0, NUM_COLUMNS), np.float32)
        self._before, self._ahead = nothing, nothing  # of the next segment's start

    def join(
        self, values: NDArray[np.float32], num_frames: int | None
    ) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """What a segment and the one before it predict until the next begins.

        Args:
          values: of the segment, float32 [F, NUM_COLUMNS].
          num_frames: from its start to the next one's; None for the last.

        Returns:
          The frames with up to `CONTEXT_FRAMES` on both sides, and which of them are the
          segment's own (first, end).
        """
        num_faded = len(self._ahead)
        fade_in = (np.arange(num_faded, dtype=np.float32) + 0.5)[:, None] / max(num_faded, 1)
        faded = (1 - fade_in) * self._ahead + fade_in * values[:num_faded]
        values = np.concatenate([self._before, faded, values[num_faded:]])
        first = len(self._before)
        end = len(values) if num_frames is None else first + num_frames
        self._before, self._ahead = values[max(0, end - CONTEXT_FRAMES) : end], values[end:]
        return values[: end + CONTEXT_FRAMES], (first, end)
