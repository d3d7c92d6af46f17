"""Writes the notes of recordings as MIDI, tables, pictures, scores and sound.

Recordings are files, folders and patterns; folders keep their shape in --output_dir; - is a
recording on standard input, whose outputs are named standard_input. What cannot be read is named
and the rest is transcribed; the exit code is then 1. With --stems a recording is a folder that
holds a song's instruments in a file each, and becomes one MIDI file.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, NamedTuple

from absl import flags

from mt3_keras.cli.archive import define_list_flag
from mt3_keras.cli.command_line import (
    Command,
    Flags,
    UsageError,
    check_names,
    complain,
    describe_error,
)
from mt3_keras.cli.model_flags import DEFAULT_MODEL, define_model_flags, load_transcriber
from mt3_keras.files import open_regular, read_label, replacing, set_label
from mt3_keras.process import OutputClosed, printable, saved_input

if TYPE_CHECKING:
    from mt3_keras.beats import Beats
    from mt3_keras.recording import Progress, Transcription
    from mt3_keras.transcriber import Transcriber

TEMPOS = (20, 400)  # beats a minute that may be asked for
FORMATS = (
    *("mid", "json", "csv", "jsonl", "musicxml", "svg", "pdf"),
    *("png", "roll.svg", "roll.pdf", "wav"),
)
NEED_BEATS = frozenset(FORMATS) - {"csv", "jsonl", "wav"}


class Job(NamedTuple):
    """A recording and the files to write; none means JSON lines on standard output."""

    recording: pathlib.Path
    outputs: Sequence[pathlib.Path]


def _define_flags(add: Flags) -> None:
    define_model_flags(add)
    add.text(
        "output_dir",
        "out",
        "Where to write; '-' writes the notes to standard output as JSON lines.",
    )
    add.texts(
        "stems",
        [],
        "Folder of one song's separated stems, as drums.wav, bass.wav ...; may be given repeatedly,"
        " in the place of recordings.",
    )
    add.names("formats", ["mid"], f"Files to write: of {', '.join(FORMATS)}.")
    define_list_flag(add)
    add.text(
        "shard",
        None,
        "Such as 3/100: only every 100th recording, from the third; for several machines.",
    )
    add.text(
        "beats",
        "auto",
        "Beats and bars of MIDI files and scores: auto finds them in the notes, off writes none;"
        " or a constant tempo in beats a minute.",
    )
    add.switch(
        "compare", False, "In WAV files, put the recording on the left and the notes on the right."
    )
    add.text(
        "font", "", "Soundfont of WAV files, sf2 or sf3; by default the system's General MIDI one."
    )
    add.switch("resume", False, "Skip recordings whose outputs are all there.")
    add.switch("progress", True, "Show a progress bar.")


def _transcribe(values: flags.FlagValues, arguments: list[str]) -> int:
    if "-" not in arguments:
        return _transcribe_files(values, arguments)
    with saved_input() as recording:
        names = [str(recording) if name == "-" else name for name in arguments]
        return _transcribe_files(values, names)


def _transcribe_files(values: flags.FlagValues, arguments: list[str]) -> int:
    from mt3_keras.audio import find_audio
    from mt3_keras.engraving import check_packages

    formats = _parse_formats(values.formats)
    if values.files:
        from mt3_keras.stores import read_list

        arguments = [*arguments, *read_list(values.files)]
    parse_beats(values.beats)
    check_packages([f".{name}" for name in formats])
    _check_sound(values, formats)
    if values.stems:
        _check_stem_flags(values, arguments, formats)
        songs = map(pathlib.Path, values.stems)
        recordings = [song if song.name.strip(".") else song.resolve() for song in songs]
    elif arguments:
        recordings = find_audio(arguments)
    else:
        raise UsageError("name at least one recording")
    recordings = _take_shard(recordings, values.shard)
    if not recordings:
        print(f"no recording is in --shard {values.shard}", file=sys.stderr)
        return 0
    if values.output_dir == "-":
        jobs = [Job(recording, ()) for recording in recordings]
    else:
        jobs = plan_outputs(recordings, arguments, values.output_dir, formats)
    if values.resume:
        jobs = [job for job in jobs if not _is_done(job)]
        if not jobs:
            print("all done before", file=sys.stderr)
            return 0
    num_failed = _transcribe_all(load_transcriber(values), jobs, values)
    if num_failed and len(jobs) > 1:
        complain("mt3", f"{num_failed} of {len(jobs)} recordings failed", 1)
    return 1 if num_failed else 0


def _take_shard(recordings: list[pathlib.Path], shard: str | None) -> list[pathlib.Path]:
    if shard is None:
        return recordings
    number, slash, count = shard.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--shard must be K/N with K from 1 to N, such as 3/100: got {shard!r}")
    return recordings[int(number) - 1 :: int(count)]


def parse_beats(text: str) -> float | None:
    """What --beats asks for: None to find beats, 0 for none, or beats a minute.

    Raises:
      UsageError: it is none of these.
    """
    if text in ("auto", "off"):
        return 0.0 if text == "off" else None
    try:
        tempo = float(text)
    except ValueError:
        tempo = math.nan
    low, high = TEMPOS
    if not low <= tempo <= high:
        raise UsageError(f"--beats is auto, off or {low} to {high} beats a minute: got {text!r}")
    return tempo


def _check_stem_flags(
    values: flags.FlagValues, arguments: Sequence[str], formats: Sequence[str]
) -> None:
    """Refuses what has no meaning for songs in stems."""
    if arguments:
        raise UsageError(f"--stems stands in the place of recordings: drop {arguments[0]}")
    if values.output_dir == "-" or "jsonl" in formats:
        raise UsageError("notes of stems are put together at the end: JSON lines are not written")
    if values.exact:
        raise UsageError("--exact is the original's path, for mixes: drop --stems")


def _parse_formats(names: Sequence[str]) -> list[str]:
    formats = [name.strip().lower() for name in names if name.strip()]
    check_names("formats", formats, FORMATS)
    if not formats:
        raise UsageError(f"name at least one format of {', '.join(FORMATS)}")
    return formats


def _check_sound(values: flags.FlagValues, formats: Sequence[str]) -> None:
    """Refuses WAV files that could not be written, and flags that only they have."""
    if "wav" in formats and values.output_dir != "-":
        from mt3_keras.synth.listen import find_font

        find_font(values.font)
    elif values.compare or values.font:
        flag = "--compare" if values.compare else "--font"
        raise UsageError(f"{flag} is for WAV files: add wav to --formats")


def plan_outputs(
    recordings: Sequence[pathlib.Path],
    arguments: Sequence[str],
    output_dir: str,
    formats: Sequence[str],
) -> list[Job]:
    """The files to write for each recording: folders keep their shape, no two share a name.

    Args:
      recordings: what `find_audio` found.
      arguments: what it was given.
      output_dir: made with all folders in it that are needed.
      formats: suffixes of the files, of `FORMATS`.

    Raises:
      UsageError: a file would be written twice or in the place of a recording, or the folder
        cannot be written to.
    """
    root = pathlib.Path(output_dir)
    folders = {pathlib.Path(a) for a in arguments if pathlib.Path(a).is_dir()}
    stems = []
    for recording in recordings:
        home = next((f for f in recording.parents if f in folders), recording.parent)
        # "...wav" without its suffix would be the folder above, and folders have no suffix.
        has_suffix = recording.stem.strip(".") and not recording.is_dir()
        name = recording.stem if has_suffix else recording.name
        stems.append(root / recording.relative_to(home).with_name(name))
    counts = collections.Counter(stems)
    jobs = []
    for recording, stem in zip(recordings, stems, strict=True):
        # song.wav and song.mp3: keep the suffix, so that each has its own output.
        name = recording.name if counts[stem] > 1 else stem.name
        jobs.append(Job(recording, [stem.with_name(f"{name}.{f}") for f in formats]))
    written = collections.Counter(path for job in jobs for path in job.outputs)
    if twice := next((path for path, count in written.items() if count > 1), None):
        raise UsageError(f"{twice} would be written twice: rename a recording or run them apart")
    sources = {recording.resolve() for recording in recordings}
    if own := next((path for path in written if path.resolve() in sources), None):
        raise UsageError(
            f"{own} is a recording and would be overwritten: choose another --output_dir"
        )
    for folder in sorted({path.parent for path in written}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be made ({error.strerror})") from error
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{folder}: no permission to write; choose another --output_dir")
    return jobs


def _identify(recording: pathlib.Path) -> tuple[str, str]:
    """What tells a recording apart: digests of its content and of its place."""
    content = hashlib.sha256()
    is_song = recording.is_dir()
    for path in sorted(recording.iterdir()) if is_song else [recording]:
        if is_song and not path.is_file():
            continue
        with open_regular(path, ValueError) as file:
            while block := file.read(2**20):
                content.update(block)
    return content.hexdigest(), hashlib.sha256(os.fsencode(recording.resolve())).hexdigest()


def _read_sources(job: Job) -> list[list[str]]:
    """Of the outputs that are there, what `_identify` said of the recording they are of.

    Files without a label, such as copies, may be of any.
    """
    labels = [read_label(path) for path in job.outputs]
    return [label.split() for label in labels if label]


def _is_done(job: Job) -> bool:
    if not job.outputs or not all(path.exists() for path in job.outputs):
        return False
    sources = _read_sources(job)
    return not sources or {content for content, _ in sources} == {_identify(job.recording)[0]}


def _check_outputs(job: Job) -> None:
    """Refuses to put a recording's result in the place of another's."""
    if sources := _read_sources(job):
        content, place = _identify(job.recording)
        if any(content != source[0] and place != source[1] for source in sources):
            raise ValueError(
                f"{job.outputs[0]}: is the result of another recording than {job.recording};"
                " remove it or choose another --output_dir"
            )


def _transcribe_all(transcriber: Transcriber, jobs: Sequence[Job], values: flags.FlagValues) -> int:
    """Transcribes one after the other; returns how many failed."""
    transcribe: Callable[..., Transcription] = transcriber.transcribe
    if values.stems:
        from mt3_keras.stems import StemTranscriber

        transcribe = StemTranscriber(transcriber).transcribe
    num_failed = 0
    for number, job in enumerate(jobs, 1):
        place = f"[{number}/{len(jobs)}] " if len(jobs) > 1 else ""
        try:
            _transcribe_one(transcribe, job, f"{place}{job.recording.name}", values)
        except OutputClosed:
            raise
        except Exception as error:
            if values.debug:
                raise
            num_failed += 1
            line = describe_error(error)
            named = any(str(path) in line for path in (job.recording, *job.outputs))
            complain("mt3", line if named else f"{job.recording}: {line}", 1)
    return num_failed


def _transcribe_one(
    transcribe: Callable[..., Transcription], job: Job, label: str, values: flags.FlagValues
) -> None:
    from mt3_keras.cli.note_files import write_lines, write_notes, write_wav
    from mt3_keras.note_table import describe_source
    from mt3_keras.notes import describe_notes

    _check_outputs(job)
    lines = next((path for path in job.outputs if path.suffix == ".jsonl"), None)
    with contextlib.ExitStack() as stack:
        stream: IO[str] | None = None
        if not job.outputs:
            stream = sys.stdout
        elif lines is not None:
            stream = stack.enter_context(stack.enter_context(replacing(lines)).open("w"))
        update = stack.enter_context(_progress_bar(job.recording, label, values.progress))

        def write(progress: Progress) -> None:
            assert stream
            write_lines(progress, job.recording, stream)
            if stream is sys.stdout and getattr(stream, "is_closed", False):
                raise OutputClosed

        result = transcribe(job.recording, on_segment=write if stream else None, on_progress=update)
    beats = None
    if any(name in NEED_BEATS for name in _parse_formats(values.formats)):
        beats = _find_beats(result, parse_beats(values.beats))
    source = describe_source(values.model or DEFAULT_MODEL)
    for path in job.outputs:
        if path.suffix == ".wav":
            write_wav(result, job.recording, path, values.font, values.compare)
        elif path != lines:
            write_notes(result, job.recording, path, beats, source)
    if job.outputs:
        with contextlib.suppress(ValueError, OSError):  # gone meanwhile: no label
            source = " ".join(_identify(job.recording))
            for path in job.outputs:
                set_label(path, source)
        written = ", ".join(map(str, job.outputs))
        print(printable(f"{job.recording.name}: {describe_notes(result.notes)} -> {written}"))


def _find_beats(result: Transcription, tempo: float | None) -> Beats | None:
    """The beats that `parse_beats` says are wanted."""
    if tempo is None:
        return result.beats
    from mt3_keras.beat_tracker import track_beats

    return track_beats(result.notes, beats_per_minute=tempo) if tempo else None


@contextlib.contextmanager
def _progress_bar(
    recording: pathlib.Path, label: str, is_wanted: bool
) -> Iterator[Callable[[float], None]]:
    """Gives update(seconds of audio done); the bar shows the speed relative to real time."""
    from tqdm import tqdm

    from mt3_keras.audio import duration

    total = None if recording.is_dir() else duration(recording)
    start = time.monotonic()
    layout = (
        "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
    )
    if total is None:
        layout = "{desc} {n:.0f} s [{elapsed}{postfix}]"
    with tqdm(
        total=total,
        desc=printable(label),
        bar_format=layout,
        disable=None if is_wanted else True,
        leave=False,
    ) as bar:

        def update(seconds: float) -> None:
            speed = seconds / max(time.monotonic() - start, 1e-6)
            bar.set_postfix_str(f"{speed:.1f}x real time", refresh=False)
            bar.update(min(seconds, total or seconds) - bar.n)

        yield update


COMMAND = Command("FILE_OR_FOLDER ... [FLAGS]", __doc__, _define_flags, _transcribe, True)
