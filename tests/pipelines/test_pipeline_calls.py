"""
What a call of a pipeline keeps for itself: several threads, calls inside of calls, and the pipeline afterwards. What it
checks before its first step, and what it tells of arguments without effect.
"""

import copy
import logging
import re
import threading
from collections import deque

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from diffusers_samplers import SAMPLERS, as_parameters
from tolerances import SAMPLING, rounding_errors
from toy_models import (
    CONDITIONAL,
    fill_randomly,
    random_classifier,
    random_text_encoder,
    random_text_unet,
    random_unet,
    toy_tokenizer,
)

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conditioning.text import tokenize


OURS = "LearnedVarianceDDPMScheduler"
EACH = as_parameters([(OURS, {}), *SAMPLERS])
CHAIN = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2}
TIMEOUT = 60  # seconds


def make_pipeline(cls=ADMPipeline, scheduler=None, unet=None, **components) -> ADMPipeline:
    pipe = cls(
        unet=random_unet(**CONDITIONAL) if unet is None else unet,
        scheduler=LearnedVarianceDDPMScheduler(**CHAIN) if scheduler is None else scheduler,
        **{"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None, **components},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Turns:
    """Hands the turn from one thread to the next, in a fixed order, so that every run interleaves in the same way."""

    def __init__(self, names):
        self.names, self.condition = deque(names), threading.Condition()

    def wait(self, name):
        with self.condition:
            assert self.condition.wait_for(lambda: self.names[0] == name, timeout=TIMEOUT)

    def pass_on(self, name):
        with self.condition:
            self.names.rotate(-1)
            self.condition.notify_all()
        self.wait(name)

    def leave(self, name):
        with self.condition:
            self.names.remove(name)
            self.condition.notify_all()


def draw(pipe, call: dict, then=None) -> torch.Tensor:
    """The samples of one call; `then` runs at the end of each step, after the call's own callback."""
    call = {"generator": seeded(), "output_type": "latent", **call}
    own = call.pop("callback_on_step_end", None)

    def callback(pipeline, step, timestep, kwargs):
        kwargs = kwargs if own is None else own(pipeline, step, timestep, kwargs)
        if then is not None:
            then()
        return kwargs

    call["generator"] = seeded(call.pop("seed", 0))
    return pipe(callback_on_step_end=callback, **call).images


def draw_in_turn(pipe, calls: list[dict]) -> list[torch.Tensor]:
    """Each call in a thread of its own, one step of each at a time."""
    turns, results, errors = Turns(range(len(calls))), [None] * len(calls), []

    def work(number, call):
        turns.wait(number)
        try:
            results[number] = draw(pipe, call, then=lambda: turns.pass_on(number))
        except BaseException as error:
            errors.append(error)
        finally:
            turns.leave(number)

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    if errors:
        raise errors[0]
    return results


def check_in_turn(pipe, calls: list[dict]) -> None:
    expected = [draw(pipe, call) for call in calls]
    # The calls differ by far more than the tolerance, so that one which took another's state is found.
    assert all((one - other).abs().max() > 0.01 for one, other in zip(expected, expected[1:], strict=False))
    for actual, alone in zip(draw_in_turn(pipe, calls), expected, strict=True):
        # The same operations on the same numbers; but the last bits of a matrix product depend on where its operands
        # lie in memory, and steps close to the noise multiply what differs.
        torch.testing.assert_close(actual, alone, rtol=1e-3, atol=1e-3)


class TestThreads:
    """Steps of two or three calls alternate; each call gives what it gives alone."""

    def test_guidance(self):
        calls = [{"class_labels": 1, "guidance_scale": scale, "num_inference_steps": 4} for scale in (1.0, 4.0, 2.0)]
        check_in_turn(make_pipeline(), calls)

    @pytest.mark.parametrize("name, options", EACH)
    def test_each_scheduler_with_other_steps(self, name, options):
        pipe = make_pipeline()
        if name != OURS:
            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
        check_in_turn(pipe, [{"num_inference_steps": steps, "seed": steps} for steps in (5, 8)])

    def test_our_scheduler_by_other_steps_and_eta(self):
        calls = [{"timestep_respacing": "3,2"}, {"eta": 0.0, "num_inference_steps": 7}, {"eta": 0.5}]
        check_in_turn(make_pipeline(), [{"num_inference_steps": 50, **call} for call in calls[:1]] + calls[1:2])
        check_in_turn(make_pipeline(), [{"num_inference_steps": 6, **call} for call in calls[1:]][::-1])

    @pytest.mark.parametrize("scheduler", [None, DPMSolverMultistepScheduler(**CHAIN)], ids=["ours", "solver"])
    def test_inpainting(self, scheduler):
        pipe = make_pipeline(ADMInpaintPipeline, scheduler)
        image = torch.rand(3, 8, 8, generator=seeded(5))
        mask = torch.zeros(8, 8)
        mask[2:6, 2:7] = 1
        calls = [{"strength": 0.5, "num_inference_steps": 6}, {"num_inference_steps": 9, "guidance_scale": 3.0}]
        if scheduler is None:
            calls[1] |= {"jump_length": 3, "jump_n_sample": 2}
        check_in_turn(pipe, [{"image": image, "mask_image": mask, "class_labels": 1, **call} for call in calls])

    def test_super_resolution(self):
        unet = random_unet(in_channels=6, out_channels=6, time_cond_proj_dim=6, **CONDITIONAL)
        pipe = make_pipeline(ADMSuperResolutionPipeline, DPMSolverMultistepScheduler(**CHAIN), unet)
        image = torch.rand(1, 3, 4, 4, generator=seeded(5))
        calls = [{"noise_level": 30, "num_inference_steps": 4}, {"num_inference_steps": 7, "guidance_scale": 3.0}]
        check_in_turn(pipe, [{"image": image, "class_labels": 1, **call} for call in calls])

    def test_controlnet(self):
        unet = random_unet(**CONDITIONAL)
        net = fill_randomly(AdaGNControlNetModel.from_unet(unet), seed=1)
        pipe = make_pipeline(ADMControlNetPipeline, DPMSolverMultistepScheduler(**CHAIN), unet, controlnet=net)
        image = torch.rand(1, 3, 8, 8, generator=seeded(5))
        calls = [
            {"controlnet_conditioning_scale": 0.5, "num_inference_steps": 4},
            {"num_inference_steps": 7, "guidance_scale": 3.0, "guess_mode": True},
        ]
        check_in_turn(pipe, [{"image": image, "class_labels": 1, **call} for call in calls])

    def test_prompts(self):
        """A call with guidance encodes the empty prompt, and one without need not."""
        text = {"text_encoder": random_text_encoder("bert"), "tokenizer": toy_tokenizer("bert")}
        pipe = make_pipeline(unet=random_text_unet(), **text)
        calls = [{"prompt": "a red cat"}, {"prompt": "the dog on the mat", "guidance_scale": 3.0}]
        check_in_turn(pipe, [{"num_inference_steps": 4, **call} for call in calls])


def test_tokenizers_are_asked_by_one_thread_at_a_time():
    """They keep truncation and padding as a state: without a lock they fail ("Already borrowed"), or mix them up."""
    tokenizer = toy_tokenizer("bert", max_length=64)
    prompts = ["the red dog " * 20, "a cat"]
    options = {"pad_to_max": True, "warn": False}
    expected = {length: tokenize(tokenizer, prompts, max_length=length, **options) for length in (9, 40)}
    wrong = []

    def work(length):
        for _ in range(300):
            try:
                ids, _ = tokenize(tokenizer, prompts, max_length=length, **options)
            except RuntimeError as error:
                return wrong.append(error)
            if not torch.equal(ids, expected[length][0]):
                return wrong.append(ids.shape)
        return None

    threads = [threading.Thread(target=work, args=(length,)) for length in (9, 40) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert wrong == []


class TestSteering:
    """By a callback: what it sets is for the call that it belongs to."""

    STEPS = {"class_labels": 1, "num_inference_steps": 4}

    # The second is what callbacks written for pipelines of diffusers set.
    @pytest.mark.parametrize("name", ["guidance_scale", "_guidance_scale"])
    def test_guidance_of_one_call_among_others(self, name):
        seen = {1.0: [], 3.0: []}

        def add(amount):
            def callback(pipeline, step, timestep, kwargs):
                seen[amount].append(pipeline.guidance_scale)
                setattr(pipeline, name, getattr(pipeline, name) + amount)
                return kwargs

            return callback

        calls = [{"callback_on_step_end": add(amount), "guidance_scale": 2.0, **self.STEPS} for amount in seen]
        check_in_turn(make_pipeline(), [*calls, self.STEPS])
        assert seen == {1.0: [2.0, 3.0, 4.0, 5.0] * 2, 3.0: [2.0, 5.0, 8.0, 11.0] * 2}

    def test_interruption_of_one_call_among_others(self):
        pipe, steps = make_pipeline(), {"one": 0, "other": 0}

        def count(name, last=None):
            def callback(pipeline, step, timestep, kwargs):
                steps[name] += 1
                assert not pipeline.interrupt
                pipeline._interrupt = step == last
                return kwargs

            return callback

        stopped, whole = draw_in_turn(
            pipe,
            [
                {"callback_on_step_end": count("one", last=1), "num_inference_steps": 5},
                {"callback_on_step_end": count("other"), "num_inference_steps": 4},
            ],
        )
        assert steps == {"one": 2, "other": 4}
        assert stopped.shape == whole.shape
        # As alone, up to the last bits of matrix products, which depend on where their operands lie in memory.
        torch.testing.assert_close(whole, draw(pipe, {"num_inference_steps": 4}), rtol=1e-3, atol=1e-3)

    def test_number_of_steps(self):
        pipe, seen = make_pipeline(), []

        def callback(pipeline, step, timestep, kwargs):
            seen.append(pipeline.num_timesteps)
            return kwargs

        draw_in_turn(pipe, [{"callback_on_step_end": callback, "num_inference_steps": steps} for steps in (3, 5)])
        assert seen == [3, 5, 3, 5, 3, 5, 5, 5]
        assert pipe.num_timesteps == 5

    def test_from_another_thread_for_the_latest_call(self):
        """For example by a button that stops the sampling."""
        pipe, steps = make_pipeline(), []

        def callback(pipeline, step, timestep, kwargs):
            steps.append(pipeline.guidance_scale)
            if step == 1:
                button = threading.Thread(target=press)
                button.start()
                button.join(TIMEOUT)
            return kwargs

        def press():
            assert pipe.guidance_scale == 2.0
            pipe._interrupt = True

        draw(pipe, {"callback_on_step_end": callback, "guidance_scale": 2.0, **self.STEPS})
        assert steps == [2.0, 2.0]
        assert pipe.interrupt
        draw(pipe, self.STEPS)
        assert not pipe.interrupt

    def test_forward_hooks_see_the_call_that_runs_them(self):
        pipe, seen = make_pipeline(), {}
        pipe.unet.register_forward_pre_hook(
            lambda module, args: seen.setdefault(threading.get_ident(), set()).add(pipe.guidance_scale)
        )
        draw_in_turn(pipe, [{"guidance_scale": scale, **self.STEPS} for scale in (2.0, 3.0)])
        assert sorted(map(tuple, seen.values())) == [(2.0,), (3.0,)]

    @pytest.mark.parametrize("other_pipeline", [False, True], ids=["of the same pipeline", "of another one"])
    def test_a_call_inside_of_a_call(self, other_pipeline):
        pipe = make_pipeline()
        inner_pipe = make_pipeline() if other_pipeline else pipe
        inner = {"class_labels": 2, "guidance_scale": 5.0, "num_inference_steps": 3}
        inner_alone, outer_alone = draw(inner_pipe, inner), draw(pipe, {"guidance_scale": 2.0, **self.STEPS})
        previews = []

        def callback(pipeline, step, timestep, kwargs):
            if step == 1:
                previews.append(draw(inner_pipe, inner))
            assert (pipeline.guidance_scale, pipeline.num_timesteps) == (2.0, 4)
            return kwargs

        outer = draw(pipe, {"callback_on_step_end": callback, "guidance_scale": 2.0, **self.STEPS})
        # As above: the last bits of matrix products depend on where their operands lie in memory.
        torch.testing.assert_close(outer, outer_alone, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(previews[0], inner_alone, rtol=1e-3, atol=1e-3)

    def test_the_outer_call_from_within_an_inner_one(self):
        """Each pipeline has its own latest call: one set from within another pipeline's callback is the right one."""
        outer, inner = make_pipeline(), make_pipeline()

        def stop_outer(pipeline, step, timestep, kwargs):
            outer._interrupt = True
            return kwargs

        steps = []

        def callback(pipeline, step, timestep, kwargs):
            steps.append(step)
            draw(inner, {"callback_on_step_end": stop_outer, **self.STEPS})
            assert not inner.interrupt
            return kwargs

        draw(outer, {"callback_on_step_end": callback, **self.STEPS})
        assert steps == [0]


def state_of(scheduler) -> dict:
    return {name: copy.deepcopy(value) for name, value in vars(scheduler).items()}


class TestAfterwards:
    @pytest.mark.parametrize("name, options", EACH)
    def test_the_scheduler_is_as_it_was(self, name, options):
        pipe = make_pipeline()
        if name != OURS:
            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
        pipe.scheduler.set_timesteps(9)
        before = state_of(pipe.scheduler)
        draw(pipe, {"num_inference_steps": 5})
        after = state_of(pipe.scheduler)
        assert list(after) == list(before)
        for key, value in before.items():
            if torch.is_tensor(value):
                # Copies of the same numbers; some tables of KDPM2 hold NaN.
                torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True, msg=key)
            elif isinstance(value, (int, float, str, list, tuple, type(None))):
                assert value == after[key], key

    def test_a_scheduler_with_gradients_in_its_history(self):
        """As steps of one's own leave them, in a loop that is differentiated: such tensors cannot be copied."""
        pipe = make_pipeline(scheduler=DPMSolverMultistepScheduler(**CHAIN))
        expected = draw(pipe, {"num_inference_steps": 3})
        pipe.scheduler.set_timesteps(4)
        sample = torch.randn(1, 3, 8, 8, requires_grad=True)
        for t in pipe.scheduler.timesteps:
            sample = pipe.scheduler.step(0.1 * sample, t, sample).prev_sample
        assert sample.requires_grad
        assert rounding_errors(draw(pipe, {"num_inference_steps": 3}), expected) <= SAMPLING

    def test_no_tensors_are_kept(self):
        """What a call leaves on the pipeline is small: embeddings and conditions go with it."""
        pipe = make_pipeline()
        before = {name for name, value in vars(pipe).items() if torch.is_tensor(value)}
        draw(pipe, {"class_labels": 1, "num_inference_steps": 2})
        assert {name for name, value in vars(pipe).items() if torch.is_tensor(value)} == before
        assert not any(torch.is_tensor(value) for value in vars(pipe._latest_call).values())

    def test_a_failed_call_leaves_nothing_behind(self):
        pipe = make_pipeline()

        def fail(pipeline, step, timestep, kwargs):
            pipeline.guidance_scale = 7.0
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            draw(pipe, {"callback_on_step_end": fail, **TestSteering.STEPS})
        pipe._interrupt = True  # in no call any more: of the latest one, which has ended
        assert draw(pipe, TestSteering.STEPS).shape == (1, 3, 8, 8)
        assert pipe.guidance_scale == 1.0
        assert not pipe.interrupt

    def test_pipelines_can_be_copied(self):
        pipe = make_pipeline()
        draw(pipe, {"class_labels": 1, "guidance_scale": 3.0, "num_inference_steps": 2})
        twin = copy.deepcopy(pipe)
        assert twin.guidance_scale == 3.0
        twin.guidance_scale = 4.0
        assert pipe.guidance_scale == 3.0


# What a call is refused, or told


IMAGE = torch.rand(3, 8, 8, generator=seeded(5))
MASK = torch.zeros(8, 8)
MASK[2:6, 2:7] = 1
WHITE = torch.ones(8, 8)


def plain(channels: int = 3, **config) -> ADMPipeline:
    return make_pipeline(unet=random_unet(in_channels=channels, out_channels=2 * channels, **config))


def with_text(**config) -> ADMPipeline:
    text = {"text_encoder": random_text_encoder("bert"), "tokenizer": toy_tokenizer("bert")}
    return make_pipeline(unet=random_text_unet(**config), **text)


def controlled() -> ADMControlNetPipeline:
    unet = random_unet(**CONDITIONAL)
    return make_pipeline(ADMControlNetPipeline, unet=unet, controlnet=AdaGNControlNetModel.from_unet(unet))


def steered() -> ADMPipeline:
    return make_pipeline(unet=random_unet(), classifier=random_classifier())


def inpainter(**config) -> ADMInpaintPipeline:
    return make_pipeline(ADMInpaintPipeline, unet=random_unet(**config))


def toy_vae(**channels) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, **channels)


class TestBeforeTheFirstStep:
    """What can be known before it is said before it: no network has run."""

    def refused(self, pipe, message, error=ValueError, **arguments):
        calls = []
        pipe.unet.register_forward_pre_hook(lambda *args: calls.append(args))
        with pytest.raises(error, match=message):
            pipe(**{"num_inference_steps": 2, **arguments})
        assert calls == []

    @pytest.mark.parametrize("channels", [2, 4, 5, 13])
    def test_images_that_pillow_does_not_have(self, channels):
        pipe = plain(channels)
        message = rf"images have {channels} channels, whose meaning .*`image_format`.*'np'.*'pt'"
        self.refused(pipe, message)
        self.refused(
            inpainter(in_channels=channels, out_channels=2 * channels),
            message,
            image=IMAGE[:1].expand(channels, -1, -1),
            mask_image=MASK,
        )
        assert pipe(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, channels)
        assert pipe(num_inference_steps=1, output_type="pt").images.shape == (1, channels, 8, 8)

    @pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
    def test_images_that_it_has(self, channels, mode):
        assert plain(channels)(num_inference_steps=1).images[0].mode == mode

    def test_channels_are_those_of_decoded_images(self):
        unet = random_unet(in_channels=4, out_channels=8)
        pipe = make_pipeline(unet=unet, vae=toy_vae(in_channels=3, out_channels=3))
        assert pipe.image_channels == 3
        assert pipe(num_inference_steps=1).images[0].mode == "RGB"
        pipe = make_pipeline(unet=unet, vae=toy_vae(in_channels=5, out_channels=5))
        self.refused(pipe, "images have 5 channels")
        assert pipe(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 5)
        with pytest.raises(ValueError, match="takes images of 3 channels and gives 1"):
            make_pipeline(ADMInpaintPipeline, unet=unet, vae=toy_vae(in_channels=3, out_channels=1))

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"callback_on_step_end_tensor_inputs": "latents"}, "is 'latents'; pass a list of names"),
            ({"callback_on_step_end_tensor_inputs": None}, "is None; pass a list of names"),
            ({"latents": torch.zeros(1, 3, 8, 8, dtype=torch.int64)}, "(1, 3, 8, 8) and type torch.int64"),
        ],
        ids=lambda value: None if isinstance(value, str) else ",".join(value),
    )
    def test_arguments(self, arguments, message):
        self.refused(make_pipeline(), re.escape(message), **arguments)

    @pytest.mark.parametrize("name, options", EACH)
    def test_as_many_steps_as_timesteps(self, name, options):
        """Solvers of the DPM family then find one noise level twice, and gave NaN without a word."""
        pipe = make_pipeline(scheduler=LearnedVarianceDDPMScheduler(num_train_timesteps=60, beta_end=0.3))
        if name != OURS:
            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
        solvers = ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver")
        if name.removesuffix("Scheduler") in solvers:
            self.refused(
                pipe, "`num_inference_steps` is 60, .* finds fewer different noise levels", num_inference_steps=60
            )
            steps = 20
        else:
            steps = 50 if name == "TCDScheduler" else 60  # more than that its `original_inference_steps` do not allow
        assert torch.isfinite(draw(pipe, {"num_inference_steps": steps})).all()

    def test_a_prompt_in_place_of_the_image(self):
        """As in pipelines whose first argument is the prompt."""
        with pytest.raises(ValueError, match=r"`image` is a str; .* A prompt is passed by its name, `prompt=\.\.\.`"):
            inpainter()("a cat", IMAGE, MASK)


# The pipeline, the arguments, and what is told of them.
WITHOUT_EFFECT = {
    "labels": (steered, {"class_labels": 1}, "`class_labels` have no effect: the U-Net is unconditional"),
    "negative prompt": (with_text, {"prompt": "a cat", "negative_prompt": "a dog"}, "`negative_prompt` has no effect"),
    "rescale": (make_pipeline, {"class_labels": 1, "guidance_rescale": 0.5}, "`guidance_rescale` has no effect"),
    "interval": (make_pipeline, {"guidance_end": 0.5}, "`guidance_start` and `guidance_end` have no effect"),
    "empty interval": (
        make_pipeline,
        {"class_labels": 1, "guidance_scale": 2.0, "guidance_start": 0.3, "guidance_end": 0.6},
        "none of the 2 steps lies within `guidance_start` 0.3 and `guidance_end` 0.6",
    ),
    "control interval": (
        controlled,
        {"image": IMAGE, "control_guidance_start": 0.3, "control_guidance_end": 0.6},
        "`image` has no effect: none of the 2 steps",
    ),
    "black mask": (inpainter, {"image": IMAGE, "mask_image": 0 * MASK}, "`mask_image` is black everywhere"),
    "white mask": (inpainter, {"image": IMAGE, "mask_image": WHITE}, "`image` has no effect"),
    "resampling": (
        inpainter,
        {"image": IMAGE, "mask_image": WHITE, "strength": 0.5, "num_inference_steps": 12, "jump_n_sample": 2},
        "`jump_n_sample` has no effect",
    ),
}
# Nothing to tell: they act, or a callback may have them act.
WITH_EFFECT = {
    "labels that steer": (steered, {"class_labels": 1, "classifier_guidance_scale": 1.0}),
    "labels of the U-Net": (make_pipeline, {"class_labels": 1}),
    "negative prompt": (with_text, {"prompt": "a cat", "negative_prompt": "a dog", "guidance_scale": 2.0}),
    "guidance by a callback": (
        with_text,
        {
            "negative_prompt": "a dog",
            "guidance_rescale": 0.5,
            "guidance_end": 0.5,
            "callback_on_step_end": lambda *a: a[-1],
        },
    ),
    "interval of the classifier": (steered, {"class_labels": 1, "classifier_guidance_scale": 1.0, "guidance_end": 0.5}),
    "no ControlNet on purpose": (controlled, {"image": IMAGE, "controlnet_conditioning_scale": 0.0}),
    "mask": (inpainter, {"image": IMAGE, "mask_image": MASK}),
    "all of an image anew": (inpainter, {"image": IMAGE, "mask_image": WHITE, "strength": 0.5}),
}


def warnings_of_calls(records):
    """All but those of parts that do not say which noise schedule they were trained on, as toys do not."""
    return [
        record.message
        for record in records
        if record.levelno >= logging.WARNING and not record.name.endswith("noise_schedules")
    ]


class TestWithoutEffect:
    @pytest.mark.parametrize("make, arguments, message", WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
    def test_is_told_once(self, make, arguments, message, caplog):
        pipe = make()
        for _ in range(2):
            pipe(**{"num_inference_steps": 2, "output_type": "pt", **arguments})
        told = warnings_of_calls(caplog.records)
        assert len(told) == 1
        assert message in told[0]

    @pytest.mark.parametrize("make, arguments", WITH_EFFECT.values(), ids=WITH_EFFECT)
    def test_is_all_that_is_told(self, make, arguments, caplog):
        make()(**{"num_inference_steps": 2, "output_type": "pt", **arguments})
        assert not warnings_of_calls(caplog.records)

    @pytest.mark.parametrize("name", ["labels", "negative prompt", "rescale", "interval", "empty interval"])
    def test_it_has_none(self, name):
        """What is told is true: without the arguments in question the samples are the same."""
        make, arguments, _ = WITHOUT_EFFECT[name]
        pipe = make()
        conditions = () if name == "labels" else ("prompt", "class_labels")
        kept = {key: value for key, value in arguments.items() if key in conditions}
        given, without = (
            pipe(num_inference_steps=2, generator=seeded(), output_type="latent", **call).images
            for call in (arguments, kept)
        )
        # The same operations; the last bits of matrix products depend on where their operands lie in memory.
        torch.testing.assert_close(given, without, rtol=1e-4, atol=1e-4)
