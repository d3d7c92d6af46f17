"""Events and tokens: the token language of MT3.

A *token* is an id of the network: 0 PAD (and start), 1 EOS, 2 UNK, then the event ranges in their
fixed order, then 100 ids that are never used. MT3's source counts "codec ids" from the
first event; a token is that plus 3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

PAD, EOS, UNK = 0, 1, 2
NUM_SPECIAL = 3
NUM_EXTRA = 100

EventType = Literal["shift", "pitch", "velocity", "tie", "program", "drum"]


class Event(NamedTuple):
    """One symbol: a type and its value (see `Codec` for the units)."""

    type: str
    value: int


class EventRange(NamedTuple):
    """All events of one type, `low` to `high` inclusive."""

    type: str
    low: int
    high: int

    def __len__(self) -> int:
        return self.high - self.low + 1


@dataclasses.dataclass(frozen=True)
class Codec:
    """Event <-> token id.

    The ranges are, in order: shift (steps of 10 ms since the segment's start, 0 to 1000), pitch
    (MIDI 0 to 127), velocity (bin 0 to `num_velocity_bins`; 0 is a note-off), tie (0), program
    (General MIDI, 0 to 127), drum (MIDI pitch 0 to 127). With 1 velocity bin this is the released
    mt3 vocabulary (1,388 events), with 127 the one of ismir2021 (1,514).

    Attributes:
      num_velocity_bins: number of velocity levels of a note-on.
      steps_per_second: of the time grid.
      max_shift_steps: largest value of one shift token.
      event_ranges: all ranges but shift, in order; None is the ranges above.
      num_extra: unused ids at the end.
    """

    num_velocity_bins: int = 1
    steps_per_second: int = 100
    max_shift_steps: int = 1000
    event_ranges: tuple[EventRange, ...] | None = None
    num_extra: int = NUM_EXTRA
    _ranges: tuple[tuple[EventRange, int], ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )
    _starts: dict[str, int] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rest = self.event_ranges
        if rest is None:
            rest = (
                EventRange("pitch", 0, 127),
                EventRange("velocity", 0, self.num_velocity_bins),
                EventRange("tie", 0, 0),
                EventRange("program", 0, 127),
                EventRange("drum", 0, 127),
            )
        first, ranges = NUM_SPECIAL, []
        for event_range in (EventRange("shift", 0, self.max_shift_steps), *rest):
            ranges.append((event_range, first))
            first += len(event_range)
        object.__setattr__(self, "_ranges", tuple(ranges))
        object.__setattr__(self, "_starts", {r.type: start - r.low for r, start in ranges})

    @property
    def num_events(self) -> int:
        """Number of distinct events."""
        return sum(len(event_range) for event_range, _ in self._ranges)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary: special tokens, events and unused ids."""
        return NUM_SPECIAL + self.num_events + self.num_extra

    def token_range(self, event_type: str) -> tuple[int, int]:
        """First and last token (inclusive) of an event type; ValueError if the codec lacks it."""
        for event_range, start in self._ranges:
            if event_range.type == event_type:
                return start, start + len(event_range) - 1
        raise ValueError(f"this codec has no event type {event_type!r}")

    def encode(self, event: Event) -> int:
        """Event -> token; ValueError for an unknown type or a value out of its range."""
        first, last = self.token_range(event.type)
        token = self._starts[event.type] + event.value
        if not first <= token <= last:
            raise ValueError(f"{event.type} value out of range: {event.value}")
        return token

    def decode(self, token: int) -> Event:
        """Token -> event; ValueError for special, unused and out-of-range ids."""
        for event_range, start in self._ranges:
            if start <= token < start + len(event_range):
                return Event(event_range.type, event_range.low + int(token) - start)
        raise ValueError(f"token {token} is no event")

    def classes_to_tokens(self, classes: NDArray[np.integer]) -> NDArray[np.integer]:
        """MT3 codec ids -> tokens, any shape, dtype kept; ValueError if one is out of range."""
        classes = np.asarray(classes)
        if classes.size and not (classes.min() >= 0 and classes.max() < self.num_events):
            raise ValueError(
                f"codec ids must be in [0, {self.num_events}): "
                f"got {classes.min()} to {classes.max()}"
            )
        return classes + classes.dtype.type(NUM_SPECIAL)

    def tokens_to_classes(self, tokens: NDArray[np.integer]) -> NDArray[np.integer]:
        """Tokens [..., L] -> MT3 codec ids; -1 from the first EOS on, -2 for ids without event."""
        tokens = np.asarray(tokens)
        valid = (tokens >= NUM_SPECIAL) & (tokens < NUM_SPECIAL + self.num_events)
        ended = np.cumsum(tokens == EOS, axis=-1) > 0
        return np.where(ended, -1, np.where(valid, tokens - NUM_SPECIAL, -2)).astype(tokens.dtype)


def velocity_to_bin(velocity: int, num_velocity_bins: int) -> int:
    """MIDI velocity 0..127 -> bin 0..num_velocity_bins; 0 stays 0."""
    return math.ceil(num_velocity_bins * velocity / 127)


def bin_to_velocity(velocity_bin: int, num_velocity_bins: int) -> int:
    """Bin -> MIDI velocity, the inverse of `velocity_to_bin` up to quantisation."""
    return int(127 * velocity_bin / num_velocity_bins)


def trim_eos(tokens: list[int]) -> list[int]:
    """The tokens before the first EOS."""
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens
