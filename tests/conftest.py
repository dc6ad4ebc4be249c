"""
What every test can rely on: no network, one thread a worker, the same random numbers each time.

The environment is set before anything else is imported: huggingface_hub, datasets and diffusers read it at import.
Processes that a test starts inherit it.
"""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path


_IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Imports and collection make a million objects that stay. The collector would look through them again and again.
if _IS_XDIST_WORKER:
    gc.disable()

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DISABLE_TELEMETRY"] = "1"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
if _IS_XDIST_WORKER:
    # The workers share the cores; more threads than cores make everything slower, and child processes as well.
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    # Caches and tokens of the person who runs the tests are out of reach. Workers inherit this folder.
    _HF_HOME = tempfile.mkdtemp(prefix="diffusers-adm-tests-")
    os.environ["HF_HOME"] = _HF_HOME
    # Each of these would win over HF_HOME.
    for _name in ("HUB_CACHE", "ASSETS_CACHE", "XET_CACHE", "DATASETS_CACHE", "MODULES_CACHE", "TOKEN_PATH", "TOKEN"):
        os.environ.pop(f"HF_{_name}", None)
        os.environ.pop(f"HUGGINGFACE_{_name}", None)
    os.environ.pop("HUGGING_FACE_HUB_TOKEN", None)

# pytest adds a test's own folder alone; these hold helpers that others use, too.
sys.path += [str(Path(__file__).parent / folder) for folder in ("schedulers", "training")]

import platform  # noqa: E402
import random  # noqa: E402
import zlib  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from jitter import Jitter  # noqa: E402
from PIL import Image  # noqa: E402


if _IS_XDIST_WORKER:
    torch.set_num_threads(1)


# Variables that choose the instructions with which torch, oneDNN and MKL compute.
_KERNEL_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def pytest_addoption(parser):
    parser.addoption(
        "--jitter",
        type=int,
        metavar="SEED",
        help="perturb the last bits of matrix products, convolutions and reductions, to find tests that rest on them",
    )


def pytest_collection_modifyitems(config, items):
    """Leaves out tests with the marker `faults`, unless `-m` asks for them."""
    if "faults" in config.getoption("-m"):
        return
    left_out = [item for item in items if item.get_closest_marker("faults")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("faults")]
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish():
    """From here on, the garbage collector looks only at what the tests make."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _processor():
    """The name of the model where the system tells it, else the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def pytest_report_header(config):
    """Where the tests ran: the last bits of a result depend on each of these."""
    threads = 1 if config.getoption("numprocesses", None) else torch.get_num_threads()
    lines = [
        f"processor: {_processor()}, {os.cpu_count()} cores",
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, threads in each process: {threads}",
    ]
    variables = [f"{name}={os.environ[name]}" for name in _KERNEL_VARIABLES if name in os.environ]
    return lines + ([" ".join(variables)] if variables else [])


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    """`-q`, as in `make test`, leaves the header out; these lines are for every report."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.verbosity == -1 and not reporter.no_header:
        for line in pytest_report_header(session.config):
            reporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """`--jitter` reaches fixtures, too. Each test has noise of its own, whichever tests run before it."""
    seed = item.config.getoption("jitter")
    if seed is None or item.get_closest_marker("no_jitter"):
        return (yield)
    with Jitter(zlib.crc32(f"{seed} {item.nodeid}".encode())):
        return (yield)


def pytest_unconfigure():
    if not _IS_XDIST_WORKER:
        shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def _plots_are_not_drawn(request, monkeypatch):
    """
    Drawing a plot takes about a second, and nearly every run makes some. So a figure is made with all that is in it,
    but its file shows an empty page of its size, except in tests with the marker `draws`.
    """
    if request.node.get_closest_marker("draws"):
        return
    from matplotlib.figure import Figure

    def savefig(self, path, **kwargs):
        width, height = self.get_size_inches() * self.dpi
        Image.new("RGB", (round(width), round(height)), "white").save(path, format="png")

    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture(autouse=True)
def _seed_everything():
    """Each test starts from the same random state, whatever ran before it and in whichever worker."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global state is the point here: libraries draw from it)
    torch.manual_seed(0)
