"""MusicNet: 330 classical recordings, labelled by aligning scores; and MusicNetEM's better labels.

Sources: Thickstun et al., "Learning Features of Music from Scratch", ICLR 2017; Maman and Bermano,
"Unaligned Supervision for Automatic Music Transcription in The Wild", ICML 2022 (MusicNetEM).
Licence CC BY 4.0 (a few recordings: public domain or other Creative Commons licences). Layout:

    musicnet/
      train_data/2151.wav    train_labels/2151.csv     320 pieces
      test_data/1759.wav     test_labels/1759.csv      10 pieces
      musicnet_em/2151.mid                             323 pieces

Splits do not follow the folders. They are MT3's (from its code and its issue 29): 15 fixed ids for
validation, 15 for test, all others for training (300; 293 with MusicNetEM, which lacks 2194 2211
2227 2230 2292 2305 2310).

Labels: CSV times are samples at 44.1 kHz. CSV instruments count General MIDI programs from 1 (the
string quartet 2106 has 41, 42 and 43), so 1 is subtracted; the NoteSequences of the original may
lack that. MusicNetEM's MIDI files count from 0, as all MIDI files do. Neither has velocities: CSV
notes get 100. MT3's released weights were most likely trained on the CSV labels; its present
configuration names MusicNetEM.
"""

from __future__ import annotations

import csv
import pathlib

from mt3_keras.data.example import (
    UNKNOWN_VELOCITY,
    DatasetError,
    Example,
    Label,
    check_files,
    check_request,
    keep_notes,
)
from mt3_keras.midi import read_midi
from mt3_keras.notes import Note

NAME = "musicnet"
SOURCE = "https://zenodo.org/records/5120004 (MusicNetEM: https://benadar293.github.io)"
SPLITS = ("train", "validation", "test")
LABEL_RATE_HZ = 44_100
VALIDATION_IDS = (
    *("1733", "1765", "1790", "1818", "2160", "2198", "2289", "2300", "2308", "2315"),
    *("2336", "2466", "2477", "2504", "2611"),
)
TEST_IDS = (
    *("1729", "1776", "1813", "1893", "2118", "2186", "2296", "2431", "2432", "2487"),
    *("2497", "2501", "2507", "2537", "2621"),
)
_LABEL_PATTERNS = {"csv": "*_labels/*.csv", "em": "musicnet_em/*.mid"}


def find(
    root: str | pathlib.Path, split: str, *, labels: str = "csv", skip_missing: bool = False
) -> list[Example]:
    """Lists the pieces of a split.

    Args:
      root: folder of the data set.
      split: one of `SPLITS`.
      labels: "csv" for MusicNet's own, "em" for MusicNetEM's.
      skip_missing: leave incomplete examples out instead of raising, for partial copies.

    Raises:
      ValueError: no such split or kind of labels.
      DatasetError: labels or audio are missing.
    """
    root = pathlib.Path(root)
    check_request(NAME, SOURCE, root, split, SPLITS)
    if labels not in _LABEL_PATTERNS:
        raise ValueError(f"labels must be csv or em: got {labels!r}")
    pattern = _LABEL_PATTERNS[labels]
    found = {path.stem: path for path in root.glob(pattern)}
    if not found:
        raise DatasetError(f"{root}/{pattern}: no such files; get them from {SOURCE}")
    fixed = {"validation": VALIDATION_IDS, "test": TEST_IDS}
    held_out = {*VALIDATION_IDS, *TEST_IDS}
    ids = fixed.get(split) or [piece for piece in found if piece not in held_out]
    examples = []
    for piece in ids:
        absent = root / pattern.replace("*_labels", "train_labels").replace("*", piece)
        examples.append(
            Example(
                id=piece,
                dataset=NAME if labels == "csv" else f"{NAME}_em",
                split=split,
                audio=(_audio_path(root, piece),),
                labels=(Label(found.get(piece, absent)),),
                read_notes=read_notes,
            )
        )
    return check_files(examples, SOURCE, root, skip_missing)


def _audio_path(root: pathlib.Path, piece: str) -> pathlib.Path:
    test = root / "test_data" / f"{piece}.wav"
    return test if test.is_file() else root / "train_data" / f"{piece}.wav"


def read_notes(label: Label) -> list[Note]:
    """Reads a CSV or MIDI label file; ValueError, KeyError or TypeError if damaged."""
    if label.path.suffix == ".mid":
        return read_midi(label.path)
    with label.path.open(encoding="utf-8", newline="") as file:
        return keep_notes(csv.DictReader(file), _to_note, label.path)


def _to_note(row: dict[str, str]) -> Note:
    onset, offset = (int(row[key]) / LABEL_RATE_HZ for key in ("start_time", "end_time"))
    return Note(onset, offset, int(row["note"]), UNKNOWN_VELOCITY, int(row["instrument"]) - 1)
