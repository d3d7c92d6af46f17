"""Recordings with MIDI files -> records, without `train.prepare`: decoded by tensorflow-io.

    python -m train.main --reader=tfio --data=mine --flagfile=train/configs/finetune.flags ...

In the environment of requirements-tfio.txt. A `tf.data` pipeline reads and decodes the files on all
cores when a run begins; they are held in memory as 16-bit samples, 115 MB an hour. Chunks are drawn
from them as from prepared records, so both give the same batches.
"""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tqdm import tqdm

from mt3_keras.data import folder
from mt3_keras.data.example import Example, describe
from mt3_keras.data.records import Record, RecordsError
from mt3_keras.data.shards import cut_pieces
from mt3_keras.graph_codecs import decode_audio

MOST_SECONDS = 4 * 3600  # of a recording

_logger = logging.getLogger(__name__)


class FileRecords:
    """A split of a folder of one's own (`mt3_keras.data.folder`), with the parts of `Records`.

    Args:
      root: the folder.
      split: of its recordings. What cannot be read is named in a warning and left out.

    Attributes:
      name: of the data set.
      summary: "shards", what tells one set of recordings from another.

    Raises:
      RecordsError: none of them can be used.
    """

    name = folder.NAME

    def __init__(self, root: str | pathlib.Path, split: str) -> None:
        self._records: list[Record] = []
        examples = folder.find(root, split)
        for example, samples in zip(examples, decode_files(examples), strict=True):
            if samples is None:
                continue
            try:
                self._records += list(cut_pieces(example.id, samples, example.load_notes()))
            except ValueError as error:
                _logger.warning("%s: %s; left out", example.id, describe(error))
        if not self._records:
            raise RecordsError(f"{root}: none of its recordings for {split} could be used")
        shards = [[r.id, r.first_sample, r.num_samples, len(r.notes)] for r in self._records]
        self.summary: dict[str, Any] = {"shards": shards}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]


def decode_files(examples: Sequence[Example]) -> Iterator[Any]:
    """Yields the samples of each example, float32 [n] at 16 kHz; None where they cannot be read."""
    paths = [str(example.audio[0]) for example in examples]
    files = tf.data.Dataset.from_tensor_slices(paths)
    decoded = files.map(
        lambda path: decode_audio(tf.io.read_file(path), MOST_SECONDS),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    found = iter(decoded.prefetch(tf.data.AUTOTUNE))
    for path in tqdm(paths, "decoding", unit=" files", disable=None):
        try:
            yield next(found).numpy()
        except tf.errors.OpError as error:  # the next element is the next file's
            reason = re.sub(r"\{\{.*?\}\}", "", str(error.message).splitlines()[0]).strip()
            _logger.warning("%s: %s; left out", path, reason)
            yield None


def find_files(
    folders: Iterable[str | pathlib.Path], split: str, tracks: Sequence[str] = ()
) -> list[FileRecords]:
    """In the place of `records.find_records`, for folders of recordings with MIDI files.

    Raises:
      ValueError: a folder has none of the split, or tracks are asked for.
    """
    if tracks:
        raise RecordsError("recordings read by tensorflow-io have no tracks: use train.prepare")
    return [FileRecords(root, split) for root in folders]
