"""A U-Net with a shared encoder, our own or one of timm: mask decoder, class head and box head, put together.

    MTLNet       mask, class and box
    UNet         mask                    (the single-task baseline)
    AblatedNet   mask and class
    AblatedNet2  mask and box
    ClassNet, BoxNet, ClassBoxNet   class, box, class and box

Every network takes float images (N, c_in, H, W) whose sides are multiples of 16 from 64 to 4,096, and
returns `Outputs`. Shapes are written (N, C, H, W); /k stands for a side divided by k, rounded up.

The finest convolutions work at half resolution: on a CPU, most of a U-Net's time goes into full resolution,
and a pet's outline is smooth enough for its logits to be interpolated.
"""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dataloader_mtl import MEAN, STD
from support.checkpoint import MODEL_FORMAT, is_finite, load_checkpoint
from support.cli import InputError, are_names, reason
from support.hdf5 import LARGEST_SIDE, is_image_size
from support.splits import SPECIES
from support.timm_models import create_features

MODEL = str(Path(__file__).with_name('mtl_model.pt'))  # what train_mtl.py writes and mtl_vis.py reads
CHANNELS = (32, 64, 128, 256, 256)  # of our own encoder at /2, /4, /8, /16 and /32
# Of the mask decoder at /2, /4, /8 and /16 with an encoder of timm, whose own channels range from 16 to 2048.
TIMM_WIDTHS = (32, 48, 64, 128)


class Outputs(NamedTuple):
    """What a network returns; None for a task that it does not have."""

    label: torch.Tensor | None  # (N, n_classes) class logits
    mask: torch.Tensor | None  # (N, c_out_seg, H, W) mask logits
    bbox: torch.Tensor | None  # (N, 4) xmin, ymin, xmax, ymax in [0, 1], xmin <= xmax, ymin <= ymax


def conv_bn_relu(c_in, c_out, kernel=3, stride=1):
    """(N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""
    padding = (kernel - 1) // 2
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


class Encoder(nn.Module):
    """(N, c_in, H, W) -> features [(N, 32, /2), (N, 64, /4), (N, 128, /8), (N, 256, /16), (N, 256, /32)]."""

    def __init__(self, c_in):
        super().__init__()
        self.channels = CHANNELS
        self.stages = nn.ModuleList()
        for level, c_out in enumerate(CHANNELS):
            # 4x4 at stride 2 sees every pixel equally often, as 3x3 at stride 2 does not.
            first = conv_bn_relu(c_in, c_out, kernel=4 if level == 0 else 3, stride=2)
            self.stages.append(nn.Sequential(first, conv_bn_relu(c_out, c_out)))
            c_in = c_out

    def forward(self, x):
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class TimmEncoder(nn.Module):
    """A model of timm, the library of image encoders (Wightman 2019): (N, 3, H, W) -> features at /2 to /32.

    Images come normalised with the MEAN and STD of the pets and are brought to the mean and std that the encoder was
    trained with.

    Args:
        name, weights: see `create_features`.
    """

    def __init__(self, name, weights='none'):
        super().__init__()
        self.features = create_features(name, weights)
        self.channels = tuple(self.features.feature_info.channels())
        config = self.features.pretrained_cfg
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
        own_mean, own_std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        self.register_buffer('scale', own_std / std)
        self.register_buffer('offset', (own_mean - mean) / std)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d) and is_slow_in_bfloat16(module):
                module.forward = partial(in_float32, module, type(module).forward)

    def freeze_shallow(self):
        """Freeze the layers that lead to the features at /4.

        Edges and colours are alike in all photographs, and these layers take a third of a training step.
        """
        parameters = list(self.features.parameters())
        shallow = self.features.eval()(torch.zeros(1, 3, 64, 64))[1]
        gradients = torch.autograd.grad(shallow.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.requires_grad_(gradient is None)
        self.features.train(self.training)

    def forward(self, x):
        return self.features(torch.addcmul(self.offset, x, self.scale))


def is_slow_in_bfloat16(conv):
    """Whether it is a depthwise convolution whose backward pass on a CPU takes 2 to 10 times as long in bfloat16."""
    return conv.groups == conv.in_channels > 1 and (max(conv.kernel_size) > 3 or max(conv.stride) > 1)


def in_float32(conv, forward, x):
    """The `forward` of a convolution, in float32 on a CPU also under autocast."""
    if x.device.type != 'cpu' or not torch.is_autocast_enabled('cpu'):
        return forward(conv, x)
    with torch.autocast('cpu', enabled=False):
        return forward(conv, x.float()).to(x.dtype)


class Decoder(nn.Module):
    """Features from fine to coarse -> maps (N, c_out, h, w) of the size of the finest.

    Each level reduces the coarser features to its own width, doubles their size, adds its features and convolves
    once: a quarter of the cost of concatenation and two convolutions.
    """

    def __init__(self, channels, widths, c_out):
        super().__init__()
        *skips, below = channels
        self.narrow, self.lateral, self.stages = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for skip, width in zip(reversed(skips), reversed(widths)):
            self.narrow.append(nn.Conv2d(below, width, 1))
            self.lateral.append(nn.Identity() if skip == width else nn.Conv2d(skip, width, 1))
            self.stages.append(conv_bn_relu(width, width))
            below = width
        self.logits = nn.Conv2d(below, c_out, 1)

    def forward(self, features):
        *skips, x = features
        for narrow, lateral, stage, skip in zip(self.narrow, self.lateral, self.stages, reversed(skips)):
            # Nearest neighbour before a convolution cannot make a checkerboard; a transposed
            # convolution can (Odena et al., Distill 2016).
            x = F.interpolate(narrow(x), size=skip.shape[-2:], mode='nearest')
            x = stage(x + lateral(skip))
        return self.logits(x)


class ClassHead(nn.Module):
    """Encoder features -> class logits (N, n_classes)."""

    def __init__(self, channels, n_classes, width=512):
        super().__init__()
        self.features = conv_bn_relu(channels[-1], width, kernel=1)
        self.dropout = nn.Dropout(0.3)  # a module, so that eval() switches it off
        self.logits = nn.Linear(width, n_classes)

    def forward(self, features):
        return self.logits(self.dropout(self.features(features[-1]).mean(dim=(2, 3))))

    @torch.no_grad()
    def divide_logits(self, temperature):
        """Divide all logits to come, by way of the last layer."""
        for parameter in self.logits.parameters():
            parameter.div_(temperature)


class BoxHead(nn.Module):
    """Encoder features -> boxes (N, 4), ordered and in [0, 1] by construction.

    Four maps of logits at /8, one for each side; a side is the mean position under the softmax of its map (integral
    regression: Sun et al., ECCV 2018). The position of a cell runs from 0 at the first to 1 at the last, so a side can
    lie on the border, and never outside.
    """

    def __init__(self, channels, width=96):
        super().__init__()
        self.sides = Decoder(channels[-3:], (width, width), 4)

    def forward(self, features):
        maps = self.sides(features[-3:]).float()  # (N, 4, h, w)
        weights = maps.flatten(2).softmax(dim=2).view_as(maps)
        # Products and sums, not matrix products, which autocast would round to bfloat16.
        x = (weights[:, :2].sum(dim=2) * torch.linspace(0, 1, maps.shape[3], device=maps.device)).sum(dim=2)
        y = (weights[:, 2:].sum(dim=3) * torch.linspace(0, 1, maps.shape[2], device=maps.device)).sum(dim=2)
        # Sums of softmax weights can exceed 1 by a rounding error.
        return torch.stack([x.amin(dim=1), y.amin(dim=1), x.amax(dim=1), y.amax(dim=1)], dim=1).clamp(0, 1)


class SharedEncoderNet(nn.Module):
    """One encoder, and a decoder or head for each of `tasks`, out of 'mask', 'class' and 'box'.

    Args:
        c_in: channels of the images.
        c_out_seg: channels of the mask logits.
        n_classes: number of class logits; unused without the task 'class'.
        encoder: 'unet', our own, or the name of a timm model (`TimmEncoder`; c_in must be 3).
        encoder_weights: of a timm model: 'imagenet', 'none' or a file (`create_features`).

    `forward(x)` takes float images (N, c_in, H, W) and returns Outputs. Raises ValueError for sides that are not
    multiples of 16 from 64 to 4,096.
    """

    tasks = ()

    def __init__(self, c_in=3, c_out_seg=1, n_classes=37, encoder='unet', encoder_weights='none'):
        super().__init__()
        self.encoder_name = encoder
        self.encoder = Encoder(c_in) if encoder == 'unet' else TimmEncoder(encoder, encoder_weights)
        channels = self.encoder.channels
        widths = channels[:-1] if encoder == 'unet' else TIMM_WIDTHS
        self.decoder = Decoder(channels, widths, c_out_seg) if 'mask' in self.tasks else None
        self.class_head = ClassHead(channels, n_classes) if 'class' in self.tasks else None
        self.box_head = BoxHead(channels) if 'box' in self.tasks else None

    def train(self, mode=True):
        """As nn.Module.train, but frozen layers keep their BatchNorm statistics."""
        super().train(mode)
        for module in self.modules():
            if any(not parameter.requires_grad for parameter in module.parameters(recurse=False)):
                module.eval()
        return self

    def forward(self, x):
        size = x.shape[-2:]
        if not is_image_size(*size):
            raise ValueError(
                f'images of {size[0]} x {size[1]}; sides must be multiples of 16 from 64 to {LARGEST_SIDE}'
            )
        features = self.encoder(x)
        mask = None if self.decoder is None else self.decoder(features)
        return Outputs(
            label=None if self.class_head is None else self.class_head(features),
            mask=None if mask is None else F.interpolate(mask, size=size, mode='bilinear', align_corners=False),
            bbox=None if self.box_head is None else self.box_head(features),
        )


class MTLNet(SharedEncoderNet):
    """Mask, class and box from one encoder."""

    tasks = ('mask', 'class', 'box')


class UNet(SharedEncoderNet):
    """Only the mask: the baseline."""

    tasks = ('mask',)


class AblatedNet(SharedEncoderNet):
    """Mask and class: MTLNet without the box."""

    tasks = ('mask', 'class')


class AblatedNet2(SharedEncoderNet):
    """Mask and box: MTLNet without the class."""

    tasks = ('mask', 'box')


class ClassNet(SharedEncoderNet):
    """Only the class."""

    tasks = ('class',)


class BoxNet(SharedEncoderNet):
    """Only the box."""

    tasks = ('box',)


class ClassBoxNet(SharedEncoderNet):
    """Class and box, without a mask decoder."""

    tasks = ('class', 'box')


class FlipAveraged(nn.Module):
    """A network whose outputs are means over the images and their mirror images."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, x):
        """As SharedEncoderNet.forward, with logits of the mean probabilities."""
        label, mask, bbox = self.model(x)
        mirrored = self.model(x.flip(-1))
        if label is not None:
            label = torch.logaddexp(label.log_softmax(dim=1), mirrored.label.log_softmax(dim=1)) - math.log(2)
        if mask is not None:
            mask = ((mask.sigmoid() + mirrored.mask.flip(-1).sigmoid()) / 2).logit(eps=1e-6)
        if bbox is not None:
            xmin, ymin, xmax, ymax = mirrored.bbox.unbind(dim=1)
            bbox = (bbox + torch.stack([1 - xmax, ymin, 1 - xmin, ymax], dim=1)) / 2
        return Outputs(label, mask, bbox)


NETWORKS = {
    network.__name__: network for network in (MTLNet, UNet, AblatedNet, AblatedNet2, ClassNet, BoxNet, ClassBoxNet)
}


# ---- model files: best.pt and mtl_model.pt


def model_content(model, class_names, class_species, image_size):
    """What a model file holds: all that rebuilds the model for prediction, the weights as a copy."""
    buffers = dict(model.named_buffers())
    return {
        'format': MODEL_FORMAT,
        'network': type(model).__name__,
        'encoder': model.encoder_name,
        'class_names': class_names,
        'class_species': class_species,
        'image_size': list(image_size),
        # Weights of convolutions and linear layers as float16, which halves the file; the rest as it is.
        'weights': {
            name: tensor.half() if name not in buffers and tensor.ndim > 1 else tensor.clone()
            for name, tensor in model.state_dict().items()
        },
    }


def load_model(path=MODEL, device='cpu'):
    """The trained network of a model file, in evaluation mode.

    It has the attributes `class_names` (list of str), `class_species` (list of 'cat', 'dog' or None) and `image_size`
    (height, width). Raises InputError for a file that is missing, damaged or of another kind.
    """
    content = load_checkpoint(path, MODEL_FORMAT)
    try:
        keys = 'network', 'encoder', 'class_names', 'class_species', 'image_size'
        name, encoder, class_names, class_species, size = (content[key] for key in keys)
        if not are_names(class_names):
            raise ValueError('its class names are not a list of printable names')
        if len(class_species) != len(class_names) or not all(each in (*SPECIES, None) for each in class_species):
            raise ValueError('its species are not one for each class')
        if not isinstance(size, list) or [type(side) for side in size] != [int, int] or not is_image_size(*size):
            raise ValueError('its image size is not one that the networks take')
        with torch.random.fork_rng(devices=[]):  # the initial weights take random numbers
            model = NETWORKS[name](n_classes=len(class_names), encoder=encoder)
        model.load_state_dict(content['weights'])
        if not is_finite(model.state_dict()):
            raise ValueError('some of its weights are not finite')
    except InputError as error:  # of the encoder
        raise InputError(f'{path}: {error}') from None
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(f'{path}: does not fit the networks of models.py ({reason(error)}); train it again') from None
    model.class_names, model.class_species, model.image_size = class_names, class_species, tuple(size)
    return model.to(device).eval()
