"""Kinds of tracks by their names: which instruments a track may hold. NumPy at most.

For separated stems, and for networks that have an encoder or a decoder for each track.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mt3_keras.notes import map_program

# What the tracks of a network may be called, and the programs that they then hold.
KINDS: dict[str, range] = {
    "drums": range(0),
    "bass": range(32, 40),
    "vocals": range(52, 55),
    "keys": range(8),
    "guitar": range(24, 32),
    "strings": range(40, 52),
    "brass": range(56, 64),
    "winds": range(64, 80),
    "synth": range(80, 104),
}
OTHER = "other"  # all that no other track may hold


class Track(NamedTuple):
    """What a track may hold.

    Attributes:
      programs: of General MIDI.
      drums: whether drums may.
    """

    programs: frozenset[int]
    drums: bool


def share_out(claims: Sequence[Track | None]) -> list[Track]:
    """What each of a song's tracks may hold; those of None, all that no other claims."""
    named = [claim for claim in claims if claim is not None]
    claimed = frozenset[int]().union(*(track.programs for track in named))
    rest = Track(frozenset(range(128)) - claimed, not any(track.drums for track in named))
    return [claim or rest for claim in claims]


class Tracks:
    """The tracks of a network, among which all instruments are shared out.

    Args:
      names: each of `KINDS`, or "other".
      granularity: of the programs that the network tells apart (`notes.map_program`).

    Attributes:
      names: as given.
      tracks: what each may hold.

    Raises:
      ValueError: a name is unknown, or an instrument has no track or several; one line.

    Example:
      >>> tracks = Tracks(("drums", "bass", "other"))
      >>> tracks.owner(33, False), tracks.owner(0, True), tracks.owner(0, False)
      (1, 0, 2)
    """

    def __init__(self, names: Sequence[str], granularity: str = "full") -> None:
        self.names = tuple(names)
        claims: list[Track | None] = []
        for name in names:
            if name not in KINDS and name != OTHER:
                known = ", ".join((*KINDS, OTHER))
                raise ValueError(f"tracks must be of {known}: got {name!r}")
            claims.append(Track(frozenset(KINDS[name]), name == "drums") if name != OTHER else None)
        self.tracks = share_out(claims)
        self._granularity = granularity
        self._owners: dict[tuple[int, bool], int] = {}
        for program, is_drum in [*((p, False) for p in range(128)), (0, True)]:
            holders = {
                i
                for i, track in enumerate(self.tracks)
                if (track.drums if is_drum else program in track.programs)
            }
            mapped = map_program(program, granularity)
            holders |= {self._owners.get((mapped, is_drum), i) for i in holders}
            if len(holders) != 1:
                what = "drums" if is_drum else f"program {program}"
                raise ValueError(
                    f"tracks must hold each instrument in one of them (granularity {granularity}):"
                    f" {', '.join(names)} have {what} in {len(holders)}"
                )
            self._owners.setdefault((mapped, is_drum), *holders)

    def owner(self, program: int, is_drum: bool) -> int:
        """The number of the only track that may hold an instrument."""
        key = (0, True) if is_drum else (map_program(program, self._granularity), False)
        return self._owners[key]
