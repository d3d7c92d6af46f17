"""Reading the description of a network that anybody may have written."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mt3_keras.files import open_regular
from mt3_keras.models.config import ModelConfig, config_from_dict

MAX_BYTES = 2**20
MAX_LAYERS, MAX_SIZE = 1000, 2**17  # of a network, and any other number that describes it


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The description of a preset's or bundle's network, of sizes that a machine can hold.

    Needs no Keras.

    Raises:
      ValueError: there is none, or it is damaged or beyond all bounds; one line, naming the file.
    """
    path = pathlib.Path(folder) / "config.json"
    with open_regular(path, ValueError) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise ValueError(f"{path}: is no description of a model; copy it again")
        text = file.read(MAX_BYTES)
    try:
        stored = json.loads(text)
        if not isinstance(stored, dict):
            raise ValueError("not a JSON object")
        config = config_from_dict(stored)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: not the description of a model ({error})") from error
    try:
        for part in config.to_dict().values():
            _check_sizes(part)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _check_sizes(part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        largest = MAX_LAYERS if name.endswith("layers") else MAX_SIZE
        numbers = value if isinstance(value, (list, tuple)) else [value]
        is_beyond = any(isinstance(n, (int, float)) and not abs(n) <= largest for n in numbers)
        if is_beyond or len(numbers) > MAX_LAYERS:
            raise ValueError(f"{name} is beyond all bounds; copy the model again")
