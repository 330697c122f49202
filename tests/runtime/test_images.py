"""Reading images: every admitted kind gives the picture a viewer shows; everything else one clear line."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from runtime.errors import InputError
from runtime.images import MAX_PIXELS, ImageOptions, load_image
from tests.runtime.media import encoded, png_header, real_photo

# A gradient whose sides are multiples of 28 and whose area is within the limits: resizing leaves it as it is.
PICTURE = np.zeros((56, 84, 3), np.uint8)
PICTURE[..., 0] = np.linspace(0, 255, 84).astype(np.uint8)[None, :]
PICTURE[..., 1] = np.linspace(255, 0, 56).astype(np.uint8)[:, None]
RGB = Image.fromarray(PICTURE)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [("PNG", {}, 0), ("JPEG", {"quality": 95}, 12), ("WEBP", {"lossless": True}, 0), ("WEBP", {}, 25)],
)
def test_png_jpeg_and_webp_give_their_pixels(kind, options, tolerance):
    pixels = load_image(encoded(RGB, kind, **options))
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - PICTURE).max() <= tolerance


def test_path_bytes_image_and_array_are_one_picture(tmp_path):
    path = tmp_path / "picture.png"
    RGB.save(path)
    sources = [str(path), path, path.read_bytes(), RGB, PICTURE]
    for source in sources:
        np.testing.assert_array_equal(load_image(source), PICTURE)


def test_a_photograph_is_resized_once_bicubically_to_the_official_size():
    photo = Image.open(real_photo())
    pixels = load_image(real_photo())
    assert pixels.shape == (420, 644, 3)
    np.testing.assert_array_equal(pixels, np.asarray(photo.resize((644, 420), Image.Resampling.BICUBIC)))


def test_options_bound_the_size():
    pixels = load_image(real_photo(), ImageOptions(min_pixels=784, max_pixels=100 * 784))
    assert pixels.shape[0] * pixels.shape[1] <= 100 * 784


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of each turn, as PIL's Transpose numbers
    stored = RGB if orientation == 1 else RGB.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = load_image(encoded(stored, kind, exif=exif, quality=95))
    assert np.abs(pixels.astype(int) - PICTURE).max() <= (0 if kind == "PNG" else 25)


def test_a_sideways_photo_is_sized_by_how_it_is_shown():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.new("RGB", (640, 480))
    assert load_image(encoded(stored, exif=exif)).shape == (644, 476, 3)


def test_broken_exif_does_not_cost_the_picture():
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert load_image(data).shape == PICTURE.shape


def test_palette_greyscale_and_bilevel_images_become_rgb():
    palette = Image.new("P", (56, 56), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert load_image(encoded(palette))[0, 0].tolist() == [200, 100, 50]
    assert load_image(encoded(Image.new("L", (56, 56), 77)))[0, 0].tolist() == [77] * 3
    assert load_image(encoded(Image.new("1", (56, 56), 1)))[0, 0].tolist() == [255] * 3


def test_transparency_is_dropped_not_blended():
    assert load_image(encoded(Image.new("RGBA", (56, 56), (10, 20, 30, 0))))[0, 0].tolist() == [10, 20, 30]
    assert load_image(encoded(Image.new("LA", (56, 56), (99, 0))))[0, 0].tolist() == [99] * 3
    palette = Image.new("P", (56, 56), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert load_image(encoded(palette, transparency=1))[0, 0].tolist() == [200, 100, 50]
    assert load_image(np.full((56, 56, 4), 9, np.uint8))[0, 0].tolist() == [9] * 3


def test_cmyk_jpeg_becomes_rgb():
    pixels = load_image(encoded(Image.new("CMYK", (56, 56), (255, 0, 0, 0)), "JPEG"))
    assert pixels[20, 20, 0] < 20
    assert pixels[20, 20, 1:].min() > 235


def sixteen_bit_png(samples: np.ndarray) -> bytes:
    """uint16 [H,W] or [H,W,3] as a PNG; Pillow cannot write the latter."""
    height, width = samples.shape[:2]
    colour = 0 if samples.ndim == 2 else 2
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_samples_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 56 * 56).astype(np.uint16).reshape(56, 56)
    grey = load_image(sixteen_bit_png(ramp))
    np.testing.assert_array_equal(grey[..., 0], ramp >> 8)
    colour = load_image(sixteen_bit_png(np.stack([ramp, ramp, ramp], axis=-1)))
    np.testing.assert_array_equal(colour, grey)


def test_a_sixteen_bit_png_may_be_rotated_too():
    stored = Image.fromarray(np.zeros((56, 84), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(stored, exif=exif)).shape == (84, 56, 3)


@pytest.mark.parametrize("image", [Image.new("F", (56, 56)), Image.new("I", (56, 56))], ids=["float", "32-bit"])
def test_pixels_of_unknown_range_are_refused(image):
    with pytest.raises(InputError, match="no known range"):
        load_image(image)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(data)[0, 0].tolist() == [255, 0, 0]


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_files_that_are_none_are_named_with_a_mend(tmp_path):
    (tmp_path / "empty.png").touch()
    cases = {
        tmp_path / "missing.png": "does not exist",
        tmp_path / "empty.png": "empty",
        tmp_path: "not a regular file",
    }
    for path, cause in cases.items():
        with pytest.raises(InputError, match=cause) as error:
            load_image(path)
        assert path.name in one_line(error)
        assert ";" in one_line(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a POSIX thing")
def test_a_named_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a regular file"):
        load_image(tmp_path / "pipe.png")


def test_a_line_break_in_a_file_name_does_not_break_the_message(tmp_path):
    with pytest.raises(InputError) as error:
        load_image(tmp_path / "a\nb.png")
    assert "a\\nb.png" in one_line(error)


def test_a_name_that_the_system_refuses_is_an_input_error():
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(InputError):
            load_image(name)


@pytest.mark.parametrize(
    "name", ["<clipboard>", "<screen>", "imageio:chelsea.png", "http://localhost/a.png", "a.zip/b.png"]
)
def test_magic_strings_are_only_file_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_image(name)
    if "/" not in name:
        RGB.save(tmp_path / name, "PNG")
        assert load_image(name).shape == PICTURE.shape


def test_a_link_is_followed(tmp_path):
    RGB.save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert load_image(tmp_path / "b.png").shape == PICTURE.shape


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_an_input_error(kind, share):
    data = encoded(Image.open(real_photo()).resize((200, 150)), kind)
    with pytest.raises(InputError, match="given bytes") as error:
        load_image(data[: int(len(data) * share)])
    one_line(error)


def test_an_announced_bomb_is_refused_before_decoding():
    for side in (12_000, 60_000):
        with pytest.raises(InputError, match=f"images may have {MAX_PIXELS}.*scale it down"):
            load_image(png_header(side, side))


def test_a_large_but_allowed_image_raises_no_warning(recwarn):
    with pytest.raises(InputError, match="cut short"):
        load_image(png_header(11_000, 11_000))
    assert not recwarn.list


@pytest.mark.parametrize("size", [(1, 201), (20_000, 10)])
def test_an_absurd_ratio_is_refused(size):
    with pytest.raises(InputError, match="too elongated"):
        load_image(encoded(Image.new("L", size)))


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "ICO"])
def test_formats_outside_the_list_are_refused(kind):
    with pytest.raises(InputError, match="not a PNG, JPEG, WEBP image"):
        load_image(encoded(RGB, kind))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_arrays_of_other_types_and_shapes_are_refused(array):
    with pytest.raises(InputError, match="uint8"):
        load_image(array)


def test_other_objects_are_refused():
    with pytest.raises(InputError, match="cannot be a BytesIO"):
        load_image(io.BytesIO(b""))  # pyright: ignore[reportArgumentType]


def test_options_are_checked_by_name_type_and_range():
    assert ImageOptions.from_mapping({"max_pixels": 78_400}) == ImageOptions(max_pixels=78_400)
    with pytest.raises(InputError, match="unknown media option 'fps'; allowed: min_pixels, max_pixels"):
        ImageOptions.from_mapping({"fps": 2})
    for value in ("78400", 78_400.0, True, None, -1, 16_056_321):
        with pytest.raises(InputError, match="max_pixels"):
            ImageOptions.from_mapping({"max_pixels": value})
    with pytest.raises(InputError, match="min_pixels"):
        ImageOptions(min_pixels=10_000, max_pixels=5_000)
    with pytest.raises(InputError, match="object"):
        ImageOptions.from_mapping([])  # pyright: ignore[reportArgumentType]


def test_importing_the_media_modules_loads_no_decoder_and_no_jax():
    code = (
        "import sys, runtime.images, runtime.video; "
        "print(*{'av', 'imageio', 'jax', 'keye_jax', 'tokenizers'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
