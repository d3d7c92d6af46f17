"""Scores a model on a split of a data set, or on a folder of recordings with references.

    python -m train.evaluate --model MODEL --dataset maestro --root DIR --split validation
    python -m train.evaluate --model MODEL --data DIR_WITH_MANIFEST

MODEL may be a run's folder; --log FILE.csv then keeps its history. Prints a table by item, by
instrument and overall; --json writes all scores and the notes, --png a picture. An item that cannot
be used is left out and named.

A data set is named by the flags of train.prepare (see its --help for --option). `manifest.json`
lists "items", each with "id", "audio", "midi" (paths in the folder) and, where they differ from the
defaults, "kind" ("real"; else "rendered"), "onset_tolerance_s" (0.05) and "eval" ("notes"; what
begins with "drum" is scored on its drums alone). train.prepare --clips writes such a folder.

Beside the scores there are tables of what is taken for what, over the notes found (right pitch,
onset within the tolerance, whatever instrument): of classes and of the pieces of a drum kit, and
where the ends of these notes fall; see train/confusions.py.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from mt3_keras.cli.command_line import Command, Flags, UsageError, run
from mt3_keras.cli.model_flags import define_model_flags, load_transcriber
from train.prepare import define_dataset_flags, find_sources

if TYPE_CHECKING:
    from mt3_keras.notes import Note
    from train.scores import Item

GRANULARITIES = {"class": "midi_class", "program": "full"}


def read_manifest(folder: pathlib.Path) -> list[Item]:
    """The items of `manifest.json`; one that is wrong raises that when it is loaded.

    Raises:
      ValueError: there is no manifest of that form.
    """
    from mt3_keras.data.folder import read_manifest

    return [_to_item(folder, entry, i) for i, entry in enumerate(read_manifest(folder))]


def _to_item(folder: pathlib.Path, entry: Any, number: int) -> Item:
    from mt3_keras.data.example import DatasetError
    from mt3_keras.data.folder import check_item
    from mt3_keras.midi import read_midi
    from train.scores import Item

    def refuse() -> tuple[pathlib.Path, Sequence[Note]]:
        raise DatasetError(fault)

    try:
        pair = check_item(folder, entry)
        tolerance = float(entry.get("onset_tolerance_s", 0.05))
    except (ValueError, TypeError) as error:
        fault = str(error)
        name = entry.get("id") if isinstance(entry, dict) else None
        return Item(id=str(name or f"item {number}"), load=refuse)
    words = pair.id.split("_")  # such as real_violin_..., synth_band_...
    kind = "real" if str(entry.get("kind", "real")).startswith("real") else "rendered"
    return Item(
        id=pair.id,
        load=lambda: (pair.audio, read_midi(pair.midi)),
        groups=(kind, f"{kind} {words[1] if len(words) > 1 else 'all'}"),
        onset_tolerance=tolerance,
        only_drums=str(entry.get("eval", "notes")).startswith("drum"),
    )


def read_split(values: flags.FlagValues, split: str) -> list[Item]:
    """The items of a data set's split; ValueError if it cannot be found."""
    import functools

    from mt3_keras.metrics import CERBERUS4_TRACKS
    from train.scores import Item

    return [
        Item(
            id=source.id,
            load=functools.partial(_load_whole, source.load),
            groups=(split,) if len(values.split) > 1 else (),
            tracks=CERBERUS4_TRACKS if values.dataset == "cerberus4" else (),
        )
        for source in find_sources(values, split)[0]
    ]


def _load_whole(load: Any) -> tuple[Any, Sequence[Note]]:
    import numpy as np

    samples, notes = load()
    if isinstance(samples, np.ndarray):
        return samples, notes
    return np.concatenate(list(samples)), notes


def _define_flags(add: Flags) -> None:
    define_model_flags(add)
    define_dataset_flags(add, split="validation", num_examples=40)
    add.text("data", None, "Folder with manifest.json, instead of a data set.")
    add.text("only", "", "Score only items whose id holds this.")
    add.choice("by", "class", list(GRANULARITIES), "How finely instruments are distinguished.")
    add.text("json", None, "Write all scores and notes here.")
    add.text("png", None, "Write a picture of the tables here.")
    add.text(
        "log", None, "Append a line to this CSV file: hours, losses, mean scores; drawn as .png."
    )
    add.names(
        "runs",
        [],
        "The runs since the last line of --log, each begun with the weights of the one before; by "
        "default MODEL alone.",
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 failed or some items left out, 2 wrong usage."""
    usage = "--model=MODEL (--dataset=NAME --root=DIR | --data=DIR) [FLAGS]"
    return run("train.evaluate", Command(usage, __doc__, _define_flags, _evaluate), argv)


def _evaluate(values: flags.FlagValues, _: list[str]) -> int:
    if bool(values.data) == bool(values.dataset):
        raise UsageError("either --dataset or --data is needed: what to score the model on")
    from train import scores
    from train.history import append_scores, describe_runs

    if values.data:
        items = read_manifest(pathlib.Path(values.data))
    else:
        items = [item for split in values.split for item in read_split(values, split)]
    items = [item for item in items if values.only in item.id]
    history = {}
    if values.log:
        runs = values.runs or [values.model or "small"]
        history = describe_runs([pathlib.Path(run) for run in runs])
    result = scores.evaluate(load_transcriber(values), items, granularity=GRANULARITIES[values.by])
    print(scores.report(result))
    if values.json:
        from mt3_keras.files import replacing

        with replacing(values.json) as temporary:
            temporary.write_text(json.dumps(result) + "\n")
    if values.png:
        scores.plot_scores(result, pathlib.Path(values.png))
    if values.log:
        append_scores(pathlib.Path(values.log), history, result["summary"])
    scores.tell_left_out(result)
    return 1 if result["left_out"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
