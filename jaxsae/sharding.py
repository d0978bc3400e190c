"""Sharding over a mesh: rows of a batch over its axis `data`, latents over its axis `latent`.

    mesh = sharding.make_mesh(data=2, latent=4)
    with jax.set_mesh(mesh):
        state = sharding.create(lambda: train.init_state(jaxsae.init(...), tx))    # each device makes its part
        state, metrics = step(state, jax.device_put(x, sharding.rows_sharding(x, mesh)))

Results are the same with and without a mesh. The axes of a mesh that was made elsewhere may have other names: `axes`
says which they are. XLA splits most of the work automatically. Arrays that must not be gathered (pre-activations,
atoms) are split by hand in `codes` and `refit`: each device works on its own latents, and devices exchange candidates
or sums. On a mesh without these axes XLA splits everything.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, ManualAxisType, Mesh, NamedSharding, PartitionSpec

__all__ = [
    "abstract",
    "axes",
    "create",
    "make_global_batch",
    "make_mesh",
    "replicate",
    "rows_needed",
    "rows_sharding",
    "shardings",
    "specs",
]

REPLICATED = PartitionSpec()
_DEFAULT = {"data": ("data",), "latent": ("latent",)}
_axes = jax.make_user_context(default_value=tuple(_DEFAULT.values()))  # programs are compiled for each


def axes(data: str | Sequence[str] = "data", latent: str = "latent") -> contextlib.AbstractContextManager[None]:
    """Name the axes of the mesh over which rows and latents are split.

    Args:
      data: the axis, or several, over which the rows of a batch are split.
      latent: the axis over which latents are split.

    Example:
      >>> mesh = jax.make_mesh((1, 1, 1), ("replica", "fsdp", "tensor"))
      >>> with jax.set_mesh(mesh), axes(data=("replica", "fsdp"), latent="tensor"):
      ...     tuple(rows_sharding(jnp.zeros((6, 4)), mesh).spec)
      (('replica', 'fsdp'),)
    """
    return _axes(((data,) if isinstance(data, str) else tuple(data), (latent,)))


def _named(role: str) -> tuple[str, ...]:
    """The axes of a role, `"data"` or `"latent"`."""
    return dict(zip(_DEFAULT, _axes.value, strict=True))[role]


def axis(role: str) -> Any:
    """The name of the axis of a role, `"data"` or `"latent"`, or of several, for specs and collectives."""
    names = _named(role)
    return names[0] if len(names) == 1 else names


def by_latent() -> PartitionSpec:
    """Latents split over their axis."""
    return PartitionSpec(axis("latent"))


def by_all() -> PartitionSpec:
    """Rows split over all devices."""
    return PartitionSpec((*_named("data"), *_named("latent")))


def make_mesh(data: int = 1, latent: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh that splits rows over `data` and latents over `latent` devices.

    Args:
      data: number of parts that the rows of a batch are split into.
      latent: number of parts that the latents are split into.
      devices: at least `data · latent` devices, of which the first are used; by default `jax.devices()`.

    Raises:
      ValueError: if there are fewer devices.

    Example:
      >>> dict(make_mesh(1, 1).shape)
      {'data': 1, 'latent': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if data < 1 or latent < 1 or data * latent > len(devices):
        raise ValueError(f"got a mesh of {data} × {latent} for {len(devices)} devices; pass one of at most that many.")
    if data * latent == len(devices):
        return jax.make_mesh((data, latent), ("data", "latent"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    return Mesh(np.array(devices[: data * latent]).reshape(data, latent), ("data", "latent"))


def specs(tree: Any) -> Any:
    """The `PartitionSpec` of each array of a tree.

    Dataclasses declare it by `pytrees.sharded`; undeclared fields are replicated. Stacked autoencoders are split like
    single ones, after the axes that they are stacked along. Gradients and moments are split like their parameters;
    optimiser states of other shapes (Adafactor's factored moments) are replicated.

    Args:
      tree: pytree of arrays or `jax.ShapeDtypeStruct`s, such as an `SAE` or a `TrainState`.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> tuple(specs(sae).W_enc), tuple(specs(sae).b_dec)
      ((None, 'latent'), ())
      >>> tuple(specs(jax.tree.map(lambda x: jnp.stack([x, x, x]), sae)).W_enc)
      (None, None, 'latent')
    """
    return _specs(tree, None)


def _specs(node: Any, known: tuple[int, int] | None) -> Any:
    """`specs` below a dataclass that determined the number of stacked axes and of latents."""
    if jax.tree_util.all_leaves([node]):
        return REPLICATED
    fields = dataclasses.fields(node) if dataclasses.is_dataclass(node) else ()
    roles = {field.name: field.metadata["axes"] for field in fields if "axes" in field.metadata}
    found = {
        name: _latents(x, roles[name]) for name in roles if hasattr(x := getattr(node, name), "ndim")
    }  # not masked
    if known is None and found:
        first, *others = set(found.values())
        known = (-1, 0) if others else first  # if shapes are inconsistent, no array is split

    def spec(path, child):
        name = getattr(path[0], "name", None)
        if name not in found:
            return _specs(child, known)
        stacked, _ = found[name]
        if stacked < 0 or found[name] != known:
            return REPLICATED
        declared = roles[name][: roles[name].index("latent") + 1]
        return PartitionSpec(*[None] * stacked, *(None if role is None else axis(role) for role in declared))

    return jax.tree.map_with_path(spec, node, is_leaf=lambda other: other is not node)


def _latents(x: Any, axes: tuple[str | None, ...]) -> tuple[int, int]:
    """The number of axes before the declared ones, and the number of latents."""
    stacked = x.ndim - len(axes)
    return stacked, x.shape[stacked + axes.index("latent")] if stacked >= 0 else 0


def shardings(tree: Any, mesh: Mesh) -> Any:
    """`specs(tree)` as `NamedSharding`s on a mesh.

    Args:
      tree: as for `specs`.
      mesh: of `make_mesh`, or another; axes that it does not have are left unsplit.

    Raises:
      ValueError: if the latents cannot be split evenly.

    Example:
      >>> import jaxsae
      >>> sae = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU())
      >>> tuple(shardings(sae, make_mesh(1, 1)).W_dec.spec)
      ('latent',)
    """

    def place(leaf, spec):
        spec = PartitionSpec(*(name if name in mesh.shape else None for name in spec))
        for size, name in zip(np.shape(leaf), spec, strict=False):
            if name is not None and size % mesh.shape[name]:
                raise ValueError(
                    f"got {size} latents for a mesh that splits them {mesh.shape[name]} ways; pass a multiple of that."
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, tree, specs(tree))


def create(make: Callable[[], Any]) -> Any:
    """Call `make()` sharded over the current mesh: each device makes its own part, and none holds the whole.

    Args:
      make: function that `jit` can trace and that returns a pytree of arrays.

    Example:
      >>> import jaxsae
      >>> with jax.set_mesh(make_mesh(1, 1)):
      ...     sae = create(lambda: jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU()))
      >>> tuple(sae.W_enc.sharding.spec)
      (None, 'latent')
    """
    if jax.sharding.get_mesh().empty:
        return make()
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract(make)))()


def abstract(make: Callable[[], Any]) -> Any:
    """The shapes, dtypes and shardings of what `create(make)` returns.

    Args:
      make: as for `create`; it is traced, not run.

    Example:
      >>> abstract(lambda: jnp.zeros((2, 3))).shape
      (2, 3)
    """
    tree, mesh = jax.eval_shape(make), jax.sharding.get_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings(tree, mesh)
    )


def rows_sharding(x: Any, mesh: Mesh) -> NamedSharding:
    """The sharding of rows over the axis `data`; replicated where they cannot be split evenly.

    Args:
      x: `[n …]`, an array or a `jax.ShapeDtypeStruct`.
      mesh: of `make_mesh`, or another.

    Example:
      >>> tuple(rows_sharding(jnp.zeros((6, 4)), make_mesh(1, 1)).spec)
      ('data',)
    """
    names = _named("data")
    parts = math.prod(mesh.shape.get(name, 0) for name in names)
    divides = parts and x.shape[0] % parts == 0
    return NamedSharding(mesh, PartitionSpec(axis("data")) if divides else REPLICATED)


def make_global_batch(x: np.ndarray, size: int, first: int) -> jax.Array:
    """Make a global array of a batch from the rows that this process has.

    Args:
      x: `[n …]`, on the host.
      size: number of rows of the whole batch.
      first: index in the batch of the first row of `x`.

    Example:
      >>> make_global_batch(np.zeros((6, 4)), size=6, first=0).shape
      (6, 4)
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(x)
    shape = (size, *x.shape[1:])
    sharded = rows_sharding(jax.ShapeDtypeStruct(shape, x.dtype), mesh)

    def part(index):
        start, stop, _ = index[0].indices(size)
        return x[start - first : stop - first]

    return jax.make_array_from_callback(shape, sharded, part)


def rows_needed(size: int) -> slice:
    """The rows of a batch that this process needs for its devices.

    Args:
      size: number of rows of the whole batch.

    Example:
      >>> rows_needed(6)
      slice(0, 6, None)
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return slice(0, size)
    sharded = rows_sharding(jax.ShapeDtypeStruct((size,), bool), mesh)
    parts = [index[0].indices(size) for index in sharded.addressable_devices_indices_map((size,)).values() if index]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def replicate(tree: Any) -> Any:
    """Give every device of the current mesh the whole of each array: for small results, which the host then reads.

    Args:
      tree: pytree of arrays.

    Example:
      >>> with jax.set_mesh(make_mesh(1, 1)):
      ...     replicate({"x": jnp.arange(2)})["x"].sharding.is_fully_replicated
      True
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return tree
    place = jax.sharding.reshard if mesh.explicit_axes else jax.lax.with_sharding_constraint
    return jax.tree.map(lambda x: place(x, REPLICATED), tree)


def on_cpu() -> bool:
    """Whether tracing targets CPUs: those of the current mesh, or else the default backend.

    For sizes of chunks and other choices that must be made at tracing, before the program's devices are known: to
    compile for a TPU that is not here, set its mesh. What lowering can choose is left to `jax.lax.platform_dependent`.
    """
    return _platform() == "cpu"


def on_tpu() -> bool:
    """Whether tracing targets TPUs."""
    return _platform() == "tpu"


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_divided() -> bool:
    """Whether the compiler may have to split a batch over devices, as outside of a `shard_map` over all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 if mesh.empty else mesh.size > 1 and set(mesh.manual_axes) != set(mesh.axis_names)


def axis_size(role: str) -> int:
    """How many ways the current mesh splits rows, `"data"`, or latents, `"latent"`; manual axes do not count."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else mesh.shape
    return math.prod(sizes.get(name, 1) for name in _named(role) if mesh.empty or name not in mesh.manual_axes)


def is_sharded(latents: int) -> bool:
    """Whether the current mesh splits work on so many latents by hand, over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = not mesh.empty and {*_named("data"), *_named("latent")} <= set(mesh.axis_names)
    return ours and axis_size("data") * axis_size("latent") > 1 and latents % axis_size("latent") == 0


def vary_alike(tree: Any, *others: Any) -> Any:
    """Make the arrays of a tree vary over all axes of a `shard_map` that any of them, or of `others`, varies over.

    In a user's own `jax.shard_map(..., check_vma=True)`, the default in jax 0.10 to 0.12, the axes over which an array
    varies are part of its type. A constant varies over none: a loop whose carry changes its type is rejected ("carry
    input and carry output must have equal types"), and so is a derivative rule whose result does not vary as its
    argument does. JAX's documentation recommends this `pcast` of the initial carry:
    https://docs.jax.dev/en/latest/notebooks/shard_map.html#scan-vma
    """
    axes = _varies((tree, others))

    def vary(x):
        missing = axes - _varies(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _varies(tree: Any) -> frozenset[str]:
    """The axes of a `shard_map` along which any array of a tree differs from device to device."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def varying_as(inputs: Any, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """A kernel's output, varying over the axes of a `shard_map` that any of its inputs varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=_varies(inputs)))


def automatic(f: Callable, rows: Any = None) -> Callable:
    """`f`, split by XLA also on a mesh with Explicit axes; the result is split like `rows [*b k]`, or replicated."""
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return f
    spec = REPLICATED if rows is None else PartitionSpec(*jax.typeof(rows).sharding.spec[:-1])
    return jax.sharding.auto_axes(f, out_sharding=spec)


def rows_spec(x: Any) -> PartitionSpec:
    """The `PartitionSpec` of the rows of `x [*b k]` on the current mesh."""
    parts = axis_size("data")
    return PartitionSpec(axis("data")) if x.ndim > 1 and parts > 1 and x.shape[0] % parts == 0 else PartitionSpec()


def sum_rows(total: jax.Array, row: PartitionSpec) -> jax.Array:
    """Sum a per-device total over the devices, if rows are split. In `shard_map`."""
    return jax.lax.psum(total, axis("data")) if len(row) else total


def local_indices(indices: jax.Array, m: int) -> jax.Array:
    """Indices relative to the first of this device's `m` latents; `m` for latents of others. In `shard_map`."""
    at = indices - m * jax.lax.axis_index(axis("latent"))
    return jnp.where((at >= 0) & (at < m), at, m)


def gather_atoms(dictionary: jax.Array, indices: jax.Array) -> jax.Array:
    """Gather the atoms `[n k d]` of this device's rows from all devices; of unused slots any. In `shard_map`.

    It takes the cheaper of two exchanges: a reduce-scatter of the atoms of all rows, `(devices · n) k d` numbers per
    device; or an all-to-all that trades latents for parts of the width, and back: `m d + n k d`, with the device's `m`.

    Args:
      dictionary: `[m d]`, the atoms of this device.
      indices: `[n k]`, among the latents of all devices.
    """
    devices, (n, k), (m, d) = jax.lax.axis_size(axis("latent")), indices.shape, dictionary.shape
    everyone = jax.lax.all_gather(indices, axis("latent"), axis=0, tiled=True)
    if devices * n * k <= m + n * k or d % devices:
        atoms = dictionary.at[local_indices(everyone, m)].get(mode="fill", fill_value=0)
        return jax.lax.psum_scatter(atoms, axis("latent"), scatter_dimension=0, tiled=True)
    columns = jax.lax.all_to_all(dictionary, axis("latent"), split_axis=1, concat_axis=0, tiled=True)
    parts = columns.at[everyone].get(mode="clip")  # zeros in unused slots would be another pass over all
    return jax.lax.all_to_all(parts, axis("latent"), split_axis=0, concat_axis=2, tiled=True)


def shard_map(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` without the check of varying axes."""
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)
