"""
A server on this machine that speaks as much of the Hub's HTTP API as downloading needs, for the real client.

The client reads its environment at import, so it runs in a process of its own: `run_client`.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class HubServer:
    """
    Serves folders as model repositories with one commit each.

    Args:
        repositories (`dict[str, Path]`): Folders by repository name (`"alice/adm"`).
    """

    def __init__(self, repositories: dict[str, Path]):
        self.files = {
            repo: {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
            for repo, root in repositories.items()
        }
        self.requests: list[str] = []  # "GET /api/models/alice/adm 200", in order
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def commit(self, repo: str) -> str:
        content = b"".join(name.encode() + data for name, data in sorted(self.files[repo].items()))
        return hashlib.sha1(content).hexdigest()

    def downloaded(self, repo: str) -> set[str]:
        """Names of the files whose content has been asked for."""
        found = (re.fullmatch(rf"GET /{repo}/resolve/\w+/(.*) 200", request) for request in self.requests)
        return {match[1] for match in found if match}

    def run_client(self, code: str, *args: str | Path, cache: Path) -> str:
        """Runs Python code as a client with an empty cache, and without a token; returns what it prints."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{self.requests}"
        return result.stdout


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        status, headers, body = self._answer(path)
        self.hub.requests.append(f"{self.command} {path} {status}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass

    def _answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+(/.*)?)?", path):
            repo, rest, folder = match[1], match[2] or "", match[3]
            if repo not in self.hub.files:
                return self._missing("RepoNotFound")
            files = self.hub.files[repo]
            if rest.startswith("/tree/"):
                prefix = folder.strip("/") + "/" if folder and folder.strip("/") else ""
                answer = [
                    {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
                    for name, data in sorted(files.items())
                    if name.startswith(prefix)
                ]
            else:
                answer = {
                    "id": repo,
                    "sha": self.hub.commit(repo),
                    "private": False,
                    "gated": False,
                    "tags": [],
                    "siblings": [{"rfilename": name} for name in sorted(files)],
                }
            return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            repo, revision, name = match.groups()
            if repo not in self.hub.files:
                return self._missing("RepoNotFound")
            if revision not in ("main", self.hub.commit(repo)):
                return self._missing("RevisionNotFound")
            if name not in self.hub.files[repo]:
                return self._missing("EntryNotFound", self.hub.commit(repo))
            data = self.hub.files[repo][name]
            return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.hub.commit(repo)}, data
        return self._missing("Unknown")

    def _missing(self, code: str, commit: str | None = None) -> tuple[int, dict[str, str], bytes]:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        return 404, headers if commit is None else {**headers, "X-Repo-Commit": commit}, b""
