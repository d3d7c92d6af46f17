"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import pytest
from numpy.typing import NDArray

from mt3_keras.models.config import LOWEST_PITCH, NUM_PITCHES
from mt3_keras.outputs import RollOutput

ROOT = pathlib.Path(__file__).resolve().parent.parent


def tones(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    """A tone a second, swelling, of any pitch: even random networks give different outputs."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(16_000 * seconds)) / 16_000
    hz = rng.choice([60, 110, 250, 440, 900, 2000, 4000], int(seconds) + 1)[time.astype(int)]
    sound = np.sin(2 * np.pi * hz * time) * (time % 1) + 0.01 * rng.normal(size=time.size)
    return sound.astype(np.float32)


def make_output(onsets=(), strokes=(), sounding=(), num_frames=20):
    """A detector's output of a segment.

    Args:
      onsets: frame, pitch, probability and program of each, and if wanted velocity and unison.
      strokes: frame, key and probability of each.
      sounding: first frame, frame after the last, and pitch: elsewhere a note has ended.
    """
    rows = [
        (f, p, chance, *(more[1:2] or [64]), *(more[2:] or [0])) for f, p, chance, *more in onsets
    ]
    programs = np.zeros((len(rows), 128), np.float32)
    for row, (_, _, _, program, *_) in zip(programs, onsets, strict=True):
        row[program] = 1
    ended = np.full((num_frames, NUM_PITCHES), 0.9, np.float32)
    for first, end, pitch in sounding:
        ended[first:end, pitch - LOWEST_PITCH] = 0.1
    return RollOutput(
        np.array(rows, np.float32).reshape(-1, 5),
        programs,
        np.array([(*stroke, 100) for stroke in strokes], np.float32).reshape(-1, 4),
        ended,
    )


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of golden outputs, official weights and sample data; skips where it is absent."""
    folder = pathlib.Path(os.environ.get("MT3_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the shared folder of reference data: set MT3_SHARED ({folder} is none)")
    return folder


@pytest.fixture(scope="session")
def tiny_model():
    """A minute network with random weights, the same in every run."""
    import keras

    from mt3_keras.models.config import LogMelConfig, MT3Config, T5Config
    from mt3_keras.models.mt3 import MT3Backbone

    sizes = {"width": 16, "num_heads": 2, "head_width": 8, "mlp_width": 32, "max_tokens": 64}
    config = MT3Config(
        LogMelConfig(num_mels=16),
        network=T5Config(num_encoder_layers=1, num_decoder_layers=1, **sizes),
    )
    keras.utils.set_random_seed(3)
    model = MT3Backbone(**config.to_dict())
    kernel = keras.ops.convert_to_numpy(model.decoder.logits.kernel).copy()
    kernel[:, 1] *= 6  # EOS comes now and then, as it does in a trained model,
    model.decoder.logits.kernel.assign(kernel)
    values = model.decoder.layers[0].cross_attention.value.kernel
    values.assign(values * 4)  # and the sound makes a difference
    return model


@pytest.fixture(scope="session")
def tiny_preset(tiny_model, tmp_path_factory) -> pathlib.Path:
    """The tiny model as a preset folder."""
    from mt3_keras.models.loading import save_preset

    folder = tmp_path_factory.mktemp("presets") / "tiny"
    save_preset(tiny_model, folder)
    return folder


@pytest.fixture(scope="session")
def official(shared) -> pathlib.Path:
    """The official MT3 checkpoint."""
    folder = shared / "checkpoints" / "mt3"
    if not folder.is_dir():
        pytest.skip(f"needs the official checkpoint in {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model, tmp_path_factory) -> pathlib.Path:
    """The tiny model as an edge bundle in float32."""
    export_bundle = _bundle_exporter()
    return export_bundle(tiny_model, tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def detector_bundle(tmp_path_factory) -> pathlib.Path:
    """A minute detector as an edge bundle in float32, decoded so that it has notes."""
    export_bundle = _bundle_exporter()
    from tests.detectors import EAGER, build

    folder = tmp_path_factory.mktemp("bundles") / "detector"
    return export_bundle(build(), folder, decoding=EAGER)


def _bundle_exporter():
    import keras

    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("a bundle is written by TensorFlow")
    from export.tflite import export_bundle

    return export_bundle
