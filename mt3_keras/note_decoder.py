"""Token ids -> notes: one state machine for files, streams and tests alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from mt3_keras.codec import Codec, Event, bin_to_velocity, trim_eos
from mt3_keras.note_encoder import time_to_step
from mt3_keras.notes import MIN_DURATION, Note, OpenNote, sort_notes


class NoteDecoder:
    """Reads the tokens of successive segments and keeps what still sounds between them.

    Nonsense from a model is counted, never raised: `invalid_events` are tokens that mean nothing
    or contradict what sounds, `dropped_events` are the tokens of a segment from the first shift
    past its end on. Program, velocity and sounding notes outlive a segment, as in the original.

    With ties, a segment opens with a tie section: its pitches say which of the sounding notes go
    on, and the tie token ends all others. A segment without tie token stays in that section: it
    adds no notes and ends none.

    Args:
      codec: meaning of the tokens.
      ties: whether segments begin with a tie section.
      onsets_only: tokens are shifts and pitches alone.
      segment_start: where a segment's time starts. "grid" is the last 10 ms step not after its
        start, which is what the targets are counted from. "original" subtracts `start % 0.01` in
        floats, as the original does: 10 ms early for one segment in eight (the first at 30.72 s).

    Attributes:
      notes: all notes ended so far, in the order in which they ended.
      confidences: empty, as tokens have none (see `RollDecoder`).

    Example:
      >>> from mt3_keras.note_decoder import NoteDecoder
      >>> from mt3_keras.codec import Codec, Event
      >>> codec = Codec(num_velocity_bins=1)
      >>> words = [("tie", 0), ("shift", 5), ("velocity", 1), ("pitch", 60)]
      >>> words += [("shift", 25), ("velocity", 0), ("pitch", 60)]
      >>> decoder = NoteDecoder(codec)
      >>> decoder.feed(0.0, [codec.encode(Event(*word)) for word in words])
      [Note(onset=0.05, offset=0.25, pitch=60, velocity=127, program=0, is_drum=False)]
    """

    def __init__(
        self,
        codec: Codec,
        *,
        ties: bool = True,
        onsets_only: bool = False,
        segment_start: Literal["grid", "original"] = "grid",
    ) -> None:
        if segment_start not in ("grid", "original"):
            raise ValueError(f"segment_start must be 'grid' or 'original': got {segment_start!r}")
        self.codec = codec
        self.ties = ties
        self.onsets_only = onsets_only
        self.segment_start = segment_start
        self.invalid_events = 0
        self.dropped_events = 0
        self.notes: list[Note] = []
        self.confidences: dict[Note, float] = {}
        self._time = 0.0
        self._velocity = 100
        self._program = 0
        self._open: dict[tuple[int, int], OpenNote] = {}  # (program, pitch)
        self._tied: set[tuple[int, int]] = set()
        self._in_tie_section = False

    @property
    def open_notes(self) -> dict[tuple[int, int], OpenNote]:
        """Notes that still sound, by (program, pitch)."""
        return dict(self._open)

    def feed(self, start: float, tokens: Sequence[int], end: float | None = None) -> list[Note]:
        """Reads one segment.

        Args:
          start: of the segment, in seconds; segments are fed in order.
          tokens: up to EOS, what follows it is ignored.
          end: start of the next segment, None for the last. A shift past it drops the rest.

        Returns:
          The notes that ended in this segment.
        """
        num_before = len(self.notes)
        self._tied = set()
        self._in_tie_section = self.ties
        time_at = self._clock(start)
        limit = None if end is None else self._clock(end)(0)
        tokens = trim_eos(list(tokens))
        time, shift_steps = time_at(0), 0
        for index, token in enumerate(tokens):
            try:
                event = self.codec.decode(token)
            except ValueError:
                self.invalid_events += 1
                continue
            if event.type == "shift":
                shift_steps += event.value
                time = time_at(shift_steps)
                if limit is not None and time > limit:
                    self.dropped_events += len(tokens) - index
                    break
                continue
            shift_steps = 0
            if not self._handle(event, time):
                self.invalid_events += 1
        return self.notes[num_before:]

    def finish(self) -> list[Note]:
        """Ends all sounding notes at the time of the last event and returns all notes, ordered."""
        for note in self._open.values():
            self._time = max(self._time, note.onset + MIN_DURATION)
        for key in list(self._open):
            self._close(key, self._time)
        return sort_notes(self.notes)

    def _clock(self, start: float) -> Callable[[int], float]:
        """Steps since the segment's start -> seconds."""
        rate = self.codec.steps_per_second
        if self.segment_start == "original":
            floored = start - start % (1 / rate)
            return lambda steps: floored + steps / rate
        first = time_to_step(start, rate)
        return lambda steps: (first + steps) / rate

    def _handle(self, event: Event, time: float) -> bool:
        """Applies one event; False if it makes no sense here."""
        if self.onsets_only:
            return self._handle_onset(event, time)
        if time < self._time:
            return False
        self._time = time
        match event.type:
            case "pitch":
                return self._handle_pitch((self._program, event.value), time)
            case "drum":
                return self._handle_drum(event.value, time)
            case "velocity":
                self._velocity = bin_to_velocity(event.value, self.codec.num_velocity_bins)
            case "program":
                self._program = event.value
            case "tie":
                if not self._in_tie_section:
                    return False
                for key in [key for key in self._open if key not in self._tied]:
                    self._close(key, time)
                self._in_tie_section = False
        return True

    def _handle_onset(self, event: Event, time: float) -> bool:
        if event.type != "pitch":
            return False
        self.notes.append(Note(time, time + MIN_DURATION, event.value, self._velocity))
        return True

    def _handle_pitch(self, key: tuple[int, int], time: float) -> bool:
        is_open = key in self._open
        if self._in_tie_section:
            if not is_open or key in self._tied:
                return False
            self._tied.add(key)
            return True
        if is_open:
            self._close(key, time)
        if self._velocity > 0:
            self._open[key] = OpenNote(time, self._velocity)
        return is_open or self._velocity > 0

    def _handle_drum(self, pitch: int, time: float) -> bool:
        if self._velocity == 0:
            return False
        self.notes.append(Note(time, time + MIN_DURATION, pitch, self._velocity, 0, True))
        return True

    def _close(self, key: tuple[int, int], time: float) -> None:
        self.notes.append(self._open.pop(key).end(time, *key))
