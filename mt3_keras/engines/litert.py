"""An edge bundle on LiteRT: segments -> tokens with numpy and `ai-edge-litert` alone.

Reading the weights is what a token costs. So sequences run side by side, on each core those of an
interpreter of its own, which share what is read. `export.tflite` writes the bundles and says what
is in them.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from mt3_keras.codec import EOS
from mt3_keras.grammar import STATE, Grammar, Rules
from mt3_keras.models.config import ModelConfig
from mt3_keras.note_rolls import NUM_COLUMNS, NoteRolls, SegmentTokens
from mt3_keras.quiet import quiet_stderr
from mt3_keras.segments import AudioSegment

CACHE_STEP = 64  # positions that a cache grows by: attention costs what its length is, not its use
HIDDEN = -1e9  # bias of a cached position that must not be seen
ROWS = 2  # sequences on a core; more need no less time each

State = dict[str, Any]


class BundleError(ValueError):
    """A bundle that cannot be used; one line that names it and the cure."""


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class EdgeModel:
    """One interpreter of a bundle, for one thread of the caller's.

    Args:
      folder: of the bundle.
      num_threads: that work on one operation.

    Attributes:
      num_rows: sequences that are being decoded together.
      rolls: what the heads say of the segment heard last, None for a network without.

    Raises:
      BundleError: the folder is no bundle, or its files are damaged or do not belong together.
    """

    def __init__(self, folder: str | os.PathLike[str], num_threads: int = 1) -> None:
        path = pathlib.Path(folder) / "model.tflite"
        if not path.is_file():
            raise BundleError(f"{path}: is missing; make a bundle with python -m export.main")
        try:
            self.model_config = ModelConfig.from_preset(path.parent)
        except ValueError as error:
            raise BundleError(
                f"{path.parent}: unusable config.json: {error}; export the bundle again"
            ) from error
        try:
            self._interpreter = Interpreter(str(path), num_threads=num_threads)
            step = self._interpreter.get_signature_runner("decode_step")
            self._inputs, self._outputs = step.get_input_details(), step.get_output_details()
            encode = self._interpreter.get_signature_runner("encode")
            memory = encode.get_output_details()
            self._check_shapes(encode.get_input_details()["samples"]["shape"], memory)
            self._memory_names = sorted(set(memory) - {"note_rolls"})
            del step, encode  # while there is a runner, the interpreter refuses plain calls
            with quiet_stderr():  # it says what it works with
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError, KeyError) as error:
            raise BundleError(
                f"{path}: is no network, or not that of its config.json; export it again"
            ) from error
        self._state_names = [name for name in STATE if name in self._inputs]
        self._shape = (0, 0)  # rows and positions of the cache
        self._positions: list[int] = []  # of each row
        self._memories: list[dict[str, Any]] = []
        self.rolls: NoteRolls | None = None

    @property
    def uses_state(self) -> bool:
        """Whether the network asks what the tokens so far imply."""
        return bool(self._state_names)

    @property
    def num_rows(self) -> int:
        return len(self._memories)

    def encode(self, samples: NDArray[np.float32], num_frames: int, row: int = 0) -> None:
        """Hears a segment, samples [input_samples]; the row begins anew, or is a new one."""
        # Made anew each time: while there is a runner, the interpreter refuses plain calls.
        run = self._interpreter.get_signature_runner("encode")
        memory = run(samples=samples[None], num_frames=np.array([num_frames], np.int32))
        del run
        rolls = memory.pop("note_rolls", None)
        rate = self.model_config.spectrogram.frames_per_second
        self.rolls = None if rolls is None else NoteRolls(rolls[0], rate)
        self._memories[row : row + 1] = [memory]
        self._positions[row : row + 1] = [0]
        needed = (max(self._positions) // CACHE_STEP + 1) * CACHE_STEP
        if self._shape == (self.num_rows, needed):
            self._begin_row(row)
        else:
            self._resize(range(self.num_rows), needed)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forgets all other rows; these, at least one, are then numbered from 0."""
        self._memories = [self._memories[row] for row in rows]
        self._positions = [self._positions[row] for row in rows]
        self._resize(rows, self._shape[1])

    def step(self, token: int, state: State | None = None) -> NDArray[np.float32]:
        """Takes the only row one token further: logits float32 [V]; see `step_rows`."""
        logits: NDArray[np.float32] = self.step_rows([token], [state])[0]
        return logits

    def step_rows(
        self, tokens: Sequence[int], states: Sequence[State | None]
    ) -> NDArray[np.float32]:
        """Takes every row one token further: logits float32 [num_rows, V].

        Args:
          tokens: the last one of each row, 0 at the start.
          states: int [1] each, where the network asks for it (see `Grammar`).
        """
        if max(self._positions) == self._shape[1]:
            self._resize(range(self.num_rows), self._shape[1] + CACHE_STEP)
        self._input("tokens")[...] = tokens
        self._input("positions")[...] = self._positions
        for name in self._state_names:
            self._input(name)[...] = [state[name][0] for state in states if state]
        self._interpreter.invoke()
        columns = self._output("columns")
        places = list(enumerate(self._positions))
        for i in range(columns.shape[1]):
            cache = self._input(f"{'values' if i % 2 else 'keys'}_{i // 2}")
            for row, position in places:
                cache[row, :, :, position] = columns[row, i]
        bias = self._input("bias")
        for row, position in places:
            bias[row, position] = 0
        self._positions = [position + 1 for position in self._positions]
        logits: NDArray[np.float32] = self._output("logits").copy()
        return logits

    def _input(self, name: str) -> Any:
        """A view of an input, not to be held while the interpreter runs."""
        return self._interpreter.tensor(self._inputs[name]["index"])()

    def _output(self, name: str) -> Any:
        return self._interpreter.tensor(self._outputs[name]["index"])()

    def _resize(self, rows: Sequence[int], length: int) -> None:
        """Makes room for `length` positions of as many rows; what was known of them is kept.

        Args:
          rows: which old row each one was; numbers beyond the old ones are new.
        """
        caches = [name for name in self._inputs if name.startswith(("keys_", "values_"))]
        old_rows = [row for row in rows if row < self._shape[0]]
        kept = min(self._shape[1], length)
        old = {name: self._input(name)[old_rows][..., :kept] for name in caches if old_rows}
        for name, details in self._inputs.items():
            shape = [len(rows), *details["shape_signature"][1:]]
            if name in caches or name == "bias":
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
        """Shows a row what it knows: its segment, and the positions it has come past."""
        bias = self._input("bias")[row]
        bias[: self._positions[row]], bias[self._positions[row] :] = 0, HIDDEN
        for name in self._memory_names:
            self._input(name)[row] = self._memories[row][name][0]

    def _check_shapes(self, samples: Any, memory: Mapping[str, Any]) -> None:
        config, network = self.model_config, self.model_config.network
        logits = self._outputs["logits"]["shape"]
        columns = (2 * network.num_decoder_layers, network.num_heads, network.head_width)
        if (
            tuple(samples) != (1, config.input_samples)
            or tuple(logits[1:]) != (network.vocabulary_rows,)
            or tuple(self._outputs["columns"]["shape"][1:]) != columns
            or (network.heads and memory["note_rolls"]["shape"][-1] != NUM_COLUMNS)
        ):
            raise ValueError("sizes differ")


class EdgeSearch:
    """Decodes segments greedily, several at a time, on all cores.

    Args:
      folder: of the bundle.
      rules: which tokens may be written.
      method: "greedy" or "heads" (see `generation.Search`); None is the network's own.
      num_sequences: decoded at a time; None is two for each core this process may use.
      max_tokens: longest sequence; None takes the model's own limit.

    Raises:
      BundleError: see `EdgeModel`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rules: Rules | None = None,
        method: str | None = "greedy",
        num_sequences: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.num_sequences = num_sequences or ROWS * count_cores()
        num_models = min(count_cores(), self.num_sequences)
        self._num_rows = [len(range(i, self.num_sequences, num_models)) for i in range(num_models)]
        self._models: queue.SimpleQueue[EdgeModel] = queue.SimpleQueue()
        for _ in range(num_models):
            self._models.put(model := self._open_model(folder))
        self.model_config = model.model_config
        self._sequence = EdgeSequence(
            self.model_config, rules or Rules(), method=method, max_tokens=max_tokens
        )
        self.method = self._sequence.method

    def _open_model(self, folder: str | os.PathLike[str]) -> EdgeModel:
        return EdgeModel(folder)

    def decode(self, segments: Iterable[AudioSegment]) -> Iterator[tuple[int, SegmentTokens]]:
        """Yields (index, tokens up to and including EOS) as segments finish, in any order.

        Segments are drawn as they are needed, one for each sequence and as many to wait.
        """
        numbered = enumerate(segments)
        waiting: queue.SimpleQueue[tuple[int, AudioSegment] | None] = queue.SimpleQueue()
        finished: queue.SimpleQueue[tuple[int, SegmentTokens] | Exception] = queue.SimpleQueue()
        is_over = threading.Event()
        threads = [
            threading.Thread(target=self._work, args=(num_rows, waiting, finished, is_over))
            for num_rows in self._num_rows
        ]
        for thread in threads:
            thread.start()
        try:
            num_running, is_last = 0, False
            while num_running or not is_last:
                taken = list(itertools.islice(numbered, 2 * self.num_sequences - num_running))
                is_last = is_last or not taken
                for pair in taken:
                    waiting.put(pair)
                num_running += len(taken)
                if num_running:
                    found = finished.get()
                    if isinstance(found, Exception):
                        raise found
                    num_running -= 1
                    yield found
        finally:
            is_over.set()
            for _ in threads:
                waiting.put(None)
            for thread in threads:
                thread.join()

    def _work(self, num_rows: int, waiting: Any, finished: Any, is_over: Any) -> None:
        """Decodes what waits, so many segments together."""
        model = self._models.get()
        try:
            rows: list[_Row] = []
            while not is_over.is_set():
                while len(rows) < num_rows and (waited := _take(waiting, block=not rows)):
                    if not rows and model.num_rows > 1:
                        model.keep_rows([0])
                    rows += self._begin(model, waited, len(rows), finished)
                if rows:
                    rows = self._step(model, rows, waiting, finished)
        except Exception as error:
            finished.put(error)
        finally:
            self._models.put(model)

    def _step(self, model: EdgeModel, rows: list[_Row], waiting: Any, finished: Any) -> list[_Row]:
        """The rows after a step; where one has ended, what waits takes its place."""
        logits = model.step_rows([row.token for row in rows], [row.state for row in rows])
        going: list[_Row | None] = []
        for i, row in enumerate(rows):
            try:
                going.append(_Row(row.number, row.writer, *row.writer.send(logits[i])))
            except StopIteration as end:
                finished.put((row.number, end.value))
                waited = _take(waiting, block=False)
                begun = self._begin(model, waited, i, finished) if waited else []
                going += begun or [None]
        kept = [i for i, row in enumerate(going) if row]
        if kept and len(kept) < len(rows):
            model.keep_rows(kept)
        return [row for row in going if row]

    def _begin(
        self, model: EdgeModel, waited: tuple[int, AudioSegment], row: int, finished: Any
    ) -> list[_Row]:
        """The row of a segment; none where the heads have said all."""
        number, segment = waited
        model.encode(segment.samples, segment.num_frames, row)
        writer = self._sequence.write(model.rolls, model.uses_state)
        try:
            return [_Row(number, writer, *next(writer))]
        except StopIteration as end:
            finished.put((number, end.value))
            return []


Writer = Generator[tuple[int, Any], NDArray[np.float32], SegmentTokens]


class _Row(NamedTuple):
    """A sequence being written: its segment's number, and what its next step takes."""

    number: int
    writer: Writer
    token: int
    state: State | None


def _take(waiting: Any, *, block: bool) -> Any:
    try:
        return waiting.get(block=block)
    except queue.Empty:
        return None


class EdgeSequence:
    """Greedy search over one segment: the tokens of `generation.Search` with the same rules."""

    def __init__(
        self,
        config: ModelConfig,
        rules: Rules,
        *,
        method: str | None = "greedy",
        max_tokens: int | None = None,
    ) -> None:
        self.method = config.network.choose_method(method)
        if method == "beam1":
            raise ValueError("an edge bundle is searched greedily: use Keras for beam search")
        self._max_tokens = config.network.token_limit(max_tokens)
        self._grammar = Grammar(config, rules, np)

    def decode(
        self, model: EdgeModel, segment: AudioSegment, prefix: Sequence[int] = ()
    ) -> SegmentTokens:
        """Tokens of a segment up to and including EOS.

        Args:
          prefix: tokens that it begins with, whatever the model thinks of them.
        """
        model.encode(segment.samples, segment.num_frames)
        writer = self.write(model.rolls, model.uses_state, prefix)
        try:
            step = next(writer)
            while True:
                step = writer.send(model.step(*step))
        except StopIteration as end:
            tokens: SegmentTokens = end.value
            return tokens

    def write(
        self, rolls: NoteRolls | None, uses_state: bool, prefix: Sequence[int] = ()
    ) -> Writer:
        """Asks for a step at a time, (token, state), is sent its logits [V], returns the tokens."""
        grammar, rules = self._grammar, self._grammar.rules
        follows = uses_state or rules.restricts_tokens or rules.stop_runaways
        state, token = grammar.start(1), 0
        tokens = SegmentTokens()
        tokens.rolls = rolls
        if self.method == "heads":
            tokens.append(EOS)
            return tokens
        while token != EOS and len(tokens) < self._max_tokens:
            logits = yield token, (state if uses_state else None)
            if len(tokens) < len(prefix):
                token = prefix[len(tokens)]
            else:
                if rules.restricts_tokens:
                    logits = np.where(grammar.legal_tokens(state)[0], logits, -np.inf)
                token = int(np.argmax(logits))
            if follows:
                state = grammar.advance(state, np.array([token], np.int32))
                if rules.stop_runaways and grammar.runs_away(state)[0]:
                    token = EOS
            tokens.append(token)
        return tokens
