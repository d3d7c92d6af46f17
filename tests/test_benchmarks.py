"""The benchmarks refuse what they must not compare, and count what they say."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from benchmarks.ablation import networks, read_tokens
from benchmarks.accuracy import LOSSES, MISSED, find_losses, report, score_clip
from benchmarks.train_step import Repeated, check_agreement, make_batch
from benchmarks.train_step import report as report_steps
from mt3_keras.metrics import onset_scores
from mt3_keras.models.config import HEADS, SMALL, TINY, ModelConfig
from mt3_keras.notes import Note
from train.scores import Item, summarize

PIANO, GUITAR, DRUM = 0, 24, Note(0.0, 0.1, 36, 100, is_drum=True)


def _notes(*notes: tuple[float, int, int]) -> list[Note]:
    return [Note(onset, onset + 0.5, pitch, 100, program) for onset, pitch, program in notes]


REFERENCE = _notes(
    (0.0, 60, PIANO),  # found
    (1.0, 60, PIANO),  # found, as a guitar
    (2.0, 60, PIANO),  # late
    (3.0, 60, PIANO),  # an octave too high
    (4.0, 60, PIANO),  # a semitone too low
    (5.0, 60, PIANO),  # too late to count
    (6.0, 60, PIANO),  # missed
    (7.0, 60, PIANO),  # the one of two that is found
)
ESTIMATE = _notes(
    (0.01, 60, PIANO + 1),
    (1.0, 60, GUITAR),
    (2.1, 60, PIANO),
    (3.0, 72, PIANO),
    (4.0, 59, PIANO),
    (5.2, 60, PIANO),
    (7.0, 60, PIANO),
    (7.0, 72, PIANO),
)


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
    lines = report_steps(runs, 2e10, arguments).splitlines()
    assert "20.0 GFLOP a step, peak of a matrix product 200 GFLOP/s" in lines[0]
    assert lines[2].split() == ["tensorflow", "0.500", "100", "41.0", "20.0%", "3.0s", "0", "2.00x"]
    assert lines[3].split() == ["pytorch", "1.000", "50", "20.5", "10.0%", "3.0s", "0"]


@pytest.mark.parametrize("name", sorted(networks()))
def test_each_network_of_the_ablation_can_be_read_by_its_tokens(tmp_path, name):
    config = networks()[name]
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/config.json").write_text(json.dumps({"config": config.to_dict()}))
    tokens = ModelConfig.from_preset(read_tokens(tmp_path / "bundle", tmp_path / "tokens"))
    assert config.network.choose_method(None) == ("heads" if config.network.heads else "greedy")
    assert tokens.network.choose_method(None) == "greedy"
    assert tokens.network.heads == config.network.heads


def test_repeated_batches_go_on_where_they_are_set():
    stream = Repeated([{"a": np.array(0)}, {"a": np.array(1)}])
    next(stream)
    state = stream.get_state()
    second = next(stream)["a"]
    stream.set_state(state)
    assert next(stream)["a"] == second == 1


def test_every_note_is_found_or_lost_in_one_way():
    losses = find_losses([*REFERENCE, DRUM], [*ESTIMATE, DRUM], 0.05)
    eighths = {name: 8 * share for name, share in losses.items()}
    assert eighths == {
        "found": 3,
        "right class": 2,
        "timing": 1,
        "octave": 1,
        "other pitch": 1,
        "missed": 2,
        "extra": 2,
    }
    assert losses["found"] == onset_scores(REFERENCE, ESTIMATE)[1]
    assert find_losses(REFERENCE, ESTIMATE, 0.25)["found"] == 5 / 8
    assert find_losses(REFERENCE, [DRUM], 0.05) == dict.fromkeys(LOSSES[:-1], 0.0) | {MISSED: 1.0}


def test_a_model_without_instruments_is_scored_on_pitches_alone():
    items = [
        Item(id=name, load=lambda: ("", []), groups=("real", f"real {name}"))
        for name in ("piano", "drums")
    ]
    notes = {"piano": REFERENCE, "drums": [DRUM]}
    summaries = {
        model: summarize(
            items, {i.id: score_clip(i, notes[i.id], notes[i.id], model == "all") for i in items}
        )
        for model in ("all", "pitches")
    }
    tables = {
        lines[0].split("  ")[0]: [line.split() for line in lines[1:]]
        for lines in map(str.splitlines, report(items, summaries).split("\n\n"))
    }
    one = "1.000"
    assert tables == {
        "real (2)": [["all", *[one] * 6], ["pitches", *[one] * 4, "-", "-"]],
        "real drums (1)": [["all", *"-----", one], ["pitches", *"------"]],
        "real piano (1)": [["all", *[one] * 5, "-"], ["pitches", *[one] * 4, "-", "-"]],
        "where the rest is lost: real": [
            ["all", one, one, *["0.000"] * 5],
            ["pitches", one, "-", *["0.000"] * 5],
        ],
    }
