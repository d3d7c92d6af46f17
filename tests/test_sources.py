"""Instruments beyond soundfonts: each note sounds when and how high its label says."""

from __future__ import annotations

import json
import pathlib
import pickle

import numpy as np
import pytest
import soundfile

from mt3_keras.data.example import DatasetError
from mt3_keras.notes import Note
from mt3_keras.synth import drum_kits
from mt3_keras.synth.drum_kits import DrumKitSource, find_kits, name_to_pitches, read_kit
from mt3_keras.synth.recordings import RecordingsSource, find_instruments
from mt3_keras.synth.sounds import Samples, Source, measure_detuning
from mt3_keras.synth.synthetic import SyntheticConfig, open_sources, render

RATE_HZ = 16_000


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


def test_keys_are_let_go_of_where_a_note_ends_and_all_else_is_no_longer_heard(
    tmp_path: pathlib.Path,
) -> None:
    for name, programs in (("organ", [19]), ("violin", [40])):
        folder = tmp_path / f"{name}__maker"
        write_recordings(folder, {"A3": 57.0}, programs=programs, sustained=True)
    source, end = RecordingsSource((str(tmp_path),)), round(0.8 * RATE_HZ)

    def level(program: int, first: int) -> float:
        samples = play(source, [Note(0, 0.8, 57, 90, program)])
        return float(np.sqrt(np.mean(samples[first : first + 160] ** 2)))

    for program, share in ((19, 1.0), (40, 0.1)):
        assert level(program, end - 80) == pytest.approx(share * level(program, 8000), abs=0.01)


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


def test_pieces_of_all_sources_come_again(kit: pathlib.Path, recorded: RecordingsSource) -> None:
    assert open_sources() == ()
    sources = open_sources(drum_kits=str(kit), recordings=recorded.folders[0])
    assert sources == (DrumKitSource((str(kit),)), recorded)
    config = SyntheticConfig(
        seconds=2, other_sources=sources, other_share=0.9, program_redraw_chance=1
    )
    pieces = [render(pickle.loads(pickle.dumps(config)), 3) for _ in range(2)]
    np.testing.assert_array_equal(pieces[0].samples, pieces[1].samples)
    assert pieces[0].notes == pieces[1].notes
