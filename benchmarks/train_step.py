"""Speed of a training step on TensorFlow, TensorFlow with XLA and JAX, side by side in one run.

    python -m benchmarks.train_step --model small --batch 24 [--threads 2] [--jax_python PYTHON]

All start from the same weights and batch; nothing is reported unless they agree in their outputs
and in the first loss. Every run is a process of its own, all in turn, `--runs` times; medians are
compared with TensorFlow's. They keep freed memory, as `train.main` does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from benchmarks.machine import describe_machine, run_again
from mt3_keras.cli.command_line import Command, Flags, check_names, run
from mt3_keras.data.rolls import CERTAIN
from mt3_keras.models.config import CONFIGS, HEADS, NUM_PITCHES, DetectorConfig, ModelConfig
from train.config import RunConfig

if TYPE_CHECKING:
    from train.feed import Batch
    from train.objective import TrainingModel

# Name -> backend, --jit_compile.
FLAVOURS = {
    "tensorflow": ("tensorflow", "off"),
    "tensorflow-xla": ("tensorflow", "on"),
    "jax": ("jax", "on"),
}
LARGEST_DIFFERENCE = 1e-3  # of logits, relative where they are large, and of losses


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.train_step", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.choice("model", "small", sorted(CONFIGS), "The network.")
    add.count("batch", 24, "Examples in a batch.")
    add.count("tokens", 160, "Of each example, of a token model.")
    add.count("steps", 10, "Timed in each run.")
    add.count("runs", 3, "Of each flavour.")
    add.count("threads", os.cpu_count(), "Of a process.")
    add.choice("dtype", "float32", ["float32", "mixed_bfloat16"], "In which the network computes.")
    add.names("flavours", [*FLAVOURS], f"Of {', '.join(FLAVOURS)}.")
    add.text("jax_python", sys.executable, "JAX's interpreter.")
    measured = "Print figures as JSON: what each process is started for."
    add.choice("measure", None, ["reference", *FLAVOURS], measured)
    add.text("reference", None, "File that --measure compares with.")


def _compare(values: flags.FlagValues, _arguments: list[str]) -> None:
    check_names("flavours", values.flavours, FLAVOURS)
    if values.measure:
        print(json.dumps(measure(values)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in values.flavours}
    print(f"machine: {describe_machine()}; {values.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        reference = str(pathlib.Path(folder) / "reference.npz")
        expected = _run(values, "reference", reference)
        for _ in range(values.runs):
            for name in runs:
                runs[name].append(_run(values, name, reference))
    for name, found in runs.items():
        check_agreement(name, found[0], expected["loss"], values.dtype)
    print(report(runs, values))


def _run(values: flags.FlagValues, name: str, reference: str) -> dict[str, float]:
    names = ("steps", "threads", "dtype", "model", "batch", "tokens")
    options = (f"--measure={name}", f"--reference={reference}")
    python = values.jax_python if name == "jax" else sys.executable
    return run_again("benchmarks.train_step", values, names, *options, python=python)


def measure(values: flags.FlagValues) -> dict[str, float]:
    """One flavour: how far its outputs are off, its first loss, and its speed.

    "reference" writes the file that all others are compared with.
    """
    backend, jit_compile = FLAVOURS.get(values.measure, FLAVOURS["tensorflow"])
    os.environ["KERAS_BACKEND"] = backend
    from mt3_keras.process import keep_freed_memory, limit_threads, load_keras

    limit_threads(values.threads)
    keep_freed_memory()
    load_keras()
    settings = RunConfig(
        model=values.model,
        dropout=0.0,
        batch_size=values.batch,
        optimizer="adam",
        clip_norm=1.0,
        jit_compile=jit_compile,
        log_steps=values.steps,
        steps=values.steps,
        checkpoint_steps=values.steps,
        validate_steps=values.steps,
    )
    batch = make_batch(CONFIGS[values.model], values.batch, values.tokens)
    path = pathlib.Path(values.reference)
    if values.measure == "reference":
        return {"loss": _write_reference(settings, batch, path)}
    weights, expected = _read_reference(path)
    model = _new_model(settings, weights)
    difference = float((np.abs(predict(model, batch) - expected) / (1 + np.abs(expected))).max())
    if values.dtype != "float32":
        model = _new_model(dataclasses.replace(settings, dtype=values.dtype), weights)
    return {"difference": difference, **time_training(model, [batch], values.steps)}


def _new_model(settings: RunConfig, weights: dict[str, Any]) -> TrainingModel:
    import keras

    from train.model import make_model

    keras.config.set_dtype_policy(settings.dtype)
    model = make_model(settings)
    for variable in model.backbone.variables:
        if variable.path in weights:
            variable.assign(weights[variable.path])
    return model


def make_batch(config: ModelConfig, batch_size: int, num_tokens: int) -> Batch:
    """Noise, and random targets that fill their sequences; the same in every process."""
    chance, frames = np.random.default_rng(0), config.window_frames
    batch: Batch = {
        "samples": 0.1 * chance.standard_normal((batch_size, config.input_samples), np.float32)
    }
    if isinstance(config, DetectorConfig):
        from mt3_keras.data.pipeline import NAMED_NOTES

        for head, size in HEADS.items():
            roll = chance.random((batch_size, frames, size)) < 0.02
            batch[head] = CERTAIN * roll.astype(np.int8)
        cells = chance.integers(0, (frames, NUM_PITCHES), (batch_size, NAMED_NOTES, 2))
        programs = chance.integers(0, 128, cells.shape)
        named = {"cells": cells, "programs": programs}
        return batch | {name: array.astype(np.int32) for name, array in named.items()}
    targets = chance.integers(3, 1391, (batch_size, num_tokens), dtype=np.int32)
    return batch | {
        "num_frames": np.full(batch_size, frames, np.int32),
        "decoder_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "targets": targets,
    }


def predict(model: TrainingModel, batch: Batch) -> Any:
    """The network's outputs side by side, as they are outside of training."""
    import keras
    from keras import ops

    from train.feed import to_fit

    found = keras.tree.flatten(model.backbone(to_fit(batch)[0], training=False))
    rows = [ops.convert_to_numpy(array).reshape(len(array), -1) for array in found]
    return np.concatenate(rows, axis=-1)


def _write_reference(settings: RunConfig, batch: Batch, path: pathlib.Path) -> float:
    """Weights that leave no part of the network at zero, and what it predicts for the batch."""
    from keras import ops

    from train.feed import Feed

    model = _new_model(settings, {})
    chance = np.random.default_rng(1)
    named: dict[str, Any] = {}
    for variable in model.backbone.variables:
        if variable.dtype == "float32":
            noise = 0.02 * chance.standard_normal(variable.shape).astype(np.float32)
            noise = np.abs(noise) if "variance" in variable.path else noise
            value = ops.convert_to_numpy(variable) + noise
            variable.assign(value)
            named[f"weights:{variable.path}"] = value
    np.savez(path, **named, expected=predict(model, batch))
    return _first_step(model, Feed(Repeated([batch])))


def _read_reference(path: pathlib.Path) -> tuple[dict[str, Any], Any]:
    with np.load(path, allow_pickle=False) as file:
        names = [name for name in file.files if name.startswith("weights:")]
        return {name.removeprefix("weights:"): file[name] for name in names}, file["expected"]


class Repeated:
    """The same batches again and again, as a stream for `train.feed.Feed`."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.place = batches, 0

    def __next__(self) -> Batch:
        self.place += 1
        return self.batches[(self.place - 1) % len(self.batches)]

    def get_state(self) -> int:
        return self.place

    def set_state(self, state: int) -> None:
        self.place = state


def time_training(model: TrainingModel, batches: Any, steps: int) -> dict[str, float]:
    """Trains through `fit` as a run does: the first loss, seconds of first and later steps.

    Args:
      model: compiled.
      batches: a stream of batches, or a list to repeat.
      steps: to train in all.
    """
    import time

    from train.callbacks import Recorder
    from train.feed import Feed, training_dataset

    feed = Feed(Repeated(batches) if isinstance(batches, list) else batches)
    config, batch_size = model.backbone.model_config, len(feed.first["samples"])
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "log.jsonl"
        recorder = Recorder(log, config, batch_size=batch_size)
        start = time.perf_counter()
        loss = _first_step(model, feed)
        first_step = time.perf_counter() - start
        model.fit(
            training_dataset(feed, 1),
            steps_per_epoch=steps + 1,  # the recorder does not time the first
            callbacks=[recorder],
            shuffle=False,
            verbose=0,
        )
        figures = json.loads(log.read_text().splitlines()[-1])
    seconds = batch_size * config.segment_seconds / figures["audio_per_second"]
    return {"loss": loss, "first step": first_step, "step": seconds}


def _first_step(model: TrainingModel, feed: Any) -> float:
    """The loss of one step through `fit`."""
    from train.feed import training_dataset

    dataset = training_dataset(feed, 0)
    history = model.fit(dataset, steps_per_epoch=1, shuffle=False, verbose=0)
    return float(history.history["loss"][0])


def check_agreement(name: str, found: dict[str, float], loss: float, dtype: str) -> None:
    """Exits if a flavour is not the same network, or does not have the same loss."""
    off = abs(found["loss"] / loss - 1)
    if not found["difference"] <= LARGEST_DIFFERENCE:  # nor if it is no number
        sys.exit(f"{name}: outputs differ by {found['difference']:.2g}: not the same network")
    if not off <= (LARGEST_DIFFERENCE if dtype == "float32" else 0.05):
        sys.exit(f"{name}: first loss {found['loss']:.6g}, expected {loss:.6g}: not the same step")


def report(runs: dict[str, list[dict[str, float]]], values: flags.FlagValues) -> str:
    """A table of medians, a row for each flavour, beside the first."""
    audio = values.batch * CONFIGS[values.model].segment_seconds
    medians = {name: statistics.median(run["step"] for run in runs[name]) for name in runs}
    first_name = next(iter(medians))
    lines = [
        f"{values.model}, batch {values.batch}, {values.dtype}",
        f"{'median of ' + str(values.runs):16}{'s/step':>9}{'s audio/s':>11}"
        f"{'first step':>12}{'outputs off':>13}{'speed to ' + first_name:>22}",
    ]
    for name, step in medians.items():
        first = statistics.median(run["first step"] for run in runs[name])
        off = runs[name][0]["difference"]
        lines.append(
            f"{name:16}{step:9.3f}{audio / step:11.1f}{first:11.1f}s{off:13.1g}"
            f"{medians[first_name] / step:21.2f}x"
        )
    return "\n".join(lines)


COMMAND = Command("[FLAGS]", __doc__, _define_flags, _compare)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
