"""MIDI files and instrument names."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import time

import mido
import pretty_midi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt3_keras.beats import Beats
from mt3_keras.midi import (
    MidiError,
    read_instruments,
    read_midi,
    write_midi,
)
from mt3_keras.notes import Note, apply_sustain, sort_notes

END = b"\x00\xff\x2f\x00"
NUM_MUTATIONS = int(os.environ.get("MT3_FUZZ", "40"))


def varying(value):
    """A number as MIDI writes times."""
    rest = [value & 0x7F]
    while value := value >> 7:
        rest.append(value & 0x7F | 0x80)
    return bytes(reversed(rest))


def event(delta, *content):
    return varying(delta) + bytes(content)


def chunk(content, name=b"MTrk", size=None):
    return name + (len(content) if size is None else size).to_bytes(4) + content


def song(*tracks, division=500, file_format=1, num_tracks=None):
    """A MIDI file of 500 ticks a beat, 120 beats a minute: a tick is a millisecond."""
    numbers = (file_format, len(tracks) if num_tracks is None else num_tracks, division)
    header = chunk(b"".join(number.to_bytes(2) for number in numbers), b"MThd")
    return header + b"".join(chunk(t) if t[:4] != b"MTrk" else t for t in tracks)


def note(delta, length, pitch, channel=0):
    on, off = event(delta, 0x90 + channel, pitch, 80), event(length, 0x80 + channel, pitch, 0)
    return on + off


TWO = note(1000, 500, 60) + note(0, 500, 62)
TWO_NOTES = [Note(1.0, 1.5, 60, 80), Note(1.5, 2.0, 62, 80)]


def read_bytes(tmp_path, content, **options):
    (tmp_path / "a.mid").write_bytes(content)
    return read_midi(tmp_path / "a.mid", **options)


@st.composite
def separate_notes(draw):
    """Notes on a 10 ms grid of which no two of one key touch."""
    notes, clock = [], {}
    for _ in range(draw(st.integers(0, 20))):
        is_drum = draw(st.booleans())
        program = 0 if is_drum else draw(st.sampled_from([0, 33, 40]))
        pitch = draw(st.integers(30, 34))
        start = clock.get((is_drum, program, pitch), 0) + draw(st.integers(1, 300))
        end = start + draw(st.integers(1, 300))
        clock[is_drum, program, pitch] = end
        velocity = draw(st.integers(1, 127))
        notes.append(Note(start / 100, end / 100, pitch, velocity, program, is_drum))
    return sort_notes(notes)


@settings(max_examples=30, deadline=None)
@given(separate_notes())
def test_notes_on_the_grid_survive_a_midi_file(tmp_path_factory, notes):
    path = tmp_path_factory.mktemp("midi") / "notes.mid"
    write_midi(notes, path)
    read = read_midi(path)
    assert [n[2:] for n in read] == [n[2:] for n in notes]
    for got, expected in zip(read, notes, strict=True):
        assert got.onset == pytest.approx(expected.onset, abs=1e-6)
        assert got.offset == pytest.approx(expected.offset, abs=1e-6)


def test_each_instrument_is_a_track_with_its_general_midi_name(tmp_path):
    notes = [Note(0, 1, 60, 90, 40), Note(0, 1, 36, 90, 0, True), Note(0, 1, 40, 90, 33)]
    write_midi(notes, tmp_path / "a.mid")
    parts = read_instruments(tmp_path / "a.mid")
    names = [(p.name, p.program, p.is_drum) for p in parts]
    assert names == [
        ("Electric Bass (finger)", 33, False),
        ("Violin", 40, False),
        ("Drums", 0, True),
    ]


def test_the_pedal_of_a_file_is_applied_unless_refused(tmp_path):
    midi = pretty_midi.PrettyMIDI()
    piano = pretty_midi.Instrument(0)
    piano.notes = [pretty_midi.Note(80, 60, 0.0, 0.5)]
    piano.control_changes = [
        pretty_midi.ControlChange(64, 127, 0.25),
        pretty_midi.ControlChange(64, 0, 2.0),
    ]
    midi.instruments = [piano]
    midi.write(str(tmp_path / "pedal.mid"))
    assert read_midi(tmp_path / "pedal.mid")[0].offset == pytest.approx(2.0, abs=0.01)
    unsustained = read_midi(tmp_path / "pedal.mid", sustain=False)
    assert unsustained[0].offset == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"not midi at all", b"MThd\x00\x00\x00\x06"])
def test_damaged_midi_is_one_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "bad.mid"
    path.write_bytes(content)
    with pytest.raises(MidiError, match=r"bad\.mid") as error:
        read_midi(path)
    assert "\n" not in str(error.value)


def test_a_truncated_midi_file_is_refused(tmp_path):
    write_midi([Note(i, i + 0.5, 60, 90) for i in range(50)], tmp_path / "whole.mid")
    whole = (tmp_path / "whole.mid").read_bytes()
    (tmp_path / "cut.mid").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MidiError, match=r"cut\.mid"):
        read_midi(tmp_path / "cut.mid")


def test_a_missing_midi_file_is_named(tmp_path):
    with pytest.raises(MidiError, match=r"none\.mid"):
        read_midi(tmp_path / "none.mid")


def test_notes_read_from_a_file_hold_plain_numbers(tmp_path):
    notes = [Note(0.0, 1.0, 60, 90, 40), Note(0.5, 1.5, 38, 100, 0, True)]
    write_midi(notes, tmp_path / "a.mid")
    for note in read_midi(tmp_path / "a.mid"):
        assert [type(value) for value in note] == [float, float, int, int, int, bool]


# ---------------------------------------------------------------- as players read it


@pytest.mark.parametrize(
    "odd",
    [
        event(0, 0xFF, 0x59, 2, 0xEE, 0),  # a key of 18 flats
        event(0, 0xFF, 0x59, 2, 0, 255),  # and of no known mode
        event(0, 0xFF, 0x59, 1, 0),  # and of one byte
        event(0, 0xFF, 0x58, 4, 0, 2, 24, 8),  # a measure of no beats
        event(0, 0xFF, 0x58, 2, 4, 2),  # and of two bytes
        event(0, 0xFF, 0x51, 3, 0, 0, 0),  # a tempo of 0
        event(0, 0xFF, 0x51, 1, 9),  # and of one byte
        event(0, 0xFF, 0x54, 5, 0xE0, 99, 99, 99, 99),  # a time code of no known rate
        event(0, 0xFF, 0x20, 0) + event(0, 0xFF, 0x21, 0) + event(0, 0xFF, 0x00, 1, 1),
        event(0, 0xFF, 0x6B, 3, 1, 2, 3),  # a meta event that nobody knows
        event(0, 0xF0, 3, 1, 2, 0xF7) + event(0, 0xF7, 1, 0xF8),  # system exclusive
        event(0, 0xF8) + event(0, 0xF2, 1, 2) + event(0, 0xF4) + event(0, 0xFE),
        event(0, 0xB0, 64, 200) + event(0, 0xB0, 64, 0),  # a controller out of range
        event(0, 0xB0, 200, 200) + event(0, 0xC0, 0) + event(0, 0xE0, 0, 0x40),
    ],
)
def test_odd_events_are_passed_over(tmp_path, odd):
    assert read_bytes(tmp_path, song(odd + TWO + END)) == TWO_NOTES
    assert read_bytes(tmp_path, song(TWO + odd + END)) == TWO_NOTES


def test_running_status_holds_over_other_events(tmp_path):
    between = event(0, 0xFF, 0x01, 1, 65) + event(0, 0xF0, 1, 0xF7)
    track = event(1000, 0x90, 60, 80) + event(500, 60, 0) + between + event(0, 62, 80)
    assert read_bytes(tmp_path, song(track + event(500, 62, 0) + END)) == TWO_NOTES


@pytest.mark.parametrize(
    "content",
    [
        b"RIFF" + bytes(4) + b"RMIDdata" + bytes(4) + song(TWO + END) + b"LIST" + bytes(9),
        b"RIFF" + bytes(4) + b"RMIDLIST" + bytes(5000) + b"data" + bytes(4) + song(TWO + END),
        bytes(128) + song(TWO + END),  # MacBinary
        song(chunk(b"anything", b"XFIH"), chunk(TWO + END)).replace(b"MTrk\0\0\0\x10", b"", 1),
        chunk(b"\0\1\0\1" + (500).to_bytes(2) + b"more", b"MThd") + chunk(TWO + END),
        song(TWO + END) + bytes(3) + b"TAG" + bytes(125),
        song(TWO + END, num_tracks=0),
        song(b"MTrk" + bytes(4) + TWO + END),  # sizes that are wrong
        song(b"MTrk\0\0\0\5" + TWO + END),
        song(b"MTrk" + bytes([255] * 4) + TWO + END),
        song(b"MTrk" + bytes([255] * 4) + TWO),
        song(b"MTrk\0\0\1\0" + TWO + END),
        song(b"MTrk" + bytes(4) + TWO + END, b"MTrk\0\0\0\0" + END),
        song(TWO + END + b"after the end"),
        song(TWO),  # no mark of the end
        song(TWO + END, file_format=0),
        song(TWO + END, file_format=2),
    ],
)
def test_wrapping_and_wrong_sizes_change_nothing(tmp_path, content):
    assert read_bytes(tmp_path, content) == TWO_NOTES


def test_tempo_holds_for_all_tracks_wherever_it_stands(tmp_path):
    half = event(0, 0xFF, 0x51, 3, *(1_000_000).to_bytes(3))
    slow = [Note(2.0, 3.0, 60, 80), Note(3.0, 4.0, 62, 80)]
    assert read_bytes(tmp_path, song(END, TWO + END, half + END)) == slow
    late = varying(1500) + half[1:]
    expected = [Note(1.0, 1.5, 60, 80), Note(1.5, 2.5, 62, 80)]
    assert read_bytes(tmp_path, song(TWO + END, late + END)) == expected
    # Format 2 holds pieces that have nothing to do with each other.
    assert read_bytes(tmp_path, song(TWO + END, half + END, file_format=2)) == TWO_NOTES


def test_times_with_changing_tempo_are_those_of_mido(tmp_path):
    rng = random.Random(0)
    tempos = b"".join(
        event(rng.randrange(900), 0xFF, 0x51, 3, *rng.randrange(200_000, 900_000).to_bytes(3))
        for _ in range(50)
    )
    notes = b"".join(note(rng.randrange(300), 1 + rng.randrange(300), 60) for _ in range(100))
    read = read_bytes(tmp_path, song(tempos + END, notes + END))
    clock, onsets = 0.0, []
    for message in mido.MidiFile(tmp_path / "a.mid"):
        clock += message.time
        if message.type == "note_on":
            onsets.append(clock)
    assert [n.onset for n in read] == pytest.approx(onsets, abs=1e-9)


@pytest.mark.parametrize(("frames", "rate"), [(24, 24), (25, 25), (29, 30_000 / 1001), (30, 30)])
def test_times_in_film_frames_are_read(tmp_path, frames, rate):
    tempo = event(0, 0xFF, 0x51, 3, 1, 2, 3)  # which has no meaning there
    content = song(tempo + TWO + END, division=(256 - frames) << 8 | 40)
    onsets = [n.onset for n in read_bytes(tmp_path, content)]
    assert onsets == pytest.approx([1000 / 40 / rate, 1500 / 40 / rate])


def test_notes_without_an_end_end_with_their_track_or_the_next_strike(tmp_path):
    held = TWO + event(0, 0x90, 64, 80) + event(1000, 0x90, 64, 80) + varying(500) + END[1:]
    expected = [*TWO_NOTES, Note(2.0, 3.0, 64, 80), Note(3.0, 3.5, 64, 80)]
    assert read_bytes(tmp_path, song(held)) == expected


@pytest.mark.parametrize("control", [120, 123])
def test_all_notes_off_ends_the_notes_of_its_channel(tmp_path, control):
    track = event(0, 0x90, 60, 80) + event(0, 0x91, 62, 80) + event(500, 0xB0, control, 0)
    track += event(500, 0x80, 60, 0) + event(0, 0x81, 62, 0)
    assert [n.offset for n in read_bytes(tmp_path, song(track + END))] == [0.5, 1.0]


def test_a_drum_sounds_however_soon_it_is_released(tmp_path):
    content = song(note(1000, 0, 38, 9) + note(0, 0, 60) + END)
    (drum,) = read_bytes(tmp_path, content)
    assert drum == pytest.approx(Note(1.0, 1.001, 38, 80, 0, True))


def test_a_program_set_in_another_track_holds_for_the_channel(tmp_path):
    setup = event(0, 0xC0, 40) + event(1500, 0xC0, 41) + END
    assert [n.program for n in read_bytes(tmp_path, song(setup, TWO + END))] == [40, 41]
    own = event(0, 0xC0, 33) + TWO + END  # which an own one overrules
    assert [n.program for n in read_bytes(tmp_path, song(own, setup))] == [33, 33]
    port = event(0, 0xFF, 0x21, 1, 1) + setup
    assert [n.program for n in read_bytes(tmp_path, song(port, TWO + END))] == [0, 0]


def test_notes_out_of_range_are_left_out_and_counted(tmp_path, caplog):
    content = song(
        event(0, 0x90, 200, 80)
        + event(10, 0x80, 200, 0)
        + event(990, 0x90, 60, 80)
        + event(500, 0x80, 60, 0)
        + note(0, 500, 62)
        + END
    )
    assert read_bytes(tmp_path, content) == TWO_NOTES
    assert "a.mid: 1 notes of a pitch above 127" in caplog.text


def test_missing_tracks_and_further_files_are_told(tmp_path, caplog):
    assert read_bytes(tmp_path, song(TWO + END, num_tracks=3)) == TWO_NOTES
    assert "a.mid: holds 1 of the 3 tracks" in caplog.text
    assert read_bytes(tmp_path, 2 * song(TWO + END)) == TWO_NOTES
    assert "a.mid: holds several MIDI files" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"MThd", "cut short in its header"),
        (b"hello" * 1000 + song(TWO + END), "is not a MIDI file"),
        (song(), "holds no track"),
        (song(TWO[:-1]), "track 1 has no end"),
        (song(TWO + event(0, 0xFF, 1, 99) + END), "track 1 has no end"),
        (song(event(0, 60, 80) + END), "track 1 begins within an event"),
        (song(bytes([0xFF] * 5) + TWO + END), "more than four bytes"),
        (song(TWO + END, division=0), "no length of a tick"),
        (song(TWO + END, division=0xE700), "no length of a tick"),
        (song(note(2**28 - 1, 1, 60) * 4 + END, division=1), "hours by its own account"),
    ],
)
def test_a_refusal_names_file_and_reason(tmp_path, content, reason):
    with pytest.raises(MidiError, match=r"a\.mid: .*" + reason) as error:
        read_bytes(tmp_path, content)
    assert "\n" not in str(error.value)


def test_what_a_file_holds_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("mt3_keras.midi_file.MAX_EVENTS", 3)
    with pytest.raises(MidiError, match="more than 3 events"):
        read_bytes(tmp_path, song(TWO + END))
    monkeypatch.setattr("mt3_keras.midi_file.MAX_TRACKS", 2)
    with pytest.raises(MidiError, match="or 2 tracks"):
        read_bytes(tmp_path, song(END, END, END))
    with (tmp_path / "a.mid").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(MidiError, match="larger than 32 MiB"):
        read_midi(tmp_path / "a.mid")
    os.mkfifo(tmp_path / "pipe.mid")
    with pytest.raises(MidiError, match="not a regular file"):
        read_midi(tmp_path / "pipe.mid")


def test_well_formed_files_are_read_as_pretty_midi_reads_them(tmp_path):
    rng = random.Random(1)
    for _ in range(5):
        midi = pretty_midi.PrettyMIDI(initial_tempo=rng.uniform(50, 200))
        for program in rng.sample(range(128), 5):
            part = pretty_midi.Instrument(program, is_drum=program % 4 == 0)
            start = 0.0
            for _ in range(30):
                start += rng.uniform(0.01, 1)
                end = start + rng.uniform(0.01, 2)
                part.notes.append(
                    pretty_midi.Note(rng.randint(1, 127), rng.randint(21, 108), start, end)
                )
                part.control_changes.append(
                    pretty_midi.ControlChange(64, rng.randint(0, 127), start)
                )
            midi.instruments.append(part)
        midi.write(str(tmp_path / "a.mid"))
        again = pretty_midi.PrettyMIDI(str(tmp_path / "a.mid"))
        expected = [
            Note(
                float(n.start),
                float(n.end),
                n.pitch,
                n.velocity,
                0 if p.is_drum else int(p.program),
                p.is_drum,
            )
            for p in again.instruments
            for n in p.notes
        ]
        assert read_midi(tmp_path / "a.mid", sustain=False) == sort_notes(expected)
        sustained = []
        for part in read_instruments(tmp_path / "a.mid"):
            sustained += apply_sustain(part.notes, part.pedal)
        assert read_midi(tmp_path / "a.mid") == sort_notes(sustained)


# ---------------------------------------------------------------- written for players


@pytest.mark.parametrize("hours", [1, 3, 6, 15, 50])
def test_our_own_results_are_read_again_however_long(tmp_path, hours):
    end = 3600.0 * hours
    notes = [
        Note(1.0, 2.0, 60, 90),
        Note(end, end + 0.5, 64, 90, 40),
        Note(end, end + 1, 36, 90, 0, True),
    ]
    write_midi(notes, tmp_path / "long.mid")
    for got, expected in zip(read_midi(tmp_path / "long.mid"), notes, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
    read = pretty_midi.PrettyMIDI(str(tmp_path / "long.mid"))
    assert read.get_end_time() == pytest.approx(end + 1)


def played(path):
    """(onset, offset, pitch, program) as a player without ports, which has 16 channels."""
    clock, programs, held, notes = 0.0, [0] * 16, {}, []
    for message in mido.MidiFile(path):
        clock += message.time
        if message.type == "program_change":
            programs[message.channel] = message.program
        elif message.type == "note_on":
            for onset, program in held.pop((message.channel, message.note), []):
                notes.append((round(onset, 3), round(clock, 3), message.note, program))
            if message.velocity:
                held[message.channel, message.note] = [(clock, programs[message.channel])]
    return sorted(notes)


@pytest.mark.parametrize("num_programs", [3, 15, 16, 40, 128])
def test_a_player_gives_every_note_the_program_it_is_written_with(tmp_path, num_programs, caplog):
    rng = random.Random(num_programs)
    notes = [
        Note(i / 4, i / 4 + 2 + (i % 7) / 10, 60 + i % 3, 80, rng.randrange(num_programs))
        for i in range(300)
    ]
    clear = []
    for n in notes:  # no program strikes a pitch that it holds
        if not any(m[2::2] == n[2::2] and m.offset >= n.onset for m in clear):
            clear.append(n)
    write_midi(clear, tmp_path / "many.mid")
    assert played(tmp_path / "many.mid") == sorted(
        (n.onset, n.offset, n.pitch, n.program) for n in clear
    )
    read = read_midi(tmp_path / "many.mid")
    assert [n[2:] for n in read] == [n[2:] for n in clear]
    assert not caplog.messages


def test_more_instruments_at_once_than_channels_are_told(tmp_path, caplog):
    write_midi([Note(1, 2, 60, 80, program) for program in range(20)], tmp_path / "many.mid")
    assert "many.mid: 5 notes are struck while another instrument holds their pitch" in caplog.text
    onsets = [(pitch, program) for _, _, pitch, program in played(tmp_path / "many.mid")]
    assert sorted(onsets) == [(60, program) for program in range(20)]
    assert len(read_midi(tmp_path / "many.mid")) == 20


def test_instruments_beyond_the_channels_have_ports_that_keep_them_apart(tmp_path):
    notes = [Note(1 + p / 100, 2, 60, 80, p) for p in range(40)] + [Note(1, 2, 36, 80, 0, True)]
    write_midi(notes, tmp_path / "many.mid")
    for read, written in zip(read_midi(tmp_path / "many.mid"), sort_notes(notes), strict=True):
        assert read == pytest.approx(written, abs=1e-3)  # with the whole length, by ports
    ports = [
        next((m.port for m in track if m.type == "midi_port"), 0)
        for track in mido.MidiFile(tmp_path / "many.mid").tracks[1:]
    ]
    assert ports == [0] * 15 + [1] * 15 + [2] * 10 + [0]


@pytest.mark.parametrize(
    "bad", [{"pitch": 128}, {"velocity": 300}, {"program": 128}, {"onset": -1.0}]
)
def test_what_midi_cannot_hold_is_a_value_error_and_writes_nothing(tmp_path, bad):
    with pytest.raises(ValueError):
        write_midi([Note(1, 2, 60, 80)._replace(**bad)], tmp_path / "a.mid")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- damaged


def mutate(content, rng):
    """Overwrites, cuts, repeats or removes some bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(content)), rng.randint(1, 12)
        kind = rng.randrange(4)
        if kind == 0:
            content[at : at + length] = rng.randbytes(length)
        elif kind == 1:
            del content[at : at + length]
        elif kind == 2:
            content[at:at] = content[at : at + length]
        else:
            content[at] ^= 1 << rng.randrange(8)
    return bytes(content if rng.random() < 0.8 else content[: rng.randrange(len(content))])


@pytest.mark.parametrize("seed", range(NUM_MUTATIONS))
def test_damaged_files_are_read_or_refused_in_a_line(tmp_path, seed):
    rng = random.Random(seed)
    write_midi(
        [Note(i / 4, i / 4 + 1, 40 + i % 30, 80, 8 * (i % 4), i % 5 == 0) for i in range(60)],
        tmp_path / "whole.mid",
    )
    start = time.process_time()
    try:
        notes = read_bytes(tmp_path, mutate((tmp_path / "whole.mid").read_bytes(), rng))
    except MidiError as error:
        assert str(error).startswith(str(tmp_path / "a.mid")) and "\n" not in str(error)
    else:
        assert all(0 <= n.pitch <= 127 and 0 < n.velocity <= 127 for n in notes)
        assert all(a.onset <= b.onset for a, b in itertools.pairwise(notes))
    assert time.process_time() - start < 5


def read_by_pretty_midi(path):
    read = pretty_midi.PrettyMIDI(str(path))
    notes = [(n.start, n.pitch) for part in read.instruments for n in part.notes]
    return notes, len(read.instruments), [s.numerator for s in read.time_signature_changes]


def read_by_mido(path):
    file, clock, notes = mido.MidiFile(path), 0.0, []
    for message in file:
        clock += message.time
        if message.type == "note_on" and message.velocity:
            notes.append((clock, message.note))
    signatures = [m.numerator for t in file.tracks for m in t if m.type == "time_signature"]
    return notes, len(file.tracks) - 1, signatures


def read_by_music21(path):
    music21 = pytest.importorskip("music21")
    score = music21.converter.parse(path, quantizePost=False, forceSource=True)
    notes = []
    for event in score.flatten().secondsMap:
        own = event["element"]
        if not isinstance(own, music21.note.NotRest) or (own.tie and own.tie.type != "start"):
            continue
        for note in own.notes if isinstance(own, music21.chord.ChordBase) else [own]:
            is_drum = isinstance(note, music21.note.Unpitched)
            pitch = note.storedInstrument.percMapPitch if is_drum else note.pitch.midi
            notes.append((event["offsetSeconds"], pitch))
    bars = score.parts[0].getElementsByClass("Measure")
    signatures = [bar.timeSignature.numerator for bar in bars if bar.timeSignature]
    return notes, len(score.parts), signatures


def read_by_musescore(path):
    musescore = shutil.which("musescore3") or shutil.which("mscore3")
    if not musescore:
        pytest.skip("needs MuseScore (Debian: musescore3)")
    again = path.with_name("again.mid")
    subprocess.run(
        [musescore, "-o", again, path],
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    return read_by_pretty_midi(again)


@pytest.mark.parametrize(
    "read", [read_by_pretty_midi, read_by_mido, read_by_music21, read_by_musescore]
)
def test_other_programs_read_notes_parts_and_bars_as_written(tmp_path, read):
    beats = Beats(tuple(0.5 * k for k in range(24)), tuple(k % 3 + 1 for k in range(24)))
    notes = [
        Note(k / 2, k / 2 + 0.4, pitch, 80, program, is_drum)
        for k in range(20)
        for pitch, program, is_drum in ((60 + k % 8, 0, False), (40, 33, False), (36, 0, True))
    ]
    write_midi(notes, tmp_path / "trio.mid", beats=beats)
    found, num_parts, signatures = read(tmp_path / "trio.mid")
    assert sorted((round(time, 2), pitch) for time, pitch in found) == sorted(
        (note.onset, note.pitch) for note in notes
    )
    assert num_parts == 3
    assert signatures == [3]
