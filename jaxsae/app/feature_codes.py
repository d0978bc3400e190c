"""Codes of the rows on which some latents fire, refined, in one pass over the data; on disk while they are needed.

about.json   what they are codes of; those of anything else are thrown away
00000.npz    a part of the rows, in order: it exists once it is whole, so an interrupted pass resumes after the last
"""

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsae._core import processes
from jaxsae._core.files import InputError, atomic_file, remove
from jaxsae._core.linalg import widen
from jaxsae.autoencoder import stream
from jaxsae.autoencoder.sae import SAE
from jaxsae.codes import SparseCode
from jaxsae.data import Rows, fingerprint

_TOGETHER = 8  # chunks in a part
_PART = 64 << 20  # bytes of a part, about
_SLOTS = 1 << 22  # of padded codes, in memory together


class Part(NamedTuple):
    """Codes of consecutive rows.

    Attributes:
      first, last: the first row, and the one after the last.
      rows: `[r]`, numbers of those on which a wanted latent fires.
      l0: `[r]`, how many latents fire on each.
      indices: `[e]`, these latents, of one row after the other.
      values: `[e]`, the encoder's.
      refined: `[e]`, refined.
      nonfinite: numbers of rows with NaN or Inf.
      fired: `[f]`, all latents that fire on any row of the part.
      fires: `[f]`, on how many.
      largest: `[f]`, their largest magnitude.
      extremes: `[2]`, the smallest and largest number in finite rows; NaN if they were not asked for.
    """

    first: np.ndarray
    last: np.ndarray
    rows: np.ndarray
    l0: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    refined: np.ndarray
    nonfinite: np.ndarray
    fired: np.ndarray
    fires: np.ndarray
    largest: np.ndarray
    extremes: np.ndarray


class Codes(NamedTuple):
    """All parts of a pass, on disk, and sums over them.

    Attributes:
      folder: where they are.
      m: number of latents.
      parts: how many.
      fires: `[m]`, on how many rows each latent does.
      largest: `[m]`, its largest magnitude.
      nonfinite: numbers of the rows with NaN or Inf, in order.
      extremes: the smallest and the largest number in finite rows.
    """

    folder: Path
    m: int
    parts: int
    fires: np.ndarray
    largest: np.ndarray
    nonfinite: np.ndarray
    extremes: tuple[float, float]

    def batches(self) -> Iterator[tuple[np.ndarray, SparseCode, np.ndarray]]:
        """Numbers of rows `[n]`, their code `[n k]` and the refined values `[n k]`; the same ones every time."""
        for number in range(self.parts):
            part = _read(self.folder, number)
            ends = np.cumsum(part.l0)
            step = max(1, _SLOTS // int(part.l0.max(initial=1)))
            for at in range(0, len(part.rows), step):
                l0, begin = part.l0[at : at + step], ends[at - 1] if at else 0
                used = np.arange(l0.max()) < l0[:, None]
                some = slice(begin, begin + int(l0.sum()))
                found = np.zeros(used.shape, part.values.dtype), np.full(used.shape, self.m, np.int32)
                refined = np.zeros_like(found[0])
                for whole, flat in zip((*found, refined), (part.values, part.indices, part.refined), strict=True):
                    whole[used] = flat[some]
                code = SparseCode(jnp.asarray(found[0]), jnp.asarray(found[1]), self.m)
                yield part.rows[at : at + step], code, refined


def collect(
    sae: SAE,
    rows: Rows,
    folder: Path,
    *,
    wanted: np.ndarray,
    extremes: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Codes | None:
    """Encode all rows, refine those on which a wanted latent fires, and keep their codes.

    Args:
      sae: the autoencoder.
      rows: `[n d]`.
      folder: to keep them in; what is there already of the same pass is not computed again.
      wanted: `[m]` bool.
      extremes: whether to look for the smallest and the largest number.
      progress: called with the number of rows just done.

    Returns:
      The codes; None in all processes but the first.
    """
    weights = 0
    for leaf in jax.tree.leaves(sae):
        for _, piece in processes.pieces(leaf):
            weights = zlib.crc32(np.ascontiguousarray(piece).tobytes(), weights)
    about = {"sae": [str(jax.tree.structure(sae)), weights], "data": fingerprint(rows), "extremes": extremes}
    about["wanted"] = zlib.crc32(np.packbits(wanted).tobytes())
    with processes.all_or_none():
        begun = _begun(folder, about) if processes.is_primary() else None
    first, parts, capacity = processes.gather(begun)[0]
    capacity = capacity or sae.activation.slots or stream.max_l0(sae, rows)
    with processes.all_or_none():
        if not parts and processes.is_primary():
            with atomic_file(folder / "about.json") as temporary:
                temporary.write_text(json.dumps({"of": about, "capacity": capacity}))
    progress(first)
    pending: list[Part] = []
    for chunk in stream.encode_chunks(sae, rows, capacity=capacity, first=first):
        pending.append(_part(sae, chunk, wanted, extremes))
        progress(len(chunk.x))
        last = chunk.start + len(chunk.x) == len(rows)
        size = sum(array.nbytes for part in pending for array in part)
        if last or len(pending) == _TOGETHER or size > _PART:
            with processes.all_or_none():
                if processes.is_primary():
                    _write(folder, parts, pending)
            pending, parts = [], parts + 1
    return _summed(folder, sae.m, parts) if processes.is_primary() else None


def _begun(folder: Path, about: dict[str, Any]) -> tuple[int, int, int | None]:
    """The row to begin at, the number of parts that are there, and the capacity of their codes."""
    record = folder / "about.json"
    if record.is_file():
        try:
            known = json.loads(record.read_text())
            number, first = 0, 0
            while (folder / f"{number:05d}.npz").is_file():
                first, number = int(_read(folder, number).last), number + 1
            if known["of"] == about:
                return first, number, known["capacity"]
        except (ValueError, KeyError, TypeError, OSError, InputError):
            pass  # damaged, so of no use
    remove(folder)
    return 0, 0, None


def _read(folder: Path, number: int) -> Part:
    with np.load(folder / f"{number:05d}.npz", allow_pickle=False) as archive:
        return Part(**{name: archive[name] for name in Part._fields})


def _write(folder: Path, number: int, pending: list[Part]) -> None:
    whole = {name: np.concatenate([getattr(part, name) for part in pending]) for name in Part._fields[2:8]}
    fired, place = np.unique(np.concatenate([part.fired for part in pending]), return_inverse=True)
    fires, largest = np.zeros(len(fired), np.int64), np.zeros(len(fired))
    np.add.at(fires, place, np.concatenate([part.fires for part in pending]))
    np.maximum.at(largest, place, np.concatenate([part.largest for part in pending]))
    low, high = zip(*(part.extremes for part in pending), strict=True)
    extremes = np.array([np.fmin.reduce(low), np.fmax.reduce(high)])
    sums = {"fired": fired, "fires": fires, "largest": largest, "extremes": extremes}
    with atomic_file(folder / f"{number:05d}.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, first=pending[0].first, last=pending[-1].last, **whole, **sums)


def _summed(folder: Path, m: int, parts: int) -> Codes:
    fires, largest, nonfinite, extremes = np.zeros(m, np.int64), np.zeros(m), [np.zeros(0, np.int64)], []
    for number in range(parts):
        part = _read(folder, number)
        fires[part.fired] += part.fires
        largest[part.fired] = np.maximum(largest[part.fired], part.largest)
        nonfinite.append(part.nonfinite)
        extremes.append(part.extremes)
    low, high = zip(*extremes, strict=True)
    found = float(np.fmin.reduce(low)), float(np.fmax.reduce(high))
    return Codes(folder, m, parts, fires, largest, np.concatenate(nonfinite), found)


def _part(sae: SAE, chunk: stream.Coded, wanted: np.ndarray, extremes: bool) -> Part:
    """The codes of a chunk."""
    values, indices = np.asarray(widen(chunk.code.values)), np.asarray(chunk.code.indices)
    used = (indices >= 0) & (indices < sae.m)
    finite = np.asarray(_finite(chunk.x)) & (np.isfinite(values) | ~used).all(axis=1)
    active = used & (values != 0) & finite[:, None]
    only = np.flatnonzero((active & np.append(wanted, False)[np.where(used, indices, sae.m)]).any(axis=1))
    # Whole blocks, since every other size would be compiled anew.
    others = np.setdiff1d(np.flatnonzero(finite), only, assume_unique=True)[: -len(only) % stream.BLOCK]
    refined = np.zeros_like(values)
    for block in stream.refine_chunk(sae, chunk, only=np.concatenate([only, others])):
        found = np.asarray(block.refined.values)[:, : values.shape[1]]
        refined[block.rows - chunk.start, : found.shape[1]] = found
    kept, each = active[only], indices[active]
    fires, largest = np.bincount(each, minlength=sae.m), np.zeros(sae.m)
    np.maximum.at(largest, each, np.abs(values[active]))
    fired = np.flatnonzero(fires)
    return Part(
        first=np.asarray(chunk.start),
        last=np.asarray(chunk.start + len(values)),
        rows=chunk.start + only,
        l0=kept.sum(axis=1),
        indices=indices[only][kept],
        values=values[only][kept],
        refined=refined[only][kept],
        nonfinite=chunk.start + np.flatnonzero(~finite),
        fired=fired,
        fires=fires[fired],
        largest=largest[fired],
        extremes=np.asarray(_extremes(chunk.x)) if extremes else np.full(2, np.nan),
    )


@jax.jit
def _finite(x):
    return jnp.isfinite(x).all(axis=1)


@jax.jit
def _extremes(x):
    finite = jnp.isfinite(x).all(axis=1, keepdims=True)
    low, high = jnp.min(jnp.where(finite, x, jnp.inf)), jnp.max(jnp.where(finite, x, -jnp.inf))
    return jnp.where(low <= high, jnp.stack([low, high]), jnp.nan)
