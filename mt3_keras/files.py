"""Files: reading only regular ones, and writing that leaves the old file or the whole new one."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import secrets
import stat
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: what killed runs left stays there
    fcntl = None  # type: ignore[assignment]

_LABEL = "user.mt3.source"
_PREFIX, _SUFFIX = ".mt3-", ".part"
# What the system answers to a write; it names no file then.
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_swept: set[pathlib.Path] = set()  # folders that this process looked through


def open_regular(path: str | os.PathLike[str], error: type[Exception]) -> IO[bytes]:
    """Opens a regular file that is not empty, unbuffered.

    Raises:
      error: it is missing, a folder, a pipe, a device, empty or may not be read; one line.
    """
    path = pathlib.Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise error(f"{path}: is a folder; name a file in it")
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: is not a regular file; save it to a file first")
        if not status.st_size:
            raise error(f"{path}: is empty (0 bytes); copy or download it again")
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise error(f"{path}: no such file; check the name") from None
    except (OSError, ValueError) as problem:  # ValueError: a name with a null character
        if isinstance(problem, error):
            raise
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path}: cannot be read ({reason}); check its name and permissions") from None


def set_label(path: str | os.PathLike[str], text: str) -> None:
    """Attaches a text to a file, where the file system can; not part of the content."""
    if hasattr(os, "setxattr"):  # Linux
        with contextlib.suppress(OSError):
            os.setxattr(path, _LABEL, text.encode())


def read_label(path: str | os.PathLike[str]) -> str | None:
    """What `set_label` attached; None where there is nothing."""
    if hasattr(os, "getxattr"):
        with contextlib.suppress(OSError):
            return os.getxattr(path, _LABEL).decode()
    return None


class replacing:  # noqa: N801 - reads as the statement it is: `with replacing(path) as temporary`
    """Gives a new, empty file beside `path`, moved onto it on success and removed on failure.

    The temporary name is short and cannot be foreseen; a link at `path` is replaced, not followed.
    What killed processes left in the folder is removed when a process first writes there: a file
    is locked as long as its writer lives.

    Raises:
      OSError: the file cannot be written; names `path`, also where the system named no file.
      ValueError: `path` is a device, a pipe or a socket.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.temporary = self.path.with_name(f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
        self._descriptor = -1

    def __enter__(self) -> pathlib.Path:
        with contextlib.suppress(OSError):
            mode = self.path.stat().st_mode  # /dev/stdout is a link
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{self.path}: is not a regular file; choose another name")
        _sweep(self.path.parent.resolve())
        try:
            while not self._create():
                os.close(self._descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        return self.temporary

    def _create(self) -> bool:
        """Makes and locks the temporary file; False if another's `_sweep` came between."""
        self._descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # where locks are unknown, nothing is swept either
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        return os.fstat(self._descriptor).st_nlink > 0

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        try:
            if kind is None:
                self.temporary.replace(self.path)
        except OSError as failure:
            raise OSError(failure.errno, failure.strerror, str(self.path)) from None
        finally:
            os.close(self._descriptor)
            with contextlib.suppress(OSError):
                self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and (
            error.filename in (self.temporary, str(self.temporary))
            or (error.filename is None and error.errno in _WRITE_ERRORS)
        ):
            error.filename = str(self.path)


def _sweep(folder: pathlib.Path) -> None:
    """Removes the temporary files in a folder whose writers have ended."""
    if fcntl is None or folder in _swept:
        return
    _swept.add(folder)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not (entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX)):
                continue
            with contextlib.suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    pathlib.Path(entry.path).unlink()
                finally:
                    os.close(descriptor)
