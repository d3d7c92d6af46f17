"""One's own recordings as a data set: pairs by name, manifests, splits, and what is left out."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import soundfile

from mt3_keras.data import folder
from mt3_keras.data.example import DatasetError
from mt3_keras.data.records import find_records
from mt3_keras.midi import write_midi
from mt3_keras.notes import Note
from train.evaluate import read_manifest
from train.prepare import main

NOTES = [Note(0.5, 1.0, 60, 100), Note(1.0, 1.5, 64, 90)]


def write_pair(root: pathlib.Path, audio: str, midi: str | None = None) -> None:
    for name in (audio, midi or str(pathlib.PurePath(audio).with_suffix(".mid"))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(root / audio, 0.5 * np.sin(np.arange(32_000) / 10), 16_000)
    write_midi(NOTES, root / (midi or pathlib.PurePath(audio).with_suffix(".mid")))


def ids(root: pathlib.Path, split: str, **options: Any) -> list[str]:
    try:
        return [example.id for example in folder.find(root, split, **options)]
    except DatasetError as error:
        assert "pairs is for" in str(error)
        return []


def test_pairs_are_found_beside_each_other_and_in_two_folders(tmp_path, caplog):
    write_pair(tmp_path, "a/song.flac")
    write_pair(tmp_path, "audio/b.wav", "midi/b.MIDI")
    for odd in ("a/._song.mid", "alone.wav", "alone2.mid", "readme.txt"):
        (tmp_path / odd).touch()
    assert ids(tmp_path, "train") == ["a/song", "audio/b"]
    assert caplog.messages == [
        f"{tmp_path}: 2 files have no partner of the same name and are left out "
        "(alone.wav, alone2.mid)"
    ]
    (example, _) = folder.find(tmp_path, "train")
    assert [note.pitch for note in example.load_notes()] == [60, 64]
    assert example.load_duration() == 2.0


def test_splits_are_the_folders_if_there_are_such(tmp_path):
    for name in ("train/a.wav", "dev/b.wav", "test/c.wav", "d.wav"):
        write_pair(tmp_path, name)
    assert [ids(tmp_path, split) for split in folder.SPLITS] == [
        ["d", "train/a"], ["dev/b"], ["test/c"]
    ]  # fmt: skip


def test_splits_that_are_made_share_all_pairs_out_and_stay(tmp_path):
    for i in range(20):
        write_pair(tmp_path, f"{i}.wav")
    parts = [ids(tmp_path, split, validation=0.25) for split in folder.SPLITS]
    assert [len(part) for part in parts] == [13, 5, 2]
    assert sorted(itertools.chain(*parts)) == sorted(map(str, range(20)))
    assert parts == [ids(tmp_path, split, validation=0.25) for split in folder.SPLITS]
    assert len(ids(tmp_path, "train", validation=0, test=0)) == 20
    with pytest.raises(ValueError, match="leave something for training"):
        folder.find(tmp_path, "train", validation=0.5, test=0.5)


def write_manifest(root: pathlib.Path, *items: object) -> None:
    (root / "manifest.json").write_text(json.dumps({"items": items}))


def test_a_manifest_pairs_and_splits_and_what_is_wrong_in_it_is_left_out(tmp_path, caplog):
    write_pair(tmp_path, "x.wav", "y.mid")
    good = {"id": "one", "audio": "x.wav", "midi": "y.mid", "split": "validation"}
    bad = [{"id": "two"}, 3, {**good, "id": "three", "midi": "z.mid"}, {**good, "split": "mine"}]
    write_manifest(tmp_path, good, *bad, good)
    assert ids(tmp_path, "validation") == ["one"] and ids(tmp_path, "train") == []
    assert len(caplog.messages) == 2 * 5
    # train.evaluate scores the good item and names the others.
    items = read_manifest(tmp_path)
    assert [item.id for item in items] == ["one", "two", "item 2", "three", "one", "one"]
    assert len(items[0].load()[1]) == 2
    for item, text in zip(items[1:4], ("needs the texts", "got 3", "no such file"), strict=True):
        with pytest.raises(DatasetError, match=text):
            item.load()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"items": []}', '{"items": 3}', "[" * 10_000])
def test_what_is_no_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DatasetError, match=r"manifest.json: "):
        folder.find(tmp_path, "train")


def test_a_folder_without_pairs_says_what_would_be_one(tmp_path):
    with pytest.raises(DatasetError, match="no recording with a MIDI file of the same name"):
        folder.find(tmp_path, "train")


def test_a_folder_becomes_records_and_what_was_odd_is_said(tmp_path, capsys):
    root, out = tmp_path / "mine", tmp_path / "out"
    for name in "abc":
        write_pair(root, f"{name}.wav")
    stereo = np.stack([np.sin(np.arange(32_000) / 10)] * 2, axis=1) * [0.5, -0.5]
    soundfile.write(root / "a.wav", stereo, 16_000)
    (root / "b.wav").write_bytes(b"no sound")
    flags = ["--dataset=folder", f"--root={root}", f"--out_dir={out}", "--num_workers=1"]
    assert main([*flags, "--option=validation=0", "--option=test=0"]) == 0
    told = capsys.readouterr()
    assert "folder train: 2 records of 2 examples, 0.00 h, 1 left out" in told.out
    assert "left out b: " in told.err and "its channels cancel each other" in told.err
    assert len(find_records([out], "train")[0]) == 2
