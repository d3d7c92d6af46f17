"""Shows the notes of a recording, or of the microphone, while it plays.

    mt3 stream song.wav --output song.mid
    mt3 stream --bundle edge --microphone

At the end they are written as MIDI. On a terminal each instrument has a line: how many notes it
played and the last of them. Elsewhere each note is a line, as soon as it is certain. Ctrl-C ends a
recording from the microphone.
"""

from __future__ import annotations

import collections
import pathlib
import queue
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from absl import flags

from mt3_keras.cli.command_line import Command, Flags, UsageError
from mt3_keras.cli.model_flags import check_rules, define_rule_flags, parse_rules
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note, describe_notes
from mt3_keras.process import printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mt3_keras.streaming import NewNotes, StreamingTranscriber

BLOCK_SECONDS = 0.1  # transcribed at a time

_Samples: TypeAlias = "NDArray[np.float32]"


def _define_flags(add: Flags) -> None:
    add.text("bundle", "small", "A shipped model's name or a folder with model.tflite.")
    add.text("output", None, "MIDI file to write; by default out/NAME.mid.")
    add.switch("microphone", False, "Transcribe the microphone (needs the package sounddevice).")
    add.switch("realtime", False, "Transcribe a file as fast as it would be played, no faster.")
    add.switch(
        "low_latency", False, "Tell onsets within .4 s, at the cost of names, ends and work."
    )
    add.switch("tie_forcing", False, "Write each segment's tie section from the notes that sound.")
    add.count("threads", None, "Processor cores to use; by default all.")
    define_rule_flags(add)


def _stream(values: flags.FlagValues, arguments: list[str]) -> None:
    from mt3_keras.cli.note_files import pick_midi
    from mt3_keras.midi import write_midi
    from mt3_keras.streaming import StreamingTranscriber

    if len(arguments) != (0 if values.microphone else 1):
        raise UsageError("name one recording, or give --microphone instead")
    recording = pathlib.Path(arguments[0]) if arguments else None
    name = recording.stem if recording else time.strftime("microphone-%Y%m%d-%H%M%S")
    output = pick_midi(values.output, name)
    transcriber = StreamingTranscriber.from_bundle(
        values.bundle,
        num_threads=values.threads,
        low_latency=values.low_latency,
        tie_forcing=values.tie_forcing,
        rules=parse_rules(values),
    )
    check_rules(values, transcriber.model_config)
    blocks = _read(recording, values.realtime) if recording else _listen()
    notes = _transcribe(transcriber, blocks)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_midi(notes, output)
    print(printable(f"{recording or name}: {describe_notes(notes)} -> {output}"))


def _transcribe(transcriber: StreamingTranscriber, blocks: Iterable[_Samples]) -> list[Note]:
    display = _Table() if sys.stdout.isatty() else _List()
    notes: list[Note] = []
    seconds = 0.0
    for block in blocks:
        new = transcriber.push(block)
        seconds += block.size / SAMPLE_RATE_HZ
        display.show(new, seconds)
        notes += new
    new = transcriber.flush()
    display.show(new, seconds)
    return notes + new


# --- sources ---


def _read(path: pathlib.Path, realtime: bool) -> Iterator[_Samples]:
    """A file's blocks, 16 kHz mono; with `realtime` none before it would have been played."""
    from mt3_keras.audio import read_blocks

    start, num_samples = time.monotonic(), 0
    for block in read_blocks(path, BLOCK_SECONDS):
        num_samples += block.size
        if realtime:
            played = start + num_samples / SAMPLE_RATE_HZ
            time.sleep(max(0.0, played - time.monotonic()))
        yield block


def _listen() -> Iterator[_Samples]:
    """The microphone's blocks, 16 kHz mono, until Ctrl-C or until it is taken away.

    Raises:
      ValueError: sounddevice is missing, or there is no microphone.
    """
    try:
        import sounddevice
        import soxr
    except (ImportError, OSError) as error:  # OSError: it finds no PortAudio
        raise ValueError(
            f"--microphone needs the packages sounddevice and soxr, and PortAudio ({error})"
        ) from error
    import numpy as np

    blocks: queue.SimpleQueue[_Samples | None] = queue.SimpleQueue()

    def record(samples: NDArray[np.float32], *_: Any) -> None:
        blocks.put(samples[:, 0].copy())

    def stop(*_: Any) -> None:
        blocks.put(None)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # for the impatient

    try:
        rate = sounddevice.query_devices(kind="input")["default_samplerate"]
        microphone = sounddevice.InputStream(
            samplerate=rate,
            blocksize=round(BLOCK_SECONDS * rate),
            channels=1,
            dtype="float32",
            callback=record,
            finished_callback=lambda: blocks.put(None),
        )
        resampler = soxr.ResampleStream(rate, SAMPLE_RATE_HZ, 1, "float32", "HQ")
        before = signal.signal(signal.SIGINT, stop)
        try:
            with microphone:
                print("listening; Ctrl-C ends the recording", file=sys.stderr)
                while (block := blocks.get()) is not None:
                    yield resampler.resample_chunk(block)
        finally:
            signal.signal(signal.SIGINT, before)
    except sounddevice.PortAudioError as error:
        raise ValueError(f"the microphone cannot be used: {error}; see your settings") from error
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


# --- display ---


class _List:
    """A line for each note, in the order in which they become certain."""

    def show(self, new: NewNotes, _: float) -> None:
        for note in new:
            times = f"{note.onset:9.2f} {note.offset:9.2f}"
            print(f"{times}  {_pitch(note):18}  {_instrument(note)}", flush=True)


class _Table:
    """A line for each instrument, updated in place: the number of its notes, the last of them."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._last: dict[str, collections.deque[str]] = {}
        self._begun: set[tuple[float, int, int]] = set()
        self._num_shown = 0

    def show(self, new: NewNotes, seconds: float) -> None:
        for on in new.started:
            self._begun.add((on.onset, on.pitch, on.program))
            self._add(Note(on.onset, on.onset, on.pitch, on.velocity, on.program, False))
        for note in new:
            key = (note.onset, note.pitch, note.program)
            if note.is_drum or key not in self._begun:
                self._add(note)
            else:
                self._begun.remove(key)
        self._draw(seconds)

    def _add(self, note: Note) -> None:
        name = _instrument(note)
        self._counts[name] += 1
        self._last.setdefault(name, collections.deque(maxlen=32)).append(_pitch(note))

    def _draw(self, seconds: float) -> None:
        columns, rows = shutil.get_terminal_size()
        lines = [f"{seconds:7.1f} s {self._counts.total():6} notes"]
        for name, count in sorted(self._counts.items()):
            last = " ".join(self._last[name])
            lines.append(f"{name[:24]:24} {count:6}  {last[-max(1, columns - 35) :]}")
        lines = [line[: columns - 1] for line in lines[: rows - 1]]
        up = f"\x1b[{self._num_shown}A" if self._num_shown else ""
        print(up + "".join(f"\x1b[2K{line}\n" for line in lines), end="", flush=True)
        self._num_shown = len(lines)


def _instrument(note: Note) -> str:
    from mt3_keras.instrument_names import instrument_name

    return instrument_name(note.program, note.is_drum)


def _pitch(note: Note) -> str:
    import pretty_midi

    if note.is_drum:
        return pretty_midi.note_number_to_drum_name(note.pitch) or str(note.pitch)
    return str(pretty_midi.note_number_to_name(note.pitch))


COMMAND = Command(
    "RECORDING | --microphone [FLAGS]", __doc__, _define_flags, _stream, takes_arguments=True
)
