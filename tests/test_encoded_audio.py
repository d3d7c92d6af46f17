"""FLAC, OGG and MP3 in a graph, by tensorflow-io: run by .ci/tfio, skipped elsewhere."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import soundfile

tf = pytest.importorskip("tensorflow")
pytest.importorskip("tensorflow_io", reason="needs requirements-tfio.txt: run .ci/tfio")

from export.audio_bytes import from_bytes  # noqa: E402
from mt3_keras.audio import read_blocks, sum_files  # noqa: E402
from mt3_keras.data import folder  # noqa: E402
from mt3_keras.data.pipeline import PipelineConfig, TrainingBatches  # noqa: E402
from mt3_keras.data.shards import cut_pieces  # noqa: E402
from mt3_keras.graph_codecs import decode_audio  # noqa: E402
from mt3_keras.midi import write_midi  # noqa: E402
from mt3_keras.models.config import SMALL  # noqa: E402
from mt3_keras.notes import Note  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from train.audio_files import FileRecords, find_files  # noqa: E402
from train.main import main  # noqa: E402


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

    preset = find_preset("small")
    served = ServedDetector(load_model(preset), decoding=RollDecoding.read(preset))
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


def write_folder(root):
    """Three recordings with MIDI files, one longer than a record, and one that is no recording."""
    generator = np.random.default_rng(5)
    for name, seconds in (("train/a", 3.0), ("train/b", 17.5), ("validation/c", 4.0)):
        path = root / f"{name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, generator.uniform(-0.5, 0.5, round(seconds * 16_000)), 16_000)
        onsets = np.arange(0.1, seconds - 0.6, 0.35)
        notes = [Note(t, t + 0.3, 50 + i, 80, 0, False) for i, t in enumerate(onsets.tolist())]
        write_midi(notes, path.with_suffix(".mid"))
    (root / "train" / "d.flac").write_bytes(b"fLaC and no more")
    (root / "train" / "d.mid").write_bytes((root / "train" / "a.mid").read_bytes())


def test_files_read_by_tensorflow_io_give_the_batches_of_prepared_records(tmp_path, caplog):
    write_folder(tmp_path / "mine")
    examples = folder.find(tmp_path / "mine", "train")
    expected = [
        record
        for example in examples
        if not example.id.endswith("d")
        for record in cut_pieces(example.id, sum_files(example.audio), example.load_notes())
    ]
    files = FileRecords(tmp_path / "mine", "train")
    assert "d.flac" in caplog.text and len(expected) == 3
    for found, record in zip(files, expected, strict=True):
        np.testing.assert_array_equal(found.pcm, record.pcm)
        assert found._replace(pcm=None) == record._replace(pcm=None)

    def prepared(*_):
        records = FileRecords.__new__(FileRecords)
        records._records, records.summary = expected, files.summary
        return [records]

    config = PipelineConfig(data=(str(tmp_path / "mine"),), num_mixed=2, max_attenuation_db=6.0)
    streams = [TrainingBatches(config, SMALL, 3, find) for find in (find_files, prepared)]
    for _ in range(3):
        batches = [next(stream) for stream in streams]
        for name, values in batches[0].items():
            np.testing.assert_array_equal(values, batches[1][name], err_msg=name)


def test_a_run_reads_its_files_itself(tmp_path, capsys):
    write_folder(tmp_path / "mine")
    flags = ["--flagfile=train/configs/finetune.flags", "--reader=tfio", "--batch_size=1"]
    flags += [
        f"--{name}=1" for name in ("steps", "log_steps", "validate_steps", "checkpoint_steps")
    ]
    flags += [f"--data={tmp_path / 'mine'}", f"--out_dir={tmp_path / 'run'}"]
    assert main(flags) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "model.weights.h5").exists()
