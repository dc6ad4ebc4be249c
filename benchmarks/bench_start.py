"""
The first seconds: what `import diffusers_adm` adds to importing diffusers, and how long the demonstration models load.

    python benchmarks/bench_start.py [--pairs 5] [--models spaces/model] [--json results.json]

Every run is a fresh process, with and without this package in turn (a first pair, not counted, fills the disk's cache).
Two measures of the import: the difference between the medians of whole processes, and, which the rest of the
machine disturbs less, the time of the statement itself, behind that of diffusers in one process. Loading is
`from_pretrained` after the imports, of each folder of `--models`, summed. Fails if either measure of the import
exceeds 0.5 s, or loading 3 s.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from measuring import alternate, describe_machine


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


def run(code: str, *arguments: str | Path) -> list[float]:
    """The numbers that a fresh process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return [
        float(line) for line in subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    ]


def measure_import(pairs: int) -> dict[str, float]:
    statements: list[float] = []
    times = alternate(lambda: statements.extend(run(OURS)), lambda: run(THEIRS), pairs, "cpu")
    ours, theirs = statistics.median(times["ours"]), statistics.median(times["theirs"])
    return {
        "with": ours,
        "without": theirs,
        "difference": ours - theirs,
        "statement": statistics.median(statements[-pairs:]),  # but that of the first pair
    }


def measure_loading(models: Path, runs: int) -> dict[str, float]:
    folders = sorted(folder for folder in models.iterdir() if folder.is_dir())
    measured = [run(LOADING, *folders) for _ in range(runs)]
    return {folder.name: statistics.median(times[i] for times in measured) for i, folder in enumerate(folders)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("spaces/model"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", help="Write all numbers to this file.")
    args = parser.parse_args()

    machine = describe_machine("cpu")
    print(f"{machine}\n\nseconds, medians of {args.pairs} processes")
    imports = measure_import(args.pairs)
    print(f"process that imports diffusers                  {imports['without']:6.2f}")
    print(f"process that imports diffusers and diffusers_adm {imports['with']:5.2f}")
    import_passed = max(imports["difference"], imports["statement"]) <= IMPORT_LIMIT
    print(
        f"difference {imports['difference']:.2f}, the statement alone {imports['statement']:.2f} "
        f"(limit {IMPORT_LIMIT})  {'ok' if import_passed else 'FAILED'}",
        flush=True,
    )
    loading = measure_loading(args.models, args.pairs)
    total = sum(loading.values())
    parts = ", ".join(f"{name} {elapsed:.2f}" for name, elapsed in loading.items())
    print(f"loading {parts}: {total:.2f} (limit {LOADING_LIMIT})  {'ok' if total <= LOADING_LIMIT else 'FAILED'}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "import": imports, "loading": loading}, file, indent=2)
    return 0 if import_passed and total <= LOADING_LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
