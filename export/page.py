"""Adds a model to the folder of the web page: `model/model.tflite` and `model/model.json`.

    python -m export.page --model small --out_dir build/web

`make web` runs it after the page itself has been built; see docs/page.md.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import pretty_midi
from absl import flags

from mt3_keras import __version__
from mt3_keras.cli.command_line import Command, Flags, UsageError, run
from mt3_keras.engines.litert import read_bundle_config
from mt3_keras.files import replacing
from mt3_keras.instrument_names import instrument_name
from mt3_keras.models.catalog import find_preset
from mt3_keras.models.config import LOWEST_DRUM, NUM_DRUMS, SAMPLE_RATE_HZ, DetectorConfig
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.plots import DRUM_COLOR, part_color


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (see `mt3_keras.cli.command_line.run`)."""
    command = Command("--out_dir=DIR [--model=MODEL]", __doc__, _define_flags, _write)
    return run("export.page", command, argv)


def _define_flags(add: Flags) -> None:
    add.text("model", "small", "The bundle of a detector: its name or folder.")
    add.text("out_dir", None, "Folder of the page.")


def _write(values: flags.FlagValues, _: list[str]) -> None:
    if not values.out_dir:
        raise UsageError("--out_dir is needed: the folder of the page")
    bundle = find_preset(values.model)
    config = read_bundle_config(bundle)
    if not isinstance(config, DetectorConfig):
        raise UsageError(f"{values.model}: the page runs networks that predict rolls, as small")
    facts = describe_model(bundle.resolve().name, config, RollDecoding.read(bundle))
    folder = pathlib.Path(values.out_dir) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.tflite") as path:
        shutil.copyfile(bundle / "model.tflite", path)
    with replacing(folder / "model.json") as path:
        path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {folder}")


def describe_model(name: str, config: DetectorConfig, decoding: RollDecoding) -> dict[str, Any]:
    """What the page has to know: sizes, limits, names and colors (`ModelFacts` in notes.ts)."""
    drums = range(LOWEST_DRUM, LOWEST_DRUM + NUM_DRUMS)
    return {
        "name": name,
        "version": __version__,
        "sampleRate": SAMPLE_RATE_HZ,
        "inputSamples": config.input_samples,
        "leadSamples": config.lead_samples,
        "segmentFrames": config.network.segment_frames,
        "hopSamples": config.spectrogram.hop_samples,
        "reading": dataclasses.asdict(decoding),
        "programs": [instrument_name(program, False) for program in range(128)],
        "colors": [part_color(program, False) for program in range(128)],
        "drumColor": DRUM_COLOR,
        "drums": {key: pretty_midi.note_number_to_drum_name(key) for key in drums},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
