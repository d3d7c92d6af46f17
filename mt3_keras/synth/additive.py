"""A synthesizer of random timbres, additive and FM, and of drums: a sound source without files.

A program's timbre starts from its General MIDI family and number, so that instruments can be told
apart, and varies from call to call around that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mt3_keras.notes import Note
from mt3_keras.synth.sounds import Samples, Stem

NUM_PROGRAMS = 112  # the 16 after them are percussion and effects without pitch
HIGHEST_HZ = 7600.0  # no harmonic lies above, so that 16 kHz holds them all
MAX_HARMONICS = 40
_TABLE_SAMPLES = 1024
_DRUM_PITCHES = range(35, 82)  # of the General MIDI drum map


class Family(NamedTuple):
    """Centre of the timbres of eight programs.

    Attributes:
      attack: seconds to rise.
      decay: seconds to fall to a third while held; infinite for bowed and blown ones.
      rolloff: harmonic h has amplitude h ** -rolloff.
      even: weight of the even harmonics.
      vibrato: semitones.
      noise: of breath or bow, against the tone's amplitude.
      fm: index of frequency modulation at the onset.
    """

    attack: float
    decay: float
    rolloff: float
    even: float
    vibrato: float
    noise: float
    fm: float


_FAMILIES = (
    Family(0.003, 1.0, 1.4, 1.0, 0.0, 0.0, 0.2),  # piano
    Family(0.001, 0.5, 2.5, 0.5, 0.0, 0.0, 0.8),  # chromatic percussion
    Family(0.010, math.inf, 1.0, 1.0, 0.02, 0.0, 0.0),  # organ
    Family(0.002, 0.6, 1.1, 1.0, 0.0, 0.0, 0.1),  # guitar
    Family(0.004, 0.7, 1.7, 1.0, 0.0, 0.0, 0.3),  # bass
    Family(0.050, math.inf, 1.0, 1.0, 0.15, 0.03, 0.0),  # strings
    Family(0.080, math.inf, 1.3, 1.0, 0.08, 0.02, 0.0),  # ensemble, voices
    Family(0.030, math.inf, 0.8, 1.0, 0.05, 0.01, 0.3),  # brass
    Family(0.025, math.inf, 1.0, 0.25, 0.06, 0.02, 0.0),  # reed
    Family(0.035, math.inf, 2.2, 0.8, 0.10, 0.08, 0.0),  # pipe
    Family(0.004, math.inf, 0.7, 1.0, 0.05, 0.0, 0.5),  # synth lead
    Family(0.150, math.inf, 1.6, 1.0, 0.05, 0.01, 0.1),  # synth pad
    Family(0.050, 1.5, 1.5, 0.7, 0.05, 0.03, 0.8),  # synth effects
    Family(0.002, 0.4, 1.0, 0.8, 0.03, 0.0, 0.2),  # plucked and blown of the world
)


class Timbre(NamedTuple):
    """What is drawn once for all notes of a stem.

    Attributes:
      harmonics: amplitudes, float64 [MAX_HARMONICS].
      phases: of the harmonics, float64 [MAX_HARMONICS].
      release: seconds from a note's end to silence.
      fm_ratio: of modulator to carrier, whole, so that tones stay harmonic.
      vibrato_hz: its rate.
    """

    family: Family
    harmonics: np.ndarray
    phases: np.ndarray
    release: float
    fm_ratio: int
    vibrato_hz: float


def draw_timbre(program: int, rng: np.random.Generator) -> Timbre:
    """A timbre of a program, 0 to 111."""
    own = np.random.default_rng(program)  # what sets the program apart from its family's others
    centre = _FAMILIES[program // 8]

    def vary(value: float) -> float:
        return value * math.exp(0.3 * own.standard_normal() + 0.25 * rng.standard_normal())

    family = Family(*(vary(value) for value in centre))
    family = family._replace(fm=min(family.fm, 1.0))  # above, the fundamental fades
    numbers = np.arange(1, MAX_HARMONICS + 1)
    spread = 0.6 * own.standard_normal(MAX_HARMONICS) + 0.4 * rng.standard_normal(MAX_HARMONICS)
    harmonics = numbers**-family.rolloff * np.where(numbers % 2, 1, family.even) * np.exp(spread)
    harmonics[0] = harmonics.max()  # or high notes would sound an octave higher
    return Timbre(
        family,
        harmonics,
        rng.uniform(0, 2 * math.pi, MAX_HARMONICS),
        release=vary(0.08),
        fm_ratio=int(own.integers(1, 4)),
        vibrato_hz=vary(5.5),
    )


@dataclasses.dataclass(frozen=True)
class AdditiveSource:
    """Plays programs 0 to 111 and the drums of General MIDI with synthetic timbres."""

    def play(
        self, notes: Sequence[Note], num_samples: int, rate_hz: int, rng: np.random.Generator
    ) -> Stem:
        """Renders notes to the sample; see `mt3_keras.synth.sounds.Source`."""
        program, is_drum = notes[0].program, notes[0].is_drum
        played = np.array([_can_play(note, rate_hz) for note in notes])
        samples = np.zeros(num_samples, np.float32)
        timbre = draw_timbre(program, rng) if not is_drum and program < NUM_PROGRAMS else None
        kit = int(rng.integers(2**32))
        sounds: dict[int, Samples] = {}  # by pitch: one tone serves all its notes
        longest = _longest_by_pitch(notes, 1.0 if timbre is None else timbre.release)
        for note, kept in zip(notes, played, strict=True):
            start = round(note.onset * rate_hz)
            if not kept or start >= num_samples:
                continue
            if note.pitch not in sounds:
                length = min(math.ceil(longest[note.pitch] * rate_hz), num_samples)
                sounds[note.pitch] = (
                    make_drum(note.pitch, rate_hz, np.random.default_rng((kit, note.pitch)))
                    if timbre is None
                    else make_tone(timbre, note.pitch, length, rate_hz, rng)
                )
            sound = sounds[note.pitch][: num_samples - start]
            if timbre is not None:
                sound = _shape(sound, note, timbre, rate_hz)
            samples[start : start + len(sound)] += sound * np.float32((note.velocity / 127) ** 1.5)
        return Stem(samples, played)


def _can_play(note: Note, rate_hz: int) -> bool:
    if note.is_drum:
        return note.pitch in _DRUM_PITCHES
    return note.program < NUM_PROGRAMS and pitch_to_hz(note.pitch) < 0.4 * rate_hz


def _longest_by_pitch(notes: Sequence[Note], release: float) -> dict[int, float]:
    longest: dict[int, float] = {}
    for note in notes:
        length = note.offset - note.onset + release
        longest[note.pitch] = max(length, longest.get(note.pitch, 0.0))
    return longest


def pitch_to_hz(pitch: float) -> float:
    """Frequency of a MIDI pitch in equal temperament, A4 = 440 Hz."""
    return 440.0 * 2.0 ** ((pitch - 69) / 12)


def make_tone(
    timbre: Timbre, pitch: int, length: int, rate_hz: int, rng: np.random.Generator
) -> Samples:
    """A held note without its rise and release: float32 [length], at most about 1.

    A table holds one period of the harmonics; vibrato and frequency modulation move through it.
    """
    family, hz = timbre.family, pitch_to_hz(pitch)
    num_harmonics = int(np.clip(HIGHEST_HZ / hz, 1, MAX_HARMONICS))
    spectrum = np.zeros(_TABLE_SAMPLES // 2 + 1, complex)
    phases = np.exp(1j * timbre.phases[:num_harmonics])
    spectrum[1 : num_harmonics + 1] = timbre.harmonics[:num_harmonics] * phases
    table = np.fft.irfft(spectrum).astype(np.float32)
    table /= np.abs(table).max()
    time = np.arange(length, dtype=np.float32) / rate_hz
    position = np.arange(length) * (hz / rate_hz)  # in periods
    if family.vibrato:
        depth = (2 ** (family.vibrato / 12) - 1) * hz / (2 * math.pi * timbre.vibrato_hz)
        late = np.minimum(time / 0.4, 1)
        position += depth * late * (1 - np.cos(2 * math.pi * timbre.vibrato_hz * time))
    if family.fm and hz * (timbre.fm_ratio + 1) < HIGHEST_HZ:
        index = family.fm / (2 * math.pi) * np.exp(-time / 0.3)
        position += index * np.sin(2 * math.pi * (timbre.fm_ratio * hz * time % 1))
    tone = table[(position * _TABLE_SAMPLES).astype(np.int64) % _TABLE_SAMPLES]
    if family.noise:
        tone += np.float32(family.noise) * rng.standard_normal(length, np.float32)
    if math.isfinite(family.decay):
        # Higher notes ring shorter: by half for each octave and a half.
        tone *= np.exp(-time / (family.decay * 2 ** ((60 - pitch) / 18)))
    return tone


def _shape(tone: Samples, note: Note, timbre: Timbre, rate_hz: int) -> Samples:
    """Gives a tone the rise and the release of a note."""
    num_held = max(1, round((note.offset - note.onset) * rate_hz))
    num_release = max(1, round(timbre.release * rate_hz))
    shaped = tone[: num_held + num_release].copy()
    num_rise = min(max(1, round(timbre.family.attack * rate_hz)), len(shaped))
    shaped[:num_rise] *= np.arange(1, num_rise + 1, dtype=np.float32) / num_rise
    release = shaped[num_held:]
    release *= 1 - np.arange(1, len(release) + 1, dtype=np.float32) / num_release
    return shaped


class Drum(NamedTuple):
    """A struck sound: a falling tone and a band of noise.

    Attributes:
      hz: of the tone, after it fell.
      tone_decay: seconds to a third.
      noise: share of noise in the sound.
      noise_hz: lower edge of the noise.
      noise_decay: seconds to a third.
    """

    hz: float
    tone_decay: float
    noise: float
    noise_hz: float
    noise_decay: float


def _drum_of(pitch: int) -> Drum:
    if pitch in (35, 36):
        return Drum(52.0, 0.12, 0.1, 800.0, 0.01)  # bass drum
    if pitch in (37, 38, 39, 40):
        return Drum(185.0, 0.06, 0.7, 900.0, 0.09 if pitch in (38, 40) else 0.03)  # snare
    if pitch in (41, 43, 45, 47, 48, 50):
        return Drum(80.0 * 2 ** ((pitch - 41) / 9), 0.18, 0.15, 500.0, 0.03)  # toms
    if pitch in (42, 44, 46):
        return Drum(5200.0, 0.01, 0.95, 5000.0, 0.25 if pitch == 46 else 0.035)  # hi-hat
    if pitch in (49, 51, 52, 53, 55, 57, 59):
        return Drum(3100.0 + 90 * (pitch - 49), 0.4, 0.8, 3500.0, 0.4)  # cymbals
    return Drum(pitch_to_hz(pitch + 10), 0.07, 0.3, 2500.0, 0.04)  # percussion


def make_drum(pitch: int, rate_hz: int, rng: np.random.Generator) -> Samples:
    """One drum of a random kit, float32 [one second], loudest at its start."""
    drum = Drum(*(value * math.exp(0.15 * rng.standard_normal()) for value in _drum_of(pitch)))
    share = min(drum.noise, 1.0)
    time = np.arange(rate_hz, dtype=np.float32) / rate_hz
    fall = 0.03 * (1 - np.exp(-time / 0.03))  # the tone starts an octave higher
    tone = np.cos(2 * math.pi * drum.hz * (time + fall)) * np.exp(-time / drum.tone_decay)
    spectrum = np.fft.rfft(rng.standard_normal(rate_hz, np.float32))
    lowest_hz = min(drum.noise_hz, 0.4 * rate_hz)  # some noise is left in any random kit
    spectrum[: round(lowest_hz)] = 0  # a second holds one bin a hertz
    noise = np.fft.irfft(spectrum, rate_hz)
    noise *= np.exp(-time / drum.noise_decay) / np.abs(noise).max()
    return np.asarray((1 - share) * tone + share * noise, np.float32)
