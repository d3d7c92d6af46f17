"""Notes -> the rolls that a detector is to predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import HEADS, LOWEST_PITCH, NUM_CLASSES, NUM_PITCHES, DetectorConfig
from mt3_keras.notes import Note, map_program

Rolls = dict[str, NDArray[np.int8]]
Packed = dict[str, NDArray[Any]]

PITCH_HEADS = ("onset", "offset", "frame")  # bits of one byte for each pitch
BIT_HEADS = ("drum", "program")  # eight columns a byte


def roll_targets(
    notes: Sequence[Note],
    first_frame: int,
    *,
    num_frames: int,
    segment_frames: int,
    frames_per_second: float,
) -> Rolls:
    """The rolls of a chunk (see `config.HEADS` and `models.detector`).

    Args:
      notes: of the example, times from its start.
      first_frame: of the chunk, counted from the start of the example.
      num_frames: of the chunk; later frames of the segment are -1, not to be learned from.

    Returns:
      int8 [segment_frames, N] for each head: 0 and 1; of "strength" 1 to 127 at onsets, -1
      elsewhere; of "class" -1 where the pitch is silent.
    """
    rolls = {head: np.zeros((segment_frames, size), np.int8) for head, size in HEADS.items()}
    rolls["strength"][:] = -1
    rolls["class"][:] = -1
    classes = rolls["class"].reshape(segment_frames, NUM_PITCHES, NUM_CLASSES)
    for note in notes:
        onset = math.floor(note.onset * frames_per_second) - first_frame
        offset = math.floor(note.offset * frames_per_second) - first_frame
        if note.is_drum:
            if 0 <= onset < num_frames:
                rolls["drum"][onset, note.pitch] = 1
                _raise_to(rolls["strength"], onset, NUM_PITCHES, note.velocity)
            continue
        sounding = slice(max(0, onset), max(0, onset + 1, offset))
        program = map_program(note.program, "midi_class")
        rolls["program"][sounding, program] = 1
        column = note.pitch - LOWEST_PITCH
        if 0 <= column < NUM_PITCHES:
            rolls["frame"][sounding, column] = 1
            cells = classes[sounding, column]
            np.maximum(cells, 0, out=cells)
            cells[:, program // 8] = 1
            for head, frame in (("onset", onset), ("offset", offset)):
                if 0 <= frame < num_frames:
                    rolls[head][frame, column] = 1
            if 0 <= onset < num_frames:
                _raise_to(rolls["strength"], onset, column, note.velocity)
    for roll in rolls.values():
        roll[num_frames:] = -1
    return rolls


def _raise_to(roll: NDArray[np.int8], frame: int, column: int, value: int) -> None:
    roll[frame, column] = max(roll[frame, column], value)


def pack(
    samples: NDArray[np.float32],
    notes: Sequence[Note],
    config: DetectorConfig,
    *,
    piece_frames: int,
    num_frames: int,
    first_frame: int = 0,
) -> Packed:
    """A piece and its targets in little space: audio as int16, rolls as bits.

    Args:
      samples: float32, from `lead_samples` before the piece to `overhang_samples` after it; zeros
        follow where there are fewer than of `piece_frames`.
      notes: of the example that the piece is of, times from its start.
      piece_frames: that there is space for.
      num_frames: of the piece.
      first_frame: where the piece begins in its example.

    Returns:
      "samples" int16 [lead + hop * piece_frames + overhang]; "num_frames" int32; "pitches" uint8
      [F, 88], "strength" int8 [F, 89], "classes" uint16 [F, 88], "drum" and "program" uint8
      [F, 16].
    """
    spectrogram = config.spectrogram
    rolls = roll_targets(
        notes,
        first_frame,
        num_frames=num_frames,
        segment_frames=piece_frames,
        frames_per_second=spectrogram.frames_per_second,
    )
    on = {head: (roll > 0).astype(np.uint8) for head, roll in rolls.items()}
    classes = on["class"].reshape(-1, NUM_PITCHES, NUM_CLASSES)
    pcm = np.round(np.clip(samples, -1, 1) * (2**15 - 1)).astype(np.int16)
    length = piece_frames * spectrogram.hop_samples
    space = spectrogram.lead_samples + length + spectrogram.overhang_samples
    return {
        "samples": np.pad(pcm, (0, space - len(pcm))),
        "num_frames": np.array(num_frames, np.int32),
        "pitches": np.bitwise_or.reduce([on[head] << i for i, head in enumerate(PITCH_HEADS)]),
        "strength": rolls["strength"],
        "classes": classes @ (1 << np.arange(NUM_CLASSES)).astype(np.uint16),
        **{head: np.packbits(on[head], axis=-1) for head in BIT_HEADS},
    }
