"""Images: a file, bytes, a PIL image or an array in; resized 8-bit RGB out.

Pillow reads the files itself. imageio's Pillow plugin would add nothing here and take away the list of
admitted formats: it opens whatever any installed Pillow plugin claims.
"""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from runtime.errors import InputError
from runtime.media_options import ImageOptions
from runtime.sizing import smart_resize

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 2**27
"""Pixels of an image before resizing: 134 million, 400 MB as RGB. Phones reach 108 million."""

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# EXIF orientation -> what makes the picture upright (EXIF 2.32, table 6). 5 to 8 swap the sides.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_EXIF_SOURCES = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}

__all__ = ["ImageOptions", "ImageSource", "load_image"]


def load_image(source: ImageSource, options: ImageOptions | None = None) -> np.ndarray:
    """Read an image and resize it once (bicubic): uint8 [H,W,3], both sides multiples of 28.

    A str is the name of a local file, never a URL. PNG, JPEG and WebP are read (of an animation, the first
    frame); arrays are uint8 [H,W], [H,W,3] or [H,W,4]. EXIF orientation is applied, transparency is dropped,
    16-bit samples keep their upper 8 bits. Raises InputError for a file, size or format that cannot be served;
    sizes are refused before anything is decoded.
    """
    options = options or ImageOptions()
    with open_image(source) as image:
        height, width = displayed_size(image)
        with explained(source):
            size = smart_resize(height, width, min_pixels=options.min_pixels, max_pixels=options.max_pixels)
            return render(image, [(size, "bicubic")])


def render(image: Image.Image, steps: Sequence[tuple[tuple[int, int], str]]) -> np.ndarray:
    """Decode to uint8 RGB [H,W,3] and resize by each ((height, width), filter name) in turn."""
    image = to_rgb(image)
    for (height, width), resample in steps:
        image = image.resize((width, height), Image.Resampling[resample.upper()])
    return np.array(image)


def describe(source: object) -> str:
    """How an error message calls a source: its file name, quoted and on one line, or the kind of object."""
    if isinstance(source, str | os.PathLike):
        return repr(os.fsdecode(os.fspath(source)))
    return {bytes: "the given bytes", np.ndarray: "the given array"}.get(type(source), "the given image")


def check_file(path: str | os.PathLike[str]) -> int:
    """The size in bytes of a readable regular file. Raises InputError for anything else."""
    name = describe(path)
    try:
        if not Path(path).exists():
            hint = "URLs are not fetched: download it first" if "://" in name else "check the path"
            raise InputError(f"{name} does not exist; {hint}")
        if not Path(path).is_file():
            raise InputError(f"{name} is not a regular file; give the path of a file")
        with open(path, "rb"):
            size = Path(path).stat().st_size
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} cannot be read ({_one_line(error)}); check its path and permissions") from error
    if size == 0:
        raise InputError(f"{name} is empty (0 bytes); save or download it again")
    return size


@contextmanager
def open_image(source: ImageSource) -> Iterator[Image.Image]:
    """An opened but not yet decoded image whose dimensions are within MAX_PIXELS."""
    if isinstance(source, Image.Image):
        _check_pixels(source, source)
        yield source
    elif isinstance(source, np.ndarray):
        yield _from_array(source)
    elif isinstance(source, str | os.PathLike):
        size = check_file(source)
        with open(source, "rb") as handle, _open_encoded(handle, size, source) as image:
            yield image
    elif isinstance(source, bytes):
        with _open_encoded(io.BytesIO(source), len(source), source) as image:
            yield image
    else:
        raise InputError(
            f"an image cannot be a {type(source).__name__}; give a path, bytes, a PIL image or a uint8 array"
        )


def displayed_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after EXIF orientation, from the header alone."""
    width, height = image.size
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to 8-bit RGB as a viewer would show it, transparency dropped."""
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I;16"):
        # The upper byte, as Pillow itself does with 16-bit RGB: one picture gives one result in either form.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("RGBa", "La"):
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    elif image.mode in ("I", "F"):
        raise InputError(f"pixels of mode {image.mode} have no known range; convert the image to 8-bit RGB first")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    if not _EXIF_SOURCES & image.info.keys():
        return 1  # asking a PNG without EXIF would decode it, to look behind the pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag block raises a dozen types and says nothing about the pixels
        return 1
    return value if value in _TURNS else 1


def _from_array(array: np.ndarray) -> Image.Image:
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shape_fits or 0 in array.shape:
        raise InputError(
            f"an image array must be uint8 [H,W], [H,W,3] or [H,W,4], not {array.dtype} {list(array.shape)}"
        )
    image = Image.fromarray(np.ascontiguousarray(array))
    _check_pixels(image, array)
    return image


@contextmanager
def _open_encoded(handle: IO[bytes], size: int, source: object) -> Iterator[Image.Image]:
    if size == 0:
        raise InputError(f"{describe(source)} is empty (0 bytes); save or download it again")
    if size > MAX_FILE_BYTES:
        raise InputError(f"{describe(source)} has {size} bytes; images may have {MAX_FILE_BYTES}")
    with explained(source), warnings.catch_warnings():
        # Pillow warns of large images (ours is a limit, and lower than the one at which it refuses) and of damaged
        # EXIF, which is no fault of the pixels.
        warnings.simplefilter("ignore")
        image = Image.open(handle, formats=FORMATS)
    with image:
        _check_pixels(image, source)
        yield image


def _check_pixels(image: Image.Image, source: object) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{describe(source)} has {width}x{height} pixels; images may have {MAX_PIXELS}: scale it down")


@contextmanager
def explained(source: object) -> Iterator[None]:
    """Turn what goes wrong inside Pillow into one line about the source."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{describe(source)}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"{describe(source)} is not a {', '.join(FORMATS)} image; convert it to one of these"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{describe(source)} is too large; images may have {MAX_PIXELS} pixels: scale it down"
        ) from error
    except Exception as error:  # on damaged bytes Pillow's decoders raise a dozen types
        raise InputError(
            f"{describe(source)} cannot be decoded ({_one_line(error)}); the file is damaged or cut short"
        ) from error


def _one_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
