"""`python -m train.evaluate`: from a model and a data set to tables, JSON and a picture."""

from __future__ import annotations

import functools
import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from mt3_keras.midi import write_midi
from mt3_keras.notes import Note
from tests.conftest import ROOT
from train import scores
from train.evaluate import main, read_manifest
from train.history import HistoryError, append_scores, describe_runs

BAND = [
    Note(0.5, 1.0, 60, 100),
    Note(0.5, 1.5, 64, 100, 4),
    Note(1.0, 2.0, 40, 100, 33),
    Note(1.0, 1.01, 36, 100, 0, True),
]
DRUMS = [Note(0.2, 0.21, 38, 100, 0, True)]


def transcriber(answers):
    """Transcribes each recording, here the key of its answer, by heart."""
    return SimpleNamespace(
        transcribe=lambda audio: SimpleNamespace(
            notes=answers[audio], invalid_events=1, dropped_events=2, duration=3.0
        )
    )


def item(name, notes, **options):
    return scores.Item(name, lambda: (name, notes), **options)


def test_a_perfect_transcription_scores_1_everywhere():
    items = [item("a", BAND, groups=("bands",)), item("b", DRUMS, only_drums=True)]
    result = scores.evaluate(transcriber({"a": BAND, "b": DRUMS}), items, is_quiet=True)
    assert all(result["summary"]["all"][column] == 1.0 for column in scores.COLUMNS)
    assert set(result["summary"]) == {"all", "bands"}
    assert set(result["items"]["b"]) == {scores.DRUMS}
    assert {name: row["notes"] for name, row in result["instruments"].items()} == {
        "Piano": 2,
        "Bass": 1,
        "Drums": 2,
    }
    for row in result["instruments"].values():
        assert row["precision"] == row["recall"] == row[scores.ONSET] == 1.0
    assert (result["invalid_events"], result["dropped_events"], result["seconds"]) == (2, 4, 6)


def test_instruments_are_scored_over_all_items_by_class_or_program():
    swapped = [note._replace(program=4 - note.program) for note in BAND[:2]]
    items = [item("a", BAND), item("b", BAND)]
    evaluate = functools.partial(
        scores.evaluate, transcriber({"a": BAND, "b": swapped}), items, is_quiet=True
    )
    by_class = evaluate(granularity="midi_class")["instruments"]
    assert by_class["Piano"][scores.ONSET] == 1.0
    assert by_class["Bass"]["recall"] == 0.5 and by_class["Bass"]["precision"] == 1.0
    by_program = evaluate(granularity="full")["instruments"]
    assert by_program["Acoustic Grand Piano"] == {
        "notes": 2,
        "found": 2,
        "precision": 0.5,
        "recall": 0.5,
        scores.ONSET: 0.5,
        scores.OFFSET: 0.5,
    }


def test_offsets_count_only_where_they_should():
    long = [note if note.is_drum else note._replace(offset=note.offset + 9) for note in BAND]
    result = scores.evaluate(transcriber({"a": long}), [item("a", BAND)], is_quiet=True)
    assert result["items"]["a"][scores.ONSET] == 1.0
    assert result["items"]["a"][scores.OFFSET] == 0.0
    assert result["instruments"]["Bass"][scores.ONSET] == 1.0
    assert result["instruments"]["Bass"][scores.OFFSET] == 0.0


def test_what_cannot_be_used_is_left_out_and_named():
    def fail():
        raise ValueError("b.wav:\n damaged")

    items = [item("a", BAND), scores.Item("b", fail)]
    result = scores.evaluate(transcriber({"a": BAND}), items, is_quiet=True)
    assert result["left_out"] == {"b": "b.wav: damaged"}
    assert result["summary"]["all"][scores.ONSET] == 1.0
    with pytest.raises(ValueError, match=r"no item could be scored: b: b\.wav: damaged"):
        scores.evaluate(transcriber({}), items[1:], is_quiet=True)


@pytest.fixture
def folder(tmp_path):
    """A manifest of a recording and one that is gone."""
    folder = tmp_path / "dev"
    folder.mkdir()
    soundfile.write(folder / "a.wav", 0.1 * np.sin(np.arange(3 * 16_000) / 10), 16_000)
    write_midi(BAND, folder / "a.mid")
    entries = [
        {"id": "real_band_a", "audio": "a.wav", "midi": "a.mid", "onset_tolerance_s": 0.1},
        {"id": "synth_drums_b", "audio": "b.wav", "midi": "a.mid", "kind": "rendered"},
    ]
    (folder / "manifest.json").write_text(json.dumps({"items": entries}))
    return folder


def test_a_folder_with_a_manifest_is_scored(folder, tiny_preset, tmp_path, capsys):
    out = [f"--json={tmp_path}/scores.json", f"--png={tmp_path}/scores.png"]
    model = [f"--model={tiny_preset}", "--batch_size=2", f"--data={folder}"]
    assert main([*model, "--only=band", *out]) == 0
    printed = capsys.readouterr().out
    for heading in ("item", "instrument", "mean of", "real_band_a", "Bass", "1 items scored"):
        assert heading in printed
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert list(stored["summary"]) == ["all", "real", "real band"]
    assert main(model) == 1
    assert "left out synth_drums_b" in capsys.readouterr().err
    assert read_manifest(folder)[0].onset_tolerance == 0.1


def test_an_item_whose_tolerance_is_no_number_is_left_out(folder):
    items = json.loads((folder / "manifest.json").read_text())["items"]
    items[0]["onset_tolerance_s"] = "wide"
    (folder / "manifest.json").write_text(json.dumps({"items": items}))
    with pytest.raises(ValueError, match="wide"):
        read_manifest(folder)[0].load()


@pytest.mark.parametrize("content", ["", "[]", '{"items": []}'])
def test_a_damaged_manifest_is_named(folder, content, capsys):
    (folder / "manifest.json").write_text(content)
    assert main([f"--data={folder}"]) == 1
    assert f"{folder}/manifest.json: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "reason"),
    [
        ([], 2, "either --dataset or --data"),
        (["--data=x", "--dataset=urmp"], 2, "either --dataset or --data"),
        (["--data=nowhere"], 1, "nowhere/manifest.json: no such file"),
        (["--dataset=urmp"], 2, "--root is needed"),
        (["--dataset=maestro", "--root=nowhere"], 1, "nowhere: no such folder"),
        (["--dataset=urmp", "--root=.", "--split=test"], 1, "split of urmp must be one of"),
        (["--dataset=slakh", "--root=.", "--option=bas=x"], 2, "names bass"),
    ],
)
def test_a_wrong_command_ends_with_one_message(flags, code, reason, capsys):
    assert main(flags) == code
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "root", "split", "instrument"),
    [
        ("maestro", "maestro", "train", "Piano"),
        ("guitarset", "guitarset", "train", "Guitar"),
        ("musicnet", "musicnet_rendered_fixture", "train", "Strings"),
        ("slakh", "slakh/slakh2100_flac_redux", "train", "Bass"),
    ],
)
def test_a_split_of_a_data_set_is_scored(
    shared: pathlib.Path, tiny_preset, tmp_path, capsys, dataset, root, split, instrument
):
    flags = [f"--dataset={dataset}", f"--root={shared / 'data' / 'slices' / root}"]
    flags += [f"--split={split}", "--skip_missing", f"--model={tiny_preset}", "--max_tokens=8"]
    if dataset == "slakh":
        flags.append("--option=num_mixes=0")
    code = main([*flags, f"--json={tmp_path}/scores.json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert instrument in captured.out
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert stored["instruments"][instrument]["notes"] > 0
    assert "Onset + offset F1" in stored["summary"]["all"]


def test_unseen_synthetic_pieces_are_scored(tiny_preset, capsys):
    flags = ["--dataset=synthetic", "--num_examples=2", "--option=seconds=2.5"]
    assert main([*flags, f"--model={tiny_preset}", "--max_tokens=8"]) == 0
    assert "2 items scored" in capsys.readouterr().out


def test_help_loads_no_framework():
    code = (
        "import sys; from train import evaluate; assert evaluate.main(['--help']) == 0; "
        "assert not {'keras', 'tensorflow', 'numpy', 'mir_eval'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_each_scoring_of_a_run_adds_a_line_to_its_history(tmp_path):
    lines = [{"step": 50 * i, "seconds": 3600, "audio_per_second": 36.0} for i in (1, 2)]
    lines.insert(1, {"step": 75})  # resumed at 74: one update, not timed
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = describe_runs([tmp_path, tmp_path])
    assert run == {"updates": 200, "hours_trained": 4, "hours_heard": 144}
    log = tmp_path / "log.csv"
    for onset in (0.5, 0.6):
        append_scores(log, run, {"all": {scores.ONSET: onset}, "real": {}})
    assert (tmp_path / "log.png").read_bytes()[1:4] == b"PNG"
    header, *rows = [line.split(",") for line in log.read_text().splitlines()]
    assert [row[:3] for row in rows] == [["200", "4.0", "144.0"], ["400", "8.0", "288.0"]]
    assert [row[header.index(f"all: {scores.ONSET}")] for row in rows] == ["0.5", "0.6"]
    append_scores(log, run | {"new_loss": 2.0}, {})
    header, *rows = [line.split(",") for line in log.read_text().splitlines()]
    assert [row[header.index("new_loss")] for row in rows] == ["", "", "2.0"]
    log.write_text("other,table\n1,2\n")
    with pytest.raises(HistoryError, match="is not such a log"):
        append_scores(log, run, {})
    with pytest.raises(HistoryError, match="is it a run"):
        describe_runs([tmp_path / "nothing"])
