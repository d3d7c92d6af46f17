"""The history of a model: a line of a CSV file for each time that it was scored, and its picture.

The runs between two lines may be lost once the second is written: its sums go on from the first's.
"""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mt3_keras.files import replacing
from train.scores import COLUMNS

RUN_COLUMNS = ("updates", "hours_trained", "hours_heard")


class HistoryError(ValueError):
    """A log that cannot be read or continued: one line naming it, and the cure."""


def describe_run(folder: pathlib.Path) -> dict[str, float]:
    """Reads a run's `log.jsonl`: updates, hours of training and of audio, last losses."""
    path = folder / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        last = lines[-1]
        # A run resumed for one update, which is not timed, logs no speed.
        timed = [line for line in lines if "audio_per_second" in line] or [last]
        trained = sum(line["seconds"] for line in timed)
        heard = sum(line["seconds"] * line["audio_per_second"] for line in timed)
        figures = (last["step"], trained / 3600, heard / 3600)
        losses = {name: last[name] for name in sorted(last) if name.endswith("_loss")}
    except OSError as error:
        raise HistoryError(f"{path}: cannot be read ({error.strerror}); is it a run?") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise HistoryError(f"{path}: not the log of a run with a line of training") from error
    return dict(zip(RUN_COLUMNS, figures, strict=True)) | losses


def describe_runs(folders: Sequence[pathlib.Path]) -> dict[str, float]:
    """The same of runs that each began with the weights of the one before: sums, last losses."""
    runs = [describe_run(folder) for folder in folders]
    return runs[-1] | {name: sum(run[name] for run in runs) for name in RUN_COLUMNS}


def append_scores(
    path: pathlib.Path, run: Mapping[str, float], summary: Mapping[str, Mapping[str, float]]
) -> None:
    """Adds a line and draws all, in a PNG file beside it: losses and scores by hours of training.

    The line holds what `describe_runs` finds in the runs since the line before, updates and hours
    added to that line's, and the mean scores of each group. What earlier lines do not have, such
    as the loss of a part that is new, is empty in them.

    Raises:
      HistoryError: the file is another table, or cannot be read or written.
    """
    row: dict[str, Any] = dict(run)
    for group, scores in summary.items():
        for column in COLUMNS:
            row[f"{group}: {column}"] = scores.get(column, "")
    try:
        rows, columns = [], list(row)
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
                columns = list(reader.fieldnames or ())
                if columns[: len(RUN_COLUMNS)] != list(RUN_COLUMNS):
                    raise HistoryError(f"{path}: is not such a log; give another --log")
                columns += [name for name in row if name not in columns]
            if rows:
                row |= {name: row[name] + float(rows[-1][name]) for name in RUN_COLUMNS}
                row["updates"] = round(row["updates"])
        rows.append({name: value and round(value, 4) for name, value in row.items()})
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        _plot(rows, path.with_suffix(".png"))
    except HistoryError:
        raise
    except OSError as error:
        raise HistoryError(f"{path}: cannot be written ({error.strerror})") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise HistoryError(f"{path}: is not such a log ({error}); give another --log") from error


def _plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    from mt3_keras.plots import plot_curves

    numbers = [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in rows]
    scores = [f"{kind}: {column}" for kind in ("real", "rendered") for column in COLUMNS]
    found = [name for name in scores if any(name in row for row in numbers)]
    plot_curves(numbers, path, along="hours_trained", scores=found)
