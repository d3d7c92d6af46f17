"""What is estimated of notes found: names, drums, ends; on a few notes written out."""

from __future__ import annotations

import pathlib

import pytest

from mt3_keras.notes import Note
from train import confusions, scores
from train.confusions import Findings, groups_table, pair_found, summarize, tables

PIANO, ORGAN, BASS = 0, 16, 32


def drum(onset: float, key: int) -> Note:
    return Note(onset, onset + 0.01, key, 100, 0, True)


def summary_of(reference: list[Note], estimate: list[Note]) -> dict:
    findings = Findings()
    findings.add(reference, estimate)
    return summarize(findings)


def test_a_unison_is_paired_by_name_first() -> None:
    reference = [Note(0, 1, 60, 90, PIANO), Note(0.01, 1, 60, 90, ORGAN)]
    estimate = [Note(0.005, 1, 60, 90, ORGAN + 2), Note(0.02, 1, 60, 90, BASS)]
    assert sorted(pair_found(reference, estimate)) == [
        (reference[0], estimate[1]),
        (reference[1], estimate[0]),
    ]


def test_notes_of_another_pitch_or_too_late_are_not_found() -> None:
    reference = [Note(0, 1, 60, 90, PIANO), Note(1, 2, 62, 90, PIANO)]
    assert pair_found(reference, [Note(0, 1, 61, 90, PIANO), Note(1.06, 2, 62, 90, PIANO)]) == []
    assert len(pair_found(reference, [Note(1.06, 2, 62, 90, PIANO)], 0.1)) == 1


def test_a_name_right_three_times_of_four_is_a_mean_over_classes_of_its_own() -> None:
    reference = [Note(i, i + 0.5, 60, 90, PIANO) for i in range(3)] + [Note(3, 4, 60, 90, BASS)]
    estimated = summary_of(reference, [note._replace(program=PIANO) for note in reference])[
        "classes"
    ]
    assert (estimated["found"], estimated["named_right"], estimated["class_mean"]) == (4, 0.75, 0.5)
    assert estimated["confusion"] == [["Bass", "Piano", 1], ["Piano", "Piano", 3]]


def test_strokes_are_paired_by_onset_and_judged_by_the_piece_of_the_kit() -> None:
    reference = [drum(0, 36), drum(0.5, 46), drum(1, 42), drum(1.5, 49)]
    estimate = [drum(0, 35), drum(0.5, 42), drum(1, 42)]
    summary = summary_of(reference, estimate)
    assert summary["drums"]["found"] == 3
    assert summary["keys"]["36"] == {
        "piece": "bass drum",
        "strokes": 1,
        "found": 1,
        "recall": 1,
        "recall_of_key": 0,
    }
    recalls = {name: row["recall"] for name, row in summary["kit_pieces"].items()}
    assert recalls == {"bass drum": 1, "closed hi-hat": 1, "open hi-hat": 0, "crash": 0}
    assert summary["classes"]["found"] == 0
    assert summary["ends"][0]["notes"] == 0


@pytest.mark.parametrize(
    ("length", "error", "place", "verdict"),
    [
        (0.05, 0.04, 0, "right"),
        (0.05, 0.06, 0, "late"),
        (0.2, -0.06, 1, "early"),
        (0.5, 0.09, 2, "right"),
        (1.0, 0.3, 3, "late"),
        (2.0, -0.5, 4, "early"),
    ],
)
def test_ends_are_judged_by_the_length_of_the_note(
    length: float, error: float, place: int, verdict: str
) -> None:
    note = Note(0.0, length, 60, 90, PIANO)
    ends = summary_of([note], [note._replace(offset=length + error)])["ends"]
    assert [row["notes"] for row in ends] == [int(i == place) for i in range(5)]
    assert ends[place][verdict] == 1
    assert ends[place]["median_error"] == pytest.approx(error)


def test_instruments_are_detected_piece_by_piece() -> None:
    """One piece tells two classes for one, drums being a class; the other misses one of two."""
    findings = Findings()
    findings.add(
        [Note(0, 1, 60, 90, PIANO), drum(0, 36)],
        [Note(0, 1, 60, 90, PIANO), Note(2, 3, 50, 90, BASS), drum(3, 36), Note(0, 1, 9, 9, 40)],
    )
    findings.add([Note(0, 1, 60, 90, PIANO), Note(0, 1, 30, 90, BASS)], [Note(0, 1, 60, 90, 7)])
    detection = summarize(findings)["detection"]
    assert detection["precision"] == pytest.approx((2 / 4 + 1) / 2)
    assert detection["recall"] == pytest.approx((1 + 1 / 2) / 2)
    assert detection["F1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert detection["leakage"] == pytest.approx((4 / 2 + 1 / 2) / 2)


def test_pitched_notes_are_left_out_where_the_reference_holds_drums_alone() -> None:
    findings = Findings()
    findings.add([drum(0, 36)], [drum(0, 36), Note(0, 1, 60, 90, PIANO)], only_drums=True)
    assert findings.instruments == [(1, 1, 1)]


def test_tables_and_picture_show_every_number(tmp_path: pathlib.Path) -> None:
    reference = [Note(0, 1, 60, 90, PIANO), Note(1, 2, 50, 90, BASS), drum(0, 46)]
    estimate = [Note(0, 1.5, 60, 90, ORGAN), Note(1, 2, 50, 90, BASS), drum(0, 42)]
    summary = summary_of(reference, estimate)
    text = tables(summary)
    assert "2 found; named right 0.500, mean over 2 classes 0.500" in text
    assert "1 found; named right 0.000, mean over 1 drums 0.000" in text
    assert "0.8 to 1.6 s" in text
    assert "+250 ms" in text  # between 500 ms late and in time
    for estimated in (summary, summary_of([], [])):
        result = {"summary": {}, "instruments": {}, "naming": {"all": estimated}}
        scores.plot_scores(result, tmp_path / "picture.png")
    assert tables(summary_of([], [])) == ""
    groups = groups_table({"all": summary, "none": summary_of([], [])}).splitlines()
    row = ["all", "2", "1", "0.500", "0.500", "0.000", "0.000", "0.667", "1.000"]
    assert groups[1].split() == row
    assert groups[2].split() == ["none", "0", "0", "-", "-", "-", "-", "-", "-"]


def test_every_class_and_kit_piece_has_its_place() -> None:
    assert {confusions.class_name(program) for program in range(128)} == set(confusions.CLASSES)
    assert {confusions.kit_piece(key) for key in range(128)} == set(confusions.KIT_PIECES)
