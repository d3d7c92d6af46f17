"""A detector's outputs -> notes: onsets, ends, names, limits, and borders of segments."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt3_keras.models.config import LOWEST_PITCH
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.notes import Note, sort_notes
from mt3_keras.outputs import RollOutput
from mt3_keras.roll_decoder import RollDecoder
from tests.conftest import make_output

RATE = 50.0  # frames per second
PIANO, GUITAR, VIOLIN = 0, 25, 40


def make_decoder(**options):
    return RollDecoder(RATE, RollDecoding(), **options)


def test_notes_have_the_times_velocities_programs_and_confidences_of_the_output():
    output = make_output(
        [(5, 60, 0.9, VIOLIN, 64), (15, 60, 0.49, PIANO)], [(9, 38, 0.6)], [(5, 10, 60)]
    )
    string, hit = Note(0.11, 0.21, 60, 64, VIOLIN), Note(0.19, 0.2, 38, 100, 0, True)
    decoder = make_decoder()
    assert sort_notes(decoder.feed(0.0, output)) == decoder.finish()
    assert [note[2:] for note in decoder.notes] == [hit[2:], string[2:]]
    for note, known in zip(decoder.finish(), (string, hit), strict=True):
        assert note[:2] == pytest.approx(known[:2])
    assert [decoder.confidences[n] for n in decoder.finish()] == pytest.approx([0.9, 0.6])


def test_onsets_below_the_limit_are_no_notes():
    output = make_output([(4, 60, 0.35, PIANO)], [(9, 38, 0.35)], [(4, 9, 60)])
    few = make_decoder(least_confidence=0.3)
    assert [note.pitch for note in few.feed(0.0, output)] == [60, 38]
    assert make_decoder().feed(0.0, output) == []
    assert make_decoder(least_confidence=0.0).feed(0.0, make_output([(4, 60, 0.0, PIANO)])) == []


def test_a_note_lasts_until_it_has_ended_or_begins_again():
    output = make_output(
        [(1, 60, 0.9, PIANO), (10, 60, 0.9, PIANO), (12, 70, 0.9, PIANO)],
        sounding=[(3, 15, 60), (13, 20, 70)],
    )
    decoder = make_decoder()
    decoder.feed(0.0, output, 0.4)
    assert [n[:3] for n in decoder.notes] == [
        pytest.approx((0.03, 0.21, 60)), pytest.approx((0.21, 0.31, 60))
    ]  # fmt: skip
    assert list(decoder.open_notes) == [(PIANO, 70)]
    decoder.feed(0.4, make_output(sounding=[(0, 6, 70)]))
    assert decoder.notes[-1][:3] == pytest.approx((0.25, 0.53, 70))


def test_a_note_on_the_border_of_two_segments_is_one():
    decoder = make_decoder()
    decoder.feed(0.0, make_output([(19, 60, 0.9, PIANO)], sounding=[(0, 20, 60)]), 0.4)
    decoder.feed(0.4, make_output([(0, 60, 0.9, PIANO)], sounding=[(0, 20, 60)]))
    assert [n[:3] for n in decoder.finish()] == [pytest.approx((0.39, 0.8, 60))]


def test_what_reaches_past_the_end_of_a_segment_is_left_to_the_next():
    decoder = make_decoder()
    decoder.feed(0.0, make_output([(12, 60, 0.9, PIANO)], [(12, 38, 0.9)]), 0.2)
    assert decoder.finish() == []


ONSETS = st.tuples(st.integers(0, 79), st.integers(60, 62), st.integers(10, 64))
ENDS = st.tuples(st.integers(0, 79), st.integers(1, 20), st.integers(60, 62))


@given(st.lists(ONSETS, max_size=20), st.lists(ENDS, max_size=10))
def test_the_notes_of_segments_are_those_of_the_whole(onsets, ends):
    rows = [(f, p, x / 64, VIOLIN if p == 62 else PIANO) for f, p, x in onsets]
    whole = make_output(rows, num_frames=80)
    for first, length, pitch in ends:
        whole.ended[first : first + length, pitch - LOWEST_PITCH] = 0.1
    of_whole, of_parts = make_decoder(), make_decoder()
    of_whole.feed(0.0, whole)
    for first in range(0, 80, 16):

        def cut(rows, first=first):
            kept = rows[(rows[:, 0] >= first) & (rows[:, 0] < first + 16)].copy()
            kept[:, 0] -= first
            return kept

        is_own = (whole.onsets[:, 0] >= first) & (whole.onsets[:, 0] < first + 16)
        part = RollOutput(
            cut(whole.onsets), whole.programs[is_own], cut(whole.strokes),
            whole.ended[first : first + 16],
        )  # fmt: skip
        of_parts.feed(first / RATE, part)

    def times(notes):
        return sorted((round(n.onset, 6), round(n.offset, 6), *n[2:3], *n[4:]) for n in notes)

    assert times(of_parts.finish()) == times(of_whole.finish())


def doubtful(first, second, chance):
    """The programs of a note that may be either."""
    programs = np.zeros(128, np.float32)
    programs[[first, second]] = 1 - chance, chance
    return programs


def test_a_doubtful_note_is_named_anew_when_the_piece_is_known():
    output = make_output([(i, 60 + i, 0.9, PIANO) for i in range(10)])
    output.programs[0] = doubtful(PIANO, VIOLIN, 0.6)
    first, rest = (
        output._replace(onsets=output.onsets[rows], programs=output.programs[rows])
        for rows in (slice(0, 1), slice(1, None))
    )
    decoder = make_decoder()
    assert [note.program for note in decoder.feed(0.0, first)] == [VIOLIN]
    decoder.feed(0.4, rest)
    assert {note.program for note in decoder.finish()} == {PIANO}
    assert set(decoder.confidences) == set(decoder.notes)


def test_a_unison_is_two_notes_of_the_two_likeliest_instruments():
    output = make_output([(5, 60, 0.9, PIANO, 64, 0.8)], sounding=[(5, 10, 60)])
    output.programs[0] = doubtful(PIANO, VIOLIN, 0.4)
    decoder = RollDecoder(RATE, RollDecoding(unison_limit=0.5))
    found = decoder.feed(0.0, output)
    assert sorted(note.program for note in found) == [PIANO, VIOLIN]
    assert found[0][:3] == found[1][:3]
    assert len(make_decoder().feed(0.0, output)) == 1  # never, if not asked for


@pytest.mark.parametrize("options", [{"programs": [VIOLIN, VIOLIN + 1]}, {"num_instruments": 1}])
def test_where_one_instrument_may_play_a_unison_is_one_note(options):
    output = make_output([(5, 60, 0.9, VIOLIN, 64, 0.8)], sounding=[(5, 10, 60)])
    decoder = RollDecoder(RATE, RollDecoding(unison_limit=0.5), **options)
    assert [note.program for note in decoder.feed(0.0, output)] == [VIOLIN]


def test_of_two_snares_struck_at_once_the_surer_is_one_and_a_bass_drum_another():
    output = make_output((), [(9, 38, 0.6), (10, 40, 0.8), (10, 36, 0.55), (15, 38, 0.7)])
    found = make_decoder().feed(0.0, output)
    assert [(note.pitch, round(note.onset, 2)) for note in found] == [
        (36, 0.21), (40, 0.21), (38, 0.31)
    ]  # fmt: skip


def test_only_what_is_allowed_appears():
    output = make_output([(4, 60, 1.0, PIANO)], [(9, 38, 1.0)], [(4, 9, 60)])
    assert make_decoder(programs=[], drums=False).feed(0.0, output) == []
    assert [n.is_drum for n in make_decoder(programs=[]).feed(0.0, output)] == [True]
    output.programs[0] = doubtful(PIANO, VIOLIN, 0.1)
    strings = make_decoder(programs=[VIOLIN, VIOLIN + 1], drums=False)
    assert [note.program for note in strings.feed(0.0, output)] == [VIOLIN]


def test_at_most_so_many_instruments_play():
    rows = [(i, 50 + i, 0.9, p) for i, p in enumerate([PIANO] * 5 + [VIOLIN] * 4 + [GUITAR] * 3)]
    output = make_output(rows)
    output.programs[:] = 0.9 * output.programs + 0.1 / 128

    def programs(**options):
        decoder = make_decoder(**options)
        decoder.feed(0.0, output)
        return {note.program for note in decoder.finish()}

    assert programs() == {PIANO, VIOLIN, GUITAR}
    assert programs(num_instruments=2) == {PIANO, VIOLIN}


def test_a_stream_remembers_little_and_names_all_the_same():
    decoder = make_decoder(keeps_notes=False)
    for second in range(100):
        rows = [(i, 60 + i, 0.9, VIOLIN) for i in range(20)]
        found = decoder.feed(second * 0.4, make_output(rows))
        assert {note.program for note in found} == {VIOLIN}
    assert len(decoder.notes) < 40 and len(decoder._names._notes) < 400
    assert {note.program for note in decoder.finish()} == {VIOLIN}  # what still sounded


def test_how_outputs_are_read_is_read_from_the_file_beside_the_weights(tmp_path):
    chosen = RollDecoding(onset_limit=0.4, shortest=3)
    assert RollDecoding.read(tmp_path) == RollDecoding()
    provenance = {"shortest": {"tuned_on": "a test", "date": "2026-11-28"}}
    (tmp_path / "decoding.json").write_text(chosen.to_json(provenance))
    assert RollDecoding.read(tmp_path) == chosen
    stored = json.loads((tmp_path / "decoding.json").read_text())
    assert set(stored) == {field.name for field in dataclasses.fields(RollDecoding)}
    assert stored["shortest"] == {"value": 3, "tuned_on": "a test", "date": "2026-11-28"}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"shortest": 3}', '{"loudness": {"value": 1}}', '{"shortest": {}}',
             '{"shortest": {"value": 0}}', '{"onset_limit": {"value": 2}}']
)  # fmt: skip
def test_a_damaged_description_of_reading_is_named(tmp_path, text):
    (tmp_path / "decoding.json").write_text(text)
    with pytest.raises(ValueError, match=r"decoding.json: cannot be used"):
        RollDecoding.read(tmp_path)
