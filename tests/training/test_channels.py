"""Numbers of channels of a U-Net by task, variance and images, and sizes in the arguments."""

from types import SimpleNamespace

import pytest
from toy_models import TOY_CONFIG

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.training import (
    DataArguments,
    SuperResolutionArguments,
    UNetArguments,
    choose_resolution,
    load_unet_config,
    low_res_channels,
    mask_channels,
    no_extra_channels,
    parse_args,
    set_channels,
    unets,
)


# Input channels for images of c channels.
TASKS = {
    no_extra_channels: lambda c: c,
    mask_channels: lambda c: 2 * c + 1,
    low_res_channels: lambda c: 2 * c,
}
SCHEDULERS = {
    2: LearnedVarianceDDPMScheduler(),
    1: LearnedVarianceDDPMScheduler(variance_type="fixed_small"),
}


@pytest.fixture
def load(monkeypatch):
    def load(channels, extra_channels, outputs=2, pretrained=False, may_widen=False):
        config = {key: value for key, value in TOY_CONFIG.items() if key not in ("in_channels", "out_channels")}
        monkeypatch.setattr(unets, "load_model_config", lambda *args: config | channels)
        source = {f"{'pretrained_model' if pretrained else 'model_config'}_name_or_path": "somewhere"}
        return load_unet_config(
            UNetArguments(**source), DataArguments(), SCHEDULERS[outputs], extra_channels, may_widen
        )

    return load


@pytest.mark.parametrize("c", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("outputs", SCHEDULERS)
@pytest.mark.parametrize("extra_channels", TASKS)
def test_channels_of_images(load, c, outputs, extra_channels):
    expected = {"in_channels": TASKS[extra_channels](c), "out_channels": outputs * c}
    for given in (expected, {"in_channels": expected["in_channels"]}, {"out_channels": expected["out_channels"]}):
        config, channels = load(given, extra_channels, outputs)
        assert channels == c
        assert set_channels(config, c, SCHEDULERS[outputs], extra_channels).items() >= expected.items()
    config, channels = load({}, extra_channels, outputs)
    assert channels is None
    assert set_channels(config, c, SCHEDULERS[outputs], extra_channels).items() >= expected.items()
    # A pretrained one that is widened, or already has all channels.
    for in_channels in (c, TASKS[extra_channels](c)):
        given = {"in_channels": in_channels, "out_channels": outputs * c}
        assert load(given, extra_channels, outputs, pretrained=True, may_widen=True)[1] == c


@pytest.mark.parametrize(
    ("channels", "extra_channels", "outputs", "message"),
    [
        ((7, 6), no_extra_channels, 2, "on RGB images. Those of 7 are trained by train_adm.py --task inpaint. Images"),
        ((4, 4), no_extra_channels, 2, "4 output channels. Images of 4 .* by train_super_resolution.py.."),
        ((9, 4), mask_channels, 2, "and has 4 output channels. Images of 4 .* need 8 output channels: "),
        ((6, 6), no_extra_channels, 2, "Images of 6 channels and `variance_type` 'learned_range' need 12 output"),
        (
            (11, 10),
            low_res_channels,
            2,
            "this script trains U-Nets of 10, on images of 5 .*train_adm.py --task inpaint",
        ),
        ((5, 10), mask_channels, 2, "U-Nets of 11, on images of 5 channels. Those of 5 are trained by train_adm.py"),
        ((4, 4), mask_channels, 1, "U-Nets of 9, on images of 4 .* by train_adm.py. Change `in_channels`"),
        ((4, 4), no_extra_channels, 2, "or pass `--variance_type fixed_small --objective simple`"),
        ((None, 7), no_extra_channels, 2, "7 output channels. Images of 3 .*need 6 output channels"),
    ],
)
def test_channels_that_no_images_have(load, channels, extra_channels, outputs, message):
    given = {key: value for key, value in zip(("in_channels", "out_channels"), channels, strict=True) if value}
    with pytest.raises(ValueError, match=message):
        load(given, extra_channels, outputs)


@pytest.mark.parametrize(
    ("words", "resolution", "size"),
    [("96", 96, 96), ("64x256", "64x256", (64, 256)), ("64X64", 64, 64), ("none", None, None)],
)
def test_sizes_on_the_command_line_and_in_recipes(words, resolution, size, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"resolution: {words}\nlow_res_size: {words}\nvalue_range: auto\n")
    for given in (["--config", str(tmp_path / "recipe.yaml")], ["--resolution", words, "--low_res_size", words]):
        data, upsampling = parse_args((DataArguments, SuperResolutionArguments), given)
        assert (data.resolution, data.size, upsampling.low_res_size) == (resolution, size, resolution)
    assert DataArguments(resolution=size).resolution == resolution
    inherited = SuperResolutionArguments()
    inherited.inherit({"low_res_size": [4, 8]})
    assert (inherited.low_res_size, inherited.size) == ("4x8", (4, 8))


@pytest.mark.parametrize(
    ("words", "value_range"),
    [(["auto"], "auto"), (["0", "4095"], (0, 4095)), (["-1.5", "1e3"], (-1.5, 1000)), (["none"], None)],
)
def test_value_ranges(words, value_range):
    (data,) = parse_args((DataArguments,), ["--value_range", *words])
    assert data.format_request(2, None).value_range == value_range


@pytest.mark.parametrize(
    "words", [["auto", "1"], ["1"], ["1", "1"], ["1", "inf"], ["nan", "1"], ["0", "1", "2"], ["x"]]
)
def test_no_value_ranges(words):
    with pytest.raises(ValueError, match="`value_range` is '.*'; pass two numbers"):
        parse_args((DataArguments,), ["--value_range", *words])


def test_the_resolution():
    config = SimpleNamespace(sample_size=[8, 16], block_out_channels=(4, 8))
    assert choose_resolution(None, config, "U-Net") == [8, 16]
    assert choose_resolution((4, 2), config, "U-Net") == [4, 2]
    assert choose_resolution(6, config, "U-Net") == 6
    config.sample_size = (16, 16)
    assert choose_resolution(None, config, "U-Net") == 16
    with pytest.raises(ValueError, match="The resolution is 6 x 9; this U-Net .* by 2. Pass e.g. `--resolution 6x10`"):
        choose_resolution((6, 9), config, "U-Net")
