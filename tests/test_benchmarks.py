"""The benchmarks refuse what they must not compare, and count what they say."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from benchmarks.train_step import Repeated, check_agreement, make_batch, report
from mt3_keras.config import HEADS, SMALL, TINY


def test_another_network_or_another_step_is_refused():
    same = {"difference": 1e-5, "loss": 8.0}
    check_agreement("same", same, 8.001, "float32")
    with pytest.raises(SystemExit, match="not the same network"):
        check_agreement("other", same | {"difference": 2e-3}, 8.0, "float32")
    with pytest.raises(SystemExit, match="not the same network"):
        check_agreement("other", same | {"difference": float("nan")}, 8.0, "float32")
    with pytest.raises(SystemExit, match="not the same step"):
        check_agreement("other", same, 8.1, "float32")
    check_agreement("rounded", same, 8.1, "mixed_bfloat16")


def test_every_process_makes_the_same_batch():
    one, other = make_batch(SMALL, 2, 7), make_batch(SMALL, 2, 7)
    assert set(HEADS) < set(one)
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    assert not set(HEADS) & set(make_batch(TINY, 2, 7))


def test_the_table_sets_each_beside_pytorch():
    run = {"difference": 0.0, "first step": 3.0, "peak": 1e11}
    runs = {
        "tensorflow": [run | {"step": s} for s in (0.5, 9.0, 0.1)],
        "pytorch": [run | {"step": 1.0, "peak": 2e11}],
    }
    arguments = argparse.Namespace(model="small", batch=10, tokens=5, runs=3, dtype="float32")
    lines = report(runs, 2e10, arguments).splitlines()
    assert "20.0 GFLOP a step, peak of a matrix product 200 GFLOP/s" in lines[0]
    assert lines[2].split() == ["tensorflow", "0.500", "100", "41.0", "20.0%", "3.0s", "0", "2.00x"]
    assert lines[3].split() == ["pytorch", "1.000", "50", "20.5", "10.0%", "3.0s", "0"]


def test_repeated_batches_go_on_where_they_are_set():
    stream = Repeated([{"a": np.array(0)}, {"a": np.array(1)}])
    next(stream)
    state = stream.get_state()
    second = next(stream)["a"]
    stream.set_state(state)
    assert next(stream)["a"] == second == 1
