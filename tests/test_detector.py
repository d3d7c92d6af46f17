"""The detector: its shapes, what it hands out, its training and its front end."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops
from numpy.typing import NDArray

from mt3_keras.models.config import (
    HEADS,
    LOWEST_DRUM,
    LOWEST_PITCH,
    MT3,
    PITCH_HEADS,
    SMALL,
    BodyConfig,
    DetectorConfig,
    HarmonicConfig,
)
from mt3_keras.models.detector import NoteDetector
from mt3_keras.models.second_look import LEAST_CHANCE
from mt3_keras.models.spectrogram import Harmonics, log_frequency_matrix, magnitudes
from tests.detectors import MINI, build, random_samples

CELLS = np.array([[[3, 5], [9, 80], [31, 0]], [[0, 87], [20, 40], [16, 41]]], np.int32)
NET = MINI.network
OWN = slice(NET.frames_before, NET.frames_before + NET.segment_frames)


def inputs() -> dict[str, NDArray]:
    return {"samples": random_samples(), "cells": CELLS}


def to_numpy(tensors: dict[str, object]) -> dict[str, NDArray]:
    return {name: ops.convert_to_numpy(tensor) for name, tensor in tensors.items()}


def test_every_head_is_an_output_of_its_shape() -> None:
    outputs = build()(inputs())
    assert {name: tuple(values.shape) for name, values in outputs.items()} == {
        **{f"{head}_logits": (2, 32, columns) for head, columns in HEADS.items()},
        "class_logits": (2, 3, 16),
        "program_logits": (2, 3, 16, 8),
        "note_logits": (2, 3),
    }


def raise_onsets(model: NoteDetector, by: float) -> None:
    """Makes onsets likelier, so that a second look is taken at them."""
    bias = ops.convert_to_numpy(model.body.pitch_logits.bias).reshape(-1, len(PITCH_HEADS)).copy()
    bias[:, PITCH_HEADS.index("onset")] += by
    model.body.pitch_logits.bias.assign(bias.reshape(-1))


def sigmoid(logits: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def peaks_of(logits: NDArray, reach: int) -> set[tuple[int, int]]:
    """Frames of the segment and columns of one row's cells that no near frame exceeds."""
    return {
        (frame - OWN.start, column)
        for frame, column in np.ndindex(*logits.shape)
        if OWN.start <= frame < OWN.stop
        and logits[frame, column] >= logits[max(0, frame - reach) : frame + reach + 1, column].max()
    }


def likeliest_onsets(logits: NDArray) -> list[tuple[int, int]]:
    """The cells of one row's onsets that are handed out, the likeliest first."""
    peaks = sorted(peaks_of(logits, 3), key=lambda c: -logits[c[0] + OWN.start, c[1]])
    return peaks[: NET.max_onsets]


def as_second_look_says(model: NoteDetector, onsets: NDArray) -> NDArray:
    """The probabilities [B, K] of detected onsets, of a call that is given their cells."""
    cells = onsets[..., :2].astype(np.int32) + np.array([OWN.start, -LOWEST_PITCH])
    logits = to_numpy(model({"samples": random_samples(), "cells": cells}))
    rows, (frames, columns) = np.arange(len(cells))[:, None], np.moveaxis(cells, -1, 0)
    first = sigmoid(logits["onset_logits"][rows, frames, columns])
    return np.where(first >= LEAST_CHANCE, sigmoid(logits["note_logits"]), first)


@pytest.mark.parametrize("raised", [0, 3])
def test_onsets_are_the_likeliest_peaks_of_the_segment_with_their_numbers(raised: int) -> None:
    model = build()
    raise_onsets(model, raised)
    logits = to_numpy(model(inputs()))
    found = to_numpy(model.detect(random_samples()))
    chances = as_second_look_says(model, found["onsets"])
    np.testing.assert_allclose(found["onsets"][..., 2], chances, atol=1e-5)
    assert found["onsets"].shape == (2, NET.max_onsets, 5)
    for row, onsets in enumerate(found["onsets"]):
        onset = logits["onset_logits"][row]
        expected = set(likeliest_onsets(onset))
        assert {(int(f), int(p) - LOWEST_PITCH) for f, p, *_ in onsets} == expected
        for frame, pitch, _, velocity, unison in onsets:
            cell = (int(frame) + OWN.start, int(pitch) - LOWEST_PITCH)
            assert unison == pytest.approx(sigmoid(logits["unison_logits"][row][cell]), abs=1e-5)
            strength = 127 * sigmoid(logits["strength_logits"][row][cell])
            assert abs(velocity - np.clip(strength, 1, 127)) <= 0.51


def test_what_begins_with_a_recording_begins_in_its_first_frame() -> None:
    """Frames before it hide no peak, where only silence lies there."""
    model, samples = build(), random_samples()
    samples[0, : model.model_config.lead_samples] = 0
    cells = np.full((2, 1, 2), -1, np.int32)
    logits = to_numpy(model({"samples": samples, "cells": cells}))["onset_logits"]
    found = to_numpy(model.detect(samples))["onsets"]
    hidden = logits.copy()
    hidden[0, : OWN.start] = -99
    assert peaks_of(hidden[0], 3) - peaks_of(logits[0], 3)
    for row, onsets in enumerate(found):
        begun = {(int(f), int(p) - LOWEST_PITCH) for f, p, *_ in onsets if f < 4}
        assert begun == {cell for cell in likeliest_onsets(hidden[row]) if cell[0] < 4}


def test_strokes_are_the_likeliest_peaks_of_the_drums() -> None:
    model = build()
    logits, found = to_numpy(model(inputs())), to_numpy(model.detect(random_samples()))
    for row, strokes in enumerate(found["strokes"]):
        drum = logits["drum_logits"][row]
        for frame, key, chance, velocity in strokes:
            cell = (int(frame), int(key) - LOWEST_DRUM)
            assert cell in peaks_of(drum, 2)
            assert chance == pytest.approx(sigmoid(drum[cell[0] + OWN.start, cell[1]]), abs=1e-5)
            strength = 127 * sigmoid(logits["drum_strength_logits"][row, cell[0] + OWN.start, 0])
            assert abs(velocity - np.clip(strength, 1, 127)) <= 0.51


def test_a_note_has_ended_where_it_is_silent_or_let_go() -> None:
    model = build()
    logits, found = to_numpy(model(inputs())), to_numpy(model.detect(random_samples()))
    for row, ended in enumerate(found["ended"]):
        expected = sigmoid(-logits["frame_logits"][row][OWN])
        offset = logits["offset_logits"][row]
        for frame, column in peaks_of(offset, 2):
            let_go = sigmoid(offset[frame + OWN.start, column])
            expected[frame, column] = max(expected[frame, column], let_go)
        np.testing.assert_allclose(ended, expected, atol=1e-5)


def test_programs_are_those_that_the_notes_names_say() -> None:
    model, samples = build(), random_samples()
    found = to_numpy(model.detect(samples))
    cells = found["onsets"][..., :2].astype(np.int32) + np.array([OWN.start, -LOWEST_PITCH])
    named = model({"samples": samples, "cells": cells})
    classes = ops.convert_to_numpy(ops.softmax(named["class_logits"]))
    within = ops.convert_to_numpy(ops.softmax(named["program_logits"], axis=-1))
    expected = (classes[..., None] * within).reshape(2, -1, 128)
    np.testing.assert_allclose(found["programs"], expected, atol=1e-5)
    np.testing.assert_allclose(found["programs"].sum(axis=-1), 1, atol=1e-5)


def test_a_stream_of_small_segments_carries_what_a_recording_in_one_carries() -> None:
    """One direction sees no future, so that small and large segments predict the same."""
    sizes = {"directions": 1, "frames_before": 20, "frames_after": 16, "segment_frames": 32}
    network = dataclasses.replace(NET, **sizes, max_onsets=64)
    whole = build(dataclasses.replace(MINI, network=network))
    steps = dataclasses.replace(network, segment_frames=16)
    config = dataclasses.replace(MINI, network=steps)
    parts = NoteDetector(**config.to_dict())
    parts.set_weights(whole.get_weights())
    samples = random_samples(whole.model_config, 1)
    state = whole.empty_state(1)
    expected = to_numpy(whole.detect(samples, state))
    ended = []
    for first in (0, 16 * 256):
        part = to_numpy(parts.detect(samples[:, first : first + config.input_samples], state))
        state = {name: part[f"state_{name}"] for name in state}
        ended.append(part["ended"])
    found = np.concatenate(ended, axis=1)
    assert found == pytest.approx(expected["ended"], abs=1e-4)
    assert state["pitches"] == pytest.approx(expected["state_pitches"], abs=1e-4)


def test_every_weight_has_a_gradient() -> None:
    model = build()
    raise_onsets(model, 3)
    before = [ops.convert_to_numpy(weight) for weight in model.trainable_weights]
    model.compile(keras.optimizers.SGD(1.0), loss=_losses(model), jit_compile=False)
    targets = keras.tree.map_structure(ops.zeros_like, model(inputs()))
    model.train_on_batch(inputs(), targets)
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert np.any(ops.convert_to_numpy(weight) != old), weight.path


def test_a_training_step_in_bfloat16_gives_about_the_loss_of_one_in_float32() -> None:
    losses = []
    for dtype in ("mixed_bfloat16", "float32"):
        keras.utils.set_random_seed(0)
        network = dataclasses.replace(NET, dropout=0.0)
        model = build(dataclasses.replace(MINI, network=network), dtype=dtype)
        targets = keras.tree.map_structure(ops.zeros_like, model(inputs()))
        model.compile("sgd", loss=_losses(model), jit_compile=False)
        losses.append(model.train_on_batch(inputs(), targets, return_dict=True)["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05)


def _losses(model: NoteDetector) -> dict[str, object]:
    def loss(_: object, output: object) -> object:
        return ops.mean(ops.square(ops.maximum(output, -10.0)))

    return dict.fromkeys(model.output, loss)


class TestHarmonics:
    config = MINI.spectrogram
    layer = Harmonics(config)

    def frames(self, sound: NDArray[np.floating]) -> NDArray[np.float32]:
        return ops.convert_to_numpy(self.layer(sound[None].astype(np.float32)))[0]

    @pytest.mark.parametrize("pitch", [21, 45, 69, 96, 108])
    def test_a_sine_is_strongest_as_the_fundamental_of_its_pitch(self, pitch: int) -> None:
        hz = 440 * 2 ** ((pitch - 69) / 12)
        sound = 0.5 * np.sin(2 * np.pi * hz * np.arange(MINI.input_samples) / 16_000)
        fundamental = self.frames(sound)[8].reshape(88, 2, 8, 3)[:, 0, 1, 1]
        assert fundamental.argmax() == pitch - LOWEST_PITCH
        whole = np.log1p(0.5 / self.config.floor)
        assert abs(fundamental.max() - whole) < 0.75  # half to double, as Fourier bins lie

    def test_a_click_is_loudest_in_the_frame_that_holds_it(self) -> None:
        frame = 5
        sound = np.zeros(MINI.input_samples)
        sound[self.config.lead_samples + frame * 256 + 128] = 1
        found = self.frames(sound)
        long, short = found.reshape(len(found), 88, 2, -1).sum(axis=(1, 3)).T
        assert long.argmax() == short.argmax() == frame

    def test_silence_is_zero_and_so_is_all_beyond_the_range(self) -> None:
        assert not self.frames(np.zeros(MINI.input_samples)).any()
        noise = np.random.default_rng(0).normal(size=MINI.input_samples)
        found = self.frames(noise)
        highest = found.reshape(len(found), 88, 2, 8, 3)[:, -1]
        assert highest[:, :, 1].all() and not highest[:, :, 2:].any()

    def test_the_spectrum_in_bands_is_that_of_the_whole_matrix(self) -> None:
        noise = np.random.default_rng(0).normal(size=(1, MINI.input_samples)).astype(np.float32)
        window = self.layer._windows[0]
        found = ops.convert_to_numpy(magnitudes(noise, window, self.config.hop_samples))
        matrix = log_frequency_matrix(self.config, self.config.window_samples) / self.config.floor
        whole = np.log1p(found @ matrix)[0]  # bin 0 is A0, the fundamental's middle one
        fundamental = self.frames(noise[0]).reshape(-1, 88, 2, 8, 3)[:, :, 0, 1, 1]
        np.testing.assert_allclose(fundamental, whole[:, : 88 * 3 : 3], rtol=1e-4)


def test_small_has_at_most_three_million_parameters() -> None:
    assert NoteDetector(**SMALL.to_dict()).count_params() <= 3_000_000


def test_a_segment_is_given_with_what_comes_before_and_after() -> None:
    network, around = SMALL.network, (4096 - 256) // 2
    assert SMALL.spectrogram.lead_samples == SMALL.spectrogram.overhang_samples == around
    assert SMALL.lead_samples == network.frames_before * 256 + around
    assert SMALL.input_samples == network.window_frames * 256 + 2 * around
    assert MT3.lead_samples == 0
    assert MT3.input_samples == 32_768 + 1920


def test_a_configuration_survives_its_dictionary() -> None:
    assert DetectorConfig.from_dict(SMALL.to_dict()) == SMALL
    model = NoteDetector.from_config(build().get_config())
    assert model.model_config == MINI


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="frames_per_step must divide frames_before: got 2 and 3"):
        BodyConfig(frames_before=3)
    with pytest.raises(ValueError, match="look_heads must divide look_width: got 3 and 128"):
        BodyConfig(look_heads=3)
    with pytest.raises(ValueError, match="channels must be positive: got 0"):
        BodyConfig(channels=0)


@pytest.mark.parametrize(
    "spectrum", [{"bins_per_octave": 20}, {"floor": 0.0}, {"harmonics": ()}, {"fmax_hz": 9000}]
)
def test_impossible_spectra_are_refused(spectrum: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(spectrum))):
        HarmonicConfig(**spectrum)  # type: ignore[arg-type]
