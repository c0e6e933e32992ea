"""Damaged and hostile files end in a result or in one line of error, whatever the format.

pytest -m slow tests/test_fuzz.py --files 600 --seed 0
pytest -m slow 'tests/test_fuzz.py::test_damaged_file_gives_a_result_or_one_line[123]' --files 600  # one of them
"""

import os
import random
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import run_in_child, write_oxford
from PIL import Image

import data_prepare
import data_rechunk
import mtl_vis
import train_mtl
from support.hdf5 import copy_attributes, has_metadata_checksums, is_rechunked, target_chunks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('own_processes')]


# ---- sound files


@pytest.fixture(scope='module')
def sound(shared_data, tmp_path_factory):
    """A folder with a sub-folder for each kind of sound file."""
    root = tmp_path_factory.mktemp('sound')
    shutil.copytree(shared_data, root / 'rechunked' / 'data')
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    write_oxford(root / 'images', 10, masks=range(10), boxes=range(10), exif=exif)
    log = root / 'log.txt'
    assert run_in_child(train_mtl.main, TRAIN, log, lambda: os.chdir(root / 'rechunked')) == 0, log.read_text()
    shutil.move(root / 'rechunked' / 'new', root / 'run' / 'new')
    return root


# ---- changes of a file: functions of (rng, path)


def cut(rng, path):
    """The end is missing, or a piece before it."""
    content = path.read_bytes()
    start = rng.randrange(len(content))
    path.write_bytes(content[:start] + content[start + rng.choice([1, 7, 500, len(content)]) :])


def flip_bits(rng, path):
    """A few bits, more often than not near the start, where formats describe themselves."""
    content = bytearray(path.read_bytes())
    end = min(rng.choice([64, 1024, 4096, len(content)]), len(content))
    for _ in range(rng.choice([1, 1, 3, 20])):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def overwrite(rng, path):
    """A stretch of random, zero or 255 bytes."""
    content = bytearray(path.read_bytes())
    start, length = rng.randrange(len(content)), rng.choice([1, 8, 100, 4096])
    content[start : start + length] = rng.choice([rng.randbytes(length), bytes(length), b'\xff' * length])
    path.write_bytes(content)


def rewrite_h5(path, change):
    """Write an HDF5 file again with `change(values)`, under each name that its dataset has; the rest as it is."""
    with h5py.File(path) as old:
        values, libver = change(old[path.stem][()]), 'v110' if has_metadata_checksums(old) else 'earliest'
        with h5py.File(path.with_suffix('.new'), 'w', libver=libver) as new:
            chunks = target_chunks(values) if values.ndim and values.size else None
            dataset = new.create_dataset(path.stem, data=values, chunks=chunks)
            copy_attributes(old[path.stem], dataset)
            if f'chunked_{path.stem}' in old:
                new[f'chunked_{path.stem}'] = dataset
            for name in old:  # known_masks, which need not fit the masks any more
                if name not in new:
                    old.copy(name, new)
    os.replace(path.with_suffix('.new'), path)


def h5_type(rng, path):
    kind = rng.choice(['S3', 'float64', 'int64', 'complex64', '>u2', 'bool', 'float16'])
    rewrite_h5(path, lambda values: values.astype(kind))


def h5_shape(rng, path):
    index = rng.choice([np.s_[..., None], 0, np.s_[:0], np.s_[:, :1], np.s_[:-1], [0, 0, 1, 2], (0, 0)])
    rewrite_h5(path, lambda values: np.asarray(values[index]))


def h5_value(rng, path):
    value, place = rng.choice([np.nan, np.inf, -np.inf, -1, 7, 1e30, 256, 0.5]), rng.random()

    def change(values):
        values = values.astype('float64')
        values.flat[int(place * values.size)] = value
        return values

    rewrite_h5(path, change)


def h5_huge(rng, path):
    """More samples or larger ones than anyone has, of which next to nothing is stored."""
    shape = rng.choice([(10**9, 64, 64, 3), (6, 60_000, 60_000, 3), (10**9, 4), (10**6, 64, 64, 1)])
    with h5py.File(path, 'w', libver='v110') as file:
        chunks = (1, *(min(side, 4096) for side in shape[1:]))
        # With a maxshape, its index grows with what is stored.
        dataset = file.create_dataset(path.stem, shape, 'uint8', chunks=chunks, maxshape=(None, *shape[1:]))
        dataset[0, 0] = 1
        file[f'chunked_{path.stem}'] = dataset


def wrong_entry(rng, path):
    """An entry of a model file, at any depth, is missing or of another type, shape or value."""
    content = place = torch.load(path, weights_only=True)
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        old = place[key]
        if not isinstance(old, (dict, list)) or not old or rng.random() < 0.1:
            break
        place = old
    values = [None, 'text', -1, 10**12, float('nan'), [], {'a': 1}, True, [old], torch.zeros(2, 3)]
    values += [torch.zeros(1).expand(10**6, 10**6), torch.zeros(3, dtype=torch.complex64), torch.eye(3).to_sparse()]
    if isinstance(old, torch.Tensor):
        values += [old.double(), old[..., None], torch.full_like(old, -1), torch.full_like(old, 2**60)] * 2
    if rng.random() < 0.15:
        del place[key]
    else:
        place[key] = rng.choice(values)
    torch.save(content, path)


# ---- the formats


BYTES = [cut, flip_bits, overwrite]
LAYOUTS = {}, {'chunks': (4, 16, 16, 1), 'compression': 'gzip'}, {'chunks': (2, 32, 64, 1), 'fletcher32': True}
H5 = [h5_type, h5_shape, h5_value, h5_huge]
PREPARE = '--source oxford --root . --size 64 --split 60-20-20 --out out'.split()
RECHUNK = '--data data --force'.split()
TRAIN = '--data data --epochs 2 --batch-size 12 --device cpu --out new --model new.pt'.split()
DRAW = '--data data --model new/best.pt --count 2'.split()
LOOK = ['oxford-iiit-pet/annotations/trimaps/breed0_0.png', 'oxford-iiit-pet/images/breed0_0.jpg', *DRAW[2:4]]

# {name: (folders of `sound` that the script runs on, files of which one is changed, changes, script, its arguments)}
FORMATS = {
    'HDF5 of others': ([], 'data/*/*.h5', BYTES + H5, data_rechunk.main, RECHUNK),
    'HDF5, trained on': (['rechunked'], 'data/*/[imb]*.h5', BYTES + H5, train_mtl.main, TRAIN),
    'HDF5, drawn': (['rechunked', 'run'], 'data/test/[imb]*.h5', BYTES + H5, mtl_vis.main, DRAW),
    'list.txt': (['images'], 'oxford-iiit-pet/annotations/list.txt', BYTES, data_prepare.main, PREPARE),
    'XML': (['images'], 'oxford-iiit-pet/annotations/xmls/*', BYTES, data_prepare.main, PREPARE),
    'PNG': (['images'], 'oxford-iiit-pet/annotations/trimaps/*', BYTES, data_prepare.main, PREPARE),
    'JPEG': (['images'], 'oxford-iiit-pet/images/*', BYTES, data_prepare.main, PREPARE),
    'photographs': (['images', 'run'], 'oxford-iiit-pet/**/breed0_0.[jp]*g', BYTES, mtl_vis.main, LOOK),
    'model file': (['images', 'run'], 'new/best.pt', [*BYTES, *[wrong_entry] * 4], mtl_vis.main, LOOK),
    'last.pt': (['rechunked', 'run'], 'new/last.pt', BYTES, train_mtl.main, [*TRAIN, '--resume']),
}


# ---- the test


def pytest_generate_tests(metafunc):
    if 'number' in metafunc.fixturenames:
        metafunc.parametrize('number', range(metafunc.config.getoption('--files')))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def was_rechunked(path):
    with h5py.File(path) as file:
        return is_rechunked(file, path.stem)


def test_damaged_file_gives_a_result_or_one_line(number, sound, original_files, tmp_path, pytestconfig):
    seed = pytestconfig.getoption('--seed')
    rng = random.Random(f'{seed} {number}')
    name = list(FORMATS)[number % len(FORMATS)]
    folders, files, changes, main, arguments = FORMATS[name]
    work, log = tmp_path / 'work', tmp_path / 'log.txt'
    for folder in folders:
        shutil.copytree(sound / folder, work, dirs_exist_ok=True)
    if name == 'HDF5 of others':
        original_files(work / 'data', count=6, **rng.choice(LAYOUTS))
    change, path = rng.choice(changes), rng.choice(sorted(work.glob(files)))
    change(rng, path)
    before = contents(work)

    status = run_in_child(main, arguments, log, lambda: os.chdir(work))
    printed = log.read_text(errors='replace')
    what = f'seed {seed}, number {number}, {name}, {change.__name__} of {path.relative_to(work)}: '
    what += f'exit status {status}, printed:\n{printed[-3000:]}'
    assert status in (0, 1), what
    assert status == 0 or printed.splitlines()[-1].startswith('error: '), what
    assert 'Traceback' not in printed, what
    assert not list(work.rglob('*.part')), f'left behind, {what}'
    if status == 1:
        changed = [path for path, content in before.items() if not path.exists() or path.read_bytes() != content]
        # The files before the refused one have been rechunked.
        lost = [path for path in changed if main is not data_rechunk.main or not was_rechunked(path)]
        assert not lost, f'{lost[0].relative_to(work)} is not what it was, {what}'
    shutil.rmtree(work)
