"""
`AdaGNControlNetModel` against diffusers' `ControlNetModel`, and against diffusers' U-Nets taken apart by hooks; how it
is made from a U-Net; what is refused.
"""

import re

import pytest
import torch
import unet_configs
from diffusers import ControlNetModel, UNet2DModel
from docstrings import check_documented_arguments, parameters_of
from test_unet_2d_adagn_compatibility import TOLERANCE, relative_error
from test_unet_2d_adagn_text import CONFIGS as TEXT_CONFIGS
from test_unet_2d_adagn_text import STABLE_DIFFUSION, inputs_for, random_condition_model
from tolerances import NETWORK, rounding_errors
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from toy_models import CONDITIONAL, TOY_CONFIG, fill_randomly, random_text_unet, random_unet

from diffusers_adm import AdaGNControlNetModel, AdaGNMultiControlNetModel, AdaGNUNet2DModel
from diffusers_adm.models.config_checks import NEUTRAL_ARGUMENTS
from diffusers_adm.models.controlnet_adagn import residual_channels, strides_of


SAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
IMAGE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
TIMESTEP = torch.tensor([5, 700])


def random_controlnet(unet, seed=7, **kwargs) -> AdaGNControlNetModel:
    """A ControlNet with random zero convolutions and image embedding; the other weights are the U-Net's."""
    controlnet = AdaGNControlNetModel.from_unet(unet, **kwargs).eval()
    fill_randomly(controlnet.controlnet_down_blocks, seed)
    fill_randomly(controlnet.controlnet_mid_block, seed + 1)
    fill_randomly(controlnet.controlnet_cond_embedding, seed + 2)
    return controlnet.to(unet.dtype)


def with_controlnet(unet, controlnet, sample, timestep, image, scale=1.0, guess_mode=False, **conditions):
    down, mid = controlnet(
        sample,
        timestep,
        controlnet_cond=image,
        conditioning_scale=scale,
        guess_mode=guess_mode,
        return_dict=False,
        **conditions,
    )
    return unet(
        sample, timestep, **conditions, down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample


class TestAgainstDiffusers:
    """Files of its `ControlNetModel`, which are all for cross-attention in transformer blocks."""

    CONFIGS = {
        "stable-diffusion-1.5": {},
        "stable-diffusion-2.1": {
            "attention_head_dim": (2, 4, 4),
            "use_linear_projection": True,
            "upcast_attention": True,
            "transformer_layers_per_block": (1, 2, 1),
        },
        "scale-shift-bgr": {
            "resnet_time_scale_shift": "scale_shift",
            "controlnet_conditioning_channel_order": "bgr",
            "conditioning_channels": 3,
            "layers_per_block": 1,
        },
        "pooled-residuals": {"global_pool_conditions": True, "act_fn": "gelu", "layers_per_block": 1},
        "classes-and-projected-text": {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 12,
            "encoder_hid_dim": 40,
            "encoder_hid_dim_type": "text_proj",
            "conditioning_embedding_out_channels": (4, 8),
            "conditioning_channels": 1,
        },
        "class-table-and-pooled-text": {
            "num_class_embeds": 10,
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 4,
            "mid_block_type": "UNetMidBlock2D",
        },
    }
    SHARED = (
        "in_channels",
        "block_out_channels",
        "down_block_types",
        "cross_attention_dim",
        "attention_head_dim",
        "norm_num_groups",
    )

    def make(self, name, dtype=torch.float32):
        config = {key: STABLE_DIFFUSION[key] for key in self.SHARED} | self.CONFIGS[name]
        theirs = fill_randomly(ControlNetModel(**config)).to(dtype)
        factor = 2 ** (len(theirs.config.conditioning_embedding_out_channels) - 1)
        sample, timestep, states, _ = inputs_for({**STABLE_DIFFUSION, **config}, dtype)
        if "encoder_hid_dim" in config:
            states = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
        sample = sample[:, :, :8, :8]
        image = torch.rand(3, theirs.config.conditioning_channels, 8 * factor, 8 * factor).to(dtype)
        labels = None
        if "num_class_embeds" in config:
            labels = torch.tensor([0, 9, 4])
        elif "class_embed_type" in config:
            labels = torch.randn(3, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
        return theirs, (sample, timestep, states, image), {"class_labels": labels}

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("name", CONFIGS)
    def test_same_weights_same_residuals_and_gradients(self, name, dtype, tmp_path):
        theirs, inputs, kwargs = self.make(name, dtype)
        theirs.save_pretrained(tmp_path)
        ours, info = AdaGNControlNetModel.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
        assert not any(info.values()), info
        their_inputs = inputs
        if theirs.encoder_hid_proj is not None:  # which its pipelines do for it
            sample, timestep, states, image = inputs
            their_inputs = (sample, timestep, theirs.encoder_hid_proj(states).detach(), image)
        for options in ({}, {"conditioning_scale": 0.3}, {"guess_mode": True}):
            found, expected = ours(*inputs, **kwargs, **options), theirs(*their_inputs, **kwargs, **options)
            # In guess mode its scales are float32, and where it pools text, the softmax of its attention is.
            in_float32 = options.get("guess_mode") or "addition_embed_type" in self.CONFIGS[name]
            tolerance = max(TOLERANCE[dtype], 1e-6 if in_float32 else 0)
            assert len(found.down_block_res_samples) == len(expected.down_block_res_samples)
            found, expected = (
                [*output.down_block_res_samples, output.mid_block_res_sample] for output in (found, expected)
            )
            for a, b in zip(found, expected, strict=True):
                assert relative_error(a, b) < tolerance
            for model, residuals in ((ours, found), (theirs, expected)):
                model.zero_grad()
                sum((residual * residual.detach().cos()).sum() for residual in residuals).backward()
            gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
            largest = max(gradient.abs().max() for gradient in gradients.values() if gradient is not None)
            for key, parameter in ours.named_parameters():
                if gradients[key] is not None:
                    assert (parameter.grad - gradients[key]).abs().max() < tolerance * largest, key

    def test_made_from_a_unet_as_theirs(self):
        """The same config and weights from the same U-Net, except for layers that start at random."""
        unet = random_condition_model({**STABLE_DIFFUSION, "layers_per_block": 2})
        theirs = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96, 256))
        ours = AdaGNControlNetModel.from_unet(unet, conditioning_downsampling_factor=8)
        for key, value in theirs.config.items():
            if not key.startswith("_"):
                assert ours.config.get(key, NEUTRAL_ARGUMENTS.get(key)) == value, key
        expected, found = theirs.state_dict(), ours.state_dict()
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if name.startswith("controlnet_cond_embedding") and not name.startswith(
                "controlnet_cond_embedding.conv_out"
            ):
                assert found[name].shape == value.shape, name
            else:
                assert torch.equal(found[name], value), name

    def test_missing_arguments_have_their_defaults(self):
        config = {"_class_name": "ControlNetModel", "cross_attention_dim": 24, "block_out_channels": (32, 32, 32, 32)}
        with torch.device("meta"):
            ours, theirs = AdaGNControlNetModel.from_config(config), ControlNetModel.from_config(config)
        assert ours.config.in_channels == 4
        assert ours.state_dict().keys() == theirs.state_dict().keys()

    @pytest.mark.parametrize(
        "config, message",
        [
            ({"addition_embed_type": "text_time"}, "`addition_embed_type` is 'text_time'"),
            ({"addition_time_embed_dim": 256}, "`addition_time_embed_dim` is 256"),
            (
                {"down_block_types": ["DownBlock2D"] * 4, "mid_block_type": "UNetMidBlock2D"},
                "`ControlNetModel` without any cross-attention",
            ),
        ],
    )
    def test_refuses_parts_that_it_lacks(self, config, message):
        with pytest.raises(ValueError, match=message):
            AdaGNControlNetModel.from_config({"_class_name": "ControlNetModel", **config})


UNETS = {
    "unconditional": lambda: random_unet(),
    "by-class": lambda: random_unet(**CONDITIONAL),
    "fixed-variance": lambda: random_unet(out_channels=3),
    "by-text-transformer": lambda: random_text_unet("transformer"),
    "by-text-added-kv": lambda: random_text_unet("added_kv", **CONDITIONAL),
    "glide": lambda: random_text_unet("added_kv", addition_embed_type="text_embeds"),
    "upsampler": lambda: random_unet(in_channels=6, time_cond_proj_dim=12),
    "inpainter": lambda: random_unet(in_channels=7),
    "centred": lambda: random_unet(center_input_sample=True, timestep_scale=0.25),
}


def inputs_of(unet, dtype=torch.float32):
    """`(sample, timestep), conditions`: all inputs of the U-Net."""
    generator = torch.Generator().manual_seed(5)
    config, conditions = unet.config, {}
    sample = torch.randn(2, config.in_channels, 8, 8, generator=generator)
    if unet.has_cross_attention:
        conditions["encoder_hidden_states"] = torch.randn(2, 5, 16, generator=generator)
        conditions["encoder_attention_mask"] = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    if config.addition_embed_type == "text_embeds":
        conditions["added_cond_kwargs"] = {"text_embeds": torch.randn(2, unet.time_embed_dim, generator=generator)}
    if config.num_class_embeds is not None:
        conditions["class_labels"] = torch.tensor([1, 3])
    if config.time_cond_proj_dim is not None:
        conditions["timestep_cond"] = torch.randn(2, 12, generator=generator)
    return (sample.to(dtype), TIMESTEP), conditions


class TestFromUNet:
    @pytest.mark.parametrize("width", [1.0, 0.5])
    @pytest.mark.parametrize("name", UNETS)
    @torch.no_grad()
    def test_a_new_controlnet_changes_nothing_at_all(self, name, width):
        unet = UNETS[name]()
        inputs, conditions = inputs_of(unet)
        controlnet = AdaGNControlNetModel.from_unet(unet, width=width)
        controlnet.check_base(unet)
        assert (
            rounding_errors(
                with_controlnet(unet, controlnet, *inputs, IMAGE, **conditions), unet(*inputs, **conditions).sample
            )
            <= NETWORK
        )

    @pytest.mark.parametrize("name", UNETS)
    @torch.no_grad()
    def test_every_condition_affects_the_residuals(self, name):
        unet = UNETS[name]()
        (sample, timestep), conditions = inputs_of(unet)
        controlnet = random_controlnet(unet)

        def residuals(image=IMAGE, sample=sample, timestep=timestep, **changed):
            down, mid = controlnet(
                sample, timestep, controlnet_cond=image, return_dict=False, **{**conditions, **changed}
            )
            return torch.cat([x.flatten() for x in (*down, mid)])

        plain = residuals()
        assert rounding_errors(plain, residuals(image=1 - IMAGE)) > NETWORK
        assert rounding_errors(plain, residuals(sample=sample + 1)) > NETWORK
        assert rounding_errors(plain, residuals(timestep=timestep + 1)) > NETWORK
        for key, value in conditions.items():
            if key == "encoder_attention_mask":
                changed = 1 - value
            elif isinstance(value, dict):
                changed = {k: v + 1 for k, v in value.items()}
            else:
                changed = value + 1
            assert rounding_errors(plain, residuals(**{key: changed})) > NETWORK, key

    @pytest.mark.parametrize("name", unet_configs.CONFIGS)
    @torch.no_grad()
    def test_every_layout_of_pixels(self, name):
        config = unet_configs.CONFIGS[name]
        unet = fill_randomly(AdaGNUNet2DModel(**config))
        channels, size = unet.config.in_channels, unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        labels = {"timestep": torch.tensor([3, 9]), "identity": torch.randn(2, unet.time_embed_dim)}.get(
            config.get("class_embed_type"), torch.tensor([1, 2]) if config.get("num_class_embeds") else None
        )
        sample = torch.randn(2, channels, height, width)
        inputs = (sample, torch.tensor([1, 90]))
        controlnet = AdaGNControlNetModel.from_unet(unet, conditioning_channels=1)
        image = torch.rand(2, 1, height, width)
        expected = unet(*inputs, class_labels=labels).sample
        assert (
            rounding_errors(with_controlnet(unet, controlnet, *inputs, image, class_labels=labels), expected) <= NETWORK
        )
        assert torch.equal(controlnet.conv_in.weight, unet.conv_in.weight)
        narrow = AdaGNControlNetModel.from_unet(unet, conditioning_channels=1, width=0.5)
        assert rounding_errors(with_controlnet(unet, narrow, *inputs, image, class_labels=labels), expected) <= NETWORK

    @pytest.mark.parametrize("width", [1.0, 0.5])
    @pytest.mark.parametrize("name", TEXT_CONFIGS)
    @torch.no_grad()
    def test_every_layout_of_text(self, name, width):
        """From diffusers' own class, in which arguments of some of these have other meanings."""
        theirs = random_condition_model(TEXT_CONFIGS[name])
        sample, timestep, states, labels = inputs_for(TEXT_CONFIGS[name])
        controlnet = AdaGNControlNetModel.from_unet(theirs, width=width)
        controlnet.check_base(theirs)
        conditions = {"encoder_hidden_states": states, "class_labels": labels}
        expected = theirs(sample, timestep, **conditions).sample
        image = torch.rand(3, 3, 16, 16)
        assert (
            rounding_errors(with_controlnet(theirs, controlnet, sample, timestep, image, **conditions), expected)
            <= NETWORK
        )

    def test_the_copy_is_one(self):
        unet = random_unet(**CONDITIONAL)
        before = {name: value.clone() for name, value in unet.state_dict().items()}
        controlnet = AdaGNControlNetModel.from_unet(unet)
        for name, value in controlnet.state_dict().items():
            if not name.startswith("controlnet_"):
                assert torch.equal(value, before[name]), name
        with torch.no_grad():
            for parameter in controlnet.parameters():
                parameter.add_(1)
        assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())

    def test_without_weights(self):
        unet = random_unet()
        controlnet = AdaGNControlNetModel.from_unet(unet, load_weights_from_unet=False)
        assert not torch.equal(controlnet.conv_in.weight, unet.conv_in.weight)

    def test_dtype_follows_the_unet(self):
        controlnet = AdaGNControlNetModel.from_unet(random_unet().to(torch.bfloat16))
        assert {parameter.dtype for parameter in controlnet.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("width", [1.0, 0.5])
    def test_narrow_ones_are_smaller_and_keep_what_embeds_the_conditions(self, width):
        unet = random_text_unet("added_kv", block_out_channels=(32, 64), norm_num_groups=16, **CONDITIONAL)
        controlnet = AdaGNControlNetModel.from_unet(unet, width=width)
        assert controlnet.config.block_out_channels == (int(32 * width), int(64 * width))
        assert controlnet.residual_channels == [32, 32, 32, 64, 64]
        for part in ("time_embedding", "class_embedding"):
            for name, value in getattr(controlnet, part).state_dict().items():
                assert torch.equal(value, getattr(unet, part).state_dict()[name])
        blocks = sum(p.numel() for p in controlnet.down_blocks.parameters())
        of_unet = sum(p.numel() for p in unet.down_blocks.parameters())
        assert blocks == of_unet if width == 1 else blocks < 0.4 * of_unet

    @pytest.mark.parametrize("width", [0.2, 0.25, 0.3, 0.33, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9])
    def test_groups_of_narrow_ones_have_about_as_many_channels(self, width):
        unet = random_unet(block_out_channels=(64, 128), norm_num_groups=32, attn_norm_num_groups=32)
        config = AdaGNControlNetModel.from_unet(unet, width=width).config
        for own, wide in zip(config.block_out_channels, (64, 128), strict=True):
            assert own == pytest.approx(width * wide, abs=4 * wide / 64)
            # 2 and 4 in the U-Net.
            assert 0.5 <= own / config.norm_num_groups / (wide / 32) <= 2

    @pytest.mark.parametrize("width, expected", [(0.01, (1, 2, 3)), (0.5, (6, 12, 18)), (0.9, (8, 16, 24))])
    def test_narrow_ones_keep_the_proportions_of_the_levels(self, width, expected):
        config = {"block_out_channels": (12, 24, 36), "attention_head_dim": 4, "norm_num_groups": 4}
        kinds = {"down_block_types": ("AttnDownBlock2D",) * 3, "up_block_types": ("AttnUpBlock2D",) * 3}
        unet = random_unet(**config, **kinds)
        assert AdaGNControlNetModel.from_unet(unet, width=width).config.block_out_channels == expected

    def test_of_a_compiled_unet(self):
        unet = random_unet()
        controlnet = AdaGNControlNetModel.from_unet(torch.compile(unet, backend="eager"))
        assert torch.equal(controlnet.conv_in.weight, unet.conv_in.weight)

    @pytest.mark.parametrize("width", [0, -1, 1.1, float("nan")])
    def test_refuses_widths(self, width):
        with pytest.raises(ValueError, match=re.escape(f"`width` is {width}; it must lie in (0, 1]")):
            AdaGNControlNetModel.from_unet(random_unet(), width=width)

    def test_refuses_text_in_the_up_path_only(self):
        unet = random_text_unet(
            "added_kv",
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            mid_block_type=None,
        )
        with pytest.raises(ValueError, match="cross-attention only in its up path"):
            AdaGNControlNetModel.from_unet(unet)


class TestAgainstHooks:
    """The definition (section 3.1 of the paper), on a second copy of diffusers' U-Net that hooks take apart."""

    @pytest.mark.parametrize("scale, guess_mode", [(1.0, False), (0.4, False), (0.4, True)])
    @torch.no_grad()
    def test_residuals(self, scale, guess_mode):
        theirs = fill_randomly(UNet2DModel(**{**TOY_CONFIG, "num_class_embeds": 5})).double()
        controlnet = random_controlnet(theirs)
        labels, sample = torch.tensor([1, 3]), SAMPLE.double()

        embedding = controlnet.controlnet_cond_embedding
        features = torch.nn.functional.silu(embedding.conv_in(IMAGE.double()))
        for block in embedding.blocks:
            features = torch.nn.functional.silu(block(features))
        features = embedding.conv_out(features)
        seen = []
        theirs.conv_in.register_forward_hook(lambda module, inputs, output: output + features)
        theirs.down_blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in theirs.down_blocks:
            block.register_forward_hook(lambda module, inputs, output: seen.extend(output[1]))
        theirs.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        theirs(sample, TIMESTEP, class_labels=labels)

        zero_convs = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
        scales = torch.logspace(-1, 0, len(seen), dtype=torch.float64) if guess_mode else [1.0] * len(seen)
        expected = [
            torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]
            for conv, x in zip(zero_convs, seen, strict=True)
        ]
        output = controlnet(
            sample,
            TIMESTEP,
            class_labels=labels,
            controlnet_cond=IMAGE.double(),
            conditioning_scale=scale,
            guess_mode=guess_mode,
        )
        found = [*output.down_block_res_samples, output.mid_block_res_sample]
        for own, reference, factor in zip(found, expected, scales, strict=True):
            assert_close(own, scale * factor * reference, rtol=1e-9, atol=1e-9)


class TestLora:
    def adapted(self):
        from peft import LoraConfig

        unet = random_unet(**CONDITIONAL)
        unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v", "conv1", "conv_in"]))
        return unet

    @torch.no_grad()
    def test_with_a_new_controlnet(self):
        unet = self.adapted()
        controlnet = AdaGNControlNetModel.from_unet(random_unet(**CONDITIONAL))
        inputs, conditions = inputs_of(unet)
        with_lora = unet(*inputs, **conditions).sample
        assert rounding_errors(with_controlnet(unet, controlnet, *inputs, IMAGE, **conditions), with_lora) <= NETWORK
        unet.disable_adapters()
        without = unet(*inputs, **conditions).sample
        assert rounding_errors(with_lora, without) > NETWORK

    def test_weights_that_an_adapter_trains_a_copy_of(self):
        from peft import LoraConfig

        unet = random_unet(**CONDITIONAL)
        expected = unet.class_embedding.weight.clone()
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["class_embedding"]))
        assert torch.equal(AdaGNControlNetModel.from_unet(unet).class_embedding.weight, expected)

    def test_the_weights_below_it_are_copied(self):
        plain = AdaGNControlNetModel.from_unet(random_unet(**CONDITIONAL)).state_dict()
        adapted = AdaGNControlNetModel.from_unet(self.adapted()).state_dict()
        assert adapted.keys() == plain.keys()
        for name in plain:
            if not name.startswith("controlnet_"):
                assert torch.equal(adapted[name], plain[name]), name


class TestConditioningImage:
    @pytest.mark.parametrize("factor", [1, 2, 3, 4, 5, 6, 8])
    @torch.no_grad()
    def test_any_factor(self, factor):
        """Residuals have the sizes of the U-Net's skip connections, and every pixel of the image matters."""
        unet = random_unet()
        controlnet = random_controlnet(unet, conditioning_downsampling_factor=factor)
        image = torch.rand(2, 3, 8 * factor, 8 * factor)
        embedding = controlnet.controlnet_cond_embedding
        assert embedding(image).shape == (2, 8, 8, 8)
        with torch.enable_grad():
            image.requires_grad_()
            embedding(image).square().sum().backward()
        assert (image.grad.abs().sum(dim=1) > 0).all()
        assert with_controlnet(unet, controlnet, SAMPLE, TIMESTEP, image.detach()).shape == (2, 6, 8, 8)

    @pytest.mark.parametrize(
        "factor, stages, expected",
        [(1, 1, [1]), (1, 3, [1, 1, 1]), (8, 3, [2, 2, 2]), (6, 3, [2, 3, 1]), (7, 1, [7]), (1, 0, [])],
    )
    def test_strides(self, factor, stages, expected):
        assert strides_of(factor, stages) == expected

    @pytest.mark.parametrize("factor", [0, -2, 1.5])
    def test_refuses_other_numbers(self, factor):
        with pytest.raises(ValueError, match=f"is {factor}; it must be a positive integer"):
            AdaGNControlNetModel.from_unet(random_unet(), conditioning_downsampling_factor=factor)

    @pytest.mark.parametrize("factor, stages", [(16, 3), (6, 1), (2, 0)])
    def test_refuses_factors(self, factor, stages):
        message = f"`conditioning_downsampling_factor` is {factor}, but .* has {stages + 1} entries"
        with pytest.raises(ValueError, match=message):
            strides_of(factor, stages)

    def test_without_a_factor_each_layer_halves_it(self):
        controlnet = AdaGNControlNetModel.from_unet(random_unet())
        config = {**controlnet.config, "conditioning_downsampling_factor": None}
        assert AdaGNControlNetModel.from_config(config).conditioning_factor == 2
        config["conditioning_embedding_out_channels"] = (4, 8, 8, 8)
        assert AdaGNControlNetModel.from_config(config).conditioning_factor == 8

    def test_layers_by_default(self):
        channels = {
            factor: AdaGNControlNetModel.from_unet(
                random_unet(), conditioning_downsampling_factor=factor
            ).config.conditioning_embedding_out_channels
            for factor in (1, 2, 4, 8)
        }
        assert channels == {1: (16, 32), 2: (16, 32), 4: (16, 32, 96), 8: (16, 32, 96, 256)}


class TestEmbeddedImage:
    @pytest.mark.parametrize("options", [{}, {"controlnet_conditioning_channel_order": "bgr"}], ids=str)
    def test_in_place_of_the_image(self, options):
        unet = random_unet()
        net = fill_randomly(AdaGNControlNetModel.from_unet(unet, conditioning_downsampling_factor=2, **options), 1)
        sample, images = torch.randn(4, 3, 8, 8), torch.rand(2, 3, 16, 16)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            given = sample.contiguous(memory_format=memory_format)
            expected = net(given, 5, controlnet_cond=torch.cat([images] * 2), return_dict=False)
            embeds = net.embed_condition(images)
            assert embeds.shape == (2, unet.config.block_out_channels[0], 8, 8)
            actual = net(given, 5, controlnet_cond_embeds=embeds, return_dict=False)  # one copy for both halves
            for own, wanted in zip((*actual[0], actual[1]), (*expected[0], expected[1]), strict=True):
                assert rounding_errors(own, wanted) <= NETWORK
                assert own.is_contiguous(memory_format=memory_format)

    def test_gradients_reach_the_image_and_the_embedding(self):
        net = fill_randomly(AdaGNControlNetModel.from_unet(random_unet(), conditioning_downsampling_factor=1), 1)
        images = torch.rand(1, 3, 8, 8, requires_grad=True)
        embeds = net.embed_condition(images)
        net(torch.randn(2, 3, 8, 8), 5, controlnet_cond_embeds=embeds, return_dict=False)[1].sum().backward()
        assert images.grad.abs().max() > 0
        assert net.controlnet_cond_embedding.conv_in.weight.grad.abs().max() > 0

    def test_of_several(self):
        unet = random_unet()
        nets = [fill_randomly(AdaGNControlNetModel.from_unet(unet), seed) for seed in (1, 2)]
        several = AdaGNMultiControlNetModel(nets)
        sample, images, scales = torch.randn(2, 3, 8, 8), [torch.rand(2, 3, 8, 8)] * 2, [1.0, 0.5]
        embeds = several.embed_condition(images)
        actual = several(sample, 5, conditioning_scale=scales, controlnet_cond_embeds=embeds, return_dict=False)
        expected = several(sample, 5, None, images, scales, return_dict=False)
        assert rounding_errors(actual[1], expected[1]) <= NETWORK
        embeds = several.embed_condition([images[0], None])
        assert embeds[1] is None
        actual = several(sample, 5, conditioning_scale=[1.0, 0.0], controlnet_cond_embeds=embeds, return_dict=False)
        assert rounding_errors(actual[1], nets[0](sample, 5, controlnet_cond=images[0])[1]) <= NETWORK
        with pytest.raises(ValueError, match="There are 2 ControlNets and 1 entries of `controlnet_cond`"):
            several.embed_condition(images[:1])
        with pytest.raises(ValueError, match="Both `controlnet_cond` and `controlnet_cond_embeds` were given"):
            several(sample, 5, None, images, scales, controlnet_cond_embeds=embeds)

    def test_refusals(self):
        net = AdaGNControlNetModel.from_unet(random_unet(), conditioning_downsampling_factor=2)
        sample, images = torch.randn(4, 3, 8, 8), torch.rand(4, 3, 16, 16)
        embeds = net.embed_condition(images)
        for error, message, call in (
            (
                ValueError,
                "Both `controlnet_cond` and",
                lambda: net(sample, 5, None, images, controlnet_cond_embeds=embeds),
            ),
            (ValueError, "has 3 rows, which do not divide", lambda: net(sample, 5, controlnet_cond_embeds=embeds[:3])),
            (ValueError, "has 0 rows, which do not divide", lambda: net(sample, 5, controlnet_cond_embeds=embeds[:0])),
            (ValueError, "`controlnet_cond_embeds` has shape", lambda: net(sample, 5, controlnet_cond_embeds=images)),
            (ValueError, "`controlnet_cond` is missing", lambda: net(sample, 5)),
            (ValueError, "15 x 16; both must be divisible by 2", lambda: net.embed_condition(images[:, :, 1:])),
            (ValueError, "`controlnet_cond` has shape", lambda: net.embed_condition(images[:, :1])),
            (TypeError, "`controlnet_cond` is torch.int64", lambda: net.embed_condition(images.long())),
        ):
            with pytest.raises(error, match=message):
                call()


class TestTraining:
    def test_the_frozen_base_gets_no_gradient_and_the_controlnet_all(self):
        unet = random_unet(**CONDITIONAL).requires_grad_(False)
        controlnet = random_controlnet(unet).train()
        inputs, conditions = inputs_of(unet)
        with_controlnet(unet, controlnet, *inputs, IMAGE, **conditions).square().mean().backward()
        assert all(parameter.grad is None for parameter in unet.parameters())
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in controlnet.parameters())

    def test_a_new_controlnet_begins_with_its_zero_convolutions(self):
        """Weights before a layer of zeros have no gradient yet, but the layer itself has one (the paper's FAQ)."""
        unet = random_unet().requires_grad_(False)
        controlnet = AdaGNControlNetModel.from_unet(unet)
        with_controlnet(unet, controlnet, SAMPLE, TIMESTEP, IMAGE).square().mean().backward()
        for name, parameter in controlnet.named_parameters():
            is_zero_conv = name.startswith(("controlnet_down_blocks", "controlnet_mid_block"))
            assert bool(parameter.grad.any()) == is_zero_conv, name

    @pytest.mark.parametrize("width", [1.0, 0.5])
    def test_learns_the_effect_of_the_image(self, width):
        """The effect of the image is that of another ControlNet."""
        torch.manual_seed(0)
        unet = random_unet(out_channels=3).requires_grad_(False)
        other = random_controlnet(random_unet(seed=9)).requires_grad_(False)
        controlnet = AdaGNControlNetModel.from_unet(unet, width=width).train()
        optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-2)
        losses = []
        for _ in range(40):
            image = torch.rand(8, 3, 1, 1).expand(-1, -1, 8, 8)
            sample, timestep = torch.randn(8, 3, 8, 8), torch.randint(1000, (8,))
            target = with_controlnet(unet, other, sample, timestep, image)
            loss = (with_controlnet(unet, controlnet, sample, timestep, image) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert sum(losses[-5:]) / 5 < 0.7 * losses[0]

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_recomputes_to_the_same_numbers(self, use_reentrant):
        """Also in the base, whose inputs and weights need no gradient, while the residuals do."""
        unet = random_unet(**CONDITIONAL).requires_grad_(False)
        controlnet = random_controlnet(unet).train()
        inputs, conditions = inputs_of(unet)

        def gradients():
            controlnet.zero_grad()
            with_controlnet(unet, controlnet, *inputs, IMAGE, **conditions).square().mean().backward()
            return {name: parameter.grad.clone() for name, parameter in controlnet.named_parameters()}

        plain = gradients()
        for model in (unet, controlnet):
            model.enable_gradient_checkpointing(
                lambda module, *args, **kwargs: checkpoint(module, *args, use_reentrant=use_reentrant, **kwargs)
            )
        unet.train()
        for name, gradient in gradients().items():
            assert_close(gradient, plain[name], msg=name)


class TestBase:
    """`check_base`: whether a ControlNet was made for a U-Net."""

    @pytest.mark.parametrize(
        "made_for, used_with, message",
        [
            (
                {},
                {"block_out_channels": (16, 32)},
                r"skip connections and middle block: \[8, 8, 8, 16, 16\] here, \[16, 16, 16, 32, 32\] there",
            ),
            ({}, {"layers_per_block": 2}, r"\[8, 8, 8, 16, 16\] here, \[8, 8, 8, 8, 16, 16, 16\] there"),
            ({}, CONDITIONAL, "`num_class_embeds`: None here, 5 there; `null_class_id`: None here, 4 there"),
            ({"in_channels": 6}, {}, "`in_channels`: 6 here, 3 there"),
            ({"timestep_scale": 0.25}, {}, "`timestep_scale`: 0.25 here, 1.0 there"),
            ({"time_cond_proj_dim": 12}, {}, "`time_cond_proj_dim`: 12 here, None there"),
        ],
    )
    def test_names_both_values(self, made_for, used_with, message):
        controlnet = AdaGNControlNetModel.from_unet(random_unet(**made_for))
        with pytest.raises(ValueError, match=f"made for another U-Net than the one it is used with: .*{message}"):
            controlnet.check_base(random_unet(**used_with))

    def test_text(self):
        controlnet = AdaGNControlNetModel.from_unet(random_text_unet("added_kv", addition_embed_type="text_embeds"))
        with pytest.raises(ValueError, match="width of the text: 16 here, None there"):
            controlnet.check_base(random_unet())
        with pytest.raises(ValueError, match="width of the text: 16 here, 24 there"):
            controlnet.check_base(
                random_text_unet("added_kv", addition_embed_type="text_embeds", cross_attention_dim=24)
            )
        with pytest.raises(ValueError, match="width of the pooled text: 32 here, 64 there"):
            controlnet.check_base(
                random_text_unet("added_kv", addition_embed_type="text_embeds", time_embedding_dim=64)
            )

    def test_other_networks(self):
        controlnet = AdaGNControlNetModel.from_unet(random_unet())
        with pytest.raises(ValueError, match="belongs to a U-Net, but this is AdaGNControlNetModel"):
            controlnet.check_base(controlnet)

    def test_accepts_other_weights_and_other_classes_of_unet(self):
        controlnet = AdaGNControlNetModel.from_unet(random_unet())
        controlnet.check_base(random_unet(seed=9, out_channels=3, up_block_types=("UpBlock2D", "AttnUpBlock2D")))
        controlnet.check_base(UNet2DModel(**TOY_CONFIG))

    @pytest.mark.parametrize("name", unet_configs.CONFIGS)
    def test_channels_are_those_of_the_skip_connections(self, name):
        unet = AdaGNUNet2DModel(**unet_configs.CONFIGS[name])
        skips = [unet.conv_in.out_channels]
        for block in unet.down_blocks:
            skips += [resnet.conv2.out_channels for resnet in block.resnets]
            skips += [block.resnets[-1].conv2.out_channels] * (block.downsamplers is not None)
        found = residual_channels(unet.config.block_out_channels, unet.config.layers_per_block)
        assert found == [*skips, unet.config.block_out_channels[-1]]


class TestSeveral:
    @torch.no_grad()
    def test_residuals_add_up(self):
        unet = random_unet(**CONDITIONAL)
        controlnets = [random_controlnet(unet, seed) for seed in (1, 4)]
        both = AdaGNMultiControlNetModel(controlnets)
        images = [IMAGE, 1 - IMAGE]
        inputs, conditions = inputs_of(unet)
        down, mid = both(
            *inputs,
            controlnet_cond=images,
            conditioning_scale=[0.5, 2.0],
            return_dict=False,
            **conditions,
        )
        alone = [
            controlnet(*inputs, controlnet_cond=image, conditioning_scale=scale, **conditions)
            for controlnet, image, scale in zip(controlnets, images, (0.5, 2.0), strict=True)
        ]
        assert rounding_errors(mid, alone[0].mid_block_res_sample + alone[1].mid_block_res_sample) <= NETWORK
        for found, *parts in zip(down, *(each.down_block_res_samples for each in alone), strict=True):
            assert rounding_errors(found, parts[0] + parts[1]) <= NETWORK

    @torch.no_grad()
    def test_a_controlnet_with_scale_0_does_not_run(self):
        unet = random_unet()
        controlnets = [random_controlnet(unet, seed) for seed in (1, 4)]
        controlnets[0].register_forward_pre_hook(lambda *args: pytest.fail("it ran"))
        both = AdaGNMultiControlNetModel(controlnets)
        found = both(SAMPLE, TIMESTEP, controlnet_cond=[IMAGE, IMAGE], conditioning_scale=[0, 1.0])
        alone = controlnets[1](SAMPLE, TIMESTEP, controlnet_cond=IMAGE)
        assert rounding_errors(found.mid_block_res_sample, alone.mid_block_res_sample) <= NETWORK

    def test_save_and_load(self, tmp_path):
        unet = random_unet()
        both = AdaGNMultiControlNetModel([random_controlnet(unet, 1), random_controlnet(unet, 4, width=0.5)])
        both.save_pretrained(tmp_path)
        assert sorted(folder.name for folder in tmp_path.iterdir()) == ["net.0", "net.1"]
        again = AdaGNMultiControlNetModel.from_pretrained(tmp_path, dtype=torch.float64)
        for (name, value), loaded in zip(both.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(value.double(), loaded), name

    def test_saving_fewer_where_there_were_more(self, tmp_path):
        unet = random_unet()
        for number in (3, 2):
            AdaGNMultiControlNetModel([random_controlnet(unet, seed) for seed in range(number)]).save_pretrained(
                tmp_path
            )
        assert len(AdaGNMultiControlNetModel.from_pretrained(tmp_path).nets) == 2

    def test_refusals(self, tmp_path):
        with pytest.raises(ValueError, match="`push_to_hub` of several ControlNets"):
            AdaGNMultiControlNetModel([random_controlnet(random_unet())]).save_pretrained(tmp_path, push_to_hub=True)
        with pytest.raises(ValueError, match="`controlnets` is empty"):
            AdaGNMultiControlNetModel([])
        with pytest.raises(ValueError, match="has no folder `net.0`"):
            AdaGNMultiControlNetModel.from_pretrained(tmp_path)
        unet = random_unet()
        both = AdaGNMultiControlNetModel([AdaGNControlNetModel.from_unet(unet)] * 2)
        message = "There are 2 ControlNets, 1 entries of `controlnet_cond` and 2 of `conditioning_scale`"
        with pytest.raises(ValueError, match=message):
            both(SAMPLE, TIMESTEP, controlnet_cond=[IMAGE], conditioning_scale=[1, 1])
        with pytest.raises(ValueError, match="no ControlNet has any effect"):
            both(SAMPLE, TIMESTEP, controlnet_cond=[IMAGE] * 2, conditioning_scale=[0, 0.0])
        with pytest.raises(ValueError, match="ControlNet 0 of 2, counted from 0: .* made for another U-Net"):
            both.check_base(random_unet(**CONDITIONAL))


class TestBadInput:
    @pytest.mark.parametrize(
        "image, message",
        [
            (None, r"`controlnet_cond` is missing; this model takes \(2, 3, 8, 8\)"),
            (torch.rand(2, 3, 16, 16), r"has shape \(2, 3, 16, 16\).* takes \(2, 3, 8, 8\)"),
            (torch.rand(2, 1, 8, 8), r"has shape \(2, 1, 8, 8\)"),
            (torch.rand(1, 3, 8, 8), r"has shape \(1, 3, 8, 8\)"),
        ],
    )
    def test_image(self, image, message):
        controlnet = AdaGNControlNetModel.from_unet(random_unet())
        with pytest.raises(ValueError, match=message):
            controlnet(SAMPLE, TIMESTEP, controlnet_cond=image)

    @pytest.mark.parametrize(
        "name, inputs, message",
        [
            ("by-class", {"class_labels": torch.tensor([1, 9])}, "`class_labels` range from 1 to 9"),
            ("by-text-added-kv", {"encoder_hidden_states": None}, "`encoder_hidden_states` is missing"),
            ("upsampler", {"timestep_cond": torch.zeros(2, 5)}, "`timestep_cond` has shape"),
            ("unconditional", {"encoder_hidden_states": torch.zeros(2, 5, 16)}, "without cross-attention"),
        ],
    )
    def test_the_rest_as_the_unet(self, name, inputs, message):
        unet = UNETS[name]()
        controlnet = AdaGNControlNetModel.from_unet(unet)
        (sample, timestep), conditions = inputs_of(unet)
        with pytest.raises(ValueError, match=message):
            controlnet(sample, timestep, controlnet_cond=IMAGE, **{**conditions, **inputs})

    def test_the_folder_of_a_unet(self, tmp_path):
        random_unet().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="config of a U-Net .* make a ControlNet for it with"):
            AdaGNControlNetModel.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "config, message",
        [
            ({"controlnet_conditioning_channel_order": "rbg"}, "is 'rbg'; it must be one of"),
            ({"unet_block_out_channels": (8,)}, r"has 1 entries \(8,\) but `block_out_channels` has 2"),
            ({"down_block_types": ("DownBlock2D", "UpBlock2D")}, "`down_block_types` is 'UpBlock2D'"),
            ({"norm_num_groups": 3}, "num_channels .*must be divisible by num_groups"),
            ({"conditioning_downsampling_factor": 4}, "`conditioning_downsampling_factor` is 4"),
        ],
    )
    def test_config(self, config, message):
        arguments = {**AdaGNControlNetModel.from_unet(random_unet()).config, **config}
        arguments["_use_default_values"] = []
        with pytest.raises(ValueError, match=message):
            AdaGNControlNetModel.from_config(arguments)


class TestNumbers:
    @pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
    @torch.no_grad()
    def test_16_bit_is_near_float32(self, dtype, bound):
        unet = random_text_unet("added_kv", **CONDITIONAL)
        controlnet = random_controlnet(unet)
        inputs, conditions = inputs_of(unet)
        exact = controlnet(*inputs, controlnet_cond=IMAGE, **conditions)
        (sample, timestep), conditions = inputs_of(unet, dtype)
        conditions["encoder_hidden_states"] = conditions["encoder_hidden_states"].to(dtype)
        found = controlnet.to(dtype)(sample, timestep, controlnet_cond=IMAGE, **conditions)
        for a, b in zip(
            [*found.down_block_res_samples, found.mid_block_res_sample],
            [*exact.down_block_res_samples, exact.mid_block_res_sample],
            strict=True,
        ):
            assert a.dtype == dtype
            assert relative_error(a.float(), b) < bound

    @torch.no_grad()
    def test_examples_of_a_batch_do_not_touch_each_other(self):
        controlnet = random_controlnet(random_unet()).double()
        whole = controlnet(SAMPLE.double(), TIMESTEP, controlnet_cond=IMAGE.double())
        for index in range(2):
            one = slice(index, index + 1)
            alone = controlnet(SAMPLE.double()[one], TIMESTEP[one], controlnet_cond=IMAGE.double()[one])
            assert_close(alone.mid_block_res_sample, whole.mid_block_res_sample[one])

    @torch.no_grad()
    def test_save_and_load(self, tmp_path):
        controlnet = random_controlnet(random_unet(**CONDITIONAL), width=0.5)
        controlnet.save_pretrained(tmp_path)
        again, info = AdaGNControlNetModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        found, expected = (model(SAMPLE, TIMESTEP, controlnet_cond=IMAGE) for model in (again, controlnet))
        assert rounding_errors(found.mid_block_res_sample, expected.mid_block_res_sample) <= NETWORK
        assert again.config.unet_block_out_channels == [8, 16]  # as JSON has it


class TestDocstrings:
    @pytest.mark.parametrize("cls", [AdaGNControlNetModel])
    def test_of_the_constructor_names_every_argument(self, cls):
        section = cls.__doc__.partition("Args:")[2].partition("Raises:")[0]
        shared, rest = section.split("The encoder of the ControlNet")
        names = re.findall(r"\w+", shared) + re.findall(r"^ +(\w+) \(`", rest, re.MULTILINE)
        assert names == list(parameters_of(cls.__init__))

    def test_of_from_unet(self):
        check_documented_arguments(AdaGNControlNetModel.from_unet.__doc__, AdaGNControlNetModel.from_unet)

    @pytest.mark.parametrize("cls", [AdaGNControlNetModel, AdaGNMultiControlNetModel])
    def test_of_forward_names_every_argument(self, cls):
        section = cls.forward.__doc__.partition("Args:")[2].partition("Raises:")[0].partition("Returns:")[0]
        assert all(re.search(rf"\b{name}\b", section) for name in parameters_of(cls.forward))
