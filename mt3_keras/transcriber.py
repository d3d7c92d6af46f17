"""Transcriber: audio -> notes, the whole path."""

from __future__ import annotations

import collections
import copy
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike

from mt3_keras.audio import read_blocks, resample
from mt3_keras.grammar import Rules
from mt3_keras.instrument_names import parse_instruments
from mt3_keras.models.catalog import find_preset, needs_keras, pick_engine
from mt3_keras.models.config import SAMPLE_RATE_HZ, DetectorConfig, ModelConfig, TokenConfig
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.outputs import Output
from mt3_keras.recording import Progress, Recording, Transcription, make_decoder
from mt3_keras.segments import (
    AudioError,
    AudioSegment,
    check_context,
    check_samples,
    cut_segments,
)

if TYPE_CHECKING:
    from mt3_keras.models.loading import Backbone


class Engine(Protocol):
    """What runs a network (`mt3_keras.engines`)."""

    @property
    def model_config(self) -> ModelConfig:
        """Of the network."""

    def run(self, segments: Iterable[AudioSegment]) -> Iterator[tuple[int, Output]]:
        """Yields (index, output) as segments finish, in any order; draws them as needed."""


class Transcriber:
    """Transcribes music with one model, loaded once.

    Args:
      model: the network with its weights, or the folder of an edge bundle, to be run by LiteRT.
      exact: the original's path to the token: segments padded with zeros, its logarithm's floor,
        its segment starts, plain greedy search. No other option may then be given.
      context: "full" gives the last spectrogram frames of a segment the audio that follows;
        "segment" pads every segment with zeros, as the original does.
      method: how tokens are searched, "greedy" or "beam1" (see `engines.keras.TokenEngine`); None
        is greedy.
      rules: what may appear, and what tokens may be emitted; None stops runaway segments.
      instruments: only these may appear: names or General MIDI programs, as of
        `parse_instruments`; None allows what `rules` allow.
      threads: cores to use on LiteRT; None is all.
      batch_size: segments at a time; None is 16, and on LiteRT what suits the cores.
      max_tokens: longest token sequence of a segment; None takes the model's own limit.
      least_confidence: that a detector's notes need, 0 to 1; None takes the model's own.
      num_instruments: that a detector's notes are shared out to at most, drums not counted; None
        takes as many as it finds.
      decoding: how a detector's rolls are read; None is that of a new network, and of a bundle its
        own.

    Example:
      >>> import numpy as np
      >>> from mt3_keras import Transcriber
      >>> transcriber = Transcriber.from_preset("small")
      >>> seconds = np.arange(32_000) / 16_000
      >>> tone = 0.3 * np.sin(2 * np.pi * 440 * seconds) * np.exp(-2 * seconds)
      >>> result = transcriber.transcribe(tone.astype(np.float32))
      >>> sorted({note.pitch for note in result.notes})
      [69]
    """

    def __init__(
        self,
        model: Backbone | pathlib.Path,
        *,
        exact: bool = False,
        context: Literal["segment", "full"] | None = None,
        method: Literal["greedy", "beam1"] | None = None,
        rules: Rules | None = None,
        instruments: str | Sequence[str | int] | None = None,
        threads: int | None = None,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        least_confidence: float | None = None,
        num_instruments: int | None = None,
        decoding: RollDecoding | None = None,
    ) -> None:
        chosen = context == "full" or method not in (None, "greedy") or rules or max_tokens
        chosen = chosen or instruments is not None
        if exact and (chosen or least_confidence is not None):
            raise ValueError("exact=True is the original's path: give no other option beside it")
        if context is None:
            context = "segment" if exact else "full"
        check_context(context)
        if least_confidence is not None and not 0 <= least_confidence <= 1:
            raise ValueError(f"least_confidence must be 0 to 1: got {least_confidence}")
        self.model: Any = model
        self.exact = exact
        self.context = context
        self.least_confidence, self.num_instruments = least_confidence, num_instruments
        if exact and isinstance(model, pathlib.Path):
            raise ValueError("an edge bundle is searched greedily, by no exact path: use Keras")
        rules = rules or (Rules() if exact else Rules(stop_runaways=True))
        self.rules = _with_instruments(rules, instruments)
        self._search: dict[str, Any] = {
            "method": method,
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "threads": threads,
        }
        self._engine = make_engine(model, self.rules, **self._search)
        self.model_config = self._engine.model_config
        if isinstance(model, pathlib.Path) and decoding is None:
            decoding = RollDecoding.read(model)
        self.decoding = decoding
        self._open_recording(tells_notes=False)  # refuses options that the network has no use for

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
          name: of a shipped model, or a folder.
          engine: what runs the network (see `catalog.pick_engine`).
          exact: the original's path to the token (see the class), which needs Keras.
          log_floor: replaces the model's own (see `LogMelConfig`).
          **options: of `Transcriber`.

        Raises:
          ValueError: the model cannot be found or read, or an option is wrong; one line.
        """
        if exact and log_floor == "clamp":
            raise ValueError("exact=True is the original's path: give no other option beside it")
        asks_keras = needs_keras({"exact": exact, "log_floor": log_floor, **options})
        folder = find_preset(os.fspath(name))
        if pick_engine(folder, engine, needs_keras=asks_keras) == "litert":
            return cls(folder, **options)
        from mt3_keras.models.loading import load_model

        model = load_model(folder, log_floor="zero" if exact else log_floor)
        options.setdefault("decoding", RollDecoding.read(folder))
        return cls(model, exact=exact, **options)

    def with_rules(self, rules: Rules) -> Transcriber:
        """The same model under other rules; a detector shares all that is loaded.

        Raises:
          ValueError: the network has no use for a rule, or the path is `exact`.
        """
        if not isinstance(self.model_config, DetectorConfig):
            return type(self)(
                self.model, exact=self.exact, context=self.context, rules=rules, **self._search
            )
        other = copy.copy(self)
        other.rules = rules
        return other

    def transcribe(
        self,
        audio: str | os.PathLike[str] | ArrayLike | Iterator[Any],
        *,
        sample_rate: float | None = None,
        instruments: str | Sequence[str | int] | None = None,
        on_segment: Callable[[Progress], None] | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> Transcription:
        """Transcribes a recording of any length, in bounded memory.

        Args:
          audio: a file, or samples: floating point [n], mono, 1 at full scale. For a network that
            is given tracks apart: samples [T, n], or an iterator of blocks of them at 16 kHz
            (`audio.stack_files`).
          sample_rate: of samples, in Hz, any; None is 16000. A file states its own.
          instruments: only these may appear in this recording; see `Transcriber`.
          on_segment: called for each segment in order of time, as soon as it is read.
          on_progress: called then too, with the seconds read so far; alone, it spares the naming of
            a segment's notes before the whole piece is known.

        Raises:
          AudioError: the audio cannot be used; one line, naming the file.
          ValueError: an instrument is unknown, or a rate is given for a file.
        """
        if instruments is not None:
            chosen = self.with_rules(_with_instruments(self.rules, instruments))
            return chosen.transcribe(
                audio, sample_rate=sample_rate, on_segment=on_segment, on_progress=on_progress
            )
        recording = self._open_recording(tells_notes=on_segment is not None)
        blocks = _to_blocks(audio, sample_rate, self.model_config.tracks_in)
        segments = self._watch(cut_segments(blocks, self.model_config, self.context))

        def report(progress: Progress) -> None:
            if on_segment:
                on_segment(progress)
            if on_progress:
                on_progress(progress.end)

        for index, output in self._engine.run(segments):
            for progress in recording.add(index, output):
                report(progress)
        for progress in recording.end(segments.end):
            report(progress)
        return recording.finish(segments.end)

    def predict(self, segments: Iterable[AudioSegment]) -> tuple[list[Output], float]:
        """What the network predicts of each segment, in their order, and where the last one ends.

        Args:
          segments: of a recording, in order of time.
        """
        watched = self._watch(segments)
        found = dict(self._engine.run(watched))
        return [found[index] for index in range(len(found))], watched.end

    def read(self, outputs: Iterable[Output], duration: float) -> Transcription:
        """The notes of a recording, given the output of each of its segments in order of time.

        Args:
          outputs: at least one.
          duration: seconds of the recording.
        """
        recording = self._open_recording(tells_notes=False)
        for index, output in enumerate(outputs):
            collections.deque(recording.add(index, output), maxlen=0)
        collections.deque(recording.end(duration), maxlen=0)
        return recording.finish(duration)

    def _watch(self, segments: Iterable[AudioSegment]) -> _Watched:
        return _Watched(segments, self.model_config.spectrogram.frames_per_second)

    def _open_recording(self, tells_notes: bool) -> Recording:
        config = self.model_config
        decoder = make_decoder(
            config,
            self.decoding,
            exact=self.exact,
            least_confidence=self.least_confidence,
            rules=self.rules,
            num_instruments=self.num_instruments,
            tells_notes=tells_notes,
        )
        rate = config.spectrogram.frames_per_second
        return Recording(decoder, config.network.segment_frames, rate)


class _Watched:
    """Segments on their way to an engine; `end` is where the last one so far ends, in seconds."""

    def __init__(self, segments: Iterable[AudioSegment], rate: float) -> None:
        self._segments, self._rate, self.end = segments, rate, 0.0

    def __iter__(self) -> Iterator[AudioSegment]:
        for segment in self._segments:
            self.end = segment.start + segment.num_frames / self._rate
            yield segment


def make_engine(
    model: Backbone | pathlib.Path,
    rules: Rules,
    *,
    method: str | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> Engine:
    """What runs a network: on LiteRT that of a folder, else on Keras.

    Raises:
      ValueError: an option that this network or this engine has no use for.
    """
    config: ModelConfig
    on_litert = isinstance(model, pathlib.Path)
    if threads is not None and (not on_litert or threads < 1):
        raise ValueError(
            f"threads must be at least 1: got {threads}"
            if on_litert
            else "threads is for LiteRT: limit Keras by OMP_NUM_THREADS and TF_NUM_INTRAOP_THREADS"
            " in the environment, or give mt3 transcribe --threads"
        )
    if isinstance(model, pathlib.Path):
        from mt3_keras.engines import litert

        config = litert.read_bundle_config(model)
    else:
        config = model.model_config
    if isinstance(config, DetectorConfig):
        given = {"method": method, "max_tokens": max_tokens, "constrained": rules.constrained}
        if unused := [name for name, value in given.items() if value]:
            raise ValueError(f"{unused[0]} is for networks that emit tokens, such as mt3")
        if on_litert:
            return litert.RollEngine(model, num_workers=batch_size or threads)
        from mt3_keras.engines.keras import RollEngine

        return RollEngine(cast(Any, model), batch_size=batch_size or 16)
    assert isinstance(config, TokenConfig)
    if on_litert:
        if method not in (None, "greedy"):
            raise ValueError("an edge bundle is searched greedily: use Keras for beam search")
        return litert.TokenEngine(
            model,
            rules=rules,
            num_segments=batch_size,
            max_tokens=max_tokens,
            num_threads=threads,
        )
    from mt3_keras.engines.keras import TokenEngine

    return TokenEngine(
        cast(Any, model),
        rules=rules,
        method=method or "greedy",
        batch_size=batch_size or 16,
        max_tokens=max_tokens,
    )


def _with_instruments(rules: Rules, instruments: str | Sequence[str | int] | None) -> Rules:
    if instruments is None:
        return rules
    programs, drums = parse_instruments(instruments)
    return dataclasses.replace(rules, programs=programs, drums=drums)


def _to_blocks(audio: Any, sample_rate: float | None, tracks: tuple[str, ...]) -> Iterable[Any]:
    is_file, rate_hz = isinstance(audio, (str, os.PathLike)), sample_rate or SAMPLE_RATE_HZ
    if is_file and sample_rate is not None:
        raise ValueError(f"sample_rate is for samples, and {os.fspath(audio)} states its own")
    if tracks:
        names = ", ".join(tracks)
        if is_file:
            raise AudioError(
                f"{os.fspath(audio)}: this network is given {names} apart; give a folder of"
                " stems as --stems"
            )
        if isinstance(audio, Iterator):
            return audio
        if np.ndim(audio) != 2 or len(audio) != len(tracks):
            raise AudioError(f"samples must be [{len(tracks)}, n], of {names}")
        return [np.stack([resample(check_samples(track), rate_hz) for track in audio])]
    return read_blocks(audio) if is_file else [resample(check_samples(audio), rate_hz)]


def transcribe(
    audio: str | os.PathLike[str] | ArrayLike,
    *,
    model: str | os.PathLike[str] = "small",
    sample_rate: float | None = None,
    on_segment: Callable[[Progress], None] | None = None,
    on_progress: Callable[[float], None] | None = None,
    **options: Any,
) -> Transcription:
    """Transcribes one recording; of many, load the model once: `Transcriber.from_preset`.

    Args:
      audio: as of `Transcriber.transcribe`.
      model: a name or folder, as of `Transcriber.from_preset`.
      sample_rate: of samples, in Hz; None is 16000.
      on_segment: as of `Transcriber.transcribe`.
      on_progress: likewise.
      **options: of `Transcriber.from_preset`, such as instruments=["sax", "drums"], threads=1.

    Raises:
      ValueError: the audio, the model or an option cannot be used; one line.
    """
    transcriber = Transcriber.from_preset(model, **options)
    return transcriber.transcribe(
        audio, sample_rate=sample_rate, on_segment=on_segment, on_progress=on_progress
    )
