"""Checkpoints of the whole training state through orbax, saved atomically, from which runs resume bitwise identically.

    1000/state       the state, and a fingerprint of each of its leaves
    1000/manifest    configuration, versions, the position in the data

A step gets its name only once all of it is on disk. It is restored only if every leaf matches its fingerprint;
otherwise the step before it is, with a warning.
"""

import contextlib
import functools
import json
import math
import operator
import os
import platform
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from jaxsae._core import processes
from jaxsae._core.files import AnyPath, InputError, address, any_path, first_line, in_one_line, owned, reached, remove
from jaxsae.formats.tensors import writable
from jaxsae.train import echoes

_VERSION = 1
_NOT_SAVED = "state{} is not what was saved"


class Saved(NamedTuple):
    """A saved step.

    Attributes:
      step: its number.
      state: the pytree, sharded as requested.
      progress: JSON, as passed to `save`.
    """

    step: int
    state: Any
    progress: Any


def versions() -> dict[str, str]:
    """Versions of the packages that determine the numbers of a run.

    Example:
      >>> sorted(versions())[:4]
      ['flax', 'grain', 'jax', 'jaxlib']
    """
    names = ("jaxsae", "jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def steps(folder: str | os.PathLike) -> list[int]:
    """The steps in a directory of checkpoints, damaged or not, latest first.

    Args:
      folder: the directory; if it is missing, there are none.

    Example:
      >>> steps("no-such-place")
      []
    """
    folder = any_path(folder)
    with reached(folder):
        found = list(folder.iterdir()) if folder.is_dir() else []
        found = [path for path in found if re.fullmatch("[0-9]+", path.name) and _is_whole(path)]
    return sorted((int(path.name) for path in found), reverse=True)


def _is_whole(path: AnyPath) -> bool:
    """Whether a step is finished: its directory then gets its name, or in a bucket, a last object."""
    return path.is_dir() if isinstance(path, Path) else (path / "commit_success.txt").exists()


def _absolute(path: str | os.PathLike) -> AnyPath:
    """A path for orbax."""
    if (address(path) or "").startswith("s3:"):
        raise InputError(f"{path}: orbax saves on disks and in gs://, not in s3://; choose another place, and copy it.")
    found = any_path(path)
    return found.absolute() if isinstance(found, Path) else found


class Checkpoints:
    """The checkpoints of a run, in a directory: the latest, and the best.

    A `with` block locks the directory: other processes that enter one are refused until this one ends.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with Checkpoints(folder, config={"k": 4}) as checkpoints:
      ...         checkpoints.save(10, {"x": jnp.arange(3)}, progress={"position": 10}, loss=0.5)
      ...     with Checkpoints(folder, config={"k": 4}) as checkpoints:
      ...         saved = checkpoints.restore({"x": jnp.zeros(3, int)})
      >>> saved.step, saved.state["x"].tolist(), saved.progress
      (10, [0, 1, 2], {'position': 10})
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        config: Any,
        extra: Any = None,
        grows: Collection[str] = (),
        keep: int = 2,
        warn: Callable[[str], None] = lambda text: None,
    ):
        """Open a directory, made if missing.

        Args:
          folder: directory of the checkpoints.
          config: any JSON; a directory can only be resumed with an equal one.
          extra: any JSON to keep with each step, which may differ; `read_manifest` returns it.
          grows: members of the configuration that may have increased.
          keep: number of latest steps to keep, besides the best.
          warn: called with warnings.

        Raises:
          InputError: if the directory was made with another configuration, or by an unknown version.
        """
        self.folder, self._warn, self._keep = _absolute(folder), warn, keep
        self._config, self._grows = json.loads(json.dumps(config, allow_nan=False)), frozenset(grows)
        self._extra = extra
        self._manager: Any = None
        self._held = contextlib.ExitStack()
        self._require_same_run()

    def _require_same_run(self) -> None:
        for step in self.steps():
            try:
                manifest = read_manifest(self.folder / str(step))
            except Exception:  # noqa: BLE001  orbax raises no narrower one for a damaged file; `restore` warns
                continue
            if manifest["version"] != _VERSION:
                by = manifest.get("versions", {}).get("jaxsae", "unknown")
                what = f"is of version {manifest['version']!r}, expected {_VERSION}"
                raise InputError(f"{self.folder / str(step)}: {what}; resume with the jaxsae that wrote it ({by}).")
            self._require_equal(manifest["config"])
            break

    def _require_equal(self, found: Any) -> None:
        got, expected = _members(self._config), _members(found)
        for name in sorted(got | expected):
            least = " or more" if name in self._grows else ""
            if got.get(name) == expected.get(name) or (least and self._config[name] > found.get(name, 0)):
                continue
            what = f"got {name} {got.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}{least}"
            raise InputError(f"{self.folder.parent}: holds another run ({what}); choose another --out, or remove it.")

    def __enter__(self) -> "Checkpoints":
        with contextlib.ExitStack() as held:
            held.enter_context(echoes.suppressed())
            held.enter_context(_owned(self.folder, self._warn))
            held.callback(self._close)
            self._require_same_run()  # again, now that no other process writes there
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    def _close(self) -> None:
        manager, self._manager = self._manager, None
        with _one_line(self.folder):
            if manager is not None:
                manager.close()

    def steps(self) -> list[int]:
        """The steps in the directory, latest first."""
        return steps(self.folder)

    def save(self, step: int, state: Any, *, progress: Any, loss: float | None = None, wait: bool = False) -> None:
        """Save a step in the background, after copying the state; an existing step is left unchanged.

        Args:
          step: its number.
          state: any pytree of arrays, sharded or not, including PRNG keys, or of values that numpy makes arrays of.
          progress: any JSON: the position in the data, and whatever else is needed to resume.
          loss: the step with the lowest one is always kept.
          wait: return only when the step is on disk.

        Raises:
          InputError: if this step, or the one before it, cannot be written; existing steps are kept.
        """
        import orbax.checkpoint as ocp

        if self._manager is None:
            self._manager = self._open()
        state = jax.tree.map(_leaf, state)
        content = {"version": _VERSION, "config": self._config, "versions": versions(), "step": step}
        content |= {"progress": progress, "extra": self._extra}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave({"state": state, "fingerprint": fingerprint(state)}),
            manifest=ocp.args.JsonSave({"content": content, "crc32": _crc32(content)}),
        )
        metrics = None if loss is None or not math.isfinite(loss) else {"loss": loss}
        with _one_line(self.folder):
            if step not in self._manager.all_steps():
                self._manager.save(step, args=args, metrics=metrics, force=True)
            if wait:
                self._manager.wait_until_finished()
                self._manager.check_for_errors()

    def _open(self):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), best]),
            cleanup_tmp_directories=True,
        )
        with _one_line(self.folder):
            return ocp.CheckpointManager(self.folder, options=options)

    def restore(self, like: Any) -> Saved | None:
        """Restore the latest undamaged step, or None if there are no steps; later ones are removed, with a warning.

        With several processes, it is the latest that all of them can read.

        Args:
          like: a pytree of the state's structure, shapes, dtypes and shardings: arrays, or `jax.ShapeDtypeStruct`s.

        Raises:
          InputError: if there are steps, and all are damaged; or if a leaf is of a kind that cannot be saved.
        """
        like = jax.tree.map(_leaf, like)  # refuse what could not be saved before any training
        if self._manager is not None:
            with _one_line(self.folder):
                self._manager.wait_until_finished()
        local_steps, damaged = self.steps(), []
        while (step := max(processes.of_all(local_steps[0] if local_steps else -1))) >= 0:
            local_steps = [other for other in local_steps if other < step]
            found = self._read(self.folder / str(step), like)
            if found is None:
                damaged.append(step)
                continue
            if damaged:
                self._warn(f"{self.folder}: went back to step {step}.")
                for later in damaged if processes.is_primary() else ():
                    remove(self.folder / str(later))
                processes.of_all(0)  # a barrier: no process looks before they are removed
                self._manager = None
            return found
        if damaged:
            raise InputError(f"{self.folder}: every step is damaged; remove it to start over.")
        return None

    def _read(self, path: AnyPath, like: Any) -> Saved | None:
        """Read a step; None unless all processes can read it and its fingerprints match."""
        manifest, found, reason = {}, {}, ""
        with echoes.suppressed():
            try:
                manifest, found = read_manifest(path), _read_state(path, like)
            except Exception as error:  # noqa: BLE001  orbax raises no narrower one for a damaged file
                reason = first_line(error)[:200]
                echoes.free(error)
        if not all(processes.of_all(not reason)):
            reason = reason or "for another process"
        else:  # all processes take part in the sums over their shards
            names = [name for name, _ in jax.tree.leaves_with_path(found["state"])]
            wrong = np.flatnonzero(np.asarray(fingerprint(found["state"])) != np.asarray(found["fingerprint"]))
            reason = _NOT_SAVED.format(jax.tree_util.keystr(names[wrong[0]])) if len(wrong) else ""
        if reason:
            self._warn(f"{path}: is damaged ({reason}).")
            return None
        now = versions()
        others = [f"{name} {old}" for name, old in manifest["versions"].items() if now.get(name) != old]
        if others:
            self._warn(f"{path}: was saved by {', '.join(others)}; results may differ in the last bits.")
        return Saved(manifest["step"], found["state"], manifest["progress"])


@contextlib.contextmanager
def _owned(folder: AnyPath, warn: Callable[[str], None]) -> Iterator[None]:
    """Lock a directory, through the first of several processes."""
    with contextlib.ExitStack() as held:
        with processes.all_or_none():
            if processes.is_primary():
                held.enter_context(owned(folder, warn=warn))
        yield


def _leaf(leaf: Any) -> Any:
    """A leaf for orbax; numpy arrays are copied, since they may change before they are written."""
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "u":  # unsigned, which no format of SAEs has
        leaf = np.array(leaf, leaf.dtype.newbyteorder("="))
    elif not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        leaf = np.array(writable(leaf, "a leaf"))
    whole = not jnp.issubdtype(leaf.dtype, jnp.integer) or jnp.iinfo(leaf.dtype).bits >= 8
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating) or not whole or 0 in leaf.shape:
        raise InputError(
            f"a leaf is {leaf.dtype}{list(leaf.shape)}; a checkpoint holds arrays of real numbers of whole bytes, none "
            "of them empty: leave it out, or keep it in another form."
        )
    return leaf


def _members(config: Any) -> dict[str, str]:
    """The members of a configuration as JSON, to name one that differs."""
    return {name: json.dumps(value) for name, value in (config if isinstance(config, dict) else {"": config}).items()}


def _crc32(content: Any) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """What is saved beside a state: `version`, `config`, `versions`, `step`, `progress` and `extra`.

    Args:
      path: directory of the step.

    Raises:
      ValueError: or another error, if it is damaged.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with Checkpoints(folder, config={"k": 4}) as checkpoints:
      ...         checkpoints.save(1, {"x": jnp.zeros(2)}, progress=0, wait=True)
      ...     read_manifest(f"{folder}/1")["config"]
      {'k': 4}
    """
    import orbax.checkpoint as ocp

    path = _absolute(path)
    alone = _alone()
    handler = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        record = reader.restore(path / "manifest")
    if record["crc32"] != _crc32(record["content"]):
        raise ValueError("its manifest does not match its checksum")
    if record["content"]["step"] != int(path.name):
        raise ValueError(f"its manifest is of step {record['content']['step']}")
    return record["content"]


def _alone() -> Any:
    """Orbax options under which no process waits for the others, since one may fail."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )


def _read_state(path: AnyPath, like: Any) -> Any:
    import orbax.checkpoint as ocp

    expected = {
        "state": jax.tree.map(ocp.utils.to_shape_dtype_struct, like),
        "fingerprint": jax.ShapeDtypeStruct((len(jax.tree.leaves(like)),), jnp.uint32),
    }
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
        found = reader.restore(path / "state", expected)
    for (name, old), new in zip(jax.tree.leaves_with_path(like), jax.tree.leaves(found["state"]), strict=True):
        if (new.shape, new.dtype) != (old.shape, old.dtype):
            raise ValueError(_NOT_SAVED.format(jax.tree_util.keystr(name)))
    return found


def load(path: str | os.PathLike, like: Any, field: str) -> Any:
    """Restore one field of the state of a step, and read nothing else of it.

    Args:
      path: directory of the step, `checkpoints/N`.
      like: the whole state's structure, as for `Checkpoints.restore`.
      field: name of the field, such as `"sae"` of a `TrainState`.

    Raises:
      InputError: if the step is damaged or of another structure.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> state = {"a": jnp.arange(3), "b": jnp.zeros(2)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with Checkpoints(folder, config=None) as checkpoints:
      ...         checkpoints.save(1, state, progress=0, wait=True)
      ...     load(f"{folder}/1", state, "a").tolist()
      [0, 1, 2]
    """
    import orbax.checkpoint as ocp

    path, keys = _absolute(path), [key[0] for key, _ in jax.tree.leaves_with_path(like)]
    part = like[field] if isinstance(like, dict) else getattr(like, field)
    leaves, structure = jax.tree.flatten(jax.tree.map(ocp.utils.to_shape_dtype_struct, part))
    # As dictionaries, as which it is stored: orbax cannot read a part that has classes without arrays, such as `ReLU`.
    names = [tuple(map(ocp.utils.get_key_name, path)) for path, _ in jax.tree.leaves_with_path(part)]
    item: Any = {"state": _nested({(field, *map(str, name)): leaf for name, leaf in zip(names, leaves, strict=True)})}
    item |= {"fingerprint": jax.ShapeDtypeStruct((len(keys),), jnp.uint32)}
    how = ocp.args.PyTreeRestore(
        item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    with echoes.suppressed(), in_one_line(f"{path}: is damaged", "take another step"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())) as reader:
            found = reader.restore(path / "state", how)
        restored = [functools.reduce(operator.getitem, map(str, name), found["state"][field]) for name in names]
        named = [getattr(key, "name", getattr(key, "key", None)) == field for key in keys]
        if (np.asarray(fingerprint(restored)) != np.asarray(found["fingerprint"])[named]).any():
            raise ValueError(_NOT_SAVED.format(f".{field}"))
    return structure.unflatten(map(jnp.asarray, restored))


def _nested(leaves: dict[tuple[str, ...], Any]) -> Any:
    """Dictionaries of dictionaries, of values by their paths."""
    nested: dict[str, Any] = {}
    for (*path, last), leaf in leaves.items():
        functools.reduce(lambda inner, name: inner.setdefault(name, {}), path, nested)[last] = leaf
    return nested


@contextlib.contextmanager
def _one_line(folder: AnyPath) -> Iterator[None]:
    """Turn errors that orbax raises while writing into one-line `InputError`s."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # TensorStore gives the cause last: "Error writing …: Failed writing …: No space left on device [os…]".
        text = first_line(error).partition(" [")[0]
        reason = getattr(error, "strerror", None) or text.rpartition(": ")[2]
        last = next(iter(steps(folder)), None)
        echoes.free(error)
        kept = "no step was saved before" if last is None else f"step {last} is kept, and can be resumed from"
        do = "make room" if isinstance(folder, Path) else "check the network and the credentials"
        raise InputError(f"cannot write {folder}: {reason}; {kept}: {do}.") from error


def fingerprint(tree: Any) -> UInt32[Array, " n"]:
    """A hash of the bits of each leaf, independent of its sharding: a sum of hashes of its elements and their places.

    Any change of a single element changes it.

    Args:
      tree: pytree of arrays.

    Returns:
      `[n]`, one hash per leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = fingerprint([jnp.array([1.0, 2.0]), jnp.array([2.0, 1.0])])
      >>> bool(a == b)
      False
    """
    # 64-bit numpy values, which JAX would round, become pairs of 32 bits, as JAX's own do in `_hash`.
    wide = [isinstance(leaf, np.ndarray | np.generic) and leaf.itemsize == 8 for leaf in jax.tree.leaves(tree)]
    leaves = [
        np.array(leaf, leaf.dtype.newbyteorder("="), order="C")[..., None].view(np.uint32) if halved else leaf
        for leaf, halved in zip(jax.tree.leaves(tree), wide, strict=True)
    ]
    return _fingerprint(leaves)


@jax.jit
def _fingerprint(leaves):
    return jnp.stack([_hash(jnp.asarray(leaf)) for leaf in leaves]) if leaves else jnp.zeros(0, jnp.uint32)


def _hash(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    size = min(leaf.dtype.itemsize, 4)  # wider ones become pairs
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)
    place = sum(
        (jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(_ODD[axis]) for axis in range(bits.ndim)),
        jnp.uint32(1),
    )
    # Each of these maps 32 bits one to one (MurmurHash3's finaliser).
    mixed = bits ^ place
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)
