"""Token ids -> notes: one state machine for offline, streaming and tests alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from mt3_keras.codec import Codec, Event, bin_to_velocity, trim_eos
from mt3_keras.models.config import ModelConfig
from mt3_keras.note_encoder import time_to_step
from mt3_keras.note_rolls import Certainty, Crossfade, HeardNote, Limits, NoteRolls, SegmentTokens
from mt3_keras.notes import Note, map_program, sort_notes

SAME_STRIKE = 0.06  # seconds from an onset, in which another of the pitch is the same one
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

    Where the network has heads (see `note_rolls`) tokens at most name the notes that begin. The
    heads say whether they do, when, how strongly, by which instrument and for how long, and add
    what they are sure of; but pitches that heads have no column for are read as from any network.

    Args:
      codec: meaning of the tokens.
      ties: whether segments begin with a tie section.
      onsets_only: tokens are shifts and pitches alone.
      segment_start: where a segment's time starts. "grid" is the last 10 ms step not after its
        start, which is what the targets are counted from. "original" subtracts `start % 0.01` in
        floats, as the original does: 10 ms early for one segment in eight (the first at 30.72 s).
      least_confidence: notes of which the heads are less sure are left out.
      sure_confidence: onsets of which they are at least so sure are added where no token tells
        them; 1 adds none.
      certainty: of which onsets the heads are sure, as the music goes, in the place of the two: the
        heads alone decide, since what tokens add to them was found to be wrong as often as right.
      programs, drums: what the heads may hear.

    Attributes:
      notes: all notes ended so far, in the order in which they ended.
      confidences: of these notes, where the heads heard them.
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
        certainty: Certainty | None = None,
        programs: Collection[int] = range(128),
        drums: bool = True,
    ) -> None:
        if segment_start not in ("grid", "original"):
            raise ValueError(f"segment_start must be 'grid' or 'original': got {segment_start!r}")
        self.codec = codec
        self.ties = ties
        self.onsets_only = onsets_only
        self.segment_start = segment_start
        self.least_confidence = math.inf if certainty else least_confidence
        self.certainty = certainty
        self.programs, self.drums = sorted(programs), drums
        self.invalid_events = 0
        self.dropped_events = 0
        self.notes: list[Note] = []
        self.confidences: dict[Note, float] = {}
        self._sure = Limits(sure_confidence, sure_confidence)
        self._rolls: NoteRolls | None = None
        self._crossfade = Crossfade()
        self._told: list[HeardNote] = []  # by this segment's tokens
        self._struck: dict[tuple[int, bool], float] = {}  # last onset of a pitch or drum heard
        self._step = 0  # since the segment's start
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
        certainty: Certainty | None = None,
        programs: Collection[int] | None = None,
        drums: bool = True,
    ) -> NoteDecoder:
        """One that reads what a model writes.

        Args:
          exact: as the original reads.
          least_confidence: of all notes; None lets the model decide as the music goes.
          certainty: one that has heard what came before.
          programs, drums: what may appear; None allows all programs.
        """
        network, granularity = config.network, config.vocabulary.granularity
        least, sure = network.least_confidence, network.sure_confidence
        if least_confidence is not None:
            least, sure, certainty = least_confidence, least_confidence if sure < 1 else 1.0, None
        elif sure < 1:
            certainty = certainty or Certainty(sure, least)
        programs = range(128) if programs is None else programs
        return cls(
            Codec(config.vocabulary.num_velocity_bins),
            ties=config.vocabulary.ties,
            segment_start="original" if exact else "grid",
            least_confidence=least,
            sure_confidence=sure,
            certainty=certainty,
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

        Args:
          start: of the segment, in seconds; segments are fed in order.
          tokens: up to EOS, what follows it is ignored; `SegmentTokens` with what the heads say,
            which may reach past `end`.
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
        if self._rolls:
            rate = self._rolls.frames_per_second
            num_frames = None if end is None else round((end - start) * rate)
            self._rolls = self._crossfade.join(self._rolls, num_frames)
        self._told = []
        if self._rolls and self.certainty:
            self._sure = self.certainty.hear(self._rolls)
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
        if self._rolls:
            self._hear(self._rolls, time_at)
        return self.notes[num_before:]

    def _hear(self, rolls: NoteRolls, time_at: Callable[[int], float]) -> None:
        """Plays the notes of a segment that tokens tell or the heads are sure of."""
        notes = self._told
        if max(self._sure) < 1:
            notes = notes + rolls.notes(self._sure, self.programs, drums=self.drums)
        heard = [(time_at(note.step), note) for note in notes]
        for time, note in sorted(heard, key=lambda pair: pair[0]):  # what was told comes first
            same = (note.pitch, note.is_drum)
            if time - self._struck.get(same, -math.inf) <= SAME_STRIKE:
                continue
            self._struck[same] = time
            begun = OpenNote(time, note.velocity, note.confidence)
            if note.is_drum:
                self._add_hit(note.pitch, begun)
                continue
            for key in [key for key in self._open if key[1] == note.pitch]:  # by whatever program
                self._end_silent(key, rolls, time_at, time)
            self._open[note.program, note.pitch] = begun
        for key in [key for key in self._open if self._hears(key[1])]:
            self._end_silent(key, rolls, time_at)
        self._time = max(self._time, time_at(rolls.num_steps))

    def _end_silent(
        self,
        key: tuple[int, int],
        rolls: NoteRolls,
        time_at: Callable[[int], float],
        latest: float = math.inf,
    ) -> None:
        """Ends a note where the heads hear it fall silent, and at `latest`."""
        begun = round((self._open[key].onset - time_at(0)) * self.codec.steps_per_second)
        end = rolls.end(begun, key[1])
        time = min(latest, math.inf if end is None else time_at(end))
        if time < math.inf:
            self._close(key, time)

    def _hears(self, pitch: int) -> bool:
        """Whether the heads decide about a pitch in this segment."""
        return self._rolls is not None and self._rolls.has_column(pitch)

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
                    if not self._hears(key[1]):
                        self._close(key, time)
                self._in_tie_section = False
        return True

    def _handle_onset(self, event: Event, time: float) -> bool:
        if event.type != "pitch":
            return False
        self.notes.append(Note(time, time + MIN_DURATION, event.value, self._velocity))
        return True

    def _handle_pitch(self, key: tuple[int, int], time: float) -> bool:
        if self._rolls and self._hears(key[1]):
            if not self._in_tie_section and self._velocity > 0 and self.programs:
                self._tell(self._rolls, key[1], is_drum=False)
            return True
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
        if self._rolls:
            self._tell(self._rolls, pitch, is_drum=True)
        else:
            self._add_hit(pitch, OpenNote(time, self._velocity))
        return True

    def _tell(self, rolls: NoteRolls, pitch: int, *, is_drum: bool) -> None:
        note = rolls.find(self._step, pitch, self.programs, is_drum=is_drum)
        if self.codec.num_velocity_bins > 1:
            note = note._replace(velocity=self._velocity)
        if note.confidence >= self.least_confidence:
            self._told.append(note)

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
