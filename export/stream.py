"""`mt3 stream` by the name it had before."""

import sys
from collections.abc import Sequence

from mt3_keras.cli.command_line import run


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (see `mt3_keras.cli.command_line.run`)."""
    return run("export.stream", "mt3_keras.cli.stream", argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
