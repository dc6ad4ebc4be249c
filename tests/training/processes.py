"""Real processes for tests: cheap to start, because they are forked from a server that has done the imports."""

import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["diffusers_adm.training"])


def start(function: Callable, *arguments: Any, daemon: bool = True) -> multiprocessing.Process:
    """Starts `function(*arguments)`, a function of a module, in a process of its own."""
    process = CONTEXT.Process(target=function, args=arguments, daemon=daemon)
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_distributed(
    function: Callable, *arguments: Any, num_processes: int = 2
) -> tuple[list[multiprocessing.Process], Any]:
    """
    Starts `function(*arguments)` in several processes that Accelerate joins; and the queue of their results. They may
    start processes of their own, such as the workers of a data loader, so they are no daemons: end them.
    """
    port, queue = free_port(), CONTEXT.SimpleQueue()
    processes = [
        start(_run_rank, rank, num_processes, port, queue, function, arguments, daemon=False)
        for rank in range(num_processes)
    ]
    return processes, queue


def run_distributed(function: Callable, *arguments: Any, num_processes: int = 2, timeout: float = 60) -> list[Any]:
    """The results of `function(*arguments)` in each of several processes that Accelerate joins (gloo, on the CPU)."""
    processes, queue = start_distributed(function, *arguments, num_processes=num_processes)
    try:
        for process in processes:
            process.join(timeout=timeout)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    if codes != [0] * num_processes:
        raise RuntimeError(f"The processes ended with exit codes {codes} (None: not within {timeout} seconds).")
    return [result for _, result in sorted(queue.get() for _ in processes)]


def kill_distributed(function: Callable, *arguments: Any, once: Callable[[], bool], within: float) -> None:
    """
    Starts `function(*arguments)` in two processes, and ends them with SIGKILL at a random time up to `within` seconds
    after `once()` first holds. The function calls `os.setsid()`, so that what it starts is killed with it.
    """
    processes, _ = start_distributed(function, *arguments)
    try:
        while not once() and all(process.is_alive() for process in processes):
            time.sleep(0.01)
        time.sleep(random.SystemRandom().uniform(0, within))
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if codes != [-signal.SIGKILL] * len(processes):
        raise RuntimeError(f"The processes ended by themselves, with exit codes {codes}.")


def start_script(
    script: str,
    argv: list[str],
    log: str | os.PathLike,
    num_processes: int = 1,
    folder: str | os.PathLike | None = None,
    prelude: Callable[[], None] | None = None,
) -> list[multiprocessing.Process]:
    """
    Starts a script of training/ as its command would run, in processes that Accelerate joins on the CPU. Each is the
    leader of a process group, and ends with the exit code of the command.

    Args:
        script (`str`): Its name.
        argv (list of `str`): Its arguments.
        log (`str` or `os.PathLike`): File that all of them append to what they print.
        folder (`str` or `os.PathLike`, *optional*): Where it runs; `None`: in the present folder.
        prelude (function of a module, *optional*): Called in each process before.
    """
    port = free_port()
    rest = (num_processes, port, script, argv, str(Path(log).resolve()), folder, prelude)
    return [start(_run_script, rank, *rest, daemon=False) for rank in range(num_processes)]


def run_script(
    script: str,
    argv: list[str],
    log: str | os.PathLike,
    num_processes: int = 1,
    folder: str | os.PathLike | None = None,
) -> str:
    """What a script prints that runs as [`start_script`] says. Raises a `RuntimeError` with it unless it succeeds."""
    Path(log).unlink(missing_ok=True)
    processes = start_script(script, argv, log, num_processes, folder)
    try:
        for process in processes:
            process.join(timeout=240)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    printed = Path(log).read_text(encoding="utf-8")
    if codes != [0] * num_processes:
        raise RuntimeError(f"The processes ended with exit codes {codes} (None: not within 240 seconds):\n{printed}")
    return printed


def _run_script(
    rank: int,
    num_processes: int,
    port: int,
    script: str,
    argv: list[str],
    log: str,
    folder: str | os.PathLike | None,
    prelude: Callable[[], None] | None,
) -> None:
    os.setsid()  # so that what it starts can be killed with it
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    if folder is not None:
        os.chdir(folder)
    # As in a launched run. By the fork server, workers would do all imports again.
    multiprocessing.set_start_method("fork", force=True)
    import torch
    from scripts import load_script

    from diffusers_adm.commands.errors import run_command

    os.environ["ACCELERATE_USE_CPU"] = "true"
    if num_processes > 1:
        os.environ |= _variables(rank, num_processes, port)
    torch.set_num_threads(1)
    if prelude is not None:
        prelude()
    run_command(lambda: load_script(script).main(argv))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _variables(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """What launchers tell each process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _run_rank(rank: int, num_processes: int, port: int, queue: Any, function: Callable, arguments: tuple) -> None:
    os.environ |= {**_variables(rank, num_processes, port), "ACCELERATE_USE_CPU": "true"}
    import torch

    torch.set_num_threads(1)
    queue.put((rank, function(*arguments)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
