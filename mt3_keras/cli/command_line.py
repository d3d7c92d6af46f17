"""How every command starts and ends: its flags, its help, and errors as one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from absl import flags

from mt3_keras.extras import MissingPackageError, explain_import_error, require
from mt3_keras.process import ignore_matplotlib_backend, open_closed_streams


class UsageError(ValueError):
    """A command line that cannot be followed."""


class Command(NamedTuple):
    """What a command line does.

    Attributes:
      usage: what follows the command's name, such as "FILE ... [FLAGS]".
      text: what it does; the first line is its summary.
      define: adds the flags.
      work: does it, given the flags and arguments; returns the exit code, None as 0.
      takes_arguments: whether there may be arguments that are no flags.
      packages: optional packages (see `extras`) without which no work is begun.
    """

    usage: str
    text: str
    define: Callable[[flags.FlagValues], None]
    work: Callable[[flags.FlagValues, list[str]], int | None]
    takes_arguments: bool = False
    packages: tuple[str, ...] = ()


def run(program: str, command: Command | str, argv: Sequence[str]) -> int:
    """Runs a command: help, flags, and errors as one line on standard error.

    Args:
      program: its name: a module such as "train.main", or a console command such as "mt3".
      command: the command, or the module that holds it as `COMMAND`, imported here.
      argv: arguments without the program's name.

    Returns:
      The exit code: 0 done, 1 something failed (ValueError, OSError), 2 wrong usage (UsageError),
      3 an optional package is missing, 130 stopped by Ctrl-C.
    """
    open_closed_streams()
    ignore_matplotlib_backend()
    try:
        found = _import_command(command) if isinstance(command, str) else command
        code = _work(program, found, argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as by `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:
        if explained := explain_import_error(error):
            return complain(program, str(explained), 3)
        raise
    except MissingPackageError as error:
        return complain(program, str(error), 3)
    except (UsageError, flags.Error) as error:
        return complain(program, f"{error}\nSee {_to_typed(program)} --help.", 2)
    except (ValueError, OSError) as error:  # those of the library say the cure
        return complain(program, _to_line(error), 1)
    except KeyboardInterrupt as stopped:
        return complain(program, str(stopped) or "stopped", 130)


def run_subcommand(
    program: str, package: str, summaries: Mapping[str, str], version: str, argv: Sequence[str]
) -> int:
    """Runs the command that the first argument names.

    Args:
      program: see `run`.
      package: holds a module for each command, which is imported when it is run.
      summaries: name of each command -> the first line of its text.
      version: what --version prints.
      argv: arguments without the program's name.

    Returns:
      The exit code (see `run`).
    """
    open_closed_streams()
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "-help", "help"):
        print(f"usage: {program} COMMAND [FLAGS] ...\n")
        for command, summary in summaries.items():
            print(f"  {command:12} {summary}")
        print(
            f"\n{program} COMMAND --help lists the flags of a command; --version prints {version}."
        )
        return 0 if argv else 2
    if name == "--version":
        print(f"{program} {version}")
        return 0
    if name not in summaries:
        return complain(program, f"unknown command {name!r}: use {', '.join(summaries)}", 2)
    return run(f"{program} {name}", f"{package}.{name}", argv[1:])


def _import_command(module: str) -> Command:
    command: Command = importlib.import_module(module).COMMAND
    return command


def _work(program: str, command: Command, argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string("flagfile", "", "Reads further flags from this file.", flag_values=values)
    command.define(values)
    if any(argument in ("-h", "--help", "-help") for argument in argv):
        print(f"usage: {_to_typed(program)} {command.usage}\n\n{command.text.strip()}\n")
        print(_describe_flags(values))
        return 0
    arguments = values([program, *argv])[1:]
    if arguments and not command.takes_arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}")
    require(*command.packages)
    return command.work(values, arguments) or 0


def _to_typed(program: str) -> str:
    """How a program is started: modules have a dot in their names, console commands none."""
    return f"python -m {program}" if "." in program else program


def _describe_flags(values: flags.FlagValues) -> str:
    """One paragraph a flag: its name, default and meaning."""
    lines = []
    for name in sorted(set(values) - {"undefok"}):
        flag = values[name]
        default = "" if flag.default in (None, "", []) else f" (default {flag.default_as_str})"
        switch = f"--[no]{name}" if flag.boolean else f"--{name}"
        lines += [f"  {switch}", f"      {flag.help}{default}"]
    return "\n".join(lines)


def _to_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def complain(program: str, message: str, code: int) -> int:
    """Prints what is wrong on standard error; returns `code`."""
    print(f"{program.split()[0]}: {message}", file=sys.stderr)
    return code
