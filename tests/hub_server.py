"""A Hub on a port of this machine: what `huggingface_hub` asks of one, and what may go wrong with it.

    with Hub() as hub:
        hub.fail("POST .*/commit/", with_=503, times=2)
        subprocess.run(command, env=os.environ | hub.environment(cache_dir, TOKEN))
    assert hub.repos["writer/model"].at("step-4").files["config.json"] == ...

Started by hand, `python tests/hub_server.py [--port N]`, it prints what to export.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_the_writers_own"
LARGE = (".safetensors", ".pt", ".bin", ".png")
REPO = r"(?P<repo>(?:datasets/)?[^/]+/[^/]+)"
API = rf"/api/(?:models/|(?=datasets/)){REPO}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = []


def hub_environment(url, cache_dir, token=None, disable_xet=False):
    """Variables for a process that shall ask the Hub at `url`, with all its caches in `cache_dir`."""
    return {
        "HF_ENDPOINT": url, "HF_HOME": str(cache_dir), "HF_TOKEN": token or "", "HUGGING_FACE_HUB_TOKEN": "",
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    } | ({"HF_HUB_DISABLE_XET": "1"} if disable_xet else {})  # fmt: skip


@dataclass
class Token:
    """Whose it is and what it allows: `role` is read, write or fineGrained.

    `orgs` maps an organisation to the role in it; `scoped` a user, an organisation or a repository to what
    a fineGrained token may do there: repo.write, repo.content.read.
    """

    name: str
    role: str = "write"
    orgs: dict = field(default_factory=dict)
    scoped: dict = field(default_factory=dict)

    def may(self, write, repo_id):
        namespace, _, _ = repo_id.removeprefix("datasets/").rpartition("/")
        if self.role == "fineGrained":
            granted = {*self.scoped.get(namespace, ()), *self.scoped.get(repo_id, ())}
            return "repo.write" in granted or (not write and "repo.content.read" in granted)
        role = "admin" if namespace == self.name else self.orgs.get(namespace)
        if write:
            return self.role == "write" and role in ("contributor", "write", "admin")
        return role is not None

    def describe(self):
        """The answer of whoami."""
        access = {"displayName": "a test", "role": self.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        if self.role == "fineGrained":
            scoped = [
                {"entity": {"_id": git_oid(name.encode())[:24], "type": self.kind(name), "name": name},
                 "permissions": list(permissions)}
                for name, permissions in self.scoped.items()
            ]  # fmt: skip
            access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": r} for org, r in self.orgs.items()]
        who = {"type": "user", "id": "0" * 24, "name": self.name, "fullname": self.name, "isPro": False}
        return who | {"orgs": orgs, "auth": {"type": "access_token", "accessToken": access}}

    def kind(self, entity):
        return "model" if "/" in entity else "user" if entity == self.name else "org"


# --- What is stored ---------------------------------------------------------------------------------


class Commit(NamedTuple):
    sha: str
    parent: str | None
    message: str
    files: dict  # path -> bytes
    date: str


@dataclass
class Repo:
    """Commits, oldest first, and the names that point to them."""

    private: bool = False
    commits: list = field(default_factory=list)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)  # sha256 -> bytes
    announced: dict = field(default_factory=dict)  # sha256 -> size, of objects to come

    def at(self, revision="main"):
        """The commit that a branch, a tag or a sha names; KeyError if there is none."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        for commit in self.commits:
            if commit.sha == sha:
                return commit
        raise KeyError(revision)

    def write(self, changes, message="a change", branch="main"):
        """A new commit on a branch. `changes` maps paths to bytes or text, or to None for what goes."""
        parent = self.branches.get(branch)
        files = dict(self.at(parent).files) if parent else {}
        files |= {k: v.encode() if isinstance(v, str) else v for k, v in changes.items()}
        files = {path: content for path, content in sorted(files.items()) if content is not None}
        for path, content in files.items():
            if is_large(path, len(content)):
                self.objects[sha256(content)] = content
        content = repr((parent, message, len(self.commits), [(p, git_oid(c)) for p, c in files.items()]))
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits.append(Commit(git_oid(content.encode()), parent, message, files, date))
        self.branches[branch] = self.commits[-1].sha
        return self.commits[-1]

    def history(self, commit):
        """A commit and those before it, newest first."""
        while commit:
            yield commit
            commit = self.at(commit.parent) if commit.parent else None


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path, size):
    """Whether a file is kept as an LFS object."""
    return size > 0 and (path.endswith(LARGE) or size > 1_000_000)


def oid(path, content):
    return sha256(content) if is_large(path, len(content)) else git_oid(content)


def entry(files, path):
    """What the Hub says of a file or folder; None if there is none."""
    if path in files:
        content = files[path]
        said = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if is_large(path, len(content)):
            # A tree calls it oid, the siblings of a repository sha256.
            hashes = dict.fromkeys(("oid", "sha256"), sha256(content))
            said["lfs"] = hashes | {"size": len(content), "pointerSize": 134}
        return said
    if any(name.startswith(f"{path}/") for name in files):
        return {"type": "directory", "path": path, "oid": git_oid(path.encode())}
    return None


def tree(files, folder, recursive):
    """Entries below a folder ('' for the whole)."""
    prefix = f"{folder}/" if folder else ""
    below = [name[len(prefix) :].split("/") for name in files if name.startswith(prefix)]
    depths = range(1, max(map(len, below), default=0) + 1) if recursive else (1,)
    paths = {prefix + "/".join(parts[:depth]) for parts in below for depth in depths}
    return [entry(files, path) for path in sorted(paths)]


def card_data(readme):
    """The metadata at the head of a card: None without any, yaml.YAMLError where they are not valid."""
    head = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", readme, re.DOTALL)
    return yaml.safe_load(head[1]) if head else None


# --- The server -------------------------------------------------------------------------------------


@dataclass
class Fault:
    match: str
    kind: int | str
    left: float
    seconds: float | None


class Hub:
    """Speaks the Hub's language on 127.0.0.1. `tokens` maps each token to a `Token`.

    `repos` maps names ("datasets/..." for a dataset's) to a `Repo`. Stopped and started again it has the same
    port and content.
    """

    KINDS = ("drop", "drop_after", "hang", "slow", "trickle", "corrupt", "wrong hash")

    def __init__(self, tokens=None, port=0):
        self.tokens = {TOKEN: Token("writer")} if tokens is None else tokens
        self.port = port
        self.repos, self.log, self.faults, self.connections = {}, [], [], set()
        self.changed = threading.Condition(threading.RLock())
        self.stopping = threading.Event()

    def start(self):
        self.stopping.clear()
        self.server = _Server(("127.0.0.1", self.port), type("Handler", (_Handler,), {"hub": self}))
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self):
        """Closes every connection too, so that what hangs ends and nothing is answered any more."""
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        with self.changed:
            for connection in self.connections:
                close(connection)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def environment(self, cache_dir, token=None, disable_xet=False):
        """Variables for a process that shall ask this Hub, and keep what it gets in `cache_dir`."""
        return hub_environment(self.url, cache_dir, token, disable_xet)

    def add(self, repo_id, files=(), private=False):
        """A repository with one commit, of a folder or of {path: bytes or text}."""
        if isinstance(files, (str, Path)):
            paths = [path for path in Path(files).rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        with self.changed:
            self.repos[repo_id] = Repo(private)
            self.repos[repo_id].write(dict(files), "initial commit")
        return self.repos[repo_id]

    @property
    def requests(self):
        """What was asked, in order: (method, path, status, had_token); status None: no answer (yet)."""
        with self.changed:
            return [tuple(line) for line in self.log]

    def wait_for(self, match, times=1, status=None, seconds=60):
        """Waits until `times` requests came whose "METHOD path" holds the pattern `match`.

        With a `status`, until so many were answered with it.
        """

        def done():
            came = [line[2] for line in self.log if re.search(match, f"{line[0]} {line[1]}")]
            return (len(came) if status is None else came.count(status)) >= times

        with self.changed:
            assert self.changed.wait_for(done, seconds), f"{match} did not come {times} times: {self.log}"

    def fail(self, match, times=1, with_=503, seconds=None):
        """The next `times` requests (None: all) whose "METHOD path" holds the pattern `match` go wrong.

        `with_` is a status (429 says to retry after `seconds`, or at once), which leaves the work undone, or
        drop          closed without work and answer
        drop_after    closed without answer: the work is done
        hang          neither work nor answer for `seconds`, or until the server stops
        slow          the work is done at once, the answer comes after `seconds`
        trickle       the answer takes `seconds` to arrive
        corrupt       one byte is wrong in what a GET gets or a PUT brings
        wrong hash    the server takes each sha256 in the request for another
        """
        assert isinstance(with_, int) or with_ in self.KINDS, with_
        with self.changed:
            self.faults.append(Fault(match, with_, float("inf") if times is None else times, seconds))

    def heal(self):
        """From here on nothing goes wrong."""
        with self.changed:
            self.faults.clear()

    def note(self, method, path, had_token):
        """The request's line in the log, and the fault that awaits it."""
        with self.changed:
            self.log.append([method, path, None, had_token])
            self.changed.notify_all()
            for fault in self.faults:
                if fault.left > 0 and re.search(fault.match, f"{method} {path}"):
                    fault.left -= 1
                    return self.log[-1], fault
            return self.log[-1], Fault("", "", 0, None)

    def note_answer(self, line, status):
        with self.changed:
            line[2] = status
            self.changed.notify_all()

    def open(self, repo_id, user, write):
        """The repository, if the user may read or write it."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not (user and user.may(False, repo_id))):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not user:
            raise Refusal(401, "A token is needed for this")
        if write and not user.may(True, repo_id):
            raise Refusal(403, f"This token may not write to {repo_id}")
        return repo


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a client that went away is no mistake
            super().handle_error(request, client_address)


class Reply(NamedTuple):
    status: int
    content: bytes
    headers: dict


class Refusal(Exception):
    """An error that the client is told, with the name that the Hub has for it."""

    def __init__(self, status, message, code=None, **headers):
        headline = message.encode("ascii", "replace").decode()
        headers = {"X-Error-Message": headline} | ({"X-Error-Code": code} if code else {}) | headers
        self.reply = json_reply({"error": message}, status, headers)


def json_reply(value, status=200, headers=None):
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))


def failure(status, seconds):
    """What a Hub that fails, or that has had enough, says."""
    if status >= 500:
        page = f"<!DOCTYPE html><html><body><h1>{status}</h1></body></html>"
        return Reply(status, page.encode(), {"Content-Type": "text/html"})
    headers = {"Retry-After": str(seconds or 0)} if status == 429 else {}
    return json_reply({"error": f"Refused with {status}, as the test wants"}, status, headers)


def flipped(content):
    """The same bytes but for one in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 1]) + content[middle + 1 :]


def close(connection):
    with contextlib.suppress(OSError):  # closed already
        connection.shutdown(socket.SHUT_RDWR)


def route(pattern, needs=None):
    """Marks the method that answers a "METHOD path". Where it `needs` to read or write, `repo` is a Repo."""

    def mark(function):
        ROUTES.append((re.compile(pattern), needs, function))
        return function

    return mark


class _Handler(BaseHTTPRequestHandler):
    """Answers for the class attribute `hub`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        with self.hub.changed:
            self.hub.connections.add(self.connection)

    def finish(self):
        with self.hub.changed:
            self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def answer(self):
        self.body = self.read_body()
        hub, address = self.hub, urlsplit(self.path)
        self.raw_path, self.query = address.path, parse_qs(address.query)
        line, fault = hub.note(self.command, unquote(address.path), "Authorization" in self.headers)
        if fault.kind == "hang":
            hub.stopping.wait(fault.seconds)
        if fault.kind in ("hang", "drop") or hub.stopping.is_set():
            return self.drop()
        reply = failure(fault.kind, fault.seconds) if isinstance(fault.kind, int) else self.work(fault.kind)
        if fault.kind == "slow":
            hub.stopping.wait(fault.seconds)
        if fault.kind == "drop_after":
            return self.drop()
        hub.note_answer(line, reply.status)
        return self.send(reply, fault.seconds if fault.kind == "trickle" else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def work(self, fault):
        """Does what is asked; the answer."""
        if fault == "corrupt" and self.command == "PUT":
            self.body = flipped(self.body)
        if fault == "wrong hash":
            self.body = re.sub(rb'("oid": ?")(\w{8})', lambda m: m[1] + m[2][::-1], self.body)
        with self.hub.changed:
            try:
                reply = self.dispatch()
            except Refusal as refusal:
                reply = refusal.reply
        if fault == "corrupt" and self.command == "GET":
            reply = reply._replace(content=flipped(reply.content))
        return reply

    def dispatch(self):
        user = self.user()
        for pattern, needs, function in ROUTES:
            if match := pattern.fullmatch(f"{self.command} {self.raw_path}"):
                groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                if needs:
                    self.repo_id = groups["repo"]
                    groups["repo"] = self.hub.open(self.repo_id, user, needs == "write")
                return function(self, **groups)
        raise Refusal(404, "There is nothing here")

    def user(self):
        """Who asks: None without a token."""
        if "Authorization" not in self.headers:
            return None
        token = self.headers["Authorization"].removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def send(self, reply, seconds):
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        piece = max(1, len(reply.content) // 10) if seconds else len(reply.content) or 1
        for start in range(0, len(reply.content), piece):
            self.hub.stopping.wait((seconds or 0) / 10)
            self.wfile.write(reply.content[start : start + piece])

    def drop(self):
        self.close_connection = True
        close(self.connection)

    def at(self, repo, revision):
        try:
            return repo.at(revision or "main")
        except KeyError:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    def head(self, repo, branch):
        """The commit which the next one on a branch has for its parent."""
        if branch not in repo.branches:
            raise Refusal(404, f"There is no branch {branch}", "RevisionNotFound")
        return repo.at(branch)

    # --- Users and repositories ---------------------------------------------------------------------

    @route("GET /api/whoami-v2")
    def whoami(self):
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return json_reply(user.describe())

    @route("POST /api/repos/create")
    def create(self):
        user, asked = self.user(), json.loads(self.body)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo_id = f"{asked.get('organization') or user.name}/{asked['name']}"
        repo_id = f"datasets/{repo_id}" if asked.get("type") == "dataset" else repo_id
        if not user.may(True, repo_id):
            raise Refusal(403, f"This token may not create {repo_id}")
        said = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return json_reply(said | {"error": "You already created this repo"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        patterns = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
        self.hub.add(repo_id, {".gitattributes": patterns}, private)
        return json_reply(said)

    @route(f"GET {API}/auth-check", "read")
    def may_read(self, repo):
        return json_reply({})

    @route(f"GET {API}/auth-check/write", "write")
    def may_write(self, repo):
        return json_reply({})

    @route("POST /api/validate-yaml")
    def validate(self):
        try:
            data = card_data(json.loads(self.body)["content"])
        except yaml.YAMLError as error:
            return json_reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return json_reply({"errors": [], "warnings": warnings})

    # --- Revisions ----------------------------------------------------------------------------------

    @route(f"GET {API}(?:/revision/{REVISION})?", "read")
    def info(self, repo, revision):
        commit = self.at(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query:
            entries = [entry(commit.files, path) for path in commit.files]
            siblings = [e | {"rfilename": e["path"], "blobId": e["oid"]} for e in entries]
        card = self.parsed(card_data, commit.files.get("README.md", b""))
        config = self.parsed(json.loads, commit.files.get("config.json", b"{}"))
        name = self.repo_id.removeprefix("datasets/")
        return json_reply({
            "_id": "0" * 24, "id": name, "modelId": name, "author": name.split("/")[0], "sha": commit.sha,
            "private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
            "createdAt": repo.commits[0].date, "lastModified": commit.date, "tags": card.get("tags") or [],
            "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag"),
            "cardData": card, "siblings": siblings,
            "config": {k: config[k] for k in ("architectures", "model_type", "auto_map") if k in config},
        })  # fmt: skip

    def parsed(self, parse, content):
        """A file as a dict: empty where it is not valid, which is no reason to refuse the repository."""
        try:
            value = parse(content.decode())
        except (ValueError, yaml.YAMLError):
            return {}
        return value if isinstance(value, dict) else {}

    @route(f"GET {API}/refs", "read")
    def refs(self, repo):
        def listed(kind, names):
            return [{"name": k, "ref": f"refs/{kind}/{k}", "targetCommit": v} for k, v in names.items()]

        branches, tags = listed("heads", repo.branches), listed("tags", repo.tags)
        return json_reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    @route(f"GET {API}/commits/{REVISION}", "read")
    def list_commits(self, repo, revision):
        def described(commit):
            title, _, message = commit.message.partition("\n\n")
            return {"id": commit.sha, "title": title, "message": message, "date": commit.date, "authors": []}

        return json_reply([described(commit) for commit in repo.history(self.at(repo, revision))])

    @route(f"POST {API}/tag/{REVISION}", "write")
    def tag(self, repo, revision):
        return self.name(repo.tags, json.loads(self.body)["tag"], self.at(repo, revision).sha)

    @route(f"POST {API}/branch/(?P<name>[^/]+)", "write")
    def branch(self, repo, name):
        start = json.loads(self.body or b"{}").get("startingPoint")
        return self.name(repo.branches, name, self.at(repo, start).sha)

    def name(self, names, name, sha):
        if name in names:
            raise Refusal(409, f"Reference {name} already exists")
        names[name] = sha
        return json_reply({})

    @route(f"DELETE {API}/(?P<kind>tag|branch)/(?P<name>[^/]+)", "write")
    def forget(self, repo, kind, name):
        names = repo.tags if kind == "tag" else repo.branches
        if names.pop(name, None) is None:
            raise Refusal(404, f"There is no {kind} {name}", "RevisionNotFound")
        return json_reply({})

    # --- Down ---------------------------------------------------------------------------------------

    @route(f"GET {API}/tree/{REVISION}(?:/(?P<folder>.*))?", "read")
    def list_tree(self, repo, revision, folder):
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = tree(self.at(repo, revision).files, folder, recursive)
        if folder and not entries:
            raise Refusal(404, f"{folder} is not there", "EntryNotFound")
        return json_reply(entries)

    @route(f"POST {API}/paths-info/{REVISION}", "read")
    def paths_info(self, repo, revision):
        files = self.at(repo, revision).files
        paths = parse_qs(self.body.decode())["paths"]
        return json_reply([said for path in paths if (said := entry(files, path))])

    @route(f"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", "read")
    def resolve(self, repo, revision, path):
        commit = self.at(repo, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise Refusal(404, f"{path} is not there", "EntryNotFound", **headers)
        content = commit.files[path]
        headers |= {"ETag": f'"{oid(path, content)}"', "Accept-Ranges": "bytes"}
        if is_large(path, len(content)):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers["ETag"]}
        return self.part(content, headers)

    def part(self, content, headers):
        """The bytes that were asked for: all, or a range."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return Reply(200, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            return Reply(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Reply(206, content[first : last + 1], headers)

    # --- Up -----------------------------------------------------------------------------------------

    @route(f"POST {API}/preupload/{REVISION}", "write")
    def preupload(self, repo, revision):
        files = self.head(repo, revision).files
        said = [
            {
                "path": asked["path"],
                "uploadMode": "lfs" if is_large(asked["path"], asked["size"]) else "regular",
                "shouldIgnore": False,
                "oid": oid(asked["path"], files[asked["path"]]) if asked["path"] in files else None,
            }
            for asked in json.loads(self.body)["files"]
        ]
        return json_reply({"files": said})

    @route(rf"POST /{REPO}\.git/info/lfs/objects/batch", "write")
    def lfs_batch(self, repo):
        objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(self.body)["objects"]]
        for wanted in objects:
            if wanted["oid"] not in repo.objects:
                repo.announced[wanted["oid"]] = wanted["size"]
                place = f"{self.hub.url}/{self.repo_id}.git/lfs"
                wanted["actions"] = {
                    "upload": {"href": f"{place}/{wanted['oid']}"},
                    "verify": {"href": f"{place}/verify"},
                }
        return json_reply({"transfer": "basic", "objects": objects})

    @route(rf"PUT /{REPO}\.git/lfs/(?P<sha>\w+)")
    def lfs_upload(self, repo, sha):
        """Comes without a token: the address is the permission."""
        repo = self.hub.repos.get(repo)
        if repo is None or sha not in repo.announced:
            raise Refusal(403, "This object was not announced")
        if sha256(self.body) != sha or len(self.body) != repo.announced[sha]:
            raise Refusal(400, "The content does not have the announced sha256 and size")
        repo.objects[sha] = self.body
        return Reply(200, b"", {"ETag": f'"{sha}"'})

    @route(rf"POST /{REPO}\.git/lfs/verify", "write")
    def lfs_verify(self, repo):
        asked = json.loads(self.body)
        if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(422, f"Object {asked['oid']} did not arrive")
        return json_reply({})

    @route(f"POST {API}/commit/{REVISION}", "write")
    def commit(self, repo, revision):
        if "create_pr" in self.query:
            raise Refusal(403, "This Hub has no pull requests")
        head = self.head(repo, revision)
        (_, header), *operations = [json.loads(line).values() for line in self.body.splitlines()]
        if header.get("parentCommit", head.sha) != head.sha:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes = {}
        for key, value in operations:
            changes |= self.change(repo, head.files, key, value)
        message = "\n\n".join(filter(None, (header["summary"], header.get("description"))))
        sha = repo.write(changes, message, revision).sha
        url = f"{self.hub.url}/{self.repo_id}/commit/{sha}"
        return json_reply({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def change(self, repo, files, key, value):
        """One line of a commit as {path: content}, None for what goes."""
        path = value["path"]
        if key == "file":
            return {path: base64.b64decode(value["content"])}
        if key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refusal(400, f"There is no object for {path}")
            return {path: repo.objects[value["oid"]]}
        if key not in ("deletedFile", "deletedFolder"):
            raise Refusal(400, f"Unknown operation {key}")
        folder = f"{path.rstrip('/')}/"
        gone = [f for f in files if (f.startswith(folder) if key == "deletedFolder" else f == path)]
        if not gone:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        return dict.fromkeys(gone)


def main():
    parser = argparse.ArgumentParser(description="A Hub to try things on.")
    parser.add_argument("--port", type=int, default=0)
    with Hub(port=parser.parse_args().port) as hub:
        for name, value in hub.environment("/tmp/hub_server_cache", TOKEN, disable_xet=True).items():
            print(f"export {name}={value}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
