"""`python spaces/app.py` as a process, for the benchmarks of the Space."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


ROOT = Path(__file__).parents[1]
APP = ROOT / "spaces" / "app.py"
START_SECONDS = 180


@contextmanager
def app(models: Path, home: Path, *arguments: str) -> Iterator[tuple[str, int]]:
    """Runs the app with its own caches in `home`; yields its address, which may not answer yet, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment |= {"GRADIO_TEMP_DIR": str(home / "files"), "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, str(APP), "--models", str(models), "--port", str(port), *arguments]
    (home / "files").mkdir()
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(30)


def wait_for(what: str, seconds: float, is_ready: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not is_ready():
        if time.monotonic() > end:
            raise TimeoutError(f"No {what} within {seconds:.0f} s.")
        time.sleep(0.05)


def answers(address: str) -> bool:
    with suppress(OSError):
        urllib.request.urlopen(address, timeout=5).close()
        return True
    return False
