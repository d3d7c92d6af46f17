"""Prepared data: pieces of 16 seconds, audio and notes together, in ArrayRecord files.

A prepared split of a data set consists of these files in a folder:

    maestro-train-00003-of-00016.array_record   a shard: one record for each piece
    maestro-train-00003-of-00016.json           its description: counts, examples left out and why
    maestro-train.json                          their sum; written after all shards are complete

As in the original's training pre-processing, an example is cut into pieces of at most 2000 frames
of 8 ms. A record holds its audio and everything that the exact targets of any chunk of it need: the
notes with their times in the example, including those that began before the piece, and the time of
the example's last event. It differs from the original's cache in one respect: an example that is a
whole number of pieces long gets no further piece of one empty frame; its last piece has that frame.

A record is a msgpack map. Its audio is int16, scaled down where its peak is above 1 (in sums of
stems), with audio of the neighbouring pieces at both ends for the windows of the outer frames.
Records are written by `shards`. This module needs only NumPy, msgpack and array_record.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np
from array_record.python import array_record_module
from numpy.typing import NDArray

from mt3_keras.notes import Note

PIECE_SAMPLES = 256_000  # 16 s, 2000 hops of 128 samples
MARGIN_SAMPLES = 4096  # of audio of each neighbouring piece
VERSION = 1
_CURE = "run train.prepare again, it keeps what is whole"


class RecordsError(ValueError):
    """Prepared data is missing, damaged or of another kind; the message names the cure."""


class Record(NamedTuple):
    """A piece of an example.

    Attributes:
      id: of the example.
      first_sample: where the piece begins in the example, at 16 kHz.
      num_samples: length of the piece.
      is_last: whether it is the last piece of the example.
      pcm: int16, from MARGIN_SAMPLES before the piece (zeros before the example) to at most as
        many after it.
      full_scale: amplitude that the value 2**15 represents.
      notes: in the example's order, times from the example's start: the notes that sound in the
        piece, and those that determine which notes sound at its start.
      last_event: time of the example's last onset or offset.
      stems: int16 [T, n] as `pcm`, its tracks apart, of data prepared with tracks; None of others.
    """

    id: str
    first_sample: int
    num_samples: int
    is_last: bool
    pcm: NDArray[np.int16]
    full_scale: float
    notes: list[Note]
    last_event: float
    stems: NDArray[np.int16] | None = None

    def samples(self, first: int, end: int) -> NDArray[np.float32]:
        """Audio from sample `first` of the piece on, which may be as low as -MARGIN_SAMPLES.

        Returns:
          float32 [end - first], zeros where the record holds none.
        """
        return self._cut(self.pcm, first, end)

    def track_samples(self, first: int, end: int) -> NDArray[np.float32]:
        """The same of its tracks, float32 [T, end - first]."""
        assert self.stems is not None  # `find_records` has looked for them
        return self._cut(self.stems, first, end)

    def _cut(self, pcm: NDArray[np.int16], first: int, end: int) -> NDArray[np.float32]:
        part = pcm[..., MARGIN_SAMPLES + first : MARGIN_SAMPLES + end].astype(np.float32)
        missing = [(0, 0)] * (pcm.ndim - 1) + [(0, end - first - part.shape[-1])]
        return np.pad(part * np.float32(self.full_scale / 2**15), missing)


def encode_record(record: Record) -> bytes:
    """Record -> bytes."""
    fields = {**record._asdict(), "pcm": record.pcm.astype("<i2").tobytes(), "version": VERSION}
    stems = fields.pop("stems")
    if stems is not None:
        fields["stems"] = stems.astype("<i2").tobytes()
    packed: bytes = msgpack.packb(fields)
    return packed


def decode_record(data: bytes) -> Record:
    """Bytes -> record; ValueError if they are not a record, or one of another version."""
    try:
        fields = msgpack.unpackb(data)
        version = fields.pop("version")
        if version == VERSION:
            notes = [Note(*note) for note in fields.pop("notes")]
            pcm, stems = np.frombuffer(fields.pop("pcm"), "<i2"), fields.pop("stems", None)
            if stems is not None:
                stems = np.frombuffer(stems, "<i2").reshape(-1, len(pcm))
            return Record(pcm=pcm, stems=stems, notes=notes, **fields)
    except (ValueError, TypeError, LookupError, AttributeError, msgpack.UnpackException) as error:
        raise ValueError("it is no record of this program") from error
    raise ValueError(f"it is of version {version}, this program reads {VERSION}")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads the description of a shard or split; RecordsError if it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
        content["num_records"], content["skipped"], content["config"]
    except OSError as error:
        raise RecordsError(f"{path}: cannot be read ({error.strerror}); {_CURE}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise RecordsError(f"{path}: damaged; delete it and {_CURE}") from error
    return dict(content)


class Records:
    """A prepared split, a sequence of records. Picklable; files are opened when they are needed.

    Attributes:
      name: of the data set.
      summary: what NAME-SPLIT.json holds.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Opens NAME-SPLIT.json; RecordsError if a shard is missing or not of the stated size."""
        self.summary = read_json(path)
        self.name: str = self.summary["config"]["name"]
        shards = [shard for shard in self.summary["shards"] if shard["num_records"]]
        self._paths = [path.with_name(shard["file"]) for shard in shards]
        self._ends = list(itertools.accumulate(shard["num_records"] for shard in shards))
        self._readers: dict[int, Any] = {}
        for shard, shard_path in zip(shards, self._paths, strict=True):
            held = shard_path.stat().st_size if shard_path.is_file() else None
            if held != shard["num_bytes"]:
                state = "no such file" if held is None else "damaged or cut short"
                raise RecordsError(f"{shard_path}: {state}; {_CURE}")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """Reads a record; RecordsError, naming the file, if it is damaged."""
        index = range(len(self))[index]
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        path = self._paths[shard]
        try:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(str(path))
            return decode_record(self._readers[shard].read([index - first])[0])
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise RecordsError(
                f"{path}: record {index - first} cannot be read ({reason});"
                f" delete the file and {_CURE}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}


def find_records(
    folders: Iterable[str | os.PathLike[str]], split: str, tracks: Sequence[str] = ()
) -> list[Records]:
    """The prepared data sets of a split in several folders, in order of folder and name.

    Args:
      folders: of prepared data.
      split: of each data set.
      tracks: names that they must have been prepared with; any will do if there are none.

    Raises:
      RecordsError: a folder has none, or one of them is incomplete or has other tracks.
    """
    found = []
    for folder in map(pathlib.Path, folders):
        paths = sorted(folder.glob(f"*-{split}.json"))
        if not paths:
            begun = any(folder.glob(f"*-{split}-*-of-*.json"))
            state = "not finished" if begun else "no records"
            raise RecordsError(
                f"{folder}/*-{split}.json: {state}; run train.prepare with --split {split} and"
                " this out_dir"
            )
        for path in paths:
            records = Records(path)
            held = records.summary["config"].get("options", {}).get("tracks", [])
            if tracks and list(tracks) != held:
                names = ",".join(tracks)
                raise RecordsError(
                    f"{path}: has not the tracks of the network; prepare the data"
                    f" with train.prepare --tracks {names} in another out_dir"
                )
            found.append(records)
    return found
