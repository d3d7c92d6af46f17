"""Notes -> token ids, segment by segment: the targets of a token network.

The original (MT3 paper, section 3.1) encodes a whole piece as events with single-step shifts, cuts
that list at the segments and shortens the shifts. Here each segment is encoded directly. The tokens
are the same, including these peculiarities:

- events are ordered by their exact time, then offsets before onsets, then drums last, then by
  program and pitch; times are rounded to the 10 ms grid after this ordering;
- a segment that begins after the last event of a piece lists the notes that this event ended as
  tied.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mt3_keras.codec import EOS, Codec, Event, velocity_to_bin
from mt3_keras.notes import Note, map_program

FRAMES_PER_SECOND = 125.0


class NoteEvent(NamedTuple):
    """The onset or offset of a note at `step` of the time grid; velocity_bin 0 is an offset."""

    step: int
    pitch: int
    velocity_bin: int
    program: int
    is_drum: bool


Sounding = dict[tuple[int, int], int]  # (program, pitch) -> velocity bin


def time_to_step(time: float, steps_per_second: int) -> int:
    """The last step of the grid not after `time`, in floating point as in the original."""
    step = math.floor(time * steps_per_second)
    while step / steps_per_second > time:
        step -= 1
    while (step + 1) / steps_per_second <= time:
        step += 1
    return step


def notes_to_events(
    notes: Iterable[Note], codec: Codec, *, onsets_only: bool = False
) -> list[NoteEvent]:
    """Notes -> events in the order of the original. Drums have no offset."""
    ordered = sorted(notes, key=lambda n: (n.is_drum, n.program, n.pitch))
    timed: list[tuple[float, Note, int]] = []
    if not onsets_only:
        timed += [(n.offset, n, 0) for n in ordered if not n.is_drum]
    bins = codec.num_velocity_bins
    timed += [(n.onset, n, velocity_to_bin(n.velocity, bins)) for n in ordered]
    timed.sort(key=lambda t: t[0])
    return [
        NoteEvent(round(time * codec.steps_per_second), n.pitch, velocity_bin, n.program, n.is_drum)
        for time, n, velocity_bin in timed
    ]


def encode_notes(
    notes: Sequence[Note],
    codec: Codec,
    *,
    segment_frames: int = 256,
    num_frames: int,
    ties: bool = True,
    granularity: str = "full",
    onsets_only: bool = False,
    frames_per_second: float = FRAMES_PER_SECOND,
) -> list[list[int]]:
    """Encodes a piece as one list of tokens for each segment, each ending in EOS.

    Args:
      notes: any order; drums' programs and offsets are ignored.
      codec: of the vocabulary.
      segment_frames: spectrogram frames in a segment; the last segment may hold fewer.
      num_frames: frames in the piece.
      ties: begin each segment with the list of notes still sounding.
      granularity: "full", "midi_class" or "flat" (see `notes.map_program`; with "flat" there are
        no program tokens).
      onsets_only: encode only the pitches of onsets, without velocities, offsets and programs.
      frames_per_second: of the spectrogram.

    Raises:
      ValueError: a note or an argument is out of range.
    """
    if num_frames < 1 or segment_frames < 1:
        raise ValueError(
            f"num_frames and segment_frames must be positive: got {num_frames} and {segment_frames}"
        )
    starts = [frame / frames_per_second for frame in range(0, num_frames, segment_frames)]
    events = notes_to_events(notes, codec, onsets_only=onsets_only)
    return encode_segments(
        events, codec, starts, ties=ties, granularity=granularity, onsets_only=onsets_only
    )


def encode_segments(
    events: Sequence[NoteEvent],
    codec: Codec,
    starts: Sequence[float],
    *,
    end: float | None = None,
    last_step: int | None = None,
    ties: bool = True,
    granularity: str = "full",
    onsets_only: bool = False,
    to_mix: bool = False,
) -> list[list[int]]:
    """Encodes events as tokens of consecutive segments that begin at `starts` (seconds).

    Args:
      events: of the piece, or of a part that holds the segments and the notes that sound at
        their starts.
      codec: of the vocabulary.
      starts: of the segments, in seconds, ascending.
      end: of the last segment, in seconds; None includes all events that remain, as at the end of
        a piece.
      last_step: step of the last event of the whole piece, if `events` are a part of it.
      ties: as in `encode_notes`.
      granularity: likewise.
      onsets_only: likewise.
      to_mix: keep repeated states and omit EOS, for `mix_segments`.
    """
    steps = [event.step for event in events]
    borders = [time_to_step(start, codec.steps_per_second) for start in starts]
    if end is not None:
        borders.append(time_to_step(end, codec.steps_per_second))
    cuts = [bisect.bisect_left(steps, border) for border in borders]
    if end is None:
        cuts.append(len(events))
    # The tied notes are those that sound before this event. As in the original, it is never later
    # than the first event of the last step.
    if last_step is None:
        last_step = steps[-1] if steps else 0
    last_state = bisect.bisect_left(steps, last_step)
    sounding: Sounding = {}
    applied, segments = 0, []
    for border, cut, next_cut in zip(borders, cuts, cuts[1:], strict=False):
        for event in events[applied : min(cut, last_state)]:
            _apply(event, sounding)
        applied = max(applied, min(cut, last_state))
        symbols = _tie_section(sounding) if ties else []
        symbols += _event_symbols(events[cut:next_cut], border, codec, onsets_only)
        tokens = _symbols_to_tokens(symbols, codec, granularity)
        segments.append(tokens if to_mix else [*drop_repeated_states(tokens, codec), EOS])
    return segments


def _apply(event: NoteEvent, sounding: Sounding) -> None:
    if not event.is_drum:
        sounding[event.program, event.pitch] = event.velocity_bin


def _tie_section(sounding: Sounding) -> list[Event]:
    symbols = []
    for (program, pitch), velocity_bin in sorted(sounding.items()):
        if velocity_bin:
            symbols += [Event("program", program), Event("pitch", pitch)]
    return [*symbols, Event("tie", 0)]


def tie_tokens(
    sounding: Iterable[tuple[int, int]], codec: Codec, granularity: str = "full"
) -> list[int]:
    """The tie section of a segment at whose start these (program, pitch) sound."""
    symbols = _tie_section(dict.fromkeys(sounding, 1))
    return drop_repeated_states(_symbols_to_tokens(symbols, codec, granularity), codec)


def _event_symbols(
    events: Sequence[NoteEvent], start_step: int, codec: Codec, onsets_only: bool
) -> list[Event]:
    symbols, step = [], start_step
    for event in events:
        if event.step > step:
            step = event.step
            symbols += shift_symbols(step - start_step, codec)
        if onsets_only:
            symbols.append(Event("pitch", event.pitch))
        elif event.is_drum:
            symbols += [Event("velocity", event.velocity_bin), Event("drum", event.pitch)]
        else:
            symbols += [
                Event("program", event.program),
                Event("velocity", event.velocity_bin),
                Event("pitch", event.pitch),
            ]
    return symbols


def shift_symbols(steps: int, codec: Codec) -> list[Event]:
    """Steps since the start of the segment as one shift, or several that add up."""
    full, rest = divmod(steps, codec.max_shift_steps)
    values = [codec.max_shift_steps] * full + ([rest] if rest else [])
    return [Event("shift", value) for value in values]


def _symbols_to_tokens(symbols: Iterable[Event], codec: Codec, granularity: str) -> list[int]:
    mapped = []
    for symbol in symbols:
        if symbol.type == "program":
            if granularity == "flat":
                continue
            symbol = Event("program", map_program(symbol.value, granularity))
        mapped.append(codec.encode(symbol))
    return mapped


def drop_repeated_states(tokens: Iterable[int], codec: Codec) -> list[int]:
    """Removes each velocity and program token that repeats the last one of its type."""
    ranges = {kind: codec.token_range(kind) for kind in ("velocity", "program")}
    current: dict[str, int] = {}
    kept = []
    for token in tokens:
        for kind, (first, last) in ranges.items():
            if first <= token <= last:
                if current.get(kind) != token:
                    kept.append(token)
                current[kind] = token
                break
        else:
            kept.append(token)
    return kept


def merge_segments(segments: Iterable[Sequence[int]], codec: Codec) -> list[int]:
    """Merges segments that sound at the same time into one, ordered by time, then by segment.

    Each is a list of tokens without tie section, ended by PAD; its shifts count from the segment's
    start and are not yet split. This is the mixing augmentation of Gardner et al. (ISMIR 2022
    release). Repeated states are not removed.
    """
    first, last = codec.token_range("shift")
    timed: list[tuple[int, int]] = []  # (step, token)
    for tokens in segments:
        step, after_shift = 0, False
        for token in tokens:
            if token == 0:
                break
            if first <= token <= last:
                step = token - first + (step if after_shift else 0)
                after_shift = True
            else:
                timed.append((step, token))
                after_shift = False
    merged, now = [], 0
    for step, token in sorted(timed, key=lambda t: t[0]):
        if step > now:
            merged += [codec.encode(shift) for shift in shift_symbols(step, codec)]
            now = step
        merged.append(token)
    return merged


def mix_segments(segments: Sequence[Sequence[int]], codec: Codec) -> list[int]:
    """Merges segments of several pieces, from `encode_segments(to_mix=True)`, into one.

    The result ends in EOS. The original merges tie sections like other tokens; here the result has
    one tie section, which lists the notes that sound in any of the segments.
    """
    if len(segments) == 1:
        return [*drop_repeated_states(segments[0], codec), EOS]
    first_tie, _ = codec.token_range("tie")
    first_pitch, last_pitch = codec.token_range("pitch")
    tied: set[tuple[int, ...]] = set()
    has_ties, rests = False, []
    for tokens in segments:
        split = tokens.index(first_tie) if first_tie in tokens else -1
        has_ties = has_ties or split >= 0
        entry: list[int] = []
        for token in tokens[: max(0, split)]:
            entry.append(token)
            if first_pitch <= token <= last_pitch:
                tied.add(tuple(entry))
                entry = []
        rests.append(tokens[split + 1 :])
    section = [token for entry in sorted(tied) for token in entry] + [first_tie] * has_ties
    return [*drop_repeated_states([*section, *merge_segments(rests, codec)], codec), EOS]
