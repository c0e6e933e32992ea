"""Write a trained model as one ONNX file, for prediction without torch, or as a page that runs it in a browser.

    python export_onnx.py --out mtl_model.onnx    # needs: pip install onnx onnxscript onnxruntime
    python export_onnx.py --web site              # the same; then: python -m http.server --directory site

The input 'images' is uint8 (N, H, W, 3), RGB, at the size (H, W) that the model was trained for, any N. The outputs
are float32, for the tasks that the model has:

    breed_probabilities (N, C)       in [0, 1], for the C class names
    mask_probability    (N, H, W)    in [0, 1], above 0.5 where the pet is
    bbox                (N, 4)       xmin, ymin, xmax, ymax of the head in [0, 1] of width and height

The file's metadata has 'class_names', 'class_species' ('cat', 'dog' or null) and 'image_size' (H, W), each as JSON.
Before the file is put in its place, it is run with ONNX Runtime and compared with the model.

The folder of --web holds index.html, from web/index.html, and mtl_model.onnx, the same file with weights of 16 bits,
which halves it. Any static server can serve it. The page loads ONNX Runtime Web from a public CDN; --runtime copies it
into the folder instead, from what `npm install onnxruntime-web@1.30.0` puts in node_modules/onnxruntime-web/dist.
"""

import argparse
import json
import logging
import shlex
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataloader_mtl import MEAN, STD, MTLDataset, normalise
from evaluation import evaluate
from models import MODEL, Outputs
from prediction import load_model
from support.cli import InputError, file_to_write, folder_to_write, reason, run_script
from support.files import replacing, require_file
from utils import PRINTED

PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
LARGEST_DIFFERENCE = 1e-4  # between probabilities, and coordinates in [0, 1], of the file and of the model
LARGEST_DIFFERENCE_OF_HALVES = 1e-2  # the same of a file with weights of 16 bits
OPSET = 18
METADATA = 'class_names', 'class_species', 'image_size'
PAGE = Path(__file__).with_name('web') / 'index.html'
MODEL_PLACE = '{"model": "none"}'  # what stands in the page where the model's metadata belongs
RUNTIME = 'ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm'
CDN = 'https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/'


class Exported(nn.Module):
    """A model as the ONNX file has it: images, uint8 (N, H, W, 3) -> a tuple of tensors, one for each of `names`.

    Also for torch.export and torch.jit.trace, which cannot handle the `Outputs` of a network.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        tasks = {'class': 'breed_probabilities', 'mask': 'mask_probability', 'box': 'bbox'}
        self.names = [name for task, name in tasks.items() if task in model.tasks]

    def forward(self, images):
        label, mask, bbox = self.model(normalise(images.permute(0, 3, 1, 2)))
        label = None if label is None else label.softmax(dim=1)
        mask = None if mask is None else mask.sigmoid()[:, 0]
        return tuple(output for output in (label, mask, bbox) if output is not None)


def require_packages():
    """Raise InputError, which says what to install, unless the packages of the export can be imported."""
    try:
        for name in PACKAGES:
            import_module(name)
    except ImportError as error:
        raise InputError(f'{reason(error)}; the export needs: pip install {" ".join(PACKAGES)}') from None


def export(model, path, half=False):
    """Write the ONNX file of a model from `load_model`; returns the largest difference of its outputs from the model's.

    With `half`, its weights have 16 bits. Raises InputError, and leaves `path` as it was, unless the difference is
    below LARGEST_DIFFERENCE, or LARGEST_DIFFERENCE_OF_HALVES.
    """
    exported = Exported(model).eval()
    # Two images, because the exporter would take an N of 1 for a fixed number.
    example = torch.zeros(2, *model.image_size, 3, dtype=torch.uint8)
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.onnx.export(
            exported,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim('N')},),
            input_names=['images'],
            output_names=exported.names,
            opset_version=OPSET,
            verbose=False,
        )
    for name in METADATA:
        program.model.metadata_props[name] = json.dumps(getattr(model, name))
    with replacing(path) as part:
        program.save(part)
        if half:
            halve_weights(part)
        difference = compare(exported, part)
        if not difference < (LARGEST_DIFFERENCE_OF_HALVES if half else LARGEST_DIFFERENCE):  # also if it is NaN
            raise InputError(f"{path}: not written, as its outputs differ from the model's by {difference:.1e}")
    return difference


def halve_weights(path):
    """Store the kernels and matrices of an ONNX file as float16, each with a Cast to float32 behind it.

    Biases stay as they are, as in a model file. What the exporter noted about its source files is removed.
    """
    import onnx

    program = onnx.load(path)
    nodes, casts = list(program.graph.node), []
    for node in nodes:
        del node.metadata_props[:]
    for weight in program.graph.initializer:
        values, name = onnx.numpy_helper.to_array(weight), weight.name
        if values.dtype == np.float32 and values.ndim > 1:
            weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f'{name}.half'))
            casts.append(onnx.helper.make_node('Cast', [weight.name], [name], to=onnx.TensorProto.FLOAT))
    del program.graph.node[:]
    program.graph.node.extend(casts + nodes)
    onnx.save(program, path)


def compare(exported, path):
    """The largest difference of the ONNX file's outputs from those of an Exported, on three random images."""
    import onnxruntime

    images = np.random.default_rng(0).integers(0, 256, (3, *exported.model.image_size, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    with torch.inference_mode():
        pairs = zip(session.run(None, {'images': images}), exported(torch.from_numpy(images)), strict=True)
    return float(np.max([np.abs(found - expected.numpy()).max() for found, expected in pairs]))


class FromFile(nn.Module):
    """An ONNX file as a network: normalised images (N, 3, H, W) -> Outputs, the logits of its probabilities."""

    def __init__(self, path):
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        self.names = [output.name for output in self.session.get_outputs()]

    def forward(self, x):
        pixels = (x.movedim(1, -1) * torch.tensor(STD) + torch.tensor(MEAN)) * 255
        values = self.session.run(None, {'images': pixels.round().to(torch.uint8).numpy()})
        found = {name: torch.from_numpy(value) for name, value in zip(self.names, values)}
        breeds, mask = found.get('breed_probabilities'), found.get('mask_probability')
        return Outputs(
            label=None if breeds is None else breeds.clamp(min=1e-12).log(),
            mask=None if mask is None else mask[:, None].logit(eps=1e-7),
            bbox=found.get('bbox'),
        )


def read_reported(path):
    """{metric: value} of the test in a run's metrics.json; {} for None."""
    if path is None:
        return {}
    require_file(path, '--reported takes the metrics.json of a run')
    try:
        return {name: values['mean'] for name, values in json.loads(Path(path).read_text())['test'].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f'{path}: is not the metrics.json of a run') from None


def print_test(model, path, data, reported):
    """Print the metrics of a model and of its ONNX file on the test split of `data`.

    Beside them `reported`, {metric: value}, unless it is empty.
    """
    dataset, cpu = MTLDataset('test', root=data), torch.device('cpu')
    for what in 'class_names', 'image_size':
        if getattr(dataset.split, what) != getattr(model, what):
            raise InputError(f"{data}: the {what} of its test split differ from the model's")
    columns = [evaluate(model, dataset, cpu), evaluate(FromFile(path), dataset, cpu)]
    titles = ['the model', 'the file']
    if reported:
        columns.append(reported)
        titles.append('reported')
    print(f'{f"test split of {data}":45}' + ''.join(f'{title:>12}' for title in titles))
    for name in columns[0]:
        if name in PRINTED:
            values = ''.join(f'{column[name]:12.4f}' if name in column else ' ' * 12 for column in columns)
            print(f'{PRINTED[name]:45}{values}')


def write_page(model, folder, runtime=None):
    """Write the folder of the page for a model from `load_model`; returns the difference, as `export` does.

    runtime: the folder that has the files RUNTIME, which are copied; the page loads them from CDN if it is None.

    Raises InputError, before anything is written, for a missing file, and as `export` does.
    """
    folder, contents = Path(folder), {}
    if runtime is not None:
        for name in RUNTIME:
            path = Path(runtime) / name
            require_file(path, "--runtime takes the folder 'dist' of the npm package onnxruntime-web")
            contents[f'runtime/{name}'] = path.read_bytes()
    about = {name: getattr(model, name) for name in METADATA}
    about['runtime'] = CDN if runtime is None else './runtime/'
    text = json.dumps(about).replace('<', '\\u003c')  # a name cannot end the page's script
    contents['index.html'] = PAGE.read_text(encoding='utf-8').replace(MODEL_PLACE, text).encode()
    difference = export(model, folder / 'mtl_model.onnx', half=True)
    for name, content in contents.items():
        with replacing(folder / name) as part:
            part.write_bytes(content)
    return difference


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--model', default=MODEL, metavar='FILE', help='a model file (default: mtl_model.pt beside this script)')
    add('--out', type=file_to_write, metavar='FILE', help='default: mtl_model.onnx; with --web: no file')
    add('--web', type=folder_to_write, metavar='DIR', help='write the page that runs the model in a browser')
    add('--runtime', metavar='DIR', help="the folder 'dist' of onnxruntime-web, for --web (default: from a CDN)")
    add('--test', metavar='DIR', help='also print the metrics of the model and of the file on the test split in DIR')
    add('--reported', metavar='FILE', help='a metrics.json whose metrics stand beside them')
    args = parser.parse_args(argv)
    if args.runtime is not None and args.web is None:
        parser.error('--runtime is for --web')
    if args.test is not None and args.web is not None and not args.out:
        parser.error('--test is for --out')
    if args.reported is not None and args.test is None:
        parser.error('--reported is for --test')
    require_packages()
    reported = read_reported(args.reported)
    model = load_model(args.model)
    print(f'exporting {args.model}', flush=True)  # which takes half a minute
    if args.web is not None:
        difference = write_page(model, args.web, args.runtime)
        print(f'{args.web}: the page; python -m http.server --directory {shlex.quote(args.web)} serves it')
        print(f'largest difference from the model: {difference:.1e}')
    if args.out or args.web is None:
        out = args.out or 'mtl_model.onnx'
        difference = export(model, out)
        height, width = model.image_size
        print(f'{out}: images (N, {height}, {width}, 3) uint8 -> {", ".join(Exported(model).names)}')
        print(f'largest difference from the model: {difference:.1e}')
        if args.test is not None:
            print_test(model, out, args.test, reported)


if __name__ == '__main__':
    run_script(main)
