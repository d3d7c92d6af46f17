"""The recurrent network: its parts, and that every way to run it gives the same tokens."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from mt3_keras.codec import EOS
from mt3_keras.engines.keras import TokenEngine
from mt3_keras.grammar import Rules
from mt3_keras.models.config import RECURRENT, LogMelConfig, RecurrentConfig, RecurrentNetworkConfig
from mt3_keras.models.loading import load_model, save_preset
from mt3_keras.models.recurrent import RecurrentBackbone
from mt3_keras.segments import cut_segments
from mt3_keras.transcriber import Transcriber
from tests.conftest import ROOT, tones

TINY = RecurrentConfig(
    LogMelConfig(num_mels=16, hop_samples=256),
    network=RecurrentNetworkConfig(
        width=16, num_heads=8, head_width=2, max_tokens=200, segment_frames=64
    ),
)
LENGTH = 9
RULES = {"free": Rules(), "constrained": Rules(constrained=True)}


def build(config: RecurrentConfig = TINY) -> RecurrentBackbone:
    """With random weights, the same in every run, whose sequences depend on the sound and end."""
    keras.utils.set_random_seed(5)
    model = RecurrentBackbone(**config.to_dict())
    kernel = model.decoder.logits.kernel
    scores = np.random.default_rng(8).normal(0, 0.25, kernel.shape)
    scores[:, 3 + 8 : 1004] = 0  # only short shifts
    scores[:, 1132:1135] *= 2  # velocities and ties
    scores[:, EOS] = np.random.default_rng(4).normal(0, 0.8, len(scores))
    kernel.assign(scores)
    for layer in model.decoder.layers:
        layer.cross_attention.value.kernel.assign(layer.cross_attention.value.kernel * 4)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def make_inputs(config=TINY, batch_size=2):
    rng = np.random.default_rng(3)
    sound = tones(batch_size * config.input_samples / 16_000)[: batch_size * config.input_samples]
    return {
        "samples": sound.reshape(batch_size, -1),
        "num_frames": np.array([64, 40], np.int32)[:batch_size],
        "decoder_tokens": rng.integers(3, 1000, (batch_size, LENGTH)).astype(np.int32),
    }


def segments_of(config, seconds=9.5):
    return list(cut_segments([tones(seconds)], config, "full"))


def in_order(found):
    outputs = dict(found)
    return [outputs[i].tokens for i in range(len(outputs))]


def test_the_default_sizes_are_those_of_the_brief():
    network = RECURRENT.network
    assert network.filters == (128, 64)
    assert network.num_heads == 8
    assert network.num_positions == 64
    assert network.vocabulary_rows == 1536


def test_shapes_are_those_that_were_asked_for(model):
    inputs = make_inputs()
    assert model(inputs).shape == (2, LENGTH, 1536)
    memory = model.encode(inputs["samples"], inputs["num_frames"])
    shapes = {name: tuple(tensor.shape) for name, tensor in memory.items()}
    assert shapes["cross_keys_0"] == shapes["cross_values_1"] == (2, 8, 16, 2)
    assert shapes["state"] == (2, 2, 16)
    assert model.empty_cache(2, 9) == {}
    assert {n: tuple(t.shape) for n, t in model.empty_memory(2).items()} == shapes


def test_stepwise_decoding_equals_the_whole_sequence(model):
    inputs = make_inputs()
    tokens = inputs["decoder_tokens"]
    whole = ops.convert_to_numpy(model(inputs))
    memory = model.encode(inputs["samples"], inputs["num_frames"])
    for position in range(LENGTH):
        positions = np.full(2, position, np.int32)
        logits, new = model.decode_step(tokens[:, position], positions, {}, None, memory)
        assert set(new) == set(model.state_names)
        memory |= new
        assert ops.convert_to_numpy(logits) == pytest.approx(whole[:, position], abs=1e-4)


def test_later_tokens_do_not_change_earlier_logits(model):
    inputs = make_inputs()
    before = ops.convert_to_numpy(model(inputs))
    inputs["decoder_tokens"][:, 5:] = 7
    after = ops.convert_to_numpy(model(inputs))
    assert after[:, :5] == pytest.approx(before[:, :5], abs=1e-5)
    assert np.abs(after[:, 5:] - before[:, 5:]).max() > 1e-2


def test_a_batch_equals_its_rows_alone(model):
    inputs = make_inputs()
    both = ops.convert_to_numpy(model(inputs))
    for row in range(2):
        alone = model({name: array[row : row + 1] for name, array in inputs.items()})
        assert ops.convert_to_numpy(alone)[0] == pytest.approx(both[row], abs=1e-4)


def test_what_lies_past_the_last_frame_does_not_count(model):
    inputs = make_inputs()
    before = ops.convert_to_numpy(model(inputs))
    reach = 40 * TINY.spectrogram.hop_samples + TINY.spectrogram.overhang_samples
    inputs["samples"][:, reach:] = 0
    after = ops.convert_to_numpy(model(inputs))
    assert after[1] == pytest.approx(before[1], abs=1e-5)
    assert np.abs(after[0] - before[0]).max() > 1e-2


@pytest.mark.parametrize("causal", [True, False])
def test_only_a_causal_encoder_does_without_what_follows(causal):
    config = dataclasses.replace(TINY, network=dataclasses.replace(TINY.network, causal=causal))
    encoder = build(config).encoder
    spectrum = np.random.default_rng(0).normal(-5, 3, (1, 64, 16)).astype(np.float32)
    before = ops.convert_to_numpy(encoder(spectrum))
    spectrum[:, 32:] = 0
    after = ops.convert_to_numpy(encoder(spectrum))
    change = np.abs(after - before).max(axis=(0, 2))
    assert (change[:8].max() < 1e-6) == causal
    assert change[8:].min() > 1e-3


def test_dropout_is_at_work_in_training_alone(model):
    inputs = make_inputs()
    outputs = [ops.convert_to_numpy(model(inputs, training=flag)) for flag in (True, True)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    outputs = [ops.convert_to_numpy(model(inputs)) for _ in range(2)]
    assert (outputs[0] == outputs[1]).all()


def test_a_preset_holds_the_model_whole(model, tmp_path):
    save_preset(model, tmp_path / "preset")
    expected = ops.convert_to_numpy(model(make_inputs()))
    for other in (
        load_model(tmp_path / "preset"),
        RecurrentBackbone.from_preset(str(tmp_path / "preset")),
    ):
        assert other.model_config == model.model_config
        assert (ops.convert_to_numpy(other(make_inputs())) == expected).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_search_emits_what_whole_passes_emit(model, batch_size):
    segments = segments_of(TINY)
    engine = TokenEngine(model, batch_size=batch_size, max_tokens=24)
    found = in_order(engine.run(segments))
    assert len({len(tokens) for tokens in found}) > 2  # rows take new segments at all times
    given = np.zeros((len(found), 24), np.int32)
    for row, tokens in zip(given, found, strict=True):
        row[1 : len(tokens)] = tokens[:-1]
    inputs = {
        "samples": np.stack([segment.samples for segment in segments]),
        "num_frames": np.array([segment.num_frames for segment in segments], np.int32),
        "decoder_tokens": given,
    }
    best = ops.convert_to_numpy(model(inputs)).argmax(axis=-1)
    assert [row[: len(tokens)].tolist() for row, tokens in zip(best, found, strict=True)] == found


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"filters": (128,)}, "filters must be two"),
        ({"pool_frames": 3}, "pool_frames, squared, must divide"),
        ({"num_heads": 0}, "num_heads must be positive"),
        ({"log_mel_deviation": 0.0}, "log_mel_deviation must be positive"),
    ],
)
def test_impossible_sizes_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        RecurrentConfig.from_dict({"network": settings})


# ---------------------------------------------------------------- exported


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("a bundle is written by TensorFlow")
    from export.tflite import export_bundle

    return export_bundle(model, tmp_path_factory.mktemp("recurrent"))


@pytest.mark.parametrize("name", RULES)
def test_a_bundle_emits_the_tokens_of_keras(model, bundle, name):
    from mt3_keras.engines import litert

    segments, rules = segments_of(TINY), RULES[name]
    found = in_order(litert.TokenEngine(bundle, rules=rules).run(segments))
    assert found == in_order(TokenEngine(model, rules=rules, batch_size=4).run(segments))
    assert len({tuple(tokens) for tokens in found}) > 2  # the sound makes a difference
    alone = litert.TokenEngine(bundle, rules=rules, num_segments=1)
    assert in_order(alone.run(segments)) == found


def test_a_bundle_hands_the_state_through_and_has_operators_of_litert_alone(bundle):
    from export.tflite import operators
    from mt3_keras.engines.litert import Interpreter

    counts = operators(bundle / "model.tflite")
    names = {name for count in counts.values() for name in count}
    assert not [name for name in names if name.startswith("CUSTOM") or name == "WHILE"]
    step = Interpreter(str(bundle / "model.tflite")).get_signature_runner("decode_step")
    assert set(step.get_output_details()) == {"logits", "state"}
    memory = {f"cross_{kind}_{i}" for kind in ("keys", "values") for i in range(2)}
    assert set(step.get_input_details()) == {"tokens", "positions", "state", *memory}


def test_the_loop_of_the_docs_emits_the_tokens_of_keras(model, bundle):
    section = (ROOT / "docs/devices.md").read_text().split("## The loop of a token network")[1]
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0], names)
    segments = segments_of(TINY)
    found = [names["write_tokens"](bundle, s.samples, s.num_frames, 24) for s in segments]
    assert found == in_order(TokenEngine(model, batch_size=3, max_tokens=24).run(segments))


def test_an_export_leaves_the_model_as_it_was(model, bundle):
    assert not any(loop.unroll for loop in (*model.encoder.forward, *model.encoder.backward))
    assert not any(layer.cross_attention.positions_last for layer in model.decoder.layers)
    assert not model.decoder.for_edge


@pytest.mark.parametrize("quantize", ["float16", "int8"])
def test_quantized_networks_compute_nearly_the_same(model, tmp_path, quantize, bundle):
    from export.tflite import export_bundle, report

    line = report(export_bundle(model, tmp_path, quantize), model).splitlines()[-1]
    difference = float(line.partition("differ by at most ")[2].partition(",")[0])
    assert difference < {"float16": 0.02, "int8": 0.5}[quantize]


def test_a_stream_emits_the_notes_of_a_file_however_it_is_cut(bundle):
    from mt3_keras.streaming import StreamingTranscriber

    samples, rules = tones(9.5), Rules(constrained=True)
    expected = Transcriber(bundle, rules=rules).transcribe(samples).notes
    assert len(expected) > 5
    stream = StreamingTranscriber.from_bundle(bundle, rules=rules)
    for size in (1_000, 30_000, samples.size):
        blocks = [samples[i : i + size] for i in range(0, samples.size, size)]
        found = [note for block in blocks for note in stream.push(block)]
        assert sorted(found + stream.flush()) == sorted(expected)


def test_a_saved_model_serves_the_tokens_of_keras(model):
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("a SavedModel is written by TensorFlow")
    from export.served_model import ServedModel

    samples = tones(9.5)
    served = ServedModel(model, rules=Rules(constrained=True), batch_size=4)
    audio = tf.TensorSpec([None, None], tf.float32, "audio")
    answer = tf.function(served.transcribe, input_signature=[audio], autograph=False)(samples[None])
    rows = [row[row > 0].tolist() for row in answer["tokens"].numpy()[0]]
    engine = TokenEngine(model, rules=Rules(constrained=True), batch_size=4)
    assert rows == in_order(engine.run(segments_of(TINY)))


def test_the_steps_of_a_saved_model_are_those_of_keras(model, tmp_path):
    tf = pytest.importorskip("tensorflow")
    pytest.importorskip("tensorflow_serving", reason="needs requirements-serving.txt")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("a SavedModel is written by TensorFlow")
    from export.saved_model import export_saved_model
    from export.served_model import ServedModel

    folder = export_saved_model(ServedModel(model), tmp_path, name="recurrent")
    signatures = tf.saved_model.load(str(folder)).signatures
    inputs = make_inputs()
    whole = ops.convert_to_numpy(model(inputs))
    memory = signatures["encode"](
        samples=tf.constant(inputs["samples"]), num_frames=tf.constant(inputs["num_frames"])
    )
    for position in range(3):
        answer = signatures["decode_step"](
            tokens=tf.constant(inputs["decoder_tokens"][:, position]),
            positions=tf.constant([position] * 2, tf.int32),
            **memory,
        )
        memory["state"] = answer["state"]
        assert answer["logits"].numpy() == pytest.approx(whole[:, position], abs=1e-4)
