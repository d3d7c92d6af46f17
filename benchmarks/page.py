"""The page in a real Chromium against Python: notes, speed, memory, what it downloads; pictures.

    make web && python -m benchmarks.page [--page build/web] [--data DIR_WITH_MANIFEST] [AUDIO ...]
    python -m benchmarks.page --pictures docs

The model is the page's, which Python runs on LiteRT. "Equal": notes of the same key and instrument
whose ends are within a frame of 16 ms and whose velocity within 1. Times are of the tab's process:
"s" on the clock, "cpu" of all its threads; memory is its peak. `--pictures` writes those of the
documentation (`make pictures`), from the example: page.png, page_dark.png, page_phone.png,
page_phone_dark.png and, drawn by Python, band.png.
"""

from __future__ import annotations

import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks.browser import ROOT, count_same, drive, to_notes
from benchmarks.machine import describe_machine
from mt3_keras import __main__
from mt3_keras.cli.command_line import Command, Flags, run
from mt3_keras.transcriber import Transcriber
from train.evaluate import read_manifest

EXAMPLE = ROOT / "examples" / "band.flac"
PICTURES = {
    "page.png": (1280, 900, "light"),
    "page_dark.png": (1280, 900, "dark"),
    "page_phone.png": (390, 844, "light"),
    "page_phone_dark.png": (390, 844, "dark"),
}
ROLL = "band.png"
TIMEOUT = 3600.0  # seconds


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.page", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.text("page", "build/web", "Folder of the page.")
    add.text("model", "small", "That of the page.")
    add.text("data", None, "Folder with manifest.json.")
    add.text("pictures", None, "Write pictures into this folder.")


def _compare(values: flags.FlagValues, audio: list[str]) -> None:
    """Prints a table, or writes pictures."""
    page = pathlib.Path(values.page)
    if values.pictures:
        take_pictures(page, pathlib.Path(values.pictures), values.model)
        return
    paths = list(map(pathlib.Path, audio))
    if values.data:
        paths += [pathlib.Path(i.load()[0]) for i in read_manifest(pathlib.Path(values.data))]
    print(f"machine: {describe_machine()}")
    print(report(page, paths or [EXAMPLE], values.model))


def take_pictures(page: pathlib.Path, out_dir: pathlib.Path, model: str) -> None:
    """Writes `PICTURES` of the example's notes, and `ROLL`."""
    pictures = [[*size, name] for name, size in PICTURES.items()]
    task = {"do": "transcribe", "file": str(EXAMPLE), "pictures": pictures}
    drive(page, out_dir, [task], TIMEOUT)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["transcribe", str(EXAMPLE), "--model", model, "--formats", "png"]
        if __main__.main([*arguments, "--output_dir", folder]):
            sys.exit(1)
        shutil.copyfile(pathlib.Path(folder) / "band.png", out_dir / ROLL)
    print("wrote " + ", ".join(str(out_dir / name) for name in (*PICTURES, ROLL)))


def report(page: pathlib.Path, paths: Sequence[pathlib.Path], model: str) -> str:
    """The table, and what was downloaded."""
    transcriber = Transcriber.from_preset(model, engine="litert")
    tasks: list[dict[str, Any]] = [{"do": "transcribe", "file": str(path)} for path in paths]
    tasks[0]["isPlayed"] = True
    with tempfile.TemporaryDirectory() as folder:
        answers = drive(page, pathlib.Path(folder), tasks, TIMEOUT)
    lines = [f"{'recording':46} seconds  page python  equal      s    cpu    MB"]
    totals = dict.fromkeys(("seconds", "page", "python", "equal", "s", "cpu"), 0.0)
    for path, answer in zip(paths, answers, strict=True):
        notes = to_notes(answer["notes"])
        expected = transcriber.transcribe(path).notes
        row = {
            "seconds": answer["duration"],
            "page": len(notes),
            "python": len(expected),
            "equal": count_same(notes, expected),
            "s": answer["seconds"],
            "cpu": answer["cpuSeconds"],
        }
        totals = {name: totals[name] + value for name, value in row.items()}
        lines.append(f"{_format(path.stem, row)} {answer['peakBytes'] / 1e6:5.0f}")
    lines.append(_format("all", totals))
    seconds = totals["seconds"]
    lines.append(
        f"a second of audio: {totals['s'] / seconds:.3f} s, {totals['cpu'] / seconds:.3f} cpu"
    )
    sizes = answers[0]["downloaded"]
    lines.append(
        f"downloaded: {sizes['before'] / 1e6:.1f} MB, and {sizes['sounds'] / 1e6:.1f} MB to play"
    )
    return "\n".join(lines)


def _format(name: str, row: dict[str, float]) -> str:
    counts = f"{row['page']:5.0f} {row['python']:6.0f} {row['equal']:6.0f}"
    return f"{name:46} {row['seconds']:7.1f} {counts} {row['s']:6.2f} {row['cpu']:6.2f}"


COMMAND = Command("[AUDIO ...] [FLAGS]", __doc__, _define_flags, _compare, takes_arguments=True)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
