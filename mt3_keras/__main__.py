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
from typing import IO, Any, NamedTuple

from absl import flags

from mt3_keras.notes import Note

FORMATS = ("mid", "json", "csv", "jsonl", "png")
NOTE_COLUMNS = ("onset", "offset", "pitch", "velocity", "program", "is_drum", "instrument")


class UsageError(ValueError):
    """A command line that cannot be followed."""


class Command(NamedTuple):
    """`define` adds the flags, `run` does the work and returns the exit code."""

    usage: str
    define: Callable[[flags.FlagValues], None]
    run: Callable[[flags.FlagValues, list[str]], int]


def main(argv: Sequence[str]) -> int:
    """Runs a command; returns the exit code: 0 done, 1 something failed, 2 wrong usage."""
    commands = _commands()
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = [
            f"  {name:12} {command.usage.splitlines()[0]}" for name, command in commands.items()
        ]
        print("usage: python -m mt3_keras COMMAND [FLAGS] ...\n")
        print("\n".join(lines))
        print("\npython -m mt3_keras COMMAND --help lists the flags of a command.")
        return 0 if argv else 2
    if argv[0] not in commands:
        return _fail(f"unknown command {argv[0]!r}: use {', '.join(commands)}", 2)
    command = commands[argv[0]]
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string("flagfile", "", "Reads further flags from this file.", flag_values=values)
    command.define(values)
    if any(argument in ("-h", "--help", "-help") for argument in argv[1:]):
        print(f"usage: python -m mt3_keras {argv[0]} {command.usage}\n")
        print(values.get_help(prefix="  ").strip("\n"))
        return 0
    try:
        arguments = values([f"mt3_keras {argv[0]}", *argv[1:]])[1:]
        return command.run(values, arguments)
    except (UsageError, flags.Error) as error:
        return _fail(f"{error}\nSee python -m mt3_keras {argv[0]} --help.", 2)
    except (ValueError, OSError) as error:  # those of the library are one line that says the cure
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("stopped", 130)


def _fail(message: str, code: int) -> int:
    print(f"mt3_keras: {message}", file=sys.stderr)
    return code


def _commands() -> dict[str, Command]:
    return {
        "transcribe": Command(
            "FILE_OR_FOLDER ...   recordings -> MIDI, JSON, CSV, pictures",
            _define_transcribe,
            _run_transcribe,
        ),
        "evaluate": Command(
            "--reference R --estimate E   scores two MIDI files, or two folders of them",
            _define_evaluate,
            _run_evaluate,
        ),
        "convert": Command(
            "--t5x_checkpoint DIR --output DIR   writes the official weights as a preset",
            _define_convert,
            _run_convert,
        ),
        "instruments": Command(
            "  lists the names that transcribe --instruments knows",
            lambda values: None,
            _run_instruments,
        ),
    }


# --- transcribe ---


def _define_transcribe(values: flags.FlagValues) -> None:
    def string(name: str, default: str | None, text: str) -> None:
        flags.DEFINE_string(name, default, text, flag_values=values)

    def boolean(name: str, default: bool, text: str) -> None:
        flags.DEFINE_boolean(name, default, text, flag_values=values)

    def integer(name: str, default: int | None, text: str) -> None:
        flags.DEFINE_integer(name, default, text, lower_bound=1, flag_values=values)

    string("model", None, "A shipped model's name, a preset folder or a T5X checkpoint folder.")
    string(
        "output_dir",
        "out",
        "Where to write; '-' writes the notes to standard output as JSON lines.",
    )
    string("formats", "mid", f"What to write for each recording: of {', '.join(FORMATS)}.")
    boolean("resume", False, "Skip recordings whose outputs are all there.")
    string("instruments", None, "Only these: General MIDI names, classes or numbers, and drums.")
    boolean("constrained", False, "Allow only tokens that are legal where they stand.")
    boolean("stop_runaways", True, "End segments that write on and on without getting ahead.")
    boolean("exact", False, "The original's path to the token; no other decoding flag beside it.")
    flags.DEFINE_enum(
        "context", None, ["segment", "full"],
        "What the last frames of a segment see: zeros, or the audio that follows (default).",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "log_floor", None, ["zero", "clamp"],
        "How silence enters the logarithm; by default as the model says.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "search", "greedy", ["greedy", "beam1"],
        "Greedy, or the original's beam search of one beam with brevity 0.6.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "engine", "auto", ["auto", "keras", "litert"], "What runs the network.", flag_values=values
    )
    integer("batch_size", 16, "Segments decoded side by side.")
    integer("max_tokens", None, "Longest token sequence of a segment; by default the model's own.")
    integer("threads", None, "Processor cores to use; by default all.")
    boolean("progress", True, "Show a progress bar.")


def _run_transcribe(values: flags.FlagValues, arguments: list[str]) -> int:
    from mt3_keras.audio import find_audio

    formats = _parse_formats(values.formats)
    if not arguments:
        raise UsageError("name at least one recording")
    if values.model is None:
        from mt3_keras.presets import shipped_names

        if "small" not in shipped_names():
            raise UsageError(
                "--model is needed: a preset or T5X checkpoint folder "
                "(README: where to get the official weights)"
            )
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
    transcriber = _load_transcriber(values)
    num_failed = 0
    for number, (recording, outputs) in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {recording.name}" if len(jobs) > 1 else recording.name
        try:
            _transcribe_one(transcriber, recording, outputs, label, values)
        except (ValueError, OSError) as error:
            num_failed += 1
            _fail(str(error), 1)
    if num_failed:
        return _fail(f"{num_failed} of {len(jobs)} recordings failed", 1) if len(jobs) > 1 else 1
    return 0


def _parse_formats(text: str) -> list[str]:
    formats = [name.strip().lower() for name in text.split(",") if name.strip()]
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


def _load_transcriber(values: flags.FlagValues) -> Any:
    """Sets up the machine, then loads Keras and the model."""
    limit_threads(values.threads)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # chatter about the build
    options: dict[str, Any] = {"batch_size": values.batch_size, "engine": values.engine}
    if values.exact:
        chosen = [
            n for n in ("context", "log_floor", "instruments", "max_tokens") if values[n].value
        ]
        chosen += [n for n in ("constrained",) if values[n].value]
        chosen += [n for n in ("search",) if values[n].value != "greedy"]
        if chosen:
            raise UsageError(f"--exact is the original's path: drop --{' and --'.join(chosen)}")
        options["exact"] = True
    else:
        from mt3_keras.midi import parse_instruments

        named = parse_instruments(values.instruments) if values.instruments else (None, True)
        from mt3_keras.grammar import Rules

        options["rules"] = Rules(*named, values.constrained, values.stop_runaways)
        options |= {"context": values.context, "method": values.search}
        options |= {"log_floor": values.log_floor, "max_tokens": values.max_tokens}
    from mt3_keras.transcriber import Transcriber

    return Transcriber.from_preset(values.model or "small", **options)


def limit_threads(threads: int | None) -> None:
    """Keeps this process to a number of cores; to be called before TensorFlow is loaded."""
    if threads is None:
        return
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(threads)
    if hasattr(os, "sched_setaffinity"):  # what every backend obeys, where the system has it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _transcribe_one(
    transcriber: Any,
    recording: pathlib.Path,
    outputs: Sequence[pathlib.Path],
    label: str,
    values: flags.FlagValues,
) -> None:
    from mt3_keras.midi import replacing

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
                _write_lines(progress.notes, recording, stream)
            update(progress.end)

        result = transcriber.transcribe(recording, on_segment=on_segment)
    for path in outputs:
        _write(result, recording, path)
    if outputs:
        instruments = len({(n.program, n.is_drum) for n in result.notes})
        print(
            f"{recording.name}: {len(result.notes)} notes, {instruments} instruments -> "
            + ", ".join(map(str, outputs))
        )


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


def _note_record(note: Note) -> dict[str, Any]:
    from mt3_keras.midi import instrument_name

    record = note._asdict()
    record["onset"], record["offset"] = round(note.onset, 3), round(note.offset, 3)
    return {**record, "instrument": instrument_name(note.program, note.is_drum)}


def _write_lines(notes: Sequence[Note], recording: pathlib.Path, stream: IO[str]) -> None:
    for note in notes:
        stream.write(json.dumps({"file": recording.name, **_note_record(note)}) + "\n")
    stream.flush()


def _write(result: Any, recording: pathlib.Path, path: pathlib.Path) -> None:
    """Writes one output of a transcription, by its suffix; JSON lines are written already."""
    from mt3_keras.midi import replacing

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
            "notes": [_note_record(note) for note in result.notes],
            "segments": [segment._asdict() for segment in result.segments],
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n")
    elif path.suffix == ".csv":
        import csv

        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, NOTE_COLUMNS)
            writer.writeheader()
            writer.writerows(_note_record(note) for note in result.notes)


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
    from mt3_keras.metrics import further_scores, mean_scores, transcription_scores
    from mt3_keras.midi import read_midi, replacing

    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}")
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
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}")
    if not values.t5x_checkpoint or not values.output:
        raise UsageError("--t5x_checkpoint and --output are both needed")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from mt3_keras.presets import convert_t5x

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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
