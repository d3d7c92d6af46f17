"""Archives of recordings: the same notes on every runner, killed or not; throughput and memory.

    python -m benchmarks.archives --folder DIR --steps alone,local,dask,spark,local-kills,long

Renders short recordings of mixed lengths and damages some (DIR/music, kept for the next call), then

    alone   one `mt3 transcribe` for each core, what the others are compared with
    local   `mt3 archive` on Beam's local runner
    dask    the same on a Dask cluster of three processes
    spark   `mt3_keras.spark` on Spark's local-cluster mode with two executors
    local-kills, dask-kills, spark-kills
            of the first recordings: `kill -9` of drivers and of workers at random moments
    long    a long recording, in sections and whole

Each checks that every recording has the notes of `alone`, MIDI files to the byte, and every damaged
one a reason. Speeds are compared with that of `alone` in the same run: by the clock, and by
processor time, which other work of the machine hardly changes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import functools
import itertools
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import soundfile
from absl import flags

from benchmarks.machine import describe_machine, resident_mb
from mt3_keras.cli.command_line import Command, Flags, check_names, run
from mt3_keras.cores import count_cores
from mt3_keras.synth.synthetic import SyntheticConfig, render

RUNNERS = ("local", "dask", "spark")
STEPS = ("alone", *RUNNERS, *(f"{runner}-kills" for runner in RUNNERS), "long")
MT3 = [sys.executable, "-m", "mt3_keras"]
SHORTEST = 1.0  # seconds of a recording
PIECE_SECONDS = 60.0  # of a long recording, which is made of many pieces
SPARK_CORES = 2


class Usage(NamedTuple):
    """What a step took: by the clock, of processors, and memory of its largest process by turns."""

    seconds: float
    processor_seconds: float
    memory: list[float]  # MB, of each quarter of the time


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.archives", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.text("folder", None, "For recordings and results.", required=True)
    add.names("steps", ["alone", "local"], f"Of {', '.join(STEPS)}.")
    add.count("recordings", 2000, "Short ones.")
    add.number("seconds", 5.0, "Of the longest, where they are not there yet.", least=SHORTEST)
    add.count("damaged", 40, "Of the recordings.", least=0)
    add.count("kills", 10, "Of a driver, and of a worker.")
    add.count("kill_recordings", 200, "Of the recordings.")
    add.number("hours", 3.0, "Of the long recording.", least=0.02)


def _take_steps(values: flags.FlagValues, _: list[str]) -> None:
    check_names("steps", values.steps, STEPS)
    root = pathlib.Path(values.folder)
    music = _write_music(root / "music", values.recordings, values.seconds, values.damaged)
    print(f"machine: {describe_machine()}", flush=True)
    steps = {
        "alone": lambda: _run_alone(root, music),
        "local": lambda: _run_archive(
            root / "local", root, music, ["--num_workers", str(count_cores())]
        ),
        "dask": lambda: _run_dask(root, music),
        "spark": lambda: _run_spark(root, music),
    }
    audio = sum(map(_duration, music))
    for step in (step for step in steps if step in values.steps):
        shutil.rmtree(root / step, ignore_errors=True)
        usage = steps[step]()
        stored = root / "alone.json"
        if step == "alone":
            stored.write_text(json.dumps(usage))
        base = Usage(*json.loads(stored.read_text())) if stored.exists() else None
        _report(step, usage, base, audio)
    for runner in RUNNERS:
        if f"{runner}-kills" in values.steps:
            _kill(root, music[: values.kill_recordings], values.kills, runner)
    if "long" in values.steps:
        _run_long(root / "long", values.hours)


def _report(step: str, usage: Usage, base: Usage | None, audio: float) -> None:
    speeds = f"{audio / usage.processor_seconds:.0f} audio hours a core hour"
    if base and base != usage:
        clock, processor = (ours / theirs for ours, theirs in zip(base[:2], usage[:2], strict=True))
        speeds += f", throughput {clock:.2f} of alone by the clock, {processor:.2f} by processor"
    memory = ", ".join(f"{number:.0f}" for number in usage.memory)
    print(
        f"{step}: {usage.seconds:.0f} s, {usage.processor_seconds:.0f} processor seconds, {speeds},"
        f" memory by quarters of the time {memory} MB",
        flush=True,
    )


# --- recordings ---


def _write_music(
    folder: pathlib.Path, count: int, longest: float, num_damaged: int
) -> list[pathlib.Path]:
    """Recordings of mixed lengths and formats, every so manieth damaged in one of four ways."""
    paths = [folder / f"{n:05d}.{('flac', 'wav')[n % 2]}" for n in range(count)]
    if (folder / "done").exists():
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    every = count // num_damaged if num_damaged else 0
    with concurrent.futures.ProcessPoolExecutor(count_cores()) as pool:
        list(pool.map(_write_recording, paths, itertools.repeat(longest), chunksize=20))
    for number in range(num_damaged):
        _damage(paths[number * every + number % every], number % 4)
    (folder / "done").touch()
    return paths


def _write_recording(path: pathlib.Path, longest: float) -> None:
    number = int(path.stem)
    seconds = float(np.random.default_rng(number).uniform(SHORTEST, longest))
    soundfile.write(path, render(SyntheticConfig(seconds=seconds), number).samples, 16_000)


def _damage(path: pathlib.Path, way: int) -> None:
    content = path.read_bytes()
    damaged = (b"", content[: len(content) // 2], b"no sound" * 99)
    if way == 3:
        soundfile.write(path, np.full(16_000, np.nan), 16_000, format="WAV", subtype="FLOAT")
    else:
        path.write_bytes(damaged[way])


def _duration(path: pathlib.Path) -> float:
    with contextlib.suppress(soundfile.LibsndfileError):
        return float(soundfile.info(path).duration)
    return 0.0


# --- runs ---


def _run(
    *commands: Sequence[str], codes: Sequence[int] = (0,), environment: dict[str, str] | None = None
) -> Usage:
    """Runs commands side by side and watches them."""
    before, began = _children_seconds(), time.monotonic()
    running = [_start(command, environment) for command in commands]
    samples = []
    while any(process.poll() is None for process in running):
        sizes = [resident_mb(pid) for process in running for pid in _tree(process.pid)]
        samples.append(max((size for size in sizes if size == size), default=0.0))
        time.sleep(1.0)
    for command, process in zip(commands, running, strict=True):
        if process.returncode not in codes:
            sys.exit(f"{' '.join(command)[:200]}: ended with {process.returncode}")
    seconds, used = time.monotonic() - began, _children_seconds() - before
    return Usage(seconds, used, _quarters(samples))


def _children_seconds() -> float:
    """Processor time of all processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _quarters(samples: Sequence[float]) -> list[float]:
    """The largest of each quarter of the time."""
    return [max(part) for part in np.array_split(samples, 4) if len(part)]


def _start(
    command: Sequence[str], environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    log = subprocess.DEVNULL if "BENCHMARK_LOG" not in os.environ else None
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=log,
        stderr=log,
        env=os.environ | (environment or {}),
    )


def _tree(pid: int) -> list[int]:
    """A process and those that it started."""
    found = [pid]
    for process in found:
        with contextlib.suppress(OSError):
            for thread in pathlib.Path(f"/proc/{process}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def _list(root: pathlib.Path, music: Sequence[pathlib.Path]) -> str:
    path = root / f"list-{len(music)}.txt"
    path.write_text("".join(f"{name}\n" for name in music))
    return f"--files={path}"


def _run_alone(root: pathlib.Path, music: Sequence[pathlib.Path]) -> Usage:
    listed, count = _list(root, music), count_cores()
    flags = ["--noprogress", "--threads=1", "--formats=mid,csv", f"--output_dir={root / 'alone'}"]
    shards = [f"--shard={number + 1}/{count}" for number in range(count)]
    # On as many cores as there are processes, not all on the first.
    commands = [
        ["taskset", "-c", str(core), *MT3, "transcribe", listed, *flags, shard]
        for core, shard in zip(sorted(os.sched_getaffinity(0)), shards, strict=True)
    ]
    return _run(*commands, codes=(0, 1))  # 1: some failed


def _archive_command(
    out: pathlib.Path, listed: str, flags: Sequence[str], beam_flags: Sequence[str] = ()
) -> list[str]:
    return [*MT3, "archive", listed, f"--output_dir={out}", *flags, "--", *beam_flags]


def _run_archive(
    out: pathlib.Path, root: pathlib.Path, music: Sequence[pathlib.Path], flags: Sequence[str]
) -> Usage:
    usage = _run(_archive_command(out, _list(root, music), flags))
    _check_archive(out, root, music)
    return usage


DASK = {
    "OMP_NUM_THREADS": "1",  # as Dask's nanny has it
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",  # a sample every 10 ms
    # As for Spark, a task is not given up for the workers that were killed at it.
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "100",
}


class Dask:
    """A scheduler and three worker processes on loopback, for a `with`."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "scheduler.json"
        self._file.unlink(missing_ok=True)

    def __enter__(self) -> Dask:
        host = ["--host", "127.0.0.1"]
        dask = [sys.executable, "-m", "dask"]
        scheduler = [*dask, "scheduler", *host, "--port", "0", "--no-dashboard"]
        self._worker = [*dask, "worker", *host, "--scheduler-file", str(self._file)]
        self._worker += ["--nthreads", "1", "--no-nanny", "--no-dashboard"]
        self._scheduler = _start([*scheduler, "--scheduler-file", str(self._file)], DASK)
        self.workers = [self._start_worker() for _ in range(3)]
        while not self._file.exists():
            time.sleep(0.2)
        address = json.loads(self._file.read_text())["address"]
        self.flags = ["--runner=DaskRunner"]
        self.beam_flags = [f"--dask_client_address={address}"]
        return self

    def _start_worker(self) -> subprocess.Popen[bytes]:
        return _start(self._worker, DASK)

    def kill_worker(self, rng: random.Random) -> bool:
        """Kills one; another takes its place."""
        index = rng.randrange(3)
        self.workers[index].kill()
        self.workers[index].wait()
        self.workers[index] = self._start_worker()
        return True

    def __exit__(self, *_: object) -> None:
        for process in (*self.workers, self._scheduler):
            process.terminate()
            process.wait()


def _run_dask(root: pathlib.Path, music: Sequence[pathlib.Path]) -> Usage:
    before = _children_seconds()
    peaks: list[float] = []
    over = threading.Event()
    with Dask(root / "dask-cluster") as cluster:
        pids = [worker.pid for worker in cluster.workers]
        watcher = threading.Thread(target=_watch, args=(pids, peaks, over))
        watcher.start()
        listed = _list(root, music)
        usage = _run(_archive_command(root / "dask", listed, cluster.flags, cluster.beam_flags))
        over.set()
        watcher.join()
    used = _children_seconds() - before
    _check_archive(root / "dask", root, music)
    return Usage(usage.seconds, used, _quarters(peaks))


def _watch(pids: Sequence[int], peaks: list[float], over: threading.Event) -> None:
    while not over.wait(1.0):
        peaks.append(max(map(resident_mb, pids)))


SPARK = """
import sys
from pyspark.sql import SparkSession
from mt3_keras import spark
listed, out, executors = sys.argv[1:]
session = (
    SparkSession.builder.master(f"local-cluster[{executors},1,1024]")
    .config("spark.ui.enabled", "false").config("spark.executor.memory", "512m")
    .config("spark.driver.bindAddress", "127.0.0.1").config("spark.driver.host", "127.0.0.1")
    .config("spark.task.maxFailures", "100").config("spark.deploy.maxExecutorRetries", "-1")
    .config("spark.excludeOnFailure.enabled", "false").getOrCreate()
)
session.sparkContext.setLogLevel("ERROR")
names = [(name,) for name in open(listed).read().splitlines()]
frame = session.createDataFrame(names, "path string").repartition(max(2, len(names) // 25))
spark.transcribe(frame).write.mode("overwrite").parquet(out)
session.stop()
"""


def _spark_command(out: pathlib.Path, listed: str) -> tuple[list[str], dict[str, str]]:
    environment = {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    environment["PYTHONPATH"] = str(pathlib.Path.cwd())
    command = [sys.executable, "-c", SPARK, listed.removeprefix("--files="), str(out)]
    return [*command, str(SPARK_CORES)], environment


def _run_spark(root: pathlib.Path, music: Sequence[pathlib.Path]) -> Usage:
    command, environment = _spark_command(root / "spark", _list(root, music))
    # Spark does not wait for its executors, so that their processor time is not known.
    usage = _run(command, environment=environment)._replace(processor_seconds=math.nan)
    _check_spark(root / "spark", root, music)
    return usage


# --- what came out ---


def _expected(root: pathlib.Path, music: Sequence[pathlib.Path]) -> dict[str, list[dict[str, Any]]]:
    """The notes that `alone` found of each recording that it could use."""
    found = {}
    for recording in music:
        table = root / "alone" / f"{recording.stem}.csv"
        if table.exists():
            with table.open() as file:
                found[str(recording)] = [_plain(row) for row in csv.DictReader(file)]
    return found


def _plain(row: dict[str, Any]) -> dict[str, str]:
    """A note's row as text, whatever file or engine it comes from."""
    keys = ("onset", "offset", "pitch", "velocity", "program", "is_drum", "confidence")
    numbers = {k: f"{float(row[k]):.3f}" for k in keys if k != "is_drum"}
    return numbers | {"is_drum": str(row["is_drum"]), "instrument": row["instrument"]}


def _check_archive(out: pathlib.Path, root: pathlib.Path, music: Sequence[pathlib.Path]) -> None:
    """Every recording once, with the same notes and bytes, or with a reason; nothing else."""
    expected = _expected(root, music)
    lines = _read_lines(out, "recordings-*.jsonl")
    names = [line["recording"] for line in lines]
    assert sorted(names) == sorted(expected), "recordings are missing or there twice"
    for line in lines:
        name = line["recording"]
        assert [_plain(row) for row in line["notes"]] == expected[name], name
        alone = root / "alone" / f"{pathlib.Path(name).stem}.mid"
        assert (out / line["midi"]).read_bytes() == alone.read_bytes(), name
    failed = _read_lines(out, "failed-*.jsonl")
    assert sorted(line["recording"] for line in failed) == sorted({*map(str, music)} - {*expected})
    assert all(line["reason"] for line in failed)
    _check_rows(sorted(out.glob("notes-*.parquet")), expected)
    print(f"{out.name}: {len(lines)} recordings as alone, {len(failed)} reasons", flush=True)


def _check_rows(files: Sequence[pathlib.Path], expected: dict[str, list[dict[str, str]]]) -> None:
    from pyarrow import parquet

    found: dict[str, list[dict[str, str]]] = {name: [] for name in expected}
    for row in (row for file in files for row in parquet.read_table(file).to_pylist()):
        if row.get("error") is None:
            found[row["recording"]].append(_plain(row))
    assert found == expected


def _check_spark(out: pathlib.Path, root: pathlib.Path, music: Sequence[pathlib.Path]) -> None:
    from pyarrow import parquet

    expected, files = _expected(root, music), sorted(out.glob("*.parquet"))
    _check_rows(files, expected)
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    failed = [row["recording"] for row in rows if row["error"]]
    assert sorted(failed) == sorted({*map(str, music)} - {*expected})
    print(f"{out.name}: {len(expected)} recordings as alone, {len(failed)} reasons", flush=True)


def _read_lines(folder: pathlib.Path, pattern: str) -> list[dict[str, Any]]:
    texts = (file.read_text() for file in sorted(folder.glob(pattern)))
    return [json.loads(line) for text in texts for line in text.splitlines()]


# --- kills ---


class Job(NamedTuple):
    """What is killed: its command, `kill_worker` given the driver's pid, and what must come out."""

    out: pathlib.Path
    command: list[str]
    environment: dict[str, str]
    kill_worker: Callable[[int], bool]
    check: Callable[[pathlib.Path, pathlib.Path, Sequence[pathlib.Path]], None]


def _kill(root: pathlib.Path, music: Sequence[pathlib.Path], count: int, runner: str) -> None:
    rng, listed, out = random.Random(29), _list(root, music), root / f"{runner}-kills"
    if runner == "local":
        flags = ["--num_workers", str(count_cores())]
        command = _archive_command(out, listed, flags)
        kill = functools.partial(_kill_one, name="spawn_main", rng=rng)
        _kill_often(Job(out, command, {}, kill, _check_archive), root, music, count, rng)
    elif runner == "spark":
        kill = functools.partial(_kill_one, name="CoarseGrainedExecutorBackend", rng=rng)
        job = Job(out, *_spark_command(out, listed), kill, _check_spark)
        _kill_often(job, root, music, count, rng)
    else:
        with Dask(root / "dask-kills-cluster") as cluster:
            command = _archive_command(out, listed, cluster.flags, cluster.beam_flags)
            job = Job(out, command, {}, lambda _: cluster.kill_worker(rng), _check_archive)
            _kill_often(job, root, music, count, rng)


def _kill_often(
    job: Job, root: pathlib.Path, music: Sequence[pathlib.Path], count: int, rng: random.Random
) -> None:
    """Kills drivers, then workers; what is left after each turn is completed and checked."""
    shutil.rmtree(job.out, ignore_errors=True)
    usual = _run(job.command, environment=job.environment).seconds
    for victim, pause in (("driver", usual), ("worker", 2 * usual / count)):
        shutil.rmtree(job.out, ignore_errors=True)
        num_killed = num_whole = 0
        process = _start(job.command, job.environment)
        while num_killed < count:
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert process.wait(rng.uniform(0, pause)) == 0
                job.check(job.out, root, music)  # it was quicker: once more, from nothing
                num_whole += 1
                shutil.rmtree(job.out)
                process = _start(job.command, job.environment)
                continue
            if victim == "worker":
                num_killed += job.kill_worker(process.pid)
                continue
            _kill_driver(process)
            num_killed += 1
            process = _start(job.command, job.environment)
        assert process.wait() == 0
        job.check(job.out, root, music)
        print(f"{job.out.name}: {num_killed} kills of a {victim}, {num_whole + 1} ends", flush=True)


def _kill_driver(process: subprocess.Popen[bytes]) -> None:
    """The driver alone is killed; what it started must end by itself."""
    started = _tree(process.pid)[1:]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120.0
    while any(_is_running(pid) for pid in started):
        assert time.monotonic() < deadline, "a killed driver's processes go on"
        time.sleep(0.5)


def _is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _kill_one(driver: int, name: str, rng: random.Random) -> bool:
    """Kills one of the processes that a driver started and whose command holds a name."""
    found = []
    for process in _tree(driver)[1:]:
        with contextlib.suppress(OSError):
            if name in pathlib.Path(f"/proc/{process}/cmdline").read_text():
                found.append(process)
    if not found:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(found), signal.SIGKILL)
    return True


# --- a long recording ---


def _run_long(root: pathlib.Path, hours: float) -> None:
    """Whole by `mt3 transcribe`, in sections by `mt3 archive`."""
    recording = root / "long.flac"
    if not recording.exists():
        root.mkdir(parents=True, exist_ok=True)
        with soundfile.SoundFile(root / "part.flac", "w", 16_000, 1) as file:
            for samples in _long_pieces(hours):
                file.write(samples)
        (root / "part.flac").rename(recording)
    for name in ("alone", "sections"):
        shutil.rmtree(root / name, ignore_errors=True)
    flags = ["--noprogress", "--threads=1", "--formats=mid,csv", f"--output_dir={root / 'alone'}"]
    base = _run([*MT3, "transcribe", str(recording), *flags])
    _report("long, whole, one core", base, None, 3600 * hours)
    command = [*MT3, "archive", str(recording), f"--output_dir={root / 'sections'}"]
    usage = _run([*command, "--num_workers", str(count_cores())])
    _report("long, in sections", usage, None, 3600 * hours)
    _check_archive(root / "sections", root, [recording])
    (line,) = _read_lines(root / "sections", "recordings-*.jsonl")
    print(f"long: all {len(line['notes'])} notes as in the whole", flush=True)


def _long_pieces(hours: float) -> Iterator[np.ndarray]:
    for number in range(round(3600 * hours / PIECE_SECONDS)):
        yield render(SyntheticConfig(seed=29, seconds=PIECE_SECONDS), number).samples


COMMAND = Command("--folder=DIR [FLAGS]", __doc__, _define_flags, _take_steps)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
