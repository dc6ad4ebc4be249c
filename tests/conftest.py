"""
What every test can rely on: no network, one thread a worker, the same random numbers each time.

The environment is set before anything else is imported: huggingface_hub, datasets and diffusers read it at import.
Processes that a test starts inherit it.
"""

import os
import shutil
import tempfile


_IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ

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

import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


if _IS_XDIST_WORKER:
    torch.set_num_threads(1)


def pytest_unconfigure():
    if not _IS_XDIST_WORKER:
        shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed_everything():
    """Each test starts from the same random state, whatever ran before it and in whichever worker."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global state is the point here: libraries draw from it)
    torch.manual_seed(0)
