"""Audio files and arrays -> blocks -> segments."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
import types
from collections.abc import Iterator
from typing import Literal

import librosa
import numpy as np
import pytest
import soundfile

from mt3_keras import audio, sound_files
from mt3_keras.containers import find_mpeg
from mt3_keras.segments import AudioError


@pytest.fixture(autouse=True)
def no_packaged_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # not installed


def noise(num_samples: int, num_channels: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    samples = np.clip(0.1 * rng.standard_normal((num_samples, num_channels)), -1, 1)
    return samples.astype(np.float32)


def read(path: pathlib.Path, block_seconds: float = 30.0) -> np.ndarray:
    return np.concatenate(list(audio.read_blocks(path, block_seconds)))


def refuse(path: pathlib.Path) -> str:
    """The message of the refusal: one line that begins with the file's name."""
    with pytest.raises(AudioError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def write(path: pathlib.Path, samples: np.ndarray, rate: int, **options: str) -> pathlib.Path:
    soundfile.write(path, samples, rate, **options)
    return path


def truncate(path: pathlib.Path, fraction: float = 0.5) -> pathlib.Path:
    contents = path.read_bytes()
    path.write_bytes(contents[: int(len(contents) * fraction)])
    return path


def write_wav(path: pathlib.Path, stated_bytes: int, payload: bytes) -> pathlib.Path:
    """16-bit 16 kHz mono, the data chunk's stated size apart from its real one."""
    riff_bytes = min(stated_bytes + 36, 2**32 - 1)
    header = struct.pack("<4sI4s4sI", b"RIFF", riff_bytes, b"WAVE", b"fmt ", 16)
    header += struct.pack("<HHIIHH4sI", 1, 1, 16000, 32000, 2, 16, b"data", stated_bytes)
    path.write_bytes(header + payload)
    return path


def without_length(mp3: pathlib.Path) -> pathlib.Path:
    """Removes the first frame of an MP3, which holds nothing but its length."""
    contents = mp3.read_bytes()
    assert b"Xing" in contents[:64]
    mp3.write_bytes(contents[contents.index(contents[:2], 64) :])
    return mp3


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("rate", "num_channels", "subtype"),
    [
        (16000, 1, "PCM_16"),
        (44100, 2, "PCM_16"),
        (48000, 1, "FLOAT"),
        (22050, 2, "PCM_24"),
        (8000, 1, "PCM_U8"),
        (192000, 2, "PCM_16"),
        (11025, 8, "PCM_16"),
    ],
)
def test_blocks_join_to_what_librosa_loads(
    tmp_path: pathlib.Path, rate: int, num_channels: int, subtype: str
) -> None:
    path = write(tmp_path / "a.wav", noise(2 * rate + 17, num_channels), rate, subtype=subtype)
    expected, _ = librosa.load(path, sr=16000, mono=True)
    for block_seconds in (0.1, 30.0):
        samples = read(path, block_seconds)
        assert samples.dtype == np.float32
        assert samples.shape == expected.shape
        np.testing.assert_allclose(samples, expected, atol=1e-6)


@pytest.mark.parametrize("suffix", [".mp3", ".ogg", ".flac"])
def test_compressed_stereo_is_what_librosa_loads(tmp_path: pathlib.Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", noise(44100, 2), 44100)
    expected, _ = librosa.load(path, sr=16000, mono=True)
    np.testing.assert_allclose(read(path, block_seconds=0.3), expected, atol=1e-6)
    assert audio.duration(path) == 1.0


@pytest.mark.parametrize("num_samples", [1, 2, 160, 441])
def test_shortest_files_have_the_length_librosa_gives(
    tmp_path: pathlib.Path, num_samples: int
) -> None:
    path = write(tmp_path / "a.wav", noise(num_samples), 44100)
    assert read(path).size == librosa.load(path, sr=16000)[0].size


def test_samples_at_16_khz_are_unchanged(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.wav", noise(40000), 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read(path, block_seconds=0.7), noise(40000)[:, 0])


def test_silence_is_read_as_zeros(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.wav", np.zeros((44100, 2)), 44100)
    np.testing.assert_array_equal(read(path), np.zeros(16000))


def test_memory_is_bounded_by_the_block(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.wav", np.zeros((160_000, 16), np.float32), 16000)
    tracemalloc.start()
    for _ in audio.read_blocks(path, block_seconds=0.5):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 8000 * 16 * 4  # 4 blocks; the file is 20


def test_blocks_of_many_channels_are_shorter(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.wav", np.zeros((4000, 8)), 16000)
    monkeypatch.setattr(sound_files, "MAX_VALUES_AT_ONCE", 8000)
    assert [block.size for block in audio.read_blocks(path)] == [1000] * 4


def test_duration_is_what_the_header_says(tmp_path: pathlib.Path) -> None:
    assert audio.duration(write(tmp_path / "a.wav", noise(22050), 44100)) == 0.5
    (tmp_path / "b.wav").write_text("not audio")
    assert audio.duration(tmp_path / "b.wav") is None
    assert audio.duration(tmp_path / "missing.wav") is None


# ---------------------------------------------------------------- MP3 without a stated length


@pytest.fixture
def quiet_after_loud_mp3(tmp_path: pathlib.Path) -> pathlib.Path:
    """3 s at a variable bit rate, high at first: a guess from the first frame is far too short."""
    samples = np.concatenate([3 * noise(44100, 2), np.zeros((88200, 2), np.float32)])
    return write(tmp_path / "a.mp3", samples, 44100)


def test_mp3_without_length_is_read_to_its_end(quiet_after_loud_mp3: pathlib.Path) -> None:
    path = without_length(quiet_after_loud_mp3)
    assert 3.0 <= read(path).size / 16000 <= 3.1  # the encoder's padding, no longer cut off
    assert audio.duration(path) == pytest.approx(read(path).size / 16000, abs=1e-3)


def test_truncated_mp3_without_length_is_read_as_far_as_it_goes(
    quiet_after_loud_mp3: pathlib.Path,
) -> None:
    path = without_length(quiet_after_loud_mp3)
    whole = read(path)
    part = read(truncate(path, 0.6))
    assert 0.5 * 16000 < part.size < 0.9 * whole.size
    np.testing.assert_allclose(part[:-1000], whole[: part.size - 1000], atol=1e-4)


def test_tags_around_mp3_change_nothing(quiet_after_loud_mp3: pathlib.Path) -> None:
    for path in (quiet_after_loud_mp3, without_length(quiet_after_loud_mp3)):
        expected = read(path)
        id3 = b"ID3\x03\0\0" + bytes([0, 10, 0, 5]) + b"x" * (10 * 128**2 + 5)
        ape = b"APETAGEX" + struct.pack("<III", 2000, 5000, 1) + bytes(8) + b"x" * 5000
        path.write_bytes(id3 + path.read_bytes() + ape + b"TAG" + b"x" * 125)
        np.testing.assert_array_equal(read(path), expected)
        path.write_bytes(path.read_bytes()[len(id3) : -len(ape) - 128])


def test_flac_without_length_is_read_to_its_end(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.flac", noise(40000), 16000)
    expected = read(path)
    contents = bytearray(path.read_bytes())
    contents[21] &= 0xF0  # the 36 bits that hold the number of samples; 0 is "unknown"
    contents[22:26] = bytes(4)
    path.write_bytes(contents)
    np.testing.assert_array_equal(read(path, block_seconds=1.0), expected)
    assert audio.duration(path) is None


# ---------------------------------------------------------------- bad files


def test_missing_folder_pipe_and_empty_are_refused(tmp_path: pathlib.Path) -> None:
    assert "no such file" in refuse(tmp_path / "missing.wav")
    assert "folder" in refuse(tmp_path)
    (tmp_path / "empty.wav").touch()
    assert "empty" in refuse(tmp_path / "empty.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    assert "not a regular file" in refuse(tmp_path / "pipe.wav")
    assert "cannot be read" in refuse(tmp_path / "empty.wav" / "a.wav")
    assert "cannot be read" in refuse(tmp_path / ("a" * 300 + ".wav"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_forbidden_file_is_refused(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.wav", noise(100), 16000)
    path.chmod(0)
    assert "cannot be read (Permission denied)" in refuse(path)


@pytest.mark.parametrize(
    "contents",
    [b"hello\n" * 100, "hello".encode("utf-16"), b"\xff", b"ID3", b"RIFF", bytes(10_000)],
)
def test_what_is_no_audio_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, contents: bytes
) -> None:
    monkeypatch.setenv("PATH", "")
    path = tmp_path / "a.wav"
    path.write_bytes(contents)
    assert "install ffmpeg or convert" in refuse(path)


def test_header_without_samples_is_refused(tmp_path: pathlib.Path) -> None:
    assert "no sound" in refuse(write_wav(tmp_path / "a.wav", 0, b""))
    assert "no sound" in refuse(write_wav(tmp_path / "b.wav", 0, bytes(9999)))
    assert "no sound" in refuse(write_wav(tmp_path / "c.wav", 9999, b""))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_not_finite_are_refused(tmp_path: pathlib.Path, bad: float) -> None:
    samples = noise(8000, 2)
    samples[4000, 1] = bad
    path = write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    assert "finite" in refuse(path) and "at 0.500 s" in refuse(path)


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.au", "a.w64", "a.rf64", "a.flac", "a.mp3"])
def test_truncated_file_is_refused(
    tmp_path: pathlib.Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = truncate(write(tmp_path / name, noise(88200, 2), 44100))
    assert "cut short" in refuse(path)
    assert capfd.readouterr().err == ""


def test_header_that_promises_a_little_more_is_read(tmp_path: pathlib.Path) -> None:
    path = write_wav(tmp_path / "a.wav", 32000, bytes(31999))
    assert read(path).size == 15999


@pytest.mark.parametrize("stated", [2**32 - 1, 2**32 - 37, 2**31 - 1, 2**31 - 48])
def test_wav_written_to_a_pipe_is_read_whole(tmp_path: pathlib.Path, stated: int) -> None:
    assert read(write_wav(tmp_path / "a.wav", stated, bytes(32000))).size == 16000


def test_damaged_mp3_is_refused_without_noise(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.mp3", noise(44100, 2), 44100)
    contents = bytearray(path.read_bytes())
    contents[8000:12000] = bytes(range(250)) * 16
    path.write_bytes(contents)
    assert "damaged" in refuse(path)
    assert capfd.readouterr() == ("", "")


def test_truncated_ogg_is_read_with_a_warning(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.ogg", noise(44100, 2), 44100)
    whole = read(path)
    assert not caplog.messages
    part = read(truncate(path))
    assert 0 < part.size < whole.size
    assert str(path) in caplog.text and "cut short" in caplog.text


def test_joined_files_are_read_whole_or_refused(tmp_path: pathlib.Path) -> None:
    mp3, other = (write(tmp_path / f"{rate}.mp3", noise(2 * rate), rate) for rate in (44100, 48000))
    once = read(mp3)
    mp3.write_bytes(2 * mp3.read_bytes())
    assert read(mp3).size == pytest.approx(2 * once.size, abs=2000)
    mp3.write_bytes(mp3.read_bytes() + other.read_bytes())
    assert "several recordings" in refuse(mp3)
    ogg = write(tmp_path / "a.ogg", noise(88200, 2), 44100)
    ogg.write_bytes(2 * ogg.read_bytes())
    assert "several recordings" in refuse(ogg)


# ---------------------------------------------------------------- ffmpeg


@pytest.fixture
def fake_ffmpeg(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """A folder on PATH; `script` files put there stand for ffmpeg."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    yield folder


def install(folder: pathlib.Path, body: str) -> None:
    """Puts a program `ffmpeg` in `folder` that can write a stereo AU stream of 48 kHz."""
    script = folder / "ffmpeg"
    script.write_text(
        f"#!{sys.executable} -IS\nimport os, struct, sys\nout = sys.stdout.buffer\n"
        "header = struct.pack('>4sIIIII', b'.snd', 24, 0xFFFFFFFF, 6, 48000, 2)\n"
        + textwrap.dedent(body)
    )
    script.chmod(0o755)


def test_other_formats_are_read_through_ffmpeg(
    tmp_path: pathlib.Path, fake_ffmpeg: pathlib.Path
) -> None:
    samples = noise(48000, 2)
    (tmp_path / "-a.m4a").write_bytes(samples.astype(">f4").tobytes())
    install(
        fake_ffmpeg,
        """
        path = sys.argv[sys.argv.index("-i") + 1].removeprefix("file:")
        out.write(header + open(path, "rb").read())
        """,
    )
    wav = write(tmp_path / "a.wav", samples, 48000, subtype="FLOAT")
    np.testing.assert_array_equal(read(tmp_path / "-a.m4a"), read(wav))
    assert audio.duration(tmp_path / "-a.m4a") is None


@pytest.mark.parametrize(
    "body",
    [
        "sys.exit('[mov @ 0x1] broken\\nmore')",
        "out.write(header + bytes(80000)); sys.exit('[mov @ 0x1] [aac @ 0x2] broken')",
        "out.write(header + bytes(80000)); sys.stderr.write('broken\\nended prematurely')",
        "out.write(b'broken' * 100000)",
        "out.write(header)",
        "",
    ],
)
def test_failing_ffmpeg_is_an_error(
    tmp_path: pathlib.Path, fake_ffmpeg: pathlib.Path, body: str
) -> None:
    (tmp_path / "a.m4a").write_bytes(b"?")
    install(fake_ffmpeg, body)
    message = refuse(tmp_path / "a.m4a")
    assert "(broken" in message or "no reason given" in message or "holds no sound" in message


def test_ffmpeg_is_ended_with_the_reading(
    tmp_path: pathlib.Path, fake_ffmpeg: pathlib.Path
) -> None:
    (tmp_path / "a.m4a").write_bytes(b"?")
    install(
        fake_ffmpeg,
        f"""
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        out.write(header)
        while True:
            out.write(bytes(2**16))
        """,
    )
    blocks = audio.read_blocks(tmp_path / "a.m4a", block_seconds=0.1)
    assert next(blocks).size
    with contextlib.closing(blocks):  # type: ignore[type-var]
        pass
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("ffmpeg still runs")


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the program ffmpeg")
def test_real_ffmpeg_reads_m4a_and_refuses_half_of_it(tmp_path: pathlib.Path) -> None:
    chirp = 0.3 * np.sin(2 * np.pi * 200 * (np.arange(88200) / 44100 + 1) ** 2)
    wav = write(tmp_path / "a.wav", chirp, 44100)
    m4a = tmp_path / "a.m4a"
    command = ["ffmpeg", "-v", "error", "-i", wav, "-b:a", "192k", "-movflags", "+faststart", m4a]
    subprocess.run([str(part) for part in command], check=True)
    samples = read(m4a)
    assert abs(samples.size - 32000) < 1000
    assert np.corrcoef(samples[:30000], read(wav)[:30000])[0, 1] > 0.9
    assert "ffmpeg cannot read all" in refuse(truncate(m4a))


# ---------------------------------------------------------------- never less than the file holds


def tone(num_samples: int, rate: int = 16000) -> np.ndarray:
    """A chirp with some noise: sound of which no part is like another."""
    time = np.arange(num_samples) / rate
    return 0.3 * np.sin(2 * np.pi * 200 * (time + 1) ** 1.5) + 0.1 * noise(num_samples)[:, 0]


@pytest.mark.parametrize(
    ("name", "at", "subtype", "order"),
    [
        ("a.wav", 40, "PCM_16", "little"),
        ("a.wav", 40, "PCM_24", "little"),
        ("a.wav", 40, "PCM_U8", "little"),
        ("a.au", 8, "FLOAT", "big"),
        ("a.au", 8, "ULAW", "big"),
        ("a.aiff", 42, "PCM_16", "big"),
    ],
)
@pytest.mark.parametrize("num_stated", [0, 9000])
def test_sound_that_a_header_understates_is_read(
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    at: int,
    subtype: str,
    order: Literal["little", "big"],
    num_stated: int,
) -> None:
    path = write(tmp_path / name, tone(32000), 16000, subtype=subtype)
    whole, contents = read(path), bytearray(path.read_bytes())
    assert not caplog.messages
    width, overhead = divmod(int.from_bytes(contents[at : at + 4], order), 32000)
    contents[at : at + 4] = (num_stated * width + overhead).to_bytes(4, order)
    path.write_bytes(contents)
    np.testing.assert_array_equal(read(path), whole)
    assert f"holds 2.0 s and not the {num_stated / 16000:.1f} s" in caplog.text


@pytest.mark.parametrize(
    "rest",
    [
        b"LIST" + struct.pack("<I", 40000) + b"x" * 40000,
        b"id3 " + struct.pack("<I", 40001) + b"x" * 40001,
        b"ID3" + b"x" * 40000,
        b"TAG" + b"x" * 40000,
        bytes(40000),
    ],
)
def test_what_follows_the_sound_and_is_none_is_not_read(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, rest: bytes
) -> None:
    path = write_wav(
        tmp_path / "a.wav", 32000, (tone(16000) * 20000).astype("<i2").tobytes() + rest
    )
    assert read(path).size == 16000
    assert not caplog.messages


@pytest.mark.parametrize("tag", [b"", b"ID3\x03\0\0\0\0\0\x05hello"])
def test_flac_that_states_too_little_or_too_much_is_read_or_refused(
    tmp_path: pathlib.Path, tag: bytes
) -> None:
    path = write(tmp_path / "a.flac", noise(160_000), 16000)
    whole, contents = read(path), path.read_bytes()
    for stated in (0, 1000, 80_000, 160_000):
        path.write_bytes(tag + contents[:22] + stated.to_bytes(4) + contents[26:])
        np.testing.assert_array_equal(read(path, block_seconds=3), whole)
    path.write_bytes(tag + contents[:22] + (200_000).to_bytes(4) + contents[26:])
    assert "holds 10.0 s of the 12.5 s" in refuse(path)


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("AVR", "PCM_16"),
        ("MAT4", "FLOAT"),
        ("MAT5", "PCM_16"),
        ("MPC2K", "PCM_16"),
        ("NIST", "PCM_16"),
        ("SVX", "PCM_16"),
        ("VOC", "PCM_16"),
        ("WVE", "ALAW"),
        ("CAF", "PCM_16"),
    ],
)
def test_truncated_files_of_rare_formats_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, kind: str, subtype: str
) -> None:
    monkeypatch.setenv("PATH", "")
    rate = 8000 if kind == "WVE" else 16000
    path = write(tmp_path / "a.bin", noise(16000), rate, format=kind, subtype=subtype)
    assert read(path).size in (16000, 32000)
    refuse(truncate(path))


@pytest.mark.parametrize("rate", [0, 1, 7, 3_000_000, 2**31 - 1])
def test_sample_rates_that_no_recording_has_are_refused(tmp_path: pathlib.Path, rate: int) -> None:
    path = write(tmp_path / "a.wav", noise(1000), 16000)
    contents = path.read_bytes()
    path.write_bytes(contents[:24] + struct.pack("<I", rate) + contents[28:])
    assert f"{rate} Hz" in refuse(path) or rate in (0, 2**31 - 1)


def frame_length(mp3: bytes) -> int:
    return mp3.index(mp3[:2], 2)


@pytest.fixture
def mp3(tmp_path: pathlib.Path) -> pathlib.Path:
    """3 s of constant bit rate and no stated length."""
    path = tmp_path / "a.mp3"
    with soundfile.SoundFile(path, "w", 44100, 1, bitrate_mode="CONSTANT") as file:
        file.write(tone(3 * 44100, 44100))
    return without_length(path)


ID3 = b"ID3\x04\0\x10" + bytes([0, 0, 78, 16]) + b"x" * 10_000  # 10 + 10,000 + a footer of 10
FOOTER = b"3DI\x04\0\x10" + bytes([0, 0, 78, 16])
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 5032, 1, 1 << 29) + bytes(8) + b"x" * 5032


@pytest.mark.parametrize("tag", [ID3 + FOOTER, APE, b"TAG" + bytes(125), b"TAG+" + bytes(223)])
def test_tags_may_stand_anywhere_in_mp3(
    mp3: pathlib.Path, caplog: pytest.LogCaptureFixture, tag: bytes
) -> None:
    whole, contents = read(mp3), mp3.read_bytes()
    middle = contents.index(contents[:2], len(contents) // 2)
    for at in (0, middle, len(contents)):
        mp3.write_bytes(contents[:at] + tag + contents[at:])
        np.testing.assert_array_equal(read(mp3), whole)
    assert not caplog.messages


@pytest.mark.parametrize("num_stated", [1, 30, 2**32 - 1])
def test_mp3_is_not_read_to_the_length_that_it_states(
    tmp_path: pathlib.Path, num_stated: int
) -> None:
    path = write(tmp_path / "a.mp3", noise(3 * 44100), 44100)
    whole, contents = read(path), path.read_bytes()
    at = contents.index(b"Xing") + 8
    path.write_bytes(contents[:at] + num_stated.to_bytes(4) + contents[at + 4 :])
    if num_stated < 2**32 - 1:
        np.testing.assert_array_equal(read(path), whole)
    else:
        assert "cut short" in refuse(path)


def test_mp3_after_zeros_or_within_a_frame_is_read(
    mp3: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    whole, contents = read(mp3), mp3.read_bytes()
    mp3.write_bytes(bytes(100_000) + contents)
    np.testing.assert_array_equal(read(mp3), whole)
    mp3.write_bytes(contents[100:])  # the frame that is left of is not heard
    assert whole.size - 2 * 1152 < read(mp3).size < whole.size
    assert not caplog.messages


def test_mp3_with_a_hole_is_read_around_it_and_says_so(
    mp3: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, contents = read(mp3), mp3.read_bytes()
    third = len(contents) // 3
    mp3.write_bytes(contents[:third] + bytes(third) + contents[2 * third :])
    assert read(mp3).size == pytest.approx(2 / 3 * whole.size, abs=1500)
    assert "a.mp3: is damaged: about 1.0 s of it cannot be read, from 1.0 s on" in caplog.text


def test_mp3_that_ends_within_a_frame_says_so(
    mp3: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    mp3.write_bytes(mp3.read_bytes()[:-100])
    read(mp3)
    assert "a.mp3: ends within a frame" in caplog.text


@pytest.mark.parametrize(
    ("header", "length", "samples"),
    [
        ("fffb9064", 417, 1152 / 44100),  # MPEG 1 layer III, 128 kbit/s
        ("fffb9264", 418, 1152 / 44100),  # padded
        ("fffda404", 576, 1152 / 48000),  # MPEG 1 layer II, 192 kbit/s
        ("ffff8800", 384, 384 / 32000),  # MPEG 1 layer I, 256 kbit/s
        ("fff38464", 192, 576 / 24000),  # MPEG 2 layer III, 64 kbit/s
        ("ffe34864", 288, 576 / 8000),  # MPEG 2.5 layer III, 32 kbit/s
    ],
)
def test_frames_of_all_layers_are_found(
    tmp_path: pathlib.Path, header: str, length: int, samples: float
) -> None:
    frame = bytes.fromhex(header).ljust(length, b"\0")
    (tmp_path / "a.mp3").write_bytes(5 * frame)
    with (tmp_path / "a.mp3").open("rb") as file:
        found = find_mpeg(file.fileno())
    assert found is not None
    assert found.parts == [(0, 5 * length)] and found.seconds == pytest.approx(5 * samples)


def ogg(path: pathlib.Path, subtype: str) -> list[bytes]:
    """Writes 4 s and returns the pages."""
    with soundfile.SoundFile(path, "w", 48000, 1, format="OGG", subtype=subtype) as file:
        for part in np.split(tone(4 * 48000, 48000), 16):
            file.write(part)
    return [b"OggS" + page for page in path.read_bytes().split(b"OggS")[1:]]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_lost_pages_of_ogg_are_told(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, subtype: str
) -> None:
    path = tmp_path / "a.ogg"
    pages = ogg(path, subtype)
    whole = read(path)
    first = next(i for i, page in enumerate(pages) if page[6:14] != bytes(8))
    assert not caplog.messages and len(pages) > first + 3
    for index in (first, first + 1, len(pages) - 2):
        damaged = bytearray(pages[index])
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(b"".join([*pages[:index], damaged, *pages[index + 1 :]]))
        assert "damaged in 1 places" in refuse(path)
    path.write_bytes(b"".join(pages[: first + 1] + pages[first + 2 :]))
    assert "damaged in 1 places, first after" in refuse(path)
    path.write_bytes(b"".join(pages) + b"TAG" + bytes(125))
    np.testing.assert_array_equal(read(path), whole)
    assert not caplog.messages
    path.write_bytes(b"".join(pages)[:-100])
    assert read(path).size < whole.size
    assert "lacks the mark of an Ogg file's end" in caplog.text


# ---------------------------------------------------------------- sound that is hard to transcribe


def test_channels_that_cancel_give_one_of_them(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = tone(32000).astype(np.float32)
    path = write(tmp_path / "a.wav", np.stack([left, -left], 1), 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read(path, 0.7), left)
    assert caplog.text.count("cancel each other (opposite phase): channel 1 alone") == 1
    caplog.clear()
    for other in (0 * left, left, 0.5 * left, -0.5 * left, noise(32000)[:, 0]):
        both = np.stack([left, other], 1)
        path = write(tmp_path / "b.wav", both, 16000, subtype="FLOAT")
        np.testing.assert_allclose(read(path), both.mean(1), atol=1e-6)
    path = write(tmp_path / "c.wav", noise(8000, 32), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read(path), noise(8000, 32).mean(1), atol=1e-6)
    assert not caplog.messages


@pytest.mark.parametrize(("scale", "bits"), [(2**15, 16), (2**23, 24), (2**31, 32)])
def test_integers_in_floating_point_are_scaled(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, scale: int, bits: int
) -> None:
    samples = tone(32000).astype(np.float32)
    samples[:16000] *= 1e-3  # quiet at first
    path = write(tmp_path / "a.wav", samples * scale, 16000, subtype="FLOAT")
    np.testing.assert_allclose(read(path, 0.5), samples, atol=1e-6)
    assert f"read as integers of {bits} bits" in caplog.text
    caplog.clear()
    path = write(tmp_path / "b.wav", 4 * samples, 16000, subtype="FLOAT")  # merely loud
    np.testing.assert_array_equal(read(path), 4 * samples)
    assert not caplog.messages


def test_integers_that_fill_little_of_their_width_are_told(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(write(tmp_path / "a.wav", tone(32000) / 2**16, 16000, subtype="PCM_32"))
    assert "is all but silent (-106 dB)" in caplog.text


@pytest.mark.parametrize(
    ("rate", "limit_hz", "suffix"),
    [(8000, 4000, ".wav"), (44100, 3400, ".wav"), (44100, 5500, ".flac"), (11025, 5512, ".mp3")],
)
def test_narrow_bands_are_told(
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    rate: int,
    limit_hz: int,
    suffix: str,
) -> None:
    spectrum = np.fft.rfft(noise(2 * rate)[:, 0])
    spectrum[2 * limit_hz :] = 0
    read(write(tmp_path / f"a{suffix}", np.fft.irfft(spectrum), rate))
    assert "(telephone, low bit rate): drums are missed" in caplog.text
    stated = float(caplog.text.partition("nothing above ")[2].partition(" kHz")[0])
    assert stated == pytest.approx(limit_hz / 1000, abs=0.6)


def test_full_bands_silence_and_rests_are_not_told(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rate in (16000, 22050, 44100):
        sound = noise(2 * rate)
        sound[rate:] = 0
        read(write(tmp_path / "a.wav", sound, rate))
        read(write(tmp_path / "b.mp3", sound, rate))
    read(write(tmp_path / "c.wav", np.zeros(32000), 16000))
    assert not caplog.messages


# ---------------------------------------------------------------- a player's time

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the program ffmpeg")


def ffmpeg(*arguments: object) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True)


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov", "a.ts"])
def test_sound_that_begins_after_the_picture_is_read_in_its_time(
    tmp_path: pathlib.Path, name: str
) -> None:
    sound = tone(32000)
    sound[:100] = 0.9
    wav = write(tmp_path / "a.wav", sound, 16000)
    picture = ["-f", "lavfi", "-i", "color=size=16x16:rate=10:duration=4"]
    late = ["-itsoffset", "1.5", "-i", wav]
    ffmpeg(*picture, *late, "-map", "0:v", "-map", "1:a", "-c:a", "aac", tmp_path / name)
    heard = read(tmp_path / name)
    assert np.abs(heard[:22000]).max() < 0.01
    first = int(np.argmax(np.abs(heard) > 0.1))
    assert first == pytest.approx(1.5 * 16000, abs=800)


@needs_ffmpeg
def test_a_video_without_sound_is_told_as_such(tmp_path: pathlib.Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "color=size=16x16:duration=1", tmp_path / "a.mp4")
    assert "holds no sound" in refuse(tmp_path / "a.mp4")


@needs_ffmpeg
def test_a_pause_of_the_stream_is_silence(tmp_path: pathlib.Path) -> None:
    wav = write(tmp_path / "a.wav", tone(32000), 16000)
    jump = "asetpts=PTS+gte(T\\,1)*2/TB"
    ffmpeg("-i", wav, "-af", jump, "-c:a", "libvorbis", tmp_path / "a.mka")
    heard = read(tmp_path / "a.mka")
    assert heard.size == pytest.approx(4 * 16000, abs=1600)
    assert np.abs(heard[18000:46000]).max() < 0.01 < np.abs(heard[50000:60000]).max()


@needs_ffmpeg
def test_a_time_far_off_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound_files, "MAX_PAUSE_SECONDS", 50.0)
    wav = write(tmp_path / "a.wav", tone(32000), 16000)
    jump = "asetpts=PTS+gte(T\\,1)*100/TB"
    ffmpeg("-i", wav, "-af", jump, "-c:a", "libvorbis", tmp_path / "a.mka")
    assert "is silent for an hour" in refuse(tmp_path / "a.mka")


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.mka", "a.webm", "a.wma", "a.avi"])
def test_cut_files_of_ffmpeg_are_refused_or_told(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    wav = write(tmp_path / "a.wav", tone(8 * 16000), 16000)
    ffmpeg("-i", wav, "-ar", "48000", "-b:a", "128k", tmp_path / name)
    whole = read(tmp_path / name)
    assert not caplog.messages
    with contextlib.suppress(AudioError):
        assert read(truncate(tmp_path / name)).size < whole.size
        assert name in caplog.text and "s that the file states" in caplog.text


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[matroska @ 0x1] [error] a broken element", r"may be damaged \(a broken element\)"),
        ("[info]   Duration: 00:01:30.50, start: 0", r"ends after 1\.0 s, of 90\.5 s"),
        ("[info]   Duration: 00:00:01.20, start: 0\n[warning] hm", None),
        ("[info]   Duration: N/A", None),
    ],
)
def test_what_ffmpeg_says_is_handed_on(
    tmp_path: pathlib.Path,
    fake_ffmpeg: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    said: str,
    told: str | None,
) -> None:
    (tmp_path / "a.m4a").write_bytes(b"?")
    install(fake_ffmpeg, f"out.write(header + bytes(8 * 48000)); sys.stderr.write({said!r})")
    assert read(tmp_path / "a.m4a").size == 16000
    assert bool(told) == bool(caplog.messages) and re.search(told or "", caplog.text)


def test_a_file_shorter_than_it_states_is_refused_before_ffmpeg(
    tmp_path: pathlib.Path, fake_ffmpeg: pathlib.Path
) -> None:
    install(fake_ffmpeg, "out.write(header + bytes(8 * 48000))")
    (tmp_path / "a.avi").write_bytes(b"RIFF" + struct.pack("<I", 9992) + b"AVI " + bytes(988))
    assert "holds 1000 of the 10000 bytes" in refuse(tmp_path / "a.avi")
    guid = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
    (tmp_path / "a.wma").write_bytes(bytes(30) + guid + bytes(24) + struct.pack("<Q", 10000))
    assert "of the 10000 bytes" in refuse(tmp_path / "a.wma")


def test_the_ffmpeg_of_a_package_serves_where_none_is_installed(
    tmp_path: pathlib.Path, fake_ffmpeg: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.m4a").write_bytes(b"?")
    assert "pip install imageio-ffmpeg" in refuse(tmp_path / "a.m4a")
    install(fake_ffmpeg, "out.write(header + bytes(8 * 48000))")
    monkeypatch.setenv("PATH", "")
    package = types.SimpleNamespace(get_ffmpeg_exe=lambda: str(fake_ffmpeg / "ffmpeg"))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", package)
    assert read(tmp_path / "a.m4a").size == 16000


# ---------------------------------------------------------------- damaged

NUM_MUTATIONS = int(os.environ.get("MT3_FUZZ", "12"))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "b.wav"])
def test_damaged_files_are_read_or_refused_in_a_line(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.setenv("PATH", "")
    path = write(tmp_path / name, tone(44100, 22050), 22050)
    if name == "b.wav":
        path = write(path, noise(22050, 2), 22050, subtype="FLOAT")
    whole, size = path.read_bytes(), read(path).size
    for seed in range(NUM_MUTATIONS):
        rng, contents = random.Random(seed), bytearray(whole)
        at, length = rng.randrange(len(contents)), rng.randint(1, 600)
        if rng.random() < 0.4:
            at = rng.randrange(200)  # headers
        kind = rng.randrange(5)
        if kind == 0:
            contents[at : at + length] = rng.randbytes(length)
        elif kind == 1:
            del contents[at : at + length]
        elif kind == 2:
            contents[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            contents[at:at] = contents[at : at + length]
        else:
            del contents[at + 1 :]
        path.write_bytes(contents)
        caplog.clear()
        start = time.process_time()
        try:
            is_whole = read(path).size > size - 6000  # what MP3 may leave out as padding
        except AudioError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            # A WAV file's rate, width and channels may be others and look no worse.
            assert is_whole or caplog.messages or name.endswith(".wav"), seed
        assert time.process_time() - start < 20, seed
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- finding


@pytest.fixture
def music(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    for name in ("b.mp3", "a.WAV", "deep/er/c.flac", "deep/notes.txt", ".hidden/d.wav", "._e.mp3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "song [live].ogg").touch()
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given_paths", "found"),
    [
        (["b.mp3", "a.WAV"], ["b.mp3", "a.WAV"]),
        (["."], ["a.WAV", "b.mp3", "deep/er/c.flac", "song [live].ogg"]),
        (["deep"], ["deep/er/c.flac"]),
        (["deep/notes.txt"], ["deep/notes.txt"]),
        (["*.mp3"], ["b.mp3"]),
        (["**/*.flac"], ["deep/er/c.flac"]),
        (["d*"], ["deep/er/c.flac"]),
        (["song [live].ogg"], ["song [live].ogg"]),
        (
            ["b.mp3", ".", "./deep/../b.mp3"],
            ["b.mp3", "a.WAV", "deep/er/c.flac", "song [live].ogg"],
        ),
        ([], []),
    ],
)
def test_files_folders_and_patterns_are_found(
    music: pathlib.Path, given_paths: list[str], found: list[str]
) -> None:
    assert audio.find_audio(given_paths) == [pathlib.Path(name) for name in found]
    absolute = [str(music / path) for path in given_paths]
    assert [path.name for path in audio.find_audio(absolute)] == [
        pathlib.Path(name).name for name in found
    ]


@pytest.mark.parametrize("name", ["missing.mp3", "*.xyz", "nothing", ""])
def test_what_is_not_there_is_refused_by_name(music: pathlib.Path, name: str) -> None:
    with pytest.raises(AudioError, match="^" + name.replace("*", r"\*") + ": no "):
        audio.find_audio(["b.mp3", name])
