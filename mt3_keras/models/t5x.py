"""T5X checkpoint -> named arrays, without JAX, Flax or TensorStore.

A T5X ("legacy") checkpoint is a folder. Its file `checkpoint` is a Flax msgpack tree; a leaf of
the tree is either the array itself or a TensorStore spec that names a zarr (version 2) folder
beside the file. The released MT3 keeps its 147 matrices in zarr and its 42 norm scales in the
tree; newer T5X may keep the scales in zarr too, so every leaf may come either way.

Differences from T5X: the optimizer's state is left aside; bfloat16, float16 and float64 become
float32; an absent zarr chunk is an error rather than a chunk of zeros, because a copy that was cut
short looks the same; Flax's chunked form, used only for arrays above 1 GiB, is not read. Nothing
is ever unpickled, and no more memory is taken than the declared, bounded shapes need.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import ISMIR2021, MT3, MT3Config, T5Config

Shapes = dict[str, tuple[int, ...]]

HEAD_WIDTH = 64
CURE = "copy the folder again"

MAX_FILE_BYTES = 2**31
# The largest matrix of any released MT3 has 1.6 million numbers.
MAX_LEAF_NUMBERS = 2**26
MAX_AXES = 8
# The parser reserves room for as many items as an array's header claims; the tree's own arrays are
# shapes of a few numbers.
MAX_TREE_ARRAY_ITEMS = 4096

_FLAX_ARRAY = 1  # msgpack extension code
_NAME = re.compile(r"\w[\w.-]*")
_CONFIGS = {c.network.vocabulary_rows: c for c in (MT3, ISMIR2021)}
# T5X wrote bfloat16 as plain 16-bit words before format version 3.
_STORED_DTYPES = {
    **{name: name for name in ("<f2", "<f4", "<f8", "<u2")},
    **{"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "<u2"},
}
_ZARR_SETTINGS: dict[str, tuple[Any, ...]] = {
    "zarr_format": (2,),
    "compressor": (None, "gzip"),
    "filters": (None, []),
    "dtype": tuple(_STORED_DTYPES),
    "order": ("C", "F"),
    "dimension_separator": (".", "/"),
}


class CheckpointError(ValueError):
    """A checkpoint cannot be used: one line naming the file or leaf, and the cure."""


def load_t5x(folder: str | pathlib.Path) -> tuple[MT3Config, dict[str, NDArray[np.float32]]]:
    """Reads an MT3 checkpoint, works out its sizes and checks that every leaf is there.

    Args:
      folder: see `read_t5x`.

    Returns:
      The model's description, and all its leaves as named by `expected_leaves`.

    Raises:
      CheckpointError: the folder is not a whole, undamaged MT3 checkpoint.
    """
    leaves = read_t5x(folder)
    try:
        config = config_of(leaves)
        check_leaves(leaves, config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return config, leaves


def read_t5x(folder: str | pathlib.Path) -> dict[str, NDArray[np.float32]]:
    """Reads every leaf under `target`, the model's parameters, whatever the model.

    Args:
      folder: the folder that holds the file `checkpoint`, or its parent if that holds exactly one
        `checkpoint_<step>`.

    Returns:
      Name, such as "encoder.layers_0.attention.query.kernel", -> array in its stored shape.

    Raises:
      CheckpointError: the folder is no T5X checkpoint, or a part of it is missing or damaged.
    """
    home = _find_checkpoint(pathlib.Path(folder))
    leaves = dict(_flatten(_read_target(home / "checkpoint"), home / "checkpoint"))

    def read_leaf(name: str) -> NDArray[np.float32]:
        leaf = leaves[name]
        if isinstance(leaf, dict):
            return _read_zarr(_zarr_folder(leaf, name, home))
        return _read_inline(leaf, f"{home / 'checkpoint'}: leaf {name}")

    # Unpacking takes most of the time and does not hold the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(leaves, pool.map(read_leaf, leaves), strict=True))


def config_of(leaves: Mapping[str, NDArray[Any]]) -> MT3Config:
    """The model whose weights these are, found from a few shapes (all: `check_leaves`).

    The rows of the token embedding tell the released vocabularies apart: 1536 is mt3's, 1664 is
    that of ismir2021. What shapes do not show (hop, mel edges, dropout) is as in those models.

    Raises:
      CheckpointError: a leaf that must tell a size is missing or not of a possible shape.
    """
    num_mels, width = _matrix_shape(leaves, "encoder.continuous_inputs_projection.kernel")
    rows, _ = _matrix_shape(leaves, "decoder.token_embedder.embedding")
    _, attention_width = _matrix_shape(leaves, "encoder.layers_0.attention.query.kernel")
    _, mlp_width = _matrix_shape(leaves, "encoder.layers_0.mlp.wi_0.kernel")
    if rows not in _CONFIGS:
        known = " or ".join(f"{n} rows" for n in _CONFIGS)
        raise CheckpointError(
            f"decoder.token_embedder.embedding must have {known}: got {rows}; "
            "give an mt3 or ismir2021 checkpoint"
        )
    if attention_width % HEAD_WIDTH:
        raise CheckpointError(
            f"encoder.layers_0.attention.query.kernel must have a multiple of {HEAD_WIDTH} "
            f"columns: got {attention_width}; {CURE}"
        )
    base = _CONFIGS[rows]
    try:
        return dataclasses.replace(
            base,
            spectrogram=dataclasses.replace(base.spectrogram, num_mels=num_mels),
            network=dataclasses.replace(
                base.network,
                width=width,
                num_heads=attention_width // HEAD_WIDTH,
                num_encoder_layers=_num_layers(leaves, "encoder"),
                num_decoder_layers=_num_layers(leaves, "decoder"),
                mlp_width=mlp_width,
            ),
        )
    except ValueError as error:
        raise CheckpointError(f"{error}; {CURE}") from error


def expected_leaves(config: MT3Config) -> Shapes:
    """Name -> shape of every parameter: 189 for mt3. Kernels are [in, out], as in Keras."""
    net = config.network
    leaves: Shapes = {
        "encoder.continuous_inputs_projection.kernel": (config.spectrogram.num_mels, net.width),
        "encoder.encoder_norm.scale": (net.width,),
        "decoder.token_embedder.embedding": (net.vocabulary_rows, net.width),
        "decoder.decoder_norm.scale": (net.width,),
        "decoder.logits_dense.kernel": (net.width, net.vocabulary_rows),
    }
    for i in range(net.num_encoder_layers):
        norms = {"attention": "pre_attention_layer_norm"}
        leaves |= _layer_leaves(f"encoder.layers_{i}", norms, net)
    for i in range(net.num_decoder_layers):
        norms = {
            "self_attention": "pre_self_attention_layer_norm",
            "encoder_decoder_attention": "pre_cross_attention_layer_norm",
        }
        leaves |= _layer_leaves(f"decoder.layers_{i}", norms, net)
    return leaves


def check_leaves(leaves: Mapping[str, NDArray[Any]], config: MT3Config) -> None:
    """Checks that the leaves are those of `expected_leaves`, no fewer and no more, and finite.

    Raises:
      CheckpointError: they are not; names the first leaves of each fault and counts the rest.
    """
    expected = expected_leaves(config)
    common = [name for name in expected if name in leaves]
    faults = {
        "missing": [name for name in expected if name not in leaves],
        "left over": [name for name in leaves if name not in expected],
        "wrongly shaped": [
            f"{name} {leaves[name].shape} for {expected[name]}"
            for name in common
            if leaves[name].shape != expected[name]
        ],
        "not finite": [name for name in common if not np.isfinite(leaves[name]).all()],
    }
    found = [
        f"{len(names)} {fault} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for fault, names in faults.items()
        if names
    ]
    if found:
        raise CheckpointError(f"leaves do not make an MT3 model: {'; '.join(found)}; {CURE}")


def assign_leaves(leaves: Mapping[str, NDArray[np.float32]], model: Any) -> None:
    """Sets the weights of an `MT3Backbone` built for the same config; every leaf is used."""
    encoder, decoder = model.encoder, model.decoder
    variables = {
        "encoder.continuous_inputs_projection.kernel": encoder.projection.kernel,
        "encoder.encoder_norm.scale": encoder.norm.scale,
        "decoder.token_embedder.embedding": decoder.embedding.embeddings,
        "decoder.decoder_norm.scale": decoder.norm.scale,
        "decoder.logits_dense.kernel": decoder.logits.kernel,
    }
    for i, layer in enumerate(encoder.layers):
        blocks = {"attention": layer.attention, "mlp": layer.mlp}
        norms = {"pre_attention": layer.attention_norm, "pre_mlp": layer.mlp_norm}
        variables |= _layer_variables(f"encoder.layers_{i}", blocks, norms)
    for i, layer in enumerate(decoder.layers):
        blocks = {
            "self_attention": layer.self_attention,
            "encoder_decoder_attention": layer.cross_attention,
            "mlp": layer.mlp,
        }
        norms = {
            "pre_self_attention": layer.self_norm,
            "pre_cross_attention": layer.cross_norm,
            "pre_mlp": layer.mlp_norm,
        }
        variables |= _layer_variables(f"decoder.layers_{i}", blocks, norms)
    if set(variables) != set(leaves) or len(variables) != len(model.weights):
        raise CheckpointError(
            f"the checkpoint has {len(leaves)} leaves, the model {len(model.weights)} weights: "
            "build the model from the checkpoint's own config"
        )
    for name, variable in variables.items():
        variable.assign(leaves[name])


def _layer_variables(layer: str, blocks: dict[str, Any], norms: dict[str, Any]) -> dict[str, Any]:
    """A layer's variables by the names that T5X gives them."""
    variables = {f"{layer}.{name}_layer_norm.scale": norm.scale for name, norm in norms.items()}
    for block_name, block in blocks.items():
        parts = ("wi_0", "wi_1", "wo") if block_name == "mlp" else ("query", "key", "value", "out")
        variables |= {
            f"{layer}.{block_name}.{part}.kernel": getattr(block, part).kernel for part in parts
        }
    return variables


def _layer_leaves(layer: str, attention_norms: dict[str, str], net: T5Config) -> Shapes:
    leaves: Shapes = {
        f"{layer}.pre_mlp_layer_norm.scale": (net.width,),
        f"{layer}.mlp.wi_0.kernel": (net.width, net.mlp_width),
        f"{layer}.mlp.wi_1.kernel": (net.width, net.mlp_width),
        f"{layer}.mlp.wo.kernel": (net.mlp_width, net.width),
    }
    attention_width = net.num_heads * net.head_width
    for attention, norm in attention_norms.items():
        leaves[f"{layer}.{norm}.scale"] = (net.width,)
        for part in ("query", "key", "value"):
            leaves[f"{layer}.{attention}.{part}.kernel"] = (net.width, attention_width)
        leaves[f"{layer}.{attention}.out.kernel"] = (attention_width, net.width)
    return leaves


def _matrix_shape(leaves: Mapping[str, NDArray[Any]], name: str) -> tuple[int, int]:
    if name not in leaves:
        raise CheckpointError(f"leaf {name} is missing; {CURE}")
    shape = leaves[name].shape
    if len(shape) != 2:
        raise CheckpointError(f"leaf {name} must be a matrix: got shape {shape}; {CURE}")
    return shape[0], shape[1]


def _num_layers(leaves: Mapping[str, NDArray[Any]], stack: str) -> int:
    """Counts, rather than takes the highest number, so that no damaged name asks for millions."""
    return len({m[0] for m in (re.match(rf"{stack}\.layers_\d+\.", name) for name in leaves) if m})


def _find_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give the one that holds `checkpoint`")
        if (folder / "checkpoint").is_file():
            return folder
        steps = [
            path.parent
            for path in folder.glob("checkpoint_*/checkpoint")
            if re.fullmatch(r"checkpoint_\d+", path.parent.name)
        ]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from error
    if len(steps) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(steps)} checkpoints; give one of them, such as {max(steps).name}"
        )
    if not steps:
        raise CheckpointError(
            f"{folder}: no T5X checkpoint, it has no file `checkpoint`; give the folder that has"
        )
    return steps[0]


def _read_target(path: pathlib.Path) -> Any:
    """The parameters' subtree. Arrays stay packed (`msgpack.ExtType`) until they are needed."""
    packed = _read_file(path)
    try:
        tree = msgpack.unpackb(packed, max_array_len=MAX_TREE_ARRAY_ITEMS)
        version, target = tree.get("version"), tree["optimizer"]["target"]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a T5X checkpoint, or damaged; {CURE}") from error
    if version not in (2, 3):
        raise CheckpointError(
            f"{path}: format version must be 2 or 3: got {str(version)[:20]!r}; "
            "save it again with a current T5X"
        )
    return target


def _flatten(target: Any, path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, packed array or TensorStore spec)."""
    waiting = [("", target)]
    while waiting:
        prefix, node = waiting.pop()
        if isinstance(node, dict) and not node.keys() >= {"driver", "kvstore"}:
            for key, child in reversed(node.items()):
                if not (isinstance(key, str) and _NAME.fullmatch(key)):
                    raise CheckpointError(f"{path}: {key!r:.40} is no name of a leaf; {CURE}")
                waiting.append((f"{prefix}.{key}" if prefix else key, child))
        else:
            yield prefix, node


def _zarr_folder(spec: dict[str, Any], name: str, home: pathlib.Path) -> pathlib.Path:
    """The folder beside `checkpoint` with the last name of the spec's path.

    T5X wrote the path for wherever the training ran (a bucket, a cluster's disk); only the last
    part of it says anything here, and nothing outside the checkpoint is ever opened.
    """
    kvstore = spec["kvstore"]
    path = kvstore.get("path") if isinstance(kvstore, dict) else None
    folder = pathlib.PurePosixPath(path).name if isinstance(path, str) else ""
    if spec["driver"] != "zarr" or not _NAME.fullmatch(folder):
        raise CheckpointError(
            f"{home / 'checkpoint'}: leaf {name} must name a zarr folder: "
            f"got driver {str(spec['driver'])[:20]!r} and path {str(path)[:80]!r}; {CURE}"
        )
    return home / folder


def _read_inline(leaf: Any, where: str) -> NDArray[np.float32]:
    """Unpacks Flax's array: msgpack of (shape, name of the dtype, bytes in C order)."""
    try:
        if leaf.code != _FLAX_ARRAY:
            raise TypeError
        shape, dtype, values = msgpack.unpackb(leaf.data, max_array_len=MAX_TREE_ARRAY_ITEMS)
        return _decode(values, _STORED_DTYPES[dtype]).reshape(_checked_shape(shape))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{where} is no array of numbers, or damaged; {CURE}") from error


class _ZarrHeader(NamedTuple):
    """What `.zarray` says; `dtype` is numpy's name of it."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    order: Literal["C", "F"]
    is_gzipped: bool
    separator: str


def _read_zarr_header(path: pathlib.Path) -> _ZarrHeader:
    text = _read_file(path)
    try:
        values = {"filters": None, "dimension_separator": "."} | json.loads(text)
        values["compressor"] = values["compressor"] and values["compressor"]["id"]
        settings = {name: values[name] for name in _ZARR_SETTINGS}
        shape, chunks = _checked_shape(values["shape"]), _checked_shape(values["chunks"])
        if len(shape) != len(chunks):
            raise ValueError("chunks must have as many axes as the array")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a zarr header, or damaged; {CURE}") from error
    for name, allowed in _ZARR_SETTINGS.items():
        if settings[name] not in allowed:
            raise CheckpointError(
                f"{path}: {name} must be {' or '.join(map(str, allowed))}: "
                f"got {settings[name]!r:.40}; save the checkpoint again with T5X's own settings"
            )
    return _ZarrHeader(
        shape,
        chunks,
        dtype=_STORED_DTYPES[settings["dtype"]],
        order=settings["order"],
        is_gzipped=settings["compressor"] == "gzip",
        separator=settings["dimension_separator"],
    )


def _read_zarr(folder: pathlib.Path) -> NDArray[np.float32]:
    header = _read_zarr_header(folder / ".zarray")
    array = np.empty(header.shape, np.float32)
    grid = [-(-size // chunk) for size, chunk in zip(header.shape, header.chunks, strict=True)]
    for index in np.ndindex(*grid):
        starts = [i * chunk for i, chunk in zip(index, header.chunks, strict=True)]
        place = tuple(slice(a, a + c) for a, c in zip(starts, header.chunks, strict=True))
        # A chunk at the edge is stored whole: what reaches over it has no meaning.
        kept = tuple(slice(n - a) for a, n in zip(starts, header.shape, strict=True))
        path = folder / (header.separator.join(map(str, index)) or "0")
        array[place] = _read_chunk(path, header)[kept]
    return array


def _read_chunk(path: pathlib.Path, header: _ZarrHeader) -> NDArray[np.float32]:
    num_bytes = math.prod(header.chunks) * np.dtype(header.dtype).itemsize
    values = _read_file(path)
    if header.is_gzipped:
        # One byte more than is due: too much is noticed, yet never unpacked further.
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            values = unpacker.decompress(values, num_bytes + 1)
        except zlib.error as error:
            raise CheckpointError(f"{path}: damaged ({error}); {CURE}") from error
        if len(values) == num_bytes and not unpacker.eof:
            raise CheckpointError(f"{path}: cut short before its checksum; {CURE}")
    if len(values) != num_bytes:
        more_or_less = "more" if len(values) > num_bytes else "less"
        raise CheckpointError(f"{path}: holds {more_or_less} than {num_bytes} bytes; {CURE}")
    return _decode(values, header.dtype).reshape(header.chunks, order=header.order)


def _decode(values: bytes, dtype: str) -> NDArray[np.float32]:
    """Flat numbers; bfloat16 ("<u2") is the upper half of a float32."""
    numbers = np.frombuffer(values, dtype)
    if dtype == "<u2":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # `check_leaves` reports what is not finite
        return numbers.astype(np.float32)


def _checked_shape(values: Any) -> tuple[int, ...]:
    """A shape read from a file; ValueError if it is none, or larger than a model can have."""
    if not all(type(size) is int and size > 0 for size in values):
        raise ValueError("sizes must be positive integers")
    if len(values) > MAX_AXES or math.prod(values) > MAX_LEAF_NUMBERS:
        raise ValueError("array is too large")
    return tuple(values)


def _read_file(path: pathlib.Path) -> bytes:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: file is missing; {CURE}")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_FILE_BYTES} bytes; {CURE}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {CURE}") from error
