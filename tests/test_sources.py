"""Instruments beyond soundfonts: each note sounds when and how high its label says."""

from __future__ import annotations

import importlib.util
import itertools
import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mt3_keras.data.example import DatasetError
from mt3_keras.notes import Note
from mt3_keras.synth import drum_kits, faust, voice
from mt3_keras.synth.drum_kits import DrumKitSource, find_kits, name_to_pitches, read_kit
from mt3_keras.synth.faust import FaustSource
from mt3_keras.synth.phrases import split_lines
from mt3_keras.synth.recordings import RecordingsSource, find_instruments
from mt3_keras.synth.sounds import MAX_DETUNING, Samples, Source, measure_detuning
from mt3_keras.synth.synthetic import SyntheticConfig, open_sources, render
from mt3_keras.synth.voice import VoiceSource

RATE_HZ = 16_000
# One of each kind: bowed, plucked, blown by reed, brass, organ, voice.
PROGRAMS = (40, 25, 71, 56, 16, 53)


@pytest.fixture(scope="module")
def models() -> FaustSource:
    if importlib.util.find_spec("dawdreamer") is None:
        pytest.skip("needs dawdreamer: pip install --no-deps -r requirements-fonts.txt")
    if faust.clashing_module():
        pytest.skip("played by test_models_hold_in_a_process_of_their_own")
    return FaustSource()


def test_models_hold_in_a_process_of_their_own() -> None:
    if not faust.clashing_module():
        pytest.skip("this is one: nothing that clashes with them is loaded")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "played by" not in run.stdout


def test_models_are_refused_where_they_would_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", sys)
    with pytest.raises(DatasetError, match=r"tensorflow.*python -m train\.prepare"):
        faust._compile.__wrapped__("process = 0;")


@pytest.fixture(scope="module")
def singers(tmp_path_factory: pytest.TempPathFactory) -> VoiceSource:
    """A bank of made-up syllables: one formant each, eight frames of consonant."""
    rng = np.random.default_rng(0)
    number, frames, bins = len(voice.VOICES) * len(voice.SYLLABLES), 20, np.arange(257)
    formants = rng.uniform(8, 25, (number, 1, 1))
    log_power = np.broadcast_to(-(((bins - formants) / 40) ** 2) - bins / 60, (number, frames, 257))
    path = tmp_path_factory.mktemp("bank") / "voices.npz"
    np.savez(
        path,
        log_power=log_power.reshape(-1, 257).astype(np.float16),
        breath=np.full((number * frames, 257), 0.1, np.float16),
        num_frames=np.full(number, frames, np.int32),
        first_voiced=np.full(number, 6, np.int32),
    )
    return VoiceSource(str(path))


@pytest.fixture
def kit(tmp_path: pathlib.Path) -> pathlib.Path:
    """A kit of a kick in two strengths and both hi-hats, each a steady tone after silence."""
    layers = {"Kick": ("soft", "hard"), "Closed HH": ("closed",), "Open HH": ("open",)}
    text = ""
    for number, (name, files) in enumerate(layers.items()):
        text += f"<instrument><name>{name}</name><volume>1</volume>"
        for i, file in enumerate(files):
            tone = np.sin(np.arange(40_000) * 0.05 * (1 + number + 3 * i))
            soundfile.write(tmp_path / f"{file}.wav", np.r_[np.zeros(3000), tone], 44_100)
            low, high = i / len(files), (i + 1) / len(files)
            text += (
                f"<layer><filename>{file}.wav</filename><min>{low}</min><max>{high}</max></layer>"
            )
        text += "</instrument>"
    (tmp_path / "drumkit.xml").write_text(f"<drumkit_info xmlns='urn:x'>{text}</drumkit_info>")
    return tmp_path


def play(source: Source, notes: list[Note], seconds: float = 1.0, seed: int = 0) -> Samples:
    stem = source.play(notes, round(seconds * RATE_HZ), RATE_HZ, np.random.default_rng(seed))
    assert stem.played.all()
    return stem.samples


def onset_ms(samples: Samples, onset: int) -> float:
    """Milliseconds from a sample to where 5 ms reach a tenth of the loudest."""
    level = np.sqrt(np.convolve(samples**2, np.ones(80) / 80, "full")[: len(samples)])
    return float(np.flatnonzero(level >= 0.1 * level.max())[0] - onset) / 16


@pytest.mark.parametrize("program", PROGRAMS)
def test_models_sound_at_their_onset_and_in_tune(models: FaustSource, program: int) -> None:
    for seed, pitch in enumerate((48, 60, 67, 79)):
        note = Note(4001 / RATE_HZ, 1.2, pitch, 90, program)
        stem = models.play([note], 19_200, RATE_HZ, np.random.default_rng(seed))
        if not stem.played.all():
            continue
        assert not stem.samples[:4001].any()
        assert onset_ms(stem.samples, 4001) < 35
        assert abs(measure_detuning(stem.samples[6400:14_592], pitch)) <= MAX_DETUNING


def test_a_model_played_again_gives_the_same(models: FaustSource) -> None:
    notes = [Note(0.1 * i, 0.1 * i + 0.3, 60 + i % 7, 90, 24) for i in range(8)]
    first = play(models, notes)
    play(models, [note._replace(program=40) for note in notes])
    np.testing.assert_array_equal(play(pickle.loads(pickle.dumps(models)), notes), first)


def test_detuned_models_are_detuned_by_the_rate(models: FaustSource) -> None:
    rate_hz = round(RATE_HZ * 2 ** (-40 / 1200))
    for program in (25, 71):
        stem = models.play(
            [Note(0, 1.0, 69, 100, program)], RATE_HZ, rate_hz, np.random.default_rng(0)
        )
        assert measure_detuning(stem.samples[2400:10_592], 69) == pytest.approx(0.4, abs=0.1)


def test_no_model_plays_a_piano_or_drums(models: FaustSource) -> None:
    for note in (Note(0, 1, 60, 90, 0), Note(0, 1, 38, 90, 40, True)):
        assert not models.play([note], RATE_HZ, RATE_HZ, np.random.default_rng(0)).played.any()


@settings(deadline=None, max_examples=15)
@given(pitch=st.integers(45, 80), onset=st.integers(2000, 6000), seed=st.integers(0, 99))
def test_sung_notes_have_their_pitch_and_onset(
    singers: VoiceSource, pitch: int, onset: int, seed: int
) -> None:
    note = Note(onset / RATE_HZ, onset / RATE_HZ + 0.7, pitch, 100, 54)
    samples = play(singers, [note], 1.2, seed)
    assert not samples[: onset - 800].any()  # consonants lead by 40 ms at most, and a window
    assert onset_ms(samples, onset) < 35
    early = samples[onset + 800 : onset + 4000]  # before vibrato comes
    assert abs(measure_detuning(early, pitch)) <= MAX_DETUNING


def test_a_bank_must_be_there_and_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bank.npz"
    note = Note(0, 1, 60, 100, 53)
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"bank.npz: missing or no bank"):
            play(VoiceSource(str(path)), [note])
        path.write_bytes(b"nothing")


def test_speech_is_taken_apart_into_a_bank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    if shutil.which("espeak-ng") is None or importlib.util.find_spec("pyworld") is None:
        pytest.skip("needs espeak-ng and pyworld")
    monkeypatch.setattr(voice, "VOICES", ("it+f1",))
    monkeypatch.setattr(voice, "SYLLABLES", ("la", "sa"))
    voice.make_bank(tmp_path / "bank.npz")
    with np.load(tmp_path / "bank.npz", allow_pickle=False) as bank:
        assert len(bank["log_power"]) == bank["num_frames"].sum() == len(bank["breath"])
        assert bank["first_voiced"][1] > bank["first_voiced"][0]  # the s comes before its vowel


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.floats(0.05, 2), st.integers(40, 80)), min_size=1, max_size=30
    )
)
def test_lines_hold_every_note_once_and_none_overlap(drawn: list[tuple[float, float, int]]) -> None:
    notes = sorted(Note(onset, onset + length, pitch, 90) for onset, length, pitch in drawn)
    lines = split_lines(notes, 0.03)
    assert sorted(note for line in lines for note in line) == notes
    for line in lines:
        assert all(b.onset >= a.offset - 0.03 for a, b in itertools.pairwise(line))


def test_drums_begin_at_their_sample_and_know_their_strength(kit: pathlib.Path) -> None:
    source = DrumKitSource(find_kits(str(kit)))
    hits = {}
    for velocity in (30, 120):
        for onset in (0, 1237, 9999):
            samples = play(source, [Note(onset / RATE_HZ, 1, 36, velocity, 0, True)], 1.0)
            assert onset <= np.flatnonzero(np.abs(samples) > 1e-3)[0] <= onset + 16
        hits[velocity] = play(source, [Note(0, 1, 36, velocity, 0, True)])
    soft, hard = (np.argmax(np.abs(np.fft.rfft(hits[v][:8000]))) for v in (30, 120))
    assert hard > 3 * soft  # the other recording
    assert np.abs(hits[120]).max() > 2 * np.abs(hits[30]).max()


def test_an_open_hat_ends_where_a_hat_is_struck(kit: pathlib.Path) -> None:
    source = DrumKitSource(find_kits(str(kit)))
    notes = [Note(0, 0.1, 46, 90, 0, True), Note(0.5, 0.6, 36, 90, 0, True)]
    alone = play(source, notes)
    ended = play(source, [*notes, Note(0.3, 0.4, 42, 1, 0, True)])
    assert np.abs(alone[6000:7900]).mean() > 20 * np.abs(ended[6000:7900]).mean()


def test_drums_that_no_kit_has_are_not_played(kit: pathlib.Path) -> None:
    notes = [Note(0, 0.1, pitch, 90, 0, True) for pitch in (36, 42, 49)]
    stem = DrumKitSource((str(kit),)).play(notes, RATE_HZ, RATE_HZ, np.random.default_rng(0))
    assert stem.played.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("name", "pitches"),
    [
        ("Pearl Kick", (35, 36)),
        ("c#3 - stick", (37,)),
        ("Snare Roll", ()),
        ("Hi-Hat Semiopen (Paiste Alpha)", (46,)),
        ("VariBreaks Hat 1 Pd", (44,)),
        ("drum_cymbal_closed", (42,)),
        ("Tom Mid", (45, 47, 48)),
        ("Ride Bell (Custom)", (53,)),
        ("bass_dnb_f", ()),
        ("17", ()),
    ],
)
def test_names_tell_drums(name: str, pitches: tuple[int, ...]) -> None:
    assert name_to_pitches(name) == pitches


def test_kits_that_cannot_be_read_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DatasetError, match=r"no samples named after drums"):
        find_kits(str(tmp_path))
    (tmp_path / "drumkit.xml").write_text("<drumkit")
    with pytest.raises(DatasetError, match=r"no readable drum kit"):
        read_kit(str(tmp_path))
    (tmp_path / "kick.wav").write_bytes(b"no sound")
    with pytest.raises(DatasetError, match=r"kick.wav: missing or no readable recording"):
        drum_kits.read_stroke(str(tmp_path / "kick.wav"))


def pulses(pitch: float, seconds: float, rate_hz: int) -> Samples:
    """A tone of eight harmonics."""
    turns = np.arange(round(seconds * rate_hz)) * 440 * 2 ** ((pitch - 69) / 12) / rate_hz
    tone = sum(np.sin(2 * np.pi * h * turns) / h for h in range(1, 9))
    return np.asarray(0.2 * tone, np.float32)


def write_recordings(
    folder: pathlib.Path, pitches: dict[str, float], seconds: float = 1.3, **told: object
) -> None:
    """Notes that sound at some pitches, after a tenth of a second of silence."""
    folder.mkdir(parents=True)
    for file, pitch in pitches.items():
        sound = np.r_[np.zeros(1600), pulses(pitch, seconds, RATE_HZ)]
        soundfile.write(folder / f"{file}.wav", sound, RATE_HZ)
    files = {
        f"{file}.wav": {
            "midi": round(pitch),
            "cents": 100 * (pitch - round(pitch)),
            "seconds": seconds,
        }
        for file, pitch in pitches.items()
    }
    (folder / "instrument.json").write_text(json.dumps({"files": files, **told}))


@pytest.fixture
def recorded(tmp_path: pathlib.Path) -> RecordingsSource:
    """A violin and a harp of two notes each, a fifth of a semitone sharp."""
    pitches = {"A3": 57.2, "Cs5": 73.2}
    for name, program in (("violin", 40), ("harp", 46)):
        folder = tmp_path / "notes" / f"{name}__maker"
        write_recordings(folder, pitches, programs=[program], sustained=program == 40)
    return RecordingsSource((str(tmp_path / "notes"),))


@pytest.mark.parametrize(("program", "pitch"), [(40, 57), (40, 62), (46, 70), (46, 78)])
def test_a_recorded_note_is_played_in_tune_and_begins_at_its_onset(
    recorded: RecordingsSource, program: int, pitch: int
) -> None:
    for onset in (0, 1237):
        samples = play(recorded, [Note(onset / RATE_HZ, 0.8, pitch, 90, program)])
        assert not samples[:onset].any()
        assert np.flatnonzero(np.abs(samples) > 0.1 * np.abs(samples).max())[0] <= onset + 80
        assert measure_detuning(samples[onset : onset + 8192], pitch) == pytest.approx(0, abs=0.03)
        assert not samples[round((0.8 + 0.15) * RATE_HZ) + 1 :].any()


def test_recorded_notes_are_detuned_by_the_rate(recorded: RecordingsSource) -> None:
    rate_hz = round(RATE_HZ * 2 ** (-40 / 1200))
    note, rng = Note(0, 0.9, 60, 100, 40), np.random.default_rng(0)
    samples = recorded.play([note], RATE_HZ, rate_hz, rng).samples
    assert measure_detuning(samples[:8192], 60) == pytest.approx(0.4, abs=0.03)


def test_held_notes_that_would_outlast_their_recording_are_not_played(
    recorded: RecordingsSource,
) -> None:
    """It lasts 1.3 s at its own pitch; plucked strings may be held as long as one likes."""
    rng = np.random.default_rng(0)
    for length, pitch, is_played in ((1.1, 57, True), (1.1, 62, False), (4, 57, False)):
        held = [Note(0, length, pitch, 90, 40), Note(0, 0.1, pitch, 90, 40)]
        stem = recorded.play(held, 5 * RATE_HZ, RATE_HZ, rng)
        assert stem.played.tolist() == [is_played, True]
        plucked = recorded.play([held[0]._replace(program=46)], 5 * RATE_HZ, RATE_HZ, rng)
        assert plucked.played.all() and not plucked.samples[2 * RATE_HZ :].any()


def test_fainter_recorded_notes_are_softer_and_duller(recorded: RecordingsSource) -> None:
    loud, soft = (
        np.abs(np.fft.rfft(play(recorded, [Note(0, 1, 57, velocity, 40)])))
        for velocity in (120, 30)
    )
    assert loud.max() > 3 * soft.max()
    assert loud[1500:].max() / loud.max() > 1.1 * soft[1500:].max() / soft.max()


def test_what_has_no_recording_near_is_neither_played_nor_labelled(
    recorded: RecordingsSource,
) -> None:
    pitches = (50, 51, 62, 64, 67, 78, 79)  # recordings of 57.2 and 73.2: 7 down, 5 up
    notes = [Note(0, 0.5, pitch, 90, 40) for pitch in pitches]
    stem = recorded.play(notes, RATE_HZ, RATE_HZ, np.random.default_rng(0))
    assert stem.played.tolist() == [False, True, True, False, True, True, False]
    alone = recorded.play(notes[:1], RATE_HZ, RATE_HZ, np.random.default_rng(0))
    assert not alone.played.any() and not alone.samples.any()


def test_no_recording_plays_drums_or_other_instruments(recorded: RecordingsSource) -> None:
    for note in (Note(0, 1, 57, 90, 0), Note(0, 1, 57, 90, 40, True)):
        assert not recorded.play([note], RATE_HZ, RATE_HZ, np.random.default_rng(0)).played.any()


def test_a_note_plays_the_layer_nearest_to_its_strength(tmp_path: pathlib.Path) -> None:
    """Layers are of one pitch and sound an octave apart, so that they can be told apart."""
    for velocity, pitch in (("p", 57.0), ("f", 69.0)):
        folder = tmp_path / f"horn__maker__{velocity}"
        write_recordings(folder, {"A3": pitch}, programs=[60], sustained=True, velocity=velocity)
        description = folder / "instrument.json"
        description.write_text(description.read_text().replace('"midi": 69', '"midi": 57'))
    (horn,) = find_instruments(str(tmp_path))
    assert sorted(layer.strength for layer in horn.layers) == [0.4, 0.85]
    for strength, sounding in ((30, 57), (110, 69)):
        tone = play(RecordingsSource((str(tmp_path),)), [Note(0, 1, 57, strength, 60)])
        assert measure_detuning(tone[:8192], sounding) == pytest.approx(0, abs=0.05)


def test_takes_without_strength_are_instruments_of_their_own(tmp_path: pathlib.Path) -> None:
    for take in "ab":
        folder = tmp_path / f"violin__maker__{take}"
        write_recordings(folder, {"A3": 57.0}, programs=[40], sustained=True, velocity=None)
    assert [len(one.layers) for one in find_instruments(str(tmp_path))] == [1, 1]


def test_programs_are_those_of_the_descriptions_and_kits_have_none(
    recorded: RecordingsSource, tmp_path: pathlib.Path
) -> None:
    assert recorded.programs == {40, 46}
    write_recordings(tmp_path / "kit", {}, programs=[], sustained=False)
    with pytest.raises(DatasetError, match=r"kit: no folder with an instrument.json that has"):
        find_instruments(str(tmp_path / "kit"))


def test_without_other_sounds_parts_are_given_programs_that_are_recorded(
    recorded: RecordingsSource,
) -> None:
    config = SyntheticConfig(
        seconds=2,
        other_sources=(recorded,),
        other_share=1,
        additive_share=0,
        program_redraw_chance=1,
    )
    programs = {note.program for index in range(8) for note in render(config, index).notes}
    assert programs == {40, 46}


def test_damaged_recordings_and_descriptions_are_named(tmp_path: pathlib.Path) -> None:
    note, folder = Note(0, 1, 69, 90, 73), tmp_path / "flute"
    write_recordings(folder, {"A4": 69.0}, programs=[73], sustained=True)
    flutes = RecordingsSource((str(folder),))
    (folder / "A4.wav").write_bytes(b"no sound")
    with pytest.raises(DatasetError, match=r"A4.wav: missing or no readable recording of a note"):
        play(flutes, [note])
    soundfile.write(folder / "A4.wav", np.zeros(4000), 16_000)
    with pytest.raises(DatasetError, match=r"A4.wav: a silent recording of a note"):
        play(flutes, [note])
    for i, content in enumerate(
        ("{", "{}", '{"programs": [1], "sustained": 1, "files": {"a": {}}}')
    ):
        damaged = tmp_path / f"damaged{i}"
        damaged.mkdir()
        (damaged / "instrument.json").write_text(content)
        with pytest.raises(DatasetError, match=r"instrument.json: not a description"):
            find_instruments(str(damaged))


def test_a_stroke_is_named_by_the_key_that_its_file_begins_with(tmp_path: pathlib.Path) -> None:
    soundfile.write(tmp_path / "54_shaken_v1.wav", pulses(60, 0.2, RATE_HZ), RATE_HZ)
    soundfile.write(tmp_path / "51_cymbal_v1.wav", pulses(60, 0.2, RATE_HZ), RATE_HZ)
    assert {drum.pitches for drum in read_kit(str(tmp_path))} == {(54,), (51, 59)}


def test_pieces_of_all_sources_come_again(
    models: FaustSource, singers: VoiceSource, kit: pathlib.Path, recorded: RecordingsSource
) -> None:
    assert open_sources() == ()
    sources = open_sources(
        models=True, drum_kits=str(kit), voices=singers.bank, recordings=recorded.folders[0]
    )
    assert sources == (models, DrumKitSource((str(kit),)), singers, recorded)
    config = SyntheticConfig(
        seconds=2, other_sources=sources, other_share=0.9, program_redraw_chance=1
    )
    pieces = [render(pickle.loads(pickle.dumps(config)), 3) for _ in range(2)]
    np.testing.assert_array_equal(pieces[0].samples, pieces[1].samples)
    assert pieces[0].notes == pieces[1].notes


def test_programs_are_played_by_models_of_their_own() -> None:
    assert {p for model in faust.MODELS for p in model.programs} >= set(PROGRAMS)
    assert all(model.attack[0] <= model.attack[1] for model in faust.MODELS)
