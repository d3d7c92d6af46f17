"""The models in the box: their size, what they load on, and that they hear the examples."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from mt3_keras.audio import read_blocks
from mt3_keras.grammar import Rules
from mt3_keras.metrics import onset_scores
from mt3_keras.midi import read_midi
from mt3_keras.models.catalog import find_preset, shipped_names
from mt3_keras.models.config import ModelConfig
from mt3_keras.note_decoder import NoteDecoder
from mt3_keras.segments import cut_segments
from mt3_keras.transcriber import Transcriber
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"
MB = 1e6


def transcribe_piano(**options):
    """What the shipped model hears in the piano example, on LiteRT."""
    pytest.importorskip("ai_edge_litert", reason="needs requirements-edge.txt")
    transcriber = Transcriber.from_preset("small", engine="litert", **options)
    return transcriber.transcribe(EXAMPLES / "piano.flac")


@pytest.fixture(scope="module")
def heard():
    return transcribe_piano()


@pytest.fixture(scope="module")
def told():
    """The same where it writes tokens too."""
    return transcribe_piano(method="greedy")


def test_small_is_in_the_box_and_as_small_as_it_says():
    assert "small" in shipped_names()
    folder = find_preset("small")
    assert (folder / "model.weights.h5").stat().st_size < 25 * MB
    assert (folder / "model.tflite").stat().st_size < 15 * MB
    with h5py.File(folder / "model.weights.h5") as file:
        sizes, types = [], set()
        file.visititems(
            lambda name, item: (
                (sizes.append(item.size), types.add(item.dtype))
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    assert sum(sizes) <= 12e6
    assert types == {np.dtype(np.float16)}


def test_small_hears_the_piano_example_with_velocities_and_confidences(heard):
    reference = read_midi(EXAMPLES / "piano.mid")
    assert onset_scores(reference, heard.notes)[2] > 0.6
    assert len({note.velocity for note in heard.notes}) > 5
    limit = ModelConfig.from_preset(find_preset("small")).network.least_confidence
    assert all(limit <= heard.confidences[note] <= 1 for note in heard.notes)


def test_small_hears_every_frame_twice_but_where_it_writes_tokens(heard, told):
    for found, hop in ((heard, 1.024), (told, 2.048)):
        starts = [segment.start for segment in found.segments]
        assert starts == pytest.approx([i * hop for i in range(len(starts))])


def test_tokens_add_no_notes_to_those_of_the_heads_of_small(told):
    from mt3_keras.engines.litert import EdgeModel, EdgeSequence

    model = EdgeModel(find_preset("small"))
    sequence = EdgeSequence(model.model_config, Rules(), method="heads")
    decoder = NoteDecoder.for_model(model.model_config)
    segments = cut_segments(read_blocks(EXAMPLES / "piano.flac"), model.model_config, "full")
    ends = [*(segment.start for segment in told.segments[1:]), None]
    for segment, end in zip(segments, ends, strict=True):
        decoder.feed(segment.start, sequence.decode(model, segment), end)
    assert decoder.finish() == told.notes


def test_small_hears_much_the_same_on_keras(heard):
    on_keras = Transcriber.from_preset("small", engine="keras", batch_size=7)
    notes = on_keras.transcribe(EXAMPLES / "piano.flac").notes
    assert onset_scores(heard.notes, notes)[2] > 0.8


@pytest.mark.parametrize("method", [None, "greedy"])
def test_small_streams_from_the_box(heard, told, method):
    from export.streaming import StreamingTranscriber

    stream = StreamingTranscriber.from_bundle("small", method=method)
    notes = [n for block in read_blocks(EXAMPLES / "piano.flac") for n in stream.push(block)]
    assert sorted([*notes, *stream.flush()]) == sorted((told if method else heard).notes)
