"""
Networks whose numbers of input and output channels are not tied to each other: with conditions concatenated to the
noisy image, or for images of other than three channels. (Their outputs and the way back: `test_openai_outputs.py`.)
"""

import json
import logging

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from openai_networks import NETWORKS

from diffusers_adm import (
    AdaGNUNet2DModel,
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conversion import convert_openai, export_openai, openai


def without(flags, *names):
    """Flags without some of them."""
    words = flags.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return " ".join(f"{name} {value}" for name, value in pairs if name.removeprefix("--") not in names)


def convert(name, tmp_path, flags=None, **arguments):
    """One of the tests' networks; `flags`: other than those it was trained with."""
    network = NETWORKS[name]
    tmp_path.mkdir(exist_ok=True)
    return convert_openai(
        network.save(tmp_path), tmp_path / "out", model_flags=network.flags if flags is None else flags, **arguments
    )


def process(learned):
    return LearnedVarianceDDPMScheduler(variance_type="learned_range" if learned else "fixed_large")


class TestNumbers:
    @pytest.mark.parametrize(
        ("name", "image_channels", "condition_channels", "pipeline"),
        [
            ("defaults", 3, 0, ADMPipeline),
            ("four-channels", 4, 0, ADMPipeline),
            ("six-channels", 6, 0, ADMPipeline),
            ("grey-five-classes", 1, 0, ADMPipeline),
            ("inpainter", 3, 4, ADMInpaintPipeline),
            ("grey-upsampler", 1, 1, ADMSuperResolutionPipeline),
            ("latent-upsampler", 4, 4, ADMSuperResolutionPipeline),
            ("upsampler", 3, 3, ADMSuperResolutionPipeline),
            ("mask-of-four-modalities", 1, 4, ADMImageToImagePipeline),
            ("mask-of-an-rgb-image", 1, 3, ADMImageToImagePipeline),
            ("image-to-image", 3, 3, ADMImageToImagePipeline),
            ("image-to-image-without-variance", 3, 3, ADMImageToImagePipeline),
            ("image-and-mask-without-variance", 3, 1, ADMImageToImagePipeline),
            ("adaptive-pool", 3, 0, None),
            ("four-channel-classifier", 4, 0, None),
        ],
    )
    def test_are_read_from_the_file_and_an_index_is_written_where_a_pipeline_takes_them(
        self, name, image_channels, condition_channels, pipeline, tmp_path
    ):
        result = convert(name, tmp_path)
        assert (result.image_channels, result.condition_channels) == (image_channels, condition_channels)
        assert result.pipeline == (None if pipeline is None else pipeline.__name__)
        assert (tmp_path / "out" / "model_index.json").is_file() == (pipeline is not None)
        if pipeline is not None:
            loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
            assert type(loaded) is pipeline
            assert loaded.sample_channels == image_channels
        if NETWORKS[name].kind != "classifier":
            # What the scheduler makes of the output has as many channels as an image.
            unet = AdaGNUNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet")
            scheduler = LearnedVarianceDDPMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
            sample, output = torch.zeros(1, image_channels, 8, 8), torch.zeros(1, unet.config.out_channels, 8, 8)
            assert scheduler.step(output, 999, sample).prev_sample.shape == sample.shape

    @pytest.mark.parametrize(
        "name",
        ["mask-of-four-modalities", "mask-of-an-rgb-image", "image-to-image", "inpainter", "six-channels"],
    )
    def test_of_the_image_say_the_same_as_the_flag(self, name, tmp_path):
        flags, learned = NETWORKS[name].flags, name != "six-channels"
        channels = NETWORKS[name].spec.out_channels // (2 if learned else 1)
        result = convert(name, tmp_path, without(flags, "learn_sigma"), image_channels=channels)
        assert result.flags["learn_sigma"] == learned
        assert "learn_sigma" not in result.assumed
        assert result.image_channels == channels

    def test_of_upsamplers_may_hold_a_condition_besides_the_small_image(self, tmp_path):
        """7 channels in, 6 out: the noisy image, the enlarged small one and one more."""
        network = NETWORKS["improved-upsampler"]
        weights = dict(network.weights())
        weights["input_blocks.0.0.weight"] = torch.randn(32, 7, 3, 3, generator=torch.Generator().manual_seed(1))
        torch.save(weights, tmp_path / "model.pt")
        result = convert_openai(
            tmp_path / "model.pt", tmp_path / "out", model_flags=network.flags, code_base=network.code_base
        )
        assert (result.kind, result.image_channels, result.condition_channels) == ("upsampler", 3, 4)
        assert result.pipeline is None
        export_openai(tmp_path / "out", tmp_path / "back.pt")
        back = torch.load(tmp_path / "back.pt", weights_only=True)
        assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())

    def test_are_asked_for_where_two_meanings_are_possible(self, tmp_path):
        """And only there: 3 in and 6 out, 4 in and 3 out have one each."""
        for name in ("mask-of-four-modalities", "mask-of-an-rgb-image", "inpainter"):
            network = NETWORKS[name]
            for flags in (None, without(network.flags, "learn_sigma")):
                with pytest.raises(ValueError, match="Pass `image_channels`") as refused:
                    convert_openai(network.save(tmp_path), tmp_path / "out", model_flags=flags)
                channels_in, channels_out = network.spec.in_channels, network.spec.out_channels
                half = channels_out // 2
                assert f"takes {channels_in} channels and returns {channels_out}" in str(refused.value)
                assert f"`--learn_sigma True`: images of {half} channel" in str(refused.value)
                assert f"`--learn_sigma False`: images of {channels_out} channel" in str(refused.value)
                assert not (tmp_path / "out").exists()
        for name in ("image-and-mask-without-variance", "image-to-image-without-variance", "head-channels"):
            result = convert(name, tmp_path / name, without(NETWORKS[name].flags, "learn_sigma"))
            assert "learn_sigma" not in result.assumed

    def test_that_are_assumed_are_named(self, tmp_path):
        """As many out as in: a U-Net of the code bases without variance, or one with conditions and a variance."""
        result = convert("four-channels", tmp_path)
        assert result.assumed["learn_sigma"] is False
        assert "learn_sigma" not in convert("defaults", tmp_path / "rgb").assumed  # 3 is no even number

    @pytest.mark.parametrize(
        ("name", "arguments", "message"),
        [
            ("defaults", {"flags": "--learn_sigma True"}, r"takes 3 channels and returns 3.*`--learn_sigma False`: im"),
            ("head-channels", {"flags": "--learn_sigma False"}, r"takes 3 .* returns 6.*`--learn_sigma True`: images"),
            ("inpainter", {"image_channels": 6}, r"`--learn_sigma True` .*`image_channels` is 6"),
            ("inpainter", {"image_channels": 7, "flags": ""}, r"returns 6.*`image_channels` is 7"),
            ("inpainter", {"image_channels": 0, "flags": ""}, "But `image_channels` is 0"),
            ("upsampler", {"image_channels": 6}, "takes 6 channels and returns 3.*`image_channels` is 6"),
            ("defaults", {"flags": "--large_size 64"}, r"the file holds a U-Net \(3 input channels, 3 output channels"),
            ("adaptive-pool", {"image_channels": 1}, "`image_channels` is 1, but the classifier takes 3"),
        ],
    )
    def test_that_contradict_the_file_are_refused_with_what_it_holds(self, name, arguments, message, tmp_path):
        flags = arguments.pop("flags", None)
        flags = NETWORKS[name].flags if flags is None else f"{without(NETWORKS[name].flags, 'learn_sigma')} {flags}"
        if "--large_size" in flags:
            flags = "--large_size 64"
        with pytest.raises(ValueError, match=f"(?s){message}") as refused:
            convert_openai(NETWORKS[name].save(tmp_path), tmp_path / "out", model_flags=flags, **arguments)
        assert "looks like" not in str(refused.value)
        assert not (tmp_path / "out").exists()

    def test_no_network_returns_are_refused(self, tmp_path):
        weights = dict(NETWORKS["defaults"].weights())
        weights["out.2.weight"], weights["out.2.bias"] = torch.zeros(10, 32, 3, 3), torch.zeros(10)
        torch.save(weights, tmp_path / "model.pt")
        for flags in (None, NETWORKS["defaults"].flags):
            with pytest.raises(ValueError, match="takes 3 channels and returns 10.* as many channels as its images"):
                convert_openai(tmp_path / "model.pt", tmp_path / "out", model_flags=flags)

    def test_of_presets_are_three(self, tmp_path):
        file = NETWORKS["defaults"].save(tmp_path)
        with pytest.raises(ValueError, match="`image_channels` is 1, but lsun_cat has images of 3 channels"):
            convert_openai(file, tmp_path / "out", preset="lsun_cat", image_channels=1)


class TestSampling:
    @pytest.mark.parametrize("condition_first", [False, True])
    @pytest.mark.parametrize(
        "name", ["mask-of-four-modalities", "mask-of-an-rgb-image", "image-to-image", "image-and-mask-without-variance"]
    )
    @torch.no_grad()
    def test_is_that_of_the_concatenation_by_hand(self, name, condition_first, tmp_path):
        """DDIM with clipping, all but the original network written out here, in float64."""
        network = NETWORKS[name]
        result = convert(name, tmp_path, condition_first=condition_first)
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "out").to(torch.float64)
        pipe.set_progress_bar_config(disable=True)
        channels = result.image_channels
        generator = torch.Generator().manual_seed(2)
        latents = torch.randn(2, channels, 16, 16, generator=generator, dtype=torch.float64)
        fractions = torch.randint(0, 256, (2, result.condition_channels, 16, 16), generator=generator) / 255
        source = 2 * fractions - 1
        given = fractions if pipe.source_format.is_viewable else source
        sampled = pipe(given, latents=latents, timestep_respacing="ddim4", eta=0.0, output_type="latent").images

        weights, x = network.weights().double(), latents
        alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        steps = [750, 500, 250, 0]
        for t, later in zip(steps, [*steps[1:], None], strict=True):
            parts = [source.double(), x] if condition_first else [x, source.double()]
            epsilon = network.forward(weights, torch.cat(parts, dim=1), torch.tensor([t, t]))[:, :channels]
            original = ((x - np.sqrt(1 - alphas[t]) * epsilon) / np.sqrt(alphas[t])).clamp(-1, 1)
            epsilon = (x - np.sqrt(alphas[t]) * original) / np.sqrt(1 - alphas[t])
            alpha = 1.0 if later is None else alphas[later]
            x = np.sqrt(alpha) * original + np.sqrt(1 - alpha) * epsilon
        assert sampled.shape == latents.shape
        torch.testing.assert_close(sampled, x, rtol=0, atol=1e-4)  # the source is read in float32

    def test_the_order_of_the_conditions_leads_back(self, tmp_path):
        network = NETWORKS["mask-of-four-modalities"]
        convert("mask-of-four-modalities", tmp_path, condition_first=True)
        export_openai(tmp_path / "out", tmp_path / "back.pt")
        back = torch.load(tmp_path / "back.pt", weights_only=True)
        assert all(torch.equal(back[name], tensor) for name, tensor in network.weights().items())

    def test_there_is_no_order_without_conditions(self, tmp_path):
        for name in ("defaults", "upsampler", "adaptive-pool"):
            (tmp_path / name).mkdir()
            with pytest.raises(ValueError, match="`condition_first` was given, but .* no conditions"):
                convert(name, tmp_path / name, condition_first=True)

    def test_source_images_have_the_format_of_their_channels(self, tmp_path):
        formats = {}
        for name in ("mask-of-four-modalities", "mask-of-an-rgb-image", "image-and-mask-without-variance"):
            convert(name, tmp_path / name)
            formats[name] = DiffusionPipeline.from_pretrained(tmp_path / name / "out").source_format
        four, rgb, grey = formats.values()
        assert (four.mode, four.channels, four.value_range, four.num_levels) == ("array", 4, (-1, 1), None)
        assert (rgb.mode, grey.mode) == ("RGB", "L")


class TestExport:
    @pytest.mark.parametrize(
        "name", ["mask-of-four-modalities", "mask-of-an-rgb-image", "image-to-image", "inpainter", "latent-upsampler"]
    )
    def test_gives_flags_that_lead_back(self, name, tmp_path):
        network = NETWORKS[name]
        convert(name, tmp_path)
        flags = export_openai(tmp_path / "out", tmp_path / "back.pt")
        assert flags["learn_sigma"] == ("--learn_sigma True" in network.flags)
        result = convert_openai(tmp_path / "back.pt", tmp_path / "again", model_flags=flags)
        assert result.kind == network.kind
        first, second = (
            AdaGNUNet2DModel.from_pretrained(tmp_path / folder, subfolder="unet") for folder in ("out", "again")
        )
        for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert {**first.config, "_name_or_path": None} == {**second.config, "_name_or_path": None}

    def test_of_our_own_inpainting_network(self, tmp_path):
        unet = AdaGNUNet2DModel(
            sample_size=16,
            in_channels=7,
            out_channels=6,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            num_attention_heads=4,
        )
        components = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None}
        ADMInpaintPipeline(unet, process(learned=True), **components).save_pretrained(tmp_path / "pipe")
        flags = export_openai(tmp_path / "pipe", tmp_path / "back.pt")
        assert flags["learn_sigma"] is True
        result = convert_openai(tmp_path / "back.pt", tmp_path / "again", model_flags=flags)
        assert result.pipeline == "ADMInpaintPipeline"
        again = ADMInpaintPipeline.from_pretrained(tmp_path / "again")
        for ours, theirs in zip(again.unet.parameters(), unet.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_of_an_upsampler_of_a_size_that_those_of_openai_do_not_have(self, tmp_path, caplog):
        """`create_model` builds any size, `sr_create_model` three of them."""
        unet = AdaGNUNet2DModel(
            sample_size=16,
            in_channels=6,
            out_channels=6,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            num_attention_heads=4,
        )
        with caplog.at_level(logging.WARNING):
            flags = export_openai(unet, tmp_path / "back.pt", scheduler=process(learned=True))
        assert (flags["image_size"], flags["channel_mult"], flags["learn_sigma"]) == (16, "1,2", True)
        assert "in its `create_model` to 6 and `out_channels` to 6" in caplog.text
        result = convert_openai(tmp_path / "back.pt", tmp_path / "again", model_flags=flags)
        assert (result.kind, result.image_channels, result.condition_channels) == ("unet", 3, 3)

    def test_asks_where_nothing_tells_the_channels_of_an_image(self, tmp_path):
        convert("inpainter", tmp_path)
        unet = AdaGNUNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet")
        with pytest.raises(ValueError, match="`in_channels` 7 and `out_channels` 6.*Pass `scheduler`.*image_channels"):
            export_openai(unet, tmp_path / "back.pt")
        assert export_openai(unet, tmp_path / "a.pt", image_channels=3)["learn_sigma"] is True
        assert export_openai(unet, tmp_path / "b.pt", image_channels=6)["learn_sigma"] is False
        assert export_openai(unet, tmp_path / "c.pt", scheduler=process(learned=False))["learn_sigma"] is False

    def test_refuses_what_does_not_go_together(self, tmp_path):
        convert("inpainter", tmp_path)
        for arguments, message in (
            ({"image_channels": 6}, "`image_channels` is 6.*the scheduler's `variance_type` is 'learned_range'"),
            ({"image_channels": 2}, "`image_channels` is 2"),
            ({"scheduler": process(learned=False), "image_channels": 3}, "'fixed_large'"),
        ):
            with pytest.raises(ValueError, match=message):
                export_openai(tmp_path / "out", tmp_path / "back.pt", **arguments)
        convert("four-channel-classifier", tmp_path / "other")
        with pytest.raises(ValueError, match="`image_channels` is 3, but the classifier takes 4"):
            export_openai(tmp_path / "other" / "out", tmp_path / "back.pt", image_channels=3)

    @pytest.mark.parametrize(
        ("name", "note"),
        [
            ("defaults", None),
            ("head-channels", None),
            ("upsampler", None),
            ("mask-of-four-modalities", "in its `create_model` to 5 and `out_channels` to 2"),
            ("inpainter", "in its `create_model` to 7 and `out_channels` to 6"),
            ("image-to-image", "in its `create_model` to 6 and `out_channels` to 6"),
            ("grey-upsampler", "in its `sr_create_model` to 1 and `out_channels` to 2"),
            ("four-channel-classifier", "in its `create_classifier` to 4"),
        ],
    )
    def test_says_which_constants_to_change(self, name, note, tmp_path, caplog):
        convert(name, tmp_path)
        with caplog.at_level(logging.WARNING):
            export_openai(tmp_path / "out", tmp_path / "back.pt")
        assert ("Change `in_channels`" in caplog.text) == (note is not None)
        assert note is None or note in caplog.text


class TestCommandLine:
    def run(self, capsys, *arguments):
        openai.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    def test_says_how_to_sample_from_a_network_with_a_source_image(self, tmp_path, capsys):
        network = NETWORKS["mask-of-four-modalities"]
        arguments = ["--checkpoint", network.save(tmp_path), "--output_dir", tmp_path / "out", "--image_channels", 1]
        output = self.run(capsys, *arguments, "--model_flags", without(network.flags, "learn_sigma"))
        assert "takes 5 channels: 1 of the noisy image and 4 of conditions" in output
        assert "the noisy image before it" in output
        assert "pass --condition_first" in output
        scope = {"source_image": np.zeros((16, 16, 4), dtype=np.float32)}
        instructions = output[output.index("Load it with\n") + len("Load it with\n") :]
        instructions = instructions.replace('timestep_respacing="250"', 'timestep_respacing="2"')
        exec("\n".join(line.strip() for line in instructions.splitlines()), scope)
        assert scope["pipe"].unet.config.in_channels == 5
        assert scope["pipe"].scheduler.has_learned_variance
        assert scope["image"].mode == "L"

        output = self.run(capsys, "--export", tmp_path / "out", "--output_file", tmp_path / "back.pt")
        assert "--learn_sigma True" in output
        assert json.loads((tmp_path / "out" / "openai_checkpoint.json").read_text())["flags"]["learn_sigma"] is True

    def test_says_as_what_an_inpainting_network_is_read(self, tmp_path, capsys):
        network = NETWORKS["inpainter"]
        arguments = ["--checkpoint", network.save(tmp_path), "--output_dir", tmp_path / "out"]
        output = self.run(capsys, *arguments, "--model_flags", network.flags)
        assert "takes 7 channels: 3 of the noisy image and 4 of conditions" in output
        assert "ADMInpaintPipeline.from_pretrained" in output
        assert "masked image and the keep mask" in output

    def test_exports_with_the_channels_of_an_image(self, tmp_path, capsys):
        convert("inpainter", tmp_path)
        arguments = ["--export", tmp_path / "out" / "unet", "--output_file", tmp_path / "back.pt"]
        with pytest.raises(ValueError, match="--image_channels"):
            self.run(capsys, *arguments)
        assert "--learn_sigma True" in self.run(capsys, *arguments, "--image_channels", "3")
