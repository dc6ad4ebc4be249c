"""
`AdaGNUNet2DModel` with text against diffusers' `UNet2DConditionModel` with the same weights: keys, outputs, gradients,
folders; masks; what is refused.

Layouts are those of diffusers' conversion scripts (`convert_kakao_brain_unclip_to_diffusers.py`, `convert_if.py`), and
of the configs of Stable Diffusion 1.5 and 2.1, at reduced width.
"""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_unet_2d_adagn_compatibility import TOLERANCE, relative_error
from tolerances import NETWORK, gradient_errors, rounding_errors
from toy_models import fill_randomly

from diffusers_adm import AdaGNControlNetModel, AdaGNUNet2DModel
from diffusers_adm.models.config_checks import NEUTRAL_ARGUMENTS


STABLE_DIFFUSION = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,  # here the number of heads
    "norm_num_groups": 8,
}
KARLO_DECODER = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 2,
    "block_out_channels": (16, 32, 48),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "class_embed_type": "identity",
    "resnet_time_scale_shift": "scale_shift",
    "norm_num_groups": 8,
}
CONFIGS = {
    "stable-diffusion-1.5": STABLE_DIFFUSION,
    "stable-diffusion-2.1": {
        **STABLE_DIFFUSION,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "several-transformer-layers": {
        **STABLE_DIFFUSION,
        "transformer_layers_per_block": (1, 3, 2),
        "layers_per_block": (1, 2, 1),
        "cross_attention_dim": (24, 24, 24),
        "only_cross_attention": (False, True, False),
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 12,
    },
    "karlo-decoder": KARLO_DECODER,
    "deepfloyd-if": {
        **KARLO_DECODER,
        "class_embed_type": None,
        "cross_attention_dim": 32,  # its group norm has 32 groups
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": 40,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "act_fn": "gelu",
        "time_embedding_act_fn": "gelu",
        "resnet_skip_time_act": True,
        "mid_block_scale_factor": 1.41421356237,
    },
    "deepfloyd-if-upsampler": {
        **KARLO_DECODER,
        "in_channels": 6,
        "class_embed_type": "timestep",  # of the noise on the small image
        "act_fn": "gelu",
        "resnet_out_scale_factor": 1.3,
        "attention_head_dim": (8, 4, 16),
        "norm_eps": 1e-4,
    },
    "only-text-in-the-middle": {
        **KARLO_DECODER,
        "class_embed_type": None,
        "num_class_embeds": 10,
        "mid_block_only_cross_attention": True,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "act_fn": "mish",
    },
    "plain-middle": {**STABLE_DIFFUSION, "mid_block_type": "UNetMidBlock2D"},
    "no-middle": {**STABLE_DIFFUSION, "mid_block_type": None},
}


def random_condition_model(config, dtype=torch.float32):
    """Every parameter random, norms and biases included."""
    model = UNet2DConditionModel(**config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


def inputs_for(config, dtype=torch.float32, length=7):
    generator = torch.Generator().manual_seed(1)
    width = config.get("encoder_hid_dim") or 24 if config["cross_attention_dim"] != 32 else 40
    sample = torch.randn(3, config["in_channels"], 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    states = torch.randn(3, length, width, generator=generator, dtype=torch.float64).to(dtype)
    labels = {
        "identity": torch.randn(3, 4 * config["block_out_channels"][0], generator=generator, dtype=torch.float64),
        "projection": torch.randn(3, 12, generator=generator, dtype=torch.float64),
        "timestep": torch.tensor([5, 7, 11]),
        None: torch.tensor([0, 9, 4]) if config.get("num_class_embeds") else None,
    }[config.get("class_embed_type")]
    if labels is not None and labels.is_floating_point():
        labels = labels.to(dtype)
    return sample, torch.tensor([1, 370, 999]), states, labels


def run(model, sample, timestep, states, **kwargs):
    """Output, and gradients of a mixture of its entries."""
    model.zero_grad()
    sample, states = sample.clone().requires_grad_(), states.clone().requires_grad_()
    output = model(sample, timestep, encoder_hidden_states=states, **kwargs).sample
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.detach(), {**gradients, "sample": sample.grad, "encoder_hidden_states": states.grad}


# diffusers' own class embedding of timesteps is float32 alone.
CASES = [
    (name, dtype)
    for name in CONFIGS
    for dtype in TOLERANCE
    if (name, dtype) != ("deepfloyd-if-upsampler", torch.float64)
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_same_weights_same_outputs_and_gradients(name, dtype):
    config = CONFIGS[name]
    theirs = random_condition_model(config, dtype)
    ours = AdaGNUNet2DModel.from_config(theirs.config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    sample, timestep, states, labels = inputs_for(config, dtype)
    # With a mask, diffusers fails where keys are added and the image is not attended to, and lets padding in where the
    # first attention of transformer blocks is one to the text.
    only_text = config.get("only_cross_attention") or config.get("mid_block_only_cross_attention")
    mask = None if only_text else torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1, 0] * 3 + [1]])
    arguments = {"class_labels": labels, "encoder_attention_mask": mask}
    # Where diffusers pools text, the softmax of its attention is float32.
    tolerance = max(TOLERANCE[dtype], 1e-6 if config.get("addition_embed_type") == "text" else 0)
    ours_output, ours_gradients = run(ours, sample, timestep, states, **arguments)
    their_output, their_gradients = run(theirs, sample, timestep, states, **arguments)
    assert relative_error(ours_output, their_output) < tolerance
    largest = max(gradient.abs().max() for gradient in their_gradients.values())
    assert ours_gradients.keys() == their_gradients.keys()
    for key, gradient in their_gradients.items():
        assert (ours_gradients[key] - gradient).abs().max() < tolerance * largest, key


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", ["stable-diffusion-1.5", "karlo-decoder"])
def test_timestep_cond_as_theirs(name, given):
    config = {**CONFIGS[name], "time_cond_proj_dim": 12}
    theirs = random_condition_model(config)
    ours = AdaGNUNet2DModel.from_config(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    sample, timestep, states, labels = inputs_for(config)
    condition = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    arguments = {"class_labels": labels, "encoder_hidden_states": states}
    with torch.no_grad():
        ours_output, their_output = (
            model(sample, timestep, **arguments, timestep_cond=condition if given else None).sample
            for model in (ours, theirs)
        )
        other = ours(sample, timestep, **arguments, timestep_cond=None if given else condition).sample
    assert relative_error(ours_output, their_output) < 1e-5
    assert relative_error(other, their_output) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_theirs_loads_and_one_of_ours_reloads(name, tmp_path):
    theirs = random_condition_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = AdaGNUNet2DModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values()), info
    ours.save_pretrained(tmp_path / "ours")
    again = AdaGNUNet2DModel.from_pretrained(tmp_path / "ours")
    sample, timestep, states, labels = inputs_for(CONFIGS[name])
    with torch.no_grad():
        outputs = [
            model.eval()(sample, timestep, encoder_hidden_states=states, class_labels=labels).sample
            for model in (theirs, ours, again)
        ]
    assert relative_error(outputs[1], outputs[0]) < 1e-5
    assert rounding_errors(outputs[2], outputs[1]) <= NETWORK


def test_missing_arguments_have_the_defaults_of_the_class_of_the_config(tmp_path):
    """Old files have few keys; `down_block_types` and so on are then those of `UNet2DConditionModel`."""
    config = {"_class_name": "UNet2DConditionModel", "block_out_channels": [32, 32, 32, 32], "sample_size": 16}
    with torch.device("meta"):
        ours, theirs = AdaGNUNet2DModel.from_config(config), UNet2DConditionModel.from_config(config)
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    # The same without the name of the class: a cross-attention block tells.
    del config["_class_name"]
    config["down_block_types"] = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    with torch.device("meta"):
        assert {name: t.shape for name, t in AdaGNUNet2DModel.from_config(config).state_dict().items()} == shapes[1]


class TestMasks:
    @pytest.mark.parametrize(
        "name",
        [
            "stable-diffusion-1.5",
            "several-transformer-layers",
            "karlo-decoder",
            "deepfloyd-if-upsampler",
            "only-text-in-the-middle",
        ],
    )
    @pytest.mark.parametrize("length", [3, 9, 16, 64, 256])  # 16, 64 and 256 are the numbers of places of the levels
    def test_padding_changes_nothing(self, name, length):
        config = CONFIGS[name]
        model = AdaGNUNet2DModel.from_config(UNet2DConditionModel(**config).config).eval()
        model.load_state_dict(random_condition_model(config).state_dict())
        sample, timestep, states, labels = inputs_for(config, length=length)
        with torch.no_grad():
            alone = model(
                sample,
                timestep,
                class_labels=labels,
                encoder_hidden_states=states,
                encoder_attention_mask=torch.ones(3, length),
            ).sample
            padding = 100 * torch.randn(3, 5, states.shape[-1])
            padded = model(
                sample,
                timestep,
                class_labels=labels,
                encoder_hidden_states=torch.cat([states, padding], dim=1),
                encoder_attention_mask=torch.cat([torch.ones(3, length), torch.zeros(3, 5)], dim=1),
            ).sample
            unmasked = model(sample, timestep, class_labels=labels, encoder_hidden_states=states).sample
        assert relative_error(padded, alone) < 1e-5
        assert relative_error(unmasked, alone) < 1e-5


class TestPooledText:
    def test_it_is_added_to_the_time_embedding(self):
        config = {**CONFIGS["karlo-decoder"], "class_embed_type": None}
        with_pooled = AdaGNUNet2DModel(**config, addition_embed_type="text_embeds").eval()
        # What `class_embed_type="identity"` does, whose vectors are added at the same place.
        twin = AdaGNUNet2DModel(**CONFIGS["karlo-decoder"]).eval()
        weights = random_condition_model(CONFIGS["karlo-decoder"]).state_dict()
        with_pooled.load_state_dict(weights), twin.load_state_dict(weights)
        sample, timestep, states, pooled = inputs_for(CONFIGS["karlo-decoder"])
        with torch.no_grad():
            expected = twin(sample, timestep, pooled, encoder_hidden_states=states).sample
            output = with_pooled(
                sample, timestep, encoder_hidden_states=states, added_cond_kwargs={"text_embeds": pooled}
            ).sample
        assert rounding_errors(output, expected) <= NETWORK
        with pytest.raises(ValueError, match=r"text_embeds.* is missing; this model takes \(3, 64\)"):
            with_pooled(sample, timestep, encoder_hidden_states=states)
        with pytest.raises(ValueError, match=r"text_embeds.* has shape \(3, 60\); this model takes \(3, 64\)"):
            with_pooled(
                sample, timestep, encoder_hidden_states=states, added_cond_kwargs={"text_embeds": pooled[:, :60]}
            )


def test_gradient_checkpointing_gives_the_same_gradients():
    for name in ("stable-diffusion-1.5", "karlo-decoder"):
        config = CONFIGS[name]
        model = AdaGNUNet2DModel.from_config(UNet2DConditionModel(**config).config)
        model.load_state_dict(random_condition_model(config).state_dict())
        sample, timestep, states, labels = inputs_for(config)
        _, plain = run(model, sample, timestep, states, class_labels=labels)
        plain = {name: gradient.clone() for name, gradient in plain.items()}
        model.enable_gradient_checkpointing()
        _, recomputed = run(model, sample, timestep, states, class_labels=labels)
        assert gradient_errors(recomputed, plain) <= NETWORK


def test_residuals_of_a_control_net_are_added():
    config = CONFIGS["stable-diffusion-1.5"]
    theirs = random_condition_model(config)
    ours = AdaGNUNet2DModel.from_config(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    sample, timestep, states, _ = inputs_for(config)
    shapes = [(16, 16)] * 3 + [(16, 8)] + [(32, 8)] * 2 + [(32, 4)] * 3
    residuals = tuple(torch.randn(3, channels, size, size) for channels, size in shapes)
    middle = torch.randn(3, 32, 4, 4)
    with torch.no_grad():
        outputs = [
            model(
                sample,
                timestep,
                encoder_hidden_states=states,
                down_block_additional_residuals=residuals,
                mid_block_additional_residual=middle,
            ).sample
            for model in (ours, theirs)
        ]
        plain = ours(sample, timestep, encoder_hidden_states=states).sample
    assert relative_error(outputs[0], outputs[1]) < 1e-5
    assert relative_error(plain, outputs[1]) > 1e-2


# Values that diffusers' classes build other networks for.
NOT_NEUTRAL = {
    "dual_cross_attention": True,
    "attention_type": "gated",
    "class_embeddings_concat": True,
    "addition_time_embed_dim": 256,
    "timestep_post_act": "silu",
    "conv_in_kernel": 5,
    "conv_out_kernel": 5,
}


class TestPartsThatThisFamilyLacks:
    """diffusers drops arguments silently that our constructor lacks, if the config is of one of its own classes."""

    CLASSES = [(AdaGNUNet2DModel, "UNet2DConditionModel"), (AdaGNControlNetModel, "ControlNetModel")]

    def test_every_argument_is_tried(self):
        assert NOT_NEUTRAL.keys() == NEUTRAL_ARGUMENTS.keys()

    @pytest.mark.parametrize("name", NOT_NEUTRAL)
    @pytest.mark.parametrize("saved_as", ["UNet2DConditionModel", "AdaGNUNet2DModel"])
    def test_a_folder_with_such_a_part_is_refused(self, name, saved_as, tmp_path):
        AdaGNUNet2DModel(**STABLE_DIFFUSION, mid_block_type="UNetMidBlock2DCrossAttn").save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "_class_name": saved_as, name: NOT_NEUTRAL[name]}))
        with pytest.raises(ValueError, match=f"`{name}` is {NOT_NEUTRAL[name]!r}, .* must stay"):
            AdaGNUNet2DModel.from_pretrained(tmp_path)

    @pytest.mark.parametrize("name", NOT_NEUTRAL)
    @pytest.mark.parametrize("cls, theirs", CLASSES)
    def test_configs_and_arguments_with_such_a_part_are_refused(self, cls, theirs, name):
        message = f"`{name}` is {NOT_NEUTRAL[name]!r}, .* must stay"
        with torch.device("meta"):
            for class_name in (theirs, cls.__name__):
                with pytest.raises(ValueError, match=message):
                    cls.from_config({"_class_name": class_name, name: NOT_NEUTRAL[name]})
            with pytest.raises(ValueError, match=message):
                cls.from_config({"_class_name": theirs}, **{name: NOT_NEUTRAL[name]})
            with pytest.raises(ValueError, match=message):
                cls(**{name: NOT_NEUTRAL[name]})

    def test_a_folder_of_an_earlier_version_with_neutral_arguments_loads(self, tmp_path, caplog):
        unet = AdaGNUNet2DModel(**STABLE_DIFFUSION, mid_block_type="UNetMidBlock2DCrossAttn")
        fill_randomly(unet).save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        saved = json.loads(file.read_text())
        assert not saved.keys() & NEUTRAL_ARGUMENTS.keys()
        file.write_text(json.dumps({**saved, **NEUTRAL_ARGUMENTS}))
        again = AdaGNUNet2DModel.from_pretrained(tmp_path)
        assert caplog.records == []  # such as diffusers' warning about arguments that it ignores
        assert not again.config.keys() & NEUTRAL_ARGUMENTS.keys()
        sample, timestep, states, _ = inputs_for(STABLE_DIFFUSION)
        with torch.no_grad():
            outputs = [model(sample, timestep, encoder_hidden_states=states).sample for model in (unet, again)]
        assert rounding_errors(*outputs) <= NETWORK

    @pytest.mark.parametrize("cls", [AdaGNUNet2DModel, AdaGNControlNetModel])
    def test_constructors_take_neutral_values_and_no_other_names(self, cls):
        with torch.device("meta"):
            model, plain = cls(**NEUTRAL_ARGUMENTS), cls()
        assert {**model.config, "_use_default_values": None} == {**plain.config, "_use_default_values": None}
        with pytest.raises(TypeError, match=f"{cls.__name__}.* unexpected keyword argument 'layers_per_blok'"):
            cls(layers_per_blok=3)


def test_the_former_name_of_has_cross_attention():
    with torch.device("meta"):
        unet = AdaGNUNet2DModel()
    with pytest.warns(FutureWarning, match="`reads_text` is now `has_cross_attention`"):
        assert unet.reads_text is False


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"attention_head_dim": 5}, "`attention_head_dim` is 5; it must divide the 16 channels of level 0, as the"),
            ({"attention_head_dim": (4, 4)}, "`attention_head_dim` has 2 entries for 3 levels"),
            ({"layers_per_block": (1, 2)}, "`layers_per_block` has 2 entries for 3 levels"),
            ({"encoder_hid_dim_type": "text_proj"}, "needs `encoder_hid_dim`"),
            ({"addition_embed_type": "text_time"}, "`addition_embed_type` is 'text_time'; it must be one of"),
            ({"class_embed_type": "projection"}, "`projection_class_embeddings_input_dim` is None"),
            ({"time_embedding_type": "fourier"}, "networks with text support only 'positional'"),
            ({"addition_embed_type": "text", "cross_attention_dim": (24, 24, 24)}, r"pooled .* once. Pass one number"),
            ({"reverse_transformer_layers_per_block": (1, 1)}, "has 2 entries for 3 levels"),
            ({"transformer_layers_per_block": (1, (1, 2), 1)}, "pass `reverse_transformer_layers_per_block` as well"),
            (
                {
                    "transformer_layers_per_block": (1, (1, 2, 3), 1),
                    "reverse_transformer_layers_per_block": (1, (1, 2, 3), 1),
                },
                r"`transformer_layers_per_block` has \(1, 2, 3\) for a level of 2 blocks",
            ),
            (
                {
                    "transformer_layers_per_block": (1, (1, 2), 1),
                    "reverse_transformer_layers_per_block": (1, (1, 2), 1),
                },
                r"`reverse_transformer_layers_per_block` has \(1, 2\) for a level of 3 blocks",
            ),
        ],
    )
    def test_configs(self, change, message):
        with pytest.raises(ValueError, match=message):
            AdaGNUNet2DModel(**{**STABLE_DIFFUSION, "mid_block_type": "UNetMidBlock2DCrossAttn", **change})

    @pytest.mark.parametrize("change", [{"addition_embed_type": "text"}, {"encoder_hid_dim": 8}])
    def test_text_for_a_model_without_cross_attention(self, change):
        with pytest.raises(ValueError, match="none of the block types has cross-attention"):
            AdaGNUNet2DModel(block_out_channels=(32, 32, 32, 32), **change)

    def test_a_condition_model_without_text(self):
        config = {"_class_name": "UNet2DConditionModel", "down_block_types": ["DownBlock2D"] * 4}
        config |= {"up_block_types": ["UpBlock2D"] * 4, "mid_block_type": None}
        with pytest.raises(ValueError, match="without any cross-attention"):
            AdaGNUNet2DModel.from_config(config)

    def test_calls(self):
        model = AdaGNUNet2DModel(**STABLE_DIFFUSION, mid_block_type="UNetMidBlock2DCrossAttn")
        sample, timestep, states, _ = inputs_for(STABLE_DIFFUSION)
        with pytest.raises(ValueError, match="`encoder_hidden_states` is missing"):
            model(sample, timestep)
        with pytest.raises(ValueError, match=r"has shape \(3, 7, 20\); this model takes \(3, length, 24\)"):
            model(sample, timestep, encoder_hidden_states=states[..., :20])
        with pytest.raises(ValueError, match=r"has shape \(2, 7, 24\); this model takes"):
            model(sample, timestep, encoder_hidden_states=states[:2])
        with pytest.raises(ValueError, match=r"`encoder_attention_mask` has shape \(1, 7\); this model takes \(3, 7\)"):
            model(sample, timestep, encoder_hidden_states=states, encoder_attention_mask=torch.ones(1, 7))
        plain = AdaGNUNet2DModel(block_out_channels=(32, 32, 32, 32))
        with pytest.raises(ValueError, match="passed to a model without cross-attention"):
            plain(torch.randn(3, 3, 16, 16), timestep, encoder_hidden_states=states)

    def test_timestep_cond(self):
        sample, timestep = torch.randn(3, 3, 16, 16), torch.tensor([1, 370, 999])
        shape = {"block_out_channels": (32, 32, 32, 32)}
        with pytest.raises(ValueError, match="passed to a model without `time_cond_proj_dim`"):
            AdaGNUNet2DModel(**shape)(sample, timestep, timestep_cond=torch.zeros(3, 12))
        model = AdaGNUNet2DModel(**shape, time_cond_proj_dim=12)
        for wrong in [(1, 12), (3, 8), (12,)]:
            with pytest.raises(ValueError, match=r"`timestep_cond` has shape .*; this model takes \(3, 12\)"):
                model(sample, timestep, timestep_cond=torch.zeros(wrong))


def test_class_vectors_take_the_dtype_of_the_network():
    model = AdaGNUNet2DModel.from_config(UNet2DConditionModel(**CONFIGS["several-transformer-layers"]).config)
    model = model.to(torch.bfloat16).eval()
    sample, timestep, states, labels = inputs_for(CONFIGS["several-transformer-layers"])
    with torch.no_grad():
        half = {"encoder_hidden_states": states.bfloat16()}
        outputs = [
            model(sample.bfloat16(), timestep, vectors, **half).sample for vectors in (labels, labels.bfloat16())
        ]
    assert rounding_errors(*outputs) <= NETWORK


@pytest.mark.parametrize("name", ["stable-diffusion-1.5", "karlo-decoder", "only-text-in-the-middle"])
def test_masks_under_autocast(name):
    config = CONFIGS[name]
    model = AdaGNUNet2DModel.from_config(UNet2DConditionModel(**config).config)
    model.load_state_dict(random_condition_model(config).state_dict())
    sample, timestep, states, labels = inputs_for(config)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1, 0] * 3 + [1]])
    arguments = {"class_labels": labels, "encoder_hidden_states": states, "encoder_attention_mask": mask}
    with torch.no_grad():
        expected = model(sample, timestep, **arguments).sample
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(sample, timestep, **arguments).sample
    assert relative_error(actual, expected) < 0.1
