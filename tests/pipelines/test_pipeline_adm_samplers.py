"""ADMPipeline with each scheduler of diffusers, against loops written by hand; and those that it refuses."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
    UnCLIPScheduler,
)
from diffusers_samplers import NAMES, SAMPLERS, as_parameters, needs_torchsde
from tolerances import SAMPLING, rounding_errors
from toy_models import random_unet

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.pipelines import pipeline_adm


# Not the default chain. (One of 4000 timesteps: tests/schedulers/test_analytic_samplers.py.)
OTHER = {"num_train_timesteps": 400, "beta_start": 0.00025, "beta_end": 0.05}
EACH = as_parameters(SAMPLERS)
EACH_CLASS = as_parameters([(name, {}) for name in NAMES])


def make_pipeline(scheduler, channels: int = 3, learned: bool = True) -> ADMPipeline:
    unet = random_unet(in_channels=channels, out_channels=channels * (2 if learned else 1))
    pipe = ADMPipeline(unet, scheduler, vae=None, text_encoder=None, tokenizer=None, classifier=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(channels: int = 3, number: int = 2) -> torch.Tensor:
    return torch.randn((number, channels, 8, 8), generator=seeded())


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


class TestPlugIn:
    @torch.no_grad()
    def loop(self, unet, scheduler, start: torch.Tensor, takes_variance: bool, steps: int) -> torch.Tensor:
        """Written out, for a scheduler that has never heard of the pipeline's."""
        scheduler.set_timesteps(steps)
        sample = start * scheduler.init_noise_sigma
        kwargs = {"generator": seeded(1)} if "generator" in parameters(scheduler.step) else {}
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(sample, t), t).sample
            if not takes_variance:
                output = output[:, : start.shape[1]]
            sample = scheduler.step(output, t, sample, **kwargs).prev_sample
        return sample

    def check(self, pipe: ADMPipeline, name: str, options: dict, given: dict, steps: int = 6) -> None:
        cls, start = getattr(diffusers, name), noise(pipe.unet.config.in_channels)
        if name == "DPMSolverSDEScheduler":
            options = {**options, "noise_sampler_seed": [3, 4]}  # its `step` takes no generator
        takes_variance = name.startswith("DDPM") and not options
        if takes_variance:
            given = {**given, "variance_type": "learned_range"}
        plain = cls(**{k: v for k, v in given.items() if k in parameters(cls.__init__)}, **options)
        expected = self.loop(pipe.unet, plain, start, takes_variance, steps)

        pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
        inherited = pipe.scheduler.config.get("variance_type")
        actual = pipe(num_inference_steps=steps, batch_size=2, latents=start, generator=seeded(1), output_type="latent")
        assert torch.isfinite(expected).all()
        assert expected.std() > 0.1
        assert rounding_errors(actual.images, expected) <= SAMPLING
        assert pipe.scheduler.config.get("variance_type") == inherited

    @pytest.mark.parametrize("name, options", EACH)
    def test_three_channels_from_a_scheduler_left_to_its_defaults(self, name, options):
        """The process is the pipeline's. Clipping and the choice of timesteps are the sampler's own defaults."""
        given = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
        self.check(make_pipeline(LearnedVarianceDDPMScheduler()), name, options, given)

    @pytest.mark.parametrize("name, options", EACH)
    def test_four_channels_from_a_saved_scheduler(self, tmp_path, name, options):
        """Four channels: what cuts `[:, :3]` shows. A saved config gives everything explicitly."""
        LearnedVarianceDDPMScheduler(**OTHER).save_pretrained(tmp_path)
        pipe = make_pipeline(LearnedVarianceDDPMScheduler.from_pretrained(tmp_path), channels=4)
        given = {**OTHER, "beta_schedule": "linear", "timestep_spacing": "leading", "clip_sample": True}
        self.check(pipe, name, options, given)

    @pytest.mark.parametrize("learned", [True, False])
    @pytest.mark.parametrize("name, options", EACH_CLASS)
    def test_cosine_schedule(self, name, options, learned):
        """As many output channels as `variance_type` says, for a solver that inherits it."""
        scheduler = LearnedVarianceDDPMScheduler(
            200,
            beta_schedule="cosine",
            timestep_spacing="leading",
            variance_type="learned_range" if learned else "fixed_small",
        )
        pipe = make_pipeline(scheduler, channels=4, learned=learned)
        given = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"}
        beta_names = ("num_train_timesteps", "beta_start", "beta_end")
        given |= {key: scheduler.config[key] for key in beta_names}
        if not learned and name.startswith("DDPM"):
            options = {"variance_type": "fixed_small"}
        self.check(pipe, name, options, given, steps=5)

    def test_what_a_copy_prevents(self):
        """The wrong version: the solver as `from_config` makes it loses the fourth channel."""
        pipe = make_pipeline(LearnedVarianceDDPMScheduler(), channels=4)
        solver = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        assert solver.config.variance_type == "learned_range"
        with pytest.raises(RuntimeError, match="size of tensor"):
            self.loop(pipe.unet, solver, noise(4), True, 3)

    def test_solvers_may_ask_between_timesteps(self):
        pipe = make_pipeline(LearnedVarianceDDPMScheduler())
        asked = []
        pipe.unet.register_forward_pre_hook(lambda module, args: asked.append(float(args[1])))
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
        images = pipe(num_inference_steps=5, output_type="latent", generator=seeded()).images
        assert any(t != round(t) for t in asked)
        assert torch.isfinite(images).all()


class TestGenerator:
    @needs_torchsde
    def test_gives_the_noise_of_the_brownian_tree(self):
        """`DPMSolverSDEScheduler` knows seeds alone; left out, they would come from the global random state."""
        from diffusers import DPMSolverSDEScheduler

        pipe = make_pipeline(LearnedVarianceDDPMScheduler())
        pipe.scheduler = DPMSolverSDEScheduler.from_config(pipe.scheduler.config)
        kwargs = {"num_inference_steps": 3, "output_type": "latent"}
        state = torch.get_rng_state()
        batch = pipe(batch_size=2, generator=[seeded(5), seeded(6)], **kwargs).images
        assert torch.equal(torch.get_rng_state(), state)
        assert rounding_errors(pipe(batch_size=2, generator=[seeded(5), seeded(6)], **kwargs).images, batch) <= SAMPLING
        for image, seed in zip(batch, (5, 6), strict=True):
            single = pipe(generator=seeded(seed), **kwargs).images[0]
            # Sums run in another order for another batch size; the first step multiplies errors by 157.
            torch.testing.assert_close(single, image, rtol=1e-3, atol=1e-3)
        one, other = (pipe(latents=noise(number=1), generator=seeded(seed), **kwargs).images for seed in (5, 6))
        assert rounding_errors(one, other) > SAMPLING
        first, second = pipe(latents=noise(number=1).repeat(2, 1, 1, 1), batch_size=2, generator=seeded(), **kwargs)[0]
        assert rounding_errors(first, second) > SAMPLING
        pipe.scheduler = DPMSolverSDEScheduler.from_config(pipe.scheduler.config, noise_sampler_seed=7)
        one, other = (pipe(latents=noise(number=1), generator=seeded(seed), **kwargs).images for seed in (5, 6))
        assert rounding_errors(one, other) <= SAMPLING

    def test_eta_of_tcd(self):
        pipe = make_pipeline(LearnedVarianceDDPMScheduler())
        pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
        kwargs = {"num_inference_steps": 4, "latents": noise(number=1), "output_type": "latent"}
        default, same, zero = (pipe(generator=seeded(1), eta=eta, **kwargs).images for eta in (None, 0.3, 0.0))
        assert rounding_errors(default, same) <= SAMPLING
        assert rounding_errors(default, zero) > SAMPLING
        assert rounding_errors(zero, pipe(generator=seeded(2), eta=0.0, **kwargs).images) <= SAMPLING
        with pytest.raises(ValueError, match=r"`eta` is 1\.5; a TCDScheduler takes 0 .* to 1"):
            pipe(eta=1.5, **kwargs)


class TestConfigs:
    """What `from_config` carries over. What one class chose by default, the next may choose differently."""

    @pytest.mark.parametrize("name, options", EACH_CLASS)
    def test_the_process_is_kept(self, name, options):
        """Some classes have other default betas: 0.00085 to 0.012, or "scaled_linear"."""
        cls = getattr(diffusers, name)
        expected = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))
        scheduler = cls.from_config(LearnedVarianceDDPMScheduler().config)
        np.testing.assert_allclose(scheduler.alphas_cumprod.double().numpy(), expected, rtol=1e-3)
        for options in ({"beta_schedule": "scaled_linear", "beta_end": 0.01}, {"prediction_type": "v_prediction"}):
            ours = LearnedVarianceDDPMScheduler(100, **options)
            theirs = cls.from_config(ours.config)
            torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.alphas_cumprod, rtol=1e-3, atol=1e-7)
            assert theirs.config.prediction_type == ours.config.prediction_type

    @pytest.mark.parametrize("name, options", EACH_CLASS)
    def test_and_comes_back(self, name, options):
        cls = getattr(diffusers, name)
        for variance_type in ("learned_range", "learned_log", "fixed_small"):
            ours = LearnedVarianceDDPMScheduler(100, variance_type=variance_type)
            back = LearnedVarianceDDPMScheduler.from_config(cls.from_config(ours.config).config)
            assert back.config.variance_type == variance_type
            assert back.betas.tolist() == ours.betas.tolist()
        if name == "DDPMScheduler":
            return
        # In the other direction, too: what a class of diffusers chose by default is not ours to choose.
        theirs = cls(100)
        ours = LearnedVarianceDDPMScheduler.from_config(theirs.config, variance_type="fixed_small")
        torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=1e-3, atol=1e-7)

    def test_through_a_saved_pipeline(self, tmp_path):
        pipe = make_pipeline(LearnedVarianceDDPMScheduler(**OTHER))
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.save_pretrained(tmp_path)
        loaded = ADMPipeline.from_pretrained(tmp_path)
        assert type(loaded.scheduler) is DPMSolverMultistepScheduler
        back = LearnedVarianceDDPMScheduler.from_config(loaded.scheduler.config)
        assert back.config.variance_type == "learned_range"
        assert back.betas.tolist() == LearnedVarianceDDPMScheduler(**OTHER).betas.tolist()

    def test_a_solver_that_never_knew_a_variance(self):
        with pytest.raises(ValueError, match=r"`variance_type` is None.*pass `variance_type='learned_range'` to"):
            LearnedVarianceDDPMScheduler.from_config(DPMSolverMultistepScheduler().config)

    def test_spacing_and_clipping(self, tmp_path):
        """Defaults are the solver's before saving and the config's after it, as everywhere in diffusers."""
        for config, spacing, clip in [
            (LearnedVarianceDDPMScheduler().config, "linspace", False),
            (LearnedVarianceDDPMScheduler(timestep_spacing="trailing", clip_sample=True).config, "trailing", True),
        ]:
            heun = HeunDiscreteScheduler.from_config(config)
            assert (heun.config.timestep_spacing, heun.config.clip_sample) == (spacing, clip)
        LearnedVarianceDDPMScheduler().save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "scheduler_config.json").read_text())
        heun = HeunDiscreteScheduler.from_config(saved)
        assert (heun.config.timestep_spacing, heun.config.clip_sample) == ("leading", True)

    def test_thresholding_is_inherited(self):
        ours = LearnedVarianceDDPMScheduler(thresholding=True, sample_max_value=2.0, dynamic_thresholding_ratio=0.9)
        solver = DPMSolverMultistepScheduler.from_config(ours.config)
        keys = ("thresholding", "sample_max_value", "dynamic_thresholding_ratio")
        assert [solver.config[key] for key in keys] == [True, 2.0, 0.9]

    @pytest.mark.parametrize("schedule", ["quadratic", "sigmoid"])
    @pytest.mark.parametrize("name, options", EACH_CLASS)
    def test_betas_that_a_scheduler_has_no_name_for(self, name, options, schedule):
        ours = LearnedVarianceDDPMScheduler(100, beta_schedule=schedule)
        cls = getattr(diffusers, name)
        if not (schedule == "sigmoid" and name.startswith("DDPM")):
            with pytest.raises(NotImplementedError, match=f"{schedule} is not implemented for"):
                cls.from_config(ours.config)
        theirs = cls.from_config(ours.config, trained_betas=ours.betas.tolist())
        torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.alphas_cumprod, rtol=1e-3, atol=1e-7)


def all_schedulers() -> list[str]:
    classes = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    return [name for name, cls in classes.items() if inspect.isclass(cls) and issubclass(cls, SchedulerMixin)]


# What these need to be constructed.
ARGUMENTS = {
    "AmusedScheduler": {"mask_token_id": 0},
    "RFD4ProteinaScheduler": {"schedule_mode": "power", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
}
REASONS = {
    "LCMScheduler": r"it needs a network that was distilled for it .*`DPMSolverMultistepScheduler` or `UniPC",
    "UnCLIPScheduler": r"its steps need the previous timestep. `LearnedVarianceDDPMScheduler` makes the same",
    "RePaintScheduler": r"its steps need an original image and a mask",
    "DDIMInverseScheduler": r"it goes from images to noise",
    "DPMSolverMultistepInverseScheduler": r"it goes from images to noise",
    "CogVideoXDDIMScheduler": r"it shifts the betas",
    "CogVideoXDPMScheduler": r"it shifts the betas",
}


class TestRefused:
    @pytest.mark.parametrize("name", sorted(set(all_schedulers()) - {*NAMES, "LearnedVarianceDDPMScheduler"}))
    def test_every_other_scheduler_of_diffusers(self, name):
        reason = REASONS.get(name, r"it has no `beta_schedule`, so it reverses another process .* `from_config`")
        cls = getattr(diffusers, name)
        try:
            scheduler = cls(**ARGUMENTS.get(name, {}))
        except ImportError as error:
            pytest.skip(str(error).strip())
        with pytest.raises(ValueError, match=f"`scheduler` is a {name}, which these models cannot use: {reason}"):
            make_pipeline(scheduler)

    @pytest.mark.parametrize("cls", [LCMScheduler, TCDScheduler])
    def test_before_any_work_is_done(self, cls):
        pipe = make_pipeline(LearnedVarianceDDPMScheduler())
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        calls = []
        pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(args))
        # 50 is also the limit of TCD, whose own message says so.
        with pytest.raises(ValueError, match="LCMScheduler|`original_steps|`original_inference_steps"):
            pipe(num_inference_steps=51)
        assert calls == []

    def test_unclip_has_an_equal(self):
        """Where the message points to: the same distribution in every step."""
        unclip = UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon")
        unclip.set_timesteps(7)
        ours = LearnedVarianceDDPMScheduler.from_config(
            unclip.config, beta_schedule="squaredcos_cap_v2", timestep_spacing="linspace"
        )
        ours.set_timesteps(7)
        assert ours.timesteps.tolist() == unclip.timesteps.tolist()
        timesteps = [*unclip.timesteps.tolist(), None]
        sample, output = noise(), torch.randn(2, 6, 8, 8, generator=seeded(3))
        for t, previous in list(zip(timesteps, timesteps[1:], strict=False))[1:-1]:
            theirs = unclip.step(output, t, sample, prev_timestep=previous, generator=seeded(1)).prev_sample
            actual = ours.step(output, t, sample, generator=seeded(1)).prev_sample
            torch.testing.assert_close(actual, theirs, rtol=1e-3, atol=1e-3)  # their tables are float32

    SAMPLE_IS_UNKNOWN = (
        "PNDMScheduler",
        "EulerAncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverSDEScheduler",
    )

    @pytest.mark.parametrize("name, options", EACH_CLASS)
    def test_prediction_of_the_sample(self, name, options, monkeypatch):
        """Those that do not know it would fail in the first step, after the network has run."""
        pipe = make_pipeline(LearnedVarianceDDPMScheduler(100, prediction_type="sample"))
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        if name in self.SAMPLE_IS_UNKNOWN:
            with pytest.raises(ValueError, match=rf"{name}, which does not support `prediction_type='sample'`"):
                pipe(num_inference_steps=4)
            monkeypatch.setattr(pipeline_adm, "check_scheduler", lambda scheduler: None)
            with pytest.raises((ValueError, NotImplementedError), match="prediction_type"):
                pipe(num_inference_steps=4)
        else:
            assert torch.isfinite(pipe(num_inference_steps=4, output_type="pt").images).all()

    @pytest.mark.parametrize("name, options", EACH_CLASS)
    def test_zero_terminal_snr(self, name, options):
        """A scheduler that does not know the option would step with other betas, in silence."""
        cls = getattr(diffusers, name)
        pipe = make_pipeline(
            LearnedVarianceDDPMScheduler(100, rescale_betas_zero_snr=True, prediction_type="v_prediction")
        )
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        if "rescale_betas_zero_snr" in parameters(cls.__init__):
            assert pipe.scheduler.alphas_cumprod[-1] < 1e-7
            assert torch.isfinite(pipe(num_inference_steps=4, output_type="pt").images).all()
        else:
            assert pipe.scheduler.alphas_cumprod[-1] > 1e-5
            with pytest.raises(ValueError, match=rf"{name}, which does not support `rescale_betas_zero_snr`"):
                pipe(num_inference_steps=4)

    @pytest.mark.parametrize(
        "options",
        [{"prediction_type": "flow_prediction"}, {"use_flow_sigmas": True}, {"prediction_type": "v"}],
        ids=str,
    )
    def test_flow_matching_by_option(self, options):
        with pytest.raises(ValueError, match=r"Networks of this family predict one of \['epsilon', 'sample'"):
            make_pipeline(DPMSolverMultistepScheduler(**options))

    @pytest.mark.parametrize("variance_type", ["learned_log", "fixed_large_log", "other"])
    @pytest.mark.parametrize("cls", [DDPMScheduler, DDPMParallelScheduler])
    def test_variance_types_that_ddpm_does_not_know(self, cls, variance_type):
        """It would take the first as "fixed_small", and make NaN of the second."""
        with pytest.raises(ValueError, match=rf"`variance_type='{variance_type}'`, which it does not know"):
            make_pipeline(cls(variance_type=variance_type))

    def test_timesteps_that_are_no_numbers(self):
        pipe = make_pipeline(LearnedVarianceDDPMScheduler(beta_schedule="cosine"))
        pipe.scheduler = diffusers.KDPM2AncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        calls = []
        pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(args))
        with pytest.raises(ValueError, match=r"finds no 5 timesteps for these betas.*`timestep_spacing='leading'`"):
            pipe(num_inference_steps=5)
        assert calls == []

    def test_a_scheduler_from_elsewhere_is_let_in(self):
        class Mine(DDIMScheduler):
            pass

        assert torch.isfinite(make_pipeline(Mine())(num_inference_steps=2, output_type="pt").images).all()
