"""URMP: 44 classical chamber pieces whose parts were recorded one by one.

Source: Li et al., "Creating a Multitrack Classical Music Performance Dataset for Multimodal Music
Analysis", IEEE Transactions on Multimedia 2019. Licence CC0 (its copy on Dryad). Layout:

    Dataset/
      01_Jupiter_vn_vc/                     number_name_instruments in the order of the parts
        AuMix_01_Jupiter_vn_vc.wav
        Notes_1_vn_01_Jupiter.txt           onset in s, frequency in Hz, duration in s
        Notes_2_vc_01_Jupiter.txt

Splits (MT3 paper): nine pieces for validation, the other 35 for training; there is no test split.

Labels: the instrument follows from the folder's name and the part's number, since some files name a
wrong one. Frequencies were measured and are rounded to the nearest MIDI pitch (A4 = 440 Hz). There
are no velocities: notes get 100.
"""

from __future__ import annotations

import math
import pathlib
import re

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

NAME = "urmp"
SOURCE = "https://labsites.rochester.edu/air/projects/URMP.html"
SPLITS = ("train", "validation")
VALIDATION_NUMBERS = (1, 2, 12, 13, 24, 25, 31, 38, 39)
PROGRAMS = {
    "vn": 40,
    "va": 41,
    "vc": 42,
    "db": 43,
    "tpt": 56,
    "tbn": 57,
    "tba": 58,
    "hn": 60,
    "sax": 64,
    "ob": 68,
    "bn": 70,
    "cl": 71,
    "fl": 73,
}

_FOLDER = re.compile(r"(?P<number>\d\d)_[^_]+(?P<codes>(_[a-z]+)+)")


def find(root: str | pathlib.Path, split: str, *, skip_missing: bool = False) -> list[Example]:
    """Lists the pieces of a split.

    Args:
      root: the folder of pieces, or the one that holds it as "Dataset".
      split: one of `SPLITS`.
      skip_missing: leave incomplete examples out instead of raising, for partial copies.

    Raises:
      ValueError: no such split.
      DatasetError: no pieces, an unknown instrument, audio or notes missing.
    """
    root = pathlib.Path(root)
    check_request(NAME, SOURCE, root, split, SPLITS)
    if (root / "Dataset").is_dir():
        root = root / "Dataset"
    pieces = [(path, _FOLDER.fullmatch(path.name)) for path in sorted(root.iterdir())]
    matches = [(path, match) for path, match in pieces if match and path.is_dir()]
    if not matches:
        raise DatasetError(f"{root}/01_Jupiter_vn_vc: no such folder; get it from {SOURCE}")
    examples = read_each(
        [
            (path, match["codes"])
            for path, match in matches
            if (int(match["number"]) in VALIDATION_NUMBERS) == (split == "validation")
        ],
        lambda piece: [_to_example(piece[0], split, piece[1][1:].split("_"))],
    )
    return check_files(examples, SOURCE, root, skip_missing)


def _to_example(path: pathlib.Path, split: str, codes: list[str]) -> Example:
    labels = []
    for part, code in enumerate(codes, start=1):
        if code not in PROGRAMS:
            raise DatasetError(
                f"{path}: unknown instrument {code!r}; rename it to one of {', '.join(PROGRAMS)}"
            )
        expected = f"Notes_{part}_{code}_{'_'.join(path.name.split('_')[:2])}.txt"
        notes = next(iter(sorted(path.glob(f"Notes_{part}_*.txt"))), path / expected)
        labels.append(Label(notes, PROGRAMS[code]))
    mix = next(iter(sorted(path.glob("AuMix_*.wav"))), path / f"AuMix_{path.name}.wav")
    return Example(path.name, NAME, split, (mix,), tuple(labels), read_notes)


def read_notes(label: Label) -> list[Note]:
    """Reads one part's notes; ValueError if the file is damaged."""

    def to_note(line: str) -> Note:
        onset, frequency_hz, duration = map(float, line.split())
        pitch = round(69 + 12 * math.log2(frequency_hz / 440))
        return Note(onset, onset + duration, pitch, UNKNOWN_VELOCITY, label.program or 0)

    lines = map(str.strip, label.path.read_text(encoding="utf-8").splitlines())
    return keep_notes(filter(None, lines), to_note, label.path)
