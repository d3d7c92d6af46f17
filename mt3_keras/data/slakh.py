"""Slakh2100: pop and rock MIDI files rendered with a professional sampler, stem by stem.

Source: Manilow et al., "Cutting Music Source Separation Some Slakh", WASPAA 2019. Licence
CC BY 4.0. This module reads the original, its `redux` (without duplicates, which are in `omitted/`
and not read here) and BabySlakh (songs without split folders, split here by number as in the
original), in FLAC or WAV:

    slakh2100_flac_redux/
      train/Track00001/
        metadata.yaml
        mix.flac
        stems/S00.flac
        MIDI/S00.mid

Splits are the folders: 1500 / 375 / 225 songs, redux 1289 / 270 / 151. As in the MT3 paper, a
training example is a random subset of at least four stems; each song with at least four has ten,
drawn independently, so that they may repeat (10 x 1405 songs are the paper's 968.5 h). Validation
and test examples are the mixes.

Labels: the MIDI files of the stems that have audio. `all_src.mid` is not used: where the renderer
transposed a bass note by octaves it has the old pitch. Each stem gets the program of its class, one
of MT3's 34, or drums. The metadata's `inst_class` is coarser than that ("Guitar"), so
the class follows from `program_num` by the table that Slakh was rendered with
(github.com/ethman/slakh-generation, classes_strict.json, where programs count from 1); programs
that were never rendered are not in it. Sustain pedals apply per stem, pitch bends are ignored.
Overlapping notes are trimmed in training only. The folders named in the metadata are ignored
(those of BabySlakh and Track00616 are wrong), and so is BabySlakh's `audio_rendered: false` where
the audio exists.

Bass sounds an octave lower than its MIDI files say: the sampler's bass patches are written an
octave up (github.com/ethman/slakh-generation/issues/2). The original kept the written pitch, so
its released weights transcribe every bass an octave too high. `bass="written"` does the same;
`bass="sounding"` labels the pitch that sounds.
"""

from __future__ import annotations

import pathlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from mt3_keras.data.example import (
    DatasetError,
    Example,
    Label,
    check_files,
    check_request,
    describe,
    read_each,
)
from mt3_keras.midi import read_instruments
from mt3_keras.notes import Note, apply_sustain

NAME = "slakh"
SOURCE = "http://www.slakh.com (files on zenodo.org/records/4599666)"
SPLITS = ("train", "validation", "test")
MIN_STEMS = 4

# class: (its program in MT3, General MIDI programs rendered with it)
CLASSES: dict[str, tuple[int, tuple[int, ...]]] = {
    "Acoustic Piano": (0, (0, 1, 3, 6)),
    "Electric Piano": (4, (2, 4, 5, 7)),
    "Chromatic Percussion": (8, tuple(range(8, 16))),
    "Organ": (16, tuple(range(16, 24))),
    "Acoustic Guitar": (24, (24, 25)),
    "Clean Electric Guitar": (26, (26, 27, 28, 31)),
    "Distorted Electric Guitar": (29, (29, 30)),
    "Acoustic Bass": (32, (32,)),
    "Electric Bass": (33, (33, 34, 35, 36, 37)),
    "Violin": (40, (40,)),
    "Viola": (41, (41,)),
    "Cello": (42, (42,)),
    "Contrabass": (43, (43,)),
    "Orchestral Harp": (46, (46,)),
    "Timpani": (47, (47,)),
    "String Ensemble": (48, (44, 45, 48, 49)),
    "Synth Strings": (50, (50, 51)),
    "Choir and Voice": (52, (52, 53, 54)),
    "Orchestral Hit": (55, (55,)),
    "Trumpet": (56, (56, 59)),
    "Trombone": (57, (57,)),
    "Tuba": (58, (58,)),
    "French Horn": (60, (60,)),
    "Brass Section": (61, (61,)),
    "Soprano/Alto Sax": (64, (64, 65)),
    "Tenor Sax": (66, (66,)),
    "Baritone Sax": (67, (67,)),
    "Oboe": (68, (68,)),
    "English Horn": (69, (69,)),
    "Bassoon": (70, (70,)),
    "Clarinet": (71, (71,)),
    "Pipe": (73, tuple(range(72, 80))),
    "Synth Lead": (80, tuple(range(80, 88))),
    "Synth Pad": (88, tuple(range(88, 96))),
}
_CLASS_PROGRAMS = {member: program for program, members in CLASSES.values() for member in members}
_FIRST_NUMBERS = {"train": 1, "validation": 1501, "test": 1876}  # of the original's songs
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Stem(NamedTuple):
    """One rendered part of a song.

    Attributes:
      name: as in "S00".
      family: the metadata's `inst_class`: "Guitar", "Bass", "Drums" ...
      audio: its audio file.
      label: its MIDI file with the program of its class.
    """

    name: str
    family: str
    audio: pathlib.Path
    label: Label


def find(
    root: str | pathlib.Path,
    split: str,
    *,
    num_mixes: int = 10,
    seed: int = 0,
    bass: str = "written",
    skip_missing: bool = False,
) -> list[Example]:
    """Lists the examples of a split.

    Args:
      root: folder of the data set.
      split: "train", "validation" or "test".
      num_mixes: random sub-mixes of each training song; 0 uses the songs' own mixes.
      seed: of the sub-mixes; those of a song do not depend on the other songs present.
      bass: "written" or "sounding", see the module's text.
      skip_missing: leave incomplete examples out instead of raising, for partial copies.

    Raises:
      ValueError: no such split, or an invalid value of `bass` or `num_mixes`.
      DatasetError: metadata is missing or damaged, or audio or MIDI is missing.
    """
    if num_mixes < 0:
        raise ValueError(f"num_mixes must not be negative: got {num_mixes}")
    root = pathlib.Path(root)

    def mix(song: pathlib.Path) -> Iterator[Example]:
        stems = read_stems(song, bass)
        if split != "train" or num_mixes == 0:
            if stems:
                yield _to_example(song.name, split, (_audio_path(song / "mix"),), stems)
        elif len(stems) >= MIN_STEMS:
            chance = random.Random(f"{seed} {song.name}")
            for number in range(num_mixes):
                size = chance.randint(MIN_STEMS, len(stems))
                chosen = sorted(chance.sample(stems, size))
                audio = tuple(stem.audio for stem in chosen)
                yield _to_example(f"{song.name}-{number:02d}", split, audio, chosen)

    examples = read_each(find_songs(root, split, skip_missing), mix)
    return check_files(examples, SOURCE, root, skip_missing)


def _to_example(
    name: str, split: str, audio: tuple[pathlib.Path, ...], stems: list[Stem]
) -> Example:
    labels = tuple(stem.label for stem in stems)
    return Example(name, NAME, split, audio, labels, read_notes, trim=split == "train")


def find_songs(root: pathlib.Path, split: str, skip_missing: bool = False) -> list[pathlib.Path]:
    """Lists a split's song folders, in order.

    Raises:
      ValueError: no such split.
      DatasetError: there are none, or one lacks its metadata (left out with `skip_missing`).
    """
    check_request(NAME, SOURCE, root, split, SPLITS)
    if (root / split).is_dir():
        songs = sorted(path for path in (root / split).glob("Track*") if path.is_dir())
    else:
        songs = sorted(path for path in root.glob("Track*") if _split_of(path) == split)
    if not songs:
        raise DatasetError(f"{root}/{split}/Track*: no such folders; get them from {SOURCE}")
    for song in songs:
        if not skip_missing and not (song / "metadata.yaml").is_file():
            raise DatasetError(f"{song}/metadata.yaml: no such file; get it from {SOURCE}")
    return [song for song in songs if (song / "metadata.yaml").is_file()]


def _split_of(song: pathlib.Path) -> str:
    number = int(song.name.removeprefix("Track")) if song.name[5:].isdigit() else 0
    return max(_FIRST_NUMBERS, key=lambda s: (_FIRST_NUMBERS[s] <= number, _FIRST_NUMBERS[s]))


def read_stems(song: pathlib.Path, bass: str = "written") -> list[Stem]:
    """Reads which stems of a song have audio, in order of their names.

    Raises:
      ValueError: `bass` is neither "written" nor "sounding".
      DatasetError: the metadata is damaged or a stem's instrument is unknown.
    """
    if bass not in ("written", "sounding"):
        raise ValueError(f"bass must be written or sounding: got {bass!r}")
    path = song / "metadata.yaml"
    try:
        entries = yaml.load(path.read_bytes(), _YAML_LOADER)["stems"]
        stems = [_to_stem(song, name, entry, bass) for name, entry in sorted(entries.items())]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise DatasetError(
            f"{path}: damaged metadata ({describe(error)}); get it from {SOURCE}"
        ) from error
    return [stem for stem in stems if stem is not None]


def _to_stem(song: pathlib.Path, name: str, entry: dict[str, Any], bass: str) -> Stem | None:
    family, number, is_drum = entry["inst_class"], entry["program_num"], bool(entry["is_drum"])
    audio = _audio_path(song / "stems" / name)
    if not entry["audio_rendered"] and not audio.is_file():
        return None
    if not is_drum and number not in _CLASS_PROGRAMS:
        raise DatasetError(
            f"{song}/metadata.yaml: stem {name} has unknown instrument {family!r}, "
            f"program {number}; set its audio_rendered to false and move its audio away"
        )
    label = Label(
        song / "MIDI" / f"{name}.mid",
        program=0 if is_drum else _CLASS_PROGRAMS[number],
        is_drum=is_drum,
        semitones=-12 if bass == "sounding" and family == "Bass" else 0,
    )
    return Stem(name, family, audio, label)


def _audio_path(stem: pathlib.Path) -> pathlib.Path:
    wav = stem.with_suffix(".wav")
    return wav if wav.is_file() else stem.with_suffix(".flac")


def read_notes(label: Label) -> list[Note]:
    """Reads a stem's MIDI file as one instrument, pedal applied; ValueError if it is damaged."""
    notes: list[Note] = []
    for part in read_instruments(label.path):
        own = [
            note._replace(
                pitch=note.pitch + label.semitones,
                program=label.program or 0,
                is_drum=label.is_drum,
            )
            for note in part.notes
        ]
        notes += apply_sustain(own, part.pedal)
    return notes
