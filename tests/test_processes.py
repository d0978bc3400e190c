"""Two real processes on one machine train together, and one resumes what they saved."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

STEPS = 40


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def command(folder, out, *more):
    options = ["--data", folder / "x.npy", "--out", folder / out, "--activation", "topk", "--k", 4, "--latents", 64]
    options += ["--batch", 64, "--heldout", 100, "--steps", STEPS, "--save-every", 0.2, "--learning-rate", 1e-3, *more]
    # In so short a run AuxK takes latents for idle after one batch; Adam then makes steps of what rounding left.
    options += ["--no-auxk"]
    return [sys.executable, "-m", "jaxsae", "train", *map(str, options)]


def start(folder, out, mesh, processes):
    """As many processes, of two devices each."""
    port, together = free_port(), []
    for process in range(processes):
        argv = command(folder, out, "--mesh", *mesh, *(["--distributed"] if processes > 1 else []))
        together.append(subprocess.Popen(argv, env=joined(port, processes, process), stdout=-1, stderr=-1, text=True))
    return together


def joined(port, processes, process):
    """The environment of one of several processes, of two devices each."""
    found = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": processes, "JAX_PROCESS_ID": process}
    found |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return {**os.environ, **{name: str(value) for name, value in found.items()}}


def finish(together):
    try:
        said = [process.communicate(timeout=120) for process in together]
    finally:
        for process in together:
            process.kill()  # if it waits for another that failed
    assert [process.returncode for process in together] == [0] * len(together), said
    return said


def weights(folder, out):
    import safetensors.numpy

    return safetensors.numpy.load_file(folder / out / "sae/sae.safetensors")


@pytest.mark.parametrize("mesh", [(1, 4), (2, 2)])
def test_two_processes_train_like_one(mesh, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((900, 16)).astype(np.float32))
    finish(start(tmp_path, "one", (1, 1), 1))
    said = finish(start(tmp_path, "two", mesh, 2))
    assert "held-out rows" in said[0][0]
    assert not [line for line in "".join(said[1]).splitlines() if "[Gloo]" not in line]  # one process speaks
    a, b = weights(tmp_path, "one"), weights(tmp_path, "two")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)
    # Both are asked to stop: they save together, and resume together to the same end, bitwise.
    together = start(tmp_path, "stopped", mesh, 2)
    while not list((tmp_path / "stopped").glob("checkpoints/[1-9]*[0-9]")) and together[0].poll() is None:
        pass
    for process in together:
        process.send_signal(signal.SIGTERM)
    finish(together)
    finish(start(tmp_path, "stopped", mesh, 2))
    for name, value in weights(tmp_path, "stopped").items():
        np.testing.assert_array_equal(value, b[name])
    reports = [json.loads((tmp_path / out / "report.json").read_text()) for out in ("two", "stopped")]
    assert reports[0] == reports[1]


def test_processes_that_were_told_different_things_all_end_with_their_names(tmp_path):
    rows = np.random.default_rng(0).standard_normal((900, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "y.npy", rows + 1)
    for more, names in {("--seed", "1"): "seed", ("--data", tmp_path / "y.npy"): "values of the data"}.items():
        port, together = free_port(), []
        for process in range(2):
            argv = command(tmp_path, "run", "--mesh", 1, 4, "--distributed", *(more if process else ()))
            env = joined(port, 2, process)
            together.append(subprocess.Popen(argv, env=env, stdout=-1, stderr=-1, text=True))
        said = [process.communicate(timeout=120)[1] for process in together]
        assert [process.returncode for process in together] == [2, 2], said
        for each in said:
            (line,) = [line for line in each.splitlines() if line.startswith("jaxsae: ")]
            assert line.startswith(f"jaxsae: the processes disagree about {names}")
    assert not (tmp_path / "run/sae").exists()


def test_two_processes_measure_refine_and_convert_like_one(tmp_path):
    mesh = (2, 2)
    x = np.random.default_rng(0).standard_normal((900, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    x[7, 3] = np.nan
    np.save(tmp_path / "bad.npy", x)
    finish(start(tmp_path, "run", mesh, 2))
    sae, rows = ["--sae", tmp_path / "run"], ["--data", tmp_path / "bad.npy"]
    commands = {
        "eval": [*sae, *rows, "--json"],
        "refine": [*sae, *rows, "--out", "{}.npz", "--json"],
        "features": [tmp_path / "run", *rows, "--by", "density", "--count", 5, "--out", "{}"],
        "convert": [tmp_path / "run", "{}.pt", "--to", "dictionary_learning"],
        "convert a save": [tmp_path / f"run/checkpoints/{STEPS}", "{}", "--to", "saelens"],
    }
    for name, options in commands.items():
        said = {}
        for out, count in {"one": 1, "two": 2}.items():
            more = ["--mesh", *mesh, "--distributed"] if count > 1 else []
            argv = [name.split()[0], *options, *more]
            argv = [str(word).format(tmp_path / f"{name}-{out}") for word in argv]
            port, command = free_port(), [sys.executable, "-m", "jaxsae", *argv]
            each = [joined(port, count, number) for number in range(count)]
            together = [subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True) for env in each]
            said[out] = finish(together)
        assert said["two"][1][0] == ""  # one process speaks
        if name == "eval":
            one, two = (json.loads(said[out][0][0]) for out in said)
            assert two["nonfinite"] == 1
            np.testing.assert_allclose([two[key] for key in ("nmse", "l0")], [one[key] for key in ("nmse", "l0")], 1e-5)
    with np.load(tmp_path / "refine-one.npz") as one, np.load(tmp_path / "refine-two.npz") as two:
        np.testing.assert_array_equal(two["status"], one["status"])
        np.testing.assert_allclose(two["values"], one["values"], rtol=1e-3, atol=1e-5)
    one, two = (json.loads((tmp_path / f"features-{out}/features.json").read_text()) for out in ("one", "two"))
    for a, b in zip(one["latents"], two["latents"], strict=True):
        assert (a["index"], a["count"]) == (b["index"], b["count"])
        assert [each["row"] for each in a["top"]] == [each["row"] for each in b["top"]]
        np.testing.assert_allclose(a["shrinkage"], b["shrinkage"], rtol=1e-3)
    for file in ("ae.pt", "config.json"):
        assert (tmp_path / "convert-one.pt" / file).read_bytes() == (tmp_path / "convert-two.pt" / file).read_bytes()
    one, two = (tmp_path / f"convert a save-{out}" for out in ("one", "two"))
    assert (one / "cfg.json").read_bytes() == (two / "cfg.json").read_bytes()
    assert (one / "sae_weights.safetensors").stat().st_size == (two / "sae_weights.safetensors").stat().st_size


# Saves two steps together; then each restores from a place of its own, in which one of the two may be damaged.
RESTORE = """
import shutil, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxsae.train.checkpoint import Checkpoints
process, folder = int(sys.argv[1]), Path(sys.argv[2])
jax.distributed.initialize(sys.argv[3], 2, process)
mesh = Mesh(np.array(jax.devices()), ("latent",))
over = [NamedSharding(mesh, spec) for spec in (PartitionSpec("latent"), PartitionSpec())]
spread, same = (jax.jit(lambda: jnp.arange(32.0).reshape(16, 2), out_shardings=sharding) for sharding in over)
like = {"x": spread(), "n": same()}
with Checkpoints(folder / "common", config=None) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, {"x": step * spread(), "n": same()}, progress=step, wait=True)
for number, damaged in enumerate(({}, {0: "manifest"}, {1: "state"}, {1: "."}, {0: "state", 1: "manifest"})):
    mine = folder / f"{number}-{process}"
    shutil.copytree(folder / "common", mine, ignore=shutil.ignore_patterns(".lock"))  # which its owner may be removing
    if process in damaged:
        shutil.rmtree(mine / "2" / damaged[process])
    saved = Checkpoints(mine, config=None).restore(like)
    local = [np.asarray(each.data).sum() for each in saved.state["x"].addressable_shards]
    print("restored", number, saved.step, saved.progress, sum(local), flush=True)
"""


def test_processes_restore_the_same_step_though_one_cannot_read_the_last(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    commands = [[sys.executable, "-c", RESTORE, str(process), str(tmp_path), address] for process in range(2)]
    said = finish([subprocess.Popen(each, env=environment, stdout=-1, stderr=-1, text=True) for each in commands])
    halves = [np.arange(16.0).sum(), np.arange(16.0, 32.0).sum()]
    for half, (out, _) in zip(halves, said, strict=True):
        found = [line.split()[2:] for line in out.splitlines() if line.startswith("restored")]
        assert found == [[str(step), str(step), str(step * half)] for step in (2, 1, 1, 1, 1)]


def test_of_two_jobs_of_two_processes_one_owns_the_directory(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((900, 16)).astype(np.float32))
    from jaxsae._core.files import owned

    with owned(tmp_path / "run/checkpoints"):
        together = start(tmp_path, "run", (1, 4), 2)
        said = [process.communicate(timeout=120) for process in together]
    assert [process.returncode for process in together] == [2, 2], said
    assert "another process writes there" in said[0][1]
    assert "process 0 failed, and with it all of them" in said[1][1]
    assert not any("Traceback" in err for _, err in said)


# Harvests what is left of a folder, and prints how many contexts this process computed itself.
HARVEST = """
import os, sys
import numpy as np
import jax
out, stop = sys.argv[1], int(sys.argv[2])
if os.environ["JAX_NUM_PROCESSES"] != "1":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    count, number = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    jax.distributed.initialize(num_processes=count, process_id=number)
from jaxsae.data import shards
from jaxsae.language_model import harvest, tiny
computed, step = [0], harvest._step
harvest._MAX_STEPS = int(sys.argv[3])
def count(model, some, *more):
    computed[0] += len(some)
    return step(model, some, *more)
harvest._step = count
append, left = shards.Writer.append, [stop]
def until(self, *rows, **columns):
    if not left[0]:
        raise SystemExit(0)
    left[0] -= 1
    append(self, *rows, **columns)
shards.Writer.append = until
contexts = np.random.default_rng(0).integers(0, 16, (26, 6), dtype=np.int32)
try:
    [rows] = harvest.run(out, tiny(), contexts, points=[(1, "resid_post")], source={}, batch=4, dtype="float32")
finally:
    print("computed", computed[0])
"""


def harvest(folder, processes, stop=-1, steps=1):
    port = free_port()
    command = [sys.executable, "-c", HARVEST, str(folder), str(stop), str(steps)]
    each = [joined(port, processes, number) for number in range(processes)]
    said = finish([subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True) for env in each])
    return [int(out.rpartition("computed ")[2]) for out, _ in said]


def test_each_of_two_processes_harvests_its_half(tmp_path):
    from jaxsae import data
    from jaxsae.data import shards

    assert harvest(tmp_path / "one", 1) == [26]
    assert harvest(tmp_path / "two", 2) == [14, 12]  # 4 and 4, thrice, then the last 2
    assert harvest(tmp_path / "large", 2, steps=100) == [16, 10]  # a shard each, of whole steps
    assert harvest(tmp_path / "begun", 2, stop=2)  # two shards each; then two are done by one, and two by two
    assert shards.read(tmp_path / "begun").rows == 16 * 5
    assert harvest(tmp_path / "begun", 1, stop=1)[0] >= 4
    assert harvest(tmp_path / "begun", 2) == [4, 2]
    expected = data.open_rows(tmp_path / "one")
    assert expected.shape == (26 * 5, 8)
    for folder in ("two", "large", "begun"):
        assert shards.read(tmp_path / folder).complete
        np.testing.assert_allclose(np.asarray(data.open_rows(tmp_path / folder)), np.asarray(expected), 1e-5, 1e-6)
        found, tokens = (shards.column(tmp_path / name, "tokens") for name in (folder, "one"))
        np.testing.assert_array_equal(found, tokens)
        shards.verify(tmp_path / folder)


# Trains on a language model, and prints how many contexts this process' devices computed.
LIVE = """
import sys
from jaxsae.app import cli
from jaxsae.language_model import harvest
computed, after_first = [0], harvest._after_first
harvest._COPIED = int(sys.argv[1])
def count(model, ids, points):
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(model)) == (harvest._COPIED > 0)
    computed[0] += sum(shard.data.shape[0] for shard in ids.addressable_shards)
    return after_first(model, ids, points)
import jax
harvest._after_first = count
code = cli.main(sys.argv[2:])
print("computed", computed[0])
sys.exit(code)
"""


@pytest.mark.parametrize("mesh, copied", [((1, 4), 1 << 30), ((2, 2), 1 << 30), ((2, 2), 0)])
def test_each_of_two_processes_computes_half_of_a_live_harvest(mesh, copied, tmp_path):
    (tmp_path / "text.txt").write_text("".join(map(chr, range(32, 127))) * 60)
    model = Path(__file__).parent / "language_models" / "llama"
    options = ["--model", model, "--layer", 1, "--site", "mlp_out", "--text", tmp_path / "text.txt", "--context", 17]
    options += ["--window", 640, "--activation", "topk", "--k", 4, "--latents", 64, "--batch", 64, "--heldout", 64]
    options += ["--steps", 100, "--learning-rate", 1e-3, "--no-auxk", "--mesh", *mesh]
    computed = {}
    for out, count in {"one": 1, "two": 2}.items():
        more = ["--out", tmp_path / out, *(["--distributed"] if count > 1 else [])]
        command = [sys.executable, "-c", LIVE, str(copied), "train", *map(str, [*options, *more])]
        port = free_port()
        environments = [joined(port, count, number) for number in range(count)]
        if count == 1:
            environments[0]["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        said = finish([subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True) for env in environments])
        computed[out] = [int(output.rpartition("computed ")[2]) for output, _ in said]
    assert computed["two"][0] == computed["two"][1]
    assert sum(computed["two"]) <= computed["one"][0]  # which reads ahead
    a, b = weights(tmp_path, "one"), weights(tmp_path, "two")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)
