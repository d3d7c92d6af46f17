"""SavedModel: what is served equals Keras, and is what a server expects."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from mt3_keras.codec import EOS
from mt3_keras.engines.keras import RollEngine, TokenEngine
from mt3_keras.grammar import Rules
from mt3_keras.models.loading import save_preset
from mt3_keras.models.preset_config import read_config
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.outputs import RollOutput
from mt3_keras.segments import cut_segments
from mt3_keras.transcriber import Transcriber
from tests.detectors import EAGER, MINI, build

tf = pytest.importorskip("tensorflow")
pytest.importorskip("tensorflow_serving", reason="needs requirements-serving.txt")
if keras.backend.backend() != "tensorflow":
    pytest.skip("a SavedModel is written by TensorFlow", allow_module_level=True)

from export.main import main  # noqa: E402
from export.saved_model import export_saved_model, write_server_settings  # noqa: E402
from export.served_model import ServedDetector, ServedModel  # noqa: E402
from export.served_notes import FIELDS  # noqa: E402

MAX_TOKENS = 24
FREE = Rules()  # an untrained network always runs away


def melody(num_samples, seed=0):
    """Swelling tones: the sequences that the tiny network emits for them are of many lengths."""
    rng = np.random.default_rng(seed)
    times, place = np.arange(num_samples) / 16_000, np.arange(num_samples) % 32_768
    pitches = rng.permutation([60, 110, 250, 440, 900, 2000, 4000])
    hz = np.resize(pitches.repeat(32_768), num_samples)
    tones = np.sin(2 * np.pi * hz * times) * place / 32_768
    return (tones + 0.01 * rng.normal(size=num_samples)).astype(np.float32)


@functools.cache
def make_engine(model, rules):
    return TokenEngine(model, rules=rules, max_tokens=MAX_TOKENS, batch_size=3)


@functools.cache
def make_served(model, rules=FREE, **options):
    return trace(ServedModel(model, rules=rules, max_tokens=MAX_TOKENS, **options).transcribe)


def trace(function):
    audio = tf.TensorSpec([None, None], tf.float32, "audio")
    return tf.function(function, input_signature=[audio], autograph=False)


def search(model, samples, context="full", rules=FREE):
    """Tokens of a recording's segments as the Transcriber finds them."""
    segments = cut_segments([samples], model.model_config, context)
    found = dict(make_engine(model, rules).run(segments))
    return [found[i].tokens for i in range(len(found))]


def to_lists(answer):
    """Tokens of every recording's segments, and a check of what follows their ends."""
    recordings = []
    for rows, num_segments in zip(answer["tokens"], answer["num_segments"], strict=True):
        assert len(rows) == num_segments
        lists = [row.tolist() for row in np.asarray(rows)]
        ends = [row.index(EOS) + 1 if EOS in row else len(row) for row in lists]
        assert not any(any(row[end:]) for row, end in zip(lists, ends, strict=True))
        recordings.append([row[:end] for row, end in zip(lists, ends, strict=True)])
    return recordings


@pytest.fixture(scope="module")
def detector():
    return build()


@pytest.mark.parametrize("context", ["full", "segment"])
@pytest.mark.parametrize("num_samples", [0, 1, 4096, 20_000])
def test_what_a_detector_finds_is_served_with_chances_in_bytes(detector, context, num_samples):
    samples = melody(num_samples)
    segments = list(cut_segments([samples], MINI, context))
    served = ServedDetector(detector, context=context, batch_size=4)
    find = trace(served.find_candidates)
    found = {name: tensor.numpy() for name, tensor in find(samples[None]).items()}
    assert found.pop("num_segments").tolist() == [len(segments)]
    outputs = dict(RollEngine(detector, batch_size=4).run(segments))
    for name, arrays in found.items():
        expected = np.stack([getattr(outputs[i], name) for i in range(len(segments))])
        assert arrays.shape == (1, *expected.shape)
        if name in ("programs", "ended"):
            assert arrays.dtype == np.uint8
            np.testing.assert_allclose(arrays[0] / 255, expected, atol=0.51 / 255)
        else:
            np.testing.assert_allclose(arrays[0], expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batches_of_recordings_and_of_segments_change_nothing(detector, batch_size):
    served = trace(ServedDetector(detector, batch_size=batch_size).find_candidates)
    samples = np.stack([melody(20_000, seed) for seed in range(3)])
    ended = served(samples)["ended"].numpy().astype(int)
    alone = np.stack([served(row[None])["ended"].numpy()[0].astype(int) for row in samples])
    assert np.abs(ended - alone).max() <= 1  # where rounding falls
    assert np.mean(ended == alone) > 0.999
    assert served(samples[:0])["ended"].shape[0] == 0


@pytest.mark.parametrize(
    "rules",
    [
        Rules(constrained=True, stop_runaways=True),
        Rules(programs=frozenset({33, 40}), drums=False),
    ],
)
def test_rules_hold_as_in_the_search(tiny_model, rules):
    samples = melody(100_000)
    found = make_served(tiny_model, rules=rules)(samples[None])
    assert to_lists(found) == [search(tiny_model, samples, "full", rules)]


def test_an_empty_batch_has_an_empty_answer(tiny_model):
    found = make_served(tiny_model, batch_size=16)(np.zeros((0, 40_000), np.float32))
    assert found["tokens"].shape[:2] == (0, 2)
    assert found["num_segments"].shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_samples_out_of_all_bounds_are_refused(tiny_model, detector, bad):
    samples = melody(5000)
    samples[3000] = bad
    find = trace(ServedDetector(detector).find_candidates)
    for served in (make_served(tiny_model, batch_size=16), find):
        with pytest.raises(tf.errors.InvalidArgumentError, match="audio must be finite"):
            served(samples[None])


def test_recordings_of_more_than_ten_minutes_are_refused(tiny_model):
    with pytest.raises(tf.errors.InvalidArgumentError, match="may last 600 s here, this one lasts"):
        make_served(tiny_model, batch_size=16)(np.zeros((1, 600 * 16_000 + 1), np.float32))


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    served = ServedModel(tiny_model, rules=FREE, max_tokens=MAX_TOKENS)
    return export_saved_model(served, folder, name="tiny")


@pytest.fixture(scope="module")
def exported_detector(detector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return export_saved_model(ServedDetector(detector, decoding=EAGER), folder, name="mini")


ALONE = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np, tensorflow as tf
folder, inputs, outputs = sys.argv[1:]
transcribe = tf.saved_model.load(folder).signatures["serving_default"]
arrays = np.load(inputs)
found = {}
for name in arrays.files:
    for key, value in transcribe(audio=tf.constant(arrays[name])).items():
        found[f"{name}_{key}"] = value.numpy()
assert not {"mt3_keras", "export", "keras_hub"} & sys.modules.keys()
np.savez(outputs, **found)
"""


def run_alone(folder, tmp_path, **arrays):
    """Answers of a SavedModel in a process that cannot import this project."""
    np.savez(tmp_path / "in.npz", **arrays)
    command = [sys.executable, "-I", "-c", ALONE, folder, tmp_path / "in.npz", tmp_path / "out.npz"]
    run = subprocess.run(
        [str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = np.load(tmp_path / "out.npz")
    return {
        name: to_lists({key: found[f"{name}_{key}"] for key in ("tokens", "num_segments")})
        for name in arrays
    }


def test_without_the_projects_code_the_tokens_are_those_of_keras(exported, tiny_model, tmp_path):
    three = np.stack([melody(120_000, seed) for seed in range(3)])
    found = run_alone(exported, tmp_path, one=three[:1], three=three)
    transcriber = Transcriber(tiny_model, rules=FREE, max_tokens=MAX_TOKENS)
    expected = [[s.tokens for s in transcriber.transcribe(row).segments] for row in three]
    assert found == {"one": expected[:1], "three": expected}


def test_a_detector_is_served_by_itself(exported_detector, detector):
    """Its folder says what a client must know, and its signatures compute what Keras does."""
    assert read_config(exported_detector) == MINI
    assert RollDecoding.read(exported_detector) == EAGER
    signatures = tf.saved_model.load(str(exported_detector)).signatures
    finding = {"candidates", "candidates_bytes", "detect"}
    assert set(signatures) == {"serving_default", "serving_bytes", *finding}
    (segment, *_) = cut_segments([melody(5000)], MINI, "full")
    found = signatures["detect"](samples=tf.constant(segment.samples[None]))
    expected = detector.detect(segment.samples[None])
    assert set(found) == set(expected) == set(RollOutput._fields)
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], atol=1e-4, err_msg=name)
    audio = tf.constant(melody(5000)[None])
    assert set(signatures["candidates"](audio=audio)) == {*RollOutput._fields, "num_segments"}
    assert set(signatures["serving_default"](audio=audio)) == {*FIELDS, "num_notes"}


def test_signatures_are_named_and_typed_and_their_batch_is_open(exported):
    program = pathlib.Path(sys.executable).with_name("saved_model_cli")
    command = [program, "show", "--dir", exported, "--tag_set", "serve", "--all"]
    run = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    text = " ".join(run.stdout.split())
    for line in (
        "inputs['audio'] tensor_info: dtype: DT_FLOAT shape: (-1, -1)",
        "outputs['tokens'] tensor_info: dtype: DT_INT32 shape: (-1, -1, -1)",
        "outputs['num_segments'] tensor_info: dtype: DT_INT32 shape: (-1)",
        "inputs['samples'] tensor_info: dtype: DT_FLOAT shape: (-1, 34688)",
        "inputs['num_frames'] tensor_info: dtype: DT_INT32 shape: (-1)",
        "outputs['cross_keys_0'] tensor_info: dtype: DT_FLOAT shape: (-1, 2, ",
        "inputs['tokens'] tensor_info: dtype: DT_INT32 shape: (-1)",
        "inputs['keys_0'] tensor_info: dtype: DT_FLOAT shape: (-1, 2, ",
        "outputs['logits'] tensor_info: dtype: DT_FLOAT shape: (-1, 1536)",
        "outputs['values_0'] tensor_info: dtype: DT_FLOAT shape: (-1, 2, 8)",
    ):
        assert line in text
    for signature in ("serving_default", "encode", "decode_step"):
        assert f"signature_def['{signature}']" in text
    assert text.count("Method name is: tensorflow/serving/predict") == 4


@pytest.mark.parametrize("network", ["exported", "exported_detector"])
def test_graphs_hold_nothing_that_servers_lack(network, request):
    """No XLA and no Python, which TF Serving cannot run."""
    from tensorflow.core.protobuf import saved_model_pb2

    folder = request.getfixturevalue(network)
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    operators = {node.op for node in nodes}
    assert {"While", "RFFT", "MatMul"} <= operators
    assert not [op for op in operators if op.startswith("Xla") or "Py" in op]
    compiled = [f.signature.name for f in graph.library.function if f.attr["_XlaMustCompile"].b] + [
        node.name for node in nodes if node.attr["_XlaMustCompile"].b
    ]
    assert not compiled


def test_steps_by_their_signatures_emit_what_serving_default_emits(exported, tiny_model):
    signatures = tf.saved_model.load(str(exported)).signatures
    segment = next(cut_segments([melody(32_768)], tiny_model.model_config, "full"))
    memory = signatures["encode"](
        samples=tf.constant(segment.samples[None]), num_frames=tf.constant([segment.num_frames])
    )
    step = signatures["decode_step"]
    specs = step.structured_input_signature[1]
    names = tiny_model.empty_cache(1, 1).keys()
    tokens = []
    past = {name: tf.zeros([1, *(n or 0 for n in specs[name].shape[1:])]) for name in names}
    while EOS not in tokens and len(tokens) < MAX_TOKENS:
        found = step(
            tokens=tf.constant([tokens[-1] if tokens else 0]),
            positions=tf.constant([len(tokens)]),
            bias=tf.zeros([1, len(tokens)]),
            **past,
            **memory,
        )
        tokens.append(int(np.argmax(found["logits"])))
        for name in names:
            axis = [i for i, size in enumerate(specs[name].shape) if size is None][1]
            past[name] = tf.concat([past[name], tf.expand_dims(found[name], axis)], axis)
    whole = signatures["serving_default"](audio=tf.constant(melody(32_768)[None]))
    assert tokens == to_lists(whole)[0][0]


@pytest.mark.parametrize("network", ["exported", "exported_detector"])
def test_warm_up_requests_replay(network, request):
    from tensorflow_serving.apis import prediction_log_pb2

    folder = request.getfixturevalue(network)
    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    signatures = tf.saved_model.load(str(folder)).signatures
    replayed = []
    for record in tf.data.TFRecordDataset(str(path)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        warmup = log.predict_log.request
        assert warmup.model_spec.name == folder.parent.name
        inputs = {name: tf.make_ndarray(value) for name, value in warmup.inputs.items()}
        function = signatures[warmup.model_spec.signature_name]
        found = function(**{name: tf.constant(value) for name, value in inputs.items()})
        assert all(np.isfinite(value.numpy()).all() for value in found.values())
        replayed.append(warmup.model_spec.signature_name)
    assert sorted(replayed) == sorted(signatures)


def test_versions_count_up_and_the_config_describes_the_model(tiny_preset, tmp_path):
    command = [f"--model={tiny_preset}", f"--out_dir={tmp_path}", "--context=segment"]
    assert main([*command, "--constrained", "--max_tokens=8"]) == 0
    assert main(command) == 0
    folder = tmp_path / "saved_model"
    assert sorted(path.name for path in (folder / "tiny").iterdir()) == ["1", "2"]
    version = folder / "tiny" / "1"
    assert read_config(version) == read_config(tiny_preset)
    serving = json.loads((version / "config.json").read_text())["serving"]
    assert serving["rules"]["constrained"]
    assert (serving["context"], serving["max_tokens"]) == ("segment", 8)


def test_server_settings_name_every_model_and_keep_what_was_changed(tmp_path):
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    for model in ("b/1", "a/1", "a/12", "a/.13.part", "c"):
        (tmp_path / model).mkdir(parents=True)
        (tmp_path / model / "saved_model.pb").touch()
    (tmp_path / "monitoring.config").write_text("mine")
    write_server_settings(tmp_path)
    text = (tmp_path / "models.config").read_text()
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    listed = [(c.name, c.base_path, c.model_platform) for c in config.model_config_list.config]
    assert listed == [("a", "/models/a", "tensorflow"), ("b", "/models/b", "tensorflow")]
    assert (tmp_path / "monitoring.config").read_text() == "mine"
    assert "max_batch_size" in (tmp_path / "batching_parameters.txt").read_text()


def test_a_failed_export_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving", None)
    with pytest.raises(ValueError, match=r"mt3-keras\[serving\]"):
        export_saved_model(ServedModel(tiny_model), tmp_path / "new", name="tiny")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def detector_preset(detector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets") / "mini"
    save_preset(detector, folder)
    return folder


def test_a_detectors_preset_is_exported_with_its_decoding(detector_preset, tmp_path):
    (detector_preset / "decoding.json").write_text(EAGER.to_json())
    assert main([f"--model={detector_preset}", f"--out_dir={tmp_path}", "--batch_size=3"]) == 0
    version = tmp_path / "saved_model" / "mini" / "1"
    assert read_config(version) == MINI
    assert RollDecoding.read(version) == EAGER
    serving = json.loads((version / "config.json").read_text())["serving"]
    assert (serving["max_tokens"], serving["batch_size"], serving["exact"]) == (None, 3, False)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "--out_dir is needed"),
        (["--model=tiny"], 2, "--out_dir is needed"),
        (["--model=tiny", "--out_dir=x", "--formats=onnx"], 2, "got onnx"),
        (["--model=tiny", "--out_dir=x", "--search=beam1"], 2, "greedily"),
        (["--model=nowhere", "--out_dir=x"], 1, "nowhere: no such model"),
        (["--out_dir=x", "--formats=tflite", "--encoded_audio"], 2, "--encoded_audio is of served"),
        (["--model={preset}", "--out_dir=x", "--name=a/b"], 1, "name must be letters"),
        (["--model={mini}", "--out_dir=x", "--least_confidence=0.5"], 2, "keeps its own"),
        (["--model={mini}", "--out_dir=x", "--max_tokens=8"], 1, "max_tokens is for networks"),
        (["--model={mini}", "--out_dir=x", "--constrained"], 1, "constrained is for networks"),
        (["--model={mini}", "--out_dir=x", "--exact"], 1, "log_floor and exact are for a log-mel"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments, code, complaint, tiny_preset, detector_preset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folders = {"preset": tiny_preset, "mini": detector_preset}
    assert main([argument.format(**folders) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()
