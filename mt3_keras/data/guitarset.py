"""GuitarSet: 360 half-minute excerpts on an acoustic guitar, labelled string by string.

Source: Xi et al., "GuitarSet: A Dataset for Guitar Transcription", ISMIR 2018. Licence CC BY 4.0.
Six players comp and solo over three chord progressions in each of five styles at two tempi:

    guitarset/
      annotation/00_BN1-129-Eb_comp.jams          player_styleProgression-tempo-key_mode
      audio_mono-mic/00_BN1-129-Eb_comp_mic.wav
      audio_mono-pickup_mix/00_BN1-129-Eb_comp_mix.wav

Splits (from the MT3 paper): of every style the first two progressions are for training, the third
for validation; there is no test split. With both audio versions these are 480 and 240 examples;
MT3 counts 478 and 238 and does not state which it left out.

Labels: the six `note_midi` annotations of the JAMS file (plain JSON), joined. Their pitches are
fractional and rounded here. The program is 24, that of MT3's track "Clean Guitar".
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from mt3_keras.data.example import (
    UNKNOWN_VELOCITY,
    DatasetError,
    Example,
    Label,
    check_files,
    check_request,
    keep_notes,
    read_each,
)
from mt3_keras.notes import Note

NAME = "guitarset"
SOURCE = "https://guitarset.weebly.com (files on zenodo.org/records/3371780)"
SPLITS = ("train", "validation")
PROGRAM = 24
AUDIO_FOLDERS = {"mic": "audio_mono-mic", "mix": "audio_mono-pickup_mix"}

_ID = re.compile(r"\d\d_[A-Za-z]+(?P<progression>[123])-\d+-[A-G][#b]?_(comp|solo)")


def find(
    root: str | pathlib.Path, split: str, *, audio: str = "both", skip_missing: bool = False
) -> list[Example]:
    """Lists the excerpts of a split.

    Args:
      root: folder of the data set.
      split: one of `SPLITS`.
      audio: "mic" for the microphone, "mix" for the summed pickup, "both" for an example of each.
      skip_missing: leave incomplete examples out instead of raising, for partial copies.

    Raises:
      ValueError: no such split or audio version.
      DatasetError: annotations or audio are missing, or a name has another form.
    """
    root = pathlib.Path(root)
    check_request(NAME, SOURCE, root, split, SPLITS)
    if audio not in (*AUDIO_FOLDERS, "both"):
        raise ValueError(f"audio must be mic, mix or both: got {audio!r}")
    annotations = sorted(root.glob("annotation/[!.]*.jams"))
    if not annotations:
        raise DatasetError(f"{root}/annotation: no .jams files in it; get them from {SOURCE}")
    known = read_each(annotations, lambda path: [(path, _split_of(path))])
    examples = [
        Example(
            id=f"{path.stem}_{version}",
            dataset=NAME,
            split=split,
            audio=(root / folder / f"{path.stem}_{version}.wav",),
            labels=(Label(path, PROGRAM),),
            read_notes=read_notes,
        )
        for path, split_of in known
        for version, folder in AUDIO_FOLDERS.items()
        if split_of == split and audio in (version, "both")
    ]
    return check_files(examples, SOURCE, root, skip_missing)


def _split_of(path: pathlib.Path) -> str:
    match = _ID.fullmatch(path.stem)
    if not match:
        raise DatasetError(
            f"{path}: not named like 00_BN1-129-Eb_comp.jams; remove it or restore its name"
        )
    return "validation" if match["progression"] == "3" else "train"


def read_notes(label: Label) -> list[Note]:
    """Reads the notes of all strings; ValueError, KeyError or TypeError if damaged."""
    annotations = json.loads(label.path.read_text(encoding="utf-8"))["annotations"]
    items = [
        item
        for annotation in annotations
        if annotation["namespace"] == "note_midi"
        for item in annotation["data"]
    ]
    return keep_notes(items, _to_note, label.path)


def _to_note(item: dict[str, Any]) -> Note:
    onset, offset = float(item["time"]), float(item["time"]) + float(item["duration"])
    return Note(onset, offset, round(item["value"]), UNKNOWN_VELOCITY, PROGRAM)
