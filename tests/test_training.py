"""Training runs on made-up batches: resumed, stopped, started from others."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import keras
import numpy as np
import pytest
from absl import flags
from tensorboard.backend.event_processing import event_accumulator

from mt3_keras.cli.command_line import Flags
from mt3_keras.data.rolls import name_targets, roll_targets
from mt3_keras.grammar import Rules
from mt3_keras.models.config import HEADS, DetectorConfig
from mt3_keras.models.loading import load_model
from mt3_keras.models.preset_config import read_config
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.notes import Note
from mt3_keras.segments import AudioSegment
from mt3_keras.transcriber import Transcriber, make_engine
from tests.detectors import MINI
from tests.training_run import (
    NANO,
    MadeUpBatches,
    final_arrays,
    finish,
    run,
    start_process,
    tiny_run,
    write_model,
)
from train import main as train_main
from train.callbacks import Pictures, TrainingError, outputs_to_notes, target_outputs
from train.config import RunConfig, RunError, config_from_flags, define_flags
from train.feed import Feed
from train.main import spans
from train.model import make_model
from train.state import StateError, load_newest, save_state, saved_steps

ROOT = pathlib.Path(__file__).parent.parent
TENSORFLOW = keras.backend.backend() == "tensorflow"


def assert_same_arrays(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    for ours, expected in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, expected)


def weights_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {v.path: keras.ops.convert_to_numpy(v) for v in load_model(folder).weights}


def log_of(folder: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of six steps."""
    config = tiny_run(tmp_path_factory.mktemp("finished") / "run", steps=6, ema=0.9)
    run(config)
    return config


@pytest.fixture
def copied(finished: RunConfig, tmp_path: pathlib.Path) -> RunConfig:
    """The same, to be changed."""
    shutil.copytree(finished.out_dir, tmp_path / "run")
    return dataclasses.replace(finished, out_dir=str(tmp_path / "run"))


# --- Resuming ---


def test_a_killed_run_ends_as_one_never_killed(tmp_path: pathlib.Path) -> None:
    network = dataclasses.replace(NANO.network, dropout=0.1)
    (tmp_path / "a").mkdir()
    settings: dict[str, Any] = {
        "model": write_model(tmp_path / "a", dataclasses.replace(NANO, network=network)),
        "steps": 60,
        "optimizer": "adafactor",
        "ema": 0.9,
        "deterministic": True,
    }
    whole = start_process(tiny_run(tmp_path / "whole", **settings))
    killed = tiny_run(tmp_path / "killed", **settings)
    process = start_process(killed, "--pause=0.1")
    while not saved_steps(tmp_path / "killed" / "checkpoints"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    time.sleep(random.uniform(0, 1))
    process.kill()
    process.communicate()
    assert saved_steps(tmp_path / "killed" / "checkpoints")[-1] < 60
    assert "resuming from step" in finish(start_process(killed))
    finish(whole)
    assert_same_arrays(final_arrays(tmp_path / "killed"), final_arrays(tmp_path / "whole"))
    steps = [entry["step"] for entry in log_of(tmp_path / "killed")]
    assert steps == list(range(2, 61, 2))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Sends this process Ctrl-C when a batch is made."""
    make = MadeUpBatches.whole_batch

    def whole_batch(self: MadeUpBatches, at: int) -> dict[str, np.ndarray]:
        if at == place:
            os.kill(os.getpid(), signal.SIGINT)
        return make(self, at)

    monkeypatch.setattr(MadeUpBatches, "whole_batch", whole_batch)


def test_ctrl_c_saves_and_the_run_is_resumed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 10, "log_steps": 5, "checkpoint_steps": 5}
    settings |= {"validate_steps": 5, "ema": 0.9}
    whole = run(tiny_run(tmp_path / "whole", **settings))
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt, match=r"stopped and saved at step \d of 10"):
            run(tiny_run(tmp_path / "stopped", **settings), pause=0.1)
    assert signal.getsignal(signal.SIGINT) is before
    (stopped_at,) = saved_steps(tmp_path / "stopped" / "checkpoints")
    assert 0 < stopped_at < 5
    run(tiny_run(tmp_path / "stopped", **settings))
    for ours, expected in zip(final_arrays(tmp_path / "stopped"), final_arrays(whole), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)
    assert [entry["step"] for entry in log_of(tmp_path / "stopped")] == [stopped_at, 5, 10]


@pytest.mark.parametrize("file", ["arrays.npz", "state.json"])
def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    copied: RunConfig, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    folder = pathlib.Path(copied.out_dir)
    newest = folder / "checkpoints" / "step_00000006" / file
    expected = final_arrays(folder)
    newest.write_bytes(newest.read_bytes()[:-100])
    run(copied)
    printed = capsys.readouterr().err
    assert "step_00000006: damaged" in printed and "resuming from step 4" in printed
    for ours, whole in zip(final_arrays(folder), expected, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-7)


def test_nothing_is_trained_over_damaged_checkpoints_alone(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "step_00000002").mkdir(parents=True)
    with pytest.raises(StateError, match="every checkpoint is damaged"):
        load_newest(folder, lambda line: None)
    assert load_newest(tmp_path / "none", print) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"[", b"[]", b"3", b'{"format": 1}', b"[" * 200_000, bytes(100), b"\xff\xfe", None],
)
def test_a_newest_checkpoint_damaged_in_any_way_is_passed_over(
    tmp_path: pathlib.Path, content: bytes | None
) -> None:
    variable = keras.Variable(np.zeros(3, np.float32))
    for step in (1, 2):
        save_state(tmp_path, step, [variable], {"at": step}, keep=2)
    stored = tmp_path / "step_00000002" / "state.json"
    if content is None:  # whole, and of another step
        content = stored.read_bytes().replace(b'"step": 2', b'"step": 3')
    stored.write_bytes(content)
    told: list[str] = []
    found = load_newest(tmp_path, told.append)
    assert found is not None and found.step == 1
    (line,) = told
    assert line.startswith(f"{tmp_path}/step_00000002: damaged (") and "\n" not in line


def test_old_checkpoints_are_removed(tmp_path: pathlib.Path) -> None:
    variable = keras.Variable(np.zeros(3, np.float32))
    for step in (2, 10, 4, 99_999_999, 100_000_000):
        save_state(tmp_path, step, [variable], {}, keep=2)
    assert saved_steps(tmp_path) == [99_999_999, 100_000_000]
    assert not list(tmp_path.glob(".*"))


def test_what_is_not_finite_is_not_saved(tmp_path: pathlib.Path) -> None:
    variable = keras.Variable(np.array([0.0, np.inf], np.float32), name="scale")
    with pytest.raises(StateError, match="scale is not finite at step 5"):
        save_state(tmp_path / "new", 5, [variable], {}, keep=1)
    assert not (tmp_path / "new").exists()


def test_a_finished_run_stays_as_it_is(copied: RunConfig) -> None:
    expected = final_arrays(pathlib.Path(copied.out_dir))
    assert_same_arrays(final_arrays(run(copied)), expected)
    assert [entry["step"] for entry in log_of(pathlib.Path(copied.out_dir))] == [2, 4, 6]


def test_a_run_is_not_resumed_as_another(copied: RunConfig) -> None:
    with pytest.raises(StateError, match=r"step_00000006: .*run\.flags"):
        run(dataclasses.replace(copied, ema=0.0))
    with pytest.raises(ValueError, match="run of another network"):
        run(dataclasses.replace(copied, model="small"))


def test_spans_meet_and_end_at_the_last_step() -> None:
    for step in range(0, 31):
        reached = step
        for first, end, length in spans(step, 30, 10):
            assert reached // 10 == first
            reached += (end - first) * length
        assert reached == max(step, 30)


def test_the_feed_begins_anew_where_it_is_told() -> None:
    batches = MadeUpBatches(NANO, 2)
    batches.set_state({"place": 7})
    feed = Feed(batches, start=7)
    plain = [MadeUpBatches(NANO, 2).whole_batch(place) for place in range(20)]
    for start in (7, 9, 8, 7):
        reader = feed.read(start)
        for place in range(start, start + 4):
            inputs, _ = next(reader)
            np.testing.assert_array_equal(inputs["samples"], plain[place]["samples"])
            assert feed.state_at(place + 1) == {"place": place + 1}


# --- Stopping ---


def test_training_stops_where_the_loss_is_no_number(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TrainingError, match=r"is nan after step 4: lower --learning_rate"):
        run(tiny_run(tmp_path / "run", steps=6), poison=2)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2]
    assert all(np.isfinite(array).all() for array in weights_of(tmp_path / "run").values())


def test_data_that_cannot_be_read_on_stops_with_its_own_words(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = MadeUpBatches.whole_batch

    def whole_batch(self: MadeUpBatches, place: int) -> dict[str, np.ndarray]:
        if place == 3:
            raise ValueError("a.array_record: damaged")
        return make(self, place)

    monkeypatch.setattr(MadeUpBatches, "whole_batch", whole_batch)
    with pytest.raises(ValueError, match=r"^a\.array_record: damaged$"):
        run(tiny_run(tmp_path / "run", steps=6))
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2]


# --- What is trained ---


def test_a_batch_in_parts_trains_as_the_whole(tmp_path: pathlib.Path) -> None:
    settings: dict[str, Any] = {"normalize": "examples", "clip_norm": 0.05}
    whole = run(tiny_run(tmp_path / "whole", **settings))

    class Halves(MadeUpBatches):
        """The same examples, half a batch at a time."""

        def whole_batch(self, place: int) -> dict[str, np.ndarray]:
            batch = MadeUpBatches(self.config, 4).whole_batch(place // 2)
            return {k: v[place % 2 * 2 : place % 2 * 2 + 2] for k, v in batch.items()}

    config = tiny_run(
        tmp_path / "parts", gradient_accumulation_steps=2, steps_per_execution=2, **settings
    )
    train_main.train(config, lambda run, model, size, i, n: train_main.Data(Halves(model, size)))
    expected = weights_of(whole)
    for path, array in weights_of(tmp_path / "parts").items():
        np.testing.assert_allclose(array, expected[path], atol=2e-5)


def tuning(start: RunConfig, out_dir: pathlib.Path, **settings: Any) -> RunConfig:
    """A run that begins with the weights of another."""
    return tiny_run(out_dir, model="", init_from=start.out_dir, steps=2, **settings)


def test_frozen_variables_stay_as_they_are(finished: RunConfig, tmp_path: pathlib.Path) -> None:
    before = weights_of(pathlib.Path(finished.out_dir))
    after = weights_of(run(tuning(finished, tmp_path / "tuned", freeze="^encoder")))
    for path, array in after.items():
        assert np.array_equal(array, before[path]) == path.startswith("encoder"), path
    with pytest.raises(ValueError, match="finds none of the variables"):
        make_model(tiny_run(tmp_path / "none", freeze="nothing"))


def test_low_rank_additions_are_all_that_is_trained(
    finished: RunConfig, tmp_path: pathlib.Path
) -> None:
    config = tuning(finished, tmp_path / "tuned", lora_rank=2)
    names = {v.path.split("/")[-1] for v in make_model(config).trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b"}
    before, after = weights_of(pathlib.Path(finished.out_dir)), weights_of(run(config))
    changed = {path for path in after if not np.array_equal(after[path], before[path])}
    assert changed == {path for path in after if "/query/" in path or "/value/" in path}


def test_the_average_of_the_weights_is_what_is_written(finished: RunConfig) -> None:
    written = weights_of(pathlib.Path(finished.out_dir))
    paths = [v.path for v in make_model(finished).backbone.variables]
    arrays = final_arrays(pathlib.Path(finished.out_dir))
    for path, array in zip(paths, arrays, strict=False):
        if path in written:
            assert not np.array_equal(array, written[path])
            averages = [a for a in arrays[len(paths) :] if np.array_equal(a, written[path])]
            assert averages, path


def test_a_run_starts_from_another_with_other_dropout(
    finished: RunConfig, tmp_path: pathlib.Path
) -> None:
    model = make_model(tuning(finished, tmp_path / "next", dropout=0.5))
    assert model.backbone.model_config.network.dropout == 0.5
    ours = {v.path: keras.ops.convert_to_numpy(v) for v in model.backbone.weights}
    for path, array in weights_of(pathlib.Path(finished.out_dir)).items():
        np.testing.assert_array_equal(ours[path], array)
    with pytest.raises(ValueError, match="do not fit --model"):
        make_model(dataclasses.replace(tuning(finished, tmp_path / "next"), model="small"))
    with pytest.raises(ValueError, match="--model or --init_from is needed"):
        make_model(tiny_run(tmp_path / "next", model=""))


def test_a_grown_network_keeps_what_the_one_before_knew(
    finished: RunConfig, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = dataclasses.replace(NANO.network, num_encoder_layers=2)
    (tmp_path / "grown").mkdir()
    model = write_model(tmp_path / "grown", dataclasses.replace(NANO, network=grown))
    ours = make_model(dataclasses.replace(tuning(finished, tmp_path / "next"), model=model))
    before = weights_of(pathlib.Path(finished.out_dir))
    for variable in ours.backbone.weights:
        if variable.path in before:
            np.testing.assert_array_equal(variable.numpy(), before[variable.path])
        else:
            assert variable.path.startswith("encoder/layer_1/")
    assert "untrained: encoder/layer_1/attention/key, " in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_compiled_training_learns_and_its_log_is_whole(tmp_path: pathlib.Path, dtype: str) -> None:
    policy = keras.config.dtype_policy()
    try:
        run(
            tiny_run(
                tmp_path / "run",
                steps=20,
                log_steps=10,
                checkpoint_steps=20,
                validate_steps=10,
                steps_per_execution=5,
                jit_compile="on",
                tensorboard=True,
                dtype=dtype,
                learning_rate=0.01,
                pitch_weight=2.0,
                label_smoothing=0.1,
            ),
            validate=dtype == "float32",
        )
    finally:
        keras.config.set_dtype_policy(policy)
    first, last = log_of(tmp_path / "run")
    assert last["tie_loss"] < first["tie_loss"] - 1  # segments end, whatever they say
    assert {"timing_loss", "pitch_loss", "tie_loss", "tokens_per_second"} <= set(last)
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.*")
    written = events.read_bytes()
    for tag in ("tokens_per_second", "audio_per_second", "pitch_loss"):
        assert f"training/{tag}".encode() in written
    shown = event_accumulator.EventAccumulator(str(events.parent)).Reload().Tags()
    assert "training/pitch_loss" in shown["scalars"]  # by TensorBoard itself
    if dtype == "float32":
        assert {"val_loss", "val_onset_f1"} <= set(last)
        for tag in ("validation/onset_f1", "pictures/estimate", "pictures/reference"):
            assert tag.encode() in written
        assert (tmp_path / "run" / "pictures" / "estimate_00000020.png").exists()
    assert load_model(tmp_path / "run").dtype_policy.name == "float32"


def test_each_validation_transcribes_with_the_weights_of_its_step(tmp_path: pathlib.Path) -> None:
    keras.utils.set_random_seed(5)  # one that does not end every segment at once
    model = make_model(tiny_run(tmp_path / "run"))
    batch = MadeUpBatches(NANO, 2).whole_batch(0)
    pictures = Pictures(tmp_path / "pictures", batch, interval=1)
    pictures.set_model(model)
    segments = [
        AudioSegment(0.0, *s) for s in zip(batch["samples"], batch["num_frames"], strict=True)
    ]
    before = pictures._predict()
    for variable in model.trainable_variables:
        variable.assign(keras.ops.flip(variable, axis=-1))
    fresh = make_engine(model.backbone, Rules(stop_runaways=True), batch_size=2)
    after = [output for _, output in sorted(fresh.run(segments))]
    assert pictures._predict() == after != before


@pytest.mark.skipif(not TENSORFLOW, reason="compares the other backend with TensorFlow")
def test_jax_trains_without_tensorflow_and_tensorflow_reads_it(
    finished: RunConfig, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("jax", reason="needs jax: pip install -r requirements-dev.txt")
    config = tuning(finished, tmp_path / "jax", tensorboard=True, learning_rate=1e-4)
    process = start_process(config, "--without=tensorflow", environment={"KERAS_BACKEND": "jax"})
    expected = weights_of(run(dataclasses.replace(config, out_dir=str(tmp_path / "tensorflow"))))
    finish(process)
    for path, array in weights_of(tmp_path / "jax").items():
        np.testing.assert_allclose(array, expected[path], atol=1e-5)


# --- Detectors ---


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of a detector."""
    folder = tmp_path_factory.mktemp("detector")
    config = tiny_run(
        folder / "run",
        model=write_model(folder, MINI),
        steps=20,
        log_steps=10,
        checkpoint_steps=20,
        validate_steps=20,
        learning_rate=0.01,
        ema=0.9,
    )
    run(config, validate=True)
    return config


def test_a_detector_trains_and_is_a_preset_with_its_decoding(detector: RunConfig) -> None:
    folder = pathlib.Path(detector.out_dir)
    first, last = log_of(folder)
    assert last["loss"] < first["loss"]
    weighted = sum(w * last[f"{head}_loss"] for head, w in detector.head_weight_of.items())
    assert last["loss"] == pytest.approx(weighted, rel=1e-3)
    assert {"val_loss", "val_names_loss", "val_onset_f1", "audio_per_second"} <= set(last)
    assert "tokens_per_second" not in last
    assert (folder / "pictures" / "estimate_00000020.png").exists()
    assert read_config(folder) == MINI
    assert RollDecoding.read(folder) == RollDecoding()
    assert (folder / "decoding.json").exists()
    transcriber = Transcriber.from_preset(folder, engine="keras")
    assert len(transcriber.transcribe(np.zeros(16_000, np.float32)).segments) > 1


def test_a_run_reads_rolls_as_the_one_it_starts_from(
    detector: RunConfig, tmp_path: pathlib.Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(detector.out_dir, start)
    tuned = RollDecoding(onset_limit=0.6)
    (start / "decoding.json").write_text(tuned.to_json())
    config = tiny_run(tmp_path / "next", model="", init_from=str(start), steps=2)
    assert RollDecoding.read(run(config)) == tuned
    (tmp_path / "next" / "decoding.json").write_text(RollDecoding(onset_limit=0.7).to_json())
    run(dataclasses.replace(config, steps=4))  # resumed: what has been tuned since stays
    assert RollDecoding.read(tmp_path / "next").onset_limit == 0.7


def test_heads_that_have_no_weight_are_not_trained(tmp_path: pathlib.Path) -> None:
    config = tiny_run(
        tmp_path / "run",
        model=write_model(tmp_path, MINI),
        head_weights=("onset=2", "drum=3"),
        steps=2,
    )
    (line,) = log_of(run(config))
    assert line["loss"] == pytest.approx(2 * line["onset_loss"] + 3 * line["drum_loss"], rel=1e-4)
    assert {f"{head}_loss" for head in HEADS} & set(line) == {"onset_loss", "drum_loss"}


def test_target_rolls_are_read_as_their_notes(tmp_path: pathlib.Path) -> None:
    notes = [
        Note(0.10, 0.30, 60, 100, 0),
        Note(0.10, 0.26, 64, 50, 40),
        Note(0.20, 0.21, 38, 90, 0, True),
        Note(0.40, 0.50, 60, 70, 24),
    ]
    config = DetectorConfig(network=dataclasses.replace(MINI.network, segment_frames=64))
    window, first = config.window_frames, -config.network.frames_before
    rate = config.spectrogram.frames_per_second
    rolls: dict[str, np.ndarray] = dict(
        roll_targets(notes, first, num_frames=window, window_frames=window, frames_per_second=rate)
    )
    rng = np.random.default_rng(0)
    rolls |= name_targets(
        notes, first, num_frames=window, max_notes=8, frames_per_second=rate, rng=rng
    )
    batch = {head: np.stack([roll, roll]) for head, roll in rolls.items()}
    batch["samples"] = np.zeros((2, 1), np.float32)
    found = outputs_to_notes(target_outputs(batch, config), config)
    shift = config.segment_seconds
    later = [n._replace(onset=n.onset + shift, offset=n.offset + shift) for n in notes]
    assert len(found) == len(notes) + len(later)
    for ours, note in zip(found, [*notes, *later], strict=True):
        assert ours[2:] == note[2:]
        assert ours.onset == pytest.approx(note.onset, abs=0.02)
        assert note.is_drum or ours.offset == pytest.approx(note.offset, abs=0.03)


@pytest.mark.parametrize(
    ("network", "settings", "complaint"),
    [
        (MINI, {"join_seconds": 0.03}, "--join_seconds is for networks that emit tokens: drop it"),
        (MINI, {"buckets": (8,)}, "--buckets is for networks that emit tokens: drop it"),
        (MINI, {"pitch_weight": 2.0}, "--pitch_weight is for networks that emit tokens: drop it"),
        (NANO, {"resident": True}, "--resident is for detectors: drop it"),
        (NANO, {"head_weights": ("onset=1",)}, "--head_weights is for detectors: drop it"),
    ],
)
def test_settings_for_the_other_kind_of_network_are_refused(
    tmp_path: pathlib.Path, network: Any, settings: dict[str, Any], complaint: str
) -> None:
    config = tiny_run(tmp_path / "run", model=write_model(tmp_path, network), **settings)
    with pytest.raises(RunError, match=f"^{complaint}$"):
        run(config)
    assert not (tmp_path / "run").exists()


# --- Settings ---


def test_every_setting_survives_its_flagfile(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(
        RunConfig(),
        data=("a", "b"),
        buckets=(64, 128),
        jit_compile="off",
        deterministic=False,
        freeze="a|b=c",
        ema=0.5,
        head_weights=("onset=5", "names=0.25"),
    )
    path = tmp_path / "run.flags"
    path.write_text(config.to_flagfile())
    values = flags.FlagValues()
    define_flags(Flags(values))
    flags.DEFINE_string("flagfile", "", "", flag_values=values)
    values(["program", f"--flagfile={path}"])
    assert config_from_flags(values) == config
    assert config.head_weight_of == {"onset": 5.0, "names": 0.25}


@pytest.mark.parametrize("name", ["tiny", "tiny_mt3", "recurrent", "small", "mt3"])
def test_shipped_flagfiles_are_runs(name: str) -> None:
    values = flags.FlagValues()
    define_flags(Flags(values))
    flags.DEFINE_string("flagfile", "", "", flag_values=values)
    values(["program", f"--flagfile={ROOT / 'train' / 'configs' / f'{name}.flags'}"])
    config = config_from_flags(values)
    if (ROOT / config.model).is_file():
        config = dataclasses.replace(config, model=str(ROOT / config.model))
    network = config.model_config()
    assert network
    config.check_network(network)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"steps": 150}, "steps must be a multiple of log_steps"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"batch_size": 3, "gradient_accumulation_steps": 2}, "batch_size must be a multiple"),
        ({"steps_per_execution": 3}, "steps_per_execution must divide"),
        ({"ema": 1.0}, "ema must be in"),
        ({"optimizer": "sgd"}, "optimizer must be adafactor or adam"),
        ({"head_weights": ("pitch=1",)}, "head_weights must be 0 or more, of onset, "),
        ({"head_weights": ("onset=-1",)}, "head_weights must be 0 or more, of onset, "),
        ({"head_weights": ("onset=nan",)}, "head_weights must be 0 or more, of onset, "),
        ({"head_weights": ("onset",)}, "head_weights must be HEAD=NUMBER: got 'onset'"),
        ({"head_weights": ()}, "head_weights must name a head"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(RunConfig(), **settings)


def test_the_command_complains_in_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main.main(["--steps=many"]) == 2
    nano, out_dir = f"--model={write_model(tmp_path)}", f"--out_dir={tmp_path}/a"
    assert train_main.main([nano]) == 1
    assert "--out_dir is needed" in capsys.readouterr().err
    assert train_main.main([f"--out_dir={tmp_path}", "--model=huge"]) == 1
    assert "model must be" in capsys.readouterr().err
    assert train_main.main([out_dir, nano, "--data=x", "--target_tokens=17"]) == 1
    assert "target_tokens must be at most 16" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert train_main.main([f"--out_dir={tmp_path}/file/run", nano]) == 1
    assert f"{tmp_path}/file/run: Not a directory" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_stops_the_run_in_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: RunConfig, open_data: Any) -> None:
        raise OSError("Can't write data\n(No space left on device)")  # as h5py says it

    monkeypatch.setattr(train_main, "train", train)
    assert train_main.main([]) == 1
    said = "train.main: Can't write data (No space left on device)\n"
    assert capsys.readouterr().err == said


def test_help_answers_without_loading_keras() -> None:
    program = (
        "import sys, train.main as m; m.main(['--help']); "
        "print('LOADED', sorted({'keras', 'tensorflow', 'jax', 'numpy'} & set(sys.modules)))"
    )
    start = time.monotonic()
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert "LOADED []" in printed and "--learning_rate" in printed
    assert time.monotonic() - start < 5  # a second, on a machine with nothing else to do
