"""Tokens -> notes. "Original case" marks the cases of the original's own tests, as facts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt3_keras.codec import EOS, Codec
from mt3_keras.note_decoder import NoteDecoder
from mt3_keras.notes import Note, sort_notes
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
