"""Outputs of a recording's segments -> its notes, once for files, streams, servers and training.

NumPy at most.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mt3_keras.beats import Beats
from mt3_keras.codec import Codec
from mt3_keras.grammar import Rules
from mt3_keras.models.config import DetectorConfig, ModelConfig, TokenConfig
from mt3_keras.note_decoder import NoteDecoder
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.notes import Note
from mt3_keras.outputs import Output, RollOutput, TokenOutput
from mt3_keras.roll_decoder import RollDecoder
from mt3_keras.track_decoder import TrackDecoder

Decoder = NoteDecoder | TrackDecoder | RollDecoder


class Segment(NamedTuple):
    """What a token network emitted for one window: `start` in seconds, tokens up to and with EOS.

    Of a detector, which emits no tokens, the list is empty.
    """

    start: float
    tokens: list[int]


class Progress(NamedTuple):
    """A segment just read, where it ends, and the notes that ended in it.

    A detector's may have other instruments in the end, when the whole piece is known
    (`Transcription`). The notes still sounding at the end of the recording come with the last
    segment. `confidences` are those of a `Transcription`, of these notes at least.
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

    @functools.cached_property
    def beats(self) -> Beats | None:
        """Beats and bars of the notes; None where they are not certain enough."""
        from mt3_keras.beat_tracker import track_beats

        return track_beats(self.notes)

    def write_midi(self, path: str | os.PathLike[str], *, text: str = "") -> None:
        """Writes the notes as a MIDI file, one named track for each instrument, and their beats.

        Args:
          path: the file.
          text: that the file states, such as `describe_source`.
        """
        from mt3_keras.midi import write_midi

        write_midi(self.notes, path, beats=self.beats, text=text, track_names=self.track_names)

    def write_score(self, path: str | os.PathLike[str], *, title: str = "") -> None:
        """Writes the notes as sheet music, by the suffix .musicxml, .svg or .pdf.

        Raises:
          ValueError: there are no notes, or no beats that are certain enough.
        """
        from mt3_keras.engraving import write_score

        write_score(self.notes, path, beats=self.beats, title=title)


def make_decoder(
    config: ModelConfig,
    decoding: RollDecoding | None = None,
    *,
    exact: bool = False,
    least_confidence: float | None = None,
    rules: Rules | None = None,
    num_instruments: int | None = None,
    keeps_notes: bool = True,
    tells_notes: bool = True,
) -> Decoder:
    """The decoder of what a network predicts.

    Args:
      config: of the network.
      decoding: how a detector's rolls are read; None is that of a new network.
      exact: read tokens as the original does.
      least_confidence: that a detector's notes need; None takes those of `decoding`.
      rules: which instruments may appear (tokens: the search keeps them).
      num_instruments: of a detector's notes at most, drums not counted.
      keeps_notes: see `RollDecoder`.
      tells_notes: likewise.

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
            num_instruments=num_instruments,
            keeps_notes=keeps_notes,
            tells_notes=tells_notes,
        )
    assert isinstance(config, TokenConfig)
    unused = {"least_confidence": least_confidence, "num_instruments": num_instruments}
    for name, value in unused.items():
        if value is not None:
            raise ValueError(f"{name} is for networks that predict rolls, such as small")
    make = functools.partial(
        NoteDecoder,
        Codec(config.vocabulary.num_velocity_bins),
        ties=config.vocabulary.ties,
        segment_start="original" if exact else "grid",
    )
    return TrackDecoder(config.tracks_out, make) if config.tracks_out else make()


def feed(decoder: Decoder, start: float, output: Output, end: float | None) -> list[Note]:
    """Has a decoder read one segment's output; the notes that ended in it."""
    if isinstance(output, RollOutput):
        assert isinstance(decoder, RollDecoder)
        return decoder.feed(start, output, end)
    assert not isinstance(decoder, RollDecoder)
    return decoder.feed(start, output.tokens, end)


class Recording:
    """One recording on its way: outputs come in any order and are read in order of time.

    Args:
      decoder: new, or one that has been reset.
      segment_frames: from the start of a segment to that of the next.
      rate: frames per second.
    """

    def __init__(self, decoder: Decoder, segment_frames: int, rate: float) -> None:
        self._decoder, self._segment_frames, self._rate = decoder, segment_frames, rate
        self._segments: list[Segment] = []
        self._waiting: dict[int, Output] = {}
        self._notes: list[Note] = []
        self._num_ended = 0

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
        return number * self._segment_frames / self._rate

    def _read(self, number: int, end: float | None, duration: float = 0.0) -> Progress:
        output, start = self._waiting.pop(number), self._start(number)
        tokens = output.tokens if isinstance(output, TokenOutput) else []
        segment = Segment(start, tokens)
        # Tokens may go on past the sound; what a detector predicts there is of zeros.
        until = duration if end is None and isinstance(output, RollOutput) else end
        notes = feed(self._decoder, start, output, until)
        self._segments.append(segment)
        self._num_ended += len(notes)
        if end is None:
            self._notes = self._decoder.finish()
            notes = notes + self._decoder.notes[self._num_ended :]
        return Progress(segment, duration if end is None else end, notes, self._decoder.confidences)
