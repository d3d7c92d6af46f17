"""Recording -> notes -> MusicXML -> MuseScore -> MIDI: what comes back; and pictures of scores.

    python -m benchmarks.sheet_music --midi DIR --leave_out pop909,pop_band --font A.sf2
        --font B.sf3 --work_dir DIR [--pieces 20] [--musescore musescore3] [--pictures docs]

The recordings are those of benchmarks.pieces that nothing was chosen on, of which every so many is
taken. "Kept" is the share of the score's notes that MuseScore plays at their places, "bars" whether
all of the score's bar lines are MuseScore's; "found" and "played" are F1 of what MuseScore plays
against the transcribed and the rendered notes, onsets within half a beat.

`--pictures` writes those of the documentation: score_song.png, score_drums.png and
score_strings.png, of one recording each, and bars.png.
"""

from __future__ import annotations

import collections
import io
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from absl import flags

from benchmarks.pieces import Excerpt, define_piece_flags, read_excerpts
from mt3_keras.beat_tracker import track_beats
from mt3_keras.beats import Beats
from mt3_keras.cli.command_line import Command, Flags, run
from mt3_keras.engraving import write_score
from mt3_keras.midi import read_midi
from mt3_keras.notes import Note
from mt3_keras.score import QUARTER, Score, make_score
from mt3_keras.tempo import read_beats

PICTURES = {  # folder of the piece, and its title
    "score_song.png": ("openscore_lieder", "Song"),
    "score_drums.png": ("groove", "Drums"),
    "score_strings.png": ("openscore_quartets", "String quartet"),
}
MOST_PIXELS, GAP_PIXELS = 1500, 30  # of a score's height; between its systems
PLAIN_BAR = 2.0  # seconds, of four beats where none are known


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.sheet_music", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    define_piece_flags(add)
    add.count("pieces", 20, "Recordings to report on.")
    add.text("musescore", "musescore3", "MuseScore's command.")
    add.text("pictures", None, "Write pictures into this folder.")


def _compare(values: flags.FlagValues, _: list[str]) -> None:
    """Prints a table, or writes pictures."""
    excerpts = [excerpt for excerpt in read_excerpts(values) if excerpt.is_reported]
    found = [(excerpt, track_beats(excerpt.found)) for excerpt in excerpts]
    tracked = [(excerpt, beats) for excerpt, beats in found if beats]
    print(f"{len(tracked)} of {len(excerpts)} recordings have beats, without which is no score")
    if values.pictures:
        write_pictures(tracked, pathlib.Path(values.pictures))
        return
    places = np.linspace(0, len(tracked) - 1, min(values.pieces, len(tracked))).astype(int)
    print(report([tracked[place] for place in places], values.musescore))


def report(tracked: Sequence[tuple[Excerpt, Beats]], musescore: str) -> str:
    """The table."""
    lines = [f"{'recording':60} notes   kept  bars  found  played"]
    rows = []
    for excerpt, beats in tracked:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(excerpt, beats, pathlib.Path(folder) / "score.musicxml", musescore)
        rows.append(row)
        lines.append(_format(excerpt.name[-60:], len(excerpt.found), row))
    total = sum(len(excerpt.found) for excerpt, _ in tracked)
    lines.append(_format(f"{len(rows)} recordings", total, np.mean(rows, axis=0)))
    return "\n".join(lines)


def _format(name: str, num_notes: int, row: Sequence[float]) -> str:
    kept, bars, found, played = row
    return f"{name:60} {num_notes:5} {kept:6.3f} {bars:5.2f} {found:6.3f} {played:7.3f}"


def measure(
    excerpt: Excerpt, beats: Beats, path: pathlib.Path, musescore: str
) -> tuple[float, float, float, float]:
    """The columns of a recording, whose score is written to `path`."""
    write_score(excerpt.found, path, beats=beats, title=excerpt.name)
    midi = path.with_suffix(".mid")
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen"}
    command = [musescore, "-o", os.fspath(midi), os.fspath(path)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    score, played, bars = make_score(excerpt.found, beats), read_midi(midi), read_beats(midi)
    unit = 60 / score.quarters_per_minute / QUARTER  # seconds
    wanted = collections.Counter(_written(score))
    got = collections.Counter((n.is_drum, round(n.onset / unit), n.pitch) for n in played)
    kept = sum((wanted & got).values()) / sum(wanted.values())
    lines = np.array(bars.downbeats if bars else [np.inf]) / unit
    is_right = all(np.abs(lines - bar.start).min() < 0.5 for bar in score.bars)
    places = [(n.onset / unit / score.beat + score.origin, n) for n in played]
    found, rendered = (
        _f1([(float(beats.positions(n.onset)), n) for n in notes], places)
        for notes in (excerpt.found, excerpt.played)
    )
    return kept, float(is_right), found, rendered


def _written(score: Score) -> list[tuple[bool, int, int]]:
    return [
        (part.is_drum, chord.start, pitch)
        for part in score.parts
        for staff in part.staves
        for voice in staff.voices
        for chord in voice
        for pitch in chord.pitches
    ]


def _f1(reference: Sequence[tuple[float, Note]], estimate: Sequence[tuple[float, Note]]) -> float:
    """F1 of notes at positions in beats: same pitch, or drum, within half a beat."""
    import mir_eval

    def split(notes: Sequence[tuple[float, Note]]) -> tuple[np.ndarray, np.ndarray]:
        onsets = np.array([position for position, _ in notes]) + 100.0  # none is below 0
        keys = np.array([note.pitch + 128.0 * note.is_drum for _, note in notes])
        return np.stack([onsets, onsets + 0.1], axis=1), mir_eval.util.midi_to_hz(keys)

    scores = mir_eval.transcription.precision_recall_f1_overlap(
        *split(reference), *split(estimate), onset_tolerance=0.5, offset_ratio=None
    )
    return float(scores[2])


def write_pictures(tracked: Sequence[tuple[Excerpt, Beats]], out_dir: pathlib.Path) -> None:
    """Writes `PICTURES`, and the bars of the first string quartet."""
    for name, (folder, title) in PICTURES.items():
        excerpt, beats = _first_of(folder, tracked)
        _draw_score(excerpt, beats, title, out_dir / name)
        print(f"{out_dir / name}: {excerpt.name}")
    excerpt, beats = _first_of("openscore_quartets", tracked)
    _draw_bars(excerpt, beats, out_dir / "bars.png")


def _first_of(folder: str, tracked: Sequence[tuple[Excerpt, Beats]]) -> tuple[Excerpt, Beats]:
    """The first recording of a folder, of those with bars if there are any."""
    own = [(excerpt, beats) for excerpt, beats in tracked if excerpt.folder == folder]
    return next((pair for pair in own if pair[1].has_bars), own[0])


def _draw_score(excerpt: Excerpt, beats: Beats, title: str, path: pathlib.Path) -> None:
    import cairosvg
    from PIL import Image, ImageOps

    with tempfile.TemporaryDirectory() as folder:
        svg = pathlib.Path(folder) / "score.svg"
        write_score(excerpt.found, svg, beats=beats, title=title)
        png = cairosvg.svg2png(url=os.fspath(svg), output_width=1000, background_color="white")
    image = Image.open(io.BytesIO(png)).convert("L")
    left, top, right, bottom = ImageOps.invert(image).getbbox() or (0, 0, *image.size)
    is_blank = (np.asarray(image) == 255).all(axis=1)
    if bottom > MOST_PIXELS:  # as many systems as fit
        gaps = np.convolve(is_blank[:MOST_PIXELS], np.ones(GAP_PIXELS), "valid") == GAP_PIXELS
        bottom = int(np.flatnonzero(gaps)[-1])
    box = (max(0, left - 10), max(0, top - 10), right + 10, bottom + 10)
    image.crop(box).quantize(16).save(path, optimize=True)


def _draw_bars(excerpt: Excerpt, beats: Beats, path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    from mt3_keras.plots import piano_roll

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1)
    end = 15.0
    plain = [PLAIN_BAR * i for i in range(int(end / PLAIN_BAR) + 1)]
    piano_roll(excerpt.found, above, end=end, bars=plain, legend=False)
    above.set_title("without beats: bars of 4/4 at 120 beats a minute", loc="left", fontsize=10)
    piano_roll(excerpt.found, below, end=end, bars=beats.downbeats, legend=False)
    metre = f"{beats.beats_per_bar}/4 at {beats.beats_per_minute:.0f}"
    below.set_title(f"with beats: bars of {metre} beats a minute", loc="left", fontsize=10)
    figure.savefig(path, dpi=100)


COMMAND = Command("--midi=DIR --font=FILE --work_dir=DIR [FLAGS]", __doc__, _define_flags, _compare)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
