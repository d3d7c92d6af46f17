"""The command mt3: what it writes, what it prints, how it ends."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import zlib

import mido
import numpy as np
import pytest
import soundfile

from mt3_keras import __version__
from mt3_keras.__main__ import COMMANDS, main
from mt3_keras.cli.command_line import Command, UsageError, run
from mt3_keras.files import read_label
from mt3_keras.midi import read_midi, write_midi
from mt3_keras.notes import Note
from tests.conftest import ROOT


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "audio" / "a song.wav"
    path.parent.mkdir()
    write_noise(path)
    return path


def write_noise(path, seconds=3.0, rate_hz=16_000, channels=1, **options):
    rng = np.random.default_rng(1)
    shape = (int(seconds * rate_hz), channels)
    soundfile.write(path, 0.1 * rng.normal(size=shape), rate_hz, **options)


@pytest.fixture
def transcribe(tiny_preset, tmp_path):
    def run(*arguments):
        model = ["--model", str(tiny_preset), "--batch_size", "2", "--max_tokens", "24"]
        return main(
            ["transcribe", *model, "--output_dir", str(tmp_path / "out"), *map(str, arguments)]
        )

    return run


def files_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_every_format_tells_of_the_same_notes(transcribe, recording, tmp_path, capsys):
    assert transcribe(recording, "--formats", "mid,json,csv,jsonl,png") == 0
    out = tmp_path / "out"
    assert files_in(out) == [f"a song.{f}" for f in ("csv", "json", "jsonl", "mid", "png")]
    assert "notes" in capsys.readouterr().out
    content = json.loads((out / "a song.json").read_text())
    lines = [json.loads(line) for line in (out / "a song.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((out / "a song.csv").open()))
    assert len(content["notes"]) == len(lines) == len(rows)
    key = lambda n: (n["onset"], n["is_drum"], n["program"], n["pitch"], n["offset"])  # noqa: E731
    told = [{k: v for k, v in line.items() if k != "file"} for line in lines]
    assert sorted(told, key=key) == sorted(content["notes"], key=key)
    assert (out / "a song.png").read_bytes().startswith(b"\x89PNG")
    for part in {(n["program"], n["is_drum"]) for n in content["notes"]}:
        assert part in {(n.program, n.is_drum) for n in read_midi(out / "a song.mid")}


def tempos_of(path):
    return [m.tempo for m in mido.MidiFile(path).tracks[0] if m.type == "set_tempo"]


def test_beats_are_found_left_out_or_given(tmp_path):
    band = ROOT / "examples" / "band.flac"
    for beats in ("auto", "off", "93.5"):
        arguments = ["--output_dir", str(tmp_path / beats), "--beats", beats, "--noprogress"]
        assert main(["transcribe", str(band), "--formats", "mid,json", *arguments]) == 0
    read = {beats: read_midi(tmp_path / beats / "band.mid") for beats in ("auto", "off", "93.5")}
    for notes in zip(*(sort_by_pitch(found) for found in read.values()), strict=True):
        for note in notes[1:]:
            assert note == pytest.approx(notes[0], abs=2e-3)
    found = json.loads((tmp_path / "auto" / "band.json").read_text())["beats"]
    assert len(found["times"]) == len(found["numbers"]) > 15
    assert json.loads((tmp_path / "off" / "band.json").read_text())["beats"] is None
    assert tempos_of(tmp_path / "off" / "band.mid") == [500_000]
    assert round(6e7 / tempos_of(tmp_path / "93.5" / "band.mid")[-1], 2) == 93.5
    assert 6e7 / tempos_of(tmp_path / "auto" / "band.mid")[-1] == pytest.approx(107.9, rel=0.01)


def sort_by_pitch(notes):
    return sorted(notes, key=lambda n: (n.is_drum, n.program, n.pitch, round(n.onset, 2)))


def test_a_dash_streams_json_lines_to_standard_output(transcribe, recording, tmp_path, capsys):
    assert transcribe(recording, "--output_dir", "-") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line["file"] == "a song.wav" for line in lines)
    assert files_in(tmp_path) == ["audio/a song.wav"]


def test_folders_keep_their_shape_and_names_stay_apart(transcribe, recording, tmp_path):
    deeper = recording.parent / "disc 1"
    deeper.mkdir()
    write_noise(deeper / "a song.wav", 0.5)
    write_noise(recording.with_suffix(".flac"), 0.5)
    assert transcribe(recording.parent) == 0
    expected = ["a song.flac.mid", "a song.wav.mid", "disc 1/a song.mid"]
    assert files_in(tmp_path / "out") == expected


def test_a_dash_is_a_recording_on_standard_input(transcribe, recording, tmp_path, monkeypatch):
    with recording.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert transcribe("-") == 0
    assert transcribe(recording) == 0
    out = tmp_path / "out"
    assert read_midi(out / "standard_input.mid") == read_midi(out / "a song.mid")


@pytest.mark.parametrize("stdin", [io.StringIO(), io.TextIOWrapper(io.BytesIO())])
def test_nothing_on_standard_input_is_said_so(transcribe, monkeypatch, capsys, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    assert transcribe("-") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and ("on standard input" in message or "is empty" in message)


def test_what_is_done_is_skipped_on_resume(transcribe, recording, tmp_path, capsys):
    assert transcribe(recording) == 0
    written = tmp_path / "out" / "a song.mid"
    written.write_bytes(b"kept")
    assert transcribe(recording, "--resume") == 0
    assert written.read_bytes() == b"kept"
    assert "all done" in capsys.readouterr().err


def test_a_result_is_of_one_recording_also_between_runs(transcribe, recording, tmp_path, capsys):
    other = tmp_path / "other" / "a song.wav"
    other.parent.mkdir()
    shutil.copy(recording, other)
    assert transcribe(recording) == 0
    written = tmp_path / "out" / "a song.mid"
    if read_label(written) is None:
        pytest.skip("this file system has no labels")
    assert transcribe(other, "--resume") == 0
    assert "all done" in capsys.readouterr().err  # the same content
    write_noise(other, 0.5)
    before, label = written.read_bytes(), read_label(written)
    for options in ([], ["--resume"]):
        assert transcribe(other, *options) == 1
        assert "of another recording" in capsys.readouterr().err
        assert written.read_bytes() == before
    write_noise(recording, 0.5, channels=2)  # recorded anew
    assert transcribe(recording, "--resume") == 0
    assert read_label(written) != label


def test_one_bad_file_does_not_stop_the_rest(transcribe, recording, tmp_path, capsys):
    (recording.parent / "bad.wav").write_text("this is text")
    assert transcribe(recording.parent) == 1
    assert files_in(tmp_path / "out") == ["a song.mid"]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "bad.wav" in lines[0]
    assert "1 of 2" in lines[1]


def truncate(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def make_bad(kind, path):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0), 16_000)
    elif kind in ("nan", "infinite"):
        samples = np.zeros(16_000)
        samples[100] = np.nan if kind == "nan" else np.inf
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
    elif kind == "truncated flac":
        write_noise(path.with_suffix(".flac"))
        truncate(path.with_suffix(".flac"))
        path.with_suffix(".flac").rename(path)
    elif kind == "truncated wav":
        write_noise(path)
        truncate(path)
    elif kind == "folder":
        path.mkdir()


BAD = ("empty", "text", "no samples", "nan", "infinite", "truncated flac", "truncated wav")


@pytest.mark.parametrize("kind", [*BAD, "missing", "folder"])
def test_bad_recordings_give_one_line_and_no_output(transcribe, tmp_path, capfd, kind):
    path = tmp_path / "the file.wav"
    make_bad(kind, path)
    before = files_in(tmp_path)
    assert transcribe(path, "--formats", "mid,jsonl,json") != 0
    lines = capfd.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("mt3: ")]) == 1
    assert "Traceback" not in "".join(lines)
    if kind != "folder":
        assert "the file.wav" in lines[0]
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("8 bit.wav", {"subtype": "PCM_U8"}),
        ("24 bit.wav", {"subtype": "PCM_24"}),
        ("192 kHz.wav", {"rate_hz": 192_000, "seconds": 0.5}),
        ("8 channels.wav", {"channels": 8}),
        ("10 ms.wav", {"seconds": 0.01}),
        ("low.wav", {"rate_hz": 8000}),
        ("stereo.mp3", {"rate_hz": 44_100, "channels": 2}),
        ("stereo.ogg", {"rate_hz": 44_100, "channels": 2}),
    ],
)
def test_recordings_of_every_kind_are_read(transcribe, tmp_path, name, options):
    write_noise(tmp_path / name, **options)
    assert transcribe(tmp_path / name) == 0
    assert files_in(tmp_path / "out") == [pathlib.Path(name).stem + ".mid"]


def test_an_unreadable_recording_is_named(transcribe, recording, capsys):
    recording.chmod(0)
    if os.access(recording, os.R_OK):
        pytest.skip("this user may read everything")
    assert transcribe(recording) == 1
    assert "a song.wav" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_named(transcribe, recording, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert transcribe(recording, "--output_dir", tmp_path / "taken" / "out") == 2
    assert "taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--formats", "mid,doc", "x.wav"], "doc"),
        (["--instruments", "vioiln", "{recording}"], "violin"),
        (["--exact", "--context", "full", "{recording}"], "--context"),
        (["--exact", "--instruments", "piano", "{recording}"], "--instruments"),
        (["--exact", "--least_confidence=0", "{recording}"], "--least_confidence"),
        (["--contxt", "full", "{recording}"], "context"),
        (["--batch_size", "0", "{recording}"], "batch_size"),
        ([], "at least one recording"),
        (["--engine", "litert", "{recording}"], "engine"),
        (
            ["--least_confidence=0.5", "{recording}"],
            "least_confidence is for networks that predict",
        ),
        (["{recording}", "--beats", "fast"], "--beats is auto, off or 20 to 400 beats a minute"),
        (["{recording}", "--beats", "4000"], "--beats is auto, off or 20 to 400 beats a minute"),
    ],
)
def test_wrong_usage_is_told_in_one_message(transcribe, recording, capsys, arguments, said):
    assert transcribe(*[a.format(recording=recording) for a in arguments]) != 0
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--max_tokens=8"], "max_tokens is for networks that emit tokens"),
        (["--constrained"], "constrained is for networks that emit tokens"),
        (["--nostop_runaways"], "--nostop_runaways is for networks that emit tokens"),
        (["--least_confidence=2"], "least_confidence must be 0 to 1"),
    ],
)
def test_flags_that_a_detector_has_no_use_for_are_refused_in_one_line(
    detector_bundle, recording, tmp_path, capfd, arguments, complaint
):
    flags = [f"--model={detector_bundle}", f"--output_dir={tmp_path / 'out'}", "--engine=litert"]
    assert main(["transcribe", *flags, *arguments, str(recording)]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert complaint in line
    assert files_in(tmp_path) == ["audio/a song.wav"]


def test_a_missing_model_is_told_with_the_cure(recording, capsys):
    assert main(["transcribe", str(recording), "--model", "nowhere"]) == 1
    assert "nowhere: no such model" in capsys.readouterr().err


def test_help_and_version_import_neither_numpy_nor_a_framework():
    code = """
import sys
from mt3_keras.__main__ import COMMANDS, main
for argv in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
    assert main(argv) == 0, argv
heavy = {"numpy", "keras", "tensorflow", "jax", "ai_edge_litert", "librosa", "matplotlib", "scipy"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--instruments" in run.stdout
    assert f"mt3 {__version__}" in run.stdout


def test_the_list_of_commands_states_the_first_line_of_each():
    for name, summary in COMMANDS.items():
        command = importlib.import_module(f"mt3_keras.cli.{name}").COMMAND
        assert command.text.splitlines()[0] == summary


def test_pictures_take_no_part_of_the_process_wide_plotting_state(tmp_path):
    code = f"""
import sys
from mt3_keras.notes import Note
from mt3_keras.plots import plot_curves, plot_piano_roll
plot_piano_roll([Note(0.5, 1.5, 60, 90)], {str(tmp_path / "notes.png")!r})
plot_curves([dict(step=1, loss=2.0, onset_loss=1.0)], {str(tmp_path / "curves.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    for name in ("notes.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_closed_streams_and_foreign_plot_backends_do_no_harm(recording, tmp_path):
    code = "import sys; from mt3_keras.__main__ import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["transcribe", recording, "--formats=mid,png", f"--output_dir={tmp_path / 'out'}"]
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        shell = ["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-c", code, *arguments]
        environment = {**os.environ, "MPLBACKEND": "module://nowhere.backend_inline"}
        done = subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), closed
        assert files_in(tmp_path / "out") == ["a song.mid", "a song.png"]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("--a is needed"), 2, "p.q: --a is needed\nSee python -m p.q --help."),
        (ValueError("a must be\n positive"), 1, "p.q: a must be positive"),
        (OSError(28, "No space left on device", "out"), 1, "p.q: out: No space left on device"),
        (OSError("Can't write\n(disk full)"), 1, "p.q: Can't write (disk full)"),
        (KeyboardInterrupt("stopped and saved"), 130, "p.q: stopped and saved"),
        (KeyboardInterrupt(), 130, "p.q: stopped"),
    ],
)
def test_a_command_ends_with_one_message_and_its_code(capsys, error, code, said):
    def work(values, arguments):
        raise error

    command = Command("", "Does it.", lambda values: None, work)
    assert run("p.q", command, []) == code
    assert capsys.readouterr().err == said + "\n"


@pytest.mark.parametrize(
    "error",
    [
        KeyError("bias"),
        RecursionError("maximum recursion depth exceeded"),
        MemoryError(),
        EOFError(),
        csv.Error("field larger than field limit"),
        zlib.error("Error -3"),
        ImportError("no such library"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
)
def test_whatever_is_thrown_is_one_line_that_names_the_file_and_raised_with_debug(capsys, error):
    ours = {"__name__": "mt3_keras.stand_in", "error": error}
    exec("def read(path):\n    raise error", ours)
    path = pathlib.Path("a", "b.wav")
    command = Command("", "", lambda values: None, lambda *_: ours["read"](path))
    assert run("p.q", command, []) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("p.q: a/b.wav: ")
    with pytest.raises(type(error)):
        run("p.q", command, ["--debug"])


def test_a_terminal_is_sent_no_control_codes(capsys):
    def work(values, arguments):
        raise ValueError("\x1b]0;owned\x07\u202e.wav: is damaged")

    run("p.q", Command("", "", lambda values: None, work), [])
    assert capsys.readouterr().err == "p.q: \\x1b]0;owned\\x07\\u202e.wav: is damaged\n"


def start_work(work, **options):
    """A process whose command does `work`, a statement."""
    code = f"""
import os, pathlib, sys, time
from mt3_keras.cli.command_line import Command, run
from mt3_keras.files import replacing
def work(values, arguments):
    {work}
sys.exit(run("p.q", Command("", "", lambda values: None, work), []))
"""
    streams = {name: options.pop(name, subprocess.PIPE) for name in ("stdout", "stderr")}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **streams, **options)


def test_work_goes_on_when_nobody_reads_its_output(tmp_path):
    work = f"sys.stdin.read(); print('x' * 10**6); pathlib.Path({str(tmp_path)!r}, 'a').touch()"
    with start_work(work, stdin=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert files_in(tmp_path) == ["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_output_that_could_not_be_written_is_a_failure():
    with (
        pathlib.Path("/dev/full").open("w") as full,
        start_work("print('notes')", stdout=full) as process,
    ):
        assert process.stderr.read() == b"p.q: No space left on device\n"
    assert process.returncode == 1


def test_letters_that_a_terminal_lacks_are_no_failure():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with start_work(r"print('\u97f3\udce9')", env=environment) as process:
        assert process.communicate() == (b"\\u97f3\\udce9\n", b"")
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="of POSIX")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_command_that_is_ended_leaves_no_temporary_file(tmp_path, name, code):
    work = f"""
    with replacing({str(tmp_path / "out")!r}):
        print("ready", flush=True)
        time.sleep(60)"""
    with start_work(work) as process:
        process.stdout.readline()
        process.send_signal(signal.Signals[name])
        assert process.communicate()[1].decode() == f"p.q: stopped by {name}\n"
    assert process.returncode == code
    assert files_in(tmp_path) == []


def test_a_tilde_that_no_shell_expanded_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = []

    def define(add):
        add.text("output", None, "")

    def work(values, arguments):
        found.extend([values.output, *arguments])

    arguments = ["--output=~/a=b", "~/c", "~d", "e=~/f"]
    run("p.q", Command("", "", define, work, takes_arguments=True), arguments)
    assert found == [f"{tmp_path}/a=b", f"{tmp_path}/c", "~d", "e=~/f"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_recordings_of_any_name_are_written_inside_the_output_folder(
    transcribe, recording, tmp_path, capsys
):
    names = ["$x^^$.wav", "a\x1b[31m.wav", os.fsdecode(b"caf\xe9.wav"), "..wav", "...wav"]
    for name in names:
        shutil.copy(recording, tmp_path / "audio" / name)
    recording.unlink()
    assert transcribe(*(tmp_path / "audio" / name for name in names), "--formats=mid,png") == 0
    assert "\x1b[31m" not in capsys.readouterr().out
    found = {path for path in tmp_path.rglob("*") if path.suffix in (".mid", ".png")}
    assert len(found) == 10
    assert {path.parent for path in found} == {tmp_path / "out"}


def test_unknown_commands_are_told(capsys):
    assert main(["transcirbe"]) == 2
    assert "transcribe" in capsys.readouterr().err
    assert main([]) == 2


def test_evaluating_a_file_against_itself_is_perfect(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_midi([Note(0.5, 1.5, 60, 90), Note(1, 2, 40, 80, 33)], tmp_path / folder / "x.mid")
    files = ["--reference", str(tmp_path / "a"), "--estimate", str(tmp_path / "b")]
    assert main(["evaluate", *files, "--json", str(tmp_path / "s.json")]) == 0
    assert "1.0000" in capsys.readouterr().out
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["mean"]["Onset + offset F1"] == 1.0
    (tmp_path / "b" / "x.mid").unlink()
    assert main(["evaluate", *files]) == 2
    assert "x.mid" in capsys.readouterr().err


def test_one_bad_reference_does_not_stop_the_rest(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in "xy":
            write_midi([Note(0.5, 1.5, 60, 90)], tmp_path / folder / f"{name}.mid")
    (tmp_path / "a" / "._x.mid").write_bytes(b"Mac OS X")
    files = ["--reference", str(tmp_path / "a"), "--estimate", str(tmp_path / "b")]
    assert main(["evaluate", *files]) == 0
    assert "mean of 2" in capsys.readouterr().out
    (tmp_path / "a" / "y.mid").write_bytes(b"damaged")
    assert main(["evaluate", *files]) == 1
    printed = capsys.readouterr()
    assert "Onset F1" in printed.out
    assert "y.mid" in printed.err
    (tmp_path / "a" / "x.mid").write_bytes(b"damaged")
    assert main(["evaluate", *files]) == 1


def test_a_converted_checkpoint_transcribes_as_the_original(tmp_path, capsys):
    from mt3_keras.models.config import MT3Config, T5Config
    from mt3_keras.models.loading import load_model
    from tests.t5x_writer import random_leaves, write_t5x

    sizes = {"width": 16, "num_heads": 1, "mlp_width": 32, "num_encoder_layers": 1}
    config = MT3Config(network=T5Config(num_decoder_layers=1, **sizes))
    write_t5x(tmp_path / "t5x", random_leaves(config))
    arguments = ["--t5x_checkpoint", str(tmp_path / "t5x"), "--output", str(tmp_path / "preset")]
    assert main(["convert", *arguments]) == 0
    original, preset = load_model(tmp_path / "t5x"), load_model(tmp_path / "preset")
    for a, b in zip(original.get_weights(), preset.get_weights(), strict=True):
        assert (a == b).all()
    assert main(["convert", *arguments]) == 1
    assert "already exists" in capsys.readouterr().err
    (tmp_path / "t5x" / "checkpoint").write_bytes(b"\x00")
    arguments[-1] = str(tmp_path / "other")
    assert main(["convert", *arguments]) == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_of_a_large_tensor_is_kept_for_the_next() -> None:
    code = """
import resource
import numpy as np
from mt3_keras.process import keep_freed_memory
keep_freed_memory()
def faults_of_a_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(100 * 2**20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults_of_a_tensor(), faults_of_a_tensor())
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    first, second = map(int, printed.split())
    assert first > 40  # were they pages of 2 MiB
    assert second < 10
