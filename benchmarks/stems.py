"""A model with a song's stems apart, against the same model on their mix.

    python -m benchmarks.stems --model small --songs 40 --soundfonts FONT.sf2

Songs are composed at random and rendered in four parts, as a separation program names them: drums,
bass, vocals and, of any other instrument, other. Given are the means over the songs of F1: of
onsets (instruments ignored, drums left out), of onsets and offsets, of onsets and the class of the
instrument, of drums.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import soundfile
from absl import flags

from mt3_keras.cli.command_line import Command, Flags, run
from mt3_keras.metrics import further_scores, mean_scores, onset_scores
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note
from mt3_keras.stems import StemTranscriber
from mt3_keras.synth.composer import compose
from mt3_keras.synth.sounds import Samples
from mt3_keras.synth.synthetic import SyntheticConfig, play_parts
from mt3_keras.transcriber import Transcriber

SEED = 280  # of no data set that anything is trained on
# Programs that are no bass, no voice and not past what the composer writes for.
OTHER = [program for program in range(104) if program // 8 != 4 and program not in (52, 53, 54)]
SCORES = {
    "onset": "Onset F1",
    "onset + offset": "Onset + offset F1 (0.05, unmodified notes)",
    "class": "Onset + program F1 (midi_class)",
    "drums": "Drum onset F1",
}


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.stems", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.text("model", "small", "What transcribes.")
    add.count("songs", 40, "How many.")
    add.number("seconds", 16.0, "Length of a song.", least=1.0)
    add.names("soundfonts", [], ".sf2 and .sf3 files; none uses built-in sounds.")


def _compare(values: flags.FlagValues, _: list[str]) -> None:
    config = SyntheticConfig(
        soundfonts=tuple(values.soundfonts),
        additive_share=0.0 if values.soundfonts else 1.0,
        seconds=values.seconds,
        max_detuning_cents=0.0,
    )
    transcriber = Transcriber.from_preset(values.model)
    stems = StemTranscriber(transcriber)
    found: dict[str, list[dict[str, float]]] = {"mix": [], "stems": []}
    seconds = dict.fromkeys(found, 0.0)
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(values.songs):
            folder = pathlib.Path(scratch) / str(number)
            reference = write_song(config, number, folder)
            for way in found:
                start = time.process_time()
                result = (
                    stems.transcribe(folder)
                    if way == "stems"
                    else transcriber.transcribe(folder.with_suffix(".wav"))
                )
                seconds[way] += time.process_time() - start
                found[way].append(score(reference, result.notes))
    print("| | " + " | ".join(SCORES) + " | processor seconds a second of song |")
    print("| --- " * (len(SCORES) + 2) + "|")
    for way, scores in found.items():
        means = mean_scores(scores)
        cost = seconds[way] / values.songs / values.seconds
        row = " | ".join(f"{means[name]:.3f}" for name in SCORES)
        print(f"| {way} | {row} | {cost:.3f} |")


def write_song(config: SyntheticConfig, number: int, folder: pathlib.Path) -> list[Note]:
    """Writes stems into a folder and their sum beside it; returns the notes."""
    rng = np.random.default_rng((SEED, number))
    melody, _, chords, bass, drums = compose(config.seconds, rng)
    voice, other = int(rng.integers(52, 55)), int(rng.choice(OTHER))
    parts = {
        "vocals": [note._replace(program=voice) for note in melody],
        "other": [note._replace(program=other) for note in chords],
        "bass": bass,
        "drums": drums,
    }
    folder.mkdir()
    stems: dict[str, Samples] = {}
    reference: list[Note] = []
    for name, part in parts.items():
        inside = [note for note in part if note.onset < config.seconds - 0.1]
        played, notes = play_parts([inside], config, rng)
        reference += notes
        if played:  # nothing where no source can play it in tune
            stems[name] = played[0]
    mix = np.sum(list(stems.values()), axis=0)
    gain = 0.9 / np.abs(mix).max()
    for name, samples in stems.items():
        soundfile.write(folder / f"{name}.wav", gain * samples, SAMPLE_RATE_HZ, subtype="FLOAT")
    soundfile.write(folder.with_suffix(".wav"), gain * mix, SAMPLE_RATE_HZ, subtype="FLOAT")
    return reference


def score(reference: list[Note], estimate: list[Note]) -> dict[str, float]:
    """F1 by the names of `SCORES`; those that there is nothing to count for are left out."""
    scores = {
        **further_scores(reference, estimate),
        "Onset F1": onset_scores(reference, estimate)[2],
    }
    return {ours: scores[theirs] for ours, theirs in SCORES.items() if theirs in scores}


COMMAND = Command("[FLAGS]", __doc__, _define_flags, _compare)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
