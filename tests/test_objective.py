"""The training loss and the optimizers, against literal transcriptions of their rules."""

from __future__ import annotations

import pathlib
from typing import Any, Literal

import keras
import numpy as np
import pytest
from keras import ops

from mt3_keras.codec import EOS, PAD, Codec
from mt3_keras.data.rolls import CERTAIN
from mt3_keras.models.config import HEADS, ISMIR2021, MT3
from mt3_keras.models.detector import NoteDetector
from mt3_keras.models.mt3 import MT3Backbone
from tests.detectors import MINI, random_samples
from tests.training_run import NANO, MadeUpBatches, write_model
from train.config import RunConfig
from train.feed import to_fit
from train.model import make_model
from train.objective import (
    PARTS,
    POSITIVE_WEIGHTS,
    HeadLoss,
    RollTraining,
    TokenObjective,
    TokenTraining,
    head_cross_entropy,
    name_loss,
    note_targets,
    programs_near,
    token_cross_entropy,
    token_parts,
)
from train.optimizers import Adafactor, Schedule, make_optimizer


def t5x_loss(logits: np.ndarray, targets: np.ndarray, z_loss: float, smoothing: float) -> float:
    """The sum over all tokens but padding, one token at a time, as T5X states it."""
    total, size = 0.0, logits.shape[-1]
    for scores, target in zip(logits.reshape(-1, size), targets.ravel(), strict=True):
        if target == PAD:
            continue
        log_z = np.log(np.sum(np.exp(scores)))
        confidence, low = 1 - smoothing, smoothing / (size - 1)
        soft = np.full(size, low)
        soft[target] = confidence
        constant = -(confidence * np.log(confidence) + (size - 1) * low * np.log(low + 1e-20))
        total += -np.sum(soft * (scores - log_z)) + z_loss * log_z**2 - constant
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_that_of_t5x(smoothing: float) -> None:
    random = np.random.default_rng(0)
    logits = random.standard_normal((2, 5, 40)) * 3
    targets = random.integers(0, 4, (2, 5))
    loss, plain, is_best = token_cross_entropy(
        logits, targets, z_loss=1e-4, label_smoothing=smoothing
    )
    summed = np.sum(ops.convert_to_numpy(loss) * (targets != PAD))
    assert summed == pytest.approx(t5x_loss(logits, targets, 1e-4, smoothing), rel=1e-5)
    summed = np.sum(ops.convert_to_numpy(plain) * (targets != PAD))
    assert summed == pytest.approx(t5x_loss(logits, targets, 0.0, 0.0), rel=1e-5)
    np.testing.assert_array_equal(ops.convert_to_numpy(is_best), logits.argmax(-1) == targets)


@pytest.mark.parametrize("config", [MT3, ISMIR2021])
def test_every_event_belongs_to_the_part_that_says_it(config) -> None:
    codec = Codec(config.vocabulary.num_velocity_bins)
    parts = token_parts(config)
    assert len(parts) == config.network.vocabulary_rows
    for token, part in enumerate(parts):
        if token == EOS:
            assert list(PARTS)[part] == "tie"
        elif 3 <= token < 3 + codec.num_events:
            assert codec.decode(token).type in list(PARTS.values())[part]
        else:
            assert part == -1


def losses(objective: TokenObjective) -> tuple[float, dict[str, float]]:
    """The loss and the log of a made-up batch."""
    model = TokenTraining(MT3Backbone(**NANO.to_dict()), objective)
    _, targets = to_fit(MadeUpBatches(NANO, 4).whole_batch(1))
    random = np.random.default_rng(2)
    logits = random.standard_normal((*targets["targets"].shape, 1536)).astype(np.float32)
    loss = model.compute_loss(y=targets, y_pred=logits)
    return float(loss), {name: float(value) for name, value in model.get_metrics_result().items()}


def test_normalising_divides_the_sum() -> None:
    total, log = losses(TokenObjective(normalize="sum"))
    assert losses(TokenObjective(normalize="tokens"))[0] == pytest.approx(total / log["num_tokens"])
    assert losses(TokenObjective(normalize="examples"))[0] == pytest.approx(total / 4)


def test_parts_make_up_the_whole() -> None:
    total, log = losses(TokenObjective(normalize="sum", z_loss=0.0))
    assert total == pytest.approx(log["token_loss"] * log["num_tokens"], rel=1e-5)
    only = dict.fromkeys(PARTS, 0.0)
    shares = [losses(TokenObjective("sum", 0.0, 0.0, {**only, part: 1.0}))[0] for part in PARTS]
    assert sum(shares) == pytest.approx(total, rel=1e-5)
    assert losses(TokenObjective("sum", 0.0, 0.0, {"pitch": 3.0}))[0] == pytest.approx(
        total + 2 * shares[list(PARTS).index("pitch")], rel=1e-5
    )
    mean, _ = losses(TokenObjective("tokens", 0.0, 0.0, {**only, "timing": 5.0}))
    assert mean == pytest.approx(log["timing_loss"], rel=1e-5)


def test_parts_with_weights_must_exist() -> None:
    with pytest.raises(ValueError, match="part_weights must name parts of"):
        TokenObjective(part_weights={"chords": 2.0})


def test_the_loss_of_a_detector_is_the_weighted_sum_of_its_heads() -> None:
    heads = (HeadLoss("onset", 2.0, 0.5), HeadLoss("strength", 1.0, 3.0, largest_target=127))
    model = RollTraining(NoteDetector(**MINI.to_dict()), heads)
    zeros, ones = np.zeros((4, 3), np.float32), np.ones((4, 3))
    y_pred = {"onset_logits": zeros, "strength_logits": zeros}
    loss = model.compute_loss(y={"onset": ones, "strength": 127 * ones}, y_pred=y_pred)
    log = model.get_metrics_result()
    assert float(log["onset_loss"]) == pytest.approx(2 * np.log(2))
    assert float(log["strength_loss"]) == pytest.approx(np.log(2))
    assert float(loss) == pytest.approx(4 * np.log(2), rel=1e-5)


def after_one_step(folder: pathlib.Path, **settings: Any) -> tuple[dict[str, float], set[str]]:
    """The log of a step of a detector, and the paths of all that it moved."""
    random, shape = np.random.default_rng(4), (2, MINI.window_frames)
    inputs = {"samples": random_samples(), "cells": random.integers(0, 30, (2, 5, 2))}
    targets = {
        head: random.choice([-1, 0, CERTAIN], (*shape, size)) for head, size in HEADS.items()
    }
    targets["programs"] = random.integers(-1, 128, (2, 5, 2))
    keras.utils.set_random_seed(0)
    nano = write_model(folder, MINI)
    model = make_model(RunConfig(model=nano, optimizer="adam", jit_compile="off", **settings))
    paths, before = [v.path for v in model.backbone.weights], model.backbone.get_weights()
    log = model.train_on_batch(inputs, targets, return_dict=True)
    pairs = zip(paths, before, model.backbone.get_weights(), strict=True)
    return log, {path for path, one, other in pairs if np.any(one != other)}


@pytest.fixture(scope="module")
def all_heads(tmp_path_factory) -> tuple[dict[str, float], set[str]]:
    return after_one_step(tmp_path_factory.mktemp("heads"))


def test_the_settings_weigh_every_head_and_a_1_more_than_a_0(all_heads, tmp_path) -> None:
    log, moved = all_heads
    weighted = sum(w * log[f"{head}_loss"] for head, w in RunConfig().head_weight_of.items())
    assert log["loss"] == pytest.approx(weighted, rel=1e-4)
    even, moved_evenly = after_one_step(tmp_path, head_positive_weight=0.5)
    assert moved_evenly == moved
    for head in (*HEADS, "names"):
        if head in POSITIVE_WEIGHTS:
            assert even[f"{head}_loss"] < 0.9 * log[f"{head}_loss"]
        else:  # judged where notes are alone
            assert even[f"{head}_loss"] == pytest.approx(log[f"{head}_loss"], rel=1e-3)


def test_a_head_without_weight_stays_as_it_is(all_heads, tmp_path) -> None:
    _, moved = all_heads
    few, moved_by_few = after_one_step(tmp_path, head_weights=("onset=5", "frame=1"))
    assert few["loss"] == pytest.approx(5 * few["onset_loss"] + few["frame_loss"], rel=1e-4)
    names = {path for path in moved if path.startswith("second_look/") and "moving" not in path}
    assert names and names <= moved - moved_by_few
    assert {path for path in moved - moved_by_few if path.startswith("drums/")}


def test_the_averages_of_a_frozen_body_stay_as_they_are_too(all_heads, tmp_path) -> None:
    _, all_moved = all_heads
    assert any("body" in path and "moving" in path for path in all_moved)
    _, moved = after_one_step(tmp_path, freeze="^(?!second_look/)")
    # By averages that are never updated some onsets are likely enough to be heard by others.
    compared = {
        f"second_look/comparison_{i}/attention/{part}/kernel"
        for i in range(MINI.network.look_comparisons)
        for part in ("query", "key")
    }
    assert moved == compared | {path for path in all_moved if path.startswith("second_look/")}


def test_a_cell_is_a_note_if_it_is_near_a_true_onset() -> None:
    onsets = np.zeros((2, 20, 88), np.int8)
    onsets[0, 8, 30], onsets[0, 8, 31], onsets[1, 15:] = CERTAIN, CERTAIN // 2, -1
    near = [[8, 30], [11, 30], [12, 30], [8, 31], [8, 29]]
    cells = np.array([near, [[-1, -1], [19, 0], [3, 3], [3, 4], [0, 0]]])
    found = ops.convert_to_numpy(note_targets(onsets, cells))
    assert found.tolist() == [[1, 1, 0, 0, 0], [-1, -1, 0, 0, 0]]


def test_an_onset_found_bears_the_name_of_the_nearest_note_of_its_pitch() -> None:
    notes = np.array([[[8, 30], [11, 30], [8, 40], [-1, -1]]])
    programs = np.array([[[0, 0], [40, 56], [70, 70], [-1, -1]]])
    cells = np.array([[[8, 30], [9, 30], [10, 30], [13, 30], [14, 30], [6, 40], [8, 31], [-1, -1]]])
    found = ops.convert_to_numpy(programs_near(cells, notes, programs))
    assert found[0, :, 0].tolist() == [0, 0, 40, 40, -1, 70, -1, -1]
    assert found[0, :, 1].tolist() == [0, 0, 56, 56, -1, 70, -1, -1]


def test_names_are_learnt_from_onsets_found_alone_where_that_is_asked_for(tmp_path) -> None:
    model = RollTraining(NoteDetector(**MINI.to_dict()), (HeadLoss("names"), HeadLoss("notes")))
    found = RollTraining(model.backbone, model.heads, found_alone=True)
    inputs = {"samples": random_samples(), "cells": np.full((2, 5, 2), 7)}
    given_and_found, found_alone = model.call(inputs), found.call(inputs)
    for name, values in found_alone.items():
        if name in ("class_logits", "program_logits", "note_logits", "cells"):
            assert values.shape[1] == given_and_found[name].shape[1] - 5
    cells = ops.convert_to_numpy(found_alone["cells"])
    assert (cells == ops.convert_to_numpy(given_and_found["cells"])[:, 5:]).all()
    onsets = np.full((2, MINI.window_frames, 88), CERTAIN, np.int8)
    programs = {"programs": np.full((2, 5, 2), 41)}
    losses = []
    for column in (cells[0, 0, 1], min(set(range(88)) - set(cells[..., 1].flat))):
        x = inputs | {"cells": np.tile([[cells[0, 0, 0], column]], (2, 5, 1))}
        losses.append(float(found.compute_loss(x, {"onset": onsets, **programs}, found_alone)))
    assert losses[0] > losses[1] + 1  # where nothing is found nothing is named


def logits_of(program: int) -> tuple[np.ndarray, np.ndarray]:
    classes, programs = np.zeros((1, 1, 16)), np.zeros((1, 1, 16, 8))
    classes[..., program // 8], programs[..., program // 8, program % 8] = 20, 20
    return classes.astype(np.float32), programs.astype(np.float32)


def name_loss_of(program: int, targets: list[list[int]]) -> float:
    return float(ops.convert_to_numpy(name_loss(*logits_of(program), np.array([targets]))))


def test_the_right_program_costs_least_and_the_right_class_less_than_another() -> None:
    right, same_class, other = (name_loss_of(program, [[41, 41]]) for program in (41, 43, 70))
    assert right < same_class < other


def test_both_of_a_unison_are_half_right() -> None:
    assert name_loss_of(41, [[41, 70]]) == pytest.approx(name_loss_of(70, [[41, 70]]), abs=1e-4)
    assert name_loss_of(41, [[41, 41]]) < name_loss_of(41, [[41, 70]])
    assert name_loss_of(41, [[41, 70]]) < name_loss_of(3, [[41, 70]])


def test_rows_without_a_note_cost_nothing() -> None:
    classes, programs = logits_of(41)
    twice = np.concatenate([classes] * 2, axis=1), np.concatenate([programs] * 2, axis=1)
    padded = name_loss(*twice, np.array([[[41, 41], [-1, -1]]]))
    alone = name_loss_of(41, [[41, 41]])
    assert float(ops.convert_to_numpy(padded)) == pytest.approx(alone, abs=1e-6)


def test_notes_of_a_rare_class_weigh_more() -> None:
    """Of ten notes nine are pianos: which one is taken for a violin makes a difference."""

    def loss(wrong: int) -> float:
        targets = np.array([[[0, 0]] * 9 + [[40, 40]]])
        heard = [0] * 9 + [40]
        heard[wrong] = 70
        classes, programs = (
            np.concatenate(part, axis=1) for part in zip(*map(logits_of, heard), strict=True)
        )
        return float(ops.convert_to_numpy(name_loss(classes, programs, targets)))

    assert loss(9) > 2 * loss(0)


def test_targets_below_zero_do_not_count() -> None:
    logits = np.array([[2.0, -1.0, 9.0]], np.float32)
    both = head_cross_entropy(logits, np.array([[1.0, 0.0, -1.0]]), 3.0)
    expected = np.mean([3 * np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0))])
    assert float(both) == pytest.approx(expected, rel=1e-5)


def adafactor_step(
    weights: np.ndarray, gradient: np.ndarray, state: dict[str, np.ndarray], step: int
) -> np.ndarray:
    """One update by T5X's rule at a learning rate of 0.02, in float64; `step` from 0."""
    decay = 1 - (step + 1.0) ** -0.8
    squared = gradient**2 + 1e-30
    if gradient.ndim == 2 and min(gradient.shape) >= 128:
        row = decay * state.get("row", 0) + (1 - decay) * squared.mean(axis=1)
        column = decay * state.get("column", 0) + (1 - decay) * squared.mean(axis=0)
        state |= {"row": row, "column": column}
        update = gradient * np.outer((row / row.mean()) ** -0.5, column**-0.5)
    else:
        state["whole"] = decay * state.get("whole", 0) + (1 - decay) * squared
        update = gradient * state["whole"] ** -0.5
    update = update / max(1.0, np.sqrt(np.mean(update**2)))
    return weights - 0.02 * max(np.sqrt(np.mean(weights**2)), 1e-3) * update


def follow(optimizer: keras.optimizers.Optimizer, shapes: list[tuple[int, ...]]) -> list[list]:
    """(optimizer's, transcription's) weights after five steps."""
    random = np.random.default_rng(3)
    weights = [random.standard_normal(shape) * 10.0**-i for i, shape in enumerate(shapes)]
    variables = [keras.Variable(w.astype(np.float32)) for w in weights]
    states: list[dict] = [{} for _ in shapes]
    optimizer.build(variables)
    for step in range(5):
        gradients = [random.standard_normal(shape) for shape in shapes]
        optimizer.apply([ops.convert_to_tensor(g, "float32") for g in gradients])
        for i, gradient in enumerate(gradients):
            weights[i] = adafactor_step(weights[i], gradient, states[i], step)
    return [[ops.convert_to_numpy(v), w] for v, w in zip(variables, weights, strict=True)]


SHAPES = [(128, 130), (130, 128), (128, 127), (16,), (3, 3, 4, 8), (7,)]


def test_adafactor_is_that_of_t5x() -> None:
    for ours, expected in follow(Adafactor(0.02), SHAPES):
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-7)


def test_keras_adafactor_agrees_where_the_rules_do() -> None:
    optimizer = keras.optimizers.Adafactor(0.02, relative_step=False)
    for ours, expected in follow(optimizer, [(128, 130), (130, 128), (16,)]):
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-7)
    ours, expected = follow(keras.optimizers.Adafactor(0.02, relative_step=False), [(64, 64)])[0]
    assert np.abs(ours - expected).max() > 1e-4  # it factors small matrices too


def test_adafactor_does_not_mind_the_size_of_the_loss() -> None:
    def after(scale: float) -> np.ndarray:
        variable = keras.Variable(np.arange(6, dtype=np.float32).reshape(2, 3))
        optimizer = Adafactor(0.1)
        optimizer.build([variable])
        for sign in (1.0, -0.5):
            optimizer.apply([ops.convert_to_tensor(np.full((2, 3), scale * sign, np.float32))])
        return ops.convert_to_numpy(variable)

    np.testing.assert_allclose(after(1.0), after(1000.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("constant", [0.25, 0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 1.0, 0.5, 0.0]),
        ("cosine", [0.25, 0.5, 1.0, 0.5, 0.0]),
        ("rsqrt", [0.25, 0.5, 1.0, 0.5774, 0.4364]),
    ],
)
def test_learning_rate_rises_and_falls(kind, rates) -> None:
    schedule = Schedule(1.0, kind, warmup_steps=4, steps=20)
    places = [0, 1, 4, 12, 20]
    if kind == "rsqrt":
        places[2] = 3
    got = [float(schedule(place)) for place in places]
    if kind == "rsqrt":
        rates = [0.25, 0.5, 1.0, (4 / 13) ** 0.5, (4 / 21) ** 0.5]
    np.testing.assert_allclose(got, rates, rtol=1e-4, atol=1e-6)
    slowed = Schedule(1.0, kind, warmup_steps=4, steps=20, batches_per_update=3)
    assert [float(slowed(3 * place + 2)) for place in places] == got


@pytest.mark.parametrize("name", ["adam", "adafactor"])
def test_the_averaged_weights_forget_the_first_ones_within_a_few_updates(
    name: Literal["adam", "adafactor"],
) -> None:
    optimizer = make_optimizer(name, Schedule(0.1, "constant"), ema=0.999)
    variable = keras.Variable(np.full((4,), 5.0, np.float32))
    optimizer.build([variable])
    average = np.full(4, 5.0)
    for step in range(40):
        optimizer.apply([ops.convert_to_tensor(np.ones(4, np.float32))])
        value = ops.convert_to_numpy(variable)
        kept = min(0.999, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * value
    optimizer.finalize_variable_values([variable])
    found = ops.convert_to_numpy(variable)
    np.testing.assert_allclose(found, average, rtol=1e-5)
    assert abs(found - value).max() < 0.3 * abs(5.0 - value).max()
