"""The command `mt3`, which `python -m mt3_keras` equals."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mt3_keras import __version__
from mt3_keras.cli.command_line import run_subcommand

# Each is a module of `mt3_keras.cli` that holds a `Command` named COMMAND.
COMMANDS = {
    "transcribe": "Writes the notes of recordings as MIDI, tables, pictures, scores and sound.",
    "archive": "Transcribes an archive of recordings on all cores or on a cluster.",
    "stream": "Shows the notes of a recording, or of the microphone, while it plays.",
    "serve": "Opens the web page, which transcribes in the browser.",
    "client": "Transcribes a recording on a model server.",
    "evaluate": "Scores two MIDI files, or two folders of them.",
    "convert": "Writes the official weights as a preset.",
    "instruments": "Lists the names that transcribe --instruments knows.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: arguments without the program's name; by default those of the process.

    Returns:
      The exit code (see `mt3_keras.cli.command_line.run`).
    """
    arguments = sys.argv[1:] if argv is None else argv
    return run_subcommand("mt3", "mt3_keras.cli", COMMANDS, __version__, arguments)


def __getattr__(name: str) -> object:
    """What the first version held here, for scripts that import it from its old place."""
    if name == "_plan_outputs":
        from mt3_keras.cli.transcribe import plan_outputs

        return plan_outputs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
