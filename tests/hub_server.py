"""A hub on loopback: what the Hugging Face hub's client asks for, over HTTP.

Models only, uploads by LFS. It keeps commits as the hub does: none is half
made, and one whose parent is not the branch's head is refused.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

ID = r"(?P<id>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
LICENSES = {"apache-2.0", "cc-by-4.0", "mit", "unknown", "other"}
# The hub takes larger and binary files by LFS.
LFS_SUFFIXES = (".ckpt", ".safetensors", ".model", ".onnx")
CODES = {401: None, 403: None, 404: "RepoNotFound", 409: None}


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status, message, code=None, **more):
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


class Cut(Exception):
    """No answer: the connection is closed."""


@dataclass
class Blob:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self):
        """As git names it: of an LFS file, its pointer."""
        content = self.content
        if self.is_lfs:
            content = (
                "version https://git-lfs.github.com/spec/v1\n"
                f"oid sha256:{self.sha256}\nsize {len(content)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    sha: str
    message: str
    files: dict


@dataclass
class Repository:
    private: bool
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)

    def commit(self, branch, message, files):
        parent = self.branches.get(branch)
        oids = {path: blob.oid for path, blob in files.items()}
        text = json.dumps([parent, message, oids])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = Commit(sha, message, files)
        self.branches[branch] = sha
        return sha

    def at(self, revision):
        revision = self.branches.get(revision, revision)
        if revision not in self.commits:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        return self.commits[revision]


@dataclass
class Fault:
    """What happens to requests whose ``METHOD /path`` matches.

    ``how`` is a status; ``cut`` (no answer); ``cut after`` (done, but no
    answer); ``page`` (a web page with status 200); or a function to call first.
    """

    pattern: str
    how: object
    times: float = float("inf")
    message: str = "refused"


class HubServer:
    """The state of the hub.

    Attributes
    ----------
    users : dict
        By token, the user and whether the token may write.
    repositories : dict
        By id.
    requests : list of str
        ``METHOD /path`` of all there were.
    authorized : list of bool
        Whether each came with a token.
    """

    def __init__(self):
        self.users, self.repositories, self.stored = {}, {}, {}
        self.faults, self.requests, self.authorized = [], [], []
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads, self.http.hub = True, self
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @contextmanager
    def running(self):
        thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.02}
        )
        thread.start()
        try:
            yield self
        finally:
            self.http.shutdown()
            self.http.server_close()
            thread.join()

    def fail(self, pattern, how, times=float("inf"), message="refused"):
        self.faults.append(Fault(pattern, how, times, message))

    def files(self, name, branch="main"):
        """Contents by path."""
        files = self.repositories[name].at(branch).files
        return {path: blob.content for path, blob in files.items()}

    def history(self, name):
        return [c.message for c in self.repositories[name].commits.values()]

    def create(self, name, private=False):
        self.repositories[name] = Repository(private)
        attributes = {".gitattributes": Blob(b"*.ckpt filter=lfs\n", False)}
        self.repositories[name].commit("main", "initial commit", attributes)

    # ----------------------------------------------------------------- requests

    def user(self, request):
        header = request.headers.get("Authorization")
        if header is None:
            return None, False
        user = self.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def find(self, request, name, write=False):
        user, may_write = self.user(request)
        repository = self.repositories.get(name)
        is_owner = user == name.partition("/")[0]
        if repository is None or (repository.private and not is_owner):
            raise Refusal(
                401 if user is None else 404,
                "Repository not found",
                "RepoNotFound",
            )
        if write and not (is_owner and may_write):
            raise Refusal(403 if user else 401, "You may not write here")
        return repository

    def answer(self, request, method, path, query, body):
        for pattern, name in ROUTES:
            match = re.fullmatch(pattern, f"{method} {path}")
            if match:
                found = {k: unquote(v) for k, v in match.groupdict().items()}
                function = getattr(self, name)
                return function(request, query=query, body=body, **found)
        raise Refusal(404, f"There is no {method} {path}")

    def info(self, request, id, revision="main", **_):
        repository = self.find(request, id)
        commit = repository.at(revision)
        return {
            "_id": "1",
            "id": id,
            "modelId": id,
            "sha": commit.sha,
            "private": repository.private,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def tree(self, request, id, revision, **_):
        commit = self.find(request, id).at(revision)
        entries = []
        for path, blob in sorted(commit.files.items()):
            size = len(blob.content)
            entry = {"type": "file", "path": path, "size": size}
            entry["oid"] = blob.oid
            if blob.is_lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": size}
                entry["lfs"]["pointerSize"] = 130
            entries.append(entry)
        return entries

    def make(self, request, body, **_):
        user, may_write = self.user(request)
        asked = json.loads(body)
        owner = asked.get("organization") or user
        if user is None:
            raise Refusal(401, "Log in")
        if owner != user or not may_write:
            raise Refusal(403, f"You may not create models of {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.repositories:
            url = f"{self.url}/{name}"
            raise Refusal(409, "You already created this model repo", url=url)
        private = asked.get("visibility") == "private"
        self.create(name, private or bool(asked.get("private")))
        return {"url": f"{self.url}/{name}", "name": name}

    def make_branch(self, request, id, revision, **_):
        repository = self.find(request, id, write=True)
        if revision in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        return {}

    def validate(self, request, body, **_):
        text = json.loads(body)["content"]
        front = yaml.safe_load(text.split("---\n")[1])
        if front.get("license") not in LICENSES:
            message = f'"license" must be one of {sorted(LICENSES)}'
            errors = {"errors": [{"message": message}], "warnings": []}
            return json.dumps(errors).encode(), {}, 400
        return {"errors": [], "warnings": []}

    def preupload(self, request, id, revision, body, **_):
        commit = self.find(request, id, write=True).at(revision)
        files = []
        for file in json.loads(body)["files"]:
            blob = commit.files.get(file["path"])
            is_lfs = file["path"].endswith(LFS_SUFFIXES)
            entry = {"path": file["path"], "shouldIgnore": False}
            entry["uploadMode"] = "lfs" if is_lfs else "regular"
            if blob is not None:
                entry["oid"] = blob.sha256 if blob.is_lfs else blob.oid
            files.append(entry)
        return {"files": files}

    def batch(self, request, id, body, **_):
        self.find(request, id, write=True)
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.stored:
                href = f"{self.url}/store/{entry['oid']}"
                verify = f"{self.url}/{id}/verify"
                entry["actions"] = {
                    "upload": {"href": href},
                    "verify": {"href": verify},
                }
        return {"transfer": "basic", "objects": objects}

    def store(self, request, oid, body, **_):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "The content is not what was announced")
        self.stored[oid] = body
        return {}

    def verify(self, request, id, body, **_):
        asked = json.loads(body)
        if len(self.stored.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(422, "The size is not what was announced")
        return {}

    def make_commit(self, request, id, revision, body, **_):
        repository = self.find(request, id, write=True)
        if revision not in repository.branches:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        head, *operations = map(json.loads, body.splitlines())
        parent = head["value"].get("parentCommit")
        if parent not in (None, repository.branches[revision]):
            raise Refusal(412, "A commit has happened since. Please refresh")
        files = dict(repository.at(revision).files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = Blob(content, False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(self.stored[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist")
            else:
                raise Refusal(400, f"unknown operation {operation['key']}")
        sha = repository.commit(revision, head["value"]["summary"], files)
        url = f"{self.url}/{id}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url}

    def resolve(self, request, id, revision, path, **_):
        commit = self.find(request, id).at(revision)
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha}
        # The hub redirects to its store, on another host. This is one host.
        headers["ETag"] = f'"{blob.sha256 if blob.is_lfs else blob.oid}"'
        return blob.content, headers, 200


ROUTES = [
    (f"GET /api/models/{ID}", "info"),
    (f"GET /api/models/{ID}/revision/{REVISION}", "info"),
    (f"GET /api/models/{ID}/tree/{REVISION}", "tree"),
    ("POST /api/repos/create", "make"),
    ("POST /api/validate-yaml", "validate"),
    (f"POST /api/models/{ID}/branch/{REVISION}", "make_branch"),
    (f"POST /api/models/{ID}/preupload/{REVISION}", "preupload"),
    (f"POST /api/models/{ID}/commit/{REVISION}", "make_commit"),
    (f"POST /{ID}.git/info/lfs/objects/batch", "batch"),
    (f"POST /{ID}/verify", "verify"),
    (r"PUT /store/(?P<oid>\w+)", "store"),
    (f"(?:GET|HEAD) /{ID}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    """Reads requests, has the hub answer them and writes the answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing."""

    def handle_request(self):
        hub, parts = self.server.hub, urlsplit(self.path)
        body = self.read_body()
        what = f"{self.command} {parts.path}"
        with hub.lock:
            hub.requests.append(what)
            hub.authorized.append("Authorization" in self.headers)
            try:
                self.send(*self.respond(hub, what, parts, body))
            except Cut:
                self.close_connection = True
            except Refusal as refusal:
                content = {"error": str(refusal)} | refusal.more
                headers = {"X-Error-Message": str(refusal)}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self.send(json.dumps(content).encode(), headers, refusal.status)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def respond(self, hub, what, parts, body):
        active = (
            fault
            for fault in hub.faults
            if fault.times > 0 and re.search(fault.pattern, what)
        )
        fault = next(active, None)
        how = None
        if fault is not None:
            fault.times -= 1
            how = fault.how
        if callable(how):
            how = how()
        if how == "cut":
            raise Cut
        if how == "page":
            return b"<html>Welcome</html>", {"Content-Type": "text/html"}, 200
        if isinstance(how, int):
            raise Refusal(how, fault.message, CODES.get(how))
        answer = hub.answer(
            self, self.command, parts.path, parse_qs(parts.query), body
        )
        if how == "cut after":
            raise Cut
        if isinstance(answer, tuple):
            return answer
        return json.dumps(answer).encode(), {}, 200

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, content, headers, status):
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
