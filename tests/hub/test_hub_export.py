"""One file of a model, scheduler or pipeline, exported for a machine that does not have this package."""

import ast
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from diffusers.utils.dynamic_modules_utils import check_imports, get_relative_imports
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
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    GLIDETextModel,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.hub import export as hub
from diffusers_adm.hub.export import export_model_file


PIPELINES = [ADMPipeline, ADMInpaintPipeline, ADMSuperResolutionPipeline, ADMControlNetPipeline]
CLASSES = [
    AdaGNUNet2DModel,
    AdaGNControlNetModel,
    AdaGNMultiControlNetModel,
    AdaGNClassifierModel,
    GLIDETextModel,
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


class TestFile:
    @pytest.fixture(params=CLASSES)
    def path(self, request, tmp_path):
        return export_model_file(request.param, tmp_path / "code")

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
        modules = ("hub.publishing", "ops.adagn", "ops.conv", "models.unet_2d_adagn")
        assert header[1] == "# " + ", ".join(f"diffusers_adm.{module}" for module in modules)
        assert header[2] == "# SPDX-License-Identifier: Apache-2.0"

    def test_is_the_same_each_time(self, tmp_path):
        for cls in CLASSES:
            first = export_model_file(cls, tmp_path / "first").read_bytes()
            assert export_model_file(sys.modules[cls.__module__], tmp_path / "second").read_bytes() == first


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


def run(text: str) -> dict:
    namespace = {"__name__": "exported"}
    exec(compile(text, "exported", "exec"), namespace)
    return namespace


class TestInlining:
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
        assert "# of its own" in text

    def test_sources_stay_as_they_are(self, toy_package):
        body = 'X = """\nfrom .a import y\n"""  # odd   spacing\n\n\n\nY   = [1,\n 2 ]\n\nÄ = "ü"\n'
        text = toy_package({"ops.a": "Z = 1\n", "models.net": f"from ..ops.a import Z\n{body}"})
        assert body.strip() in text

    @pytest.mark.parametrize(
        "net, message",
        [
            ("from ..ops.a import f as g\n", "renames what it imports"),
            ("from ..ops.a import *\n", "does not say which names"),
            ("import toyadm.ops.a\n", "`import toyadm.ops.a` cannot be inlined"),
            ("from ..ops import a\n", "`toyadm.ops` is a package"),
            ("from .. import ops\n", "`toyadm` is a package"),
            ("def g():\n    from ..ops.a import f\n", "line 2: .* is not at the top level"),
            ("try:\n    from ..ops.a import f\nexcept ImportError:\n    f = None\n", "is not at the top level"),
            ("from ..ops.a import f; g = 1\n", "shares its line"),
            ("from ..ops.a import missing\n", r"imports \['missing'\] from `toyadm.ops.a`, which does not define"),
            ("from ..ops.nowhere import f\n", "There is no module `toyadm.ops.nowhere`"),
            ("from ..ops.a import f\ndef helper(): ...\n", r"both define \['helper'\]"),
            ("from ..ops.a import f\nimport math as m\n", r"both define \['m'\]"),
            ("from ..ops.a import f\nif True:\n    helper = 1\n", r"both define \['helper'\]"),
            ("from ..ops.a import f\nx = sorted([2, 1])\n", r"uses \['sorted'\] without importing them"),
            ("from ..ops.a import f\ndef g():\n    return sorted([2, 1])\n", r"uses \['sorted'\]"),
            ("from .net import f\n", "in a circle"),
        ],
    )
    def test_refuses_what_it_cannot_join(self, toy_package, net, message):
        ops = "import operator as m\n\ndef helper(): ...\n\ndef f(): ...\n\ndef sorted(x): ...\n"
        with pytest.raises(ValueError, match=message):
            toy_package({"ops.a": ops, "models.net": net})

    def test_what_shares_a_name_without_harm(self, toy_package):
        ops = "import math\nfrom torch import nn\n\ndef f(helper):\n    own = helper\n    return own\n"
        net = "import math\nfrom torch import nn\nfrom ..ops.a import f\nown = 3\n\ndef helper():\n    return f(own)\n"
        assert run(toy_package({"ops.a": ops, "models.net": net}))["helper"]() == 3

    @pytest.mark.parametrize("value", [torch.nn.Linear, torch.nn, dict])
    def test_refuses_what_is_not_of_the_package(self, value, tmp_path):
        with pytest.raises(ValueError, match="is not a module of diffusers_adm"):
            export_model_file(value, tmp_path)

    def test_the_package_name_is_the_real_one(self):
        assert hub.PACKAGE == "diffusers_adm"
