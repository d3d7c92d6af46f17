"""Flags that choose a model and how it is run, and the `Transcriber` they describe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import flags

from mt3_keras.cli.command_line import Flags, UsageError
from mt3_keras.models.config import DetectorConfig, ModelConfig
from mt3_keras.process import limit_threads, loading_tensorflow

if TYPE_CHECKING:
    from mt3_keras.grammar import Rules
    from mt3_keras.transcriber import Transcriber


DEFAULT_MODEL = "small"
# Flags that --exact takes the place of -> options of `Transcriber.from_preset`.
_DECODING = {
    **{name: name for name in ("context", "log_floor", "max_tokens", "least_confidence")},
    **{"num_instruments": "num_instruments", "search": "method"},
}


def define_model_flags(add: Flags) -> None:
    """Adds the flags that `load_transcriber` reads."""
    add.text("model", None, "A shipped model's name, a preset folder or a T5X checkpoint folder.")
    define_rule_flags(add)
    add.switch(
        "exact", False, "Decode exactly as the original MT3 does; takes no other decoding flag."
    )
    add.choice(
        "context",
        None,
        ["segment", "full"],
        "What follows a segment's last samples: zeros, or the audio after it (default).",
    )
    add.choice(
        "log_floor",
        None,
        ["zero", "clamp"],
        "Floor of the spectrum's logarithm; by default the model's own.",
    )
    add.choice(
        "search",
        None,
        ["greedy", "beam1"],
        "How tokens are searched: greedily (default), or by the original's beam search of one beam "
        "with brevity 0.6.",
    )
    add.choice("engine", "auto", ["auto", "keras", "litert"], "What runs the network.")
    add.count(
        "batch_size", None, "Segments decoded side by side; the default depends on the engine."
    )
    add.count(
        "max_tokens", None, "Longest token sequence of a segment; by default the model's own."
    )
    add.number(
        "least_confidence",
        None,
        "Confidence that a detector's notes need, 0 to 1; by default the model's own.",
    )
    add.count(
        "num_instruments", None, "Instruments that a detector's notes have at most, but drums."
    )
    add.count("threads", None, "Processor cores to use; by default all.")


def define_rule_flags(add: Flags) -> None:
    """Adds the flags that `parse_rules` reads."""
    add.text("instruments", None, "Only these: General MIDI names, classes or numbers, and drums.")
    add.switch("constrained", False, "Allow only tokens that are legal where they stand.")
    add.switch("stop_runaways", True, "End segments that emit tokens without advancing in time.")


def parse_rules(values: flags.FlagValues) -> Rules:
    """The rules of the token search that the flags describe.

    Raises:
      ValueError: an instrument is unknown.
    """
    from mt3_keras.grammar import Rules
    from mt3_keras.instrument_names import parse_instruments

    programs, drums = parse_instruments(values.instruments) if values.instruments else (None, True)
    return Rules(
        programs=programs,
        drums=drums,
        constrained=values.constrained,
        stop_runaways=values.stop_runaways,
    )


def check_rules(values: flags.FlagValues, config: ModelConfig) -> None:
    """Refuses a rule that the network has no use for, with a ValueError."""
    if isinstance(config, DetectorConfig) and not values.stop_runaways:
        raise ValueError("--nostop_runaways is for networks that emit tokens: drop it")


def load_transcriber(values: flags.FlagValues) -> Transcriber:
    """Loads the model that the flags name, and Keras if it is to run it.

    Raises:
      UsageError: flags contradict each other.
      ValueError: the model cannot be found or read, or an optional package is missing.
    """
    options = transcriber_options(values)
    limit_threads(values.threads)
    from mt3_keras.transcriber import Transcriber

    with loading_tensorflow():
        transcriber = Transcriber.from_preset(values.model or DEFAULT_MODEL, **options)
    check_rules(values, transcriber.model_config)
    return transcriber


def transcriber_options(values: flags.FlagValues) -> dict[str, Any]:
    """What the flags say but for the model's name and the threads: for `from_preset`.

    Raises:
      UsageError: flags contradict each other.
      ValueError: an instrument is unknown.
    """
    options = _decoding_options(values)
    if values.instruments or values.constrained or not values.stop_runaways:
        options["rules"] = parse_rules(values)
    return options


def _decoding_options(values: flags.FlagValues) -> dict[str, Any]:
    options: dict[str, Any] = {"batch_size": values.batch_size, "engine": values.engine}
    if not values.exact:
        return options | {option: values[name].value for name, option in _DECODING.items()}
    names = (*_DECODING, "instruments", "constrained")
    if chosen := [name for name in names if not values[name].using_default_value]:
        raise UsageError(f"--exact decodes as the original does: drop --{', --'.join(chosen)}")
    return options | {"exact": True}
