"""The command that plans a training."""

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

    Memory, FLOPs, bytes and collectives are read from the programs compiled for a slice. Times are the least that each
    of arithmetic, memory and network need at their peak; a step takes longer. Needs the extra tpu-aot.

    Example: jaxsae plan --latents 1048576 --d 4096 --k 128 --topology v5e:4x4 --batch 8192

    Args:
        latents: how many.
        d: width of the activations.
        k: active latents a row.
        batch: rows a step, of all chips together.
        topology: kind and shape of the slice: v4, v5e, v5p or v6e, like v5e:4x4.
        mesh: how many ways to split the rows of a batch, and the latents; all chips share the latents by default.
        activation: as of jaxsae train.
        price: US dollars that a chip costs an hour; by default, what it did on demand in 2025.
        json: print it as one JSON object.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jaxsae.app import plan as job
    from jaxsae.app.options import Options

    options = Options(activation, latents, k, batch=batch)
    for name, value in job.LIBTPU.items():
        os.environ.setdefault(name, value)
    slice_ = job.topology_mesh(topology, *(mesh or ()))
    chips, chip = slice_.size, job.CHIPS[topology.partition(":")[0]]
    price = chip.price if price is None else price
    data, latent = slice_.shape.values()
    lines = [
        f"{chips} chips {topology}: rows {data} ways, latents {latent} ways; a chip has {console.gib(chip.memory)}"
    ]
    summary: dict[str, Any] = {"chips": chips, "topology": topology, "data": data, "latent": latent}
    summary |= {"chip_memory": chip.memory, "fits": True, "programs": {}}
    for name, compile_it in (("training step", job.training_step), ("encode and refit", job.refit_step)):
        program = compile_it(options, d, slice_)
        seconds = program.seconds(chip)
        slowest = max(seconds.values())
        speed, cost = batch / slowest, slowest * chips * price / 3600 / batch * 1e9
        summary["fits"] &= program.memory < chip.memory
        collectives = [{"kind": kind, "bytes": size, "count": n} for (kind, size), n in program.collectives.items()]
        summary["programs"][name] = {
            **{"memory": program.memory, "arguments": program.arguments, "flops": program.flops},
            **{"bytes": program.bytes, "collectives": collectives, "seconds_at_peak": seconds},
            **{"most_rows_per_second": speed, "least_dollars_per_billion_rows": cost},
        }
        memory, inputs = console.gib(program.memory), console.gib(program.arguments)
        lines += [
            f"\n{name}, of each chip:",
            f"  memory   {memory}, {program.memory / chip.memory:.0%}: {inputs} of arguments and state",
            f"  work     {program.flops:.3g} FLOP, {program.bytes:.3g} bytes read and written",
            *(f"  {each['count']:4} {each['kind']:18} of {each['bytes']:,} bytes" for each in collectives),
            "  at peak  " + ", ".join(f"{what} {1000 * value:.1f} ms" for what, value in seconds.items()),
            f"  that is at most {speed:,.0f} rows/s, and at least ${cost:,.2f} a billion rows",
        ]
    console.show(summary, "\n".join(lines), as_json=json)
    if not summary["fits"]:
        console.warn("this is more memory than a chip has; take more chips, or a smaller batch.")
    return 0 if summary["fits"] else 1
