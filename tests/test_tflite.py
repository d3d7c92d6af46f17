"""Edge bundles: what LiteRT computes equals Keras, in files that it can run by itself."""

from __future__ import annotations

import json
import pathlib
import shutil

import keras
import numpy as np
import pytest

from mt3_keras.audio import read_blocks
from mt3_keras.codec import EOS
from mt3_keras.engines import keras as on_keras
from mt3_keras.grammar import Rules
from mt3_keras.models.config import LogMelConfig, MT3Config, T5Config
from mt3_keras.models.detector import NoteDetector
from mt3_keras.models.loading import load_model
from mt3_keras.models.mt3 import MT3Backbone
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.segments import cut_segments
from tests.detectors import MINI, build, random_samples

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
if keras.backend.backend() != "tensorflow":
    pytest.skip("a bundle is written by TensorFlow", allow_module_level=True)

from export.tflite import ExportError, Quantization, export_bundle, operators, report
from mt3_keras.engines import litert

LAYERS = {"num_heads": 2, "num_encoder_layers": 2, "num_decoder_layers": 2, "max_tokens": 256}
WIDE = MT3Config(
    LogMelConfig(num_mels=64), network=T5Config(width=128, head_width=64, mlp_width=256, **LAYERS)
)
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "float16", "int8_weights", "int8")
ALL_RULES = {
    "none": Rules(),
    "stop_runaways": Rules(stop_runaways=True),
    "constrained": Rules(constrained=True),
    "programs": Rules(programs=frozenset({0, 33}), drums=False),
}


@pytest.fixture(scope="module")
def wide():
    keras.utils.set_random_seed(3)
    return MT3Backbone(**WIDE.to_dict())


@pytest.fixture(scope="module")
def bundles(wide, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The wide model's bundles by their quantization."""
    folder = tmp_path_factory.mktemp("wide")
    return {kind: export_bundle(wide, folder / kind, kind) for kind in QUANTIZATIONS}


@pytest.fixture(scope="module")
def mini():
    return build()


@pytest.fixture(scope="module")
def mini_bundles(mini, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The mini detector's bundles by their quantization."""
    folder = tmp_path_factory.mktemp("mini")
    return {kind: export_bundle(mini, folder / kind, kind) for kind in QUANTIZATIONS}


@pytest.fixture(scope="module")
def lasting(tiny_model):
    """The tiny model, but its sequences neither stop at once nor begin past the segment's end."""
    config = tiny_model.model_config
    model = MT3Backbone(**config.to_dict())
    model.set_weights(tiny_model.get_weights())
    kernel = keras.ops.convert_to_numpy(model.decoder.logits.kernel).copy()
    kernel[:, 3 + config.max_step // 2 : 1004] = 0  # shifts
    kernel[:, EOS] = 0
    model.decoder.logits.kernel.assign(kernel)
    return model


@pytest.fixture(scope="module")
def lasting_bundle(lasting, tmp_path_factory):
    return export_bundle(lasting, tmp_path_factory.mktemp("lasting"))


def segments_of(config, num_segments, seed=0):
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, 0.1, num_segments * config.segment_samples - 5000)
    samples *= np.repeat(rng.uniform(0.01, 3, 100), samples.size // 100 + 1)[: samples.size]
    return list(cut_segments([samples.astype(np.float32)], config, "full"))


def in_order(found):
    outputs = dict(found)
    return [outputs[i] for i in range(len(outputs))]


@pytest.mark.parametrize("name", ALL_RULES)
def test_a_bundle_emits_the_tokens_of_keras_under_all_rules(lasting, lasting_bundle, name):
    segments, rules = segments_of(lasting.model_config, 6), ALL_RULES[name]
    engine = on_keras.TokenEngine(lasting, rules=rules, batch_size=6)
    found = in_order(litert.TokenEngine(lasting_bundle, rules=rules).run(segments))
    assert found == in_order(engine.run(segments))
    assert len({tuple(tokens) for (tokens,) in found}) > 1  # the audio makes a difference


def test_a_bundle_and_keras_predict_the_same_rolls(mini, mini_bundles):
    segments = segments_of(MINI, 5)
    found = in_order(litert.RollEngine(mini_bundles["none"]).run(segments))
    expected = in_order(on_keras.RollEngine(mini, batch_size=2).run(segments))
    assert len(found) == len(expected) == len(segments)
    for ours, theirs in zip(found, expected, strict=True):
        for name, ones, others in zip(ours._fields, ours, theirs, strict=True):
            assert ones.dtype == others.dtype == np.float32
            np.testing.assert_allclose(ones, others, atol=1e-4, err_msg=name)
    assert np.ptp([output.ended for output in found], axis=0).max() > 0.01


def test_a_bundle_follows_a_stream_as_keras_does(mini, mini_bundles):
    edge = litert.EdgeDetector(mini_bundles["none"], stream=True)
    config = edge.model_config
    assert config == MINI.for_streams()
    on_steps = NoteDetector(**config.to_dict())
    on_steps.set_weights(mini.get_weights())
    state = on_steps.empty_state(1)
    segments = segments_of(config, 6)
    for segment in segments:
        expected = on_steps.detect(segment.samples[None], state)
        state = {name: expected[f"state_{name}"] for name in state}
        found = edge.detect(segment.samples)
        for name, array in found._asdict().items():
            np.testing.assert_allclose(array, expected[name][0], atol=1e-4, err_msg=name)
    first = segments[0].samples
    went_on = edge.detect(first)
    edge.reset()
    assert np.abs(went_on.ended - edge.detect(first).ended).max() > 1e-6


def test_a_bundle_of_another_network_is_to_be_exported_again(mini_bundles, tmp_path):
    shutil.copytree(mini_bundles["none"], tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["config"]["network"]["max_onsets"] += 1
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(litert.BundleError, match="export it again"):
        litert.EdgeDetector(tmp_path / "copy")


def test_a_bundle_emits_the_tokens_of_keras_beyond_many_sizes_of_the_cache(wide, bundles):
    segments, length = segments_of(WIDE, 3), 3 * litert.CACHE_STEP + 5
    engine = on_keras.TokenEngine(wide, batch_size=3, max_tokens=length)
    edge = litert.TokenEngine(bundles["none"], max_tokens=length)
    found = in_order(edge.run(segments))
    assert found == in_order(engine.run(segments))
    assert [len(tokens) for (tokens,) in found] == [length] * 3


@pytest.mark.parametrize("clip", ["band", "piano"])
def test_the_official_weights_emit_the_originals_tokens(shared, official_bundle, clip):
    golden = json.loads((shared / "golden" / f"{clip}.json").read_text())
    edge = litert.TokenEngine(official_bundle)
    blocks = read_blocks(shared / "golden" / f"{clip}.flac")
    found = in_order(edge.run(cut_segments(blocks, edge.model_config, "segment")))
    assert [tokens for (tokens,) in found] == [segment["tokens"] for segment in golden["segments"]]


@pytest.fixture(scope="module")
def official_bundle(official, tmp_path_factory):
    model = load_model(official, log_floor="zero")
    return export_bundle(model, tmp_path_factory.mktemp("official"))


def test_all_operators_are_those_of_litert(bundles, mini_bundles):
    for folder in (*bundles.values(), *mini_bundles.values()):
        counts = operators(folder / "model.tflite")
        assert all(sum(count.values()) > 20 for count in counts.values())
        names = {name for count in counts.values() for name in count}
        assert not [name for name in names if name.startswith("CUSTOM") or "Flex" in name]


def test_the_signatures_are_those_of_the_network(bundles, mini_bundles):
    def signatures(folder):
        return set(litert.Interpreter(str(folder / "model.tflite")).get_signature_list())

    assert all(signatures(folder) == {"encode", "decode_step"} for folder in bundles.values())
    assert all(signatures(path) == {"detect", "stream"} for path in mini_bundles.values())


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


@pytest.mark.parametrize(
    ("kind", "error"), [("none", 1e-5), ("float16", 1e-3), ("int8_weights", 0.05), ("int8", 0.05)]
)
def test_quantized_detectors_compute_nearly_the_same(mini, mini_bundles, kind, error):
    size, *graphs, agreement = report(mini_bundles[kind], mini).splitlines()
    assert " MB" in size
    assert [graph.split(":")[0] for graph in graphs] == ["detect", "stream"]
    assert all("CONV_2D" in graph and "FULLY_CONNECTED" in graph for graph in graphs)
    _, _, numbers = agreement.partition("have ended differ by at most ")
    assert float(numbers.partition(",")[0]) < error


def test_an_export_leaves_the_model_as_it_was(tiny_model, tmp_path):
    config = tiny_model.model_config
    inputs = {
        "samples": random_samples(config),
        "num_frames": np.full(2, config.network.segment_frames, np.int32),
        "decoder_tokens": np.random.default_rng(2).integers(3, 1000, (2, 12)).astype(np.int32),
    }
    before = keras.ops.convert_to_numpy(tiny_model(inputs))
    export_bundle(tiny_model, tmp_path)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(tiny_model(inputs)), before)
    layers = tiny_model.decoder.layers
    attentions = [a for layer in layers for a in (layer.self_attention, layer.cross_attention)]
    assert not any(attention.positions_last for attention in attentions)


def test_an_export_leaves_the_detector_as_it_was(mini, mini_bundles, tmp_path):
    samples = random_samples()
    before = keras.ops.convert_to_numpy(mini.detect(samples)["ended"])
    export_bundle(mini, tmp_path)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(mini.detect(samples)["ended"]), before)


def test_a_second_export_replaces_the_first(tiny_bundle, tiny_model, tmp_path):
    for name in ("model.tflite", "config.json"):
        (tmp_path / name).write_text("of an earlier bundle")
    export_bundle(tiny_model, tmp_path)
    names = ["SHA256SUMS", "config.json", "model.tflite"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "config.json").read_text() == (tiny_bundle / "config.json").read_text()
    segments = segments_of(tiny_model.model_config, 2)
    assert in_order(litert.TokenEngine(tmp_path).run(segments)) == in_order(
        litert.TokenEngine(tiny_bundle).run(segments)
    )


def test_a_detectors_bundle_says_how_its_rolls_are_decoded(mini, tmp_path):
    decoding = RollDecoding(shortest=3, onset_limit=0.6)
    export_bundle(mini, tmp_path, decoding=decoding)
    names = ["SHA256SUMS", "config.json", "decoding.json", "model.tflite"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert RollDecoding.read(tmp_path) == decoding
    export_bundle(mini, tmp_path)  # leaves it as it is
    assert RollDecoding.read(tmp_path) == decoding


@pytest.mark.parametrize("kind", ["tokens", "rolls"])
def test_only_float32_models_are_exported(tiny_model, tmp_path, kind):
    dtype = "mixed_bfloat16"
    config = tiny_model.model_config
    model = MT3Backbone(**config.to_dict(), dtype=dtype) if kind == "tokens" else build(dtype=dtype)
    with pytest.raises(ExportError, match="float32 model: got bfloat16"):
        export_bundle(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
