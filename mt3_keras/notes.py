"""Notes, and the clean-up that data sets need before notes can be encoded."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

GRANULARITIES = ("flat", "midi_class", "full")
MIN_DURATION = 0.01  # seconds; also the length of drum hits and of notes without offsets


class Note(NamedTuple):
    """One note. Times in seconds; pitch, velocity and program as in MIDI (0 to 127).

    For drums `pitch` names the drum and `program` is 0.

    Example:
      >>> from mt3_keras import Note
      >>> note = Note(onset=0.5, offset=1.25, pitch=69, velocity=80, program=40)
      >>> note.offset - note.onset
      0.75
    """

    onset: float
    offset: float
    pitch: int
    velocity: int
    program: int = 0
    is_drum: bool = False


class OpenNote(NamedTuple):
    """A note that has begun and not ended; `confidence` of its onset, where there is one."""

    onset: float
    velocity: int
    confidence: float | None = None

    def end(self, time: float, program: int, pitch: int) -> Note:
        """The note, ended at `time` or after `MIN_DURATION`."""
        offset = max(time, self.onset + MIN_DURATION)
        return Note(self.onset, offset, pitch, self.velocity, program, False)


class PedalChange(NamedTuple):
    """The sustain pedal (MIDI control 64) going down or up at `time`, in seconds."""

    time: float
    is_down: bool


def sort_notes(notes: Iterable[Note]) -> list[Note]:
    """By onset, then drums last, program, pitch and offset."""
    return sorted(notes, key=lambda n: (n.onset, n.is_drum, n.program, n.pitch, n.offset))


def describe_notes(notes: Collection[Note]) -> str:
    """How many, of how many instruments, in words."""
    num_instruments = len({(note.program, note.is_drum) for note in notes})
    counts = ((len(notes), "note"), (num_instruments, "instrument"))
    return ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts)


def check_notes(notes: Iterable[Note]) -> None:
    """Raises ValueError for the first note that cannot be encoded."""
    for note in notes:
        if not note.onset < note.offset:
            raise ValueError(f"a note must end after it starts: {note}")
        if note.onset < 0:
            raise ValueError(f"a note must not start before 0 s: {note}")
        if not 1 <= note.velocity <= 127:
            raise ValueError(f"velocity must be 1 to 127: {note}")
        if not 0 <= note.pitch <= 127:
            raise ValueError(f"pitch must be 0 to 127: {note}")
        if not 0 <= note.program <= 127:
            raise ValueError(f"program must be 0 to 127: {note}")


def map_program(program: int, granularity: str) -> int:
    """The program that stands for `program`: itself, the first of its class of 8, or 0."""
    if granularity == "full":
        return program
    if granularity == "midi_class":
        return 8 * (program // 8)
    if granularity == "flat":
        return 0
    raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}: got {granularity!r}")


def trim_overlaps(notes: Iterable[Note]) -> list[Note]:
    """Ends each note at the next onset of the same pitch, program and drum flag.

    Notes left without duration are dropped. The original does this for Slakh and Cerberus4
    training targets only.
    """
    by_key: dict[tuple[int, int, bool], list[Note]] = {}
    for note in sorted(notes, key=lambda n: n.onset):
        by_key.setdefault((note.pitch, note.program, note.is_drum), []).append(note)
    trimmed = []
    for same_key in by_key.values():
        for note, following in itertools.zip_longest(same_key, same_key[1:]):
            offset = min(note.offset, following.onset) if following else note.offset
            if offset > note.onset:
                trimmed.append(note._replace(offset=offset))
    return sort_notes(trimmed)


def apply_sustain(notes: Sequence[Note], pedal: Iterable[PedalChange]) -> list[Note]:
    """Lengthens notes that the sustain pedal holds, by the rule of note-seq.

    A note released while the pedal is down lasts until the pedal rises or the same pitch is struck
    again. At equal times the order is pedal down, pedal up, note on, note off. What still sounds
    at the end of the last event ends there.

    Args:
      notes: of one instrument; drums are returned as they are.
      pedal: the instrument's changes of control 64.
    """
    held = [n for n in notes if not n.is_drum]
    events: list[tuple[float, int, int]] = []
    events += [(change.time, 0 if change.is_down else 1, -1) for change in pedal]
    events += [(note.onset, 2, i) for i, note in enumerate(held)]
    events += [(note.offset, 3, i) for i, note in enumerate(held)]
    offsets = [note.offset for note in held]
    is_down, time = False, 0.0
    sounding: dict[int, dict[int, None]] = {}  # of each pitch, indices into held
    released: dict[int, None] = {}  # of these, those that only the pedal holds
    for time, kind, index in sorted(events, key=lambda e: e[:2]):
        if kind == 0:
            is_down = True
        elif kind == 1:
            is_down = False
            for i in released:
                offsets[i] = time
                del sounding[held[i].pitch][i]
            released.clear()
        elif kind == 2:
            of_pitch = sounding.setdefault(held[index].pitch, {})
            if is_down:
                for i in of_pitch:
                    offsets[i] = time
                    released.pop(i, None)
                of_pitch.clear()
            of_pitch[index] = None
        elif index in sounding[held[index].pitch]:
            if is_down:
                released[index] = None
            else:
                del sounding[held[index].pitch][index]
    for i in itertools.chain.from_iterable(sounding.values()):
        offsets[i] = time
    sustained = [
        note._replace(offset=offset)
        for note, offset in zip(held, offsets, strict=True)
        if offset > note.onset  # struck twice at once under the pedal: one of the two remains
    ]
    return sort_notes([*sustained, *(n for n in notes if n.is_drum)])


def join_times(notes: Iterable[Note], seconds: float) -> list[Note]:
    """Gives what begins or ends almost together one time.

    Onsets and offsets (not of drums) within `seconds` of the first of them get the mean of the
    onsets among them, of the offsets where there is none. A chord whose notes begin a few
    milliseconds apart would else be encoded as a sequence that nobody perceives.
    """
    notes = list(notes)
    moments = [(note.onset, True) for note in notes]
    moments += [(note.offset, False) for note in notes if not note.is_drum]
    joined: dict[float, float] = {}
    group: list[tuple[float, bool]] = []
    for moment in [*sorted(moments), (math.inf, True)]:
        if group and moment[0] - group[0][0] > seconds:
            onsets = [time for time, is_onset in group if is_onset]
            mean = statistics.fmean(onsets or [time for time, _ in group])
            joined |= {time: mean for time, _ in group}
            group = []
        group.append(moment)
    moved = []
    for note in notes:
        onset, offset = joined[note.onset], joined.get(note.offset, note.offset)
        if offset <= onset or note.is_drum:  # as long as it was
            offset = onset + (note.offset - note.onset)
        moved.append(note._replace(onset=onset, offset=offset))
    return sort_notes(moved)
