"""How many cores work can be spread over."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

_is_one = contextvars.ContextVar("_is_one", default=False)


def count_cores() -> int:
    """Cores that this process may use; one within `on_one_core`."""
    if _is_one.get():
        return 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """What this thread opens meanwhile takes one core, as where every core has a worker."""
    token = _is_one.set(True)
    try:
        yield
    finally:
        _is_one.reset(token)


def limit_thread_pools(threads: int) -> None:
    """Has TensorFlow and NumPy's BLAS, not yet loaded, take so many threads each."""
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(threads)
