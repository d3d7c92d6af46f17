"""SavedModel: what is served equals Keras, and is what a server expects."""

from __future__ import annotations

import dataclasses
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
from mt3_keras.engines.keras import Search
from mt3_keras.grammar import Rules
from mt3_keras.models.config import SMALL, ModelConfig
from mt3_keras.models.mt3 import MT3Backbone
from mt3_keras.note_rolls import NUM_PACKED, NUM_SCORES, NoteRolls
from mt3_keras.segments import cut_segments
from mt3_keras.transcriber import Transcriber

tf = pytest.importorskip("tensorflow")
pytest.importorskip("tensorflow_serving", reason="needs requirements-serving.txt")
if keras.backend.backend() != "tensorflow":
    pytest.skip("a SavedModel is written by TensorFlow", allow_module_level=True)

from export import served_model  # noqa: E402
from export.main import main  # noqa: E402
from export.saved_model import export_saved_model, write_server_settings  # noqa: E402
from export.served_model import ServedModel  # noqa: E402

MAX_TOKENS = 24
FREE = Rules()  # a network that learnt nothing always runs away


def melody(num_samples, seed=0):
    """Swelling tones: the sequences that the tiny network writes for them are of many lengths."""
    rng = np.random.default_rng(seed)
    times, place = np.arange(num_samples) / 16_000, np.arange(num_samples) % 32_768
    pitches = rng.permutation([60, 110, 250, 440, 900, 2000, 4000])
    hz = np.resize(pitches.repeat(32_768), num_samples)
    tones = np.sin(2 * np.pi * hz * times) * place / 32_768
    return (tones + 0.01 * rng.normal(size=num_samples)).astype(np.float32)


@functools.cache
def make_search(model, rules, method):
    return Search(model, rules=rules, method=method, max_tokens=MAX_TOKENS, batch_size=3)


@functools.cache
def make_served(model, rules=FREE, **options):
    served = ServedModel(model, rules=rules, max_tokens=MAX_TOKENS, **options)
    audio = tf.TensorSpec([None, None], tf.float32, "audio")
    return tf.function(served.transcribe, input_signature=[audio], autograph=False)


def search(model, samples, context="full", rules=FREE, method="greedy"):
    """Tokens of a recording's segments as the Transcriber finds them."""
    hop_frames = model.model_config.network.hop_frames(method)
    segments = cut_segments([samples], model.model_config, context, hop_frames)
    found = dict(make_search(model, rules, method).decode(segments))
    return [found[i] for i in range(len(found))]


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
def small_model():
    """A minute network with all that `small` has: lead samples, heads, state, pointer."""
    config = dataclasses.replace(
        SMALL,
        network=dataclasses.replace(
            SMALL.network,
            width=16,
            num_heads=2,
            head_width=8,
            mlp_width=32,
            num_encoder_layers=1,
            num_decoder_layers=1,
            segment_frames=32,
            max_tokens=MAX_TOKENS,
            stem_channels=4,
        ),
    )
    keras.utils.set_random_seed(4)
    return MT3Backbone(**config.to_dict())


@pytest.mark.parametrize("context", ["full", "segment"])
@pytest.mark.parametrize("num_samples", [0, 1, 32_767, 32_768, 150_000])
def test_segments_are_cut_and_read_as_the_transcriber_does(tiny_model, context, num_samples):
    samples = melody(num_samples)
    found = make_served(tiny_model, context=context, batch_size=2)(samples[None])
    assert to_lists(found) == [search(tiny_model, samples, context)]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_batches_of_recordings_and_of_segments_change_nothing(tiny_model, batch_size):
    samples = np.stack([melody(150_000, seed) for seed in range(3)])
    expected = [search(tiny_model, row) for row in samples]
    assert len({len(tokens) for recording in expected for tokens in recording}) > 3
    assert to_lists(make_served(tiny_model, batch_size=batch_size)(samples)) == expected


def test_caches_that_grow_change_nothing(tiny_model, monkeypatch):
    monkeypatch.setattr(served_model, "SMALLEST_CACHE", 3)
    samples = melody(150_000)
    found = make_served(tiny_model, batch_size=15)(samples[None])
    assert to_lists(found) == [search(tiny_model, samples)]


@pytest.mark.parametrize("method", ["greedy", "heads"])
@pytest.mark.parametrize("context", ["full", "segment"])
def test_a_network_with_lead_state_and_heads_is_served(small_model, context, method):
    samples = melody(60_000)
    served = make_served(small_model, context=context, method=method, batch_size=4)
    expected = search(small_model, samples, context, method=method)
    assert to_lists(served(samples[None])) == [expected]


def test_the_heads_are_served_in_bytes(small_model):
    samples, config = melody(60_000), small_model.model_config
    segments = list(cut_segments([samples], config, "full", config.network.hop_frames("heads")))
    rules = Rules(programs=frozenset({0, 41}), drums=False)
    found = make_served(small_model, rules=rules, batch_size=2)(samples[None])["note_rolls"]
    assert found.shape == (1, len(segments), 32, NUM_PACKED) and found.dtype == np.uint8
    for segment, packed in zip(segments, np.asarray(found)[0], strict=True):
        inputs = np.array(segment.samples)[None], np.array([segment.num_frames])
        (expected,) = np.asarray(small_model.encode(*inputs)["note_rolls"])
        unpacked = NoteRolls.unpack(packed, 62.5)
        np.testing.assert_allclose(
            unpacked.values[:, :NUM_SCORES], expected[:, :NUM_SCORES], atol=0.501 / 255
        )
        chances = expected[:, NUM_SCORES:].reshape(32, 88, 16)[..., [0, 5]]
        classes = unpacked.roll("class").reshape(32, 88, 16)
        np.testing.assert_array_equal(classes.argmax(-1), chances.argmax(-1) * 5)
        assert (classes.sum(axis=-1) == 1).all()


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
def test_what_is_no_sound_is_refused(tiny_model, bad):
    samples = melody(5000)
    samples[3000] = bad
    with pytest.raises(tf.errors.InvalidArgumentError, match="audio must be finite"):
        make_served(tiny_model, batch_size=16)(samples[None])


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    served = ServedModel(tiny_model, rules=FREE, max_tokens=MAX_TOKENS)
    return export_saved_model(served, folder, name="tiny")


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


def test_the_official_weights_serve_the_originals_tokens(official, shared, tmp_path):
    import soundfile

    arguments = [f"--model={official}", f"--out_dir={tmp_path}", "--exact", "--name=mt3"]
    assert main(arguments) == 0
    clips = {}
    for clip in ("band", "piano"):
        clips[clip] = soundfile.read(shared / "golden" / f"{clip}.flac", dtype="float32")[0]
    three = np.stack([clips["band"], clips["piano"], clips["band"]])
    folder = tmp_path / "saved_model" / "mt3" / "1"
    found = run_alone(folder, tmp_path, one=clips["piano"][None], three=three)
    golden = {
        clip: [s["tokens"] for s in json.loads(path.read_text())["segments"]]
        for clip in clips
        for path in [shared / "golden" / f"{clip}.json"]
    }
    assert found["one"] == [golden["piano"]]
    assert found["three"] == [golden["band"], golden["piano"], golden["band"]]


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
    assert text.count("Method name is: tensorflow/serving/predict") == 3


def test_graphs_hold_nothing_that_servers_lack(exported):
    """No XLA and no Python, which TF Serving cannot run."""
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((exported / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    operators = {node.op for node in nodes}
    assert {"While", "RFFT", "MatMul"} <= operators
    assert not [op for op in operators if op.startswith("Xla") or "Py" in op]
    compiled = [f.signature.name for f in graph.library.function if f.attr["_XlaMustCompile"].b] + [
        node.name for node in nodes if node.attr["_XlaMustCompile"].b
    ]
    assert not compiled


def test_steps_by_their_signatures_write_what_serving_default_writes(exported, tiny_model):
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


def test_warm_up_requests_replay(exported):
    from tensorflow_serving.apis import prediction_log_pb2

    path = exported / "assets.extra" / "tf_serving_warmup_requests"
    signatures = tf.saved_model.load(str(exported)).signatures
    replayed = []
    for record in tf.data.TFRecordDataset(str(path)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        request = log.predict_log.request
        assert request.model_spec.name == "tiny"
        inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        function = signatures[request.model_spec.signature_name]
        found = function(**{name: tf.constant(value) for name, value in inputs.items()})
        assert all(np.isfinite(value.numpy()).all() for value in found.values())
        replayed.append(request.model_spec.signature_name)
    assert sorted(replayed) == ["decode_step", "encode", "serving_default"]


def test_versions_count_up_and_the_config_describes_the_model(tiny_preset, tmp_path):
    command = [f"--model={tiny_preset}", f"--out_dir={tmp_path}", "--context=segment"]
    assert main([*command, "--constrained", "--max_tokens=8"]) == 0
    assert main(command) == 0
    folder = tmp_path / "saved_model"
    assert sorted(path.name for path in (folder / "tiny").iterdir()) == ["1", "2"]
    version = folder / "tiny" / "1"
    assert ModelConfig.from_preset(version) == ModelConfig.from_preset(tiny_preset)
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
        export_saved_model(ServedModel(tiny_model), tmp_path, name="tiny")
    assert not list((tmp_path / "tiny").iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "--out_dir is needed"),
        (["--model=tiny"], 2, "--out_dir is needed"),
        (["--model=tiny", "--out_dir=x", "--formats=onnx"], 2, "got onnx"),
        (["--model=tiny", "--out_dir=x", "--search=beam1"], 2, "greedily"),
        (["--model=nowhere", "--out_dir=x"], 1, "nowhere: no such model"),
        (["--model={preset}", "--out_dir=x", "--name=a/b"], 1, "name must be letters"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments, code, complaint, tiny_preset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(preset=tiny_preset) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()
