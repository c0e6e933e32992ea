"""Does any broken or hostile file get a script to crash, hang, show a traceback or lose something?

    python benchmarks/mutants.py                       # 600 mutants, a few minutes
    python benchmarks/mutants.py --count 5000 --seed 1 --keep mutants

Makes small sound files of each format (HDF5 as others write it and as data_rechunk.py does, with and
without checksums; list.txt, XML, PNG, JPEG; model files and checkpoints), changes one of them in a
random way and gives it to the script that reads it, through the script's own `main`, in a process of its
own. A mutant ends well if the script ends with a result and exit status 0, or with one line that begins
with "error:" and exit status 1; without a traceback, a signal, more than --seconds or --megabytes,
an unfinished file left behind or, where it was refused, a change to what was there before. Where image
or mask data with checksums was changed, it has to be refused.

The ratio: mutants that ended well to all of them.
"""

import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

import common
import data_prepare
import data_rechunk
import mtl_vis
import train_mtl
from data_rechunk import SPLITS, whole_number

QUICK = ('--epochs', '2', '--limit-batches', '2', '--batch-size', '4', '--workers', '0', '--device', 'cpu')


# ---- sound files


def make_originals(folder):
    """The folders that are copied for each mutant."""
    rng = np.random.default_rng(0)
    common.script('data_prepare.py', '--limit', 30, '--size', 64, '--split', '60-20-20', '--out', folder / 'plain')
    shutil.copytree(folder / 'plain', folder / 'checksums')
    common.script('data_rechunk.py', '--data', folder / 'plain')
    common.script('data_rechunk.py', '--data', folder / 'checksums', '--checksums')
    shutil.copytree(folder / 'plain', folder / 'training' / 'data')
    os.chdir(folder / 'training')  # where the mutants' runs will be, whose --data has to be the same
    code = (f'import signal, sys; sys.path.insert(0, {str(common.ROOT)!r}); import data_rechunk, engine, train_mtl\n'
            'def write(saving, original=engine.Saving.write):\n'
            '    original(saving)\n'
            '    if saving.position == (2, 1): signal.raise_signal(signal.SIGTERM)\n'
            'engine.Saving.write = write\n'
            'data_rechunk.run_script(train_mtl.main)')
    stopped = subprocess.run([sys.executable, '-c', code, '--data', 'data', *QUICK, '--checkpoint-minutes', '1e-9',
                              '--out', folder / 'run'], capture_output=True, text=True)
    if stopped.returncode != 143:
        raise data_rechunk.InputError(f'training for the checkpoint ended with {stopped.returncode}: {stopped.stderr}')
    shutil.copy(folder / 'run' / 'best.pt', folder / 'run' / 'model.pt')
    layouts = {'train': {'chunks': (4, 16, 16, 1), 'compression': 'gzip'}, 'val': {},
               'test': {'chunks': (2, 32, 64, 3), 'fletcher32': True, 'shuffle': True}}
    for split in SPLITS:
        (folder / 'source' / split).mkdir(parents=True)
        for stem in 'images', 'masks', 'bboxes', 'binary':
            with h5py.File(folder / 'plain' / split / f'{stem}.h5') as file:
                values = file[stem][:6].astype('float32')
            layout = {key: value[:3] + (min(value[3], values.shape[3]),) if key == 'chunks' else value
                      for key, value in layouts[split].items()} if values.ndim == 4 else {}
            with h5py.File(folder / 'source' / split / f'{stem}.h5', 'w', libver=rng.choice(['earliest', 'v110'])) as file:
                file.create_dataset(stem, data=values, **layout).attrs['note'] = 'as others write it'
                file['more'] = np.arange(3)
    annotations = folder / 'photographs' / 'oxford-iiit-pet' / 'annotations'
    for part in ('../images', 'trimaps', 'xmls'):
        (annotations / part).mkdir(parents=True)
    lines = ['#Image CLASS-ID SPECIES BREED ID']
    for number in range(10):
        name = f'breed{number % 2}_{number}'
        lines.append(f'{name} {number % 2 + 1} {number % 2 + 1} 1')
        photograph = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
        exif = photograph.getexif()
        exif[0x0112], exif[0x010e] = 6, 'a pet'
        photograph.save(annotations / '..' / 'images' / f'{name}.jpg', exif=exif)
        Image.fromarray(rng.integers(1, 4, (60, 80), np.uint8)).save(annotations / 'trimaps' / f'{name}.png')
        write_xml(annotations / 'xmls' / f'{name}.xml', (8, 6, 40, 30))
    photograph.save(folder / 'photographs' / 'pet.png')
    photograph.save(folder / 'photographs' / 'cat.jpg', exif=exif)
    (annotations / 'list.txt').write_text('\n'.join(lines) + '\n')


def write_xml(path, box, size=(80, 60), before='', inside=''):
    corners = ''.join(f'<{key}>{value}</{key}>' for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
    path.write_text(f'{before}<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>'
                    f'<object><name>{inside}</name><bndbox>{corners}</bndbox></object></annotation>')


# ---- what any file may suffer: functions of (rng, path)


def truncate(rng, path):
    content = path.read_bytes()
    path.write_bytes(content[:rng.randrange(len(content))])


def empty(rng, path):
    path.write_bytes(b'')


def flip_bits(rng, path):
    """A few bits, more often than not near the start, where formats describe themselves."""
    content = bytearray(path.read_bytes())
    end = rng.choice([64, 1024, 4096, len(content)])
    for _ in range(rng.choice([1, 1, 3, 20])):
        content[rng.randrange(min(end, len(content)))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def overwrite(rng, path):
    """A stretch of random, zero or 255 bytes."""
    content = bytearray(path.read_bytes())
    start, length = rng.randrange(len(content)), rng.choice([1, 8, 100, 4096])
    content[start:start + length] = rng.choice([rng.randbytes(length), bytes(length), b'\xff' * length])
    path.write_bytes(content)


def cut_out(rng, path):
    content = path.read_bytes()
    start = rng.randrange(len(content))
    path.write_bytes(content[:start] + content[start + rng.choice([1, 7, 500]):])


def insert(rng, path):
    content = path.read_bytes()
    start = rng.randrange(len(content))
    path.write_bytes(content[:start] + rng.randbytes(rng.choice([1, 7, 500])) + content[start:])


def other_format(rng, path):
    path.write_bytes(rng.choice([
        b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 60\n(%pipe%touch evil) (w) file\nshowpage\n',
        b'GIF89a' + rng.randbytes(100), b'\x89HDF\r\n\x1a\n' + rng.randbytes(100), b'PK\x03\x04' + rng.randbytes(100),
        b'\x80\x04\x95' + rng.randbytes(100), b'\xff\xd8\xff\xe0' + rng.randbytes(100), rng.randbytes(5000),
        b'II*\0\x08\0\0\0' + rng.randbytes(200), b'<svg/>', b'RIFF\xff\xff\0\0WEBPVP8 ' + rng.randbytes(100),
    ]))


def missing(rng, path):
    path.unlink()


def no_file(rng, path):
    path.unlink()
    os.mkfifo(path) if rng.random() < 0.5 else path.mkdir()


def link_out(rng, path):
    """A symbolic link out of the tree: to a device, a system file, nothing, or itself."""
    path.unlink()
    path.symlink_to(rng.choice(['/dev/zero', '/dev/null', '/etc/hostname', '/nowhere/at/all', path.name]))


ANY = [truncate, truncate, empty, flip_bits, flip_bits, flip_bits, overwrite, overwrite, cut_out, insert,
       other_format, missing, no_file, link_out]


# ---- HDF5


def rewritten(path, change):
    """Write the file again with `change(values)` in place of its dataset, under each name it has there."""
    with h5py.File(path) as file:
        keys, values, attributes = list(file), file[path.stem][()], dict(file[path.stem].attrs)
    with h5py.File(path, 'w', libver='v110') as file:
        dataset = file.create_dataset(path.stem, data=change(values))
        dataset.attrs.update(attributes)
        if f'chunked_{path.stem}' in keys:
            file[f'chunked_{path.stem}'] = dataset
    if f'chunked_{path.stem}' in keys:
        try:
            data_rechunk.rechunk_file(path)
        except data_rechunk.InputError:  # it stays as it is
            pass


def hdf5_type(rng, path):
    kind = rng.choice(['S3', 'float64', 'int64', 'complex64', '>u2', 'bool', 'float16'])
    rewritten(path, lambda values: values.astype(kind))


def hdf5_shape(rng, path):
    change = rng.choice([lambda v: v[..., None], lambda v: v[0], lambda v: v[:0], lambda v: v[:, :1], lambda v: v[:-1],
                         lambda v: np.concatenate([v, v[:1]]), lambda v: v[()].ravel(), lambda v: np.float32(3)])
    rewritten(path, change)


def hdf5_value(rng, path):
    value = rng.choice([np.nan, np.inf, -np.inf, -1, 7, 1e30, 256, 0.5])

    def change(values):
        values = values.astype('float64')
        values.reshape(-1)[rng.randrange(values.size)] = value
        return values

    rewritten(path, change)


def hdf5_box(rng, path):
    """xmin > xmax, outside the picture, without area, infinite or unknown in part."""
    path = path.with_name('bboxes.h5')
    box = rng.choice([(40, 6, 8, 30), (500, 500, 600, 600), (5, 5, 5, 5), (-np.inf, 0, np.inf, 9), (np.nan, 1, 2, 3)])
    rewritten(path, lambda values: np.concatenate([values[:-1], [box]]).astype('float32'))


def hdf5_link(rng, path):
    """The dataset, or something beside it, is a link to another file or to nothing, or lies outside the file."""
    other = path.with_name('other.h5')
    shutil.copy(path, other)
    kind = rng.choice(['external', 'soft', 'beside', 'raw', 'virtual', 'group', 'loop'])
    with h5py.File(path, 'r+' if kind == 'beside' else 'w') as file:
        for key in (path.stem, f'chunked_{path.stem}'):
            if kind == 'external':
                file[key] = h5py.ExternalLink(rng.choice(['other.h5', '/etc/hostname', '/dev/zero']), path.stem)
            elif kind == 'soft':
                file[key] = h5py.SoftLink('/nowhere')
            elif kind == 'raw':
                shape = (6, 64, 64, 3) if path.stem == 'images' else (6, 64, 64, 1) if path.stem == 'masks' else (6, 4)
                file.create_dataset(key, shape, 'uint8', external=[('/etc/passwd', 0, h5py.h5f.UNLIMITED)])
            elif kind == 'virtual':
                source = h5py.VirtualSource(other, path.stem, shape=h5py.File(other)[path.stem].shape)
                layout = h5py.VirtualLayout(source.shape, 'float32')
                layout[...] = source
                file.create_virtual_dataset(key, layout)
            elif kind == 'group':
                file.create_group(key)
            elif kind == 'loop':
                file[key] = h5py.SoftLink(f'/{key}')
        if kind == 'beside':
            file['dangling'], file['away'] = h5py.SoftLink('/nowhere'), h5py.ExternalLink('/etc/hostname', '/')


def hdf5_bomb(rng, path):
    """More samples, larger ones or larger chunks than anyone has, of which next to nothing is stored."""
    channels = {'images': (3,), 'masks': (1,)}.get(path.stem)
    tail = (64, 64, *channels) if channels else (4,)
    shape, chunks = rng.choice([((10**9, *tail), (1, *tail)), ((6, 60_000, 60_000, 3), (1, 1000, 1000, 3)),
                                ((10**6, *tail), (10**3, *tail)), ((6, 5_000, 5_000, 1), (1, 5_000, 5_000, 1))])
    with h5py.File(path, 'w', libver='v110') as file:
        for key in (path.stem, f'chunked_{path.stem}'):
            dataset = file.create_dataset(key, shape, 'uint8', chunks=chunks, compression='gzip',
                                          maxshape=(None, *shape[1:]))  # an index that grows, for its size
            dataset[(0,) * len(shape)] = 1


def hdf5_filter(rng, path):
    """A filter that is not installed."""
    with h5py.File(path) as file:
        values = file[path.stem][()]
    with h5py.File(path, 'w') as file:
        for key in (path.stem, f'chunked_{path.stem}'):
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_chunk((1, *values.shape[1:]))
            plist.set_filter(32_000 + rng.randrange(100), h5py.h5z.FLAG_OPTIONAL, (1, 2))
            dataset = h5py.h5d.create(file.id, key.encode(), h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple(values.shape), plist)
            if rng.random() < 0.9:
                dataset.write_direct_chunk((0,) * values.ndim, rng.randbytes(500))


def hdf5_attributes(rng, path):
    with h5py.File(path, 'r+') as file:
        name = rng.choice(['preparation', 'class_names'])
        file[path.stem].attrs[name] = rng.choice([7, np.nan, 'x' * 60_000, [1.5, 2], h5py.Empty('f'), b'\xff\xfe',
                                                  ['$a$b$', '\x1b[2J'], [[1], [2]]])


def hdf5_heap(rng, path):
    """A few bytes of the texts that belong to attributes, the one part of the format without a checksum."""
    content = bytearray(path.read_bytes())
    places = [match.start() for match in re.finditer(b'GCOL', content)]
    if not places:
        raise ValueError('no texts')
    place = rng.choice(places) + 4
    for _ in range(rng.choice([1, 1, 3])):
        content[min(place + rng.randrange(140), len(content) - 1)] = rng.choice([0, 1, 15, 255, rng.randrange(256)])
    path.write_bytes(content)


HDF5 = [hdf5_heap, hdf5_type, hdf5_shape, hdf5_value, hdf5_value, hdf5_box, hdf5_link, hdf5_link, hdf5_bomb, hdf5_filter,
        hdf5_attributes]


def flipped_data(rng, path):
    """A byte of the stored image or mask data changes."""
    path = path.with_name(rng.choice(['images.h5', 'masks.h5']))
    with h5py.File(path) as file:
        dataset = file[path.stem].id
        chunk = dataset.get_chunk_info(rng.randrange(dataset.get_num_chunks()))
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + rng.randrange(chunk.size)] ^= rng.randrange(1, 256)
    path.write_bytes(content)


# ---- annotations and photographs


def xml_box(rng, path):
    values = ['nan', 'inf', '-inf', '1e400', '-5', '0', '40', '1_0', '٣', '', '9' * 5000, '<b/>']
    write_xml(path, [rng.choice(values) for _ in range(4)], [rng.choice(['80', '60', '0', '-1', 'nan', 'inf', '1e308'])] * 2)


def xml_bomb(rng, path):
    entities = ''.join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    doctype = rng.choice([f'<!DOCTYPE b [<!ENTITY a0 "boom">{entities}]>',
                          f'<!DOCTYPE b [<!ENTITY a11 "{"x" * 500_000}">]>',
                          '<!DOCTYPE b [<!ENTITY a11 SYSTEM "file:///etc/passwd">]>',
                          '<!DOCTYPE b SYSTEM "file:///dev/zero" [<!ENTITY a11 "">]>'])
    write_xml(path, (8, 6, 40, 30), before=doctype, inside='&a11;' * rng.choice([1, 1000]))


def xml_deep(rng, path):
    depth = rng.choice([10_000, 200_000])
    path.write_text('<a>' * depth + '</a>' * depth)


def xml_large(rng, path):
    write_xml(path, (8, 6, 40, 30), inside='x' * 3_000_000)


def png_chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png_bomb(rng, path):
    """A header of 30,000 x 30,000 pixels, or text that unpacks to a gigabyte; sound but for that."""
    side, text = rng.choice([(30_000, b''), (13_000, b''), (64, zlib.compress(bytes(10**9 >> 6)) * 1), (2**31 - 1, b'')])
    chunks = [png_chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0))]
    if text:
        chunks.append(png_chunk(b'zTXt', b'Comment\0\0' + text))
    chunks += [png_chunk(b'IDAT', zlib.compress(bytes(65 * 64))), png_chunk(b'IEND', b'')]
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(chunks))


def png_values(rng, path):
    shape = rng.choice([(60, 80), (1, 1), (60, 80, 3), (60, 80, 4), (2, 5000)])
    values = np.full(shape, rng.choice([0, 1, 4, 7, 255]), rng.choice(['uint8', 'uint16']))
    Image.fromarray(values.astype('uint8') if values.ndim == 3 else values).save(path, format='PNG')


def jpeg_kind(rng, path):
    """Another mode or format, without a file name that says so."""
    mode, form = rng.choice([('L', 'JPEG'), ('CMYK', 'JPEG'), ('RGBA', 'PNG'), ('P', 'GIF'), ('1', 'TIFF'), ('RGB', 'PPM'),
                             ('RGB', 'EPS'), ('RGB', 'ICO'), ('L', 'JPEG2000'), ('RGB', 'TGA'), ('F', 'TIFF')])
    Image.new(mode, rng.choice([(1, 1), (80, 60), (1, 9000), (9000, 1)])).save(path, format=form)


def list_line(rng, path):
    lines = path.read_text().splitlines()
    line = rng.choice(['', 'x', 'breed0_0 1', 'breed0_0 1 1 1 1', 'a\0b 1 1 1', '../../etc/passwd 1 1 1', '.. 1 1 1',
                       f'{"n" * 300} 1 1 1', 'breed0_1 99 1 1', 'breed0_1 1 7 1', 'breed0_1 ' + '9' * 5000 + ' 1 1',
                       'breed0_\x1b[2J 1 1 1', '\ufeffbreed0_77 1 1 1', 'breed1_1 2 2 1', 'breed0_1 １ １ １', 'x nan 1 1',
                       'other_4 1 1 1', 'breed0_\ud7ff 1 1 1', '/dev/zero 1 1 1', 'con 37 2 1'])
    lines[rng.randrange(1, len(lines)):][:0] = [line]
    lines.insert(rng.randrange(len(lines) + 1), line)
    path.write_text('\n'.join(lines), encoding='utf-8')


# ---- model files and checkpoints


class Evil:
    """Unpickled without care, it writes a file."""

    def __reduce__(self):
        return os.system, ('touch evil',)


def checkpoint_code(rng, path):
    """A pickle that runs code, alone or among the entries of a sound file, in either format of torch.save."""
    content = torch.load(path, weights_only=True)
    content[rng.choice(list(content))] = Evil()
    if rng.random() < 0.3:
        path.write_bytes(pickle.dumps(rng.choice([Evil(), content])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.7)


def checkpoint_entry(rng, path):
    """One entry, at any depth, is missing or of another type, shape or value; the file is sound."""
    content = place = torch.load(path, weights_only=True)
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = rng.choice(list(keys))
        if isinstance(place[key], (dict, list)) and len(place[key]) and rng.random() < 0.9:
            place = place[key]
        else:
            break
    if rng.random() < 0.15:
        del place[key]
    else:
        old = place[key]
        place[key] = rng.choice([
            None, 'text', -1, 10**12, float('nan'), [], {}, {'a': 1}, torch.zeros(2, 3), torch.zeros(1).expand(10**6, 10**6),
            torch.tensor(float('nan')), True, [old], torch.zeros(3, dtype=torch.complex64), torch.eye(3).to_sparse(),
            *([old.double(), old[..., None], torch.full_like(old, -1), torch.full_like(old, 2**60)] * 2
              if isinstance(old, torch.Tensor) else [])])
    torch.save(content, path)


def checkpoint_other(rng, path):
    """Another kind of PyTorch file."""
    content = torch.load(path, weights_only=True)
    torch.save(rng.choice([content.get('weights', content.get('model')), torch.nn.Linear(3, 3), [1, 2], torch.zeros(5), 'text',
                           {'format': content['format']}, {**content, 'format': 'another'}, {**content, 'format': [1]}]), path)


def checkpoint_bomb(rng, path):
    """Members that unpack to a gigabyte."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = rng.choice([name for name in members if 'data' in name])
    members[name] = members[name] + bytes(10**9)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


CHECKPOINT = [checkpoint_code, checkpoint_entry, checkpoint_entry, checkpoint_entry, checkpoint_other, checkpoint_bomb]


# ---- the formats: (originals, files to change, ways to change them, script and options)


def prepare_options(folder):
    return data_prepare.main, ['--source', 'oxford', '--root', 'photographs', '--size', '64', '--split', '60-20-20', '--out', 'out']


def photograph_options(folder):
    return mtl_vis.main, ['photographs/pet.png', 'photographs/cat.jpg', '--model', 'run/model.pt', '--save-masks', 'masks']


def model_options(folder):
    return mtl_vis.main, ['photographs/pet.png', '--model', 'run/model.pt']


def pets_options(folder):
    return mtl_vis.main, ['--data', 'data', '--model', 'run/model.pt', '--count', '2']


def train_options(folder):
    return train_mtl.main, ['--data', 'data', *QUICK, '--out', 'new', '--model', 'new.pt']


def resume_options(how):
    return lambda folder: (train_mtl.main, ['--data', 'data', *QUICK, '--out', 'run', '--model', 'new.pt', '--resume', *how])


def rechunk_options(*more):
    return lambda folder: (data_rechunk.main, ['--data', 'data', *more])


ANNOTATIONS = 'photographs/oxford-iiit-pet/annotations'
FORMATS = {
    'hdf5 of others': ('source', 'data/*/*.h5', ANY + HDF5 * 2, rechunk_options()),
    'hdf5 rechunked, train': ('plain', 'data/*/[imb]*.h5', ANY + HDF5 * 2, train_options),
    'hdf5 rechunked, draw': ('plain', 'data/test/[imb]*.h5', ANY + HDF5, pets_options),
    'hdf5 checksums, rechunk': ('checksums', 'data/*/images.h5', [flipped_data], rechunk_options('--force')),
    'xml': (None, f'{ANNOTATIONS}/xmls/*', ANY + [xml_box] * 6 + [xml_bomb] * 3 + [xml_deep, xml_large], prepare_options),
    'png': (None, f'{ANNOTATIONS}/trimaps/*', ANY + [png_bomb] * 3 + [png_values] * 4, prepare_options),
    'jpeg': (None, f'{ANNOTATIONS}/../images/*', ANY + [png_bomb] * 2 + [jpeg_kind] * 4, prepare_options),
    'list.txt': (None, f'{ANNOTATIONS}/list.txt', ANY + [list_line] * 10, prepare_options),
    'photographs': (None, 'photographs/*.*', ANY + [png_bomb, png_values, jpeg_kind], photograph_options),
    'model': (None, 'run/model.pt', ANY + CHECKPOINT * 3, model_options),
    'checkpoint': ('plain', 'run/last.pt', ANY + CHECKPOINT * 3, resume_options(())),
    'checkpoint, auto': ('plain', 'run/last.pt', ANY + CHECKPOINT, resume_options(('auto',))),
}


# ---- a mutant


def contents(folder):
    """{path: bytes} of the regular files under `folder`."""
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and not path.is_symlink()}


def run_in_child(main, options, folder, log, seconds):
    """(how it ended, seconds, megabytes, standard error) of a script in a process of its own."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        try:
            os.setsid()
            os.chdir(folder)
            output = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            data_rechunk.run_script(lambda: main(options))
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    ended = None
    while ended is None:
        done, status, usage = os.wait4(child, os.WNOHANG)
        spent = time.monotonic() - start
        if done:
            code = os.waitstatus_to_exitcode(status)
            ended = f'exit {code}' if code >= 0 else f'signal {-code}'
        elif spent > seconds:
            os.killpg(child, signal.SIGKILL)
            os.wait4(child, 0)
            ended = 'hang'
        else:
            time.sleep(0.002)
    return ended, spent, usage.ru_maxrss / 1024, log.read_text(errors='replace')


def make_mutant(rng, name, originals, folder):
    """Fill `folder` with sound files, one of which is then changed; returns what was done, in words."""
    data, pattern, changes, _ = FORMATS[name]
    while True:
        for part in ('photographs', 'run'):
            shutil.copytree(originals / part, folder / part)
        if data:
            shutil.copytree(originals / data, folder / 'data')
        change = rng.choice(changes)
        path = rng.choice(sorted(folder.glob(pattern)))
        try:
            change(rng, path)
            return f'{name}, {change.__name__}, {path.relative_to(folder)}'
        except (ValueError, TypeError, OSError, KeyError, RuntimeError):  # no such change to this kind of file
            shutil.rmtree(folder)


def complaint(name, ended, megabytes, printed, before, folder, options):
    """What is wrong with the end of a mutant, None if nothing is."""
    lines = [line for line in printed.splitlines() if line.strip()]
    if ended not in ('exit 0', 'exit 1'):
        return ended
    if 'Traceback' in printed:
        return 'a traceback'
    if ended == 'exit 1' and (not lines or not lines[-1].startswith('error: ') or len(lines[-1]) > 3000):
        return 'no line that begins with error:'
    if megabytes > options.megabytes:
        return f'{megabytes:.0f} MB of memory'
    if list(folder.rglob('*.part')):
        return 'an unfinished file left behind'
    if list(folder.rglob('evil')):
        return 'its code was run'
    if 'checksums' in name and ended == 'exit 0':
        return 'changed data went unnoticed'
    if ended == 'exit 1':
        after = contents(folder)
        changed = [str(path.relative_to(folder)) for path, content in before.items() if after.get(path) != content]
        # Those that came before the bad one have been rechunked.
        lost = [path for path in changed if not name.startswith('hdf5') or not is_rechunked(folder / path)]
        if lost:
            return f'refused, and {lost[0]} is not what it was'
    return None


def is_rechunked(path):
    with h5py.File(path) as file:
        return data_rechunk.is_rechunked(file, path.stem)


def main():
    parser = common.parser(__doc__)
    parser.add_argument('--count', type=whole_number(1), default=600, help='mutants (default: %(default)s)')
    parser.add_argument('--seed', type=whole_number(0), default=0, help='default: %(default)s')
    parser.add_argument('--only', choices=FORMATS, help='one format (default: all in turn)')
    parser.add_argument('--seconds', type=whole_number(1), default=100, help='for a mutant (default: %(default)s)')
    parser.add_argument('--megabytes', type=whole_number(1), default=1500,
                        help='of memory for a mutant, 400 of them the interpreter and torch (default: %(default)s)')
    parser.add_argument('--verbose', action='store_true', help='print the last line of each mutant')
    parser.add_argument('--keep', metavar='DIR', help='keep the folders of mutants that did not end well')
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no other threads
    names = [args.only] if args.only else list(FORMATS)
    ends, bad, slowest, largest = Counter(), [], 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        originals, log = scratch / 'originals', scratch / 'log.txt'
        make_originals(originals)
        for number in range(args.count):
            rng = random.Random(f'{args.seed} {number}')
            name = names[number % len(names)]
            folder = scratch / 'mutant'
            what = f'{number}: {make_mutant(rng, name, originals, folder)}'
            before = contents(folder)
            ended, spent, megabytes, printed = run_in_child(*FORMATS[name][-1](folder), folder, log, args.seconds)
            wrong = complaint(name, ended, megabytes, printed, before, folder, args)
            ends[name, 'result' if ended == 'exit 0' else 'error' if ended == 'exit 1' else ended] += 1
            slowest, largest = max(slowest, spent), max(largest, megabytes)
            if args.verbose:
                print(f'{what}: {ended}, {spent:.1f} s, {megabytes:.0f} MB\n    {"".join(printed.splitlines(True)[-1:])}', flush=True)
            if wrong:
                bad.append(f'{what}: {wrong}')
                print(f'{bad[-1]}\n    {"".join(printed.splitlines(True)[-3:])}', flush=True)
                if args.keep:
                    shutil.copytree(folder, Path(args.keep) / str(number), symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(folder)
    for name in names:
        print(f'{name}: ' + ', '.join(f'{count} {end}' for (other, end), count in sorted(ends.items()) if other == name))
    print(f'{args.count} mutants, seed {args.seed}: {len(bad)} did not end well; slowest {slowest:.1f} s, '
          f'most memory {largest:.0f} MB')
    figures = {'mutants': args.count, 'seed': args.seed, 'bad': bad, 'slowest_seconds': slowest, 'megabytes': largest,
               'ends': {name: {end: count for (other, end), count in ends.items() if other == name} for name in names}}
    common.finish(1 - len(bad) / args.count, figures, args.json)


if __name__ == '__main__':
    data_rechunk.run_script(main)
