"""Whole-file speed of this project against another implementation, side by side in one run.

    python -m benchmarks.transcribe --model MODEL --audio song.flac [--threads 2] [--batch 16]
        [--engine litert]
        [--peer_python PYTHON --peer_script mt3_torch.py --peer_weights mt3.safetensors]

Every run is a process of its own, ours and the peer's in turn, `--runs` times; the medians are
compared. The peer is the compact PyTorch MT3 with cached keys and values, which prints its figures
as JSON. Ours are measured warm: the time to compile is given apart, as the peer has none.

With `--engine litert` MODEL is an edge bundle, and the batch is the number of sequences decoded
side by side: best two a thread. Its encoder includes the front end.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks.machine import GIGA, describe_machine, matmul_speed, run_again, run_json
from mt3_keras.cli.command_line import Command, Flags, run


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.transcribe", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.text("model", None, "What transcribes.", required=True)
    add.text("audio", None, "A recording.", required=True)
    add.count("threads", os.cpu_count(), "Of a process.")
    add.count("batch", 16, "Segments decoded side by side.")
    add.choice("engine", "keras", ["keras", "litert"], "Ours.")
    add.count("runs", 3, "Of each.")
    add.text("peer_python", sys.executable, "The peer's interpreter.")
    add.text("peer_script", None, "The peer; by default none.")
    add.text("peer_weights", None, "The peer's weights.")
    add.text("peer_options", "", "More flags for the peer, such as '--quant int8'.")
    add.switch("measure", False, "Print figures as JSON: what each process is started for.")


def _compare(values: flags.FlagValues, _arguments: list[str]) -> None:
    if values.measure:
        print(json.dumps(measure(values)))
        return
    print(f"machine: {describe_machine()}")
    ours, peers = [], []
    for _ in range(values.runs):
        ours.append(_run_ours(values))
        if values.peer_script:
            peers.append(_run_peer(values))
    print(report(ours, peers))


def _run_ours(values: flags.FlagValues) -> dict[str, float]:
    names = ("model", "audio", "threads", "batch", "engine")
    return run_again("benchmarks.transcribe", values, names, "--measure")


def _run_peer(values: flags.FlagValues) -> dict[str, float]:
    command = [values.peer_python, values.peer_script, values.audio, "--json"]
    command += ["--weights", values.peer_weights, "--batch", str(values.batch)]
    command += ["--threads", str(values.threads), *values.peer_options.split()]
    found = run_json(command)
    total = found["mel_s"] + found["encode_s"] + found["decode_s"]
    return {
        "front end": found["mel_s"],
        "encode": found["encode_s"],
        "decode": found["decode_s"],
        "total": total,
        "tokens": found["tokens"],
        "segments": found["segments"],
        "audio": found["audio_s"],
        "peak memory (MB)": found["peak_rss_mb"],
    }


def measure(values: flags.FlagValues) -> dict[str, float]:
    """One warm transcription of zero-padded segments, its parts timed on the same segments.

    On Keras by the exact path.
    """
    from mt3_keras.process import limit_threads, load_keras

    limit_threads(values.threads)
    on_keras = values.engine == "keras"
    if on_keras:
        load_keras()
    from mt3_keras import Transcriber
    from mt3_keras.audio import read_blocks
    from mt3_keras.segments import cut_segments

    path: dict[str, Any] = {"exact": True} if on_keras else {"context": "segment"}
    transcriber = Transcriber.from_preset(
        values.model, batch_size=values.batch, engine=values.engine, **path
    )
    start = time.perf_counter()
    transcriber.transcribe(values.audio)
    cold = time.perf_counter() - start
    start = time.perf_counter()
    result = transcriber.transcribe(values.audio)
    total = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    segments = list(cut_segments(read_blocks(values.audio), transcriber.model_config, "segment"))
    if on_keras:
        front_end, encode = _time_encoder(transcriber.model, segments)
    else:
        from benchmarks.edge import time_search

        timed = time_search(transcriber.model, segments, values.batch)
        front_end, encode = 0.0, timed["encode"] * len(segments) / 1000
    return {
        "compile": cold - total,
        "front end": front_end,
        "encode": encode,
        "decode": total - front_end - encode,
        "total": total,
        "tokens": sum(len(segment.tokens) for segment in result.segments),
        "segments": len(result.segments),
        "audio": result.duration,
        "peak memory (MB)": peak,
        "peak GFLOP/s": matmul_speed() / GIGA,
        "encoder GFLOP": _count_encoder(transcriber.model_config) / GIGA,
        "token GFLOP": _count_token(transcriber.model_config) / GIGA,
    }


def _time_encoder(model: Any, segments: list[Any]) -> tuple[float, float]:
    """Seconds for the front end, and for encoder and cross-attention keys, of all segments."""
    import numpy as np
    from keras import ops

    from mt3_keras.engines.keras import compile_function

    front_end = compile_function(lambda _, s, n: model.log_mel(s, n), model.variables)
    encode = compile_function(lambda _, s, n: model.encode(s, n), model.variables)
    inputs = [(s.samples[None], np.array([s.num_frames], np.int32)) for s in segments]

    def run(function: Any, samples: Any, counts: Any) -> None:
        found = function((), samples, counts)
        ops.convert_to_numpy(next(iter(found.values())) if isinstance(found, dict) else found)

    seconds = []
    for function in (front_end, encode):
        run(function, *inputs[0])  # compiles
        start = time.perf_counter()
        for samples, counts in inputs:
            run(function, samples, counts)
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1] - seconds[0]


def _count_encoder(config: Any) -> float:
    """Floating-point operations to encode a segment, cross-attention keys and values included."""
    net, mels = config.network, config.spectrogram.num_mels
    inner, frames = net.num_heads * net.head_width, net.segment_frames
    layer = 4 * net.width * inner + 3 * net.width * net.mlp_width + 2 * frames * inner
    cross = net.num_decoder_layers * 2 * net.width * inner
    return 2.0 * frames * (mels * net.width + net.num_encoder_layers * layer + cross)


def _count_token(config: Any) -> float:
    """Floating-point operations for a token with 64 positions before it."""
    net = config.network
    inner = net.num_heads * net.head_width
    layer = 6 * net.width * inner + 3 * net.width * net.mlp_width
    layer += 2 * inner * (net.segment_frames + 64)
    return 2.0 * (net.num_decoder_layers * layer + net.width * net.vocabulary_rows)


def report(ours: list[dict[str, float]], peers: list[dict[str, float]]) -> str:
    """A table of medians, ours beside the peer's, and how near the machine's limit ours are."""
    mine = {key: statistics.median(run[key] for run in ours) for key in ours[0]}
    other = {key: statistics.median(run[key] for run in peers) for key in peers[0]} if peers else {}
    lines = [f"{'median of ' + str(len(ours)):28}{'ours':>10}{'peer':>10}{'peer/ours':>11}"]
    lines += [
        _row(key if "(" in key else f"{key} (s)", mine[key], other.get(key))
        for key in ("front end", "encode", "decode", "total", "peak memory (MB)")
    ]
    for figures in (mine, other):
        if figures:
            figures["decode (ms/token)"] = 1000 * figures["decode"] / figures["tokens"]
            figures["encode (ms/segment)"] = 1000 * figures["encode"] / figures["segments"]
            figures["real-time factor"] = figures["total"] / figures["audio"]
    lines += [
        _row(key, mine[key], other.get(key))
        for key in ("decode (ms/token)", "encode (ms/segment)", "real-time factor")
    ]
    encoder = mine["encoder GFLOP"] * mine["segments"] / mine["encode"]
    decoder = mine["token GFLOP"] * mine["tokens"] / mine["decode"]
    lines.append(
        f"matrix product peak {mine['peak GFLOP/s']:.0f} GFLOP/s; ",
    )
    lines[-1] += (
        f"encode {encoder:.0f}, decode {decoder:.0f} GFLOP/s; compiled in {mine['compile']:.1f} s"
    )
    return "\n".join(lines)


def _row(name: str, mine: float, other: float | None) -> str:
    if other is None:
        return f"{name:28}{mine:10.3f}"
    if not mine:  # not measured apart
        return f"{name:28}{'-':>10}{other:10.3f}"
    return f"{name:28}{mine:10.3f}{other:10.3f}{other / mine:10.2f}x"


COMMAND = Command("--model=MODEL --audio=FILE [FLAGS]", __doc__, _define_flags, _compare)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
