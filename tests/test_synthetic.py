"""Rows with known features, and codes compared with the truth."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsae
from jaxsae import data, metrics


def firing(world, rows=40_000, seed=1):
    return np.asarray(world.sample(jax.random.key(seed), rows)[1]) > 0


def make(**options):
    return data.synthetic(jax.random.key(0), **{"d": 24, "m": 96, "l0": 5.0} | options)


# --- The distribution


@pytest.mark.parametrize("zipf", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("roots", [None, 12])
def test_features_fire_as_often_as_zipf_says(zipf, roots):
    frequency = firing(make(zipf=zipf, roots=roots, l0=2.5)).mean(axis=0)
    wanted = (1.0 + np.arange(96)) ** -zipf
    wanted *= 2.5 / wanted.sum()  # none of them reaches ½
    # Four standard deviations of a mean of 40,000 rows.
    np.testing.assert_allclose(frequency, wanted, atol=4 * np.sqrt(wanted.max() / 40_000))
    np.testing.assert_allclose(frequency.sum(), 2.5, rtol=0.02)


def test_frequencies_stop_at_a_half():
    frequency = firing(make(zipf=2.0, l0=3.0)).mean(axis=0)
    np.testing.assert_allclose(frequency[:3], 0.5, atol=0.012)
    np.testing.assert_allclose(frequency.sum(), 3.0, rtol=0.02)


def test_a_feature_fires_only_where_its_parent_does():
    world = make(roots=8, children=2)
    fires, parent = firing(world, 5000), np.asarray(world.parent)
    assert parent.tolist() == [-1] * 8 + [(j - 8) // 2 for j in range(8, 96)]
    assert world.depth == 3  # 8 roots, 16 children, 32 grandchildren, and 40 below
    child = parent >= 0
    assert fires[:, child].any(axis=0).all()
    assert not (fires[:, child] & ~fires[:, parent[child]]).any()


def test_features_without_correlation_fire_independently_and_with_it_together():
    alone, together = (firing(make(correlation=c, factors=1, zipf=0.0)) for c in (0.0, 0.8))
    pairs = np.triu_indices(96, 1)
    of_alone = np.corrcoef(alone.T)[pairs]
    assert np.abs(of_alone).max() < 0.03  # 5 standard deviations
    # With one factor, loadings are ±√0.8: features fire together or exclude each other.
    of_together = np.corrcoef(together.T)[pairs]
    sign = np.sign(np.asarray(make(correlation=0.8, factors=1, zipf=0.0).loadings)[:, 0])
    alike = np.outer(sign, sign)[pairs] > 0
    assert of_together[alike].min() > 0.3
    assert of_together[~alike].max() < 0
    np.testing.assert_allclose(together.mean(axis=0), alone.mean(axis=0), atol=0.01)


def test_rows_are_codes_of_atoms_of_norm_one_plus_noise():
    for noise in (0.0, 0.5):
        world = make(noise=noise, d=200)
        np.testing.assert_allclose(np.linalg.norm(world.dictionary, axis=1), 1, atol=1e-6)
        x, z = (np.asarray(a, np.float64) for a in world.sample(jax.random.key(2), 4000))
        signal = z @ np.asarray(world.dictionary, np.float64)
        assert (z >= 0).all()
        left = x - signal
        if not noise:
            assert np.abs(left).max() < 1e-5
        np.testing.assert_allclose(np.sqrt((left**2).sum() / (signal**2).sum()), noise, atol=0.05)
    np.testing.assert_allclose(z[z > 0].mean(), 1, atol=0.01)
    np.testing.assert_allclose(z[z > 0].std(), 0.3, atol=0.01)


def test_the_same_key_gives_the_same_rows():
    first, again, other = (make().sample(jax.random.key(key), 10)[0] for key in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"l0": 0.0}, r"`synthetic` got l0 = 0.0 for 96 features; pass more than 0 and at most 48.0."),
        ({"l0": 49.0}, "got l0 = 49.0 for 96 features"),
        ({"correlation": 1.0}, "got correlation = 1.0; pass a number from 0 to below 1"),
        ({"roots": 97}, "got roots = 97; pass a number from 1 to 96"),
        ({"noise": -0.1}, "got noise = -0.1; pass a number from 0 to inf"),
        ({"zipf": float("nan")}, "got zipf = nan"),
        ({"d": 0}, "got d = 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


# --- Refinement of the truth


@pytest.mark.parametrize("l0, correlation", [(2.0, 0.0), (5.0, 0.5)])
def test_refined_values_are_the_true_ones_where_the_support_is(l0, correlation):
    world = make(l0=l0, correlation=correlation, roots=12)
    x, z = world.sample(jax.random.key(3), 500)
    shrunk = jaxsae.codes.from_dense(0.5 * z, 24)
    sae = jaxsae.SAE(world.dictionary.T, jnp.zeros(96), world.dictionary, jnp.zeros(24), jaxsae.ReLU())
    refined, _ = jaxsae.refine(sae, x, shrunk)
    atoms = [np.asarray(world.dictionary)[row > 0] for row in np.asarray(z)]
    determined = np.array([not len(some) or np.linalg.cond(some) < 30 for some in atoms])
    assert determined.mean() > 0.6  # others have as many features as dimensions
    np.testing.assert_allclose(refined.dense()[determined], z[determined], atol=1e-4)
    matching = metrics.match(world.dictionary, world.dictionary)
    assert float(metrics.recovery(matching, shrunk, z).bias) == pytest.approx(-0.5)
    kept = jax.tree.map(lambda a: a[determined], refined)
    found = metrics.recovery(matching, kept, z[determined])
    assert abs(float(found.bias)) < 1e-5
    assert float(found.value_error) < 1e-4


# --- Metrics


def test_atoms_are_matched_as_well_as_any_permutation_matches_them():
    generator = np.random.default_rng(0)
    truth, learnt = generator.normal(size=(5, 4)), generator.normal(size=(6, 4))
    found = metrics.match(jnp.asarray(learnt, jnp.float32), jnp.asarray(truth, jnp.float32))
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (truth, learnt)]
    cosines = unit[0] @ unit[1].T
    best = max(cosines[range(5), order].sum() for order in itertools.permutations(range(6), 5))
    assert found.mcc == pytest.approx(best / 5, abs=1e-6)
    np.testing.assert_allclose(found.cosine, cosines[range(5), found.latent], atol=1e-6)


def test_features_without_a_latent_are_matched_to_none():
    found = metrics.match(jnp.eye(3)[1:], jnp.eye(3))
    assert found.latent.tolist() == [-1, 0, 1]
    assert found.mcc == pytest.approx(2 / 3)


def test_recovery_is_what_a_loop_counts():
    generator = np.random.default_rng(0)
    learnt, truth = generator.normal(size=(7, 4)), generator.normal(size=(5, 4))
    matching = metrics.match(*(jnp.asarray(a, jnp.float32) for a in (learnt, truth)))
    dense = np.where(generator.random((30, 7)) < 0.4, generator.random((30, 7)) + 0.1, 0).astype(np.float32)
    true = np.where(generator.random((30, 5)) < 0.4, generator.random((30, 5)) + 0.1, 0).astype(np.float32)
    both = wrong = missed = right = 0
    errors, values = [], []
    for z, t in zip(dense, true, strict=True):
        mine = {int(j) for j in np.flatnonzero(z)}
        wanted = {int(matching.latent[j]): j for j in np.flatnonzero(t)}
        both += len(mine & wanted.keys())
        wrong += len(mine - wanted.keys())
        missed += len(wanted.keys() - mine)
        right += mine == wanted.keys()
        errors += [z[j] - t[wanted[j]] for j in mine & wanted.keys()]
        values += [t[wanted[j]] for j in mine & wanted.keys()]
    code, true = jaxsae.codes.from_dense(jnp.asarray(dense), 7), jnp.asarray(true)
    parts = [
        metrics.recovery(matching, jax.tree.map(lambda a, part=part: a[part], code), true[part])
        for part in (slice(0, 11), slice(11, 30))
    ]
    for found in (metrics.recovery(matching, code, true), parts[0] + parts[1]):
        np.testing.assert_allclose(found.precision, both / (both + wrong), rtol=1e-6)
        np.testing.assert_allclose(found.recall, both / (both + missed), rtol=1e-6)
        np.testing.assert_allclose(found.f1, 2 * both / (2 * both + wrong + missed), rtol=1e-6)
        np.testing.assert_allclose(found.bias, np.sum(errors) / np.sum(values), rtol=1e-4)
        np.testing.assert_allclose(
            found.value_error, np.sqrt(np.sum(np.square(errors)) / np.sum(np.square(values))), rtol=1e-5
        )
        np.testing.assert_allclose(found.exact, right / 30, rtol=1e-6)


def test_a_truth_of_other_features_is_refused():
    matching = metrics.match(jnp.eye(3), jnp.eye(3))
    code = jaxsae.codes.from_dense(jnp.ones((1, 3)), 3)
    with pytest.raises(ValueError, match="got a truth of 4 features, and a matching of 3"):
        metrics.recovery(matching, code, jnp.ones((1, 4)))
