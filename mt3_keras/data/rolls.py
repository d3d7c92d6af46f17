"""Notes -> what a detector is to predict of an excerpt: rolls, and the programs of some notes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import HEADS, LOWEST_DRUM, LOWEST_PITCH, NUM_DRUMS, NUM_PITCHES
from mt3_keras.notes import Note

Rolls = dict[str, NDArray[np.int8]]

CERTAIN = 100  # the target that stands for 1
# An onset's neighbours are half right: times are not known to the frame, and a network that is a
# frame late should be penalised mildly.
NEIGHBOURS = {-1: 30, 0: CERTAIN, 1: 50}


def roll_targets(
    notes: Sequence[Note],
    first_frame: int,
    *,
    num_frames: int,
    window_frames: int,
    frames_per_second: float,
) -> Rolls:
    """What the network is to predict of an excerpt.

    Args:
      notes: of the example, times from its start.
      first_frame: of the excerpt, counted from the start of the example.
      num_frames: of the excerpt.
      window_frames: of the rolls; those after the excerpt's are -1, not to be learned from.
      frames_per_second: of the rolls.

    Returns:
      int8 rolls [window_frames, N] by head of `config.HEADS`: "onset", "unison" (onsets of a second
      note of the pitch within a frame), "offset", "frame" and "drum", of which `CERTAIN` stands
      for 1; "strength" and "drum_strength", MIDI velocities at onsets and -1 elsewhere.
    """
    rolls = {head: np.zeros((window_frames, size), np.int8) for head, size in HEADS.items()}
    rolls["strength"][:] = rolls["drum_strength"][:] = -1
    struck: set[tuple[int, int]] = set()  # frames and columns of onsets
    for note in notes:
        onset = math.floor(note.onset * frames_per_second) - first_frame
        offset = math.floor(note.offset * frames_per_second) - first_frame
        if note.is_drum:
            column = note.pitch - LOWEST_DRUM
            if 0 <= column < NUM_DRUMS:
                _mark(rolls["drum"], onset, column)
                _raise_to(rolls["drum_strength"], onset, 0, note.velocity)
            continue
        column = note.pitch - LOWEST_PITCH
        if not 0 <= column < NUM_PITCHES:
            continue
        again = any((onset + near, column) in struck for near in (-1, 0, 1))
        struck.add((onset, column))
        _mark(rolls["unison" if again else "onset"], onset, column)
        _mark(rolls["offset"], offset, column)
        _raise_to(rolls["strength"], onset, column, note.velocity)
        rolls["frame"][max(0, onset) : max(0, onset + 1, offset), column] = CERTAIN
    for roll in rolls.values():
        roll[num_frames:] = -1
    return rolls


def _mark(roll: NDArray[np.int8], frame: int, column: int) -> None:
    for near, value in NEIGHBOURS.items():
        _raise_to(roll, frame + near, column, value)


def _raise_to(roll: NDArray[np.int8], frame: int, column: int, value: int) -> None:
    if 0 <= frame < len(roll):
        roll[frame, column] = max(roll[frame, column], value)


def name_targets(
    notes: Sequence[Note],
    first_frame: int,
    *,
    num_frames: int,
    max_notes: int,
    frames_per_second: float,
    rng: np.random.Generator,
) -> dict[str, NDArray[np.int32]]:
    """Notes of an excerpt to be named, at most `max_notes` of them, drawn at random.

    Args:
      notes: of the example, times from its start.
      first_frame: of the excerpt, counted from the start of the example.
      num_frames: of the excerpt.
      max_notes: rows of the result.
      frames_per_second: of the cells.
      rng: draws the notes.

    Returns:
      "cells" int32 [max_notes, 2], frame and pitch column of each note's onset, and "programs"
      int32 [max_notes, 2]: the note's, and that of a note of another program that begins with it
      at its pitch or else its own again; both -1 in rows without a note.
    """
    begins: dict[tuple[int, int], list[int]] = {}
    for note in notes:
        frame = math.floor(note.onset * frames_per_second) - first_frame
        column = note.pitch - LOWEST_PITCH
        if not note.is_drum and 0 <= frame < num_frames and 0 <= column < NUM_PITCHES:
            begins.setdefault((frame, column), []).append(note.program)
    cells = np.full((max_notes, 2), -1, np.int32)
    programs = np.full((max_notes, 2), -1, np.int32)
    keys = list(begins)
    for row, i in enumerate(rng.permutation(len(keys))[:max_notes]):
        frame, column = keys[i]
        near = [p for by in (0, -1, 1) for p in begins.get((frame + by, column), ())]
        cells[row] = keys[i]
        programs[row] = near[0], next((p for p in near if p != near[0]), near[0])
    return {"cells": cells, "programs": programs}
