"""Keeps off the terminal what libraries write to standard error past Python."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_lock = threading.RLock()  # descriptor 2 is the process's


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drops all that is written to standard error meanwhile; our own errors are exceptions."""
    with _lock, open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
