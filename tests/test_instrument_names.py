"""What instruments may be called, and what is said of names that are none."""

from __future__ import annotations

import pytest

from mt3_keras.instrument_names import instrument_name, parse_instruments


def programs(text):
    found, drums = parse_instruments(text)
    assert not drums
    return sorted(found)


def test_instruments_are_named_by_number_name_and_class():
    assert parse_instruments("33") == (frozenset({33}), False)
    assert parse_instruments("Violin, drums") == (frozenset({40}), True)
    assert parse_instruments("bass") == (frozenset(range(32, 40)), False)
    assert parse_instruments(["violin", 33, "Drum Kit"]) == (frozenset({33, 40}), True)
    assert instrument_name(0, False) == "Acoustic Grand Piano"
    assert instrument_name(0, True) == "Drums"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sax", [64, 65, 66, 67]),
        ("Saxophones", [64, 65, 66, 67]),
        ("voice", [52, 53, 54]),
        ("vocals", [52, 53, 54]),
        ("electric guitar", [26, 27, 28, 29, 30, 31]),
        ("acoustic-guitar", [24, 25]),
        ("jazz guitar", [26]),
        ("strings", [40, 41, 42, 43, 44, 45, 48, 49, 50, 51]),
        ("double bass", [32, 43]),
        ("keys", list(range(8))),
        ("organ", list(range(16, 24))),
        ("french horn", [60]),
        ("tenor sax", [66]),
        ("synth_lead", list(range(80, 88))),
        ("Honky-tonk Piano", [3]),
    ],
)
def test_names_that_people_use_are_understood(name, expected):
    assert programs(name) == expected


def test_every_name_of_general_midi_means_its_program_alone():
    wide = {"Viola": [41], "Contrabass": [32, 43]}  # one is what people call two
    for program in range(128):
        name = instrument_name(program, False)
        assert programs(name) == wide.get(name, [program]), name


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("Vioin", ["violin"]),
        ("druns", ["drums"]),
        ("200", ["'200': use General MIDI names or 0 to 127"]),
        ("", ["no instrument named"]),
        ("piano, Vioin, kazooo, trumpit", ["'Vioin': did", "'kazooo'", "'trumpit': did"]),
        ("½", ["'½'"]),
    ],
)
def test_unknown_instruments_are_all_named_with_suggestions(text, hints):
    with pytest.raises(ValueError) as caught:
        parse_instruments(text)
    assert all(hint in str(caught.value) for hint in hints)
    assert "\n" not in str(caught.value)
