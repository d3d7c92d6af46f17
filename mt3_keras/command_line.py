"""What the commands share: flags for a model and its decoding, and loading it from them."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from mt3_keras.transcriber import Transcriber


class UsageError(ValueError):
    """A command line that cannot be followed."""


def define_model_flags(values: flags.FlagValues) -> None:
    """Adds the flags that `load_transcriber` reads."""

    def text(name: str, meaning: str) -> None:
        flags.DEFINE_string(name, None, meaning, flag_values=values)

    def switch(name: str, default: bool, meaning: str) -> None:
        flags.DEFINE_boolean(name, default, meaning, flag_values=values)

    def choice(name: str, default: str | None, names: list[str], meaning: str) -> None:
        flags.DEFINE_enum(name, default, names, meaning, flag_values=values)

    def count(name: str, default: int | None, meaning: str) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)

    text("model", "A shipped model's name, a preset folder or a T5X checkpoint folder.")
    text("instruments", "Only these: General MIDI names, classes or numbers, and drums.")
    switch("constrained", False, "Allow only tokens that are legal where they stand.")
    switch("stop_runaways", True, "End segments that write on and on without getting ahead.")
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
        "greedy",
        ["greedy", "beam1"],
        "Greedy, or the original's beam search of one beam with brevity 0.6.",
    )
    choice("engine", "auto", ["auto", "keras", "litert"], "What runs the network.")
    count("batch_size", 16, "Segments decoded side by side.")
    count("max_tokens", None, "Longest token sequence of a segment; by default the model's own.")
    count("threads", None, "Processor cores to use; by default all.")


def load_transcriber(values: flags.FlagValues) -> Transcriber:
    """Loads the model that the flags name. Keras is loaded here, not before.

    Raises:
      UsageError: flags contradict each other.
      ValueError: the model cannot be found or read.
    """
    from mt3_keras.loading import shipped_names

    if values.model is None and "small" not in shipped_names():
        raise UsageError(
            "--model is needed: a preset or T5X checkpoint folder "
            "(README: where to get the official weights)"
        )
    options = _decoding_options(values)
    limit_threads(values.threads)
    silence_tensorflow()
    if values.instruments or values.constrained or not values.stop_runaways:
        from mt3_keras.grammar import Rules
        from mt3_keras.midi import parse_instruments

        programs, drums = (
            parse_instruments(values.instruments) if values.instruments else (None, True)
        )
        options["rules"] = Rules(
            programs=programs,
            drums=drums,
            constrained=values.constrained,
            stop_runaways=values.stop_runaways,
        )
    from mt3_keras.transcriber import Transcriber

    return Transcriber.from_preset(values.model or "small", **options)


def _decoding_options(values: flags.FlagValues) -> dict[str, Any]:
    options: dict[str, Any] = {"batch_size": values.batch_size, "engine": values.engine}
    if not values.exact:
        return options | {
            "context": values.context,
            "log_floor": values.log_floor,
            "method": values.search,
            "max_tokens": values.max_tokens,
        }
    names = ("context", "log_floor", "instruments", "max_tokens", "constrained", "search")
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


def silence_tensorflow() -> None:
    """Loads Keras with the backend's chatter about its build kept off the terminal.

    TensorFlow writes some of it before any of its log settings hold.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        import keras  # noqa: F401
    finally:
        os.dup2(kept, 2)
        os.close(kept)
