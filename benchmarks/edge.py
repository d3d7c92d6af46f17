"""The edge bundle of a token network here: tokens, whole files, streams, start, memory.

    python -m benchmarks.edge --bundle FOLDER --audio song.flac [--threads 2] [--runs 3] [--hours 1]
        [--peer_python PYTHON --peer_script mt3_torch.py --peer_weights mt3.safetensors]

Every measurement is a process of its own and all are made in turn, `--runs` times; medians are
printed, beside those of the compact PyTorch MT3 in float32 at its batch of 16 and in dynamic int8
at a batch of 1, and beside what the machine could do at best. With --hours a stream is also given
the recording again and again for so long, in blocks of all sizes, and its memory is watched.

Only a quiet machine gives ratios that count: PyTorch's threads spin while they wait, and where
something else has a core they are tens of times slower. So the peer is run both with spinning and
with sleeping threads and its better run is taken, and a busy machine is named.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from numpy.typing import NDArray

from benchmarks.machine import describe_machine, matmul_speed, resident_mb, run_again, run_json
from mt3_keras.audio import read_blocks
from mt3_keras.cli.command_line import Command, Flags, run
from mt3_keras.engines.litert import ROWS, EdgeModel, TokenEngine, read_bundle_config
from mt3_keras.grammar import Rules
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.process import limit_threads
from mt3_keras.segments import AudioSegment, cut_segments
from mt3_keras.streaming import NoteOn, StreamingTranscriber
from mt3_keras.transcriber import Transcriber

BLOCK = SAMPLE_RATE_HZ // 10  # samples pushed at a time
KINDS = ("tokens", "file", "stream", "start", "limits")
SETTLED_SECONDS = 300  # of sound, after which a stream should not grow any more

QUIET = 0.5  # load above which something else is running

Figures = dict[str, float]


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.edge", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.text("bundle", None, "Folder of an edge bundle.", required=True)
    add.text("audio", None, "A recording.", required=True)
    add.count("threads", 2, "Of a process.")
    add.count("runs", 3, "Of each measurement.")
    add.number("hours", 0.0, "In one stream.", least=0.0)
    add.text("peer_python", sys.executable, "The peer's interpreter.")
    add.text("peer_script", None, "The peer; by default none.")
    add.text("peer_weights", None, "The peer's weights.")
    add.choice(
        "measure",
        None,
        [*KINDS, "endurance"],
        "Print these figures as JSON: what each process is started for.",
    )


def _compare(values: flags.FlagValues, _arguments: list[str]) -> None:
    limit_threads(values.threads)  # for all processes started from here
    if values.measure:
        print(json.dumps(measure(values)))
        return
    print(f"machine: {describe_machine()}; {values.threads} threads, {values.audio}")
    if (load := os.getloadavg()[0]) > QUIET:
        print(f"BUSY: load {load:.1f} before the first run; no ratio below counts")
    runs: dict[str, list[Figures]] = {}
    for _ in range(values.runs):
        for kind in KINDS:
            runs.setdefault(kind, []).append(_run_ours(values, kind))
        if values.peer_script:
            for name, options in (("float32", "--batch 16"), ("int8", "--batch 1 --quant int8")):
                runs.setdefault(name, []).append(_run_peer(values, options))
    print(report({name: _medians(several) for name, several in runs.items()}, values.runs))
    if values.hours:
        found = _run_ours(values, "endurance")
        print(
            f"{values.hours:g} h in one stream: {found['notes']:.0f} notes, real-time factor "
            f"{found['factor']:.3f}, memory after the first five minutes {found['settled MB']:.0f} "
            f"MB, in the end {found['last MB']:.0f} MB, at most {found['MB']:.0f} MB"
        )


def _run_ours(values: flags.FlagValues, kind: str) -> Figures:
    names = ("bundle", "audio", "threads", "hours")
    return run_again("benchmarks.edge", values, names, f"--measure={kind}")


def _run_peer(values: flags.FlagValues, options: str) -> Figures:
    """The faster of two runs: see the module."""
    command = [values.peer_python, values.peer_script, values.audio, "--json"]
    command += ["--weights", values.peer_weights, "--threads", str(values.threads)]
    found = []
    for policy in ("ACTIVE", "PASSIVE"):
        os.environ["OMP_WAIT_POLICY"] = policy
        found.append(run_json([*command, *options.split()]))
    del os.environ["OMP_WAIT_POLICY"]
    return min(found, key=lambda run: run["rtf"])


def _medians(runs: list[Figures]) -> Figures:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


# --- what each process measures ---


def measure(values: flags.FlagValues) -> Figures:
    """One kind of figures, and the peak memory of this process."""
    bundle = pathlib.Path(values.bundle)
    samples = np.concatenate(list(read_blocks(values.audio)))
    kind = values.measure
    if kind == "tokens":
        found = _time_tokens(bundle, samples, values.threads)
    elif kind == "file":
        found = _time_file(bundle, samples)
    elif kind == "stream":
        found = _time_stream(bundle, samples)
    elif kind == "endurance":
        found = _endure(bundle, samples, values.hours)
    elif kind == "start":
        found = _time_start(bundle, samples)
    else:
        found = _find_limits(bundle)
    return found | {"MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


class _TimedModel(EdgeModel):
    """Adds up the seconds that it encodes."""

    encoding = 0.0

    def encode(self, samples: NDArray[np.float32], num_frames: int, place: int = 0) -> None:
        start = time.perf_counter()
        super().encode(samples, num_frames, place)
        self.encoding += time.perf_counter() - start


def _time_tokens(bundle: pathlib.Path, samples: Any, threads: int) -> Figures:
    """Milliseconds for a token and for encoding a segment: alone, helped, and side by side."""
    segments = list(cut_segments([samples], read_bundle_config(bundle), "full"))
    found: Figures = {}
    for name, num_segments, num_threads in (
        ("one", 1, 1),
        ("one, all threads", 1, threads),
        ("side by side", ROWS * threads, 1),
    ):
        timed = time_search(bundle, segments, num_segments, num_threads)
        found |= {f"{name}: {part}": milliseconds for part, milliseconds in timed.items()}
    return found


def time_search(
    bundle: pathlib.Path, segments: list[AudioSegment], num_segments: int, num_threads: int = 1
) -> Figures:
    """Milliseconds for a "token" and to "encode" a segment, so many sequences at a time."""
    models: list[_TimedModel] = []

    class Timed(TokenEngine):
        def _open_model(self, folder: str | os.PathLike[str]) -> EdgeModel:
            models.append(_TimedModel(folder, num_threads))
            return models[-1]

    engine = Timed(bundle, rules=Rules(stop_runaways=True), num_segments=num_segments)
    start = time.perf_counter()
    num_tokens = sum(len(output[0]) for _, output in engine.run(segments))
    seconds = time.perf_counter() - start
    encoding = sum(model.encoding for model in models) / len(models)
    return {
        "token": 1000 * (seconds - encoding) / num_tokens,
        "encode": 1000 * encoding / len(segments),
    }


def _time_file(bundle: pathlib.Path, samples: Any) -> Figures:
    transcriber = Transcriber(bundle)
    start = time.perf_counter()
    transcriber.transcribe(samples)
    return {"factor": (time.perf_counter() - start) * SAMPLE_RATE_HZ / samples.size}


def _time_stream(bundle: pathlib.Path, samples: Any) -> Figures:
    """Real-time factor, and seconds from onsets to when they are reported.

    A block can be pushed when its last sample has been played and those before it are done with.
    Notes that only the end of the recording makes certain are left out.
    """
    stream = StreamingTranscriber.from_bundle(bundle)
    computing = done = 0.0
    delays: list[float] = []
    reported: set[NoteOn] = set()
    for i in range(0, samples.size, BLOCK):
        block = samples[i : i + BLOCK]
        start = time.perf_counter()
        new = stream.push(block)
        seconds = time.perf_counter() - start
        computing += seconds
        done = max(done, (i + block.size) / SAMPLE_RATE_HZ) + seconds
        notes = {NoteOn(n.onset, n.pitch, n.velocity, -1 if n.is_drum else n.program) for n in new}
        delays += [done - note.onset for note in (notes | set(new.started)) - reported]
        reported |= set(new.started)
    delays = delays or [float("nan")]
    return {
        "factor": computing * SAMPLE_RATE_HZ / samples.size,
        "delay": float(np.median(delays)),
        "longest delays": float(np.quantile(delays, 0.95)),
    }


def _endure(bundle: pathlib.Path, samples: Any, hours: float) -> Figures:
    """Hours of sound in one stream, in blocks of 1 sample to 10 minutes."""
    stream = StreamingTranscriber.from_bundle(bundle)
    random = np.random.default_rng(0)
    num_samples = round(hours * 3600 * SAMPLE_RATE_HZ)
    place = num_notes = 0
    settled = 0.0
    start = time.perf_counter()
    while place < num_samples:
        size = round(min(600 * SAMPLE_RATE_HZ, np.exp(random.uniform(0, 18))))
        size = min(size, num_samples - place)
        block = np.resize(np.roll(samples, -place), size) if size > 64 else samples[:size]
        num_notes += len(stream.push(block))
        place += size
        if not settled and place > SETTLED_SECONDS * SAMPLE_RATE_HZ:
            settled = resident_mb()
    num_notes += len(stream.flush())
    factor = (time.perf_counter() - start) * SAMPLE_RATE_HZ / num_samples
    found = {"notes": float(num_notes), "factor": factor}
    return found | {"settled MB": settled, "last MB": resident_mb()}


def _time_start(bundle: pathlib.Path, samples: Any) -> Figures:
    """Seconds from starting the command on the loudest two seconds to its first note."""
    import soundfile

    length = 2 * SAMPLE_RATE_HZ
    starts = range(0, max(1, samples.size - length), BLOCK)
    loudest = max(starts, key=lambda i: float(np.square(samples[i : i + length]).sum()))
    with tempfile.TemporaryDirectory() as folder:
        clip = f"{folder}/clip.wav"
        soundfile.write(clip, samples[loudest : loudest + length], SAMPLE_RATE_HZ)
        command = [sys.executable, "-m", "mt3_keras", "transcribe", clip, "--engine=litert"]
        command += ["--output_dir=-", f"--model={bundle}", "--noprogress"]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            line = process.stdout.readline()
            seconds = time.perf_counter() - start
            process.stdout.read()
        if not line or process.returncode:
            sys.exit(f"{' '.join(command)} gave no note")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"seconds": seconds, "MB of the command": peak}


def _find_limits(bundle: pathlib.Path) -> Figures:
    """What the machine can do, and what the network's weights ask of it."""
    vector = np.ones(2048, np.float32)
    long = np.ones((64 * 1024, 2048), np.float32)  # 512 MB: no cache holds it
    found = {
        "GFLOP/s": matmul_speed() / 1e9,
        "GB/s": long.nbytes / _fastest(lambda: long @ vector) / 1e9,
    }
    config = read_bundle_config(bundle)
    network = config.network
    for name, (size, count) in _weights(bundle / "model.tflite").items():
        positions = network.segment_frames if name == "encode" else 1
        found |= {f"{name}: bytes": size, f"{name}: operations": 2 * count * positions}
    kept = network.num_decoder_layers * 2 * network.num_heads * network.head_width
    found["decode_step: bytes"] += 4 * kept * network.segment_frames  # float32 cross-attention
    return found


def _fastest(function: Any) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _weights(path: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Bytes and number of the matrices' elements that each signature's network holds."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    # Large files hold them behind the description of the network.
    sizes = [b.size or (0 if b.data is None else len(b.data)) for b in model.buffers]
    found = {}
    for signature in model.signatureDefs:
        tensors = model.subgraphs[signature.subgraphIndex].tensors
        matrices = {t.buffer: int(np.prod(t.shape)) for t in tensors if len(t.shape) == 2}
        held = {buffer: count for buffer, count in matrices.items() if sizes[buffer]}
        size = sum(sizes[buffer] for buffer in held)
        found[signature.signatureKey.decode()] = (size, sum(held.values()))
    return found


# --- what is printed ---


def report(found: dict[str, Figures], num_runs: int) -> str:
    """Our figures beside the peer's; a ratio above 1 means that ours is that much faster."""
    tokens, peers = found["tokens"], [name for name in ("float32", "int8") if name in found]
    heads = "".join(f"{'peer ' + name:>14}{'':8}" for name in peers)
    lines = [f"{'median of ' + str(num_runs):34}{'ours':>9}{heads}".rstrip()]

    def add(name: str, ours: float, key: str | None = None) -> None:
        runs = [found[peer][key] for peer in peers] if key else []
        cells = "".join(f"{run:14.3f}{run / ours:7.2f}x" for run in runs)
        lines.append(f"{name:34}{ours:9.3f}{cells}")

    for name in ("one", "one, all threads", "side by side"):
        add(f"{name}: ms/token", tokens[f"{name}: token"], "ms_per_token")
        add(f"{name}: encode, ms/segment", tokens[f"{name}: encode"], "encode_ms_per_segment")
    add("whole file: real-time factor", found["file"]["factor"], "rtf")
    add("stream: real-time factor", found["stream"]["factor"])
    add("  onset to its report, median s", found["stream"]["delay"])
    add("  95 % are reported within, s", found["stream"]["longest delays"])
    add("cold start to first note, s", found["start"]["seconds"])
    add("memory: whole file, MB", found["file"]["MB"], "peak_rss_mb")
    add("memory: stream, MB", found["stream"]["MB"])
    add("memory: command, MB", found["start"]["MB of the command"])
    return "\n".join([*lines, *_report_limits(tokens, found["limits"])])


def _report_limits(tokens: Figures, limits: Figures) -> list[str]:
    """How far tokens and encoding are from what reading and multiplying alone would take."""
    lines = [f"limits: products {limits['GFLOP/s']:.0f} GFLOP/s, reading {limits['GB/s']:.1f} GB/s"]
    for graph, name in (("decode_step", "token"), ("encode", "encode")):
        reading = limits[f"{graph}: bytes"] / limits["GB/s"] / 1e6
        multiplying = limits[f"{graph}: operations"] / limits["GFLOP/s"] / 1e6
        ours = tokens[f"side by side: {name}"]
        lines.append(
            f"{name}: {limits[f'{graph}: bytes'] / 1e6:.1f} MB to read take {reading:.2f} ms, "
            f"{limits[f'{graph}: operations'] / 1e9:.2f} GFLOP {multiplying:.2f} ms in float32; "
            f"ours side by side takes {ours / max(reading, multiplying):.1f} times the longer"
        )
    return lines


COMMAND = Command("--bundle=DIR --audio=FILE [FLAGS]", __doc__, _define_flags, _compare)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
