"""The training script with `--lora_rank`: the base stays, the adapter is trained, resumed and loaded again."""

import re
from pathlib import Path

import pytest
import torch
from processes import run_distributed
from runs import (
    EMOJI,
    SHORT_RUN,
    assert_same_checkpoint,
    assert_same_state,
    flags,
    own_process_state,
    read_metrics,
    reset_accelerate,
    save_base,
)
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import load_script
from tolerances import NETWORK, rounding_errors
from toy_models import random_text_unet, random_unet

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.data import captions
from diffusers_adm.training import add_lora, diffusion
from diffusers_adm.training import run as training_run
from diffusers_adm.training.run_state import read_state


train_adm = load_script("train_adm")

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_adm"):
        yield


@pytest.fixture
def short(tmp_path):
    """Arguments of a run of two steps for a class-conditional model."""
    return SHORT_RUN | {
        "pretrained_model_name_or_path": save_base(
            tmp_path / "base", random_unet(num_class_embeds=10, null_class_id=9)
        ),
        "data_files": EMOJI,
        "label_column": "label",
        "resolution": 8,
        "max_train_samples": 40,
        "lora_rank": 2,
        "output_dir": str(tmp_path / "run"),
        "learning_rate": 1e-2,
    }


def keep_unets(script):
    """The U-Nets of the runs that follow, with the average in the adapter once a run has ended."""
    unets, averages = [], []
    build_unet, build_ema, push_result = diffusion.build_unet, training_run.build_ema, script.push_result

    def keep_unet(*args):
        unets.append(build_unet(*args))
        return unets[-1]

    def keep_average(parameters, training_args):
        averages.append((build_ema(parameters, training_args), parameters))
        return averages[-1][0]

    def copy_average(*args):
        ema, parameters = averages[-1]
        ema.copy_to(parameters)
        push_result(*args)

    diffusion.build_unet, training_run.build_ema, script.push_result = keep_unet, keep_average, copy_average
    return unets


@pytest.fixture
def trained_unets(monkeypatch):
    """The U-Nets of runs in this process, see `keep_unets`."""
    for module, name in ((diffusion, "build_unet"), (training_run, "build_ema"), (train_adm, "push_result")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that they come back
    return keep_unets(train_adm)


def train(**arguments):
    reset_accelerate()
    train_adm.main(flags(**arguments))


def predict(unet, **kwargs):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 8, 8, generator=generator)
    if unet.has_cross_attention:
        kwargs["encoder_hidden_states"] = torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return unet.eval()(sample, torch.tensor([3, 700]), **kwargs).sample


def without_adapter(unet):
    return {
        name.replace(".base_layer.", "."): value for name, value in unet.state_dict().items() if ".lora_" not in name
    }


def train_and_predict(argv):
    """A run in this process; the numbers of captions per encoding, and the prediction of the averaged adapter."""
    script = load_script("train_adm")
    encoded, unets = [], keep_unets(script)
    encode_captions = captions.encode_captions

    def count(text_encoder, batch, **kwargs):
        encoded.append(len(batch["input_ids"]))
        return encode_captions(text_encoder, batch, **kwargs)

    captions.encode_captions = count
    training_run.plot_loss_curves = lambda *args: None
    script.main(argv)
    return encoded, predict(unets[0]).tolist()


class TestAdapter:
    def test_the_base_stays_and_the_adapter_loads(self, short, trained_unets):
        train(**short, lora_alpha=6)
        base, folder = short["pretrained_model_name_or_path"], short["output_dir"]
        trained = trained_unets[0]
        original = load_file(Path(base) / "unet" / "diffusion_pytorch_model.safetensors")
        after = without_adapter(trained)
        assert set(after) == set(original)
        assert [name for name in original if not torch.equal(original[name], after[name])] == []

        expected = predict(trained)
        pipeline = ADMPipeline.from_pretrained(base)
        difference = (predict(pipeline.unet) - expected).abs().max()
        assert difference > 1e-3
        pipeline.load_lora_weights(folder)
        assert rounding_errors(predict(pipeline.unet), expected) <= NETWORK
        unet = AdaGNUNet2DModel.from_pretrained(base, subfolder="unet")
        unet.load_lora_adapter(folder, prefix="unet", use_safetensors=True)
        assert rounding_errors(predict(unet), expected) <= NETWORK
        # W + alpha / rank B A, by hand.
        weights = load_file(Path(folder) / WEIGHTS)
        layers = {name.rpartition(".lora_")[0] for name in weights}
        state = dict(original)
        for layer in layers:
            product = weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]
            state[f"{layer.removeprefix('unet.')}.weight"] = (
                original[f"{layer.removeprefix('unet.')}.weight"] + 3 * product
            )
        unet = AdaGNUNet2DModel.from_pretrained(base, subfolder="unet")
        unet.load_state_dict(state)
        torch.testing.assert_close(predict(unet), expected, rtol=1e-4, atol=1e-5)

    def test_it_carries_the_noise_schedule_that_it_was_trained_on(self, short):
        """Also a checkpoint of it; loading it for a model of another one is refused."""
        train(**short, ddpm_beta_schedule="cosine")
        for folder in (Path(short["output_dir"]), Path(short["output_dir"], "checkpoint-2")):
            pipeline = ADMPipeline.from_pretrained(short["pretrained_model_name_or_path"])
            with pytest.raises(ValueError, match="The LoRA was trained on the noise schedule squaredcos_cap_v2 with "):
                pipeline.load_lora_weights(folder, weight_name=WEIGHTS)
            pipeline.scheduler = LearnedVarianceDDPMScheduler(beta_schedule="cosine")
            pipeline.load_lora_weights(folder, weight_name=WEIGHTS)
            assert pipeline.get_list_adapters() == {"unet": ["default_0"]}

    def test_only_the_adapter_is_kept(self, short):
        train(**short)
        folder = Path(short["output_dir"])
        assert not (folder / "unet").exists()
        assert (folder / "samples-0000002.png").is_file()
        weights = load_file(folder / WEIGHTS)
        # One attention on the way down, one in the middle, two on the way up; four projections each.
        assert len(weights) == 2 * 4 * 4
        assert all(name.startswith("unet.") and ".lora_" in name for name in weights)
        with safe_open(folder / WEIGHTS, "pt") as file:
            assert '"unet.r": 2' in file.metadata()["lora_adapter_metadata"]
        checkpoint = folder / "checkpoint-2"
        assert not (checkpoint / "model.safetensors").exists()
        # The average in the root, as in the result; the trained adapter in a folder.
        assert_same_state(load_file(checkpoint / WEIGHTS), weights)
        trained = load_file(checkpoint / "trained_adapter" / WEIGHTS)
        assert set(trained) == set(weights)
        assert any(not torch.equal(trained[name], weights[name]) for name in weights)
        (optimizer,) = read_state(checkpoint, "run_state")["optimizers"]
        assert len(optimizer["state"]) == len(weights)

    def test_resumed_exactly(self, short, monkeypatch, tmp_path):
        arguments = short | {"max_train_steps": 5, "checkpointing_steps": 2}
        train(**arguments)
        seed_step = training_run.seed_step

        def fail_after_step_3(seed, process_index, micro_step):
            if micro_step == 3:
                raise RuntimeError("the machine is gone")
            seed_step(seed, process_index, micro_step)

        monkeypatch.setattr(training_run, "seed_step", fail_after_step_3)
        arguments["output_dir"] = str(tmp_path / "resumed")
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(**arguments)
        monkeypatch.setattr(training_run, "seed_step", seed_step)
        train(**arguments, resume_from_checkpoint="latest")
        assert_same_checkpoint(Path(short["output_dir"]) / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
        assert read_metrics(short["output_dir"]) == read_metrics(tmp_path / "resumed")
        first, second = Path(short["output_dir"]), tmp_path / "resumed"
        assert_same_state(load_file(first / WEIGHTS), load_file(second / WEIGHTS))
        grid = "samples-0000005.png"
        assert (first / grid).read_bytes() == (second / grid).read_bytes()

    @pytest.mark.slow
    def test_beside_a_model_with_text_in_two_processes(self, short, tmp_path):
        """One encodes the captions, both read them; the adapter is checkpointed, resumed and loaded."""
        del short["label_column"]
        short["pretrained_model_name_or_path"] = save_base(tmp_path / "text", random_text_unet("added_kv"), "clip")
        arguments = short | {
            "caption_column": "text",
            "precompute_text_embeddings": True,
            "cache_dir": str(tmp_path / "cache"),
            "max_train_steps": 3,
            "train_batch_size": 4,
            "checkpointing_steps": 2,
        }
        folder, other = Path(short["output_dir"]), tmp_path / "resumed"
        batches = [encoded for encoded, _ in run_distributed(train_and_predict, flags(**arguments))]
        # Each encodes the empty caption, for its shape; and the main process all 41 that there are.
        assert batches == [[1, 41], [1]]
        assert len(list((tmp_path / "cache").glob("caption-embeddings-*.arrow"))) == 1
        checkpoint = folder / "checkpoint-2"
        assert not (checkpoint / "model.safetensors").exists()

        changes = {"output_dir": str(other), "resume_from_checkpoint": str(checkpoint)}
        (encoded, expected), _ = run_distributed(train_and_predict, flags(**arguments | changes))
        assert encoded == [1]
        assert_same_checkpoint(folder / "checkpoint-3", other / "checkpoint-3")
        assert read_metrics(other) == [row for row in read_metrics(folder) if row["step"] > 2]
        assert_same_state(load_file(folder / WEIGHTS), load_file(other / WEIGHTS))
        assert any("add_k_proj" in name for name in load_file(other / WEIGHTS))
        pipeline = ADMPipeline.from_pretrained(short["pretrained_model_name_or_path"])
        pipeline.load_lora_weights(other)
        assert rounding_errors(predict(pipeline.unet), torch.tensor(expected)) <= NETWORK

    def test_other_layers(self, short, trained_unets):
        train(**short, lora_target_modules=["conv1", "time_emb_proj"])
        weights = load_file(Path(short["output_dir"]) / WEIGHTS)
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in weights} == {"conv1", "time_emb_proj"}
        unet = AdaGNUNet2DModel.from_pretrained(short["pretrained_model_name_or_path"], subfolder="unet")
        base = predict(unet)
        unet.load_lora_adapter(short["output_dir"], prefix="unet", use_safetensors=True)
        assert rounding_errors(predict(unet), predict(trained_unets[0])) <= NETWORK
        assert (predict(unet) - base).abs().max() > 1e-3


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lora_rank": 0}, "`lora_rank` is 0; it must be at least 1"),
            ({"lora_rank": "none", "lora_alpha": 2}, "`lora_alpha` was given without `lora_rank`"),
            (
                {"lora_rank": "none", "lora_target_modules": ["to_q"]},
                "`lora_target_modules` was given without `lora_rank`",
            ),
            ({"lora_alpha": 0}, "`lora_alpha` is 0.0; it must be positive"),
            (
                {"lora_target_modules": ["to_q", "to_w"]},
                r"no linear or convolutional layers \['to_w'\].* among .*conv1, .*time_emb_proj, to_k, to_q, to_v",
            ),
            (
                {"caption_column": "text", "train_text_encoder": True},
                "`lora_rank` leaves all .* Drop `train_text_encoder`",
            ),
            (
                {"pretrained_model_name_or_path": "none", "model_config_name_or_path": "x.json"},
                "`lora_rank` adapts a trained model",
            ),
        ],
    )
    def test_arguments(self, short, changes, message):
        with pytest.raises(ValueError, match=message):
            train(**short | changes)

    def test_a_unet_without_attention(self):
        blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False}
        with pytest.raises(ValueError, match="of attention to adapt. .* among conv.*, time_emb_proj"):
            add_lora(random_unet(**blocks), rank=2)

    def test_a_checkpoint_of_a_run_without_adapter(self, short):
        train(**short | {"lora_rank": "none"})
        with pytest.raises(ValueError, match="`lora_rank` is 2, and was None for checkpoint-2, which cannot be"):
            train(**short | {"max_train_steps": 3}, resume_from_checkpoint="latest")

    def test_a_checkpoint_of_another_adapter(self, short, tmp_path):
        train(**short)
        before = ["to_k", "to_out.0", "to_q", "to_v"]
        more = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
        attention = {"down_block_types": ["AttnDownBlock2D"] * 2, "num_class_embeds": 10, "null_class_id": 9}
        other = save_base(tmp_path / "other", random_unet(**attention))
        for changes, message in (
            ({"lora_rank": 4}, "`lora_rank` is 4, and was 2 for checkpoint-2, which cannot be loaded"),
            ({"lora_alpha": 6}, r"`lora_alpha` is 6\.0, and was None for checkpoint-2, which cannot"),
            (
                {"lora_target_modules": more},
                re.escape(f"started with `lora_target_modules` {before}, and this run has {sorted(more)}"),
            ),
            (
                {"pretrained_model_name_or_path": other},
                "`down_block_types` in the config of the network is .*, and was",
            ),
            (
                {"pretrained_model_name_or_path": other, "force_resume": True},
                r"such as down_blocks.*lora_.*Resume with the `pretrained",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                train(**short | {"max_train_steps": 3, "resume_from_checkpoint": "latest"} | changes)
