"""Exports a model: a SavedModel for TF Serving, a bundle for LiteRT, a preset for Keras.

    python -m export.main --model small --out_dir edge --formats saved_model,tflite --quantize int8

The SavedModel is a new version in OUT_DIR/saved_model/NAME, with settings for the server beside it;
how it cuts and searches segments is what the flags of `python -m mt3_keras transcribe` say. The
bundle, model.tflite and config.json, is OUT_DIR itself. A preset, config.json and weights in
float16, is OUT_DIR too, and may be a bundle at the same time.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from mt3_keras.cli.command_line import Command, Flags, UsageError, check_names, run
from mt3_keras.cli.model_flags import define_model_flags, load_transcriber
from mt3_keras.extras import require

if TYPE_CHECKING:
    from mt3_keras.transcriber import Transcriber

FORMATS = ("saved_model", "tflite", "preset")
QUANTIZE = ("none", "float16", "int8", "int8_weights")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (see `mt3_keras.cli.command_line.run`)."""
    command = Command("--model=MODEL --out_dir=DIR [FLAGS]", __doc__, _define_flags, _export)
    return run("export.main", command, argv)


def _define_flags(add: Flags) -> None:
    define_model_flags(add)
    add.text("out_dir", None, "Folder to write to.")
    add.names("formats", ["saved_model"], f"Of {', '.join(FORMATS)}.")
    add.text("name", None, "Of the served model; by default its folder's name.")
    add.switch(
        "encoded_audio",
        False,
        "Have the served graph decode FLAC, OGG and MP3 too; the server needs tensorflow-io.",
    )
    add.choice(
        "quantize",
        "none",
        QUANTIZE,
        "Of the bundle: int8 computes in int8, int8_weights only stores it.",
    )
    add.switch("report", False, "Print the bundle's size, operators and agreement with Keras.")


def _export(values: flags.FlagValues, _: list[str]) -> None:
    if not values.out_dir:
        raise UsageError("--out_dir is needed: a folder to write to")
    check_names("formats", values.formats, FORMATS)
    if values.least_confidence is not None:
        raise UsageError("--least_confidence is for transcribing: an exported model keeps its own")
    if values.search == "beam1" or values.engine == "litert":
        raise UsageError("an exported model searches greedily: drop --search and --engine")
    if "saved_model" in values.formats:
        require("tensorflow_serving")
    if values.encoded_audio:
        if "saved_model" not in values.formats:
            raise UsageError("--encoded_audio is of served graphs: give --formats=saved_model")
        require("tensorflow_io")
    values["engine"].value = "keras"
    transcriber = load_transcriber(values)
    folder = pathlib.Path(values.out_dir)
    if "saved_model" in values.formats:
        _export_saved_model(transcriber, folder, values)
    if "tflite" in values.formats:
        from export.tflite import export_bundle, report

        export_bundle(transcriber.model, folder, values.quantize, transcriber.decoding)
        print(f"wrote {folder}")
        if values.report:
            print(report(folder, transcriber.model))
    if "preset" in values.formats:
        from mt3_keras.models.loading import save_half_preset

        save_half_preset(transcriber.model, folder)
        print(f"wrote {folder}")


def _export_saved_model(
    transcriber: Transcriber, folder: pathlib.Path, values: flags.FlagValues
) -> None:
    from export.saved_model import export_saved_model
    from export.served_model import ServedDetector, ServedModel
    from mt3_keras.models.config import DetectorConfig

    options: dict[str, Any] = {
        "context": transcriber.context,
        "rules": transcriber.rules,
        "batch_size": values.batch_size or 16,
    }
    if values.encoded_audio:
        from mt3_keras.graph_codecs import decode_audio

        options["decode"] = decode_audio
    served: Any
    if isinstance(transcriber.model_config, DetectorConfig):
        served = ServedDetector(transcriber.model, **options, decoding=transcriber.decoding)
    else:
        served = ServedModel(transcriber.model, **options, max_tokens=values.max_tokens)
    name = values.name or pathlib.Path(values.model or "small").resolve().name
    written = export_saved_model(served, folder / "saved_model", name=name, exact=values.exact)
    print(f"wrote {written}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
