"""Examples of data sets: each has audio files and label files.

A data set is one module of this package with these members: `NAME`, `SOURCE` (where to get it),
`SPLITS`, `find(root, split, *, skip_missing=False, ...)` -> list[Example], sorted by id, and
`read_notes(label)` -> list[Note]. `find` reads file names and metadata only; labels are read when
an example's `load_notes` is called.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from mt3_keras.audio import AudioError, duration, read_blocks
from mt3_keras.instrument_names import instrument_name
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note, check_notes, sort_notes, trim_overlaps

# What the readers of JSON, CSV, MIDI and text raise on damaged files.
_DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, csv.Error),
    RecursionError,
)
UNKNOWN_VELOCITY = 100  # for labels without loudness, as note-seq does

_Row = TypeVar("_Row")
_Found = TypeVar("_Found")
_logger = logging.getLogger(__name__)


class DatasetError(ValueError):
    """A missing or damaged file of a data set; the message names it and the cure."""


class Label(NamedTuple):
    """A label file, and what the data set states about it elsewhere.

    Attributes:
      path: the file.
      program: General MIDI program of all its notes; None if the file states it.
      is_drum: whether all its notes are drums.
      semitones: how far to transpose its notes.
    """

    path: pathlib.Path
    program: int | None = None
    is_drum: bool = False
    semitones: int = 0


@dataclasses.dataclass(frozen=True)
class Example:
    """One piece of music. Picklable, so that worker processes can load it.

    Attributes:
      id: unique in its data set.
      dataset: name of the data set.
      split: one of the data set's `SPLITS`.
      audio: files to be summed; a single one is the mix itself.
      labels: files whose notes are joined.
      read_notes: reads one label file; a function of the data set's module.
      trim: end each note at the next onset of its pitch and instrument (Slakh's and Cerberus4's
        training targets).
      duration: in seconds, where the data set's metadata states it.
    """

    id: str
    dataset: str
    split: str
    audio: tuple[pathlib.Path, ...]
    labels: tuple[Label, ...]
    read_notes: Callable[[Label], list[Note]]
    trim: bool = False
    duration: float | None = None

    def load_notes(self) -> list[Note]:
        """Reads the notes of all labels, ordered by onset.

        Notes that cannot be, such as those that end before they begin, are left out with a warning.

        Raises:
          DatasetError: a label file is missing or damaged, or none holds a note.
        """
        notes: list[Note] = []
        for label in self.labels:
            try:
                part = keep_notes(self.read_notes(label), _itself, label.path)
            except FileNotFoundError as error:
                raise DatasetError(
                    f"{label.path}: no such file; get {self.dataset} again"
                ) from error
            except _DAMAGE as error:
                reason = describe(error).removeprefix(f"{label.path}: ")
                raise DatasetError(
                    f"{label.path}: damaged label file ({reason}); get {self.dataset} again"
                ) from error
            notes += part
        if not notes:
            raise DatasetError(
                f"{self.labels[0].path}: no notes; leave {self.id} out or get it again"
            )
        return trim_overlaps(notes) if self.trim else sort_notes(notes)

    def load_duration(self) -> float:
        """Length in seconds: `duration`, or that of the longest audio file.

        Raises:
          DatasetError: an audio file is missing or damaged.
        """
        return self.duration or max(_audio_seconds(path, self.dataset) for path in self.audio)

    def instruments(self) -> set[tuple[int, bool]]:
        """(program, is_drum) of each instrument; reads label files only if necessary.

        Raises:
          DatasetError: as `load_notes`.
        """
        known = {
            (label.program, label.is_drum) for label in self.labels if label.program is not None
        }
        if all(label.program is not None for label in self.labels):
            return known
        return {(note.program, note.is_drum) for note in self.load_notes()}


def read_each(places: Iterable[_Row], read: Callable[[_Row], Iterable[_Found]]) -> list[_Found]:
    """What is found at each place of a data set; what cannot be used is named and left out.

    Args:
      places: such as the folders of its songs.
      read: gives what is at a place, or raises DatasetError.

    Raises:
      DatasetError: nothing at any place can be used.
    """
    found: list[_Found] = []
    faults: list[DatasetError] = []
    for place in places:
        try:
            found += read(place)
        except DatasetError as error:
            faults.append(error)
    if faults and not found:
        raise faults[0]
    for fault in faults:
        _logger.warning("%s; left out", describe(fault))
    return found


def keep_notes(
    rows: Iterable[_Row], to_note: Callable[[_Row], Note], path: pathlib.Path
) -> list[Note]:
    """Notes of the rows of a label file; rows that are none are left out with a warning.

    Raises:
      ValueError, LookupError, TypeError, ArithmeticError: no row is a note.
    """
    notes: list[Note] = []
    faults: list[Exception] = []
    for row in rows:
        try:
            note = to_note(row)
            check_notes([note])
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            faults.append(error)
        else:
            notes.append(note)
    if faults and not notes:
        raise faults[0]
    if faults:
        text = "%s: %d of its %d notes cannot be and are left out (the first: %s)"
        num_rows = len(faults) + len(notes)
        _logger.warning(text, path, len(faults), num_rows, describe(faults[0]))
    return notes


def _itself(note: Note) -> Note:
    return note


def _audio_seconds(path: pathlib.Path, dataset: str) -> float:
    try:
        known = duration(path)
        if known is None:
            known = sum(block.size for block in read_blocks(path)) / SAMPLE_RATE_HZ
    except AudioError as error:
        raise DatasetError(f"{error}; or get {dataset} again") from error
    return known


def describe(error: Exception) -> str:
    """An error's message on one line."""
    text = " ".join(str(error).split())
    return f"no {text}" if isinstance(error, KeyError) else text


def check_request(
    dataset: str, source: str, root: pathlib.Path, split: str, splits: Sequence[str]
) -> None:
    """Raises ValueError for an unknown split, DatasetError if `root` is not a folder."""
    if split not in splits:
        raise ValueError(f"split of {dataset} must be one of {', '.join(splits)}: got {split!r}")
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; get {dataset} from {source}")


def check_files(
    examples: Iterable[Example], source: str, root: pathlib.Path, skip_missing: bool
) -> list[Example]:
    """Sorts examples by id and checks that all their files exist.

    Args:
      examples: found in any order.
      source: the data set's name, for messages.
      root: its folder, for messages.
      skip_missing: leave incomplete examples out instead of raising, for partial copies.

    Raises:
      DatasetError: a file is missing, or no example is complete.
    """
    complete, missing = [], []
    for example in sorted(examples, key=lambda e: e.id):
        paths = [*example.audio, *(label.path for label in example.labels)]
        absent = [path for path in paths if not path.is_file()]
        missing += absent
        if not absent:
            complete.append(example)
    if missing and not skip_missing:
        others = f" and {len(missing) - 1} other files" if len(missing) > 1 else ""
        raise DatasetError(
            f"{missing[0]}: no such file{others}; get the rest from {source} or pass skip_missing"
        )
    if not complete:
        raise DatasetError(f"{root}: no complete example of this split; get it from {source}")
    return complete


def summarize(examples: Sequence[Example]) -> str:
    """A text: the numbers of examples and hours, and of examples with each instrument.

    Raises:
      DatasetError: a file that must be read for this is missing or damaged.
    """
    hours: dict[tuple[str, str], float] = collections.defaultdict(float)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    instruments: collections.Counter[tuple[bool, int]] = collections.Counter()
    for example in examples:
        key = (example.dataset, example.split)
        counts[key] += 1
        hours[key] += example.load_duration() / 3600
        instruments.update((is_drum, program) for program, is_drum in example.instruments())
    lines = [
        f"{dataset} {split}: {counts[dataset, split]} examples, {hours[dataset, split]:.2f} h"
        for dataset, split in sorted(counts)
    ]
    for (is_drum, program), count in sorted(instruments.items()):
        number = "   " if is_drum else f"{program:3d}"
        lines.append(f"  {number} {instrument_name(program, is_drum)}: {count}")
    return "\n".join(lines)
