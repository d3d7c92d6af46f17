"""The detector's body and its names of notes: all ways to run them give the same."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from mt3_keras.models import second_look
from mt3_keras.models.config import NUM_PITCHES, PITCH_HEADS, BodyConfig
from mt3_keras.models.detector_body import DetectorBody
from mt3_keras.models.detector_layers import Recurrent
from mt3_keras.models.second_look import SecondLook

CONFIG = BodyConfig(
    spectrum_channels=4,
    channels=4,
    recurrent_width=3,
    interval_channels=2,
    context_width=3,
    frame_width=5,
    look_width=4,
    look_heads=2,
)
NUM_FRAMES, NUM_CHANNELS = 24, 6
MARGIN = 6  # steps: more than the convolutions see to one side
HARMONICS = (
    np.random.default_rng(1).random((2, NUM_FRAMES, NUM_PITCHES, NUM_CHANNELS)).astype(np.float32)
)


def make_body(**settings):
    keras.utils.set_random_seed(5)
    body = DetectorBody(CONFIG, **settings)
    body(HARMONICS)
    return body


def to_numpy(outputs):
    """Heads and states by name, as arrays."""
    flat = {**outputs, **{f"state_{name}": x for name, x in outputs.get("states", {}).items()}}
    return {name: ops.convert_to_numpy(x) for name, x in flat.items() if name != "states"}


def test_every_head_has_a_row_for_each_frame():
    shapes = {name: x.shape for name, x in to_numpy(make_body()(HARMONICS)).items()}
    assert shapes == {
        **dict.fromkeys(PITCH_HEADS, (2, NUM_FRAMES, NUM_PITCHES)),
        "features": (2, NUM_FRAMES // 2, NUM_PITCHES, CONFIG.num_features),
        "state_pitches": (2, NUM_FRAMES // 2, NUM_PITCHES, 3),
        "state_context": (2, NUM_FRAMES // 2, 3),
    }


def test_a_recording_in_two_pieces_with_carried_states_is_the_whole():
    body, steps, cut = make_body(), CONFIG.frames_per_step, 8
    whole = body(HARMONICS)
    state = {name: x[:, cut - 1] for name, x in whole["states"].items()}
    first = (cut - MARGIN) * steps
    rest = to_numpy(body(HARMONICS[:, first:], state, margin_steps=(MARGIN, 0)))
    for name, values in to_numpy(whole).items():
        since = cut if name.startswith(("state", "features")) else cut * steps
        assert rest[name] == pytest.approx(values[:, since:], abs=1e-5), name


def test_without_a_backward_direction_the_start_of_a_recording_does_not_depend_on_its_end():
    layer = Recurrent(3, directions=1)
    x = np.random.default_rng(2).random((9, 2, 4)).astype(np.float32)
    whole = ops.convert_to_numpy(layer(x))
    assert ops.convert_to_numpy(layer(x[:5])) == pytest.approx(whole[:5], abs=1e-6)


def test_steps_in_the_graph_are_the_loop():
    loop, written_out = make_body(), make_body(unroll=True)
    written_out.set_weights(loop.get_weights())
    expected, found = to_numpy(loop(HARMONICS)), to_numpy(written_out(HARMONICS))
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-5), name


def test_a_note_is_named_by_its_own_half_second():
    look = SecondLook(CONFIG)
    cells = np.array([[[5, 3], [12, 80]], [[5, 3], [20, 40]]], np.int32)
    features = np.random.default_rng(3).random((2, 12, NUM_PITCHES, CONFIG.num_features))
    features = features.astype(np.float32)
    chances = np.array([[0.5, 0.9], [0.05, 1.0]], np.float32)
    look(HARMONICS, features, cells, chances)
    looks = ops.convert_to_numpy(look._gather(HARMONICS, cells))
    before, after = second_look.FRAMES
    assert looks.shape == (4, before + after, len(second_look.INTERVALS) * NUM_CHANNELS)
    own = looks[1].reshape(before + after, -1, NUM_CHANNELS)
    assert own[:, 0] == pytest.approx(np.pad(HARMONICS[0, 8:, 80], ((0, 16), (0, 0))))
    assert not own[:, 1:].any()  # pitches beyond the piano are silent
    seen = ops.convert_to_numpy(look._gather_features(features, cells))
    steps = [features[0, step, 80] for step in (6, 9, 11)]  # the last is beyond the end
    assert seen[1] == pytest.approx(np.concatenate(steps))
    together = to_numpy(look(HARMONICS, features, cells, chances))
    apart = to_numpy(look(HARMONICS, features, cells[:, 1:], chances[:, 1:]))
    for name, of_all in together.items():
        # In the first row the other note is heard beside it, in the second it is too unlikely.
        assert apart[name][0, 0] != pytest.approx(of_all[0, 1], abs=1e-5), name
        assert apart[name][1, 0] == pytest.approx(of_all[1, 1], abs=1e-5), name


def test_notes_are_compared_whatever_their_order():
    look, random = SecondLook(CONFIG), np.random.default_rng(3)
    features = random.random((2, 12, NUM_PITCHES, CONFIG.num_features)).astype(np.float32)
    cells = random.integers(0, (24, NUM_PITCHES), (2, 6, 2), np.int32)
    chances = random.random((2, 6)).astype(np.float32)
    order = random.permutation(6)
    found = to_numpy(look(HARMONICS, features, cells, chances))
    turned = to_numpy(look(HARMONICS, features, cells[:, order], chances[:, order]))
    for name, values in found.items():
        assert turned[name] == pytest.approx(values[:, order], abs=1e-5), name


def test_jax_predicts_what_tensorflow_predicts(tmp_path):
    body = make_body()
    weights = tmp_path / "weights.npz"
    np.savez(weights, *body.get_weights())
    program = (
        "import sys, numpy as np, keras; from tests import test_detector_body as here\n"
        "assert keras.backend.backend() == sys.argv[2]; body = here.make_body()\n"
        "z = np.load(sys.argv[1]); body.set_weights([z[name] for name in z.files])\n"
        "np.savez(sys.argv[1], **here.to_numpy(body(here.HARMONICS)))"
    )
    other = "jax" if keras.backend.backend() == "tensorflow" else "tensorflow"
    root = pathlib.Path(__file__).resolve().parent.parent
    environment = {**os.environ, "KERAS_BACKEND": other, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program, str(weights), other]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=root)
    for name, values in to_numpy(body(HARMONICS)).items():
        assert np.load(weights)[name] == pytest.approx(values, abs=1e-4), name


def test_litert_predicts_what_keras_predicts_with_builtin_operators(tmp_path):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="needs ai-edge-litert")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("LiteRT files are written by TensorFlow")
    import tensorflow as tf

    body = make_body(unroll=True)
    weights = [(variable, variable.numpy()) for variable in body.variables]

    def predict(harmonics):
        constants = [(variable, tf.constant(array)) for variable, array in weights]
        with keras.StatelessScope(state_mapping=constants):
            outputs = dict(body(harmonics))
        return outputs | {f"state_{k}": x for k, x in outputs.pop("states").items()}

    spec = tf.TensorSpec((1, *HARMONICS.shape[1:]), tf.float32)
    function = tf.function(predict, autograph=False).get_concrete_function(harmonics=spec)
    tf.saved_model.save(tf.Module(), str(tmp_path), signatures=function)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    runner = interpreter.Interpreter(model_content=converter.convert()).get_signature_runner()
    found = runner(harmonics=HARMONICS[:1])
    for name, values in to_numpy(body(HARMONICS[:1])).items():
        assert found[name] == pytest.approx(values, abs=1e-4), name
