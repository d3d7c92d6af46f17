"""Audio files and arrays -> blocks -> segments."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Iterator

import librosa
import numpy as np
import pytest
import soundfile

from mt3_keras import audio
from mt3_keras.segments import AudioError


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
    monkeypatch.setattr(audio, "MAX_VALUES_AT_ONCE", 8000)
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


@pytest.mark.parametrize("suffix", [".mp3", ".ogg"])
def test_joined_files_are_refused(tmp_path: pathlib.Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", noise(88200, 2), 44100)
    path.write_bytes(2 * path.read_bytes())
    assert "several recordings" in refuse(path)


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
