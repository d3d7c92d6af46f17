"""Lists the names that transcribe --instruments knows."""

from __future__ import annotations

from mt3_keras.cli.command_line import Command


def _print_instruments(*_: object) -> None:
    import pretty_midi

    from mt3_keras.instrument_names import COMMON, instrument_name

    for program in range(128):
        if program % 8 == 0:
            print(pretty_midi.program_to_instrument_class(program))
        print(f"  {program:3} {instrument_name(program, False)}")
    print("Drums")
    print(f"and, of several instruments: {', '.join(sorted(COMMON))}")


COMMAND = Command("", __doc__, lambda _: None, _print_instruments)
