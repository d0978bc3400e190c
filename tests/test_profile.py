"""What a run says of its speed: traces of its steps, the names in them, and the share of the peak that it reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import cli, refused, rows

from jaxsae import sharding, train
from jaxsae.app import chips, monitor, runs
from jaxsae.app.options import Options
from jaxsae.app.units import Units

D, M, B = 16, 64, 32
OPTIONS = Options("topk", M, k=4, batch=B, steps=20, heldout=32, idle_after=64)
SCOPES = ("/encode/", "/top_k/", "/decode/", "/auxk/", "/optimiser/", "transpose(jvp(jit(_encode)))")


def run(out, **more):
    return runs.run(out, data={"x": rows(256, D)}, options=OPTIONS, **more)


def traces(out):
    return list((out / "profile").rglob("*.xplane.pb"))


def test_a_trace_opens_and_names_the_parts_of_a_step(tmp_path):
    run(tmp_path, profile=(3, 6))
    (path,) = traces(tmp_path)
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes}
    lines = [[event.name for event in line.events] for plane in planes.values() for line in plane.lines]
    steps = [sum("PjitFunction(_update)" in name for name in line) for line in lines]
    assert max(steps) in (3, 6)  # steps 3, 4 and 5, each of which Python and C++ may report
    content = path.read_bytes()  # the names are in the programs, which the trace contains
    assert [scope for scope in SCOPES if scope.encode() not in content] == []


def test_the_refit_is_named_too():
    import jaxsae

    model = jaxsae.init(jax.random.key(0), d=D, m=M, activation=jaxsae.TopK(4))
    text = jax.jit(jaxsae.refine).lower(model, jnp.ones((8, D))).as_text(debug_info=True)
    assert "/refit/" in text


def test_a_trace_of_a_run_that_failed_is_not_left(tmp_path, monkeypatch):
    def measure(*of):
        raise ZeroDivisionError

    monkeypatch.setattr(monitor.Monitor, "measure", measure)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, profile=(3, 6), eval_every=5)
    assert not (tmp_path / "profile").exists()
    monkeypatch.undo()
    run(tmp_path, profile=(3, 20))
    assert len(traces(tmp_path)) == 1


def test_steps_that_were_taken_before_are_not_traced_and_this_is_said(tmp_path):
    said = []
    run(tmp_path)
    run(tmp_path, profile=(3, 6), warn=said.append)
    assert said[-1:] == ["step 3 was taken before, and is not traced."]
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", [(3, 21), (6, 6), (7, 3)])
def test_steps_that_there_are_not_are_refused(steps, tmp_path):
    refused("got profile .* for 20 steps; pass START:STOP", run, tmp_path / "run", profile=steps)
    assert not (tmp_path / "run").exists()


def test_the_command_takes_steps(tmp_path, capsys):
    np.save(tmp_path / "x.npy", rows(256, D))
    few = ["train", "--data", tmp_path / "x.npy", "--activation", "topk", "--k", 4, "--latents", M, "--batch", B]
    few += ["--steps", 10, "--heldout", 32, "--out", tmp_path / "run"]
    assert cli(*few, "--profile", "9") == 2
    assert "got --profile '9'; pass START:STOP, two numbers of steps." in capsys.readouterr().err
    assert cli(*few, "--profile", "2:4") == 0
    assert len(traces(tmp_path / "run")) == 1


# --- MFU


def logged(tmp_path, mesh=None):
    """The numbers of the last step, and the FLOPs of each."""
    found = {}

    class Log:
        def __enter__(self):
            return lambda step, numbers: found.update(numbers)

        def __exit__(self, *error):
            pass

    objective, tx, init_fn = runs.recipe(OPTIONS, Units(jnp.zeros(D)))
    if mesh is None:
        run(tmp_path, log=Log())
        return found, monitor.flops_of(train.make_step(objective, tx), init_fn, B, D)
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        run(tmp_path, log=Log())
        return found, monitor.flops_of(train.make_step(objective, tx), init_fn, B, D)


def test_the_share_of_the_peak_is_left_out_where_it_is_not_known(tmp_path):
    found, _ = logged(tmp_path)
    assert "mfu" not in found
    assert found["rows"] == 20 * B


@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_the_share_of_the_peak_follows_from_flops_and_seconds(mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(chips, "peak_flops", lambda device: 1e9)
    found, flops = logged(tmp_path, mesh)
    devices = 1 if mesh is None else 8
    assert found["mfu"] == pytest.approx(flops / (found["step_seconds"] * 1e9 * devices), rel=1e-6)


def test_flops_are_those_of_the_whole_batch_however_it_is_split():
    d, m, batch = 128, 4096, 256
    objective, tx, init_fn = runs.recipe(OPTIONS._replace(auxk=False, latents=m), Units(jnp.zeros(d)))
    step, found = train.make_step(objective, tx), [monitor.flops_of(train.make_step(objective, tx), init_fn, batch, d)]
    for mesh in ((2, 1), (1, 4)):
        with jax.set_mesh(sharding.make_mesh(*mesh)):
            found.append(monitor.flops_of(step, init_fn, batch, d))
    assert found[1:] == pytest.approx([found[0]] * 2, rel=0.05)
    assert found[0] > 2 * batch * d * m


def test_known_chips_are_told_apart():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    known = {kind: chips.peak_flops(Device(kind)) for kind in ("TPU v5", "TPU v5 lite", "NVIDIA H200", "cpu", "TPU v9")}
    assert known == {"TPU v5": 459e12, "TPU v5 lite": 197e12, "NVIDIA H200": 989e12, "cpu": None, "TPU v9": None}
    assert chips.peak_flops(Device("NVIDIA A100-SXM4-80GB")) == 312e12
