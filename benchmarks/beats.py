"""Beats, bars and their confidences on rendered pieces with known beats, and on any recordings.

    python -m benchmarks.beats --midi DIR --leave_out pop909,pop_band --font A.sf2 --font B.sf3
        --work_dir DIR [--data DIR_WITH_MANIFEST]

The pieces are those of benchmarks.pieces. F1 by mir_eval within 70 ms, from 2 s on; "any rate" is
the best of the tempo found, its half and its double. A piece's metre is right if its bars have as
many beats as the reference's, "or 2 for 4" if two and four count as one.

One half of the pieces is for choosing the two limits of confidence, below which nothing is stated.
Beats are right from F1 .7 at any rate on; a wrong tempo, which moves no note, costs what a right
one is worth. Bars are right from F1 .6 of downbeats on; wrong ones cost twice as much. Nothing was
chosen on the other half, which the table reports. `--data` adds what is emitted for recordings
whose beats nobody knows.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

from benchmarks.pieces import Excerpt, define_piece_flags, read_excerpts
from mt3_keras.beat_tracker import LEAST_CONFIDENCE, track_beats
from mt3_keras.beats import LEAST_BAR_CONFIDENCE, Beats
from mt3_keras.cli.command_line import Command, Flags, run
from mt3_keras.notes import Note
from mt3_keras.transcriber import Transcriber
from train.evaluate import read_manifest

FIRST = 2.0  # seconds, before which beats do not count
RIGHT_BEATS, BEATS_COST = 0.7, 1.0
RIGHT_BARS, BARS_COST = 0.6, 2.0


@dataclasses.dataclass(frozen=True)
class Judged:
    """Scores of the beats found in an excerpt; NaN of bars where none are known."""

    excerpt: Excerpt
    confidence: float
    bar_confidence: float
    beats: float
    any_rate: float
    downbeats: float
    metre: float
    metre_or_half: float

    @property
    def has_right_beats(self) -> bool:
        return self.any_rate >= RIGHT_BEATS

    @property
    def has_right_bars(self) -> bool:
        return self.downbeats >= RIGHT_BARS


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    return run("benchmarks.beats", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    define_piece_flags(add)
    add.text("data", None, "Folder with manifest.json.")


def _compare(values: flags.FlagValues, _: list[str]) -> None:
    """Prints the limits that would be chosen, and the table."""
    excerpts = read_excerpts(values)
    judged = [judge(excerpt, excerpt.found) for excerpt in excerpts]
    chosen = [row for row in judged if not row.excerpt.is_reported]
    reported = [row for row in judged if row.excerpt.is_reported]
    print(f"{len(chosen)} excerpts to choose on, {len(reported)} to report on\n")
    print(report_limits(chosen))
    from_played = [judge(row.excerpt, row.excerpt.played) for row in reported]
    print(report(reported, from_played))
    if values.data:
        print(report_recordings(pathlib.Path(values.data), values.model))


def judge(excerpt: Excerpt, notes: Sequence[Note]) -> Judged:
    """Scores of the beats that are found in notes, however uncertain."""
    found = track_beats(notes, least_confidence=0.0)
    reference = excerpt.beats
    if found is None:
        return Judged(excerpt, 0.0, 0.0, *[0.0] * 5)
    beats = f_measure(reference.times, found.times)
    rates = [found.times[::2], found.times[1::2], _doubled(found.times)]
    any_rate = max(beats, *(f_measure(reference.times, times) for times in rates))
    bars = [np.nan] * 3
    if reference.numbers[0] and len(reference.downbeats) > 2:
        ours, theirs = found.beats_per_bar, reference.beats_per_bar
        alike = ours == theirs or {ours, theirs} == {2, 4}
        downbeats = f_measure(reference.downbeats, found.downbeats)
        bars = [downbeats, float(ours == theirs), float(alike)]
    return Judged(excerpt, found.confidence, found.bar_confidence, beats, any_rate, *bars)


def f_measure(reference: Sequence[float], estimate: Sequence[float]) -> float:
    """F1 of times within 70 ms, from `FIRST` on."""
    import mir_eval

    trimmed = [
        np.array([time for time in times if time >= FIRST]) for times in (reference, estimate)
    ]
    return float(mir_eval.beat.f_measure(*trimmed))


def _doubled(times: Sequence[float]) -> tuple[float, ...]:
    halves = (np.array(times[1:]) + np.array(times[:-1])) / 2
    return tuple(sorted([*times, *halves.tolist()]))


def report_limits(rows: Sequence[Judged]) -> str:
    """The limits that these excerpts would choose, beside those that are set."""
    known = [row for row in rows if row.metre == row.metre]
    beats = [(row.confidence, row.has_right_beats) for row in rows]
    bars = [(row.bar_confidence, row.has_right_bars) for row in known]
    lines = []
    for name, answers, cost, limit in (
        ("beats", beats, BEATS_COST, LEAST_CONFIDENCE),
        ("bars", bars, BARS_COST, LEAST_BAR_CONFIDENCE),
    ):
        worths = {value: worth(answers, cost, value) for value in (0.0, *(c for c, _ in answers))}
        best = max(worths, key=lambda value: worths[value])
        lines.append(
            f"{name}: worth most from a confidence of {best:.2f} on, {worths[best]:.0f}"
            f" of {sum(right for _, right in answers)} right and {len(answers)} answers;"
            f" from {limit} on, as is set, {worth(answers, cost, limit):.0f}"
        )
    return "\n".join(lines) + "\n"


def worth(answers: Sequence[tuple[float, bool]], cost: float, limit: float) -> float:
    """Right answers from a confidence on, less what wrong ones cost."""
    return sum(1.0 if right else -cost for confidence, right in answers if confidence >= limit)


def report(found: Sequence[Judged], from_played: Sequence[Judged]) -> str:
    """A table of means."""
    import librosa

    lines = [f"{'':42} pieces  beats  any rate  downbeats  metre  or 2 for 4"]
    heard = []
    for row in found:
        samples, rate = librosa.load(row.excerpt.audio, sr=22_050)
        _, times = librosa.beat.beat_track(y=samples, sr=rate, units="time")
        heard.append(f_measure(row.excerpt.beats.times, times.tolist()))
    lines.append(
        f"{'librosa.beat.beat_track, from the audio':42} {len(heard):6} {np.mean(heard):6.3f}"
    )
    for title, rows in (("transcribed notes", found), ("played notes", from_played)):
        with_tempo = [row for row in rows if row.confidence >= LEAST_CONFIDENCE]
        with_bars = [row for row in with_tempo if row.bar_confidence >= LEAST_BAR_CONFIDENCE]
        lines.append(_format(title, rows))
        lines.append(_format("  with tempos", with_tempo))
        lines.append(_format("  with a time signature", with_bars))
    lines += [
        _format(folder, [row for row in found if row.excerpt.folder == folder])
        for folder in sorted({row.excerpt.folder for row in found})
    ]
    return "\n".join(lines) + "\n"


def _format(title: str, rows: Sequence[Judged]) -> str:
    known = [row for row in rows if row.metre == row.metre]

    def mean(name: str, of: Sequence[Judged]) -> float:
        return float(np.mean([getattr(row, name) for row in of])) if of else float("nan")

    return (
        f"{title:42} {len(rows):6} {mean('beats', rows):6.3f} {mean('any_rate', rows):9.3f}"
        f" {mean('downbeats', known):10.3f} {mean('metre', known):6.2f}"
        f" {mean('metre_or_half', known):11.2f}"
    )


def report_recordings(data: pathlib.Path, model: str) -> str:
    """What is found in recordings whose beats are not known."""
    transcriber = Transcriber.from_preset(model)
    lines = [f"{'recording':46} notes  beats a minute  a bar  confidence  of bars  emitted"]
    for item in read_manifest(data):
        path, _ = item.load()
        notes = transcriber.transcribe(path).notes
        beats = track_beats(notes, least_confidence=0.0)
        lines.append(f"{item.id:46} {len(notes):5} {_describe(beats)}")
    return "\n".join(lines)


def _describe(beats: Beats | None) -> str:
    if beats is None:
        return "none"
    is_sure = beats.confidence >= LEAST_CONFIDENCE
    emitted = ("bars" if beats.has_bars else "tempos") if is_sure else "nothing"
    rate = f"{beats.beats_per_minute:15.1f} {beats.beats_per_bar:6}"
    return f"{rate} {beats.confidence:11.2f} {beats.bar_confidence:8.2f}  {emitted}"


COMMAND = Command("--midi=DIR --font=FILE --work_dir=DIR [FLAGS]", __doc__, _define_flags, _compare)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
