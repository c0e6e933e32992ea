"""What the benchmarks share: options, data, rounds and tables."""

import argparse
import io
import os
import platform
import shlex
import statistics
import sys
import tempfile
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import h5py
import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data_prepare  # noqa: E402
import data_rechunk  # noqa: E402
from support.cli import whole_number  # noqa: E402


def make_parser(description, rounds=None, pets=None, size=256):
    """A parser; with --rounds if it has a default, with --data if there are `pets` to draw instead, at `size`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        parser.add_argument('--rounds', type=whole_number(1), default=rounds, help='default: %(default)s')
    if pets:
        data_help = f'prepared and rechunked splits (default: {pets} drawn pets of {size} x {size}, kept nowhere)'
        parser.add_argument('--data', metavar='DIR', help=data_help)
    return parser


def add_threads(parser):
    threads = torch.get_num_threads()
    parser.add_argument('--threads', type=whole_number(1), default=threads, help='of torch (default: %(default)s)')


@contextmanager
def prepared(data, pets, size=256):
    """The folder `data`, or drawn pets in a temporary folder if it is None."""
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(io.StringIO()):
            data_prepare.main(['--source', 'synthetic', '--limit', str(pets), '--size', str(size), '--out', folder])
            data_rechunk.main(['--data', folder])
        yield folder


def machine():
    """The processor, its threads, and the versions, in a line."""
    processor = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                processor = line.partition(':')[2].strip()
    versions = ', '.join(f'{module.__name__} {module.__version__}' for module in (torch, torchvision, h5py))
    return f'{processor}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}'


def print_heading(parser, argv):
    """The command and the machine."""
    options = shlex.join(sys.argv[1:] if argv is None else map(str, argv))
    print(f'python benchmarks/{parser.prog} {options}'.rstrip())
    print(machine(), flush=True)


def in_turns(measures, rounds):
    """{name: its value in each round} of {name: function that measures once}.

    One after the other in every round, so that what else the machine does meets all of them.
    """
    values = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            values[name].append(measure())
    return values


def median_ratio(values, others):
    """The median over the rounds of `values` to `others`."""
    return statistics.median(value / other for value, other in zip(values, others))


def with_range(values, digits):
    """The median and, in brackets, the lowest and the highest."""
    median, low, high = (f'{each:.{digits}f}' for each in (statistics.median(values), min(values), max(values)))
    return f'{median} ({low}-{high})'


def print_table(titles, rows):
    """Rows of text; the first column is on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    for first, *others in (titles, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        print('  '.join(cells).rstrip())
