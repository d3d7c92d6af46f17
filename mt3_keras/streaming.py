"""StreamingTranscriber: samples in as they come, notes out as soon as they are certain.

Needs `numpy` and `ai-edge-litert` alone. Tokens are read segment after segment, as of a whole file:
a note is certain when its segment has been decoded. A detector's segments overlap, with a `hop`
below theirs in a whole file by more: more computing, and sooner. The end of each is left to the
next one, which fades in there: as long a part as the hop, and no shorter than the network looks
ahead.

With ties, a segment begins with the list of notes that sound on. `tie_forcing` writes it for the
model, from the notes really open, so that segments cannot contradict each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mt3_keras.codec import Codec
from mt3_keras.engines.litert import (
    EdgeDetector,
    EdgeModel,
    count_cores,
    read_bundle_config,
    search_one,
)
from mt3_keras.grammar import Grammar, Rules
from mt3_keras.models.catalog import find_preset
from mt3_keras.models.config import DetectorConfig, TokenConfig
from mt3_keras.note_encoder import tie_tokens
from mt3_keras.note_rolls import CONTEXT_FRAMES, RollDecoding
from mt3_keras.notes import Note, OpenNote, sort_notes
from mt3_keras.outputs import Output, RollOutput
from mt3_keras.recording import feed, make_decoder
from mt3_keras.segments import AudioSegment, SegmentCutter, check_samples

Key = tuple[int, int]  # program, pitch


class NoteOn(NamedTuple):
    """A note that has begun; when it ends it comes as a `Note`."""

    onset: float
    pitch: int
    velocity: int
    program: int


class NewNotes(list[Note]):
    """Notes that have ended, by onset; `started` are those that began and still sound."""

    def __init__(self, notes: Iterable[Note] = (), started: Iterable[NoteOn] = ()) -> None:
        super().__init__(notes)
        self.started = list(started)


class StreamingTranscriber:
    """Transcribes a stream of 16 kHz mono audio, in bounded memory.

    Args:
      model: of an edge bundle.
      hop: seconds from one segment of a detector to the next; None is that of a whole file.
      tie_forcing: see the module.
      context: see `mt3_keras.segments.SegmentCutter`.
      rules: what may appear, and what tokens may be emitted; None stops runaway segments.
      decoding: how a detector's rolls are read; None is that of a new network.

    Raises:
      ValueError: an option is out of range, or the network has no use for it.

    Example:
      >>> import numpy as np
      >>> from mt3_keras import StreamingTranscriber
      >>> stream = StreamingTranscriber.from_bundle("small")
      >>> notes = stream.push(np.zeros(16_000, np.float32))  # a second of silence, any block size
      >>> notes + stream.flush()
      []
    """

    def __init__(
        self,
        model: EdgeModel | EdgeDetector,
        *,
        hop: float | None = None,
        tie_forcing: bool = False,
        context: str = "full",
        rules: Rules | None = None,
        decoding: RollDecoding | None = None,
    ) -> None:
        self.model_config = config = model.model_config
        self._rules = rules or Rules(stop_runaways=True)
        self._decoding = decoding
        is_detector = isinstance(config, DetectorConfig)
        if hop is not None and not is_detector:
            raise ValueError("hop is for networks whose segments overlap, such as small")
        if is_detector and (tie_forcing or self._rules.constrained):
            raise ValueError("tie_forcing and constrained are for networks that emit tokens")
        hop_frames = config.hop_frames
        if hop is not None:
            if not 0 < hop <= config.segment_seconds:
                raise ValueError(
                    f"hop must be above 0, at most {config.segment_seconds}: got {hop}"
                )
            hop_frames = max(1, round(hop * config.spectrogram.frames_per_second))
        self.hop = hop_frames / config.spectrogram.frames_per_second
        self._hop_frames = hop_frames
        overlap = config.network.segment_frames - hop_frames
        num_left = min(overlap, max(hop_frames, CONTEXT_FRAMES))  # to the next segment
        self._certain_frames = config.network.segment_frames - num_left
        self._cutter = SegmentCutter(config, context, hop_frames)
        self._predict = self._make_predict(model, tie_forcing)
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
    ) -> StreamingTranscriber:
        """Loads a bundle by the name of a shipped model or its folder.

        Args:
          name: of a shipped model, or the folder.
          num_threads: None takes the cores this process may use.
          hop: see the class.
          tie_forcing: see the class.
          context: see the class.
          rules: see the class.

        Raises:
          ValueError: the bundle cannot be found or used; one line, naming the file.
        """
        folder = find_preset(os.fspath(name))
        threads = num_threads or count_cores()
        is_detector = isinstance(read_bundle_config(folder), DetectorConfig)
        return cls(
            (EdgeDetector if is_detector else EdgeModel)(folder, threads),
            hop=hop,
            tie_forcing=tie_forcing,
            context=context,
            rules=rules,
            decoding=RollDecoding.read(folder),
        )

    def reset(self) -> None:
        """Forgets the recording so far: the next sample is the first."""
        self._cutter.reset()
        self._decoder = make_decoder(self.model_config, self._decoding, rules=self._rules)

    @property
    def invalid_events(self) -> int:
        """Tokens so far that meant nothing where they stood."""
        return self._decoder.invalid_events

    @property
    def sounding(self) -> list[NoteOn]:
        """The notes that sound now."""
        return _note_ons(self._decoder.open_notes)

    def push(self, samples: ArrayLike) -> NewNotes:
        """Transcribes the next samples.

        Args:
          samples: float [n], 16 kHz mono, any n.

        Returns:
          The notes that are certain now; none where no segment was completed.

        Raises:
          AudioError: the samples are of another kind or not finite; they are left out.
        """
        found = NewNotes()
        for segment in self._cutter.push(check_samples(samples)):
            self._read(segment, found, is_last=False)
        sounding = set(self.sounding)  # a long block may hold the ends of what it began
        return NewNotes(sort_notes(found), [note for note in found.started if note in sounding])

    def flush(self) -> NewNotes:
        """Ends the recording: all the notes that are left. Then it is as after `reset`."""
        found = NewNotes()
        segments = list(self._cutter.flush())
        for i, segment in enumerate(segments):
            self._read(segment, found, is_last=i + 1 == len(segments))
        self.reset()
        return NewNotes(sort_notes(found))

    def _read(self, segment: AudioSegment, found: NewNotes, *, is_last: bool) -> None:
        decoder, before = self._decoder, self._decoder.open_notes
        output = self._predict(segment, before)
        num_read = self._certain_frames - self._hop_frames if segment.start else 0
        if isinstance(output, RollOutput):
            output = RollOutput(output.rolls[num_read:])
        end = None if is_last else self._time_after(segment, self._certain_frames)
        feed(decoder, self._time_after(segment, num_read), output, end)
        if is_last:
            decoder.finish()
        found.extend(decoder.notes)
        decoder.notes.clear()
        decoder.confidences.clear()
        new = {key: note for key, note in decoder.open_notes.items() if before.get(key) != note}
        found.started += _note_ons(new)

    def _time_after(self, segment: AudioSegment, num_frames: int) -> float:
        """Frames after a segment's start, to the last bit as the cutter does: steps hang on it."""
        rate = self.model_config.spectrogram.frames_per_second
        return (round(segment.start * rate) + num_frames) / rate

    def _make_predict(
        self, model: Any, tie_forcing: bool
    ) -> Callable[[AudioSegment, Iterable[Key]], Output]:
        """A function of a segment and of what sounds at its start."""
        if isinstance(model, EdgeDetector):
            return lambda segment, _: RollOutput(model.detect(segment.samples))
        config = model.model_config
        assert isinstance(config, TokenConfig)
        codec, vocabulary = Codec(config.vocabulary.num_velocity_bins), config.vocabulary
        grammar, max_tokens = Grammar(config, self._rules, np), config.network.max_tokens

        def predict(segment: AudioSegment, sounding: Iterable[Key]) -> Output:
            prefix: list[int] = []
            if tie_forcing and vocabulary.ties:
                prefix = tie_tokens(sounding, codec, vocabulary.granularity)
            return search_one(model, grammar, max_tokens, segment, prefix)

        return predict


def _note_ons(open_notes: dict[Key, OpenNote]) -> list[NoteOn]:
    return sorted(
        NoteOn(note.onset, pitch, note.velocity, program)
        for (program, pitch), note in open_notes.items()
    )
