"""Notes played to a file: when they sound, and beside the recording."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import soundfile

from mt3_keras import __main__
from mt3_keras.notes import Note
from mt3_keras.synth import listen
from mt3_keras.synth.sounds import open_font, play_font

NOTES = [Note(0.5, 1.0, 69, 100), Note(1.5, 1.51, 38, 90, is_drum=True), Note(2.0, 2.5, 69, 30, 40)]


@pytest.fixture(scope="module")
def font(shared) -> str:
    path = shared / "data" / "train" / "TimGM6mb.sf3"
    if importlib.util.find_spec("tinysoundfont") is None or not path.is_file():
        pytest.skip("needs tinysoundfont and the soundfont of the shared data")
    return str(path)


def test_notes_sound_from_their_onsets_on(font, tmp_path):
    listen.write_sound(NOTES, tmp_path / "notes.wav", font=font, duration=4.0)
    sound, rate = soundfile.read(tmp_path / "notes.wav")
    assert (sound.shape, rate) == ((4 * 44_100,), 44_100)
    loud = np.abs(sound) > 0.01
    assert not loud[: round(0.499 * rate)].any()
    for note in NOTES:
        since = round(note.onset * rate)
        assert loud[since : since + round(0.05 * rate)].any(), note
    assert np.abs(sound).max() == pytest.approx(listen.PEAK, abs=1e-3)


def test_blocks_join_without_a_break(font):
    whole, parts = (
        np.concatenate([*play_font(open_font(font, 8000), NOTES, 24_000, 8000, size)])
        for size in (24_000, 1777)
    )
    assert parts == pytest.approx(whole, abs=0.02)  # an envelope moves on at borders


def test_the_recording_is_on_the_left_as_loud_as_the_notes_on_the_right(font, tmp_path):
    time = np.arange(32_000) / 16_000
    soundfile.write(tmp_path / "a.wav", 0.3 * np.sin(2 * np.pi * 300 * time), 16_000)
    listen.write_sound(NOTES, tmp_path / "b.wav", font=font, beside=tmp_path / "a.wav")
    sound, rate = soundfile.read(tmp_path / "b.wav")
    left, right = sound.T
    level = np.sqrt(np.mean(sound**2, axis=0))
    assert level[0] == pytest.approx(level[1], rel=0.01)
    spectrum = np.abs(np.fft.rfft(left[:rate]))
    assert spectrum.argmax() == 300  # Hz
    assert not left[round(2.1 * rate) :].any() and right[round(2.1 * rate) :].any()


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--compare"], 2, "--compare is for WAV files: add wav to --formats"),
        (["--font", "x.sf2"], 2, "--font is for WAV files: add wav to --formats"),
        (["--formats", "wav", "--font", "x.sf2"], 1, "x.sf2: no such soundfont"),
    ],
)
def test_what_cannot_be_played_is_refused_before_any_work(
    arguments, code, line, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(100), 8000)
    assert __main__.main(["transcribe", str(path), *arguments]) == code
    assert line in capsys.readouterr().err


def test_a_recording_is_never_overwritten(font, tmp_path, capsys):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(100), 8000)
    before = path.read_bytes()
    arguments = ["--formats", "wav", "--font", font, "--output_dir", str(tmp_path)]
    assert __main__.main(["transcribe", str(path), *arguments]) == 2
    assert "is a recording and would be overwritten" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_without_the_player_one_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(100), 8000)
    assert __main__.main(["transcribe", str(path), "--formats", "wav"]) == 3
    assert "pip install --no-deps tinysoundfont" in capsys.readouterr().err
