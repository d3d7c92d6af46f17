"""Transcription scores: how well estimated notes agree with reference notes.

Notes have pitch, onset, offset, velocity and instrument. An estimated note is a hit if it can be
paired, one to one, with a reference note of the same pitch whose onset is at most 50 ms away and,
where offsets count, whose offset is at most 50 ms or a fifth of the reference note's length away.
Precision is hits per estimated note, recall hits per reference note, F1 their harmonic mean; the
pairing is a largest possible one (mir_eval, Raffel et al., ISMIR 2014). Frame scores compare piano
rolls instead. "Drum-less" means that drum notes are left out and the instrument is ignored;
program-aware scores require the same program ("full"), a program of the same class of eight
("midi_class"), or any program ("flat").

`transcription_scores` computes the scores of MT3 (Gardner et al., ICLR 2022, arXiv 2111.03017)
under its names, with its values. These peculiarities of the original are kept:

- Notes shorter than 50 ms (if the reference is all drums, or empty: all notes) are stretched to
  50 ms for the frame scores, and stay stretched in the tolerance sweep that follows: its entry for
  0.05 s can differ from "Onset + offset", and it counts notes without duration.
- In the frame scores a reference cell counts only if its velocities add up to more than 30, an
  estimated cell always: a soft note that is found counts as false.
- Drums are compared per drum kit (program), whatever the granularity.
- Where there is nothing to count the score is 0, also for a piece without drums that is correctly
  transcribed without drums, and these zeros are part of the mean over pieces.
- Velocity scores (mir_eval) take one of the largest pairings, chosen without regard to velocity,
  fit a line to its velocities and drop the pairs off that line. They depend on the order of the
  notes, and where a pitch is repeated within 50 ms even a perfect transcription can fall short.

The original's piano roll can lose notes when several programs share instrument number 0; a `Note`
has no instrument number, so here it cannot. The scores of onset-only models are left out.

`further_scores` adds scores of later work, and variants without the first four peculiarities:
"(unmodified notes)" scores neither stretch nor ignore a note, "Drum onset" without a granularity
ignores the kit, and a score with nothing to count is left out, so that `mean_scores` averages it
over the pieces that have it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mt3_keras.notes import GRANULARITIES, Note, check_notes, map_program

FRAMES_PER_SECOND = 62.5
REFERENCE_VELOCITY_THRESHOLD = 30
MIN_FRAME_NOTE_SECONDS = 0.05
SWEEP_TOLERANCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
VELOCITY_TOLERANCE = 0.1


class TrackSpec(NamedTuple):
    """A track that is scored separately: the notes of one program and drum flag."""

    name: str
    program: int = 0
    is_drum: bool = False


CERBERUS4_TRACKS = (
    TrackSpec("bass", program=32),
    TrackSpec("drums", is_drum=True),
    TrackSpec("guitar", program=24),
    TrackSpec("piano", program=0),
)


class Counts(NamedTuple):
    """Counts of notes, frames or instruments, of which precision, recall and F1 are ratios."""

    num_hits: int
    num_reference: int
    num_estimate: int


def transcription_scores(
    reference: Sequence[Note],
    estimate: Sequence[Note],
    *,
    invalid_events: int = 0,
    dropped_events: int = 0,
    tracks: Sequence[TrackSpec] = (),
) -> dict[str, float]:
    """The original's scores of one piece (see the module's docstring for peculiarities).

    Args:
      reference: the true notes.
      estimate: the transcribed notes.
      invalid_events: count of the decoder, part of the result.
      dropped_events: likewise.
      tracks: tracks to score separately as well; their scores are named "<track>/...". The original
        does so for one data set, with `CERBERUS4_TRACKS`.

    Returns:
      62 scores by name, and 15 more a track (9 for a drum track).

    Raises:
      ValueError: a note is out of range, or ends before it starts. Notes without duration are
        no error; they are left out.
    """
    _check(reference, estimate)
    scores = {"Invalid events": float(invalid_events), "Dropped events": float(dropped_events)}
    drumless = _select(reference, estimate, is_drum=False)
    scores |= _track_scores(*drumless, use_offsets=True)
    for track in tracks:
        track_scores = _track_scores(
            [n for n in reference if (n.program, n.is_drum) == track[1:]],
            [n for n in estimate if (n.program, n.is_drum) == track[1:]],
            use_offsets=not track.is_drum,
        )
        scores |= {f"{track.name}/{name}": score for name, score in track_scores.items()}
    for granularity in GRANULARITIES:
        scores |= _program_aware_scores(reference, estimate, granularity)
    for name, counts in _sweep_tolerances(*_stretch(*drumless)).items():
        scores |= _name_scores(name, counts)
    return scores


def further_scores(reference: Sequence[Note], estimate: Sequence[Note]) -> dict[str, float]:
    """Scores that the original lacks.

    Drums count as one more instrument, whatever their kit. Each score is given as precision, recall
    and F1, and left out if neither side has anything to count.

    - "Onset + program ... (granularity)": all notes, offsets ignored.
    - "Instrument detection ... (granularity)": the sets of programs (and drums) that occur.
    - "Instrument leakage ratio": number of instruments in the estimate / number of instruments in
      the reference, 1 being ideal, after MR-MT3 (Tan et al., 2024, arXiv 2403.10024); by full
      programs, one ratio a piece. Its authors' scripts count programs alone, which makes drums
      and program 0 one instrument. Left out for an empty reference.
    - "Drum onset ...": drum notes, onset and drum pitch.
    - "Onset + offset ... (tolerance, unmodified notes)", "Frame ... (unmodified notes)": drum-less,
      neither stretched nor thresholded.

    Raises:
      ValueError: as `transcription_scores`.
    """
    _check(reference, estimate)
    counts = {}
    for granularity in GRANULARITIES:
        mapped = [_map_programs(_sounding(n), granularity) for n in (reference, estimate)]
        counts[f"Onset + program {{}} ({granularity})"] = _count(*mapped, offset_ratio=None)
        present, found = ({(n.program, n.is_drum) for n in notes} for notes in mapped)
        counts[f"Instrument detection {{}} ({granularity})"] = Counts(
            len(present & found), len(present), len(found)
        )
    drums = _select(reference, estimate, is_drum=True)
    counts["Drum onset {}"] = _count(*drums, offset_ratio=None)
    drumless = _select(reference, estimate, is_drum=False)
    for name, count in _sweep_tolerances(*drumless).items():
        counts[name.replace(")", ", unmodified notes)")] = count
    rolls = (piano_roll(notes) > 0 for notes in drumless)
    counts["Frame {} (unmodified notes)"] = _count_frames(*rolls)

    scores: dict[str, float] = {}
    for name, count in counts.items():
        if count.num_reference or count.num_estimate:
            scores |= _name_scores(name, count)
    _, num_present, num_found = counts["Instrument detection {} (full)"]
    if num_present:
        scores["Instrument leakage ratio"] = num_found / num_present
    return scores


def onset_scores(
    reference: Sequence[Note], estimate: Sequence[Note], *, onset_tolerance: float = 0.05
) -> tuple[float, float, float]:
    """Precision, recall and F1 of pitch and onset, without drums, instruments ignored.

    Zeros where either side has no such note.

    Args:
      reference: the true notes.
      estimate: the notes found.
      onset_tolerance: largest distance of two onsets, in seconds.

    Raises:
      ValueError: as `transcription_scores`.
    """
    _check(reference, estimate)
    notes = _select(reference, estimate, is_drum=False)
    return _precision_recall_f1(_count(*notes, onset_tolerance=onset_tolerance, offset_ratio=None))


def drum_onset_scores(
    reference: Sequence[Note], estimate: Sequence[Note], *, onset_tolerance: float = 0.05
) -> tuple[float, float, float]:
    """Like `onset_scores`, of the drum notes alone: same drum (pitch), kits ignored."""
    _check(reference, estimate)
    notes = _select(reference, estimate, is_drum=True)
    return _precision_recall_f1(_count(*notes, onset_tolerance=onset_tolerance, offset_ratio=None))


def mean_scores(examples: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The plain mean of each score over the examples that have it."""
    values = defaultdict(list)
    for example in examples:
        for name, score in example.items():
            values[name].append(score)
    return {name: math.fsum(scores) / len(scores) for name, scores in values.items()}


def match_notes(
    reference: Sequence[Note],
    estimate: Sequence[Note],
    *,
    onset_tolerance: float = 0.05,
    offset_ratio: float | None = 0.2,
    offset_min_tolerance: float = 0.05,
) -> list[tuple[int, int]]:
    """A largest one-to-one pairing of notes of the same pitch, program and drum flag.

    Equals `mir_eval.transcription.match_notes` of all notes, in much less time and memory: that
    function builds matrices of all notes by all notes, and is called here for one pitch at a time,
    since notes of different pitch cannot be paired.

    Args:
      reference: the true notes, of positive duration.
      estimate: the notes found, likewise.
      onset_tolerance: largest distance of two onsets, in seconds.
      offset_ratio: largest distance of two offsets as a fraction of the reference note's length;
        None ignores offsets.
      offset_min_tolerance: distance of two offsets that is always allowed, in seconds.

    Returns:
      Pairs (index in `reference`, index in `estimate`), in order.
    """
    import mir_eval  # takes a second, which no --help should

    reference_groups, estimate_groups = _group_indices(reference), _group_indices(estimate)
    matching: list[tuple[int, int]] = []
    for key in reference_groups.keys() & estimate_groups.keys():
        refs, ests = reference_groups[key], estimate_groups[key]
        pairs = mir_eval.transcription.match_notes(
            np.array([reference[i][:2] for i in refs]),
            np.ones(len(refs)),
            np.array([estimate[i][:2] for i in ests]),
            np.ones(len(ests)),
            onset_tolerance=onset_tolerance,
            offset_ratio=offset_ratio,
            offset_min_tolerance=offset_min_tolerance,
        )
        matching += [(refs[i], ests[j]) for i, j in pairs]
    return sorted(matching)


def piano_roll(
    notes: Sequence[Note], frames_per_second: float = FRAMES_PER_SECOND
) -> NDArray[np.int32]:
    """Notes -> velocities [128, T], added up where notes of the same pitch overlap.

    A note fills the frames from floor(onset) to before floor(offset), in units of frames, as in
    pretty_midi: one that begins and ends within a frame fills none. Programs are ignored.
    """
    spans = [(int(n.onset * frames_per_second), int(n.offset * frames_per_second)) for n in notes]
    roll = np.zeros((128, max((end for _, end in spans), default=0)), np.int32)
    for note, (start, end) in zip(notes, spans, strict=True):
        roll[note.pitch, start:end] += note.velocity
    return roll


def frame_scores(
    reference_roll: NDArray[np.number],
    estimate_roll: NDArray[np.number],
    *,
    velocity_threshold: float = REFERENCE_VELOCITY_THRESHOLD,
) -> tuple[float, float, float]:
    """Precision, recall and F1 over the cells of two piano rolls.

    Args:
      reference_roll: MIDI velocities [pitches, T].
      estimate_roll: [pitches, T'], at the same frame rate; a cell is active above 0. The shorter
        roll counts as silent from its end.
      velocity_threshold: above which a cell of the reference is active.
    """
    return _precision_recall_f1(
        _count_frames(reference_roll > velocity_threshold, estimate_roll > 0)
    )


def _track_scores(
    reference: Sequence[Note], estimate: Sequence[Note], *, use_offsets: bool
) -> dict[str, float]:
    rolls = [piano_roll(notes) for notes in _stretch(reference, estimate)]
    reference, estimate = _sounding(reference), _sounding(estimate)
    size = len(reference), len(estimate)
    matchings = {"Onset": match_notes(reference, estimate, offset_ratio=None)}
    if use_offsets:
        matchings["Onset + offset"] = match_notes(reference, estimate)
    scores: dict[str, float] = {}
    for name, matching in matchings.items():
        scores |= _name_scores(f"{name} {{}}", Counts(len(matching), *size))
    for name, matching in matchings.items():
        num_hits = _count_velocity_hits(reference, estimate, matching)
        scores |= _name_scores(f"{name} + velocity {{}}", Counts(num_hits, *size))
    names = ("Frame Precision", "Frame Recall", "Frame F1")
    return scores | dict(zip(names, frame_scores(*rolls), strict=True))


def _program_aware_scores(
    reference: Sequence[Note], estimate: Sequence[Note], granularity: str
) -> dict[str, float]:
    both_sides = reference, estimate
    drums = _count(*([n for n in notes if n.is_drum] for notes in both_sides), offset_ratio=None)
    drumless = ([n for n in notes if not n.is_drum] for notes in both_sides)
    pitched = _count(*(_map_programs(notes, granularity) for notes in drumless))
    both = Counts(*(d + p for d, p in zip(drums, pitched, strict=True)))
    return (
        _name_scores(f"Onset + offset + program {{}} ({granularity})", both)
        | _name_scores(f"Drum onset {{}} ({granularity})", drums)
        | _name_scores(f"Nondrum onset + offset + program {{}} ({granularity})", pitched)
    )


def _sweep_tolerances(reference: Sequence[Note], estimate: Sequence[Note]) -> dict[str, Counts]:
    return {
        f"Onset + offset {{}} ({tolerance})": _count(
            reference, estimate, onset_tolerance=tolerance, offset_min_tolerance=tolerance
        )
        for tolerance in SWEEP_TOLERANCES
    }


def _count_velocity_hits(
    reference: Sequence[Note], estimate: Sequence[Note], matching: Sequence[tuple[int, int]]
) -> int:
    """The pairs whose velocities agree, by the rule of `mir_eval.transcription_velocity`.

    Reference velocities are scaled to [0, 1], estimated ones by the line that fits the pairs best.
    """
    if not matching:
        return 0
    all_velocities = [note.velocity for note in reference]
    low, high = min(all_velocities), max(all_velocities)
    truth = np.array([(reference[i].velocity - low) / max(1, high - low) for i, _ in matching])
    found = np.array([estimate[j].velocity for _, j in matching])
    slope, intercept = np.linalg.lstsq(np.vander(found, 2), truth, rcond=None)[0]
    return int(np.count_nonzero(np.abs(slope * found + intercept - truth) < VELOCITY_TOLERANCE))


def _count_frames(reference: NDArray[np.bool_], estimate: NDArray[np.bool_]) -> Counts:
    num_frames = min(reference.shape[1], estimate.shape[1])
    both = reference[:, :num_frames] & estimate[:, :num_frames]
    return Counts(*(int(np.count_nonzero(cells)) for cells in (both, reference, estimate)))


def _count(reference: Sequence[Note], estimate: Sequence[Note], **tolerances: Any) -> Counts:
    reference, estimate = _sounding(reference), _sounding(estimate)
    matching = match_notes(reference, estimate, **tolerances)
    return Counts(len(matching), len(reference), len(estimate))


def _precision_recall_f1(counts: Counts) -> tuple[float, float, float]:
    import mir_eval

    precision = counts.num_hits / counts.num_estimate if counts.num_estimate else 0.0
    recall = counts.num_hits / counts.num_reference if counts.num_reference else 0.0
    return precision, recall, mir_eval.util.f_measure(precision, recall)


def _name_scores(name: str, counts: Counts) -> dict[str, float]:
    """`name` holds a pair of braces where precision, recall or F1 goes."""
    measures = ("precision", "recall", "F1")
    return dict(zip(map(name.format, measures), _precision_recall_f1(counts), strict=True))


def _check(*note_lists: Sequence[Note]) -> None:
    for notes in note_lists:
        check_notes(n for n in notes if n.offset != n.onset)


def _sounding(notes: Iterable[Note]) -> list[Note]:
    return [n for n in notes if n.offset != n.onset]


def _select(*note_lists: Sequence[Note], is_drum: bool) -> list[list[Note]]:
    """The drum notes or the others, as of program 0."""
    return [[n._replace(program=0) for n in notes if n.is_drum == is_drum] for notes in note_lists]


def _map_programs(notes: Iterable[Note], granularity: str) -> list[Note]:
    """Notes with their programs mapped, drums as program 0."""
    return [
        n._replace(program=0 if n.is_drum else map_program(n.program, granularity)) for n in notes
    ]


def _stretch(reference: Sequence[Note], estimate: Sequence[Note]) -> tuple[list[Note], list[Note]]:
    """Lengthens short notes to 50 ms; gives all notes that length if the reference is all drums."""
    is_drum = all(n.is_drum for n in reference)

    def stretch(note: Note) -> Note:
        if is_drum or note.offset - note.onset < MIN_FRAME_NOTE_SECONDS:
            return note._replace(offset=note.onset + MIN_FRAME_NOTE_SECONDS)
        return note

    return [stretch(n) for n in reference], [stretch(n) for n in estimate]


def _group_indices(notes: Sequence[Note]) -> dict[tuple[int, int, bool], list[int]]:
    groups = defaultdict(list)
    for index, note in enumerate(notes):
        groups[note.pitch, note.program, note.is_drum].append(index)
    return groups
