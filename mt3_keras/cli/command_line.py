"""What the commands share: how they start and end, and loading a model from flags."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from mt3_keras.quiet import quiet_stderr

if TYPE_CHECKING:
    from mt3_keras.grammar import Rules
    from mt3_keras.transcriber import Transcriber


class UsageError(ValueError):
    """A command line that cannot be followed."""


class Command(NamedTuple):
    """What a command line does.

    Attributes:
      usage: what follows the command's name, such as "FILE ... [FLAGS]".
      text: what it does; the first line stands in the list of commands.
      define: adds the flags.
      work: does it, given the flags and arguments; returns the exit code, None as 0.
      takes_arguments: whether there may be arguments that are no flags.
    """

    usage: str
    text: str
    define: Callable[[flags.FlagValues], None]
    work: Callable[[flags.FlagValues, list[str]], int | None]
    takes_arguments: bool = False


def run(program: str, command: Command | Mapping[str, Command], argv: Sequence[str]) -> int:
    """Runs `python -m program`: help, flags, and errors as one line on standard error.

    Args:
      program: as Python's -m takes it, such as "train.main".
      command: what to run; several by name if the first argument names one of them.
      argv: arguments without the program's name.

    Returns:
      The exit code: 0 done, 1 something failed (ValueError, OSError), 2 wrong usage (UsageError),
      130 stopped by Ctrl-C.
    """
    try:
        if isinstance(command, Mapping):
            code = _run_named(program, command, argv)
        else:
            code = _work(program, command, argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as by `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, flags.Error) as error:
        return complain(program, f"{error}\nSee python -m {program} --help.", 2)
    except (ValueError, OSError) as error:  # those of the library say the cure
        return complain(program, _to_line(error), 1)
    except KeyboardInterrupt as stopped:
        return complain(program, str(stopped) or "stopped", 130)


def _run_named(program: str, commands: Mapping[str, Command], argv: Sequence[str]) -> int:
    if not argv or _asks_for_help(argv[:1]) or argv[0] == "help":
        print(f"usage: python -m {program} COMMAND [FLAGS] ...\n")
        for name, command in commands.items():
            print(f"  {name:12} {command.text.strip().splitlines()[0]}")
        print(f"\npython -m {program} COMMAND --help lists the flags of a command.")
        return 0 if argv else 2
    if argv[0] not in commands:
        return complain(program, f"unknown command {argv[0]!r}: use {', '.join(commands)}", 2)
    return run(f"{program} {argv[0]}", commands[argv[0]], argv[1:])


def _work(program: str, command: Command, argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string("flagfile", "", "Reads further flags from this file.", flag_values=values)
    command.define(values)
    if _asks_for_help(argv):
        print(f"usage: python -m {program} {command.usage}\n\n{command.text.strip()}\n")
        print(_describe_flags(values))
        return 0
    arguments = values([program, *argv])[1:]
    if arguments and not command.takes_arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}")
    return command.work(values, arguments) or 0


def _asks_for_help(argv: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help", "-help") for argument in argv)


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
    """Says on standard error what is wrong; returns `code`."""
    print(f"{program.split()[0]}: {message}", file=sys.stderr)
    return code


def define_model_flags(values: flags.FlagValues) -> None:
    """Adds the flags that `load_transcriber` reads."""

    def text(name: str, meaning: str) -> None:
        flags.DEFINE_string(name, None, meaning, flag_values=values)

    def switch(name: str, default: bool, meaning: str) -> None:
        flags.DEFINE_boolean(name, default, meaning, flag_values=values)

    def choice(name: str, default: str | None, names: Sequence[str], meaning: str) -> None:
        flags.DEFINE_enum(name, default, names, meaning, flag_values=values)

    def count(name: str, default: int | None, meaning: str) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)

    text("model", "A shipped model's name, a preset folder or a T5X checkpoint folder.")
    define_rule_flags(values)
    switch("exact", False, "The original's path to the token; no other decoding flag beside it.")
    choice(
        "context",
        None,
        ["segment", "full"],
        "What the last frames of a segment see: zeros, or the audio that follows (default).",
    )
    choice(
        "log_floor",
        None,
        ["zero", "clamp"],
        "How silence enters the logarithm; by default as the model says.",
    )
    choice(
        "search",
        None,
        ["greedy", "beam1"],
        "How tokens are searched: greedily (default), or by the original's beam search of one beam "
        "with brevity 0.6.",
    )
    choice("engine", "auto", ["auto", "keras", "litert"], "What runs the network.")
    count("batch_size", None, "Segments decoded side by side; by default what the engine likes.")
    count("max_tokens", None, "Longest token sequence of a segment; by default the model's own.")
    flags.DEFINE_float(
        "least_confidence",
        None,
        "Confidence that a note of small needs, 0 to 1; by default it follows the music.",
        flag_values=values,
    )
    count("threads", None, "Processor cores to use; by default all.")


def define_rule_flags(values: flags.FlagValues) -> None:
    """Adds the flags that `parse_rules` reads."""
    flags.DEFINE_string(
        "instruments",
        None,
        "Only these: General MIDI names, classes or numbers, and drums.",
        flag_values=values,
    )
    for name, default, meaning in (
        (
            "constrained",
            False,
            "Allow only tokens that are legal where they stand.",
        ),
        ("stop_runaways", True, "End segments that emit tokens without getting ahead in time."),
    ):
        flags.DEFINE_boolean(name, default, meaning, flag_values=values)


def parse_rules(values: flags.FlagValues) -> Rules:
    """What the search may write, by the flags.

    Raises:
      ValueError: an instrument is unknown.
    """
    from mt3_keras.grammar import Rules
    from mt3_keras.midi import parse_instruments

    programs, drums = parse_instruments(values.instruments) if values.instruments else (None, True)
    return Rules(
        programs=programs,
        drums=drums,
        constrained=values.constrained,
        stop_runaways=values.stop_runaways,
    )


def load_transcriber(values: flags.FlagValues) -> Transcriber:
    """Loads the model that the flags name, and Keras if it is to run it.

    Raises:
      UsageError: flags contradict each other.
      ValueError: the model cannot be found or read.
    """
    options = _decoding_options(values)
    limit_threads(values.threads)
    if values.instruments or values.constrained or not values.stop_runaways:
        options["rules"] = parse_rules(values)
    from mt3_keras.transcriber import Transcriber

    with _loading_tensorflow():
        return Transcriber.from_preset(values.model or "small", **options)


def _decoding_options(values: flags.FlagValues) -> dict[str, Any]:
    options: dict[str, Any] = {"batch_size": values.batch_size, "engine": values.engine}
    if not values.exact:
        return options | {
            "context": values.context,
            "log_floor": values.log_floor,
            "method": values.search,
            "max_tokens": values.max_tokens,
            "least_confidence": values.least_confidence,
        }
    names = (
        "context",
        "log_floor",
        "instruments",
        "max_tokens",
        "constrained",
        "search",
        "least_confidence",
    )
    if chosen := [name for name in names if values[name].using_default_value is False]:
        raise UsageError(f"--exact is the original's path: drop --{', --'.join(chosen)}")
    return options | {"exact": True}


def limit_threads(threads: int | None) -> None:
    """Keeps this process to a number of cores; to be called before TensorFlow is loaded."""
    if threads is None:
        return
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(threads)
    if hasattr(os, "sched_setaffinity"):  # every backend obeys it, where the system has it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def keep_freed_memory() -> None:
    """Has glibc keep what large tensors free for the next step; other C libraries are left alone.

    By default it hands each to the system and asks for it anew: on two cores with AVX2 40 % of a
    step of `small` went into page faults. Its own variables of the environment still come first.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never
        mallopt(top_pad, 256 * 2**20)


def load_keras() -> None:
    """Loads Keras and its backend; to be called before anything else does."""
    with _loading_tensorflow():
        import keras  # noqa: F401


@contextlib.contextmanager
def _loading_tensorflow() -> Iterator[None]:
    """Keeps its chatter off the terminal, which begins before any of its log settings hold."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # It leaves oneDNN off on processors without AVX-512, and trains half as fast without.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    with quiet_stderr():
        yield
