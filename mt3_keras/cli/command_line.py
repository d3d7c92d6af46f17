"""How every command starts and ends: its flags, its help, and errors as one line."""

from __future__ import annotations

import importlib
import io
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from absl import flags

from mt3_keras.extras import MissingPackageError, explain_import_error, require
from mt3_keras.process import (
    OutputClosed,
    Terminated,
    any_streams,
    ending_on_signals,
    ignore_matplotlib_backend,
    printable,
)

_OWN_PACKAGES = ("mt3_keras", "train", "export", "benchmarks", "__main__")  # python -m ...


class UsageError(ValueError):
    """A command line that cannot be followed."""


class Flags:
    """Adds flags to a command line, each by its name, its default and what it means.

    Args:
      values: what the flags are added to, and hold once the command line is read.
    """

    def __init__(self, values: flags.FlagValues) -> None:
        self.values = values

    def text(self, name: str, default: str | None, meaning: str, *, required: bool = False) -> None:
        """Any text."""
        flags.DEFINE_string(name, default, meaning, flag_values=self.values, required=required)

    def texts(
        self, name: str, default: list[str] | None, meaning: str, *, required: bool = False
    ) -> None:
        """Texts, by a flag that may be repeated."""
        flags.DEFINE_multi_string(
            name, default, meaning, flag_values=self.values, required=required
        )

    def names(
        self, name: str, default: list[str] | None, meaning: str, *, required: bool = False
    ) -> None:
        """Texts, separated by commas."""
        flags.DEFINE_list(name, default, meaning, flag_values=self.values, required=required)

    def choice(self, name: str, default: str | None, choices: Iterable[str], meaning: str) -> None:
        """One of several names."""
        flags.DEFINE_enum(name, default, [*choices], meaning, flag_values=self.values)

    def switch(self, name: str, default: bool, meaning: str) -> None:
        """On or off: --name or --noname."""
        flags.DEFINE_boolean(name, default, meaning, flag_values=self.values)

    def count(
        self,
        name: str,
        default: int | None,
        meaning: str,
        *,
        least: int | None = 1,
        most: int | None = None,
    ) -> None:
        """A whole number, without bounds where they are None."""
        flags.DEFINE_integer(name, default, meaning, least, most, flag_values=self.values)

    def number(
        self, name: str, default: float | None, meaning: str, *, least: float | None = None
    ) -> None:
        """Any number."""
        flags.DEFINE_float(name, default, meaning, least, flag_values=self.values)


class Command(NamedTuple):
    """What a command line does.

    Attributes:
      usage: what follows the command's name, such as "FILE ... [FLAGS]".
      text: what it does; the first line is its summary.
      define: adds the flags.
      work: does it, given the flags and arguments; returns the exit code, None as 0.
      takes_arguments: whether there may be arguments that are no flags.
      packages: optional packages (see `extras`) without which no work is begun.
      passes_on: whether what follows `--` are flags of a library, given to `work` as a third list.
    """

    usage: str
    text: str
    define: Callable[[Flags], None]
    work: Callable[..., int | None]
    takes_arguments: bool = False
    packages: tuple[str, ...] = ()
    passes_on: bool = False


def run(program: str, command: Command | str, argv: Sequence[str]) -> int:
    """Runs a command: help, flags, and errors as one line on standard error.

    Args:
      program: its name: a module such as "train.main", or a console command such as "mt3".
      command: the command, or the module that holds it as `COMMAND`, imported here.
      argv: arguments without the program's name.

    Returns:
      The exit code: 0 done, 1 something failed, 2 wrong usage (UsageError), 3 an optional package
      is missing, 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP. With --debug in `argv`,
      whatever failed is raised.
    """
    with any_streams(), ending_on_signals():
        return _run(program, command, argv)


def _run(program: str, command: Command | str, argv: Sequence[str]) -> int:
    ignore_matplotlib_backend()
    try:
        found = _import_command(command) if isinstance(command, str) else command
        code = _work(program, found, argv)
        sys.stdout.flush()
        return code
    except OutputClosed:
        return 0
    except MissingPackageError as error:
        return complain(program, str(error), 3)
    except (UsageError, flags.Error) as error:
        line = " ".join(str(error).split())
        return complain(program, f"{line}\nSee {_to_typed(program)} --help.", 2)
    except KeyboardInterrupt as stopped:
        code = 128 + stopped.number if isinstance(stopped, Terminated) else 130
        return complain(program, str(stopped) or "stopped", code)
    except Exception as error:
        if "--debug" in argv:
            raise
        if isinstance(error, ImportError) and (explained := explain_import_error(error)):
            return complain(program, str(explained), 3)
        return complain(program, describe_error(error), 1)


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
    with any_streams(), ending_on_signals():
        return _run_subcommand(program, package, summaries, version, argv)


def _run_subcommand(
    program: str, package: str, summaries: Mapping[str, str], version: str, argv: Sequence[str]
) -> int:
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
    return _run(f"{program} {name}", f"{package}.{name}", argv[1:])


def _import_command(module: str) -> Command:
    command: Command = importlib.import_module(module).COMMAND
    return command


def _work(program: str, command: Command, argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    add = Flags(values)
    add.text("flagfile", "", "Reads further flags from this file.")
    add.switch("debug", False, "Show where in the code an error arose.")
    command.define(add)
    if any(argument in ("-h", "--help", "-help") for argument in argv):
        print(f"usage: {_to_typed(program)} {command.usage}\n\n{command.text.strip()}\n")
        print(_describe_flags(values))
        return 0
    foreign: list[str] = []
    if command.passes_on and "--" in argv:
        argv, foreign = argv[: argv.index("--")], list(argv[argv.index("--") + 1 :])
    arguments = values([program, *map(_expand_home, argv)])[1:]
    if arguments and not command.takes_arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}")
    require(*command.packages)
    return command.work(values, arguments, *[foreign] * command.passes_on) or 0


def check_names(flag: str, names: Iterable[str], known: Collection[str]) -> None:
    """Checks that a list of a flag holds known names only.

    Args:
      flag: its name.
      names: those that were given.
      known: those that there are.

    Raises:
      UsageError: one of them is unknown.
    """
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--{flag} must be of {', '.join(known)}: got {', '.join(unknown)}")


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


def _expand_home(argument: str) -> str:
    """Puts the home folder for the ~ that a shell leaves, as in --output_dir=~/music."""
    name, equals, value = (
        argument.partition("=") if argument.startswith("-") else ("", "", argument)
    )
    is_home = value.startswith("~/") and not os.path.lexists(value)
    return f"{name}{equals}{os.path.expanduser(value)}" if is_home else argument  # noqa: PTH111


def describe_error(error: Exception) -> str:
    """One line for whatever was raised: what is wrong, with which file, and the cure.

    Errors of the library say so themselves. Of others it is said which file our code was at.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    is_own = type(error) is ValueError or type(error).__module__.partition(".")[0] in _OWN_PACKAGES
    if is_own and text:
        return text
    path = _find_path(error)
    place = f"{path}: " if path and path not in text else ""
    if isinstance(error, MemoryError):
        return f"{place}needs more memory than there is; end other programs, or is it damaged?"
    if isinstance(error, OSError):
        return place + (error.strerror or text or type(error).__name__)
    what = type(error).__name__ + (f": {text}" if text else "")
    return f"{place}{what[:300]}; is a file damaged or foreign? --debug shows where it arose"


def _find_path(error: Exception) -> str | None:
    """The file that the innermost of our functions was at, of those that an error passed."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _OWN_PACKAGES:
            continue
        for value in frame.f_locals.values():
            if isinstance(value, pathlib.PurePath):
                found = str(value)
            elif isinstance(value, io.IOBase):
                name = getattr(value, "name", None)
                found = name if isinstance(name, str) else found
    return found


def complain(program: str, message: str, code: int) -> int:
    """Prints what is wrong on standard error; returns `code`."""
    lines = map(printable, f"{program.split()[0]}: {message}".split("\n"))
    print("\n".join(lines), file=sys.stderr)
    return code
