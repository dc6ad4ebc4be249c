"""
Converted models of GLIDE's against a plain forward pass of the same state dict (`openai_forward.py`), their layouts,
and what is said on the way.

`glide_layouts.json` was made with glide-text2im at commit 69b5307: for each preset and each network of
`glide_networks.py`, `create_model` was called with the flags, and `digest` applied to the shapes of its `state_dict()`.
"""

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from glide_networks import GLIDE_NETWORKS
from openai_networks import NETWORKS
from PIL import Image
from test_openai_layouts import count, digest, layout_of

from diffusers_adm import AdaGNUNet2DModel, ADMInpaintPipeline, ADMPipeline, ADMSuperResolutionPipeline, GLIDETextModel
from diffusers_adm.commands.errors import CommandError
from diffusers_adm.conversion import GLIDE_PRESETS, convert_glide, export_openai, glide, load_glide_tokenizer
from diffusers_adm.conversion.common import expected_shapes
from diffusers_adm.conversion.glide_checkpoints import build_glide, recognise_glide, text_rules
from diffusers_adm.conversion.glide_flags import (
    default_flags,
    glide_scheduler_config,
    observed_glide_flags,
    parse_glide_flags,
)
from diffusers_adm.conversion.openai_layout import tensor_rules
from diffusers_adm.schedulers.noise_schedules import noise_schedule_of


STORED = json.loads((Path(__file__).parent / "glide_layouts.json").read_text())
BASE = GLIDE_NETWORKS["base"]
PIPELINES = {
    "base": ADMPipeline,
    "base-inpaint": ADMInpaintPipeline,
    "upsample": ADMSuperResolutionPipeline,
    "upsample-inpaint": ADMInpaintPipeline,
}


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture
def tokenizer_folder(tmp_path):
    """31 tokens, as many as the networks have: letters, a space, three pairs and the end."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]
    pairs = [("c", "a"), ("ca", "t"), ("Ġ", "cat")]
    tokens = [*letters, *("".join(pair) for pair in pairs), "<|endoftext|>"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    merges = "\n".join(" ".join(pair) for pair in pairs)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return folder


class TestOutputs:
    @pytest.mark.parametrize("name", GLIDE_NETWORKS)
    def test_are_those_of_the_original_network(self, name, tmp_path, tokenizer_folder):
        """As loaded by the pipeline's name alone, with gradients of all weights."""
        network = GLIDE_NETWORKS[name]
        result = convert_glide(
            network.save(tmp_path), tmp_path / "out", model_flags=network.flags, tokenizer=tokenizer_folder
        )
        assert result.kind == network.kind
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
        assert type(pipeline) is PIPELINES[network.kind]
        unet, text_encoder = pipeline.unet, pipeline.text_encoder
        rules = [(unet, rule) for rule in tensor_rules(unet, new_attention_order=False)]
        rules += [(text_encoder, rule) for rule in text_rules(text_encoder)]

        weights = network.weights()
        x, t, tokens, mask = network.inputs()
        # In float64 both sides share nothing but a float32 sinusoid, so rounding alone is left.
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
            unet, text_encoder, x = unet.to(dtype), text_encoder.to(dtype), x.to(dtype)
            if dtype == torch.float64:
                weights = weights.double()
                for tensor in weights.values():
                    tensor.requires_grad_()
            states, pooled = text_encoder(tokens, mask.long())
            ours = unet(x, t, encoder_hidden_states=states, added_cond_kwargs={"text_embeds": pooled}).sample
            theirs = network.forward(weights, x, t, tokens, mask)
            assert relative(ours, theirs) < tolerance
        towards = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2)).double()
        (ours * towards).sum().backward()
        gradients = torch.autograd.grad((theirs * towards).sum(), list(weights.values()))
        expected = dict(zip(weights, gradients, strict=True))
        largest = max(gradient.abs().max() for gradient in gradients)
        for model, rule in rules:
            own = rule.join(*(model.get_parameter(target).grad for target in rule.targets))
            assert (own - expected[rule.source]).abs().max() < 1e-9 * largest, rule.source

    def test_the_number_of_heads_matters(self, tmp_path):
        """A wrong one loads without any error and gives other numbers: the file does not tell."""
        file = BASE.save(tmp_path)
        x, t, tokens, mask = BASE.inputs()
        for number, flags in enumerate(("--num_head_channels 32", "--xf_heads 4")):
            convert_glide(file, tmp_path / str(number), model_flags=f"{BASE.flags} {flags}")
            unet = AdaGNUNet2DModel.from_pretrained(tmp_path / str(number), subfolder="unet")
            text_encoder = GLIDETextModel.from_pretrained(tmp_path / str(number), subfolder="text_encoder")
            with torch.no_grad():
                states, pooled = text_encoder(tokens, mask)
                kwargs = {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled}}
                assert relative(unet(x, t, **kwargs).sample, BASE.forward(BASE.weights(), x, t, tokens, mask)) > 0.01

    @pytest.mark.parametrize(
        ("kind", "in_channels", "out_channels"), [("base", 1, 2), ("upsample", 8, 8), ("base-inpaint", 3, 2)]
    )
    def test_are_those_of_the_original_network_for_other_than_rgb_images(
        self, kind, in_channels, out_channels, tmp_path, tokenizer_folder
    ):
        """Grey images and latents of four channels: constants of GLIDE's code that people change there."""
        rgb = GLIDE_NETWORKS[kind]
        spec = replace(rgb.spec, in_channels=in_channels, out_channels=out_channels)
        network = replace(rgb, spec=spec)
        for flags in ("--num_head_channels 16 --xf_heads 3", network.flags):
            result = convert_glide(
                network.save(tmp_path),
                tmp_path / f"out{len(flags)}",
                model_flags=flags,
                tokenizer=tokenizer_folder,
            )
            assert result.kind == kind
        pipeline = DiffusionPipeline.from_pretrained(result.output_dir)
        assert type(pipeline) is PIPELINES[kind]
        assert pipeline.sample_channels == out_channels // 2
        x, t, tokens, mask = network.inputs()
        with torch.no_grad():
            states, pooled = pipeline.text_encoder(tokens, mask)
            kwargs = {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled}}
            ours, theirs = (
                pipeline.unet(x, t, **kwargs).sample,
                network.forward(network.weights(), x, t, tokens, mask),
            )
        assert relative(ours, theirs) < 1e-5

    def test_half_precision_is_kept_in_the_file(self, tmp_path, tokenizer_folder):
        file = BASE.save(tmp_path, torch.float16)
        result = convert_glide(file, tmp_path / "out", model_flags=BASE.flags, tokenizer=tokenizer_folder)
        assert result.dtypes == ["float16"]
        pipeline = ADMPipeline.from_pretrained(tmp_path / "out", dtype=torch.float16)
        weights = BASE.weights()
        ours = pipeline.text_encoder.get_parameter("layers.1.linear1.weight")
        assert torch.equal(ours, weights["transformer.resblocks.1.mlp.c_fc.weight"].half())
        assert ADMPipeline.from_pretrained(tmp_path / "out").unet.dtype == torch.float32


class TestFolder:
    def test_holds_a_pipeline_that_draws(self, tmp_path, tokenizer_folder):
        image, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
        small = Image.new("RGB", (4, 4), "red")
        calls = {
            "base": {},
            "base-inpaint": {"image": image, "mask_image": mask},
            "upsample": {"image": small},
            "upsample-inpaint": {"image": image, "mask_image": mask, "low_res_image": small},
        }
        for kind, inputs in calls.items():
            (tmp_path / kind).mkdir()
            convert_glide(
                GLIDE_NETWORKS[kind].save(tmp_path / kind),
                tmp_path / kind / "out",
                model_flags=GLIDE_NETWORKS[kind].flags,
                tokenizer=tokenizer_folder,
            )
            pipeline = DiffusionPipeline.from_pretrained(tmp_path / kind / "out")
            pipeline.set_progress_bar_config(disable=True)
            inputs |= {"prompt": "a cat", "guidance_scale": 3.0, "num_inference_steps": 2, "eta": 0.0}
            assert pipeline(**inputs).images[0].size == (16, 16)
            if kind == "upsample":
                assert pipeline.config.low_res_size is None  # the file does not tell it
                assert pipeline.config.noise_schedule == noise_schedule_of(pipeline.scheduler)

    @pytest.mark.parametrize("arguments", [{"preset": "upsample"}, {}])
    def test_of_a_published_model(self, arguments, tmp_path, tokenizer_folder, monkeypatch):
        """Named or recognised; as if one of the tests' networks were it."""
        network = GLIDE_NETWORKS["upsample"]

        class Preset(NamedTuple):
            kind: str = "upsample"
            num_parameters: int = count(layout_of(network))

            def settle(self):
                return default_flags(is_upsampler=True) | parse_glide_flags(network.flags)

        monkeypatch.setitem(GLIDE_PRESETS, "upsample", Preset())
        result = convert_glide(network.save(tmp_path), tmp_path / "out", tokenizer=tokenizer_folder, **arguments)
        assert (result.preset, result.recognised, result.assumed) == ("upsample", not arguments, {})
        pipeline = ADMSuperResolutionPipeline.from_pretrained(tmp_path / "out")
        assert pipeline.config.low_res_size == 4
        assert pipeline.scheduler.config.beta_schedule == "linear"
        assert pipeline.config.noise_schedule == noise_schedule_of(pipeline.scheduler)

    def test_without_a_tokenizer_it_says_so_and_one_can_be_given_later(self, tmp_path, tokenizer_folder, caplog):
        with caplog.at_level(logging.WARNING):
            result = convert_glide(BASE.save(tmp_path), tmp_path / "out", model_flags=BASE.flags)
        assert "No `tokenizer` was given, so the pipeline has none." in caplog.text
        assert not result.has_tokenizer
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert index["tokenizer"] == [None, None]
        assert index["text_encoder"] == ["diffusers_adm", "GLIDETextModel"]
        with pytest.raises(ValueError, match="without a `tokenizer`"):
            ADMPipeline.from_pretrained(tmp_path / "out")
        words = load_glide_tokenizer(tokenizer_folder, 6)
        for cls in (ADMPipeline, DiffusionPipeline):
            assert cls.from_pretrained(tmp_path / "out", tokenizer=words).tokenizer is words

    def test_tokenizer_is_cut_and_padded_as_the_text_transformer_reads(self, tmp_path, tokenizer_folder):
        convert_glide(BASE.save(tmp_path), tmp_path / "out", model_flags=BASE.flags, tokenizer=tokenizer_folder)
        words = ADMPipeline.from_pretrained(tmp_path / "out").tokenizer
        assert (words.model_max_length, words.pad_token_id, len(words)) == (6, 30, 31)
        assert words("A CAT", padding="max_length")["input_ids"] == [0, 29, 30, 30, 30, 30]

    @pytest.mark.parametrize(
        ("preset", "schedule", "size"),
        [("base", "squaredcos_cap_v2", 64), ("base-inpaint", "squaredcos_cap_v2", 64), ("upsample", "linear", 256)],
    )
    def test_schedules(self, preset, schedule, size):
        flags = GLIDE_PRESETS[preset].settle()
        config = glide_scheduler_config(flags)
        assert (config["beta_schedule"], config["variance_type"]) == (schedule, "learned_range")
        assert (config["num_train_timesteps"], config["prediction_type"]) == (1000, "epsilon")
        assert config["clip_sample"]
        assert flags["image_size"] == size
        if schedule == "linear":
            assert (config["beta_start"], config["beta_end"]) == (0.0001, 0.02)


class TestLayouts:
    @pytest.mark.parametrize("name", GLIDE_NETWORKS)
    def test_the_tests_own_networks_have_those_of_the_original_code(self, name):
        layout = layout_of(GLIDE_NETWORKS[name])
        found = {"tensors": len(layout), "parameters": count(layout), "digest": digest(layout)}
        assert found == STORED["networks"][name]

    def test_presets_have_those_of_the_original_code_and_are_recognised(self):
        assert set(GLIDE_PRESETS) == set(STORED["presets"]) == set(PIPELINES)
        for name, preset in GLIDE_PRESETS.items():
            flags = preset.settle()
            unet, text_encoder = build_glide(flags, 50257)
            layout = expected_shapes(unet, tensor_rules(unet, False))
            layout |= expected_shapes(text_encoder, text_rules(text_encoder))
            found = {"tensors": len(layout), "parameters": count(layout), "digest": digest(layout)}
            assert found == STORED["presets"][name], name
            assert preset.num_parameters == found["parameters"]
            assert preset.kind == name
            observed = observed_glide_flags(layout)
            multiples = "1,2,3,4" if flags["image_size"] == 64 else "1,1,2,2,4,4"
            assert observed == {key: flags[key] for key in observed} | {"channel_mult": multiples}
        assert recognise_glide(layout) == name
        assert recognise_glide(layout | {"final_ln.bias": (2, 256)}) is None  # as many numbers, another shape

    @pytest.mark.parametrize("name", GLIDE_NETWORKS)
    def test_every_tensor_on_either_side_is_used_exactly_once(self, name):
        network = GLIDE_NETWORKS[name]
        given = parse_glide_flags(network.flags)
        unet, text_encoder = build_glide(default_flags(given.get("super_res", False)) | given, 31)
        rules = [tensor_rules(unet, False), text_rules(text_encoder)]
        layout = layout_of(network)
        assert Counter(rule.source for part in rules for rule in part) == Counter(layout.keys())
        for model, part in zip((unet, text_encoder), rules, strict=True):
            assert Counter(target for rule in part for target in rule.targets) == Counter(model.state_dict().keys())

    @pytest.mark.parametrize("name", GLIDE_NETWORKS)
    def test_the_file_tells_all_but_heads_and_process(self, name, tmp_path):
        network = GLIDE_NETWORKS[name]
        given = parse_glide_flags(network.flags)
        heads = {flag: value for flag, value in given.items() if "head" in flag}
        result = convert_glide(network.save(tmp_path), tmp_path / "out", model_flags=heads)
        defaults = default_flags(result.flags["super_res"])
        assert result.kind == network.kind
        assert {name: result.flags[name] for name in defaults} == defaults | given | {
            "noise_schedule": defaults["noise_schedule"]
        }
        assert set(result.assumed) == {"diffusion_steps", "noise_schedule"}


def refused(tmp_path, message, file=None, **kwargs):
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_glide(BASE.save(tmp_path) if file is None else file, tmp_path / "out", **kwargs)
    assert {path.name for path in tmp_path.iterdir()} - {"model.pt"} == before - {"model.pt"}


class TestBadInput:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"preset": "bass"}, "Did you mean `base`"),
            ({"preset": "base", "model_flags": ""}, "A preset determines all flags"),
            ({"preset": "base"}, r"(?s)859,886 parameters of .* not those of base, .*looks like: .*--num_channels 32"),
            (
                {"model_flags": "--xf_widht 24"},
                "--xf_widht, which glide-text2im does not have. Did you mean `xf_width`",
            ),
            ({"model_flags": "--xf_layers two"}, "`--xf_layers` is 'two'"),
            ({"model_flags": "--xf_layers 3"}, "missing: transformer.resblocks.2"),
            ({"model_flags": "--inpaint True"}, r"input_blocks.0.0.weight: has shape \(32, 3, 3, 3\), expected"),
            ({"model_flags": "--xf_width 0"}, "a network without text"),
            ({"model_flags": "--resblock_updown False"}, "resample in residual blocks"),
            ({"model_flags": "--noise_schedule quadratic"}, "'quadratic'; it must be one of .'linear', 'squaredcos"),
            (
                {"model_flags": "--image_size 32 --channel_mult ''"},
                "without `--channel_mult` .* must be one of 64, 128, 256",
            ),
            ({"model_flags": "--xf_heads 5"}, "it must divide `hidden_size`"),
        ],
    )
    def test_flags(self, tmp_path, kwargs, message):
        refused(tmp_path, message, **kwargs)

    def test_files(self, tmp_path):
        refused(tmp_path, "is not a file", tmp_path / "absent.pt")
        (tmp_path / "model.pt").write_bytes(b"nothing")
        refused(tmp_path, "cannot be read", tmp_path / "model.pt")
        refused(tmp_path, "not a checkpoint of GLIDE's: it lacks token_embedding", NETWORKS["residual"].save(tmp_path))
        weights = dict(BASE.weights())
        for name, message in (("final_ln.bias", "missing: final_ln.bias"), ("unemb.bias", "not used: unemb.bias")):
            changed = {key: value for key, value in weights.items() if key != name}
            if name not in weights:
                changed[name] = torch.zeros(31)
            torch.save(changed, tmp_path / "model.pt")
            refused(tmp_path, message, tmp_path / "model.pt", model_flags=BASE.flags)
        changed = weights | {"input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)}
        torch.save(changed, tmp_path / "model.pt")
        refused(tmp_path, "takes 4 channels; GLIDE's take 3, 6, 7, 10 for images of 3", tmp_path / "model.pt")
        changed = weights | {"out.2.weight": torch.zeros(3, 32, 3, 3), "out.2.bias": torch.zeros(3)}
        torch.save(changed, tmp_path / "model.pt")
        refused(tmp_path, "returns 3 channels; GLIDE's return twice as many as an image has", tmp_path / "model.pt")

    def test_tokenizer(self, tmp_path, tokenizer_folder):
        flags = {"model_flags": BASE.flags}
        refused(tmp_path, "holds neither a tokenizer nor vocab.json", **flags, tokenizer=tmp_path / "absent")
        vocabulary = json.loads((tokenizer_folder / "vocab.json").read_text())
        (tokenizer_folder / "vocab.json").write_text(json.dumps(vocabulary | {"!": 31}))
        refused(tmp_path, "has 32 tokens, but the model was trained with 31", **flags, tokenizer=tokenizer_folder)

    def test_a_folder_that_exists(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        with pytest.raises(ValueError, match="exists and is not empty"):
            convert_glide(BASE.save(tmp_path), tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]

    def test_no_way_back(self, tmp_path):
        convert_glide(BASE.save(tmp_path), tmp_path / "out", model_flags=BASE.flags)
        with pytest.raises(ValueError, match="guided-diffusion cannot build this network"):
            export_openai(tmp_path / "out", tmp_path / "back.pt")


class TestCommandLine:
    def run(self, capsys, *arguments):
        glide.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    def test_what_was_converted_and_assumed_is_said(self, tmp_path, tokenizer_folder, capsys):
        arguments = ["--checkpoint", BASE.save(tmp_path), "--output_dir", tmp_path / "out"]
        output = self.run(capsys, *arguments, "--tokenizer", tokenizer_folder)
        assert f"Wrote {tmp_path / 'out'}: a model of GLIDE's (base), 859,886 parameters in float32." in output
        warning = next(line for line in output.splitlines() if line.startswith("WARNING"))
        for told in ("--num_head_channels 64", "--xf_heads 8", "--diffusion_steps 1000"):
            assert told in warning
        assert "--xf_width" not in warning
        assert f"ADMPipeline.from_pretrained('{tmp_path / 'out'}')" in output

    def test_flags_begin_with_dashes(self, tmp_path, capsys):
        network = GLIDE_NETWORKS["upsample"]
        arguments = ["--checkpoint", network.save(tmp_path), "--output_dir", tmp_path / "out"]
        output = self.run(capsys, *arguments, "--model_flags", f"{network.flags} --diffusion_steps 500")
        assert "ADMSuperResolutionPipeline.from_pretrained(" in output
        assert "tokenizer=load_glide_tokenizer('folder-of-gpt2', 6)" in output
        assert 'timestep_respacing="fast27", eta=0.0' in output
        assert "--noise_schedule linear" in next(line for line in output.splitlines() if line.startswith("WARNING"))

    def test_presets(self, capsys):
        output = self.run(capsys, "--list_presets")
        assert [line.split()[0] for line in output.splitlines()[::2]] == list(GLIDE_PRESETS)
        assert "/dec-2021/upsample_inpaint.pt" in output
        assert "--xf_width 512" in output

    def test_errors_are_short(self, tmp_path, capsys):
        with pytest.raises(CommandError, match="`checkpoint` .* is not a file"):
            self.run(capsys, "--checkpoint", tmp_path / "absent.pt", "--output_dir", tmp_path / "out")
        with pytest.raises(SystemExit):
            self.run(capsys, "--checkpoint", "x.pt")
        assert "--output_dir FOLDER" in capsys.readouterr().err
