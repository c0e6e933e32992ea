"""How long does one photograph take? mtl_vis.py from the command line, and prediction alone.

    python benchmarks/startup.py                        # a drawn pet
    python benchmarks/startup.py --photograph cat.jpg

Times `python mtl_vis.py PHOTOGRAPH` from start to the written picture against a Python that imports
torch, torchvision and matplotlib.pyplot and ends, in turns, each the best of --repeats. Then images a
second of `predict`, one photograph after another. The ratio: the command to the imports.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from PIL import Image

from mtl_vis import load_model, predict
from support.cli import run_script, whole_number
from synthetic_pets import draw_pet

IMPORTS = 'import torch, torchvision, matplotlib.pyplot'


def seconds(command):
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=common.ROOT)
    return time.perf_counter() - start


def main(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument('--photograph', type=Path, metavar='FILE', help='default: a drawn pet')
    parser.add_argument('--model', default=common.ROOT / 'mtl_model.pt', metavar='FILE', help='default: %(default)s')
    parser.add_argument('--repeats', type=whole_number(1), default=5, help='default: %(default)s')
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        path = args.photograph or Path(scratch) / 'pet.jpg'
        if args.photograph is None:
            Image.fromarray(draw_pet(0, size=512).image).save(path)
        commands = {
            'imports': [sys.executable, '-c', IMPORTS],
            'mtl_vis.py': [
                sys.executable,
                str(common.ROOT / 'mtl_vis.py'),
                str(path.resolve()),
                '--model',
                str(args.model),
                '--out',
                str(Path(scratch) / 'mask.png'),
            ],
        }
        times = {name: [] for name in commands}
        for _ in range(args.repeats + 1):  # the first fills the system's cache
            for name, command in commands.items():
                times[name].append(seconds(command))
        best = {name: min(each[1:]) for name, each in times.items()}

        model, photograph = load_model(args.model), Image.open(path)
        predict(model, photograph)
        start, count = time.perf_counter(), 30
        for _ in range(count):
            predict(model, photograph)
        speed = count / (time.perf_counter() - start)
    print(f'imports alone {best["imports"]:.2f} s; mtl_vis.py to the picture {best["mtl_vis.py"]:.2f} s')
    print(f'predict: {speed:.1f} photographs of {photograph.size[0]} x {photograph.size[1]} pixels a second')
    common.finish(best['mtl_vis.py'] / best['imports'], {'seconds': best, 'predictions_per_second': speed}, args.json)


if __name__ == '__main__':
    run_script(main)
