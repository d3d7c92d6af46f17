"""What the tokens so far imply, and which tokens may follow.

Runs on a batch of sequences at once, all state fixed in shape: inside a compiled search with
`keras.ops`, beside LiteRT with numpy alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mt3_keras.codec import EOS, NUM_SPECIAL, Codec
from mt3_keras.models.config import ModelConfig
from mt3_keras.notes import map_program

State = dict[str, Any]

OTHER, SHIFT, PITCH, VELOCITY, TIE, PROGRAM, DRUM = range(7)
KINDS = {"shift": SHIFT, "pitch": PITCH, "velocity": VELOCITY, "tie": TIE, "program": PROGRAM}
KINDS["drum"] = DRUM
TIE_SECTION, BODY = 0, 1
# What a network may be told of the tokens so far.
STATE = ("time", "program", "velocity", "section")
NUM_VALUES = 128  # of a program or a velocity, at most

# Between two strikes of a key or drum, in targets whose times are joined. Players are slower; a
# young model tells one strike twice.
REST_STEPS = 5
# More tokens than any chord needs between two shifts: beyond, a sequence is only repeating itself.
MAX_TOKENS_WITHOUT_PROGRESS = 160


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a search may write. The default is all the original's search may.

    Attributes:
      programs: only these programs may appear; None allows all.
      drums: whether drums may appear.
      constrained: only tokens that are legal in the current state: the tie section first and in
        order, time never backwards, no note-off for a silent note, nothing struck twice at once
        (`ordered` networks: within 50 ms), no state that changes nothing, nothing left
        unfinished. A young or confused model is kept from most of its nonsense; an attentive one
        is not disturbed. None is True for networks that are told what their tokens imply, which
        they learn from legal sequences.
      stop_runaways: end a segment that passes its own end or that writes on and on without
        getting ahead in time. Such a segment otherwise runs into `max_tokens`.
    """

    programs: frozenset[int] | None = None
    drums: bool = True
    constrained: bool | None = None
    stop_runaways: bool = False

    def for_model(self, config: ModelConfig) -> Rules:
        """The same with nothing left open."""
        if self.constrained is not None:
            return self
        return dataclasses.replace(self, constrained=config.network.state_inputs)

    @property
    def restricts_tokens(self) -> bool:
        return bool(self.constrained) or self.programs is not None or not self.drums


class Grammar:
    """Follows a batch of token sequences, each within one segment.

    The state of B sequences is a dict of int32 and bool tensors: "time" (steps since the start of
    the segment), "program" and "velocity" (-1 before the first), "section" (`TIE_SECTION` or
    `BODY`), "last" (kind of the last token) and what only some rules need.

    Args:
      config, rules: of the sequences.
      xp: the module that computes, `keras.ops` or `numpy`.
    """

    def __init__(self, config: ModelConfig, rules: Rules, xp: Any) -> None:
        self._xp = xp
        self.codec = Codec(config.vocabulary.num_velocity_bins)
        self.rules = rules.for_model(config)
        self._has_ties = config.vocabulary.ties
        self._has_programs = config.vocabulary.granularity != "flat"
        self._num_rows = config.network.vocabulary_rows
        self._max_tokens = config.network.max_tokens
        self._rest_steps = REST_STEPS if config.network.ordered else 1
        # The last frame begins within the segment, its event may round up.
        self._max_step = int(np.ceil(config.segment_seconds * self.codec.steps_per_second))
        self._kinds = np.zeros(self._num_rows, np.int32)
        self._values = np.zeros(self._num_rows, np.int32)
        for name, kind in KINDS.items():
            first, last = self.codec.token_range(name)
            self._kinds[first : last + 1] = kind
            self._values[first : last + 1] = np.arange(last + 1 - first)
        programs, granularity = self.rules.programs, config.vocabulary.granularity
        mapped = {map_program(program, granularity) for program in programs or ()}
        self._program_allowed = np.array([programs is None or p in mapped for p in range(128)])

    def start(self, batch_size: int) -> State:
        """The state before the first token."""

        def full(value: int) -> Any:
            return self._xp.full((batch_size,), value, "int32")

        state = {
            "time": full(0),
            "program": full(-1 if self._has_programs else 0),
            "velocity": full(-1),
            "section": full(TIE_SECTION if self._has_ties else BODY),
            "last": full(OTHER),
        }
        if self.rules.stop_runaways:
            state |= {"furthest": full(0), "without_progress": full(0)}
        if self.rules.constrained:
            state |= {
                "tied_pitch": full(-1),
                "sounding": self._xp.zeros((batch_size, 128, 128), "bool"),  # program, pitch
                # Step of the last strike.
                "struck": self._xp.full((batch_size, 128, 128), -self._rest_steps, "int32"),
                "struck_drums": self._xp.full((batch_size, 128), -self._rest_steps, "int32"),
            }
        return state

    def advance(self, state: State, tokens: Any) -> State:
        """The state after one more token for each sequence, int32 [B]."""
        kind = self._xp.take(self._kinds, tokens)
        value = self._xp.take(self._values, tokens)
        is_shift = kind == SHIFT
        before = self._xp.where(state["last"] == SHIFT, state["time"], 0)  # shifts in a row add up
        new = {
            **state,
            "time": self._xp.where(is_shift, before + value, state["time"]),
            "program": self._xp.where(kind == PROGRAM, value, state["program"]),
            "velocity": self._xp.where(kind == VELOCITY, value, state["velocity"]),
            "section": self._xp.where(kind == TIE, BODY, state["section"]),
            "last": kind,
        }
        if self.rules.stop_runaways:
            gets_ahead = new["time"] > state["furthest"]
            new["furthest"] = self._xp.maximum(new["time"], state["furthest"])
            new["without_progress"] = self._xp.where(gets_ahead, 0, state["without_progress"] + 1)
        if self.rules.constrained:
            new |= self._advance_sounding(state, kind, value)
        return new

    def follow(self, tokens_BL: Any) -> State:
        """Whole sequences: the state after each token, int32 [B, L], as `advance` steps to it.

        "time", "program", "velocity" and "section" only.
        """
        kind = self._xp.take(self._kinds, tokens_BL)
        value = self._xp.take(self._values, tokens_BL)
        is_shift = kind == SHIFT
        shifted = self._xp.cumsum(self._xp.where(is_shift, value, 0), axis=1)
        begins = is_shift & ~self._xp.pad(is_shift, [(0, 0), (1, 0)])[:, :-1]
        # Of each kind the last one so far: sums only grow; a value goes with its place, and a
        # maximum over places finds the latest.
        place = (self._xp.arange(self._xp.shape(tokens_BL)[1]) + 1) * NUM_VALUES
        last = self._xp.stack(
            [
                self._xp.where(begins, shifted - value, 0),
                self._xp.where(kind == PROGRAM, place + value, 0),
                self._xp.where(kind == VELOCITY, place + value, 0),
            ]
        )
        reach = 1
        while reach < self._max_tokens:
            earlier = self._xp.pad(last, [(0, 0), (0, 0), (reach, 0)])[
                :, :, : self._xp.shape(last)[2]
            ]
            last, reach = self._xp.maximum(last, earlier), 2 * reach
        before, program, velocity = self._xp.unstack(last, 3)
        start = self.start(1)
        return {
            "time": shifted - before,
            "program": self._xp.where(program > 0, program % NUM_VALUES, start["program"]),
            "velocity": self._xp.where(velocity > 0, velocity % NUM_VALUES, start["velocity"]),
            "section": self._xp.where(
                self._xp.cumsum(kind == TIE, axis=1) > 0, BODY, start["section"]
            ),
        }

    def _advance_sounding(self, state: State, kind: Any, value: Any) -> State:
        value_B128 = value[:, None] == np.arange(128)
        program_B128 = state["program"][:, None] == np.arange(128)
        is_pitch = (kind == PITCH)[:, None, None]
        note = program_B128[:, :, None] & value_B128[:, None, :] & is_pitch
        in_ties = (state["section"] == TIE_SECTION)[:, None, None]
        is_on = (state["velocity"] > 0)[:, None, None] | in_ties
        time, is_drum = state["time"][:, None], (kind == DRUM)[:, None]
        tied = self._xp.where((kind == PITCH) & (state["section"] == TIE_SECTION), value, -1)
        return {
            "tied_pitch": self._xp.where(
                kind == PROGRAM, -1, self._xp.maximum(tied, state["tied_pitch"])
            ),
            "sounding": self._xp.where(note, is_on, state["sounding"]),
            "struck": self._xp.where(note & is_on & ~in_ties, time[:, :, None], state["struck"]),
            "struck_drums": self._xp.where(value_B128 & is_drum, time, state["struck_drums"]),
        }

    def runs_away(self, state: State) -> Any:
        """Bool [B]: sequences that should end here."""
        too_far = state["time"] > self._max_step
        return too_far | (state["without_progress"] > MAX_TOKENS_WITHOUT_PROGRESS)

    def legal_tokens(self, state: State) -> Any:
        """Bool [B, V]: which tokens the rules allow next."""
        program = state["program"]
        ends = known = self._xp.ones_like(program, dtype="bool")
        if self.rules.programs is not None:
            index = self._xp.maximum(program, 0)
            known = (program >= 0) & self._xp.take(self._program_allowed, index)
        parts = {name: known[:, None] if name == "pitch" else ends[:, None] for name in KINDS}
        parts["program"] = parts["program"] & self._program_allowed
        parts["drum"] = parts["drum"] & self.rules.drums
        if self.rules.constrained:
            ends, legal = self._legal_in_context(state)
            parts = {name: part & legal[name] for name, part in parts.items()}

        def spread(legal_BN: Any, count: int) -> Any:
            return self._xp.broadcast_to(legal_BN, (self._xp.shape(program)[0], count))

        special = ends[:, None] & (np.arange(NUM_SPECIAL) == EOS)
        rest = spread(ends[:, None] & False, self._num_rows - NUM_SPECIAL - self.codec.num_events)
        spans = {name: last - first + 1 for name, (first, last) in self._ranges().items()}
        kinds = [spread(parts[name], spans[name]) for name in KINDS]
        return self._xp.concatenate([special, *kinds, rest], axis=1)

    def _ranges(self) -> dict[str, tuple[int, int]]:
        return {name: self.codec.token_range(name) for name in KINDS}

    def _legal_in_context(self, state: State) -> tuple[Any, dict[str, Any]]:
        """Whether a segment may end here, and for each kind bool [B, n] or [B, 1]."""
        program, velocity, last = state["program"], state["velocity"], state["last"]
        in_ties, in_body = state["section"] == TIE_SECTION, state["section"] == BODY
        is_last = {kind: last == kind for kind in range(7)}
        complete = is_last[OTHER] | is_last[PITCH] | is_last[DRUM] | is_last[TIE]
        starts_note = complete | is_last[SHIFT]
        has_program = program >= 0

        index = self._xp.maximum(program, 0)[:, None, None]
        sounding_B128 = self._xp.take_along_axis(state["sounding"], index, axis=1)[:, 0]
        struck_B128 = self._xp.take_along_axis(state["struck"], index, axis=1)[:, 0]
        earliest = state["time"][:, None] - self._rest_steps  # strikes since then bar another
        can_release = self._xp.any(sounding_B128, axis=1) & has_program
        values = np.arange(128)
        is_on, is_off = velocity > 0, velocity == 0
        pitch = (is_on[:, None] & (struck_B128 <= earliest)) | (is_off[:, None] & sounding_B128)
        pitch &= (in_body & has_program)[:, None]
        tied = (in_ties & has_program)[:, None] & (values > state["tied_pitch"][:, None])
        body_program = (in_body & starts_note)[:, None] & (values != program[:, None])
        tie_program = (in_ties & complete)[:, None] & (values > program[:, None])
        bins = np.arange(self.codec.num_velocity_bins + 1)
        new_velocity = (bins != velocity[:, None]) & ((bins > 0) | can_release[:, None])
        new_velocity &= (in_body & (starts_note | is_last[PROGRAM]))[:, None]
        steps = np.arange(self.codec.max_shift_steps + 1)
        shift = (steps > state["time"][:, None]) & (steps <= self._max_step)
        legal = {
            "shift": shift & (in_body & complete)[:, None],
            "pitch": pitch | tied,
            "velocity": new_velocity,
            "tie": (in_ties & complete)[:, None],
            "program": (body_program | tie_program) & self._has_programs,
            "drum": (in_body & is_on & ~is_last[PROGRAM])[:, None]
            & (state["struck_drums"] <= earliest),
        }
        return in_body & complete, legal
