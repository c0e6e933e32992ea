"""How fast is rechunking, and in how much memory? data_rechunk.py against h5repack, h5diff and sync.

    python benchmarks/rechunk.py                    # drawn images; h5repack is in Debian's hdf5-tools
    python benchmarks/rechunk.py --data datasets/data_new

Rechunks images stored contiguously, and in chunks of many samples and a piece of the picture with gzip,
to one image a chunk. Ours compares every value with the source and waits until the disk has the file;
h5repack with the same target layout, then h5diff of the two files and sync of the new one promise the same.
h5repack alone is printed, too. They take turns in every round; printed are the median over the rounds and the
lowest and highest. The start of Python, once for all files, is not counted. The default --count is close
below the 256 MiB that h5repack holds in memory; of larger files it makes many small pieces and is fifteen
times slower. The peak memory is that of the larger of our two processes at 500 and at 5,000 images. Expect
three minutes.

The ratio: seconds of h5repack, h5diff and sync to ours, the smaller of the two sources; none without h5repack.
"""

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import common
import h5py
import numpy as np

from support.cli import run_script, whole_number
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
OURS, REPACK, COMPARED = 'data_rechunk.py', 'h5repack alone', 'h5repack, h5diff, sync'


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


def rechunk(path):
    """(seconds, MB at the peak) of data_rechunk.py."""
    seconds, memory = common.in_python(RECHUNK, path).split()
    return float(seconds), float(memory)


def repack(path):
    """Seconds of (h5repack alone, h5repack, h5diff and sync)."""
    target = path.with_name('target.h5')
    target.unlink(missing_ok=True)
    with h5py.File(path) as file:
        chunk = 'x'.join(map(str, (1, *file['images'].shape[1:])))
    start = time.perf_counter()
    subprocess.run(['h5repack', '-l', f'images:CHUNK={chunk}', '-f', 'images:NONE', path, target], check=True)
    alone = time.perf_counter() - start
    subprocess.run(['h5diff', path, target], check=True)
    subprocess.run(['sync', target, target.parent], check=True)
    return alone, time.perf_counter() - start


def measure(source, folder, rounds, with_repack):
    """{OURS, REPACK, COMPARED: seconds of each round} for the file `source`."""
    path = folder / 'images.h5'

    def fresh():
        shutil.copyfile(source, path)
        os.sync()  # what is still to be written is not waited for in what is measured
        return path

    functions = {OURS: lambda: rechunk(fresh())[0]} | ({REPACK: lambda: repack(fresh())} if with_repack else {})
    seconds = common.in_turns(functions, rounds)
    if with_repack:
        seconds[REPACK], seconds[COMPARED] = map(list, zip(*seconds[REPACK]))
    return seconds


def main(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument('--data', metavar='DIR', help='prepared splits to take images from (default: drawn ones)')
    parser.add_argument('--count', type=whole_number(64), default=1280, help='images (default: %(default)s)')
    parser.add_argument('--rounds', type=whole_number(1), default=5, help='default: %(default)s')
    args = parser.parse_args(argv)
    common.print_heading(parser, argv)
    with_repack = bool(shutil.which('h5repack') and shutil.which('h5diff'))
    if not with_repack:
        print("h5repack and h5diff: not found, so they are left out; they come with Debian's hdf5-tools")
    block, metrics, rows, ratios = block_of_images(args.data), {}, [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / 'data' / 'train'
        folder.mkdir(parents=True)
        for layout, options in LAYOUTS.items():
            source, memory = Path(scratch) / 'source.h5', []
            write_source(source, block, args.count, options)
            seconds = measure(source, folder, args.rounds, with_repack)
            for count in 500, 5000:
                write_source(folder / 'images.h5', block, count, options)
                memory.append(rechunk(folder / 'images.h5')[1])
            speeds = {
                name: [args.count * block[0].nbytes / 1e6 / each for each in times] for name, times in seconds.items()
            }
            metrics[layout] = {'mb_per_second': speeds, 'peak_mb': memory}
            for name, each in speeds.items():
                to_ours = statistics.median(a / b for a, b in zip(each, speeds[OURS]))
                peak = '{:.0f} and {:.0f}'.format(*memory) if name == OURS else ''
                rows.append([f'{layout}: {name}', common.with_range(each, 0), f'{to_ours:.2f}', peak])
                if name == COMPARED:
                    ratios.append(1 / to_ours)
    common.print_table(['', 'MB/s (range)', 'to ours', 'MB at the peak, 500 and 5,000 images'], rows)
    common.finish(min(ratios, default=None), metrics, args.json)


if __name__ == '__main__':
    run_script(main)
