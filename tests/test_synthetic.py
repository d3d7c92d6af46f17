"""Rendered music: the labels are what is heard, whoever renders it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import pathlib
import pickle
import tarfile
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt3_keras.data.example import DatasetError
from mt3_keras.midi import write_midi
from mt3_keras.notes import Note, check_notes, trim_overlaps
from mt3_keras.synth import augment, composer, synthetic
from mt3_keras.synth.additive import NUM_PROGRAMS, AdditiveSource
from mt3_keras.synth.augment import NO_AUGMENTATION, Augmentation
from mt3_keras.synth.sounds import (
    MAX_DETUNING,
    Samples,
    SoundFontSource,
    Source,
    Stem,
    find_pitches,
    measure_detuning,
)
from mt3_keras.synth.synthetic import SyntheticConfig, find, render, split_of

RATE_HZ = 16_000
EVERYTHING = Augmentation(1, 1, 8, 1, 1, 20, 1)
PLAIN = SyntheticConfig(seconds=4, augmentation=NO_AUGMENTATION, max_detuning_cents=0)


@pytest.fixture(scope="module")
def font(shared: pathlib.Path) -> SoundFontSource:
    path = shared / "data" / "train" / "TimGM6mb.sf3"
    if not path.is_file():
        pytest.skip(f"needs the soundfont {path}")
    if importlib.util.find_spec("tinysoundfont") is None:
        pytest.skip("needs tinysoundfont: pip install --no-deps -r requirements-fonts.txt")
    return SoundFontSource(str(path))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Twelve MIDI files, a folder of each two, all of the training split."""
    names = [n for n in (f"piece {chr(97 + i)}.mid" for i in range(26)) if split_of(n) == "train"]
    for i, name in enumerate(names[:12]):
        notes = [n for part in composer.compose(6, np.random.default_rng(i)) for n in part]
        (tmp_path / f"set{i // 2}").mkdir(exist_ok=True)
        write_midi(notes, tmp_path / f"set{i // 2}" / name)
    return tmp_path


def play(
    source: Source, notes: list[Note], seconds: float = 1.0, rate_hz: int = RATE_HZ, seed: int = 0
) -> Samples:
    stem = source.play(notes, round(seconds * rate_hz), rate_hz, np.random.default_rng(seed))
    assert stem.played.all()
    return stem.samples


def digest(piece: synthetic.Piece) -> str:
    return hashlib.sha256(piece.samples.tobytes() + repr(piece.notes).encode()).hexdigest()


def render_digest(config: SyntheticConfig, index: int) -> str:
    return digest(render(config, index))


def test_another_process_renders_the_same_bytes(folder: pathlib.Path) -> None:
    config = SyntheticConfig(midi=str(folder), seconds=2, augmentation=EVERYTHING)
    jobs = [(pickle.loads(pickle.dumps(config)), index) for index in (3, 0)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        elsewhere = pool.starmap(render_digest, jobs)
    here = [render_digest(config, index) for index in (0, 3)]
    assert json.dumps(render(config, 0).notes)  # plain numbers, none of NumPy's
    assert elsewhere == here[::-1]
    assert here[0] != here[1]


def test_seed_and_split_change_the_music() -> None:
    variants = [PLAIN, dataclasses.replace(PLAIN, seed=1)]
    variants.append(dataclasses.replace(PLAIN, split="validation"))
    assert len({render_digest(config, 0) for config in variants}) == 3
    assert find("", "train") == []


@settings(deadline=None, max_examples=12)
@given(index=st.integers(0, 10**6), seconds=st.sampled_from([1.0, 2.5]))
def test_every_piece_can_be_trained_on(index: int, seconds: float) -> None:
    config = SyntheticConfig(seconds=seconds, seed=7, augmentation=EVERYTHING)
    samples, notes, name, damaged = render(config, index)
    assert samples.shape == (round(RATE_HZ * seconds),)
    assert samples.dtype == np.float32
    assert np.isfinite(samples).all()
    assert 0.1 < np.abs(samples).max() <= 1
    assert (name, damaged) == ("", ())
    check_notes(notes)
    assert notes
    assert max(note.offset for note in notes) <= seconds
    assert trim_overlaps(notes) == notes


def test_a_swapped_drum_is_one_other_all_along() -> None:
    """The usual ones are swapped each for itself, others and pitched parts not at all."""
    config = dataclasses.replace(PLAIN, drum_swap_chance=1, max_transposition=0)
    drums = [Note(i / 8, i / 8 + 0.1, (36, 42, 38, 48)[i % 4], 90, 0, True) for i in range(24)]
    melody = [Note(i / 2, i / 2 + 0.4, 42, 90, 0, False) for i in range(6)]
    found = set()
    for seed in range(20):
        parts = synthetic.vary_parts([drums, melody], config, np.random.default_rng(seed))
        played = {part[0].is_drum: {note.pitch for note in part} for part in parts}
        assert played.get(False, {42}) == {42}
        if True in played:
            (hat,) = played[True] & set(synthetic.OTHER_DRUMS[42])
            (snare,) = played[True] & set(synthetic.OTHER_DRUMS[38])
            assert played[True] == {hat, snare, 35, 48}
            found.add(hat)
    assert len(found) > 2


def onset_contrast(samples: Samples, notes: list[Note]) -> float:
    """Mean logarithm of the energy of 30 ms after onsets over that of 30 ms before."""
    size = 480
    energy = np.convolve(samples.astype(np.float64) ** 2, np.ones(size), "valid") + 1e-9
    at = np.array([round(n.onset * RATE_HZ) for n in notes if 0.1 < n.onset < 3.9])
    return float(np.log(energy[at] / energy[at - size]).mean())


@pytest.mark.parametrize(("augmentation", "least"), [(NO_AUGMENTATION, 1.0), (EVERYTHING, 0.3)])
@pytest.mark.parametrize("is_drum", [False, True])
def test_sound_rises_at_label_onsets_and_nowhere_near(
    is_drum: bool, augmentation: Augmentation, least: float, tmp_path: pathlib.Path
) -> None:
    notes = [Note(0.3 * i, 0.3 * i + 0.15, 50 + i % 9, 90, 0, is_drum) for i in range(40)]
    (tmp_path / "midi").mkdir()
    write_midi(notes, tmp_path / "midi" / "even.mid")
    config = dataclasses.replace(
        PLAIN,
        midi=str(tmp_path / "midi"),
        split=split_of("even.mid"),
        augmentation=augmentation,
        program_swap_chance=0,
        program_redraw_chance=0,
        max_detuning_cents=50,
    )
    for index in range(3):
        samples, labels, name, _ = render(config, index)
        assert name == "even.mid"
        moved = [n._replace(onset=n.onset + 0.07) for n in labels]
        contrast = onset_contrast(samples, labels)
        assert contrast > least
        assert contrast > onset_contrast(samples, moved) + least


@pytest.mark.parametrize("is_drum", [False, True])
def test_additive_notes_begin_at_their_sample(is_drum: bool) -> None:
    for onset in (0, 1, 1237, 9999):
        note = Note(onset / RATE_HZ, onset / RATE_HZ + 0.2, 40, 100, 0, is_drum)
        heard = np.flatnonzero(play(AdditiveSource(), [note]))
        assert onset <= heard[0] <= onset + 1


@pytest.mark.parametrize("is_drum", [False, True])
def test_soundfont_notes_begin_at_their_sample(font: SoundFontSource, is_drum: bool) -> None:
    first = play(font, [Note(0, 0.2, 40, 100, 0, is_drum)])
    assert np.flatnonzero(first)[0] <= 40
    for onset in (1, 1237, 9999):
        note = Note(onset / RATE_HZ, onset / RATE_HZ + 0.2, 40, 100, 0, is_drum)
        samples = play(font, [note])
        assert not samples[:onset].any()
        np.testing.assert_array_equal(samples[onset:], first[: RATE_HZ - onset])


def test_each_soundfont_note_begins_at_its_sample_among_others(font: SoundFontSource) -> None:
    rng = np.random.default_rng(0)
    notes = [Note(t, t + 0.3, 50 + i, 100) for i, t in enumerate(sorted(rng.uniform(0, 0.8, 8)))]
    together = play(font, notes)
    for position, note in enumerate(notes):
        onset = round(note.onset * RATE_HZ)
        before = play(font, notes[:position]) if position else np.zeros(RATE_HZ, np.float32)
        np.testing.assert_array_equal(together[:onset], before[:onset])
        assert np.abs(together - before)[onset : onset + 100].max() > 1e-4


def test_detuning_is_by_the_rate_and_moves_no_onset() -> None:
    note = Note(0.5, 1.0, 69, 100, 16)
    rate_hz = round(RATE_HZ * 2 ** (-40 / 1200))
    clock = RATE_HZ / rate_hz
    moved = note._replace(onset=note.onset * clock, offset=note.offset * clock)
    samples = play(AdditiveSource(), [moved], 1.0 * clock, rate_hz)
    assert len(samples) == RATE_HZ
    assert abs(np.flatnonzero(samples)[0] - 8000) <= 1
    assert measure_detuning(samples[8000:16000], 69) == pytest.approx(0.4, abs=0.08)


@settings(deadline=None, max_examples=40)
@given(program=st.integers(0, NUM_PROGRAMS - 1), pitch=st.integers(24, 88), seed=st.integers(0, 99))
def test_additive_notes_have_their_pitch(program: int, pitch: int, seed: int) -> None:
    samples = play(AdditiveSource(), [Note(0, 1, pitch, 100, program)], 0.512, seed=seed)
    assert abs(measure_detuning(samples, pitch)) <= MAX_DETUNING


@pytest.mark.parametrize("semitones", [0.0, 0.2, -0.45, 0.6])
@pytest.mark.parametrize("pitch", [28, 60, 100])
def test_detuning_of_a_tone_is_measured(pitch: int, semitones: float) -> None:
    hz = 440 * 2 ** ((pitch + semitones - 69) / 12)
    time = np.arange(8192) / RATE_HZ
    tone = np.sum([np.sin(2 * np.pi * h * hz * time) / h for h in (1, 2, 3)], axis=0)
    detuning = measure_detuning(tone.astype(np.float32), pitch)
    assert detuning == pytest.approx(semitones, abs=0.08)


def test_other_pitches_and_noise_are_not_in_tune() -> None:
    time = np.arange(8192) / RATE_HZ
    octave_up = np.sin(2 * np.pi * 880 * time).astype(np.float32)
    noise = np.random.default_rng(0).standard_normal(8192, np.float32)
    for tone in (octave_up, noise, np.zeros(8192, np.float32)):
        assert abs(measure_detuning(tone, 69)) == np.inf


def test_silent_and_mistuned_notes_of_an_instrument_are_found() -> None:
    def instrument(pitch: int) -> Samples:
        sounding = pitch + (1 if pitch == 62 else 0)
        note = Note(0, 1, sounding, 100, 16)
        return play(AdditiveSource(), [note], 0.512) * np.float32(50 <= pitch < 70)

    assert find_pitches(instrument, pitched=True) == frozenset(range(50, 70)) - {62}
    assert find_pitches(instrument, pitched=False) == frozenset(range(50, 70))


@dataclasses.dataclass(frozen=True)
class NarrowSource:
    """Plays E4 and F4 only."""

    def play(
        self, notes: Sequence[Note], num_samples: int, rate_hz: int, rng: np.random.Generator
    ) -> Stem:
        played = np.array([note.pitch in (64, 65) for note in notes])
        kept = [note for note, plays in zip(notes, played, strict=True) if plays]
        if not kept:
            return Stem(np.zeros(num_samples, np.float32), played)
        return AdditiveSource().play(kept, num_samples, rate_hz, rng)._replace(played=played)


def test_notes_that_no_source_sounds_are_not_labelled() -> None:
    config = dataclasses.replace(PLAIN, other_sources=(NarrowSource(),), additive_share=0)
    parts = [[Note(0.1 * p - 6, 0.1 * p - 5.9, p, 90) for p in range(60, 70)], [Note(0, 1, 50, 90)]]
    stems, notes = synthetic.play_parts(parts, config, np.random.default_rng(0))
    assert [note.pitch for note in notes] == [64, 65]
    assert len(stems) == 1


def test_a_soundfont_labels_only_what_it_sounds(font: SoundFontSource) -> None:
    gun_shots = [Note(0.1 * i, 0.1 * i + 0.1, 40 + i, 100, 127) for i in range(5)]
    stem = font.play(gun_shots, RATE_HZ, RATE_HZ, np.random.default_rng(0))
    assert not stem.played.any()
    assert not stem.samples.any()


def test_soundfonts_render_whole_pieces(font: SoundFontSource) -> None:
    config = dataclasses.replace(PLAIN, soundfonts=(font.path,), additive_share=0)
    piece = render(config, 0)
    assert digest(piece) == render_digest(config, 0)
    assert onset_contrast(piece.samples, piece.notes) > 0.3


def test_archive_and_folder_give_the_same_pieces(folder: pathlib.Path) -> None:
    archive = folder / "all.tar.xz"
    with tarfile.open(archive, "w:xz") as file:
        for path in folder.glob("set*"):
            file.add(path, path.name)
    one, other = (dataclasses.replace(PLAIN, midi=str(m)) for m in (folder, archive))
    assert find(one.midi, "train") == find(other.midi, "train")
    assert len(find(one.midi, "train")) == 12
    assert [render_digest(one, i) for i in range(3)] == [render_digest(other, i) for i in range(3)]


def test_damaged_and_empty_midi_files_are_named_and_passed_over(folder: pathlib.Path) -> None:
    spoilt = sorted(folder.rglob("*.mid"))[::2]
    for i, path in enumerate(spoilt):
        path.write_bytes(path.read_bytes()[: 40 * (i + 1)] if i else b"")
    config = dataclasses.replace(PLAIN, midi=str(folder), seconds=1)
    pieces = [render(config, 8 * i) for i in range(8)]
    damaged = {name for piece in pieces for name in piece.damaged}
    assert damaged
    assert damaged <= {path.relative_to(folder).as_posix() for path in spoilt}
    assert not damaged & {piece.name for piece in pieces}


def test_nothing_but_damaged_files_is_an_error_that_names_the_folder(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "a.mid").write_bytes(b"no music")
    config = dataclasses.replace(PLAIN, midi=str(tmp_path), split=split_of("a.mid"))
    with pytest.raises(DatasetError, match=r"50 of them damaged"):
        render(config, 0)


@pytest.mark.parametrize("content", [None, b"not an archive"])
def test_missing_or_damaged_sources_are_named(
    content: bytes | None, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "file.tar.xz"
    if content:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"file.tar.xz: no folder and no readable tar"):
        render(dataclasses.replace(PLAIN, midi=str(path)), 0)
    if importlib.util.find_spec("tinysoundfont"):
        with pytest.raises(DatasetError, match=r"file.tar.xz: missing or no readable"):
            render(dataclasses.replace(PLAIN, soundfonts=(str(path),), additive_share=0), 0)


def test_no_piece_is_in_both_splits(tmp_path: pathlib.Path) -> None:
    for i in range(300):
        (tmp_path / f"{i:03d}_band.mid").touch()
        (tmp_path / f"piano_{i:03d}.MID").touch()
    train, validation = (find(str(tmp_path), split) for split in synthetic.SPLITS)
    assert len(train) + len(validation) == 600
    numbers = [
        {"".join(filter(str.isdigit, name)) for name in split} for split in (train, validation)
    ]
    assert not numbers[0] & numbers[1]
    assert 0.02 < len(validation) / 600 < 0.09


def test_a_room_adds_only_what_comes_after_the_direct_sound() -> None:
    click = np.zeros(RATE_HZ, np.float32)
    click[4000] = 1
    only_room = dataclasses.replace(NO_AUGMENTATION, room_chance=1)
    for seed in range(5):
        mix = augment.mix_stems([click], only_room, np.random.default_rng(seed))
        assert np.abs(mix[:4000]).max() < 1e-5
        assert int(np.argmax(np.abs(mix))) in range(4000, 6000)
        assert mix[4000] > 0.3
        assert np.count_nonzero(np.abs(mix[4003:]) > 1e-3) > 100


@pytest.mark.parametrize("name", ["equalizer_chance", "compression_chance", "codec_chance"])
def test_effects_delay_nothing(name: str) -> None:
    rng = np.random.default_rng(0)
    music = rng.standard_normal(RATE_HZ, np.float32) * np.float32(0.1)
    settings_ = dataclasses.replace(NO_AUGMENTATION, **{name: 1.0})
    changed = augment.mix_stems([music], settings_, np.random.default_rng(1))
    lags = range(-400, 401)
    alike = [float(np.dot(changed[1000:15000], np.roll(music, lag)[1000:15000])) for lag in lags]
    assert abs(lags[int(np.argmax(alike))]) <= 1
    assert not np.allclose(changed / np.abs(changed).max(), music / np.abs(music).max(), atol=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("split", "test"),
        ("seconds", 0.5),
        ("seed", -1),
        ("min_instruments", 9),
        ("max_stretch", 0.5),
        ("additive_share", 1.5),
        ("onset_jitter", -0.1),
        ("max_detuning_cents", 80.0),
    ],
)
def test_nonsense_settings_are_refused(field: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=field):
        SyntheticConfig(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="room_chance"):
        Augmentation(room_chance=2)
