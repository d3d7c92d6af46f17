"""Scores of several models on the same recordings, by family of instruments, and what they lose.

    python -m benchmarks.accuracy --data DIR_WITH_MANIFEST [--model small]
        [--model official=T5X_DIR_OR_BUNDLE] [--peer NAME=PYTHON] [--json scores.json]

Recordings, references and scores are those of train.evaluate; real and rendered clips stand apart.
`--peer` adds another program with its default settings, run by an interpreter that has it:
`basic-pitch`, or `harmonica-` and a size (nano, small, medium, large, x-large). The first holds on
to an old TensorFlow and runs as well without any, the second refuses Python 3.11 and runs on it:

    python3.11 -m venv A && A/bin/pip install --no-deps basic-pitch==0.4.0
    A/bin/pip install onnxruntime librosa mir_eval pretty_midi 'resampy<0.4.3' scikit-learn
    python3.11 -m venv B
    B/bin/pip install --no-deps --ignore-requires-python harmonica-amt==0.3.0
    B/bin/pip install torch loguru nnaudio omegaconf soundfile symusic typer

A second table shows where the rest is lost, in shares of a clip's pitched notes, averaged over the
clips like the scores. Each reference note is paired with at most one estimated note, by the first
of these that fits: "found" (same pitch, onset within the clip's tolerance), "timing" (same pitch,
onset within 150 ms), "octave" and "other pitch" (onset within the tolerance); or it is "missed".
"right class" is the share found by notes of the right class of instruments. "extra" is the share
of the estimated notes that pair with nothing.
"""

from __future__ import annotations

import collections
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from benchmarks.machine import run_json
from mt3_keras.cli.command_line import Command, Flags, UsageError, run
from mt3_keras.files import replacing
from mt3_keras.metrics import match_notes, onset_scores
from mt3_keras.notes import Note, map_program
from mt3_keras.transcriber import Transcriber
from train.evaluate import read_manifest
from train.scores import DRUMS, MULTI, OFFSET, ONSET, Item, Scores, format_table, score, summarize

# Each writes, by path, rows of onset, offset, pitch and loudness from 0 to 1.
BASIC_PITCH = """
import contextlib, json, sys
from basic_pitch import ICASSP_2022_MODEL_PATH
from basic_pitch.inference import Model, predict

with contextlib.redirect_stdout(sys.stderr):
    model = Model(ICASSP_2022_MODEL_PATH)
    notes = {
        path: [[float(value) for value in note[:4]] for note in predict(path, model)[2]]
        for path in sys.argv[2:]
    }
print(json.dumps(notes))
"""
HARMONICA = """
import contextlib, json, sys
from harmonica import Harmonica

with contextlib.redirect_stdout(sys.stderr):
    model = Harmonica(sys.argv[1], device="cpu")
    notes = {}
    for path in sys.argv[2:]:
        found = model.transcribe(path)
        notes[path] = [[float(n) for n in row] for row in zip(
            found.onsets, found.offsets, found.pitches, found.velocities / 127)]
print(json.dumps(notes))
"""

TIMING_TOLERANCE = 0.15
COLUMNS = (ONSET, "precision", "recall", OFFSET, MULTI, DRUMS)
RIGHT_CLASS, MISSED, EXTRA = "right class", "missed", "extra"
LOSSES = ("found", RIGHT_CLASS, "timing", "octave", "other pitch", MISSED, EXTRA)

Clip = tuple[Item, str, Sequence[Note]]  # audio file and true notes
Summary = Mapping[str, Scores]  # by group


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.accuracy", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.text("data", None, "Folder with manifest.json.", required=True)
    add.texts(
        "model",
        ["small"],
        "[NAME=]MODEL: a shipped model's name, a preset or T5X folder or an edge bundle; may be "
        "repeated.",
    )
    add.texts(
        "peer",
        [],
        "NAME=PYTHON: basic-pitch or harmonica-SIZE, and an interpreter that has it; may be "
        "repeated.",
    )
    add.text("json", None, "Write all scores and notes here.")


def _compare(values: flags.FlagValues, _: list[str]) -> None:
    peers = dict(map(_to_peer, values.peer))
    clips = [(item, *_load(item)) for item in read_manifest(pathlib.Path(values.data))]
    notes = {}
    for text in values.model:
        name, _, folder = text.partition("=")
        notes[name] = transcribe(folder or name, clips)
    for name, python in peers.items():
        notes[name] = run_peer(name, python, clips)
    items = [item for item, *_ in clips]
    scores = {name: score_clips(clips, found, name not in peers) for name, found in notes.items()}
    summaries = {name: summarize(items, of_clips) for name, of_clips in scores.items()}
    print(report(items, summaries))
    if values.json:
        result = {"summary": summaries, "items": scores, "notes": notes}
        with replacing(values.json) as temporary:
            temporary.write_text(json.dumps(result) + "\n")


def _to_peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if not python or not (name == "basic-pitch" or name.startswith("harmonica-")):
        raise UsageError(f"--peer={text}: not basic-pitch=PYTHON or harmonica-SIZE=PYTHON")
    return name, python


def _load(item: Item) -> tuple[str, Sequence[Note]]:
    audio, reference = item.load()
    return str(audio), reference


def transcribe(model: str, clips: Sequence[Clip]) -> dict[str, list[Note]]:
    """Notes by clip."""
    transcriber = Transcriber.from_preset(model)
    progress = tqdm(clips, desc=model, unit="recording", disable=None, leave=False)
    return {item.id: transcriber.transcribe(audio).notes for item, audio, _ in progress}


def run_peer(name: str, python: str, clips: Sequence[Clip]) -> dict[str, list[Note]]:
    """Notes by clip, all of program 0."""
    paths = [audio for _, audio, _ in clips]
    script = BASIC_PITCH if name == "basic-pitch" else HARMONICA
    size = name.removeprefix("harmonica-")
    found: dict[str, Any] = run_json([python, "-I", "-c", script, size, *paths])
    return {
        item.id: [
            Note(onset, offset, int(pitch), min(127, max(1, round(127 * loudness))))
            for onset, offset, pitch, loudness in found[audio]
        ]
        for item, audio, _ in clips
    }


def score_clips(
    clips: Sequence[Clip], notes: Mapping[str, Sequence[Note]], knows_instruments: bool
) -> dict[str, Scores]:
    """`COLUMNS` and `LOSSES` by clip, as far as they apply."""
    return {
        item.id: score_clip(item, reference, notes[item.id], knows_instruments)
        for item, _, reference in clips
    }


def score_clip(
    item: Item, reference: Sequence[Note], estimate: Sequence[Note], knows_instruments: bool
) -> Scores:
    scores = score(item, reference, estimate)
    if ONSET in scores:
        tolerance = item.onset_tolerance
        precision, recall, _ = onset_scores(reference, estimate, onset_tolerance=tolerance)
        scores |= {"precision": precision, "recall": recall}
        scores |= find_losses(reference, estimate, tolerance)
    if not knows_instruments:
        for name in (MULTI, DRUMS, RIGHT_CLASS):
            scores.pop(name, None)
    return {name: scores[name] for name in (*COLUMNS, *LOSSES) if name in scores}


def find_losses(
    reference: Sequence[Note], estimate: Sequence[Note], onset_tolerance: float
) -> dict[str, float]:
    """`LOSSES` of one clip (see the module), without `EXTRA` if nothing is estimated.

    Args:
      reference: holds at least one pitched note.
      estimate: what was transcribed.
      onset_tolerance: in seconds.
    """
    left = [
        [
            note._replace(program=map_program(note.program, "midi_class"))
            for note in notes
            if not note.is_drum and note.offset > note.onset
        ]
        for notes in (reference, estimate)
    ]
    num_reference, num_estimate = map(len, left)
    right = match_notes(*left, onset_tolerance=onset_tolerance, offset_ratio=None)
    shares = {RIGHT_CLASS: len(right) / num_reference}
    for name, tolerance, num_pitches in (
        ("found", onset_tolerance, 128),
        ("timing", TIMING_TOLERANCE, 128),
        ("octave", onset_tolerance, 12),
        ("other pitch", onset_tolerance, 1),
    ):
        blurred = [[n._replace(program=0, pitch=n.pitch % num_pitches) for n in s] for s in left]
        pairs = match_notes(*blurred, onset_tolerance=tolerance, offset_ratio=None)
        shares[name] = len(pairs) / num_reference
        paired = {i for i, _ in pairs}, {j for _, j in pairs}
        left = [
            [note for i, note in enumerate(notes) if i not in used]
            for notes, used in zip(left, paired, strict=True)
        ]
    shares[MISSED] = len(left[0]) / num_reference
    if num_estimate:
        shares[EXTRA] = len(left[1]) / num_estimate
    return shares


def report(items: Sequence[Item], summaries: Mapping[str, Summary]) -> str:
    """A table for each group of clips, then what is lost of the real and of the rendered ones."""

    def to_table(group: str, heading: str, columns: Sequence[str]) -> str:
        rows = [(name, summary[group]) for name, summary in summaries.items()]
        return format_table(rows, heading, columns)

    counts = collections.Counter(group for item in items for group in item.groups)
    tables = [to_table(group, f"{group} ({counts[group]})", COLUMNS) for group in sorted(counts)]
    kinds = sorted({item.groups[0] for item in items})
    tables += [to_table(kind, f"where the rest is lost: {kind}", LOSSES) for kind in kinds]
    return "\n\n".join(tables)


COMMAND = Command("--data=DIR [FLAGS]", __doc__, _define_flags, _compare)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
