"""What is predicted where? Anchors, the box code, the heads, proposals, RoI features, detections (paper section 4).

Dimensions: B images, C channels, H x W pixels, A anchors, N boxes or RoIs, K classes. Level L has stride 2^L.
Boxes are (x1, y1, x2, y2) in pixels of the network's input, sides x2 - x1 and y2 - y1.
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import batched_nms, nms, roi_align

from blocks import ACTIVATIONS, batch_norm

LEVELS = (3, 4, 5, 6, 7)  # the levels that are predicted from

# Anchors per location: octave scales and aspect ratios w / h (RetinaNet section 4; authors' anchor.py).
SCALES = (2.0**0, 2.0 ** (1 / 3), 2.0 ** (2 / 3))
ASPECTS = (1.0, 2.0, 0.5)
MAX_LOG_SCALE = math.log(1000 / 16)  # decoding clamps log dw, log dh here
PRIOR = 0.01  # every class's probability at the first step (focal loss paper, section 4.1)

# Inference (authors' yaml). Departure: they keep 5000 candidates per class (Mask R-CNN 1000), here 5000 per image.
SCORE_THRESHOLD, NMS_THRESHOLD, MAX_CANDIDATES, MAX_DETECTIONS = 0.05, 0.5, 5000, 100

# Mask R-CNN (authors' mask_rcnn yaml). The RPN has one anchor scale. Its proposals: best anchors per level before NMS
# in training and in a test, IoU of NMS, boxes kept per level and then per image.
RPN_SCALES = (1.0,)
TRAIN_CANDIDATES, TEST_CANDIDATES, PROPOSAL_NMS_THRESHOLD, MAX_PROPOSALS = 2000, 1000, 0.7, 1000
BOX_CODE_WEIGHTS = (10.0, 5.0)  # of the second stage's box codes: centres, sides
ROI_LEVEL, ROI_SIDE = 4, 224  # a RoI of 224 x 224 pixels is pooled from P4 (FPN, equation 1)
BOX_POOL, MASK_POOL = 7, 14  # cells of a RoI's features, per side


@functools.lru_cache(maxsize=16)
def make_anchors(size, anchor_size, device="cpu", scales=SCALES, aspects=ASPECTS):
    """Every anchor of an image of `size` (height, width): (A, 4) xyxy float32 on `device`. Shared: don't write.

    Levels P3..P7 in turn, locations row by row, and at each location scale-major, then aspect. The base
    side s is anchor_size strides times the scale; an anchor of aspect a is s sqrt(a) wide and s / sqrt(a) high.
    Location (i, j) has its centre at ((j + 1/2), (i + 1/2)) strides. Sides are float64, all after that float32, as the
    authors have it, to be equal to the last bit. Source: RetinaNet section 4, authors' anchor.py.
    """
    levels = []
    for L in LEVELS:
        stride = 2**L
        sides = [
            (anchor_size * stride * scale * math.sqrt(aspect), anchor_size * stride * scale / math.sqrt(aspect))
            for scale in scales
            for aspect in aspects
        ]
        half = torch.tensor(sides, dtype=torch.float64).float() / 2  # (9, 2): width, height
        x = (torch.arange(size[1] // stride) + 0.5) * stride
        y = (torch.arange(size[0] // stride) + 0.5) * stride
        centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[:, :, None]  # (H, W, 1, 2)
        levels.append(torch.cat((centre - half, centre + half), dim=-1).reshape(-1, 4))  # (H W 9, 4)
    return torch.cat(levels).to(device)


def encode_boxes(boxes, anchors, weights=(1.0, 1.0)):
    """Boxes as offsets from their anchors: (dx, dy) in anchor sides, (log dw, log dh), times weights[0] and weights[1].

    Both (..., 4) xyxy -> (..., 4). All sides must be positive (select padding away first).
    Source: Faster R-CNN equation 2; authors' box_utils.py, which puts y first.
    """
    anchor_centre, anchor_side = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    centre, side = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    shift, scale = (centre - anchor_centre) / anchor_side, (side / anchor_side).log()
    return torch.cat((shift * weights[0], scale * weights[1]), dim=-1)


def decode_boxes(codes, anchors, weights=(1.0, 1.0)):
    """The inverse of `encode_boxes`: (..., 4) codes, (..., 4) xyxy -> (..., 4) xyxy; sides at most 62.5 anchors'.

    The codes may be of half precision, the boxes are float32; the leading dimensions broadcast.
    Departure: the authors' decoder adds the legacy 1 to widths and heights.
    """
    codes = codes.float()
    anchor_centre, anchor_side = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    centre = anchor_centre + codes[..., :2] / weights[0] * anchor_side
    half = anchor_side * (codes[..., 2:] / weights[1]).clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def clip_boxes(boxes, sizes):
    """Boxes (B, N, 4) clipped to 0..width, 0..height of sizes (B, 2): height, width. Departure: theirs to a square."""
    return boxes.clamp(min=0).minimum(sizes.flip(1).repeat(1, 2)[:, None])


def init_(layer, initializer, **options):
    """The layer, its weight drawn by `initializer` (of torch.nn.init), its bias 0."""
    initializer(layer.weight, **options)
    nn.init.zeros_(layer.bias)
    return layer


def predict(layer, x):
    """A last layer's outputs. Departure: in evaluation float32, also under autocast: close scores stay apart."""
    with contextlib.nullcontext() if layer.training or x.is_meta else torch.autocast(x.device.type, enabled=False):
        return layer(x if layer.training else x.float())


class Tower(nn.Module):
    """`convs` 3x3 convolutions shared between levels, each followed by a batch norm of that level's own, and act.

    A level's (B, in, H, W) and its index, 0 for P3 -> (B, channels, H, W).
    Source: authors' heads.py, RetinanetHead and RpnHead: only the statistics differ from level to level.
    """

    def __init__(self, in_channels, channels, convs, activation):
        super().__init__()
        widths = [in_channels] + [channels] * (convs - 1)
        self.convs = nn.ModuleList(
            init_(nn.Conv2d(width, channels, 3, padding=1), nn.init.normal_, std=0.01) for width in widths
        )
        self.norms = nn.ModuleList(nn.ModuleList(batch_norm(channels) for _ in widths) for _ in LEVELS)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x, level):
        for conv, norm in zip(self.convs, self.norms[level]):
            x = self.activation(norm(conv(x)))
        return x


class RetinaNetHead(nn.Module):
    """Two towers: class logits (B, A, K) and box codes (B, A, 4) from P3..P7, in the order of `make_anchors`.

    The last layers run through `predict`. Departure: no output 0. Source: RetinaNet section 4; authors' heads.py.
    """

    def __init__(self, in_channels, channels, convs, num_classes, activation="relu"):
        super().__init__()
        per_location = len(SCALES) * len(ASPECTS)
        self.num_classes = num_classes
        self.class_tower = Tower(in_channels, channels, convs, activation)
        self.class_predict = nn.Conv2d(channels, per_location * num_classes, 3, padding=1)
        self.box_tower = Tower(in_channels, channels, convs, activation)
        self.box_predict = nn.Conv2d(channels, per_location * 4, 3, padding=1)
        for predict in (self.class_predict, self.box_predict):
            init_(predict, nn.init.normal_, std=1e-5)
        nn.init.constant_(self.class_predict.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, features):
        logits, codes = [], []
        for level, x in enumerate(features):
            logits.append(per_anchor(predict(self.class_predict, self.class_tower(x, level)), self.num_classes))
            codes.append(per_anchor(predict(self.box_predict, self.box_tower(x, level)), 4))
        return torch.cat(logits, dim=1), torch.cat(codes, dim=1)


class RPNHead(nn.Module):
    """Region proposal network: is there an object, and which box? From P3..P7, lists by level.

    Objectness logits [(B, A_L)] and box codes [(B, A_L, 4)], both from the tower and through `predict`, in the order
    of `make_anchors`, one scale. Source: Faster R-CNN section 3.1; authors' heads.py, RpnHead.
    """

    def __init__(self, in_channels, channels, convs, activation="relu"):
        super().__init__()
        per_location = len(RPN_SCALES) * len(ASPECTS)
        self.tower = Tower(in_channels, channels, convs, activation)
        self.class_predict = init_(nn.Conv2d(channels, per_location, 1), nn.init.normal_, std=0.01)
        self.box_predict = init_(nn.Conv2d(channels, per_location * 4, 1), nn.init.normal_, std=0.01)

    def forward(self, features):
        logits, codes = [], []
        for level, x in enumerate(features):
            x = self.tower(x, level)
            logits.append(per_anchor(predict(self.class_predict, x), 1).squeeze(-1))
            codes.append(per_anchor(predict(self.box_predict, x), 4))
        return logits, codes


class RoIConv(nn.Module):
    """A convolution (with bias 0 and He's initialization, fan-out), batch norm, act."""

    def __init__(self, conv, activation):
        super().__init__()
        self.conv = init_(conv, nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
        self.bn, self.activation = batch_norm(conv.out_channels), ACTIVATIONS[activation]

    def forward(self, x):
        return self.activation(self.bn(self.conv(x)))


def roi_convs(in_channels, channels, convs, activation):
    """`convs` 3x3 convolutions: (N, in, h, w) -> (N, channels, h, w)."""
    widths = [in_channels] + [channels] * (convs - 1)
    return nn.Sequential(*[RoIConv(nn.Conv2d(width, channels, 3, padding=1), activation) for width in widths])


class BoxHead(nn.Module):
    """What is in a RoI, and which box has it exactly? (N, C, 7, 7) -> class logits (N, K + 1), codes (N, K + 1, 4).

    Convolutions, 4 in the authors' yaml; a layer, batch norm, act; two last layers, by `predict`. Output 0 is the
    background's; codes are relative to the RoI, in BOX_CODE_WEIGHTS. Source: Mask R-CNN section 3; their FastrcnnHead.
    """

    def __init__(self, in_channels, channels, convs, fc_channels, num_classes, activation="relu"):
        super().__init__()
        self.convs = roi_convs(in_channels, channels, convs, activation)
        self.fc = init_(nn.Linear(channels * BOX_POOL**2, fc_channels), nn.init.xavier_uniform_)
        self.bn, self.activation = batch_norm(fc_channels), ACTIVATIONS[activation]
        self.class_predict = init_(nn.Linear(fc_channels, num_classes + 1), nn.init.normal_, std=0.01)
        self.box_predict = init_(nn.Linear(fc_channels, (num_classes + 1) * 4), nn.init.normal_, std=0.001)

    def forward(self, x):
        x = self.fc(self.convs(x).flatten(1))[:, :, None, None]  # (N, fc, 1, 1): all batch norms are BatchNorm2d
        x = self.activation(self.bn(x)).flatten(1)
        return predict(self.class_predict, x), predict(self.box_predict, x).unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Which pixels of a RoI are the object's? (N, C, 14, 14) -> a logit map per class, (N, K + 1, 28, 28).

    The last layer by `predict`. Output 0, background's, is never used. Mask R-CNN Figure 4; authors' MaskrcnnHead.
    """

    def __init__(self, in_channels, channels, convs, num_classes, activation="relu"):
        super().__init__()
        self.convs = roi_convs(in_channels, channels, convs, activation)
        self.up = RoIConv(nn.ConvTranspose2d(channels, channels, 2, stride=2), activation)
        self.mask_predict = nn.Conv2d(channels, num_classes + 1, 1)
        init_(self.mask_predict, nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return predict(self.mask_predict, self.up(self.convs(x)))


def per_anchor(x, values):
    """(B, anchors per location * values, H, W) -> (B, H W anchors per location, values)."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, values)


@torch.no_grad()
def propose(objectness, codes, anchors, sizes, candidates):
    """Each image's proposals, best logit first: B tensors (N, 4) xyxy, N <= 1000, clipped to its (height, width).

    objectness [(B, A_L)], codes [(B, A_L, 4)], anchors [(A_L, 4)] by level. The best `candidates` of each level are
    clipped and go into an NMS of that level alone, IoU 0.7; the best MAX_PROPOSALS of each stay, and then of the image.
    No box is left out for its size, not even one that clipping leaves without area. Nothing waits for the device but
    NMS, which tells the host how many boxes it keeps. Source: Faster R-CNN section 3.3; authors' roi_ops.py.
    """
    levels = []
    for level_logits, level_codes, level_anchors in zip(objectness, codes, anchors):
        scores, index = level_logits.float().topk(min(candidates, len(level_anchors)), dim=1)  # (B, N)
        boxes = decode_boxes(level_codes.take_along_dim(index[..., None], dim=1), level_anchors[index])
        levels.append((clip_boxes(boxes, sizes), scores))  # (B, N, 4), (B, N)
    proposals = []
    for image in range(len(objectness[0])):
        kept = [nms(b[image], s[image], PROPOSAL_NMS_THRESHOLD)[:MAX_PROPOSALS] for b, s in levels]
        scores = torch.cat([s[image, index] for (_, s), index in zip(levels, kept)])
        boxes = torch.cat([b[image, index] for (b, _), index in zip(levels, kept)])
        proposals.append(boxes[scores.topk(min(MAX_PROPOSALS, len(scores))).indices])
    return proposals


def roi_levels(boxes):
    """The level (N,), int64, from which each box (N, 4) is pooled: P4 from 224 x 224 pixels on, one up per doubling.

    Source: FPN equation 1, on the levels P3..P7.
    """
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = ROI_LEVEL + (side / ROI_SIDE).log2().floor()  # of an empty box -inf: clamp first, then cast
    return level.clamp(LEVELS[0], LEVELS[-1]).long()


def pack_pyramid(features):
    """P3..P7 on one map, one below the other: (float32 (B, C, sum of (H_L + 1), W_3 + 1), the row of each level's top).

    RoIAlign can then pool every RoI from its own level in one call with fixed shapes. Pooling on every level and
    selecting does five times the work, and took 4 to 5 times as long on a CPU. The last row and column of each level
    are repeated once, which is how RoIAlign reads beyond the edge.
    """
    width = features[0].shape[3] + 1
    rows, top, tops = [], 0, []
    for x in features:
        x = F.pad(x.float(), (0, 1, 0, 1), mode="replicate")
        rows.append(F.pad(x, (0, width - x.shape[3])))
        tops.append(top)
        top += x.shape[2]
    return torch.cat(rows, dim=2), tops


def roi_features(pyramid, boxes, side):
    """RoIAlign of `boxes`, B tensors (N_b, 4) or one (B, N, 4), from `pack_pyramid`'s: (all N, C, side, side) float32.

    One bilinear sample at the centre of each cell, at x / stride, without the half-pixel shift (authors'
    spatial_transform_ops.py). In torchvision's words: aligned, which takes half a pixel off that is added here.
    """
    packed, tops = pyramid
    rois = []
    for image_boxes in boxes:
        image_boxes = image_boxes.nan_to_num()  # where training has diverged: RoIAlign would read outside of its map
        level = roi_levels(image_boxes)
        corners = image_boxes / (2.0**level)[:, None] + 0.5  # in pixels of the level
        below = sum((level == L) * top for L, top in zip(LEVELS, tops))  # (N_b,)
        rois.append(corners + torch.stack((torch.zeros_like(below), below), dim=1).repeat(1, 2))
    return roi_align(packed, rois, side, spatial_scale=1.0, sampling_ratio=1, aligned=True)


def detect(scores, boxes, size):
    """The detections of one image, best first: a dict of boxes (N, 4), scores (N,), labels (N,), N <= 100.

    scores (A, K) in 0..1; boxes (A, K, 4), or (A, 1, 4) where the classes share them, in pixels of the network's input;
    size (2,): (height, width) of the image's own region. The 5000 best scores above 0.05, boxes clipped to the region,
    NMS of each class at IoU 0.5. Source: RetinaNet section 4.1; Mask R-CNN section 3.1; authors' postprocess_ops.py.
    """
    num_classes = scores.shape[1]
    scores = scores.flatten()  # (A K,)
    likely = (scores > SCORE_THRESHOLD).nonzero().squeeze(1)
    scores, order = scores[likely].sort(descending=True, stable=True)
    scores, candidates = scores[:MAX_CANDIDATES], likely[order[:MAX_CANDIDATES]]
    index, labels = candidates // num_classes, candidates % num_classes
    (boxes,) = clip_boxes(boxes.expand(-1, num_classes, 4)[index, labels][None], size[None])
    kept = batched_nms(boxes, scores, labels, NMS_THRESHOLD)[:MAX_DETECTIONS]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
