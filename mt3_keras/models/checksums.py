"""Checksums of a model's large files, in its folder as `sha256sum -c SHA256SUMS` reads them.

A damaged weight is a number like any other: without them it would change notes and say nothing.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re

from mt3_keras.files import open_regular, replacing

FILE = "SHA256SUMS"
COVERED = ("model.tflite", "model.weights.h5")
_MAX_BYTES = 2**16


def write_sums(folder: pathlib.Path) -> None:
    """Writes the checksums of those of `COVERED` that a folder holds."""
    lines = [f"{_digest(folder / name)}  {name}\n" for name in COVERED if (folder / name).is_file()]
    with replacing(folder / FILE) as temporary:
        temporary.write_text("".join(lines))


def drop_sums(folder: pathlib.Path) -> None:
    """Removes the checksums of files that are about to be written anew."""
    (folder / FILE).unlink(missing_ok=True)


def check_sum(path: str | os.PathLike[str]) -> None:
    """Compares a file with the checksum in its folder, if there is one.

    Raises:
      ValueError: they differ, or the checksums cannot be read; one line.
    """
    path = pathlib.Path(path)
    sums = path.with_name(FILE)
    if not sums.exists():
        return
    with open_regular(sums, ValueError) as file:
        text = file.read(_MAX_BYTES).decode(errors="replace")
    stated = re.search(rf"^([0-9a-f]{{64}}) [ *]{re.escape(path.name)}$", text, re.MULTILINE)
    if stated and stated[1] != _digest(path):
        raise ValueError(
            f"{path}: differs from its checksum in {FILE}; copy the model again"
            f" (or, if you changed it, delete {FILE})"
        )


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
