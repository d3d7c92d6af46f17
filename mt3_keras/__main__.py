"""The command line: python -m mt3_keras transcribe | evaluate | convert | instruments.

Every command answers --help at once; TensorFlow is loaded only when a model is.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from absl import flags

from mt3_keras.cli.command_line import (
    Command,
    UsageError,
    complain,
    define_model_flags,
    load_keras,
    load_transcriber,
    run,
)

FORMATS = ("mid", "json", "csv", "jsonl", "png")
NOTE_COLUMNS = (
    "onset",
    "offset",
    "pitch",
    "velocity",
    "program",
    "is_drum",
    "instrument",
    "confidence",
)


def main(argv: Sequence[str]) -> int:
    """Runs a command; returns the exit code (see `mt3_keras.cli.command_line.run`)."""
    return run("mt3_keras", COMMANDS, argv)


# --- transcribe ---


def _define_transcribe(values: flags.FlagValues) -> None:
    define_model_flags(values)
    flags.DEFINE_string(
        "output_dir",
        "out",
        "Where to write; '-' writes the notes to standard output as JSON lines.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "formats",
        ["mid"],
        f"What to write for each recording: of {', '.join(FORMATS)}.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "resume", False, "Skip recordings whose outputs are all there.", flag_values=values
    )
    flags.DEFINE_boolean("progress", True, "Show a progress bar.", flag_values=values)


def _run_transcribe(values: flags.FlagValues, arguments: list[str]) -> int:
    from mt3_keras.audio import find_audio

    formats = _parse_formats(values.formats)
    if not arguments:
        raise UsageError("name at least one recording")
    recordings = find_audio(arguments)
    if not recordings:
        raise UsageError("no recordings found in what was named")
    use_stdout = values.output_dir == "-"
    jobs = [] if use_stdout else _plan_outputs(recordings, arguments, values.output_dir, formats)
    if use_stdout:
        jobs = [(recording, []) for recording in recordings]
    if values.resume:
        jobs = [job for job in jobs if not (job[1] and all(path.exists() for path in job[1]))]
        if not jobs:
            print("all done before", file=sys.stderr)
            return 0
    transcriber = load_transcriber(values)
    num_failed = 0
    for number, (recording, outputs) in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {recording.name}" if len(jobs) > 1 else recording.name
        try:
            _transcribe_one(transcriber, recording, outputs, label, values)
        except BrokenPipeError:  # nobody reads standard output any more
            raise
        except (ValueError, OSError) as error:
            num_failed += 1
            complain("mt3_keras", str(error), 1)
    if num_failed:
        if len(jobs) > 1:
            complain("mt3_keras", f"{num_failed} of {len(jobs)} recordings failed", 1)
        return 1
    return 0


def _parse_formats(names: Sequence[str]) -> list[str]:
    formats = [name.strip().lower() for name in names if name.strip()]
    if unknown := [name for name in formats if name not in FORMATS]:
        raise UsageError(f"unknown format {unknown[0]!r}: use {', '.join(FORMATS)}")
    if not formats:
        raise UsageError(f"name at least one format of {', '.join(FORMATS)}")
    return formats


def _plan_outputs(
    recordings: Sequence[pathlib.Path],
    arguments: Sequence[str],
    output_dir: str,
    formats: Sequence[str],
) -> list[tuple[pathlib.Path, list[pathlib.Path]]]:
    """The files to write for each recording: folders keep their shape, no two share a name."""
    root = pathlib.Path(output_dir)
    folders = [pathlib.Path(a) for a in arguments if pathlib.Path(a).is_dir()]
    stems = []
    for recording in recordings:
        home = next((f for f in folders if f in recording.parents), recording.parent)
        stems.append(root / recording.relative_to(home).with_suffix(""))
    jobs = []
    for recording, stem in zip(recordings, stems, strict=True):
        # song.wav and song.mp3: keep the suffix, so that each has its own output.
        name = stem.with_name(recording.name) if stems.count(stem) > 1 else stem
        jobs.append((recording, [name.with_name(f"{name.name}.{f}") for f in formats]))
    written = [path for _, paths in jobs for path in paths]
    if len(set(written)) < len(written):
        twice = next(path for path in written if written.count(path) > 1)
        raise UsageError(f"{twice} would be written twice: rename a recording or run them apart")
    for folder in sorted({path.parent for path in written}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be made ({error.strerror})") from error
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{folder}: no permission to write; choose another --output_dir")
    return jobs


def _transcribe_one(
    transcriber: Any,
    recording: pathlib.Path,
    outputs: Sequence[pathlib.Path],
    label: str,
    values: flags.FlagValues,
) -> None:
    from mt3_keras.files import replacing
    from mt3_keras.notes import describe_notes

    lines = next((path for path in outputs if path.suffix == ".jsonl"), None)
    with contextlib.ExitStack() as stack:
        stream: IO[str] | None = None
        if not outputs:
            stream = sys.stdout
        elif lines is not None:
            stream = stack.enter_context(stack.enter_context(replacing(lines)).open("w"))
        update = stack.enter_context(_progress_bar(recording, label, values.progress))

        def on_segment(progress: Any) -> None:
            if stream:
                _write_lines(progress, recording, stream)
            update(progress.end)

        result = transcriber.transcribe(recording, on_segment=on_segment)
    for path in outputs:
        _write(result, recording, path)
    if outputs:
        written = ", ".join(map(str, outputs))
        print(f"{recording.name}: {describe_notes(result.notes)} -> {written}")


@contextlib.contextmanager
def _progress_bar(
    recording: pathlib.Path, label: str, is_wanted: bool
) -> Iterator[Callable[[float], None]]:
    """Gives update(seconds of audio done); the bar shows how much faster than real time it goes."""
    from tqdm import tqdm

    from mt3_keras.audio import duration

    total = duration(recording)
    start = time.monotonic()
    layout = (
        "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
    )
    if total is None:
        layout = "{desc} {n:.0f} s [{elapsed}{postfix}]"
    with tqdm(
        total=total, desc=label, bar_format=layout, disable=None if is_wanted else True, leave=False
    ) as bar:

        def update(seconds: float) -> None:
            speed = seconds / max(time.monotonic() - start, 1e-6)
            bar.set_postfix_str(f"{speed:.1f}x real time", refresh=False)
            bar.update(min(seconds, total or seconds) - bar.n)

        yield update


def _note_records(told: Any) -> list[dict[str, Any]]:
    """Notes of a `Transcription` or `Progress`, ready to be written."""
    from mt3_keras.midi import instrument_name

    records = []
    for note in told.notes:
        confidence = told.confidences.get(note)
        records.append(
            {
                **note._asdict(),
                "onset": round(note.onset, 3),
                "offset": round(note.offset, 3),
                "instrument": instrument_name(note.program, note.is_drum),
                "confidence": None if confidence is None else round(confidence, 3),
            }
        )
    return records


def _write_lines(progress: Any, recording: pathlib.Path, stream: IO[str]) -> None:
    for record in _note_records(progress):
        stream.write(json.dumps({"file": recording.name, **record}) + "\n")
    stream.flush()


def _write(result: Any, recording: pathlib.Path, path: pathlib.Path) -> None:
    """Writes one output of a transcription, by its suffix; JSON lines are written already."""
    from mt3_keras.files import replacing

    if path.suffix == ".mid":
        result.write_midi(path)
    elif path.suffix == ".png":
        from mt3_keras.plots import plot_piano_roll

        plot_piano_roll(result.notes, path, title=recording.name, duration=result.duration)
    elif path.suffix == ".json":
        content = {
            "file": recording.name,
            "duration": result.duration,
            "invalid_events": result.invalid_events,
            "dropped_events": result.dropped_events,
            "notes": _note_records(result),
            "segments": [segment._asdict() for segment in result.segments],
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n")
    elif path.suffix == ".csv":
        import csv

        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, NOTE_COLUMNS)
            writer.writeheader()
            writer.writerows(_note_records(result))


# --- evaluate ---


def _define_evaluate(values: flags.FlagValues) -> None:
    flags.DEFINE_string("reference", None, "MIDI file or folder: the truth.", flag_values=values)
    flags.DEFINE_string("estimate", None, "MIDI file or folder: to be scored.", flag_values=values)
    flags.DEFINE_string("json", None, "Also write all scores to this file.", flag_values=values)
    flags.DEFINE_boolean("all", False, "Print every score, not the main ones.", flag_values=values)


MAIN_SCORES = (
    "Onset F1",
    "Onset + offset F1",
    "Frame F1",
    "Onset + offset + program F1 (full)",
    "Onset + offset + program F1 (midi_class)",
    "Drum onset F1 (full)",
)


def _run_evaluate(values: flags.FlagValues, arguments: list[str]) -> int:
    from mt3_keras.files import replacing
    from mt3_keras.metrics import further_scores, mean_scores, transcription_scores
    from mt3_keras.midi import read_midi

    if not values.reference or not values.estimate:
        raise UsageError("--reference and --estimate are both needed")
    scores = {}
    for name, reference, estimate in _pair_files(values.reference, values.estimate):
        notes = read_midi(reference), read_midi(estimate)
        scores[name] = {**transcription_scores(*notes), **further_scores(*notes)}
    mean = mean_scores(scores.values())
    for name, result in scores.items():
        if len(scores) > 1:
            print("  ".join(f"{key} {result.get(key, 0.0):.3f}" for key in MAIN_SCORES[:3]), name)
    if len(scores) > 1:
        print(f"mean of {len(scores)}:")
    for key in mean if values.all else MAIN_SCORES:
        print(f"{key:45} {mean.get(key, 0.0):.4f}")
    if values.json:
        with replacing(values.json) as temporary:
            temporary.write_text(json.dumps({"items": scores, "mean": mean}, indent=1) + "\n")
    return 0


def _pair_files(reference: str, estimate: str) -> list[tuple[str, pathlib.Path, pathlib.Path]]:
    """Two files, or the files of the same name in two folders."""
    first, second = pathlib.Path(reference), pathlib.Path(estimate)
    if first.is_dir() != second.is_dir():
        raise UsageError("--reference and --estimate must be two files or two folders")
    if not first.is_dir():
        return [(first.name, first, second)]
    suffixes = (".mid", ".midi")
    estimates = {path.stem: path for path in second.iterdir() if path.suffix.lower() in suffixes}
    references = sorted(path for path in first.iterdir() if path.suffix.lower() in suffixes)
    if not references:
        raise UsageError(f"{first}: holds no MIDI files")
    if missing := [path.name for path in references if path.stem not in estimates]:
        raise UsageError(f"{second}: no estimate for {missing[0]} ({len(missing)} are missing)")
    return [(path.stem, path, estimates[path.stem]) for path in references]


# --- convert, instruments ---


def _define_convert(values: flags.FlagValues) -> None:
    flags.DEFINE_string("t5x_checkpoint", None, "Folder of the checkpoint.", flag_values=values)
    flags.DEFINE_string("output", None, "Preset folder to write.", flag_values=values)


def _run_convert(values: flags.FlagValues, arguments: list[str]) -> int:
    if not values.t5x_checkpoint or not values.output:
        raise UsageError("--t5x_checkpoint and --output are both needed")
    from mt3_keras.models.loading import convert_t5x

    load_keras()
    convert_t5x(values.t5x_checkpoint, values.output)
    print(f"wrote {values.output}")
    return 0


def _run_instruments(values: flags.FlagValues, arguments: list[str]) -> int:
    import pretty_midi

    from mt3_keras.midi import instrument_name

    for program in range(128):
        if program % 8 == 0:
            print(pretty_midi.program_to_instrument_class(program))
        print(f"  {program:3} {instrument_name(program, False)}")
    print("Drums")
    return 0


COMMANDS = {
    "transcribe": Command(
        "FILE_OR_FOLDER ... [FLAGS]",
        "Recordings -> MIDI, JSON, CSV, pictures.",
        _define_transcribe,
        _run_transcribe,
        takes_arguments=True,
    ),
    "evaluate": Command(
        "--reference R --estimate E",
        "Scores two MIDI files, or two folders of them.",
        _define_evaluate,
        _run_evaluate,
    ),
    "convert": Command(
        "--t5x_checkpoint DIR --output DIR",
        "Writes the official weights as a preset.",
        _define_convert,
        _run_convert,
    ),
    "instruments": Command(
        "",
        "Lists the names that transcribe --instruments knows.",
        lambda values: None,
        _run_instruments,
    ),
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
