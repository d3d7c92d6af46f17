"""What the convolutional-recurrent network is trained by."""

from __future__ import annotations

import numpy as np
import pytest
from keras import ops

from mt3_keras.data.detector_targets import detector_targets, name_targets
from mt3_keras.notes import Note
from train.detector_losses import ROLL_LOSSES, class_weights, name_loss

EVEN = np.ones(16, np.float32)


def logits_of(program, sure=20.0):
    classes, programs = np.zeros((1, 1, 16)), np.zeros((1, 1, 16, 8))
    classes[..., program // 8], programs[..., program // 8, program % 8] = sure, sure
    return classes.astype(np.float32), programs.astype(np.float32)


def loss(program, targets, weights=EVEN):
    return float(ops.convert_to_numpy(name_loss(*logits_of(program), np.array([targets]), weights)))


def test_every_roll_has_a_loss():
    rolls = detector_targets([], 0, num_frames=4, frames_per_second=100.0)
    assert [head.name for head in ROLL_LOSSES] == list(rolls)


def test_the_right_program_costs_least_and_the_right_class_less_than_another():
    right, same_class, other = (loss(program, [[41, 41]]) for program in (41, 43, 70))
    assert right < same_class < other


def test_both_of_a_unison_are_half_right():
    assert loss(41, [[41, 70]]) == pytest.approx(loss(70, [[41, 70]]), abs=1e-4)
    assert loss(41, [[41, 41]]) < loss(41, [[41, 70]]) < loss(3, [[41, 70]])


def test_rows_without_a_note_cost_nothing():
    classes, programs = logits_of(41)
    twice = np.concatenate([classes] * 2, axis=1), np.concatenate([programs] * 2, axis=1)
    padded = name_loss(*twice, np.array([[[41, 41], [-1, -1]]]), EVEN)
    assert float(ops.convert_to_numpy(padded)) == pytest.approx(loss(41, [[41, 41]]), abs=1e-6)


def test_rare_classes_weigh_more_and_a_note_one_in_the_mean():
    counts = np.array([100, 10, 1] + [0] * 13)
    weights = class_weights(counts)
    assert weights[0] < weights[1] < weights[2]
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1, rel=1e-5)


def test_notes_to_name_are_those_that_begin_in_the_excerpt_with_their_unisons():
    notes = [
        Note(0.05, 0.3, 60, 90, 40),  # before the excerpt
        Note(0.20, 0.3, 60, 90, 40),
        Note(0.21, 0.3, 60, 90, 73),
        Note(0.25, 0.3, 62, 90, 8),
        Note(0.25, 0.3, 38, 90, 0, True),
    ]
    settings = {"num_frames": 20, "frames_per_second": 100.0, "rng": np.random.default_rng(0)}
    found = name_targets(notes, 10, max_notes=4, **settings)
    rows = {
        (*cell, *programs)
        for cell, programs in zip(found["cells"].tolist(), found["programs"].tolist(), strict=True)
    }
    assert rows == {(10, 39, 40, 73), (11, 39, 73, 40), (15, 41, 8, 8), (0, 0, -1, -1)}
    assert (name_targets(notes, 10, max_notes=1, **settings)["programs"] >= 0).all()
