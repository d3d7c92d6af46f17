"""Standard MIDI files -> the notes, programs and pedals of their tracks, as players read them.

The events are read here and not by a library: mido and pretty_midi refuse a file for its first odd
byte, also in events that no note depends on, and know only the tempo of the first track. Specified
in "The Complete MIDI 1.0 Detailed Specification" (Standard MIDI Files 1.0, RP-001).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import logging
import os
from collections.abc import Iterable

from mt3_keras.files import open_regular

MAX_BYTES = 2**25  # of a file
MAX_EVENTS = 2**22  # of all kinds that are kept, in a track and in a file
MAX_TRACKS = 2**16
MAX_SECONDS = 100 * 3600.0  # of a piece: what is longer has a damaged time in it
NOTE_OFF, NOTE_ON, CONTROL, PROGRAM = 0x80, 0x90, 0xB0, 0xC0
SUSTAIN_CONTROL, SOUND_OFF_CONTROL, NOTES_OFF_CONTROL = 64, 120, 123
_CONTROLS = (SUSTAIN_CONTROL, SOUND_OFF_CONTROL, NOTES_OFF_CONTROL)
_NUM_DATA_BYTES = {0x80: 2, 0x90: 2, 0xA0: 2, 0xB0: 2, 0xC0: 1, 0xD0: 1, 0xE0: 2}
_NUM_SYSTEM_DATA_BYTES = {0xF1: 1, 0xF2: 2, 0xF3: 1}
_DEFAULT_TEMPO = 500_000  # microseconds for a beat
_logger = logging.getLogger(__name__)


class MidiError(ValueError):
    """A MIDI file that cannot be read; one line that names it, the reason and the cure."""


@dataclasses.dataclass
class Track:
    """What a track holds; times in ticks.

    Attributes:
      name: the track's name, or "".
      events: (time, kind, channel, first data byte, second), kind one of NOTE_OFF, NOTE_ON,
        CONTROL, PROGRAM; channel is 16 * port + channel. A NOTE_ON has a velocity above 0.
      tempos: (time, microseconds for a beat).
      signatures: (time, beats of a bar, note value of a beat: 4 is a quarter).
      end: time of its end.
      num_odd: notes left out because their pitch is above 127.
    """

    name: str = ""
    events: list[tuple[int, int, int, int, int]] = dataclasses.field(default_factory=list)
    tempos: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    signatures: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    end: int = 0
    num_odd: int = 0


class TempoMap:
    """Turns ticks into seconds.

    Args:
      division: as in the file's header: ticks a beat, or, with the top bit set, frames a second
        and ticks a frame; then no tempo counts.
      tempos: (time in ticks, microseconds for a beat), in any order; of several at one time the
        last counts.

    Attributes:
      ticks_per_beat: 0 where the file counts frames of a film, in which no beat is known.
    """

    def __init__(self, division: int, tempos: Iterable[tuple[int, int]]) -> None:
        self.ticks_per_beat = 0 if division & 0x8000 else division
        if division & 0x8000:
            frames_per_second = 256 - (division >> 8)
            rate = 30_000 / 1001 if frames_per_second == 29 else frames_per_second
            changes = [(0, 1 / (rate * (division & 0xFF)))]
        else:
            # pretty_midi's order of operations, so that labels are the same to the last bit.
            given = [(0, _DEFAULT_TEMPO), *sorted(tempos, key=lambda change: change[0])]
            scales = ((time, 60.0 / ((6e7 / tempo) * division)) for time, tempo in given)
            changes = [next(group) for _, group in itertools.groupby(scales, lambda c: c[1])]
        self._times = [time for time, _ in changes]
        self._seconds_per_tick = [seconds for _, seconds in changes]
        self._seconds = [0.0]
        for (time, scale), (following, _) in itertools.pairwise(changes):
            self._seconds.append(self._seconds[-1] + scale * (following - time))

    def to_seconds(self, time: int) -> float:
        """Seconds from the start, at `time` in ticks."""
        index = bisect.bisect_right(self._times, time) - 1
        return self._seconds[index] + self._seconds_per_tick[index] * (time - self._times[index])


def read_tracks(path: str | os.PathLike[str]) -> list[tuple[Track, TempoMap]]:
    """Reads the tracks of a MIDI file, each with the map of its times.

    Wrapping (RIFF, MacBinary), unknown chunks and events, and wrong sizes of tracks are passed
    over. Tempos hold for all tracks, in whichever they stand, but in files of format 2 for their
    own. A track ends with its end-of-track event or, lacking that, its chunk.

    Raises:
      MidiError: the file is missing, no regular file, no MIDI file, cut short or damaged, or it
        holds more than `MAX_BYTES` or `MAX_EVENTS`.
    """
    with open_regular(path, MidiError) as file:
        data = file.read(MAX_BYTES + 1) or b""
    if len(data) > MAX_BYTES:
        raise MidiError(f"{path}: is larger than {MAX_BYTES >> 20} MiB; split it")
    try:
        file_format, division, tracks = _read_chunks(data, os.fspath(path))
    except _DamageError as damage:
        raise MidiError(f"{path}: {damage}; copy or download it again") from None
    except _SizeError:
        raise MidiError(
            f"{path}: holds more than {MAX_EVENTS} events or {MAX_TRACKS} tracks; split it"
        ) from None
    if num_odd := sum(track.num_odd for track in tracks):
        _logger.warning("%s: %d notes of a pitch above 127 are left out", path, num_odd)
    if file_format == 2:
        return [(track, TempoMap(division, track.tempos)) for track in tracks]
    tempos = TempoMap(division, itertools.chain.from_iterable(track.tempos for track in tracks))
    return [(track, tempos) for track in tracks]


class _DamageError(Exception):
    """Why a file cannot be read."""


class _SizeError(Exception):
    """A file holds more than is read."""


def _read_chunks(data: bytes, path: str) -> tuple[int, int, list[Track]]:
    """Format, division and tracks."""
    # A wrapping may hold much before the file itself, text that is no MIDI file must not.
    at = data.find(b"MThd", 0, None if data[:4] == b"RIFF" else 1024)
    if at < 0:
        raise _DamageError("is not a MIDI file (it lacks the mark MThd)")
    header = data[at + 8 : at + 14]
    if len(header) < 6:
        raise _DamageError("is cut short in its header")
    file_format, num_stated, division = (int.from_bytes(header[i : i + 2]) for i in (0, 2, 4))
    if division == 0 or (division & 0x8000 and not division & 0xFF):
        raise _DamageError("states no length of a tick (division 0)")
    at += 8 + max(6, int.from_bytes(data[at + 4 : at + 8]))
    tracks: list[Track] = []
    num_events = 0
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8])
        if kind == b"MTrk":
            end = at + 8 + size
            if size in (0, 2**32 - 1) and not _is_chunk(data, end):  # a recorder was stopped
                end = len(data)
            track, at = _read_track(data, at + 8, end, len(tracks) + 1)
            tracks.append(track)
            num_events += len(track.events) + len(track.tempos) + len(track.signatures)
            if num_events > MAX_EVENTS or len(tracks) > MAX_TRACKS:
                raise _SizeError
        elif kind == b"MThd":
            _logger.warning("%s: holds several MIDI files; only the first is read", path)
            break
        elif _is_chunk(data, at):
            at += 8 + size
        else:
            at = data.find(b"MTrk", at)
            if at < 0:
                break
    if not tracks:
        raise _DamageError("holds no track")
    if len(tracks) < num_stated:
        text = "%s: holds %d of the %d tracks that its header states; it may have been cut short"
        _logger.warning(text, path, len(tracks), num_stated)
    return file_format, division, tracks


def _is_chunk(data: bytes, at: int) -> bool:
    """Whether a chunk may begin there, or the file ends."""
    kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8])
    return (
        at == len(data)
        or kind in (b"MTrk", b"MThd")
        or (kind.isalpha() and at + 8 + size <= len(data))
    )


def _read_track(data: bytes, start: int, stated_end: int, number: int) -> tuple[Track, int]:
    """The track that begins at byte `start`, and the byte at which the next chunk begins."""
    track = Track()
    at, status, port = start, 0, 0
    try:
        while not (at == stated_end and _is_chunk(data, at)):
            if len(track.events) + len(track.tempos) + len(track.signatures) > MAX_EVENTS:
                raise _SizeError
            delta, at = _read_variable(data, at)
            track.end += delta
            if data[at] >= 0x80:
                status_now = data[at]
                at += 1
                if status_now < 0xF0:
                    status = status_now
            elif not status:
                raise _DamageError(f"is damaged: track {number} begins within an event")
            else:
                status_now = status  # players keep it over meta and system events too
            if status_now < 0xF0:
                kind, channel = status_now & 0xF0, 16 * port + (status_now & 0x0F)
                end = at + _NUM_DATA_BYTES[kind]
                first, second = data[at], data[end - 1]
                at = end
                _add_event(track, kind, channel, first, second)
            elif status_now == 0xFF:
                kind = data[at]
                size, at = _read_variable(data, at + 1)
                content = data[at : at + size]
                if len(content) < size:
                    raise IndexError
                at += size
                if kind == 0x2F:
                    break
                port = content[0] % 128 if kind == 0x21 and content else port
                _add_meta(track, kind, content)
            elif status_now in (0xF0, 0xF7):
                size, at = _read_variable(data, at)
                at += size
            else:
                at += _NUM_SYSTEM_DATA_BYTES.get(status_now, 0)
    except IndexError:
        raise _DamageError(f"is cut short or damaged: track {number} has no end") from None
    is_early = at < stated_end <= len(data) and _is_chunk(data, stated_end)
    return track, stated_end if is_early else at


def _read_variable(data: bytes, at: int) -> tuple[int, int]:
    """A number of one to four bytes, and the byte after it."""
    value = 0
    for _ in range(4):
        byte = data[at]
        at += 1
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at
    raise _DamageError("is damaged: a number in it has more than four bytes")


def _add_event(track: Track, kind: int, channel: int, first: int, second: int) -> None:
    if kind == NOTE_ON and not second:
        kind = NOTE_OFF
    if kind in (NOTE_ON, NOTE_OFF) and first > 127:
        track.num_odd += kind == NOTE_ON
    elif kind in (NOTE_ON, NOTE_OFF, PROGRAM) or (kind == CONTROL and first in _CONTROLS):
        track.events.append((track.end, kind, channel, min(first, 127), min(second, 127)))


def _add_meta(track: Track, kind: int, content: bytes) -> None:
    if kind == 0x51 and (tempo := int.from_bytes(content[:3])) and len(content) >= 3:
        track.tempos.append((track.end, tempo))
    elif kind == 0x58 and len(content) >= 2 and content[0] and content[1] < 8:
        track.signatures.append((track.end, content[0], 2 ** content[1]))
    elif kind == 0x03 and not track.name:
        try:
            track.name = content.decode()
        except UnicodeDecodeError:
            track.name = content.decode("latin-1")
