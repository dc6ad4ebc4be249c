"""What the pipelines share whose U-Net takes an image as further input channels: upsamplers and translators."""

from diffusers_adm.conditioning.controlnet import check_controlnet
from diffusers_adm.pipelines.pipeline_adm import ADMPipeline


class ConcatenatedImagePipeline(ADMPipeline):
    """
    The base of pipelines that concatenate an image to the sample, and that a ControlNet can be added to. A subclass
    registers its `controlnet` before it calls the constructor, which checks all components.
    """

    _optional_components = [*ADMPipeline._optional_components, "controlnet"]

    def _check_components(self) -> None:
        super()._check_components()
        if self.controlnet is not None:
            check_controlnet(self.controlnet, self.unet, self.scheduler)
