"""What are the bricks? Convolution blocks, resampling and the block group (paper section 3).

Dimensions: B images, C channels, H x W pixels of a feature map. Level L has stride 2^L.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import drop_block2d, stochastic_depth

# Batch norm's epsilon, and 1 - the moving average's decay of 0.99 (authors' Mask R-CNN
# yaml). Departure: their RetinaNet yaml says 1e-4 and 0.997; one choice serves both detectors.
BN_EPSILON, BN_MOMENTUM = 1e-3, 0.01

ACTIVATIONS = {"relu": F.relu, "swish": F.silu}

# Departure: the paper names DropBlock for A without settings, the released backbone has it off; 7 is their ResNet's.
DROP_BLOCK_SIZE = 7


def batch_norm(channels):
    """BatchNorm2d with this project's one epsilon and momentum. Departure: moving variances are torch's, of n - 1."""
    return nn.BatchNorm2d(channels, eps=BN_EPSILON, momentum=BN_MOMENTUM)


def drop_block(x, rate, training):
    """Zero random squares of each channel (DropBlock, Ghiasi et al. 2018), the rest scaled up to keep the mean.

    x (B, C, H, W) -> same shape and dtype; `x` itself where `training` is false or the rate 0. A square's side is
    DROP_BLOCK_SIZE, or the largest odd one that fits the map. In each channel of each image one begins wherever all of
    it fits, with probability rate H W / (side^2 (H - side + 1) (W - side + 1)) (equation 1). What is left is multiplied
    by elements / elements left (if any are), of the whole batch, counted in float32, as the mask is: float16 overflows.
    """
    if not training or rate == 0.0:
        return x
    side = min(DROP_BLOCK_SIZE, *x.shape[-2:])
    mask = drop_block2d(torch.ones_like(x, dtype=torch.float32), rate, side - (side + 1) % 2)
    return x * mask.to(x.dtype)


class ConvBN(nn.Module):
    """k x k convolution without bias, batch norm, and (unless `activation` is None) the activation.

    (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)); symmetric padding (k - 1) / 2.
    `drop_rate` is DropBlock's, applied between batch norm and activation, in training.
    """

    def __init__(self, in_channels, out_channels, kernel, stride=1, activation="relu", drop_rate=0.0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.bn = batch_norm(out_channels)
        self.activation, self.drop_rate = activation, drop_rate

    def forward(self, x):
        x = drop_block(self.bn(self.conv(x)), self.drop_rate, self.training)
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


class Stem(ConvBN):
    """7x7 convolution and max-pool, both of stride 2: (B, 3, H, W) -> (B, out, H/4, W/4) (paper Figure 4)."""

    def __init__(self, out_channels, activation):
        super().__init__(3, out_channels, 7, 2, activation)

    def forward(self, x):
        return max_pool_same(super().forward(x), 3, 2)


class ResidualBase(nn.Module):
    """act(shortcut(x) + branch(x)); the subclasses say what the branch is.

    The shortcut is a 1x1 projection where the channel counts differ (only in block 0), else the identity; in training
    DropBlock (`drop_rate`) is applied to it, of either kind. `drop_path` is the rate at which an image's whole branch
    is dropped in training (stochastic depth, drawn for each image); what survives is divided by 1 - drop_path.
    """

    def __init__(self, in_channels, out_channels, activation, drop_path, drop_rate):
        super().__init__()
        self.project = None
        if in_channels != out_channels:
            self.project = ConvBN(in_channels, out_channels, 1, activation=None)
        self.activation, self.drop_path, self.drop_rate = activation, drop_path, drop_rate

    def forward(self, x):
        shortcut = x if self.project is None else self.project(x)
        shortcut = drop_block(shortcut, self.drop_rate, self.training)
        branch = stochastic_depth(self.branch(x), self.drop_path, "row", self.training)
        return ACTIVATIONS[self.activation](shortcut + branch)


class Residual(ResidualBase):
    """Two 3x3 convolutions: (B, in, H, W) -> (B, width, H, W)."""

    expansion = 1

    def __init__(self, in_channels, width, activation="relu", drop_path=0.0, drop_rate=0.0):
        super().__init__(in_channels, width, activation, drop_path, drop_rate)
        self.branch = nn.Sequential(
            ConvBN(in_channels, width, 3, 1, activation, drop_rate),
            ConvBN(width, width, 3, 1, None, drop_rate),
        )


class Bottleneck(ResidualBase):
    """1x1, 3x3, 1x1 convolutions: (B, in, H, W) -> (B, 4 width, H, W)."""

    expansion = 4

    def __init__(self, in_channels, width, activation="relu", drop_path=0.0, drop_rate=0.0):
        super().__init__(in_channels, 4 * width, activation, drop_path, drop_rate)
        self.branch = nn.Sequential(
            ConvBN(in_channels, width, 1, 1, activation, drop_rate),
            ConvBN(width, width, 3, 1, activation, drop_rate),
            ConvBN(width, 4 * width, 1, 1, None, drop_rate),
        )


KINDS = {"residual": Residual, "bottleneck": Bottleneck}


def block_group(kind, in_channels, width, repeats, **options):
    """`repeats` blocks of one kind in a row (paper section 3.4, Figure 6: SpineNet-96 and up repeat blocks).

    (B, in_channels, H, W) -> (B, KINDS[kind].expansion * width, H, W).
    """
    block = KINDS[kind]
    channels = [in_channels] + [block.expansion * width] * (repeats - 1)
    return nn.Sequential(*[block(c, width, **options) for c in channels])


class Resample(nn.Module):
    """A parent's output brought to its child's level and channels (paper section 3.2, Figure 5).

    1x1 to c channels; then a strided conv (and for factors over 2, after it, a max-pool of stride factor / 2 and kernel
    stride + 1) down, or nearest neighbours up; then 1x1 to the child's channels, unactivated: the sum is activated.
    (B, in_channels, H, W) -> (B, out_channels, H / 2^d, W / 2^d), d = level - parent_level.

    c = int(alpha * parent_width), where parent_width is the block's width, also for a bottleneck,
    whose output has four times as many channels (authors' spinenet.py:138-232).
    """

    def __init__(self, in_channels, parent_width, parent_level, out_channels, level, alpha, activation="relu"):
        super().__init__()
        c = int(alpha * parent_width)
        self.squeeze = ConvBN(in_channels, c, 1, 1, activation)
        self.factor = 2.0 ** (level - parent_level)
        self.down = ConvBN(c, c, 3, 2, activation) if self.factor > 1 else None
        self.expand = ConvBN(c, out_channels, 1, 1, None)

    def forward(self, x):
        x = self.squeeze(x)
        if self.factor > 1:
            x = self.down(x)
            if self.factor > 2:
                stride = int(self.factor) // 2
                x = max_pool_same(x, stride + 1, stride)
        elif self.factor < 1:
            x = F.interpolate(x, scale_factor=1 / self.factor, mode="nearest")
        return self.expand(x)


def max_pool_same(x, kernel, stride):
    """Max-pool with TensorFlow's SAME padding: where `stride` divides the sides, at the right and bottom only.

    (B, C, H, W) -> (B, C, H / stride, W / stride), for kernel = stride + 1 > 2. The padding is never the maximum.
    """
    return F.max_pool2d(x, kernel, stride, ceil_mode=True)


def init_conv_(conv):
    """Normal, truncated at two sigma, of standard deviation sqrt(1 / fan_in) after the truncation.

    So sigma is sqrt(1 / fan_in) / 0.87962566, the std of a unit normal truncated at +-2; no weight is beyond 2 sigma.
    On the meta device, as `model.count` has it, there are no values to read.
    """
    fan_in = conv.weight[0].numel()
    sigma = math.sqrt(1 / fan_in) / 0.87962566
    nn.init.trunc_normal_(conv.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
