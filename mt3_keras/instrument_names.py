"""Names of instruments: General MIDI's, its classes', and those that people use."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable

import pretty_midi

VOICES, BASSES, BOWED = range(52, 55), range(32, 40), (*range(40, 46), *range(48, 52))
# What people say where General MIDI says otherwise, or something narrower.
COMMON: dict[str, Iterable[int]] = {
    **dict.fromkeys(("acapella", "choir", "singer", "singing", "vocal", "voice", "vox"), VOICES),
    **dict.fromkeys(("bass", "bass guitar", "bassguitar"), BASSES),
    "electric bass": (33, 34, 35, 36, 37),
    **dict.fromkeys(("double bass", "upright bass", "contrabass"), (32, 43)),
    **dict.fromkeys(("piano", "key", "keyboard"), range(8)),
    **dict.fromkeys(("rhodes", "wurlitzer"), (4, 5)),
    "hammond": (16, 17, 18),
    **dict.fromkeys(("guitar", "gtr"), range(24, 32)),
    "electric guitar": range(26, 32),
    **dict.fromkeys(("distorted guitar", "rock guitar"), (29, 30)),
    **dict.fromkeys(("classical guitar", "ukulele"), (24,)),
    **dict.fromkeys(("string", "orchestra", "string section"), BOWED),
    **dict.fromkeys(("brass", "horn"), range(56, 64)),
    **dict.fromkeys(("woodwind", "wind"), range(64, 80)),
    **dict.fromkeys(("sax", "saxophone"), range(64, 68)),
    **dict.fromkeys(("synth", "synthesizer"), range(80, 104)),
    **dict.fromkeys(("mallet", "vibes"), range(8, 16)),
}
DRUMS = frozenset(
    (
        *("beat", "drum", "drum kit", "drum set", "drumkit", "drumset", "kit", "percussion"),
        *("perc", "kick", "snare", "tom", "hat", "hihat", "cymbal", "clap", "overhead"),
    )
)


def instrument_name(program: int, is_drum: bool) -> str:
    """General MIDI name of a program (0 to 127), or "Drums"."""
    return "Drums" if is_drum else pretty_midi.program_to_instrument_name(program)


def parse_instruments(names: str | Iterable[str | int]) -> tuple[frozenset[int], bool]:
    """Reads a list such as "piano, 33, Violin, drums".

    Args:
      names: names or numbers, in one text separated by commas, or one by one: a General MIDI
        instrument ("Acoustic Bass") or words of its name ("jazz guitar"), a class ("Bass": all
        eight), a common name ("sax", "voice", "electric guitar"), a program (0 to 127), "drums".

    Returns:
      The programs named and whether drums are.

    Raises:
      ValueError: names are unknown; the message has all of them, and similar ones.

    Example:
      >>> parse_instruments("sax, drums")
      (frozenset({64, 65, 66, 67}), True)
      >>> parse_instruments(["violin", 0]) == parse_instruments("Violin, 0")
      True
    """
    items = names.split(",") if isinstance(names, str) else [str(name) for name in names]
    items = [item.strip() for item in items if item.strip()]
    programs: set[int] = set()
    drums, unknown = False, []
    for item in items:
        found = _find(item)
        if found is None:
            unknown.append(item)
        else:
            programs |= found
            drums = drums or not found
    if unknown:
        raise ValueError("; ".join(map(_describe_unknown, unknown)))
    if not items:
        raise ValueError("no instrument named: use General MIDI names, 0 to 127 or drums")
    return frozenset(programs), drums


def find_programs(name: str) -> frozenset[int] | None:
    """The programs that a whole name means, none of drums; None if it is unknown."""
    name = _simplify(name)
    for form in (name, name.removesuffix("s")):
        if form in DRUMS:
            return frozenset()
        if form in COMMON:
            return frozenset(COMMON[form])
    return _general_midi().get(name)


def _find(item: str) -> frozenset[int] | None:
    """As `find_programs`, of numbers and of words of General MIDI's names too."""
    if item.isascii() and item.isdigit():
        return frozenset({int(item)}) if len(item) <= 3 and int(item) < 128 else None
    found = find_programs(item)
    if found is not None:
        return found
    words = set(_simplify(item).split())
    by_words = [
        programs
        for full, programs in _general_midi().items()
        if words <= set(re.findall(r"\w+", full)) and len(programs) == 1
    ]
    return frozenset().union(*by_words) if words and by_words else None


def _simplify(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.lower()))


@functools.cache
def _general_midi() -> dict[str, frozenset[int]]:
    """Names of classes and of programs, in small letters -> programs."""
    found: dict[str, frozenset[int]] = {}
    for program in range(128):
        group = pretty_midi.program_to_instrument_class(program).lower()
        found[group] = found.get(group, frozenset()) | {program}
    for program in range(128):
        name = pretty_midi.program_to_instrument_name(program).lower()
        found[name] = found.get(name, frozenset()) | {program}
    return {_simplify(name): programs for name, programs in found.items()}


def _describe_unknown(item: str) -> str:
    names = [*_general_midi(), *COMMON, "drums"]
    close = difflib.get_close_matches(item.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "use General MIDI names or 0 to 127"
    return f"unknown instrument {item!r}: {hint}"
