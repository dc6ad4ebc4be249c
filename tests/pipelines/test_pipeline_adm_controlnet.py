"""ADMControlNetPipeline against loops written by hand, the base alone, diffusers' own pipeline, and wrong input."""

import inspect
import re

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
)
from docstrings import check_documented_arguments
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tolerances import ONE_LAYER, SAMPLING, rounding_errors
from toy_models import (
    CONDITIONAL,
    fill_randomly,
    random_classifier,
    random_diffusers_text_unet,
    random_diffusers_unet,
    random_text_encoder,
    random_text_unet,
    random_unet,
    toy_tokenizer,
)

from diffusers_adm import (
    AdaGNControlNetModel,
    AdaGNMultiControlNetModel,
    ADMControlNetPipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)


ABSENT = dict.fromkeys(ADMPipeline._optional_components)
TEXT = {"text_encoder": random_text_encoder("clip"), "tokenizer": toy_tokenizer("clip")}
LABELS, NULL = (1, 2), 4


def random_branch(unet, seed: int = 1, **options) -> AdaGNControlNetModel:
    """One that has something to say: its zero convolutions are random, too."""
    branch = AdaGNControlNetModel.from_unet(unet, **options)
    generator = torch.Generator().manual_seed(seed)
    zero_convs = [
        *branch.controlnet_down_blocks,
        branch.controlnet_mid_block,
        branch.controlnet_cond_embedding.conv_out,
    ]
    for conv in zero_convs:
        fan_in = conv.weight[0].numel()
        conv.weight.data = torch.randn(conv.weight.shape, generator=generator) / fan_in**0.5
        conv.bias.data = 0.1 * torch.randn(conv.bias.shape, generator=generator)
    return branch.eval()


def make_pipeline(unet=None, controlnet=None, cls=ADMControlNetPipeline, **components):
    unet = random_unet(**CONDITIONAL) if unet is None else unet
    if cls is ADMControlNetPipeline:
        components["controlnet"] = random_branch(unet) if controlnet is None else controlnet
    pipe = cls(unet, **{"scheduler": LearnedVarianceDDPMScheduler(), **ABSENT, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def base_of(pipe: ADMControlNetPipeline) -> ADMPipeline:
    components = {name: component for name, component in pipe.components.items() if name != "controlnet"}
    return make_pipeline(cls=ADMPipeline, **components)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(number: int) -> list[torch.Generator]:
    return [seeded(i) for i in range(number)]


def conditions(number: int = 2, height: int = 8, width: int = 8, seed: int = 3) -> torch.Tensor:
    """8-bit values in [0, 1]."""
    return torch.randint(0, 256, (number, 3, height, width), generator=seeded(seed)).float() / 255


def record(module: torch.nn.Module) -> list[dict]:
    """What a network is called with from now on."""
    calls = []

    def hook(_, args, kwargs):
        calls.append({"sample": args[0].clone(), "timestep": args[1], **kwargs})

    module.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def count(module: torch.nn.Module) -> list[float]:
    """The timesteps of its forward passes from now on."""
    timesteps = []
    module.register_forward_hook(lambda _, args, output: timesteps.append(float(args[1])))
    return timesteps


@pytest.fixture(scope="module")
def one():
    return make_pipeline()


@pytest.fixture(scope="module")
def two(one):
    return make_pipeline(one.unet, [one.controlnet, random_branch(one.unet, 2)])


def names_of(value) -> str | None:
    return None if isinstance(value, str) else ",".join(value)


class TestFreshBranch:
    """Its residuals are exactly 0, so that nothing changes, though it runs."""

    @pytest.mark.parametrize(
        "unet, components, arguments, width",
        [
            (random_unet(**CONDITIONAL), {}, {"class_labels": LABELS, "guidance_scale": 3.0}, 1.0),
            (random_unet(**CONDITIONAL), {}, {"class_labels": LABELS}, 0.5),
            (
                random_unet(),
                {"classifier": random_classifier()},
                {"class_labels": 1, "classifier_guidance_scale": 5.0},
                1.0,
            ),
            (random_unet(out_channels=3), {"scheduler": DDPMScheduler()}, {}, 1.0),
            (random_text_unet("transformer"), TEXT, {"prompt": ["a cat", "the red dog"], "guidance_scale": 3.0}, 0.5),
            (random_text_unet("added_kv"), TEXT, {"prompt": "a green hat", "guidance_scale": 3.0}, 1.0),
            (
                random_text_unet("added_kv", addition_embed_type="text_embeds", **CONDITIONAL),
                {"text_encoder": random_text_encoder("glide"), "tokenizer": toy_tokenizer("glide")},
                {"prompt": "a dog", "class_labels": 2, "guidance_scale": 3.0, "negative_prompt": "a mat"},
                0.5,
            ),
            (random_diffusers_text_unet(), TEXT, {"prompt": "a cat", "guidance_scale": 2.0}, 1.0),
        ],
        ids=["class guided", "class", "classifier", "plain", "transformer", "added_kv", "pooled", "diffusers"],
    )
    def test_equals_the_base_bit_by_bit(self, unet, components, arguments, width):
        branch = AdaGNControlNetModel.from_unet(unet, width=width)
        pipe = make_pipeline(unet, branch, **components)
        ran = count(branch)
        if not any(isinstance(value, (list, tuple)) for value in arguments.values()):
            arguments = {**arguments, "batch_size": 2}
        arguments = {**arguments, "num_inference_steps": 3, "output_type": "latent"}
        actual = pipe(image=conditions(), generator=seeded(), **arguments).images
        expected = base_of(pipe)(generator=seeded(), **arguments).images
        assert len(ran) == 3
        assert rounding_errors(actual, expected) <= SAMPLING
        assert expected.std() > 0.1
        # A branch that is not fresh does change them.
        pipe.controlnet = random_branch(unet)
        assert (pipe(image=conditions(), generator=seeded(), **arguments).images - expected).abs().max() > 0.01


# What each branch adds in each step, by the arguments of a call


@torch.no_grad()
def by_hand(unet, nets, images, scales, active, *, guidance_scale=1.0, guess_mode=False, generator=None):
    """
    Ancestral sampling of two classes with `scales[i]` times the residuals of `nets[i]` wherever `active[i][step]`. One
    pass for each image, with and without class; sums and guidance in float64.
    """
    steps = len(active[0])
    scheduler = LearnedVarianceDDPMScheduler()
    scheduler.set_timesteps(steps)
    samples = torch.randn(2, 3, 8, 8, generator=generator)

    def predict(sample, step, t, row, label, has_control):
        label = torch.tensor([label])
        total = None
        for net, image, scale, acts in zip(nets, images, scales, active, strict=True):
            if not (acts[step] and has_control):
                continue
            down, middle = net(sample, t, controlnet_cond=image[row : row + 1], class_labels=label, return_dict=False)
            residuals = [scale * x.double() for x in (*down, middle)]
            if guess_mode:
                factors = torch.logspace(-1, 0, len(residuals), dtype=torch.float64)  # of diffusers' ControlNetModel
                residuals = [factor * x for factor, x in zip(factors, residuals, strict=True)]
            total = residuals if total is None else [a + b for a, b in zip(total, residuals, strict=True)]
        kwargs = {}
        if total is not None:
            *down, middle = (x.float() for x in total)
            kwargs = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
        return unet(sample, t, label, **kwargs).sample.double()

    for step, t in enumerate(scheduler.timesteps):
        outputs = []
        for row, label in enumerate(LABELS):
            sample = samples[row : row + 1]
            output = predict(sample, step, t, row, label, True)
            if guidance_scale != 1.0:
                uncond = predict(sample, step, t, row, NULL, not guess_mode)[:, :3]
                output[:, :3] = uncond + guidance_scale * (output[:, :3] - uncond)
            outputs.append(output)
        samples = scheduler.step(torch.cat(outputs).float(), t, samples, generator=generator).prev_sample
    return samples


EVERY = "yyyyy"


class TestSampling:
    IMAGES = [conditions(2, seed=3), conditions(2, seed=4)]

    @pytest.fixture
    def unet(self):
        return random_unet(**CONDITIONAL)

    @pytest.fixture
    def nets(self, unet):
        return [random_branch(unet, 1), random_branch(unet, 2)]

    @pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
    @pytest.mark.parametrize("guess_mode", [False, True])
    @pytest.mark.parametrize(
        "arguments, scale, active",
        [
            ({}, 1.0, EVERY),
            ({"controlnet_conditioning_scale": 0.4}, 0.4, EVERY),
            ({"controlnet_conditioning_scale": -0.5, "control_guidance_end": 0.6}, -0.5, "yyy.."),
            ({"control_guidance_start": 0.3, "control_guidance_end": 0.8}, 1.0, "..yy."),
        ],
        ids=str,
    )
    def test_one_branch(self, unet, nets, arguments, scale, active, guess_mode, guidance_scale):
        pipe = make_pipeline(unet, nets[0])
        ran = count(nets[0])
        common = {"guidance_scale": guidance_scale, "guess_mode": guess_mode}
        actual = pipe(
            image=self.IMAGES[0],
            class_labels=LABELS,
            num_inference_steps=5,
            output_type="latent",
            generator=seeded(),
            **common,
            **arguments,
        ).images
        assert len(ran) == active.count("y")
        active = [[mark == "y" for mark in active]]
        expected = by_hand(unet, nets[:1], self.IMAGES[:1], [scale], active, generator=seeded(), **common)
        # The first of the steps multiplies errors of float32 by 157.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)
        plain = base_of(pipe)(
            class_labels=LABELS,
            num_inference_steps=5,
            output_type="latent",
            generator=seeded(),
            guidance_scale=guidance_scale,
        ).images
        assert (plain - expected).abs().max() > 0.05

    @pytest.mark.parametrize("guess_mode", [False, True])
    @pytest.mark.parametrize(
        "arguments, scales, active",
        [
            ({}, (1.0, 1.0), (EVERY, EVERY)),
            ({"controlnet_conditioning_scale": 0.3}, (0.3, 0.3), (EVERY, EVERY)),
            ({"controlnet_conditioning_scale": [0.9, 0.2]}, (0.9, 0.2), (EVERY, EVERY)),
            ({"controlnet_conditioning_scale": [0, 0.7]}, (0.0, 0.7), (".....", EVERY)),
            ({"control_guidance_start": [0.0, 0.4], "control_guidance_end": 0.8}, (1.0, 1.0), ("yyyy.", "..yy.")),
            (
                {"control_guidance_end": [0.4, 1.0], "control_guidance_start": [0.0, 0.8]},
                (1.0, 1.0),
                ("yy...", "....y"),
            ),
        ],
        ids=str,
    )
    def test_two_branches(self, unet, nets, arguments, scales, active, guess_mode):
        pipe = make_pipeline(unet, nets)
        ran, timesteps = [count(net) for net in nets], count(unet)
        common = {"guidance_scale": 2.0, "guess_mode": guess_mode}
        actual = pipe(
            image=self.IMAGES,
            class_labels=LABELS,
            num_inference_steps=5,
            output_type="latent",
            generator=seeded(),
            **common,
            **arguments,
        ).images
        steps = [[i for i, mark in enumerate(marks) if mark == "y"] for marks in active]
        assert ran == [[timesteps[i] for i in numbers] for numbers in steps]
        active = [[mark == "y" for mark in marks] for marks in active]
        expected = by_hand(unet, nets, self.IMAGES, scales, active, generator=seeded(), **common)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)

    def test_what_the_networks_see(self, unet, nets):
        """One batch for both passes; in guess mode the branch sees the conditional one, the U-Net zeros and that."""
        arguments = {"class_labels": LABELS, "guidance_scale": 2.0, "num_inference_steps": 1}
        pipe = make_pipeline(unet, nets[0])
        seen, of_branch = record(pipe.unet), record(pipe.controlnet)
        for guess_mode in (False, True):
            pipe(image=self.IMAGES[0], guess_mode=guess_mode, generator=seeded(), **arguments)
        assert [call["class_labels"].tolist() for call in seen] == [[NULL, NULL, *LABELS]] * 2
        assert [call["class_labels"].tolist() for call in of_branch] == [[NULL, NULL, *LABELS], list(LABELS)]
        assert torch.equal(of_branch[0]["sample"], seen[0]["sample"])
        assert torch.equal(of_branch[1]["sample"], seen[1]["sample"][2:])
        embeds = nets[0].embed_condition(self.IMAGES[0])
        for call in of_branch:  # both passes share it
            assert rounding_errors(call["controlnet_cond_embeds"], embeds) <= ONE_LAYER
        for residual in (*seen[1]["down_block_additional_residuals"], seen[1]["mid_block_additional_residual"]):
            assert not residual[:2].any()
            assert residual[2:].any()
        assert seen[0]["mid_block_additional_residual"][:2].any()

    @pytest.mark.parametrize(
        "arguments",
        [
            {"controlnet_conditioning_scale": 0.0},
            {"controlnet_conditioning_scale": 0, "guess_mode": True},
            {"control_guidance_end": 0.0},
            {"control_guidance_start": 1.0},
            {"control_guidance_start": 0.45, "control_guidance_end": 0.55},  # no whole step of five
        ],
        ids=str,
    )
    @pytest.mark.parametrize("number", [1, 2])
    def test_branches_that_do_not_act_do_not_run(self, unet, nets, arguments, number):
        pipe = make_pipeline(unet, nets[0] if number == 1 else nets)
        ran = count(pipe.controlnet)
        common = {"class_labels": LABELS, "guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "latent"}
        images = self.IMAGES[0] if number == 1 else self.IMAGES
        actual = pipe(image=images, generator=seeded(), **common, **arguments).images
        assert ran == []
        assert rounding_errors(actual, base_of(pipe)(generator=seeded(), **common).images) <= SAMPLING

    def test_fractions_of_a_second_order_solver(self, unet, nets):
        """They count evaluations of the network, as those of guidance do: 9 for 5 steps, the last one alone."""
        scheduler = HeunDiscreteScheduler.from_config(LearnedVarianceDDPMScheduler().config)
        pipe = make_pipeline(unet, nets[0], scheduler=scheduler)
        ran, guided = count(pipe.controlnet), record(pipe.unet)
        interval = {"control_guidance_start": 0.2, "control_guidance_end": 0.7}
        interval |= {"guidance_start": 0.2, "guidance_end": 0.7, "guidance_scale": 2.0}
        pipe(image=self.IMAGES[0][:1], class_labels=1, num_inference_steps=5, generator=seeded(), **interval)
        expected = [2 <= i <= 5 for i in range(9)]  # 0.2 <= i / 9 and (i + 1) / 9 <= 0.7
        assert ["mid_block_additional_residual" in call for call in guided] == expected
        assert [len(call["sample"]) == 2 for call in guided] == expected
        assert ran == [float(call["timestep"]) for call, acts in zip(guided, expected, strict=True) if acts]

    def test_solvers_that_scale_their_samples(self, unet, nets):
        """The branch sees what the U-Net sees."""
        scheduler = EulerDiscreteScheduler.from_config(LearnedVarianceDDPMScheduler().config)
        pipe = make_pipeline(unet, nets[0], scheduler=scheduler)
        seen, of_branch = record(pipe.unet), record(pipe.controlnet)
        pipe(image=self.IMAGES[0], class_labels=LABELS, num_inference_steps=3, generator=seeded())
        assert all(torch.equal(a["sample"], b["sample"]) for a, b in zip(seen, of_branch, strict=True))
        assert seen[0]["sample"].std() < 2

    def test_an_image_does_not_depend_on_its_batch(self, unet, nets):
        pipe = make_pipeline(unet, nets)
        images = [conditions(3, seed=5), conditions(3, seed=6)]
        arguments = {"guidance_scale": 2.0, "num_inference_steps": 4, "output_type": "latent"}
        batch = pipe(image=images, class_labels=[0, 1, 2], generator=generators(3), **arguments).images
        for i in range(3):
            alone = pipe(image=[images[0][i], images[1][i]], class_labels=i, generator=seeded(i), **arguments).images
            torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        other = pipe(image=[images[0][1], images[1][1]], class_labels=0, generator=seeded(), **arguments).images
        assert (batch[:1] - other).abs().max() > 0.01

    def test_several_images_of_each_condition(self, unet, nets):
        pipe = make_pipeline(unet, nets[0])
        arguments = {"num_inference_steps": 2, "output_type": "latent"}
        images = pipe(
            image=self.IMAGES[0], class_labels=LABELS, num_images_per_prompt=2, generator=generators(4), **arguments
        ).images
        repeated = self.IMAGES[0][[0, 0, 1, 1]]
        expected = pipe(image=repeated, class_labels=[1, 1, 2, 2], generator=generators(4), **arguments).images
        assert rounding_errors(images, expected) <= SAMPLING

    def test_nothing_in_the_loop_waits_for_the_device(self, unet, nets):
        """On the meta device no number can be read; whatever would stall a GPU raises an error."""
        pipe = make_pipeline(unet, nets).to("meta")
        arguments = {"class_labels": LABELS, "guidance_scale": 2.0, "control_guidance_start": [0.0, 0.5]}
        for guess_mode in (False, True):
            images = pipe(
                image=self.IMAGES, guess_mode=guess_mode, num_inference_steps=3, output_type="latent", **arguments
            ).images
            assert (tuple(images.shape), images.device.type) == ((2, 3, 8, 8), "meta")

    def test_callbacks_and_interruption(self, unet, nets):
        pipe = make_pipeline(unet, nets[0])
        ran = record(pipe.controlnet)

        def callback(pipeline, step, timestep, kwargs):
            pipeline.guidance_scale = 3.0 if step == 0 else 1.0
            pipeline._interrupt = step == 2
            return {"latents": torch.zeros_like(kwargs["latents"])} if step == 2 else {}

        images = pipe(
            image=self.IMAGES[0],
            class_labels=LABELS,
            num_inference_steps=5,
            callback_on_step_end=callback,
            output_type="latent",
        ).images
        assert not images.any()
        assert [len(call["sample"]) for call in ran] == [2, 4, 2]
        assert pipe.num_timesteps == 5

    def test_a_pooled_branch_is_in_guess_mode(self, unet, nets):
        branch = AdaGNControlNetModel.from_config(nets[0].config, global_pool_conditions=True)
        branch.load_state_dict(nets[0].state_dict())
        pipe = make_pipeline(unet, branch.eval())
        seen, of_branch = record(pipe.unet), record(branch)
        arguments = {"class_labels": LABELS, "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "latent"}
        pipe(image=self.IMAGES[0], generator=seeded(), **arguments)
        assert all(len(call["sample"]) == 2 for call in of_branch)
        assert not seen[0]["mid_block_additional_residual"][:2].any()
        assert seen[0]["mid_block_additional_residual"].shape[2:] == (1, 1)
        with pytest.raises(ValueError, match=r"have `global_pool_conditions` \[False, True\]"):
            make_pipeline(unet, [nets[0], branch])


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Of diffusers and ours, with the same weights, at reduced width. Conditions are twice as large as latents."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
    )
    unet = random_diffusers_text_unet(in_channels=4, out_channels=4, resnet_time_scale_shift="default")
    theirs = [
        fill_randomly(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)), seed)
        for seed in (7, 8)
    ]
    ours = []
    for number, net in enumerate(theirs):
        folder = tmp_path_factory.mktemp(f"controlnet_{number}")
        net.save_pretrained(folder)
        ours.append(AdaGNControlNetModel.from_pretrained(folder))
    components = {"unet": unet, "scheduler": scheduler, "vae": fill_randomly(vae), **TEXT}
    reference = StableDiffusionControlNetPipeline(
        **components,
        controlnet=theirs,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe = make_pipeline(controlnet=ours, **components)
    reference.set_progress_bar_config(disable=True)
    return reference, pipe


class TestStableDiffusion:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"guidance_scale": 1.0, "controlnet_conditioning_scale": [0.8, 0.3]},
            {"guess_mode": True, "controlnet_conditioning_scale": [1.0, 0.5]},
            {"guess_mode": True, "guidance_scale": 1.0},
            {"control_guidance_start": [0.0, 0.25], "control_guidance_end": [0.5, 1.0]},
        ],
        ids=str,
    )
    def test_same_images(self, pipelines, arguments):
        arguments = {
            "guidance_scale": 4.0,
            "negative_prompt": ["a green mat"] * 2,
            "num_inference_steps": 4,
            **arguments,
        }
        arguments["latents"] = torch.randn(2, 4, 8, 8, generator=seeded())
        images = [conditions(1, 16, 16, seed=1), conditions(2, 16, 16, seed=2)]
        # Of several images a ControlNet, they take one for each prompt; of one, a batch of one.
        expected, actual = (
            pipe(prompt=["a red cat", "the dog"], image=given, output_type="pt", **arguments).images
            for pipe, given in zip(pipelines, ([images[0].expand(2, -1, -1, -1), images[1]], images), strict=True)
        )
        assert actual.shape == (2, 3, 16, 16)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        base = base_of(pipelines[1])
        shared = {name: arguments[name] for name in ("guidance_scale", "negative_prompt", "num_inference_steps")}
        plain = base(["a red cat", "the dog"], output_type="pt", latents=arguments["latents"], **shared).images
        assert (plain - expected).abs().max() > 0.01

    def test_from_pipe(self, pipelines):
        """The base of diffusers' pipeline serves as it is; their ControlNets must be loaded as ours."""
        theirs, ours = pipelines
        pipe = ADMControlNetPipeline.from_pipe(theirs, classifier=None, controlnet=ours.controlnet)
        assert (pipe.unet, pipe.controlnet) == (theirs.unet, ours.controlnet)
        with pytest.raises(ValueError, match="holds, a ControlNetModel; pass an `AdaGNControlNetModel`"):
            ADMControlNetPipeline.from_pipe(theirs, classifier=None, controlnet=list(theirs.controlnet.nets))
        with pytest.raises(ValueError, match="holds, a MultiControlNetModel; pass an `AdaGNControlNetModel`"):
            ADMControlNetPipeline.from_pipe(theirs, classifier=None, controlnet=theirs.controlnet)

    def test_sizes_are_those_of_decoded_images(self, pipelines):
        message = "`image[1]` is 8 x 8 (height x width), but 16 x 16 are generated. Resize it, or pass `height=8` and"
        with pytest.raises(ValueError, match=re.escape(message)):
            pipelines[1]("a cat", [conditions(1, 16, 16), conditions(1)])

    def test_sizes_are_checked_before_the_first_step(self, one, monkeypatch):
        def begin(*args, **kwargs):
            raise RuntimeError("sampling began")

        monkeypatch.setattr(AdaGNControlNetModel, "forward", begin)
        call = {"class_labels": 1, "num_inference_steps": 2}
        message = "`image` is 16 x 8 .height x width., but 8 x 8 .*, or pass `height=16` and `width=8`"
        with pytest.raises(ValueError, match=message):
            one(image=conditions(1, 16, 8), **call)
        with pytest.raises(RuntimeError, match="sampling began"):
            one(image=conditions(1, 16, 8), height=16, width=8, **call)

    def test_a_controlnet_of_larger_images(self, monkeypatch):
        """As those of diffusers, which reduce their images, next to a network of pixels."""
        unet = random_unet(**CONDITIONAL)
        net = AdaGNControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(4, 8), conditioning_downsampling_factor=None
        )
        pipe, call = make_pipeline(controlnet=net, unet=unet), {"class_labels": 1, "num_inference_steps": 2}
        assert net.conditioning_factor == 2
        assert pipe(image=conditions(1, 16, 16), output_type="pt", **call).images.shape[2:] == (8, 8)
        message = (
            "8 x 8 are generated, for which this ControlNet takes images of 16 x 16. Resize it, or pass `height=4`"
        )
        with pytest.raises(ValueError, match=message):
            pipe(image=conditions(1, 8, 8), **call)


class TestImages:
    ARGUMENTS = {"class_labels": LABELS, "num_inference_steps": 2, "output_type": "latent"}

    def test_every_kind_of_input(self, one):
        tensor = conditions()
        arrays = tensor.permute(0, 2, 3, 1).numpy()
        integers = (arrays * 255).round().astype(np.uint8)
        pictures = [PIL.Image.fromarray(array) for array in integers]
        expected = one(image=tensor, generator=seeded(), **self.ARGUMENTS).images
        kinds = (arrays, integers, pictures, list(arrays), list(tensor), tuple(pictures), tensor.double())
        for image in kinds:
            assert rounding_errors(one(image=image, generator=seeded(), **self.ARGUMENTS).images, expected) <= SAMPLING
        assert (
            rounding_errors(one(image=tensor.flip(0), generator=seeded(), **self.ARGUMENTS).images, expected) > SAMPLING
        )

    def test_grey_pictures(self, one):
        """Edges are often drawn without colours."""
        grey = PIL.Image.fromarray((np.arange(64) % 2 * 255).astype(np.uint8).reshape(8, 8))
        expected = one(image=grey.convert("RGB"), generator=seeded(), **self.ARGUMENTS).images
        for image in (grey, grey.convert("1")):
            assert rounding_errors(one(image=image, generator=seeded(), **self.ARGUMENTS).images, expected) <= SAMPLING

    def test_other_numbers_of_channels(self):
        unet = random_unet(**CONDITIONAL)
        pipe = make_pipeline(unet, random_branch(unet, conditioning_channels=1))
        array = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
        images = [
            pipe(image=image, generator=seeded(), **self.ARGUMENTS).images
            for image in (array, torch.tensor(array)[None])
        ]
        assert rounding_errors(*images) <= SAMPLING
        with pytest.raises(ValueError, match=r"`image` has shape \(2, 3, 8, 8\); .* with 1 channels"):
            pipe(image=conditions(), **self.ARGUMENTS)

    def test_one_for_all_and_one_for_each(self, one, two):
        single, batch = conditions(1), conditions(2, seed=9)
        expected = one(image=single.repeat(2, 1, 1, 1), generator=seeded(), **self.ARGUMENTS).images
        for image in (single, single[0], [single[0]]):
            assert rounding_errors(one(image=image, generator=seeded(), **self.ARGUMENTS).images, expected) <= SAMPLING
        expected = two(image=[single.repeat(2, 1, 1, 1), batch], generator=seeded(), **self.ARGUMENTS).images
        for images in ([single, batch], (single[0], list(batch)), [[single[0]], batch]):
            assert rounding_errors(two(image=images, generator=seeded(), **self.ARGUMENTS).images, expected) <= SAMPLING
        assert (
            rounding_errors(two(image=[single, single], generator=seeded(), **self.ARGUMENTS).images, expected)
            > SAMPLING
        )

    def test_images_tell_the_number(self, one, two):
        arguments = {**self.ARGUMENTS, "class_labels": 1}
        assert len(one(image=conditions(3), **arguments).images) == 3
        assert len(one(image=conditions(1), batch_size=2, **arguments).images) == 2
        assert len(two(image=[conditions(1), conditions(3)], **arguments).images) == 3

    @pytest.mark.parametrize("sample_size, size, asked", [(None, (6, 10), {}), (8, (12, 8), {"height": 12})], ids=str)
    def test_size(self, sample_size, size, asked):
        pipe = make_pipeline(random_unet(sample_size=sample_size))
        images = pipe(image=conditions(2, *size), num_inference_steps=1, output_type="pt", **asked).images
        assert images.shape == (2, 3, *size)

    def test_output_types(self, one):
        arguments = {**self.ARGUMENTS, "generator": None}
        outputs = {}
        for kind in ("latent", "pt", "np", "pil"):
            arguments |= {"output_type": kind, "generator": seeded()}
            (outputs[kind],) = one(image=conditions(), return_dict=False, **arguments)
        assert rounding_errors(outputs["pt"], ((outputs["latent"] + 1) / 2).clamp(0, 1)) <= SAMPLING
        assert rounding_errors(outputs["np"], outputs["pt"].permute(0, 2, 3, 1)) <= SAMPLING
        assert [image.size for image in outputs["pil"]] == [(8, 8)] * 2


class TestDtype:
    def test_all_networks_compute_in_theirs(self):
        pipe = make_pipeline()
        expected = pipe(
            image=conditions(), class_labels=LABELS, num_inference_steps=3, generator=seeded(), output_type="pt"
        )
        pipe.to(torch.bfloat16)
        seen = record(pipe.unet)
        of_branch = record(pipe.controlnet)
        actual = pipe(
            image=conditions(), class_labels=LABELS, num_inference_steps=3, generator=seeded(), output_type="pt"
        )
        tensors = [
            *seen[0]["down_block_additional_residuals"],
            of_branch[0]["controlnet_cond_embeds"],
            of_branch[0]["sample"],
        ]
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
        assert actual.images.dtype == torch.float32
        assert (actual.images - expected.images).abs().mean() < 0.05  # a few roundings of 2**-8, amplified


class TestSaveAndLoad:
    def draw(self, pipe, number: int) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        images = [conditions(2, seed=seed) for seed in range(number)]
        arguments = {"class_labels": LABELS, "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "pt"}
        return pipe(image=images[0] if number == 1 else images, generator=seeded(), **arguments).images

    @pytest.mark.parametrize("cls", [ADMControlNetPipeline, DiffusionPipeline])
    @pytest.mark.parametrize("number", [1, 2])
    def test_round_trip(self, cls, number, tmp_path):
        unet = random_unet(**CONDITIONAL)
        nets = [random_branch(unet, 1), random_branch(unet, 2, width=0.5)][:number]
        pipe = make_pipeline(unet, nets[0] if number == 1 else nets)
        pipe.save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path, use_safetensors=True)
        assert type(loaded) is ADMControlNetPipeline
        assert type(loaded.controlnet) is (AdaGNControlNetModel if number == 1 else AdaGNMultiControlNetModel)
        assert not loaded.controlnet.training
        assert rounding_errors(self.draw(loaded, number), self.draw(pipe, number)) <= SAMPLING
        half = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {half.unet.dtype, *(p.dtype for p in half.controlnet.parameters())} == {torch.bfloat16}

    @pytest.mark.parametrize("number", [1, 2])
    def test_variant(self, number, tmp_path):
        unet = random_unet(**CONDITIONAL)
        nets = [random_branch(unet, seed) for seed in range(1, 3)]
        pipe = make_pipeline(unet, nets[0] if number == 1 else nets)
        pipe.save_pretrained(tmp_path, variant="ema")
        # Several are saved without one: diffusers looks for variants of a component in its folder alone.
        suffix = ".ema" if number == 1 else ""
        weights = {path.name for path in (tmp_path / "controlnet").rglob("*.safetensors")}
        assert weights == {f"diffusion_pytorch_model{suffix}.safetensors"}
        loaded = DiffusionPipeline.from_pretrained(tmp_path, variant="ema")
        assert rounding_errors(self.draw(loaded, number), self.draw(pipe, number)) <= SAMPLING

    @pytest.mark.parametrize("number", [1, 2])
    def test_beside_a_saved_base(self, number, tmp_path):
        unet = random_unet(**CONDITIONAL)
        nets = [random_branch(unet, seed) for seed in range(1, 3)]
        controlnet = nets[0] if number == 1 else nets
        pipe = make_pipeline(unet, controlnet)
        base = ADMPipeline(**base_of(pipe).components, id2label={0: "cat", 1: "dog"})
        base.save_pretrained(tmp_path)
        loaded = ADMControlNetPipeline.from_pretrained(tmp_path, controlnet=controlnet)
        assert loaded.id2label == {0: "cat", 1: "dog"}
        assert rounding_errors(self.draw(loaded, number), self.draw(pipe, number)) <= SAMPLING
        with pytest.raises(ValueError, match="expected .*controlnet.*, but only"):
            ADMControlNetPipeline.from_pretrained(tmp_path)

    @pytest.mark.parametrize("number", [1, 2])
    def test_from_pipe(self, number, caplog):
        unet = random_unet(**CONDITIONAL)
        nets = [random_branch(unet, seed) for seed in range(1, 3)]
        base = ADMPipeline(unet, LearnedVarianceDDPMScheduler(), **ABSENT, id2label={0: "cat"})
        pipe = ADMControlNetPipeline.from_pipe(base, controlnet=nets[0] if number == 1 else nets)
        assert pipe.unet is unet
        assert pipe.id2label == {0: "cat"}
        again = ADMControlNetPipeline.from_pipe(pipe)
        assert again.controlnet is pipe.controlnet
        back = ADMPipeline.from_pipe(pipe)
        assert back.unet is unet
        assert "controlnet" not in back.components
        assert not [r for r in caplog.records if r.name.startswith("diffusers.pipelines")]  # "is not switched over ..."
        assert rounding_errors(self.draw(again, number), self.draw(pipe, number)) <= SAMPLING

    def test_a_list_of_one(self, tmp_path):
        """Has a list of one for each argument, also when loaded."""
        pipe = make_pipeline()
        listed = make_pipeline(pipe.unet, [pipe.controlnet])
        listed.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        arguments = {"class_labels": LABELS, "num_inference_steps": 2, "output_type": "pt"}
        expected = pipe(image=conditions(), generator=seeded(), **arguments).images
        for several in (listed, loaded):
            actual = several(
                image=[conditions()], generator=seeded(), controlnet_conditioning_scale=[1.0], **arguments
            ).images
            assert rounding_errors(actual, expected) <= SAMPLING

    def test_no_component_of_the_constructor_has_a_default(self):
        """With one, `DiffusionPipeline.from_pretrained(..., controlnet=...)` would load the repository's all that."""
        parameters = inspect.signature(ADMControlNetPipeline.__init__).parameters
        assert list(parameters)[1:] == [
            *("unet", "scheduler", "vae", "text_encoder", "tokenizer", "classifier", "controlnet", "id2label"),
            "image_format",
        ]
        defaults = [name for name, p in parameters.items() if p.default is not p.empty]
        assert defaults == ["id2label", "image_format"]

    def test_components_given_to_the_base_class_win(self, tmp_path):
        pipe = make_pipeline()
        pipe.save_pretrained(tmp_path)
        other = random_branch(pipe.unet, 5)
        assert DiffusionPipeline.from_pretrained(tmp_path, controlnet=other).controlnet is other


class TestLora:
    def test_of_the_base(self, tmp_path):
        """Read by the base pipeline's methods, heard by the U-Net alone."""
        trained = random_unet(**CONDITIONAL)
        trained.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "conv1"]))
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape)
        ADMPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=get_peft_model_state_dict(trained),
            unet_lora_adapter_metadata=trained.peft_config["default"].to_dict(),
        )
        unet = random_unet(**CONDITIONAL)
        branch = random_branch(unet)
        pipe, fresh = make_pipeline(unet, branch), make_pipeline(unet, AdaGNControlNetModel.from_unet(unet))
        arguments = {"class_labels": LABELS, "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "pt"}

        def draw(pipeline):
            images = {} if type(pipeline) is ADMPipeline else {"image": conditions()}
            return pipeline(**images, generator=seeded(), **arguments).images

        plain, controlled = draw(base_of(pipe)), draw(pipe)
        weights = {name: weight.clone() for name, weight in branch.state_dict().items()}
        pipe.load_lora_weights(tmp_path, adapter_name="style")
        assert pipe.get_list_adapters() == {"unet": ["style"]}
        assert (draw(pipe) - controlled).abs().max() > 0.01
        assert rounding_errors(draw(fresh), draw(base_of(pipe))) <= SAMPLING
        assert (draw(fresh) - plain).abs().max() > 0.01
        assert all(torch.equal(weights[name], weight) for name, weight in branch.state_dict().items())
        pipe.unload_lora_weights()
        assert rounding_errors(draw(pipe), controlled) <= SAMPLING


class TestOffloading:
    def test_hooks_bring_each_network_to_the_device(self):
        """What a GPU would show: with hooks on the components, nothing reaches for a network but by its `forward`."""
        unet = random_unet(**CONDITIONAL)
        arguments = {"class_labels": LABELS, "num_inference_steps": 2, "output_type": "latent"}
        for controlnet, image in (
            (random_branch(unet), conditions()),
            ([random_branch(unet), random_branch(unet, 2)], [conditions()] * 2),
        ):
            pipe = make_pipeline(unet, controlnet)
            expected = pipe(image=image, generator=seeded(), **arguments).images
            pipe.enable_model_cpu_offload(device="cpu")
            # Like the classifier's, the ControlNet's hook sends no other network away: it takes turns with the U-Net.
            of_controlnet = pipe.controlnet._hf_hook
            assert of_controlnet.prev_module_hook is None
            assert pipe.unet._hf_hook.prev_module_hook is None
            assert rounding_errors(pipe(image=image, generator=seeded(), **arguments).images, expected) <= SAMPLING
            pipe.remove_all_hooks()


class TestBadInput:
    """Each is refused before a network is called."""

    def refused(self, pipe, message, **arguments):
        calls = [record(pipe.unet), record(pipe.controlnet)]
        with pytest.raises(ValueError, match=re.escape(message)):
            pipe(**arguments)
        assert calls == [[], []]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"image": None}, "`image` is a NoneType; pass a Pillow image"),
            ({"image": []}, "`image` is empty"),
            ({"image": "edges.png"}, "`image` is a str"),
            ({"image": conditions()[:, :1]}, "`image` has shape (2, 1, 8, 8); pass (channels, height, width)"),
            ({"image": torch.rand(4, 8, 8)}, "with 3 channels"),
            ({"image": 2 * conditions() - 1}, "`image` has values from -1 to "),
            ({"image": 255 * conditions()}, "they must lie in [0, 1]"),
            ({"image": PIL.Image.new("RGBA", (8, 8))}, "`image` has mode RGBA and transparent pixels"),
            ({"image": [conditions(1), conditions(1, 6, 6)]}, "`image` holds images of several sizes"),
            ({"image": [[conditions(1)], [conditions(1)]]}, "`image` is a list; pass a Pillow image"),
            ({"image": conditions(3), "class_labels": [1, 2]}, "`class_labels` holds 2, `image` holds 3"),
            ({"image": conditions(3), "batch_size": 2}, "`image` holds 3, `batch_size` is 2"),
            ({"image": conditions(), "generator": generators(3)}, "list of 3 for 2 images"),
            (
                {"controlnet_conditioning_scale": [1.0, 0.5]},
                "`controlnet_conditioning_scale` holds 2 entries, but this",
            ),
            ({"controlnet_conditioning_scale": float("nan")}, "`controlnet_conditioning_scale` is nan"),
            ({"controlnet_conditioning_scale": []}, "holds 0 entries, but this pipeline has 1 ControlNet. Pass a list"),
            ({"control_guidance_start": [0.0, 0.5]}, "`control_guidance_start` holds 2 entries, but this pipeline has"),
            ({"control_guidance_end": (0.5, 0.5)}, "`control_guidance_end` holds 2 entries, but this pipeline has 1 C"),
            (
                {"control_guidance_start": 0.6, "control_guidance_end": 0.4},
                "`control_guidance_start` is 0.6 and `control_guidance_end` is 0.4",
            ),
            ({"control_guidance_start": -0.1}, "`control_guidance_start` is -0.1 and `control_guidance_end` is 1.0"),
            ({"control_guidance_end": 1.5}, "`control_guidance_start` is 0.0 and `control_guidance_end` is 1.5"),
            ({"control_guidance_end": float("nan")}, "`control_guidance_end` is nan"),
            ({"guidance_scale": 2.0}, "no `class_labels` to guide towards"),
            ({"prompt": "a cat"}, "`prompt` was given, but this model is not conditioned on text"),
        ],
        ids=names_of,
    )
    def test_calls(self, one, arguments, message):
        self.refused(one, message, **{"image": conditions(1), **arguments})

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"image": conditions()}, "`image` is no list, but this pipeline has 2 ControlNets. Pass a list with one"),
            ({"image": [conditions(1)]}, "`image` holds 1 entries, but this pipeline has 2 ControlNets"),
            ({"image": [conditions(1)] * 3}, "`image` holds 3 entries, but this pipeline has 2 ControlNets"),
            ({"image": [conditions(1), conditions(1)[:, :2]]}, "`image[1]` has shape (1, 2, 8, 8)"),
            ({"image": [conditions(2), conditions(3)]}, "`image[0]` holds 2, `image[1]` holds 3"),
            ({"controlnet_conditioning_scale": [1.0]}, "holds 1 entries, but this pipeline has 2 ControlNets"),
            (
                {"control_guidance_start": [0.0] * 3},
                "`control_guidance_start` holds 3 entries, but this pipeline has 2",
            ),
            (
                {"control_guidance_start": [0.0, 0.8], "control_guidance_end": 0.5},
                "`control_guidance_start` is 0.8 and `control_guidance_end` is 0.5",
            ),
        ],
        ids=names_of,
    )
    def test_calls_of_two(self, two, arguments, message):
        self.refused(two, message, **{"image": [conditions(1)] * 2, **arguments})

    @pytest.mark.parametrize(
        "other, message",
        [
            ({"block_out_channels": (8, 24)}, "[8, 8, 8, 24, 24] here, [8, 8, 8, 16, 16] there"),
            ({"layers_per_block": 2}, "was made for another U-Net"),
            ({"num_class_embeds": 7, "null_class_id": 6}, "`num_class_embeds`: 7 here, 5 there"),
            ({"num_class_embeds": None, "null_class_id": None}, "`num_class_embeds`: None here, 5 there"),
            ({"in_channels": 4, "out_channels": 8}, "`in_channels`: 4 here, 3 there"),
        ],
        ids=names_of,
    )
    def test_a_branch_for_another_base(self, one, other, message):
        stranger = random_branch(random_unet(**{**CONDITIONAL, **other}))
        for controlnet in (stranger, [one.controlnet, stranger]):
            with pytest.raises(ValueError, match=re.escape(message)):
                make_pipeline(one.unet, controlnet)
        swapped = make_pipeline(one.unet, one.controlnet)
        swapped.controlnet = stranger
        self.refused(swapped, message, image=conditions(1))

    @pytest.mark.parametrize(
        "controlnet, message",
        [
            (None, "`controlnet` is, or holds, a NoneType; pass an `AdaGNControlNetModel`"),
            ([], "`controlnet` is an empty list"),
            ([None], "`controlnet` is, or holds, a NoneType"),
            (random_unet(), "`controlnet` is, or holds, a AdaGNUNet2DModel"),
        ],
        ids=["none", "no entries", "a list of none", "a U-Net"],
    )
    def test_what_is_no_branch(self, controlnet, message):
        components = {"scheduler": LearnedVarianceDDPMScheduler(), **ABSENT}
        with pytest.raises(ValueError, match=re.escape(message)):
            ADMControlNetPipeline(unet=random_unet(), controlnet=controlnet, **components)

    def test_what_is_no_branch_put_in_later(self, one):
        swapped = make_pipeline(one.unet, one.controlnet)
        swapped.controlnet = random_unet()
        self.refused(swapped, "`controlnet` is, or holds, a AdaGNUNet2DModel", image=conditions(1))

    def test_a_list_of_lists_of_branches(self, one, two):
        with pytest.raises(ValueError, match="holds, a AdaGNMultiControlNetModel"):
            make_pipeline(one.unet, [one.controlnet, two.controlnet])

    @pytest.mark.parametrize(
        "channels, of_their_own",
        [((6, 6), ADMSuperResolutionPipeline), ((6, 3), None), ((7, 6), ADMInpaintPipeline), ((7, 3), None)],
        ids=str,
    )
    def test_networks_that_take_more_than_a_sample(self, channels, of_their_own):
        """They have pipelines of their own."""
        unet = random_unet(in_channels=channels[0], out_channels=channels[1])
        branch = random_branch(unet)
        with pytest.raises(ValueError, match=f"`out_channels={channels[1]}`"):
            make_pipeline(unet, branch)
        if of_their_own is not None:
            make_pipeline(unet, cls=of_their_own, controlnet=branch)
        sample, image = torch.randn(1, channels[0], 8, 8), conditions(1)
        with torch.no_grad():
            down, middle = branch(sample, 5, controlnet_cond=image, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            assert rounding_errors(unet(sample, 5, **residuals).sample, unet(sample, 5).sample) > SAMPLING

    def test_a_network_of_diffusers_that_takes_no_residuals(self):
        unet = random_diffusers_unet()
        with pytest.raises(ValueError, match="`unet` is a UNet2DModel, which takes no residuals of a ControlNet"):
            make_pipeline(unet, AdaGNControlNetModel.from_unet(unet))


@pytest.mark.parametrize(
    ("docstring", "function"),
    [
        (ADMControlNetPipeline.__doc__, ADMControlNetPipeline.__init__),
        (ADMControlNetPipeline.__call__.__doc__, ADMControlNetPipeline.__call__),
    ],
)
def test_docstring_documents_the_arguments(docstring, function):
    check_documented_arguments(docstring, function)


def test_every_argument_of_the_base_is_there():
    own, base = (inspect.signature(cls.__call__).parameters for cls in (ADMControlNetPipeline, ADMPipeline))
    # Its `image` is the one to follow; from an image and with a ControlNet samples `ADMInpaintPipeline`.
    base = {name: parameter for name, parameter in base.items() if name not in ("image", "strength")}
    added = [name for name in own if name not in base]
    assert [name for name in base if name not in own] == []
    assert all(own[name].default == base[name].default for name in base if name != "self")
    assert added == [
        "image",
        "controlnet_conditioning_scale",
        "guess_mode",
        "control_guidance_start",
        "control_guidance_end",
    ]


class TestNoiseSchedule:
    """Of the ControlNets, against that of the scheduler."""

    LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}

    def net(self, unet, noise_schedule):
        net = random_branch(unet)
        net.register_to_config(noise_schedule=noise_schedule)
        return net

    def test_one(self, tmp_path):
        unet = random_unet(**CONDITIONAL)
        refused = (
            "`controlnet` was trained on the noise schedule squaredcos_cap_v2 with 1000 timesteps, but `scheduler`"
        )
        with pytest.raises(ValueError, match=refused):
            make_pipeline(unet, self.net(unet, self.COSINE))
        pipe = make_pipeline(unet, self.net(unet, self.LINEAR))
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        calls, arguments = count(unet), {"class_labels": LABELS, "num_inference_steps": 2, "output_type": "latent"}
        pipe(image=conditions(), **arguments)
        assert len(calls) == 2
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.03)
        with pytest.raises(ValueError, match="linear from 0.0001 to 0.02 with .* DDIMScheduler, .* 0.0001 to 0.03"):
            pipe(image=conditions(), **arguments)
        assert len(calls) == 2

        pipe.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="`controlnet` was trained on"):
            ADMControlNetPipeline.from_pretrained(tmp_path)
        loaded = ADMControlNetPipeline.from_pretrained(tmp_path, scheduler=LearnedVarianceDDPMScheduler())
        assert loaded.controlnet.config.noise_schedule == self.LINEAR

    def test_several(self):
        unet = random_unet(**CONDITIONAL)
        nets = [self.net(unet, schedule) for schedule in (self.LINEAR, self.COSINE)]
        with pytest.raises(ValueError, match=re.escape("ControlNet 1 (counted from 0) was trained on")):
            make_pipeline(unet, nets)
        nets[1].register_to_config(noise_schedule=self.LINEAR)
        make_pipeline(unet, nets)

    @pytest.mark.parametrize("is_foreign", [False, True])
    def test_one_that_does_not_say_it(self, caplog, tmp_path, is_foreign):
        unet = random_text_unet()
        net = random_branch(unet)
        if is_foreign:  # a file of diffusers, which knows no such entry
            theirs = random_diffusers_text_unet()
            ControlNetModel.from_unet(theirs, conditioning_embedding_out_channels=(4,)).save_pretrained(tmp_path)
            net = AdaGNControlNetModel.from_pretrained(tmp_path)
        pipe = make_pipeline(unet, net, **TEXT)
        for _ in range(2):
            pipe("a cat", image=conditions(1), num_inference_steps=1, output_type="latent")
            make_pipeline(unet, net, **TEXT)
        assert caplog.text.count("`controlnet` does not say which noise schedule it was trained on") == 1

    def test_its_config_loads_with_diffusers(self, tmp_path):
        """Which knows no such entry, but keeps it."""
        self.net(random_text_unet(), self.LINEAR).save_config(tmp_path / "ours")
        theirs = ControlNetModel.from_config(ControlNetModel.load_config(tmp_path / "ours"))
        theirs.save_pretrained(tmp_path / "theirs")
        assert AdaGNControlNetModel.from_pretrained(tmp_path / "theirs").config.noise_schedule == self.LINEAR
