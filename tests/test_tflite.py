"""Edge bundles: what LiteRT computes equals Keras, in files that it can run by itself."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import keras
import numpy as np
import pytest

from mt3_keras.audio import read_blocks
from mt3_keras.codec import EOS
from mt3_keras.engines.keras import Search
from mt3_keras.grammar import Rules
from mt3_keras.models.config import TINY
from mt3_keras.models.loading import load_model
from mt3_keras.models.mt3 import MT3Backbone
from mt3_keras.note_rolls import NUM_COLUMNS
from mt3_keras.segments import cut_segments
from tests.test_small_network import MINI, build, logits_of, random_inputs

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
if keras.backend.backend() != "tensorflow":
    pytest.skip("a bundle is written by TensorFlow", allow_module_level=True)

from export.tflite import ExportError, Quantization, export_bundle, operators, report
from mt3_keras import litert
from mt3_keras.engines.litert import CACHE_STEP, EdgeSearch

WIDE = dataclasses.replace(
    TINY, network=dataclasses.replace(TINY.network, width=128, mlp_width=256, head_width=64)
)
ALL_RULES = {
    "none": Rules(),
    "stop_runaways": Rules(stop_runaways=True),
    "constrained": Rules(constrained=True),
    "programs": Rules(programs=frozenset({0, 33}), drums=False),
}


def make_model(config, seed=3):
    keras.utils.set_random_seed(seed)
    return MT3Backbone(**config.to_dict())


@pytest.fixture(scope="module")
def wide():
    return make_model(WIDE)


@pytest.fixture(scope="module")
def bundles(wide, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The wide model's bundles by their quantization."""
    folder = tmp_path_factory.mktemp("wide")
    kinds: tuple[Quantization, ...] = ("none", "float16", "int8_weights", "int8")
    return {kind: export_bundle(wide, folder / kind, kind) for kind in kinds}


@pytest.fixture(scope="module")
def mini():
    """With every part that a network may have: the state, the heads, the pointer."""
    model = build(MINI)
    kernel = keras.ops.convert_to_numpy(model.decoder.logits.kernel).copy()
    kernel[:, 3 + MINI.max_step // 2 : 1004] = 0  # else its first shift would pass the end
    kernel[:, EOS] = 0  # and it would stop at once
    model.decoder.logits.kernel.assign(kernel)
    rolls = model.heads.rolls.kernel  # that what is heard makes a difference
    rolls.assign(8 * keras.ops.convert_to_numpy(rolls))
    return model


@pytest.fixture(scope="module")
def mini_bundle(mini, tmp_path_factory):
    return export_bundle(mini, tmp_path_factory.mktemp("mini"))


def segments_of(config, num_segments, seed=0):
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, 0.1, num_segments * config.segment_samples - 5000)
    samples *= np.repeat(rng.uniform(0.01, 3, 100), samples.size // 100 + 1)[: samples.size]
    return list(cut_segments([samples.astype(np.float32)], config, "full"))


def in_order(found):
    tokens = dict(found)
    return [tokens[i] for i in range(len(tokens))]


@pytest.mark.parametrize("name", ALL_RULES)
def test_a_bundle_writes_the_tokens_of_keras_under_all_rules(mini, mini_bundle, name):
    segments, rules = segments_of(MINI, 6), ALL_RULES[name]
    expected = in_order(Search(mini, rules=rules, batch_size=6).decode(segments))
    found = in_order(EdgeSearch(mini_bundle, rules=rules).decode(segments))
    assert found == expected
    assert len({tuple(tokens) for tokens in found}) > 1  # what is heard makes a difference


def test_a_bundle_and_keras_read_notes_from_the_same_rolls(mini, mini_bundle):
    segments = segments_of(MINI, 3)
    found = in_order(EdgeSearch(mini_bundle).decode(segments))
    expected = in_order(Search(mini, batch_size=2).decode(segments))
    for ours, keras_tokens in zip(found, expected, strict=True):
        assert ours.rolls.values.shape == (MINI.network.segment_frames, NUM_COLUMNS)
        np.testing.assert_allclose(ours.rolls.values, keras_tokens.rolls.values, atol=1e-5)


def test_without_tokens_the_heads_say_the_same(mini, mini_bundle):
    segments = segments_of(MINI, 3)
    expected = in_order(Search(mini, batch_size=2).decode(segments))
    on_keras = in_order(Search(mini, method="heads", batch_size=2).decode(segments))
    on_litert = in_order(EdgeSearch(mini_bundle, method="heads").decode(segments))
    assert on_keras == on_litert == [[EOS]] * len(expected)
    for tokens, *alone in zip(expected, on_keras, on_litert, strict=True):
        for found in alone:
            np.testing.assert_allclose(found.rolls.values, tokens.rolls.values, atol=1e-5)
    with pytest.raises(ValueError, match="networks whose heads decide, such as small"):
        TINY.network.choose_method("heads")


def test_a_bundle_whose_heads_say_something_else_is_to_be_exported_again(mini_bundle, monkeypatch):
    monkeypatch.setattr(litert, "NUM_COLUMNS", NUM_COLUMNS + 1)
    with pytest.raises(litert.BundleError, match="export it again"):
        litert.EdgeModel(mini_bundle)


def test_a_bundle_writes_the_tokens_of_keras_beyond_many_sizes_of_the_cache(wide, bundles):
    segments, length = segments_of(WIDE, 3), 3 * CACHE_STEP + 5
    search = Search(wide, batch_size=3, max_tokens=length)
    edge = EdgeSearch(bundles["none"], max_tokens=length)
    found = in_order(edge.decode(segments))
    assert found == in_order(search.decode(segments))
    assert [len(tokens) for tokens in found] == [length] * 3


@pytest.mark.parametrize("clip", ["band", "piano"])
def test_the_official_weights_write_the_originals_tokens(shared, official_bundle, clip):
    golden = json.loads((shared / "golden" / f"{clip}.json").read_text())
    edge = EdgeSearch(official_bundle)
    blocks = read_blocks(shared / "golden" / f"{clip}.flac")
    found = in_order(edge.decode(cut_segments(blocks, edge.model_config, "segment")))
    assert found == [segment["tokens"] for segment in golden["segments"]]


@pytest.fixture(scope="module")
def official_bundle(official, tmp_path_factory):
    model = load_model(official, log_floor="zero")
    return export_bundle(model, tmp_path_factory.mktemp("official"))


def test_all_operators_are_those_of_litert(bundles, mini_bundle):
    for folder in (*bundles.values(), mini_bundle):
        counts = operators(folder / "model.tflite")
        assert set(counts) == {"encode", "decode_step"}
        assert all(sum(count.values()) > 20 for count in counts.values())
        names = {name for count in counts.values() for name in count}
        assert not [name for name in names if name.startswith("CUSTOM") or "Flex" in name]


def test_quantized_files_are_smaller(bundles):
    sizes = {kind: (path / "model.tflite").stat().st_size for kind, path in bundles.items()}
    assert sizes["float16"] < 0.6 * sizes["none"]
    assert sizes["int8"] < sizes["none"] / 3
    assert sizes["int8_weights"] < sizes["none"] / 3


@pytest.mark.parametrize(
    ("kind", "error"), [("none", 1e-4), ("float16", 0.01), ("int8_weights", 0.2), ("int8", 0.2)]
)
def test_quantized_networks_compute_nearly_the_same(wide, bundles, kind, error):
    """Logits of an untrained network have a standard deviation of about 1."""
    lines = report(bundles[kind], wide).splitlines()
    assert " MB" in lines[0]
    assert [line.split(":")[0] for line in lines[1:3]] == ["decode_step", "encode"]
    assert all("FULLY_CONNECTED" in line for line in lines[1:3])
    _, _, numbers = lines[3].partition("differ by at most ")
    difference, _, agreeing = numbers.partition(", the best token is the same in ")
    assert float(difference) < error
    assert int(agreeing) >= (32 if kind == "none" else 24)


def test_an_export_leaves_the_model_as_it_was(tmp_path):
    model = make_model(TINY)
    inputs = random_inputs(TINY)
    before = logits_of(model(inputs))
    export_bundle(model, tmp_path)
    np.testing.assert_array_equal(logits_of(model(inputs)), before)
    layers = model.decoder.layers
    attentions = [a for layer in layers for a in (layer.self_attention, layer.cross_attention)]
    assert not any(attention.positions_last for attention in attentions)


def test_a_second_export_replaces_the_first(tiny_bundle, tiny_model, tmp_path):
    for name in ("model.tflite", "config.json"):
        (tmp_path / name).write_text("of an earlier bundle")
    export_bundle(tiny_model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.tflite"]
    assert (tmp_path / "config.json").read_text() == (tiny_bundle / "config.json").read_text()
    segments = segments_of(tiny_model.model_config, 2)
    assert in_order(EdgeSearch(tmp_path).decode(segments)) == in_order(
        EdgeSearch(tiny_bundle).decode(segments)
    )


def test_only_float32_models_are_exported(tmp_path):
    model = MT3Backbone(**TINY.to_dict(), dtype="mixed_bfloat16")
    with pytest.raises(ExportError, match="float32 model: got bfloat16"):
        export_bundle(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
