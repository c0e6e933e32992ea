"""What the benchmarks compare with: the original's network and training, and segmentation_models_pytorch's Unet.

`ReferenceNet` is the original's multi-task U-Net, rebuilt from its description. Four contracting blocks of two
convolutions and a max pooling, four expanding blocks that double the size with a transposed convolution, a class
head and a box head on the encoder's top; 3.67 million parameters. The original trained it in float32, NCHW, batches
of 32, with Adam at 1e-4, no augmentation, and the mean of Dice loss, cross-entropy and L1; `OriginalRun` does that.

Two defects of the original's heads are left out, a ReLU before the sigmoid of the box and dropout that evaluation
did not switch off: they cost no time, and the comparison is of masks.
"""

import importlib

import common  # noqa: F401  the scripts on the path
import torch
from torch import nn

import engine
import utils
from models import Outputs
from support.cli import InputError

CHANNELS = (32, 64, 128, 256)
LEARNING_RATE = 1e-4  # of the original's training


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

    tasks = ('mask', 'class', 'box')

    def __init__(self, n_classes=2):
        super().__init__()
        kernels = (7, 3, 3, 3)
        self.encoder = nn.ModuleList(map(double_conv, (3, *CHANNELS), CHANNELS, kernels))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.expanding = nn.ModuleList(map(expanding, (256, 256, 128, 64), (128, 64, 32, 1)))
        self.label = class_head(n_classes)
        self.bbox = box_head()

    def forward(self, x):
        features = []
        for block in self.encoder:
            x = self.pool(block(x))
            features.append(x)
        *skips, top = features
        x = self.expanding[0](top)
        for block, skip in zip(self.expanding[1:], reversed(skips)):
            x = block(torch.cat([x, skip], dim=1))
        return Outputs(self.label(top), x, self.bbox(top))


class OriginalObjective(engine.Objective):
    """engine.Objective with the original's loss: the mean of Dice loss, cross-entropy and L1."""

    def forward(self, batch):
        with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=self.bfloat16):
            outputs = self.model(batch.image)
        rows = utils.box_known(batch.bbox)
        losses = (
            utils.DiceLoss()(outputs.mask, batch.mask),
            utils.ClassLoss(smoothing=0)(outputs.label, batch.label),
            utils.reduce((outputs.bbox[rows].float() - batch.bbox[rows]).abs().mean(dim=1), 'mean'),
        )
        return sum(losses) / 3, {}


class OriginalRun(engine.Run):
    """An engine.Run that trains a ReferenceNet as the original did."""

    def __init__(self, network, weighting, config):
        super().__init__(network, weighting, config)
        self.objective = OriginalObjective(self.model, self.weighting, self.bfloat16)
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1)

    def draw(self, epoch):
        """The batches of an epoch, without the augmentation that train_one_epoch has just chosen."""
        dataset = self.splits['train'].dataset
        dataset.transform = None
        dataset.zoom_out = dataset.remove_pets = dataset.poor_light = 0
        return super().draw(epoch)


class SmpUNet(nn.Module):
    """smp.Unet without pretrained weights: (N, 3, H, W) -> Outputs, only the mask."""

    tasks, name = ('mask',), 'resnet18'

    def __init__(self, n_classes=None):
        super().__init__()
        unet = import_smp().Unet(self.name, encoder_weights=None)
        self.encoder, self.decoder, self.head = unet.encoder, unet.decoder, unet.segmentation_head

    def forward(self, x):
        return Outputs(None, self.head(self.decoder(self.encoder(x))), None)


class SmpUNet34(SmpUNet):
    name = 'resnet34'


def import_smp():
    """segmentation_models_pytorch; raises InputError if it is missing."""
    try:
        return importlib.import_module('segmentation_models_pytorch')
    except ImportError:
        raise InputError('segmentation_models_pytorch: missing; pip install -r benchmarks/requirements.txt') from None
