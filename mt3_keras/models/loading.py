"""Models on Keras: from a KerasHub preset or a T5X checkpoint, and into a preset."""

from __future__ import annotations

import importlib
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_keras.extras import require_keras
from mt3_keras.models.catalog import ModelError, find_preset, is_preset
from mt3_keras.models.checksums import check_sum, drop_sums, write_sums
from mt3_keras.models.config import DetectorConfig, ModelConfig
from mt3_keras.models.preset_config import read_config

if TYPE_CHECKING:
    from mt3_keras.models.detector import NoteDetector
    from mt3_keras.models.token_backbone import TokenBackbone

    Backbone = TokenBackbone | NoteDetector

# Class of a network -> its module, which is imported when one is built.
_MODULES = {
    "MT3Backbone": "mt3",
    "NoteDetector": "detector",
    "RecurrentBackbone": "recurrent",
    "TracksInBackbone": "tracks_in",
    "TracksOutBackbone": "tracks_out",
}


def load_model(name: str | pathlib.Path, *, log_floor: str | None = None) -> Backbone:
    """Builds the network of a model and loads its weights.

    Args:
      name: see `find_preset`.
      log_floor: replaces the model's own (see `LogMelConfig`).

    Raises:
      ModelError, CheckpointError: the model cannot be found or read; one line, naming the file.
      ValueError: Keras cannot run here (see `require_keras`).
    """
    folder = find_preset(name)
    require_keras()
    if not is_preset(folder):
        from mt3_keras.models.t5x import assign_leaves, load_t5x

        config, leaves = load_t5x(folder)
        model = build_network(_with_floor(config, log_floor))
        assign_leaves(leaves, model)
        return model
    try:
        model = build_network(_with_floor(read_config(folder), log_floor))
        path = _weights_path(folder)
        _check_file(path)
        _check_weights(path, model.count_params())
        model.load_weights(str(path))
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{folder}: cannot read the model ({reason}); copy it again") from error
    return model


def _weights_path(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "model.weights.h5"
    if not path.is_file():
        raise OSError(f"{path.name} is missing")
    return path


def _check_file(path: pathlib.Path) -> None:
    try:
        check_sum(path)
    except ValueError as error:
        raise ModelError(str(error)) from error


def _check_weights(path: pathlib.Path, num_weights: int) -> None:
    """Refuses numbers that are not finite, and more of them than the network has.

    A small file may declare arrays of any size.

    Raises:
      ModelError: as said; Keras would load them.
    """
    import h5py

    arrays: list[Any] = []

    def add(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays.append(item)

    with h5py.File(path) as file:
        file.visititems(add)
        # What has no weights, such as a generator of random numbers, has a few numbers of state.
        if sum(array.size for array in arrays) > 2 * num_weights + 1000:
            raise ModelError(
                f"{path}: holds more than the network of its config.json; copy it again"
            )
        for array in arrays:
            values = array[()]
            with np.errstate(over="ignore"):
                is_good = (
                    values.dtype.kind in "fiu" and np.isfinite(values.astype(np.float32)).all()
                )
            if not is_good:
                raise ModelError(f"{path}: {array.name} is not of finite numbers; copy it again")


def build_network(config: ModelConfig, *, unroll: bool = False) -> Backbone:
    """The network that a config describes, with random weights.

    `unroll` writes the recurrent steps of a detector into the graph one by one.
    """
    module = importlib.import_module(f"mt3_keras.models.{_MODULES[config.class_name]}")
    options = {"unroll": unroll} if isinstance(config, DetectorConfig) else {}
    backbone: Backbone = getattr(module, config.class_name)(**config.to_dict(), **options)
    return backbone


def _with_floor(config: ModelConfig, log_floor: str | None) -> ModelConfig:
    if log_floor is None:
        return config
    if isinstance(config, DetectorConfig):
        raise ModelError("log_floor and exact are for a log-mel spectrum, such as that of mt3")
    parts = config.to_dict()
    parts["spectrogram"]["log_floor"] = log_floor
    return type(config).from_dict(parts)


def convert_t5x(checkpoint: str | pathlib.Path, output: str | pathlib.Path) -> None:
    """Writes a T5X checkpoint as a preset folder, which appears whole or not at all.

    Raises:
      CheckpointError: the checkpoint is damaged or foreign.
      ModelError: the output exists already or cannot be written.
    """
    output = pathlib.Path(output)
    if output.exists():
        raise ModelError(f"{output}: already exists; remove it or give another folder")
    model = load_model(checkpoint)
    save_preset(model, output)


def save_preset(model: Backbone, output: pathlib.Path) -> None:
    """`model.save_to_preset`, complete or not at all."""
    partial = output.with_name(f".{output.name}.part")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        model.save_to_preset(str(partial))
        write_sums(partial)
        partial.rename(output)
    except OSError as error:
        raise ModelError(f"{output}: cannot be written ({error.strerror or error})") from error


def save_half_preset(model: Backbone, folder: pathlib.Path) -> None:
    """A preset for shipping: its weights are stored in float16, half as large.

    Other files of the folder, such as those of an edge bundle, stay.

    Raises:
      ModelError: a weight is beyond float16, or the folder cannot be written.
    """
    import h5py

    try:
        folder.mkdir(parents=True, exist_ok=True)
        drop_sums(folder)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            model.save_to_preset(scratch)
            paths = {path.name: path for path in pathlib.Path(scratch).iterdir()}
            halved = pathlib.Path(scratch, "half")
            with h5py.File(paths["model.weights.h5"]) as whole, h5py.File(halved, "w") as half:
                _copy_in_half(whole, half)
            paths["model.weights.h5"] = halved
            for name, path in paths.items():
                path.rename(folder / name)
        write_sums(folder)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _copy_in_half(source: Any, target: Any) -> None:
    """Copies an HDF5 group, its numbers as float16."""
    import h5py

    target.attrs.update(source.attrs)
    for name, item in source.items():
        if isinstance(item, h5py.Group):
            _copy_in_half(item, target.create_group(name))
            continue
        values = item[()]
        half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise ModelError(f"{item.name}: holds numbers that float16 cannot")
        target.create_dataset(name, data=half).attrs.update(item.attrs)
