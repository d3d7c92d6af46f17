"""Checkpoints of a run: everything that training is resumed from, and nothing that is unpickled.

A checkpoint is a folder `checkpoints/step_<updates>` of two files: `arrays.npz` holds every
variable of the model (weights, the states of its random numbers) and of the optimizer (its
averages, its count of batches, the averaged weights), `state.json` their names, the state of the
data and a checksum of the other file. It is written under a temporary name and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops
from numpy.typing import NDArray

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")


class StateError(ValueError):
    """A checkpoint cannot be used or written: one line naming it, and the cure."""


class RunState(NamedTuple):
    """A checkpoint's content.

    Attributes:
      step: updates of the weights.
      data: state of the data after the batches of these updates.
      arrays: values of all variables, in their order.
      names: their paths.
    """

    step: int
    data: Any
    arrays: list[NDArray[Any]]
    names: list[str]


def save_state(
    folder: pathlib.Path, step: int, variables: Sequence[Any], data: Any, *, keep: int
) -> pathlib.Path:
    """Writes a checkpoint and removes all but the newest `keep`.

    Args:
      folder: of the checkpoints.
      step: updates of the weights so far.
      variables: of the model, then of the optimizer.
      data: the data's state, JSON.
      keep: checkpoints that stay.

    Raises:
      StateError: a value is not finite, or the disk is full or read-only.
    """
    arrays = [value_of(v) for v in variables]
    names = [v.path for v in variables]
    for name, array in zip(names, arrays, strict=True):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise StateError(f"{name} is not finite at step {step}: no checkpoint is written")
    path = folder / f"step_{step:08d}"
    partial = folder / f".step_{step:08d}.part"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        named: dict[str, Any] = {f"{i:05d}": array for i, array in enumerate(arrays)}
        np.savez(partial / "arrays.npz", **named)
        stored = {
            "format": FORMAT,
            "step": step,
            "names": names,
            "data": data,
            "sha256": _sha256(partial / "arrays.npz"),
        }
        (partial / "state.json").write_text(json.dumps(stored))
        for file in partial.iterdir():
            _flush(file)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        _flush(folder)
        for old in saved_steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step_{old:08d}", ignore_errors=True)
    except OSError as error:
        raise StateError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def value_of(variable: Any) -> NDArray[Any]:
    """A variable's value, also of one that lives on several devices."""
    return np.asarray(ops.convert_to_numpy(ops.convert_to_tensor(variable)))


def saved_steps(folder: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def load_newest(folder: pathlib.Path, tell: Callable[[str], None]) -> RunState | None:
    """The newest checkpoint that is whole, or None if there never was one.

    Args:
      folder: of the checkpoints.
      tell: is given a line for each damaged checkpoint passed over.

    Raises:
      StateError: there are checkpoints, all of them damaged.
    """
    steps = saved_steps(folder)
    for step in reversed(steps):
        path = folder / f"step_{step:08d}"
        try:
            return _load(path)
        except Exception as error:  # of any kind: damage has no end of them
            reason = " ".join(str(error).split()) or type(error).__name__
            tell(f"{path}: damaged ({reason:.200}); trying the one before")
    if steps:
        raise StateError(f"{folder}: every checkpoint is damaged; remove them to start anew")
    return None


def _load(path: pathlib.Path) -> RunState:
    stored = json.loads((path / "state.json").read_text())
    if stored["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT}: got {stored['format']!r}")
    if path.name != f"step_{stored['step']:08d}":
        raise ValueError(f"state.json is of step {stored['step']}")
    if _sha256(path / "arrays.npz") != stored["sha256"]:
        raise ValueError("arrays.npz differs from its checksum")
    with np.load(path / "arrays.npz", allow_pickle=False) as archive:
        arrays = [archive[f"{i:05d}"] for i in range(len(stored["names"]))]
    return RunState(stored["step"], stored["data"], arrays, stored["names"])


def assign_state(state: RunState, variables: Sequence[Any], path: pathlib.Path) -> None:
    """Gives variables their values back.

    Raises:
      StateError: the checkpoint is of another network or optimizer.
    """
    stored = [(array.shape, array.dtype.name) for array in state.arrays]
    own = [(tuple(v.shape), v.dtype) for v in variables]
    if stored != own:
        raise StateError(
            f"{path}: holds {len(stored)} variables that are not the {len(own)} of this run; "
            "give the flags it was begun with (run.flags), or another --out_dir"
        )
    for variable, array in zip(variables, state.arrays, strict=True):
        variable.assign(array)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
