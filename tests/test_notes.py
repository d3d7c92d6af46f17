"""Note clean-up: sustain pedal, overlaps, granularities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt3_keras.notes import (
    Note,
    PedalChange,
    apply_sustain,
    check_notes,
    join_times,
    map_program,
    sort_notes,
    trim_overlaps,
)

DOWN, UP = True, False


def sustained(notes, *pedal):
    return apply_sustain([Note(*n, 60) for n in notes], [PedalChange(*p) for p in pedal])


def spans(notes):
    return [(n.onset, n.offset, n.pitch) for n in notes]


def test_a_note_released_under_the_pedal_lasts_until_the_pedal_rises():
    assert spans(sustained([(0, 1, 60)], (0.5, DOWN), (3, UP))) == [(0, 3, 60)]


def test_a_note_still_held_when_the_pedal_rises_ends_with_its_key():
    assert spans(sustained([(0, 4, 60)], (0.5, DOWN), (3, UP))) == [(0, 4, 60)]


def test_a_note_struck_again_under_the_pedal_ends_there():
    notes = sustained([(0, 1, 60), (2, 2.5, 60)], (0.5, DOWN), (3, UP))
    assert spans(notes) == [(0, 2, 60), (2, 3, 60)]


def test_of_two_notes_struck_at_once_under_the_pedal_one_remains():
    notes = sustained([(1, 2, 60), (1, 2, 60)], (0.5, DOWN), (3, UP))
    assert spans(notes) == [(1, 3, 60)]


def test_a_pedal_that_never_rises_ends_notes_with_the_last_event():
    notes = sustained([(0, 1, 60), (2, 5, 64)], (0.5, DOWN))
    assert spans(notes) == [(0, 5, 60), (2, 5, 64)]


def test_a_pedal_pressed_as_a_note_ends_still_holds_it():
    assert spans(sustained([(0, 1, 60)], (1, DOWN), (2, UP))) == [(0, 2, 60)]


def test_drums_do_not_feel_the_pedal():
    drum = Note(0, 1, 36, 90, 0, True)
    assert apply_sustain([drum], [PedalChange(0, DOWN), PedalChange(9, UP)]) == [drum]


def test_overlapping_notes_end_at_the_next_onset_of_the_same_key():
    notes = [Note(0, 3, 60, 90), Note(1, 2, 60, 90), Note(1, 4, 60, 90, 40), Note(1, 5, 61, 90)]
    trimmed = trim_overlaps(notes)
    assert trimmed == sort_notes([notes[0]._replace(offset=1), *notes[1:]])


def test_a_note_struck_twice_at_once_is_trimmed_away():
    assert len(trim_overlaps([Note(1, 2, 60, 90), Note(1, 3, 60, 90)])) == 1


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(60, 62)), max_size=12))
def test_trimmed_notes_never_overlap_and_trimming_again_changes_nothing(spans):
    notes = [Note(start, start + length, pitch, 90) for start, length, pitch in spans]
    trimmed = trim_overlaps(notes)
    for a in trimmed:
        for b in trimmed:
            assert a is b or a.pitch != b.pitch or a.offset <= b.onset or b.offset <= a.onset
    assert trim_overlaps(trimmed) == trimmed


@pytest.mark.parametrize("granularity", ["flat", "midi_class", "full"])
def test_program_maps_are_idempotent(granularity):
    for program in range(128):
        mapped = map_program(program, granularity)
        assert map_program(mapped, granularity) == mapped


def test_programs_map_to_the_first_of_their_class():
    assert [map_program(p, "midi_class") for p in (0, 7, 33, 127)] == [0, 0, 32, 120]
    assert map_program(33, "flat") == 0
    assert map_program(33, "full") == 33
    with pytest.raises(ValueError, match="granularity must be one of"):
        map_program(33, "coarse")


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        (Note(1, 1, 60, 90), "end after it starts"),
        (Note(-1, 1, 60, 90), "before 0 s"),
        (Note(0, 1, 60, 0), "velocity"),
        (Note(0, 1, 128, 90), "pitch"),
        (Note(0, 1, 60, 90, 128), "program"),
    ],
)
def test_notes_that_cannot_be_encoded_are_named(note, reason):
    with pytest.raises(ValueError, match=reason):
        check_notes([note])


TIMES = st.floats(0, 1).map(lambda time: round(time, 4))
NOTES = st.lists(
    st.builds(
        lambda onset, length, pitch, is_drum: Note(onset, onset + length, pitch, 80, 0, is_drum),
        TIMES,
        st.floats(0.001, 0.5),
        st.integers(0, 127),
        st.booleans(),
    )
)


@given(NOTES, st.floats(0.001, 0.05))
def test_joined_notes_keep_their_order_and_move_less_than_the_limit(notes, seconds):
    notes = sort_notes(notes)
    joined = join_times(notes, seconds)
    check_notes(joined)
    assert sorted(n.pitch for n in joined) == sorted(n.pitch for n in notes)
    moved = zip(sorted(n.onset for n in notes), sorted(n.onset for n in joined), strict=True)
    assert all(abs(new - old) <= seconds for old, new in moved)
    onsets = sorted({n.onset for n in joined})
    last = [max((n.onset for n in notes if n.onset <= t + seconds), default=t) for t in onsets]
    assert last == sorted(last)


def test_ends_move_to_the_beginnings_beside_them():
    notes = [Note(0, 0.99, 60, 80), Note(1, 1.5, 62, 80), Note(1.01, 1.51, 65, 80)]
    joined = join_times(notes, 0.03)
    assert [n.onset for n in joined] == pytest.approx([0, 1.005, 1.005])
    assert [n.offset for n in joined] == pytest.approx([1.005, 1.505, 1.505])
