"""Read and write pictures as levels from 0 to 255; files that cannot be read or written exactly are rejected."""

import io
import os
import struct
import warnings
from typing import Any

import numpy as np

from jaxsae._core.files import InputError, atomic_file, local_path

_WRITTEN = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM")  # formats whose bits per channel are known
_READ = (*_WRITTEN, "GIF")
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX")  # modes
_UNREADABLE = (OSError, ValueError, SyntaxError, LookupError, TypeError, struct.error)  # what Pillow raises
_NO_PROFILE = ("BMP", "PPM")  # formats that hold no colour profile


def read(path: str | os.PathLike) -> np.ndarray:
    """Read a picture of 8 bits per channel, rotated by its EXIF orientation.

    Args:
      path: a PNG, JPEG, TIFF, WebP, BMP, PPM or GIF.

    Returns:
      `[h w]` if it is grey, otherwise `[h w 3]`; float32 from 0 to 255. Transparency is dropped.

    Raises:
      InputError: if the file is missing, is not a single grey or RGB picture, or has more than 8 bits per channel; or
        if Pillow is not installed.

    Example:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(f"{folder}/grey.png", np.full((8, 9), 100.0))
      ...     read(f"{folder}/grey.png").shape
      (8, 9)
    """
    return _open(path)[0]


def profile(path: str | os.PathLike) -> bytes | None:
    """Read the ICC colour profile of a picture, for `write`.

    Args:
      path: as for `read`.

    Returns:
      The profile, or None if it has none.

    Raises:
      InputError: as for `read`.

    Example:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(f"{folder}/grey.png", np.full((8, 9), 100.0))
      ...     print(profile(f"{folder}/grey.png"))
      None
    """
    return _open(path)[1]


def _open(path) -> tuple[np.ndarray, bytes | None]:
    """A picture and its colour profile."""
    pillow = _pillow()
    from PIL import ImageOps

    if not local_path(path).is_file():
        raise InputError(f"{path}: no such file; expected a picture, such as a PNG or a JPEG.")
    try:
        # From memory: Pillow maps the pixels of an uncompressed file, incorrectly if its orientation is sideways.
        content = io.BytesIO(local_path(path).read_bytes())
        with warnings.catch_warnings(action="ignore"), pillow.open(content, formats=_READ) as picture:
            _require_plain(path, picture)
            seen = ImageOps.exif_transpose(picture)
            levels = np.asarray(seen.convert("L" if picture.mode in _GREY else "RGB"), np.float32)
            return levels, picture.info.get("icc_profile")
    except (*_UNREADABLE, pillow.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as a picture; expected a {', '.join(_READ)}.") from error


def _require_plain(path, picture) -> None:
    """Reject pictures that Pillow would convert to other levels."""
    if picture.mode[0] in "IF" or _is_deep(picture):
        raise InputError(f"{path}: has more than 8 bits per channel; expected 8: convert it first.")
    if picture.mode not in _GREY + _COLOUR:
        raise InputError(f"{path}: has pixels of mode {picture.mode}; expected grey or RGB: convert it first.")
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # a JPEG with previews behind it
        raise InputError(f"{path}: holds {frames} pictures; expected one: save it alone.")


def _is_deep(picture) -> bool:
    """Whether Pillow would silently reduce colours to 8 bits."""
    from PIL import TiffImagePlugin

    if picture.format == "PPM":
        return any(isinstance(tile.args, tuple) and tile.args[-1] > 255 for tile in picture.tile)
    if picture.format == "TIFF":  # whose tiles do not tell where each channel is a separate plane
        return max(picture.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))) > 8
    return picture.format == "PNG" and any(";16" in str(tile.args) for tile in picture.tile)


def write(path: str | os.PathLike, picture: np.ndarray, *, profile: bytes | None = None) -> None:
    """Write a picture atomically, in the format of its suffix.

    Args:
      path: file to write.
      picture: `[h w]` or `[h w 3]` in levels; rounded, and clipped to 0 to 255.
      profile: its ICC colour profile, from `profile`.

    Raises:
      InputError: if the file cannot be written, if the picture is not in levels (but in [0, 1], for example), if the
        format is not supported or cannot hold it, or if Pillow is not installed.

    Example:
      >>> import tempfile, numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write(f"{folder}/colour.png", np.zeros((8, 9, 3)))
    """
    content = _encoded(path, _levels(picture), profile)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def check_suffix(
    *paths: str | os.PathLike | None, shape: tuple[int, ...] = (1, 1), profile: bytes | None = None
) -> None:
    """Raise if `write` could not write a picture to one of these paths, before there is a picture.

    Args:
      *paths: files to write; None is ignored.
      shape: of the picture.
      profile: its ICC profile.

    Raises:
      InputError: for the first path whose format is not supported or cannot hold such a picture, that is a directory,
        or that is given twice.

    Example:
      >>> check_suffix("clean.png")
      >>> check_suffix("clean.psd")
      Traceback (most recent call last):
      jaxsae.InputError: clean.psd: Pillow cannot write this suffix, or not ...
    """
    wanted = [local_path(path) for path in paths if path is not None]
    for n, path in enumerate(wanted):
        _encoded(path, np.zeros(shape, np.uint8), profile)
        if path in wanted[:n]:
            raise InputError(f"{path}: is given for two pictures; pass a name for each.")


def _encoded(path, levels: np.ndarray, profile: bytes | None) -> bytes:
    """The content of a file."""
    pillow = _pillow()
    kind = pillow.registered_extensions().get(local_path(path).suffix.lower())
    if kind not in _WRITTEN or kind not in pillow.SAVE:
        raise InputError(f"{path}: Pillow cannot write this suffix, or not exactly; use .png or .jpg.")
    if local_path(path).is_dir():
        raise InputError(f"{path}: is a directory; choose another name.")
    if profile and kind in _NO_PROFILE:
        raise InputError(f"{path}: {kind} cannot hold the colour profile of the picture; use .png or .jpg.")
    buffer = io.BytesIO()
    try:
        pillow.fromarray(levels).save(buffer, kind, icc_profile=profile)
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise InputError(
            f"{path}: {kind} cannot hold a picture of shape {levels.shape} ({error}); use .png."
        ) from error
    return buffer.getvalue()


def _levels(picture: np.ndarray) -> np.ndarray:
    """A picture as `uint8` levels."""
    picture = np.asarray(picture)
    if picture.ndim < 2 or picture.shape[2:] not in ((), (3,)) or not picture.size or picture.dtype.kind not in "uif":
        raise InputError(
            f"`write` got shape {picture.shape} of {picture.dtype}; pass numbers of shape (h, w) or (h, w, 3)."
        )
    if not np.isfinite(picture).all():
        raise InputError("`write` got a picture with NaN or Inf; pass levels from 0 to 255.")
    low, high = picture.min(), picture.max()
    if picture.dtype.kind == "f" and -1 <= low <= high < 2 and (picture != np.rint(picture)).any():
        raise InputError("`write` got a picture in [0, 1] or nearly, which would be black; pass levels from 0 to 255.")
    if picture.dtype.kind in "ui" and not 0 <= low <= high <= 255:
        raise InputError(f"`write` got {picture.dtype} from {low} to {high}; pass levels from 0 to 255.")
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("pictures need Pillow, which is missing; pip install 'jaxsae[study]'.") from error
    return Image
