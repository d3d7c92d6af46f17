"""How a player goes from note to note: lines of one note at a time, glides, swells, vibrato."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mt3_keras.notes import Note
from mt3_keras.synth.sounds import Samples

LEGATO_GAP = 0.06  # seconds; notes closer than this to the last one of their line join it


class Manner(NamedTuple):
    """What a player keeps to throughout a piece; times in seconds.

    Attributes:
      attack: to two thirds of a note's level; 0 for plucked strings.
      release: from a note's end to a third.
      vibrato: semitones.
      vibrato_hz: its rate.
      glide: into the pitch of a note that joins the last one.
      swell: 0 to 1, how much fainter a note is at its ends than in the middle.
    """

    attack: float
    release: float
    vibrato: float
    vibrato_hz: float
    glide: float
    swell: float


def draw_manner(
    attack: tuple[float, float],
    release: tuple[float, float],
    max_vibrato: float,
    rng: np.random.Generator,
) -> Manner:
    """Draws between the shortest and the longest attack and release."""
    return Manner(
        attack=_between(attack, rng),
        release=_between(release, rng),
        vibrato=max_vibrato * rng.uniform() ** 1.5,
        vibrato_hz=rng.uniform(4.5, 6.8),
        glide=_between((0.005, 0.04), rng) if max_vibrato else 0.0,
        swell=rng.uniform(0, 0.6) if attack[1] else 0.0,
    )


def _between(ends: tuple[float, float], rng: np.random.Generator) -> float:
    low, high = ends
    return float(low * (high / low) ** rng.uniform()) if low else 0.0


def split_lines(notes: Sequence[Note], overlap: float) -> list[list[Note]]:
    """Splits notes into lines of one note at a time, each going on from the nearest pitch.

    Args:
      notes: in order of onset.
      overlap: seconds that a line's note may begin before its last one ends.
    """
    lines: list[list[Note]] = []
    for note in notes:
        free = [line for line in lines if line[-1].offset <= note.onset + overlap]
        if free:
            min(free, key=lambda line: abs(line[-1].pitch - note.pitch)).append(note)
        else:
            lines.append([note])
    return lines


def is_joined(line: Sequence[Note], index: int) -> bool:
    """Whether a note of a line goes on from the one before it without a gap."""
    return index > 0 and line[index].onset - line[index - 1].offset < LEGATO_GAP


def bend(time: Samples, interval: float, manner: Manner, rng: np.random.Generator) -> Samples:
    """Glide and vibrato of a note, in semitones.

    Args:
      time: float32 [n], seconds from the note's onset.
      interval: from the note's pitch to that of the note it joins, in semitones; 0 for none.
      manner: how the player glides and vibrates.
      rng: draws where the vibrato begins.
    """
    curve = np.zeros_like(time)
    if interval and manner.glide:
        curve += np.float32(np.clip(interval, -12, 12)) * np.exp(-time / np.float32(manner.glide))
    if manner.vibrato:
        depth = np.float32(manner.vibrato) * np.minimum(time / np.float32(0.35), 1)  # comes late
        turns = manner.vibrato_hz * time + np.float32(rng.uniform())
        curve += depth * np.sin(2 * math.pi * turns, dtype=np.float32)
    return curve


def swell(time: Samples, length: float, manner: Manner) -> Samples:
    """Loudness over a note that grows towards its middle and falls after: float32 [n], up to 1."""
    arch = np.sin(np.minimum(time * np.float32(math.pi / length), math.pi), dtype=np.float32)
    return np.float32(1 - manner.swell) + np.float32(manner.swell) * arch


def fade(time: Samples, length: float, manner: Manner) -> Samples:
    """1 until the note ends, then the release: float32 [n]."""
    return np.exp(np.minimum(np.float32(length) - time, 0) / np.float32(manner.release))
