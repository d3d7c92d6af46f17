"""An edge bundle on LiteRT: segments -> tokens with numpy and `ai-edge-litert` alone.

On a processor one sequence at a time is the fastest way to use a core, so sequences run side by
side, each on an interpreter and a thread of its own. `export.tflite` writes the bundles and says
what is in them.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import pathlib
import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from mt3_keras.codec import EOS
from mt3_keras.config import ModelConfig
from mt3_keras.grammar import STATE, Grammar, Rules
from mt3_keras.note_rolls import NUM_COLUMNS, NoteRolls, SegmentTokens
from mt3_keras.quiet import quiet_stderr
from mt3_keras.segments import AudioSegment

CACHE_STEP = 64  # positions that a cache grows by: attention costs what its length is, not its use
HIDDEN = -1e9  # bias of a cached position that must not be seen


class BundleError(ValueError):
    """A bundle that cannot be used; one line that names it and the cure."""


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class EdgeModel:
    """One interpreter of a bundle, for one sequence at a time and one thread of the caller's.

    Args:
      folder: of the bundle.
      num_threads: that work on one operation.

    Attributes:
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
        self._cache_length = 0
        self.rolls: NoteRolls | None = None

    @property
    def uses_state(self) -> bool:
        """Whether the network asks what the tokens so far imply."""
        return bool(self._state_names)

    def encode(self, samples: NDArray[np.float32], num_frames: int) -> None:
        """Hears a segment, samples [input_samples]; `step` begins anew."""
        # Made anew each time: while there is a runner, the interpreter refuses plain calls.
        run = self._interpreter.get_signature_runner("encode")
        memory = run(samples=samples[None], num_frames=np.array([num_frames], np.int32))
        del run
        rolls = memory.pop("note_rolls", None)
        rate = self.model_config.spectrogram.frames_per_second
        self.rolls = None if rolls is None else NoteRolls(rolls[0], rate)
        self._memory = memory
        if self._cache_length == CACHE_STEP:
            self._input("bias")[...] = HIDDEN
            self._write_memory()
        else:
            self._resize(CACHE_STEP)
        self._position = 0

    def step(self, token: int, state: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Takes the sequence one token further: logits float32 [V].

        Args:
          token: the last one, 0 at the start.
          state: int [1] each, where the network asks for it (see `Grammar`).
        """
        position = self._position
        if position == self._cache_length:
            self._resize(position + CACHE_STEP)
        self._input("tokens")[0] = token
        self._input("positions")[0] = position
        if state is not None:
            for name in self._state_names:
                self._input(name)[0] = state[name][0]
        self._interpreter.invoke()
        columns = self._output("columns")
        for i in range(self.model_config.network.num_decoder_layers):
            self._input(f"keys_{i}")[0, :, :, position] = columns[2 * i]
            self._input(f"values_{i}")[0, :, :, position] = columns[2 * i + 1]
        self._input("bias")[0, position] = 0
        self._position = position + 1
        logits: NDArray[np.float32] = self._output("logits")[0].copy()
        return logits

    def _input(self, name: str) -> Any:
        """A view of an input, not to be held while the interpreter runs."""
        return self._interpreter.tensor(self._inputs[name]["index"])()

    def _output(self, name: str) -> Any:
        return self._interpreter.tensor(self._outputs[name]["index"])()

    def _resize(self, length: int) -> None:
        """Makes room for `length` positions; what is known of them is kept."""
        names = [name for name in self._inputs if name.startswith(("keys_", "values_", "bias"))]
        kept = self._cache_length if length > self._cache_length else 0
        old = {name: self._input(name)[..., :kept].copy() for name in names} if kept else {}
        for name in names:
            shape = [*self._inputs[name]["shape_signature"][:-1], length]
            self._interpreter.resize_tensor_input(self._inputs[name]["index"], shape)
        self._interpreter.allocate_tensors()
        for name in names:
            self._input(name)[...] = HIDDEN if name == "bias" else 0
            if kept:
                self._input(name)[..., :kept] = old[name]
        self._cache_length = length
        self._write_memory()

    def _write_memory(self) -> None:
        for name in self._memory_names:
            self._input(name)[...] = self._memory[name]

    def _check_shapes(self, samples: Any, memory: Mapping[str, Any]) -> None:
        config, network = self.model_config, self.model_config.network
        logits = self._outputs["logits"]["shape"]
        columns = (2 * network.num_decoder_layers, network.num_heads, network.head_width)
        if (
            tuple(samples) != (1, config.input_samples)
            or tuple(logits) != (1, network.vocabulary_rows)
            or tuple(self._outputs["columns"]["shape"]) != columns
            or (network.heads and memory["note_rolls"]["shape"][-1] != NUM_COLUMNS)
        ):
            raise ValueError("sizes differ")


class EdgeSearch:
    """Decodes segments greedily, several at a time, each on a core.

    Args:
      folder: of the bundle.
      rules: which tokens may be written.
      method: "greedy" or "heads" (see `generation.Search`); None is the network's own.
      num_sequences: decoded at a time; None is one for each core this process may use.
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
        num_sequences = num_sequences or count_cores()
        self._models: queue.SimpleQueue[EdgeModel] = queue.SimpleQueue()
        for _ in range(num_sequences):
            self._models.put(model := EdgeModel(folder))
        self.model_config = model.model_config
        self.num_sequences = num_sequences
        self._sequence = EdgeSequence(
            model.model_config, rules or Rules(), method=method, max_tokens=max_tokens
        )

    def decode(self, segments: Iterable[AudioSegment]) -> Iterator[tuple[int, SegmentTokens]]:
        """Yields (index, tokens up to and including EOS) as segments finish, in any order.

        Segments are drawn as they are needed, one for each sequence and as many to wait.
        """
        numbered = enumerate(segments)
        with concurrent.futures.ThreadPoolExecutor(self.num_sequences) as executor:
            running: set[concurrent.futures.Future[tuple[int, SegmentTokens]]] = set()
            is_last = False
            try:
                while running or not is_last:
                    taken = list(itertools.islice(numbered, 2 * self.num_sequences - len(running)))
                    is_last = is_last or not taken
                    running |= {executor.submit(self._run, *pair) for pair in taken}
                    done, running = concurrent.futures.wait(
                        running, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    for future in done:
                        yield future.result()
            finally:
                for future in running:
                    future.cancel()

    def _run(self, index: int, segment: AudioSegment) -> tuple[int, SegmentTokens]:
        model = self._models.get()
        try:
            return index, self._sequence.decode(model, segment)
        finally:
            self._models.put(model)


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
        self._method = config.network.choose_method(method)
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
        grammar, rules = self._grammar, self._grammar.rules
        follows = model.uses_state or rules.restricts_tokens or rules.stop_runaways
        model.encode(segment.samples, segment.num_frames)
        state, token = grammar.start(1), 0
        tokens = SegmentTokens()
        tokens.rolls = model.rolls
        if self._method == "heads":
            tokens.append(EOS)
            return tokens
        while token != EOS and len(tokens) < self._max_tokens:
            logits = model.step(token, state if model.uses_state else None)
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
