"""Files of a transcription's notes: MIDI, JSON, CSV, JSON lines, pictures and sound."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import warnings
from typing import IO, TYPE_CHECKING, Any

from mt3_keras.cli.command_line import UsageError
from mt3_keras.engraving import SUFFIXES, write_score
from mt3_keras.files import replacing
from mt3_keras.midi import write_midi
from mt3_keras.note_table import NOTE_COLUMNS, note_records
from mt3_keras.process import printable

if TYPE_CHECKING:
    from mt3_keras.beats import Beats
    from mt3_keras.recording import Progress, Transcription


def pick_midi(given: str | None, name: str) -> pathlib.Path:
    """The MIDI file to write: the one given or out/NAME.mid.

    Raises:
      UsageError: it could not be written at the end of a long recording.
    """
    output = pathlib.Path(given or f"out/{name}.mid")
    if output.is_dir():
        raise UsageError(f"{output}: is a folder; name a MIDI file in it")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{output}: cannot be written in {folder}; choose another --output")
    return output


def write_notes(
    result: Transcription,
    recording: pathlib.Path,
    path: pathlib.Path,
    beats: Beats | None,
    source: str,
) -> None:
    """Writes one file of a transcription, by the path's suffix: notes, score or picture.

    Args:
      result: the transcription.
      recording: the recording it is of, whose name the file states.
      path: the file; it appears whole or not at all.
      beats: of the notes, if they are known.
      source: what wrote the notes, as the file is to state it.
    """
    if path.suffix == ".mid":
        write_midi(result.notes, path, beats=beats, text=source, track_names=result.track_names)
    elif path.name.endswith((".png", ".roll.svg", ".roll.pdf")):
        from mt3_keras.plots import plot_piano_roll

        title = printable(recording.name).replace("$", r"\$")  # matplotlib's for formulas
        with warnings.catch_warnings(action="ignore"):  # of letters that its font lacks
            bars = beats.downbeats if beats and beats.has_bars else ()
            plot_piano_roll(result.notes, path, title=title, duration=result.duration, bars=bars)
    elif path.suffix in SUFFIXES:
        write_score(result.notes, path, beats=beats, title=printable(recording.stem))
    elif path.suffix == ".json":
        content = {
            "file": recording.name,
            "duration": result.duration,
            "invalid_events": result.invalid_events,
            "dropped_events": result.dropped_events,
            "beats": _beat_record(beats) if beats else None,
            "notes": note_records(result.notes, result.confidences),
            "segments": [segment._asdict() for segment in result.segments],
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n")
    elif path.suffix == ".csv":
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, NOTE_COLUMNS)
            writer.writeheader()
            writer.writerows(note_records(result.notes, result.confidences))


def write_wav(
    result: Transcription,
    recording: pathlib.Path,
    path: pathlib.Path,
    font: str,
    is_compared: bool,
) -> None:
    """Writes what the notes sound like, on the right of the recording if they are compared."""
    from mt3_keras.synth.listen import find_font, write_sound

    beside = recording if is_compared else None
    played = find_font(font)
    write_sound(result.notes, path, font=played, duration=result.duration, beside=beside)


def write_lines(progress: Progress, recording: pathlib.Path, stream: IO[str]) -> None:
    """Writes the notes of a segment, each as a line of JSON, at once."""
    for record in note_records(progress.notes, progress.confidences):
        stream.write(json.dumps({"file": recording.name, **record}) + "\n")
    stream.flush()


def _beat_record(beats: Beats) -> dict[str, Any]:
    return {
        "times": [round(time, 3) for time in beats.times],
        "numbers": beats.numbers,
        "is_compound": beats.is_compound,
        "confidence": round(beats.confidence, 3),
        "bar_confidence": round(beats.bar_confidence, 3),
    }
