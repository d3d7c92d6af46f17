"""Notes and beats -> the bars, staves and voices of a score.

Times are counted in units of a twelfth of a quarter, in which sixteenths and triplets of eighths
are whole numbers. What a score cannot hold legibly is simplified: onsets and ends move to a grid, a
staff has two voices at most, and a note ends where the next of its voice begins.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mt3_keras.beats import Beats
from mt3_keras.notes import Note

QUARTER = 12  # units
_BINARY, _TERNARY = 3, 4  # units of the two grids of a beat that is a quarter: sixteenths, triplets
_TERNARY_GAIN = 0.35  # of the binary grid's squared error, that the ternary one's must stay below
_TERNARY_ERROR = 0.03**2  # mean squared error of the binary grid, in beats, below which it stays
_MIDDLE_C = 60
_HAND_SPAN = 14  # semitones that one hand strikes
_OVERLAP = (57, 64)  # pitches that either hand plays
_LOW_REGISTER = 57  # median pitch below which a part has a bass clef
# General MIDI programs of instruments with two staves: pianos, organs, accordion, harp.
TWO_STAVES = frozenset([*range(8), *range(16, 22), 46])
# Krumhansl & Kessler, "Tracing the dynamic changes in perceived tonal organization", 1982.
_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
# Drum keys played by the feet: the lower voice.
_FEET = frozenset([35, 36, 44])


class Bar(NamedTuple):
    """Start and length in units."""

    start: int
    length: int


class Chord(NamedTuple):
    """Notes of one voice that begin and end together; times in units, pitches ascending."""

    start: int
    end: int
    pitches: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Staff:
    """A staff: one or two voices, each without overlaps; the upper first."""

    voices: list[list[Chord]]
    is_low: bool


@dataclasses.dataclass(frozen=True)
class Part:
    """An instrument's staves.

    Attributes:
      triplets: the starts of the beats, in units, that fall into triplets.
    """

    program: int
    is_drum: bool
    staves: list[Staff]
    triplets: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Score:
    """Music in bars.

    Attributes:
      beat: units of a beat: a quarter or a dotted quarter.
      fifths: sharps of the key signature, flats below 0.
      is_minor: whether the key is minor.
      quarters_per_minute: the tempo at the start.
      origin: number of the beat at which the first bar begins, as `Beats.positions` counts.
    """

    bars: list[Bar]
    parts: list[Part]
    beat: int
    fifths: int
    is_minor: bool
    quarters_per_minute: float
    origin: int
    title: str = ""


class _Event(NamedTuple):
    start: int
    end: int
    pitch: int


def make_score(notes: Sequence[Note], beats: Beats, title: str = "") -> Score:
    """Quantises notes and arranges them on staves, an instrument a part, drums last.

    Args:
      notes: in seconds.
      beats: of the same piece; where bars are not known, their most probable lines count.
      title: of the piece.
    """
    beat = QUARTER * 3 // 2 if beats.is_compound else QUARTER
    onsets = beats.positions([note.onset for note in notes])
    ends = beats.positions([note.offset for note in notes])
    first = min(onsets, default=0.0)
    origin = _first_bar(beats, float(first))
    of_part: dict[tuple[bool, int], list[int]] = {}
    for index, note in enumerate(notes):
        key = (note.is_drum, 0 if note.is_drum else note.program)
        of_part.setdefault(key, []).append(index)
    parts = []
    last = 0
    for (is_drum, program), indices in sorted(of_part.items()):
        events, triplets = _quantize(
            onsets[indices] - origin,
            ends[indices] - origin,
            [notes[i].pitch for i in indices],
            beat,
        )
        parts.append(_arrange(events, program, is_drum, triplets, beat))
        last = max(last, *(event.end for event in events))
    pitched = [note for note in notes if not note.is_drum]
    fifths, is_minor = find_key(pitched)
    tempo = beats.beats_per_minute * beat / QUARTER
    bars = _bars(beats, origin, beat, last)
    return Score(bars, parts, beat, fifths, is_minor, tempo, origin, title)


def _first_bar(beats: Beats, first: float) -> int:
    """Index of the beat at which the bar of the first note begins; below 0 before the first."""
    nearest = int(np.floor(first + 1 / 8))
    numbers = beats.numbers if beats.numbers[0] else (1, 2, 3, 4)
    per_bar = beats.beats_per_bar or 4
    if 0 <= nearest < len(beats.numbers) and beats.numbers[0]:
        return nearest - (numbers[nearest] - 1) % per_bar
    return nearest - (nearest + numbers[0] - 1) % per_bar


def _bars(beats: Beats, origin: int, beat: int, end: int) -> list[Bar]:
    """Bars from `origin` (index of a beat) until all of a piece of `end` units is in one."""
    per_bar = beats.beats_per_bar or 4
    lines = [i - origin for i, number in enumerate(beats.numbers) if number == 1 and i >= origin]
    if not lines or lines[0] > 0:
        lines = [*range(0, lines[0] if lines else 1, per_bar), *lines]
    while lines[-1] * beat < end or len(lines) < 2:
        lines.append(lines[-1] + per_bar)
    bars = [Bar(a * beat, (b - a) * beat) for a, b in itertools.pairwise(lines)]
    return [bar for bar in bars if bar.start < max(end, 1)]


def _quantize(
    onsets: NDArray[np.float64], ends: NDArray[np.float64], pitches: Sequence[int], beat: int
) -> tuple[list[_Event], frozenset[int]]:
    """Moves one part's notes, in beats, to a grid: events, and the beats that are triplets."""
    steps = np.full(int(np.ceil(max(ends))) + 2, _BINARY)
    if beat == QUARTER:
        owners = np.floor(onsets + 1 / 8).astype(int)
        for number in np.unique(owners):
            if _is_ternary(onsets[owners == number] - number):
                steps[max(number, 0)] = _TERNARY
    found: dict[tuple[int, int], int] = {}
    for onset, end, pitch in zip(onsets, ends, pitches, strict=True):
        start = max(0, _to_grid(onset, steps, beat))
        is_long = end - onset > 1  # whose end nobody places to a sixteenth
        stop = _to_grid(max(end, onset), steps, beat, least_step=QUARTER // 2 if is_long else 1)
        stop = max(stop, start + int(steps[min(start // beat, len(steps) - 1)]))
        found[start, pitch] = max(stop, found.get((start, pitch), 0))
    events = sorted(_Event(start, stop, pitch) for (start, pitch), stop in found.items())
    triplets = frozenset(int(i) * beat for i in np.flatnonzero(steps == _TERNARY))
    return events, triplets


def _is_ternary(places: NDArray[np.float64]) -> bool:
    """Whether onsets in a beat, from about 0 to 1, fall into triplets rather than sixteenths."""
    errors = [np.mean((places - np.rint(places * k) / k) ** 2) for k in (4, 3)]
    return bool(errors[0] > _TERNARY_ERROR and errors[1] < _TERNARY_GAIN * errors[0])


def _to_grid(position: float, steps: NDArray[np.int64], beat: int, *, least_step: int = 1) -> int:
    number = int(np.clip(np.floor(position + 1 / 16), 0, len(steps) - 1))
    step = int(steps[number])
    if step == _BINARY:
        step = max(step, least_step)
    return number * beat + step * round((position - number) * beat / step)


def _arrange(
    events: Sequence[_Event], program: int, is_drum: bool, triplets: frozenset[int], beat: int
) -> Part:
    if is_drum:
        hands = [event for event in events if event.pitch not in _FEET]
        feet = [event for event in events if event.pitch in _FEET]
        voices = [_strokes(voice, beat) for voice in (hands, feet)]
        return Part(0, True, [Staff(voices, False)], triplets)
    if program in TWO_STAVES:
        right, left = _split_hands(events)
        upper, lower = _voices(right), _voices(left)
        _end_at_repeats([*upper, *lower])
        staves = [Staff(upper, False), Staff(lower, True)]
    else:
        is_low = float(np.median([event.pitch for event in events])) < _LOW_REGISTER
        voices = _voices(events)
        _end_at_repeats(voices)
        staves = [Staff(voices, is_low)]
    return Part(program, False, staves, triplets)


def _end_at_repeats(voices: Sequence[list[Chord]]) -> None:
    """Ends chords where another voice strikes one of their pitches: an instrument has each once."""
    strikes: dict[int, list[int]] = {}
    for chord in sorted(chord for voice in voices for chord in voice):
        for pitch in chord.pitches:
            strikes.setdefault(pitch, []).append(chord.start)
    for voice in voices:
        for index, chord in enumerate(voice):
            later = [
                start
                for pitch in chord.pitches
                for start in strikes[pitch][bisect.bisect_right(strikes[pitch], chord.start) :][:1]
            ]
            voice[index] = chord._replace(end=min([chord.end, *later]))


def _group(events: Iterable[_Event]) -> list[list[_Event]]:
    """Events that begin together, in order of time."""
    ordered = sorted(events)
    return [list(group) for _, group in itertools.groupby(ordered, key=lambda e: e.start)]


def _split_hands(events: Sequence[_Event]) -> tuple[list[_Event], list[_Event]]:
    """The notes of the upper and of the lower staff, each chord split where hands reach best."""
    right: list[_Event] = []
    left: list[_Event] = []
    for group in _group(events):
        place = _hand_border([event.pitch for event in group])
        left += group[:place]
        right += group[place:]
    return right, left


def _hand_border(pitches: Sequence[int]) -> int:
    """How many of a chord's pitches, ascending, the left hand plays."""

    def effort(place: int) -> tuple[float, bool, float]:
        left, right = pitches[:place], pitches[place:]
        strays = sum(max(0, _OVERLAP[0] - pitch) for pitch in right)
        strays += sum(max(0, pitch - _OVERLAP[1]) for pitch in left)
        stretch = sum(max(0, hand[-1] - hand[0] - _HAND_SPAN) for hand in (left, right) if hand)
        is_split = bool(left and right)
        last = left[-1] - right[0] if is_split else (np.mean(pitches) < _MIDDLE_C) != bool(left)
        return strays + 2 * stretch, is_split, float(last)

    return min(range(len(pitches) + 1), key=effort)


def _voices(events: Sequence[_Event]) -> list[list[Chord]]:
    """One voice, or two where notes sound on below or above others that move."""
    upper: list[list[_Event]] = []
    lower: list[list[_Event]] = []
    groups = _group(events)
    for group, following in itertools.zip_longest(groups, groups[1:]):
        after = following[0].start if following else max(event.end for event in group)
        long = [event for event in group if event.end >= after + QUARTER]
        busy = bool(lower) and max(event.end for event in lower[-1]) > group[0].start
        moves = [event for event in group if event not in long]
        if long and not busy and (moves or long[0].pitch < following[-1].pitch):
            lower.append(long)
            group = moves
        if group:
            upper.append(group)
    voices = [_chords(upper)]
    return [*voices, _chords(lower)] if lower else voices


def _chords(groups: Sequence[Sequence[_Event]]) -> list[Chord]:
    """A voice: each group ends where the next begins, also if a short rest were between."""
    chords = []
    for group, following in itertools.zip_longest(groups, groups[1:]):
        start, end = group[0].start, max(event.end for event in group)
        if following:
            after = following[0].start
            gap = after - end
            if gap < QUARTER / 2 or end - start >= 0.6 * (after - start):
                end = after
            end = min(end, after)
        chords.append(Chord(start, end, tuple(sorted(event.pitch for event in group))))
    return chords


def _strokes(events: Sequence[_Event], beat: int) -> list[Chord]:
    """A voice of drums: each stroke lasts until the next, within its beat."""
    chords = []
    groups = _group(events)
    for group, following in itertools.zip_longest(groups, groups[1:]):
        start = group[0].start
        end = (start // beat + 1) * beat
        if following:
            end = min(end, following[0].start)
        chords.append(Chord(start, end, tuple(event.pitch for event in group)))
    return chords


def find_key(notes: Sequence[Note]) -> tuple[int, bool]:
    """The key of notes by Krumhansl's profiles: sharps (flats below 0), and whether it is minor."""
    weights = np.zeros(12)
    for note in notes:
        weights[note.pitch % 12] += min(note.offset - note.onset, 2.0)
    if not weights.any() or np.ptp(weights) == 0:
        return 0, False
    best = max(
        (float(np.corrcoef(weights, np.roll(profile, tonic))[0, 1]), tonic, is_minor)
        for is_minor, profile in ((False, _MAJOR), (True, _MINOR))
        for tonic in range(12)
    )
    _, tonic, is_minor = best
    fifths = (tonic + 3 * is_minor) * 7 % 12
    return (fifths - 12 if fifths > 6 else fifths), is_minor
