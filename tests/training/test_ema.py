"""EMA: the weights that train come back, whatever happens in between."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from diffusers_adm.training.ema import WeightAverage, ema_weights


@pytest.fixture(params=[False, True], ids=["loop", "foreach"])
def model_and_ema(request):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    ema = EMAModel(model.parameters(), decay=0.5, foreach=request.param)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        ema.step(model.parameters())
    return model, ema


def copies(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def assert_equal(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_averages_inside_and_trained_weights_after(model_and_ema):
    model, ema = model_and_ema
    trained, averages = copies(model.parameters()), copies(ema.shadow_params)
    assert not torch.equal(trained[0], averages[0])
    with ema_weights(ema, model.parameters()):  # a generator
        assert_equal(model.parameters(), averages)
    assert_equal(model.parameters(), trained)
    assert_equal(ema.shadow_params, averages)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions(model_and_ema, error):
    model, ema = model_and_ema
    trained = copies(model.parameters())
    with pytest.raises(error, match="validation failed"), ema_weights(ema, model.parameters()):
        raise error("validation failed")
    assert_equal(model.parameters(), trained)
    with ema_weights(ema, model.parameters()):
        pass
    assert_equal(model.parameters(), trained)


def test_nesting_is_refused_and_leaves_the_trained_weights(model_and_ema):
    model, ema = model_and_ema
    trained = copies(model.parameters())
    with (
        pytest.raises(RuntimeError, match="cannot be nested"),
        ema_weights(ema, model.parameters()),
        ema_weights(ema, model.parameters()),
    ):
        pass
    assert_equal(model.parameters(), trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_as_diffusers(dtype):
    """The averages of `EMAModel`, within the rounding of one product and one sum in each step."""
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 3), (7,))]
    options = {"decay": 0.9, "use_ema_warmup": True, "power": 0.75}
    ours, theirs = WeightAverage(parameters, **options), EMAModel(parameters, **options)
    for _ in range(10):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter))
        ours.step(iter(parameters))
        theirs.step(parameters)
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.shadow_params, theirs.shadow_params, rtol=tolerance, atol=tolerance)
    assert not torch.equal(ours.shadow_params[0], parameters[0])
    states = [{k: v for k, v in ema.state_dict().items() if k != "shadow_params"} for ema in (ours, theirs)]
    assert states[0] == states[1]
