"""The Space as visitors see it: over its API, and in headless Chromium with a mouse that draws."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageDraw


pytest.importorskip("gradio", reason="The page needs Gradio: pip install -r spaces/requirements.txt")
gradio_client = pytest.importorskip("gradio_client")

APP = Path(__file__).parents[2] / "spaces" / "app.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START_SECONDS, PATIENCE_MS = 120, 30_000


@pytest.fixture(scope="module")
def url(models_folder, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("space")
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "GRADIO_TEMP_DIR": str(home),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    command = [sys.executable, str(APP), "--models", str(models_folder), "--port", str(port)]
    log = home / "log"
    with log.open("w") as file:
        app = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, app, log)
        yield address
    finally:
        app.terminate()
        app.wait(30)


def _wait_for(address, app, log):
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if app.poll() is not None:
            pytest.fail(f"The app ended:\n{log.read_text()}")
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"The app does not answer:\n{log.read_text()}")


# Over the API


@pytest.fixture(scope="module")
def client(url):
    return gradio_client.Client(url, verbose=False)


GENERATE = {
    "prompt": "red cat",
    "category": "cats",
    "guidance_scale": 2.0,
    "classifier_scale": 0.5,
    "steps": 4,
    "sampler": "DDPM",
    "seed": 3,
    "num_images": 2,
    "upscale": False,
}


def contents(pictures):
    return [Path(picture["image"]).read_bytes() for picture in pictures]


def drawing(folder, background=None, strokes=None):
    names = {"background": background, "strokes": strokes}
    files = {}
    for name, picture in names.items():
        if picture is not None:
            picture.save(folder / f"{name}.png")
            files[name] = gradio_client.handle_file(str(folder / f"{name}.png"))
    layers = [files["strokes"]] if "strokes" in files else []
    return {"background": files.get("background"), "layers": layers, "composite": None}


def test_names_of_the_api(client):
    names = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    assert names >= {"/generate", "/reproduce", "/edit", "/sketch", "/look_inside"}
    # Gradio has one more, for a moment, while it caches examples.
    assert not names & {"/fill_in", "/take_first", "/new_seed"}


def test_recipe_makes_the_same_pictures_again(client):
    pictures, _, recipe, link, archive = client.predict(**GENERATE, api_name="/generate")
    again, *_ = client.predict(recipe=recipe, api_name="/reproduce")
    assert contents(pictures) == contents(again)
    assert "seed=3" in link
    assert Path(archive).suffix == ".zip"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 1000}, "1000"),
        ({"num_images": 50}, "50"),
        ({"prompt": "x" * 201}, "at most 200"),
        ({"category": "unicorns"}, "unicorns"),
        ({"category": "any"}, "Classifier guidance steers towards a category"),
    ],
)
def test_limits_hold_on_the_server(client, change, message):
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        client.predict(**{**GENERATE, **change}, api_name="/generate")


def test_drawings_over_the_api(client, tmp_path):
    background = Image.new("RGBA", (64, 64), "orange")
    strokes = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(strokes).line((8, 32, 56, 32), fill="black", width=16)
    common = {"prompt": "hat", "category": "any", "guidance_scale": 2, "steps": 3, "seed": 0, "num_images": 1}
    edited, _ = client.predict(drawing=drawing(tmp_path, background, strokes), **common, api_name="/edit")
    assert len(edited) == 1
    sketched = client.predict(drawing=drawing(tmp_path, None, strokes), strength=1, **common, api_name="/sketch")
    assert len(sketched[1]) == 1
    with pytest.raises(gradio_client.exceptions.AppError, match="Upload one first"):
        client.predict(drawing=drawing(tmp_path), **common, api_name="/edit")
    with pytest.raises(gradio_client.exceptions.AppError, match="Nothing is drawn"):
        client.predict(drawing=drawing(tmp_path), strength=1, **common, api_name="/sketch")


# In a browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="The browser is driven by playwright.")
    if CHROMIUM is None:
        pytest.skip("There is no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1200, 1000), (390, 844)], ids=["desk", "phone"])
def page(browser, url, request):
    """Fails in the end for errors in the console; leaves a screenshot where SPACE_SCREENSHOTS says."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE_MS)
    errors = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{url}/?steps=4&num_images=2&prompt=red+cat")
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    yield page
    folder = os.environ.get("SPACE_SCREENSHOTS")
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{request.node.name}.png", full_page=True)
    page.close()
    assert errors == []


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def wait_until_done(page):
    page.wait_for_function(
        "[...document.querySelectorAll('textarea, input')].some(x => x.value == 'Done.' && x.offsetParent)"
    )


def draw(page, element_id):
    editor = page.locator(f"#{element_id}")
    editor.get_by_role("button", name="Brush").first.click()
    editor.scroll_into_view_if_needed()
    page.wait_for_timeout(500)  # for the canvas to settle
    box = editor.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    page.mouse.move(x + 60, y - 60, steps=8)
    page.mouse.move(x + 60, y + 60, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)


def test_generate_in_the_browser(page):
    # As the link says, once the page has asked for it.
    page.wait_for_function("[...document.querySelectorAll('textarea, input')].some(x => x.value == 'red cat')")
    page.get_by_label("Category").first.click()
    page.get_by_role("option", name="dogs").click()
    button(page, "Generate").click()
    page.get_by_text("Link to these pictures").wait_for()
    assert page.locator(".pixels img").count() >= 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_edit_in_the_browser(page):
    button(page, "Generate").click()
    page.get_by_text("Link to these pictures").wait_for()
    page.get_by_role("tab", name="Edit").click()
    button(page, "Take the first picture of Generate").click()
    page.wait_for_timeout(1000)
    draw(page, "edit-drawing")
    button(page, "Repaint").click()
    wait_until_done(page)


def test_sketch_in_the_browser(page):
    page.get_by_role("tab", name="Sketch").click()
    draw(page, "sketch-drawing")
    button(page, "Draw it").click()
    wait_until_done(page)


def test_look_inside_in_the_browser(page):
    page.get_by_role("tab", name="Look inside").click()
    button(page, "Look inside").click()
    page.get_by_text("bits per dimension for this picture").wait_for()


def test_bad_input_in_the_browser(page):
    page.get_by_role("tab", name="Sketch").click()
    button(page, "Draw it").click()
    page.get_by_text("Nothing is drawn yet").wait_for()
