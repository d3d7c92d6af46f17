"""Notes -> a sound file to listen to, alone or beside the recording they are of.

A General MIDI soundfont plays them, by TinySoundFont. Memory stays bounded.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from mt3_keras.extras import MissingPackageError
from mt3_keras.files import replacing
from mt3_keras.notes import Note
from mt3_keras.sound_files import read_channels
from mt3_keras.synth.sounds import open_font, play_font

RATE_HZ = 44_100
BLOCK_SECONDS = 30
PEAK = 0.9  # of full scale
TAIL = 1.0  # seconds after the last note
# Where systems keep a General MIDI soundfont, and where `make web` does.
FONTS = (
    "/usr/share/sounds/sf2/default-GM.sf2",
    "/usr/share/sounds/sf3/default-GM.sf3",
    "/usr/share/sounds/sf2/TimGM6mb.sf2",
    "/usr/share/soundfonts/default.sf2",
    "build/web/sounds/font.sf3",
)

_Samples = NDArray[np.float32]


def find_font(given: str = "") -> str:
    """The soundfont to play with: the one given, or the first of `FONTS`.

    Raises:
      MissingPackageError: tinysoundfont is not installed.
      ValueError: there is no such file.
    """
    if importlib.util.find_spec("tinysoundfont") is None:
        raise MissingPackageError(
            "playing notes needs tinysoundfont, for Python 3.11 or 3.12: "
            "pip install --no-deps tinysoundfont"
        )
    if given:
        if not pathlib.Path(given).is_file():
            raise ValueError(f"{given}: no such soundfont; name an sf2 or sf3 file")
        return given
    for path in FONTS:
        if pathlib.Path(path).is_file():
            return path
    raise ValueError(
        "no General MIDI soundfont was found: install one, such as Debian's timgm6mb-soundfont,"
        " or name an sf2 or sf3 file with --font"
    )


def write_sound(
    notes: Sequence[Note],
    path: str | os.PathLike[str],
    *,
    font: str,
    duration: float = 0.0,
    beside: pathlib.Path | None = None,
) -> None:
    """Writes what the notes sound like as a WAV file of 16 bits.

    Args:
      notes: in seconds, in any order.
      path: the file; it appears whole or not at all.
      font: see `find_font`.
      duration: seconds that it lasts at least.
      beside: a recording to be heard on the left, as loud as the notes on the right.

    Raises:
      DatasetError: the soundfont is damaged.
      AudioError: the recording cannot be read.
    """
    end = max([duration, *(note.offset + TAIL for note in notes)])
    num_samples = math.ceil(end * RATE_HZ)
    played = _Sound(lambda: _play(notes, font, num_samples))
    sides = [played]
    if beside is not None:
        recorded = _Sound(lambda: _read(beside, num_samples))
        sides = [recorded, played]
        played.set_level(recorded.level or played.level)
    gain = PEAK / max(1e-6, *(side.peak * side.gain for side in sides))
    with replacing(path) as temporary:
        file = soundfile.SoundFile(temporary, "w", RATE_HZ, len(sides), "PCM_16", format="WAV")
        with file:
            for blocks in zip(*(side.blocks() for side in sides), strict=True):
                file.write(gain * np.stack(blocks, axis=1))


class _Sound:
    """Blocks of a sound that can be made again, so that its loudness is known beforehand."""

    def __init__(self, make: Callable[[], Iterator[_Samples]]) -> None:
        self._make, self.gain = make, 1.0
        energy, peak, num = 0.0, 0.0, 0
        for block in make():
            energy, num = energy + float(np.square(block).sum()), num + block.size
            peak = max(peak, float(np.abs(block).max(initial=0)))
        self.peak, self.level = peak, math.sqrt(energy / max(num, 1))

    def set_level(self, level: float) -> None:
        """Makes its root mean square another."""
        self.gain = level / self.level if self.level else 1.0

    def blocks(self) -> Iterator[_Samples]:
        """Blocks of `BLOCK_SECONDS`, the last shorter."""
        for block in self._make():
            yield self.gain * block


def _play(notes: Sequence[Note], font: str, num_samples: int) -> Iterator[_Samples]:
    return play_font(open_font(font, RATE_HZ), notes, num_samples, RATE_HZ, BLOCK_SECONDS * RATE_HZ)


def _read(path: pathlib.Path, num_samples: int) -> Iterator[_Samples]:
    """A recording at `RATE_HZ` in mono, cut or filled up to so many samples."""
    block_samples = BLOCK_SECONDS * RATE_HZ
    left, waiting = num_samples, np.zeros(0, np.float32)
    silence = itertools.repeat(np.zeros(block_samples, np.float32))
    for block in itertools.chain(_resample(path), silence):
        waiting = np.concatenate([waiting, block])
        while left and waiting.size >= min(block_samples, left):
            size = min(block_samples, left)
            yield waiting[:size]
            waiting, left = waiting[size:], left - size
        if not left:
            return


def _resample(path: pathlib.Path) -> Iterator[_Samples]:
    resampler: soxr.ResampleStream | None = None
    for channels, rate in read_channels(path, BLOCK_SECONDS):
        if resampler is None:
            resampler = soxr.ResampleStream(rate, RATE_HZ, 1, "float32", "HQ")
        yield resampler.resample_chunk(channels.mean(axis=1))
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
