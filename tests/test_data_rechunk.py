"""One image, one chunk: what comes out, and that nothing is lost on the way."""

import faulthandler
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from conftest import assert_full_disk_leaves_files, run_in_child

import data_rechunk
from data_rechunk import main, rechunk_file
from support.child import in_own_process
from support.cli import STOP_SIGNALS, InputError
from support.hdf5 import is_rechunked, read_text


def write(path, values, **layout):
    with h5py.File(path, 'w') as file:
        file.create_dataset(path.stem, data=values, **layout)
    return path


def read(path, key=None):
    with h5py.File(path) as file:
        return file[key or f'chunked_{path.stem}'][()]


def images(count=20, size=(48, 40), dtype='uint8', seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(dtype)


@pytest.mark.parametrize(
    'layout',
    [
        {},
        {'chunks': True},
        {'chunks': (7, 16, 16, 1), 'compression': 'gzip'},
        {'chunks': (20, 48, 40, 3)},
        {'chunks': (1, 48, 40, 3)},
        {'chunks': (3, 5, 7, 2), 'compression': 'lzf', 'shuffle': True},
    ],
)
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
def test_chunks_that_span_more_images_than_a_slab(tmp_path, monkeypatch, chunks, dtype):
    monkeypatch.setattr(data_rechunk, 'LARGEST_SLAB_BYTES', 3 * 48 * 40 * 3)
    values = images(64, dtype=dtype)
    path = write(tmp_path / 'images.h5', values, chunks=chunks)
    rechunk_file(path)
    np.testing.assert_array_equal(read(path), values)
    assert set(os.listdir(tmp_path)) <= {'images.h5', '.lock'}


@pytest.mark.parametrize(
    'chunks, step',
    [
        (None, 4),
        ((1, 48, 40, 3), 4),
        ((3, 16, 16, 1), 3),
        ((4, 48, 40, 3), 4),
        ((9, 8, 8, 1), 9),
        ((20, 8, 8, 1), 12),
        ((64, 48, 40, 3), 12),
    ],
)
def test_slabs_are_whole_chunks_where_those_fit(tmp_path, monkeypatch, chunks, step):
    monkeypatch.setattr(data_rechunk, 'SLAB_BYTES', 4 * 48 * 40 * 3)
    monkeypatch.setattr(data_rechunk, 'LARGEST_SLAB_BYTES', 12 * 48 * 40 * 3 + 1)
    path = write(tmp_path / 'images.h5', images(64), chunks=chunks)
    with h5py.File(path) as file:
        assert data_rechunk.slab_starts(file['images']) == range(0, 64, step)


def test_float_images_that_uint8_cannot_hold_keep_their_type(tmp_path):
    values = images(dtype='float32')
    values[-1, -1, -1, -1] = 0.5
    path = write(tmp_path / 'images.h5', values)
    rechunk_file(path)
    assert read(path).dtype == 'float32'
    np.testing.assert_array_equal(read(path), values)


@pytest.mark.parametrize(
    'dtype, value', [('f4', np.nan), ('f4', np.inf), ('f4', -1), ('f4', 256), ('i2', -1), ('i2', 256)]
)
def test_images_out_of_range_are_refused(tmp_path, dtype, value):
    values = images(dtype=dtype)
    values[5, 3, 2, 1] = value
    path = write(tmp_path / 'images.h5', values)
    before = path.read_bytes()
    with pytest.raises(InputError, match=f'images.h5: sample 5 holds {value:g}; images are expected as 0 to 255'):
        rechunk_file(path)
    assert path.read_bytes() == before


def masks(dtype='uint8'):
    """20 masks: 3, 11 and 12 are unknown, 5 is background, 7 partly unknown."""
    values = np.random.default_rng(0).integers(0, 2, (20, 16, 24, 1))
    values[[3, 11, 12]], values[5], values[7, :9] = 255, 0, 255
    return values.astype(dtype)


@pytest.fixture
def slabs_of_three(monkeypatch):
    monkeypatch.setattr(data_rechunk, 'LARGEST_SLAB_BYTES', 3 * 16 * 24)


@pytest.mark.parametrize('dtype', ['uint8', 'float32', '>f8', 'int16'])
def test_masks_become_uint8_and_the_known_ones_are_recorded(tmp_path, slabs_of_three, dtype):
    path = write(tmp_path / 'masks.h5', masks(dtype))
    rechunk_file(path)
    assert read(path).dtype == 'uint8'
    np.testing.assert_array_equal(read(path), masks())
    assert np.flatnonzero(read(path, 'known_masks') == 0).tolist() == [3, 11, 12]
    assert rechunk_file(path) is None


def test_bool_masks_are_all_known(tmp_path):
    path = write(tmp_path / 'masks.h5', np.eye(16, dtype=bool)[None, ..., None])
    rechunk_file(path)
    assert read(path).sum() == 16 and read(path, 'known_masks').tolist() == [1]


@pytest.mark.parametrize(
    'dtype, value', [('u1', 7), ('f4', 0.5), ('f4', np.nan), ('f8', np.inf), ('i1', -1), ('i2', 256), ('u2', 257)]
)
def test_a_mask_of_another_value_is_refused(tmp_path, slabs_of_three, dtype, value):
    values = np.eye(16, 24, dtype=dtype)[None, ..., None].repeat(20, axis=0)
    values[13, 3, 2] = value
    path = write(tmp_path / 'masks.h5', values)
    before = path.read_bytes()
    message = f'masks.h5: sample 13 holds {value:g}; a mask holds 0, 1 and 255 for unknown'
    with pytest.raises(InputError, match=message):
        rechunk_file(path)
    assert path.read_bytes() == before and set(os.listdir(tmp_path)) <= {'masks.h5', '.lock'}


def test_masks_of_0_and_255_are_refused(tmp_path, slabs_of_three):
    values = np.zeros((20, 16, 24, 1), 'uint8')
    values[0], values[13, 5:] = 255, 255  # most slabs hold but one of the two
    path = write(tmp_path / 'masks.h5', values)
    before = path.read_bytes()
    with pytest.raises(InputError, match='masks.h5: holds 0 and 255 but no 1; 255 means unknown, the pet is 1'):
        rechunk_file(path)
    assert path.read_bytes() == before and set(os.listdir(tmp_path)) <= {'masks.h5', '.lock'}


def record(values, **options):
    def store(file):
        del file['known_masks']
        file.create_dataset('known_masks', data=values, **options)

    return store


def no_record(file):
    del file['known_masks']


def linked_record(file):
    file.move('known_masks', 'elsewhere')
    file['known_masks'] = h5py.SoftLink('/elsewhere')


def group_for_record(file):
    del file['known_masks']
    file.create_group('known_masks')['notes'] = [1, 2]


def damaged_record(file):
    file['known_masks'].id.write_direct_chunk((0,), b'1' * 24)  # 20 values and another checksum


def masks_of_another_type(file):
    values = file['masks'][()].astype('int16')
    del file['masks'], file['chunked_masks']
    file['chunked_masks'] = file.create_dataset('masks', data=values, chunks=(1, 16, 24, 1))


@pytest.mark.parametrize(
    'change',
    [
        no_record,
        linked_record,
        group_for_record,
        damaged_record,
        masks_of_another_type,
        record(np.ones(20, 'uint8'), chunks=(20,)),  # without a checksum
        record(np.ones(20, 'uint8'), chunks=(10,), fletcher32=True),
        record(np.ones(19, 'uint8'), chunks=(19,), fletcher32=True),
        record(np.ones(20, 'int64'), chunks=(20,), fletcher32=True),
        record(np.full(20, 2, 'uint8'), chunks=(20,), fletcher32=True),
        record(7),
    ],
)
def test_masks_without_a_sound_record_are_rechunked_again(tmp_path, change):
    path = write(tmp_path / 'masks.h5', masks())
    rechunk_file(path)
    with h5py.File(path, 'r+', libver='v110') as file:
        change(file)
        assert not is_rechunked(file, 'masks')
    assert rechunk_file(path) == 20
    with h5py.File(path) as file:
        assert is_rechunked(file, 'masks')
    assert np.flatnonzero(read(path, 'known_masks') == 0).tolist() == [3, 11, 12]


def test_force_records_the_known_masks_anew(tmp_path):
    path = write(tmp_path / 'masks.h5', masks())
    rechunk_file(path)
    with h5py.File(path, 'r+') as file:
        file['masks'][11] = 1
    rechunk_file(path, force=True)
    assert np.flatnonzero(read(path, 'known_masks') == 0).tolist() == [3, 12]


def test_known_masks_of_another_file_are_copied_as_they_are(tmp_path):
    path = write(tmp_path / 'images.h5', images())
    with h5py.File(path, 'a') as file:
        file['known_masks'] = [1, 2, 3]
    rechunk_file(path)
    assert read(path, 'known_masks').tolist() == [1, 2, 3]


def test_both_names_are_the_same_data_and_the_file_does_not_double(tmp_path):
    path = write(tmp_path / 'images.h5', images(200))
    before = path.stat().st_size
    rechunk_file(path)
    with h5py.File(path) as file:
        assert sorted(file) == ['chunked_images', 'images']
        assert file['images'] == file['chunked_images']
    assert path.stat().st_size < 1.05 * before


def test_label_tables_become_one_chunk(tmp_path):
    path = write(tmp_path / 'bboxes.h5', np.arange(400.0).reshape(100, 4), chunks=(1, 4))
    rechunk_file(path)
    with h5py.File(path) as file:
        assert file['chunked_bboxes'].chunks == (100, 4)
        assert file['chunked_bboxes'].dtype == 'float64'
    np.testing.assert_array_equal(read(path), np.arange(400.0).reshape(100, 4))


def test_rechunking_copies_attributes_and_other_datasets(tmp_path):
    path = write(tmp_path / 'breeds.h5', np.zeros((5, 1), 'int16'))
    with h5py.File(path, 'a') as file:
        file['breeds'].attrs['class_names'] = ['a', 'b']
        file['notes'] = [1, 2, 3]
    rechunk_file(path)
    with h5py.File(path) as file:
        assert read_text(file['chunked_breeds'].attrs, 'class_names') == ['a', 'b']
        assert file['notes'][()].tolist() == [1, 2, 3]


def test_separate_chunked_copy_is_replaced_by_a_hard_link(tmp_path):
    path = write(tmp_path / 'images.h5', images(50))
    with h5py.File(path, 'a') as file:
        file.create_dataset('chunked_images', data=images(50), chunks=(1, 48, 40, 3))
    before = path.stat().st_size
    rechunk_file(path)
    assert path.stat().st_size < 0.6 * before
    np.testing.assert_array_equal(read(path), images(50))


def test_a_second_run_changes_nothing_and_says_so(original_files, capsys):
    root = original_files(chunks=True, compression='gzip')
    main(['--data', str(root)])
    first = {path: path.stat().st_mtime_ns for path in root.rglob('*.h5')}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and '12 samples' in lines[0] and 'MB -> ' in lines[0]
    main(['--data', str(root)])
    assert first == {path: path.stat().st_mtime_ns for path in root.rglob('*.h5')}
    assert capsys.readouterr().out.count('already rechunked') == 12
    main(['--data', str(root), '--force'])
    assert all(path.stat().st_mtime_ns > time for path, time in first.items())


def test_source_is_kept_if_the_read_back_comparison_fails(tmp_path, monkeypatch, error_line):
    path = write(tmp_path / 'images.h5', images())
    before = path.read_bytes()
    monkeypatch.setattr(data_rechunk, 'same_bytes', lambda *_: False)
    with pytest.raises(InputError, match='left as it was'):
        rechunk_file(path)
    assert path.read_bytes() == before and set(os.listdir(tmp_path)) == {'images.h5', '.lock'}


# What happens to the process of a file would elsewhere happen to the tests'.
own_process = pytest.mark.skipif(sys.platform != 'linux', reason='files have processes of their own on Linux alone')


@pytest.mark.parametrize('limit', [0, 100, 2000, 100_000, 140_000])
def test_full_disk_leaves_the_source(original_files, limit):
    root = original_files(chunks=True, compression='gzip')
    assert_full_disk_leaves_files(main, ['--data', root], root, limit)


@pytest.mark.slow
def test_failed_write_at_any_size_leaves_the_source(original_files):
    """HDF5 crashes when a write fails while it closes a file with a chunk cache."""
    root = original_files(count=6)
    for path in root.glob('[vt][ae][ls]*/*.h5'):
        path.unlink()
    for limit in range(0, 6 * 64 * 64 * 3, 256):
        assert_full_disk_leaves_files(main, ['--data', root], root, limit)


@pytest.mark.parametrize('number', STOP_SIGNALS)
def test_a_signal_ends_rechunking_with_nothing_left_behind(tmp_path, monkeypatch, number):
    path = write(tmp_path / 'images.h5', images())
    before = path.read_bytes()

    def stop(*_):  # in the process of the file, as in a loop of HDF5
        os.kill(os.getppid(), number)
        signal.pause()

    monkeypatch.setattr(data_rechunk, 'same_bytes', stop)
    log = tmp_path.parent / 'log.txt'
    assert run_in_child(lambda _: rechunk_file(path), [], log) == 128 + number
    assert path.read_bytes() == before and set(os.listdir(tmp_path)) == {'images.h5', '.lock'}


def crash(path, number):
    faulthandler.disable()  # pytest's would print where
    os.kill(os.getpid(), number)


def greedy(path):
    bytearray(3 << 30)


@own_process
@pytest.mark.parametrize(
    'function, arguments, message',
    [
        (crash, (signal.SIGSEGV,), 'reading it ended with -11'),
        (crash, (signal.SIGXCPU,), 'reading it took too long'),
        (greedy, (), 'reading it ended with 1'),
    ],
    ids=['crash', 'hang', 'memory'],
)
def test_child_crash_timeout_and_memory_limit_give_one_line_errors(tmp_path, function, arguments, message):
    path = write(tmp_path / 'images.h5', images())
    with pytest.raises(InputError, match=message):
        in_own_process(60, function, path, *arguments)
    assert set(os.listdir(tmp_path)) <= {'images.h5', '.lock'}
    assert rechunk_file(path) == 20


def test_child_memory_limit_is_on_top_of_the_parents_memory(tmp_path):
    path = write(tmp_path / 'images.h5', images())
    mapped = np.empty(5 << 30, np.uint8)  # which costs nothing as long as nobody writes to it
    assert rechunk_file(path) == 20 and len(mapped)


@own_process
def test_the_process_of_a_file_ends_with_its_parent(tmp_path):
    path = write(tmp_path / 'images.h5', images())
    read_end, write_end = os.pipe()

    def child(path):
        os.write(write_end, str(os.getpid()).encode().ljust(10))
        signal.pause()

    parent = os.fork()
    if not parent:
        in_own_process(60, child, path)
    assert int(os.read(read_end, 10)) != parent
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    os.close(write_end)
    assert os.read(read_end, 1) == b''  # when all that could write are gone


@pytest.mark.parametrize('mark, count', [(b'SNOD', 1), (b'HEAP', 1), (b'TREE', 1), (b'\x89HDF', 1)])
def test_every_hdf5_exception_gives_a_one_line_error(original_files, error_line, mark, count):
    root = original_files()
    path = root / 'train' / 'images.h5'
    content = path.read_bytes()
    assert mark in content
    path.write_bytes(content.replace(mark, b'????', count))
    assert f'{path}: not a valid HDF5 file' in error_line(main, '--data', root)


def external(file):
    file['images'] = h5py.ExternalLink('other.h5', 'images')


def soft(file):
    file['images'] = h5py.SoftLink('/nowhere')


def raw(file):
    file.create_dataset('images', (9, 8, 8, 3), 'uint8', external=[('/etc/passwd', 0, h5py.h5f.UNLIMITED)])


def virtual(file):
    layout = h5py.VirtualLayout((9, 8, 8, 3), 'uint8')
    layout[...] = h5py.VirtualSource('other.h5', 'images', (9, 8, 8, 3))
    file.create_virtual_dataset('images', layout)


def many(file):
    dataset = file.create_dataset('images', (10**9, 8, 8, 3), 'uint8', chunks=(1, 8, 8, 3), maxshape=(None, 8, 8, 3))
    dataset[0] = 1


def unknown_filter(file):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1, 8, 8, 3))
    plist.set_filter(32_100, h5py.h5z.FLAG_OPTIONAL)
    dataset = h5py.h5d.create(file.id, b'images', h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((9, 8, 8, 3)), plist)
    for i in range(9):
        dataset.write_direct_chunk((i, 0, 0, 0), bytes(192))


@pytest.mark.parametrize(
    'store, message',
    [
        (external, "no dataset 'images' of its own, not a link or group"),
        (soft, "no dataset 'images' of its own, not a link or group"),
        (raw, 'takes its values from other files'),
        (virtual, 'takes its values from other files'),
        (many, 'has 1000000000 samples in a file of 5248 bytes'),
        (unknown_filter, 'needs the HDF5 filter 32100'),
    ],
)
def test_virtual_external_and_unreadable_datasets_are_refused(tmp_path, store, message):
    write(tmp_path / 'other.h5', images())
    path = tmp_path / 'images.h5'
    with h5py.File(path, 'w') as file:
        store(file)
    with pytest.raises(InputError, match=message) as error:
        rechunk_file(path)
    assert str(path) in str(error.value)


def test_links_are_copied_without_being_followed(tmp_path):
    path = write(tmp_path / 'images.h5', images())
    with h5py.File(path, 'a') as file:
        file['away'], file['nowhere'] = h5py.ExternalLink('/etc/hostname', '/x'), h5py.SoftLink('/y')
    rechunk_file(path)
    with h5py.File(path) as file:
        assert file.get('away', getlink=True).filename == '/etc/hostname'
        assert file.get('nowhere', getlink=True).path == '/y'


def test_a_file_that_another_program_writes_to_is_refused(tmp_path):
    path = write(tmp_path / 'images.h5', images())
    log = tmp_path / 'log.txt'
    read_end, write_end = os.pipe()
    writer = os.fork()  # HDF5 does not lock out its own process
    if not writer:
        with h5py.File(path, 'r+'):
            os.write(write_end, b'x')
            signal.pause()
    os.read(read_end, 1)
    try:
        assert run_in_child(lambda _: rechunk_file(path), [], log) == 1
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert 'another program has it open for writing; close it there' in log.read_text()


def test_file_is_read_without_locking_if_locks_are_unsupported(tmp_path, monkeypatch):
    path, original = write(tmp_path / 'images.h5', images()), h5py.File

    def no_locks(*args, locking=None, **kw):
        if not isinstance(args[0], str | os.PathLike) or args[1:] == ('r',) and locking is not False:
            raise OSError(
                'Unable to synchronously open file (unable to lock file, errno = 37, error message = '
                "'No locks available')"
            )
        return original(*args, **kw)

    monkeypatch.setattr(h5py, 'File', no_locks)
    monkeypatch.setattr('support.files.fcntl.lockf', no_locks)
    assert rechunk_file(path) == 20


@pytest.mark.parametrize('locking', ['TRUE', 'FALSE', 'BEST_EFFORT'])
def test_a_file_that_a_reader_has_open_can_be_rechunked(tmp_path, locking):
    path = write(tmp_path / 'images.h5', images())
    with h5py.File(path) as reader:
        done = subprocess.run(
            [sys.executable, '-c', f'import data_rechunk; data_rechunk.rechunk_file({str(path)!r})'],
            env={**os.environ, 'HDF5_USE_FILE_LOCKING': locking},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        np.testing.assert_array_equal(reader['images'][()], images())
    np.testing.assert_array_equal(read(path), images())


@pytest.mark.parametrize('count', [3, 8, 29])
def test_same_bytes_detects_any_changed_byte(count):
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
        code = 'import sys, data_rechunk; print("go", flush=True);data_rechunk.rechunk_file(sys.argv[1])'
        with subprocess.Popen([sys.executable, '-c', code, path], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            until = time.monotonic() + 10
            part = tmp_path / f'images.h5.{process.pid}.part'
            while time.monotonic() < until and process.poll() is None:
                if part.exists() and part.stat().st_size > delay * values.nbytes * 10:
                    break
            assert process.poll() is None, 'it was to be killed at its work'
            process.send_signal(signal.SIGKILL)
        with h5py.File(path) as file:
            np.testing.assert_array_equal(file['images'][()], values)
        rechunk_file(path)
        np.testing.assert_array_equal(read(path), values)
        assert set(os.listdir(tmp_path)) <= {'images.h5', '.lock'}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_is_bounded_whatever_the_number_of_samples(tmp_path):
    def peak(code):
        # Not ru_maxrss, which a child inherits from the process that started it.
        code += '; print([line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line][0])'
        run = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)
        return int(run.stdout) / 1024

    path = tmp_path / 'images.h5'
    with h5py.File(path, 'w') as file:  # 600 MB as float32
        dataset = file.create_dataset(
            'images', (800, 256, 256, 3), 'float32', chunks=(100, 64, 64, 1), compression='gzip', compression_opts=1
        )
        for start in range(0, 800, 100):
            dataset[start : start + 100] = np.full((100, 256, 256, 3), 7, 'float32')
    # Of the process that reads the file: on Linux, a child.
    used = peak(
        f'import data_rechunk; data_rechunk.in_own_process = lambda s, f, *a: f(*a); '
        f'data_rechunk.rechunk_file({str(path)!r})'
    )
    assert 20 < used - peak('pass') < 400


def test_import_does_not_load_torch():
    code = 'import sys, data_rechunk, data_prepare; print("torch" in sys.modules)'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == 'False'


@pytest.mark.parametrize(
    'values, message',
    [
        (np.zeros((5, 8, 8, 4)), 'expected numbers of shape (N, H, W, 3)'),
        (np.zeros((5, 8, 8)), 'expected numbers of shape (N, H, W, 3)'),
        (np.zeros((0, 8, 8, 3)), 'holds no samples'),
        (np.full((5, 8, 8, 3), b'x'), 'expected numbers'),
    ],
)
def test_a_wrong_shape_or_type_is_named(original_files, error_line, values, message):
    root = original_files()
    path = root / 'train' / 'images.h5'
    write(path, values)
    line = error_line(main, '--data', root)
    assert message in line and str(path) in line


def test_a_missing_file_is_named(original_files, error_line):
    root = original_files()
    (root / 'val' / 'masks.h5').unlink()
    assert 'val/masks.h5: no such file' in error_line(main, '--data', root)


def test_a_missing_folder_is_named(tmp_path, error_line):
    assert 'no folder train, val or test' in error_line(main, '--data', tmp_path)


@pytest.mark.parametrize('keep', [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named_and_kept(original_files, error_line, keep):
    path = original_files() / 'train' / 'images.h5'
    content = path.read_bytes()[: int(path.stat().st_size * keep)]
    path.write_bytes(content)
    line = error_line(main, '--data', path.parent.parent)
    assert str(path) in line
    assert path.read_bytes() == content


def test_a_file_without_its_dataset_is_named(original_files, error_line):
    path = original_files() / 'train' / 'images.h5'
    with h5py.File(path, 'w') as file:
        file['pictures'] = images()
    assert "no dataset 'images' of its own, not a link or group; it holds ['pictures']" in error_line(
        main, '--data', path.parent.parent
    )
