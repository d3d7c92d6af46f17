"""Several devices that share a batch come to the weights of one."""

from __future__ import annotations

import json
import pathlib
import socket

import keras
import numpy as np
import pytest

from tests.training_run import final_arrays, finish, run, start_process, tiny_run
from train.config import RunConfig
from train.strategy import make_strategy

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.distribute needs the TensorFlow backend"
)
# With a norm that clips every step, and a different number of tokens on each device.
SETTINGS = {"clip_norm": 0.05, "learning_rate": 5e-4}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of one process with the whole batches."""
    return run(tiny_run(tmp_path_factory.mktemp("one") / "run", **SETTINGS))


def assert_equal_runs(one: pathlib.Path, other: pathlib.Path) -> None:
    for ours, expected in zip(final_arrays(other), final_arrays(one), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (one, other)
    ]
    for expected, ours in zip(*logs, strict=True):
        for name in ("step", "loss", "token_loss", "timing_loss", "num_tokens", "accuracy"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-4), name


def test_two_devices_train_as_one(one_device: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = tiny_run(tmp_path / "run", strategy="mirrored", **SETTINGS)
    finish(start_process(config, "--num_cpus=2", "--validate"))
    assert_equal_runs(one_device, tmp_path / "run")
    assert "val_onset_f1" in (tmp_path / "run" / "log.jsonl").read_text()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start_workers(config: RunConfig) -> list[str]:
    """Trains in two processes and returns what they printed."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    processes = [
        start_process(
            config,
            environment={
                "TF_CONFIG": json.dumps(
                    {"cluster": cluster, "task": {"type": "worker", "index": index}}
                )
            },
        )
        for index in range(2)
    ]
    return [finish(process) for process in processes]


def test_two_workers_train_as_one(one_device: pathlib.Path, tmp_path: pathlib.Path) -> None:
    settings = {**SETTINGS, "strategy": "multiworker"}
    start_workers(tiny_run(tmp_path / "run", steps=2, **settings))
    printed = start_workers(tiny_run(tmp_path / "run", **settings))  # resumes
    assert all("resuming from step 2" in output for output in printed)
    assert_equal_runs(one_device, tmp_path / "run")


def test_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPU_NAME", raising=False)
    with pytest.raises(ValueError, match="strategy must be one, mirrored"):
        make_strategy("many")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="KERAS_BACKEND=jax"):
        make_strategy("mirrored")
