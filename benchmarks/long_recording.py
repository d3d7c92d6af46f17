"""Memory while a recording of many hours is transcribed, at ten points and when it ends.

    python -m benchmarks.long_recording --hours 10 [--recording examples/band.flac]

The recording is repeated until it is that long, in a WAV file on disk (115 MB an hour). --replay
asks the network once for each segment of the first minutes and repeats its answers: that takes a
tenth of the time, and leaves out what the network itself may keep.
"""

from __future__ import annotations

import itertools
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from mt3_keras.cli.command_line import Command, Flags, run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mt3_keras.outputs import Output
    from mt3_keras.recording import Progress
    from mt3_keras.segments import AudioSegment

NUM_POINTS = 10
NUM_REPLAYED = 50  # segments; those of examples/band.flac come round after five
MB = 1e6


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.long_recording", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.number("hours", 10.0, "Length.", least=0.01)
    add.text("recording", "examples/band.flac", "What is repeated.")
    add.text("model", "small", "A model for LiteRT.")
    add.switch("replay", False, "Repeat the network's first answers.")


def _measure(values: flags.FlagValues, _: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "long.wav")
        seconds = write_repeated(pathlib.Path(values.recording), path, 3600 * values.hours)
        points, num_notes, spent = measure(path, seconds, values.model, values.replay)
    spread = max(points) / min(points) - 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"spread {spread:.1%}; {num_notes} notes; at most {peak / MB:.0f} MB, MIDI written;"
        f" {spent:.0f} s of processor time"
    )


def write_repeated(recording: pathlib.Path, path: pathlib.Path, seconds: float) -> float:
    """Writes a recording over and over into a WAV file; returns its length in seconds."""
    import soundfile

    samples, rate = soundfile.read(recording, dtype="int16", always_2d=True)
    times = max(1, round(seconds * rate / len(samples)))
    with soundfile.SoundFile(path, "w", rate, samples.shape[1], "PCM_16") as file:
        for _ in range(times):
            file.write(samples)
    return float(times * len(samples) / rate)


class Replayed:
    """An engine whose answers come round; it draws segments one by one, as any does."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.model_config = engine, engine.model_config

    def run(self, segments: Iterable[AudioSegment]) -> Iterator[tuple[int, Output]]:
        """Yields (index, output) in order."""
        numbered = enumerate(segments)
        first = [segment for _, segment in itertools.islice(numbered, NUM_REPLAYED)]
        answers = dict(self._engine.run(iter(first)))
        yield from sorted(answers.items())
        for index, _ in numbered:
            yield index, answers[index % NUM_REPLAYED]


def measure(
    path: pathlib.Path, seconds: float, model: str, replay: bool
) -> tuple[list[int], int, float]:
    """Bytes resident after each tenth of a recording, its notes, seconds of processor time."""
    from mt3_keras.transcriber import Transcriber

    points: list[int] = []

    def watch(progress: Progress) -> None:
        # The last one is a minute before the end: the last segment has all notes named.
        if progress.end >= (seconds - 60) * (len(points) + 1) / NUM_POINTS:
            points.append(resident_bytes())
            print(f"{progress.end / 3600:6.2f} h: {points[-1] / MB:.1f} MB", flush=True)

    start = time.process_time()
    transcriber = Transcriber.from_preset(model, engine="litert")
    if replay:
        transcriber._engine = Replayed(transcriber._engine)
    result = transcriber.transcribe(path, on_segment=watch)
    print(f"  the end: {resident_bytes() / MB:.1f} MB", flush=True)
    result.write_midi(path.with_suffix(".mid"))
    return points, len(result.notes), time.process_time() - start


def resident_bytes() -> int:
    """Memory of this process."""
    fields = pathlib.Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


COMMAND = Command("[FLAGS]", __doc__, _define_flags, _measure)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
