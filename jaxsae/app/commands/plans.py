"""The command that plans a training: plan."""

import functools
import os
from collections.abc import Callable
from typing import Annotated, Any

from jaxsae._core import arguments
from jaxsae._core.files import InputError
from jaxsae.app import console


def plan(
    *,
    latents: arguments.Count,
    k: arguments.Count,
    batch: arguments.Count,
    accumulate: arguments.Count = 1,
    moments: Annotated[str, arguments.MOMENTS] = "float32",
    topology: Annotated[str, arguments.Text(r"\w+:\d+(x\d+)*", "a kind of chip and a shape, like v5e:4x4")],
    d: Annotated[int, arguments.Range(1, 2**20)] | None = None,
    model: arguments.Model | None = None,
    layer: arguments.Index | None = None,
    site: arguments.Site = "resid_post",
    context: arguments.Context = 256,
    mesh: tuple[arguments.Parts, arguments.Parts] | None = None,
    activation: Annotated[str, arguments.ACTIVATION] = "topk",
    price: arguments.Weight | None = None,
    json: bool = False,
) -> int:
    """Estimate what a training needs on TPUs, without a TPU.

    Memory, FLOPs, bytes and collectives are read from the programs compiled for a slice. Times are lower bounds for
    arithmetic, memory and network at their peak rates; a step takes longer. AuxK costs nothing while no latent is idle.
    With --model instead of --d, a training that harvests while it trains, the language model beside the autoencoder.
    Needs the extra tpu-aot.

    Example: jaxsae plan --latents 1048576 --d 4096 --k 128 --topology v5e:4x4 --batch 8192

    Args:
        latents: number of latents.
        k: active latents per row.
        batch: rows per step, over all chips.
        accumulate: as for jaxsae train. Of a training step in parts only the memory is given, since XLA counts the work
            of a loop once; and of a part what encoding takes.
        moments: as for jaxsae train.
        topology: kind (v4, v5e, v5p or v6e) and shape of the slice, for example v5e:4x4.
        d: width of the activations.
        model: a language model, of which only the configuration is read: a Hugging Face directory with its config.json,
            a GGUF file or smollm2.
        layer: block of the model, from 0.
        site: resid_pre, hook_z, attn_out, resid_mid, mlp_in, mlp_out or resid_post of that block.
        context: number of tokens in a context.
        mesh: how many ways to split the rows of a batch, and the latents; by default only the latents are split.
        activation: as for jaxsae train.
        price: US dollars per chip and hour; by default the on-demand price of 2025.
        json: print the plan as one JSON object.
    """
    import jax

    if (d is None) == (model is None):
        raise InputError("got both --d and --model; pass one." if d else "pass --d, or --model and --layer.")
    jax.config.update("jax_platforms", "cpu")
    from jaxsae.app import plan as job
    from jaxsae.app.options import Options
    from jaxsae.language_model import files, sites

    points = [] if model is None else sites.points([] if layer is None else [layer], [site])
    width = d or sites.width(files.read_config(str(model)), points[0].site)
    options = Options(activation, latents, k, batch=batch, accumulate=accumulate, moments=moments)
    slice_, chip = _slice(topology, mesh)
    chips = slice_.size
    price = chip.price if price is None else price
    data, latent = slice_.shape.values()
    lines = [
        f"{chips} chips {topology}: rows {data} ways, latents {latent} ways; a chip has {console.gib(chip.memory)}"
    ]
    summary: dict[str, Any] = {"chips": chips, "topology": topology, "data": data, "latent": latent}
    summary["chip_memory"] = chip.memory
    programs = _programs(options, width, slice_)
    for point in points:
        how = {"layer": point.layer, "site": point.site, "context": context}
        programs["harvest"] = functools.partial(job.harvest_step, str(model), slice_, **how)
    summary["programs"], described = _compiled(programs, chip, width, chips * price, accumulate)
    lines += described
    row = 4 * width // data  # bytes on a chip
    most = _most(summary["programs"], row)
    state = summary["programs"]["training step without AuxK"]["arguments"] - batch * row
    summary |= {"memory": most, "state": state, "fits": most < chip.memory}
    lines += [f"\nat most {console.gib(most)} of each chip at any time; a save has {console.gib(state)} of each"]
    console.show(summary, "\n".join(lines), as_json=json)
    if not summary["fits"]:
        console.warn("this is more memory than a chip has; take more chips, or a smaller batch.")
    return 0 if summary["fits"] else 1


def _slice(topology: str, mesh: tuple[int, int] | None) -> tuple[Any, Any]:
    """The mesh of a slice, and its chip."""
    from jaxsae.app import plan as job
    from jaxsae.app.chips import CHIPS

    for name, value in job.LIBTPU.items():
        os.environ.setdefault(name, value)
    return job.topology_mesh(topology, *(mesh or ())), CHIPS[topology.partition(":")[0]]


def _compiled(programs: dict[str, Callable[[], Any]], chip: Any, d: int, price: float, accumulate: int):
    """What each program needs, by name, and the lines that say so."""
    measured, lines = {}, []
    with console.progress(len(programs)) as update:
        for name, compile_it in programs.items():
            update(f"compiling: {name}", 0)
            program, rows = compile_it()
            update(f"compiled: {name}", 1)
            found = {"memory": program.memory, "arguments": program.arguments, "rows": rows}
            # XLA counts the work of a loop once: over a language model's blocks, or the parts of a batch.
            once = name == "harvest" or (accumulate > 1 and name.startswith("training step"))
            found |= {} if once else _measured(program, chip, rows, d, price)
            measured[name] = found
            lines += [f"\n{name}, {rows:,} rows, of each chip:", *_described(found)]
    return measured, lines


def _programs(options: Any, d: int, mesh: Any) -> dict[str, Callable[[], Any]]:
    """What compiles the programs of a training, by name, and says their rows."""
    from jaxsae.app import plan as job

    part = options._replace(batch=options.batch // options.accumulate, accumulate=1)
    return {
        "training step without AuxK": lambda: (job.training_step(options._replace(auxk=False), d, mesh), options.batch),
        "training step with AuxK at work": lambda: (job.training_step(options, d, mesh), options.batch),
        "encode": lambda: (job.encode_step(part, d, mesh), part.batch),
        "encode and refit": lambda: (job.refit_step(part, d, mesh), part.batch),
        "evaluation": lambda: job.evaluation_step(options, d, mesh),
    }


def _most(programs: dict[str, dict[str, Any]], row: int) -> int:
    """The most memory of a chip at any time: a program at work on its rows, and beside it what the others keep."""
    kept = programs["training step without AuxK"]["arguments"]
    kept += programs["harvest"]["arguments"] if "harvest" in programs else 0
    return kept + max(found["memory"] - found["arguments"] + found["rows"] * row for found in programs.values())


def _measured(program: Any, chip: Any, batch: int, d: int, price: float) -> dict[str, Any]:
    """A program's needs on a chip, and what follows for a slice of that price an hour."""
    seconds = program.seconds(chip)
    slowest = max(seconds.values())
    collectives = [{"kind": kind, "bytes": size, "count": n} for (kind, size), n in program.collectives.items()]
    return {
        **{"flops": program.flops, "bytes": program.bytes},
        **{"exchanged": program.exchanged, "collectives": collectives, "seconds_at_peak": seconds},
        **{"network_bytes_per_second": program.exchanged / slowest, "input_bytes_per_second": 4 * batch * d / slowest},
        **{"mfu_at_most": program.flops / chip.flops / slowest},
        **{"most_rows_per_second": batch / slowest, "least_dollars_per_billion_rows": slowest * price / 3.6e-6 / batch},
    }


def _described(found: dict[str, Any]) -> list[str]:
    memory = f"  memory   {console.gib(found['memory'])}: {console.gib(found['arguments'])} of arguments and state"
    if "flops" not in found:
        return [memory]
    work = f"{found['flops']:.3g} FLOP", f"{found['bytes'] / 1e9:.1f} GB", f"{found['exchanged'] / 1e9:.2f} GB"
    times = [
        f"{what} {1000 * value:.1f} ms ({size})"
        for (what, value), size in zip(found["seconds_at_peak"].items(), work, strict=True)
    ]
    network, inputs = (f"{found[f'{what}_bytes_per_second'] / 1e9:.2f} GB/s" for what in ("network", "input"))
    speed, cost = found["most_rows_per_second"], found["least_dollars_per_billion_rows"]
    return [
        memory,
        f"  at peak  {', '.join(times)}",
        f"  at most  {speed:,.0f} rows/s, for which all chips read {inputs} of input, and each exchanges {network}",
        f"  MFU      at most {found['mfu_at_most']:.1%}",
        f"  costs    at least ${cost:,.2f} a billion rows",
    ]
