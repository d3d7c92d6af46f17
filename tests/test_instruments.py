"""Notes of a piece are named together."""

from __future__ import annotations

import numpy as np
import pytest

from mt3_keras.instruments import PiecePrograms, find_shares

PIANO, BASS, VIOLIN = 0, 1, 2


def chances(*rows):
    return np.array(rows, np.float32)


def name(rows, pitches=None, **settings):
    pitches = np.full(len(rows), 60.0) if pitches is None else np.array(pitches)
    return find_shares(chances(*rows), pitches, **settings).argmax(axis=1).tolist()


def test_a_doubtful_note_is_named_like_the_rest_of_its_piece():
    sure, doubtful = [0.8, 0.1, 0.1], [0.3, 0.1, 0.6]
    assert name([doubtful]) == [VIOLIN]
    assert name([sure] * 9 + [doubtful]) == [PIANO] * 10


def test_an_instrument_of_many_sure_notes_stays():
    rows = [[0.9, 0.05, 0.05]] * 6 + [[0.05, 0.05, 0.9]] * 4
    assert name(rows) == [PIANO] * 6 + [VIOLIN] * 4


def test_a_low_note_goes_to_the_instrument_that_plays_low():
    rows = [[0.8, 0.1, 0.1]] * 8 + [[0.1, 0.8, 0.1]] * 8 + [[0.55, 0.45, 0.0]]
    pitches = [72] * 8 + [33] * 8 + [31]
    assert name(rows, pitches)[-1] == BASS
    assert name(rows)[-1] == PIANO


def test_chords_are_not_a_basss_even_where_the_network_hears_one():
    rows = np.full((8, 128), 0.001, np.float32)
    rows[:, [4, 33]] = 0.4, 0.47  # electric piano, electric bass
    pitches = np.array([55, 59, 62, 65] * 2, np.float32)
    piece = PiecePrograms()
    piece.add(rows, pitches)
    assert piece.programs([(i, 0) for i in range(8)]) == [4] * 8
    low = PiecePrograms()
    low.add(rows, pitches - 24)
    assert low.programs([(i, 0) for i in range(8)]) == [33] * 8


def test_only_allowed_instruments_play():
    rows = [[0.9, 0.06, 0.04]] * 5
    assert name(rows, allowed=[BASS, VIOLIN]) == [BASS] * 5


def test_at_most_so_many_instruments_play():
    rows = [[0.9, 0.05, 0.05]] * 6 + [[0.05, 0.05, 0.9]] * 4 + [[0.05, 0.9, 0.05]] * 3
    assert set(name(rows, num_instruments=2)) == {PIANO, VIOLIN}
    assert set(name(rows, num_instruments=1)) == {PIANO}


def test_notes_as_they_come_are_in_the_end_named_like_all_at_once():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet([0.1] * 128, 40).astype(np.float32)
    pitches = rng.integers(30, 90, 40).astype(np.float32)
    notes = [(i, 0) for i in range(40)]
    whole, piece = PiecePrograms(), PiecePrograms()
    assert whole.add(rows, pitches) == 0
    for first in range(0, 40, 8):
        assert piece.add(rows[first : first + 8], pitches[first : first + 8]) == first
        assert len(piece.programs(notes[: first + 8])) == first + 8
    assert piece.programs(notes) == whole.programs(notes)


def test_shares_are_chances_and_no_notes_have_no_names():
    assert len(find_shares(np.zeros((0, 3), np.float32), np.zeros(0, np.float32))) == 0
    shares = find_shares(chances([0.5, 0.5], [0.9, 0.1]), np.array([60.0, 40.0]))
    assert shares.sum(axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_instruments": 0}, "num_instruments must be at least 1: got 0"),
        ({"allowed": []}, "allowed must name at least one instrument"),
        ({"allowed": [3]}, r"allowed must be 0 to 2: got \[3\]"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        name([[0.2, 0.3, 0.5]], **settings)
