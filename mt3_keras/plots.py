"""Pictures of notes and of training logs.

Figures are made without pyplot: no screen is needed, and no state of the process is changed.
"""

from __future__ import annotations

import bisect
import math
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pretty_midi
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mt3_keras.files import replacing
from mt3_keras.instrument_names import instrument_name
from mt3_keras.notes import Note

COLORS = [*color_sequences["tab20"][::2], *color_sequences["tab20"][1::2]]
# Of the General MIDI classes, piano to sound effects: the same in every picture and on the page.
CLASS_COLORS = (
    *("#3b6fb6", "#5aa9d6", "#8a6bbf", "#e07b39", "#96603f", "#c4454a", "#d4679a", "#d9a514"),
    *("#8a9a1f", "#3c9a5f", "#1f8f8f", "#b06fd0", "#6f7f92", "#a58a5a", "#5f6f3f", "#9a9a9a"),
)
DRUM_COLOR = "#78828e"
LIGHTEST = 0.45  # share of white in the color of the last program of a class
SOFTEST = 0.6  # share of white in the color of a note of velocity 1
LETTERS = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
BLACK_KEYS = (1, 3, 6, 8, 10)
FEWEST_PITCHES = 24  # that are shown, however few are played
DRUM_ROW = 2.0  # semitones
MIN_WIDTH = 0.04  # seconds that a note is drawn at least
KEY_WIDTH = 0.022  # of the axes' width
ROW_SECONDS, ROW_INCHES, WIDTH_INCHES = 20.0, (2.2, 6.0), 13.0
MARGIN_INCHES = (1.25, 2.3, 0.5, 0.35, 0.4)  # left, right, top, bottom, between rows
MAX_ROWS, PAGE_ROWS = 40, 4  # of one picture; of a page in a PDF
BAR_LABELS = 12  # at most, along a row


def part_color(program: int, is_drum: bool) -> str:
    """The color of an instrument, "#rrggbb": that of its class, lighter for later programs."""
    if is_drum:
        return DRUM_COLOR
    return to_hex(_lighten(CLASS_COLORS[program // 8], LIGHTEST * (program % 8) / 7))


def _lighten(color: str, white: float) -> tuple[float, float, float]:
    red, green, blue = (channel + white * (1 - channel) for channel in to_rgb(color))
    return red, green, blue


def pitch_name(pitch: int) -> str:
    """The name of a pitch, of which middle C, 60, is C4."""
    return f"{LETTERS[pitch % 12]}{pitch // 12 - 1}"


def piano_roll(
    notes: Collection[Note],
    ax: Axes | None = None,
    *,
    start: float = 0.0,
    end: float | None = None,
    bars: Sequence[float] = (),
    legend: bool = True,
    like: Collection[Note] = (),
) -> Axes:
    """Draws notes: pitch over time, a color for each instrument, drums in rows of their own below.

    The louder a note, the darker it is.

    Args:
      notes: in seconds, in any order.
      ax: matplotlib's axes to draw on; None makes a figure, which is the result's `figure`.
      start: of the time that is shown, in seconds.
      end: of it; None is the end of the last note.
      bars: times of bar lines, in seconds, increasing; the first begins bar 1. Without them
        minutes and seconds are shown.
      legend: name the instruments beside the axes.
      like: notes whose pitches and drums are shown too, so that several axes are alike.

    Returns:
      The axes.

    Example:
      >>> from mt3_keras import Note
      >>> from mt3_keras.plots import piano_roll
      >>> piano_roll([Note(0.0, 1.0, pitch=60, velocity=90)]).figure.savefig("notes.svg")
    """
    if ax is None:
        figure = Figure(figsize=(WIDTH_INCHES, 5), layout="constrained")
        ax = figure.add_subplot()
    if end is None:
        end = max([start + 1.0, *(note.offset for note in notes)])
    shown = [note for note in notes if note.offset > start and note.onset < end]
    everything = [*shown, *like]
    pitches = _pitch_range([note.pitch for note in everything if not note.is_drum])
    drums = sorted({note.pitch for note in everything if note.is_drum})
    rows = {drum: pitches[0] - 2 - DRUM_ROW * (len(drums) - i) for i, drum in enumerate(drums)}
    ax.set_xlim(start, end)
    ax.set_ylim(pitches[0] - 3.5 - DRUM_ROW * len(drums), pitches[-1] + 0.5)
    _draw_keys(ax, pitches, rows)
    _draw_notes(ax, [note for note in shown if not note.is_drum])
    _draw_strokes(ax, [note for note in shown if note.is_drum], rows)
    _label_time(ax, [bar for bar in bars if start <= bar < end], bisect.bisect_left(bars, start))
    if legend and shown:
        handles = _legend_handles(shown)
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.005, 1), frameon=False)
    return ax


def _pitch_range(pitches: Sequence[int]) -> range:
    lowest, highest = min(pitches, default=60) - 2, max(pitches, default=60) + 2
    more = max(0, FEWEST_PITCHES - (highest - lowest + 1))
    return range(max(0, lowest - more // 2), highest + (more + 1) // 2 + 1)


def _draw_keys(ax: Axes, pitches: range, rows: Mapping[int, float]) -> None:
    """A keyboard at the left, rows of black keys, lines of octaves, names of notes and drums."""
    keys = ax.get_yaxis_transform()  # x in widths of the axes, y in pitches

    def key(width: float, bottom: float, height: float, color: str, order: float) -> None:
        ax.add_patch(
            Rectangle(
                (-KEY_WIDTH, bottom),
                width,
                height,
                transform=keys,
                clip_on=False,
                facecolor=color,
                edgecolor="0.5",
                linewidth=0.4,
                zorder=order,
            )
        )

    key(KEY_WIDTH, pitches[0] - 0.5, len(pitches), "white", 3)
    for pitch in pitches:
        if pitch % 12 in BLACK_KEYS:
            ax.axhspan(pitch - 0.5, pitch + 0.5, color="0.96", linewidth=0, zorder=0)
            key(0.6 * KEY_WIDTH, pitch - 0.5, 1, "0.15", 4)
        elif pitch % 12 in (0, 5):  # two white keys side by side
            key(KEY_WIDTH, pitch - 0.5, 0, "0.5", 3.5)
            if pitch % 12 == 0:
                ax.axhline(pitch - 0.5, color="0.8", linewidth=0.7, zorder=0.5)
    ax.axhline(pitches[0] - 0.5, color="0.5", linewidth=0.7)
    octaves = [pitch for pitch in pitches if pitch % 12 == 0]
    names = [pretty_midi.note_number_to_drum_name(drum) for drum in rows]
    ax.set_yticks([*octaves, *rows.values()], [*map(pitch_name, octaves), *names])
    ax.tick_params(axis="y", length=0, pad=3 + 72 * KEY_WIDTH * _width_inches(ax))
    for label in ax.get_yticklabels()[len(octaves) :]:
        label.set_fontsize(6.5)


def _width_inches(ax: Axes) -> float:
    figure: Figure = ax.get_figure(root=True)  # type: ignore[assignment]
    return float(ax.get_position().width * figure.get_figwidth())


def _draw_notes(ax: Axes, notes: Sequence[Note]) -> None:
    corners = np.array([(0, -0.42), (0, 0.42), (1, 0.42), (1, -0.42)])
    boxes, colors = [], []
    for note in sorted(notes, key=lambda note: note.velocity):
        length = max(note.offset - note.onset, MIN_WIDTH)
        boxes.append(corners * (length, 1) + (note.onset, note.pitch))
        white = SOFTEST * (1 - note.velocity / 127)
        colors.append(_lighten(part_color(note.program, False), white))
    edges = [tuple(0.6 * channel for channel in color) for color in colors]
    ax.add_collection(
        PolyCollection(boxes, facecolors=colors, edgecolors=edges, linewidths=0.3, zorder=2)
    )


def _draw_strokes(ax: Axes, strokes: Sequence[Note], rows: Mapping[int, float]) -> None:
    for row in rows.values():
        ax.axhline(row, color="0.93", linewidth=0.6, zorder=0)
    ax.scatter(
        [note.onset for note in strokes],
        [rows[note.pitch] for note in strokes],
        s=[8 + 20 * note.velocity / 127 for note in strokes],
        c=[_lighten(DRUM_COLOR, SOFTEST * (1 - note.velocity / 127)) for note in strokes] or None,
        linewidths=0,
        zorder=2,
    )


def _label_time(ax: Axes, bars: Sequence[float], num_before: int) -> None:
    """Bar lines with their numbers, or else minutes and seconds."""
    if not bars:
        ax.xaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda time, _: _clock(time)))
        ax.grid(axis="x", color="0.88", linewidth=0.6)
        return
    every = next(n for n in (1, 2, 4, 8, 16, 32, len(bars)) if len(bars) / n <= BAR_LABELS)
    labels = [
        str(num_before + i + 1) if (num_before + i) % every == 0 else "" for i in range(len(bars))
    ]
    ax.set_xticks(bars, labels, ha="left")
    ax.grid(axis="x", color="0.8", linewidth=0.6)
    ax.set_axisbelow(True)


def _clock(seconds: float) -> str:
    """75.5 -> "1:15.5"."""
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{minutes:.0f}:{rest:04.1f}".removesuffix(".0")


def _legend_handles(notes: Collection[Note]) -> list[Rectangle]:
    parts = sorted({(note.is_drum, 0 if note.is_drum else note.program) for note in notes})
    return [
        Rectangle(
            (0, 0), 1, 1, color=part_color(program, drum), label=instrument_name(program, drum)
        )
        for drum, program in parts
    ]


def plot_piano_roll(
    notes: Collection[Note],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    duration: float = 0.0,
    bars: Sequence[float] = (),
) -> None:
    """Draws notes as a picture, long recordings in several rows, in a PDF on several pages.

    Args:
      notes: in seconds, in any order.
      path: the file to write, .png, .svg or .pdf.
      title: by default the number of notes.
      duration: seconds to show; at least up to the last note.
      bars: see `piano_roll`.

    Raises:
      ValueError: another suffix.
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"{path}: a picture is a .png, .svg or .pdf file")
    duration = max([duration, 1.0, *(note.offset for note in notes)])
    max_rows = 10**9 if kind == "pdf" else MAX_ROWS
    rows = _cut_rows(duration, bars, max(ROW_SECONDS, duration / max_rows))
    title = title or f"{len(notes)} notes"
    with replacing(path) as temporary:
        if kind != "pdf":
            _draw_rows(notes, rows, bars, title).savefig(temporary, format=kind, dpi=110)
            return
        with PdfPages(temporary) as pages:
            num_pages = math.ceil(len(rows) / PAGE_ROWS)
            for i in range(num_pages):
                page = f"{title}, page {i + 1} of {num_pages}" if num_pages > 1 else title
                own = rows[i * PAGE_ROWS : (i + 1) * PAGE_ROWS]
                pages.savefig(_draw_rows(notes, own, bars, page))


def _cut_rows(duration: float, bars: Sequence[float], seconds: float) -> list[tuple[float, float]]:
    """Start and end of each row: `seconds` long, or up to the last bar line before."""
    rows, start = [], 0.0
    while duration - start > 1.25 * seconds:
        ends = [bar for bar in bars if start + seconds / 2 < bar <= start + seconds]
        end = ends[-1] if ends else start + seconds
        rows.append((start, end))
        start = end
    length = duration - start
    whole = seconds if rows else length  # the last row has the scale of the others
    return [*rows, (start, start + max(whole, length))]


def _draw_rows(
    notes: Collection[Note], rows: Sequence[tuple[float, float]], bars: Sequence[float], title: str
) -> Figure:
    num_drums = len({note.pitch for note in notes if note.is_drum})
    pitches = _pitch_range([note.pitch for note in notes if not note.is_drum])
    least, most = ROW_INCHES
    height = min(most, max(least, 0.052 * (len(pitches) + DRUM_ROW * num_drums) + 0.5))
    left, right, top, bottom, gap = MARGIN_INCHES
    whole = top + len(rows) * height + (len(rows) - 1) * gap + bottom
    figure = Figure(figsize=(WIDTH_INCHES, whole))
    places = {
        "left": left / WIDTH_INCHES,
        "right": 1 - right / WIDTH_INCHES,
        "top": 1 - top / whole,
        "bottom": bottom / whole,
        "hspace": gap / height,
    }
    axes = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw=places)[:, 0]
    for ax, (start, end) in zip(axes, rows, strict=True):
        piano_roll(notes, ax, start=start, end=end, bars=bars, legend=False, like=notes)
    figure.text(0.01, 1 - 0.15 / whole, title, ha="left", va="top", fontsize=11)
    if notes:
        place = (places["right"] + 0.005, places["top"] + 0.05 / whole)
        handles = _legend_handles(notes)
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=place, frameon=False)
    return figure


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
