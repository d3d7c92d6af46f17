"""`mt3 transcribe` ended at any moment: what is written is whole, and nothing else is left.

    python -m benchmarks.kills --kill 50 --term 20 --hup 20

A process forked from this one, which has all modules loaded, transcribes a few recordings with
--resume and is sent a signal at a random time, over and over. Each time every output that is there
must be, to the byte, that of a run that nobody ended. SIGTERM and SIGHUP must leave no temporary
file; those of SIGKILL must be gone after the next run. In the end one run is left alone.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import flags

from mt3_keras.cli.command_line import Command, Flags, run

NUM_RECORDINGS, SECONDS = 3, 1.0
FORMATS = ("mid", "json", "csv")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code, 1 where something was lost or left."""
    return run("benchmarks.kills", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    for name, count in (("kill", 50), ("term", 20), ("hup", 20)):
        text = f"How often SIG{name.upper()} is sent."
        add.count(name, count, text, least=0)
    add.count("seed", 0, "Of the moments.", least=0)


def _kill_often(values: flags.FlagValues, _: list[str]) -> int:
    _load_modules()
    rng = random.Random(values.seed)
    names = ["SIGKILL"] * values.kill + ["SIGTERM"] * values.term + ["SIGHUP"] * values.hup
    rng.shuffle(names)
    with tempfile.TemporaryDirectory() as scratch:
        home = pathlib.Path(scratch)
        recordings = write_recordings(home / "in")
        start = time.monotonic()
        if _wait(_start(recordings, home / "whole")):
            raise ValueError("a run that nobody ends fails: see mt3 transcribe")
        longest = time.monotonic() - start
        whole = read_outputs(home / "whole")
        faults: list[str] = []
        num_early, num_folders = 0, 1
        for number, name in enumerate(names):
            out = home / f"out{num_folders}"  # the next run goes on in it, until one is done
            child = _start(recordings, out)
            time.sleep(rng.uniform(0, longest))
            os.kill(child, getattr(signal, name))
            is_done = _wait(child) == 0
            num_early, num_folders = num_early + (not is_done), num_folders + is_done
            if number % 10 == 9:
                print(f"{number + 1}: {num_early} before the run was done", flush=True)
            faults += [f"{number} {name}: {fault}" for fault in find_faults(out, whole, name)]
        for out in sorted(home.glob("out*")):
            if _wait(_start(recordings, out)) or read_outputs(out) != whole:
                faults.append(f"{out.name}: the last run did not write all")
            if left := [path.name for path in out.iterdir() if path.name.startswith(".")]:
                faults.append(f"{out.name}: {left} are left")
    for fault in faults:
        print(fault, file=sys.stderr)
    print(
        f"{len(names)} signals ({values.kill} SIGKILL, {values.term} SIGTERM, {values.hup} SIGHUP),"
        f" {num_early} before the run was done; {len(whole)} outputs each; {len(faults)} faults"
    )
    return 1 if faults else 0


def _load_modules() -> None:
    """Loads what a command would, so that a forked one begins with its work."""
    import mt3_keras.cli.transcribe
    import mt3_keras.engines.litert
    import mt3_keras.transcriber  # noqa: F401


def write_recordings(folder: pathlib.Path) -> list[pathlib.Path]:
    """Some seconds each of an example."""
    import soundfile

    example = pathlib.Path(__file__).parent.parent / "examples" / "band.flac"
    samples, rate = soundfile.read(example)
    folder.mkdir()
    length = round(SECONDS * rate)
    paths = [folder / f"{i}.wav" for i in range(NUM_RECORDINGS)]
    for i, path in enumerate(paths):
        soundfile.write(path, samples[i * length : (i + 1) * length], rate)
    return paths


def _start(recordings: Sequence[pathlib.Path], out: pathlib.Path) -> int:
    """Forks a process that transcribes; its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        for name in ("SIGTERM", "SIGHUP"):  # this process's own handling is not the command's
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        from mt3_keras.__main__ import main as transcribe

        arguments = [f"--output_dir={out}", f"--formats={','.join(FORMATS)}", "--resume"]
        code = transcribe(["transcribe", *map(str, recordings), *arguments, "--threads=1"])
    finally:
        os._exit(code)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_outputs(folder: pathlib.Path) -> dict[str, bytes]:
    """The content of all files but hidden ones, by name."""
    if not folder.exists():
        return {}
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")
    }


def find_faults(out: pathlib.Path, whole: dict[str, bytes], name: str) -> list[str]:
    """What is wrong in an output folder after a signal."""
    found = read_outputs(out)
    faults = [f"{file} is not whole" for file in found if found[file] != whole.get(file)]
    if name != "SIGKILL" and out.exists():
        faults += [f"{path.name} is left" for path in out.iterdir() if path.name.startswith(".")]
    return faults


COMMAND = Command("[FLAGS]", __doc__, _define_flags, _kill_often)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
