"""
How commands end: a mistake of the user with one sentence and exit code 2, Ctrl-C with one word, any other error with
its traceback.

Every script of `training/` and every `python -m diffusers_adm...` starts its `main` with [`run_command`].
"""

from __future__ import annotations

import argparse
import difflib
import dis
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from .lost_processes import explain_lost_process


DEBUG_FLAG = "--debug"
# The exceptions that this package raises, with a sentence, where the user can change something.
MISTAKES = (ValueError, TypeError, OSError, ImportError)
EXIT_CODE = 2  # as argparse's
# EX_TEMPFAIL of sysexits.h: stopped early with a checkpoint, from which the same command goes on.
STOPPED_EARLY_EXIT_CODE = 75
LOST_PROCESS_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130  # the convention of shells: 128 + the number of the signal
# Seconds that all processes except the main one wait before they report an error. The main process usually has the same
# error, or caused theirs by ending; its launcher then stops the others, so that the error is shown once.
WAIT_FOR_MAIN_PROCESS = 10


class CommandError(RuntimeError):
    """
    An error of a library or a server whose message is enough to tell the user what to do.

    Args:
        message (`str`): Shown without a traceback.
        exit_code (`int`, defaults to 2): Exit code of the command.
    """

    def __init__(self, message: str, exit_code: int = EXIT_CODE):
        super().__init__(message)
        self.exit_code = exit_code


def add_debug_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that [`run_command`] looks for."""
    parser.add_argument(DEBUG_FLAG, action="store_true", help="Show the traceback of every error.")


def run_command(main: Callable[[], None]) -> None:
    """
    Calls `main()` and reports its errors.

    A mistake of the user ends the process with `error: <message>` on stderr and exit code 2: a [`CommandError`], or a
    `ValueError`, `TypeError`, `OSError` or `ImportError` from a `raise` statement of this package or of the script.
    Ctrl-C ends it with `interrupted`, and a lost process with a sentence and exit code 1. Every other exception, and
    with `--debug` every exception, keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        if DEBUG_FLAG in sys.argv[1:]:
            raise
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    except Exception as error:
        # Not for an error that is explained already, such as that of a server which has closed a connection.
        lost = None if isinstance(error, CommandError) else explain_lost_process(error)
        if lost is not None and DEBUG_FLAG not in sys.argv[1:]:
            fail(lost, LOST_PROCESS_EXIT_CODE)
        if DEBUG_FLAG in sys.argv[1:] or not (isinstance(error, CommandError) or is_mistake(error)):
            _wait_for_main_process()
            raise
        fail(str(error), getattr(error, "exit_code", EXIT_CODE))


def fail(message: str, exit_code: int = EXIT_CODE) -> NoReturn:
    """Ends the process with `error: <message>` on stderr. If all processes have the same error, only one shows it."""
    _wait_for_main_process()
    print(f"error: {message}", file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # the launcher of several processes reads its report there
        report = {"message": message, "timestamp": int(time.time())}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(report), encoding="utf-8")
    raise SystemExit(exit_code)


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """Returns a sentence, after a space, with the known names that resemble `name`; "" if none does."""
    matches = difflib.get_close_matches(name, known, most)
    return f" Did you mean {' or '.join(f'`{match}`' for match in matches)}?" if matches else ""


def _wait_for_main_process() -> None:
    if int(os.environ.get("RANK", 0)) > 0:  # set by launchers
        time.sleep(WAIT_FOR_MAIN_PROCESS)


def is_mistake(error: Exception) -> bool:
    """Whether the error comes from a `raise` statement of this package or of the running script."""
    if not isinstance(error, MISTAKES) or error.__traceback__ is None:
        return False
    innermost: TracebackType = error.__traceback__
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    code = innermost.tb_frame.f_code
    # A `ValueError` of `int("x")` or of an unpacking in the same function is a bug.
    if code.co_code[innermost.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return False
    name = innermost.tb_frame.f_globals.get("__name__", "")
    script = getattr(sys.modules["__main__"], "__file__", None)
    is_next_to_script = script is not None and Path(code.co_filename).resolve().parent == Path(script).resolve().parent
    return name == "__main__" or name.split(".")[0] == __package__.split(".")[0] or is_next_to_script
