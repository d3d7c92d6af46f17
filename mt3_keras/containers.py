"""What MPEG audio and Ogg files hold, found without decoding them.

libsndfile and mpg123 take a file's word for its length, end at the first thing that is not a frame
and print what they think of it; with these functions they are given frames alone, and what a file
lacks is known before it is read.
"""

from __future__ import annotations

import bisect
import functools
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

MAX_JUNK = 2**13  # bytes before the first frame, zeros apart, in which one is looked for
MAX_ZEROS = 2**24  # bytes
MAX_FRAME = 1441  # bytes
_KBITS = {  # by version 1 or not, and layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class PartsOfFile(io.RawIOBase):
    """Parts of a file as one file, for libsndfile to read.

    Args:
      descriptor: of the file; it is not closed.
      parts: (offset, length) of each.
      patches: bytes that stand at an offset of the joined parts instead of the file's own.
      states_size: whether it states its size. libsndfile guesses the length of an MP3 file that
        states none from the size and the first bit rate; with no size it counts the frames.
    """

    def __init__(
        self,
        descriptor: int,
        parts: Sequence[tuple[int, int]],
        patches: Mapping[int, bytes],
        states_size: bool = True,
    ) -> None:
        self._file = io.BufferedReader(io.FileIO(descriptor, closefd=False), 2**18)
        self._parts, self._patches = parts, patches
        self._starts = [0, *itertools.accumulate(length for _, length in parts)]
        self._patched = max((at + len(patch) for at, patch in patches.items()), default=0)
        self._size = self._starts[-1] if states_size else 0
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        view, start = memoryview(buffer).cast("B"), self._at
        while self._at - start < len(view):
            part = bisect.bisect_right(self._starts, self._at) - 1
            if not 0 <= part < len(self._parts):
                break
            into_part = self._at - self._starts[part]
            self._file.seek(self._parts[part][0] + into_part)
            wanted = min(len(view) - (self._at - start), self._parts[part][1] - into_part)
            num_read = self._file.readinto(view[self._at - start :][:wanted])
            if not num_read:
                break
            self._at += num_read
        if start < self._patched:
            for offset, patch in self._patches.items():
                for index, byte in enumerate(patch, offset - start):
                    if 0 <= index < self._at - start:
                        view[index] = byte
        return self._at - start


# --- MPEG audio: MP1, MP2, MP3 ---


class MpegAudio(NamedTuple):
    """The frames of a file.

    Attributes:
      parts: (offset, length) of each run of frames.
      patches: what the first frame is to say of the number of frames, for `PartsOfFile`.
      first_bytes: length of the first frame.
      states_length: whether it says the number of frames.
      seconds: duration of the frames that hold sound.
      stated_seconds: the duration that the first frame states; None if it states none.
      lost_bytes: of what lies between frames, and is neither frame nor tag.
      lost_at: seconds into the sound where that begins.
      is_joined: whether frames of another kind follow.
      is_cut: whether the last frame is not whole.
    """

    parts: list[tuple[int, int]]
    patches: dict[int, bytes]
    first_bytes: int
    states_length: bool
    seconds: float
    stated_seconds: float | None
    lost_bytes: int
    lost_at: float
    is_joined: bool
    is_cut: bool


class _Frame(NamedTuple):
    """What a frame's header says; `kind` is what all frames of a recording have in common."""

    kind: tuple[int, int]
    num_bytes: int
    seconds: float


@functools.lru_cache(maxsize=4096)
def _parse_header(second: int, third: int) -> _Frame | None:
    """The frame whose header holds these bytes after 0xFF."""
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)  # versions 0: 2.5, 2: 2, 3: 1
    bit_rate, rate = third >> 4, third >> 2 & 3
    if second < 0xE0 or version == 1 or layer == 4 or bit_rate in (0, 15) or rate == 3:
        return None
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 384 if layer == 1 else 1152 if layer == 2 or version == 3 else 576
    slot = 4 if layer == 1 else 1
    slots = samples // 8 // slot * _KBITS[version == 3, layer][bit_rate - 1] * 1000 // hertz
    num_bytes = (slots + (third >> 1 & 1)) * slot
    return _Frame((second & 0xFE, third & 0x0C), num_bytes, samples / hertz)


class _Mpeg:
    """Finds frames in a file."""

    def __init__(self, descriptor: int) -> None:
        self.file = io.BufferedReader(io.FileIO(descriptor, closefd=False), 2**16)
        self.size = os.fstat(descriptor).st_size

    def peek(self, at: int, num_bytes: int) -> bytes:
        self.file.seek(at)
        return self.file.read(num_bytes)

    def frame(self, at: int, *, is_whole: bool = True) -> _Frame | None:
        """The frame there, if it is whole."""
        head = self.peek(at, 4)
        if len(head) < 4 or head[0] != 0xFF:
            return None
        frame = _parse_header(head[1], head[2])
        return frame if frame and (at + frame.num_bytes <= self.size) == is_whole else None

    def is_chain(self, at: int, length: int) -> bool:
        """Whether so many frames of one kind follow each other, or fewer up to the end."""
        first = frame = self.frame(at)
        for _ in range(length - 1):
            if not (first and frame and frame.kind == first.kind):
                return False
            at += frame.num_bytes
            if self.size - at < 4 or self.tag(at):
                return True
            frame = self.frame(at)
        return first is not None and frame is not None and frame.kind == first.kind

    def find(self, start: int, stop: int, length: int, kind: tuple[int, int] | None) -> int | None:
        """Where the next chain of frames begins."""
        pattern = re.compile(rb"\xff[\xe2-\xff][\x10-\xef]")
        if kind is not None:
            pattern = re.compile(
                rb"\xff[" + b"".join(b"\\x%02x" % (kind[0] | i) for i in (0, 1)) + b"]"
            )
        for block_start in range(start, stop, 2**16):
            block = self.peek(block_start, 2**16 + 2)
            for match in pattern.finditer(block):
                at = block_start + match.start()
                frame = self.frame(at)
                if frame and kind in (None, frame.kind) and self.is_chain(at, length):
                    return at if at < stop else None
        return None

    def tag(self, at: int) -> int:
        """Bytes of the tag that begins there; 0 if none does."""
        head = self.peek(at, 32)
        if head[:3] == b"ID3" and len(head) >= 10:
            size = functools.reduce(lambda size, byte: size << 7 | byte & 0x7F, head[6:10], 0)
            return 20 + size if head[5] & 0x10 else 10 + size
        if head[:8] == b"APETAGEX" and len(head) == 32:
            has_header = head[23] & 0x20
            return 32 + (int.from_bytes(head[12:16], "little") if has_header else 0)
        if head[:3] == b"3DI":
            return 10
        return 0 if head[:3] != b"TAG" else 227 if head[:4] == b"TAG+" else 128

    def skip_zeros(self, at: int) -> int:
        """The first byte that is none of at most `MAX_ZEROS` zeros."""
        stop = at + MAX_ZEROS
        while at < stop and (block := self.peek(at, 2**16)):
            if rest := block.lstrip(b"\0"):
                return at + len(block) - len(rest)
            at += len(block)
        return at

    def skip_tags(self) -> int:
        """The first byte after all tags at the start."""
        at = 0
        while size := self.tag(at):
            at += size
        return at


def find_mpeg(descriptor: int, *, anywhere: bool = False) -> MpegAudio | None:
    """The frames of a file that begins with one, tags apart; None if it does not.

    A file that looks like MP3 may begin within a frame, or with a damaged one.

    Args:
      descriptor: of the file.
      anywhere: it need not look like MP3, and may begin with zeros.
    """
    mpeg = _Mpeg(descriptor)
    start = begin = mpeg.skip_tags()
    if not mpeg.is_chain(start, 2):
        if not anywhere and not begin and not re.match(rb"\xff[\xe0-\xff]", mpeg.peek(0, 2)):
            return None
        begin = start = mpeg.skip_zeros(start)
        found = mpeg.find(start, start + MAX_JUNK, 4, None)
        if found is None:
            return None
        start = found
    return _walk(mpeg, start, start - begin)


def skip_tags(descriptor: int) -> int:
    """The first byte of a file that belongs to no tag."""
    return _Mpeg(descriptor).skip_tags()


def _walk(mpeg: _Mpeg, start: int, num_before: int) -> MpegAudio:
    first = mpeg.frame(start)
    assert first is not None
    parts: list[tuple[int, int]] = []
    num_frames, lost_at, at = 0, 0.0, start
    lost_bytes = num_before if num_before > MAX_FRAME else 0  # else the rest of a frame
    is_joined = False
    while True:
        begin = at
        while (frame := mpeg.frame(at)) and frame.kind == first.kind:
            num_frames += 1
            at += frame.num_bytes
        if at > begin:
            parts.append((begin, at - begin))
        if size := mpeg.tag(at):
            at += size
            continue
        following = mpeg.find(at, mpeg.size, 2, first.kind)
        if following is None:
            other = mpeg.find(at, at + MAX_JUNK, 4, None)
            is_joined = other is not None
            rest = mpeg.frame(at, is_whole=False)
            break
        lost_at = lost_at if lost_bytes else num_frames * first.seconds
        lost_bytes += following - at
        at = following
    num_stated, patches = _read_length(
        mpeg.peek(start, 200), sum(size for _, size in parts), num_frames
    )
    has_length = num_stated is not None
    return MpegAudio(
        parts,
        patches,
        first.num_bytes,
        has_length,
        (num_frames - has_length) * first.seconds,
        None if num_stated is None else num_stated * first.seconds,
        lost_bytes,
        lost_at,
        is_joined,
        rest is not None and rest.kind == first.kind,
    )


def _read_length(
    frame: bytes, num_bytes: int, num_frames: int
) -> tuple[int | None, dict[int, bytes]]:
    """Frames that a first frame (Xing, VBRI) states after itself, and what it should say."""
    at = max(frame[:64].find(b"Xing"), frame[:64].find(b"Info"))
    if at >= 0 and frame[at + 7] & 1:
        frames_at, bytes_at = at + 8, at + 12 if frame[at + 7] & 2 else None
    elif (at := frame[:64].find(b"VBRI")) >= 0:
        frames_at, bytes_at = at + 14, at + 10
    else:
        return None, {}
    patches = {frames_at: (num_frames - 1).to_bytes(4)}
    if bytes_at is not None:
        patches[bytes_at] = min(num_bytes, 2**32 - 1).to_bytes(4)
    return int.from_bytes(frame[frames_at : frames_at + 4]), patches


# --- Ogg ---


class OggPages(NamedTuple):
    """What the pages of an Ogg file tell.

    Attributes:
      num_pages: whole pages.
      num_lost: places where pages are damaged or missing.
      lost_at: seconds into the sound where the first of them is; None if its rate is unknown.
      is_ended: whether the last page is marked as the end.
      is_joined: whether another recording follows the first.
    """

    num_pages: int
    num_lost: int
    lost_at: float | None
    is_ended: bool
    is_joined: bool


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _is_whole(page: bytearray) -> bool:
    """Whether a page has its checksum: zlib's CRC with the bits of each byte turned round."""
    stated, page[22:26] = int.from_bytes(page[22:26], "little"), bytes(4)
    reverse = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return stated == int(f"{reverse:032b}"[::-1], 2)


def read_ogg_pages(descriptor: int) -> OggPages:
    """Checks all pages of an Ogg file."""
    num_pages, num_lost, granule, rate = 0, 0, 0, 0
    lost_at: float | None = None
    numbers: dict[bytes, int] = {}  # of the last page of each stream
    unended: set[bytes] = set()
    is_sound = is_joined = False
    for is_after_junk, page in _pages(descriptor):
        num_pages += 1
        flags, serial, number = page[5], bytes(page[14:18]), int.from_bytes(page[18:22], "little")
        if flags & 2:  # the first page of a stream
            is_joined |= is_sound
            unended.add(serial)
            rate = rate or _rate(page)
        elif number != numbers.get(serial, -1) + 1 and (is_sound or is_after_junk):
            # Without junk, what follows the headers is a broadcast that was tuned in to.
            lost_at = granule / rate if rate and not num_lost else lost_at
            num_lost += 1
        numbers[serial] = number
        position = int.from_bytes(page[6:14], "little", signed=True)
        if position > 0:
            granule, is_sound = position, True
        if flags & 4:
            unended.discard(serial)
    return OggPages(num_pages, num_lost, lost_at, not unended, is_joined)


def _rate(page: bytes | bytearray) -> int:
    """Granules a second, by the first page of a stream; 0 if it is of no kind known here."""
    content = page[27 + page[26] :]
    if content[:8] == b"OpusHead":
        return 48000
    return int.from_bytes(content[12:16], "little") if content[:7] == b"\x01vorbis" else 0


def _pages(descriptor: int) -> Iterator[tuple[bool, bytearray]]:
    """(whether something else lies before it, page) for each whole page."""
    file = io.BufferedReader(io.FileIO(descriptor, closefd=False), 2**17)
    size, at, is_after_junk = os.fstat(descriptor).st_size, 0, False
    while at < size:
        file.seek(at)
        head = file.read(27)
        if head[:5] == b"OggS\0" and len(head) == 27:
            table = file.read(head[26])
            page = bytearray(head + table + file.read(sum(table)))
            if len(page) == 27 + head[26] + sum(table) and _is_whole(page):
                page[22:26] = head[22:26]
                yield is_after_junk, page
                at, is_after_junk = at + len(page), False
                continue
        is_after_junk = True
        file.seek(at + 1)
        block = file.read(2**16)
        found = block.find(b"OggS")
        at += 1 + (found if found >= 0 else max(len(block) - 3, 1))
