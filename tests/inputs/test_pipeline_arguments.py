"""
Arbitrary arguments of every pipeline: each call works, with finite results of the right kind, or raises a `ValueError`
or `TypeError` that says why. The suite draws some examples, always the same; `pytest -m faults` tries every hostile
value for every argument, and more combinations.
"""

import functools
import inspect
import logging
import warnings
from collections import Counter
from typing import Any

import hypothesis
import pytest
import torch
from hostile import ANYTHING, HUGE, REFUSALS, VALUES, all_finite
from hypothesis import strategies as st
from toy_pipelines import CALLS

from diffusers_adm.ops.values import MAX_ELEMENTS


MAX_NUMBER = 4  # of images in a result that is not refused: more would only take time
SETTINGS: dict[str, Any] = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
pytestmark = pytest.mark.no_jitter("it only asks whether a result is finite")


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """Warnings of arguments without effect are tested elsewhere; here there are thousands."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@functools.cache
def made(name: str):
    return CALLS[name]()


def arguments_of(name: str) -> list[str]:
    """All arguments of the call of a pipeline."""
    call, valid, _ = made(name)
    names = [*inspect.signature(call).parameters, *valid]
    return [each for each in dict.fromkeys(names) if each != "call_arguments"]


def outcome(name: str, **arguments: Any) -> str:
    """What became of a call: "worked" or "refused"."""
    call, valid, shape = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = call(**{**valid, **arguments})
        except REFUSALS as error:
            message = str(error)
        else:
            message = None
    if message is not None:
        assert message.strip(), arguments
        return "refused"
    images = getattr(result, "images", result)
    images = images[0] if isinstance(images, tuple) else images
    assert all_finite(images), arguments
    if isinstance(images, torch.Tensor) and {*arguments} <= {"eta", "guidance_scale", "generator", "strength"}:
        assert images.shape == shape, arguments
    return "worked"


@st.composite
def some_arguments(draw, names: list[str]) -> dict[str, Any]:
    """One to three arguments with any values; not such that ask for more work than a test has time for."""
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    return {name: draw(ANYTHING.filter(functools.partial(is_quick, name))) for name in chosen}


def is_quick(name: str, value: Any) -> bool:
    """Whether a test has the time for a call with this value, if it is not refused."""
    if value is print:  # a callback that prints
        return False
    counts = ("num_images_per_prompt", "batch_size", "height", "width", "num_inference_steps", "jump_n_sample")
    if name in counts or name.endswith(("_steps", "_iterations", "_candidates")):
        return not (isinstance(value, int) and 16 < value < HUGE)
    return not (name == "timestep_respacing" and isinstance(value, (int, str)) and value not in ("2,2", "ddim2"))


@pytest.mark.parametrize("name", CALLS)
def test_the_valid_call_works(name):
    assert outcome(name) == "worked"


@pytest.mark.parametrize("name", CALLS)
@hypothesis.settings(max_examples=12, **SETTINGS)
@hypothesis.given(data=st.data())
def test_any_arguments(name, data):
    outcome(name, **data.draw(some_arguments(arguments_of(name))))


@pytest.mark.faults
@pytest.mark.parametrize("name", CALLS)
@hypothesis.settings(max_examples=2000, **SETTINGS)
@hypothesis.given(data=st.data())
def test_many_arguments(name, data):
    outcome(name, **data.draw(some_arguments(arguments_of(name))))


@pytest.mark.faults
@pytest.mark.parametrize("name", CALLS)
def test_every_value_of_every_argument(name, record_property):
    counts = Counter(
        outcome(name, **{argument: value}) for argument in arguments_of(name) for value in VALUES if value is not print
    )
    print(f"{name}: {dict(counts)}")
    record_property("counts", dict(counts))
    assert counts["worked"] > 20


# What must be refused quickly, and by name


TOO_MUCH = {
    "num_inference_steps": HUGE,
    "num_images_per_prompt": HUGE,
    "height": HUGE,
    "width": HUGE,
    "batch_size": HUGE,
    "jump_n_sample": HUGE,
    "prior_num_candidates": HUGE,
    "prior_num_inference_steps": HUGE,
    "super_res_num_inference_steps": HUGE,
    "num_fixed_point_iterations": HUGE,
}


@pytest.mark.parametrize("name", CALLS)
def test_absurd_numbers(name):
    """Nothing of this size is computed or allocated: the memory of a call with a billion images would be terabytes."""
    for argument in TOO_MUCH.keys() & {*arguments_of(name)}:
        for value in (HUGE, MAX_ELEMENTS + 1):
            assert outcome(name, **{argument: value}) == "refused", argument


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("guidance_scale", float("nan"), "`guidance_scale` is nan; it must be a finite number"),
        ("guidance_scale", None, "`guidance_scale` is None"),
        ("guidance_scale", "2", "`guidance_scale` is '2'"),
        ("guidance_scale", 10**400, "`guidance_scale` is 1000"),
        ("guidance_rescale", torch.zeros(2), "`guidance_rescale` is a Tensor of shape"),
        ("classifier_guidance_scale", True, "`classifier_guidance_scale` is True"),
        ("eta", 1e300, "`eta` is 1e"),
        ("eta", float("inf"), "`eta` is inf"),
        ("num_images_per_prompt", 2.5, "`num_images_per_prompt` is 2.5"),
        ("num_images_per_prompt", 0, "`num_images_per_prompt` is 0"),
        ("height", 8.0, "`height` is 8.0"),
        ("height", 0, "`height` and `width` are 0 and 8"),
        ("num_inference_steps", 51, "between 1 and the `num_train_timesteps` 50"),
        ("latents", [1], r"`latents` is \[1\]; pass a `torch.Tensor`"),
        ("latents", torch.zeros(2, 3, 8, 8, device="meta"), "`latents` is a tensor on the device meta"),
        ("latents", torch.zeros(2, 3, 8, 8).to_sparse(), "`latents` is a tensor sparse"),
        ("latents", torch.zeros(2, 3, 8, 8, dtype=torch.complex64), "`latents` is a tensor of type torch.complex64"),
        ("latents", torch.full((2, 3, 8, 8), 1e30), "`latents` holds numbers up to 1e.30; they must lie within"),
        ("class_labels", object(), "`class_labels` is <object"),
        ("class_labels", {"a": 1}, "`class_labels` is {'a': 1}"),
        ("generator", [None, None], "`generator` is or holds None"),
        ("callback_on_step_end", 3, "`callback_on_step_end` is 3"),
        ("callback_on_step_end", lambda *_: None, "`callback_on_step_end` returned None"),
        ("return_dict", "yes", "`return_dict` is 'yes'; pass True or False"),
    ],
)
def test_messages(argument, value, words):
    call, valid, _ = made("by_class")
    with pytest.raises((ValueError, TypeError), match=words):
        call(**{**valid, argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("prompt", [], r"`prompt` is \[\]; pass a string, or a list of at least one"),
        ("prompt", 3, "`prompt` is 3"),
        ("prompt", ["a", None], "`prompt` is .'a', None."),
        ("prompt", "\ud800", "half of a character"),
        ("negative_prompt_embeds", torch.zeros(1, 12, 3), "takes floating point numbers of shape"),
        ("negative_prompt_embeds", torch.zeros(1, 12), "`negative_prompt_embeds` has shape"),
        ("negative_prompt_embeds", torch.zeros(3, 12, 16), "holds 3 prompts, but the call has 1"),
        ("negative_prompt_embeds", torch.full((1, 12, 16), torch.nan), "NaN or infinity"),
    ],
)
def test_messages_of_prompts(argument, value, words):
    call, valid, _ = made("by_text")
    with pytest.raises(ValueError, match=words):
        call(**{**valid, argument: value})


def test_masks_of_prompts():
    call, valid, _ = made("by_text")
    valid = {**valid, "prompt": None, "prompt_embeds": torch.zeros(1, 12, 16)}
    for mask in (torch.zeros(1, 5), torch.full((1, 12), 7), torch.zeros(2, 12)):
        with pytest.raises(ValueError, match="`prompt_attention_mask` has shape"):
            call(**valid, prompt_attention_mask=mask)
