"""Scores -> files: MusicXML, and pages engraved by Verovio as SVG or PDF."""

from __future__ import annotations

import io
import os
import pathlib
import re
from collections.abc import Sequence

from mt3_keras.beats import Beats
from mt3_keras.extras import require
from mt3_keras.files import replacing
from mt3_keras.musicxml import to_musicxml
from mt3_keras.notes import Note
from mt3_keras.score import make_score

SUFFIXES = (".musicxml", ".svg", ".pdf")
# A4 in tenths of a millimetre, as Verovio counts; one SVG holds all systems, below each other.
_PAGE = {
    **{"pageWidth": 2100, "pageHeight": 2970, "pageMarginLeft": 150, "pageMarginRight": 80},
    **{"scale": 35, "footer": "none"},
}
_ONE_PAGE = {**_PAGE, "pageHeight": 60000, "adjustPageHeight": True}
# The note of a metronome mark is set in a font for music that few machines have.
_TEMPO_NOTE = re.compile(r'<tspan font-family="Leipzig" font-size="(\d+)px">([^<]*)</tspan>')
_TEMPO_DOT = "\uecb7"


def check_packages(suffixes: Sequence[str]) -> None:
    """Raises MissingPackageError if a file of one of these suffixes could not be written."""
    if {".svg", ".pdf"} & {*suffixes}:
        require("verovio")
    if ".pdf" in suffixes:
        require("cairosvg", "pypdf")


def write_score(
    notes: Sequence[Note],
    path: str | os.PathLike[str],
    *,
    beats: Beats | None,
    title: str = "",
) -> None:
    """Writes notes as sheet music; the file appears whole or not at all.

    Args:
      notes: in seconds, in any order.
      path: a file named .musicxml, .svg (all systems on one page) or .pdf (A4 pages).
      beats: of the notes; see `beat_tracker.track_beats`.
      title: above the music.

    Raises:
      ValueError: there are no beats to write bars by, or the suffix is another.
      MissingPackageError: the package [score] is not installed; .musicxml does not need it.
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a score is a file named {', '.join(SUFFIXES)}")
    check_packages([path.suffix])
    if not notes or beats is None:
        reason = "no beats are certain enough; state the tempo" if notes else "there are no notes"
        raise ValueError(f"{path}: no score is written, for {reason}")
    text = to_musicxml(make_score(notes, beats, title))
    if path.suffix == ".svg":
        content = _engrave(text, _ONE_PAGE)[0].encode()
    elif path.suffix == ".pdf":
        content = _to_pdf(_engrave(text, _PAGE))
    else:
        content = text.encode()
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _engrave(musicxml: str, options: dict[str, object]) -> list[str]:
    """The pages of a score, each an SVG."""
    import verovio

    verovio.enableLog(verovio.LOG_OFF)
    toolkit = verovio.toolkit()
    toolkit.setOptions(options)
    if not toolkit.loadData(musicxml):
        raise ValueError("Verovio cannot engrave this score")
    pages = [toolkit.renderToSVG(page) for page in range(1, toolkit.getPageCount() + 1)]
    return [_TEMPO_NOTE.sub(_plain_note, page) for page in pages]


def _plain_note(found: re.Match[str]) -> str:
    dot = "." if _TEMPO_DOT in found[2] else ""
    return f'<tspan font-size="{int(found[1]) * 3 // 4}px">\u2669{dot}</tspan>'


def _to_pdf(pages: Sequence[str]) -> bytes:
    import cairosvg
    from pypdf import PdfWriter

    writer = PdfWriter()
    for page in pages:
        writer.append(io.BytesIO(cairosvg.svg2pdf(bytestring=page.encode())))
    content = io.BytesIO()
    writer.write(content)
    return content.getvalue()
