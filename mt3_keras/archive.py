"""Archives of recordings -> notes, by Apache Beam: resumed, never stopped by a bad recording.

A folder (local, or of any store that Beam knows) holds, for each of its shards i of n,

    recordings-i-of-n.jsonl   a line for each recording: digest, duration, its MIDI file, notes
    notes-i-of-n.parquet      a row for each note
    failed-i-of-n.jsonl       a line for each recording that could not be used, with the reason
    shards/i-of-n.json        what the shard holds; written last, with the sizes of the others
    midi/i/NAME-ID.mid        of each recording

and `archive.json` (how it is made), `inputs.json` (what the last run was given), `manifest.json`
(totals, written at the end of a run). A recording's name says in which shard it is, so that more
recordings can be added later.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from mt3_keras import __version__, beam, stores
from mt3_keras.archive_worker import (
    FAILED,
    LINES,
    NOTES,
    SUMMARY,
    ArchiveError,
    Shard,
    fingerprint_model,
    list_parts,
    shard_of,
    transcribe_part,
    transcribe_shard,
)
from mt3_keras.extras import require, require_keras
from mt3_keras.models.catalog import needs_keras, pick_engine

__all__ = ["ArchiveError", "transcribe_archive"]

VERSION = 1
RECORDINGS_PER_SHARD = 50
LEAST_SHARDS = 16
SECTION_MINUTES = 10.0


def transcribe_archive(
    recordings: Sequence[str],
    folder: str,
    *,
    model: str = "small",
    options: Mapping[str, Any] | None = None,
    num_shards: int = 0,
    section_minutes: float = SECTION_MINUTES,
    num_workers: int = 0,
    beam_args: Sequence[str] = (),
) -> dict[str, Any]:
    """Transcribes recordings into an archive, which is made, resumed or added to.

    What was transcribed before and has the same content (by its SHA-256 digest) is not transcribed
    again; what failed before is tried again. Recordings of earlier runs stay.

    Args:
      recordings: paths or addresses, as the workers find them.
      folder: of the archive, path or address; all workers must reach it.
      model: see `Transcriber.from_preset`.
      options: of `Transcriber.from_preset`.
      num_shards: of a new archive; 0 is one for each 50 recordings, at least 16.
      section_minutes: recordings whose header states more are cut into sections of this length,
        for several workers.
      num_workers: processes of the local runner; 0 is one for each core.
      beam_args: flags of Beam, such as --runner=DaskRunner; by default the local runner.

    Returns:
      What `manifest.json` holds.

    Raises:
      ArchiveError: the archive is of another model or of other options, or writing failed.
      ValueError: the model cannot be found.
    """
    if not recordings:
        raise ArchiveError(f"{folder}: no recordings to transcribe")
    stores.configure(beam_args)
    _check_packages(model, options or {}, beam_args)
    given = list(dict.fromkeys(recordings))
    fingerprint = fingerprint_model(model)
    config = _write_config(folder, len(given), num_shards, fingerprint, options)
    run = secrets.token_hex(8)
    names = sorted({shard_of(recording, config["num_shards"]) for recording in given})
    seconds = 60.0 * section_minutes
    shared = (run, __version__, model, fingerprint, options or {}, seconds, beam_args)
    shards = [Shard(folder, name, *shared) for name in names]
    inputs = {"run": run, "recordings": given}
    stores.write_whole(f"{folder}/inputs.json", json.dumps(inputs).encode())
    execute = functools.partial(
        beam.run, num_workers=num_workers, beam_args=beam_args, isolated=True
    )
    with _naming(folder):
        execute(shards, transcribe_shard)
        summaries = _read_summaries(folder, names)
        waiting = [shard for shard in shards if summaries[shard.name]["waiting"]]
        if waiting:
            parts = (list_parts(shard, summaries[shard.name]["waiting"]) for shard in waiting)
            execute(list(itertools.chain.from_iterable(parts)), transcribe_part)
            execute(waiting, transcribe_shard)
            if any(summary["waiting"] for summary in _read_summaries(folder, names).values()):
                raise beam.BeamError("a long recording changed meanwhile")
    return _write_manifest(folder, config, run)


def _check_packages(model: str, options: Mapping[str, Any], beam_args: Sequence[str]) -> None:
    """Refuses what could not run here; a cluster's workers have packages of their own."""
    if any(arg.startswith("--runner") and "DaskRunner" in arg for arg in beam_args):
        require("dask", "distributed")
    elif not any(arg.startswith("--runner") for arg in beam_args):
        engine = options.get("engine", "auto")
        if pick_engine(model, engine, needs_keras=needs_keras(options)) == "keras":
            require_keras()


@contextlib.contextmanager
def _naming(folder: str) -> Any:
    """Says which archive a failed run was of, and what to do."""
    try:
        yield
    except beam.BeamError as error:
        raise ArchiveError(
            f"{folder}: transcription stopped ({error}); mend that and run the same command again,"
            " what is done is kept"
        ) from error


def _write_config(
    folder: str,
    num_recordings: int,
    num_shards: int,
    fingerprint: str,
    options: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Writes `archive.json` of a new archive, or compares that of one to be resumed."""
    path = f"{folder}/archive.json"
    config: dict[str, Any] = {"version": VERSION, "model": fingerprint}
    config["options"] = json.loads(json.dumps(options or {}, default=_to_json, sort_keys=True))
    stored = stores.read_json(path)
    if stored is None:
        count = num_shards or max(LEAST_SHARDS, -(-num_recordings // RECORDINGS_PER_SHARD))
        stored = config | {"num_shards": count}
        stores.write_whole(path, json.dumps(stored, indent=1).encode())
    if num_shards:
        config["num_shards"] = num_shards
    if changed := [name for name, value in config.items() if stored.get(name) != value]:
        raise ArchiveError(
            f"{path}: was made with another {' and '.join(changed)}; choose another output folder,"
            " or give what it was made with"
        )
    return stored


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(value)  # a set of programs


def _read_summaries(folder: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(stores.read_json, [f"{folder}/{SUMMARY % name}" for name in names]))
    if None in found:
        missing = SUMMARY % names[found.index(None)]
        raise ArchiveError(f"{folder}/{missing}: was not written; run the same command again")
    return dict(zip(names, found, strict=True))


def _write_manifest(folder: str, config: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Adds the shards' summaries up."""
    written = stores.list_files(f"{folder}/shards", "*-of-*.json")
    names = [file.path.rpartition("/")[2].removesuffix(".json") for file in written]
    summaries = _read_summaries(folder, names)
    now = [summary for summary in summaries.values() if summary["run"] == run]
    failures: collections.Counter[str] = collections.Counter()
    for summary in now:
        failures.update(summary["failures"])
    manifest = {
        "config": dict(config),
        "recordings": sum(summary["recordings"] for summary in summaries.values()),
        "notes": sum(summary["notes"] for summary in summaries.values()),
        "hours": sum(summary["hours"] for summary in summaries.values()),
        "last_run": {
            "transcribed": sum(summary["transcribed"] for summary in now),
            "failed": failures.total(),
            "failures": dict(failures.most_common()),
            "audio_seconds": sum(summary["audio_seconds"] for summary in now),
            "work_seconds": sum(summary["work_seconds"] for summary in now),
        },
        "shards": [
            {
                "recordings": summary["recordings"],
                "notes": summary["notes"],
                "files": [kind % name for kind in (LINES, NOTES, FAILED)],
            }
            for name, summary in summaries.items()
        ],
    }
    stores.write_whole(f"{folder}/manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest
