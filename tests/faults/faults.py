#!/usr/bin/env python
"""
Breaks training runs in the ways in which runs break, resumes them, and compares them with unbroken ones.

    python tests/faults/faults.py --short     # what continuous integration runs, some minutes
    python tests/faults/faults.py             # `make faults`

Everything is compared bit by bit, in the set-up for which docs/reproducibility.md promises it: a CPU, float32, one
thread, MKL_CBWR=COMPATIBLE. Prints a table for docs/reliability.md; exits with 1 if a fault was not survived.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq


# Before torch is imported, here and in the server of the processes.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
os.environ |= {"HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parent))

from histories import AIMS, Laboratory, Setup, Tally  # noqa: E402
from runs import EMOJI  # noqa: E402
from tiny_autoencoders import save_vae  # noqa: E402
from toy_models import TOY_CONFIG  # noqa: E402

from diffusers_adm.commands.errors import STOPPED_EARLY_EXIT_CODE  # noqa: E402
from diffusers_adm.training import find_latest_checkpoint  # noqa: E402
from diffusers_adm.training.reproducibility import operations_that_depend_on_memory  # noqa: E402


# A fault that the job must report by its end, not by a hang.
MINUTE = 60.0
STREAMING = "streaming, two workers"


# 1. Set-ups


def build_setups(folder: Path) -> dict[str, Setup]:
    """The kinds of run by name; `folder` gets what they read."""
    folder.mkdir(parents=True, exist_ok=True)
    config, latent_config = folder / "model.json", folder / "latent_model.json"
    config.write_text(json.dumps({"dropout": 0.1, **TOY_CONFIG}))
    latent_config.write_text(json.dumps({"dropout": 0.1, **TOY_CONFIG, "in_channels": 4, "out_channels": 8}))
    common = {
        "model_config_name_or_path": str(config),
        "data_files": EMOJI,
        "label_column": "label",
        "resolution": 8,
        "random_flip": True,
        "train_batch_size": 8,
        "max_train_steps": 40,
        "checkpointing_steps": 4,
        "checkpoints_total_limit": 3,
        "logging_steps": 2,
        "validation_steps": 10,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 4,
        "num_validation_images": 2,
        "validation_num_inference_steps": 2,
        "cache_dir": str(folder / "cache"),
        "report_to": "none",
    }
    importance = {"timestep_sampler": "loss-second-moment", "ddpm_num_steps": 4}
    latents = {"vae": save_vae(folder / "vae"), "model_config_name_or_path": str(latent_config), "resolution": 16}
    table = pq.read_table(EMOJI)
    for number in range(4):
        pq.write_table(table.slice(number * 40, 40), folder / f"shard-{number}.parquet")
    shards = {"data_files": str(folder / "shard-*.parquet"), "streaming": True, "shuffle_buffer_size": 16}
    setups = [
        Setup("uniform timesteps, EMA", common),
        Setup("importance-sampled timesteps", common | importance),
        Setup("no EMA", common | {"use_ema": False}),
        Setup("power-function EMA", common | {"power_ema_stds": [0.05, 0.1]}),
        Setup("gradient accumulation", common | {"gradient_accumulation_steps": 2}),
        Setup("latents", common | latents),
        Setup(STREAMING, common | shards | {"dataloader_num_workers": 2}),
        Setup("two processes", common | importance | {"dataloader_num_workers": 1}, num_processes=2),
    ]
    return {setup.name: setup for setup in setups}


# 2. Faults


def kill_at_random(laboratory: Laboratory, kills: int) -> list[Tally]:
    """`kill -9` at all of `AIMS` in turn, as often as told over one or more histories, each compared at its end."""
    tally = Tally(f"`kill -9` ({', '.join(aim.name for aim in AIMS)}): {laboratory.setup.name}")
    folder, killed_at = laboratory.new_folder(), []
    while tally.tried < kills:
        # The last two can only be met again in a new history once the run is over.
        aim = AIMS[(tally.tried + len(killed_at)) % len(AIMS)]
        if laboratory.killed_at(folder, aim):
            killed_at.append(aim.name)
        is_over = (folder / "model_index.json").is_file()
        if killed_at and (is_over or aim is AIMS[-1] or tally.tried + len(killed_at) >= kills):
            fault = laboratory.finish(folder)
            for name in killed_at:
                tally.count(not fault, f"{name}: {fault}")
            laboratory.clean(folder)
            folder, killed_at = laboratory.new_folder(), []
    return [tally]


def damage_checkpoints(laboratory: Laboratory, times: int) -> list[Tally]:
    """A file of the newest checkpoint is cut short, altered or deleted: the run must go on from the one before."""
    tallies = {how: Tally(f"newest checkpoint: a file {how}") for how in ("cut short", "altered", "deleted")}
    for number in range(times):
        folder, how = laboratory.new_folder(), list(tallies)[number % 3]
        attempt = laboratory.start(folder)
        attempt.wait(lambda folder=folder: len(list(folder.glob("checkpoint-*"))) >= 2)
        attempt.kill()
        attempt.join()
        newest = Path(find_latest_checkpoint(folder))
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        file = laboratory.random.choice(files)
        content = bytearray(file.read_bytes())
        if how == "cut short":
            file.write_bytes(content[: laboratory.random.randrange(len(content))])
        elif how == "altered":
            content[laboratory.random.randrange(len(content))] ^= 1 << laboratory.random.randrange(8)
            file.write_bytes(content)
        else:
            file.unlink()
        fault = laboratory.finish(folder)
        printed = laboratory_log(folder)
        if not fault and newest.name not in printed:
            fault = f"no word about {newest.name} in the log"
        tallies[how].count(not fault, f"{file.relative_to(newest)}: {fault}")
        laboratory.clean(folder)
    return list(tallies.values())


def laboratory_log(folder: Path) -> str:
    return folder.with_name(f"{folder.name}.log").read_text()


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes in this folder; needs root on Linux."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_disks(laboratory: Laboratory, times: int) -> list[Tally]:
    """
    The disk is full after a random part of a run: in a checkpoint, a line of the log or the final save. The run must
    end with an error that says so, keep the checkpoints that it has, and go on when there is room again.
    """
    tally = Tally("disk full at a random byte")
    needed = sum(path.stat().st_size for path in laboratory.unbroken.rglob("*") if path.is_file())
    for number in range(times):
        disk = laboratory.folder / f"disk-{number}"
        with small_disk(disk, 4 * needed + 2**20):
            balloon, folder = disk / "balloon", disk / "run"
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            room = int(laboratory.random.uniform(0.05, 1.0) * needed)
            with open(balloon, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, free - room)
            (disk / "run.log").symlink_to(laboratory.folder / f"disk-{number}.log")
            attempt = laboratory.start(folder)
            (code,) = attempt.join()
            printed, fault = attempt.printed, ""
            before = {path.name for path in folder.glob("checkpoint-*")}
            if code == 0 or code is None:
                fault = f"ended with {code} in {room} bytes"
            elif "disk" not in printed.lower() and "space" not in printed.lower():
                fault = f"no word about the disk: {printed[-500:]}"
            balloon.unlink()
            fault = fault or laboratory.finish(folder)
            after = {path.name for path in folder.glob("checkpoint-*")} if not fault else before
            if not fault and not after:
                fault = "no checkpoint left"
            tally.count(not fault, fault)
    return [tally]


def stop_politely(laboratory: Laboratory, times: int) -> list[Tally]:
    """SIGTERM and SIGUSR1 at a random moment: a checkpoint, the documented exit code, and on; a second one: at once."""
    tallies = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        tally = Tally(f"{number.name}: {laboratory.setup.name}")
        for _ in range(times):
            folder = laboratory.new_folder()
            attempt = laboratory.start(folder)
            attempt.wait(lambda folder=folder: (folder / "metrics.jsonl").is_file())
            time.sleep(laboratory.random.uniform(0.0, 0.5 * laboratory.seconds))
            was_running, before = attempt.is_running(), find_latest_checkpoint(folder)
            attempt.kill(number, ranks=[laboratory.random.randrange(laboratory.setup.num_processes)])
            codes = attempt.join()
            if not was_running and codes == [0] * len(codes):  # it had ended by itself
                continue
            fault = ""
            is_over = (folder / "model_index.json").is_file() and codes == [0] * len(codes)
            if not is_over and codes != [STOPPED_EARLY_EXIT_CODE] * len(codes):
                fault = f"ended with {codes}: {attempt.printed[-1000:]}"
            elif find_latest_checkpoint(folder) is None:
                fault = f"left no checkpoint (before: {before})"
            fault = fault or laboratory.finish(folder, has_further_rows=True)
            tally.count(not fault, fault)
            laboratory.clean(folder)
        tallies.append(tally)
    tally = Tally(f"two signals: {laboratory.setup.name}")
    folder = laboratory.new_folder()
    attempt = laboratory.start(folder)
    attempt.wait(lambda: (folder / "metrics.jsonl").is_file())
    attempt.kill(signal.SIGTERM)
    time.sleep(0.001)
    attempt.kill(signal.SIGTERM)
    start = time.monotonic()
    codes = attempt.join()
    fault = "" if time.monotonic() - start < 10 and None not in codes else f"ended with {codes}"
    fault = fault or laboratory.finish(folder, has_further_rows=True)
    tally.count(not fault, fault)
    laboratory.clean(folder)
    return [*tallies, tally]


def children_of(process: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for path in Path("/proc", str(process), "task").glob("*/children"):
        found += map(int, path.read_text().split())
    return found


def kill_parts(laboratory: Laboratory, times: int) -> list[Tally]:
    """One of several processes is killed, or a worker of a loader: the job must end within a minute, not hang."""
    is_distributed = laboratory.setup.num_processes > 1
    tallies = [Tally("a worker of the data loader killed")] + [Tally("one rank killed")] * is_distributed
    for tally in tallies:
        for _ in range(times):
            folder = laboratory.new_folder()
            attempt = laboratory.start(folder)
            attempt.wait(lambda folder=folder: (folder / "metrics.jsonl").is_file())
            rank = laboratory.random.randrange(laboratory.setup.num_processes)
            process = attempt.processes[rank].pid
            if "rank" in tally.fault:
                attempt.kill(ranks=[rank])
            else:
                attempt.wait(lambda process=process: bool(children_of(process)))
                for child in children_of(process)[-1:]:
                    os.kill(child, signal.SIGKILL)
            start = time.monotonic()
            codes = attempt.join(MINUTE)
            printed, fault = attempt.printed, ""
            if None in codes or 0 in codes:
                fault = f"ended with {codes} after {time.monotonic() - start:.0f} s"
            elif "error" not in printed.lower():
                fault = f"no message: {printed[-500:]}"
            fault = fault or laboratory.finish(folder)
            tally.count(not fault, fault)
            laboratory.clean(folder)
    return tallies


# 3. The whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="Fewer faults of each kind.")
    parser.add_argument("--seed", type=int, help="Seed of the moments; none: a new one, which is printed.")
    parser.add_argument("--only", help="Only the faults of functions whose name holds this word.")
    args = parser.parse_args()
    if found := operations_that_depend_on_memory():
        sys.exit(f"error: on this machine {', '.join(found)} depend on memory addresses: nothing can be compared.")
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"Seed of the moments: {seed}", flush=True)
    generator = random.Random(seed)
    short = args.short
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        setups = build_setups(Path(root) / "inputs")
        first, both = setups["uniform timesteps, EMA"], setups["two processes"]
        jobs: list[tuple[Callable[[Laboratory, int], list[Tally]], Setup, int]] = []
        # Of streams, the suite has a test with a kill of its own.
        killed = [setup for name, setup in setups.items() if not short or name not in ("no EMA", STREAMING)]
        jobs += [(kill_at_random, setup, 4 if short else 20) for setup in killed]
        jobs += [(damage_checkpoints, first, 6 if short else 30)]
        jobs += [(stop_politely, setup, 1 if short else 5) for setup in (first, both)]
        jobs += [(kill_parts, both, 1 if short else 3)]
        if os.geteuid() == 0 and sys.platform == "linux":
            jobs += [(fill_disks, first, 4 if short else 20)]
        else:
            print("A small disk needs root on Linux: skipped.")
        laboratories: dict[str, Laboratory] = {}
        for function, setup, times in jobs:
            if args.only and args.only not in function.__name__:
                continue
            start = time.monotonic()
            if setup.name not in laboratories:
                folder = Path(root) / f"setup-{len(laboratories)}"
                laboratories[setup.name] = Laboratory(setup, folder, generator)
            found = function(laboratories[setup.name], times)
            tallies += found
            for tally in found:
                if tally.tried:
                    print(f"{tally.fault}: {tally.survived} of {tally.tried} survived", flush=True)
                for note in tally.notes:
                    print(f"    {note}", flush=True)
            print(f"  ({time.monotonic() - start:.0f} s)", flush=True)
    print_table(tallies)
    sys.exit(any(tally.survived < tally.tried for tally in tallies))


def print_table(tallies: list[Tally]) -> None:
    """The table of docs/reliability.md."""
    print("\n| fault | tried | survived | lost |\n| --- | --- | --- | --- |")
    for tally in tallies:
        if tally.tried:
            print(f"| {tally.fault} | {tally.tried} | {tally.survived} | {tally.tried - tally.survived} |")
    tried, survived = sum(tally.tried for tally in tallies), sum(tally.survived for tally in tallies)
    print(f"| **all** | {tried} | {survived} | {tried - survived} |")


if __name__ == "__main__":
    main()
