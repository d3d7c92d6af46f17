"""Audio files -> 16 kHz mono blocks.

A file is read block by block, so that memory stays bounded however long it is. Samples are those
of `librosa.load(path, sr=16000, mono=True)`, which the original uses: the mean over the channels,
then soxr's HQ resampler. What makes sound hard to transcribe is named in a warning.
"""

from __future__ import annotations

import functools
import glob
import itertools
import logging
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import soxr
from numpy.typing import NDArray

from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.segments import AudioError, check_finite
from mt3_keras.sound_files import MAX_RATE_HZ, MIN_RATE_HZ, duration, read_channels

__all__ = [
    "AUDIO_SUFFIXES",
    "AudioError",
    "duration",
    "find_audio",
    "read_blocks",
    "resample",
    "stack_files",
    "sum_files",
]

AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("3g2", "3gp", "aac", "ac3", "adts", "aif", "aifc", "aiff", "amr", "ape", "asf", "au"),
        *("avi", "avr", "caf", "dff", "dsf", "dts", "eac3", "f4a", "f4v", "flac", "flv", "ircam"),
        *("m1a", "m2a", "m2ts", "m4a", "m4b", "m4r", "m4v", "mka", "mkv", "mov", "mp1", "mp2"),
        *("mp3", "mp4", "mpa", "mpc", "mpeg", "mpg", "mpga", "mts", "nist", "oga", "ogg", "ogv"),
        *("ogx", "opus", "paf", "ra", "rf64", "rm", "sf", "snd", "sph", "spx", "tta", "vob", "voc"),
        *("w64", "wav", "wave", "webm", "wma", "wmv", "wv"),
    )
)
CANCELLED = 0.01  # energy of the mean over the channels beside theirs: a wire is reversed
FAINT_PEAK = 1e-4  # of full scale
SPECTRUM_SIZE = 1024  # samples of 16 kHz
HIGH_BAND_HZ = (6800, 7300)  # below what resampling from 44.1 kHz takes away
EMPTY_BAND = 1e-7  # its power beside that below, where nothing was recorded; in music above 1e-6

_STACKED_SAMPLES = 256_000  # of a block of several files

_Samples = NDArray[np.float32]
_logger = logging.getLogger(__name__)


def read_blocks(path: str | os.PathLike[str], block_seconds: float = 30.0) -> Iterator[_Samples]:
    """Reads a file as 16 kHz mono.

    What libsndfile cannot read (M4A, AAC, WMA, video) goes through the program `ffmpeg`, where it
    is installed. Differs from librosa in reading the whole of files whose header states too little
    or nothing, in refusing damaged files, and in using one channel where the channels cancel.

    Args:
      path: the file.
      block_seconds: length of a block, about; shorter where the file has many channels.

    Yields:
      float32 [n], n > 0, nominally in [-1, 1]; in all ceil(frames * 16000 / rate) samples.

    Raises:
      AudioError: on iteration: the file is missing, unreadable, empty, damaged, cut short, no
        audio, or holds samples that are not finite.
    """
    path = pathlib.Path(path)
    num_read = num_given = 0
    mixer, survey = _Mixer(path), _Survey(path)
    resampler: soxr.ResampleStream | None = None
    for channels, rate in read_channels(path, block_seconds):
        if resampler is None:
            resampler = soxr.ResampleStream(rate, SAMPLE_RATE_HZ, 1, "float32", "HQ")
        mono = mixer.mix(channels)
        check_finite(mono, f"{path}: samples", num_read / rate, rate)
        num_read += mono.size
        block = resampler.resample_chunk(mono)
        num_given += block.size
        if block.size:
            survey.push(block)
            yield block
    if resampler is None:
        raise AudioError(f"{path}: holds no sound; if a recording was interrupted, repair it first")
    rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    # librosa's length, rounding and all
    num_left = max(0, math.ceil(num_read * (SAMPLE_RATE_HZ / rate)) - num_given)
    if num_left:
        yield np.pad(rest[:num_left], (0, max(0, num_left - rest.size)))
    survey.warn()


def resample(samples: _Samples, rate_hz: float) -> _Samples:
    """Samples at any rate -> 16 kHz, as a file of that rate is read.

    Args:
      samples: float32 [n], mono.
      rate_hz: of `samples`.

    Raises:
      AudioError: no recording has such a rate.
    """
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioError(
            f"sample_rate must be {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, as 44100: got {rate_hz}"
        )
    if rate_hz == SAMPLE_RATE_HZ or not samples.size:
        return samples
    found: _Samples = soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ, "HQ")
    num_samples = math.ceil(samples.size * (SAMPLE_RATE_HZ / rate_hz))
    return np.pad(found[:num_samples], (0, max(0, num_samples - found.size)))


class _Mixer:
    """Channels -> mono."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._channel: int | None = None

    def mix(self, channels: _Samples) -> _Samples:
        """Means over float32 [n, channels]; or one channel, where the channels cancel."""
        with np.errstate(invalid="ignore", over="ignore"):
            mono = channels.mean(axis=1)
            num_channels = channels.shape[1]
            if num_channels == 1:
                return mono
            energies = np.square(channels).sum(axis=0)
            # Channels that have nothing to do with each other leave 1 / num_channels.
            is_cancelled = np.square(mono).sum() < CANCELLED * 2 / num_channels * energies.mean()
        if not is_cancelled:
            return mono
        if self._channel is None:
            self._channel = int(energies.argmax())
            text = "%s: its channels cancel each other (opposite phase): channel %d alone is used"
            _logger.warning(text, self._path, self._channel + 1)
        return channels[:, self._channel].copy()


class _Survey:
    """What a whole recording holds, for warnings."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._peak = 0.0
        self._power = np.zeros(SPECTRUM_SIZE // 2 + 1)

    def push(self, block: _Samples) -> None:
        """Takes 16 kHz mono [n]."""
        self._peak = max(self._peak, float(np.abs(block).max()))
        frames = block[: block.size // SPECTRUM_SIZE * SPECTRUM_SIZE].reshape(-1, SPECTRUM_SIZE)
        window = np.hanning(SPECTRUM_SIZE).astype(np.float32)
        for part in np.array_split(frames, len(frames) // 1000 + 1):
            self._power += np.square(np.abs(np.fft.rfft(part * window))).sum(axis=0)

    def warn(self) -> None:
        """Says what is too faint or too narrow a band to be transcribed well."""
        if 0 < self._peak < FAINT_PEAK:
            level = 20 * math.log10(self._peak)
            text = "%s: is all but silent (%.0f dB); was it recorded or scaled wrongly?"
            _logger.warning(text, self._path, level)
            return
        low, high = (hertz * SPECTRUM_SIZE // SAMPLE_RATE_HZ for hertz in HIGH_BAND_HZ)
        if self._power[low:high].mean() < EMPTY_BAND * self._power[:low].mean():
            cumulated = np.cumsum(self._power)
            top = np.searchsorted(cumulated, cumulated[-1] * (1 - 1e-6))
            text = "%s: holds nothing above %.1f kHz (telephone, low bit rate): drums are missed"
            _logger.warning(text, self._path, top * SAMPLE_RATE_HZ / SPECTRUM_SIZE / 1000)


def find_audio(paths: Sequence[str | os.PathLike[str]]) -> list[pathlib.Path]:
    """Files, folders and patterns -> the files they mean, in order, each once.

    Args:
      paths: a file is taken as it is; a folder is searched, subfolders too, for files with one of
        `AUDIO_SUFFIXES` (hidden ones left out), sorted; anything else is a pattern with * ? [] **.

    Raises:
      AudioError: a path does not exist, a pattern matches nothing, a folder holds no audio.
    """
    found: dict[pathlib.Path, pathlib.Path] = {}
    resolve = functools.cache(pathlib.Path.resolve)  # once for each folder
    for path in paths:
        given = os.fspath(path)
        # As it stands first, so that brackets in a file's name do no harm; pathlib's glob would
        # take no absolute pattern.
        named = glob.glob(glob.escape(given)) or sorted(  # noqa: PTH207
            glob.glob(given, recursive=True)  # noqa: PTH207
        )
        if not named:
            raise AudioError(f"{given}: no such file or folder; check the name")
        files = [file for name in named for file in _list_files(pathlib.Path(name))]
        if not files:
            raise AudioError(f"{given}: no audio in this folder; name files of other suffixes")
        for file in files:
            found.setdefault(resolve(file.parent) / file.name, file)
    return list(found.values())


def _list_files(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in AUDIO_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    )


def sum_files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[_Samples]:
    """Blocks of the sum of some files at 16 kHz, which is as long as the longest of them."""
    if len(paths) == 1:
        yield from read_blocks(paths[0])
        return
    for (total,) in stack_files([paths]):
        yield total


def stack_files(groups: Sequence[Sequence[str | os.PathLike[str]]]) -> Iterator[_Samples]:
    """Blocks of the sums of groups of files, float32 [len(groups), n] at 16 kHz.

    All begin together; what is shorter than the longest file is filled up with zeros.
    """
    places = [(i, path) for i, paths in enumerate(groups) for path in paths]
    streams = [_equal_blocks(read_blocks(path, 4.0), _STACKED_SAMPLES) for _, path in places]
    for parts in itertools.zip_longest(*streams):
        size = max(part.size for part in parts if part is not None)
        total = np.zeros((len(groups), size), np.float32)
        for (i, _), part in zip(places, parts, strict=True):
            if part is not None:
                total[i, : part.size] += part
        yield total


def _equal_blocks(blocks: Iterable[_Samples], size: int) -> Iterator[_Samples]:
    """The same samples in blocks of `size`; the last may be shorter."""
    rest = np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate([rest, block])
        while rest.size >= size:
            yield rest[:size]
            rest = rest[size:]
    if rest.size:
        yield rest
