"""What the benchmarks share: the scripts on the path, their options, data to work on, their last line."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data_rechunk


def parser(description):
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument('--json', metavar='FILE', help='also write all figures to FILE')
    return result


def data_option(result, pets):
    result.add_argument('--data', metavar='DIR', help='prepared and rechunked splits '
                        f'(default: {pets} drawn pets at 256 x 256, made for the occasion)')


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


def script(name, *options, **environment):
    """Run one of the scripts to its end; returns what it printed."""
    command = [sys.executable, str(ROOT / name), *map(str, options)]
    done = subprocess.run(command, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f'{name} ended with {done.returncode}')
    return done.stdout


def machine():
    """One line that says what the figures were measured on."""
    processor = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                processor = line.partition(':')[2].strip()
    import torch
    return (f'{processor}, {torch.get_num_threads()} threads, Python {platform.python_version()}, '
            f'torch {torch.__version__}')


def finish(ratio, figures, path):
    """Write the figures and print the ratio alone on the last line."""
    if path:
        content = {'ratio': ratio, **figures, 'machine': machine()}
        text = json.dumps(content, indent=2) + '\n'
        data_rechunk.write_file(path, lambda file: file.write(text.encode()))
    print(f'ratio {ratio:.3g}' if ratio < 100 else f'ratio {ratio:.0f}')
