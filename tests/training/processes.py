"""Real processes for tests: cheap to start, because they are forked from a server that has done the imports."""

import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from typing import Any


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["diffusers_adm.training"])


def start(function: Callable, *arguments: Any, daemon: bool = True) -> multiprocessing.Process:
    """Starts `function(*arguments)`, a function of a module, in a process of its own."""
    process = CONTEXT.Process(target=function, args=arguments, daemon=daemon)
    process.start()
    return process


def start_distributed(
    function: Callable, *arguments: Any, num_processes: int = 2
) -> tuple[list[multiprocessing.Process], Any]:
    """
    Starts `function(*arguments)` in several processes that Accelerate joins; and the queue of their results. They may
    start processes of their own, such as the workers of a data loader, so they are no daemons: end them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = CONTEXT.SimpleQueue()
    processes = [
        start(_run_rank, rank, num_processes, port, queue, function, arguments, daemon=False)
        for rank in range(num_processes)
    ]
    return processes, queue


def run_distributed(function: Callable, *arguments: Any, num_processes: int = 2) -> list[Any]:
    """The results of `function(*arguments)` in each of several processes that Accelerate joins (gloo, on the CPU)."""
    processes, queue = start_distributed(function, *arguments, num_processes=num_processes)
    try:
        for process in processes:
            process.join(timeout=60)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    if codes != [0] * num_processes:
        raise RuntimeError(f"The processes ended with exit codes {codes} (None: not within 60 seconds).")
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


def _run_rank(rank: int, num_processes: int, port: int, queue: Any, function: Callable, arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    import torch

    torch.set_num_threads(1)
    queue.put((rank, function(*arguments)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
