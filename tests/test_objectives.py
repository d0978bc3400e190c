"""Each objective against its formula, and its gradient against autodiff of the dense formulation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import activations, every_activation, f64, sae

import jaxsae
from jaxsae import train
from jaxsae.train import losses
from jaxsae.train.objectives import L0, L1, AuxK, Gate, Matryoshka, MultiTopK, Objective

B, D, M, K = 12, 16, 32, 4


def parameters(seed, scale=0.1, dtype=np.float64):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=M), dtype)


def trained(name: str, dtype=np.float64):
    """An activation that is trained, made late, in the precision that is then in force."""
    return {**every_activation(M, K, dtype), "TopK, keep": jaxsae.TopK(2 * K, jnp.asarray(K, dtype))}[name]


NAMES = [*(name for name, each in every_activation(M, K).items() if not each.encoder_free), "TopK, keep"]


def support(name: str, pre: np.ndarray, activation) -> np.ndarray:
    """Which latents are active, by plain numpy."""
    match name:
        case "ReLU":
            return pre > 0
        case "TopK" | "TopK, keep":
            return (pre >= np.sort(pre, axis=1)[:, [-K]]) & (pre > 0)
        case "AbsTopK":
            return np.abs(pre) >= np.sort(np.abs(pre), axis=1)[:, [-K]]
        case "GroupMax":
            groups = pre.reshape(B, K, -1)
            return ((groups == groups.max(2, keepdims=True)) & (groups > 0)).reshape(pre.shape)
        case "BatchTopK":
            return (pre >= np.sort(pre.ravel())[-B * K]) & (pre > 0)
        case "JumpReLU":
            return pre > np.asarray(activation.threshold)
        case "Gated":
            values = np.exp(activation.r_mag) * pre + np.asarray(activation.b_mag)
            return (pre + np.asarray(activation.b_gate) > 0) & (values > 0)


def dense_loss(params, skip, x, target, on):
    """The reconstruction error of the dense formulation with the support given, for autodiff; all `[b m]`."""
    model, W_skip = params, skip
    pre = (x - model.b_dec if model.apply_b_dec_to_input else x) @ model.W_enc + model.b_enc
    if isinstance(model.activation, jaxsae.Gated):
        pre = jax.nn.relu(jnp.exp(model.activation.r_mag) * pre + model.activation.b_mag)
    x_hat = jnp.where(on, pre, 0) @ model.W_dec + model.b_dec
    if W_skip is not None:
        x_hat = x_hat + x @ W_skip
    return jnp.mean(jnp.sum((target - x_hat) ** 2, axis=1))


@pytest.mark.parametrize("kind", ["autoencoder", "transcoder"])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_dense_formulation(name, kind):
    with jax.enable_x64(True):
        activation = trained(name)
        model, x = sae(m=M, activation=activation, dtype=np.float64), activations(batch=(B,), dtype=np.float64)
        batch, target = x, x
        if kind == "transcoder":
            target = activations(5, batch=(B,), d=7, dtype=np.float64)
            W_dec = activations(6, batch=(M,), d=7, dtype=np.float64)
            skip = activations(7, batch=(D,), d=7, dtype=np.float64)
            model = model.replace(W_dec=W_dec, b_dec=target[0], W_skip=skip, apply_b_dec_to_input=False)
            batch = (x, target)
        state = train.init_state(model, optax.sgd(0.1))
        (value, measured), grads = jax.value_and_grad(Objective(), has_aux=True)(model, batch, state)
        pre = np.asarray(jaxsae.autoencoder.pre_activations(model, x))
        on = support(name, pre, activation)
        assert on.any()
        expected, expected_grads = jax.value_and_grad(dense_loss)(model, model.W_skip, x, target, on)
        skip_grad = jax.grad(dense_loss, argnums=1)(model, model.W_skip, x, target, on)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for field in ("W_enc", "b_enc", "W_dec", "b_dec"):
        np.testing.assert_allclose(
            getattr(grads, field), getattr(expected_grads, field), rtol=1e-6, atol=1e-9, err_msg=field
        )
    if kind == "transcoder":
        np.testing.assert_allclose(grads.W_skip, skip_grad, rtol=1e-6, atol=1e-9)
    if name == "Gated":
        for field in ("r_mag", "b_gate", "b_mag"):
            found, wanted = (getattr(g.activation, field) for g in (grads, expected_grads))
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9, err_msg=field)
    np.testing.assert_array_equal(measured.active, on.any(0))
    np.testing.assert_allclose(measured.metrics["l0"], on.sum(1).mean(), rtol=1e-6)


def test_the_thresholds_of_jumprelu_learn_by_the_straight_through_derivative():
    with jax.enable_x64(True):
        activation = trained("JumpReLU")
        model, x = sae(m=M, activation=activation, dtype=np.float64), activations(batch=(B,), dtype=np.float64)
        state = train.init_state(model, optax.sgd(0.1))
        objective = Objective((L0(0.3, target=5.0),))
        grads = jax.grad(objective, has_aux=True)(model, x, state)[0]
        pre, theta, width = (
            f64(jaxsae.autoencoder.pre_activations(model, x)),
            f64(activation.threshold),
            activation.bandwidth,
        )
        z = np.where(pre > theta, pre, 0)
        residual = f64(x) - z @ f64(model.W_dec) - f64(model.b_dec)
        kernel = np.abs(pre - theta) < width / 2
        z_bar = -2 * residual @ f64(model.W_dec).T / B
        by_error = (-theta / width * kernel * z_bar).sum(0)
        l0_bar = 0.3 * 2 * ((z > 0).sum(1).mean() / 5 - 1) / 5 / B
        by_l0 = (-1 / width * kernel * l0_bar).sum(0)
    assert kernel.any()
    np.testing.assert_allclose(grads.activation.threshold, by_error + by_l0, rtol=1e-6, atol=1e-9)


def test_jumprelu_is_strict_and_keeps_its_threshold_in_float32():
    theta = jnp.array([0.5, 1.0], jnp.float32)
    assert jaxsae.JumpReLU(theta)(jnp.array([0.5, 1.25])).tolist() == [0, 1.25]
    # In bfloat16 this threshold would be 1, and 1 would not be past it.
    fine = jaxsae.JumpReLU(jnp.array([0.999], jnp.float32))
    z = fine(jnp.array([1.0], jnp.bfloat16))
    assert z.dtype == jnp.bfloat16
    assert z.tolist() == [1]
    slope = jax.grad(lambda a: a(jnp.ones(1, jnp.bfloat16)).astype(jnp.float32).sum())(fine).threshold
    assert slope.dtype == jnp.float32


def test_the_gate_learns_from_its_own_terms_and_the_frozen_decoder_not_at_all():
    activation = jaxsae.Gated(*(parameters(seed, dtype=np.float32) for seed in (2, 3, 4)))
    model, x = sae(m=M, activation=activation), activations(batch=(B,))
    state = train.init_state(model, optax.sgd(0.1))
    without, with_gate = (jax.grad(Objective(terms), has_aux=True)(model, x, state)[0] for terms in ((), (Gate(0.2),)))
    assert not np.any(without.activation.b_gate)  # the step has no slope
    assert np.any(with_gate.activation.b_gate)
    penalty = jax.grad(
        lambda W: 0.2 * losses.l1(jax.nn.relu(activation.gate(jaxsae.autoencoder.pre_activations(model, x))), W)
    )
    np.testing.assert_allclose(with_gate.W_dec - without.W_dec, penalty(model.W_dec), rtol=1e-3, atol=1e-4)


def test_multi_topk_is_an_eighth_of_the_error_at_four_times_k():
    model, x = sae(m=M), activations(batch=(B,))
    state = train.init_state(model, optax.sgd(0.1))
    value = Objective((MultiTopK(),))(model, x, state)[0]

    def error(k):
        wide = model.replace(activation=jaxsae.TopK(k))
        return losses.mse(x, jaxsae.decode(wide, jaxsae.encode_dense(wide, x)))

    np.testing.assert_allclose(value, error(K) + error(4 * K) / 8, rtol=1e-5)


def test_matryoshka_adds_the_errors_of_prefixes():
    model, x = sae(m=M), activations(batch=(B,))
    state = train.init_state(model, optax.sgd(0.1))
    objective = Objective((Matryoshka((4, 16)),))
    code = jaxsae.encode(model, x)
    expected = losses.mse(x, jaxsae.decode(model, code)) + losses.matryoshka(model, x, code, (4, 16))
    np.testing.assert_allclose(objective(model, x, state)[0], expected, rtol=1e-6)


def test_terms_add_up():
    model, x = sae(m=M), activations(batch=(B,))
    state = train.init_state(model, optax.sgd(0.1)).replace(rows_since_fired=jnp.arange(M))
    terms = (L1(0.3), AuxK(3), MultiTopK())
    total, plain, *alone = (
        Objective(some, idle_after=20)(model, x, state)[0] for some in (terms, (), *((term,) for term in terms))
    )
    np.testing.assert_allclose(total - plain, sum(part - plain for part in alone), rtol=1e-5)


UNFIT = {
    "MultiTopK": (Objective((MultiTopK(),)), ["TopK", "TopK, keep"]),
    "L0": (Objective((L0(1.0, 4.0),)), ["JumpReLU"]),
    "Gate": (Objective((Gate(0.1),)), ["Gated"]),
    "keep": (Objective(keep=optax.constant_schedule(2.0)), ["TopK", "TopK, keep"]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", UNFIT)
def test_a_part_for_another_activation_is_refused_in_one_line(part, name):
    objective, fits = UNFIT[part]
    model, x = sae(m=M, activation=trained(name, np.float32)), activations(batch=(B,))
    call = jax.jit(lambda: objective(model, x, train.init_state(model, optax.sgd(0.1)))[0])
    if name in fits:
        assert np.isfinite(call())
    else:
        with pytest.raises(TypeError, match=rf"^`{part}` got an SAE of \w+; it is for \w+: leave it out\.(\n|$)"):
            call()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AuxK(0), "`AuxK` got k_aux 0; pass a whole number of at least 1"),
        (lambda: AuxK(2.5), "`AuxK` got k_aux 2.5"),
        (lambda: AuxK(4, jnp.nan), "`AuxK` got weight nan; pass a finite number"),
        (lambda: MultiTopK(0), "`MultiTopK` got factor 0"),
        (lambda: MultiTopK(weight=np.inf), "`MultiTopK` got weight inf"),
        (lambda: Matryoshka((-1, 0, 99)), "`Matryoshka` got a prefix of -1; pass a whole number"),
        (lambda: Matryoshka((4, True)), "`Matryoshka` got a prefix of True"),
        (lambda: L1(np.nan), "`L1` got weight nan"),
        (lambda: L0(np.nan, 4.0), "`L0` got weight nan"),
        (lambda: Gate(-np.inf), "`Gate` got weight -inf"),
    ],
)
def test_numbers_that_no_term_can_have(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("prefixes", [(M,), (4, 99)])
def test_a_prefix_of_all_latents_or_more_is_none(prefixes):
    model, x = sae(m=M), activations(batch=(B,))
    with pytest.raises(ValueError, match=rf"`Matryoshka` got prefixes .* for {M} latents; pass smaller ones"):
        Objective((Matryoshka(prefixes),))(model, x, train.init_state(model, optax.sgd(0.1)))


def test_a_schedule_of_k():
    model, x = sae(m=M, activation=jaxsae.TopK(8)), activations(batch=(B,))
    state = train.init_state(model, optax.sgd(0.1))
    objective = Objective(keep=optax.linear_schedule(8.0, 2.0, 6))
    l0 = [float(objective(model, x, state.replace(step=jnp.int32(step)))[1].metrics["l0"]) for step in (0, 3, 6, 100)]
    assert l0 == [8, 5, 2, 2]


def test_a_crosscoder_is_an_autoencoder_of_sites_side_by_side():
    sites, x = 3, activations(batch=(B, 3), d=D)
    side_by_side = x.reshape(B, sites * D)
    model = sae(m=M, d=sites * D)
    x_hat = jaxsae.decode(model, jaxsae.encode(model, side_by_side)).reshape(x.shape)
    W_enc, W_dec = model.W_enc.reshape(sites, D, M), model.W_dec.reshape(M, sites, D)
    pre = np.einsum("bsd,sdm->bm", f64(x) - f64(model.b_dec).reshape(sites, D), f64(W_enc)) + f64(model.b_enc)
    z = f64(jaxsae.TopK(K)(jnp.asarray(pre, jnp.float32)))
    expected = np.einsum("bm,msd->bsd", z, f64(W_dec)) + f64(model.b_dec).reshape(sites, D)
    np.testing.assert_allclose(x_hat, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_code_is_its_dense_form(name):
    activation = trained(name, np.float32)
    model, x = sae(m=M, activation=activation), activations(batch=(2, 3))
    code = jaxsae.encode(model, x, capacity=M if activation.slots is None else None)
    np.testing.assert_allclose(code.dense(), jaxsae.encode_dense(model, x), rtol=1e-5, atol=1e-6)
    assert not np.any(code.num_dropped)
    assert np.all(np.diff(np.abs(code.values), axis=-1) <= 0)


@pytest.mark.parametrize("name", NAMES)
def test_rescaling_gives_the_same_codes_in_other_units(name):
    activation = trained(name, np.float32)
    if name == "BatchTopK":
        activation = activation.replace(threshold=jnp.float32(0.7))
    model, x = sae(m=M, activation=activation), activations(batch=(B,))
    z = jaxsae.encode_dense(model, 4.0 * x)
    assert np.any(z)
    np.testing.assert_allclose(
        jaxsae.encode_dense(jaxsae.autoencoder.rescale(model, 4.0), x), z / 4, rtol=1e-4, atol=1e-5
    )


def test_signed_codes_are_refined_with_free_signs():
    model, x = sae(m=M, activation=jaxsae.AbsTopK(K)), activations(batch=(B,))
    code = jaxsae.encode(model, x)
    refined, info = jaxsae.refine(model, x, code)
    assert np.any(f64(code.values) < 0)
    assert np.any(f64(refined.values) < 0)
    atoms = f64(model.W_dec)[np.asarray(refined.indices)]
    residual = f64(x) - f64(model.b_dec) - np.einsum("bk,bkd->bd", f64(refined.values), atoms)
    assert np.abs(np.einsum("bkd,bd->bk", atoms, residual)).max() < 1e-3
    jaxsae.check(info)


def test_a_transcoder_is_refined_towards_its_target():
    x, target = activations(batch=(B,)), activations(5, batch=(B,), d=7)
    model = jaxsae.init(
        jax.random.key(0), d=D, m=M, activation=jaxsae.TopK(K), b_dec=target[0], transcoder=True, skip=True
    )
    model = model.replace(W_skip=0.1 * activations(6, batch=(D,), d=7))
    refined, _ = jaxsae.refine(model, x, target=target)
    before, after = (
        losses.mse(target, jaxsae.autoencoder.reconstruct(model, x, code))
        for code in (jaxsae.encode(model, x), refined)
    )
    assert after < before
    with pytest.raises(ValueError, match="got a transcoder and no target"):
        jaxsae.refine(model, x)


def test_batch_topk_estimates_the_threshold_it_infers_with():
    model = sae(m=M, activation=jaxsae.BatchTopK(K))
    tx = optax.sgd(0.0)
    step, state = train.make_step(Objective(), tx), train.init_state(model, tx)
    expected = None
    for seed in range(3):
        x = activations(seed, batch=(64,))
        least = float(jnp.sort(jax.nn.relu(jaxsae.autoencoder.pre_activations(model, x)).ravel())[-64 * K])
        expected = least if expected is None else 0.99 * expected + 0.01 * least
        state, shown = step(state, x)
        np.testing.assert_allclose(shown["l0"], K)
    np.testing.assert_allclose(state.sae.activation.threshold, expected, rtol=1e-5)
    l0 = jaxsae.encode(state.sae, activations(9, batch=(512,)), capacity=M).l0
    assert abs(float(l0.mean()) - K) < 0.5
    assert l0.min() < l0.max()


class Plain:
    """A term, but for the decorator."""

    def __call__(self, p):
        return jnp.sum(p.x)


class Heavier(L1):
    """One made of a term, and no more a pytree than that."""


@pytest.mark.parametrize(
    ("term", "name"),
    [
        (lambda p: jnp.sum(p.x), "<lambda>"),
        (Plain(), "Plain"),
        (Heavier(0.1), "Heavier"),
        (L1, "L1"),
        (losses.mse, "mse"),
    ],
)
def test_a_term_that_is_no_pytree_is_refused_in_one_line(term, name):
    with pytest.raises(TypeError, match=f"`Objective` got a term that is no pytree, {name}; write") as error:
        Objective((L1(0.1), term))
    assert "\n" not in str(error.value)


def test_terms_may_be_anything_that_jax_puts_in_their_place():
    objective = Objective((L1(0.1), AuxK(3), jax.tree_util.Partial(lambda p: jnp.sum(p.x))))
    leaves, structure = jax.tree.flatten(objective)
    for stand_in in (object(), None, "x", 1.0, jax.ShapeDtypeStruct((), jnp.float32)):
        structure.unflatten([stand_in] * len(leaves))


@pytest.mark.parametrize("batch", [[], "x", (1, 2, 3), [jnp.ones((2, D))]], ids=str)
def test_a_batch_that_is_none_is_refused(batch):
    state = train.init_state(sae(m=M), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"got a batch that is a (list|tuple|str) of "):
        Objective()(sae(m=M), batch, state)


def test_the_l0_term_wants_a_target():
    with pytest.raises(ValueError, match="`L0` got target 0; pass a number of latents above 0"):
        L0(1.0, target=0)


@pytest.mark.parametrize("terms", [(), (L1(0.1),), (AuxK(3),), (MultiTopK(),)])
def test_losses_of_a_narrow_type_are_numbers_of_float32(terms):
    # A squared error of 65,504 is infinite in float16, and so is every batch of rows of norm 256.
    model, x = sae(m=M, dtype=jnp.float16), 100 * activations(batch=(B,), dtype=jnp.float16)
    state = train.init_state(model, optax.sgd(0.0)).replace(rows_since_fired=jnp.full(M, 100))
    objective = Objective(terms, idle_after=50)
    value, measured = jax.jit(objective)(model, x, state)
    wide, rows = (jax.tree.map(lambda leaf: leaf.astype(jnp.float32), each) for each in (model, x))
    expected, other = jax.jit(objective)(wide, rows, state)
    assert value.dtype == measured.metrics["nmse"].dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=2e-2)
    np.testing.assert_allclose(measured.metrics["nmse"], other.metrics["nmse"], rtol=2e-2)
