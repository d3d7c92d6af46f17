"""Writes the example clips: two compositions of our own, played by a soundfont, and their notes.

    python -m examples.make_clips [--soundfont FluidR3_GM.sf2]

A voice is a row of `names:beats`: names joined by `+` sound together, `-` is a rest. A dynamic (p,
mp, mf, f) and the pedal (`ped`, which holds notes to the end of their bar) apply from there on.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pretty_midi
import soundfile
from absl import flags

from mt3_keras.cli.command_line import Command, Flags, run
from mt3_keras.data.example import DatasetError
from mt3_keras.files import replacing
from mt3_keras.midi import write_midi
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note, sort_notes, trim_overlaps
from mt3_keras.synth.augment import Samples, room_responses
from mt3_keras.synth.sounds import SoundFontSource

FOLDER = pathlib.Path(__file__).parent
FLUID = "/usr/share/sounds/sf2/FluidR3_GM.sf2"  # where Debian puts it
VELOCITIES = {"p": 52, "mp": 66, "mf": 80, "f": 96}
OFFBEAT = 8  # what a note between two beats has less
DRUMS = {"kick": 36, "snare": 38, "hat": 42, "crash": 49}
SEED = 17  # draws the soundfont's jazz drums
ROOM, REFLECTED = 47, 0.5  # a dry one, and how much of it is heard
PEAK = 10 ** (-1 / 20)
LEAD_SECONDS, TAIL_SECONDS = 0.25, 0.8

RIGHT_HAND = """
mp A4:1 G4:.5 A4:.5 C5:1 | F5:1.5 E5:.5 C5:1 | D5:1 Bb4:.5 C5:.5 D5:1 | E5:1 D5:.5 C5:.5 G4:1 |
mf A4:1 G4:.5 A4:.5 C5:1 | f G5:1.5 F5:.5 D5:1 |
mf C5:1 Bb4:.5 A4:.5 G4:1 | ped p F4:1 C5:1 F5:2"""
LEFT_HAND = """
ped p F2:1 C3:.5 F3:.5 A3:1 | D2:1 A2:.5 F3:.5 A3:1 |
G2:1 D3:.5 F3:.5 Bb3:1 | C2:1 G2:.5 E3:.5 Bb3:1 |
mp A2:1 C3:.5 F3:.5 C4:1 | mf Bb2:1 F3+A3+D4:1 F3+A3+D4:1 |
mp G2:1 F3+Bb3:1 C3+E3+Bb3:1 | p F2+C3+A3:4"""
FLUTE = """
mf E5:1.5 D5:.5 C5:.5 A4:.5 C5:1 | -:.5 A4:.5 C5:.5 E5:.5 D5:1 C5:1 |
f F5:1.5 E5:.5 D5:.5 A4:.5 D5:1 | -:.5 B4:.5 D5:.5 F5:.5 E5:1 G#4:1 | mf A4:3"""
CHORDS = """
mf G3+C4+E4:1 -:.5 G3+C4+E4:1 -:1.5 | A3+C4+E4:1 -:.5 A3+C4+E4:1 -:1.5 |
A3+D4+F4:1 -:.5 A3+D4+F4:1 -:1.5 | G#3+B3+D4:1 -:.5 G#3+B3+D4:1 -:1.5 | A3+C4+E4:3"""
BASS = """
mf A2:1.5 A2:.5 E2:1 G2:1 | F2:1.5 F2:.5 C2:1 E2:1 |
D2:1.5 D2:.5 A2:1 F2:1 | E2:1.5 E2:.5 B1:1 G#2:1 | A2:3"""
CYMBALS = "mf" + 30 * " hat:.5" + " -:1 | f crash:2"
SNARE = "f" + 3 * " -:1 snare:2 snare:1 |" + " -:1 snare:2 snare:.5 snare:.5"
KICK = "f" + 4 * " kick:1.5 kick:.5 kick:2 |" + " kick:2"


class Part(NamedTuple):
    program: int
    level_db: float
    voices: tuple[str, ...]


PIANO = (Part(0, 0, (RIGHT_HAND, LEFT_HAND)),)
BAND = (
    Part(73, 0, (FLUTE,)),
    Part(4, -3, (CHORDS,)),
    Part(32, 0, (BASS,)),
    Part(0, -2, (CYMBALS, SNARE, KICK)),
)
CLIPS = {"piano": (132, PIANO), "band": (108, BAND)}  # beats a minute, and who plays


def read_voice(text: str, program: int, beats_per_minute: float) -> list[Note]:
    """Notes of one voice; see above for how it is written."""
    beat, now, velocity, pedal = 60 / beats_per_minute, 0.0, 0, False
    notes = []
    for bar in text.split("|"):
        events = [event.split(":") for event in bar.split()]
        bar_end = now + sum(float(event[1]) for event in events if len(event) == 2)
        for names, *beats in events:
            if not beats:
                pedal, velocity = pedal or names == "ped", VELOCITIES.get(names, velocity)
                continue
            start, now = now, now + float(beats[0])
            for name in names.split("+") if names != "-" else []:
                is_drum = name in DRUMS
                pitch = DRUMS[name] if is_drum else pretty_midi.note_name_to_number(name)
                end = start + 0.25 if is_drum else bar_end if pedal else now
                onset, offset = (LEAD_SECONDS + time * beat for time in (start, end))
                louder = velocity - OFFBEAT * (start % 1 > 0)
                notes.append(Note(onset, offset, pitch, louder, program, is_drum))
    return notes


def read_part(part: Part, beats_per_minute: float) -> list[Note]:
    """What a part plays, in order of onset, none overlapping another of its pitch."""
    voices = [read_voice(text, part.program, beats_per_minute) for text in part.voices]
    return trim_overlaps(sort_notes(note for voice in voices for note in voice))


def play_part(part: Part, notes: list[Note], size: int, font: SoundFontSource) -> Samples:
    """The part, dry, at its level in the mix: float32 [size]."""
    samples, played = font.play(notes, size, SAMPLE_RATE_HZ, np.random.default_rng(SEED))
    if not played.all():
        raise DatasetError(f"{font.path}: silent notes in program {part.program}; take FluidR3_GM")
    return samples * np.float32(10 ** (part.level_db / 20) / np.sqrt(np.mean(samples**2)))


def write_clip(name: str, font: SoundFontSource) -> None:
    """Writes the recording and its notes beside this file."""
    import scipy.signal

    beats_per_minute, parts = CLIPS[name]
    played = [read_part(part, beats_per_minute) for part in parts]
    notes = sort_notes(note for part in played for note in part)
    size = round((max(note.offset for note in notes) + TAIL_SECONDS) * SAMPLE_RATE_HZ)
    dry = np.sum([play_part(*part, size, font) for part in zip(parts, played, strict=True)], 0)
    mix = dry + REFLECTED * scipy.signal.fftconvolve(dry, room_responses(ROOM)[0])[:size]
    mix *= PEAK / np.abs(mix).max()
    with replacing(FOLDER / f"{name}.flac") as temporary:
        soundfile.write(temporary, mix, SAMPLE_RATE_HZ, "PCM_16", format="FLAC")
    write_midi(notes, FOLDER / f"{name}.mid")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("examples.make_clips", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.text("soundfont", FLUID, "What plays.")


def _write_clips(values: flags.FlagValues, _: list[str]) -> None:
    font = SoundFontSource(values.soundfont)
    for name in CLIPS:
        write_clip(name, font)


COMMAND = Command("[FLAGS]", __doc__, _define_flags, _write_clips)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
