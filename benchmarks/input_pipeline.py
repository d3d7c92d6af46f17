"""Whether the input pipeline keeps up: examples it makes per second, against what training uses.

    python -m benchmarks.input_pipeline --model small [--data DIR,...] [--batch 24]
        [--workers 0,1,2]

In one run, on the same machine: the pipeline alone, for each number of worker processes; training
alone, on batches in memory; both together. Without --data it first renders a little of its own. A
ratio above 1 means that the pipeline makes more than training uses; where workers and training
share the processor's cores, the last line says what is left of training's speed.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from benchmarks.machine import describe_machine
from benchmarks.train_step import time_training
from mt3_keras.cli.command_line import Command, Flags, run
from mt3_keras.models.config import CONFIGS

if TYPE_CHECKING:
    from mt3_keras.data.pipeline import TrainingBatches
    from train.objective import TrainingModel


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.input_pipeline", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.choice("model", "small", sorted(CONFIGS), "The network.")
    add.names("data", [], "Folders made by train.prepare.")
    add.count("batch", 24, "Examples in a batch.")
    add.count("tokens", 0, "Of the targets; 0 is as many as there can be.", least=0)
    add.count("batches", 20, "Timed of each.")
    add.names("workers", ["0", str(os.cpu_count())], "Numbers of worker processes.")
    add.count("num_mixed", 1, "See train.main.")


def _measure(values: flags.FlagValues, _: list[str]) -> None:
    print(f"machine: {describe_machine()}")
    with tempfile.TemporaryDirectory() as folder:
        _compare(values, tuple(values.data) or (_render(folder),))


def _render(folder: str) -> str:
    from train.prepare import main as prepare

    flags = ["--dataset=synthetic", "--num_examples=32", f"--out_dir={folder}"]
    if prepare(flags):
        sys.exit("rendering failed: give --data")
    return folder


def _compare(values: flags.FlagValues, data: tuple[str, ...]) -> None:
    from mt3_keras.data.pipeline import PipelineConfig, TrainingBatches
    from mt3_keras.process import load_keras

    load_keras()

    def stream(num_workers: int) -> TrainingBatches:
        settings = PipelineConfig(
            data=data,
            context="full",
            target_tokens=values.tokens,
            num_workers=num_workers,
            num_mixed=values.num_mixed,
        )
        return TrainingBatches(settings, CONFIGS[values.model], values.batch)

    made = {n: _time_stream(stream(n), values) for n in map(int, values.workers)}
    held = list(itertools.islice(stream(0), 4))
    model = _make_model(values)
    step = time_training(model, held, values.batches)["step"]
    used = values.batch / step
    print(f"{values.model}, batch {values.batch}: training alone {used:.1f} examples/s")
    for num_workers, examples in made.items():
        print(
            f"pipeline alone, {num_workers} worker processes: {examples:.1f} examples/s, "
            f"{examples / used:.2f}x what training uses"
        )
    best = max(made, key=lambda n: made[n])
    together = stream(best)
    step = time_training(model, together, values.batches)["step"]
    together.close()
    both = values.batch / step
    print(
        f"both, {best} worker processes: {both:.1f} examples/s, {both / used:.0%} of training alone"
    )


def _time_stream(stream: TrainingBatches, values: flags.FlagValues) -> float:
    """Examples per second once it runs; the first batches start the workers."""
    for _ in range(2):
        next(stream)
    start = time.perf_counter()
    for _ in range(values.batches):
        next(stream)
    seconds = time.perf_counter() - start
    stream.close()
    return float(values.batches * values.batch / seconds)


def _make_model(values: flags.FlagValues) -> TrainingModel:
    from train.config import RunConfig
    from train.model import make_model

    return make_model(RunConfig(model=values.model, batch_size=values.batch, optimizer="adam"))


COMMAND = Command("[FLAGS]", __doc__, _define_flags, _measure)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
