"""`AdaGNUNet2DModel` beyond its agreement with `UNet2DModel`: start, layouts, adapters, own arguments, errors."""

import re
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d import UNet2DOutput
from docstrings import check_documented_arguments, parameters_of
from peft import LoraConfig
from tolerances import NETWORK, gradient_errors, rounding_errors
from torch import nn
from torch.testing import assert_close
from toy_models import CONDITIONAL, TOY_CONFIG, random_unet

from diffusers_adm import AdaGNUNet2DModel
from diffusers_adm.models.config_checks import NEUTRAL_ARGUMENTS
from diffusers_adm.models.unet_2d_adagn import Downsample, ResBlock, Upsample


# Attention at one level and in the middle; each way of resampling.
LAYOUTS = {
    "residual-resampling": {},
    "conv-resampling": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "one-sided-padding": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "resnet_time_scale_shift": "default",
    },
    "attention-at-every-level": {
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "no-attention": {
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        "add_attention": False,
    },
}
SAMPLE = (2, 3, 8, 8)


def images(*shape):
    return torch.randn(*(shape or SAMPLE), generator=torch.Generator().manual_seed(3))


TINY_CONDITION_MODEL = {
    "block_out_channels": (4, 4, 4, 4),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 4,
    "norm_num_groups": 2,
}


def fresh_unet(**config):
    return AdaGNUNet2DModel(**{**TOY_CONFIG, **config})


def predict(unet, sample=None, timestep=5, **kwargs):
    with torch.no_grad():
        return unet(images() if sample is None else sample, timestep, **kwargs).sample


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# Initialisation


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_untrained_network_predicts_exactly_zero(layout):
    assert torch.equal(predict(fresh_unet(**layout)), torch.zeros(2, 6, 8, 8))


@pytest.mark.parametrize("injection", ["scale_shift", "default"])
@pytest.mark.parametrize("out_channels", [8, 12])
@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_untrained_res_block_is_its_shortcut(resample, out_channels, injection):
    block = ResBlock(8, out_channels, 16, 4, 1e-5, "silu", injection, resample=resample)
    x = images(2, 8, 6, 4)
    expected = x
    if resample == "down":
        expected = x.reshape(2, 8, 3, 2, 2, 2).mean((3, 5))
    elif resample == "up":
        expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    if out_channels != 8:
        weight, bias = block.conv_shortcut.weight[:, :, 0, 0], block.conv_shortcut.bias
        expected = torch.einsum("oc,bchw->bohw", weight, expected) + bias[:, None, None]
    assert_close(block(x, torch.randn(2, 16)), expected)


def test_untrained_attention_is_the_identity():
    attentions = [m for m in fresh_unet().modules() if isinstance(m, Attention)]
    assert attentions
    x = images(2, 16, 4, 4)
    for attention in attentions:
        assert torch.equal(attention(x), x)


def test_only_the_last_convolutions_start_at_zero():
    zero = {name for name, p in fresh_unet(**CONDITIONAL).named_parameters() if name.endswith("weight") and not p.any()}
    assert zero
    assert all(re.search(r"(\.conv2|\.to_out\.0|^conv_out)\.weight$", name) for name in zero)


def test_untrained_network_learns():
    """Zeros at the end of a residual block stop the gradient of the layers before them for one step only."""
    unet = fresh_unet(**CONDITIONAL)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = unet(images(), torch.tensor([3, 90]), class_labels=torch.tensor([0, 1])).sample
        (output - images(2, 6, 8, 8)).square().mean().backward()
        optimizer.step()
    without = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias of the keys adds the same to every entry of a row of the softmax: its gradient is 0 up to rounding.
    assert [name for name in without if not name.endswith("to_k.bias")] == []


# Gradient checkpointing


def gradients(unet, sample):
    unet.zero_grad()
    torch.manual_seed(7)  # of the dropout
    output = unet(sample, torch.tensor([3, 90])).sample
    (output * images(*output.shape)).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in unet.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_checkpointing_recomputes_to_the_same_numbers(layout):
    unet = random_unet(dropout=0.2, **layout).train()
    blocks = {m: name for name, m in unet.named_modules() if isinstance(m, (ResBlock, Attention, Downsample, Upsample))}
    calls = Counter()
    for block in blocks:
        # Before the forward: a recomputation stops inside of it, as soon as it has what the backward needs.
        block.register_forward_pre_hook(lambda module, *_: calls.update([blocks[module]]))

    expected_output, expected = gradients(unet, images())
    assert calls == dict.fromkeys(blocks.values(), 1)
    calls.clear()
    unet.enable_gradient_checkpointing()
    output, grads = gradients(unet, images())
    assert calls == dict.fromkeys(blocks.values(), 2)
    assert rounding_errors(output, expected_output) <= NETWORK
    assert gradient_errors(grads, expected) <= NETWORK

    calls.clear()
    predict(unet)  # nothing to save without gradients
    assert calls == dict.fromkeys(blocks.values(), 1)
    unet.disable_gradient_checkpointing()
    calls.clear()
    gradients(unet, images())
    assert calls == dict.fromkeys(blocks.values(), 1)


# Dropout


@pytest.mark.parametrize("injection", ["scale_shift", "default"])
def test_dropout_only_before_the_second_convolution(injection):
    unet = random_unet(dropout=0.5, resnet_time_scale_shift=injection).train()
    active = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    blocks = {name: m for name, m in unet.named_modules() if isinstance(m, ResBlock)}
    assert set(active) == {f"{name}.dropout" for name in blocks}
    dropped, convolved = {}, {}
    for name, block in blocks.items():
        block.dropout.register_forward_hook(lambda m, args, out, name=name: dropped.__setitem__(name, (args[0], out)))
        block.conv2.register_forward_pre_hook(lambda m, args, name=name: convolved.__setitem__(name, args[0]))
    predict(unet)
    for name in blocks:
        before, after = dropped[name]
        assert convolved[name] is after
        kept = after != 0
        assert 0.3 < kept.float().mean() < 0.7
        assert_close(after[kept], 2 * before[kept])


def test_dropout_only_in_training():
    unet = random_unet(dropout=0.5)
    assert rounding_errors(predict(unet), predict(unet)) <= NETWORK
    assert rounding_errors(predict(unet), predict(random_unet())) <= NETWORK
    unet.train()
    assert rounding_errors(predict(unet), predict(unet)) > NETWORK


# Memory formats


def record_layouts(unet, memory_format, skip=()):
    """Names of the modules with a 4D output of another layout, and of all that were looked at."""
    wrong, seen = [], []

    def hook(name, module, output):
        output = output.sample if isinstance(output, UNet2DOutput) else output
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(t)]
        for tensor in tensors:
            # With one channel or one pixel both layouts are the same.
            if tensor.ndim != 4 or tensor.shape[1] == 1 or tensor.shape[2:].numel() == 1:
                continue
            seen.append(name)
            if not isinstance(module, skip) and not tensor.is_contiguous(memory_format=memory_format):
                wrong.append((name, tuple(tensor.shape), tensor.stride()))

    for name, module in unet.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: hook(name, module, output))
    return wrong, seen


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "planar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_stays_through_the_whole_net(layout, dtype, memory_format):
    unet = random_unet(**layout).to(dtype=dtype).to(memory_format=memory_format)
    sample = images().to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    layout_of_grad = []
    # As the network returns it: autograd would convert `sample.grad` to the layout of `sample`.
    passed = sample * 1.0
    passed.register_hook(lambda grad: layout_of_grad.append(grad.is_contiguous(memory_format=memory_format)))
    # diffusers' attention returns a transposed view, which is channels-last; the block around it puts that right.
    skip = (Attention,) if memory_format == torch.contiguous_format else ()
    wrong, seen = record_layouts(unet, memory_format, skip)
    output = unet(passed, 5).sample
    assert wrong == []
    # Not vacuous: every convolution, every block and the network itself were seen.
    expected = (nn.Conv2d, ResBlock, Attention, Downsample, Upsample, AdaGNUNet2DModel)
    assert {name for name, m in unet.named_modules() if isinstance(m, expected)} <= set(seen)
    (output.float() * images(*output.shape)).sum().backward()
    assert layout_of_grad == [True]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_both_layouts_give_the_same_numbers(layout):
    planar = predict(random_unet(**layout))
    nhwc = random_unet(**layout).to(memory_format=torch.channels_last)
    assert relative_error(predict(nhwc, images().contiguous(memory_format=torch.channels_last)), planar) <= 1e-5


# Adapters


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def perturb_adapters(unet):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:  # the second factor starts at 0: without this the adapter does nothing
            parameter.data = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("targets", [TARGETS, ["conv1", "conv2", "time_emb_proj"]], ids=["attention", "res-blocks"])
def test_lora_adapter(targets):
    unet = random_unet()
    before = predict(unet)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=True))
    assert rounding_errors(predict(unet), before) <= NETWORK
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    adapted = [n for n, m in unet.named_modules() if any(n.endswith(f".{target}") for target in targets)]
    assert trained == {f"{n}.lora_{factor}.default.weight" for n in adapted for factor in "AB"}

    perturb_adapters(unet)
    unet(images(), 5).sample.sum().backward()
    assert {name for name, p in unet.named_parameters() if p.grad is not None} == trained
    changed = predict(unet)
    assert relative_error(changed, before) > 0.01
    unet.disable_adapters()
    assert rounding_errors(predict(unet), before) <= NETWORK
    unet.enable_adapters()
    assert rounding_errors(predict(unet), changed) <= NETWORK
    unet.delete_adapters("default")
    assert rounding_errors(predict(unet), before) <= NETWORK
    assert not any("lora_" in name for name, _ in unet.named_parameters())


def test_lora_adapter_saves_and_loads(tmp_path):
    unet = random_unet()
    before = predict(unet)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    perturb_adapters(unet)
    unet.save_lora_adapter(tmp_path)
    loaded = random_unet()
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert rounding_errors(predict(loaded), predict(unet)) <= NETWORK
    assert relative_error(predict(loaded), before) > 0.01


# Attention processors


def test_attention_processors_are_interchangeable():
    unet = random_unet()
    names = [
        "down_blocks.1.attentions.0.processor",
        "mid_block.attentions.0.processor",
        "up_blocks.0.attentions.0.processor",
        "up_blocks.0.attentions.1.processor",
    ]
    assert list(unet.attn_processors) == names
    assert all(type(processor) is AttnProcessor2_0 for processor in unet.attn_processors.values())
    expected = predict(unet)
    unet.set_attn_processor(AttnProcessor())
    assert all(type(processor) is AttnProcessor for processor in unet.attn_processors.values())
    assert relative_error(predict(unet), expected) <= 1e-5

    calls = []

    class Recorder(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            calls.append(self)
            return super().__call__(*args, **kwargs)

    recorders = {name: Recorder() for name in names}
    unet.set_attn_processor(dict(recorders))
    assert unet.attn_processors == recorders
    assert rounding_errors(predict(unet), expected) <= NETWORK
    assert calls == [recorders[name] for name in names]
    with pytest.raises(ValueError, match="number of processors"):
        unet.set_attn_processor({names[0]: AttnProcessor()})


def test_attention_is_attention():
    """Each pixel's output depends on all others at the level with attention, and only on its surroundings without."""
    for add_attention in (True, False):
        unet = random_unet(
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            block_out_channels=(8,),
            add_attention=add_attention,
            norm_num_groups=8,
        )
        # Group norm, too, sees the whole image: without it only convolutions and attention are left.
        one, other = images(1, 3, 24, 24), images(1, 3, 24, 24)
        other[..., :2, :2] = other[..., :2, :2].flip(-1, -2)
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda x, *args: x
        difference = (predict(unet, one) - predict(unet, other))[..., -1, -1].abs().max()
        assert (difference > 1e-4) == add_attention  # of outputs of about 1, in float32


# Classes


def test_missing_labels_are_the_null_class():
    unet = random_unet(**CONDITIONAL)
    null = predict(unet)
    assert rounding_errors(null, predict(unet, class_labels=torch.tensor([4, 4]))) <= NETWORK
    assert relative_error(predict(unet, class_labels=torch.tensor([0, 4])), null) > 0.01
    mixed = predict(unet, class_labels=torch.tensor([4, 1]))
    assert_close(mixed[0], null[0])
    outputs = [predict(unet, class_labels=torch.full((2,), label)) for label in range(5)]
    for i in range(5):
        for j in range(i):
            assert relative_error(outputs[i], outputs[j]) > 0.01


def test_null_class_need_not_be_the_last():
    unet = random_unet(num_class_embeds=5, null_class_id=0)
    assert rounding_errors(predict(unet), predict(unet, class_labels=torch.tensor([0, 0]))) <= NETWORK
    assert rounding_errors(predict(unet), predict(unet, class_labels=torch.tensor([4, 4]))) > NETWORK


# Arguments that UNet2DModel lacks


@pytest.mark.parametrize("heads", [2, (1, 4), [4, 2]], ids=str)
def test_number_of_heads_takes_precedence_over_their_width(heads):
    every_level = LAYOUTS["attention-at-every-level"]
    unet = random_unet(num_attention_heads=heads, attention_head_dim=3, **every_level)
    numbers = (heads, heads) if isinstance(heads, int) else heads
    attentions = {n: m for n, m in unet.named_modules() if isinstance(m, Attention)}
    levels = {n: 0 if n.startswith(("down_blocks.0", "up_blocks.1")) else 1 for n in attentions}
    assert sorted(levels.values()) == [0, 0, 0, 1, 1, 1, 1]
    for name, attention in attentions.items():
        assert attention.heads == numbers[levels[name]]
        assert attention.inner_dim == (8, 16)[levels[name]]


@pytest.mark.parametrize("channels, heads, width", [((8, 16), (2, 4), 4), ((16, 16), 2, 8), ((8, 16), 1, None)])
def test_number_of_heads_equals_the_width_that_gives_it(channels, heads, width):
    every_level = {**LAYOUTS["attention-at-every-level"], "block_out_channels": channels}
    by_number = random_unet(num_attention_heads=heads, attention_head_dim=3, **every_level)
    by_width = random_unet(attention_head_dim=width, **every_level)
    assert rounding_errors(predict(by_number), predict(by_width)) <= NETWORK


@pytest.mark.parametrize(
    "width, config",
    [(8, {"num_attention_heads": (1, 2)}), (16, {"num_attention_heads": 1}), (8, {"attention_head_dim": 8})],
    ids=["heads-per-level", "heads", "width"],
)
def test_number_of_heads_in_the_up_path(width, config):
    """`UNet2DModel` has no such argument, but its attention reads the number of heads at every call."""
    layout = LAYOUTS["attention-at-every-level"] | {"block_out_channels": (width, 16)}
    unet = random_unet(num_attention_heads_up=4, **layout, **config)
    theirs = UNet2DModel(**{**TOY_CONFIG, **layout, "attention_head_dim": width}).eval()
    theirs.load_state_dict(unet.state_dict())
    as_in_the_down_path = predict(theirs)
    for module in theirs.up_blocks.modules():
        if isinstance(module, Attention):
            module.heads = 4
    assert relative_error(predict(unet), predict(theirs)) <= 1e-5
    assert relative_error(predict(unet), as_in_the_down_path) > 1e-3
    assert relative_error(predict(random_unet(**layout, **config)), as_in_the_down_path) <= 1e-5


def test_width_of_the_sinusoid():
    unet = random_unet(time_proj_dim=10)
    assert unet.time_proj.num_channels == 10
    assert unet.time_embedding.linear_1.in_features == 10
    assert unet.time_embedding.linear_1.out_features == 4 * 8  # still of the first block's channels
    assert random_unet().time_embedding.linear_1.in_features == 8
    assert rounding_errors(predict(random_unet(time_proj_dim=8)), predict(random_unet())) <= NETWORK


def test_scaled_timesteps():
    """improved-diffusion feeds t * 1000 / 4000 to the sinusoid of its 4000-step models."""
    scaled, plain = random_unet(timestep_scale=0.25), random_unet()
    assert rounding_errors(predict(scaled, timestep=400), predict(plain, timestep=100)) <= NETWORK
    assert (
        rounding_errors(
            predict(scaled, timestep=torch.tensor([402, 7])), predict(plain, timestep=torch.tensor([100.5, 1.75]))
        )
        <= NETWORK
    )
    assert rounding_errors(predict(scaled, timestep=400), predict(plain, timestep=400)) > NETWORK


# Number formats and files


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), (torch.float16, 0.006)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_16_bit_is_near_float32(layout, dtype, bound):
    """Bound: some 40 roundings in a row, of which about sqrt(40) add up: 6 units of 2**-8, or 2**-11."""
    expected = predict(random_unet(**layout, **CONDITIONAL))
    unet = random_unet(**layout, **CONDITIONAL).to(dtype)
    output = predict(unet, images().to(dtype), timestep=torch.tensor([5, 5]))
    assert output.dtype == dtype
    assert relative_error(output, expected) <= bound


def test_autocast_is_near_float32():
    with torch.autocast("cpu", torch.bfloat16):
        output = predict(random_unet())
    assert relative_error(output, predict(random_unet())) <= 0.05


def test_layerwise_casting_stores_small_and_computes_large():
    """Stored in bf16, computed in float32: the numbers of a float32 model whose cast weights were rounded to bf16."""
    rounded, unet = random_unet(**CONDITIONAL), random_unet(**CONDITIONAL)
    before = predict(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    output = predict(unet)
    stored = {name for name, p in unet.named_parameters() if p.dtype == torch.bfloat16}
    assert {name for name, p in unet.named_parameters() if p.ndim > 1 and "class_embedding" not in name} <= stored
    assert not any("norm" in name for name in stored)
    for name, parameter in rounded.named_parameters():
        if name in stored:
            parameter.data = parameter.data.bfloat16().float()
    assert rounding_errors(output, predict(rounded)) <= NETWORK
    assert rounding_errors(output, before) > NETWORK


def test_layerwise_casting_to_8_bits():
    unet = random_unet(**CONDITIONAL)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    output = predict(unet)
    assert unet.conv_in.weight.dtype == torch.float8_e4m3fn
    assert relative_error(output, predict(random_unet(**CONDITIONAL))) <= 0.3  # weights rounded by up to 2**-4


def test_save_and_load(tmp_path):
    heads = {"num_attention_heads": (1, 2), "num_attention_heads_up": 4}
    unet = random_unet(**CONDITIONAL, **heads, timestep_scale=0.25, time_proj_dim=12)
    unet.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = AdaGNUNet2DModel.from_pretrained(tmp_path)
    assert rounding_errors(predict(loaded), predict(unet)) <= NETWORK
    own = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in loaded.config.items() if not k.startswith("_")
    }


@pytest.mark.parametrize("keyword", ["torch_dtype", "dtype"])  # the old name and the new one of diffusers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_load_in_another_dtype(dtype, keyword, tmp_path):
    unet = random_unet()
    unet.save_pretrained(tmp_path)
    loaded = AdaGNUNet2DModel.from_pretrained(tmp_path, **{keyword: dtype})
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert rounding_errors(predict(loaded, images().to(dtype)), predict(unet.to(dtype), images().to(dtype))) <= NETWORK


def test_repeated_blocks_are_the_residual_blocks(monkeypatch):
    """`compile_repeated_blocks` finds them by name; a rename would leave it with nothing to compile."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **kwargs: compiled.append((module, kwargs)))
    unet = fresh_unet()
    unet.compile_repeated_blocks(fullgraph=True)
    assert [m for m, _ in compiled] == [m for m in unet.modules() if isinstance(m, ResBlock)]
    assert all(kwargs["fullgraph"] for _, kwargs in compiled)
    compiled.clear()
    unet.compile_repeated_blocks(recompile_limit=3)
    assert all(kwargs == {"recompile_limit": 3} for _, kwargs in compiled)


def test_modules_not_to_split_exist():
    config = {"_class_name": "UNet2DConditionModel", **TINY_CONDITION_MODEL}
    with_text = [
        AdaGNUNet2DModel.from_config({**config, "mid_block_type": f"UNetMidBlock2D{kind}"})
        for kind in ("CrossAttn", "SimpleCrossAttn")
    ]
    names = {type(m).__name__ for unet in (fresh_unet(), *with_text) for m in unet.modules()}
    assert set(AdaGNUNet2DModel._no_split_modules) <= names


def test_tuple_output():
    unet = random_unet()
    with torch.no_grad():
        output = unet(images(), 5, return_dict=False)
        assert isinstance(output, tuple)
        assert rounding_errors(output[0], unet(images(), 5).sample) <= NETWORK
        assert isinstance(unet(images(), 5), UNet2DOutput)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (1, 3, 2, 6), (5, 3, 10, 4)])
def test_every_divisible_size(shape):
    assert predict(random_unet(), images(*shape)).shape == (shape[0], 6, *shape[2:])


def test_examples_of_a_batch_do_not_touch_each_other():
    unet = random_unet(**CONDITIONAL)
    sample, timestep, labels = images(3, 3, 8, 8), torch.tensor([1, 50, 999]), torch.tensor([0, 4, 2])
    together = predict(unet, sample, timestep, class_labels=labels)
    for i in range(3):
        alone = predict(unet, sample[i : i + 1], timestep[i : i + 1], class_labels=labels[i : i + 1])
        assert relative_error(alone[0], together[i]) <= 1e-5


# Bad input


@pytest.mark.parametrize(
    "config, message",
    [
        ({"down_block_types": ("DownBlock2D",)}, r"`down_block_types` has 1 entries .* but `block_out_channels` has 2"),
        ({"up_block_types": ("UpBlock2D",) * 3}, r"`up_block_types` has 3 entries .* but `block_out_channels` has 2"),
        ({"block_out_channels": (8, 8, 8)}, r"`down_block_types` has 2 entries .* has 3 \(8, 8, 8\)"),
        (
            {"down_block_types": ("DownBlock2D", "SkipDownBlock2D")},
            r"`down_block_types` is 'SkipDownBlock2D'; it must be one of \['DownBlock2D', 'AttnDownBlock2D'",
        ),
        ({"up_block_types": ("DownBlock2D", "UpBlock2D")}, "`up_block_types` is 'DownBlock2D'; it must be one of"),
        (
            {"mid_block_type": "UNetMidBlock3D"},
            "`mid_block_type` is 'UNetMidBlock3D'; it must be one",
        ),
        ({"time_embedding_type": "sinusoidal"}, "`time_embedding_type` is 'sinusoidal'; it must be one of"),
        ({"resnet_time_scale_shift": "ada_group"}, "`resnet_time_scale_shift` is 'ada_group'; it must be one of"),
        ({"downsample_type": "pool"}, "`downsample_type` is 'pool'; it must be one of"),
        ({"upsample_type": "bilinear"}, "`upsample_type` is 'bilinear'; it must be one of"),
        ({"class_embed_type": "simple_projection"}, "`class_embed_type` is 'simple_projection'; it must be one of"),
        ({"act_fn": "tanh"}, "`act_fn` is 'tanh'; it must be one of"),
        ({"norm_num_groups": 3}, "num_channels .*must be divisible by num_groups"),
        ({"attn_norm_num_groups": 5}, "num_channels .*must be divisible by num_groups"),
        ({"attention_head_dim": 32}, "`attention_head_dim` is 32; .* 16 channels of level 1.*`num_attention_heads`"),
        ({"attention_head_dim": 0}, "`attention_head_dim` is 0; it must lie between 1 and the 16"),
        ({"attention_head_dim": -8}, "`attention_head_dim` is -8"),
        ({"num_attention_heads": 3}, "`num_attention_heads` is 3; it must divide the 16 channels of level 1"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0; it must divide"),
        ({"num_attention_heads": (1, 2, 4)}, "`num_attention_heads` has 3 entries for 2 levels"),
        ({"num_attention_heads_up": 3}, "`num_attention_heads_up` is 3; it must divide the 16 channels of level 1"),
        ({"num_attention_heads_up": 0}, "`num_attention_heads_up` is 0; it must divide"),
        ({"num_attention_heads_up": (2, 4)}, r"`num_attention_heads_up` is \(2, 4\); it must be one number"),
        # With a separate number for the up path, the down path is still checked.
        ({"num_attention_heads": 3, "num_attention_heads_up": 2}, "`num_attention_heads` is 3; it must divide"),
        ({"layers_per_block": 0}, "`layers_per_block` is 0"),
        ({"time_embedding_type": "learned"}, '`time_embedding_type="learned"` needs `num_train_timesteps`'),
        (
            {"time_embedding_type": "learned", "num_train_timesteps": 10, "timestep_scale": 0.25},
            "`timestep_scale` is 0.25, but learned",
        ),
        (
            {"class_embed_type": "timestep", "num_class_embeds": 5},
            "`class_embed_type` is 'timestep' and `num_class_embeds` is 5",
        ),
        ({"num_class_embeds": 5, "null_class_id": 5}, r"`null_class_id` is 5; .* `num_class_embeds` \(5\)"),
        ({"num_class_embeds": 5, "null_class_id": -1}, "`null_class_id` is -1"),
        ({"null_class_id": 0}, r"`null_class_id` is 0; .* \(None\)"),
    ],
)
def test_config_of_no_network_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        fresh_unet(**config)


def test_arguments_without_effect_at_a_level_are_not_checked():
    """Without attention the number and the width of heads mean nothing: `UNet2DModel`'s default of 8 must pass."""
    unet = fresh_unet(
        **LAYOUTS["no-attention"],
        block_out_channels=(4, 4),
        attention_head_dim=8,
        num_attention_heads_up=3,
        attn_norm_num_groups=3,
    )
    assert unet.attn_processors == {}


THREE_LEVELS = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
}


@pytest.mark.parametrize(
    "config, shape, kwargs, message",
    [
        ({}, (2, 4, 8, 8), {}, r"`sample` has shape \(2, 4, 8, 8\); this model takes \(batch_size, 3, height, width\)"),
        ({}, (3, 8, 8), {}, r"`sample` has shape \(3, 8, 8\)"),
        ({}, (2, 3, 1, 8, 8), {}, r"`sample` has shape \(2, 3, 1, 8, 8\)"),
        (THREE_LEVELS, (2, 3, 8, 10), {}, "`sample` is 8 x 10; both must be divisible by 4.*Pad or crop to 8 x 12"),
        (THREE_LEVELS, (2, 3, 5, 4), {}, "`sample` is 5 x 4; .*Pad or crop to 8 x 4"),
        ({}, SAMPLE, {"timestep": torch.arange(3)}, r"`timestep` has shape \(3,\); this model takes \(2,\)"),
        ({}, SAMPLE, {"timestep": torch.zeros(2, 1)}, r"`timestep` has shape \(2, 1\); this model takes \(2,\)"),
        ({}, SAMPLE, {"class_labels": torch.zeros(2, dtype=torch.long)}, "without class embedding"),
        ({"num_class_embeds": 5}, SAMPLE, {}, r"`class_labels` is missing; this model takes \(2,\)"),
        ({"class_embed_type": "timestep"}, SAMPLE, {}, "`class_labels` is missing"),
        (
            CONDITIONAL,
            SAMPLE,
            {"class_labels": torch.arange(3)},
            r"`class_labels` has shape \(3,\); this model takes \(2,\)",
        ),
        (
            CONDITIONAL,
            SAMPLE,
            {"class_labels": torch.zeros((), dtype=torch.long)},
            r"`class_labels` has shape \(\); this model takes",
        ),
        (
            CONDITIONAL,
            SAMPLE,
            {"class_labels": torch.zeros(2, 1, dtype=torch.long)},
            r"shape \(2, 1\); this model takes \(2,\)",
        ),
        (
            CONDITIONAL,
            SAMPLE,
            {"class_labels": torch.arange(2), "down_block_additional_residuals": (torch.zeros(2, 16, 8, 8),)},
            r"holds 1 tensors, but this network has \d+ skip connections",
        ),
        (CONDITIONAL, SAMPLE, {"class_labels": torch.tensor([0, 5])}, "range from 0 to 5; .* the classes 0 to 4"),
        (CONDITIONAL, SAMPLE, {"class_labels": torch.tensor([-1, 0])}, "range from -1 to 0; .* the classes 0 to 4"),
        (
            {"class_embed_type": "timestep"},
            SAMPLE,
            {"class_labels": torch.arange(3)},
            r"shape \(3,\); this model takes \(2,\)",
        ),
        (
            {"class_embed_type": "identity"},
            SAMPLE,
            {"class_labels": torch.randn(3, 32)},
            r"shape \(3, 32\); this model takes \(2, width\)",
        ),
    ],
)
def test_bad_arguments_of_forward_are_refused(config, shape, kwargs, message):
    unet = fresh_unet(**config)
    with pytest.raises(ValueError, match=message):
        unet(torch.zeros(shape), **{"timestep": 5, **kwargs})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.uint8, torch.complex64])
def test_labels_of_another_type(dtype):
    """torch refuses them, in its own words."""
    with pytest.raises(RuntimeError, match="(?i)expected tensor for argument #1 'indices'|not implemented for"):
        fresh_unet(**CONDITIONAL)(torch.zeros(SAMPLE), 5, class_labels=torch.ones(2, dtype=dtype))


def test_labels_of_the_types_that_diffusers_takes():
    labels = torch.tensor([0, 1], dtype=torch.int32)
    unet = fresh_unet(**CONDITIONAL)
    found, expected = (predict(unet, class_labels=form) for form in (labels, labels.long()))
    assert rounding_errors(found, expected) <= NETWORK
    embedded = fresh_unet(class_embed_type="timestep")
    assert predict(embedded, class_labels=labels.float()).shape == (2, 6, 8, 8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_samples_of_another_type(dtype):
    with pytest.raises(TypeError, match=f"`sample` is {dtype}.*`images.float\\(\\) / 127.5 - 1`"):
        fresh_unet()(torch.ones(SAMPLE, dtype=dtype), 5)


# Signatures and docstrings


@pytest.mark.parametrize(
    "docstring, function",
    [
        (AdaGNUNet2DModel.__doc__, AdaGNUNet2DModel.__init__),
        (AdaGNUNet2DModel.forward.__doc__, AdaGNUNet2DModel.forward),
    ],
    ids=["constructor", "forward"],
)
def test_docstring_documents_the_arguments(docstring, function):
    check_documented_arguments(docstring, function)


def test_constructor_takes_every_argument_of_unet2dmodel():
    ours, theirs = parameters_of(AdaGNUNet2DModel.__init__), parameters_of(UNet2DModel.__init__)
    assert list(ours)[: len(theirs)] == list(theirs)  # in the same order, for who passes them by position
    assert {name: ours[name].default for name in theirs} == {name: p.default for name, p in theirs.items()}


def test_constructor_takes_every_argument_of_unet2dconditionmodel():
    ours, theirs = parameters_of(AdaGNUNet2DModel.__init__), parameters_of(UNet2DConditionModel.__init__)
    # Those of parts that this family lacks are checked apart. A new argument of diffusers must join one of the two.
    assert {name: theirs[name].default for name in theirs.keys() - ours.keys()} == NEUTRAL_ARGUMENTS


def test_forward_takes_every_argument_of_unet2dmodel():
    ours, theirs = parameters_of(AdaGNUNet2DModel.forward), parameters_of(UNet2DModel.forward)
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {name: ours[name].default for name in theirs} == {name: p.default for name, p in theirs.items()}
