"""Scores -> MusicXML 4.0 (https://www.w3.org/2021/06/musicxml40/)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from mt3_keras.instrument_names import instrument_name
from mt3_keras.score import QUARTER, Bar, Chord, Part, Score, Staff

# Units -> note type and dots; lengths that none of them is are written as several, tied.
TYPES = {
    72: ("whole", 1),
    48: ("whole", 0),
    36: ("half", 1),
    24: ("half", 0),
    18: ("quarter", 1),
    12: ("quarter", 0),
    9: ("eighth", 1),
    6: ("eighth", 0),
    3: ("16th", 0),
}
TRIPLET_TYPES = {4: "eighth", 8: "quarter"}
_NAMES = ("F", "C", "G", "D", "A", "E", "B")  # along the line of fifths, from -1
_CLASSES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
# Programs -> semitones from the written to the sounding pitch, of instruments that transpose.
TRANSPOSITIONS = {
    9: 24, 12: 0, 13: 12, 43: -12, 56: -2, 59: -2, 60: -7, 64: -2, 65: -9, 66: -14, 67: -21, 69: -7,
    71: -2, 72: 12,
}  # fmt: skip
_OCTAVE_CLEFS = frozenset(range(24, 40))  # guitars and basses: notated an octave above their sound
# Drum keys -> place on the staff and notehead; hands and feet are told apart in `score`.
DRUMS = {
    35: ("E", 4, ""), 36: ("F", 4, ""), 37: ("C", 5, "x"), 38: ("C", 5, ""), 39: ("C", 5, "cross"),
    40: ("C", 5, ""), 41: ("G", 4, ""), 42: ("G", 5, "x"), 43: ("A", 4, ""), 44: ("D", 4, "x"),
    45: ("B", 4, ""), 46: ("G", 5, "circle-x"), 47: ("D", 5, ""), 48: ("D", 5, ""),
    49: ("A", 5, "x"), 50: ("E", 5, ""), 51: ("F", 5, "x"), 52: ("B", 5, "x"),
    53: ("F", 5, "diamond"), 55: ("B", 5, "x"), 57: ("A", 5, "x"), 59: ("F", 5, "x"),
}  # fmt: skip
_OTHER_DRUM = ("E", 5, "triangle")


class Piece(NamedTuple):
    """A note, chord or rest (no pitches) as it is written: within a bar, of one note type."""

    start: int
    length: int
    pitches: tuple[int, ...]
    is_tied_before: bool
    is_tied_after: bool
    is_triplet: bool


def to_musicxml(score: Score) -> str:
    """The text of a MusicXML file.

    Args:
      score: of at least one bar; see `score.make_score`.
    """
    root = Element("score-partwise", version="4.0")
    if score.title:
        SubElement(SubElement(root, "work"), "work-title").text = score.title
    encoding = SubElement(SubElement(root, "identification"), "encoding")
    SubElement(encoding, "software").text = "mt3-keras"
    parts = SubElement(root, "part-list")
    for number, part in enumerate(score.parts, 1):
        _add_heading(parts, part, number)
    for number, part in enumerate(score.parts, 1):
        element = SubElement(root, "part", id=f"P{number}")
        _PartWriter(score, part, number).write(element)
    indent(root, " ")
    heading = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE score-partwise PUBLIC '
        '"-//Recordare//DTD MusicXML 4.0 Partwise//EN" '
        '"http://www.musicxml.org/dtds/partwise.dtd">\n'
    )
    return heading + tostring(root, encoding="unicode") + "\n"


def _add_heading(parts: Element, part: Part, number: int) -> None:
    """A part's name and sounds."""
    heading = SubElement(parts, "score-part", id=f"P{number}")
    name = "Drumset" if part.is_drum else instrument_name(part.program, False)
    SubElement(heading, "part-name").text = name
    channel = "10" if part.is_drum else str(_channel(number))
    pitches = sorted(
        {p for staff in part.staves for v in staff.voices for c in v for p in c.pitches}
    )
    keys = [f"P{number}-I{pitch}" for pitch in pitches] if part.is_drum else [f"P{number}-I1"]
    for key in keys:
        instrument = SubElement(heading, "score-instrument", id=key)
        SubElement(instrument, "instrument-name").text = name
    for pitch, key in zip(pitches if part.is_drum else [0], keys, strict=True):
        sound = SubElement(heading, "midi-instrument", id=key)
        SubElement(sound, "midi-channel").text = channel
        SubElement(sound, "midi-program").text = str(part.program + 1)
        if part.is_drum:
            SubElement(sound, "midi-unpitched").text = str(pitch + 1)


def _channel(number: int) -> int:
    """A channel other than that of drums, from 1."""
    return [channel for channel in range(1, 17) if channel != 10][(number - 1) % 15]


class _PartWriter:
    """Writes the bars of one part."""

    def __init__(self, score: Score, part: Part, number: int) -> None:
        self._score, self._part, self._number = score, part, number
        has_octave_clef = part.program in _OCTAVE_CLEFS
        self._transposition = 0 if has_octave_clef else TRANSPOSITIONS.get(part.program, 0)
        fifths = score.fifths + (-7 * self._transposition) % 12
        self._fifths = (fifths + 5) % 12 - 5 if self._transposition % 12 else score.fifths
        self._voices = [
            (staff_number, _voice_number(staff_number, voice_number), voice)
            for staff_number, staff in enumerate(part.staves, 1)
            for voice_number, voice in enumerate(staff.voices)
        ]

    def write(self, element: Element) -> None:
        """Adds all bars to the part's element."""
        queues = [_Written(voice, self._score, self._part) for _, _, voice in self._voices]
        length = 0
        for number, bar in enumerate(self._score.bars, 1):
            measure = SubElement(element, "measure", number=str(number))
            self._add_attributes(measure, bar, length)
            if number == 1 and self._number == 1:
                self._add_tempo(measure)
            length = bar.length
            is_first = True
            for (staff, voice, _), queue in zip(self._voices, queues, strict=True):
                pieces = queue.take(bar)
                is_empty = not any(piece.pitches for piece in pieces)
                if is_empty and not self._is_first_voice(voice):
                    continue  # a second voice that is silent is not written
                if not is_first:
                    backup = SubElement(measure, "backup")
                    SubElement(backup, "duration").text = str(bar.length)
                is_first = False
                if is_empty:
                    self._add_bar_rest(measure, bar, staff, voice)
                else:
                    self._add_pieces(measure, pieces, staff, voice)
        last = SubElement(element[-1], "barline", location="right")
        SubElement(last, "bar-style").text = "light-heavy"

    def _is_first_voice(self, voice: int) -> bool:
        return voice % 4 == 1

    def _add_attributes(self, measure: Element, bar: Bar, length_before: int) -> None:
        if bar.length == length_before:
            return
        attributes = SubElement(measure, "attributes")
        if not length_before:
            SubElement(attributes, "divisions").text = str(QUARTER)
            if not self._part.is_drum:
                key = SubElement(attributes, "key")
                SubElement(key, "fifths").text = str(self._fifths)
                SubElement(key, "mode").text = "minor" if self._score.is_minor else "major"
        time = SubElement(attributes, "time")
        is_compound = self._score.beat != QUARTER
        unit = QUARTER // 2 if is_compound else QUARTER
        SubElement(time, "beats").text = str(bar.length // unit)
        SubElement(time, "beat-type").text = "8" if is_compound else "4"
        if length_before:
            return
        if len(self._part.staves) > 1:
            SubElement(attributes, "staves").text = str(len(self._part.staves))
        for number, staff in enumerate(self._part.staves, 1):
            self._add_clef(attributes, number, staff)
        if self._transposition:
            self._add_transposition(attributes)

    def _add_clef(self, attributes: Element, number: int, staff: Staff) -> None:
        clef = SubElement(attributes, "clef", number=str(number))
        if self._part.is_drum:
            SubElement(clef, "sign").text = "percussion"
            return
        SubElement(clef, "sign").text = "F" if staff.is_low else "G"
        SubElement(clef, "line").text = "4" if staff.is_low else "2"
        if self._part.program in _OCTAVE_CLEFS:
            SubElement(clef, "clef-octave-change").text = "-1"

    def _add_transposition(self, attributes: Element) -> None:
        octaves, semitones = divmod(abs(self._transposition), 12)
        sign = 1 if self._transposition > 0 else -1
        steps = {0: 0, 2: 1, 7: 4, 9: 5}[semitones]
        transpose = SubElement(attributes, "transpose")
        SubElement(transpose, "diatonic").text = str(sign * steps)
        SubElement(transpose, "chromatic").text = str(sign * semitones)
        if octaves:
            SubElement(transpose, "octave-change").text = str(sign * octaves)

    def _add_tempo(self, measure: Element) -> None:
        is_compound = self._score.beat != QUARTER
        direction = SubElement(measure, "direction", placement="above")
        metronome = SubElement(SubElement(direction, "direction-type"), "metronome")
        SubElement(metronome, "beat-unit").text = "quarter"
        if is_compound:
            SubElement(metronome, "beat-unit-dot")
        rate = self._score.quarters_per_minute
        beats = rate * QUARTER / self._score.beat
        SubElement(metronome, "per-minute").text = str(round(beats))
        SubElement(direction, "sound", tempo=f"{rate:.2f}")

    def _add_bar_rest(self, measure: Element, bar: Bar, staff: int, voice: int) -> None:
        note = SubElement(measure, "note")
        SubElement(note, "rest", measure="yes")
        SubElement(note, "duration").text = str(bar.length)
        SubElement(note, "voice").text = str(voice)
        self._add_staff(note, staff)

    def _add_staff(self, note: Element, staff: int) -> None:
        if len(self._part.staves) > 1:
            SubElement(note, "staff").text = str(staff)

    def _add_pieces(
        self, measure: Element, pieces: Sequence[Piece], staff: int, voice: int
    ) -> None:
        beams = _beams(pieces, self._score.beat)
        groups = _tuplet_ends(pieces, self._score.beat)
        for piece, beam, tuplet in zip(pieces, beams, groups, strict=True):
            for number, pitch in enumerate(piece.pitches or (None,)):
                note = SubElement(measure, "note")
                if number:
                    SubElement(note, "chord")
                self._add_note(note, piece, pitch, staff, voice)
                self._add_staff(note, staff)
                if not number:
                    for level, state in enumerate(beam, 1):
                        SubElement(note, "beam", number=str(level)).text = state
                self._add_notations(note, piece, tuplet if not number else "")

    def _add_note(
        self, note: Element, piece: Piece, pitch: int | None, staff: int, voice: int
    ) -> None:
        notehead = ""
        if pitch is None:
            SubElement(note, "rest")
        elif self._part.is_drum:
            step, octave, notehead = DRUMS.get(pitch, _OTHER_DRUM)
            unpitched = SubElement(note, "unpitched")
            SubElement(unpitched, "display-step").text = step
            SubElement(unpitched, "display-octave").text = str(octave)
        else:
            self._add_pitch(note, pitch - self._transposition)
        SubElement(note, "duration").text = str(piece.length)
        if pitch is not None:
            for kind in _ties(piece):
                SubElement(note, "tie", type=kind)
            if self._part.is_drum:
                SubElement(note, "instrument", id=f"P{self._number}-I{pitch}")
        written = (TRIPLET_TYPES[piece.length], 0) if piece.is_triplet else TYPES[piece.length]
        SubElement(note, "voice").text = str(voice)
        SubElement(note, "type").text = written[0]
        for _ in range(written[1]):
            SubElement(note, "dot")
        if piece.is_triplet:
            modification = SubElement(note, "time-modification")
            SubElement(modification, "actual-notes").text = "3"
            SubElement(modification, "normal-notes").text = "2"
            SubElement(modification, "normal-type").text = "eighth"
        if pitch is not None and self._has_two_voices(staff):
            SubElement(note, "stem").text = "up" if self._is_first_voice(voice) else "down"
        if notehead:
            SubElement(note, "notehead").text = notehead

    def _has_two_voices(self, staff: int) -> bool:
        return len(self._part.staves[staff - 1].voices) > 1

    def _add_pitch(self, note: Element, pitch: int) -> None:
        step, alter, octave = spell(pitch, self._fifths)
        element = SubElement(note, "pitch")
        SubElement(element, "step").text = step
        if alter:
            SubElement(element, "alter").text = str(alter)
        SubElement(element, "octave").text = str(octave)

    def _add_notations(self, note: Element, piece: Piece, tuplet: str) -> None:
        ties = _ties(piece) if piece.pitches else []
        if not ties and not tuplet:
            return
        notations = SubElement(note, "notations")
        for kind in ties:
            SubElement(notations, "tied", type=kind)
        if tuplet:
            SubElement(notations, "tuplet", type=tuplet)


def _voice_number(staff: int, voice: int) -> int:
    """Voices 1 and 2 of the first staff, 5 and 6 of the second, as notation programs count."""
    return 4 * (staff - 1) + voice + 1


def _ties(piece: Piece) -> list[str]:
    return ["stop"] * piece.is_tied_before + ["start"] * piece.is_tied_after


def spell(pitch: int, fifths: int) -> tuple[str, int, int]:
    """Name, alteration and octave of a pitch: of its names the one nearest to the key.

    Example:
      >>> spell(61, 4), spell(61, -4)
      (('C', 1, 4), ('D', -1, 4))
    """
    low = fifths - 3  # from the minor third to the sharpened fifth of the major key
    place = low + (pitch * 7 - low) % 12
    alter, name = divmod(place + 1, 7)
    step = _NAMES[name]
    return step, alter, (pitch - alter - _CLASSES[step]) // 12 - 1


class _Written:
    """The pieces in which a voice is written, bar by bar."""

    def __init__(self, voice: Sequence[Chord], score: Score, part: Part) -> None:
        self._voice, self._beat, self._triplets = voice, score.beat, part.triplets
        self._next = 0

    def take(self, bar: Bar) -> list[Piece]:
        """The pieces of the next bar: chords, and rests between them."""
        time, end = bar.start, bar.start + bar.length
        pieces: list[Piece] = []
        while time < end:
            chord = self._voice[self._next] if self._next < len(self._voice) else None
            if chord is None or chord.start >= end:
                pieces += self._split(time, end, bar, (), False, False)
                break
            if chord.start > time:
                pieces += self._split(time, chord.start, bar, (), False, False)
                time = chord.start
            stop = min(chord.end, end)
            pieces += self._split(
                time, stop, bar, chord.pitches, time > chord.start, stop < chord.end
            )
            time = stop
            if stop < chord.end:
                break
            self._next += 1
        return pieces

    def _split(
        self,
        start: int,
        end: int,
        bar: Bar,
        pitches: tuple[int, ...],
        is_tied_before: bool,
        is_tied_after: bool,
    ) -> list[Piece]:
        spans = list(self._spans(start, end, bar.start))
        return [
            Piece(
                time,
                length,
                pitches,
                bool(pitches) and (is_tied_before or index > 0),
                bool(pitches) and (is_tied_after or index < len(spans) - 1),
                length in TRIPLET_TYPES,
            )
            for index, (time, length) in enumerate(spans)
        ]

    def _spans(self, start: int, end: int, bar_start: int) -> Iterator[tuple[int, int]]:
        """Starts and lengths of the written notes that fill a time within a bar."""
        time = start
        while time < end:
            place = (time - bar_start) % self._beat
            rest = end - time
            if not place and rest >= self._beat:
                wanted = [n for n in (4, 3, 2, 1) if n * self._beat <= rest]
                length = next(n * self._beat for n in wanted if n * self._beat in TYPES)
                if rest == 18 and self._beat == QUARTER and time + QUARTER not in self._triplets:
                    length = 18
            else:
                length = min(rest, self._beat - place)
            while length not in TYPES and length not in TRIPLET_TYPES:
                length -= 1
            yield time, length
            time += length


def _in_beats(pieces: Sequence[Piece], beat: int) -> list[list[int]]:
    """Indices of the pieces that begin in each beat."""
    numbered = enumerate(pieces)
    groups = itertools.groupby(numbered, key=lambda item: item[1].start // beat)
    return [[index for index, _ in group] for _, group in groups]


def _tuplet_ends(pieces: Sequence[Piece], beat: int) -> list[str]:
    """Of each piece "start", "stop" or nothing: where the bracket of a triplet begins and ends."""
    ends = [""] * len(pieces)
    for group in _in_beats(pieces, beat):
        triplets = [index for index in group if pieces[index].is_triplet]
        if len(triplets) > 1:
            ends[triplets[0]], ends[triplets[-1]] = "start", "stop"
    return ends


def _beams(pieces: Sequence[Piece], beat: int) -> list[list[str]]:
    """Of each piece the states of its beams: eighths and shorter of one beat are joined."""
    beams: list[list[str]] = [[] for _ in pieces]
    for group in _in_beats(pieces, beat):
        for has_flags, run in itertools.groupby(group, key=lambda i: _num_beams(pieces[i]) > 0):
            members = list(run)
            if not has_flags or len(members) < 2:
                continue
            counts = [_num_beams(pieces[index]) for index in members]
            for position, index in enumerate(members):
                for level in range(1, counts[position] + 1):
                    before = position > 0 and counts[position - 1] >= level
                    after = position < len(members) - 1 and counts[position + 1] >= level
                    beams[index].append(_beam_state(before, after, position > 0))
    return beams


def _beam_state(before: bool, after: bool, has_left: bool) -> str:
    if before:
        return "continue" if after else "end"
    return "begin" if after else "backward hook" if has_left else "forward hook"


def _num_beams(piece: Piece) -> int:
    if not piece.pitches:
        return 0
    kind = TRIPLET_TYPES[piece.length] if piece.is_triplet else TYPES[piece.length][0]
    return {"eighth": 1, "16th": 2}.get(kind, 0)
