"""Rooms, halls, equalisation, compression, noise and a lossy codec for rendered music.

Nothing here moves a note: a room's direct sound arrives at once, and filters add no delay.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Sequence

import numpy as np
import pedalboard
import scipy.fft
import soundfile
from numpy.typing import NDArray

from mt3_keras.models.config import SAMPLE_RATE_HZ

Samples = NDArray[np.float32]
NUM_ROOMS = 64  # computed when first drawn, then kept: about 0.1 MB and 20 ms each
PLACES_PER_ROOM = 3
_MOST_DELAY = 2400  # samples, of MP3 coding
_FILTERS = (pedalboard.LowShelfFilter, pedalboard.PeakFilter, pedalboard.HighShelfFilter)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How often, and how strongly, a rendered piece is changed.

    Attributes:
      room_chance: that instruments stand in a room rather than nowhere.
      hall_chance: that the mix sounds on in a hall or church, for .75 to 2.4 s.
      equalizer_chance: of a random equaliser, for each instrument and for the mix.
      equalizer_db: most gain or loss of each of its bands.
      compression_chance: of a compressor on the mix.
      noise_chance: of white to brown noise.
      least_snr_db: loudest noise; from there it is drawn up to 40 dB fainter.
      codec_chance: of MP3 coding at low to middling quality.
      poor_chance: of poor sound: MP3 of some 24 kbit/s, a telephone's band, or a master driven
        into clipping; each as likely.
      lowest_peak_db: of the mix, which peaks anywhere between there and -0.5 dB of full scale.
    """

    room_chance: float = 0.7
    hall_chance: float = 0.0
    equalizer_chance: float = 0.4
    equalizer_db: float = 8.0
    compression_chance: float = 0.3
    noise_chance: float = 0.5
    least_snr_db: float = 20.0
    codec_chance: float = 0.1
    poor_chance: float = 0.0
    lowest_peak_db: float = -12.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_chance") and not 0 <= value <= 1:
                raise ValueError(f"{field.name} must be 0 to 1: got {value}")
        if not 0 <= self.equalizer_db <= 40:
            raise ValueError(f"equalizer_db must be 0 to 40: got {self.equalizer_db}")
        if not -60 <= self.lowest_peak_db <= -0.5:
            raise ValueError(f"lowest_peak_db must be -60 to -0.5: got {self.lowest_peak_db}")


DEFAULT_AUGMENTATION = Augmentation()
NO_AUGMENTATION = Augmentation(
    room_chance=0, equalizer_chance=0, compression_chance=0, noise_chance=0, codec_chance=0
)


def mix_stems(
    stems: Sequence[Samples], settings: Augmentation, rng: np.random.Generator
) -> Samples:
    """Sums stems, in a room or without one, and changes the sum.

    Args:
      stems: float32 [num_samples] each, at 16 kHz, at their levels in the mix.
      settings: how likely each change is, and how strong.
      rng: draws the changes.

    Returns:
      float32 [num_samples], silent or with a peak from `lowest_peak_db` to -0.5 dB.
    """
    equalized = [_sometimes_equalize(stem, settings, rng) for stem in stems]
    if rng.random() < settings.room_chance:
        mix = _place_in_room(equalized, rng)
    else:
        mix = np.sum(equalized, axis=0, dtype=np.float32)
    # A number is drawn only where there may be halls: without them music is what it was before.
    if settings.hall_chance and rng.random() < settings.hall_chance:
        mix = _place_in_hall(mix, rng)
    mix = _sometimes_equalize(mix, settings, rng)
    peak = float(np.abs(mix).max())
    if peak == 0:
        return mix
    mix /= peak  # thresholds below are relative to full scale
    if rng.random() < settings.compression_chance:
        mix = _compress(mix, rng)
    if rng.random() < settings.noise_chance:
        mix = _add_noise(mix, settings.least_snr_db + rng.uniform(0, 40), rng)
    if rng.random() < settings.codec_chance:
        codec = pedalboard.MP3Compressor(vbr_quality=float(rng.uniform(3, 9)))
        mix = codec(mix / max(1.0, float(np.abs(mix).max())), SAMPLE_RATE_HZ)
    if rng.random() < settings.poor_chance:
        mix = _POOR[rng.integers(len(_POOR))](mix / np.abs(mix).max(), rng)
    peak = 10 ** (rng.uniform(settings.lowest_peak_db, -0.5) / 20)
    return np.asarray(mix * (peak / np.abs(mix).max()), np.float32)


def _sometimes_equalize(
    samples: Samples, settings: Augmentation, rng: np.random.Generator
) -> Samples:
    if rng.random() >= settings.equalizer_chance:
        return samples
    edges_hz = ((60, 400), (300, 4000), (2000, 6000))
    bands: list[pedalboard.Plugin] = [
        band(
            cutoff_frequency_hz=float(math.exp(rng.uniform(*np.log(edges)))),
            gain_db=float(rng.uniform(-settings.equalizer_db, settings.equalizer_db)),
            q=float(rng.uniform(0.5, 1.5)),
        )
        for band, edges in zip(_FILTERS, edges_hz, strict=True)
    ]
    return pedalboard.Chain(bands)(samples, SAMPLE_RATE_HZ)


def _place_in_room(stems: Sequence[Samples], rng: np.random.Generator) -> Samples:
    responses = room_responses(int(rng.integers(NUM_ROOMS)))
    wet = 10 ** (rng.uniform(-12, 0) / 20)
    places = rng.integers(len(responses), size=len(stems))
    longest = max(len(response) for response in responses)
    size = scipy.fft.next_fast_len(len(stems[0]) + longest, real=True)
    mix: Samples = np.sum(stems, axis=0, dtype=np.float32)
    reflected = np.zeros(size // 2 + 1, np.complex64)
    for place, response in enumerate(responses):
        here = [stem for stem, chosen in zip(stems, places, strict=True) if chosen == place]
        if here:
            dry = np.sum(here, axis=0, dtype=np.float32)
            reflected += scipy.fft.rfft(dry, size) * scipy.fft.rfft(response, size)
    return mix + np.float32(wet) * scipy.fft.irfft(reflected, size)[: len(mix)]


def _place_in_hall(mix: Samples, rng: np.random.Generator) -> Samples:
    """Adds what a hall sends back, from 14 dB below what arrives directly to as much."""
    hall = pedalboard.Reverb(
        room_size=float(rng.uniform(0.3, 0.8)),
        damping=float(rng.uniform(0.1, 0.9)),
        wet_level=1.0,
        dry_level=0.0,
    )
    return mix + np.float32(10 ** (rng.uniform(-8, 6) / 20)) * hall(mix, SAMPLE_RATE_HZ)


@functools.cache
def room_responses(room: int) -> tuple[Samples, ...]:
    """What a room adds to the direct sound from each of three places.

    The room, its walls, the microphone and the places follow from the number alone. Reflections
    are those of the image source method up to order 17, which ends the longest tails early.

    Args:
      room: 0 to 63.

    Returns:
      float32 [n] each, at 16 kHz; time 0 is when the direct sound, of amplitude 1, arrives.
    """
    import pyroomacoustics  # takes a second, which no --help should

    rng = np.random.default_rng(room)
    size = rng.uniform((3.0, 3.0, 2.4), (12.0, 15.0, 5.0))
    absorption, _ = pyroomacoustics.inverse_sabine(
        max(rng.uniform(0.15, 0.9), _shortest_decay(size)), size
    )
    shoebox = pyroomacoustics.ShoeBox(
        size,
        fs=SAMPLE_RATE_HZ,
        materials=pyroomacoustics.Material(absorption),
        max_order=17,
        use_rand_ism=False,
    )
    shoebox.add_microphone(rng.uniform(0.5, size - 0.5))
    for _ in range(PLACES_PER_ROOM):
        shoebox.add_source(rng.uniform(0.5, size - 0.5))
    shoebox.compute_rir()
    return tuple(
        _without_direct_sound(response, source.position, shoebox.mic_array.center)
        for response, source in zip(shoebox.rir[0], shoebox.sources, strict=True)
    )


def _shortest_decay(size: NDArray[np.float64]) -> float:
    """Seconds that Sabine's formula gives for nearly black walls; it allows nothing shorter."""
    x, y, z = size
    return 0.17 * (x * y * z) / (0.95 * 2 * (x * y + y * z + x * z))


def _without_direct_sound(
    response: NDArray[np.float64], source: NDArray[np.float64], microphone: NDArray[np.float64]
) -> Samples:
    import pyroomacoustics

    distance = float(np.linalg.norm(source - microphone[:, 0]))
    lobe = pyroomacoustics.constants.get("frac_delay_length") // 2
    arrival = lobe + round(distance / pyroomacoustics.constants.get("c") * SAMPLE_RATE_HZ)
    tail = response[arrival:] * distance
    tail[:3] = 0  # the direct sound itself, which is added unchanged
    return np.asarray(tail, np.float32)


def _compress(samples: Samples, rng: np.random.Generator) -> Samples:
    compressor = pedalboard.Compressor(
        threshold_db=float(rng.uniform(-30, -10)),
        ratio=float(rng.uniform(1.5, 6)),
        attack_ms=float(rng.uniform(1, 20)),
        release_ms=float(rng.uniform(50, 300)),
    )
    return compressor(samples, SAMPLE_RATE_HZ)


def _add_noise(samples: Samples, snr_db: float, rng: np.random.Generator) -> Samples:
    import scipy.signal

    noise: Samples = rng.standard_normal(len(samples), np.float32)
    pole = np.float32(rng.uniform(0, 0.98))  # from white to nearly brown
    noise = scipy.signal.lfilter(np.ones(1, np.float32), np.array([1, -pole], np.float32), noise)
    level = np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** (-snr_db / 20)
    return samples + np.float32(level) * noise


def _code_hard(samples: Samples, rng: np.random.Generator) -> Samples:
    """MP3 of 33 to 16 kbit/s, moved back by what coding delays it."""
    file = io.BytesIO()
    soundfile.write(
        file,
        samples,
        SAMPLE_RATE_HZ,
        format="MP3",
        bitrate_mode="CONSTANT",
        compression_level=float(rng.uniform(0.85, 0.95)),
    )
    file.seek(0)
    decoded, _ = soundfile.read(file, dtype="float32")
    size = scipy.fft.next_fast_len(len(samples) + len(decoded), real=True)
    spectra = scipy.fft.rfft(decoded, size) * scipy.fft.rfft(samples, size).conj()
    delay = int(np.argmax(scipy.fft.irfft(spectra, size)[:_MOST_DELAY]))
    coded: Samples = decoded[delay : delay + len(samples)]
    return np.pad(coded, (0, len(samples) - len(coded)))


def _telephone(samples: Samples, rng: np.random.Generator) -> Samples:
    import scipy.signal

    edges_hz = float(rng.uniform(200, 500)), float(rng.uniform(2600, 3800))
    band = scipy.signal.butter(4, edges_hz, "bandpass", fs=SAMPLE_RATE_HZ, output="sos")
    return np.asarray(scipy.signal.sosfilt(band, samples), np.float32)


def _drive(samples: Samples, rng: np.random.Generator) -> Samples:
    """Louder than full scale by 6 to 18 dB, and bent or cut off there."""
    louder = samples * np.float32(10 ** (rng.uniform(6, 18) / 20))
    return np.tanh(louder) if rng.random() < 0.5 else np.clip(louder, -1, 1)


_POOR = (_code_hard, _telephone, _drive)
