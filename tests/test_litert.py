"""LiteRT in place of Keras: the same notes, plain errors, no other framework loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from mt3_keras import Transcriber
from mt3_keras.codec import EOS
from mt3_keras.grammar import KINDS, Grammar, Rules
from mt3_keras.models import catalog
from mt3_keras.models.catalog import ModelError, pick_engine
from mt3_keras.models.config import ISMIR2021, MT3, VocabularyConfig
from mt3_keras.note_encoder import tie_tokens
from mt3_keras.segments import AudioSegment, cut_segments
from tests.conftest import ROOT, tones

litert = pytest.importorskip("mt3_keras.engines.litert", reason="needs ai-edge-litert")

RULES = Rules(constrained=True)  # even an untrained network emits notes under them


def segments_of(config, seconds):
    return list(cut_segments([tones(seconds)], config, "full"))


# ---------------------------------------------------------------- grammar

GRAMMARS = {
    "ties": MT3,
    "velocities": dataclasses.replace(
        MT3, vocabulary=VocabularyConfig(num_velocity_bins=3, granularity="midi_class")
    ),
    "flat": ISMIR2021,
}
LIMITS = [{}, {"programs": frozenset({0, 24, 40})}, {"drums": False}]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    config=st.sampled_from(list(GRAMMARS)),
    limits=st.sampled_from(LIMITS),
    constrained=st.booleans(),
    stop_runaways=st.booleans(),
)
def test_numpy_follows_the_rules_as_keras_does(seed, config, limits, constrained, stop_runaways):
    rules = Rules(constrained=constrained, stop_runaways=stop_runaways, **limits)
    here, there = (Grammar(GRAMMARS[config], rules, xp) for xp in (np, ops))
    rng = np.random.default_rng(seed)
    state, expected = here.start(2), there.start(2)
    for _ in range(16):
        logits = rng.normal(size=(2, GRAMMARS[config].network.vocabulary_rows)).astype(np.float32)
        for ours, theirs in zip(
            here.choose(state, logits)[::2], there.choose(expected, logits)[::2], strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)  # tokens, and which sequences end
        legal = here.legal_tokens(state)
        np.testing.assert_array_equal(legal, there.legal_tokens(expected))
        tokens = np.array([pick_token(here.codec, row, rng) for row in legal], np.int32)
        state, expected = here.advance(state, tokens), there.advance(expected, tokens)
        assert set(state) == set(expected)
        for name in state:
            np.testing.assert_array_equal(state[name], expected[name], err_msg=name)
        if stop_runaways:
            np.testing.assert_array_equal(here.runs_away(state), there.runs_away(expected))


def pick_token(codec, legal, rng):
    """A legal token, all kinds alike."""
    spans = [codec.token_range(kind) for kind in KINDS]
    choices = [np.flatnonzero(legal[first : last + 1]) + first for first, last in spans]
    choices = [tokens for tokens in choices if tokens.size] or [np.array([EOS])]
    return rng.choice(choices[rng.integers(len(choices))])


# ---------------------------------------------------------------- decoding


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return litert.EdgeModel(tiny_bundle)


def search(model, segment, prefix=()):
    config = model.model_config
    grammar = Grammar(config, RULES, np)
    return litert.search_one(model, grammar, config.network.max_tokens, segment, [prefix]).tokens


def test_a_segment_is_not_influenced_by_those_before_it(model):
    segments = segments_of(model.model_config, 8)
    forward = [search(model, segment) for segment in segments]
    backward = [search(model, segment) for segment in reversed(segments)]
    assert backward[::-1] == forward
    assert len(set(map(tuple, forward))) > 2
    loud = AudioSegment(0.0, np.full_like(segments[0].samples, 2.0**32), 256)
    search(model, loud)
    assert search(model, segments[1]) == forward[1]


@pytest.mark.parametrize("num_segments", [3, 7])
def test_segments_side_by_side_are_those_one_by_one(tiny_bundle, num_segments):
    segments = segments_of(litert.read_bundle_config(tiny_bundle), 15)
    alone = dict(litert.TokenEngine(tiny_bundle, num_segments=1).run(segments))
    engine = litert.TokenEngine(tiny_bundle, num_segments=num_segments)
    assert run_and_count(engine, segments, 2 * num_segments) == alone


@pytest.mark.parametrize("num_workers", [2, 3])
def test_segments_on_several_cores_are_those_on_one(detector_bundle, num_workers):
    segments = segments_of(litert.read_bundle_config(detector_bundle), 3)
    alone = dict(litert.RollEngine(detector_bundle, num_workers=1).run(segments))
    engine = litert.RollEngine(detector_bundle, num_workers=num_workers)
    found = run_and_count(engine, segments, 2 * num_workers)
    assert sorted(found) == sorted(alone) == list(range(len(segments)))
    for index, output in found.items():
        for one, other in zip(output, alone[index], strict=True):
            np.testing.assert_array_equal(one, other)


def run_and_count(engine, segments, num_ahead):
    """The outputs by index; no more than `num_ahead` segments are drawn ahead of them."""
    drawn, found = [], {}

    def draw():
        for segment in segments:
            drawn.append(segment)
            yield segment

    for index, output in engine.run(draw()):
        found[index] = output
        assert len(drawn) <= len(found) + num_ahead
    return found


def test_an_engine_that_is_left_early_can_begin_anew(tiny_bundle, detector_bundle):
    for engine in (
        litert.TokenEngine(tiny_bundle, num_segments=2),
        litert.RollEngine(detector_bundle, num_workers=2),
    ):
        segments = segments_of(engine.model_config, 5)
        for _ in engine.run(segments):
            break
        assert len(dict(engine.run(segments))) == len(segments)


def test_a_prefix_opens_the_sequence_and_the_rest_follows_from_it(model):
    (segment, *_) = segments_of(model.model_config, 1)
    free = search(model, segment)
    codec = Grammar(model.model_config, RULES, np).codec
    prefix = tie_tokens([(0, 60), (40, 62), (40, 65)], codec)
    forced = search(model, segment, prefix)
    assert forced[: len(prefix)] == prefix
    assert forced != free
    assert search(model, segment, forced[:20]) == forced
    assert search(model, segment, free[:-1]) == free


@pytest.mark.parametrize("max_tokens", [0, 65])
def test_sequences_are_no_longer_than_the_model_allows(tiny_bundle, max_tokens):
    with pytest.raises(ValueError, match="max_tokens must be 1 to 64"):
        litert.TokenEngine(tiny_bundle, max_tokens=max_tokens)
    segments = segments_of(litert.read_bundle_config(tiny_bundle), 4)
    found = dict(litert.TokenEngine(tiny_bundle, max_tokens=5).run(segments))
    assert all(len(tokens) == 5 or tokens[-1] == EOS for (tokens,) in found.values())


# ---------------------------------------------------------------- engines


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(catalog, "ACCELERATORS", ())


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(catalog, "ACCELERATORS", ("null",))


@pytest.fixture(scope="module")
def both(tiny_preset, tiny_bundle, tmp_path_factory):
    """A preset with a bundle in its folder, as the shipped models are."""
    folder = shutil.copytree(tiny_preset, tmp_path_factory.mktemp("both") / "both")
    shutil.copy(tiny_bundle / "model.tflite", folder)
    return folder


def test_both_engines_give_the_same_notes(both):
    results = [
        Transcriber.from_preset(both, engine=engine, rules=RULES).transcribe(tones(9))
        for engine in ("keras", "litert")
    ]
    assert results[0].notes
    assert results[0] == results[1]


def test_litert_runs_what_has_a_bundle_and_keras_the_rest(
    tiny_preset, tiny_bundle, both, no_accelerator
):
    assert pick_engine(tiny_bundle) == pick_engine(both) == "litert"
    assert pick_engine(tiny_preset) == pick_engine(both, "keras") == "keras"
    assert pick_engine(both, needs_keras=True) == "keras"


def test_an_accelerator_is_used_where_there_are_weights_for_it(
    tiny_preset, tiny_bundle, both, accelerator
):
    assert pick_engine(tiny_preset) == pick_engine(both) == "keras"
    assert pick_engine(tiny_bundle) == pick_engine(both, "litert") == "litert"


@pytest.mark.parametrize("options", [{"exact": True}, {"method": "beam1"}, {"log_floor": "clamp"}])
def test_what_only_keras_can_do_takes_keras(tiny_bundle, both, options):
    assert hasattr(Transcriber.from_preset(both, **options).model, "encode")
    with pytest.raises(ModelError, match=r"greedy.*use engine keras"):
        Transcriber.from_preset(both, engine="litert", **options)
    with pytest.raises(ModelError, match="is an edge bundle; Keras needs the model"):
        Transcriber.from_preset(tiny_bundle, **options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"method": "greedy"}, "method is for networks that emit tokens"),
        ({"max_tokens": 20}, "max_tokens is for networks that emit tokens"),
        ({"rules": RULES}, "constrained is for networks that emit tokens"),
    ],
)
def test_options_of_tokens_are_refused_for_a_detector(detector_bundle, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Transcriber(detector_bundle, **options)


def test_options_of_rolls_are_refused_for_a_network_with_tokens(tiny_bundle):
    with pytest.raises(ValueError, match="least_confidence is for networks that predict rolls"):
        Transcriber(tiny_bundle, least_confidence=0.5)


def test_a_detectors_bundle_is_decoded_as_its_folder_says(detector_bundle, tmp_path):
    folder = shutil.copytree(detector_bundle, tmp_path / "bundle")
    result = Transcriber(folder).transcribe(tones(2))
    assert result.notes and set(result.confidences) == set(result.notes)
    assert [tokens for _, tokens in result.segments] == [[]] * len(result.segments)
    strict = '{"onset_limit": {"value": 1.0}, "stroke_limit": {"value": 1.0}}'
    (folder / "decoding.json").write_text(strict)
    fewer = Transcriber(folder).transcribe(tones(2)).notes
    assert len(fewer) < len(result.notes)
    (folder / "decoding.json").write_text('{"onset_limit": {"value": 2}}')
    with pytest.raises(ValueError, match=r"decoding\.json: cannot be used \(onset_limit must be"):
        Transcriber(folder)


def test_engines_that_cannot_be_had_are_named(tiny_preset, tiny_bundle):
    with pytest.raises(ModelError, match=r"tiny: holds no edge bundle; make one with .*tflite"):
        pick_engine(tiny_preset, "litert")
    with pytest.raises(ModelError, match="tiny: is an edge bundle"):
        pick_engine(tiny_bundle, "keras")
    with pytest.raises(ModelError, match="no such model"):
        pick_engine("no_such_model")
    with pytest.raises(ValueError, match="engine must be auto, keras or litert: got 'tpu'"):
        pick_engine(tiny_bundle, "tpu")


def test_transcribing_with_a_bundle_loads_neither_keras_nor_tensorflow(
    tiny_bundle, detector_bundle
):
    code = (
        "import sys, numpy, pathlib; from mt3_keras import Transcriber, Note\n"
        f"for folder in ({str(tiny_bundle)!r}, {str(detector_bundle)!r}):\n"
        "    t = Transcriber.from_preset(folder, engine='litert')\n"
        "    print(len(t.transcribe(numpy.zeros(40_000, 'float32')).segments))\n"
        "print([m for m in ('keras', 'tensorflow', 'jax', 'torch') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout.split("\n")[:3] == ["2", "10", "[]"], run.stderr[-2000:]


# ---------------------------------------------------------------- damage


@pytest.fixture(params=["tokens", "rolls"])
def bundle(request, tiny_bundle, detector_bundle, tmp_path):
    """A bundle to be damaged, without the checksums that would tell first."""
    whole = {"tokens": tiny_bundle, "rolls": detector_bundle}[request.param]
    without = shutil.ignore_patterns("SHA256SUMS")
    return shutil.copytree(whole, tmp_path / request.param, ignore=without)


def refusal(folder):
    """The complaint about a bundle that cannot be used."""
    opens = litert.EdgeDetector if folder.name == "rolls" else litert.EdgeModel
    with pytest.raises(litert.BundleError) as error:
        opens(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path, tiny_preset):
    for folder in (tmp_path, tmp_path / "nowhere", tiny_preset):
        assert "model.tflite: is missing" in refusal(folder)


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", '{"config": {"network": 3}}', "\xff"])
def test_a_bundle_without_its_description_is_refused(bundle, text):
    (bundle / "config.json").unlink()
    if text is not None:
        (bundle / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(bundle)


@pytest.mark.parametrize("part", [0.0, 1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999])
def test_a_network_cut_short_is_refused(bundle, part):
    content = (bundle / "model.tflite").read_bytes()
    (bundle / "model.tflite").write_bytes(content[: int(part * len(content))])
    assert "model.tflite: is no network" in refusal(bundle)


def test_another_kind_of_file_is_refused(bundle):
    for content in (b"PK\x03\x04" + bytes(1000), b"hello", bytes(5000)):
        (bundle / "model.tflite").write_bytes(content)
        assert "model.tflite: is no network" in refusal(bundle)


CHANGES = {
    "tokens": [
        ("network", {"segment_frames": 128}),
        ("network", {"vocabulary_rows": 1664}),
        ("network", {"num_decoder_layers": 2}),
        ("network", {"num_heads": 4}),
        ("spectrogram", {"hop_samples": 256}),
        ("spectrogram", {"window_samples": 4096}),
    ],
    "rolls": [
        ("network", {"segment_frames": 32}),
        ("spectrogram", {"hop_samples": 128}),
        ("spectrogram", {"window_samples": 8192}),
    ],
}


@pytest.mark.parametrize(
    ("bundle", "part", "changes"),
    [(kind, *change) for kind, changes in CHANGES.items() for change in changes],
    indirect=["bundle"],
)
def test_the_description_of_another_network_is_refused(bundle, part, changes):
    path = bundle / "config.json"
    described = json.loads(path.read_text())
    described["config"][part] |= changes
    path.write_text(json.dumps(described))
    assert "not that of its config.json" in refusal(bundle)


def test_the_description_of_another_kind_of_network_is_refused(
    bundle, tiny_bundle, detector_bundle
):
    other = tiny_bundle if bundle.name == "rolls" else detector_bundle
    shutil.copy(other / "model.tflite", bundle)
    assert "not that of its config.json" in refusal(bundle)
