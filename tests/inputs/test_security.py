"""
What files and repositories of strangers cannot do: run code. What tokens cannot do: appear in output or files. The
sources are searched for calls that could: SECURITY.md says what is promised.
"""

import argparse
import ast
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_server import TOKENS, HubServer
from toy_models import CONDITIONAL, random_unet
from toy_pipelines import pipeline
from transformers import AutoTokenizer

from diffusers_adm import ADMPipeline
from diffusers_adm.commands.arguments import parse_args
from diffusers_adm.conversion import load_glide_tokenizer
from diffusers_adm.conversion.checkpoint_files import load_checkpoint
from diffusers_adm.data.decoding import decode_image
from diffusers_adm.data.pixels import UnusableImageError
from diffusers_adm.evaluation.data import ArrayImages
from diffusers_adm.hub import model_cards
from diffusers_adm.training import TrainingArguments
from diffusers_adm.training.setup import run_settings, write_settings


REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("src", "pipelines", "training", "spaces", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))

# 1. Calls in the sources

# Never, in any form.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load",
    "dill.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "os.system", "os.popen", "yaml.load",
    "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.Loader",
    "yaml.UnsafeLoader", "yaml.FullLoader",
    "shutil.unpack_archive", "pandas.read_pickle", "torch.hub.load", "torch.jit.load", "numpy.load", "runpy.run_path",
}  # fmt: skip
# A request to the process that compiles, which its parent has just written to a folder of its own.
READS_OWN_PICKLES = {"src/diffusers_adm/compilation/cpu.py"}
# Only with an argument of this value.
RESTRICTED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
# Arguments that no call may have: code of repositories, pickles in place of safetensors, a shell.
FORBIDDEN_VALUES = {("trust_remote_code", True), ("use_safetensors", False), ("shell", True), ("allow_pickle", True)}
FORBIDDEN_VALUES |= {("weights_only", False)}
FORBIDDEN_METHODS = {"extractall"}
UNPACKS_OWN_FILES = {"src/diffusers_adm/hub/space.py"}  # the wheel that it has just built
# Programs are started with a list of arguments, by these files only; modules are imported by a name of our own.
STARTS_PROGRAMS = {
    "src/diffusers_adm/compilation/cpu.py",
    "src/diffusers_adm/hub/space.py",
    "training/demo.py",
    "benchmarks",
}
IMPORTS_BY_NAME = {
    "benchmarks/bench_compiled.py",  # OpenVINO, which is optional
    "benchmarks/networks.py",  # guided-diffusion, from a folder that the user names
    "src/diffusers_adm_cli/main.py",
    "src/diffusers_adm/data/pixels.py",
    "src/diffusers_adm/deprecations.py",
    "src/diffusers_adm/hub/__init__.py",
    "src/diffusers_adm/hub/export.py",
}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression; "" of another one."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else f"?.{node.attr}"
    return ""


def is_in(path: str, places: set[str]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def dangers_in(source: str, path: str) -> list[str]:
    """The calls that this project does without, as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Name, ast.Attribute)) and dotted(node) in FORBIDDEN - {"compile", "numpy.load"}:
            found.append(f"{node.lineno}: {dotted(node)}")
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "marshal", "shelve", "joblib"):
            found.append(f"{node.lineno}: from {node.module}")
        if not isinstance(node, ast.Call):
            continue
        name, line = dotted(node.func), node.lineno
        values = {each.arg: getattr(each.value, "value", None) for each in node.keywords}
        if name in FORBIDDEN:
            found.append(f"{line}: {name}()")
        if name == "torch.load" and path in READS_OWN_PICKLES:
            continue
        if name in RESTRICTED and values.get(RESTRICTED[name][0]) is not RESTRICTED[name][1]:
            found.append(f"{line}: {name} without {RESTRICTED[name][0]}={RESTRICTED[name][1]}")
        found += [f"{line}: {key}={value}" for key, value in FORBIDDEN_VALUES if values.get(key) is value]
        if name.rpartition(".")[2] in FORBIDDEN_METHODS and path not in UNPACKS_OWN_FILES:
            found.append(f"{line}: {name}")
        if name.startswith("subprocess.") and not is_in(path, STARTS_PROGRAMS):
            found.append(f"{line}: {name}")
        if name.endswith("import_module") and not is_in(path, IMPORTS_BY_NAME):
            found.append(f"{line}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_sources(path):
    place = path.relative_to(REPOSITORY).as_posix()
    assert dangers_in(path.read_text(encoding="utf-8"), place) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(data)",
        "load = pickle.load",
        "from pickle import loads",
        "eval(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.compose(text, Loader=yaml.Loader)",
        "subprocess.run(command)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, use_safetensors=False)",
        "importlib.import_module(name)",
        "zipfile.ZipFile(path).extractall(folder)",
    ],
)
def test_the_search_finds(source):
    assert dangers_in(source, "src/diffusers_adm/somewhere.py")


# 2. Crafted files


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def trap(tmp_path):
    """The file that code would write, if any ran."""
    path = tmp_path / "trap"
    yield path
    assert not path.exists()


def test_the_trap_works(tmp_path):
    """Otherwise the tests below would prove nothing."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "trap"))).close()
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle", "nested", "namespace"])
def test_checkpoints_to_convert(name, kind, trap, tmp_path):
    path = tmp_path / name
    if kind == "torch":
        torch.save(Trap(trap), path)
    elif kind == "old torch":
        torch.save({"weight": Trap(trap)}, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Trap(trap)))
    elif kind == "nested":
        torch.save({"model": {"weight": torch.zeros(2)}, "optimizer": [{"state": Trap(trap)}]}, path)
    else:
        torch.save({"args": argparse.Namespace(x=Trap(trap)), "model": {"weight": torch.zeros(2)}}, path)
    with pytest.raises(ValueError, match="cannot be read as a file of `torch.save` that holds only tensors"):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".png"])
def test_arrays_of_objects(suffix, trap, tmp_path):
    """As images to train on, and as samples to measure."""
    path = tmp_path / f"array{suffix}"
    objects = np.array([[Trap(trap)]], dtype=object)
    with open(path, "wb") as file:
        if suffix == ".npz":
            np.savez(file, arr_0=objects, arr_1=objects, allow_pickle=True)
        elif suffix == ".npy":
            np.save(file, objects, allow_pickle=True)
        else:
            file.write(pickle.dumps(Trap(trap)))
    for content in (None, path.read_bytes()):
        with pytest.raises(UnusableImageError):
            decode_image({"bytes": content, "path": str(path)}, None)
    with pytest.raises(ValueError, match=r"cannot be read as a \.npz file"):
        ArrayImages(path)


@pytest.mark.parametrize(
    "recipe",
    [
        "seed: !!python/object/apply:os.system ['touch {trap}']",
        "!!python/object/apply:builtins.open [{trap}, w]: 1",
        "!!python/object/new:os.system ['touch {trap}']",
        "seed: !!python/name:os.system",
        "- !!python/object/apply:os.system ['touch {trap}']",
    ],
)
def test_recipes(recipe, trap, tmp_path):
    @dataclasses.dataclass
    class Arguments:
        """Arguments."""

        seed: int = dataclasses.field(default=0, metadata={"help": "Random seed."})

    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.format(trap=trap))
    with pytest.raises(ValueError, match="`--config`"):
        parse_args(Arguments, ["--config", str(path)])


def test_recipes_in_model_cards(trap):
    """`train_args.yaml` of a run that is pushed."""
    assert "yaml.safe_load" in Path(model_cards.__file__).read_text(encoding="utf-8")
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(f"seed: !!python/object/apply:os.system ['touch {trap}']")


def test_tokenizers(trap, tmp_path):
    """A folder with the code of a tokenizer of its own."""
    (tmp_path / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
    entry = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(entry))
    for load in (AutoTokenizer.from_pretrained, load_glide_tokenizer):
        with pytest.raises((ValueError, OSError, ImportError), match=r"\w+ \w+"):
            load(str(tmp_path))


# 3. Tokens

TOKEN = "hf_RecognisableSecretOfATest0123456789"
PUSHES = """
import json, logging, os, sys, traceback
logging.basicConfig(level=logging.DEBUG)
import huggingface_hub, diffusers, transformers
huggingface_hub.utils.logging.set_verbosity_debug(); diffusers.utils.logging.set_verbosity_debug()
from diffusers_adm.hub.push import push_folder
for folder, repo, token, environment in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ |= environment
    try:
        push_folder(folder, repo, token=token)
    except Exception:
        traceback.print_exc()
        print("failed:", repo)
"""


@pytest.fixture
def secret_user(monkeypatch):
    monkeypatch.setitem(TOKENS, TOKEN, "alice")


def test_tokens_of_a_push(secret_user, tmp_path):
    """Not in the logs at their most talkative, in errors, in what is pushed, or in any file that is left."""
    folder, cache = tmp_path / "run", tmp_path / "client" / "cache"
    cache.mkdir(parents=True)
    pipe = pipeline(ADMPipeline, random_unet(**CONDITIONAL))
    pipe.save_pretrained(folder)
    with HubServer() as hub:
        pushes = (
            (str(folder), "alice/one", TOKEN, {}),
            (str(folder), "alice/two", None, {"HF_TOKEN": TOKEN}),
            (str(folder), "bob/forbidden", TOKEN, {}),  # an error of the Hub
            (str(tmp_path / "missing"), "alice/three", TOKEN, {}),
        )
        done = subprocess.run(
            [sys.executable, "-c", PUSHES, json.dumps(pushes)],
            env=hub.environment(cache),
            cwd=tmp_path / "client",
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert TOKEN not in done.stdout + done.stderr
        failed = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
        assert failed == ["failed: bob/forbidden", "failed: alice/three"], done.stderr
        for repo in ("alice/one", "alice/two"):
            assert hub.files(repo)
            assert not any(TOKEN.encode() in content for content in hub.files(repo).values())
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left
    assert not any(TOKEN.encode() in path.read_bytes() for path in left)


def test_tokens_of_a_run(tmp_path):
    """`train_args.yaml` leaves the token out, and errors do not repeat it."""
    push = {"push_to_hub": True, "hub_model_id": "a/b"}
    args = TrainingArguments(output_dir=str(tmp_path), **push, hub_token=TOKEN)
    write_settings(tmp_path, run_settings(args))
    assert TOKEN not in (tmp_path / "train_args.yaml").read_text()
    assert TOKEN not in repr(args)
    with pytest.raises(ValueError, match="`hub_token` holds other characters") as caught:
        TrainingArguments(output_dir=str(tmp_path), **push, hub_token=f"{TOKEN}\n")
    assert TOKEN not in str(caught.value)
