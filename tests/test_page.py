"""The page in a real Chromium: what it reads, shows, saves and refuses."""

from __future__ import annotations

import csv
import dataclasses
import os
import pathlib
import shutil
import subprocess
import urllib.error
import urllib.request
import wave

import numpy as np
import pytest
import soundfile

from benchmarks.browser import (
    BROWSERS,
    STEP,
    count_same,
    drive,
    find_browser,
    serving,
    to_notes,
)
from export.page import main as write_model
from mt3_keras import Transcriber, __main__, read_midi
from mt3_keras.models.catalog import find_preset
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.notes import Note
from mt3_keras.tempo import read_beats
from tests.conftest import ROOT

EXAMPLE = ROOT / "examples" / "band.flac"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> pathlib.Path:
    """The page as `make web` builds it."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("needs Node and npm, which build the page")
    web = ROOT / "web"
    if not (web / "node_modules").is_dir():
        install = ["npm", "ci", "--no-audit", "--no-fund"]
        done = subprocess.run(install, cwd=web, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"needs the packages of web/package-lock.json: {done.stderr[-200:]}")
    folder = tmp_path_factory.mktemp("page")
    for command in (["node", "build.mjs", str(folder)], ["node_modules/.bin/tsc", "--noEmit"]):
        subprocess.run(command, cwd=web, check=True, timeout=120)
    assert write_model(["--out_dir", str(folder)]) == 0
    return folder


def ask(page: pathlib.Path, folder: pathlib.Path, *tasks: dict) -> list[dict]:
    """What the page answers; it asks nobody else and raises nothing."""
    if find_browser() is None:
        pytest.skip(f"needs a browser: {' or '.join(BROWSERS[:2])}")
    return drive(page, folder, tasks, timeout=900)


def assert_same(found: list[Note], expected: list[Note], tolerance: float = STEP) -> None:
    assert count_same(found, expected, tolerance) == len(found) == len(expected)


def write_silence(path: pathlib.Path, seconds: int, rate: int = 8000) -> pathlib.Path:
    """A soft tone for so long, 8 bits a sample."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(rate)
        file.writeframes((bytes([126] * 4 + [130] * 4) * (rate // 8)) * seconds)
    return path


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    return Transcriber.from_preset("small", engine="litert")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[pathlib.Path]:
    """At the network's rate; in stereo at another; compressed."""
    folder = tmp_path_factory.mktemp("recordings")
    samples, rate = soundfile.read(ROOT / "examples" / "piano.flac", stop=16_000 * 8)
    import soxr

    wide = soxr.resample(samples, rate, 44_100, "VHQ")
    stereo = np.stack([0.9 * wide, 0.5 * wide], axis=1)
    for name in ("stereo.wav", "stereo.mp3"):
        soundfile.write(folder / name, stereo, 44_100)
    return [EXAMPLE, folder / "stereo.wav", folder / "stereo.mp3"]


def test_the_page_reads_and_saves_the_notes_that_python_reads(
    page, transcriber, recordings, tmp_path
):
    first, *others = ({"do": "transcribe", "file": str(path)} for path in recordings)
    first |= {"saves": ["midi", "musicxml", "csv"], "pictures": [[390, 844, "dark", "page.png"]]}
    answers = ask(page, tmp_path, first, *others)
    for path, answer in zip(recordings, answers, strict=True):
        expected = transcriber.transcribe(path).notes
        assert expected, path
        assert_same(to_notes(answer["notes"]), expected)
    assert (tmp_path / "page.png").stat().st_size
    notes = to_notes(answers[0]["notes"])
    saved = {kind: pathlib.Path(path) for kind, path in answers[0]["saved"].items()}
    assert_same(read_midi(saved["midi"]), notes, tolerance=0.002)
    with saved["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(notes)
    assert {(row["pitch"], row["program"]) for row in rows if row["is_drum"] == "False"} == {
        (str(note.pitch), str(note.program)) for note in notes if not note.is_drum
    }
    text = saved["musicxml"].read_text()
    assert text.count("<score-part ") == len({(n.is_drum, n.program) for n in notes})
    assert text.count("<measure ") % text.count("<score-part ") == 0


def test_what_sounds_where_a_recording_breaks_off_ends_with_it(page, recordings, tmp_path):
    bundle, own_page = tmp_path / "endless", tmp_path / "page"
    shutil.copytree(find_preset("small"), bundle)
    endless = dataclasses.replace(RollDecoding.read(bundle), end_limit=1.0)
    (bundle / "decoding.json").write_text(endless.to_json())
    shutil.copytree(page, own_page)
    assert write_model(["--model", str(bundle), "--out_dir", str(own_page)]) == 0
    expected = Transcriber.from_preset(str(bundle), engine="litert").transcribe(recordings[1])
    assert sum(note.offset == expected.duration for note in expected.notes) > 10
    (answer,) = ask(own_page, tmp_path, {"do": "transcribe", "file": str(recordings[1])})
    assert_same(to_notes(answer["notes"]), expected.notes)


@pytest.mark.skipif("MT3_SHARED" not in os.environ, reason="needs the clips of MT3_SHARED")
def test_the_page_reads_the_notes_of_real_clips_that_python_reads(page, transcriber, tmp_path):
    audio = pathlib.Path(os.environ["MT3_SHARED"]) / "data/dev/audio"
    paths = sorted(audio.glob("*.flac"), key=lambda path: path.stat().st_size)[:4]
    answers = ask(page, tmp_path, *({"do": "transcribe", "file": str(path)} for path in paths))
    for path, answer in zip(paths, answers, strict=True):
        assert_same(to_notes(answer["notes"]), transcriber.transcribe(path).notes)


def test_what_a_user_does_with_a_result(page, tmp_path):
    (answer,) = ask(page, tmp_path, {"do": "use", "file": str(EXAMPLE)})
    fewer = Transcriber.from_preset("small", engine="litert", least_confidence=0.8)
    expected = fewer.transcribe(EXAMPLE).notes
    shown = [note for note in to_notes(answer["fewer"]) if not note.is_drum]
    assert_same(shown, [note for note in expected if not note.is_drum])
    played, of = answer["played"]["time"].split(" / ")
    assert "0:00" < played <= of == "0:11"
    assert "Only the recording" not in answer["played"]["status"]
    assert {note.program for note in read_midi(answer["midi"])} == {40}
    bars = read_beats(answer["inBars"]["midi"])
    assert bars.beats_per_bar == 3
    at = min(abs(time - float(answer["inBars"]["seconds"])) for time in bars.downbeats)
    assert at < 60 / bars.beats_per_minute / 2
    text = pathlib.Path(answer["inBars"]["musicxml"]).read_text()
    assert "<beats>3</beats>" in text and "<beats>4</beats>" not in text
    assert "Fiddle" in answer["note"]
    assert answer["rows"] and not answer["nameless"]


def test_what_cannot_be_transcribed_is_a_sentence(page, tmp_path):
    text = tmp_path / "text.mp3"
    text.write_text("no music\n" * 100)
    (tmp_path / "nothing.wav").write_bytes(b"")
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(8000), 8000)
    files = {
        text: "text.mp3 cannot be read as audio",
        tmp_path / "nothing.wav": "nothing.wav is empty",
        write_silence(tmp_path / "zero.wav", 0): "zero.wav is empty",
        silent: "silent.wav is silent",
        write_silence(tmp_path / "long.wav", 32 * 60): "long.wav is 32 minutes long",
    }
    refused, microphone, heard, stopped = ask(
        page,
        tmp_path,
        {"do": "refuse", "files": [str(path) for path in files]},
        {"do": "microphone", "isAllowed": False},
        {"do": "microphone", "isAllowed": True},
        {"do": "stop", "file": str(write_silence(tmp_path / "twenty.wav", 20 * 60))},
    )
    for error, sentence in zip(refused["errors"], files.values(), strict=True):
        assert error.startswith(sentence) and error.endswith(".")
    assert microphone["error"].startswith("The microphone was refused.")
    assert heard["status"].startswith("recording ")
    assert stopped["working"].endswith("left. It is 20 minutes long.")
    assert "stopped at 0:" in stopped["stopped"]


def test_all_but_the_sounds_of_the_page_take_less_than_25_mb(page):
    sizes = {path: path.stat().st_size for path in page.rglob("*") if path.is_file()}
    compatible = sum(size for path, size in sizes.items() if "compat" in path.name)
    sounds = sizes[page / "sounds" / "font.sf3"]
    # A browser loads one of the two builds of LiteRT.
    assert sum(sizes.values()) - sounds - compatible < 25e6


def test_serve_gives_the_page_to_this_machine_alone(tmp_path, capsys):
    assert __main__.main(["serve", "--folder", str(tmp_path), "--nobrowser"]) == 2
    assert "holds no page; build it with make web" in capsys.readouterr().err
    (tmp_path / "index.html").write_text("<p>page")
    (tmp_path / "a.wasm").write_bytes(b"\0asm")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    with serving(tmp_path) as address:
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as answer:
            assert answer.read() == b"<p>page"
        with urllib.request.urlopen(f"{address}a.wasm") as answer:
            assert answer.headers["Content-Type"] == "application/wasm"
        for path in ("model/", "../x", "%2e%2e/%2e%2e/etc/passwd"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + path)
        port = address.rstrip("/").rpartition(":")[2]
        arguments = ["serve", "--folder", str(tmp_path), "--port", port, "--nobrowser"]
        assert __main__.main(arguments) == 2
    assert f"port {port} cannot be used" in capsys.readouterr().err
