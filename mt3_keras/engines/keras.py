"""Networks on Keras: segments in, outputs of segments out in any order.

`RollEngine` runs a detector, one call a batch. `TokenEngine` searches tokens greedily or by beam-1,
many segments in one compiled loop. A batch of rows decodes side by side; a row whose segment is
finished takes the next waiting segment at once (continuous batching), so no row ever waits for the
longest one. That is cheap because positions are added to the embeddings and attention does not care
where in the cache a row stands: all rows write the same slot of a ring, and a mask by age hides
what belongs to a row's earlier segments. What a recurrent network keeps of the tokens so far is
part of a row's memory, which a new segment replaces. A network with several decoders has a row for
each, side by side; the segment is finished when all of them are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from mt3_keras.codec import EOS
from mt3_keras.grammar import MASKED, Grammar, Rules
from mt3_keras.models.detector import NoteDetector
from mt3_keras.outputs import RollOutput, TokenOutput, join_sequences
from mt3_keras.segments import AudioSegment

if TYPE_CHECKING:
    from mt3_keras.models.token_backbone import TokenBackbone

State = dict[str, Any]

SMALLEST_CACHE = 128  # positions; most segments need fewer
METHODS = ("greedy", "beam1")
BREVITY_ALPHA = 0.6
IMPOSSIBLE = -1e7  # T5X's score of a hypothesis that does not exist


class RollEngine:
    """Runs a detector.

    Args:
      model: the network, weights loaded.
      batch_size: segments of one call.
    """

    def __init__(self, model: NoteDetector, *, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive: got {batch_size}")
        self.model_config = model.model_config
        self._batch_size = batch_size
        self._detect = compile_function(lambda _, samples: model.detect(samples), model.variables)

    def run(self, segments: Iterable[AudioSegment]) -> Iterator[tuple[int, RollOutput]]:
        """Yields (index, output) in order; segments are drawn `batch_size` at a time."""
        numbered = enumerate(segments)
        shape = (self._batch_size, self.model_config.input_samples)
        while pool := list(itertools.islice(numbered, self._batch_size)):
            samples = np.zeros(shape, np.float32)
            for row, (_, segment) in zip(samples, pool, strict=False):
                row[:] = segment.samples
            found = self._detect((), ops.convert_to_tensor(samples))
            arrays = {name: _to_numpy(array) for name, array in found.items()}
            for i, (index, _) in enumerate(pool):
                yield index, RollOutput(**{name: array[i] for name, array in arrays.items()})


class TokenEngine:
    """Searches the tokens of segments with a `TokenBackbone`.

    Args:
      model: the network, weights loaded.
      rules: which tokens may be emitted.
      method: "greedy" takes the best token at every step. "beam1" is the rule of the original's
        evaluation, T5X beam search of one beam with brevity alpha 0.6: an EOS in second place is
        remembered as a finished hypothesis and wins if its normalised score does.
      batch_size: segments decoded side by side.
      max_tokens: longest sequence; None takes the model's own limit.
    """

    def __init__(
        self,
        model: TokenBackbone,
        *,
        rules: Rules | None = None,
        method: str = "greedy",
        batch_size: int = 16,
        max_tokens: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive: got {batch_size}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}: got {method!r}")
        self.model, self.model_config = model, model.model_config
        self.method = method
        self.batch_size = batch_size
        self._num_decoders = model.model_config.num_decoders
        self._num_rows = batch_size * self._num_decoders
        self.max_tokens = model.model_config.network.token_limit(max_tokens)
        self.rules = rules or Rules()
        self._grammar = Grammar(model.model_config, self.rules, ops)
        self._run = compile_function(self._run_loop, model.variables)

    def run(self, segments: Iterable[AudioSegment]) -> Iterator[tuple[int, TokenOutput]]:
        """Yields (index, output) as segments finish, in any order.

        Segments are drawn as they are needed, `batch_size` at a time.
        """
        state = self._start(min(SMALLEST_CACHE, self.max_tokens))
        cache_length = self._cache_length(state)
        numbered = enumerate(segments)
        is_last = False
        while not is_last:
            pool = list(itertools.islice(numbered, self.batch_size))
            is_last = len(pool) < self.batch_size
            arrays = self._to_arrays(pool, is_last)
            first, fits = np.int32(0), False
            while not fits:
                state, results, first = self._run(state, *arrays, first)
                yield from _to_outputs(results)
                longest = int(np.max(_to_numpy(state["position"])))
                fits = longest < cache_length
                if not fits:
                    cache_length = min(2 * cache_length, self.max_tokens)
                    state = _resize_cache(state, cache_length)
            if state["cache"] and cache_length > SMALLEST_CACHE and 4 * longest < cache_length:
                cache_length //= 2
                state = _resize_cache(state, cache_length)

    def _to_arrays(self, pool: list[tuple[int, AudioSegment]], is_last: bool) -> tuple[Any, ...]:
        """Waiting segments as arrays of fixed shape, their number, and if they are the last."""
        config = self.model.model_config
        samples = np.zeros((self.batch_size, *config.samples_shape), np.float32)
        num_frames = np.zeros(self.batch_size, np.int32)
        indices = np.full(self.batch_size, -1, np.int32)
        for i, (index, segment) in enumerate(pool):
            samples[i], num_frames[i], indices[i] = segment.samples, segment.num_frames, index
        arrays = (samples, num_frames, indices, np.int32(len(pool)), np.bool_(is_last))
        return tuple(ops.convert_to_tensor(array) for array in arrays)

    def _cache_length(self, state: State) -> int:
        """Positions that fit into the cache; without one, as of a recurrent network, all fit."""
        return next((rows.shape[2] for rows in state["cache"].values()), self.max_tokens)

    def _start(self, cache_length: int) -> State:
        """All places free. A place has a row for each decoder."""
        return {
            "step": ops.zeros((), "int32"),
            "segment": ops.full((self.batch_size,), -1, "int32"),  # -1 for a free place
            "cache": self.model.empty_cache(self._num_rows, cache_length),
            "memory": self.model.empty_memory(self.batch_size),
            **self._start_rows(),
        }

    def _start_rows(self) -> State:
        """What a row forgets when it takes a new segment."""
        rows = self._num_rows
        state = {
            "finished": ops.zeros((rows,), "bool"),
            "token": ops.zeros((rows,), "int32"),
            "position": ops.zeros((rows,), "int32"),
            "written": ops.zeros((rows, self.max_tokens), "int32"),
            "grammar": self._grammar.start(rows),
        }
        if self.method == "beam1":
            state["score"] = ops.zeros((rows,), "float32")
            state["best_score"] = ops.full((rows,), IMPOSSIBLE, "float32")
            state["best_length"] = ops.zeros((rows,), "int32")
        return state

    def _run_loop(
        self,
        state: State,
        samples: Any,
        num_frames: Any,
        indices: Any,
        count: Any,
        is_last: Any,
        first: Any,
    ) -> tuple[State, State, Any]:
        """Decodes until a place is free and no segment waits; all of them if these are the last.

        Also returns early, to be called again, when a row has filled the cache.
        """
        cache_length = self._cache_length(state)
        num_results = 2 * self.batch_size  # those in the places and those that wait
        results = {
            "segment": ops.full((num_results,), -1, "int32"),
            "tokens": ops.zeros((num_results, self._num_decoders, self.max_tokens), "int32"),
            "count": ops.zeros((), "int32"),
        }

        def fits(state: State) -> Any:
            return ops.max(state["position"]) < cache_length

        def has_work(state: State, _results: State, first: Any) -> Any:
            is_free = state["segment"] < 0
            is_busy = ops.where(is_last, ops.any(~is_free), ops.all(~is_free))
            return fits(state) & ((first < count) | is_busy)

        def can_fill(state: State, first: Any) -> Any:
            return (first < count) & ops.any(state["segment"] < 0)

        def fill(state: State, first: Any) -> tuple[State, Any]:
            segment = tuple(_slice_rows(array, first) for array in (samples, num_frames, indices))
            return self._fill_place(state, *segment), first + 1

        def can_step(state: State) -> Any:
            return fits(state) & ~ops.any(_is_over(state)) & ops.any(state["segment"] >= 0)

        def work(state: State, results: State, first: Any) -> tuple[State, State, Any]:
            state, first = ops.while_loop(can_fill, fill, (state, first))
            (state,) = ops.while_loop(can_step, lambda state: (self._step(state),), (state,))
            state, results = ops.while_loop(
                lambda state, _: ops.any(_is_over(state)), _collect_place, (state, results)
            )
            return state, results, first

        return ops.while_loop(has_work, work, (state, results, first))

    def _fill_place(self, state: State, samples: Any, num_frames: Any, index: Any) -> State:
        """Encodes one segment into the first free place."""
        place = ops.argmax(ops.cast(state["segment"] < 0, "int32"))
        is_place = ops.arange(self.batch_size) == place
        memory = self.model.encode(samples, num_frames)
        fresh = self._start_rows()
        is_row = ops.repeat(is_place, self._num_decoders)
        first = place * self._num_decoders
        return {
            **state,
            **_where_rows(is_row, fresh, {name: state[name] for name in fresh}),
            "segment": ops.where(is_place, index, state["segment"]),
            "memory": {
                name: _set_rows(state["memory"][name], first, memory[name]) for name in memory
            },
        }

    def _step(self, state: State) -> State:
        """One token more for every row."""
        position, cache = state["position"], state["cache"]
        cache_length = self._cache_length(state)
        slot = state["step"] % cache_length
        # Slots by age: 0 is this step's own, those of the row's segment are 1 to position.
        age = (slot - ops.arange(cache_length)) % cache_length
        is_seen = (age >= 1)[None] & (age[None] <= position[:, None])
        bias = ops.where(is_seen, 0.0, MASKED)
        logits, rows = self.model.decode_step(
            state["token"], position, cache, bias, state["memory"]
        )
        cache = {
            name: ops.slice_update(cache[name], (0, 0, slot, 0), rows[name][:, :, None])
            for name in cache
        }
        beam: State = {}  # what beam-1 keeps

        def pick(logits: Any) -> Any:
            token, chosen = self._choose_beam1(state, logits)
            beam.update(chosen)
            return token

        token, grammar, ended = self._grammar.choose(
            state["grammar"], logits, pick if self.method == "beam1" else None
        )
        is_busy = ops.repeat(state["segment"] >= 0, self._num_decoders)
        is_active = is_busy & ~state["finished"]
        is_place = (ops.arange(self.max_tokens)[None] == position[:, None]) & is_active[:, None]
        ended = ended | beam.pop("finished", False) | (position + 1 >= self.max_tokens)
        finished = state["finished"] | (ended & is_active)
        return {
            **state,
            **{name: ops.where(is_active, beam[name], state[name]) for name in beam},
            "step": state["step"] + 1,
            "cache": cache,
            "memory": {**state["memory"], **{n: rows[n] for n in self.model.state_names}},
            "token": token,
            "position": ops.where(is_busy & ~finished, position + 1, 0),
            "written": ops.where(is_place, token[:, None], state["written"]),
            "grammar": grammar,
            "finished": finished,
        }

    def _choose_beam1(self, state: State, logits: Any) -> tuple[Any, State]:
        """The best two tokens: EOS among them ends a hypothesis, the other one lives on."""
        position = ops.cast(state["position"], "float32")
        scores = ops.log_softmax(logits) + state["score"][:, None]
        top_scores, top_tokens = ops.top_k(scores, 2)
        is_eos = top_tokens == EOS
        live = ops.cast(is_eos[:, 0], "int32")[:, None]  # the second if the first is EOS
        score = ops.take_along_axis(top_scores, live, axis=1)[:, 0]
        token = ops.take_along_axis(top_tokens, live, axis=1)[:, 0]
        ended = ops.max(ops.where(is_eos, top_scores, IMPOSSIBLE), axis=1)
        ended = ended / brevity_penalty(position + 1)
        is_better = ops.any(is_eos, axis=1) & (ended > state["best_score"])
        best_score = ops.where(is_better, ended, state["best_score"])
        bound = score / brevity_penalty(float(self.max_tokens + 1))
        return ops.cast(token, "int32"), {
            "score": score,
            "best_score": best_score,
            "best_length": ops.where(is_better, state["position"], state["best_length"]),
            "finished": best_score > bound,
        }


def brevity_penalty(length: Any) -> Any:
    """T5X's divisor of a hypothesis's log-probability, by its length."""
    return ((5.0 + length) / 6.0) ** BREVITY_ALPHA


def compile_function(function: Callable[..., Any], variables: list[Any]) -> Callable[..., Any]:
    """Compiles function(state, ...), which reads the variables; its state is given up.

    On JAX they are arguments of the compiled function, where they would else become constants of
    it. TensorFlow reads them in place: as arguments it would copy them at every call.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if keras.backend.backend() != "jax":
        return function
    import jax

    def with_weights(weights: list[Any], *args: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, weights, strict=True))):
            return function(*args)

    compiled = jax.jit(with_weights, donate_argnums=1)
    weights = [ops.convert_to_tensor(variable) for variable in variables]
    return lambda *args: compiled(weights, *args)


def _is_over(state: State) -> Any:
    """Places [B] of which every decoder has finished."""
    return ops.all(ops.reshape(state["finished"], (state["segment"].shape[0], -1)), axis=1)


def _collect_place(state: State, results: State) -> tuple[State, State]:
    """Moves the tokens of the first finished place to the results and frees it."""
    is_over = _is_over(state)
    place = ops.argmax(ops.cast(is_over, "int32"))
    is_place = ops.arange(is_over.shape[0]) == place
    count, num_rows = results["count"], results["tokens"].shape[1]
    first = place * num_rows
    tokens = _slice_rows(state["written"], first, num_rows)
    if "best_length" in state:
        best = _slice_rows(state["best_length"], first, num_rows)[:, None]
        has_best = _slice_rows(state["best_score"], first, num_rows)[:, None] > IMPOSSIBLE
        tokens = ops.where((ops.arange(tokens.shape[1]) == best) & has_best, EOS, tokens)
    index = _slice_rows(state["segment"], place)
    collected = {
        "segment": ops.slice_update(results["segment"], (count,), index),
        "tokens": _set_rows(results["tokens"], count, tokens[None]),
        "count": count + 1,
    }
    state = {
        **state,
        "segment": ops.where(is_place, -1, state["segment"]),
        "finished": state["finished"] & ~ops.repeat(is_place, num_rows),
    }
    return state, collected


def _to_outputs(results: State) -> Iterator[tuple[int, TokenOutput]]:
    results = {name: _to_numpy(array) for name, array in results.items()}
    for i in range(int(results["count"])):
        yield int(results["segment"][i]), join_sequences(results["tokens"][i].tolist())


def _resize_cache(state: State, length: int) -> State:
    """Moves the ring into one of another length, the newest positions kept."""
    old_length = next(iter(state["cache"].values())).shape[2]
    shift = -(int(_to_numpy(state["step"])) % old_length)
    kept = min(length, old_length)

    def resize(rows: Any) -> Any:
        newest = ops.roll(rows, shift, axis=2)[:, :, old_length - kept :]
        return ops.pad(newest, [(0, 0), (0, 0), (0, length - kept), (0, 0)])

    return {
        **state,
        "cache": {name: resize(rows) for name, rows in state["cache"].items()},
        "step": ops.convert_to_tensor(np.int32(kept)),
    }


def _slice_rows(array: Any, first: Any, number: int = 1) -> Any:
    return ops.slice(array, (first, *[0] * (len(array.shape) - 1)), (number, *array.shape[1:]))


def _set_rows(array: Any, first: Any, values: Any) -> Any:
    return ops.slice_update(array, (first, *[0] * (len(array.shape) - 1)), values)


def _where_rows(is_row: Any, new: State, old: State) -> State:
    """Takes marked rows from `new` and all others from `old`, in every tensor of nested dicts."""

    def pick(new: Any, old: Any) -> Any:
        if isinstance(new, dict):
            return _where_rows(is_row, new, old)
        return ops.where(ops.reshape(is_row, (-1, *[1] * (len(new.shape) - 1))), new, old)

    return {name: pick(new[name], old[name]) for name in new}


def _to_numpy(array: Any) -> np.ndarray[Any, Any]:
    return ops.convert_to_numpy(array)
