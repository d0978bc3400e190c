"""The hub's client against a stand-in of its endpoints on loopback."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import shutil
import sys
import threading
import urllib.parse

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # before the client is imported, which reads it once
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import numpy as np
import pytest
import yaml
from foreign import D, M, arrays, write
from problems import activations, assert_same_bits, cli, refused, sae

import jaxsae
from jaxsae import pretrained
from jaxsae._core.files import InputError
from jaxsae.app.cli import main
from jaxsae.autoencoder import normalisation
from jaxsae.data.origin import Origin
from jaxsae.formats import hub

constants = pytest.importorskip("huggingface_hub.constants")
TOKEN = "hf_of_a_test"
MAIN, OLD = "a" * 40, "b" * 40
REVISIONS = {"main": MAIN, MAIN: MAIN, "v1": OLD, OLD: OLD}


class Hub(http.server.BaseHTTPRequestHandler):
    """Lists folders, and serves files, of `root/COMMIT/organisation/repository`."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        if is_api and len(parts) == 2:  # what is asked for where a repository cannot be created
            return self.refuse("RepoNotFound")
        repository, verb, revision, inner = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
        if revision not in REVISIONS:
            return self.refuse("RevisionNotFound")
        commit = REVISIONS[revision]
        folder = self.server.root / commit / repository
        if not folder.is_dir():
            return self.refuse("RepoNotFound")
        target = folder / inner
        if not target.exists() or (is_api and target.is_file()):
            return self.refuse("EntryNotFound")
        if is_api:
            return self.send(json.dumps(self.listing(folder, target, verb)).encode(), commit)
        return self.send(target.read_bytes(), commit)

    def do_POST(self):
        """Repositories are created, and files announced and committed, by whoever has the token."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.command, self.path))
        path = self.path.partition("?")[0].strip("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.fail(401, "Invalid username or password.")
        if path in self.server.broken:
            return self.fail(*self.server.broken[path])
        if path == "api/repos/create":
            asked = json.loads(body)
            if asked["organization"] != "org":
                return self.fail(
                    403, f'You don\'t have the rights to create a model under the namespace "{asked["organization"]}".'
                )
            self.server.created.append(asked)
            return self.reply({"url": f"{self.server.url}/org/{asked['name']}"})
        if path == "api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [each["path"] for each in json.loads(body)["files"]]
            kinds = {name: "regular" if name.endswith((".json", ".md")) else "lfs" for name in files}
            return self.reply({"files": [{"path": n, "uploadMode": kinds[n], "shouldIgnore": False} for n in files]})
        if path.endswith(".git/info/lfs/objects/batch"):
            href = f"{self.server.url}/upload/"
            objects = [
                {"oid": each["oid"], "size": each["size"], "actions": {"upload": {"href": href + each["oid"]}}}
                for each in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        return self.commit(path, [json.loads(line) for line in body.splitlines()])

    def commit(self, path, operations):
        api, models, organisation, repository, commit, branch = path.split("/")
        assert (api, models, commit, branch) == ("api", "models", "commit", "main")
        self.server.commits.append(operations[0]["value"])
        for each in operations[1:]:
            value, is_large = each["value"], each["key"] == "lfsFile"
            content = self.server.uploaded[value["oid"]] if is_large else base64.b64decode(value["content"])
            target = self.server.root / MAIN / organisation / repository / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        self.reply({"commitUrl": f"{self.server.url}/org/new/commit/{MAIN}", "commitOid": MAIN, "success": True})

    def do_PUT(self):
        content, oid = self.rfile.read(int(self.headers["Content-Length"])), self.path.rpartition("/")[2]
        if "upload" in self.server.broken:
            return self.fail(*self.server.broken["upload"])
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.uploaded[oid] = content
        self.reply({})

    def reply(self, content):
        content = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def fail(self, status, message):
        self.send_response(status)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def listing(self, folder, target, verb):
        if verb == "revision":
            return {"id": "x", "sha": REVISIONS["main"], "siblings": []}
        return [
            {"type": "directory" if path.is_dir() else "file", "path": str(path.relative_to(folder))}
            | {"oid": "c" * 40, "size": path.stat().st_size}
            for path in sorted(target.iterdir())
        ]

    def send(self, content, commit):
        self.send_response(200)
        for name, value in {
            "X-Repo-Commit": commit,
            "ETag": f'"{abs(hash(content)):040x}"',
            "Content-Length": len(content),
            "Content-Type": "application/octet-stream" if content[:1] != b"[" else "application/json",
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, code):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"{code} here")
        self.send_header("Content-Length", "0")
        self.end_headers()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with two repositories and an older revision; `root`, and what it was `asked`."""
    root = tmp_path / "root"
    pretrained.save(sae(), root / MAIN / "org" / "repo" / "layer.3" / "ours")
    pretrained.save(sae(1), root / OLD / "org" / "repo" / "layer.3" / "ours")
    pretrained.save(sae(), root / MAIN / "org" / "repo" / "lens", format="saelens")
    (root / MAIN / "org" / "repo" / "lens" / "optimizer.bin").write_bytes(b"large")
    (root / MAIN / "org" / "repo" / "README.md").write_text("hello")
    w = arrays()
    flat = root / MAIN / "org" / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    flat.mkdir(parents=True)
    threshold = np.ones(M, np.float32)
    np.savez(flat / "params.npz", **{n: w[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")}, threshold=threshold)
    server = Server(("127.0.0.1", 0), Hub)
    server.root, server.asked, server.created, server.commits, server.uploaded = root, [], [], [], {}
    server.url, server.broken = f"http://127.0.0.1:{server.server_address[1]}", {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose servers are elsewhere
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    with contextlib.suppress(OSError):
        server.shutdown()
    server.server_close()


def test_an_sae_by_its_address(served):
    assert_same_bits(pretrained.load("hf://org/repo/layer.3/ours"), sae())
    assert_same_bits(pretrained.load("hf://org/repo/lens"), sae())
    files = [path for command, path in served.asked if command == "GET" and "/resolve/" in path]
    assert all("optimizer" not in path and "README" not in path for path in files), "no more than is needed"


def test_a_file_by_its_address_has_its_configuration_beside_it(served):
    assert_same_bits(pretrained.load("hf://org/repo/lens/sae_weights.safetensors"), sae())


def test_a_revision(served):
    assert_same_bits(pretrained.load("hf://org/repo/layer.3/ours", revision="v1"), sae(1))
    with pytest.raises(InputError, match="not on the hub at revision v9"):
        pretrained.load("hf://org/repo/layer.3/ours", revision="v9")


def test_the_layout_of_gemma_scope_is_known_there(served):
    path = "hf://org/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    assert pretrained.describe(path)["format"] == "gemma_scope_embedding"


def test_what_is_cached_is_not_fetched_again_and_serves_without_the_hub(served, monkeypatch):
    pretrained.load("hf://org/repo/lens")
    served.asked.clear()
    pretrained.load("hf://org/repo/lens")
    assert not [path for command, path in served.asked if command == "GET" and "/resolve/" in path]
    served.shutdown()
    served.server_close()
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's tries
    assert_same_bits(pretrained.load("hf://org/repo/lens"), sae())
    with pytest.raises(InputError, match="the hub cannot be reached"):
        pretrained.load("hf://org/repo/layer.3/ours")


@pytest.mark.parametrize(
    "address, message",
    [
        ("hf://org/repo/nowhere", "not on the hub"),
        ("hf://org/nothing", "not on the hub"),
        ("hf://org/repo", r"has no weights, but layer\.3, lens"),
        ("hf://org/repo/README.md", "not on the hub"),
        ("hf://org", "expected hf://organisation/repository/path"),
        ("hf://org/repo/../../secret", "expected hf://organisation/repository/path"),
        ("hf://or g/re po/x", "fix the address"),
    ],
)
def test_what_is_not_there_is_one_sentence(address, message, served):
    refused(message, pretrained.load, address)


def test_the_command_line_takes_addresses(served, tmp_path, capsys):
    assert main(["info", "hf://org/repo/lens"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "format        saelens"
    assert main(["convert", "hf://org/repo/lens", str(tmp_path / "out"), "--to", "sparsify"]) == 0
    assert_same_bits(pretrained.load(tmp_path / "out"), sae())
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32))
    assert main(["eval", "--sae", "hf://org/repo/lens", "--data", str(tmp_path / "x.npy")]) == 0
    assert main(["info", "hf://org/repo/nowhere"]) == 2


# --- publishing

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's use of its own client


@pytest.fixture
def logged_in(served, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's tries
    return served


MEASURED = {"nmse": 0.25, "explained_variance": 0.75, "l0": 4.0, "dead": None, "rows": 40, "more": [1]}


@pytest.mark.parametrize("to", ["jaxsae", "saelens", "sparsify"])
@pytest.mark.parametrize("folder", ["", "/layer_8/k_4"])
def test_what_is_published_is_read_back(folder, to, logged_in, tmp_path, capsys):
    origin = Origin("gpt2", 8, "mlp_out", 64, "/home/someone/private.txt")
    pretrained.save(sae(), tmp_path / "sae", origin=origin)
    (tmp_path / "measured.json").write_text(json.dumps(MEASURED))
    address = f"hf://org/new{folder}"
    how = ("--to", to, "--eval", tmp_path / "measured.json", "--json")
    assert cli("push", tmp_path / "sae", address, *how) == 0
    assert json.loads(capsys.readouterr().out) == {
        "out": address,
        "format": to,
        "commit": f"{logged_in.url}/org/new/commit/{MAIN}",
    }
    assert_same_bits(pretrained.load(address).W_dec, sae().W_dec)
    assert pretrained.describe(address)["format"] == to
    assert len(logged_in.commits) == 1, "all or nothing"
    assert [each["name"] for each in logged_in.created] == ["new"]
    card = (logged_in.root / MAIN / f"org/new{folder}" / "README.md").read_text()
    for line in ("library_name: jaxsae", "| model | gpt2 |", "| layer | 8 |", "| site | mlp_out |", "| context | 64 |"):
        assert line in card.splitlines()
    assert (
        "| explained variance | 0.7500 |" in card and "| dead latents | – |" in card and "On 40 held-out rows" in card
    )
    assert f"jaxsae.pretrained.load('{address}')" in card and "private.txt" not in card
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "jaxsae", "tags": ["sparse-autoencoder", "mechanistic-interpretability"]}


def test_a_run_has_its_numbers_in_its_report(logged_in, tmp_path):
    pretrained.save(sae(activation=jaxsae.ReLU()), tmp_path / "run" / "sae")
    (tmp_path / "run" / "report.json").write_text(json.dumps({"heldout": MEASURED}))
    assert cli("push", tmp_path / "run", "hf://org/new", "--private") == 0
    card = (logged_in.root / MAIN / "org/new/README.md").read_text()
    assert "| L0 | 4.0000 |" in card and "capacity=jaxsae.stream.max_l0(sae, x)" in card
    assert logged_in.created[0]["visibility"] == "private"
    code = card.split("```python")[1].split("```")[0]
    names = {"x": activations(batch=(5,))}
    exec(code, names)
    assert names["code"].values.shape[0] == 5


BROKEN = {
    "the name is taken by others": ("hf://others/new", {}, r"refuses \(403: You don't have the rights"),
    "the token has expired": ("hf://org/new", {"api/repos/create": (401, "Invalid")}, r"refuses \(401: Invalid\)"),
    "a file is not taken": (
        "hf://org/new",
        {"upload": (500, "down")},
        r"cannot be reached \(500: .*\), and nothing is published",
    ),
    "nor the commit": (
        "hf://org/new",
        {"api/models/org/new/commit/main": (503, "down")},
        r"cannot be reached \(503: .*\), and nothing",
    ),
    "no name": ("hf://org/a--b..c", {}, "fix the address"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_published_is_one_line_and_leaves_nothing(case, logged_in, tmp_path):
    address, logged_in.broken, message = BROKEN[case]
    pretrained.save(sae(), tmp_path / "sae")
    before = sorted(logged_in.root.rglob("*"))
    refused(message, hub.push, tmp_path / "sae", address, message="An SAE")
    assert cli("push", tmp_path / "sae", address) == 2
    assert sorted(logged_in.root.rglob("*")) == before
    assert not logged_in.commits


def test_a_hub_that_is_away_and_nobody_logged_in(served, tmp_path, monkeypatch, capsys):
    pretrained.save(sae(), tmp_path / "sae")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused("nobody is logged in, who may write there; run: hf auth login", hub.require_token, "hf://org/new")
    assert cli("push", tmp_path / "sae", "hf://org/new") == 2
    assert not served.asked
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    monkeypatch.setattr("time.sleep", lambda _: None)
    served.shutdown()
    served.server_close()
    refused(
        "the hub cannot be reached .* nothing is published; try again",
        hub.push,
        tmp_path / "sae",
        "hf://org/new",
        message="x",
    )
    (tmp_path / "measured.json").write_text('{"nmse": 1}')
    assert cli("push", tmp_path / "sae", "hf://org/new", "--eval", tmp_path / "measured.json") == 2
    assert "not what jaxsae eval --json prints" in capsys.readouterr().err
    assert cli("push", tmp_path / "sae", "org/new") == 2
    assert "pass hf://organisation/repository" in capsys.readouterr().err


# --- releases and ids of SAELens


RELEASES = """
some-release:
  repo_id: org/repo
  model: gpt2-small
  saes:
  - id: blocks.3.hook_resid_pre
    path: lens
    norm_scaling_factor: 2.0
  - id: blocks.4.hook_resid_pre
    path: elsewhere
another:
  repo_id: org/repo
  config_overrides: {normalize_activations: constant_norm_rescale}
  saes:
  - {id: x, path: lens}
"""


@pytest.fixture
def releases(tmp_path, monkeypatch):
    """The list that sae-lens ships, where its package would be: not imported."""
    package = tmp_path / "packages" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it needs torch')")
    (package / "pretrained_saes.yaml").write_text(RELEASES)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)


def test_a_release_and_id_lead_to_the_repository(served, releases):
    found = hub.find("some-release/blocks.3.hook_resid_pre")
    assert (found.path.name, found.scale, found.config) == ("lens", 2.0, {})
    assert_same_bits(pretrained.load("some-release/blocks.3.hook_resid_pre"), sae())
    with pytest.raises(InputError, match=r"some-release has no 'x', but 2 others, such as blocks\.3\.hook_resid_pre"):
        pretrained.load("some-release/x")
    with pytest.raises(InputError, match="no such file or directory"):
        pretrained.load("unknown-release/x")


def test_what_the_list_knows_of_a_release_is_used(served, releases):
    config = {"d_in": D, "d_sae": M, "normalize_activations": "expected_average_only_in"}
    folder = served.root / MAIN / "org" / "repo" / "lens"
    shutil.rmtree(folder)
    write(folder, "sae_weights.safetensors", {n: a for n, a in arrays().items() if n != "W_skip"}, config)
    model = pretrained.load("some-release/blocks.3.hook_resid_pre")
    assert model.normalisation is None
    assert_same_bits(model.W_enc, 2 * arrays()["W_enc"])  # the factor is folded in
    assert isinstance(pretrained.load("another/x").normalisation, normalisation.ConstantNorm)


def test_a_local_path_comes_first_and_has_no_revision(releases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrained.save(sae(), tmp_path / "some-release" / "blocks.3.hook_resid_pre")
    assert_same_bits(pretrained.load("some-release/blocks.3.hook_resid_pre"), sae())
    with pytest.raises(InputError, match=r"got revision 'v1' for .*, which is not on the hub"):
        pretrained.load("some-release/blocks.3.hook_resid_pre", revision="v1")


def test_the_extra_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"the hub needs the extra 'hub'; pip install 'jaxsae\[hub\]'"):
        pretrained.load("hf://org/repo/lens")
