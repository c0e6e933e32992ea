"""Write a trained model as one ONNX file, for prediction without torch.

    python export_onnx.py --out mtl_model.onnx    # needs: pip install onnx onnxscript onnxruntime

The input 'images' is uint8 (N, H, W, 3), RGB, at the size (H, W) that the model was trained for, any N. The outputs
are float32, for the tasks that the model has:

    breed_probabilities (N, C)       in [0, 1], for the C class names
    mask_probability    (N, H, W)    in [0, 1], above 0.5 where the pet is
    bbox                (N, 4)       xmin, ymin, xmax, ymax of the head in [0, 1] of width and height

The file's metadata has 'class_names', 'class_species' ('cat', 'dog' or null) and 'image_size' (H, W), each as JSON.
Before the file is put in its place, it is run with ONNX Runtime and compared with the model.
"""

import argparse
import json
import logging
import warnings
from importlib import import_module

import numpy as np
import torch
from torch import nn

from dataloader_mtl import normalise
from models import MODEL
from prediction import load_model
from support.cli import InputError, file_to_write, reason, run_script
from support.files import replacing

PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
LARGEST_DIFFERENCE = 1e-4  # between probabilities, and coordinates in [0, 1], of the file and of the model
OPSET = 18


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


def export(model, path):
    """Write the ONNX file of a model from `load_model`; returns the largest difference of its outputs from the model's.

    Raises InputError, and leaves `path` as it was, unless the difference is below LARGEST_DIFFERENCE.
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
    for name in 'class_names', 'class_species', 'image_size':
        program.model.metadata_props[name] = json.dumps(getattr(model, name))
    with replacing(path) as part:
        program.save(part)
        difference = compare(exported, part)
        if not difference < LARGEST_DIFFERENCE:  # also if it is NaN
            raise InputError(f"{path}: not written, as its outputs differ from the model's by {difference:.1e}")
    return difference


def compare(exported, path):
    """The largest difference of the ONNX file's outputs from those of an Exported, on three random images."""
    import onnxruntime

    images = np.random.default_rng(0).integers(0, 256, (3, *exported.model.image_size, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    with torch.inference_mode():
        pairs = zip(session.run(None, {'images': images}), exported(torch.from_numpy(images)), strict=True)
    return float(np.max([np.abs(found - expected.numpy()).max() for found, expected in pairs]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--model', default=MODEL, metavar='FILE', help='of train_mtl.py (default: mtl_model.pt beside this script)')
    add('--out', type=file_to_write, default='mtl_model.onnx', metavar='FILE', help='default: %(default)s')
    args = parser.parse_args(argv)
    require_packages()
    model = load_model(args.model)
    difference = export(model, args.out)
    height, width = model.image_size
    print(f'{args.out}: images (N, {height}, {width}, 3) uint8 -> {", ".join(Exported(model).names)}')
    print(f'largest difference from the model: {difference:.1e}')


if __name__ == '__main__':
    run_script(main)
