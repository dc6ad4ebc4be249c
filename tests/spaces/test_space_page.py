"""The Space as visitors see it: over its API, and in headless Chromium, including drawing with the mouse."""

import io
import os
import re
import shutil
import threading
import time
import zipfile
from pathlib import Path
from urllib.parse import parse_qs

import gradio_client
import httpx
import pytest
from app import EXAMPLES, Space, build
from PIL import Image, ImageDraw
from playwright.sync_api import expect, sync_playwright
from space_app import START_SECONDS, running_app
from space_models import Models, Recipe


README = Path(__file__).parents[2] / "spaces" / "README.md"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 60_000
# Without a GPU, the frames of an image editor (sixty per second) take much CPU time.
TEN_FRAMES_A_SECOND = """
    const draw = window.requestAnimationFrame.bind(window);
    window.requestAnimationFrame = callback => setTimeout(() => draw(callback), 90);
    window.cancelAnimationFrame = clearTimeout;
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folder for the caches of the app; by default Gradio shares one folder among all apps."""
    return tmp_path_factory.mktemp("space")


@pytest.fixture(scope="module")
def url(models_folder, home):
    # The tests call more often than visitors may.
    with running_app(models_folder, home, "--calls_per_minute", "6000") as address:
        yield address


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


def contents(images):
    return [Path(image["image"]).read_bytes() for image in images]


def test_names_of_the_api(client):
    names = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    assert names >= {"/generate", "/reproduce", "/edit", "/sketch", "/variations", "/interpolate", "/look_inside"}
    # Gradio has one more, for a moment, while it caches examples.
    assert not names & {"/fill_in", "/first_image", "/lambda", "/interpolate_1"}


def test_recipe_reproduces_the_images(client):
    images, status, recipe, *_ = client.predict(**GENERATE, api_name="/generate")
    assert (len(images), status) == (2, "Done.")
    again, *_ = client.predict(recipe=recipe, api_name="/reproduce")
    assert contents(images) == contents(again)


def test_recipe_and_link_reproduce_the_files_in_another_process(client, models_folder):
    """The app is another process than this one."""
    request = {**GENERATE, "sampler": "DPM-Solver++", "upscale": True}
    _, _, recipe, link, archive = client.predict(**request, api_name="/generate")
    (query,) = re.findall(r"\(\?(.*)\)", link)
    from_link = Recipe.from_query({name: value for name, (value,) in parse_qs(query).items()})
    from_json, weights = Recipe.from_json(recipe)
    models = Models(models_folder)
    assert (from_link, weights) == (from_json, models.weights)
    files = zipfile.ZipFile(archive)
    assert files.read("recipe.json").decode() == recipe
    for number, image in enumerate(models.generate(from_link, lambda step: None)):
        data = io.BytesIO()
        image.save(data, "PNG")
        assert data.getvalue() == files.read(f"{number:02d}.png")
    assert files.namelist() == ["00.png", "01.png", "recipe.json"]


def test_recipe_of_other_weights(client):
    """It runs, and the page shows a warning."""
    images, *_ = client.predict(recipe='{"steps": 2, "num_images": 1, "weights": "other"}', api_name="/reproduce")
    assert len(images) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 1000}, "1000"),
        ({"num_images": 50}, "50"),
        ({"guidance_scale": 1e9}, "1000000000"),
        ({"seed": -1}, "-1"),
        ({"prompt": "x" * 201}, "at most 200"),
        ({"category": "unicorns"}, "unicorns"),
        ({"category": "any"}, "Classifier guidance needs a category"),
    ],
)
def test_limits_hold_on_the_server(client, change, message):
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        client.predict(**{**GENERATE, **change}, api_name="/generate")


def test_snippet_of_the_readme(url, tmp_path, monkeypatch):
    """It calls every function with drawings of the reader; here with fewer steps."""
    monkeypatch.chdir(tmp_path)
    strokes = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(strokes).line((8, 32, 56, 32), fill="black", width=16)
    strokes.save("strokes.png")
    strokes.resize((8, 8)).save("mask.png")  # as large as the image
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    code, replaced = re.subn(r"steps=\d+", "steps=12", code)
    assert replaced == 6
    names = {}
    exec(code.replace("http://127.0.0.1:7860", url), names)
    assert len(contents(names["again"])) == 4
    assert len(contents(names["images"])) == len(contents(names["variations"])) == 2
    assert Image.open(names["middle"]).size == (8, 8)
    assert names["status"] == "Done."
    assert Image.open(names["condition"]).getextrema() == ((0, 255),) * 3
    assert Image.open(names["film"]).size == (10 * 128, 2 * 128)
    assert Image.open(names["predictions"]).size == (10 * 128, 2 * 154)  # in rows of ten, with captions
    assert names["curves"]["type"] == "matplotlib"
    assert re.match(r"At most \*\*\d+\.\d{3} bits per dimension\*\* .* with 12 steps", names["bits_per_dim"])


def test_missing_drawings(client):
    common = {"prompt": "hat", "category": "any", "guidance_scale": 2, "steps": 3, "seed": 0, "num_images": 1}
    nothing = {"background": None, "layers": [], "composite": None}
    with pytest.raises(gradio_client.exceptions.AppError, match="Upload one first"):
        client.predict(drawing=nothing, **common, api_name="/edit")
    with pytest.raises(gradio_client.exceptions.AppError, match="Nothing is drawn"):
        client.predict(drawing=nothing, strength=1, **common, api_name="/sketch")


def test_missing_pictures(client, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    common = {"guidance_scale": 2, "steps": 2, "seed": 0}
    with pytest.raises(gradio_client.exceptions.AppError, match="Upload one first"):
        client.predict(image=None, num_images=1, **common, api_name="/variations")
    pictures = {"image": gradio_client.handle_file(picture), "other": None}
    with pytest.raises(gradio_client.exceptions.AppError, match="Upload one first"):
        client.predict(**pictures, position=0.5, keeps_ends=False, **common, api_name="/interpolate")


@pytest.mark.parametrize("absent", ["unclip", "image_encoder"])
def test_no_tab_without_its_models(models_folder, monkeypatch, absent):
    models = Models(models_folder, device="cpu")
    made = []
    monkeypatch.setattr("app.variations_tab", lambda space: made.append(space))
    monkeypatch.setattr("app.generate_tab", lambda space: ([], None))
    monkeypatch.setattr("app.edit_tab", lambda space, generated: None)
    build(models)
    assert len(made) == 1
    if absent == "unclip":
        models.unclip = None
    else:
        models.unclip.image_encoder = None
    build(models)
    assert len(made) == 1


def test_uploads_are_limited(url):
    for size, status in ((4_000_000, 200), (6_000_000, 413)):
        response = httpx.post(f"{url}/gradio_api/upload", files={"files": ("noise.png", bytes(size))}, timeout=60)
        assert response.status_code == status


def test_examples_wait_for_visitors(models_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    space = Space(Models(models_folder, device="cpu"))
    visit = space.generate("red cat", "cats", 1.0, 0.0, 3, "DDPM", 0, 1, False, "base")
    next(visit)
    recipe = ("", "any", 1.0, 0.0, 2, "DDPM", 0, 1, False, "base")
    example = threading.Thread(target=space.example, args=recipe, daemon=True)
    example.start()
    example.join(1)
    assert example.is_alive()
    assert [status for _, status, *_ in visit][-1] == "Done."
    example.join(30)
    assert not example.is_alive()


# In a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("There is no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url, request):
    """
    Opens the page at a size. In the end, fails for errors in the console and for a page wider than its window, and
    leaves a screenshot where SPACE_SCREENSHOTS says.
    """
    pages, errors = [], []

    def open_page(width=1280, height=900, query="steps=4&num_images=2&prompt=red+cat"):
        page = browser.new_page(viewport={"width": width, "height": height})
        pages.append(page)
        page.set_default_timeout(PATIENCE_MS)
        page.add_init_script(TEN_FRAMES_A_SECOND)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{url}/?{query}")
        button(page, "Generate").wait_for()
        return page

    yield open_page
    for page in pages:
        leave_screenshot(page, request.node.name)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.close()
    assert errors == []


def leave_screenshot(page, name):
    folder = os.environ.get("SPACE_SCREENSHOTS")
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def wait_for_value(page, value):
    """In one of the boxes of the open tab."""
    page.wait_for_function(
        "value => [...document.querySelectorAll('textarea, input')].some(x => x.value == value && x.offsetParent)",
        arg=value,
    )


def wait_for_images(page, number):
    """They load after the text around them."""
    expect(page.locator(".pixels img:visible")).to_have_count(number, timeout=PATIENCE_MS)


def draw(page, element_id):
    editor = page.locator(f"#{element_id}")
    editor.get_by_role("button", name="Brush").first.click()
    editor.scroll_into_view_if_needed()
    page.wait_for_timeout(500)  # for the canvas to settle
    box = editor.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    for dx, dy in ((0, -60), (60, -60), (60, 0), (60, 60)):
        page.mouse.move(x + dx, y + dy)
    page.mouse.up()
    page.wait_for_timeout(500)


def test_page_loads_and_its_example_is_there(visit, home):
    page = visit(query="")
    wait_for_value(page, "apple")  # what the page asks for itself
    example = next(recipe for recipe in EXAMPLES if recipe.category == "any")  # the models have other categories
    end = time.monotonic() + START_SECONDS
    while not any(path.read_text().split() for path in home.rglob("indices.csv")):
        assert time.monotonic() < end, "No example is cached."
        time.sleep(0.2)
    page.get_by_role("button", name=example.prompt, exact=True).click()
    wait_for_value(page, "Done.")
    page.get_by_text("Link to these images").wait_for()
    wait_for_images(page, example.num_images)


def test_generate_in_the_browser(visit):
    page = visit()
    wait_for_value(page, "red cat")  # as the link says, once the page has asked for it
    page.get_by_label("Category").first.click()
    page.get_by_role("option", name="dogs").click()
    button(page, "Generate").click()
    page.get_by_text("Link to these images").wait_for()
    wait_for_images(page, 2)
    page.get_by_text("Reproduce").click()
    recipe, _ = Recipe.from_json(page.locator("#recipe textarea").input_value())
    assert recipe == Recipe("red cat", "dogs", steps=4, num_images=2)


def test_edit_in_the_browser(visit):
    page = visit()
    button(page, "Generate").click()
    page.get_by_text("Link to these images").wait_for()
    page.get_by_role("tab", name="Edit").click()
    button(page, "Use the first image of the Generate tab").click()
    page.wait_for_timeout(1000)
    draw(page, "edit-drawing")
    button(page, "Inpaint").click()
    wait_for_value(page, "Done.")
    wait_for_images(page, 2)


def test_a_stroke_covers_a_part_of_a_small_upload(visit, tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), "red").save(path)
    page = visit()
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit-drawing canvas").first.wait_for()  # the editor takes no upload before
    page.wait_for_timeout(2000)
    page.locator("#edit-drawing input[type=file]").first.set_input_files(path)
    page.wait_for_timeout(3000)
    draw(page, "edit-drawing")
    button(page, "Inpaint").click()
    wait_for_value(page, "Done.")
    wait_for_images(page, 2)
    address = page.locator(".pixels img:visible").first.get_attribute("src")
    with Image.open(io.BytesIO(page.request.get(address).body())) as image:
        pixels = image.convert("RGB")
    # The stroke is in the middle and above it. Where nothing is painted, the upload stays, up to one 8-bit level.
    assert all(red >= 254 and max(others) <= 1 for red, *others in (pixels.getpixel((x, 7)) for x in range(8)))
    assert pixels.getpixel((4, 2)) != (255, 0, 0)


def test_sketch_in_the_browser(visit):
    page = visit()
    page.get_by_role("tab", name="Sketch").click()
    draw(page, "sketch-drawing")
    button(page, "Generate from sketch").click()
    wait_for_value(page, "Done.")
    wait_for_images(page, 3)  # two, and the input of the ControlNet


def test_variations_in_the_browser(visit, tmp_path):
    page = visit(query="")
    page.get_by_role("tab", name="Variations").click()
    # A picture can also be taken with a camera: one button for each of both pictures.
    expect(page.get_by_label("Capture from camera").locator("visible=true")).to_have_count(2)
    for which, colour in (("first", "red"), ("second", "blue")):
        path = tmp_path / f"{colour}.png"
        Image.new("RGB", (40, 30), colour).save(path)
        page.locator(f"#{which}-picture input[type=file]").set_input_files(path)
    wait_for_images(page, 2)
    button(page, "Generate variations").click()
    wait_for_value(page, "Done.")
    wait_for_images(page, 2 + 4)
    button(page, "Interpolate").click()
    wait_for_images(page, 2 + 4 + 1)


def test_look_inside_in_the_browser(visit):
    page = visit()
    page.get_by_role("tab", name="Look inside").click()
    button(page, "Look inside").click()
    page.get_by_text("bits per dimension for this image").wait_for()
    wait_for_images(page, 3)


def test_bad_input_in_the_browser(visit):
    page = visit(query="steps=1000")
    page.get_by_text("Steps is 1000. It must be an integer from 2 to 100.").wait_for()
    page.get_by_role("tab", name="Sketch").click()
    button(page, "Generate from sketch").click()
    page.get_by_text("Nothing is drawn yet").or_(page.get_by_text("The sketch is empty")).first.wait_for()


def test_all_tabs_on_a_phone(visit, request):
    page = visit(390, 844)
    button(page, "Generate").click()
    page.get_by_text("Link to these images").wait_for()
    # The results are between the button and the finer settings.
    tops = [page.get_by_label(label).first.bounding_box()["y"] for label in ("Prompt", "Status", "Guidance")]
    assert tops == sorted(tops)
    leave_screenshot(page, f"{request.node.name}_generate")
    for tab in ("Edit", "Sketch", "Variations", "Look inside"):
        page.get_by_role("tab", name=tab).click()
        page.get_by_label("Status").locator("visible=true").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        leave_screenshot(page, f"{request.node.name}_{tab.lower().replace(' ', '_')}")
