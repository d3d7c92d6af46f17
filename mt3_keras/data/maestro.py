"""MAESTRO: piano competition recordings with the MIDI the piano recorded.

Source: Hawthorne et al., "Enabling Factorized Piano Music Modeling and Generation with the MAESTRO
Dataset", ICLR 2019. Licence CC BY-NC-SA 4.0. Versions 1.0.0, 2.0.0 and 3.0.0 have the same layout:

    maestro-v3.0.0/
      maestro-v3.0.0.csv  and/or  maestro-v3.0.0.json
      2018/<name>.wav, <name>.midi

Splits are those of the metadata file: 962 / 137 / 177 pieces in version 3 (from the data set's
page). The JSON of version 3 stores columns, that of earlier versions rows; both are read.

Labels: program 0; notes are lengthened by the sustain pedal (control 64).
"""

from __future__ import annotations

import csv
import json
import pathlib
from typing import Any

from mt3_keras.data.example import (
    DatasetError,
    Example,
    Label,
    check_files,
    check_request,
    describe,
    read_each,
)
from mt3_keras.midi import read_midi
from mt3_keras.notes import Note

NAME = "maestro"
SOURCE = "https://magenta.tensorflow.org/datasets/maestro"
SPLITS = ("train", "validation", "test")


def find(root: str | pathlib.Path, split: str, *, skip_missing: bool = False) -> list[Example]:
    """Lists the pieces of a split.

    Raises:
      ValueError: no such split.
      DatasetError: metadata, audio or MIDI is missing, or the metadata is damaged.
    """
    root = pathlib.Path(root)
    check_request(NAME, SOURCE, root, split, SPLITS)
    path = _metadata_path(root)
    try:
        examples = read_each(_read_rows(path), lambda row: [_to_example(root, row, path)])
        if not examples:
            raise ValueError("no rows")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        reason = describe(error).removeprefix(f"{path}: ")
        raise DatasetError(f"{path}: damaged metadata ({reason}); get it from {SOURCE}") from error
    wanted = [example for example in examples if example.split == split]
    return check_files(wanted, SOURCE, root, skip_missing)


def _metadata_path(root: pathlib.Path) -> pathlib.Path:
    found = sorted([*root.glob("maestro-v*.csv"), *root.glob("maestro-v*.json")])
    if not found:
        raise DatasetError(
            f"{root}/maestro-v3.0.0.csv: no such file, nor another version's; get it from {SOURCE}"
        )
    return found[-1]


def _read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    content = json.loads(text)
    if isinstance(content, list):
        return content
    return [{name: content[name][key] for name in content} for key in content["split"]]


def _to_example(root: pathlib.Path, row: dict[str, Any], path: pathlib.Path) -> Example:
    try:
        audio = root / row["audio_filename"]
        return Example(
            id=str(pathlib.PurePosixPath(row["audio_filename"]).with_suffix("")),
            dataset=NAME,
            split=row["split"],
            audio=(audio,),
            labels=(Label(root / row["midi_filename"], program=0),),
            read_notes=read_notes,
            duration=float(row["duration"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}: a row is damaged ({describe(error)})") from error


def read_notes(label: Label) -> list[Note]:
    """Reads a MIDI file, pedal applied; ValueError if it is damaged."""
    return [note._replace(program=0) for note in read_midi(label.path)]
