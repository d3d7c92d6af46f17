"""Edge bundles on LiteRT: segments in, their outputs out, with numpy and `ai-edge-litert` alone.

A detector's segments go to one interpreter a core. Of a token network reading the weights is what a
token costs: so sequences run side by side, on each core those of an interpreter of its own, which
share what is read. `export.tflite` writes the bundles and says what is in them.
"""

from __future__ import annotations

import functools
import os
import pathlib
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from mt3_keras.cores import count_cores
from mt3_keras.engines.threads import Jobs, run_in_threads
from mt3_keras.grammar import MASKED, Grammar, Rules
from mt3_keras.models.checksums import check_sum
from mt3_keras.models.config import (
    DetectorConfig,
    ModelConfig,
    RecurrentConfig,
    TokenConfig,
)
from mt3_keras.models.preset_config import read_config
from mt3_keras.outputs import Output, RollOutput, TokenOutput, join_sequences
from mt3_keras.quiet import quiet_stderr
from mt3_keras.segments import AudioSegment

CACHE_STEP = 64  # positions that a cache grows by: attention costs what its length is, not its use
ROWS = 2  # sequences on a core; more need no less time each


class BundleError(ValueError):
    """A bundle that cannot be used; one line that names it and the cure."""


def read_bundle_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The description of a bundle's network.

    Raises:
      BundleError: the folder is no bundle, or its network is not that of its checksum.
    """
    path = pathlib.Path(folder) / "model.tflite"
    if not path.is_file():
        raise BundleError(f"{path}: is missing; make a bundle with python -m export.main")
    try:
        check_sum(path)
    except ValueError as error:
        raise BundleError(str(error)) from error
    try:
        return read_config(path.parent)
    except ValueError as error:
        raise BundleError(
            f"{path.parent}: unusable config.json: {error}; export the bundle again"
        ) from error


def _damaged(folder: str | os.PathLike[str]) -> BundleError:
    path = pathlib.Path(folder) / "model.tflite"
    return BundleError(f"{path}: is no network, or not that of its config.json; export it again")


class EdgeDetector:
    """One interpreter of a detector's bundle, for one thread of the caller's.

    Args:
      folder: of the bundle.
      num_threads: that work on one operation.
      stream: follow one recording in the small steps of `stream_config`, state and all.

    Attributes:
      model_config: of the segments that it is given.

    Raises:
      BundleError: the folder is no bundle, or its files are damaged or do not belong together.
    """

    def __init__(
        self, folder: str | os.PathLike[str], num_threads: int = 1, *, stream: bool = False
    ) -> None:
        config = read_bundle_config(folder)
        assert isinstance(config, DetectorConfig)
        self.model_config = config = config.for_streams() if stream else config
        path = pathlib.Path(folder) / "model.tflite"
        try:
            with quiet_stderr():  # LiteRT prints what it runs on
                self._interpreter = Interpreter(str(path), num_threads=num_threads)
                self._interpreter.allocate_tensors()
                run = self._interpreter.get_signature_runner("stream" if stream else "detect")
            inputs, outputs = run.get_input_details(), run.get_output_details()
        except (ValueError, RuntimeError) as error:
            raise _damaged(folder) from error
        self._run, network = run, config.network
        self._state = {name: inputs[name]["shape"] for name in inputs if name != "samples"}
        shapes = {name: tuple(outputs[name]["shape"]) for name in outputs}
        expected = {name: (1, *shape) for name, shape in network.output_shapes.items()}
        if (
            tuple(inputs["samples"]["shape"]) != (1, config.input_samples)
            or {name: shapes.get(name) for name in expected} != expected
        ):
            raise _damaged(folder)
        self.reset()

    def reset(self) -> None:
        """Of a stream: the next segment is a recording's first."""
        self._states = {name: np.zeros(shape, np.float32) for name, shape in self._state.items()}

    def detect(self, samples: NDArray[np.float32]) -> RollOutput:
        """The output of a segment, samples [input_samples]."""
        found = self._run(samples=samples[None], **self._states)
        self._states = {name: found[name] for name in self._states}
        return RollOutput(*(found[name][0] for name in RollOutput._fields))


class EdgeModel:
    """One interpreter of a token network's bundle, for one thread of the caller's.

    Args:
      folder: of the bundle.
      num_threads: that work on one operation.

    Attributes:
      num_decoders: sequences of a segment.

    Raises:
      BundleError: the folder is no bundle, or its files are damaged or do not belong together.
    """

    def __init__(self, folder: str | os.PathLike[str], num_threads: int = 1) -> None:
        config = read_bundle_config(folder)
        assert isinstance(config, TokenConfig)
        self.model_config, self.num_decoders = config, config.num_decoders
        path = pathlib.Path(folder) / "model.tflite"
        try:
            self._interpreter = Interpreter(str(path), num_threads=num_threads)
            step = self._interpreter.get_signature_runner("decode_step")
            self._inputs, self._outputs = step.get_input_details(), step.get_output_details()
            encode = self._interpreter.get_signature_runner("encode")
            memory = encode.get_output_details()
            self._check_shapes(encode.get_input_details()["samples"]["shape"])
            self._memory_names = sorted(memory)
            needed = {"tokens", "positions", *memory, *self._cache_names()}
            if needed != self._inputs.keys():
                raise ValueError("inputs differ")
            del step, encode  # while there is a runner, the interpreter refuses plain calls
            for details in self._inputs.values():  # decoders of their own need a row each
                shape = [self.num_decoders, *details["shape"][1:]]
                self._interpreter.resize_tensor_input(details["index"], shape)
            with quiet_stderr():  # LiteRT prints what it runs on
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError, KeyError) as error:
            raise _damaged(folder) from error
        self._shape = (0, 0)  # rows and positions of the cache; without one the latter is 0
        # A row is a decoder's sequence; those of a segment stand together.
        self._positions: list[int] = []
        self._memories: list[dict[str, Any]] = []

    @property
    def num_segments(self) -> int:
        """Segments that are being decoded together."""
        return len(self._memories) // self.num_decoders

    def encode(self, samples: NDArray[np.float32], num_frames: int, place: int = 0) -> None:
        """Encodes a segment, samples [*samples_shape]; its place is begun anew, or a new one."""
        # Made anew each time: while there is a runner, the interpreter refuses plain calls.
        run = self._interpreter.get_signature_runner("encode")
        memory = run(samples=samples[None], num_frames=np.array([num_frames], np.int32))
        del run
        rows = self._rows([place])
        span = slice(rows[0], rows[-1] + 1)
        self._memories[span] = [
            {name: kept[i : i + 1] for name, kept in memory.items()} for i in range(len(rows))
        ]
        self._positions[span] = [0] * len(rows)
        needed = (max(self._positions) // CACHE_STEP + 1) * CACHE_STEP if self._has_cache else 0
        if self._shape == (len(self._memories), needed):
            for row in rows:
                self._begin_row(row)
        else:
            self._resize(range(len(self._memories)), needed)

    def keep(self, places: Sequence[int]) -> None:
        """Forgets all other segments; these, at least one, are then numbered from 0."""
        rows = self._rows(places)
        self._memories = [self._memories[row] for row in rows]
        self._positions = [self._positions[row] for row in rows]
        self._resize(rows, self._shape[1])

    def _rows(self, places: Sequence[int]) -> list[int]:
        number = self.num_decoders
        return [place * number + i for place in places for i in range(number)]

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Takes every sequence one token further: logits float32 [segments * decoders, V].

        Args:
          tokens: the last one of each, 0 at the start.
        """
        if self._has_cache and max(self._positions) == self._shape[1]:
            self._resize(range(len(self._memories)), self._shape[1] + CACHE_STEP)
        self._input("tokens")[...] = tokens
        self._input("positions")[...] = self._positions
        self._interpreter.invoke()
        if self._has_cache:
            self._write_columns()
        else:
            state = self._output("state")
            self._input("state")[...] = state
            for memory, row in zip(self._memories, state, strict=True):
                memory["state"] = row[None].copy()
        self._positions = [position + 1 for position in self._positions]
        logits: NDArray[np.float32] = self._output("logits").copy()
        return logits

    def _write_columns(self) -> None:
        """Writes the keys and values of the last step into the cache."""
        columns = self._output("columns")
        places = list(enumerate(self._positions))
        for i in range(columns.shape[1]):
            cache = self._input(f"{'values' if i % 2 else 'keys'}_{i // 2}")
            for row, position in places:
                cache[row, :, :, position] = columns[row, i]
        bias = self._input("bias")
        for row, position in places:
            bias[row, position] = 0

    def _input(self, name: str) -> Any:
        """A view of an input, not to be held while the interpreter runs."""
        return self._interpreter.tensor(self._inputs[name]["index"])()

    def _output(self, name: str) -> Any:
        return self._interpreter.tensor(self._outputs[name]["index"])()

    def _resize(self, rows: Sequence[int], length: int) -> None:
        """Makes room for `length` positions of as many rows; their caches are kept.

        Args:
          rows: which old row each one was; numbers beyond the old ones are new.
          length: of the caches, in positions.
        """
        growing = self._cache_names()
        caches = [name for name in growing if name != "bias"]
        old_rows = [row for row in rows if row < self._shape[0]]
        kept = min(self._shape[1], length)
        old = {name: self._input(name)[old_rows][..., :kept] for name in caches if old_rows}
        for name, details in self._inputs.items():
            shape = [len(rows), *details["shape_signature"][1:]]
            if name in growing:
                shape[-1] = length
            self._interpreter.resize_tensor_input(details["index"], shape)
        self._interpreter.allocate_tensors()
        for name in caches:
            self._input(name)[...] = 0
            if old_rows:
                self._input(name)[: len(old_rows), ..., :kept] = old[name]
        self._shape = (len(rows), length)
        for row in range(len(rows)):
            self._begin_row(row)

    def _begin_row(self, row: int) -> None:
        """Writes a row's encoder memory and cache mask into the inputs."""
        if self._has_cache:
            bias = self._input("bias")[row]
            bias[: self._positions[row]], bias[self._positions[row] :] = 0, MASKED
        for name in self._memory_names:
            self._input(name)[row] = self._memories[row][name][0]

    def _check_shapes(self, samples: Any) -> None:
        config, network = self.model_config, self.model_config.network
        expected: dict[str, tuple[int, ...]] = {"logits": (network.vocabulary_rows,)}
        if self._has_cache:
            heads = (network.num_heads, network.head_width)
            expected["columns"] = (2 * network.num_decoder_layers, *heads)
        else:
            expected["state"] = (network.num_decoder_layers, network.width)
        found = {name: tuple(output["shape"][1:]) for name, output in self._outputs.items()}
        if tuple(samples) != (1, *config.samples_shape) or found != expected:
            raise ValueError("sizes differ")

    @property
    def _has_cache(self) -> bool:
        """Whether past tokens are in a cache; a recurrent network has them in its "state"."""
        return not isinstance(self.model_config, RecurrentConfig)

    def _cache_names(self) -> list[str]:
        """Inputs that grow with the tokens so far."""
        if not self._has_cache:
            return []
        layers = range(self.model_config.network.num_decoder_layers)
        return ["bias", *(f"{kind}_{i}" for i in layers for kind in ("keys", "values"))]


class SegmentSearch:
    """The tokens of one segment while they are searched, by the same rule as everywhere else.

    Args:
      grammar: on numpy.
      max_tokens: longest sequence.
      prefixes: tokens that each decoder's sequence begins with, whatever the network predicts.
    """

    def __init__(
        self, grammar: Grammar, max_tokens: int, prefixes: Sequence[Sequence[int]] = ((),)
    ) -> None:
        self._grammar, self._max_tokens, self._prefixes = grammar, max_tokens, prefixes
        self._state = grammar.start(len(prefixes))
        self._sequences: list[list[int]] = [[] for _ in prefixes]
        self._ended = [False for _ in prefixes]

    @property
    def last(self) -> list[int]:
        """What each decoder is given next."""
        return [sequence[-1] if sequence else 0 for sequence in self._sequences]

    @property
    def output(self) -> TokenOutput:
        """The tokens so far."""
        return join_sequences(self._sequences)

    def take(self, logits: NDArray[np.float32]) -> bool:
        """Adds tokens, given the logits [decoders, V] of the next; whether all have ended."""
        pick: Callable[[Any], Any] | None = None
        if any(len(s) < len(p) for s, p in zip(self._sequences, self._prefixes, strict=True)):
            pick = self._pick_prefixes
        tokens, self._state, ended = self._grammar.choose(self._state, logits, pick)
        for i, sequence in enumerate(self._sequences):
            if not self._ended[i]:
                sequence.append(int(tokens[i]))
                self._ended[i] = bool(ended[i]) or len(sequence) >= self._max_tokens
        return all(self._ended)

    def _pick_prefixes(self, logits: NDArray[np.float32]) -> NDArray[np.int32]:
        best = logits.argmax(axis=-1).astype(np.int32)
        for i, prefix in enumerate(self._prefixes):
            if (position := len(self._sequences[i])) < len(prefix):
                best[i] = prefix[position]
        return best


class TokenEngine:
    """Searches tokens greedily, several segments at a time, on all cores.

    Args:
      folder: of the bundle of a network that emits tokens.
      rules: which tokens may be emitted.
      num_segments: decoded at a time; None is two for each core this process may use.
      max_tokens: longest sequence; None takes the model's own limit.
      num_threads: cores to use; None is all that this process may.

    Raises:
      BundleError: see `EdgeModel`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rules: Rules | None = None,
        num_segments: int | None = None,
        max_tokens: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        num_threads = num_threads or count_cores()
        self.num_segments = num_segments or ROWS * num_threads
        num_models = min(num_threads, self.num_segments)
        self._shares = [len(range(i, self.num_segments, num_models)) for i in range(num_models)]
        self._models: queue.SimpleQueue[EdgeModel] = queue.SimpleQueue()
        for _ in range(num_models):
            self._models.put(model := self._open_model(folder))
        self.model_config = model.model_config
        self._max_tokens = self.model_config.network.token_limit(max_tokens)
        assert isinstance(self.model_config, TokenConfig)
        self._grammar = Grammar(self.model_config, rules or Rules(), np)

    def _open_model(self, folder: str | os.PathLike[str]) -> EdgeModel:
        return EdgeModel(folder)

    def run(self, segments: Iterable[AudioSegment]) -> Iterator[tuple[int, Output]]:
        """Yields (index, output) as segments finish, in any order.

        Segments are drawn as they are needed, and as many to wait as are decoded.
        """
        works = [functools.partial(self._search, share) for share in self._shares]
        return run_in_threads(segments, works, 2 * self.num_segments)

    def _search(self, share: int, jobs: Jobs) -> None:
        """Decodes what waits, so many segments together."""
        model = self._models.get()
        try:
            places: list[tuple[int, SegmentSearch]] = []
            while not jobs.are_over():
                while len(places) < share and (waited := jobs.take(block=not places)):
                    if not places and model.num_segments > 1:
                        model.keep([0])
                    places.append(self._begin(model, waited, len(places)))
                if places:
                    places = self._step(model, places, jobs)
        finally:
            self._models.put(model)

    def _begin(
        self, model: EdgeModel, waited: tuple[int, AudioSegment], place: int
    ) -> tuple[int, SegmentSearch]:
        number, segment = waited
        model.encode(segment.samples, segment.num_frames, place)
        return number, SegmentSearch(self._grammar, self._max_tokens, [()] * model.num_decoders)

    def _step(
        self, model: EdgeModel, places: list[tuple[int, SegmentSearch]], jobs: Jobs
    ) -> list[tuple[int, SegmentSearch]]:
        """The places after a step; where one has ended, what waits takes it."""
        logits = model.step([token for _, search in places for token in search.last])
        apart = logits.reshape(len(places), model.num_decoders, -1)
        going: list[tuple[int, SegmentSearch] | None] = []
        for i, (number, search) in enumerate(places):
            if not search.take(apart[i]):
                going.append((number, search))
                continue
            jobs.finish(number, search.output)
            waited = jobs.take(block=False)
            going.append(self._begin(model, waited, i) if waited else None)
        kept = [i for i, place in enumerate(going) if place]
        if kept and len(kept) < len(places):
            model.keep(kept)
        return [place for place in going if place]


def search_one(
    model: EdgeModel,
    grammar: Grammar,
    max_tokens: int,
    segment: AudioSegment,
    prefixes: Sequence[Sequence[int]] | None = None,
) -> TokenOutput:
    """The tokens of one segment by greedy search.

    Args:
      model: with one segment at most.
      grammar: on numpy.
      max_tokens: longest sequence.
      segment: whose tokens are searched.
      prefixes: see `SegmentSearch`; None forces nothing.
    """
    model.encode(segment.samples, segment.num_frames)
    search = SegmentSearch(grammar, max_tokens, prefixes or [()] * model.num_decoders)
    while not search.take(model.step(search.last)):
        pass
    return search.output


class RollEngine:
    """Runs a detector, one segment on each core.

    Args:
      folder: of the bundle of a `NoteDetector`.
      num_workers: segments at a time; None is one for each core this process may use.

    Raises:
      BundleError: see `EdgeDetector`.
    """

    def __init__(self, folder: str | os.PathLike[str], *, num_workers: int | None = None) -> None:
        num_workers = num_workers or count_cores()
        self._detectors = [EdgeDetector(folder) for _ in range(num_workers)]
        self.model_config = self._detectors[0].model_config

    def run(self, segments: Iterable[AudioSegment]) -> Iterator[tuple[int, Output]]:
        """Yields (index, output) as segments finish, in any order; a few are drawn ahead."""
        works = [functools.partial(self._detect, detector) for detector in self._detectors]
        return run_in_threads(segments, works, 2 * len(works))

    def _detect(self, detector: EdgeDetector, jobs: Jobs) -> None:
        while waited := jobs.take(block=True):
            number, segment = waited
            jobs.finish(number, detector.detect(segment.samples))
