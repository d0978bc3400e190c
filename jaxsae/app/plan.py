"""Estimate what a training needs on TPUs, by compiling the actual step for them.

libtpu compiles on any machine, without a TPU; memory, FLOPs, bytes and collectives are those of the compiled program.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxsae import sharding, train
from jaxsae._core.files import InputError, first_line
from jaxsae.app import evaluation, runs
from jaxsae.app.chips import CHIPS, Chip
from jaxsae.app.options import Options, _require_parts
from jaxsae.app.units import Units
from jaxsae.autoencoder import stream
from jaxsae.autoencoder.refinement import refine
from jaxsae.autoencoder.sae import encode
from jaxsae.language_model import harvest


@dataclasses.dataclass(frozen=True)
class Program:
    """Cost and memory of a compiled program, per chip.

    Attributes:
      arguments: bytes of its arguments, including the state of a training.
      workspace_bytes: bytes that it needs besides, without results that reuse the memory of arguments.
      flops: as XLA counts them; the body of a loop of unknown length once.
      bytes: read from memory and written, likewise.
      collectives: `{(kind, bytes of its result): count}`.
    """

    arguments: int
    workspace_bytes: int
    flops: float
    bytes: float
    collectives: dict[tuple[str, int], int]

    @property
    def memory(self) -> int:
        """Bytes that it needs on a chip."""
        return self.arguments + self.workspace_bytes

    @property
    def exchanged(self) -> int:
        """Bytes of all collectives."""
        return sum(size * count for (_, size), count in self.collectives.items())

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Lower bounds on the time of arithmetic, memory and network, each at its peak rate."""
        return {
            "arithmetic": self.flops / chip.flops,
            "memory": self.bytes / chip.bandwidth,
            "network": self.exchanged / chip.network,
        }


LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost"}


def topology_mesh(topology: str, data: int = 1, latent: int | None = None) -> Mesh:
    """The mesh of a TPU slice that need not exist.

    libtpu looks for a TPU on this machine unless the environment names one: set `LIBTPU` in `os.environ` before, as
    `jaxsae plan` does.

    Args:
      topology: for example `"v5e:4x4"`; the shape of one chip is `"v5e:1x1"`.
      data: how many ways to split the rows.
      latent: how many ways to split the latents; over the other chips by default.

    Raises:
      InputError: if libtpu is missing, or does not know the slice.

    Example:
      >>> topology_mesh("4x4")
      Traceback (most recent call last):
      jaxsae.InputError: got topology '4x4'; pass a kind of v4, v5e, v5p, v6e and its shape, like v5e:4x4.
    """
    from jax.experimental import topologies

    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise InputError(f"got topology {topology!r}; pass a kind of {', '.join(CHIPS)} and its shape, like v5e:4x4.")
    options: dict[str, Any] = {}
    if math.prod(map(int, re.findall(r"\d+", topology.partition(":")[2]))) == 1:
        options = {"chips_per_host_bounds": (1, 1, 1), "num_slices": 1}
    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        what = f"cannot compile for {topology} ({first_line(error)[:200]})"
        raise InputError(f"{what}; pass a slice that exists, and pip install 'jaxsae[tpu-aot]'.") from error
    devices = np.array(slice_.devices)
    latent = devices.size // data if latent is None else latent
    if data * latent != devices.size:
        raise InputError(
            f"got a mesh of {data} × {latent} for {devices.size} chips; pass numbers whose product is that."
        )
    return Mesh(devices.reshape(data, latent), ("data", "latent"), axis_types=(AxisType.Auto,) * 2)


def training_step(options: Options, d: int, mesh: Mesh) -> Program:
    """The step of `jaxsae train`, compiled.

    Args:
      options: of the training.
      d: width of the activations.
      mesh: of devices that need not exist.

    Raises:
      InputError: if the options do not fit, or the program does not fit into the memory of a chip.

    Example:
      For one device of this machine:

      >>> options = Options(activation="topk", latents=32, k=2, batch=16, auxk=False)
      >>> training_step(options, 8, sharding.make_mesh()).collectives
      {}
    """
    objective, tx, init_fn = runs.recipe(options, Units(jnp.zeros(d)))
    step: Any = train.make_step(objective, tx, accumulate=options.accumulate)
    with jax.set_mesh(mesh):
        _require_parts(options, sharding.axis_size("data"))
        state = _abstract(init_fn)
        return _read(lambda: step.func.lower(*step.args, state, _batch(options.batch, d, mesh), **step.keywords))


def encode_step(options: Options, d: int, mesh: Mesh) -> Program:
    """Encoding a batch, compiled.

    Args:
      options: of the training.
      d: width of the activations.
      mesh: of devices that need not exist.

    Raises:
      InputError: as `training_step`.

    Example:
      >>> encode_step(Options("topk", latents=32, k=2, batch=16), 8, sharding.make_mesh()).collectives
      {}
    """
    return _of_a_batch(lambda sae, x: encode(sae, x, capacity=options.k), options, d, mesh)


def refit_step(options: Options, d: int, mesh: Mesh) -> Program:
    """Encoding and refining a batch, compiled.

    Args:
      options: as for `encode_step`.
      d: as for `encode_step`.
      mesh: as for `encode_step`.

    Raises:
      InputError: as `training_step`.

    Example:
      >>> refit_step(Options(activation="topk", latents=32), 8, sharding.make_mesh())
      Traceback (most recent call last):
      jaxsae.InputError: topk is made sparse by k; pass k, and no l1.
    """
    return _of_a_batch(lambda sae, x: refine(sae, x, capacity=options.k), options, d, mesh)


def evaluation_step(options: Options, d: int, mesh: Mesh) -> tuple[Program, int]:
    """The measurement of a chunk of held-out rows, compiled, and the number of these.

    Args:
      options: as for `encode_step`.
      d: as for `encode_step`.
      mesh: as for `encode_step`.

    Raises:
      InputError: as `training_step`.

    Example:
      >>> program, rows = evaluation_step(Options("topk", latents=32, k=2, batch=16), 8, sharding.make_mesh())
      >>> program.collectives
      {}
    """
    with jax.set_mesh(mesh):
        rows = stream._chunk_rows(options.latents)
    capacity = options.k or 1
    keep = tuple(2**n for n in range(capacity.bit_length()))
    measure = lambda sae, x: evaluation._measure(sae, x, x, capacity, keep)  # noqa: E731
    return _of_a_batch(measure, options._replace(batch=rows), d, mesh), rows


def harvest_step(
    model: str, mesh: Mesh, *, layer: int, site: str = "resid_post", context: int = 256, batch: int = 8
) -> tuple[Program, int]:
    """A step of a language model on all chips, compiled, and the rows that it gives.

    Args:
      model: a language model; only its configuration is read.
      mesh: of devices that need not exist.
      layer: block of the model.
      site: where in it.
      context: tokens in a context.
      batch: contexts in a step, rounded up to a multiple of the chips.

    Raises:
      InputError: as `harvest.check`, or as `training_step`.

    Example:
      >>> harvest_step("no-such-place", sharding.make_mesh(), layer=1)
      Traceback (most recent call last):
      jaxsae.InputError: no-such-place: no such file; expected a GGUF file, a Hugging Face directory, or ...
    """
    how: dict[str, Any] = {"layer": layer, "site": site, "context": context, "batch": batch}
    program, contexts = harvest.lowered(model, devices=list(mesh.devices.flat), **how)
    return _read(lambda: program), contexts * (context - 1)


def _of_a_batch(f, options: Options, d: int, mesh: Mesh) -> Program:
    _, _, init_fn = runs.recipe(options, Units(jnp.zeros(d)))
    with jax.set_mesh(mesh):
        sae = _abstract(init_fn).sae
        return _read(lambda: jax.jit(f).lower(sae, _batch(options.batch, d, mesh)))


def _abstract(init_fn):
    try:
        return sharding.abstract(init_fn)
    except ValueError as error:
        raise InputError(str(error)) from error


def _batch(rows: int, d: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    x = jax.ShapeDtypeStruct((rows, d), jnp.float32)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.rows_sharding(x, mesh))


def _read(lower) -> Program:
    try:
        compiled = lower().compile()
    except OverflowError as error:
        raise InputError("no program has arrays of these sizes; pass a smaller batch.") from error
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text)
        what = f"it needs {used[1]} of {used[2]}" if used else text.partition("\n")[0][:200]
        raise InputError(f"does not fit into a chip: {what}; take more chips, or a smaller batch.") from error
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Program(
        arguments=memory.argument_size_in_bytes,
        workspace_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops=float(cost["flops"]),
        bytes=float(cost["bytes accessed"]),
        collectives=collectives(compiled.as_text()),
    )


_COLLECTIVE = re.compile(
    r" = (?P<result>.*?) "
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b[a-z]+(\d+)?[a-z0-9]*\[([\d,]*)\]")


def collectives(hlo: str) -> dict[tuple[str, int], int]:
    """Count the collectives of a compiled program by kind and size of their results.

    Args:
      hlo: its text, as `compiled.as_text()` gives it.

    Example:
      >>> collectives("  %sum = f32[16,8]{1,0} all-reduce(%x), replica_groups={}")
      {('all-reduce', 512): 1}
    """
    found: collections.Counter = collections.Counter()
    for match in filter(None, map(_COLLECTIVE.search, hlo.splitlines())):
        sizes = [_size(array) for array in _ARRAY.finditer(match["result"])]
        # An asynchronous start returns its arguments too, but that of a reduction only its results.
        started = match["start"] and match["kind"] != "all-reduce"
        found[match["kind"], max(sizes, default=0) if started else sum(sizes)] += 1
    return dict(sorted(found.items(), key=lambda item: -item[0][1]))


def _size(array: re.Match) -> int:
    bits = int(array[1] or 8)
    return math.prod(int(n) for n in array[2].split(",") if n) * bits // 8
