"""What the tokens so far imply, which tokens may follow, and the one rule that picks the next.

Runs on a batch of sequences at once, all state fixed in shape: inside a compiled search with
`keras.ops`, beside LiteRT with numpy alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mt3_keras.codec import EOS, NUM_SPECIAL, Codec
from mt3_keras.models.config import TokenConfig
from mt3_keras.notes import map_program

State = dict[str, Any]

OTHER, SHIFT, PITCH, VELOCITY, TIE, PROGRAM, DRUM = range(7)
KINDS = {"shift": SHIFT, "pitch": PITCH, "velocity": VELOCITY, "tie": TIE, "program": PROGRAM}
KINDS["drum"] = DRUM
TIE_SECTION, BODY = 0, 1
MASKED = -1e10  # score of what must not be chosen or attended to, as in the original

# More tokens than any chord needs between two shifts: beyond, a sequence is only repeating itself.
MAX_TOKENS_WITHOUT_PROGRESS = 160


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a network may emit. The default is all the original's search may.

    Attributes:
      programs: only these programs may appear; None allows all.
      drums: whether drums may appear.
      constrained: only tokens that are legal in the current state: the tie section first and in
        order, time never backwards, no note-off for a silent note, nothing struck twice at once,
        no state that changes nothing, nothing left unfinished. It keeps a barely trained model
        from most of its nonsense and does not change what a good one emits.
      stop_runaways: end a segment that passes its own end or that emits token after token without
        getting ahead in time. Such a segment otherwise runs into `max_tokens`.
    """

    programs: frozenset[int] | None = None
    drums: bool = True
    constrained: bool = False
    stop_runaways: bool = False

    @property
    def restricts_tokens(self) -> bool:
        """Whether any token is ever ruled out."""
        return self.constrained or self.programs is not None or not self.drums


class Grammar:
    """Follows a batch of token sequences, each within one segment.

    The state of B sequences is a dict of int32 and bool tensors: "time" (steps since the start of
    the segment), "program" and "velocity" (-1 before the first), "section" (`TIE_SECTION` or
    `BODY`), "last" (kind of the last token) and what only some rules need.

    Args:
      config: of the network that predicts the tokens.
      rules: which tokens may be emitted.
      xp: the module that computes, `keras.ops` or `numpy`.
    """

    def __init__(self, config: TokenConfig, rules: Rules, xp: Any) -> None:
        self._xp = xp
        self.codec = Codec(config.vocabulary.num_velocity_bins)
        self.rules = rules
        self._has_ties = config.vocabulary.ties
        self._has_programs = config.vocabulary.granularity != "flat"
        self._num_rows = config.network.vocabulary_rows
        self._max_step = config.max_step
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
                "struck": self._xp.full((batch_size, 128, 128), -1, "int32"),
                "struck_drums": self._xp.full((batch_size, 128), -1, "int32"),
            }
        return state

    def choose(
        self, state: State, logits: Any, pick: Callable[[Any], Any] | None = None
    ) -> tuple[Any, State, Any]:
        """The rule of every search: mask, pick, advance, stop.

        Args:
          state: of the tokens so far.
          logits: float [B, V], of the next token.
          pick: masked logits -> tokens int32 [B]; None takes the most probable.

        Returns:
          The next tokens int32 [B], EOS where a runaway sequence is stopped; the state after them;
          bool [B], where a sequence ends.
        """
        if self.rules.restricts_tokens:
            logits = self._xp.where(self.legal_tokens(state), logits, MASKED)
        tokens = pick(logits) if pick else self._argmax(logits)
        if self.follows:
            state = self.advance(state, tokens)
            if self.rules.stop_runaways:
                tokens = self._xp.where(self.runs_away(state), EOS, tokens)
        return tokens, state, tokens == EOS

    @property
    def follows(self) -> bool:
        """Whether any rule depends on the tokens so far; else their state is not kept."""
        return self.rules.restricts_tokens or self.rules.stop_runaways

    def _argmax(self, logits: Any) -> Any:
        best = self._xp.argmax(logits, axis=-1)
        return best.astype(np.int32) if self._xp is np else self._xp.cast(best, "int32")

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
        time = state["time"][:, None]
        can_release = self._xp.any(sounding_B128, axis=1) & has_program
        values = np.arange(128)
        is_on, is_off = velocity > 0, velocity == 0
        pitch = (is_on[:, None] & (struck_B128 < time)) | (is_off[:, None] & sounding_B128)
        pitch &= (in_body & has_program)[:, None]
        tied = (in_ties & has_program)[:, None] & (values > state["tied_pitch"][:, None])
        body_program = (in_body & starts_note)[:, None] & (values != program[:, None])
        tie_program = (in_ties & complete)[:, None] & (values > program[:, None])
        bins = np.arange(self.codec.num_velocity_bins + 1)
        new_velocity = (bins != velocity[:, None]) & ((bins > 0) | can_release[:, None])
        new_velocity &= (in_body & (starts_note | is_last[PROGRAM]))[:, None]
        steps = np.arange(self.codec.max_shift_steps + 1)
        shift = (steps > time) & (steps <= self._max_step)
        legal = {
            "shift": shift & (in_body & complete)[:, None],
            "pitch": pitch | tied,
            "velocity": new_velocity,
            "tie": (in_ties & complete)[:, None],
            "program": (body_program | tie_program) & self._has_programs,
            "drum": (in_body & is_on & ~is_last[PROGRAM])[:, None] & (state["struck_drums"] < time),
        }
        return in_body & complete, legal
