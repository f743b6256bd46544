"""Commands as modules: a table names them, and a module is imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Command", "CommandError", "run_command"]


class CommandError(Exception):
    """Something the user can mend: its message is printed without a traceback."""


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        module: the module that runs it, by `main(prog, argv)`, which parses its own arguments.
        summary: what it does, in one line of the help.
    """

    module: str
    summary: str


def run_command(
    prog: str, description: str | None, commands: Mapping[str, Command], argv: Sequence[str]
) -> None:
    """Run the command that `argv` begins with, giving it the rest of `argv`.

    Args:
        prog: how the program was called, shown in the help.
        description: first line of the help.
        commands: the commands by name.
        argv: arguments after `prog`.

    Raises:
        SystemExit: `argv` asks for help or names no command of the table.
    """
    width = max(map(len, commands))
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        usage="%(prog)s COMMAND ...",
        epilog="\n".join(
            ["commands (each has a --help of its own):"]
            + [f"  {name:{width}}  {command.summary}" for name, command in commands.items()]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help=argparse.SUPPRESS)
    # Only the first argument is ours: the rest, --help included, is the command's own.
    name = parser.parse_args(argv[:1]).command
    importlib.import_module(commands[name].module).main(f"{prog} {name}", argv[1:])
