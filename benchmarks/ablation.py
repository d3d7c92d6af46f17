"""What each part of `small` brings: networks without it, trained alike from nothing.

    python -m benchmarks.ablation --train_data DIR --fonts_data DIR --data DIR_WITH_MANIFEST
        --steps 500 --batch_size 8 --out_dir runs/ablation [--only "no pointer"]

Each is trained by train/configs/small.flags for so many updates, the rate falling to zero, with the
same batches; "fonts only" hears the data of --fonts_data instead. The edge bundle of each is scored
on the recordings of --data, once as it reads them and once with the notes that its tokens name,
which the heads of `small` need no more. Stopped, it goes on where it was; what is done is not done
again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from mt3_keras.models.config import SMALL, ModelConfig, SpectrogramConfig
from train.history import describe_run
from train.scores import COLUMNS, DRUMS, ONSET, format_table

FONTS_ONLY = "fonts only"
LOSSES = ("hours_trained", "token_loss", "onset_loss")
BY_TOKENS = {f"tokens: {name}": name for name in (ONSET, DRUMS)}
TABLE = (*LOSSES, *COLUMNS, *BY_TOKENS)


def main() -> None:
    arguments = _parse()
    rows = {}
    for name, config in networks().items():
        if arguments.only in ("", name):
            rows[name] = _measure(name, config, arguments)
            print(format_table(rows.items(), f"{arguments.steps} updates", TABLE))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_data", required=True, help="of train.prepare, with commas")
    parser.add_argument("--fonts_data", required=True, help="the same, played by soundfonts alone")
    parser.add_argument("--data", required=True, help="recordings to score, with a manifest")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=8, help="young networks want updates")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="float32", help="mixed_bfloat16 pays with AMX or BF16")
    parser.add_argument("--out_dir", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="", choices=["", *networks()])
    return parser.parse_args()


def networks() -> dict[str, ModelConfig]:
    """`small`, and it without one part each, by name."""

    def without(*names: str) -> ModelConfig:
        network = dataclasses.replace(SMALL.network, **dict.fromkeys(names, False))
        return dataclasses.replace(SMALL, network=network)

    mel = SpectrogramConfig(hop_samples=SMALL.spectrogram.hop_samples)
    return {
        "small": SMALL,
        "log-mel, no stem": dataclasses.replace(SMALL, spectrogram=mel),
        "no heads": without("heads", "head_feedback", "pointer"),
        "no state inputs": without("state_inputs"),
        "no pointer": without("pointer"),
        FONTS_ONLY: SMALL,
    }


def _measure(name: str, config: ModelConfig, arguments: argparse.Namespace) -> dict[str, float]:
    folder = arguments.out_dir / name.replace(" ", "_").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    model, run, bundle = folder / "config.json", folder / "run", folder / "bundle"
    scores, by_tokens = folder / "scores.json", folder / "by_tokens.json"
    if not by_tokens.exists():
        model.write_text(json.dumps(config.to_dict()))
        data = arguments.fonts_data if name == FONTS_ONLY else arguments.train_data
        _call(
            "train.main",
            flagfile="train/configs/small.flags",
            model=model,
            data=data,
            out_dir=run,
            steps=arguments.steps,
            validate_steps=arguments.steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            dtype=arguments.dtype,
        )
        _call("export.main", model=run, out_dir=bundle, formats="tflite", quantize="int8")
        _call("train.evaluate", model=bundle, data=arguments.data, json=scores)
        tokens = read_tokens(bundle, folder / "tokens")
        _call("train.evaluate", model=tokens, data=arguments.data, json=by_tokens)
    summary = json.loads(scores.read_text())["summary"]["all"]
    named = json.loads(by_tokens.read_text())["summary"]["all"]
    return describe_run(run) | summary | {new: named[old] for new, old in BY_TOKENS.items()}


def read_tokens(bundle: pathlib.Path, out_dir: pathlib.Path) -> pathlib.Path:
    """The same bundle, but that notes are those that its tokens name."""
    shutil.copytree(bundle, out_dir, dirs_exist_ok=True)
    path = out_dir / "config.json"
    config = json.loads(path.read_text())
    config["config"]["network"] |= {"least_confidence": 0.0, "sure_confidence": 1.0}
    path.write_text(json.dumps(config))
    return out_dir


def _call(module: str, **flags: Any) -> None:
    options = [f"--{name}={value}" for name, value in flags.items()]
    code = subprocess.run([sys.executable, "-m", module, *options], check=False).returncode
    if code:
        sys.exit(code)  # it has said why


if __name__ == "__main__":
    main()
