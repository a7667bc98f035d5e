"""A Hub with one dataset: what `load_dataset` and `hf download` ask of it, on a port of this machine.

Start it with a folder in the Hub's layout, TASK/SPLIT*.parquet, and point a process at it with `environment`:

    with GlueHub(folder) as hub:
        subprocess.run(command, env=os.environ | hub.environment(cache_dir))
"""

import hashlib
import json
import re
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "nyu-mll/glue"
SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}$")


class GlueHub:
    """Serves `folder` as the dataset nyu-mll/glue. `requests` collects what was asked: (method, path).

    One revision, which is a hash of the files: it is taken when the server is made.
    """

    def __init__(self, folder):
        folder = Path(folder)
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        self.files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
        self.files["README.md"] = card(self.files).encode()
        self.revision = hashlib.sha1(b"".join(self.files.values())).hexdigest()
        self.requests = []

    def start(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, cache_dir):
        """Variables for a process that shall ask this Hub, and keep what it gets in `cache_dir`."""
        return hub_environment(self.url, cache_dir)

    def entry(self, path):
        """What the Hub says of a file or folder; None if there is none."""
        if path in self.files:
            content = self.files[path]
            return {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
        if any(name.startswith(f"{path}/") for name in self.files):
            return {"type": "directory", "path": path, "oid": etag(path.encode())}
        return None

    def tree(self, folder, recursive):
        """Entries below a folder ('' for the whole)."""
        prefix = f"{folder}/" if folder else ""
        below = [name[len(prefix) :].split("/") for name in self.files if name.startswith(prefix)]
        depths = range(1, max(map(len, below), default=0) + 1) if recursive else (1,)
        paths = {prefix + "/".join(parts[:depth]) for parts in below for depth in depths}
        return [self.entry(path) for path in sorted(paths)]


def hub_environment(url, cache_dir):
    """Variables for a process that shall ask the Hub at `url`, with all its caches in `cache_dir`."""
    return {
        "HF_ENDPOINT": url, "HF_HOME": str(cache_dir), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip


def etag(content):
    return hashlib.sha1(content).hexdigest()


def card(files):
    """The README.md whose head says which files make which split of which configuration."""
    splits = {}
    for name in files:
        task, _, file = name.rpartition("/")
        splits.setdefault(task, set()).add(SPLIT_NAME.sub("", Path(file).stem))
    lines = ["---", "configs:"]
    for task in sorted(splits):
        lines += [f"- config_name: {task}", "  data_files:"]
        for split in sorted(splits[task]):
            lines += [f"  - split: {split}", f"    path: {task}/{split}[-.]*"]
    return "\n".join([*lines, "---", "# Made-up rows", ""])


class _Handler(BaseHTTPRequestHandler):
    """Answers for the class attribute `hub`."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def log_message(self, *_):
        pass

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for pattern, reply in (
            (rf"/datasets/{REPOSITORY}/resolve/([^/]+)/(.+)", self.resolve),
            (rf"/api/datasets/{REPOSITORY}(?:/revision/([^/]+))?", self.info),
            (rf"/api/datasets/{REPOSITORY}/paths-info/([^/]+)", self.paths_info),
            (rf"/api/datasets/{REPOSITORY}/tree/([^/]+)(?:/(.*))?", self.list_tree),
        ):
            match = re.fullmatch(pattern, path)
            if match and match[1] not in (None, "main", self.hub.revision):
                return self.refuse("RevisionNotFound")
            if match:
                return reply(*match.groups()[1:])
        return self.refuse("RepoNotFound")

    def info(self):
        siblings = [{"rfilename": name} for name in self.hub.files]
        self.send_json({"id": REPOSITORY, "sha": self.hub.revision, "private": False, "siblings": siblings})

    def paths_info(self):
        paths = parse_qs(self.body.decode())["paths"]
        self.send_json([entry for path in paths if (entry := self.hub.entry(path))])

    def list_tree(self, folder):
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        entries = self.hub.tree(folder or "", recursive)
        return self.send_json(entries) if entries else self.refuse("EntryNotFound")

    def resolve(self, path):
        if path not in self.hub.files:
            return self.refuse("EntryNotFound")
        content = self.hub.files[path]
        headers = {"ETag": f'"{etag(content)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.send(HTTPStatus.OK, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.send(HTTPStatus.PARTIAL_CONTENT, content[first : last + 1], headers)

    def refuse(self, code):
        self.send(HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def send_json(self, value):
        self.send(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, content, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("X-Repo-Commit", self.hub.revision)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
