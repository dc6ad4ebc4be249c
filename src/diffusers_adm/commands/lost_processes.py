"""Plain words for the errors of a command that has lost a process: a worker of its data loader, or another rank."""

from __future__ import annotations

import sys


WORKER = "DataLoader worker"
# What gloo reports when the other side has gone.
CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
    "Timed out waiting",
)
RESUME = "A training goes on with `--resume_from_checkpoint latest`."


def explain_lost_process(error: BaseException) -> str | None:
    """What happened, and what to do; `None` for an error of another kind."""
    lines = str(error).strip().splitlines()
    if not isinstance(error, RuntimeError) or not lines:
        return None
    if lines[0].startswith(WORKER):
        return (
            f"A worker process of the data loader has ended ({lines[0].strip()}). Usually the system has killed it for "
            f"lack of memory: pass a smaller `--dataloader_num_workers`. {RESUME}"
        )
    if _is_distributed(error) or any(text in line for line in lines for text in CONNECTION):
        return (
            f"The connection to another process is lost ({lines[0].strip()}). That process has failed or was killed: "
            f"see its messages, which may be on another machine. {RESUME}"
        )
    return None


def _is_distributed(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # commands that fail before they need it do not wait for its import
    kind = getattr(getattr(torch, "distributed", None), "DistError", None)
    return kind is not None and isinstance(error, kind)
