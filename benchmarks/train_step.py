"""Speed of a training step on TensorFlow, TensorFlow with XLA, JAX and, beside them, PyTorch.

    python -m benchmarks.train_step --model small --batch 24 --tokens 160 [--threads 2]
        [--torch_python PYTHON] [--jax_python PYTHON]

The PyTorch step is that of the same network, written plainly (`benchmarks.train_step_torch`). All
start from the same weights and batch; nothing is reported unless they agree in logits and in the
first loss. Every run is a process of its own, all in turn, `--runs` times; medians are compared.
The share of the peak is that of the fastest matrix product that any of them reached. Ours keep
freed memory, as `train.main` does, PyTorch's does as it likes; with MALLOC_TOP_PAD_ or its like in
the environment, all do as that says. It takes a quiet machine: PyTorch's threads wait for each
other actively, and lose most where cores are shared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.transcribe import GIGA, describe_machine, run_json
from mt3_keras.models.config import CONFIGS, HEADS, ModelConfig
from train.config import RunConfig

if TYPE_CHECKING:
    from train.feed import Batch
    from train.objective import TrainingModel

# Name -> backend, --jit_compile.
OURS = {
    "tensorflow": ("tensorflow", "off"),
    "tensorflow-xla": ("tensorflow", "on"),
    "jax": ("jax", "on"),
}
TORCH = "pytorch"
LARGEST_DIFFERENCE = 1e-3  # of logits, relative where they are large, and of losses


def main() -> None:
    arguments = _parse()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    names = [*arguments.ours, *([TORCH] if arguments.torch_python else [])]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    print(f"machine: {describe_machine()}; {arguments.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        reference = str(pathlib.Path(folder) / "reference.npz")
        expected = run_json(_command(arguments, "reference", reference))
        for _ in range(arguments.runs):
            for name in names:
                runs[name].append(run_json(_command(arguments, name, reference)))
    for name, found in runs.items():
        check_agreement(name, found[0], expected["loss"], arguments.dtype)
    print(report(runs, expected["flops"], arguments))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(CONFIGS), default="small")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=160, help="of each example")
    parser.add_argument("--steps", type=int, default=10, help="timed in each run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=["float32", "mixed_bfloat16"], default="float32")
    parser.add_argument("--ours", nargs="*", choices=list(OURS), default=list(OURS))
    parser.add_argument("--jax_python", default=sys.executable)
    parser.add_argument("--torch_python", help="of an environment with torch")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--reference", help=argparse.SUPPRESS)
    return parser.parse_args()


def _command(arguments: argparse.Namespace, name: str, reference: str) -> list[str]:
    shared = [f"--{key}={getattr(arguments, key)}" for key in ("steps", "threads", "dtype")]
    if name == TORCH:
        command = [arguments.torch_python, "-m", "benchmarks.train_step_torch", reference]
        return [*command, *shared]
    python = arguments.jax_python if name == "jax" else sys.executable
    command = [python, "-m", "benchmarks.train_step", "--measure", name, "--reference", reference]
    shared += [f"--{key}={getattr(arguments, key)}" for key in ("model", "batch", "tokens")]
    return [*command, *shared]


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One flavour: how far its logits are off, its first loss, and its speed.

    "reference" writes the file that all others are compared with.
    """
    backend, jit_compile = OURS.get(arguments.measure, OURS["tensorflow"])
    os.environ["KERAS_BACKEND"] = backend
    from mt3_keras.process import keep_freed_memory, limit_threads, load_keras

    limit_threads(arguments.threads)
    keep_freed_memory()
    load_keras()
    settings = RunConfig(
        model=arguments.model,
        dropout=0.0,
        batch_size=arguments.batch,
        optimizer="adam",
        clip_norm=1.0,
        head_weight=20.0,
        jit_compile=jit_compile,
        log_steps=arguments.steps,
        steps=arguments.steps,
        checkpoint_steps=arguments.steps,
        validate_steps=arguments.steps,
    )
    config = CONFIGS[arguments.model]
    batch = make_batch(config, arguments.batch, arguments.tokens)
    path = pathlib.Path(arguments.reference)
    if arguments.measure == "reference":
        from train.callbacks import training_flops

        flops = arguments.batch * training_flops(config, arguments.tokens)
        return {"loss": _write_reference(settings, config, batch, path), "flops": flops}
    weights, logits = _read_reference(path)
    model = _new_model(settings, weights)
    difference = float((np.abs(predict(model, batch) - logits) / (1 + np.abs(logits))).max())
    if arguments.dtype != "float32":
        model = _new_model(dataclasses.replace(settings, dtype=arguments.dtype), weights)
    return {"difference": difference, **time_training(model, [batch], arguments.steps)}


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
    """Noise, and random tokens that fill their sequences; the same in every process."""
    chance, net = np.random.default_rng(0), config.network
    shape = (batch_size, num_tokens)
    targets = chance.integers(3, 1391, shape, dtype=np.int32)
    batch = {
        "samples": 0.1 * chance.standard_normal((batch_size, config.input_samples), np.float32),
        "num_frames": np.full(batch_size, net.segment_frames, np.int32),
        "decoder_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "targets": targets,
    }
    for head, size in HEADS.items() if net.heads else ():
        found = chance.random((batch_size, net.segment_frames, size)) < 0.02
        batch[head] = found.astype(np.int8)
    return batch


def predict(model: TrainingModel, batch: Batch) -> Any:
    """Logits [B, L, V] as they are outside of training."""
    from keras import ops

    from train.feed import to_fit

    found = model.backbone(to_fit(batch)[0], training=False)
    return ops.convert_to_numpy(found["logits"] if isinstance(found, dict) else found)


def _write_reference(
    settings: RunConfig, config: ModelConfig, batch: Batch, path: pathlib.Path
) -> float:
    """Weights that leave no part of the network at zero, and what it makes of the batch."""
    from keras import ops

    from train.feed import Feed

    model = _new_model(settings, {})
    chance = np.random.default_rng(1)
    weights = {}
    for variable in model.backbone.variables:
        if variable.dtype == "float32":
            noise = 0.02 * chance.standard_normal(variable.shape).astype(np.float32)
            noise = np.abs(noise) if "variance" in variable.path else noise
            weights[variable.path] = ops.convert_to_numpy(variable) + noise
            variable.assign(weights[variable.path])
    known = {
        "config": json.dumps(config.to_dict()),
        "settings": json.dumps(
            dataclasses.asdict(settings)
            | {"heads": [dataclasses.asdict(head) for head in model.objective.heads]}
        ),
        "logits": predict(model, batch),
    }
    parts = {"weights": weights, "tables": _tables(config), "batch": batch, "known": known}
    named: dict[str, Any] = {
        f"{part}:{key}": value for part, values in parts.items() for key, value in values.items()
    }
    np.savez(path, **named)
    return _first_step(model, Feed(Repeated([batch])))


def _tables(config: ModelConfig) -> Batch:
    """What the network looks up and does not learn."""
    from mt3_keras.models.layers import sinusoid_positions
    from mt3_keras.models.pointer import SHIFT_FRAMES, step_to_index
    from mt3_keras.models.spectrogram import FLOOR, log_frequency_matrix, mel_matrix

    net, spectrogram = config.network, config.spectrogram
    per_second = spectrogram.frames_per_second
    num_places = SHIFT_FRAMES * net.segment_frames
    places_per_second = net.num_positions / config.segment_seconds
    tables = {
        "encoder_positions": sinusoid_positions(net.num_positions, net.width),
        "decoder_positions": sinusoid_positions(net.max_tokens, net.width),
        "places": step_to_index(config, places_per_second, net.num_positions),
        "frames": step_to_index(config, per_second, net.segment_frames),
        "steps": step_to_index(config, SHIFT_FRAMES * per_second, num_places),
    }
    if spectrogram.front_end == "mel":
        return {**tables, "mel": mel_matrix(spectrogram)}
    lengths = (spectrogram.window_samples, spectrogram.short_window_samples)
    matrices = [log_frequency_matrix(spectrogram, n) / np.float32(FLOOR) for n in lengths]
    return tables | {f"log_{i}": matrix for i, matrix in enumerate(matrices)}


def _read_reference(path: pathlib.Path) -> tuple[dict[str, Any], Any]:
    with np.load(path, allow_pickle=False) as file:
        names = [name for name in file.files if name.startswith("weights:")]
        return {name.removeprefix("weights:"): file[name] for name in names}, file["known:logits"]


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
      batches: a stream of batches, or a list to repeat.
    """
    import time

    from train.callbacks import Recorder, matmul_speed
    from train.feed import Feed, training_dataset

    feed = Feed(Repeated(batches) if isinstance(batches, list) else batches)
    config, batch_size = model.backbone.model_config, len(feed.first["targets"])
    peak = matmul_speed(model.backbone.compute_dtype, size=2048)
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "log.jsonl"
        recorder = Recorder(log, config, batch_size=batch_size, peak=peak)
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
    return {"loss": loss, "first step": first_step, "step": seconds, "peak": peak}


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
        sys.exit(f"{name}: logits differ by {found['difference']:.2g}: not the same network")
    if not off <= (LARGEST_DIFFERENCE if dtype == "float32" else 0.05):
        sys.exit(f"{name}: first loss {found['loss']:.6g}, expected {loss:.6g}: not the same step")


def report(
    runs: dict[str, list[dict[str, float]]], flops: float, arguments: argparse.Namespace
) -> str:
    """A table of medians, a row for each flavour; `flops` are operations of a step."""
    peak = max(run["peak"] for found in runs.values() for run in found)
    audio = arguments.batch * CONFIGS[arguments.model].segment_seconds
    medians = {name: statistics.median(run["step"] for run in runs[name]) for name in runs}
    lines = [
        f"{arguments.model}, batch {arguments.batch}, {arguments.tokens} tokens an example, "
        f"{arguments.dtype}; {flops / GIGA:.1f} GFLOP a step, "
        f"peak of a matrix product {peak / GIGA:.0f} GFLOP/s",
        f"{'median of ' + str(arguments.runs):16}{'s/step':>9}{'tokens/s':>10}{'s audio/s':>11}"
        f"{'of peak':>9}{'first step':>12}{'logits off':>12}{'torch/ours':>12}",
    ]
    for name, step in medians.items():
        first = statistics.median(run["first step"] for run in runs[name])
        off = runs[name][0]["difference"]
        ratio = f"{medians[TORCH] / step:11.2f}x" if TORCH in medians and name != TORCH else ""
        lines.append(
            f"{name:16}{step:9.3f}{arguments.batch * arguments.tokens / step:10.0f}"
            f"{audio / step:11.1f}"
            f"{flops / step / peak:9.1%}{first:11.1f}s{off:12.1g}{ratio:>12}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
