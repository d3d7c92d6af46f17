"""LiteRT in place of Keras: the same notes, plain errors, nothing else loaded."""

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
from mt3_keras.models.config import ISMIR2021, MT3, SMALL, VocabularyConfig
from mt3_keras.note_encoder import tie_tokens
from mt3_keras.segments import AudioSegment, cut_segments
from tests.conftest import ROOT, tones

litert = pytest.importorskip("mt3_keras.engines.litert", reason="needs ai-edge-litert")

# Of a network that learnt nothing these rules make notes.
RULES = Rules(constrained=True)


def segments_of(config, seconds):
    return list(cut_segments([tones(seconds)], config, "full"))


# ---------------------------------------------------------------- grammar

GRAMMARS = {
    "ties": MT3,
    "velocities": dataclasses.replace(SMALL, vocabulary=VocabularyConfig(num_velocity_bins=3)),
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


def test_a_segment_is_not_influenced_by_those_before_it(tiny_bundle):
    model = litert.EdgeModel(tiny_bundle)
    sequence = litert.EdgeSequence(model.model_config, RULES)
    segments = segments_of(model.model_config, 8)
    forward = [sequence.decode(model, segment) for segment in segments]
    backward = [sequence.decode(model, segment) for segment in reversed(segments)]
    assert backward[::-1] == forward
    assert len(set(map(tuple, forward))) > 2
    loud = AudioSegment(0.0, np.full_like(segments[0].samples, 2.0**32), 256)
    sequence.decode(model, loud)
    assert sequence.decode(model, segments[1]) == forward[1]


@pytest.mark.parametrize("num_sequences", [3, 7])
def test_segments_side_by_side_are_those_one_by_one(tiny_bundle, num_sequences):
    config = litert.EdgeModel(tiny_bundle).model_config
    segments = segments_of(config, 15)
    alone = dict(litert.EdgeSearch(tiny_bundle, num_sequences=1).decode(segments))
    drawn = []

    def draw():
        for segment in segments:
            drawn.append(segment)
            yield segment

    found = {}
    search = litert.EdgeSearch(tiny_bundle, num_sequences=num_sequences)
    for index, tokens in search.decode(draw()):
        found[index] = tokens
        assert len(drawn) <= len(found) + 2 * num_sequences
    assert found == alone


def test_a_search_that_is_left_early_can_begin_anew(tiny_bundle):
    search = litert.EdgeSearch(tiny_bundle, num_sequences=2)
    segments = segments_of(search.model_config, 15)
    for _ in search.decode(segments):
        break
    assert len(dict(search.decode(segments))) == len(segments)


def test_a_prefix_opens_the_sequence_and_the_rest_follows_from_it(tiny_bundle):
    model = litert.EdgeModel(tiny_bundle)
    sequence = litert.EdgeSequence(model.model_config, RULES)
    (segment, *_) = segments_of(model.model_config, 1)
    free = sequence.decode(model, segment)
    codec = Grammar(model.model_config, RULES, np).codec
    prefix = tie_tokens([(0, 60), (40, 62), (40, 65)], codec)
    forced = sequence.decode(model, segment, prefix)
    assert forced[: len(prefix)] == prefix
    assert forced != free
    assert sequence.decode(model, segment, forced[:20]) == forced
    assert sequence.decode(model, segment, free[:-1]) == free


@pytest.mark.parametrize("max_tokens", [0, 65])
def test_sequences_are_no_longer_than_the_model_allows(tiny_bundle, max_tokens):
    with pytest.raises(ValueError, match="max_tokens must be 1 to 64"):
        litert.EdgeSearch(tiny_bundle, max_tokens=max_tokens)
    segments = segments_of(litert.EdgeModel(tiny_bundle).model_config, 4)
    found = dict(litert.EdgeSearch(tiny_bundle, max_tokens=5).decode(segments))
    assert all(len(tokens) == 5 or tokens[-1] == EOS for tokens in found.values())


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


def test_engines_that_cannot_be_had_are_named(tiny_preset, tiny_bundle):
    with pytest.raises(ModelError, match=r"tiny: holds no edge bundle; make one with .*tflite"):
        pick_engine(tiny_preset, "litert")
    with pytest.raises(ModelError, match="tiny: is an edge bundle"):
        pick_engine(tiny_bundle, "keras")
    with pytest.raises(ModelError, match="no such model"):
        pick_engine("no_such_model")
    with pytest.raises(ValueError, match="engine must be auto, keras or litert: got 'tpu'"):
        pick_engine(tiny_bundle, "tpu")


def test_transcribing_with_a_bundle_loads_neither_keras_nor_tensorflow(tiny_bundle):
    code = (
        "import sys, numpy, pathlib; from mt3_keras import Transcriber, Note;"
        f"t = Transcriber.from_preset({str(tiny_bundle)!r}, engine='litert');"
        "print(len(t.transcribe(numpy.zeros(40_000, 'float32')).segments));"
        "print([m for m in ('keras', 'tensorflow', 'jax', 'torch') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout.split("\n")[:2] == ["2", "[]"], run.stderr[-2000:]


# ---------------------------------------------------------------- damage


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A bundle to be damaged."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def refusal(folder):
    """What is said of a bundle that cannot be used."""
    with pytest.raises(litert.BundleError) as error:
        litert.EdgeModel(folder)
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


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("network", {"segment_frames": 128}),
        ("network", {"vocabulary_rows": 1664}),
        ("network", {"num_decoder_layers": 2}),
        ("network", {"num_heads": 4}),
        ("spectrogram", {"hop_samples": 256}),
        ("spectrogram", {"window_samples": 4096}),
    ],
)
def test_the_description_of_another_network_is_refused(bundle, part, changes):
    path = bundle / "config.json"
    described = json.loads(path.read_text())
    described["config"][part] |= changes
    path.write_text(json.dumps(described))
    assert "not that of its config.json" in refusal(bundle)
