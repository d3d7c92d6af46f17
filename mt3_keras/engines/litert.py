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
    NUM_PITCHES,
    DetectorConfig,
    ModelConfig,
    RecurrentConfig,
    TokenConfig,
)
from mt3_keras.models.preset_config import read_config
from mt3_keras.outputs import Output, RollOutput, TokenOutput
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
        expected = {
            "onsets": (1, network.max_onsets, 5),
            "programs": (1, network.max_onsets, 128),
            "strokes": (1, network.max_strokes, 4),
            "ended": (1, network.segment_frames, NUM_PITCHES),
        }
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
      num_rows: sequences that are being decoded together.

    Raises:
      BundleError: the folder is no bundle, or its files are damaged or do not belong together.
    """

    def __init__(self, folder: str | os.PathLike[str], num_threads: int = 1) -> None:
        self.model_config = read_bundle_config(folder)
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
            with quiet_stderr():  # LiteRT prints what it runs on
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError, KeyError) as error:
            raise _damaged(folder) from error
        self._shape = (0, 0)  # rows and positions of the cache; without one the latter is 0
        self._positions: list[int] = []  # of each row
        self._memories: list[dict[str, Any]] = []

    @property
    def num_rows(self) -> int:
        """Sequences that are being decoded together."""
        return len(self._memories)

    def encode(self, samples: NDArray[np.float32], num_frames: int, row: int = 0) -> None:
        """Encodes a segment, samples [input_samples]; the row begins anew, or is a new one."""
        # Made anew each time: while there is a runner, the interpreter refuses plain calls.
        run = self._interpreter.get_signature_runner("encode")
        memory = run(samples=samples[None], num_frames=np.array([num_frames], np.int32))
        del run
        self._memories[row : row + 1] = [memory]
        self._positions[row : row + 1] = [0]
        needed = (max(self._positions) // CACHE_STEP + 1) * CACHE_STEP if self._has_cache else 0
        if self._shape == (self.num_rows, needed):
            self._begin_row(row)
        else:
            self._resize(range(self.num_rows), needed)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forgets all other rows; these, at least one, are then numbered from 0."""
        self._memories = [self._memories[row] for row in rows]
        self._positions = [self._positions[row] for row in rows]
        self._resize(rows, self._shape[1])

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Takes every row one token further: logits float32 [num_rows, V].

        Args:
          tokens: the last one of each row, 0 at the start.
        """
        if self._has_cache and max(self._positions) == self._shape[1]:
            self._resize(range(self.num_rows), self._shape[1] + CACHE_STEP)
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
        if tuple(samples) != (1, config.input_samples) or found != expected:
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


class TokenSequence:
    """The tokens of one segment while they are searched, by the same rule as everywhere else.

    Args:
      grammar: on numpy.
      max_tokens: longest sequence.
      prefix: tokens that it begins with, whatever the network predicts.
    """

    def __init__(self, grammar: Grammar, max_tokens: int, prefix: Sequence[int] = ()) -> None:
        self._grammar, self._max_tokens, self._prefix = grammar, max_tokens, prefix
        self._state = grammar.start(1)
        self.tokens: list[int] = []

    @property
    def last(self) -> int:
        """What the network is given next."""
        return self.tokens[-1] if self.tokens else 0

    def take(self, logits: NDArray[np.float32]) -> bool:
        """Adds a token, given the logits [V] of the next; whether the sequence has ended."""
        pick: Callable[[Any], Any] | None = None
        if len(self.tokens) < len(self._prefix):
            forced = np.array([self._prefix[len(self.tokens)]], np.int32)
            pick = lambda _: forced  # noqa: E731
        tokens, self._state, ended = self._grammar.choose(self._state, logits[None], pick)
        self.tokens.append(int(tokens[0]))
        return bool(ended[0]) or len(self.tokens) >= self._max_tokens


class TokenEngine:
    """Searches tokens greedily, several segments at a time, on all cores.

    Args:
      folder: of the bundle of an `MT3Backbone` or a `RecurrentBackbone`.
      rules: which tokens may be emitted.
      num_sequences: decoded at a time; None is two for each core this process may use.
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
        num_sequences: int | None = None,
        max_tokens: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        num_threads = num_threads or count_cores()
        self.num_sequences = num_sequences or ROWS * num_threads
        num_models = min(num_threads, self.num_sequences)
        self._num_rows = [len(range(i, self.num_sequences, num_models)) for i in range(num_models)]
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

        Segments are drawn as they are needed, one for each sequence and as many to wait.
        """
        works = [functools.partial(self._search, num_rows) for num_rows in self._num_rows]
        return run_in_threads(segments, works, 2 * self.num_sequences)

    def _search(self, num_rows: int, jobs: Jobs) -> None:
        """Decodes what waits, so many segments together."""
        model = self._models.get()
        try:
            rows: list[tuple[int, TokenSequence]] = []
            while not jobs.are_over():
                while len(rows) < num_rows and (waited := jobs.take(block=not rows)):
                    if not rows and model.num_rows > 1:
                        model.keep_rows([0])
                    rows.append(self._begin(model, waited, len(rows)))
                if rows:
                    rows = self._step(model, rows, jobs)
        finally:
            self._models.put(model)

    def _begin(
        self, model: EdgeModel, waited: tuple[int, AudioSegment], row: int
    ) -> tuple[int, TokenSequence]:
        number, segment = waited
        model.encode(segment.samples, segment.num_frames, row)
        return number, TokenSequence(self._grammar, self._max_tokens)

    def _step(
        self, model: EdgeModel, rows: list[tuple[int, TokenSequence]], jobs: Jobs
    ) -> list[tuple[int, TokenSequence]]:
        """The rows after a step; where one has ended, what waits takes its place."""
        logits = model.step([sequence.last for _, sequence in rows])
        going: list[tuple[int, TokenSequence] | None] = []
        for i, (number, sequence) in enumerate(rows):
            if not sequence.take(logits[i]):
                going.append((number, sequence))
                continue
            jobs.finish(number, TokenOutput(sequence.tokens))
            waited = jobs.take(block=False)
            going.append(self._begin(model, waited, i) if waited else None)
        kept = [i for i, row in enumerate(going) if row]
        if kept and len(kept) < len(rows):
            model.keep_rows(kept)
        return [row for row in going if row]


def search_one(
    model: EdgeModel,
    grammar: Grammar,
    max_tokens: int,
    segment: AudioSegment,
    prefix: Sequence[int] = (),
) -> TokenOutput:
    """The tokens of one segment by greedy search.

    Args:
      model: with one row at most.
      grammar: on numpy.
      max_tokens: longest sequence.
      segment: whose tokens are searched.
      prefix: tokens that it begins with, whatever the network predicts.
    """
    model.encode(segment.samples, segment.num_frames)
    sequence = TokenSequence(grammar, max_tokens, prefix)
    while not sequence.take(model.step([sequence.last])[0]):
        pass
    return TokenOutput(sequence.tokens)


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
