"""Sound files of any format -> samples of their channels, block by block.

libsndfile reads what it can, the program ffmpeg the rest. A file is read whole, in the time of a
player: what a header understates is read too, what a video's sound lacks is silence. One that
holds less than it states is refused, and what is lost in any other way is named in a warning.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO, Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from mt3_keras.containers import (
    MpegAudio,
    PartsOfFile,
    find_mpeg,
    read_ogg_pages,
    skip_tags,
)
from mt3_keras.ffmpeg import check_log, ffmpeg_command
from mt3_keras.files import open_regular
from mt3_keras.quiet import quiet_stderr
from mt3_keras.segments import INTEGER_PEAK, AudioError

MAX_VALUES_AT_ONCE = 2**22  # 16 MiB of float32, also at 192 kHz and with many channels
TOLERATED_LOSS = 0.1  # seconds that a file may fall short of what it states
MAX_PAUSE_SECONDS = 3600.0  # of a stream; a damaged time would be made up for with years of silence
MAX_PADDING = 2**13  # samples that an MP3 encoder adds, and its first frame says to leave out
MIN_RATE_HZ, MAX_RATE_HZ = 1000, 2_000_000
INTEGER_SCALES = (2.0**15, 2.0**23, 2.0**31)

_Samples = NDArray[np.float32]
_Blocks = Iterator[tuple[_Samples, int]]
_UNKNOWN_FRAMES = 2**40  # what libsndfile reports, or more, where a header states no length
_WIDTHS = {
    **{"PCM_S8": 1, "PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3},
    **{"PCM_32": 4, "FLOAT": 4, "DOUBLE": 8},
}
_ENDIANS: dict[str, Literal["little", "big"]] = {
    **dict.fromkeys(("WAV", "WAVEX", "RF64", "W64"), "little"),
    **dict.fromkeys(("AIFF", "AU", "CAF"), "big"),
}
_logger = logging.getLogger(__name__)


class _Stream(soundfile.SoundFile):
    """A sound file read front to back: soundfile would seek after each block, some files cannot."""

    def seekable(self) -> bool:
        return False


def read_channels(path: pathlib.Path, block_seconds: float) -> _Blocks:
    """Reads a file.

    Yields:
      float32 [n, channels], n > 0, and the sample rate, the same for all blocks.

    Raises:
      AudioError: on iteration: the file is missing, no regular file, no sound, damaged or cut
        short, or states a rate that no recording has.
    """
    with open_regular(path, AudioError) as file:
        if mpeg := find_mpeg(file.fileno()):
            yield from _read_mpeg(mpeg, file, path, block_seconds)
            return
        try:
            sound = _open(file, path)
        except soundfile.LibsndfileError as error:
            if mpeg := find_mpeg(file.fileno(), anywhere=True):
                yield from _read_mpeg(mpeg, file, path, block_seconds)
            else:
                _check_size(file, path)
                head = _peek(file, 0, 200)
                yield from _read_by_ffmpeg(
                    path, head, error.error_string.strip(" ."), block_seconds
                )
            return
        with sound:
            yield from _read_by_libsndfile(sound, file, path, block_seconds)


def duration(path: str | os.PathLike[str]) -> float | None:
    """Seconds that the file says it lasts; None if that cannot be known without decoding it."""
    try:
        with open_regular(path, AudioError) as file:
            mpeg = find_mpeg(file.fileno())
            file.seek(0)
            sound = _open_mpeg(mpeg, file) if mpeg else _Stream(file.fileno(), closefd=False)
            with sound:
                known = sound.frames < _UNKNOWN_FRAMES
                return sound.frames / sound.samplerate if known else None
    except (AudioError, soundfile.LibsndfileError):
        return None


def _peek(file: IO[bytes], at: int, num_bytes: int) -> bytes:
    """Bytes of the file; its position, which libsndfile shares, stays."""
    position = file.tell()
    file.seek(at)
    found = file.read(num_bytes)
    file.seek(position)
    return found


def _open(file: IO[bytes], path: pathlib.Path) -> _Stream:
    """By libsndfile; FLAC files as if they stated no length, for some state too little."""
    start = skip_tags(file.fileno())
    head = _peek(file, start, 26)
    if head[:4] == b"OggS":
        _check_pages(path, file)
    parts = [(start, os.fstat(file.fileno()).st_size - start)]
    if head[:4] == b"fLaC" and len(head) == 26:
        patches = {21: bytes([head[21] & 0xF0, 0, 0, 0, 0])}
        return _Stream(PartsOfFile(file.fileno(), parts, patches))
    if head[:1] == b"\xff":  # MP3 of which `find_mpeg` knows no frames: free bit rates
        with quiet_stderr():
            return _Stream(PartsOfFile(file.fileno(), parts, {}, states_size=False))
    file.seek(0)
    return _Stream(file.fileno(), closefd=False)


def _open_mpeg(mpeg: MpegAudio, file: IO[bytes]) -> _Stream:
    with quiet_stderr():  # mpg123 prints there
        sound = _Stream(PartsOfFile(file.fileno(), mpeg.parts, mpeg.patches, mpeg.states_length))
        if mpeg.seconds - sound.frames / sound.samplerate <= MAX_PADDING / sound.samplerate:
            return sound
        sound.close()  # the first frame is damaged: without it, frames are counted
        (start, length), *others = mpeg.parts
        parts = [(start + mpeg.first_bytes, length - mpeg.first_bytes), *others]
        return _Stream(PartsOfFile(file.fileno(), parts, {}, states_size=False))


def _read_mpeg(
    mpeg: MpegAudio, file: IO[bytes], path: pathlib.Path, block_seconds: float
) -> _Blocks:
    if mpeg.is_joined:
        raise AudioError(
            f"{path}: holds several recordings of different rates joined in one file;"
            " convert it to WAV first"
        )
    if mpeg.stated_seconds is not None:
        _check_length(mpeg.seconds, mpeg.stated_seconds, path)
    with _open_mpeg(mpeg, file) as sound:
        yield from _read(sound, path, block_seconds)
    if mpeg.is_cut:
        _logger.warning("%s: ends within a frame; it may have been cut short", path)
    num_bytes = sum(length for _, length in mpeg.parts)
    lost_seconds = mpeg.lost_bytes * mpeg.seconds / num_bytes
    if lost_seconds > TOLERATED_LOSS:
        _logger.warning(
            "%s: is damaged: about %.1f s of it cannot be read, from %.1f s on; what follows is"
            " that much early; copy or download it again",
            path,
            lost_seconds,
            mpeg.lost_at,
        )


def _read_by_libsndfile(
    sound: _Stream, file: IO[bytes], path: pathlib.Path, block_seconds: float
) -> _Blocks:
    _check_header(sound, file, path)
    divisor = _integer_scale(sound, path)
    num_read = 0
    for block, rate in _read(sound, path, block_seconds):
        num_read += len(block)
        yield (block / np.float32(divisor) if divisor != 1 else block), rate
    if sound.format == "FLAC" and (stated := _flac_frames(file)):
        _check_length(num_read / sound.samplerate, stated / sound.samplerate, path)
    if rest := _open_rest(sound, file):
        with rest:
            stated, held = (
                frames / rest.samplerate for frames in (num_read, num_read + rest.frames)
            )
            _logger.warning(
                "%s: holds %.1f s and not the %.1f s that its header states; all is read, and may"
                " end in noise if it is no sound",
                path,
                held,
                stated,
            )
            yield from _read(rest, path, block_seconds)


def _read(sound: _Stream, path: pathlib.Path, block_seconds: float) -> _Blocks:
    """All frames of an open file."""
    rate = sound.samplerate
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise AudioError(
            f"{path}: states a sample rate of {rate} Hz, which no recording has; repair its header"
        )
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
        num_read += len(block)
        yield block, rate
    if sound.frames < _UNKNOWN_FRAMES:
        _check_length(num_read / rate, sound.frames / rate, path)


# --- What a header states, and what the file holds ---


def _check_length(held: float, stated: float, path: pathlib.Path) -> None:
    if stated - held > TOLERATED_LOSS:
        raise AudioError(
            f"{path}: is cut short or damaged: holds {held:.1f} s of the {stated:.1f} s that its"
            " header states; copy or download it again, or convert it to WAV to use what is there"
        )


def _check_header(sound: _Stream, file: IO[bytes], path: pathlib.Path) -> None:
    """Compares the length that a header states with the size of the file.

    libsndfile quietly shortens such files and says so only in its log.
    """
    log = sound.extra_info
    held = sound.frames / sound.samplerate
    sizes = re.search(  # of WAV, AIFF, Wave64, SVX, WVE, AU and MAT4, in this order
        r"^ *(?:data|SSND|riff|BODY|Data length|Data Size) *:? (\d+) \(?should be (\d+)", log, re.M
    ) or re.search(r"truncated\. +(?P<real>\d+) <--> (?P<stated>\d+)", log)
    if sizes:
        stated, real = (int(size) for size in sizes.groups())
        if "real" in sizes.groupdict():
            stated, real = real, stated
        # Programs that write to a pipe state about 2 or 4 GiB, for they cannot know the size.
        if real and all(not size - 2**16 <= stated < size for size in (2**31, 2**32)):
            _check_length(held, held * stated / real, path)
    frames = re.findall(  # of RF64, AVR, MPC2K and MAT5; of the last the last is meant
        r"(?:match value from 'ds64' chunk of|^ *Frames *:|^ *Rows : \d+ +Cols :) (\d+)", log, re.M
    )
    if sound.format == "NIST":
        frames = re.findall(r"sample_count -i (\d+)", _peek(file, 0, 1024).decode("latin-1"))
    if frames and sound.format in ("RF64", "AVR", "MPC2K", "MAT5", "NIST"):
        _check_length(held, int(frames[-1]) / sound.samplerate, path)
    if "Seems to be a truncated file" in log:  # VOC
        raise AudioError(f"{path}: is cut short; copy or download it again")


def _flac_frames(file: IO[bytes]) -> int:
    """The number of frames that a FLAC file states; 0 is unknown."""
    return int.from_bytes(_peek(file, skip_tags(file.fileno()) + 21, 5)) & (2**36 - 1)


def _check_pages(path: pathlib.Path, file: IO[bytes]) -> None:
    """Raises if an Ogg file lost pages; libsndfile passes over them, and all after is early."""
    pages = read_ogg_pages(file.fileno())
    if pages.is_joined:
        raise AudioError(
            f"{path}: holds several recordings joined in one file, and only the first could be"
            " read; convert it to WAV first"
        )
    if pages.num_lost:
        where = "" if pages.lost_at is None else f", first after {pages.lost_at:.1f} s"
        raise AudioError(
            f"{path}: is damaged in {pages.num_lost} places{where} ({pages.num_pages} pages of it"
            " are whole); copy or download it again, or convert it to WAV to use what is there"
        )
    if not pages.is_ended:
        _logger.warning("%s: lacks the mark of an Ogg file's end; it may have been cut short", path)


def _open_rest(sound: _Stream, file: IO[bytes]) -> _Stream | None:
    """What follows the sound that a header states, if it is sound too: neither chunk nor tag.

    The recorder was stopped before it had written the size, or the size has more than 32 bits.
    """
    endian, width = _ENDIANS.get(sound.format), _WIDTHS.get(sound.subtype)
    if endian is None or width is None:
        return None
    if not sound.frames:
        sound.seek(0)
    at, size = file.tell(), os.fstat(file.fileno()).st_size
    width *= sound.channels
    if (size - at) / (width * sound.samplerate) <= TOLERATED_LOSS:
        return None
    if any(_is_chunk(file, at + i, size, endian) for i in range(width + 1)):
        return None
    ends = _peek(file, at, 2**16), _peek(file, max(at, size - 2**16), 2**16)
    if ends[0].startswith((b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")) or not any(map(any, ends)):
        return None
    return _Stream(
        PartsOfFile(file.fileno(), [(at, size - at)], {}),
        samplerate=sound.samplerate,
        channels=sound.channels,
        format="RAW",
        subtype=sound.subtype,
        endian=endian.upper() if sound.endian == "FILE" else sound.endian,
    )


def _is_chunk(file: IO[bytes], at: int, size: int, order: Literal["little", "big"]) -> bool:
    """Whether a chunk of WAV, AIFF, Wave64 or CAF begins there."""
    head = _peek(file, at, 24)
    if len(head) < 8 or not re.fullmatch(rb"[ -~]{4}", head[:4]):
        return False
    lengths = [int.from_bytes(head[4:8], order) + 8, int.from_bytes(head[4:12], order) + 12]
    if len(head) == 24:
        lengths.append(int.from_bytes(head[16:24], order))
    return any(0 < length <= size - at + 1 for length in lengths)


def _integer_scale(sound: _Stream, path: pathlib.Path) -> float:
    """What to divide by: 1, or full scale where floating point holds values of 16 bits or more."""
    if sound.subtype not in ("FLOAT", "DOUBLE") or sound.format not in _ENDIANS:
        return 1.0
    peak = 0.0
    while len(block := sound.read(MAX_VALUES_AT_ONCE // sound.channels, dtype="float32")):
        peak = max(peak, float(np.abs(block).max()))  # NaN is never greater
    sound.seek(0)
    if not INTEGER_PEAK < peak <= INTEGER_SCALES[-1]:
        return 1.0
    scale = next(scale for scale in INTEGER_SCALES if peak <= scale)
    bits = round(math.log2(scale)) + 1
    text = "%s: its samples reach %.0f where 1 is full scale; read as integers of %d bits"
    _logger.warning(text, path, peak, bits)
    return scale


# --- ffmpeg ---


def _check_size(file: IO[bytes], path: pathlib.Path) -> None:
    """Raises if a file of a kind that states its size (ASF: WMA; RIFF: AVI) is shorter."""
    head, size = _peek(file, 0, 4096), os.fstat(file.fileno()).st_size
    properties = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    stated = 0
    if properties >= 0:
        stated = int.from_bytes(head[properties + 40 : properties + 48], "little")
    elif head[:4] == b"RIFF" and size > 12:
        stated = int.from_bytes(head[4:8], "little") + 8
    if size < stated < 2**31 - 2**16:
        raise AudioError(
            f"{path}: is cut short: holds {size} of the {stated} bytes that its header states;"
            " copy or download it again, or convert it to WAV to use what is there"
        )


def _read_by_ffmpeg(path: pathlib.Path, head: bytes, refusal: str, block_seconds: float) -> _Blocks:
    """The first audio stream of anything that ffmpeg reads."""
    command = ffmpeg_command(path, head, refusal)
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        ) as process,
    ):
        assert process.stdout is not None
        try:
            held = paused = 0.0
            try:
                sound = _Stream(process.stdout.fileno(), closefd=False)
            except soundfile.LibsndfileError:
                process.kill()
                is_sound = False
            else:
                is_sound = True
                with sound:
                    for block, rate in _read(sound, path, block_seconds):
                        held += len(block) / rate
                        paused = 0.0 if block.any() else paused + len(block) / rate
                        if paused > MAX_PAUSE_SECONDS:
                            raise AudioError(
                                f"{path}: is silent for an hour up to {held / 3600:.1f} h, so a"
                                " time in it is damaged; convert it to WAV first"
                            )
                        yield block, rate
            is_failure = process.wait() != 0 or not is_sound
            log.seek(0)
            text = log.read(2**20).decode(errors="replace")
            check_log(text, is_failure, held, path)
        finally:
            process.kill()
