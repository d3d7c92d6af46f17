"""Rendered music: the labels are what is heard, whoever renders it."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import pathlib
import pickle
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt3_keras.data.example import DatasetError
from mt3_keras.midi import write_midi
from mt3_keras.notes import Note, check_notes, trim_overlaps
from mt3_keras.synth import arrange, augment, composer, synthetic
from mt3_keras.synth.additive import NUM_PROGRAMS, AdditiveSource
from mt3_keras.synth.arrange import KIT_PIECES
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
EVERYTHING = Augmentation(1, 1, 1, 8, 1, 1, 20, 1, 1)
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
    config = SyntheticConfig(
        seconds=seconds,
        seed=7,
        augmentation=EVERYTHING,
        program_redraw_chance=0.5,
        drum_redraw_chance=0.5,
        split_chance=0.5,
        double_chance=0.5,
        strum_chance=0.5,
        ring_chance=0.5,
    )
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


def test_a_redrawn_drum_is_one_other_all_along_and_all_are_drawn_evenly() -> None:
    drums = [Note(i / 8, i / 8 + 0.1, (36, 42)[i % 2], 90, 0, True) for i in range(24)]
    found: collections.Counter[int] = collections.Counter()
    for seed in range(400):
        redrawn = arrange.redraw_drums(drums, 1.0, np.random.default_rng(seed))
        for old in (36, 42):
            (new,) = {n.pitch for n, o in zip(redrawn, drums, strict=True) if o.pitch == old}
            found[next(i for i, keys in enumerate(KIT_PIECES) if new in keys)] += 1
        assert [n._replace(pitch=0) for n in redrawn] == [n._replace(pitch=0) for n in drums]
    pieces = set(KIT_PIECES)
    assert len(found) == len(pieces)
    assert min(found.values()) > 15
    assert arrange.redraw_drums(drums, 0.0, np.random.default_rng(0)) == drums


def varied(parts: list[list[Note]], seed: int, **changes: Any) -> list[list[Note]]:
    config = dataclasses.replace(
        PLAIN, max_transposition=0, onset_jitter=0, velocity_jitter=0, **changes
    )
    return arrange.vary_parts(parts, config, range(NUM_PROGRAMS), np.random.default_rng(seed))


def test_redrawn_programs_are_even_over_classes_and_in_their_registers() -> None:
    part = [Note(i / 4, i / 4 + 0.2, 58 + i, 90) for i in range(8)]
    classes: collections.Counter[int] = collections.Counter()
    inside = []
    for seed in range(560):
        (notes,) = varied([part], seed, program_redraw_chance=1)
        low, high = arrange.register_of(notes[0].program)
        inside += [low <= note.pitch <= high for note in notes]
        classes[notes[0].program // 8] += 1
        assert {note.pitch - old.pitch for note, old in zip(notes, part, strict=True)} <= {
            12 * octaves for octaves in range(-5, 6)
        }
    assert len(classes) == 14
    assert min(classes.values()) > 20
    assert np.mean(inside) > 0.97


def test_a_split_part_is_two_instruments_and_a_doubled_one_a_unison() -> None:
    part = [Note(i / 4, i / 4 + 0.2, 50 + 3 * i, 90) for i in range(8)]
    split = varied([part], 1, min_instruments=2, split_chance=1, program_redraw_chance=1)
    assert sorted(note.onset for notes in split for note in notes) == [n.onset for n in part]
    assert len(split) == 2
    doubled = varied([part], 1, double_chance=1, program_redraw_chance=1)
    assert [[note.onset for note in notes] for notes in doubled] == 2 * [[n.onset for n in part]]


def test_a_strummed_chord_begins_string_by_string() -> None:
    chord = [Note(1, 2, pitch, 90, 25) for pitch in (60, 52, 55)]
    for seed in range(10):
        strummed = arrange.strum(chord, 0.01, np.random.default_rng(seed))
        pitches = [note.pitch for note in strummed]
        assert pitches in ([52, 55, 60], [60, 55, 52])
        assert strummed[0].onset == 1
        gaps = np.diff([note.onset for note in strummed])
        assert (gaps >= 0.005).all() and (gaps <= 0.015).all()


def test_ringing_notes_end_together_where_the_pedal_changes() -> None:
    notes = [Note(i / 4, i / 4 + 0.1, 50 + i, 90) for i in range(16)]
    for seed in range(10):
        rung = arrange.let_ring(notes, np.random.default_rng(seed))
        ends = sorted({note.offset for note in rung})
        assert all(note.offset > note.onset + 0.24 for note in rung)
        assert set(ends[:-1]) <= {note.onset for note in notes}
        assert all(min(e for e in ends if e > n.onset) == n.offset for n in rung)


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


def test_labels_of_what_has_no_keys_end_later_but_never_in_a_further_note() -> None:
    parts = [
        [Note(0.5, 1.0, 60, 90, program), Note(1.01, 1.5, 60, 90, program)] for program in (0, 40)
    ]
    played, heard = (
        synthetic.play_parts(
            parts, dataclasses.replace(PLAIN, heard_longer=longer), np.random.default_rng(0)
        )
        for longer in (0.0, 0.02)
    )
    assert np.array_equal(played[0], heard[0])
    ends = {
        program: [note.offset for note in heard[1] if note.program == program]
        for program in (0, 40)
    }
    assert ends[0] == [1.0, 1.5]
    assert ends[40] == pytest.approx([1.01, 1.52])


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
    config = dataclasses.replace(PLAIN, midi=str(folder), seconds=1, seconds_per_file=1)
    pieces = [render(config, i) for i in range(8)]
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
        mix /= np.abs(mix).max()
        assert mix[4000] > 0.3
        assert np.count_nonzero(np.abs(mix[4003:]) > 1e-3) > 100


def test_a_hall_sounds_on_for_a_second_and_moves_nothing() -> None:
    click = np.zeros(2 * RATE_HZ, np.float32)
    click[4000] = 1
    only_hall = dataclasses.replace(NO_AUGMENTATION, hall_chance=1)
    for seed in range(5):
        mix = augment.mix_stems([click], only_hall, np.random.default_rng(seed))
        assert not mix[:4000].any()
        assert int(np.argmax(np.abs(mix))) == 4000
        energy = np.cumsum(mix[:4000:-1].astype(float) ** 2)[::-1]  # still to come
        fallen = 10 * np.log10(energy / energy[0])
        decay = 3 * (np.argmax(fallen < -25) - np.argmax(fallen < -5)) / RATE_HZ  # by 60 dB
        assert 0.6 < decay < 2.6


def moved_by(changed: Samples, music: Samples) -> int:
    lags = range(-400, 401)
    return lags[
        int(np.argmax([np.dot(changed[1000:15000], np.roll(music, k)[1000:15000]) for k in lags]))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_poor_sound_is_late_by_a_millisecond_at_most(seed: int) -> None:
    time = np.arange(RATE_HZ) / RATE_HZ
    chirp = np.sin(2 * np.pi * (300 * time + 1200 * time**2)).astype(np.float32)
    chirp *= np.float32(0.1) + np.float32(0.9) * (time % 0.25 < 0.1)
    settings_ = dataclasses.replace(NO_AUGMENTATION, poor_chance=1)
    changed = augment.mix_stems([chirp], settings_, np.random.default_rng(seed))
    assert changed.shape == chirp.shape
    assert abs(moved_by(changed, chirp)) <= RATE_HZ // 1000


def test_a_mix_peaks_between_its_limits() -> None:
    settings_ = dataclasses.replace(NO_AUGMENTATION, lowest_peak_db=-40)
    peaks = [
        20 * np.log10(np.abs(augment.mix_stems([tone], settings_, np.random.default_rng(i))).max())
        for i, tone in enumerate(np.ones((50, 100), np.float32))
    ]
    assert -40.1 < min(peaks) < -35
    assert -5 < max(peaks) < -0.49


@pytest.mark.parametrize("name", ["equalizer_chance", "compression_chance", "codec_chance"])
def test_effects_delay_nothing(name: str) -> None:
    rng = np.random.default_rng(0)
    music = rng.standard_normal(RATE_HZ, np.float32) * np.float32(0.1)
    settings_ = dataclasses.replace(NO_AUGMENTATION, **{name: 1.0})
    changed = augment.mix_stems([music], settings_, np.random.default_rng(1))
    assert abs(moved_by(changed, music)) <= 1
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
        ("heard_longer", -0.1),
        ("max_detuning_cents", 80.0),
    ],
)
def test_nonsense_settings_are_refused(field: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=field):
        SyntheticConfig(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="room_chance"):
        Augmentation(room_chance=2)
    with pytest.raises(ValueError, match="lowest_peak_db"):
        Augmentation(lowest_peak_db=1)


def test_a_small_archive_that_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "MAX_ARCHIVE_BYTES", 2**20)
    (tmp_path / "a.mid").write_bytes(bytes(2**20 + 1))
    with tarfile.open(tmp_path / "midi.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.mid")
    with pytest.raises(DatasetError, match="holds over 1 GiB"):
        synthetic._read_archive(str(tmp_path / "midi.tar.gz"))
