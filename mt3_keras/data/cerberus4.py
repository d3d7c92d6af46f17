"""Cerberus4: Slakh2100 as a quartet of piano, guitar, bass and drums.

Source: derived from Slakh2100 (see `mt3_keras.data.slakh` for its layout, licence and splits)
by the rule of the MT3 paper, after Manilow et al., "Simultaneous Separation and Transcription of
Mixtures with Multiple Polyphonic and Percussive Instruments", ICASSP 2020: every subset of a song's
stems with exactly one each of the metadata's classes Piano, Guitar, Bass and Drums is an example,
in full length, however little each plays. The paper counts 960 / 235 / 132 songs.

Labels: fixed programs in the fixed order bass 32, drums, guitar 24, piano 0, whatever the stem's
own program. Otherwise as for Slakh, including the octave of the bass.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator

from mt3_keras.data.example import Example, check_files, read_each
from mt3_keras.data.slakh import SOURCE, SPLITS, find_songs, read_notes, read_stems

__all__ = ["NAME", "PROGRAMS", "SOURCE", "SPLITS", "find", "read_notes"]

NAME = "cerberus4"
PROGRAMS = {"Bass": 32, "Drums": 0, "Guitar": 24, "Piano": 0}


def find(
    root: str | pathlib.Path, split: str, *, bass: str = "written", skip_missing: bool = False
) -> list[Example]:
    """Lists the quartets of a split.

    Args:
      root: a folder of Slakh2100.
      split: "train", "validation" or "test".
      bass: "written" or "sounding", see `mt3_keras.data.slakh`.
      skip_missing: leave incomplete examples out instead of raising, for partial copies.

    Raises:
      ValueError: no such split, or an unknown value of `bass`.
      DatasetError: metadata is missing or damaged, or audio or MIDI is missing.
    """
    root = pathlib.Path(root)

    def combine(song: pathlib.Path) -> Iterator[Example]:
        stems = read_stems(song, bass)
        choices = [[stem for stem in stems if stem.family == family] for family in PROGRAMS]
        for quartet in itertools.product(*choices):
            labels = [stem.label._replace(program=PROGRAMS[stem.family]) for stem in quartet]
            yield Example(
                id="-".join([song.name, *(stem.name for stem in quartet)]),
                dataset=NAME,
                split=split,
                audio=tuple(stem.audio for stem in quartet),
                labels=tuple(labels),
                read_notes=read_notes,
                trim=split == "train",
            )

    examples = read_each(find_songs(root, split, skip_missing), combine)
    return check_files(examples, SOURCE, root, skip_missing)
