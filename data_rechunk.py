"""Store every image and mask of the HDF5 splits as one chunk, so that one read fetches one sample.

    python data_rechunk.py                      # the files under datasets/data_new/{train,val,test}
    python data_rechunk.py --data DIR           # the same files under another folder

Afterwards `images.h5` holds `chunked_images` beside `images`, `masks.h5` holds `chunked_masks`, and
so on. The two names are hard links to the same stored data, so nothing is stored twice. Expect a few
seconds a gigabyte and a line for each file; a second run finds nothing to do and returns at once.

A file is never changed in place: the new one is written beside it, read back, compared and then
renamed over it. A run killed at any moment leaves the old file whole, and the next run finishes.

Memory: three slabs of 16 MiB at most and one chunk of the source, whatever the number of samples.
On Linux each file is read in a process of its own, because a damaged one can crash HDF5 or keep it busy
for ever.

It also holds what the scripts share and that needs no torch: what the files look like, how they are
opened and replaced, `InputError`, `run_script` and `whole_number`.
"""

import argparse
import ctypes
import errno
import io
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows: nothing keeps two processes apart, and memory is not limited
    fcntl = resource = None

SPLITS = ('train', 'val', 'test')

# Shape of each file's dataset; N is the number of samples, H and W the size of the stored images.
SHAPES = {
    'images': ('N', 'H', 'W', 3),
    'masks': ('N', 'H', 'W', 1),
    'bboxes': ('N', 4),
    'binary': ('N', 1),
    'breeds': ('N', 1),
}
OPTIONAL = ('breeds',)  # the coursework's copies of the data have no breeds

LARGEST_SIDE = 4096  # pixels of an image's height or width

MASK_UNKNOWN = 255  # stored in a mask where it is not known whether a pixel shows the pet

SLAB_BYTES = 16 << 20  # samples held in memory at a time; more is slower, for the processor's cache


# What asks a script to stop. The terminal sends SIGHUP when its window is closed.
STOPPING = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]


class InputError(Exception):
    """A file or an option that cannot be used; the message is the one line that the user sees."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the script to stop; the exit status is 128 + `number`, as the shell has it."""

    def __init__(self, number, message='interrupted'):
        super().__init__(message)
        self.number, self.status = number, 128 + number


def interrupt(number, frame):
    raise Interrupted(number)


def handle_signals(handler):
    """Let `handler` handle the signals of STOPPING that are not ignored (nohup); returns what did so far."""
    if threading.current_thread() is not threading.main_thread():  # Python calls no handlers elsewhere
        return {}
    handled = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) or signal.SIG_DFL for number in handled}


class Interruption:
    """While it is entered, the signals of STOPPING wait for the next `check`, or for its end."""

    def __init__(self):
        self.number = 0

    def __enter__(self):
        self.before = handle_signals(self._note)
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is None:
            self.check()

    def _note(self, number, frame):
        self.number = self.number or number

    def check(self):
        """Raises Interrupted if a signal has come."""
        if self.number:
            raise Interrupted(self.number)


@contextmanager
def signals_blocked():
    """Hold signals off from this process and from those that it starts, which stay so until they say otherwise."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_script(main):
    """Call `main()`; turn bad input into one line on standard error and exit status 1, signals into 128 + n."""
    handle_signals(interrupt)
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # for file names that are no text
    try:
        main()
        return
    except InputError as error:
        # What a loader's worker raises arrives with the worker's traceback before it.
        line, status = f'error: {str(error).strip().rpartition("InputError: ")[2]}', 1
    except OSError as error:
        where = f'{error.filename}: ' if error.filename else ''
        line, status = f'error: {where}{reason(error)}', 1
    except MemoryError:
        line, status = 'error: there is not enough memory', 1
    except KeyboardInterrupt as error:
        line, status = str(error) or 'interrupted', getattr(error, 'status', 130)
    # Not above, where the exception still keeps alive what was in use, such as a loader's processes.
    print(one_line(line)[:2000], file=sys.stderr)
    sys.exit(status)


def whole_number(minimum):
    """An argparse type: a whole number of at least `minimum` that fits a random seed's 32 bits."""
    def parse(text):
        if not text.lstrip('+-').isdecimal() or not minimum <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {minimum} up")
        return int(text)
    return parse


def must_be_file(path, hint):
    """Raises InputError, which ends with `hint`, for a path without a regular file: a pipe would be waited for."""
    if not os.path.isfile(path):
        found = 'is not a file' if os.path.exists(path) else 'no such file'
        raise InputError(f'{path}: {found}; {hint}')


def networks_take(*sides):
    """Whether the networks take images with these sides in pixels."""
    return all(64 <= side <= LARGEST_SIDE and side % 16 == 0 for side in sides)


def are_names(values):
    """Whether `values` is a list of names: each a text of 1 to 100 characters that can be printed."""
    return isinstance(values, list) and bool(values) and all(
        isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable() for value in values
    )


def reason(error):
    """The exception's message as one line of at most 200 characters."""
    text = getattr(error, 'strerror', None) or str(error)
    system = re.search("error message = '([^']*)'", text)  # HDF5 has it among much else
    return one_line(system[1] if system else text)[:200] or type(error).__name__


def one_line(text):
    """`text` with every run of white space as a blank and what does not print as a question mark."""
    return ''.join(each if each.isprintable() else '?' for each in ' '.join(text.split()))


# ---- writing files


@contextmanager
def replacing(*paths):
    """Yield a path beside each of `paths` to write to; when the block ends well they take their places.

    All new files are synced to disk before the first is renamed, so each of `paths` is the old file or
    the new one at every moment. If the block raises, the unfinished files are removed and `paths` are
    untouched; an error of the system becomes an InputError that names the path. Yields a list of
    paths, or the path if there is one.
    """
    targets = [Path(os.path.realpath(path)) for path in paths]  # a link's target is replaced, not the link
    parts = []
    try:
        for target in targets:
            if target.is_dir():
                raise InputError(f'{target}: is a folder; expected the name of a file to write')
            target.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own for each process: two that write one path cannot mix their files.
            parts.append(target.with_name(f'{target.name}.{os.getpid()}.part'))
            parts[-1].touch()
        yield parts if len(parts) > 1 else parts[0]
        for part in parts:
            with naming(part), open(part, 'rb+') as file:
                os.fsync(file.fileno())
        for part, target in zip(parts, targets):
            os.replace(part, target)
        if os.name == 'posix':
            for parent in {target.parent for target in targets}:
                folder = os.open(parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
    except OSError as error:
        named = dict(zip(map(str, parts), targets)).get(str(error.filename))
        if named is None:
            raise
        raise InputError(f'{named}: cannot be written and is left as it was ({reason(error)})') from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


@contextmanager
def naming(path):
    """Give an error of the system the name of the file, which writing and syncing leave out."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_file(path, save):
    """Put what `save(file)` writes to a binary file in the place of `path`, whole or not at all.

    It is held in memory first, as libraries answer a full disk each in its own way.
    """
    content = io.BytesIO()
    save(content)
    with replacing(path) as part, naming(part):
        part.write_bytes(content.getbuffer())


locks = []  # descriptors of the folders that this process has for itself


@contextmanager
def alone_in(folder):
    """Keep other processes that ask for `folder` out of it; raises InputError if one is in there already.

    The system holds the lock and drops it when the process ends, however it ends. What a killed one
    left half written is removed. On file systems without locks (some network drives) there is nothing
    to hold others off.
    """
    os.makedirs(folder, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f'{folder}: another process is writing to this folder; wait for it, stop it, '
                             'or choose another folder') from None
        except OSError:
            yield
            return
        locks.append(descriptor)
        for part in Path(folder).glob('*.part'):
            if re.fullmatch(r'.+\.(h5|pt|csv|png|json)\.\d+\.part', part.name):
                part.unlink(missing_ok=True)
        try:
            yield
        finally:
            locks.remove(descriptor)
    finally:
        os.close(descriptor)


def leave_locks():
    """To be called in a forked process, which would hold the locks after the end of the one that took them."""
    while locks:
        os.close(locks.pop())


class ToughFile:
    """A file that h5py can write to on a full disk.

    HDF5 crashes when a write fails while it closes a file. This one fails silently: `error` is the
    first error of the system, after which nothing more is written.
    """

    def __init__(self, path):
        self.path, self.file, self.error = path, open(path, 'w+b', buffering=0), None
        self.seek, self.tell, self.read, self.readinto, self.close = (
            getattr(self.file, name) for name in ('seek', 'tell', 'read', 'readinto', 'close')
        )

    def write(self, data):
        return self._attempt(self._write_all, data)

    def truncate(self, size):
        return self._attempt(self.file.truncate, size)

    def flush(self):
        """Nothing is buffered."""

    def _write_all(self, data):
        rest = memoryview(data).cast('B')
        while rest:  # a nearly full disk takes less than it was given before it takes nothing
            rest = rest[self.file.write(rest):]

    def _attempt(self, action, argument):
        if self.error is None:
            try:
                action(argument)
            except OSError as error:
                self.error = OSError(error.errno, error.strerror, str(self.path))

    def check(self):
        if self.error is not None:
            raise self.error


@contextmanager
def create_h5(path, **options):
    """Yield (h5py.File, ToughFile) for a new HDF5 file; raises OSError if it cannot all be written.

    In the format of HDF5 1.10, whose own structures have checksums. To be used inside an Interruption: a
    signal's exception in a ToughFile would be raised within HDF5.
    """
    storage = ToughFile(path)
    try:
        with h5py.File(storage, 'w', libver='v110', **options) as file:
            yield file, storage
    except Exception:
        storage.check()  # where the disk was full, that is the reason
        raise
    finally:
        storage.close()
    storage.check()


# ---- opening HDF5 files

# What h5py raises for files that are damaged or that it cannot deal with.
H5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)

LARGEST_RATIO = 1100  # of a dataset's size to what is stored of it; gzip's best is 1032


@contextmanager
def reading_h5(path, **options):
    """`open_h5` for a with statement; whatever h5py raises inside of it becomes an InputError."""
    with open_h5(path, **options) as file:
        try:
            yield file
        except H5_ERRORS as error:
            raise InputError(f'{path}: not a sound HDF5 file ({reason(error)}); make it again') from None


def open_h5(path, **options):
    """Open an HDF5 file for reading, with options of h5py.File.

    Raises InputError where there is none, it is damaged or another process writes to it.
    """
    must_be_file(path, 'data_prepare.py makes it')
    try:
        try:
            return h5py.File(path, 'r', **options)
        except BlockingIOError:
            raise InputError(f'{path}: another program has it open for writing; close it there') from None
        except OSError as error:
            if 'unable to lock file' not in str(error):
                raise
            return h5py.File(path, 'r', locking=False, **options)  # a file system without locks
    except H5_ERRORS as error:
        raise InputError(f'{path}: not a sound HDF5 file ({reason(error)}); make it again') from None


def find_dataset(file, key):
    """The dataset `key` of an open file, its shape and type checked against SHAPES.

    `key` is a stem of SHAPES or that stem with `chunked_` before it.
    """
    path, expected = file.filename, SHAPES[key.removeprefix('chunked_')]
    dataset = file.get(key) if has_own(file, key) else None
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"{path}: no dataset '{key}'; it holds {list(file)[:10]}")
    if dataset.is_virtual or dataset.external:
        raise InputError(f"{path}: '{key}' takes its values from other files; store them in this one")
    shape = dataset.shape or ()
    fits = len(shape) == len(expected) and all(
        size == want for size, want in zip(shape, expected) if isinstance(want, int)
    )
    if not fits or dataset.dtype.kind not in 'buif':
        wanted = ', '.join(map(str, expected))
        raise InputError(
            f"{path}: '{key}' is {dataset.dtype} {shape}; expected numbers of shape ({wanted})"
        )
    if len(shape) == 4 and max(shape[1:3]) > LARGEST_SIDE:
        raise InputError(f"{path}: '{key}' is {shape}; images have {LARGEST_SIDE} x {LARGEST_SIDE} pixels at most")
    if not math.prod(shape):
        raise InputError(f"{path}: '{key}' holds no samples; prepare the data with more photographs")
    stored = dataset.id.get_storage_size()
    if dataset.size * dataset.dtype.itemsize > LARGEST_RATIO * stored:
        raise InputError(f"{path}: '{key}' should hold {len(dataset)} samples and only {stored} bytes are "
                         'stored; make the file again')
    filters = dataset.id.get_create_plist()
    for number in range(filters.get_nfilters()):
        code, *_, name = filters.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            raise InputError(f"{path}: '{key}' needs the HDF5 filter {code} ({name.decode(errors='replace')}), "
                             'which is not installed; store it with gzip or without compression')
    return dataset


def has_own(file, key):
    """Whether the file itself holds an object `key`, not a link to some other place."""
    return key in file.keys() and isinstance(file.get(key, getlink=True), h5py.HardLink)


def has_checksums(file):
    """Whether the file's own structures have checksums, as those of the files written here."""
    return file.id.get_create_plist().get_version()[0] >= 2


def source_slabs(source, dtype, scratch_folder):
    """Yield the samples of a 4-D dataset in order as `dtype` arrays (n, H, W, C) of bounded size.

    Every stored chunk is read once. Where the chunks span so many images that those do not fit in
    SLAB_BYTES, the blocks are read chunk by chunk to a scratch file and put together from there.
    Raises LossyConversion where a value is not the same number as `dtype`.
    """
    count, *sample = source.shape
    chunk = source.chunks or (1, *sample)
    bytes_in, bytes_out = (math.prod(sample) * kind.itemsize for kind in (source.dtype, dtype))
    rows = chunk[0] * max(1, SLAB_BYTES // (chunk[0] * bytes_in))
    for start in range(0, count, rows):
        n = min(rows, count - start)
        # The largest block of whole chunks, as wide as the image where possible, that fits.
        block = list(sample)
        for axis in range(3):
            step = chunk[axis + 1]
            slice_bytes = n * math.prod(block) // block[axis] * source.dtype.itemsize
            block[axis] = min(block[axis], max(1, SLAB_BYTES // slice_bytes // step) * step)
        boxes = [
            tuple(slice(i, min(i + step, size)) for i, step, size in zip(corner, block, sample))
            for corner in itertools.product(*(range(0, s, b) for s, b in zip(sample, block)))
        ]
        blocks = (convert(source[(slice(start, start + n), *box)], dtype) for box in boxes)
        if len(boxes) == 1:
            yield from blocks
        elif n * bytes_out <= SLAB_BYTES:
            slab = np.empty((n, *sample), dtype)
            for box, values in zip(boxes, blocks):
                slab[(slice(None), *box)] = values
            yield slab
        else:
            yield from through_scratch(boxes, blocks, n, sample, dtype, scratch_folder)


def through_scratch(boxes, blocks, n, sample, dtype, folder):
    """Yield slabs of `n` samples whose `blocks` (n, h, w, c) arrive one box of the image at a time."""
    rows = max(1, SLAB_BYTES // (math.prod(sample) * dtype.itemsize))
    with tempfile.TemporaryFile(dir=folder, buffering=0) as scratch:
        offsets, sizes = [], []
        for values in blocks:
            offsets.append(scratch.tell())
            sizes.append(values[0].nbytes)
            try:
                scratch.write(np.ascontiguousarray(values))
            except OSError as error:
                raise InputError(f'{folder}: no room for {n * math.prod(sample) * dtype.itemsize} bytes of scratch '
                                 f'({reason(error)})') from None
        for start in range(0, n, rows):
            slab = np.empty((min(rows, n - start), *sample), dtype)
            for box, offset, size in zip(boxes, offsets, sizes):
                scratch.seek(offset + start * size)
                values = np.frombuffer(scratch.read(len(slab) * size), dtype)
                slab[(slice(None), *box)] = values.reshape(slab[(slice(None), *box)].shape)
            yield slab


class LossyConversion(Exception):
    """A value is another number, or none, in the type it should be stored as."""


def convert(values, dtype):
    """`values` as `dtype`; raises LossyConversion unless every number stays what it was."""
    if values.dtype == dtype:
        return values
    result = np.empty(values.shape, dtype)
    with np.errstate(invalid='ignore'):
        for source, target in zip(values, result):  # a sample at a time keeps the temporaries small
            target[...] = source
            if not np.array_equal(source, target):
                raise LossyConversion
    return result


def write_chunked(source, target_path, dtype, checksums):
    """Copy `source` to a new file at `target_path`, one sample a chunk, and compare what it then holds."""
    stem = source.name.strip('/').removeprefix('chunked_')
    # Without a chunk cache, chunks go straight to the file, and reading them back reads the file.
    with Interruption() as interruption, create_h5(target_path, rdcc_nbytes=0) as (file, storage):
        target = file.create_dataset(stem, source.shape, dtype, chunks=target_chunks(source),
                                     fletcher32=checksums)
        # The second name for the same data, which the original's data loader asks for.
        file[f'chunked_{stem}'] = target
        for new, old in (target, source), (file, source.file):
            for key, value in old.attrs.items():
                new.attrs[key] = value
        for key in source.file:
            if key not in file:  # whatever else the file holds goes along unchanged
                if has_own(source.file, key):
                    source.file.copy(key, file)
                else:
                    file[key] = source.file.get(key, getlink=True)
        start = 0
        name = '/'.join(Path(source.file.filename).parts[-2:])
        slabs = source_slabs(source, target.dtype, Path(target_path).parent) if source.ndim == 4 else [source[()]]
        with tqdm(total=len(source), desc=name, unit='image', leave=False, disable=None) as bar:
            for slab in slabs:
                target[start:start + len(slab)] = slab
                storage.check()
                interruption.check()
                if not same_bytes(np.ascontiguousarray(slab), target[start:start + len(slab)]):
                    raise OSError(errno.EIO, 'what was read back differs from what was written', str(target_path))
                start += len(slab)
                bar.update(len(slab))


def same_bytes(one, two):
    """Whether two contiguous arrays of one shape and type hold the same bytes, NaN or not."""
    one, two = one.reshape(-1).view(np.uint8), two.reshape(-1).view(np.uint8)
    whole = len(one) // 8 * 8  # numpy compares words twenty times as fast as bytes
    words_equal = np.array_equal(one[:whole].view(np.uint64), two[:whole].view(np.uint64))
    return words_equal and np.array_equal(one[whole:], two[whole:])


def target_chunks(source):
    """One sample a chunk for images and masks; one chunk for a whole label table.

    A box is 16 bytes and a label 1 or 2: as chunks of their own, each would carry an index entry
    larger than itself and cost a read of its own, where the whole table takes a single read.
    """
    return (1, *source.shape[1:]) if source.ndim == 4 else source.shape


def is_rechunked(file, stem, checksums=False):
    """True if the open file already has both names on the same data in the target layout."""
    if not has_checksums(file) or not has_own(file, stem) or not has_own(file, f'chunked_{stem}'):
        return False
    dataset = find_dataset(file, f'chunked_{stem}')
    return (file[stem] == dataset and dataset.chunks == target_chunks(dataset)
            and dataset.fletcher32 >= checksums)


def rechunk_file(path, force=False, checksums=False):
    """Rechunk one file, named after its dataset; return the number of samples, None if it was done.

    Numbers of another type in images and masks become uint8 if all are whole and from 0 to 255; each
    value is compared as it is read, and at the first that differs the stored type is kept instead.
    """
    path = Path(path)
    stem = path.stem
    with reading_h5(path) as file:
        # A file may hold nothing but the original's `chunked_` copy.
        key = stem if has_own(file, stem) else f'chunked_{stem}'
        source = find_dataset(file, key)
        count, stored = len(source), source.dtype
        if is_rechunked(file, stem, checksums) and not force:
            return None
    compact = np.dtype(np.uint8) if len(SHAPES[stem]) == 4 else stored
    with alone_in(os.path.dirname(os.path.realpath(path))), reading_h5(path) as file, replacing(path) as part:
        try:
            write_chunked(file[key], part, compact, checksums)
        except LossyConversion:
            write_chunked(file[key], part, stored, checksums)
    return count


# ---- a process for each file, which may crash


def in_own_process(seconds, function, *paths):
    """[function(path) for path in paths], on Linux in a process of its own with bounded time and memory.

    A file that was damaged or made to do harm can crash HDF5, keep it in a loop or let it ask for all
    memory. Raises InputError where that happens, also after `seconds` of computing (not of waiting), and
    the function's InputError or OSError. A daemonic process, which must not start any, calls it itself.
    """
    # On other systems a process has to import everything anew, which takes seconds.
    if sys.platform != 'linux' or multiprocessing.current_process().daemon:
        return list(map(function, paths))
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(receiver, sender, os.getpid(), seconds, function, paths))
    results = []
    try:
        with signals_blocked():
            process.start()
        sender.close()
        while len(results) < len(paths):
            results.append(receiver.recv())
            if isinstance(results[-1], Exception):
                raise results[-1]
    except EOFError:
        process.join()
        how = 'took too long' if process.exitcode == -signal.SIGPROF else f'ended with {process.exitcode}'
        raise InputError(f'{paths[len(results)]}: reading it {how}, as damage can cause; it is left as it was; '
                         'make it again') from None
    except KeyboardInterrupt:
        if process.pid:
            process.terminate()
            process.join(2)  # longer than it takes for a slab, but a loop in HDF5 does not end by itself
        raise
    finally:
        if process.pid:
            process.kill()
            process.join()
        for target in map(Path, map(os.path.realpath, paths)):
            target.with_name(f'{target.name}.{process.pid}.part').unlink(missing_ok=True)
    return results


def answer(receiver, sender, parent, seconds, function, paths):
    """What the process does; it answers with a value for each path, or an error at last."""
    receiver.close()  # or it would wait for itself to read a long answer when the parent has gone
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        in_use = 1024 * int(re.search(r'VmData:\s+(\d+)', Path('/proc/self/status').read_text())[1])
        most = in_use + (1 << 30) + 3 * sum(map(size_of, paths))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard < 0 else min(most, hard), hard))
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the parent
        if os.getppid() != parent:
            os._exit(1)
        for path in paths:
            sender.send(function(path))
    except (InputError, OSError) as error:
        sender.send(error)
    except KeyboardInterrupt:  # the parent says so
        return


def size_of(path):
    """Bytes of the file, 0 if there is none."""
    return os.stat(path).st_size if os.path.isfile(path) else 0


def rechunk(root, force=False, checksums=False):
    """Rechunk every file of every split under `root` and print a line for each."""
    root = Path(root)
    splits = [root / split for split in SPLITS if (root / split).is_dir()]
    if not splits:
        raise InputError(f'{root}: no folder train, val or test in it; data_prepare.py makes them')
    for folder in splits:
        for stem in SHAPES:
            path = folder / f'{stem}.h5'
            if stem in OPTIONAL and not path.exists():
                continue
            before, start = size_of(path), time.perf_counter()
            rechunk_one = partial(rechunk_file, force=force, checksums=checksums)
            # Nothing takes a second for a megabyte.
            [count] = in_own_process(60 + before / 1e6, rechunk_one, path)
            if count is None:
                print(f'{path}: already rechunked, nothing to do')
                continue
            sizes = f'{before / 1e6:.1f} MB -> {path.stat().st_size / 1e6:.1f} MB'
            print(f'{path}: {count} samples, {sizes}, {time.perf_counter() - start:.1f} s')


def main(argv=None):
    parser = argparse.ArgumentParser(
        description='Store every image and mask of the HDF5 splits as one chunk.'
    )
    parser.add_argument('--data', default='datasets/data_new', metavar='DIR',
                        help='folder with train/, val/ and test/ (default: %(default)s)')
    parser.add_argument('--force', action='store_true', help='rechunk finished files again')
    parser.add_argument('--checksums', action='store_true',
                        help='store a checksum with each chunk (fletcher32): damage is noticed when it is '
                             'read, and reading takes longer')
    args = parser.parse_args(argv)
    rechunk(args.data, args.force, args.checksums)


if __name__ == '__main__':
    run_script(main)
