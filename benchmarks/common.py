"""What the benchmarks share: the scripts on the path, their options, data, rounds, tables and last line."""

import argparse
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
sys.path.insert(0, str(ROOT))

from support.files import write_file  # noqa: E402


def parser(description):
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument('--json', metavar='FILE', help='also write all measurements to FILE')
    return result


def data_option(result, pets):
    result.add_argument(
        '--data',
        metavar='DIR',
        help=f'prepared and rechunked splits (default: {pets} drawn pets at 256 x 256 in a temporary folder)',
    )


@contextmanager
def prepared(data, pets, size=256):
    """The folder `data`, or drawn pets in a temporary folder if it is None."""
    if data is not None:
        yield Path(data)
        return
    with tempfile.TemporaryDirectory() as folder:
        script('data_prepare.py', '--source', 'synthetic', '--limit', pets, '--size', size, '--out', folder)
        script('data_rechunk.py', '--data', folder)
        yield Path(folder)


def script(name, *options):
    """Run one of the scripts to its end, its output left out."""
    command = [sys.executable, str(ROOT / name), *map(str, options)]
    status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if status:
        sys.exit(f'{name} ended with {status}')


def in_python(code, *arguments):
    """Run code in a process of its own that can import this file and the scripts; returns what it printed last."""
    command = [
        sys.executable,
        '-c',
        f'import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n{code}',
        *map(str, arguments),
    ]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


def peak_megabytes():
    """The peak of this process's memory, or of a child's if that is larger."""
    # Not getrusage for this process: what it says, a process takes over from its parent.
    own = re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]
    return max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def machine():
    """One line that says what was measured on, and with which versions."""
    processor = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                processor = line.partition(':')[2].strip()
    import h5py
    import torch
    import torchvision

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


def finish(ratio, metrics, path):
    """Write what was measured to `path`, if there is one, and print the ratio alone on the last line.

    `ratio` is None where there is nothing to compare with.
    """
    if path:
        text = json.dumps({'ratio': ratio, **metrics, 'machine': machine()}, indent=2) + '\n'
        write_file(path, lambda file: file.write(text.encode()))
    if ratio is None:
        print('ratio none')
    else:
        print(f'ratio {ratio:.3g}' if ratio < 100 else f'ratio {ratio:.0f}')
