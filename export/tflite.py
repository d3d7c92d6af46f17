"""Writes an edge bundle: `model.tflite`, a network for LiteRT, and `config.json` beside it.

A detector has two signatures, of which the inputs and outputs are those of
`mt3_keras.models.detector.NoteDetector.detect` for one row:

- `detect`: a segment with the sound around it.
- `stream`: a small segment of `DetectorConfig.for_streams`, with the state before it.

How their outputs are read is in `decoding.json`, and done by `mt3_keras.roll_decoder`.

A token network has two:

- `encode`: "samples" float32 [1, *samples_shape] and "num_frames" int32 [1] -> the memory, all that
  decoding needs of a segment, by name.
- `decode_step`: "tokens" and "positions" int32 [B], "bias" float32 [B, C], the memory, and the
  cache "keys_i" and "values_i" float32 [B, H, K, C] -> "logits" float32 [B, V] and "columns"
  float32 [B, 2 * layers, H, K]: keys and values of this position, layer by layer, which the
  caller writes into the cache. B and C are open: the inputs are resized, to several sequences or
  one, and so that short segments stay cheap. Of a recurrent network there is neither bias nor
  cache: "state" float32 [B, N, D], part of the memory, is an output too, which the caller writes
  into the input for the next token. With several decoders a segment has a row for each of them:
  the memory of `encode` has so many, and B is a multiple of their number.

Caches are inputs only, since handing them through would copy them at every token; the kept keys
and values lie [H, K, T] (see `mt3_keras.models.layers.Attention`). Operators are LiteRT's own,
none of TensorFlow's.
"""

from __future__ import annotations

import collections
import json
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any, Literal

import keras
import numpy as np
import tensorflow as tf

from mt3_keras.codec import EOS
from mt3_keras.engines.litert import EdgeDetector, EdgeModel
from mt3_keras.files import replacing
from mt3_keras.grammar import Grammar, Rules
from mt3_keras.models.checksums import drop_sums, write_sums
from mt3_keras.models.config import SAMPLE_RATE_HZ, DetectorConfig
from mt3_keras.models.detector import NoteDetector
from mt3_keras.note_rolls import RollDecoding

if TYPE_CHECKING:
    from mt3_keras.models.loading import Backbone
    from mt3_keras.models.token_backbone import TokenBackbone

Quantization = Literal["none", "float16", "int8", "int8_weights"]

# Of the spectrum's matrices int8 would lose the quiet end.
SPECTRUM = ".*(log_mel|harmonics).*"
INTERVALS = ".*body.*einsum.*"  # the kernel is spread over all pairs of pitches


class ExportError(ValueError):
    """A model that cannot be exported so; one line that says why."""


def export_bundle(
    model: Backbone,
    folder: pathlib.Path,
    quantize: Quantization = "none",
    decoding: RollDecoding | None = None,
) -> pathlib.Path:
    """Writes the bundle of a model and returns its folder.

    Args:
      model: in float32, on Keras's TensorFlow backend.
      folder: made if missing; files of an earlier bundle are replaced.
      quantize: "float16" stores weights in half precision; "int8_weights" stores them in int8, one
        scale a channel, and computes in float32; "int8" also computes in int8, one scale a row of
        activations, found as it runs. The spectrum's matrices are "float16" then.
      decoding: how a detector's rolls are read; None leaves the folder's `decoding.json` alone.

    Raises:
      ExportError: another backend, another precision.
      OSError: the folder cannot be written.
    """
    if keras.backend.backend() != "tensorflow":
        raise ExportError("LiteRT export needs KERAS_BACKEND=tensorflow")
    if model.compute_dtype != "float32":
        raise ExportError(f"LiteRT export needs a float32 model: got {model.compute_dtype}")
    with tempfile.TemporaryDirectory() as scratch:
        graph = pathlib.Path(scratch) / "float32.tflite"
        graph.write_bytes(_convert(model, pathlib.Path(scratch) / "saved_model"))
        if quantize != "none":
            graph = _quantize(graph, quantize)
        folder.mkdir(parents=True, exist_ok=True)
        drop_sums(folder)
        with replacing(folder / "model.tflite") as path:
            path.write_bytes(_without_names(graph.read_bytes()))
    config = model.model_config
    described = {"class_name": config.class_name, "config": config.to_dict()}
    if not (folder / "metadata.json").exists():  # a preset's own description says the same
        with replacing(folder / "config.json") as path:
            path.write_text(json.dumps(described, indent=2) + "\n")
    if isinstance(config, DetectorConfig) and decoding is not None:
        with replacing(folder / "decoding.json") as path:
            path.write_text(decoding.to_json())
    write_sums(folder)
    return folder


def _convert(model: Backbone, folder: pathlib.Path) -> bytes:
    if isinstance(model, NoteDetector):
        return _to_tflite(_detector_signatures(model), folder)
    with model.for_edge():
        signatures = {
            "decode_step": _freeze(model, _decode_step).get_concrete_function(**_step_spec(model)),
            "encode": _freeze(model, _encode).get_concrete_function(**_encode_spec(model)),
        }
    return _to_tflite(signatures, folder)


def _detector_signatures(model: NoteDetector) -> dict[str, Any]:
    signatures = {}
    configs = {"detect": model.model_config, "stream": model.model_config.for_streams()}
    for name, config in configs.items():
        unrolled = NoteDetector(**config.to_dict(), unroll=True)
        unrolled.set_weights(model.get_weights())
        shapes = {"samples": (1, config.input_samples)}
        if name == "stream":
            state = unrolled.empty_state(1)
            shapes |= {f"state_{part}": tuple(zeros.shape) for part, zeros in state.items()}
        specs = {key: tf.TensorSpec(shape, tf.float32, key) for key, shape in shapes.items()}
        signatures[name] = _freeze(unrolled, _detect).get_concrete_function(**specs)
    return signatures


def _detect(model: NoteDetector, inputs: dict[str, Any]) -> dict[str, Any]:
    state = {name[6:]: value for name, value in inputs.items() if name.startswith("state_")}
    return model.detect(inputs["samples"], state or None)


def _to_tflite(signatures: dict[str, Any], folder: pathlib.Path) -> bytes:
    tf.saved_model.save(tf.Module(), str(folder), signatures=signatures)
    # Signatures become subgraphs in the order of their names: LiteRT's plain calls mean the first.
    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(folder), signature_keys=sorted(signatures)
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    converted: bytes = converter.convert()
    return converted


def _freeze(model: Backbone, function: Any) -> Any:
    """A graph function of a model's weights as they are now.

    The converter would leave variables of several signatures in the graph, without their values.
    """
    weights = [(variable, variable.numpy()) for variable in model.variables]

    def frozen(**inputs: Any) -> dict[str, Any]:
        constants = [(variable, tf.constant(array)) for variable, array in weights]
        with keras.StatelessScope(state_mapping=constants):
            outputs: dict[str, Any] = function(model, inputs)
        return outputs

    return tf.function(frozen, autograph=False)


def _encode(model: TokenBackbone, inputs: dict[str, Any]) -> dict[str, Any]:
    return model.encode(inputs["samples"], inputs["num_frames"])


def _decode_step(model: TokenBackbone, inputs: dict[str, Any]) -> dict[str, Any]:
    logits, new = model.step_by_name(inputs)
    names = list(model.empty_cache(1, 1))
    if not names:
        return {"logits": logits, **new}
    return {"logits": logits, "columns": tf.stack([new[name] for name in names], 1)}


def _encode_spec(model: TokenBackbone) -> dict[str, Any]:
    shape = model.model_config.samples_shape
    return {
        "samples": tf.TensorSpec((1, *shape), tf.float32, "samples"),
        "num_frames": tf.TensorSpec((1,), tf.int32, "num_frames"),
    }


def _step_spec(model: TokenBackbone) -> dict[str, Any]:
    network = model.model_config.network
    columns = (network.num_heads, network.head_width, None)
    cache = dict.fromkeys(model.empty_cache(1, 1), columns)
    bias = {"bias": (None,)} if cache else {}
    memory = {name: v.shape[1:] for name, v in model.empty_memory(1).items()}
    floats = {**bias, **cache, **memory}
    integers = ["tokens", "positions"]
    return {
        **{name: tf.TensorSpec((None,), tf.int32, name) for name in integers},
        **{name: tf.TensorSpec((None, *s), tf.float32, name) for name, s in floats.items()},
    }


def _quantize(graph: pathlib.Path, quantize: str) -> pathlib.Path:
    from litert_quantizer import Quantizer, qtyping
    from litert_quantizer.algorithm_manager import AlgorithmName

    half = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(
            16, dtype=qtyping.TensorDataType.FLOAT
        ),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    quantizer = Quantizer(str(graph))

    def store_halves(regex: str, operation: qtyping.TFLOperationName) -> None:
        quantizer.update_quantization_recipe(regex, operation, half, AlgorithmName.FLOAT_CASTING)

    product, convolution = (
        qtyping.TFLOperationName.FULLY_CONNECTED,
        qtyping.TFLOperationName.CONV_2D,
    )
    for operation in (product, convolution):
        if quantize == "int8":
            quantizer.add_dynamic_config(".*", operation, num_bits=8)
        elif quantize == "int8_weights":
            quantizer.add_weight_only_config(".*", operation, num_bits=8)
        else:
            store_halves(".*", operation)
    store_halves(SPECTRUM, product)
    if quantize.startswith("int8"):
        quantizer.add_weight_only_config(
            INTERVALS, qtyping.TFLOperationName.BATCH_MATMUL, num_bits=8
        )
    quantized = graph.with_name("quantized.tflite")
    quantizer.quantize().export_model(str(quantized))
    return quantized


def _without_names(graph: bytes) -> bytes:
    """A graph whose inner tensors have no names, by up to a fifth smaller."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(graph, 0)
    for subgraph in model.subgraphs:
        kept = {*subgraph.inputs.tolist(), *subgraph.outputs.tolist()}
        for i, tensor in enumerate(subgraph.tensors):
            if i not in kept:
                tensor.name = None
    for buffer in model.buffers:
        if buffer.offset > 1:  # the quantizer writes weights after the tables
            end = buffer.offset + buffer.size
            buffer.data = np.frombuffer(graph[buffer.offset : end], np.uint8)
            buffer.offset = buffer.size = 0
    builder = flatbuffers.Builder(len(graph))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def operators(path: pathlib.Path) -> dict[str, collections.Counter[str]]:
    """How often each operator stands in each subgraph of a .tflite file.

    Those that LiteRT does not know by itself are "CUSTOM name", TensorFlow's own "CUSTOM Flex...".
    """
    from ai_edge_litert import schema_py_generated as schema

    names = {code: name for name, code in vars(schema.BuiltinOperator).items()}
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    codes = [
        f"CUSTOM {code.customCode.decode()}"
        if code.customCode
        else str(names[max(code.builtinCode, code.deprecatedBuiltinCode)])
        for code in model.operatorCodes
    ]
    return {
        graph.name.decode(): collections.Counter(codes[op.opcodeIndex] for op in graph.operators)
        for graph in model.subgraphs
    }


def report(folder: pathlib.Path, model: Backbone) -> str:
    """A bundle's size, operators and agreement with the model it was made from."""
    path = folder / "model.tflite"
    lines = [f"{path}: {path.stat().st_size / 1e6:.1f} MB"]
    for name, counts in operators(path).items():
        lines.append(f"{name}: " + ", ".join(f"{n} {op}" for op, n in sorted(counts.items())))
    compare = _compare_rolls if isinstance(model, NoteDetector) else _compare_tokens
    lines.append(f"against Keras: {compare(folder, model)}")
    return "\n".join(lines)


def _chord(num_samples: int) -> Any:
    """Three decaying tones, float32 [n], and noise: without, silent bands are rounding errors."""
    time = np.arange(num_samples) / SAMPLE_RATE_HZ
    chord = sum(np.sin(2 * np.pi * hz * time) for hz in (220.0, 277.2, 329.6)) * np.exp(-time) / 6
    chord += np.random.default_rng(0).normal(0, 1e-3, time.size)
    return chord.astype(np.float32)


def _compare_rolls(folder: pathlib.Path, model: NoteDetector) -> str:
    samples = _chord(model.model_config.input_samples)
    expected = model.detect(samples[None])
    found = EdgeDetector(folder).detect(samples)
    difference = np.abs(found.ended - np.asarray(expected["ended"])[0])
    return (
        f"chances that notes of a chord have ended differ by at most {difference.max():.2g}, "
        f"{difference.mean():.2g} on average"
    )


def _compare_tokens(folder: pathlib.Path, model: TokenBackbone, num_tokens: int = 32) -> str:
    """Largest difference of logits, and how often the best token is the same, teacher-forced."""
    config = model.model_config
    samples, num_frames = _chord(config.input_samples), config.network.segment_frames
    samples = np.broadcast_to(samples, config.samples_shape)
    grammar = Grammar(config, Rules(constrained=True), np)
    edge = EdgeModel(folder)
    edge.encode(samples, num_frames)
    rows = config.num_decoders
    state, tokens, logits = grammar.start(rows), [np.zeros(rows, np.int32)], []

    def pick(masked: Any) -> Any:
        masked[:, EOS] = -np.inf  # a sequence of so many tokens, whatever the network thinks
        return masked.argmax(axis=-1).astype(np.int32)

    for _ in range(num_tokens):
        logits.append(edge.step(tokens[-1].tolist()))
        following, state, _ = grammar.choose(state, logits[-1].copy(), pick)
        tokens.append(following)
    inputs = {
        "samples": samples[None],
        "num_frames": np.array([num_frames], np.int32),
        "decoder_tokens": np.stack(tokens[:-1], axis=-1)[None if rows > 1 else slice(None)],
    }
    whole = np.asarray(model(inputs)).reshape(rows, num_tokens, -1)
    stepped = np.stack(logits, axis=1)
    agreeing = int(np.sum(stepped.argmax(-1) == whole.argmax(-1)))
    return (
        f"logits of {rows * num_tokens} tokens of a chord differ by at most "
        f"{np.abs(stepped - whole).max():.2g}, the best token is the same in {agreeing}"
    )
