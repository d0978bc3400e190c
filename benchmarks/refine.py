"""Time refits, ours and others', tuned to one gate, with the gather and without compilation."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxsae
from benchmarks import cases, peers
from benchmarks.clock import COPIED, SIDE, clock, copying, multiplying, name_missing, say, timings
from benchmarks.judge import Judge, Verdict, padded
from jaxsae._core.files import InputError

SOLVERS: dict[str, Any] = {
    "jaxsae (default)": None,
    "ConjugateGradient": jaxsae.ConjugateGradient(),
    "BlockPivoting": jaxsae.BlockPivoting(),
    "FISTA": jaxsae.FISTA(),
    "ProjectedGradient": jaxsae.ProjectedGradient(),
}
COLUMNS = (
    *("case", "kind", "solver", "setting", "rows", "rows_per_s", "quartiles", "compile_s"),
    *("worst_kkt", "kkt_999", "added_nmse", "added_nmse_rows", "gate_met"),
    *("scratch_bytes", "time_over_floor", "time_over_encode", "note", "tried"),
)
_TUNING = 60.0  # seconds for the search of a peer's settings
_LONG = 3.0  # seconds of a run, beyond which it gets fewer rows
_FEWEST = 64


class Speeds(NamedTuple):
    """The machine's speeds in the same rounds as the refits."""

    bytes_per_s: float  # of a large copy, read and written
    flops_per_s: float  # of a product of large matrices


class Run(NamedTuple):
    """A solver with its settings, judged, and ready to be timed."""

    name: str
    kind: str  # ours, published or baseline
    setting: dict[str, Any]
    rows: np.ndarray
    call: Callable[[], Any]
    verdict: Verdict
    seconds: float  # by a quick look
    compile_s: float | None
    scratch: int | None  # bytes
    tried: list[dict[str, Any]]

    def rank(self) -> tuple:
        """Runs that meet the gate first, the fastest of them; the others by distance from it."""
        return (not self.verdict.met, self.seconds / len(self.rows) if self.verdict.met else self.verdict.objective_gap)


def run(size: str, *, with_peers: bool, real: bool) -> Iterator[tuple[dict, list[dict]]]:
    """Measure every solver on every case of a size; a case's description and its rows of the table, as they come."""
    for make in cases.problems(size, real=real):
        try:
            problem = make()
        except InputError as error:
            yield {"case": "trained ReLU"}, [_row(case="trained ReLU", note=str(error))]
            continue
        yield measure(problem, with_peers=with_peers)


def measure(problem: cases.Problem, *, with_peers: bool) -> tuple[dict, list[dict]]:
    """Measure every solver on one problem."""
    say(f"{problem.name}: optimum of the sample")
    judge = Judge(problem)
    runs = [ours(name, solver, problem, judge) for name, solver in SOLVERS.items()]
    missing = []
    for peer in peers.PEERS if with_peers else ():
        try:
            runs.append(tune(peer, problem, judge))
            say(f"{problem.name}: {peer.name} {runs[-1].setting}, {runs[-1].verdict.objective_gap:.2g} times the gate")
        except ImportError as error:
            missing.append(_row(case=problem.name, kind=peer.kind, solver=peer.name, note=name_missing(error)))

    say(f"{problem.name}: timing")
    encode = jax.jit(functools.partial(jaxsae.encode, capacity=problem.code.indices.shape[1]))
    encode, *_ = _compile(encode, problem.sae, problem.x)
    seconds = timings([copying(), multiplying(), encode, *(each.call for each in runs)])
    copy, multiply, encode_seconds = map(statistics.median, seconds[:3])
    speeds = Speeds(2 * COPIED / copy, 2 * SIDE**3 / multiply)
    encode_seconds /= len(problem.y)
    active = np.asarray(problem.code.mask.sum(axis=1))
    table = []
    for each, taken in zip(runs, seconds[3:], strict=True):
        low, median, high = statistics.quantiles(taken, n=4)
        count = len(each.rows)
        table.append(
            _row(
                case=problem.name,
                kind=each.kind,
                solver=each.name,
                setting=each.setting,
                rows=count,
                rows_per_s=count / median,
                quartiles=[count / high, count / low],
                compile_s=each.compile_s,
                **each.verdict._asdict(),
                gate_met=each.verdict.met,
                scratch_bytes=each.scratch,
                time_over_floor=median / floor(active[each.rows], problem.y.shape[1], speeds),
                time_over_encode=median / count / encode_seconds,
                note=judge.missing,
                tried=each.tried,
            )
        )
    return problem.describe() | {"encode_rows_per_s": 1 / encode_seconds, **speeds._asdict()}, table + missing


def floor(active: np.ndarray, d: int, speeds: Speeds) -> float:
    """Least seconds of a refit: `Σ k` float32 atoms `[d]` copied, and `Σ 2k²d` operations for their products."""
    active = active.astype(np.float64)
    return 2 * 4 * d * active.sum() / speeds.bytes_per_s + 2 * d * (active**2).sum() / speeds.flops_per_s


def _row(**known: Any) -> dict[str, Any]:
    # JSON has no NaN or infinity: null for a solver that diverged.
    finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in known.items()}
    return dict.fromkeys(COLUMNS) | finite


# --- Making runs


def ours(name: str, solver: Any, problem: cases.Problem, judge: Judge) -> Run:
    """A solver of this library, compiled, judged and ready to be timed."""
    rows = np.arange(len(problem.y))
    call, compile_s, scratch = _compile(jax.jit(jaxsae.refit), problem.sae.W_dec, problem.y, problem.code, solver)
    verdict = judge(np.asarray(call()[0].values), rows)
    return Run(name, "ours", {}, rows, call, verdict, math.nan, compile_s, scratch, [])


def _compile(f: Any, *args: Any) -> tuple[Callable[[], Any], float, int | None]:
    """A jitted function bound to its arguments, the seconds its compilation took, and the scratch it needs."""
    start = time.perf_counter()
    compiled = f.lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return functools.partial(compiled, *args), seconds, memory and memory.temp_size_in_bytes


def tune(peer: peers.Peer, problem: cases.Problem, judge: Judge, seconds: float = _TUNING) -> Run:
    """Find the settings of a peer that meet the gate fastest; if none does, those that come closest.

    The first variant climbs the ladder of efforts to the gate, the others continue from there, and the fastest then
    tries half a rung less. If a run takes long, the next ones have fewer rows.
    """
    solve = peer.load()
    deadline = time.perf_counter() + seconds
    tried: list[Run] = []
    rows = judge.rows[cases.evenly(len(judge.rows), peer.most_rows)] if peer.most_rows else np.arange(len(judge.y))
    arrays = _arrays(peer, problem, rows)

    def attempt(variant: dict[str, Any], effort: int | float) -> bool:
        nonlocal rows, arrays
        # Chunks of one size: a remainder would need a second program.
        chunk = {"chunk": math.gcd(variant["chunk"], len(rows))} if "chunk" in variant else {}
        setting = {**variant, **chunk, "effort": effort}
        for each in tried:
            if each.setting == setting:
                return each.verdict.met
        tried.append(_attempt(peer, solve, arrays, rows, judge, setting))
        if tried[-1].seconds > _LONG and len(rows) > _FEWEST:
            rows = judge.rows[cases.evenly(len(judge.rows), max(_FEWEST, len(rows) // 4))]
            arrays = _arrays(peer, problem, rows)
        return tried[-1].verdict.met

    reached = 0
    for variant in peer.variants:
        for rung in range(reached, len(peer.efforts)):
            if tried and time.perf_counter() > deadline:
                break
            if attempt(variant, peer.efforts[rung]):
                reached = rung
                break
    best = min(tried, key=Run.rank)
    if best.verdict.met and reached and time.perf_counter() < deadline:
        effort = best.setting["effort"]
        below = peer.efforts[peer.efforts.index(effort) - 1]
        attempt(best.setting, type(effort)(math.sqrt(effort * below)))
        best = min(tried, key=Run.rank)
    return best._replace(tried=[_trial(each) for each in tried])


def _arrays(peer: peers.Peer, problem: cases.Problem, rows: np.ndarray) -> tuple:
    per_row = (np.asarray(array)[rows] for array in (problem.y, problem.code.indices, problem.code.values))
    return peers.to_arrays(peer.library, (padded(np.asarray(problem.sae.W_dec)), *per_row))


def _attempt(peer: peers.Peer, solve: peers.Solve, arrays: tuple, rows, judge: Judge, setting: dict[str, Any]) -> Run:
    solve = functools.partial(solve, **setting)
    call, compile_s, scratch = functools.partial(solve, *arrays), None, None
    if peer.library == "jax":
        with jax.default_matmul_precision("highest"):  # otherwise TF32 or bfloat16 on accelerators, far from the gate
            call, compile_s, scratch = _compile(jax.jit(solve), *arrays)
    start = time.perf_counter()
    values = jax.block_until_ready(call())
    first = time.perf_counter() - start
    seconds = min(clock(call) for _ in range(3)) if first < 1 else first
    verdict = judge(np.asarray(values), rows)
    return Run(peer.name, peer.kind, setting, rows, call, verdict, seconds, compile_s, scratch, [])


def _trial(each: Run) -> dict[str, Any]:
    numbers = {"rows_per_s": len(each.rows) / each.seconds, **each.verdict._asdict()}
    return {**each.setting, **{name: x if x is not None and math.isfinite(x) else None for name, x in numbers.items()}}
