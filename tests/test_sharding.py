"""The same numbers on one device and on many, however rows and latents are split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import activations, every_activation, f64

import jaxsae
from jaxsae import codes, sharding, train
from jaxsae._core import pytrees
from jaxsae.app.plan import collectives
from jaxsae.train import checkpoint
from jaxsae.train.objectives import L0, L1, AuxK, Gate, MultiTopK, Objective

D, M, K, B = 32, 256, 8, 64
MESHES = [(data, latent) for data in (1, 2, 4, 8) for latent in (1, 2, 4, 8) if 1 < data * latent <= 8]
every_mesh = pytest.mark.parametrize(
    "shape", [shape if shape == (2, 4) else pytest.param(shape, marks=pytest.mark.slow) for shape in MESHES], ids=str
)
TX = train.default_optimizer(1e-2, clip=1.0)
OBJECTIVE = Objective((AuxK(8), MultiTopK()), idle_after=3 * B)
STEP = train.make_step(OBJECTIVE, TX)


def under(shape):
    return jax.set_mesh(sharding.make_mesh(*shape))


def init_fn():
    model = jaxsae.init(jax.random.key(0), d=D, m=M, activation=jaxsae.TopK(K))
    return train.init_state(model, TX)


def learn(shape, steps=20):
    """Losses of a training, its final state, and the supports of some rows."""
    x = np.asarray(activations(batch=(4 * B,), d=D)).reshape(4, B, D)
    with under(shape):
        state, told = sharding.create(init_fn), []
        for number in range(steps):
            state, shown = STEP(state, sharding.make_global_batch(x[number % 4], B, 0))
            told.append({name: float(value) for name, value in shown.items()})
        support = jax.jit(lambda sae, x: jaxsae.encode(sae, x))(state.sae, sharding.make_global_batch(x[0], B, 0))
    return told, state, support


@functools.cache
def alone():
    return learn((1, 1))


@every_mesh
def test_training_has_the_same_numbers(shape):
    expected, state, code = alone()
    assert np.any(state.rows_since_fired >= OBJECTIVE.idle_after)  # AuxK had something to do
    told, split, found = learn(shape)
    for name in ("loss", "nmse", "l0", "dead"):
        np.testing.assert_allclose([x[name] for x in told], [x[name] for x in expected], rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(np.sort(found.indices), np.sort(code.indices))
    np.testing.assert_array_equal(split.rows_since_fired, state.rows_since_fired)
    np.testing.assert_allclose(split.sae.W_dec, state.sae.W_dec, atol=2e-5)
    # Each device has its own part of every array of the size of W_dec.
    for leaf in jax.tree.leaves(split):
        if leaf.ndim and M in leaf.shape:
            assert leaf.addressable_shards[0].data.size == leaf.size // shape[1]


# What is trained with more than the error. A pursuit has no encoder to train.
OBJECTIVES = {
    "ReLU": Objective((L1(0.1),)),
    "TopK": Objective((AuxK(8),), 100),
    "JumpReLU": Objective((L0(1.0, 8.0), AuxK(8)), 100),
    "BatchTopK": Objective((AuxK(8),), 100),
    "Gated": Objective((Gate(0.1),)),
}
FAMILIES = [name for name, each in every_activation(M, K).items() if not each.encoder_free]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_same_numbers(name):
    activation, objective = every_activation(M, K)[name], OBJECTIVES.get(name, Objective())
    step, x, losses = train.make_step(objective, TX), np.asarray(activations(batch=(B,), d=D)), {}
    for shape in ((1, 1), (2, 4)):
        with under(shape):
            state = sharding.create(
                lambda: train.init_state(jaxsae.init(jax.random.key(0), d=D, m=M, activation=activation), TX)
            )
            losses[shape] = []
            for _ in range(20):
                state, shown = step(state, sharding.make_global_batch(x, B, 0))
                losses[shape].append(float(shown["loss"]))
    np.testing.assert_allclose(losses[2, 4], losses[1, 1], rtol=1e-5)


@pytest.mark.slow
@every_mesh
def test_a_refit_has_the_same_numbers(shape):
    model = jaxsae.init(jax.random.key(1), d=D, m=M, activation=jaxsae.TopK(K))
    for n in (B, 13) if shape == (2, 4) else (B,):  # the exchanges differ
        x = activations(batch=(n,), d=D)
        expected, info = jaxsae.refine(model, x)
        with under(shape):
            placed = jax.device_put(model, sharding.shardings(model, jax.sharding.get_mesh()))
            found, info_ = jaxsae.refine(placed, sharding.make_global_batch(np.asarray(x), n, 0))
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(info_.status, info.status)


@pytest.mark.parametrize(
    "shape", [(2, 4), *(pytest.param(s, marks=pytest.mark.slow) for s in [(1, 8), (8, 1)])], ids=str
)
def test_nothing_of_the_size_of_the_pre_activations_or_the_atoms_is_gathered(shape):
    d, m, b = 16, 4096, 256  # that which may be exchanged is much smaller
    model = jaxsae.init(jax.random.key(0), d=d, m=m, activation=jaxsae.TopK(4))
    with under(shape):
        state = sharding.abstract(lambda: train.init_state(model, TX))
        mesh = jax.sharding.get_mesh()
        x = jax.ShapeDtypeStruct((b, d), jnp.float32)
        x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.rows_sharding(x, mesh))
        program = STEP.func.lower(TX, Objective((AuxK(8),), 1000), state, x).compile()
    found = collectives(program.as_text())
    assert found
    gathered = [size for kind, size in found if kind == "all-gather"]
    assert max(gathered, default=0) < 4 * m * d // 8
    reduced = [size for kind, size in found if kind == "all-reduce"]
    whole = [size for size in reduced if size >= 4 * m * d // shape[1]]
    assert len(whole) <= 2  # the gradients of encoder and decoder, once, where rows are split
    assert not whole or shape[0] > 1


@pytest.mark.slow
def test_the_gradient_of_a_refit_is_the_same():
    D_ = jax.random.normal(jax.random.key(0), (M, D))
    x = activations(batch=(16,), d=D)
    _, support = jax.lax.top_k(x @ D_.T, 4)
    code = jaxsae.SparseCode(jnp.ones((16, 4)), support, M)

    def loss(dictionary, y):
        return jnp.sum(jaxsae.refit(dictionary, y, code)[0].values ** 2)

    expected = jax.grad(loss, (0, 1))(D_, x)
    with under((2, 2)):
        found = jax.jit(jax.grad(loss, (0, 1)))(D_, x)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(64,), (6, 64), (8, 64), (2, 3, 64)])
def test_top_k_of_split_latents_is_that_of_all(shape):
    x = jnp.round(4 * jax.random.normal(jax.random.key(0), shape)).at[..., 7].set(jnp.nan)  # many ties
    expected = jax.lax.top_k(x, 9)
    with under((2, 4)):
        found = jax.jit(codes.top_k, static_argnums=1)(x, 9)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sums_over_slots_are_those_of_one_device():
    rng = np.random.default_rng(0)
    indices = jnp.asarray(rng.integers(0, M + 1, (12, 19)), jnp.int32)
    code = jaxsae.SparseCode(jnp.asarray(rng.normal(size=(12, 19)), jnp.float32), indices, M)
    D_, x = jax.random.normal(jax.random.key(0), (M, D)), jax.random.normal(jax.random.key(1), (12, D))

    def all_of_it(D_, code, x):
        slope = jax.grad(lambda D_, v: jnp.sum(x * codes.decode(D_, code.replace(values=v))), (0, 1))
        return codes.decode(D_, code), codes.scatter_add(code, x), codes.sum_by_latent(code), slope(D_, code.values)

    expected = all_of_it(D_, code, x)
    for shape in ((2, 4), (8, 1)):
        with under(shape):
            found = jax.jit(all_of_it)(D_, code, x)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, f64(b), rtol=1e-5, atol=1e-4)


def test_a_checkpoint_of_one_mesh_is_gone_on_from_on_another(tmp_path):
    with under((1, 4)):
        state = sharding.create(init_fn)
        with checkpoint.Checkpoints(tmp_path, config=None) as checkpoints:
            checkpoints.save(0, state, progress=None)
    with under((2, 2)):
        like = sharding.abstract(init_fn)
        found = checkpoint.Checkpoints(tmp_path, config=None).restore(like)
    assert found.state.sae.W_dec.sharding.spec == jax.P("latent")
    assert dict(found.state.sae.W_dec.sharding.mesh.shape) == {"data": 2, "latent": 2}
    np.testing.assert_array_equal(found.state.sae.W_dec, np.asarray(state.sae.W_dec))


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="got a mesh of 3 × 3 for 8 devices"):
        sharding.make_mesh(3, 3)
    with under((1, 3)), pytest.raises(ValueError, match="got 256 latents for a mesh that splits them 3 ways"):
        sharding.create(init_fn)


def test_collectives_are_read_from_a_program():
    hlo = """
  %all-gather.1 = f32[64,128]{1,0} all-gather(%x), channel_id=1
  %ar = (f32[8]{0}, bf16[4,4]{1,0}) all-reduce-start(%a, %b), channel_id=2
  %add = f32[8]{0} add(%a, %all-gather.1)
  %all-gather.2 = f32[64,128]{1,0} all-gather(%y), channel_id=3"""
    assert collectives(hlo) == {("all-gather", 4 * 64 * 128): 2, ("all-reduce", 64): 1}


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


THREE = ("replica", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("shape", "names", "kind", "roles"),
    [
        *[((4, 2), ("data", "model"), AUTO, {}), ((8,), ("data",), AUTO, {}), ((8,), ("latent",), AUTO, {})],
        ((4, 2), ("data", "latent"), EXPLICIT, {}),
        pytest.param((8,), ("data",), EXPLICIT, {}, marks=pytest.mark.slow),
        ((4, 2), ("data", "model"), AUTO, {"latent": "model"}),
        pytest.param((4, 2), ("data", "model"), EXPLICIT, {"latent": "model"}, marks=pytest.mark.slow),
        ((2, 2, 2), THREE, AUTO, {"data": THREE[:2], "latent": "tensor"}),
        pytest.param((2, 2, 2), THREE, EXPLICIT, {"data": THREE[:2], "latent": "tensor"}, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), THREE, AUTO, {"data": "fsdp", "latent": "tensor"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_of_another_kind_gives_the_same_numbers(shape, names, kind, roles):
    model = jaxsae.init(jax.random.key(0), d=16, m=32, activation=jaxsae.TopK(6))
    x = activations(batch=(64,))

    def all_of_it(model, x):
        code = jaxsae.encode(model, x)
        slope = jax.grad(lambda model: jnp.sum((x - jaxsae.reconstruct(model, x)) ** 2))(model)
        refined = jaxsae.refine(model, x, code, jaxsae.ConjugateGradient(tol=1e-6))[0]
        return code.dense(), slope, refined.dense(), codes.scatter_add(code, x)

    expected = jax.jit(all_of_it)(model, x)
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    with jax.set_mesh(mesh), sharding.axes(**roles):
        placed = jax.device_put(model, sharding.shardings(model, mesh))
        compiled = jax.jit(all_of_it).lower(placed, jax.device_put(x, sharding.rows_sharding(x, mesh))).compile()
        found = compiled(placed, jax.device_put(x, sharding.rows_sharding(x, mesh)))
    if roles:  # as by our own names: each device has its latents, and trades neither them nor pre-activations
        parts = dict(zip(names, shape, strict=True))[roles["latent"]]
        assert placed.W_dec.addressable_shards[0].data.shape[0] == 32 // parts
        ours = sharding.make_mesh(8 // parts, parts)
        with jax.set_mesh(ours):
            arguments = jax.device_put((model, x), (sharding.shardings(model, ours), sharding.rows_sharding(x, ours)))
            expected_collectives = collectives(jax.jit(all_of_it).lower(*arguments).compile().as_text())
        if shape == (4, 2) and kind == AUTO:
            assert collectives(compiled.as_text()) == expected_collectives
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["TopK", "BatchTopK"])
def test_a_step_on_a_mesh_of_others_is_that_on_ours(name):
    activation = {"TopK": jaxsae.TopK(K), "BatchTopK": jaxsae.BatchTopK(K)}[name]

    def made():
        model = jaxsae.init(jax.random.key(0), d=D, m=M, activation=activation)
        return train.init_state(model, TX)

    step, x, losses = train.make_step(Objective((AuxK(k_aux=4),), idle_after=8), TX), activations(batch=(16,), d=D), []
    theirs = jax.make_mesh((2, 2, 2), THREE, axis_types=(AUTO,) * 3)
    for mesh, roles in ((sharding.make_mesh(4, 2), {}), (theirs, {"data": THREE[:2], "latent": "tensor"})):
        with jax.set_mesh(mesh), sharding.axes(**roles):
            state = sharding.create(made)
            for _ in range(3):
                state, shown = step(state, sharding.make_global_batch(np.asarray(x), 16, 0))
            losses.append(float(shown["loss"]))
            assert state.sae.W_dec.addressable_shards[0].data.shape == (M // 2, D)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_latents_that_cannot_be_split_are_left_to_xla():
    model, x = jaxsae.init(jax.random.key(0), d=16, m=30, activation=jaxsae.TopK(6)), activations()
    expected = jaxsae.reconstruct(model, x)
    with under((2, 4)):
        np.testing.assert_allclose(jax.jit(jaxsae.reconstruct)(model, x), expected, rtol=1e-4, atol=1e-5)


def test_moments_of_another_shape_than_their_parameter_are_on_every_device():
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=8)

    def made():
        return train.init_state(jaxsae.init(jax.random.key(0), d=20, m=64, activation=jaxsae.TopK(4)), tx)

    step, x, losses = train.make_step(Objective(), tx), np.asarray(activations(batch=(B,), d=20)), {}
    for shape in ((1, 1), (2, 4)):
        with under(shape):
            state = sharding.create(made)
            losses[shape] = []
            for _ in range(3):
                state, shown = step(state, sharding.make_global_batch(x, B, 0))
                losses[shape].append(float(shown["loss"]))
        assert state.sae.W_dec.addressable_shards[0].data.shape == (64 // shape[1], 20)
    np.testing.assert_allclose(losses[2, 4], losses[1, 1], rtol=1e-5)


def test_what_is_split_is_declared_by_a_class_and_not_by_a_name():
    @pytrees.dataclass
    class Theirs:
        W_dec: jax.Array
        threshold: jax.Array

    @pytrees.dataclass
    class Scaled(jaxsae.autoencoder.activations.Activation):
        scale: jax.Array = pytrees.sharded("latent")

        def __call__(self, pre):
            return self.scale * jax.nn.relu(pre)

    named = {"b_enc": jnp.zeros(M), "theirs": Theirs(jnp.zeros((M, D)), jnp.zeros(M))}
    assert set(jax.tree.leaves(sharding.specs(named))) == {jax.P()}
    model = jaxsae.init(jax.random.key(0), d=D, m=M, activation=Scaled(jnp.ones(M)))
    assert sharding.specs(model).activation.scale == jax.P("latent")


def test_moments_that_are_shaped_as_their_parameters_are_split_as_they_are():
    model = jaxsae.init(jax.random.key(0), d=20, m=64, activation=jaxsae.JumpReLU(jnp.ones(64)))
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=8)
    state = jax.eval_shape(lambda: train.init_state(model, tx))
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(sharding.specs(state)), strict=True):
        assert spec == jax.P() or leaf.shape[len(spec) - 1] == 64
    assert sharding.specs(state.opt_state) is not None
    sharding.shardings(state, sharding.make_mesh(2, 4))


def test_stacked_autoencoders_are_split_along_their_latents():
    for activation in (jaxsae.JumpReLU(jnp.ones(M)), jaxsae.BatchTopK(K, jnp.ones(()))):
        model = jaxsae.init(jax.random.key(0), d=D, m=M, activation=activation)
        # A stack as high as there are latents is distinguished from them too.
        for count in (2, M):
            two = jax.eval_shape(
                lambda model, count=count: jax.tree.map(lambda x: jnp.stack([x] * count), model), model
            )
            found = sharding.specs(two)
            assert found.W_enc == jax.P(None, None, "latent")
            assert found.W_dec == found.b_enc == jax.P(None, "latent")
            assert found.b_dec == jax.P()
            each = isinstance(activation, jaxsae.JumpReLU)
            assert found.activation.threshold == (jax.P(None, "latent") if each else jax.P())
    saes = train.stack([jaxsae.init(jax.random.key(i), d=D, m=M, activation=jaxsae.TopK(K)) for i in (0, 1)])
    state = jax.eval_shape(lambda: jax.vmap(lambda sae: train.init_state(sae, TX))(saes))
    assert sharding.specs(state).rows_since_fired == jax.P(None, "latent")
    x = activations(batch=(16,), d=D)
    encode = jax.jit(jax.vmap(jaxsae.encode_dense, (0, None)))
    expected = encode(saes, x)
    with under((2, 4)):
        placed = jax.device_put(saes, sharding.shardings(saes, jax.sharding.get_mesh()))
        np.testing.assert_allclose(encode(placed, x), expected, rtol=1e-4, atol=1e-5)
