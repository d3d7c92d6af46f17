"""One decoder for each group of instruments: shapes, equal routes, and whose notes count."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from mt3_keras.codec import EOS, Codec, Event
from mt3_keras.engines.keras import TokenEngine
from mt3_keras.grammar import Rules
from mt3_keras.models.config import LogMelConfig, TracksOutConfig, TracksOutNetworkConfig
from mt3_keras.models.loading import load_model, save_preset
from mt3_keras.models.tracks_out import TracksOutBackbone
from mt3_keras.note_decoder import NoteDecoder
from mt3_keras.notes import Note
from mt3_keras.outputs import join_sequences, split_sequences
from mt3_keras.segments import cut_segments
from mt3_keras.track_decoder import TrackDecoder
from mt3_keras.tracks import Tracks
from mt3_keras.transcriber import Transcriber
from tests.conftest import tones

NETWORK = TracksOutNetworkConfig(
    tracks=("drums", "bass", "other"),
    width=16,
    num_heads=2,
    head_width=8,
    num_encoder_layers=1,
    num_decoder_layers=2,
    mlp_width=16,
    segment_frames=64,
    max_tokens=40,
)
TINY = TracksOutConfig(LogMelConfig(num_mels=16, hop_samples=256), network=NETWORK)
OWN = dataclasses.replace(TINY, network=dataclasses.replace(NETWORK, own_decoders=True))
CONFIGS = {"shared": TINY, "own": OWN}
LENGTH = 7
RULES = Rules(constrained=True)


def build(config):
    """With random weights, the same in every run, whose sequences depend on the sound and end."""
    keras.utils.set_random_seed(5)
    model = TracksOutBackbone(**config.to_dict())
    model.decoder.tags.assign(8 * model.decoder.tags)
    for i, decoder in enumerate(model.decoder.decoders):
        kernel = decoder.logits.kernel
        scores = np.random.default_rng(8 + i).normal(0, 0.25, kernel.shape)
        scores[:, 3 + 8 : 1004] = 0  # only short shifts
        scores[:, 1132:1135] *= 2  # velocities and ties
        kernel.assign(scores)
        for layer in decoder.layers:
            layer.cross_attention.value.kernel.assign(layer.cross_attention.value.kernel * 4)
    likely = ops.convert_to_numpy(model(make_inputs())).argmax(axis=-1)
    for i, decoder in enumerate(model.decoder.decoders):  # EOS in the place of another token
        scores = ops.convert_to_numpy(decoder.logits.kernel).copy()
        scores[:, EOS] = 1.05 * scores[:, likely[0, i, 3]]
        decoder.logits.kernel.assign(scores)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return build(CONFIGS[request.param])


def make_inputs(batch_size=2):
    sound = tones(batch_size * TINY.input_samples / 16_000)[: batch_size * TINY.input_samples]
    shape = (batch_size, TINY.num_decoders, LENGTH)
    return {
        "samples": sound.reshape(batch_size, -1),
        "num_frames": np.array([64, 40], np.int32)[:batch_size],
        "decoder_tokens": np.random.default_rng(3).integers(3, 1000, shape).astype(np.int32),
    }


def segments_of(seconds=6.5):
    return list(cut_segments([tones(seconds)], TINY, "full"))


def in_order(found):
    outputs = dict(found)
    return [outputs[i].tokens for i in range(len(outputs))]


def test_each_segment_has_a_row_for_each_group(model):
    inputs = make_inputs()
    assert model(inputs).shape == (2, 3, LENGTH, 1536)
    memory = model.encode(inputs["samples"], inputs["num_frames"])
    assert tuple(memory["cross_keys_0"].shape) == (6, 2, 64, 8)
    assert tuple(memory["tag"].shape) == (6, 16)
    shapes = {name: tuple(tensor.shape) for name, tensor in memory.items()}
    assert {n: tuple(t.shape) for n, t in model.empty_memory(2).items()} == shapes


def test_stepwise_decoding_equals_the_whole_sequence(model):
    inputs = make_inputs()
    rows = inputs["decoder_tokens"].reshape(6, LENGTH)
    whole = ops.convert_to_numpy(model(inputs)).reshape(6, LENGTH, -1)
    memory = model.encode(inputs["samples"], inputs["num_frames"])
    cache = {n: np.array(kept) for n, kept in model.empty_cache(6, LENGTH).items()}
    for position in range(LENGTH):
        bias = np.where(np.arange(LENGTH) < position, 0, -1e10).astype(np.float32)[None]
        positions = np.full(6, position, np.int32)
        logits, new = model.decode_step(rows[:, position], positions, cache, bias, memory)
        for name in cache:
            cache[name][:, :, position] = ops.convert_to_numpy(new[name])
        assert ops.convert_to_numpy(logits) == pytest.approx(whole[:, position], abs=1e-4)


def test_a_group_depends_on_its_own_tokens_and_its_tag_alone(model):
    inputs = make_inputs()
    before = ops.convert_to_numpy(model(inputs))
    inputs["decoder_tokens"][:, 1] = 7
    after = ops.convert_to_numpy(model(inputs))
    assert after[:, [0, 2]] == pytest.approx(before[:, [0, 2]], abs=1e-5)
    inputs["decoder_tokens"][:] = 7
    same = ops.convert_to_numpy(model(inputs))
    assert np.abs(same[:, 0] - same[:, 2]).max() > 1e-2


def test_only_decoders_of_their_own_have_weights_of_their_own():
    shared, own = (TracksOutBackbone(**config.to_dict()) for config in CONFIGS.values())
    decoder = shared.decoder.decoders[0].count_params()
    assert own.count_params() == shared.count_params() + 2 * decoder


def test_a_preset_holds_the_model_whole(model, tmp_path):
    save_preset(model, tmp_path / "preset")
    expected = ops.convert_to_numpy(model(make_inputs()))
    for other in (
        load_model(tmp_path / "preset"),
        TracksOutBackbone.from_preset(str(tmp_path / "preset")),
    ):
        assert other.model_config == model.model_config
        assert (ops.convert_to_numpy(other(make_inputs())) == expected).all()


def test_the_search_emits_what_whole_passes_emit(model):
    segments = segments_of()
    engine = TokenEngine(model, batch_size=3, max_tokens=24)
    found = [split_sequences(tokens, 3) for tokens in in_order(engine.run(segments))]
    assert len({len(tokens) for rows in found for tokens in rows}) > 1
    given = np.zeros((len(found), 3, 24), np.int32)
    for row, sequences in zip(given, found, strict=True):
        for i, tokens in enumerate(sequences):
            row[i, 1 : len(tokens)] = tokens[:23][: len(tokens) - 1]
    inputs = {
        "samples": np.stack([segment.samples for segment in segments]),
        "num_frames": np.array([segment.num_frames for segment in segments], np.int32),
        "decoder_tokens": given,
    }
    best = ops.convert_to_numpy(model(inputs)).argmax(axis=-1)
    for row, sequences in zip(best.tolist(), found, strict=True):
        for i, tokens in enumerate(sequences):
            known = tokens[:24]  # beyond, EOS was added
            assert row[i][: len(known)] == known


@pytest.mark.parametrize("model", ["shared"], indirect=True)
def test_beams_of_one_do_not_depend_on_what_is_decoded_beside_them(model):
    segments = segments_of()
    found = [
        in_order(TokenEngine(model, method="beam1", batch_size=size, max_tokens=24).run(segments))
        for size in (1, 4)
    ]
    assert found[0] == found[1]


# ---------------------------------------------------------------- exported


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("a bundle is written by TensorFlow")
    from export.tflite import export_bundle

    return export_bundle(model, tmp_path_factory.mktemp("tracks_out"))


def test_a_bundle_emits_the_tokens_of_keras(model, bundle):
    from mt3_keras.engines import litert

    segments = segments_of()
    expected = in_order(TokenEngine(model, rules=RULES, batch_size=4).run(segments))
    for number in (1, 5):
        engine = litert.TokenEngine(bundle, rules=RULES, num_segments=number)
        assert in_order(engine.run(segments)) == expected
    assert len({tuple(tokens) for tokens in expected}) > 2  # the sound makes a difference


def test_a_bundle_has_operators_of_litert_alone_and_agrees_with_keras(model, bundle):
    from export.tflite import operators, report

    counts = operators(bundle / "model.tflite")
    assert not [name for count in counts.values() for name in count if name.startswith("CUSTOM")]
    line = report(bundle, model).splitlines()[-1]
    assert float(line.partition("differ by at most ")[2].partition(",")[0]) < 1e-3


@pytest.mark.parametrize("model", ["shared"], indirect=True)
@pytest.mark.parametrize("tie_forcing", [False, True])
def test_a_stream_emits_the_notes_of_a_file_however_it_is_cut(bundle, tie_forcing):
    from mt3_keras.streaming import StreamingTranscriber

    samples = tones(6.5)
    stream = StreamingTranscriber.from_bundle(bundle, rules=RULES, tie_forcing=tie_forcing)
    found = []
    for size in (1_000, samples.size):
        blocks = [samples[i : i + size] for i in range(0, samples.size, size)]
        notes = [note for block in blocks for note in stream.push(block)]
        found.append(sorted(notes + stream.flush()))
    assert found[0] == found[1]
    if not tie_forcing:
        expected = Transcriber(bundle, rules=RULES).transcribe(samples).notes
        assert len(expected) > 5
        assert found[0] == sorted(expected)


def test_a_saved_model_serves_the_tokens_of_keras(model):
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("a SavedModel is written by TensorFlow")
    from export.served_model import ServedModel
    from mt3_keras.engines.serving import _to_outputs

    served = ServedModel(model, rules=RULES, batch_size=4)
    audio = tf.TensorSpec([None, None], tf.float32, "audio")
    function = tf.function(served.transcribe, input_signature=[audio], autograph=False)
    answer = function(tones(6.5)[None])
    outputs = _to_outputs({"tokens": answer["tokens"].numpy().tolist()})
    engine = TokenEngine(model, rules=RULES, batch_size=4)
    assert [output.tokens for output in outputs] == in_order(engine.run(segments_of()))


# ---------------------------------------------------------------- tokens and notes


def test_sequences_can_be_split_again():
    assert join_sequences([[5, EOS, 0, 0], [EOS, 0], [7, 8]]).tokens == [5, EOS, EOS, 7, 8, EOS]
    assert split_sequences([5, EOS, EOS, 7, 8, EOS], 3) == [[5, EOS], [EOS], [7, 8, EOS]]
    assert split_sequences([5], 3) == [[5], [], []]
    assert join_sequences([[5, EOS, 0]]).tokens == [5, EOS]
    assert join_sequences([[5, 6]]).tokens == [5, 6]


def test_a_note_counts_where_its_instrument_belongs():
    codec = Codec(1)

    def write(*events):
        return [*(codec.encode(Event(*event)) for event in events), EOS]

    def strike(program, pitch, step):
        on, off = ("velocity", 1), ("velocity", 0)
        times = [("shift", step), ("program", program), on, ("pitch", pitch)]
        return [*times, ("shift", step + 10), off, ("pitch", pitch)]

    decoder = TrackDecoder(Tracks(("drums", "bass", "other")), lambda: NoteDecoder(codec))
    tie = ("tie", 0)
    drums = write(tie, ("shift", 20), ("velocity", 1), ("drum", 36))
    bass = write(tie, *strike(33, 40, 10), *strike(0, 60, 30))  # the second is none of its own
    other = write(tie, *strike(33, 40, 5), *strike(0, 60, 30), *strike(48, 40, 50))
    decoder.feed(0.0, drums + bass + other)
    notes = decoder.finish()
    found = [(note.onset, note.program, note.pitch, note.is_drum) for note in notes]
    assert found == [
        (0.1, 33, 40, False),
        (0.2, 0, 36, True),
        (0.3, 0, 60, False),
        (0.5, 48, 40, False),
    ]
    assert decoder.invalid_events == 2


@pytest.mark.parametrize(
    ("tracks", "granularity", "error"),
    [
        (("drums", "bass"), "full", "have program 0 in 0"),
        (("drums", "vocals", "other"), "midi_class", "program 52 in 2"),
        (("tambourines", "other"), "full", "got 'tambourines'"),
    ],
)
def test_tracks_that_do_not_share_out_all_instruments_are_refused(tracks, granularity, error):
    parts = {"network": {"tracks": tracks}, "vocabulary": {"granularity": granularity}}
    with pytest.raises(ValueError, match=error):
        TracksOutConfig.from_dict(parts)


def test_the_targets_of_all_groups_are_the_notes_of_the_piece():
    from mt3_keras.data.pipeline import ChunkMaker, PipelineConfig
    from mt3_keras.data.shards import cut_pieces
    from mt3_keras.recording import make_decoder
    from train.callbacks import target_outputs

    notes = [
        Note(0.1, 0.4, 60, 127, 0),
        Note(0.2, 0.5, 40, 127, 33),
        Note(0.2, 0.3, 36, 127, 0, True),
        Note(0.25, 0.6, 60, 127, 48),
    ]
    (record,) = cut_pieces("x", np.zeros(16_000, np.float32), notes)
    chunk = ChunkMaker([], PipelineConfig(()), TINY).chunk([record], [0])
    assert len(chunk.tokens) == 3
    padded = np.zeros((1, 3, chunk.num_tokens), np.int32)
    for i, tokens in enumerate(chunk.tokens):
        padded[0, i, : len(tokens)] = tokens
    decoder = make_decoder(TINY)
    decoder.feed(0.0, target_outputs({"targets": padded}, TINY)[0].tokens)
    found = [note for note in decoder.finish() if not note.is_drum]
    assert found == [note for note in notes if not note.is_drum]
    assert [n.pitch for n in decoder.notes if n.is_drum] == [36]
    assert decoder.invalid_events == 0
