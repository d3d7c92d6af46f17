"""The models in the box: their size, what they load on, and what they find in the examples."""

from __future__ import annotations

import json
import os
import shutil

import h5py
import numpy as np
import pytest

from mt3_keras.audio import read_blocks
from mt3_keras.grammar import Rules
from mt3_keras.metrics import onset_scores
from mt3_keras.midi import read_midi
from mt3_keras.models import checksums
from mt3_keras.models.catalog import FOLDER, ModelError, find_preset, shipped_names
from mt3_keras.models.config import SMALL
from mt3_keras.models.detector import NoteDetector
from mt3_keras.models.loading import load_model
from mt3_keras.models.mt3 import MT3Backbone
from mt3_keras.models.preset_config import read_config
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.streaming import StreamingTranscriber
from mt3_keras.transcriber import Transcriber
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"
MB = 1e6


@pytest.fixture(scope="module")
def found():
    """What the shipped model finds in the piano example, on LiteRT."""
    transcriber = Transcriber.from_preset("small", engine="litert")
    return transcriber.transcribe(EXAMPLES / "piano.flac")


def test_small_is_in_the_box_and_as_small_as_it_says():
    assert "small" in shipped_names()
    folder = find_preset("small")
    assert (folder / "model.weights.h5").stat().st_size < 13 * MB
    assert (folder / "model.tflite").stat().st_size < 8 * MB
    with h5py.File(folder / "model.weights.h5") as file:
        sizes, types = [], set()
        file.visititems(
            lambda name, item: (
                (sizes.append(item.size), types.add(item.dtype))
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    assert sum(sizes) <= 3e6
    assert types == {np.dtype(np.float16)}


@pytest.mark.parametrize("name", checksums.COVERED)
def test_a_damaged_weight_is_refused_though_it_is_a_number(tmp_path, name):
    folder = tmp_path / "small"
    shutil.copytree(find_preset("small"), folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    load = load_model if name.endswith(".h5") else StreamingTranscriber.from_bundle
    with pytest.raises(ValueError, match=rf"{name}: differs from its checksum in SHA256SUMS"):
        load(folder)
    checksums.write_sums(folder)
    assert {line.split()[1] for line in (folder / checksums.FILE).read_text().splitlines()} == {
        *checksums.COVERED
    }
    checksums.check_sum(folder / name)


def test_small_finds_the_piano_example_with_velocities_and_confidences(found):
    reference = read_midi(EXAMPLES / "piano.mid")
    assert onset_scores(reference, found.notes)[2] > 0.6
    assert len({note.velocity for note in found.notes}) > 5
    limits = RollDecoding.read(find_preset("small"))
    for note in found.notes:
        limit = limits.stroke_limit if note.is_drum else limits.onset_limit
        assert limit <= found.confidences[note] <= 1


def test_small_reads_segments_one_after_the_other_and_no_tokens(found):
    starts = [segment.start for segment in found.segments]
    assert starts == pytest.approx([i * 5.12 for i in range(len(starts))])
    assert not any(segment.tokens for segment in found.segments)


def test_small_finds_much_the_same_on_keras(found):
    on_keras = Transcriber.from_preset("small", engine="keras", batch_size=7)
    notes = on_keras.transcribe(EXAMPLES / "piano.flac").notes
    assert onset_scores(found.notes, notes)[2] > 0.8


def test_small_streams_from_the_box(found):
    stream = StreamingTranscriber.from_bundle("small")
    notes = [n for block in read_blocks(EXAMPLES / "piano.flac") for n in stream.push(block)]
    assert sorted([*notes, *stream.flush()]) == sorted(found.notes)


def test_small_is_loaded_by_the_library_it_is_built_on(found):
    assert "small" in NoteDetector.presets and "small" not in MT3Backbone.presets
    model = NoteDetector.from_preset("small")
    assert model.model_config == read_config(find_preset("small")) == SMALL


@pytest.mark.parametrize(
    "options", [{"method": "greedy"}, {"max_tokens": 9}, {"rules": Rules(constrained=True)}]
)
@pytest.mark.parametrize("engine", ["litert", "keras"])
def test_small_refuses_options_for_tokens(engine, options):
    with pytest.raises(ValueError, match="is for networks that emit tokens"):
        Transcriber.from_preset("small", engine=engine, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", 10**12), ("num_encoder_layers", 10**9), ("mlp_width", 1e308), ("width", "wide")],
)
def test_sizes_beyond_all_bounds_are_refused_before_anything_is_built(tmp_path, name, value):
    stored = json.loads((FOLDER / "small" / "config.json").read_text())
    stored["config"]["network"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match=r"config[.]json: "):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["[" * 200_000, "{}", '{"class_name": []}', " " * 2**21])
def test_what_is_no_description_of_a_model_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config[.]json: ") as raised:
        read_config(tmp_path)
    assert len(str(raised.value)) < 300


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="of POSIX")
def test_a_description_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_config(tmp_path)


def test_weights_that_are_no_finite_numbers_or_too_many_are_refused(tiny_preset, tmp_path):
    weights = tmp_path / "model.weights.h5"
    for damage, complaint in (("nan", "not of finite numbers"), ("more", "holds more than")):
        without = shutil.ignore_patterns("SHA256SUMS")  # it would tell first
        shutil.copytree(tiny_preset, tmp_path, dirs_exist_ok=True, ignore=without)
        with h5py.File(weights, "r+") as file:
            if damage == "nan":
                arrays = []
                file.visititems(lambda _, item: arrays.append(item))  # noqa: B023
                next(a for a in arrays if isinstance(a, h5py.Dataset))[...] = np.nan
            else:
                file.create_dataset("bomb", (10**7, 10**7), "f4", chunks=(10, 10))
        with pytest.raises(ModelError, match=complaint):
            load_model(tmp_path)
