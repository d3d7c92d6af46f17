"""Rolls -> notes: onsets, ends, limits, and segments that overlap."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt3_keras.models.config import LOWEST_PITCH, NUM_CLASSES, NUM_PITCHES
from mt3_keras.note_rolls import Crossfade, NoteRolls, RollDecoding
from mt3_keras.notes import Note, sort_notes
from mt3_keras.roll_decoder import AdaptiveLimit, Limits, RollDecoder
from tests.conftest import make_rolls

RATE = 50.0  # frames per second
GUITAR, STRINGS = 24, 40


def make_decoder(**options):
    return RollDecoder(RATE, RollDecoding(), **{"least_confidence": 0.4, **options})


def feed(decoder, rolls, start=0.0, end=None):
    return decoder.feed(start, rolls.values, end)


def set_class(rolls, frames, pitch, program, value):
    column = (pitch - LOWEST_PITCH) * NUM_CLASSES + program // 8
    rolls.roll("class")[frames, column] = value


def test_notes_have_the_times_velocities_classes_and_confidences_of_the_rolls():
    rolls = make_rolls(
        ("onset", slice(4, 7), 60, [0.5, 0.9, 0.5]),  # one onset, at its peak
        ("frame", slice(5, 10), 60, 0.9),
        ("strength", 5, 60, 0.5),
        ("drum", 9, 38, 0.6),
        ("onset", 15, 60, 0.39),
    )
    rolls.roll("strength")[9, NUM_PITCHES] = 1.0
    set_class(rolls, slice(5, 10), 60, STRINGS, 0.7)
    set_class(rolls, slice(5, 10), 60, 0, 0.2)
    decoder = make_decoder(programs=range(0, 128, 8))
    string = Note(0.11, 0.21, 60, 64, STRINGS)
    hit = Note(0.19, 0.2, 38, 127, 0, True)
    assert sort_notes(feed(decoder, rolls)) == decoder.finish() == [string, hit]
    pitched, drum = (decoder.confidences[note] for note in (string, hit))
    assert 0.9 < pitched < 1 and drum == pytest.approx(0.6)  # "frame" supports the pitch
    piano = make_decoder(programs=[0], drums=False)
    assert feed(piano, rolls) == [string._replace(program=0)]


def test_onsets_below_the_limit_are_no_notes():
    sounding = ("frame", slice(5, 9), 60, 0.6)
    rolls = make_rolls(("onset", 4, 60, 0.35), sounding, ("drum", 9, 38, 0.35))
    assert [note.pitch for note in feed(make_decoder(least_confidence=0.3), rolls)] == [38, 60]
    assert feed(make_decoder(least_confidence=0.5), rolls) == []


def test_a_note_lasts_while_the_frame_roll_is_high():
    rolls = make_rolls(
        ("onset", [1, 10], 60, 0.9),
        ("frame", slice(1, 5), 60, 0.9),
        ("frame", 5, 60, 0.1),  # no pause, it is too short
        ("frame", slice(6, 15), 60, 0.9),
        ("onset", 12, 70, 0.9),
        ("frame", slice(12, 20), 70, 0.9),
    )
    decoder = make_decoder()
    feed(decoder, rolls, end=0.4)
    assert [n[:3] for n in decoder.notes] == [(0.03, 0.21, 60), (0.21, 0.31, 60)]
    assert list(decoder.open_notes) == [(0, 70)]
    feed(decoder, make_rolls(("frame", slice(0, 6), 70, 0.9)), start=0.4)
    assert decoder.notes[-1][:3] == (0.25, 0.53, 70)


@pytest.mark.parametrize(
    ("rings", "offset", "ends"), [(0.4, 0.3, [0.19]), (0.7, 0.8, [0.19]), (0.7, 0.3, [])]
)
def test_a_note_ends_where_its_offset_is_likeliest_if_it_fades_or_that_is_sure(rings, offset, ends):
    rolls = make_rolls(
        ("onset", 1, 60, 0.9),
        ("frame", slice(1, 6), 60, 0.9),
        ("frame", slice(6, 20), 60, rings),
        ("offset", [7, 8, 9], 60, [0.25, offset, 0.25]),
    )
    decoder = make_decoder()
    assert [note.offset for note in feed(decoder, rolls)] == ends
    assert len(ends) + len(decoder.open_notes) == 1


def test_a_note_on_the_border_of_two_segments_is_one():
    sounding = ("frame", slice(0, 20), 60, 0.9)
    decoder = make_decoder()
    feed(decoder, make_rolls(("onset", 19, 60, 0.9), sounding), end=0.4)
    feed(decoder, make_rolls(("onset", 0, 60, 0.9), sounding), start=0.4)
    assert [n[:3] for n in decoder.finish()] == [(0.39, 0.8, 60)]


CELLS = st.tuples(
    st.sampled_from(["onset", "frame", "frame", "offset", "drum"]),
    st.integers(0, 89),
    st.integers(1, 20),
    st.integers(60, 62),
    st.integers(16, 64),
)


@given(st.lists(CELLS, max_size=30))
def test_segments_that_overlap_and_agree_give_the_notes_of_the_whole(cells):
    cells = [(head, slice(i, i + n), pitch, x / 64) for head, i, n, pitch, x in cells]
    rolls = make_rolls(*cells, num_frames=112)
    whole, halves = make_decoder(), make_decoder()
    feed(whole, rolls)
    for first in range(0, 96, 16):
        end = None if first == 80 else (first + 16) / 50
        halves.feed(first / 50, rolls.values[first : first + 32], end)
    assert halves.finish() == whole.finish()
    assert halves.confidences == pytest.approx(whole.confidences)


def test_the_prediction_of_the_next_segment_fades_in():
    def join(rolls, num_frames):
        values, own = crossfade.join(rolls.values, num_frames)
        return NoteRolls(values, RATE, RollDecoding(), own)

    crossfade = Crossfade()
    first = join(make_rolls(("onset", slice(0, 20), 60, 1.0)), 10)
    assert first.num_steps == 20
    second = join(make_rolls(), None)
    onsets = second.roll("onset")[:, 60 - LOWEST_PITCH]
    np.testing.assert_allclose(onsets[:10], 1)  # for the context
    np.testing.assert_allclose(onsets[10:20], np.linspace(0.95, 0.05, 10), rtol=1e-5)
    assert not onsets[20:].any() and second.num_steps == 40


def test_an_onset_that_the_frame_roll_does_not_support_is_no_note():
    def pitches(*cells):
        return [note.pitch for note in feed(make_decoder(), make_rolls(*cells))]

    onset, after = ("onset", 10, 60, 0.35), ("frame", slice(10, 14), 60, 0.9)
    assert pitches(onset, after) == [60]
    assert pitches(onset) == []  # it does not sound
    assert pitches(onset, after, ("frame", slice(0, 10), 60, 0.9)) == []  # it sounds already


def test_of_two_onsets_close_together_the_surer_is_the_note():
    sounding = ("frame", slice(4, 16), 60, 0.9)
    for surest in (4, 7):
        onsets = ("onset", [4, 7], 60, [0.9, 0.5] if surest == 4 else [0.5, 0.9])
        decoder = make_decoder()
        feed(decoder, make_rolls(onsets, sounding))
        assert [n.onset for n in decoder.finish()] == pytest.approx([(surest + 0.5) / 50])


def test_of_two_snares_one_is_struck_and_as_surely_as_any():
    rolls = make_rolls(("drum", 9, 38, 0.35), ("drum", 10, 40, 0.3), ("drum", 10, 36, 0.9))
    assert sorted(note.pitch for note in feed(make_decoder(), rolls)) == [36, 38]
    either = 1 - (1 - 0.35) * (1 - 0.3)
    confidences = rolls.drum_confidences
    assert confidences[9, 38] == pytest.approx(either) and confidences[10, 40] == 0


def test_of_two_cymbals_as_likely_it_is_the_one_struck_around():
    beat = [("drum", frame, 42, 0.8) for frame in (2, 8, 17)]
    rolls = make_rolls(*beat, ("drum", 13, 42, 0.4), ("drum", 13, 51, 0.45))
    assert [(note.onset, note.pitch) for note in feed(make_decoder(), rolls)] == [
        (0.05, 42), (0.17, 42), (0.27, 42), (0.35, 42)
    ]  # fmt: skip


def music(confidence, *, num_pitches=1):
    """Rolls in which so many pitches begin again and again."""
    rolls, pitches = make_rolls(), range(40, 40 + num_pitches)
    for pitch in pitches:
        rolls.roll("frame")[:, pitch - LOWEST_PITCH] = 0.6
        rolls.roll("onset")[::6, pitch - LOWEST_PITCH] = confidence
        rolls.roll("drum")[::6, pitch] = confidence
    return rolls


def test_the_limit_of_an_onset_follows_the_music():
    def limits(*segments):
        limit = AdaptiveLimit(RollDecoding())
        return [limit.update(rolls) for rolls in segments][-1]

    assert limits(make_rolls()) == Limits(0.45, 0.45)
    faint, clear = limits(*[music(0.5)] * 9), limits(*[music(0.95)] * 9)
    assert faint.pitched < 0.45 < clear.pitched and faint.drum < 0.45 < clear.drum
    crowded = limits(*[music(0.95, num_pitches=9)] * 9)
    assert crowded.pitched < clear.pitched and crowded.drum == pytest.approx(clear.drum, abs=0.05)
    returned = limits(*[music(0.95)] * 9, *[music(0.5)] * 40)
    assert returned == pytest.approx(limits(*[music(0.5)] * 49), abs=0.02)


def test_limits_stay_in_their_bounds_and_memory_too():
    rng, decoding = np.random.default_rng(0), RollDecoding()
    limit = AdaptiveLimit(decoding)
    for loudest in np.repeat(np.linspace(0, 1, 50), 4):
        rolls = make_rolls()
        rolls.values[...] = rng.uniform(0, loudest, rolls.values.shape)
        assert all(
            decoding.lowest_limit <= x <= decoding.highest_limit for x in limit.update(rolls)
        )
    assert len(limit._onsets[0]) < 50 * 20 * NUM_PITCHES / 4


def test_only_what_is_allowed_appears():
    rolls = make_rolls(("onset", 4, 60, 1.0), ("drum", 9, 38, 1.0))
    assert feed(make_decoder(programs=[], drums=False), rolls) == []


def test_how_rolls_are_read_is_read_from_the_file_beside_the_weights(tmp_path):
    chosen = RollDecoding(peak_frames=2, similar_drums=((35, 36),), start_limit=0.3)
    assert RollDecoding.read(tmp_path) == RollDecoding()
    provenance = {"peak_frames": {"tuned_on": "a test", "date": "2026-11-28"}}
    (tmp_path / "decoding.json").write_text(chosen.to_json(provenance))
    assert RollDecoding.read(tmp_path) == chosen
    stored = json.loads((tmp_path / "decoding.json").read_text())
    assert set(stored) == {field.name for field in dataclasses.fields(RollDecoding)}
    assert stored["peak_frames"] == {"value": 2, "tuned_on": "a test", "date": "2026-11-28"}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"peak_frames": 3}', '{"loudness": {"value": 1}}', '{"peak_frames": {}}',
             '{"peak_frames": {"value": 99}}', '{"start_limit": {"value": 2}}']
)  # fmt: skip
def test_a_damaged_description_of_reading_is_named(tmp_path, text):
    (tmp_path / "decoding.json").write_text(text)
    with pytest.raises(ValueError, match=r"decoding.json: cannot be used"):
        RollDecoding.read(tmp_path)
