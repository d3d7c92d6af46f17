"""The scores against the original's golden values, mir_eval and pretty_midi."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from typing import Any

import mir_eval
import numpy as np
import pretty_midi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt3_keras.metrics import (
    CERBERUS4_TRACKS,
    TrackSpec,
    drum_onset_scores,
    frame_scores,
    further_scores,
    match_notes,
    mean_scores,
    onset_scores,
    piano_roll,
    transcription_scores,
)
from mt3_keras.notes import GRANULARITIES, Note, map_program

MEASURES = ("precision", "recall", "F1")
C4 = Note(1.0, 1.5, 60, 100)
E4 = Note(2.0, 2.5, 64, 90, program=33)
SNARE = Note(1.0, 1.01, 38, 100, is_drum=True)


@st.composite
def random_note(draw: st.DrawFn, durations: Sequence[int] = (0, 1, 4, 5, 12, 40)) -> Note:
    """On a grid of 10 ms, so that distances of exactly a tolerance are common."""
    onset = draw(st.integers(0, 30))
    offset = onset + draw(st.sampled_from(durations))
    return Note(
        onset / 100,
        offset / 100,
        draw(st.integers(60, 62)),
        draw(st.sampled_from((1, 30, 31, 64, 127))),
        draw(st.sampled_from((0, 24, 26, 32))),
        draw(st.booleans()),
    )


random_notes = st.lists(random_note(), max_size=25)
few_examples = settings(max_examples=50, deadline=None)  # a busy machine is no failure


def to_arrays(notes: Sequence[Note]) -> dict[str, Any]:
    """As mir_eval takes them; notes without duration, which it refuses, are left out."""
    notes = [n for n in notes if n.offset > n.onset]
    return {
        "intervals": np.array([n[:2] for n in notes]).reshape(-1, 2),
        "pitches": pretty_midi.note_number_to_hz(np.array([n.pitch for n in notes])),
        "velocities": np.array([n.velocity for n in notes]),
    }


def mir_eval_scores(
    reference: Sequence[Note],
    estimate: Sequence[Note],
    *,
    velocities: bool = False,
    **options: Any,
) -> tuple[float, float, float]:
    """Precision, recall and F1 of mir_eval, all notes at once."""
    sides = {"ref": to_arrays(reference), "est": to_arrays(estimate)}
    given = {f"{side}_{name}": x for side, arrays in sides.items() for name, x in arrays.items()}
    if velocities:
        task = mir_eval.transcription_velocity
    else:
        task = mir_eval.transcription
        del given["ref_velocities"], given["est_velocities"]
    return task.precision_recall_f1_overlap(**given, **options)[:3]


def drumless(notes: Sequence[Note]) -> list[Note]:
    return [n for n in notes if not n.is_drum]


def pick(scores: dict[str, float], name: str) -> list[float]:
    return [scores[name.format(measure)] for measure in MEASURES]


@pytest.mark.parametrize("clip", ["band", "piano"])
def test_all_62_scores_are_those_of_the_original(shared: pathlib.Path, clip: str) -> None:
    golden = json.loads((shared / "golden" / f"met_{clip}.json").read_text())
    reference, estimate = ([Note(*n) for n in golden[k]] for k in ("reference", "estimate"))
    scores = transcription_scores(reference, estimate)
    assert len(scores) == 62
    assert scores == pytest.approx(golden["scores"], abs=1e-6, rel=0)


@few_examples
@given(random_notes, random_notes, st.sampled_from((0.01, 0.05, 0.1)), st.booleans())
def test_matching_pitch_by_pitch_gives_the_pairs_of_mir_eval(
    reference: list[Note], estimate: list[Note], tolerance: float, offsets: bool
) -> None:
    notes = [
        [n._replace(program=0, is_drum=False) for n in side if n.offset > n.onset]
        for side in (reference, estimate)
    ]
    ref, est = map(to_arrays, notes)
    options: dict[str, Any] = {
        "onset_tolerance": tolerance,
        "offset_min_tolerance": tolerance,
        "offset_ratio": 0.2 if offsets else None,
    }
    expected = []
    if all(notes):
        expected = mir_eval.transcription.match_notes(
            ref["intervals"], ref["pitches"], est["intervals"], est["pitches"], **options
        )
    assert match_notes(*notes, **options) == expected


@few_examples
@given(random_notes, random_notes)
def test_note_scores_are_those_of_mir_eval_without_drums(
    reference: list[Note], estimate: list[Note]
) -> None:
    scores = transcription_scores(reference, estimate)
    notes = drumless(reference), drumless(estimate)
    cases: dict[str, dict[str, Any]] = {
        "Onset {}": {"offset_ratio": None},
        "Onset + offset {}": {},
        "Onset + velocity {}": {"offset_ratio": None, "velocities": True},
        "Onset + offset + velocity {}": {"velocities": True},
    }
    for name, options in cases.items():
        assert pick(scores, name) == pytest.approx(mir_eval_scores(*notes, **options)), name


@few_examples
@given(random_notes, random_notes, st.sampled_from(GRANULARITIES))
def test_program_aware_scores_sum_mir_eval_over_programs(
    reference: list[Note], estimate: list[Note], granularity: str
) -> None:
    def part(notes: list[Note], program: int, is_drum: bool) -> list[Note]:
        return [
            n
            for n in notes
            if n.is_drum == is_drum
            and n.offset > n.onset
            and program == (n.program if is_drum else map_program(n.program, granularity))
        ]

    sums = {False: np.zeros(4), True: np.zeros(4)}
    for is_drum in sums:
        for program in range(40):
            parts = part(reference, program, is_drum), part(estimate, program, is_drum)
            offset_ratio = None if is_drum else 0.2
            precision, recall, _ = mir_eval_scores(*parts, offset_ratio=offset_ratio)
            sizes = [len(p) for p in parts]
            sums[is_drum] += [recall * sizes[0], sizes[0], precision * sizes[1], sizes[1]]
    scores = transcription_scores(reference, estimate)
    for name, total in {
        "Drum onset": sums[True],
        "Nondrum onset + offset + program": sums[False],
        "Onset + offset + program": sums[True] + sums[False],
    }.items():
        recall = total[0] / total[1] if total[1] else 0.0
        precision = total[2] / total[3] if total[3] else 0.0
        expected = (precision, recall, mir_eval.util.f_measure(precision, recall))
        assert pick(scores, f"{name} {{}} ({granularity})") == pytest.approx(expected)


@few_examples
@given(random_notes)
def test_piano_roll_is_that_of_pretty_midi(notes: list[Note]) -> None:
    instrument = pretty_midi.Instrument(0)
    instrument.notes = [pretty_midi.Note(n.velocity, n.pitch, n.onset, n.offset) for n in notes]
    roll = piano_roll(notes)
    assert roll.shape[0] == 128
    np.testing.assert_array_equal(roll, instrument.get_piano_roll(fs=62.5))


@pytest.mark.parametrize("num_frames", [5, 9])
def test_one_frame_hit_of_three_scores_a_third(num_frames: int) -> None:
    reference, estimate = np.zeros((128, 5)), np.zeros((128, num_frames))
    reference[10, 0:3] = 127
    estimate[10, 2:5] = 127
    assert frame_scores(reference, estimate, velocity_threshold=1) == pytest.approx([1 / 3] * 3)
    assert frame_scores(estimate, reference, velocity_threshold=1) == pytest.approx([1 / 3] * 3)


@few_examples
@given(random_notes, random_notes)
def test_a_track_scores_like_a_piece_of_its_own(
    reference: list[Note], estimate: list[Note]
) -> None:
    scores = transcription_scores(reference, estimate, tracks=CERBERUS4_TRACKS)
    assert len(scores) == 62 + 3 * 15 + 9
    for name, program, is_drum in CERBERUS4_TRACKS:
        # Scored as a piece, a drum track would be left out: there it is given as pitched notes.
        alone = [
            [
                n._replace(is_drum=False)
                for n in notes
                if (n.program, n.is_drum) == (program, is_drum)
            ]
            for notes in (reference, estimate)
        ]
        whole = transcription_scores(*alone)
        for track_name, score in scores.items():
            prefix, _, own_name = track_name.partition("/")
            if prefix == name and not (is_drum and own_name.startswith("Frame")):
                assert score == whole[own_name], track_name


def test_drum_tracks_have_no_offset_scores_and_frames_of_a_fixed_length() -> None:
    long_snare = SNARE._replace(offset=1.9)
    tracks = (TrackSpec("kit", is_drum=True),)
    scores = transcription_scores([SNARE], [long_snare], tracks=tracks)
    assert scores["kit/Onset F1"] == scores["kit/Frame F1"] == 1
    assert "kit/Onset + offset F1" not in scores


def test_decoder_counts_are_reported_as_they_are() -> None:
    scores = transcription_scores([C4], [C4], invalid_events=3, dropped_events=7)
    assert (scores["Invalid events"], scores["Dropped events"]) == (3, 7)


def test_the_tolerance_sweep_sees_notes_stretched_to_50_ms() -> None:
    reference, estimate = [Note(1.0, 1.01, 60, 100)], [Note(1.0, 1.075, 60, 100)]
    scores = transcription_scores(reference, estimate)
    assert scores["Onset + offset F1"] == 0
    assert scores["Onset + offset F1 (0.05)"] == 1
    assert further_scores(reference, estimate)["Onset + offset F1 (0.05, unmodified notes)"] == 0


def test_the_tolerance_sweep_counts_notes_without_duration() -> None:
    silent = Note(1.0, 1.0, 60, 100)
    scores = transcription_scores([silent, E4], [silent, E4._replace(pitch=1)])
    assert scores["Onset F1"] == 0
    assert scores["Onset + offset F1 (0.05)"] == 0.5


def test_a_soft_note_that_is_found_is_a_false_alarm_only_in_the_original_frame_scores() -> None:
    soft = C4._replace(velocity=30)
    assert transcription_scores([soft], [C4])["Frame Precision"] == 0
    assert further_scores([soft], [C4])["Frame precision (unmodified notes)"] == 1
    louder = C4._replace(velocity=31)
    assert transcription_scores([louder], [C4])["Frame Precision"] == 1


def test_the_drum_kit_counts_only_in_the_original_drum_scores() -> None:
    other_kit = [SNARE._replace(program=25)]
    assert transcription_scores([SNARE], other_kit)["Drum onset F1 (flat)"] == 0
    scores = further_scores([SNARE], other_kit)
    assert scores["Drum onset F1"] == scores["Onset + program F1 (full)"] == 1
    assert scores["Instrument detection F1 (full)"] == 1
    assert drum_onset_scores([SNARE], other_kit) == (1, 1, 1)


def test_onset_and_program_ignores_offsets_and_respects_the_granularity() -> None:
    reference = [C4, E4, SNARE]
    estimate = [C4._replace(offset=9.0), E4._replace(program=32), SNARE]
    scores = further_scores(reference, estimate)
    assert pick(scores, "Onset + program {} (full)") == pytest.approx([2 / 3] * 3)
    assert pick(scores, "Onset + program {} (midi_class)") == [1, 1, 1]
    assert pick(scores, "Instrument detection {} (full)") == pytest.approx([2 / 3] * 3)
    assert pick(scores, "Instrument detection {} (midi_class)") == [1, 1, 1]


def test_leakage_is_the_number_of_instruments_found_for_each_there_is() -> None:
    found = [C4, *(E4._replace(program=p) for p in (40, 41)), SNARE]
    assert further_scores([C4, C4._replace(pitch=62)], found)["Instrument leakage ratio"] == 4
    assert further_scores([C4, SNARE], [C4])["Instrument leakage ratio"] == 0.5
    assert "Instrument leakage ratio" not in further_scores([], found)


def test_onset_scores_leave_out_drums_and_ignore_instruments() -> None:
    estimate = [C4._replace(onset=1.08, program=70), SNARE]
    assert onset_scores([C4, E4], estimate) == (0, 0, 0)
    scores = onset_scores([C4, E4], estimate, onset_tolerance=0.1)
    assert scores == pytest.approx((1, 1 / 2, 2 / 3))
    assert onset_scores([C4, SNARE], [C4]) == (1, 1, 1)


def test_drum_onset_scores_ask_for_the_drum_and_leave_out_pitched_notes() -> None:
    late = SNARE._replace(onset=1.08, offset=1.09)
    kick = SNARE._replace(pitch=36)
    assert drum_onset_scores([SNARE, C4], [kick, SNARE]) == pytest.approx((1 / 2, 1, 2 / 3))
    assert drum_onset_scores([SNARE], [late]) == (0, 0, 0)
    assert drum_onset_scores([SNARE], [late], onset_tolerance=0.1) == (1, 1, 1)


@few_examples
@given(st.lists(random_note((5, 12, 40)), max_size=25))
def test_a_perfect_transcription_scores_1_wherever_there_is_something_to_count(
    notes: list[Note],
) -> None:
    notes = [n._replace(velocity=max(31, n.velocity)) for n in notes]
    assert set(further_scores(notes, notes).values()) <= {1.0}
    scores = transcription_scores(notes, notes)
    for name in ("Onset F1", "Onset + offset F1", "Frame F1"):
        assert scores[name] == float(bool(drumless(notes))), name


@few_examples
@given(random_notes, random_notes)
def test_scores_lie_between_0_and_1(reference: list[Note], estimate: list[Note]) -> None:
    scores = further_scores(reference, estimate)
    scores.pop("Instrument leakage ratio", None)
    scores |= transcription_scores(reference, estimate, tracks=CERBERUS4_TRACKS)
    assert all(type(score) is float and 0 <= score <= 1 for score in scores.values())


@pytest.mark.parametrize(
    ("reference", "estimate"), [([], []), ([C4, SNARE], []), ([], [C4, SNARE]), ([C4], [SNARE])]
)
def test_nothing_in_common_scores_0(reference: list[Note], estimate: list[Note]) -> None:
    scores = transcription_scores(reference, estimate, tracks=CERBERUS4_TRACKS)
    assert set(scores.values()) == {0.0}
    assert onset_scores(reference, estimate) == drum_onset_scores(reference, estimate) == (0, 0, 0)
    further = further_scores(reference, estimate)
    further.pop("Instrument leakage ratio", None)
    assert set(further.values()) <= {0.0}


def test_further_scores_leave_out_what_there_is_none_of() -> None:
    assert further_scores([], []) == {}
    drums_alone = further_scores([SNARE], [SNARE])
    assert drums_alone["Drum onset F1"] == 1
    assert not any("unmodified" in name for name in drums_alone)
    assert "Drum onset F1" not in further_scores([C4], [C4])
    assert further_scores([C4], [C4, SNARE])["Drum onset F1"] == 0


def test_one_note_and_drums_alone_are_scored() -> None:
    one = transcription_scores([C4], [C4])
    assert one["Onset + offset + velocity F1"] == one["Frame F1"] == 1
    drums = transcription_scores([SNARE], [SNARE])
    assert drums["Drum onset F1 (full)"] == drums["Onset + offset + program F1 (flat)"] == 1
    assert drums["Onset F1"] == drums["Frame F1"] == 0


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (C4._replace(offset=0.5), "end after it starts"),
        (C4._replace(onset=-1.0), "before 0 s"),
        (C4._replace(pitch=128), "pitch must be"),
        (C4._replace(program=128), "program must be"),
    ],
)
def test_impossible_notes_are_refused(note: Note, message: str) -> None:
    for scores in (transcription_scores, further_scores, onset_scores, drum_onset_scores):
        for reference, estimate in (([note], [C4]), ([C4], [note])):
            with pytest.raises(ValueError, match=message):
                scores(reference, estimate)


def test_means_are_taken_over_the_examples_that_have_the_score() -> None:
    examples = [{"a": 1.0, "b": 0.5}, {"a": 0.0}, {"a": 0.5, "c": 0.25}]
    assert mean_scores(examples) == {"a": 0.5, "b": 0.5, "c": 0.25}
    assert mean_scores([]) == {}


def test_matching_long_pieces_takes_little_memory() -> None:
    rng = np.random.default_rng(0)
    notes = [
        Note(float(t), float(t) + 0.3, int(pitch), 100)
        for t, pitch in zip(np.arange(3000) / 12, rng.integers(30, 90, 3000), strict=True)
    ]
    tracemalloc.start()
    try:
        assert len(match_notes(notes, notes)) == 3000
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * len(notes) ** 2 / 10  # a tenth of one matrix of all by all


def test_the_package_loads_without_mir_eval() -> None:
    command = "import sys, mt3_keras; sys.exit('mir_eval' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)
