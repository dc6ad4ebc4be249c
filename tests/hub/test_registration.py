"""
Registration with diffusers: from the Hub, too, `DiffusionPipeline` and `AutoModel` load what this package saves.

It rests on private names of diffusers. When this file fails after an update of diffusers, read
`diffusers_adm/registration.py` beside the new `diffusers/pipelines/pipeline_loading_utils.py`.
"""

import json
import shutil
import subprocess
import sys
import types

import diffusers
import pytest
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines import pipeline_loading_utils, pipeline_utils
from hub_server import HubServer
from tolerances import NETWORK, SAMPLING, rounding_errors
from toy_models import CONDITIONAL, random_classifier, random_unet

import diffusers_adm
from diffusers_adm import (
    AdaGNClassifierModel,
    AdaGNControlNetModel,
    AdaGNMultiControlNetModel,
    AdaGNUNet2DModel,
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    ADMUnCLIPPipeline,
    GLIDETextModel,
    LearnedVarianceDDPMScheduler,
    UnCLIPProjectionModel,
)
from diffusers_adm.hub import registration
from diffusers_adm.hub.public_classes import PUBLIC_CLASSES


COMPONENTS = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None}
PIPELINES = [
    ADMPipeline,
    ADMInpaintPipeline,
    ADMSuperResolutionPipeline,
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMUnCLIPPipeline,
]
CLASSES = [
    AdaGNUNet2DModel,
    AdaGNControlNetModel,
    AdaGNMultiControlNetModel,
    AdaGNClassifierModel,
    GLIDETextModel,
    UnCLIPProjectionModel,
    LearnedVarianceDDPMScheduler,
    *PIPELINES,
]


def make_pipeline() -> ADMPipeline:
    return ADMPipeline(unet=random_unet(**CONDITIONAL), scheduler=LearnedVarianceDDPMScheduler(), **COMPONENTS)


def draw(pipe: ADMPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(class_labels=[0, 1], num_inference_steps=3, generator=generator, output_type="pt").images


class TestNames:
    """Everything that registration reads or writes in diffusers exists there, and diffusers itself reads it."""

    def test_table_of_libraries(self):
        assert pipeline_utils.LOADABLE_CLASSES is pipeline_loading_utils.LOADABLE_CLASSES
        assert pipeline_loading_utils.LOADABLE_CLASSES["diffusers_adm"] == registration.LOADABLE_BASES
        for base, methods in registration.LOADABLE_BASES.items():
            assert pipeline_loading_utils.LOADABLE_CLASSES["diffusers"][base] == methods
            assert base in pipeline_loading_utils.ALL_IMPORTABLE_CLASSES

    def test_base_classes_are_attributes_of_the_package(self):
        assert diffusers_adm.ModelMixin is ModelMixin
        assert diffusers_adm.SchedulerMixin is SchedulerMixin

    @pytest.mark.parametrize("cls", CLASSES)
    def test_public_classes_are_attributes_of_diffusers(self, cls):
        assert getattr(diffusers, cls.__name__) is cls
        assert getattr(diffusers_adm, cls.__name__) is cls

    def test_no_public_class_is_forgotten(self):
        classes = {getattr(diffusers_adm, name) for name in diffusers_adm.__all__} - {ModelMixin, SchedulerMixin}
        assert classes == set(PUBLIC_CLASSES) == set(CLASSES)

    @pytest.mark.parametrize("cls", [cls for cls in CLASSES if not issubclass(cls, diffusers.DiffusionPipeline)])
    def test_files_of_components_are_attributes_of_diffusers_pipelines(self, cls):
        name = cls.__module__.rpartition(".")[2]
        assert getattr(diffusers.pipelines, name) is sys.modules[cls.__module__]

    def test_no_folder_of_the_package_is_called_like_a_pipeline_of_diffusers(self):
        """Its modules would be recorded as that pipeline's."""
        folders = {name.split(".")[-2] for name in sys.modules if name.startswith("diffusers_adm.")}
        assert "models" in folders
        assert not [folder for folder in folders if hasattr(diffusers.pipelines, folder)]

    @pytest.mark.parametrize("pipeline", PIPELINES)
    def test_hints_of_the_pipeline_name_the_network(self, pipeline):
        assert AdaGNUNet2DModel in pipeline._get_signature_types()["unet"]
        assert GLIDETextModel in pipeline._get_signature_types()["text_encoder"]
        for_controlnet = {AdaGNControlNetModel, AdaGNMultiControlNetModel}
        assert pipeline is not ADMControlNetPipeline or for_controlnet < {
            *pipeline._get_signature_types()["controlnet"]
        }

    def test_every_public_name_exists(self):
        assert [name for name in diffusers_adm.__all__ if not hasattr(diffusers_adm, name)] == []


class TestCall:
    def test_twice_changes_nothing(self):
        def state():
            names = (*dir(diffusers), *dir(diffusers.pipelines))
            return names, dict(pipeline_loading_utils.LOADABLE_CLASSES), dict(ADMPipeline.__init__.__annotations__)

        before = state()
        diffusers_adm.register_with_diffusers()
        assert state() == before

    def test_takes_no_name_from_diffusers(self, monkeypatch):
        theirs = type("AdaGNUNet2DModel", (), {"__module__": "diffusers.models.unets.unet_2d_adagn"})
        monkeypatch.setattr(diffusers, "AdaGNUNet2DModel", theirs)
        message = "`diffusers.AdaGNUNet2DModel` exists already and belongs to `diffusers.models.unets.unet_2d_adagn`"
        with pytest.raises(RuntimeError, match=message):
            diffusers_adm.register_with_diffusers()
        assert diffusers.AdaGNUNet2DModel is theirs

    def test_takes_no_module_from_diffusers(self, monkeypatch):
        theirs = types.ModuleType("diffusers.pipelines.unet_2d_adagn")
        monkeypatch.setattr(diffusers.pipelines, "unet_2d_adagn", theirs)
        with pytest.raises(RuntimeError, match="`diffusers.pipelines.unet_2d_adagn` exists already"):
            diffusers_adm.register_with_diffusers()

    def test_takes_no_entry_from_another_plugin(self, monkeypatch):
        monkeypatch.setitem(pipeline_loading_utils.LOADABLE_CLASSES, "diffusers_adm", {"Other": []})
        with pytest.raises(RuntimeError, match="already has another entry 'diffusers_adm'"):
            diffusers_adm.register_with_diffusers()

    def test_import_touches_nothing_else(self):
        result = subprocess.run([sys.executable, "-c", self.IMPORT], capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr

    IMPORT = """
import sys, torch, diffusers
from diffusers.pipelines import pipeline_utils

def state():
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "rng": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "libraries": set(pipeline_utils.LOADABLE_CLASSES) - {"diffusers_adm"},
        "path": list(sys.path),
    }

before, modules = state(), set(sys.modules)
import diffusers_adm
assert state() == before
# What only training, evaluation and the Space need takes seconds to import, or is not installed.
imported = {name.split(".")[0] for name in set(sys.modules) - modules}
heavy = {"datasets", "pyarrow", "peft", "tensorboard", "matplotlib", "torchdata", "scipy", "skimage", "gradio", "yaml"}
assert not imported & heavy, imported & heavy
assert "diffusers_adm.training" not in sys.modules
"""


class TestHub:
    """The real client in a process of its own, against a server on this machine; nothing is trusted."""

    CLIENT = """
import sys, torch
import diffusers_adm
from diffusers import AutoModel, DiffusionPipeline
from diffusers_adm import AdaGNClassifierModel, AdaGNMultiControlNetModel, AdaGNUNet2DModel
from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(class_labels=[0, 1], num_inference_steps=3, generator=generator, output_type="pt").images

torch.set_num_threads(int(sys.argv[2]))
base = DiffusionPipeline.from_pretrained("alice/adm")
named = ADMPipeline.from_pretrained("alice/adm")
for pipe in (base, named):
    assert type(pipe) is ADMPipeline and type(pipe.unet) is AdaGNUNet2DModel, pipe
    assert type(pipe.scheduler) is LearnedVarianceDDPMScheduler, pipe
half = DiffusionPipeline.from_pretrained("alice/adm", torch_dtype=torch.bfloat16)
assert half.unet.dtype == torch.bfloat16
unet = AutoModel.from_pretrained("alice/adm", subfolder="unet")
alone = AutoModel.from_pretrained("alice/unet")
assert type(unet) is type(alone) is AdaGNUNet2DModel
classifier = AutoModel.from_pretrained("alice/classifier")
assert type(classifier) is AdaGNClassifierModel
error = None
try:
    DiffusionPipeline.from_pretrained("alice/unregistered")
except ValueError as refusal:
    error = str(refusal)
controlled = DiffusionPipeline.from_pretrained("alice/controlled")
assert type(controlled.controlnet) is AdaGNMultiControlNetModel
images, weights = [draw(base), draw(named)], [unet.state_dict(), alone.state_dict()]
control = controlled.controlnet.state_dict()
with torch.no_grad():
    logits = classifier(torch.ones(1, 3, 8, 8), 7).logits
torch.save({"images": images, "weights": weights, "control": control, "logits": logits, "error": error}, sys.argv[1])
"""

    def test_index_names_the_package(self, tmp_path):
        make_pipeline().save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index == {
            "_class_name": "ADMPipeline",
            "_diffusers_version": diffusers.__version__,
            "unet": ["diffusers_adm", "AdaGNUNet2DModel"],
            "scheduler": ["diffusers_adm", "LearnedVarianceDDPMScheduler"],
            **dict.fromkeys(COMPONENTS, [None, None]),
            "id2label": None,
            "image_format": None,
        }

    def test_loads_and_samples_the_same(self, tmp_path):
        pipe = make_pipeline()
        pipe.save_pretrained(tmp_path / "adm")
        pipe.unet.save_pretrained(tmp_path / "unet")
        classifier = random_classifier()
        classifier.save_pretrained(tmp_path / "classifier")
        # Several ControlNets lie in folders below that of their component.
        nets = [AdaGNControlNetModel.from_unet(pipe.unet, width=width) for width in (1.0, 0.5)]
        controlled = ADMControlNetPipeline(**pipe.components, controlnet=nets)
        controlled.save_pretrained(tmp_path / "controlled")
        # As a plugin saves it that is not registered: modules in place of the package. What all this is for.
        shutil.copytree(tmp_path / "adm", tmp_path / "unregistered")
        index = tmp_path / "unregistered" / "model_index.json"
        content = json.loads(index.read_text())
        content["unet"][0] = AdaGNUNet2DModel.__module__
        content["scheduler"][0] = LearnedVarianceDDPMScheduler.__module__
        index.write_text(json.dumps(content))

        result = tmp_path / "result.pt"
        with HubServer(
            {f"alice/{name}": tmp_path / name for name in ("adm", "unet", "classifier", "controlled", "unregistered")}
        ) as hub:
            hub.run_client(self.CLIENT, result, torch.get_num_threads(), cache=tmp_path / "cache")
            assert hub.downloaded("alice/adm") == {
                "model_index.json",
                "scheduler/scheduler_config.json",
                "unet/config.json",
                "unet/diffusion_pytorch_model.safetensors",
            }
        loaded = torch.load(result)
        expected = draw(pipe)
        assert expected.std() > 0.1
        for images in loaded["images"]:
            assert rounding_errors(images, expected) <= SAMPLING
        for weights in loaded["weights"]:
            assert weights.keys() == pipe.unet.state_dict().keys()
            assert all(torch.equal(weights[name], tensor) for name, tensor in pipe.unet.state_dict().items())
        assert loaded["control"].keys() == controlled.controlnet.state_dict().keys()
        for name, tensor in controlled.controlnet.state_dict().items():
            assert torch.equal(loaded["control"][name], tensor)
        with torch.no_grad():
            assert rounding_errors(loaded["logits"], classifier(torch.ones(1, 3, 8, 8), 7).logits) <= NETWORK
        assert "as defined in `model_index.json` does not exist in alice/unregistered" in loaded["error"]
