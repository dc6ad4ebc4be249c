"""
The server of the Space: limits on what it accepts, errors without tracebacks, files that are deleted after a minute,
and an end to work for which nobody waits.

Gradio checks little of what a program sends: most limits of its components hold on the page only. So a [`Guard`] stands
in front of its routes, and a [`Page`] checks the values of each call before Gradio reads them.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import shutil
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from fastapi import HTTPException
from fastapi.middleware import Middleware
from gradio.components.base import server
from gradio.route_utils import FnIndexInferError
from gradio.utils import get_cache_folder, get_upload_folder
from PIL import Image
from space_models import MAX_IMAGE_SIDE, check_choice, check_image, check_number, short


KEEP_SECONDS = 60  # files are deleted at most this long after the request that made or used them
UNUSED_SECONDS = 600  # ... and uploads that no request uses, after this time
SWEEPS = 12  # looks for old files in `KEEP_SECONDS`
PATIENCE_SECONDS = 10  # without a connection that waits for its result, a call is abandoned
FORGET_SECONDS = 60  # ... and its result is forgotten
MAX_UPLOAD = 5 * 2**20  # bytes of an upload, of one or more files
MAX_REQUEST = 100_000  # bytes of any other request
DRAIN_SECONDS = 5  # for the rest of a request that is refused
MAX_STORED = 2**30  # bytes of all files; then there are no more uploads
MAX_DRAWINGS = 100 * 2**20  # bytes of the drawings in memory, which image editors send just before a call
MAX_LAYERS = 5  # of a drawing
MAX_PIXELS = 4 * MAX_IMAGE_SIDE**2  # of all images of one call
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # others of Pillow start programs (EPS) or have many more features
CALLS_PER_MINUTE, CALLS_AT_ONCE = 30, 15  # of one client: on average, and without a pause
UPLOADS_PER_MINUTE, UPLOADS_AT_ONCE = 60, 30
MAX_WAITING = 20  # calls in the queue
MAX_WAITING_OF_CLIENT = 5  # calls of one client in the queue, including the one that runs
MAX_STREAMS_OF_CLIENT = 40  # open connections for results and heartbeats
MAX_CLIENTS = 10_000  # whose rates are remembered
MAX_SESSIONS = 64  # whose values of the controls Gradio remembers (it never needs them here)
# Peers that are proxies, such as that of the Hub: then the client is the last address of X-Forwarded-For that is none
# of these. Anybody can write addresses into that header, but only in front of those that proxies append.
PROXIES = "127.0.0.0/8,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,169.254.0.0/16,::1,fc00::/7,fe80::/10"
API = "/gradio_api"
# What the page and `gradio_client` need. Other routes of Gradio record videos, fetch URLs or save states.
# (`run/predict` is for buttons that need no queue; `api_open=False` refuses other functions there.)
OPEN_ROUTES = re.compile(
    r"/|/(assets|static|svelte)/.+|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/pwa_icon(/\d+)?"
    rf"|{API}/(queue/(join|data|status)|call/.+|run/predict|cancel|reset|heartbeat/[^/]+|upload|upload_progress|component_server|"
    r"file=.+|info|openapi\.json|app_id|login_check|startup-events|theme\.css)/?"
)
CALLS = tuple(f"{API}/{route}" for route in ("call/", "queue/join", "run/"))
ADDED_LATER = "added-later"  # a class of elements of the page
LOG = logging.getLogger("diffusers_adm.space")


class Refused(Exception):
    """
    A request that is answered with a sentence in place of what it asked for.

    Args:
        status (`int`): HTTP status.
        message (`str`): What came and what is allowed.
        seconds (`float`): When to try again; 0 if that is of no use.
    """

    def __init__(self, status: int, message: str, seconds: float = 0):
        super().__init__(message)
        self.status = status
        self.seconds = math.ceil(seconds)


class RateLimit:
    r"""
    A token bucket for each client: `at_once` requests without a pause, and `per_minute` on average.

    Args:
        per_minute (`float`): Tokens that come back in a minute.
        at_once (`float`): Tokens of a full bucket.
        clock (`Callable`): Returns seconds.
    """

    def __init__(self, per_minute: float, at_once: float, clock: Callable[[], float] = time.monotonic):
        self.per_minute = per_minute
        self.at_once = at_once
        self.clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def wait(self, client: str) -> float:
        """Takes a token and returns 0, or returns the seconds until there is one."""
        now = self.clock()
        tokens, counted = self._buckets.pop(client, (self.at_once, now))
        tokens = min(self.at_once, tokens + (now - counted) * self.per_minute / 60)
        seconds = max(0.0, (1 - tokens) * 60 / self.per_minute)
        self._buckets[client] = (tokens if seconds else tokens - 1, now)
        while len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)  # the one that was here longest ago
        return seconds


def client_of(scope: dict[str, Any]) -> str:
    """The address of a client; of IPv6 the network, because each visitor has a whole one."""
    host = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:100]
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)


# Errors


def unexpected(error: BaseException) -> str:
    """Writes an exception to the log, with an identifier. Returns a sentence with it for the visitor."""
    reference = secrets.token_hex(4)
    LOG.error("Error %s", reference, exc_info=error)
    return f"Something went wrong on the server; it is not your mistake. The details are in its log: error {reference}."


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """
    Shows a ValueError, a mistake of the visitor, on the page. All other exceptions are bugs: they go to the log, and
    the page shows where to find them there.
    """
    try:
        yield
    except gr.Error:
        raise
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:
        raise gr.Error(unexpected(error), print_exception=False) from error


# Files


class Files:
    r"""
    The folder of uploads and results, where nothing stays.

    Each file is deleted at most `keep` seconds after the request that made it or last used it, and an upload that no
    request has used, after `unused` seconds.

    Args:
        page (`gr.Blocks`): Its sets of files forget the deleted ones, too.
        folder (`Path`): Only this app may use it.
        keep (`float`): Seconds.
        unused (`float`): Seconds.
    """

    def __init__(
        self, page: gr.Blocks, folder: Path, keep: float = KEEP_SECONDS, unused: float = UNUSED_SECONDS
    ) -> None:
        self.page = page
        self.folder = Path(os.path.realpath(folder))
        self.keep = keep
        self.unused = unused
        self.seconds_between = keep / SWEEPS
        self.bytes = 0  # at the last look
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()

    def use(self, paths: Iterable[str]) -> None:
        """Notes that a request uses these files now."""
        with self._lock:
            self._used.update(dict.fromkeys(paths, time.time()))

    def holds(self, path: str) -> bool:
        """Whether the path, with all links followed, is a file in this folder."""
        with contextlib.suppress(OSError, ValueError):  # too long, or with a null byte
            real = os.path.realpath(path)
            return Path(real).is_relative_to(self.folder) and os.path.isfile(real)
        return False

    def sweep(self) -> None:
        """Deletes the files whose time is over."""
        # The next look may be late by its own duration.
        keep = self.keep - 2 * self.seconds_between
        with self._lock:
            used = dict(self._used)
        present, size = set(), 0
        for parent, folders, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(parent, name)
                with contextlib.suppress(FileNotFoundError):
                    status = os.lstat(path)
                    # The time of change, unlike that of modification, is also that of copies and of moved files.
                    last = max(status.st_ctime, used.get(path, 0))
                    is_unused_upload = path in self.page.upload_file_set and used.get(path, 0) < status.st_ctime
                    if time.time() - last > (self.unused if is_unused_upload else keep):
                        self._delete(path)
                    else:
                        present.add(path)
                        size += status.st_size
            if parent != str(self.folder) and not names and not folders:
                with contextlib.suppress(OSError):  # a file came meanwhile
                    os.rmdir(parent)
        self.bytes = size
        with self._lock:
            self._used = {path: when for path, when in self._used.items() if path in present or path not in used}

    def _delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        for paths in self.page.temp_file_sets:  # otherwise they would grow forever
            paths.discard(path)


# Values of a call


def added_later(component: gr.Radio) -> gr.Radio:
    """Marks one of the last input components of a function: calls without its value get its default."""
    component.elem_classes = [*(component.elem_classes or []), ADDED_LATER]
    return component


def with_defaults(components: Sequence[gr.components.Component], values: Sequence[Any]) -> list[Any]:
    """The values of a call, and the defaults of the components that its function did not have before."""
    missing = components[len(values) :]
    if all(ADDED_LATER in (component.elem_classes or []) for component in missing):
        return [*values, *(component.value for component in missing)]
    return list(values)


def check_values(components: Sequence[gr.components.Component], values: Sequence[Any], files: Files) -> list[str]:
    """
    Checks the values of a call, as they came, for the input components. Returns the paths of their files.

    Raises:
        ValueError: If a value has the wrong type, is out of range or is not allowed, or if a file is none of `files`.
    """
    if len(values) != len(components):
        names = ", ".join(str(component.label) for component in components)
        raise ValueError(f"{len(values)} values were sent. It must be {len(components)}: {names}.")
    paths: list[str] = []
    pixels = 0
    for component, value in zip(components, values, strict=True):
        label = str(component.label)
        if isinstance(component, (gr.Slider, gr.Number)):
            number_type = int if getattr(component, "precision", None) == 0 or component.step == 1 else float
            check_number(value, label, component.minimum, component.maximum, number_type)
        elif isinstance(component, gr.Checkbox):
            if not isinstance(value, bool):
                raise ValueError(f"{label} is {short(value)}. It must be true or false.")
        elif isinstance(component, (gr.Dropdown, gr.Radio)):
            check_choice(value, label, [str(choice) for _, choice in component.choices])
        elif isinstance(component, gr.Textbox):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{label} is {short(value)}. It must be text.")
        elif isinstance(component, (gr.Image, gr.ImageEditor, gr.Gallery)):
            found, number = check_images(component, value, files)
            paths += found
            pixels += number
    if pixels > MAX_PIXELS:
        raise ValueError(f"The images have {pixels} pixels together; at most {MAX_PIXELS} are allowed.")
    return paths


def check_images(component: gr.components.Component, value: Any, files: Files) -> tuple[list[str], int]:
    """Checks the images of one component. Returns their paths and the number of their pixels."""
    allowed = list if isinstance(component, gr.Gallery) else dict
    if value is not None and not isinstance(value, allowed):
        raise ValueError(f"{component.label} is {short(value)}. It must be an uploaded image, and a path names it.")
    sources: list[str | bytes] = []
    if isinstance(component, gr.ImageEditor) and isinstance(value, dict):
        layers = value.get("layers") or []
        drawing = component.blob_storage.get(value["id"]) if isinstance(value.get("id"), str) else None
        if drawing is not None:  # the browser has sent it before
            layers = drawing.layers
            blobs = (drawing.background, drawing.composite, *layers)
            sources += [bytes(blob) for blob in blobs if isinstance(blob, (bytes, bytearray, memoryview))]
        if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
            number = len(layers) if isinstance(layers, list) else short(layers)
            raise ValueError(f"The drawing has {number} layers; at most {MAX_LAYERS} are allowed.")
    sources += [check_file(entry, files) for entry in file_entries(value)]
    return [source for source in sources if isinstance(source, str)], sum(map(count_pixels, sources))


def file_entries(value: Any) -> Iterator[dict[str, Any]]:
    """All entries of files in a value, which Gradio would read."""
    if isinstance(value, dict):
        if "path" in value or "url" in value:
            yield value
        else:
            for entry in value.values():
                yield from file_entries(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from file_entries(entry)


def check_file(entry: dict[str, Any], files: Files) -> str:
    """The path of an uploaded file. Raises a ValueError if the entry of a call names anything else."""
    path, url = entry.get("path"), entry.get("url")
    if not isinstance(path, str) or not path:
        raise ValueError("An image has no path. Upload it first, and pass the path of the answer.")
    if isinstance(url, str) and url.startswith("data:"):
        raise ValueError("An image is in the request itself. Upload it first, and pass the path of the answer.")
    if not files.holds(path):
        gone = f"files are deleted {files.keep:g} seconds after a request"
        name = short(os.path.basename(path) or path)
        raise ValueError(f"{name} is not an uploaded file, or it is no longer there: {gone}. Upload it again.")
    return os.path.realpath(path)


def count_pixels(source: str | bytes) -> int:
    """The number of pixels of an image, from its first bytes. Raises a ValueError if it is unreadable or too large."""
    name = short(os.path.basename(source)) if isinstance(source, str) else "The drawing"
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            check_image(image)
            return image.width * image.height
    except Image.DecompressionBombError as error:
        number = re.search(r"\d+", str(error))
        raise ValueError(
            f"{name} has {number[0] if number else 'too many'} pixels; at most {MAX_IMAGE_SIDE} x {MAX_IMAGE_SIDE} are "
            "allowed."
        ) from error
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{name} cannot be read as an image. Allowed are {', '.join(FORMATS[:-1])} and {FORMATS[-1]}."
        ) from error


def limit_drawings(editor: gr.ImageEditor) -> gr.ImageEditor:
    """
    Limits what browsers can leave in the memory of the server: an image editor sends its layers just before a call,
    which takes them out again, unless it never comes.
    """
    accept = editor.accept_blobs
    stored = editor.blob_storage
    lock = threading.Lock()  # Gradio has several threads for this

    def size() -> int:
        drawings = list(stored.values())  # calls take drawings out meanwhile
        blobs = [blob for drawing in drawings for blob in (drawing.background, drawing.composite, *drawing.layers)]
        return sum(len(blob) for blob in blobs if blob is not None)

    def accept_blobs(data):
        fields = getattr(data, "data", None) or {}
        index = str(fields.get("index") or "null")
        if index != "null" and not (index.isdecimal() and int(index) < MAX_LAYERS):
            raise HTTPException(413, f"The layer has the number {short(index)}; at most {MAX_LAYERS} are allowed.")
        if not isinstance(fields.get("id"), str) or len(fields["id"]) > 100 or len(data.files) != 1:
            raise HTTPException(400, "A part of a drawing needs an `id` and one file.")
        with lock:
            accept(data)
            while size() > MAX_DRAWINGS and len(stored) > 1:
                stored.pop(next(iter(list(stored)), None), None)  # the oldest one

    editor.accept_blobs = server(accept_blobs)
    return editor


class Page(gr.Blocks):
    """A page that checks the values of each call before Gradio reads them, and has no tracebacks for visitors."""

    files: Files | None = None  # none while the page is built

    async def preprocess_data(self, block_fn, inputs, state, explicit_call=False):
        inputs = with_defaults(block_fn.inputs, inputs)
        if self.files is not None:
            with readable_errors():
                # Reads the first bytes of files.
                self.files.use(await asyncio.to_thread(check_values, block_fn.inputs, inputs, self.files))
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except (gr.Error, asyncio.CancelledError):
            raise
        except Exception as error:
            if self.files is None:
                raise
            # The files have an allowed type and size, but their contents are damaged. (The message has paths.)
            LOG.info("Values that cannot be read", exc_info=error)
            message = "The values cannot be read. If there are images, they may be damaged: save them again as PNG."
            raise gr.Error(message, print_exception=False) from None

    async def process_api(self, block_fn, inputs, *args, **kwargs):
        try:
            return await super().process_api(block_fn, inputs, *args, **kwargs)
        except (gr.Error, asyncio.CancelledError):
            raise
        except Exception as error:
            if self.files is None:
                raise
            raise gr.Error(unexpected(error), print_exception=False) from None
        finally:
            if self.files is not None:
                # Until the end of the request, and then for some time: the visitor may call again with the same image.
                paths = (str(entry.get("path")) for entry in file_entries(inputs))
                self.files.use(os.path.realpath(path) for path in paths if self.files.holds(path))


# Requests


class Listeners:
    """
    The connections on which clients wait for results, by session; stops the work for which nobody waits.

    Gradio stops the work of a client whose connection breaks, but not that of a client who never opened one.
    """

    def __init__(self, page: gr.Blocks, patience: float = PATIENCE_SECONDS):
        self.page = page
        self.patience = patience
        self.open: Counter[str] = Counter()
        self._left: dict[str, float] = {}
        self._idle: dict[str, float] = {}

    @contextlib.contextmanager
    def listening(self, session: str) -> Iterator[None]:
        self.open[session] += 1
        try:
            yield
        finally:
            self.open[session] -= 1
            if not self.open[session]:
                del self.open[session]
                self._left[session] = time.monotonic()

    def session_of(self, event_id: str) -> str:
        """The session of a call; by default, it has its own."""
        event = self.page._queue.event_ids_to_events.get(event_id)
        return event_id if event is None else event.session_hash

    def events(self) -> list[Any]:
        """The calls that wait or run."""
        queue = self.page._queue
        waiting = [event for line in queue.event_queue_per_concurrency_id.values() for event in line.queue]
        return waiting + [event for job in queue.active_jobs if job for event in job]

    async def stop_abandoned(self) -> None:
        """Stops calls without a listener, and forgets their results later."""
        now, queue = time.monotonic(), self.page._queue
        events = self.events()
        for event in events:
            since = max(event.enqueue_time, self._left.get(event.session_hash, 0))
            if event.alive and event.session_hash not in self.open and now - since > self.patience:
                LOG.info("Nobody waits for the call %s: it is stopped.", event._id)
                await queue.clean_events(event_id=event._id)
        busy = {event.session_hash for event in events} | set(self.open)
        known = {*queue.pending_messages_per_session, *queue.pending_event_ids_session}
        self._idle = {session: self._idle.get(session, now) for session in known - busy}
        for session in [session for session, since in self._idle.items() if now - since > FORGET_SECONDS]:
            queue.pending_messages_per_session.pop(session, None)
            queue.pending_event_ids_session.pop(session, None)
        self._left = {session: left for session, left in self._left.items() if now - left < FORGET_SECONDS}


class Guard:
    r"""
    An ASGI middleware in front of Gradio: open routes, sizes and rates of requests, files, and errors.

    Args:
        app: Next ASGI app.
        page (`gr.Blocks`): For its queue.
        files (`Files`): Other files are not readable.
        listeners (`Listeners`): Told of connections.
        calls (`RateLimit`), uploads (`RateLimit`): By client.
    """

    def __init__(self, app, page: gr.Blocks, files: Files, listeners: Listeners, calls: RateLimit, uploads: RateLimit):
        self.app = app
        self.page = page
        self.files = files
        self.listeners = listeners
        self.calls = calls
        self.uploads = uploads
        self._streams: Counter[str] = Counter()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        refusal: Refused | None = None
        has_started, has_ended, received, limit = False, False, 0, MAX_REQUEST

        async def watched_send(message) -> None:
            nonlocal has_started
            if refusal is None or has_started:  # otherwise the app complains about a body that ends early
                has_started = True
                await send(message)

        async def limited_receive():
            nonlocal received, refusal, has_ended
            message = await receive()
            has_ended = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > limit:
                refusal = too_large(received, limit)
                raise refusal
            return message

        try:
            limit = self.check(scope)
            with self._connected(scope):
                await self.app(scope, limited_receive, watched_send)
        except Refused as error:
            refusal = error
        except (KeyError, FnIndexInferError) as error:
            # The routes look up what the request names.
            if has_started or scope["method"] != "POST":
                raise
            LOG.info("A request names what does not exist", exc_info=error)
            refusal = Refused(400, f"The request names a function or lacks a field: see {API}/info for what there is.")
        except Exception as error:
            if has_started:
                raise
            refusal = refusal or Refused(500, unexpected(error))
        if refusal is not None and not has_started:
            if not has_ended:
                await drain(receive)
            await answer(send, refusal)

    def check(self, scope: dict[str, Any]) -> int:
        """The number of bytes that a request may have. Raises Refused if it is refused without reading them."""
        path, client = scope["path"], client_of(scope)
        if not OPEN_ROUTES.fullmatch(path):
            raise Refused(404, "There is nothing here.")
        if path.startswith(f"{API}/file="):
            self._check_file(path.removeprefix(f"{API}/file="))
        is_upload = path.rstrip("/") in (f"{API}/upload", f"{API}/component_server")
        if scope["method"] == "POST" and is_upload:
            self._check_rate(self.uploads, client, "uploads")
            if self.files.bytes > MAX_STORED:
                raise Refused(503, "There is no space for uploads at the moment. Try again in a minute.", 60)
        elif scope["method"] == "POST" and path.startswith(CALLS):
            self._check_rate(self.calls, client, "calls")
            self._check_queue(client)
        limit = MAX_UPLOAD + MAX_REQUEST if is_upload else MAX_REQUEST
        sizes = [value for name, value in scope["headers"] if name == b"content-length"]
        if sizes and sizes[0].isdigit() and int(sizes[0]) > limit:
            raise too_large(int(sizes[0]), limit)
        return limit

    def _check_file(self, path: str) -> None:
        # Also what is not there, so that nobody learns which files exist.
        examples = os.path.realpath(get_cache_folder())
        is_example = Path(os.path.realpath(path)).is_relative_to(examples) if "\0" not in path else False
        if not is_example and not self.files.holds(path):
            message = f"This file is not available. Files are deleted {self.files.keep:g} seconds after their request."
            raise Refused(403, message)

    def _check_rate(self, rate: RateLimit, client: str, what: str) -> None:
        seconds = rate.wait(client)
        if seconds:
            allowed = f"{rate.at_once:g} at once and {rate.per_minute:g} a minute are allowed"
            raise Refused(429, f"Too many {what}: {allowed}. Try again in {math.ceil(seconds)} s.", seconds)

    def _check_queue(self, client: str) -> None:
        events = self.listeners.events()
        own = sum(client_of(event.request.scope) == client for event in events)
        if own >= MAX_WAITING_OF_CLIENT:
            allowed = f"at most {MAX_WAITING_OF_CLIENT} are allowed"
            raise Refused(429, f"{own} of your calls wait already; {allowed}. Wait for one of them.", 5)
        if len(self.page._queue) >= MAX_WAITING:
            raise Refused(503, f"The Space is busy: {MAX_WAITING} visitors wait already. Try again in a minute.", 60)

    @contextlib.contextmanager
    def _connected(self, scope: dict[str, Any]) -> Iterator[None]:
        """Notes a connection that waits for results."""
        path, client = scope["path"].rstrip("/"), client_of(scope)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        session = None
        if path == f"{API}/queue/data":
            session = query.get("session_hash", [""])[0]
        elif scope["method"] == "GET" and path.startswith(f"{API}/call/"):
            session = self.listeners.session_of(path.rpartition("/")[2])
        elif not path.startswith((f"{API}/heartbeat/", f"{API}/upload_progress")):
            yield
            return
        if self._streams[client] >= MAX_STREAMS_OF_CLIENT:
            raise Refused(429, f"You have {MAX_STREAMS_OF_CLIENT} open connections; no more are allowed.", 5)
        self._streams[client] += 1
        try:
            with contextlib.nullcontext() if session is None else self.listeners.listening(session):
                yield
        finally:
            self._streams[client] -= 1
            if not self._streams[client]:
                del self._streams[client]


def too_large(size: int, limit: int) -> Refused:
    return Refused(413, f"The request has {size} bytes or more; at most {limit} are allowed.")


async def drain(receive) -> None:
    """Reads some more of a request, because many clients read no answer before they have sent everything."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            received, message = 0, await receive()
            while message.get("more_body") and received < 10 * MAX_UPLOAD:
                received += len(message["body"])
                message = await receive()


async def answer(send, refusal: Refused) -> None:
    """Sends the sentence of a refusal as JSON, where the page looks for it."""
    body = json.dumps({"detail": str(refusal)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.seconds:
        headers.append((b"retry-after", str(refusal.seconds).encode()))
    headers.append((b"connection", b"close"))  # the rest of the request is not read
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve(
    page: Page,
    *,
    keep_seconds: float = KEEP_SECONDS,
    calls_per_minute: float = CALLS_PER_MINUTE,
    **options: Any,
) -> None:
    """
    Serves the page until the process is interrupted.

    Args:
        page (`Page`): With its queue.
        keep_seconds (`float`): See [`Files`].
        calls_per_minute (`float`): Of one client.
        options: For `launch`.
    """
    files = Files(page, Path(get_upload_folder()), keep_seconds)
    files.folder.mkdir(parents=True, exist_ok=True)
    page.files = files
    listeners = Listeners(page)

    @contextlib.asynccontextmanager
    async def in_the_background(app) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(repeat(lambda: asyncio.to_thread(files.sweep), files.seconds_between)),
            asyncio.create_task(repeat(listeners.stop_abandoned, 1)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            shutil.rmtree(files.folder, ignore_errors=True)

    scale = calls_per_minute / CALLS_PER_MINUTE
    limits = {
        "calls": RateLimit(calls_per_minute, max(1, CALLS_AT_ONCE * scale)),
        "uploads": RateLimit(UPLOADS_PER_MINUTE * scale, max(1, UPLOADS_AT_ONCE * scale)),
    }
    guard = Middleware(Guard, page=page, files=files, listeners=listeners, **limits)
    page.launch(
        allowed_paths=[os.path.abspath(get_cache_folder())],  # the cached examples
        max_file_size=MAX_UPLOAD,
        state_session_capacity=MAX_SESSIONS,
        app_kwargs={"middleware": [guard], "lifespan": in_the_background},
        show_error=False,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        **options,
    )


async def repeat(work: Callable[[], Any], seconds: float) -> None:
    """Calls `work` again and again; an error is logged and ends nothing."""
    while True:
        try:
            await work()
        except Exception as error:
            LOG.error("Error in the background", exc_info=error)
        await asyncio.sleep(seconds)
