"""Streaming: the notes of the whole recording, sooner, however the samples come."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt3_keras import Transcriber
from mt3_keras.codec import EOS, Codec
from mt3_keras.grammar import Rules
from mt3_keras.models.config import (
    LOWEST_PITCH,
    MT3,
    NUM_PITCHES,
    SMALL,
    DetectorConfig,
    LogMelConfig,
)
from mt3_keras.note_decoder import NoteDecoder
from mt3_keras.note_encoder import encode_segments, notes_to_events
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.notes import MIN_DURATION, Note, sort_notes
from mt3_keras.roll_decoder import RollDecoder
from mt3_keras.segments import AudioError
from tests.conftest import make_output, tones
from tests.detectors import EAGER

litert = pytest.importorskip("mt3_keras.engines.litert", reason="needs requirements-edge.txt")
from mt3_keras.streaming import NewNotes, NoteOn, StreamingTranscriber  # noqa: E402

RULES = Rules(constrained=True)  # even an untrained network emits notes under them
SOUND = tones(15)
PITCHES = (LOWEST_PITCH, LOWEST_PITCH + NUM_PITCHES - 1)  # that rolls have columns for
LONG_HOPS = dataclasses.replace(MT3, spectrogram=LogMelConfig(hop_samples=256, window_samples=4096))


def read_start(samples, num_frames, config):
    """Where a segment of `ramp` starts, in seconds; its samples and all after it are checked."""
    lead = config.lead_samples
    place = round(float(samples[lead])) - 1
    following = np.trim_zeros(samples[lead:], "b")
    assert following.size >= (num_frames - 1) * config.spectrogram.hop_samples
    np.testing.assert_array_equal(following, place + 1 + np.arange(following.size))
    return max(place, 0) / 16_000


class PerfectModel:
    """Stands in for an `EdgeModel`: emits exactly the notes that it was made with."""

    num_decoders = 1

    def __init__(self, notes, config=MT3):
        self.model_config = config
        self._codec = Codec(config.vocabulary.num_velocity_bins)
        self._events = notes_to_events(notes, self._codec)
        self.starts = []

    def encode(self, samples, num_frames):
        config = self.model_config
        self.starts.append(read_start(samples, num_frames, config))
        end = self.starts[-1] + config.segment_seconds
        (self._all,) = encode_segments(
            self._events,
            self._codec,
            self.starts[-1:],
            end=end,
            last_step=10**9,
            ties=config.vocabulary.ties,
            granularity=config.vocabulary.granularity,
            to_mix=True,
        )

    def step(self, tokens):
        (token,) = tokens
        tie, _ = self._codec.token_range("tie")
        if token == 0:
            self._tokens = iter(self._all)
        elif token == tie:  # chosen or forced
            self._tokens = iter(self._all[self._all.index(tie) + 1 :])
        logits = np.zeros((1, self.model_config.network.vocabulary_rows), np.float32)
        logits[0, next(self._tokens, EOS)] = 1
        return logits


class PerfectDetector(litert.EdgeDetector):  # type: ignore[name-defined]
    """Stands in for a detector's bundle: finds each segment's part of a recording.

    Args:
      sounds: pitch, first frame and number of frames of each note; pitches from 81 on are struck
        with a drum.
    """

    def __init__(self, sounds, config=SMALL, program=0):
        self.model_config = config
        self._sounds, self._program = sounds, program
        self.starts = []

    def reset(self):
        pass

    def detect(self, samples):
        config = self.model_config
        self.starts.append(read_start(samples, 1, config))
        first = round(self.starts[-1] * config.spectrogram.frames_per_second)
        return self.output(first)

    def output(self, first):
        num_frames = self.model_config.network.segment_frames
        begun = [(p, f - first) for p, f, _ in self._sounds if 0 <= f - first < num_frames]
        onsets = [(frame, pitch, 0.99, self._program) for pitch, frame in begun]
        strokes = [(frame, pitch, 0.99) for pitch, frame in begun if pitch >= 81]
        ends = [(max(0, f - first), max(0, f + n - first), p) for p, f, n in self._sounds]
        return make_output(onsets, strokes, ends, num_frames)


class RepeatingModel(PerfectModel):
    """Emits the same in every segment."""

    def __init__(self, notes, config=MT3):
        super().__init__(notes, config)
        super().encode(ramp(config.segment_seconds), config.network.segment_frames)

    def encode(self, samples, num_frames):
        pass


class RepeatingDetector(PerfectDetector):
    """Predicts the same in every segment."""

    def detect(self, samples):
        return self.output(0)


def ramp(seconds):
    """Samples that count from 1; floats count exactly up to 17 minutes."""
    return np.arange(1, round(16_000 * seconds) + 1).astype(np.float32)


def join(answers, *, renames=False):
    """The notes of all answers; each answer is checked. `renames`: names may get better."""

    def begun(note, program):
        return NoteOn(note.onset, note.pitch, note.velocity, 0 if renames else program)

    notes, sounding = [], set()
    for answer in answers:
        assert list(answer) == sort_notes(answer)
        ended = {begun(n, n.program) for n in answer if not n.is_drum}
        started = {begun(n, n.program) for n in answer.started}
        assert not ended & started
        assert not sounding & started
        sounding = (sounding | started) - ended
        notes += answer
    assert not sounding  # what began has ended
    return sort_notes(notes)


def transcribe(stream, blocks):
    renames = isinstance(stream.model_config, DetectorConfig)
    return join([*(stream.push(block) for block in blocks), stream.flush()], renames=renames)


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return litert.EdgeModel(tiny_bundle)


@pytest.fixture(scope="module")
def detector(detector_bundle):
    return litert.EdgeDetector(detector_bundle)


@pytest.fixture(scope="module")
def stream(model):
    """One for all tests that flush it: so none is influenced by those before it."""
    return StreamingTranscriber(model, rules=RULES)


@pytest.fixture(scope="module")
def offline(tiny_bundle):
    return Transcriber(tiny_bundle, rules=RULES)


# ---------------------------------------------------------------- the notes of the whole


@settings(max_examples=25, deadline=None)
@given(
    num_samples=st.integers(0, 100_000),
    cuts=st.lists(st.integers(0, 100_000), max_size=5),
    context=st.sampled_from(["full", "segment"]),
)
def test_any_blocks_give_the_notes_of_the_whole_recording(
    model, tiny_bundle, num_samples, cuts, context
):
    samples = SOUND[:num_samples]
    blocks = np.split(samples, sorted(min(cut, num_samples) for cut in cuts))  # some are empty
    stream = StreamingTranscriber(model, rules=RULES, context=context)
    offline = Transcriber(tiny_bundle, rules=RULES, context=context)
    assert transcribe(stream, blocks) == offline.transcribe(samples).notes


@settings(max_examples=10, deadline=None)
@given(
    num_samples=st.integers(0, 30_000),
    cuts=st.lists(st.integers(0, 30_000), max_size=5),
    context=st.sampled_from(["full", "segment"]),
)
def test_any_blocks_give_the_notes_of_the_whole_recording_of_a_detector(
    detector, detector_bundle, num_samples, cuts, context
):
    samples = SOUND[:num_samples]
    blocks = np.split(samples, sorted(min(cut, num_samples) for cut in cuts))
    stream = StreamingTranscriber(detector, decoding=EAGER, context=context)
    expected = Transcriber(detector_bundle, context=context).transcribe(samples).notes
    found = transcribe(stream, blocks)  # whose names are those of the piece so far
    nameless, expected_nameless = (
        sort_notes([note._replace(program=0) for note in notes]) for notes in (found, expected)
    )
    assert nameless == expected_nameless
    assert len(expected) > 3 or num_samples < 20_000


def test_single_samples_give_the_notes_of_the_whole_recording(stream, offline):
    samples = SOUND[:70_000]
    expected = offline.transcribe(samples).notes
    assert transcribe(stream, samples[:, None]) == expected
    assert len(expected) > 3


def test_ten_minutes_at_once_give_the_notes_of_small_blocks():
    """Of segment starts that lie on the grid of tokens in decimals but not in floats, too."""
    notes = [
        Note(step / 100, (step + 20) / 100, 60 + step % 7, 127, step % 3, False)
        for step in range(0, 59_900, 128)
    ]
    stream = StreamingTranscriber(PerfectModel(notes))
    flood = stream.push(ramp(600))
    assert len(flood) > 400 and len(flood.started) <= 1
    assert join([flood, stream.flush()]) == notes
    assert transcribe(stream, np.split(ramp(600), 100)) == notes


def test_segments_end_where_the_next_begin_to_the_last_step():
    """Sums of floats would put some ends a step early and drop the notes of that step."""
    codec, model = Codec(1), RepeatingModel([])
    events = notes_to_events([Note(2.05, 2.06, 38, 127, 0, True)], codec)
    (model._all,) = encode_segments(events, codec, [0.0], to_mix=True)
    decoder, num_segments = NoteDecoder(codec), 60
    starts = [i * 256 / 125 for i in range(num_segments + 1)]
    for start, end in itertools.pairwise(starts):
        decoder.feed(start, model._all, end)
    seconds = num_segments * MT3.segment_seconds - 0.1
    assert transcribe(StreamingTranscriber(model), [ramp(seconds)]) == decoder.finish()
    assert 0 < len(decoder.notes) < num_segments


def test_a_second_recording_begins_anew(stream, offline):
    first, second = SOUND[:80_000], SOUND[100_000:]
    expected = [offline.transcribe(samples).notes for samples in (first, second)]
    assert expected[0] != expected[1]
    assert [transcribe(stream, [samples]) for samples in (first, second)] == expected
    stream.push(first)
    stream.reset()
    assert stream.sounding == []
    assert transcribe(stream, [second]) == expected[1]


@pytest.mark.parametrize("kind", ["tokens", "rolls"])
def test_a_stream_of_no_samples_is_one_segment_of_silence(model, detector, kind):
    def make():
        if kind == "tokens":
            return StreamingTranscriber(model, rules=RULES)
        return StreamingTranscriber(detector, decoding=EAGER)

    stream = make()
    first = stream.flush()
    assert first == stream.flush() == make().flush()
    assert isinstance(first, NewNotes) and first.started == []


def test_notes_come_as_soon_as_their_segment_is_complete():
    note = Note(1.0, 3.0, 60, 127, 5, False)
    stream = StreamingTranscriber(PerfectModel([note]))
    needed = MT3.input_samples
    samples = ramp(6)
    before, then = stream.push(samples[: needed - 1]), stream.push(samples[needed - 1 : needed])
    assert (before, before.started) == ([], [])
    assert (then, then.started) == ([], [NoteOn(1.0, 60, 127, 5)])
    assert stream.sounding == then.started
    assert stream.push(samples[needed : 2 * needed]) == [note]
    assert stream.sounding == []


def test_tie_forcing_opens_segments_with_what_sounds():
    """A model that forgets its ties cuts notes at every border, unless they are forced."""

    class Forgetful(PerfectModel):
        def encode(self, samples, num_frames):
            super().encode(samples, num_frames)
            tie, _ = self._codec.token_range("tie")
            self._all = self._all[self._all.index(tie) :]

    notes = [Note(0.5, 7.0, 60, 127, 5, False), Note(1.0, 2.5, 64, 127, 40, False)]
    cut = transcribe(StreamingTranscriber(Forgetful(notes)), [ramp(8)])
    assert sorted(note.offset for note in cut) == pytest.approx([2.04, 2.04])
    forced = StreamingTranscriber(Forgetful(notes), tie_forcing=True)
    assert transcribe(forced, [ramp(8)]) == notes


def test_tie_forcing_changes_no_model_without_ties():
    config = dataclasses.replace(
        MT3, vocabulary=dataclasses.replace(MT3.vocabulary, ties=False, granularity="flat")
    )
    notes = [Note(0.5, 5.0, 60, 127, 0, False), Note(5.0, 6.0, 62, 127, 0, False)]
    stream = StreamingTranscriber(PerfectModel(notes, config), tie_forcing=True)
    assert transcribe(stream, [ramp(8)]) == notes


@st.composite
def music(draw):
    """Notes of some pitches and instruments, and drums, all on the grid, within 6 seconds."""
    notes = []
    lines = st.tuples(st.integers(0, 127), st.integers(0, 127), st.booleans())
    for pitch, program, is_drum in draw(st.sets(lines, max_size=4)):
        step = 0
        for rest, length in draw(
            st.lists(st.tuples(st.integers(0, 300), st.integers(7, 400)), max_size=8)
        ):
            onset, step = step + rest, step + rest + length
            if step >= 600:
                break
            offset = onset / 100 + MIN_DURATION if is_drum else step / 100
            program = 0 if is_drum else program
            notes.append(Note(onset / 100, offset, pitch, 127, program, is_drum))
    return sort_notes(set(notes))


@settings(max_examples=60, deadline=None)
@given(
    notes=music(),
    config=st.sampled_from([MT3, LONG_HOPS]),
    tie_forcing=st.booleans(),
    num_blocks=st.integers(1, 50),
)
def test_notes_that_are_emitted_rightly_are_put_together_again(
    notes, config, tie_forcing, num_blocks
):
    stream = StreamingTranscriber(PerfectModel(notes, config), tie_forcing=tie_forcing)
    blocks = np.array_split(ramp(6.5), num_blocks)
    assert transcribe(stream, blocks) == notes


# ---------------------------------------------------------------- detectors


STEPS = SMALL.for_streams()


def first_started(stream):
    """Seconds of audio after which a note is first reported to have begun."""
    for number, block in enumerate(np.array_split(ramp(6), 600), 1):
        if stream.push(block).started:
            return number / 100
    return np.inf


@settings(max_examples=40, deadline=None)
@given(
    sounds=st.lists(
        st.tuples(st.integers(*PITCHES), st.integers(0, 360), st.integers(8, 200)),
        max_size=12,
    ),
    config=st.sampled_from([SMALL, STEPS]),
    num_blocks=st.integers(1, 50),
)
def test_the_notes_of_a_stream_are_those_of_the_whole_in_small_segments_too(
    sounds, config, num_blocks
):
    rate, length = SMALL.spectrogram.frames_per_second, int(6.3 * 62.5)
    network = dataclasses.replace(SMALL.network, segment_frames=length + 3)
    detector = PerfectDetector(sounds, dataclasses.replace(SMALL, network=network))
    whole = RollDecoder(rate, RollDecoding())
    whole.feed(0.0, detector.output(0), (length + 1) / rate)
    stream = StreamingTranscriber(PerfectDetector(sounds, config))
    found = transcribe(stream, np.array_split(ramp(6.3), num_blocks))

    def rounded(notes):
        return sorted((n.pitch, n.is_drum, round(n.onset, 6), round(n.offset, 6)) for n in notes)

    assert rounded(found) == rounded(whole.finish())


def test_in_small_segments_an_onset_is_told_within_point_four_seconds():
    begun = 140 / SMALL.spectrogram.frames_per_second

    def delay(config):
        stream = StreamingTranscriber(PerfectDetector([(61, 140, 20)], config))
        return first_started(stream) - begun

    assert delay(STEPS) <= 0.4 < delay(SMALL)


def test_options_that_a_network_has_no_use_for_are_refused(tiny_bundle):
    with pytest.raises(ValueError, match="low_latency is for networks that predict rolls"):
        StreamingTranscriber.from_bundle(tiny_bundle, low_latency=True)
    with pytest.raises(ValueError, match="num_instruments is for networks that predict rolls"):
        StreamingTranscriber(PerfectModel([]), num_instruments=2)
    detector = PerfectDetector([])
    with pytest.raises(ValueError, match="are for networks that emit tokens"):
        StreamingTranscriber(detector, tie_forcing=True)
    with pytest.raises(ValueError, match="are for networks that emit tokens"):
        StreamingTranscriber(detector, rules=Rules(constrained=True))


def test_a_detectors_stream_keeps_to_the_rules():
    def parts(rules):
        stream = StreamingTranscriber(PerfectDetector([(84, 20, 40)]), rules=rules)
        return {(n.program, n.is_drum) for n in transcribe(stream, [ramp(1.6)])}

    assert parts(None) == {(0, False), (0, True)}
    assert parts(Rules(programs=frozenset({40}), drums=False)) == {(40, False)}


@pytest.mark.parametrize("low_latency", [False, True])
def test_a_real_bundle_streams_the_same_in_any_blocks(detector_bundle, low_latency):
    stream = StreamingTranscriber.from_bundle(detector_bundle, low_latency=low_latency)
    whole = transcribe(stream, [SOUND])
    assert whole == transcribe(stream, np.array_split(SOUND, 37))
    assert whole


# ---------------------------------------------------------------- bad input, long input


@pytest.mark.parametrize(
    "bad",
    [
        np.array([0, np.nan], np.float32),
        np.array([np.inf]),
        np.zeros(100, np.int16),
        np.zeros((100, 2), np.float32),
        np.float32(0),
        np.array(["a"]),
        [[0.1], [0.2, 0.3]],
    ],
    ids=["nan", "inf", "int16", "stereo", "scalar", "text", "ragged"],
)
def test_a_bad_block_is_refused_and_left_out(stream, offline, bad):
    samples = SOUND[:50_000]
    answers = [stream.push(samples[:40_000])]
    with pytest.raises(ValueError) as error:
        stream.push(bad)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, AudioError) or isinstance(bad, list)
    answers += [stream.push(samples[40_000:]), stream.flush()]
    assert join(answers) == offline.transcribe(samples).notes


def test_blocks_of_any_floats_are_taken(stream, offline):
    samples = (SOUND[:50_000] * 1024).round() / 1024  # halves hold these
    expected = offline.transcribe(samples).notes
    assert transcribe(stream, [samples.astype(np.float64)]) == expected
    assert transcribe(stream, [samples.astype(np.float16)]) == expected
    assert transcribe(stream, [samples.tolist()]) == expected


def test_a_block_may_be_used_again_by_its_owner(stream, offline):
    block, answers = np.empty(1000, np.float32), []
    for i in range(0, 50_000, 1000):
        block[:] = SOUND[i : i + 1000]
        answers.append(stream.push(block))
    assert join([*answers, stream.flush()]) == offline.transcribe(SOUND[:50_000]).notes


@pytest.mark.parametrize("kind", ["tokens", "rolls"])
def test_an_hour_takes_no_more_memory_than_a_minute(kind):
    """A note that never ends, one for each segment, and drums."""
    if kind == "tokens":
        notes = [Note(0.5, 0.9, 60, 127, 5, False), Note(1.5, 99, 62, 127, 40, False)]
        notes += [Note(t, t + MIN_DURATION, 38, 127, 0, True) for t in (0.2, 1.0, 1.7)]
        stream = StreamingTranscriber(RepeatingModel(sort_notes(notes)), rules=Rules())
    else:
        sounds = [(60, 20, 30), (62, 90, 10**6), *((90, frame, 5) for frame in (10, 60, 100))]
        stream = StreamingTranscriber(RepeatingDetector(sounds))
    block, num_notes, sizes = np.zeros(16_000, np.float32), 0, []
    tracemalloc.start()
    try:
        for second in range(3600):
            num_notes += len(stream.push(block))
            if second % 60 == 59:
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert num_notes > 3600
    settled = sizes[9]  # the names of the last notes are remembered
    assert max(sizes[10:]) - settled < 20_000


def test_the_interpreter_keeps_its_size(tiny_bundle):
    """Segments that outgrow the first cache and segments that do not, in turn."""
    psutil = pytest.importorskip("psutil")
    model = litert.EdgeModel(tiny_bundle)
    stream = StreamingTranscriber(model, rules=RULES)
    process, sizes = psutil.Process(), []
    for _ in range(6):
        for _ in range(25):
            stream.push(SOUND[: MT3.segment_samples])
        sizes.append(process.memory_info().rss / 1e6)
    assert max(sizes[2:]) - sizes[1] < 5  # MB
