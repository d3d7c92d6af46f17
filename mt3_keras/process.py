"""Settings of the whole process that a command makes: threads, memory, streams, Keras' start.

Commands call these; the library itself changes nothing of the process it runs in.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

from mt3_keras.extras import require_keras
from mt3_keras.quiet import quiet_stderr


def open_closed_streams() -> None:
    """Opens the null device as standard input, output or error where the process has none.

    So it is in some services and after `>&-`; the next file opened would otherwise take the
    stream's place, and printing would fail.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115


def ignore_matplotlib_backend() -> None:
    """Drops MPLBACKEND: pictures go to files.

    A notebook's shell commands inherit a backend that is a module of the notebook's environment;
    matplotlib cannot be imported where that module is missing.
    """
    os.environ.pop("MPLBACKEND", None)


def limit_threads(threads: int | None) -> None:
    """Keeps this process to a number of cores; to be called before TensorFlow is loaded."""
    if threads is None:
        return
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(threads)
    if hasattr(os, "sched_setaffinity"):  # every backend obeys it, where the system has it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def keep_freed_memory() -> None:
    """Has glibc keep the memory of freed large tensors; other C libraries are left alone.

    By default glibc returns each to the system and requests it anew. The variables of the
    environment that set glibc's allocator take precedence.
    """
    # On two cores with AVX2, 40 % of an update of `small` went into page faults.
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never
        mallopt(top_pad, 256 * 2**20)


def load_keras() -> None:
    """Loads Keras and its backend; to be called before anything else does.

    Raises:
      ValueError: Keras cannot run here (see `require_keras`).
    """
    require_keras()
    with loading_tensorflow():
        import keras  # noqa: F401


@contextlib.contextmanager
def loading_tensorflow() -> Iterator[None]:
    """Keeps TensorFlow's messages off the terminal while it is loaded."""
    # The first come before any of its log settings hold.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # It leaves oneDNN off on processors without AVX-512, and trains half as fast without.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    with quiet_stderr():
        yield
