"""
Names and shapes of OpenAI's checkpoints, against the stored layouts of networks that the original code has built.

`openai_layouts.json` was made with guided-diffusion at commit 22e0df8 and improved-diffusion at 1bc7bbb. For each
preset and each network of `openai_networks.py`, `create_model`, `sr_create_model` or `create_classifier` was called
with the flags (and with `NUM_CLASSES`, `in_channels` and `out_channels` as the network's `Spec` says), and `digest`
below applied to the shapes of its `state_dict()`.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from openai_networks import NETWORKS

from diffusers_adm.conversion import PRESETS
from diffusers_adm.conversion.common import expected_shapes
from diffusers_adm.conversion.openai_checkpoints import build_network, recognise
from diffusers_adm.conversion.openai_flags import default_flags, parse_flags
from diffusers_adm.conversion.openai_layout import kinds_of_file, observed_flags, tensor_rules


STORED = json.loads((Path(__file__).parent / "openai_layouts.json").read_text())


def digest(shapes):
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def count(shapes):
    total = 0
    for shape in shapes.values():
        size = 1
        for number in shape:
            size *= number
        total += size
    return total


def layout_of(network):
    return {name: tuple(tensor.shape) for name, tensor in network.weights().items()}


@pytest.fixture(scope="module")
def preset_layouts():
    """What this package expects the published files to hold. Some share a network, and networks take time to build."""
    layouts = {}
    for name, preset in PRESETS.items():
        kind, flags = preset.settle()
        same = next((other for other in layouts if PRESETS[other].settle() == (kind, flags)), None)
        if same is None:
            model = build_network(flags, preset.code_base, kind, None)
            layouts[name] = expected_shapes(model, tensor_rules(model, flags.get("use_new_attention_order", False)))
        else:
            layouts[name] = layouts[same]
    return layouts


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tests_own_networks_have_the_layouts_of_the_original_code(name):
    layout = layout_of(NETWORKS[name])
    assert {"tensors": len(layout), "parameters": count(layout), "digest": digest(layout)} == STORED["networks"][name]


def test_presets_have_the_layouts_of_the_original_code(preset_layouts):
    assert set(preset_layouts) == set(STORED["presets"])
    for name, layout in preset_layouts.items():
        found = {"tensors": len(layout), "parameters": count(layout), "digest": digest(layout)}
        assert found == STORED["presets"][name], name
        assert PRESETS[name].num_parameters == STORED["presets"][name]["parameters"]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_on_either_side_is_used_exactly_once(name):
    network = NETWORKS[name]
    flags, _, _ = parse_flags(network.flags, network.code_base)
    flags = default_flags(network.code_base, network.kind) | flags
    layout = layout_of(network)
    model = build_network(flags, network.code_base, network.kind, layout)
    rules = tensor_rules(model, flags.get("use_new_attention_order", False))
    assert Counter(rule.source for rule in rules) == Counter(layout.keys())
    assert Counter(target for rule in rules for target in rule.targets) == Counter(model.state_dict().keys())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_tells_what_can_be_told(name):
    """All flags that change a layout, seen from an image size that the file does not always tell."""
    network = NETWORKS[name]
    layout = layout_of(network)
    kinds = kinds_of_file(layout)
    assert network.kind in kinds
    # A condition can be an enlarged small image or something else, and no condition at all: a file does not tell.
    unclear = ("grey-upsampler", "mask-of-an-rgb-image", "six-channels")
    assert network.kind == kinds[0] or name in unclear or name.startswith("image-to-image")

    observed = observed_flags(layout, network.code_base, network.kind)
    given, _, _ = parse_flags(network.flags, network.code_base)
    size = "large_size" if network.kind == "upsampler" else "image_size"
    untold = {flag: value for flag, value in given.items() if "head" in flag or flag == "learn_sigma"}
    flags = default_flags(network.code_base, network.kind) | untold | observed
    seen = build_network(flags, network.code_base, network.kind, layout)
    assert digest(expected_shapes(seen, tensor_rules(seen, False))) == digest(layout)
    for flag in observed.keys() & given.keys() - {size, "attention_resolutions", "classifier_attention_resolutions"}:
        assert observed[flag] == given[flag], flag


def test_the_image_size_is_told_where_only_one_has_such_levels():
    for name, size in (("as-512", 512), ("improved-32", 32), ("attention-pool", 64), ("adaptive-pool", 64)):
        network = NETWORKS[name]
        assert observed_flags(layout_of(network), network.code_base, network.kind)["image_size"] == size
    # The upsamplers to 256 and to 512 have the same levels.
    assert "large_size" not in observed_flags(layout_of(NETWORKS["upsampler"]), "guided-diffusion", "upsampler")


def test_published_files_are_recognised_by_their_layout(preset_layouts):
    def recognised(name, stem="model", code_base=None):
        return recognise(stem, preset_layouts[name], code_base)

    for name in ("cifar10_uncond_50M_500K", "128_512_upsampler", "64x64_classifier"):
        assert recognised(name) == name
    # The unconditional 256x256 networks differ in their weights and training alone, so any of them will do.
    assert PRESETS[recognised("lsun_cat")].settle()[1]["num_head_channels"] == 64
    assert recognised("lsun_cat", stem="lsun_cat") == "lsun_cat"
    assert recognised("lsun_cat", code_base="improved-diffusion") is None
    changed = dict(preset_layouts["64x64_classifier"])
    changed["out.0.weight"] = (256, 2)  # as many numbers, other shapes
    assert recognise("64x64_classifier", changed, None) is None


def test_a_layout_of_something_else_is_refused():
    layout = layout_of(NETWORKS["residual"])
    with pytest.raises(ValueError, match="not a U-Net or classifier of guided-diffusion"):
        kinds_of_file({f"module.{name}": shape for name, shape in layout.items()})
    with pytest.raises(ValueError, match="not a U-Net or classifier of guided-diffusion"):
        kinds_of_file(layout | {"time_embed.0.weight": (5,)})
    broken = {name: shape for name, shape in layout.items() if not name.startswith("input_blocks.2.0.out_layers")}
    with pytest.raises(ValueError, match="blocks of this state dict are not those"):
        observed_flags(broken, "guided-diffusion", "unet")
    with pytest.raises(ValueError, match="blocks of this state dict are not those"):
        observed_flags(layout | {"input_blocks.99999999999.0.op.bias": (1,)}, "guided-diffusion", "unet")


def test_levels_that_can_be_read_in_two_ways_are_not_guessed():
    """Four times the same block: one level of four, or two of one with residual resampling? A decoder would tell."""
    layout = layout_of(NETWORKS["adaptive-pool"])
    block = {name: shape for name, shape in layout.items() if name.startswith("input_blocks.1.0.")}
    layout = {name: shape for name, shape in layout.items() if not name.startswith("input_blocks.") or ".0.0." in name}
    for number in (1, 2, 3, 4, 5):
        layout |= {name.replace(".1.", f".{number}.", 1): shape for name, shape in block.items()}
    with pytest.raises(ValueError, match="cannot be read from the state dict: 3 readings"):
        observed_flags(layout, "guided-diffusion", "classifier")
