"""
Waiting times of a visitor of the Space: `python spaces/app.py` in a process of its own, called through its API.

    python benchmarks/bench_space.py [--models spaces/model] [--calls 5] [--json results.json]

From the start of the process, with empty caches: until the page answers, until the first preview of the first visitor
(4 images of a prompt with 25 steps of the page's model) and until the images are ready, while the examples are
generated, as on a new machine. Then, with cached examples: the same call repeatedly, how long the page takes to answer
meanwhile, a plain call of the pipeline in a process of its own for comparison, and `from_pretrained` after the imports,
in fresh processes.
Results in seconds, without limits; other programs disturb them.
"""

import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import gradio_client
import torch
from diffusers import DPMSolverMultistepScheduler
from measuring import describe_machine, in_fresh_process, make_parser, quiet, seeded, write_report
from space_process import ROOT, START_SECONDS, answers, app, wait_for

from diffusers_adm import ADMPipeline


EXAMPLES_SECONDS = 600
NUM_IMAGES, NUM_STEPS = 4, 25
PROMPT, GUIDANCE_SCALE = "fire", 4.0
MODELS = ("latents", "base")  # the page's choice is the first one that is there
REQUEST = {
    **{"prompt": PROMPT, "category": "any", "guidance_scale": GUIDANCE_SCALE, "classifier_scale": 0, "seed": 0},
    **{"steps": NUM_STEPS, "sampler": "DPM-Solver++", "num_images": NUM_IMAGES, "upscale": False},
}


def generate(client: gradio_client.Client) -> tuple[float, float]:
    """Clock readings at the first preview and at the final images."""
    first = None
    job = client.submit(**REQUEST, api_name="/generate")
    for _ in job:
        first = first or time.monotonic()
    job.result()
    return first, time.monotonic()


def latencies(address: str, until: threading.Event) -> list[float]:
    """Times of requests for the page, one after another, 0.2 s apart."""
    times = []
    while not until.wait(0.2):
        start = time.monotonic()
        urllib.request.urlopen(address, timeout=30).close()
        times.append(time.monotonic() - start)
    return times


def measure_app(models: Path, calls: int) -> Iterator[tuple[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        home, start = Path(folder), time.monotonic()
        with app(models, home) as (address, _):
            wait_for("page", START_SECONDS, lambda: answers(address))
            yield "page answers", time.monotonic() - start
            client = gradio_client.Client(address, verbose=False, download_files=str(home / "downloads"))
            preview, images = generate(client)
            yield "first preview", preview - start
            yield "first images", images - start
            examples = next(part["props"] for part in client.config["components"] if part["type"] == "dataset")

            def examples_are_cached() -> bool:
                indices = [index for path in home.rglob("indices.csv") for index in path.read_text().split()]
                return len(indices) == len(examples["samples"])

            wait_for("examples", EXAMPLES_SECONDS, examples_are_cached)
            yield "examples are cached", time.monotonic() - start

            times, done, answered = [], threading.Event(), []
            watcher = threading.Thread(target=lambda: answered.extend(latencies(address, done)))
            watcher.start()
            for _ in range(calls):
                start = time.monotonic()
                times.append(generate(client)[1] - start)
            done.set()
            watcher.join()
    yield "call", statistics.median(times)
    yield "page during a call", statistics.median(answered)
    yield "page during a call, slowest", max(answered)


def plain_calls(folder: Path, calls: int) -> list[float]:
    """Times of `from_pretrained`, and of what the Space does without the page: the same solver and networks."""
    variant = "fp16" if any(folder.rglob("*.fp16.safetensors")) else None
    times, start = [], time.perf_counter()
    pipe = ADMPipeline.from_pretrained(folder, variant=variant, dtype=torch.float32)
    times.append(time.perf_counter() - start)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, variance_type=None)
    options = {"num_inference_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE}
    for _ in range(calls):
        start = time.perf_counter()
        quiet(pipe)(PROMPT, num_images_per_prompt=NUM_IMAGES, generator=seeded(0, NUM_IMAGES), **options)
        times.append(time.perf_counter() - start)
    return times


def measure_pipeline(models: Path, calls: int) -> Iterator[tuple[str, float]]:
    model = next(models / name for name in MODELS if (models / name).is_dir())
    loads = [in_fresh_process(plain_calls, model, 0)[0] for _ in range(2)]
    load, *times = in_fresh_process(plain_calls, model, calls)
    yield "from_pretrained", statistics.median([*loads, load])
    yield "plain call", statistics.median(times)


def main() -> None:
    parser = make_parser(__doc__, "json", models=ROOT / "spaces" / "model")
    parser.add_argument("--calls", type=int, default=5, help="Timed calls; the median counts.")
    args = parser.parse_args()

    print(describe_machine())
    print(f"{NUM_IMAGES} images, {NUM_STEPS} steps, guidance; medians of {args.calls} calls; seconds")
    results = {}
    for measure in (measure_app, measure_pipeline):
        for name, value in measure(args.models, args.calls):
            results[name] = value
            print(f"{name:30} {value:8.3f}", flush=True)
    print(f"{'call / plain call':30} {results['call'] / results['plain call']:8.3f}")
    write_report(args.json, args, **results)


if __name__ == "__main__":
    main()
