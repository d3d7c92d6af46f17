"""Random music by simple rules, for when there are no MIDI files to render."""

from __future__ import annotations

import numpy as np

from mt3_keras.notes import Note

_SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))  # major, minor
_BEATS_PER_BAR = 4
_MELODY_PROGRAMS = range(104)
_CHORD_PROGRAMS = (*range(8), *range(16, 32), *range(46, 56), *range(88, 96))
_BASS_PROGRAMS = range(32, 40)
# Beats of a bar on which each drum may fall: bass drum, snare, hi-hat, tom, crash.
_DRUMS = {
    36: (0.0, 2.0, 2.5, 3.5),
    38: (1.0, 3.0, 3.75),
    42: (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0),
    46: (3.5,),
    45: (3.25, 3.5),
    49: (0.0,),
}


def compose(seconds: float, rng: np.random.Generator) -> list[list[Note]]:
    """Composes two melodies, chords, a bass and drums over a repeated row of chords.

    Returns:
      One list of notes for each of the five parts, in order of onset; times in seconds. No part
      strikes a pitch that it is still holding.
    """
    beat = 60 / rng.uniform(70, 150)
    scale = _SCALES[rng.integers(2)]
    key = int(rng.integers(12))
    degrees = [int(d) for d in rng.choice((0, 1, 2, 3, 4, 5), size=4)]
    bars = [degrees[bar % 4] for bar in range(int(seconds / (beat * _BEATS_PER_BAR)) + 1)]

    def pitch(degree: int, octave: int) -> int:
        return key + 12 * (octave + 1 + degree // 7) + scale[degree % 7]

    parts = [
        [(b, d, pitch(s, octave)) for b, d, s in _melody(bars, rng)]
        for octave in (4, int(rng.integers(3, 6)))
    ]
    parts.append([(b, d, pitch(s, 3)) for b, d, s in _chords(bars, rng)])
    parts.append([(b, d, pitch(s, 1)) for b, d, s in _bass(bars, rng)])
    choices = (_MELODY_PROGRAMS, _MELODY_PROGRAMS, _CHORD_PROGRAMS, _BASS_PROGRAMS)
    programs = [int(rng.choice(choice)) for choice in choices]
    pieces = [
        [
            Note(b * beat, (b + d) * beat, p, int(rng.integers(55, 120)), program)
            for b, d, p in sorted(part)
        ]
        for part, program in zip(parts, programs, strict=True)
    ]
    drums = [
        Note(b * beat, (b + 0.2) * beat, p, int(rng.integers(60, 120)), 0, True)
        for b, p in sorted(_drum_beats(len(bars), rng))
    ]
    return [*pieces, drums]


# Below: (onset in beats, length in beats, degree of the scale).


def _melody(bars: list[int], rng: np.random.Generator) -> list[tuple[float, float, int]]:
    notes, beat, degree = [], 0.0, int(rng.integers(7))
    while beat < len(bars) * _BEATS_PER_BAR:
        length = float(rng.choice((0.25, 0.5, 0.5, 1.0, 1.0, 2.0)))
        if beat % 2 == 0:  # begin on a tone of the chord
            degree = bars[int(beat // _BEATS_PER_BAR)] + int(rng.choice((0, 2, 4, 7)))
        else:
            degree = int(np.clip(degree + rng.integers(-2, 3), -3, 12))
        if rng.random() < 0.85:
            notes.append((beat, length * float(rng.choice((0.5, 0.95))), degree))
        beat += length
    return notes


def _chords(bars: list[int], rng: np.random.Generator) -> list[tuple[float, float, int]]:
    length = float(rng.choice((0.5, 1.0, 2.0, 4.0)))
    broken = bool(rng.random() < 0.4)
    tones = (0, 2, 4) if rng.random() < 0.6 else (0, 2, 4, 6)
    notes = []
    for bar, root in enumerate(bars):
        for step in range(int(_BEATS_PER_BAR / length)):
            beat = bar * _BEATS_PER_BAR + step * length
            chosen = (tones[step % len(tones)],) if broken else tones
            notes += [(beat, 0.95 * length, root + tone) for tone in chosen]
    return notes


def _bass(bars: list[int], rng: np.random.Generator) -> list[tuple[float, float, int]]:
    length = float(rng.choice((0.5, 1.0, 2.0)))
    notes = []
    for bar, root in enumerate(bars):
        for step in range(int(_BEATS_PER_BAR / length)):
            degree = root if step % 2 == 0 else root + int(rng.choice((0, 4, 7)))
            notes.append((bar * _BEATS_PER_BAR + step * length, 0.9 * length, degree))
    return notes


def _drum_beats(num_bars: int, rng: np.random.Generator) -> list[tuple[float, int]]:
    likely = {pitch: [rng.random() for _ in beats] for pitch, beats in _DRUMS.items()}
    return [
        (bar * _BEATS_PER_BAR + beat, pitch)
        for bar in range(num_bars)
        for pitch, beats in _DRUMS.items()
        for beat, chance in zip(beats, likely[pitch], strict=True)
        if rng.random() < chance
    ]
