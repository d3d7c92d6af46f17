"""Writes the official weights as a preset.

A T5X checkpoint loads by its folder as well; a preset loads faster and can be passed on to Keras.
"""

from __future__ import annotations

from absl import flags

from mt3_keras.cli.command_line import Command, Flags, UsageError
from mt3_keras.process import load_keras


def _define_flags(add: Flags) -> None:
    add.text("t5x_checkpoint", None, "Folder of the checkpoint.")
    add.text("output", None, "Preset folder to write.")


def _convert(values: flags.FlagValues, _: list[str]) -> None:
    if not values.t5x_checkpoint or not values.output:
        raise UsageError("--t5x_checkpoint and --output are both needed")
    load_keras()
    from mt3_keras.models.loading import convert_t5x

    convert_t5x(values.t5x_checkpoint, values.output)
    print(f"wrote {values.output}")


COMMAND = Command("--t5x_checkpoint DIR --output DIR", __doc__, _define_flags, _convert)
