import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import activations, assert_same_bits, every_activation, f64, sae

import jaxsae
from jaxsae import SparseCode, pytrees
from jaxsae.autoencoder import normalisation

# Compiled, since op by op every shape costs dozens of small compilations.
encode = jax.jit(jaxsae.encode, static_argnames="capacity")
encode_dense = jax.jit(jaxsae.encode_dense)
decode = jax.jit(jaxsae.decode)
dense = jax.jit(SparseCode.dense)

ACTIVATIONS = pytest.mark.parametrize(
    "activation", [jaxsae.ReLU(), jaxsae.TopK(4)], ids=lambda activation: type(activation).__name__
)


def test_init_makes_unit_atoms_and_an_encoder_that_is_their_transpose():
    made = jaxsae.init(jax.random.key(0), d=16, m=64, activation=jaxsae.ReLU())
    np.testing.assert_allclose(np.linalg.norm(made.W_dec, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(made.W_enc, made.W_dec.T)
    assert (made.d, made.m) == (16, 64)
    assert not np.any(made.b_enc)
    assert not np.any(made.b_dec)
    assert made.b_enc.shape == (64,)


def test_init_makes_other_atoms_from_another_key():
    first, second = (jaxsae.init(jax.random.key(seed), d=16, m=64, activation=jaxsae.ReLU()).W_dec for seed in (0, 1))
    assert np.abs(np.sum(first * second, axis=1)).max() < 0.99


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_init_takes_the_centre_and_dtype_of_b_dec(dtype):
    centre = jnp.arange(16, dtype=dtype)
    made = jaxsae.init(jax.random.key(0), d=16, m=64, activation=jaxsae.ReLU(), b_dec=centre)
    np.testing.assert_array_equal(f64(made.b_dec), f64(centre))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(dtype)}


def test_init_of_a_float64_centre(x64):
    made = jaxsae.init(jax.random.key(0), d=4, m=8, activation=jaxsae.ReLU(), b_dec=jnp.ones(4))
    np.testing.assert_allclose(np.linalg.norm(made.W_dec, axis=1), 1, rtol=1e-15)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d": 0}, r"`init` got d = 0 and m = 8; pass sizes of at least 1"),
        ({"m": -1}, r"`init` got d = 4 and m = -1; pass sizes of at least 1"),
        ({"activation": jaxsae.TopK(9)}, r"`init` got k = 9 for m = 8 latents; pass k of at most 8"),
        ({"b_dec": np.zeros(5)}, r"`init` got b_dec of shape \(5,\), expected \(4,\)"),
    ],
)
def test_init_refuses(wrong, message, unchecked):
    with pytest.raises(ValueError, match=message):
        jaxsae.init(jax.random.key(0), **{"d": 4, "m": 8, "activation": jaxsae.ReLU()} | wrong)


@ACTIVATIONS
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_encode_is_the_definition(activation, batch):
    model, x = sae(activation=activation), activations(batch=batch)
    W_enc, b_enc, b_dec = map(f64, (model.W_enc, model.b_enc, model.b_dec))
    pre = (f64(x) - b_dec) @ W_enc + b_enc
    z = f64(encode_dense(model, x))
    assert z.shape == (*batch, 32)
    np.testing.assert_allclose(z[z > 0], pre[z > 0], rtol=1e-4, atol=1e-5)
    if isinstance(activation, jaxsae.ReLU):
        np.testing.assert_array_equal(z > 0, pre > 0)
    else:
        np.testing.assert_array_equal((z > 0).sum(-1), np.minimum((pre > 0).sum(-1), 4))
        assert np.all(np.where(z > 0, np.inf, pre).min(-1) <= np.where(z > 0, pre, np.inf).min(-1))


@ACTIVATIONS
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_the_sparse_code_is_the_dense_one(activation, batch):
    model, x = sae(activation=activation), activations(batch=batch)
    code = encode(model, x, capacity=32)
    np.testing.assert_array_equal(dense(code), encode_dense(model, x))
    assert not np.any(code.num_dropped)


def test_topk_needs_no_capacity():
    model, x = sae(activation=jaxsae.TopK(4)), activations()
    code = encode(model, x)
    assert code.values.shape == (8, 4)
    np.testing.assert_array_equal(dense(code), encode_dense(model, x))


def test_relu_reports_what_does_not_fit():
    model, x = sae(activation=jaxsae.ReLU()), activations()
    active = (np.asarray(encode_dense(model, x)) > 0).sum(-1)
    code = encode(model, x, capacity=8)
    assert active.max() > 8
    np.testing.assert_array_equal(code.num_dropped, np.maximum(active - 8, 0))


@pytest.mark.parametrize("batch", [(), (7, 10)])
def test_decoding_a_sparse_code_is_decoding_its_dense_form(batch):
    model = sae()
    code = encode(model, activations(batch=batch))
    reconstruction = decode(model, code)
    assert reconstruction.shape == (*batch, 16)
    expected = f64(dense(code)) @ f64(model.W_dec) + f64(model.b_dec)
    np.testing.assert_allclose(reconstruction, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(decode(model, dense(code)), expected, rtol=1e-4, atol=1e-5)


def test_decoding_an_empty_code_gives_the_centre():
    model = sae()
    empty = SparseCode(jnp.zeros((3, 4)), jnp.full((3, 4), 32, jnp.int32), 32)
    np.testing.assert_array_equal(decode(model, empty), np.broadcast_to(model.b_dec, (3, 16)))


def test_both_decoders_have_one_gradient():
    model, x = sae(), activations()
    code = encode(model, x)

    def loss(through_dense, model, values):
        sparse = code.replace(values=values)
        reconstruction = jaxsae.decode(model, sparse.dense() if through_dense else sparse)
        return jnp.sum((x - reconstruction) ** 2)

    gradients = [jax.jit(jax.grad(lambda m, v, t=t: loss(t, m, v), argnums=(0, 1))) for t in (False, True)]
    sparse, through_dense = (gradient(model, code.values) for gradient in gradients)
    for a, b in zip(jax.tree.leaves(sparse), jax.tree.leaves(through_dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# The shape of most tests of `refit`, which is compiled once for all.
def to_refine(activation=None):
    return sae(activation=activation or jaxsae.TopK(6)), activations(batch=(64,))


def test_refine_keeps_the_support_and_never_reconstructs_worse():
    model, x = to_refine()
    code = encode(model, x)
    refined, info = jaxsae.refine(model, x)
    assert_same_bits(refined.indices, code.indices)
    assert np.all(np.asarray(info.status) == jaxsae.Status.CONVERGED)
    before, after = (f64((x - decode(model, c)) ** 2).sum(-1) for c in (code, refined))
    assert np.all(after <= before * (1 + 1e-5))
    assert after.sum() < 0.9 * before.sum()


def test_refine_is_refit_about_the_centre():
    model, x = to_refine()
    code = jaxsae.encode(model, x)
    expected = jaxsae.refit(model.W_dec, x - model.b_dec, code)
    assert_same_bits(jaxsae.refine(model, x), expected)
    assert_same_bits(jaxsae.refine(model, x, code), expected)


def test_refine_with_a_capacity_carries_the_overflow_along():
    model, x = to_refine(jaxsae.ReLU())
    refined, info = jaxsae.refine(model, x, capacity=6)
    code = encode(model, x, capacity=6)
    assert np.any(code.num_dropped)
    assert_same_bits((refined.num_dropped, refined.indices), (code.num_dropped, code.indices))
    assert info.kkt.shape == (64,)


def test_refine_takes_a_solver_by_position():
    model, x = to_refine()
    _, info = jaxsae.refine(model, x, None, jaxsae.FISTA(max_steps=1))
    assert np.asarray(info.steps).max() == 1


@ACTIVATIONS
@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_a_rescaled_sae_does_to_x_what_the_sae_does_to_scaled_x(activation, scale):
    model, x = sae(activation=activation), activations()
    rescaled = jaxsae.autoencoder.rescale(model, scale)
    scaled, raw = encode(model, scale * x, capacity=32), encode(rescaled, x, capacity=32)
    np.testing.assert_array_equal(raw.indices, scaled.indices)
    np.testing.assert_allclose(raw.values, scaled.values / scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(decode(rescaled, raw), decode(model, scaled) / scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rescaled.W_dec, model.W_dec)


def test_an_sae_is_stacked_by_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    members = jax.vmap(lambda key: jaxsae.init(key, d=16, m=32, activation=jaxsae.TopK(4)))(keys)
    assert (members.d, members.m) == (16, 32)
    x = activations()
    codes = jax.vmap(jaxsae.encode, in_axes=(0, None))(members, x)
    one = jax.tree.map(lambda leaf: leaf[1], members)
    np.testing.assert_array_equal(codes.indices[1], encode(one, x).indices)


def test_an_sae_is_a_tree_of_its_parameters():
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(sae())]
    assert names == [".W_enc", ".b_enc", ".W_dec", ".b_dec"]
    masked = jax.tree.map(lambda _: None, sae())
    assert jax.tree.leaves(masked) == []


def test_numpy_arrays_are_taken(unchecked):
    model, x = jax.device_get(sae()), np.asarray(activations())
    reconstruction = decode(model, encode(model, x))
    np.testing.assert_array_equal(reconstruction, decode(sae(), encode(sae(), activations())))


CODE = SparseCode(jnp.zeros((8, 4)), jnp.zeros((8, 4), jnp.int32), 32)
X = activations()
INTEGERS = X.astype(jnp.int32)
NARROW = X[:, :15]
TOPK, RELU = sae(), sae(activation=jaxsae.ReLU())


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, r"`encode` got x of dtype int32", lambda: jaxsae.encode(TOPK, INTEGERS)),
        (TypeError, r"`encode` got x of dtype int32", lambda: jaxsae.encode_dense(TOPK, INTEGERS)),
        (TypeError, r"`refine` got x of dtype int32", lambda: jaxsae.refine(TOPK, INTEGERS)),
        (ValueError, r"`encode` got x of shape \(8, 15\), but .* d = 16", lambda: jaxsae.encode(TOPK, NARROW)),
        (ValueError, r"`refine` got x of shape \(8, 15\), but .* d = 16", lambda: jaxsae.refine(TOPK, NARROW)),
        (ValueError, r"`encode` got x of shape \(\), but", lambda: jaxsae.encode(TOPK, X[0, 0])),
        (ValueError, r"got no capacity, and ReLU", lambda: jaxsae.encode(RELU, X)),
        (ValueError, r"got no capacity, and ReLU", lambda: jaxsae.refine(RELU, X)),
        (ValueError, r"got capacity 33 for 32 latents", lambda: jaxsae.encode(RELU, X, capacity=33)),
        (ValueError, r"TopK fixes k = 4, but got capacity 3", lambda: jaxsae.encode(TOPK, X, capacity=3)),
        (ValueError, r"`decode` got a code of 31", lambda: jaxsae.decode(TOPK, CODE.replace(num_latents=31))),
        (ValueError, r"`decode` got a code of 31", lambda: jaxsae.decode(TOPK, jnp.ones((8, 31)))),
        (ValueError, r"got values \(8, 4\) .* y of shape \(7, 16\)", lambda: jaxsae.refine(TOPK, X[:7], CODE)),
    ],
)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_what_does_not_fit_is_refused_in_a_sentence(error, message, call, traced, unchecked):
    with pytest.raises(error, match=message) as raised:
        jax.eval_shape(call) if traced else call()
    assert ";" in str(raised.value), "a message says what was got, then what to do"


def test_reconstruct_encodes_by_itself_and_knows_every_convention():
    x = activations()
    skip = {"transcoder": True, "apply_b_dec_to_input": False, "W_skip": activations(9, batch=(16,), d=16)}
    for activation in (jaxsae.TopK(4), jaxsae.ReLU()):
        model = sae(activation=activation)
        z = encode_dense(model, x)
        expected = f64(z) @ f64(model.W_dec) + f64(model.b_dec)
        np.testing.assert_allclose(jaxsae.reconstruct(model, x), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(jaxsae.reconstruct(model, x, z), decode(model, z), rtol=1e-6)
        model = model.replace(**skip)
        expected = f64(encode_dense(model, x)) @ f64(model.W_dec) + f64(model.b_dec) + f64(x) @ f64(model.W_skip)
        np.testing.assert_allclose(jaxsae.reconstruct(model, x), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"adds x W_skip to its output; call jaxsae.reconstruct\(sae, x, code\)"):
            jaxsae.decode(model, z)


def test_to_fit_is_what_reconstruct_adds_up_whatever_the_conventions():
    x = activations()
    for each in (None, normalisation.LayerNorm(), normalisation.ConstantNorm()):
        model = sae().replace(normalisation=each, W_skip=activations(9, batch=(16,), d=16))
        code = encode(model, x)
        target = jaxsae.reconstruct(model, x, code)
        y = jaxsae.autoencoder.to_fit(model, x, target).y
        np.testing.assert_allclose(y, jaxsae.codes.decode(model.W_dec, code), rtol=1e-3, atol=1e-3)


def test_rethreshold_leaves_out_rows_that_are_not_finite():
    model, x = sae(activation=jaxsae.TopK(4)), activations(batch=(64,))
    broken = jnp.concatenate([x, x.at[:, 0].set(jnp.nan)[:16], x.at[:, 0].set(jnp.inf)[:16]])
    threshold = jaxsae.autoencoder.rethreshold(model, broken, 6.5).activation.threshold
    np.testing.assert_allclose(threshold, jaxsae.autoencoder.rethreshold(model, x, 6.5).activation.threshold, rtol=1e-5)


def test_rethreshold_never_gives_less_than_was_asked_for(x64):
    model = sae(activation=jaxsae.ReLU(), dtype=np.float64)
    alike = model.replace(W_enc=jnp.zeros((16, 32)), b_enc=jnp.repeat(jnp.arange(1.0, 9.0), 4))  # in fours
    x = activations(batch=(64,), dtype=np.float64)
    for made, l0, found in ((model, 6.5, 6.5), (alike, 3.0, 4.0), (alike, 5.0, 8.0), (alike, 32.0, 32.0)):
        code = jaxsae.encode(jaxsae.autoencoder.rethreshold(made, x, l0), x, capacity=32)
        np.testing.assert_allclose(code.l0.mean(), found, rtol=1e-12)


def test_rethreshold_refuses_rows_of_which_none_is_finite():
    with pytest.raises(ValueError, match="`rethreshold` got no row without NaN or Inf; pass some"):
        jaxsae.autoencoder.rethreshold(sae(activation=jaxsae.TopK(4)), jnp.full((8, 16), jnp.nan), 6.5)


@pytest.mark.parametrize("activation", [jaxsae.AbsTopK(4), jaxsae.Gated(*jnp.zeros((3, 32)))], ids=str)
def test_rethreshold_refuses_values_that_are_not_the_largest_pre_activations(activation):
    with pytest.raises(ValueError, match=r"`rethreshold` got .*, whose values are not the largest pre-activations"):
        jaxsae.autoencoder.rethreshold(sae(activation=activation), activations(), 6.5)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1j])
def test_a_scale_that_is_none_is_refused(scale, unchecked):
    for change in (jaxsae.autoencoder.rescale, jaxsae.autoencoder.fold_scale):
        with pytest.raises(ValueError, match=r"got a scale of .*, expected a positive number"):
            change(sae(), scale)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, bool])
def test_numbers_that_are_not_floating_point_are_refused(dtype, unchecked):
    model, x, code = sae(), np.ones((8, 16)).astype(dtype), encode(sae(), activations())
    values = code.replace(values=np.ones((8, 4)).astype(dtype))
    calls = {
        "encode": lambda: jaxsae.encode(model, x),
        "encode_dense": lambda: jaxsae.encode_dense(model, x),
        "reconstruct": lambda: jaxsae.reconstruct(model, x),
        "refine": lambda: jaxsae.refine(model, x),
        "decode": lambda: jaxsae.decode(model, np.ones((8, 32)).astype(dtype)),
        "decode of values": lambda: jaxsae.decode(model, values),
        "init": lambda: jaxsae.init(jax.random.key(0), d=16, m=32, activation=jaxsae.ReLU(), b_dec=x[0]),
        "from_dense": lambda: jaxsae.codes.from_dense(x, 2),
        "codes.decode": lambda: jaxsae.codes.decode(model.W_dec, values),
        "codes.scatter_add": lambda: jaxsae.codes.scatter_add(code, x),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"of dtype {np.dtype(dtype)}, expected floating point") as raised:
            call()
        assert "\n" not in str(raised.value), name


def test_numpy_arrays_are_taken_outside_of_jit(unchecked):
    model, x = jax.device_get(sae()), np.asarray(activations())
    code = jaxsae.encode(model, x)
    np.testing.assert_allclose(jaxsae.reconstruct(model, x), decode(sae(), encode(sae(), activations())), rtol=1e-5)
    by_hand = SparseCode(np.asarray(code.values), np.asarray(code.indices), 32)
    np.testing.assert_array_equal(jaxsae.decode(model, by_hand), jaxsae.decode(model, code))
    np.testing.assert_allclose(jaxsae.codes.scatter_add(by_hand, x), np.asarray(by_hand.dense()).T @ x, atol=1e-4)
    np.testing.assert_array_equal(by_hand.mask, code.mask)


def test_a_traced_capacity_is_refused_in_a_line(unchecked):
    model = sae(activation=jaxsae.ReLU())
    with pytest.raises(TypeError, match=r"`encode` got a traced capacity; make it static"):
        jax.jit(lambda model, x, capacity: jaxsae.encode(model, x, capacity=capacity))(model, activations(), 4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_atoms_have_unit_norm_in_half_precision(dtype):
    made = jaxsae.init(
        jax.random.key(0), d=64, m=256, activation=jaxsae.ReLU(), b_dec=jnp.zeros(48, dtype), transcoder=True
    )
    for atoms in (made.W_enc.T, made.W_dec):  # each number is rounded, and nothing else
        error = np.linalg.norm(f64(atoms), axis=1) - 1
        assert np.abs(error).max() < 0.5 * float(jnp.finfo(dtype).eps)
        assert abs(error.mean()) < 0.05 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("dtype, scale", [("float16", 300.0), ("float32", 1e25), ("float32", 1e-25)])
def test_rows_of_any_size_are_normalised(dtype, scale):
    x = np.random.default_rng(0).normal(size=(5, 12))
    rows = jnp.asarray(scale * x, dtype)
    norm, sigma = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(12), x.std(1, ddof=1, keepdims=True)
    found = normalisation.ConstantNorm()(rows)
    np.testing.assert_allclose(found.inputs, x / norm, rtol=3e-3)
    np.testing.assert_allclose(f64(found.scale) / scale, norm, rtol=3e-3)
    inputs, deviation, mean = normalisation.LayerNorm(eps=1e-5 * scale)(rows)
    np.testing.assert_allclose(inputs, (x - x.mean(1, keepdims=True)) / (sigma + 1e-5), rtol=3e-3, atol=3e-3)
    np.testing.assert_allclose(f64(deviation) / scale, sigma, rtol=3e-3)
    np.testing.assert_allclose(f64(mean) / scale, x.mean(1, keepdims=True), atol=3e-3)


@pytest.mark.parametrize("value", [0.1, 1.0, 3333.3, 1.1e5])
def test_equal_numbers_have_no_spread(value):
    row = jnp.full((1, 768), value)
    found, slope = jax.value_and_grad(lambda x: jnp.sum(normalisation.LayerNorm()(x).inputs ** 2))(row)
    assert found == 0
    assert not np.any(slope)


@pytest.mark.parametrize("name", ["AbsTopK", "Gated", "MatchingPursuit", "SquareOfTopK"])
def test_rethreshold_refuses_what_no_threshold_can_replace(name):
    @pytrees.dataclass
    class SquareOfTopK(jaxsae.TopK):
        def __call__(self, pre):
            return super().__call__(pre) ** 2

    activation = {**every_activation(), "SquareOfTopK": SquareOfTopK(4)}[name]
    with pytest.raises(ValueError, match=f"`rethreshold` got {name}, whose values are not the largest"):
        jaxsae.autoencoder.rethreshold(sae(activation=activation), activations(), 2.0)
