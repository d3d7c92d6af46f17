"""What a worker does to a shard of an archive (see `archive`), and the shard's files."""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import itertools
import json
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mt3_keras import __version__, stores
from mt3_keras.audio import duration, read_blocks
from mt3_keras.beam import Report
from mt3_keras.models.catalog import find_preset, needs_keras, pick_engine
from mt3_keras.note_table import describe_source, note_records, note_schema
from mt3_keras.sections import Section, cut_section, cut_sections, pack, unpack

if TYPE_CHECKING:
    from mt3_keras.recording import Transcription
    from mt3_keras.transcriber import Transcriber

LINES, NOTES, FAILED = "recordings-%s.jsonl", "notes-%s.parquet", "failed-%s.jsonl"
SUMMARY, BEGUN = "shards/%s.json", "shards/%s.begun"
MAX_DEATHS = 3  # of worker processes, in one run, until the recording they were at is given up
KEEP_SECONDS = 60.0  # after so much work on a shard, what is done is written
_engines = threading.local()  # an interpreter is no good for two threads at once


class ArchiveError(ValueError):
    """An archive that cannot be written or resumed; one line that names it and the cure."""


class Shard(NamedTuple):
    """What a worker needs to know of a shard.

    Attributes:
      folder: of the archive.
      name: such as "00003-of-00064".
      run: identifies the run, whose recordings `inputs.json` lists.
      version: of this package; which shard a recording is in must not differ among workers.
      model: see `Transcriber.from_preset`; on every worker.
      fingerprint: of the model's files, which a worker's must have too.
      options: of `Transcriber.from_preset`.
      section_seconds: longer recordings are cut.
      beam_args: Beam's flags, by which files are opened.
    """

    folder: str
    name: str
    run: str
    version: str
    model: str
    fingerprint: str
    options: Mapping[str, Any]
    section_seconds: float
    beam_args: Sequence[str] = ()

    def path(self, kind: str) -> str:
        """Of one of the shard's files, such as `LINES`."""
        return f"{self.folder}/{kind % self.name}"

    def sections_folder(self, recording: str, digest: str) -> str:
        """Of the sections of a recording that is cut, given the digest of its content."""
        return f"{self.folder}/sections/{_identify(recording)}-{digest}"


class Part(NamedTuple):
    """A section of a long recording, for a worker: the folder that holds it, and its number."""

    shard: Shard
    folder: str
    number: int


def shard_of(recording: str, num_shards: int) -> str:
    """The name of the shard that a recording is in, whatever others there are."""
    return f"{int(_identify(recording), 16) % num_shards:05d}-of-{num_shards:05d}"


def list_parts(shard: Shard, waiting: Mapping[str, int]) -> list[Part]:
    """The sections of recordings that wait for them: folder of each -> how many it has."""
    return [
        Part(shard, folder, number) for folder, count in waiting.items() for number in range(count)
    ]


def fingerprint_model(model: str) -> str:
    """SHA-256 digest of a model's files, its card left out."""
    digest, root = hashlib.sha256(), find_preset(model)
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(root)} {content}\n".encode())
    return digest.hexdigest()


_fingerprint_once = functools.cache(fingerprint_model)


def transcribe_shard(shard: Shard) -> Report:
    """Transcribes what is new of a shard's recordings and writes its files."""
    stores.configure(shard.beam_args)
    load_engine(shard)  # without it no recording could be used
    tally, deaths = _Tally(), _Deaths(shard)
    lines = _read_lines(shard)
    before = dict(lines)
    failed, waiting, kept = [], {}, time.monotonic()
    for recording in _read_recordings(shard):
        if time.monotonic() - kept > KEEP_SECONDS:
            stores.write_whole(shard.path(LINES), _to_json_lines(lines))
            kept = time.monotonic()
        began, digest = time.monotonic(), ""
        try:
            deaths.begin(recording)
            with stores.fetch(recording) as (path, digest):
                if recording in lines and lines[recording]["sha256"] == digest:
                    continue
                folder = shard.sections_folder(recording, digest)
                found = _transcribe(shard, path, folder, tally)
                midi = b"" if isinstance(found, int) else _to_midi(shard, found)
        except Exception as error:  # of any kind: it affects this recording only
            failed.append({"recording": recording, "reason": describe_failure(error, recording)})
            tally.fail(failed[-1]["reason"])
            # What was found before stays where the recording cannot be read now.
            if digest and (old := lines.pop(recording, None)):
                stores.remove(f"{shard.folder}/{old['midi']}")
            continue
        finally:
            deaths.end()
        if isinstance(found, int):
            waiting[folder] = found
            continue
        lines[recording] = _write_recording(shard, recording, digest, found, midi)
        stores.remove(folder)
        tally.add(found.duration, time.monotonic() - began)
    _write_shard(shard, lines, lines != before, failed, waiting, tally)
    return tally.report()


def transcribe_part(part: Part) -> Report:
    """Has the network predict a section of a long recording."""
    stores.configure(part.shard.beam_args)
    path = f"{part.folder}/{part.number:05d}"
    plan = stores.read_json(f"{part.folder}/plan.json")
    if plan is None:
        raise ArchiveError(f"{part.folder}: is gone; run the same command again")
    if stores.read_json(f"{path}.json") is None:
        content = stores.read_whole(f"{path}.f32")
        if content is None:
            raise ArchiveError(f"{path}.f32: is gone; run the same command again")
        began, engine = time.monotonic(), load_engine(part.shard)
        first, num_segments, num_before = plan[part.number]
        samples = np.frombuffer(content, np.float32)
        section = Section(first, num_segments, num_before, samples)
        outputs, end = engine.predict(cut_section(section, engine.model_config, engine.context))
        stores.write_whole(f"{path}.npz", pack(outputs))
        values = {"end": end, "work": time.monotonic() - began}
        stores.write_whole(f"{path}.json", json.dumps(values).encode())
    return {"sections": 1}


def load_engine(shard: Shard) -> Transcriber:
    """The transcriber of a shard's model, loaded once in a thread.

    Raises:
      ArchiveError: this worker has another version of the package or of the model.
    """
    own = (__version__, _fingerprint_once(shard.model))
    if own != (shard.version, shard.fingerprint):
        raise ArchiveError(
            f"{shard.model}: a worker's package or model differs from that of the command; give all"
            " workers the same version"
        )
    return engine_of_thread(shard.model, shard.options)


def engine_of_thread(model: str, options: Mapping[str, Any]) -> Transcriber:
    """A transcriber for this thread of a worker, loaded once; on LiteRT it takes one core.

    Args:
      model: see `Transcriber.from_preset`.
      options: of it.
    """
    key = (model, repr(options))
    if getattr(_engines, "key", None) != key:
        from mt3_keras.transcriber import Transcriber

        engine = options.get("engine", "auto")
        engine = pick_engine(model, engine, needs_keras=needs_keras(options))
        one_core = {"threads": 1} if engine == "litert" else {}  # every core has a worker
        _engines.transcriber = Transcriber.from_preset(model, **{**one_core, **options})
        _engines.key = key
    return _engines.transcriber


def describe_failure(error: Exception, recording: str) -> str:
    """One line on why a recording could not be used, without its name."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif not isinstance(error, (ValueError, OSError)):
        text = f"{type(error).__name__}: {text}"
    # A remote recording is read, and named, as a local copy.
    return re.sub(r"^(\S*/)?mt3-\w+(\.\w+)?: ", "", text.removeprefix(f"{recording}: "))


def _transcribe(
    shard: Shard, path: pathlib.Path, folder: str, tally: _Tally
) -> Transcription | int:
    """A recording's notes; the number of its sections in a folder, if it waits for them."""
    seconds, whole = duration(path), 1.1 * shard.section_seconds
    if seconds is None or seconds <= whole:
        return load_engine(shard).transcribe(path)
    plan = stores.read_json(f"{folder}/plan.json")
    if plan is None:
        plan = []
        config = load_engine(shard).model_config
        for section in cut_sections(read_blocks(path), config, shard.section_seconds):
            stores.write_whole(f"{folder}/{len(plan):05d}.f32", section.samples.tobytes())
            plan.append(section[:-1])
        stores.write_whole(f"{folder}/plan.json", json.dumps(plan).encode())
    found = [stores.read_json(f"{folder}/{number:05d}.json") for number in range(len(plan))]
    if None in found:
        return len(plan)
    tally.work_of_sections += sum(values["work"] for values in found)
    outputs = itertools.chain.from_iterable(
        unpack(stores.read_whole(f"{folder}/{number:05d}.npz") or b"")
        for number in range(len(plan))
    )
    return load_engine(shard).read(outputs, found[-1]["end"])


class _Deaths:
    """Gives a recording up at which this run's worker processes were killed too often.

    A damaged file may crash a library or take all memory, and would do so for ever.
    """

    def __init__(self, shard: Shard) -> None:
        self._path, self._run = shard.path(BEGUN), shard.run
        begun = stores.read_json(self._path) or {}
        self._counts: dict[str, int] = (
            begun.get("counts", {}) if begun.get("run") == self._run else {}
        )
        self._recording = ""

    def begin(self, recording: str) -> None:
        """A recording is begun: until `end`, its worker's death is counted."""
        count = self._counts.get(recording, 0)
        if count >= MAX_DEATHS:
            raise ArchiveError(f"its worker process was killed {count} times; is it damaged?")
        self._recording = recording
        counts = self._counts | {recording: count + 1}
        stores.write_whole(self._path, json.dumps({"run": self._run, "counts": counts}).encode())

    def end(self) -> None:
        """The recording is done with; one that is given up stays so for this run."""
        if self._counts.get(self._recording, 0) < MAX_DEATHS:
            self._counts.pop(self._recording, None)


class _Tally:
    """What was done to a shard: audio and time of each recording, failures by reason."""

    work_of_sections = 0.0  # seconds, of other workers

    def __init__(self) -> None:
        self.audio: list[float] = []
        self.work: list[float] = []
        self.failures: collections.Counter[str] = collections.Counter()

    def add(self, audio: float, work: float) -> None:
        self.audio.append(audio)
        self.work.append(work)

    def fail(self, reason: str) -> None:
        self.failures[re.split(r"[;:]| \(", reason)[0]] += 1  # without numbers, names, the cure

    def report(self) -> Report:
        pairs = zip(self.audio, self.work, strict=True)
        return {
            "transcribed": len(self.audio),
            "audio_seconds": [round(seconds) for seconds in self.audio],
            "real_time_factor": [round(audio / max(work, 1e-3)) for audio, work in pairs],
            "failed": self.failures.total(),
            **{f"failed: {kind}": count for kind, count in self.failures.items()},
        }


# --- files ---


def _identify(recording: str) -> str:
    """Twelve hexadecimal digits that stand for a recording's path or address."""
    return hashlib.sha256(recording.encode(errors="surrogateescape")).hexdigest()[:12]


@functools.lru_cache(maxsize=1)
def _read_inputs(folder: str, run: str) -> list[str]:
    inputs = stores.read_json(f"{folder}/inputs.json") or {}
    if inputs.get("run") != run:
        raise ArchiveError(f"{folder}: another run has begun on this archive meanwhile")
    return inputs["recordings"]


def _read_recordings(shard: Shard) -> list[str]:
    count = int(shard.name.rpartition("-")[2])
    given = _read_inputs(shard.folder, shard.run)
    return [recording for recording in given if shard_of(recording, count) == shard.name]


def _read_lines(shard: Shard) -> dict[str, dict[str, Any]]:
    """The recordings that were transcribed before; half a line, as a store may leave, is none."""
    lines = {}
    for text in (stores.read_whole(shard.path(LINES)) or b"").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        lines[line["recording"]] = line
    return lines


def _to_json_lines(lines: Mapping[str, Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(lines[name]) + "\n" for name in sorted(lines)).encode()


def _to_midi(shard: Shard, found: Transcription) -> bytes:
    """The content of a MIDI file."""
    with tempfile.TemporaryDirectory() as temporary:
        written = pathlib.Path(temporary, "notes.mid")
        found.write_midi(written, text=describe_source(shard.model))
        return written.read_bytes()


def _write_recording(
    shard: Shard, recording: str, digest: str, found: Transcription, content: bytes
) -> dict[str, Any]:
    """Writes the MIDI file of a recording; its line."""
    stem = re.sub(r"[^\w.-]+", "_", pathlib.PurePosixPath(recording).stem)[:60]
    midi = f"midi/{shard.name[:5]}/{stem}-{_identify(recording)}.mid"
    stores.write_whole(f"{shard.folder}/{midi}", content)
    return {
        "recording": recording,
        "sha256": digest,
        "duration": found.duration,
        "midi": midi,
        "invalid_events": found.invalid_events,
        "dropped_events": found.dropped_events,
        "notes": note_records(found.notes, found.confidences),
    }


def _write_shard(
    shard: Shard,
    lines: Mapping[str, Mapping[str, Any]],
    is_changed: bool,
    failed: Iterable[Mapping[str, Any]],
    waiting: Mapping[str, int],
    tally: _Tally,
) -> None:
    """Writes the files of a shard, the summary last."""
    stores.write_whole(
        shard.path(FAILED), "".join(json.dumps(failure) + "\n" for failure in failed).encode()
    )
    num_bytes = {kind: _size(shard, kind) for kind in (LINES, NOTES)}
    before = stores.read_json(shard.path(SUMMARY)) or {}
    if is_changed or before.get("num_bytes") != num_bytes:
        contents = {LINES: _to_json_lines(lines), NOTES: _to_parquet(lines)}
        for kind, content in contents.items():
            stores.write_whole(shard.path(kind), content)
            num_bytes[kind] = len(content)
    summary = {
        "run": shard.run,
        "recordings": len(lines),
        "notes": sum(len(line["notes"]) for line in lines.values()),
        "hours": sum(line["duration"] for line in lines.values()) / 3600,
        "num_bytes": num_bytes,
        "waiting": waiting,
        "failures": tally.failures,
        "transcribed": len(tally.audio),
        "audio_seconds": sum(tally.audio),
        "work_seconds": sum(tally.work) + tally.work_of_sections,
    }
    stores.write_whole(shard.path(SUMMARY), json.dumps(summary, indent=1).encode())
    stores.remove(shard.path(BEGUN))


def _size(shard: Shard, kind: str) -> int:
    found = stores.list_files(shard.folder, kind % shard.name)
    return found[0].num_bytes if found else -1


def _to_parquet(lines: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The rows of all notes, ordered by recording and onset."""
    import pyarrow
    from pyarrow import parquet

    rows = [{"recording": name, **note} for name in sorted(lines) for note in lines[name]["notes"]]
    content = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, note_schema()), content)
    return content.getvalue()
