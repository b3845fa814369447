"""What the three commands have in common: version, exit codes, one clean line for every deliberate error."""

from __future__ import annotations

import argparse
import getpass
import importlib.metadata
import io
import logging
import os
import select
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.errors import MedFLError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

INTERRUPTED = 130
READER_LEFT = 141
"""What a shell reports for a program whose output was cut off, as by ``| head``."""
WIDTH = 80
"""Columns of a terminal."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=WIDTH)


def parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser with ``--version``, the log options and examples after the options."""
    made = argparse.ArgumentParser(
        prog=prog,
        description=textwrap.fill(description, WIDTH),
        epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
        formatter_class=_Formatter,
    )
    version = importlib.metadata.version("medfl")
    made.add_argument("--version", action="version", version=f"{prog} {version}")
    made.add_argument("-v", "--verbose", action="store_true", help="log more")
    made.add_argument("--log-format", choices=("text", "json"), default="text", help="one JSON object a line, or text")
    made.add_argument("--log-file", type=Path, metavar="FILE", help="log there too; rotated at 10 MB, 5 are kept")
    return made


def commands_of(parser: argparse.ArgumentParser) -> Commands:
    """The sub-commands of ``parser``, none of which has to be given."""
    return parser.add_subparsers(title="commands", metavar="COMMAND", prog=parser.prog)


def add_command(
    commands: Commands, name: str, summary: str, work: Callable[[argparse.Namespace], int], *, examples: str = ""
) -> argparse.ArgumentParser:
    """Add sub-command ``name``, done by ``work(options)``, which is where its file imports what is heavy."""
    epilog = f"examples:\n{examples}\n\n{EXIT_CODES}" if examples else EXIT_CODES
    made = commands.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=_Formatter, allow_abbrev=False
    )
    made.set_defaults(work=work)
    return made


def add_group(commands: Commands, name: str, summary: str) -> Commands:
    """Add ``name``, which only holds further sub-commands."""
    made = add_command(commands, name, summary, lambda _: _usage(made))
    return commands_of(made)


def _usage(made: argparse.ArgumentParser) -> int:
    made.print_help()
    return 2


def say(lines: Iterable[str]) -> None:
    """Print each of ``lines``, folded at the width of a terminal; hashes and file names stay whole."""
    for line in lines:
        print(textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False))


def account() -> str:
    """Who gives the command: the account on this machine, the one before sudo where that is known."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return f"user {os.getuid()}"


EXIT_CODES = (
    "exit status: 0 ok, 1 unexpected, 2 configuration, 3 refused by policy,\n4 data, 5 network, 130 interrupted"
)


def on_termination(stop: Callable[[], None]) -> None:
    """Call ``stop`` when the process is asked to end (SIGTERM, SIGINT), in a thread of its own.

    A handler runs between two instructions of the main thread, which may hold the very lock that ``stop`` takes.
    """
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, lambda *_: threading.Thread(target=stop, name="stop").start())


def run(prog: str, work: Callable[[], int]) -> int:
    """Call ``work`` and turn what it raises into a line on standard error and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names are any text, and a terminal may know few letters
    try:
        status = work()
        sys.stdout.flush()
        return status
    except MedFLError as error:
        for line in str(error).splitlines():
            print(f"{prog}: {line}", file=sys.stderr)
        return error.exit_status
    except EOFError:
        print(f"{prog}: there is nobody to answer: give the answer as an option, see --help", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if _nobody_reads():
            return READER_LEFT
        # The name may be a patient's file: only what the system says is shown, the rest with --verbose.
        print(f"{prog}: the operating system refused: {error.strerror or type(error).__name__}", file=sys.stderr)
        logging.getLogger("medfl").debug("where", exc_info=True)
        return 1


def _nobody_reads() -> bool:
    """Whether standard output leads nowhere any more. What is still to be written is dropped then, without a word."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # not a file of the system
        return False
    end = select.poll()
    end.register(output, 0)  # errors are told without being asked for
    if not end.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True
