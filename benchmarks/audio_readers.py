"""Reading many sound files for training: tensorflow-io in a `tf.data` pipeline beside soundfile.

    .venv-tfio/bin/python -m benchmarks.audio_readers --files 1000

Files of --seconds of music-like sound in each format are written, and read as training reads them,
to 16 kHz mono: by `train.audio_files` (--reader=tfio) and by `mt3_keras.audio` (train.prepare), one
after the other in one process, twice; the second time counts.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from mt3_keras.cli.command_line import Command, Flags, run
from mt3_keras.extras import require

if TYPE_CHECKING:
    from mt3_keras.data.example import Example

# Name -> suffix, rate in Hz and what soundfile calls its coding.
FORMATS = {
    "FLAC 16 kHz": (".flac", 16_000, "PCM_16"),
    "FLAC 44.1 kHz": (".flac", 44_100, "PCM_16"),
    "MP3 44.1 kHz": (".mp3", 44_100, "MPEG_LAYER_III"),
    "OGG 44.1 kHz": (".ogg", 44_100, "VORBIS"),
}


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.audio_readers", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.count("files", 1000, "Of each format.")
    add.number("seconds", 10.0, "Length of a file.", least=0.1)


def _measure(values: flags.FlagValues, _: list[str]) -> None:
    require("tensorflow_io")
    from benchmarks.machine import describe_machine

    print(f"{describe_machine()}; {values.files} files of {values.seconds:g} s of each format")
    print("| | tensorflow-io | soundfile | ratio |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(FORMATS):
            examples = write_files(
                pathlib.Path(scratch, str(number)), name, values.files, values.seconds
            )
            ours, peer = [(_time_tfio(examples), _time_soundfile(examples)) for _ in range(2)][1]
            print(f"| {name} | {ours:.1f} s | {peer:.1f} s | {ours / peer:.2f} |", flush=True)


def write_files(root: pathlib.Path, name: str, number: int, seconds: float) -> list[Example]:
    """Writes sound files of a format, all alike: chords that fade, and noise."""
    import numpy as np
    import soundfile

    from mt3_keras.data.example import Example

    suffix, rate, subtype = FORMATS[name]
    times = np.arange(round(seconds * rate)) / rate
    pitches = [220 * 2 ** (i / 12) for i in (0, 4, 7, 12, 16)]
    sound = sum(np.sin(2 * np.pi * pitch * times) for pitch in pitches) * np.exp(-2 * (times % 1))
    sound = 0.1 * sound + np.random.default_rng(0).normal(0, 0.003, times.size)
    root.mkdir()
    first = root / f"0{suffix}"
    soundfile.write(first, sound, rate, subtype)
    paths = [root / f"{i}{suffix}" for i in range(number)]
    for path in paths[1:]:
        path.write_bytes(first.read_bytes())
    return [Example(path.stem, "folder", "train", (path,), (), lambda _: []) for path in paths]


def _time_tfio(examples: Sequence[Example]) -> float:
    from train.audio_files import decode_files

    start = time.perf_counter()
    if any(samples is None for samples in decode_files(examples)):
        raise ValueError("tensorflow-io refuses a file that soundfile wrote")
    return time.perf_counter() - start


def _time_soundfile(examples: Sequence[Example]) -> float:
    from mt3_keras.audio import sum_files

    start = time.perf_counter()
    for example in examples:
        for _ in sum_files(example.audio):
            pass
    return time.perf_counter() - start


COMMAND = Command("[FLAGS]", __doc__, _define_flags, _measure)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
