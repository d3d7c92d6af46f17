"""What the benchmarks share: the machine, its limits, and runs in processes of their own."""

from __future__ import annotations

import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterable

import numpy as np
from absl import flags

GIGA = 1e9


def run_json(command: list[str]) -> dict[str, float]:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    found: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def run_again(
    module: str,
    values: flags.FlagValues,
    names: Iterable[str],
    *options: str,
    python: str = sys.executable,
) -> dict[str, float]:
    """The figures of a benchmark in a process of its own.

    Args:
      module: of the benchmark.
      values: flags of this process.
      names: those that the other is given too.
      *options: further ones.
      python: interpreter of the other process.
    """
    given = (f"--{name}={values[name].value}" for name in names)
    return run_json([python, "-m", module, *given, *options])


def resident_mb(pid: int | None = None) -> float:
    """Memory of a process, by default this one; NaN where it has ended or no system tells."""
    try:
        lines = pathlib.Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    except OSError:
        return math.nan
    sizes = [line.split()[1] for line in lines if line.startswith("VmRSS")]
    return int(sizes[0]) / 1024 if sizes else math.nan


def processor_seconds(pid: int | None = None) -> float:
    """Time that a process, by default this one, has spent computing; NaN without /proc."""
    stat = pathlib.Path(f"/proc/{pid or 'self'}/stat")
    if not stat.exists():
        return float("nan")
    fields = stat.read_text().rpartition(")")[2].split()  # the name may hold spaces
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def describe_machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0].split(":")[1].strip() if models else name
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores{load}, Python {platform.python_version()}"


def matmul_speed(size: int = 2048, num_products: int = 6) -> float:
    """Floating-point operations per second of a square float32 matrix product of NumPy's."""
    matrix, best = np.ones((size, size), np.float32), math.inf
    for _ in range(num_products):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
