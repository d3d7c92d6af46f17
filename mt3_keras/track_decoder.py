"""Tokens of a decoder for each group of instruments -> notes of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mt3_keras.note_decoder import NoteDecoder
from mt3_keras.notes import Note, OpenNote, sort_notes
from mt3_keras.outputs import split_sequences
from mt3_keras.tracks import Tracks


class TrackDecoder:
    """Reads the tokens of successive segments, those of each group by a `NoteDecoder` of its own.

    The notes of all are put into the order of time. Where two decoders emit one note, that of the
    group which the note's instrument belongs to counts: what a decoder emits of instruments of
    other groups is left out, and counted among `invalid_events`. Notes of one pitch and time with
    instruments of different groups are a unison, and all kept.

    Args:
      tracks: the groups.
      make_decoder: makes the `NoteDecoder` of one.

    Attributes:
      notes, confidences: as of `NoteDecoder`.
    """

    def __init__(self, tracks: Tracks, make_decoder: Callable[[], NoteDecoder]) -> None:
        self._tracks = tracks
        self._decoders = [make_decoder() for _ in tracks.tracks]
        self.notes: list[Note] = []
        self.confidences: dict[Note, float] = {}
        self._num_foreign = 0

    @property
    def invalid_events(self) -> int:
        """Tokens that meant nothing where they stood, and notes left out."""
        return self._num_foreign + sum(decoder.invalid_events for decoder in self._decoders)

    @property
    def dropped_events(self) -> int:
        """Tokens past the end of their segment."""
        return sum(decoder.dropped_events for decoder in self._decoders)

    @property
    def open_notes(self) -> dict[tuple[int, int], OpenNote]:
        """Notes that still sound, by (program, pitch)."""
        return {
            key: note
            for number, decoder in enumerate(self._decoders)
            for key, note in decoder.open_notes.items()
            if self._tracks.owner(key[0], False) == number
        }

    def feed(self, start: float, tokens: Sequence[int], end: float | None = None) -> list[Note]:
        """Reads one segment: as of `NoteDecoder`, with `tokens` of all decoders in order."""
        sequences = split_sequences(tokens, len(self._decoders))
        ended = []
        for number, sequence in enumerate(sequences):
            ended += self._take(number, self._decoders[number].feed(start, sequence, end))
            self._decoders[number].notes.clear()
        return ended

    def finish(self) -> list[Note]:
        """Ends all sounding notes, each group's at the time of its last event; all notes."""
        for number, decoder in enumerate(self._decoders):
            self._take(number, decoder.finish())
            decoder.notes.clear()
        return sort_notes(self.notes)

    def _take(self, number: int, notes: Iterable[Note]) -> list[Note]:
        notes = list(notes)
        own = [n for n in notes if self._tracks.owner(n.program, n.is_drum) == number]
        self._num_foreign += len(notes) - len(own)
        self.notes += own
        return own
