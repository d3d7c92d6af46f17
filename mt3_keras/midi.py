"""MIDI files <-> notes."""

from __future__ import annotations

import bisect
import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import mido

from mt3_keras.beats import Beats
from mt3_keras.files import replacing
from mt3_keras.instrument_names import instrument_name
from mt3_keras.midi_file import (
    CONTROL,
    MAX_SECONDS,
    NOTE_OFF,
    NOTE_ON,
    PROGRAM,
    SUSTAIN_CONTROL,
    MidiError,
    TempoMap,
    Track,
    read_tracks,
)
from mt3_keras.notes import Note, PedalChange, apply_sustain, sort_notes
from mt3_keras.tempo import TickMap, constant_ticks, follow_beats

__all__ = [
    "Instrument",
    "MidiError",
    "instrument_name",
    "read_instruments",
    "read_midi",
    "write_midi",
]

DRUM_CHANNEL = 9
MELODIC_CHANNELS = [channel for channel in range(16) if channel != DRUM_CHANNEL]
_logger = logging.getLogger(__name__)


class Instrument(NamedTuple):
    """One part of a MIDI file, pedal not yet applied to its notes."""

    name: str
    program: int
    is_drum: bool
    notes: list[Note]
    pedal: list[PedalChange]


def read_instruments(path: str | os.PathLike[str]) -> list[Instrument]:
    """Reads the parts of a MIDI file: what one program plays in one channel of one track.

    A note has the program that its own track gave its channel, else that which another track gave
    it. Notes still held where their track ends, end there, or with the next strike of their key.
    Left out: notes of no duration (but drums, which last a tick) and pitch bends.

    Raises:
      MidiError: the file cannot be read (see `read_tracks`), or lasts more than `MAX_SECONDS`.
    """
    tracks = read_tracks(path)
    programs: dict[int, list[tuple[int, int]]] = {}  # of each channel, in all tracks
    for track, _ in tracks:
        for time, kind, channel, program, _ in track.events:
            if kind == PROGRAM:
                programs.setdefault(channel, []).append((time, program))
    for changes in programs.values():
        changes.sort(key=lambda change: change[0])
    instruments: list[Instrument] = []
    for track, tempos in tracks:
        parts = _Parts(programs)
        parts.read(track)
        instruments += parts.to_instruments(track.name, tempos)
    last = max((note.offset for part in instruments for note in part.notes), default=0.0)
    if last > MAX_SECONDS:
        raise MidiError(
            f"{path}: lasts {last / 3600:.0f} hours by its own account, so a time in it is damaged;"
            " copy or download it again"
        )
    return instruments


class _Held(NamedTuple):
    """A note that has begun; onset in ticks."""

    onset: int
    velocity: int
    program: int


class _Parts:
    """The parts of one track, as its events come.

    Args:
      programs: the program changes of each channel in all tracks: (time in ticks, program).
    """

    def __init__(self, programs: dict[int, list[tuple[int, int]]]) -> None:
        self._programs = programs
        self._own: dict[int, int] = {}  # the program of each channel, if this track gave it one
        self._held: dict[tuple[int, int], list[_Held]] = {}  # by channel and pitch
        self._notes: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
        self._pedals: dict[int, list[tuple[int, bool]]] = {}  # by channel

    def read(self, track: Track) -> None:
        """Takes all events of the track."""
        for time, kind, channel, first, second in track.events:
            if kind == NOTE_ON:
                held = _Held(time, second, self._program(channel, time))
                self._held.setdefault((channel, first), []).append(held)
            elif kind == NOTE_OFF:
                self._release(channel, first, time)
            elif kind == PROGRAM:
                self._own[channel] = first
            elif kind == CONTROL and first == SUSTAIN_CONTROL:
                self._pedals.setdefault(channel, []).append((time, second >= 64))
            else:  # all notes off, all sound off
                for key in [key for key in self._held if key[0] == channel]:
                    self._release(*key, time)
        for (channel, pitch), still_held in self._held.items():
            ends = [note.onset for note in still_held[1:]] + [track.end]
            for note, end in zip(still_held, ends, strict=True):
                self._add(channel, pitch, note, end)

    def _program(self, channel: int, time: int) -> int:
        if channel in self._own:
            return self._own[channel]
        changes = self._programs.get(channel, [])
        index = bisect.bisect_right(changes, time, key=lambda change: change[0])
        return changes[index - 1][1] if index else 0

    def _release(self, channel: int, pitch: int, time: int) -> None:
        """Ends all notes of the key; one that has just begun sounds on, if there are others."""
        held = self._held.pop((channel, pitch), [])
        ended = [note for note in held if note.onset < time]
        if ended and len(ended) < len(held):
            self._held[channel, pitch] = held[len(ended) :]
            held = ended
        for note in held:
            self._add(channel, pitch, note, time)

    def _add(self, channel: int, pitch: int, note: _Held, end: int) -> None:
        is_drum = channel % 16 == DRUM_CHANNEL
        if is_drum:  # a strike sounds, however soon it is released
            end = max(end, note.onset + 1)
        if end > note.onset:
            key = (channel, 0 if is_drum else note.program)
            self._notes.setdefault(key, []).append((note.onset, end, pitch, note.velocity))

    def to_instruments(self, name: str, tempos: TempoMap) -> list[Instrument]:
        """The parts, times in seconds."""
        instruments = []
        for (channel, program), notes in self._notes.items():
            is_drum = channel % 16 == DRUM_CHANNEL
            seconds = tempos.to_seconds
            timed = sort_notes(
                Note(seconds(onset), seconds(end), pitch, velocity, program, is_drum)
                for onset, end, pitch, velocity in notes
            )
            pedal = [
                PedalChange(seconds(time), is_down)
                for time, is_down in self._pedals.get(channel, [])
            ]
            instruments.append(Instrument(name, program, is_drum, timed, pedal))
        return instruments


def read_midi(path: str | os.PathLike[str], *, sustain: bool = True) -> list[Note]:
    """Reads all notes of a MIDI file, ordered by onset.

    Args:
      path: of the file.
      sustain: lengthen notes as the sustain pedal does.

    Raises:
      MidiError: the file is missing, damaged or no MIDI file.

    Example:
      >>> import pathlib, tempfile
      >>> from mt3_keras import Note, read_midi, write_midi
      >>> path = pathlib.Path(tempfile.mkdtemp(), "song.mid")
      >>> write_midi([Note(0.5, 1.0, pitch=60, velocity=100)], path)
      >>> read_midi(path)
      [Note(onset=0.5, offset=1.0, pitch=60, velocity=100, program=0, is_drum=False)]
    """
    notes: list[Note] = []
    for part in read_instruments(path):
        notes += apply_sustain(part.notes, part.pedal) if sustain and part.pedal else part.notes
    return sort_notes(notes)


@dataclasses.dataclass
class _Part:
    """The track of one instrument, as it is written; times in ticks.

    Attributes:
      name: of the track.
      notes: (onset, offset, pitch, velocity), by onset.
      channels: of each note.
      programs: (time, channel): where the program of a channel is set.
    """

    program: int
    is_drum: bool
    name: str
    notes: list[tuple[int, int, int, int]]
    channels: list[int] = dataclasses.field(default_factory=list)
    programs: list[tuple[int, int]] = dataclasses.field(default_factory=list)


def write_midi(
    notes: Iterable[Note],
    path: str | os.PathLike[str],
    *,
    beats: Beats | None = None,
    text: str = "",
    track_names: Mapping[Note, str] | None = None,
) -> None:
    """Writes notes as a MIDI file, one track for each instrument, named as in General MIDI.

    Times in seconds are kept, whatever the beats: they are rounded to a tick, which lasts 1 ms or,
    in pieces of more than an hour, up to 10 ms (see `tempo`). The file appears whole or not at all.
    MIDI has 15 melodic channels: from the 16th instrument on, one that begins takes the channel of
    one that is silent, and the track has a port of its own for players that know of ports.

    Args:
      notes: in any order.
      path: the file.
      beats: what the tempos and time signatures of the file follow. None writes 120 beats a minute
        and no time signature, which say nothing of the music.
      text: a text event at the start, such as what wrote the notes.
      track_names: of notes whose track has a name of its own: they share it with none that have
        another.

    Raises:
      OSError: the file cannot be written.
      ValueError: a time, pitch, velocity or program that MIDI cannot hold.

    Example: see `read_midi`.
    """
    notes = sort_notes(notes)
    end = max((note.offset for note in notes), default=0.0)
    ticks = follow_beats(beats, end) if beats else constant_ticks(end)
    parts: dict[tuple[bool, int, str], _Part] = {}
    for note in notes:
        program = 0 if note.is_drum else int(note.program)
        name = (track_names or {}).get(note) or instrument_name(program, note.is_drum)
        key = (note.is_drum, program, name)
        onset, offset = ticks.to_ticks(note.onset), ticks.to_ticks(note.offset)
        part = parts.setdefault(key, _Part(program, note.is_drum, name, []))
        part.notes.append((onset, max(offset, onset + 1), int(note.pitch), int(note.velocity)))
    ordered = [parts[key] for key in sorted(parts)]
    _assign_channels(ordered, path)
    midi = mido.MidiFile(ticks_per_beat=ticks.resolution, charset="utf-8")
    midi.tracks.append(_conductor_track(ticks, text))
    for index, part in enumerate(ordered):  # drums are the last
        port = 0 if part.is_drum else index // len(MELODIC_CHANNELS)
        midi.tracks.append(_to_track(part, port))
    with replacing(path) as temporary:
        midi.save(temporary)


def _conductor_track(ticks: TickMap, text: str) -> mido.MidiTrack:
    """The first track: what wrote the file, time signatures and tempos."""
    events: list[tuple[int, mido.MetaMessage]] = []
    if text:
        events.append((0, mido.MetaMessage("text", text=text)))
    for time, count, value in ticks.signatures:
        events.append(
            (time, mido.MetaMessage("time_signature", numerator=count, denominator=value))
        )
    events += [(time, mido.MetaMessage("set_tempo", tempo=tempo)) for time, tempo in ticks.tempos]
    track = mido.MidiTrack()
    before = 0
    for time, message in sorted(events, key=lambda event: event[0]):
        track.append(message.copy(time=time - before))
        before = time
    track.append(mido.MetaMessage("end_of_track", time=1))
    return track


def _assign_channels(parts: Sequence[_Part], path: str | os.PathLike[str]) -> None:
    """Gives each note a channel, and each channel its program before the notes that need it."""
    owners: dict[int, _Part] = {}  # who has a melodic channel
    held: dict[int, dict[int, int]] = {channel: {} for channel in MELODIC_CHANNELS}  # pitch -> end
    ends = dict.fromkeys(MELODIC_CHANNELS, -1)
    melodic = [part for part in parts if not part.is_drum]
    for channel, part in zip(MELODIC_CHANNELS, melodic, strict=False):
        owners[channel] = part
        part.programs.append((0, channel))
    for part in parts:
        if part.is_drum:
            part.programs.append((0, DRUM_CHANNEL))
            part.channels = [DRUM_CHANNEL] * len(part.notes)
    own = {id(part): channel for channel, part in owners.items()}
    num_cut = 0
    order = ((*note[:3], part) for part in melodic for note in part.notes)
    for onset, offset, pitch, part in sorted(order, key=lambda note: note[0]):
        channel = own.get(id(part), -1)
        if channel < 0:

            def rank(c: int, onset: int = onset, pitch: int = pitch) -> tuple[bool, bool, int]:
                return held[c].get(pitch, -1) >= onset, ends[c] >= onset, ends[c]

            channel = min(MELODIC_CHANNELS, key=rank)
            num_cut += held[channel].get(pitch, -1) >= onset
            if channel in owners:
                del own[id(owners[channel])]
            owners[channel] = part
            own[id(part)] = channel
            part.programs.append((onset, channel))
        part.channels.append(channel)
        held[channel][pitch] = max(offset, held[channel].get(pitch, -1))
        ends[channel] = max(ends[channel], offset)
    if num_cut:
        _logger.warning(
            "%s: %d notes are struck while another instrument holds their pitch in their channel,"
            " for MIDI has 15 channels; a player without ports may cut them short",
            path,
            num_cut,
        )


def _to_track(part: _Part, port: int) -> mido.MidiTrack:
    # (time, rank, channel, pitch, velocity); at one time notes end, programs change, notes begin.
    events = [(time, 1, channel, 0, 0) for time, channel in part.programs]
    for (onset, offset, pitch, velocity), channel in zip(part.notes, part.channels, strict=True):
        events += [(onset, 2, channel, pitch, velocity), (offset, 0, channel, pitch, 0)]
    track = mido.MidiTrack([mido.MetaMessage("track_name", name=part.name)])
    if port:
        track.append(mido.MetaMessage("midi_port", port=port))
    before = 0
    for time, rank, channel, pitch, velocity in sorted(events):
        values = {"channel": channel, "time": time - before}
        if rank == 1:
            track += _set_program(part, channel, time - before)
        else:
            track.append(mido.Message("note_on", note=pitch, velocity=velocity, **values))
        before = time
    track.append(mido.MetaMessage("end_of_track", time=1))
    return track


def _set_program(part: _Part, channel: int, delta: int) -> list[mido.Message]:
    """Chooses General MIDI's bank and the part's program; drums have a bank of their own."""
    messages = []
    if not part.is_drum:
        messages = [
            mido.Message("control_change", channel=channel, control=control, value=0)
            for control in (0, 32)
        ]
    messages.append(mido.Message("program_change", channel=channel, program=part.program))
    messages[0].time = delta
    return messages
