"""Outputs of a recording's segments -> its notes, once for files, streams, servers and training.

NumPy at most.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mt3_keras.codec import Codec
from mt3_keras.grammar import Rules
from mt3_keras.models.config import DetectorConfig, ModelConfig, TokenConfig
from mt3_keras.note_decoder import NoteDecoder
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.notes import Note
from mt3_keras.outputs import Output, RollOutput, TokenOutput
from mt3_keras.roll_decoder import RollDecoder


class Segment(NamedTuple):
    """What a token network emitted for one window: `start` in seconds, tokens up to and with EOS.

    Of a detector, which emits no tokens, the list is empty.
    """

    start: float
    tokens: list[int]


class Progress(NamedTuple):
    """A segment just read, where it ends, and the notes that ended in it.

    The notes still sounding at the end of the recording come with the last segment.
    `confidences` are those of a `Transcription`, of all notes so far.
    """

    segment: Segment
    end: float
    notes: list[Note]
    confidences: Mapping[Note, float]


@dataclasses.dataclass(frozen=True)
class Transcription:
    """Notes of a recording and how they came about.

    Attributes:
      notes: ordered by onset.
      segments: what the network emitted.
      invalid_events: tokens that meant nothing where they stood.
      dropped_events: tokens past the end of their segment.
      duration: seconds of audio.
      confidences: from 0 to 1, of each note's onset; empty for a network that emits tokens.
      track_names: of the MIDI track of each note, where it is not simply its instrument's.
    """

    notes: list[Note]
    segments: list[Segment]
    invalid_events: int
    dropped_events: int
    duration: float
    confidences: dict[Note, float] = dataclasses.field(default_factory=dict)
    track_names: dict[Note, str] = dataclasses.field(default_factory=dict)

    def write_midi(self, path: str | os.PathLike[str]) -> None:
        """Writes the notes as a MIDI file, one named track for each instrument."""
        from mt3_keras.midi import write_midi

        write_midi(self.notes, path, track_names=self.track_names)


def make_decoder(
    config: ModelConfig,
    decoding: RollDecoding | None = None,
    *,
    exact: bool = False,
    least_confidence: float | None = None,
    rules: Rules | None = None,
) -> NoteDecoder | RollDecoder:
    """The decoder of what a network predicts.

    Args:
      config: of the network.
      decoding: how a detector's rolls are read; None is that of a new network.
      exact: read tokens as the original does.
      least_confidence: that a detector's notes need; None lets it follow the music.
      rules: which instruments may appear (tokens: the search keeps them).

    Raises:
      ValueError: an option that the network has no use for.
    """
    if isinstance(config, DetectorConfig):
        if exact:
            raise ValueError("exact is the original's path, of a network that emits tokens")
        rules = rules or Rules()
        return RollDecoder(
            config.spectrogram.frames_per_second,
            decoding or RollDecoding(),
            least_confidence=least_confidence,
            programs=rules.programs,
            drums=rules.drums,
        )
    assert isinstance(config, TokenConfig)
    if least_confidence is not None:
        raise ValueError("least_confidence is for networks that predict rolls, such as small")
    return NoteDecoder(
        Codec(config.vocabulary.num_velocity_bins),
        ties=config.vocabulary.ties,
        segment_start="original" if exact else "grid",
    )


def feed(
    decoder: NoteDecoder | RollDecoder, start: float, output: Output, end: float | None
) -> list[Note]:
    """Has a decoder read one segment's output; the notes that ended in it."""
    if isinstance(output, RollOutput):
        assert isinstance(decoder, RollDecoder)
        return decoder.feed(start, output.rolls, end)
    assert isinstance(decoder, NoteDecoder)
    return decoder.feed(start, output.tokens, end)


class Recording:
    """One recording on its way: outputs come in any order and are read in order of time.

    Args:
      decoder: new, or one that has been reset.
      hop_frames: from the start of a segment to that of the next.
      rate: frames per second.
    """

    def __init__(self, decoder: NoteDecoder | RollDecoder, hop_frames: int, rate: float) -> None:
        self._decoder, self._hop_frames, self._rate = decoder, hop_frames, rate
        self._segments: list[Segment] = []
        self._waiting: dict[int, Output] = {}
        self._notes: list[Note] = []

    def add(self, index: int, output: Output) -> Iterator[Progress]:
        """Takes the output of segment `index`; yields segments that can be read now.

        A segment is read once the one after it is there, so that it is known where it ends.
        """
        self._waiting[index] = output
        while (number := len(self._segments)) + 1 in self._waiting and number in self._waiting:
            yield self._read(number, self._start(number + 1))

    def end(self, duration: float) -> Iterator[Progress]:
        """The recording, `duration` seconds long, has no further segments; yields the last one."""
        yield self._read(len(self._segments), None, duration)

    def finish(self, duration: float) -> Transcription:
        """The result, after `end`."""
        return Transcription(
            notes=self._notes,
            segments=self._segments,
            invalid_events=self._decoder.invalid_events,
            dropped_events=self._decoder.dropped_events,
            duration=duration,
            confidences=self._decoder.confidences,
        )

    def _start(self, number: int) -> float:
        return number * self._hop_frames / self._rate

    def _read(self, number: int, end: float | None, duration: float = 0.0) -> Progress:
        output, start = self._waiting.pop(number), self._start(number)
        tokens = output.tokens if isinstance(output, TokenOutput) else []
        segment = Segment(start, tokens)
        notes = feed(self._decoder, start, output, end)
        self._segments.append(segment)
        if end is None:
            num_ended = len(self._decoder.notes)
            self._notes = self._decoder.finish()
            notes = notes + self._decoder.notes[num_ended:]
        return Progress(segment, duration if end is None else end, notes, self._decoder.confidences)
