"""The client against a stand-in for TF Serving: both interfaces, cutting, errors, load."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import keras
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from export.main import main as export
from export.serving_client import main
from mt3_keras.audio import read_blocks
from mt3_keras.engines.serving import (
    GrpcServer,
    Request,
    RestServer,
    ServedConfig,
    ServingError,
    Signatures,
    Unavailable,
    _reading,
    _to_outputs,
    call_patiently,
    cut_requests,
    transcribe,
)
from mt3_keras.grammar import Rules
from mt3_keras.midi import read_midi
from mt3_keras.models.config import MT3, SMALL
from mt3_keras.notes import Note, sort_notes
from mt3_keras.segments import cut_segments
from mt3_keras.transcriber import Transcriber
from mt3_keras.wav import fits_wav, to_wav
from tests.conftest import ROOT, make_output
from tests.detectors import EAGER, MINI, build
from tests.test_saved_model import MAX_TOKENS, melody, run_alone

grpc = pytest.importorskip("grpc", reason="needs requirements-serving.txt")
pytest.importorskip("tensorflow_serving", reason="needs requirements-serving.txt")
tf = pytest.importorskip("tensorflow")
if keras.backend.backend() != "tensorflow":
    pytest.skip("a SavedModel is written by TensorFlow", allow_module_level=True)

SAMPLES = melody(250_000)
# Windows reach back over more than a hop.
SHORT = dataclasses.replace(MINI, network=dataclasses.replace(MINI.network, segment_frames=8))


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    from export.saved_model import export_saved_model
    from export.served_model import ServedModel

    folder = tmp_path_factory.mktemp("exported")
    served = ServedModel(tiny_model, rules=Rules(), max_tokens=MAX_TOKENS)
    export_saved_model(served, folder, name="tiny")
    return folder / "tiny"


@pytest.fixture(scope="module")
def exported_detector(tmp_path_factory):
    from export.saved_model import export_saved_model
    from export.served_model import ServedDetector

    folder = tmp_path_factory.mktemp("exported")
    export_saved_model(ServedDetector(build(), decoding=EAGER), folder, name="mini")
    return folder / "mini"


@pytest.fixture(scope="module")
def expected(tiny_model):
    transcriber = Transcriber(tiny_model, rules=Rules(), max_tokens=MAX_TOKENS)
    return transcriber.transcribe(SAMPLES)


@contextlib.contextmanager
def serving(folder, *options):
    """A stand-in without the project's code; gives its process id and addresses."""
    script = [sys.executable, "-I", ROOT / "tests" / "serving_stand_in.py"]
    command = [*script, f"--model_base_path={folder}", f"--model_name={folder.name}", *options]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        ports = json.loads(process.stdout.readline())
        grpc_address, rest_address = (f"127.0.0.1:{ports[name]}" for name in ("grpc", "rest"))
        yield process.pid, {"grpc": grpc_address, "rest": f"http://{rest_address}"}
    finally:
        process.communicate("", timeout=120)


@pytest.fixture(scope="module")
def server(exported):
    with serving(exported) as (pid, addresses):
        yield pid, addresses


@pytest.fixture(scope="module")
def detector_server(exported_detector):
    with serving(exported_detector) as (_, addresses):
        yield addresses


def connect(addresses, interface, model="tiny", signatures=None):
    server = {"grpc": GrpcServer, "rest": RestServer}[interface]
    return server(addresses[interface], model, signatures)


@pytest.mark.parametrize("interface", ["grpc", "rest"])
def test_a_recording_gives_the_notes_of_the_transcriber(
    interface, server, exported, expected, tmp_path
):
    soundfile.write(tmp_path / "song.wav", SAMPLES, 16_000, subtype="FLOAT")
    command = [f"--server={server[1][interface]}", f"--config={exported}", "--segments=2"]
    command += [str(tmp_path / "song.wav"), f"--output={tmp_path / interface}.mid"]
    assert main(command) == 0
    expected.write_midi(tmp_path / "expected.mid")
    assert read_midi(tmp_path / f"{interface}.mid") == read_midi(tmp_path / "expected.mid")


@pytest.mark.parametrize("interface", ["grpc", "rest"])
@pytest.mark.parametrize("num_segments", [1, 3, 100])
def test_tokens_do_not_depend_on_how_requests_are_cut(
    interface, num_segments, server, exported, expected
):
    found = transcribe(
        [SAMPLES[:70_001], SAMPLES[70_001:]],
        ServedConfig.read(exported),
        lambda samples: connect(server[1], interface).predict(samples, 60),
        num_segments=num_segments,
    )
    assert found == expected


def test_both_interfaces_give_what_a_detector_finds(detector_server, exported_detector):
    samples = SAMPLES[:30_000]
    by_grpc, by_rest = (
        connect(detector_server, interface, "mini", Signatures("candidates")).predict(samples, 60)
        for interface in ("grpc", "rest")
    )
    graph = tf.saved_model.load(str(exported_detector / "1")).signatures["candidates"]
    known = graph(audio=tf.constant(samples[None]))
    assert len(by_grpc) == len(by_rest) == int(known["num_segments"][0])
    for i, (one, other) in enumerate(zip(by_grpc, by_rest, strict=True)):
        for name in one._fields:
            scale = 255 if name in ("programs", "ended") else 1
            array = known[name].numpy()[0, i]
            np.testing.assert_allclose(getattr(one, name) * scale, array, atol=1.1, rtol=1e-5)
            np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=1e-5)


@pytest.mark.parametrize("interface", ["grpc", "rest"])
def test_a_detectors_recording_gives_its_notes(
    interface, detector_server, exported_detector, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "song.mid").write_text("of the user's own")
    config = ServedConfig.read(exported_detector)
    assert (config.model, config.name, config.decoding) == (MINI, "mini", EAGER)
    predict = connect(detector_server, interface, "mini", config.signatures).predict
    found = transcribe([SAMPLES[:30_000]], config, lambda samples: predict(samples, 60))
    assert found.notes and set(found.confidences) == set(found.notes)
    assert not any(segment.tokens for segment in found.segments)
    soundfile.write(tmp_path / "song.wav", SAMPLES[:30_000], 16_000, subtype="FLOAT")
    command = [f"--server={detector_server[interface]}", f"--config={exported_detector}"]
    assert main([*command, str(tmp_path / "song.wav")]) == 0
    found.write_midi(tmp_path / "expected.mid")
    assert read_midi(tmp_path / "out" / "song.mid") == read_midi(tmp_path / "expected.mid")
    assert (tmp_path / "song.mid").read_text() == "of the user's own"


@settings(deadline=None, max_examples=40)
@given(
    num_samples=st.integers(0, 12 * 65_536),
    num_segments=st.integers(1, 5),
    context=st.sampled_from(["full", "segment"]),
    config=st.sampled_from([MT3, SMALL, SHORT]),
    block=st.integers(1000, 200_000),
)
def test_requests_hold_the_windows_of_the_whole(num_samples, num_segments, context, config, block):
    """Each answer that is kept comes from the very samples of its segment."""
    samples = np.arange(1, num_samples + 1, dtype=np.float32)
    blocks = [samples[i : i + block] for i in range(0, num_samples, block)]
    whole = list(cut_segments([samples], config, context))
    found = []
    for request in cut_requests(blocks, config, context, num_segments):
        assert isinstance(request, Request)
        around = config.lead_samples + config.overhang_samples
        assert request.samples.size < (num_segments + 3) * config.segment_samples + around
        seen = list(cut_segments([request.samples], config, context))
        found += seen[request.skip : request.skip + request.num_segments]
    assert len(found) == len(whole)
    for one, other in zip(found, whole, strict=True):
        assert one.num_frames == other.num_frames
        assert np.array_equal(one.samples, other.samples)


def post(address, body, path="/v1/models/tiny:predict"):
    request = urllib.request.Request(address + path, body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_rows_and_columns_of_json_give_the_same(server):
    audio = [melody(40_000, seed).tolist() for seed in range(2)]
    rest = server[1]["rest"]
    _, columns = post(rest, json.dumps({"inputs": {"audio": audio}}).encode())
    _, rows = post(rest, json.dumps({"instances": [{"audio": a} for a in audio]}).encode())
    outputs = columns["outputs"]
    assert outputs["num_segments"] == [2, 2]
    assert [row["tokens"] for row in rows["predictions"]] == outputs["tokens"]


@pytest.mark.parametrize("interface", ["grpc", "rest"])
def test_a_model_that_is_not_served_is_named(interface, server):
    with pytest.raises(ServingError, match="Servable not found for request: other"):
        connect(server[1], interface, "other").predict(SAMPLES[:100], 60)


@pytest.mark.parametrize("interface", ["grpc", "rest"])
def test_samples_out_of_all_bounds_are_refused(interface, server):
    with pytest.raises(ServingError, match="audio must be finite") as error:
        connect(server[1], interface).predict(np.full(100, 1e30, np.float32), 60)
    assert "\n" not in str(error.value)


def test_a_full_queue_is_unavailable_and_patience_gets_through(exported):
    with serving(exported, "--num_batch_threads=1", "--max_enqueued_batches=0") as (_, addresses):
        for interface in addresses:
            client = connect(addresses, interface)
            num_refused = []

            def predict(seconds, client=client, num_refused=num_refused):
                try:
                    return client.predict(SAMPLES, seconds)
                except Unavailable:
                    num_refused.append(1)
                    raise

            def ask(_, predict=predict):
                return call_patiently(predict, "here", deadline=60, retries=200, pause=0.02)

            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(ask, range(8)))
            assert num_refused
            assert all(answer == answers[0] for answer in answers)


def test_attempts_end_and_the_error_says_why():
    attempts = []

    def fail(seconds):
        attempts.append(seconds)
        raise Unavailable("UNAVAILABLE: too\nbusy")

    with pytest.raises(ServingError, match=r"there: no answer in 3 attempts of 7 s .*too busy"):
        call_patiently(fail, "there", deadline=7, retries=2, pause=0.001)
    assert attempts == [7, 7, 7]


@pytest.mark.parametrize("interface", ["grpc", "rest"])
def test_a_deadline_that_passes_is_one_line(interface, server, exported, tmp_path, capsys):
    soundfile.write(tmp_path / "song.wav", SAMPLES, 16_000)
    command = [f"--server={server[1][interface]}", f"--config={exported}", "--retries=0"]
    command += ["--deadline=0.001", f"--output={tmp_path / 'song.mid'}"]
    assert main([*command, str(tmp_path / "song.wav")]) == 1
    error = capsys.readouterr().err
    assert "no answer in 1 attempts of 0.001 s" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "song.mid").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--config={config}", "{song}"], 2, "--server is needed"),
        (["--server=x:1", "{song}"], 2, "--config is needed"),
        (["--server=x:1", "--config={config}"], 2, "one recording is needed"),
        (["--server=x:1", "--config=/nowhere", "{song}"], 1, "/nowhere: no such file"),
        (["--server=x:1", "--config={song}", "{song}"], 1, "not written by export.main"),
        (["--server=http://127.0.0.1:1", "--config={config}", "none.wav"], 1, "none.wav: no such"),
        (
            ["--server=http://127.0.0.1:1", "--config={config}", "--retries=0", "{song}"],
            1,
            "http://127.0.0.1:1: no answer in 1 attempts",
        ),
        (
            ["--server=127.0.0.1:1", "--config={config}", "--retries=0", "{song}"],
            1,
            "127.0.0.1:1: no answer in 1 attempts",
        ),
    ],
)
def test_wrong_usage_and_absent_servers_are_one_line(
    arguments, code, complaint, exported, tmp_path, capsys
):
    soundfile.write(tmp_path / "song.wav", SAMPLES[:2000], 16_000)
    given_paths = {"config": exported, "song": tmp_path / "song.wav"}
    assert main([argument.format(**given_paths) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error


def test_another_models_config_is_noticed(server, exported):
    config = ServedConfig.read(exported)
    other = dataclasses.replace(config, model=SMALL)
    predict = connect(server[1], "grpc").predict
    with pytest.raises(ServingError, match="cuts segments of another length"):
        transcribe([SAMPLES[:30_000]] * 3, other, lambda samples: predict(samples, 60)[:1])
    with pytest.raises(ServingError, match="serves another model; give the --config of its own"):
        transcribe([SAMPLES[:1000]], other, lambda samples: predict(samples, 60))


def test_a_note_over_the_border_of_two_requests_is_that_of_the_whole():
    length, frames = SMALL.segment_samples, SMALL.network.segment_frames
    audio = np.arange(5 * length, dtype=np.float32) / (5 * length)  # says where it is
    onset, end = 3 * frames - 10, 3 * frames + 9  # the third segment is the first request's last

    def predict(samples):
        first = round(float(samples[0]) * 5)
        outputs = []
        for i, _ in enumerate(cut_segments([samples], SMALL, "full")):
            start = (first + i) * frames
            begins = [(onset - start, 60, 1.0, 24, 90)] if 0 <= onset - start < frames else []
            sounding = [(max(0, onset - start), max(0, end - start), 60)]
            outputs.append(make_output(begins, sounding=sounding, num_frames=frames))
        return outputs

    found = transcribe([audio], ServedConfig(SMALL, "small", "full"), predict, num_segments=3)
    ((note, confidence),) = found.confidences.items()
    assert found.notes == [note]
    rate = SMALL.spectrogram.frames_per_second
    assert note[:2] == pytest.approx(((onset + 0.5) / rate, (end + 0.5) / rate))
    assert note[2:] == (60, 90, 24, False) and confidence == 1


@pytest.mark.parametrize("ended", [[], [[[0, 1]]], [[[np.nan] * 88]], [[["x"] * 88]], "ended"])
def test_outputs_that_are_none_are_one_line(ended):
    whole = {"onsets": [[[[0] * 5]]], "programs": [[[[0] * 128]]], "strokes": [[[[0] * 4]]]}
    with pytest.raises(ServingError, match="here: answers, but not as"), _reading("here"):
        _to_outputs(whole | {"ended": [ended]})


@pytest.mark.parametrize(
    "found", [{}, {"tokens": []}, {"tokens": [[[0.5]]]}, {"tokens": [[["x"]]]}]
)
def test_tokens_that_are_none_are_one_line(found):
    with pytest.raises(ServingError, match="here: answers, but not as"), _reading("here"):
        _to_outputs(found)


HEAD = b"HTTP/1.1 200 OK\r\n"
HOSTILE = {
    "a byte at a time": [HEAD + b"Content-Length: 1000\r\n\r\n", *[b" "] * 100],
    "headers without end": [HEAD, *[b"X: y\r\n"] * 100],
    "cut short": [HEAD + b'Content-Length: 1000\r\n\r\n{"outputs":'],
    "too long": [HEAD + b"Content-Length: 10000000000\r\n\r\n" + b" " * 2**23],
    "too deep": [HEAD + b"\r\n" + b"[" * 200_000],
    "elsewhere": [b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{port}/x\r\n\r\n"],
}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("a byte at a time", "timed out"),
        ("headers without end", "timed out"),
        ("cut short", "IncompleteRead"),
        ("too long", "is longer than that of a transcription model"),
        ("too deep", "not as a transcription model .*Recursion"),
        ("elsewhere", "HTTP 302"),
    ],
)
def test_a_hostile_server_holds_sends_or_redirects_nobody(name, complaint):
    num_requests = 0

    def serve(listening):
        nonlocal num_requests
        with contextlib.suppress(OSError):
            while True:
                connected, _ = listening.accept()
                num_requests += 1
                with contextlib.suppress(OSError), connected:
                    while b"]]}}" not in connected.recv(2**16):
                        pass
                    for part in HOSTILE[name]:
                        connected.sendall(part.replace(b"{port}", str(port).encode()))
                        time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        threading.Thread(target=serve, args=[listening], daemon=True).start()
        server = RestServer(f"http://127.0.0.1:{port}", "m")
        call = functools.partial(server.predict, np.zeros(9, np.float32))
        with pytest.raises(ServingError, match=complaint) as raised:
            call_patiently(call, "x", deadline=1.0, retries=0)
    assert "\n" not in str(raised.value)
    assert num_requests == 1


@pytest.mark.parametrize("module", ["keras", "tensorflow"])
def test_rest_needs_neither_keras_nor_tensorflow(module, server, exported, tmp_path):
    soundfile.write(tmp_path / "song.wav", SAMPLES[:50_000], 16_000)
    code = (
        "import sys; from export.serving_client import main; code = main(sys.argv[1:]);"
        f" assert {module!r} not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, f"--server={server[1]['rest']}", f"--config={exported}"]
    command += [f"--output={tmp_path / 'song.mid'}"]
    subprocess.run([*command, str(tmp_path / "song.wav")], cwd=ROOT, check=True)
    assert (tmp_path / "song.mid").exists()


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b'{"inputs": {}}',
    b'{"inputs": {"audio": [[0, "x"]]}}',
    b'{"inputs": {"audio": [0.5, 0.5]}}',
    b'{"inputs": {"audio": [[[0.5]]]}}',
    b'{"inputs": {"audio": [[1e999]]}}',
    b'{"inputs": {"audio": [[0.1]], "more": [[0]]}}',
    b'{"signature_name": "train", "inputs": {"audio": [[0.1]]}}',
]


def resident_mb(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")
def test_under_load_good_requests_are_answered_bad_ones_refused_and_memory_stays(server):
    pid, addresses = server
    lengths = [1000, 20_000, 33_000, 70_000]
    client = connect(addresses, "grpc")
    expected = {n: client.predict(SAMPLES[:n], 60) for n in lengths}

    def ask(i):
        if i % 4 == 3:
            code, answer = post(addresses["rest"], GARBAGE[i // 4 % len(GARBAGE)])
            return code == 400 and bool(answer["error"])
        n = lengths[i % len(lengths)]
        interface = "rest" if i % 8 == 0 else "grpc"
        server = client if interface == "grpc" else connect(addresses, interface)
        return server.predict(SAMPLES[:n], 120) == expected[n]

    start = threading.Barrier(200)

    def run(i):
        start.wait()
        return ask(i)

    memory = []
    for _ in range(3):
        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            assert all(pool.map(run, range(200)))
        memory.append(resident_mb(pid))
    assert memory[2] - memory[1] < 60  # MB; a leak is one request's 5 MB, 200 times


# ---------------------------------------------------------------- files in the place of numbers

WHOLE = (np.round(SAMPLES / np.abs(SAMPLES).max() * 32_000) / 2**15).astype(np.float32)  # 16 bits


def wav_of(samples, rate=16_000, **options):
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format="WAV", **options)
    return content.getvalue()


@pytest.fixture(scope="module")
def decode():
    from mt3_keras.graph_audio import decode_wav

    return tf.function(decode_wav, [tf.TensorSpec([], tf.string)], autograph=False)


def test_the_graph_reads_what_the_client_writes(decode):
    np.testing.assert_array_equal(decode(to_wav(WHOLE)).numpy(), WHOLE)
    assert wav_of(WHOLE, subtype="PCM_16")[-100:] == to_wav(WHOLE)[-100:]


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 96_000])
def test_the_graph_resamples_files_of_any_rate_as_reading_them_does(decode, rate, tmp_path):
    times = np.arange(2 * rate + 7) / rate
    swell = np.sin(np.pi * times / times[-1])[:, None]
    sound = 0.4 * swell * np.sin(2 * np.pi * np.outer(times, [440, 3000]))
    (tmp_path / "song.wav").write_bytes(wav_of(sound, rate, subtype="PCM_16"))
    expected = np.concatenate(list(read_blocks(tmp_path / "song.wav")))
    found = decode((tmp_path / "song.wav").read_bytes()).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_short_and_silent_files_are_resampled_too(decode):
    for num_samples in (1, 2, 3, 441, 1000):
        found = decode(wav_of(np.zeros(num_samples), 44_100, subtype="PCM_16")).numpy()
        assert found.size == -(-num_samples * 16_000 // 44_100)
        assert not found.any()


@pytest.mark.parametrize("interface", ["grpc", "rest"])
@pytest.mark.parametrize("num_segments", [2, 100])
def test_files_give_the_tokens_that_numbers_give(interface, num_segments, server, exported):
    config = ServedConfig.read(exported)
    assert config.signatures == Signatures("serving_default", "serving_bytes")
    found = [
        transcribe(
            [WHOLE],
            config,
            lambda samples, signatures=signatures: connect(
                server[1], interface, signatures=signatures
            ).predict(samples, 60),
            num_segments=num_segments,
        )
        for signatures in (None, config.signatures)
    ]
    assert found[0] == found[1]
    assert len(found[0].segments) == 8


def test_a_request_of_files_is_a_fraction_of_one_of_numbers(server, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        RestServer, "_post", lambda _, body, *rest: (sizes.append(len(body)), (503, b""))[1]
    )
    for signatures in (None, Signatures(audio_bytes="serving_bytes")):
        with pytest.raises(Unavailable):
            connect(server[1], "rest", signatures=signatures).predict(WHOLE, 1)
    assert sizes[1] < sizes[0] / 3
    assert sizes[1] == pytest.approx(4 / 3 * 2 * WHOLE.size, rel=0.01)


def test_what_16_bits_do_not_hold_goes_as_numbers():
    assert fits_wav(WHOLE)
    assert not fits_wav(2 * WHOLE)
    assert not fits_wav(WHOLE[:0])
    assert not fits_wav(np.full(3, np.nan, np.float32))


def post_files(address, *contents, name="tiny"):
    files = [{"b64": base64.b64encode(content).decode()} for content in contents]
    request = {"signature_name": "serving_bytes", "inputs": {"audio_bytes": files}}
    return post(address, json.dumps(request).encode(), f"/v1/models/{name}:predict")


def test_recordings_of_other_lengths_go_in_one_request(server):
    first, second = to_wav(WHOLE), to_wav(WHOLE[:100_000])
    both, alone = (
        post_files(server[1]["rest"], *files)[1]["outputs"] for files in ([first, second], [first])
    )
    assert both["num_segments"] == alone["num_segments"] * 2
    cut = [row[: len(alone["tokens"][0][0])] for row in both["tokens"][0]]
    assert cut == alone["tokens"][0]


BAD_FILES = {
    "empty": b"",
    "text": b"no sound",
    "cut short": to_wav(WHOLE)[:40],
    "float": wav_of(WHOLE[:100], subtype="FLOAT"),
    "odd rate": wav_of(WHOLE[:100], 900, subtype="PCM_16"),
    "too long": wav_of(np.zeros(600 * 1000 + 1), 1000, subtype="PCM_16"),
}


@pytest.mark.parametrize("name", ["tiny", "mini"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bytes_that_are_no_recording_are_refused(kind, name, server, detector_server):
    address = {"tiny": server[1], "mini": detector_server}[name]["rest"]
    status, answer = post_files(address, BAD_FILES[kind], name=name)
    assert status == 400 and answer["error"]
    assert kind != "too long" or "a recording may last 600 s here" in answer["error"]


def read_command(page):
    """The lines of a page that ask a server for notes, as a shell runs them."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    printf '{"))
    end = next(i for i, line in enumerate(lines) if i > start and "curl" in line)
    return "\n".join(lines[start : end + 1])


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_curl_of_the_pages_returns_notes(page, detector_server, exported_detector, tmp_path):
    (tmp_path / "song.wav").write_bytes(wav_of(WHOLE[:30_000], subtype="PCM_16"))
    command = read_command(page)
    for theirs, ours in (
        ("http://localhost:8501", detector_server["rest"]),
        ("models/small:", "models/mini:"),
    ):
        assert theirs in command
        command = command.replace(theirs, ours)
    run = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout)["outputs"]
    config = ServedConfig.read(exported_detector)
    predict = connect(detector_server, "grpc", "mini", config.signatures).predict
    expected = transcribe([WHOLE[:30_000]], config, lambda samples: predict(samples, 60)).notes
    fields = ("onset_seconds", "offset_seconds", "pitch", "velocity", "program", "is_drum")
    notes = [Note(*row) for row in zip(*(found[name][0] for name in fields), strict=True)]
    assert found["num_notes"] == [len(notes)]
    # Chances come to the client in 255 steps, so a doubtful end or name may be another.
    read, known = (sorted((round(n.onset, 3), *n[2:4]) for n in ns) for ns in (notes, expected))
    assert read == known


@pytest.fixture(scope="module")
def exported_official(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    assert export([f"--model={official}", f"--out_dir={folder}", "--exact", "--name=mt3"]) == 0
    return folder / "saved_model" / "mt3"


def read_golden(shared, clip):
    samples, _ = soundfile.read(shared / "golden" / f"{clip}.flac", dtype="float32")
    return samples, json.loads((shared / "golden" / f"{clip}.json").read_text())


def test_the_official_weights_serve_the_originals_tokens(exported_official, shared, tmp_path):
    (band, bands), (piano, pianos) = (read_golden(shared, clip) for clip in ("band", "piano"))
    three = np.stack([band, piano, band])
    found = run_alone(exported_official / "1", tmp_path, one=piano[None], three=three)
    bands, pianos = ([s["tokens"] for s in known["segments"]] for known in (bands, pianos))
    assert found == {"one": [pianos], "three": [bands, pianos, bands]}


def test_files_give_the_originals_notes_over_both_interfaces(exported_official, shared):
    config = ServedConfig.read(exported_official)
    with serving(exported_official) as (_, addresses):
        for interface, clip in (("grpc", "band"), ("rest", "piano")):
            samples, golden = read_golden(shared, clip)
            assert fits_wav(samples) and config.signatures.audio_bytes
            client = connect(addresses, interface, "mt3", config.signatures)
            found = transcribe([samples], config, lambda s, c=client: c.predict(s, 600)).notes
            expected = sort_notes(Note(**note) for note in golden["notes"])
            assert [n[2:] for n in found] == [n[2:] for n in expected]
            times, known = ([n[:2] for n in notes] for notes in (found, expected))
            np.testing.assert_allclose(times, known, atol=1e-6)
