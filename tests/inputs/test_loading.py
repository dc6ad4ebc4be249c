"""
Damaged and hostile files of models and pipelines: seeded mutations of configs and of the headers of weights. Loading
gives a whole network or an error with a sentence; it runs no code, does not hang, and does not fill the memory.
"""

import contextlib
import json
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from toy_models import CONDITIONAL, random_classifier, random_text_encoder, random_unet
from toy_pipelines import pipeline

from diffusers_adm import AdaGNControlNetModel, AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.models.patch_discriminator import PatchDiscriminator
from diffusers_adm.models.unclip_projection import UnCLIPProjectionModel


REFUSALS = (ValueError, TypeError, OSError, ImportError)
SECONDS, KIB = 20, 600_000  # that a case may take, and by which the memory may grow
WEIGHTS = "diffusion_pytorch_model.safetensors"

MODELS = {
    "unet": lambda: random_unet(**CONDITIONAL),
    "classifier": random_classifier,
    "controlnet": lambda: AdaGNControlNetModel.from_unet(random_unet()),
    "glide": lambda: random_text_encoder("glide"),
    "projection": lambda: UnCLIPProjectionModel(2, 8, time_embed_dim=32, text_conditioning=None, cross_attention_dim=8),
    "discriminator": lambda: PatchDiscriminator(base_channels=8, num_layers=1, norm_num_groups=4),
}
VALUES = [
    None, True, -1, 0, 0.5, 10**12, 10**30, -(10**12), 1e308, "", "x", "linear", "é\u202e\0", "../../../etc/passwd", [],
    {}, [[]], [None], [-8, 16], [10**12, 10**12], ["os", "system"], {"a": {"b": [1, {"c": None}]}}, [1] * 1000,
]  # fmt: skip
CLASS_NAMES = [
    "os.system",
    "system",
    "Popen",
    "eval",
    "__import__",
    "../evil",
    "AdaGNUNet2DModel",
    "",
    3,
    None,
    ["os", "system"],
]
EXTRA_NAMES = ["extra", "../evil", "\u202e", "__class__", "__init__", "neutral_arguments", "self"]
QUANTIZATIONS = [{"quant_method": "evil"}, {}, [], "x", {"quant_method": 3}]
COMPONENTS = [
    ["os", "system"], ["subprocess", "Popen"], ["builtins", "eval"], ["builtins", "exec"], ["posix", "system"],
    ["evil", "Evil"], ["..evil", "Evil"], ["../../evil", "Evil"], ["diffusers", "os"], ["diffusers_adm", "evil"],
    ["diffusers", "AutoencoderKL"], ["diffusers_adm", "AdaGNClassifierModel"], [None, None], [None, "x"], ["x"], [],
    "x", {}, 3, None, ["transformers", "AutoModelForCausalLM"], ["pickle", "Unpickler"], [["os"], ["system"]],
]  # fmt: skip


class Trap:
    """Pickled, it would write a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@contextlib.contextmanager
def limits():
    """An alarm for what hangs, and a bound for the growth of the memory."""

    def ring(number, frame):
        raise AssertionError(f"took more than {SECONDS} s")

    before, old = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KIB


def outcome(load, is_whole) -> str:
    with limits():
        try:
            loaded = load()
        except REFUSALS as error:
            words = str(error).split()
        else:
            words = None
    if words is not None:
        assert len(words) > 2, words  # a sentence
        return "refused"
    assert is_whole(loaded)
    return "loaded"


def mutate(config: dict, random_state: random.Random) -> dict:
    """One of: another value, no value, more values, other names, values deep inside."""
    config = json.loads(json.dumps(config))
    names = [name for name in config if not name.startswith("_diffusers")]
    name, kind = random_state.choice(names), random_state.randrange(8)
    if kind == 0:
        del config[name]
    elif kind == 1:
        config[
            random_state.choice(["extra", "../evil", "\u202e", "__class__", "__init__", "neutral_arguments", "self"])
        ] = random_state.choice(VALUES)
    elif kind == 2:
        config["_class_name"] = random_state.choice(CLASS_NAMES)
    elif kind == 3:
        config = {**config, **{each: random_state.choice(VALUES) for each in random_state.sample(names, 2)}}
    elif kind == 4 and isinstance(config[name], list) and config[name]:
        config[name][random_state.randrange(len(config[name]))] = random_state.choice(VALUES)
    elif kind == 5:
        config["quantization_config"] = random_state.choice(
            [{"quant_method": "evil"}, {}, [], "x", {"quant_method": 3}]
        )
    else:
        config[name] = random_state.choice(VALUES)
    return config


def rewrite(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    saved = {name: make() for name, make in MODELS.items()}
    for name, model in saved.items():
        model.save_pretrained(folder / name)
    return folder, saved


def is_the_same(saved):
    wanted = saved.state_dict()

    def check(loaded) -> bool:
        state = loaded.state_dict()
        # A config of a smaller network leaves some of the weights out, of which diffusers warns. None is new.
        return state.keys() <= wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in state)

    return check


def try_configs(models, name: str, number: int, seed: int = 0) -> Counter:
    folder, saved = models
    path = folder / name / "config.json"
    original, random_state, counts = json.loads(path.read_text()), random.Random(seed), Counter()
    cls = type(saved[name])
    try:
        for _ in range(number):
            rewrite(path, mutate(original, random_state))
            counts[outcome(lambda: cls.from_pretrained(folder / name), is_the_same(saved[name]))] += 1
    finally:
        rewrite(path, original)
    return counts


NUMBER = 20  # of configs of each of six models, in the suite


@pytest.mark.parametrize("name", MODELS)
def test_configs_of_models(models, name):
    """120 in the suite. Whatever loads has the saved weights, and no others."""
    counts = try_configs(models, name, NUMBER)
    assert counts["refused"] >= NUMBER / 4, counts


@pytest.mark.faults
@pytest.mark.parametrize("name", MODELS)
def test_many_configs_of_models(models, name):
    for seed in range(1, 6):
        try_configs(models, name, 100, seed)


def test_raw_configs(models):
    """Files that are no configs."""
    folder, saved = models
    path = folder / "unet" / "config.json"
    original = path.read_bytes()
    deep = b"[" * 100_000
    for content in (b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b'"x"', deep, b"{}", original[:-30], original * 2):
        path.write_bytes(content)
        outcome(lambda: AdaGNUNet2DModel.from_pretrained(folder / "unet"), is_the_same(saved["unet"]))
    path.write_bytes(original)


@pytest.mark.parametrize("name", ["unet", "classifier", "controlnet", "glide", "projection", "discriminator"])
@pytest.mark.parametrize("value", [10**12, 10**9, "8", [10**12], -8, 0, None, {}, True, float("nan")])
def test_constructors(name, value):
    """Each argument in turn, without a file: a network is built, or an argument refused."""
    cls = type(MODELS[name]())
    config = dict(MODELS[name]().config)
    for argument in [key for key in config if not key.startswith("_")]:
        changed = {key: entry for key, entry in config.items() if not key.startswith("_")} | {argument: value}
        outcome(lambda changed=changed: cls(**changed), lambda network: isinstance(network, cls))


# Headers of weights


def header_of(content: bytes) -> dict:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def with_header(content: bytes, header: object, length: int | None = None) -> bytes:
    (old,) = struct.unpack("<Q", content[:8])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content[8 + old :]


def mutated_weights(content: bytes):
    """20 of them, by name."""
    header = header_of(content)
    keys = [key for key in header if key != "__metadata__"]
    first, second = keys[0], keys[1]

    def entry(**changes):
        return with_header(content, {**header, first: {**header[first], **changes}})

    end = max(header[key]["data_offsets"][1] for key in keys)
    yield "empty", b""
    yield "short", content[:7]
    yield "only a length", content[:8]
    yield "truncated header", content[: 8 + 40]
    yield "truncated data", content[:-40]
    yield "data too long", content + bytes(40)
    yield "huge header", struct.pack("<Q", 2**63 - 1) + content[8:]
    yield "header of 100 GB", struct.pack("<Q", 10**11) + content[8:]
    yield "header too short", with_header(content, header, 10)
    yield "no JSON", with_header(content, b"not json" + b" " * 100)
    yield "a list", with_header(content, [1, 2])
    yield "deep", with_header(content, b"[" * 100_000)
    yield "overlapping", entry(data_offsets=header[second]["data_offsets"])
    yield "beyond the end", entry(data_offsets=[end, end + 4 * 8])
    yield "negative", entry(data_offsets=[-8, 0])
    yield "backwards", entry(data_offsets=header[first]["data_offsets"][::-1])
    yield "another type", entry(dtype="F64")
    yield "an unknown type", entry(dtype="PICKLE")
    yield "another shape", entry(shape=[1, *header[first]["shape"]])
    yield "a huge shape", entry(shape=[2**40, 2**40])
    yield "a missing tensor", with_header(content, {key: value for key, value in header.items() if key != keys[-1]})
    yield "a renamed tensor", with_header(content, {f"x{key}" if key == first else key: header[key] for key in header})
    yield "no tensor", with_header(content, {})
    yield "a pickle", pickle.dumps({"weight": 1})


@pytest.mark.parametrize("name", MODELS)
def test_headers_of_weights(models, name):
    folder, saved = models
    path, cls = folder / name / WEIGHTS, type(saved[name])
    content = path.read_bytes()
    try:
        for kind, changed in mutated_weights(content):
            path.write_bytes(changed)
            result = outcome(lambda: cls.from_pretrained(folder / name), is_the_same(saved[name]))
            assert result == "refused", kind
    finally:
        path.write_bytes(content)
    assert is_the_same(saved[name])(cls.from_pretrained(folder / name))


def test_missing_weights_are_named(models, tmp_path):
    """diffusers only warns, and leaves random numbers in their place."""
    from safetensors.torch import load_file, save_file

    folder, saved = models
    shutil.copytree(folder / "unet", tmp_path / "unet")
    state = load_file(tmp_path / "unet" / WEIGHTS)
    del state["conv_out.weight"]
    save_file(state, tmp_path / "unet" / WEIGHTS, metadata={"format": "pt"})
    for load in (AdaGNUNet2DModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"lacks 1 of the weights of AdaGNUNet2DModel, such as conv_out\.weight"):
            load(tmp_path / "unet")
    # A further tensor is no part of the network, and diffusers warns of it.
    state = {**load_file(folder / "unet" / WEIGHTS), "extra": torch.zeros(1)}
    save_file(state, tmp_path / "unet" / WEIGHTS, metadata={"format": "pt"})
    assert is_the_same(saved["unet"])(AdaGNUNet2DModel.from_pretrained(tmp_path / "unet"))
    model, info = AdaGNUNet2DModel.from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert info["unexpected_keys"] == ["extra"]


# Pickles


@pytest.mark.parametrize("name", MODELS)
def test_pickles_are_never_code(models, name, tmp_path):
    """In place of missing safetensors, their tensors are read, as diffusers does, and nothing else."""
    folder, saved = models
    target, trap = tmp_path / name, tmp_path / "trap"
    shutil.copytree(folder / name, target)
    (target / WEIGHTS).unlink()
    pickled = target / "diffusion_pytorch_model.bin"
    torch.save(saved[name].state_dict(), pickled)
    cls = type(saved[name])
    assert is_the_same(saved[name])(cls.from_pretrained(target))
    with pytest.raises(OSError, match="safetensors"):
        cls.from_pretrained(target, use_safetensors=True)
    for content in (pickle.dumps(Trap(trap)), pickle.dumps({"conv_in.weight": Trap(trap)})):
        pickled.write_bytes(content)
        torch.save({"conv_in.weight": Trap(trap)}, target / "diffusion_pytorch_model.pt")
        for options in ({}, {"use_safetensors": False}):
            with pytest.raises(REFUSALS):  # noqa: PT011 (which is diffusers' or torch's)
                cls.from_pretrained(target, **options)
    assert not trap.exists()


# Pipelines and schedulers


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = pipeline(ADMPipeline, random_unet(**CONDITIONAL), id2label={0: "a"})
    pipe.save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'trap')!r}, 'w')\nclass Evil: pass\n")
    (folder / "pipeline.py").write_text(f"open({str(folder / 'trap')!r}, 'w')\n")
    (folder / "unet" / "evil.py").write_text(f"open({str(folder / 'trap')!r}, 'w')\nclass Evil: pass\n")
    return folder, pipe


def try_indices(saved_pipeline, number: int, seed: int = 0) -> Counter:
    folder, pipe = saved_pipeline
    path, random_state, counts = folder / "model_index.json", random.Random(seed), Counter()
    original = json.loads(path.read_text())
    is_whole = lambda loaded: is_the_same(pipe.unet)(loaded.unet)  # noqa: E731
    try:
        for _ in range(number):
            changed = mutate(original, random_state)
            if random_state.random() < 0.5:
                name = random_state.choice(["unet", "scheduler", "vae", "classifier", "../evil", "evil", "tokenizer"])
                changed[name] = random_state.choice(COMPONENTS)
            rewrite(path, changed)
            counts[outcome(lambda: ADMPipeline.from_pretrained(folder), is_whole)] += 1
    finally:
        rewrite(path, original)
    assert not (folder / "trap").exists()
    assert "evil" not in sys.modules
    return counts


def test_indices_of_pipelines(saved_pipeline):
    counts = try_indices(saved_pipeline, 60)
    assert counts["refused"] >= 15, counts


@pytest.mark.faults
def test_many_indices_of_pipelines(saved_pipeline):
    for seed in range(1, 6):
        try_indices(saved_pipeline, 100, seed)


def test_no_remote_code(saved_pipeline):
    """Code in a folder does not run, unless `trust_remote_code` says so."""
    folder, _ = saved_pipeline
    index = folder / "model_index.json"
    original = index.read_text()
    try:
        for name, code in (("unet", ["evil", "Evil"]), ("_class_name", ["pipeline", "Pipeline"])):
            rewrite(index, {**json.loads(original), name: code})
            for cls in (ADMPipeline, DiffusionPipeline):
                with pytest.raises(REFUSALS):  # noqa: PT011
                    cls.from_pretrained(folder)
        index.write_text(original)
        with pytest.raises(REFUSALS, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder))
    finally:
        index.write_text(original)
    assert not (folder / "trap").exists()


def try_schedulers(folder: Path, number: int, seed: int = 0) -> Counter:
    path, random_state, counts = folder / "scheduler_config.json", random.Random(seed), Counter()
    LearnedVarianceDDPMScheduler(num_train_timesteps=20).save_pretrained(folder)
    original = json.loads(path.read_text())

    def steps(scheduler) -> bool:
        scheduler.set_timesteps(min(2, len(scheduler)))
        sample = torch.ones(1, 1, 2, 2)
        channels = 2 if scheduler.has_learned_variance else 1
        for t in scheduler.timesteps:
            sample = scheduler.step(torch.zeros(1, channels, 2, 2), t, sample).prev_sample
        return bool(sample.isfinite().all())

    for _ in range(number):
        rewrite(path, mutate(original, random_state))
        result = outcome(lambda: steps(LearnedVarianceDDPMScheduler.from_pretrained(folder)), bool)
        counts[result] += 1
    return counts


def test_configs_of_schedulers(tmp_path):
    counts = try_schedulers(tmp_path, 100)
    assert counts["refused"] >= 20, counts
