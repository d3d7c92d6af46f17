"""A model server under load: right answers, latencies, throughput, memory.

    python -m benchmarks.serving --model SERVING/small --audio song.flac [--requests 200]
        [--clients 32] [--server HOST:PORT --pid PID]
    python -m benchmarks.serving --model SERVING/small --audio song.flac --sizes --seconds 180

Sends windows of a recording over gRPC, one at a time and then from many clients at once, every
eighth request garbage, and compares every answer with the first one for its window. Without
--server it starts the stand-in of the tests, which has TF Serving's interface and not its
scheduler; with --server (and --pid, to see its memory) it measures a real one.

--sizes sends one request of so many seconds of the recording, repeated, by REST to each signature
of recordings: bytes there and back, processor time of the stand-in, which the server's other work
does not change, and seconds.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags

from benchmarks.machine import describe_machine, processor_seconds, resident_mb
from mt3_keras.audio import read_blocks
from mt3_keras.cli.command_line import Command, Flags, run
from mt3_keras.engines.serving import GrpcServer, ServedConfig, ServingError, call_patiently
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.wav import to_wav

SIGNATURES = ("serving_default", "serving_bytes", "candidates", "candidates_bytes")
DEADLINE = 600.0  # seconds


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.serving", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.text("model", None, "Folder of the served model's versions.", required=True)
    add.text("audio", None, "A recording.", required=True)
    add.number("seconds", 4.0, "Of audio in a request.", least=0.1)
    add.count("requests", 200, "Of a round.")
    add.count("clients", 32, "That ask at once.")
    add.count("rounds", 3, "Of many clients.")
    add.text("server", None, "HOST:PORT of a running one.")
    add.count("pid", None, "Of the running server.")
    add.count("num_batch_threads", 2, "Of the stand-in.")
    add.switch("sizes", False, "Sizes of requests and answers.")
    add.names("signatures", [*SIGNATURES], "That --sizes asks.")


def _load_server(values: flags.FlagValues, _: list[str]) -> None:
    config = ServedConfig.read(pathlib.Path(values.model))
    samples = np.concatenate(list(read_blocks(values.audio)))
    length = round(values.seconds * SAMPLE_RATE_HZ)
    print(f"machine: {describe_machine()}")
    starts = np.linspace(0, max(0, samples.size - length), 4).astype(int)
    windows = [samples[start : start + length] for start in starts]
    if values.sizes:
        _measure_sizes(values, config.name, np.resize(samples, length))
        return
    with _reach_server(values, config.name) as (address, pid):
        client = GrpcServer(address, config.name, config.signatures)
        expected = [_ask(client, window) for window in windows]
        print(f"requests of {values.seconds:g} s, every eighth of NaN; memory of the server")
        single = _measure("one at a time", client, windows, expected, values.requests // 8, 1)
        print(f"memory {resident_mb(pid):.0f} MB")
        for number in range(values.rounds):
            name = f"{values.clients} clients, round {number + 1}"
            many = _measure(name, client, windows, expected, values.requests, values.clients)
            print(f"memory {resident_mb(pid):.0f} MB, throughput {many / single:.2f}x")


@contextlib.contextmanager
def _reach_server(
    values: flags.FlagValues, name: str, interface: str = "grpc"
) -> Iterator[tuple[str, int | None]]:
    if values.server:
        yield values.server, values.pid
        return
    script = pathlib.Path(__file__).parent.parent / "tests" / "serving_stand_in.py"
    command = [sys.executable, "-I", str(script), f"--model_name={name}"]
    command += [f"--model_base_path={values.model}"]
    command += [f"--num_batch_threads={values.num_batch_threads}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        yield f"127.0.0.1:{json.loads(process.stdout.readline())[interface]}", process.pid
        process.communicate("")


def _measure_sizes(values: flags.FlagValues, name: str, samples: np.ndarray) -> None:
    numbers = ",".join([f"{x:.9g}" for x in samples.tolist()])
    content = base64.b64encode(to_wav(samples)).decode()
    inputs = {"audio": f'"audio":[[{numbers}]]', "bytes": f'"audio_bytes":[{{"b64":"{content}"}}]'}
    with _reach_server(values, name, "rest") as (address, pid):
        for signature in values.signatures:
            body = inputs["bytes" if signature.endswith("bytes") else "audio"]
            body = f'{{"signature_name":"{signature}","inputs":{{{body}}}}}'
            request = urllib.request.Request(
                f"http://{address}/v1/models/{name}:predict", body.encode()
            )
            before, start = processor_seconds(pid), time.perf_counter()
            with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
                num_bytes = len(answer.read())
            seconds, spent = time.perf_counter() - start, processor_seconds(pid) - before
            print(
                f"{signature:18} {len(body) / 1e6:.1f} MB there, {num_bytes / 1e6:.2f} MB back,"
                f" {spent:.1f} s of the processor, {seconds:.1f} s"
            )


def _ask(client: GrpcServer, window: np.ndarray) -> list[list[bytes]]:
    """The outputs of a window's segments, to the byte."""
    found = call_patiently(
        lambda seconds: client.predict(window, seconds), "server", deadline=DEADLINE, retries=20
    )
    return [[np.asarray(field).tobytes() for field in output] for output in found]


def _measure(
    name: str,
    client: GrpcServer,
    windows: list[np.ndarray],
    expected: list[list[list[bytes]]],
    num_requests: int,
    num_clients: int,
) -> float:
    """Prints a line; returns good answers per second. Exits where an answer is wrong."""

    def run(i: int) -> float | None:
        start = time.perf_counter()
        if i % 8 == 7:
            try:
                _ask(client, np.full(16_000, np.nan, np.float32))
            except ServingError:
                return None
            sys.exit("garbage was not refused")
        if _ask(client, windows[i % len(windows)]) != expected[i % len(windows)]:
            sys.exit(f"request {i} got another answer than alone")
        return time.perf_counter() - start

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
        latencies = [seconds for seconds in pool.map(run, range(num_requests)) if seconds]
    throughput = len(latencies) / (time.perf_counter() - start)
    percentiles = statistics.quantiles(latencies, n=100, method="inclusive")
    times = ", ".join(f"p{p} {percentiles[p - 1]:.2f}" for p in (50, 90, 99))
    print(
        f"{name:24} {len(latencies)} right, {num_requests - len(latencies)} refused;"
        f" latency (s) {times}; {throughput:.2f} requests/s"
    )
    return throughput


COMMAND = Command("--model=DIR --audio=FILE [FLAGS]", __doc__, _define_flags, _load_server)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
