"""The detector: its shapes, its parts, its training and its front end."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops
from numpy.typing import NDArray

from mt3_keras.models.config import (
    HEADS,
    LOWEST_PITCH,
    MT3,
    NUM_PITCHES,
    SMALL,
    DetectorBodyConfig,
    DetectorConfig,
    HarmonicConfig,
)
from mt3_keras.models.detector import STEM_HEADS, ClassHead, NoteDetector, PitchMixer
from mt3_keras.models.spectrogram import Harmonics
from mt3_keras.note_rolls import NOTE_HEADS, NUM_COLUMNS
from tests.detectors import MINI, build, random_samples


def test_every_head_is_an_output_of_its_shape() -> None:
    outputs = build()({"samples": random_samples()})
    assert {name: tuple(values.shape) for name, values in outputs.items()} == {
        f"{head}_logits": (2, 16, columns) for head, columns in HEADS.items()
    }


def test_detected_probabilities_are_those_of_the_logits_side_by_side() -> None:
    model, samples = build(), random_samples()
    outputs = model({"samples": samples})
    logits = [ops.convert_to_numpy(outputs[f"{head}_logits"]) for head in NOTE_HEADS]
    expected = 1 / (1 + np.exp(-np.concatenate(logits, axis=-1)))
    found = ops.convert_to_numpy(model.detect(samples))
    assert found.shape == (2, 16, NUM_COLUMNS)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_every_weight_has_a_gradient() -> None:
    model, inputs = build(), {"samples": random_samples()}
    before = [ops.convert_to_numpy(weight) for weight in model.trainable_weights]
    model.compile(keras.optimizers.SGD(1.0), loss=_losses(model), jit_compile=False)
    model.train_on_batch(inputs, keras.tree.map_structure(ops.zeros_like, model(inputs)))
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert np.any(ops.convert_to_numpy(weight) != old), weight.path


def test_a_training_step_in_bfloat16_gives_about_the_loss_of_one_in_float32() -> None:
    inputs = {"samples": random_samples()}
    losses = []
    for dtype in ("mixed_bfloat16", "float32"):
        model = build(dtype=dtype)
        targets = keras.tree.map_structure(ops.zeros_like, model(inputs))
        model.compile("sgd", loss=_losses(model), jit_compile=False)
        losses.append(model.train_on_batch(inputs, targets, return_dict=True)["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)


def _losses(model: NoteDetector) -> dict[str, object]:
    def loss(_: object, output: object) -> object:
        return ops.mean(ops.square(ops.maximum(output, -10.0)))

    return dict.fromkeys(model.output, loss)


def test_the_mixer_adds_what_a_convolution_over_pitches_finds() -> None:
    network, random = MINI.network, np.random.default_rng(2)
    mixer = PitchMixer(network)
    mixer.build()
    for weight in mixer.weights:
        weight.assign(random.normal(0, 0.3, weight.shape))
    w = {weight.path.split("/", 1)[1]: ops.convert_to_numpy(weight) for weight in mixer.weights}
    timbre = random.normal(size=(2, network.segment_frames, NUM_PITCHES, network.stem_channels))
    logits = random.normal(size=(2, network.segment_frames, len(STEM_HEADS) * NUM_PITCHES))
    found = 1 / (1 + np.exp(-logits.reshape(2, -1, len(STEM_HEADS), NUM_PITCHES)))
    x = timbre @ w["timbre/kernel"] + found.swapaxes(2, 3) @ w["found/kernel"]
    x = np.maximum(x, 0)
    mixed = np.zeros_like(x)
    for *place, channel in np.ndindex(*x.shape[:2], x.shape[3]):
        full = np.convolve(x[*place, :, channel], w["intervals"][channel, ::-1])
        mixed[*place, :, channel] = full[NUM_PITCHES - 1 : 2 * NUM_PITCHES - 1]
    hidden = np.concatenate([x, mixed], axis=-1) @ w["hidden/kernel"] + w["hidden/bias"]
    expected = np.maximum(hidden, 0) @ w["logits/kernel"] + w["logits/bias"]
    added = mixer(timbre.astype(np.float32), logits.astype(np.float32))
    np.testing.assert_allclose(
        ops.convert_to_numpy(added), expected.swapaxes(2, 3).reshape(logits.shape), atol=1e-4
    )


def test_the_class_of_an_instrument_does_not_depend_on_how_loud_its_spectrum_is() -> None:
    network, random = MINI.network, np.random.default_rng(5)
    head = ClassHead(network)
    encoded = random.normal(size=(2, network.num_positions, network.width)).astype(np.float32)
    features = (2, network.num_positions, NUM_PITCHES * network.stem_channels)
    spectra = random.normal(
        size=(2, network.segment_frames, NUM_PITCHES, MINI.spectrogram.num_channels)
    )
    head.build(encoded.shape, features, spectra.shape)
    head.spectrum.kernel.assign(random.normal(size=head.spectrum.kernel.shape))
    stem = random.normal(size=features).astype(np.float32)
    soft, loud, other = (
        ops.convert_to_numpy(head(encoded, stem, sound.astype(np.float32)))
        for sound in (spectra, spectra + 2, spectra[:, ::-1])
    )
    np.testing.assert_allclose(soft, loud, atol=1e-4)
    assert np.abs(soft - other).max() > 0.1


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
        long, short = self.frames(sound).reshape(16, 88, 2, -1).sum(axis=(1, 3)).T
        assert long.argmax() == short.argmax() == frame

    def test_silence_is_zero_and_so_is_all_beyond_the_range(self) -> None:
        assert not self.frames(np.zeros(MINI.input_samples)).any()
        noise = np.random.default_rng(0).normal(size=MINI.input_samples)
        highest = self.frames(noise).reshape(16, 88, 2, 8, 3)[:, -1]
        assert highest[:, :, 1].all() and not highest[:, :, 2:].any()


def test_small_has_at_most_six_million_parameters() -> None:
    assert NoteDetector(**SMALL.to_dict()).count_params() <= 6_000_000


def test_a_segment_is_given_with_what_comes_before_and_after() -> None:
    spectrogram = SMALL.spectrogram
    assert spectrogram.lead_samples == spectrogram.overhang_samples == (4096 - 256) // 2
    assert SMALL.input_samples == 32_768 + 2 * 1920
    assert MT3.spectrogram.lead_samples == 0
    assert MT3.input_samples == 32_768 + 1920


def test_a_configuration_survives_its_dictionary() -> None:
    assert DetectorConfig.from_dict(SMALL.to_dict()) == SMALL
    model = NoteDetector.from_config(build().get_config())
    assert model.model_config == MINI


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="frames_per_position"):
        DetectorBodyConfig(frames_per_position=3)


@pytest.mark.parametrize(
    "spectrum", [{"bins_per_octave": 20}, {"floor": 0.0}, {"harmonics": ()}, {"fmax_hz": 9000}]
)
def test_impossible_spectra_are_refused(spectrum: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(spectrum))):
        HarmonicConfig(**spectrum)  # type: ignore[arg-type]
