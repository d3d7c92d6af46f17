"""Writes the example clips: two compositions of our own, played by a soundfont, and their notes.

    python -m examples.make_clips [--soundfont FluidR3_GM.sf2]

A voice is a row of `names:beats`: names joined by `+` sound together, `-` is a rest. A dynamic (p,
mp, mf, f) and the pedal (`ped`, which holds notes to the end of their bar) apply from there on.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import NamedTuple

import numpy as np
import pretty_midi
import scipy.signal
import soundfile

from mt3_keras.config import SAMPLE_RATE_HZ
from mt3_keras.datasets.augment import Samples, room_responses
from mt3_keras.datasets.sounds import SoundFontSource
from mt3_keras.midi import replacing, write_midi
from mt3_keras.notes import Note, sort_notes, trim_overlaps

FOLDER = pathlib.Path(__file__).parent
VELOCITIES = {"p": 52, "mp": 66, "mf": 80, "f": 96}
OFFBEAT = 8  # what a note between two beats has less
DRUMS = {"kick": 36, "snare": 38, "hat": 42, "crash": 49}
SEED = 27  # draws the soundfont's standard drum kit
ROOM, REFLECTED = 47, 0.5  # a dry one, and how much of it is heard
PEAK = 10 ** (-1 / 20)
TAIL_SECONDS = 0.8

RIGHT_HAND = """
mp A4:1 G4:.5 A4:.5 C5:1 | F5:1.5 E5:.5 C5:1 | D5:1 Bb4:.5 C5:.5 D5:1 | E5:1 D5:.5 C5:.5 G4:1 |
mf A4:1 G4:.5 A4:.5 C5:1 | f G5:1.5 F5:.5 D5:1 | mf C5:1 Bb4:.5 A4:.5 G4:1 | ped p F4:1 C5:1 F5:2
"""
LEFT_HAND = """
ped p F2:1 C3:.5 F3:.5 A3:1 | D2:1 A2:.5 F3:.5 A3:1 | G2:1 D3:.5 F3:.5 Bb3:1 | C2:1 G2:.5 E3:.5 Bb3:1 |
mp A2:1 C3:.5 F3:.5 C4:1 | mf Bb2:1 F3+A3+D4:1 F3+A3+D4:1 | mp G2:1 F3+Bb3:1 C3+E3+Bb3:1 | p F2+C3+A3:4
"""
FLUTE = """
mf E5:1.5 D5:.5 C5:.5 A4:.5 C5:1 | -:.5 A4:.5 C5:.5 E5:.5 D5:1 C5:1 |
f F5:1.5 E5:.5 D5:.5 A4:.5 D5:1 | -:.5 B4:.5 D5:.5 F5:.5 E5:1 G#4:1 | mf A4:3
"""
CHORDS = """
mf G3+C4+E4:1.5 G3+C4+E4:1.5 -:1 | A3+C4+E4:1.5 A3+C4+E4:1.5 -:1 |
A3+D4+F4:1.5 A3+D4+F4:1.5 -:1 | G#3+B3+D4:1.5 G#3+B3+D4:1.5 -:1 | A3+C4+E4:3
"""
BASS = """
mf A1:1.5 A1:.5 E2:1 G2:1 | F1:1.5 F1:.5 C2:1 E2:1 |
D2:1.5 D2:.5 A2:1 F2:1 | E2:1.5 E2:.5 B1:1 G#1:1 | A1:3
"""
CYMBALS = "mf" + 30 * " hat:.5" + " -:1 | f crash:2"
SNARE = "f" + 3 * " -:1 snare:2 snare:1 |" + " -:1 snare:2 snare:.5 snare:.5"
KICK = "f" + 4 * " kick:1.5 kick:.5 kick:2 |" + " kick:2"


class Part(NamedTuple):
    program: int
    level_db: float
    voices: tuple[str, ...]


CLIPS = {  # beats a minute, and who plays
    "piano": (132, [Part(0, 0, (RIGHT_HAND, LEFT_HAND))]),
    "band": (
        108,
        [
            Part(73, 0, (FLUTE,)),
            Part(4, -3, (CHORDS,)),
            Part(33, 0, (BASS,)),
            Part(0, -2, (CYMBALS, SNARE, KICK)),
        ],
    ),
}


def read_voice(text: str, program: int, beats_per_minute: float) -> list[Note]:
    """Notes of one voice; see above for how it is written."""
    beat, now, velocity, pedal = 60 / beats_per_minute, 0.0, 0, False
    notes = []
    for bar in text.split("|"):
        events = [event.split(":") for event in bar.split()]
        bar_end = now + sum(float(beats) for _, *rest in events for beats in rest)
        for names, *rest in events:
            pedal = pedal or names == "ped"
            velocity = VELOCITIES.get(names, velocity)
            if not rest:
                continue
            start, now = now, now + float(rest[0])
            for name in names.split("+") if names != "-" else []:
                pitch = DRUMS.get(name) or pretty_midi.note_name_to_number(name)
                end = start + 0.25 if name in DRUMS else bar_end if pedal else now
                level = velocity - OFFBEAT * (start % 1 > 0)
                notes.append(Note(start * beat, end * beat, pitch, level, program, name in DRUMS))
    return notes


def read_part(part: Part, beats_per_minute: float) -> list[Note]:
    """What a part plays, in order of onset, none overlapping another of its pitch."""
    voices = [read_voice(text, part.program, beats_per_minute) for text in part.voices]
    return trim_overlaps(sort_notes(note for voice in voices for note in voice))


def play_part(part: Part, notes: list[Note], num_samples: int, font: SoundFontSource) -> Samples:
    """The part, dry, at its level in the mix: float32 [num_samples]."""
    rng = np.random.default_rng(SEED)
    samples, played = font.play(notes, num_samples, SAMPLE_RATE_HZ, rng)
    if not played.all():
        raise SystemExit(f"{font.path}: cannot sound all of program {part.program}: take another")
    return samples * np.float32(10 ** (part.level_db / 20) / np.sqrt(np.mean(samples**2)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the example clips.")
    parser.add_argument("--soundfont", default="/usr/share/sounds/sf2/FluidR3_GM.sf2")
    font = SoundFontSource(parser.parse_args().soundfont)
    for name, (beats_per_minute, parts) in CLIPS.items():
        played = [read_part(part, beats_per_minute) for part in parts]
        notes = sort_notes(note for part in played for note in part)
        size = round((max(note.offset for note in notes) + TAIL_SECONDS) * SAMPLE_RATE_HZ)
        stems = [play_part(p, n, size, font) for p, n in zip(parts, played, strict=True)]
        dry = np.sum(stems, axis=0)
        mix = dry + REFLECTED * scipy.signal.fftconvolve(dry, room_responses(ROOM)[0])[:size]
        with replacing(FOLDER / f"{name}.flac") as temporary:
            soundfile.write(
                temporary, mix * PEAK / np.abs(mix).max(), SAMPLE_RATE_HZ, "PCM_16", format="FLAC"
            )
        write_midi(notes, FOLDER / f"{name}.mid")


if __name__ == "__main__":
    main()
