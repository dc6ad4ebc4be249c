"""Fine-tuning on other classes than those of the pretrained network: the row of each class before and after."""

import logging
from random import Random

import datasets
import pytest
import torch
from runs import SHORT_RUN, flags, own_process_state, reset_accelerate, save_base, write_class_folders
from safetensors.torch import load_file
from scripts import load_script
from toy_models import random_classifier, random_unet

from diffusers_adm import (
    AdaGNClassifierModel,
    AdaGNControlNetModel,
    AdaGNUNet2DModel,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conditioning import class_labels
from diffusers_adm.training import ClassPlan, load_id2label, plan_classes, renumber_labels, save_id2label, validation
from diffusers_adm.training import run as training_run
from diffusers_adm.training.classifiers import fit_classifier_head
from diffusers_adm.training.unets import fit_class_embedding


NAMES = {0: "cat", 1: "dog"}
CLASSES = {"num_class_embeds": 3, "null_class_id": 2}


scripts = {
    name: load_script(name) for name in ("train_adm", "train_classifier", "train_controlnet", "train_super_resolution")
}


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for script in scripts.values():
        for plot in ("plot_classifier_curves",):  # slow, and tested elsewhere
            monkeypatch.setattr(script, plot, lambda *args: None, raising=False)
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)
    with own_process_state("train_adm"), own_process_state("train_classifier"):
        yield


@pytest.fixture
def short(tmp_path):
    """Arguments of a run of two steps on images of cats and cows, to fine-tune a model of cats and dogs."""
    return SHORT_RUN | {
        "pretrained_model_name_or_path": save_base(tmp_path / "base", random_unet(**CLASSES), id2label=NAMES),
        "train_data_dir": write_class_folders(tmp_path / "images", {"cat": 8, "cow": 8}),
        "label_column": "label",
        "use_ema": False,
        "learning_rate": 1e-2,
        "output_dir": str(tmp_path / "run"),
    }


def train(script="train_adm", **arguments):
    """One run in this process."""
    reset_accelerate()
    scripts[script].main(flags(**arguments))


def rows_of(folder):
    return load_file(f"{folder}/unet/diffusion_pytorch_model.safetensors")["class_embedding.weight"]


def moved(before, after):
    """Which rows training has changed. Without a gradient Adam's step is exactly 0, and a row stays bit by bit."""
    return [not torch.equal(*pair) for pair in zip(before, after, strict=True)]


# 1. The plan: names and numbers only


class TestPlan:
    @pytest.mark.parametrize(
        ("data", "options", "sources", "null_class_id", "names", "to_row"),
        [
            # cat 0, dog 1, null 2
            (["cat", "dog"], {}, (0, 1, 2), 2, ["cat", "dog"], [0, 1]),
            (["dog"], {}, (0, 1, 2), 2, ["cat", "dog"], [1]),
            (["cow", "dog"], {}, (0, 1, None, 2), 3, ["cat", "dog", "cow"], [2, 1]),
            (["ape", "bee"], {}, (0, 1, None, None, 2), 4, ["cat", "dog", "ape", "bee"], [2, 3]),
            (["cow", "dog"], {"replaces": True}, (None, 1, 2), 2, ["cow", "dog"], [0, 1]),
            (["dog"], {"replaces": True}, (1, 2), 1, ["dog"], [0]),
            # a null class that is not the last row stays where it is, unless the classes are replaced
            (["cow", "dog"], {"null_class_id": 0, "known": {1: "cat", 2: "dog"}}, (0, 1, 2, None), 0, None, [3, 2]),
            (
                ["dog"],
                {"null_class_id": 0, "known": {1: "cat", 2: "dog"}, "replaces": True},
                (2, 0),
                1,
                ["dog"],
                [0],
            ),
            # no null class: cat 0, dog 1, pig 2
            (["dog"], {"null_class_id": None}, (0, 1, 2), None, ["cat", "dog", "pig"], [1]),
            (["cow"], {"null_class_id": None}, (0, 1, 2, None), None, ["cat", "dog", "pig", "cow"], [3]),
            (
                ["cow"],
                {"null_class_id": None, "adds_null": True},
                (0, 1, 2, None, None),
                4,
                ["cat", "dog", "pig", "cow"],
                [3],
            ),
            (["pig"], {"null_class_id": None, "adds_null": True, "replaces": True}, (2, None), 1, ["pig"], [0]),
            # no rows at all: an unconditional network, whose pipeline may name the classes of its classifier
            (["dog", "eel"], {"num_rows": 0, "null_class_id": None}, (None, None), None, ["dog", "eel"], [0, 1]),
            (["eel"], {"num_rows": 0, "null_class_id": None, "adds_null": True}, (None, None), 1, ["eel"], [0]),
            # no names: as many classes, so they are taken for the same
            (["ape", "bee"], {"known": {}}, (0, 1, 2), 2, ["ape", "bee"], [0, 1]),
            (["ape", "bee"], {"known": {}, "replaces": True}, (None, None, 2), 2, ["ape", "bee"], [0, 1]),
            (["ape"], {"known": {}, "replaces": True}, (None, 2), 1, ["ape"], [0]),
            # the null class keeps its name
            (["cow"], {"known": NAMES | {2: "any"}}, (0, 1, None, 2), 3, ["cat", "dog", "cow", "any"], [2]),
            (["any", "cow"], {"known": {2: "any"}, "replaces": True}, (None, 2), 1, ["cow", "any"], [1, 0]),
        ],
    )
    def test_by_hand(self, data, options, sources, null_class_id, names, to_row):
        known = {0: "cat", 1: "dog", 2: "pig"} if options.get("null_class_id", 2) is None else NAMES
        given = {"known": known, "num_rows": 3, "null_class_id": 2} | options
        plan = plan_classes(dict(enumerate(data)), **given)
        assert plan.sources == sources
        assert plan.null_class_id == null_class_id
        assert plan.to_row == dict(enumerate(to_row))
        expected = {1: "cat", 2: "dog", 3: "cow"} if names is None else dict(enumerate(names))
        assert plan.id2label == expected

    @pytest.mark.parametrize("seed", range(50))
    def test_whatever_the_classes(self, seed):
        """Each name keeps its row's weights, each row has the right name, and nothing else remains."""
        random = Random(seed)
        animals = [f"animal {number}" for number in range(12)]
        known_names, data = random.sample(animals, random.randint(1, 6)), random.sample(animals, random.randint(1, 6))
        null = random.choice([None, *range(len(known_names) + 1)])
        num_rows = len(known_names) + (null is not None)
        known = dict(zip([row for row in range(num_rows) if row != null], known_names, strict=True))
        adds_null, replaces = random.random() < 0.5, random.random() < 0.5
        plan = plan_classes(dict(enumerate(data)), known, num_rows, null, adds_null=adds_null, replaces=replaces)
        old_row = {name: row for row, name in known.items()}
        names = set(data) if replaces else set(data) | set(known_names)
        assert sorted(plan.id2label.values()) == sorted(names)
        for row, name in plan.id2label.items():
            assert plan.sources[row] == old_row.get(name)
        assert [plan.id2label[plan.to_row[number]] for number in range(len(data))] == data
        if null is None and not adds_null:
            assert plan.null_class_id is None
        else:
            assert plan.sources[plan.null_class_id] == null
            assert plan.null_class_id not in plan.id2label
        assert len(plan.sources) == len(names) + (plan.null_class_id is not None)
        if replaces:
            assert [plan.to_row[number] for number in range(len(data))] == list(range(len(data)))
        elif null is None or null == num_rows - 1:
            assert all(plan.id2label[row] == name for row, name in known.items())
        assert set(plan.added) == set(data) - set(known_names)
        assert set(plan.absent) == (set() if replaces else set(known_names) - set(data))
        assert set(plan.dropped) == (set(known_names) - set(data) if replaces else set())

    @pytest.mark.parametrize(
        ("data", "known", "options", "message"),
        [
            (["ape"], {}, {}, "has 1 class.*, the pretrained U-Net has 2 and names none, .* 'ape' would be"),
            (["cat", "cow"], {0: "cat"}, {}, "has 2 and names 1 of them, .* them 'cow' would be. Pass `--replace"),
            (["ape"], {}, {"frozen": "it stays"}, r"would be\. Name all its classes"),
            (["ape", "dog"], NAMES, {"frozen": "it stays"}, "lacks: 'ape'. They need new rows, but it stays."),
            (["ape", "cat"], {0: "cat", 1: "cat"}, {}, "has a class 'cat', but classes 0 and 1 .* both have this name"),
        ],
    )
    def test_refused(self, data, known, options, message):
        with pytest.raises(ValueError, match=message):
            plan_classes(dict(enumerate(data)), known, 3, 2, **options)

    def test_long_lists_are_cut(self):
        with pytest.raises(ValueError, match="'9' and 15 more would be"):
            plan_classes({number: str(number) for number in range(25)}, {}, 3, 2)


class TestRows:
    @pytest.mark.parametrize("null_class_id", [None, 2])
    def test_of_a_class_embedding(self, null_class_id):
        unet = random_unet(num_class_embeds=3, null_class_id=null_class_id)
        before = unet.class_embedding.weight.detach().clone()
        state = torch.get_rng_state()
        plan = ClassPlan((2, None, 0), 1, {}, {}, (), (), ())
        fit_class_embedding(unet, plan)
        assert torch.equal(torch.get_rng_state(), state)  # the random numbers of a run do not depend on it
        after = unet.class_embedding.weight
        assert torch.equal(after[[0, 2]], before[[2, 0]])  # copies
        new = before[2] if null_class_id == 2 else (before[0] + before[1] + before[2]) / 3
        torch.testing.assert_close(after[1].detach(), new)
        assert after.requires_grad
        assert (unet.config.num_class_embeds, unet.config.null_class_id) == (3, 1)
        AdaGNUNet2DModel.from_config(unet.config).load_state_dict(unet.state_dict())  # config and weights agree

    def test_of_an_unconditional_network(self):
        unet = random_unet()
        fit_class_embedding(unet, ClassPlan((None, None, None), 2, {}, {}, (), (), ()))
        assert unet.class_embedding.weight.shape == (3, unet.time_embed_dim)
        assert not unet.class_embedding.weight.any()
        # Both arguments were defaults, which diffusers would ignore in the config of a network in memory.
        AdaGNUNet2DModel.from_config(unet.config).load_state_dict(unet.state_dict())
        assert AdaGNControlNetModel.from_unet(unet).config.num_class_embeds == 3

    def test_of_a_classifier(self):
        for pool in ("attention", "adaptive", "spatial", "spatial_v2"):
            classifier = random_classifier(pool=pool)
            head = {"attention": "head.to_out", "adaptive": "head", "spatial": "head.2", "spatial_v2": "head.3"}[pool]
            before = [parameter.detach().clone() for parameter in classifier.get_submodule(head).parameters()]
            fit_classifier_head(classifier, ClassPlan((4, None), None, {}, {}, (), (), ()))
            for old, new in zip(before, classifier.get_submodule(head).parameters(), strict=True):
                assert torch.equal(new[0], old[4])
                torch.testing.assert_close(new[1].detach(), old.sum(0) / 5)
                assert new.requires_grad
            AdaGNClassifierModel.from_config(classifier.config).load_state_dict(classifier.state_dict())


def test_labels_are_renumbered():
    dataset = datasets.Dataset.from_dict({"image": ["a", "b", "c", "d"], "label": [0, 1, -1, 0]})
    renumbered = renumber_labels(dataset, {0: 1, 1: 0})
    assert renumbered["label"][:] == [1, 0, -1, 1]
    assert renumbered["image"][:] == ["a", "b", "c", "d"]
    assert renumber_labels(dataset, {0: 0, 1: 1}) is dataset  # and what was cached of it is found again


# 2. Fine-tuning


class TestUNet:
    def test_images_of_some_classes_train_the_rows_of_their_names(self, short, tmp_path):
        """Only dogs: by the numbers of the folders they would be class 0, the cats."""
        short["train_data_dir"] = write_class_folders(tmp_path / "dogs", {"dog": 8})
        train(**short, class_dropout_prob=0)
        base, result = (rows_of(short[name]) for name in ("pretrained_model_name_or_path", "output_dir"))
        assert moved(base, result) == [False, True, False]
        assert ADMPipeline.from_pretrained(short["output_dir"]).id2label == NAMES

    def test_other_order(self, short, tmp_path):
        names = {0: "dog", 1: "cat"}
        short["pretrained_model_name_or_path"] = save_base(tmp_path / "other", random_unet(**CLASSES), id2label=names)
        short["train_data_dir"] = write_class_folders(tmp_path / "cats", {"cat": 8})
        train(**short, class_dropout_prob=0)
        base, result = (rows_of(short[name]) for name in ("pretrained_model_name_or_path", "output_dir"))
        assert moved(base, result) == [False, True, False]
        assert ADMPipeline.from_pretrained(short["output_dir"]).id2label == names

    def test_new_classes(self, short, caplog):
        """They come behind the old ones, and the null class behind them."""
        train(**short, class_dropout_prob=0.5, validation_guidance_scale=2.0)
        base, result = (rows_of(short[name]) for name in ("pretrained_model_name_or_path", "output_dir"))
        assert len(result) == 4
        cat, dog, null = base
        assert moved([cat, dog, null, null], result) == [True, False, True, True]
        pipe = ADMPipeline.from_pretrained(short["output_dir"])
        assert pipe.unet.config.num_class_embeds == 4
        assert pipe.unet.config.null_class_id == 3
        assert pipe.id2label == {0: "cat", 1: "dog", 2: "cow"}
        given = {"num_inference_steps": 2, "output_type": "pt", "latents": torch.ones(1, 3, 8, 8)}
        cow, dog = (
            pipe(class_labels=name, guidance_scale=2.0, generator=torch.Generator().manual_seed(0), **given).images
            for name in ("cow", "dog")
        )
        assert not torch.allclose(cow, dog)
        assert "new: 'cow'" in caplog.text
        assert "without images here, kept: 1 ('dog')" in caplog.text

    def test_a_resumed_run_has_the_same_rows(self, short):
        train(**short | {"max_train_steps": 1})
        train(**short, resume_from_checkpoint="latest")
        assert ADMPipeline.from_pretrained(short["output_dir"]).id2label == {0: "cat", 1: "dog", 2: "cow"}

    def test_a_null_class_is_added(self, short, tmp_path, caplog):
        unet = random_unet(num_class_embeds=2)
        short["pretrained_model_name_or_path"] = save_base(tmp_path / "other", unet, id2label=NAMES)
        train(**short, validation_guidance_scale=2.0)
        pipe = ADMPipeline.from_pretrained(short["output_dir"])
        assert pipe.unet.config.num_class_embeds == 4
        assert pipe.unet.config.null_class_id == 3
        assert pipe(class_labels="cow", guidance_scale=3.0, num_inference_steps=2).images[0].size == (8, 8)
        assert "gets a null class" in caplog.text

    def test_without_class_dropout_there_is_none(self, short, tmp_path):
        unet = random_unet(num_class_embeds=2)
        short["pretrained_model_name_or_path"] = save_base(tmp_path / "other", unet, id2label=NAMES)
        train(**short, class_dropout_prob=0)
        config = AdaGNUNet2DModel.load_config(short["output_dir"], subfolder="unet")
        assert (config["num_class_embeds"], config["null_class_id"]) == (3, None)

    def test_replaced_classes(self, short, caplog):
        train(**short, replace_classes=True, class_dropout_prob=0)
        pipe = ADMPipeline.from_pretrained(short["output_dir"])
        assert pipe.id2label == {0: "cat", 1: "cow"}
        assert (pipe.unet.config.num_class_embeds, pipe.unet.config.null_class_id) == (3, 2)
        assert torch.equal(rows_of(short["output_dir"])[2], rows_of(short["pretrained_model_name_or_path"])[2])
        with pytest.raises(ValueError, match="'dog', but the classes of this pipeline are"):
            pipe(class_labels="dog")
        assert "Classes of the U-Net dropped: 1 ('dog')" in caplog.text

    def test_an_unconditional_model_gets_classes(self, short, tmp_path):
        unet = random_unet()
        short["pretrained_model_name_or_path"] = save_base(tmp_path / "other", unet)
        train(**short | {"learning_rate": 1e-12})
        pipe = ADMPipeline.from_pretrained(short["output_dir"])
        assert pipe.id2label == {0: "cat", 1: "cow"}
        assert (pipe.unet.config.num_class_embeds, pipe.unet.config.null_class_id) == (3, 2)
        x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 500])
        with torch.no_grad():
            expected, given = unet(x, t).sample, pipe.unet(x, t, torch.tensor([0, 2])).sample
        # Rows of 0 change nothing; two steps of 1e-12 move float32 weights by less than they can hold, if at all.
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)

    def test_a_model_without_names(self, short, tmp_path, caplog):
        short["pretrained_model_name_or_path"] = save_base(tmp_path / "other", random_unet(**CLASSES))
        train(**short, class_dropout_prob=0)
        assert "names no classes" in caplog.text
        assert ADMPipeline.from_pretrained(short["output_dir"]).id2label == {0: "cat", 1: "cow"}

    @pytest.mark.parametrize("classes", [("cat",), ("cat", "cow", "dog")])
    def test_a_model_without_names_and_with_another_number_of_classes(self, short, tmp_path, classes):
        short["pretrained_model_name_or_path"] = save_base(tmp_path / "other", random_unet(**CLASSES))
        short["train_data_dir"] = write_class_folders(tmp_path / "few", dict.fromkeys(classes, 8))
        with pytest.raises(ValueError, match=f"has {len(classes)} class.* has 2 .*none.*`--replace_classes`.*id2label"):
            train(**short)
        train(**short, replace_classes=True)
        assert ADMPipeline.from_pretrained(short["output_dir"]).id2label == dict(enumerate(classes))

    def test_a_model_that_names_some_of_its_classes(self, short, tmp_path):
        short["pretrained_model_name_or_path"] = save_base(
            tmp_path / "other", random_unet(**CLASSES), id2label={0: "cat"}
        )
        with pytest.raises(ValueError, match="has 2 and names 1 of them, so .* 'cow' would be"):
            train(**short)
        short["train_data_dir"] = write_class_folders(tmp_path / "cats", {"cat": 8})
        train(**short)
        assert ADMPipeline.from_pretrained(short["output_dir"]).id2label == {0: "cat"}

    def test_names_without_any_in_common(self, short, tmp_path, caplog):
        short["train_data_dir"] = write_class_folders(tmp_path / "others", {"n01": 8, "n02": 8})
        train(**short)
        assert ADMPipeline.from_pretrained(short["output_dir"]).id2label == {0: "cat", 1: "dog", 2: "n01", 3: "n02"}
        assert any(
            "knows none of the data's classes" in r.message and r.levelno == logging.WARNING for r in caplog.records
        )

    def test_names_survive_training_without_labels(self, short):
        train(**short | {"label_column": "none"})
        assert ADMPipeline.from_pretrained(short["output_dir"]).id2label == NAMES

    def test_validation_shows_the_classes_of_the_data(self, short, monkeypatch):
        shown = []
        generate = validation.generate
        monkeypatch.setattr(
            validation, "generate", lambda pipe, wanted, args: shown.append(wanted) or generate(pipe, wanted, args)
        )
        train(**short)
        assert [wanted["class_labels"] for wanted in shown[-1]] == [0, 2]  # cat and cow, without the dog

    def test_balanced_classes_are_those_of_the_model(self, short, tmp_path):
        short["train_data_dir"] = write_class_folders(tmp_path / "dogs", {"dog": 4, "cow": 4})
        train(**short, class_balanced=True, class_dropout_prob=0)
        base, result = (rows_of(short[name]) for name in ("pretrained_model_name_or_path", "output_dir"))
        assert moved([*base[:2], base[2], base[2]], result) == [False, True, True, False]

    def test_upsamplers(self, short, tmp_path):
        base = tmp_path / "upsampler"
        parts = {"unet": random_unet(in_channels=6, **CLASSES), "scheduler": LearnedVarianceDDPMScheduler()}
        parts |= dict.fromkeys(("vae", "text_encoder", "tokenizer", "classifier"))
        ADMSuperResolutionPipeline(**parts, id2label=NAMES, low_res_size=4).save_pretrained(base)
        train("train_super_resolution", **short | {"pretrained_model_name_or_path": str(base)})
        assert ADMPipeline.load_config(short["output_dir"])["id2label"] == {"0": "cat", "1": "dog", "2": "cow"}
        assert len(rows_of(short["output_dir"])) == 4


class TestFrozenUNet:
    """An adapter or a ControlNet leaves the table of classes as it is."""

    def test_known_classes_are_matched_by_name(self, short, tmp_path, monkeypatch):
        short["train_data_dir"] = write_class_folders(tmp_path / "dogs", {"dog": 8})
        for script, arguments in (
            ("train_adm", {"lora_rank": 2, "validation_guidance_scale": 2.0}),
            ("train_controlnet", {"condition": "edges", "conditioning_embedding_out_channels": 4}),
        ):
            seen = set()
            drop = class_labels.drop_labels
            monkeypatch.setattr(
                class_labels, "drop_labels", lambda *a, d=drop, s=seen: s.update(a[0].tolist()) or d(*a)
            )
            train(script, **short | {"output_dir": str(tmp_path / script)}, **arguments)
            assert seen == {1}

    @pytest.mark.parametrize(
        ("script", "arguments", "reason"),
        [
            ("train_adm", {"lora_rank": 2}, "`lora_rank`"),
            ("train_controlnet", {"condition": "edges"}, "ControlNet"),
        ],
    )
    def test_refused(self, short, tmp_path, script, arguments, reason):
        arguments = short | arguments
        with pytest.raises(ValueError, match=rf"'cow'.*{reason}"):
            train(script, **arguments)
        with pytest.raises(ValueError, match=rf"`replace_classes`.*{reason}|{reason}.*`replace_classes`"):
            train(script, **arguments, replace_classes=True)
        arguments["train_data_dir"] = write_class_folders(tmp_path / "dogs", {"dog": 8})
        arguments["pretrained_model_name_or_path"] = save_base(
            tmp_path / "without_null", random_unet(num_class_embeds=2), id2label=NAMES
        )
        with pytest.raises(ValueError, match=rf"U-Net has no null class.*{reason}.*`--class_dropout_prob 0`"):
            train(script, **arguments)
        arguments["pretrained_model_name_or_path"] = save_base(tmp_path / "without_classes", random_unet())
        with pytest.raises(ValueError, match=rf"no class embedding.*{reason}.*Leave `label_column` out"):
            train(script, **arguments)


class TestClassifier:
    @pytest.fixture
    def base(self, tmp_path):
        def save(id2label=NAMES, **config):
            folder = tmp_path / "judge"
            classifier = random_classifier(**{"num_classes": 2, **config})
            classifier.save_pretrained(folder / "classifier")
            LearnedVarianceDDPMScheduler(num_train_timesteps=40).save_pretrained(folder / "scheduler")
            if id2label is not None:
                save_id2label(folder / "classifier", id2label)
            return classifier, str(folder)

        return save

    def fine_tune(self, short, base, **arguments):
        still = {"pretrained_model_name_or_path": base, "learning_rate": 1e-12}
        names = set(SHORT_RUN) - {"num_validation_images", "validation_num_inference_steps"}
        given = {k: v for k, v in short.items() if k in names or k in ("train_data_dir", "label_column", "output_dir")}
        train("train_classifier", **given | still | arguments)
        folder = f"{short['output_dir']}/classifier"
        return AdaGNClassifierModel.from_pretrained(folder), load_id2label(folder)

    @pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
    def test_new_classes(self, short, base, pool):
        """The logits of the old classes stay; that of a new class is their mean at first."""
        old, folder = base(pool=pool)
        new, id2label = self.fine_tune(short, folder)
        assert id2label == {0: "cat", 1: "dog", 2: "cow"}
        assert new.config.num_classes == 3
        x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 30])
        with torch.no_grad():
            before, after = old(x, t).logits, new.eval()(x, t).logits
        # Two steps of 1e-12 move weights by nothing that shows; a head of another width may round otherwise.
        torch.testing.assert_close(after[:, :2], before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[:, 2], before.mean(dim=1), rtol=1e-4, atol=1e-5)

    def test_fewer_classes_in_another_order(self, short, base, tmp_path, monkeypatch):
        names = {0: "dog", 1: "owl", 2: "cat"}
        _, folder = base(names, num_classes=3)
        short["train_data_dir"] = write_class_folders(tmp_path / "two", {"cat": 8, "dog": 8})
        labels = set()
        cross_entropy = torch.nn.functional.cross_entropy
        monkeypatch.setattr(
            torch.nn.functional, "cross_entropy", lambda *a, **k: labels.update(a[1].tolist()) or cross_entropy(*a, **k)
        )
        _, id2label = self.fine_tune(short, folder)
        assert id2label == names
        assert labels == {0, 2}

    def test_held_out_images_are_matched_too(self, short, base, tmp_path):
        _, folder = base()
        write_class_folders(tmp_path / "split" / "train", {"cow": 8, "dog": 8})
        write_class_folders(tmp_path / "split" / "test", {"cat": 2, "cow": 2})
        short["train_data_dir"] = str(tmp_path / "split")
        _, id2label = self.fine_tune(short, folder, validation_split="test")
        assert id2label == {0: "cat", 1: "dog", 2: "cow"}

    def test_replaced_classes(self, short, base):
        old, folder = base()
        new, id2label = self.fine_tune(short, folder, replace_classes=True)
        assert id2label == {0: "cat", 1: "cow"}
        torch.testing.assert_close(new.head.to_out.weight[0], old.head.to_out.weight[0])
        torch.testing.assert_close(new.head.to_out.weight[1], old.head.to_out.weight.mean(0))

    def test_without_names(self, short, base, tmp_path, caplog):
        _, folder = base(None)
        _, id2label = self.fine_tune(short, folder)
        assert id2label == {0: "cat", 1: "cow"}
        assert "names no classes" in caplog.text
        short["train_data_dir"] = write_class_folders(tmp_path / "three", {"cat": 8, "cow": 8, "owl": 8})
        with pytest.raises(ValueError, match="has 3 class.*classifier has 2.*`--replace_classes`"):
            self.fine_tune(short, folder, overwrite_output_dir=True)

    def test_of_a_pipeline(self, short, base, tmp_path):
        """Which keeps the names in its own config."""
        parts = {"unet": random_unet(num_class_embeds=2), "scheduler": LearnedVarianceDDPMScheduler()}
        pipe = ADMPipeline(**parts, vae=None, text_encoder=None, tokenizer=None, classifier=base()[0], id2label=NAMES)
        pipe.save_pretrained(tmp_path / "pipeline")
        _, id2label = self.fine_tune(short, str(tmp_path / "pipeline"))
        assert id2label == {0: "cat", 1: "dog", 2: "cow"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "none"}, "`replace_classes` was given without `label_column`"),
        (
            {"pretrained_model_name_or_path": "none", "model_config_name_or_path": "unet.json"},
            "`replace_classes` was given without `pretrained_model_name_or_path`",
        ),
    ],
)
def test_nothing_to_replace(short, changes, message):
    with pytest.raises(ValueError, match=message):
        train(**short | changes, replace_classes=True)
