"""Tokens -> notes. "Original case" marks the cases of the original's own tests, as facts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt3_keras.codec import EOS, Codec, Event
from mt3_keras.models.config import LOWEST_PITCH, NUM_CLASSES, NUM_PITCHES
from mt3_keras.note_decoder import NoteDecoder
from mt3_keras.note_rolls import Certainty, Crossfade, Limits, NoteRolls, SegmentTokens
from mt3_keras.notes import Note, sort_notes
from tests.conftest import make_rolls
from tests.test_note_encoder import CODEC, to_tokens


def read(ids, *, start=0.0, end=None, **options):
    decoder = NoteDecoder(CODEC, **{"ties": False, **options})
    decoder.feed(start, to_tokens(ids), end)
    return decoder


def assert_notes(decoder, *expected, invalid=0, dropped=0):
    notes = decoder.finish()
    assert [n[2:] for n in notes] == [Note(*row)[2:] for row in expected]
    for note, row in zip(notes, expected, strict=True):
        assert note[:2] == pytest.approx(row[:2], abs=1e-9)
    assert (decoder.invalid_events, decoder.dropped_events) == (invalid, dropped)


def test_onsets_last_10_ms():  # original case
    decoder = read([25, 161, 50, 162], onsets_only=True)
    assert_notes(decoder, (0.25, 0.26, 60, 100), (0.5, 0.51, 61, 100))


def test_shifts_count_from_the_segments_start():  # original case
    decoder = read([5, 161, 25, 162], onsets_only=True)
    assert_notes(decoder, (0.05, 0.06, 60, 100), (0.25, 0.26, 61, 100))


def test_velocity_zero_ends_a_note():  # original case
    assert_notes(read([5, 356, 161, 25, 229, 161]), (0.05, 0.25, 60, 127))


def test_a_note_struck_again_ends_there():  # original case
    decoder = read([5, 356, 161, 10, 161, 25, 229, 161])
    assert_notes(decoder, (0.05, 0.1, 60, 127), (0.1, 0.25, 60, 127))


def test_programs_and_drums_stay_apart():  # original case
    decoder = read([5, 525, 356, 161, 15, 356, 394, 25, 525, 229, 161])
    assert_notes(decoder, (0.05, 0.25, 60, 127, 40), (0.15, 0.16, 37, 127, 0, True))


def test_tokens_without_meaning_are_counted():  # original case
    decoder = NoteDecoder(CODEC, onsets_only=True)
    decoder.feed(0.0, [8, 2, 164, 0, 28, 165, 9999])
    assert_notes(decoder, (0.05, 0.06, 60, 100), (0.25, 0.26, 61, 100), invalid=3)


def test_an_event_at_the_end_of_its_segment_is_kept():  # original case
    decoder = read([5, 161, 25, 162], start=1.0, end=1.25, onsets_only=True)
    assert_notes(decoder, (1.05, 1.06, 60, 100), (1.25, 1.26, 61, 100))


def test_what_lies_past_the_end_of_a_segment_is_dropped():  # original case
    decoder = read([5, 161, 30, 162], start=1.0, end=1.25, onsets_only=True)
    assert_notes(decoder, (1.05, 1.06, 60, 100), dropped=2)


def test_events_that_an_onset_model_does_not_know_are_invalid():  # original case
    assert_notes(read([25, 230, 50, 161], onsets_only=True), (0.5, 0.51, 60, 100), invalid=1)


def join(segments, **options):
    """Feeds (start, ids) in order, each ending where the next begins."""
    decoder = NoteDecoder(CODEC, **options)
    ends = [start for start, _ in segments[1:]]
    for (start, ids), end in zip(segments, [*ends, None], strict=True):
        decoder.feed(start, to_tokens(ids), end)
    return decoder


def test_onsets_of_segments_are_joined():  # original case
    segments = [(0.0, [20, 160]), (0.4, [20, 161, 50, 162]), (0.8, [163, 20, 164])]
    expected = [
        (t, t + 0.01, pitch, 100) for t, pitch in ((0.2, 59), (0.6, 60), (0.8, 62), (1, 63))
    ]
    assert_notes(join(segments, ties=False, onsets_only=True), *expected, dropped=2)


def test_notes_last_across_segments():  # original case
    v63 = 229 + 63
    segments = [
        (0.0, [20, 356, 160]),
        (0.4, [20, v63, 161, 50, 162]),
        (0.8, [20, 229, 160, 161]),
    ]
    expected = [(0.2, 1.0, 59, 127), (0.6, 1.0, 60, 63)]
    assert_notes(join(segments, ties=False), *expected, dropped=2)


def test_programs_and_drums_last_across_segments():  # original case
    segments = [(0.0, [20, 485 + 32, 356, 160]), (0.4, [20, 357 + 42]), (0.8, [20, 229, 160])]
    expected = [(0.2, 1.0, 59, 127, 32), (0.6, 0.61, 42, 127, 0, True)]
    assert_notes(join(segments, ties=False), *expected)


def test_a_note_missing_in_the_tie_section_ends_at_the_border():  # original case
    tie, program = 613, 485 + 32
    segments = [
        (0.0, [tie, 20, program, 356, 160]),
        (0.4, [program, 160, tie]),
        (0.8, [tie, 20, program, 356, 161, 40, 229, 161]),
    ]
    assert_notes(join(segments), (0.2, 0.8, 59, 127, 32), (1.0, 1.2, 60, 127, 32))


def test_a_segment_without_tie_token_adds_and_ends_nothing():
    tie = 613
    segments = [(0.0, [tie, 20, 356, 160]), (0.4, [20, 356, 161]), (0.8, [160, tie])]
    decoder = join(segments)
    assert set(decoder.open_notes) == {(0, 59)}
    assert decoder.invalid_events == 1  # 161 is not sounding, so it cannot be tied
    assert [n.pitch for n in decoder.finish()] == [59]


@pytest.mark.parametrize("clip", ["band", "piano"])
@pytest.mark.parametrize("segment_start", ["grid", "original"])
def test_notes_of_the_originals_tokens_are_the_originals(shared, clip, segment_start):
    golden = json.loads((shared / "golden" / f"{clip}.json").read_text())
    decoder = NoteDecoder(Codec(1), segment_start=segment_start)
    starts = [segment["start"] for segment in golden["segments"]]
    for segment, end in zip(golden["segments"], [*starts[1:], None], strict=True):
        decoder.feed(segment["start"], segment["tokens"], end)
    notes, expected = decoder.finish(), sort_notes(Note(**n) for n in golden["notes"])
    assert [n[2:] for n in notes] == [n[2:] for n in expected]
    for got, wanted in zip(notes, expected, strict=True):
        assert got[:2] == pytest.approx(wanted[:2], abs=1e-6)
    assert decoder.invalid_events == golden["invalid_events"]
    assert decoder.dropped_events == golden["dropped_events"]


@given(st.lists(st.lists(st.integers(-1, 1600), max_size=40), max_size=4), st.booleans())
def test_no_tokens_whatever_raise_or_make_an_impossible_note(segments, ties):
    decoder = NoteDecoder(Codec(1), ties=ties)
    ended = []
    for i, tokens in enumerate(segments):
        ended += decoder.feed(2.048 * i, tokens, 2.048 * (i + 1))
    assert ended == decoder.notes
    for note in decoder.finish():
        assert note.offset >= note.onset + 0.00999
        assert 1 <= note.velocity <= 127
        assert note.offset <= 2.048 * len(segments) + 0.02


@given(st.lists(st.integers(3, 1400), max_size=40))
def test_what_follows_eos_is_ignored(tokens):
    cut, whole = NoteDecoder(Codec(1)), NoteDecoder(Codec(1))
    cut.feed(0.0, tokens)
    whole.feed(0.0, [*tokens, EOS, *tokens])
    assert cut.finish() == whole.finish()
    assert cut.invalid_events == whole.invalid_events


SURE = {"least_confidence": 0.3, "sure_confidence": 0.4}
GUITAR, STRINGS = 24, 40


def set_class(rolls, frames, pitch, program, value):
    column = (pitch - LOWEST_PITCH) * NUM_CLASSES + program // 8
    rolls.roll("class")[frames, column] = value


def feed(decoder, rolls, *events, start=0.0, end=None):
    tokens = SegmentTokens(decoder.codec.encode(Event(*event)) for event in events)
    tokens.rolls = rolls
    return decoder.feed(start, tokens, end)


def test_heads_give_notes_their_times_velocities_and_confidences():
    rolls = make_rolls(
        ("onset", 4, 60, 0.8),  # its frame ends before the token's time
        ("strength", 4, 60, 50 / 127),
        ("frame", slice(4, 8), 60, 0.9),
        ("drum", 9, 38, 0.6),
    )
    rolls.roll("strength")[9, NUM_PITCHES] = 1.0
    decoder = NoteDecoder(Codec(), **SURE)
    events = [("tie", 0), ("shift", 10), ("velocity", 1), ("pitch", 60), ("shift", 19)]
    feed(decoder, rolls, *events, ("drum", 38))
    notes = [Note(0.09, 0.17, 60, 50, 0), Note(0.19, 0.2, 38, 127, 0, True)]
    assert decoder.finish() == notes
    pitched, drum = (decoder.confidences[note] for note in notes)
    assert 0.8 < pitched < 1 and drum == pytest.approx(0.6)  # "frame" bears the pitch out


def test_notes_of_which_the_heads_are_not_sure_are_left_out():
    sounding = ("frame", slice(5, 9), 60, 0.6)
    rolls = make_rolls(("onset", 4, 60, 0.35), sounding, ("drum", 9, 38, 0.35))
    decoder = NoteDecoder(Codec(), **SURE)
    events = [("tie", 0), ("shift", 8), ("velocity", 1), ("pitch", 60), ("pitch", 61)]
    events += [("shift", 20), ("drum", 37), ("drum", 38), ("velocity", 0), ("pitch", 61)]
    feed(decoder, rolls, *events)
    assert [n.pitch for n in decoder.finish()] == [60, 38]
    assert decoder.invalid_events == 0


def test_what_the_heads_are_sure_of_and_no_token_tells_is_added():
    rolls = make_rolls(
        ("onset", slice(4, 7), 60, [0.5, 0.9, 0.5]),  # one onset, at its peak
        ("frame", slice(5, 10), 60, 0.9),
        ("strength", 5, 60, 0.5),
        ("drum", 9, 38, 0.6),
        ("onset", 15, 60, 0.39),
    )
    set_class(rolls, slice(5, 10), 60, STRINGS, 0.7)
    set_class(rolls, slice(5, 10), 60, 0, 0.2)
    decoder = NoteDecoder(Codec(), **SURE, programs=range(0, 128, 8))
    string = Note(0.11, 0.21, 60, 64, STRINGS)
    hit = Note(0.19, 0.2, 38, 1, 0, True)
    assert sort_notes(feed(decoder, rolls)) == decoder.finish() == [string, hit]
    piano = NoteDecoder(Codec(), **SURE, programs=[0], drums=False)
    assert feed(piano, rolls) == [string._replace(program=0)]


def test_a_note_lasts_as_long_as_the_heads_hear_it_whatever_tokens_say():
    rolls = make_rolls(
        ("onset", [1, 10], 60, 0.9),
        ("frame", slice(1, 5), 60, 0.9),
        ("frame", 5, 60, 0.1),  # no pause, it is too short
        ("frame", slice(6, 15), 60, 0.9),
        ("onset", 12, 70, 0.9),
        ("frame", slice(12, 20), 70, 0.9),
    )
    decoder = NoteDecoder(Codec(), **SURE)
    events = [("tie", 0), ("shift", 3), ("program", 0), ("velocity", 1), ("pitch", 60)]
    feed(decoder, rolls, *events, ("shift", 6), ("velocity", 0), ("pitch", 60), end=0.4)
    assert [n[:3] for n in decoder.notes] == [(0.03, 0.21, 60), (0.21, 0.31, 60)]
    assert list(decoder.open_notes) == [(0, 70)]
    silent = make_rolls(("frame", slice(0, 6), 70, 0.9))
    feed(decoder, silent, ("tie", 0), start=0.4)  # which does not tie it
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
    decoder = NoteDecoder(Codec(), **SURE)
    assert [note.offset for note in feed(decoder, rolls)] == ends
    assert len(ends) + len(decoder.open_notes) == 1


def test_a_note_on_the_border_of_two_segments_is_one():
    sounding = ("frame", slice(0, 20), 60, 0.9)
    decoder = NoteDecoder(Codec(), **SURE)
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
    whole, halves = NoteDecoder(Codec(), **SURE), NoteDecoder(Codec(), **SURE)
    feed(whole, rolls)
    for first in range(0, 96, 16):
        end = None if first == 80 else (first + 16) / 50
        window = NoteRolls(rolls.values[first : first + 32], 50.0)
        feed(halves, window, start=first / 50, end=end)
    assert halves.finish() == whole.finish()
    assert halves.confidences == pytest.approx(whole.confidences)


def test_what_the_next_segment_hears_fades_in():
    crossfade = Crossfade()
    first = crossfade.join(make_rolls(("onset", slice(0, 20), 60, 1.0)), 10)
    assert first.num_steps == 20
    second = crossfade.join(make_rolls(), None)
    heard = second.roll("onset")[:, 60 - LOWEST_PITCH]
    np.testing.assert_allclose(heard[:10], 1)  # for the context
    np.testing.assert_allclose(heard[10:20], np.linspace(0.95, 0.05, 10), rtol=1e-5)
    assert not heard[20:].any() and second.num_steps == 40


def test_what_the_frame_head_does_not_bear_out_is_no_note():
    def pitches(*cells):
        return [note.pitch for note in feed(NoteDecoder(Codec(), **SURE), make_rolls(*cells))]

    onset, after = ("onset", 10, 60, 0.35), ("frame", slice(10, 14), 60, 0.9)
    assert pitches(onset, after) == [60]
    assert pitches(onset) == []  # it does not sound
    assert pitches(onset, after, ("frame", slice(0, 10), 60, 0.9)) == []  # it sounds already


def test_of_two_onsets_close_together_the_surer_is_the_note():
    sounding = ("frame", slice(4, 16), 60, 0.9)
    for surest in (4, 7):
        onsets = ("onset", [4, 7], 60, [0.9, 0.5] if surest == 4 else [0.5, 0.9])
        decoder = NoteDecoder(Codec(), **SURE)
        feed(decoder, make_rolls(onsets, sounding))
        assert [n.onset for n in decoder.finish()] == pytest.approx([(surest + 0.5) / 50])


def test_of_two_snares_one_is_struck_and_as_surely_as_any():
    rolls = make_rolls(("drum", 9, 38, 0.35), ("drum", 10, 40, 0.3), ("drum", 10, 36, 0.9))
    heard = feed(NoteDecoder(Codec(), **SURE), rolls)
    assert sorted(note.pitch for note in heard) == [36, 38]
    either = 1 - (1 - 0.35) * (1 - 0.3)
    assert rolls.hits[9, 38] == pytest.approx(either) and rolls.hits[10, 40] == 0


def test_of_two_cymbals_as_likely_it_is_the_one_heard_around():
    beat = [("drum", frame, 42, 0.8) for frame in (2, 8, 17)]
    rolls = make_rolls(*beat, ("drum", 13, 42, 0.4), ("drum", 13, 51, 0.45))
    heard = feed(NoteDecoder(Codec(), **SURE), rolls)
    assert [(note.onset, note.pitch) for note in heard] == [
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
        certainty = Certainty(0.45, 0.2)
        return [certainty.hear(rolls) for rolls in segments][-1]

    assert limits(make_rolls()) == Limits(0.45, 0.45)
    faint, clear = limits(*[music(0.5)] * 9), limits(*[music(0.95)] * 9)
    assert faint.pitched < 0.45 < clear.pitched and faint.drum < 0.45 < clear.drum
    crowded = limits(*[music(0.95, num_pitches=9)] * 9)
    assert crowded.pitched < clear.pitched and crowded.drum == pytest.approx(clear.drum, abs=0.05)
    returned = limits(*[music(0.95)] * 9, *[music(0.5)] * 40)
    assert returned == pytest.approx(limits(*[music(0.5)] * 49), abs=0.02)


def test_limits_stay_in_their_bounds_and_memory_too():
    rng = np.random.default_rng(0)
    certainty = Certainty(0.45, 0.2)
    for loudest in np.repeat(np.linspace(0, 1, 50), 4):
        rolls = make_rolls()
        rolls.values[...] = rng.uniform(0, loudest, rolls.values.shape)
        assert all(0.2 <= limit <= Certainty.HIGHEST for limit in certainty.hear(rolls))
    assert len(certainty._onsets[0]) < 50 * 20 * NUM_PITCHES / 4


def test_a_confidence_of_one_adds_nothing_and_nothing_is_heard_that_may_not_be():
    rolls = make_rolls(("onset", 4, 60, 1.0), ("drum", 9, 38, 1.0))
    assert feed(NoteDecoder(Codec()), rolls) == []
    told = [("tie", 0), ("shift", 8), ("velocity", 1), ("pitch", 60)]
    assert feed(NoteDecoder(Codec(), **SURE, programs=[], drums=False), rolls, *told) == []


def test_pitches_without_a_column_are_read_from_tokens_alone():
    decoder = NoteDecoder(Codec(), **SURE)
    events = [("tie", 0), ("shift", 5), ("velocity", 1), ("pitch", 10), ("shift", 30)]
    feed(decoder, make_rolls(), *events, ("velocity", 0), ("pitch", 10))
    assert decoder.finish() == [Note(0.05, 0.3, 10, 127, 0)]
