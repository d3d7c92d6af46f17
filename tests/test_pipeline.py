"""Chunks, targets and batches: exact where the original is, reproducible everywhere."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mt3_keras.codec import EOS, Codec
from mt3_keras.data import guitarset
from mt3_keras.data.mixture import mixture_rates
from mt3_keras.data.pipeline import (
    Batch,
    ChunkMaker,
    PipelineConfig,
    TrainingBatches,
)
from mt3_keras.data.records import PIECE_SAMPLES, Record, RecordsError, find_records
from mt3_keras.data.rolls import CERTAIN, name_targets, roll_targets
from mt3_keras.data.shards import Loaded, Source, cut_pieces, example_source, write_records
from mt3_keras.models.config import (
    HEADS,
    ISMIR2021,
    LOWEST_DRUM,
    MT3,
    SMALL,
    ModelConfig,
    MT3Config,
    T5Config,
    VocabularyConfig,
)
from mt3_keras.note_decoder import NoteDecoder
from mt3_keras.note_encoder import encode_segments, mix_segments, notes_to_events
from mt3_keras.notes import Note

HOP = 128
PIECE_FRAMES = PIECE_SAMPLES // HOP
SHORT = MT3Config(network=T5Config(max_tokens=256))


def make_chunks(model_config: ModelConfig, **options: Any) -> ChunkMaker:
    return ChunkMaker([], PipelineConfig(data=(), **options), model_config)


def silent_records(notes: Sequence[Note], num_frames: int) -> list[Record]:
    return list(cut_pieces("x", np.zeros((num_frames - 1) * HOP, np.float32), notes))


def with_vocabulary(model_config: MT3Config, **changes: Any) -> MT3Config:
    vocabulary = dataclasses.replace(model_config.vocabulary, **changes)
    return dataclasses.replace(model_config, vocabulary=vocabulary)


# --- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", ["piano", "band", "quartet"])
@pytest.mark.parametrize("encoding", range(3))
def test_targets_on_segment_borders_are_the_originals(
    shared: pathlib.Path, piece: str, encoding: int
) -> None:
    golden = json.loads((shared / "golden" / f"enc_{piece}.json").read_text())
    notes = [Note(*fields) for fields in golden["notes"]]
    expected = golden["encodings"][encoding]
    length = expected["segment_frames"]
    model_config = with_vocabulary(
        {256: MT3, 512: ISMIR2021}[length],
        num_velocity_bins=expected["num_velocity_bins"],
        ties=expected["ties"],
        granularity=expected["granularity"],
    )
    make = make_chunks(model_config)
    records = silent_records(notes, expected["num_frames"])
    num_compared = collections.Counter[int]()
    for i, tokens in enumerate(expected["segments"]):
        index, start = divmod(i * length, PIECE_FRAMES)
        index = min(index, len(records) - 1)
        start = i * length - index * PIECE_FRAMES
        chunk = make.chunk([records[index]], [start])
        if chunk.num_frames == min(length, expected["num_frames"] - i * length):
            assert chunk.tokens == [tokens]
            num_compared[index] += 1
    assert len(records) > 1 and min(num_compared.values()) > 1
    assert sum(num_compared.values()) >= len(expected["segments"]) - (len(records) - 1)


@st.composite
def any_notes(draw: st.DrawFn) -> list[Note]:
    """Few pitches and programs, so that notes of one pitch overlap in every way."""
    onset, length = st.integers(0, 4000), st.integers(1, 2500)
    note = st.builds(
        lambda on, span, pitch, program, drum: Note(
            on / 125, (on + span) / 125, pitch, 100, 0 if drum else program, drum
        ),
        onset,
        length,
        st.integers(60, 62),
        st.integers(0, 1),
        st.booleans(),
    )
    return draw(st.lists(note, min_size=1, max_size=30))


@settings(max_examples=40, deadline=None)
@given(notes=any_notes(), place=st.integers(0, 4050), length=st.integers(1, 300))
def test_targets_of_a_chunk_are_those_of_the_whole_piece(
    notes: list[Note], place: int, length: int
) -> None:
    num_frames = 4051
    network = dataclasses.replace(SHORT.network, segment_frames=length)
    make = make_chunks(dataclasses.replace(SHORT, network=network))
    record = silent_records(notes, num_frames)[min(2, place // PIECE_FRAMES)]
    first = record.first_sample // HOP
    chunk = make.chunk([record], [place - first])
    end = min(place + length, first + make.num_frames(record))
    codec = Codec()
    (expected,) = encode_segments(
        notes_to_events(notes, codec),
        codec,
        [place / 125],
        end=None if end == num_frames else end / 125,
    )
    assert chunk.tokens == [expected]
    assert chunk.num_frames == end - place


def test_a_chunk_may_begin_before_its_piece_and_is_clipped() -> None:
    notes = [Note(0.01 + i / 10, 0.05 + i / 10, 60, 100) for i in range(20)]
    samples = np.arange(32_000, dtype=np.float32) / 2**15
    (record,) = cut_pieces("x", samples, notes)
    make = make_chunks(MT3)
    early, first = make.chunk([record], [-100]), make.chunk([record], [0])
    assert early.num_frames == 156 and first.num_frames == 251  # 250 hops and one more
    np.testing.assert_array_equal(early.samples[: 156 * HOP], samples[: 156 * HOP])
    assert not early.samples[156 * HOP :].any()
    assert early.tokens[0][:-1] == first.tokens[0][: early.num_tokens - 1]


@pytest.mark.parametrize("context", ["segment", "full"])
def test_samples_around_a_chunk_are_zeros_or_true_audio(context: str) -> None:
    samples = (np.arange(40 * 16_000) % 30_000 + 1).astype(np.float32) / 2**15
    records = list(cut_pieces("x", samples, [Note(0.0, 1.0, 60, 100)]))
    make = make_chunks(SMALL, context=context)
    hop, lead = SMALL.spectrogram.hop_samples, SMALL.spectrogram.lead_samples
    for start in (7, 1000 - SMALL.network.segment_frames, 950):  # inside, to the end, clipped
        chunk = make.chunk([records[1]], [start])
        begin = PIECE_SAMPLES + start * hop
        end = begin + chunk.num_frames * hop
        reach = (lead, SMALL.spectrogram.overhang_samples) if context == "full" else (0, 0)
        expected = np.zeros(SMALL.input_samples, np.float32)
        part = samples[begin - reach[0] : end + reach[1]]
        expected[lead - reach[0] :][: part.size] = part
        np.testing.assert_array_equal(chunk.samples, expected)


# --- mixing -------------------------------------------------------------------------------------


def test_a_mix_of_segments_decodes_to_the_notes_of_all() -> None:
    codec = Codec()
    parts = [
        [Note(0.5, 3.0, 60, 127, 0), Note(2.5, 2.75, 64, 127, 0)],
        [Note(1.0, 2.5, 48, 127, 33), Note(2.25, 2.26, 38, 127, 0, True)],
    ]
    decoder = NoteDecoder(codec)
    for start, end in ((0.0, 2.0), (2.0, 4.0)):
        written = [
            encode_segments(notes_to_events(part, codec), codec, [start], end=end, to_mix=True)[0]
            for part in parts
        ]
        decoder.feed(start, mix_segments(written, codec), end)
    found = decoder.finish()
    assert sorted(found) == sorted(note for part in parts for note in part)
    assert decoder.invalid_events == 0


@pytest.mark.parametrize("ties", [True, False])
def test_a_mix_of_one_segment_and_nothing_is_that_segment(ties: bool) -> None:
    codec = Codec()
    notes = [Note(0.1 * i, 0.1 * i + 2.5, 40 + i % 9, 90, i % 3) for i in range(50)]
    events = notes_to_events(notes, codec)
    raw = encode_segments(events, codec, [2.0], end=4.0, ties=ties, to_mix=True)[0]
    assert (
        mix_segments([raw], codec) == encode_segments(events, codec, [2.0], end=4.0, ties=ties)[0]
    )


# --- rolls --------------------------------------------------------------------------------------


def test_rolls_mark_where_notes_begin_end_and_sound() -> None:
    notes = [
        Note(9.5, 10.045, 60, 100, 9),  # from before the chunk
        Note(10.0, 10.01, 21, 30, 41),  # shorter than a frame
        Note(10.1, 11.0, 108, 127, 0),  # beyond its end
        Note(10.05, 10.2, 20, 100, 0),  # not on the piano
        Note(10.03, 10.09, 60, 100, 0),  # a unison with the next, begun in one frame
        Note(10.035, 10.045, 60, 90, 70),
        Note(10.02, 10.03, 38, 70, 0, True),
        Note(10.02, 10.03, 42, 60, 0, True),
    ]
    place = {"first_frame": 500, "num_frames": 10, "frames_per_second": 50}
    rolls = roll_targets(notes, **place, window_frames=12)
    assert {head: roll.shape for head, roll in rolls.items()} == {
        head: (12, size) for head, size in HEADS.items()
    }
    found = {
        head: sorted(zip(*(index.tolist() for index in np.nonzero(roll == CERTAIN)), strict=True))
        for head, roll in rolls.items()
    }
    for head, velocities in {
        "strength": {(0, 0): 30, (1, 39): 100, (5, 87): 127},
        "drum_strength": {(1, 0): 70},  # the stronger of two
    }.items():
        roll = rolls.pop(head)
        places = zip(*np.nonzero(roll >= 0), strict=True)
        assert {place: roll[place] for place in places} == velocities
    assert found["onset"] == [(0, 0), (1, 39), (5, 87)]
    assert found["unison"] == [(1, 39)]
    assert found["offset"] == [(0, 0), (2, 39), (4, 39)]
    assert found["frame"] == [
        (0, 0),
        *((i, 39) for i in range(4)),
        *((i, 87) for i in range(5, 10)),
    ]
    assert found["drum"] == [(1, 38 - LOWEST_DRUM), (1, 42 - LOWEST_DRUM)]
    assert rolls["onset"][[0, 1, 2], 39].tolist() == [30, 100, 50]  # a frame early or late
    assert all((roll[10:] == -1).all() and (roll[:10] >= 0).all() for roll in rolls.values())
    later = roll_targets(
        notes, 503, num_frames=5, window_frames=5, frames_per_second=50
    )  # of a part as of the whole
    for head, roll in rolls.items():
        np.testing.assert_array_equal(later[head], roll[3:8])


def test_notes_to_name_are_those_that_begin_in_the_excerpt_with_their_unisons() -> None:
    notes = [
        Note(0.05, 0.3, 60, 90, 40),  # before the excerpt
        Note(0.20, 0.3, 60, 90, 40),
        Note(0.21, 0.3, 60, 90, 73),
        Note(0.25, 0.3, 62, 90, 8),
        Note(0.25, 0.3, 38, 90, 0, True),
    ]
    rng = np.random.default_rng(0)

    def draw(max_notes: int) -> dict[str, np.ndarray]:
        return name_targets(
            notes, 10, num_frames=20, max_notes=max_notes, frames_per_second=100.0, rng=rng
        )

    found = draw(4)
    rows = {
        (*cell, *programs)
        for cell, programs in zip(found["cells"].tolist(), found["programs"].tolist(), strict=True)
    }
    assert rows == {(10, 39, 40, 73), (11, 39, 73, 40), (15, 41, 8, 8), (-1, -1, -1, -1)}
    assert (draw(1)["programs"] >= 0).all()


def test_joined_targets_say_a_spread_chord_as_one_moment() -> None:
    chord = [Note(1 + 0.01 * i, 2, 60 + 4 * i, 90, 40 + i) for i in range(3)]
    (record,) = silent_records([*chord, Note(1.5, 2, 30, 90, 32)], 250)
    config = PipelineConfig(data=(), join_seconds=0.03)
    vocabulary = VocabularyConfig(granularity="midi_class")
    model_config = dataclasses.replace(MT3, vocabulary=vocabulary)
    chunk = ChunkMaker([], config, model_config).chunk([record], [0])
    decoder = NoteDecoder(Codec())
    decoder.feed(0.0, chunk.tokens[0])
    found = [(n.onset, n.offset, n.pitch, n.program) for n in decoder.finish()]
    assert found == [
        (1.01, 2, 60, 40),
        (1.01, 2, 64, 40),
        (1.01, 2, 68, 40),
        (1.5, 2, 30, 32),
    ]


# --- batches ------------------------------------------------------------------------------------


def load(level: float, seconds: float, num_notes: int) -> Loaded:
    """Audio of one value, by which its batch rows are known."""
    notes = [
        Note(i * seconds / num_notes, (i + 1) * seconds / num_notes, 40 + i % 40, 100)
        for i in range(num_notes)
    ]
    return np.full(round(16_000 * seconds), level, np.float32), notes


def write(folder: pathlib.Path, name: str, levels: Sequence[float], num_notes: int = 8) -> str:
    sources = [
        Source(f"{i}", functools.partial(load, level, 2.5, num_notes))
        for i, level in enumerate(levels)
    ]
    write_records(sources, folder, name=name, split="train", num_shards=2, num_workers=1)
    return str(folder)


LEVELS = tuple(i / 64 for i in range(1, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("data"), "eight", LEVELS)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Three data sets of 1, 4 and 32 records, told apart by their level."""
    counts = {"one": (1, 0.25), "four": (4, 0.5), "many": (32, 0.75)}
    root = tmp_path_factory.mktemp("mixture")
    return tuple(
        write(root / name, name, [level] * count) for name, (count, level) in counts.items()
    )


def take(batches: TrainingBatches, count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]


def assert_same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def row_levels(batch: Batch) -> NDArray[np.float32]:
    return batch["samples"][:, 0]


def test_a_batch_has_what_the_model_takes(folder: str) -> None:
    batch = next(TrainingBatches(PipelineConfig(data=(folder,)), SHORT, 3))
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "samples": ((3, SHORT.input_samples), "float32"),
        "num_frames": ((3,), "int32"),
        "decoder_tokens": ((3, SHORT.network.max_tokens), "int32"),
        "targets": ((3, SHORT.network.max_tokens), "int32"),
    }
    for inputs, targets in zip(batch["decoder_tokens"], batch["targets"], strict=True):
        end = int(np.argmax(targets == EOS))
        assert end > 0 and not targets[end + 1 :].any() and targets[:end].all()
        assert inputs[0] == 0 and (inputs[1:] == targets[:-1]).all()


def test_a_detector_gets_samples_and_its_rolls_alone(folder: str) -> None:
    batch = next(TrainingBatches(PipelineConfig(data=(folder,)), SMALL, 2))
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "samples": ((2, SMALL.input_samples), "float32"),
        **{head: ((2, SMALL.window_frames, size), "int8") for head, size in HEADS.items()},
        "cells": ((2, 32, 2), "int32"),
        "programs": ((2, 32, 2), "int32"),
    }


def test_a_detectors_stream_is_resumed_and_mixes_rolls(folder: str) -> None:
    config = PipelineConfig(data=(folder,), num_mixed=2)
    whole = take(TrainingBatches(config, SMALL, 4), 4)
    batches = TrainingBatches(config, SMALL, 4)
    take(batches, 2)
    fresh = TrainingBatches(config, SMALL, 4)
    fresh.set_state(json.loads(json.dumps(batches.get_state())))
    assert_same(take(fresh, 2), whole[2:])
    more = take(TrainingBatches(config, SMALL, 4), 24)
    played = [(batch["frame"] == CERTAIN).sum(axis=-1).max(axis=1) for batch in more]
    sounding = np.concatenate(played)
    assert set(sounding.tolist()) >= {1, 2}  # one piece never plays two pitches at once


def test_chunks_begin_anywhere_that_leaves_a_frame(folder: str) -> None:
    batches = TrainingBatches(PipelineConfig(data=(folder,)), SHORT, 50)
    counts = np.concatenate([batch["num_frames"] for batch in take(batches, 8)])
    length, total = SHORT.network.segment_frames, round(2.5 * 125) + 1
    assert counts.min() >= 1 and counts.max() == length
    whole = (total - length + 1) / (total + length - 1)  # share of chunks that are not clipped
    spread = np.sqrt(whole * (1 - whole) / counts.size)
    assert abs((counts == length).mean() - whole) < 4 * spread


def test_data_sets_are_drawn_by_the_power_of_their_size(mixture: tuple[str, ...]) -> None:
    batches = TrainingBatches(PipelineConfig(data=mixture), SHORT, 20)
    levels = np.concatenate([row_levels(batch) for batch in take(batches, 20)])
    powers = np.array([1, 4, 32]) ** 0.3
    for share, level in zip(powers / powers.sum(), (0.25, 0.5, 0.75), strict=True):
        spread = np.sqrt(share * (1 - share) / levels.size)
        assert abs((levels == level).mean() - share) < 3 * spread


def test_folders_of_one_data_set_count_as_one(tmp_path: pathlib.Path) -> None:
    levels = {"a": (0.125, 0.25), "b": (0.5,)}
    data = tuple(write(tmp_path / name, "same", found) for name, found in levels.items())
    batch = next(TrainingBatches(PipelineConfig(data), SHORT, 3))
    assert sorted(row_levels(batch).tolist()) == [0.125, 0.25, 0.5]


def test_rates_follow_the_exponent() -> None:
    counts = {"a": 100, "b": 800}
    rates = mixture_rates(counts)
    assert rates["b"] / rates["a"] == pytest.approx(8**0.3)
    assert mixture_rates(counts, exponent=1) == pytest.approx({"a": 1 / 9, "b": 8 / 9})
    assert mixture_rates(counts, exponent=0) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("counts", "options", "reason"),
    [
        ({}, {}, "must have records"),
        ({"a": 0}, {}, "must have records"),
        ({"a": 1}, {"exponent": -1}, "exponent must be 0 to 1"),
    ],
)
def test_rates_out_of_range_are_refused(
    counts: dict[str, int], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        mixture_rates(counts, **options)


@pytest.mark.parametrize("buckets", [(), (24, 40)])
@pytest.mark.parametrize("num_used", [0, 4])
def test_a_resumed_stream_gives_the_same_batches(
    folder: str, buckets: tuple[int, ...], num_used: int
) -> None:
    config = PipelineConfig(data=(folder,), buckets=buckets, window_batches=3, num_mixed=2)
    whole = take(TrainingBatches(config, SHORT, 4), num_used + 3)
    batches = TrainingBatches(config, SHORT, 4)
    take(batches, num_used)
    state = json.loads(json.dumps(batches.get_state()))
    assert_same(take(batches, 3), whole[num_used:])
    batches.set_state(state)
    assert_same(take(batches, 3), whole[num_used:])
    fresh = TrainingBatches(config, SHORT, 4)
    fresh.set_state(state)
    assert_same(take(fresh, 3), whole[num_used:])


def test_a_state_of_another_stream_is_refused(folder: str) -> None:
    state = TrainingBatches(PipelineConfig(data=(folder,)), SHORT, 4).get_state()
    for config, size in ((PipelineConfig((folder,), seed=1), 4), (PipelineConfig((folder,)), 5)):
        with pytest.raises(ValueError, match="other data or settings"):
            TrainingBatches(config, SHORT, size).set_state(state)


def test_workers_change_nothing(folder: str) -> None:
    config = PipelineConfig(data=(folder,), buckets=(24,), window_batches=2)
    alone = TrainingBatches(config, SHORT, 4)
    helped = TrainingBatches(dataclasses.replace(config, num_workers=2), SHORT, 4)
    try:
        assert_same(take(alone, 5), take(helped, 5))
        state = alone.get_state()  # also across different numbers of workers
        assert helped.get_state() == state
        helped.set_state({**state, "num_batches": 1})
        again = TrainingBatches(config, SHORT, 4)
        take(again, 1)
        assert_same(take(helped, 2), take(again, 2))
    finally:
        helped.close()


def test_the_seed_decides_order_and_chunks(folder: str) -> None:
    first, again, other = (
        next(TrainingBatches(PipelineConfig(data=(folder,), seed=seed), SHORT, 8))
        for seed in (3, 3, 4)
    )
    assert_same([first], [again])
    assert (row_levels(first) != row_levels(other)).any()
    assert (first["num_frames"] != other["num_frames"]).any()


def test_hosts_side_by_side_are_one_host_and_see_every_record_once_an_epoch(folder: str) -> None:
    hosts = [
        take(TrainingBatches(PipelineConfig((folder,), shard_index=i, num_shards=2), SHORT, 2), 4)
        for i in range(2)
    ]
    joined = [
        {name: np.concatenate([one[name], other[name]]) for name in one}
        for one, other in zip(*hosts, strict=True)
    ]
    assert_same(joined, take(TrainingBatches(PipelineConfig((folder,)), SHORT, 4), 4))
    for epoch in (joined[:2], joined[2:]):
        levels = np.concatenate([row_levels(batch) for batch in epoch])
        assert sorted(levels.tolist()) == list(LEVELS)


def test_each_epoch_has_another_order(folder: str) -> None:
    first, second = take(TrainingBatches(PipelineConfig((folder,)), SHORT, 8), 2)
    assert row_levels(first).tolist() != row_levels(second).tolist()


def test_buckets_shorten_batches_and_lose_nothing(folder: str) -> None:
    config = PipelineConfig((folder,))
    plain = take(TrainingBatches(config, SHORT, 2), 8)
    config = dataclasses.replace(config, buckets=(16, 24, 1000), window_batches=4)
    sorted_ones = take(TrainingBatches(config, SHORT, 2), 8)
    assert {batch["targets"].shape[1] for batch in sorted_ones} > {24}
    assert {batch["targets"].shape[1] for batch in sorted_ones} <= {16, 24, 256}

    def rows(batches: Sequence[Batch]) -> list[bytes]:
        padded = [np.pad(b["targets"], ((0, 0), (0, 256 - b["targets"].shape[1]))) for b in batches]
        return sorted(row.tobytes() for targets in padded for row in targets)

    for window in (slice(0, 4), slice(4, 8)):
        assert rows(plain[window]) == rows(sorted_ones[window])


def test_chunks_with_too_many_tokens_are_drawn_anew_and_counted(tmp_path: pathlib.Path) -> None:
    data = (write(tmp_path, "dense", [0.5], num_notes=40),)
    batches = TrainingBatches(PipelineConfig(data, target_tokens=60), SHORT, 20)
    batch = next(batches)
    assert batch["targets"].shape == (20, 60)
    has_end = (batch["targets"] == EOS).any(axis=1)
    assert has_end.mean() > 0.5 and not batch["targets"][~has_end].any()
    assert batches.num_too_long > 0
    assert batches.get_state()["num_too_long"] == batches.num_too_long
    hopeless = next(TrainingBatches(PipelineConfig(data, target_tokens=1), SHORT, 2))
    assert not hopeless["targets"].any()  # nothing is learned from these rows


def test_mixed_chunks_are_sums_at_full_scale(folder: str) -> None:
    config = PipelineConfig(data=(folder,), num_mixed=3)
    levels = collections.Counter[float]()
    for batch in take(TrainingBatches(config, SHORT, 16), 4):
        peaks = np.abs(batch["samples"]).max(axis=1)
        np.testing.assert_allclose(peaks, 1, rtol=1e-6)
        levels.update(np.unique(np.round(row, 4)).size for row in batch["samples"])
    assert max(levels) >= 3  # parts of different length lie one over the other


def test_attenuation_makes_each_row_fainter_and_changes_nothing_else(folder: str) -> None:
    plain, fainter = (
        take(TrainingBatches(PipelineConfig((folder,), max_attenuation_db=db), SHORT, 16), 3)
        for db in (0, 20)
    )
    gains = []
    for batch, expected in zip(fainter, plain, strict=True):
        peaks, whole = (np.abs(b.pop("samples")).max(axis=1) for b in (batch, expected))
        gains += (peaks[whole > 0] / whole[whole > 0]).tolist()
        assert_same([batch], [expected])
    assert 0.1 <= min(gains) < 0.3 and 0.7 < max(gains) <= 1


def test_a_damaged_shard_stops_the_stream_with_its_name(tmp_path: pathlib.Path) -> None:
    data = (write(tmp_path, "test", [0.5, 0.5]),)
    path = tmp_path / "test-train-00001-of-00002.array_record"
    content = path.read_bytes()
    path.write_bytes(content[:400] + b"\xff" * 100 + content[500:])
    for num_workers in (0, 1):
        batches = TrainingBatches(PipelineConfig(data, num_workers=num_workers), SHORT, 4)
        with pytest.raises(RecordsError, match=path.name):
            take(batches, 2)
        batches.close()
    path.write_bytes(content[:-70_000])
    with pytest.raises(RecordsError, match=f"{path.name}: damaged or cut short"):
        TrainingBatches(PipelineConfig(data), SHORT, 4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"context": "none"}, "context must be"),
        ({"join_seconds": 0.06}, "join_seconds must be 0 to 0.05"),
        ({"shard_index": 1}, "shard_index must be"),
        ({"num_mixed": 0}, "num_mixed must be positive"),
        ({"max_attenuation_db": -1}, "max_attenuation_db must be"),
        ({"buckets": (0,)}, "must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PipelineConfig(data=(), **options)


def test_a_real_data_set_reaches_the_batches(shared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    examples = guitarset.find(
        shared / "data" / "slices" / "guitarset", "train", audio="mic", skip_missing=True
    )
    sources = [example_source(example) for example in examples]
    write_records(sources, tmp_path, name="guitarset", split="train", num_workers=1)
    config = PipelineConfig((str(tmp_path),))
    (records,) = find_records(config.data, "train")
    make = ChunkMaker([records], config, MT3)
    decoder = NoteDecoder(Codec())
    end = 0.0
    for index in range(len(records)):
        for first in range(0, make.num_frames(records[index]), make.chunk_frames):
            chunk = make.chunk([records[index]], [first])
            start, end = end, end + chunk.num_frames / 125
            decoder.feed(start, chunk.tokens[0], end)
    notes = examples[0].load_notes()
    found = decoder.finish()
    assert len(found) == len(notes)
    by_pitch = [sorted(some, key=lambda n: (n.pitch, n.onset)) for some in (found, notes)]
    for note, expected in zip(*by_pitch, strict=True):
        assert abs(note.onset - expected.onset) < 0.011 and note.pitch == expected.pitch
