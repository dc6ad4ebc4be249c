"""
A server on this machine that speaks as much of the Hub's HTTP API as loading and pushing models need, for the real
client.

The client reads its environment at import, so it runs in a process of its own: `run_client`. It uploads large files by
Xet, which this server does not speak; there it is told not to, and takes the older LFS path.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".whl")  # of the `.gitattributes` that the Hub writes
TOKENS = {"token-of-alice": "alice", "token-of-bob": "bob"}
# In front of a client's code: a machine without the package. A finder before all others refuses it, however it is
# installed.
WITHOUT_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_adm":
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
try:
    import diffusers_adm
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("diffusers_adm can be imported")
"""


@dataclass
class Commit:
    message: str
    files: dict[str, str]  # SHA-256 by path


@dataclass
class Repository:
    private: bool = False
    sdk: str | None = None  # of a Space
    commits: dict[str, Commit] = field(default_factory=dict)  # by name (a SHA-1)
    refs: dict[str, str] = field(default_factory=dict)  # names of commits by "main", "refs/pr/1", ...

    def find(self, revision: str) -> str | None:
        """The full name of a commit."""
        return self.refs.get(revision, revision if revision in self.commits else None)

    def add(self, ref: str, files: dict[str, str], message: str) -> str:
        content = json.dumps([sorted(files.items()), message, self.refs.get(ref), ref])
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name] = Commit(message, files)
        self.refs[ref] = name
        return name


class HubServer:
    """
    Serves repositories: of models by `user/name`, of Spaces by `spaces/user/name`. Users and their tokens are `TOKENS`;
    each may write to what bears their name.

    Args:
        repositories (mapping of `str` to `Path`): Folders by repository name (`"alice/adm"`), the first commits.
    """

    def __init__(self, repositories: Mapping[str, Path] | None = None):
        self.blobs: dict[str, bytes] = {}  # by SHA-256: each content once, in whichever repository
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []  # "GET /api/models/alice/adm 200", in order
        self.uploads: list[str] = []  # SHA-256 of what came by LFS
        self.lock = threading.Lock()
        for repo, root in (repositories or {}).items():
            self.add_commit(repo, root)
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

    def store(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        self.blobs[name] = data
        return name

    def add_commit(self, repo: str, root: Path, ref: str = "main", private: bool = False) -> str:
        """Commits the content of a folder, as all there is at this revision; returns the name of the commit."""
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        repository = self.repositories.setdefault(repo, Repository(private))
        return repository.add(ref, {name: self.store(data) for name, data in files.items()}, f"Add {root.name}")

    def commit(self, repo: str, revision: str = "main") -> str:
        return self.repositories[repo].find(revision)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo]
        return {name: self.blobs[blob] for name, blob in repository.commits[repository.find(revision)].files.items()}

    def downloaded(self, repo: str) -> set[str]:
        """Names of the files whose content has been asked for."""
        found = (re.fullmatch(rf"GET /{repo}/resolve/[^/]+/(.*) 200", request) for request in self.requests)
        return {match[1] for match in found if match}

    def run_client(
        self,
        code: str,
        *args: str | Path,
        cache: Path,
        package: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> str:
        """
        Runs Python code as a client, with or without this package, and without a token; returns what it prints.

        `cache` is the folder of its caches, and `env` goes on top of the environment, e.g. `HF_TOKEN`. `timeout` is in
        seconds.
        """
        if not package:
            code = f"{WITHOUT_PACKAGE}\n{code}\nassert not [m for m in sys.modules if m.startswith('diffusers_adm')]\n"
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            env={**self.environment(cache), **(env or {})},
            cwd=cache.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{self.requests[-20:]}"
        return result.stdout

    def environment(self, cache: Path) -> dict[str, str]:
        """Of a client's process, whose caches are in the folder `cache`."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return environment | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }


class _Refusal(Exception):
    """An answer that is no success, with the code that the client turns into an exception of its own."""

    def __init__(self, status: int, code: str = "", message: str = "", commit: str = ""):
        super().__init__(message or code)
        headers = {"X-Error-Code": code, "X-Error-Message": message or code, "X-Repo-Commit": commit}
        self.answer = status, {name: value for name, value in headers.items() if value}, b""


Answer = tuple[int, dict[str, str], bytes]


def _json(content: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.content = b""
            while size := int(self.rfile.readline(), 16):
                self.content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            with self.hub.lock:
                status, headers, body = self._answer(url.path)
        except _Refusal as refusal:
            status, headers, body = refusal.answer
        self.hub.requests.append(f"{self.command} {unquote(url.path)} {status}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, *_):
        pass

    def _answer(self, path: str) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        repo, revision, rest = r"((?:spaces/)?[^/]+/[^/]+)", r"([^/]+)", r"(.*)"
        api = f"/api/(?:models/)?{repo}"
        # Revisions are quoted ("refs%2Fpr%2F1"), so parts are matched before they are unquoted.
        routes: dict[str, Callable[..., Answer]] = {
            "GET /api/whoami-v2": self._whoami,
            "POST /api/repos/create": self._create,
            "POST /api/validate-yaml": self._validate_card,
            f"GET {api}": self._info,
            f"GET {api}/auth-check/write": self._check_write,
            f"GET {api}/revision/{revision}": self._info,
            f"GET {api}/tree/{revision}/?{rest}": self._tree,
            f"GET {api}/refs": self._refs,
            f"POST {api}/branch/{revision}": self._branch,
            f"POST {api}/preupload/{revision}": self._preupload,
            f"POST {api}/commit/{revision}": self._commit,
            rf"POST /{repo}\.git/info/lfs/objects/batch": self._lfs_batch,
            r"PUT /lfs/(\w+)": self._lfs_upload,
            "POST /lfs/verify": self._lfs_verify,
            f"GET /{repo}/resolve/{revision}/{rest}": self._resolve,
        }
        for pattern, answer in routes.items():
            if match := re.fullmatch(pattern, f"{method} {path}"):
                return answer(*map(unquote, match.groups()))
        raise _Refusal(404, message=f"This server knows no {method} {path}")

    # Who asks, and for what.

    @staticmethod
    def _owner(repo: str) -> str:
        return repo.removeprefix("spaces/").partition("/")[0]

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _repository(self, repo: str) -> Repository:
        user, repository = self._user(), self.hub.repositories.get(repo)
        if repository is None or (repository.private and user != self._owner(repo)):
            # To strangers, what is private looks like what is not there; only with a token does the Hub say 404.
            raise _Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def _writable(self, repo: str) -> Repository:
        repository, user = self._repository(repo), self._user()
        if user is None:
            raise _Refusal(401, message="Invalid username or password.")
        if user != self._owner(repo) and "create_pr" not in self.query:
            raise _Refusal(403, message="You are not allowed to write here. Pass create_pr=1.")
        return repository

    def _revision(self, repo: str, revision: str) -> tuple[str, dict[str, str]]:
        repository = self._repository(repo)
        name = repository.find(revision)
        if name is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return name, repository.commits[name].files

    def _check_write(self, repo: str) -> Answer:
        self._writable(repo)
        return _json({})

    def _whoami(self) -> Answer:
        user = self._user()
        if user is None:
            raise _Refusal(401, message="Invalid username or password.")
        return _json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    # Reading.

    def _entry(self, path: str, blob: str) -> dict[str, Any]:
        data = self.hub.blobs[blob]
        entry = {"type": "file", "path": path, "rfilename": path, "size": len(data)}
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": blob, "sha256": blob, "size": len(data), "pointerSize": 132}
        return entry

    def _info(self, repo: str, revision: str = "main") -> Answer:
        name, files = self._revision(repo, revision)
        info = {"id": repo.removeprefix("spaces/"), "sha": name, "gated": False, "tags": []}
        info["private"] = self.hub.repositories[repo].private
        info["siblings"] = [self._entry(path, blob) for path, blob in sorted(files.items())]
        return _json(info)

    def _tree(self, repo: str, revision: str, folder: str) -> Answer:
        _, files = self._revision(repo, revision)
        prefix = f"{folder}/" if folder else ""
        return _json([self._entry(path, blob) for path, blob in sorted(files.items()) if path.startswith(prefix)])

    def _refs(self, repo: str) -> Answer:
        refs = [
            {"name": name, "ref": name if name.startswith("refs/") else f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in self._repository(repo).refs.items()
        ]
        pulls = [ref for ref in refs if ref["name"].startswith("refs/pr/")]
        branches = [ref for ref in refs if ref not in pulls]
        return _json({"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})

    def _resolve(self, repo: str, revision: str, path: str) -> Answer:
        name, files = self._revision(repo, revision)
        if path not in files:
            raise _Refusal(404, "EntryNotFound", "Entry not found", commit=name)
        entry = self._entry(path, files[path])
        tag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
        data = self.hub.blobs[files[path]]
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": name}, data

    # Writing.

    def _create(self) -> Answer:
        user, wanted = self._user(), json.loads(self.content)
        if user is None:
            raise _Refusal(401, message="Invalid username or password.")
        owner = wanted.get("organization") or user
        kind = wanted.get("type", "model")
        repo = f"{'spaces/' if kind == 'space' else ''}{owner}/{wanted['name']}"
        if kind == "space" and "sdk" not in wanted:
            raise _Refusal(400, message='Invalid input: expected one of "gradio", "docker" or "static" as sdk')
        url = {"url": f"{self.hub.endpoint}/{repo}"}
        if repo in self.hub.repositories:
            return _json({"error": f"You already created this {kind} repo", **url}, status=409)
        if owner != user:
            raise _Refusal(403, message=f"You don't have the rights to create a {kind} under the namespace {owner!r}.")
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[repo] = Repository(private=bool(private), sdk=wanted.get("sdk"))
        attributes = "".join(f"*{suffix} filter=lfs\n" for suffix in LFS_SUFFIXES)
        self.hub.repositories[repo].add("main", {".gitattributes": self.hub.store(attributes.encode())}, "initial")
        return _json(url)

    def _validate_card(self) -> Answer:
        card = json.loads(self.content)["content"]
        try:
            metadata = yaml.safe_load(card.split("---\n")[1])
            errors = [] if isinstance(metadata, dict) else ["The metadata are no mapping."]
        except (IndexError, yaml.YAMLError) as error:
            errors = [str(error)]
        answer = {"errors": [{"message": message} for message in errors], "warnings": []}
        return _json(answer, status=400 if errors else 200)

    def _branch(self, repo: str, branch: str) -> Answer:
        repository = self._writable(repo)
        start = json.loads(self.content or b"{}").get("startingPoint", "main")
        repository.refs[branch] = self._revision(repo, start)[0]
        return _json({})

    def _preupload(self, repo: str, revision: str) -> Answer:
        self._writable(repo)
        _, files = self._revision(repo, revision)
        answers = []
        for file in json.loads(self.content)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in files:
                entry = self._entry(path, files[path])
                answers[-1]["oid"] = entry["lfs"]["oid"] if mode == "lfs" else entry["oid"]
        return _json({"files": answers})

    def _lfs_batch(self, repo: str) -> Answer:
        self._repository(repo)
        objects = []
        for wanted in json.loads(self.content)["objects"]:
            objects.append(dict(wanted))
            if wanted["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}
                verify = {"href": f"{self.hub.endpoint}/lfs/verify", "header": {}}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, name: str) -> Answer:
        if hashlib.sha256(self.content).hexdigest() != name:
            raise _Refusal(400, message="The content has another SHA-256.")
        self.hub.uploads.append(self.hub.store(self.content))
        return _json({})

    def _lfs_verify(self) -> Answer:
        wanted = json.loads(self.content)
        if len(self.hub.blobs.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Refusal(404, message="There is no such object.")
        return _json({})

    def _commit(self, repo: str, revision: str) -> Answer:
        repository = self._writable(repo)
        header, *operations = [json.loads(line) for line in self.content.splitlines()]
        files = dict(self._revision(repo, revision)[1])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile" and value["oid"] in self.hub.blobs:
                files[value["path"]] = value["oid"]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refusal(400, message=f"Cannot {operation['key']} {value['path']}")
        answer, ref = {}, revision
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{number}"
        name = repository.add(ref, files, header["value"]["summary"])
        return _json(answer | {"commitOid": name, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{name}"})
