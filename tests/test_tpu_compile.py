"""The real training step and refit compile for TPU slices, fit into their chips, and gather nothing large."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from problems import cli

import jaxsae
from jaxsae import codes, kernels
from jaxsae.app import chips, plan
from jaxsae.app.options import Options

pytestmark = pytest.mark.tpu

GIB = 1 << 30
CASES = {
    "v5e:4x4": (1 << 20, 4096, 128, 8192, 16),
    "v5e:16x16": (1 << 23, 4096, 128, 16384, 256),
    "v5e:1x1": (1 << 16, 2304, 64, 1024, 1),
}


@functools.cache
def compiled(program, topology, auxk=True):
    latents, d, k, batch, _ = CASES[topology]
    options = Options("topk", latents, k, batch=batch, auxk=auxk)
    return getattr(plan, program)(options, d, plan.topology_mesh(topology))


@pytest.mark.parametrize("program", ["training_step", "refit_step"])
@pytest.mark.parametrize("topology", CASES)
def test_it_fits_and_gathers_nothing_large(topology, program):
    latents, d, _, batch, chips = CASES[topology]
    found = compiled(program, topology)
    assert found.memory < 16 * GIB
    if program == "training_step":
        # Parameters, two moments and the batch: 6 arrays of the atoms' size, split over the chips.
        assert found.arguments >= 6 * 4 * latents * d // chips
    gathered = [size for kind, size in found.collectives if kind == "all-gather"]
    assert max(gathered, default=0) < min(4 * latents * d, 4 * batch * latents) // 16
    assert (chips == 1) == (not found.collectives)


# The most GB that a chip may read and write, by XLA's count; sorts and copies of whole arrays would show.
@pytest.mark.parametrize(
    ("program", "auxk", "most"),
    [("encode_step", False, 7), ("refit_step", True, 31), ("training_step", False, 80), ("training_step", True, 125)],
)
def test_a_chip_moves_few_bytes(program, auxk, most):
    assert compiled(program, "v5e:4x4", auxk).bytes < most * 1e9


def test_many_chips_keep_enough_candidates_each():
    mesh = plan.topology_mesh("v5e:8x8")
    x = jax.ShapeDtypeStruct((64, 1 << 20), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "latent")))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda x: codes.top_k(x, 2048, approximate=True)).lower(x)
        assert [found.shape for found in jax.tree.leaves(program.out_info)] == [(64, 2048)] * 2
        program.compile()  # which a chip with fewer candidates than 2,048 refuses


def test_a_kernel_compiles_for_a_tpu_from_a_process_without_one():
    whole = NamedSharding(plan.topology_mesh("v5e:1x1"), PartitionSpec())
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=whole)
    indices = jax.ShapeDtypeStruct((64, 32), jnp.int32, sharding=whole)
    refit = jax.jit(functools.partial(kernels.refit_fused, implementation="pallas"))
    text = refit.lower(f32((4096, 256)), indices, f32((64, 256)), f32((64, 32))).compile().as_text()
    assert "tpu_custom_call" in text


def test_rows_with_few_atoms_in_many_slots_are_solved_in_fewer():
    mesh = plan.topology_mesh("v5e:1x1")
    whole = NamedSharding(mesh, PartitionSpec())
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=whole)
    indices = jax.ShapeDtypeStruct((256, 512), jnp.int32, sharding=whole)
    code = jaxsae.SparseCode(values=f32((256, 512)), indices=indices, num_latents=4096)
    with jax.set_mesh(mesh):
        text = jax.jit(jaxsae.refit).lower(f32((4096, 1024)), f32((256, 1024)), code).compile().as_text()
    assert all(re.search(rf"f32\[\d+,{width},{width}\]", text) for width in (128, 256, 512))


def command(capsys, *options, of=("--d", 64)):
    return cli("plan", *of, "--k", 4, "--batch", 64, *options), *capsys.readouterr()


def test_one_chip_holds_131072_latents_of_width_2304():
    options = Options("topk", 1 << 17, 64, batch=4096)
    assert plan.training_step(options, 2304, plan.topology_mesh("v5e:1x1")).memory < 15 * GIB


LLAMA_7B = {
    **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000},
}


def test_a_language_model_of_seven_billion_fits_beside_an_autoencoder(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    of = ("--model", tmp_path, "--layer", 31, "--site", "mlp_out")
    code, out, _ = command(capsys, "--latents", 1 << 17, "--topology", "v5e:4x4", "--json", of=of)
    told = json.loads(out)
    assert (code, told["fits"]) == (0, True)
    weights, chips = 4 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096), 16
    harvest, training = told["programs"]["harvest"], told["programs"]["training step with AuxK at work"]
    assert weights / chips < harvest["arguments"] < 1.02 * weights / chips  # without the head, which it does not need
    assert harvest["memory"] < harvest["arguments"] + GIB  # one block is gathered at a time
    assert harvest["rows"] == chips * 255
    assert told["memory"] > harvest["arguments"] + training["arguments"]
    assert told["memory"] < 6 * GIB
    assert told["state"] == pytest.approx(6 * 4 * (1 << 17) * 4096 / chips, rel=0.01)


def test_the_command_tells_what_a_slice_is_used_for(capsys):
    code, out, err = command(capsys, "--latents", 4096, "--topology", "v5e:2x2", "--mesh", 2, 2)
    assert code == 0
    assert [line[:5] for line in err.splitlines()] == [" 20% ", " 40% ", " 60% ", " 80% ", "100% "]
    assert out.startswith("4 chips v5e:2x2: rows 2 ways, latents 2 ways; a chip has 16.00 GiB\n")
    names = "training step without AuxK", "training step with AuxK at work", "encode", "encode and refit", "evaluation"
    assert [line.partition(",")[0] for line in out.splitlines() if line.endswith("of each chip:")] == [*names]
    assert out.count("a billion rows") == len(names)
    code, again, _ = command(capsys, "--latents", 4096, "--topology", "v5e:2x2", "--mesh", 2, 2, "--json")
    told = json.loads(again)
    assert (told["chips"], told["latent"], told["fits"]) == (4, 2, True)
    assert set(told["programs"]) == set(names)
    for name, program in told["programs"].items():
        assert f"({program['flops']:.3g} FLOP)" in out
        assert f"({program['exchanged'] / 1e9:.2f} GB)" in out
        collectives = program["collectives"]
        assert program["exchanged"] == sum(each["bytes"] * each["count"] for each in collectives) > 0
        assert ("all-reduce" in {each["kind"] for each in collectives}) == (name != "encode")
        seconds = max(program["seconds_at_peak"].values())
        assert program["mfu_at_most"] == pytest.approx(program["flops"] / 197e12 / seconds, rel=1e-6)
        assert program["input_bytes_per_second"] == pytest.approx(4 * program["rows"] * 64 / seconds)
        assert (program["rows"] == 64) == (name != "evaluation")
        assert told["memory"] >= program["memory"]
        assert program["network_bytes_per_second"] == pytest.approx(program["exchanged"] / seconds)
    without, at_work = (told["programs"][name] for name in names[:2])
    assert without["flops"] < at_work["flops"]


@pytest.mark.parametrize("kind", chips.CHIPS)
def test_the_peak_of_a_chip_is_found_by_the_name_that_jax_gives_it(kind):
    (device,) = plan.topology_mesh(f"{kind}:1x1" if kind in ("v5e", "v6e") else f"{kind}:1x1x1").devices.ravel()[:1]
    assert chips.peak_flops(device) == chips.CHIPS[kind].flops


def test_flops_of_a_step_are_those_of_its_products():
    d, m, k, batch = 512, 4096, 8, 256
    options = Options("topk", m, k, batch=batch, auxk=False)
    program = plan.training_step(options, d, plan.topology_mesh("v5e:1x1"))
    products = 2 * batch * d * m  # of the encoder; other products are of k latents per row, and its gradient dense
    assert products < program.flops < 1.5 * 3 * products


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--latents", 1 << 26, "--topology", "v5e:1x1"], "does not fit into a chip: "),
        (["--latents", 1000, "--topology", "v5e:4x4"], "got 1000 latents for a mesh that splits them 16 ways"),
        (["--latents", 1024, "--topology", "v5e:3x3"], "cannot compile for v5e:3x3 ("),
        (["--latents", 1024, "--topology", "v9:1"], "got topology 'v9:1'; pass a kind of v4, v5e, v5p, v6e"),
        (["--latents", 1024, "--topology", "v5e:2x2", "--mesh", 3, 1], "got a mesh of 3 × 1 for 4 chips"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(options, message, capsys):
    code, _, err = command(capsys, *options)
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith(f"jaxsae: {message}")
