"""Finds the command that was named, and starts it in this process or by `accelerate launch`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.metadata
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from .table import COMMANDS, Command


PROGRAM = "diffusers-adm"
HELP_FLAGS = ("-h", "--help")
WRONG_USAGE = 2  # as argparse's
SEPARATOR = "--"
LAUNCHING = f"""
Training is started by `accelerate launch`. Its own options, if there are any, come first and end with `{SEPARATOR}`.
With `{SEPARATOR}`, `sample` and `evaluate` are started by it, too:

  {PROGRAM} train adm --config emoji_32 --output_dir runs/mine
  {PROGRAM} train adm --num_processes 2 {SEPARATOR} --config emoji_32 --output_dir runs/mine
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line: the words of a command, then its arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"{PROGRAM} {importlib.metadata.version('diffusers-adm')}")
        return
    command, arguments = find_command(words)
    options, arguments = split_arguments(command, arguments)
    asks_for_help = any(flag in arguments for flag in HELP_FLAGS)
    if options is None or asks_for_help:
        run_here(command, arguments)
    else:
        launch(command, options, arguments)


def find_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """Returns the command that the first words name, and its arguments; otherwise ends with help or an error."""
    plain = [word.replace("_", "-") for word in words[:2]]
    for command in COMMANDS:
        parts = command.name.split()
        if plain[: len(parts)] == parts:
            return command, list(words[len(parts) :])
    group = [command for command in COMMANDS if command.name.split()[0] in plain[:1]]
    rest = words[1:] if group else words
    if not rest or rest[0] in HELP_FLAGS:
        print(help_text(group or COMMANDS), end="")
        raise SystemExit(0 if rest else WRONG_USAGE)
    _refuse(group, rest[0])


def _refuse(group: Sequence[Command], word: str) -> NoReturn:
    """Ends with the commands that resemble a word which is none."""
    full_names = {command.name.split()[-1]: command.name for command in group or COMMANDS}
    if not group:
        full_names |= {first: first for first in (command.name.split()[0] for command in COMMANDS)}
    matches = difflib.get_close_matches(word.replace("_", "-"), full_names, 3)
    names = dict.fromkeys(full_names[name] for name in matches)
    hint = f" Did you mean {' or '.join(f'`{PROGRAM} {name}`' for name in names)}?" if names else ""
    prefix = f"{PROGRAM} {group[0].name.split()[0]}" if group else PROGRAM
    print(f"error: `{prefix} {word}` is not a command.{hint} See `{prefix} --help` for all.", file=sys.stderr)
    raise SystemExit(WRONG_USAGE)


def help_text(commands: Sequence[Command]) -> str:
    """The commands, with a line for each."""
    width = max(len(command.name) for command in commands)
    lines = [
        f"usage: {PROGRAM} COMMAND [arguments]",
        "",
        *(f"  {command.name:{width}}  {command.summary}" for command in commands),
        "",
        f"`{PROGRAM} COMMAND --help` lists the arguments of a command.",
    ]
    return "\n".join(lines) + "\n" + (LAUNCHING if any(command.start != "here" for command in commands) else "")


def split_arguments(command: Command, arguments: list[str]) -> tuple[list[str] | None, list[str]]:
    """Splits the options of `accelerate launch` from the arguments; `None` if the command is not launched."""
    if command.start != "here" and SEPARATOR in arguments:
        position = arguments.index(SEPARATOR)
        return arguments[:position], arguments[position + 1 :]
    return ([] if command.start == "launched" else None), arguments


def run_here(command: Command, arguments: Sequence[str]) -> None:
    """Runs a command in this process, as `python -m` would."""
    # argparse takes the name of the program from here, and `run_command` looks for `--debug`.
    sys.argv = [f"{PROGRAM} {command.name}", *command.first_arguments, *arguments]
    if command.first_arguments:  # argparse adds these itself
        sys.argv[0] = PROGRAM
    from diffusers_adm.commands.errors import run_command

    run_command(lambda: importlib.import_module(command.module).main())


def launch(command: Command, options: Sequence[str], arguments: Sequence[str]) -> None:
    """
    Runs a command by `accelerate launch`. Unlike it, ends with the exit code of the command, without a traceback of the
    launcher, and passes SIGTERM and SIGUSR1 on. (With several processes, torch's launcher takes SIGTERM for itself: the
    processes get it, but the exit code is 1.)
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from diffusers_adm.commands.errors import INTERRUPTED_EXIT_CODE, STOPPED_EARLY_EXIT_CODE, fail
    from diffusers_adm.commands.recipes import find_accelerate_config

    parser = launch_command_parser()
    args = parser.parse_args([*options, "--module", command.run_name, *arguments])
    if (args.training_script, args.training_script_args) != (command.run_name, list(arguments)):
        fail(f"`{' '.join(options)}` are not options of `accelerate launch`; only these come before `{SEPARATOR}`.")
    args.quiet = False  # with `--quiet`, every error has the exit code 1
    args.config_file = find_accelerate_config(args.config_file)
    for name in ("SIGTERM", "SIGUSR1"):  # Windows has no SIGUSR1
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _pass_on)
    try:
        launch_command(args)
    except KeyboardInterrupt:  # the processes of the command got it, too, and say so
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(_exit_code(error.returncode)) from None
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != STOPPED_EARLY_EXIT_CODE:
            print(error, file=sys.stderr)
        raise SystemExit(_exit_code(failure.exitcode)) from None
    except ValueError as error:  # of the options
        fail(str(error))


def _pass_on(number: int, frame: object) -> None:
    import psutil

    processes = psutil.Process().children()
    if not processes:  # not started yet
        raise SystemExit(128 + number)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _exit_code(returned: int) -> int:
    """The exit code of shells; `returned` is negative for a process that a signal has ended."""
    return returned if returned >= 0 else 128 - returned
