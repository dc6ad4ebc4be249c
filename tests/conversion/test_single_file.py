"""`from_single_file`: the pipeline that conversion to a folder and `from_pretrained` give, and what is refused."""

import json

import pytest
import torch
from docstrings import check_documented_arguments
from openai_networks import NETWORKS

from diffusers_adm import (
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conversion import PRESETS, convert_openai, load_single_file
from diffusers_adm.conversion.openai_flags import Preset


CLASSES = {
    "new-order": ADMPipeline,
    "residual": ADMPipeline,
    "rescaled-timesteps": ADMPipeline,
    "improved-upsampler": ADMSuperResolutionPipeline,
    "inpainter": ADMInpaintPipeline,
    "image-to-image": ADMImageToImagePipeline,
}


def arguments_of(network):
    return {"model_flags": network.flags, "code_base": network.code_base}


def config_of(part):
    """
    As it is saved, without the place that it was loaded from, and without the layout of an inpainting U-Net:
    `from_pretrained` writes out what `None` means.
    """
    config = json.loads(part.to_json_string())
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "inpainting_layout")}


def assert_same(pipe, expected):
    assert type(pipe) is type(expected)
    assert not pipe.unet.training
    state, other = pipe.unet.state_dict(), expected.unet.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert {tensor.dtype for tensor in state.values()} == {tensor.dtype for tensor in other.values()}
    assert config_of(pipe) == config_of(expected)
    assert getattr(pipe, "inpainting_layout", None) == getattr(expected, "inpainting_layout", None)
    assert config_of(pipe.unet) == config_of(expected.unet)
    assert config_of(pipe.scheduler) == config_of(expected.scheduler)


@pytest.mark.parametrize("name", CLASSES)
def test_same_as_converting_to_a_folder(name, tmp_path):
    network = NETWORKS[name]
    file = network.save(tmp_path)
    pipe = CLASSES[name].from_single_file(file, **arguments_of(network))
    convert_openai(file, tmp_path / "out", **arguments_of(network))
    assert_same(pipe, CLASSES[name].from_pretrained(tmp_path / "out"))
    assert isinstance(pipe.scheduler, LearnedVarianceDDPMScheduler)
    inputs = network.inputs()
    with torch.no_grad():  # nothing is left on the meta device
        output = pipe.unet(*inputs[:2], class_labels=inputs[2] if len(inputs) > 2 else None).sample
    assert output.isfinite().all()


def test_half_precision_wrapped_and_as_a_class_of_the_user(tmp_path):
    network = NETWORKS["new-order"]
    half = {name: tensor.half() for name, tensor in network.weights().items()}
    torch.save({"ema": half, "step": 3}, tmp_path / "wrapped.pt")
    convert_openai(tmp_path / "wrapped.pt", tmp_path / "out", model_flags=network.flags, key="ema")
    for dtype in (torch.float32, torch.float16):
        expected = ADMPipeline.from_pretrained(tmp_path / "out", torch_dtype=dtype)
        options = {"model_flags": network.flags, "key": "ema", "torch_dtype": dtype}
        assert_same(ADMPipeline.from_single_file(tmp_path / "wrapped.pt", **options), expected)

    class Mine(ADMPipeline):
        pass

    pipe = Mine.from_single_file(tmp_path / "wrapped.pt", **options)
    assert type(pipe) is Mine
    assert pipe.unet.dtype == torch.float16


def test_file_stays_as_it_is(tmp_path):
    network = NETWORKS["defaults"]
    file = network.save(tmp_path)
    before = file.read_bytes()
    pipe = ADMPipeline.from_single_file(file, **arguments_of(network))
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.zero_()
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_published_name_stands_for_its_flags(tmp_path, monkeypatch):
    network = NETWORKS["new-order"]
    number = sum(tensor.numel() for tensor in network.weights().values())
    monkeypatch.setitem(PRESETS, "64x64_diffusion", Preset("guided-diffusion", network.flags, number))
    file = network.save(tmp_path).rename(tmp_path / "64x64_diffusion.pt")
    assert_same(ADMPipeline.from_single_file(str(file)), ADMPipeline.from_single_file(file, **arguments_of(network)))
    other = file.rename(tmp_path / "mine.pt")
    assert_same(
        ADMPipeline.from_single_file(other, preset="64x64_diffusion"),
        ADMPipeline.from_single_file(other, **arguments_of(network)),
    )


class TestRefused:
    @pytest.mark.parametrize(
        "name, message",
        [
            ("ema_0.9999_050000", "is not the name of a published checkpoint.* 256x256_diffusion_uncond, "),
            ("lsun_cats", "Did you mean `lsun_cat`"),
            ("base_inpaint", "diffusers-adm convert glide"),
        ],
    )
    def test_other_names(self, name, message, tmp_path):
        file = NETWORKS["defaults"].save(tmp_path).rename(tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=message):
            ADMPipeline.from_single_file(file)

    def test_a_file_that_is_not_what_its_name_says(self, tmp_path):
        file = NETWORKS["defaults"].save(tmp_path).rename(tmp_path / "cifar10_uncond_50M_500K.pt")
        with pytest.raises(ValueError, match="are not those of cifar10_uncond_50M_500K"):
            ADMPipeline.from_single_file(file)

    @pytest.mark.parametrize(
        "name, cls, message",
        [
            ("improved-upsampler", ADMPipeline, r"Use `pipe = ADMSuperResolutionPipeline\.from_single_file"),
            ("inpainter", ADMPipeline, r"Use `pipe = ADMInpaintPipeline\.from_single_file\(\.\.\.\)`\.$"),
            ("defaults", ADMInpaintPipeline, r"Then use `ADMInpaintPipeline\.from_pipe\(pipe"),
            ("attention-pool", ADMPipeline, "(?s)is a classifier.*diffusers-adm convert openai.*AdaGNClassifierModel"),
        ],
    )
    def test_another_class(self, name, cls, message, tmp_path):
        network = NETWORKS[name]
        file = network.save(tmp_path)
        with pytest.raises(ValueError, match=message):
            cls.from_single_file(file, **arguments_of(network))

    def test_code_and_damage(self, tmp_path):
        torch.save({"input_blocks.0.0.weight": print}, tmp_path / "code.pt")
        with pytest.raises(ValueError, match="could run code"):
            ADMPipeline.from_single_file(tmp_path / "code.pt", model_flags="")
        with pytest.raises(FileNotFoundError, match="is not a file"):
            ADMPipeline.from_single_file(tmp_path / "lsun_cat.pt")
        network = NETWORKS["defaults"]
        file = network.save(tmp_path)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            ADMPipeline.from_single_file(file, **arguments_of(network))


def test_arguments_are_documented():
    check_documented_arguments(load_single_file.__doc__, load_single_file)
