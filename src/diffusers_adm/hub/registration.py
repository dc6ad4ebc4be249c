"""
Makes the classes of this package loadable by diffusers: from the Hub as from a folder, with `DiffusionPipeline` and
`AutoModel` as with the classes themselves, and without `trust_remote_code`.

diffusers has no entry points for this. It finds a component by the pair `[library, class]` in `model_index.json`, where
the library must be a key of `LOADABLE_CLASSES`, and a pipeline or a lone model by an attribute of `diffusers` itself.
None of that is a promise; tests/test_registration.py fails when a release changes it.
"""

import types

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from ..models import classifier_adagn, controlnet_adagn, text_encoder_glide, unet_2d_adagn
from ..models.classifier_adagn import AdaGNClassifierModel
from ..models.controlnet_adagn import AdaGNControlNetModel, AdaGNMultiControlNetModel
from ..models.text_encoder_glide import GLIDETextModel
from ..models.unet_2d_adagn import AdaGNUNet2DModel
from ..pipelines import ADMControlNetPipeline, ADMInpaintPipeline, ADMPipeline, ADMSuperResolutionPipeline
from ..schedulers import scheduling_ddpm_learned_variance
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler


PACKAGE = __name__.partition(".")[0]

# Base classes whose subclasses are components, and how to save and load them. diffusers looks them up as attributes of
# the package, so `__init__.py` re-exports them.
COMPONENT_CLASSES = {
    "ModelMixin": ["save_pretrained", "from_pretrained"],
    "SchedulerMixin": ["save_pretrained", "from_pretrained"],
}
PIPELINE_CLASSES = (ADMPipeline, ADMInpaintPipeline, ADMSuperResolutionPipeline, ADMControlNetPipeline)
# Looked up in `diffusers`: pipelines by the `_class_name` of model_index.json, models by that of a lone config.json.
PUBLIC_CLASSES = (
    AdaGNUNet2DModel,
    AdaGNClassifierModel,
    AdaGNControlNetModel,
    AdaGNMultiControlNetModel,
    GLIDETextModel,
    LearnedVarianceDDPMScheduler,
    *PIPELINE_CLASSES,
)
# Looked up by name in `diffusers.pipelines`: a repository that ships the files of its components names these as their
# libraries, and the installed module is used in place of the shipped file.
COMPONENT_MODULES = (
    unet_2d_adagn,
    classifier_adagn,
    controlnet_adagn,
    text_encoder_glide,
    scheduling_ddpm_learned_variance,
)


def register_with_diffusers() -> None:
    """
    Enters the classes of this package where diffusers looks for them. Called by `import diffusers_adm`; a second call
    changes nothing.

    Raises:
        RuntimeError: If diffusers, or another plugin, has something else under one of the names.
    """
    entries = [(diffusers, cls.__name__, cls) for cls in PUBLIC_CLASSES]
    entries += [(diffusers.pipelines, module.__name__.rpartition(".")[2], module) for module in COMPONENT_MODULES]
    for namespace, name, _ in entries:
        _check_free(namespace, name)
    if LOADABLE_CLASSES.get(PACKAGE, COMPONENT_CLASSES) != COMPONENT_CLASSES:
        raise RuntimeError(f"diffusers' `LOADABLE_CLASSES` already has another entry {PACKAGE!r}: another plugin's?")

    LOADABLE_CLASSES[PACKAGE] = COMPONENT_CLASSES
    for namespace, name, value in entries:
        setattr(namespace, name, value)
    # `from_pipe` compares exact types with these hints. The pipeline's file does not name them: see there.
    for pipeline in PIPELINE_CLASSES:
        hints = pipeline.__init__.__annotations__
        hints["unet"] |= AdaGNUNet2DModel
        hints["classifier"] |= AdaGNClassifierModel
        hints["text_encoder"] |= GLIDETextModel
        if "controlnet" in hints:
            hints["controlnet"] |= AdaGNControlNetModel | AdaGNMultiControlNetModel


def _check_free(namespace: types.ModuleType, name: str) -> None:
    existing = getattr(namespace, name, None)
    if existing is None:
        return
    owner = existing.__name__ if isinstance(existing, types.ModuleType) else getattr(existing, "__module__", "")
    if owner.partition(".")[0] != PACKAGE:
        raise RuntimeError(
            f"`{namespace.__name__}.{name}` exists already and belongs to `{owner}`, so {PACKAGE} cannot register its "
            "own under this name. Import only one of the two, or install a version of diffusers that this version of "
            f"{PACKAGE} was tested with."
        )
