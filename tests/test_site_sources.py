"""docs/site/prepare.py: pages written for GitHub, prepared for the generator of the site."""

import importlib.util
import textwrap

import pytest
from markdown_pages import REPOSITORY


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare_site", REPOSITORY / "docs" / "site" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = {"docs/guidance.md", "docs/api/models.md", "docs/notebooks/guidance.ipynb", "SECURITY.md", "data/x/README.md"}


@pytest.mark.parametrize(
    "page, link, of_the_site",
    [
        ("docs/training.md", "[a](guidance.md#scale)", "[a](guidance.md#scale)"),
        ("docs/training.md", "[a](../SECURITY.md#b)", "[a](repository/SECURITY.md#b)"),
        ("docs/training.md", "[a](notebooks/guidance.ipynb)", "[a](notebooks/guidance.md)"),
        ("docs/notebooks/guidance.ipynb", "[a](../guidance.md)", "[a](../guidance.md)"),
        ("docs/notebooks/guidance.ipynb", "[a](../../SECURITY.md)", "[a](../repository/SECURITY.md)"),
        ("SECURITY.md", "[a](docs/guidance.md#b)", "[a](../guidance.md#b)"),
        ("data/x/README.md", "[`a`](../../SECURITY.md)", "[`a`](../../SECURITY.md)"),
        # Broken: for the generator to find.
        ("docs/training.md", "[a](no.md)", "[a](no.md)"),
        ("docs/training.md", "[a](../no.md)", "[a](../no.md)"),
        # Not for this function.
        ("SECURITY.md", "[a](#b) [c](https://d.e/f.md)", "[a](#b) [c](https://d.e/f.md)"),
    ],
)
def test_links_between_pages(prepare, page, link, of_the_site):
    assert prepare.with_links_of_the_site(link, page, FILES, repo_url=None) == of_the_site


@pytest.mark.parametrize(
    "repo_url, of_the_site",
    [
        (None, "see the config here"),
        ("https://a.b/c", "see [the config](https://a.b/c/blob/HEAD/{}) here"),
    ],
)
def test_links_to_files_that_are_no_pages(prepare, repo_url, of_the_site):
    config = "training/configs/unet_emoji_32_text.json"
    text = f"see [the config](../{config}) here"
    changed = prepare.with_links_of_the_site(text, "docs/training.md", FILES, repo_url)
    assert changed == of_the_site.format(config)


def test_pages_outside_of_docs_are_found_by_links(prepare):
    files = prepare.find_files("    - Security: repository/SECURITY.md\n")
    # docs/ links to spaces/model/README.md and the menu to SECURITY.md; code and data are left out.
    assert {"docs/index.md", "docs/images/overview.png", "SECURITY.md", "benchmarks/README.md"} <= files
    assert {path.rpartition(".")[2] for path in files} == {"md", "ipynb", "png"}


def test_lists_are_indented_by_four_spaces(prepare):
    page = """\
    - a
      more of a

      ```bash
      b
      ```

      - c
        more of c
    1. d
       more of d

    text
    - e
    - f

    ```yaml
    - g:
      - h
    ```
    """
    expected = """\
    - a
        more of a

        ```bash
        b
        ```

        - c
            more of c

    1. d
        more of d

    text
    - e
    - f

    ```yaml
    - g:
      - h
    ```
    """
    assert prepare.with_deep_lists(textwrap.dedent(page)) == textwrap.dedent(expected)


def test_code_is_left_alone(prepare):
    page = "a\n```python\n[x](y)\n```\nb\n  ```bash\n  c\n  ```\n"
    assert prepare.outside_of_code(page, str.upper) == "A\n```python\n[x](y)\n```\nB\n  ```bash\n  c\n  ```\n"


def test_notebooks_become_pages(prepare):
    text = prepare.read_page("docs/notebooks/guidance.ipynb")
    assert text.startswith('# Guidance\n\n<a href="guidance.ipynb" download>')
    assert "```python\nimport os\n" in text
    assert "\n```\n\n## Classifier-free guidance\n" in text
