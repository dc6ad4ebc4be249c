#!/usr/bin/env python
"""
Trains a ControlNet for an ablated diffusion model, which stays as it is, so that an image (edges, blocks of colour,
regions, ...) controls where things are.

    accelerate launch training/train_controlnet.py --config training/configs/emoji_32_edges.yaml \
        --output_dir runs/edges

Zhang et al. 2023 (https://huggingface.co/papers/2302.05543). The conditioning images are made from the training images,
or read from a column of the data. Only the ControlNet is saved. Every argument can be given in the recipe or on the
command line, which wins; `--help` lists them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_adm import ADMControlNetPipeline
from diffusers_adm.commands.errors import run_command
from diffusers_adm.conditioning.condition import merge
from diffusers_adm.conditioning.controlnet import ControlNetCondition
from diffusers_adm.hub.publication import prepare_repository, push_result
from diffusers_adm.training import (
    DIFFUSION_ARGUMENTS,
    ControlArguments,
    FrozenNetworks,
    HeldOutMeasures,
    TrainingRun,
    build_controlnet,
    check_base_stays,
    check_text_stays,
    compile_network,
    condition_request,
    control_arguments,
    control_grid,
    held_out_measures,
    load_diffusion,
    load_held_out,
    parse_run,
    start_run,
    training_losses,
)


ARGUMENT_TYPES = (*DIFFUSION_ARGUMENTS, ControlArguments)


def predict(
    unet: torch.nn.Module,
    controlnet: torch.nn.Module,
    accelerator: Accelerator,
    noisy_samples: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    controlnet_cond: torch.Tensor,
    **model_kwargs: Any,
) -> torch.Tensor:
    """The prediction of the frozen U-Net with the ControlNet, which gets its gradients through the U-Net's decoder."""
    down_residuals, mid_residual = controlnet(
        noisy_samples, timesteps, controlnet_cond=controlnet_cond, return_dict=False, **model_kwargs
    )
    device = noisy_samples.device.type
    with accelerator.autocast():  # which `prepare` gave to the ControlNet
        # It also made the output float32. The decoder would compute in float32, too: 5% of the time of a step.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else noisy_samples.dtype
        return unet(
            noisy_samples,
            timesteps,
            down_block_additional_residuals=tuple(residual.to(dtype) for residual in down_residuals),
            mid_block_additional_residual=mid_residual.to(dtype),
            **model_kwargs,
        ).sample


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    all_args, record = parse_run(ARGUMENT_TYPES, argv, "train_controlnet", description=__doc__)
    *common_args, control_args = all_args  # the former are those of `DIFFUSION_ARGUMENTS`
    model_args, data_args, diffusion_args, training_args, text_args = common_args
    check_base_stays(model_args, diffusion_args, text_args)
    accelerator = start_run("train_controlnet", all_args, record)
    prepare_repository(accelerator, training_args)

    # 2. Networks and data
    check_text_stays(model_args, data_args, text_args)
    diffusion = load_diffusion(
        accelerator,
        record,
        common_args,
        keeps="a ControlNet leaves its base model as it is",
        conditioning_image_column=control_args.conditioning_image_column,
        condition=control_args.condition,
        condition_request=condition_request(control_args, data_args),
    )
    with accelerator.main_process_first():
        controlnet = build_controlnet(
            control_args,
            data_args,
            diffusion.unet,
            diffusion.noise_scheduler,
            diffusion.image_format,
            diffusion.condition_format,
            diffusion.factor,
        )
    # `FrozenNetworks` compares U-Net and text encoder.
    others = {"tokenizer": diffusion.tokenizer, "autoencoder": diffusion.autoencoder_hash}
    record.check_network(controlnet.config, diffusion.resolution, others)
    train_dataset, validation_dataset = diffusion.datasets()
    with accelerator.main_process_first():
        held_out = load_held_out(diffusion)
    examples = diffusion.examples(validation_dataset, training_args.num_validation_images)
    text_encoder = {} if diffusion.text_encoder is None else {"text encoder": diffusion.text_encoder}
    autoencoder = {} if diffusion.latent_space is None else {"autoencoder": diffusion.latent_space.vae}
    frozen = FrozenNetworks({"U-Net": diffusion.unet, **text_encoder, **autoencoder})
    unet = diffusion.unet.to(accelerator.device)
    for network in (unet, controlnet):
        model_args.apply_to(network)

    # 3. Optimizer, learning rate, average, log; the checkpoint that is resumed
    run = TrainingRun(
        accelerator,
        record,
        data_args,
        training_args,
        {"": controlnet},  # the root of the folder
        train_dataset,
        diffusion.metrics,
        diffusion.timestep_sampler,
        frozen,
        description=diffusion.describe(f" and {control_args.condition or control_args.conditioning_image_column}"),
        measures=held_out_measures(diffusion, held_out),
        compiles=model_args.compile,
    )
    control = ControlNetCondition(dropout_prob=control_args.condition_dropout_prob)
    conditions = [*diffusion.conditions(run.networks), control]
    trained_through = compile_network(unet) if model_args.compile else unet
    model = functools.partial(predict, trained_through, run.networks[""], accelerator)

    save_result = controlnet.save_pretrained
    build_pipeline = functools.partial(diffusion.build_pipeline, ADMControlNetPipeline, controlnet=controlnet)

    def generate() -> Image.Image:
        return control_grid(build_pipeline(), examples, training_args, diffusion.condition_format)

    measures = HeldOutMeasures(
        run,
        diffusion,
        held_out,
        [*diffusion.conditions(diffusion.trained_networks(), held_out), ControlNetCondition()],
        functools.partial(predict, unet, controlnet, accelerator),
        build_pipeline,
        functools.partial(control_arguments, condition_format=diffusion.condition_format),
    )
    show = functools.partial(run.show_samples, generate)

    def validate() -> bool:
        """On all processes. Whether all of it succeeded."""
        return all([measures.validate(), run.validate(show), run.keep_best(save_result)])

    # 4. Training
    if held_out is not None:
        run.make_up(validate, save_result)
    for batch in run.batches():
        with run.accumulate():
            samples = diffusion.samples(batch)  # (B, C, H, W): pixels in [-1, 1], or latents
            inputs = merge(condition.for_training(batch) for condition in conditions)
            timesteps, weights = diffusion.timestep_sampler.sample(len(samples), device=samples.device)
            terms = training_losses(
                model,
                diffusion.noise_scheduler,
                samples,
                timesteps,
                objective=diffusion_args.objective,
                snr_gamma=diffusion_args.snr_gamma,
                num_levels=diffusion.num_levels,
                model_kwargs=inputs.kwargs,
            )
            diffusion.record_losses(terms, timesteps, weights)
            run.backward((terms.loss * weights).mean(), timesteps)
            run.step_optimizer()
        if accelerator.sync_gradients:
            due = run.after_step()  # learning rate, EMA, a row of the log
            if due.checkpoint:
                run.save_checkpoint(save_result)
            if due.validation:
                validate()

    # 5. The ControlNet with the averaged weights; then the last validation, and the Hub
    run.finish(save_result, validate, push_result, "ControlNet")


if __name__ == "__main__":
    run_command(main)
