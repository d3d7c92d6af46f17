"""Pictures of notes and of training logs.

Figures are made without pyplot: no screen is needed, and no state of the process is changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mt3_keras.files import replacing
from mt3_keras.midi import instrument_name
from mt3_keras.notes import Note

COLORS = [*color_sequences["tab20"][::2], *color_sequences["tab20"][1::2]]
# Of the General MIDI classes, piano to sound effects: the same in every picture and on the page.
CLASS_COLORS = (
    *("#3b6fb6", "#5aa9d6", "#8a6bbf", "#e07b39", "#96603f", "#c4454a", "#d4679a", "#d9a514"),
    *("#8a9a1f", "#3c9a5f", "#1f8f8f", "#b06fd0", "#6f7f92", "#a58a5a", "#5f6f3f", "#9a9a9a"),
)
DRUM_COLOR = "#78828e"
LIGHTEST = 0.45  # share of white in the color of the last program of a class
SECONDS_PER_INCH = 2.5
MAX_INCHES = 200.0
MIN_WIDTH = 0.06  # seconds; drum hits last 0.01


def part_color(program: int, is_drum: bool) -> str:
    """The color of an instrument, "#rrggbb": that of its class, lighter for later programs."""
    if is_drum:
        return DRUM_COLOR
    color = to_rgb(CLASS_COLORS[program // 8])
    white = LIGHTEST * (program % 8) / 7
    return to_hex([channel + white * (1 - channel) for channel in color])


def plot_piano_roll(
    notes: Sequence[Note], path: str | os.PathLike[str], *, title: str = "", duration: float = 0.0
) -> None:
    """Draws notes as a PNG: pitch over time, a colour for each instrument, drums in a row below.

    Args:
      notes: in seconds, in any order.
      path: the file to write.
      title: by default the number of notes.
      duration: seconds to show; at least up to the last note.
    """
    duration = max([duration, 1.0, *(note.offset for note in notes)])
    parts: dict[tuple[bool, int], list[Note]] = {}
    for note in notes:
        parts.setdefault((note.is_drum, 0 if note.is_drum else note.program), []).append(note)
    width = min(MAX_INCHES, max(8.0, duration / SECONDS_PER_INCH))
    figure = Figure(figsize=(width, 6.5), layout="constrained")
    pitched, drums = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    handles: list[Rectangle] = []
    for (is_drum, program), part in sorted(parts.items()):
        color = "0.25" if is_drum else COLORS[len(handles) % len(COLORS)]
        handles.append(
            Rectangle((0, 0), 1, 1, color=color, label=instrument_name(program, is_drum))
        )
        _draw(drums if is_drum else pitched, part, color)
    _frame_axes(pitched, [n.pitch for n in notes if not n.is_drum] or [60], "pitch (MIDI)")
    _frame_axes(drums, [n.pitch for n in notes if n.is_drum] or [40], "drum (MIDI)")
    drums.set_xlim(0, duration)
    drums.set_xlabel("time (s)")
    pitched.set_title(title or f"{len(notes)} notes", loc="left")
    if handles:
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _draw(axes: Axes, part: Sequence[Note], color: object) -> None:
    boxes = [
        Rectangle((n.onset, n.pitch - 0.4), max(n.offset - n.onset, MIN_WIDTH), 0.8) for n in part
    ]
    axes.add_collection(PatchCollection(boxes, facecolor=color, edgecolor="white", linewidth=0.4))


def _frame_axes(axes: Axes, pitches: Sequence[int], label: str) -> None:
    axes.set_ylim(min(pitches) - 2, max(pitches) + 2)
    axes.set_ylabel(label)
    axes.grid(axis="x", alpha=0.3)


def plot_curves(
    rows: Sequence[Mapping[str, float]],
    path: str | os.PathLike[str],
    *,
    along: str = "step",
    scores: Sequence[str] = (),
) -> None:
    """Draws a training log as a PNG: losses by part, and scores if there are any.

    Args:
      rows: figures by name; names as in a run's `log.jsonl`.
      path: the file to write.
      along: what runs to the right.
      scores: names of figures from 0 to 1; by default those of validation.
    """
    names = sorted({name for row in rows for name in row})
    losses = [name for name in names if name.endswith("_loss") and name != "val_loss"]
    scores = scores or [name for name in names if name.endswith("_f1")]
    num_panels = 2 if scores else 1
    figure = Figure(figsize=(9, 4.5 * num_panels), layout="constrained")
    axes = figure.subplots(num_panels, 1, sharex=True, squeeze=False)
    parts = sorted({name.removeprefix("val_") for name in losses})
    colors = dict(zip(parts, COLORS * len(parts), strict=False))
    of_losses = {name: colors[name.removeprefix("val_")] for name in losses}
    _draw_curves(axes[0, 0], rows, along, of_losses)
    axes[0, 0].set(ylabel="loss (dashed: validation)", yscale="log")
    if scores:
        _draw_curves(axes[1, 0], rows, along, dict(zip(scores, COLORS, strict=False)))
        axes[1, 0].set(ylabel="F1", ylim=(0, 1))
    axes[-1, 0].set_xlabel("updates" if along == "step" else along.replace("_", " "))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_curves(
    axis: Axes, rows: Sequence[Mapping[str, float]], along: str, colors: Mapping[str, object]
) -> None:
    for name, color in colors.items():
        points = [(row[along], row[name]) for row in rows if name in row]
        is_loss_of_validation = name.startswith("val_") and name.endswith("_loss")
        label = None if is_loss_of_validation else name.removesuffix("_loss")
        line = "--" if is_loss_of_validation else "-"
        axis.plot(*zip(*points, strict=True), line, color=color, label=label, linewidth=1)
    if colors:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axis.grid(alpha=0.3)
