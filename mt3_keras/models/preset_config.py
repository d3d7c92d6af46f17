"""Reading the description of a network that anybody may have written."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mt3_keras.files import open_regular
from mt3_keras.models.config import ModelConfig, config_from_preset

MAX_BYTES = 2**20
MAX_LAYERS, MAX_SIZE = 1000, 2**17  # of a network, and any other number that describes it


def read_config(folder: pathlib.Path) -> ModelConfig:
    """The description of a preset's or bundle's network, of sizes that a machine can hold.

    Raises:
      ValueError: there is none, or it is damaged or beyond all bounds; one line, naming the file.
    """
    path = folder / "config.json"
    with open_regular(path, ValueError) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise ValueError(f"{path}: is no description of a model; copy it again")
    try:
        config = config_from_preset(folder)
        for part in config.to_dict().values():
            _check_sizes(part)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return config


def _check_sizes(part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        largest = MAX_LAYERS if name.endswith("layers") else MAX_SIZE
        numbers = value if isinstance(value, (list, tuple)) else [value]
        is_beyond = any(isinstance(n, (int, float)) and not abs(n) <= largest for n in numbers)
        if is_beyond or len(numbers) > MAX_LAYERS:
            raise ValueError(f"{name} is beyond all bounds; copy the model again")
