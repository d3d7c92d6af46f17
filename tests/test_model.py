"""The network: parity with the original, cached decoding, presets."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import soundfile
from keras import ops

from mt3_keras.grammar import MASKED
from mt3_keras.models.config import ISMIR2021, MT3, MT3Config
from mt3_keras.models.layers import sinusoid_positions
from mt3_keras.models.loading import load_model
from mt3_keras.models.mt3 import MT3Backbone
from mt3_keras.models.preset_config import read_config


def tiny_inputs(batch_size=2, length=9):
    rng = np.random.default_rng(3)
    num_samples = MT3.segment_samples + MT3.spectrogram.overhang_samples
    return {
        "samples": rng.normal(size=(batch_size, num_samples)).astype(np.float32),
        "num_frames": np.array([256, 100], np.int32)[:batch_size],
        "decoder_tokens": rng.integers(3, 1000, (batch_size, length)).astype(np.int32),
    }


def test_positions_are_those_of_the_original():
    table = sinusoid_positions(2048, 512)
    expected = {(1, 0): 0.841471, (1, 1): 0.8217787, (1, 255): 1.0e-4, (1, 256): 0.5403023}
    expected |= {(100, 10): 0.5393229, (2047, 511): 0.979122}
    for place, value in expected.items():
        assert table[place] == pytest.approx(value, abs=1e-6)


def test_the_default_network_has_the_papers_weights():
    model = MT3Backbone()
    assert model.count_params() == 45_896_704
    assert len(model.weights) == 189
    assert MT3Backbone(**ISMIR2021.to_dict()).count_params() == 46_027_776


def test_cached_decoding_equals_the_whole_sequence(tiny_model):
    inputs = tiny_inputs()
    tokens = inputs["decoder_tokens"]
    whole = ops.convert_to_numpy(tiny_model(inputs))
    memory = tiny_model.encode(inputs["samples"], inputs["num_frames"])
    cache = tiny_model.empty_cache(2, 9)
    for position in range(9):
        bias = np.where(np.arange(9) < position, 0.0, MASKED).astype(np.float32)
        positions = np.full(2, position, np.int32)
        logits, rows = tiny_model.decode_step(
            tokens[:, position], positions, cache, np.stack([bias] * 2), memory
        )
        cache = {
            name: ops.slice_update(cache[name], (0, 0, position, 0), rows[name][:, :, None])
            for name in cache
        }
        assert ops.convert_to_numpy(logits) == pytest.approx(whole[:, position], abs=2e-4)


def test_a_batch_equals_its_rows_alone(tiny_model):
    inputs = tiny_inputs()
    both = ops.convert_to_numpy(tiny_model(inputs))
    for row in range(2):
        alone = tiny_model({name: array[row : row + 1] for name, array in inputs.items()})
        assert ops.convert_to_numpy(alone)[0] == pytest.approx(both[row], abs=1e-4)


def test_later_tokens_do_not_change_earlier_logits(tiny_model):
    inputs = tiny_inputs()
    before = ops.convert_to_numpy(tiny_model(inputs))
    inputs["decoder_tokens"][:, 5:] = 7
    after = ops.convert_to_numpy(tiny_model(inputs))
    assert after[:, :5] == pytest.approx(before[:, :5], abs=1e-5)
    assert np.abs(after[:, 5:] - before[:, 5:]).max() > 1e-2


def test_dropout_is_at_work_in_training_alone(tiny_model):
    inputs = tiny_inputs()
    outputs = [ops.convert_to_numpy(tiny_model(inputs, training=flag)) for flag in (True, True)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    outputs = [ops.convert_to_numpy(tiny_model(inputs)) for _ in range(2)]
    assert (outputs[0] == outputs[1]).all()


def test_bfloat16_computes_near_float32_with_float32_weights(tiny_model):
    half = MT3Backbone(**tiny_model.model_config.to_dict(), dtype="mixed_bfloat16")
    half.set_weights(tiny_model.get_weights())
    assert {str(w.dtype) for w in half.weights} == {"float32"}
    inputs = tiny_inputs()
    logits = half.forward(inputs)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    assert keras.backend.standardize_dtype(half(inputs).dtype) == "bfloat16"
    expected = ops.convert_to_numpy(tiny_model(inputs))
    error = np.abs(ops.convert_to_numpy(logits) - expected).mean()
    assert error < 0.05 * np.abs(expected).mean()


def test_a_preset_holds_the_model_whole(tiny_model, tiny_preset):
    assert read_config(tiny_preset) == tiny_model.model_config
    inputs = tiny_inputs()
    expected = ops.convert_to_numpy(tiny_model(inputs))
    for model in (load_model(tiny_preset), MT3Backbone.from_preset(str(tiny_preset))):
        assert (ops.convert_to_numpy(model(inputs)) == expected).all()


def test_the_log_floor_can_be_replaced_on_loading(tiny_preset):
    model = load_model(tiny_preset, log_floor="clamp")
    assert model.model_config.spectrogram.log_floor == "clamp"


@pytest.mark.parametrize("clip", ["band", "piano"])
def test_the_official_weights_give_the_originals_values(shared, official, clip):
    golden = np.load(shared / "golden" / f"{clip}.npz", allow_pickle=False)
    samples, _ = soundfile.read(shared / "golden" / f"{clip}.flac", dtype="float32")
    overhang = np.zeros(MT3.spectrogram.overhang_samples, np.float32)
    first = np.concatenate([samples[: MT3.segment_samples], overhang])[None]
    model = load_model(official)
    log_mel = model.log_mel(first, np.array([256], np.int32))
    assert ops.convert_to_numpy(log_mel)[0] == pytest.approx(golden["log_mel_first"], abs=1e-3)
    last = model.log_mel(np.zeros_like(first), np.array([1], np.int32))
    assert ops.convert_to_numpy(last)[0] == pytest.approx(golden["log_mel_last"], abs=1e-3)
    encoded = ops.convert_to_numpy(model.encoder(log_mel))[0]
    assert encoded == pytest.approx(golden["encoded_first"], abs=2e-3)
    tokens = golden["decoder_input_first"].astype(np.int32)[None]
    counts = np.array([256], np.int32)
    logits = model({"samples": first, "num_frames": counts, "decoder_tokens": tokens})
    assert ops.convert_to_numpy(logits)[0] == pytest.approx(golden["logits_first"], abs=5e-3)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("network", {"width": 0}),
        ("network", {"width": 33}),
        ("network", {"wdith": 32}),
        ("vocabulary", {"granularity": "coarse"}),
        ("vocabulary", {"num_velocity_bins": 0}),
    ],
)
def test_impossible_models_are_refused(part, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MT3Config.from_dict({part: settings})
