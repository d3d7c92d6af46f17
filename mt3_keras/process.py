"""Settings of the whole process that a command makes: threads, memory, streams, Keras' start.

Commands call these; the library itself changes nothing of the process it runs in.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, TextIO, cast

from mt3_keras.cores import limit_thread_pools
from mt3_keras.extras import require_keras
from mt3_keras.quiet import quiet_stderr


class OutputClosed(Exception):  # noqa: N818 - the reader's choice, not a fault
    """Standard output was all that was asked for, and nobody reads it any more."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: ends the process as Ctrl-C does, so that files are cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def printable(text: str) -> str:
    """A text, such as a file's name, as a terminal may show it: on one line, no control codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Output:
    """A stream of text that drops what is written once its reader has closed it.

    Attributes:
      is_closed: whether that has happened.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_closed = False
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal lacks is no error
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is buffered goes nowhere, or Python would complain again at its end.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self.is_closed = isinstance(error, BrokenPipeError)
            if not self.is_closed:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def any_streams() -> Iterator[None]:
    """Lets a command print, whatever its standard streams are.

    Where the process has none (some services, `>&-`), the null device takes their place: the next
    file opened would otherwise, and printing would fail. Where the reader closes one early
    (`| head`), or it cannot hold a letter, the work goes on.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
    if logging.lastResort:
        logging.lastResort.setFormatter(_Printable())
    output, errors = _Output(sys.stdout), _Output(sys.stderr)
    with (
        contextlib.redirect_stdout(cast(Any, output)),
        contextlib.redirect_stderr(cast(Any, errors)),
    ):
        yield


@contextlib.contextmanager
def saved_input() -> Iterator[pathlib.Path]:
    """What comes on standard input as a file, as long as the block lasts.

    Raises:
      ValueError: standard input is a terminal, or absent.
    """
    source = getattr(sys.stdin, "buffer", None)
    if source is None or sys.stdin.isatty():
        raise ValueError("-: nothing comes on standard input: pipe a recording into the command")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "standard_input")
        with path.open("wb") as file:
            shutil.copyfileobj(source, file, 2**20)
        yield path


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Has SIGTERM and SIGHUP raise `Terminated` in the main thread; a second one kills."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: one
    numbers = [getattr(signal, name) for name in names]
    process = os.getpid()

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a worker that was forked: no command of its own
            os.kill(os.getpid(), number)
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python allows it nowhere else
    # nohup's, and what a caller in Python has set, stays
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


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
    limit_thread_pools(threads)
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
