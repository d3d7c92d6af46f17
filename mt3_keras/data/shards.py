"""Examples -> shards of records (see `records`), by Apache Beam.

A shard is the unit of work: a worker reads its examples one after the other, block by block, and
renames the file when it is complete. A complete shard is never written again. Examples that cannot
be used are left out; the shard's description states the reason.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import numpy as np
from array_record.python import array_record_module
from numpy.typing import NDArray

from mt3_keras import beam
from mt3_keras.audio import stack_files, sum_files
from mt3_keras.data.example import Example, describe
from mt3_keras.data.records import (
    MARGIN_SAMPLES,
    PIECE_SAMPLES,
    VERSION,
    Record,
    RecordsError,
    encode_record,
    read_json,
)
from mt3_keras.instrument_names import instrument_name
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note, check_notes
from mt3_keras.segments import check_samples
from mt3_keras.tracks import Tracks

if TYPE_CHECKING:
    from mt3_keras.synth.synthetic import SyntheticConfig

TOLERATED_ONSET = 1.0  # seconds that a note may begin after the end of the audio
_MARGIN = 0.1  # seconds, more than rounding to the time grid can move a note
_WRITER_OPTIONS = "group_size:1,uncompressed"  # compression saves a tenth and doubles the time
_SPOOL_BYTES = 2**26

Samples = NDArray[np.float32]
Loaded = tuple[Samples | Iterable[Samples], Sequence[Note]]


class Source(NamedTuple):
    """An example to be prepared. Both parts are pickled to reach the worker processes.

    Attributes:
      id: unique in the data set.
      load: returns its audio, float32 at 16 kHz mono, [n] or blocks of it, and its notes; of data
        with T tracks the audio is [1 + T, n], the mix and then each track. If it raises an error,
        the example is left out and the error recorded.
    """

    id: str
    load: Callable[[], Loaded]


def example_source(example: Example, tracks: Sequence[str] = ()) -> Source:
    """The source that reads an example's files, block by block, with the tracks named apart."""
    return Source(example.id, functools.partial(_load_example, example, tuple(tracks)))


def _load_example(example: Example, tracks: tuple[str, ...]) -> Loaded:
    if not tracks:
        return sum_files(example.audio), example.load_notes()
    known = [label.program for label in example.labels if label.program is not None]
    if not len(example.audio) == len(example.labels) == len(known):
        raise ValueError("its instruments are not in files of their own: leave --tracks out")
    shares = Tracks(tracks)
    files: list[list[pathlib.Path]] = [[] for _ in tracks]
    for path, label in zip(example.audio, example.labels, strict=True):
        files[shares.owner(label.program or 0, label.is_drum)].append(path)
    mixed = (np.concatenate([block.sum(axis=0)[None], block]) for block in stack_files(files))
    return mixed, example.load_notes()


def synthetic_source(config: SyntheticConfig, index: int) -> Source:
    """The source that renders example `index` of a configuration."""
    return Source(f"{index:07d}", functools.partial(_render_example, config, index))


def _render_example(config: SyntheticConfig, index: int) -> Loaded:
    from mt3_keras.synth.synthetic import render

    piece = render(config, index)
    return piece.samples, piece.notes


def cut_pieces(
    name: str, samples: Samples | Iterable[Samples], notes: Sequence[Note]
) -> Iterator[Record]:
    """Cuts an example into records; holds one record and one block of audio in memory.

    Args:
      name: id of the example.
      samples: 16 kHz mono, [n] or blocks of it in order, or with tracks [1 + T, n].
      notes: times from the start of the audio.

    Raises:
      ValueError: on iteration, at the last piece at the latest: there is no audio or no note, a
        note or sample is invalid, or a note begins more than `TOLERATED_ONSET` after the end of
        the audio.
    """
    check_notes(notes)
    if not notes:
        raise ValueError("it has no notes")
    last_event = max(note.onset if note.is_drum else note.offset for note in notes)
    select = _NoteSelection(notes, last_event)
    first = 0
    blocks = [samples] if isinstance(samples, np.ndarray) else samples
    for window, is_last in _slide(_check(block) for block in blocks):
        num_samples = min(window.shape[-1] - MARGIN_SAMPLES, PIECE_SAMPLES)
        end = (first + num_samples) / SAMPLE_RATE_HZ
        if is_last:
            _check_onsets(notes, end)
        chosen = select(first / SAMPLE_RATE_HZ, np.inf if is_last else end)
        pcm, full_scale = _to_pcm(window)
        mix, stems = (pcm, None) if pcm.ndim == 1 else (pcm[0], pcm[1:])
        record = Record(name, first, num_samples, is_last, mix, full_scale, chosen, last_event)
        yield record._replace(stems=stems)
        first += num_samples


def _check(block: Samples) -> Samples:
    return check_samples(block) if block.ndim == 1 else np.stack([check_samples(r) for r in block])


def _slide(blocks: Iterable[Samples]) -> Iterator[tuple[Samples, bool]]:
    """Yields each piece with its margins, and whether it is the last."""
    size = MARGIN_SAMPLES + PIECE_SAMPLES + MARGIN_SAMPLES
    held = np.zeros(MARGIN_SAMPLES, np.float32)
    for block in blocks:
        before = held if held.ndim == block.ndim else np.zeros((len(block), held.size), np.float32)
        held = np.concatenate([before, block], axis=-1)
        while held.shape[-1] >= size:
            yield held[..., :size], False
            held = held[..., PIECE_SAMPLES:]
    while held.shape[-1] > MARGIN_SAMPLES + PIECE_SAMPLES:
        yield held[..., :size], False
        held = held[..., PIECE_SAMPLES:]
    if held.shape[-1] == MARGIN_SAMPLES:
        raise ValueError("it has no audio")
    yield held, True


def _check_onsets(notes: Iterable[Note], end: float) -> None:
    late = max(note.onset for note in notes)
    if late > end + TOLERATED_ONSET:
        raise ValueError(
            f"its audio ends at {end:.1f} s, its notes go on to {late:.1f} s:"
            " the audio was cut short, or they do not belong together"
        )


def _to_pcm(samples: Samples) -> tuple[NDArray[np.int16], float]:
    """Samples -> int16 and their full scale; audio of 16-bit files is reproduced exactly."""
    low, high = float(samples.min()), float(samples.max())
    full_scale = max(1.0, -low, high * 2**15 / (2**15 - 1))
    return np.rint(samples * np.float32(2**15 / full_scale)).astype(np.int16), full_scale


class _NoteSelection:
    """Selects the notes that a piece needs."""

    def __init__(self, notes: Sequence[Note], last_event: float) -> None:
        self._notes = notes
        self._last_event = last_event
        self._onsets = np.array([note.onset for note in notes])
        self._offsets = np.array([note.offset for note in notes])
        self._drums = np.array([note.is_drum for note in notes])
        self._keys = np.array([note.program * 128 + note.pitch for note in notes])

    def __call__(self, start: float, end: float) -> list[Note]:
        # Pieces after the last event list notes that sounded before it as tied (`note_encoder`).
        start, end = min(start, self._last_event) - _MARGIN, end + _MARGIN
        sounding = (self._offsets >= start) & (self._onsets < end)
        held = sounding & (self._onsets < start) & ~self._drums
        # The end of a note also ends a longer one of the same pitch: the tie section needs both.
        first_onsets = np.full(128 * 128, np.inf)
        np.minimum.at(first_onsets, self._keys[held], self._onsets[held])
        within = (self._offsets < start) & (self._offsets >= first_onsets[self._keys])
        chosen = np.flatnonzero(sounding | (within & ~self._drums))
        return [self._notes[int(i)] for i in chosen]


class _Shard(NamedTuple):
    path: pathlib.Path
    sources: tuple[Source, ...]
    config: dict[str, Any]


def write_records(
    sources: Sequence[Source],
    out_dir: str | os.PathLike[str],
    *,
    name: str,
    split: str,
    num_shards: int = 0,
    options: Mapping[str, Any] | None = None,
    num_workers: int = 0,
    beam_args: Sequence[str] = (),
) -> dict[str, Any]:
    """Prepares a split of a data set; resumes where an earlier call was stopped.

    Args:
      sources: the examples; a shard gets consecutive ones.
      out_dir: folder of the shards, made if missing.
      name: of the data set, first word of the shards' names.
      split: the second.
      num_shards: 0 is one for each four examples, at most 256.
      options: other settings that determine the records; stored, and compared when resuming.
      num_workers: processes of the local runner; 0 is one for each core.
      beam_args: flags of Beam; if `--runner` is among them, that runner is used, and `out_dir`
        must be a folder that all its machines share.

    Returns:
      What NAME-SPLIT.json holds.

    Raises:
      RecordsError: the folder holds other records of this name, no example could be used, or
        writing failed.
    """
    if not sources:
        raise RecordsError(f"{out_dir}: no examples to write")
    folder = pathlib.Path(out_dir)
    num_shards = min(num_shards or min(256, -(-len(sources) // 4)), len(sources))
    ids = hashlib.sha256("\n".join(source.id for source in sources).encode()).hexdigest()
    config = {"version": VERSION, "name": name, "split": split, "num_shards": num_shards}
    config |= {"num_examples": len(sources), "ids": ids, "options": dict(options or {})}
    shards = [
        _Shard(
            folder / f"{name}-{split}-{i:05d}-of-{num_shards:05d}.array_record",
            tuple(sources[i * len(sources) // num_shards : (i + 1) * len(sources) // num_shards]),
            config,
        )
        for i in range(num_shards)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_behind in folder.glob(f".{name}-{split}-*.tmp"):
            left_behind.unlink()
        open_shards = [shard for shard in shards if not _is_finished(shard)]
        beam.run(open_shards, _write_shard, num_workers=num_workers, beam_args=beam_args)
    except beam.BeamError as error:
        raise RecordsError(
            f"{out_dir}: writing stopped ({error}); mend that and run the same command again,"
            " finished shards are kept"
        ) from error
    except OSError as error:
        raise RecordsError(f"{out_dir}: cannot be written ({describe(error)})") from error
    return _write_summary(folder / f"{name}-{split}.json", shards, config)


def _is_finished(shard: _Shard) -> bool:
    stated = shard.path.with_suffix(".json")
    if not stated.is_file():
        return False
    content = read_json(stated)
    if content.get("config") != json.loads(json.dumps(shard.config)):
        raise RecordsError(
            f"{stated}: made of other examples or with other options;"
            " choose another out_dir, or delete these records first"
        )
    if not content["num_records"]:
        return False  # the user may have repaired its files
    return shard.path.is_file() and shard.path.stat().st_size == content["num_bytes"]


def _write_shard(shard: _Shard) -> None:
    """Writes the description of a shard, then the shard under its final name."""
    temporary = shard.path.with_name(f".{shard.path.name}.{os.getpid()}.tmp")
    instruments: collections.Counter[str] = collections.Counter()
    num_records, num_samples, skipped, warnings = 0, 0, [], []
    writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    for source in shard.sources:
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES, dir=str(temporary.parent)) as spool:
            found: set[tuple[int, bool]] = set()
            size = 0
            try:
                with _collecting_warnings() as texts:
                    for record in cut_pieces(source.id, *source.load()):
                        spool.write(msgpack.packb(encode_record(record)))
                        found.update((note.program, note.is_drum) for note in record.notes)
                        size += record.num_samples
            except Exception as error:  # of any kind: it affects this example only
                skipped.append({"id": source.id, "reason": describe(error) or repr(error)})
                continue
            warnings += [{"id": source.id, "text": text} for text in texts]
            spool.seek(0)
            for data in msgpack.Unpacker(spool, max_buffer_size=2**31 - 1):
                writer.write(data)
                num_records += 1
            num_samples += size
            instruments.update({instrument_name(*instrument) for instrument in found})
    writer.close()
    content = {
        "file": shard.path.name,
        "num_records": num_records,
        "num_bytes": temporary.stat().st_size,
        "num_examples": len(shard.sources) - len(skipped),
        "hours": num_samples / SAMPLE_RATE_HZ / 3600,
        "instruments": dict(sorted(instruments.items())),
        "skipped": skipped,
        "warnings": warnings,
        "config": shard.config,
    }
    _write_json(shard.path.with_suffix(".json"), content)
    temporary.replace(shard.path)


@contextlib.contextmanager
def _collecting_warnings() -> Iterator[list[str]]:
    """What our own modules warn of meanwhile; in a worker process it would be seen nowhere."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    logger, collector = logging.getLogger("mt3_keras"), Collector(logging.WARNING)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield texts
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.propagate = propagates


def _write_summary(
    path: pathlib.Path, shards: Sequence[_Shard], config: dict[str, Any]
) -> dict[str, Any]:
    contents = [read_json(shard.path.with_suffix(".json")) for shard in shards]
    instruments: collections.Counter[str] = collections.Counter()
    for content in contents:
        instruments.update(content["instruments"])
    summary = {
        "num_records": sum(content["num_records"] for content in contents),
        "num_examples": sum(content["num_examples"] for content in contents),
        "hours": sum(content["hours"] for content in contents),
        "instruments": dict(instruments.most_common()),
        "skipped": [
            {**skip, "file": content["file"]} for content in contents for skip in content["skipped"]
        ],
        "warnings": [warning for content in contents for warning in content.get("warnings", [])],
        "shards": [
            {key: content[key] for key in ("file", "num_records", "num_bytes")}
            for content in contents
        ],
        "config": config,
    }
    if not summary["num_records"]:
        first = summary["skipped"][0]
        raise RecordsError(
            f"none of the {config['num_examples']} examples could be used;"
            f" the first, {first['id']}: {first['reason']}"
        )
    _write_json(path, summary)
    return summary


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
