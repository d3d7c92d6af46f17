"""The benchmarks refuse what they must not compare, and count what they say."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from absl import flags

from benchmarks.accuracy import LOSSES, MISSED, find_losses, report, score_clip
from benchmarks.beats import worth
from benchmarks.browser import STEP, count_same
from benchmarks.train_step import COMMAND, Repeated, check_agreement, make_batch
from benchmarks.train_step import report as report_steps
from mt3_keras.cli.command_line import Flags
from mt3_keras.metrics import onset_scores
from mt3_keras.models.config import HEADS, MT3, SMALL
from mt3_keras.notes import Note
from tests.conftest import ROOT
from train.scores import Item, summarize

PIANO, GUITAR, DRUM = 0, 24, Note(0.0, 0.1, 36, 100, is_drum=True)

MODULES = [f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("*.py"))]
COMMANDS = [name for name in MODULES if hasattr(importlib.import_module(name), "COMMAND")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_describes_its_flags_and_refuses_others_in_a_line(name, capsys):
    main = importlib.import_module(name).main
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {name} ")
    assert main(["--no_such_flag"]) == 2
    assert "no_such_flag" in capsys.readouterr().err


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
    assert set(one) == {"samples", "cells", "programs", *HEADS}
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    tokens = make_batch(MT3, 2, 7)
    assert set(tokens) == {"samples", "num_frames", "decoder_tokens", "targets"}
    assert tokens["targets"].shape == (2, 7)


def test_the_table_compares_each_with_the_first():
    run = {"difference": 0.0, "first step": 3.0}
    runs = {
        "tensorflow": [run | {"step": s} for s in (0.5, 9.0, 0.1)],
        "jax": [run | {"step": 0.25, "difference": 1e-5}],
    }
    values = flags.FlagValues()
    COMMAND.define(Flags(values))
    values(["train_step", "--batch=10"])
    lines = report_steps(runs, values).splitlines()
    assert lines[0] == "small, batch 10, float32"
    assert "speed to tensorflow" in lines[1]
    assert lines[2].split() == ["tensorflow", "0.500", "102.4", "3.0s", "0", "1.00x"]
    assert lines[3].split() == ["jax", "0.250", "204.8", "3.0s", "1e-05", "2.00x"]


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


def test_notes_are_alike_within_a_step_and_each_counts_once() -> None:
    notes = [*_notes((0.0, 60, PIANO), (0.0, 60, PIANO), (1.0, 62, GUITAR)), DRUM]
    assert count_same(notes, notes) == 4
    late = [note._replace(onset=note.onset + STEP, offset=note.offset - STEP) for note in notes]
    assert count_same(late, notes) == 4
    for change in ({"onset": 2 * STEP}, {"offset": 0.4}, {"program": 1}, {"velocity": 98}):
        assert count_same([notes[0]._replace(**change), *notes[1:]], notes) == 3
    assert count_same(notes, notes[1:]) == 3


def test_a_wrong_answer_costs_what_it_is_said_to() -> None:
    answers = [(0.9, True), (0.8, True), (0.7, False), (0.6, True)]
    assert [worth(answers, 2.0, limit) for limit in (0.95, 0.75, 0.65, 0.0)] == [0, 2, 0, 1]
