"""Recorded single notes of instruments, each folder with an `instrument.json` that describes them.

A note plays the recording nearest in pitch, resampled, of the layer nearest in strength, from its
attack on. Bowed, blown and organ notes go on in a loop where the recording ends; plucked and struck
ones decay. `instrument.json` holds "programs" (of General MIDI), "sustained" (whether a note lasts
as long as it is held), "articulation", "velocity" (of its layer: pp to ff, soft, hard, or null) and
"files": by name the "midi" pitch, how many "cents" above it the recording is, and its "seconds".
Layers of one instrument are folders of one name but for `__<velocity>` at its end.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.signal
import soxr
from numpy.typing import NDArray

from mt3_keras.data.example import DatasetError
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note
from mt3_keras.synth.sounds import Samples, Stem, read_recording

_STRENGTHS = {"pp": 0.25, "p": 0.4, "soft": 0.4, "mp": 0.5, "m": 0.6, "mf": 0.65, "f": 0.85}
_STRONGEST = 1.0  # of ff, hard, and of what has no layers
_SHORT = ("staccato", "short", "percussive")  # articulations whose notes end by themselves
_LONGEST_SHORT = 0.4  # seconds of a note that is played so
_SHORTEST_HELD = 0.8  # seconds of a recording that a longer note can be made of
_DOWN, _UP = 7, 5  # semitones that a recording is moved by at most
_LONGEST = {True: 5.0, False: 8.0}  # seconds kept of a recording, if sustained, if not
_RELEASE = {True: (0.03, 0.1), False: (0.04, 0.15)}
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
      is_short: whether only short notes may be played, as they are staccato or too short to hold.
      layers: at least one.
    """

    programs: tuple[int, ...]
    sustained: bool
    is_short: bool
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
        can_play = np.array(
            [[_can_play(i, note) for note in notes] for i in fitting if not notes[0].is_drum],
            np.bool_,
        )
        if not can_play.any():
            return Stem(samples, np.zeros(len(notes), np.bool_))
        shares = can_play.mean(axis=1) ** 2
        chosen = int(rng.choice(len(fitting), p=shares / shares.sum()))
        instrument, played = fitting[chosen], can_play[chosen]
        shortest, longest = _RELEASE[instrument.sustained]
        release = round(shortest * (longest / shortest) ** rng.uniform() * rate_hz)
        for note in itertools.compress(notes, played):
            start = round(note.onset * rate_hz)
            held = max(round(note.offset * rate_hz) - start, 1)
            size = min(held + release, num_samples - start)
            if size > 0:
                sound = _play(instrument, note, size, rate_hz)
                sound[held:] *= _ramp(release)[: max(size - held, 0)]
                samples[start : start + size] += sound
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
        told = _read_description(path)
        if told["programs"]:
            velocity = str(told.get("velocity"))
            name = str(path.parent).removesuffix(f"__{velocity}")
            layer = Layer(str(path.parent), _STRENGTHS.get(velocity, _STRONGEST))
            layers.setdefault(name, []).append((layer, told))
    if not layers:
        raise DatasetError(
            f"{folder}: no folder with an instrument.json that has programs; see "
            "mt3_keras/synth/recordings.py for what it holds"
        )
    found = []
    for group in layers.values():
        told = group[0][1]
        longest = max(float(file["seconds"]) for file in told["files"].values())
        is_short = any(word in told.get("articulation", "") for word in _SHORT)
        is_short |= bool(told["sustained"]) and longest < _SHORTEST_HELD
        is_sustained = bool(told["sustained"]) and not is_short
        programs = tuple(int(program) for program in told["programs"])
        found.append(
            Instrument(programs, is_sustained, is_short, tuple(layer for layer, _ in group))
        )
    return tuple(found)


def _read_description(path: pathlib.Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text())
        for name in ("programs", "sustained", "files"):
            told[name]
        for file in told["files"].values() if told["programs"] else ():
            float(file["midi"]), float(file["cents"]), float(file["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}: not a description of recordings ({error!r})") from error
    return told


@functools.cache
def _recordings(folder: str) -> tuple[tuple[float, str], ...]:
    """Pitch as it sounds, and path, of the recordings of a layer."""
    root = pathlib.Path(folder)
    files = _read_description(root / "instrument.json")["files"]
    return tuple(
        (told["midi"] + told["cents"] / 100, str(root / name)) for name, told in files.items()
    )


def _can_play(instrument: Instrument, note: Note) -> bool:
    if instrument.is_short and note.offset - note.onset > _LONGEST_SHORT:
        return False
    return bool(_near(instrument, note.pitch))


class _Near(NamedTuple):
    """The nearest recording of a layer, and semitones from it up to a pitch."""

    layer: Layer
    path: str
    semitones: float


@functools.cache
def _near(instrument: Instrument, pitch: int) -> tuple[_Near, ...]:
    """Of each layer that has a recording near a pitch."""
    found = []
    for layer in instrument.layers:
        ups = [(pitch - own, path) for own, path in _recordings(layer.path)]
        near = [(abs(up), path, up) for up, path in ups if -_DOWN <= up <= _UP]
        if near:
            found.append(_Near(layer, *min(near)[1:]))
    return tuple(found)


def _play(instrument: Instrument, note: Note, size: int, rate_hz: int) -> Samples:
    """A note that is held, from its onset on: float32 [size], a new array."""
    strength = note.velocity / 127
    near = min(_near(instrument, note.pitch), key=lambda one: abs(one.layer.strength - strength))
    ratio = SAMPLE_RATE_HZ / rate_hz * 2 ** (near.semitones / 12)
    rendered = _SHORTEST << max(0, math.ceil(math.log2(size / _SHORTEST)))
    step = round(_STEPS * math.log2(ratio))
    sound = _render(near.path, instrument.sustained, step, rendered)[:size]
    # Fainter, and duller than its layer was played.
    dullness = 0.6 * max(0.0, near.layer.strength - strength) ** 1.5
    gain = (1 - dullness) * strength**1.3
    coefficients = np.array([gain], np.float32), np.array([1, -dullness], np.float32)
    return np.asarray(scipy.signal.lfilter(*coefficients, sound), np.float32)


@functools.lru_cache(maxsize=512)
def _render(path: str, is_sustained: bool, step: int, size: int) -> Samples:
    """A recording played 2 ** (step / 600) of its samples at a time: float32 [size]."""
    recording, ratio = _read_recording(path, is_sustained), 2 ** (step / _STEPS)
    source, needed = recording.samples, math.ceil(size * ratio) + 64
    if recording.loop and needed > recording.loop[1]:
        first, end = recording.loop
        at = np.arange(needed)
        at[end:] = first + (at[end:] - first) % (end - first)
        source = source[at]
    sound = soxr.resample(source[:needed], ratio, 1.0)[:size]
    return np.pad(sound, (0, size - len(sound)))


class _Recording(NamedTuple):
    """One note.

    Attributes:
      samples: float32 [n] at 16 kHz, from its attack on, at a level that all recordings share.
      loop: first sample and the one behind the last; None plays to the end.
    """

    samples: Samples
    loop: tuple[int, int] | None


@functools.lru_cache(maxsize=4096)
def _read_recording(path: str, is_sustained: bool) -> _Recording:
    """Raises DatasetError if it is missing, damaged or silent."""
    seconds = _LONGEST[is_sustained] + 1  # with what is before the attack
    samples = read_recording(path, SAMPLE_RATE_HZ, "a note", seconds)
    start = _find_attack(samples)
    if start is None:
        raise DatasetError(f"{path}: a silent recording of a note")
    sound = samples[start : start + round(_LONGEST[is_sustained] * SAMPLE_RATE_HZ)].copy()
    loop = _make_loop(sound) if is_sustained else None
    if not loop:
        end = min(len(sound), round(_FADE_OUT * SAMPLE_RATE_HZ))
        sound[len(sound) - end :] *= _ramp(end)
    begin = min(len(sound), round(_FADE_IN[is_sustained] * SAMPLE_RATE_HZ))
    sound[:begin] *= _ramp(begin)[::-1]
    loudest = _levels(sound, round(0.05 * SAMPLE_RATE_HZ)).max()
    return _Recording(np.asarray(0.1 * sound / loudest, np.float32), loop)


def _levels(sound: Samples, size: int) -> NDArray[np.float64]:
    """Root mean square of the `size` samples up to each."""
    power = np.cumsum(np.pad(sound.astype(np.float64) ** 2, (size, 0)))
    return np.sqrt(np.maximum(power[size:] - power[:-size], 0) / size)


def _find_attack(sound: Samples) -> int | None:
    """The sample where a note begins to be heard, or shortly before; None if none does."""
    peak = float(np.abs(sound).max(initial=0))
    if not peak > 0:
        return None
    levels = _levels(sound, round(0.005 * SAMPLE_RATE_HZ))
    faint = int(np.argmax(np.abs(sound) >= 0.01 * peak))
    clear = int(np.argmax(levels >= 0.1 * levels.max()))
    return max(faint - round(0.001 * SAMPLE_RATE_HZ), clear - round(0.008 * SAMPLE_RATE_HZ), 0)


def _make_loop(sound: Samples) -> tuple[int, int] | None:
    """Makes a steady part of a note repeat, fading over in place; None if it is too short."""
    levels = _levels(sound, round(0.05 * SAMPLE_RATE_HZ))
    usual = np.median(levels[levels >= 0.2 * levels.max()])
    steady = np.flatnonzero(levels >= 0.7 * usual)
    end, overlap = int(steady[-1]) + 1, round(0.1 * SAMPLE_RATE_HZ)
    low, high = max(end - round(2.5 * SAMPLE_RATE_HZ), 2 * overlap), end - 4 * overlap
    if low >= high:
        return None
    tail, before = sound[end - overlap : end], sound[low - overlap : high]
    products = scipy.signal.correlate(before, tail, "valid")
    power = np.cumsum(np.pad(before.astype(np.float64) ** 2, (1, 0)))
    both = power[overlap:] - power[:-overlap] + float(np.sum(tail**2))
    first = low + int(np.argmax(products / np.maximum(both, 1e-20)))
    fading = _ramp(overlap)
    tail *= fading
    tail += sound[first - overlap : first] * (1 - fading)
    return first, end
