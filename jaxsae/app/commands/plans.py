"""The command that plans a training: plan."""

import os
from typing import Annotated, Any

from jaxsae._core import arguments
from jaxsae.app import console


def plan(
    *,
    latents: arguments.Count,
    d: Annotated[int, arguments.Range(1, 2**20)],
    k: arguments.Count,
    batch: arguments.Count,
    topology: Annotated[str, arguments.Text(r"\w+:\d+(x\d+)*", "a kind of chip and a shape, like v5e:4x4")],
    mesh: tuple[arguments.Parts, arguments.Parts] | None = None,
    activation: Annotated[str, arguments.ACTIVATION] = "topk",
    price: arguments.Weight | None = None,
    json: bool = False,
) -> int:
    """Estimate what a training needs on TPUs, without a TPU.

    Memory, FLOPs, bytes and collectives are read from the programs compiled for a slice. Times are lower bounds for
    arithmetic, memory and network at their peak rates; a step takes longer. AuxK costs nothing while no latent is idle.
    Needs the extra tpu-aot.

    Example: jaxsae plan --latents 1048576 --d 4096 --k 128 --topology v5e:4x4 --batch 8192

    Args:
        latents: number of latents.
        d: width of the activations.
        k: active latents per row.
        batch: rows per step, over all chips.
        topology: kind (v4, v5e, v5p or v6e) and shape of the slice, for example v5e:4x4.
        mesh: how many ways to split the rows of a batch, and the latents; by default only the latents are split.
        activation: as for jaxsae train.
        price: US dollars per chip and hour; by default the on-demand price of 2025.
        json: print the plan as one JSON object.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jaxsae.app import plan as job
    from jaxsae.app.chips import CHIPS
    from jaxsae.app.options import Options

    options = Options(activation, latents, k, batch=batch)
    for name, value in job.LIBTPU.items():
        os.environ.setdefault(name, value)
    slice_ = job.topology_mesh(topology, *(mesh or ()))
    chips, chip = slice_.size, CHIPS[topology.partition(":")[0]]
    price = chip.price if price is None else price
    data, latent = slice_.shape.values()
    lines = [
        f"{chips} chips {topology}: rows {data} ways, latents {latent} ways; a chip has {console.gib(chip.memory)}"
    ]
    summary: dict[str, Any] = {"chips": chips, "topology": topology, "data": data, "latent": latent}
    summary |= {"chip_memory": chip.memory, "fits": True, "programs": {}}
    programs = (
        ("training step without AuxK", lambda: job.training_step(options._replace(auxk=False), d, slice_)),
        ("training step with AuxK at work", lambda: job.training_step(options, d, slice_)),
        ("encode", lambda: job.encode_step(options, d, slice_)),
        ("encode and refit", lambda: job.refit_step(options, d, slice_)),
    )
    with console.progress(len(programs)) as update:
        for name, compile_it in programs:
            update(f"compiling: {name}", 0)
            program = compile_it()
            update(f"compiled: {name}", 1)
            summary["fits"] &= program.memory < chip.memory
            summary["programs"][name] = found = _measured(program, chip, batch, d, chips * price)
            lines += [f"\n{name}, of each chip:", *_described(found)]
    console.show(summary, "\n".join(lines), as_json=json)
    if not summary["fits"]:
        console.warn("this is more memory than a chip has; take more chips, or a smaller batch.")
    return 0 if summary["fits"] else 1


def _measured(program: Any, chip: Any, batch: int, d: int, price: float) -> dict[str, Any]:
    """A program's needs on a chip, and what follows for a slice of that price an hour."""
    seconds = program.seconds(chip)
    slowest = max(seconds.values())
    collectives = [{"kind": kind, "bytes": size, "count": n} for (kind, size), n in program.collectives.items()]
    return {
        **{"memory": program.memory, "arguments": program.arguments, "flops": program.flops, "bytes": program.bytes},
        **{"exchanged": program.exchanged, "collectives": collectives, "seconds_at_peak": seconds},
        **{"network_bytes_per_second": program.exchanged / slowest, "input_bytes_per_second": 4 * batch * d / slowest},
        **{"mfu_at_most": program.flops / chip.flops / slowest},
        **{"most_rows_per_second": batch / slowest, "least_dollars_per_billion_rows": slowest * price / 3.6e-6 / batch},
    }


def _described(found: dict[str, Any]) -> list[str]:
    work = f"{found['flops']:.3g} FLOP", f"{found['bytes'] / 1e9:.1f} GB", f"{found['exchanged'] / 1e9:.2f} GB"
    times = [
        f"{what} {1000 * value:.1f} ms ({size})"
        for (what, value), size in zip(found["seconds_at_peak"].items(), work, strict=True)
    ]
    network, inputs = (f"{found[f'{what}_bytes_per_second'] / 1e9:.2f} GB/s" for what in ("network", "input"))
    speed, cost = found["most_rows_per_second"], found["least_dollars_per_billion_rows"]
    return [
        f"  memory   {console.gib(found['memory'])}: {console.gib(found['arguments'])} of arguments and state",
        f"  at peak  {', '.join(times)}",
        f"  at most  {speed:,.0f} rows/s, for which all chips read {inputs} of input, and each exchanges {network}",
        f"  MFU      at most {found['mfu_at_most']:.1%}",
        f"  costs    at least ${cost:,.2f} a billion rows",
    ]
