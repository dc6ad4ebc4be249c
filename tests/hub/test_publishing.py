"""The methods for the Hub that registration adds to the public classes from outside."""

import inspect

import pytest
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import PushToHubMixin
from docstrings import check_documented_arguments
from toy_models import CONDITIONAL, random_unet

from diffusers_adm import AdaGNMultiControlNetModel, AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.hub.public_classes import PUBLIC_CLASSES
from diffusers_adm.hub.publishing import add_publishing


NONE = dict.fromkeys(("vae", "text_encoder", "tokenizer", "classifier"))
PUBLISHED = [cls for cls in PUBLIC_CLASSES if cls is not AdaGNMultiControlNetModel]


@pytest.mark.parametrize("cls", PUBLISHED)
def test_every_public_class_has_them_and_inherits_nothing(cls):
    assert cls._upload_folder is not PushToHubMixin._upload_folder
    assert not [base for base in cls.__mro__ if ".hub." in base.__module__]


def test_signatures_show_the_arguments():
    assert "include_code" in inspect.signature(ADMPipeline.save_pretrained).parameters
    assert "include_code" in inspect.signature(ADMPipeline.push_to_hub).parameters
    assert inspect.signature(AdaGNUNet2DModel.save_pretrained) == inspect.signature(ModelMixin.save_pretrained)
    diffusers = list(inspect.signature(DiffusionPipeline.save_pretrained).parameters)
    assert list(inspect.signature(ADMPipeline.save_pretrained).parameters)[: len(diffusers) - 1] == diffusers[:-1]
    for method in (ADMPipeline.save_pretrained, ADMPipeline.push_to_hub):
        check_documented_arguments(method.__doc__, method)


def test_subclasses_inherit_them(tmp_path):
    class MyPipeline(ADMPipeline):
        def save_pretrained(self, *args, **kwargs):
            return super().save_pretrained(*args, **kwargs)

    assert MyPipeline._upload_folder is ADMPipeline._upload_folder
    pipe = MyPipeline(unet=random_unet(**CONDITIONAL), scheduler=LearnedVarianceDDPMScheduler(), **NONE)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "model_index.json").is_file()
    with pytest.raises(ValueError, match="is not a module of diffusers_adm"):  # it was asked for the code of this file
        pipe.save_pretrained(tmp_path, include_code=True)


def test_a_class_gets_them_once():
    before = ADMPipeline.save_pretrained, ADMPipeline._upload_folder
    add_publishing(ADMPipeline)
    assert (ADMPipeline.save_pretrained, ADMPipeline._upload_folder) == before
