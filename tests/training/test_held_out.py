"""Measures on held-out images: against the definition, of every task, over processes, and what is refused."""

import json
import math

import datasets
import numpy as np
import pytest
import test_train_latents
import torch
from PIL import Image
from processes import run_distributed
from runs import EMOJI, SHORT_RUN, flags, own_process_state, read_metrics, reset_accelerate, save_base
from scripts import load_script
from toy_models import TOY_CONFIG, WORDS, random_classifier, random_text_unet, random_unet

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.data.seeding import derive_seed
from diffusers_adm.evaluation import bits_per_dim, frechet_distance
from diffusers_adm.training import load_image_dataset, match_classes, renumber_labels, training_losses
from diffusers_adm.training import run as training_run
from diffusers_adm.training.held_out import loss_means, stratified_timesteps


NAMES = ("train_adm", "train_super_resolution", "train_image_to_image", "train_controlnet")
SCRIPTS = {name: load_script(name) for name in NAMES}
NUM_STEPS = 20  # timesteps: all of them are needed for bits per dimension


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_adm"):
        yield


def write_images(path, number, start=0):
    """Images of noise with captions and labels."""
    generator = np.random.default_rng(start)
    columns = {
        "image": [Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(number)],
        "text": [f"the {WORDS[index % 2 + 2]} {WORDS[index % 3 + 4]}" for index in range(number)],
        "label": [("round", "square")[index % 2] for index in range(number)],
    }
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("string")}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    write_images(folder / "train.parquet", 8)
    write_images(folder / "test.parquet", 7, start=1)  # not a whole number of batches
    random_classifier().save_pretrained(folder / "classifier")
    (folder / "unet.json").write_text(json.dumps(TOY_CONFIG))
    (folder / "upsampler.json").write_text(json.dumps({**TOY_CONFIG, "in_channels": 6, "time_cond_proj_dim": 6}))
    (folder / "inpainter.json").write_text(json.dumps({**TOY_CONFIG, "in_channels": 7}))
    (folder / "translator.json").write_text(json.dumps({**TOY_CONFIG, "in_channels": 6}))
    return folder


def arguments_of(made, **arguments):
    given = SHORT_RUN | {"train_batch_size": 4, "data_files": str(made / "train.parquet"), "max_train_steps": 1}
    given |= {"label_column": "label", "validation_data_files": str(made / "test.parquet"), "learning_rate": 1e-3}
    given |= {"ddpm_num_steps": NUM_STEPS, "num_validation_images": 1, "validation_num_inference_steps": 1}
    return {name: value for name, value in (given | arguments).items() if value is not None}


def train(made, folder, script="train_adm", **arguments):
    reset_accelerate()
    SCRIPTS[script].main(flags(**arguments_of(made, output_dir=str(folder), **arguments)))
    return [row for row in read_metrics(folder) if "validation_loss" in row][-1]


def all_measures(made):
    return {"validation_bits_per_dim": 3, "validation_frechet_network": str(made / "classifier")}


class TestTimesteps:
    def test_one_in_each_part_and_evenly_spaced_together(self):
        timesteps = stratified_timesteps(25, 1000, seed=0)
        assert timesteps.shape == (25, 4)
        assert ((timesteps // 250) == torch.arange(4)).all()
        assert timesteps.flatten().sort().values.diff().unique().tolist() == [10]
        assert not torch.equal(timesteps, stratified_timesteps(25, 1000, seed=1))

    def test_fewer_timesteps_than_places(self):
        assert stratified_timesteps(100, 3, seed=0).unique().tolist() == [0, 1, 2]
        assert stratified_timesteps(1, 1, seed=0).tolist() == [[0] * 4]

    def test_the_error_is_that_of_the_mean(self):
        """Over many sets of images, the mean lies within two standard errors in 95% of the cases."""
        generator = torch.Generator().manual_seed(0)
        timesteps, hits = stratified_timesteps(50, 100, seed=0), 0
        for _ in range(200):
            of_images = torch.randn(50, 1, 1, generator=generator, dtype=torch.float64)
            losses = of_images + 0.5 * torch.randn(50, 4, 3, generator=generator, dtype=torch.float64)
            values = loss_means(losses, timesteps, 100)
            hits += abs(values["loss"]) < 2 * values["loss_standard_error"]
        assert 180 <= hits <= 199


def test_the_definition(made, tmp_path):
    """Image by image, from what the run saved; bits per dimension by the function of the command."""
    row = train(made, tmp_path, model_config_name_or_path=str(made / "unet.json"), **all_measures(made))
    pipeline = ADMPipeline.from_pretrained(tmp_path)
    unet, scheduler = pipeline.unet, LearnedVarianceDDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    images, id2label = load_image_dataset(
        data_files=[str(made / "test.parquet")], split="train", image_column="image", label_column="label"
    )
    images = renumber_labels(
        images, match_classes(id2label, {int(number): name for number, name in pipeline.config.id2label.items()})
    )
    data = ImageDataset(images, 8, center_crop=True)
    timesteps = stratified_timesteps(len(data), NUM_STEPS, seed=0)
    losses = torch.zeros(*timesteps.shape)
    for index in range(len(data)):
        for part, timestep in enumerate(timesteps[index]):
            generator = torch.Generator().manual_seed(derive_seed(0, "held-out noise", index, part))
            with torch.no_grad():
                terms = training_losses(
                    unet,
                    scheduler,
                    data[index]["images"][None],
                    timestep[None],
                    noise=torch.randn(1, 3, 8, 8, generator=generator),
                    model_kwargs={"class_labels": data[index]["class_labels"][None]},
                )
            losses[index, part] = terms.loss
    by_image = losses.double().mean(dim=1)
    # Rounding of other batches.
    assert row["validation_loss"] == pytest.approx(by_image.mean().item(), rel=1e-5)
    assert row["validation_loss_standard_error"] == pytest.approx(by_image.std().item() / math.sqrt(7), rel=1e-4)
    expected = bits_per_dim(unet, scheduler, data, num_images=3, progress_bar=False)
    assert row["validation_bits_per_dim"] == pytest.approx(expected.bits_per_dim, rel=1e-5)
    assert row["validation_bits_per_dim_standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)
    # Samples of the classes of the images, each from its own noise.
    samples = pipeline(
        class_labels=[int(data[index]["class_labels"]) for index in range(7)],
        num_inference_steps=1,
        generator=[torch.Generator().manual_seed(number) for number in range(7)],
        output_type="pt",
    ).images
    classifier = random_classifier()
    with torch.no_grad():
        real, fake = (
            classifier(x, 0).features.double()
            for x in (torch.stack([data[index]["images"] for index in range(7)]), 2 * samples - 1)
        )
    distance = frechet_distance(real.mean(dim=0), real.T.cov(), fake.mean(dim=0), fake.T.cov())
    assert row["validation_frechet_distance"] == pytest.approx(distance, rel=1e-3)
    record = json.loads((tmp_path / "held_out.json").read_text())
    assert record["loss"] == row["validation_loss"]
    assert (record["num_images"], record["num_samples"], record["held_out"]) == (7, 7, True)


def tasks(made, folder):
    """Arguments of each task."""
    if not (folder / "base").exists():
        save_base(folder / "base", random_unet(num_class_embeds=3, null_class_id=2))
        save_base(folder / "text", random_text_unet(), "clip")
    text = {"pretrained_model_name_or_path": str(folder / "text"), "caption_column": "text", "label_column": None}
    return {
        "inpaint": {"task": "inpaint", "model_config_name_or_path": str(made / "inpainter.json")},
        "text": text,
        "precomputed": text | {"precompute_text_embeddings": True},
        "upsampler": {"script": "train_super_resolution", "low_res_size": 4, "max_noise_level": 5}
        | {"model_config_name_or_path": str(made / "upsampler.json")},
        "translation": {"script": "train_image_to_image", "source": "noise"}
        | {"model_config_name_or_path": str(made / "translator.json")},
        "controlnet": {"script": "train_controlnet", "condition": "low_resolution", "ddpm_num_steps": None}
        | {"pretrained_model_name_or_path": str(folder / "base"), "validation_bits_per_dim": None},
    }


@pytest.mark.parametrize("task", ["inpaint"])
def test_the_same_in_every_validation(made, tmp_path, task):
    """With weights that do not change, two validations give the same; conditions are there, and never dropped."""
    check_repeats(made, tmp_path, task)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text", "precomputed", "upsampler", "translation", "controlnet"])
def test_the_same_in_every_validation_of_others(made, tmp_path, task):
    check_repeats(made, tmp_path, task)


def check_repeats(made, tmp_path, task):
    given = all_measures(made) | {"learning_rate": 1e-30, "max_train_steps": 2, "validation_steps": 1}
    given |= {"validation_frechet_samples": 5, "seed": 3} | tasks(made, tmp_path)[task]
    last = train(made, tmp_path / "run", **given)
    first, again = (row for row in read_metrics(tmp_path / "run") if "validation_loss" in row)
    assert first | {"step": 2} == again == last
    names = {name.removeprefix("validation_") for name in last}
    assert {"loss", "mse", "vb", "loss_standard_error", "frechet_distance"} <= names
    assert ("bits_per_dim" in names) == (given["validation_bits_per_dim"] is not None)
    assert all(math.isfinite(value) for value in last.values())


@pytest.mark.slow
def test_validation_leaves_training_alone(made, tmp_path):
    given = {"model_config_name_or_path": str(made / "unet.json"), "max_train_steps": 2}
    train(made, tmp_path / "with", **given, **all_measures(made), validation_steps=1)
    reset_accelerate()
    without = {"validation_data_files": None, "output_dir": str(tmp_path / "without")}
    SCRIPTS["train_adm"].main(flags(**arguments_of(made, **given, **without)))
    rows = [[row for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("with", "without")]
    assert rows[0] == rows[1]
    first, second = (
        AdaGNUNet2DModel.from_pretrained(tmp_path / name, subfolder="unet") for name in ("with", "without")
    )
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.slow
def test_held_out_latents(made, tmp_path):
    """Stored ones for stored ones; images that are encoded otherwise."""
    vae, unet = test_train_latents.save_vae(tmp_path / "vae"), tmp_path / "unet.json"
    unet.write_text(json.dumps(test_train_latents.UNET))
    folders = {}
    for name in ("train", "test"):
        folders[name] = str(tmp_path / name)
        arguments = {"vae": vae, "data_files": str(made / f"{name}.parquet"), "resolution": 8, "dtype": "float32"}
        arguments |= {"label_column": "label", "output_dir": folders[name]}
        test_train_latents.encode_latents.main(flags(**arguments))
    given = {"vae": vae, "model_config_name_or_path": str(unet), "resolution": 8, "learning_rate": 1e-30}
    stored = given | {"data_files": None, "train_data_dir": folders["train"], "validation_data_files": None}
    of_images = train(made, tmp_path / "images", **given)
    of_latents = train(made, tmp_path / "latents", **stored, validation_data_dir=folders["test"])
    # The same noise for the sample of the posterior; rounding of the encoder in other batches.
    assert of_latents["validation_loss"] == pytest.approx(of_images["validation_loss"], rel=1e-4)
    with pytest.raises(ValueError, match="trained on stored latents, so the held-out ones must be stored, too"):
        train(made, tmp_path / "no", **stored | {"validation_data_files": str(made / "test.parquet")})
    with pytest.raises(ValueError, match="`validation_bits_per_dim` was given, but the model is trained in latents"):
        train(made, tmp_path / "no", **given, validation_bits_per_dim=2)
    with pytest.raises(ValueError, match="holds latents, but the run is trained on images"):
        train(made, tmp_path / "no", **given | {"validation_data_files": None}, validation_data_dir=folders["test"])


def measure_in_processes(arguments, folder):
    SCRIPTS["train_adm"].main(flags(**arguments, output_dir=folder))
    return [row for row in read_metrics(folder) if "validation_loss" in row]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(made, tmp_path):
    given = {"model_config_name_or_path": str(made / "unet.json"), "learning_rate": 1e-30, **all_measures(made)}
    alone = train(made, tmp_path / "one", **given)
    arguments = arguments_of(made, **given)
    (both, _) = run_distributed(measure_in_processes, arguments, str(tmp_path / "two"))
    assert both[-1] == pytest.approx(alone, rel=1e-5)  # rounding of other batches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_bits_per_dim": 2, "validation_data_files": None}, "`validation_bits_per_dim` is 2, which has no"),
        ({"validation_frechet_samples": 4}, "`validation_frechet_samples` was given without"),
        ({"validation_data_dir": "elsewhere"}, "Got `validation_data_files` and `validation_data_dir`"),
        ({"validation_frechet_network": "nowhere"}, "`validation_frechet_network`"),
        ({"validation_bits_per_dim": 0}, "`validation_bits_per_dim` is 0; it must be at least 1"),
    ],
)
def test_refused(made, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(made, tmp_path / "run", **{"model_config_name_or_path": str(made / "unet.json")} | changes)


def test_other_classes_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match="class"):
        train(
            made,
            tmp_path / "run",
            model_config_name_or_path=str(made / "unet.json"),
            validation_data_files=EMOJI,
            validation_num_inference_steps=1,
        )
