"""`mt3_keras.streaming` by the name it had before."""

from mt3_keras.streaming import NewNotes, NoteOn, StreamingTranscriber

__all__ = ["NewNotes", "NoteOn", "StreamingTranscriber"]
