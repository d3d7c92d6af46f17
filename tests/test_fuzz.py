"""Damaged and odd inputs of every kind are read, or refused in one line (`benchmarks.fuzz`)."""

from __future__ import annotations

import sys

import pytest

from benchmarks.fuzz import KINDS, try_all

NUM_EACH = 30  # 330 in all; the command tries more


@pytest.mark.parametrize("kind", KINDS)
def test_no_situation_is_a_fault(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # ffmpeg's start takes longer than all else
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    found, faults = try_all([kind], 0, NUM_EACH)
    assert not faults
    assert found[kind].total() == NUM_EACH
