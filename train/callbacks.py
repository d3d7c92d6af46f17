"""What happens between the epochs of `fit`; an epoch is `log_steps` updates of the weights."""

from __future__ import annotations

import json
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from mt3_keras.data.rolls import CERTAIN
from mt3_keras.files import replacing
from mt3_keras.grammar import Rules
from mt3_keras.metrics import further_scores, onset_scores
from mt3_keras.models.checksums import drop_sums
from mt3_keras.models.config import (
    HEADS,
    LOWEST_DRUM,
    LOWEST_PITCH,
    DetectorConfig,
    ModelConfig,
    TokenConfig,
)
from mt3_keras.notes import Note
from mt3_keras.outputs import Output, RollOutput, join_sequences
from mt3_keras.recording import feed, make_decoder
from mt3_keras.segments import AudioSegment
from mt3_keras.transcriber import Engine, make_engine
from train.feed import Batch, Feed
from train.objective import TrainingModel
from train.state import save_state, value_of


class TrainingError(ValueError):
    """Training cannot go on: one line with the cure."""


class StopOnNaN(keras.callbacks.Callback):
    """Ends training with a `TrainingError` when a loss is no number."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        for name, value in (logs or {}).items():
            if not math.isfinite(value):
                step = num_updates(self.model)
                raise TrainingError(
                    f"{name} is {value} after step {step}: lower --learning_rate, set "
                    "--clip_norm or look at the data; the last checkpoint is whole"
                )


class Checkpoints(keras.callbacks.Callback):
    """Saves the run's state and its weights as a preset, at intervals and when training stops.

    Args:
      out_dir: of the run.
      feed: whose state is saved too.
      interval: updates between two checkpoints.
      last: the update after which training ends.
      keep: how many.
      is_writer: whether this process writes; with several, the others do nothing.
    """

    def __init__(
        self,
        out_dir: pathlib.Path,
        feed: Feed,
        *,
        interval: int,
        last: int,
        keep: int,
        is_writer: bool,
    ) -> None:
        super().__init__()
        self.out_dir, self.feed = out_dir, feed
        self.interval, self.last = interval, last
        self.keep, self.is_writer = keep, is_writer

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        step = num_updates(self.model)
        is_due = step % self.interval == 0 or step == self.last or self.model.stop_training
        if self.is_writer and is_due:
            self.save(step)

    def save(self, step: int) -> None:
        data = self.feed.state_at(num_batches(self.model))
        variables = run_variables(self.model)
        folder = self.out_dir / "checkpoints"
        save_state(folder, step, variables, data, keep=self.keep)
        write_weights(self.model, self.out_dir)


def run_variables(model: TrainingModel) -> list[Any]:
    """All that training changes: weights, random states, the optimizer's variables."""
    return [*model.backbone.variables, *model.optimizer.variables]


def num_batches(model: TrainingModel) -> int:
    """Batches trained on so far."""
    parts = model.optimizer.gradient_accumulation_steps or 1
    return num_updates(model) * parts  # `fit` is only looked at between updates


def num_updates(model: TrainingModel) -> int:
    """Updates of the weights so far."""
    return int(value_of(model.optimizer.iterations))


def write_weights(model: TrainingModel, out_dir: pathlib.Path) -> None:
    """Writes `model.weights.h5`, the averaged weights if the optimizer keeps them."""
    own = [value_of(v) for v in model.trainable_variables]
    optimizer = model.optimizer
    type(optimizer).finalize_variable_values(optimizer, model.trainable_variables)
    partial = out_dir / ".partial.weights.h5"
    try:
        model.backbone.save_weights(partial)
        drop_sums(out_dir)  # of a model that is trained where it lies
        os.replace(partial, out_dir / "model.weights.h5")  # noqa: PTH105
    finally:
        if optimizer.use_ema:
            for variable, value in zip(model.trainable_variables, own, strict=True):
                variable.assign(value)


class StopOnSignal(keras.callbacks.Callback):
    """Ctrl-C and SIGTERM end training after the update at hand; a second one ends it at once."""

    def __init__(self, batches_per_update: int) -> None:
        super().__init__()
        self.batches_per_update = batches_per_update
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        """Gives the signals back to whom they belonged."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt("stopped without saving")
        self.received = number
        print("\nstopping after this step; once more to stop without saving", file=sys.stderr)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.received is not None and (batch + 1) % self.batches_per_update == 0:
            self.model.stop_training = True


class Recorder(keras.callbacks.Callback):
    """Writes the figures of every epoch to `log.jsonl`, and to TensorBoard if asked.

    At the end they are drawn: `pictures/curves.png`.

    Besides those of `fit`: "step", "learning_rate", "seconds" that the epoch took,
    "audio_per_second" (seconds of audio trained on) and, of a token network, "tokens_per_second".
    The first batch of a process, which is compiled, counts as long as the others of its epoch.

    Args:
      writer: a `tensorboardX.SummaryWriter`, or None.
    """

    def __init__(
        self,
        path: pathlib.Path,
        model_config: ModelConfig,
        *,
        batch_size: int,
        writer: Any = None,
    ) -> None:
        super().__init__()
        self.path, self.model_config, self.writer = path, model_config, writer
        self.batch_size = batch_size
        self._is_first = True
        self._start, self._end, self._first, self._last = 0.0, 0.0, 0, 0

    def drop_after(self, step: int) -> None:
        """Removes what a run that was killed had logged after its last checkpoint."""
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _logged_step(line) <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start, self._first, self._last = time.perf_counter(), 0, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._is_first:
            self._start, self._first, self._is_first = _finish(logs), batch + 1, False
        self._last = batch + 1
        if self._last == self.params["steps"] or self.model.stop_training:
            self._end = _finish(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        figures = {name: float(value) for name, value in (logs or {}).items()}
        figures |= self._speed(figures.get("num_tokens", 0.0), self._end - self._start)
        figures["learning_rate"] = float(value_of(self.model.optimizer.learning_rate))
        step = num_updates(self.model)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **figures}) + "\n")
        if self.writer:
            for name, value in figures.items():
                group = "validation" if name.startswith("val_") else "training"
                self.writer.add_scalar(f"{group}/{name.removeprefix('val_')}", value, step)
            self.writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        """Draws the log beside the other pictures."""
        from mt3_keras.plots import plot_curves

        if self.path.exists():
            folder = self.path.parent / "pictures"
            folder.mkdir(exist_ok=True)
            rows = [json.loads(line) for line in self.path.read_text().splitlines()]
            plot_curves(rows, folder / "curves.png")

    def _speed(self, num_tokens: float, seconds: float) -> dict[str, float]:
        timed = self._last - self._first
        if timed <= 0 or seconds <= 0:
            return {}
        batches_per_second = timed / seconds
        examples_per_second = batches_per_second * self.batch_size
        figures = {
            "seconds": self._last / batches_per_second,
            "audio_per_second": examples_per_second * self.model_config.segment_seconds,
        }
        if num_tokens:
            figures["tokens_per_second"] = batches_per_second * num_tokens / max(self._last, 1)
        return figures


def _finish(logs: Any) -> float:
    """The time when the step that these figures are from is done."""
    float(np.ravel(ops.convert_to_numpy((logs or {}).get("loss", 0.0)))[0])
    return time.perf_counter()


def _logged_step(line: str) -> int:
    """The step of a line of the log; a line that was cut short counts as later than all."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize


class Pictures(keras.callbacks.Callback):
    """Transcribes a few validation segments and compares them with their targets.

    Adds to the epoch's figures, so it stands before `Recorder`: "val_onset_f1" (pitch and onset),
    "val_offset_f1" (and offset), "val_program_f1" (pitch, onset and class of instrument) and
    "val_drum_f1", without those that there is nothing to count for. Writes
    `pictures/estimate_<step>.png` and `pictures/reference.png`.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        batch: Batch,
        *,
        interval: int,
        num_segments: int = 8,
        writer: Any = None,
    ) -> None:
        super().__init__()
        self.folder, self.interval = folder, interval
        self.batch = {name: array[:num_segments] for name, array in batch.items()}
        self.writer = writer
        self._engine: Engine | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        step = num_updates(self.model)
        if step % self.interval:
            return
        config = self.model.backbone.model_config
        reference = outputs_to_notes(target_outputs(self.batch, config), config)
        estimate = outputs_to_notes(self._predict(), config)
        if logs is not None:
            logs.update(_validation_scores(reference, estimate))
        self._draw({f"estimate_{step:08d}": estimate, "reference": reference}, step)

    def _draw(self, pictures: dict[str, list[Note]], step: int) -> None:
        from mt3_keras.plots import plot_piano_roll

        self.folder.mkdir(exist_ok=True)
        duration = len(self.batch["samples"]) * self.model.backbone.model_config.segment_seconds
        for name, notes in pictures.items():
            path = self.folder / f"{name}.png"
            plot_piano_roll(notes, path, title=name, duration=duration)
            if self.writer:
                from matplotlib import pyplot

                image = pyplot.imread(path)[:, :, :3]
                tag = f"pictures/{name.split('_')[0]}"
                self.writer.add_image(tag, image, step, dataformats="HWC")

    def _predict(self) -> list[Output]:
        samples = self.batch["samples"]
        whole = self.model.backbone.model_config.network.segment_frames
        num_frames = self.batch.get("num_frames", np.full(len(samples), whole))
        segments = [AudioSegment(0.0, *pair) for pair in zip(samples, num_frames, strict=True)]
        # One on TensorFlow reads the weights where they are; one on JAX keeps its first ones.
        if self._engine is None or keras.backend.backend() == "jax":
            rules = Rules(stop_runaways=True)
            self._engine = make_engine(self.model.backbone, rules, batch_size=len(segments))
        return [output for _, output in sorted(self._engine.run(segments), key=lambda p: p[0])]


def _validation_scores(reference: list[Note], estimate: list[Note]) -> dict[str, float]:
    scores = further_scores(reference, estimate)
    names = {
        "val_program_f1": "Onset + program F1 (midi_class)",
        "val_offset_f1": "Onset + offset F1 (0.05, unmodified notes)",
        "val_drum_f1": "Drum onset F1",
    }
    found = {ours: scores[theirs] for ours, theirs in names.items() if theirs in scores}
    return {"val_onset_f1": onset_scores(reference, estimate)[2], **found}


def target_outputs(batch: Batch, config: ModelConfig) -> list[Output]:
    """The targets of a batch as if a network had predicted them."""
    if isinstance(config, TokenConfig):
        rows = batch["targets"].reshape(len(batch["targets"]), config.num_decoders, -1)
        return [join_sequences(sequences) for sequences in rows.tolist()]
    assert isinstance(config, DetectorConfig)
    return [
        _target_output({name: array[i] for name, array in batch.items()}, config)
        for i in range(len(batch["samples"]))
    ]


def _target_output(row: Batch, config: DetectorConfig) -> RollOutput:
    network = config.network
    own = slice(network.frames_before, network.frames_before + network.segment_frames)
    rolls = {head: np.asarray(row[head])[own].astype(np.float32) for head in HEADS}
    frames, columns = np.nonzero(rolls["onset"] == CERTAIN)
    onsets = np.zeros((len(frames), 5), np.float32)
    onsets[:, 0], onsets[:, 1], onsets[:, 2] = frames, columns + LOWEST_PITCH, 1
    onsets[:, 3] = np.maximum(rolls["strength"][frames, columns], 1)
    onsets[:, 4] = rolls["unison"][frames, columns] == CERTAIN
    programs = np.zeros((len(frames), 128), np.float32)
    place = {cell: i for i, cell in enumerate(zip(frames, columns, strict=True))}
    for (frame, column), (program, _) in zip(row["cells"], row["programs"], strict=True):
        if program >= 0 and (i := place.get((frame - own.start, column))) is not None:
            programs[i, program] = 1
    hits, drums = np.nonzero(rolls["drum"] == CERTAIN)
    strokes = np.zeros((len(hits), 4), np.float32)
    strokes[:, 0], strokes[:, 1], strokes[:, 2] = hits, drums + LOWEST_DRUM, 1
    strokes[:, 3] = np.maximum(rolls["drum_strength"][hits, 0], 1)
    return RollOutput(onsets, programs, strokes, (rolls["frame"] < CERTAIN).astype(np.float32))


def outputs_to_notes(outputs: Iterable[Output], config: ModelConfig) -> list[Note]:
    """Notes of segments that have nothing to do with each other, laid out one after the other."""
    notes = []
    for i, output in enumerate(outputs):
        decoder = make_decoder(config)
        feed(decoder, 0.0, output, config.segment_seconds)
        start = i * config.segment_seconds
        notes += [
            note._replace(onset=start + note.onset, offset=start + note.offset)
            for note in decoder.finish()
        ]
    return notes
