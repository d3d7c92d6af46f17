"""Trains a model.

    python -m train.main --flagfile=train/configs/tiny.flags --data=DIR --out_dir=runs/tiny

The run's folder holds `run.flags` and `config.json`, the newest weights as a preset
(`model.weights.h5`), `log.jsonl`, TensorBoard's files and `checkpoints/`. The same command resumes
a run that was stopped or killed, and ends at the same weights. Ctrl-C saves first (with several
workers it does not: the run is resumed from its newest checkpoint).
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from mt3_keras.cli.command_line import Command, run
from mt3_keras.extras import require
from mt3_keras.process import keep_freed_memory, load_keras
from train.config import RunConfig, RunError, config_from_flags, define_flags

if TYPE_CHECKING:
    from mt3_keras.models.config import ModelConfig
    from mt3_keras.models.loading import Backbone
    from train.feed import Batch, Batches, Feed
    from train.objective import TrainingModel


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run is fed with.

    Attributes:
      batches: this process's share of the training batches.
      validation: a few batches to validate on, or none.
    """

    batches: Batches
    validation: Sequence[Batch] = ()


# Opens the data for (run, network, batch size of this process, its number, number of processes).
OpenData = Callable[[RunConfig, "ModelConfig", int, int, int], Data]


def train(config: RunConfig, open_data: OpenData) -> pathlib.Path:
    """Starts or resumes a run.

    Returns:
      Its folder, which is a preset.

    Raises:
      ValueError: settings, model, data or checkpoints cannot be used, or the loss is no longer a
        number; one line with the cure.
      KeyboardInterrupt: Ctrl-C or SIGTERM; the state is saved.
    """
    if not config.out_dir:
        raise RunError("--out_dir is needed: the folder of the run")
    _set_up_backend(config)
    from train.model import make_model
    from train.strategy import make_strategy, num_replicas, scope, worker

    out_dir = pathlib.Path(config.out_dir)
    strategy = make_strategy(config.strategy)
    if config.fit_batch_size % num_replicas(strategy):
        raise RunError(
            f"batch_size must be a multiple of the {num_replicas(strategy)} devices "
            f"(times gradient_accumulation_steps): got {config.batch_size}"
        )
    if num_replicas(strategy) > 1 and config.gradient_accumulation_steps > 1:
        raise RunError(
            "gradient_accumulation_steps must be 1 with several devices: "
            f"got {config.gradient_accumulation_steps}"
        )
    with scope(strategy):
        model = make_model(config, num_replicas(strategy))
        if worker(strategy)[0] == 0:
            _write_description(config, model.backbone, out_dir)
        return _run(config, model, strategy, out_dir, open_data)


def _set_up_backend(config: RunConfig) -> None:
    """Everything that Keras must know before a variable exists."""
    load_keras()
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if config.num_threads:
            tf.config.threading.set_intra_op_parallelism_threads(config.num_threads)
        if config.deterministic:
            tf.config.experimental.enable_op_determinism()
    elif keras.backend.backend() != "jax":
        raise RunError(f"KERAS_BACKEND must be tensorflow or jax: got {keras.backend.backend()}")
    keras.config.set_dtype_policy(config.dtype)
    keras.utils.set_random_seed(config.seed)


def _write_description(config: RunConfig, backbone: Backbone, out_dir: pathlib.Path) -> None:
    """`config.json` and `run.flags`; RunError if the folder is of a run of another network."""
    from mt3_keras.files import replacing
    from mt3_keras.models.catalog import find_preset
    from mt3_keras.models.config import DetectorConfig
    from mt3_keras.models.preset_config import read_config
    from mt3_keras.note_rolls import RollDecoding

    own = backbone.model_config
    stored = read_config(out_dir) if (out_dir / "config.json").exists() else None
    if stored not in (None, own):
        raise RunError(f"{out_dir}: holds a run of another network; give another --out_dir")
    if stored is None:
        _write_config(backbone, out_dir)
    with replacing(out_dir / "run.flags") as temporary:
        temporary.write_text(config.to_flagfile())
    decoding = out_dir / "decoding.json"
    if isinstance(own, DetectorConfig) and not decoding.exists():
        start = RollDecoding.read(find_preset(config.init_from)) if config.init_from else None
        with replacing(decoding) as temporary:
            temporary.write_text((start or RollDecoding()).to_json())


def _write_config(backbone: Backbone, out_dir: pathlib.Path) -> None:
    """As `save_to_preset` writes it, but always of a float32 network: so are the weights."""
    import json
    import shutil
    import tempfile

    import keras

    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir) as folder:
        backbone.save_to_preset(folder)
        path = pathlib.Path(folder) / "config.json"
        stored = json.loads(path.read_text())
        stored["config"]["dtype"] = keras.dtype_policies.serialize(
            keras.dtype_policies.get("float32")
        )
        path.write_text(json.dumps(stored, indent=2) + "\n")
        shutil.move(pathlib.Path(folder) / "metadata.json", out_dir / "metadata.json")
        path.rename(out_dir / "config.json")


def _run(
    config: RunConfig,
    model: TrainingModel,
    strategy: Any,
    out_dir: pathlib.Path,
    open_data: OpenData,
) -> pathlib.Path:
    from train.callbacks import StopOnSignal, num_updates, run_variables
    from train.feed import Feed
    from train.state import assign_state, load_newest
    from train.strategy import worker

    index, num_workers = worker(strategy)
    share = config.fit_batch_size // num_workers
    data = open_data(config, model.backbone.model_config, share, index, num_workers)
    folder = out_dir / "checkpoints"
    if state := load_newest(folder, lambda line: print(line, file=sys.stderr)):
        assign_state(state, run_variables(model), folder / f"step_{state.step:08d}")
        _set_data_state(data.batches, state.data, config.new_data)
        print(f"resuming from step {state.step}", file=sys.stderr)
    step = num_updates(model)
    feed = Feed(data.batches, step * config.gradient_accumulation_steps)
    stopper = StopOnSignal(config.gradient_accumulation_steps)
    try:
        _fit(config, model, strategy, feed, data, stopper, out_dir)
    except Exception as error:
        if feed.error is not None and feed.error is not error:
            raise feed.error from error
        raise
    finally:
        stopper.restore()
    if stopper.received is not None:
        step = num_updates(model)
        raise KeyboardInterrupt(f"stopped and saved at step {step} of {config.steps}")
    return out_dir


def _set_data_state(batches: Batches, state: Any, new_data: bool) -> None:
    try:
        batches.set_state(state)
    except ValueError as error:
        if not new_data:
            raise RunError(f"{error}; or give --new_data") from error
        print("the data is new: starting with its first batch", file=sys.stderr)


def spans(step: int, steps: int, log_steps: int) -> list[tuple[int, int, int]]:
    """How to get from `step` to `steps`: calls of `fit` as (first epoch, end, updates each).

    A run that was stopped within an epoch first finishes it.
    """
    result = []
    if step % log_steps and step < steps:
        result.append((step // log_steps, step // log_steps + 1, log_steps - step % log_steps))
    first = -(-step // log_steps)
    if first < steps // log_steps:
        result.append((first, steps // log_steps, log_steps))
    return result


def _fit(
    config: RunConfig,
    model: TrainingModel,
    strategy: Any,
    feed: Feed,
    data: Data,
    stopper: Any,
    out_dir: pathlib.Path,
) -> None:
    from train.callbacks import num_batches, num_updates
    from train.feed import training_dataset, validation_dataset
    from train.strategy import distribute, worker

    share = config.fit_batch_size // worker(strategy)[1]
    callbacks = _make_callbacks(config, model, strategy, feed, data, out_dir)
    if worker(strategy)[1] == 1:  # one of several that stopped would leave the others waiting
        callbacks = [stopper, *callbacks]
    validation: dict[str, Any] = {}
    if data.validation:
        dataset = validation_dataset(data.validation)
        validation = {
            "validation_data": distribute(dataset, strategy, share),
            "validation_steps": len(data.validation),
            "validation_freq": config.validate_steps // config.log_steps,
        }
    parts = config.gradient_accumulation_steps
    for first, end, length in spans(num_updates(model), config.steps, config.log_steps):
        dataset = training_dataset(feed, num_batches(model), length_varies=bool(config.buckets))
        model.fit(
            distribute(dataset, strategy, share),
            initial_epoch=first,
            epochs=end,
            steps_per_epoch=length * parts,
            callbacks=callbacks,
            shuffle=False,
            verbose=(1 if sys.stderr.isatty() else 2) if worker(strategy)[0] == 0 else 0,
            **validation,
        )
        if model.stop_training:
            return


def _make_callbacks(
    config: RunConfig,
    model: TrainingModel,
    strategy: Any,
    feed: Feed,
    data: Data,
    out_dir: pathlib.Path,
) -> list[Any]:
    from train.callbacks import (
        Checkpoints,
        Pictures,
        Recorder,
        StopOnNaN,
        num_updates,
    )
    from train.strategy import worker

    is_writer = worker(strategy)[0] == 0
    callbacks: list[Any] = [StopOnNaN()]
    writer = None
    if is_writer and config.tensorboard:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=num_updates(model) + 1)
    if is_writer:
        if data.validation and config.strategy in ("one", "mirrored"):
            folder, batch = out_dir / "pictures", data.validation[0]
            callbacks.append(Pictures(folder, batch, interval=config.validate_steps, writer=writer))
        recorder = Recorder(
            out_dir / "log.jsonl",
            model.backbone.model_config,
            batch_size=config.fit_batch_size,
            writer=writer,
        )
        recorder.drop_after(num_updates(model))
        callbacks.append(recorder)
    callbacks.append(
        Checkpoints(
            out_dir,
            feed,
            interval=config.checkpoint_steps,
            last=config.steps,
            keep=config.keep,
            is_writer=is_writer,
        )
    )
    return callbacks


def open_prepared_data(
    config: RunConfig, model_config: ModelConfig, batch_size: int, index: int, num_workers: int
) -> Data:
    """The data that --data names (see `OpenData`).

    Raises:
      ValueError: there is none, or it is damaged.
    """
    import itertools

    from mt3_keras.data.pipeline import PipelineConfig, TrainingBatches
    from mt3_keras.data.records import find_records
    from mt3_keras.models.config import TokenConfig

    if not config.data:
        raise RunError("--data is needed: one or more folders made by train.prepare")
    find: Callable[..., Any] = find_records
    if config.reader == "tfio":
        if config.resident or config.num_workers:
            raise RunError("--reader=tfio holds the data here: drop --resident and --num_workers")
        require("tensorflow_io")
        from train.audio_files import find_files as find
    if isinstance(model_config, TokenConfig):
        longest = model_config.network.max_tokens
        if config.target_tokens > longest:
            raise RunError(f"target_tokens must be at most {longest}: got {config.target_tokens}")
    if config.resident:
        return _open_resident_data(config, model_config, batch_size)
    settings = PipelineConfig(
        data=config.data,
        mixture_exponent=config.mixture_exponent,
        seed=config.seed,
        shard_index=index,
        num_shards=num_workers,
        num_workers=config.num_workers,
        context=config.context,
        target_tokens=config.target_tokens,
        buckets=config.buckets,
        num_mixed=config.num_mixed,
        join_seconds=config.join_seconds,
        max_attenuation_db=config.max_attenuation_db,
    )
    validation: list[Batch] = []
    if config.validation_split:
        held_out = dataclasses.replace(
            settings, split=config.validation_split, num_mixed=1, buckets=(), num_workers=0
        )
        batches = TrainingBatches(held_out, model_config, batch_size, find)
        validation = list(itertools.islice(batches, config.validation_batches))
    return Data(TrainingBatches(settings, model_config, batch_size, find), validation)


def _open_resident_data(config: RunConfig, model_config: Any, batch_size: int) -> Data:
    import keras

    if keras.backend.backend() != "jax" or config.validation_split:
        raise RunError("--resident needs KERAS_BACKEND=jax and --validation_split=")
    from tqdm import tqdm

    from mt3_keras.data.records import find_records
    from train.resident import ResidentBatches, pack_records

    sets = find_records(config.data, "train")
    pieces, number = pack_records(sets, model_config), sum(map(len, sets))
    batches = ResidentBatches(
        tqdm(pieces, "to the device", number, unit=" pieces", disable=None),
        model_config,
        batch_size,
        seed=config.seed,
        num_mixed=config.num_mixed,
        max_attenuation_db=config.max_attenuation_db,
        data=[records.summary["shards"] for records in sets],
    )
    return Data(batches)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped and saved."""
    usage = "--flagfile=FILE --data=DIR --out_dir=DIR [FLAGS]"
    packages = ("array_record", "grain")
    command = Command(usage, __doc__, define_flags, _train_from_flags, packages=packages)
    return run("train.main", command, argv)


def _train_from_flags(values: flags.FlagValues, _: list[str]) -> None:
    keep_freed_memory()
    train(config_from_flags(values), open_prepared_data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
