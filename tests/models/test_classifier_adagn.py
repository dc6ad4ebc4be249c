"""`AdaGNClassifierModel` against diffusers' encoder and pools written out; files, adapters, timesteps, errors."""

import math
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from docstrings import check_documented_arguments
from peft import LoraConfig
from tolerances import NETWORK, gradient_errors, rounding_errors
from torch import nn
from torch.testing import assert_close
from toy_models import TOY_CLASSIFIER_CONFIG, random_classifier

from diffusers_adm import AdaGNClassifierModel
from diffusers_adm.models.classifier_adagn import AdaGNClassifierOutput, AttentionPool2D, SpatialPool
from diffusers_adm.models.unet_2d_adagn import Downsample, ResBlock


POOLS = ["attention", "adaptive", "spatial", "spatial_v2"]
LAYOUTS = {
    "adagn-residual-resampling": {},
    "added-time-conv-resampling": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "downsample_type": "conv",
        "resnet_time_scale_shift": "default",
        "attention_head_dim": None,
    },
    "three-levels-non-square": {
        "sample_size": (8, 16),
        "in_channels": 2,
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": 4,
        "act_fn": "mish",
        "norm_eps": 1e-3,
    },
    # As ADM's 512x512 classifier: the first block is half as wide as the sinusoid.
    "wide-sinusoid-scaled-timesteps": {"time_proj_dim": 16, "time_embedding_dim": 48, "timestep_scale": 0.25},
}
# Of the largest entry: logits, gradients. float32: two orders of summation apart; float64 shares a float32 sinusoid.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-9, 1e-8)}
SAMPLE = (2, 3, 8, 8)


def images(*shape):
    return torch.randn(*(shape or SAMPLE), generator=torch.Generator().manual_seed(3))


def fresh_classifier(**config):
    return AdaGNClassifierModel(**{**TOY_CLASSIFIER_CONFIG, **config})


def classify(model, sample=None, timestep=5):
    with torch.no_grad():
        return model(images() if sample is None else sample, timestep).logits


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# Logits and gradients


def oracle_features(config, weights, sample, timestep):
    """Skip connections and the middle of a `UNet2DModel` with the same encoder, in float64."""
    levels = len(config.block_out_channels)
    shared = ("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "downsample_type", "act_fn")
    shared += ("attention_head_dim", "norm_num_groups", "norm_eps", "resnet_time_scale_shift", "time_embedding_dim")
    unet = UNet2DModel(
        **{name: config[name] for name in shared},
        up_block_types=("UpBlock2D",) * levels,
        attn_norm_num_groups=config.norm_num_groups,
    )
    if config.time_proj_dim is not None:
        unet.time_proj = Timesteps(config.time_proj_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        unet.time_embedding = TimestepEmbedding(config.time_proj_dim, config.time_embedding_dim)
    encoder = {name: w for name, w in weights.items() if not name.startswith(("head.", "conv_norm_out."))}
    unet = unet.double().eval()
    result = unet.load_state_dict(encoder, strict=False)
    assert result.unexpected_keys == []
    assert all(name.startswith(("up_blocks.", "conv_norm_out.", "conv_out.")) for name in result.missing_keys)

    features = []
    unet.conv_in.register_forward_hook(lambda module, args, output: features.append(output))
    for block in unet.down_blocks:
        block.register_forward_hook(lambda module, args, output: features.extend(output[1]))
    unet.mid_block.register_forward_hook(lambda module, args, output: features.append(output))
    unet(sample, timestep * config.timestep_scale)
    return features


def oracle_attention_pool(x, weights, heads):
    """All positions are queries, and the first output is kept, as in OpenAI's code."""
    batch_size, channels, *_ = x.shape
    x = x.reshape(batch_size, channels, -1)
    x = torch.cat([x.mean(-1, keepdim=True), x], dim=-1) + weights["positional_embedding"].T

    def linear(name, x):
        return torch.einsum("oc,bcn->bon", weights[f"{name}.weight"], x) + weights[f"{name}.bias"][:, None]

    q, k, v = (linear(f"to_{letter}", x).reshape(batch_size, heads, channels // heads, -1) for letter in "qkv")
    probabilities = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(channels // heads), dim=-1)
    x = torch.einsum("bhqk,bhck->bhcq", probabilities, v).reshape(batch_size, channels, -1)
    return linear("to_out", x)[..., 0]


def oracle_logits(model, sample, timestep):
    config, weights = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    features = oracle_features(config, weights, sample, timestep)
    head = {name.removeprefix("head."): w for name, w in weights.items() if name.startswith("head.")}
    channels = config.block_out_channels[-1]
    if config.pool in ("attention", "adaptive"):
        affine = weights["conv_norm_out.weight"], weights["conv_norm_out.bias"]
        x = F.silu(F.group_norm(features[-1], config.norm_num_groups, *affine, config.norm_eps))
        if config.pool == "attention":
            return oracle_attention_pool(x, head, channels // (config.attention_head_dim or channels))
        return torch.einsum("oc,bchw->bo", head["weight"], x) / x[0, 0].numel() + head["bias"]
    x = torch.cat([feature.flatten(2).sum(-1) / feature[0, 0].numel() for feature in features], dim=1)
    x = x @ head["0.weight"].T + head["0.bias"]
    if config.pool == "spatial":
        return x.clamp(min=0) @ head["2.weight"].T + head["2.bias"]
    groups = x.reshape(len(x), 32, 64)
    variance, mean = torch.var_mean(groups, dim=-1, correction=0, keepdim=True)
    x = ((groups - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape) * head["1.weight"] + head["1.bias"]
    return (x * torch.sigmoid(x)) @ head["3.weight"].T + head["3.bias"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("pool", POOLS)
def test_logits_and_guidance_are_those_of_the_formulas(pool, layout, dtype):
    model = random_classifier(pool=pool, **layout).to(dtype)
    config = model.config
    size = config.sample_size
    sample = images(3, config.in_channels, *((size, size) if isinstance(size, int) else size))
    timestep, classes = torch.tensor([0, 17, 999]), torch.tensor([4, 0, 2])

    def guidance(logits, sample):
        log_probabilities = F.log_softmax(logits, dim=-1)[range(3), classes]
        return torch.autograd.grad(log_probabilities.sum(), sample)[0]

    ours_in, theirs_in = sample.to(dtype).requires_grad_(), sample.double().requires_grad_()
    logits, expected = model(ours_in, timestep).logits, oracle_logits(model, theirs_in, timestep)
    assert logits.shape == (3, 5)
    assert logits.dtype == dtype
    assert expected.std() > 0.1
    of_logits, of_gradients = TOLERANCE[dtype]
    assert relative_error(logits, expected) <= of_logits
    assert relative_error(guidance(logits, ours_in), guidance(expected, theirs_in)) <= of_gradients


def test_mean_of_the_attention_pool_is_a_token_of_its_own():
    """With equal keys every token has the same weight, the mean included; its position is the first."""
    pool = AttentionPool2D((2, 3), channels=4, num_heads=2, out_dim=4)
    for linear in (pool.to_q, pool.to_k, pool.to_v, pool.to_out):
        nn.init.zeros_(linear.bias)
        nn.init.zeros_(linear.weight) if linear in (pool.to_q, pool.to_k) else nn.init.eye_(linear.weight)
    x = images(2, 4, 2, 3)
    assert_close(pool(x)[0], x.mean(dim=(2, 3)) + pool.positional_embedding.mean(dim=0))


@pytest.mark.parametrize("heads, width", [((2, 4), 4), (1, None)])
def test_number_of_heads_equals_the_width_that_gives_it(heads, width):
    by_number = random_classifier(num_attention_heads=heads, attention_head_dim=3, layers_per_block=2)
    by_width = random_classifier(attention_head_dim=width, layers_per_block=2)
    assert by_number.head.num_heads == by_width.head.num_heads == (heads if isinstance(heads, int) else heads[-1])
    assert rounding_errors(classify(by_number), classify(by_width)) <= NETWORK


@pytest.mark.parametrize("pool", POOLS)
def test_examples_of_a_batch_do_not_touch_each_other(pool):
    model = random_classifier(pool=pool)
    sample, timestep = images(3, 3, 8, 8), torch.tensor([1, 50, 999])
    together = classify(model, sample, timestep)
    for i in range(3):
        assert relative_error(classify(model, sample[i : i + 1], timestep[i : i + 1])[0], together[i]) <= 1e-5


@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_pools_without_positions_take_every_divisible_size(pool):
    model = random_classifier(pool=pool)
    assert classify(model, images(2, 3, 6, 10)).shape == (2, 5)
    # The size matters: another mean over more positions, not one cropped to `sample_size`.
    larger = F.pad(images(), (0, 4, 0, 4), value=3.0)
    assert relative_error(classify(model, larger), classify(model)) > 0.01


@pytest.mark.parametrize("pool, width", [("attention", 16), ("adaptive", 16), ("spatial", 2048), ("spatial_v2", 2048)])
def test_logits_are_linear_in_the_features(pool, width):
    model = random_classifier(pool=pool)
    output = model(images(), 5)
    assert output.features.shape == (2, width)
    weights = [p for name, p in model.named_parameters() if name.startswith("head.")][-2:]  # weight and bias
    assert_close(output.features @ weights[0].T + weights[1], output.logits)
    gradient = torch.autograd.grad(output.logits[:, 3].sum(), output.features)[0]
    assert rounding_errors(gradient, weights[0][3].expand(2, width)) <= NETWORK


# Initialisation


def test_untrained_adaptive_pool_gives_all_classes_the_same_probability():
    assert torch.equal(classify(fresh_classifier(pool="adaptive")), torch.zeros(2, 5))


@pytest.mark.parametrize("pool", POOLS)
def test_untrained_classifier_learns(pool):
    model = fresh_classifier(pool=pool)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # zeros at the end of a residual block stop the gradient of the layers before them for one step
        optimizer.zero_grad()
        F.cross_entropy(model(images(), torch.tensor([3, 90])).logits, torch.tensor([1, 4])).backward()
        optimizer.step()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias of the keys adds the same to every entry of a row of the softmax: its gradient is 0 up to rounding.
    assert [name for name in without if not name.endswith("to_k.bias")] == []


def test_dropout_sits_in_the_residual_blocks_and_acts_in_training_alone():
    model = random_classifier(dropout=0.5)
    assert {m.dropout.p for m in model.modules() if isinstance(m, ResBlock)} == {0.5}
    assert rounding_errors(classify(model), classify(random_classifier())) <= NETWORK
    model.train()
    assert rounding_errors(classify(model), classify(model)) > NETWORK


# Timesteps


@pytest.mark.parametrize(
    "timestep",
    [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7]), torch.tensor(7.0, dtype=torch.float64)],
    ids=str,
)
def test_every_form_of_timestep(timestep):
    model = random_classifier()
    assert (
        rounding_errors(classify(model, timestep=timestep), classify(model, timestep=torch.tensor([7, 7]))) <= NETWORK
    )


def test_fractional_timesteps():
    """Some samplers of diffusers pass timesteps like 980.02."""
    model = random_classifier()
    outputs = [classify(model, timestep=torch.tensor(t)) for t in (7.0, 7.5, 8.0)]
    assert relative_error(outputs[1], outputs[0]) > 1e-3
    assert relative_error(outputs[1], outputs[2]) > 1e-3


def test_scaled_timesteps():
    scaled, plain = random_classifier(timestep_scale=0.25), random_classifier()
    assert rounding_errors(classify(scaled, timestep=400), classify(plain, timestep=100)) <= NETWORK
    assert (
        rounding_errors(
            classify(scaled, timestep=torch.tensor([402, 7])), classify(plain, timestep=torch.tensor([100.5, 1.75]))
        )
        <= NETWORK
    )


# Gradient checkpointing and memory


def gradients(model):
    model.zero_grad()
    torch.manual_seed(7)  # of the dropout
    sample = images().requires_grad_()
    logits = model(sample, torch.tensor([3, 90])).logits
    F.cross_entropy(logits, torch.tensor([1, 4])).backward()
    return logits.detach(), {"sample": sample.grad} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("pool", ["attention", "spatial_v2"])
def test_gradient_checkpointing_recomputes_to_the_same_numbers(pool):
    conv = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    model = random_classifier(pool=pool, dropout=0.2, **(conv if pool == "attention" else {})).train()
    blocks = {m: name for name, m in model.named_modules() if isinstance(m, (ResBlock, Attention, Downsample))}
    calls = Counter()
    for block in blocks:
        block.register_forward_pre_hook(lambda module, *_: calls.update([blocks[module]]))

    expected_logits, expected = gradients(model)
    assert calls == dict.fromkeys(blocks.values(), 1)
    calls.clear()
    model.enable_gradient_checkpointing()
    logits, grads = gradients(model)
    assert calls == dict.fromkeys(blocks.values(), 2)
    assert rounding_errors(logits, expected_logits) <= NETWORK
    assert gradient_errors(grads, expected) <= NETWORK


@pytest.mark.parametrize("pool", POOLS)
def test_skip_connections_are_not_kept_without_gradients(pool):
    model = random_classifier(pool=pool)
    outputs, alive = [], []
    model.conv_in.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    model.down_blocks[0].register_forward_hook(
        lambda module, args, output: outputs.extend(weakref.ref(skip) for skip in output[1])
    )
    model.mid_block.register_forward_pre_hook(lambda *_: alive.extend(ref() is not None for ref in outputs))
    classify(model)
    assert alive == [False] * 3


@pytest.mark.parametrize("pool", ["attention", "spatial_v2"])
def test_nothing_in_forward_or_backward_waits_for_the_device(pool):
    """On the meta device no number can be read, so anything that would wait for a GPU raises an error."""
    model = random_classifier(pool=pool, timestep_scale=0.25).to("meta")
    sample = torch.empty(SAMPLE, device="meta", requires_grad=True)
    for timestep in (torch.empty(2, dtype=torch.long, device="meta"), torch.tensor(7, device="meta"), 7):
        logits = model(sample, timestep).logits
        assert (logits.shape, logits.device.type) == ((2, 5), "meta")
    gradient = torch.autograd.grad(F.log_softmax(logits, dim=-1)[:, 3].sum(), sample)[0]
    assert gradient.shape == SAMPLE


@pytest.mark.parametrize("pool", POOLS)
def test_modules_may_lie_on_different_devices(pool):
    """Only the hook of a module moves its inputs, so tensors of two devices must meet inside one module."""
    model = random_classifier(pool=pool)
    whole = (ResBlock, Attention, AttentionPool2D, SpatialPool)
    assert {cls.__name__ for cls in whole} == set(AdaGNClassifierModel._no_split_modules)
    first = ("conv_in.", "time_", "down_blocks.0.")
    for name, module in model.named_modules():
        inside = any(isinstance(parent, whole) and module in parent.modules() for parent in model.modules())
        if isinstance(module, whole) or (not inside and next(module.parameters(recurse=False), None) is not None):
            device = "cpu" if f"{name}.".startswith(first) else "meta"
            add_hook_to_module(module.to(device), AlignDevicesHook(execution_device=device))
    assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
    assert classify(model).device.type == "meta"


# Memory formats


@pytest.mark.parametrize("pool", POOLS)
def test_channels_last(pool):
    model = random_classifier(pool=pool)
    expected = classify(model)
    model = model.to(memory_format=torch.channels_last)
    layouts = []

    def look(module, args, output):
        layouts.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, ResBlock, Attention)):
            module.register_forward_hook(look)
    assert relative_error(classify(model, images().contiguous(memory_format=torch.channels_last)), expected) <= 1e-5
    assert len(layouts) > 10
    assert all(layouts)


# Number formats and files


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), (torch.float16, 0.006)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("pool", POOLS)
def test_16_bit_is_near_float32(pool, dtype, bound):
    """Bound: some 40 roundings in a row, of which about sqrt(40) add up: 6 units of 2**-8, or 2**-11."""
    logits = classify(random_classifier(pool=pool).to(dtype), images().to(dtype))
    assert logits.dtype == dtype
    assert relative_error(logits, classify(random_classifier(pool=pool))) <= bound


def test_scores_of_the_attention_pool_are_float32():
    """Products of 256, 256.5 and 257, all of which are 256 in bfloat16: the result would be 19% off."""
    pool = AttentionPool2D((1, 2), channels=2, num_heads=1, out_dim=2)
    for linear in (pool.to_q, pool.to_k, pool.to_v, pool.to_out):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    nn.init.zeros_(pool.positional_embedding)
    nn.init.zeros_(pool.to_q.weight)
    pool.to_q.bias.data = torch.tensor([16.0, 1.0])
    x = torch.tensor([[16.0, 16.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
    weights = torch.softmax(torch.tensor([256.0, 256.5, 257.0], dtype=torch.float64) / 2**0.5, dim=0)
    expected = weights @ torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    logits, _ = pool.bfloat16()(x.bfloat16())
    assert relative_error(logits[0, 1], expected) <= 2**-8


@pytest.mark.parametrize("pool", POOLS)
def test_autocast_is_near_float32(pool):
    with torch.autocast("cpu", torch.bfloat16):
        logits = classify(random_classifier(pool=pool))
    assert relative_error(logits, classify(random_classifier(pool=pool))) <= 0.05


@pytest.mark.parametrize("pool", ["attention", "spatial_v2"])
def test_layerwise_casting_stores_small_and_computes_large(pool):
    """Stored in bf16, computed in float32: the numbers of a float32 model whose cast weights were rounded to bf16."""
    rounded, model = random_classifier(pool=pool), random_classifier(pool=pool)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    logits = classify(model)
    stored = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    kept = {name for name, p in model.named_parameters()} - stored
    assert all("norm" in name or name in ("head.positional_embedding", "head.1.weight", "head.1.bias") for name in kept)
    for name, parameter in rounded.named_parameters():
        if name in stored:
            parameter.data = parameter.data.bfloat16().float()
    assert rounding_errors(logits, classify(rounded)) <= NETWORK


@pytest.mark.parametrize("pool", POOLS)
def test_save_and_load(pool, tmp_path):
    config = {"pool": pool, "sample_size": (8, 4), "num_attention_heads": (1, 2), "timestep_scale": 0.25}
    model = random_classifier(**config, time_proj_dim=12)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded, info = AdaGNClassifierModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    sample = images(2, 3, 8, 4)
    assert rounding_errors(classify(loaded, sample), classify(model, sample)) <= NETWORK
    own = {k: v for k, v in model.config.items() if not k.startswith("_")}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in loaded.config.items() if not k.startswith("_")
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_load_in_another_dtype(dtype, tmp_path):
    model = random_classifier()
    model.save_pretrained(tmp_path)
    loaded = AdaGNClassifierModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert (
        rounding_errors(classify(loaded, images().to(dtype)), classify(model.to(dtype), images().to(dtype))) <= NETWORK
    )


def test_tuple_output():
    model = random_classifier()
    with torch.no_grad():
        output = model(images(), 5, return_dict=False)
        assert isinstance(output, tuple)
        assert isinstance(model(images(), 5), AdaGNClassifierOutput)
    assert rounding_errors(output[0], classify(model)) <= NETWORK


# Adapters and attention processors


@pytest.mark.parametrize(
    "targets, modules",
    [
        (["to_q", "to_k", "to_v", "to_out.0"], {"down_blocks.1.attentions.0", "mid_block.attentions.0", "head"}),
        (["head.to_out"], {"head"}),
    ],
    ids=["attention", "last-layer"],
)
def test_lora_adapter(targets, modules, tmp_path):
    model = random_classifier()
    before = classify(model)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    assert rounding_errors(classify(model), before) <= NETWORK
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".to_")[0] for name in trained} == modules
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name in trained:  # the second factor starts at 0: without this the adapter does nothing
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model(images(), 5).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    changed = classify(model)
    assert relative_error(changed, before) > 0.01

    model.save_lora_adapter(tmp_path)
    loaded = random_classifier()
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert rounding_errors(classify(loaded), changed) <= NETWORK
    model.delete_adapters("default")
    assert rounding_errors(classify(model), before) <= NETWORK


def test_attention_processors_are_interchangeable():
    model = random_classifier()
    names = ["down_blocks.1.attentions.0.processor", "mid_block.attentions.0.processor"]
    assert list(model.attn_processors) == names
    expected = classify(model)
    model.set_attn_processor(AttnProcessor())
    assert all(type(processor) is AttnProcessor for processor in model.attn_processors.values())
    assert relative_error(classify(model), expected) <= 1e-5
    processors = {name: AttnProcessor2_0() for name in names}
    model.set_attn_processor(dict(processors))
    assert model.attn_processors == processors
    assert rounding_errors(classify(model), expected) <= NETWORK


# Bad input


@pytest.mark.parametrize(
    "config, message",
    [
        ({"pool": "max"}, r"`pool` is 'max'; it must be one of \['attention', 'adaptive', 'spatial', 'spatial_v2'\]"),
        ({"pool": None}, "`pool` is None"),
        ({"sample_size": 7}, "`sample_size` is 7; .* divisible by 2, the total downsampling"),
        ({"sample_size": 0}, "`sample_size` is 0; it must be at least 1"),
        ({"sample_size": (8, 9)}, r"`sample_size` is \(8, 9\)"),
        ({"sample_size": (8, 8, 8)}, r"`sample_size` is \(8, 8, 8\); it must be one number or \(height, width\)"),
        ({"sample_size": None, "pool": "spatial"}, "`sample_size` is None"),
        ({"down_block_types": ("DownBlock2D",)}, "`down_block_types` has 1 entries .* but `block_out_channels` has 2"),
        ({"down_block_types": ("DownBlock2D", "UpBlock2D")}, "`down_block_types` is 'UpBlock2D'; it must be one of"),
        ({"downsample_type": "pool"}, "`downsample_type` is 'pool'; it must be one of"),
        ({"resnet_time_scale_shift": "ada_group"}, "`resnet_time_scale_shift` is 'ada_group'; it must be one of"),
        ({"act_fn": "tanh"}, "`act_fn` is 'tanh'; it must be one of"),
        ({"layers_per_block": 0}, "`layers_per_block` is 0"),
        ({"norm_num_groups": 3}, "num_channels .*must be divisible by num_groups"),
        ({"num_attention_heads": 3}, "`num_attention_heads` is 3; it must divide the 16 channels of level 1"),
        ({"num_attention_heads": (1, 2, 4)}, "`num_attention_heads` has 3 entries for 2 levels"),
        (
            {"attention_head_dim": 32},
            "`attention_head_dim` is 32; it must lie between 1 and the 16 channels of level 1",
        ),
        (
            # Three heads of 5 fit into 16 channels for diffusers' `Attention`, not for the pool.
            {"attention_head_dim": 5},
            "`attention_head_dim` is 5; the attention pool needs a divisor of the 16 channels",
        ),
        # The middle block has attention, with or without attention in the last level.
        ({"down_block_types": ("DownBlock2D",) * 2, "num_attention_heads": 3}, "`num_attention_heads` is 3"),
    ],
)
def test_config_of_no_network_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        fresh_classifier(**config)


@pytest.mark.parametrize(
    "config, shape, timestep, message",
    [
        ({}, (2, 4, 8, 8), 5, r"`sample` has shape \(2, 4, 8, 8\); this model takes \(batch_size, 3, height, width\)"),
        ({}, (3, 8, 8), 5, r"`sample` has shape \(3, 8, 8\)"),
        ({"pool": "spatial"}, (2, 3, 8, 9), 5, "`sample` is 8 x 9; both must be divisible by 2.*Pad or crop to 8 x 10"),
        # The attention pool takes one size only.
        ({}, (2, 3, 16, 16), 5, r"`sample` has shape \(2, 3, 16, 16\); this model takes \(batch_size, 3, 8, 8\)"),
        # The same number of positions, in another shape.
        ({"sample_size": (4, 16)}, SAMPLE, 5, r"shape \(2, 3, 8, 8\); this model takes \(batch_size, 3, 4, 16\)"),
        ({}, SAMPLE, torch.arange(3), r"`timestep` has shape \(3,\); this model takes \(2,\)"),
        ({}, SAMPLE, torch.zeros(2, 1), r"`timestep` has shape \(2, 1\); this model takes \(2,\)"),
    ],
)
def test_bad_arguments_of_forward_are_refused(config, shape, timestep, message):
    with pytest.raises(ValueError, match=message):
        fresh_classifier(**config)(torch.zeros(shape), timestep)


# Signatures and docstrings


@pytest.mark.parametrize(
    "docstring, function",
    [
        (AdaGNClassifierModel.__doc__, AdaGNClassifierModel.__init__),
        (AdaGNClassifierModel.forward.__doc__, AdaGNClassifierModel.forward),
    ],
    ids=["constructor", "forward"],
)
def test_docstring_documents_the_arguments(docstring, function):
    check_documented_arguments(docstring, function)


def test_defaults_are_those_of_the_published_64x64_classifier():
    """Except for its depth of 4: heads of 64 channels, attention from 32x32 on, and 1000 classes."""
    with torch.device("meta"):
        model = AdaGNClassifierModel(sample_size=64)
    heads = {name: (m.heads, m.inner_dim) for name, m in model.named_modules() if isinstance(m, Attention)}
    assert {name.split(".")[1] for name in heads} == {"1", "2", "3", "attentions"}
    assert heads["down_blocks.2.attentions.1"] == (6, 384)
    assert heads["mid_block.attentions.0"] == (8, 512)
    assert (model.head.num_heads, model.head.to_out.out_features) == (8, 1000)
    assert model.head.positional_embedding.shape == (8 * 8 + 1, 512)
