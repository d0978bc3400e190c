"""The hub's client against a stand-in of its endpoints on loopback."""

import contextlib
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
from foreign import D, M, arrays, write
from problems import assert_same_bits, refused, sae

from jaxsae import pretrained
from jaxsae._core.files import InputError
from jaxsae.app.cli import main
from jaxsae.autoencoder import normalisation
from jaxsae.formats import hub

constants = pytest.importorskip("huggingface_hub.constants")
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
    server.root, server.asked = root, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
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
