"""Audio -> notes, the whole path."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from mt3_keras import Transcriber, read_midi, transcribe
from mt3_keras.codec import EOS
from mt3_keras.models.catalog import ModelError
from mt3_keras.notes import Note, sort_notes
from mt3_keras.segments import AudioError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def tiny(tiny_preset):
    return Transcriber.from_preset(tiny_preset, batch_size=3, max_tokens=24)


def noise(seconds, seed=0):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.normal(size=int(16_000 * seconds))).astype(np.float32)


@pytest.fixture(scope="module")
def exact(official):
    return Transcriber.from_preset(official, exact=True)


@pytest.mark.parametrize("clip", ["band", "piano"])
def test_the_official_weights_write_the_originals_tokens_and_notes(shared, exact, clip):
    golden = json.loads((shared / "golden" / f"{clip}.json").read_text())
    result = exact.transcribe(shared / "golden" / f"{clip}.flac")
    assert [list(s.tokens) for s in result.segments] == [s["tokens"] for s in golden["segments"]]
    starts = [s["start"] for s in golden["segments"]]
    assert [s.start for s in result.segments] == pytest.approx(starts)
    assert result.invalid_events == golden["invalid_events"]
    assert result.dropped_events == golden["dropped_events"]
    expected = sort_notes(Note(**note) for note in golden["notes"])
    assert [n[2:] for n in result.notes] == [n[2:] for n in expected]
    for got, wanted in zip(result.notes, expected, strict=True):
        assert got[:2] == pytest.approx(wanted[:2], abs=1e-6)


def test_a_file_and_its_samples_give_the_same(tiny, tmp_path):
    samples = noise(5)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    assert tiny.transcribe(tmp_path / "a.wav") == tiny.transcribe(samples)


def test_samples_at_another_rate_are_resampled_as_a_file_is(tiny, tmp_path):
    samples = noise(5)
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    found = tiny.transcribe(samples, sample_rate=44_100)
    assert found == tiny.transcribe(tmp_path / "a.wav")
    assert found.duration == pytest.approx(5 * 16_000 / 44_100, abs=0.01)
    assert found != tiny.transcribe(samples)
    with pytest.raises(AudioError, match="sample_rate must be 1000 to 2000000 Hz"):
        tiny.transcribe(samples, sample_rate=1)
    with pytest.raises(ValueError, match=r"sample_rate is for samples, and .*a\.wav states"):
        tiny.transcribe(tmp_path / "a.wav", sample_rate=44_100)


def test_instruments_asked_for_are_those_in_the_result():
    samples = soundfile.read(ROOT / "examples" / "band.flac", dtype="float32")[0][:80_000]
    small = Transcriber.from_preset("small", engine="litert", threads=1)
    sax = small.transcribe(samples, instruments=["tenor sax", "drums"])
    assert {note.program for note in sax.notes if not note.is_drum} == {66}
    only = transcribe(samples, engine="litert", instruments="tenor sax, drums", threads=1)
    assert only == sax
    assert {note.program for note in small.transcribe(samples).notes} != {66}
    with pytest.raises(ValueError, match=r"unknown instrument 'saks'.*; unknown instrument 'flut'"):
        small.transcribe(samples, instruments=["saks", "flut"])
    with pytest.raises(ValueError, match="threads must be at least 1: got 0"):
        Transcriber.from_preset("small", engine="litert", threads=0)


def test_threads_are_for_litert(tiny_preset):
    with pytest.raises(ValueError, match="threads is for LiteRT"):
        Transcriber.from_preset(tiny_preset, engine="keras", threads=1)


def test_the_start_of_a_recording_does_not_depend_on_its_end(tiny):
    """But for the last segment of the shorter one, which hears no more."""
    long, short = tiny.transcribe(noise(20)), tiny.transcribe(noise(20)[: 16_000 * 9])
    same = len(short.segments) - 2
    assert same >= 2
    assert long.segments[:same] == short.segments[:same]


def test_segments_are_reported_in_order_with_all_notes_once(tiny):
    reports = []
    result = tiny.transcribe(noise(15), on_segment=reports.append)
    assert [report.segment for report in reports] == result.segments
    assert sort_notes(note for report in reports for note in report.notes) == result.notes
    assert reports[-1].end == result.duration
    ends = [report.end for report in reports[:-1]]
    assert ends == [segment.start for segment in result.segments[1:]]


def test_progress_without_notes_leaves_the_result_as_it_is():
    samples = soundfile.read(ROOT / "examples" / "band.flac", dtype="float32")[0][:160_000]
    small = Transcriber.from_preset("small", engine="litert", threads=1)
    reports, ends = [], []
    told = small.transcribe(samples, on_segment=reports.append)
    assert small.transcribe(samples, on_progress=ends.append) == told
    assert ends == [report.end for report in reports]
    assert sum(len(report.notes) for report in reports) == len(told.notes) > 10


@pytest.mark.parametrize("num_samples", [1, 160, 1600, 32_768, 32_769])
def test_recordings_of_any_length_are_read(tiny, num_samples):
    result = tiny.transcribe(noise(3)[:num_samples])
    assert len(result.segments) == (num_samples // 128 + 256) // 256
    assert all(s.tokens[-1] == EOS or len(s.tokens) == 24 for s in result.segments)


def test_silence_is_read(tiny):
    assert tiny.transcribe(np.zeros(50_000, np.float32)).duration == pytest.approx(391 / 125)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tiny, bad):
    samples = noise(1)
    samples[5000] = bad
    with pytest.raises(AudioError):
        tiny.transcribe(samples)


def test_exact_refuses_what_would_leave_the_originals_path(tiny_preset):
    choices = {"context": "full", "method": "beam1", "log_floor": "clamp", "least_confidence": 0.0}
    for options in ({name: choice} for name, choice in choices.items()):
        with pytest.raises(ValueError, match="original's path"):
            Transcriber.from_preset(tiny_preset, exact=True, **options)


@pytest.mark.parametrize("name", ["no_such_model", "README.md"])
def test_models_that_are_none_are_named(name):
    with pytest.raises(ModelError, match=name):
        Transcriber.from_preset(name)


def test_a_damaged_preset_is_named(tiny_preset, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((tiny_preset / "config.json").read_text())
    with pytest.raises(ModelError, match=r"broken.*model\.weights\.h5 is missing"):
        Transcriber.from_preset(broken)
    weights = (tiny_preset / "model.weights.h5").read_bytes()
    (broken / "model.weights.h5").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="broken") as error:
        Transcriber.from_preset(broken)
    assert "\n" not in str(error.value)
    (broken / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json"):
        Transcriber.from_preset(broken)


def test_the_result_writes_its_notes_as_midi(tiny, tmp_path):
    result = tiny.transcribe(noise(10))
    result.write_midi(tmp_path / "a.mid")
    sounding = {(n.pitch, n.program, n.is_drum) for n in result.notes}
    assert {(n.pitch, n.program, n.is_drum) for n in read_midi(tmp_path / "a.mid")} <= sounding


WITHOUT_TENSORFLOW = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("tensorflow"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Refuse())
import json, pathlib
from mt3_keras import Transcriber

model, clip, golden = sys.argv[1:]
result = Transcriber.from_preset(model, exact=True).transcribe(clip)
expected = [s["tokens"] for s in json.loads(pathlib.Path(golden).read_text())["segments"]]
assert [s.tokens for s in result.segments] == expected
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
print("same tokens")
"""


def test_the_same_code_gives_the_same_tokens_on_jax_without_tensorflow(shared, official):
    pytest.importorskip("jax")
    golden = shared / "golden"
    arguments = [official, golden / "piano.flac", golden / "piano.json"]
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.stdout.strip() == "same tokens", run.stderr[-2000:]


@pytest.mark.parametrize("code", ["import mt3_keras", "from mt3_keras import Note"])
def test_importing_the_package_loads_no_framework(code):
    check = "import sys; print([m for m in ('keras', 'tensorflow', 'jax') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; {check}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"
