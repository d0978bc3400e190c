"""Pictures: patches and their sums against numpy, masked pursuit against least squares, and files that are none."""

import io
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
from PIL import Image, ImageCms, ImageOps
from problems import cli, f64, refused

from jaxsae import ksvd, pursuit
from jaxsae._core.files import InputError
from jaxsae.app.cli import main
from jaxsae.ksvd import image_files, images

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
    unit = images.psnr((clean + error) / 255, clean / 255, data_range=1.0)
    assert unit == pytest.approx(images.psnr(clean + error, clean))
    for wrong in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="data_range"):
            images.psnr(clean, clean, data_range=wrong)
    with pytest.raises(ValueError, match="pass equal shapes"):
        images.psnr(clean, clean[:1])


# --- Patches


def _as_they_are(k, D, tol, y):
    return y, jnp.ones(len(y), y.dtype)


@pytest.mark.parametrize("strip", [1, 100, 1 << 14])
def test_patches_that_are_left_as_they_are_make_the_picture_again(strip, monkeypatch):
    monkeypatch.setattr(images, "_STRIP", strip)
    planes = np.random.default_rng(0).normal(size=(2, 13, 17)).astype(np.float32)
    total, weight = images._assemble(_as_they_are, 1, 4, jnp.zeros((1, 16)), 0.0, planes)
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
    np.testing.assert_allclose(
        images._from_planes(images._planes(picture.astype(np.float32)), picture), picture, atol=1e-3
    )


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


UNITS = [(1 / 255, 0.0), (2.0**-90, 0.0), (257e12, -3e16)]


@pytest.mark.parametrize(("size", "black"), UNITS)
def test_a_picture_in_any_units_is_denoised_alike(size, black):
    """Whatever the units: `denoise(a·x + b, a·σ) = a·denoise(x, σ) + b`."""
    picture = noisy(chequered())
    expected, D = images.denoise(picture, 25.0, **SMALL)
    found, same_D = images.denoise(size * picture + black, size * 25.0, **SMALL)
    np.testing.assert_allclose((f64(found) - black) / size, expected, atol=0.05)
    np.testing.assert_allclose(same_D, D, atol=1e-3)


@pytest.mark.parametrize(("size", "black"), UNITS)
def test_a_picture_in_any_units_is_filled_in_alike(size, black):
    missing = np.random.default_rng(1).random((32, 40)) < 0.4
    expected, _ = images.inpaint(chequered(), missing, **SMALL)
    found, _ = images.inpaint(size * chequered() + black, missing, **SMALL)
    np.testing.assert_allclose((f64(found) - black) / size, expected, atol=0.05)
    np.testing.assert_array_equal(found[~missing], np.float32(size * chequered() + black)[~missing])


def test_a_hot_pixel_leaves_the_others_their_digits():
    picture = noisy(chequered())
    expected, _ = images.denoise(picture, 25.0, **SMALL)
    picture[31, 39] = 1e9
    found, _ = images.denoise(picture, 25.0, **SMALL)
    assert mse(found[:20, :20], chequered()[:20, :20]) < 2 * mse(expected[:20, :20], chequered()[:20, :20])


BAD = [
    (lambda: images.denoise(np.zeros((7, 40)), 25.0), "at least 8 × 8"),
    (lambda: images.denoise(np.zeros(40), 25.0), "at least 8 × 8"),
    (lambda: images.denoise(np.full((32, 40), np.nan), 25.0), "NaN or Inf"),
    (lambda: images.denoise(chequered(), 0.0), "above 0"),
    (lambda: images.denoise(chequered(), float("nan")), "above 0"),
    (lambda: images.inpaint(chequered(), np.zeros((3, 3), bool)), "height and width"),
    (lambda: images.inpaint(chequered(), np.ones((32, 40), bool)), "every pixel is missing"),
    (lambda: images.inpaint(chequered(), np.zeros((32, 40), bool)), "got a mask in which no pixel is missing"),
    (lambda: images.inpaint(chequered(), np.full((32, 40), 255, np.uint8)), "other than 0 and 1"),
    (lambda: images.inpaint(chequered(), np.full((32, 40), np.nan)), "other than 0 and 1"),
    (lambda: images.inpaint(chequered(), chequered() > 99, sigma=-1.0), "0 or more"),
    (lambda: images.inpaint(chequered(), chequered() > 99, sigma=np.nan), "0 or more"),
    (lambda: images.inpaint(np.zeros((9, 9, 3, 1)), np.zeros((9, 9))), "at least 8 × 8"),
    (lambda: images.inpaint(np.where(chequered() > 99, np.nan, 1), np.zeros((32, 40))), "NaN or Inf"),
    (lambda: images.denoise(chequered(), np.inf), "above 0"),
    (lambda: images.denoise(chequered(), -25.0), "above 0"),
    (lambda: images.denoise(1j * chequered(), 25.0), "real numbers"),
    (lambda: image_files.write("x.png", chequered() / 255), r"in \[0, 1\]"),
    (lambda: image_files.write("x.png", np.full((8, 8), np.nan)), "NaN or Inf"),
    (lambda: image_files.write("x.png", np.full((8, 8), 65535, np.uint16)), "uint16 from 65535"),
    (lambda: image_files.write("x.png", np.zeros((8, 8, 4))), r"shape \(8, 8, 4\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_is_no_picture_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


# --- Files and the command


@pytest.mark.parametrize("channels", [None, 3])
def test_a_picture_survives_a_file(channels, tmp_path):
    picture = np.rint(chequered(channels))
    image_files.write(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(image_files.read(tmp_path / "a.png"), np.clip(picture, 0, 255))


def test_transparency_is_dropped_and_deep_pictures_are_refused(tmp_path):
    Image.new("LA", (9, 8), (100, 10)).save(tmp_path / "grey.png")
    assert image_files.read(tmp_path / "grey.png").shape == (8, 9)
    Image.new("I;16", (9, 8)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="8 bits per channel"):
        image_files.read(tmp_path / "deep.png")


def turned(folder, suffix, orientation):
    """A picture that is to be turned, and what is seen when it is."""
    levels = np.zeros((16, 24), np.uint8)
    levels[:8, :16] = 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(levels).save(folder / f"in{suffix}", exif=exif)
    content = io.BytesIO((folder / f"in{suffix}").read_bytes())  # from a file Pillow 13 turns raw TIFFs wrongly
    seen = ImageOps.exif_transpose(Image.open(content))
    return folder / f"in{suffix}", np.asarray(seen.convert("L"), np.float32)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_read_and_written_as_it_is_seen(orientation, suffix, tmp_path):
    path, seen = turned(tmp_path, suffix, orientation)
    read = image_files.read(path)
    np.testing.assert_allclose(read if read.ndim == 2 else read[..., 0], seen, atol=8)
    image_files.write(tmp_path / "out.png", read)
    out = ImageOps.exif_transpose(Image.open(tmp_path / "out.png"))
    np.testing.assert_allclose(np.asarray(out.convert("L")), seen, atol=8)


def png(depth, kind, channels):
    """A PNG of `depth` bits per channel, of any kind, which Pillow does not write."""
    import zlib

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    lines = b"".join(b"\0" + bytes(8 * channels * depth // 8) for _ in range(8))
    head = struct.pack(">IIBBBBB", 8, 8, depth, kind, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(bits, channels, sample=1):
    """An uncompressed TIFF of 8 × 8 zeros."""
    fields = [
        (256, 3, 1, 8),
        (257, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 2 if channels > 1 else 1),
        (277, 3, 1, channels),
    ]
    fields += [(278, 3, 1, 8), (279, 4, 1, 8 * channels * bits), (339, 3, 1, sample)]
    end = 8 + 2 + 12 * (len(fields) + 2) + 4
    fields += [(258, 3, channels, end if channels > 2 else bits), (273, 4, 1, end + 8)]
    entries = b"".join(struct.pack("<HHII", *field) for field in sorted(fields))
    head = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(fields)) + entries + bytes(4)
    return head + struct.pack("<4H", bits, bits, bits, 0) + bytes(8 * 8 * channels * bits // 8)


def saved(kind, mode, **options):
    buffer = io.BytesIO()
    Image.new(mode, (9, 8)).save(buffer, kind, **options)
    return buffer.getvalue()


UNREAD = {
    "16-bit colours": (png(16, 2, 3), "8 bits per channel"),
    "16-bit grey": (png(16, 0, 1), "8 bits per channel"),
    "16-bit grey and transparency": (png(16, 4, 2), "8 bits per channel"),
    "16-bit colours and transparency": (png(16, 6, 4), "8 bits per channel"),
    "16-bit TIFF": (tiff(16, 3), "8 bits per channel"),
    "16-bit grey TIFF": (tiff(16, 1), "8 bits per channel"),
    "floats": (tiff(32, 1, sample=3), "8 bits per channel"),
    "16-bit PPM": (b"P6 8 8 65535\n" + bytes(8 * 8 * 6), "8 bits per channel"),
    "10-bit PPM": (b"P6 8 8 1023\n" + bytes(8 * 8 * 6), "8 bits per channel"),
    "10-bit PGM": (b"P5 8 8 1023\n" + bytes(8 * 8 * 2), "8 bits per channel"),
    "CMYK": (saved("JPEG", "CMYK"), "mode CMYK; expected grey or RGB"),
    "Lab": (saved("TIFF", "LAB"), "mode LAB; expected grey or RGB"),
    "pages": (saved("TIFF", "L", save_all=True, append_images=[Image.new("L", (9, 8))]), "holds 2 pictures"),
    "frames": (
        saved("GIF", "L", save_all=True, append_images=[Image.new("L", (9, 8), 255)]),
        "holds 2 pictures",
    ),
    "JPEG 2000, of unknown bits": (saved("JPEG2000", "RGB"), "cannot be read as a picture"),
    "an icon": (saved("ICO", "RGB"), "cannot be read as a picture"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_levels_cannot_be_read_from_is_refused(case, tmp_path):
    content, message = UNREAD[case]
    (tmp_path / "in").write_bytes(content)
    refused(message, image_files.read, tmp_path / "in")


READ = {
    "8-bit colours": (png(8, 2, 3), (8, 8, 3)),
    "8-bit TIFF": (tiff(8, 3), (8, 8, 3)),
    "4-bit PPM": (b"P6 8 8 15\n" + b"\x0f" * 8 * 8 * 3, (8, 8, 3)),
    "a palette": (saved("PNG", "P"), (8, 9, 3)),
    "black and white": (saved("PNG", "1"), (8, 9)),
    "5 and 6 bits": (saved("BMP", "RGB"), (8, 9, 3)),
    "a still": (saved("GIF", "RGB"), (8, 9, 3)),
    "previews": (saved("MPO", "RGB", save_all=True, append_images=[Image.new("RGB", (9, 8))]), (8, 9, 3)),
}


@pytest.mark.parametrize("case", READ)
def test_what_levels_can_be_read_from(case, tmp_path):
    content, shape = READ[case]
    (tmp_path / "in").write_bytes(content)
    levels = image_files.read(tmp_path / "in")
    assert levels.shape == shape
    assert set(np.unique(levels)) <= {0.0, 255.0}


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_picture_is_one_error(seed, tmp_path):
    generator = np.random.default_rng(seed)
    content = [png(8, 2, 3), tiff(8, 3), saved("JPEG", "RGB"), saved("WEBP", "RGB"), saved("GIF", "P"), b"P6 8 8 255\n"]
    damaged = np.frombuffer(content[seed % 6], np.uint8).copy()
    damaged[generator.integers(4, len(damaged), 6)] = generator.integers(0, 256, 6)
    (tmp_path / "in").write_bytes(damaged.tobytes())
    try:
        image_files.read(tmp_path / "in")
    except InputError as error:
        assert "\n" not in str(error)


def test_the_colour_profile_is_kept(tmp_path):
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for suffix in (".png", ".jpg", ".tif", ".webp"):
        image_files.write(tmp_path / f"a{suffix}", chequered(3), profile=content)
        assert image_files.profile(tmp_path / f"a{suffix}") == content
    with pytest.raises(InputError, match="cannot hold the colour profile"):
        image_files.check_suffix(tmp_path / "a.bmp", profile=content)


UNWRITTEN = ["psd", "fits", "cur", "h5", "grib", "wmf", "txt", "", "gif", "ico", "pdf", "eps"]


@pytest.mark.parametrize("suffix", UNWRITTEN)
def test_a_format_that_is_not_written_is_refused_before_the_work(suffix, tmp_path, capsys):
    image_files.write(tmp_path / "in.png", chequered())
    for option in ("--out", "--dictionary"):
        files = {"--out": tmp_path / "out.png", "--dictionary": tmp_path / "d.png"} | {option: tmp_path / f"x.{suffix}"}
        options = [str(part) for pair in files.items() for part in pair]
        assert main(["denoise", str(tmp_path / "in.png"), "--sigma", "25", *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "Pillow cannot write this suffix" in line


def test_what_a_format_cannot_hold_is_refused_before_the_work(tmp_path):
    image_files.check_suffix(tmp_path / "a.jpg", None, tmp_path / "b.TIFF", shape=(8, 9, 3))
    (tmp_path / "folder.png").mkdir()
    for bad, shape, message in (
        ("a.webp", (1, 20_000), "WEBP cannot hold a picture"),
        ("a.jpg", (70_000, 1), "JPEG cannot hold a picture"),
        ("folder.png", (8, 9), "is a directory"),
    ):
        with pytest.raises(InputError, match=message):
            image_files.check_suffix(tmp_path / bad, shape=shape)
    with pytest.raises(InputError, match="for two pictures"):
        image_files.check_suffix("a.png", "a.png")


def not_a_picture(folder):
    (folder / "in.png").write_text("once upon a time")


def truncated(folder):
    image_files.write(folder / "in.png", chequered())
    (folder / "in.png").write_bytes((folder / "in.png").read_bytes()[:100])


def small(folder):
    image_files.write(folder / "in.png", np.zeros((4, 4)))


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda folder: None, ["--sigma", "25", "--out", "out.png"], "no such file"),
        (not_a_picture, ["--sigma", "25", "--out", "out.png"], "cannot be read as a picture"),
        (truncated, ["--sigma", "25", "--out", "out.png"], "cannot be read as a picture"),
        (small, ["--sigma", "25", "--out", "out.png"], "at least 8 × 8"),
        (small, ["--sigma", "25", "--out", "out.txt"], "Pillow cannot write this suffix"),
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
    image_files.write("in.png", chequered())
    image_files.write("mask.png", np.zeros((8, 8)))
    assert main(["inpaint", "in.png", "--missing", "mask.png", "--out", "out.png"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mask of shape (8, 8)" in line
    assert not (tmp_path / "out.png").exists()


@pytest.mark.slow  # at the command's own size, 256 atoms
def test_the_command_fills_in(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clean = chequered()
    missing = np.random.default_rng(0).random(clean.shape) < 0.5
    image_files.write("in.png", np.where(missing, 0, clean))
    image_files.write("mask.png", 255.0 * missing)
    assert main(["inpaint", "in.png", "--missing", "mask.png", "--out", "out.png"]) == 0
    assert mse(image_files.read("out.png")[missing], clean[missing]) < 0.1 * np.var(clean)
    assert "Written: out.png" in capsys.readouterr().out


@pytest.mark.slow  # at the command's own size, 256 atoms
def test_the_command_denoises(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_files.write("in.png", noisy(chequered()))
    assert main(["denoise", "in.png", "--sigma", "25", "--out", "out.png", "--dictionary", "atoms.png"]) == 0
    clean = chequered()
    assert mse(image_files.read("out.png"), clean) < 0.5 * mse(image_files.read("in.png"), clean)
    assert image_files.read("atoms.png").ndim == 2
    assert "Written: out.png" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_uncompressed_tiff_is_turned_too(mode, orientation, tmp_path):
    levels = np.zeros((10, 20), np.uint8)
    levels[0, :5] = 255
    picture = Image.fromarray(levels).convert(mode)
    for name in ("a.tif", "a.png"):
        exif = Image.Exif()
        exif[274] = orientation
        picture.save(tmp_path / name, exif=exif)
    np.testing.assert_array_equal(image_files.read(tmp_path / "a.tif"), image_files.read(tmp_path / "a.png"))


def test_a_picture_in_0_to_1_that_overshoots_is_refused(tmp_path):
    picture = np.linspace(-0.1, 1.07, 64).reshape(8, 8)
    with pytest.raises(InputError, match=r"got a picture in \[0, 1\] or nearly, which would be black"):
        image_files.write(tmp_path / "a.png", picture)


def test_a_mask_of_which_nothing_is_white_is_refused(tmp_path, capsys):
    image_files.write(tmp_path / "a.png", np.random.default_rng(0).uniform(0, 255, (32, 32)))
    image_files.write(tmp_path / "mask.png", np.ones((32, 32)))
    argv = ["inpaint", tmp_path / "a.png", "--missing", tmp_path / "mask.png", "--out", tmp_path / "b.png"]
    assert cli(*argv) == 2
    assert "no pixel is brighter than 127 of 255" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


def test_16_bits_in_a_plane_for_each_channel_are_refused(tmp_path):
    side, planes = 4, np.full((3, 4, 4), 30_000, "<u2").tobytes()
    first = (
        8 + 2 + 12 * 10 + 4
    )  # of what is behind the directory: bits, then offsets and sizes of the planes, then these
    start, size = first + 6 + 12 + 12, len(planes) // 3
    tags = [  # number, type (3 is 16 bits, 4 is 32), count, value or place
        *((256, 3, 1, side), (257, 3, 1, side), (258, 3, 3, first), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 3, first + 6), (277, 3, 1, 3), (278, 3, 1, side), (279, 4, 3, first + 18), (284, 3, 1, 2)),
    ]
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    places = [start + number * size for number in range(3)]
    content += struct.pack("<I3H6I", 0, 16, 16, 16, *places, size, size, size) + planes
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tif: has more than 8 bits per channel; expected 8"):
        image_files.read(tmp_path / "a.tif")
