"""The examples in docstrings of the names a user meets first do what they show."""

from __future__ import annotations

import doctest
import importlib

import pytest

HOMES = {
    "mt3_keras.midi": ("read_midi",),
    "mt3_keras.note_decoder": ("NoteDecoder",),
    "mt3_keras.notes": ("Note",),
    "mt3_keras.streaming": ("StreamingTranscriber",),
    "mt3_keras.transcriber": ("Transcriber",),
}


@pytest.mark.parametrize("module", HOMES)
def test_examples_in_docstrings_work(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in HOMES[module]:
        assert ">>>" in (getattr(loaded, name).__doc__ or "")
    assert doctest.testmod(loaded, raise_on_error=False).failed == 0
