"""Music audio in, multi-instrument MIDI out: MT3 in Keras 3.

Names are loaded on first use, so that importing the package loads neither Keras nor TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mt3_keras.midi import read_midi, write_midi
    from mt3_keras.models.detector import NoteDetector
    from mt3_keras.models.mt3 import MT3Backbone
    from mt3_keras.models.recurrent import RecurrentBackbone
    from mt3_keras.models.tracks_in import TracksInBackbone
    from mt3_keras.models.tracks_out import TracksOutBackbone
    from mt3_keras.notes import Note
    from mt3_keras.streaming import StreamingTranscriber
    from mt3_keras.transcriber import Transcriber, transcribe

__version__ = "0.1.0"
__all__ = [
    "MT3Backbone",
    "Note",
    "NoteDetector",
    "RecurrentBackbone",
    "StreamingTranscriber",
    "TracksInBackbone",
    "TracksOutBackbone",
    "Transcriber",
    "read_midi",
    "transcribe",
    "write_midi",
]

_HOMES = {
    "MT3Backbone": "mt3_keras.models.mt3",
    "Note": "mt3_keras.notes",
    "NoteDetector": "mt3_keras.models.detector",
    "RecurrentBackbone": "mt3_keras.models.recurrent",
    "StreamingTranscriber": "mt3_keras.streaming",
    "TracksInBackbone": "mt3_keras.models.tracks_in",
    "TracksOutBackbone": "mt3_keras.models.tracks_out",
    "Transcriber": "mt3_keras.transcriber",
    "read_midi": "mt3_keras.midi",
    "transcribe": "mt3_keras.transcriber",
    "write_midi": "mt3_keras.midi",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
