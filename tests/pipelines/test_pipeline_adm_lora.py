"""LoRA weights through the methods of ADMPipeline."""

import logging

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tolerances import SAMPLING, rounding_errors
from toy_models import CONDITIONAL, random_text_encoder, random_text_unet, random_unet, toy_tokenizer

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.schedulers.noise_schedules import noise_schedule_of
from diffusers_adm.training import save_lora


RANK, ALPHA = 2, 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]


def make_pipeline(has_text: bool) -> ADMPipeline:
    components = dict.fromkeys(ADMPipeline._optional_components)
    if has_text:
        components |= {"text_encoder": random_text_encoder("clip"), "tokenizer": toy_tokenizer("clip")}
    unet = random_text_unet() if has_text else random_unet(**CONDITIONAL)
    pipe = ADMPipeline(unet, LearnedVarianceDDPMScheduler(), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: ADMPipeline) -> torch.Tensor:
    condition = {"prompt": "a cat"} if pipe.has_cross_attention else {"class_labels": 1}
    generator = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=3, generator=generator, output_type="pt", **condition).images


def add_adapter(model: torch.nn.Module, targets: list[str], seed: int) -> dict[str, torch.Tensor]:
    """Trained, as it were: as constructed, an adapter changes nothing."""
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return get_peft_model_state_dict(model)


def save_adapter(folder, pipe: ADMPipeline, seed: int, in_encoder: bool = False, targets=TARGETS) -> dict:
    """Adds one to the U-Net of `pipe`, writes it as training does, and returns its weights."""
    layers = {"unet_lora_layers": add_adapter(pipe.unet, targets, seed)}
    # Without it `lora_alpha` is lost.
    layers["unet_lora_adapter_metadata"] = pipe.unet.peft_config["default"].to_dict()
    if in_encoder:
        layers["text_encoder_lora_layers"] = add_adapter(pipe.text_encoder, ["q_proj", "v_proj"], seed)
        layers["text_encoder_lora_adapter_metadata"] = pipe.text_encoder.peft_config["default"].to_dict()
    ADMPipeline.save_lora_weights(folder, **layers)
    return layers["unet_lora_layers"]


@pytest.mark.parametrize("has_text, in_encoder", [(False, False), (True, False), (True, True)])
def test_load_scale_fuse_unload(tmp_path, has_text, in_encoder):
    trained = make_pipeline(has_text)
    save_adapter(tmp_path, trained, 1, in_encoder)
    expected = draw(trained)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = make_pipeline(has_text)
    plain = draw(pipe)
    assert (expected - plain).abs().max() > 0.01

    pipe.load_lora_weights(tmp_path, adapter_name="style")
    listed = {"unet": ["style"], "text_encoder": ["style"]} if in_encoder else {"unet": ["style"]}
    assert pipe.get_list_adapters() == listed
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)

    pipe.set_adapters("style", 0.0)
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=1e-4)
    pipe.set_adapters("style", 0.5)
    half = draw(pipe)
    assert min((half - plain).abs().max(), (half - expected).abs().max()) > 0.003
    pipe.set_adapters("style", 1.0)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)
    pipe.disable_lora()
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=1e-4)
    pipe.enable_lora()

    # Added to the weights, the same numbers are summed in another order.
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=1e-4)
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())


def test_unloading_restores_bit_by_bit(tmp_path):
    save_adapter(tmp_path, make_pipeline(has_text=True), 1, in_encoder=True)
    pipe = make_pipeline(has_text=True)
    plain = draw(pipe)
    pipe.load_lora_weights(tmp_path)
    assert rounding_errors(draw(pipe), plain) > SAMPLING
    pipe.unload_lora_weights()
    assert rounding_errors(draw(pipe), plain) <= SAMPLING


def test_two_adapters_at_once(tmp_path):
    """They change the weights by the sum of scale * alpha / rank * B A."""
    pipe, merged = make_pipeline(has_text=False), make_pipeline(has_text=False)
    weights = merged.unet.state_dict()  # changed below where they are
    for seed, name, scale in ((1, "first", 0.7), (2, "second", -0.2)):
        layers = save_adapter(tmp_path / name, make_pipeline(has_text=False), seed, targets=["to_q", "to_out.0"])
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        names = [key.removesuffix(".lora_A.weight") for key in layers if key.endswith(".lora_A.weight")]
        assert names
        for layer in names:
            low, high = layers[f"{layer}.lora_A.weight"], layers[f"{layer}.lora_B.weight"]
            weights[f"{layer}.weight"] += scale * ALPHA / RANK * high @ low
    pipe.set_adapters(["first", "second"], [0.7, -0.2])
    assert pipe.get_active_adapters() == ["first", "second"]
    expected, plain = draw(merged), draw(make_pipeline(has_text=False))
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)
    pipe.set_adapters("first")
    assert min((draw(pipe) - other).abs().max() for other in (expected, plain)) > 0.003


def test_saved_by_the_network_itself(tmp_path):
    """`unet.save_lora_adapter` writes names without a prefix, which `load_lora_adapter` reads with `prefix=None`."""
    pipe = make_pipeline(has_text=False)
    add_adapter(pipe.unet, TARGETS, 1)
    expected = draw(pipe)
    pipe.unet.save_lora_adapter(tmp_path)
    other = make_pipeline(has_text=False)
    other.unet.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(draw(other), expected, rtol=0, atol=1e-4)


def test_lora_of_the_same_network_in_diffusers(tmp_path):
    """Parameter names are diffusers', so adapters are exchangeable."""
    theirs = UNet2DConditionModel.from_config(make_pipeline(has_text=True).unet.config)
    layers = add_adapter(theirs, TARGETS, 1)
    ADMPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipe = make_pipeline(has_text=True)
    plain = draw(pipe)
    pipe.load_lora_weights(tmp_path)
    assert (draw(pipe) - plain).abs().max() > 0.01
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name="default_0")
    assert loaded.keys() == layers.keys()
    assert all(torch.equal(loaded[name], layers[name]) for name in layers)


class TestNotSavedWithTheModel:
    """PEFT renames layers: saved so, `from_pretrained` would start them at random."""

    @pytest.mark.parametrize("in_encoder", [False, True])
    def test_refused_until_it_is_fused_or_unloaded(self, tmp_path, in_encoder):
        save_adapter(tmp_path / "lora", make_pipeline(True), seed=1, in_encoder=in_encoder)
        pipe = make_pipeline(True)
        before = draw(pipe)
        pipe.load_lora_weights(tmp_path / "lora")
        for fuse in (False, True):
            if fuse:
                pipe.fuse_lora()
            with pytest.raises(ValueError, match=r"cannot save a LoRA: `unet` .*\.base_layer\..*`fuse_lora\(\)` and"):
                pipe.save_pretrained(tmp_path / "both")
            with pytest.raises(ValueError, match="cannot save a LoRA: the model"):
                pipe.unet.save_pretrained(tmp_path / "unet")
        assert not (tmp_path / "both").exists()
        assert not (tmp_path / "unet").exists()

        fused = draw(pipe)
        pipe.unload_lora_weights()  # what was fused stays
        pipe.save_pretrained(tmp_path / "fused")
        loaded = ADMPipeline.from_pretrained(tmp_path / "fused")
        loaded.set_progress_bar_config(disable=True)
        assert rounding_errors(draw(loaded), fused) < SAMPLING
        assert (fused - before).abs().max() > 0.01

    def test_in_the_text_encoder_alone(self, tmp_path):
        pipe = make_pipeline(True)
        add_adapter(pipe.text_encoder, ["q_proj"], seed=1)
        with pytest.raises(ValueError, match="cannot save a LoRA: `text_encoder`"):
            pipe.save_pretrained(tmp_path / "both")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    """Fused and unfused, they would leave NaN behind."""
    save_adapter(tmp_path, make_pipeline(False), seed=1)
    state = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    name = sorted(state)[0]
    state[name][0, 0] = torch.nan
    pipe = make_pipeline(False)
    before = draw(pipe)
    with pytest.raises(ValueError, match=f"weights that are not finite, such as {name}"):
        pipe.load_lora_weights(state)
    assert rounding_errors(draw(pipe), before) <= SAMPLING


def test_layers_of_a_text_encoder(tmp_path, caplog):
    save_adapter(tmp_path, make_pipeline(True), seed=1, in_encoder=True)
    pipe = ADMPipeline(random_text_unet(), LearnedVarianceDDPMScheduler(), None, None, None, None)
    with pytest.raises(ValueError, match="has layers for a `text_encoder`, but this pipeline has none"):
        pipe.load_lora_weights(tmp_path)
    assert not pipe.get_active_adapters()

    save_adapter(tmp_path, make_pipeline(False), seed=1)
    pipe = make_pipeline(False)
    diffusers_logger = logging.getLogger("diffusers")
    diffusers_logger.addHandler(caplog.handler)  # it does not propagate
    try:
        pipe.load_lora_weights(tmp_path)
    finally:
        diffusers_logger.removeHandler(caplog.handler)
    assert "No LoRA keys" not in caplog.text
    assert pipe.get_active_adapters()


class TestNoiseSchedule:
    def save(self, folder, **scheduler):
        pipe = make_pipeline(has_text=True)
        add_adapter(pipe.unet, TARGETS, 1)
        save_lora(pipe.unet, folder, noise_schedule_of(LearnedVarianceDDPMScheduler(**scheduler)))
        return draw(pipe)

    def test_it_loads_beside_its_own_alone(self, tmp_path):
        expected = self.save(tmp_path / "linear")
        pipe = make_pipeline(has_text=True)
        pipe.load_lora_weights(tmp_path / "linear")
        assert rounding_errors(draw(pipe), expected) <= SAMPLING
        pipe.unload_lora_weights()
        self.save(tmp_path / "cosine", beta_schedule="cosine")
        plain = draw(pipe)
        with pytest.raises(ValueError, match="The LoRA was trained on the noise schedule squaredcos_cap_v2 with 1000 "):
            pipe.load_lora_weights(tmp_path / "cosine")
        assert pipe.get_list_adapters() == {}
        assert rounding_errors(draw(pipe), plain) <= SAMPLING
        pipe.scheduler = LearnedVarianceDDPMScheduler(beta_schedule="cosine")
        pipe.load_lora_weights(tmp_path / "cosine", adapter_name="cosine")
        assert pipe.get_list_adapters() == {"unet": ["cosine"]}

    def test_networks_and_pipelines_of_diffusers_pass_over_it(self, tmp_path):
        self.save(tmp_path, beta_schedule="cosine")
        theirs = UNet2DConditionModel.from_config(make_pipeline(has_text=True).unet.config)
        theirs.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
        assert theirs.peft_config["default_0"].lora_alpha == ALPHA
        state, _, metadata = StableDiffusionPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
        theirs = UNet2DConditionModel.from_config(make_pipeline(has_text=True).unet.config)
        StableDiffusionPipeline.load_lora_into_unet(state, None, theirs, metadata=metadata)
        assert theirs.peft_config["default_0"].r == RANK

    def test_one_that_does_not_say_it(self, tmp_path, caplog):
        save_adapter(tmp_path, make_pipeline(has_text=False), 1)
        make_pipeline(has_text=False).load_lora_weights(tmp_path)
        assert caplog.text.count("The LoRA does not say which noise schedule it was trained on") == 1
