"""Held-out MIDI files whose beats are the music's, rendered and transcribed.

For benchmarks.beats and benchmarks.sheet_music. No network was trained on these files. One excerpt
of each is rendered with one of the soundfonts, its instruments in a room, with equalisers and
noise. Their order and each excerpt are drawn by the file's name: the first half of each folder is
for choosing limits, the second for reporting.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import soundfile
from absl import flags
from numpy.typing import NDArray
from tqdm import tqdm

from mt3_keras.archive_worker import fingerprint_model
from mt3_keras.beats import Beats
from mt3_keras.cli.command_line import Flags
from mt3_keras.files import replacing
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note, sort_notes
from mt3_keras.synth.augment import DEFAULT_AUGMENTATION, mix_stems
from mt3_keras.synth.synthetic import SyntheticConfig, play_parts, split_of
from mt3_keras.transcriber import Transcriber
from train.beats import Piece, read_piece

SECONDS = 25.0
MIN_NOTES, MIN_BEATS = 20, 8


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """A part of a piece, its times from 0 s on.

    Attributes:
      name: of the file, with its folder.
      is_reported: whether nothing was chosen on it.
      audio: the rendered excerpt.
      played: the notes that were rendered.
      found: the notes that were transcribed.
      beats: where they are, with numbers 0 where bars are not known.
    """

    name: str
    is_reported: bool
    audio: pathlib.Path
    played: list[Note]
    found: list[Note]
    beats: Beats

    @property
    def folder(self) -> str:
        return self.name.split("/", 1)[0]


def define_piece_flags(add: Flags) -> None:
    """Adds the flags that `read_excerpts` reads."""
    add.text("midi", None, "Folder of folders of MIDI files.", required=True)
    add.text("work_dir", None, "Folder for what is rendered.", required=True)
    add.texts("font", None, "An sf2 or sf3 file; may be repeated.", required=True)
    add.names("leave_out", [], "Folders whose beats are not the music's.")
    add.text("model", "small", "What transcribes.")


def read_excerpts(values: flags.FlagValues) -> list[Excerpt]:
    """All excerpts; those that `--work_dir` has of this model are not made again."""
    work_dir = pathlib.Path(values.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    transcriber: Transcriber | None = None
    suffix = f".{fingerprint_model(values.model)[:8]}.json"
    excerpts = []
    files = list(find_files(pathlib.Path(values.midi), values.leave_out))
    for path, is_reported in tqdm(files, disable=None):
        audio = work_dir / f"{path.parent.name}_{path.stem}.wav"
        description = audio.with_suffix(suffix)
        if not description.exists():
            piece = read_piece(path)
            drawn = draw(piece, path.stem, values.font) if piece else None
            if drawn is None:
                continue
            samples, played, beats = drawn
            soundfile.write(audio, samples, SAMPLE_RATE_HZ)
            transcriber = transcriber or Transcriber.from_preset(values.model)
            found = transcriber.transcribe(audio).notes
            with replacing(description) as temporary:
                temporary.write_text(json.dumps([played, found, dataclasses.asdict(beats)]))
        name = f"{path.parent.name}/{path.name}"
        excerpts.append(_read(name, is_reported, audio, json.loads(description.read_text())))
    return excerpts


def find_files(root: pathlib.Path, left_out: Sequence[str]) -> Iterator[tuple[pathlib.Path, bool]]:
    """MIDI files of the validation split, and whether they are for reporting."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name in left_out:
            continue
        paths = [p for p in folder.rglob("*.mid*") if split_of(p.name) == "validation"]
        paths = [path for path in paths if read_piece(path)]
        paths.sort(key=lambda path: _digest(path.stem))
        for index, path in enumerate(paths):
            yield path, 2 * index + 1 >= len(paths)


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def draw(
    piece: Piece, name: str, fonts: Sequence[str]
) -> tuple[NDArray[np.float32], list[Note], Beats] | None:
    """Renders an excerpt: samples, notes and beats; None if it has too few of them."""
    rng = np.random.default_rng(_digest(name))
    start = rng.uniform(0, max(0.0, piece.notes[:, 0].max() - SECONDS)) * (rng.random() < 0.7)
    inside = (piece.notes[:, 0] >= start) & (piece.notes[:, 0] < start + SECONDS - 0.1)
    beats = (piece.times >= start) & (piece.times < start + SECONDS)
    if inside.sum() < MIN_NOTES or beats.sum() < MIN_BEATS:
        return None
    parts = collections.defaultdict(list)
    for onset, end, pitch, velocity, program, is_drum in piece.notes[inside]:
        note = Note(onset - start, end - start, int(pitch), max(1, int(velocity)), int(program))
        parts[program, is_drum].append(note._replace(is_drum=bool(is_drum)))
    config = SyntheticConfig(
        soundfonts=(fonts[int(rng.integers(len(fonts)))],),
        additive_share=0.0,
        seconds=SECONDS,
        gain_range_db=6.0,
        max_detuning_cents=0.0,
    )
    stems, played = play_parts([sort_notes(part) for part in parts.values()], config, rng)
    mix = mix_stems(stems, DEFAULT_AUGMENTATION, rng)
    times, numbers = piece.times[beats] - start, piece.numbers[beats]
    return mix, played, Beats(tuple(times.tolist()), tuple(numbers.tolist()))


def _read(name: str, is_reported: bool, audio: pathlib.Path, found: list[Any]) -> Excerpt:
    played, transcribed, beats = found
    times, numbers = tuple(beats.pop("times")), tuple(beats.pop("numbers"))
    return Excerpt(
        name,
        is_reported,
        audio,
        [Note(*note) for note in played],
        [Note(*note) for note in transcribed],
        Beats(times, numbers, **beats),
    )
