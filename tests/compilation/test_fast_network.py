"""
`enable_fast` with a compiler that only copies the network: when code is made, used, kept, dropped and refused. The
tests of test_compiled_code.py run the real one, which takes minutes.
"""

import copy
import logging
import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.hooks import apply_group_offloading
from toy_models import (
    CONDITIONAL,
    TEXT_WIDTH,
    fill_randomly,
    random_classifier,
    random_diffusers_unet,
    random_text_unet,
    random_unet,
)

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.compilation import cpu, fast_network, suitability
from diffusers_adm.compilation.code_cache import CODE


# One level is enough for these tests, most of which sample several times.
SMALL = {"block_out_channels": (8,), "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
SMALL_CONDITIONAL = {**SMALL, **CONDITIONAL}


class CopyingCompilation:
    """In place of `cpu.Compilation`: the code is a frozen copy of the network."""

    is_done = True
    seconds = 0.0

    def __init__(self, cache, key, network, arguments, dtype, in_background):
        self.cache, self.key, self.folder = cache, key, cache.new_folder()
        network = copy.deepcopy(network).eval()
        torch.nn.Module.to(network, dtype=dtype, memory_format=torch.channels_last)
        leaves, spec, places = cpu.flatten(arguments)
        assert all(not leaves[place].any() for place in places)  # zeros
        leaves = [None if i in places else leaf for i, leaf in enumerate(leaves)]
        torch.save(cpu.Flat(network, leaves, spec, places), self.folder / CODE)

    def result(self):
        return self.cache.put(self.key, self.folder)

    def cancel(self):
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def copying(monkeypatch):
    monkeypatch.setattr(fast_network, "Compilation", CopyingCompilation)
    monkeypatch.setattr(cpu, "load_code", lambda path: torch.load(path, weights_only=False))


@pytest.fixture
def pipe(tmp_path):
    return make_pipeline(random_unet(**SMALL_CONDITIONAL))


def make_pipeline(unet, cls=ADMPipeline, scheduler=None, **components):
    scheduler = scheduler or LearnedVarianceDDPMScheduler(num_train_timesteps=20)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None, **components}
    pipe = cls(unet, scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, labels=(1, 2), **kwargs):
    arguments = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipe(class_labels=list(labels), **{**arguments, **kwargs}).images


def assert_same(fast, slow):
    # Channels-last convolutions add up in another order: some 1e-6 for each pass, over two steps.
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4)


def run(network, *args, **kwargs):
    with torch.no_grad():
        return network(*args, **kwargs)


class TestNumbers:
    def test_a_pipeline(self, pipe, tmp_path):
        slow = sample(pipe)
        pipe.enable_fast(cache_dir=tmp_path)
        assert_same(sample(pipe), slow)
        runner = pipe.unet._compiled_call_impl
        assert (runner.num_compiled, runner.num_loaded) == (1, 0)
        assert_same(sample(pipe), slow)
        assert (runner.num_compiled, runner.num_loaded) == (1, 0)

    def test_guidance(self, pipe, tmp_path):
        slow = sample(pipe, guidance_scale=3.0, guidance_start=0.5)
        pipe.enable_fast(cache_dir=tmp_path)
        assert_same(sample(pipe, guidance_scale=3.0, guidance_start=0.5), slow)

    def test_classifier_guidance(self, tmp_path):
        pipe = make_pipeline(random_unet(**SMALL_CONDITIONAL), classifier=random_classifier(num_classes=4))
        slow = sample(pipe, classifier_guidance_scale=2.0)
        pipe.enable_fast(cache_dir=tmp_path)
        assert_same(sample(pipe, classifier_guidance_scale=2.0), slow)
        assert pipe.unet._compiled_call_impl.num_compiled == 1

    @pytest.mark.parametrize("kind", ["transformer", "added_kv"])
    def test_text(self, kind, tmp_path):
        pipe = make_pipeline(random_text_unet(kind))
        inputs = torch.randn(2, 3, 8, 8), torch.tensor(5)
        text = {"encoder_hidden_states": torch.randn(2, 4, TEXT_WIDTH), "encoder_attention_mask": torch.ones(2, 4)}
        text["encoder_attention_mask"][0, 2:] = 0
        slow = run(pipe.unet, *inputs, **text).sample
        pipe.enable_fast(cache_dir=tmp_path)
        assert_same(run(pipe.unet, *inputs, **text).sample, slow)
        assert pipe.unet._compiled_call_impl.num_compiled == 1

    def test_a_network_of_diffusers(self, tmp_path):
        pipe = make_pipeline(random_diffusers_unet())
        inputs = torch.randn(2, 3, 8, 8), 5
        slow = run(pipe.unet, *inputs)
        pipe.enable_fast(cache_dir=tmp_path)
        fast = run(pipe.unet, *inputs)
        assert type(fast) is type(slow)
        assert_same(fast.sample, slow.sample)
        assert pipe.unet._compiled_call_impl.num_compiled == 1

    @pytest.mark.parametrize("number", [1, 2])
    def test_controlnets(self, number, tmp_path):
        unet = random_unet(**SMALL_CONDITIONAL)
        nets = [fill_randomly(AdaGNControlNetModel.from_unet(unet), seed) for seed in range(1, number + 1)]
        pipe = make_pipeline(unet, ADMControlNetPipeline, controlnet=nets if number > 1 else nets[0])
        image = torch.rand(1, 3, 8, 8)
        for net in nets:
            net.eval()

        def generate(scale):
            images, scales = ([image] * number, [scale] * number) if number > 1 else (image, scale)
            return sample(pipe, image=images, controlnet_conditioning_scale=scales)

        slow = [generate(scale) for scale in (0.3, 0.7)]
        pipe.enable_fast(cache_dir=tmp_path)
        for scale, expected in zip((0.3, 0.7), slow, strict=True):
            assert_same(generate(scale), expected)
        for net in nets:
            assert net._compiled_call_impl.num_compiled == 1  # whatever the scale is

    def test_bfloat16(self, pipe, tmp_path):
        x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor(999), torch.tensor([1, 2])
        slow = run(pipe.unet, x, t, labels).sample
        pipe.enable_fast(torch.bfloat16, cache_dir=tmp_path)
        fast = run(pipe.unet, x, t, labels).sample
        assert fast.dtype == pipe.unet.dtype == torch.float32
        assert not torch.equal(fast, slow)
        # bfloat16 has 8 bits, and errors of some ten layers add up.
        assert (fast - slow).norm() < 0.05 * slow.norm()


class TestTheNetworkStays:
    def test_as_it_was(self, pipe, tmp_path):
        unet, state = pipe.unet, {name: value.clone() for name, value in pipe.unet.state_dict().items()}
        pipe.enable_fast(torch.bfloat16, cache_dir=tmp_path / "cache")
        sample(pipe)
        assert pipe.unet is unet
        assert pipe.unet.dtype == torch.float32
        assert all(torch.equal(value, state[name]) for name, value in pipe.unet.state_dict().items())
        pipe.save_pretrained(tmp_path / "saved")
        names = {path.name for path in (tmp_path / "saved").rglob("*")}
        assert CODE not in names
        assert_same(sample(ADMPipeline.from_pretrained(tmp_path / "saved")), slow_of(pipe))
        assert copy.deepcopy(pipe.unet)._compiled_call_impl is None

    def test_disabled(self, pipe, tmp_path):
        slow = sample(pipe)
        pipe.enable_fast(cache_dir=tmp_path)
        pipe.disable_fast()
        assert pipe.unet._compiled_call_impl is None
        torch.testing.assert_close(sample(pipe), slow, rtol=1e-5, atol=1e-6)
        pipe.disable_fast()

    def test_pipelines_that_share_it_are_fast(self, pipe, tmp_path):
        pipe.enable_fast(cache_dir=tmp_path)
        other = ADMPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        sample(other)
        assert pipe.unet._compiled_call_impl.num_compiled == 1
        other.disable_fast()
        assert pipe.unet._compiled_call_impl is None


def slow_of(pipe):
    pipe.disable_fast()
    return sample(pipe)


def runner_of(pipe, tmp_path, **kwargs):
    pipe.enable_fast(cache_dir=tmp_path, **kwargs)
    return pipe.unet._compiled_call_impl


class TestShapes:
    def test_each_is_compiled_once(self, pipe, tmp_path):
        runner = runner_of(pipe, tmp_path)
        for labels in ((1, 2), (1,), (1, 2), (3,), (3, 4)):
            sample(pipe, labels)
        assert runner.num_compiled == 2

    def test_numbers_as_timesteps_are_not_shapes(self, pipe, tmp_path):
        runner = runner_of(pipe, tmp_path)
        for timestep in (1, 5, torch.tensor(7)):
            run(pipe.unet, torch.randn(1, 3, 8, 8), timestep, torch.tensor([1]))
        assert runner.num_compiled == 1

    def test_the_next_process_finds_them(self, pipe, tmp_path):
        sample_of = [sample(pipe) for _ in (1, runner_of(pipe, tmp_path))][0]
        pipe = make_pipeline(random_unet(**SMALL_CONDITIONAL))
        runner = runner_of(pipe, tmp_path)
        assert_same(sample(pipe), sample_of)
        assert (runner.num_compiled, runner.num_loaded) == (0, 1)

    @pytest.mark.parametrize("change", ["seed", "config", "dtype", "version"])
    def test_the_cache_tells_networks_apart(self, pipe, tmp_path, change, monkeypatch):
        runner_of(pipe, tmp_path)
        sample(pipe)
        if change == "version":
            monkeypatch.setattr(torch, "__version__", "9.9")
        config = {"norm_eps": 1e-3} if change == "config" else {}
        pipe = make_pipeline(random_unet(seed=int(change == "seed"), **SMALL_CONDITIONAL, **config))
        runner = runner_of(pipe, tmp_path, dtype=torch.bfloat16 if change == "dtype" else "auto")
        sample(pipe)
        assert (runner.num_compiled, runner.num_loaded) == (1, 0)

    def test_settings_of_layers_count(self, pipe, tmp_path):
        runner_of(pipe, tmp_path)
        sample(pipe)
        pipe.unet.conv_in.padding_mode = "circular"
        pipe.unet.conv_in._reversed_padding_repeated_twice = [1, 1, 1, 1]
        fast = sample(pipe)
        assert_same(fast, slow_of(pipe))

    def test_a_damaged_entry_is_compiled_again(self, pipe, tmp_path, caplog):
        runner_of(pipe, tmp_path)
        slow = sample(pipe)
        (path,) = tmp_path.glob(f"*/{CODE}")
        path.write_bytes(path.read_bytes()[:-1])
        pipe = make_pipeline(random_unet(**SMALL_CONDITIONAL))
        runner = runner_of(pipe, tmp_path)
        assert_same(sample(pipe), slow)
        assert (runner.num_compiled, runner.num_loaded) == (1, 0)
        assert "is damaged" in caplog.text

    def test_code_that_cannot_be_loaded_is_compiled_again(self, pipe, tmp_path, caplog, monkeypatch):
        runner_of(pipe, tmp_path)
        sample(pipe)
        load, loads = cpu.load_code, []

        def fail_first(path):
            loads.append(path)
            if len(loads) == 1:
                raise RuntimeError("an undefined symbol")
            return load(path)

        monkeypatch.setattr(cpu, "load_code", fail_first)
        pipe = make_pipeline(random_unet(**SMALL_CONDITIONAL))
        runner = runner_of(pipe, tmp_path)
        sample(pipe)
        assert (runner.num_compiled, runner.num_loaded) == (1, 0)
        assert "an undefined symbol" in caplog.text


class TestChangedWeights:
    @pytest.mark.parametrize("how", ["in place", "data", "set", "loaded", "layer"])
    def test_are_compiled_again(self, pipe, tmp_path, how, caplog):
        runner = runner_of(pipe, tmp_path)
        before = sample(pipe)
        layer = pipe.unet.conv_in
        with torch.no_grad():
            if how == "in place":
                layer.weight.mul_(1.5)
            elif how == "data":
                layer.weight.data *= 1.5  # torch does not count this
            elif how == "set":
                layer.weight = torch.nn.Parameter(layer.weight * 1.5)
            elif how == "loaded":
                pipe.unet.load_state_dict(random_unet(seed=3, **SMALL_CONDITIONAL).state_dict())
            else:
                pipe.unet.conv_in = copy.deepcopy(layer)
                pipe.unet.conv_in.weight *= 1.5
        fast = sample(pipe)
        assert runner.num_compiled == 2
        assert "weights of `unet` have changed" in caplog.text
        assert (fast - before).abs().max() > 1e-2
        assert_same(fast, slow_of(pipe))

    def test_within_a_call(self, pipe, tmp_path):
        runner = runner_of(pipe, tmp_path)
        inputs = torch.randn(1, 3, 8, 8), 5, torch.tensor([1])
        run(pipe.unet, *inputs)
        with torch.no_grad():
            pipe.unet.conv_out.bias += 1
        fast = run(pipe.unet, *inputs).sample
        assert runner.num_compiled == 2
        pipe.disable_fast()
        assert_same(fast, run(pipe.unet, *inputs).sample)

    def test_the_same_weights_elsewhere_are_not_compiled_again(self, pipe, tmp_path):
        runner = runner_of(pipe, tmp_path)
        sample(pipe)
        pipe.unet.load_state_dict({name: value.clone() for name, value in pipe.unet.state_dict().items()})
        for parameter in pipe.unet.parameters():
            parameter.data = parameter.data.clone()
        sample(pipe)
        assert runner.num_compiled == 1

    def test_another_dtype(self, pipe, tmp_path):
        runner = runner_of(pipe, tmp_path)
        sample(pipe)
        pipe.to(torch.float64)
        assert run(pipe.unet, torch.randn(1, 3, 8, 8).double(), 5, torch.tensor([1])).sample.dtype == torch.float64
        assert runner.num_compiled == 2


class TestTheNetworkItselfRuns:
    INPUTS = (torch.randn(1, 3, 8, 8), torch.tensor(5), torch.tensor([1]))

    def test_for_gradients(self, pipe, tmp_path):
        runner = runner_of(pipe, tmp_path)
        pipe.unet(*self.INPUTS).sample.sum().backward()  # of weights
        assert pipe.unet.conv_in.weight.grad is not None
        pipe.unet.requires_grad_(False)
        x = self.INPUTS[0].clone().requires_grad_()
        pipe.unet(x, *self.INPUTS[1:]).sample.sum().backward()
        assert x.grad.abs().sum() > 0
        assert runner.num_compiled == 0
        pipe.unet(*self.INPUTS)  # nothing needs gradients
        assert runner.num_compiled == 1

    def test_in_training_mode(self, pipe, tmp_path):
        runner = runner_of(pipe, tmp_path)
        pipe.unet.train()
        run(pipe.unet, *self.INPUTS)
        assert runner.num_compiled == 0

    def test_under_autocast_and_with_hooks_which_it_says(self, pipe, tmp_path, caplog):
        runner = runner_of(pipe, tmp_path)
        with torch.autocast("cpu", torch.bfloat16):
            run(pipe.unet, *self.INPUTS)
        assert "autocast is on" in caplog.text
        calls = []
        handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
        run(pipe.unet, *self.INPUTS)
        assert calls
        assert "forward hooks" in caplog.text
        assert runner.num_compiled == 0
        handle.remove()
        run(pipe.unet, *self.INPUTS)
        assert runner.num_compiled == 1

    def test_for_calls_that_it_refuses(self, pipe, tmp_path):
        runner_of(pipe, tmp_path)
        with pytest.raises(ValueError, match="`class_labels` range"):
            run(pipe.unet, *self.INPUTS[:2], torch.tensor([7]))
        with pytest.raises(TypeError, match="missing"):
            run(pipe.unet, self.INPUTS[0])

    @pytest.mark.parametrize("background", [False, True])
    def test_for_calls_that_only_its_forward_refuses(self, pipe, tmp_path, background):
        runner = runner_of(pipe, tmp_path, background=background)
        with pytest.raises(ValueError, match="`sample` has shape"):
            run(pipe.unet, torch.randn(1, 4, 8, 8), *self.INPUTS[1:])
        with pytest.raises(TypeError, match="floating point"):
            run(pipe.unet, self.INPUTS[0].long(), *self.INPUTS[1:])
        assert runner.num_compiled == 0
        assert not runner._running
        assert not list(tmp_path.iterdir())  # no compiler has started

    def test_until_the_code_is_ready(self, pipe, tmp_path, monkeypatch):
        monkeypatch.setattr(CopyingCompilation, "is_done", False)
        runner = runner_of(pipe, tmp_path, background=True)
        slow = sample(pipe)
        assert runner.num_compiled == 0
        monkeypatch.setattr(CopyingCompilation, "is_done", True)
        assert_same(sample(pipe), slow)
        assert runner.num_compiled == 1

    def test_one_compiler_at_a_time_in_the_background(self, pipe, tmp_path, monkeypatch):
        other = make_pipeline(random_unet(**SMALL_CONDITIONAL, seed=1))
        slow = sample(other)
        first, second = (runner_of(p, tmp_path, background=True) for p in (pipe, other))
        monkeypatch.setattr(CopyingCompilation, "is_done", False)
        sample(pipe)
        sample(pipe, labels=(1,))  # another shape
        assert_same(sample(other), slow)
        assert (len(first._running), len(second._running)) == (1, 0)
        monkeypatch.setattr(CopyingCompilation, "is_done", True)
        for _ in range(2):  # starts, and takes the code
            assert_same(sample(other), slow)
            sample(pipe, labels=(1,))
            sample(pipe)
        assert (first.num_compiled, second.num_compiled) == (2, 1)

    @pytest.mark.parametrize("place", ["__init__", "result"])
    @pytest.mark.parametrize("error", [RuntimeError, OSError])
    def test_if_the_compiler_fails_in_the_background(self, pipe, tmp_path, monkeypatch, caplog, place, error):
        def fail(self, *arguments):
            raise error("a bug of the compiler")

        monkeypatch.setattr(CopyingCompilation, place, fail)
        runner = runner_of(pipe, tmp_path, background=True)
        sample(pipe)
        sample(pipe)
        assert runner.num_compiled == 0
        assert caplog.text.count("a bug of the compiler") == 1
        runner_of(pipe, tmp_path)
        with pytest.raises(error, match="a bug of the compiler"):
            sample(pipe)


class TestRefused:
    def test_offloading(self, pipe, tmp_path):
        apply_group_offloading(
            pipe.unet, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), num_blocks_per_group=1,
            offload_type="block_level",
        )  # fmt: skip
        with pytest.raises(ValueError, match="has the hook .*GroupOffloadingHook"):
            pipe.enable_fast(cache_dir=tmp_path)

    def test_hooks_of_accelerate_also_later(self, pipe, tmp_path):
        from accelerate.hooks import ModelHook, add_hook_to_module

        pipe.enable_fast(cache_dir=tmp_path)
        add_hook_to_module(pipe.unet.conv_in, ModelHook())
        with pytest.raises(ValueError, match="`unet.conv_in` has the hook ModelHook"):
            sample(pipe)
        pipe.disable_fast()
        sample(pipe)

    def test_device_maps(self, pipe, tmp_path):
        pipe.unet.hf_device_map = {"conv_in": 0, "conv_out": 1}
        with pytest.raises(ValueError, match="spread over devices"):
            pipe.enable_fast(cache_dir=tmp_path)

    def test_sharded_weights(self, pipe, tmp_path):
        class Shard(torch.Tensor):
            pass

        weight = pipe.unet.conv_in.weight.detach()
        pipe.unet.conv_in.weight = torch.nn.Parameter(weight.as_subclass(Shard), requires_grad=False)
        with pytest.raises(ValueError, match="`unet.conv_in.weight` is a Shard: it is sharded or quantised"):
            pipe.enable_fast(cache_dir=tmp_path)

    def test_several_dtypes(self, pipe, tmp_path):
        pipe.unet.conv_out.to(torch.bfloat16)
        with pytest.raises(ValueError, match=r"`unet.conv_out.weight` is torch.bfloat16, while .* Cast all of it"):
            pipe.enable_fast(cache_dir=tmp_path)
        pipe.unet.to(torch.float32)
        pipe.enable_fast(cache_dir=tmp_path)

    def test_a_lora_until_it_is_fused(self, pipe, tmp_path):
        peft = pytest.importorskip("peft")
        runner = runner_of(pipe, tmp_path)
        sample(pipe)
        pipe.unet.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False))
        with pytest.raises(ValueError, match=r"has the LoRA default, which is not fused.*fuse_lora"):
            sample(pipe)
        pipe.unet.eval()
        pipe.fuse_lora()
        fast = sample(pipe)
        assert runner.num_compiled == 2
        assert_same(fast, slow_of(pipe))

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, 16])
    def test_dtypes(self, pipe, tmp_path, dtype):
        with pytest.raises(ValueError, match="`dtype` is"):
            pipe.enable_fast(dtype, cache_dir=tmp_path)

    def test_no_compiler(self, pipe, tmp_path, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(RuntimeError, match="`no-such-compiler` was not found. Install it"):
            pipe.enable_fast(cache_dir=tmp_path)
        assert pipe.unet._compiled_call_impl is None
        sample(pipe)


class TestDtypes:
    @pytest.mark.parametrize(
        "capability, bf16, amx, expected",
        [("AVX2", True, True, torch.float32), ("AVX512", False, False, torch.float32)]
        + [("AVX512", bf16, not bf16, torch.bfloat16) for bf16 in (True, False)],
    )
    def test_auto_on_cpus(self, monkeypatch, capability, bf16, amx, expected):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        assert suitability.choose_dtype("auto", torch.float32, torch.device("cpu")) == expected
        assert suitability.choose_dtype(None, torch.float32, torch.device("cpu")) == torch.float32

    @pytest.mark.parametrize("capability, expected", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
    def test_auto_on_gpus(self, monkeypatch, capability, expected):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert suitability.choose_dtype("auto", torch.float32, torch.device("cuda")) == expected


def test_guidance_passes_are_separate_where_they_are_chosen_by_device(pipe, tmp_path, monkeypatch):
    found, run_passes = [], pipe._run_passes
    monkeypatch.setattr(pipe, "_run_passes", lambda *args: found.append(args[-1]) or run_passes(*args))

    def passes():
        found.clear()
        sample(pipe, guidance_scale=3.0, num_inference_steps=1)
        return found

    assert passes() == ["both"]
    pipe.enable_fast(cache_dir=tmp_path)
    assert passes() == ["unconditional", "conditional"]
    assert pipe.unet._compiled_call_impl.num_compiled == 1
    pipe.set_guidance_passes("joint")
    assert passes() == ["both"]
    pipe.disable_fast()
    assert pipe.guidance_passes == "joint"  # the user's choice stays
    pipe.set_guidance_passes("auto")
    assert passes() == ["both"]


def test_settings_of_layers_decide_on_the_code(pipe, tmp_path):
    """As those that FreeU and other methods set, which the config does not name."""
    pipe.enable_fast(cache_dir=tmp_path)
    sample(pipe)
    runner = pipe.unet._compiled_call_impl
    pipe.unet.up_blocks[0].s1 = 0.9
    sample(pipe)
    assert runner.num_compiled == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_changes_of_data_are_noticed(pipe, tmp_path, dtype):
    unet = pipe.unet.to(dtype)
    pipe.enable_fast(dtype=None, cache_dir=tmp_path)
    sample(pipe)
    runner = unet._compiled_call_impl
    weight = unet.conv_in.weight.data
    weight.neg_()  # the norm stays
    sample(pipe)
    assert runner.num_compiled == 2
    weight.view(-1)[0] *= 1.02  # less than a step of the norm in bfloat16
    sample(pipe)
    assert runner.num_compiled == 3


def test_hooks_of_layers_and_other_compilers_are_refused(pipe, tmp_path):
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="`unet.conv_in` has a forward hook"):
        pipe.enable_fast(cache_dir=tmp_path)
    handle.remove()
    pipe.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="already compiled by its method"):
        pipe.enable_fast(cache_dir=tmp_path)
    wrapped = make_pipeline(torch.compile(random_unet(**SMALL_CONDITIONAL), backend="eager"))
    with pytest.raises(ValueError, match="finds no network"):
        wrapped.enable_fast(cache_dir=tmp_path)


def test_other_samplers(tmp_path):
    pipe = make_pipeline(random_unet(out_channels=3, **SMALL_CONDITIONAL), scheduler=DDIMScheduler())
    slow = sample(pipe)
    pipe.enable_fast(cache_dir=tmp_path)
    assert_same(sample(pipe), slow)


def test_what_is_compiled_and_what_is_not(caplog):
    networks = {"unet": random_unet(), "super_res_first": random_unet(), "super_res_last": random_unet(), "vae": None}
    assert list(suitability.networks_to_compile(networks)) == ["unet", "super_res_first"]


def test_code_for_gpus_on_the_cpu(monkeypatch):
    # CUDA graphs need a GPU: here the same function without the compiler.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    from diffusers_adm.compilation import gpu

    unet = random_unet()
    code = gpu.compile_network(unet, {"sample": torch.zeros(1, 3, 8, 8), "timestep": torch.tensor(0)}, torch.float64)
    x = torch.randn(1, 3, 8, 8)
    (output,) = code(x.double(), torch.tensor(5))
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), run(unet, x, 5).sample, rtol=1e-4, atol=1e-5)
    assert unet.dtype == torch.float32


class Doubled(torch.nn.Module):
    """A network of one parameter."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, sample, return_dict=True):
        return (self.factor * sample,)


@pytest.mark.no_jitter("torch compiles nothing inside a dispatch mode")
def test_the_number_of_shapes_on_gpus_is_not_limited(monkeypatch):
    from diffusers_adm.compilation import gpu

    compile_, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=backend, dynamic=False))
    torch.compiler.reset()
    network, sizes = Doubled(), range(1, torch._dynamo.config.recompile_limit + 3)
    codes = [gpu.compile_network(network, {"sample": torch.zeros(size)}, torch.float32) for size in sizes]
    for size, code in [*zip(sizes, codes, strict=True)] * 2:
        assert torch.equal(code(torch.ones(size))[0], torch.full((size,), 2.0))
    assert len(graphs) == len(sizes)
    torch.compiler.reset()


def test_gpus_need_no_cache(pipe, tmp_path, monkeypatch):
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(type(pipe.unet), "device", torch.device("cuda"))
        pipe.enable_fast(cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    sample(pipe)  # once the network is on the CPU
    assert (tmp_path / "cache").exists()


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING)


def test_loaded_networks_have_the_code_of_saved_ones(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    loaded = ADMPipeline.from_pretrained(tmp_path / "saved")
    assert cpu.describe_structure(loaded.unet) == cpu.describe_structure(pipe.unet)
    assert cpu.hash_weights(loaded.unet) == cpu.hash_weights(pipe.unet)
