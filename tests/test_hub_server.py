"""The tests' own Hub: the stock client finds what it expects of a Hub, and faults are what they say."""

import http.client
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors
from huggingface_hub.utils import close_session

from tests.hub_server import TOKEN, Hub, Token, git_oid, sha256

ROOT = Path(__file__).parent.parent
CARD = b"---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags:\n- bert\n---\n# A card\n"
FILES = {
    "README.md": CARD,
    "config.json": json.dumps({"model_type": "bert_ln", "hidden_size": 8}).encode(),
    "model.safetensors": bytes(range(256)) * 8,
    "trainer/state.pt": b"state",
    "empty.txt": b"",
    "vocab.txt": "[PAD]\n\u00e9\n".encode(),
}
TOKENS = {
    TOKEN: Token("writer", orgs={"lab": "write", "press": "read"}),
    "hf_reader": Token("writer", "read"),
    "hf_stranger": Token("stranger"),
    "hf_one_repo": Token("writer", "fineGrained", scoped={"writer/model": ["repo.write"]}),
    "hf_read_lab": Token("writer", "fineGrained", scoped={"lab": ["repo.content.read"]}),
}
MODEL = "writer/model"


@pytest.fixture
def hub(monkeypatch):
    """A Hub without Xet, which the client in this process may reach."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    close_session()
    with Hub(TOKENS) as hub:
        yield hub
    close_session()


@pytest.fixture
def api(hub):
    return client(hub)


def client(hub, token=TOKEN):
    return HfApi(endpoint=hub.url, token=token or False)


def adds(files):
    return [CommitOperationAdd(path, content) for path, content in files.items()]


def push(api, files=FILES, message="a push", **options):
    return api.create_commit(MODEL, adds(files), commit_message=message, **options)


def read_folder(folder):
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def ask(hub, method, path, body=None, headers=()):
    """One request by hand, on a connection of its own: (status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=30)
    try:
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def status_of(call, *args, **kwargs):
    with pytest.raises(errors.HfHubHTTPError) as raised:
        call(*args, **kwargs)
    return raised.value.response.status_code


# --- Up and down ------------------------------------------------------------------------------------


def test_what_is_pushed_is_stored_and_comes_back_at_main_a_tag_and_a_sha(hub, api, tmp_path):
    assert api.create_repo(MODEL).endswith(MODEL)
    first = push(api)
    api.create_tag(MODEL, tag="step-4")
    second = push(api, {"config.json": b"{}"}, "newer")

    repo = hub.repos[MODEL]
    assert [commit.message for commit in repo.commits] == ["initial commit", "a push", "newer"]
    assert [commit.parent for commit in repo.commits[1:]] == [c.sha for c in repo.commits[:-1]]
    stored = repo.at("step-4").files
    assert {path: content for path, content in stored.items() if path != ".gitattributes"} == FILES
    assert repo.tags == {"step-4": first.oid} and repo.branches == {"main": second.oid}

    for revision, config in (
        ("step-4", FILES["config.json"]),
        (first.oid, FILES["config.json"]),
        (None, b"{}"),
    ):
        folder = api.snapshot_download(MODEL, revision=revision, cache_dir=tmp_path / str(revision))
        expected = FILES | {"config.json": config, ".gitattributes": stored[".gitattributes"]}
        assert read_folder(folder) == expected
        assert Path(folder).name == repo.at(revision or "main").sha
    path = api.hf_hub_download(MODEL, "trainer/state.pt", cache_dir=tmp_path / "one")
    assert Path(path).read_bytes() == b"state"
    with pytest.raises(errors.RemoteEntryNotFoundError):
        api.hf_hub_download(MODEL, "absent.json", cache_dir=tmp_path / "one")
    with pytest.raises(errors.RevisionNotFoundError):
        api.snapshot_download(MODEL, revision="step-5", cache_dir=tmp_path / "one")


def test_large_files_go_as_objects_and_only_once(hub, api):
    api.create_repo(MODEL)
    push(api)
    puts = [path for method, path, status, _ in hub.requests if method == "PUT" and status == 200]
    assert sorted(path.rpartition("/")[2] for path in puts) == sorted(
        sha256(FILES[path]) for path in ("model.safetensors", "trainer/state.pt")
    )
    before = len(hub.requests)
    push(api, {"copy.safetensors": FILES["model.safetensors"], "long.txt": b"x" * 1_000_001})
    puts = [path for method, path, *_ in hub.requests[before:] if method == "PUT"]
    assert [path.rpartition("/")[2] for path in puts] == [sha256(b"x" * 1_000_001)]
    assert hub.repos[MODEL].at().files["copy.safetensors"] == FILES["model.safetensors"]


def test_a_commit_that_changes_nothing_is_not_made(hub, api):
    api.create_repo(MODEL)
    first = push(api)
    assert push(api).oid == first.oid
    assert [commit.sha for commit in hub.repos[MODEL].commits][1:] == [first.oid]


def test_files_and_folders_can_be_deleted(hub, api):
    hub.add(MODEL, FILES)
    gone = [CommitOperationDelete("trainer/"), CommitOperationDelete("vocab.txt")]
    api.create_commit(MODEL, gone, commit_message="less")
    assert set(hub.repos[MODEL].at().files) == set(FILES) - {"trainer/state.pt", "vocab.txt"}
    absent = [CommitOperationDelete("absent.txt")]
    assert status_of(api.create_commit, MODEL, absent, commit_message="less") == 404


def test_a_commit_on_a_parent_that_is_not_the_newest_is_refused(hub, api):
    old = hub.add(MODEL, FILES).at().sha
    push(api, {"a.txt": b"1"}, parent_commit=old)
    assert status_of(push, api, {"a.txt": b"2"}, parent_commit=old) == 412
    assert hub.repos[MODEL].at().files["a.txt"] == b"1"


def test_what_the_hub_tells_of_a_model(hub, api):
    commit = hub.add(MODEL, FILES, private=True).at()
    info = api.model_info(MODEL, files_metadata=True)
    assert (info.id, info.sha, info.private, info.author) == (MODEL, commit.sha, True, "writer")
    assert info.config == {"model_type": "bert_ln"}
    assert (info.pipeline_tag, info.library_name, info.tags) == ("fill-mask", "transformers", ["bert"])
    assert info.card_data.to_dict() == yaml.safe_load(CARD.decode().split("---")[1])
    assert {file.rfilename: file.size for file in info.siblings} == {k: len(v) for k, v in FILES.items()}
    files = {f.path: f for f in api.list_repo_tree(MODEL, recursive=True) if hasattr(f, "size")}
    assert files["model.safetensors"].lfs.sha256 == sha256(FILES["model.safetensors"])
    assert files["config.json"].lfs is None
    assert files["config.json"].blob_id == git_oid(FILES["config.json"])
    assert [f.path for f in api.get_paths_info(MODEL, ["trainer", "vocab.txt", "absent"])] == [
        "trainer",
        "vocab.txt",
    ]
    assert [f.path for f in api.list_repo_tree(MODEL, "trainer")] == ["trainer/state.pt"]
    assert api.file_exists(MODEL, "vocab.txt") and not api.file_exists(MODEL, "absent")


def test_the_identifiers_are_those_of_git():
    assert git_oid(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_oid(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_branches_and_tags(hub, api):
    repo = hub.add(MODEL, FILES)
    first = repo.at().sha
    repo.write({"a.txt": "1"}, "second")
    api.create_branch(MODEL, branch="runs/one", revision=first)
    api.create_tag(MODEL, tag="v/1", revision="runs/one")
    assert status_of(api.create_tag, MODEL, tag="v/1") == 409
    assert status_of(api.create_branch, MODEL, branch="runs/one") == 409
    assert status_of(api.create_tag, MODEL, tag="v/2", revision="absent") == 404
    push(api, {"b.txt": b"2"}, revision="runs/one")
    assert status_of(push, api, {"b.txt": b"3"}, revision="v/1") == 404
    refs = api.list_repo_refs(MODEL)
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v/1": first}
    assert {branch.name for branch in refs.branches} == {"main", "runs/one"}
    messages = [commit.title for commit in api.list_repo_commits(MODEL, revision="runs/one")]
    assert messages == ["a push", "initial commit"]
    api.delete_tag(MODEL, tag="v/1")
    assert status_of(api.delete_tag, MODEL, tag="v/1") == 404
    api.delete_branch(MODEL, branch="runs/one")
    assert repo.tags == {} and set(repo.branches) == {"main"}


def test_a_card_with_metadata_that_is_no_yaml_is_refused(hub, api):
    hub.add(MODEL)
    with pytest.raises(ValueError, match="Invalid metadata"):
        push(api, {"README.md": b"---\ntags: [\n---\n"})
    assert len(hub.repos[MODEL].commits) == 1


def test_part_of_a_file_can_be_asked_for(hub):
    hub.add(MODEL, FILES)
    content, path = FILES["model.safetensors"], f"/{MODEL}/resolve/main/model.safetensors"
    for wanted, part in (("3-9", content[3:10]), ("2040-", content[2040:]), ("0-9999", content)):
        status, headers, body = ask(hub, "GET", path, headers={"Range": f"bytes={wanted}"})
        first = wanted.partition("-")[0]
        assert (status, body) == (206, part)
        assert headers["Content-Range"] == f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
    status, headers, body = ask(hub, "HEAD", path)
    assert (status, body, headers["X-Linked-Size"]) == (200, b"", str(len(content)))
    assert headers["X-Linked-Etag"] == headers["ETag"] == f'"{sha256(content)}"'
    assert ask(hub, "GET", path, headers={"Range": f"bytes={len(content)}-"})[0] == 416


# --- Who may what -----------------------------------------------------------------------------------


def test_a_token_says_whose_it_is_and_what_it_allows(hub, api):
    who = api.whoami()
    assert (who["name"], who["auth"]["accessToken"]["role"]) == ("writer", "write")
    assert {org["name"]: org["roleInOrg"] for org in who["orgs"]} == {"lab": "write", "press": "read"}
    access = client(hub, "hf_one_repo").whoami()["auth"]["accessToken"]
    (scope,) = access["fineGrained"]["scoped"]
    assert (access["role"], scope["entity"]["name"], scope["entity"]["type"]) == (
        "fineGrained",
        MODEL,
        "model",
    )
    assert scope["permissions"] == ["repo.write"]
    assert status_of(client(hub, "hf_unknown").whoami) == 401
    assert ask(hub, "GET", "/api/whoami-v2")[0] == 401


@pytest.mark.parametrize(
    ("token", "repo_id", "status"),
    [
        (TOKEN, "writer/new", 200),
        (TOKEN, "lab/new", 200),
        (TOKEN, "writer/model", 409),
        (TOKEN, "press/new", 403),
        (TOKEN, "stranger/new", 403),
        ("hf_reader", "writer/new", 403),
        ("hf_one_repo", "writer/new", 403),
        ("hf_unknown", "writer/new", 401),
        (None, "writer/new", 401),
    ],
)
def test_who_may_create_a_repository(hub, token, repo_id, status):
    hub.add(MODEL)
    api = client(hub, token)
    if status == 200:
        api.create_repo(repo_id, private=True)
        assert hub.repos[repo_id].private
    else:
        assert status_of(api.create_repo, repo_id) == status
        assert set(hub.repos) == {MODEL}


@pytest.mark.parametrize(
    ("token", "read", "write"),
    [
        (TOKEN, None, None),
        ("hf_one_repo", None, None),
        ("hf_reader", None, 403),
        ("hf_read_lab", 404, 404),
        ("hf_stranger", 404, 404),
        (None, 401, 401),
        ("hf_unknown", 401, 401),
    ],
)
def test_a_private_repository_is_hidden_from_others(hub, tmp_path, token, read, write):
    repo = hub.add(MODEL, FILES, private=True)
    api = client(hub, token)
    calls = [
        (read, lambda: api.auth_check(MODEL)),
        (read, lambda: api.model_info(MODEL)),
        (read, lambda: api.hf_hub_download(MODEL, "config.json", cache_dir=tmp_path)),
        (write, lambda: ask_write(hub, token)),
        (write, lambda: api.create_tag(MODEL, tag="mine")),
        (write, lambda: push(api, {"a.safetensors": b"a"})),
    ]
    for status, call in calls:
        if status is None:
            call()
        else:
            assert status_of(call) == status
    if token in ("hf_stranger", None):
        with pytest.raises(errors.RepositoryNotFoundError):
            api.model_info(MODEL)
    assert (len(repo.commits), set(repo.tags)) == ((2, {"mine"}) if write is None else (1, set()))


def ask_write(hub, token):
    """What `auth_check(..., write=True)` asks, which not every version of the client has."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    hf_raise_for_status(get_session().get(f"{hub.url}/api/models/{MODEL}/auth-check/write", headers=headers))


def test_a_public_repository_of_others_can_be_read_and_not_written(hub):
    hub.add(MODEL, FILES)
    assert client(hub, None).model_info(MODEL).private is False
    assert status_of(client(hub, "hf_unknown").model_info, MODEL) == 401
    assert status_of(push, client(hub, "hf_stranger"), {"a.txt": b"1"}) == 403
    assert status_of(push, client(hub, None), {"a.txt": b"1"}) == 401


def test_the_log_tells_what_was_asked_and_never_the_token(hub, api):
    hub.add(MODEL, FILES)
    api.model_info(MODEL)
    client(hub, None).model_info(MODEL)
    ask(hub, "GET", "/api/agent-harnesses")
    assert hub.requests == [
        ("GET", f"/api/models/{MODEL}", 200, True),
        ("GET", f"/api/models/{MODEL}", 200, False),
        ("GET", "/api/agent-harnesses", 404, False),
    ]
    push(api)
    assert TOKEN not in repr([hub.log, hub.repos, hub.faults])


# --- Faults -----------------------------------------------------------------------------------------

CREATE = ("POST", "/api/repos/create", json.dumps({"name": "new"}), {"Authorization": f"Bearer {TOKEN}"})
CONFIG = ("GET", f"/{MODEL}/resolve/main/config.json")


@pytest.mark.parametrize(
    ("status", "seconds", "header", "value"),
    [
        (503, None, "Content-Type", "text/html"),
        (500, None, "Content-Type", "text/html"),
        (429, 7, "Retry-After", "7"),
        (403, None, "Content-Type", "application/json"),
    ],
)
def test_a_status_is_answered_so_often_and_nothing_is_done(hub, status, seconds, header, value):
    hub.fail("POST .*create$", times=2, with_=status, seconds=seconds)
    for _ in range(2):
        answer = ask(hub, *CREATE)
        assert (answer[0], answer[1][header]) == (status, value)
    assert hub.repos == {}
    assert ask(hub, *CREATE)[0] == 200
    assert [request[2] for request in hub.requests] == [status, status, 200]


def test_the_client_retries_what_it_retries(hub, api):
    hub.add(MODEL)
    hub.fail("POST .*/preupload/", with_=429)
    push(api, {"a.txt": b"1"})
    hub.wait_for("POST .*/preupload/", status=200)
    hub.fail("POST .*/commit/", with_=503)
    assert status_of(push, api, {"a.txt": b"2"}) == 503
    assert [status for _, path, status, _ in hub.requests if "preupload" in path] == [429, 200, 200]
    assert [commit.message for commit in hub.repos[MODEL].commits] == ["initial commit", "a push"]


@pytest.mark.parametrize(("kind", "done"), [("drop", False), ("drop_after", True)])
def test_a_dropped_connection_before_or_after_the_work(hub, kind, done):
    hub.fail("POST", with_=kind)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(hub, *CREATE)
    assert ("writer/new" in hub.repos) == done
    assert hub.requests == [("POST", "/api/repos/create", None, True)]


def test_a_commit_whose_answer_is_lost_is_there(hub, api):
    hub.add(MODEL)
    hub.fail("POST .*/commit/", with_="drop_after")
    with pytest.raises(Exception, match="disconnected"):
        push(api, {"a.txt": b"1"})
    assert hub.repos[MODEL].at().files == {"a.txt": b"1"}
    assert push(api, {"a.txt": b"1"}).oid == hub.repos[MODEL].at().sha
    assert len(hub.repos[MODEL].commits) == 2


def test_what_hangs_ends_when_the_server_stops_and_a_stopped_server_answers_no_more(hub):
    """A connection that is kept open is closed too."""
    idle = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=30)
    idle.request("GET", "/")
    idle.getresponse().read()
    hub.fail("POST", times=None, with_="hang")
    failures = []

    def hang():
        try:
            ask(hub, *CREATE)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=hang) for _ in range(2)]
    for thread in threads:
        thread.start()
    hub.wait_for("POST .*create", times=2)
    assert failures == []
    hub.stop()
    for thread in threads:
        thread.join(timeout=30)
    assert len(failures) == 2 and hub.repos == {}
    assert idle.sock.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        ask(hub, *CREATE)
    idle.close()

    port = hub.port
    hub.heal()
    hub.start()
    assert hub.port == port and ask(hub, *CREATE)[0] == 200


def test_a_hang_of_some_seconds_ends_without_an_answer(hub):
    hub.fail("POST", with_="hang", seconds=0.01)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(hub, *CREATE)
    assert hub.repos == {}


@pytest.mark.parametrize("kind", ["slow", "trickle"])
def test_a_slow_answer_is_the_right_one_and_a_patience_may_end_before(hub, kind):
    hub.add(MODEL, FILES)
    hub.fail("GET", with_=kind, seconds=0.05)
    assert ask(hub, *CONFIG)[2] == FILES["config.json"]
    hub.fail("GET", with_=kind, seconds=600)
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=0.05)
    with pytest.raises(TimeoutError):
        connection.request(*CONFIG)
        connection.getresponse().read()
    connection.close()


def test_a_corrupt_download_has_one_wrong_byte(hub):
    hub.add(MODEL, FILES)
    hub.fail("GET .*config.json", with_="corrupt")
    _, headers, content = ask(hub, *CONFIG)
    assert headers["ETag"] == f'"{git_oid(FILES["config.json"])}"'
    assert len(content) == len(FILES["config.json"])
    assert sum(a != b for a, b in zip(content, FILES["config.json"], strict=True)) == 1
    assert ask(hub, *CONFIG)[2] == FILES["config.json"]


@pytest.mark.parametrize(
    ("match", "kind", "status"),
    [
        ("PUT", "corrupt", 400),
        ("POST .*/verify", "wrong hash", 422),
        ("POST .*/batch", "wrong hash", None),
        ("POST .*/commit/", "wrong hash", 400),
    ],
)
def test_a_wrong_hash_stops_an_upload(hub, api, match, kind, status):
    hub.add(MODEL)
    hub.fail(match, with_=kind)
    with pytest.raises(Exception) as raised:
        push(api, {"a.safetensors": b"weights"})
    if status:
        error = raised.value
        assert getattr(error, "response", error.__cause__ and error.__cause__.response).status_code == status
    assert len(hub.repos[MODEL].commits) == 1
    push(api, {"a.safetensors": b"weights"})
    assert hub.repos[MODEL].at().files == {"a.safetensors": b"weights"}


def test_an_upload_in_chunks_is_read_whole(hub):
    content = io.BytesIO(json.dumps({"name": "new"}).encode())  # of unknown length to http.client
    assert ask(hub, "POST", CREATE[1], content, CREATE[3])[0] == 200
    assert set(hub.repos) == {"writer/new"}


# --- A process of its own ---------------------------------------------------------------------------

PUSH = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo(sys.argv[1], private=True)
api.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])
print(api.snapshot_download(sys.argv[1]))
"""


@pytest.fixture
def start(hub, tmp_path):
    """Pushes a folder and loads it again, in a process of its own."""
    folder = tmp_path / "model"
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    others = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}

    def run(token=None, **options):
        environment = others | hub.environment(tmp_path / "cache", token, **options)
        command = [sys.executable, "-c", PUSH, MODEL, str(folder)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_the_environment_is_all_that_a_process_needs(hub, start, tmp_path):
    done = start(TOKEN, disable_xet=True)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert folder.is_relative_to(tmp_path / "cache")
    assert {k: v for k, v in read_folder(folder).items() if k != ".gitattributes"} == FILES
    asked = len(hub.requests)
    assert start().returncode != 0
    assert hub.requests[asked:] == [("POST", "/api/repos/create", 401, False)]


def test_a_client_that_insists_on_xet_finds_none(hub, start):
    pytest.importorskip("hf_xet", reason="without it the client asks for no Xet")
    assert start(TOKEN).returncode != 0
    assert ("GET", f"/api/models/{MODEL}/xet-write-token/main", 404, True) in hub.requests
    assert len(hub.repos[MODEL].commits) == 1
