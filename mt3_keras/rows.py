"""Rows of numbers that grow for as long as a recording lasts. NumPy alone."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

IN_MEMORY = 2**20  # bytes; more are in a temporary file


class Rows:
    """Rows of one dtype, one after the other; many of them are kept in a temporary file.

    Args:
      dtype: of a row, such as ("f4", 129) for 129 numbers or a list of named fields.
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 - lives as long
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def append(self, rows: Any) -> None:
        """Takes more rows: an array, or a list of a tuple for each."""
        self._file.seek(self.dtype.itemsize * self._num_rows)
        content = np.asarray(rows, self.dtype.base)
        self._file.write(content.tobytes())
        self._num_rows += len(content)

    def read(self, first: int = 0, end: int | None = None) -> NDArray[Any]:
        """Rows first to end, by default all."""
        end = self._num_rows if end is None else end
        self._file.seek(self.dtype.itemsize * first)
        return np.frombuffer(self._file.read(self.dtype.itemsize * (end - first)), self.dtype)
