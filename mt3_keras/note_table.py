"""Notes as rows of a table: what JSON, CSV, Parquet and Spark are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mt3_keras import __version__
from mt3_keras.instrument_names import instrument_name
from mt3_keras.notes import Note

NOTE_COLUMNS = (
    *("onset", "offset", "pitch", "velocity", "program", "is_drum"),
    *("instrument", "confidence"),
)


def note_records(notes: Iterable[Note], confidences: Mapping[Note, float]) -> list[dict[str, Any]]:
    """A dict of `NOTE_COLUMNS` for each note, times in seconds, rounded to milliseconds.

    Args:
      notes: in the order of the rows.
      confidences: of their onsets; None is in the row where there is none.
    """
    records = []
    for note in notes:
        confidence = confidences.get(note)
        records.append(
            {
                **note._asdict(),
                "onset": round(note.onset, 3),
                "offset": round(note.offset, 3),
                "instrument": instrument_name(note.program, note.is_drum),
                "confidence": None if confidence is None else round(confidence, 3),
            }
        )
    return records


def note_schema(small: Any = None) -> Any:
    """The Arrow schema of a table of several recordings' notes.

    Args:
      small: Arrow type of pitch, velocity and program; None is uint8.
    """
    import pyarrow

    small = small or pyarrow.uint8()
    return pyarrow.schema(
        [
            ("recording", pyarrow.string()),
            ("onset", pyarrow.float64()),
            ("offset", pyarrow.float64()),
            ("pitch", small),
            ("velocity", small),
            ("program", small),
            ("is_drum", pyarrow.bool_()),
            ("instrument", pyarrow.string()),
            ("confidence", pyarrow.float32()),
        ]
    )


def describe_source(model: str) -> str:
    """What transcribed, as the MIDI files of the commands state it."""
    return f"mt3-keras {__version__}, model {model}"
