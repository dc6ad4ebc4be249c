"""
Start-up time: what `import diffusers_adm` adds to importing diffusers, and how long the demonstration models load.

    python benchmarks/bench_start.py [--pairs 5] [--models spaces/model] [--json results.json]

Every run is a fresh process, with and without this package in turn; a first pair, not counted, warms the disk cache.
The import is measured in two ways: as the difference between the medians of whole processes, and, less disturbed by the
rest of the machine, as the time of the statement itself after that of diffusers in one process. Loading is
`from_pretrained` after the imports, summed over the folders of `--models`. Fails if either measure of the import
exceeds 0.5 s, or loading 3 s.
"""

import statistics
import subprocess
import sys
from pathlib import Path

from measuring import alternate, describe_machine, finish, make_parser


IMPORT_LIMIT, LOADING_LIMIT = 0.5, 3.0  # seconds
THEIRS = "from diffusers import DiffusionPipeline, UNet2DModel, DDPMScheduler"
OURS = f"""
import time
{THEIRS}
start = time.perf_counter()
import diffusers_adm
print(time.perf_counter() - start)
"""
LOADING = """
import sys, time
from pathlib import Path
from diffusers import AutoModel, DiffusionPipeline
import diffusers_adm
for folder in map(Path, sys.argv[1:]):
    loader = DiffusionPipeline if (folder / "model_index.json").is_file() else AutoModel
    variant = "fp16" if list(folder.rglob("*.fp16.safetensors")) else None
    start = time.perf_counter()
    loader.from_pretrained(str(folder), variant=variant)
    print(time.perf_counter() - start)
"""


def run(code: str, *arguments: Path) -> list[float]:
    """The numbers that a fresh process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return [
        float(line) for line in subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    ]


def verdict(passed: bool) -> str:
    return "ok" if passed else "FAILED"


def measure_import(pairs: int) -> dict[str, float]:
    statements: list[float] = []
    times = alternate(lambda: statements.extend(run(OURS)), lambda: run(THEIRS), pairs, "cpu")
    ours, theirs = statistics.median(times["ours"]), statistics.median(times["theirs"])
    statement = statistics.median(statements[-pairs:])  # without that of the first pair
    passed = max(ours - theirs, statement) <= IMPORT_LIMIT
    print(f"process that imports diffusers                   {theirs:6.2f}")
    print(f"process that imports diffusers and diffusers_adm {ours:6.2f}")
    print(f"difference {ours - theirs:.2f}, the statement {statement:.2f} (limit {IMPORT_LIMIT})  {verdict(passed)}")
    return {"with": ours, "without": theirs, "difference": ours - theirs, "statement": statement, "passed": passed}


def measure_loading(models: Path, runs: int) -> dict[str, float]:
    folders = sorted(folder for folder in models.iterdir() if folder.is_dir())
    medians = map(statistics.median, zip(*(run(LOADING, *folders) for _ in range(runs)), strict=True))
    loading = {folder.name: elapsed for folder, elapsed in zip(folders, medians, strict=True)}
    parts, total = ", ".join(f"{name} {elapsed:.2f}" for name, elapsed in loading.items()), sum(loading.values())
    passed = total <= LOADING_LIMIT
    print(f"loading {parts}: {total:.2f} (limit {LOADING_LIMIT})  {verdict(passed)}")
    return {**loading, "passed": passed}


def main() -> int:
    args = make_parser(__doc__, "json", pairs=5, models=Path("spaces/model")).parse_args()
    print(f"{describe_machine()}\n\nseconds, medians of {args.pairs} processes")
    imports = measure_import(args.pairs)
    return finish(args, **{"import": [imports], "loading": [measure_loading(args.models, args.pairs)]})


if __name__ == "__main__":
    sys.exit(main())
