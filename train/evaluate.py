"""Scores a model on a folder of recordings with references.

    python -m train.evaluate --model MODEL --data DIR_WITH_MANIFEST

`manifest.json` in the folder lists "items", each with "id", "audio", "midi" (paths in the folder)
and, where they differ from the defaults, "kind", "onset_tolerance_s" (0.05), "eval" ("notes"; what
begins with "drum" is scored on its drums alone), "programs", "has_drums". Prints a table by item,
by instrument family and overall; --json and --png write it as data and as a picture.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from mt3_keras.command_line import UsageError, define_model_flags, load_transcriber
from mt3_keras.metrics import (
    drum_onset_scores,
    further_scores,
    mean_scores,
    onset_scores,
    transcription_scores,
)
from mt3_keras.midi import read_midi, replacing
from mt3_keras.notes import Note

ONSET, OFFSET, MULTI, DRUMS = "onset F1", "on+off F1", "multi F1 (class)", "drum F1"
COLUMNS = (ONSET, OFFSET, MULTI, DRUMS)


@dataclasses.dataclass(frozen=True)
class Item:
    """A recording and its reference.

    Attributes:
      family: what the recording is of, for the table ("piano", "band", ...).
      is_real: recorded, as opposed to rendered.
      only_drums: whether the reference holds drums alone, while the recording holds more.
    """

    id: str
    audio: pathlib.Path
    midi: pathlib.Path
    family: str
    is_real: bool
    onset_tolerance: float
    only_drums: bool


def read_manifest(folder: pathlib.Path) -> list[Item]:
    """The items of `manifest.json`; ValueError naming what is missing or wrong in it."""
    path = folder / "manifest.json"
    try:
        entries = json.loads(path.read_text())["items"]
        items = [_to_item(folder, entry) for entry in entries]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); see --help") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a manifest ({error!r}); see --help") from error
    for item in items:
        for file in (item.audio, item.midi):
            if not file.is_file():
                raise ValueError(f"{file}: missing; the manifest of {folder} lists it")
    return items


def _to_item(folder: pathlib.Path, entry: dict[str, Any]) -> Item:
    words = entry["id"].split("_")  # such as real_violin_..., synth_band_...
    return Item(
        id=entry["id"],
        audio=folder / entry["audio"],
        midi=folder / entry["midi"],
        family=words[1] if len(words) > 1 else "all",
        is_real=str(entry.get("kind", "real")).startswith("real"),
        onset_tolerance=float(entry.get("onset_tolerance_s", 0.05)),
        only_drums=str(entry.get("eval", "notes")).startswith("drum"),
    )


def score(item: Item, reference: Sequence[Note], estimate: Sequence[Note]) -> dict[str, float]:
    """The main scores of one item; those that do not apply are left out."""
    scores = {}
    if any(not note.is_drum for note in reference) and not item.only_drums:
        scores[ONSET] = onset_scores(reference, estimate, onset_tolerance=item.onset_tolerance)[2]
        original = transcription_scores(reference, estimate)
        scores[OFFSET] = original["Onset + offset F1"]
        scores[MULTI] = original["Onset + offset + program F1 (midi_class)"]
        scores |= further_scores(reference, estimate)
    if any(note.is_drum for note in reference):
        scores[DRUMS] = drum_onset_scores(
            reference, estimate, onset_tolerance=item.onset_tolerance
        )[2]
    return scores


def summarize(items: Sequence[Item], scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Means over real, rendered and all items, and over each family of both kinds."""
    groups: dict[str, list[Item]] = {"all": list(items)}
    for item in items:
        kind = "real" if item.is_real else "rendered"
        groups.setdefault(kind, []).append(item)
        groups.setdefault(f"{kind} {item.family}", []).append(item)
    return {name: mean_scores(scores[item.id] for item in group) for name, group in groups.items()}


def format_table(rows: Iterable[tuple[str, dict[str, float]]], heading: str) -> str:
    """Rows of scores under `COLUMNS`, "-" where one does not apply."""
    lines = [f"{heading:44}" + "".join(f"{column:>18}" for column in COLUMNS)]
    for name, values in rows:
        cells = (f"{values[c]:18.3f}" if c in values else f"{'-':>18}" for c in COLUMNS)
        lines.append(f"{name[:43]:44}" + "".join(cells))
    return "\n".join(lines)


def plot_summary(summary: dict[str, dict[str, float]], path: pathlib.Path) -> None:
    """Bars: one group for each family, one bar for each score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(7, len(summary)), 4), layout="constrained")
    width = 0.8 / len(COLUMNS)
    for i, column in enumerate(COLUMNS):
        places = [place + i * width for place in range(len(summary))]
        axes.bar(places, [s.get(column, 0.0) for s in summary.values()], width, label=column)
    axes.set_xticks([p + 0.3 for p in range(len(summary))], list(summary), rotation=40, ha="right")
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper right", frameon=False, ncols=len(COLUMNS))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    pyplot.close(figure)


def evaluate(transcriber: Any, items: Sequence[Item], is_quiet: bool = False) -> dict[str, Any]:
    """Transcribes and scores all items.

    Returns:
      "items" (scores by id), "summary" (means by group), "invalid_events", "dropped_events",
      "notes" (by id), "seconds" of audio and "elapsed" seconds.
    """
    from tqdm import tqdm

    result: dict[str, Any] = {"items": {}, "notes": {}}
    totals = dict.fromkeys(("invalid_events", "dropped_events", "seconds"), 0.0)
    start = time.monotonic()
    for item in tqdm(items, disable=True if is_quiet else None, unit="recording", leave=False):
        transcription = transcriber.transcribe(item.audio)
        totals["invalid_events"] += transcription.invalid_events
        totals["dropped_events"] += transcription.dropped_events
        totals["seconds"] += transcription.duration
        result["notes"][item.id] = [list(note) for note in transcription.notes]
        result["items"][item.id] = score(item, read_midi(item.midi), transcription.notes)
    result |= totals
    result["elapsed"] = time.monotonic() - start
    result["summary"] = summarize(items, result["items"])
    return result


def _define_flags(values: flags.FlagValues) -> None:
    define_model_flags(values)
    flags.DEFINE_string("flagfile", "", "Reads further flags from this file.", flag_values=values)
    flags.DEFINE_string("data", None, "Folder with manifest.json.", flag_values=values)
    flags.DEFINE_string("only", "", "Score only items whose id holds this.", flag_values=values)
    flags.DEFINE_string("json", None, "Write all scores and notes here.", flag_values=values)
    flags.DEFINE_string("png", None, "Write a picture of the table here.", flag_values=values)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    values = flags.FlagValues()
    _define_flags(values)
    if any(argument in ("-h", "--help") for argument in argv):
        print(f"{__doc__}\n{values.get_help()}")
        return 0
    try:
        if rest := values(["train.evaluate", *argv])[1:]:
            raise UsageError(f"unexpected argument {rest[0]!r}")
        if not values.data:
            raise UsageError("--data is needed: a folder with manifest.json")
        items = [i for i in read_manifest(pathlib.Path(values.data)) if values.only in i.id]
        result = evaluate(load_transcriber(values), items)
        print(format_table(result["items"].items(), "item"))
        print(format_table(result["summary"].items(), "mean of"))
        print(
            f"invalid events {result['invalid_events']:.0f}, "
            f"dropped {result['dropped_events']:.0f}; {result['seconds']:.0f} s of audio "
            f"in {result['elapsed']:.0f} s"
        )
        if values.json:
            with replacing(values.json) as temporary:
                temporary.write_text(json.dumps(result) + "\n")
        if values.png:
            plot_summary(result["summary"], pathlib.Path(values.png))
    except (UsageError, flags.Error) as error:
        print(f"train.evaluate: {error}\nSee python -m train.evaluate --help.", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"train.evaluate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
