"""MIDI files <-> notes, and the names of the General MIDI instruments."""

from __future__ import annotations

import difflib
import os
import pathlib
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import pretty_midi

from mt3_keras.files import replacing
from mt3_keras.notes import Note, PedalChange, apply_sustain, sort_notes

SUSTAIN_CONTROL = 64
# 120 beats a minute at 500 ticks a beat: one tick is 1 ms, so MT3's 10 ms grid is stored exactly.
BEATS_PER_MINUTE, TICKS_PER_BEAT = 120.0, 500


class MidiError(ValueError):
    """A MIDI file that cannot be read."""


class Instrument(NamedTuple):
    """One part of a MIDI file, pedal not yet applied to its notes."""

    name: str
    program: int
    is_drum: bool
    notes: list[Note]
    pedal: list[PedalChange]


def read_instruments(path: str | os.PathLike[str]) -> list[Instrument]:
    """Reads the parts of a MIDI file, those without notes included.

    Notes of no duration or velocity 0 are left out, pitch bends are ignored.

    Raises:
      MidiError: the file is missing, damaged or no MIDI file.
    """
    path = pathlib.Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tempo changes off track 0: harmless and common
            midi = pretty_midi.PrettyMIDI(str(path))
    except OSError as error:
        reason = error.strerror or "it is damaged or cut short: get it again"
        raise MidiError(f"{path}: cannot read the MIDI file ({reason})") from error
    except Exception as error:  # the MIDI parser raises a dozen types on damaged input
        raise MidiError(
            f"{path}: not a readable MIDI file ({error or type(error).__name__})"
        ) from error
    return [_to_instrument(part) for part in midi.instruments]


def _to_instrument(part: pretty_midi.Instrument) -> Instrument:
    program = 0 if part.is_drum else int(part.program)  # numpy.int64 for some files
    notes = [
        Note(float(n.start), float(n.end), n.pitch, n.velocity, program, part.is_drum)
        for n in part.notes
        if n.end > n.start >= 0 and n.velocity > 0
    ]
    pedal = [
        PedalChange(float(c.time), c.value >= 64)
        for c in part.control_changes
        if c.number == SUSTAIN_CONTROL
    ]
    return Instrument(part.name, program, part.is_drum, sort_notes(notes), pedal)


def read_midi(path: str | os.PathLike[str], *, sustain: bool = True) -> list[Note]:
    """Reads all notes of a MIDI file, ordered by onset.

    Args:
      sustain: lengthen notes as the sustain pedal does.

    Raises:
      MidiError: the file is missing, damaged or no MIDI file.
    """
    notes: list[Note] = []
    for part in read_instruments(path):
        notes += apply_sustain(part.notes, part.pedal) if sustain else part.notes
    return sort_notes(notes)


def write_midi(notes: Iterable[Note], path: str | os.PathLike[str]) -> None:
    """Writes notes as a MIDI file, one track for each instrument, named as in General MIDI.

    Times are rounded to 1 ms. The file appears whole or not at all. MIDI has 15 melodic channels:
    from the 16th instrument on, tracks share channels.
    """
    midi = pretty_midi.PrettyMIDI(resolution=TICKS_PER_BEAT, initial_tempo=BEATS_PER_MINUTE)
    parts: dict[tuple[bool, int], pretty_midi.Instrument] = {}
    for note in sort_notes(notes):
        key = (note.is_drum, 0 if note.is_drum else note.program)
        if key not in parts:
            parts[key] = pretty_midi.Instrument(key[1], key[0], instrument_name(key[1], key[0]))
        onset = round(note.onset, 3)
        parts[key].notes.append(
            pretty_midi.Note(
                int(note.velocity), int(note.pitch), onset, max(round(note.offset, 3), onset + 1e-3)
            )
        )
    midi.instruments = [parts[key] for key in sorted(parts)]
    with replacing(path) as temporary:
        midi.write(str(temporary))


def instrument_name(program: int, is_drum: bool) -> str:
    """General MIDI name of a program (0 to 127), or "Drums"."""
    return "Drums" if is_drum else pretty_midi.program_to_instrument_name(program)


def parse_instruments(text: str) -> tuple[frozenset[int], bool]:
    """Reads a list such as "piano, 33, Violin, drums".

    Args:
      text: names or numbers, separated by commas: a General MIDI instrument ("Acoustic Bass"), a
        class ("Bass": all eight), a program number (0 to 127) or "drums".

    Returns:
      The programs named and whether drums are.

    Raises:
      ValueError: a name is unknown; the message suggests similar ones.
    """
    names: dict[str, set[int]] = {}
    for program in range(128):
        for name in (
            pretty_midi.program_to_instrument_class(program),
            pretty_midi.program_to_instrument_name(program),
        ):
            names.setdefault(name.lower(), set()).add(program)
    programs: set[int] = set()
    drums = False
    for item in filter(None, (part.strip() for part in text.split(","))):
        if item.lower() in ("drums", "drum"):
            drums = True
        elif item.isdigit() and int(item) < 128:
            programs.add(int(item))
        elif item.lower() in names:
            programs |= names[item.lower()]
        else:
            close = difflib.get_close_matches(item.lower(), [*names, "drums"], n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(close)}?"
                if close
                else "use General MIDI names or 0 to 127"
            )
            raise ValueError(f"unknown instrument {item!r}: {hint}")
    if not programs and not drums:
        raise ValueError("no instrument named: use General MIDI names, 0 to 127 or drums")
    return frozenset(programs), drums
