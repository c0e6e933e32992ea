"""One image, one chunk: what comes out, and that nothing is lost on the way."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import assert_full_disk_leaves_files, damage_sample, read_h5

import data_rechunk
from data_rechunk import main, rechunk_file
from support.cli import InputError
from support.hdf5 import read_text


@pytest.fixture
def train_files(original_files):
    """`original_files` of one split."""

    def make(**options):
        root = original_files(**options)
        shutil.rmtree(root / 'val')
        shutil.rmtree(root / 'test')
        return root

    return make


@pytest.fixture
def small_slabs(monkeypatch):
    """A few images or masks in a slab."""
    monkeypatch.setattr(data_rechunk, 'LARGEST_SLAB_BYTES', 3 * 48 * 40 * 3)


def write(path, values, **layout):
    with h5py.File(path, 'w') as file:
        file.create_dataset(path.stem, data=values, **layout)
    return path


def read(path, key=None):
    return read_h5(path, key or f'chunked_{path.stem}')


def images(count=20, size=(48, 40), dtype='uint8', seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(dtype)


@pytest.mark.parametrize(
    'layout, dtype',
    [
        ({}, 'uint8'),
        ({'chunks': (7, 16, 16, 1), 'compression': 'gzip'}, 'float32'),
        ({'chunks': (20, 48, 40, 3)}, 'uint8'),
    ],
    ids=['contiguous', 'parts of images', 'more images than a slab'],
)
def test_any_layout_and_type_becomes_one_uint8_sample_a_chunk(tmp_path, small_slabs, layout, dtype):
    values = images(dtype=dtype)
    path = write(tmp_path / 'images.h5', values, **layout)
    before = path.stat().st_size
    assert rechunk_file(path) == 20
    np.testing.assert_array_equal(read(path), values)
    with h5py.File(path) as file:
        assert sorted(file) == ['chunked_images', 'images'] and file['images'] == file['chunked_images']
        assert file['images'].chunks == (1, 48, 40, 3) and file['images'].dtype == 'uint8'
    assert path.stat().st_size < 1.2 * before  # two names, stored once


def assert_refused(path, message):
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        rechunk_file(path)
    assert path.read_bytes() == before and set(os.listdir(path.parent)) <= {path.name, '.lock'}


@pytest.mark.parametrize('dtype, value', [('f4', np.nan), ('f4', 256), ('i2', -1)])
def test_a_value_that_images_do_not_have_is_refused(tmp_path, small_slabs, dtype, value):
    values = images(dtype=dtype)
    values[13, 3, 2, 0] = value
    path = write(tmp_path / 'images.h5', values)
    assert_refused(path, f'images.h5: sample 13 holds {value:g}; images are expected as 0 to 255')


@pytest.mark.parametrize('dtype, value', [('u1', 7), ('f4', 0.5), ('i2', 256)])  # 256 is 0 in 8 bits
def test_a_value_that_masks_do_not_have_is_refused(tmp_path, small_slabs, dtype, value):
    values = np.eye(48, 40, dtype=dtype)[None, ..., None].repeat(20, axis=0)
    values[13, 3, 2, 0] = value
    path = write(tmp_path / 'masks.h5', values)
    assert_refused(path, f'masks.h5: sample 13 holds {value:g}; a mask holds 0, 1 and 255 for unknown')


def test_images_without_a_value_above_one_are_refused_and_black_ones_are_not(tmp_path, small_slabs):
    values = images()
    path = write(tmp_path / 'images.h5', values.astype('float32') / 255)
    assert_refused(path, 'images.h5: no value is above 1; images are expected as 0 to 255')
    values[:19] = 0
    write(path, values)
    assert rechunk_file(path) == 20
    np.testing.assert_array_equal(read(path), values)


def masks(dtype='uint8'):
    """20 masks: 3, 11 and 12 are unknown, 5 is background, 7 partly unknown."""
    values = np.random.default_rng(0).integers(0, 2, (20, 48, 40, 1))
    values[[3, 11, 12]], values[5], values[7, :9] = 255, 0, 255
    return values.astype(dtype)


@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_masks_become_uint8_and_the_known_ones_are_recorded(tmp_path, small_slabs, dtype):
    path = write(tmp_path / 'masks.h5', masks(dtype))
    rechunk_file(path)
    assert read(path).dtype == 'uint8'
    np.testing.assert_array_equal(read(path), masks())
    assert np.flatnonzero(read(path, 'known_masks') == 0).tolist() == [3, 11, 12]
    assert rechunk_file(path) is None


def test_masks_of_0_and_255_are_refused(tmp_path, small_slabs):
    values = np.zeros((20, 48, 40, 1), 'uint8')
    values[0], values[13, 5:] = 255, 255  # most slabs hold only one of the two
    path = write(tmp_path / 'masks.h5', values)
    assert_refused(path, 'masks.h5: holds 0 and 255 but no 1; 255 means unknown, the pet is 1')


@pytest.mark.parametrize('record', [None, np.ones(19, 'uint8')], ids=['none', 'short'])
def test_masks_without_a_sound_record_are_rechunked_again(tmp_path, record):
    path = write(tmp_path / 'masks.h5', masks())
    rechunk_file(path)
    with h5py.File(path, 'r+', libver='v110') as file:
        del file['known_masks']
        if record is not None:
            file['known_masks'] = record
    assert rechunk_file(path) == 20 and rechunk_file(path) is None
    assert np.flatnonzero(read(path, 'known_masks') == 0).tolist() == [3, 11, 12]


def test_a_damaged_record_is_noticed_and_force_records_the_known_masks_anew(tmp_path):
    path = write(tmp_path / 'masks.h5', masks())
    rechunk_file(path)
    with h5py.File(path, 'r+') as file:
        file['masks'][11] = 1
        file['known_masks'].id.write_direct_chunk((0,), b'1' * 24)  # 20 values and another checksum
    assert_refused(path, 'masks.h5: not a valid HDF5 file')
    rechunk_file(path, force=True)
    assert np.flatnonzero(read(path, 'known_masks') == 0).tolist() == [3, 12]


def test_a_label_table_becomes_one_chunk_and_what_else_its_file_holds_goes_along(tmp_path):
    values = np.arange(400.0).reshape(100, 4)
    values[7] = np.nan
    path = write(tmp_path / 'bboxes.h5', values, chunks=(1, 4))
    with h5py.File(path, 'a') as file:
        file['bboxes'].attrs['names'], file.attrs['author'] = ['a', 'caf\xe9'], 'somebody'
        file['notes'], file['known_masks'] = [1, 2, 3], [4, 5]
        file['away'], file['nowhere'] = h5py.ExternalLink('/etc/hostname', '/x'), h5py.SoftLink('/y')
    rechunk_file(path)
    np.testing.assert_array_equal(read(path), values)
    with h5py.File(path) as file:
        table = file['chunked_bboxes']
        assert table.chunks == (100, 4) and table.dtype == 'float64'
        assert read_text(table.attrs, 'names') == ['a', 'caf\xe9'] and read_text(file.attrs, 'author') == 'somebody'
        assert table.attrs.get_id('names').dtype.kind == 'S'  # of fixed length, see hdf5.py
        assert file['notes'][()].tolist() == [1, 2, 3] and file['known_masks'][()].tolist() == [4, 5]
        # Links are not followed.
        assert file.get('away', getlink=True).filename == '/etc/hostname'
        assert file.get('nowhere', getlink=True).path == '/y'


def test_separate_chunked_copy_is_replaced_by_a_second_name(tmp_path):
    path = write(tmp_path / 'images.h5', images(50))
    with h5py.File(path, 'a') as file:
        file.create_dataset('chunked_images', data=images(50), chunks=(1, 48, 40, 3))
    before = path.stat().st_size
    rechunk_file(path)
    assert path.stat().st_size < 0.6 * before
    np.testing.assert_array_equal(read(path), images(50))


def test_a_second_run_changes_nothing_and_says_so(train_files, capsys):
    root = train_files()
    main(['--data', str(root)])
    first = {path: path.stat().st_mtime_ns for path in root.rglob('*.h5')}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and '12 samples' in lines[0] and 'MB -> ' in lines[0]
    main(['--data', str(root)])
    assert first == {path: path.stat().st_mtime_ns for path in root.rglob('*.h5')}
    assert capsys.readouterr().out.count('already rechunked') == 4
    main(['--data', str(root), '--force'])
    assert all(path.stat().st_mtime_ns > time for path, time in first.items())


# ---- nothing is lost


def test_source_is_kept_if_the_read_back_comparison_fails(tmp_path, monkeypatch):
    path = write(tmp_path / 'images.h5', images())
    monkeypatch.setattr(data_rechunk, 'same_bytes', lambda *_: False)
    assert_refused(path, 'left as it was')


@pytest.mark.parametrize('limit', [0, 140_000])
def test_full_disk_leaves_the_source(train_files, own_processes, limit):
    root = train_files(chunks=True, compression='gzip')
    assert_full_disk_leaves_files(main, ['--data', root], root, limit)


@pytest.mark.slow
def test_failed_write_at_any_size_leaves_the_source(train_files, own_processes):
    """HDF5 crashes when a write fails while it closes a file with a chunk cache."""
    root = train_files(count=6)
    for limit in range(0, 6 * 64 * 64 * 3, 500):
        assert_full_disk_leaves_files(main, ['--data', root], root, limit)


# ---- damaged and hostile files


def store(**values):
    """A function that stores values or links in a file."""
    return lambda file: file.update(values)


def raw(file):
    file.create_dataset('images', (20, 48, 40, 3), 'uint8', external=[('/etc/passwd', 0, h5py.h5f.UNLIMITED)])


def many(file):
    dataset = file.create_dataset('images', (10**9, 8, 8, 3), 'uint8', chunks=(1, 8, 8, 3), maxshape=(None, 8, 8, 3))
    dataset[0] = 1


def unknown_filter(file):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1, 8, 8, 3))
    plist.set_filter(32_100, h5py.h5z.FLAG_OPTIONAL)
    h5py.h5d.create(file.id, b'images', h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((9, 8, 8, 3)), plist)


@pytest.mark.parametrize(
    'fill, message',
    [
        (store(images=np.zeros((5, 8, 8, 4))), 'expected numbers of shape .N, H, W, 3.'),
        (store(images=np.full((5, 8, 8, 3), b'x')), 'expected numbers'),
        (store(images=np.zeros((0, 8, 8, 3))), 'holds no samples'),
        (store(pictures=images(2)), "no dataset 'images' of its own .links do not count.; it holds .'pictures'."),
        (store(images=h5py.ExternalLink('../images.h5', 'images')), "no dataset 'images' of its own"),
        (raw, 'takes its values from other files'),
        (many, 'has 1000000000 samples in a file of [0-9]* bytes'),
        (unknown_filter, 'needs the HDF5 filter 32100'),
    ],
    ids=['shape', 'type', 'empty', 'name', 'link', 'raw', 'many', 'filter'],
)
def test_what_is_no_dataset_of_images_of_its_own_is_refused(tmp_path, fill, message):
    write(tmp_path / 'images.h5', images())
    path = tmp_path / 'train' / 'images.h5'
    path.parent.mkdir()
    with h5py.File(path, 'w') as file:
        fill(file)
    assert_refused(path, f'{path}: .*{message}')


@pytest.mark.parametrize(
    'damage',
    [lambda content: b'', lambda content: content[:-100], lambda content: content.replace(b'SNOD', b'????', 1)],
    ids=['empty', 'cut', 'changed'],
)
def test_a_damaged_file_is_named_and_kept(tmp_path, damage):
    path = write(tmp_path / 'images.h5', images())
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(path, f'{path}: not a valid HDF5 file')


def test_a_missing_file_or_folder_is_named(original_files, tmp_path, error_line):
    root = original_files()
    (root / 'val' / 'masks.h5').unlink()
    assert 'val/masks.h5: no such file' in error_line(main, '--data', root)
    assert 'no folder train, val or test' in error_line(main, '--data', tmp_path)


@contextmanager
def open_elsewhere(path, mode):
    """Another process has the file open, because HDF5 does not lock out its own."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        with h5py.File(path, mode):
            os.write(write_end, b'x')
            signal.pause()
    os.read(read_end, 1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_that_is_written_to_is_refused_and_one_that_is_read_can_be_rechunked(tmp_path):
    path = write(tmp_path / 'images.h5', images())
    with open_elsewhere(path, 'r+'):
        assert_refused(path, 'images.h5: another program has it open for writing; close it there')
    with open_elsewhere(path, 'r'):
        assert rechunk_file(path) == 20
    np.testing.assert_array_equal(read(path), images())


def test_files_are_rechunked_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "(unable to lock file, errno = 37, error message = 'No locks available')")

    def open_file(path, mode='r', locking=True, open_file=h5py.File, **options):
        if locking and isinstance(path, Path):
            no_locks()
        return open_file(path, mode, locking=locking, **options)

    def create_file(path, flags, creation, access, create_file=h5py.h5f.create):
        if access.get_file_locking()[0]:
            no_locks()
        return create_file(path, flags, creation, access)

    path = write(tmp_path / 'images.h5', images())
    monkeypatch.setattr(h5py, 'File', open_file)
    monkeypatch.setattr(h5py.h5f, 'create', create_file)
    monkeypatch.setattr('support.files.fcntl.lockf', no_locks)
    assert rechunk_file(path) == 20 and rechunk_file(path) is None


def test_same_bytes_detects_any_changed_byte():
    one = np.array([np.nan, 0, 1], np.float32)
    assert data_rechunk.same_bytes(one, one.copy())
    for position in range(one.nbytes):
        other = one.copy()
        other.view(np.uint8)[position] ^= 1
        assert not data_rechunk.same_bytes(one, other)


def test_file_without_checksums_is_rechunked_when_they_are_asked_for(tmp_path):
    path = write(tmp_path / 'images.h5', images(5))
    assert [rechunk_file(path, checksums=checksums) for checksums in (False, True, True, False)] == [5, 5, None, None]
    with h5py.File(path) as file:
        assert file['images'].fletcher32
    damage_sample(path, 2)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file['images'][1], images(5)[1])
        with pytest.raises(OSError):
            file['images'][2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_is_bounded_whatever_the_number_of_samples(tmp_path):
    def peak(code):
        # Not ru_maxrss, which a child inherits from the process that started it.
        code += '; print([line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line][0])'
        run = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)
        return int(run.stdout) / 1024

    path, layout = tmp_path / 'images.h5', {'chunks': (100, 64, 64, 1), 'compression': 'gzip', 'compression_opts': 1}
    with h5py.File(path, 'w') as file:  # 600 MB as float32
        dataset = file.create_dataset('images', (800, 256, 256, 3), 'float32', **layout)
        for start in range(0, 800, 100):
            dataset[start : start + 100] = np.full((100, 256, 256, 3), 7, 'float32')
    here = 'data_rechunk.in_own_process = lambda s, f, *a: f(*a)'  # on Linux, a child would read the file
    used = peak(f'import data_rechunk; {here}; data_rechunk.rechunk_file({str(path)!r})')
    assert 20 < used - peak('pass') < 400
