"""What a served model computes: samples or WAV files in, tokens or notes out, all in the graph.

Nothing of this project is needed to serve it. Its graphs hold no XLA operation: the published
binaries of TF Serving cannot run them on a GPU, on a CPU not by default (tensorflow/serving, issues
2214 and 2217). That rules out `engines.keras.TokenEngine`, whose loop is compiled. The loop here is
another, with the same rule and so the same tokens: a batch of segments begins together, and when
half of them have ended the rest is packed into a smaller batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tensorflow as tf
from keras import ops

from export.audio_bytes import example_bytes, from_bytes
from export.served_notes import FIELDS, NoteReading
from mt3_keras.engines.serving import Signatures
from mt3_keras.grammar import MASKED, Grammar, Rules
from mt3_keras.graph_audio import check_length, decode_wav
from mt3_keras.models.config import SAMPLE_RATE_HZ, ModelConfig
from mt3_keras.models.detector import NoteDetector
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.segments import MAX_ABS_SAMPLE, check_context

if TYPE_CHECKING:
    from mt3_keras.models.token_backbone import TokenBackbone

Tensors = dict[str, Any]
Endpoint = tuple[Callable[..., Tensors], list[Any]]  # a function and the specs of its arguments

SMALLEST_CACHE = 64  # positions; doubled as often as needed


class ServedDetector:
    """The functions of a detector that are served; they are traced, not run.

    Args:
      model: the network, weights loaded.
      context, rules, decoding: as in `Transcriber`.
      batch_size: segments at a time, whatever the number of a request's.
      decode: of files, see `audio_bytes.from_bytes`.
    """

    max_tokens = None
    client_signatures = Signatures("candidates", "candidates_bytes")

    def __init__(
        self,
        model: NoteDetector,
        *,
        context: Literal["segment", "full"] = "full",
        rules: Rules | None = None,
        decoding: RollDecoding | None = None,
        batch_size: int = 16,
        decode: Callable[[Any], Any] = decode_wav,
    ) -> None:
        check_context(context)
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive: got {batch_size}")
        self.model, self.config, self._decode_file = model, model.model_config, decode
        self.context, self.batch_size = context, batch_size
        self.rules, self.decoding = rules or Rules(), decoding or RollDecoding()
        self._reading = NoteReading(self.config, self.decoding, self.rules)
        self._window = tf.TensorSpec([None, self.config.input_samples], tf.float32, "samples")
        self._network = _trace_once(self.detect, self._window)

    def transcribe(self, audio: Any) -> Tensors:
        """Recordings of one length -> their notes.

        Args:
          audio: float32 [B, n], 16 kHz mono.

        Returns:
          "onset_seconds", "offset_seconds", "confidence" float32 [B, N], "pitch", "velocity",
          "program" int32 [B, N], "is_drum" bool [B, N], ordered by onset; "num_notes" int32 [B],
          after which a recording's rows are zeros.

        Raises:
          InvalidArgumentError: a sample is no number or out of all bounds, or there are too many.
        """
        found, num_frames = self._detect(
            audio,
            programs=tf.float32,
            ended=tf.bool,
            convert=lambda name, x: x >= self.decoding.end_limit if name == "ended" else x,
        )
        specs = {
            name: tf.RaggedTensorSpec([None], dtype, ragged_rank=0)
            for name, dtype in FIELDS.items()
        }
        notes = tf.map_fn(
            lambda one: self._reading.read(one | {"num_frames": num_frames}),
            found,
            fn_output_signature=specs,
            parallel_iterations=1,
        )
        num_notes = tf.cast(notes["pitch"].row_lengths(), tf.int32)
        return {name: rows.to_tensor() for name, rows in notes.items()} | {"num_notes": num_notes}

    def find_candidates(self, audio: Any) -> Tensors:
        """Recordings of one length -> what may be notes in each of their segments.

        For clients that cut a recording into several requests and read its notes as a whole.

        Args:
          audio: float32 [B, n], 16 kHz mono.

        Returns:
          Of each segment what `NoteDetector.detect` finds, smaller: "onsets" float32 [B, S, K, 5];
          "programs" uint8 [B, S, K, 128], probabilities times 255; "strokes" float32 [B, S, D, 4];
          "ended" uint8 [B, S, F, NUM_PITCHES], times 255; "num_segments" int32 [B], S each.

        Raises:
          InvalidArgumentError: as of `transcribe`.
        """

        def convert(name: str, values: Any) -> Any:
            in_bytes = name in ("programs", "ended")
            return tf.cast(tf.round(255 * values), tf.uint8) if in_bytes else values

        found, num_frames = self._detect(audio, programs=tf.uint8, ended=tf.uint8, convert=convert)
        num_segments = tf.fill([tf.shape(audio)[0]], tf.size(num_frames))
        return found | {"num_segments": num_segments}

    def _detect(
        self, audio: Any, *, programs: Any, ended: Any, convert: Callable[[str, Any], Any]
    ) -> tuple[Tensors, Any]:
        """What the network predicts of all segments, [B, S, ...], and the frames of each, [S].

        Args:
          audio: float32 [B, n].
          programs: type of this output.
          ended: likewise.
          convert: of a name and the network's output, what is kept of it.
        """
        windows_BSN, num_frames = cut_windows(audio, self.config, self.context)
        batch, segments = tf.shape(windows_BSN)[0], tf.shape(windows_BSN)[1]
        windows = tf.reshape(windows_BSN, [batch * segments, self.config.input_samples])
        types = {"programs": programs, "ended": ended}
        specs = {
            name: (types.get(name, tf.float32), shape)
            for name, shape in self.config.network.output_shapes.items()
        }

        def predict(rows: Any) -> Tensors:
            found = self._network(windows[rows])
            return {name: convert(name, found[name]) for name in specs}

        found = _in_batches(predict, tf.shape(windows)[0], self.batch_size, specs)
        return {
            name: tf.reshape(found[name], [batch, segments, *shape])
            for name, (_, shape) in specs.items()
        }, num_frames

    def detect(self, samples: Any) -> Tensors:
        """`NoteDetector.detect`: float32 [B, input_samples] -> its tensors by name."""
        found: Tensors = self.model.detect(samples)
        return found

    def endpoints(self) -> dict[str, Endpoint]:
        """Signatures by name."""
        transcribe = _trace_once(self.transcribe, _AUDIO)
        find_candidates = _trace_once(self.find_candidates, _AUDIO)
        return {
            "serving_default": (transcribe, [_AUDIO]),
            "serving_bytes": from_bytes(transcribe, self._decode_file),
            "candidates": (find_candidates, [_AUDIO]),
            "candidates_bytes": from_bytes(find_candidates, self._decode_file),
            "detect": (self._network, [self._window]),
        }

    def example_inputs(self) -> dict[str, dict[str, Any]]:
        """Small inputs of every signature."""
        audio, content = _quiet_noise(self.config), example_bytes()
        return {
            "serving_default": audio,
            "serving_bytes": content,
            "candidates": audio,
            "candidates_bytes": content,
            "detect": {"samples": np.zeros((1, self.config.input_samples), np.float32)},
        }


class ServedModel:
    """The functions of a token network that are served; they are traced, not run.

    Args:
      model: the network, weights loaded.
      context, rules, max_tokens: as in `Transcriber`; the search is greedy.
      batch_size: segments decoded side by side, whatever the number of a request's. Memory grows
        with it, and with nothing else but the request itself.
      decode: of files, see `audio_bytes.from_bytes`.
    """

    decoding = None
    client_signatures = Signatures("serving_default", "serving_bytes")

    def __init__(
        self,
        model: TokenBackbone,
        *,
        context: Literal["segment", "full"] = "full",
        rules: Rules | None = None,
        batch_size: int = 16,
        max_tokens: int | None = None,
        decode: Callable[[Any], Any] = decode_wav,
    ) -> None:
        check_context(context)
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive: got {batch_size}")
        self.model, self.config, self._decode_file = model, model.model_config, decode
        self.context, self.batch_size = context, batch_size
        self.max_tokens = self.config.network.token_limit(max_tokens)
        self._num_decoders = self.config.num_decoders
        self.rules = rules or Rules(stop_runaways=True)
        self._grammar = Grammar(self.config, self.rules, ops)

    def transcribe(self, audio: Any) -> Tensors:
        """Recordings of one length -> the tokens of their segments.

        Args:
          audio: float32 [B, n], 16 kHz mono; of a network that is given T tracks [B, T, n].

        Returns:
          "tokens" int32 [B, S, L], each row up to and including EOS, then zeros, or of several
          decoders [B, S, G, L]; "num_segments" int32 [B], S each.

        Raises:
          InvalidArgumentError: a sample is no number or out of all bounds, or there are too many.
        """
        windows_BSN, num_frames_S = cut_windows(audio, self.config, self.context)
        batch, segments = tf.shape(windows_BSN)[0], tf.shape(windows_BSN)[1]
        windows = tf.reshape(windows_BSN, [batch * segments, *self.config.samples_shape])
        num_frames = tf.tile(num_frames_S, [batch])

        def predict(rows: Any) -> Tensors:
            tokens = self._decode(self.model.encode(windows[rows], num_frames[rows]))
            return {"tokens": tf.reshape(tokens, [-1, self._num_decoders, self.max_tokens])}

        found = _in_batches(
            predict,
            tf.shape(windows)[0],
            self.batch_size,
            {"tokens": (tf.int32, (self._num_decoders, self.max_tokens))},
        )
        tokens = found["tokens"]
        is_used = tf.reduce_any(tokens != 0, axis=[0, 1])
        length = tf.reduce_max(tf.where(is_used, tf.range(self.max_tokens) + 1, 0))
        decoders = [self._num_decoders] if self._num_decoders > 1 else []
        return {
            "tokens": tf.reshape(tokens[..., :length], [batch, segments, *decoders, length]),
            "num_segments": tf.fill([batch], segments),
        }

    def encode(self, samples: Any, num_frames: Any) -> Tensors:
        """`encode` of the network: float32 [B, *samples_shape] and int32 [B] -> tensors by name."""
        return self.model.encode(samples, num_frames)

    def decode_step(self, inputs: Tensors) -> Tensors:
        """`decode_step` of the network, its arguments and results by name (see `step_inputs`)."""
        logits, rows = self.model.step_by_name(inputs)
        return {"logits": logits, **rows}

    def step_inputs(self) -> Tensors:
        """Names, types and shapes of what `decode_step` takes; C, the cache's length, is open.

        "tokens", "positions" int32 [B], "bias" float32 [B, C], the cache "keys_i", "values_i" for
        each layer, and what `encode` gave. A recurrent network has neither bias nor cache: the
        "state" that it returns is the "state" of the next call.
        """
        specs = {name: tf.TensorSpec([None], tf.int32, name) for name in ("tokens", "positions")}
        cache = self.model.empty_cache(1, 1)
        if cache:
            specs["bias"] = tf.TensorSpec([None, None], tf.float32, "bias")
        for name, value in cache.items():
            specs[name] = tf.TensorSpec(_open_cache(value.shape), value.dtype, name)
        for name, value in self.model.empty_memory(1).items():
            specs[name] = tf.TensorSpec([None, *value.shape[1:]], value.dtype, name)
        return specs

    def endpoints(self) -> dict[str, Endpoint]:
        """Signatures by name."""
        window = tf.TensorSpec([None, *self.config.samples_shape], tf.float32, "samples")
        num_frames = tf.TensorSpec([None], tf.int32, "num_frames")
        tracks = len(self.config.tracks_in)
        audio = tf.TensorSpec([None, tracks, None], tf.float32, "audio") if tracks else _AUDIO
        transcribe = _trace_once(self.transcribe, audio)
        of_bytes = {} if tracks else {"serving_bytes": from_bytes(transcribe, self._decode_file)}
        return {
            "serving_default": (transcribe, [audio]),
            **of_bytes,
            "encode": (self.encode, [window, num_frames]),
            "decode_step": (self.decode_step, [self.step_inputs()]),
        }

    def example_inputs(self) -> dict[str, dict[str, Any]]:
        """Small inputs of every signature: two segments, one window, one step of one sequence."""
        config = self.config
        return {
            "serving_default": _quiet_noise(config),
            **({} if config.tracks_in else {"serving_bytes": example_bytes()}),
            "encode": {
                "samples": np.zeros((1, *config.samples_shape), np.float32),
                "num_frames": np.array([config.network.segment_frames], np.int32),
            },
            "decode_step": {
                name: np.zeros([size or 1 for size in spec.shape], spec.dtype.as_numpy_dtype)
                for name, spec in self.step_inputs().items()
            },
        }

    def _decode(self, memory: Tensors) -> Any:
        """Segments begun together -> tokens [R, max_tokens], a row for each decoder of each."""
        rows = tf.shape(next(iter(memory.values())))[0]
        loop = {
            "step": tf.constant(0),
            "written": tf.zeros([rows, self.max_tokens], tf.int32),
            "row": tf.range(rows),  # of `written`
            "token": tf.zeros([rows], tf.int32),
            "finished": tf.zeros([rows], tf.bool),
            "grammar": self._grammar.start(rows),
            "cache": self.model.empty_cache(rows, min(SMALLEST_CACHE, self.max_tokens)),
            "state": {name: memory[name] for name in self.model.state_names},
            "memory": {n: v for n, v in memory.items() if n not in self.model.state_names},
        }

        def is_on(loop: Tensors) -> Any:
            return (tf.size(loop["row"]) > 0) & (loop["step"] < self.max_tokens)

        (loop,) = tf.while_loop(
            is_on,
            lambda loop: (self._advance(loop),),
            (loop,),
            shape_invariants=(_open_shapes(loop),),
            parallel_iterations=1,
        )
        return loop["written"]

    def _advance(self, loop: Tensors) -> Tensors:
        """Steps until the cache is full or half of the segments have ended, then makes room."""
        memory, row = loop["memory"], loop["row"]
        room = self._room(loop["cache"])

        def is_on(state: Tensors) -> Any:
            num_on = tf.reduce_sum(tf.cast(~self._are_over(state), tf.int32))
            return (state["step"] < room) & (2 * num_on > tf.size(row) // self._num_decoders)

        state = {name: loop[name] for name in loop if name not in ("memory", "row")}
        (state,) = tf.while_loop(
            is_on,
            lambda state: (self._step(state, memory, row),),
            (state,),
            shape_invariants=(_open_shapes(state),),
            parallel_iterations=1,
        )
        return self._make_room({**state, "memory": memory, "row": row})

    def _make_room(self, loop: Tensors) -> Tensors:
        """Drops segments that have ended; doubles the cache if it is full."""
        kept = tf.where(tf.repeat(~self._are_over(loop), self._num_decoders))[:, 0]
        per_row = {name: loop[name] for name in loop if name not in ("step", "written")}
        rest = tf.nest.map_structure(lambda values: tf.gather(values, kept), per_row)
        length = self._room(loop["cache"])
        more = tf.where(loop["step"] == length, tf.minimum(length, self.max_tokens - length), 0)
        after = [(0, 0), (0, 0), (0, more), (0, 0)]
        rest["cache"] = {name: tf.pad(rows, after) for name, rows in rest["cache"].items()}
        return {**loop, **rest}

    def _are_over(self, state: Tensors) -> Any:
        """Segments of which every decoder has ended."""
        return tf.reduce_all(tf.reshape(state["finished"], [-1, self._num_decoders]), axis=1)

    def _step(self, state: Tensors, memory: Tensors, row: Any) -> Tensors:
        """One token more for every row, all at the same position."""
        step, cache = state["step"], state["cache"]
        bias = tf.where(tf.range(self._room(cache)) < step, 0.0, MASKED)[None]
        logits, new = self.model.decode_step(
            state["token"],
            tf.fill(tf.shape(row), step),
            cache,
            bias,
            {**memory, **state["state"]},
        )
        with tf.control_dependencies([logits]):  # the cache is read no more: write in place
            cache = {name: _write(cache[name], step, new[name]) for name in cache}
        token, grammar, ended = self._grammar.choose(state["grammar"], logits)
        place = tf.stack([row, tf.fill(tf.shape(row), step)], axis=1)
        emitted = tf.where(state["finished"], 0, token)
        return {
            "step": step + 1,
            "written": tf.tensor_scatter_nd_update(state["written"], place, emitted),
            "token": token,
            "finished": state["finished"] | ended,
            "grammar": grammar,
            "cache": cache,
            "state": {name: new[name] for name in state["state"]},
        }

    def _room(self, cache: Tensors) -> Any:
        """Positions that a cache holds; without one, as of a recurrent network, all fit."""
        return next((tf.shape(kept)[2] for kept in cache.values()), self.max_tokens)


_AUDIO = tf.TensorSpec([None, None], tf.float32, "audio")


def _trace_once(function: Callable[..., Tensors], *specs: Any) -> Callable[..., Tensors]:
    """A function whose graph all signatures share that call it."""
    traced: Callable[..., Tensors] = tf.function(function, input_signature=specs, autograph=False)
    return traced


def _quiet_noise(config: ModelConfig) -> dict[str, Any]:
    shape = (*config.samples_shape[:-1], config.segment_samples + 1)
    noise = np.random.default_rng(0).normal(scale=0.01, size=shape)
    return {"audio": noise[None].astype(np.float32)}


def cut_windows(audio_BN: Any, config: ModelConfig, context: str) -> tuple[Any, Any]:
    """As `segments.cut_segments`: windows [B, S, *samples_shape], frames of each segment [S].

    Raises:
      InvalidArgumentError: a sample is no number or out of all bounds, or there are too many.
    """
    sound = tf.reduce_all(tf.abs(audio_BN) <= MAX_ABS_SAMPLE)  # NaN fails every comparison
    is_sound = tf.debugging.Assert(sound, ["audio must be finite and nominally in [-1, 1]"])
    with tf.control_dependencies([is_sound, check_length(tf.shape(audio_BN)[1], SAMPLE_RATE_HZ)]):
        audio_BN = tf.identity(audio_BN)
    length, hop_samples = config.segment_samples, config.spectrogram.hop_samples
    lead, overhang = config.lead_samples, config.overhang_samples
    tracks = len(config.tracks_in)
    if tracks:
        audio_BN = tf.reshape(audio_BN, [-1, tf.shape(audio_BN)[2]])
    num_samples = tf.shape(audio_BN)[1]
    num_segments = num_samples // length + 1
    after = num_segments * length + overhang - num_samples
    padded = tf.pad(audio_BN, [(0, 0), (lead, after)])
    windows = tf.signal.frame(padded, config.input_samples, length)
    if context == "segment":
        inner = windows[:, :, lead : lead + length]
        windows = tf.pad(inner, [(0, 0), (0, 0), (lead, overhang)])
    if tracks:
        apart = tf.reshape(windows, [-1, tracks, num_segments, config.input_samples])
        windows = tf.transpose(apart, [0, 2, 1, 3])
    num_left = num_samples - tf.range(num_segments) * length
    return windows, tf.minimum(config.network.segment_frames, num_left // hop_samples + 1)


def _in_batches(
    predict: Callable[[Any], Tensors], total: Any, batch_size: int, specs: Tensors
) -> Tensors:
    """predict(slice of rows) for `batch_size` rows at a time, its results put together.

    Args:
      predict: gives tensors by name, a row for each row of the slice.
      total: number of all rows.
      batch_size: rows at a time.
      specs: name of a result -> its type and the shape of a row.
    """
    num_batches = (total + batch_size - 1) // batch_size
    empty = {
        name: tf.TensorArray(dtype, num_batches, element_shape=(None, *shape), infer_shape=False)
        for name, (dtype, shape) in specs.items()
    }

    def add(first: Any, found: Tensors) -> tuple[Any, Tensors]:
        results = predict(slice(first, first + batch_size))
        place = first // batch_size
        return first + batch_size, {
            name: found[name].write(place, rows) for name, rows in results.items()
        }

    _, found = tf.while_loop(lambda first, _: first < total, add, (0, empty), parallel_iterations=1)
    return {name: batches.concat() for name, batches in found.items()}


def _write(kept_RHCK: Any, position: Any, new_RHK: Any) -> Any:
    """Sets one position of a cache."""
    shape, width = tf.shape(kept_RHCK), kept_RHCK.shape[3]
    places = tf.range(shape[0] * shape[1]) * shape[2] + position
    rows = tf.tensor_scatter_nd_update(
        tf.reshape(kept_RHCK, [-1, width]), places[:, None], tf.reshape(new_RHK, [-1, width])
    )
    return tf.reshape(rows, shape)


def _open_cache(shape: Any) -> list[int | None]:
    return [None, shape[1], None, shape[3]]


def _open_shapes(tensors: Tensors) -> Any:
    """Shapes in which the number of rows, and the length of caches, may change."""

    def open_shape(tensor: Any) -> Any:
        return tf.TensorShape([None, *tensor.shape[1:]] if tensor.shape.rank else [])

    shapes = tf.nest.map_structure(open_shape, tensors)
    for name, shape in shapes["cache"].items():
        shapes["cache"][name] = tf.TensorShape(_open_cache(shape))
    return shapes
