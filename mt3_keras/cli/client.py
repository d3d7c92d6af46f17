"""Transcribes a recording on a model server.

    mt3 client --server localhost:8500 --config DIR song.mp3 --output song.mid
    mt3 client --server http://localhost:8501 --config DIR song.mp3

Samples go there, as WAV files where 16 bits hold them; tokens or candidates of notes come back and
are read as notes here. HOST:PORT speaks gRPC, an http address REST. DIR is what `export.main`
wrote, or the `config.json` in it.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from mt3_keras.cli.command_line import Command, Flags, UsageError
from mt3_keras.process import printable

if TYPE_CHECKING:
    from mt3_keras.engines.serving import Samples
    from mt3_keras.outputs import Output


def _define_flags(add: Flags) -> None:
    add.text("server", None, "HOST:PORT for gRPC, http://HOST:PORT for REST.")
    add.text("config", None, "The exported model's folder, or its config.json.")
    add.text("output", None, "MIDI file to write; by default out/NAME.mid.")
    add.text("name", None, "Of the model on the server; by default as it was exported.")
    add.number("deadline", 120.0, "Seconds for an attempt.", least=0.001)
    add.count(
        "retries",
        4,
        "Attempts after the first, where the server is busy or not there yet.",
        least=0,
    )
    add.count("segments", 15, "Segments of a request, about 2 s each.")
    add.count("parallel", 2, "Requests under way at once.")


def _run(values: flags.FlagValues, arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise UsageError(f"one recording is needed: got {len(arguments)}")
    for name in ("server", "config"):
        if not values[name].value:
            raise UsageError(f"--{name} is needed")
    from mt3_keras.audio import read_blocks
    from mt3_keras.cli.note_files import pick_midi
    from mt3_keras.engines import serving

    output = pick_midi(values.output, pathlib.Path(arguments[0]).stem)
    config = serving.ServedConfig.read(pathlib.Path(values.config))
    name = values.name or config.name
    is_rest = values.server.startswith(("http://", "https://"))
    server: serving.Server = (serving.RestServer if is_rest else serving.GrpcServer)(
        values.server, name, config.signatures
    )

    def predict(samples: Samples) -> list[Output]:
        return serving.call_patiently(
            lambda seconds: server.predict(samples, seconds),
            values.server,
            deadline=values.deadline,
            retries=values.retries,
        )

    result = serving.transcribe(
        read_blocks(arguments[0]),
        config,
        predict,
        num_segments=values.segments,
        parallel=values.parallel,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    result.write_midi(output)
    print(printable(f"wrote {output}: {len(result.notes)} notes, {result.duration:.1f} s"))


COMMAND = Command(
    "--server=ADDRESS --config=DIR RECORDING [FLAGS]",
    __doc__,
    _define_flags,
    _run,
    takes_arguments=True,
)
