"""Text generated with a cache is that of whole passes, of transformers and of splices; and directions as tokens."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial
from problems import compilations, f64, refused

import jaxsae
from jaxsae import language_model as lm
from jaxsae.language_model import blocks, generation

SAVED = Path(__file__).parent / "language_models"
NAMES = sorted(path.parent.name for path in SAVED.glob("*/config.json"))
FAST = NAMES[::2]
EVERY_MODEL = pytest.mark.parametrize("name", NAMES)
PROMPT, NEW, LAYER = 6, 64, 1

tiny = functools.cache(lm.tiny)
logits = jax.jit(lm.logits, static_argnums=2)
residual = jax.jit(lm.residual, static_argnums=2)
splice = jax.jit(lm.splice, static_argnums=(2, 3), static_argnames=("skip_first", "keep_error"))


@functools.cache
def saved(name, dtype="float32"):
    return lm.load(SAVED / name, dtype=dtype), np.load(SAVED / name / "expected.npz")


def add(v, h):
    return h + v.astype(h.dtype)


def place(name):
    """A site, and how many positions are skipped, of a model: each is that of some, 8 are more than the prompt."""
    number = NAMES.index(name) // 2
    sites = [site for site in lm.SITES if site != "resid_mid" or name != "gpt_neox"]
    return {"site": sites[number % len(sites)], "skip_first": (1, 8, 0)[number % 3]}


def vector(model, site, seed=0):
    c = model.config
    width = c.heads * c.head_width if site == "hook_z" else c.width
    return jnp.asarray(3 * np.random.default_rng(seed).normal(size=width), jnp.float32)


# --- The cache


@jax.jit
def one_by_one(model, ids):
    """The logits at every position, from tokens that are read one after another."""
    c = model.config
    room = jnp.zeros((c.layers, *ids.shape, c.kv_heads, c.head_width), c.dtype)

    def step(cache, each):
        predicted, cache = generation._read(model, each[1][:, None], cache, each[0], None, None)
        return cache, predicted

    numbers = jnp.arange(ids.shape[1])
    return jnp.moveaxis(jax.lax.scan(step, blocks.Cache(room, room), (numbers, ids.T))[1], 0, 1)


@EVERY_MODEL
def test_tokens_read_one_by_one_have_the_logits_of_transformers(name):
    model, expected = saved(name)
    ids, predicted = expected["ids"], expected["logits"]
    whole = np.concatenate([ids[:, :PROMPT], expected["greedy"]], axis=1)
    padded = np.pad(ids, ((0, 0), (0, whole.shape[1] - ids.shape[1])))
    found = one_by_one(model, jnp.asarray(padded))[:, : ids.shape[1]]
    np.testing.assert_allclose(found, predicted, atol=1e-5 * np.abs(predicted).max())
    largest = one_by_one(model, jnp.asarray(whole))[:, PROMPT - 1 : -1].max(axis=-1)
    np.testing.assert_allclose(largest, expected["greedy_logits"], atol=1e-5 * np.abs(predicted).max())


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1::2])])
def test_greedy_tokens_are_those_of_transformers_and_edited_ones_those_of_a_splice(name):
    model, expected = saved(name)
    prompt, where = jnp.asarray(expected["ids"][:, :PROMPT]), place(name)
    generate = functools.partial(lm.generate, model, prompt, NEW, layer=LAYER, **where)
    v = vector(model, where["site"])
    np.testing.assert_array_equal(generate(fn=Partial(add, 0 * v)), expected["greedy"])
    found = generate(fn=Partial(add, v))
    whole = jnp.concatenate([prompt, found], axis=1)
    predicted = spliced(model, whole, v, **where)[:, PROMPT - 1 : -1]
    np.testing.assert_array_equal(found, jnp.argmax(predicted, axis=-1))
    unedited = spliced(model, whole, 0 * v, **where)[:, PROMPT - 1 : -1]
    assert np.abs(predicted - unedited).max() > 1e-3, "the edit matters"


@functools.partial(jax.jit, static_argnames=("site", "skip_first"))
def spliced(model, ids, v, site, skip_first):
    return lm.splice(model, ids, LAYER, Partial(add, v), site=site, skip_first=skip_first)


def test_every_site_and_number_of_skipped_positions_is_edited_in_some_model():
    assert {place(name)["site"] for name in FAST} == set(lm.SITES)
    assert {place(name)["skip_first"] for name in FAST} == {0, 1, 8}


PROMPTS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9], [0, 15, 0, 15]])


def test_an_edit_acts_once_on_each_position():
    """One that is not idempotent, of an autoencoder's code, with its error kept."""
    model = tiny()
    sae = jaxsae.init(jax.random.key(0), d=8, m=32, activation=jaxsae.TopK(4))

    def doubled(sae, h):
        z = jaxsae.encode(sae, h)
        return jaxsae.decode(sae, z.replace(values=2 * z.values)), jaxsae.decode(sae, z)

    fn = Partial(doubled, sae)
    found = lm.generate(model, PROMPTS, 12, layer=1, fn=fn, keep_error=True)
    whole = jnp.concatenate([PROMPTS, found], axis=1)
    predicted = jax.jit(lambda ids: lm.splice(model, ids, 1, fn, keep_error=True))(whole)
    np.testing.assert_array_equal(found, jnp.argmax(predicted, axis=-1)[:, 3:-1])
    assert np.any(found != lm.generate(model, PROMPTS, 12))


def test_bfloat16(mixed):
    model, expected = saved("gemma2", "bfloat16")
    prompt = jnp.asarray(expected["ids"][:, :PROMPT])
    found = lm.generate(model, prompt, 8)
    whole = jnp.concatenate([prompt, found], axis=1)
    predicted = logits(model, residual(model, whole, 0), 0)[:, PROMPT - 1 : -1]
    chosen = jnp.take_along_axis(predicted, found[..., None], axis=-1)[..., 0]
    assert np.all(predicted.max(axis=-1) - chosen < 0.05 * np.abs(predicted).max())  # ties are broken by rounding


# --- Sampling, and the end


def test_samples_have_the_probabilities_of_the_model():
    model, rows = tiny(), 2000
    prompt = jnp.broadcast_to(jnp.array([1, 2, 3]), (rows, 3))
    h = residual(model, prompt[:1], 0)
    for temperature in (0.5, 1.5):
        found = lm.generate(model, prompt, 2, temperature=temperature, key=jax.random.key(7))
        expected = jax.nn.softmax(f64(logits(model, h, 0))[0, -1] / temperature)
        counts = np.bincount(found[:, 0], minlength=16)
        wanted = rows * f64(expected) / f64(expected).sum()
        rare = wanted < 5
        observed, wanted = (np.append(each[~rare], each[rare].sum()) for each in (counts, wanted))
        assert scipy.stats.chisquare(observed, wanted + 1e-9, sum_check=False).pvalue > 1e-3
        assert abs(np.mean(found[:, 0] == found[:, 1]) - 1) > 0.05  # another draw for each token


def test_the_same_key_draws_the_same_and_a_low_temperature_is_greedy():
    model, greedy = tiny(), lm.generate(tiny(), PROMPTS, 12)
    draw = lambda seed, temperature: lm.generate(  # noqa: E731
        model, PROMPTS, 12, temperature=temperature, key=jax.random.key(seed)
    )
    np.testing.assert_array_equal(draw(3, 2.0), draw(3, 2.0))
    assert np.any(draw(3, 2.0) != draw(4, 2.0))
    for temperature in (0.0, 1e-6):
        np.testing.assert_array_equal(draw(3, temperature), greedy)


def test_a_row_repeats_the_token_that_ended_it():
    model = tiny()
    free = np.asarray(lm.generate(model, PROMPTS, 16, temperature=1.5, key=jax.random.key(0)))
    for stop in ([int(free[0, 2])], [int(free[0, 2]), int(free[1, 4])], list(range(16))):
        found = lm.generate(model, PROMPTS, 16, temperature=1.5, key=jax.random.key(0), stop=stop)
        expected = free.copy()
        for row in expected:
            ends = np.flatnonzero(np.isin(row, stop))
            if len(ends):
                row[ends[0] :] = row[ends[0]]
        np.testing.assert_array_equal(found, expected)
        assert np.any(expected != free)


# --- How it is called


def test_it_is_compiled_once_for_all_values_and_under_jit_and_vmap():
    model, v = tiny(), vector(tiny(), "resid_post")
    call = lambda model, ids, v: lm.generate(model, ids, 6, layer=1, fn=Partial(add, v), stop=(3,))  # noqa: E731
    once = call(model, PROMPTS, v)
    again, other = jnp.flip(v), jnp.flip(PROMPTS)
    with compilations() as seen:
        call(model, other, again)
    assert not seen
    np.testing.assert_array_equal(jax.jit(call)(model, PROMPTS, v), once)
    each = jax.vmap(call, (None, 0, None))(model, PROMPTS[:, None], v)
    np.testing.assert_array_equal(each[:, 0], once)


def test_a_batch_on_eight_devices_stays_there():
    split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    model, prompts = tiny(), jnp.concatenate([PROMPTS, PROMPTS])
    everywhere = jax.device_put(model, NamedSharding(split.mesh, PartitionSpec()))
    found = lm.generate(everywhere, jax.device_put(prompts, split), 6)
    assert found.sharding.is_equivalent_to(split, 2)
    np.testing.assert_array_equal(found[:4], lm.generate(model, PROMPTS, 6))


def test_where_logits_are_nan_there_is_no_token():
    model = tiny()
    v = jnp.zeros((4, 1, 8)).at[2].set(jnp.nan)
    found = lm.generate(model, PROMPTS, 5, layer=1, fn=Partial(add, v))
    assert np.all(found[2] == -1)
    np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(lm.generate(model, PROMPTS, 5), 2, 0))
    outside = jax.jit(lambda ids: lm.generate(model, ids, 5))(PROMPTS.at[2, 1].set(16))
    np.testing.assert_array_equal(outside, found)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": 29}, ValueError, r"got 29 tokens .* after a prompt of 4, and the model's context is 32; pass at m"),
        ({"tokens": 0}, ValueError, "got 0 tokens to generate; pass a whole number of at least 1"),
        ({"tokens": 1.5}, ValueError, "got 1.5 tokens to generate"),
        ({"temperature": 1.0}, ValueError, "got temperature 1.0 without a key; pass key"),
        ({"temperature": -1.0, "key": 0}, ValueError, "got temperature -1.0; pass 0 or more"),
        ({"temperature": np.nan, "key": 0}, ValueError, "got temperature nan; pass 0 or more"),
        ({"layer": 1}, ValueError, "got layer without fn; pass both"),
        ({"fn": jnp.zeros_like}, ValueError, "got fn without layer; pass both"),
        ({"fn": jnp.zeros_like, "layer": 3}, ValueError, "got layer 3, the model has 3"),
        ({"fn": jnp.zeros_like, "layer": 1, "site": "mlp"}, ValueError, "got site 'mlp'; pass one of"),
        ({"fn": jnp.zeros_like, "layer": 1, "skip_first": 8}, ValueError, "got skip_first 8 for 8 positions"),
        ({"fn": lambda h: h[..., 1:], "layer": 1}, ValueError, r"got \(4, 4, 7\) from fn"),
        ({"fn": lambda h: h, "layer": 1, "keep_error": True}, TypeError, r"with keep_error, expected two recons"),
        ({"ids": PROMPTS[0]}, ValueError, r"got ids of shape \(4,\); pass"),
        ({"ids": PROMPTS + 1}, ValueError, "got tokens from 1 to 16; pass 0 to 15"),
    ],
)
def test_what_does_not_fit_is_refused(options, error, message, unchecked):
    with pytest.raises(error, match=message) as caught:
        lm.generate(tiny(), **{"ids": PROMPTS, "tokens": 5} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.lm
def test_the_continuations_of_smollm2_are_those_of_transformers(smollm2):
    model, tokenizer = lm.load(smollm2), lm.read_tokenizer(smollm2)
    for each in json.loads((SAVED / "smollm2_greedy.json").read_text())["prompts"]:
        ids = jnp.array([tokenizer.encode(each["text"]).ids])
        found = lm.generate(model, ids, NEW)
        assert found[0].tolist() == each["greedy"]
        predicted = logits(model, residual(model, jnp.concatenate([ids, found], axis=1), 8), 8)
        largest = predicted[0, ids.shape[1] - 1 : -1].max(axis=-1)
        np.testing.assert_allclose(largest, each["greedy_logits"], atol=2e-3)


# --- Edits with the error kept


def edits(sae, latent=None):
    """Of an autoencoder's code: `latent` ablated, or nothing."""

    def fn(h):
        z = jaxsae.encode_dense(sae, h)
        edited = z if latent is None else z.at[..., latent].set(0)
        return jaxsae.reconstruct(sae, h, edited), jaxsae.reconstruct(sae, h, z)

    return fn


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 6)), jnp.int32)
SAE = jaxsae.init(jax.random.key(1), d=8, m=32, activation=jaxsae.TopK(4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_edit_of_nothing_changes_nothing_and_a_reconstruction_does(dtype):
    model = tiny()
    sae = jax.tree.map(lambda x: x.astype(dtype), SAE)
    fn = lambda h: tuple(part.astype(dtype) for part in edits(sae)(h.astype(dtype)))  # noqa: E731
    clean = logits(model, residual(model, IDS, 0), 0)
    np.testing.assert_allclose(splice(model, IDS, 1, fn, keep_error=True), clean, atol=1e-5)
    assert np.abs(splice(model, IDS, 1, lambda h: fn(h)[0]) - clean).max() > 0.01


@pytest.mark.parametrize("skip_first", [0, 2])
def test_the_error_is_kept(skip_first):
    """`h + decode(edit(z)) − decode(z)`, in float64 by hand: without a bias it is `h − z_i a_i`."""
    model, h = tiny(), f64(residual(tiny(), IDS, 1))
    z = f64(jaxsae.encode_dense(SAE, jnp.asarray(h, jnp.float32)))
    latent = int(np.argmax((z != 0).sum(axis=(0, 1))))
    expected = h - z[..., [latent]] * f64(SAE.W_dec[latent])
    expected[:, :skip_first] = h[:, :skip_first]
    found = splice(model, IDS, 1, edits(SAE, latent), keep_error=True, skip_first=skip_first)
    np.testing.assert_allclose(found, logits(model, jnp.asarray(expected, jnp.float32), 1), atol=1e-5)
    assert np.any(z[:, skip_first:, latent])
    with pytest.raises(ValueError, match="got skip_first -1 for 6 positions"):
        lm.cross_entropy(model, [IDS], 1, {"edit": edits(SAE, latent)}, skip_first=-1)
    losses = lm.cross_entropy(model, [IDS], 1, {"edit": edits(SAE, latent), "same": edits(SAE)}, keep_error=True)
    assert losses["same"] == losses["clean"] != losses["edit"]


def test_a_refit_absorbs_again_what_was_ablated():
    """Refitted without a latent, its neighbours stand in for it; with the code edited alone, all of it is missing."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(32, 8)) + 1.5 * rng.normal(size=8)  # which resemble each other
    atoms = jnp.asarray(atoms / np.linalg.norm(atoms, axis=1, keepdims=True), jnp.float32)
    sae = jaxsae.SAE(W_enc=atoms.T, b_enc=jnp.zeros(32), W_dec=atoms, b_dec=jnp.zeros(8), activation=jaxsae.TopK(4))
    x = jnp.asarray(np.maximum(rng.normal(size=(64, 32)), 0), jnp.float32) @ atoms
    code = jaxsae.refine(sae, x)[0]
    ablated = code.replace(values=code.values.at[:, 0].set(0), indices=code.indices.at[:, 0].set(32))
    again = jaxsae.refine(sae, x, ablated)[0]
    atom = atoms[code.indices[:, 0]]
    along = lambda z: np.einsum("bd,bd->b", jaxsae.decode(sae, z), atom)  # noqa: E731
    missing = along(code) - along(ablated)
    np.testing.assert_allclose(missing, code.values[:, 0], atol=1e-5)
    some = np.asarray(code.values[:, 0] > 0.1)
    assert some.sum() > 32
    back = (along(again) - along(ablated))[some] / missing[some]
    assert np.median(back) > 0.5


@pytest.mark.parametrize("found", [lambda h: (h,), lambda h: h, lambda h: (h, h, h), lambda h: [h, h]])
def test_with_keep_error_anything_but_a_pair_is_refused(found, unchecked):
    with pytest.raises(TypeError, match=r"from fn with keep_error, expected two reconstructions, .*; return \(a, b\)"):
        lm.splice(tiny(), IDS, 1, found, keep_error=True)


@pytest.mark.parametrize("part", [lambda h: h[..., :1], lambda h: h[:, :1]])
def test_a_pair_of_another_shape_is_refused(part):
    """Which would be broadcast."""
    for pair in (lambda h: (h, part(h)), lambda h: (part(h), h)):
        with pytest.raises(ValueError, match=r"from fn for activations .*; return one for each"):
            lm.splice(tiny(), IDS, 1, pair, keep_error=True)


# --- The logit lens


def lens(name, v, k):
    return lm.logit_lens(saved(name)[0], v, k=k)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama3", "gemma2", "olmo2"])
def test_the_lens_is_the_derivative_of_the_logits(name):
    """Of a direction at a right angle to the residual, which the norm then only scales."""
    model = saved(name)[0]
    c, last = model.config, model.config.layers - 1
    rng = np.random.default_rng(0)
    h, v = rng.normal(size=c.width), rng.normal(size=c.width)
    centred = h - h.mean() if c.norm == "layer" else h
    v = v - centred * (v @ centred) / (centred @ centred)
    shape = lambda x: jnp.asarray(x, jnp.float32)[None, None]  # noqa: E731
    predicted, slope = jax.jvp(lambda h: lm.logits(model, h, last)[0, 0], (shape(h),), (shape(v),))
    predicted, slope = f64(predicted), f64(slope) * np.sqrt(np.mean(centred**2) + c.eps)
    if c.logits_cap is not None:
        slope = slope / (1 - (predicted / c.logits_cap) ** 2)
    slope -= slope.mean()
    found = lm.logit_lens(model, shape(v)[0], k=c.vocab)
    np.testing.assert_allclose(found.promoted_logits[0], np.sort(slope)[::-1], atol=1e-4 * np.abs(slope).max())
    np.testing.assert_allclose(slope[found.promoted[0]], found.promoted_logits[0], atol=1e-4 * np.abs(slope).max())
    np.testing.assert_allclose(slope[found.suppressed[0]], found.suppressed_logits[0], atol=1e-4 * np.abs(slope).max())
    np.testing.assert_allclose(found.suppressed_logits[0], np.sort(slope), atol=1e-4 * np.abs(slope).max())


def test_the_lens_of_many_directions_is_that_of_each(monkeypatch):
    model, v = saved("llama3")[0], jnp.asarray(np.random.default_rng(0).normal(size=(600, 24)), jnp.float32)
    v = v.at[123].set(jnp.nan)
    found = lm.logit_lens(model, v, k=3)
    assert found.promoted.shape == (600, 3)
    some = np.array([0, 1, 255, 256, 511, 599])
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a[some], b), found, lm.logit_lens(model, v[some], k=3)))
    assert np.isnan(found.promoted_logits[123]).all() and np.isnan(found.promoted_logits).sum() == 3


def test_the_lens_of_a_direction_that_norms_do_not_see_is_flat():
    model = saved("gpt2")[0]
    found = lm.logit_lens(model, jnp.ones((1, 24)), k=5)
    assert np.abs(found.promoted_logits).max() < 1e-5
    assert np.abs(lens("llama", jnp.ones((1, 24)), 5).promoted_logits).max() > 0.1


def test_the_lens_holds_no_more_than_a_chunk_of_logits():
    model = saved("llama")[0]
    program = jax.jit(functools.partial(lm.logit_lens, k=5)).lower(model, jnp.ones((65536, 24))).compile()
    assert program.memory_analysis().temp_size_in_bytes < 65536 * 260 * 4 / 4


@pytest.mark.parametrize(
    ("v", "k", "error", "message"),
    [
        (jnp.ones(8), 3, ValueError, r"got directions of shape \(8,\), and the model is 8 wide; pass \(m, 8\)"),
        (jnp.ones((3, 7)), 3, ValueError, r"got directions of shape \(3, 7\)"),
        (jnp.ones((3, 8), int), 3, TypeError, "got directions of int32"),
        (jnp.ones((3, 8)), 0, ValueError, "got k = 0 for a vocabulary of 16; pass 1 to 16"),
        (jnp.ones((3, 8)), 17, ValueError, "got k = 17 for a vocabulary of 16"),
    ],
)
def test_a_lens_of_what_does_not_fit_is_refused(v, k, error, message, unchecked):
    with pytest.raises(error, match=message):
        lm.logit_lens(tiny(), v, k=k)


def test_the_context_is_refused_in_one_line():
    refused("the model's context is 32; pass at most 32 in all", lm.generate, tiny(), PROMPTS, 29)
