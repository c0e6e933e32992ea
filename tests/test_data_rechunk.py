"""One image, one chunk: what comes out, and that nothing is lost on the way."""

import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

import data_rechunk
from data_rechunk import main, rechunk_file


def write(path, values, **layout):
    with h5py.File(path, 'w') as file:
        file.create_dataset(path.stem, data=values, **layout)
    return path


def read(path, key=None):
    with h5py.File(path) as file:
        return file[key or f'chunked_{path.stem}'][()]


def images(count=20, size=(48, 40), dtype='uint8', seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(dtype)


@pytest.mark.parametrize('layout', [
    {}, {'chunks': True}, {'chunks': (7, 16, 16, 1), 'compression': 'gzip'}, {'chunks': (20, 48, 40, 3)},
    {'chunks': (1, 48, 40, 3)}, {'chunks': (3, 5, 7, 2), 'compression': 'lzf', 'shuffle': True},
])
@pytest.mark.parametrize('dtype', ['uint8', 'float32', '>f8', 'int64'])
def test_any_layout_and_type_becomes_one_uint8_sample_a_chunk(tmp_path, layout, dtype):
    values = images(dtype=dtype)
    path = write(tmp_path / 'images.h5', values, **layout)
    assert rechunk_file(path) == 20
    np.testing.assert_array_equal(read(path), values)
    with h5py.File(path) as file:
        assert file['chunked_images'].chunks == (1, 48, 40, 3)
        assert file['chunked_images'].dtype == 'uint8'


@pytest.mark.parametrize('chunks', [(64, 8, 8, 1), (64, 48, 40, 3), (50, 3, 40, 2), (64, 1, 1, 1)])
@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_chunks_that_span_more_images_than_memory_may_hold(tmp_path, monkeypatch, chunks, dtype):
    monkeypatch.setattr(data_rechunk, 'SLAB_BYTES', 3 * 48 * 40 * 3)
    values = images(64, dtype=dtype)
    path = write(tmp_path / 'images.h5', values, chunks=chunks)
    rechunk_file(path)
    np.testing.assert_array_equal(read(path), values)
    assert os.listdir(tmp_path) == ['images.h5']


def test_every_source_chunk_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data_rechunk, 'SLAB_BYTES', 10 * 48 * 40 * 3)
    path = write(tmp_path / 'images.h5', images(32), chunks=(16, 16, 20, 1))
    seen = np.zeros((2, 3, 2, 3), int)

    class Spy:
        """The dataset as `source_slabs` sees it, with a count for each chunk that is touched."""
        def __init__(self, dataset):
            self.dataset = dataset
            self.shape, self.chunks, self.dtype = dataset.shape, dataset.chunks, dataset.dtype

        def __getitem__(self, box):
            seen[tuple(slice(s.start // c, -(-s.stop // c)) for s, c in zip(box, self.chunks))] += 1
            return self.dataset[box]

    with h5py.File(path) as file:
        slabs = list(data_rechunk.source_slabs(Spy(file['images']), np.dtype('uint8'), tmp_path))
    np.testing.assert_array_equal(np.concatenate(slabs), images(32))
    assert (seen == 1).all()


@pytest.mark.parametrize('odd', [0.5, 256, -1, np.nan])
def test_float_images_that_uint8_cannot_hold_keep_their_type(tmp_path, odd):
    values = images(dtype='float32')
    values[-1, -1, -1, -1] = odd
    path = write(tmp_path / 'images.h5', values)
    rechunk_file(path)
    assert read(path).dtype == 'float32'
    np.testing.assert_array_equal(read(path), values)


def test_both_names_are_the_same_data_and_the_file_does_not_double(tmp_path):
    path = write(tmp_path / 'images.h5', images(200))
    before = path.stat().st_size
    rechunk_file(path)
    with h5py.File(path) as file:
        assert sorted(file) == ['chunked_images', 'images']
        assert file['images'] == file['chunked_images']
    assert path.stat().st_size < 1.05 * before


def test_label_tables_become_one_chunk(tmp_path):
    path = write(tmp_path / 'bboxes.h5', np.arange(400.).reshape(100, 4), chunks=(1, 4))
    rechunk_file(path)
    with h5py.File(path) as file:
        assert file['chunked_bboxes'].chunks == (100, 4)
        assert file['chunked_bboxes'].dtype == 'float64'
    np.testing.assert_array_equal(read(path), np.arange(400.).reshape(100, 4))


def test_attributes_and_other_datasets_go_along(tmp_path):
    path = write(tmp_path / 'breeds.h5', np.zeros((5, 1), 'int16'))
    with h5py.File(path, 'a') as file:
        file['breeds'].attrs['class_names'] = ['a', 'b']
        file['notes'] = [1, 2, 3]
    rechunk_file(path)
    with h5py.File(path) as file:
        assert list(file['chunked_breeds'].attrs['class_names']) == ['a', 'b']
        assert file['notes'][()].tolist() == [1, 2, 3]


def test_a_file_of_the_originals_rechunking_loses_its_second_copy(tmp_path):
    path = write(tmp_path / 'images.h5', images(50))
    with h5py.File(path, 'a') as file:
        file.create_dataset('chunked_images', data=images(50), chunks=(1, 48, 40, 3))
    before = path.stat().st_size
    rechunk_file(path)
    assert path.stat().st_size < 0.6 * before
    np.testing.assert_array_equal(read(path), images(50))


def test_a_second_run_changes_nothing_and_says_so(coursework, capsys):
    root = coursework(chunks=True, compression='gzip')
    main(['--data', str(root)])
    first = {path: path.stat().st_mtime_ns for path in root.rglob('*.h5')}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and '12 samples' in lines[0] and 'MB -> ' in lines[0]
    main(['--data', str(root)])
    assert first == {path: path.stat().st_mtime_ns for path in root.rglob('*.h5')}
    assert capsys.readouterr().out.count('already rechunked') == 12
    main(['--data', str(root), '--force'])
    assert all(path.stat().st_mtime_ns > time for path, time in first.items())


def test_what_cannot_be_read_back_does_not_replace_the_source(tmp_path, monkeypatch, fails):
    path = write(tmp_path / 'images.h5', images())
    before = path.read_bytes()
    monkeypatch.setattr(data_rechunk, 'same_bytes', lambda *_: False)
    with pytest.raises(data_rechunk.InputError, match='left as it was'):
        rechunk_file(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['images.h5']


@pytest.mark.parametrize('count', [3, 8, 29])
def test_every_byte_is_compared(count):
    one = np.arange(count, dtype=np.float32)
    one[1] = np.nan
    assert data_rechunk.same_bytes(one, one.copy())
    for position in range(count * 4):
        other = one.copy()
        other.view(np.uint8)[position] ^= 1
        assert not data_rechunk.same_bytes(one, other)


def test_checksums_find_a_flipped_bit_that_goes_unnoticed_without(tmp_path):
    for checksums in False, True:
        path = tmp_path / 'images.h5'
        images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
        with h5py.File(path, 'w') as file:
            file['images'] = images
        data_rechunk.rechunk_file(path)  # already done without them is not done with them
        data_rechunk.rechunk_file(path, checksums=checksums)
        with h5py.File(path) as file:
            offset = file['images'].id.get_chunk_info(2).byte_offset
        content = bytearray(path.read_bytes())
        content[offset + 77] ^= 1
        path.write_bytes(content)
        with h5py.File(path) as file:
            np.testing.assert_array_equal(file['images'][1], images[1])
            if checksums:
                with pytest.raises(OSError):
                    file['images'][2]
            else:
                file['images'][2]


def test_killed_at_any_moment_the_source_is_whole_and_the_next_run_finishes(tmp_path):
    values = images(3000)
    for delay in (0.0, 0.01, 0.03):
        path = write(tmp_path / 'images.h5', values, chunks=(64, 16, 16, 1), compression='gzip')
        code = ('import sys, data_rechunk; print("go", flush=True);'
                'data_rechunk.rechunk_file(sys.argv[1])')
        with subprocess.Popen([sys.executable, '-c', code, path], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            until = time.monotonic() + 10
            part = tmp_path / 'images.h5.part'
            while time.monotonic() < until and process.poll() is None:
                if part.exists() and part.stat().st_size > delay * values.nbytes * 10:
                    break
            process.send_signal(signal.SIGKILL)
        with h5py.File(path) as file:
            np.testing.assert_array_equal(file['images'][()], values)
        rechunk_file(path)
        np.testing.assert_array_equal(read(path), values)
        assert os.listdir(tmp_path) == ['images.h5']


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_is_bounded_whatever_the_number_of_samples(tmp_path):
    def peak(code):
        # Not ru_maxrss, which a child inherits from the process that started it.
        code += '; print([line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line][0])'
        run = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)
        return int(run.stdout) / 1024

    path = tmp_path / 'images.h5'
    with h5py.File(path, 'w') as file:  # 600 MB as float32
        file.create_dataset('images', (800, 256, 256, 3), 'float32', fillvalue=7,
                            chunks=(100, 64, 64, 1), compression='gzip')
    used = peak(f'import data_rechunk; data_rechunk.rechunk_file({str(path)!r})')
    assert 20 < used - peak('pass') < 300


def test_importing_costs_no_torch():
    code = 'import sys, data_rechunk, data_prepare; print("torch" in sys.modules)'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == 'False'


@pytest.mark.parametrize('values, message', [
    (np.zeros((5, 8, 8, 4)), 'expected numbers of shape (N, H, W, 3)'),
    (np.zeros((5, 8, 8)), 'expected numbers of shape (N, H, W, 3)'),
    (np.zeros((0, 8, 8, 3)), 'holds no samples'),
    (np.full((5, 8, 8, 3), b'x'), 'expected numbers'),
])
def test_a_wrong_shape_or_type_is_named(coursework, fails, values, message):
    root = coursework()
    path = root / 'train' / 'images.h5'
    write(path, values)
    line = fails(main, '--data', root)
    assert message in line and str(path) in line


def test_a_missing_file_is_named(coursework, fails):
    root = coursework()
    (root / 'val' / 'masks.h5').unlink()
    assert 'val/masks.h5: no such file' in fails(main, '--data', root)


def test_a_missing_folder_is_named(tmp_path, fails):
    assert 'no folder train, val or test' in fails(main, '--data', tmp_path)


@pytest.mark.parametrize('keep', [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named_and_kept(coursework, fails, keep):
    path = coursework() / 'train' / 'images.h5'
    content = path.read_bytes()[:int(path.stat().st_size * keep)]
    path.write_bytes(content)
    line = fails(main, '--data', path.parent.parent)
    assert str(path) in line
    assert path.read_bytes() == content


def test_a_file_without_its_dataset_is_named(coursework, fails):
    path = coursework() / 'train' / 'images.h5'
    with h5py.File(path, 'w') as file:
        file['pictures'] = images()
    assert "no dataset 'chunked_images'; it holds ['pictures']" in fails(main, '--data', path.parent.parent)
