"""Single image files: pixels are those that the file shows, or the error names what they could not be."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from resflow_jax.data.image_files import decode, shape_of

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (4, 6, 3), np.uint8)
GREY = COLOUR[..., :1]
ALPHA = np.concatenate([COLOUR, np.full((4, 6, 1), 255, np.uint8)], axis=-1)
CLEAR = ALPHA.copy()
CLEAR[2, 3, 3] = 254
INDICES = RNG.integers(0, 4, (4, 6), np.uint8)
PALETTE = RNG.integers(0, 256, (4, 3), np.uint8)
TURNS = {  # tag of EXIF: the pixels that are shown
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


def image_of(array):
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def palette(transparency=None):
    image = Image.fromarray(INDICES)  # grey, made an image of indices
    image = image.copy()
    image.putpalette(PALETTE.ravel().tolist())
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def png(path, array, depth, colour, width=6):
    """A file with pixels of any depth, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, len(array), depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def tif16(path, array):
    """A file with colours of 16 bits, which Pillow cannot write."""
    height, width, channels = array.shape
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14)]
    tags += [(277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, array.nbytes)]
    head = b"II*\0" + struct.pack("<I", 14 + array.nbytes) + struct.pack("<HHH", 16, 16, 16)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(head + array.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("turn", TURNS)
def test_orientation_is_applied(tmp_path, suffix, turn):
    """The rows and columns are those that a viewer shows, for every orientation of EXIF."""
    exif, path = Image.Exif(), tmp_path / f"a.{suffix}"
    exif[0x0112] = turn
    Image.fromarray(COLOUR).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(decode(path), TURNS[turn](COLOUR), strict=True)
    assert shape_of(path) == TURNS[turn](COLOUR).shape


GOOD = {
    "colour.png": (lambda path: image_of(COLOUR).save(path), COLOUR),
    "grey.png": (lambda path: image_of(GREY).save(path), GREY),
    "grey.bmp": (lambda path: image_of(GREY).save(path), GREY),
    "opaque.png": (lambda path: image_of(ALPHA).save(path), COLOUR),
    "opaque.tif": (lambda path: image_of(ALPHA).save(path), COLOUR),
    "grey_alpha.png": (lambda path: Image.fromarray(GREY[..., 0]).convert("LA").save(path), GREY),
    "palette.png": (lambda path: palette().save(path), PALETTE[INDICES]),
    "palette.gif": (lambda path: palette().save(path), PALETTE[INDICES]),
    "unused.png": (lambda path: palette(b"\xff" * 4).save(path), PALETTE[INDICES]),
    "bits.png": (lambda path: Image.fromarray(GREY[..., 0] > 127).save(path), np.where(GREY > 127, 255, 0)),
    "nibbles.png": (
        lambda path: png(path, (GREY[:, ::2, 0] & 240) | (GREY[:, 1::2, 0] >> 4), 4, 0),
        (GREY >> 4) * 17,
    ),
    "png.jpg": (lambda path: image_of(COLOUR).save(path, "PNG"), COLOUR),
}


@pytest.mark.parametrize("name", GOOD)
def test_pixels_are_those_of_the_file(tmp_path, name):
    """Every kind of pixel that uint8 can hold is read exactly."""
    write, expected = GOOD[name]
    write(tmp_path / name)
    np.testing.assert_array_equal(decode(tmp_path / name), expected.astype(np.uint8), strict=True)
    assert shape_of(tmp_path / name) == expected.shape


def frames(path):
    images = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR), Image.fromarray(COLOUR // 2)]
    images[0].save(path, save_all=True, append_images=images[1:])


def cut(path):
    image_of(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])


BAD = {
    "grey16.png": (
        lambda path: Image.fromarray(GREY[..., 0].astype(np.uint16) * 257).save(path),
        "8 bits a pixel, got mode I;16 in",
    ),
    "colour16.png": (lambda path: png(path, RNG.integers(0, 2**16, (4, 6, 3)).astype(">u2"), 16, 2), "mode RGB;16B in"),
    "alpha16.png": (lambda path: png(path, RNG.integers(0, 2**16, (4, 6, 4)).astype(">u2"), 16, 6), "mode RGBA;16B in"),
    "grey_alpha16.png": (lambda path: png(path, np.full((4, 6, 2), 65535, ">u2"), 16, 4), "mode LA;16B in"),
    "colour16.tif": (lambda path: tif16(path, RNG.integers(0, 2**16, (4, 6, 3)).astype("<u2")), "mode RGB;16L in"),
    "float.tif": (lambda path: Image.fromarray(GREY[..., 0] / np.float32(255)).save(path), "got mode F in"),
    "int.tif": (lambda path: Image.fromarray(GREY[..., 0].astype(np.int32)).save(path), "got mode I in"),
    "cmyk.jpg": (lambda path: image_of(COLOUR).convert("CMYK").save(path), "grey or RGB images, got mode CMYK in"),
    "lab.tif": (lambda path: Image.frombytes("LAB", (6, 4), COLOUR.tobytes()).save(path), "got mode LAB in"),
    "frames.gif": (frames, "one image a file, got 3 frames in"),
    "frames.png": (frames, "one image a file, got 3 frames in"),
    "frames.tif": (frames, "one image a file, got 3 frames in"),
    "frames.webp": (frames, "one image a file, got 3 frames in"),
    "empty.png": (lambda path: path.touch(), "expected an image file, could not read"),
    "text.png": (lambda path: path.write_text("hello"), "expected an image file, could not read"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_pixels_cannot_be_is_named(tmp_path, name):
    """The error comes before pixels are decoded, and names the file."""
    write, message = BAD[name]
    write(tmp_path / name)
    for read in (decode, shape_of):
        with pytest.raises(ValueError, match=f"path: .*{message} .*{name}"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("clear.png", lambda path: image_of(CLEAR).save(path), "opaque images, got transparent pixels in"),
        ("clear.webp", lambda path: image_of(CLEAR).save(path, lossless=True), "got transparent pixels in"),
        ("index.png", lambda path: palette(int(INDICES[0, 0])).save(path), "got transparent pixels in"),
        ("index.gif", lambda path: palette().save(path, transparency=int(INDICES[0, 0])), "got transparent pixels in"),
        (
            "colour.png",
            lambda path: image_of(COLOUR).save(path, transparency=tuple(map(int, COLOUR[1, 1]))),
            "got transparent pixels in",
        ),
        ("cut.png", cut, "expected an image file, could not read"),
        ("cut.jpg", cut, "expected an image file, could not read"),
    ],
)
def test_what_only_pixels_show_is_named(tmp_path, name, write, message):
    """Transparency, and files that end too early."""
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"path: .*{message} .*{name}"):
        decode(tmp_path / name)


def test_previews_of_a_camera(tmp_path):
    """A file of several pictures of a camera is its first one, with a warning."""
    image_of(COLOUR).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image_of(255 - COLOUR)])
    image_of(COLOUR).save(tmp_path / "b.jpg", "JPEG")
    with pytest.warns(UserWarning, match=r"a\.jpg has 2 pictures, of which the first is taken"):
        pixels = decode(tmp_path / "a.jpg")
    np.testing.assert_array_equal(pixels, decode(tmp_path / "b.jpg"))
