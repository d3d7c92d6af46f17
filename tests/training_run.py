"""A tiny training run on batches made in memory; also a program, for tests that need processes.

python -m tests.training_run [--pause SECONDS] [--num_cpus N] [--without PACKAGE] [--validate]
    [training flags]
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
from absl import flags

from mt3_keras.cli.command_line import Flags
from mt3_keras.data.rolls import CERTAIN
from mt3_keras.models.config import (
    HEADS,
    NUM_PITCHES,
    LogMelConfig,
    ModelConfig,
    MT3Config,
    T5Config,
)
from train.config import RunConfig, config_from_flags, define_flags
from train.main import Data, train

NANO = MT3Config(
    spectrogram=LogMelConfig(num_mels=16, window_samples=256),
    network=T5Config(
        width=16,
        num_heads=2,
        head_width=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        mlp_width=32,
        segment_frames=32,
        max_tokens=16,
        dropout=0.0,
    ),
)


class MadeUpBatches:
    """Batch i depends on i alone; a share of every batch goes to each worker."""

    def __init__(
        self, config: ModelConfig, batch_size: int, index: int = 0, num_workers: int = 1
    ) -> None:
        self.config, self.batch_size = config, batch_size
        self.index, self.num_workers = index, num_workers
        self.place, self.pause = 0, 0.0

    def __next__(self) -> dict[str, np.ndarray]:
        time.sleep(self.pause)
        batch = self.whole_batch(self.place)
        self.place += 1
        rows = slice(self.index * self.batch_size, (self.index + 1) * self.batch_size)
        return {name: array[rows] for name, array in batch.items()}

    def whole_batch(self, place: int) -> dict[str, np.ndarray]:
        random, size = np.random.default_rng(place), self.batch_size * self.num_workers
        frames = self.config.network.segment_frames
        samples = random.standard_normal((size, self.config.input_samples), np.float32)
        if not isinstance(self.config, MT3Config):
            frames = self.config.window_frames
            rolls = {head: random.random((size, frames, n)) < 0.05 for head, n in HEADS.items()}
            cells = random.integers(0, (frames, NUM_PITCHES), (size, 3, 2), dtype=np.int32)
            return {
                "samples": samples,
                **{h: CERTAIN * roll.astype(np.int8) for h, roll in rolls.items()},
                "cells": cells,
                "programs": random.integers(0, 128, cells.shape, dtype=np.int32),
            }
        length = self.config.network.max_tokens
        lengths = random.integers(2, length + 1, size)
        targets = random.integers(3, 1391, (size, length), dtype=np.int32)
        targets[np.arange(length) >= lengths[:, None]] = 0
        targets[np.arange(size), lengths - 1] = 1
        return {
            "samples": samples,
            "num_frames": np.full(size, frames, np.int32),
            "decoder_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "targets": targets,
        }

    def get_state(self) -> dict[str, int]:
        return {"place": self.place}

    def set_state(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def write_model(folder: pathlib.Path, config: ModelConfig = NANO) -> str:
    """A file for --model."""
    path = folder / "nano.json"
    path.write_text(json.dumps({"class_name": config.class_name, "config": config.to_dict()}))
    return str(path)


def run(
    config: RunConfig, *, pause: float = 0.0, poison: int | None = None, validate: bool = False
) -> pathlib.Path:
    """`train` on made-up batches; batch `poison` holds what is no number."""

    def open_data(config: Any, model_config: Any, size: int, index: int, count: int) -> Data:
        batches = MadeUpBatches(model_config, size, index, count)
        batches.pause = pause
        if poison is not None:
            whole = batches.whole_batch

            def poisoned(place: int) -> dict[str, np.ndarray]:
                batch = whole(place)
                batch["samples"] *= np.nan if place == poison else 1.0
                return batch

            batches.whole_batch = poisoned  # type: ignore[method-assign]
        held_out = [next(MadeUpBatches(model_config, size, index, count))] if validate else []
        return Data(batches, held_out)

    return train(config, open_data)


def tiny_run(out_dir: pathlib.Path, **settings: Any) -> RunConfig:
    """Settings that finish in a moment."""
    values: dict[str, Any] = {
        "out_dir": str(out_dir),
        "batch_size": 4,
        "steps": 4,
        "log_steps": 2,
        "checkpoint_steps": 2,
        "validate_steps": 2,
        "optimizer": "adam",
        "jit_compile": "off",
        "tensorboard": False,
        "deterministic": False,
    }
    if "model" not in settings:
        values["model"] = write_model(out_dir.parent)
    return dataclasses.replace(RunConfig(), **{**values, **settings})


def block_import(package: str) -> None:
    """Makes a package look as if it were not installed."""

    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> None:
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    add = Flags(values)
    define_flags(add)
    add.number("pause", 0.0, "Seconds before each batch.")
    add.count("num_cpus", 1, "TensorFlow's logical CPUs.")
    add.text("without", "", "A package to do without.")
    add.switch("validate", False, "Validate too.")
    add.text("flagfile", "", "Further flags.")
    values(["training_run", *argv])
    if values.without:
        block_import(values.without)
    if values.num_cpus > 1:
        import tensorflow as tf

        cpus = [tf.config.LogicalDeviceConfiguration()] * values.num_cpus
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
    run(config_from_flags(values), pause=values.pause, validate=values.validate)


def start_process(
    config: RunConfig, *further: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Runs this program with the settings, in a process of its own."""
    out_dir = pathlib.Path(config.out_dir)
    flagfile = out_dir.with_name(f"{out_dir.name}.flags")
    flagfile.write_text(config.to_flagfile())
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training_run", f"--flagfile={flagfile}", *further],
        cwd=pathlib.Path(__file__).parent.parent,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a process to end well and returns what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def final_arrays(out_dir: pathlib.Path) -> list[np.ndarray]:
    """All variables of the newest checkpoint."""
    newest = max((out_dir / "checkpoints").glob("step_*"))
    with np.load(newest / "arrays.npz", allow_pickle=False) as archive:
        return [archive[name] for name in sorted(archive)]


if __name__ == "__main__":
    main(sys.argv[1:])
