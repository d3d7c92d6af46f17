"""New instruments for the parts of a piece: which play, what they are, and how they are played.

Most music is written for few instruments, pianos above all. To learn them all evenly a part may be
given a program drawn class by class, and is then moved by octaves into a register of that program;
its hands may be two instruments; another may double it; the drums of a kit may stand for others.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mt3_keras.notes import Note, sort_notes, trim_overlaps

if TYPE_CHECKING:
    from mt3_keras.synth.synthetic import SyntheticConfig

MIN_NOTE_SECONDS = 0.05
# Fainter notes and strokes would be labelled and not audible.
MIN_VELOCITY, MIN_STROKE_VELOCITY = 20, 35
# First program, lowest and highest pitch of it and those up to the next.
_REGISTERS = (
    (0, 21, 108), (4, 28, 96), (6, 29, 89), (7, 28, 96), (8, 60, 108), (9, 77, 108), (10, 60, 96),
    (11, 53, 89), (12, 41, 96), (13, 65, 108), (14, 53, 84), (15, 48, 84), (16, 36, 96),
    (19, 28, 96), (20, 36, 93), (22, 52, 96), (23, 36, 89), (24, 38, 86), (32, 23, 64),
    (38, 24, 72), (40, 55, 100), (41, 48, 88), (42, 36, 76), (43, 24, 62), (44, 32, 88),
    (46, 24, 100), (47, 36, 60), (48, 28, 96), (52, 40, 84), (55, 36, 84), (56, 53, 86),
    (57, 36, 74), (58, 26, 58), (59, 53, 84), (60, 36, 80), (61, 36, 86), (64, 54, 88),
    (65, 49, 81), (66, 44, 76), (67, 36, 70), (68, 58, 91), (69, 52, 81), (70, 34, 75),
    (71, 50, 92), (72, 72, 105), (73, 59, 96), (74, 60, 96), (79, 60, 93), (80, 30, 96),
    (88, 28, 96), (104, 36, 84), (105, 43, 84), (106, 36, 84), (107, 45, 86), (108, 55, 88),
    (109, 54, 84), (112, 36, 96),
)  # fmt: skip
# Kit pieces, each as likely; the keys of the drum map that stand for one, the first most often.
KIT_PIECES = (
    (36, 35), (38, 40), (37,), (39,), (42,), (44,), (46,), (46,), (41, 43), (45, 47), (48, 50),
    (49, 57), (49, 57), (52, 55), (51, 59), (53,), (54,), (56, 75, 76, 77, 82),
    (60, 61, 62, 63, 64, 70, 69, 81),
)  # fmt: skip
_RINGING = frozenset((*range(6), *range(8, 16), *range(24, 28), 46, 104, 106, 107, 108))
_STRUMMED = frozenset((*range(24, 28), 29, 30, *range(104, 108)))
_CHORD_SECONDS = 0.03  # notes closer than this to a chord's first are of it
_RING_SECONDS = (0.4, 2.5)  # shortest and longest time between two changes of pedal


def vary_parts(
    parts: Sequence[Sequence[Note]],
    config: SyntheticConfig,
    programs: Sequence[int],
    rng: np.random.Generator,
) -> list[list[Note]]:
    """Draws parts, their programs, a transposition, and each note's time and velocity.

    Args:
      parts: of the piece.
      config: how they are varied.
      programs: that parts may be given.
      rng: draws whatever is varied.

    Returns:
      One list of notes for each instrument, as it is to be played: notes inside the excerpt, none
      overlapping another of its pitch, in order of onset.
    """
    hands = [hand for part in parts for hand in _split(part, config.split_chance, rng)]
    wanted = int(rng.integers(config.min_instruments, config.max_instruments + 1))
    chosen = [hands[i] for i in sorted(rng.permutation(len(hands))[:wanted])]
    transposition = int(rng.integers(-config.max_transposition, config.max_transposition + 1))
    instruments: dict[tuple[int, bool], list[Note]] = {}
    for part in chosen:
        if part[0].is_drum:
            arranged = [redraw_drums(part, config.drum_redraw_chance, rng)]
        else:
            moved = [note._replace(pitch=note.pitch + transposition) for note in part]
            copies = 1 + int(rng.random() < config.double_chance)
            arranged = [_give_program(moved, config, programs, rng) for _ in range(copies)]
        for notes in arranged:
            varied = _vary_notes(_play_freely(notes, config, rng), config, rng)
            if varied:
                first = varied[0]
                instruments.setdefault((first.program, first.is_drum), []).extend(varied)
    return [_separate_strikes(notes) for notes in instruments.values()]


def _split(part: Sequence[Note], chance: float, rng: np.random.Generator) -> list[list[Note]]:
    """Divides a part at a pitch, if it has enough notes on both sides."""
    if part[0].is_drum or rng.random() >= chance:
        return [list(part)]
    limit = np.quantile([note.pitch for note in part], rng.uniform(0.25, 0.75))
    low = [note for note in part if note.pitch < limit]
    high = [note for note in part if note.pitch >= limit]
    return [low, high] if min(len(low), len(high)) >= 2 else [list(part)]


def _give_program(
    part: Sequence[Note],
    config: SyntheticConfig,
    programs: Sequence[int],
    rng: np.random.Generator,
) -> list[Note]:
    """A part played by its own program, another of its class, or any, classes drawn evenly."""
    own, chance = int(part[0].program), rng.random()
    if chance < config.program_redraw_chance:
        classes = sorted({program // 8 for program in programs})
        chosen_class = int(rng.choice(classes))
        program = int(rng.choice([p for p in programs if p // 8 == chosen_class]))
    elif chance < config.program_redraw_chance + config.program_swap_chance:
        program = 8 * (own // 8) + int(rng.integers(8))
    else:
        program = own
    octaves = 0 if program == own else _draw_octaves([note.pitch for note in part], program, rng)
    return [note._replace(pitch=note.pitch + 12 * octaves, program=program) for note in part]


def register_of(program: int) -> tuple[int, int]:
    """Lowest and highest pitch that a program is usually played at."""
    row = bisect.bisect(_REGISTERS, (program, 128, 128)) - 1
    return _REGISTERS[row][1:]


def _draw_octaves(pitches: Sequence[int], program: int, rng: np.random.Generator) -> int:
    """Any number of octaves that brings nearly as many notes as possible into a register."""
    low, high = register_of(program)
    octaves, notes = np.arange(-5, 6), np.array(pitches)
    inside = [np.mean((notes + 12 * o >= low) & (notes + 12 * o <= high)) for o in octaves]
    return int(rng.choice(octaves[np.array(inside) >= 0.95 * max(inside)]))


def redraw_drums(part: Sequence[Note], chance: float, rng: np.random.Generator) -> list[Note]:
    """Each drum of a part may be another, drawn evenly from the pieces of a kit, all along."""
    others: dict[int, int] = {}
    for pitch in sorted({note.pitch for note in part}):
        if rng.random() < chance:
            keys = KIT_PIECES[rng.integers(len(KIT_PIECES))]
            others[pitch] = keys[0] if rng.random() < 0.5 else int(rng.choice(keys))
    return [note._replace(pitch=others.get(note.pitch, note.pitch), program=0) for note in part]


def _play_freely(
    notes: Sequence[Note], config: SyntheticConfig, rng: np.random.Generator
) -> list[Note]:
    """Strums chords and lets notes ring, where an instrument does so."""
    program, is_drum = notes[0].program, notes[0].is_drum
    if not is_drum and program in _STRUMMED and rng.random() < config.strum_chance:
        notes = strum(notes, float(rng.uniform(0.006, 0.025)), rng)
    if not is_drum and program in _RINGING and rng.random() < config.ring_chance:
        notes = let_ring(notes, rng)
    return list(notes)


def strum(notes: Sequence[Note], step: float, rng: np.random.Generator) -> list[Note]:
    """Begins the notes of each chord one after the other, upwards or downwards.

    Args:
      notes: in order of onset.
      step: mean time from string to string, in seconds.
      rng: draws directions and times.
    """
    chords: list[list[Note]] = []
    for note in sort_notes(notes):
        if chords and note.onset - chords[-1][0].onset <= _CHORD_SECONDS:
            chords[-1].append(note)
        else:
            chords.append([note])
    strummed = []
    for chord in chords:
        ordered = sorted(chord, key=lambda note: note.pitch, reverse=bool(rng.random() < 0.4))
        delays = np.cumsum(step * rng.uniform(0.5, 1.5, len(chord)))
        for note, delay in zip(ordered, delays - delays[0], strict=True):
            onset = note.onset + float(delay)
            strummed.append(note._replace(onset=onset, offset=max(note.offset, onset + 0.05)))
    return sort_notes(strummed)


def let_ring(notes: Sequence[Note], rng: np.random.Generator) -> list[Note]:
    """Lengthens notes up to the next change of a pedal, which falls on some of their onsets.

    What is struck where the pedal changes rings up to the change after that.
    """
    spacing = float(np.exp(rng.uniform(*np.log(_RING_SECONDS))))
    changes: list[float] = []
    for onset in sorted({note.onset for note in notes}):
        if not changes or onset - changes[-1] >= spacing:
            changes.append(onset)
    changes.append(max(note.onset for note in notes) + spacing)
    following = np.searchsorted(changes, [note.onset + _CHORD_SECONDS for note in notes])
    ends = [changes[min(int(i), len(changes) - 1)] for i in following]
    return [n._replace(offset=max(n.offset, end)) for n, end in zip(notes, ends, strict=True)]


def _vary_notes(
    notes: Sequence[Note], config: SyntheticConfig, rng: np.random.Generator
) -> list[Note]:
    """Moves onsets and velocities a little; leaves out what would be no pitch of MIDI."""
    shift = rng.normal(0, config.velocity_jitter)
    late = rng.normal(0, config.onset_jitter, len(notes))
    louder = shift + rng.normal(0, config.velocity_jitter, len(notes))
    faintest = MIN_STROKE_VELOCITY if notes[0].is_drum else MIN_VELOCITY
    varied = []
    for note, delay, more in zip(notes, late, louder, strict=True):
        onset = float(np.clip(note.onset + delay, 0, config.seconds - MIN_NOTE_SECONDS))
        offset = max(note.offset + float(delay), onset + MIN_NOTE_SECONDS)
        velocity = int(np.clip(round(note.velocity + more), faintest, 127))
        if 0 <= note.pitch <= 127:
            varied.append(note._replace(onset=onset, offset=offset, velocity=velocity))
    return varied


def _separate_strikes(notes: Sequence[Note]) -> list[Note]:
    """Ends notes where their pitch is struck again; of strikes too close, the first remains."""
    last: dict[int, float] = {}
    apart = []
    for note in sort_notes(notes):
        if note.onset - last.get(note.pitch, -1.0) >= MIN_NOTE_SECONDS:
            last[note.pitch] = note.onset
            apart.append(note)
    return trim_overlaps(apart)
