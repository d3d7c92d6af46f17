"""Scores: quantisation, staves and voices, MusicXML, engraving, and how MuseScore reads it."""

from __future__ import annotations

import collections
import itertools
import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from mt3_keras import engraving
from mt3_keras.beats import Beats
from mt3_keras.engraving import write_score
from mt3_keras.midi import read_midi
from mt3_keras.musicxml import spell, to_musicxml
from mt3_keras.notes import Note
from mt3_keras.score import QUARTER, find_key, make_score


def steady(per_bar=4, num_beats=40, start=1.0, **options):
    """Beats at 60 a minute, so that seconds are beats."""
    times = tuple(start + k for k in range(num_beats))
    return Beats(times, tuple(k % per_bar + 1 for k in range(num_beats)), **options)


def tune(program=40, num_bars=4, jitter=0.0):
    """Quarters, eighths, a triplet, a syncopation and a long note in each bar of four."""
    rng = np.random.default_rng(0)
    rhythm = [(0, 1), (1, 0.5), (1.5, 0.5), (2, 1 / 3), (2 + 1 / 3, 1 / 3), (2 + 2 / 3, 1 / 3)]
    rhythm += [(3, 0.25), (3.25, 0.75)]
    notes = []
    for bar in range(num_bars):
        for number, (place, length) in enumerate(rhythm):
            onset = 1 + 4 * bar + place + rng.normal(0, jitter)
            notes.append(Note(onset, onset + length * 0.9, 67 + number, 80, program))
    return notes


def drums(num_bars=4):
    hits = []
    for beat in range(4 * num_bars):
        for pitch, place in ((42, 0), (42, 0.5), (38 if beat % 2 else 36, 0)):
            hits.append(Note(1 + beat + place, 1.05 + beat + place, pitch, 90, 0, True))
    return hits


def chords_of(part):
    return [chord for staff in part.staves for voice in staff.voices for chord in voice]


def measures(text):
    root = ElementTree.fromstring(text.split("\n", 2)[2])
    return [part.findall("measure") for part in root.findall("part")]


def test_onsets_move_to_the_nearest_sixteenth_or_triplet():
    (part,) = make_score(tune(jitter=0.015), steady()).parts
    starts = [chord.start for chord in chords_of(part)][:8]
    assert starts == [0, 12, 18, 24, 28, 32, 36, 39]
    assert part.triplets == {24, 72, 120, 168}


def test_every_pitched_note_is_in_the_score_once():
    notes = [*tune(40), *tune(0), *drums()]
    for part in make_score(notes, steady()).parts:
        wanted = [n for n in notes if n.is_drum == part.is_drum and n.program == part.program]
        assert sum(len(chord.pitches) for chord in chords_of(part)) == len(wanted)


def test_voices_have_no_overlaps_and_bars_are_full():
    rng = np.random.default_rng(4)
    onsets = np.sort(rng.uniform(1, 30, 200))
    notes = [
        Note(t, t + rng.uniform(0.05, 4), int(rng.integers(30, 90)), 80, int(rng.choice([0, 40])))
        for t in onsets
    ]
    for beats in (steady(), steady(3), steady(2, is_compound=True)):
        score = make_score(notes, beats)
        for part in score.parts:
            for staff in part.staves:
                for voice in staff.voices:
                    for chord, following in itertools.pairwise(voice):
                        assert chord.start < chord.end <= following.start
        for part_measures in measures(to_musicxml(score)):
            for measure, bar in zip(part_measures, score.bars, strict=True):
                lengths = collections.Counter()
                for note in measure.findall("note"):
                    if note.find("chord") is None:
                        lengths[note.findtext("voice")] += int(note.findtext("duration"))
                assert set(lengths.values()) == {bar.length}


@pytest.mark.parametrize(("per_bar", "time"), [(4, ("4", "4")), (3, ("3", "4"))])
def test_bars_are_those_of_the_beats(per_bar, time):
    score = make_score(tune(), steady(per_bar))
    (part_measures,) = measures(to_musicxml(score))
    found = part_measures[0].find("attributes/time")
    assert (found.findtext("beats"), found.findtext("beat-type")) == time
    assert len(part_measures) == -(-16 // per_bar)


def test_dotted_beats_are_bars_of_eighths():
    notes = [Note(1 + k / 3, 1 + (k + 1) / 3, 60, 80, 40) for k in range(24)]
    score = make_score(notes, steady(2, is_compound=True))
    assert [chord.start for chord in chords_of(score.parts[0])] == [6 * k for k in range(24)]
    (part_measures,) = measures(to_musicxml(score))
    assert part_measures[0].findtext("attributes/time/beats") == "6"
    assert score.quarters_per_minute == 90


def test_a_first_note_before_the_first_bar_line_is_in_a_bar_of_its_own():
    notes = [Note(0.5, 0.9, 60, 80, 40), *tune()]
    score = make_score(notes, steady())
    assert chords_of(score.parts[0])[0].start == 3 * QUARTER + QUARTER // 2
    assert chords_of(score.parts[0])[1].start == 4 * QUARTER


def test_a_piano_has_two_staves_split_between_the_hands():
    low, high = [Note(1, 2, 40, 80), Note(1, 2, 47, 80)], [Note(1, 2, 64, 80), Note(1, 2, 72, 80)]
    (part,) = make_score([*low, *high], steady()).parts
    assert [[c.pitches for v in s.voices for c in v] for s in part.staves] == [
        [(64, 72)],
        [(40, 47)],
    ]


def test_a_note_held_under_others_is_a_second_voice():
    held = Note(1, 4.9, 48, 80, 40)
    moving = [Note(1 + k, 1.9 + k, 60 + k, 80, 40) for k in range(4)]
    (part,) = make_score([held, *moving], steady()).parts
    (upper, lower) = part.staves[0].voices
    assert [chord.pitches for chord in upper] == [(60,), (61,), (62,), (63,)]
    assert [(chord.start, chord.end) for chord in lower] == [(0, 47 - 47 % 3 + 3)]


@pytest.mark.parametrize(
    ("tonic", "mode", "fifths"),
    [(0, "major", 0), (2, "major", 2), (3, "major", -3), (9, "minor", 0)],
)
def test_the_key_of_a_scale_is_found(tonic, mode, fifths):
    steps = {"major": (0, 2, 4, 5, 7, 9, 11, 12), "minor": (0, 2, 3, 5, 7, 8, 11, 12)}[mode]
    chord = (0, 4, 7) if mode == "major" else (0, 3, 7)
    pitches = [*steps, *chord, *chord]
    notes = [Note(k, k + 1, 60 + tonic + step, 80) for k, step in enumerate(pitches)]
    assert find_key(notes) == (fifths, mode == "minor")


def test_pitches_are_named_as_their_key_has_them():
    names = {61: {4: ("C", 1, 4), -4: ("D", -1, 4)}, 71: {-6: ("C", -1, 5)}, 60: {7: ("B", 1, 3)}}
    for pitch, by_key in names.items():
        for fifths, name in by_key.items():
            assert spell(pitch, fifths) == name
    for fifths in range(-6, 7):
        for pitch in range(21, 109):
            step, alter, octave = spell(pitch, fifths)
            assert (
                12 * (octave + 1)
                + {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[step]
                + alter
                == pitch
            )


@pytest.mark.parametrize("suffix", [".musicxml", ".svg", ".pdf"])
def test_a_score_is_written_whole(tmp_path, suffix):
    if suffix != ".musicxml":
        pytest.importorskip("verovio")
    path = tmp_path / f"tune{suffix}"
    write_score([*tune(), *drums()], path, beats=steady(), title="A tune & more")
    heads = {".musicxml": b"<?xml", ".svg": b"<svg", ".pdf": b"%PDF"}
    assert path.read_bytes().lstrip().startswith(heads[suffix])
    if suffix == ".svg":
        assert "A tune &amp; more" in path.read_text()


@pytest.mark.parametrize(
    ("notes", "beats", "reason"), [([], steady(), "no notes"), (tune(), None, "state the tempo")]
)
def test_what_has_no_bars_is_refused_in_a_line(tmp_path, notes, beats, reason):
    with pytest.raises(ValueError, match=reason):
        write_score(notes, tmp_path / "a.musicxml", beats=beats)
    assert not list(tmp_path.iterdir())


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a score is a file named"):
        write_score(tune(), tmp_path / "a.png", beats=steady())


def test_musicxml_needs_no_optional_package(tmp_path, monkeypatch):
    monkeypatch.setattr(engraving, "require", lambda *names: 1 / 0)
    write_score(tune(), tmp_path / "a.musicxml", beats=steady())


MUSESCORE = shutil.which("musescore3") or shutil.which("mscore3") or shutil.which("mscore")


@pytest.mark.skipif(not MUSESCORE, reason="needs MuseScore (Debian: musescore3)")
@pytest.mark.parametrize("program", [0, 40, 43, 25, 33, 56, 60, 65, 66, 67, 71, 72, 13])
def test_musescore_plays_the_notes_of_the_score(tmp_path, program):
    notes = [
        n._replace(pitch=n.pitch - (24 if program in (33, 43, 67) else 0)) for n in tune(program)
    ]
    notes += drums()
    write_score(notes, tmp_path / "a.musicxml", beats=steady())
    subprocess.run(
        [MUSESCORE, "-o", tmp_path / "a.mid", tmp_path / "a.musicxml"],
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    got = sorted((n.is_drum, round(12 * n.onset), n.pitch) for n in read_midi(tmp_path / "a.mid"))
    score = make_score(notes, steady())
    assert got == sorted(
        (part.is_drum, chord.start, pitch)
        for part in score.parts
        for chord in chords_of(part)
        for pitch in chord.pitches
    )
