"""The pointer: the decoder looks up what the heads heard at the current time."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.codec import Codec
from mt3_keras.grammar import TIE_SECTION
from mt3_keras.models.config import LOWEST_PITCH, NUM_PITCHES, STEPS_PER_SECOND, ModelConfig
from mt3_keras.models.heads import INITIAL_LOGIT, STEM_HEADS, Rolls

BACKWARDS = -30.0  # added to tokens that do not lead forward; finite, so that no target costs all
POINTED = ("shift", "pitch", "program", "drum")  # kinds of tokens, in the vocabulary's order
NUM_SHIFT_LOGITS = 3
SHIFT_FRAMES = 2  # places per frame at which a shift may lead


def step_to_index(config: ModelConfig, per_second: float, count: int) -> NDArray[np.int32]:
    """For each step of a segment, the interval (of `count`, `per_second`) that holds it.

    A step is a time rounded to the grid of 10 ms, counted from the last point of that grid before
    the segment: on average it lies 5 ms before its name.
    """
    seconds = np.arange(config.max_step + 1) / STEPS_PER_SECOND - 0.5 / STEPS_PER_SECOND
    return np.clip(np.floor(seconds * per_second), 0, count - 1).astype(np.int32)


class Pointer(keras.layers.Layer):
    """Adds what the heads say of the current time to the logits of the next tokens.

    A pitch gets its onset logit if the velocity is on, its offset logit if off, and in the tie
    section its frame logit at the segment's start; a drum gets its onset logit, a program that of
    its sounding. The shift to a step gets three logits of that time, begun as the largest of its
    onsets, offsets and drums, and the logarithm of the chance that the next event stands there:
    that one of the three happens then, and none between now and then. How much of each is a linear
    function of the decoder's state; in the beginning 1, but none of the three logits. Always
    float32.

    In an `ordered` network a pitch or drum that follows another is above it.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        network, per_second = config.network, config.spectrogram.frames_per_second
        self.gains = keras.layers.Dense(
            5 + NUM_SHIFT_LOGITS + 1,
            kernel_initializer="zeros",
            bias_initializer=keras.initializers.Constant([*[1] * 5, *[0] * NUM_SHIFT_LOGITS, 1]),
            dtype="float32",
            name="gains",
        )
        self.shifts = keras.layers.Dense(
            network.frames_per_position * SHIFT_FRAMES * NUM_SHIFT_LOGITS,
            kernel_initializer="zeros",
            dtype="float32",
            name="shifts",
        )
        self.curves = keras.layers.Dense(
            NUM_SHIFT_LOGITS,
            kernel_initializer="identity",
            dtype="float32",
            name="curves",
        )
        self.is_ordered = network.ordered
        self.num_frames, self.num_rows = network.segment_frames, network.vocabulary_rows
        num_places = SHIFT_FRAMES * self.num_frames
        self._frames = step_to_index(config, per_second, self.num_frames)
        self._places = step_to_index(config, SHIFT_FRAMES * per_second, num_places)
        codec = Codec(config.vocabulary.num_velocity_bins)
        self._first = {kind: codec.token_range(kind)[0] for kind in POINTED}

    def build(self, width: int) -> None:
        self.gains.build((None, width))
        self.shifts.build((None, width))
        self.curves.build((None, NUM_SHIFT_LOGITS))

    def tables(self, encoded: Any, rolls: Rolls) -> dict[str, Any]:
        """What is looked up in a segment, computed once: name -> float32 [B, ...]."""
        pitches = [_all_pitches(_nearby_max(rolls[head])) for head in STEM_HEADS]
        onset, offset, frame = pitches
        places_BXS = ops.reshape(
            self.shifts(encoded), (-1, SHIFT_FRAMES * self.num_frames, NUM_SHIFT_LOGITS)
        )
        loudest = [ops.max(rolls[head], axis=-1) for head in ("onset", "offset", "drum")]
        curves_BFS = self.curves(ops.stack(loudest, axis=-1))
        events_BTS = ops.take(places_BXS, self._places, axis=1)
        events_BTS += ops.take(curves_BFS, self._frames, axis=1)
        # Chance of no event at a step: the product of 1 - sigmoid. Its logarithm is -quiet.
        quiet_BT = ops.sum(ops.softplus(events_BTS), axis=-1)
        past_BT = ops.cumsum(quiet_BT, axis=1)
        next_BT = ops.log(ops.maximum(1 - ops.exp(-quiet_BT), 1e-6)) - (past_BT - quiet_BT)
        shifts_BTS = ops.concatenate([events_BTS, next_BT[..., None]], axis=-1)
        others = [_nearby_max(rolls[head]) for head in ("drum", "program")]
        return {
            "pointer_rolls": ops.concatenate([onset, offset, *others], axis=-1),
            "pointer_ties": frame[:, 0],
            "pointer_shifts": ops.transpose(shifts_BTS, (0, 2, 1)),
            "pointer_past": past_BT,
        }

    def call(self, x_BLD: Any, tokens: Any, state: dict[str, Any], tables: dict[str, Any]) -> Any:
        """Decoder states, tokens and what they imply so far, all [B, L] -> logits [B, L, V]."""
        gains_BL9 = self.gains(x_BLD)
        num_steps = len(self._frames)
        time = ops.minimum(state["time"], num_steps - 1)
        place = ops.take(self._frames, time)
        place_BLF = ops.one_hot(place, self.num_frames, dtype="float32")
        at_time = ops.matmul(place_BLF, tables["pointer_rolls"])
        onset, offset, drum, program = [at_time[..., i * 128 : (i + 1) * 128] for i in range(4)]
        gain = [gains_BL9[..., i : i + 1] for i in range(5)]
        is_on = (state["velocity"] > 0)[..., None]
        pitch = ops.where(is_on, gain[0] * onset, gain[1] * offset)
        is_tie = (state["section"] == TIE_SECTION)[..., None]
        pitch = ops.where(is_tie, gain[2] * tables["pointer_ties"][:, None], pitch)
        shift = ops.matmul(gains_BL9[..., 5:], tables["pointer_shifts"])
        time_BLT = ops.one_hot(time, num_steps, dtype="float32")
        shift += gains_BL9[..., -1:] * ops.matmul(time_BLT, tables["pointer_past"][..., None])
        goes_back = np.arange(num_steps) <= state["time"][..., None]
        parts = {
            "shift": ops.where(goes_back, BACKWARDS, shift),
            "pitch": pitch,
            "program": gain[4] * program,
            "drum": gain[3] * drum,
        }
        if self.is_ordered:
            for kind in ("pitch", "drum"):
                value = ops.cast(tokens, "int32")[..., None] - self._first[kind]
                goes_back = (np.arange(128) <= value) & (value < 128)
                parts[kind] = ops.where(goes_back, BACKWARDS, parts[kind])
        return self._to_tokens(parts)

    def _to_tokens(self, parts: dict[str, Any]) -> Any:
        """Parts [B, L, n] at their places in the vocabulary [B, L, V], zeros elsewhere."""
        starts = [0, *(self._first[kind] for kind in POINTED[1:]), self.num_rows]
        padded = []
        for (kind, part), start, end in zip(parts.items(), starts, starts[1:], strict=False):
            before = self._first[kind] - start
            after = end - start - before - part.shape[-1]
            padded.append(ops.pad(part, [(0, 0), (0, 0), (before, after)]))
        return ops.concatenate(padded, axis=-1)


def _nearby_max(roll_BFN: Any) -> Any:
    """Maximum over each frame and its two neighbours: times are rounded."""
    held = ops.concatenate([roll_BFN[:, :1], roll_BFN, roll_BFN[:, -1:]], axis=1)
    return ops.maximum(ops.maximum(held[:, :-2], held[:, 1:-1]), held[:, 2:])


def _all_pitches(roll_BF88: Any) -> Any:
    """[B, F, NUM_PITCHES] -> [B, F, 128]; pitches off the piano count as silent."""
    beyond = 128 - LOWEST_PITCH - NUM_PITCHES
    pad = [(0, 0), (0, 0), (LOWEST_PITCH, beyond)]
    return ops.pad(roll_BF88, pad, constant_values=INITIAL_LOGIT)
