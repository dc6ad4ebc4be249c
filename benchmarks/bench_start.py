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
import sys
from pathlib import Path

from measuring import alternate, argument_parser, describe_machine, finish, run_python


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
    return [float(line) for line in run_python("-c", code, *arguments).split()]


def measure_import(pairs: int) -> dict[str, float]:
    statements: list[float] = []
    times = alternate(lambda: statements.extend(run(OURS)), lambda: run(THEIRS), pairs, "cpu")
    ours, theirs = statistics.median(times["ours"]), statistics.median(times["theirs"])
    statement = statistics.median(statements[-pairs:])  # without that of the first pair
    passed = max(ours - theirs, statement) <= IMPORT_LIMIT
    return {"with": ours, "without": theirs, "difference": ours - theirs, "statement": statement, "passed": passed}


def measure_loading(models: Path, runs: int) -> dict[str, float]:
    folders = sorted(folder for folder in models.iterdir() if folder.is_dir())
    measured = [run(LOADING, *folders) for _ in range(runs)]
    return {folder.name: statistics.median(times[i] for times in measured) for i, folder in enumerate(folders)}


def main() -> int:
    parser = argument_parser(__doc__, pairs=5)
    parser.add_argument("--models", type=Path, default=Path("spaces/model"), help="Folder of the models.")
    args = parser.parse_args()

    machine = describe_machine("cpu")
    print(f"{machine}\n\nseconds, medians of {args.pairs} processes")
    imports = measure_import(args.pairs)
    print(f"process that imports diffusers                   {imports['without']:6.2f}")
    print(f"process that imports diffusers and diffusers_adm {imports['with']:6.2f}")
    print(
        f"difference {imports['difference']:.2f}, the statement {imports['statement']:.2f} (limit {IMPORT_LIMIT})  "
        f"{'ok' if imports['passed'] else 'FAILED'}",
        flush=True,
    )
    loading = measure_loading(args.models, args.pairs)
    total = sum(loading.values())
    parts = ", ".join(f"{name} {elapsed:.2f}" for name, elapsed in loading.items())
    passed = total <= LOADING_LIMIT
    print(f"loading {parts}: {total:.2f} (limit {LOADING_LIMIT})  {'ok' if passed else 'FAILED'}")
    return finish(args, machine, **{"import": [imports], "loading": [{**loading, "passed": passed}]})


if __name__ == "__main__":
    sys.exit(main())
