"""Models by name or folder: shipped ones, KerasHub presets, T5X checkpoints, edge bundles.

Where they are and what may run them; loading them takes `mt3_keras.models.loading` or
`mt3_keras.engines.litert`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from mt3_keras.extras import can_run_keras

FOLDER = pathlib.Path(__file__).parent.parent / "presets"
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel[0-9]*")  # in /dev: NVIDIA's, AMD's, TPUs


class ModelError(ValueError):
    """A model that cannot be found or read; one line that names it and the cure."""


def shipped_names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def register_presets(backbone: type) -> None:
    """Makes the shipped models of a KerasHub backbone class known to its `from_preset`."""
    from keras_hub.src.utils.preset_utils import register_presets

    folders = {name: FOLDER / name for name in shipped_names()}
    own = {
        name: {"metadata": {"description": "see its README.md"}, "kaggle_handle": str(folder)}
        for name, folder in folders.items()
        if json.loads((folder / "config.json").read_text())["class_name"] == backbone.__name__
    }
    register_presets(own, backbone)


def find_preset(name: str | pathlib.Path) -> pathlib.Path:
    """The folder of a model: a shipped name, or a preset's, T5X checkpoint's or bundle's folder.

    Raises:
      ModelError: there is no such model.
    """
    shipped = FOLDER / str(name)
    if str(name) in shipped_names():
        return shipped
    folder = pathlib.Path(name)
    names = f"shipped are: {', '.join(shipped_names())}" if shipped_names() else "none is shipped"
    if not folder.exists():
        raise ModelError(f"{name}: no such model; {names}; or give a preset or T5X folder")
    if not folder.is_dir():
        raise ModelError(f"{name}: a model is a folder; {names}; or give a preset or T5X folder")
    return folder


def is_preset(folder: pathlib.Path) -> bool:
    """Whether a folder is a KerasHub preset, as opposed to a T5X checkpoint."""
    return (folder / "config.json").exists()


def needs_keras(options: Mapping[str, Any]) -> bool:
    """Whether options of `Transcriber.from_preset` ask for what LiteRT cannot do."""
    is_changed = options.get("exact") or options.get("log_floor") is not None
    return bool(is_changed or options.get("method") == "beam1")


def pick_engine(
    name: str | pathlib.Path, engine: str = "auto", *, needs_keras: bool = False
) -> Literal["keras", "litert"]:
    """What is to run a model; loads neither Keras nor LiteRT.

    Args:
      name: see `find_preset`.
      engine: "keras", "litert", or "auto": LiteRT on a processor where the model has a bundle,
        Keras otherwise and where there is an accelerator that it can use.
      needs_keras: something is asked that LiteRT cannot do.

    Raises:
      ModelError: there is no such model, or not for this engine.
    """
    if engine not in ("auto", "keras", "litert"):
        raise ValueError(f"engine must be auto, keras or litert: got {engine!r}")
    folder = find_preset(name)
    has_bundle = (folder / "model.tflite").exists()
    has_weights = not has_bundle or _has_weights(folder)
    if engine == "auto":
        accelerated = any(any(pathlib.Path("/dev").glob(name)) for name in ACCELERATORS)
        wants_keras = needs_keras or (accelerated and has_weights and can_run_keras())
        engine = "keras" if wants_keras or not has_bundle else "litert"
    if engine == "litert":
        if not has_bundle:
            raise ModelError(
                f"{name}: holds no edge bundle; make one with python -m export.main "
                "--formats tflite, or use engine keras"
            )
        if needs_keras:
            raise ModelError(
                f"{name}: on LiteRT the search is greedy and the logarithm's floor is fixed; "
                "use engine keras"
            )
        return "litert"
    if not has_weights:
        raise ModelError(f"{name}: is an edge bundle; Keras needs the model it was exported from")
    return "keras"


def _has_weights(folder: pathlib.Path) -> bool:
    return (folder / "model.weights.h5").exists() or not is_preset(folder)
