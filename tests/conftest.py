"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of golden outputs, official weights and sample data; skips where it is absent."""
    folder = pathlib.Path(os.environ.get("MT3_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the shared folder of reference data: set MT3_SHARED ({folder} is none)")
    return folder
