"""Folders as diffusers' `LDMPipeline` and `LDMTextToImagePipeline` hold them, and quantised latents."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    LDMPipeline,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from hub_server import HubServer
from tolerances import SAMPLING, rounding_errors
from toy_models import (
    TEXT_WIDTH,
    fill_randomly,
    random_diffusers_text_unet,
    random_diffusers_unet,
    random_unet,
    toy_tokenizer,
)

from diffusers_adm import (
    AdaGNControlNetModel,
    AdaGNUNet2DModel,
    ADMControlNetPipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conditioning.latents import LatentSpace


def random_vqvae(**config) -> VQModel:
    """As `CompVis/ldm-celebahq-256`: three latent channels, here each for 2 x 2 pixels."""
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "latent_channels": 3,
        "num_vq_embeddings": 32,
        "scaling_factor": 0.7,
    }
    vae = fill_randomly(VQModel(**{**defaults, **config}))
    vae.quantize.embedding.weight.data.normal_(generator=seeded(5))
    return vae


def random_vae(**config) -> AutoencoderKL:
    """Downsamples by 8, which `LDMTextToImagePipeline` takes for granted."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return fill_randomly(AutoencoderKL(**blocks, block_out_channels=(2,) * 4, norm_num_groups=1, **config))


def ddim() -> DDIMScheduler:
    """As published."""
    return DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)


def make_pipeline(vae=None, unet=None, **components) -> ADMPipeline:
    absent = dict.fromkeys(ADMPipeline._optional_components)
    pipe = ADMPipeline(unet, **{"scheduler": LearnedVarianceDDPMScheduler(), **absent, "vae": vae, **components})
    return quiet(pipe)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe, **arguments) -> torch.Tensor:
    """From the global random state, which `LDMPipeline` takes the noise of its steps from in any case."""
    arguments = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np", **arguments}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.from_numpy(quiet(pipe)(**arguments).images)


@pytest.fixture(scope="module")
def theirs() -> LDMPipeline:
    return quiet(LDMPipeline(vqvae=random_vqvae(), unet=random_diffusers_unet(out_channels=3), scheduler=ddim()))


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ldm")
    theirs.save_pretrained(folder)
    theirs.save_pretrained(folder, variant="fp16")
    return folder


class TestUnconditional:
    @pytest.mark.parametrize("eta", [0.0, 0.7])
    def test_same_images(self, theirs, folder, eta):
        pipe = ADMPipeline.from_pretrained(folder)
        assert type(pipe) is ADMPipeline
        assert type(pipe.vae) is VQModel
        expected, actual = draw(theirs, eta=eta), draw(pipe, eta=eta)
        assert expected.shape == (2, 16, 16, 3)
        assert expected.std() > 0.03
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        assert (draw(pipe, num_inference_steps=3) - actual).abs().max() > 1e-3

    def test_with_our_network(self, theirs, folder):
        unet = AdaGNUNet2DModel.from_pretrained(folder, subfolder="unet")
        pipe = ADMPipeline.from_pretrained(folder, unet=unet)
        assert pipe.unet is unet
        torch.testing.assert_close(draw(pipe), draw(theirs), rtol=0, atol=1e-4)

    def test_arguments_of_loading(self, folder, tmp_path):
        pipe = ADMPipeline.from_pretrained(folder, dtype={"vae": torch.float16, "unet": torch.bfloat16})
        assert (pipe.vae.dtype, pipe.unet.dtype) == (torch.float16, torch.bfloat16)
        assert ADMPipeline.from_pretrained(folder, dtype=torch.bfloat16).vae.dtype == torch.bfloat16
        assert ADMPipeline.from_pretrained(folder, id2label={0: "cat"}).id2label == {0: "cat"}
        pipe = ADMPipeline.from_pretrained(folder, device_map="cpu")
        assert pipe.hf_device_map == "cpu"
        assert pipe.config._name_or_path == folder
        only_variant = tmp_path / "ldm"
        shutil.copytree(folder, only_variant)
        for file in only_variant.glob("*/diffusion_pytorch_model.safetensors"):
            file.unlink()
        assert ADMPipeline.from_pretrained(only_variant, variant="fp16").vae.dtype == torch.float32
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
            ADMPipeline.from_pretrained(only_variant)

    def test_given_components_win(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "vqvae")
        vae, scheduler = random_vqvae(), LearnedVarianceDDPMScheduler(variance_type="fixed_small")
        pipe = ADMPipeline.from_pretrained(tmp_path, vae=vae, scheduler=scheduler)
        assert pipe.vae is vae
        assert pipe.scheduler is scheduler
        assert ADMPipeline.from_pretrained(tmp_path, vae=None).vae is None

    def test_saved_again(self, theirs, folder, tmp_path):
        ADMPipeline.from_pretrained(folder).save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["vae"] == ["diffusers", "VQModel"]
        assert not {"vqvae", "bert"} & set(index)
        assert (tmp_path / "vae" / "config.json").is_file()
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert type(loaded) is ADMPipeline
        torch.testing.assert_close(draw(loaded), draw(theirs), rtol=0, atol=1e-4)

    def test_from_pipe(self, theirs):
        pipe = ADMPipeline.from_pipe(theirs)
        assert pipe.vae is theirs.vqvae
        assert pipe.unet is theirs.unet
        torch.testing.assert_close(draw(pipe), draw(theirs), rtol=0, atol=1e-4)
        vae = random_vqvae(num_vq_embeddings=8)
        assert ADMPipeline.from_pipe(theirs, vae=vae).vae is vae
        again = ADMInpaintPipeline.from_pipe(pipe)
        assert again.vae is theirs.vqvae

    def test_other_pipelines(self, folder):
        pipe = quiet(ADMInpaintPipeline.from_pretrained(folder))
        image, mask = torch.rand((1, 3, 16, 16), generator=seeded()), torch.zeros(1, 1, 16, 16)
        actual = pipe(image, mask, num_inference_steps=2, output_type="pt").images
        assert torch.equal(actual, image)
        with pytest.raises(ValueError, match=r"holds none of \['controlnet'\], which `ADMControlNetPipeline` needs"):
            ADMControlNetPipeline.from_pretrained(folder)
        unet = AdaGNUNet2DModel.from_pretrained(folder, subfolder="unet")
        controlnet = AdaGNControlNetModel.from_unet(unet)
        assert ADMControlNetPipeline.from_pretrained(folder, unet=unet, controlnet=controlnet).vae is not None

    def test_upsamplers_are_refused(self, tmp_path):
        unet = random_diffusers_unet(in_channels=6, out_channels=3)
        LDMSuperResolutionPipeline(vqvae=random_vqvae(), unet=unet, scheduler=ddim()).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="`unet` has `in_channels=6` and `out_channels=3`"):
            ADMPipeline.from_pretrained(tmp_path)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(OSError, match="model_index.json"):
            ADMPipeline.from_pretrained(tmp_path)


def test_from_the_hub(theirs, folder, tmp_path):
    """Loaded by the real client in a process with a fresh cache; without the files of a given component."""
    code = """
import os, sys, torch
from diffusers_adm import ADMPipeline

pipe = ADMPipeline.from_pretrained("CompVis/ldm-celebahq-256")
pipe.set_progress_bar_config(disable=True)
images = pipe(
    batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np"
).images
torch.save([images, type(pipe.vae).__name__], sys.argv[1])
again = ADMPipeline.from_pretrained("CompVis/ldm-celebahq-256", local_files_only=True)
assert again.config._name_or_path == "CompVis/ldm-celebahq-256"
lean = ADMPipeline.from_pretrained("CompVis/ldm-celebahq-256", vae=pipe.vae, cache_dir=sys.argv[2])
assert lean.vae is pipe.vae
assert not [files for place, _, files in os.walk(sys.argv[2]) if place.endswith("vqvae") and files]
"""
    with HubServer({"CompVis/ldm-celebahq-256": folder}) as server:
        server.run_client(code, tmp_path / "result.pt", tmp_path / "cache", cache=tmp_path / "first")
    images, name = torch.load(tmp_path / "result.pt", weights_only=False)
    assert name == "VQModel"
    torch.testing.assert_close(torch.from_numpy(images), draw(theirs), rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=["quantised", "continuous"])
def text_to_image(request) -> LDMTextToImagePipeline:
    """Of both kinds of autoencoders: the published one has an `AutoencoderKL` under the name of `vqvae`."""
    size = len(toy_tokenizer("bert"))
    config = LDMBertConfig(
        vocab_size=size,
        encoder_layers=2,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=TEXT_WIDTH,
        dropout=0.0,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    quantised = random_vqvae(latent_channels=4, block_out_channels=(2,) * 4, norm_num_groups=1, **blocks)
    return quiet(
        LDMTextToImagePipeline(
            vqvae=quantised if request.param == "quantised" else random_vae(latent_channels=4),
            bert=fill_randomly(LDMBertModel(config)).eval(),
            tokenizer=toy_tokenizer("bert", max_length=512),
            unet=random_diffusers_text_unet(in_channels=4, out_channels=4, resnet_time_scale_shift="default"),
            scheduler=ddim(),
        )
    )


class TestText:
    @pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
    def test_same_images(self, text_to_image, tmp_path, guidance_scale):
        """Also of captions of different lengths, whose padding is not masked."""
        text_to_image.save_pretrained(tmp_path)
        pipe = quiet(ADMPipeline.from_pretrained(tmp_path))
        assert type(pipe.text_encoder) is LDMBertModel
        arguments = {"guidance_scale": guidance_scale, "num_inference_steps": 4, "output_type": "np"}
        expected, actual, other = (
            torch.from_numpy(each(prompts, generator=seeded(), **arguments).images)
            for each, prompts in (
                (text_to_image, ["a red cat", "the dog"]),
                (pipe, ["a red cat", "the dog"]),
                (pipe, ["a green mat", "the dog"]),
            )
        )
        assert expected.std() > 0.01
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        assert (other - actual).abs().max() > 1e-3

    def test_from_pipe_and_saved_again(self, text_to_image, tmp_path):
        pipe = quiet(ADMPipeline.from_pipe(text_to_image))
        assert pipe.text_encoder is text_to_image.bert
        assert pipe.vae is text_to_image.vqvae
        pipe.save_pretrained(tmp_path)
        loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
        arguments = {"num_inference_steps": 2, "output_type": "pt"}
        actual, expected = (each("a cat", generator=seeded(), **arguments).images for each in (loaded, pipe))
        assert rounding_errors(actual, expected) <= SAMPLING


class TestQuantised:
    def test_decoding(self):
        vae = random_vqvae()
        pipe = make_pipeline(vae, random_unet())
        latents, images = (
            pipe(generator=seeded(), num_inference_steps=2, output_type=kind).images for kind in ("latent", "pt")
        )
        codes, decoder = vae.quantize.embedding.weight, vae.post_quant_conv
        with torch.no_grad():
            distances = ((latents / 0.7).movedim(1, -1)[..., None, :] - codes).square().sum(-1)
            expected = vae.decoder(decoder(codes[distances.argmin(-1)].movedim(-1, 1)))
        assert rounding_errors(images, ((expected + 1) / 2).clamp(0, 1)) <= SAMPLING

    def test_another_width(self):
        vae = random_vqvae(latent_channels=4, vq_embed_dim=3)
        assert LatentSpace(vae).channels == 3
        pipe = make_pipeline(vae, random_unet())
        image = torch.rand((1, 3, 16, 16), generator=seeded())
        assert pipe(image=image, num_inference_steps=2, output_type="pt").images.shape == image.shape

    def test_from_an_image_without_noise_of_its_latents(self):
        """As diffusers: a `VQModel` gives one latent, so the first noise of the generator is that of the sample."""
        pipe = make_pipeline(random_vqvae(), random_unet())
        image = torch.rand((1, 3, 16, 16), generator=seeded(1))
        arguments = {"image": image, "num_inference_steps": 2, "eta": 0.0, "output_type": "latent"}
        given = torch.randn((1, 3, 8, 8), generator=seeded())
        actual, expected = pipe(generator=seeded(), **arguments).images, pipe(latents=given, **arguments).images
        assert rounding_errors(actual, expected) <= SAMPLING
