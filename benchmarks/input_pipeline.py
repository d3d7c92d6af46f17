"""Whether the input pipeline keeps up: examples it makes per second, against what training uses.

    python -m benchmarks.input_pipeline --model small [--data DIR,...] [--batch 24]
        [--workers 0 1 2]

In one run, on the same machine: the pipeline alone, for each number of worker processes; training
alone, on batches in memory; both together. Without --data it first renders a little of its own. A
ratio above 1 means that the pipeline makes more than training uses; where workers and training
share the processor's cores, the last line says what is left of training's speed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from typing import TYPE_CHECKING

from benchmarks.machine import describe_machine, run_main
from benchmarks.train_step import time_training
from mt3_keras.models.config import CONFIGS

if TYPE_CHECKING:
    from mt3_keras.data.pipeline import TrainingBatches
    from train.objective import TrainingModel


def main() -> None:
    arguments = _parse()
    print(f"machine: {describe_machine()}")
    with tempfile.TemporaryDirectory() as folder:
        data = tuple(arguments.data.split(",")) if arguments.data else (_render(folder),)
        _compare(arguments, data)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(CONFIGS), default="small")
    parser.add_argument("--data", default="", help="folders made by train.prepare")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument(
        "--tokens", type=int, default=0, help="of the targets; 0: as many as can be"
    )
    parser.add_argument("--batches", type=int, default=20, help="timed of each")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, os.cpu_count() or 1])
    parser.add_argument("--num_mixed", type=int, default=1)
    return parser.parse_args()


def _render(folder: str) -> str:
    from train.prepare import main as prepare

    flags = ["--dataset=synthetic", "--num_examples=32", f"--out_dir={folder}"]
    if prepare(flags):
        sys.exit("rendering failed: give --data")
    return folder


def _compare(arguments: argparse.Namespace, data: tuple[str, ...]) -> None:
    from mt3_keras.data.pipeline import PipelineConfig, training_batches
    from mt3_keras.process import load_keras

    load_keras()

    def stream(num_workers: int) -> TrainingBatches:
        settings = PipelineConfig(
            data=data,
            context="full",
            target_tokens=arguments.tokens,
            num_workers=num_workers,
            num_mixed=arguments.num_mixed,
        )
        return training_batches(settings, CONFIGS[arguments.model], arguments.batch)

    made = {n: _time_stream(stream(n), arguments) for n in arguments.workers}
    held = list(itertools.islice(stream(0), 4))
    model = _make_model(arguments)
    step = time_training(model, held, arguments.batches)["step"]
    used = arguments.batch / step
    print(f"{arguments.model}, batch {arguments.batch}: training alone {used:.1f} examples/s")
    for num_workers, examples in made.items():
        print(
            f"pipeline alone, {num_workers} worker processes: {examples:.1f} examples/s, "
            f"{examples / used:.2f}x what training uses"
        )
    best = max(made, key=lambda n: made[n])
    together = stream(best)
    step = time_training(model, together, arguments.batches)["step"]
    together.close()
    both = arguments.batch / step
    print(
        f"both, {best} worker processes: {both:.1f} examples/s, {both / used:.0%} of training alone"
    )


def _time_stream(stream: TrainingBatches, arguments: argparse.Namespace) -> float:
    """Examples per second once it runs; the first batches start the workers."""
    for _ in range(2):
        next(stream)
    start = time.perf_counter()
    for _ in range(arguments.batches):
        next(stream)
    seconds = time.perf_counter() - start
    stream.close()
    return float(arguments.batches * arguments.batch / seconds)


def _make_model(arguments: argparse.Namespace) -> TrainingModel:
    from train.config import RunConfig
    from train.model import make_model

    return make_model(
        RunConfig(model=arguments.model, batch_size=arguments.batch, optimizer="adam")
    )


if __name__ == "__main__":
    run_main(main)
