"""What a model takes for what, and where it ends notes: tables to steer its training by.

Counted are notes found: true notes and estimated ones of the same pitch whose onsets are at most a
tolerance apart, whatever instrument either has; of several ways to pair them one that agrees on the
instrument is taken. Strokes of drums are paired by onset alone. `Findings` gathers pieces;
`tables` and `groups_table` write what they show.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mt3_keras.metrics import match_notes
from mt3_keras.notes import Note, map_program

END_BINS = (0.1, 0.4, 0.8, 1.6)  # seconds; a note's length falls below the first of them, or ...
MIN_END_TOLERANCE, END_TOLERANCE_RATIO = 0.05, 0.2  # those of onset + offset scores
DRUMS = "Drums"
_KIT_PIECES = {
    "bass drum": (35, 36), "side stick": (37,), "snare": (38, 40), "clap": (39,),
    "low tom": (41, 43), "mid tom": (45, 47), "high tom": (48, 50), "closed hi-hat": (42,),
    "pedal hi-hat": (44,), "open hi-hat": (46,), "crash": (49, 57), "ride": (51, 59),
    "china": (52,), "ride bell": (53,), "splash": (55,), "tambourine": (54,), "cowbell": (56,),
}  # fmt: skip
_PIECE_OF = {key: piece for piece, keys in _KIT_PIECES.items() for key in keys}
OTHER_PIECE = "other drum"
KIT_PIECES = (*_KIT_PIECES, OTHER_PIECE)

Confusion = Counter[tuple[str, str]]  # by (true name, name estimated)


def kit_piece(key: int) -> str:
    """The drum that a key of General MIDI's drum map stands for; toms by height, in pairs."""
    return _PIECE_OF.get(key, OTHER_PIECE)


@functools.cache
def class_name(program: int) -> str:
    """Name of the General MIDI class of a program."""
    import pretty_midi

    return str(pretty_midi.program_to_instrument_class(program))


CLASSES = tuple(class_name(first) for first in range(0, 128, 8))


def pair_found(
    reference: Sequence[Note], estimate: Sequence[Note], onset_tolerance: float = 0.05
) -> list[tuple[Note, Note]]:
    """Pairs notes by pitch and onset, drums by onset, each at most once.

    First as many as possible that agree on the class, of drums on the piece of the kit; then of
    the rest as many as possible that do not.
    """

    def same_name(note: Note) -> Note:
        if note.is_drum:
            return note._replace(pitch=KIT_PIECES.index(kit_piece(note.pitch)), program=0)
        return note._replace(program=map_program(note.program, "midi_class"))

    def any_name(note: Note) -> Note:
        return note._replace(pitch=0 if note.is_drum else note.pitch, program=0)

    pairs = []
    for view in (same_name, any_name):
        matching = match_notes(
            [view(note) for note in reference],
            [view(note) for note in estimate],
            onset_tolerance=onset_tolerance,
            offset_ratio=None,
        )
        pairs += [(reference[i], estimate[j]) for i, j in matching]
        true, estimated = ({pair[side] for pair in matching} for side in (0, 1))
        reference = [note for i, note in enumerate(reference) if i not in true]
        estimate = [note for j, note in enumerate(estimate) if j not in estimated]
    return pairs


def end_tolerance(note: Note) -> float:
    """Seconds that the end of a true note may be missed by."""
    return max(MIN_END_TOLERANCE, END_TOLERANCE_RATIO * (note.offset - note.onset))


@dataclasses.dataclass
class Findings:
    """What pieces have shown so far.

    Attributes:
      classes: classes of the pitched notes found, true against estimated.
      drums: pieces of the kit of the strokes found, likewise.
      keys: of each key of the drum map, strokes, strokes found, those estimated with their piece
        of the kit, and with their very key.
      ends: of each of the bins of `END_BINS`, errors of the notes found in seconds, positive where
        they end late, and whether that is too much.
      instruments: of each piece, classes estimated that are there, classes there, classes
        estimated.
    """

    classes: Confusion = dataclasses.field(default_factory=Counter)
    drums: Confusion = dataclasses.field(default_factory=Counter)
    keys: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    ends: list[list[tuple[float, bool]]] = dataclasses.field(
        default_factory=lambda: [[] for _ in range(len(END_BINS) + 1)]
    )
    instruments: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    def add(
        self,
        reference: Sequence[Note],
        estimate: Sequence[Note],
        *,
        onset_tolerance: float = 0.05,
        only_drums: bool = False,
    ) -> None:
        """Adds a piece.

        Args:
          reference: its true notes.
          estimate: the notes found.
          onset_tolerance: largest distance of two onsets, in seconds.
          only_drums: leave pitched notes out on both sides.
        """
        reference, estimate = (
            [n for n in notes if n.offset > n.onset and (n.is_drum or not only_drums)]
            for notes in (reference, estimate)
        )
        for note in (note for note in reference if note.is_drum):
            self.keys.setdefault(note.pitch, [0, 0, 0, 0])[0] += 1
        for true, estimated in pair_found(reference, estimate, onset_tolerance):
            if true.is_drum:
                self._add_stroke(true.pitch, estimated.pitch)
            else:
                self.classes[class_name(true.program), class_name(estimated.program)] += 1
                self._add_end(true, estimated)
        there, named = (
            {DRUMS if n.is_drum else class_name(n.program) for n in notes}
            for notes in (reference, estimate)
        )
        if there:
            self.instruments.append((len(there & named), len(there), len(named)))

    def _add_stroke(self, true: int, estimated: int) -> None:
        self.drums[kit_piece(true), kit_piece(estimated)] += 1
        counts = self.keys[true]
        counts[1] += 1
        counts[2] += kit_piece(true) == kit_piece(estimated)
        counts[3] += true == estimated

    def _add_end(self, true: Note, estimated: Note) -> None:
        length, error = true.offset - true.onset, estimated.offset - true.offset
        place = sum(length >= edge for edge in END_BINS)
        self.ends[place].append((error, abs(error) > end_tolerance(true)))


def named_right(confusion: Mapping[tuple[str, str], int]) -> dict[str, float]:
    """Of each true name, the share that is estimated by it."""
    totals: Counter[str] = Counter()
    for (true, _), count in confusion.items():
        totals[true] += count
    return {name: confusion.get((name, name), 0) / total for name, total in totals.items()}


def summarize(findings: Findings) -> dict[str, Any]:
    """All numbers: what `tables` writes, as plain values for a JSON file.

    "named_right" is the share of pitched notes found that have the right class, "class_mean" its
    mean over classes; likewise of drums. "detection" is means over pieces: precision, recall and
    F1 of the set of classes found, drums being one, and "leakage", classes found for each class
    there (1 is best; Tan et al. 2024, arXiv 2403.10024).
    """
    result: dict[str, Any] = {}
    for name, confusion in (("classes", findings.classes), ("drums", findings.drums)):
        shares, total = named_right(confusion), sum(confusion.values())
        right = sum(count for (true, estimated), count in confusion.items() if true == estimated)
        result[name] = {
            "found": total,
            "named_right": right / total if total else None,
            "class_mean": statistics.fmean(shares.values()) if shares else None,
            "named_right_by_class": shares,
            "confusion": [[*names, count] for names, count in sorted(confusion.items())],
        }
    result["keys"] = {
        str(key): {
            "piece": kit_piece(key),
            "strokes": strokes,
            "found": found / strokes,
            "recall": right / strokes,
            "recall_of_key": exact / strokes,
        }
        for key, (strokes, found, right, exact) in sorted(findings.keys.items())
    }
    result["kit_pieces"] = _summarize_pieces(findings)
    result["detection"] = _summarize_detection(findings.instruments)
    result["ends"] = [
        {"length": name, **_summarize_ends(ends)}
        for name, ends in zip(_bin_names(), findings.ends, strict=True)
    ]
    return result


def _summarize_pieces(findings: Findings) -> dict[str, dict[str, float]]:
    totals: Counter[str] = Counter()
    for key, counts in findings.keys.items():
        totals[kit_piece(key)] += counts[0]
    return {
        name: {
            "strokes": totals[name],
            "recall": findings.drums[name, name] / totals[name],
            "estimated": sum(
                n for (_, estimated), n in findings.drums.items() if estimated == name
            ),
        }
        for name in KIT_PIECES
        if totals[name]
    }


def _summarize_detection(pieces: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    if not pieces:
        return {}
    scores = {
        "precision": [hits / max(estimated, 1) for hits, _, estimated in pieces],
        "recall": [hits / there for hits, there, _ in pieces],
        "F1": [2 * hits / (there + estimated) for hits, there, estimated in pieces],
        "leakage": [estimated / there for _, there, estimated in pieces],
    }
    return {name: statistics.fmean(values) for name, values in scores.items()}


def _bin_names() -> list[str]:
    edges = [f"{edge:g}" for edge in END_BINS]
    between = [f"{low} to {high} s" for low, high in itertools.pairwise(edges)]
    return [f"below {edges[0]} s", *between, f"{edges[-1]} s and more"]


def _summarize_ends(ends: Sequence[tuple[float, bool]]) -> dict[str, float | None]:
    number = max(len(ends), 1)
    return {
        "notes": len(ends),
        "right": sum(not wrong for _, wrong in ends) / number,
        "early": sum(wrong and error < 0 for error, wrong in ends) / number,
        "late": sum(wrong and error > 0 for error, wrong in ends) / number,
        "median_error": statistics.median(error for error, _ in ends) if ends else None,
    }


def tables(summary: Mapping[str, Any]) -> str:
    """The numbers of `summarize` as text."""
    orders = {"classes": CLASSES, "drums": KIT_PIECES}
    parts = [
        _confusion_table(name, summary[name], order)
        for name, order in orders.items()
        if summary[name]["found"]
    ]
    if summary["kit_pieces"]:
        parts += [_pieces_table(summary["kit_pieces"]), _keys_table(summary["keys"])]
    if any(row["notes"] for row in summary["ends"]):
        parts.append(_ends_table([row for row in summary["ends"] if row["notes"]]))
    if summary["detection"]:
        estimated = (f"{name} {value:.3f}" for name, value in summary["detection"].items())
        parts.append(f"instruments of a piece, means over pieces: {', '.join(estimated)}")
    return "\n\n".join(parts)


def groups_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each group of pieces: how much of what was found is named right."""
    rows = []
    for group, summary in summaries.items():
        shares = [
            summary[name][column]
            for name in ("classes", "drums")
            for column in ("named_right", "class_mean")
        ]
        shares += [summary["detection"].get(name) for name in ("F1", "leakage")]
        counts = (f"{summary[name]['found']}" for name in ("classes", "drums"))
        rows.append((group, *counts, *("-" if s is None else f"{s:.3f}" for s in shares)))
    columns = ("notes", "strokes", "named right", "class mean", "drums right", "drum mean")
    return _text_table(("names, of what was found in", *columns, "instr. F1", "leakage"), rows)


def _pieces_table(pieces: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (name, f"{row['strokes']}", f"{row['recall']:.2f}", f"{row['estimated']}")
        for name, row in pieces.items()
    ]
    return _text_table(("piece of the kit", "strokes", "recall", "estimated"), rows)


def _keys_table(keys: Mapping[str, Mapping[str, Any]]) -> str:
    columns = ("found", "recall", "recall_of_key")
    rows = [
        (f"{key} {row['piece']}", f"{row['strokes']}", *(f"{row[name]:.2f}" for name in columns))
        for key, row in keys.items()
    ]
    return _text_table(("drum key", "strokes", "as any drum", "recall", "as this key"), rows)


def _ends_table(ends: Sequence[Mapping[str, Any]]) -> str:
    columns = ("right", "early", "late")
    rows = [
        (
            row["length"],
            f"{row['notes']}",
            *(f"{row[name]:.2f}" for name in columns),
            f"{1000 * row['median_error']:+.0f} ms",
        )
        for row in ends
    ]
    return _text_table(("ends of notes found", "notes", *columns, "median error"), rows)


def _confusion_table(name: str, estimated: Mapping[str, Any], order: Sequence[str]) -> str:
    """True names down, estimated ones across, as shares of each row."""
    counts = {(true, found): count for true, found, count in estimated["confusion"]}
    rows_of = [one for one in order if any(true == one for true, _ in counts)]
    columns = [one for one in order if any(one in names for names in counts)]
    rows = []
    for true in rows_of:
        total = sum(counts.get((true, found), 0) for found in columns)
        shares = (100 * counts.get((true, found), 0) / total for found in columns)
        rows.append(
            (true, str(total), *(f"{share:.0f}" if share >= 0.5 else "." for share in shares))
        )
    heading = (f"{name}: % of row", "found", *(column[:9] for column in columns))
    line = (
        f"{estimated['found']} found; named right {estimated['named_right']:.3f}, "
        f"mean over {len(rows_of)} {name} {estimated['class_mean']:.3f}"
    )
    return f"{_text_table(heading, rows)}\n{line}"


def _text_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (heading, *rows)) for i in range(len(heading))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heading, *rows)
    )
