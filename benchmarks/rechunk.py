"""How fast is rechunking, and in how much memory? data_rechunk.py against h5repack.

    python benchmarks/rechunk.py                    # drawn images; needs h5repack (Debian: hdf5-tools)
    python benchmarks/rechunk.py --data datasets/data_new

Rechunks images stored contiguously, and in chunks of many samples and a piece of the picture with gzip,
to one image a chunk. h5repack is given the same target layout. Ours also compares every value with the
source and waits until the disk has it; the start of Python, once for all files, is not counted. Each
is the best of --repeats. The default --count is close below the 256 MiB that h5repack holds in memory;
of larger files it makes many small pieces and is fifteen times slower. The peak memory is that of the
larger of our two processes at 500 and at 5,000 images. The ratio: our bytes a second to h5repack's, the
smaller of the two sources.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import common
import h5py
import numpy as np

from support.cli import InputError, run_script, whole_number
from synthetic_pets import draw_pet

LAYOUTS = {
    'contiguous': {},
    'gzip in bad chunks': {'chunks': (64, 64, 64, 3), 'compression': 'gzip', 'compression_opts': 4},
}
RECHUNK = """
import time, common, data_rechunk
start = time.perf_counter()
data_rechunk.rechunk_file(sys.argv[1])
print(time.perf_counter() - start, common.peak_megabytes())
"""


def block_of_images(data):
    """64 images (64, H, W, 3) uint8 of `data`, or drawn ones."""
    if data:
        with h5py.File(Path(data) / 'train' / 'images.h5') as file:
            return file['images'][:64]
    return np.stack([draw_pet(index, size=256).image for index in range(64)])


def write_source(path, block, count, layout):
    with h5py.File(path, 'w') as file:
        target = file.create_dataset('images', (count, *block.shape[1:]), np.uint8, **layout)
        for start in range(0, count, len(block)):
            # Shifted, so that no two images are the same.
            target[start : start + len(block)] = np.roll(block, start // len(block), axis=2)[: count - start]


def h5repack(path, chunk):
    """Seconds of h5repack."""
    target = path.with_name('target.h5')
    target.unlink(missing_ok=True)
    start = time.perf_counter()
    subprocess.run(['h5repack', '-l', f'images:CHUNK={chunk}', '-f', 'images:NONE', path, target], check=True)
    return time.perf_counter() - start


def rechunk(path):
    """(seconds, MB at the peak) of data_rechunk.py."""
    seconds, memory = common.in_python(RECHUNK, path).split()
    return float(seconds), float(memory)


def main(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument('--data', metavar='DIR', help='prepared splits to take images from (default: drawn ones)')
    parser.add_argument('--count', type=whole_number(64), default=1280, help='images (default: %(default)s)')
    parser.add_argument('--repeats', type=whole_number(1), default=3, help='default: %(default)s')
    args = parser.parse_args(argv)
    if not shutil.which('h5repack'):
        raise InputError("h5repack: not found; it comes with Debian's hdf5-tools")
    block, metrics = block_of_images(args.data), {}
    chunk = 'x'.join(map(str, (1, *block.shape[1:])))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / 'data' / 'train'
        folder.mkdir(parents=True)
        for name, layout in LAYOUTS.items():
            source, path = Path(scratch) / 'source.h5', folder / 'images.h5'
            write_source(source, block, args.count, layout)
            megabytes = args.count * block[0].nbytes / 1e6
            theirs, mine, memory = [], [], []
            for _ in range(args.repeats):
                shutil.copyfile(source, path)
                os.sync()
                theirs.append(megabytes / h5repack(path, chunk))
                mine.append(megabytes / rechunk(path)[0])
            theirs, mine = max(theirs), max(mine)
            for count in 500, 5000:
                write_source(path, block, count, layout)
                memory.append(rechunk(path)[1])
            metrics[name] = {'h5repack': theirs, 'data_rechunk': mine, 'peak_memory': memory}
            print(
                f'{name}: data_rechunk.py {mine:.0f} MB/s, h5repack {theirs:.0f} MB/s, ratio {mine / theirs:.2f}; '
                f'peak memory {memory[0]:.0f} MB for 500 images, {memory[1]:.0f} MB for 5,000'
            )
    common.finish(min(each['data_rechunk'] / each['h5repack'] for each in metrics.values()), metrics, args.json)


if __name__ == '__main__':
    run_script(main)
