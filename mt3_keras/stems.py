"""Songs as separated stems: each transcribed under what its name allows, all in one transcription.

A network that is given tracks apart (`TracksInBackbone`) is given all stems at once.

A song is a folder of audio files, as separation programs and mixing desks write them: `drums.wav
bass.wav vocals.wav other.wav`, or any others. They all begin together; they may differ in length
and rate.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from mt3_keras.audio import AUDIO_SUFFIXES, AudioError, stack_files
from mt3_keras.grammar import Rules
from mt3_keras.instrument_names import find_programs, instrument_name
from mt3_keras.notes import Note, sort_notes
from mt3_keras.recording import Progress, Transcription
from mt3_keras.tracks import Track, Tracks, share_out
from mt3_keras.transcriber import Transcriber

MAX_STEMS = 16
MAX_DIFFERENCE = 1.0  # seconds between the ends of stems before something is said of it
MIXES = frozenset(("mix", "mixture", "mixdown"))

_logger = logging.getLogger(__name__)


class Stem(NamedTuple):
    """One file of a song.

    Attributes:
      path: the file.
      programs, drums: what may play in it (see `Track`).
    """

    path: pathlib.Path
    programs: frozenset[int]
    drums: bool

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem


def read_name(name: str) -> Track | None:
    """What a stem may hold by its name; None if it speaks of no instrument.

    Of several words the last counts, and "bass guitar" is one word.

    Example:
      >>> read_name("02 Bass DI").programs == set(range(32, 40)), read_name("other")
      (True, None)
    """
    text = re.sub(r"\bbass[\s_-]*(?=guitar|gtr)", "bass", name.lower().replace("_", " "))
    for word in reversed(re.findall(r"[^\W\d]+", text)):
        programs = find_programs(word)
        if programs is not None:
            return Track(programs, not programs)
    return None


def find_stems(folder: str | os.PathLike[str]) -> list[Stem]:
    """The stems of a song, by their names in order.

    What a name speaks of is all that its stem may hold; a stem whose name speaks of nothing, such
    as "other", may hold all that no other name speaks of. A file named "mix" or "mixture" beside
    others is left out. Folders within are not searched.

    Raises:
      AudioError: the folder is missing, or holds no audio file or more than `MAX_STEMS`; one line.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise AudioError(f"{folder}: no such folder; --stems takes a folder for each song")
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in AUDIO_SUFFIXES
        and not path.name.startswith(".")
        and not path.is_dir()
    )
    mixes = [path for path in paths if path.stem.lower() in MIXES]
    if mixes and len(mixes) < len(paths):
        _logger.warning("%s: is taken for the mix of the others and left out", mixes[0])
        paths = [path for path in paths if path not in mixes]
    if not paths:
        raise AudioError(f"{folder}: no audio file in this folder; put a song's stems there")
    if len(paths) > MAX_STEMS:
        raise AudioError(
            f"{folder}: holds {len(paths)} stems, at most {MAX_STEMS} are read; mix some together"
        )
    shares = share_out([read_name(path.stem) for path in paths])
    return [Stem(path, *share) for path, share in zip(paths, shares, strict=True)]


class StemTranscriber:
    """Transcribes songs whose stems are apart, with one model.

    Args:
      transcriber: its rules hold for all stems; instruments are limited further by each name.

    Raises:
      ValueError: `exact`, which leaves no rule to the search.
    """

    def __init__(self, transcriber: Transcriber) -> None:
        if transcriber.exact:
            raise ValueError("exact is the original's path for mixes: stems are searched by rules")
        self._transcriber = transcriber
        self._limited: dict[Rules, Transcriber] = {}

    def transcribe(
        self,
        folder: str | os.PathLike[str],
        *,
        on_segment: Callable[[Progress], None] | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> Transcription:
        """Transcribes the stems of one song (see `find_stems`), one after the other.

        Args:
          folder: of the song.
          on_segment: called for each segment of one stem after the other, as soon as it is read;
            its `end` counts the audio of all stems so far.
          on_progress: called then too, with that end; see `Transcriber.transcribe`.

        Returns:
          All notes; the track of each bears its stem's name (`Transcription.track_names`). Of two
          notes that are the same in all, one remains.

        Raises:
          AudioError: see `find_stems`, or a stem cannot be read; one line, naming the file.
        """
        stems = find_stems(folder)
        if self._transcriber.model_config.tracks_in:
            return self._transcribe_together(stems, on_segment, on_progress)
        found: list[Transcription] = []
        before = 0.0
        report = on_segment and (lambda p: on_segment(p._replace(end=before + p.end)))
        report_end = on_progress and (lambda end: on_progress(before + end))
        for stem in stems:
            result = self._limit(stem).transcribe(
                stem.path, on_segment=report, on_progress=report_end
            )
            found.append(result)
            before += result.duration
        _compare_lengths(stems, found)
        return merge(stems, found)

    def _transcribe_together(
        self,
        stems: Sequence[Stem],
        on_segment: Callable[[Progress], None] | None,
        on_progress: Callable[[float], None] | None,
    ) -> Transcription:
        """By a network that is given tracks apart; stems of one kind are added up."""
        tracks = Tracks(self._transcriber.model_config.tracks_in)
        files: list[list[Stem]] = [[] for _ in tracks.tracks]
        for stem in stems:
            shared = [
                (len(stem.programs & track.programs), stem.drums and track.drums)
                for track in tracks.tracks
            ]
            files[shared.index(max(shared))].append(stem)
        blocks = stack_files([[stem.path for stem in own] for own in files])
        result = self._transcriber.transcribe(
            blocks, on_segment=on_segment, on_progress=on_progress
        )
        parts: list[list[Note]] = [[] for _ in files]
        for note in result.notes:
            parts[tracks.owner(note.program, note.is_drum)].append(note)
        names: dict[Note, str] = {}
        for own, kind, notes in zip(files, tracks.names, parts, strict=True):
            names |= _name_notes(own[0].name if len(own) == 1 else kind, notes)
        return dataclasses.replace(result, track_names=names)

    def _limit(self, stem: Stem) -> Transcriber:
        own = self._transcriber.rules
        programs = stem.programs if own.programs is None else stem.programs & own.programs
        rules = dataclasses.replace(own, programs=programs, drums=stem.drums and own.drums)
        if rules not in self._limited:
            self._limited[rules] = self._transcriber.with_rules(rules)
        return self._limited[rules]


def _compare_lengths(stems: Sequence[Stem], found: Sequence[Transcription]) -> None:
    lengths = {stem.path.name: result.duration for stem, result in zip(stems, found, strict=True)}
    longest, shortest = max(lengths, key=lengths.__getitem__), min(lengths, key=lengths.__getitem__)
    if lengths[longest] - lengths[shortest] > MAX_DIFFERENCE:
        _logger.warning(
            "%s: its stems end at different times (%s %.1f s, %s %.1f s); they are taken to begin"
            " together",
            stems[0].path.parent,
            *(longest, lengths[longest], shortest, lengths[shortest]),
        )


def merge(stems: Sequence[Stem], found: Iterable[Transcription]) -> Transcription:
    """The transcriptions of a song's stems as one.

    A note whose program its stem may not hold, such as the first of a class that a network
    predicts classes by, is given the nearest program that it may.
    """
    notes: list[Note] = []
    names: dict[Note, str] = {}
    results = list(found)
    confidences: dict[Note, float] = {}
    for stem, result in zip(stems, results, strict=True):
        own = {note: _fit(note, stem.programs) for note in result.notes}
        of_track = _name_notes(stem.name, own.values())
        for note, fitted in own.items():
            if fitted in names:
                continue
            notes.append(fitted)
            names[fitted] = of_track[fitted]
            if note in result.confidences:
                confidences[fitted] = result.confidences[note]
    return Transcription(
        notes=sort_notes(notes),
        segments=[segment for result in results for segment in result.segments],
        invalid_events=sum(result.invalid_events for result in results),
        dropped_events=sum(result.dropped_events for result in results),
        duration=max(result.duration for result in results),
        confidences=confidences,
        track_names=names,
    )


def _name_notes(track: str, notes: Collection[Note]) -> dict[Note, str]:
    """The track's name for each note, with its instrument's where there are several."""
    instruments = {
        (note.program, note.is_drum): instrument_name(note.program, note.is_drum) for note in notes
    }
    if len(instruments) == 1:
        return dict.fromkeys(notes, track)
    return {note: f"{track}: {instruments[note.program, note.is_drum]}" for note in notes}


def _fit(note: Note, programs: frozenset[int]) -> Note:
    if note.is_drum or note.program in programs or not programs:
        return note
    return note._replace(program=min(programs, key=lambda p: (abs(p - note.program), p)))
