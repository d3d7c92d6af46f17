"""Audio files -> 16 kHz mono blocks.

A file is read block by block, so that memory stays bounded however long it is. Samples are those
of `librosa.load(path, sr=16000, mono=True)`, which the original uses: the mean over the channels,
then soxr's HQ resampler. A file is read whole or refused: one that holds less sound than it states
raises `AudioError` (before the first block where the header tells, otherwise after the last).
"""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import math
import os
import pathlib
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.quiet import quiet_stderr
from mt3_keras.segments import AudioError, check_finite

AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("aac", "ac3", "aif", "aiff", "au", "caf", "flac", "m4a", "m4b", "mka", "mkv", "mov"),
        *("mp2", "mp3", "mp4", "oga", "ogg", "opus", "w64", "wav", "wave", "webm", "wma"),
    )
)
MAX_VALUES_AT_ONCE = 2**22  # 16 MiB of float32, also at 192 kHz and with many channels
TOLERATED_LOSS = 0.1  # seconds that a file may fall short of what it states

_Samples = NDArray[np.float32]
_UNKNOWN_FRAMES = 2**40  # what libsndfile reports, or more, where a header states no length
_logger = logging.getLogger(__name__)


def read_blocks(path: str | os.PathLike[str], block_seconds: float = 30.0) -> Iterator[_Samples]:
    """Reads a file as 16 kHz mono.

    What libsndfile cannot read (M4A, AAC, WMA, video) goes through the program `ffmpeg`, where it
    is installed. Differs from librosa in MP3 files that state no length (they are decoded to their
    end, not to an estimate of it) and in refusing damaged files.

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
    with _open_sound(path) as sound:
        ratio = SAMPLE_RATE_HZ / sound.samplerate
        resampler = soxr.ResampleStream(sound.samplerate, SAMPLE_RATE_HZ, 1, "float32", "HQ")
        for mono in _read_mono(sound, path, block_seconds):
            num_read += mono.size
            block = resampler.resample_chunk(mono)
            num_given += block.size
            if block.size:
                yield block
    if not num_read:
        raise AudioError(f"{path}: holds no sound; if a recording was interrupted, repair it first")
    rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    num_left = max(0, math.ceil(num_read * ratio) - num_given)  # librosa's length, rounding and all
    if num_left:
        yield np.pad(rest[:num_left], (0, max(0, num_left - rest.size)))


def duration(path: str | os.PathLike[str]) -> float | None:
    """Seconds that the file says it lasts; None if that cannot be told without decoding it."""
    try:
        with _open_file(pathlib.Path(path)) as file, _open_by_libsndfile(file) as sound:
            known = sound.frames < _UNKNOWN_FRAMES
            return sound.frames / sound.samplerate if known else None
    except (AudioError, soundfile.LibsndfileError):
        return None


def find_audio(paths: Sequence[str | os.PathLike[str]]) -> list[pathlib.Path]:
    """Files, folders and patterns -> the files they mean, in order, each once.

    Args:
      paths: a file is taken as it is; a folder is searched, subfolders too, for files with one of
        `AUDIO_SUFFIXES` (hidden ones left out), sorted; anything else is a pattern with * ? [] **.

    Raises:
      AudioError: a path does not exist, a pattern matches nothing, a folder holds no audio.
    """
    found: dict[pathlib.Path, pathlib.Path] = {}
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
            found.setdefault(file.parent.resolve() / file.name, file)
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


class _Stream(soundfile.SoundFile):
    """A sound file read front to back: soundfile would seek after each block, some files cannot."""

    def seekable(self) -> bool:
        return False


class _SizelessFile(io.FileIO):
    """A file that seems to begin at `start` and to be 0 bytes long until it is read.

    For MP3 files whose header states no length: libsndfile would guess it from the file's size and
    the first bit rate, and stop there. With no size to guess from, it counts the frames.
    """

    def __init__(self, descriptor: int, start: int) -> None:
        super().__init__(descriptor, closefd=False)
        self._start = start
        self.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_END:
            offset, whence = 0, os.SEEK_SET
        if whence == os.SEEK_SET:
            offset += self._start
        return super().seek(offset, whence) - self._start

    def tell(self) -> int:
        return super().tell() - self._start


def _open_file(path: pathlib.Path) -> IO[bytes]:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise AudioError(f"{path}: is a folder; name a file in it")
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(f"{path}: is not a regular file; save the audio to a file first")
        if not status.st_size:
            raise AudioError(f"{path}: is empty (0 bytes); copy or download it again")
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise AudioError(f"{path}: no such file; check the name") from None
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise AudioError(f"{path}: {reason}; check its name and permissions") from error


@contextlib.contextmanager
def _open_sound(path: pathlib.Path) -> Iterator[_Stream]:
    """The file, by libsndfile or else by ffmpeg; a normal exit means it was read to its end."""
    with _open_file(path) as file:
        try:
            sound = _open_by_libsndfile(file)
        except soundfile.LibsndfileError as error:
            with _run_ffmpeg(path, error.error_string.strip(" .")) as sound:
                yield sound
            return
        with sound:
            _check_header(sound, path)
            yield sound
            _check_rest(sound, file, path)


def _open_by_libsndfile(file: IO[bytes]) -> _Stream:
    start = _find_mp3(file)
    if start is None:
        return _Stream(file.fileno(), closefd=False)
    with quiet_stderr():  # the MP3 decoder prints there
        return _Stream(_SizelessFile(file.fileno(), start))


def _find_mp3(file: IO[bytes]) -> int | None:
    """Offset of the first MPEG audio frame if there is one; leaves the file at its start."""
    start, head = 0, file.read(10)
    while head[:3] == b"ID3" and len(head) == 10:
        size = 0
        for seven_bits in head[6:10]:
            size = size << 7 | seven_bits
        start += 10 + size
        file.seek(start)
        head = file.read(10)
    file.seek(0)
    # Eleven bits of synchronisation, then version, then a layer, which in AAC is 0.
    is_mpeg = len(head) > 1 and head[0] == 0xFF and head[1] >= 0xE0 and head[1] & 0b110 != 0
    return start if is_mpeg else None


def _read_mono(sound: _Stream, path: pathlib.Path, block_seconds: float) -> Iterator[_Samples]:
    """The mean over the channels, float32 [n] at the file's own rate."""
    rate = sound.samplerate
    num_at_once = max(1, min(round(block_seconds * rate), MAX_VALUES_AT_ONCE // sound.channels))
    num_read = 0
    while num_wanted := min(num_at_once, sound.frames - num_read):
        try:
            with quiet_stderr() if sound.format == "MP3" else contextlib.nullcontext():
                block = sound.read(num_wanted, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(
                f"{path}: is damaged or cut short some time after {num_read / rate:.1f} s;"
                " copy or download it again, or convert it to WAV to use what a player can play"
            ) from error
        if not len(block):
            break
        with np.errstate(invalid="ignore", over="ignore"):
            mono = block.mean(axis=1)
        check_finite(mono, f"{path}: samples", num_read / rate, rate)
        num_read += mono.size
        yield mono
    if sound.frames < _UNKNOWN_FRAMES:
        _check_length(num_read / rate, sound.frames / rate, path)


def _check_length(held: float, stated: float, path: pathlib.Path) -> None:
    if stated - held > TOLERATED_LOSS:
        raise AudioError(
            f"{path}: is cut short or damaged: holds {held:.1f} s of the {stated:.1f} s that its"
            " header states; copy or download it again, or convert it to WAV to use what is there"
        )


def _check_header(sound: _Stream, path: pathlib.Path) -> None:
    """Compares the size of the audio that a header states with the size of the file.

    libsndfile quietly shortens such files and tells of it only in its log.
    """
    log = sound.extra_info
    held = sound.frames / sound.samplerate
    sizes = re.search(  # of WAV, AIFF, Wave64 and AU, in this order
        r"^ *(?:data|SSND|riff|Data Size) *: (\d+) \(should be (\d+)\)", log, re.MULTILINE
    )
    if sizes and int(sizes[2]):
        stated, real = int(sizes[1]), int(sizes[2])
        # Programs that write to a pipe state about 2 or 4 GiB, for they cannot know the size.
        if all(not size - 2**16 <= stated < size for size in (2**31, 2**32)):
            _check_length(held, held * stated / real, path)
    if frames := re.search(r"does not match value from 'ds64' chunk of (\d+)", log):  # RF64
        _check_length(held, int(frames[1]) / sound.samplerate, path)
    if "end-of-stream" in log.lower():
        _logger.warning("%s: lacks the mark of an Ogg file's end; it may have been cut short", path)


def _check_rest(sound: _Stream, file: IO[bytes], path: pathlib.Path) -> None:
    """Raises if another piece of audio follows the end of the first, which is where it stops."""
    beginning = {"MP3": rb"\A(ID3|\xff[\xe2-\xff])", "OGG": rb"OggS"}.get(sound.format)
    rest = file.read(2**16)
    # A last frame of MP3 that is cut short is less than 4096 bytes.
    if beginning and len(rest) > 4096 and re.search(beginning, rest):
        raise AudioError(
            f"{path}: holds several recordings joined in one file, and only the first could be"
            " read; convert it to WAV first"
        )


@contextlib.contextmanager
def _run_ffmpeg(path: pathlib.Path, refusal: str) -> Iterator[_Stream]:
    """The first audio stream of anything that ffmpeg reads, at its own rate and channels."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise AudioError(
            f"{path}: is not audio that can be read here ({refusal});"
            " if it is M4A, AAC, WMA or video, install ffmpeg or convert it to WAV"
        )
    # AU, for it states rate and channels before the samples and needs no length. Only local files:
    # a playlist must not make this read from a network.
    command = [program, "-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file,pipe"]
    command += ["-i", f"file:{path}", "-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        ) as process,
    ):
        assert process.stdout is not None
        try:
            try:
                sound = _Stream(process.stdout.fileno(), closefd=False)
            except soundfile.LibsndfileError:
                process.kill()
                is_sound = False
            else:
                is_sound = True
                with sound:
                    yield sound
            is_failure = process.wait() != 0 or not is_sound
            log.seek(0)
            complaints = log.read(2**16).decode(errors="replace")
            if is_failure or "ended prematurely" in complaints:  # cut short, to it no failure
                first = complaints.partition("\n")[0]
                complaint = re.sub(r"^(\[[^]]*\] )+", "", first) or "no reason given"
                raise AudioError(
                    f"{path}: ffmpeg cannot read all of it as audio ({complaint});"
                    " copy or download it again, or convert it to WAV"
                )
        finally:
            process.kill()
