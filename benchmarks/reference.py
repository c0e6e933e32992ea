"""What the benchmarks compare with: the study's network, training and loader, and smp's Unet.

The reference network is the study's multi-task U-Net, rebuilt from its description. Four contracting blocks
of two convolutions and a max pooling, four expanding blocks that double the size with a transposed
convolution, a class head and a box head on the encoder's top; 3.67 million parameters. The study trained
it in float32, NCHW, batches of 32, with Adam at 1e-4, no augmentation, and the mean of Dice loss,
cross-entropy and L1; `StudyRun` does that.

Two defects of the study's heads are left out, a ReLU before the sigmoid of the box and dropout that
evaluation did not switch off: they cost no time, and the comparison is of masks.
"""

import importlib
from types import SimpleNamespace

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

import engine
import utils
from dataloader_mtl import MEAN, STD
from models import Outputs
from support.cli import InputError

CHANNELS = (32, 64, 128, 256)
BATCH_SIZE, LEARNING_RATE = 32, 1e-4  # of the study's training
ALL_TASKS = ('mask', 'class', 'box')
STEMS = ('images', 'masks', 'bboxes', 'binary')


# ---- the study


def double_conv(c_in, c_out, kernel):
    """(N, c_in, H, W) -> (N, c_out, H, W)."""
    layers = []
    for channels in (c_in, c_out):
        layers += [nn.Conv2d(channels, c_out, kernel, padding=kernel // 2), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


def expanding(c_in, c_out):
    """(N, c_in, H, W) -> (N, c_out, 2 H, 2 W)."""
    double = nn.ConvTranspose2d(c_out, c_out, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(double_conv(c_in, c_out, 3), double)


def class_head(n_classes):
    """(N, 256, 16, 16) -> (N, n_classes)."""
    convolutions = (nn.Conv2d(256, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2))
    linear = (nn.Linear(64, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, n_classes))
    return nn.Sequential(*convolutions, nn.Flatten(), *linear)


def box_head():
    """(N, 256, 16, 16) -> (N, 4)."""
    convolutions = [each for _ in range(2) for each in (nn.Conv2d(256, 256, 3), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 4), nn.Sigmoid())


class ReferenceNet(nn.Module):
    """(N, 3, H, W) -> Outputs, as the networks of models.py. The linear layers of the heads need 256 x 256."""

    def __init__(self, n_classes=2, tasks=ALL_TASKS):
        super().__init__()
        self.tasks = tasks
        kernels = (7, 3, 3, 3)
        self.encoder = nn.ModuleList(map(double_conv, (3, *CHANNELS), CHANNELS, kernels))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.expanding = nn.ModuleList(map(expanding, (256, 256, 128, 64), (128, 64, 32, 1)))
        self.label = class_head(n_classes) if 'class' in tasks else None
        self.bbox = box_head() if 'box' in tasks else None

    def forward(self, x, decode=None):
        """`decode` as in models.py: the masks of the chosen images alone; the rest is not computed less."""
        features = []
        for block in self.encoder:
            x = self.pool(block(x))
            features.append(x)
        label, bbox = (None if head is None else head(x) for head in (self.label, self.bbox))
        *skips, x = features
        x = self.expanding[0](x)
        for block, skip in zip(self.expanding[1:], reversed(skips)):
            x = block(torch.cat([x, skip], dim=1))
        return Outputs(label, x if decode is None else x[decode], bbox)


class StudyObjective(nn.Module):
    """As engine.Objective, with the study's loss: the mean of Dice loss, cross-entropy and L1."""

    def __init__(self, model, bfloat16):
        super().__init__()
        self.model, self.bfloat16, self.dice = model, bfloat16, utils.DiceLoss()

    def forward(self, batch):
        image, bbox, label, mask = batch
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.bfloat16):
            outputs = self.model(image)
        has_label, has_box = utils.label_known(label), utils.box_known(bbox)
        losses = (
            self.dice(outputs.mask, mask),
            utils.reduce(F.cross_entropy(outputs.label[has_label].float(), label[has_label], reduction='none'), 'mean'),
            utils.reduce((outputs.bbox[has_box].float() - bbox[has_box]).abs().mean(dim=1), 'mean'),
        )
        return sum(losses) / 3, {}


class StudyRun(engine.Run):
    """An engine.Run that trains a ReferenceNet as the study did; what is evaluated are the weights themselves."""

    def __init__(self, model, dataset, device):
        weighting = utils.WeightedLoss.equal(model.tasks)
        super().__init__(model, weighting, dataset, 1, LEARNING_RATE, LEARNING_RATE, False, device)
        self.objective = StudyObjective(self.model, self.bfloat16)
        self.optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        self.schedule = SimpleNamespace(step=lambda: None)
        self.average = SimpleNamespace(module=model, update_parameters=lambda model: None)


class StudyDataset(Dataset):
    """As the study did: float32 storage, four files opened for each sample."""

    def __init__(self, folder, count):
        self.folder, self.count = folder, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        values = []
        for stem in STEMS:
            with h5py.File(self.folder / f'{stem}.h5', 'r') as file:
                values.append(torch.from_numpy(file[f'chunked_{stem}'][index]))
        image, mask, bbox, label = values
        image = v2.functional.normalize(image.permute(2, 0, 1) / 255, MEAN, STD)
        return image, bbox / 255, label, mask.permute(2, 0, 1)


def write_study_files(folder, chosen, target):
    """The `chosen` samples of a split as the study's files."""
    for stem in STEMS:
        with h5py.File(folder / f'{stem}.h5') as source, h5py.File(target / f'{stem}.h5', 'w') as file:
            values = source[f'chunked_{stem}']
            shape = values.shape[1:]
            new = file.create_dataset(f'chunked_{stem}', (len(chosen), *shape), np.float32, chunks=(1, *shape))
            for row, index in enumerate(chosen):
                new[row] = values[index]


# ---- segmentation_models_pytorch


def import_smp():
    """The package; raises InputError if it is missing."""
    try:
        return importlib.import_module('segmentation_models_pytorch')
    except ImportError:
        raise InputError('segmentation_models_pytorch: missing; pip install -r benchmarks/requirements.txt') from None


class SmpUNet(nn.Module):
    """smp.Unet without pre-trained weights: (N, 3, H, W) -> Outputs with the mask alone."""

    tasks = ('mask',)

    def __init__(self, n_classes=None, encoder='resnet18'):
        super().__init__()
        unet = import_smp().Unet(encoder, encoder_weights=None)
        self.encoder, self.decoder, self.head = unet.encoder, unet.decoder, unet.segmentation_head

    def forward(self, x, decode=None):
        """`decode` as in models.py; the rest is not computed less."""
        mask = self.head(self.decoder(self.encoder(x)))
        return Outputs(None, mask if decode is None else mask[decode], None)
