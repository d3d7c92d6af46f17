"""What a served model computes: samples in, tokens and what the heads say out, all in the graph.

Nothing of this project is needed to serve it. Its graphs hold no XLA operation: the published
binaries of TF Serving cannot run them on a GPU, on a CPU not by default (tensorflow/serving, issues
2214 and 2217). That rules out `generation.Search`, whose loop is compiled. The loop here is
another, with the same tokens: a batch of segments begins together, and when half of them have
ended the rest is packed into a smaller batch.
"""

from __future__ import annotations

from typing import Any, Literal

import tensorflow as tf
from keras import ops

from mt3_keras.codec import EOS
from mt3_keras.grammar import STATE, Grammar, Rules
from mt3_keras.models.config import NUM_CLASSES, NUM_PITCHES
from mt3_keras.models.layers import MASKED
from mt3_keras.models.mt3 import MT3Backbone, without_rolls
from mt3_keras.note_rolls import NUM_PACKED, NUM_SCORES
from mt3_keras.segments import MAX_ABS_SAMPLE, check_context

Tensors = dict[str, Any]

SMALLEST_CACHE = 64  # positions; doubled as often as needed


class ServedModel:
    """The functions of a model that are served; they are traced, not run.

    Args:
      model: the network, weights loaded.
      context, method, rules, max_tokens: as in `Transcriber`; "beam1" is not for serving.
      batch_size: segments decoded side by side, whatever the number of a request's. Memory grows
        with it, and with nothing else but the request itself.
    """

    def __init__(
        self,
        model: MT3Backbone,
        *,
        context: Literal["segment", "full"] = "full",
        method: Literal["greedy", "heads"] | None = None,
        rules: Rules | None = None,
        batch_size: int = 16,
        max_tokens: int | None = None,
    ) -> None:
        check_context(context)
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive: got {batch_size}")
        self.model, self.config = model, model.model_config
        self.context, self.batch_size = context, batch_size
        self.method = self.config.network.choose_method(method)
        if self.method == "beam1":
            raise ValueError("method must be greedy or heads for serving: got 'beam1'")
        self.max_tokens = self.config.network.token_limit(max_tokens)
        self._grammar = Grammar(self.config, rules or Rules(stop_runaways=True), ops)
        self.rules = self._grammar.rules

    def transcribe(self, audio: Any) -> Tensors:
        """Recordings of one length -> the tokens of their segments.

        Args:
          audio: float32 [B, n], 16 kHz mono.

        Returns:
          "tokens" int32 [B, S, L], each row up to and including EOS, then zeros, and EOS alone
          where the heads decide; "num_segments" int32 [B], S each; of networks with heads also
          "note_rolls" uint8 [B, S, F, NUM_PACKED]: in each frame the heads' probabilities times
          255, but the likeliest class of each pitch that the rules allow (see
          `mt3_keras.note_rolls`).

        Raises:
          InvalidArgumentError: a sample is no number or out of all bounds.
        """
        sound = tf.reduce_all(tf.abs(audio) <= MAX_ABS_SAMPLE)  # NaN fails every comparison
        with tf.control_dependencies(
            [tf.debugging.Assert(sound, ["audio must be finite and nominally in [-1, 1]"])]
        ):
            windows_BSN, num_frames_S = self._cut(tf.identity(audio))
        batch, segments = tf.shape(windows_BSN)[0], tf.shape(windows_BSN)[1]
        windows = tf.reshape(windows_BSN, [batch * segments, self.config.input_samples])
        num_frames = tf.tile(num_frames_S, [batch])
        found = self._decode_all(windows, num_frames)
        tokens = found["tokens"]
        is_used = tf.reduce_any(tokens != 0, axis=0)
        length = tf.reduce_max(tf.where(is_used, tf.range(self.max_tokens) + 1, 0))
        found["tokens"] = tf.reshape(tokens[:, :length], [batch, segments, length])
        if "note_rolls" in found:
            shape = [batch, segments, self.config.network.segment_frames, NUM_PACKED]
            found["note_rolls"] = tf.reshape(found["note_rolls"], shape)
        return found | {"num_segments": tf.fill([batch], segments)}

    def encode(self, samples: Any, num_frames: Any) -> Tensors:
        """`MT3Backbone.encode`: float32 [B, input_samples] and int32 [B] -> tensors by name."""
        return self.model.encode(samples, num_frames)

    def decode_step(self, inputs: Tensors) -> Tensors:
        """`MT3Backbone.decode_step`, its arguments and results by name (see `step_inputs`)."""
        cache = {name: inputs[name] for name in self.model.empty_cache(1, 1)}
        logits, rows = self.model.decode_step(
            inputs["tokens"],
            inputs["positions"],
            cache,
            inputs["bias"],
            {name: inputs[name] for name in inputs.keys() & self.model.empty_memory(1).keys()},
            {name: inputs[name] for name in inputs.keys() & set(STATE)},
        )
        return {"logits": logits, **rows}

    def step_inputs(self) -> Tensors:
        """Names, types and shapes of what `decode_step` takes; C, the cache's length, is open.

        "tokens", "positions" int32 [B], "bias" float32 [B, C], the cache "keys_i", "values_i" for
        each layer, what `encode` gave (but for the heads' rolls), and, if the network asks for
        them, "time", "program", "velocity", "section" int32 [B].
        """
        rows = {"tokens": tf.int32, "positions": tf.int32}
        if self.model.decoder.uses_state:
            rows |= dict.fromkeys(STATE, tf.int32)
        specs = {name: tf.TensorSpec([None], dtype, name) for name, dtype in rows.items()}
        specs["bias"] = tf.TensorSpec([None, None], tf.float32, "bias")
        for name, value in self.model.empty_cache(1, 1).items():
            specs[name] = tf.TensorSpec(_open_cache(value.shape), value.dtype, name)
        for name, value in without_rolls(self.model.empty_memory(1)).items():
            specs[name] = tf.TensorSpec([None, *value.shape[1:]], value.dtype, name)
        return specs

    def _cut(self, audio_BN: Any) -> tuple[Any, Any]:
        """As `segments.cut_segments`: windows [B, S, input_samples], frames of each segment [S]."""
        config, length = self.config, self.config.segment_samples
        hop_samples = config.spectrogram.hop_samples
        step = config.network.hop_frames(self.method) * hop_samples
        lead, overhang = config.spectrogram.lead_samples, config.spectrogram.overhang_samples
        num_samples = tf.shape(audio_BN)[1]
        num_segments = tf.maximum(num_samples - length + step, 0) // step + 1
        after = (num_segments - 1) * step + length + overhang - num_samples
        padded = tf.pad(audio_BN, [(0, 0), (lead, after)])
        windows = tf.signal.frame(padded, config.input_samples, step)
        if self.context == "segment":
            inner = windows[:, :, lead : lead + length]
            windows = tf.pad(inner, [(0, 0), (0, 0), (lead, overhang)])
        num_left = num_samples - tf.range(num_segments) * step
        return windows, tf.minimum(config.network.segment_frames, num_left // hop_samples + 1)

    def _decode_all(self, windows: Any, num_frames: Any) -> Tensors:
        """Segments [N, ...], `batch_size` at a time -> "tokens" [N, max_tokens].

        With heads also "note_rolls" [N, F, NUM_PACKED].
        """
        total, network = tf.shape(windows)[0], self.config.network
        num_batches = (total + self.batch_size - 1) // self.batch_size
        specs: Tensors = {"tokens": (tf.int32, (None, self.max_tokens))}
        if network.heads:
            specs["note_rolls"] = (tf.uint8, (None, network.segment_frames, NUM_PACKED))
        empty = {
            name: tf.TensorArray(dtype, num_batches, element_shape=shape, infer_shape=False)
            for name, (dtype, shape) in specs.items()
        }

        def decode(first: Any, found: Tensors) -> tuple[Any, Tensors]:
            last = first + self.batch_size
            memory = self.model.encode(windows[first:last], num_frames[first:last])
            if self.method == "heads":
                rows = tf.shape(memory["note_rolls"])[0]
                batch = {
                    "tokens": tf.pad(tf.fill([rows, 1], EOS), [(0, 0), (0, self.max_tokens - 1)])
                }
            else:
                batch = {"tokens": self._decode(without_rolls(memory))}
            if network.heads:
                batch["note_rolls"] = self._pack(memory["note_rolls"])
            place = first // self.batch_size
            return last, {name: found[name].write(place, rows) for name, rows in batch.items()}

        _, found = tf.while_loop(
            lambda first, _: first < total, decode, (0, empty), parallel_iterations=1
        )
        return {name: batches.concat() for name, batches in found.items()}

    def _pack(self, values: Any) -> Any:
        """The heads' rolls [R, F, NUM_COLUMNS] as they are served, uint8 [R, F, NUM_PACKED]."""
        scores, classes = values[..., :NUM_SCORES], values[..., NUM_SCORES:]
        classes = tf.reshape(classes, [-1, values.shape[1], NUM_PITCHES, NUM_CLASSES])
        if self.rules.programs is not None:
            allowed = {program // 8 for program in self.rules.programs}
            classes *= tf.constant([float(i in allowed) for i in range(NUM_CLASSES)])
        likeliest = tf.argmax(classes, axis=-1, output_type=tf.int32)
        packed = [tf.round(255 * scores), tf.cast(likeliest, tf.float32)]
        return tf.cast(tf.concat(packed, axis=-1), tf.uint8)

    def _decode(self, memory: Tensors) -> Any:
        """Segments begun together -> tokens [R, max_tokens]."""
        rows = tf.shape(next(iter(memory.values())))[0]
        loop = {
            "step": tf.constant(0),
            "written": tf.zeros([rows, self.max_tokens], tf.int32),
            "row": tf.range(rows),  # of `written`
            "token": tf.zeros([rows], tf.int32),
            "finished": tf.zeros([rows], tf.bool),
            "grammar": self._grammar.start(rows),
            "cache": self.model.empty_cache(rows, min(SMALLEST_CACHE, self.max_tokens)),
            "memory": memory,
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
        """Steps until the cache is full or half of the rows have ended, then makes room."""
        memory, row = loop["memory"], loop["row"]
        room = _length(loop["cache"])

        def is_on(state: Tensors) -> Any:
            num_on = tf.reduce_sum(tf.cast(~state["finished"], tf.int32))
            return (state["step"] < room) & (2 * num_on > tf.size(row))

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
        """Drops rows that have ended; doubles the cache if it is full."""
        kept = tf.where(~loop["finished"])[:, 0]
        per_row = {name: loop[name] for name in loop if name not in ("step", "written")}
        rest = tf.nest.map_structure(lambda values: tf.gather(values, kept), per_row)
        length = _length(loop["cache"])
        more = tf.where(loop["step"] == length, tf.minimum(length, self.max_tokens - length), 0)
        after = [(0, 0), (0, 0), (0, more), (0, 0)]
        rest["cache"] = {name: tf.pad(rows, after) for name, rows in rest["cache"].items()}
        return {**loop, **rest}

    def _step(self, state: Tensors, memory: Tensors, row: Any) -> Tensors:
        """One token more for every row; as `generation.Search`, but all at the same position."""
        step, cache = state["step"], state["cache"]
        bias = tf.where(tf.range(_length(cache)) < step, 0.0, MASKED)[None]
        logits, new = self.model.decode_step(
            state["token"],
            tf.fill(tf.shape(row), step),
            cache,
            bias,
            memory,
            state["grammar"],
        )
        with tf.control_dependencies([logits]):  # nobody reads the cache any more: write in place
            cache = {name: _write(cache[name], step, new[name]) for name in cache}
        if self.rules.restricts_tokens:
            logits = tf.where(self._grammar.legal_tokens(state["grammar"]), logits, MASKED)
        token = tf.argmax(logits, axis=-1, output_type=tf.int32)
        grammar = self._grammar.advance(state["grammar"], token)
        if self.rules.stop_runaways:
            token = tf.where(self._grammar.runs_away(grammar), EOS, token)
        place = tf.stack([row, tf.fill(tf.shape(row), step)], axis=1)
        said = tf.where(state["finished"], 0, token)
        return {
            "step": step + 1,
            "written": tf.tensor_scatter_nd_update(state["written"], place, said),
            "token": token,
            "finished": state["finished"] | (token == EOS),
            "grammar": grammar,
            "cache": cache,
        }


def _length(cache: Tensors) -> Any:
    return tf.shape(next(iter(cache.values())))[2]


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
