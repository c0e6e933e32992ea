"""Photographs from elsewhere: what can be decoded is read, as viewers show it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from support import images
from support.images import UnreadableFile, read_photograph, to_srgb

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).resize((32, 24))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def with_chunk(png, *added):
    """A PNG with chunks after its header."""
    return png[:33] + b''.join(chunk(*each) for each in added) + png[33:]


def with_segment(jpeg, marker, content):
    return jpeg[:2] + struct.pack('>BBH', 0xFF, marker, len(content) + 2) + content + jpeg[2:]


def exif_of(orientation):
    return b'II' + struct.pack('<HIHHHIHHI', 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


PNG, JPEG = encoded(NOISE, 'PNG'), encoded(NOISE, 'JPEG', quality=90)
BOMB = b'zTXt', b'key\0\0' + zlib.compress(bytes(70 << 20), 1)  # unpacks to 70 MB


@pytest.mark.parametrize(
    'plain, odd',
    [
        (JPEG, with_segment(JPEG, 0xE1, b'Exif\0\0' + exif_of(99))),
        (JPEG, with_segment(JPEG, 0xE2, b'ICC_PROFILE\0\1\1 odd')),
        (JPEG, with_segment(JPEG, 0xE0, b'JFIF')),
        (PNG, with_chunk(PNG, (b'eXIf', b'odd bytes'))),
        (PNG, with_chunk(PNG, (b'iCCP', b'odd'))),
        (PNG, with_chunk(PNG, BOMB)),
    ],
    ids=['orientation', 'JPEG profile', 'JFIF', 'EXIF', 'PNG profile', 'bomb'],
)
def test_no_metadata_refuses_a_photograph(plain, odd):
    assert np.array_equal(read_photograph(odd), read_photograph(plain))


TURNED = 'FLIP_LEFT_RIGHT', 'ROTATE_180', 'FLIP_TOP_BOTTOM', 'TRANSPOSE', 'ROTATE_90', 'TRANSVERSE', 'ROTATE_270'


@pytest.mark.parametrize('orientation, turned', [*enumerate(TURNED, 2)])  # 6, to be turned clockwise, is stored counter
def test_a_photograph_is_upright_also_if_other_metadata_is_impossible(orientation, turned):
    png, exif = encoded(NOISE.transpose(Image.Transpose[turned]), 'PNG'), exif_of(orientation)
    odd = exif[:8] + struct.pack('<H', 2) + exif[10:22] + struct.pack('<HHII', 0x829A, 5, 1, 1 << 30) + exif[22:]
    for chunks in [(b'eXIf', exif)], [(b'eXIf', odd)], [(b'eXIf', exif), BOMB]:
        assert np.array_equal(read_photograph(with_chunk(png, *chunks)), NOISE)


def test_a_jpeg_without_its_last_bytes_is_read():
    found = np.asarray(read_photograph(JPEG[:-40]))
    assert np.array_equal(found[:12], np.asarray(read_photograph(JPEG))[:12])
    with pytest.raises(UnreadableFile):
        read_photograph(PNG[:200])


def test_a_jpeg_of_many_pixels_is_read_at_a_reduced_size(monkeypatch):
    monkeypatch.setattr(images, 'LARGEST_JPEG', 100 * 100)
    assert read_photograph(encoded(Image.new('CMYK', (400, 200)), 'JPEG')).size in ((100, 50), (200, 100))
    assert read_photograph(encoded(Image.new('RGB', (100, 100)), 'JPEG')).size == (100, 100)


def test_what_is_in_memory_is_read_also_again():
    for given in bytearray(PNG), memoryview(PNG), io.BytesIO(PNG):
        for _ in range(2):
            assert np.array_equal(read_photograph(given), NOISE)
    for given, message in [
        (b'no image', 'an image in memory: not an image of a known kind .JPEG, PNG, '),
        (b'', 'an image in memory: is empty'),
        (io.StringIO('text'), 'a file opened as text; open it as binary'),
    ]:
        with pytest.raises(UnreadableFile, match=message):
            read_photograph(given)


# ---- modes


@pytest.mark.parametrize(
    'mode, colour, expected',
    [
        ('L', 90, (90, 90, 90)),
        ('1', 1, (255, 255, 255)),
        ('CMYK', (0, 0, 0, 255), (0, 0, 0)),
        ('P', 0, (10, 20, 30)),
        ('RGBA', (200, 100, 50, 255), (200, 100, 50)),
        ('I;16', 90, (90, 90, 90)),
        ('F', 90.0, (90, 90, 90)),
        ('F', 90.5 / 255, (90, 90, 90)),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, expected):
    image = Image.new(mode, (8, 6), colour)
    if mode == 'P':
        image.putpalette(expected)
    rgb = to_srgb(image)
    assert (rgb.mode, rgb.size, rgb.getpixel((3, 3))) == ('RGB', (8, 6), expected)


def test_transparency_is_kept_and_shown_on_white():
    half = to_srgb(Image.new('LA', (2, 1), (90, 128)))
    assert half.mode == 'RGBA' and half.getpixel((0, 0)) == (90, 90, 90, 128)
    assert images.on_white(half).getpixel((0, 0)) == (172, 172, 172)


def png_of(values, *chunks):
    """A PNG of 16 bits, of grey (H, W) or RGB (H, W, 3)."""
    values = np.asarray(values, '>u2')
    header = struct.pack('>IIBBBBB', values.shape[1], len(values), 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    rows = zlib.compress(b''.join(b'\0' + row.tobytes() for row in values))
    parts = (b'IHDR', header), *chunks, (b'IDAT', rows), (b'IEND', b'')
    return PNG[:8] + b''.join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    'data, expected',
    [
        (png_of([[0, 1023]]), [0, 255]),
        (png_of([[0, 1000, 65535]]), [0, 3, 255]),
        (png_of([[0, 1023]], (b'sBIT', b'\x0c')), [0, 63]),
        (encoded(Image.fromarray(np.array([[0, 500]], np.uint16)), 'TIFF', tiffinfo={0x0119: 1023}), [0, 124]),
    ],
    ids=['10 bits', '16 bits', '12 bits as PNG says', '10 bits as TIFF says'],
)
def test_grey_of_10_or_12_bits_is_not_dark(data, expected):
    assert np.asarray(read_photograph(data))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    'values, clear, alpha',
    [
        ([[0, 40_000, 65_535]], [40_000], [255, 0, 255]),
        ([[(1000, 2000, 3000), (40_000, 40_000, 40_000)]], [1000, 2000, 3000], [0, 255]),
    ],
    ids=['grey', 'RGB'],
)
def test_the_transparent_colour_of_a_png_of_16_bits_is_transparent(values, clear, alpha):
    found = read_photograph(png_of(values, (b'tRNS', struct.pack(f'>{len(clear)}H', *clear))))
    assert found.mode == 'RGBA' and np.asarray(found)[0, :, 3].tolist() == alpha


# ---- colours


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


def test_a_colour_profile_is_applied_and_not_kept():
    exchanged = SRGB.replace(b'rXYZ', b'tmp_').replace(b'gXYZ', b'rXYZ').replace(b'tmp_', b'gXYZ')  # red and green
    stored = Image.new('RGB', (4, 4), (255, 0, 0))
    found = read_photograph(encoded(stored, 'PNG', icc_profile=exchanged))
    red, green, _ = found.getpixel((0, 0))
    assert green > 200 > 60 > red and found.info == {}
    assert read_photograph(encoded(stored, 'PNG', icc_profile=SRGB)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_a_profile_of_another_colour_space_is_passed_over(mode):
    image = NOISE.convert(mode)
    found = read_photograph(encoded(image, 'TIFF', icc_profile=SRGB))
    assert np.array_equal(found, read_photograph(encoded(image, 'TIFF'))) and found.info == {}


# ---- other formats


def test_heic_is_read_with_pillow_heif_and_named_without_it(tmp_path, monkeypatch):
    heif = pytest.importorskip('pillow_heif')
    heif.from_pillow(NOISE.resize((64, 64))).save(tmp_path / 'a.heic', quality=100)
    found = np.asarray(read_photograph(tmp_path / 'a.heic'), int)
    assert abs(found - np.asarray(NOISE.resize((64, 64)), int)).mean() < 12
    monkeypatch.setattr(images, 'pillow_heif', None)
    monkeypatch.setattr(images, 'IMAGE_FORMATS', ('JPEG', 'PNG'))
    with pytest.raises(UnreadableFile, match='a.heic: not an image .*; for HEIC and HEIF, pip install pillow-heif'):
        read_photograph(tmp_path / 'a.heic')
