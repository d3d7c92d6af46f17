"""Candidates of a recording's segments -> its notes, in the graph of a served detector.

A server runs no Python. This is what `RollDecoder` does of a recording that is known as a whole,
for all its notes at once; tests hold the two together. Names are found by the very functions that
it uses (`mt3_keras.instruments`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from mt3_keras.grammar import Rules
from mt3_keras.instruments import class_chances, find_programs, mix, weigh
from mt3_keras.models.config import (
    LOWEST_PITCH,
    NUM_PITCHES,
    PROGRAMS_PER_CLASS,
    DetectorConfig,
)
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.notes import MIN_DURATION

Tensors = dict[str, Any]

# A note of the answer: its fields and their types.
FIELDS = {
    "onset_seconds": tf.float32,
    "offset_seconds": tf.float32,
    "pitch": tf.int32,
    "velocity": tf.int32,
    "program": tf.int32,
    "is_drum": tf.bool,
    "confidence": tf.float32,
}
_KINDS = 128  # of what is struck: pitches, or keys of drums


@dataclasses.dataclass(frozen=True)
class NoteReading:
    """Reads the notes of whole recordings; its functions are traced, not run.

    Args:
      config: of the network.
      decoding: how its outputs are read.
      rules: which programs may play, and whether drums may.
    """

    config: DetectorConfig
    decoding: RollDecoding
    rules: Rules

    def read(self, found: Tensors) -> Tensors:
        """The notes of one recording.

        Args:
          found: "onsets" float32 [S, K, 5], "programs" float32 [S, K, 128], "strokes" float32
            [S, D, 4] as `NoteDetector.detect` gives them; "ended" bool [S, F, NUM_PITCHES], whether
            a note has ended; "num_frames" int32 [S], of each segment.

        Returns:
          `FIELDS`, each [n], in the order of `notes.sort_notes`.
        """
        parts = [self._pitched(found), self._strokes(found)]
        notes = {name: tf.concat([part[name] for part in parts], axis=0) for name in FIELDS}
        order = tf.range(tf.size(notes["pitch"]))
        for name in ("offset_seconds", "pitch", "program", "is_drum", "onset_seconds"):
            key = tf.gather(notes[name], order)
            key = tf.cast(key, tf.int32) if key.dtype == tf.bool else key
            order = tf.gather(order, tf.argsort(key, stable=True))
        return {name: tf.cast(tf.gather(notes[name], order), FIELDS[name]) for name in FIELDS}

    def _pitched(self, found: Tensors) -> Tensors:
        limit, programs = self.decoding.onset_limit, self.rules.programs
        if programs is not None and not programs:
            limit = 2.0  # none is so probable
        rows, where = self._begun(found["onsets"], found["num_frames"], limit)
        pitch = tf.cast(tf.round(rows[:, 1]), tf.int64)
        frame = self._frames(rows, where)
        names = self._name(tf.gather_nd(found["programs"], where), rows[:, 1])
        struck = _first_of_each(pitch, frame, self._same_strike)
        pitch, frame, rows, names = (tf.gather(x, struck) for x in (pitch, frame, rows, names))
        onset, end = self._times(pitch, frame, found)
        first = tf.range(tf.size(pitch))
        second = tf.boolean_mask(first, rows[:, 4] >= self.decoding.unison_limit)
        second = second[: tf.size(second) * (names.shape[1] - 1)]
        both = tf.concat([first, second], axis=0)
        rank = tf.concat([tf.zeros_like(first), tf.ones_like(second)], axis=0)
        notes = {
            "onset_seconds": onset,
            "offset_seconds": tf.maximum(end, onset + MIN_DURATION),
            "pitch": tf.cast(pitch, tf.int32),
            "velocity": tf.cast(tf.round(rows[:, 3]), tf.int32),
            "confidence": rows[:, 2],
        }
        notes = {name: tf.gather(values, both) for name, values in notes.items()}
        notes["program"] = tf.gather_nd(names, tf.stack([both, rank], axis=1))
        return notes | {"is_drum": tf.fill([tf.size(both)], False)}

    def _strokes(self, found: Tensors) -> Tensors:
        """Of drums that are alike and struck at once, the surest alone."""
        limit = self.decoding.stroke_limit if self.rules.drums else 2.0
        strokes = self._drop_similar(found["strokes"], found["num_frames"], limit)
        rows, where = self._begun(strokes, found["num_frames"], limit)
        kind = self._kinds(rows[:, 1])
        frame = self._frames(rows, where)
        struck = _first_of_each(kind, frame, self._same_strike)
        rows, frame = tf.gather(rows, struck), tf.gather(frame, struck)
        onset = self._seconds(frame)
        return {
            "onset_seconds": onset,
            "offset_seconds": onset + MIN_DURATION,
            "pitch": tf.cast(tf.round(rows[:, 1]), tf.int32),
            "velocity": tf.cast(tf.round(rows[:, 3]), tf.int32),
            "program": tf.zeros_like(frame, tf.int32),
            "is_drum": tf.ones_like(frame, tf.bool),
            "confidence": rows[:, 2],
        }

    def _drop_similar(self, strokes: Any, num_frames: Any, limit: float) -> Any:
        """Strokes [S, D, 4], the likeliest first, those that others stand for made impossible."""
        kind, chance = self._kinds(strokes[:, :, 1]), strokes[:, :, 2]
        near = tf.abs(strokes[:, :, None, 0] - strokes[:, None, :, 0]) <= self._same_strike
        is_alike = near & (kind[:, :, None] == kind[:, None, :])
        may = (chance >= limit) & (strokes[:, :, 0] < tf.cast(num_frames[:, None], tf.float32))
        places = tf.range(strokes.shape[1])

        def decide(i: Any, kept: Any) -> Any:
            taken = tf.reduce_any(kept & is_alike[:, i], axis=1)
            return kept | ((may[:, i] & ~taken)[:, None] & (places == i))

        kept = ops.fori_loop(0, strokes.shape[1], decide, tf.zeros_like(may))
        chance = tf.where(kept, chance, 0.0)[:, :, None]
        return tf.concat([strokes[:, :, :2], chance, strokes[:, :, 3:]], axis=2)

    def _begun(self, candidates: Any, num_frames: Any, limit: float) -> tuple[Any, Any]:
        """Candidates [S, K, ...] that count, [n, ...], and their places [n, 2]."""
        chance, frame = candidates[:, :, 2], candidates[:, :, 0]
        is_own = frame < tf.cast(num_frames[:, None], tf.float32)
        where = tf.where((chance >= limit) & (chance > 0) & is_own)
        return tf.gather_nd(candidates, where), where

    def _frames(self, rows: Any, where: Any) -> Any:
        """Frames of the recording, int64 [n]."""
        return where[:, 0] * self.config.network.segment_frames + tf.cast(rows[:, 0], tf.int64)

    def _kinds(self, keys: Any) -> Any:
        """The first key of those like a drum's, int64."""
        first = np.arange(_KINDS)
        for group in self.decoding.similar_drums:
            first[list(group)] = group[0]
        return tf.gather(tf.constant(first, tf.int64), tf.cast(tf.round(keys), tf.int32))

    @property
    def _same_strike(self) -> int:
        """Frames within which two onsets are one."""
        return math.floor(self.decoding.same_strike * self._rate + 1e-6)

    @property
    def _rate(self) -> float:
        return self.config.spectrogram.frames_per_second

    def _seconds(self, frame: Any) -> Any:
        return (tf.cast(frame, tf.float64) + 0.5) / self._rate

    def _name(self, chances: Any, pitches: Any) -> Any:
        """Programs, int32 [n, 1 or 2], of all notes together; chances [n, 128] of each alone."""
        allowed = sorted(range(128) if self.rules.programs is None else self.rules.programs)
        classes = sorted({program // PROGRAMS_PER_CLASS for program in allowed})
        if not classes:  # and so no notes
            return tf.zeros([tf.size(pitches), 1], tf.int32)
        own = weigh(class_chances(chances, tf.cast(pitches, tf.float32), ops), classes, ops)
        own = tf.cast(own, tf.float64)
        loop, shrink = ops.fori_loop, self.decoding.shrink
        shares = mix(own, tf.cast(pitches, tf.float64), shrink, xp=ops, loop=loop)
        shares = tf.cast(shares, tf.float32)
        return find_programs(chances, shares, allowed, min(2, len(classes)), ops)

    def _times(self, pitch: Any, frame: Any, found: Tensors) -> tuple[Any, Any]:
        """Seconds at which notes begin and end, given all of each pitch in order of time.

        They end with the sound, at the next onset of the pitch, or with the recording.
        """
        total = tf.cast(tf.reduce_sum(found["num_frames"]), tf.int64)
        ended = tf.reshape(found["ended"], [-1, NUM_PITCHES])[:total]
        ended = tf.transpose(ended)
        column, first = pitch - LOWEST_PITCH, frame + self.decoding.shortest
        length = total + self.decoding.shortest + 1
        # Where one sounds at first, its end is among the frames in which the ended begin.
        inside = tf.stack([column, tf.minimum(first, total - 1)], axis=1)
        at_once = tf.gather_nd(ended, inside) & (first < total)
        places = tf.where(ended[:, 1:] & ~ended[:, :-1])
        later = _following(
            places[:, 0] * length + places[:, 1] + 1, column * length + first, length
        )
        struck = column * length + frame
        again = _following(struck, struck + 1, length)
        end = tf.minimum(tf.where(at_once, first, later), again)
        onset = self._seconds(frame)
        latest = tf.cast(total, tf.float64) / self._rate
        is_open = end >= total
        begun = tf.where(is_open, onset + MIN_DURATION, 0.0)
        latest = tf.maximum(latest, tf.reduce_max(begun))  # one may begin in the last frame
        return onset, tf.where(is_open, latest, self._seconds(end))


def _following(keys: Any, wanted: Any, length: Any) -> Any:
    """The first of sorted keys, row * length + frame, from each wanted one on: its frame.

    Where its row has none, `length`.
    """
    place = _lower_bound(keys, wanted)
    key = tf.gather(tf.concat([keys, [-1]], axis=0), place)
    is_of_row = key // length == wanted // length
    return tf.where(is_of_row, key % length, length)


def _lower_bound(keys: Any, wanted: Any) -> Any:
    """`tf.searchsorted`, which fails where there is nothing to search."""
    return tf.raw_ops.LowerBound(sorted_inputs=keys[None], values=wanted[None])[0]


def _first_of_each(kind: Any, frame: Any, reach: int) -> Any:
    """Places of the strikes that are not the one before of their kind, by kind and frame.

    A strike is another one if it is more than `reach` frames after the last that was: a chain from
    the first of each kind on. All chains are followed at once, in steps that double.
    """
    length = tf.reduce_max(tf.concat([frame, [0]], axis=0)) + reach + 2
    keys = kind * length + frame
    order = tf.argsort(keys, stable=True)
    keys, kind, number = tf.gather(keys, order), tf.gather(kind, order), tf.size(kind)
    step = _lower_bound(keys, keys + reach + 1)  # `number` is past the last
    is_same = tf.gather(tf.concat([kind, [-1]], axis=0), step) == kind
    step = tf.concat([tf.where(is_same, step, number), [number]], axis=0)
    is_struck = tf.concat([[True], kind[1:] != kind[:-1]], axis=0)[:number]

    def double(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        is_struck, step = state
        reached = tf.boolean_mask(step, is_struck)[:, None]
        reached = tf.scatter_nd(reached, tf.ones_like(reached[:, 0]), [number + 1]) > 0
        return is_struck | reached, tf.gather(step, step)

    num_doublings = 31  # as many places as int32 can tell apart
    start = (tf.concat([is_struck, [False]], axis=0), step)
    is_struck, _ = ops.fori_loop(0, num_doublings, double, start)
    return tf.boolean_mask(order, is_struck[:number])
