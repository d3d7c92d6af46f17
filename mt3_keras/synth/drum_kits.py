"""Drum kits of recorded strokes: Hydrogen's, or plain folders of named samples.

What a stroke is of General MIDI's drum map is read from its file's name if that begins with a key,
as 46_hat_open_v2.ogg, and else from the drum's name, as kits number their instruments in their own
ways. Names that do not tell are left out.
"""

from __future__ import annotations

import functools
import math
import pathlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mt3_keras.data.example import DatasetError
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note
from mt3_keras.synth.sounds import Names, Samples, Stem, read_recording

_SUFFIXES = (".wav", ".flac", ".aiff", ".aif", ".ogg")
_LONGEST = 2.5  # seconds
_HATS, _OPEN_HAT = (42, 44, 46), 46  # a stroke on any of them ends the open one's
_OTHER_KIT_CHANCE = 0.15  # of a drum from another kit
_HALF_OPEN_CHANCE = 0.35  # that a part's open hat is closed so far that it rings only shortly
_HALF_OPEN_SECONDS = (0.08, 0.4)  # to a third
_KEYED = re.compile(r"(\d\d)_")
# Keys of the drum map that one drum of a kit stands for, where they are more than its own.
_ALIKE = {
    35: (35, 36), 36: (35, 36), 38: (38, 40), 40: (38, 40), 41: (41, 43), 43: (41, 43, 45),
    45: (43, 45, 47), 47: (45, 47, 48), 48: (48, 50), 50: (48, 50), 49: (49, 57), 57: (49, 57),
    51: (51, 59), 59: (51, 59),
}  # fmt: skip
# No pitch: not a stroke on one drum.
name_to_pitches = Names(
    (
        (r"roll|swish|choke|loop|sample|fx|^bass_|crash/ride", ()),
        (r"stick|click", (37,)),
        (r"clap", (39,)),
        (r"snare|^sn_", (38, 40)),
        (r"kick|bass.?drum|^bd_|drum_bass|thump", (35, 36)),
        (r"pedal|hat \d pd", (44,)),
        (r"(hat|hh|cymbal).*(op|free)|(open|side o)[ -]?hh", (46,)),
        (r"hat|hh|cymbal_closed", (42,)),
        (r"tom.*hi|high tom|tom 1", (48, 50)),
        (r"tom.*mid|mid.*tom|tom 2", (45, 47, 48)),
        (r"tom.*lo|low tom|floor", (41, 43, 45)),
        (r"^tom$", (47,)),
        (r"cowbell", (56,)),
        (r"ride.*(bell|cup)|^paiste bell", (53,)),
        (r"ride", (51, 59)),
        (r"china", (52,)),
        (r"splash", (55,)),
        (r"crash|cymbal_(hard|soft)", (49, 57)),
        (r"tambourine", (54,)),
        (r"agogo high", (67,)),
        (r"agogo low", (68,)),
        (r"bongo hi", (60,)),
        (r"bongo lo", (61,)),
        (r"conga", (62, 63, 64)),
        (r"maraca", (70,)),
        (r"clave", (75,)),
        (r"woodblock hi", (76,)),
        (r"woodblock lo", (77,)),
        (r"triangle", (81,)),
    )
)


class Stroke(NamedTuple):
    """One recording; `softest` and `hardest` are velocities, 0 to 1, that it is meant for."""

    path: str
    softest: float
    hardest: float


class Drum(NamedTuple):
    """One instrument of a kit.

    Attributes:
      pitches: of General MIDI's drum map that it can stand for.
      gain: against the others of its kit.
      strokes: at least one.
    """

    pitches: tuple[int, ...]
    gain: float
    strokes: tuple[Stroke, ...]


@dataclass(frozen=True)
class DrumKitSource:
    """Plays drums with a random kit, a few of them with other kits' drums.

    Attributes:
      folders: of one kit each: Hydrogen's, with a drumkit.xml, or of samples with telling names.
    """

    folders: tuple[str, ...]

    def play(
        self, notes: Sequence[Note], num_samples: int, rate_hz: int, rng: np.random.Generator
    ) -> Stem:
        """Renders notes to the sample; see `mt3_keras.synth.sounds.Source`.

        Drums keep their pitch whatever the rate.

        Raises:
          DatasetError: a kit is missing or damaged.
        """
        samples = np.zeros(num_samples, np.float32)
        if not notes[0].is_drum:
            return Stem(samples, np.zeros(len(notes), np.bool_))
        own = read_kit(self.folders[rng.integers(len(self.folders))])
        others = tuple(drum for folder in self.folders for drum in read_kit(folder))
        drums = {p: _choose(own, others, p, rng) for p in sorted({n.pitch for n in notes})}
        played = np.array([drums[note.pitch] is not None for note in notes])
        speed = math.exp(0.05 * rng.standard_normal())
        is_half_open = rng.random() < _HALF_OPEN_CHANCE
        ringing = rng.uniform(*_HALF_OPEN_SECONDS) * SAMPLE_RATE_HZ
        hats = [round(note.onset * rate_hz) for note in notes if note.pitch in _HATS]
        for note in notes:
            drum, start = drums[note.pitch], round(note.onset * rate_hz)
            if drum is None or start >= num_samples:
                continue
            end = next((hat for hat in hats if hat > start), num_samples)
            end = end if note.pitch == _OPEN_HAT else num_samples
            sound = _end(_strike(drum, note.velocity / 127, speed, rng), end - start)
            if is_half_open and note.pitch == _OPEN_HAT:
                sound = sound * np.exp(-np.arange(len(sound), dtype=np.float32) / ringing)
            samples[start : start + len(sound)] += sound
        return Stem(samples, played)


def _end(sound: Samples, size: int) -> Samples:
    """The first `size` samples, the last 20 ms of them fading if that cuts the sound."""
    if size >= len(sound):
        return sound
    faded = sound[:size].copy()
    ramp = np.linspace(1, 0, min(size, SAMPLE_RATE_HZ // 50), dtype=np.float32)
    faded[size - len(ramp) :] *= ramp
    return faded


def _choose(
    own: Sequence[Drum], others: Sequence[Drum], pitch: int, rng: np.random.Generator
) -> Drum | None:
    fitting = [drum for drum in own if pitch in drum.pitches]
    if not fitting or rng.random() < _OTHER_KIT_CHANCE:
        fitting = [drum for drum in others if pitch in drum.pitches] or fitting
    return fitting[rng.integers(len(fitting))] if fitting else None


def _strike(drum: Drum, strength: float, speed: float, rng: np.random.Generator) -> Samples:
    near = np.array([max(s.softest - strength, strength - s.hardest, 0) for s in drum.strokes])
    closest = np.flatnonzero(near <= near.min() + 0.05)  # neighbours take turns
    stroke = drum.strokes[rng.choice(closest)]
    sound = read_stroke(stroke.path)
    at = np.arange(0, len(sound) - 1, speed)
    loudness = strength ** (0.8 if len(drum.strokes) > 1 else 1.5)
    return np.interp(at, np.arange(len(sound)), sound).astype(np.float32) * np.float32(
        loudness * drum.gain
    )


def find_kits(folder: str) -> tuple[str, ...]:
    """Kits in a folder: itself, or those of its subfolders whose names tell their drums.

    Raises:
      DatasetError: there are none.
    """
    root = pathlib.Path(folder)
    inside = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    kits = tuple(str(path) for path in sorted([root, *inside]) if _read_drums(path))
    if not kits:
        raise DatasetError(f"{folder}: no drumkit.xml and no samples named after drums")
    return kits


@functools.cache
def read_kit(folder: str) -> tuple[Drum, ...]:
    """The drums of a kit that its names tell.

    Raises:
      DatasetError: it is missing, damaged, or has none.
    """
    drums = _read_drums(pathlib.Path(folder))
    if not drums:
        raise DatasetError(f"{folder}: no drumkit.xml and no samples named after drums")
    return tuple(drums)


def _read_drums(root: pathlib.Path) -> list[Drum]:
    try:
        return _read_hydrogen(root) if (root / "drumkit.xml").is_file() else _read_samples(root)
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DatasetError(f"{root}: missing or no readable drum kit ({error})") from error


def _name_to_keys(file: str) -> tuple[int, ...]:
    key = _KEYED.match(file)
    return _ALIKE.get(int(key[1]), (int(key[1]),)) if key and 27 <= int(key[1]) <= 87 else ()


def _read_samples(root: pathlib.Path) -> list[Drum]:
    paths = sorted(path for path in root.iterdir() if path.suffix.lower() in _SUFFIXES)
    named = [(p, _name_to_keys(p.name) or name_to_pitches(p.stem)) for p in paths]
    return [Drum(p, 1.0, (Stroke(str(path), 0.0, 1.0),)) for path, p in named if p]


def _read_hydrogen(root: pathlib.Path) -> list[Drum]:
    tree = ElementTree.parse(root / "drumkit.xml")
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2]  # newer kits have a namespace
    drums = []
    for instrument in tree.iter("instrument"):
        layers = list(instrument.iter("layer")) or [instrument]
        strokes = tuple(
            Stroke(
                str(root / (layer.findtext("filename") or "").strip()),
                float(layer.findtext("min") or 0),
                float(layer.findtext("max") or 1),
            )
            for layer in layers
        )
        present = tuple(stroke for stroke in strokes if pathlib.Path(stroke.path).is_file())
        name = pathlib.Path(present[0].path).name if present else ""
        pitches = _name_to_keys(name) or name_to_pitches(instrument.findtext("name") or "")
        if pitches and present:
            drums.append(Drum(pitches, float(instrument.findtext("volume") or 1), present))
    return drums


@functools.cache
def read_stroke(path: str) -> Samples:
    """A recording from its attack on: float32 [n] at 16 kHz mono, at most 2.5 s.

    Raises:
      DatasetError: it is missing, damaged or silent.
    """
    mono = read_recording(path, SAMPLE_RATE_HZ, "a drum")
    peak = float(np.abs(mono).max(initial=0))
    if not peak > 0:
        raise DatasetError(f"{path}: a silent recording of a drum")
    start = int(np.flatnonzero(np.abs(mono) >= 0.05 * peak)[0])
    sound = np.array(mono[start : start + round(_LONGEST * SAMPLE_RATE_HZ)], np.float32)
    end = min(len(sound), round(0.05 * SAMPLE_RATE_HZ))
    sound[len(sound) - end :] *= np.linspace(1, 0, end, dtype=np.float32)
    return sound
