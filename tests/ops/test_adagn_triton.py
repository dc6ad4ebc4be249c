"""
The Triton kernels of AdaGN against the reference in float64.

Without a GPU, `test_in_tritons_interpreter` runs this file once more in a process with `TRITON_INTERPRET=1`, in which
the kernels run on CPU: Triton reads the variable when it is imported. Kernels take milliseconds a program there, so
the tensors are tiny, and plans are given where the rule would give others for them.
"""

import logging
import os
import subprocess
import sys

import pytest
import torch
from tolerances import ONE_LAYER, gradient_errors, rounding_errors
from torch._subclasses.fake_tensor import FakeTensorMode

import diffusers_adm.ops.adagn_triton  # noqa: F401 (the package exports functions of modules under their names)
from diffusers_adm.ops.adagn import adagn, adagn_reference


kernels = sys.modules["diffusers_adm.ops.adagn_triton"]
HAS_TRITON = kernels.triton is not None
RUNS_KERNELS = kernels.INTERPRETED or (HAS_TRITON and torch.cuda.is_available())
DEVICE = "cpu" if kernels.INTERPRETED or not torch.cuda.is_available() else "cuda"
EPS = 1e-5
# (batch, channels, groups, height, width)
SHAPES = {
    "usual": (2, 12, 4, 5, 7),
    "powers-of-two": (1, 16, 2, 4, 8),
    "spatial-1x1": (2, 12, 4, 1, 1),
    "one-group": (1, 5, 1, 3, 3),
    "channels-equal-groups": (1, 3, 3, 4, 3),
}
# Several tiles along both axes, the last of which are not full.
SPLIT = kernels.Plan(groups=0, block_p=16, block_c=8, warps=4)
# Two groups a program, of which the last has just one.
PAIRS = kernels.Plan(groups=2, block_p=64, block_c=4, warps=4)


def make_inputs(
    shape=SHAPES["usual"], dtype=torch.float32, layout="contiguous", conditioned=True, offset=0.0, size=1.0
):
    """Arguments by name; scale and shift are halves of one tensor, as in the network."""
    batch, channels, _, height, width = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = size * draw(batch, channels, height, width) * torch.linspace(0.5, 2, channels)[:, None, None] + offset
    scale, shift = (0.5 * draw(batch, 2 * channels)).to(DEVICE, torch.float32).chunk(2, dim=1)
    x = x.to(DEVICE, dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        wide = x.new_zeros(batch, channels, height, 2 * width)
        wide[..., ::2] = x
        x = wide[..., ::2]
    weight, bias = (1 + 0.3 * draw(channels)).to(DEVICE, dtype), (0.3 * draw(channels)).to(DEVICE, torch.float32)
    inputs = {"x": x, "weight": weight, "bias": bias} | ({"scale": scale, "shift": shift} if conditioned else {})
    return {name: value.detach().requires_grad_() for name, value in inputs.items()}


def cotangent(x):
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return dy.to(x.device, x.dtype)


def expected_results(inputs, num_groups):
    """Output and gradients of the reference, from the same numbers in float64."""
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    output = adagn_reference(num_groups=num_groups, eps=EPS, **exact)
    grads = torch.autograd.grad(output, list(exact.values()), cotangent(inputs["x"]).double())
    return {"output": output, **dict(zip(exact, grads, strict=True))}


def results(function, inputs, num_groups):
    output = function(num_groups=num_groups, eps=EPS, **inputs)
    grads = torch.autograd.grad(output, list(inputs.values()), cotangent(inputs["x"]))
    return {"output": output, **dict(zip(inputs, grads, strict=True))}


def results_by_plan(inputs, num_groups, plan):
    values = {"scale": None, "shift": None} | {name: value.detach() for name, value in inputs.items()}
    x, parameters = values.pop("x"), list(values.values())
    scale, shift, weight, bias = parameters
    output, mean, rstd = kernels.run_forward(x, num_groups, weight, bias, EPS, scale, shift, plan)
    arguments = (num_groups, mean, rstd, weight, bias, scale, shift, plan)
    grads = kernels.run_backward(cotangent(x), x, *arguments)
    return {"output": output} | dict(zip(("x", "weight", "bias", "scale", "shift")[: len(inputs)], grads, strict=False))


def check(actual, expected, inputs):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        like = inputs["x"] if name == "output" else inputs[name]
        assert actual[name].shape == like.shape
        assert actual[name].dtype == like.dtype
        # Sums are float32, and the result is rounded once to the dtype of the tensor.
        assert rounding_errors(actual[name].double(), value, like.dtype) <= 2 * ONE_LAYER, name


class TestKernels:
    __test__ = RUNS_KERNELS

    @pytest.mark.parametrize("plan", [None, SPLIT, PAIRS], ids=["rule", "split", "pairs"])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_agree_with_the_reference_in_float64(self, layout, plan):
        shape = (1, 12, 3, 5, 7)
        inputs = make_inputs(shape, layout=layout)
        check(results_by_plan(inputs, shape[2], plan), expected_results(inputs, shape[2]), inputs)

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_of_other_shapes_and_without_conditioning(self, shape):
        inputs = make_inputs(shape, conditioned=False)
        layout = torch.channels_last if shape[2] == 4 else torch.contiguous_format
        inputs["x"] = inputs["x"].detach().contiguous(memory_format=layout).requires_grad_()
        check(results(adagn, inputs, shape[2]), expected_results(inputs, shape[2]), inputs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("plan", [None, SPLIT], ids=["rule", "split"])
    def test_of_16_bits(self, plan, dtype):
        shape = (1, 12, 4, 5, 7)
        inputs = make_inputs(shape, dtype, "channels_last")
        check(results_by_plan(inputs, shape[2], plan), expected_results(inputs, shape[2]), inputs)

    @pytest.mark.parametrize("plan", [None, SPLIT], ids=["rule", "split"])
    @pytest.mark.parametrize(("offset", "size"), [(1e3, 1), (0, 1e-4), (-3e4, 1e-1)])
    def test_of_large_offsets_and_tiny_values(self, plan, offset, size):
        """As precise as without an offset: float32 could not even hold the mean so precisely."""
        shape = (1, 12, 3, 5, 7)
        inputs = make_inputs(shape, offset=offset, size=size)
        check(results_by_plan(inputs, shape[2], plan), expected_results(inputs, shape[2]), inputs)

    def test_take_other_layouts(self):
        inputs = make_inputs((1, 12, 4, 5, 7), layout="sliced")
        assert not inputs["x"].is_contiguous()
        check(results(adagn, inputs, 4), expected_results(inputs, 4), inputs)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_keep_the_layout(self, layout):
        inputs = make_inputs((1, 4, 2, 3, 3))
        x = inputs.pop("x").detach().contiguous(memory_format=layout).requires_grad_()
        output = adagn(x, 2, eps=EPS, **inputs)
        (dx,) = torch.autograd.grad(output, x, torch.ones_like(output, memory_format=torch.contiguous_format))
        for tensor in (output, dx):
            assert tensor.is_contiguous(memory_format=layout)

    def test_of_an_empty_batch(self):
        inputs = make_inputs((0, 4, 2, 3, 3))
        actual = results(adagn, inputs, 2)
        assert actual["output"].shape == (0, 4, 3, 3)
        assert not actual["weight"].any()

    def test_give_the_same_bits_again(self):
        inputs = make_inputs((1, 8, 2, 4, 5))
        first, second = (results_by_plan(inputs, 2, SPLIT) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_are_differentiable_twice(self):
        inputs = make_inputs((1, 4, 2, 3, 3))
        penalties = []
        for function in (adagn, adagn_reference):
            output = function(num_groups=2, eps=EPS, **inputs)
            grads = torch.autograd.grad(output.square().sum(), list(inputs.values()), create_graph=True)
            penalty = sum(grad.square().sum() for grad in grads)
            penalties.append(dict(zip(inputs, torch.autograd.grad(penalty, list(inputs.values())), strict=True)))
        assert gradient_errors(*penalties) <= 4 * ONE_LAYER

    def test_leave_transforms_to_the_reference(self):
        inputs = {name: value.detach() for name, value in make_inputs((1, 4, 2, 3, 3)).items()}

        def loss(x, function):
            return function(num_groups=2, eps=EPS, **(inputs | {"x": x})).square().sum()

        tangent = cotangent(inputs["x"])
        for function in (adagn, adagn_reference):
            grads = torch.func.grad(loss)(inputs["x"], function)
            _, derivative = torch.func.jvp(lambda x, f=function: loss(x, f), (inputs["x"],), (tangent,))
            assert rounding_errors((grads * tangent).sum(), derivative) <= 4 * ONE_LAYER
        batch = torch.stack([inputs["x"]] * 2)
        losses = torch.vmap(lambda x: loss(x, adagn))(batch)
        assert rounding_errors(losses[0], loss(inputs["x"], adagn_reference)) <= ONE_LAYER

    @pytest.mark.parametrize("conditioned", [True, False])
    def test_are_a_proper_operator(self, conditioned):
        inputs = make_inputs((1, 4, 2, 3, 3), layout="channels_last", conditioned=conditioned)
        values = {"scale": None, "shift": None} | inputs
        arguments = (values["x"], 2, values["weight"], values["bias"], EPS, values["scale"], values["shift"])
        torch.library.opcheck(kernels._forward, arguments)

    def test_have_a_fake_implementation(self):
        with FakeTensorMode() as mode:
            x = torch.empty(2, 4, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
            parameters = torch.empty(4, requires_grad=True), torch.empty(4, requires_grad=True)
            output = kernels.adagn_triton(x.requires_grad_(), 2, *parameters, EPS)
            output.sum().backward()
        assert output.fake_mode is mode
        assert (output.shape, output.dtype, output.stride()) == (x.shape, x.dtype, x.stride())
        assert x.grad.shape == x.shape

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_stay_in_compiled_graphs(self, backend):
        shape = (1, 4, 2, 3, 3)
        inputs = make_inputs(shape, layout="channels_last")
        torch._dynamo.reset()
        compiled = torch.compile(adagn, backend=backend, fullgraph=True)
        check(results(compiled, inputs, 2), expected_results(inputs, 2), inputs)

    def test_are_what_adagn_chooses(self, monkeypatch):
        calls = []
        monkeypatch.setattr(kernels, "run_forward", lambda *args: calls.append(args) or args[0])
        inputs = make_inputs((1, 4, 2, 3, 3))
        for activation in ("mish", "gelu", "relu"):
            expected = adagn_reference(num_groups=2, eps=EPS, activation=activation, **inputs)
            output = adagn(num_groups=2, eps=EPS, activation=activation, **inputs)
            assert rounding_errors(output, expected) <= ONE_LAYER
        double = {name: value.double() for name, value in inputs.items()}
        adagn(num_groups=2, eps=EPS, **double)
        assert not calls
        with pytest.raises(ValueError, match="the kernels have"):
            kernels.adagn_triton(num_groups=2, eps=EPS, activation="mish", **inputs)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: its package is for Linux")
@pytest.mark.skipif(kernels.INTERPRETED, reason="this is the process in which kernels are interpreted")
def test_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "-k", "TestKernels", "--durations=8"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


class _Recorder:
    """Stands in for a kernel: keeps what it would be launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, num_warps=4: self.launches.append((self.kernel, args, num_warps))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: its package is for Linux")
@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter has no compiler")
def test_kernels_compile_for_a_gpu(monkeypatch):
    """The interpreter accepts more than the compiler. The latter, with NVIDIA's assembler, needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launches = []
    weight = torch.empty(12, device="meta")
    scale, shift = torch.empty(2, 24, dtype=torch.float16, device="meta").chunk(2, dim=1)
    x = torch.empty(2, 12, 6, 7, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    with monkeypatch.context() as patch:
        for name, value in list(vars(kernels).items()):
            if isinstance(value, kernels.triton.runtime.JITFunction):
                patch.setattr(kernels, name, _Recorder(value, launches))
        for plan in (PAIRS, SPLIT):
            statistics = kernels.run_forward(x, 4, weight, weight, EPS, scale, shift, plan)[1:]
            kernels.run_backward(x, x, 4, *statistics, weight, weight, scale, shift, plan)
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    compiled = set()
    for kernel, args, num_warps in launches:
        signature, constants = {}, {}
        for parameter, value in zip(kernel.params, args, strict=True):
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = types[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(kernel, signature, constants)
        result = kernels.triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": num_warps})
        assert result.asm["cubin"]
        compiled.add(kernel.__name__)
    assert len(compiled) == 9


class TestPlans:
    # Channels and size of ADM's 64x64 network.
    LAYERS = ((192, 64), (384, 32), (576, 16), (768, 8), (960, 64), (1536, 8))

    @pytest.mark.parametrize("batch_size", [1, 32])
    @pytest.mark.parametrize("dtype", kernels.TRITON_DTYPES)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("backward", [False, True])
    def test_fit_and_keep_the_device_busy(self, backward, layout, dtype, batch_size):
        for channels, size in self.LAYERS:
            x = torch.empty(batch_size, channels, size, size, dtype=dtype, device="meta").contiguous(
                memory_format=layout
            )
            plan = kernels.find_plan(x, 32, backward)
            if plan.groups:
                assert plan.block_p >= size**2
                assert plan.groups * plan.block_p * plan.block_c <= (16384 if backward else 32768)
            else:
                programs = batch_size * -(-(size**2) // plan.block_p) * -(-channels // plan.block_c)
                assert programs >= min(132, x.numel() // 2048)
                assert 2 <= plan.block_p * plan.block_c <= kernels.SPLIT_BYTES // x.element_size()
            assert 1 <= plan.warps <= 32

    def test_of_huge_tensors_have_offsets_of_32_bits(self):
        """Tiles are found by 64-bit offsets; within a tile, or a whole example, 32 bits must do."""
        x = torch.empty(1, 64, 2**13, 2**13, dtype=torch.bfloat16, device="meta")
        plan = kernels.find_plan(x, 32)
        assert plan.groups == 0
        assert plan.block_c * x.shape[2] * x.shape[3] < 2**31
        assert kernels.whole_plan(2, 1, 2**30, 2, False, 32768) is None


class TestChoice:
    def test_on_cpu_says_nothing(self, caplog):
        if not kernels.INTERPRETED:
            assert not kernels.triton_is_usable(torch.ones(1, 4, 2, 2))
        assert not caplog.records

    def test_warns_once_on_cuda_without_triton(self, monkeypatch, caplog):
        monkeypatch.setattr(kernels, "triton", None)
        kernels._warn_that_triton_is_missing.cache_clear()
        with FakeTensorMode(), caplog.at_level(logging.WARNING):
            x = torch.empty(1, 4, 2, 2, device="cuda")
            assert not any(kernels.triton_is_usable(x) for _ in range(3))
        (record,) = caplog.records
        assert "pip install triton" in record.getMessage()
