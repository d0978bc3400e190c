"""The real training step and refit compile for TPU slices, fit into their chips, and gather nothing large."""

import pytest

from jaxsae import plan, runs

pytestmark = pytest.mark.tpu

GIB = 1 << 30
CASES = {
    "v5e:4x4": (1 << 20, 4096, 128, 8192, 16),
    "v5e:16x16": (1 << 23, 4096, 128, 16384, 256),
    "v5e:1x1": (1 << 16, 2304, 64, 1024, 1),
}


@pytest.fixture(scope="module")
def mesh():
    return lambda topology: plan.topology_mesh(topology)


@pytest.mark.parametrize("program", ["training_step", "refit_step"])
@pytest.mark.parametrize("topology", CASES)
def test_it_fits_and_gathers_nothing_large(topology, program, mesh):
    latents, d, k, batch, chips = CASES[topology]
    options = runs.Options("topk", latents, k, batch=batch)
    found = getattr(plan, program)(options, d, mesh(topology))
    assert found.memory < 16 * GIB
    if program == "training_step":
        # Parameters, two moments and the batch: 6 arrays of the atoms' size, split over the chips.
        assert found.arguments >= 6 * 4 * latents * d // chips
    gathered = [size for kind, size in found.collectives if kind == "all-gather"]
    assert max(gathered, default=0) < min(4 * latents * d, 4 * batch * latents) // 16
    assert (chips == 1) == (not found.collectives)
