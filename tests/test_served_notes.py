"""Notes read in a served graph are those that Python reads."""

from __future__ import annotations

import collections
import dataclasses

import keras
import numpy as np
import pytest

from mt3_keras.grammar import Rules
from mt3_keras.models.config import LOWEST_PITCH, NUM_PITCHES
from mt3_keras.notes import Note
from mt3_keras.outputs import RollOutput
from mt3_keras.recording import Recording, make_decoder
from mt3_keras.segments import cut_segments
from tests.conftest import tones
from tests.detectors import EAGER, MINI, build

tf = pytest.importorskip("tensorflow")
if keras.backend.backend() != "tensorflow":
    pytest.skip("graphs are served by TensorFlow", allow_module_level=True)

from export.served_model import ServedDetector  # noqa: E402
from export.served_notes import FIELDS, NoteReading  # noqa: E402

FRAMES = MINI.network.segment_frames
RATE = MINI.spectrogram.frames_per_second
DECODING = dataclasses.replace(EAGER, onset_limit=0.3, unison_limit=0.6, shrink=0.02)


def make_outputs(rng, num_segments, num_onsets=20, num_strokes=12):
    """Crowded outputs: strikes and strokes close together, ends anywhere, doubtful names."""
    outputs = []
    for _ in range(num_segments):
        cells = rng.permutation(FRAMES * 4)[:num_onsets]  # each once, of four pitches
        chances = np.sort(rng.choice([0, 0.2, 0.5, 0.9], num_onsets))[::-1]
        onsets = np.stack(
            [cells // 4, LOWEST_PITCH + 30 + cells % 4, chances, rng.integers(1, 128, num_onsets),
             rng.random(num_onsets)], axis=1
        )  # fmt: skip
        cells = rng.permutation(FRAMES * 5)[:num_strokes]
        keys = np.array([35, 36, 38, 42, 46])[cells % 5]
        chances = np.sort(rng.random(num_strokes))[::-1]
        strokes = np.stack([cells // 5, keys, chances, rng.integers(1, 128, num_strokes)], axis=1)
        programs = rng.dirichlet(np.full(128, 0.02), num_onsets)
        ended = rng.random((FRAMES, NUM_PITCHES)) ** rng.choice([0.3, 8])
        parts = (onsets, programs, strokes, ended)
        outputs.append(RollOutput(*(part.astype(np.float32) for part in parts)))
    return outputs


def read_in_python(outputs, num_frames, rules, decoding):
    decoder = make_decoder(MINI, decoding, rules=rules)
    recording = Recording(decoder, FRAMES, RATE)
    for index, output in enumerate(outputs):
        collections.deque(recording.add(index, output), maxlen=0)
    duration = sum(num_frames) / RATE
    collections.deque(recording.end(duration), maxlen=0)
    return recording.finish(duration)


def check_notes(found, expected):
    """Names of a unison's two notes may be settled by rounding alone; none of these cases is so."""
    rows = zip(*(np.asarray(found[name]).tolist() for name in FIELDS), strict=True)
    notes = [Note(onset, end, *rest) for onset, end, *rest, _ in rows]
    assert [note[2:] for note in notes] == [note[2:] for note in expected.notes]
    np.testing.assert_allclose(
        np.reshape([note[:2] for note in notes], (-1, 2)),
        np.reshape([note[:2] for note in expected.notes], (-1, 2)),
        atol=1e-4,
    )
    chances = [expected.confidences[note] for note in expected.notes]
    np.testing.assert_allclose(found["confidence"], chances, atol=1e-6)


def trace(reading):
    """`read` with open numbers of segments."""
    network = MINI.network
    shapes = {
        "onsets": (tf.float32, [None, 20, 5]),
        "programs": (tf.float32, [None, 20, 128]),
        "strokes": (tf.float32, [None, 12, 4]),
        "ended": (tf.bool, [None, network.segment_frames, NUM_PITCHES]),
        "num_frames": (tf.int32, [None]),
    }
    specs = {name: tf.TensorSpec(shape, dtype) for name, (dtype, shape) in shapes.items()}
    return tf.function(reading.read, [specs], autograph=False)


def to_tensors(outputs, num_frames):
    found = {
        name: tf.constant(np.stack([getattr(output, name) for output in outputs]))
        for name in RollOutput._fields
    }
    ended = found["ended"] >= DECODING.end_limit
    return found | {"ended": ended, "num_frames": tf.constant(num_frames, tf.int32)}


@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(programs=frozenset({0, 33, 40, 41})),
        Rules(programs=frozenset({33}), drums=False),
        Rules(programs=frozenset()),
    ],
)
def test_the_graph_reads_what_python_reads(rules):
    read = trace(NoteReading(MINI, DECODING, rules))
    rng = np.random.default_rng(0)
    total = 0
    for num_segments in [1, 1, 2, 3, 5, 9, 9, 9]:
        outputs = make_outputs(rng, num_segments)
        last = int(rng.integers(1, FRAMES + 1))
        num_frames = [FRAMES] * (num_segments - 1) + [last]
        expected = read_in_python(outputs, num_frames, rules, DECODING)
        check_notes(read(to_tensors(outputs, num_frames)), expected)
        total += len(expected.notes)
    assert total > 100
    silent = [o._replace(onsets=0 * o.onsets, strokes=0 * o.strokes) for o in outputs]
    assert all(tf.size(values) == 0 for values in read(to_tensors(silent, num_frames)).values())


def test_a_served_detector_answers_the_notes_of_whole_recordings():
    model = build()
    served = ServedDetector(model, decoding=EAGER, batch_size=4)
    spec = tf.TensorSpec([None, None], tf.float32)
    transcribe = tf.function(served.transcribe, [spec], autograph=False)
    audio = np.stack([tones(1.5, seed) for seed in range(2)])
    found = transcribe(audio)
    for i, samples in enumerate(audio):
        segments = list(cut_segments([samples], MINI, "full"))
        predicted = model.detect(np.stack([segment.samples for segment in segments]))
        parts = [np.asarray(predicted[name]) for name in RollOutput._fields]
        outputs = [RollOutput(*rows) for rows in zip(*parts, strict=True)]
        num_frames = [segment.num_frames for segment in segments]
        expected = read_in_python(outputs, num_frames, Rules(), EAGER)
        assert len(expected.notes) > 10
        number = int(found["num_notes"][i])
        check_notes({name: found[name][i, :number] for name in FIELDS}, expected)
        assert not any(np.any(found[name][i, number:]) for name in FIELDS)
    none = transcribe(audio[:0])
    assert none["pitch"].shape[0] == none["num_notes"].shape[0] == 0
