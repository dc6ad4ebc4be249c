"""
Features of all diffusers models, tested with ours: saving in shards, splitting over devices, offloading, compiling.
diffusers' own tests of these need a checkout of its repository (see docs/diffusers_contracts.md).
"""

import inspect

import pytest
import torch
from tolerances import NETWORK, rounding_errors
from toy_models import (
    CONDITIONAL,
    MAX_PROMPT_LENGTH,
    fill_randomly,
    random_classifier,
    random_text_encoder,
    random_unet,
)

from diffusers_adm import AdaGNControlNetModel
from diffusers_adm.models.unet_2d_adagn import ResBlock


CONV_RESAMPLING = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "resnet_time_scale_shift": "default",
}
MODELS = {
    "unet": lambda: random_unet(**CONDITIONAL),
    "unet-conv-resampling": lambda: random_unet(**CONV_RESAMPLING),
    "unet-no-attention": lambda: random_unet(
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        add_attention=False,
    ),
    "classifier-attention-pool": lambda: random_classifier(pool="attention"),
    "classifier-adaptive-pool": lambda: random_classifier(pool="adaptive"),
    "classifier-spatial-pool": lambda: random_classifier(pool="spatial"),
    "text-encoder": lambda: random_text_encoder("glide"),
    "controlnet": lambda: fill_randomly(AdaGNControlNetModel.from_unet(random_unet())),
}
SAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
INPUT_IDS = torch.arange(2 * MAX_PROMPT_LENGTH).view(2, -1) % 11


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request) -> torch.nn.Module:
    return request.param()


def predict(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        if hasattr(model, "controlnet_cond_embedding"):
            down, mid = model(SAMPLE, 5, controlnet_cond=SAMPLE, return_dict=False)
            return torch.cat([residual.flatten() for residual in (*down, mid)])
        if hasattr(model, "text_projection"):
            return torch.cat([output.flatten() for output in model(INPUT_IDS, INPUT_IDS < 8)])
        return model(SAMPLE, 5, return_dict=False)[0]


class TestSaving:
    @pytest.mark.parametrize("variant", [None, "ema"])
    def test_in_shards(self, model, tmp_path, variant):
        size = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(tmp_path, max_shard_size=f"{size // 3000}KB", variant=variant)
        suffix = f".{variant}" if variant else ""
        assert len(list(tmp_path.glob(f"diffusion_pytorch_model{suffix}-*-of-*.safetensors"))) > 1
        assert (
            rounding_errors(predict(type(model).from_pretrained(tmp_path, variant=variant)), predict(model)) <= NETWORK
        )
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
            type(model).from_pretrained(tmp_path, variant="another")

    def test_pickled(self, model, tmp_path):
        model.save_pretrained(tmp_path, safe_serialization=False)
        assert [file.name for file in tmp_path.glob("diffusion*")] == ["diffusion_pytorch_model.bin"]
        assert (
            rounding_errors(predict(type(model).from_pretrained(tmp_path, use_safetensors=False)), predict(model))
            <= NETWORK
        )


class TestOffloading:
    """A weight that is read outside of the `forward` of its module would be missing."""

    @pytest.mark.parametrize("share", [0.5, 0.9])
    def test_spread_over_memory_and_disk(self, model, share, tmp_path):
        """The same splits as over two GPUs, by `_no_split_modules`; what lies on disk is read at each call."""
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(
            tmp_path,
            device_map="auto",
            max_memory={"cpu": int(share * sum(p.nbytes for p in model.parameters()))},
            offload_folder=tmp_path / "offloaded",
        )
        assert "disk" in loaded.hf_device_map.values()
        assert any(parameter.is_meta for parameter in loaded.parameters())
        assert rounding_errors(predict(loaded), predict(model)) <= NETWORK

    @pytest.mark.parametrize("offload_type, number", [("block_level", 1), ("leaf_level", None)])
    def test_groups_on_disk(self, model, offload_type, number, tmp_path):
        expected = predict(model)
        model.enable_group_offload(
            torch.device("cpu"),
            offload_type=offload_type,
            num_blocks_per_group=number,
            offload_to_disk_path=str(tmp_path),
        )
        assert list(tmp_path.glob("*.safetensors"))
        assert rounding_errors(predict(model), expected) <= NETWORK


@pytest.mark.no_jitter("torch compiles nothing inside a dispatch mode")
class TestCompiling:
    """With the backend "eager" torch traces the network and runs the trace as it is; translating it takes minutes."""

    @pytest.fixture(autouse=True)
    def _forget_what_was_compiled(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("name", ["unet", "classifier-attention-pool", "text-encoder", "controlnet"])
    def test_whole_without_a_break_or_a_second_time(self, name):
        model = MODELS[name]()
        expected = predict(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert rounding_errors(predict(compiled), expected) <= NETWORK
            assert rounding_errors(predict(compiled), expected) <= NETWORK

    @pytest.mark.skipif(
        "recompile_limit" not in inspect.signature(torch.compile).parameters,
        reason="this version of torch has a global limit alone",
    )
    def test_repeated_blocks_of_many_widths(self):
        """torch compiles one function 8 times, and all residual blocks are one to it."""
        model = random_unet(
            block_out_channels=(8, 16, 24),
            down_block_types=("ResnetDownsampleBlock2D",) * 3,
            up_block_types=("ResnetUpsampleBlock2D",) * 3,
            add_attention=False,
        )
        blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
        kinds = {(block.conv1.in_channels, block.conv1.out_channels, block.resample) for block in blocks}
        assert len(kinds) > 8
        expected = predict(model)
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert rounding_errors(predict(model), expected) <= NETWORK

    @pytest.mark.parametrize("name", ["classifier-attention-pool", "text-encoder"])
    def test_repeated_blocks(self, name):
        model = MODELS[name]()
        expected = predict(model)
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert rounding_errors(predict(model), expected) <= NETWORK
