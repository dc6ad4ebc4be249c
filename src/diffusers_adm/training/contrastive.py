"""
The contrastive loss of CLIP over the batches of all processes, its negatives, and its measures.

Radford et al. 2021 (https://huggingface.co/papers/2103.00020), section 2.3 and figure 3: each image must find its own
caption among those of the whole batch, and each caption its image.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator


# Section 2.5 of the paper: logits are never scaled by more than 100.
MAX_LOGIT_SCALE = math.log(100)


class ContrastiveLoss(NamedTuple):
    """
    Scalars of the own examples of a process; their means over the processes are those of the joint batch.

    Attributes:
        loss (`torch.Tensor`): The mean of both cross entropies, in nats.
        image_to_text, text_to_image (`torch.Tensor`): The share of the images that are most similar to their own
            caption, and of the captions that are most similar to their own image.
    """

    loss: torch.Tensor
    image_to_text: torch.Tensor
    text_to_image: torch.Tensor


class _Gather(torch.autograd.Function):
    """Concatenates a tensor of all processes; the gradient of each part is the sum of those on all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        ctx.accelerator, ctx.size = accelerator, len(tensor)
        return accelerator.gather(tensor.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        start = ctx.accelerator.process_index * ctx.size
        return ctx.accelerator.reduce(gradient.contiguous(), reduction="sum")[start : start + ctx.size], None


def gather_with_gradient(tensor: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """
    Concatenates the tensors of all processes, which have one shape, along their first dimension. Gradients flow to all
    of them. Collective, and so is its backward pass.
    """
    return tensor if accelerator.num_processes == 1 else _Gather.apply(tensor, accelerator)


def describes(caption_numbers: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """
    Which captions are known to describe which images.

    Args:
        caption_numbers (`torch.LongTensor` of shape `(num_images, most_captions)`): The captions of each image, padded
            with -1; see `diffusers_adm.data.captions.NumberedCaptions`.
        number (`torch.LongTensor` of shape `(num_captions,)`): Captions.

    Returns:
        `torch.BoolTensor` of shape `(num_images, num_captions)`.
    """
    return (caption_numbers[:, :, None] == number).any(dim=1)


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    caption_number: torch.Tensor,
    caption_numbers: torch.Tensor,
    accelerator: Accelerator,
) -> ContrastiveLoss:
    """
    The symmetric contrastive loss of a batch that is spread over the processes. The mean over the processes, of the
    loss and of its gradients (which is what distributed training takes), is that of one process with the joint batch.

    An image and the caption of another example are no negative pair if the caption is one of the image's own: the same
    emoji may be in the batch twice, drawn in two styles, and a caption such as "red" may describe many images. These
    pairs are left out of the softmax. Collective.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(batch_size, width)`): Of this process; example i of either
            belongs to example i of the other. They are normalised here, in float32.
        logit_scale (`torch.Tensor`): The natural log of the scale of the cosines, a scalar.
        caption_number (`torch.LongTensor` of shape `(batch_size,)`), caption_numbers (`torch.LongTensor` of shape
            `(batch_size, most_captions)`): From `diffusers_adm.data.captions.NumberedCaptions`.
    """
    embeds = torch.stack([image_embeds, text_embeds], dim=1).float()
    embeds = gather_with_gradient(F.normalize(embeds, dim=-1), accelerator)  # (N B, 2, D), of N processes
    numbers = accelerator.gather(torch.cat([caption_number[:, None], caption_numbers], dim=1))
    batch_size, start = len(caption_number), accelerator.process_index * len(caption_number)
    own = slice(start, start + batch_size)
    targets = torch.arange(start, start + batch_size, device=embeds.device)

    scale = logit_scale.float().exp()
    logits_of_images = scale * embeds[own, 0] @ embeds[:, 1].T  # (B, N B)
    logits_of_texts = scale * embeds[own, 1] @ embeds[:, 0].T
    is_partner = F.one_hot(targets, len(embeds)).bool()
    wrong_for_images = describes(numbers[own, 1:], numbers[:, 0]) & ~is_partner
    wrong_for_texts = describes(numbers[:, 1:], numbers[own, 0]).T & ~is_partner
    logits_of_images = logits_of_images.masked_fill(wrong_for_images, -math.inf)
    logits_of_texts = logits_of_texts.masked_fill(wrong_for_texts, -math.inf)
    loss = (F.cross_entropy(logits_of_images, targets) + F.cross_entropy(logits_of_texts, targets)) / 2
    hits = ((logits.argmax(dim=1) == targets).float().mean() for logits in (logits_of_images, logits_of_texts))
    return ContrastiveLoss(loss, *hits)


def clamp_logit_scale(logit_scale: torch.Tensor) -> None:
    """Clamps the log of the scale to `MAX_LOGIT_SCALE`, in place. Call it after each optimizer step."""
    with torch.no_grad():
        logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def standard_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent trials."""
    return math.sqrt(share * (1 - share) / count)


def recall_at(similarity: torch.Tensor, is_relevant: torch.Tensor, ks: tuple[int, ...] = (1, 5)) -> dict[int, float]:
    """
    The share of the queries for which one of the `k` most similar items is relevant, by `k`. Items as similar as the
    relevant one rank before it, so a model that cannot tell them apart gets no credit.

    Args:
        similarity (`torch.Tensor` of shape `(num_queries, num_items)`), is_relevant (`torch.BoolTensor` of that shape):
            Each query has a relevant item.
    """
    best = similarity.masked_fill(~is_relevant, -math.inf).amax(dim=1, keepdim=True)
    num_before = ((similarity >= best) & ~is_relevant).sum(dim=1)
    return {k: (num_before < k).float().mean().item() for k in ks}


def retrieval_measures(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_of_image: torch.Tensor
) -> dict[str, float]:
    """
    Retrieval in both directions with standard errors: `text_to_image_recall_at_5` is the share of the captions whose
    image is among the 5 most similar ones, `image_to_text_recall_at_5` the reverse; also at 1.

    Args:
        image_embeds (`torch.Tensor` of shape `(num_images, width)`), text_embeds (`torch.Tensor` of shape
            `(num_texts, width)`): Normalised. The texts are distinct.
        text_of_image (`torch.LongTensor` of shape `(num_images,)`): The text of each image; each text has an image.
    """
    similarity = text_embeds @ image_embeds.T
    is_pair = torch.arange(len(text_embeds), device=text_of_image.device)[:, None] == text_of_image
    values = {}
    for name, scores, relevant in (
        ("text_to_image", similarity, is_pair),
        ("image_to_text", similarity.T, is_pair.T),
    ):
        for k, share in recall_at(scores, relevant).items():
            values[f"{name}_recall_at_{k}"] = share
            values[f"{name}_recall_at_{k}_error"] = standard_error(share, len(scores))
    return values


def zero_shot_measures(
    image_embeds: torch.Tensor, class_embeds: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    """
    Accuracy of the class whose prompt is most similar to the image, with its standard error: `zero_shot_accuracy`, and
    `zero_shot_balanced_accuracy`, the mean over the classes that have images.

    Args:
        image_embeds (`torch.Tensor` of shape `(num_images, width)`), class_embeds (`torch.Tensor` of shape
            `(num_classes, width)`): Normalised.
        labels (`torch.LongTensor` of shape `(num_images,)`): In `[0, num_classes)`; -1 for images to leave out.
    """
    image_embeds, labels = image_embeds[labels >= 0], labels[labels >= 0]
    hits = ((image_embeds @ class_embeds.T).argmax(dim=1) == labels).double()
    by_class = [(hits[labels == label].mean().item(), int((labels == label).sum())) for label in labels.unique()]
    accuracy = hits.mean().item()
    # The classes are independent, so the variances of their means add up.
    variance = sum(standard_error(share, count) ** 2 for share, count in by_class) / len(by_class) ** 2
    return {
        "zero_shot_accuracy": accuracy,
        "zero_shot_accuracy_error": standard_error(accuracy, len(hits)),
        "zero_shot_balanced_accuracy": sum(share for share, _ in by_class) / len(by_class),
        "zero_shot_balanced_accuracy_error": math.sqrt(variance),
    }
