"""Networks inside the checkpoints of training loops: found where that is unambiguous, and said; else refused."""

import argparse
import json
import logging

import pytest
import torch
from glide_networks import GLIDE_NETWORKS
from openai_networks import NETWORKS

from diffusers_adm.conversion import common, convert_glide, convert_openai, glide, openai


NETWORK, OTHER = NETWORKS["residual"], NETWORKS["adaptive-pool"]
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def weights():
    return dict(NETWORK.weights())


def averaged():
    """Other numbers of the same shapes."""
    return {name: 0.5 * tensor for name, tensor in NETWORK.weights().items()}


def prefixed(prefix, state_dict):
    return {f"{prefix}{name}": tensor for name, tensor in state_dict.items()}


def without_dots(prefix, state_dict):
    """As one well-known class for averages names its buffers."""
    return {f"{prefix}{name.replace('.', '')}": tensor for name, tensor in state_dict.items()}


def optimizer():
    """A real one's state, with moments."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    return optimizer.state_dict()


class Loop(torch.nn.Module):
    """Networks as the modules of a training loop."""

    def __init__(self, **networks):
        super().__init__()
        for name, state_dict in networks.items():
            self.add_module(name, torch.nn.Module())
            for key, tensor in state_dict.items():
                module = getattr(self, name)
                *parts, last = key.split(".")
                for part in parts:
                    if part not in module._modules:
                        module.add_module(part, torch.nn.Module())
                    module = module._modules[part]
                module.register_parameter(last, torch.nn.Parameter(tensor.clone()))


def convert(content, folder, **arguments):
    torch.save(content, folder / "model.pt")
    arguments = {"model_flags": NETWORK.flags} | arguments
    return convert_openai(folder / "model.pt", folder / "out", **arguments)


def written(folder, component="unet"):
    return (folder / component / WEIGHTS_FILE).read_bytes()


@pytest.fixture
def plain(tmp_path):
    """The file of the same network, converted from its state dict alone; `key` names the one with the averages."""

    def plain(make=weights):
        folder = tmp_path / f"plain-{make.__name__}"
        folder.mkdir()
        convert(make(), folder)
        return written(folder / "out")

    return plain


# Name, content, what the log says.
UNAMBIGUOUS = {
    "distributed": (lambda: prefixed("module.", weights()), "'module'"),
    "compiled": (lambda: torch.nn.ModuleDict({"_orig_mod": Loop(net=weights()).net}).state_dict(), "'_orig_mod'"),
    "compiled-and-distributed": (lambda: prefixed("module._orig_mod.", weights()), "'module._orig_mod'"),
    "state-dict": (lambda: {"state_dict": weights()}, "'state_dict'"),
    "step-beside": (lambda: {"model": weights(), "step": 500}, "'model'; left aside: step (int)"),
    "optimizer-beside": (
        lambda: {"model": weights(), "optimizer": optimizer(), "loss": 0.5, "args": argparse.Namespace(lr=1e-4)},
        "'model'; left aside: optimizer (dict), loss (float), args (Namespace)",
    ),
    "settings-of-an-average": (
        lambda: {"model": weights(), "ema_rate": 0.999, "ema_config": {"decay": 0.999}},
        "'model'; left aside: ema_rate (float), ema_config (dict)",
    ),
    "lightning": (
        lambda: {
            "epoch": 3,
            "state_dict": Loop(model=weights(), criterion={"weight": torch.ones(2)}).state_dict(),
            "optimizer_states": [optimizer()],
        },
        "'state_dict.model'; left aside: epoch (int), optimizer_states (list), criterion.weight",
    ),
    "only-an-average": (lambda: {"ema": {"module": prefixed("module.", weights())}}, "'ema.module.module'"),
    "only-an-average-by-prefix": (lambda: prefixed("ema_model.", weights()) | {"step": torch.tensor(5)}, "'ema_model'"),
    "counter-beside": (
        lambda: torch.optim.swa_utils.AveragedModel(Loop(net=weights()).net).state_dict(),
        "'module'; left aside: n_averaged",
    ),
}


@pytest.mark.parametrize("name", UNAMBIGUOUS)
def test_unambiguous_wrappers_are_taken_off_and_named(name, tmp_path, plain, caplog):
    content, message = UNAMBIGUOUS[name]
    with caplog.at_level(logging.WARNING):
        result = convert(content(), tmp_path)
        expected = plain()  # of a plain file nothing is said
    said = [record.getMessage() for record in caplog.records if "took the network" in record.getMessage()]
    assert len(said) == 1
    assert message in said[0]
    assert written(result.output_dir) == expected
    record = json.loads((result.output_dir / "openai_checkpoint.json").read_text())
    assert f"'{record['key']}'" in message


AMBIGUOUS = {
    "beside": (lambda: {"model": weights(), "ema": averaged(), "step": 5}, "model", "ema"),
    "both-wrapped": (
        lambda: {"model": prefixed("module.", weights()), "model_ema": {"module": averaged()}},
        "model.module",
        "model_ema.module",
    ),
    "in-one-state-dict": (
        lambda: Loop(online_model=weights(), ema_model=averaged()).state_dict() | {"step": torch.tensor(7)},
        "online_model",
        "ema_model",
    ),
    "inside-the-other": (lambda: weights() | prefixed("ema.", averaged()), "", "ema"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_of_two_networks_none_is_taken_without_a_key(name, tmp_path, plain):
    make, raw, average = AMBIGUOUS[name]
    with pytest.raises(ValueError, match=f"holds 2 networks: '{raw}', '{average}'. Name one of them with `key`"):
        convert(make(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    for key, numbers in ((raw, weights), (average, averaged)):
        folder = tmp_path / f"with-{key}"
        folder.mkdir()
        assert written(convert(make(), folder, key=key).output_dir) == plain(numbers)


def test_a_key_may_leave_out_what_only_one_network_is_wrapped_in(tmp_path, plain):
    content = {"model": prefixed("module.", weights()), "model_ema": {"module": averaged()}}
    assert written(convert(content, tmp_path, key="model_ema").output_dir) == plain(averaged)


AVERAGES = {
    "list": lambda: {"model": weights(), "ema": {"decay": 0.999, "shadow_params": list(averaged().values())}},
    "without-dots": lambda: prefixed("model.", weights()) | without_dots("model_ema.", averaged()),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_that_cannot_be_read_are_not_passed_over(name, tmp_path, plain):
    with pytest.raises(ValueError, match="averaged weights as '(model_)?ema', in a form .* Pass `key='model'`"):
        convert(AVERAGES[name](), tmp_path)
    assert written(convert(AVERAGES[name](), tmp_path, key="model").output_dir) == plain()


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"model": weights()}, "ema", r"`key` is 'ema', .* holds no network.* has: 'model'"),
        (weights(), "model", r"`key` is 'model', .* has: ''"),
        ({"model": averaged(), "ema": averaged()}, "m", r"`key` is 'm', .* has: 'model', 'ema'"),
        ({"state_dict": prefixed("a.", weights()) | prefixed("b.", weights())}, "state_dict", "'state_dict.a', 's"),
        (optimizer(), "state", r"it holds state \(dict\), param_groups \(list\)"),
        ({"model": weights() | {"step": 5}}, None, r"besides tensors it holds step \(int\)"),
        (prefixed("module.", weights()) | {"module.step": torch.tensor(5)}, None, "not plain floating-point: step"),
        ({"model": weights() | {"extra.bias": torch.zeros(2)}}, None, r"not used: extra.bias \(2,\)"),
    ],
)
def test_what_is_left_to_refuse(content, key, message, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert(content, tmp_path, key=key)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


class Config:
    """Of a training loop: reading it could run code."""

    def __init__(self):
        self.learning_rate = 1e-4


def test_objects_that_are_not_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"an object of .*Config.*could run code.*only the state dict of the network"):
        convert({"model": weights(), "config": Config()}, tmp_path)


def test_a_network_and_its_classifier_in_one_file(tmp_path):
    content = {"unet": weights(), "classifier": prefixed("module.", OTHER.weights())}
    with pytest.raises(ValueError, match="holds 2 networks: 'unet', 'classifier.module'"):
        convert(content, tmp_path)
    assert convert(content, tmp_path, key="unet").kind == "unet"
    result = convert_openai(
        tmp_path / "model.pt", tmp_path / "classifier", model_flags=OTHER.flags, key="classifier.module"
    )
    assert result.kind == "classifier"
    assert result.num_parameters == sum(tensor.numel() for tensor in OTHER.weights().values())


def test_upsamplers(tmp_path):
    network = NETWORKS["grey-upsampler"]
    result = convert({"state_dict": prefixed("model.", network.weights())}, tmp_path, model_flags=network.flags)
    assert result.kind == "upsampler"


def test_glide(tmp_path, caplog):
    network = GLIDE_NETWORKS["base"]
    convert_glide(network.save(tmp_path), tmp_path / "plain", model_flags=network.flags)
    content = {"model": prefixed("module.", network.weights()), "opt": optimizer()}
    torch.save(content, tmp_path / "wrapped.pt")
    convert_glide(tmp_path / "wrapped.pt", tmp_path / "out", model_flags=network.flags)
    assert "took the network from 'model.module'; left aside: opt (dict)" in caplog.text
    for component, file in (("unet", WEIGHTS_FILE), ("text_encoder", WEIGHTS_FILE)):
        ours, theirs = (tmp_path / folder / component / file for folder in ("out", "plain"))
        assert ours.read_bytes() == theirs.read_bytes()
    torch.save({"model": dict(network.weights()), "ema": dict(network.weights())}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="holds 2 networks: 'model', 'ema'"):
        convert_glide(tmp_path / "two.pt", tmp_path / "two", model_flags=network.flags)
    glide.main(
        ["--checkpoint", f"{tmp_path}/two.pt", "--output_dir", f"{tmp_path}/two", "--key", "ema"]
        + ["--model_flags", network.flags]
    )
    assert (tmp_path / "two" / "model_index.json").is_file()


def test_command_line(tmp_path, plain):
    torch.save({"model": weights(), "ema": averaged()}, tmp_path / "model.pt")
    arguments = ["--checkpoint", f"{tmp_path}/model.pt", "--output_dir", f"{tmp_path}/out"]
    arguments += ["--model_flags", NETWORK.flags]
    with pytest.raises(ValueError, match="holds 2 networks"):
        openai.main(arguments)
    openai.main([*arguments, "--key", "ema"])
    assert written(tmp_path / "out") == plain(averaged)


def test_large_files_are_mapped_in_several_turns(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(common, "MAPPED_BYTES", 1000)
    content = {"model": prefixed("module.", weights()), "ema": averaged()}
    assert written(convert(content, tmp_path, key="model").output_dir) == plain()
