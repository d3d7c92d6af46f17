"""Writes T5X checkpoints for tests, in the layout of the released one (facts: `models.t5x`)."""

from __future__ import annotations

import gzip
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgpack
import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import MT3Config
from mt3_keras.models.t5x import expected_leaves


def random_leaves(config: MT3Config, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """A value for every parameter of a model; matrices of a size that keeps activations near 1."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.normal(1.0, 0.1, shape)
            if len(shape) == 1
            else rng.normal(0.0, shape[0] ** -0.5, shape)
        ).astype(np.float32)
        for name, shape in expected_leaves(config).items()
    }


def is_scale(name: str) -> bool:
    """Which leaves the released checkpoints hold inline."""
    return name.endswith(".scale")


def write_t5x(
    folder: pathlib.Path,
    leaves: Mapping[str, NDArray[np.float32]],
    *,
    inline: Callable[[str], bool] = is_scale,
    version: int = 3,
    **zarr_settings: Any,
) -> pathlib.Path:
    """Writes a checkpoint and returns its folder.

    Args:
      folder: is made; must not hold a checkpoint.
      leaves: name ("encoder.encoder_norm.scale") -> array.
      inline: tells by name which leaves go into the file `checkpoint`, the others get zarr folders.
      version: of the format, as stored.
      **zarr_settings: see `write_zarr`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target: dict[str, Any] = {}
    for name, values in leaves.items():
        *parents, last = name.split(".")
        node = target
        for parent in parents:
            node = node.setdefault(parent, {})
        if inline(name):
            node[last] = pack_array(values)
        else:
            node[last] = zarr_spec(f"target.{name}")
            write_zarr(folder / f"target.{name}", values, **zarr_settings)
    state = {"step": pack_array(np.array([7], np.int32)), "param_states": {}}
    write_tree(folder, {"version": version, "optimizer": {"target": target, "state": state}})
    return folder


def write_tree(folder: pathlib.Path, tree: Any) -> None:
    """Writes the file `checkpoint`."""
    (folder / "checkpoint").write_bytes(msgpack.packb(tree))


def pack_array(values: NDArray[Any]) -> msgpack.ExtType:
    """An array as Flax packs it."""
    return msgpack.ExtType(1, msgpack.packb((values.shape, values.dtype.name, values.tobytes())))


def zarr_spec(path: str) -> dict[str, Any]:
    """The entry that stands for an array kept in the folder `path`."""
    return {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "gfile", "path": f"{path}/"},
    }


def write_zarr(
    folder: pathlib.Path,
    values: NDArray[np.float32],
    *,
    chunks: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape,
    dtype: str = "<f4",
    order: Literal["C", "F"] = "C",
    compress: bool = True,
    separator: str = ".",
) -> None:
    """Writes a zarr version 2 array; `chunks` gives the chunks' shape for an array's shape.

    "bfloat16" is cut off, not rounded. Chunks at the edges are filled up with NaN, which must
    never be read.
    """
    sizes = chunks(values.shape)
    header = {
        "zarr_format": 2,
        "shape": list(values.shape),
        "chunks": list(sizes),
        "dtype": dtype,
        "order": order,
        "compressor": {"id": "gzip", "level": 1} if compress else None,
        "fill_value": None,
        "filters": None,
        "dimension_separator": separator,
    }
    folder.mkdir()
    (folder / ".zarray").write_text(json.dumps(header))
    grid = [range(-(-n // size)) for n, size in zip(values.shape, sizes, strict=True)]
    for index in itertools.product(*grid):
        place = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, sizes, strict=True))
        chunk = np.full(sizes, np.nan, np.float32)
        chunk[tuple(slice(n) for n in values[place].shape)] = values[place]
        raw = (
            (chunk.view(np.uint32) >> 16).astype("<u2")
            if dtype == "bfloat16"
            else chunk.astype(dtype)
        ).tobytes(order)
        path = folder / separator.join(map(str, index))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(raw, compresslevel=1) if compress else raw)
