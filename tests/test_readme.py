"""
Runs the code of README.md and then of docs/hub.md: in order, in one session, in a folder that looks like a clone, with
a local server in place of the Hub. `CHANGES` and `LEFT_OUT` list the exceptions.
"""

import json
import os
import re
import socket
import sys
from pathlib import Path

import datasets
import pytest
from hub_server import HubServer
from markdown_pages import REPOSITORY, Block, blocks
from PIL import Image
from toy_models import random_text_encoder, random_text_unet, toy_tokenizer

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler


MODELS = REPOSITORY / "spaces" / "model"
PAGES = ("README.md", "docs/hub.md")
# Fewer steps and images, and a user that the server knows. The port is replaced by a free one below.
PORT = "7860"
CHANGES = {
    r"(num_inference_steps=)\d+": r"\g<1>2",
    r"(--max_train_steps) \d+": r"\1 1",
    r"(--train_batch_size) \d+": r"\1 2",
    r"(--num_validation_images) \d+": r"\1 2",
    r"(--validation_num_inference_steps) \d+": r"\1 2",
    r"(steps=)25\b": r"\g<1>2",
    r"(classifier_guidance_scale=4\.0)\)": r"\1, num_inference_steps=2)",
    r"(num_images_per_prompt=4, guidance_scale=4\.0)\)": r"\1, num_inference_steps=2)",
    r"\buser/repo\b": "alice/repo",
}
# Blocks that contain one of these strings are not run, for this reason.
LEFT_OUT = {
    "push-space user/name": "builds a wheel; tests/hub/test_hub_space.py runs it",
    "pip install -e": "installs from the network",
    "make demo": "installs from the network",
    "--checkpoint lsun_cat.pt": "a published file of 2 GB; tests/conversion/ runs the command on small ones",
    'custom_pipeline="pipeline"': "needs a machine without this package; tests/hub/test_hub_repositories.py runs it",
}
APP = "python spaces/app.py"  # runs until it is terminated at the end
CATEGORIES = {0: "cats", 1: "dogs"}

# Runs the blocks: Python in one namespace, each shell block in its own shell.
SESSION = """
import json, os, subprocess, sys, time, urllib.request

blocks, app_command, port = json.load(open(sys.argv[1])), sys.argv[2], sys.argv[3]
namespace, app = {"__name__": "__main__"}, None

def start(command):
    started = subprocess.Popen(["bash", "-c", f"exec {command}"])
    for _ in range(600):
        assert started.poll() is None, "The app ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
            return started
        except OSError:
            time.sleep(0.3)
    raise AssertionError("The app does not answer")

try:
    for page, language, line, code in blocks:
        began = time.perf_counter()
        if language == "python":
            exec(compile(code, page, "exec"), namespace)
        elif code.startswith(app_command):
            app = start(code)
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
        print(f"{page}, line {line}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
finally:
    if app is not None:
        app.terminate()
        app.wait(30)
names = ("images", "flags", "large", "inpainted", "controlled")
sizes = {name: [image.size for image in namespace[name]] for name in names}
print(json.dumps({"sizes": sizes, "samples": len(namespace["samples"])}))
"""


def changed(code: str, port: int) -> str:
    for pattern, replacement in {**CHANGES, rf"\b{PORT}\b": str(port)}.items():
        code = re.sub(pattern, replacement, code)
    return code


def is_left_out(block: Block) -> bool:
    return any(mark in block.code for mark in LEFT_OUT)


@pytest.fixture
def clone(tmp_path) -> Path:
    """The parts of a clone that the commands need, and a folder of captioned images."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("src", "training", "spaces", "data"):
        (clone / name).symlink_to(REPOSITORY / name)
    images = clone / "path" / "to" / "images"
    images.mkdir(parents=True)
    emoji = datasets.load_dataset(
        "parquet", data_files=str(REPOSITORY / "data" / "noto-emoji-32" / "test.parquet"), split="train[:4]"
    )
    with (images / "metadata.jsonl").open("w") as metadata:
        for number, example in enumerate(emoji):
            example["image"].save(images / f"{number}.png")
            metadata.write(json.dumps({"file_name": f"{number}.png", "text": example["text"]}) + "\n")
    return clone


def save_toy_space(folder: Path) -> None:
    """Toy models, because the examples of the page take half a minute with the real ones."""
    ADMPipeline(
        random_text_unet("added_kv"),
        LearnedVarianceDDPMScheduler(),
        vae=None,
        text_encoder=random_text_encoder(),
        tokenizer=toy_tokenizer(),
        classifier=None,
    ).save_pretrained(folder / "base")


@pytest.mark.slow
def test_code_runs(clone, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    save_toy_space(tmp_path / "space")
    steps = [
        (page, block.language, block.line, changed(block.padded if block.language == "python" else block.code, port))
        for page in PAGES
        for block in blocks(REPOSITORY / page)
        if not is_left_out(block)
    ]
    (tmp_path / "blocks.json").write_text(json.dumps(steps))
    environment = {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "HF_TOKEN": "token-of-alice",
        "ADM_SPACE_MODELS": str(tmp_path / "space"),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(tmp_path / "gradio"),
    }
    with HubServer() as hub:
        printed = hub.run_client(
            SESSION, tmp_path / "blocks.json", APP, str(port), cache=clone / ".cache", env=environment, timeout=900
        )
        pushed = hub.files("alice/repo")

    result = json.loads(printed.splitlines()[-1])
    small, large = [32, 32], [64, 64]
    assert result["sizes"] == {
        "images": [small] * 2,
        "flags": [small] * 4,
        "large": [large] * 2,
        "inpainted": [small],
        "controlled": [small],
    }
    assert result["samples"] == 2
    assert Image.open(clone / "fire.png").size == (32, 32)
    for folder in ("mine", "edges"):
        rows = (clone / "runs" / folder / "metrics.jsonl").read_text().splitlines()
        assert json.loads(rows[-1])["step"] == 1
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "README.md", "pipeline.py"} <= set(pushed)


def test_all_exceptions_are_used():
    every = [block.code for page in PAGES for block in blocks(REPOSITORY / page)]
    for mark in LEFT_OUT:
        assert any(mark in code for code in every), f"No block has {mark!r}"
    for pattern in (*CHANGES, PORT):
        assert any(re.search(pattern, code) for code in every), f"No block has {pattern}"
