"""The models under the common model tests of diffusers' repository."""

import functools

import diffusers_checkout
import pytest
import torch
from toy_models import CONDITIONAL, TOY_CLASSIFIER_CONFIG, TOY_CONFIG

from diffusers_adm import AdaGNClassifierModel, AdaGNUNet2DModel
from diffusers_adm.models import classifier_adagn, unet_2d_adagn


mixins = diffusers_checkout.load("models.testing_utils")
UNetTesterMixin = diffusers_checkout.load("models.test_modeling_common").UNetTesterMixin
torch_device = diffusers_checkout.load("testing_utils").torch_device


@pytest.fixture(autouse=True, scope="module")
def _start_from_random_weights():
    """An untrained network of this family predicts 0, whatever is wrong with it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (unet_2d_adagn, classifier_adagn):
            patch.setattr(module, "zero_init", lambda network: network)
        yield


class DDPMConfig(mixins.BaseModelTesterConfig):
    """A net like DDPM's: convolutions resample, time is added, a fixed variance."""

    model_class = AdaGNUNet2DModel
    main_input_name = "sample"
    output_shape = (3, 16, 16)
    config = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
    }
    checkpointed = {"DownBlock", "MidBlock", "UpBlock"}
    different_shapes_for_compilation = [(16, 16), (16, 24), (32, 32)]

    def get_init_dict(self) -> dict:
        return dict(self.config)

    def get_dummy_inputs(self, height: int = 16, width: int = 16) -> dict:
        sample = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        return {"sample": sample.to(torch_device), "timestep": torch.tensor([10], device=torch_device)}


class ADMConfig(DDPMConfig):
    """A net like ADM's: residual blocks resample, AdaGN, classes, a learned variance."""

    output_shape = (6, 16, 16)
    config = {**TOY_CONFIG, **CONDITIONAL, "sample_size": 16}

    def get_dummy_inputs(self, height: int = 16, width: int = 16) -> dict:
        return {**super().get_dummy_inputs(height, width), "class_labels": torch.tensor([1, 4], device=torch_device)}


class TransformerTextConfig(DDPMConfig):
    """A net like Stable Diffusion's: transformer blocks attend to a text."""

    config = {
        **DDPMConfig.config,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
    }
    checkpointed = {"DownBlock", "MidBlock", "UpBlock", "Transformer2DModel"}

    def get_dummy_inputs(self, height: int = 16, width: int = 16) -> dict:
        states = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
        return {**super().get_dummy_inputs(height, width), "encoder_hidden_states": states.to(torch_device)}


class AddedKVTextConfig(TransformerTextConfig):
    """A net like GLIDE's: keys and values added for the text, residual blocks resample, AdaGN."""

    config = {
        **TransformerTextConfig.config,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
    }
    checkpointed = DDPMConfig.checkpointed


class ClassifierConfig(DDPMConfig):
    model_class = AdaGNClassifierModel
    output_shape = (5,)
    config = {**TOY_CLASSIFIER_CONFIG, "sample_size": 16}
    checkpointed = {"DownBlock", "MidBlock"}
    different_shapes_for_compilation = None  # its attention pool takes one size alone


class TestModelDDPM(DDPMConfig, mixins.ModelTesterMixin, UNetTesterMixin):
    pass


class TestModelADM(ADMConfig, mixins.ModelTesterMixin):
    pass


class TestModelClassifier(ClassifierConfig, mixins.ModelTesterMixin):
    pass


class TestModelTransformerText(TransformerTextConfig, mixins.ModelTesterMixin):
    pass


class TestModelAddedKVText(AddedKVTextConfig, mixins.ModelTesterMixin):
    pass


class Training(mixins.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set=self.checkpointed)


class TestTrainingDDPM(DDPMConfig, Training):
    pass


class TestTrainingADM(ADMConfig, Training):
    pass


class TestTrainingClassifier(ClassifierConfig, Training):
    pass


class TestTrainingTransformerText(TransformerTextConfig, Training):
    pass


class TestTrainingAddedKVText(AddedKVTextConfig, Training):
    pass


class OnACPU:
    """Without an accelerator: group offloading without streams, and compiling up to the trace, which is fast."""

    @pytest.fixture(autouse=True)
    def _do_without(self, monkeypatch):
        enable_group_offload = self.model_class.enable_group_offload

        def enable_without_streams(model, *args, **kwargs):
            return enable_group_offload(model, *args, **{**kwargs, "use_stream": False, "record_stream": False})

        if torch_device == "cpu":
            monkeypatch.setattr(self.model_class, "enable_group_offload", enable_without_streams)
            monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@diffusers_checkout.skip(
    "test_cpu_offload",
    "test_disk_offload_with_safetensors",
    "test_disk_offload_without_safetensors",
    reason="splits the model between a GPU and the CPU; tests/models splits it between memory and disk",
    only_without_accelerator=True,
)
class Memory(OnACPU, mixins.MemoryTesterMixin):
    pass


class TestMemoryDDPM(DDPMConfig, Memory):
    pass


class TestMemoryADM(ADMConfig, Memory):
    pass


class TestMemoryClassifier(ClassifierConfig, Memory):
    pass


class TestMemoryTransformerText(TransformerTextConfig, Memory):
    pass


class TestMemoryAddedKVText(AddedKVTextConfig, Memory):
    pass


class TestAttentionDDPM(DDPMConfig, mixins.AttentionTesterMixin):
    pass


class TestAttentionADM(ADMConfig, mixins.AttentionTesterMixin):
    pass


class TestAttentionClassifier(ClassifierConfig, mixins.AttentionTesterMixin):
    pass


class TestAttentionTransformerText(TransformerTextConfig, mixins.AttentionTesterMixin):
    pass


@diffusers_checkout.skip(
    "test_fuse_unfuse_qkv_projections", reason="diffusers refuses to fuse projections where there are added ones"
)
class TestAttentionAddedKVText(AddedKVTextConfig, mixins.AttentionTesterMixin):
    pass


class TestLoraDDPM(DDPMConfig, mixins.LoraTesterMixin):
    pass


class TestLoraADM(ADMConfig, mixins.LoraTesterMixin):
    pass


class TestLoraClassifier(ClassifierConfig, mixins.LoraTesterMixin):
    pass


class TestLoraTransformerText(TransformerTextConfig, mixins.LoraTesterMixin):
    pass


class TestLoraAddedKVText(AddedKVTextConfig, mixins.LoraTesterMixin):
    pass


class HotSwap(OnACPU, mixins.LoraHotSwappingForModelTesterMixin):
    pass


class TestLoraHotSwapDDPM(DDPMConfig, HotSwap):
    pass


class TestLoraHotSwapADM(ADMConfig, HotSwap):
    pass


class TestLoraHotSwapTransformerText(TransformerTextConfig, HotSwap):
    pass


class TestLoraHotSwapAddedKVText(AddedKVTextConfig, HotSwap):
    pass


class Compile(OnACPU, mixins.TorchCompileTesterMixin):
    def test_torch_compile_repeated_blocks(self):
        # Once for each width of residual block; `compile_repeated_blocks` sets a limit that lets it.
        super().test_torch_compile_repeated_blocks(recompile_limit=16)


class TestCompileDDPM(DDPMConfig, Compile):
    pass


class TestCompileADM(ADMConfig, Compile):
    pass


class TestCompileClassifier(ClassifierConfig, Compile):
    pass


class TestCompileTransformerText(TransformerTextConfig, Compile):
    pass


class TestCompileAddedKVText(AddedKVTextConfig, Compile):
    pass
