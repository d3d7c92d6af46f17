"""python -m export.stream on a bundle: what it writes, what it says, how it ends."""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from typing import Any

import numpy as np
import pytest
import soundfile

from export.stream import main
from mt3_keras.__main__ import main as offline
from mt3_keras.grammar import Grammar, Rules
from mt3_keras.midi import read_instruments, read_midi
from mt3_keras.segments import cut_segments
from tests.conftest import ROOT

ai_edge_litert = pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert")

from mt3_keras.engines.litert import EdgeModel, search_one  # noqa: E402

MAX_TOKENS = 64  # of the tiny model
# An untrained network emits nonsense, and never ends it.
RULES = ["--constrained", "--nostop_runaways"]


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "a song.wav"
    soundfile.write(path, noise(5.3), 16_000, subtype="FLOAT")
    return path


@pytest.fixture
def stream(tiny_bundle, tmp_path, monkeypatch):
    def run(*arguments):
        return main(["--bundle", str(tiny_bundle), *RULES, *map(str, arguments)])

    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def stream_detector(detector_bundle, tmp_path, monkeypatch):
    def run(*arguments):
        return main(["--bundle", str(detector_bundle), *map(str, arguments)])

    monkeypatch.chdir(tmp_path)
    return run


def noise(seconds):
    return (0.1 * np.random.default_rng(4).normal(size=int(16_000 * seconds))).astype(np.float32)


def files_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("rules", [[], ["--instruments", "piano,bass,drums"]])
def test_the_command_writes_the_notes_of_the_offline_path(tiny_bundle, stream, recording, rules):
    assert stream(recording, "--output", "new/streamed.mid", *rules) == 0
    whole = ["--model", str(tiny_bundle), "--engine", "litert", "--output_dir", "."]
    assert offline(["transcribe", str(recording), *whole, "--beats=off", *RULES, *rules]) == 0
    streamed, written = (recording.parent / name for name in ("new/streamed.mid", "a song.mid"))
    assert read_midi(streamed) == read_midi(written) != []


def test_the_command_writes_the_notes_of_the_offline_path_of_a_detector(
    detector_bundle, stream_detector, recording
):
    assert stream_detector(recording, "--output", "new/streamed.mid") == 0
    whole = ["--model", str(detector_bundle), "--engine", "litert", "--output_dir", "."]
    assert offline(["transcribe", str(recording), *whole, "--beats=off"]) == 0
    streamed, written = (
        sorted((note[:4], note.is_drum) for note in read_midi(recording.parent / name))
        for name in ("new/streamed.mid", "a song.mid")
    )
    assert streamed == written != []  # a stream names by what it knows so far


@pytest.mark.parametrize("flags", [[], ["--tie_forcing", "--threads=1"]])
def test_each_note_is_a_line_and_nothing_else_is_printed(stream, recording, capfd, flags):
    assert stream(recording, *flags) == 0
    check_lines(capfd)


def test_each_note_of_small_steps_is_a_line(stream_detector, recording, capfd):
    assert stream_detector(recording, "--low_latency", "--instruments=piano,drums") == 0
    check_lines(capfd)


def check_lines(capfd):
    told, complained = capfd.readouterr()
    assert not complained  # LiteRT, too, is quiet
    *lines, summary = told.splitlines()
    notes = read_midi("out/a song.mid")
    assert notes
    assert summary.endswith("-> out/a song.mid")
    assert f" {len(notes)} notes" in summary
    onsets = sorted(float(line.split()[0]) for line in lines)
    assert onsets == pytest.approx([note.onset for note in notes], abs=0.01)


@pytest.mark.parametrize("network", ["tokens", "rolls"])
def test_a_terminal_shows_a_line_for_each_instrument(
    stream, stream_detector, recording, monkeypatch, network
):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "150")
    assert (stream if network == "tokens" else stream_detector)(recording) == 0
    status, *lines, _summary = draw(terminal.getvalue())
    instruments = read_instruments("out/a song.mid")
    assert len(instruments) > (network == "tokens")  # the notes of a detector are one part here
    told = {line[:24].rstrip(): int(line[24:31]) for line in lines}
    assert told == {part.name: len(part.notes) for part in instruments}
    assert status.split()[:2] == ["5.3", "s"]
    assert all(len(line) < 60 for line in lines)


def draw(text):
    """What a terminal shows in the end."""
    screen, row = [], 0
    for up, line in re.findall(r"(?:\x1b\[(\d+)A)?(?:\x1b\[2K)?([^\n\x1b]*)\n", text):
        row -= int(up or 0)
        screen[row : row + 1] = [line]
        row += 1
    return screen


def test_a_file_in_real_time_is_not_ahead_of_it(stream, tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    monkeypatch.setattr("time.sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    soundfile.write(tmp_path / "short.wav", noise(1.5), 16_000)
    assert stream("short.wav", "--realtime") == 0
    assert clock.now == pytest.approx(1.5)


class Microphone:
    """Gives a recording to the callback; then comes Ctrl-C, or the microphone is pulled out."""

    samples = noise(3.1)
    ends_by_interrupt = True

    def __init__(self, *, callback, finished_callback, samplerate, **_):
        assert samplerate == 16_000
        self.hear, self.finish = callback, finished_callback
        self.thread = threading.Thread(target=self.play)

    def play(self):
        for block in np.array_split(self.samples, 31):
            self.hear(block[:, None], block.size, None, None)
        if self.ends_by_interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        else:
            self.finish()

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.thread.join()


@pytest.mark.parametrize("ends_by_interrupt", [True, False])
def test_a_microphones_notes_are_those_of_its_recording(
    stream, tmp_path, monkeypatch, ends_by_interrupt
):
    sounddevice = types.SimpleNamespace(
        InputStream=Microphone,
        PortAudioError=RuntimeError,
        query_devices=lambda kind: {"default_samplerate": 16_000.0},
    )
    monkeypatch.setitem(sys.modules, "sounddevice", sounddevice)
    monkeypatch.setattr(Microphone, "ends_by_interrupt", ends_by_interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert stream("--microphone", "--output", "heard.mid") == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert read_midi("heard.mid")
    soundfile.write(tmp_path / "a.wav", Microphone.samples, 16_000, subtype="FLOAT")
    assert stream("a.wav") == 0
    assert (tmp_path / "heard.mid").read_bytes() == (tmp_path / "out" / "a.mid").read_bytes()


def test_without_sounddevice_the_microphone_is_refused(stream, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert stream("--microphone") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "sounddevice" in line
    assert files_in(tmp_path) == []


def make_bad(kind, folder, bundle, detector):
    """Arguments that cannot work."""
    good = folder / "good"
    shutil.copytree(bundle, good)
    shutil.copytree(detector, folder / "detector")
    soundfile.write(folder / "a.wav", noise(0.5), 16_000)
    (folder / "text.wav").write_text("this is text")
    (folder / "a file").write_text("")
    if kind == "config alone":
        (good / "model.tflite").unlink()
    elif kind == "foreign network":
        (good / "model.tflite").write_bytes(b"not a network" * 100)
    elif kind == "another network's config":
        config = json.loads((good / "config.json").read_text())
        config["config"]["network"]["num_heads"] += 1
        (good / "config.json").write_text(json.dumps(config))
    return {
        "missing bundle": ["--bundle=none", "a.wav"],
        "text as sound": ["--bundle=good", "text.wav"],
        "missing sound": ["--bundle=good", "none.wav"],
        "no sound": ["--bundle=good"],
        "two sounds": ["--bundle=good", "a.wav", "a.wav"],
        "microphone and sound": ["--bundle=good", "a.wav", "--microphone"],
        "small steps of tokens": ["--bundle=good", "a.wav", "--low_latency"],
        "ties of a detector": ["--bundle=detector", "a.wav", "--tie_forcing"],
        "constrained detector": ["--bundle=detector", "a.wav", "--constrained"],
        "unknown instrument": ["--bundle=good", "a.wav", "--instruments=vuvuzela"],
        "output in a file": ["--bundle=good", "a.wav", "--output=a file/a.mid"],
        "output a folder": ["--bundle=good", "a.wav", "--output=good"],
    }.get(kind, ["--bundle=good", "a.wav"])


WRONG_USAGE = (
    *("no sound", "two sounds", "microphone and sound"),
    *("output in a file", "output a folder"),
)
WRONG_INPUT = (
    *("config alone", "foreign network", "another network's config", "missing bundle"),
    *("text as sound", "missing sound", "unknown instrument"),
    *("small steps of tokens", "ties of a detector", "constrained detector"),
)


@pytest.mark.parametrize("kind", WRONG_USAGE + WRONG_INPUT)
def test_what_cannot_work_ends_with_one_line_and_no_output(
    tiny_bundle, detector_bundle, tmp_path, monkeypatch, capsys, kind
):
    monkeypatch.chdir(tmp_path)
    arguments = make_bad(kind, tmp_path, tiny_bundle, detector_bundle)
    before = files_in(tmp_path)
    assert main(arguments) == (2 if kind in WRONG_USAGE else 1)
    told, complained = capsys.readouterr()
    assert not told
    line, *hint = complained.splitlines()
    assert line.startswith("export.stream: ")
    assert hint == (["See python -m export.stream --help."] if kind in WRONG_USAGE else [])
    assert files_in(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_it_loads_neither_keras_nor_what_a_device_lacks(tiny_bundle, recording):
    script = (
        "import sys, export.stream;"
        "code = export.stream.main(sys.argv[1:]);"
        "loaded = {'keras', 'tensorflow', 'msgpack', 'librosa'} & {*sys.modules};"
        "assert not loaded and not code, (loaded, code)"
    )
    output = recording.with_suffix(".mid")
    for arguments in (["--help"], ["--bundle", tiny_bundle, recording, "--output", output]):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert output.exists()


@pytest.fixture
def search_tokens(tiny_bundle):
    """The segments of noise(5.3) and the tokens of each."""
    model = EdgeModel(tiny_bundle)
    grammar = Grammar(model.model_config, Rules(), np)
    segments = list(cut_segments([noise(5.3)], model.model_config, "full"))
    found = [search_one(model, grammar, MAX_TOKENS, segment).tokens for segment in segments]
    return segments, found


def test_the_loop_of_the_docs_emits_the_tokens_of_the_search(tiny_bundle, search_tokens):
    section = (ROOT / "docs/devices.md").read_text().split("## The loop of a token network")[1]
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0], names)
    for segment, tokens in zip(*search_tokens, strict=True):
        inputs = segment.samples, segment.num_frames
        assert names["write_tokens"](tiny_bundle, *inputs, MAX_TOKENS) == tokens
        assert len(tokens) > 1


def test_the_example_in_cpp_writes_the_tokens_of_the_search(tiny_bundle, search_tokens, tmp_path):
    folder = pathlib.Path(ai_edge_litert.__path__[0])
    if not (shutil.which("g++") and (folder / "libLiteRt.so").exists()):
        pytest.skip("needs g++ and LiteRT for Linux")
    headers = tmp_path / "litert" / "c"
    headers.mkdir(parents=True)
    for name in re.findall(r'"litert/c/(.*)"', (ROOT / "examples" / "edge.cc").read_text()):
        (headers / name).write_text(f'#include "{ROOT}/tests/litert_c_api.h"\n')
    link = [folder / "libLiteRt.so", f"-Wl,-rpath,{folder}"]
    compiler = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", tmp_path]
    subprocess.run(
        [*compiler, ROOT / "examples/edge.cc", "-o", tmp_path / "edge", *link], check=True
    )
    noise(5.3).tofile(tmp_path / "noise.f32")
    command = [tmp_path / "edge", tiny_bundle / "model.tflite", tmp_path / "noise.f32"]
    done = subprocess.run(
        [*command, str(MAX_TOKENS)], check=True, capture_output=True, text=True, timeout=60
    )
    written = [[int(token) for token in line.split()] for line in done.stdout.splitlines()]
    assert written == search_tokens[1]
