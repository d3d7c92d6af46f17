"""StreamingTranscriber: samples in as they come, notes out as soon as they are certain.

Needs `numpy` and `ai-edge-litert` alone. Segments are read one after the other, as of a whole file:
a note is certain when its segment has been read. A detector can also follow the music in small
steps (`low_latency`), with the state of its recurrent layers and a short look ahead.

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
from mt3_keras.cores import count_cores
from mt3_keras.engines.litert import (
    EdgeDetector,
    EdgeModel,
    read_bundle_config,
    search_one,
)
from mt3_keras.grammar import Grammar, Rules
from mt3_keras.models.catalog import find_preset
from mt3_keras.models.config import DetectorConfig, TokenConfig
from mt3_keras.note_encoder import tie_tokens
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.notes import Note, OpenNote, sort_notes
from mt3_keras.outputs import Output
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
    """Notes that have ended, by onset; `started` are those that began and still sound.

    A detector names a note when it begins and again, better, when it ends: onset and pitch say
    which it is.
    """

    def __init__(self, notes: Iterable[Note] = (), started: Iterable[NoteOn] = ()) -> None:
        super().__init__(notes)
        self.started = list(started)


class StreamingTranscriber:
    """Transcribes a stream of 16 kHz mono audio, in bounded memory.

    Args:
      model: of an edge bundle.
      num_instruments: see `Transcriber`.
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
        tie_forcing: bool = False,
        context: str = "full",
        rules: Rules | None = None,
        num_instruments: int | None = None,
        decoding: RollDecoding | None = None,
    ) -> None:
        self.model_config = config = model.model_config
        self._rules = rules or Rules(stop_runaways=True)
        self._decoding, self._num_instruments = decoding, num_instruments
        self._model = model
        is_detector = isinstance(config, DetectorConfig)
        if is_detector and (tie_forcing or self._rules.constrained):
            raise ValueError("tie_forcing and constrained are for networks that emit tokens")
        self._cutter = SegmentCutter(config, context)
        self._predict = self._make_predict(model, tie_forcing)
        self.reset()

    @classmethod
    def from_bundle(
        cls,
        name: str | os.PathLike[str],
        *,
        num_threads: int | None = None,
        low_latency: bool = False,
        tie_forcing: bool = False,
        context: str = "full",
        rules: Rules | None = None,
        num_instruments: int | None = None,
    ) -> StreamingTranscriber:
        """Loads a bundle by the name of a shipped model or its folder.

        Args:
          name: of a shipped model, or the folder.
          num_threads: None takes the cores this process may use.
          low_latency: tell onsets within .4 s, at some three times the work and with names and
            ends found with less sound ahead (of a detector).
          tie_forcing: see the class.
          context: see the class.
          rules: see the class.
          num_instruments: see the class.

        Raises:
          ValueError: the bundle cannot be found or used; one line, naming the file.
        """
        folder = find_preset(os.fspath(name))
        threads = num_threads or count_cores()
        config = read_bundle_config(folder)
        if config.tracks_in:
            raise ValueError(
                f"{name}: is given the tracks of a song apart, which a stream has not; use"
                " mt3 transcribe --stems"
            )
        is_detector = isinstance(config, DetectorConfig)
        if low_latency and not is_detector:
            raise ValueError("low_latency is for networks that predict rolls, such as small")
        model: EdgeModel | EdgeDetector
        if is_detector:
            model = EdgeDetector(folder, threads, stream=low_latency)
        else:
            model = EdgeModel(folder, threads)
        return cls(
            model,
            tie_forcing=tie_forcing,
            context=context,
            rules=rules,
            num_instruments=num_instruments,
            decoding=RollDecoding.read(folder),
        )

    def reset(self) -> None:
        """Forgets the recording so far: the next sample is the first."""
        self._cutter.reset()
        if isinstance(self._model, EdgeDetector):
            self._model.reset()
        self._decoder = make_decoder(
            self.model_config,
            self._decoding,
            rules=self._rules,
            num_instruments=self._num_instruments,
            keeps_notes=False,
        )

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
        # A long block may hold the ends of what it began, and better names of it.
        started = {note[:3] for note in found.started}
        return NewNotes(sort_notes(found), [note for note in self.sounding if note[:3] in started])

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
        config = self.model_config
        rate = config.spectrogram.frames_per_second
        # To the last bit where the next segment starts: steps hang on it.
        end = (round(segment.start * rate) + segment.num_frames) / rate
        is_open = is_last and isinstance(config, TokenConfig)  # tokens may go on past the sound
        feed(decoder, segment.start, output, None if is_open else end)
        if is_last:
            decoder.finish()
        found.extend(decoder.notes)
        decoder.notes.clear()
        decoder.confidences.clear()
        known = {(pitch, note) for (_, pitch), note in before.items()}  # of any name
        new = {key: n for key, n in decoder.open_notes.items() if (key[1], n) not in known}
        found.started += _note_ons(new)

    def _make_predict(
        self, model: Any, tie_forcing: bool
    ) -> Callable[[AudioSegment, Iterable[Key]], Output]:
        """A function of a segment and of what sounds at its start."""
        if isinstance(model, EdgeDetector):
            return lambda segment, _: model.detect(segment.samples)
        config = model.model_config
        assert isinstance(config, TokenConfig)
        codec, vocabulary = Codec(config.vocabulary.num_velocity_bins), config.vocabulary
        grammar, max_tokens = Grammar(config, self._rules, np), config.network.max_tokens

        def predict(segment: AudioSegment, sounding: Iterable[Key]) -> Output:
            if not (tie_forcing and vocabulary.ties):
                return search_one(model, grammar, max_tokens, segment)
            parts: list[list[Key]] = [[] for _ in range(config.num_decoders)]
            for program, pitch in sounding:
                parts[config.decoder_of(program, False)].append((program, pitch))
            prefixes = [tie_tokens(part, codec, vocabulary.granularity) for part in parts]
            return search_one(model, grammar, max_tokens, segment, prefixes)

        return predict


def _note_ons(open_notes: dict[Key, OpenNote]) -> list[NoteOn]:
    return sorted(
        NoteOn(note.onset, pitch, note.velocity, program)
        for (program, pitch), note in open_notes.items()
    )
