"""Recorded single notes of instruments: folders of files named by note, and GUS patches.

A note plays the recording nearest in pitch, resampled, from its attack on. Bowed, blown and organ
notes go on in a loop where the recording ends; plucked and struck ones decay. Envelopes and
vibrato of patches are not used.
"""

from __future__ import annotations

import functools
import math
import pathlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.signal
import soxr
from numpy.typing import NDArray

from mt3_keras.data.example import DatasetError
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note
from mt3_keras.synth.additive import pitch_to_hz
from mt3_keras.synth.sounds import (
    MAX_DETUNING,
    Names,
    Samples,
    Stem,
    find_pitches,
    measure_detuning,
    read_recording,
)

_SUFFIXES = (".wav", ".flac", ".aiff", ".aif", ".ogg", ".mp3")
_NOTE_NAME = re.compile(r"([A-G])(s|#|b|)(-?\d)", re.IGNORECASE)
_SEMITONES = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
_PATCH_NAME = re.compile(r"(\d{3})_")
_NUM_PROGRAMS = 120  # the others are noises
# Programs of General MIDI that a folder's recordings stand for.
_name_to_programs = Names(
    (
        (r"electric.?piano|piano.?electric", (4, 5)),
        (r"piano", (0, 1)),
        (r"harpsichord", (6,)),
        (r"glockenspiel", (9,)),
        (r"vibraphone", (11,)),
        (r"marimba", (12,)),
        (r"xylophone", (13,)),
        (r"harmonium", (20, 21)),
        (r"accordion", (21, 23)),
        (r"organ", (19,)),
        (r"guitar.?nylon|nylon.?guitar", (24,)),
        (r"guitar.?acoustic|acoustic.?guitar|steel.?guitar", (25,)),
        (r"guitar.?electric|electric.?guitar", (26, 27)),
        (r"bass.?electric|electric.?bass", (33, 34)),
        (r"violin", (40,)),
        (r"viola", (41,)),
        (r"cello", (42,)),
        (r"contra.?bass(?!oon)|double.?bass", (43,)),
        (r"harp(?!s)", (46,)),
        (r"trumpet", (56,)),
        (r"trombone", (57,)),
        (r"tuba", (58,)),
        (r"english.?horn", (69,)),
        (r"horn", (60,)),
        (r"sax", range(64, 68)),
        (r"oboe", (68,)),
        (r"bassoon", (70,)),
        (r"clarinet", (71,)),
        (r"piccolo", (72,)),
        (r"flute", (73,)),
        (r"recorder", (74,)),
    )
)
_SUSTAINED = frozenset((*range(16, 24), *range(40, 45), *range(48, 104), *range(109, 112)))
_DOWN, _UP = 7, 5  # semitones that a recording is moved by at most
_FILE_RATE_HZ = 24_000  # that files are kept at; down by _DOWN, up to 8 kHz
_LONGEST = {True: 5.0, False: 8.0}  # seconds kept of a recording, if sustained, if not
_RELEASE = {True: (0.03, 0.1), False: (0.04, 0.15)}
_FADE_IN = {True: 0.003, False: 0.001}
_FADE_OUT = 0.1
_LOOP_DECAY_DB = 12  # a second, of plucked and struck notes in a patch's loop, at middle C
_MAX_SWELL = 5  # of a loop's loudest 50 ms over its faintest
_STEPS = 600  # an octave, that resampling is rounded to
_SHORTEST = 2048  # samples rendered


class Instrument(NamedTuple):
    """What plays some programs.

    Attributes:
      path: a folder of files named by note, or a GUS patch.
      programs: of General MIDI, at least one.
    """

    path: str
    programs: tuple[int, ...]

    @property
    def sustained(self) -> bool:
        """Whether a note lasts as long as it is held."""
        return self.programs[0] in _SUSTAINED


@dataclass(frozen=True)
class RecordingsSource:
    """Plays one of the instruments that stand for a program, the more likely the more it can play.

    Each recording's own detuning is measured once a process, and made up for.

    Attributes:
      folders: searched through; see `find_instruments`.
    """

    folders: tuple[str, ...]

    def play(
        self, notes: Sequence[Note], num_samples: int, rate_hz: int, rng: np.random.Generator
    ) -> Stem:
        """Renders notes to the sample; see `mt3_keras.synth.sounds.Source`.

        Raises:
          DatasetError: a folder has no instruments, or a file is damaged.
        """
        samples, program = np.zeros(num_samples, np.float32), notes[0].program
        found = [i for folder in self.folders for i in find_instruments(folder)]
        fitting = [i for i in found if program in i.programs and not notes[0].is_drum]
        can_play = np.array(
            [[note.pitch in _playable(instrument) for note in notes] for instrument in fitting],
            np.bool_,
        ).reshape(len(fitting), len(notes))
        if not can_play.any():
            return Stem(samples, np.zeros(len(notes), np.bool_))
        counts = can_play.sum(axis=1)
        chosen = int(rng.choice(len(fitting), p=counts / counts.sum()))
        instrument, played = fitting[chosen], can_play[chosen]
        shortest, longest = _RELEASE[instrument.sustained]
        release = round(shortest * (longest / shortest) ** rng.uniform() * rate_hz)
        for note in (note for note, kept in zip(notes, played, strict=True) if kept):
            start = round(note.onset * rate_hz)
            held = max(round(note.offset * rate_hz) - start, 1)
            size = min(held + release, num_samples - start)
            if size > 0:
                sound = _soften(_play(instrument, note.pitch, size, rate_hz), note.velocity / 127)
                sound[held:] *= _ramp(release)[: max(size - held, 0)]
                samples[start : start + size] += sound
        return Stem(samples, played)


def _ramp(size: int) -> Samples:
    return np.asarray(0.5 + 0.5 * np.cos(np.linspace(0, np.pi, size)), np.float32)


def _soften(sound: Samples, strength: float) -> Samples:
    """Fainter and duller, in a new array."""
    dullness = 0.6 * (1 - strength) ** 1.5
    gain = (1 - dullness) * strength**1.3
    coefficients = np.array([gain], np.float32), np.array([1, -dullness], np.float32)
    return np.asarray(scipy.signal.lfilter(*coefficients, sound), np.float32)


@functools.cache
def find_instruments(folder: str) -> tuple[Instrument, ...]:
    """Instruments in a folder and all folders below.

    They are folders of audio files named by note (A3, Cs4, C#4, Db4) if their name, or else that
    of a folder around them, is an instrument's; and patches whose names begin with the number of
    their program, as 019_Church_Organ.pat, but for folders of drums.

    Raises:
      DatasetError: there are none.
    """
    found = []
    paths = sorted(pathlib.Path(folder).resolve().rglob("*"))
    for parent in sorted({path.parent for path in paths if _note_pitch(path) is not None}):
        programs = next(
            (p for name in (parent, *parent.parents) if (p := _name_to_programs(name.name))), ()
        )
        if programs:
            found.append(Instrument(str(parent), programs))
    for path in paths:
        number = _PATCH_NAME.match(path.name)
        if path.suffix.lower() == ".pat" and number and "drum" not in path.parent.name.lower():
            program = int(number[1])
            found += [Instrument(str(path), (program,))] if program < _NUM_PROGRAMS else []
    if not found:
        raise DatasetError(
            f"{folder}: no folder named after an instrument with audio files named by note, "
            "as violin/A4.wav, and no GUS patches, as 019_Church_Organ.pat"
        )
    return tuple(found)


def _note_pitch(path: pathlib.Path) -> int | None:
    """MIDI pitch that an audio file is named by; None if it is something else."""
    match = _NOTE_NAME.fullmatch(path.stem)
    if not match or path.suffix.lower() not in _SUFFIXES:
        return None
    alteration = {"s": 1, "#": 1, "b": -1, "": 0}[match[2].lower()]
    return 12 * (int(match[3]) + 1) + _SEMITONES[match[1].lower()] + alteration


class _Recording(NamedTuple):
    """One note.

    Attributes:
      samples: float32 [n], from its attack on, at a level that all recordings share.
      rate_hz: of the samples.
      loop: first sample and the one behind the last; None plays to the end.
    """

    samples: Samples
    rate_hz: float
    loop: tuple[int, int] | None


def _play(instrument: Instrument, pitch: int, size: int, rate_hz: int) -> Samples:
    """A note that is held, from its onset on: float32 [size]; silent if there is none near."""
    near = _nearest(instrument, pitch)
    if near is None:
        return np.zeros(size, np.float32)
    number, semitones = near
    ratio = _read_recording(instrument, number).rate_hz / rate_hz * 2 ** (semitones / 12)
    rendered = _SHORTEST << max(0, math.ceil(math.log2(size / _SHORTEST)))
    return _render(instrument, number, round(_STEPS * math.log2(ratio)), rendered)[:size]


def _nearest(instrument: Instrument, pitch: int) -> tuple[int, float] | None:
    """The nearest recording's number, and semitones from it up to a pitch; None if all are far."""
    distances = [(pitch - own, number) for number, own in _tune(instrument).items()]
    near = [(abs(up), number, up) for up, number in distances if -_DOWN <= up <= _UP]
    return min(near)[1:] if near else None


@functools.cache
def _tune(instrument: Instrument) -> dict[int, float]:
    """Pitches of the recordings, by their number, as measured.

    Left out are those that have none, sound an octave lower, change, or swell in their loop.
    """
    pitches = {}
    for number, nominal in enumerate(_nominal_pitches(instrument)):
        recording, key = _read_recording(instrument, number), round(nominal)
        step = round(_STEPS * math.log2(recording.rate_hz / SAMPLE_RATE_HZ))
        tone = _render(instrument, number, step, 20_480)
        starts = (0, 4096, 12_288) if instrument.sustained else (0, 4096)
        found = [measure_detuning(tone[start : start + 8192], key) for start in starts]
        detuning = float(np.median([d for d in found if math.isfinite(d)] or [math.inf]))
        is_steady = abs(found[0] - detuning) <= MAX_DETUNING and not _swells(recording)
        if is_steady and not _is_octave_low(tone[:8192], key + detuning):
            pitches[number] = key + detuning
    return pitches


def _swells(recording: _Recording) -> bool:
    """Whether a loop is so uneven that it would sound like notes struck again."""
    if recording.loop is None:
        return False
    loop = recording.samples[slice(*recording.loop)]
    size = round(0.05 * recording.rate_hz)
    levels = _levels(np.resize(loop, len(loop) + size), size)[size:]
    return float(levels.max()) > _MAX_SWELL * float(levels.min())


def _is_octave_low(tone: Samples, pitch: float) -> bool:
    """Whether a tone at 16 kHz repeats much better after two periods of a pitch than after one."""
    period = SAMPLE_RATE_HZ / pitch_to_hz(pitch)
    once, twice = (
        max(np.corrcoef(tone[:-lag], tone[lag:])[0, 1] for lag in range(near - 1, near + 2))
        for near in (round(period), round(2 * period))
    )
    return bool(twice > once + 0.25)


@functools.cache
def _playable(instrument: Instrument) -> frozenset[int]:
    return find_pitches(lambda pitch: _play(instrument, pitch, 8192, SAMPLE_RATE_HZ), pitched=True)


@functools.lru_cache(maxsize=128)
def _render(instrument: Instrument, number: int, step: int, size: int) -> Samples:
    """A recording played 2 ** (step / 600) of its samples at a time: float32 [size]."""
    recording, ratio = _read_recording(instrument, number), 2 ** (step / _STEPS)
    source, needed = recording.samples, math.ceil(size * ratio) + 64
    if recording.loop:
        first, end = recording.loop
        at = np.arange(needed)
        at[end:] = first + (at[end:] - first) % (end - first)
        source = source[at]
        if not instrument.sustained:
            pitch = _nominal_pitches(instrument)[number]
            rate = _LOOP_DECAY_DB * 2 ** ((pitch - 60) / 24) / recording.rate_hz
            source[end:] *= 10 ** (-rate / 20 * np.arange(1, len(source) - end + 1))
    sound = soxr.resample(source[:needed], ratio, 1.0)[:size]
    return np.pad(sound, (0, size - len(sound)))


@functools.lru_cache(maxsize=256)
def _read_recording(instrument: Instrument, number: int) -> _Recording:
    """Raises DatasetError if it is missing, damaged or silent."""
    if instrument.path.endswith(".pat"):
        path = instrument.path
        samples, rate_hz, loop = _read_patch(path)[number].recording
    else:
        path, rate_hz, loop = str(_note_files(instrument.path)[number]), _FILE_RATE_HZ, None
        seconds = _LONGEST[instrument.sustained] + 1  # with what is before the attack
        samples = read_recording(path, _FILE_RATE_HZ, "a note", seconds)
    start = _find_attack(samples, rate_hz)
    if start is None:
        raise DatasetError(f"{path}: a silent recording of a note")
    size = len(samples) - start
    if loop and loop[0] < start:
        loop = None
    if loop is None:
        size = min(size, round(_LONGEST[instrument.sustained] * rate_hz))
    sound = samples[start : start + size].copy()
    if loop:
        loop = loop[0] - start, loop[1] - start
    elif instrument.sustained:
        loop = _make_loop(sound, rate_hz)
    if not loop:
        end = min(size, round(_FADE_OUT * rate_hz))
        sound[size - end :] *= _ramp(end)
    begin = min(size, round(_FADE_IN[instrument.sustained] * rate_hz))
    sound[:begin] *= _ramp(begin)[::-1]
    loudest = _levels(sound, round(0.05 * rate_hz)).max()
    return _Recording(np.asarray(0.1 * sound / loudest, np.float32), rate_hz, loop)


def _levels(sound: Samples, size: int) -> NDArray[np.float64]:
    """Root mean square of the `size` samples up to each."""
    power = np.cumsum(np.pad(sound.astype(np.float64) ** 2, (size, 0)))
    return np.sqrt(np.maximum(power[size:] - power[:-size], 0) / size)


def _find_attack(sound: Samples, rate_hz: float) -> int | None:
    """The sample where a note begins to be heard, or shortly before; None if none does."""
    peak = float(np.abs(sound).max(initial=0))
    if not peak > 0:
        return None
    levels = _levels(sound, round(0.005 * rate_hz))
    faint = int(np.argmax(np.abs(sound) >= 0.01 * peak))
    clear = int(np.argmax(levels >= 0.1 * levels.max()))
    return max(faint - round(0.001 * rate_hz), clear - round(0.008 * rate_hz), 0)


def _make_loop(sound: Samples, rate_hz: float) -> tuple[int, int] | None:
    """Makes a steady part of a note repeat, fading over in place; None if it is too short."""
    levels = _levels(sound, round(0.05 * rate_hz))
    usual = np.median(levels[levels >= 0.2 * levels.max()])
    steady = np.flatnonzero(levels >= 0.7 * usual)
    end, overlap = int(steady[-1]) + 1, round(0.1 * rate_hz)
    low, high = max(end - round(2.5 * rate_hz), 2 * overlap), end - 4 * overlap
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


def _nominal_pitches(instrument: Instrument) -> tuple[float, ...]:
    """MIDI pitches that the recordings are said to have."""
    if instrument.path.endswith(".pat"):
        return tuple(sample.pitch for sample in _read_patch(instrument.path))
    return tuple(_note_pitch(path) or 0 for path in _note_files(instrument.path))


@functools.cache
def _note_files(folder: str) -> tuple[pathlib.Path, ...]:
    paths = sorted(pathlib.Path(folder).iterdir())
    return tuple(path for path in paths if _note_pitch(path) is not None)


class _PatchSample(NamedTuple):
    pitch: float
    recording: _Recording


_HEADER, _INSTRUMENT, _LAYER, _SAMPLE = 129, 63, 47, 96  # bytes
_16_BIT, _UNSIGNED, _LOOP, _PING_PONG, _REVERSE = 1, 2, 4, 8, 16


@functools.lru_cache(maxsize=32)
def _read_patch(path: str) -> tuple[_PatchSample, ...]:
    """Raises DatasetError if it is missing or damaged."""
    try:
        content = pathlib.Path(path).read_bytes()
        if not content.startswith(b"GF1PATCH1"):
            raise ValueError("it does not begin as one")
        samples, at = [], _HEADER + _INSTRUMENT + _LAYER
        for _ in range(content[at - 41]):
            size = struct.unpack_from("<I", content, at + 8)[0]
            samples.append(_parse_sample(content[at : at + _SAMPLE + size]))
            at += _SAMPLE + size
        if not samples:
            raise ValueError("it has no samples")
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise DatasetError(f"{path}: missing or no readable GUS patch ({error})") from error
    return tuple(samples)


def _parse_sample(content: bytes) -> _PatchSample:
    size, first, end, rate_hz, root = struct.unpack_from("<IIIHxxxxxxxxI", content, 8)
    modes = content[55]
    if len(content) != _SAMPLE + size or not (root and rate_hz):
        raise ValueError("it is cut off")
    width = 2 if modes & _16_BIT else 1
    whole = content[_SAMPLE : _SAMPLE + size // width * width]
    sign = "u" if modes & _UNSIGNED else "i"
    samples = np.frombuffer(whole, f"<{sign}{width}").astype(np.float32)
    samples -= samples.mean()
    loop = (first // width, end // width) if modes & _LOOP else None
    if modes & _REVERSE:
        samples = samples[::-1].copy()
        loop = (len(samples) - loop[1], len(samples) - loop[0]) if loop else None
    if loop:
        if not 0 <= loop[0] < loop[1] <= len(samples):
            raise ValueError("a loop lies outside its sample")
        samples = samples[: loop[1]]
        if modes & _PING_PONG:
            samples = np.concatenate([samples, samples[loop[0] : loop[1]][::-1]])
            loop = loop[0], len(samples)
    return _PatchSample(69 + 12 * math.log2(root / 440e3), _Recording(samples, rate_hz, loop))
