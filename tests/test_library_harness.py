"""The harnesses of Keras and KerasHub, run on every layer and backbone of this package."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from mt3_keras.models import (
    detector,
    detector_body,
    detector_drums,
    detector_layers,
    layers,
    mt3,
    recurrent,
    second_look,
    spectrogram,
    token_backbone,
    tracks_in,
    tracks_out,
)
from mt3_keras.models.config import (
    HEADS,
    PITCH_HEADS,
    HarmonicConfig,
    LogMelConfig,
    MT3Config,
    RecurrentConfig,
    RecurrentNetworkConfig,
    T5Config,
    TracksInConfig,
    TracksInNetworkConfig,
    TracksOutConfig,
    TracksOutNetworkConfig,
)
from tests.detectors import MINI, random_samples

pytest.importorskip("keras_hub")
if keras.backend.backend() != "tensorflow":
    pytest.skip("KerasHub's harness needs TensorFlow", allow_module_level=True)

from keras.src.testing import test_case as keras_harness
from keras_hub.src.tests import test_case as hub_harness

SIZES: dict[str, Any] = {"width": 16, "num_heads": 2, "head_width": 8}
MINI_T5 = T5Config(
    **SIZES,
    mlp_width=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    segment_frames=16,
    max_tokens=16,
    vocabulary_rows=128,
)
MINI_MT3 = MT3Config(LogMelConfig(num_mels=16, window_samples=256), network=MINI_T5)
MINI_NETWORK = RecurrentNetworkConfig(
    **SIZES, filters=(6, 4), segment_frames=16, max_tokens=16, vocabulary_rows=128
)
MINI_RECURRENT = RecurrentConfig(MINI_MT3.spectrogram, network=MINI_NETWORK)
TRACKS = {"tracks": ("drums", "bass", "other")}
MINI_IN = TracksInNetworkConfig(**{**dataclasses.asdict(MINI_T5), **TRACKS})
MINI_OUT = TracksOutNetworkConfig(**{**dataclasses.asdict(MINI_T5), **TRACKS})
NET, N, C = MINI.network, 88, MINI.spectrogram.num_channels
F, P = NET.window_frames, NET.window_frames // NET.frames_per_step

# Class -> its arguments, the shapes of its inputs, the shape of its output.
CASES: dict[type, tuple[dict[str, Any], dict[str, tuple[int, ...]], Any]] = {
    layers.Logits: ({"units": 3}, {"inputs": (2, 5, 4)}, (2, 5, 3)),
    layers.Attention: (SIZES, {"query": (2, 5, 16)}, (2, 5, 16)),
    layers.GatedMLP: ({"config": MINI_T5}, {"x": (2, 5, 16)}, (2, 5, 16)),
    layers.EncoderLayer: ({"config": MINI_T5}, {"x": (2, 5, 16)}, (2, 5, 16)),
    layers.Encoder: ({"config": MINI_T5}, {"spectrum_BTM": (2, 5, 7)}, (2, 5, 16)),
    layers.DecoderLayer: (
        {"config": MINI_T5},
        {"x": (2, 5, 16), "encoded": (2, 4, 16), "bias": (2, 1, 5, 5)},
        (2, 5, 16),
    ),
    spectrogram.LogMel: ({"config": MINI_MT3.spectrogram}, {"samples": (2, 512)}, (2, 3, 16)),
    spectrogram.Harmonics: ({"config": HarmonicConfig()}, {"samples": (2, 4608)}, (2, 3, N, C)),
    mt3.Decoder: ({"config": MINI_T5}, {"tokens": (2, 5), "encoded": (2, 16, 16)}, (2, 5, 128)),
    tracks_in.TrackEncoders: ({"config": MINI_IN}, {"spectra": (2, 3, 16, 7)}, (2, 16, 16)),
    tracks_out.GroupDecoders: (
        {"config": MINI_OUT},
        {"tokens": (2, 3, 5), "encoded": (2, 16, 16)},
        (2, 3, 5, 128),
    ),
    recurrent.RecurrentEncoder: (
        {"config": MINI_NETWORK},
        {"log_mel_BTM": (2, 16, 7)},
        (2, 4, 16),
    ),
    recurrent.RecurrentDecoderLayer: (
        {"config": MINI_NETWORK},
        {"x": (2, 5, 16), "encoded": (2, 4, 16)},
        (2, 5, 16),
    ),
    recurrent.RecurrentDecoder: (
        {"config": MINI_NETWORK},
        {"tokens": (2, 5), "encoded": (2, 4, 16)},
        (2, 5, 128),
    ),
    detector_layers.Recurrent: ({"width": 4, "directions": 2}, {"x": (5, 3, 4)}, (5, 3, 8)),
    detector_body.DetectorBody: (
        {"config": NET},
        {"harmonics": (2, F, N, C)},
        {
            **dict.fromkeys(PITCH_HEADS, (2, F, N)),
            "features": (2, P, N, NET.num_features),
            "states": {
                "pitches": (2, P, N, NET.recurrent_width),
                "context": (2, P, NET.context_width),
            },
        },
    ),
    detector_drums.Drums: (
        {"config": NET},
        {"spectrum": (2, F, 584)},
        {
            "drum": (2, F, HEADS["drum"]),
            "drum_strength": (2, F, 1),
            "states": (2, P, NET.drum_context_width),
        },
    ),
    second_look.SecondLook: (
        {"config": NET},
        {
            "harmonics": (2, F, N, C),
            "features": (2, P, N, NET.num_features),
            "cells": (2, 7, 2),
            "chances": (2, 7),
        },
        {"class": (2, 7, 16), "program": (2, 7, 16, 8), "note": (2, 7)},
    ),
    second_look.Comparison: (
        {"config": NET},
        {"x": (2, 7, NET.look_width), "bias": (2, 1, 7, 7)},
        (2, 7, NET.look_width),
    ),
}


def test_every_layer_class_of_the_package_is_in_the_harness() -> None:
    modules = (
        *(layers, token_backbone, mt3, recurrent, tracks_in, tracks_out, spectrogram),
        *(detector, detector_layers, detector_body, detector_drums, second_look),
    )
    found = {
        item
        for module in modules
        for item in vars(module).values()
        if isinstance(item, type)
        and issubclass(item, keras.layers.Layer)
        and not issubclass(item, keras.Model)
        and item.__module__ == module.__name__
        and not item.__name__.startswith("_")
    }
    bases = {base for item in found for base in item.__mro__[1:]}  # of others, never built alone
    assert found - bases == set(CASES)


@pytest.mark.parametrize("layer_class", CASES, ids=lambda c: c.__name__)
def test_layers_pass_the_harness_of_keras(layer_class: type) -> None:
    arguments, inputs, outputs = CASES[layer_class]
    dtypes = {f"{n}_shape": "int32" if n in ("tokens", "cells") else "float32" for n in inputs}
    shapes = {f"{name}_shape": shape for name, shape in inputs.items()}
    single = len(inputs) == 1
    keras_harness.TestCase().run_layer_test(
        layer_class,
        init_kwargs=arguments,
        input_shape=next(iter(inputs.values())) if single else shapes,
        input_dtype="float32" if single else dtypes,
        expected_output_shape=outputs,
        # The harness batches the first axis, which is time here.
        run_training_check=single and layer_class is not detector_layers.Recurrent,
    )


TOKEN_INPUTS = {
    "samples": random_samples(num_rows=2)[:, : MINI_MT3.input_samples],
    "num_frames": np.array([16, 9], np.int32),
    "decoder_tokens": np.ones((2, 5), np.int32),
}
TRACK_TOKENS = {**TOKEN_INPUTS, "decoder_tokens": np.ones((2, 3, 5), np.int32)}
TRACK_SAMPLES = {**TOKEN_INPUTS, "samples": np.stack([TOKEN_INPUTS["samples"]] * 3, axis=1)}
BACKBONES: dict[type[Any], tuple[dict[str, Any], dict[str, Any], Any]] = {
    mt3.MT3Backbone: (MINI_MT3.to_dict(), TOKEN_INPUTS, (2, 5, 128)),
    recurrent.RecurrentBackbone: (MINI_RECURRENT.to_dict(), TOKEN_INPUTS, (2, 5, 128)),
    tracks_in.TracksInBackbone: (
        TracksInConfig(MINI_MT3.spectrogram, network=MINI_IN).to_dict(),
        TRACK_SAMPLES,
        (2, 5, 128),
    ),
    tracks_out.TracksOutBackbone: (
        TracksOutConfig(MINI_MT3.spectrogram, network=MINI_OUT).to_dict(),
        TRACK_TOKENS,
        (2, 3, 5, 128),
    ),
    detector.NoteDetector: (
        MINI.to_dict(),
        {"samples": random_samples(num_rows=2), "cells": np.ones((2, 7, 2), np.int32)},
        {
            **{f"{head}_logits": (2, F, columns) for head, columns in HEADS.items()},
            "class_logits": (2, 7, 16),
            "program_logits": (2, 7, 16, 8),
            "note_logits": (2, 7),
        },
    ),
}


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda c: c.__name__)
def test_backbones_pass_the_harness_of_kerashub(backbone: type) -> None:
    arguments, inputs, shape = BACKBONES[backbone]
    case = hub_harness.TestCase()
    case.run_backbone_test(backbone, arguments, inputs, shape)
    case.run_model_saving_test(backbone, arguments, inputs)


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda c: c.__name__)
def test_backbones_summarise_adapt_and_quantise(backbone: Any) -> None:
    arguments, inputs, _ = BACKBONES[backbone]
    model, lines = backbone(**arguments), []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    assert ("body" if backbone is detector.NoteDetector else "encoder") in "\n".join(lines)
    expected = keras.tree.flatten(model(inputs))
    model.enable_lora(2)
    num_trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert num_trained < model.count_params() / 4
    for own, other in zip(keras.tree.flatten(model(inputs)), expected, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(own), other, atol=1e-5)
    whole = backbone(**arguments)
    expected = keras.tree.flatten(whole(inputs))
    whole.quantize("int8")
    for own, other in zip(keras.tree.flatten(whole(inputs)), expected, strict=True):
        difference = np.abs(ops.convert_to_numpy(own) - ops.convert_to_numpy(other))
        assert difference.mean() < 0.1 * np.abs(ops.convert_to_numpy(other)).mean() + 0.05


def test_a_config_may_be_given_as_its_fields() -> None:
    layer = spectrogram.LogMel(dataclasses.asdict(LogMelConfig(num_mels=8)))
    assert layer.config == LogMelConfig(num_mels=8)
