"""Pictures: patches and their sums against numpy, masked pursuit against least squares, and files that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
from problems import f64

from jaxsae import images, ksvd, pursuit
from jaxsae.cli import main
from jaxsae.files import InputError

SMALL = {"m": 64, "k": 4, "steps": 2, "patches": 512}  # one shape for all that is learnt here


def chequered(channels=None):
    """A picture of 32 × 40 that a few atoms explain."""
    rows, columns = np.mgrid[:32, :40]
    picture = 60.0 + 120 * ((rows // 11 + columns // 13) % 2) + 10 * np.sin(columns / 3)
    return picture if channels is None else np.stack([picture, 200 - picture / 2, picture / 3], axis=2)[..., :channels]


def noisy(picture, sigma=25):
    return picture + np.random.default_rng(0).normal(0, sigma, picture.shape)


def mse(a, b):
    return np.mean((a - b) ** 2)


def test_psnr():
    clean = chequered()
    error = np.random.default_rng(1).normal(0, 5, clean.shape)
    assert images.psnr(clean + error, clean) == pytest.approx(-20 * np.log10(np.sqrt(np.mean(error**2)) / 255))
    assert images.psnr(np.full((2, 2), 300.0), np.full((2, 2), 255.0)) == np.inf  # levels end at 255
    with pytest.raises(ValueError, match="pass pictures of one shape"):
        images.psnr(clean, clean[:1])


# --- Patches


def _as_they_are(D, tol, y, *, k):
    return y, jnp.ones(len(y), y.dtype)


@pytest.mark.parametrize("strip", [1, 100, 1 << 14])
def test_patches_that_are_left_as_they_are_make_the_picture_again(strip, monkeypatch):
    monkeypatch.setattr(images, "_STRIP", strip)
    planes = np.random.default_rng(0).normal(size=(2, 13, 17)).astype(np.float32)
    total, weight = images._assemble(images._Method(_as_they_are, 1, 4), jnp.zeros((1, 16)), 0.0, planes)
    counts = np.zeros((13, 17))
    for i, j in np.ndindex(10, 14):
        counts[i : i + 4, j : j + 4] += 1
    np.testing.assert_array_equal(weight, np.broadcast_to(counts, planes.shape))
    np.testing.assert_allclose(total / weight, planes, atol=1e-5)


def test_some_patches_are_patches():
    planes = np.arange(2 * 9 * 10.0, dtype=np.float32).reshape(2, 9, 10)
    patches, again = images._some_patches(8, 1000, 0, planes, planes)
    assert patches.shape == (2 * 2 * 3, 64)
    np.testing.assert_array_equal(patches, again)
    np.testing.assert_array_equal(patches[0].reshape(8, 8), planes[0, :8, :8])
    assert len(images._some_patches(8, 5, 0, planes)[0]) == 5


def test_the_rotation_of_colours_keeps_noise_white_and_is_undone():
    rotation = images._rotation(3)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-6)
    picture = chequered(3)
    np.testing.assert_allclose(images._from_planes(images._planes(picture.astype(np.float32)), picture), picture, atol=1e-3)


def test_the_cosines_have_norm_1_and_all_but_the_first_mean_0():
    atoms = images.dct(256, 8)
    np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(atoms[0], 1 / 8, atol=1e-6)
    np.testing.assert_allclose(atoms[1:].sum(axis=1), 0, atol=1e-5)
    assert np.linalg.matrix_rank(atoms) == 64
    assert images.dct(60, 8).shape == (60, 64)


def test_a_mosaic_shows_each_atom():
    atoms = np.zeros((5, 4))
    atoms[1, 2], atoms[4] = -3.0, 1.0
    picture = images.mosaic(atoms, scale=1)
    assert picture.shape == (10, 10)
    np.testing.assert_array_equal(picture[1:3, 4:6], [[128, 128], [1, 128]])
    np.testing.assert_array_equal(picture[4:6, 4:6], 255)


# --- Masked patches


def masked_rows(seed=0, n=40):
    rng = np.random.default_rng(seed)
    known = (rng.random((n, 64)) < 0.5).astype(np.float32)
    known[0], known[1] = 0, 1
    return jnp.asarray(rng.normal(size=(n, 64)), jnp.float32), jnp.asarray(known)


def test_masked_pursuit_chooses_and_fits_as_numpy_does():
    D, (y, known), k = images.dct(64, 8)[1:], masked_rows(), 4
    code, mean = jax.jit(images._code_masked, static_argnames="k")(jnp.asarray(D), 0.0, y, known, k=k)
    for row in range(1, len(y)):
        on = np.asarray(known[row]) > 0
        target, atoms = f64(y)[row, on] - f64(y)[row, on].mean(), f64(D)[:, on]
        assert float(mean[row, 0]) == pytest.approx(f64(y)[row, on].mean(), abs=1e-5)
        chosen, left = [], target
        for _ in range(k):
            chosen.append(int(np.argmax(np.abs(atoms @ left) / np.linalg.norm(atoms, axis=1))))
            values = np.linalg.lstsq(atoms[chosen].T, target)[0]
            left = target - values @ atoms[chosen]
        np.testing.assert_array_equal(code.indices[row], chosen)
        np.testing.assert_allclose(code.values[row], values, atol=1e-3)
    assert not np.any(code.mask[0]), "of an unknown patch nothing is coded"


def test_with_every_pixel_known_it_is_the_pursuit():
    D, (y, _) = jnp.asarray(images.dct(64, 8)), masked_rows()
    y = y - jnp.mean(y, axis=1, keepdims=True)
    tol = 6.0
    code, _ = jax.jit(images._code_masked, static_argnames="k")(D, tol / 8, y, jnp.ones_like(y), k=4)
    expected, _ = pursuit.omp(D, y, k=4, tol=jnp.full(len(y), tol))
    np.testing.assert_array_equal(code.indices, expected.indices)
    np.testing.assert_allclose(code.values, expected.values, atol=1e-3)
    assert np.any(~np.asarray(code.mask)), "some rows should end early"


def test_a_sweep_over_what_is_filled_in_lowers_the_error_of_what_is_known():
    D, (y, known) = jnp.asarray(images.dct(64, 8)), masked_rows()
    code, mean = jax.jit(images._code_masked, static_argnames="k")(D, 0.0, y, known, k=4)

    def error(D, code):
        return np.sum((f64(known) * (f64(y - mean) - f64(code.dense()) @ f64(D))) ** 2)

    filled = jnp.where(known > 0, y - mean, code.dense() @ D)
    assert error(*ksvd.approximate(D, filled, code)) < error(D, code)


# --- Denoising and inpainting


@pytest.mark.parametrize("channels", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_noise_is_removed(channels):
    clean = chequered(channels)
    rows = []
    quiet, D = images.denoise(noisy(clean), 25.0, **SMALL, progress=lambda text, done: rows.append(done))
    assert quiet.shape == clean.shape and quiet.dtype == np.float32
    assert mse(quiet, clean) < 0.35 * mse(noisy(clean), clean)
    assert D.shape == (64, 64)
    assert sum(rows) == (channels or 1) * (32 - 7)
    if channels is None:
        np.testing.assert_array_equal(quiet, images.denoise(noisy(clean), 25.0, **SMALL)[0])


@pytest.mark.parametrize("channels", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_missing_pixels_are_filled_in(channels):
    clean = chequered(channels)
    missing = np.random.default_rng(1).random(clean.shape[:2]) < 0.4
    holes = clean.copy()
    holes[missing] = np.nan  # whatever is there
    filled, _ = images.inpaint(holes, missing, **SMALL)
    np.testing.assert_allclose(filled[~missing], clean[~missing], atol=1e-3)
    places = np.argwhere(~missing), clean[~missing], np.argwhere(missing)
    straight = scipy.interpolate.griddata(*places, method="linear")
    inside = np.isfinite(straight)  # beyond the outermost pixels known, it says nothing
    assert mse(filled[missing][inside], clean[missing][inside]) < 0.75 * mse(straight[inside], clean[missing][inside])


def test_pixels_of_which_nothing_is_known_become_the_mean():
    missing = np.zeros((32, 40), bool)
    missing[:, :20] = True
    filled, _ = images.inpaint(np.full((32, 40), 90.0), missing, **SMALL)
    np.testing.assert_allclose(filled, 90, atol=0.1)


BAD = [
    (lambda: images.denoise(np.zeros((7, 40)), 25.0), "at least 8 × 8"),
    (lambda: images.denoise(np.zeros(40), 25.0), "at least 8 × 8"),
    (lambda: images.denoise(np.full((32, 40), np.nan), 25.0), "NaN or Inf"),
    (lambda: images.denoise(chequered(), 0.0), "above 0"),
    (lambda: images.denoise(chequered(), float("nan")), "above 0"),
    (lambda: images.inpaint(chequered(), np.zeros((3, 3), bool)), "height and width"),
    (lambda: images.inpaint(chequered(), np.ones((32, 40), bool)), "every pixel is missing"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_is_no_picture_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


# --- Files and the command


@pytest.mark.parametrize("channels", [None, 3])
def test_a_picture_survives_a_file(channels, tmp_path):
    picture = np.rint(chequered(channels))
    images.write(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(images.read(tmp_path / "a.png"), np.clip(picture, 0, 255))


def test_transparency_is_dropped_and_deep_pictures_are_refused(tmp_path):
    from PIL import Image

    Image.new("LA", (9, 8), (100, 10)).save(tmp_path / "grey.png")
    assert images.read(tmp_path / "grey.png").shape == (8, 9)
    Image.new("I;16", (9, 8)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="8 bits a channel"):
        images.read(tmp_path / "deep.png")


def not_a_picture(folder):
    (folder / "in.png").write_text("once upon a time")


def truncated(folder):
    images.write(folder / "in.png", chequered())
    (folder / "in.png").write_bytes((folder / "in.png").read_bytes()[:100])


def small(folder):
    images.write(folder / "in.png", np.zeros((4, 4)))


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda folder: None, ["--sigma", "25", "--out", "out.png"], "no such file"),
        (not_a_picture, ["--sigma", "25", "--out", "out.png"], "cannot be read as a picture"),
        (truncated, ["--sigma", "25", "--out", "out.png"], "cannot be read as a picture"),
        (small, ["--sigma", "25", "--out", "out.png"], "at least 8 × 8"),
        (small, ["--sigma", "25", "--out", "out.txt"], "a suffix that Pillow does not know"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(prepare, options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    assert main(["denoise", "in.png", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert message in line
    assert not (tmp_path / "out.png").exists()


def test_a_mask_of_another_size_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images.write("in.png", chequered())
    images.write("mask.png", np.zeros((8, 8)))
    assert main(["inpaint", "in.png", "--missing", "mask.png", "--out", "out.png"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mask of shape (8, 8)" in line
    assert not (tmp_path / "out.png").exists()


@pytest.mark.slow  # at the command's own size, 256 atoms
def test_the_command_fills_in(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clean = chequered()
    missing = np.random.default_rng(0).random(clean.shape) < 0.5
    images.write("in.png", np.where(missing, 0, clean))
    images.write("mask.png", 255.0 * missing)
    assert main(["inpaint", "in.png", "--missing", "mask.png", "--out", "out.png"]) == 0
    assert mse(images.read("out.png")[missing], clean[missing]) < 0.1 * np.var(clean)
    assert "Written: out.png" in capsys.readouterr().out


@pytest.mark.slow  # at the command's own size, 256 atoms
def test_the_command_denoises(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images.write("in.png", noisy(chequered()))
    assert main(["denoise", "in.png", "--sigma", "25", "--out", "out.png", "--dictionary", "atoms.png"]) == 0
    clean = chequered()
    assert mse(images.read("out.png"), clean) < 0.5 * mse(images.read("in.png"), clean)
    assert images.read("atoms.png").ndim == 2
    assert "Written: out.png" in capsys.readouterr().out
