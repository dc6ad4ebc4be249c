"""
The server of the Space against visitors who mean no good, or just leave: over HTTP, as they would, with a look at the
disk and at the computing time of the running app.
"""

import io
import json
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import gradio as gr
import gradio_client
import httpx
import pytest
from PIL import Image
from space_app import running_app
from space_server import API, CALLS_AT_ONCE, MAX_WAITING_OF_CLIENT, Page, RateLimit, client_of, serve


KEEP_SECONDS = 6
GENERATE = ["red cat", "cats", 2.0, 0.5, 4, "DDPM", 3, 1, False]
ARGUMENTS = ["prompt", "category", "guidance", "classifier", "steps", "sampler", "seed", "images", "upscale"]
# RePaint with these takes minutes, with any processor.
LONG = {"prompt": "", "category": "any", "guidance_scale": 2, "steps": 100, "seed": 0, "num_images": 8}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def url(models_folder, home):
    with running_app(models_folder, home, "--keep_seconds", str(KEEP_SECONDS)) as address:
        yield address


@pytest.fixture
def visitor(url, request):
    """A client with an address of its own, as a proxy would tell it, because rates are limited."""
    number = zlib.crc32(request.node.nodeid.encode())
    with httpx.Client(base_url=url, timeout=60, headers=address(number)) as client:
        yield client


def address(number):
    return {"X-Forwarded-For": f"198.18.{number // 256 % 256}.{number % 256}"}


def event_of(visitor, name, data):
    body = json.dumps({"data": data})  # httpx refuses NaN
    return visitor.post(f"{API}/call/{name}", content=body, headers={"Content-Type": "application/json"})


def call(visitor, name, data):
    """The kind of the last message, and its contents."""
    event = event_of(visitor, name, data).json()["event_id"]
    lines = visitor.get(f"{API}/call/{name}/{event}").text.strip().splitlines()
    return lines[-2].removeprefix("event: "), json.loads(lines[-1].removeprefix("data: "))


def error_of(visitor, name, data):
    kind, content = call(visitor, name, data)
    assert kind == "error"
    return content["error"]


def upload(visitor, data, name="image.png"):
    return visitor.post(f"{API}/upload", files={"files": (name, data)})


def entry(path, **others):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **others}


def png(size=(8, 8), color="red", mode="RGB"):
    data = io.BytesIO()
    Image.new(mode, size, color).save(data, "PNG")
    return data.getvalue()


def claimed_png(width, height):
    """A small file that says that it is large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_value(**change):
    return list((dict(zip(ARGUMENTS, GENERATE, strict=True)) | change).values())


# Values


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 101}, "Steps is 101. It must be an integer from 2 to 100."),
        ({"steps": "10"}, "Steps is '10'. It must be an integer from 2 to 100."),
        ({"steps": None}, "Steps is None. It must be an integer from 2 to 100."),
        ({"guidance": float("nan")}, "Guidance is nan. It must be a number from 1 to 10."),
        ({"guidance": float("inf")}, "Guidance is inf. It must be a number from 1 to 10."),
        ({"images": 9}, "Images is 9. It must be an integer from 1 to 8."),
        ({"images": True}, "Images is True. It must be an integer from 1 to 8."),
        ({"seed": 2**32}, "Seed is 4294967296. It must be an integer from 0 to 4294967295."),
        ({"seed": 0.5}, "Seed is 0.5. It must be an integer from 0 to 4294967295."),
        ({"prompt": "x" * 201}, "The prompt has 201 characters; at most 200 are allowed."),
        ({"prompt": ["fire"]}, "Prompt is ['fire']. It must be text."),
        ({"sampler": {}}, "There is no sampler {}. Choose one of: DDPM, DDIM, DPM-Solver++, UniPC."),
        ({"category": "<b>"}, "There is no category '\\x3cb>'. Choose one of: any, cats, dogs, hats, mats."),
        ({"upscale": "yes"}, "Upsample to 64 x 64 is 'yes'. It must be true or false."),
    ],
)
def test_wrong_values(visitor, change, message):
    assert error_of(visitor, "generate", with_value(**change)) == message


def test_wrong_number_of_values(visitor):
    assert error_of(visitor, "generate", GENERATE[:3]).startswith("3 values were sent. It must be 10: Prompt, ")


@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("call/nothing", {"data": []}, 400, "names a function"),
        ("queue/join", {"data": [], "fn_index": 999, "session_hash": "s"}, 400, "names a function"),
        ("queue/join", {"data": "x" * 100_000}, 413, "at most 100000 are allowed"),
        ("queue/join", [[]], 422, "valid dictionary"),
        ("run/generate", {"data": GENERATE}, 404, "nothing here"),
        ("component_server", {"data": {}}, 400, "Invalid JSON"),
    ],
)
def test_wrong_requests(visitor, path, body, status, message):
    response = visitor.post(f"{API}/{path}", json=body)
    assert response.status_code == status
    assert message in response.text
    assert "Traceback" not in response.text


def test_a_request_that_does_not_tell_its_size(visitor):
    response = visitor.post(f"{API}/queue/join", content=(bytes(10_000) for _ in range(30)))
    assert response.status_code == 413
    assert "at most 100000 are allowed" in response.text


def test_the_queue_cannot_be_skipped(visitor):
    config = visitor.get("/config").json()
    generate = next(dependency["id"] for dependency in config["dependencies"] if dependency["api_name"] == "generate")
    response = visitor.post(f"{API}/run/predict", json={"data": GENERATE, "fn_index": generate})
    assert response.status_code == 404


def test_a_bug_is_a_number_in_the_log(tmp_path, monkeypatch, caplog):
    """Neither its message nor its traceback goes to the visitor."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    with Page() as page:
        box = gr.Textbox(label="Number")
        box.submit(lambda number: 1 / int(number), box, box, api_name="divide")
    page.queue(api_open=False)
    serve(page, prevent_thread_lock=True, quiet=True)
    try:
        with httpx.Client(base_url=page.local_url, timeout=60) as client:
            assert call(client, "divide", ["4"]) == ("complete", ["0.25"])
            sentence = error_of(client, "divide", ["0"])
    finally:
        page.close()
    assert sentence.startswith("Something went wrong on the server; it is not your mistake.")
    reference = re.fullmatch(r".* The details are in its log: error (\w{8})\.", sentence)[1]
    (record,) = [record for record in caplog.records if reference in record.getMessage()]
    assert record.exc_info[0] is ZeroDivisionError


# Images


@pytest.fixture
def picture(visitor):
    return upload(visitor, png()).json()[0]


@pytest.mark.parametrize(
    "value, message",
    [
        (entry("/etc/passwd"), "'passwd' is not an uploaded file"),
        ({"path": "/etc/passwd"}, "'passwd' is not an uploaded file"),
        (entry("http://127.0.0.1:9/x.png"), "'x.png' is not an uploaded file"),
        (entry("{picture}/../../../../../../../../etc/passwd"), "'passwd' is not an uploaded file"),
        (entry("x", url="http://127.0.0.1:9/"), "'x' is not an uploaded file"),
        (entry("{picture}", url="data:image/png;base64,AAAA"), "in the request itself"),
        (entry(None), "has no path"),
        (entry("x\0"), "is not an uploaded file"),
        ("{picture}", "must be an uploaded image"),
        ([7], "must be an uploaded image"),
    ],
)
def test_images_that_are_no_uploads(visitor, picture, value, message):
    value = json.loads(json.dumps(value).replace("{picture}", picture))
    assert message in error_of(visitor, "variations", [value, 2.0, 2, 0, 1])


@pytest.mark.parametrize(
    "data, message",
    [
        (b"hello", "'image.png' cannot be read as an image. Allowed are PNG, JPEG, WEBP, GIF and BMP."),
        (b"", "'image.png' cannot be read as an image. Allowed are PNG, JPEG, WEBP, GIF and BMP."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as an image"),
        (png()[:50], "may be damaged"),
        (claimed_png(30_000, 30_000), "'image.png' has 900000000 pixels; at most 4096 x 4096 are allowed."),
        (claimed_png(5000, 1), "The image has 5000 x 1 pixels; at most 4096 per side are allowed."),
    ],
    ids=["text", "empty", "eps", "truncated", "bomb", "wide"],
)
def test_images_that_cannot_be_read(visitor, data, message):
    path = upload(visitor, data).json()[0]
    assert message in error_of(visitor, "variations", [entry(path), 2.0, 2, 0, 1])


def test_layers_are_limited(visitor, picture):
    drawing = {"background": entry(picture), "layers": [entry(picture)] * 6, "composite": None}
    message = error_of(visitor, "edit", [drawing, "", "any", 2, 2, 0, 1])
    assert message == "The drawing has 6 layers; at most 5 are allowed."


def test_pixels_of_a_call_are_limited(visitor):
    large = upload(visitor, claimed_png(4096, 4000)).json()[0]
    drawing = {"background": entry(large), "layers": [entry(large)] * 5, "composite": None}
    assert "pixels together" in error_of(visitor, "edit", [drawing, "", "any", 2, 2, 0, 1])


@pytest.mark.parametrize("index, status", [("0", 200), ("null", 200), ("5", 413), ("1000000000", 413), ("-1", 413)])
def test_drawings_in_memory_are_limited(visitor, index, status):
    editors = [part["id"] for part in visitor.get("/config").json()["components"] if part["type"] == "imageeditor"]
    fields = {"type": "layer", "index": index, "id": "d", "session_hash": "s", "fn_name": "accept_blobs"}
    part = {**fields, "component_id": str(editors[0])}
    response = visitor.post(f"{API}/component_server", data=part, files={"file": ("blob", png())})
    assert response.status_code == status


# Files


@pytest.mark.parametrize(
    "path",
    [
        f"{API}/file=/etc/passwd",
        f"{API}/file=%2Fetc%2Fpasswd",
        f"{API}/file={Path(__file__).parents[2] / 'spaces' / 'app.py'}",
        f"{API}/file=spaces/app.py",
        f"{API}/file={{folder}}/../log",
        f"{API}/file={{folder}}%2F..%2Flog",
        f"{API}/file={{link}}",
        f"{API}/file=http://127.0.0.1:9/",
        f"{API}/file=file:///etc/passwd",
        f"{API}/file=%00",
        f"{API}/file/etc/passwd",
        f"{API}/proxy=http://127.0.0.1:9/",
        f"{API}/deep_link?session_hash=s",
        f"{API}/stream/s/r/1/playlist-file",
        "/static/../../routes.py",
        "/static/%2e%2e/%2e%2e/routes.py",
        "/assets/..%2f..%2f..%2froutes.py",
        "/monitoring/summary",
    ],
)
def test_other_files_cannot_be_read(url, visitor, picture, path):
    folder = Path(picture).parent.parent
    link = Path(picture).with_name("link.png")
    link.unlink(missing_ok=True)
    link.symlink_to("/etc/passwd")
    path = path.replace("{folder}", str(folder)).replace("{link}", str(link))
    # httpx would resolve the dots itself.
    request = visitor.build_request("GET", url)
    request.url = request.url.copy_with(raw_path=path.encode())
    response = visitor.send(request)
    assert response.status_code in (403, 404)
    assert not any(word in response.text for word in ("root:", "import ", "Traceback"))
    assert visitor.get(f"{API}/file={picture}").content == png()


@pytest.mark.parametrize("name", ["../../../evil.png", "/etc/evil.png", "..\\evil.png", "a" * 400 + ".png", ".evil"])
def test_names_of_uploads_stay_in_their_folder(visitor, home, name):
    (path,) = upload(visitor, png(), name).json()
    folder = next(home.glob("diffusers-adm-space-*"))
    assert Path(path).resolve().is_relative_to(folder.resolve())
    assert Path(path).read_bytes() == png()


def test_files_are_gone_after_the_request(visitor, home):
    """On the disk: the uploads, what Gradio makes of them, the previews and the results."""
    folder = next(home.glob("diffusers-adm-space-*"))
    began = time.time()
    unused = upload(visitor, png((9, 9)), "unused.png").json()[0]
    used = upload(visitor, png((7, 7)), "used.png").json()[0]
    assert call(visitor, "variations", [entry(used), 2.0, 4, 0, 2])[0] == "complete"
    kind, results = call(visitor, "generate", GENERATE)
    ended = time.time()
    made = [results[0][0]["image"]["path"], results[-1]["path"]]
    assert kind == "complete"
    assert all(Path(path).is_file() for path in (*made, used))
    while any(Path(path).exists() for path in (*made, used)):
        assert time.time() < ended + KEEP_SECONDS + 1
        time.sleep(0.1)
    # An upload may wait longer for its first request: somebody may still be painting on it.
    assert Path(unused).is_file()
    made_here = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_ctime > began]
    assert [path.name for path in made_here] == ["unused.png"]
    assert "no longer" in error_of(visitor, "variations", [entry(used), 2.0, 2, 0, 1])
    assert call(visitor, "variations", [entry(unused), 2.0, 2, 0, 1])[0] == "complete"


# Rates


def test_the_rate_of_a_client_is_limited(visitor, url):
    answers = [event_of(visitor, "nothing", []) for _ in range(CALLS_AT_ONCE + 3)]
    assert [answer.status_code for answer in answers[:CALLS_AT_ONCE]] == [400] * CALLS_AT_ONCE
    refused = answers[-1]
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["detail"].startswith(f"Too many calls: {CALLS_AT_ONCE} at once and 30 a minute are allowed.")
    assert httpx.post(f"{url}{API}/call/nothing", json={"data": []}, headers=address(7)).status_code == 400


def test_token_bucket():
    now = 0.0
    rate = RateLimit(per_minute=30, at_once=3, clock=lambda: now)
    assert [rate.wait("a") for _ in range(3)] == [0, 0, 0]
    assert rate.wait("a") == 2
    assert rate.wait("b") == 0
    now = 1.5
    assert rate.wait("a") == 0.5
    now = 2.0
    assert rate.wait("a") == 0
    now = 1000.0
    assert [rate.wait("a") for _ in range(4)] == [0, 0, 0, 2]


@pytest.mark.parametrize(
    "host, client",
    [
        ("203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
    ],
)
def test_address_of_a_client(host, client):
    assert client_of({"client": (host, 1)}) == client


# Abandoned work


def long_edit(picture):
    mask = entry(picture)
    return [{"background": entry(picture), "layers": [mask], "composite": None}, *LONG.values()]


def seconds_of_the_processor(url):
    """That the app has used so far."""
    port = url.rpartition(":")[2]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if b"--keep_seconds" in command and port.encode() in command:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                return (int(fields[11]) + int(fields[12])) / 100
        except OSError:
            continue
    pytest.skip("There is no /proc.")


def waits_for_rest(url, seconds):
    """Whether the app stops computing within a time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = seconds_of_the_processor(url)
        time.sleep(1)
        if seconds_of_the_processor(url) - before < 0.1:
            return True
    return False


def test_cancelled_work_stops(url, visitor, tmp_path):
    (tmp_path / "mask.png").write_bytes(png())
    mask = gradio_client.handle_file(tmp_path / "mask.png")
    client = gradio_client.Client(url, verbose=False, headers=dict(visitor.headers), download_files=False)
    job = client.submit({"background": mask, "layers": [mask], "composite": None}, *LONG.values(), api_name="/edit")
    while not job.outputs():
        assert not job.done()
        time.sleep(0.05)
    job.cancel()
    assert waits_for_rest(url, 10)


def test_work_of_a_lost_connection_stops(url, visitor, picture):
    event = event_of(visitor, "edit", long_edit(picture)).json()["event_id"]
    with visitor.stream("GET", f"{API}/call/edit/{event}") as response:
        next(line for line in response.iter_lines() if "generating" in line)
    assert waits_for_rest(url, 10)


@pytest.mark.slow
def test_work_that_nobody_listens_to_is_limited_and_stops(url, visitor, picture):
    before = seconds_of_the_processor(url)
    answers = [event_of(visitor, "edit", long_edit(picture)) for _ in range(MAX_WAITING_OF_CLIENT + 1)]
    assert [answer.status_code for answer in answers] == [200] * MAX_WAITING_OF_CLIENT + [429]
    assert "5 of your calls wait already" in answers[-1].text
    time.sleep(2)
    assert seconds_of_the_processor(url) - before > 0.2
    assert waits_for_rest(url, 40)
    # The next visitor is served.
    assert call(visitor, "generate", GENERATE)[0] == "complete"


# Load


@pytest.mark.slow
def test_short_form_of_the_load(models_folder):
    """Without limits on time and memory, which depend on what else the machine does."""
    script = Path(__file__).parents[2] / "benchmarks" / "load_space.py"
    options = ["--models", models_folder, "--clients", "8", "--requests", "40", "--keep_seconds", "20"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    counts = dict(re.findall(r"^(.*?) {2,}(\d+)$", done.stdout, re.MULTILINE))
    assert (counts["served"], counts["left in the middle"], counts["failed"]) == ("28", "4", "0")
    assert counts["invalid, refused with the reason"] == "8"
    assert counts["files on disk 20 s after the last request"] == counts["errors in the log of the app"] == "0"
