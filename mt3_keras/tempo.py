"""Beats <-> the tempos and time signatures of a MIDI file."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import os
from collections.abc import Sequence

import numpy as np

from mt3_keras.beats import Beats
from mt3_keras.midi_file import MAX_SECONDS, read_tracks

# Ticks a quarter. pretty_midi refuses a file of more than `MAX_TICKS`; at 120 quarters a minute the
# first of `RESOLUTIONS` has ticks of 1 ms, and those down to 50 keep MT3's 10 ms grid.
RESOLUTIONS, MAX_TICKS = (500, 250, 100, 50, 25, 10, 1), 10_000_000
BEAT_RESOLUTIONS = (960, 480, 240, 120, 60, 24, 12, 2)  # 2 and 3 divide them: a beat may be dotted
PLAIN_TEMPO = 500_000  # microseconds a quarter, where nothing is known of the music's
MAX_DEVIATION = 0.02  # seconds that a beat may be off a tempo that is kept constant
MAX_SHIFT = 0.1  # of a beat, by which the first may be moved to the start of the file


def read_beats(path: str | os.PathLike[str]) -> Beats | None:
    """Reads the beats of a MIDI file, as its tempos and time signatures state them.

    A beat is the signature's note value, of 6/8, 9/8 and the like three of them. Bars are not known
    before the first signature, nor in a file without one.

    Returns:
      The beats up to the end of the file; None where it states none or ends before the second.

    Raises:
      MidiError: the file cannot be read (see `read_tracks`).
    """
    tracks = read_tracks(path)
    tempos = tracks[0][1]
    end = max(track.end for track, _ in tracks)
    if not tempos.ticks_per_beat or tempos.to_seconds(end) > MAX_SECONDS:
        return None
    stated = sorted(signature for track, _ in tracks for signature in track.signatures)
    times: list[int] = []
    numbers: list[int] = []
    kinds: list[bool] = []
    for (start, count, value), (stop, *_) in itertools.pairwise([(0, 0, 4), *stated, (end + 1,)]):
        is_compound = value >= 8 and count > 3 and count % 3 == 0
        step = tempos.ticks_per_beat * 4 * (3 if is_compound else 1) / value
        beats_per_bar = count // 3 if is_compound else count
        for beat in range(math.ceil((stop - start) / step - 1e-6)):
            times.append(round(start + beat * step))
            numbers.append(beat % beats_per_bar + 1 if count else 0)
            kinds.append(is_compound)
    seconds = [tempos.to_seconds(time) for time in times]
    kept = [i for i in range(len(seconds)) if not i or seconds[i] > seconds[i - 1]]
    if len(kept) < 2:
        return None
    if stated:  # a signature at the start is written after the beats before it
        kept = [i for i in kept if numbers[i]] or kept
    has_bars = all(numbers[i] for i in kept)
    return Beats(
        tuple(seconds[i] for i in kept),
        tuple(numbers[i] if has_bars else 0 for i in kept),
        is_compound=2 * sum(kinds) > len(kinds),
    )


@dataclasses.dataclass(frozen=True)
class TickMap:
    """The times of a MIDI file.

    Attributes:
      resolution: ticks a quarter.
      tempos: (tick, microseconds a quarter), the first at 0, increasing.
      signatures: (tick, beats of a bar, note value of a beat).
    """

    resolution: int
    tempos: Sequence[tuple[int, int]]
    signatures: Sequence[tuple[int, int, int]] = ()

    def __post_init__(self) -> None:
        seconds = [0.0]
        for (tick, tempo), (following, _) in itertools.pairwise(self.tempos):
            seconds.append(seconds[-1] + (following - tick) * tempo / (1e6 * self.resolution))
        object.__setattr__(self, "_seconds", seconds)

    def to_ticks(self, seconds: float) -> int:
        """The tick next to a time."""
        starts: list[float] = self._seconds  # type: ignore[attr-defined]
        index = max(0, bisect.bisect_right(starts, seconds) - 1)
        tick, tempo = self.tempos[index]
        return round(tick + (seconds - starts[index]) * 1e6 * self.resolution / tempo)


def constant_ticks(end: float) -> TickMap:
    """Ticks of equal length, for a piece of `end` seconds whose beats are not known."""
    per_second = 1e6 / PLAIN_TEMPO
    resolution = next(
        (r for r in RESOLUTIONS if (end + 1) * r * per_second < MAX_TICKS), RESOLUTIONS[-1]
    )
    return TickMap(resolution, [(0, PLAIN_TEMPO)])


def follow_beats(beats: Beats, end: float) -> TickMap:
    """Ticks that follow beats, so that the bars of a piece of `end` seconds are the file's bars.

    The file begins with the beat nearest to 0 s, or with a shorter one before the first; what
    comes before the first bar line is a bar of its own. Beats within `MAX_DEVIATION` of a constant
    tempo get one tempo.
    """
    times, numbers = _reach_zero(beats)
    quarters = 1.5 if beats.is_compound else 1.0
    num_quarters = (float(beats.positions(end)) + len(times) - len(beats.times) + 1) * quarters
    resolution = next(
        (r for r in BEAT_RESOLUTIONS if num_quarters * r < MAX_TICKS), BEAT_RESOLUTIONS[-1]
    )
    step = round(quarters * resolution)  # ticks a beat
    tempos: list[tuple[int, int]] = []
    seconds = 0.0  # where the beat begins by the tempos so far, which are whole microseconds
    for first, last in itertools.pairwise(_straighten(times)):
        length = (last - first) * quarters
        tempo = max(1, round((times[last] - seconds) * 1e6 / length))
        seconds += length * tempo / 1e6
        if not tempos or tempos[-1][1] != tempo:
            tempos.append((first * step, tempo))
    return TickMap(resolution, tempos, _signatures(numbers, step, beats.is_compound))


def _reach_zero(beats: Beats) -> tuple[list[float], list[int]]:
    """Times and numbers of the beats from 0 s on."""
    times, numbers = list(beats.times), list(beats.numbers)
    period, per_bar = times[1] - times[0], beats.beats_per_bar
    num_before = math.ceil(times[0] / period - MAX_SHIFT)
    if num_before > 0:
        earlier = [max(0.0, times[0] - k * period) for k in range(num_before, 0, -1)]
        times = earlier + times
        if beats.has_bars:
            start = numbers[0] - 1 - num_before
            numbers = [(start + k) % per_bar + 1 for k in range(num_before)] + numbers
        else:
            numbers = [0] * len(times)
    times[0] = 0.0
    return times, numbers


def _straighten(times: Sequence[float]) -> list[int]:
    """Indices of the beats between which tempo is constant, first and last included."""
    beats = np.asarray(times)

    def is_straight(first: int, last: int) -> bool:
        line = np.linspace(beats[first], beats[last], last - first + 1)
        return bool(np.abs(beats[first : last + 1] - line).max() <= MAX_DEVIATION)

    knots = [0]
    while knots[-1] < len(beats) - 1:
        first, reach = knots[-1], 1
        while first + 2 * reach < len(beats) and is_straight(first, first + 2 * reach):
            reach *= 2
        last = min(first + 2 * reach, len(beats) - 1)
        while not is_straight(first, last):
            last -= 1
        knots.append(last)
    return knots


def _signatures(numbers: Sequence[int], step: int, is_compound: bool) -> list[tuple[int, int, int]]:
    """Where bars of another length begin; none where bars are not known."""
    if not numbers[0]:
        return []
    starts = [0, *(i for i, number in enumerate(numbers) if number == 1 and i)]
    counts = [last - first for first, last in itertools.pairwise(starts)]
    counts.append(max(numbers[starts[-1] :]) if not counts else counts[-1])
    found: list[tuple[int, int, int]] = []
    for start, count in zip(starts, counts, strict=True):
        shape = (3 * count, 8) if is_compound else (count, 4)
        if not found or found[-1][1:] != shape:
            found.append((start * step, *shape))
    return found
