"""Transcriber: audio -> notes, the whole path."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from numpy.typing import ArrayLike

from mt3_keras.audio import read_blocks
from mt3_keras.midi import write_midi
from mt3_keras.models.catalog import find_preset, pick_engine
from mt3_keras.models.loading import load_model
from mt3_keras.note_decoder import NoteDecoder
from mt3_keras.note_rolls import SegmentTokens
from mt3_keras.notes import Note
from mt3_keras.segments import AudioSegment, check_context, check_samples, cut_segments

if TYPE_CHECKING:
    from mt3_keras.engines.keras import Search
    from mt3_keras.engines.litert import EdgeSearch
    from mt3_keras.grammar import Rules
    from mt3_keras.models.mt3 import MT3Backbone


class Segment(NamedTuple):
    """What the model wrote for one window: `start` in seconds, token ids up to and with EOS."""

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
      segments: the model's own words.
      invalid_events: tokens that meant nothing where they stood.
      dropped_events: tokens past the end of their segment.
      duration: seconds of audio.
      confidences: from 0 to 1, how sure the network's heads are that the note begins there; empty
        for a network without heads.
    """

    notes: list[Note]
    segments: list[Segment]
    invalid_events: int
    dropped_events: int
    duration: float
    confidences: dict[Note, float] = dataclasses.field(default_factory=dict)

    def write_midi(self, path: str | os.PathLike[str]) -> None:
        """Writes the notes as a MIDI file, one named track for each instrument."""
        write_midi(self.notes, path)


class Transcriber:
    """Transcribes music with one model, loaded once.

    Args:
      model: the network with its weights, or the folder of an edge bundle, to be run by LiteRT.
      exact: the original's path to the token: segments padded with zeros, its logarithm's floor,
        its segment starts, plain greedy search. No other option may then be given.
      context: "full" lets the last spectrogram frames of a segment see the audio that follows;
        "segment" pads every segment with zeros, as the original does.
      method: "greedy", "beam1" or "heads" (see `generation.Search`); None is the network's own:
        "heads" where its heads decide, for they need no tokens, else "greedy".
      rules: what the search may write; None stops runaway segments.
      batch_size: segments decoded side by side; None is 16, and on LiteRT two for each core.
      max_tokens: longest token sequence of a segment; None takes the model's own limit.
      least_confidence: how sure a network with heads must be of a note, 0 to 1; None lets it decide
        as the music goes.
    """

    def __init__(
        self,
        model: MT3Backbone | pathlib.Path,
        *,
        exact: bool = False,
        context: Literal["segment", "full"] | None = None,
        method: Literal["greedy", "beam1", "heads"] | None = None,
        rules: Rules | None = None,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        least_confidence: float | None = None,
    ) -> None:
        from mt3_keras.grammar import Rules

        chosen = context == "full" or method not in (None, "greedy") or rules or max_tokens
        if exact and (chosen or least_confidence is not None):
            raise ValueError("exact=True is the original's path: give no other option beside it")
        if context is None:
            context = "segment" if exact else "full"
        check_context(context)
        if least_confidence is not None and not 0 <= least_confidence <= 1:
            raise ValueError(f"least_confidence must be 0 to 1: got {least_confidence}")
        self.least_confidence = least_confidence
        self.model: Any = model
        self.exact = exact
        self.context = context
        if rules is None:
            rules = Rules(constrained=False) if exact else Rules(stop_runaways=True)
        self.rules = rules
        self._search: EdgeSearch | Search
        if isinstance(model, pathlib.Path):
            from mt3_keras.engines.litert import EdgeSearch

            if exact:
                raise ValueError("an edge bundle is searched greedily, by no exact path: use Keras")
            self._search = EdgeSearch(
                model,
                rules=rules,
                method=method,
                num_sequences=batch_size,
                max_tokens=max_tokens,
            )
            self.model_config = self._search.model_config
            return
        from mt3_keras.engines.keras import Search

        self.model_config = model.model_config
        self._search = Search(
            model,
            rules=rules,
            method="greedy" if exact else method,
            batch_size=batch_size or 16,
            max_tokens=max_tokens,
        )

    @classmethod
    def from_preset(
        cls,
        name: str | os.PathLike[str],
        *,
        engine: Literal["auto", "keras", "litert"] = "auto",
        exact: bool = False,
        log_floor: Literal["zero", "clamp"] | None = None,
        **options: Any,
    ) -> Transcriber:
        """Loads a model by the name of a shipped one, or its preset or T5X folder.

        Args:
          engine: what runs the network (see `catalog.pick_engine`).
          log_floor: replaces the model's own (see `SpectrogramConfig`).
          **options: of `Transcriber`.

        Raises:
          ValueError: the model cannot be found or read, or an option is wrong; one line.
        """
        if exact and log_floor == "clamp":
            raise ValueError("exact=True is the original's path: give no other option beside it")
        needs_keras = exact or log_floor is not None or options.get("method") == "beam1"
        folder = find_preset(os.fspath(name))
        if pick_engine(folder, engine, needs_keras=needs_keras) == "litert":
            return cls(folder, **options)
        if exact:
            log_floor = "zero"
        return cls(load_model(folder, log_floor=log_floor), exact=exact, **options)

    def transcribe(
        self,
        audio: str | os.PathLike[str] | ArrayLike,
        *,
        on_segment: Callable[[Progress], None] | None = None,
    ) -> Transcription:
        """Transcribes a recording of any length, in bounded memory.

        Args:
          audio: a file, or samples: float32 [n], 16 kHz mono.
          on_segment: called for each segment in order of time, as soon as it is read.

        Raises:
          AudioError: the audio cannot be used; one line, naming the file.
        """
        reading = _Reading(self)
        for progress in reading.run(_to_blocks(audio)):
            if on_segment:
                on_segment(progress)
        return reading.finish()


def _to_blocks(audio: str | os.PathLike[str] | ArrayLike) -> Iterable[Any]:
    if isinstance(audio, (str, os.PathLike)):
        return read_blocks(audio)
    return [check_samples(audio)]


class _Reading:
    """One recording on its way: segments finish in any order and are read in order of time."""

    def __init__(self, transcriber: Transcriber) -> None:
        config = transcriber.model_config
        self._transcriber = transcriber
        self._decoder = NoteDecoder.for_model(
            config,
            exact=transcriber.exact,
            least_confidence=transcriber.least_confidence,
            programs=transcriber.rules.programs,
            drums=transcriber.rules.drums,
        )
        self._starts: list[float] = []
        self._segments: list[Segment] = []
        self._waiting: dict[int, SegmentTokens] = {}
        self._notes: list[Note] = []
        self._is_complete = False
        self.duration = 0.0

    def run(self, blocks: Iterable[Any]) -> Iterator[Progress]:
        transcriber = self._transcriber
        config, search = transcriber.model_config, transcriber._search
        hop_frames = config.network.hop_frames(search.method)
        segments = cut_segments(blocks, config, transcriber.context, hop_frames)
        for index, tokens in search.decode(self._watch(segments)):
            self._waiting[index] = tokens
            yield from self._read_waiting()
        yield from self._read_waiting()

    def _watch(self, segments: Iterable[AudioSegment]) -> Iterator[AudioSegment]:
        rate = self._transcriber.model_config.spectrogram.frames_per_second
        for segment in segments:
            self._starts.append(segment.start)
            self.duration = segment.start + segment.num_frames / rate
            yield segment
        self._is_complete = True

    def _read_waiting(self) -> Iterator[Progress]:
        """Reads what is next in time, if it is known where it ends."""
        while (index := len(self._segments)) in self._waiting:
            is_last = index + 1 == len(self._starts)
            if is_last and not self._is_complete:
                return
            start = self._starts[index]
            end = None if is_last else self._starts[index + 1]
            tokens = self._waiting.pop(index)
            segment = Segment(start, list(tokens))
            notes = self._decoder.feed(start, tokens, end)
            self._segments.append(segment)
            if is_last:
                num_ended = len(self._decoder.notes)
                self._notes = self._decoder.finish()
                notes = notes + self._decoder.notes[num_ended:]
            end = self.duration if end is None else end
            yield Progress(segment, end, notes, self._decoder.confidences)

    def finish(self) -> Transcription:
        return Transcription(
            notes=self._notes,
            segments=self._segments,
            invalid_events=self._decoder.invalid_events,
            dropped_events=self._decoder.dropped_events,
            duration=self.duration,
            confidences=self._decoder.confidences,
        )
