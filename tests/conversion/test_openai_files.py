"""Which files are converted, which are refused and why, and that nothing is left behind then."""

import os
import pickle
from collections import OrderedDict

import pytest
import torch
from docstrings import check_documented_arguments
from openai_networks import NETWORKS

from diffusers_adm import AdaGNUNet2DModel
from diffusers_adm.conversion import ConvertedCheckpoint, common, convert_openai, openai_checkpoints


NETWORK = NETWORKS["defaults"]


@pytest.fixture
def convert(tmp_path):
    """Converts what is given: bytes of a file, or an object for `torch.save`."""

    def convert(content, **arguments):
        file = tmp_path / "model.pt"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        return convert_openai(file, tmp_path / "out", **({"model_flags": NETWORK.flags} | arguments))

    return convert


@pytest.fixture
def refused(convert, tmp_path):
    """Asserts that something is refused with this message, and that no trace of it remains."""

    def refused(content, message, **arguments):
        with pytest.raises(ValueError, match=message):
            convert(content, **arguments)
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]

    return refused


def weights():
    return OrderedDict(NETWORK.weights())


def archive(tmp_path, zipped=True):
    """The bytes of a good file, in torch's present or in its old format."""
    file = tmp_path / "model.pt"
    torch.save(weights(), file, _use_new_zipfile_serialization=zipped)
    return file.read_bytes()


def flat_views(state_dict):
    """Views of one long tensor, as the fp16 trainers save their master copy."""
    flat = torch.cat([tensor.reshape(-1) for tensor in state_dict.values()])
    pieces = flat.split([tensor.numel() for tensor in state_dict.values()])
    return OrderedDict((name, p.view(t.shape)) for (name, t), p in zip(state_dict.items(), pieces, strict=True))


def as_parameters(state_dict):
    return OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in state_dict.items())


def strided(state_dict):
    """The same numbers in another order in memory."""
    return {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in state_dict.items()}


def in_another_order(state_dict):
    return dict(reversed(state_dict.items()))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old-format"])
@pytest.mark.parametrize("change", [dict, flat_views, as_parameters, strided, in_another_order])
def test_state_dicts_of_every_make_give_the_same_network(change, zipped, tmp_path):
    torch.save(change(weights()), tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    convert_openai(tmp_path / "model.pt", tmp_path / "out", model_flags=NETWORK.flags)
    convert_openai(NETWORK.save(tmp_path), tmp_path / "plain", model_flags=NETWORK.flags)
    weights_file = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / weights_file).read_bytes() == (tmp_path / "plain" / weights_file).read_bytes()


def test_a_mapping_is_made_anew_without_a_change(tmp_path, monkeypatch):
    """Large files are mapped into memory in several turns."""
    file = NETWORK.save(tmp_path)
    convert_openai(file, tmp_path / "once", model_flags=NETWORK.flags)
    monkeypatch.setattr(common, "MAPPED_BYTES", 1000)
    convert_openai(file, tmp_path / "often", model_flags=NETWORK.flags)
    once, often = (AdaGNUNet2DModel.from_pretrained(tmp_path / name, subfolder="unet") for name in ("once", "often"))
    for ours, theirs in zip(once.parameters(), often.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old-format"])
@pytest.mark.parametrize("fraction", [0.0, 1e-5, 1e-3, 0.5, 0.999])
def test_a_file_cut_short_is_refused(zipped, fraction, tmp_path, refused):
    content = archive(tmp_path, zipped)
    refused(content[: int(fraction * len(content))], r"cannot be read as a file of `torch.save`.* cut short")


def test_a_damaged_file_is_refused(tmp_path, refused):
    """torch itself does not look at the checksums of an archive."""
    content = bytearray(archive(tmp_path))
    content[len(content) // 2] ^= 1
    refused(bytes(content), r"model.pt is damaged in .*data/")


def test_an_archive_without_checksums_is_converted(tmp_path, convert):
    torch.serialization.set_crc32_options(False)
    try:
        result = convert(weights())
    finally:
        torch.serialization.set_crc32_options(True)
    assert (result.output_dir / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04", b"PK\x03\x04" + bytes(999), bytes(5000), b"\x80\x02}."])
def test_another_file_is_refused(content, refused):
    refused(content, "cannot be read as a file of `torch.save`")


class Attack:
    """Unpickled by an unwary reader, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old-format"])
def test_code_in_a_file_is_not_run(zipped, tmp_path, tmp_path_factory, refused):
    folder = tmp_path_factory.mktemp("attacked") / "made"
    torch.save({**weights(), "attack": Attack(folder)}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "model.pt").read_bytes()
    for attack in (content, pickle.dumps(Attack(folder)), pickle.dumps(Attack(folder), protocol=2)):
        refused(attack, "holds only tensors")
        assert not folder.exists()
    # The attack is a real one.
    (tmp_path / "model.pt").write_bytes(content)
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert folder.exists()


def optimizer_state():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "content, message",
    [
        (optimizer_state(), r"it holds state \(dict\), param_groups \(list\).* opt\*.pt is the state of an optimizer"),
        ([torch.zeros(3)], "holds a list, not a state dict"),
        ({}, "holds a dict, not a state dict"),
        (torch.zeros(3), "holds a Tensor, not a state dict"),
        ({"state_dict": optimizer_state()}, r"besides tensors it holds state_dict \(dict\)"),
        (weights() | {"step": torch.zeros(1, dtype=torch.long)}, "not plain floating-point: step"),
        (weights() | {"out.0.bias": torch.zeros(32).to_sparse()}, "not plain floating-point: out.0.bias"),
        (weights() | {"out.0.bias": torch.zeros(32, device="meta")}, "not plain floating-point: out.0.bias"),
        (
            {f"net.{name}": tensor for name, tensor in list(weights().items())[5:]},
            "not a U-Net or classifier of guided",
        ),
        ({5: torch.zeros(3)}, "not a U-Net or classifier of guided"),
    ],
)
def test_something_else_than_a_network_is_refused(content, message, refused):
    refused(content, message)
    refused(content, message, model_flags=None)


def test_tensors_left_over_missing_or_of_another_shape_are_listed(refused):
    name = "middle_block.0.out_layers.3.bias"
    more = weights() | {"ema.step": torch.zeros(1), "middle_block.3.bias": torch.zeros(2)}
    refused(more, r"not used: ema.step \(1,\)\s+not used: middle_block.3.bias \(2,\)")
    fewer = weights()
    del fewer[name]
    refused(fewer, rf"missing: {name} \(64,\)")
    refused(fewer, rf"missing: {name} \(64,\)", model_flags=None)
    refused(weights() | {name: torch.zeros(1, 64)}, rf"{name}: has shape \(1, 64\), expected \(64,\)")
    turned = weights() | {"time_embed.0.weight": weights()["time_embed.0.weight"].T}
    refused(turned, r"time_embed.0.weight: has shape \(32, 128\), expected \(128, 32\)")


@pytest.mark.parametrize(
    "flag",
    [
        *("--num_channels 64", "--num_res_blocks 2", "--channel_mult 1,1", "--channel_mult 1,2,2", "--class_cond True"),
        *("--attention_resolutions 16,8", "--resblock_updown True"),
        *("--use_scale_shift_norm False", "--image_size 64"),
    ],
)
def test_a_wrong_flag_is_named(flag, refused):
    name = flag.split()[0]
    if name == "--image_size":  # which changes what the other one means
        name = "--attention_resolutions"
    message = rf"are not those described, a U-Net of guided-diffusion:(.|\n)*Other than given or by default: .*{name}"
    refused(weights(), message, model_flags=f"{NETWORK.flags} {flag}")


def test_a_wrong_preset_is_refused(refused):
    refused(weights(), "not those of lsun_cat, which has 552,814,086 parameters", model_flags=None, preset="lsun_cat")
    message = r"64x64_classifier, which has(.|\n)*The file looks like a U-Net"
    refused(weights(), message, model_flags=None, preset="64x64_classifier.pt")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"preset": "lsun_cat"}, "`preset` and `model_flags` were both given"),
        ({"preset": "lsun_dog", "model_flags": None}, "`preset` is 'lsun_dog'; .* Did you mean"),
        ({"preset": "lsun_cat", "model_flags": None, "code_base": "improved-diffusion"}, "comes from guided-diffusion"),
        ({"code_base": "edm"}, "`code_base` is 'edm'; it must be one of"),
        ({"model_flags": "--large_size 64"}, "describe an upsampler of guided-diffusion, but the file holds a U-Net"),
        ({"model_flags": "--classifier_width 64"}, "describe a classifier of .*, but the file holds a U-Net"),
        ({"model_flags": f"{NETWORK.flags} --num_heads 3"}, "`num_attention_heads` is 3; it must divide the 64"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, refused):
    refused(weights(), message, **arguments)


def test_no_file(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a file"):
            convert_openai(path, tmp_path / "out")


@pytest.mark.parametrize("flags", [None, "--num_heads 4", f"{NETWORK.flags} --classifier_depth 2 --batch_size 4"])
def test_what_was_not_told_is_read_off_the_file_or_said(flags, convert):
    result = convert(weights(), model_flags=flags)
    assert result.kind == "unet"
    assert result.flags["channel_mult"] == "1,2"
    assert ("num_heads" in result.assumed) == (flags != "--num_heads 4")
    assert "use_new_attention_order" in result.assumed
    assert "num_channels" not in result.assumed
    assert set(result.ignored) == ({"classifier_depth", "batch_size"} if flags and "depth" in flags else set())


def test_flags_that_two_kinds_share_leave_the_choice_to_the_file(tmp_path):
    network = NETWORKS["improved-upsampler"]  # whose README gives no size
    flags = "--num_channels 32 --num_res_blocks 1 --learn_sigma True --class_cond True"
    result = convert_openai(network.save(tmp_path), tmp_path / "out", model_flags=flags, code_base="improved-diffusion")
    assert (result.kind, result.flags["large_size"]) == ("upsampler", 64)


def test_one_command_line_serves_the_network_and_its_classifier(tmp_path):
    flags = "--image_size 64 --num_channels 32 --classifier_width 64 --classifier_pool adaptive --noise_schedule cosine"
    result = convert_openai(NETWORKS["adaptive-pool"].save(tmp_path), tmp_path / "out", model_flags=flags)
    assert (result.kind, result.ignored) == ("classifier", ["num_channels"])
    assert result.flags["noise_schedule"] == "cosine"


def test_another_image_size_does_not_move_the_attention(tmp_path):
    """Levels with attention are named by the size of their activations, which the image size settles."""
    network = NETWORKS["defaults"]
    flags = "--image_size 24 --num_heads 4"
    result = convert_openai(network.save(tmp_path), tmp_path / "out", model_flags=flags)
    assert (result.flags["attention_resolutions"], result.flags["channel_mult"]) == ("12", "1,2")


def test_a_folder_that_cannot_be_made_is_found_before_the_checkpoint_is_read(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`output_dir` is .*file is not a directory. Name another"):
        convert_openai(tmp_path / "nowhere.pt", tmp_path / "file" / "out")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    file, folder = NETWORK.save(tmp_path), tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("irreplaceable")
    for path in (folder, file):
        with pytest.raises(ValueError, match="exists and is not empty"):
            convert_openai(file, path, model_flags=NETWORK.flags)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_used_and_parents_are_made(tmp_path):
    file = NETWORK.save(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "deep" / "down"):
        convert_openai(file, folder, model_flags=NETWORK.flags)
        assert (folder / "model_index.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interruption_leaves_nothing_behind(error, tmp_path, monkeypatch):
    file = NETWORK.save(tmp_path)
    number = 0

    def interrupt(tensor):
        nonlocal number
        number += 1
        if number == 20:
            raise error
        return (tensor,)

    original = openai_checkpoints.tensor_rules
    monkeypatch.setattr(
        openai_checkpoints,
        "tensor_rules",
        lambda *args: [rule._replace(split=interrupt) if len(rule.targets) == 1 else rule for rule in original(*args)],
    )
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        convert_openai(file, tmp_path / "out", model_flags=NETWORK.flags)
    assert number == 20
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_documented_arguments():
    check_documented_arguments(convert_openai.__doc__, convert_openai)
    check_documented_arguments(common.Conversion.__doc__ + ConvertedCheckpoint.__doc__, ConvertedCheckpoint)
