"""The network of `small`: the front end, the heads and what the decoder makes of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from numpy.typing import NDArray

from mt3_keras.codec import EOS, Codec, Event
from mt3_keras.engines.keras import Search
from mt3_keras.grammar import BODY, STATE, TIE_SECTION, Grammar, Rules
from mt3_keras.models.config import (
    HEADS,
    LOWEST_PITCH,
    NUM_PITCHES,
    SMALL,
    ModelConfig,
    NetworkConfig,
    SpectrogramConfig,
    VocabularyConfig,
)
from mt3_keras.models.heads import STEM_HEADS, ClassHead, PitchMixer
from mt3_keras.models.layers import MASKED, ConvStem
from mt3_keras.models.mt3 import MT3Backbone
from mt3_keras.models.pointer import BACKWARDS, Pointer
from mt3_keras.models.spectrogram import FLOOR, Harmonics
from mt3_keras.segments import AudioSegment

MINI = dataclasses.replace(
    SMALL,
    vocabulary=VocabularyConfig(num_velocity_bins=3),
    network=dataclasses.replace(
        SMALL.network,
        width=16,
        num_heads=2,
        head_width=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        mlp_width=16,
        segment_frames=16,
        max_tokens=40,
        stem_channels=4,
        head_feedback=True,
    ),
)


def without(*names: str, **changes: Any) -> ModelConfig:
    switches = dict.fromkeys(names, False)
    return dataclasses.replace(
        MINI, network=dataclasses.replace(MINI.network, **switches), **changes
    )


CONFIGS = {
    "all": MINI,
    "no heads": without("heads", "head_feedback", "pointer"),
    "no state inputs": without("state_inputs"),
    "no time bias": without("time_bias"),
    "no pointer": without("pointer"),
    "log-mel": without(spectrogram=SpectrogramConfig(hop_samples=256, num_mels=32)),
    "flat": without(vocabulary=VocabularyConfig(1, ties=False, granularity="flat")),
}


def build(config: ModelConfig, dtype: str | None = None) -> MT3Backbone:
    keras.utils.set_random_seed(0)
    model = MT3Backbone(**config.to_dict(), dtype=dtype)
    random = np.random.default_rng(0)
    for weight in model.weights:  # those that begin at zero would hide what they do
        if not np.any(ops.convert_to_numpy(weight)):
            weight.assign(random.normal(0, 0.1, weight.shape))
    return model


def random_tokens(config: ModelConfig, num_rows: int, length: int) -> NDArray[np.int32]:
    """Decoder inputs: sensible kinds in any order, short shifts so that times stay inside."""
    codec = Codec(config.vocabulary.num_velocity_bins)
    random = np.random.default_rng(3)
    kinds = ["shift", "shift", "pitch", "velocity", "tie", "program", "drum"]
    tokens = [0]
    for _ in range(num_rows * length - 1):
        kind = kinds[random.integers(len(kinds))]
        last = {"velocity": codec.num_velocity_bins, "tie": 0, "shift": 30}.get(kind, 127)
        tokens.append(codec.encode(Event(kind, int(random.integers(last + 1)))))
    rows = np.array(tokens, np.int32).reshape(num_rows, length)
    rows[:, 0] = 0
    return rows


def random_inputs(config: ModelConfig, num_rows: int = 2, length: int = 12) -> dict[str, Any]:
    random = np.random.default_rng(1)
    samples = random.normal(0, 0.1, (num_rows, config.input_samples)).astype(np.float32)
    num_frames = np.full(num_rows, config.network.segment_frames, np.int32)
    tokens = random_tokens(config, num_rows, length)
    return {"samples": samples, "num_frames": num_frames, "decoder_tokens": tokens}


def logits_of(outputs: Any) -> NDArray[np.float32]:
    return ops.convert_to_numpy(outputs["logits"] if isinstance(outputs, dict) else outputs)


@settings(max_examples=12, deadline=None)
@given(data=st.data(), ties=st.booleans(), flat=st.booleans())
def test_following_whole_sequences_equals_stepping(
    data: st.DataObject, ties: bool, flat: bool
) -> None:
    vocabulary = VocabularyConfig(3, ties=ties, granularity="flat" if flat else "full")
    grammar = Grammar(dataclasses.replace(MINI, vocabulary=vocabulary), Rules(), ops)
    shifts = st.integers(3, 1003)  # often, so that some stand in a row
    row = st.lists(st.integers(0, 1407) | shifts, min_size=13, max_size=13)
    tokens = np.array(data.draw(st.lists(row, min_size=2, max_size=2)), np.int32)
    followed = grammar.follow(ops.convert_to_tensor(tokens))
    state = grammar.start(2)
    for i in range(tokens.shape[1]):
        state = grammar.advance(state, ops.convert_to_tensor(tokens[:, i]))
        for name in STATE:
            np.testing.assert_array_equal(followed[name][:, i], state[name], err_msg=f"{name} {i}")


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_equals_the_full_forward_pass(name: str) -> None:
    config = CONFIGS[name]
    model = build(config)
    inputs = random_inputs(config)
    tokens = inputs["decoder_tokens"]
    num_rows, length = tokens.shape
    expected = logits_of(model(inputs))
    memory = model.encode(
        ops.convert_to_tensor(inputs["samples"]), ops.convert_to_tensor(inputs["num_frames"])
    )
    cache = {k: np.array(v) for k, v in model.empty_cache(num_rows, length).items()}
    grammar = Grammar(config, Rules(), ops)
    state = grammar.start(num_rows)
    for i in range(length):
        token = ops.convert_to_tensor(tokens[:, i])
        state = grammar.advance(state, token) if i else state
        bias = np.where(np.arange(length) < i, 0.0, MASKED).astype(np.float32)
        logits, rows = model.decode_step(
            token,
            ops.full((num_rows,), i, "int32"),
            {name: ops.convert_to_tensor(values) for name, values in cache.items()},
            ops.convert_to_tensor(np.broadcast_to(bias, (num_rows, length)).copy()),
            memory,
            state,
        )
        for row in rows:
            cache[row][:, :, i] = ops.convert_to_numpy(rows[row])
        np.testing.assert_allclose(ops.convert_to_numpy(logits), expected[:, i], atol=1e-4)


def test_the_search_finds_the_best_token_of_the_full_forward_pass_each_time() -> None:
    model = build(MINI)
    samples = random_inputs(MINI, 3)["samples"]
    length, num_frames = 12, MINI.network.segment_frames
    segments = [AudioSegment(0.0, row, num_frames) for row in samples]
    found = dict(
        Search(model, rules=Rules(constrained=False), batch_size=2, max_tokens=length).decode(
            segments
        )
    )
    tokens = np.zeros((3, length + 1), np.int32)
    frames = np.full(3, num_frames, np.int32)
    for i in range(length):
        inputs = {"samples": samples, "num_frames": frames, "decoder_tokens": tokens[:, :length]}
        tokens[:, i + 1] = np.argmax(logits_of(model(inputs))[:, i], axis=-1)
    for i, row in enumerate(tokens[:, 1:].tolist()):
        assert found[i] == (row[: row.index(EOS) + 1] if EOS in row else row)


@pytest.mark.parametrize("name", ["all", "no heads", "log-mel"])
def test_every_weight_has_a_gradient(name: str) -> None:
    model = build(CONFIGS[name])
    inputs = random_inputs(CONFIGS[name], length=40)
    before = [ops.convert_to_numpy(weight) for weight in model.trainable_weights]
    optimizer = keras.optimizers.SGD(1.0)
    model.compile(optimizer=optimizer, loss=_sum_of_squares(model), jit_compile=False)
    model.train_on_batch(inputs, keras.tree.map_structure(ops.zeros_like, model(inputs)))
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert np.any(ops.convert_to_numpy(weight) != old), weight.path


def test_a_training_step_in_bfloat16_gives_about_the_loss_of_one_in_float32() -> None:
    inputs = random_inputs(MINI)
    losses = []
    for dtype in ("mixed_bfloat16", "float32"):
        model = build(MINI, dtype)
        targets = keras.tree.map_structure(ops.zeros_like, model(inputs))
        model.compile(optimizer="sgd", loss=_sum_of_squares(model), jit_compile=False)
        losses.append(model.train_on_batch(inputs, targets, return_dict=True)["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)


def _sum_of_squares(model: MT3Backbone) -> Any:
    def loss(_: Any, output: Any) -> Any:
        return ops.mean(ops.square(ops.maximum(output, -10.0)))

    return dict.fromkeys(model.output, loss) if isinstance(model.output, dict) else loss


def test_heads_are_outputs_of_the_stated_shapes() -> None:
    outputs = build(MINI)(random_inputs(MINI))
    assert {name: tuple(values.shape) for name, values in outputs.items()} == {
        "logits": (2, 12, 1408),
        **{f"{head}_logits": (2, 16, columns) for head, columns in HEADS.items()},
    }


def test_hearing_alone_trains_the_norms_as_a_whole_call_does() -> None:
    """JAX calls no layer that would tell those inside that it is training: `hear` has to."""

    def averages(model: MT3Backbone) -> list[NDArray[Any]]:
        return [ops.convert_to_numpy(v) for v in model.non_trainable_variables]

    inputs = random_inputs(MINI)
    called, heard = build(MINI), build(MINI)
    before = averages(heard)
    outputs = called(inputs, training=True)
    rolls = heard.hear(inputs["samples"], inputs["num_frames"], training=True)
    for name, logits in rolls.items():
        expected = ops.convert_to_numpy(outputs[name])
        np.testing.assert_allclose(ops.convert_to_numpy(logits), expected, atol=1e-5)
    after = averages(heard)
    assert any(np.any(old != new) for old, new in zip(before, after, strict=True))
    for own, other in zip(after, averages(called), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-6)


def test_memory_begins_with_the_shapes_that_encode_gives() -> None:
    model, inputs = build(MINI), random_inputs(MINI)
    given = model.encode(
        ops.convert_to_tensor(inputs["samples"]), ops.convert_to_tensor(inputs["num_frames"])
    )
    empty = model.empty_memory(2)
    assert {k: (v.shape, v.dtype) for k, v in given.items()} == {
        k: (v.shape, v.dtype) for k, v in empty.items()
    }


def test_a_network_that_needs_the_state_says_so() -> None:
    model = build(MINI)
    with pytest.raises(ValueError, match="state"):
        model.decode_step(
            ops.zeros((1,), "int32"),
            ops.zeros((1,), "int32"),
            model.empty_cache(1, 4),
            ops.zeros((1, 4)),
            model.empty_memory(1),
        )


class TestPointer:
    codec = Codec(MINI.vocabulary.num_velocity_bins)

    def logits(
        self, head: str, frame: int, column: int, token: int = 0, **state: int
    ) -> NDArray[np.float32]:
        """After `token`, with one cell of the rolls at 9 and all others at -4."""
        pointer = Pointer(MINI)
        pointer.build(MINI.network.width)
        shape = (1, MINI.network.segment_frames)
        rolls = {name: np.full((*shape, n), -4, np.float32) for name, n in HEADS.items()}
        rolls[head][0, frame, column] = 9
        tables = pointer.tables(ops.zeros((1, MINI.network.num_positions, 16)), rolls)
        full = {name: ops.full((1, 1), value, "int32") for name, value in state.items()}
        tokens = ops.full((1, 1), token, "int32")
        return ops.convert_to_numpy(pointer(ops.ones((1, 1, 16)), tokens, full, tables))[0, 0]

    @pytest.mark.parametrize("head, velocity", [("onset", 2), ("offset", 0)])
    def test_points_to_the_pitch_that_begins_or_ends_now(self, head: str, velocity: int) -> None:
        token = self.codec.encode(Event("pitch", 69))
        for step in range(9, 12):  # 0.16 s by the grid, give or take its rounding
            logits = self.logits(
                head, 6, 69 - LOWEST_PITCH, time=step, velocity=velocity, section=BODY
            )
            assert logits.argmax() == token and logits[token] == 9
        logits = self.logits(head, 6, 48, time=4, velocity=velocity, section=BODY)
        assert logits[token] == -4

    def test_points_to_drums_whatever_the_velocity(self) -> None:
        logits = self.logits("drum", 0, 38, time=0, velocity=0, section=BODY)
        assert logits.argmax() == self.codec.encode(Event("drum", 38))

    def test_points_to_programs_that_sound(self) -> None:
        logits = self.logits("program", 6, 40, time=10, velocity=2, section=BODY)
        assert logits.argmax() == self.codec.encode(Event("program", 40))

    def test_points_to_the_pitches_sounding_at_the_start_in_the_tie_section(self) -> None:
        logits = self.logits("frame", 0, 48, time=0, velocity=-1, section=TIE_SECTION)
        assert logits.argmax() == self.codec.encode(Event("pitch", 69))

    def test_points_only_forward(self) -> None:
        logits = self.logits("onset", 0, 0, time=7, velocity=2, section=BODY)
        first, last = self.codec.token_range("shift")
        is_masked = logits[first : last + 1] == np.float32(BACKWARDS)
        np.testing.assert_array_equal(is_masked, np.arange(last + 1 - first) <= 7)

    def test_shifts_get_the_chance_that_the_next_event_stands_there(self) -> None:
        time, sure = 7, 13  # frame 8 is from 0.128 s on
        logits = self.logits("drum", 8, 38, time=time, velocity=2, section=BODY)
        first, last = self.codec.token_range("shift")
        chances = np.exp(logits[first + time + 1 : last + 1])
        chance = 1 - (1 - 1 / (1 + np.exp(4))) ** 3  # of any of three events at -4
        expected = [(1 - chance) ** i * chance for i in range(sure - time)]
        np.testing.assert_allclose(chances[: sure - time], expected, rtol=1e-4)
        assert chances[sure - time] > 0.7
        assert chances[: MINI.max_step - time].sum() == pytest.approx(1, abs=1e-3)

    @pytest.mark.parametrize("kind", ["pitch", "drum"])
    def test_what_follows_a_pitch_or_drum_at_once_is_above_it(self, kind: str) -> None:
        first, last = self.codec.token_range(kind)
        logits = self.logits("onset", 0, 0, token=first + 60, time=0, velocity=2, section=BODY)
        is_masked = logits[first : last + 1] == np.float32(BACKWARDS)
        np.testing.assert_array_equal(is_masked, np.arange(128) <= 60)
        other = "drum" if kind == "pitch" else "pitch"
        first, last = self.codec.token_range(other)
        assert (logits[first : last + 1] > BACKWARDS).all()


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
    head = ClassHead(MINI)
    encoded = random.normal(size=(2, network.num_positions, network.width)).astype(np.float32)
    head.build(encoded.shape)
    head.spectrum.kernel.assign(random.normal(size=head.spectrum.kernel.shape))
    features = (2, network.num_positions, NUM_PITCHES * network.stem_channels)
    stem = {"features": random.normal(size=features).astype(np.float32)}
    spectra = random.normal(size=(2, network.segment_frames, NUM_PITCHES, head.num_harmonics))
    soft, loud, other = (
        ops.convert_to_numpy(head(encoded, {**stem, "harmonics": sound.astype(np.float32)}))
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
        whole = np.log1p(0.5 / FLOOR)
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


def test_a_stem_hears_with_new_blocks_as_it_did_without() -> None:
    """So that trained weights can be given blocks."""
    sound = np.random.default_rng(0).normal(size=(2, 16, NUM_PITCHES, 48)).astype(np.float32)
    stems = []
    for num_blocks in (0, 3):
        stem = ConvStem(dataclasses.replace(MINI.network, stem_blocks=num_blocks))
        stem.build(sound.shape)
        stems.append(stem)
    old, new = stems
    shared = {v.path.partition("/")[2]: v for v in old.weights}
    for variable in new.weights:
        if (name := variable.path.partition("/")[2]) in shared:
            variable.assign(shared[name])
    for name, array in old(sound).items():
        np.testing.assert_allclose(new(sound)[name], array, atol=1e-6, err_msg=name)
    new.blocks[2].outer.kernel.assign(ops.ones_like(new.blocks[2].outer.kernel))
    changed = np.abs(ops.convert_to_numpy(new(sound)["map"] - old(sound)["map"])) > 1e-3
    assert changed.any()


def test_small_has_at_most_twelve_million_parameters() -> None:
    assert MT3Backbone(**SMALL.to_dict()).count_params() <= 12_000_000


def test_a_segment_is_heard_with_what_comes_before_and_after() -> None:
    spectrogram = SMALL.spectrogram
    assert spectrogram.lead_samples == spectrogram.overhang_samples == (4096 - 256) // 2
    assert SMALL.input_samples == 32_768 + 2 * 1920
    assert ModelConfig().spectrogram.lead_samples == 0
    assert ModelConfig().input_samples == 32_768 + 1920


def test_a_configuration_survives_its_dictionary() -> None:
    assert ModelConfig.from_dict(SMALL.to_dict()) == SMALL
    model = MT3Backbone.from_config(build(MINI).get_config())
    assert model.model_config == MINI


@pytest.mark.parametrize(
    "network", [{"pointer": True}, {"head_feedback": True}, {"frames_per_position": 3}]
)
def test_impossible_networks_are_refused(network: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(network))):
        NetworkConfig(**network)


@pytest.mark.parametrize("spectrum", [{"front_end": "cqt"}, {"bins_per_octave": 20}])
def test_impossible_spectra_are_refused(spectrum: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(spectrum))):
        SpectrogramConfig(**spectrum)
