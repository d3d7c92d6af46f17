"""Sung syllables: speech by espeak-ng, taken apart once, sung at any pitch.

`make_bank` has espeak-ng speak syllables in several voices and WORLD (pyworld) take them apart into
pitch, envelope and breath. A note is such a syllable's envelope, its vowel stretched to the note's
length, filtering pulses at the note's pitch with glides and vibrato. A syllable's voiced part
begins at its note; a consonant before that is shortened to `_LEAD` and sounds ahead of it.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.fft
import soundfile
import soxr
from numpy.typing import NDArray

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
from mt3_keras.synth.sounds import Samples, Stem, find_pitches

PROGRAMS = (52, 53, 54, 85)  # choir aahs, voice oohs, synth voice, lead 6 (voice)
_PITCHES = range(38, 85)
_FEMALE = ("it+f1", "it+f2", "it+f3", "it+f4", "en+Annie", "en+linda", "fr+steph", "es+anika")
_MALE = ("it+m1", "it+m3", "it+m4", "it+m7", "en+Andy", "en+john", "fr+antonio", "es+max")
VOICES = (*_FEMALE, *_MALE)
_SYLLABLES = "a e i o u la le li lo lu ma me mi mo mu na no da ra sa se to va ja"
SYLLABLES = tuple(_SYLLABLES.split())
_FRAME_SAMPLES = 160
_NUM_BINS = 257  # of the envelopes kept; filters are twice as long
_LEAD = 0.04  # seconds
_CONSONANT_FRAMES = 8  # played at their own pace, before what is stretched


def make_bank(path: str | os.PathLike[str]) -> None:
    """Writes the syllables of all voices, some 40 s of speech, as an npz file.

    Raises:
      DatasetError: espeak-ng or pyworld is not installed.
    """
    parts = [_analyse(voice, syllable) for voice in VOICES for syllable in SYLLABLES]
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".npz", delete=False) as file:
        np.savez_compressed(
            file,
            log_power=np.concatenate([part.log_power for part in parts]),
            breath=np.concatenate([part.breath for part in parts]),
            num_frames=np.array([len(part.breath) for part in parts], np.int32),
            first_voiced=np.array([part.first_voiced for part in parts], np.int32),
        )
    pathlib.Path(file.name).replace(target)


class _Syllable(NamedTuple):
    """Frames of 10 ms.

    Attributes:
      log_power: natural logarithm, float16 [num_frames, 257].
      breath: share of noise in the amplitude, float16 [num_frames, 257].
      first_voiced: frame.
    """

    log_power: NDArray[np.float16]
    breath: NDArray[np.float16]
    first_voiced: int


def _analyse(voice: str, syllable: str) -> _Syllable:
    try:
        import pyworld
    except ImportError as error:
        raise DatasetError(
            "sung syllables need pyworld: pip install -r requirements-fonts.txt"
        ) from error
    try:
        said = subprocess.run(
            ["espeak-ng", "-v", voice, "-s", "90", "--stdout", syllable],
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise DatasetError("sung syllables need the program espeak-ng: install it") from error
    audio, rate_hz = soundfile.read(io.BytesIO(said.stdout))
    speech = soxr.resample(audio, rate_hz, SAMPLE_RATE_HZ)
    coarse_hz, times = pyworld.dio(
        speech, SAMPLE_RATE_HZ, frame_period=1000 * _FRAME_SAMPLES / SAMPLE_RATE_HZ
    )
    hz = pyworld.stonemask(speech, coarse_hz, times, SAMPLE_RATE_HZ)
    power = pyworld.cheaptrick(speech, hz, times, SAMPLE_RATE_HZ)[:, ::2]
    breath = pyworld.d4c(speech, hz, times, SAMPLE_RATE_HZ)[:, ::2]
    loudness = power.sum(axis=1)
    loud = np.flatnonzero(loudness > 0.003 * loudness.max())
    voiced = np.flatnonzero((hz > 0) & (loudness > 0.03 * loudness.max()))
    first, last = min(loud[0], voiced[0]), voiced[-1] + 1
    scaled = np.log(np.maximum(power[first:last] / loudness.max(), 1e-12))
    return _Syllable(
        scaled.astype(np.float16), breath[first:last].astype(np.float16), int(voiced[0] - first)
    )


@dataclasses.dataclass(frozen=True)
class VoiceSource:
    """Sings programs 52 to 54 and 85, by one voice or some.

    Attributes:
      bank: a file that `make_bank` wrote.
    """

    bank: str

    def play(
        self, notes: Sequence[Note], num_samples: int, rate_hz: int, rng: np.random.Generator
    ) -> Stem:
        """Renders notes to the sample; see `mt3_keras.synth.sounds.Source`.

        Raises:
          DatasetError: the bank is missing or damaged.
        """
        program, is_drum = notes[0].program, notes[0].is_drum
        samples = np.zeros(num_samples, np.float32)
        if is_drum or program not in PROGRAMS:
            return Stem(samples, np.zeros(len(notes), np.bool_))
        voices, played = self._draw_voices(notes, rng)
        wanted = [note for note, kept in zip(notes, played, strict=True) if kept]
        for number, voice in enumerate(voices):
            singer = _Singer(
                voice,
                warp=float(np.exp(0.06 * rng.standard_normal())),
                late=rng.uniform(0, 0.02) if number else 0.0,
                semitones=rng.normal(0, 0.06) if len(voices) > 1 else 0.0,
                manner=draw_manner((0.003, 0.04), (0.03, 0.12), 0.6, rng),
            )
            for line in split_lines(wanted, LEGATO_GAP / 2):
                _add_line(samples, line, self.bank, singer, rate_hz, rng)
        return Stem(samples, played)

    def _draw_voices(
        self, notes: Sequence[Note], rng: np.random.Generator
    ) -> tuple[list[int], NDArray[np.bool_]]:
        """Voices that suit the notes, one or several, and the notes that all of them can sing."""
        is_high = float(np.median([note.pitch for note in notes])) + 4 * rng.standard_normal() > 57
        first = 0 if is_high else len(_FEMALE)
        number = int(rng.integers(2, 4)) if notes[0].program == PROGRAMS[0] else 1
        voices = [first + int(v) for v in rng.choice(len(_FEMALE), number, replace=False)]
        pitches = frozenset.intersection(*(_voice_pitches(self.bank, v) for v in voices))
        return voices, np.array([note.pitch in pitches for note in notes])


class _Singer(NamedTuple):
    """What is drawn once for a stem.

    Attributes:
      voice: row of VOICES.
      warp: of the formants' frequencies.
      late: seconds behind the note.
      semitones: out of tune.
    """

    voice: int
    warp: float
    late: float
    semitones: float
    manner: Manner


def _add_line(
    samples: Samples,
    line: Sequence[Note],
    bank: str,
    singer: _Singer,
    rate_hz: int,
    rng: np.random.Generator,
) -> None:
    chosen = 0
    for i, note in enumerate(line):
        joined = is_joined(line, i)
        slurred = joined and rng.random() < 0.3  # goes on with the vowel
        if not slurred:
            chosen = singer.voice * len(SYLLABLES) + int(rng.integers(len(SYLLABLES)))
        interval = line[i - 1].pitch - note.pitch if joined else 0
        sound, lead = _sing(bank, chosen, note, interval, slurred, singer, rate_hz, rng)
        start = round((note.onset + singer.late) * rate_hz) - lead
        sound = sound[max(0, -start) : max(0, len(samples) - start)]
        start = max(0, start)
        samples[start : start + len(sound)] += sound


def _sing(
    bank: str,
    chosen: int,
    note: Note,
    interval: float,
    slurred: bool,
    singer: _Singer,
    rate_hz: int,
    rng: np.random.Generator,
) -> tuple[Samples, int]:
    """A note, and how many samples of it sound before its onset."""
    syllable, manner = _read_bank(bank)[chosen], singer.manner
    length = note.offset - note.onset
    lead = 0 if slurred else min(syllable.first_voiced, round(_LEAD * 100)) * _FRAME_SAMPLES
    size = lead + round((length + 4 * manner.release) * rate_hz)
    time = (np.arange(size, dtype=np.float32) - lead) / np.float32(rate_hz)
    held = np.maximum(time, 0)
    semitones = note.pitch + singer.semitones + bend(held, interval, manner, rng)
    hz = np.asarray(pitch_to_hz(0) * np.exp2(semitones / 12), np.float32)
    voiced, noise = _excite(hz, lead, rate_hz, rng)
    frames = _choose_frames(syllable, time[::_FRAME_SAMPLES], length, slurred)
    sound = _filter(voiced, noise, syllable, frames, singer.warp)
    rise = 1 - np.exp(-held / np.float32(manner.attack))
    shape = swell(held, length, manner) * fade(time, length, manner)
    shape[lead:] *= np.float32(0.1) + np.float32(0.9) * rise[lead:]
    return sound * shape * np.float32((note.velocity / 127) ** 1.2), lead


def _choose_frames(
    syllable: _Syllable, times: Samples, length: float, slurred: bool
) -> NDArray[np.int64]:
    """The syllable's frame for each of some times from the note's onset."""
    first, last = syllable.first_voiced, len(syllable.breath) - 1
    vowel = min(first + _CONSONANT_FRAMES, last)
    if slurred:
        first = vowel
    begin = min((vowel - first) / 100, 0.5 * length)
    return np.rint(
        np.interp(
            times,
            [-first / 100 - 1e-6, 0, begin + 1e-6, max(length, begin + 2e-6)],
            [0, first, vowel, last],
        )
    ).astype(np.int64)


def _excite(
    hz: Samples, lead: int, rate_hz: int, rng: np.random.Generator
) -> tuple[Samples, Samples]:
    """Pulses of unit power from sample `lead` on, and white noise."""
    turns = np.cumsum(hz[lead:] / rate_hz, dtype=np.float64) - hz[lead] / rate_hz
    strikes = np.searchsorted(turns, np.arange(int(turns[-1]) + 1))
    exact = np.interp(np.arange(len(strikes)), turns, np.arange(len(turns)))
    whole = np.minimum(exact.astype(np.int64), len(turns) - 2)
    part = (exact - whole).astype(np.float32)
    height = np.sqrt(rate_hz / hz[lead + whole])
    pulses = np.zeros(len(hz), np.float32)
    pulses[lead + whole] += (1 - part) * height
    pulses[lead + whole + 1] += part * height
    return pulses, rng.standard_normal(len(hz), np.float32)


def _filter(
    voiced: Samples,
    noise: Samples,
    syllable: _Syllable,
    frames: NDArray[np.int64],
    warp: float,
) -> Samples:
    """Filters pulses and noise by the envelopes of frames, overlapping by half."""
    used, rows = np.unique(frames, return_inverse=True)
    bins = np.minimum(np.arange(_NUM_BINS) / warp, _NUM_BINS - 1).astype(np.int64)
    log_power = syllable.log_power[used][:, bins].astype(np.float32)
    breath = syllable.breath[used][:, bins].astype(np.float32)
    response = _minimum_phase(log_power)
    tone_response = (response * np.sqrt(np.maximum(1 - breath**2, 0)))[rows]
    noise_response = (response * breath)[rows]
    size, hop = 2 * _FRAME_SAMPLES, _FRAME_SAMPLES
    window = np.hanning(size + 1)[:-1].astype(np.float32)
    num_frames, fft_size = len(frames), 2 * (_NUM_BINS - 1)

    def frame(signal: Samples) -> NDArray[np.complex64]:
        padded = np.pad(signal, (hop, size + hop * num_frames - len(signal)))
        views = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop][:num_frames]
        spectrum: NDArray[np.complex64] = scipy.fft.rfft(views * window, fft_size)
        return spectrum

    pieces = scipy.fft.irfft(frame(voiced) * tone_response + frame(noise) * noise_response)
    out = np.zeros(hop * num_frames + fft_size + hop, np.float32)
    for part in range(0, fft_size, hop):  # overlap-add, a hop's width at a time
        piece = pieces[:, part : part + hop]
        target = out[part : part + hop * num_frames].reshape(num_frames, hop)
        target[:, : piece.shape[1]] += piece
    return out[hop : hop + len(voiced)]


def _minimum_phase(log_power: Samples) -> NDArray[np.complex64]:
    """Frequency response that answers at once: float32 [n, bins] -> complex64 [n, bins]."""
    cepstrum = scipy.fft.irfft(0.5 * log_power)
    half = cepstrum.shape[1] // 2
    cepstrum[:, 1:half] *= 2
    cepstrum[:, half + 1 :] = 0
    response: NDArray[np.complex64] = np.exp(scipy.fft.rfft(cepstrum))
    return response


@functools.lru_cache(maxsize=2)
def _read_bank(path: str) -> list[_Syllable]:
    try:
        with np.load(path, allow_pickle=False) as bank:
            ends = np.cumsum(bank["num_frames"])
            power, breath = (np.split(bank[name], ends[:-1]) for name in ("log_power", "breath"))
            firsts = bank["first_voiced"].tolist()
    except (OSError, KeyError, ValueError) as error:
        raise DatasetError(f"{path}: missing or no bank of syllables; make it anew") from error
    if len(firsts) != len(VOICES) * len(SYLLABLES):
        raise DatasetError(f"{path}: a bank of another version; make it anew")
    return [_Syllable(*parts) for parts in zip(power, breath, firsts, strict=True)]


@functools.cache
def _voice_pitches(bank: str, voice: int) -> frozenset[int]:
    manner = Manner(attack=0.003, release=0.1, vibrato=0, vibrato_hz=0, glide=0, swell=0)
    singer = _Singer(voice, 1.0, 0.0, 0.0, manner)
    vowel = voice * len(SYLLABLES)

    def play(pitch: int) -> Samples:
        if pitch not in _PITCHES:
            return np.zeros(8192, np.float32)
        note, rng = Note(0.0, 1.0, pitch, 100), np.random.default_rng(pitch)
        return _sing(bank, vowel, note, 0, False, singer, SAMPLE_RATE_HZ, rng)[0][:8192]

    return find_pitches(play, pitched=True)
