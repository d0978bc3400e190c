"""What latents stand for: the metrics behind it against brute force, and `jaxsae features` against plain encoding."""

import functools
import json
import operator
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import cli, f64, refused, scipy_nnls

import jaxsae
from jaxsae import SparseCode, language_model, metrics, pretrained, sharding, stream
from jaxsae.app import feature_codes, feature_text, features
from jaxsae.app.features import Choice, Sources
from jaxsae.data import shards
from jaxsae.data.origin import Origin
from jaxsae.language_model import files, text as texts

HERE = Path(__file__).parent
LLAMA = HERE / "language_models/llama"
D, M, K = 24, 64, 4


# --- The metrics


@functools.cache
def a_code(rows=400, m=40, k=5, levels=6) -> SparseCode:
    """Values of few levels, so that there are ties; some slots are unused, some values 0 or negative, two rows NaN."""
    rng = np.random.default_rng(0)
    indices = np.argsort(rng.random((rows, m)) ** np.linspace(1, 4, m), axis=1)[:, -k:]
    values = rng.integers(-2, levels, (rows, k)) / 2
    indices = np.where(rng.random(indices.shape) < 0.2, m, indices)
    indices[rng.random(indices.shape) < 0.1] = -1
    values[[17, 230], 0], indices[[17, 230], 0] = np.nan, 3
    return SparseCode(jnp.asarray(values, jnp.float32), jnp.asarray(indices, jnp.int32), m)


def part(code: SparseCode, some) -> SparseCode:
    return jax.tree.map(operator.itemgetter(some), code)


def dense(code: SparseCode) -> np.ndarray:
    """`[b m]`, 0 in rows that hold NaN, without the library's own scattering."""
    values, indices = f64(code.values), np.asarray(code.indices)
    z = np.zeros((len(values), code.num_latents))
    for row, (own, places) in enumerate(zip(values, indices, strict=True)):
        used = (places >= 0) & (places < code.num_latents)
        if np.isfinite(own[used]).all():
            z[row, places[used]] = own[used]
    return z


def brute_top(z, latents, n, rows, documents):
    """Rows and values of the largest magnitudes, one by one in Python."""
    found = []
    for latent in latents:
        seen, kept = set(), []
        for row in sorted(range(len(z)), key=lambda row: (-abs(z[row, latent]), rows[row])):
            if z[row, latent] != 0 and documents[row] not in seen:
                seen.add(documents[row])
                kept.append((int(rows[row]), float(z[row, latent])))
        found.append(kept[:n])
    return found


def as_pairs(top) -> list[list[tuple[int, float]]]:
    return [
        [(row, value) for row, value in zip(rows, values, strict=True) if row >= 0]
        for rows, values in zip(top.rows.tolist(), top.values.tolist(), strict=True)
    ]


@pytest.mark.parametrize("documents", ["rows", "documents"])
def test_top_contexts_are_those_of_brute_force_with_ties_by_position(documents):
    code, rng = a_code(), np.random.default_rng(1)
    latents = rng.permutation(40)[:20]
    rows = 10_000_000_000 + rng.permutation(400)  # of many; in no order
    own = rows if documents == "rows" else rng.integers(0, 60, 400)
    given = {} if documents == "rows" else {"documents": own}
    found = metrics.top_contexts(code, latents, n=12, rows=rows, **given)
    expected = brute_top(dense(code), latents, 12, rows, own)
    assert as_pairs(found) == expected
    assert max(map(len, expected)) == 12 and min(map(len, expected)) < 12  # both kinds are there
    ties = [len(pairs) - len({abs(value) for _, value in pairs}) for pairs in expected]
    assert min(ties) > 0


@pytest.mark.parametrize("name", ["top_contexts", "context_sample"])
def test_parts_add_up_to_the_whole(name):
    code, rng = a_code(), np.random.default_rng(2)
    latents, rows, documents = np.arange(40), np.arange(400), rng.integers(0, 60, 400)
    how = {"documents": documents} if name == "top_contexts" else {}
    f = functools.partial(getattr(metrics, name), latents=latents, n=7)
    whole = f(code, rows=rows, **how)
    for parts in ([slice(0, 200), slice(200, 400)], np.array_split(rng.permutation(400), 9)):
        some = [f(part(code, at), rows=rows[at], **{key: x[at] for key, x in how.items()}) for at in parts]
        for merged in (functools.reduce(operator.add, some), functools.reduce(operator.add, some[::-1])):
            for field in ("values", "rows", "documents"):
                np.testing.assert_array_equal(getattr(merged, field), getattr(whole, field))
    nothing = f(part(code, slice(0, 0)), rows=rows[:0], **{key: x[:0] for key, x in how.items()})
    np.testing.assert_array_equal((nothing + whole).rows, whole.rows)


def test_a_sample_has_active_rows_and_favours_none():
    rows = 20_000
    code = SparseCode(jnp.ones((rows, 1)), jnp.asarray(np.arange(rows)[:, None] % 2, jnp.int32), 2)
    found = metrics.context_sample(code, [1], n=1000)
    assert (found.rows % 2 == 1).all() and len(np.unique(found.rows)) == 1000
    # Of a uniform sample each tenth of the rows has a tenth, give or take 9.5.
    counts = np.histogram(found.rows, 10, (0, rows))[0]
    assert (np.abs(counts - 100) < 40).all()
    other = metrics.context_sample(code, [1], n=1000, rows=np.arange(rows) + rows)
    assert len(np.intersect1d(found.rows % rows, other.rows % rows)) < 200  # 100 by chance


def pairs_of(code: SparseCode) -> np.ndarray:
    active = (dense(code) != 0).astype(int)
    return active.T @ active * (1 - np.eye(code.num_latents, dtype=int))


def test_co_activation_is_exact_with_enough_counters():
    code, latents = a_code(), np.array([39, 3, 20, 7])
    found = metrics.co_activation(code, latents, capacity=40)
    expected = pairs_of(code)[latents]
    active = dense(code) != 0
    np.testing.assert_array_equal(found.rows, active.sum(0)[latents])
    np.testing.assert_array_equal(found.pairs, expected.sum(1))
    np.testing.assert_array_equal(found.missed, 0)
    for wanted, partners, counts in zip(expected, found.partners, found.counts, strict=True):
        got = np.zeros(40, int)
        got[partners[partners >= 0]] = counts[partners >= 0]
        np.testing.assert_array_equal(got, wanted)
        assert (np.diff(counts) <= 0).all()
    np.testing.assert_allclose(found.given, found.counts / active.sum(0)[latents][:, None])


@pytest.mark.parametrize("capacity", [1, 3, 8])
@pytest.mark.parametrize("parts", [1, 2, 20])
def test_few_counters_err_by_no_more_than_they_say(capacity, parts):
    code, latents = a_code(), np.arange(40)
    some = np.array_split(np.random.default_rng(3).permutation(400), parts)
    found = functools.reduce(
        operator.add, [metrics.co_activation(part(code, at), latents, capacity=capacity) for at in some]
    )
    expected = pairs_of(code)
    np.testing.assert_array_equal(found.pairs, expected.sum(1))
    assert (found.missed <= (found.pairs - found.counts.sum(1)) / (capacity + 1)).all()
    assert found.missed.any()  # something is missed, or the bounds would hold by themselves
    for wanted, partners, counts, missed in zip(expected, found.partners, found.counts, found.missed, strict=True):
        got = np.zeros(41, int)
        got[partners] = counts
        assert (got[:-1] <= wanted).all()
        assert (wanted <= got[:-1] + missed).all()


def test_pairs_that_are_sorted_in_pieces_are_the_same(monkeypatch):
    from jaxsae.autoencoder import coactivation

    whole = metrics.co_activation(a_code(), np.arange(40), capacity=40)
    monkeypatch.setattr(coactivation, "_PAIRS", 64)
    pieces = metrics.co_activation(a_code(), np.arange(40), capacity=40)
    np.testing.assert_array_equal(pieces.counts, whole.counts)
    np.testing.assert_array_equal(pieces.partners, whole.partners)


def test_arguments_that_do_not_fit_are_refused():
    code = a_code()
    for latents in ([40], [-1], [3, 3]):
        with pytest.raises(ValueError, match="each once"):
            metrics.top_contexts(code, latents)
    with pytest.raises(ValueError, match="one for each"):
        metrics.context_sample(code, [1], rows=[1, 2])
    with pytest.raises(ValueError, match="capacity of 0"):
        metrics.co_activation(code, [1], capacity=0)
    with pytest.raises(ValueError, match="to add"):
        metrics.top_contexts(code, [1], n=2) + metrics.top_contexts(code, [1], n=3)
    with pytest.raises(ValueError, match="to add"):
        metrics.top_contexts(code, [1], n=2) + metrics.context_sample(code, [1], n=2)
    with pytest.raises(ValueError, match="to add"):
        metrics.co_activation(code, [1], capacity=2) + metrics.co_activation(code, [1], capacity=3)


# --- The command


@pytest.fixture(scope="module", autouse=True)
def several_chunks():
    """Encode 256 rows at a time, and write each chunk, so that a thousand rows go through all there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_PRE_ACTIVATIONS", 1)
        patch.setattr(feature_codes, "_TOGETHER", 1)
        yield


CONTEXT = 16


def an_sae(seed=0, **options) -> jaxsae.SAE:
    return jaxsae.init(jax.random.key(seed), d=D, m=M, activation=jaxsae.TopK(K), **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An SAE, and a harvest of a tiny model over several documents, some of whose rows are NaN."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    words = ["to be", "or not", "that is", "the question", "whether", "'tis nobler", "in the mind", "ünï"]
    documents = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(80)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tokenizer = files.read_tokenizer(LLAMA)
    end = files.end_of_text(LLAMA, tokenizer)
    contexts = np.asarray(texts.pack([folder / "text.jsonl"], tokenizer, context=CONTEXT, separator=end).contexts)[:48]
    x = np.asarray(language_model.residual(language_model.load(LLAMA), jnp.asarray(contexts), 1))[:, 1:].reshape(-1, D)
    x = np.array(x / np.sqrt((x**2).sum(1).mean()), np.float32)
    x[33, 5], x[500] = np.nan, np.inf
    source = {"model": str(LLAMA), "layer": 1, "site": "resid_post", "context": CONTEXT, "text": "text.jsonl"}
    writer = shards.Writer(folder / "acts", width=D, dtype="float32", source=source)
    for some in (slice(0, 20), slice(20, 48)):
        at = slice(some.start * (CONTEXT - 1), some.stop * (CONTEXT - 1))
        writer.append(x[at], tokens=contexts[some])
    writer.finish()
    pretrained.save(an_sae(), folder / "sae", format="jaxsae", origin=Origin(str(LLAMA), 1, "resid_post"))
    np.save(folder / "x.npy", x)
    return folder, x, contexts, end


@pytest.fixture(scope="module")
def described(world):
    folder = world[0]
    assert cli("features", folder / "sae", "--data", folder / "acts", "--random", 20, "--out", folder / "out") == 0
    return json.loads((folder / "out/features.json").read_text())


@pytest.fixture(scope="module")
def codes_of(world):
    """The dense codes `[n m]`, the encoder's and refined, by numpy and scipy in float64; 0 in rows that hold NaN."""
    sae, x = an_sae(), f64(world[1])
    W_enc, W_dec, b_dec, b_enc = map(f64, (sae.W_enc, sae.W_dec, sae.b_dec, sae.b_enc))
    z, refined = np.zeros((2, len(x), M))
    for row in np.flatnonzero(np.isfinite(x).all(1)):
        pre = (x[row] - b_dec) @ W_enc + b_enc
        support = np.argsort(-pre)[:K]
        z[row, support] = np.maximum(pre[support], 0)
        refined[row, support] = scipy_nnls(W_dec[support].T, x[row] - b_dec)
    return z, refined


def document_of(world) -> np.ndarray:
    """The document of each row, by going through the tokens one by one."""
    _, _, contexts, end = world
    number, found, start = 0, [], len(files.start(files.read_tokenizer(LLAMA)))
    for context in contexts.tolist():
        for position, token in enumerate(context):
            if position:
                found.append(number)
            number += token == end and position >= start  # which every context begins with, wherever documents end
    return np.array(found)


def test_the_numbers_are_those_of_plain_encoding(described, codes_of):
    z, refined = codes_of
    assert described["data"] == described["data"] | {"rows": 720, "nonfinite": 2, "contexts": 48, "context": CONTEXT}
    assert described["rows_are"] == "tokens" and described["origin"]["layer"] == 1
    assert len(described["latents"]) == 20
    edges, ratio_edges = (np.array(described[name]) for name in ("edges", "ratio_edges"))
    pairs = (z != 0).astype(int).T @ (z != 0)
    for latent in described["latents"]:
        j = latent["index"]
        active = z[:, j] != 0
        assert latent["count"] == active.sum() and latent["density"] == pytest.approx(active.sum() / 718)
        numbers = {"mean": z[active, j].mean(), "mean_refined": refined[active, j].mean(), "max": z[:, j].max()}
        numbers |= {"max_refined": refined[:, j].max(), "shrinkage": refined[active, j].sum() / z[active, j].sum()}
        for name, value in numbers.items():
            assert latent[name] == pytest.approx(value, rel=1e-3), name
        for name, own in {"values": z, "refined_values": refined}.items():
            assert sum(latent[name]) == active.sum()
            inside = np.histogram(np.clip(own[active, j], edges[0], edges[-1]), edges)[0]
            assert np.abs(np.array(latent[name]) - inside).sum() <= 4  # at an edge rounding decides
        inside = np.histogram(np.clip(refined[active, j] / z[active, j], ratio_edges[0], ratio_edges[-1]), ratio_edges)
        assert np.abs(np.array(latent["ratios"]) - inside[0]).sum() <= 4
        assert latent["coactive_error"] == 0
        given = np.where(np.arange(M) == j, 0, pairs[j] / active.sum())
        largest = np.sort(given)[::-1][:10]
        np.testing.assert_allclose([each["given"] for each in latent["coactive"]], largest[largest > 0])
        for each in latent["coactive"]:
            assert each["given"] == pytest.approx(given[each["index"]])
            assert each["lift"] == pytest.approx(given[each["index"]] / (pairs[each["index"], each["index"]] / 718))
        atoms = f64(an_sae().W_dec)
        cosine = atoms @ atoms[j] / np.linalg.norm(atoms, axis=1) / np.linalg.norm(atoms[j])
        nearest = np.argsort(-np.where(np.arange(M) == j, -9, cosine))[:10]
        assert [each["index"] for each in latent["nearest"]] == nearest.tolist()
        np.testing.assert_allclose([each["cosine"] for each in latent["nearest"]], cosine[nearest], atol=1e-3)


def test_the_examples_are_those_of_brute_force(world, described, codes_of):
    z, documents = codes_of[0], document_of(world)
    assert len(np.unique(documents)) > 10
    for latent in described["latents"]:
        [expected] = brute_top(z, [latent["index"]], 20, np.arange(720), documents)
        assert [each["row"] for each in latent["top"]] == [row for row, _ in expected]
        np.testing.assert_allclose([each["value"] for each in latent["top"]], [x for _, x in expected], rtol=1e-3)
        assert [each["document"] for each in latent["top"]] == documents[[row for row, _ in expected]].tolist()


def test_bands_split_the_active_rows_by_their_values(described, codes_of):
    z, seen = codes_of[0], 0
    for latent in described["latents"]:
        own, bands = z[:, latent["index"]], latent["bands"]
        active = np.sort(own[own != 0])[::-1]
        if len(active) > 256:  # then the bands are of a sample
            continue
        for band, values in zip(bands, filter(len, np.array_split(active, 5)), strict=True):
            assert (band["high"], band["low"]) == pytest.approx((values[0], values[-1]), rel=1e-3)
            shown = {each["row"] for each in band["examples"]}
            assert len(shown) == len(band["examples"]) <= 3 and not shown & {each["row"] for each in latent["top"]}
            for each in band["examples"]:
                assert own[each["row"]] == pytest.approx(each["value"], rel=1e-3)
                assert band["low"] * 0.999 <= each["value"] <= band["high"] * 1.001
            seen += len(shown)
    assert seen > 50


def test_windows_show_the_tokens_around_and_what_the_latent_does_there(world, described, codes_of):
    _, _, contexts, _ = world
    tokenizer, gaps = files.read_tokenizer(LLAMA), 0
    for latent in described["latents"]:
        for each in [*latent["top"], *(x for band in latent["bands"] for x in band["examples"])]:
            context, position, first = each["context"], each["position"], each["first"]
            assert each["row"] == context * (CONTEXT - 1) + position - 1
            assert first == max(0, position - 16)
            shown = contexts[context, first : min(CONTEXT, position + 9)]
            assert len(each["tokens"]) == len(each["values"]) == len(each["refined_values"]) == len(shown)
            whole = tokenizer.decode(shown[1:].tolist(), skip_special_tokens=False)
            if "\ufffd" not in "".join(each["tokens"]):  # no character is split over tokens
                assert "".join(each["tokens"][1:]) == whole
            for name, codes in zip(("values", "refined_values"), codes_of, strict=True):
                for at, value in enumerate(each[name], first):
                    row = context * (CONTEXT - 1) + at - 1
                    if at == 0 or row in (33, 500):
                        assert value is None
                        gaps += at > 0
                    else:
                        assert value == pytest.approx(codes[row, latent["index"]], rel=1e-2, abs=1e-4)
    assert gaps  # windows with rows of NaN are among them


def run(folder, x, *, sae=None, out="other", sources=None, **options):
    sources = sources or Sources("sae", "x.npy")
    return features.run(folder / out, sae or an_sae(), x, sources=sources, choice=Choice(**options))


class Killed(Exception):
    pass


def test_an_interrupted_run_resumes_to_the_same_bytes(world, tmp_path, monkeypatch):
    x, done = world[1], []
    run(tmp_path, x, out="whole", latents=[3, 9, 17])
    write = feature_codes._write

    def dying(folder, number, pending):
        if number == 1:
            raise Killed
        write(folder, number, pending)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(feature_codes, "_write", dying)
        run(tmp_path, x, latents=[3, 9, 17])
    assert (tmp_path / "other/.codes/00000.npz").is_file()
    shutil.copytree(tmp_path / "other", tmp_path / "copy")
    choice, sources = Choice(latents=[3, 9, 17]), Sources("sae", "x.npy")
    features.run(tmp_path / "other", an_sae(), x, sources=sources, choice=choice, progress=done.append)
    assert done[0] == 256 and sum(done) == 720  # the first part was not computed again
    for name in ("features.json", "features.parquet"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "other/.codes").exists()
    # What was begun of other latents, or with another SAE, is of no use.
    run(tmp_path, x, out="copy", latents=[3, 9], sae=an_sae(1))
    run(tmp_path, x, out="fresh", latents=[3, 9], sae=an_sae(1))
    assert (tmp_path / "copy/features.json").read_bytes() == (tmp_path / "fresh/features.json").read_bytes()


@pytest.mark.parametrize("by", ["shrinkage", "density", "max"])
def test_the_first_by_a_measure(by, world, codes_of, tmp_path):
    z, refined = codes_of
    found = run(tmp_path, world[1], by=by, count=6)["latents"]
    count = (z != 0).sum(0)
    ratio = np.where(count >= 10, refined.sum(0) / np.where(count, z.sum(0), 1), 0)
    measure = {"shrinkage": ratio, "density": count, "max": z.max(0)}[by]
    least = np.sort(measure)[-6]
    assert len(found) == 6
    assert all(measure[latent["index"]] >= 0.999 * least for latent in found)


def test_only_rows_on_which_a_chosen_latent_fires_are_refined(world, codes_of, tmp_path, monkeypatch):
    refined = []
    refine = stream.refine_chunk

    def watched(sae, chunk, *, only):
        refined.extend((chunk.start + only).tolist())
        return refine(sae, chunk, only=only)

    monkeypatch.setattr(stream, "refine_chunk", watched)
    run(tmp_path, world[1], latents=[5])
    fires = np.flatnonzero(codes_of[0][:, 5])
    assert set(fires.tolist()) <= set(refined)
    assert len(refined) == sum(-(-np.sum((fires >= at) & (fires < at + 256)) // 256) * min(256, n) for at, n in
                               [(0, 255), (256, 255), (512, 208)])  # fmt: skip


def test_patches_are_pictures(world, tmp_path):
    x = world[1]
    found = run(tmp_path, x, sources=Sources("sae", "x.npy", patch=(4, 2, 3)), latents=[7])
    finite = x[np.isfinite(x).all(1)]
    low, high = finite.min(), finite.max()
    assert found["rows_are"] == "patches"
    assert found["patch"] == {"height": 4, "width": 2, "channels": 3, "low": low, "high": high}
    [latent] = found["latents"]
    for each in latent["top"]:
        np.testing.assert_allclose(each["pixels"], 255 * (x[each["row"]] - low) / (high - low), atol=0.51)
        assert each["tokens"] is each["context"] is None
    atom = f64(an_sae().W_dec)[7]
    np.testing.assert_allclose(latent["atom"], 127.5 + 127.5 * atom / np.abs(atom).max(), atol=0.51)


@pytest.mark.slow
def test_rows_in_bfloat16_saes_and_signed_values(world, tmp_path, mixed):
    x = world[1]
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), an_sae())
    [latent] = run(tmp_path, x, sae=low, latents=[7])["latents"]
    [exact] = run(tmp_path, x, latents=[7])["latents"]
    assert latent["mean"] == pytest.approx(exact["mean"], rel=0.05)
    signed = jaxsae.init(jax.random.key(0), d=D, m=M, activation=jaxsae.AbsTopK(K))
    found = run(tmp_path, x, sae=signed, latents=[7])
    values = [each["value"] for each in found["latents"][0]["top"]]
    assert min(values) < 0 < max(values)
    assert np.all(np.diff(np.abs(values)) <= 1e-3)
    assert found["edges"][0] < 0 < found["edges"][-1]
    assert np.all(np.diff(found["edges"]) > 0)


def test_latents_that_never_fire_and_rows_of_nan(world, tmp_path):
    sae = an_sae()
    sae = sae.replace(b_enc=sae.b_enc.at[3].set(-1e9))
    x = world[1]
    dead, _ = run(tmp_path, x, sae=sae, latents=[3, 4])["latents"]
    assert (dead["count"], dead["mean"], dead["max"], dead["shrinkage"]) == (0, None, None, None)
    assert dead["top"] == dead["bands"] == dead["coactive"] == []
    _, [nearest] = features._atoms(sae.replace(W_dec=sae.W_dec.at[4].set(0)), np.array([4]))
    assert len(nearest) == 10 and all(each["cosine"] == 0 for each in nearest)
    found = run(tmp_path, np.full_like(x, np.nan), sae=sae, latents=[3, 4])
    assert found["data"]["nonfinite"] == 720 and not found["latents"][1]["top"]
    assert run(tmp_path, np.full_like(x, np.nan), sae=sae)["latents"] == []


@pytest.mark.slow
def test_a_mesh_writes_what_one_device_does(world, tmp_path):
    x = world[1]
    alone = run(tmp_path, x, latents=[3, 9, 17])
    with jax.set_mesh(sharding.make_mesh(2, 4)):
        sae = sharding.create(an_sae)
        spread = run(tmp_path, x, sae=sae, latents=[3, 9, 17])
    for one, many in zip(alone["latents"], spread["latents"], strict=True):
        assert one["count"] == many["count"]
        assert [each["row"] for each in one["top"]] == [each["row"] for each in many["top"]]
        for name in ("mean", "mean_refined", "max", "shrinkage"):
            assert one[name] == pytest.approx(many[name], rel=1e-3)
        assert [each["index"] for each in one["nearest"]] == [each["index"] for each in many["nearest"]]


# --- With a language model


def test_the_effect_of_an_ablation_is_that_of_the_spliced_model(world):
    _, _, contexts, _ = world
    model, sae = language_model.load(LLAMA), an_sae()
    lens = feature_text.Lens(str(LLAMA), model, None, 1, "resid_post")
    rng = np.random.default_rng(0)
    ids, atom = contexts[:3], 3 * f64(sae.W_dec)[5].astype(np.float32)
    values = np.where(rng.random(ids.shape) < 0.3, rng.exponential(size=ids.shape), 0).astype(np.float32)
    values[:, 0] = 0

    def loss(z):
        h = lambda h: h - jnp.asarray(z)[..., None] * jnp.asarray(atom)  # noqa: E731
        logits = f64(language_model.splice(model, jnp.asarray(ids), 1, h))[:, :-1]
        log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_p = log_p - logits.max(-1, keepdims=True)
        return -np.take_along_axis(log_p, ids[:, 1:, None], -1).sum()

    expected = (loss(values) - loss(0 * values)) / np.count_nonzero(values)
    assert abs(expected) > 1e-3
    assert feature_text.effect(lens, sae, atom, ids, values) == pytest.approx(expected, rel=1e-2)
    assert feature_text.effect(lens, sae, atom, ids, 0 * values) is None


def test_with_a_model_there_are_words_and_effects(world, tmp_path, capsys):
    folder = world[0]
    argv = ["features", folder / "sae", "--data", folder / "acts", "--latents", 9, 5, "--out", tmp_path / "out"]
    assert cli(*argv, "--model", LLAMA, "--json") == 0
    numbers = json.loads(capsys.readouterr().out)["latents"]
    found = json.loads((tmp_path / "out/features.json").read_text())
    assert found["model"] == str(LLAMA) and "over 4 contexts at most" in found["ablation"]
    model = language_model.load(LLAMA)
    for latent, printed in zip(found["latents"], numbers, strict=True):
        lens = language_model.logit_lens(model, an_sae().W_dec[latent["index"]][None], k=10)
        assert [each["id"] for each in latent["promotes"]] == lens.promoted[0].tolist()
        np.testing.assert_allclose([x["logit"] for x in latent["suppresses"]], lens.suppressed_logits[0], rtol=1e-4)
        assert printed["loss_effect"] == latent["loss_effect"] != 0


# --- What is refused, and what is said


def test_what_does_not_fit_is_refused_before_any_work(world, tmp_path, monkeypatch):
    folder, x, *_ = world
    monkeypatch.chdir(tmp_path)
    refused("latent 64, the SAE has 64", run, tmp_path, x, latents=[64])
    refused("--random 65, the SAE has 64", run, tmp_path, x, random=65)
    refused("--latents and --by", run, tmp_path, x, latents=[1], by="max")
    refused("--count with", run, tmp_path, x, random=3, count=2)
    refused("width 5, but this SAE", run, tmp_path, x[:, :5], latents=[1])
    refused("--patch 5 5 1, 25", run, tmp_path, x, latents=[1], sources=Sources("sae", "x.npy", patch=(5, 5, 1)))
    refused("1 or 3 channels", run, tmp_path, x, latents=[1], sources=Sources("sae", "x.npy", patch=(3, 4, 2)))
    both = Sources("sae", "x.npy", patch=(4, 2, 3), model=str(LLAMA))
    refused("--patch and --model", run, tmp_path, x, latents=[1], sources=both)
    transcoder = jaxsae.init(jax.random.key(0), d=D, m=M, activation=jaxsae.TopK(K), transcoder=True)
    refused("transcoder", run, tmp_path, x, sae=transcoder, latents=[1])
    other = HERE / "language_models/gpt2"
    here = Origin(str(LLAMA), 1, "resid_post")
    for kinds in ({"belongs": here}, {"rows": here}):
        told = Sources("sae", "x.npy", model=str(other), **kinds)
        refused(
            "got the model .*gpt2, and the (SAE is|rows are) of .*llama", run, tmp_path, x, latents=[1], sources=told
        )
    elsewhere = Sources("sae", "x.npy", model=str(LLAMA))
    refused("neither the SAE nor the rows", run, tmp_path, x, latents=[1], sources=elsewhere)
    deep = Sources("sae", "x.npy", model=str(LLAMA), rows=here._replace(layer=7))
    refused("got layer 7", run, tmp_path, x, latents=[1], sources=deep)
    narrow = jaxsae.init(jax.random.key(0), d=5, m=M, activation=jaxsae.TopK(K))
    wide = Sources("sae", "x.npy", model=str(LLAMA), rows=here)
    refused("SAE of width 5", run, tmp_path, x[:, :5], sae=narrow, latents=[1], sources=wide)
    assert not list(tmp_path.iterdir())
    pretrained.save(an_sae(), tmp_path / "other", format="jaxsae", origin=here._replace(layer=2))
    assert cli("features", tmp_path / "other", "--data", folder / "acts", "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_tokens_of_another_tokenizer_are_refused(world, tmp_path):
    _, x, contexts, _ = world
    source = {"model": str(LLAMA), "layer": 1, "site": "resid_post"}
    writer = shards.Writer(tmp_path / "acts", width=D, dtype="float32", source=source)
    writer.append(x, tokens=contexts + 100)
    sources = Sources("sae", tmp_path / "acts", rows=Origin(str(LLAMA), 1, "resid_post"))
    refused("has token 3.., the tokenizer of", run, tmp_path, x, latents=[1], sources=sources)
    refused("for 700 rows", run, tmp_path, x[:700], latents=[1], sources=sources)


def test_what_cannot_be_shown_is_said(world, tmp_path, capsys):
    folder, x, contexts, _ = world
    # Without tokens beside the rows there is no text.
    assert cli("features", folder / "sae", "--data", folder / "x.npy", "--latents", 5, "--out", tmp_path / "a") == 0
    found = json.loads((tmp_path / "a/features.json").read_text())
    assert found["rows_are"] == "rows" and found["latents"][0]["top"][0]["tokens"] is None
    assert "2 of 720 rows hold NaN" in capsys.readouterr().err
    # The tokenizer may be elsewhere.
    writer = shards.Writer(tmp_path / "acts", width=D, dtype="float32", source={"model": "no-such-place"})
    writer.append(x, tokens=contexts)
    said = []
    sources = Sources("sae", tmp_path / "acts", rows=Origin("no-such-place"))
    found = features.run(tmp_path / "b", an_sae(), x, sources=sources, choice=Choice(latents=[5]), warn=said.append)
    assert "without their text" in said[0]
    top = found["latents"][0]["top"]
    assert found["rows_are"] == "rows" and top[0]["context"] == top[0]["row"] // (CONTEXT - 1)
    assert len({each["context"] for each in top}) == len(top)  # contexts stand for documents


def test_the_command_prints_what_it_wrote(world, tmp_path, capsys):
    folder = world[0]
    argv = ["features", folder / "sae", "--data", folder / "acts", "--latents", 9, 5, "--out", tmp_path / "out"]
    assert cli(*argv, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["index"] for each in found["latents"]] == [5, 9] and found["rows_are"] == "tokens"
    assert cli(*argv) == 0  # again, over what is there
    assert "features.json" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "features.json",
        "features.parquet",
        "report.html",
    ]
