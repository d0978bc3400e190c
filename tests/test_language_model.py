import functools
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import atoms_of, f64, optimum, sae

import jaxsae
from jaxsae import language_model as lm
from jaxsae._core.files import InputError
from jaxsae.language_model import config, files, sites

SAVED = Path(__file__).parent / "language_models"
GOLDEN = Path(__file__).parents[2] / "shared" / "fixtures" / "smollm2" / "golden.npz"
EVERY_MODEL = pytest.mark.parametrize("name", sorted(path.parent.name for path in SAVED.glob("*/config.json")))

# Compiled, since op by op every shape costs dozens of small compilations.
residual = jax.jit(lm.residual, static_argnums=2)
logits = jax.jit(lm.logits, static_argnums=2)
splice = jax.jit(lm.splice, static_argnums=(2, 3), static_argnames=("site", "skip_first"))


def points(model):
    """Every site of every block."""
    sites = [site for site in lm.SITES if site != "resid_mid" or not model.config.parallel]
    return [(layer, site) for layer in range(model.config.layers) for site in sites]


@jax.jit
def everything(model, ids):
    """The activations at every site, and the logits that follow from the first residual and the last."""
    found = dict(zip(points(model), lm.residuals(model, ids, points(model)), strict=True))
    last = model.config.layers - 1
    return found, [lm.logits(model, found[layer, "resid_post"], layer) for layer in (0, last)]


@functools.cache
def saved(name, dtype="float32"):
    return lm.load(SAVED / name, dtype=dtype), np.load(SAVED / name / "expected.npz")


tiny = functools.cache(lm.tiny)


def tokens(batch=2, length=6, seed=0, vocab=16):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, length)), jnp.int32)


# --- residual and logits


def wanted_at(expected, layer, site):
    if site == "resid_mid":
        return expected["resid_pre"][layer] + expected["attn_out"][layer]
    return expected[site][layer]


@EVERY_MODEL
def test_every_site_and_the_logits_are_those_of_transformers(name):
    model, expected = saved(name)
    found, predicted = everything(model, expected["ids"])
    assert found.keys() == set(points(model))
    for (layer, site), x in found.items():
        wanted = wanted_at(expected, layer, site)
        np.testing.assert_allclose(x, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=f"{layer} {site}")
    for each in predicted:
        assert each.dtype == jnp.float32
        np.testing.assert_allclose(each, expected["logits"], atol=1e-5 * np.abs(expected["logits"]).max())


@EVERY_MODEL
def test_bfloat16_is_close(name, mixed):
    model, expected = saved(name, "bfloat16")
    found, predicted = everything(model, expected["ids"])
    assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.bfloat16)}
    pairs = [(x, wanted_at(expected, *point)) for point, x in found.items()]
    for got, wanted in [*pairs, (predicted[0], expected["logits"])]:
        assert np.linalg.norm(f64(got) - wanted) < 0.05 * np.linalg.norm(wanted)
    # Summed in bfloat16, logits would be of few values.
    assert predicted[0].dtype == jnp.float32
    assert np.any(predicted[0] != predicted[0].astype(jnp.bfloat16))


@jax.jit
def spliced(model, ids):
    """The logits with the last block's activation at each site replaced by itself, and without its MLP."""
    layer = model.config.layers - 1
    same = {site: lm.splice(model, ids, layer, lambda h: h, site=site) for _, site in points(model)}
    return same, lm.splice(model, ids, layer, jnp.zeros_like, site="mlp_out", skip_first=0)


@EVERY_MODEL
def test_a_splice_at_every_site(name):
    """Of itself it changes nothing; zeros at what the MLP adds leave the rest."""
    model, expected = saved(name)
    same, without = spliced(model, expected["ids"])
    for site, found in same.items():
        np.testing.assert_allclose(
            found, expected["logits"], atol=1e-5 * np.abs(expected["logits"]).max(), err_msg=site
        )
    last = model.config.layers - 1
    rest = expected["resid_post"][last] - expected["mlp_out"][last]
    np.testing.assert_allclose(without, logits(model, jnp.asarray(rest), last), atol=1e-4)


@EVERY_MODEL
def test_cross_entropies_are_those_of_the_logits_of_transformers(name):
    model, expected = saved(name)
    ids, predicted = expected["ids"], f64(expected["logits"])[:, :-1]
    surprise = scipy.special.logsumexp(predicted, axis=-1)
    surprise -= np.take_along_axis(predicted, ids[:, 1:, None], axis=-1)[..., 0]
    for site in ("resid_post", "mlp_out"):
        found = lm.cross_entropy(model, [jnp.asarray(ids)], 1, {"same": lambda h: h, "zero": jnp.zeros_like}, site=site)
        np.testing.assert_allclose(
            [found[each].cross_entropy for each in ("clean", "same")], surprise.mean(), rtol=1e-5
        )
        assert found["zero"].kl > 1e-5


def test_families_differ_where_their_configurations_do():
    """Each of the data in a configuration has an effect on some model here, so that the comparisons would see it."""
    plain = config.Config(1, 1, 1, 1, 1, 1, 1, 1, 1e-5, tied=True, rope=None)
    found = [saved(path.parent.name)[0].config for path in SAVED.glob("*/config.json")]
    sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_width", "hidden", "context", "eps", "dtype")
    for field in set(plain._fields) - set(sizes):
        assert any(getattr(c, field) != getattr(plain, field) for c in found), field
    assert any(max(filter(None, c.windows)) < 11 for c in found if c.windows)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ((3, "resid_post"), "got layer 3, the model has 3; pass one from 0 to 2."),
        ((True, "resid_post"), "got layer True, the model has 3"),
        ((0, "mlp"), "got site 'mlp'; pass one of resid_pre, hook_z, attn_out, resid_mid, mlp_in, mlp_out, resid_post"),
        ((0, "resid_mid"), "got site 'resid_mid', and a gpt_neox runs attention and MLP in parallel; pass another"),
    ],
)
def test_a_place_that_a_model_has_not_is_refused(point, message):
    model, expected = saved("gpt_neox")
    ids = jnp.asarray(expected["ids"])
    for call in (
        lambda: lm.residual(model, ids, *point),
        lambda: lm.residuals(model, ids, [(0, "resid_post"), point]),
        lambda: lm.splice(model, ids, point[0], lambda h: h, site=point[1]),
        lambda: lm.cross_entropy(model, [ids], point[0], {}, site=point[1]),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("resid_mid", (None, "resid_mid")),
        ("blocks.8.hook_resid_pre", (8, "resid_pre")),
        ("blocks.12.attn.hook_z", (12, "hook_z")),
        ("blocks.0.hook_attn_out", (0, "attn_out")),
        ("blocks.3.mlp.hook_in", (3, "mlp_in")),
        ("model.layers.9.output", (9, "resid_post")),
        ("model.layers.9.self_attn.o_proj.input", (9, "hook_z")),
        ("model.layers.9.pre_feedforward_layernorm.output", (9, "mlp_in")),
        ("model.layers.9.post_feedforward_layernorm.output", (9, "mlp_out")),
    ],
)
def test_names_of_places(name, place):
    assert sites.parse(name) == place


# In TransformerLens `hook_mlp_in` is before the norm, and SAELens takes it for behind.
@pytest.mark.parametrize("name", ["", "mlp", "blocks.8", "blocks.8.hook_mlp_in", "blocks.x.hook_mlp_out", "hook_embed"])
def test_another_name_of_a_place_is_refused(name):
    with pytest.raises(InputError, match=re.escape(f"got site {name!r}; pass one of resid_pre")):
        sites.parse(name)


def test_a_model_is_traced_once():
    # Its configuration is static, and must be the same for models that are loaded apart.
    traced = jax.jit(chex.assert_max_traces(lambda model, ids: lm.residual(model, ids, 0), 1))
    for seed in range(2):
        traced(lm.load(SAVED / "llama"), tokens(seed=seed))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_batch_on_eight_devices_stays_there(name):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    split = NamedSharding(mesh, PartitionSpec("data"))
    model, expected = saved(name)
    rows = np.random.default_rng(0).integers(0, 2, 16)
    everywhere = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    ids = jax.device_put(expected["ids"][rows], split)
    compiled = everything.lower(everywhere, ids).compile()
    found, predicted = compiled(everywhere, ids)
    pairs = [(x, wanted_at(expected, *point)) for point, x in found.items()]
    for got, wanted in [*pairs, *((each, expected["logits"]) for each in predicted)]:
        assert got.sharding.is_equivalent_to(split, got.ndim)
        np.testing.assert_allclose(got, wanted[rows], atol=1e-4)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize(
    ("ids", "layer", "error", "message"),
    [
        (jnp.ones((2, 6)), 1, TypeError, "got ids of dtype float32, expected integers; pass tokens"),
        (tokens()[0], 1, ValueError, r"got ids of shape \(6,\); pass \(b, s\) with s from 1 to 32"),
        (tokens()[None], 1, ValueError, r"got ids of shape \(1, 2, 6\); pass \(b, s\)"),
        (tokens(length=33), 1, ValueError, r"got ids of shape \(2, 33\); pass \(b, s\) with s from 1 to 32"),
        (tokens()[:, :0], 1, ValueError, r"got ids of shape \(2, 0\); pass \(b, s\) with s from 1 to 32"),
        (tokens(), -1, ValueError, "got layer -1, the model has 3; pass one from 0 to 2"),
        (tokens(), 3, ValueError, "got layer 3, the model has 3; pass one from 0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(ids, layer, error, message, unchecked):
    for call in (residual, functools.partial(splice, skip_first=1)):
        arguments = (tiny(), ids, layer) if call is residual else (tiny(), ids, layer, jnp.zeros_like)
        with pytest.raises(error, match=message):
            call(*arguments)
    with pytest.raises(error, match=message):
        lm.cross_entropy(tiny(), [ids], layer, {})


# --- splice


def by_hand(model, ids, layer, new, skip_first=1):
    """The logits of a residual of which the positions from `skip_first` on are replaced."""
    h = np.array(residual(model, ids, layer))
    h[:, skip_first:] = np.broadcast_to(new, h.shape)[:, skip_first:]
    return f64(logits(model, jnp.asarray(h), layer))


def same(h):
    return h


def mean(h):
    return jnp.broadcast_to(jnp.mean(h, axis=(0, 1)), h.shape)


@pytest.mark.parametrize("layer", [0, 2])
def test_splicing_the_residual_itself_changes_nothing(layer):
    model, ids = tiny(), tokens()
    plain = logits(model, residual(model, ids, 0), 0)
    np.testing.assert_allclose(splice(model, ids, layer, same), plain, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "fn", "skip_first"),
    [(0, mean, 1), (1, jnp.zeros_like, 0), (1, jnp.zeros_like, 1), (1, mean, 3), (2, jnp.zeros_like, 3)],
)
def test_zeros_and_means(layer, fn, skip_first):
    model, ids = tiny(), tokens()
    h = f64(residual(model, ids, layer))
    new = h.mean(axis=(0, 1)) if fn is mean else 0.0
    found = splice(model, ids, layer, fn, skip_first=skip_first)
    np.testing.assert_allclose(found, by_hand(model, ids, layer, new, skip_first), atol=1e-5)
    plain = logits(model, residual(model, ids, 0), 0)
    np.testing.assert_allclose(found[:, :skip_first], plain[:, :skip_first], atol=1e-6)
    assert np.abs(found - plain)[:, skip_first:].max() > 0.01


@pytest.mark.parametrize("fn", [lambda h: h[..., :4], lambda h: h[:, 1:], lambda h: h[0], jnp.sum])
def test_a_splice_of_another_shape_is_refused(fn):
    with pytest.raises(
        ValueError, match=r"`splice` got \(.*\) from fn for activations \(2, 6, 8\); return one for each"
    ):
        lm.splice(tiny(), tokens(), 1, fn)


@pytest.mark.parametrize(
    ("fn", "skip_first", "error", "message"),
    [
        (lambda h: (h, h), 1, TypeError, "got tuple from fn; return activations"),
        (lambda h: 0.0, 1, TypeError, "got float from fn"),
        (lambda h: h > 0, 1, TypeError, "got bool from fn for activations of float32"),
        (lambda h: h.astype(int), 1, TypeError, "got int32 from fn"),
        (lambda h: h.astype(complex), 1, TypeError, "got complex64 from fn"),
        (jnp.zeros_like, -1, ValueError, "got skip_first -1 for 6 positions"),
        (jnp.zeros_like, 6, ValueError, "got skip_first 6 for 6 positions"),
    ],
)
def test_a_splice_that_would_do_nothing_or_something_else_is_refused(fn, skip_first, error, message, unchecked):
    with pytest.raises(error, match=message):
        lm.splice(tiny(), tokens(), 1, fn, skip_first=skip_first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_splice_in_another_precision_keeps_that_of_the_model(dtype):
    model, ids = tiny(), tokens()
    found = splice(model, ids, 1, lambda h: h.astype(dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, splice(model, ids, 1, same), atol=0.05)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("bad", [-1, -260, 260, 2**30])
def test_a_token_that_the_vocabulary_has_not_is_refused_or_nan(bad, name):
    model, _ = saved(name)
    ids = tokens(2, 6, vocab=260).at[1, 3].set(bad)
    for call in (
        lambda: lm.residual(model, ids, 1),
        lambda: lm.splice(model, ids, 1, same),
        lambda: lm.cross_entropy(model, [ids], 1, {}),
    ):
        with pytest.raises(ValueError, match=r"got tokens from .* pass 0 to 259"):
            call()
    wrong = np.isnan(np.asarray(residual(model, ids, 1))).all(axis=-1)
    assert not wrong[0].any() and wrong[1, 3:].all()


@pytest.mark.parametrize(
    ("h", "layer", "message"),
    [(jnp.zeros((2, 6, 7)), 1, r"pass \(b, s, 8\)"), (jnp.zeros((6, 8)), 1, r"pass \(b, s, 8\)")]
    + [(jnp.zeros((2, 6, 8)), layer, "pass one from 0 to 2") for layer in (-1, 3, 1.0)],
)
def test_logits_of_what_does_not_fit_are_refused(h, layer, message, unchecked):
    with pytest.raises(ValueError, match=message):
        lm.logits(tiny(), h, layer)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float64", "half-ish"])
def test_a_model_of_another_dtype_is_refused(dtype):
    with pytest.raises(InputError, match="pass float32 or bfloat16"):
        lm.load(SAVED / "llama", dtype=dtype)


def test_the_past_does_not_see_a_splice():
    model, ids = tiny(), tokens()
    plain = logits(model, residual(model, ids, 0), 0)
    found = splice(model, ids, 1, lambda h: h.at[:, 3].set(7.0))
    np.testing.assert_allclose(found[:, :3], plain[:, :3], atol=1e-6)
    assert np.all(np.abs(found - plain)[:, 3:].max(axis=(0, 2)) > 1e-4)


def test_the_derivative_goes_through_a_splice():
    model, ids = tiny(), tokens()

    def loss(new):
        return jnp.sum(lm.splice(model, ids, 1, lambda h: new)[:, :, 3])

    new = 0.9 * residual(model, ids, 1)
    value, gradient = jax.jit(jax.value_and_grad(loss))(new)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.linalg.norm(gradient[:, 1:], axis=-1) > 1e-4)
    assert not np.any(gradient[:, 0])  # where the residual was left alone


@pytest.mark.parametrize("activation", [jaxsae.TopK(4), jaxsae.ReLU()], ids=["TopK", "ReLU"])
def test_the_refined_code_of_an_sae_is_spliced(activation):
    model, ids = tiny(), tokens()
    autoencoder = sae(d=8, m=16, activation=activation)
    capacity = activation.slots or 16

    def refined(h):
        return jaxsae.decode(autoencoder, jaxsae.refine(autoencoder, h, capacity=capacity)[0])

    h, (dictionary, b_dec) = residual(model, ids, 1), map(f64, (autoencoder.W_dec, autoencoder.b_dec))
    best = optimum(dictionary, h - b_dec, jaxsae.encode(autoencoder, h, capacity=capacity))
    new = np.einsum("...k,...kd->...d", best.values, atoms_of(dictionary, best)) + b_dec
    np.testing.assert_allclose(splice(model, ids, 1, refined), by_hand(model, ids, 1, new), atol=1e-3)


# --- cross-entropy


def oracle(model, ids, layer, fn):
    """Surprise and KL from the clean predictions, token by token, in float64."""
    h = residual(model, ids, layer)
    clean, spliced = (scipy.special.log_softmax(by_hand(model, ids, layer, new)[:, :-1], axis=-1) for new in (h, fn(h)))
    surprise = -np.take_along_axis(spliced, np.asarray(ids)[:, 1:, None], axis=-1)
    return surprise.ravel(), np.sum(np.exp(clean) * (clean - spliced), axis=-1).ravel()


def test_cross_entropy_is_a_mean_over_tokens():
    model, batches = tiny(), [tokens(), tokens(1, 20, seed=1)]
    splices = {"zero": jnp.zeros_like, "mean": mean, "same": same}
    found = lm.cross_entropy(model, iter(batches), 1, splices)
    assert found.keys() == {"clean", *splices}
    for name, fn in {"clean": same, **splices}.items():
        parts = [oracle(model, ids, 1, fn) for ids in batches]
        surprise, divergence = (np.concatenate(each) for each in zip(*parts, strict=True))
        assert found[name].tokens == surprise.size == 2 * 5 + 19
        np.testing.assert_allclose(found[name].cross_entropy, surprise.mean(), rtol=1e-6)
        np.testing.assert_allclose(found[name].kl, divergence.mean(), rtol=1e-5, atol=1e-6)
        means = [part[0].mean() for part in parts]
        assert abs(np.mean(means) - surprise.mean()) > 1e-3  # so that the two can be distinguished
    assert found["zero"].kl > 0.01
    assert found["same"] == found["clean"]
    assert abs(found["clean"].kl) < 1e-6


@pytest.mark.parametrize("skip_first", [0, 3])
def test_cross_entropy_leaves_the_first_positions_alone(skip_first):
    model, ids = tiny(), tokens()
    found = lm.cross_entropy(model, [ids], 1, {"zero": jnp.zeros_like}, skip_first=skip_first)["zero"]
    spliced = scipy.special.log_softmax(by_hand(model, ids, 1, 0.0, skip_first)[:, :-1], axis=-1)
    expected = -np.take_along_axis(spliced, np.asarray(ids)[:, 1:, None], axis=-1).mean()
    np.testing.assert_allclose(found.cross_entropy, expected, rtol=1e-6)


def test_cross_entropy_needs_batches():
    with pytest.raises(ValueError, match="`cross_entropy` got no batches; pass at least one"):
        lm.cross_entropy(tiny(), [], 1, {"zero": jnp.zeros_like})


@pytest.mark.parametrize(("length", "skip_first"), [(1, 0), (2, 1), (6, 5)])
def test_cross_entropy_of_what_no_prediction_sees_is_refused(length, skip_first):
    with pytest.raises(ValueError, match="no prediction sees the splice"):
        lm.cross_entropy(tiny(), [tokens(2, length)], 1, {"zero": jnp.zeros_like}, skip_first=skip_first)


def test_where_an_ablation_loses_nothing_nothing_is_recovered():
    for number in (float, jnp.float32):
        clean, spliced = (lm.NextToken(number(10), number(nats), number(0)) for nats in (20, 30))
        assert np.isnan(lm.loss_recovered(clean, spliced, clean))
        assert jax.jit(lm.loss_recovered)(clean, spliced, spliced + spliced) == 0


def test_loss_recovered():
    clean, spliced, ablated = (lm.NextToken(10.0, surprise, 0.0) for surprise in (20.0, 30.0, 60.0))
    assert lm.loss_recovered(clean, clean, ablated) == 1
    assert lm.loss_recovered(clean, ablated, ablated) == 0
    assert lm.loss_recovered(clean, spliced, ablated) == 0.75
    assert (clean + ablated).cross_entropy == 4


# --- the real one


@pytest.fixture(scope="module")
def real(smollm2):
    if not GOLDEN.is_file():
        pytest.skip(f"{GOLDEN} is missing: what transformers computed")
    return lm.load(smollm2), np.load(GOLDEN)


@pytest.mark.lm
def test_the_residual_of_smollm2(real):
    model, golden = real
    for layer in (0, 8, 15):
        expected = golden[f"hidden{layer}"]
        found = residual(model, golden["ids"], layer)[:, : expected.shape[1]]
        # Row by row: the first position's is a thousand times as large as the others.
        error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert error.max() < 2e-3


@pytest.mark.lm
def test_the_predictions_of_smollm2(real):
    model, golden = real
    found = np.asarray(logits(model, residual(model, golden["ids"], 8), 8))
    top = np.argsort(-found, axis=-1)[..., :5]
    np.testing.assert_array_equal(top, golden["top5_ids"])
    np.testing.assert_allclose(np.take_along_axis(found, top, axis=-1), golden["top5_logits"], atol=2e-3)


@pytest.mark.lm
def test_the_cross_entropies_of_smollm2(real):
    model, golden = real
    centre = jnp.asarray(golden["splice_mean"])
    splices = {
        "zero": jnp.zeros_like,
        "mean": lambda h: jnp.broadcast_to(centre, h.shape),
        "scale09": lambda h: centre + 0.9 * (h - centre),
    }
    found = lm.cross_entropy(model, [jnp.asarray(golden["ids"])], 8, splices)
    expected = json.loads(str(golden["ce"]))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name].cross_entropy - value) < 1e-3


@pytest.mark.lm
def test_the_tokens_of_smollm2(real):
    _, golden = real
    assert files.read_tokenizer("smollm2").encode(str(golden["text"])).ids == golden["ids"].ravel().tolist()
