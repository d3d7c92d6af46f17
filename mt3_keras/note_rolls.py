"""How what a detector predicts is read: limits, data that belong to one network's weights."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class RollDecoding:
    """How a detector's outputs are read as notes; the defaults are a start for a new network.

    They fit one network's weights and stand beside them in `decoding.json`, with what each was
    chosen on and when. Probabilities are from 0 to 1.

    Attributes:
      onset_limit: probability from which an onset begins a note.
      stroke_limit: the same of drums.
      unison_limit: probability from which two instruments play the pitch; above 1 never.
      end_limit: probability from which a note has ended.
      shortest: frames from an onset on in which its note does not end.
      same_strike: seconds within which two onsets of a pitch, or strokes of a drum, are one.
      similar_drums: keys of which one at a time is struck, such as the two snares of General MIDI.
      shrink: share of a piece's notes that an instrument must have (see `instruments`).
    """

    onset_limit: float = 0.5
    stroke_limit: float = 0.5
    unison_limit: float = 1.1
    end_limit: float = 0.5
    shortest: int = 2
    same_strike: float = 0.05
    similar_drums: tuple[tuple[int, ...], ...] = (
        (35, 36),
        (38, 40),
        (42, 44, 46),
        (49, 57),
        (51, 59),
    )
    shrink: float = 0.0

    def __post_init__(self) -> None:
        for name in ("onset_limit", "stroke_limit", "end_limit", "shrink"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1: got {getattr(self, name)}")
        if self.shortest < 1 or self.same_strike < 0:
            raise ValueError(
                "shortest must be at least 1 and same_strike not negative: got"
                f" {self.shortest} and {self.same_strike}"
            )

    @classmethod
    def read(cls, folder: str | pathlib.Path) -> RollDecoding:
        """Reads `decoding.json` of a preset or bundle; the defaults where there is none.

        Raises:
          ValueError: the file is none of this kind; one line that names it.
        """
        path = pathlib.Path(folder) / "decoding.json"
        if not path.exists():
            return cls()
        try:
            stored = json.loads(path.read_text())
            return cls(**{name: _to_tuple(entry["value"]) for name, entry in stored.items()})
        except (
            *(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError),
            OverflowError,
        ) as error:
            raise ValueError(f"{path}: cannot be used ({error}); copy it again") from error

    def to_json(self, provenance: dict[str, dict[str, str]] | None = None) -> str:
        """The content of `decoding.json`.

        Args:
          provenance: field -> what its value was chosen on ("tuned_on") and when ("date").
        """
        unknown = {"tuned_on": "default of a new network, not tuned", "date": ""}
        entries = {
            name: {"value": value, **(provenance or {}).get(name, unknown)}
            for name, value in dataclasses.asdict(self).items()
        }
        return json.dumps(entries, indent=1) + "\n"


def _to_tuple(value: Any) -> Any:
    return tuple(map(_to_tuple, value)) if isinstance(value, list) else value
