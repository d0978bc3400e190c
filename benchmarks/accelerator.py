"""All that a few minutes on an accelerator can tell, the most valuable first: `python -m benchmarks accelerator`.

Answers are checked against float64 before anything is timed. Then, a shape at a time: the operations of `kernels` with
block sizes tuned one at a time, the encoder, refits and training steps; the first shape gives the headline. Each part
writes what it found as it goes; one that fails, or for which no time is left, says so, and the next begins.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsae
from benchmarks import cases, clock, judge, kernels, peers, refine, train
from benchmarks.clock import say
from benchmarks.kernels import Case, Data
from jaxsae.least_squares.kernels import choice, tuning

SIZES = {
    "tiny": (Case(32, 256, 4, 64),),
    "full": (
        Case(768, 131072, 32, 16384),
        Case(2304, 65536, 64, 8192),
        Case(4096, 131072, 128, 4096),
        Case(768, 131072, 32, 16384, "bfloat16"),
        Case(2304, 65536, 64, 8192, "bfloat16"),
        Case(4096, 131072, 128, 4096, "bfloat16"),
    ),
}
SETS = 3  # of inputs, in turn: one alone might stay in a cache
PEERS = ("torch PG, Nesterov", "jaxopt PG on G", "jaxnnls", "optax nnls")
_ROWS = 64  # that are compared with float64
_TUNING = 20.0  # seconds to find a peer's settings in
_ENCODED = 4096  # rows at most where all their pre-activations are in memory

Row = dict[str, Any]


class Part(NamedTuple):
    """Something to measure: its name, the seconds that it is likely to take on an accelerator, and what yields rows."""

    name: str
    seconds: float
    run: Callable[[], Iterator[Row]]


class Ceilings(NamedTuple):
    """What the device can do: bytes a second of a copy, and operations a second of a large product."""

    copy: float
    matmul: float


def run(size: str, minutes: float, out: Path) -> Iterator[Row]:
    """Measure part after part until the time is over; rows as they come."""
    begin, ceilings = time.perf_counter(), {}

    def left() -> float:
        return 60 * minutes - (time.perf_counter() - begin)

    for part in parts(SIZES[size], out, ceilings):
        if left() < (part.seconds if size != "tiny" else 0):
            yield {"part": part.name, "note": f"skipped: {left():.0f} s left, it takes some {part.seconds:.0f}"}
            continue
        say(f"{part.name} ({left():.0f} s left)")
        try:
            for row in part.run():
                yield {"part": part.name, **_finite(row)}
                if left() <= 0:
                    yield {"part": part.name, "note": "cut short: no time left"}
                    break
        except Exception as error:  # noqa: BLE001 whatever it is, the other parts are still worth their time
            message = str(error).strip() or "no message"
            yield {
                "part": part.name,
                "failed": True,
                "note": f"{type(error).__name__}: {message.splitlines()[0][:300]}",
            }


def _finite(row: Row) -> Row:
    """JSON has no NaN and no infinity: what has them is wrong, and has null."""
    lost = [name for name, x in row.items() if isinstance(x, float) and not math.isfinite(x)]
    return row | dict.fromkeys(lost) | ({"ok": False, "note": f"{', '.join(lost)}: not finite"} if lost else {})


def parts(shapes: tuple[Case, ...], out: Path, ceilings: dict[str, Ceilings]) -> Iterator[Part]:
    """The parts in the order of their worth."""
    first = shapes[0]
    yield Part("ceilings", 10, lambda: _ceilings(ceilings))
    checked = first._replace(B=min(first.B, 256))
    yield Part("checks", 60, lambda: checks(checked))
    for case in shapes:
        name, costly = f"d {case.d}, m {case.m}, k {case.k}, {case.dtype}", case.d / 768
        yield Part(f"operations: {name}", 60 * costly, lambda case=case: operations(case, out, ceilings["all"]))
        yield Part(f"refits: {name}", 30 * costly, lambda case=case: refits(case, ceilings["all"]))
        yield Part(f"training: {name}", 20 * costly, lambda case=case: steps(case))
        if case is first:
            yield Part("peers", 100, lambda: rivals(first))


# --- Parts


def _ceilings(found: dict[str, Ceilings]) -> Iterator[Row]:
    found["all"] = Ceilings(clock.copy_bandwidth(), clock.matmul_peak())
    yield {"what": "copy", "bytes_per_s": found["all"].copy}
    yield {"what": "float32 product", "flops_per_s": found["all"].matmul}
    a = jnp.ones((4096, 4096), jnp.bfloat16)
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    yield {"what": "bfloat16 product", "flops_per_s": 2 * 4096**3 / _seconds(multiply, [(a, a)])}


def checks(case: Case) -> Iterator[Row]:
    """Answers on fresh random inputs against float64, with rows and slots that are awkward; memory full of NaN."""
    seed = time.time_ns() % 2**31
    x = _awkward(kernels.data(case, seed), case)
    exact = Float64(x)
    for op in kernels.OPS:
        for implementation in ("xla", "pallas"):
            row = {"what": f"{op}, {implementation}", "seed": seed}
            try:
                found = _poisoned(kernels.operation(op, case, implementation), x)
            except NotImplementedError as error:
                yield {**row, "note": str(error)}
                continue
            error, bound = exact.error(op, found)
            yield {**row, "error": error, "ok": error <= bound}
    code = jaxsae.SparseCode(x.z0, x.indices, case.m)
    refitted, info = _poisoned(jaxsae.refit, x.D, x.y, code)
    error = exact.kkt(refitted.values)
    yield {"what": "refit, default", "error": error, "ok": error <= judge.KKT}
    nan_row = int(np.flatnonzero(np.isnan(np.asarray(x.y)).any(1))[0])
    ok = bool(info.status[nan_row] == jaxsae.Status.NONFINITE and jnp.all(refitted.values[nan_row] == x.z0[nan_row]))
    yield {"what": "a row of NaN comes back, with its status", "ok": ok}
    yield _slopes(x, code)
    for k in (16, 17):
        yield _top_k(k)


def operations(case: Case, out: Path, ceilings: Ceilings) -> Iterator[Row]:
    """Each operation by XLA and by its kernel, with the best block sizes found by changing one at a time."""
    platform, device = choice.default_device()
    inputs = [(x,) for x in _sets(case)]
    for op in kernels.OPS:
        by_xla = _seconds(kernels.operation(op, case, "xla"), inputs)
        yield _rate(f"{op}, xla", case, by_xla, ceilings, op)
        if platform is None:
            continue
        tried = []
        for options in kernels.one_at_a_time(platform, op):
            try:
                with tuning.forced(options):
                    jax.clear_caches()
                    tried.append((_seconds(kernels.operation(op, case, "pallas"), inputs, enough=0.03), options))
            except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
                yield {"what": f"{op}, pallas", "options": options, "note": str(error).splitlines()[0][:300]}
        if tried:
            seconds, options = min(tried, key=lambda each: each[0])
            _keep(out, kernels.entry(platform, device, op, case, options=options, speedup=by_xla / seconds))
            row = _rate(f"{op}, pallas", case, seconds, ceilings, op)
            yield {**row, "options": options, "over_xla": by_xla / seconds, "tried": len(tried)}


def refits(case: Case, ceilings: Ceilings) -> Iterator[Row]:
    """The encoder with top-k, and `refine` after it; refits by each solver, as this table of block sizes has them."""
    keys = jax.random.split(jax.random.key(0), 1 + SETS)
    sae = jaxsae.init(keys[0], d=case.d, m=case.m, activation=jaxsae.TopK(case.k))
    sae = jax.tree.map(lambda leaf: leaf.astype(case.dtype), sae)
    rows = min(case.B, _ENCODED)
    xs = [(sae, jax.random.normal(key, (rows, case.d)).astype(case.dtype)) for key in keys[1:]]
    encoding = _seconds(jaxsae.encode, xs)
    yield {**_rows("encode", rows, encoding), "flops_per_s": 2 * rows * case.m * case.d / encoding}
    refining = _seconds(jaxsae.refine, xs)
    yield {**_rows("refine: encode and refit", rows, refining), "over_encode": refining / encoding}
    del sae, xs
    sets = _sets(case)
    inputs = [(x.D, x.y, jaxsae.SparseCode(x.z0, x.indices, case.m)) for x in sets]
    exact = Float64(sets[0])
    for name, solver in refine.SOLVERS.items():
        solve = functools.partial(jaxsae.refit, solver=solver)
        row = _rate(f"refit, {name}", case, _seconds(solve, inputs), ceilings, "refit_fused")
        error = exact.kkt(jax.jit(solve)(*inputs[0])[0].values)
        yield {**row, "error": error, "ok": error <= judge.KKT}


def steps(case: Case) -> Iterator[Row]:
    """A training step: ours, and the same objective by autodiff of the dense code."""
    rows, by = min(case.B, _ENCODED), {}
    tx = jaxsae.train.default_optimizer(train.RATE)
    for name, loss in {"sparse": jaxsae.train.objectives.Objective(), "dense autodiff": train.dense}.items():
        sae = jaxsae.init(jax.random.key(0), d=case.d, m=case.m, activation=jaxsae.TopK(case.k))
        state = jaxsae.train.init_state(jax.tree.map(lambda leaf: leaf.astype(case.dtype), sae), tx)
        del sae
        step = jaxsae.train.make_step(loss, tx)
        xs = [jax.random.normal(jax.random.key(seed), (rows, case.d)).astype(case.dtype) for seed in range(SETS)]
        state, _ = jax.block_until_ready(step(state, xs[0]))
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            for x in xs:
                state, _ = step(state, x)
            jax.block_until_ready(state)
            taken.append((time.perf_counter() - start) / len(xs))
        by[name] = statistics.median(taken)
        yield {**_rows(f"step, {name}", rows, by[name]), "over_sparse": by[name] / by["sparse"]}
        del state


def rivals(case: Case) -> Iterator[Row]:
    """Other libraries' solvers at the headline's shape, tuned to the gate of `refine`, with ours timed beside each."""
    problem = cases.random_problem(cases.Case("peers", case.d, case.m, case.k, min(case.B, 4096), 0.0))
    referee = judge.Judge(problem)
    ours = refine.ours("refit, default", None, problem, referee)
    for peer in (peer for peer in peers.PEERS if peer.name in PEERS):
        try:
            best = refine.tune(peer, problem, referee, seconds=_TUNING)
        except ImportError as error:
            yield {"what": peer.name, "note": clock.name_missing(error)}
            continue
        both = zip((best, ours), clock.timings([best.call, ours.call]), strict=True)
        theirs, own = (_rows(each.name, len(each.rows), statistics.median(taken)) for each, taken in both)
        gate = {} if best.verdict.met else {"note": "gate not met"}
        yield {**theirs, "setting": best.setting, "error": best.verdict.worst_kkt, **gate}
        yield {**own, "error": ours.verdict.worst_kkt, "ok": ours.verdict.met}


# --- What parts share


def _seconds(f: Callable[..., Any], inputs: list[tuple], enough: float = 0.1) -> float:
    """Seconds a call by the device's own pace: many calls are under way at once, over all inputs; a median of five."""
    program = jax.jit(f).lower(*inputs[0]).compile()
    for each in inputs:
        jax.block_until_ready(program(*each))
    one = clock.clock(lambda: program(*inputs[0]))
    count = max(1, min(20, round(enough / one / len(inputs)))) * len(inputs)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        done = [program(*inputs[number % len(inputs)]) for number in range(count)][-1]
        jax.block_until_ready(done)  # a device runs its programs in order
        taken.append((time.perf_counter() - start) / count)
    return statistics.median(taken)


def _rows(what: str, rows: int, seconds: float) -> Row:
    return {"what": what, "rows": rows, "seconds": seconds, "rows_per_s": rows / seconds}


def _rate(what: str, case: Case, seconds: float, ceilings: Ceilings, op: str) -> Row:
    """With the share of the ceilings that one read of the atoms, and the products, would reach."""
    bytes_, flops = kernels.cost(op, case)
    of_copy, of_matmul = bytes_ / seconds / ceilings.copy, flops / seconds / ceilings.matmul
    return {**_rows(what, case.B, seconds), "of_copy_bandwidth": of_copy, "of_matmul_peak": of_matmul}


def _sets(case: Case) -> list[Data]:
    """Inputs to go through in turn, of the same atoms."""
    first = kernels.data(case)
    return [first, *(kernels.rows(case, first.D, seed) for seed in range(1, SETS))]


def _keep(out: Path, entry: Row) -> None:
    """Add to the table of block sizes beside the report, which is in force from here on."""
    mine = out / tuning.TABLE.name
    same = ("op", "platform", "device", "d", "k", "dtype")
    rows = [row for row in tuning.table() if any(row[name] != entry[name] for name in same)]
    mine.parent.mkdir(parents=True, exist_ok=True)
    kernels.write_table(mine, [*rows, entry])
    tuning.TABLE = mine
    tuning.table.cache_clear()
    jax.clear_caches()


def _awkward(x: Data, case: Case) -> Data:
    """Rows with an atom twice, an index of −1, unused slots, and NaN in the target."""
    indices = x.indices.at[0, -1].set(x.indices[0, 0]).at[1, 0].set(-1).at[2, case.k // 2 :].set(case.m)
    return x._replace(indices=indices, y=x.y.at[3].set(jnp.nan), z0=jnp.where(indices == case.m, 0, x.z0))


def _poisoned(f: Callable[..., Any], *arguments: Any) -> Any:
    """An answer in memory that held NaN before: what is not written shows."""
    program = jax.jit(f).lower(*arguments).compile()
    memory = program.memory_analysis()
    size = max(memory.output_size_in_bytes + memory.temp_size_in_bytes if memory else 0, 4)
    jnp.full(size // 4, jnp.nan).block_until_ready().delete()
    return jax.block_until_ready(program(*arguments))


def _slopes(x: Data, code: jaxsae.SparseCode) -> Row:
    """The gradient of the least squares in the dictionary, which by the envelope theorem is `−z rᵀ`."""
    good = jnp.arange(4, min(len(x.y), 4 + _ROWS))
    y, code = x.y[good], jax.tree.map(lambda leaf: leaf[good], code)

    def least(D):
        refitted, _ = jaxsae.refit(D, y, code)
        return 0.5 * jnp.sum((y - jaxsae.codes.decode(D, refitted)) ** 2), refitted.values

    (_, z), slope = jax.jit(jax.value_and_grad(least, has_aux=True))(x.D)
    D, z, indices = (np.asarray(each, np.float64) for each in (x.D, z, code.indices))
    atoms = D[indices.astype(int)]
    r = np.asarray(y, np.float64) - np.einsum("nk,nkd->nd", z, atoms)
    wanted = np.zeros_like(D)
    np.add.at(wanted, indices.astype(int), -z[:, :, None] * r[:, None, :])
    error = float(np.linalg.norm(np.asarray(slope, np.float64) - wanted) / np.linalg.norm(wanted))
    return {"what": "gradient of a refit's error", "error": error, "ok": error <= 1e-3}


def _top_k(k: int, rows: int = 256, m: int = 2048) -> Row:
    """One row of −NaN among others: XLA has given wrong rows beside it on GPUs (openxla/xla #48119)."""
    x = np.random.default_rng(k).normal(size=(rows, m)).astype(np.float32)
    x[17] = np.copysign(np.nan, -1)
    found = np.sort(np.asarray(jax.jit(functools.partial(jaxsae.codes.top_k, k=k))(jnp.asarray(x))[1]), axis=1)
    wanted = np.sort(np.argsort(-x, axis=1, kind="stable")[:, :k], axis=1)
    wrong = int((found != wanted).any(1)[np.arange(rows) != 17].sum())
    return {"what": f"top_k, k {k}, beside a row of −NaN", "error": wrong, "ok": wrong == 0}


class Float64:
    """The right answers for some rows, in numpy on the host."""

    def __init__(self, x: Data):
        """Gather the atoms of the first rows; rows that are not finite are left out of every comparison."""
        self.x, self.rows = x, np.arange(min(len(x.y), _ROWS))
        self.m = len(x.D)
        indices = np.asarray(x.indices)
        self.used = (indices >= 0) & (indices < self.m)
        self.atoms = self._gather(indices[self.rows], self.used[self.rows])
        self.y = np.asarray(x.y, np.float64)
        self.good = np.all(np.isfinite(self.y), axis=1)

    def _gather(self, indices: np.ndarray, used: np.ndarray) -> np.ndarray:
        atoms = np.asarray(self.x.D[np.clip(indices, 0, self.m - 1)].astype(jnp.float32), np.float64)
        return np.where(used[:, :, None], atoms, 0)

    def kkt(self, values: jax.Array) -> float:
        """The worst relative KKT residual of values `z ≥ 0`."""
        z, rows = np.asarray(values, np.float64)[self.rows] * self.used[self.rows], self.rows
        y = np.nan_to_num(self.y[rows])
        slope = -np.einsum("nkd,nd->nk", self.atoms, y - np.einsum("nk,nkd->nd", z, self.atoms))
        violation = np.where(z > 0, np.abs(slope), np.where(z == 0, np.maximum(-slope, 0), np.inf)).max(1)
        size = np.linalg.norm(self.atoms, axis=2).max(1) * np.linalg.norm(y, axis=1)
        return float(np.max((violation / np.where(size > 0, size, 1))[self.good[rows]]))

    def error(self, op: str, found: Any) -> tuple[float, float]:
        """How far an operation's answer is off, relatively, and how far it may be."""
        rows, good = self.rows, self.good[self.rows]
        if op == "refit_fused":
            return self.kkt(found[0]), judge.KKT
        if op == "gather_gram":
            wanted = (
                np.einsum("nid,njd->nij", self.atoms, self.atoms),
                np.einsum("nid,nd->ni", self.atoms, self.y[rows]),
            )
            pairs = [(np.asarray(a, np.float64)[rows][good], b[good]) for a, b in zip(found, wanted, strict=True)]
        elif op == "decode":
            z = np.where(self.used, np.asarray(self.x.z0, np.float64), 0)[rows]
            pairs = [(np.asarray(found, np.float64)[rows][good], np.einsum("nk,nkd->nd", z, self.atoms)[good])]
        else:
            pairs = [self._scattered(found)]
        return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs), 1e-5

    def _scattered(self, found: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Of latents that no row of NaN touches, those that the first rows use."""
        indices, z = np.asarray(self.x.indices), np.asarray(self.x.z0, np.float64)
        spoiled = np.unique(indices[~self.good][self.used[~self.good]])
        some = np.setdiff1d(np.unique(indices[self.rows][self.used[self.rows]]), spoiled)[:1024]
        row, slot = np.nonzero(np.isin(indices, some) & self.used & self.good[:, None])
        wanted = np.zeros((len(some), self.y.shape[1]))
        np.add.at(wanted, np.searchsorted(some, indices[row, slot]), z[row, slot, None] * self.y[row])
        return np.asarray(found[some], np.float64), wanted


def wrong(rows: list[Row]) -> list[Row]:
    """What failed, or is not what float64 says."""
    return [row for row in rows if row.get("failed") or row.get("ok") is False]


def markdown(report: Row, machine: str) -> list[str]:
    """What was found, a line each; what is wrong or failed stands first."""
    rows = report["rows"]
    bad = wrong(rows)
    lines = [f"{machine}; {len(bad)} of {len(rows)} lines failed."]
    lines += [f"* {row['part']}, {row.get('what', '')}: {row.get('note') or row.get('error')}" for row in bad]
    table = ["| part | what | ms | rows/s | of copies | of matmul | over XLA, dense or encode | error | |"]
    table.append("|---|---|" + "--:|" * 6 + "---|")
    forms = {"rows_per_s": "{:,.0f}", "of_copy_bandwidth": "{:.1%}", "of_matmul_peak": "{:.1%}"}
    for row in rows:
        cells = ["" if row.get("seconds") is None else f"{1e3 * row['seconds']:.3f}"]
        cells += ["" if row.get(name) is None else form.format(row[name]) for name, form in forms.items()]
        ratio = next((row[name] for name in ("over_xla", "over_sparse", "over_encode") if row.get(name)), None)
        cells += ["" if ratio is None else f"{ratio:.2f}", "" if row.get("error") is None else f"{row['error']:.1e}"]
        note = row.get("note") or {True: "ok", False: "WRONG"}.get(row.get("ok"), "")
        for name, unit in (("bytes_per_s", "GB/s"), ("flops_per_s", "GFLOP/s")):
            note = note or (f"{row[name] / 1e9:,.0f} {unit}" if name in row else "")
        table.append("| " + " | ".join([row["part"], row.get("what", ""), *cells, note]) + " |")
    return ["\n".join(lines), "\n".join(table)]
