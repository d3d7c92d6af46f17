"""Events and tokens. "Original case" marks the cases of the original's own tests, as facts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt3_keras.codec import (
    Codec,
    Event,
    EventRange,
    bin_to_velocity,
    trim_eos,
    velocity_to_bin,
)

MT3, ISMIR2021 = Codec(1), Codec(127)


def test_codec_ids_of_a_pitch_codec_are_those_of_the_original():  # original case
    codec = Codec(max_shift_steps=100, event_ranges=(EventRange("pitch", 0, 127),))
    events = [Event("pitch", 60), Event("shift", 5), Event("pitch", 62)]
    tokens = [codec.encode(event) for event in events]
    assert codec.tokens_to_classes(np.array(tokens)).tolist() == [161, 5, 163]
    assert [codec.decode(token) for token in tokens] == events


def test_only_the_first_ids_are_shifts():  # original case
    codec = Codec(max_shift_steps=100, event_ranges=(EventRange("pitch", 0, 127),))
    first, last = codec.token_range("shift")
    assert (first, last) == (3, 103)
    assert codec.decode(last) == Event("shift", 100)
    assert codec.decode(last + 1) == Event("pitch", 0)
    with pytest.raises(ValueError, match="token 2 is no event"):
        codec.decode(first - 1)


@pytest.mark.parametrize("num_bins", [1, 127])
def test_velocity_bins_survive_a_round_trip(num_bins):  # original case
    for velocity_bin in range(num_bins + 1):
        velocity = bin_to_velocity(velocity_bin, num_bins)
        assert velocity_to_bin(velocity, num_bins) == velocity_bin


def test_one_velocity_bin_makes_every_note_on_loudest():
    assert bin_to_velocity(velocity_to_bin(64, 1), 1) == 127
    assert velocity_to_bin(0, 1) == 0


SMALL = Codec(max_shift_steps=31, event_ranges=(), num_extra=4)  # 32 classes


def test_encoding_shifts_classes_past_the_special_ids():  # original case
    assert SMALL.classes_to_tokens(np.array([1, 2, 3])).tolist() == [4, 5, 6]
    assert SMALL.num_tokens == 3 + 32 + 4


def test_decoding_marks_specials_and_unused_ids_as_invalid():  # original case
    tokens = np.array([0, 2, 3, 4, 34, 35])
    assert SMALL.tokens_to_classes(tokens).tolist() == [-2, -2, 0, 1, 31, -2]


def test_decoding_ends_at_eos_in_lists_and_arrays():  # original case
    tokens = [4, 5, 1, 6, 1, 7]
    assert trim_eos(tokens) == [4, 5]
    assert SMALL.tokens_to_classes(np.array(tokens)).tolist() == [1, 2, -1, -1, -1, -1]
    assert SMALL.tokens_to_classes(np.array([tokens, [4] * 6])).tolist()[1] == [1] * 6


@pytest.mark.parametrize("outside", [[-1, 0], [0, 32]])
def test_encoding_classes_out_of_range_raises(outside):  # original case
    with pytest.raises(ValueError, match=r"must be in \[0, 32\)"):
        SMALL.classes_to_tokens(np.array(outside))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integer_types_are_kept(dtype):  # original case
    tokens = SMALL.classes_to_tokens(np.array([1, 2], dtype))
    assert tokens.dtype == dtype
    assert SMALL.tokens_to_classes(tokens).dtype == dtype


@pytest.mark.parametrize(
    ("codec", "event", "token"),
    [
        (MT3, Event("shift", 7), 10),
        (MT3, Event("pitch", 60), 1064),
        (MT3, Event("velocity", 1), 1133),
        (MT3, Event("tie", 0), 1134),
        (MT3, Event("program", 33), 1168),
        (MT3, Event("drum", 127), 1390),
        (ISMIR2021, Event("velocity", 127), 1259),
        (ISMIR2021, Event("tie", 0), 1260),
        (ISMIR2021, Event("program", 0), 1261),
        (ISMIR2021, Event("drum", 127), 1516),
    ],
)
def test_token_ids_are_those_of_the_released_models(codec, event, token):
    assert codec.encode(event) == token
    assert codec.decode(token) == event


def test_vocabulary_sizes_are_those_of_the_released_models():
    assert (MT3.num_events, MT3.num_tokens) == (1388, 1491)
    assert (ISMIR2021.num_events, ISMIR2021.num_tokens) == (1514, 1617)


@given(st.integers(-5, 1700), st.sampled_from([MT3, ISMIR2021]))
def test_every_token_is_an_event_that_encodes_to_it_or_raises(token, codec):
    if 3 <= token < 3 + codec.num_events:
        assert codec.encode(codec.decode(token)) == token
    else:
        with pytest.raises(ValueError, match="no event"):
            codec.decode(token)


@pytest.mark.parametrize(
    "event", [Event("pitch", 128), Event("pitch", -1), Event("shift", 1001), Event("sustain", 0)]
)
def test_events_out_of_range_raise(event):
    with pytest.raises(ValueError, match=event.type):
        MT3.encode(event)
