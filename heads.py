"""What is predicted where? Anchors, the box code, the prediction heads, detections (paper section 4.1).

Dimensions: B images, C channels, H x W pixels, A anchors, K classes. Level L has stride 2^L.
Boxes are (x1, y1, x2, y2) in pixels of the network's input, sides x2 - x1 and y2 - y1.
"""

import functools
import math

import torch
from torch import nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from blocks import ACTIVATIONS, batch_norm

LEVELS = (3, 4, 5, 6, 7)  # the levels that are predicted from

# Anchors per location: octave scales and aspect ratios w / h (RetinaNet section 4; authors' anchor.py).
SCALES = (2.0**0, 2.0 ** (1 / 3), 2.0 ** (2 / 3))
ASPECTS = (1.0, 2.0, 0.5)
MAX_LOG_SCALE = math.log(1000 / 16)  # decoding clamps log dw, log dh here
PRIOR = 0.01  # every class's probability at the first step (focal loss paper, section 4.1)

# Inference (authors' yaml). Departure: they keep 5000 candidates per class, here 5000 per image.
SCORE_THRESHOLD, NMS_THRESHOLD, MAX_CANDIDATES, MAX_DETECTIONS = 0.05, 0.5, 5000, 100


@functools.lru_cache(maxsize=16)
def make_anchors(size, anchor_size, device="cpu", scales=SCALES, aspects=ASPECTS):
    """Every anchor of an image of `size` (height, width): (A, 4) xyxy float32. Shared: do not write to it.

    Levels P3..P7 in turn, locations row by row, and at each location scale-major, then aspect. The base
    side is anchor_size strides; location (i, j) has its centre at ((j + 1/2), (i + 1/2)) strides.
    Source: RetinaNet section 4, authors' anchor.py.
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


def encode_boxes(boxes, anchors):
    """Boxes as offsets from their anchors: (dx, dy) in anchor sides, (log dw, log dh).

    Both (..., 4) xyxy -> (..., 4). The boxes' sides must be positive (select padding away first).
    Source: Faster R-CNN equation 2, without the variances; authors' box_utils.py, which puts y first.
    """
    anchor_centre, anchor_side = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    centre, side = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    return torch.cat(((centre - anchor_centre) / anchor_side, (side / anchor_side).log()), dim=-1)


def decode_boxes(codes, anchors):
    """The inverse of `encode_boxes`: (..., 4) codes, (..., 4) xyxy -> (..., 4) xyxy; sides at most 62.5 anchors'.

    Departure: the authors' decoder adds the legacy 1 to widths and heights.
    """
    codes = codes.float()
    anchor_centre, anchor_side = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    centre = anchor_centre + codes[..., :2] * anchor_side
    half = anchor_side * codes[..., 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat((centre - half, centre + half), dim=-1)


class Tower(nn.Module):
    """`convs` 3x3 convolutions shared between levels, each followed by a batch norm of that level's own,
    then a shared 3x3 predictor: features [(B, C, H, W) per level] -> [(B, out, H, W) per level].

    Source: authors' heads.py, RetinanetHead: only the statistics differ from level to level.
    """

    def __init__(self, in_channels, channels, convs, out_channels, activation):
        super().__init__()
        widths = [in_channels] + [channels] * convs
        self.convs = nn.ModuleList(nn.Conv2d(widths[i], channels, 3, padding=1) for i in range(convs))
        self.norms = nn.ModuleList(nn.ModuleList(batch_norm(channels) for _ in range(convs)) for _ in LEVELS)
        self.predict = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        self.activation = ACTIVATIONS[activation]
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.normal_(self.predict.weight, std=1e-5)
        nn.init.zeros_(self.predict.bias)

    def forward(self, x, level):
        for conv, norm in zip(self.convs, self.norms[level]):
            x = self.activation(norm(conv(x)))
        return self.predict(x)


class RetinaNetHead(nn.Module):
    """Two towers: class logits (B, A, K) and box codes (B, A, 4) from P3..P7, in the order of `make_anchors`.

    Source: RetinaNet section 4, Figure 3; authors' heads.py.
    """

    def __init__(self, in_channels, channels, convs, num_classes, activation="relu"):
        super().__init__()
        per_location = len(SCALES) * len(ASPECTS)
        self.classes = Tower(in_channels, channels, convs, per_location * num_classes, activation)
        self.boxes = Tower(in_channels, channels, convs, per_location * 4, activation)
        self.num_classes = num_classes
        nn.init.constant_(self.classes.predict.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, features):
        logits, codes = [], []
        for level, x in enumerate(features):
            logits.append(per_anchor(self.classes(x, level), self.num_classes))
            codes.append(per_anchor(self.boxes(x, level), 4))
        return torch.cat(logits, dim=1), torch.cat(codes, dim=1)


def per_anchor(x, values):
    """(B, anchors per location * values, H, W) -> (B, H W anchors per location, values)."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, values)


def detect(class_logits, box_codes, anchors, sizes):
    """The detections of each image, best first.

    class_logits (B, A, K), box_codes (B, A, 4), anchors (A, 4), sizes (B, 2): (height, width) of each image's
    own region, to which boxes are clipped. Returns B dicts of boxes (N, 4) xyxy pixels of the network's input,
    scores (N,), labels (N,), N <= 100. Sigmoid scores above 0.05, per-class NMS at IoU 0.5.
    Source: RetinaNet section 4.1, "Inference"; authors' postprocess_ops.py.
    """
    detections = []
    for logits, codes, size in zip(class_logits.float(), box_codes.float(), sizes.tolist()):
        scores = logits.flatten().sigmoid()  # (A K,)
        likely = (scores > SCORE_THRESHOLD).nonzero().squeeze(1)
        scores, order = scores[likely].sort(descending=True, stable=True)
        scores, candidates = scores[:MAX_CANDIDATES], likely[order[:MAX_CANDIDATES]]
        index, labels = candidates // logits.shape[1], candidates % logits.shape[1]
        boxes = clip_boxes_to_image(decode_boxes(codes[index], anchors[index]), size)
        kept = batched_nms(boxes, scores, labels, NMS_THRESHOLD)[:MAX_DETECTIONS]
        detections.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
    return detections
