r"""Prepares a data set for training: shards of 16-second pieces, audio and notes together.

    python -m train.prepare --dataset maestro --root DIR --out_dir DIR
    python -m train.prepare --dataset synthetic --root DIR_OF_MIDI --soundfonts a.sf2,b.sf3 \
        --num_examples 8000 --out_dir DIR
    python -m train.prepare --dataset slakh --root DIR --out_dir DIR --runner FlinkRunner \
        -- --flink_master=HOST:8081

--clips writes FLAC and MIDI files and their manifest instead of shards: a folder for train.evaluate
--data. The fixed set by which the naming of instruments and drums is judged, 120 pieces of known or
unknown sounds, is such a folder:

    python -m train.prepare --flagfile=train/configs/names.flags --root DIR_OF_MIDI \
        --soundfonts ... --option recordings=... --option drum_kits=... --out_dir DIR

One's own recordings, with MIDI files of the same names or a manifest (mt3_keras/data/folder.py):

    python -m train.prepare --dataset folder --root DIR --split train,validation --out_dir DIR

Stopped, it is resumed where it was by the same command. An example that cannot be used
is left out and named at the end. What follows `--` are flags of Apache Beam. Options of data sets,
given as `--option name=value`: slakh num_mixes, seed, bass; cerberus4 bass; musicnet labels;
guitarset audio; folder validation, test (shares of all pairs); synthetic seed, seconds,
max_instruments and the other fields of SyntheticConfig and of Augmentation (mt3_keras/synth), and
sounds beside soundfonts: drum_kits=FOLDER,..., recordings=FOLDER,... of notes.
"""

from __future__ import annotations

import ast
import inspect
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from mt3_keras.beam import progress
from mt3_keras.cli.command_line import Command, Flags, UsageError, run

if TYPE_CHECKING:
    from mt3_keras.data.example import Example
    from mt3_keras.data.shards import Source
    from mt3_keras.synth.synthetic import SyntheticConfig

SYNTHETIC = "synthetic"
DATASETS = ("maestro", "slakh", "cerberus4", "musicnet", "guitarset", "urmp", "folder", SYNTHETIC)
EXAMPLES_PER_SYNTHETIC_SHARD = 64


def define_dataset_flags(add: Flags, *, split: str, num_examples: int) -> None:
    """Adds the flags that `find_sources` reads."""
    add.choice("dataset", None, DATASETS, "Which data set.")
    add.text("root", "", "Its folder; of synthetic MIDI files, or their tar archive, or nothing.")
    add.names("split", [split], "Splits, separated by commas.")
    add.switch("skip_missing", False, "Leave out examples whose files are not all there.")
    add.texts("option", [], "name=value, an option of the data set; may be repeated.")
    add.names("soundfonts", [], "Of synthetic: .sf2 and .sf3 files; none uses built-in sounds.")
    add.names(
        "tracks",
        [],
        "Names of tracks to keep apart beside their mix, such as drums,bass,other; of synthetic, "
        "slakh and cerberus4.",
    )
    add.count(
        "num_examples", num_examples, "Of synthetic: excerpts to render for each split.", least=0
    )


def _define_flags(add: Flags) -> None:
    define_dataset_flags(add, split="train", num_examples=1000)
    add.text("out_dir", "", "Folder for the shards; several data sets and splits may share one.")
    add.switch("list", False, "Print what is there, hours and instruments, and write nothing.")
    add.switch("clips", False, "Write FLAC and MIDI files and manifest.json instead of shards.")
    add.count("num_shards", 0, "Files a split; 0 follows from the number of examples.", least=0)
    add.count("num_workers", 0, "Processes of the local runner; 0 is one for each core.", least=0)
    add.text("runner", "", "Beam's runner, such as FlinkRunner; by default on this machine.")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 stopped."""
    return run("train.prepare", COMMAND, argv)


def _prepare(values: flags.FlagValues, _: list[str], beam_args: list[str]) -> None:
    _check_usage(values)
    if values.runner:
        beam_args = [*beam_args, f"--runner={values.runner}"]
    try:
        for split in values.split:
            if values.list:
                print(_describe_split(values, split))
            elif values.clips:
                _write_clips(values, split)
            else:
                _prepare_split(values, split, beam_args)
    except KeyboardInterrupt as stopped:
        stopped.args = ("stopped; run it again to go on",)
        raise


def _check_usage(values: flags.FlagValues) -> None:
    if values.dataset is None:
        raise UsageError(f"--dataset is needed: one of {', '.join(DATASETS)}")
    if not values.out_dir and not values.list:
        raise UsageError("--out_dir is needed: the folder to write to")


def _parse_options(given: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    """Texts "name=value" -> values as Python reads them, text where it does not."""
    options: dict[str, Any] = {}
    for option in given:
        name, separator, value = option.partition("=")
        if not separator or name not in allowed:
            known = ", ".join(allowed) or "none"
            raise UsageError(f"--option must be name=value, names {known}: got {option!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def find_sources(values: flags.FlagValues, split: str) -> tuple[list[Source], dict[str, Any]]:
    """The examples of a split of the data set that the flags name, and its options.

    Raises:
      UsageError: flags are missing or wrong.
      ValueError: the data set is not there or damaged.
    """
    from mt3_keras.data.shards import example_source, synthetic_source

    if values.dataset == SYNTHETIC:
        config = _synthetic_config(values, split)
        sources = [synthetic_source(config, index) for index in range(values.num_examples)]
        return sources, {"config": repr(config), **_track_options(values)}
    if values.tracks and values.dataset not in ("slakh", "cerberus4"):
        raise UsageError(f"--tracks needs stems, which {values.dataset} has none of")
    examples, options = _find(values, split)
    sources = [example_source(example, values.tracks) for example in examples]
    return sources, options | _track_options(values)


def _track_options(values: flags.FlagValues) -> dict[str, Any]:
    return {"tracks": list(values.tracks)} if values.tracks else {}


def _find(values: flags.FlagValues, split: str) -> tuple[list[Example], dict[str, Any]]:
    if not values.root:
        raise UsageError("--root is needed: the folder of the data set")
    from mt3_keras.data import cerberus4, folder, guitarset, maestro, musicnet, slakh, urmp

    modules: tuple[Any, ...] = (cerberus4, folder, guitarset, maestro, musicnet, slakh, urmp)
    module = next(module for module in modules if values.dataset == module.NAME)
    allowed = set(inspect.signature(module.find).parameters) - {"root", "split", "skip_missing"}
    options = _parse_options(values.option, sorted(allowed))
    return module.find(values.root, split, skip_missing=values.skip_missing, **options), options


def _synthetic_config(values: flags.FlagValues, split: str) -> SyntheticConfig:
    from mt3_keras.synth.augment import Augmentation
    from mt3_keras.synth.synthetic import SyntheticConfig, open_sources

    own = {"midi", "soundfonts", "split", "augmentation", "other_sources", "tracks"}
    allowed = [name for name in SyntheticConfig.__dataclass_fields__ if name not in own]
    sounds = list(inspect.signature(open_sources).parameters)
    changes = list(Augmentation.__dataclass_fields__)
    options = _parse_options(values.option, [*allowed, *changes, *sounds])
    chosen = {name: options.pop(name) for name in sounds if name in options}
    changed = {name: options.pop(name) for name in changes if name in options}
    try:
        return SyntheticConfig(
            midi=values.root,
            soundfonts=tuple(values.soundfonts),
            tracks=tuple(values.tracks),
            split=split,
            other_sources=open_sources(**chosen),
            augmentation=Augmentation(**changed),
            **options,
        )
    except TypeError as error:
        raise UsageError(f"an --option has a value of the wrong kind ({error})") from error


def _describe_split(values: flags.FlagValues, split: str) -> str:
    if values.dataset != SYNTHETIC:
        from mt3_keras.data.example import summarize

        return summarize(_find(values, split)[0])
    config = _synthetic_config(values, split)
    if not config.midi:
        return f"{SYNTHETIC} {split}: random music"
    from mt3_keras.synth import synthetic

    return f"{SYNTHETIC} {split}: {len(synthetic.find(config.midi, split))} MIDI files"


def _write_clips(values: flags.FlagValues, split: str) -> None:
    from tqdm import tqdm

    from train.clips import write_clips

    sources, _ = find_sources(values, split)
    kind = "rendered" if values.dataset == SYNTHETIC else "real"
    out_dir = pathlib.Path(values.out_dir, split) if len(values.split) > 1 else values.out_dir
    written = write_clips(sources, str(out_dir), name=values.dataset, kind=kind)
    bar = tqdm(written, total=len(sources), unit=" clips", disable=None)
    left_out = [clip for clip in bar if "left_out" in clip]
    for clip in left_out:
        print(f"left out {clip['id']}: {clip['left_out']}", file=sys.stderr)
    print(
        f"{values.dataset} {split}: {len(sources) - len(left_out)} clips, "
        f"{len(left_out)} left out, in {out_dir}"
    )


def _prepare_split(values: flags.FlagValues, split: str, beam_args: Sequence[str]) -> None:
    from mt3_keras.data.shards import write_records

    sources, options = find_sources(values, split)
    num_shards = values.num_shards
    if values.dataset == SYNTHETIC and not num_shards:
        num_shards = -(-len(sources) // EXAMPLES_PER_SYNTHETIC_SHARD)
    folder, prefix = pathlib.Path(values.out_dir), f"{values.dataset}-{split}"

    def count() -> int:
        return len(list(folder.glob(f"{prefix}-*-of-*.array_record")))

    with progress(prefix, "shards", count):
        summary = write_records(
            sources,
            values.out_dir,
            name=values.dataset,
            split=split,
            num_shards=num_shards,
            options=options,
            num_workers=values.num_workers,
            beam_args=beam_args,
        )
    for skipped in summary["skipped"]:
        print(
            f"left out {skipped['id']}: {skipped['reason']}; once mended, delete "
            f"{skipped['file']} and run this again",
            file=sys.stderr,
        )
    for warning in summary["warnings"]:
        print(f"{warning['id']}: {warning['text']}", file=sys.stderr)
    print(
        f"{values.dataset} {split}: {summary['num_records']} records of "
        f"{summary['num_examples']} examples, {summary['hours']:.2f} h, "
        f"{len(summary['skipped'])} left out, in {values.out_dir}"
    )


COMMAND = Command(
    "--dataset=NAME --root=DIR --out_dir=DIR [FLAGS] [-- BEAM_FLAGS]",
    __doc__,
    _define_flags,
    _prepare,
    packages=("array_record", "apache_beam"),
    passes_on=True,
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
