"""Runs the app of the Space in a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest


APP = Path(__file__).parents[2] / "spaces" / "app.py"
START_SECONDS = 300


@contextlib.contextmanager
def running_app(models: Path, home: Path, *arguments: str) -> Iterator[str]:
    """
    Yields the address of the app, once it answers. `home` is for its caches and its log; by default Gradio shares one
    folder among all apps.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "GRADIO_TEMP_DIR": str(home),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    command = [sys.executable, str(APP), "--models", str(models), "--port", str(port), *arguments]
    log = home / "log"
    with log.open("w") as file:
        app = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, app, log)
        yield address
    finally:
        app.terminate()
        app.wait(30)


def _wait_for(address: str, app: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if app.poll() is not None:
            pytest.fail(f"The app ended:\n{log.read_text()}")
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"The app does not answer:\n{log.read_text()}")
