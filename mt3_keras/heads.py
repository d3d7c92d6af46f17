"""Heads on the encoder, and the pointer by which the decoder uses them.

Every head is a roll, logits float32 [B, F, N]: F is `segment_frames`, N the head's columns in
`config.HEADS`. Frame i stands for the samples [i * hop, (i + 1) * hop) from the segment's start
(`lead_samples` of the network's input come before). Its target is 1 in frame

- "onset", "offset": floor(time * frames_per_second) of a note's on or off, column
  pitch - `LOWEST_PITCH`, notes of all programs together, drums left out;
- "frame": from the onset's frame to the offset's, without the latter but at least one, columns
  as above;
- "drum": of a drum note's onset, column its MIDI pitch 0 to 127;
- "program": in which a note of the program sounds (as "frame"), drums left out, column the program
  0 to 127 after the granularity's map.

"strength" has a target in the frames of onsets only: the note's MIDI velocity / 127, columns as
"onset", and in one more column that of the strongest drum.

Pitches off the piano have no columns of their own and are left out of onset, offset and frame. Of a
note that began before the segment only what lies inside is marked. In training the model's output
holds a roll as f"{head}_logits" beside the tokens' "logits"; the target's name is the head's.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.codec import Codec
from mt3_keras.config import HEADS, LOWEST_PITCH, NUM_PITCHES, STEPS_PER_SECOND, ModelConfig
from mt3_keras.grammar import TIE_SECTION

Rolls = dict[str, Any]  # head -> logits [B, F, N]

STEM_HEADS = ("onset", "offset", "frame")  # those of single pitches, which the stem predicts too
INITIAL_LOGIT = -4.0  # most of a roll is empty
BACKWARDS = -30.0  # added to tokens that do not lead forward; finite, so that no target costs all
NUM_FED_BACK = sum(HEADS.values()) - HEADS["strength"]  # all but the last
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


class Heads(keras.layers.Layer):
    """Encoded frames [B, P, D] -> the same with what the heads found, and the rolls.

    The logits of pitches are the sum of the stem's, sharp in time, and the encoder's, which knows
    the context.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # the stem's logits stay float32
        self.network = config.network
        self.rolls = keras.layers.Dense(
            self.network.frames_per_position * sum(HEADS.values()),
            bias_initializer=keras.initializers.Constant(self._initial_logits()),
            dtype="float32",
            name="rolls",
        )
        self.num_fed_back = self.network.frames_per_position * NUM_FED_BACK
        self.feedback = None
        if self.network.head_feedback:
            self.feedback = keras.layers.Dense(
                self.network.width,
                use_bias=False,
                kernel_initializer="zeros",
                dtype=self.dtype_policy,
                name="feedback",
            )

    def _initial_logits(self) -> NDArray[np.float32]:
        initial = dict.fromkeys(HEADS, INITIAL_LOGIT) | {"strength": 0.0}
        one_frame = np.repeat([initial[head] for head in HEADS], list(HEADS.values()))
        return np.tile(one_frame, self.network.frames_per_position).astype(np.float32)

    def build(self, encoded_shape: Any) -> None:
        self.rolls.build(encoded_shape)
        if self.feedback:
            self.feedback.build((*encoded_shape[:-1], self.num_fed_back))

    def call(self, encoded: Any, stem_rolls: Any = None) -> tuple[Any, Rolls]:
        """`stem_rolls` float32 [B, F, 3 * NUM_PITCHES]: logits of `STEM_HEADS`, or None."""
        logits_BFN = ops.reshape(
            self.rolls(encoded), (-1, self.network.segment_frames, sum(HEADS.values()))
        )
        if stem_rolls is not None:
            rest = sum(HEADS.values()) - len(STEM_HEADS) * NUM_PITCHES
            logits_BFN += ops.pad(stem_rolls, [(0, 0), (0, 0), (0, rest)])
        if self.feedback:
            found = ops.cast(ops.sigmoid(logits_BFN[..., :NUM_FED_BACK]), self.compute_dtype)
            found = ops.reshape(found, (-1, self.network.num_positions, self.num_fed_back))
            encoded = encoded + self.feedback(found)
        ends = np.cumsum(list(HEADS.values())).tolist()
        starts = [0, *ends[:-1]]
        return encoded, {
            head: logits_BFN[..., start:end]
            for head, start, end in zip(HEADS, starts, ends, strict=True)
        }


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
