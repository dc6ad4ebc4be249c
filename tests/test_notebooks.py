"""The notebooks of docs/notebooks/: their format, and their code, which runs with few steps."""

import json

import matplotlib.pyplot as plt
import pytest
from markdown_pages import REPOSITORY


NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
# How many figures each shows.
FIGURES = {"from_noise_to_images": 10, "guidance": 9, "your_own_images": 4}


def cells(path, kind):
    """`{id: source}` of the cells of one kind, "code" or "markdown"."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in found if cell["cell_type"] == kind}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebooks:
    def test_is_committed_without_outputs(self, path):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        for cell in notebook["cells"]:
            assert cell["metadata"] == {}
            if cell["cell_type"] == "code":
                assert cell["outputs"] == []
                assert cell["execution_count"] is None
        assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
        assert all(source.strip() for source in cells(path, "code").values())

    @pytest.mark.slow
    def test_runs(self, path, monkeypatch):
        """From its own folder, as Jupyter starts it; the notebooks compare results with `torch.testing` themselves."""
        monkeypatch.chdir(path.parent)
        monkeypatch.setenv("NOTEBOOK_STEPS", "2")
        plt.close("all")  # what other tests have left open
        shown = []

        def show():
            for number in plt.get_fignums():
                figure = plt.figure(number)
                figure.canvas.draw()
                shown.append(figure)
            plt.close("all")

        monkeypatch.setattr(plt, "show", show)
        namespace = {"__name__": "__main__"}
        for cell, source in cells(path, "code").items():
            exec(compile(source, f"{path.name}, {cell}", "exec"), namespace)
        assert len(shown) == FIGURES[path.stem]
        assert all(figure.axes for figure in shown)
        assert plt.get_fignums() == []


def test_every_notebook_says_what_shortens_it():
    assert {path.stem for path in NOTEBOOKS} == set(FIGURES)
    for path in NOTEBOOKS:
        assert "`NOTEBOOK_STEPS`" in "".join(cells(path, "markdown").values())
