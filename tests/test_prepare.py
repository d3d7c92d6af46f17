"""`python -m train.prepare`: from a data set's folder to records, or one line that says why not."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from mt3_keras.data.records import find_records
from mt3_keras.midi import write_midi
from mt3_keras.notes import Note
from tests.conftest import ROOT
from train.evaluate import read_manifest
from train.prepare import main

NOTES = [Note(0.5, 1.0, 60, 100), Note(1.0, 17.5, 64, 90)]


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A MAESTRO of one piece to train on and one, without its audio, to validate on."""
    folder = tmp_path / "maestro"
    (folder / "2018").mkdir(parents=True)
    rows = ["split,audio_filename,midi_filename,duration"]
    for name, split in (("a", "train"), ("b", "validation")):
        rows.append(f"{split},2018/{name}.wav,2018/{name}.midi,18.0")
        write_midi(NOTES, folder / "2018" / f"{name}.midi")
    (folder / "maestro-v3.0.0.csv").write_text("\n".join(rows) + "\n")
    sine = 0.5 * np.sin(np.arange(18 * 22_050) / 10)
    soundfile.write(folder / "2018" / "a.wav", np.stack([sine, sine], axis=1), 22_050)
    return folder


def flags(root: pathlib.Path, *more: str) -> list[str]:
    return ["--dataset=maestro", f"--root={root}", f"--out_dir={root.parent / 'out'}", *more]


def test_a_data_set_becomes_records(root: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(root)) == 0
    assert "maestro train: 2 records of 1 examples, 0.01 h, 0 left out" in capsys.readouterr().out
    (records,) = find_records([root.parent / "out"], "train")
    assert [records[i].first_sample for i in range(2)] == [0, 256_000]
    assert records[0].id == "2018/a" and len(records[0].notes) == 2
    assert records[1].notes[0].pitch == 64 and records[1].is_last
    assert main(flags(root)) == 0  # nothing to do


def test_clips_are_a_folder_that_is_evaluated(
    root: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(root, "--clips")) == 0
    assert "maestro train: 1 clips, 0 left out" in capsys.readouterr().out
    (item,) = read_manifest(root.parent / "out")
    audio, notes = item.load()
    assert (item.id, item.groups[0]) == ("maestro_1parts_2018-a", "real")
    assert [note.pitch for note in notes] == [60, 64]
    assert soundfile.info(audio).duration == pytest.approx(18, abs=0.01)


def test_the_names_set_is_the_same_whenever_it_is_made(root: pathlib.Path) -> None:
    """Of random music here, two of its pieces, by the synthesizer."""
    made = []
    for name in ("one", "other"):
        out = root.parent / name
        more = ["--num_examples=2", "--option=seconds=2", f"--out_dir={out}"]
        assert main([f"--flagfile={ROOT}/train/configs/names.flags", *more]) == 0
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1]
    assert len(made[0]) == 5  # audio and MIDI of both, and the manifest


def test_the_data_of_small_are_prepared_by_its_flags(
    root: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--num_examples=2", f"--out_dir={root.parent / 'out'}", "--num_workers=1"]
    assert main([f"--flagfile={ROOT}/train/configs/small_data.flags", *more]) == 0
    assert "2 records of 2 examples" in capsys.readouterr().out


def test_clips_of_nothing_usable_are_no_folder_to_evaluate(
    root: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "2018" / "a.wav").write_bytes(b"no sound")
    assert main(flags(root, "--clips")) == 1
    assert "none of 1 examples could be used" in capsys.readouterr().err
    assert not (root.parent / "out" / "manifest.json").exists()


def test_list_writes_nothing(root: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(root, "--list")) == 0
    printed = capsys.readouterr().out
    assert "maestro train: 1 examples, 0.01 h" in printed and "Acoustic Grand Piano: 1" in printed
    assert not (root.parent / "out").exists()


def test_what_cannot_be_used_is_named_and_left_out(
    root: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "2018" / "b.wav").write_bytes((root / "2018" / "a.wav").read_bytes()[:-400_000])
    table = root / "maestro-v3.0.0.csv"
    table.write_text(table.read_text().replace("validation", "train"))
    assert main(flags(root, "--num_workers=1")) == 0
    printed = capsys.readouterr()
    assert "left out 2018/b: " in printed.err and "b.wav: is cut short" in printed.err
    assert "of 1 examples" in printed.out and "1 left out" in printed.out


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("NaN audio", "b.wav: sample"),
        ("audio shorter than labels", "audio ends at 5.0 s, its notes go on to 9.0 s"),
        ("no notes", "b.midi: no notes"),
        ("truncated MIDI", "b.midi: damaged label file"),
    ],
)
def test_each_damage_spoils_its_own_example_only(
    root: pathlib.Path, capsys: pytest.CaptureFixture[str], damage: str, reason: str
) -> None:
    samples = np.zeros((5 if "shorter" in damage else 18) * 16_000, np.float32)
    if damage == "NaN audio":
        samples[1234] = np.nan
    soundfile.write(root / "2018" / "b.wav", samples, 16_000, subtype="FLOAT")
    midi = root / "2018" / "b.midi"
    write_midi([] if damage == "no notes" else [Note(0.5, 1, 60, 100), Note(9, 10, 64, 90)], midi)
    if damage == "truncated MIDI":
        midi.write_bytes(midi.read_bytes()[:30])
    table = root / "maestro-v3.0.0.csv"
    table.write_text(table.read_text().replace("validation", "train"))
    assert main(flags(root, "--num_workers=1")) == 0
    printed = capsys.readouterr()
    assert "left out 2018/b: " in printed.err and reason in printed.err
    assert "2 records of 1 examples" in printed.out and "1 left out" in printed.out


def test_a_note_may_sound_past_the_end_of_the_audio(root: pathlib.Path) -> None:
    write_midi([*NOTES, Note(17.9, 25.0, 70, 90)], root / "2018" / "a.midi")
    assert main(flags(root)) == 0
    (records,) = find_records([root.parent / "out"], "train")
    assert [note.pitch for note in records[1].notes] == [64, 70]
    assert records[1].is_last and records[1].num_samples == 2 * 16_000


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--root="], 2, "--root is needed"),
        (["--out_dir="], 2, "--out_dir is needed"),
        (["--dataset=maestro9"], 2, "dataset"),
        (["--option=bass=sounding"], 2, "--option must be name=value, names none"),
        (["--no_such_flag"], 2, "no_such_flag"),
        (["stray"], 2, "unexpected argument 'stray'"),
        (["--split=training"], 1, "split of maestro must be one of train, validation, test"),
        (["--split=validation"], 1, "b.wav: no such file"),
        (["--split=validation", "--skip_missing"], 1, "no complete example"),
        (["--root=/nowhere"], 1, "/nowhere: no such folder"),
        (["--out_dir=/dev/null/x"], 1, "/dev/null/x: cannot be written"),
        (["--dataset=synthetic", "--option=seconds=0"], 1, "seconds must be at least 1"),
        (["--dataset=synthetic", "--option=poor_chance=2"], 1, "poor_chance must be 0 to 1"),
        (["--dataset=synthetic", "--option=seconds=long"], 2, "value of the wrong kind"),
    ],
)
def test_a_wrong_command_ends_with_one_line(
    root: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    message: str,
) -> None:
    assert main(flags(root, *more)) == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == code  # a wrong usage also says where help is


def test_help_loads_neither_beam_nor_tensorflow() -> None:
    script = (
        "import sys; from train import prepare; assert prepare.main(['--help']) == 0; "
        "heavy = {'apache_beam', 'tensorflow', 'keras', 'librosa', 'numpy'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python -m train.prepare --dataset maestro" in done.stdout
