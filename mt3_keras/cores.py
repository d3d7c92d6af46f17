"""How many cores work can be spread over."""

from __future__ import annotations

import os


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_thread_pools(threads: int) -> None:
    """Has TensorFlow and NumPy's BLAS, not yet loaded, take so many threads each."""
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(threads)
