"""Songs as separated stems: what names allow, merging, and what is said of broken ones."""

from __future__ import annotations

import dataclasses

import mido
import numpy as np
import pytest
import soundfile

from mt3_keras.__main__ import main
from mt3_keras.audio import AudioError
from mt3_keras.midi import read_instruments, read_midi
from mt3_keras.notes import Note
from mt3_keras.recording import Transcription
from mt3_keras.stems import MAX_STEMS, Stem, StemTranscriber, find_stems, merge, read_name
from mt3_keras.transcriber import Transcriber
from tests.conftest import tones

BASSES, VOICES = frozenset(range(32, 40)), frozenset(range(52, 55))
ALL = frozenset(range(128))


def write_song(folder, names, seconds=5.0):
    folder.mkdir()
    for seed, name in enumerate(names):
        soundfile.write(folder / f"{name}.wav", 0.5 * tones(seconds, seed), 16_000)
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("drums", (frozenset(), True)),
        ("07_Kick-In", (frozenset(), True)),
        ("bass", (BASSES, False)),
        ("Bass Guitar DI", (BASSES, False)),
        ("bass drum", (frozenset(), True)),
        ("Bass Song_(Vocals)_model", (VOICES, False)),
        ("gtr L", (frozenset(range(24, 32)), False)),
        ("Violin", (frozenset({40}), False)),
        ("reed", (frozenset(range(64, 72)), False)),
        ("other", None),
        ("S00", None),
        ("бас", None),
    ],
)
def test_a_name_says_what_its_stem_may_hold(name, expected):
    assert read_name(name) == expected


def test_a_stem_whose_name_says_nothing_holds_what_no_other_name_says(tmp_path):
    song = write_song(tmp_path / "song", ["drums", "bass", "vocals", "other"], 0.1)
    found = {stem.name: (stem.programs, stem.drums) for stem in find_stems(song)}
    assert found == {
        "bass": (BASSES, False),
        "drums": (frozenset(), True),
        "other": (ALL - BASSES - VOICES, False),
        "vocals": (VOICES, False),
    }
    numbered = find_stems(write_song(tmp_path / "numbered", ["1", "2"], 0.1))
    assert [(stem.programs, stem.drums) for stem in numbered] == [(ALL, True)] * 2


def test_the_mix_of_the_stems_is_left_out(tmp_path, caplog):
    song = write_song(tmp_path / "song", ["mixture", "bass"], 0.1)
    assert [stem.name for stem in find_stems(song)] == ["bass"]
    assert "mixture.wav: is taken for the mix of the others" in caplog.text
    alone = write_song(tmp_path / "alone", ["mix"], 0.1)
    assert [stem.name for stem in find_stems(alone)] == ["mix"]


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    folder = tmp_path_factory.mktemp("songs") / "song.v2"
    return write_song(folder, ["drums", "bass", "vocals", "Ключи"])


def test_each_stem_is_transcribed_under_what_its_name_allows(song):
    transcriber = Transcriber.from_preset("small", engine="litert", least_confidence=0.05)
    result = StemTranscriber(transcriber).transcribe(song)
    expected = []
    for stem in find_stems(song):
        rules = dataclasses.replace(transcriber.rules, programs=stem.programs, drums=stem.drums)
        notes = transcriber.with_rules(rules).transcribe(stem.path).notes
        assert all(note.is_drum == (stem.name == "drums") for note in notes)
        expected += [(note.onset, note.pitch, stem.name) for note in notes]
    found = [(n.onset, n.pitch, result.track_names[n].split(":")[0]) for n in result.notes]
    assert sorted(found) == sorted(expected)
    allowed = {stem.name: stem.programs for stem in find_stems(song)}
    for note in result.notes:
        assert note.is_drum or note.program in allowed[result.track_names[note].split(":")[0]]
    assert {name for _, _, name in found} >= {"bass", "Ключи"}


def test_networks_that_emit_tokens_keep_to_names_too(tiny_bundle, song):
    from mt3_keras.grammar import Rules

    transcriber = Transcriber(tiny_bundle, rules=Rules(constrained=True), max_tokens=40)
    result = StemTranscriber(transcriber).transcribe(song)
    of_stem = {"bass": BASSES, "vocals": VOICES}
    for note in result.notes:
        name = result.track_names[note].split(":")[0]
        assert note.is_drum if name == "drums" else note.program in of_stem.get(name, ALL)
    assert len(result.segments) == 4 * 3


def test_notes_are_merged_and_named(tmp_path):
    first, second = Note(0, 1, 60, 90, 24), Note(1, 2, 64, 90, 27)
    guitars = frozenset(range(24, 32))

    def found(*notes):
        return Transcription(list(notes), [], 1, 2, 3.0, dict.fromkeys(notes, 0.5))

    left = Stem(tmp_path / "gtr L.wav", guitars, False)
    right = Stem(tmp_path / "gtr R.wav", guitars, False)
    voice = Stem(tmp_path / "vox.wav", VOICES, False)
    sung = Note(0.5, 1, 72, 90, 48)
    result = merge([left, right, voice], [found(second, first), found(first), found(sung)])
    fitted = sung._replace(program=52)
    assert result.notes == [first, fitted, second]
    assert result.track_names == {
        first: "gtr L: Acoustic Guitar (nylon)",
        second: "gtr L: Electric Guitar (clean)",
        fitted: "vox",
    }
    assert result.confidences == dict.fromkeys(result.notes, 0.5)
    assert (result.invalid_events, result.dropped_events, result.duration) == (3, 6, 3.0)


def test_the_command_writes_one_file_with_the_names_of_the_stems(song, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["transcribe", f"--stems={song}", f"--output_dir={out}", "--least_confidence=0.05"]
    assert main([*command, "--formats=mid,csv", "--engine=litert"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["song.v2.csv", "song.v2.mid"]
    assert "song.v2: " in capsys.readouterr().out
    tracks = {part.name.split(":")[0] for part in read_instruments(out / "song.v2.mid")}
    assert {"bass", "Ключи"} <= tracks <= {"drums", "bass", "vocals", "Ключи"}
    assert mido.MidiFile(out / "song.v2.mid", charset="utf-8").tracks[1].name in tracks
    assert main([*command, "--resume", "--formats=mid", "--engine=litert"]) == 0
    assert "all done before" in capsys.readouterr().err


def test_stems_may_differ_in_rate_and_length_and_be_silent(tmp_path, caplog):
    song = write_song(tmp_path / "song", ["bass"], 4.0)
    high = np.repeat(tones(2.0), 3)[:, None].repeat(2, axis=1)
    soundfile.write(song / "keys.flac", 0.3 * high, 48_000)
    soundfile.write(song / "drums.wav", np.zeros(16_000), 16_000)
    transcriber = Transcriber.from_preset("small", engine="litert", least_confidence=0.05)
    reports, ends = [], []
    result = StemTranscriber(transcriber).transcribe(
        song, on_segment=reports.append, on_progress=ends.append
    )
    assert ends == [report.end for report in reports] == pytest.approx([4, 5, 7], abs=0.1)
    assert result.duration == pytest.approx(4.0, abs=0.05)
    assert not any(note.is_drum for note in result.notes)
    assert caplog.text.count("its stems end at different times") == 1
    assert "bass.wav 4.0 s, drums.wav 1.0 s" in caplog.text


def make_broken(kind, folder):
    if kind == "missing folder":
        return folder
    write_song(folder, ["bass"], 0.5)
    broken = folder / "drums.wav"
    if kind == "text":
        broken.write_text("These are the drums.\n" * 50)
    elif kind == "no samples":
        soundfile.write(broken, np.zeros(0), 16_000)
    elif kind == "missing file":
        broken.symlink_to(folder / "moved away.wav")
    elif kind == "too many":
        for i in range(MAX_STEMS):
            soundfile.write(folder / f"{i}.wav", np.zeros(10), 16_000)
    elif kind == "no audio":
        (folder / "bass.wav").rename(folder / "bass.txt")
    return folder


BROKEN = {
    "missing folder": "no such folder",
    "text": "drums.wav: ",
    "no samples": "drums.wav: holds no sound",
    "missing file": "drums.wav: ",
    "too many": f"holds {MAX_STEMS + 1} stems, at most {MAX_STEMS}",
    "no audio": "no audio file in this folder",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_song_is_one_line_and_no_file(kind, tmp_path, capsys):
    folder = make_broken(kind, tmp_path / "song")
    command = ["transcribe", f"--stems={folder}", f"--output_dir={tmp_path / 'out'}"]
    assert main([*command, "--engine=litert", "--noprogress"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert str(folder) in lines[0] and BROKEN[kind] in lines[0]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--formats=jsonl"], "put together at the end"),
        (["--output_dir=-"], "put together at the end"),
        (["--exact"], "drop --stems"),
        (["more.wav"], "drop more.wav"),
    ],
)
def test_what_has_no_meaning_for_stems_is_refused(flags, error, song, capsys):
    assert main(["transcribe", f"--stems={song}", *flags]) == 2
    assert error in capsys.readouterr().err


def test_the_exact_path_takes_no_stems(tiny_model):
    with pytest.raises(ValueError, match="stems are searched by rules"):
        StemTranscriber(Transcriber(tiny_model, exact=True))


def test_a_folder_without_stems_is_an_error_of_audio(tmp_path):
    with pytest.raises(AudioError, match="no audio file"):
        find_stems(tmp_path)


def test_a_midi_file_keeps_names_apart_of_one_instrument(tmp_path):
    first, second = Note(0, 1, 60, 90, 24), Note(0, 1, 64, 90, 24)
    result = Transcription([first, second], [], 0, 0, 1.0, track_names={first: "L", second: "R"})
    result.write_midi(tmp_path / "song.mid")
    assert [part.name for part in read_instruments(tmp_path / "song.mid")] == ["L", "R"]
    for found, note in zip(read_midi(tmp_path / "song.mid"), (first, second), strict=True):
        assert found[:2] == pytest.approx(note[:2], abs=1e-3) and found[2:] == note[2:]
