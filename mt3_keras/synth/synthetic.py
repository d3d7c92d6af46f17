"""Synthetic music: MIDI files, or random music, played by soundfonts, models and synthesizers.

Made in the manner of Slakh2100: parts of a MIDI file are drawn, given instruments of their General
MIDI class or any (see `arrange`), varied in time and velocity, played each by another sound source,
and mixed at random levels, in a room or without, through an equaliser, compressor, noise or codec.

Unlike the other data sets there are no audio files: example `index` is `render(config, index)`,
a pure function, the same in any process. There are as many examples as one likes.

Labels are the notes that were played, as they were played (but see `heard_longer`):

- pedals are applied before rendering: a note ends where key and pedal are released, though it may
  have faded before, or where its pitch is struck again by the same instrument; parts that end up
  with the same program are one instrument;
- a note that its source cannot sound, or not in tune, is neither played nor labelled;
- an excerpt starts from silence: notes already sounding at its start are left out of audio and
  labels alike, so each label's onset is audible. Notes that sound across its end end there.

A note begins at sample round(onset * 16000), but for consonants that lead into it. Pitch bends and
other controls are ignored.

Splits: 5 % of the MIDI files, by a hash of the first number of three or more digits in the file's
name or else of the name, are for validation. Versions of one song are mostly named so (POP909's
piano version and its band version share a number), and thereby stay on one side.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import re
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mt3_keras.data.example import DatasetError
from mt3_keras.midi import MidiError, read_instruments
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note, apply_sustain, sort_notes, trim_overlaps
from mt3_keras.synth.additive import NUM_PROGRAMS, AdditiveSource
from mt3_keras.synth.arrange import MIN_NOTE_SECONDS, vary_parts
from mt3_keras.synth.augment import DEFAULT_AUGMENTATION, Augmentation, mix_stems
from mt3_keras.synth.composer import compose
from mt3_keras.synth.drum_kits import DrumKitSource, find_kits
from mt3_keras.synth.recordings import WITH_KEYS, RecordingsSource, find_instruments
from mt3_keras.synth.sounds import Samples, SoundFontSource, Source
from mt3_keras.tracks import Tracks

NAME = "synthetic"
SOURCE = "your own MIDI files and soundfonts, or none"
SPLITS = ("train", "validation")
VALIDATION_PERCENT = 5
_MAX_DRAWS = 50
# Stems are alike in their loudest 50 ms, of which a stroke fills a part: drums would be buried.
_DRUM_GAIN_DB = 6.0


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """What to render, and how varied.

    Attributes:
      midi: a folder or tar archive of MIDI files, searched through; "" composes random music.
        An archive is held in memory by every process: unpack it for many of them.
      soundfonts: sf2 or sf3 files.
      additive_share: chance that an instrument is played by the built-in synthesizer; 1 if there
        is nothing else. Where that chance is 0 it is not used at all.
      other_sources: further sources; see `open_sources`.
      other_share: chance that an instrument is played by one of them, if one can play it. What
        they and the synthesizer leave falls to the soundfonts, to each as often.
      seconds: length of an excerpt.
      min_instruments: at least so many parts are drawn, where the file has them.
      max_instruments: at most so many.
      folder_power: a folder of n MIDI files is drawn in proportion to n ** folder_power: 1 draws
        each file equally often, 0 each folder.
      seconds_per_file: so many seconds of neighbouring examples are excerpts of one file, which
        takes as long to parse as some ten seconds take to render.
      program_swap_chance: that a part gets another program of its General MIDI class.
      program_redraw_chance: that it gets any program that the sources play, classes of General
        MIDI drawn evenly. A part with another program moves by octaves into its register.
      drum_redraw_chance: that a drum of a drum part is another one, all pieces of a kit drawn
        evenly. (MIDI files know little but bass drum, snare and closed hi-hat.)
      mash_chance: that the parts of another MIDI file are there too.
      split_chance: that the upper and lower notes of a part are two instruments.
      double_chance: that a second instrument plays the notes of a part too.
      strum_chance: that a guitar's chords are strummed.
      ring_chance: that a piano, guitar, harp or mallet lets notes ring as under a pedal. Their
        labels end where the pedal is changed.
      heard_longer: seconds by which the labels of what has no keys, such as guitars, strings and
        winds, end after the notes played: who writes down the notes of a recording does so.
      max_transposition: semitones up or down.
      max_stretch: tempo changes by up to this factor, up or down.
      onset_jitter: standard deviation, in seconds.
      velocity_jitter: standard deviation, of each note and again of each part.
      gain_range_db: instruments are mixed at levels that differ by at most this, drums 6 dB louder.
      max_detuning_cents: of the whole excerpt, up or down.
      tracks: names of tracks (`mt3_keras.tracks`) to be rendered each by itself beside their sum.
        Of `augmentation` the level alone then counts.
    """

    midi: str = ""
    soundfonts: tuple[str, ...] = ()
    split: str = "train"
    seed: int = 0
    seconds: float = 16.0
    min_instruments: int = 1
    max_instruments: int = 8
    additive_share: float = 0.15
    other_sources: tuple[Source, ...] = ()
    other_share: float = 0.25
    folder_power: float = 0.5
    seconds_per_file: float = 128.0
    program_swap_chance: float = 0.5
    program_redraw_chance: float = 0.1
    drum_redraw_chance: float = 0.0
    mash_chance: float = 0.0
    split_chance: float = 0.0
    double_chance: float = 0.0
    strum_chance: float = 0.0
    ring_chance: float = 0.0
    heard_longer: float = 0.0
    max_transposition: int = 3
    max_stretch: float = 1.25
    onset_jitter: float = 0.006
    velocity_jitter: float = 8.0
    gain_range_db: float = 12.0
    max_detuning_cents: float = 30.0
    tracks: tuple[str, ...] = dataclasses.field(default=(), repr=False)  # data's options name them
    augmentation: Augmentation = DEFAULT_AUGMENTATION

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split of {NAME} must be {' or '.join(SPLITS)}: got {self.split!r}")
        if not self.seconds >= 1:
            raise ValueError(f"seconds must be at least 1: got {self.seconds}")
        if self.tracks:
            Tracks(self.tracks)
        if self.seed < 0:
            raise ValueError(f"seed must not be negative: got {self.seed}")
        if not 1 <= self.min_instruments <= self.max_instruments:
            raise ValueError(
                "need 1 <= min_instruments <= max_instruments: "
                f"got {self.min_instruments} and {self.max_instruments}"
            )
        if not self.max_stretch >= 1:
            raise ValueError(f"max_stretch must be at least 1: got {self.max_stretch}")
        names = [field.name for field in dataclasses.fields(self)]
        for name in names:
            if name.endswith(("_share", "_chance")) and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1: got {getattr(self, name)}")
        for name in (
            "heard_longer",
            "max_transposition",
            "onset_jitter",
            "velocity_jitter",
            "gain_range_db",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: got {getattr(self, name)}")
        if not 0 <= self.max_detuning_cents <= 50:
            raise ValueError(f"max_detuning_cents must be 0 to 50: got {self.max_detuning_cents}")


class Piece(NamedTuple):
    """One rendered example.

    Attributes:
      samples: float32 [round(16000 * seconds)], 16 kHz mono, within [-1, 1]; of a configuration
        with T tracks [1 + T, round(16000 * seconds)], the mix and then each track.
      notes: what sounds, ordered by onset, times from the start of `samples`.
      name: of the MIDI file in its folder or archive; "" for random music.
      damaged: names of files that were drawn before it and could not be read or held no notes.
    """

    samples: Samples
    notes: list[Note]
    name: str
    damaged: tuple[str, ...]


def render(config: SyntheticConfig, index: int) -> Piece:
    """Renders example `index` of a configuration: the same samples and notes whenever called.

    Raises:
      DatasetError: there are no MIDI files, all files drawn are damaged, or a soundfont is missing
        or damaged.
    """
    split = SPLITS.index(config.split)
    damaged: list[str] = []
    for draw in range(_MAX_DRAWS):
        rng = np.random.default_rng((config.seed, split, index, draw))
        name, parts = "", compose(1.5 * config.seconds, rng) if not config.midi else []
        if config.midi:
            neighbours = index // max(1, round(config.seconds_per_file / config.seconds))
            shared = np.random.default_rng((config.seed, split, neighbours, draw))
            name, other = (_draw_file(config, shared) for _ in range(2))
            parts = _load_parts(config.midi, name)
            if not parts:
                damaged.append(name)
                continue
        parts = cut_excerpt(parts, config, rng)
        if config.midi and rng.random() < config.mash_chance:
            others = _load_parts(config.midi, other)
            parts += cut_excerpt(others, config, rng) if others else []
        parts = vary_parts(parts, config, _playable_programs(config), rng)
        played = play_stems(parts, config, rng)
        if played:
            notes = sort_notes([note for _, own in played for note in own])
            if config.tracks:
                samples = _sum_tracks(played, config, rng)
            else:
                samples = mix_stems([stem for stem, _ in played], config.augmentation, rng)
            return Piece(samples, notes, name, tuple(damaged))
    raise DatasetError(
        f"{config.midi or NAME}: {_MAX_DRAWS} pieces drawn and none playable, "
        f"{len(damaged)} of them damaged or empty MIDI files; check the files and the soundfonts"
    )


def find(midi: str, split: str) -> list[str]:
    """Lists the MIDI files of a split by their names in a folder or archive; none in "".

    Raises:
      ValueError: no such split.
      DatasetError: `midi` is missing or damaged, or has no MIDI file of this split.
    """
    if split not in SPLITS:
        raise ValueError(f"split of {NAME} must be {' or '.join(SPLITS)}: got {split!r}")
    return [name for folder in _folders(midi, split) for name in folder] if midi else []


def split_of(name: str) -> str:
    """The split that a MIDI file belongs to, by its name without folders and suffix."""
    stem = pathlib.PurePosixPath(name).stem
    number = re.search(r"\d{3,}", stem)
    digest = hashlib.sha256((number[0] if number else stem).encode()).digest()
    return SPLITS[int.from_bytes(digest[:8]) % 100 < VALIDATION_PERCENT]


@functools.lru_cache(maxsize=4)
def _folders(midi: str, split: str) -> tuple[tuple[str, ...], ...]:
    root = pathlib.Path(midi)
    if root.is_dir():
        found = [p.relative_to(root).as_posix() for p in root.rglob("*") if _is_midi(p.name)]
    else:
        found = list(_read_archive(midi))
    names = sorted(name for name in found if split_of(name) == split)
    if not names:
        raise DatasetError(f"{midi}: no MIDI file of the {split} split; add .mid files")
    folders = sorted({str(pathlib.PurePosixPath(name).parent) for name in names})
    return tuple(
        tuple(name for name in names if str(pathlib.PurePosixPath(name).parent) == folder)
        for folder in folders
    )


def _is_midi(name: str) -> bool:
    return name.lower().endswith((".mid", ".midi"))


MAX_ARCHIVE_BYTES = 2**30  # of MIDI, held in memory; a small archive may unpack to any size


@functools.lru_cache(maxsize=2)
def _read_archive(path: str) -> dict[str, bytes]:
    found, num_left = {}, MAX_ARCHIVE_BYTES
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not (_is_midi(member.name) and member.isfile()):
                    continue
                if (num_left := num_left - member.size) < 0:
                    raise DatasetError(f"{path}: holds over 1 GiB of MIDI; unpack it to a folder")
                if file := archive.extractfile(member):
                    found[member.name] = file.read()
        return found
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DatasetError(
            f"{path}: no folder and no readable tar archive; get it again"
        ) from error


def _draw_file(config: SyntheticConfig, rng: np.random.Generator) -> str:
    folders = _folders(config.midi, config.split)
    weights = np.array([len(folder) for folder in folders]) ** config.folder_power
    folder = folders[rng.choice(len(folders), p=weights / weights.sum())]
    return folder[rng.integers(len(folder))]


@functools.lru_cache(maxsize=4)
def _load_parts(midi: str, name: str) -> list[list[Note]]:
    """The parts of a MIDI file that have notes, pedal applied; none if it is damaged."""
    try:
        if pathlib.Path(midi).is_dir():
            parts = read_instruments(pathlib.Path(midi, name))
        else:
            with tempfile.NamedTemporaryFile(suffix=".mid") as file:
                file.write(_read_archive(midi)[name])
                file.flush()
                parts = read_instruments(file.name)
    except MidiError:
        return []
    return [apply_sustain(part.notes, part.pedal) for part in parts if part.notes]


def cut_excerpt(
    parts: Sequence[Sequence[Note]], config: SyntheticConfig, rng: np.random.Generator
) -> list[list[Note]]:
    """Changes the tempo and keeps the notes that start in a random excerpt, at least one.

    Args:
      parts: at least one, each with notes.
      config: length of the excerpt, largest stretch.
      rng: draws tempo and place.

    Returns:
      The parts that have notes there; times from the excerpt's start.
    """
    stretch = config.max_stretch ** rng.uniform(-1, 1)
    onsets = np.array([note.onset for part in parts for note in part]) * stretch
    end = max(note.offset for part in parts for note in part) * stretch
    last_start = max(0.0, end - config.seconds)
    inside = rng.choice(onsets) - rng.uniform(0, config.seconds - 2 * MIN_NOTE_SECONDS)
    start = float(np.clip(inside, 0.0, last_start))
    excerpt = [
        [
            note._replace(onset=note.onset * stretch - start, offset=note.offset * stretch - start)
            for note in part
            if start <= note.onset * stretch < start + config.seconds - MIN_NOTE_SECONDS
        ]
        for part in parts
    ]
    return [part for part in excerpt if part]


def _sum_tracks(
    played: Sequence[tuple[Samples, list[Note]]], config: SyntheticConfig, rng: np.random.Generator
) -> Samples:
    """The mix and each track, [1 + T, n], at a random level."""
    tracks = Tracks(config.tracks)
    sums = np.zeros((1 + len(config.tracks), len(played[0][0])), np.float32)
    for stem, (note, *_) in played:
        sums[1 + tracks.owner(note.program, note.is_drum)] += stem
    sums[0] = sums[1:].sum(axis=0)
    peak = 10 ** (rng.uniform(config.augmentation.lowest_peak_db, -0.5) / 20)
    return sums * np.float32(peak / np.abs(sums).max())


def play_parts(
    parts: Sequence[Sequence[Note]], config: SyntheticConfig, rng: np.random.Generator
) -> tuple[list[Samples], list[Note]]:
    """As `play_stems`: the stems, and the notes of all."""
    played = play_stems(parts, config, rng)
    notes = sort_notes([note for _, own in played for note in own])
    return [stem for stem, _ in played], notes


def play_stems(
    parts: Sequence[Sequence[Note]], config: SyntheticConfig, rng: np.random.Generator
) -> list[tuple[Samples, list[Note]]]:
    """Plays each part with the first of the sources, in random order, that can play any of it.

    The whole is detuned by rendering at another rate than it is read with.

    Returns:
      One stem for each part that sounds, at its level in the mix, and the notes played, at least
      one, none lasting beyond the excerpt.
    """
    num_samples = round(config.seconds * SAMPLE_RATE_HZ)
    cents = config.max_detuning_cents * rng.uniform(-1, 1)
    rate_hz = round(SAMPLE_RATE_HZ * 2 ** (-cents / 1200))
    clock = SAMPLE_RATE_HZ / rate_hz
    stems = []
    for whole in parts:
        part = [note._replace(offset=min(note.offset, config.seconds)) for note in whole]
        timed = [n._replace(onset=n.onset * clock, offset=n.offset * clock) for n in part]
        gain_db = rng.uniform(-config.gain_range_db, 0) + _DRUM_GAIN_DB * part[0].is_drum
        for source in _draw_sources(config, rng):
            samples, played = source.play(timed, num_samples, rate_hz, rng)
            loudness = _loudness(samples)
            if played.any() and loudness > 0:
                stem = samples * np.float32(10 ** (gain_db / 20) / loudness)
                notes = [n for n, kept in zip(part, played, strict=True) if kept]
                stems.append((stem, _hear_longer(notes, config)))
                break
    return stems


def _hear_longer(notes: list[Note], config: SyntheticConfig) -> list[Note]:
    """The labels of one instrument's notes, none beyond the next onset of its pitch."""
    is_kept = notes[0].is_drum or notes[0].program in WITH_KEYS
    if is_kept or not config.heard_longer:
        return notes
    ends = [min(note.offset + config.heard_longer, config.seconds) for note in notes]
    return trim_overlaps(n._replace(offset=end) for n, end in zip(notes, ends, strict=True))


@functools.cache
def _playable_programs(config: SyntheticConfig) -> tuple[int, ...]:
    """Programs that parts may be given: all with a pitch, or else those of the recordings."""
    others = [s for s in config.other_sources if isinstance(s, RecordingsSource)]
    if config.soundfonts or config.additive_share or not others:
        return tuple(range(NUM_PROGRAMS))
    return tuple(sorted(p for s in others for p in s.programs if p < NUM_PROGRAMS))


def _draw_sources(config: SyntheticConfig, rng: np.random.Generator) -> list[Source]:
    """All sources of a configuration, in the order in which an instrument is to try them."""
    other_share = config.other_share if config.other_sources else 0.0
    font_share = max(0.0, 1 - config.additive_share - other_share)
    groups: list[tuple[Sequence[Source], float]] = [
        ([SoundFontSource(path) for path in config.soundfonts], font_share),
        (config.other_sources, other_share),
        ([AdditiveSource()], config.additive_share),
    ]
    groups = [(group, share) for group, share in groups if group and share > 0]
    groups = groups or [([AdditiveSource()], 1.0)]
    shares = np.array([share for _, share in groups])
    order = rng.choice(len(groups), len(groups), replace=False, p=shares / shares.sum())
    return [groups[g][0][i] for g in order for i in rng.permutation(len(groups[g][0]))]


def open_sources(*, drum_kits: str = "", recordings: str = "") -> tuple[Source, ...]:
    """Sources beyond soundfonts and the synthesizer, for `SyntheticConfig.other_sources`.

    Args:
      drum_kits: folders of drum kits, with commas between them; see `drum_kits.find_kits`.
      recordings: folders of recorded notes, with commas between them; see
        `recordings.find_instruments`.

    Raises:
      DatasetError: a folder has no kits or no recordings.
    """
    sources: list[Source] = []
    if drum_kits:
        kits = [kit for folder in drum_kits.split(",") for kit in find_kits(folder)]
        sources.append(DrumKitSource(tuple(kits)))
    if recordings:
        folders = tuple(recordings.split(","))
        for folder in folders:
            find_instruments(folder)
        sources.append(RecordingsSource(folders))
    return tuple(sources)


def _loudness(samples: Samples) -> float:
    """Root mean square of the loudest 50 ms."""
    size = SAMPLE_RATE_HZ // 20
    blocks = samples[: len(samples) // size * size].reshape(-1, size)
    return float(np.sqrt(np.einsum("ij,ij->i", blocks, blocks).max() / size))
