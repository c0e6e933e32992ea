"""Images from elsewhere: any file that can be decoded, as viewers show it. Imports no torch."""

import glob
import io
import os
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from support.cli import InputError, reason

try:
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pillow_heif = None

# What cameras, phones and browsers write. Pillow reads others, too, and starts a program for one of them (EPS).
IMAGE_FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'AVIF', *(('HEIF',) if pillow_heif else ()))
# Looked for in folders.
IMAGE_SUFFIXES = tuple('.jpg .jpeg .jfif .png .gif .bmp .webp .tif .tiff .avif .heic .heif'.split())
LARGEST_JPEG = 100_000_000  # pixels; a larger one is read at a half, a quarter or an eighth of its size
ORIENTATION, BITS_PER_SAMPLE, HIGHEST_VALUE = 0x0112, 0x0102, 0x0119  # tags of EXIF and TIFF
# What turns a picture upright that was stored with this EXIF orientation.
TURNS = dict(enumerate(('FLIP_LEFT_RIGHT', 'ROTATE_180', 'FLIP_TOP_BOTTOM', 'TRANSPOSE', 'ROTATE_270', 'TRANSVERSE',
                        'ROTATE_90'), 2))  # fmt: skip
SPACES = {'RGB': 'RGB ', 'CMYK': 'CMYK', 'L': 'GRAY'}  # {mode of Pillow: colour space of an ICC profile}


class UnreadableFile(InputError):
    """An image or an annotation that cannot be used; the message names the file."""


@contextmanager
def reading(name):
    """Whatever Pillow raises within it becomes an UnreadableFile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about files that can be read: very large, damaged EXIF
            yield
    except UnidentifiedImageError:
        more = '' if pillow_heif else '; for HEIC and HEIF, pip install pillow-heif'
        raise UnreadableFile(f'{name}: not an image of a known kind ({", ".join(IMAGE_FORMATS)}{more})') from None
    except Exception as error:  # damaged files make Pillow's decoders raise errors of any type
        raise UnreadableFile(f'{name}: {reason(error)}') from None


def check_file(path):
    """Raises UnreadableFile for a pipe or a folder: reading a pipe would block."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UnreadableFile(f'{path}: is not a file')


@contextmanager
def open_image(path):
    """Yield the file's PIL image as it is stored; raises UnreadableFile, also for what fails in the block."""
    check_file(path)
    with reading(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        yield image


def read_photograph(source):
    """`to_srgb` of a path, the bytes of a file, or a binary file, upright as its EXIF says.

    Damaged metadata is passed over, and of a JPEG without its end what is there is read. Raises UnreadableFile.
    """
    is_path = isinstance(source, (str, os.PathLike))
    if is_path:
        check_file(source)
    with reading(source if is_path else 'an image in memory'):
        data = Path(source).read_bytes() if is_path else read_memory(source)
        if not data:
            raise ValueError('is empty')
        try:
            return to_srgb(upright(decode(data)))
        except Exception:  # damaged metadata makes Pillow raise errors of any type
            for kept in without_metadata(data, but_exif=True), without_metadata(data):
                with suppress(Exception):
                    return to_srgb(upright(decode(kept)))
            raise


def read_memory(source):
    """The bytes of a bytes-like object or a binary file, all of it; raises ValueError for a file opened as text."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if source.seekable():
        source.seek(0)  # it may have been read before
    data = source.read()
    if isinstance(data, str):
        raise ValueError('a file opened as text; open it as binary')
    return data


def find_images(folder, pattern=None, suffixes=IMAGE_SUFFIXES):
    """The files below `folder`, to any depth, that end in one of `suffixes` and fit `pattern` (of glob), sorted.

    Without what is hidden, such as ._cat.jpg of macOS. Raises InputError for none.
    """
    paths = map(Path, glob.glob(pattern, recursive=True)) if pattern else folder.rglob('*')
    chosen = [path for path in paths if path.suffix.lower() in suffixes and path.is_file()]
    found = [path for path in chosen if not any(part[0] == '.' for part in path.relative_to(folder).parts)]
    if not found:
        raise InputError(f'{pattern or folder}: finds no file that ends in {", ".join(suffixes)}')
    return sorted(found)


def decode(data):
    """The PIL image of the bytes of a file, decoded."""
    if data.startswith(b'\xff\xd8\xff'):
        # Not by Image.open, which refuses large images; the end marker is for files that lack theirs.
        image = JpegImageFile(io.BytesIO(data + b'\xff\xd9'))
        if image.width * image.height > LARGEST_JPEG:
            image.draft(None, tuple(round(side * (LARGEST_JPEG / 4 / image.width / image.height) ** 0.5)
                                    for side in image.size))  # fmt: skip
    else:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.format == 'PNG':
            image.info['sbit'] = significant_bits(data)
    image.load()
    return image


def png_chunks(data):
    """Yield (kind, all bytes) of each chunk of a PNG."""
    start = 8
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], 'big')
        yield data[start + 4 : start + 8], data[start:end]
        start = end


def significant_bits(data):
    """What a PNG says in its sBIT chunk: the bits of a grey value that are used; None if it says nothing."""
    return next((chunk[8] for kind, chunk in png_chunks(data) if kind == b'sBIT' and len(chunk) == 13), None)


def without_metadata(data, but_exif=False):
    """The bytes of a PNG or JPEG without what is not needed for its pixels, but EXIF; of others, as they are."""
    kinds, markers = ((b'tRNS', b'eXIf'), (0xE1,)) if but_exif else ((b'tRNS',), ())
    if data.startswith(b'\x89PNG'):
        return data[:8] + b''.join(chunk for kind, chunk in png_chunks(data) if kind[:1].isupper() or kind in kinds)
    start, kept = 2, [b'\xff\xd8']
    while data.startswith(b'\xff\xd8') and data[start : start + 1] == b'\xff' and start + 4 <= len(data):
        marker, end = data[start + 1], start + 2 + int.from_bytes(data[start + 2 : start + 4], 'big')
        if marker == 0xDA:  # the pixels follow
            return b''.join(kept) + data[start:]
        # APP0 to APP15 without Adobe's, and comments, go.
        if marker in markers or not (0xE0 <= marker <= 0xED or marker in (0xEF, 0xFE)):
            kept.append(data[start:end])
        start = end
    return data


def upright(image):
    """A PIL image turned as its EXIF says, if that can be read."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF makes Pillow raise errors of any type
        turn = None
    return image.transpose(Image.Transpose[turn]) if turn else image


def to_srgb(image):
    """A PIL image of any mode -> RGB, or RGBA if some of it is transparent: 8 bits, in sRGB, without metadata.

    Grey of more than 8 bits is scaled by the bits in use: those that the file tells, else those of the highest value.
    """
    alpha, profile, clear = None, image.info.get('icc_profile'), image.info.get('transparency')
    if image.mode.startswith(('I', 'F')):
        values = np.nan_to_num(np.asarray(image))
        if isinstance(clear, int):
            alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        image = Image.fromarray((values * grey_scale(image, values.max())).clip(0, 255).astype(np.uint8))
    elif isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits, where Pillow reads the upper 8
        image = image.copy()
        image.info['transparency'] = tuple(value >> 8 for value in clear)
    if 'A' in image.mode or 'a' in image.mode or 'transparency' in image.info:
        image = image.convert('RGBA')
        alpha = image.getchannel('A')
        image = image.convert('RGB')
    if image.mode not in SPACES:
        image = image.convert('RGB')
    picture = apply_profile(image, profile).convert('RGB')
    if alpha is not None and alpha.getextrema()[0] < 255:
        picture.putalpha(alpha)
    picture.info = {}
    return picture


def grey_scale(image, highest):
    """What the values of a grey image of more than 8 bits are multiplied by to reach from 0 to 255."""
    if image.mode == 'F' and highest <= 2:  # in [0, 1], with an overshoot from resizing
        return 255
    tags = getattr(image, 'tag_v2', {})
    bits = image.info.get('sbit') or (tags.get(BITS_PER_SAMPLE) or (16,))[0]
    if bits >= 16:  # which is what the file says of any 16-bit image
        highest = (tags.get(HIGHEST_VALUE) or (0,))[0] or highest
        bits = int(highest).bit_length()
    return 255 / (2 ** max(8, bits) - 1)


def apply_profile(image, profile):
    """A PIL image of a mode in SPACES with an ICC profile, bytes -> sRGB; as it is for no or a broken profile."""
    if not profile:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if profile.profile.xcolor_space == SPACES[image.mode]:
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile('sRGB'), outputMode='RGB')
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        pass
    return image


def on_white(image):
    """A PIL image, RGB or RGBA -> RGB; transparent pixels become white."""
    if image.mode == 'RGB':
        return image
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
