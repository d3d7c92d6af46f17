"""Pictures of notes: what is drawn is what was played, everywhere in the same colors."""

from __future__ import annotations

import re

import numpy as np
import pytest
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mt3_keras.notes import Note
from mt3_keras.plots import part_color, piano_roll, pitch_name, plot_piano_roll

NOTES = [
    Note(0.0, 1.0, 60, 127),
    Note(1.0, 1.5, 64, 20, program=40),
    Note(0.5, 0.51, 36, 90, is_drum=True),
    Note(1.5, 1.51, 42, 40, is_drum=True),
]
LONG = [Note(i / 2, i / 2 + 0.4, 40 + i % 30, 1 + i % 127, i % 3) for i in range(200)]


def collections_of(axes, kind) -> list:
    return [found for found in axes.collections if type(found) is kind]


def test_each_note_is_drawn_at_its_time_and_pitch_the_louder_the_darker():
    axes = piano_roll(NOTES)
    (boxes,) = collections_of(axes, PolyCollection)
    corners = {tuple(path.vertices.min(axis=0).round(2)) for path in boxes.get_paths()}
    assert corners == {(0.0, 59.58), (1.0, 63.58)}
    colors = {to_hex(color) for color in boxes.get_facecolor()}
    assert part_color(0, False) in colors  # at full velocity
    soft = np.array([color for color in boxes.get_facecolor() if to_hex(color) != "#3b6fb6"])
    assert (soft[0, :3] > np.array([0.77, 0.27, 0.29])).all()  # strings, mixed with white
    (strokes,) = collections_of(axes, PathCollection)
    assert strokes.get_offsets()[:, 0].tolist() == [0.5, 1.5]
    names = [label.get_text() for label in axes.get_yticklabels()]
    rows = dict(zip(names, axes.get_yticks(), strict=True))
    assert rows["Bass Drum 1"] == strokes.get_offsets()[0, 1]
    assert rows["C4"] == 60


def test_axes_of_the_callers_are_drawn_on_with_bars_where_they_are_known():
    axes = Figure().add_subplot()
    assert piano_roll(NOTES, axes, bars=[0.25, 0.75, 1.25]) is axes
    assert axes.get_xticks().tolist() == [0.25, 0.75, 1.25]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]
    later = piano_roll(NOTES, start=0.5, bars=[0.25, 0.75, 1.25])
    assert [label.get_text() for label in later.get_xticklabels()] == ["2", "3"]


def test_nothing_is_drawn_as_nothing():
    assert not collections_of(piano_roll([]), PolyCollection)[0].get_paths()


@pytest.mark.parametrize(("bars", "rows"), [([], 5), ([0.1 + 4.5 * i for i in range(23)], 6)])
def test_a_long_recording_takes_rows_and_pages(tmp_path, bars, rows):
    for kind in ("png", "svg", "pdf"):
        plot_piano_roll(LONG, tmp_path / f"long.{kind}", bars=bars, title="$ long")
    svg = (tmp_path / "long.svg").read_text()
    assert svg.count('id="axes_') == rows  # with bars they end at the last line before 20 s
    pages = re.findall(rb"/Type /Page\b", (tmp_path / "long.pdf").read_bytes())
    assert len(pages) == 2
    with pytest.raises(ValueError, match=r"a picture is a .png, .svg or .pdf file"):
        plot_piano_roll(NOTES, tmp_path / "notes.gif")


def test_programs_of_a_class_share_its_hue_and_differ():
    colors = [part_color(program, False) for program in range(128)]
    assert len({*colors}) == 128
    assert part_color(0, True) not in colors
    assert [pitch_name(pitch) for pitch in (21, 60, 70, 108)] == ["A0", "C4", "Bb4", "C8"]
