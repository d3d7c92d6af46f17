"""The program ffmpeg, which reads what libsndfile cannot (M4A, WMA, video): its call, its log."""

from __future__ import annotations

import logging
import pathlib
import re
import shutil

from mt3_keras.segments import AudioError

TOLERATED_EARLY_END = 2.0  # seconds; of a video's sound, or where a duration is an estimate
_logger = logging.getLogger(__name__)


def ffmpeg_command(path: pathlib.Path, head: bytes, refusal: str) -> list[str]:
    """The command that writes the first audio stream, at its own rate and channels, as AU.

    Args:
      path: the file.
      head: its first 200 bytes.
      refusal: why libsndfile cannot read it.

    Raises:
      AudioError: ffmpeg is not installed.
    """
    program = _find_ffmpeg()
    if program is None:
        raise AudioError(
            f"{path}: is not audio that can be read here ({refusal}); if it is M4A, AAC, WMA or"
            " video, pip install imageio-ffmpeg, or install ffmpeg or convert it to WAV"
        )
    # Silence where the sound begins late or pauses: times are then those of a player. AU, for it
    # states rate and channels before the samples and needs no length. Only local files: a playlist
    # must not make this read from a network.
    command = [program, "-nostdin", "-hide_banner", "-nostats", "-v", "level+info", "-xerror"]
    command += ["-protocol_whitelist", "file,pipe", "-i", f"file:{path}", "-map", "0:a:0"]
    command += ["-af", "aresample=async=1:first_pts=0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    if _is_broadcast(head):  # time counts from the first stream in use: pictures are copied nowhere
        command += ["-map", "0:a:0", "-map", "0:v?", "-c", "copy", "-f", "null", "-"]
    return command


def _find_ffmpeg() -> str | None:
    """The program on PATH, or that of the package imageio-ffmpeg."""
    if program := shutil.which("ffmpeg"):
        return program
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


def _is_broadcast(head: bytes) -> bool:
    """Whether a file is an MPEG program stream or transport stream, with times or without."""
    packs = ((0, 188), (4, 196))
    return head[:4] == b"\0\0\1\xba" or any(
        head[a : a + 1] == head[b : b + 1] == b"G" for a, b in packs
    )


def check_log(log: str, is_failure: bool, held: float, path: pathlib.Path) -> None:
    """Raises or warns by what ffmpeg said of a file of which it gave `held` seconds."""
    errors = re.findall(r"^(?:\[[^]]*\] )*\[(?:error|fatal|panic)\] (.*)$", log, re.M)
    if "matches no streams" in log:
        raise AudioError(f"{path}: holds no sound; check that it is the right file")
    if is_failure or "ended prematurely" in log:  # cut short, to ffmpeg no failure
        lines = errors or [line for line in log.splitlines() if not line.startswith("[info]")]
        complaint = re.sub(r"^(\[[^]]*\] )+", "", lines[0]) if lines else "no reason given"
        raise AudioError(
            f"{path}: ffmpeg cannot read all of it as audio ({complaint});"
            " copy or download it again, or convert it to WAV"
        )
    if errors:
        text = "%s: may be damaged (%s); sound may be missing from what was read, %.1f s"
        _logger.warning(text, path, errors[0], held)
    elif found := re.search(r"Duration: (\d+):(\d+):([\d.]+)", log):
        hours, minutes, seconds = map(float, found.groups())
        stated = 3600 * hours + 60 * minutes + seconds
        if stated - held > TOLERATED_EARLY_END:
            text = "%s: its sound ends after %.1f s, of %.1f s that the file states"
            _logger.warning(text, path, held, stated)
