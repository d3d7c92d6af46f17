"""Notes -> tokens. "Original case" marks the cases of the original's own tests, as facts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt3_keras.codec import EOS, Codec, EventRange
from mt3_keras.note_decoder import NoteDecoder
from mt3_keras.note_encoder import (
    drop_repeated_states,
    encode_notes,
    merge_segments,
    shift_symbols,
    time_to_step,
)
from mt3_keras.notes import Note, sort_notes

# The codec of the original's tests; its ids are our tokens less 3.
CODEC = Codec(
    max_shift_steps=100,
    event_ranges=(
        EventRange("pitch", 0, 127),
        EventRange("velocity", 0, 127),
        EventRange("drum", 0, 127),
        EventRange("program", 0, 127),
        EventRange("tie", 0, 0),
    ),
    num_velocity_bins=127,
)


def to_tokens(ids):
    return [i + 3 for i in ids]


def encode(notes, *, codec=CODEC, **options):
    """Ids of the original's tests, EOS left out."""
    segments = encode_notes(notes, codec, **options)
    assert all(tokens[-1] == EOS and EOS not in tokens[:-1] for tokens in segments)
    return [[token - 3 for token in tokens[:-1]] for tokens in segments]


MILLISECONDS = {"segment_frames": 1000, "num_frames": 4000, "frames_per_second": 1000.0}


def test_onsets_start_the_segments_of_their_frames():  # original case
    notes = [Note(s, s + 1, 60 + s, 100) for s in (1, 2, 3)]
    assert encode(notes, ties=False, onsets_only=True, **MILLISECONDS) == [[], [162], [163], [164]]
    whole = MILLISECONDS | {"segment_frames": 4000}
    expected = [100, 162, *[100] * 2, 163, *[100] * 3, 164]
    assert encode(notes, ties=False, onsets_only=True, **whole) == [expected]


def test_velocities_mark_onsets_and_offsets():  # original case
    notes = [Note(1, 3, 61, 1), Note(2, 4, 62, 127)]
    assert encode(notes, ties=False, granularity="flat", **MILLISECONDS) == [
        [],
        [230, 162],
        [356, 163],
        [229, 162, 100, 163],
    ]


def test_ties_list_what_sounds_at_the_start_of_a_segment():  # original case
    notes = [Note(0, 1, 37, 127, 0, True), Note(1, 3, 61, 127, 0), Note(2, 4, 62, 127, 40)]
    frames = MILLISECONDS | {"num_frames": 4001}
    tie, p0, p40, on, off = 613, 485, 525, 356, 229
    assert encode(notes, **frames) == [
        [tie, on, 357 + 37],
        [tie, p0, on, 162],
        [p0, 162, tie, p40, on, 163],
        [p0, 162, p40, 163, tie, p0, off, 162],
        [p40, 163, tie, off, 163],
    ]


def test_frames_of_8_ms_align_with_steps_of_10_ms():  # original case
    notes = [Note(0, 0.1, 60, 100)]
    options = {"segment_frames": 125, "num_frames": 126, "frames_per_second": 125.0}
    assert encode(notes, ties=False, onsets_only=True, **options) == [[161], []]
    assert time_to_step(125 / 125, 100) == 100


def test_repeated_states_are_dropped():  # original case
    ids = [3, 525, 356, 161, 2, 525, 356, 161, 355, 394]
    kept = [3, 525, 356, 161, 2, 161, 355, 394]
    assert drop_repeated_states(to_tokens(ids), CODEC) == to_tokens(kept)


def onsets(*times):
    return [Note(time, time + 0.5, pitch, 100) for time, pitch in times]


ONE = {"ties": False, "onsets_only": True, "segment_frames": 1000, "num_frames": 1000}


def test_shifts_before_an_event_become_one():  # original case
    assert encode(onsets((0.03, 60), (0.06, 61)), **ONE) == [[3, 161, 6, 162]]


def test_long_shifts_are_split():  # original case
    assert encode(onsets((2.02, 60)), **ONE) == [[100, 100, 2, 161]]
    assert [event.value for event in shift_symbols(200, CODEC)] == [100, 100]


def test_simultaneous_events_share_a_shift():  # original case
    assert encode(onsets((0, 60), (0, 61)), **ONE) == [[161, 162]]


def test_merging_orders_events_of_several_segments_by_time():  # original case
    segments = [[3, 161, 162, 5, 163], [160, 164, 3, 165]]
    merged = merge_segments([to_tokens(ids) for ids in segments], CODEC)
    assert merged == to_tokens([160, 164, 3, 161, 162, 165, 5, 163])
    padded = [to_tokens(segments[0]), [*to_tokens(segments[1]), 0]]
    assert merge_segments(padded, CODEC) == merged


@pytest.mark.parametrize("piece", ["band", "piano", "quartet"])
def test_targets_are_those_of_the_original_to_the_token(shared, piece):
    golden = json.loads((shared / "golden" / f"enc_{piece}.json").read_text())
    notes = [Note(*row) for row in golden["notes"]]
    for case in golden["encodings"]:
        segments = encode_notes(
            notes,
            Codec(case["num_velocity_bins"]),
            segment_frames=case["segment_frames"],
            num_frames=case["num_frames"],
            ties=case["ties"],
            granularity=case["granularity"],
        )
        assert segments == case["segments"]


@pytest.mark.parametrize("piece", ["band", "piano", "quartet"])
def test_real_pieces_survive_tokens_to_10_ms(shared, piece):
    golden = json.loads((shared / "golden" / f"enc_{piece}.json").read_text())
    codec = Codec(127)
    notes = sort_notes(Note(*row) for row in golden["notes"])
    segments = encode_notes(notes, codec, num_frames=golden["encodings"][0]["num_frames"])
    decoded = decode(segments, codec)
    assert len(decoded) == len(notes)
    key = lambda n: (n.is_drum, n.program, n.pitch, n.onset)  # noqa: E731
    for got, expected in zip(sorted(decoded, key=key), sorted(notes, key=key), strict=True):
        assert got[2:] == expected[2:]
        assert abs(got.onset - expected.onset) <= 0.01
        if not expected.is_drum:
            assert abs(got.offset - expected.offset) <= 0.01


def decode(segments, codec, segment_frames=256, **options):
    decoder = NoteDecoder(codec, **options)
    starts = [i * segment_frames / 125 for i in range(len(segments))]
    for start, tokens, end in zip(starts, segments, [*starts[1:], None], strict=True):
        decoder.feed(start, tokens, end)
    assert (decoder.invalid_events, decoder.dropped_events) == (0, 0)
    return decoder.finish()


@st.composite
def separate_notes(draw):
    """Notes on the 10 ms grid, up to 100 s long, of which no two of one key touch."""
    notes, clock = [], {}
    for _ in range(draw(st.integers(0, 25))):
        is_drum = draw(st.booleans())
        program = 0 if is_drum else draw(st.sampled_from([0, 33, 40]))
        pitch = draw(st.integers(60, 62))
        start = clock.get((is_drum, program, pitch), -1) + draw(st.integers(1, 2000))
        end = start + (1 if is_drum else draw(st.integers(1, 1500)))
        clock[is_drum, program, pitch] = end
        notes.append(
            Note(start / 100, end / 100, pitch, draw(st.integers(1, 127)), program, is_drum)
        )
    return sort_notes(notes)


@settings(deadline=None)
@given(separate_notes(), st.sampled_from([64, 256, 512]))
def test_notes_survive_a_round_trip_through_any_segments(notes, segment_frames):
    codec = Codec(127)
    num_frames = int(max([n.offset for n in notes], default=0.0) * 125) + 1
    segments = encode_notes(notes, codec, segment_frames=segment_frames, num_frames=num_frames)
    decoded = decode(segments, codec, segment_frames)
    assert [n[2:] for n in decoded] == [n[2:] for n in notes]
    for got, expected in zip(decoded, notes, strict=True):
        assert got.onset == pytest.approx(expected.onset, abs=1e-6)
        assert got.offset == pytest.approx(expected.offset, abs=1e-6)


def test_the_originals_segment_starts_move_some_notes_by_10_ms():
    """Why "grid" is the default: the targets themselves are counted from the grid."""
    notes = [Note(31.0, 31.5, 60, 100)]  # in segment 15, from 30.72 s
    segments = encode_notes(notes, Codec(1), num_frames=125 * 32)
    assert decode(segments, Codec(1))[0].onset == pytest.approx(31.0)
    original = decode(segments, Codec(1), segment_start="original")
    assert original[0].onset == pytest.approx(30.99)


def test_a_piece_without_notes_is_ties_and_nothing_else():
    assert encode_notes([], Codec(1), num_frames=300) == [[1134, EOS]] * 2


def test_segments_after_the_last_event_still_list_its_notes_as_tied():
    """The original's quirk, kept for exact targets."""
    segments = encode_notes([Note(0.5, 1.0, 60, 100)], Codec(1), num_frames=800)
    assert segments[1:] == [[1135, 1064, 1134, EOS]] * 3


@pytest.mark.parametrize("arguments", [{"num_frames": 0}, {"num_frames": 9, "segment_frames": 0}])
def test_frame_counts_must_be_positive(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        encode_notes([], Codec(1), **arguments)
