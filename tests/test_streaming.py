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
from mt3_keras.models.config import LOWEST_PITCH, MT3, NUM_PITCHES, SMALL, SpectrogramConfig
from mt3_keras.note_decoder import MIN_DURATION, NoteDecoder
from mt3_keras.note_encoder import encode_segments, notes_to_events
from mt3_keras.note_rolls import CONTEXT_FRAMES, NUM_COLUMNS, NoteRolls, SegmentTokens
from mt3_keras.notes import Note, sort_notes
from mt3_keras.segments import AudioError
from tests.conftest import make_rolls, tones

litert = pytest.importorskip("mt3_keras.engines.litert", reason="needs requirements-edge.txt")
from export.streaming import Heard, NoteOn, StreamingTranscriber  # noqa: E402

RULES = Rules(constrained=True)  # of a network that learnt nothing they make notes
SOUND = tones(15)
PITCHES = (LOWEST_PITCH, LOWEST_PITCH + NUM_PITCHES - 1)  # that heads have columns for
HARMONIC = dataclasses.replace(
    MT3, spectrogram=SpectrogramConfig(front_end="harmonic", hop_samples=256, window_samples=4096)
)


class Listener:
    """Stands in for an `EdgeModel`: hears just the notes that it is told of.

    Where a segment begins it reads off the samples, which are to be those of `ramp`.
    """

    uses_state = False
    rolls = None

    def __init__(self, notes, config=MT3):
        self.model_config = config
        self._codec = Codec(config.vocabulary.num_velocity_bins)
        self._events = notes_to_events(notes, self._codec)
        self.starts = []

    def encode(self, samples, num_frames):
        config = self.model_config
        lead = config.spectrogram.lead_samples
        place = round(float(samples[lead])) - 1
        # The samples around a segment are heard too.
        following = np.trim_zeros(samples[lead:], "b")
        assert following.size >= (num_frames - 1) * config.spectrogram.hop_samples
        np.testing.assert_array_equal(following, place + 1 + np.arange(following.size))
        self.starts.append(max(place, 0) / 16_000)
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

    def step(self, token, state):
        tie, _ = self._codec.token_range("tie")
        if token == 0:
            self._tokens = iter(self._all)
        elif token == tie:  # whoever wrote it
            self._tokens = iter(self._all[self._all.index(tie) + 1 :])
        logits = np.zeros(self.model_config.network.vocabulary_rows, np.float32)
        logits[next(self._tokens, EOS)] = 1
        return logits


class HeadListener(Listener):
    """Stands in for a network with heads: they hear their part of the whole recording's rolls."""

    def __init__(self, whole):
        super().__init__([], SMALL)
        self._whole = whole

    def encode(self, samples, num_frames):
        super().encode(samples, num_frames)
        rate = self._whole.frames_per_second
        values = np.zeros((self.model_config.network.segment_frames, NUM_COLUMNS), np.float32)
        part = self._whole.since(round(self.starts[-1] * rate)).values[: len(values)]
        values[: len(part)] = part
        self.rolls = NoteRolls(values, rate)


class Repeater(Listener):
    """Hears the same in every segment, at once."""

    def __init__(self, notes, config=MT3):
        super().__init__(notes, config)
        super().encode(ramp(config.segment_seconds), config.network.segment_frames)

    def encode(self, samples, num_frames):
        pass


def ramp(seconds):
    """Samples that count from 1; floats count exactly up to 17 minutes."""
    return np.arange(1, round(16_000 * seconds) + 1).astype(np.float32)


def join(answers):
    """The notes of all answers, each of which is checked."""
    notes, sounding = [], set()
    for answer in answers:
        assert list(answer) == sort_notes(answer)
        ended = {NoteOn(n.onset, n.pitch, n.velocity, n.program) for n in answer if not n.is_drum}
        assert not ended & set(answer.started)
        assert not sounding & set(answer.started)
        sounding = (sounding | set(answer.started)) - ended
        notes += answer
    assert not sounding  # what began has ended
    return sort_notes(notes)


def hear(stream, blocks):
    return join([*(stream.push(block) for block in blocks), stream.flush()])


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return litert.EdgeModel(tiny_bundle)


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
    assert hear(stream, blocks) == offline.transcribe(samples).notes


def test_single_samples_give_the_notes_of_the_whole_recording(stream, offline):
    samples = SOUND[:70_000]
    expected = offline.transcribe(samples).notes
    assert hear(stream, samples[:, None]) == expected
    assert len(expected) > 3


def test_ten_minutes_at_once_give_the_notes_of_small_blocks():
    """Of segment starts that lie on the grid of tokens in decimals but not in floats, too."""
    notes = [
        Note(step / 100, (step + 20) / 100, 60 + step % 7, 127, step % 3, False)
        for step in range(0, 59_900, 128)
    ]
    stream = StreamingTranscriber(Listener(notes))
    flood = stream.push(ramp(600))
    assert len(flood) > 400 and len(flood.started) <= 1
    assert join([flood, stream.flush()]) == notes
    assert hear(stream, np.split(ramp(600), 100)) == notes


def test_segments_end_where_the_next_begin_to_the_last_step():
    """Sums of floats would put some ends a step early and drop what is said of it."""
    codec, listener = Codec(1), Repeater([])
    events = notes_to_events([Note(2.05, 2.06, 38, 127, 0, True)], codec)
    (listener._all,) = encode_segments(events, codec, [0.0], to_mix=True)
    decoder, num_segments = NoteDecoder(codec), 60
    starts = [i * 256 / 125 for i in range(num_segments + 1)]
    for start, end in itertools.pairwise(starts):
        decoder.feed(start, listener._all, end)
    seconds = num_segments * MT3.segment_seconds - 0.1
    assert hear(StreamingTranscriber(listener), [ramp(seconds)]) == decoder.finish()
    assert 0 < len(decoder.notes) < num_segments


def test_a_second_recording_begins_anew(stream, offline):
    first, second = SOUND[:80_000], SOUND[100_000:]
    expected = [offline.transcribe(samples).notes for samples in (first, second)]
    assert expected[0] != expected[1]
    assert [hear(stream, [samples]) for samples in (first, second)] == expected
    stream.push(first)
    stream.reset()
    assert stream.sounding == []
    assert hear(stream, [second]) == expected[1]


@pytest.mark.parametrize("hop", [None, 1.0])
def test_nothing_heard_is_one_segment_of_silence(model, hop):
    stream = StreamingTranscriber(model, rules=RULES, hop=hop)
    first = stream.flush()
    assert first == stream.flush() == StreamingTranscriber(model, rules=RULES, hop=hop).flush()
    assert isinstance(first, Heard) and first.started == []


def test_notes_come_as_soon_as_their_segment_is_heard():
    note = Note(1.0, 3.0, 60, 127, 5, False)
    stream = StreamingTranscriber(Listener([note]))
    needed = MT3.input_samples
    samples = ramp(6)
    before, then = stream.push(samples[: needed - 1]), stream.push(samples[needed - 1 : needed])
    assert (before, before.started) == ([], [])
    assert (then, then.started) == ([], [NoteOn(1.0, 60, 127, 5)])
    assert stream.sounding == then.started
    assert stream.push(samples[needed : 2 * needed]) == [note]
    assert stream.sounding == []


def test_tie_forcing_opens_segments_with_what_sounds():
    """A model that forgets its ties cuts notes at every border, unless they are written for it."""

    class Forgetful(Listener):
        def encode(self, samples, num_frames):
            super().encode(samples, num_frames)
            tie, _ = self._codec.token_range("tie")
            self._all = self._all[self._all.index(tie) :]

    notes = [Note(0.5, 7.0, 60, 127, 5, False), Note(1.0, 2.5, 64, 127, 40, False)]
    cut = hear(StreamingTranscriber(Forgetful(notes)), [ramp(8)])
    assert sorted(note.offset for note in cut) == pytest.approx([2.04, 2.04])
    forced = StreamingTranscriber(Forgetful(notes), tie_forcing=True)
    assert hear(forced, [ramp(8)]) == notes


def test_tie_forcing_changes_no_model_without_ties():
    config = dataclasses.replace(
        MT3, vocabulary=dataclasses.replace(MT3.vocabulary, ties=False, granularity="flat")
    )
    notes = [Note(0.5, 5.0, 60, 127, 0, False), Note(5.0, 6.0, 62, 127, 0, False)]
    stream = StreamingTranscriber(Listener(notes, config), tie_forcing=True)
    assert hear(stream, [ramp(8)]) == notes


# ---------------------------------------------------------------- overlapping segments


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
    hop=st.sampled_from([None, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0]),
    config=st.sampled_from([MT3, HARMONIC]),
    tie_forcing=st.booleans(),
    num_blocks=st.integers(1, 50),
)
def test_notes_that_are_heard_rightly_are_joined_to_what_they_are(
    notes, hop, config, tie_forcing, num_blocks
):
    stream = StreamingTranscriber(Listener(notes, config), hop=hop, tie_forcing=tie_forcing)
    blocks = np.array_split(ramp(6.5), num_blocks)
    assert hear(stream, blocks) == notes


@pytest.mark.parametrize("hop", [0.5, 1.0, 1.5])
def test_segments_begin_a_hop_apart(hop):
    listener = Listener([])
    stream = StreamingTranscriber(listener, hop=hop)
    hear(stream, [ramp(7)])
    assert stream.hop == pytest.approx(hop, abs=0.0041)
    assert np.diff(listener.starts) == pytest.approx(stream.hop)
    assert listener.starts[-1] + MT3.segment_seconds >= 7


def first_told(stream):
    """Seconds of sound after which it tells that a note has begun."""
    for number, block in enumerate(np.array_split(ramp(6), 60), 1):
        if stream.push(block).started:
            return number / 10
    return np.inf


@pytest.mark.parametrize("hop", [0.25, 0.5])
def test_a_shorter_hop_tells_notes_sooner(hop):
    """An onset is certain at the end of the second segment that holds it, if not before."""
    note = Note(2.1, 5.0, 60, 127, 5, False)

    def told(hop):
        return first_told(StreamingTranscriber(Listener([note]), hop=hop))

    overhang = MT3.spectrogram.overhang_samples / 16_000
    assert told(hop) <= note.onset + 2 * hop + overhang + 0.1
    assert told(None) == pytest.approx(2 * MT3.segment_seconds + overhang, abs=0.1)


def roll_out(sounds, seconds):
    """Rolls of pitches that begin at a frame and sound for a number of frames, and drums.

    These are of kinds that do not mind each other: which of two cymbals it is hangs on what else is
    heard, which is more the longer the segments.
    """
    cells = []
    for pitch, first, length in sounds:
        cells += [("onset", first, pitch, 0.99)]
        cells += [("frame", slice(first, first + length), pitch, 0.99)]
        if pitch >= 81:
            cells += [("drum", first + 3, pitch, 0.99)]
    rate = SMALL.spectrogram.frames_per_second
    return make_rolls(*cells, num_frames=round(seconds * rate), frames_per_second=rate)


@settings(max_examples=40, deadline=None)
@given(
    sounds=st.lists(
        st.tuples(st.integers(*PITCHES), st.integers(0, 360), st.integers(8, 200)),
        max_size=12,
    ),
    hop=st.sampled_from([None, 0.016, 0.1, 0.25, 0.5, 1.0, 1.024, 1.5, 2.0, 2.048]),
    num_blocks=st.integers(1, 50),
)
def test_what_heads_hear_is_told_once_whatever_the_hop(sounds, hop, num_blocks):
    rolls = roll_out(sounds, 6.3)
    whole, tokens = NoteDecoder.for_model(SMALL), SegmentTokens([EOS])
    tokens.rolls = rolls
    whole.feed(0.0, tokens)
    stream = StreamingTranscriber(HeadListener(rolls), hop=hop)
    found = hear(stream, np.array_split(ramp(6.3), num_blocks))

    def rounded(notes):  # times count from where a segment's first step is
        return sorted((n.pitch, n.is_drum, n.onset, n.offset) for n in notes)

    expected = rounded(whole.finish())
    assert len(found) == len(expected)
    for got, known in zip(rounded(found), expected, strict=True):
        assert got[:2] == known[:2]
        assert got[2:] == pytest.approx(known[2:], abs=0.0101)


@pytest.mark.parametrize("hop", [0.1, 0.25, 0.5])
def test_what_heads_hear_is_told_a_hop_later(hop):
    """Segments end a hop apart; of each the last hop, or what the heads look ahead, is left."""
    note = (61, 140, 20)  # 2.24 s

    def told(hop):
        return first_told(StreamingTranscriber(HeadListener(roll_out([note], 6.3)), hop=hop))

    rate = SMALL.spectrogram.frames_per_second
    latest = hop + max(hop, CONTEXT_FRAMES / rate) + SMALL.spectrogram.overhang_samples / 16_000
    assert told(hop) <= note[1] / rate + latest + 0.1 < told(None)


def test_what_only_one_of_many_segments_hears_is_dropped():
    class Sees(Listener):
        def encode(self, samples, num_frames):
            super().encode(samples, num_frames)
            if len(self.starts) != 3:  # [0.992, 3.04) alone hears something
                self._all = [tie]

    tie, _ = Codec(1).token_range("tie")
    note = Note(2.7, 2.9, 99, 127, 0, False)
    stream = StreamingTranscriber(Sees([note]), hop=0.5)
    assert hear(stream, [ramp(8)]) == []


@pytest.mark.parametrize("error", [-0.02, 0.02])
def test_one_note_that_two_segments_hear_apart_is_one_note(error):
    """Within `SAME_TIME` two hearings are of one event."""

    class Wavers(Listener):
        def encode(self, samples, num_frames):
            self._events = notes_to_events(moved[len(self.starts) % 2], self._codec)
            super().encode(samples, num_frames)

    pairs = [(0.63, 1.17), (1.83, 4.41), (4.96, 5.2)]
    notes = [Note(on, off, 60, 127, 5, False) for on, off in pairs]
    drums = [Note(t, t + MIN_DURATION, 38, 127, 0, True) for t in (0.9, 2.07, 3.1)]
    late = [n._replace(onset=n.onset + error, offset=n.offset + error) for n in notes + drums]
    moved = [notes + drums, late]
    found = hear(StreamingTranscriber(Wavers([]), hop=0.5), [ramp(7)])
    assert len(found) == len(notes + drums)
    for got, known in zip(found, sort_notes(notes + drums), strict=True):
        assert got[2:] == known[2:]
        assert got[:2] == pytest.approx(known[:2], abs=abs(error) + 1e-6)


@pytest.mark.parametrize("hop", [0.0, -1.0, 2.1, np.nan, np.inf])
def test_hops_with_gaps_between_segments_are_refused(hop):
    with pytest.raises(ValueError, match=r"hop must be above 0, at most 2\.048: got"):
        StreamingTranscriber(Listener([]), hop=hop)


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
def test_a_bad_block_is_refused_and_not_heard(stream, offline, bad):
    samples = SOUND[:50_000]
    answers = [stream.push(samples[:40_000])]
    with pytest.raises(ValueError) as error:
        stream.push(bad)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, AudioError) or isinstance(bad, list)
    answers += [stream.push(samples[40_000:]), stream.flush()]
    assert join(answers) == offline.transcribe(samples).notes


def test_blocks_of_any_floats_are_heard(stream, offline):
    samples = (SOUND[:50_000] * 1024).round() / 1024  # halves hold these
    expected = offline.transcribe(samples).notes
    assert hear(stream, [samples.astype(np.float64)]) == expected
    assert hear(stream, [samples.astype(np.float16)]) == expected
    assert hear(stream, [samples.tolist()]) == expected


def test_a_block_may_be_used_again_by_its_owner(stream, offline):
    block, answers = np.empty(1000, np.float32), []
    for i in range(0, 50_000, 1000):
        block[:] = SOUND[i : i + 1000]
        answers.append(stream.push(block))
    assert join([*answers, stream.flush()]) == offline.transcribe(SOUND[:50_000]).notes


@pytest.mark.parametrize("hop", [None, 1.0])
def test_an_hour_takes_no_more_memory_than_a_minute(hop):
    """A note that never ends, one for each segment, and drums."""
    notes = [Note(0.5, 0.9, 60, 127, 5, False), Note(1.5, 99, 62, 127, 40, False)]
    notes += [Note(t, t + MIN_DURATION, 38, 127, 0, True) for t in (0.2, 1.0, 1.7)]
    stream = StreamingTranscriber(Repeater(sort_notes(notes)), hop=hop, rules=Rules())
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
    assert max(sizes[1:]) - sizes[0] < 20_000


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
