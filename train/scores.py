"""Scores of a model on many recordings, their tables and their picture."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mt3_keras.files import replacing
from mt3_keras.instrument_names import instrument_name
from mt3_keras.metrics import (
    TrackSpec,
    drum_onset_scores,
    further_scores,
    match_notes,
    mean_scores,
    onset_scores,
    transcription_scores,
)
from mt3_keras.notes import Note, map_program
from train import confusions

ONSET, OFFSET, MULTI, DRUMS = "onset F1", "on+off F1", "multi F1 (class)", "drum F1"
COLUMNS = (ONSET, OFFSET, MULTI, DRUMS)
INSTRUMENT_COLUMNS = ("notes", "found", "precision", "recall", ONSET, OFFSET)

Scores = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Item:
    """A recording and its reference.

    Attributes:
      load: gives the audio, a path or samples as `Transcriber.transcribe` takes them, and the true
        notes; what it raises leaves the item out.
      groups: names under which its scores are averaged, besides "all".
      onset_tolerance: in seconds, for all scores that ignore offsets.
      only_drums: whether the reference holds drums alone, while the recording holds more.
      tracks: tracks to score by themselves too.
    """

    id: str
    load: Callable[[], tuple[Any, Sequence[Note]]]
    groups: tuple[str, ...] = ()
    onset_tolerance: float = 0.05
    only_drums: bool = False
    tracks: tuple[TrackSpec, ...] = ()


def score(item: Item, reference: Sequence[Note], estimate: Sequence[Note]) -> dict[str, float]:
    """All scores of one item by name, `COLUMNS` first; those that do not apply are left out."""
    scores: dict[str, float] = {}
    if any(not note.is_drum for note in reference) and not item.only_drums:
        original = transcription_scores(reference, estimate, tracks=item.tracks)
        scores[ONSET] = onset_scores(reference, estimate, onset_tolerance=item.onset_tolerance)[2]
        scores[OFFSET] = original["Onset + offset F1"]
        scores[MULTI] = original["Onset + offset + program F1 (midi_class)"]
        scores |= original | further_scores(reference, estimate)
    if any(note.is_drum for note in reference):
        scores[DRUMS] = drum_onset_scores(
            reference, estimate, onset_tolerance=item.onset_tolerance
        )[2]
    return scores


# Of each instrument: notes of the reference, of the estimate, hits by onset, hits by offset too.
Counts = dict[tuple[bool, int], list[int]]


def count_instruments(
    item: Item,
    reference: Sequence[Note],
    estimate: Sequence[Note],
    granularity: str,
    counts: Counts,
) -> None:
    """Adds an item's notes to `counts`, by (is_drum, program as `granularity` maps it)."""
    sides = [
        [
            note._replace(program=0 if note.is_drum else map_program(note.program, granularity))
            for note in notes
            if note.offset > note.onset and (note.is_drum or not item.only_drums)
        ]
        for notes in (reference, estimate)
    ]
    matchings = [
        match_notes(*sides, onset_tolerance=item.onset_tolerance, offset_ratio=None),
        match_notes(*sides),
    ]
    hits = [[sides[0][i] for i, _ in matching] for matching in matchings]
    for place, notes in enumerate([*sides, *hits]):
        for note in notes:
            counts.setdefault((note.is_drum, note.program), [0] * 4)[place] += 1


def instrument_scores(counts: Counts, granularity: str) -> dict[str, dict[str, float]]:
    """Name of the instrument -> `INSTRUMENT_COLUMNS`, over the notes of all items together."""
    result = {}
    for (is_drum, program), (num_true, num_found, onsets, offsets) in sorted(counts.items()):
        is_exact = is_drum or granularity == "full"
        name = instrument_name(program, is_drum) if is_exact else confusions.class_name(program)
        result[name] = {
            "notes": num_true,
            "found": num_found,
            "precision": onsets / max(num_found, 1),
            "recall": onsets / max(num_true, 1),
            ONSET: 2 * onsets / (num_true + num_found),
            OFFSET: 2 * offsets / (num_true + num_found),
        }
    return result


def summarize(items: Sequence[Item], scores: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """Means over all items and over each group."""
    groups: dict[str, list[Scores]] = {"all": []}
    for item in items:
        if item.id in scores:
            for name in ("all", *item.groups):
                groups.setdefault(name, []).append(scores[item.id])
    return {name: mean_scores(group) for name, group in groups.items()}


def evaluate(
    transcriber: Any,
    items: Sequence[Item],
    *,
    granularity: str = "midi_class",
    is_quiet: bool = False,
) -> dict[str, Any]:
    """Transcribes and scores all items.

    Args:
      transcriber: a `Transcriber`, or what has its `transcribe`.
      items: recordings with their true notes.
      granularity: how finely programs are distinguished in the scores by instrument.
      is_quiet: show no progress.

    Returns:
      "items" (scores by id), "instruments" (scores by name), "summary" (means by group),
      "naming" (by group, see `confusions.summarize`), "left_out" (reasons by id),
      "invalid_events", "dropped_events", "notes" (by id), "seconds" of audio and "elapsed" seconds.

    Raises:
      ValueError: no item could be used.
    """
    from tqdm import tqdm

    result: dict[str, Any] = {"items": {}, "left_out": {}, "notes": {}}
    totals = dict.fromkeys(("invalid_events", "dropped_events", "seconds"), 0.0)
    counts: Counts = {}
    findings: dict[str, confusions.Findings] = {"all": confusions.Findings()}
    start = time.monotonic()
    for item in tqdm(items, disable=True if is_quiet else None, unit="recording", leave=False):
        try:
            audio, reference = item.load()
            found = transcriber.transcribe(audio)
        except (ValueError, OSError) as error:
            result["left_out"][item.id] = " ".join(str(error).split())
            continue
        for name in ("invalid_events", "dropped_events"):
            totals[name] += getattr(found, name)
        totals["seconds"] += found.duration
        result["notes"][item.id] = [list(note) for note in found.notes]
        result["items"][item.id] = score(item, reference, found.notes)
        count_instruments(item, reference, found.notes, granularity, counts)
        for group in ("all", *item.groups):
            findings.setdefault(group, confusions.Findings()).add(
                reference,
                found.notes,
                onset_tolerance=item.onset_tolerance,
                only_drums=item.only_drums,
            )
    if not result["items"]:
        first = next(iter(result["left_out"].items()), ("", "there is none"))
        raise ValueError(f"no item could be scored: {': '.join(filter(None, first))}")
    result |= totals
    result["elapsed"] = time.monotonic() - start
    result["instruments"] = instrument_scores(counts, granularity)
    result["naming"] = {name: confusions.summarize(one) for name, one in findings.items()}
    result["summary"] = summarize(items, result["items"])
    return result


def format_table(
    rows: Iterable[tuple[str, Scores]], heading: str, columns: Sequence[str] = COLUMNS
) -> str:
    """Rows of scores under `columns`, "-" where one does not apply."""
    lines = [f"{heading:44}" + "".join(f"{column:>18}" for column in columns)]
    for name, values in rows:
        cells = (f"{_to_text(values[c]):>18}" if c in values else f"{'-':>18}" for c in columns)
        lines.append(f"{name[:43]:44}" + "".join(cells))
    return "\n".join(lines)


def _to_text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def report(result: Mapping[str, Any]) -> str:
    """The tables by item, by instrument, of names and ends, and overall, and what was left out."""
    return "\n\n".join(
        [
            format_table(result["items"].items(), "item"),
            format_table(result["instruments"].items(), "instrument", INSTRUMENT_COLUMNS),
            confusions.tables(result["naming"]["all"]),
            confusions.groups_table(result["naming"]),
            format_table(result["summary"].items(), "mean of"),
            f"{len(result['items'])} items scored, {len(result['left_out'])} left out; "
            f"invalid events {result['invalid_events']:.0f}, "
            f"dropped {result['dropped_events']:.0f}; {result['seconds']:.0f} s of audio "
            f"in {result['elapsed']:.0f} s",
        ]
    )


def plot_scores(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """A PNG: bars of means by group and of instruments; what is named as what."""
    from matplotlib.figure import Figure

    parts = ((result["summary"], COLUMNS), (result["instruments"], (ONSET, OFFSET)))
    width = max(7.0, 0.7 * max(len(rows) for rows, _ in parts))
    figure = Figure(figsize=(width + 8, 14), layout="constrained")
    axes = figure.subplots(2, 2)
    for place, (rows, columns) in zip(axes[:, 0], parts, strict=True):
        _plot_bars(place, rows, columns)
    orders = {"classes": confusions.CLASSES, "drums": confusions.KIT_PIECES}
    for place, (name, order) in zip(axes[:, 1], orders.items(), strict=True):
        _plot_confusion(place, name, result["naming"]["all"][name]["confusion"], order)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _plot_bars(axes: Any, rows: Mapping[str, Scores], columns: Sequence[str]) -> None:
    bar = 0.8 / len(columns)
    for i, column in enumerate(columns):
        places = [place + i * bar for place in range(len(rows))]
        axes.bar(places, [row.get(column, 0.0) for row in rows.values()], bar, label=column)
    middles = [place + 0.4 - bar / 2 for place in range(len(rows))]
    axes.set_xticks(middles, list(rows), rotation=40, ha="right")
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper right", frameon=False, ncols=len(columns))


def _plot_confusion(
    axes: Any, name: str, counts: Sequence[Sequence[Any]], order: Sequence[str]
) -> None:
    """Shares of each true name, down, that are estimated by each name, across."""
    by_names = {(true, estimated): count for true, estimated, count in counts}
    shown = [one for one in order if any(one in names for names in by_names)]
    table = [[by_names.get((true, estimated), 0) for estimated in shown] for true in shown]
    shares = [[count / max(sum(row), 1) for count in row] for row in table]
    axes.set_title(f"{name}: true down, estimated across")
    if not shown:
        axes.set_axis_off()
        return
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share >= 0.005:
                colour = "white" if share > 0.5 else "black"
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(shown)), shown, rotation=40, ha="right")
    axes.set_yticks(range(len(shown)), shown)


def tell_left_out(result: Mapping[str, Any]) -> None:
    """Names on standard error what could not be scored."""
    for name, reason in result["left_out"].items():
        print(f"left out {name}: {reason}", file=sys.stderr)
