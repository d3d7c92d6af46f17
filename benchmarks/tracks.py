"""Networks with an encoder or a decoder for each track, against one with one of each, on songs.

    python -m benchmarks.tracks --data out/tracks --tracks drums,bass,other \
        --models runs/tracks_one,runs/tracks_out,runs/tracks_in

The songs are those of a split of data prepared with these tracks. A network that is given tracks
apart is given them, every other the mix. Columns: F1 of onsets, of onsets and the class of the
instrument, of drums; leakage, the share of the notes of right pitch and onset that came with the
wrong group of instruments; tokens of a segment's longest sequence; tokens a second of processor
time, encoding included, and the real-time factor.
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from mt3_keras.cli.command_line import Command, Flags, run
from mt3_keras.data.records import Record, find_records
from mt3_keras.metrics import further_scores, mean_scores, onset_scores
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import Note
from mt3_keras.outputs import split_sequences
from mt3_keras.tracks import Tracks
from mt3_keras.transcriber import Transcriber

TOLERANCE = 0.05  # seconds
SCORES = {"class": "Onset + program F1 (midi_class)", "drums": "Drum onset F1"}
COLUMNS = ("onset", *SCORES, "leakage", "longest", "tokens/s", "factor")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.tracks", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.text("data", None, "Folder made by train.prepare.", required=True)
    add.text("split", "validation", "Which of its splits.")
    add.names("tracks", ["drums", "bass", "other"], "Their names.")
    add.names("models", None, "What transcribes.", required=True)
    add.count("songs", 20, "At most so many.")


def _compare(values: flags.FlagValues, _: list[str]) -> None:
    names = tuple(values.tracks)
    (records,) = find_records([values.data], values.split, names)
    songs = [records[i] for i in range(min(values.songs, len(records)))]
    print("| | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    for model in values.models:
        row = measure(model, songs, Tracks(names))
        cells = [f"{row[name]:.3f}" if row[name] < 10 else f"{row[name]:.0f}" for name in COLUMNS]
        print(f"| {pathlib.Path(model).name} | " + " | ".join(cells) + " |")


def measure(model: str, songs: list[Record], tracks: Tracks) -> dict[str, float]:
    """The columns of one model."""
    transcriber = Transcriber.from_preset(model, engine="keras", batch_size=16)
    config: Any = transcriber.model_config
    found, longest = [], []
    seconds = audio = 0.0
    num_tokens = num_right = num_leaked = 0
    for number, song in enumerate(songs):
        read = song.track_samples if config.tracks_in else song.samples
        samples = read(0, song.num_samples)
        if not number:
            transcriber.transcribe(samples)  # compiled for caches of all lengths that it needs
        start = time.process_time()
        result = transcriber.transcribe(samples)
        seconds += time.process_time() - start
        audio += song.num_samples / SAMPLE_RATE_HZ
        for segment in result.segments:
            num_tokens += len(segment.tokens)
            parts = split_sequences(segment.tokens, config.num_decoders)
            longest.append(max(map(len, parts)))
        right, leaked = count_leaked(song.notes, result.notes, tracks)
        num_right, num_leaked = num_right + right, num_leaked + leaked
        scores = further_scores(song.notes, result.notes)
        onset = onset_scores(song.notes, result.notes)[2]
        found.append(
            {"onset": onset, **{n: scores[key] for n, key in SCORES.items() if key in scores}}
        )
    return {
        **mean_scores(found),
        "leakage": num_leaked / max(num_right, 1),
        "longest": float(np.mean(longest)),
        "tokens/s": num_tokens / seconds,
        "factor": seconds / audio,
    }


def count_leaked(reference: list[Note], found: list[Note], tracks: Tracks) -> tuple[int, int]:
    """Notes of right pitch and onset, and how many of them no group of theirs plays there."""
    num_right = num_leaked = 0
    for note in found:
        if note.is_drum:
            continue
        groups = {
            tracks.owner(other.program, False)
            for other in reference
            if not other.is_drum
            and other.pitch == note.pitch
            and abs(other.onset - note.onset) <= TOLERANCE
        }
        num_right += bool(groups)
        num_leaked += bool(groups) and tracks.owner(note.program, False) not in groups
    return num_right, num_leaked


COMMAND = Command("--data=DIR --models=MODEL,... [FLAGS]", __doc__, _define_flags, _compare)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
