"""The settings of a training run: each a field of `RunConfig`, a flag and a line of `run.flags`."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from absl import flags

from mt3_keras.cli.command_line import Flags
from mt3_keras.models.config import CONFIGS, HEADS, DetectorConfig, ModelConfig, config_from_dict


class RunError(ValueError):
    """A run that cannot be started or resumed: one line with the cure."""


TOKENS, ROLLS = "networks that emit tokens", "detectors"  # what a setting is for alone


def _setting(default: Any, text: str, choices: Sequence[str] = (), only: str = "") -> Any:
    metadata = {"help": text, "choices": tuple(choices), "only": only}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a run does. The help texts are the documentation."""

    out_dir: str = _setting("", "Folder of the run; a run that it holds already is resumed.")

    model: str = _setting(
        "", f"The network: {', '.join(CONFIGS)}, or a config.json. Empty: that of --init_from."
    )
    init_from: str = _setting(
        "", "Weights to start from: a shipped model, a preset, a run or a T5X checkpoint folder."
    )
    dropout: float = _setting(-1.0, "Dropout rate; below 0 the network's own.")
    freeze: str = _setting(
        "", "Regular expression: variables whose path it finds stay as they are, as in 'encoder/'."
    )
    lora_rank: int = _setting(
        0, "Above 0: train only low-rank additions of this rank to attention's queries and values."
    )

    data: tuple[str, ...] = _setting((), "Folders, one a data set: see --reader.")
    validation_split: str = _setting("validation", "Split to validate on; empty: do not validate.")
    new_data: bool = _setting(
        False, "Resume a run on other data than before, from that data's beginning."
    )
    mixture_exponent: float = _setting(
        0.3, "A data set of n pieces is drawn in proportion to n to this power."
    )
    num_mixed: int = _setting(1, "Sum up to this many pieces to one example.")
    join_seconds: float = _setting(
        0.0,
        "Encode what happens within so many seconds as one moment; 0: as the original.",
        only=TOKENS,
    )
    max_attenuation_db: float = _setting(
        0.0, "Make each example fainter by 0 to so many decibels, for any level of recording."
    )
    target_tokens: int = _setting(0, "Longest targets; 0: the network's max_tokens.", only=TOKENS)
    buckets: tuple[int, ...] = _setting(
        (),
        "Shorter lengths for batches whose targets fit; batches are then sorted by length.",
        only=TOKENS,
    )
    context: str = _setting(
        "segment",
        "What the last frames of a segment are given: zeros, as in the original, or the audio "
        "that follows.",
        ("segment", "full"),
    )
    reader: Literal["records", "tfio"] = _setting(
        "records",
        "What --data holds: records of train.prepare, or recordings with MIDI files, decoded by "
        "tensorflow-io (requirements-tfio.txt).",
        ("records", "tfio"),
    )
    num_workers: int = _setting(0, "Processes that prepare batches; 0: this one does.")
    resident: bool = _setting(
        False,
        "Keep the data in the device's memory and cut the batches there, on a GPU under "
        "KERAS_BACKEND=jax.",
        only=ROLLS,
    )

    batch_size: int = _setting(32, "Examples for one update of the weights, over all devices.")
    steps: int = _setting(1000, "Updates of the weights.")
    gradient_accumulation_steps: int = _setting(
        1, "Cut each batch into this many parts, to need less memory."
    )
    optimizer: Literal["adafactor", "adam"] = _setting(
        "adafactor", "adafactor is the original's.", ("adafactor", "adam")
    )
    learning_rate: float = _setting(1e-3, "Largest learning rate.")
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = _setting(
        "constant",
        "How the learning rate falls after the warm-up.",
        ("constant", "linear", "cosine", "rsqrt"),
    )
    warmup_steps: int = _setting(0, "Updates until the learning rate is reached, linearly.")
    clip_norm: float = _setting(0.0, "Largest norm of all gradients together; 0: no limit.")
    ema: float = _setting(0.0, "Momentum of an average of the weights, as 0.999; 0: none is kept.")

    normalize: Literal["tokens", "examples", "sum"] = _setting(
        "tokens",
        "What the loss is divided by: the batch's tokens, its examples, or nothing ('sum', the "
        "original's; all one to adafactor).",
        ("tokens", "examples", "sum"),
        only=TOKENS,
    )
    z_loss: float = _setting(
        1e-4, "Weight of the squared log normaliser of the token scores.", only=TOKENS
    )
    label_smoothing: float = _setting(
        0.0, "Probability given to all tokens but the right one.", only=TOKENS
    )
    timing_weight: float = _setting(1.0, "Weight of shift tokens in the loss.", only=TOKENS)
    pitch_weight: float = _setting(1.0, "Weight of pitch tokens.", only=TOKENS)
    instrument_weight: float = _setting(1.0, "Weight of program and drum tokens.", only=TOKENS)
    velocity_weight: float = _setting(1.0, "Weight of velocity tokens.", only=TOKENS)
    tie_weight: float = _setting(1.0, "Weight of tie and end tokens.", only=TOKENS)
    # The losses are means over rolls, and the emptier a roll the smaller its mean.
    head_weights: tuple[str, ...] = _setting(
        (
            "onset=10",
            "unison=2",
            "offset=5",
            "frame=3",
            "strength=0.3",
            "drum=10",
            "drum_strength=0.2",
            "names=0.15",
            "notes=0.15",
        ),
        f"Weight of the loss of each roll, of {', '.join(HEADS)}, of the names of notes and of "
        "whether an onset is one (notes); what is left out is not trained.",
        only=ROLLS,
    )
    head_positive_weight: float = _setting(
        1.0, "What a 1 counts in a roll, beside what it does by itself.", only=ROLLS
    )
    looked_at: Literal["all", "found"] = _setting(
        "all",
        "What names and notes are learnt from: true onsets beside those found, or, by a network "
        "that finds most already, those found alone, as it will be used.",
        ("all", "found"),
        only=ROLLS,
    )

    strategy: str = _setting(
        "one",
        "Devices: one; mirrored, all of this machine; multiworker, machines named by TF_CONFIG; "
        "tpu.",
        ("one", "mirrored", "multiworker", "tpu"),
    )
    dtype: str = _setting(
        "float32",
        "Arithmetic; mixed_bfloat16 pays where the processor has it.",
        ("float32", "mixed_bfloat16"),
    )
    jit_compile: str = _setting(
        "auto",
        "Compile the step with XLA. auto: not for TensorFlow on a CPU, which is faster without.",
        ("auto", "on", "off"),
    )
    steps_per_execution: int = _setting(1, "Batches handed to the device at a time.")
    num_threads: int = _setting(0, "TensorFlow's threads in one operation; 0: its own choice.")
    seed: int = _setting(0, "Of the weights, the dropout and the order of the data.")
    deterministic: bool = _setting(
        True, "The same run gives the same weights, bit for bit; slower on a GPU."
    )

    log_steps: int = _setting(100, "Updates between two lines of the log.")
    validate_steps: int = _setting(1000, "Updates between two validations.")
    validation_batches: int = _setting(8, "Batches of one validation.")
    checkpoint_steps: int = _setting(1000, "Updates between two checkpoints.")
    keep: int = _setting(3, "Checkpoints to keep.")
    tensorboard: bool = _setting(True, "Write TensorBoard's files too.")

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "log_steps", "checkpoint_steps", "keep"):
            _require(getattr(self, name) >= 1, f"{name} must be positive", getattr(self, name))
        for name in ("gradient_accumulation_steps", "steps_per_execution", "validate_steps"):
            _require(getattr(self, name) >= 1, f"{name} must be positive", getattr(self, name))
        for name in ("steps", "checkpoint_steps", "validate_steps"):
            rule = f"{name} must be a multiple of log_steps ({self.log_steps})"
            _require(getattr(self, name) % self.log_steps == 0, rule, getattr(self, name))
        for field in dataclasses.fields(self):
            if choices := field.metadata["choices"]:
                value = getattr(self, field.name)
                _require(value in choices, f"{field.name} must be {' or '.join(choices)}", value)
        _require(self.learning_rate > 0, "learning_rate must be positive", self.learning_rate)
        _require(0 <= self.ema < 1, "ema must be in [0, 1)", self.ema)
        _require(
            0 <= self.label_smoothing < 1, "label_smoothing must be in [0, 1)", self.label_smoothing
        )
        _require(bool(self.head_weight_of), "head_weights must name a head", self.head_weights)
        _require(self.dropout < 1, "dropout must be below 1", self.dropout)
        self._check_products()

    def _check_products(self) -> None:
        parts = self.gradient_accumulation_steps
        _require(
            self.batch_size % parts == 0,
            f"batch_size must be a multiple of gradient_accumulation_steps ({parts})",
            self.batch_size,
        )
        # An epoch of `fit` is log_steps updates, and it always runs whole executions.
        _require(
            self.log_steps * parts % self.steps_per_execution == 0,
            "steps_per_execution must divide log_steps * gradient_accumulation_steps "
            f"({self.log_steps * parts})",
            self.steps_per_execution,
        )
        _require(
            self.steps_per_execution % parts == 0 or parts % self.steps_per_execution == 0,
            f"of steps_per_execution and gradient_accumulation_steps ({parts}) one must divide "
            "the other",
            self.steps_per_execution,
        )

    @property
    def head_weight_of(self) -> dict[str, float]:
        """`head_weights` by head.

        Raises:
          ValueError: one is not HEAD=NUMBER.
        """
        weights = {}
        for text in self.head_weights:
            name, _, number = text.partition("=")
            try:
                weights[name] = float(number)
            except ValueError as error:
                raise ValueError(f"head_weights must be HEAD=NUMBER: got {text!r}") from error
            heads = (*HEADS, "names", "notes")
            known = name in heads and 0 <= weights[name] < math.inf
            _require(known, f"head_weights must be 0 or more, of {', '.join(heads)}", text)
        return weights

    def check_network(self, model_config: ModelConfig) -> None:
        """Refuses settings that a network has no use for, with a RunError."""
        needed = ROLLS if isinstance(model_config, DetectorConfig) else TOKENS
        for field in dataclasses.fields(self):
            is_given = getattr(self, field.name) != field.default
            if is_given and field.metadata["only"] not in ("", needed):
                raise RunError(f"--{field.name} is for {field.metadata['only']}: drop it")

    @property
    def fit_batch_size(self) -> int:
        """Examples in one batch of `fit`, over all devices."""
        return self.batch_size // self.gradient_accumulation_steps

    def model_config(self) -> ModelConfig | None:
        """The network that --model names, or None.

        Raises:
          ValueError: there is no such network, or its file is not one.
        """
        if not self.model:
            return None
        if self.model in CONFIGS:
            return CONFIGS[self.model]
        path = pathlib.Path(self.model)
        if not path.is_file():
            raise ValueError(
                f"model must be {', '.join(CONFIGS)} or a config.json: got {self.model!r}"
            )
        try:
            return config_from_dict(json.loads(path.read_text()))
        except (OSError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not the description of a network ({error})") from error

    def to_flagfile(self) -> str:
        """The run as a flagfile, every setting in a line."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                lines.append(f"--{'' if value else 'no'}{field.name}")
            else:
                text = ",".join(map(str, value)) if isinstance(value, tuple) else value
                lines.append(f"--{field.name}={text}")
        return "\n".join(lines) + "\n"


def _require(condition: bool, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{rule}: got {value!r}")


def define_flags(add: Flags) -> None:
    """Makes every field of `RunConfig` a flag."""
    for field in dataclasses.fields(RunConfig):
        default: Any = field.default
        text = field.metadata["help"]
        if choices := field.metadata["choices"]:
            add.choice(field.name, default, choices, text)
        elif isinstance(default, tuple):
            add.names(field.name, list(default), text)
        elif isinstance(default, bool):
            add.switch(field.name, default, text)
        elif isinstance(default, int):
            add.count(field.name, default, text, least=None)
        elif isinstance(default, float):
            add.number(field.name, default, text)
        else:
            add.text(field.name, default, text)


def config_from_flags(flag_values: flags.FlagValues) -> RunConfig:
    """The settings given on the command line.

    Raises:
      ValueError: one is out of range.
    """
    values: dict[str, Any] = {
        field.name: flag_values[field.name].value for field in dataclasses.fields(RunConfig)
    }
    try:
        buckets = tuple(int(length) for length in values["buckets"])
    except ValueError as error:
        raise ValueError(f"buckets must be whole numbers: got {values['buckets']}") from error
    lists = {name: tuple(values[name]) for name in ("data", "head_weights")}
    return RunConfig(**values | lists | {"buckets": buckets})
