"""FLAC, OGG and MP3 in a served graph, by tensorflow-io: run by .ci/tfio, skipped elsewhere."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import soundfile

tf = pytest.importorskip("tensorflow")
pytest.importorskip("tensorflow_io", reason="needs requirements-tfio.txt: run .ci/tfio")

from export.audio_bytes import from_bytes  # noqa: E402
from export.encoded_audio import decode_audio  # noqa: E402
from mt3_keras.audio import read_blocks  # noqa: E402
from tests.conftest import ROOT  # noqa: E402


@pytest.fixture(scope="module")
def decode():
    return tf.function(decode_audio, [tf.TensorSpec([], tf.string)], autograph=False)


def encode(samples, rate, **options):
    content = io.BytesIO()
    soundfile.write(content, samples, rate, **options)
    return content.getvalue()


@pytest.mark.parametrize(
    ("form", "subtype", "rate"),
    [
        ("FLAC", "PCM_16", 16_000),
        ("FLAC", "PCM_16", 44_100),
        ("OGG", "VORBIS", 48_000),
        ("MP3", "MPEG_LAYER_III", 16_000),
        ("MP3", "MPEG_LAYER_III", 22_050),
        ("MP3", "MPEG_LAYER_III", 44_100),
        ("WAV", "PCM_16", 16_000),
    ],
)
def test_the_graph_reads_a_file_as_reading_it_does(decode, form, subtype, rate, tmp_path):
    times = np.arange(rate) / rate
    swell = np.sin(np.pi * times / times[-1])[:, None]
    sound = 0.4 * swell * np.sin(2 * np.pi * np.outer(times, [440, 1500]))
    content = encode(sound, rate, format=form, subtype=subtype)
    (tmp_path / f"song.{form.lower()}").write_bytes(content)
    expected = np.concatenate(list(read_blocks(tmp_path / f"song.{form.lower()}")))
    found = decode(content).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-6 if rate == 16_000 else 1e-3)


def test_a_tag_before_an_mp3_changes_nothing(decode):
    content = encode(np.zeros(5000), 44_100, format="MP3")
    picture = b"\xff\xfb\x90\x00" * 500  # looks like frames of a file at 44,100 Hz
    tag = b"ID3\x04\x00\x00" + bytes([0, 0, len(picture) >> 7, len(picture) & 127]) + picture
    np.testing.assert_array_equal(decode(tag + content), decode(content))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no sound",
        b"fLaC",
        b"OggS" + bytes(100),
        encode(np.zeros(900), 44_100, format="FLAC")[:30],
        encode(np.zeros(900), 44_100, format="FLAC", subtype="PCM_24"),
    ],
)
def test_what_is_no_recording_is_refused(decode, content):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(content)


def test_a_flac_gives_the_notes_that_its_samples_give():
    from export.served_model import ServedDetector
    from mt3_keras.models.catalog import find_preset
    from mt3_keras.models.loading import load_model
    from mt3_keras.note_rolls import RollDecoding

    folder = find_preset("small")
    served = ServedDetector(load_model(folder), decoding=RollDecoding.read(folder))
    spec = tf.TensorSpec([None, None], tf.float32)
    transcribe = tf.function(served.transcribe, [spec], autograph=False)
    by_bytes, _ = from_bytes(transcribe, decode_audio)
    content = (ROOT / "examples" / "band.flac").read_bytes()
    samples, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    found, expected = by_bytes(tf.constant([content])), transcribe(samples[None])
    assert int(expected["num_notes"][0]) > 50
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_golden_clip_gives_the_originals_tokens(official, shared):
    from export.served_model import ServedModel
    from mt3_keras.models.loading import load_model

    model = load_model(official, log_floor="zero")
    from mt3_keras.grammar import Rules

    served = ServedModel(model, context="segment", rules=Rules())
    spec = tf.TensorSpec([None, None], tf.float32)
    transcribe = tf.function(served.transcribe, [spec], autograph=False)
    by_bytes, _ = from_bytes(transcribe, decode_audio)
    content = (shared / "golden" / "band.flac").read_bytes()
    (rows,) = by_bytes(tf.constant([content]))["tokens"].numpy().tolist()
    golden = json.loads((shared / "golden" / "band.json").read_text())["segments"]
    for row, segment in zip(rows, golden, strict=True):
        assert row[: row.index(1) + 1] == segment["tokens"]
