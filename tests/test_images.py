"""Photographs from elsewhere: what can be decoded is read, as viewers show it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from support import images
from support.images import UnreadableFile, open_image, read_photograph, to_srgb

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


def exif_of(orientation, little=True):
    order, mark = ('<', b'II') if little else ('>', b'MM')
    return b'Exif\0\0' + mark + struct.pack(order + 'HIHHHIHHI', 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


PNG, JPEG = encoded(NOISE, 'PNG'), encoded(NOISE, 'JPEG', quality=90)
BOMB = b'zTXt', b'key\0\0' + zlib.compress(bytes(70 << 20), 1)  # unpacks to 70 MB


@pytest.mark.parametrize(
    'plain, odd',
    [
        (JPEG, encoded(NOISE, 'JPEG', quality=90, exif=b'Exif\0\0 no TIFF header')),
        (JPEG, with_segment(JPEG, 0xE1, exif_of(6)[:17])),
        (JPEG, with_segment(JPEG, 0xE1, exif_of(99))),
        (JPEG, with_segment(JPEG, 0xE2, b'MPF\0' + b'odd' * 9)),
        (JPEG, with_segment(JPEG, 0xE2, b'ICC_PROFILE\0\1\1 odd')),
        (JPEG, with_segment(JPEG, 0xED, b'Photoshop 3.0\0008BIM\4\4\0\0\0\0\xff\xff')),
        (JPEG, with_segment(JPEG, 0xE0, b'JFIF')),
        (PNG, with_chunk(PNG, (b'eXIf', b'odd bytes'))),
        (PNG, with_chunk(PNG, (b'iCCP', b'name\0\0odd'))),
        (PNG, with_chunk(PNG, (b'iCCP', b'odd'))),
        (PNG, with_chunk(PNG, (b'pHYs', b'odd'), (b'gAMA', b''), (b'tIME', b'1'))),
        (PNG, with_chunk(PNG, BOMB)),
        (PNG, with_chunk(PNG, *[(b'tEXt', b'key\0' + bytes(1 << 20))] * 70)),
        (PNG, with_chunk(PNG, (b'iTXt', b'key\0\1'))),
    ],
)
def test_no_metadata_refuses_a_photograph(plain, odd):
    assert np.array_equal(read_photograph(odd), read_photograph(plain))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photograph_is_upright_also_if_other_tags_are_impossible(orientation):
    stored = {1: NOISE, 2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE'}
    stored |= {6: 'ROTATE_90', 7: 'TRANSVERSE', 8: 'ROTATE_270'}  # 6 is to be turned clockwise, so it is stored counter
    image = NOISE if orientation == 1 else NOISE.transpose(Image.Transpose[stored[orientation]])
    exif = exif_of(orientation)[6:]
    odd = exif[:8] + struct.pack('<H', 2) + exif[10:22] + struct.pack('<HHII', 0x829A, 5, 1, 1 << 30) + exif[22:]
    for content in exif, odd:
        assert np.array_equal(read_photograph(with_chunk(encoded(image, 'PNG'), (b'eXIf', content))), NOISE)
    # The rest of the metadata goes, EXIF stays.
    assert np.array_equal(read_photograph(with_chunk(encoded(image, 'PNG'), (b'eXIf', exif), BOMB)), NOISE)


def test_the_transparent_colour_of_a_png_of_16_bits_is_transparent():
    pixels = np.full((8, 8, 3), 40_000, '>u2')
    pixels[:4] = 1000, 2000, 3000
    rows = zlib.compress(b''.join(b'\0' + row.tobytes() for row in pixels))
    header, colour = struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0), struct.pack('>HHH', 1000, 2000, 3000)
    chunks = (b'IHDR', header), (b'tRNS', colour), (b'IDAT', rows), (b'IEND', b'')
    found = read_photograph(PNG[:8] + b''.join(chunk(*each) for each in chunks))
    assert [found.getpixel((0, y))[3] for y in (0, 7)] == [0, 255]


def test_a_jpeg_without_its_last_bytes_is_read():
    found = np.asarray(read_photograph(JPEG[:-40]))
    assert np.array_equal(found[:12], np.asarray(read_photograph(JPEG))[:12])
    with pytest.raises(UnreadableFile):
        read_photograph(PNG[:200])


def test_a_jpeg_of_many_pixels_is_read_at_a_reduced_size(monkeypatch):
    monkeypatch.setattr(images, 'LARGEST_JPEG', 100 * 100)
    for mode in 'RGB', 'CMYK', 'L':
        small = read_photograph(encoded(Image.new(mode, (400, 200), 'red' if mode == 'RGB' else None), 'JPEG'))
        assert small.size in ((100, 50), (200, 100)), small.size
    assert read_photograph(encoded(Image.new('RGB', (100, 100)), 'JPEG')).size == (100, 100)


@pytest.mark.parametrize('source', [bytes, bytearray, memoryview, io.BytesIO])
def test_bytes_and_binary_files_are_read_also_again(source):
    given = source(PNG)
    for _ in range(2):
        assert np.array_equal(read_photograph(given), NOISE)
    with pytest.raises(UnreadableFile, match='an image in memory: not an image of a known kind .JPEG, PNG, '):
        read_photograph(source(b'no image'))
    with pytest.raises(UnreadableFile, match='an image in memory: is empty'):
        read_photograph(source(b''))


def test_a_file_opened_as_text_is_told():
    with pytest.raises(UnreadableFile, match='a file opened as text; open it as binary'):
        read_photograph(io.StringIO('text'))


# ---- modes


@pytest.mark.parametrize(
    'mode, colour, expected',
    [
        ('RGB', (200, 100, 50), (200, 100, 50)),
        ('L', 90, (90, 90, 90)),
        ('1', 1, (255, 255, 255)),
        ('CMYK', (0, 0, 0, 255), (0, 0, 0)),
        ('P', 0, (10, 20, 30)),
        ('RGBA', (200, 100, 50, 255), (200, 100, 50)),
        ('LA', (90, 255), (90, 90, 90)),
        ('I', 90, (90, 90, 90)),
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


def grey_png(values, *chunks):
    """A 16-bit grey PNG."""
    rows = b''.join(b'\0' + np.asarray(row, '>u2').tobytes() for row in values)
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', len(values[0]), len(values), 16, 0, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + b''.join(chunk(*each) for each in chunks) + chunk(
        b'IDAT', zlib.compress(rows)
    ) + chunk(b'IEND', b'')  # fmt: skip


@pytest.mark.parametrize(
    'values, chunks, expected',
    [
        ([0, 1023], (), [0, 255]),
        ([0, 2047, 4095], (), [0, 127, 255]),
        ([0, 1000, 65535], (), [0, 3, 255]),
        ([0, 1023], [(b'sBIT', b'\x0c')], [0, 63]),
    ],
)
def test_grey_of_10_or_12_bits_is_not_dark(values, chunks, expected):
    found = read_photograph(grey_png([values], *chunks))
    assert np.asarray(found)[0, :, 0].tolist() == expected


def test_grey_of_16_bits_with_a_transparent_value():
    found = read_photograph(grey_png([[0, 40000, 65535]], (b'tRNS', struct.pack('>H', 40000))))
    assert found.mode == 'RGBA' and np.asarray(found)[0, :, 3].tolist() == [255, 0, 255]


def test_a_tiff_tells_its_highest_value(tmp_path):
    Image.fromarray(np.array([[0, 500]], np.uint16)).save(tmp_path / 'a.tif', tiffinfo={0x0119: 1023})
    assert np.asarray(read_photograph(tmp_path / 'a.tif'))[0, :, 0].tolist() == [0, 124]


# ---- colours


def test_a_colour_profile_is_applied_and_not_kept():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    exchanged = srgb.replace(b'rXYZ', b'tmp_').replace(b'gXYZ', b'rXYZ').replace(b'tmp_', b'gXYZ')  # red and green
    stored = Image.new('RGB', (4, 4), (255, 0, 0))
    found = read_photograph(encoded(stored, 'PNG', icc_profile=exchanged))
    assert found.getpixel((0, 0))[1] > 200 > 60 > found.getpixel((0, 0))[0] and 'icc_profile' not in found.info
    assert read_photograph(encoded(stored, 'PNG', icc_profile=srgb)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize('mode', ['L', 'CMYK', 'P', 'RGBA'])
def test_a_profile_of_another_colour_space_is_passed_over(mode):
    image = NOISE.convert(mode)
    plain = read_photograph(encoded(image, 'TIFF'))
    found = read_photograph(encoded(image, 'TIFF', icc_profile=b'odd'))
    assert np.array_equal(found, plain) and found.info == {}


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


def test_any_error_of_a_decoder_is_a_damaged_image(tmp_path, monkeypatch):
    (tmp_path / 'a.png').write_bytes(PNG)
    monkeypatch.setattr(Image.Image, 'convert', lambda *_: {}['key'])
    with pytest.raises(UnreadableFile, match=r"a\.png: 'key'"), open_image(tmp_path / 'a.png') as image:
        to_srgb(image)
