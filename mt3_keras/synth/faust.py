"""Models of strings, winds, organs and voices in Faust, played phrase by phrase.

Notes are split into lines of one note at a time, as fingers, bows and breaths play them. Each line
drives a model with curves of frequency and strength: slow and fast attacks, bow changes, glides
into legato notes, swells, vibrato that comes late. What Faust's own library computes out of tune
is corrected by what its tones measure, and left out where that does not help.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import soxr

from mt3_keras.data.example import DatasetError
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note
from mt3_keras.synth.additive import pitch_to_hz
from mt3_keras.synth.phrases import (
    LEGATO_GAP,
    Manner,
    bend,
    draw_manner,
    fade,
    is_joined,
    split_lines,
    swell,
)
from mt3_keras.synth.sounds import Samples, Stem, find_pitches, measure_detuning

_OVERSAMPLING = 3  # the models are dull and out of tune at 16 kHz
_TRY_SAMPLES = 8192


class Model(NamedTuple):
    """An instrument.

    Attributes:
      code: Faust expression of `hz`, `level` (0 between notes, up to 1) and `colour` (0 to 1, the
        same for all of a line).
      programs: of General MIDI that it is played for.
      pitches: its range.
      attack: shortest and longest, in seconds to two thirds of the level; 0 for plucked strings.
      release: shortest and longest, in seconds to a third.
      vibrato: most, in semitones.
      players: how many play each note, not quite together.
    """

    code: str
    programs: frozenset[int]
    pitches: range
    attack: tuple[float, float]
    release: tuple[float, float]
    vibrato: float = 0.0
    players: int = 1


# Without a push of the right period at the attack, bow and reed would take 50 ms and more to sound.
_BOWED = (
    "pm.violinModel(pm.f2l(hz), 0.4 + 0.2 * level, level * (1 + push), 0.54 + 0.09 * colour)"
    " with { push = os.sawtooth(hz) * en.ar(0.001, 0.05, level > 0); }"
)
_PLUCKED = "pm.pluckString(pm.f2l(hz), {cutoff}, 1.5, 1, level, level > 0)"
_NYLON = f"pm.nylonGuitarModel(pm.f2l(hz), 0.6 + 0.3 * colour, {_PLUCKED.format(cutoff=1)})"
_STEEL = f"pm.guitarModel(pm.f2l(hz), 0.6 + 0.3 * colour, {_PLUCKED.format(cutoff=1)})"
_ELECTRIC = (
    "pm[maxLength = 9;].elecGuitarModel(pm.f2l(hz), 0.6 + 0.3 * colour, 1, "
    f"{_PLUCKED.format(cutoff='(0.4 + 0.6 * colour)')})"
)
_CLARINET = (
    "pm.clarinetModel(pm.f2l(hz), (level > 0) * (0.62 + 0.3 * level) * (1 + 0.1 * breath)"
    " + 0.25 * os.square(hz) * en.ar(0.001, 0.03, level > 0), 0.3 + 0.4 * colour, 0.5) * level"
    " with { breath = no.noise : fi.lowpass(1, 2000); }"
)
_FLUTE = (
    "level * (tone + breath) with {"
    " tone = os.osc(hz) + (0.05 + 0.4 * colour) * level * os.osc(2 * hz)"
    " + 0.2 * colour * level * os.osc(3 * hz);"
    " breath = (0.3 + chiff) * (no.noise : fi.resonbp(hz, 12, 1));"
    " chiff = 1.5 * en.ar(0.002, 0.06, level > 0); }"
)
_BRASS = (
    "os.sawtooth(hz) : fi.lowpass(2, min(7000, hz * (1 + (4 + 8 * colour) * level * level)))"
    " : fi.resonhp(0.5 * hz, 0.7, 1) : *(level)"
)
_REED = (
    "os.pulsetrain(hz, 0.1 + 0.3 * colour) <: _ * 0.3, fi.resonbp(600 + 600 * colour, 2, 1),"
    " fi.resonbp(2000 + 1200 * colour, 4, 0.6) :> fi.lowpass(1, 800 + 5000 * level)"
    " : fi.dcblocker : *(level)"
)
_ORGAN = (
    "(par(i, 9, os.osc(hz * ba.take(i + 1, (0.5, 1.5, 1, 2, 3, 4, 5, 6, 8))) * bar(i)) :> _)"
    " * level with { bar(i) = 0.5 * (i == 2)"
    " + max(0, sin(97 * colour * (i + 1))) / ((1 + 0.5 * i) * (1 + 2 * (i < 2))); }"
)
# From "oo" over "ah" to "ee"; the first formant keeps above the tone, as singers do.
_VOICE = (
    "os.sawtooth(hz) : fi.lowpass(1, 500 + 3000 * level) <: formant(first, 5, 1),"
    " formant(second, 12, 0.5), formant(2700 + 300 * colour, 15, 0.3), formant(3500, 15, 0.2)"
    " :> *(level) with {"
    " formant(at, q, gain) = fi.resonbp(at, q, gain);"
    " first = max(1.05 * hz, 300 + 500 * sin(ma.PI * colour));"
    " second = max(1.8 * hz, 800 + 1500 * max(0, colour - 0.4) / 0.6); }"
)

MODELS = (
    Model(_BOWED, frozenset((40, 41, 110)), range(55, 97), (0.004, 0.08), (0.03, 0.2), 0.4),
    Model(_BOWED, frozenset((42, 43)), range(33, 74), (0.004, 0.05), (0.03, 0.2), 0.3),
    Model(_BOWED, frozenset((48, 49)), range(36, 85), (0.01, 0.1), (0.05, 0.3), 0.3, players=3),
    Model(_NYLON, frozenset((24, 46)), range(33, 80), (0, 0), (0.02, 0.2)),
    Model(_NYLON, frozenset((45,)), range(36, 84), (0, 0), (0.01, 0.03)),
    Model(_STEEL, frozenset((15, 25, 105, 107)), range(33, 90), (0, 0), (0.02, 0.2)),
    Model(_ELECTRIC, frozenset((26, 27, 29, 30)), range(33, 86), (0, 0), (0.01, 0.1)),
    Model(_ELECTRIC, frozenset((32, 33, 34, 36, 37)), range(27, 68), (0, 0), (0.01, 0.1)),
    Model(_CLARINET, frozenset((71,)), range(48, 96), (0.004, 0.06), (0.02, 0.1), 0.1),
    Model(_FLUTE, frozenset(range(72, 80)), range(55, 103), (0.01, 0.07), (0.02, 0.1), 0.3),
    Model(_BRASS, frozenset((56, 57, 58, 60, 62, 63)), range(34, 90), (0.01, 0.08), (0.02, 0.1)),
    Model(_BRASS, frozenset((61,)), range(34, 90), (0.01, 0.08), (0.02, 0.1), players=3),
    Model(_REED, frozenset(range(64, 71)), range(34, 94), (0.005, 0.06), (0.02, 0.1), 0.25),
    Model(_ORGAN, frozenset(range(16, 21)), range(36, 97), (0.001, 0.02), (0.005, 0.05)),
    Model(_VOICE, frozenset((53, 54, 85)), range(43, 85), (0.01, 0.1), (0.04, 0.2), 0.5),
    Model(_VOICE, frozenset((52, 91)), range(43, 85), (0.01, 0.1), (0.05, 0.3), 0.4, players=3),
)
# After the curves' end the engine feeds zeros up to a whole block: no model stands 0 Hz.
_PROGRAM = (
    'import("stdfaust.lib"); model(hz, level, colour) = {code};'
    " process(hz, level, colour) = model(max(20, hz), level, colour);"
)
_DISTORTED = (29, 30)  # overdriven and distortion guitar


class Tuning(NamedTuple):
    """What a model's tones measure, for each pitch that it plays.

    Attributes:
      semitones: by how much to tune it higher.
      gain: what brings it to the loudness of the others.
    """

    semitones: dict[int, float]
    gain: dict[int, float]


@dataclass(frozen=True)
class FaustSource:
    """Plays the programs of `MODELS`, no drums.

    Each model is tried once a process, pitch by pitch, as a soundfont is.
    """

    def play(
        self, notes: Sequence[Note], num_samples: int, rate_hz: int, rng: np.random.Generator
    ) -> Stem:
        """Renders notes to the sample; see `mt3_keras.synth.sounds.Source`.

        Raises:
          DatasetError: dawdreamer is not installed, or would crash here.
        """
        program, is_drum = notes[0].program, notes[0].is_drum
        samples = np.zeros(num_samples, np.float32)
        models = [model for model in MODELS if program in model.programs and not is_drum]
        if not models:
            return Stem(samples, np.zeros(len(notes), np.bool_))
        model = models[rng.integers(len(models))]
        tuning = _tune(model)
        played = np.array([note.pitch in tuning.gain for note in notes])
        wanted = [note for note, kept in zip(notes, played, strict=True) if kept]
        for number in range(model.players):
            late = rng.uniform(0, 0.02) if number else 0.0
            manner = draw_manner(model.attack, model.release, model.vibrato, rng)
            semitones = rng.normal(0, 0.06) if model.players > 1 else 0.0
            player = _Player(manner, rng.uniform(), semitones)
            for line in split_lines(wanted, LEGATO_GAP / 2):
                moved = [n._replace(onset=n.onset + late, offset=n.offset + late) for n in line]
                _add_line(samples, moved, model, player, rate_hz, rng)
        if program in _DISTORTED and samples.any():
            samples = np.tanh(samples * np.float32(rng.uniform(3, 20) / np.abs(samples).max()))
        return Stem(samples, played)


class _Player(NamedTuple):
    """What is drawn once for a stem: how it is played, its timbre, and how far out of tune."""

    manner: Manner
    colour: float
    semitones: float


def _add_line(
    samples: Samples,
    line: Sequence[Note],
    model: Model,
    player: _Player,
    rate_hz: int,
    rng: np.random.Generator,
) -> None:
    """Adds what a line of notes sounds like, from its first onset to the last one's end."""
    first = round(line[0].onset * rate_hz)
    end = round((line[-1].offset + 5 * player.manner.release) * rate_hz) + 1
    size = min(end, len(samples)) - first
    if size <= 0:
        return
    starts = [min(round(note.onset * rate_hz) - first, size) for note in line]
    curves = _Curves(*np.zeros((3, size), np.float32))
    for i, (begin, stop) in enumerate(zip(starts, [*starts[1:], size], strict=True)):
        if begin < stop:
            _draw_note(curves, slice(begin, stop), line, i, model, player, rate_hz, rng)
    hz = pitch_to_hz(0) * np.exp2(curves.semitones / 12) * np.float32(SAMPLE_RATE_HZ / rate_hz)
    colour = np.full(size, player.colour, np.float32)
    made = _run(model.code, np.stack([hz, curves.level, colour]))
    samples[first : first + size] += made * curves.gain


class _Curves(NamedTuple):
    """Pitch and strength that drive a model, and a gain for what it gives; float32 [n]."""

    semitones: Samples
    level: Samples
    gain: Samples


def _draw_note(
    curves: _Curves,
    here: slice,
    line: Sequence[Note],
    index: int,
    model: Model,
    player: _Player,
    rate_hz: int,
    rng: np.random.Generator,
) -> None:
    note, manner, tuning = line[index], player.manner, _tune(model)
    joined = manner.attack > 0 and is_joined(line, index)
    before = float(curves.level[here.start - 1]) if joined else 0.0
    time = np.asarray(np.arange(here.stop - here.start) / rate_hz, np.float32)
    length = max(note.offset - note.onset, 1 / rate_hz)
    interval = line[index - 1].pitch - note.pitch if joined else 0
    pitch = note.pitch + tuning.semitones[note.pitch] + player.semitones
    curves.semitones[here] = np.float32(pitch) + bend(time, interval, manner, rng)
    strength = (note.velocity / 127) ** 1.2
    level = np.full_like(time, strength)
    if manner.attack:
        level += np.float32(before - strength) * np.exp(-time / np.float32(manner.attack))
    ending = fade(time, length, manner)
    curves.level[here] = level * swell(time, length, manner) * ending
    curves.gain[here] = np.float32(tuning.gain[note.pitch]) * ending
    if not joined:
        curves.level[max(here.start - 1, 0)] = 0  # sets the attack off


def clashing_module() -> str | None:
    """What is loaded that brings an LLVM of its own, which Faust's would crash on, if any."""
    return next((name for name in ("tensorflow", "jax") if name in sys.modules), None)


@functools.cache
def _compile(code: str) -> tuple[Any, Any]:
    """An engine that runs a model, and the player of its inputs."""
    if module := clashing_module():
        raise DatasetError(
            f"physical models crash in a process that has loaded {module}: render them by "
            "python -m train.prepare"
        )
    try:
        import dawdreamer
    except ImportError as error:
        raise DatasetError(
            "physical models need dawdreamer: pip install -r requirements-fonts.txt"
        ) from error
    engine = dawdreamer.RenderEngine(_OVERSAMPLING * SAMPLE_RATE_HZ, 512)
    model = engine.make_faust_processor("model")
    model.set_dsp_string(_PROGRAM.format(code=code))
    if not model.compile():
        raise RuntimeError(f"Faust cannot compile {code}")
    curves = engine.make_playback_processor("curves", np.zeros((3, 1), np.float32))
    engine.load_graph([(curves, []), (model, ["curves"])])
    return engine, curves


def _run(code: str, curves: Samples) -> Samples:
    """Runs a model from rest; curves float32 [3, n] at 16 kHz -> float32 [n]."""
    engine, player = _compile(code)
    size = curves.shape[1]
    player.set_data(np.repeat(curves, _OVERSAMPLING, axis=1))
    engine.render((size + 1) / SAMPLE_RATE_HZ)
    made = soxr.resample(engine.get_audio()[0], _OVERSAMPLING, 1, quality="MQ")
    return np.asarray(made[:size], np.float32)


@functools.cache
def _tune(model: Model) -> Tuning:
    """Tries a model's pitches, corrects what is off, and leaves out what stays off or silent."""

    def play(pitch: int) -> Samples:
        if pitch not in model.pitches:
            return np.zeros(_TRY_SAMPLES, np.float32)
        semitones, level, colour = np.full((3, _TRY_SAMPLES), 0.5, np.float32)
        semitones[:] = pitch + offsets.get(pitch, 0.0)
        level[0] = 0
        hz = pitch_to_hz(0) * np.exp2(semitones / 12)
        return _run(model.code, np.stack([hz, level, colour]))

    offsets: dict[int, float] = {}
    for pitch in model.pitches:
        detuning = measure_detuning(play(pitch), pitch)
        if math.isfinite(detuning):
            offsets[pitch] = -detuning
    in_tune = find_pitches(play, pitched=True) & offsets.keys()
    levels = {pitch: float(np.sqrt(np.mean(play(pitch) ** 2))) for pitch in sorted(in_tune)}
    usual = float(np.median(list(levels.values()))) if levels else 1.0
    return Tuning(
        {pitch: offsets[pitch] for pitch in levels},
        {pitch: (usual / level) ** 0.7 for pitch, level in levels.items()},
    )
