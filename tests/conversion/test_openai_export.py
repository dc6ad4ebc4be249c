"""`export_openai`: networks of this package as OpenAI's state dicts. (Round trips: `test_openai_outputs.py`.)"""

import pytest
import torch
from docstrings import check_documented_arguments
from openai_networks import NETWORKS
from toy_models import fill_randomly

from diffusers_adm import AdaGNClassifierModel, AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conversion import convert_openai, export_openai
from diffusers_adm.conversion.openai_flags import default_flags, parse_flags


CONFIG = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "num_attention_heads": 4,
}


def build(**config):
    return fill_randomly(AdaGNUNet2DModel(**{**CONFIG, **config}))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "more-heads-up",
            "head-channels",
            "attention-in-the-middle-alone",
            "narrowing",
            "rescaled-timesteps",
            "as-512",
        ),
        *("improved-32", "upsampler", "grey-upsampler", "attention-pool", "spatial-pool"),
    ],
)
def test_the_returned_flags_describe_the_network(name, tmp_path):
    """They are guided-diffusion's; what they leave out has its defaults there."""
    network = NETWORKS[name]
    convert_openai(network.save(tmp_path), tmp_path / "out", model_flags=network.flags, code_base=network.code_base)
    exported = export_openai(tmp_path / "out", tmp_path / "back.pt")
    given = default_flags(network.code_base, network.kind) | parse_flags(network.flags, network.code_base)[0]
    returned = default_flags("guided-diffusion", network.kind) | exported

    silent = {"timestep_respacing", "rescale_learned_sigmas", "sigma_small", "small_size", "channel_mult"}
    silent |= {"attention_resolutions", "classifier_attention_resolutions"}
    if given["diffusion_steps"] == 1000:
        silent.add("rescale_timesteps")  # 1000 steps need none
    if returned.get("num_head_channels", -1) != -1:
        silent |= {"num_heads", "num_heads_upsample"}
    for flag in given.keys() - silent:
        assert returned[flag] == given[flag], flag
    # Flags that do not look alike, by what they build.
    result = convert_openai(tmp_path / "back.pt", tmp_path / "again", model_flags=exported)
    assert result.kind == network.kind
    folder = "classifier" if network.kind == "classifier" else "unet"
    for file in (f"{folder}/config.json", f"{folder}/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_networks_of_all_origins(tmp_path):
    """From memory, from a pipeline, from a folder of the model alone: the same file."""
    model = build(num_class_embeds=10)
    scheduler = LearnedVarianceDDPMScheduler(100, beta_start=0.001, beta_end=0.2)
    model.save_pretrained(tmp_path / "model")
    pipe = ADMPipeline(model, scheduler, vae=None, text_encoder=None, tokenizer=None, classifier=None)
    pipe.save_pretrained(tmp_path / "pipe")
    flags = export_openai(tmp_path / "pipe", tmp_path / "a.pt")
    assert export_openai(model, tmp_path / "b.pt", scheduler=scheduler) == flags
    alone = export_openai(str(tmp_path / "model"), tmp_path / "c.pt")
    assert {key: flags[key] for key in alone} == alone
    assert (flags["diffusion_steps"], flags["noise_schedule"], flags["learn_sigma"]) == (100, "linear", True)

    first, second, third = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in "abc")
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor)
        assert torch.equal(third[name], tensor)

    convert_openai(tmp_path / "a.pt", tmp_path / "back", model_flags=flags)
    back = AdaGNUNet2DModel.from_pretrained(tmp_path / "back", subfolder="unet")
    for ours, theirs in zip(back.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert back.config.num_attention_heads == 4


def test_sharded_weights_and_variants(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "model", max_shard_size="500KB")
    model.half().save_pretrained(tmp_path / "model", variant="fp16")
    assert len(list((tmp_path / "model").glob("*-of-*.safetensors"))) > 1
    export_openai(tmp_path / "model", tmp_path / "back.pt")
    assert {tensor.dtype for tensor in torch.load(tmp_path / "back.pt").values()} == {torch.float32}


def test_the_order_of_attention_can_be_chosen(tmp_path):
    model = build()
    flags = export_openai(model, tmp_path / "old.pt")
    assert "use_new_attention_order" not in flags
    flags = export_openai(model, tmp_path / "new.pt", new_attention_order=True)
    assert flags["use_new_attention_order"]
    old, new = (torch.load(tmp_path / f"{name}.pt")["middle_block.1.qkv.weight"] for name in ("old", "new"))
    assert torch.equal(old.unflatten(0, (4, 3, 16)).transpose(0, 1).flatten(0, 2), new)
    assert not torch.equal(old, new)
    # What a folder was converted from counts, unless another order is asked for.
    convert_openai(tmp_path / "new.pt", tmp_path / "out", model_flags=flags)
    assert export_openai(tmp_path / "out", tmp_path / "a.pt")["use_new_attention_order"]
    assert "use_new_attention_order" not in export_openai(
        tmp_path / "out", tmp_path / "b.pt", new_attention_order=False
    )
    assert torch.equal(torch.load(tmp_path / "b.pt")["middle_block.1.qkv.weight"], old)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"norm_num_groups": 16}, "`norm_num_groups` is 16; it has only 32"),
        ({"norm_eps": 1e-6}, "`norm_eps` is 1e-06; it has only 1e-05"),
        ({"act_fn": "gelu"}, "`act_fn` is 'gelu'"),
        ({"attn_norm_num_groups": None}, "`attn_norm_num_groups` is None"),
        ({"freq_shift": 1}, "`freq_shift` is 1"),
        ({"flip_sin_to_cos": False}, "`flip_sin_to_cos` is False"),
        ({"downsample_padding": 0}, "`downsample_padding` is 0"),
        ({"mid_block_scale_factor": 2}, "`mid_block_scale_factor` is 2"),
        ({"center_input_sample": True}, "`center_input_sample` is True"),
        ({"class_embed_type": "timestep"}, "`class_embed_type` is 'timestep'"),
        ({"time_embedding_type": "fourier"}, "`time_embedding_type` is 'fourier'"),
        ({"add_attention": False}, "the middle block has no attention"),
        ({"mid_block_type": None}, "the middle block has no attention, or is missing"),
        ({"num_attention_heads": (2, 4), "down_block_types": ("AttnDownBlock2D",) * 2}, "numbers of attention heads"),
        ({"block_out_channels": (64, 96)}, "`block_out_channels` are 1,1.5 x 64, not integer multiples"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}, "missing: output_blocks.1.2.in_layers"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "missing: output_blocks.0.1.norm"),
        ({"out_channels": 5}, "`in_channels` 3 and `out_channels` 5. A U-Net of guided-diffusion returns as many"),
        ({"time_embedding_dim": 64}, "time_embed.0.weight: has shape"),
        ({"timestep_scale": 0.3}, "`timestep_scale` is 0.3"),
        ({"sample_size": (16, 32)}, r"`sample_size` of this network is \(16, 32\)"),
        ({"sample_size": None}, "`sample_size` of this network is None"),
    ],
)
def test_networks_that_openai_does_not_have(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_openai(build(**config), tmp_path / "back.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "scheduler",
    [
        {"beta_schedule": "scaled_linear"},
        {"beta_start": 1.00005e-4},
        {"prediction_type": "v_prediction"},
    ],
)
def test_processes_that_openai_does_not_have(scheduler, tmp_path):
    with pytest.raises(ValueError, match="no scheduler with these betas or this prediction type"):
        export_openai(build(), tmp_path / "back.pt", scheduler=LearnedVarianceDDPMScheduler(**scheduler))
    export_openai(build(), tmp_path / "back.pt", scheduler=LearnedVarianceDDPMScheduler())


def test_upsamplers_and_classifiers_have_the_older_order_alone(tmp_path):
    classifier = AdaGNClassifierModel(
        64, block_out_channels=(64, 128, 192, 256), layers_per_block=1, pool="adaptive", num_classes=5
    )
    upsampler = AdaGNUNet2DModel(
        sample_size=64,
        in_channels=6,
        out_channels=6,
        block_out_channels=(32, 64, 96, 128),
        attn_norm_num_groups=32,
        layers_per_block=1,
        num_attention_heads=4,
    )
    for model in (classifier, upsampler):
        with pytest.raises(ValueError, match="only the older attention order"):
            export_openai(model, tmp_path / "back.pt", new_attention_order=True)
        export_openai(model, tmp_path / "back.pt")
        (tmp_path / "back.pt").unlink()


def test_files_and_folders(tmp_path):
    (tmp_path / "there.pt").write_text("mine")
    with pytest.raises(ValueError, match="`output_file` .*there.pt exists"):
        export_openai(build(), tmp_path / "there.pt")
    assert (tmp_path / "there.pt").read_text() == "mine"
    with pytest.raises(ValueError, match="holds neither `unet/`, `classifier/` nor a `config.json`"):
        export_openai(tmp_path, tmp_path / "back.pt")
    export_openai(build(), tmp_path / "deep" / "back.pt")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["back.pt"]


def test_documented_arguments():
    check_documented_arguments(export_openai.__doc__, export_openai)


def test_a_damaged_folder(tmp_path):
    build().save_pretrained(tmp_path / "unet")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is damaged or cut short"):
        export_openai(tmp_path, tmp_path / "back.pt")


def test_what_flags_cannot_say_is_said(tmp_path, caplog):
    model = build(num_class_embeds=11, null_class_id=10)
    scheduler = LearnedVarianceDDPMScheduler(variance_type="fixed_small", clip_sample=False)
    flags = export_openai(model, tmp_path / "back.pt", scheduler=scheduler)
    assert flags["clip_denoised"] is False
    assert "Change the numbers in its script_util.py to 11; label 10 means no class" in caplog.text
    assert "with the larger fixed variance, this scheduler with the smaller one" in caplog.text
    with pytest.raises(ValueError, match="`variance_type` is 'learned_log'"):
        export_openai(model, tmp_path / "b.pt", scheduler=LearnedVarianceDDPMScheduler(variance_type="learned_log"))


def test_a_folder_that_cannot_be_made_is_found_before_the_network_is_read(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`output_file` is .*file is not a directory. Name another"):
        export_openai(tmp_path / "nowhere", tmp_path / "file" / "back.pt")
