"""Sound sources: the notes of one instrument -> samples.

A source is one small frozen, picklable class with `play`; see `Source`. Here are a soundfont (sf2
or sf3, played by TinySoundFont) and the check of pitches that any sampled source should pass;
`additive` has a synthesizer that needs no file.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from mt3_keras.data.example import DatasetError
from mt3_keras.notes import Note

Samples = NDArray[np.float32]
PITCHES = range(21, 109)  # of the piano: what instruments are tried on
MAX_DETUNING = 1 / 3  # semitones that a note may be off before it counts as another pitch
_TEST_RATE_HZ, _TEST_SAMPLES = 16_000, 8192


class Stem(NamedTuple):
    """What a source made of some notes.

    Attributes:
      samples: float32 [num_samples], at any level.
      played: bool [number of notes]; notes that the source cannot sound are left out of `samples`.
    """

    samples: Samples
    played: NDArray[np.bool_]


class Source(Protocol):
    """Plays one instrument.

    `play` gets notes that share program and drum flag, in order of onset and none overlapping one
    of its own pitch, times in seconds; each begins at sample round(onset * rate_hz). It draws
    whatever it varies from `rng`, and returns the same for the same arguments in any process.
    """

    def play(
        self, notes: Sequence[Note], num_samples: int, rate_hz: int, rng: np.random.Generator
    ) -> Stem:
        """Notes -> their sound and which of them it plays."""
        ...


@dataclasses.dataclass(frozen=True)
class SoundFontSource:
    """A General MIDI soundfont; drums are played with a random one of its drum kits.

    Each preset is tried once a process, pitch by pitch: those that stay silent, or are more than
    a third of a semitone off, are not played.

    Attributes:
      path: an sf2 or sf3 file.
    """

    path: str

    def play(
        self, notes: Sequence[Note], num_samples: int, rate_hz: int, rng: np.random.Generator
    ) -> Stem:
        """Renders notes to the sample; see `Source`.

        Raises:
          DatasetError: tinysoundfont is not installed, or the file is missing or damaged.
        """
        bank, presets = _presets(self.path, notes[0].program, notes[0].is_drum)
        preset = int(rng.choice(presets)) if presets else -1
        pitches = _font_pitches(self.path, bank, preset) if presets else frozenset()
        played = np.array([note.pitch in pitches for note in notes])
        if not played.any():
            return Stem(np.zeros(num_samples, np.float32), played)
        wanted = [note for note, kept in zip(notes, played, strict=True) if kept]
        return Stem(_play_font(self.path, bank, preset, wanted, num_samples, rate_hz), played)


DRUM_BANK = 128
# Later kits are an orchestra's, with timpani in place of drums, and sound effects.
_FIRST_UNUSUAL_KIT = 48
# The player moves its envelopes on once a call or 64 samples, and starts them at zero: two short
# calls after each onset let a note sound from its ninth sample on, not its 65th.
_ATTACK_STEPS = (8, 16)


@functools.cache
def _load_font(path: str) -> Any:
    try:
        import tinysoundfont._tinysoundfont as player
    except ImportError as error:
        raise DatasetError(
            "soundfonts need tinysoundfont, for Python 3.11 or 3.12: "
            "pip install --no-deps -r requirements-fonts.txt"
        ) from error
    try:
        return player.SoundFont(path)
    except (OSError, RuntimeError) as error:
        raise DatasetError(f"{path}: missing or no readable sf2 or sf3 soundfont") from error


@functools.cache
def _presets(path: str, program: int, is_drum: bool) -> tuple[int, tuple[int, ...]]:
    bank = DRUM_BANK if is_drum else 0
    numbers = range(_FIRST_UNUSUAL_KIT) if is_drum else (program,)
    font = _load_font(path)
    return bank, tuple(n for n in numbers if font.get_preset_index(bank, n) >= 0)


def open_font(path: str, rate_hz: int) -> Any:
    """A player of a soundfont in mono, for `play_font`.

    Raises:
      DatasetError: tinysoundfont is not installed, or the file is missing or damaged.
    """
    shared = _load_font(path)
    import tinysoundfont._tinysoundfont as player

    font = player.SoundFont(shared)  # shares the samples
    font.set_output(player.OutputMode.Mono, rate_hz, 0.0)
    return font


def _play_font(
    path: str, bank: int, preset: int, notes: Sequence[Note], num_samples: int, rate_hz: int
) -> Samples:
    font, parts = open_font(path, rate_hz), [(bank, preset)] * len(notes)
    (samples,) = play_font(font, notes, num_samples, rate_hz, num_samples, parts)
    return samples


def play_font(
    font: Any,
    notes: Sequence[Note],
    num_samples: int,
    rate_hz: int,
    block_samples: int,
    presets: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Samples]:
    """Plays notes, each from sample round(onset * rate_hz) on.

    Args:
      font: of `open_font`, at the same rate; it plays one piece.
      notes: times in seconds, in any order.
      num_samples: in all.
      rate_hz: of the samples.
      block_samples: in a block.
      presets: bank and number for each note; None takes those of General MIDI.

    Yields:
      float32 [n], mono; the last block may be shorter.
    """
    events: list[tuple[int, int, int, int, int, float]] = []  # sample, order, preset, key, velocity
    kinds = presets or [(DRUM_BANK, 0) if n.is_drum else (0, n.program) for n in notes]
    for note, kind in zip(notes, kinds, strict=True):
        onset = round(note.onset * rate_hz)
        events += [(onset + step, 2, 0, 0, 0, 0.0) for step in _ATTACK_STEPS]
        events.append((onset, 1, *kind, note.pitch, note.velocity / 127))
        events.append((max(round(note.offset * rate_hz), onset + 1), 0, *kind, note.pitch, 0.0))
    waiting = collections.deque(sorted(events))
    for start in range(0, num_samples, block_samples):
        samples = np.zeros(min(block_samples, num_samples - start), np.float32)
        buffer, now, end = memoryview(samples.data).cast("B"), start, start + samples.size
        while waiting and waiting[0][0] < end:
            sample, order, bank, preset, pitch, velocity = waiting.popleft()
            if sample > now:
                font.render(buffer[4 * (now - start) : 4 * (sample - start)])
                now = sample
            if order == 0:
                font.note_off(bank, preset, pitch)
            elif order == 1:
                font.note_on(bank, preset, pitch, velocity)
        font.render(buffer[4 * (now - start) :])
        yield samples


@functools.cache
def _font_pitches(path: str, bank: int, preset: int) -> frozenset[int]:
    def play(pitch: int) -> Samples:
        note = Note(0.0, 1.0, pitch, 100)
        return _play_font(path, bank, preset, [note], _TEST_SAMPLES, _TEST_RATE_HZ)

    return find_pitches(play, pitched=bank != DRUM_BANK)


def find_pitches(play: Callable[[int], Samples], *, pitched: bool) -> frozenset[int]:
    """Tries which of the piano's pitches an instrument sounds, and sounds in tune.

    Args:
      play: pitch -> float32 [8192], the note from its onset on, at 16 kHz.
      pitched: False for drums, whose pitch is not looked at.

    Returns:
      Pitches within 40 dB of the loudest and not more than a third of a semitone off.
    """
    tones = {pitch: play(pitch) for pitch in PITCHES}
    levels = {pitch: float(np.sqrt(np.mean(tone**2))) for pitch, tone in tones.items()}
    quietest = max(1e-5, 0.01 * max(levels.values()))
    return frozenset(
        pitch
        for pitch, tone in tones.items()
        if levels[pitch] >= quietest
        and not (pitched and abs(measure_detuning(tone, pitch)) > MAX_DETUNING)
    )


def measure_detuning(tone: Samples, pitch: int) -> float:
    """How far a tone lies from a MIDI pitch, by autocorrelation.

    Args:
      tone: float32 [n] at 16 kHz, some tenths of a second.
      pitch: MIDI number.

    Returns:
      Semitones, positive if the tone is higher; infinite if it does not repeat with the period of
      a pitch within a semitone, or repeats as well after half or a third of that period.
    """
    finer = 2  # samples of the autocorrelation for each of the tone
    size = 2 * len(tone)
    power = np.abs(np.fft.rfft(tone - tone.mean(), size)) ** 2
    correlation = np.fft.irfft(power, finer * size)[: finer * size // 2]
    correlation /= np.maximum(1 - np.arange(len(correlation)) / len(correlation), 0.1)
    period = finer * _TEST_RATE_HZ / (440 * 2 ** ((pitch - 69) / 12))
    num_periods = int(np.clip(finer * 200 / period, 1, 4))  # for precision at high pitches
    lag = num_periods * period
    first, last = (round(lag * 2 ** (side / 12)) for side in (-1, 1))
    best = first + int(np.argmax(correlation[first : last + 1]))
    clarity = correlation[best] / max(correlation[0], 1e-20)
    if best in (first, last) or clarity < 0.3:
        return math.inf
    before, peak, after = correlation[best - 1 : best + 2]
    true_lag = best + 0.5 * (before - after) / min(before - 2 * peak + after, -1e-20)  # parabola
    true_period = true_lag / num_periods
    for part in (2, 3):
        lag_index = round(true_period / part)
        if lag_index > finer and correlation[lag_index] > 0.97 * correlation[best]:
            return math.inf
    return 12 * math.log2(lag / true_lag)


def read_recording(path: str, rate_hz: int, what: str, seconds: float | None = None) -> Samples:
    """A recording of one sound: float32 [n] at `rate_hz`, mono, at most so long.

    Args:
      path: of the file.
      rate_hz: of the result.
      what: it is of, for the message.
      seconds: to read at most; None reads all.

    Raises:
      DatasetError: it is missing or damaged.
    """
    try:
        with soundfile.SoundFile(path) as file:
            longest = -1 if seconds is None else round(seconds * file.samplerate)
            audio = file.read(longest, dtype="float32", always_2d=True)
            mono = soxr.resample(audio.mean(axis=1), file.samplerate, rate_hz)
    except (OSError, soundfile.LibsndfileError) as error:
        raise DatasetError(f"{path}: missing or no readable recording of {what}") from error
    return np.asarray(mono, np.float32)


class Names:
    """What the names of sounds stand for.

    The first regular expression that finds something in a name, whatever its case, decides.
    """

    def __init__(self, meanings: Iterable[tuple[str, Iterable[int]]]) -> None:
        self._meanings = [(re.compile(name), tuple(numbers)) for name, numbers in meanings]

    def __call__(self, name: str) -> tuple[int, ...]:
        """Empty for a name that says nothing."""
        lower = name.strip().lower()
        return next((numbers for name, numbers in self._meanings if name.search(lower)), ())
