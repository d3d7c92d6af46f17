"""StreamingTranscriber: samples in as they come, notes out as soon as they are certain.

Needs `numpy` and `ai-edge-litert` alone. Two ways of going through the audio:

- Segment after segment, as a whole file is transcribed: a note is certain when its segment has
  been heard.
- With a `hop` below the segment's length, segments overlap: more computing, and sooner. Where
  tokens name the notes, what two segments in a row say is certain, and what only one says when no
  later one can hear it. Where the heads decide, what a segment hears last is left to the next
  one, which fades in there: as long a part as the hop, and no shorter than the heads look ahead.
  Of these a whole file's segments overlap by half.

With ties, a segment begins with the list of notes that sound on. `tie_forcing` writes it for the
model, from the notes really open, so that segments cannot contradict each other.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mt3_keras.codec import Codec
from mt3_keras.engines.litert import EdgeModel, EdgeSequence, count_cores
from mt3_keras.grammar import Rules
from mt3_keras.models.catalog import find_preset
from mt3_keras.note_decoder import MIN_DURATION, NoteDecoder, OpenNote
from mt3_keras.note_encoder import tie_tokens, time_to_step
from mt3_keras.note_rolls import CONTEXT_FRAMES, Certainty, SegmentTokens
from mt3_keras.notes import Note, sort_notes
from mt3_keras.segments import AudioSegment, SegmentCutter, check_samples

SAME_TIME = 0.05  # seconds between two hearings of one event

Key = tuple[int, int]  # program, pitch


class NoteOn(NamedTuple):
    """A note that has begun; when it ends it comes as a `Note`."""

    onset: float
    pitch: int
    velocity: int
    program: int


class Heard(list[Note]):
    """Notes that have ended, by onset; `started` are those that began and still sound."""

    def __init__(self, notes: Iterable[Note] = (), started: Iterable[NoteOn] = ()) -> None:
        super().__init__(notes)
        self.started = list(started)


class StreamingTranscriber:
    """Transcribes a stream of 16 kHz mono audio, in bounded memory.

    Args:
      model: of an edge bundle.
      hop: seconds from one segment to the next; None is that of a whole file.
      tie_forcing: see the module.
      context: see `mt3_keras.segments.SegmentCutter`.
      rules: which tokens may be written; None stops runaway segments and allows all else.
      method: as in `mt3_keras.Transcriber`, "greedy" or "heads".

    Raises:
      ValueError: hop is not above 0 and at most a segment's length.
    """

    def __init__(
        self,
        model: EdgeModel,
        *,
        hop: float | None = None,
        tie_forcing: bool = False,
        context: str = "full",
        rules: Rules | None = None,
        method: str | None = None,
    ) -> None:
        config = model.model_config
        self.model_config = config
        self._rules = rules or Rules(stop_runaways=True)
        self._sequence = EdgeSequence(config, self._rules, method=method)
        hop_frames = config.network.hop_frames(self._sequence.method)
        if hop is not None:
            if not 0 < hop <= config.segment_seconds:
                raise ValueError(
                    f"hop must be above 0, at most {config.segment_seconds}: got {hop}"
                )
            hop_frames = max(1, round(hop * config.spectrogram.frames_per_second))
        self.hop = hop_frames / config.spectrogram.frames_per_second
        self._hop_frames = hop_frames
        overlap = config.network.segment_frames - hop_frames
        self._joins = overlap > 0 and self._sequence.method != "heads"
        num_left = min(overlap, max(hop_frames, CONTEXT_FRAMES))  # to the next segment
        self._certain_frames = config.network.segment_frames - num_left
        self._model = model
        self._cutter = SegmentCutter(config, context, hop_frames)
        self._codec = Codec(config.vocabulary.num_velocity_bins)
        self._forces_ties = tie_forcing and config.vocabulary.ties
        self.reset()

    @classmethod
    def from_bundle(
        cls,
        name: str | os.PathLike[str],
        *,
        num_threads: int | None = None,
        hop: float | None = None,
        tie_forcing: bool = False,
        context: str = "full",
        rules: Rules | None = None,
        method: str | None = None,
    ) -> StreamingTranscriber:
        """Loads a bundle by the name of a shipped model or its folder.

        Args:
          num_threads: None takes the cores this process may use.

        Raises:
          ValueError: the bundle cannot be found or used; one line, naming the file.
        """
        folder = find_preset(os.fspath(name))
        threads = num_threads or count_cores()
        model = EdgeModel(pathlib.Path(folder), threads)
        return cls(
            model, hop=hop, tie_forcing=tie_forcing, context=context, rules=rules, method=method
        )

    def reset(self) -> None:
        """Forgets all that was heard: the next sample is the first."""
        self._cutter.reset()
        self._decoder = self._new_decoder()
        self._joiner = _Joiner()
        self.invalid_events = 0

    @property
    def sounding(self) -> list[NoteOn]:
        """The notes that sound now."""
        open_notes = self._joiner.open if self._joins else self._decoder.open_notes
        return _note_ons(open_notes)

    def push(self, samples: ArrayLike) -> Heard:
        """Hears on.

        Args:
          samples: float [n], 16 kHz mono, any n.

        Returns:
          The notes that are certain now; none where no segment was completed.

        Raises:
          AudioError: the samples are of another kind or not finite; they are not heard.
        """
        heard = Heard()
        for segment in self._cutter.push(check_samples(samples)):
            self._hear(segment, heard, is_last=False)
        sounding = set(self.sounding)  # a long block may hold the ends of what it began
        return Heard(sort_notes(heard), [note for note in heard.started if note in sounding])

    def flush(self) -> Heard:
        """Ends the recording: all the notes that are left. Then it is as after `reset`."""
        heard = Heard()
        segments = list(self._cutter.flush())
        for i, segment in enumerate(segments):
            self._hear(segment, heard, is_last=i + 1 == len(segments))
        self.reset()
        return Heard(sort_notes(heard))

    def _new_decoder(self, certainty: Certainty | None = None) -> NoteDecoder:
        rules = self._rules
        return NoteDecoder.for_model(
            self.model_config,
            certainty=certainty,
            programs=rules.programs,
            drums=rules.drums,
        )

    def _hear(self, segment: AudioSegment, heard: Heard, *, is_last: bool) -> None:
        if self._joins:
            self._hear_overlapping(segment, heard, is_last=is_last)
            return
        decoder = self._decoder
        before = decoder.open_notes
        tokens = self._tokens(segment, before)
        num_told = self._certain_frames - self._hop_frames if segment.start else 0
        if tokens.rolls:
            tokens.rolls = tokens.rolls.since(num_told)
        end = None if is_last else self._time_after(segment, self._certain_frames)
        decoder.feed(self._time_after(segment, num_told), tokens, end)
        if is_last:
            decoder.finish()
        heard.extend(decoder.notes)
        decoder.notes.clear()
        decoder.confidences.clear()
        new = {key: note for key, note in decoder.open_notes.items() if before.get(key) != note}
        heard.started += _note_ons(new)
        self.invalid_events = decoder.invalid_events

    def _hear_overlapping(self, segment: AudioSegment, heard: Heard, *, is_last: bool) -> None:
        joiner, start = self._joiner, self._on_grid(segment.start)
        sounding = {key: note for key, note in joiner.open.items() if note.onset < start}
        decoder = self._new_decoder(self._decoder.certainty)
        decoder.resume(sounding)
        end = self._time_after(segment, self.model_config.network.segment_frames)
        decoder.feed(segment.start, self._tokens(segment, sounding), end)
        self.invalid_events += decoder.invalid_events
        next_start = self._on_grid(self._time_after(segment, self._hop_frames))
        border = np.inf if is_last else next_start
        joiner.join(_events(decoder, start), start, border)
        if is_last:
            joiner.end()
        notes, started = joiner.take()
        heard.extend(notes)
        heard.started += started

    def _time_after(self, segment: AudioSegment, num_frames: int) -> float:
        """Frames after a segment's start, to the last bit as the cutter does: steps hang on it."""
        rate = self.model_config.spectrogram.frames_per_second
        return (round(segment.start * rate) + num_frames) / rate

    def _on_grid(self, time: float) -> float:
        """Where the tokens of a segment that begins at `time` count from."""
        rate = self._codec.steps_per_second
        return time_to_step(time, rate) / rate

    def _tokens(self, segment: AudioSegment, sounding: Iterable[Key]) -> SegmentTokens:
        prefix: list[int] = []
        if self._forces_ties:
            granularity = self.model_config.vocabulary.granularity
            prefix = tie_tokens(sounding, self._codec, granularity)
        return self._sequence.decode(self._model, segment, prefix)


def _note_ons(open_notes: dict[Key, OpenNote]) -> list[NoteOn]:
    return sorted(
        NoteOn(note.onset, pitch, note.velocity, program)
        for (program, pitch), note in open_notes.items()
    )


class _Event(NamedTuple):
    """Something a segment says: a note begins (velocity above 0) or ends, or a drum is struck."""

    time: float
    velocity: int
    key: Key
    is_drum: bool

    def is_heard_in(self, events: Iterable[_Event]) -> bool:
        return any(
            event.key == self.key
            and event.is_drum == self.is_drum
            and (event.velocity > 0) == (self.velocity > 0)
            and abs(event.time - self.time) <= SAME_TIME
            for event in events
        )


def _events(decoder: NoteDecoder, start: float) -> list[_Event]:
    """What a decoder has read, in order of time; notes that began before `start` only end."""
    events = []
    for note in decoder.notes:
        key = (note.program, note.pitch)
        if note.onset >= start:
            events.append(_Event(note.onset, note.velocity, key, note.is_drum))
        if not note.is_drum:
            events.append(_Event(note.offset, 0, key, False))
    events += [
        _Event(note.onset, note.velocity, key, False)
        for key, note in decoder.open_notes.items()
        if note.onset >= start
    ]
    return sorted(events)  # at one time ends come before beginnings


class _Joiner:
    """Joins what overlapping segments say into one line of events."""

    def __init__(self) -> None:
        self.open: dict[Key, OpenNote] = {}
        self._last: list[_Event] = []  # what the segment before this one said
        self._certain: list[_Event] = []  # what was taken and may be said again
        self._notes: list[Note] = []
        self._started: dict[Key, OpenNote] = {}

    def join(self, events: list[_Event], start: float, border: float) -> None:
        """Takes what is certain: what was said before too, and all before the next segment."""
        self._certain = [e for e in self._certain if e.time >= start - SAME_TIME]
        for event in events:
            if event.is_heard_in(self._certain):
                continue
            if event.time < border or event.is_heard_in(self._last):
                self._certain.append(event)
                self._apply(event)
        self._last = events

    def end(self) -> None:
        """Ends all that sounds, at the time of the last event."""
        end = max((event.time for event in self._certain), default=0.0)
        for key in list(self.open):
            self._close(key, max(end, self.open[key].onset))

    def take(self) -> tuple[list[Note], list[NoteOn]]:
        """Notes that have ended since the last call, and those that have begun and sound on."""
        started = {key: note for key, note in self._started.items() if self.open.get(key) == note}
        notes, self._notes, self._started = self._notes, [], {}
        return notes, _note_ons(started)

    def _apply(self, event: _Event) -> None:
        if event.is_drum:
            end = event.time + MIN_DURATION
            self._notes.append(Note(event.time, end, event.key[1], event.velocity, 0, True))
            return
        if event.key in self.open:
            if event.time <= self.open[event.key].onset:
                return  # of an earlier note, which has been taken otherwise
            self._close(event.key, event.time)
        if event.velocity:
            self.open[event.key] = self._started[event.key] = OpenNote(event.time, event.velocity)

    def _close(self, key: Key, time: float) -> None:
        onset, velocity, _ = self.open.pop(key)
        program, pitch = key
        self._notes.append(
            Note(onset, max(time, onset + MIN_DURATION), pitch, velocity, program, False)
        )
