"""One file of a model, scheduler or pipeline, exported for a machine that does not have this package."""

import ast
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.utils.dynamic_modules_utils import check_imports, find_pipeline_class, get_relative_imports
from diffusers.utils.typing_utils import _is_valid_type
from hub_server import WITHOUT_PACKAGE
from tolerances import NETWORK, SAMPLING, rounding_errors
from toy_models import CONDITIONAL, MAX_PROMPT_LENGTH, random_classifier, random_text_encoder, random_unet

import diffusers_adm
from diffusers_adm import (
    AdaGNClassifierModel,
    AdaGNControlNetModel,
    AdaGNMultiControlNetModel,
    AdaGNUNet2DModel,
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    ADMUnCLIPPipeline,
    GLIDETextModel,
    LearnedVarianceDDPMScheduler,
    UnCLIPProjectionModel,
)
from diffusers_adm.hub import export as hub
from diffusers_adm.hub.export import export_model_file


PIPELINES = [
    ADMPipeline,
    ADMInpaintPipeline,
    ADMSuperResolutionPipeline,
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMUnCLIPPipeline,
]
CLASSES = [
    AdaGNUNet2DModel,
    AdaGNControlNetModel,
    AdaGNMultiControlNetModel,
    AdaGNClassifierModel,
    GLIDETextModel,
    UnCLIPProjectionModel,
    LearnedVarianceDDPMScheduler,
    *PIPELINES,
]


def run_without_package(code: str, *folders: Path, arguments: object = None) -> None:
    """Runs code with `arguments` in it and the folders in front of the module path."""
    setup = f"sys.path[:0] = {[str(folder) for folder in folders]!r}\narguments = {arguments!r}\n"
    check = "\nassert not [name for name in sys.modules if name.startswith('diffusers_adm')]\n"
    command = [sys.executable, "-P", "-c", WITHOUT_PACKAGE + setup + textwrap.dedent(code) + check]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


class TestWithoutThePackage:
    def test_same_numbers(self, tmp_path):
        pipe = ADMPipeline(
            unet=random_unet(**CONDITIONAL),
            scheduler=LearnedVarianceDDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            **dict.fromkeys(ADMPipeline._optional_components),
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(tmp_path / "weights")
        classifier = random_classifier()
        classifier.save_pretrained(tmp_path / "weights" / "classifier")
        text_encoder = random_text_encoder("glide")
        text_encoder.save_pretrained(tmp_path / "weights" / "text_encoder")
        # Each in a folder of its own: files beside that of a model would not be downloaded.
        paths = [export_model_file(cls, tmp_path / cls.__name__) for cls in CLASSES]
        assert [list(path.parent.iterdir()) for path in paths] == [[path] for path in paths]

        noisy = {"sample": torch.randn(2, 3, 8, 8), "timestep": 7}
        input_ids = torch.arange(2 * MAX_PROMPT_LENGTH).view(2, -1) % 11
        words = {"input_ids": input_ids, "attention_mask": input_ids < 8}
        inputs = (noisy | {"class_labels": torch.tensor([1, 4])}, noisy, words)
        kwargs = {"class_labels": [1, 2], "guidance_scale": 2.0, "timestep_respacing": "4", "output_type": "pt"}
        torch.save(inputs, tmp_path / "inputs.pt")
        run_without_package(
            """
            import torch
            from classifier_adagn import AdaGNClassifierModel
            from pipeline_adm import ADMPipeline
            from scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
            from text_encoder_glide import GLIDETextModel
            from unet_2d_adagn import AdaGNUNet2DModel
            folder, threads, kwargs = arguments
            torch.set_num_threads(threads)
            pipe = ADMPipeline(
                unet=AdaGNUNet2DModel.from_pretrained(f"{folder}/weights/unet"),
                scheduler=LearnedVarianceDDPMScheduler.from_pretrained(f"{folder}/weights/scheduler"),
                **dict.fromkeys(ADMPipeline._optional_components),
            )
            classifier = AdaGNClassifierModel.from_pretrained(f"{folder}/weights/classifier")
            text_encoder = GLIDETextModel.from_pretrained(f"{folder}/weights/text_encoder")
            for_unet, for_classifier, words = torch.load(f"{folder}/inputs.pt")
            with torch.no_grad():
                outputs = pipe.unet(**for_unet).sample, classifier(**for_classifier).logits, *text_encoder(**words)
            images = pipe(generator=torch.Generator().manual_seed(0), **kwargs).images
            torch.save((*outputs, images), f"{folder}/results.pt")
            """,
            *(path.parent for path in paths),
            arguments=(str(tmp_path), torch.get_num_threads(), kwargs),
        )
        output, logits, states, pooled, images = torch.load(tmp_path / "results.pt")
        with torch.no_grad():
            expected, expected_logits = pipe.unet(**inputs[0]).sample, classifier(**inputs[1]).logits
            expected_states, expected_pooled = text_encoder(**words)
        assert expected.std() > 0.1
        assert expected_logits.std() > 0.1
        assert rounding_errors(output, expected) <= NETWORK
        assert rounding_errors(logits, expected_logits) <= NETWORK
        assert expected_pooled.std() > 0.1
        assert rounding_errors(states, expected_states) <= NETWORK
        assert rounding_errors(pooled, expected_pooled) <= NETWORK
        assert rounding_errors(images, pipe(generator=torch.Generator().manual_seed(0), **kwargs).images) <= SAMPLING

    def test_the_package_really_is_absent(self, tmp_path):
        """The sources as they are do not import there; only the exported file does."""
        (tmp_path / "verbatim.py").write_text("from diffusers_adm.ops.adagn import adagn\n")
        with pytest.raises(AssertionError, match="diffusers_adm is not installed here"):
            run_without_package("import verbatim", tmp_path)


@pytest.fixture(scope="module", params=CLASSES)
def path(request, tmp_path_factory):
    return export_model_file(request.param, tmp_path_factory.mktemp("code"))


class TestFile:
    def test_is_what_diffusers_accepts_as_remote_code(self, path):
        # diffusers finds imports by regular expressions, in docstrings as well.
        assert get_relative_imports(path) == []
        assert check_imports(path) == []

    def test_imports_nothing_of_the_package(self, path):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                assert not node.module.startswith("diffusers_adm")
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("diffusers_adm") for alias in node.names)

    def test_is_found_faultless_by_a_linter(self, path):
        # F: undefined names, misplaced `from __future__`. Repeated imports are fine (F811): each module has its own.
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F", "--ignore", "F811", path]
        result = subprocess.run(command, capture_output=True, text=True)
        if "No module named ruff" in result.stderr:
            pytest.skip("ruff is not installed")
        assert result.returncode == 0, result.stdout + result.stderr

    def test_says_where_it_comes_from(self, tmp_path):
        text = export_model_file(AdaGNUNet2DModel, tmp_path).read_text()
        header = [line for line in text.splitlines()[:4] if line.startswith("#")]
        assert f"diffusers-adm {diffusers_adm.__version__}" in header[0]
        models = ("models.config_checks", "models.input_checks", "models.loading", "models.unet_2d_adagn")
        checks = ("ops.integers", "ops.finiteness", "ops.values")
        modules = ("ops.adagn_cpu", "ops.adagn_triton", "ops.adagn", "ops.conv", *checks, *models, "hub.publishing")
        assert header[1] == "# " + ", ".join(f"diffusers_adm.{module}" for module in modules)
        assert header[2] == "# SPDX-License-Identifier: Apache-2.0"

    def test_is_the_same_each_time(self, path, tmp_path):
        module = next(cls.__module__ for cls in CLASSES if cls.__module__.endswith(f".{path.stem}"))
        hub._JOINED.clear()  # so that it is joined once more
        assert export_model_file(sys.modules[module], tmp_path).read_bytes() == path.read_bytes()


@pytest.fixture
def toy_package(tmp_path, monkeypatch):
    """A function that writes modules of a package `toyadm`, which the exporter takes for its own, and exports one."""
    root = tmp_path / "toyadm"

    def export(modules: dict[str, str], name: str = "models.net") -> str:
        for module, source in modules.items():
            path = root / f"{module.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in (path.parent, root):
                (folder / "__init__.py").touch()
            path.write_text(textwrap.dedent(source), encoding="utf-8")
        return export_model_file(types.ModuleType(f"toyadm.{name}"), tmp_path / "exported").read_text(encoding="utf-8")

    monkeypatch.setattr(hub, "PACKAGE", "toyadm")
    monkeypatch.syspath_prepend(tmp_path)
    yield export
    for name in [name for name in sys.modules if name.partition(".")[0] == "toyadm"]:
        del sys.modules[name]


def run(text: str, name: str = "exported") -> dict:
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look it up
    exec(compile(text, name, "exec"), vars(module))
    return vars(module)


class TestJoining:
    def test_recursive_once_each_and_in_order(self, toy_package):
        text = toy_package(
            {
                "ops.a": '"""A."""\nimport math\nTAU = 2 * math.pi\n',
                "ops.b": "from .a import TAU\nimport math\n\ndef circle(r):\n    return TAU * r\n",
                "models.net": """\
                    '''Net.'''
                    from __future__ import annotations
                    import math  # of its own
                    from toyadm.ops.a import TAU
                    from ..ops.b import (
                        circle,
                    )  # the seam
                    RESULT: undefined = circle(1.0) / TAU
                    """,
            }
        )
        assert run(text)["RESULT"] == 1.0
        assert text.count("TAU = 2 * math.pi") == 1
        assert text.index("from __future__") < text.index("TAU = ") < text.index("def circle") < text.index("RESULT")
        assert ast.get_docstring(ast.parse(text)) == "Net."

    def test_again_once_a_source_has_changed(self, toy_package, monkeypatch):
        sources = {"ops.a": "X = 1\n", "models.net": "from ..ops.a import X\nY = X\n"}
        first = toy_package(sources)
        join, joined = hub._join, []
        monkeypatch.setattr(hub, "_join", lambda module: joined.append(module) or join(module))
        assert toy_package({}) == first
        assert not joined
        assert run(toy_package({"ops.a": "X = 123\n"}))["Y"] == 123  # not the module itself, but one that it imports
        assert joined == ["toyadm.models.net"]

    def test_sources_stay_as_they_are(self, toy_package):
        body = 'X = """\nfrom a import y\n"""  # odd   spacing\n\n\n\nY   = [1,\n 2 ]\n\nÄ = "ü"\n'
        text = toy_package({"ops.a": "Z = 1\n", "models.net": f"from ..ops.a import Z\n{body}\nW = Z"})
        assert body.strip() in text

    def test_names_are_separate(self, toy_package):
        """Every scope of Python, around a name that two modules define for themselves."""
        ops = """\
            import logging
            import operator as m
            from typing import Literal, TypeAlias

            __all__ = ["f"]
            logger = logging.getLogger(__name__)
            Mode: TypeAlias = Literal["one", "two"]

            def _size(x): return f"a{x}"

            def f(mode: Mode): return _size(mode), m.add(1, 2), logger.name
            """
        net = """\
            from __future__ import annotations

            import dataclasses
            import functools
            import logging
            import math as m
            from typing import Literal, TypeAlias, get_args, get_type_hints

            from toyadm.ops.a import (
                f as operate,  # renamed
            )

            __all__ = ["Net", "_size"]
            logger = logging.getLogger(__name__ + ".net")
            Mode: TypeAlias = Literal["three"]
            counts = {"_size": 0}

            def _size(x: "Mode | Literal['Mode', '_size']" = 2, *, _keep=None): return x * 10  # `_size` in a comment

            def decorate(factor):
                def outer(function):
                    @functools.wraps(function)
                    def inner(*args, **kwargs): return factor * function(*args, **kwargs)
                    return inner
                return outer

            @decorate(_size(1))
            def shadows_argument(_size, other=_size): return _size + other(1)

            def shadows_variable():
                _size = 3
                return [_size for _ in range(2)], (lambda m: m)(4)

            def closure():
                def inner(): return _size(2)
                m_local = m.floor(2.5)
                return inner(), m_local

            def comprehension(): return [_size for _size in range(2)], [_size(n) for n in range(2)]

            def rebinds():
                global _size, counts
                old, _size = _size, lambda x=0: "new"
                result = _size(), (_size := old)(5)
                return result

            def strings(): return f"_size {_size(6)!r:>{_size(1)}} {{_size}} {counts['_size']}" "_size", m.pi

            def keyword(): return dict(_size=_size(7))["_size"], logger.name

            @dataclasses.dataclass
            class Net:
                mode: Mode
                _size: int = _size(8)
                sizes = tuple(map(_size.__class__, ["1"]))
                other: list = dataclasses.field(default_factory=lambda: [_size(9)])

                def size(self): return self._size, _size(0.5)

            class Inherits(Net):
                logger = logger

                def _mode(self, mode: Mode = get_args(Mode)[0]) -> Mode: return mode

            try:
                raise ValueError
            except ValueError as m_error:
                caught = m_error

            RESULT = operate("x")
            """
        text = toy_package({"ops.a": ops, "models.net": net})
        found = run(text)
        assert found["RESULT"] == ("ax", 3, "exported")
        assert found["shadows_argument"](1) == 110
        assert found["shadows_variable"]() == ([3, 3], 4)
        assert found["closure"]() == (20, 2)
        assert found["comprehension"]() == ([0, 1], [0, 10])
        assert found["rebinds"]() == ("new", 50)
        assert found["strings"]() == ("_size         60 {_size} 0_size", pytest.approx(3.1415926))
        assert found["keyword"]() == (70, "exported.net")
        net = found["Net"]("three")
        assert (net._size, net.sizes, net.other, net.size()) == (80, (1,), [90], (80, 5.0))
        assert found["Inherits"].logger.name == "exported.net"
        assert found["Inherits"]("three")._mode() == "three"
        hints = get_type_hints(found["Inherits"]._mode, found)
        assert hints["mode"] == Literal["three"]
        sizes = next(value for name, value in found.items() if name.startswith("_size__"))
        assert get_type_hints(sizes, found)["x"] == Literal["three"] | Literal["Mode", "_size"]
        assert "# `_size` in a comment" in text
        assert text.count("__all__") == 0
        assert "operate = f" in text

    def test_each_kind_of_import(self, toy_package):
        modules = {
            "ops.a": "def f(): return 1\ndef g(): return 2\nclass C: pass\n",
            "ops.lazy": "from ..models.net import N\ndef lazy(): return N\n",
            "ops.types": "raise SystemExit('not to be inlined')",
            "ops.unused": "raise SystemExit('not to be inlined')",
            "ops.shares": "h = 3\n",
            "ops.__init__": "from .a import f\n",
            "models.net": """\
                from __future__ import annotations
                from typing import TYPE_CHECKING
                import toyadm.ops.a as whole
                from .. import ops
                from ..ops import a, f
                from ..ops.a import C as D
                from ..ops.shares import h; i = h
                from ..ops.unused import unused
                if TYPE_CHECKING:
                    from ..ops.types import T
                try:
                    from toyadm.ops.a import g
                except ImportError:
                    g = None
                N = 7

                def later(t: T):
                    from ..ops.lazy import lazy
                    return lazy()

                def only():
                    from ..ops.a import g as f
                    return f()

                def both(x):
                    if x:
                        from ..ops.a import f
                    else:
                        f = None
                    return f

                class Holds:
                    from ..ops.a import f

                RESULT = whole.f(), whole.g(), a.C is D, f(), ops.f(), g(), i
                """,
        }
        found = run(toy_package(modules))
        assert found["RESULT"] == (1, 2, True, 1, 1, 2, 3)
        assert (found["later"](0), found["only"](), found["both"](1)(), found["both"](0)) == (7, 2, 1, None)
        assert found["Holds"].f() == 1

    def test_built_ins_and_other_paths_to_the_same(self, toy_package):
        """A module's own `sorted` is not that of another; `Linear` is one class under both of its names."""
        ops = "from torch.nn import Linear\ndef sorted(x): return 'mine'\ndef f(x): return sorted(x), Linear\n"
        net = "from torch.nn.modules.linear import Linear\nfrom ..ops.a import f\n"
        text = toy_package({"ops.a": ops, "models.net": net + "def g(x): return f(x), sorted(x), Linear\n"})
        assert run(text)["g"]([2, 1]) == (("mine", torch.nn.Linear), [1, 2], torch.nn.Linear)
        assert "Linear__" not in text

    def test_names_for_importers_are_left_out(self, toy_package):
        net = "from ..deprecations import renamed\nX = 1\n\n__getattr__ = renamed(__name__, {'Y': 'X'})\n"
        text = toy_package({"deprecations": "def renamed(*args): ...\n", "models.net": net})
        assert "renamed" not in text
        assert run(text)["X"] == 1

    @pytest.mark.parametrize(
        "net, message",
        [
            ("from ..ops.a import *\n", "cannot be exported. Write `from module import name`"),
            ("import toyadm.ops.a\n", "`import toyadm.ops.a` cannot be exported"),
            ("from ..ops.a import missing\nx = missing", r"imports `missing` from `toyadm.ops.a`, which does not"),
            ("from ..ops.nowhere import f\nx = f", "There is no module `toyadm.ops.nowhere`"),
            (
                "from ..ops.b import t\nx = t",
                "models.net -> toyadm.ops.b -> toyadm.models.net import each other",
            ),
            ("from ..ops.a import f\nx = f\ndef s(): ...\ny = f'{s=}'", r"cannot be replaced .* \['s'\]"),
            ('"""\nfrom .a import b\n"""', "starts like a relative import"),
        ],
    )
    def test_refuses_what_it_cannot_join(self, toy_package, net, message):
        circle = "from ..models.net import x\nt = x\n"
        with pytest.raises(ValueError, match=message):
            toy_package({"ops.a": "def s(): ...\n\ndef f(): ...\n", "ops.b": circle, "models.net": net})

    @pytest.mark.parametrize("value", [torch.nn.Linear, torch.nn, dict])
    def test_refuses_what_is_not_of_the_package(self, value, tmp_path):
        with pytest.raises(ValueError, match="is not a module of diffusers_adm"):
            export_model_file(value, tmp_path)

    def test_the_package_name_is_the_real_one(self):
        assert hub.PACKAGE == "diffusers_adm"


class TestStandIns:
    """A toy pipeline whose component comes in a file of its own."""

    NET = """\
        import torch
        from diffusers import ConfigMixin, ModelMixin
        from diffusers.configuration_utils import register_to_config

        class Net(ModelMixin, ConfigMixin):
            @register_to_config
            def __init__(self, width: int = 1):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(width))

            @classmethod
            def from_width(cls, width): return cls(width)

        class Group(Net):
            pass
        """
    BASE = """\
        from diffusers import DDPMScheduler, DiffusionPipeline
        from toyadm.models.net import Group, Net

        def _check(unet):
            if not isinstance(unet, Net): raise TypeError(type(unet))

        class BasePipeline(DiffusionPipeline):
            def __init__(self, unet: Net | Group, scheduler: DDPMScheduler):
                _check(unet)
                super().__init__()
                self.register_modules(unet=unet, scheduler=scheduler)

            def kind(self): return isinstance(self.unet, Group), isinstance(self, BasePipeline), Net.from_width(3)
        """
    OTHER = """\
        from toyadm.models.net import Net as Network
        from toyadm.pipelines.base import BasePipeline

        def _check(value): return isinstance(value, Network)

        class OtherPipeline(BasePipeline):
            def kind(self): return *BasePipeline.kind(self), _check(self.unet), issubclass(type(self.unet), Network)
        """

    @pytest.fixture
    def files(self, toy_package, monkeypatch):
        """The files of the two pipelines and of the component, as code."""

        def like(module: str, name: str) -> type:
            return type(name, (), {"__module__": f"toyadm.{module}"})

        pipelines = [like("pipelines.base", "BasePipeline"), like("pipelines.other", "OtherPipeline")]
        monkeypatch.setattr(hub, "COMPONENTS", [like("models.net", "Net"), like("models.net", "Group")])
        monkeypatch.setattr(hub, "PIPELINES", pipelines)
        modules = {"models.net": self.NET, "pipelines.base": self.BASE, "pipelines.other": self.OTHER}
        return [toy_package(modules, name) for name in ("pipelines.base", "pipelines.other", "models.net")]

    def test_components_are_recognised_by_name(self, files, monkeypatch):
        base, other, net = files
        assert "class Net" not in base
        component = run(net, "diffusers_modules.local.net")
        # In one module, as diffusers does it.
        module = types.ModuleType("diffusers_modules.local.pipeline")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(base, vars(module))
        first = find_pipeline_class(module)
        exec(other, vars(module))
        second = find_pipeline_class(module)
        assert (first.__name__, second.__name__) == ("BasePipeline", "OtherPipeline")
        pipe = second(component["Group"](), DDPMScheduler())
        is_group, is_base, made, *rest = pipe.kind()
        assert (is_group, is_base, rest) == (True, True, [True, True])
        assert type(made) is component["Net"]
        pipe = first(component["Net"](), DDPMScheduler())
        assert pipe.kind()[0] is False
        with pytest.raises(TypeError):
            first(torch.nn.Linear(1, 1), DDPMScheduler())
        assert type(second.from_pipe(pipe).unet) is component["Net"]
        assert _is_valid_type(pipe.unet, first._get_signature_types()["unet"])
