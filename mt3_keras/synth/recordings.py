"""Recorded single notes of instruments, each folder with an `instrument.json` that describes them.

A note plays the recording nearest in pitch, resampled, of the layer nearest in strength, from its
attack on. Bowed, blown and organ notes that would outlast it are not played; plucked and struck
ones decay. What has keys is let go of where a note ends and sounds a little longer; of all else a
note is no longer heard where it ends, for its end is what those hear who write it down.

`instrument.json` holds "programs" (of General MIDI), "sustained" (whether a note lasts as long as
it is held), "velocity" (of its layer: pp to ff, soft, hard, or null) and "files": by name the
"midi" pitch, how many "cents" above it the recording is, and its "seconds". Layers of one
instrument are folders of one name but for `__<velocity>` at its end.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import soxr
from numpy.typing import NDArray

from mt3_keras.data.example import DatasetError
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note
from mt3_keras.synth.sounds import Samples, Stem, read_recording

_STRENGTHS = {"pp": 0.25, "p": 0.4, "soft": 0.4, "mp": 0.5, "m": 0.6, "mf": 0.65, "f": 0.85}
_STRONGEST = 1.0  # of ff, hard, and of what has no layers
_STEADY_SHARE = 0.9  # of a recording: its end may be a release
_DOWN, _UP = 7, 5  # semitones that a recording is moved by at most
_LONGEST = 8.0  # seconds kept of a recording
# Programs of pianos, mallets and organs, and of synthesisers.
WITH_KEYS = frozenset((*range(24), *range(80, 104)))
# Seconds from letting go of a note to silence, shortest and longest, if sustained, if not.
_RELEASE = {True: (0.03, 0.1), False: (0.04, 0.15)}
_HEARD = 0.8  # of these seconds, until the note is 20 dB fainter
_FADE_IN = {True: 0.003, False: 0.001}
_FADE_OUT = 0.1
_STEPS = 600  # an octave, that resampling is rounded to
_SHORTEST = 2048  # samples rendered


class Layer(NamedTuple):
    """Recordings of one strength, 0 to 1, in one folder."""

    path: str
    strength: float


class Instrument(NamedTuple):
    """What plays some programs.

    Attributes:
      programs: of General MIDI, at least one.
      sustained: whether a note lasts as long as it is held.
      layers: at least one.
    """

    programs: tuple[int, ...]
    sustained: bool
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class RecordingsSource:
    """Plays one of the instruments that stand for a program, the more likely the more it can play.

    Attributes:
      folders: searched through; see `find_instruments`.
    """

    folders: tuple[str, ...]

    @property
    def programs(self) -> frozenset[int]:
        """Programs that some instrument plays."""
        return frozenset(program for i in self._instruments() for program in i.programs)

    def play(
        self, notes: Sequence[Note], num_samples: int, rate_hz: int, rng: np.random.Generator
    ) -> Stem:
        """Renders notes to the sample; see `mt3_keras.synth.sounds.Source`.

        Raises:
          DatasetError: a folder has no instruments, or a file is damaged.
        """
        samples, program = np.zeros(num_samples, np.float32), notes[0].program
        fitting = [i for i in self._instruments() if program in i.programs]
        recordings = [[_choose(i, note) for note in notes] for i in fitting]
        shares = np.array([np.mean([one is not None for one in row]) ** 2 for row in recordings])
        if notes[0].is_drum or not shares.any():
            return Stem(samples, np.zeros(len(notes), np.bool_))
        chosen = int(rng.choice(len(fitting), p=shares / shares.sum()))
        is_sustained = fitting[chosen].sustained
        shortest, longest = _RELEASE[is_sustained]
        release = round(shortest * (longest / shortest) ** rng.uniform() * rate_hz)
        # Samples by which a note is let go of before its end.
        early = 0 if program in WITH_KEYS else round(_HEARD * release)
        for note, near in zip(notes, recordings[chosen], strict=True):
            start = round(note.onset * rate_hz)
            held = max(round(note.offset * rate_hz) - start, 1)
            held -= min(early, held // 2)
            size = min(held + release, num_samples - start)
            if near and size > 0:
                sound = _play(near, is_sustained, note.velocity / 127, size, rate_hz)
                sound[held:] *= _ramp(release)[: max(size - held, 0)]
                samples[start : start + size] += sound
        played = np.array([near is not None for near in recordings[chosen]])
        return Stem(samples, played)

    def _instruments(self) -> list[Instrument]:
        return [i for folder in self.folders for i in find_instruments(folder)]


@functools.cache
def _ramp(size: int) -> Samples:
    return np.asarray(0.5 + 0.5 * np.cos(np.linspace(0, np.pi, size)), np.float32)


@functools.cache
def find_instruments(folder: str) -> tuple[Instrument, ...]:
    """Instruments in a folder and all folders below, but for drum kits.

    Raises:
      DatasetError: there are none, or one's description is damaged.
    """
    layers: dict[str, list[tuple[Layer, dict[str, Any]]]] = {}
    for path in sorted(pathlib.Path(folder).resolve().rglob("instrument.json")):
        described = _read_description(path)
        if described["programs"]:
            velocity = str(described.get("velocity"))
            name = str(path.parent).removesuffix(f"__{velocity}")
            layer = Layer(str(path.parent), _STRENGTHS.get(velocity, _STRONGEST))
            layers.setdefault(name, []).append((layer, described))
    if not layers:
        raise DatasetError(
            f"{folder}: no folder with an instrument.json that has programs; see "
            "mt3_keras/synth/recordings.py for what it holds"
        )
    found = []
    for group in layers.values():
        described = group[0][1]
        programs = tuple(int(program) for program in described["programs"])
        layers_ = tuple(layer for layer, _ in group)
        found.append(Instrument(programs, bool(described["sustained"]), layers_))
    return tuple(found)


def _read_description(path: pathlib.Path) -> dict[str, Any]:
    try:
        described: dict[str, Any] = json.loads(path.read_text())
        for name in ("programs", "sustained", "files"):
            described[name]
        for file in described["files"].values() if described["programs"] else ():
            float(file["midi"]), float(file["cents"]), float(file["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}: not a description of recordings ({error!r})") from error
    return described


@functools.cache
def _recordings(folder: str) -> tuple[tuple[float, float, str], ...]:
    """Pitch as it sounds, seconds, and path of the recordings of a layer."""
    root = pathlib.Path(folder)
    files = _read_description(root / "instrument.json")["files"]
    return tuple(
        (
            described["midi"] + described["cents"] / 100,
            float(described["seconds"]),
            str(root / name),
        )
        for name, described in files.items()
    )


class _Near(NamedTuple):
    """The nearest recording of a layer, semitones from it up to a pitch, and seconds it lasts."""

    layer: Layer
    path: str
    semitones: float
    seconds: float


@functools.cache
def _near(instrument: Instrument, pitch: int) -> tuple[_Near, ...]:
    """Of each layer that has a recording near a pitch."""
    found = []
    for layer in instrument.layers:
        near = [
            (abs(pitch - own), path, pitch - own, seconds)
            for own, seconds, path in _recordings(layer.path)
            if -_DOWN <= pitch - own <= _UP
        ]
        if near:
            _, path, up, seconds = min(near)
            found.append(_Near(layer, path, up, _STEADY_SHARE * seconds / 2 ** (up / 12)))
    return tuple(found)


def _choose(instrument: Instrument, note: Note) -> _Near | None:
    """The recording that plays a note; None if none does."""
    strength, held = note.velocity / 127, note.offset - note.onset
    return min(
        (
            near
            for near in _near(instrument, note.pitch)
            if held <= near.seconds or not instrument.sustained
        ),
        key=lambda near: abs(near.layer.strength - strength),
        default=None,
    )


def _play(near: _Near, is_sustained: bool, strength: float, size: int, rate_hz: int) -> Samples:
    """A note that is held, from its onset on: float32 [size], a new array."""
    import scipy.signal

    ratio = SAMPLE_RATE_HZ / rate_hz * 2 ** (near.semitones / 12)
    rendered = _SHORTEST << max(0, math.ceil(math.log2(size / _SHORTEST)))
    step = round(_STEPS * math.log2(ratio))
    sound = _render(near.path, is_sustained, step, rendered)[:size]
    # Fainter, and duller than its layer was played.
    dullness = 0.6 * max(0.0, near.layer.strength - strength) ** 1.5
    gain = (1 - dullness) * strength**1.3
    coefficients = np.array([gain], np.float32), np.array([1, -dullness], np.float32)
    return np.asarray(scipy.signal.lfilter(*coefficients, sound), np.float32)


@functools.lru_cache(maxsize=512)
def _render(path: str, is_sustained: bool, step: int, size: int) -> Samples:
    """A recording played 2 ** (step / 600) of its samples at a time: float32 [size]."""
    ratio = 2 ** (step / _STEPS)
    source = _read_recording(path, is_sustained)[: math.ceil(size * ratio) + 64]
    sound = soxr.resample(source, ratio, 1.0)[:size]
    return np.pad(sound, (0, size - len(sound)))


@functools.lru_cache(maxsize=4096)
def _read_recording(path: str, is_sustained: bool) -> Samples:
    """A note from its attack on: float32 [n] at 16 kHz, at a level that all recordings share.

    Raises:
      DatasetError: it is missing, damaged or silent.
    """
    samples = read_recording(path, SAMPLE_RATE_HZ, "a note", _LONGEST)
    start = _find_attack(samples)
    if start is None:
        raise DatasetError(f"{path}: a silent recording of a note")
    sound = samples[start:].copy()
    end = min(len(sound), round(_FADE_OUT * SAMPLE_RATE_HZ))
    sound[len(sound) - end :] *= _ramp(end)
    begin = min(len(sound), round(_FADE_IN[is_sustained] * SAMPLE_RATE_HZ))
    sound[:begin] *= _ramp(begin)[::-1]
    loudest = _levels(sound, round(0.05 * SAMPLE_RATE_HZ)).max()
    return np.asarray(0.1 * sound / loudest, np.float32)


def _levels(sound: Samples, size: int) -> NDArray[np.float64]:
    """Root mean square of the `size` samples up to each."""
    power = np.cumsum(np.pad(sound.astype(np.float64) ** 2, (size, 0)))
    return np.sqrt(np.maximum(power[size:] - power[:-size], 0) / size)


def _find_attack(sound: Samples) -> int | None:
    """The sample where a note becomes audible, or shortly before; None if none does."""
    peak = float(np.abs(sound).max(initial=0))
    if not peak > 0:
        return None
    levels = _levels(sound, round(0.005 * SAMPLE_RATE_HZ))
    faint = int(np.argmax(np.abs(sound) >= 0.01 * peak))
    clear = int(np.argmax(levels >= 0.1 * levels.max()))
    return max(faint - round(0.001 * SAMPLE_RATE_HZ), clear - round(0.008 * SAMPLE_RATE_HZ), 0)
