"""training/train_prior.py: statistics, loss, masks, a case with a closed form, runs, validation, and refusals."""

import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, PriorTransformer, UnCLIPScheduler
from processes import run_distributed
from runs import (
    EMOJI,
    assert_same_checkpoint,
    flags,
    launch,
    own_process_state,
    read_metrics,
    reset_accelerate,
)
from safetensors.torch import load_file
from scripts import load_script
from tolerances import NETWORK, rounding_errors
from toy_clips import CLIP_WIDTH, random_clip, save_clip
from toy_embeddings import save_embeddings, write_emoji_captions
from toy_models import MAX_PROMPT_LENGTH, WORDS, fill_randomly
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.commands.errors import CommandError
from diffusers_adm.conditioning.prior import PriorSampler
from diffusers_adm.conditioning.text import TextCondition, TextConditioning
from diffusers_adm.data.clip_models import load_clip_text
from diffusers_adm.data.embeddings import EmbeddingDataset, StoredEmbeddings, load_embeddings
from diffusers_adm.data.seeding import derive_seed
from diffusers_adm.training import (
    PRIOR_ARGUMENTS,
    measure_embeddings,
    parse_args,
    post_hoc_ema,
    prior_inputs,
    similarity_measures,
    training_losses,
)
from diffusers_adm.training.priors import fit_prior_config


train_prior = load_script("train_prior")
TOY_PRIOR = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
COUNT, HELD_OUT = 40, 12


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(train_prior, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_prior"):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A CLIP, embeddings with flips of images with lists of captions, those of held-out ones, and a config."""
    folder = tmp_path_factory.mktemp("priors")
    save_clip(folder / "clip")
    write_emoji_captions(folder / "train.parquet", EMOJI, COUNT)
    write_emoji_captions(folder / "test.parquet", EMOJI, HELD_OUT)
    save_embeddings(folder / "train", folder / "clip", folder / "train.parquet", random_flip=True, shard_size=16)
    save_embeddings(folder / "test", folder / "clip", folder / "test.parquet")
    (folder / "prior.json").write_text(json.dumps(TOY_PRIOR))
    return folder


@pytest.fixture
def short(made, tmp_path):
    """Arguments of a run of two steps."""
    return {
        "clip": str(made / "clip"),
        "train_data_dir": str(made / "train"),
        "caption_column": "captions",
        "random_flip": True,
        "model_config_name_or_path": str(made / "prior.json"),
        "max_train_steps": 2,
        "train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "logging_steps": 1,
        "report_to": "none",
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "run"),
    }


def held_out(made):
    return {"validation_data_dir": str(made / "test"), "validation_num_inference_steps": 2}


def train(**arguments):
    reset_accelerate()
    train_prior.main(flags(**arguments))


def random_prior(seed=0, **config):
    fitted = {"embedding_dim": CLIP_WIDTH, "num_embeddings": MAX_PROMPT_LENGTH}
    prior = fill_randomly(PriorTransformer(**TOY_PRIOR | fitted | config), seed)
    prior.clip_mean.data.normal_(generator=torch.Generator().manual_seed(1))
    prior.clip_std.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    return prior


def load_result(folder):
    """Its parts, by the classes of diffusers and transformers, and the sampler of them all."""
    prior = PriorTransformer.from_pretrained(folder, subfolder="prior")
    scheduler = LearnedVarianceDDPMScheduler.from_pretrained(folder, subfolder="prior_scheduler")
    encoder = CLIPTextModelWithProjection.from_pretrained(Path(folder, "prior_text_encoder"))
    tokenizer = AutoTokenizer.from_pretrained(Path(folder, "prior_tokenizer"))
    return prior.eval(), scheduler, PriorSampler(prior.eval(), scheduler, encoder, tokenizer)


def random_text(number, seed=0):
    """Encoded captions of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, MAX_PROMPT_LENGTH, (number,), generator=generator)
    mask = (torch.arange(MAX_PROMPT_LENGTH) < lengths[:, None]).long()
    states = torch.randn(number, MAX_PROMPT_LENGTH, CLIP_WIDTH, generator=generator)
    return TextConditioning(states, mask, torch.randn(number, CLIP_WIDTH, generator=generator))


# 1. Statistics


def stored_rows(folder, *columns):
    table = pyarrow.parquet.read_table(sorted(Path(folder).glob("*.parquet")))
    return np.concatenate([np.stack(table.column(name).to_numpy()) for name in columns]).astype(np.float64)


def measure_on(folder, random_flip):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    stored = StoredEmbeddings.read("train_data_dir", folder)
    dataset = EmbeddingDataset(load_embeddings(folder, stored, "captions"), stored, random_flip=random_flip)
    moments = measure_embeddings(dataset, accelerator)
    return accelerator.num_processes, moments.mean.tolist(), moments.std.tolist(), moments.largest


@pytest.mark.parametrize("random_flip", [False, True])
def test_statistics_over_two_processes(made, random_flip):
    """Mean, standard deviation and extreme of all embeddings, by numpy in float64; the same on both processes."""
    rows = stored_rows(made / "train", "image_embeds", *["image_embeds_flipped"] * random_flip)
    results = run_distributed(measure_on, str(made / "train"), random_flip)
    for number, mean, std, largest in results:
        assert number == 2
        # Sums of 80 numbers in float64: 1e-14 of their size.
        assert mean == pytest.approx(rows.mean(axis=0), rel=1e-11, abs=1e-12)
        assert std == pytest.approx(rows.std(axis=0), rel=1e-11)
        assert largest == pytest.approx(np.abs((rows - rows.mean(axis=0)) / rows.std(axis=0)).max(), rel=1e-10)


def test_a_result_stores_them(made, short):
    train(**short)
    prior, scheduler, sampler = load_result(short["output_dir"])
    rows = stored_rows(made / "train", "image_embeds", "image_embeds_flipped")
    assert prior.clip_mean[0].tolist() == pytest.approx(rows.mean(axis=0), rel=1e-6, abs=1e-7)  # float32
    assert prior.clip_std[0].tolist() == pytest.approx(rows.std(axis=0), rel=1e-6)
    largest = np.abs((rows - rows.mean(axis=0)) / rows.std(axis=0)).max()
    expected = {"variance_type": "fixed_small", "prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"}
    expected |= {"clip_sample": True, "timestep_spacing": "linspace", "num_train_timesteps": 1000}
    assert {name: scheduler.config[name] for name in expected} == expected
    assert scheduler.config.clip_sample_range == pytest.approx(largest)
    assert (prior.config.embedding_dim, prior.config.num_embeddings) == (CLIP_WIDTH, MAX_PROMPT_LENGTH)
    embeds = sampler.sample(["a red cat"], num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    assert embeds.shape == (1, CLIP_WIDTH)
    assert torch.isfinite(embeds).all()


# 2. Loss and masks


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_the_loss_is_that_of_each_example(prediction_type):
    """Against diffusers' noise schedule and one forward pass an example."""
    prior, text, number = random_prior(), random_text(5), 5
    generator = torch.Generator().manual_seed(3)
    embeds, noise = (torch.randn(number, CLIP_WIDTH, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 10, 300, 700, 999])
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type}
    ours = LearnedVarianceDDPMScheduler(**config, variance_type="fixed_small")
    theirs = DDPMScheduler(**config)
    options = {"objective": "simple", "num_levels": None, "noise": noise}
    losses = training_losses(prior, ours, embeds, timesteps, model_kwargs=prior_inputs(text), **options).loss
    expected = []
    for i in range(number):
        one = slice(i, i + 1)
        noisy = theirs.add_noise(embeds[one], noise[one], timesteps[one])
        with torch.no_grad():
            prediction = prior(
                noisy,
                timesteps[one],
                proj_embedding=text.pooled[one],
                encoder_hidden_states=text.hidden_states[one],
                attention_mask=text.attention_mask[one],
            ).predicted_image_embedding
        target = {"sample": embeds[one], "epsilon": noise[one]}.get(prediction_type)
        target = theirs.get_velocity(embeds[one], noise[one], timesteps[one]) if target is None else target
        expected.append(F.mse_loss(prediction, target))
    # diffusers' schedule is float32, which is off by up to 1e-5 at t = 0.
    assert losses.tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-3)


def test_padding_and_later_tokens_have_no_influence():
    """The padding on nothing; a token only on itself and later ones, as in the paper, also in a batch."""
    prior, text = random_prior(), random_text(3)
    embeds, timesteps, states = torch.randn(3, CLIP_WIDTH), torch.tensor([5, 500, 900]), []
    prior.transformer_blocks[-1].register_forward_hook(lambda module, args, output: states.append(output))

    def run(hidden_states=text.hidden_states, pooled=text.pooled, sample=embeds):
        changed = text._replace(hidden_states=hidden_states, pooled=pooled)
        with torch.no_grad():
            output = prior(sample, timesteps, **prior_inputs(changed)).predicted_image_embedding
        return output, states.pop()

    output, tokens = run()
    mask = text.attention_mask.bool()
    assert not mask.all()
    unpadded = torch.where(mask[..., None], text.hidden_states, 7 * torch.randn_like(text.hidden_states))
    assert torch.equal(run(unpadded)[0], output)
    changed = text.hidden_states.clone()
    changed[:, 1] += 1
    other, other_tokens = run(changed)
    assert torch.equal(other_tokens[:, 0], tokens[:, 0])
    assert (other_tokens - tokens)[:, 1:2].abs().amax() > 1e-3
    assert (other - output).abs().amax(dim=1).min() > 1e-4
    # Order: states, text embedding, timestep, noisy embedding, and the token that is read.
    for place, further in ((MAX_PROMPT_LENGTH, {"pooled": text.pooled + 1}), (-2, {"sample": embeds + 1})):
        other, other_tokens = run(**further)
        assert torch.equal(other_tokens[:, :place], tokens[:, :place])
        assert (other_tokens - tokens)[:, place].abs().amax(dim=1).min() > 1e-3
        assert (other - output).abs().amax(dim=1).min() > 1e-4


def recorded_inputs(monkeypatch, **arguments):
    """The arguments of the prior in each forward pass of a run."""
    forward, calls = PriorTransformer.forward, []

    def record(self, hidden_states, timestep, **kwargs):
        calls.append({"hidden_states": hidden_states, "timestep": timestep, **kwargs})
        return forward(self, hidden_states, timestep, **kwargs)

    monkeypatch.setattr(PriorTransformer, "forward", record)
    train(**arguments)
    monkeypatch.setattr(PriorTransformer, "forward", forward)
    return calls


@pytest.mark.parametrize("precompute", [True, False])
def test_no_caption_is_what_sampling_takes_for_it(made, short, monkeypatch, precompute):
    """The encoding of the empty prompt, in the unconditional pass of guidance."""
    options = {"caption_dropout_prob": 1.0, "precompute_text_embeddings": precompute}
    call = recorded_inputs(monkeypatch, **short, **options)[0]
    text = load_clip_text("clip", str(made / "clip"))
    with torch.no_grad():
        empty = TextCondition({}, text.model, text.tokenizer, masks_padding=True).encode("cat", None, "cpu")[1]
    mask = empty.attention_mask.bool()
    assert (int(mask.sum()), mask.shape) == (2, (1, MAX_PROMPT_LENGTH))
    for row in range(8):
        assert torch.equal(call["attention_mask"][row], empty.attention_mask[0])
        assert rounding_errors(call["encoder_hidden_states"][row][mask[0]], empty.hidden_states[mask]) <= NETWORK
        assert rounding_errors(call["proj_embedding"][row], empty.pooled[0]) <= NETWORK


def test_inputs_are_those_of_the_examples(made, short, monkeypatch):
    """Standardised embeddings at full noise and none, with their own captions; stored or encoded in the loop."""
    noise = []
    draw = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x, **kwargs: noise.append(draw(x, **kwargs)) or noise[-1])
    given = short | {"caption_dropout_prob": 0.0, "random_flip": False, "caption_column": "text"}
    runs = [
        recorded_inputs(monkeypatch, **given | {"precompute_text_embeddings": stored, "output_dir": folder})
        for stored, folder in ((True, short["output_dir"]), (False, short["output_dir"] + "-2"))
    ]
    for stored, encoded in zip(*runs, strict=True):
        mask = encoded["attention_mask"].bool()
        assert torch.equal(stored["attention_mask"], encoded["attention_mask"])
        for name, chosen in (("encoder_hidden_states", mask), ("proj_embedding", slice(None))):
            assert rounding_errors(stored[name][chosen], encoded[name][chosen]) <= NETWORK
    call = runs[0][0]
    rows = stored_rows(made / "train", "image_embeds")
    standardised = torch.from_numpy((rows - rows.mean(axis=0)) / rows.std(axis=0)).float()
    alphas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod[call["timestep"]][:, None]
    clean = (call["hidden_states"] - (1 - alphas).sqrt() * noise[0]) / alphas.sqrt()
    nearest = (clean[:, None] - standardised).norm(dim=2)
    is_clear = alphas[:, 0] > 0.05  # the error of the division grows with 1 / sqrt(alpha)
    assert is_clear.sum() >= 4
    assert nearest.amin(dim=1)[is_clear].max() < 1e-3
    captions = datasets.load_dataset("parquet", data_files=str(made / "train.parquet"), split="train")["text"]
    text = load_clip_text("clip", str(made / "clip"))
    for row in is_clear.nonzero()[:, 0].tolist():
        caption = captions[int(nearest[row].argmin())]
        ids = text.tokenizer(caption, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = text.model(ids["input_ids"]).text_embeds
        assert rounding_errors(call["proj_embedding"][row][None], expected) <= NETWORK


# 3. Gaussian embeddings for each caption


MEANS = torch.randn(4, CLIP_WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
SPREAD = 1.0


def write_gaussian(folder, made, number, seed):
    """Stored embeddings of a normal distribution for each of four captions, as if of images."""
    generator = torch.Generator().manual_seed(seed)
    captions = torch.arange(number) % len(MEANS)
    rows = MEANS[captions] + SPREAD * torch.randn(number, CLIP_WIDTH, generator=generator, dtype=torch.float64)
    features = {"text": datasets.Value("string")}
    features["image_embeds"] = datasets.List(datasets.Value("float32"), length=CLIP_WIDTH)
    columns = {"text": [f"the {WORDS[caption + 2]}" for caption in captions], "image_embeds": rows.float().tolist()}
    folder.mkdir()
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(str(folder / "rows.parquet"))
    fingerprint = StoredEmbeddings.read("train_data_dir", str(made / "train")).fingerprint
    StoredEmbeddings(fingerprint, "toy", CLIP_WIDTH, number, False, "image").write(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gaussian(made, tmp_path_factory):
    """The result of a run on Gaussian embeddings, validated on others."""
    folder, patch = tmp_path_factory.mktemp("gaussian"), pytest.MonkeyPatch()
    patch.setenv("ACCELERATE_USE_CPU", "true")
    (folder / "prior.json").write_text(
        json.dumps({"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1})
    )
    with own_process_state("train_prior"):
        train(
            clip=made / "clip",
            train_data_dir=write_gaussian(folder / "train", made, 2048, 0),
            validation_data_dir=write_gaussian(folder / "test", made, 64, 1),
            model_config_name_or_path=folder / "prior.json",
            max_train_steps=400,
            train_batch_size=64,
            learning_rate=3e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=30,
            ema_max_decay=0.99,
            checkpointing_steps=1000,
            logging_steps=50,
            validation_num_inference_steps=20,
            report_to="none",
            cache_dir=folder / "cache",
            output_dir=folder / "run",
        )
    patch.undo()
    return folder


def test_the_prediction_is_the_conditional_mean(gaussian):
    """
    For x_t = sqrt(a) x_0 + sqrt(1 - a) noise and x_0 of N(m, s^2) in a channel, E[x_0 | x_t, caption] = m + s^2 sqrt(a)
    / (s^2 a + 1 - a) (x_t - sqrt(a) m).
    """
    prior, scheduler, sampler = load_result(gaussian / "run")
    number = 256
    generator = torch.Generator().manual_seed(9)
    captions = torch.arange(number) % len(MEANS)
    std = prior.clip_std[0].detach().double()
    means, spread = (MEANS[captions] - prior.clip_mean[0].double()) / std, SPREAD / std
    clean = means + spread * torch.randn(number, CLIP_WIDTH, generator=generator, dtype=torch.float64)
    noise = torch.randn(number, CLIP_WIDTH, generator=generator, dtype=torch.float64)
    texts, means_only = [f"the {WORDS[caption + 2]}" for caption in captions], []
    with torch.no_grad():
        text = TextCondition({}, sampler.text_encoder, sampler.tokenizer, masks_padding=True).encode(texts, None, "cpu")
        for timestep in (200, 500, 800):
            a = float(scheduler.alphas_cumprod[timestep])
            noisy = math.sqrt(a) * clean + math.sqrt(1 - a) * noise
            gain = spread**2 * math.sqrt(a) / (spread**2 * a + 1 - a)
            best = means + gain * (noisy - math.sqrt(a) * means)
            timesteps = torch.full((number,), timestep)
            predicted = prior(noisy.float(), timesteps, **prior_inputs(text[0])).predicted_image_embedding
            # In units of the variance of the data. A prior that ignores x_t would be off by 0.5, 0.25 and 0.04, and one
            # that ignores the caption by about 0.5 at the last timestep; this one is by 0.02 and less.
            assert ((predicted - best) ** 2).mean() < 0.04, timestep
            means_only.append(((means - best) ** 2).mean() / ((predicted - best) ** 2).mean())
            # What no prediction can avoid: the variance of x_0 given x_t.
            floor = float((spread**2 * (1 - a) / (spread**2 * a + 1 - a)).mean())
            assert ((best - clean) ** 2).mean() == pytest.approx(floor, rel=0.1)
            assert ((predicted - clean) ** 2).mean() < floor + 0.06, timestep
    assert min(means_only) > 2


def test_samples_have_the_distribution_of_the_embeddings(gaussian):
    """Their mean is that of the caption, with a guidance scale of 1, and their spread that of the embeddings."""
    sampler = load_result(gaussian / "run")[2]
    prompts = [f"the {WORDS[caption + 2]}" for caption in range(len(MEANS))]
    generator = torch.Generator().manual_seed(0)
    embeds = sampler.sample(prompts, num_images_per_prompt=128, num_inference_steps=25, generator=generator)
    embeds = embeds.view(len(MEANS), 128, CLIP_WIDTH).double()
    # The standard error of a mean is 0.09; the means of captions are about 1.1 apart in each channel.
    assert (embeds.mean(dim=1) - MEANS).abs().mean() < 0.25
    # 25 steps with the smaller of the fixed variances make the best prediction's spread 0.9 of that of the data.
    assert embeds.std(dim=1).mean() == pytest.approx(0.9 * SPREAD, rel=0.15)


def test_held_out_captions_are_told_apart(gaussian):
    measures = json.loads((gaussian / "run" / "prior_similarity.json").read_text())
    assert measures["num_images"] == 64
    assert measures["similarity"] > 0.3  # two draws of one caption: about 1 / (1 + SPREAD**2) = 0.5
    for name in ("text", "shuffled"):
        assert measures[f"above_{name}"] > 5 * measures[f"above_{name}_error"]
    (row,) = [row for row in read_metrics(gaussian / "run") if "validation_similarity" in row]
    assert (row["step"], row["validation_similarity"]) == (400, measures["similarity"])


# 4. Validation


def test_measures_by_a_loop():
    generator = np.random.default_rng(0)
    predicted, true, text = generator.normal(size=(3, 6, 5))
    captions = ["a", "b", "a", "c", "d", "b"]

    def cosine(x, y):
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    own = [cosine(predicted[i], true[i]) for i in range(6)]
    of_text = [cosine(text[i], true[i]) for i in range(6)]
    shuffled = [
        np.mean([cosine(predicted[j], true[i]) for j in range(6) if captions[j] != captions[i]]) for i in range(6)
    ]
    measures = similarity_measures(*map(torch.from_numpy, (predicted, true, text)), captions)
    expected = {"similarity": own, "text_similarity": of_text, "shuffled_similarity": shuffled}
    expected |= {"above_text": np.subtract(own, of_text), "above_shuffled": np.subtract(own, shuffled)}
    assert set(measures) == {*expected, *(f"{name}_error" for name in expected)}
    for name, values in expected.items():
        assert measures[name] == pytest.approx(np.mean(values), rel=1e-12)
        assert measures[f"{name}_error"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(6), rel=1e-12)
    one = similarity_measures(*(torch.from_numpy(x[:1]) for x in (predicted, true, text)), captions[:1])
    assert "shuffled_similarity" not in one
    assert math.isnan(one["similarity_error"])


def test_a_validation(made, short):
    """Samples of the averaged weights, for the first captions; the same by `PriorSampler` on the result."""
    options = {"validation_guidance_scale": 2.0, "validation_candidates": 3, "validation_steps": 1}
    train(**short, **held_out(made), **options)
    folder = Path(short["output_dir"])
    rows = [row for row in read_metrics(folder) if "validation_similarity" in row]
    assert [row["step"] for row in rows] == [1, 2]
    measures = json.loads((folder / "prior_similarity.json").read_text())
    assert (measures["step"], measures["num_images"], measures["candidates"]) == (2, HELD_OUT, 3)
    prior, _, sampler = load_result(folder)
    data = datasets.load_dataset("parquet", data_files=str(made / "test.parquet"), split="train")
    captions = [(texts or [""])[0] for texts in data["captions"]]
    true = torch.from_numpy(stored_rows(made / "test", "image_embeds"))
    seeds = [derive_seed(0, "prior validation", index) for index in range(HELD_OUT)]
    for candidates, name in ((1, "similarity"), (3, "best_similarity")):
        embeds = sampler.sample(
            captions,
            num_inference_steps=2,
            guidance_scale=2.0,
            num_candidates=candidates,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        expected = F.cosine_similarity(embeds.double(), true)
        assert measures[name] == pytest.approx(expected.mean().item(), abs=1e-4)
        assert measures[f"{name}_error"] == pytest.approx(expected.std().item() / HELD_OUT**0.5, rel=1e-3)
    constant = F.cosine_similarity(true, prior.clip_mean.detach().double())
    assert measures["mean_similarity"] == pytest.approx(constant.mean().item(), abs=1e-6)
    assert measures["best_similarity"] != measures["similarity"]


def test_one_held_out_image_has_no_standard_error(made, short):
    train(**short, **held_out(made), max_validation_samples=1)
    text = Path(short["output_dir"], "prior_similarity.json").read_text()
    measures = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert measures["num_images"] == 1
    assert -1 <= measures["similarity"] <= 1
    assert not [name for name in measures if name.endswith("_error")]


def test_a_failed_validation_costs_nothing(made, short, monkeypatch):
    def fail(*args):
        raise RuntimeError("no disk")

    monkeypatch.setattr(train_prior, "validate_prior", fail)
    with pytest.raises(CommandError, match="The last validation has failed.*The result is saved in"):
        train(**short, **held_out(made), validation_steps=1)
    load_result(short["output_dir"])


# 5. Runs


def test_resumed_bit_by_bit(made, short, tmp_path):
    arguments = short | {"max_train_steps": 6, "checkpointing_steps": 3, "validation_steps": 2} | held_out(made)
    train(**arguments)
    unbroken, broken = Path(short["output_dir"]), tmp_path / "broken"
    shutil.copytree(unbroken, broken)
    shutil.rmtree(broken / "checkpoint-6")
    train(output_dir=str(broken), resume_from_checkpoint="latest")
    assert_same_checkpoint(unbroken / "checkpoint-6", broken / "checkpoint-6")
    assert read_metrics(unbroken) == read_metrics(broken)


def test_all_but_the_statistics_learns(short):
    train(**short | {"checkpointing_steps": 1, "learning_rate": 1e-2, "adam_weight_decay": 0.1})
    before, after = (load_file(Path(short["output_dir"], f"checkpoint-{step}", "model.safetensors")) for step in (1, 2))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"clip_mean", "clip_std"}


def test_two_processes(made, short, tmp_path):
    """The statistics are those of all embeddings, and a resumed run of one process has the same."""
    output = launch("train_prior", short | {"train_batch_size": 4} | held_out(made), tmp_path)
    assert "Num processes: 2" in output
    assert f"{COUNT} embeddings of width {CLIP_WIDTH} with" in output
    assert "8 per optimizer step" in output
    prior, _, _ = load_result(short["output_dir"])
    rows = stored_rows(made / "train", "image_embeds", "image_embeds_flipped")
    assert prior.clip_std[0].tolist() == pytest.approx(rows.std(axis=0), rel=1e-6)
    assert json.loads(Path(short["output_dir"], "prior_similarity.json").read_text())["num_images"] == HELD_OUT
    train(output_dir=short["output_dir"], resume_from_checkpoint="latest", max_train_steps=3, train_batch_size=8)


def test_an_average_of_another_length(short, tmp_path):
    train(**short | {"max_train_steps": 6, "power_ema_stds": [0.1, 0.2], "power_ema_snapshot_steps": 2})
    target = tmp_path / "0.15"
    post_hoc_ema.main(flags(run_dir=short["output_dir"], std=0.15, output_dir=target, max_error=1))
    prior, scheduler, _ = load_result(target)
    other, its_scheduler, _ = load_result(short["output_dir"])
    change = (prior.proj_in.weight - other.proj_in.weight).abs().max()
    assert 0 < change < 6 * 2e-3  # 6 steps of 1e-3
    assert torch.equal(prior.clip_std, other.clip_std)
    assert scheduler.config.clip_sample_range == its_scheduler.config.clip_sample_range


def test_options(short):
    """Another prediction, range, precision and accumulation; captions of another column."""
    options = {"prediction_type": "epsilon", "clip_sample_range": 5.0, "mixed_precision": "bf16"}
    options |= {"gradient_accumulation_steps": 2, "caption_column": "text", "max_train_samples": 20}
    train(**short | options | {"ddpm_num_steps": 100, "dataloader_num_workers": 1})
    _, scheduler, _ = load_result(short["output_dir"])
    expected = {"prediction_type": "epsilon", "clip_sample_range": 5.0, "num_train_timesteps": 100}
    assert {name: scheduler.config[name] for name in expected} == expected
    losses = [row["loss"] for row in read_metrics(short["output_dir"])]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)


class TestFineTuning:
    @pytest.fixture
    def base(self, tmp_path):
        """A folder in the layout of Karlo's pipeline, with its scheduler."""
        random_prior().save_pretrained(tmp_path / "base" / "prior")
        scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0, variance_type="fixed_small_log")
        scheduler.save_pretrained(tmp_path / "base" / "prior_scheduler")
        return tmp_path / "base"

    @pytest.fixture
    def tuned(self, short, base):
        del short["model_config_name_or_path"]
        return short | {"pretrained_model_name_or_path": str(base)}

    @pytest.mark.parametrize("folder", ["prior_scheduler", "scheduler"])
    def test_statistics_and_scheduler_are_kept(self, tuned, base, folder):
        if folder == "scheduler":
            (base / "prior_scheduler").rename(base / "scheduler")
        train(**tuned)
        prior, scheduler, _ = load_result(tuned["output_dir"])
        before = random_prior()
        assert torch.equal(prior.clip_mean, before.clip_mean)
        assert torch.equal(prior.clip_std, before.clip_std)
        assert not torch.equal(prior.proj_in.weight, before.proj_in.weight)
        expected = {"prediction_type": "sample", "clip_sample_range": 5.0, "variance_type": "fixed_small"}
        expected |= {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
        assert {name: scheduler.config[name] for name in expected} == expected

    def test_a_result_again(self, short, tmp_path):
        train(**short)
        first = short["output_dir"]
        del short["model_config_name_or_path"]
        train(**short | {"pretrained_model_name_or_path": first, "output_dir": str(tmp_path / "second")})
        assert torch.equal(load_result(first)[0].clip_std, load_result(tmp_path / "second")[0].clip_std)

    def test_what_cannot_be_tuned(self, tuned, base):
        prior = random_prior()
        prior.clip_std.data[0, 3] = 0
        prior.save_pretrained(base / "prior")
        with pytest.raises(ValueError, match="has values of `clip_std` that are not positive"):
            train(**tuned)
        prior.clip_std.data[0, 3] = torch.nan
        prior.save_pretrained(base / "prior")
        with pytest.raises(ValueError, match="are not finite themselves, such as `clip_std`"):
            train(**tuned)
        random_prior(embedding_dim=12).save_pretrained(base / "prior")
        with pytest.raises(
            ValueError, match="`embedding_dim` 12, but the embeddings of the CLIP have the width 16. Use"
        ):
            train(**tuned)
        LearnedVarianceDDPMScheduler(prediction_type="sample").save_pretrained(base / "prior_scheduler")
        with pytest.raises(ValueError, match="has `variance_type` 'learned_range', but a prior predicts no variance"):
            train(**tuned)


# 6. Refusals


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"embedding_dim": 32}, "`embedding_dim` 32, but the embeddings of the CLIP have the width 16. Leave it"),
            ({"num_embeddings": 77}, "`num_embeddings` 77 tokens, but the CLIP pads them to 12"),
            ({"clip_embed_dim": 8}, "`clip_embed_dim` 8, but text and image embeddings of the CLIP have the width 16"),
            ({"embedding_proj_dim": 8}, "`embedding_proj_dim` 8, but text and image"),
            ({"added_emb_type": None}, "`added_emb_type` None; a prior of unCLIP has 'prd'"),
            ({"additional_embeddings": 5}, "`additional_embeddings` 5; a prior of unCLIP has 4"),
            ({"encoder_hid_proj_type": None, "num_attention_heads": 1}, "= 8 channels, but those of the CLIP have the"),
            ({"num_layer": 2}, "holds 'num_layer', which is no argument of `PriorTransformer`. Did you mean"),
            ({"_class_name": "UNet2DModel"}, "is the config of `UNet2DModel`; this script trains `PriorTransformer`"),
        ],
    )
    def test_configs(self, short, tmp_path, config, message):
        (tmp_path / "prior.json").write_text(json.dumps(TOY_PRIOR | config))
        with pytest.raises(ValueError, match=message):
            train(**short | {"model_config_name_or_path": str(tmp_path / "prior.json")})
        assert not Path(short["output_dir"]).exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"clip": None}, "Pass `--clip`"),
            ({"train_data_dir": None}, "Pass `--train_data_dir`"),
            ({"model_config_name_or_path": None}, "Pass either `--model_config_name_or_path`"),
            ({"train_data_dir": "{made}"}, "holds no embeddings.json. Name a folder that"),
            ({"train_data_dir": "{made}/test"}, "`random_flip` needs the embeddings of mirrored images"),
            ({"validation_data_dir": "nowhere"}, "`validation_data_dir` is 'nowhere', which holds no embeddings.json"),
            (
                {"validation_data_dir": "{made}/test", "validation_caption_column": "words"},
                "`validation_caption_column` is 'words', but .*test has the columns",
            ),
            ({"caption_column": "words"}, "`caption_column` is 'words', but .*train has the columns"),
            ({"caption_column": "label"}, "`caption_column` 'label' of .* is of type .*, which is not text"),
            ({"max_validation_samples": 3}, "`max_validation_samples` was given without `validation_data_dir`"),
            ({"caption_dropout_prob": 1.5}, r"`caption_dropout_prob` is 1.5; it must lie in \[0, 1\]"),
            (
                {"beta_end": 0.03},
                "`beta_end` is 0.03, but a new prior has the cosine noise schedule, .* drop `beta_end`",
            ),
            ({"clip_sample_range": 0.0}, "`clip_sample_range` is 0.0; it must be positive"),
            ({"validation_candidates": 0}, "`validation_candidates` is 0; it must be at least 1"),
            ({"validation_guidance_scale": "nan"}, "`validation_guidance_scale` is nan; it must be a finite number"),
            ({"validation_num_inference_steps": 1001}, "is 1001; the noise schedule .* allows 1000 at most"),
            ({"train_batch_size": 41}, "There are 40 usable images, but one step takes 41"),
        ],
    )
    def test_arguments(self, made, short, arguments, message):
        given = short | {
            name: value.format(made=made) if isinstance(value, str) else value for name, value in arguments.items()
        }
        with pytest.raises(ValueError, match=message):
            train(**{name: value for name, value in given.items() if value is not None})
        assert not Path(short["output_dir"], "prior").exists()

    @pytest.mark.parametrize("which", ["train_data_dir", "validation_data_dir"])
    def test_embeddings_of_another_clip(self, made, short, tmp_path, which):
        other = save_clip(tmp_path / "other", random_clip(seed=1))
        folder = save_embeddings(tmp_path / "others", other, made / "train.parquet", random_flip=True)
        with pytest.raises(ValueError, match="others are those of another CLIP, .*other, whose fingerprint is"):
            train(**short | {which: folder})

    def test_another_clip_of_a_resumed_run(self, short, tmp_path):
        """The same vision tower, so that the embeddings are the same, but other texts."""
        train(**short)
        clip = random_clip()
        clip.text_projection.weight.data *= 2
        save_clip(tmp_path / "other", clip)
        with pytest.raises(ValueError, match="the hash of the frozen text encoder is .*, and was"):
            train(output_dir=short["output_dir"], resume_from_checkpoint="latest", clip=tmp_path / "other")

    def test_towers_of_other_widths(self, made):
        text = load_clip_text("clip", str(made / "clip"))
        with pytest.raises(ValueError, match="have the width 12, but the text tower of `clip` projects to 16"):
            fit_prior_config(TOY_PRIOR, 12, text, False)

    def test_states_of_another_width(self, made, short, tmp_path):
        """Refused, unless the prior takes them as they are; sampling does, too."""
        clip = save_clip(tmp_path / "clip", random_clip(text_width=20))
        data = save_embeddings(tmp_path / "data", clip, made / "train.parquet")
        given = short | {"clip": clip, "train_data_dir": data, "random_flip": False}
        with pytest.raises(ValueError, match=r"width 20 \(`hidden_size`\), but `PriorTransformer` projects .* 16. Use"):
            train(**given)
        config = {"num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1, "encoder_hid_proj_type": None}
        (tmp_path / "prior.json").write_text(json.dumps(config))
        train(**given | {"model_config_name_or_path": str(tmp_path / "prior.json")})
        sampler = load_result(short["output_dir"])[2]
        embeds = sampler.sample("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        assert embeds.shape == (1, CLIP_WIDTH)

    def test_a_channel_without_variation(self, made, short, tmp_path):
        clip = random_clip()
        clip.visual_projection.weight.data[3] = 0
        folder = save_clip(tmp_path / "clip", clip)
        data = save_embeddings(tmp_path / "data", folder, made / "train.parquet", random_flip=True)
        with pytest.raises(ValueError, match=r"the same value in 1 of 16 channels \(numbers 3, counted from 0\)"):
            train(**short | {"clip": folder, "train_data_dir": data})


def test_the_recipe():
    recipe = Path(train_prior.__file__).parent / "configs" / "prior_emoji_64.yaml"
    model_args, *_ = parse_args(PRIOR_ARGUMENTS, ["--config", str(recipe)])
    config = json.loads((recipe.parents[2] / model_args.model_config_name_or_path).read_text())
    prior = PriorTransformer(**config, embedding_dim=160, num_embeddings=20)
    assert prior.config.added_emb_type == "prd"
