"""Examples -> a folder of FLAC and MIDI files with `manifest.json`, that `train.evaluate` reads."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from mt3_keras.data.example import describe
from mt3_keras.files import replacing
from mt3_keras.midi import write_midi
from mt3_keras.models.config import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from mt3_keras.data.shards import Source


def write_clips(
    sources: Sequence[Source], out_dir: str, *, name: str, kind: str
) -> Iterator[dict[str, Any]]:
    """Writes examples one by one, and the manifest of those that could be used in the end.

    Args:
      sources: of the examples.
      out_dir: folder of the clips, made if missing.
      name: first word of the ids, before the number of instruments.
      kind: "real" or "rendered".

    Yields:
      What the manifest says of each example, or its "id" and why it was "left_out".

    Raises:
      ValueError: none could be used, or the folder cannot be written.
    """
    folder, items = pathlib.Path(out_dir), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            try:
                samples, notes = source.load()
                if not isinstance(samples, np.ndarray):
                    samples = np.concatenate(list(samples))
            except (ValueError, OSError) as error:
                yield {"id": source.id, "left_out": describe(error)}
                continue
            instruments = sorted({(note.is_drum, note.program) for note in notes})
            stem = f"{name}_{len(instruments)}parts_{source.id.replace('/', '-')}"
            soundfile.write(folder / f"{stem}.flac", samples, SAMPLE_RATE_HZ, subtype="PCM_16")
            write_midi(notes, folder / f"{stem}.mid")
            item = {
                "id": stem,
                "kind": kind,
                "audio": f"{stem}.flac",
                "midi": f"{stem}.mid",
                "seconds": round(len(samples) / SAMPLE_RATE_HZ, 3),
                "programs": [program for is_drum, program in instruments if not is_drum],
                "drums": any(is_drum for is_drum, _ in instruments),
            }
            items.append(item)
            yield item
        if not items:
            raise ValueError(f"{out_dir}: none of {len(sources)} examples could be used")
        with replacing(folder / "manifest.json") as temporary:
            temporary.write_text(json.dumps({"items": items}, indent=1) + "\n")
    except (OSError, soundfile.LibsndfileError) as error:
        raise ValueError(f"{out_dir}: cannot be written ({describe(error)})") from error
