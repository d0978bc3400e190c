"""The commands on pictures: denoise and inpaint."""

from pathlib import Path
from typing import Annotated

from jaxsae._core import arguments
from jaxsae._core.files import InputError
from jaxsae.app import console


def denoise(
    image: arguments.InputPath,
    /,
    *,
    sigma: Annotated[float, arguments.Range(0, 255, above=True)],
    out: arguments.OutputFile,
    dictionary: arguments.OutputFile | None = None,
    seed: arguments.Seed = 0,
    json: bool = False,
) -> int:
    """Remove white noise from a picture, by k-SVD on its patches.

    Example: jaxsae denoise noisy.png --sigma 25 --out clean.png

    Args:
        image: the picture to denoise, a PNG, JPEG or similar file.
        sigma: standard deviation of the noise, in levels from 0 to 255.
        out: the picture to write; its suffix determines the format.
        dictionary: also write the atoms, as a picture.
        seed: of the choice of training patches.
        json: print the paths as one JSON object.
    """
    from jaxsae.ksvd import image_files, images

    _require_two(out, dictionary)
    image_files.check_suffix(out, dictionary)
    noisy, profile = image_files.read(image), image_files.profile(image)
    image_files.check_suffix(out, shape=noisy.shape, profile=profile)
    with console.progress(noisy.size // noisy.shape[1]) as update:
        denoised, atoms = images.denoise(noisy, sigma, seed=seed, progress=update)
    return _write_picture(out, denoised, profile, dictionary, atoms, json)


def inpaint(
    image: arguments.InputPath,
    /,
    *,
    missing: arguments.InputPath,
    out: arguments.OutputFile,
    dictionary: arguments.OutputFile | None = None,
    seed: arguments.Seed = 0,
    json: bool = False,
) -> int:
    """Fill in missing pixels of a picture, by k-SVD on the others.

    Example: jaxsae inpaint scratched.png --missing scratches.png --out whole.png

    Args:
        image: the picture to fill in, a PNG, JPEG or similar file.
        missing: a picture of the same size, white where pixels are missing.
        out: the picture to write; its suffix determines the format.
        dictionary: also write the atoms, as a picture.
        seed: of the choice of training patches.
        json: print the paths as one JSON object.
    """
    from jaxsae.ksvd import image_files, images

    _require_two(out, dictionary)
    image_files.check_suffix(out, dictionary)
    holes, mask, profile = image_files.read(image), image_files.read(missing), image_files.profile(image)
    image_files.check_suffix(out, shape=holes.shape, profile=profile)
    unknown = (mask if mask.ndim == 2 else mask.mean(2)) > 127.5
    if unknown.shape == holes.shape[:2] and not unknown.any():
        raise InputError(f"{missing}: no pixel is brighter than 127 of 255; expected white where pixels are missing.")
    filled, atoms = images.inpaint(holes, unknown, seed=seed)
    return _write_picture(out, filled, profile, dictionary, atoms, json)


def _require_two(out: Path, dictionary: Path | None) -> None:
    if dictionary is not None and dictionary.absolute() == out.absolute():
        raise InputError(f"got {out} for --out and for --dictionary; pass two files.")


def _write_picture(out: Path, picture, profile: bytes | None, dictionary: Path | None, atoms, json: bool) -> int:
    from jaxsae.ksvd import image_files, images

    image_files.write(
        out, picture.round(), profile=profile
    )  # whole levels, so that a dark picture is not taken to be in [0, 1]
    if dictionary is not None:
        image_files.write(dictionary, images.mosaic(atoms))
    text = f"Written: {out}{'' if dictionary is None else f', {dictionary}'}"
    console.show({"out": out, "dictionary": dictionary}, text, as_json=json)
    return 0
