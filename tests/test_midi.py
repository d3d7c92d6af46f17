"""MIDI files and instrument names."""

from __future__ import annotations

import pretty_midi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt3_keras.midi import (
    MidiError,
    instrument_name,
    parse_instruments,
    read_instruments,
    read_midi,
    write_midi,
)
from mt3_keras.notes import Note, sort_notes


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


def test_instruments_are_named_by_number_name_and_class():
    assert parse_instruments("33") == (frozenset({33}), False)
    assert parse_instruments("Violin, drums") == (frozenset({40}), True)
    assert parse_instruments("bass") == (frozenset(range(32, 40)), False)
    assert instrument_name(0, False) == "Acoustic Grand Piano"
    assert instrument_name(0, True) == "Drums"


@pytest.mark.parametrize(
    ("text", "hint"),
    [("Vioin", "violin"), ("druns", "drums"), ("200", "0 to 127"), ("", "no inst")],
)
def test_unknown_instruments_are_met_with_a_suggestion(text, hint):
    with pytest.raises(ValueError, match=hint):
        parse_instruments(text)


def test_notes_read_from_a_file_hold_plain_numbers(tmp_path):
    notes = [Note(0.0, 1.0, 60, 90, 40), Note(0.5, 1.5, 38, 100, 0, True)]
    write_midi(notes, tmp_path / "a.mid")
    for note in read_midi(tmp_path / "a.mid"):
        assert [type(value) for value in note] == [float, float, int, int, int, bool]
