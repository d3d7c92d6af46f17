"""Search: batched, cached and compiled equals one token at a time, and keeps to its rules."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from mt3_keras.codec import EOS, Codec
from mt3_keras.engines import keras as engine
from mt3_keras.engines.keras import TokenEngine, brevity_penalty
from mt3_keras.grammar import Grammar, Rules
from mt3_keras.models.config import MT3
from mt3_keras.note_encoder import encode_notes
from mt3_keras.segments import AudioSegment
from tests.test_note_encoder import separate_notes

MAX_TOKENS = 24
CODEC = Codec(1)


@pytest.fixture(scope="module")
def segments():
    rng = np.random.default_rng(5)
    num_samples = MT3.segment_samples + MT3.spectrogram.overhang_samples
    times, swell = np.arange(num_samples) / 16_000, np.linspace(0, 1, num_samples)
    sounds = [
        np.sin(2 * np.pi * hz * times) * swell + 0.01 * rng.normal(size=num_samples)
        for hz in (60, 110, 250, 440, 900, 2000, 4000)
    ]
    return [AudioSegment(2.048 * i, s.astype(np.float32), 256) for i, s in enumerate(sounds)]


def step_by_step(model, segment):
    """Logits of one sequence, a whole forward pass for each token."""
    tokens = [0]
    while True:
        inputs = {
            "samples": segment.samples[None],
            "num_frames": np.array([segment.num_frames], np.int32),
            "decoder_tokens": np.array([tokens], np.int32),
        }
        tokens.append((yield ops.convert_to_numpy(model(inputs))[0, -1]))


def greedy(model, segment):
    tokens: list[int] = []
    steps = step_by_step(model, segment)
    logits = next(steps)
    while len(tokens) < MAX_TOKENS and EOS not in tokens:
        tokens.append(int(logits.argmax()))
        logits = steps.send(tokens[-1])
    return tokens


def beam1(model, segment):
    """T5X's beam search of one beam, written out."""
    live, score, finished, best = [], 0.0, None, -np.inf
    steps = step_by_step(model, segment)
    logits = next(steps)
    while len(live) < MAX_TOKENS:
        log_probabilities = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        first, second = np.argsort(-log_probabilities, kind="stable")[:2]
        if EOS in (first, second):
            ended = (score + log_probabilities[EOS]) / brevity_penalty(len(live) + 1)
            if ended > best:
                best, finished = ended, [*live, EOS]
        token = int(second if first == EOS else first)
        live.append(token)
        score += log_probabilities[token]
        if best > score / brevity_penalty(MAX_TOKENS + 1):
            break
        logits = steps.send(token)
    return finished or live


@pytest.fixture(scope="module")
def expected(tiny_model, segments):
    return {
        "greedy": [greedy(tiny_model, s) for s in segments],
        "beam1": [beam1(tiny_model, s) for s in segments],
    }


def decode(model, segments, **options):
    search = TokenEngine(model, max_tokens=MAX_TOKENS, **options)
    found = dict(search.run(iter(segments)))
    return [found[i].tokens for i in range(len(segments))]


def test_the_sequences_of_these_tests_are_of_many_lengths(expected):
    for sequences in expected.values():
        assert len({len(tokens) for tokens in sequences}) > 2


@pytest.mark.parametrize("method", ["greedy", "beam1"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batched_search_equals_one_token_at_a_time(
    tiny_model, segments, expected, method, batch_size
):
    found = decode(tiny_model, segments, method=method, batch_size=batch_size)
    assert found == expected[method]


def test_a_ring_that_grows_and_shrinks_changes_nothing(tiny_model, segments, expected, monkeypatch):
    monkeypatch.setattr(engine, "SMALLEST_CACHE", 6)
    assert decode(tiny_model, segments, batch_size=2) == expected["greedy"]


def test_a_search_can_be_used_again_and_given_nothing(tiny_model, segments, expected):
    search = TokenEngine(tiny_model, max_tokens=MAX_TOKENS, batch_size=2)
    assert list(search.run([])) == []
    for _ in range(2):
        found = {i: output.tokens for i, output in search.run(segments[:3])}
        assert found == dict(enumerate(expected["greedy"][:3]))


def test_segments_are_drawn_only_as_needed(tiny_model, segments):
    drawn = []

    def watch():
        for segment in segments:
            drawn.append(segment)
            yield segment

    search = TokenEngine(tiny_model, max_tokens=MAX_TOKENS, batch_size=2)
    next(search.run(watch()))
    assert len(drawn) < len(segments)


def test_only_named_instruments_appear(tiny_model, segments):
    rules = Rules(programs=frozenset({33, 40}), drums=False)
    for tokens in decode(tiny_model, segments, rules=rules, batch_size=4):
        events = [CODEC.decode(token) for token in tokens if token != EOS]
        programs = [event.value for event in events if event.type == "program"]
        assert set(programs) <= {33, 40}
        assert not any(event.type == "drum" for event in events)
        if any(event.type == "pitch" for event in events):
            assert next(e.type for e in events if e.type in ("pitch", "program")) == "program"


def assert_legal(tokens):
    """The grammar of a segment, as prose has it and without tensors."""
    time = program = velocity = None
    sounding, struck, last, in_ties = set(), {}, None, True
    for token in tokens:
        if token == EOS:
            assert not in_ties
            assert last in ("tie", "pitch", "drum")
            break
        kind, value = CODEC.decode(token)
        if kind == "shift":
            assert not in_ties
            assert value > (time or 0)
            assert last != "shift"
            time = value
        elif kind == "program":
            assert value != program
            assert not in_ties or program is None or value > program
            program = value
        elif kind == "velocity":
            assert not in_ties
            assert value != velocity
            velocity = value
        elif kind == "tie":
            assert in_ties
            in_ties = False
        elif kind == "drum":
            assert velocity
            assert (time or 0) - struck.get(("drum", value), -9) >= 1
            struck["drum", value] = time or 0
        elif in_ties:
            assert (program, value) not in sounding
            sounding.add((program, value))
        elif velocity == 0:
            assert (program, value) in sounding
            sounding.remove((program, value))
        else:
            assert velocity
            assert program is not None
            assert (time or 0) - struck.get((program, value), -9) >= 1
            struck[program, value] = time or 0
            sounding.add((program, value))
        last = kind


def test_constrained_search_writes_only_what_is_legal(tiny_model, segments):
    free = decode(tiny_model, segments, batch_size=4)
    constrained = decode(tiny_model, segments, rules=Rules(constrained=True), batch_size=4)
    for tokens in constrained:
        assert_legal(tokens)
    assert constrained != free


def check_targets_are_legal(sequences, config=MT3):
    grammar = Grammar(config, Rules(constrained=True), ops)
    state = grammar.start(len(sequences))
    length = max(map(len, sequences))
    padded = np.array([tokens + [EOS] * (length - len(tokens)) for tokens in sequences], np.int32)
    for place in range(length):
        legal = ops.convert_to_numpy(grammar.legal_tokens(state))
        for row, tokens in enumerate(sequences):
            if place < len(tokens):
                assert legal[row, tokens[place]], (row, place, CODEC.decode(tokens[place]))
        state = grammar.advance(state, padded[:, place])


@settings(max_examples=10, deadline=None)
@given(separate_notes())
def test_constraints_never_forbid_a_target(notes):
    num_frames = int(max([n.offset for n in notes], default=0.0) * 125) + 2
    segments = encode_notes(notes, CODEC, num_frames=num_frames)
    for tokens in segments:
        assert_legal(tokens)
    check_targets_are_legal(segments)


@pytest.mark.parametrize("piece", ["band", "piano", "quartet"])
def test_constraints_hardly_ever_forbid_a_target_of_real_music(shared, piece):
    golden = json.loads((shared / "golden" / f"enc_{piece}.json").read_text())
    check_targets_are_legal(golden["encodings"][0]["segments"])


def test_a_segment_that_gets_nowhere_is_stopped(tiny_model, segments, monkeypatch):
    monkeypatch.setattr("mt3_keras.grammar.MAX_TOKENS_WITHOUT_PROGRESS", 5)
    stopped = decode(tiny_model, segments, rules=Rules(stop_runaways=True), batch_size=3)
    free = decode(tiny_model, segments, batch_size=3)
    assert all(tokens[-1] == EOS for tokens in stopped if len(tokens) < MAX_TOKENS)
    for short, long in zip(stopped, free, strict=True):
        assert short[:-1] == long[: len(short) - 1]
    assert sum(map(len, stopped)) < sum(map(len, free))


@pytest.mark.parametrize(
    "options", [{"method": "sampling"}, {"batch_size": 0}, {"max_tokens": 0}, {"max_tokens": 9999}]
)
def test_impossible_options_are_refused(tiny_model, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TokenEngine(tiny_model, **options)


def test_rules_without_programs_still_allow_drums():
    grammar = Grammar(MT3, Rules(programs=frozenset(), drums=True), ops)
    legal = ops.convert_to_numpy(grammar.legal_tokens(grammar.start(1)))[0]
    for name, allowed in (("program", False), ("pitch", False), ("drum", True), ("shift", True)):
        first, last = CODEC.token_range(name)
        assert set(legal[first : last + 1]) == {allowed}


@given(st.lists(st.integers(3, 1390), min_size=1, max_size=12))
@settings(max_examples=15, deadline=None)
def test_the_grammar_follows_what_the_decoder_reads(tokens):
    """Time, program, velocity and section as `NoteDecoder` keeps them."""
    grammar = Grammar(MT3, Rules(), ops)
    state, steps, previous = grammar.start(1), 0, None
    time = program = velocity = section = None
    for token in tokens:
        state = grammar.advance(state, np.array([token], np.int32))
        kind, value = CODEC.decode(token)
        if kind == "shift":
            steps = steps + value if previous == "shift" else value
            time = steps
        program = value if kind == "program" else program
        velocity = value if kind == "velocity" else velocity
        section = 1 if kind == "tie" else section
        previous = kind
    found = {name: int(ops.convert_to_numpy(state[name])[0]) for name in state}
    assert found["time"] == (time or 0)
    assert found["program"] == (-1 if program is None else program)
    assert found["velocity"] == (-1 if velocity is None else velocity)
    assert found["section"] == (section or 0)
