"""An encoder for each separated track: shapes, equal routes, stems in, and data with tracks."""

from __future__ import annotations

import dataclasses
import functools

import keras
import numpy as np
import pytest
import soundfile
from keras import ops

from mt3_keras.__main__ import main
from mt3_keras.audio import stack_files
from mt3_keras.codec import EOS
from mt3_keras.data.example import Example, Label
from mt3_keras.data.pipeline import PipelineConfig, TrainingBatches
from mt3_keras.data.records import RecordsError, decode_record, encode_record, find_records
from mt3_keras.data.shards import (
    Source,
    cut_pieces,
    example_source,
    synthetic_source,
    write_records,
)
from mt3_keras.engines.keras import TokenEngine
from mt3_keras.grammar import Rules
from mt3_keras.models.config import LogMelConfig, MT3Config, TracksInConfig, TracksInNetworkConfig
from mt3_keras.models.loading import load_model, save_preset
from mt3_keras.models.tracks_in import TracksInBackbone
from mt3_keras.notes import Note
from mt3_keras.segments import AudioError, cut_segments
from mt3_keras.stems import StemTranscriber
from mt3_keras.synth.synthetic import SyntheticConfig, render
from mt3_keras.transcriber import Transcriber
from tests.conftest import tones

TRACKS = ("drums", "bass", "other")
NETWORK = TracksInNetworkConfig(
    tracks=TRACKS,
    width=16,
    num_heads=2,
    head_width=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_width=16,
    segment_frames=64,
    max_tokens=40,
)
TINY = TracksInConfig(LogMelConfig(num_mels=16, hop_samples=256), network=NETWORK)
OWN = dataclasses.replace(TINY, network=dataclasses.replace(NETWORK, own_encoders=True))
CONFIGS = {"shared": TINY, "own": OWN}
RULES = Rules(constrained=True)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """With random weights, the same in every run, whose sequences depend on the sound."""
    keras.utils.set_random_seed(5)
    model = TracksInBackbone(**CONFIGS[request.param].to_dict())
    scores = np.random.default_rng(8).normal(0, 0.25, model.decoder.logits.kernel.shape)
    scores[:, EOS] *= 6
    model.decoder.logits.kernel.assign(scores)
    values = model.decoder.layers[0].cross_attention.value.kernel
    values.assign(values * 4)
    return model


def sounds(seconds):
    """Three tracks, the last of which is silent."""
    sound = tones(seconds)
    return np.stack([sound[::-1], sound, np.zeros_like(sound)])


def make_inputs():
    samples = sounds(2 * TINY.input_samples / 16_000)[:, : 2 * TINY.input_samples]
    tokens = np.random.default_rng(3).integers(3, 1000, (2, 7))
    return {
        "samples": samples.reshape(3, 2, -1).transpose(1, 0, 2),
        "num_frames": np.array([64, 40], np.int32),
        "decoder_tokens": tokens.astype(np.int32),
    }


def segments_of(seconds=5.5):
    return list(cut_segments([sounds(seconds)], TINY, "full"))


def in_order(found):
    outputs = dict(found)
    return [outputs[i].tokens for i in range(len(outputs))]


def test_the_decoder_is_given_what_a_mix_would_give(model):
    inputs = make_inputs()
    assert model(inputs).shape == (2, 7, 1536)
    memory = model.encode(inputs["samples"], inputs["num_frames"])
    assert tuple(memory["cross_keys_0"].shape) == (2, 2, 64, 8)
    shapes = {name: tuple(tensor.shape) for name, tensor in memory.items()}
    assert {n: tuple(t.shape) for n, t in model.empty_memory(2).items()} == shapes


def test_it_matters_which_track_a_sound_is_on(model):
    inputs = make_inputs()
    before = ops.convert_to_numpy(model(inputs))
    inputs["samples"] = inputs["samples"][:, [1, 0, 2]]
    assert np.abs(ops.convert_to_numpy(model(inputs)) - before).max() > 1e-4


def test_a_batch_equals_its_rows_alone_and_the_steps_the_whole(model):
    inputs = make_inputs()
    whole = ops.convert_to_numpy(model(inputs))
    for row in range(2):
        alone = model({name: array[row : row + 1] for name, array in inputs.items()})
        assert ops.convert_to_numpy(alone)[0] == pytest.approx(whole[row], abs=1e-4)
    memory = model.encode(inputs["samples"], inputs["num_frames"])
    cache = model.empty_cache(2, 1)
    bias = np.full((2, 1), -1e10, np.float32)
    first = inputs["decoder_tokens"][:, 0]
    logits, _ = model.decode_step(first, np.zeros(2, np.int32), cache, bias, memory)
    assert ops.convert_to_numpy(logits) == pytest.approx(whole[:, 0], abs=1e-4)


def test_what_lies_past_the_last_frame_does_not_count(model):
    inputs = make_inputs()
    before = ops.convert_to_numpy(model(inputs))
    reach = 40 * TINY.spectrogram.hop_samples + TINY.spectrogram.overhang_samples
    inputs["samples"][:, :, reach:] = 0
    assert ops.convert_to_numpy(model(inputs))[1] == pytest.approx(before[1], abs=1e-5)


def test_only_encoders_of_their_own_have_weights_of_their_own():
    shared, own = (TracksInBackbone(**config.to_dict()) for config in CONFIGS.values())
    encoder = shared.encoder.encoders[0].count_params()
    assert own.count_params() == shared.count_params() + 2 * encoder


def test_a_preset_holds_the_model_whole(model, tmp_path):
    save_preset(model, tmp_path / "preset")
    expected = ops.convert_to_numpy(model(make_inputs()))
    for other in (
        load_model(tmp_path / "preset"),
        TracksInBackbone.from_preset(str(tmp_path / "preset")),
    ):
        assert other.model_config == model.model_config
        assert (ops.convert_to_numpy(other(make_inputs())) == expected).all()


def test_bundle_and_saved_model_emit_the_tokens_of_keras(model, tmp_path):
    pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("both are written by TensorFlow")
    from export.served_model import ServedModel
    from export.tflite import export_bundle
    from mt3_keras.engines import litert
    from mt3_keras.engines.serving import _to_outputs
    from mt3_keras.streaming import StreamingTranscriber

    segments = segments_of()
    expected = in_order(TokenEngine(model, rules=RULES, batch_size=4).run(segments))
    assert len({tuple(tokens) for tokens in expected}) > 2  # the sound makes a difference
    bundle = export_bundle(model, tmp_path)
    assert in_order(litert.TokenEngine(bundle, rules=RULES).run(segments)) == expected
    served = ServedModel(model, rules=RULES, batch_size=4)
    assert "serving_bytes" not in served.endpoints()
    function, specs = served.endpoints()["serving_default"]
    answer = tf.function(function, input_signature=specs, autograph=False)(sounds(5.5)[None])
    outputs = _to_outputs({"tokens": answer["tokens"].numpy().tolist()})
    assert [output.tokens for output in outputs] == expected
    with pytest.raises(ValueError, match="which a stream has not"):
        StreamingTranscriber.from_bundle(bundle)


# ---------------------------------------------------------------- stems


@pytest.fixture
def song(tmp_path):
    folder = tmp_path / "song"
    folder.mkdir()
    sound = 0.1 * tones(3.0)
    soundfile.write(folder / "drums.wav", sound[::-1], 16_000)
    soundfile.write(folder / "bass.wav", sound, 16_000)
    soundfile.write(folder / "gtr L.wav", sound[:20_000], 16_000)
    soundfile.write(folder / "gtr R.wav", np.zeros(9_000), 16_000)
    return folder


def test_stems_of_one_kind_are_added_up_and_notes_bear_their_names(model, song):
    sound = np.concatenate([next(stack_files([[song / "bass.wav"]]))[0]])
    tracks = np.stack([next(stack_files([[song / "drums.wav"]]))[0], sound, np.zeros_like(sound)])
    tracks[2, :20_000] = sound[:20_000]
    transcriber = Transcriber(model, rules=RULES)
    result = StemTranscriber(transcriber).transcribe(song)
    assert result.segments == transcriber.transcribe(tracks).segments
    names = {
        "drums" if n.is_drum else "bass" if n.program in range(32, 40) else "other"
        for n in result.notes
    }
    assert {name.split(":")[0] for name in result.track_names.values()} == names
    assert set(result.track_names) == set(result.notes)


def test_what_is_no_song_in_tracks_is_one_line(model, song, tmp_path, capsys):
    transcriber = Transcriber(model, rules=RULES)
    with pytest.raises(
        AudioError, match=r"bass\.wav: this network is given drums, bass, other apart"
    ):
        transcriber.transcribe(song / "bass.wav")
    with pytest.raises(AudioError, match=r"samples must be \[3, n\]"):
        transcriber.transcribe(tones(1.0))
    save_preset(model, tmp_path / "preset")
    (song / "bass.wav").write_text("These are the basses.\n" * 50)
    command = ["transcribe", f"--stems={song}", f"--model={tmp_path / 'preset'}"]
    assert main([*command, f"--output_dir={tmp_path / 'out'}", "--noprogress"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "bass.wav: " in line
    assert not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------- data


def test_rendered_tracks_add_up_to_the_mix_and_hold_their_own_instruments():
    config = SyntheticConfig(
        seconds=4.0, tracks=TRACKS, min_instruments=3, additive_share=1.0, gain_range_db=0.0
    )
    piece = render(config, 2)
    mix, *tracks = piece.samples
    assert len(tracks) == 3
    np.testing.assert_allclose(np.sum(tracks, axis=0), mix, atol=1e-5)
    present = {0 if n.is_drum else 1 if n.program in range(32, 40) else 2 for n in piece.notes}
    assert {i for i, track in enumerate(tracks) if np.abs(track).max() > 1e-3} == present


def test_stems_of_a_data_set_become_tracks_however_long(tmp_path):
    sounds = {"bass": 0.2 * tones(20.0), "piano": 0.2 * tones(4.0), "organ": 0.2 * tones(9.0)}
    for name, sound in sounds.items():
        soundfile.write(tmp_path / f"{name}.flac", sound, 16_000)
    programs = {"bass": 33, "piano": 0, "organ": 16}
    labels = tuple(Label(tmp_path / f"{name}.mid", programs[name]) for name in sounds)
    read = functools.partial(lambda label: [Note(0.0, 1.0, 60, 90, label.program)])
    audio = tuple(tmp_path / f"{name}.flac" for name in sounds)
    example = Example("song", "slakh", "train", audio, labels, read)
    records = list(cut_pieces("song", *example_source(example, TRACKS).load()))
    mixed = list(cut_pieces("song", *example_source(example).load()))
    assert len(records) == len(mixed) == 2
    for record, mix in zip(records, mixed, strict=True):
        n = record.num_samples
        tracks = record.track_samples(0, n)
        np.testing.assert_allclose(record.samples(0, n), mix.samples(0, n), atol=1e-4)
        np.testing.assert_allclose(tracks.sum(axis=0), mix.samples(0, n), atol=1e-4)
        assert not tracks[0].any()
        back = decode_record(encode_record(record))
        np.testing.assert_array_equal(back.stems, record.stems)
    np.testing.assert_allclose(
        records[0].track_samples(0, 320),
        [[0] * 320, sounds["bass"][:320], sounds["piano"][:320] + sounds["organ"][:320]],
        atol=1e-4,
    )
    single = dataclasses.replace(example, audio=audio[:1])
    with pytest.raises(ValueError, match="not in files of their own"):
        example_source(single, TRACKS).load()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    config = SyntheticConfig(seconds=3.0, tracks=TRACKS, additive_share=1.0)
    sources: list[Source] = [synthetic_source(config, i) for i in range(3)]
    folder = tmp_path_factory.mktemp("tracks")
    options = {"tracks": list(TRACKS)}
    write_records(sources, folder, name="test", split="train", options=options, num_workers=1)
    return folder


def test_batches_have_tracks_for_networks_that_are_given_them_and_else_their_mix(prepared):
    settings = PipelineConfig((str(prepared),), context="full")
    tracks = next(TrainingBatches(settings, TINY, 4))
    parts = {
        "network": {
            k: v
            for k, v in dataclasses.asdict(NETWORK).items()
            if k not in ("tracks", "own_encoders")
        }
    }
    mix_config = MT3Config.from_dict({"spectrogram": dataclasses.asdict(TINY.spectrogram), **parts})
    mix = next(TrainingBatches(settings, mix_config, 4))
    assert tracks["samples"].shape == (4, 3, TINY.input_samples)
    np.testing.assert_allclose(tracks["samples"].sum(axis=1), mix["samples"], atol=1e-3)
    np.testing.assert_array_equal(tracks["targets"], mix["targets"])


def test_data_of_other_tracks_is_refused_with_the_cure(prepared):
    with pytest.raises(RecordsError, match=r"train\.prepare --tracks drums,other"):
        find_records([prepared], "train", ("drums", "other"))
