"""Scores two MIDI files, or two folders of them.

Of folders, files of the same name are compared. The scores are those of the original MT3, which
`mt3_keras.metrics` defines, and some more.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags

from mt3_keras.cli.command_line import Command, Flags, UsageError, complain
from mt3_keras.process import printable

MAIN_SCORES = (
    "Onset F1",
    "Onset + offset F1",
    "Frame F1",
    "Onset + offset + program F1 (full)",
    "Onset + offset + program F1 (midi_class)",
    "Drum onset F1 (full)",
)
MIDI_SUFFIXES = (".mid", ".midi")


def _define_flags(add: Flags) -> None:
    add.text("reference", None, "MIDI file or folder: the truth.")
    add.text("estimate", None, "MIDI file or folder: to be scored.")
    add.text("json", None, "Also write all scores to this file.")
    add.switch("all", False, "Print every score, not the main ones.")


def _evaluate(values: flags.FlagValues, _: list[str]) -> int:
    from mt3_keras.files import replacing
    from mt3_keras.metrics import further_scores, mean_scores, transcription_scores
    from mt3_keras.midi import MidiError, read_midi

    if not values.reference or not values.estimate:
        raise UsageError("--reference and --estimate are both needed")
    scores = {}
    pairs = _pair_files(values.reference, values.estimate)
    for name, reference, estimate in pairs:
        try:
            notes = read_midi(reference), read_midi(estimate)
        except MidiError as error:
            complain("mt3", str(error), 1)
            continue
        scores[name] = {**transcription_scores(*notes), **further_scores(*notes)}
    if not scores:
        return 1
    mean = mean_scores(scores.values())
    if len(scores) > 1:
        for name, result in scores.items():
            line = "  ".join(f"{key} {result.get(key, 0.0):.3f}" for key in MAIN_SCORES[:3])
            print(f"{line}  {printable(name)}")
        print(f"mean of {len(scores)}:")
    for key in mean if values.all else MAIN_SCORES:
        print(f"{key:45} {mean.get(key, 0.0):.4f}")
    if values.json:
        with replacing(values.json) as temporary:
            temporary.write_text(json.dumps({"items": scores, "mean": mean}, indent=1) + "\n")
    if len(scores) < len(pairs):
        return complain("mt3", f"{len(pairs) - len(scores)} of {len(pairs)} were left out", 1)
    return 0


def _pair_files(reference: str, estimate: str) -> list[tuple[str, pathlib.Path, pathlib.Path]]:
    """Two files, or the files of the same name in two folders."""
    first, second = pathlib.Path(reference), pathlib.Path(estimate)
    if first.is_dir() != second.is_dir():
        raise UsageError("--reference and --estimate must be two files or two folders")
    if not first.is_dir():
        return [(first.name, first, second)]
    references, estimates = _list_midi(first), {path.stem: path for path in _list_midi(second)}
    if not references:
        raise UsageError(f"{first}: holds no MIDI files")
    if missing := [path.name for path in references if path.stem not in estimates]:
        raise UsageError(f"{second}: no estimate for {missing[0]} ({len(missing)} are missing)")
    return [(path.stem, path, estimates[path.stem]) for path in references]


def _list_midi(folder: pathlib.Path) -> list[pathlib.Path]:
    """The MIDI files of a folder; not hidden ones, such as the companions that macOS writes."""
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(path for path in paths if path.suffix.lower() in MIDI_SUFFIXES)


COMMAND = Command("--reference R --estimate E [FLAGS]", __doc__, _define_flags, _evaluate)
