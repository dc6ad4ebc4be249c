"""ADMPipeline with prompts: against loops written by hand, and what must not change an image."""

import logging
import re

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from tolerances import SAMPLING, rounding_errors
from toy_models import (
    CONDITIONAL,
    TEXT_CONFIGS,
    TEXT_WIDTH,
    random_diffusers_text_unet,
    random_text_encoder,
    random_text_unet,
    random_unet,
    toy_tokenizer,
)

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.text import TextConditioning, join_texts


ENCODERS = ("clip", "bert", "t5")
LONG = "the red dog with a green hat on the mat"  # as many tokens as fit


def make_pipeline(encoder="t5", kind="transformer", unet=None, scheduler=None, **config) -> ADMPipeline:
    pipe = ADMPipeline(
        unet=random_text_unet(kind, **config) if unet is None else unet,
        scheduler=LearnedVarianceDDPMScheduler() if scheduler is None else scheduler,
        vae=None,
        text_encoder=None if encoder is None else random_text_encoder(encoder),
        tokenizer=None if encoder is None else toy_tokenizer(encoder),
        classifier=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(number: int) -> list[torch.Generator]:
    return [seeded(seed) for seed in range(number)]


@torch.no_grad()
def states(pipe: ADMPipeline, prompt: str) -> torch.Tensor:
    """One prompt without any padding that a mask would have to hide."""
    tokenizer = pipe.tokenizer
    is_clip = pipe.text_encoder.config.model_type.startswith("clip")
    padding = {"padding": "max_length", "max_length": tokenizer.model_max_length} if is_clip else {}
    input_ids = tokenizer(prompt, return_tensors="pt", **padding)["input_ids"]
    return pipe.text_encoder(input_ids).last_hidden_state


class Recorder:
    """What a network of a pipeline was called with."""

    def __init__(self, module: torch.nn.Module):
        self.calls = []
        module.register_forward_pre_hook(lambda _, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True)

    @property
    def labels(self) -> list:
        return [kwargs["class_labels"].tolist() for _, kwargs in self.calls]

    @property
    def texts(self) -> list[int]:
        return [len(kwargs["encoder_hidden_states"]) for _, kwargs in self.calls]


ARGUMENTS = {"num_inference_steps": 4, "eta": 0.0, "output_type": "latent"}


class TestSampling:
    @torch.no_grad()
    def loop(self, pipe: ADMPipeline, cond: dict, uncond: dict, scale: float) -> torch.Tensor:
        """One image, ancestral steps, two passes of its own in each; the formula in float64."""
        scheduler, generator = LearnedVarianceDDPMScheduler(), seeded()
        scheduler.set_timesteps(3)
        sample = torch.randn((1, 3, 8, 8), generator=generator)
        for t in scheduler.timesteps:
            output, null = (pipe.unet(sample, t, **kwargs).sample.double() for kwargs in (cond, uncond))
            mean = null[:, :3] + scale * (output[:, :3] - null[:, :3])
            output = torch.cat([mean, output[:, 3:]], dim=1).float()
            sample = scheduler.step(output, t, sample, generator=generator).prev_sample
        return sample

    @pytest.mark.parametrize("kind", TEXT_CONFIGS)
    @pytest.mark.parametrize("encoder", ENCODERS)
    def test_equals_a_loop_written_by_hand(self, encoder, kind):
        pipe = make_pipeline(encoder, kind)
        texts = {text: {"encoder_hidden_states": states(pipe, text)} for text in ("a red cat", "", "a dog", "a mat")}
        for scale, negative in ((1.0, None), (3.0, "a mat")):
            actual = pipe(
                "a red cat",
                negative_prompt=negative,
                guidance_scale=scale,
                num_inference_steps=3,
                generator=seeded(),
                output_type="latent",
            ).images
            expected = self.loop(pipe, texts["a red cat"], texts[negative or ""], scale)
            # The first of these steps multiplies errors by 157, guidance by 3.
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
            assert (self.loop(pipe, texts["a dog"], texts[""], scale) - expected).abs().max() > 0.03

    @pytest.mark.parametrize("null_class_id", [4, None])
    def test_class_and_text(self, null_class_id):
        """Without them there are the null class, if there is one, and the empty prompt."""
        pipe = make_pipeline(num_class_embeds=5, null_class_id=null_class_id)
        label, null = torch.tensor([1]), torch.tensor([1 if null_class_id is None else null_class_id])
        cond = {"class_labels": label, "encoder_hidden_states": states(pipe, "a cat")}
        uncond = {"class_labels": null, "encoder_hidden_states": states(pipe, "")}
        recorder = Recorder(pipe.unet)
        arguments = {"num_inference_steps": 3, "output_type": "latent"}
        actual = pipe("a cat", class_labels=1, guidance_scale=3.0, generator=seeded(), **arguments).images
        assert recorder.labels == [[int(null), 1]] * 3
        torch.testing.assert_close(actual, self.loop(pipe, cond, uncond, 3.0), rtol=1e-3, atol=1e-3)

    def test_the_class_alone_guides_as_well(self):
        pipe = make_pipeline(**CONDITIONAL)
        recorder = Recorder(pipe.unet)
        pipe(class_labels=1, guidance_scale=3.0, **ARGUMENTS)
        pipe("a cat", guidance_scale=3.0, **ARGUMENTS)
        assert recorder.calls[0][1]["class_labels"].tolist() == [4, 1]
        assert "class_labels" not in recorder.calls[-1][1]  # the null class

    @pytest.mark.parametrize("kind", TEXT_CONFIGS)
    def test_networks_of_diffusers(self, kind):
        theirs = random_diffusers_text_unet(kind)
        ours = AdaGNUNet2DModel.from_config(theirs.config)
        ours.load_state_dict(theirs.state_dict())
        arguments = {"prompt": ["a cat", LONG], "guidance_scale": 2.0, **ARGUMENTS}
        actual, expected = (
            make_pipeline(kind=kind, unet=unet)(generator=generators(2), **arguments).images for unet in (theirs, ours)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)

    def test_nothing_in_the_loop_waits_for_the_device(self):
        pipe = make_pipeline(**CONDITIONAL).to("meta")
        # Encoders of transformers look whether a mask hides anything, once before the loop.
        text = {"prompt_embeds": torch.zeros(2, 3, TEXT_WIDTH), "negative_prompt_embeds": torch.zeros(2, 4, TEXT_WIDTH)}
        images = pipe(**text, class_labels=[1, 2], guidance_scale=2.0, num_inference_steps=3, output_type="pt").images
        assert images.shape == (2, 3, 8, 8)


class TestBatches:
    @pytest.mark.parametrize("kind", TEXT_CONFIGS)
    @pytest.mark.parametrize("encoder", ENCODERS)
    def test_padding_never_changes_an_image(self, encoder, kind):
        """Each prompt alone, and beside longer ones. Pixels in [0, 1]."""
        pipe = make_pipeline(encoder, kind)
        arguments = {"guidance_scale": 3.0, "num_inference_steps": 3, "output_type": "pt"}
        prompts = ["a cat", "", LONG]
        batch = pipe(prompts, generator=generators(3), **arguments).images
        for i, prompt in enumerate(prompts):
            (single,) = pipe(prompt, generator=seeded(i), **arguments).images
            torch.testing.assert_close(batch[i], single, rtol=0, atol=1e-4)

    def test_what_the_masks_prevent(self, monkeypatch):
        """The wrong version: states of padding are seen."""
        pipe = make_pipeline("t5")
        arguments = {"num_inference_steps": 4, "output_type": "pt"}
        expected = pipe("a cat", generator=seeded(0), **arguments).images[0]
        pipe.unet.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "encoder_attention_mask": None}), with_kwargs=True
        )
        wrong = pipe(["a cat", LONG], generator=generators(2), **arguments).images[0]
        assert (wrong - expected).abs().max() > 0.01

    def test_the_text_encoder_runs_once_a_call(self):
        pipe = make_pipeline()
        encoder, unet = Recorder(pipe.text_encoder), Recorder(pipe.unet)
        pipe(["a cat", "a dog", "a cat"], negative_prompt=["", "a dog", ""], guidance_scale=2.0, **ARGUMENTS)
        ((input_ids,), _), *others = encoder.calls
        assert others == []
        assert pipe.tokenizer.batch_decode(input_ids, skip_special_tokens=True) == ["a cat", "a dog", ""]
        assert unet.texts == [6] * 4  # both passes are one batch

    def test_without_guidance_there_is_one_pass(self):
        pipe = make_pipeline()
        encoder, unet = Recorder(pipe.text_encoder), Recorder(pipe.unet)
        pipe(["a cat", "a dog"], **ARGUMENTS)
        assert len(encoder.calls) == 1
        assert unet.texts == [2] * 4

    @pytest.mark.parametrize("start, end, passes", [(0.0, 1.0, [2, 2, 2, 2]), (0.25, 0.75, [1, 2, 2, 1])])
    def test_interval(self, start, end, passes):
        pipe = make_pipeline()
        recorder = Recorder(pipe.unet)
        pipe("a cat", guidance_scale=2.0, guidance_start=start, guidance_end=end, **ARGUMENTS)
        assert recorder.texts == passes
        for _, kwargs in recorder.calls:
            torch.testing.assert_close(kwargs["encoder_hidden_states"][-1:, :3], states(pipe, "a cat"))

    def test_no_prompt_is_the_empty_prompt(self):
        pipe = make_pipeline()
        actual, expected = (pipe(p, batch_size=2, generator=seeded(), **ARGUMENTS).images for p in (None, ""))
        assert rounding_errors(actual, expected) <= SAMPLING

    def test_one_prompt_for_all_images(self):
        pipe = make_pipeline(**CONDITIONAL)
        expected = pipe(["a cat"] * 2, class_labels=[1, 2], generator=generators(2), **ARGUMENTS).images
        actual = pipe("a cat", class_labels=[1, 2], generator=generators(2), **ARGUMENTS).images
        assert rounding_errors(actual, expected) <= SAMPLING
        actual = pipe(["a cat"] * 2, class_labels=1, batch_size=2, generator=generators(2), **ARGUMENTS).images
        assert rounding_errors(actual[:1], expected[:1]) <= SAMPLING

    def test_several_images_of_each_prompt(self):
        pipe = make_pipeline()
        arguments = {"guidance_scale": 2.0, "negative_prompt": ["a mat", "a hat"], **ARGUMENTS}
        actual = pipe(["a cat", LONG], num_images_per_prompt=2, generator=generators(4), **arguments).images
        arguments["negative_prompt"] = ["a mat", "a mat", "a hat", "a hat"]
        expected = pipe(["a cat", "a cat", LONG, LONG], generator=generators(4), **arguments).images
        assert rounding_errors(actual, expected) <= SAMPLING

    def test_a_prompt_that_is_too_long_is_cut_with_a_warning(self, caplog):
        pipe = make_pipeline("bert")
        with caplog.at_level(logging.WARNING):
            images = pipe(f"{LONG} red cat", generator=seeded(), **ARGUMENTS).images
        assert "it is cut off: 'red cat'" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert rounding_errors(images, pipe(LONG, generator=seeded(), **ARGUMENTS).images) <= SAMPLING
        assert caplog.text == ""

    def test_guidance_switched_on_by_a_callback(self):
        pipe = make_pipeline()

        def callback(pipeline, step, timestep, kwargs):
            pipeline.guidance_scale = 2.0
            return kwargs

        actual = pipe("a cat", callback_on_step_end=callback, generator=seeded(), **ARGUMENTS).images
        expected = pipe("a cat", guidance_scale=2.0, guidance_start=0.2, generator=seeded(), **ARGUMENTS).images
        assert rounding_errors(actual, expected) <= SAMPLING


class TestEmbeddings:
    def embeds(self, pipe: ADMPipeline, *prompts) -> dict:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        names += ("prompt_attention_mask", "negative_prompt_attention_mask")
        return dict(zip(names, pipe.encode_prompt(*prompts), strict=True))

    @pytest.mark.parametrize("encoder", ENCODERS)
    def test_equal_prompts(self, encoder):
        pipe = make_pipeline(encoder)
        arguments = {"guidance_scale": 2.0, **ARGUMENTS}
        expected = pipe(["a cat", LONG], negative_prompt="a dog", generator=generators(2), **arguments).images
        embeds = self.embeds(pipe, ["a cat", LONG], "a dog")
        pipe.text_encoder = None
        actual = pipe(**embeds, generator=generators(2), **arguments).images
        # With gradients on, PyTorch may compute attention in another order.
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)

    def test_pooled(self):
        """The vector of the first token of BERT is added to the time embedding."""
        pipe = make_pipeline(
            "bert", block_out_channels=(4, 16), addition_embed_type="text_embeds", time_embedding_dim=TEXT_WIDTH
        )
        arguments = {"guidance_scale": 2.0, "generator": None, **ARGUMENTS}
        arguments["latents"] = torch.randn(1, 3, 8, 8, generator=seeded())
        expected = pipe("a cat", **arguments).images
        embeds = self.embeds(pipe, "a cat")
        assert rounding_errors(pipe(**embeds, **arguments).images, expected) <= SAMPLING
        embeds["pooled_prompt_embeds"] = embeds["pooled_prompt_embeds"] + 1
        assert rounding_errors(pipe(**embeds, **arguments).images, expected) > SAMPLING

    def test_of_another_length_than_the_negative_ones(self):
        pipe = make_pipeline("t5")
        arguments = {"guidance_scale": 2.0, **ARGUMENTS}
        expected = pipe(LONG, negative_prompt="a dog", generator=seeded(), **arguments).images
        given = {"prompt_embeds": states(pipe, LONG), "negative_prompt_embeds": states(pipe, "a dog")}
        actual = pipe(**given, generator=seeded(), **arguments).images
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
        # One of them beside the other's text.
        for name, prompt in (("prompt_embeds", "negative_prompt"), ("negative_prompt_embeds", "prompt")):
            text = {"negative_prompt": "a dog", "prompt": LONG}[prompt]
            actual = pipe(**{name: given[name], prompt: text}, generator=seeded(), **arguments).images
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)

    def test_the_text_encoder_rests_where_it_is_not_needed(self):
        pipe = make_pipeline()
        embeds = states(pipe, "a cat")
        recorder = Recorder(pipe.text_encoder)
        pipe(prompt_embeds=embeds, **ARGUMENTS)
        assert recorder.calls == []
        pipe(prompt_embeds=embeds, guidance_scale=2.0, **ARGUMENTS)
        assert len(recorder.calls) == 1

    def test_join(self):
        short = TextConditioning(torch.ones(1, 2, 3), None, None)
        long = TextConditioning(torch.ones(2, 4, 3), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), None)
        joined = join_texts(short, long)
        assert joined.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
        assert joined.hidden_states[0, :, 0].tolist() == [1, 1, 0, 0]
        assert join_texts(short, short).attention_mask is None


class TestSaveAndLoad:
    ARGUMENTS = {"prompt": ["a cat", LONG], "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "pt"}

    @pytest.mark.parametrize("encoder", ENCODERS)
    def test_round_trip(self, tmp_path, encoder):
        pipe = make_pipeline(encoder)
        expected = pipe(generator=generators(2), **self.ARGUMENTS).images
        pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is ADMPipeline
        assert type(loaded.text_encoder) is type(pipe.text_encoder)
        assert rounding_errors(loaded(generator=generators(2), **self.ARGUMENTS).images, expected) <= SAMPLING
        again = ADMPipeline.from_pipe(loaded)
        assert again.text_encoder is loaded.text_encoder
        assert again.tokenizer is loaded.tokenizer

    def test_without_the_text_encoder(self, tmp_path):
        make_pipeline().save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path, text_encoder=None)
        assert loaded.text_encoder is None
        with pytest.raises(ValueError, match="has no text encoder"):
            loaded("a cat")

    def test_half_precision(self, tmp_path):
        pipe = make_pipeline()
        pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.text_encoder.dtype == loaded.unet.dtype == torch.bfloat16
        arguments = {**self.ARGUMENTS, "output_type": "latent"}
        actual, expected = (p(generator=generators(2), **arguments).images for p in (loaded, pipe))
        unguided = pipe(generator=generators(2), **{**arguments, "guidance_scale": 1.0}).images
        # Roundings (2**-8) are far below what guidance does.
        assert (actual - expected).abs().mean() < 0.2 * (unguided - expected).abs().mean()


class TestBadInput:
    """Each is refused before a network is called."""

    def refused(self, pipe: ADMPipeline, message: str, **kwargs) -> None:
        recorders = [Recorder(module) for module in (pipe.unet, pipe.text_encoder) if module is not None]
        with pytest.raises(ValueError, match=re.escape(message)):
            pipe(**kwargs)
        assert all(recorder.calls == [] for recorder in recorders)

    EMBEDS, MASK = torch.zeros(1, 3, TEXT_WIDTH), torch.ones(1, 2)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"prompt": "a", "prompt_embeds": EMBEDS}, "Both `prompt` and `prompt_embeds` were given"),
            (
                {"prompt": "a", "negative_prompt": "a", "negative_prompt_embeds": EMBEDS},
                "Both `negative_prompt` and `negative_prompt_embeds`",
            ),
            ({"prompt": []}, "`prompt` is []"),
            (
                {"prompt": ["a", "b"], "negative_prompt": ["a"] * 3},
                "`negative_prompt` holds 3 prompts, but there are 2 of `prompt`",
            ),
            ({"prompt": ["a", "b"], "batch_size": 3}, "`prompt` holds 2, `batch_size` is 3"),
            ({"prompt": "a", "prompt_attention_mask": MASK}, "belong to `prompt_embeds`, which is missing"),
            ({"prompt_embeds": EMBEDS, "pooled_prompt_embeds": torch.zeros(1, 4)}, "but this U-Net takes none"),
            ({"guidance_scale": 2.0}, "there are no `prompt` to guide towards"),
            ({"prompt": "a", "class_labels": 1}, "this model is unconditional"),
        ],
        ids=lambda value: None if isinstance(value, str) else ",".join(value),
    )
    def test_arguments(self, kwargs, message):
        self.refused(make_pipeline(), message, **kwargs)

    def test_number_of_labels_and_prompts(self):
        self.refused(
            make_pipeline(**CONDITIONAL),
            "`class_labels` holds 3, `prompt` holds 2",
            prompt=["a", "b"],
            class_labels=[1, 2, 3],
        )

    def test_guidance_towards_nothing(self):
        message = "there are no `class_labels` and no `prompt` to guide towards"
        self.refused(make_pipeline(**CONDITIONAL), message, guidance_scale=2.0)

    def test_no_text_encoder(self):
        pipe = make_pipeline(None)
        message = "This pipeline has no text encoder and tokenizer"
        for call in ({"prompt": "a cat"}, {}, {"prompt_embeds": self.EMBEDS, "guidance_scale": 2.0}):
            self.refused(pipe, message, **call)
        with pytest.raises(ValueError, match="no text encoder and tokenizer"):
            pipe.encode_prompt("a cat")

    def test_encode_prompt(self):
        with pytest.raises(ValueError, match="`negative_prompt` holds 2 prompts, but there are 1 of `prompt`"):
            make_pipeline().encode_prompt("a cat", ["", ""])

    def test_pooled_embeddings_are_missing(self):
        pipe = make_pipeline(
            "bert", block_out_channels=(4, 16), addition_embed_type="text_embeds", time_embedding_dim=TEXT_WIDTH
        )
        self.refused(pipe, "`unet` adds a pooled text to its time embedding", prompt_embeds=self.EMBEDS)

    @pytest.mark.parametrize(
        "components, message",
        [
            ({"text_encoder": random_text_encoder("t5", width=24)}, "states of width 24, but `unet` takes 16"),
            ({"tokenizer": None}, "without a `tokenizer`"),
            ({"unet": random_unet()}, "`unet` has no cross-attention"),
        ],
        ids=lambda value: None if isinstance(value, str) else ",".join(value),
    )
    def test_components(self, components, message):
        pipe = make_pipeline()
        with pytest.raises(ValueError, match=message):
            ADMPipeline(**{**pipe.components, **components})

    def test_a_component_that_was_swapped(self):
        pipe = make_pipeline()
        pipe.text_encoder = random_text_encoder("t5", width=24)
        self.refused(pipe, "states of width 24, but `unet` takes 16", prompt="a cat")


def test_a_scheduler_of_diffusers():
    """Text in both passes, with a swapped-in scheduler, is the same as with ours."""
    pipe = make_pipeline(scheduler=LearnedVarianceDDPMScheduler(clip_sample=False))
    arguments = {"prompt": ["a cat", "a dog"], "guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "latent"}
    ours = pipe(eta=0.0, generator=seeded(), **arguments).images
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    theirs = pipe(generator=seeded(), **arguments).images
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * ours.abs().max().item())
