"""
The Space under load: many clients call it at once on this machine, some with invalid values, some leave in the middle.

    python benchmarks/load_space.py [--models spaces/model] [--clients 50] [--requests 300] [--json results.json]

Each request is for one image with 10 steps; a fifth of them are invalid, and a tenth of the clients leave at the first
preview, half of them by cancelling and half by closing the connection. Clients that get "busy" try again. The table
counts the requests that were served, got "busy", were refused with their reason, or failed, and gives latencies and the
memory of the app after a sixth and after all of the requests. Exit code 1 if a request failed.

The app is a process of this script with its usual limits; each client has an address of its own, as from a proxy. The
traffic stays on 127.0.0.1. It starts once the examples of the page are cached, which with the models of the repository
takes as long as some 60 requests. After `--seconds` nothing more is sent, and what was not sent is counted. Every half
minute a line says how far it is.
"""

import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio_client
import httpx
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError
from measuring import describe_machine, make_parser, write_report
from space_process import START_SECONDS, answers, app, wait_for


REQUEST = {
    **{"prompt": "fire", "category": "any", "guidance_scale": 2.0, "classifier_scale": 0, "steps": 10},
    **{"sampler": "DPM-Solver++", "seed": 0, "num_images": 1, "upscale": False},
}
INVALID = [  # what changes, and a part of the reason
    ({"steps": 1000}, "It must be an integer from 2 to 100"),
    ({"num_images": 50}, "It must be an integer from 1 to 8"),
    ({"prompt": "x" * 500}, "at most 200 are allowed"),
    ({"category": "unicorns"}, "Choose one of"),
    ({"guidance_scale": "much"}, "It must be a number from 1 to 10"),
    ({"seed": -1}, "It must be an integer from 0"),
]
SECONDS_BETWEEN_TRIES = 3.0  # more often than 30 times a minute is not allowed
EXAMPLES_SECONDS = 900  # until the examples are cached, on a busy machine
SECONDS_BETWEEN_REPORTS = 30
GAVE_UP = "busy until the end of the time"
FIRST_SHARE = 6  # the memory is read after this part of the requests, and at the end


class Load:
    """Requests of many clients, and what became of them."""

    def __init__(self, address: str, clients: int, end: float, folder: Path):
        self.address = address
        self.end = end
        self.outcomes: Counter[str] = Counter()
        self.latencies: list[float] = []  # of served requests, with all waiting
        self.failures: list[str] = []
        self.sent = 0
        self._report = time.monotonic() + SECONDS_BETWEEN_REPORTS
        self._lock = threading.Lock()
        with ThreadPoolExecutor(min(clients, 8)) as pool:
            self.clients = list(pool.map(lambda number: self._connect(number, folder), range(clients)))

    def _connect(self, number: int, folder: Path) -> gradio_client.Client:
        headers = {"X-Forwarded-For": f"198.18.{number // 250}.{number % 250 + 1}"}
        return gradio_client.Client(
            self.address, verbose=False, headers=headers, download_files=str(folder / f"client-{number}")
        )

    def run(self, numbers: range) -> None:
        """Sends these requests, each client one at a time."""
        left = iter(numbers)

        def work(client: gradio_client.Client) -> None:
            while True:
                with self._lock:
                    number = next(left, None) if time.monotonic() < self.end else None
                    self.sent += number is not None
                if number is None:
                    return
                self._request(client, number)

        threads = [threading.Thread(target=work, args=(client,)) for client in self.clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(max(0.1, self._report - time.monotonic()))
                self._tell()

    def _tell(self) -> None:
        if time.monotonic() < self._report:
            return
        self._report = time.monotonic() + SECONDS_BETWEEN_REPORTS
        with self._lock:
            ended = sum(self.outcomes.values()) - self.outcomes["busy, then tried again"]
        left = self.end - time.monotonic()
        print(f"{ended} requests have ended, {self.sent - ended} are under way, {left:.0f} s left", flush=True)

    def _request(self, client: gradio_client.Client, number: int) -> None:
        start = time.monotonic()
        try:
            for tries in itertools.count():
                if tries and time.monotonic() > self.end:
                    self._count(GAVE_UP)
                    return
                try:
                    outcome = self._try(client, number)
                    break
                except QueueError:
                    wait = SECONDS_BETWEEN_TRIES
                except httpx.HTTPStatusError as error:
                    if error.response.status_code != 429:
                        raise
                    wait = float(error.response.headers["retry-after"])
                if tries == 0:
                    self._count("busy, then tried again")
                time.sleep(wait * random.uniform(1, 1.5))
        except Exception as error:
            self._count("failed")
            self.failures.append(f"request {number}: {type(error).__name__}: {error}")
            return
        self._count(outcome)
        if outcome == "served":
            self.latencies.append(time.monotonic() - start)

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1

    def _try(self, client: gradio_client.Client, number: int) -> str:
        request = {**REQUEST, "seed": number}
        if number % 5 == 4:
            change, reason = INVALID[number // 5 % len(INVALID)]
            try:
                client.predict(**request | change, api_name="/generate")
            except AppError as error:
                if reason not in str(error):
                    raise
                return "invalid, refused with the reason"
            raise ValueError(f"{change} was served.")
        if number % 20 == 3:
            return self._cancel(client, request)
        if number % 20 == 13:
            return self._hang_up(client, request)
        images, status, *_ = client.predict(**request, api_name="/generate")
        if status != "Done." or len(images) != 1 or not Path(images[0]["image"]).stat().st_size:
            raise ValueError(f"The answer is {status}, {images}.")
        return "served"

    def _cancel(self, client: gradio_client.Client, request: dict[str, Any]) -> str:
        job = client.submit(**request, api_name="/generate")
        while not job.outputs() and not job.done():
            time.sleep(0.02)
        if job.done() and job.exception() is not None:
            raise job.exception()
        job.cancel()
        return "left in the middle"

    def _hang_up(self, client: gradio_client.Client, request: dict[str, Any]) -> str:
        headers = {"X-Forwarded-For": client.headers["X-Forwarded-For"]}
        with httpx.Client(base_url=self.address, headers=headers, timeout=None) as http:
            answer = http.post("/gradio_api/call/generate", json={"data": list(request.values())})
            if answer.status_code == 503:
                raise QueueError(answer.text)
            event = answer.raise_for_status().json()["event_id"]
            with http.stream("GET", f"/gradio_api/call/generate/{event}") as stream:
                next(line for line in stream.iter_lines() if line.startswith(("event: generating", "event: complete")))
        return "left in the middle"


def memory(pid: int) -> float:
    """Resident memory of a process in MiB, without threads or buffers of calls that still end."""
    time.sleep(2)
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def examples_are_cached(home: Path, number: int) -> bool:
    return sum(len(path.read_text().split()) for path in home.rglob("indices.csv")) == number


def measure(models: Path, clients: int, requests: int, seconds: float, keep_seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with app(models, home, "--keep_seconds", str(keep_seconds)) as (address, pid):
            wait_for("page", START_SECONDS, lambda: answers(address))
            config = gradio_client.Client(address, verbose=False).config
            examples = next(
                (part["props"]["samples"] for part in config["components"] if part["type"] == "dataset"), []
            )
            wait_for("examples", EXAMPLES_SECONDS, lambda: examples_are_cached(home, len(examples)))
            load = Load(address, clients, time.monotonic() + seconds, home / "downloads")
            first = requests // FIRST_SHARE
            start = time.monotonic()
            load.run(range(first))
            before = memory(pid)
            load.run(range(first, requests))
            duration = time.monotonic() - start
            after = memory(pid)
            busy = processor_seconds(pid)
            time.sleep(3)
            busy = (processor_seconds(pid) - busy) / 3
            time.sleep(keep_seconds)
            files = [path for path in (home / "files").rglob("*") if path.is_file()]
            log = (home / "log").read_text(encoding="utf-8", errors="replace")
    latencies = sorted(load.latencies) or [float("nan")]
    percentiles = statistics.quantiles(latencies, n=20, method="inclusive") if len(latencies) > 1 else latencies * 19
    for failure in load.failures:
        print(failure, file=sys.stderr)
    return {
        **{name: load.outcomes[name] for name in ("served", "invalid, refused with the reason", "left in the middle")},
        "busy, then tried again": load.outcomes["busy, then tried again"],
        GAVE_UP: load.outcomes[GAVE_UP],
        "not sent, as the time was over": requests - load.sent,
        "failed": load.outcomes["failed"],
        "errors in the log of the app": log.count("ERROR"),
        "latency, median (s)": percentiles[9],
        "latency, 95% (s)": percentiles[18],
        "requests per second": (load.sent - load.outcomes[GAVE_UP]) / duration,
        f"memory after {min(first, load.sent)} requests (MiB)": before,
        f"memory after {load.sent} requests (MiB)": after,
        "growth of the memory (%)": (after / before - 1) * 100,
        "processors in use after the last request": busy,
        f"files on disk {keep_seconds:g} s after the last request": len(files),
    }


def main() -> None:
    options = {"clients": 50, "requests": 300, "seconds": 900.0, "keep_seconds": 60.0}
    parser = make_parser(__doc__, models=Path("spaces/model"), json=None, **options)
    args = parser.parse_args()
    print(describe_machine())
    print(f"{args.clients} clients, {args.requests} requests of one image with {REQUEST['steps']} steps", flush=True)
    results = measure(args.models, args.clients, args.requests, args.seconds, args.keep_seconds)
    for name, value in results.items():
        print(f"{name:48} {value:9}" if isinstance(value, int) else f"{name:48} {value:9.2f}")
    write_report(args.json, args, **results)
    raise SystemExit(1 if results["failed"] else 0)


if __name__ == "__main__":
    main()
