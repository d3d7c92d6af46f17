"""Drives the page of `make web` in a real browser, as web/test/drive.mjs describes."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mt3_keras.cli.command_line import UsageError
from mt3_keras.cli.serve import PageServer
from mt3_keras.notes import Note

ROOT = pathlib.Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
STEP = 0.016  # seconds, of a frame


def find_browser() -> str | None:
    """The program of a browser that can be driven; None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[str]:
    """The address of a page while the block runs."""
    server = PageServer(folder, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def drive(
    page: pathlib.Path, out_dir: pathlib.Path, tasks: Sequence[Mapping[str, Any]], timeout: float
) -> list[dict[str, Any]]:
    """What the page answers to tasks, each in a tab of its own.

    Args:
      page: folder of the page.
      out_dir: folder of downloads and pictures.
      tasks: names of actions in web/test/drive.mjs, "do", with their arguments.
      timeout: seconds for all of them.

    Raises:
      UsageError: there is no page or no browser.
      RuntimeError: a task did not come to its end, or the page asked another host or raised.
    """
    if not (page / "model/model.json").is_file():
        raise UsageError(f"{page}: holds no page; build it with make web")
    browser = find_browser()
    if browser is None:
        raise UsageError(f"a browser is needed: {' or '.join(BROWSERS[:2])}")
    driver = os.fspath(ROOT / "web/test/drive.mjs")
    with serving(page) as address:
        done = subprocess.run(
            ["node", driver, browser, address, os.fspath(out_dir)],
            input=json.dumps(list(tasks)),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    if done.returncode:
        raise RuntimeError(f"{driver}: {done.stderr.strip()}")
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    for answer in answers:
        if answer["foreign"] or answer["failures"]:
            raise RuntimeError(f"the page asked {answer['foreign']}, raised {answer['failures']}")
    return answers


def to_notes(found: Sequence[Mapping[str, Any]]) -> list[Note]:
    """Notes as the page has them -> as Python has them."""
    names = ("onset", "offset", "pitch", "velocity", "program", "isDrum")
    return [Note(*(note[name] for name in names)) for note in found]


def count_same(found: Sequence[Note], expected: Sequence[Note], tolerance: float = STEP) -> int:
    """How many notes have their like: key and instrument, ends within `tolerance`, loudness by 1.

    Notes of one key are paired in their order.
    """
    count = 0
    ours, theirs = _by_key(found), _by_key(expected)
    for key in ours.keys() & theirs.keys():
        rest = theirs[key]
        for note in ours[key]:
            away = np.abs(np.array(rest) - note)
            fits = (away[:, :2] <= tolerance + 1e-6).all(axis=1) & (away[:, 2] <= 1)
            if fits.any():
                count += 1
                rest = rest[int(fits.argmax()) + 1 :]
            if not rest:
                break
    return count


def _by_key(notes: Sequence[Note]) -> dict[tuple[Any, ...], list[tuple[float, float, int]]]:
    found: dict[tuple[Any, ...], list[tuple[float, float, int]]] = {}
    for note in sorted(notes):
        key = (note.is_drum, note.program, note.pitch)
        found.setdefault(key, []).append((note.onset, note.offset, note.velocity))
    return found
