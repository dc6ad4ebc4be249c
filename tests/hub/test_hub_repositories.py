"""
Repositories on the Hub, loaded by the real client in fresh processes with fresh caches, with this package and without:
lean ones, and those that `include_code=True` makes. And what the client says to bad input.
"""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from hub_server import HubServer
from tolerances import SAMPLING, rounding_errors
from toy_models import (
    CONDITIONAL,
    fill_randomly,
    random_classifier,
    random_text_encoder,
    random_text_unet,
    random_unet,
    toy_tokenizer,
)
from unclip_models import EMBEDDING_WIDTH, prior_scheduler, random_clip_text, random_karlo_upsampler, random_prior

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    ADMUnCLIPPipeline,
    LearnedVarianceDDPMScheduler,
    UnCLIPProjectionModel,
)
from diffusers_adm.conditioning.image_format import ImageFormat


NONE = dict.fromkeys(("vae", "text_encoder", "tokenizer", "classifier"))
SMALL = torch.linspace(0, 1, 3 * 4 * 4).view(1, 3, 4, 4)
IMAGE = torch.linspace(0, 1, 3 * 8 * 8).view(1, 3, 8, 8)
MASK = (torch.arange(64).view(1, 1, 8, 8) % 8 < 4).float()
CONDITIONED = {"class_labels": [1], "num_inference_steps": 2, "output_type": "pt"}
CALLS = {
    "plain": CONDITIONED | {"class_labels": "dog", "guidance_scale": 2.0, "classifier_guidance_scale": 1.0},
    "text": {"prompt": "a red cat", "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"},
    "inpaint": CONDITIONED | {"image": IMAGE, "mask_image": MASK},
    "upscale": CONDITIONED | {"image": SMALL},
    "control": CONDITIONED | {"image": IMAGE},
    "controls": CONDITIONED | {"image": [IMAGE, IMAGE]},
    "field": {"num_inference_steps": 2, "output_type": "pt"},
    "unclip": {
        "prompt": "a red cat",
        "num_inference_steps": 2,
        "prior_num_inference_steps": 2,
        "super_res_num_inference_steps": 2,
        "guidance_scale": 2.0,
        "output_type": "pt",
    },
    "latents": {"image": IMAGE, "strength": 0.5, "num_inference_steps": 4, "output_type": "pt"},
}
SHARED = """
import os, sys, torch
from diffusers import DiffusionPipeline

def draw(pipe, arguments):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**arguments, generator=torch.Generator().manual_seed(0)).images

def refusal(load, *args, **kwargs):
    try:
        load(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise SystemExit("nothing was refused")
"""


def make_unclip() -> ADMUnCLIPPipeline:
    projection = UnCLIPProjectionModel(
        clip_embeddings_dim=EMBEDDING_WIDTH, time_embed_dim=32, cross_attention_dim=12, text_conditioning="clip"
    )
    return ADMUnCLIPPipeline(
        **dict.fromkeys(ADMUnCLIPPipeline._optional_components)
        | {
            "unet": random_text_unet("added_kv", cross_attention_dim=12, class_embed_type="identity"),
            "scheduler": LearnedVarianceDDPMScheduler(),
            "image_projection": fill_randomly(projection),
            "text_encoder": random_clip_text(),
            "tokenizer": toy_tokenizer(),
            "prior": random_prior(),
            "prior_scheduler": LearnedVarianceDDPMScheduler.from_config(prior_scheduler().config),
            "super_res_first": random_karlo_upsampler(5),
            "super_res_scheduler": LearnedVarianceDDPMScheduler(variance_type="fixed_small"),
        }
    )


def make_pipelines() -> dict[str, ADMPipeline]:
    scheduler = LearnedVarianceDDPMScheduler()
    unet = random_unet(**CONDITIONAL)
    nets = [AdaGNControlNetModel.from_unet(unet, width=width) for width in (1.0, 0.5)]
    for net in nets:
        for parameter in net.parameters():  # the last layers are made as zeros
            parameter.data += 0.05
    common = {"unet": unet, "scheduler": scheduler, **NONE}
    text = {
        "unet": random_text_unet("added_kv", addition_embed_type="text_embeds"),
        "text_encoder": random_text_encoder("glide"),
        "tokenizer": toy_tokenizer("glide"),
    }
    upsampler = random_unet(**CONDITIONAL, in_channels=6, out_channels=6, time_cond_proj_dim=6)
    names = {0: "cat", 1: "dog", 2: "fox", 3: "owl"}
    return {
        "plain": ADMPipeline(**common | {"classifier": random_classifier(num_classes=4), "id2label": names}),
        "text": ADMPipeline(**common | text),
        "inpaint": ADMInpaintPipeline(**common),
        "upscale": ADMSuperResolutionPipeline(**common | {"unet": upsampler}),
        "control": ADMControlNetPipeline(**common, controlnet=nets[0]),
        "controls": ADMControlNetPipeline(**common, controlnet=nets),
        "field": ADMPipeline(
            **common | {"unet": random_unet(in_channels=2, out_channels=4)},
            image_format=ImageFormat("array", 2, (-300.5, 40), None),
        ),
        "unclip": make_unclip(),
        "latents": ADMPipeline(
            **common
            | {
                "unet": random_unet(in_channels=4, out_channels=8),
                "vae": fill_randomly(
                    AutoencoderKL(
                        down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(4, 4),
                        norm_num_groups=2,
                        latent_channels=4,
                    )
                ),
            }
        ),
    }


def draw(pipe: ADMPipeline, arguments: dict) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**arguments, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def pipelines() -> dict[str, ADMPipeline]:
    return make_pipelines()


@pytest.fixture(scope="module")
def folder(pipelines, tmp_path_factory) -> Path:
    """Self-contained repositories by the name of their pipeline, and one lean one."""
    folder = tmp_path_factory.mktemp("repositories")
    for name, pipe in pipelines.items():
        pipe.save_pretrained(folder / name, include_code=True)
    pipelines["plain"].save_pretrained(folder / "lean")
    pipelines["plain"].save_pretrained(folder / "lean", variant="fp16")
    return folder


class TestSelfContained:
    def test_files(self, folder):
        files = {path.relative_to(folder / "plain").as_posix() for path in (folder / "plain").rglob("*.*")}
        assert {file for file in files if file.endswith(".py")} == {
            "pipeline.py",
            "unet/unet_2d_adagn.py",
            "classifier/classifier_adagn.py",
            "scheduler/scheduling_ddpm_learned_variance.py",
        }
        index = json.loads((folder / "plain" / "model_index.json").read_text())
        assert index["_class_name"] == "ADMPipeline"
        assert index["unet"] == ["unet_2d_adagn", "AdaGNUNet2DModel"]
        assert index["classifier"] == ["classifier_adagn", "AdaGNClassifierModel"]
        assert index["scheduler"] == ["scheduling_ddpm_learned_variance", "LearnedVarianceDDPMScheduler"]
        assert index["vae"] == [None, None]
        assert json.loads((folder / "lean" / "model_index.json").read_text())["unet"][0] == "diffusers_adm"

    LOAD = (
        SHARED
        + """
result, calls, again, trusted = sys.argv[1:]
if not trusted:
    import diffusers_adm
kwargs = {"custom_pipeline": "pipeline", "trust_remote_code": True} if trusted else {}
images, modules, pipes = {}, {}, {}
for name, arguments in torch.load(calls).items():
    pipe = pipes[name] = DiffusionPipeline.from_pretrained(f"alice/{name}", **kwargs)
    images[name] = draw(pipe, arguments)
    modules[name] = type(pipe).__module__, type(pipe.unet).__module__, type(pipe.scheduler).__module__
    if trusted and name in ("plain", "control"):
        pipe.save_pretrained(f"{again}/{name}")
# Their files have been run again since.
assert torch.equal(draw(pipes["plain"], torch.load(calls)["plain"]), images["plain"])
torch.save({"images": images, "modules": modules}, result)
"""
    )

    @pytest.mark.parametrize("package", [False, True])
    def test_draws_the_same(self, folder, pipelines, tmp_path, package):
        result, again = tmp_path / "result.pt", tmp_path / "again"
        torch.save(CALLS, tmp_path / "calls.pt")
        with HubServer({f"alice/{name}": folder / name for name in CALLS}) as hub:
            trusted = "" if package else "yes"
            arguments = (result, tmp_path / "calls.pt", again, trusted)
            hub.run_client(self.LOAD, *arguments, cache=tmp_path / "cache", package=package)
        loaded = torch.load(result)
        for name, pipe in pipelines.items():
            expected = draw(pipe, CALLS[name])
            assert expected.std() > 0.05
            assert rounding_errors(loaded["images"][name], expected) <= SAMPLING, name
            start = "diffusers_adm." if package else "diffusers_modules."
            assert all(module.startswith(start) for module in loaded["modules"][name]), loaded["modules"]
        if not package:  # saved again there: the same code, named in the index as before
            for name in ("plain", "control"):
                for path in (folder / name).rglob("*.*"):
                    if path.suffix in (".py", ".safetensors"):
                        assert (again / name / path.relative_to(folder / name)).read_bytes() == path.read_bytes()
                indices = [json.loads((root / name / "model_index.json").read_text()) for root in (again, folder)]
                indices[0].pop("_name_or_path")
                assert indices[0] == indices[1]

    PRIVATE = """
from diffusers import DiffusionPipeline
code = {"custom_pipeline": "pipeline", "trust_remote_code": True}
pipe = DiffusionPipeline.from_pretrained("alice/adm", revision="refs/pr/1", **code)
assert type(pipe).__name__ == "ADMInpaintPipeline", pipe
pipe = DiffusionPipeline.from_pretrained("alice/adm", **code)
assert type(pipe).__name__ == "ADMPipeline", pipe
"""

    def test_private_and_at_a_revision(self, folder, tmp_path):
        with HubServer() as hub:
            hub.add_commit("alice/adm", folder / "plain", private=True)
            hub.add_commit("alice/adm", folder / "inpaint", ref="refs/pr/1")
            env = {"HF_TOKEN": "token-of-alice"}
            hub.run_client(self.PRIVATE, cache=tmp_path / "cache", package=False, env=env)


class MarkOnLoad:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestBadInput:
    CLIENT = (
        SHARED
        + """
result, marks, package = sys.argv[1:]
if package:
    import diffusers_adm
load = DiffusionPipeline.from_pretrained
code = {"custom_pipeline": "pipeline"}
said = {
    "missing": refusal(load, "alice/missing"),
    "wrong token": refusal(load, "alice/private", token="wrong"),
    "no token": refusal(load, "alice/private"),
    "token of another": refusal(load, "alice/private", token="token-of-bob"),
    "untrusted": refusal(load, "alice/marked", **code),
    "no code": refusal(load, "alice/lean", **code, trust_remote_code=True),
    "unknown class": refusal(load, "alice/unknown"),
    "unknown pipeline": refusal(load, "alice/other"),
    "unknown library": refusal(load, "alice/library"),
    "altered": refusal(load, "alice/altered"),
    "empty": refusal(load, "alice/empty"),
    "no config": refusal(load, "alice/parts", **({} if package else code), trust_remote_code=True),
    "pickle": refusal(load, "alice/pickle", **({} if package else code), trust_remote_code=True),
    "loaded": load("alice/private", token="token-of-alice").unet.config.in_channels if package else None,
}
if package:
    load("alice/marked")
    load("alice/marked", trust_remote_code=True)
said["executed"] = os.listdir(marks)
load("alice/marked", **code, trust_remote_code=True)
said["executed if trusted"] = os.listdir(marks)
torch.save(said, result)
"""
    )

    @pytest.mark.parametrize("package", [True, False])
    def test_refusals(self, folder, tmp_path, package):
        marks = tmp_path / "marks"
        marks.mkdir()
        roots = dict.fromkeys(("lean", "unknown", "other", "library", "altered"), folder / "lean")
        with HubServer({f"alice/{name}": root for name, root in roots.items()}) as hub:
            hub.add_commit("alice/private", folder / "lean", private=True)
            hub.add_commit("alice/marked", folder / "plain")
            hub.add_commit("alice/parts", folder / "inpaint")
            hub.add_commit("alice/pickle", folder / "inpaint")
            (tmp_path / "empty").mkdir()
            (tmp_path / "empty" / "README.md").write_text("Nothing here yet.")
            hub.add_commit("alice/empty", tmp_path / "empty")

            def alter(repo: str, path: str, change) -> None:
                repository = hub.repositories[repo]
                files = dict(repository.commits[repository.refs["main"]].files)
                files[path] = hub.store(change(hub.blobs[files[path]]))
                repository.add("main", files, "Alter")

            def replace(repo: str, path: str, files: dict[str, bytes]) -> None:
                repository = hub.repositories[repo]
                kept = dict(repository.commits[repository.refs["main"]].files)
                del kept[path]
                repository.add("main", kept | {name: hub.store(data) for name, data in files.items()}, "Replace")

            def rewrite(repo: str, **entries) -> None:
                alter(repo, "model_index.json", lambda old: json.dumps(json.loads(old) | entries).encode())

            shipped = [path for path in hub.files("alice/marked") if path.endswith(".py")]
            for path in shipped:
                leave_a_mark = f"open({str(marks / Path(path).stem)!r}, 'w').close()\n".encode()
                alter("alice/marked", path, lambda old, mark=leave_a_mark: old + b"\n" + mark)
            rewrite("alice/unknown", unet=["diffusers_adm", "NoSuchModel"])
            rewrite("alice/other", _class_name="NoSuchPipeline")
            rewrite("alice/library", unet=["os", "system"])
            weights = "unet/diffusion_pytorch_model.safetensors"
            alter("alice/altered", weights, lambda old: old[:-64])
            replace("alice/parts", "unet/config.json", {})
            payload = pickle.dumps({"weight": MarkOnLoad(str(marks / "pickle"))})
            replace("alice/pickle", weights, {"unet/diffusion_pytorch_model.bin": payload})
            result = tmp_path / "result.pt"
            arguments = (result, marks, "yes" if package else "")
            hub.run_client(self.CLIENT, *arguments, cache=tmp_path / "cache", package=package)
        said = torch.load(result)
        for key in ("missing", "wrong token", "no token", "token of another"):
            name = "missing" if key == "missing" else "private"
            assert f"Cannot load model alice/{name}: the model is not fully cached locally" in said[key], said[key]
        assert said["executed"] == []
        assert "model_index.json" in said["empty"], said["empty"]
        assert "config.json" in said["no config"], said["no config"]
        assert said["pickle"].startswith("OSError"), said["pickle"]
        # Where the package is, its own components are used even so.
        expected = {"pipeline"} if package else {Path(path).stem for path in shipped}
        assert set(said["executed if trusted"]) == expected
        assert "trust_remote_code=True" in said["untrusted"]
        assert "as defined in `model_index.json` does not exist in alice/library" in said["unknown library"]
        if package:
            assert "unet/os.py" in said["unknown library"]
            assert "NoSuchModel" in said["unknown class"]
            assert "afetensor" in said["altered"]
            assert said["loaded"] == 3
            assert "has no attribute NoSuchPipeline" in said["unknown pipeline"]
        else:
            assert "diffusers_adm.py as defined in `model_index.json` does not exist" in said["no code"]
