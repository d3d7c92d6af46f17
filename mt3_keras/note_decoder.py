"""Token ids -> notes: one state machine for offline, streaming and tests alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from mt3_keras.codec import Codec, Event, bin_to_velocity, trim_eos
from mt3_keras.config import ModelConfig
from mt3_keras.note_encoder import time_to_step
from mt3_keras.note_rolls import NoteRolls, SegmentTokens
from mt3_keras.notes import Note, map_program, sort_notes

SAME_STRIKE = 0.06  # seconds between a strike as told and as heard, at most
MIN_DURATION = 0.01  # seconds; also the length of drum hits and of notes without offsets


class OpenNote(NamedTuple):
    """A note that has begun and not ended."""

    onset: float
    velocity: int
    confidence: float | None = None


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
      least_confidence: notes of which the rolls are less sure are left out, as if the tokens did
        not tell them.
      sure_confidence: onsets of which the rolls are at least so sure are added where no token tells
        them; 1 adds none.
      programs, drums: what may be added.

    Attributes:
      notes: all notes ended so far, in the order in which they ended.
      confidences: of these notes, where the network has heads (see `note_rolls.NoteRolls`).
    """

    def __init__(
        self,
        codec: Codec,
        *,
        ties: bool = True,
        onsets_only: bool = False,
        segment_start: Literal["grid", "original"] = "grid",
        least_confidence: float = 0.0,
        sure_confidence: float = 1.0,
        programs: Collection[int] = range(128),
        drums: bool = True,
    ) -> None:
        if segment_start not in ("grid", "original"):
            raise ValueError(f"segment_start must be 'grid' or 'original': got {segment_start!r}")
        self.codec = codec
        self.ties = ties
        self.onsets_only = onsets_only
        self.segment_start = segment_start
        self.least_confidence = least_confidence
        self.sure_confidence = sure_confidence
        self.programs, self.drums = programs, drums
        self.invalid_events = 0
        self.dropped_events = 0
        self.notes: list[Note] = []
        self.confidences: dict[Note, float] = {}
        self._rolls: NoteRolls | None = None
        self._step = 0  # since the segment's start
        self._strikes: list[tuple[float, int, bool]] = []  # time, pitch, whether a drum, of late
        self._time = 0.0
        self._velocity = 100
        self._program = 0
        self._open: dict[tuple[int, int], OpenNote] = {}  # (program, pitch)
        self._tied: set[tuple[int, int]] = set()
        self._in_tie_section = False

    @classmethod
    def for_model(
        cls,
        config: ModelConfig,
        *,
        exact: bool = False,
        least_confidence: float | None = None,
        programs: Collection[int] | None = None,
        drums: bool = True,
    ) -> NoteDecoder:
        """One that reads what a model writes.

        Args:
          exact: as the original reads.
          least_confidence: None takes the model's own.
          programs, drums: what may appear; None allows all programs.
        """
        network, granularity = config.network, config.vocabulary.granularity
        if least_confidence is None:
            least_confidence = network.least_confidence
        programs = range(128) if programs is None else programs
        return cls(
            Codec(config.vocabulary.num_velocity_bins),
            ties=config.vocabulary.ties,
            segment_start="original" if exact else "grid",
            least_confidence=least_confidence,
            sure_confidence=max(network.sure_confidence, least_confidence),
            programs={map_program(program, granularity) for program in programs},
            drums=drums,
        )

    @property
    def open_notes(self) -> dict[tuple[int, int], OpenNote]:
        """Notes that still sound, by (program, pitch)."""
        return dict(self._open)

    def resume(self, open_notes: Mapping[tuple[int, int], OpenNote]) -> None:
        """Begins with notes that sound already, by (program, pitch)."""
        self._open = dict(open_notes)

    def feed(self, start: float, tokens: Sequence[int], end: float | None = None) -> list[Note]:
        """Reads one segment.

        The rolls of `SegmentTokens` give notes their velocities, which the tokens of one velocity
        bin do not tell, and confidences.

        Args:
          start: of the segment, in seconds; segments are fed in order.
          tokens: up to EOS; what follows it is ignored.
          end: start of the next segment, None for the last. A shift past it drops the rest.

        Returns:
          The notes that ended in this segment.
        """
        num_before = len(self.notes)
        self._tied = set()
        self._in_tie_section = self.ties
        time_at = self._clock(start)
        limit = None if end is None else self._clock(end)(0)
        self._rolls = tokens.rolls if isinstance(tokens, SegmentTokens) else None
        tokens = trim_eos(list(tokens))
        time, shift_steps, self._step = time_at(0), 0, 0
        for index, token in enumerate(tokens):
            try:
                event = self.codec.decode(token)
            except ValueError:
                self.invalid_events += 1
                continue
            if event.type == "shift":
                shift_steps += event.value
                time, self._step = time_at(shift_steps), shift_steps
                if limit is not None and time > limit:
                    self.dropped_events += len(tokens) - index
                    break
                continue
            shift_steps = 0
            if not self._handle(event, time):
                self.invalid_events += 1
        if self._rolls and self.sure_confidence < 1:
            self._add_untold(self._rolls, time_at, num_before, limit)
            self._end_silent(self._rolls, time_at)
        newest = max((strike[0] for strike in self._strikes), default=0.0)
        self._strikes = [s for s in self._strikes if s[0] >= newest - SAME_STRIKE]
        return self.notes[num_before:]

    def _add_untold(
        self,
        rolls: NoteRolls,
        time_at: Callable[[int], float],
        num_before: int,
        limit: float | None,
    ) -> None:
        """Adds what the heads are sure of and the segment's tokens do not tell."""
        for heard in rolls.notes(self.sure_confidence, self.programs, drums=self.drums):
            time, end = time_at(heard.step), heard.end
            strike = (time, heard.pitch, heard.is_drum)
            if limit is not None and time >= limit:
                continue
            if any(s[1:] == strike[1:] and abs(s[0] - time) <= SAME_STRIKE for s in self._strikes):
                continue
            self._strikes.append(strike)
            note = OpenNote(time, *heard.strike)
            if heard.is_drum:
                self._add_hit(heard.pitch, note)
                continue
            offset = None if end is None else max(time_at(end), time + MIN_DURATION)
            self._insert((heard.program, heard.pitch), note, offset, num_before)

    def _end_silent(self, rolls: NoteRolls, time_at: Callable[[int], float]) -> None:
        """Ends notes that no token has ended where the heads hear them fall silent."""
        for key, note in list(self._open.items()):
            begun = round((note.onset - time_at(0)) * self.codec.steps_per_second)
            end = rolls.end(begun, key[1])
            if end is not None:
                self._close(key, time_at(end))

    def _insert(
        self, key: tuple[int, int], note: OpenNote, offset: float | None, first: int
    ) -> None:
        """Adds a note among those of its key that have ended since `first`, or that sound."""
        program, pitch = key
        for i in range(first, len(self.notes)):
            other = self.notes[i]
            if (other.program, other.pitch, other.is_drum) != (program, pitch, False):
                continue
            if other.onset < note.onset < other.offset:  # it was struck again
                confidence = self.confidences.pop(other, None)
                offset = other.offset
                self.notes[i] = other._replace(offset=note.onset)
                if confidence is not None:
                    self.confidences[self.notes[i]] = confidence
            elif note.onset < other.onset:
                offset = other.onset if offset is None else min(offset, other.onset)
        if key in self._open:
            if self._open[key].onset < note.onset:
                self._close(key, note.onset)
            else:
                later = self._open[key].onset
                offset = later if offset is None else min(offset, later)
        if offset is None:
            self._open[key] = note
        else:
            ended = Note(note.onset, offset, pitch, note.velocity, program, False)
            self._add(ended, note.confidence)

    def finish(self) -> list[Note]:
        """Ends all sounding notes at the time of the last event and returns all notes, ordered."""
        for _, note in self._open.items():
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
                if self._velocity == 0:
                    return False
                begun = self._begin(event.value, time, is_drum=True)
                if begun:
                    self._add_hit(event.value, begun)
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
                return not is_open and self.least_confidence > 0
            self._tied.add(key)
            return True
        if self._velocity == 0:
            if is_open:
                self._close(key, time)
            return is_open or self.least_confidence > 0  # of a note that was left out
        begun = self._begin(key[1], time, is_drum=False)
        if begun:
            if is_open:
                self._close(key, time)
            self._open[key] = begun
        return True

    def _begin(self, pitch: int, time: float, *, is_drum: bool) -> OpenNote | None:
        """A note that begins, or None if the rolls are not sure of it."""
        note = OpenNote(time, self._velocity)
        strike = self._rolls.strike(self._step, pitch, is_drum=is_drum) if self._rolls else None
        if strike is not None:
            if strike.confidence < self.least_confidence:
                return None
            note = note._replace(confidence=strike.confidence)
            if self.codec.num_velocity_bins == 1:
                note = note._replace(velocity=strike.velocity)
        self._strikes.append((time, pitch, is_drum))
        return note

    def _close(self, key: tuple[int, int], time: float) -> None:
        onset, velocity, confidence = self._open.pop(key)
        program, pitch = key
        offset = max(time, onset + MIN_DURATION)
        self._add(Note(onset, offset, pitch, velocity, program, False), confidence)

    def _add_hit(self, pitch: int, note: OpenNote) -> None:
        end = note.onset + MIN_DURATION
        self._add(Note(note.onset, end, pitch, note.velocity, 0, True), note.confidence)

    def _add(self, note: Note, confidence: float | None) -> None:
        self.notes.append(note)
        if confidence is not None:
            self.confidences[note] = confidence
