"""heads.py and loss.py: proposals, RoI features, sampling, and the five losses of Mask R-CNN."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_heads_loss import randomized, same
from torchvision.ops import box_iou, nms, roi_align

import heads
from heads import (
    BoxHead,
    MaskHead,
    RetinaNetHead,
    RPNHead,
    decode_boxes,
    encode_boxes,
    make_anchors,
    pack_pyramid,
    propose,
    roi_features,
    roi_levels,
)
from loss import (
    RoIs,
    box_head_loss,
    mask_loss,
    mask_targets,
    match_anchors,
    pick,
    random_keys,
    rpn_loss,
    sample_rois,
)
from model import ARCHS, build_model

SIZE = (128, 128)
SIZES = torch.tensor([[128.0, 128.0]] * 2)
LEVELS = range(3, 8)
PER_LEVEL = [3 * (128 // 2**L) ** 2 for L in LEVELS]


def rpn_anchors(anchor_size=3):
    return make_anchors(SIZE, anchor_size, scales=(1.0,)).split(PER_LEVEL)


def random_boxes(generator, count, size=128):
    corners = torch.rand(count, 2, 2, generator=generator) * size
    return torch.cat((corners.amin(1), corners.amax(1) + 4), dim=1).clamp(0, size)


def make_targets(*images, noise=0):
    """Targets of images given as (boxes, labels)."""
    targets = {"boxes": torch.zeros(len(images), 100, 4), "labels": torch.full((len(images), 100), -1)}
    for i, (boxes, labels) in enumerate(images):
        targets["boxes"][i, : len(boxes)] = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        targets["labels"][i, : len(labels)] = torch.as_tensor(labels, dtype=torch.int64)
    targets["masks"] = torch.zeros(len(images), 100, 112, 112, dtype=torch.uint8)
    return targets | {"noise": noise + torch.arange(len(images))}


def test_anchors_of_one_scale():
    """Oracle: by hand. The RPN has three anchors per location, the first scale's of RetinaNet's nine."""
    anchors = torch.cat(rpn_anchors())
    nine = make_anchors(SIZE, 3).unflatten(0, (-1, 9))
    assert len(anchors) == sum(PER_LEVEL) == 1023, f"{len(anchors)} anchors, not 1023: 3 at each location of 5 levels"
    torch.testing.assert_close(anchors, nine[:, :3].flatten(0, 1), rtol=0, atol=0)


@torch.no_grad()
def test_an_rpn_head_by_hand():
    """Oracle: the tower and the last layers, a level at a time, where the levels are not square."""
    rpn = randomized(RPNHead(6, 6, 2, "swish")).eval()
    features = [torch.randn(2, 6, 2 ** (4 - k), 2 ** (5 - k)) for k in range(5)]
    objectness, codes = rpn(features)
    assert len(objectness) == len(codes) == 5, "lists by level, P3 to P7"
    for level, x in enumerate(features):
        x, what = rpn.tower(x, level), f"of P{level + 3}, from the tower's output with this level's number, by anchor"
        expected = rpn.class_predict(x).permute(0, 2, 3, 1).reshape(2, -1)
        same(objectness[level], expected, f"objectness logits {what}", rtol=1e-4, atol=1e-4)
        expected = rpn.box_predict(x).permute(0, 2, 3, 1).reshape(2, -1, 4)
        same(codes[level], expected, f"box codes {what}", rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_box_and_mask_heads_by_hand():
    """Oracle: their layers, one after the other."""
    x = torch.randn(5, 6, 7, 7)
    box_head = randomized(BoxHead(6, 6, 2, 16, 3, "swish")).eval()
    features = F.linear(box_head.convs(x).reshape(5, -1), box_head.fc.weight, box_head.fc.bias)
    bn = box_head.bn
    features = F.silu(F.batch_norm(features, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-3))
    logits, codes = box_head(x)
    what = "convolutions, the layer fc of (C, 7, 7) flattened, its batch norm, act, and"
    same(logits, box_head.class_predict(features), f"class logits: {what} class_predict", rtol=1e-4, atol=1e-3)
    expected = torch.stack(box_head.box_predict(features).split(4, dim=1), dim=1)
    same(
        codes,
        expected,
        f"box codes (N, K + 1, 4): {what} box_predict, whose 4 outputs of a class are together",
        1e-4,
        1e-3,
    )
    mask_head = randomized(MaskHead(6, 6, 2, 3, "swish")).eval()
    x = torch.randn(5, 6, 14, 14)
    expected = mask_head.mask_predict(mask_head.up(mask_head.convs(x)))
    same(mask_head(x), expected, "mask logits: convolutions, up to 28 x 28, mask_predict", rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "make, sides",
    [
        pytest.param(lambda: RetinaNetHead(6, 6, 1, 3), (16, 8, 4, 2, 1), id="RetinaNetHead"),
        pytest.param(lambda: RPNHead(6, 6, 1), (16, 8, 4, 2, 1), id="RPNHead"),
        pytest.param(lambda: BoxHead(6, 6, 1, 16, 3), 7, id="BoxHead"),
        pytest.param(lambda: MaskHead(6, 6, 1, 3), 14, id="MaskHead"),
    ],
)
@torch.no_grad()
def test_last_layers_compute_in_float32(make, sides):
    """Oracle: the dtypes. Under autocast to bfloat16 the last layers compute in float32 in evaluation, the others in
    bfloat16; in training all in bfloat16."""
    head, seen = randomized(make()), {}
    for name, layer in head.named_modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(lambda layer, inputs, out, name=name: seen.update({name: out.dtype}))
    maps = torch.randn(4, 6, sides, sides) if isinstance(sides, int) else [torch.randn(4, 6, s, s) for s in sides]
    for training in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            head.train(training)(maps)
        for name, dtype in seen.items():
            wanted = torch.bfloat16 if training or "predict" not in name else torch.float32
            mode = "training" if training else "evaluation, through `predict`"
            assert dtype == wanted, f"{name} computes in {dtype}, not {wanted}, under bfloat16's autocast in {mode}"
        assert any("predict" in name for name in seen)


def test_roi_levels():
    """Oracle: by hand. P4 at 224 pixels, one level per doubling of the root of the area, from P3 to P7, 0 included."""

    def levels(*boxes):
        found = roi_levels(torch.tensor(boxes))
        assert found.dtype == torch.int64, "levels are int64"
        return found.tolist()

    def squares(*sides):
        return levels(*[[3.0, 5, 3 + s, 5 + s] for s in sides])

    assert squares(224, 448, 896, 1792) == [4, 5, 6, 7], "P4 at 224 pixels, one level up per doubling"
    rounded = "rounded down: P4 up to 448 pixels, P5 up to 896"
    assert squares(225, 300, 447.9, 600, 895, 1791) == [4, 4, 4, 5, 5, 6], rounded
    assert squares(0, 1e-3, 111, 112, 223.9, 1e6) == [3, 3, 3, 3, 3, 7], "no lower than P3, no higher than P7"
    root = "what counts is the root of the area, width x height"
    assert levels([0.0, 0, 448, 112], [0, 0, 448, 448], [9, 9, 900, 9]) == [4, 5, 3], root


def test_roi_features_sample_the_centre_of_each_cell():
    """Oracle: by hand. Where a cell's centre is a pixel's x / stride, y / stride, its feature is that pixel's value:
    not that of half a pixel less, and no mean over the cell."""
    x, y = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="xy")
    features = [torch.zeros(1, 2, 128 // 2**L, 128 // 2**L) for L in LEVELS]
    features[0][0, 0], features[0][0, 1] = x**2, y**2
    found = roi_features(pack_pyramid(features), [torch.tensor([[16.0, 0, 128, 112]])], 7)
    assert found.shape == (1, 2, 7, 7), "features are (all N, C, side, side)"
    squares = torch.arange(7.0) * 2
    what = "on a map of x^2, at the centre of each cell alone, at x / stride without half a pixel"
    same(found[0, 0], (squares + 3).square().expand(7, 7), what, atol=1e-3)
    same(found[0, 1], (squares + 1).square()[:, None].expand(7, 7), what.replace("x", "y"), atol=1e-3)
    (found,) = roi_features(pack_pyramid(features), [torch.tensor([[40.0, 24, 40, 24]])], 7)
    point = torch.tensor([25.0, 9]).expand(7, 7, 2).permute(2, 0, 1)
    what = "a RoI without area has the value of its point in all cells: aligned, not made a pixel wide"
    same(found, point, what, atol=1e-3)


def test_roi_features_of_the_own_image_and_level():
    """Oracle: by hand, on maps whose value is the number of their level, and 10 more in the third image; the second has
    no RoI, which is asked last."""
    features = [torch.full((3, 1, 2048 // 2**L, 2048 // 2**L), float(L)) for L in LEVELS]
    for feature in features:
        feature[1:] += torch.tensor([90.0, 10])[:, None, None, None]
    boxes = [[0.0, 0, 100, 100], [0, 0, 300, 300], [900, 100, 1500, 700], [0, 0, 1024, 1024], [0, 0, 2048, 1600]]
    boxes = [torch.tensor(boxes), torch.tensor(boxes[2:0:-1], dtype=torch.float32)]
    copies = [image.clone() for image in boxes]
    cells = torch.tensor([3.0, 4, 5, 6, 7, 15, 14])[:, None, None].expand(7, 2, 2)
    found = roi_features(pack_pyramid([feature[::2] for feature in features]), boxes, 2)[:, 0]
    same(found[:, 0, 0] // 10, cells[:, 0, 0] // 10, "a RoI is pooled from its own image; first come all of the first")
    same(found, cells, "each RoI is pooled from its own level alone, by its size", atol=1e-3)
    assert all(map(torch.equal, boxes, copies)), "the boxes that were given are changed"
    found = roi_features(pack_pyramid(features), [boxes[0], torch.zeros(0, 4), boxes[1]], 2)[:, 0]
    same(found, cells, "a RoI is pooled from its own image, also where the one before it has none", atol=1e-3)


@pytest.mark.parametrize("side", [7, 14])
def test_roi_features_equal_torchvision_level_by_level(side):
    """Oracle: torchvision.ops.roi_align on the RoI's own level alone, and its gradient. Boxes of all levels, without
    area, and at every edge of an image that is not square."""
    torch.manual_seed(0)
    height, width = 1792, 2048
    features = [torch.randn(2, 5, height // 2**L, width // 2**L, requires_grad=True) for L in LEVELS]
    boxes = []
    for _ in range(2):
        corner, extent = torch.rand(60, 2) * torch.tensor([width, height]), 2 ** (torch.rand(60, 2) * 7 + 4)
        some = torch.cat((corner, (corner + extent).minimum(torch.tensor([width, height]))), dim=1)
        special = [[0, 0, width, height], [0, 0, 0, 0], [width, height] * 2, [width - 30, 0, width, 90], [7, 0, 7, 9]]
        special += [[300, 200, 1400, 1300], [0, height - 1100, 1000, height]]
        boxes.append(torch.cat((some, torch.tensor(special, dtype=torch.float32))))
    ours = roi_features(pack_pyramid(features), boxes, side)
    levels = roi_levels(torch.cat(boxes))
    assert set(levels.tolist()) == set(LEVELS)
    theirs = torch.zeros_like(ours)
    for feature, L in zip(features, LEVELS):
        moved = [b + 2**L / 2 for b in boxes]
        pooled = roi_align(feature, moved, side, spatial_scale=1 / 2**L, sampling_ratio=1, aligned=True)
        theirs = torch.where((levels == L)[:, None, None, None], pooled, theirs)
    what = "each RoI's features are torchvision's aligned roi_align's, of its own image and level, also without area"
    same(ours, theirs, what, rtol=1e-5, atol=2e-4)  # coordinates near 2000 resolve to 1e-4 of a pixel
    empty = torch.zeros(2, 0, 4)
    assert roi_features(pack_pyramid(features), empty, side).shape == (0, 5, side, side), "images without a RoI"
    stacked = roi_features(pack_pyramid(features), torch.stack(boxes), side)
    same(stacked, ours, "boxes are B tensors or one (B, N, 4)", rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((x * weight).sum(), features) for x in (ours, theirs)]
    for a, b, L in zip(*gradients, LEVELS):
        same(a, b, f"the gradient of P{L} is torchvision's", rtol=1e-5, atol=5e-3)


def test_proposals_by_hand():
    """Oracle: by hand. Equal boxes of one level become one, of two levels stay two; small ones stay; best first; boxes
    are clipped to their image's own region before NMS."""
    anchors = (torch.tensor([[0.0, 0, 40, 40], [0, 0, 40, 41], [90, 90, 190, 190]]), torch.tensor([[0.0, 0, 40, 40]]))
    objectness = [torch.tensor([[21.0, 22.0, 15.0]]), torch.tensor([[23.0]])]  # whose sigmoids are 1
    codes = [torch.zeros(1, 3, 4), torch.zeros(1, 1, 4)]

    def proposals(size=(128.0, 128.0), candidates=1000):
        (found,) = propose(objectness, codes, anchors, torch.tensor([size]), candidates)
        return found.tolist()

    found = proposals()
    assert len(found) == 3, "boxes suppress each other within a level, of two levels they don't"
    assert found[:2] == [[0, 0, 40, 40], [0, 0, 40, 41]], (
        "the best of all levels first, by logit: all their sigmoids are 1"
    )
    assert found[2] == [90, 90, 128, 128], "boxes are clipped to their image"
    best = "`candidates` is how many of each level, the best by logit, go into NMS"
    assert proposals(candidates=1) == [[0, 0, 40, 40], [0, 0, 40, 41]], best
    assert proposals(candidates=2) == [[0, 0, 40, 40], [0, 0, 40, 41]], best
    codes[0][0, 1, 0] = 0.25
    assert [10, 0, 50, 41] in proposals(), "a box is its anchor moved by its code"
    codes[0].zero_()[0, 2, 2:] = -20  # almost no side at all
    small = proposals()
    assert len(small) == 3 and small[2][2] - small[2][0] < 1e-4, "no box is left out for its size"
    codes[0].zero_()
    empty = [90, 20, 100, 20]
    clipped = "boxes are clipped to the image's own (height, width), also where that leaves them without area"
    assert proposals((20.0, 100.0)) == [[0, 0, 40, 20], [0, 0, 40, 20], empty], clipped
    anchors = (torch.tensor([[100.0, 100, 300, 120], [100, 100, 120, 300]]),)
    objectness, codes = [torch.tensor([[1.0, 2.0]])], [torch.zeros(1, 2, 4)]
    before = "boxes are clipped before NMS: these two become one"
    assert proposals((120.0, 120.0)) == [[100, 100, 120, 120]], before


def test_proposals_equal_a_plain_loop():
    """Oracle: the rule, an image and a level at a time, with torchvision's nms: top k, decode, clip, NMS, best."""
    generator = torch.Generator().manual_seed(0)
    anchors, sizes = rpn_anchors(), [[128.0, 96.0], [64.0, 128.0]]
    objectness = [torch.randn(2, n, generator=generator) for n in PER_LEVEL]
    codes = [torch.randn(2, n, 4, generator=generator) * 0.5 for n in PER_LEVEL]
    for candidates in (100, 2000):
        for image, found in enumerate(propose(objectness, codes, anchors, torch.tensor(sizes), candidates)):
            boxes, scores = [], []
            for logits, code, level in zip(objectness, codes, anchors):
                order = logits[image].argsort(descending=True)[:candidates]
                box = decode_boxes(code[image], level)[order]
                box = torch.stack((box[:, 0::2].clamp(0, sizes[image][1]), box[:, 1::2].clamp(0, sizes[image][0])), 2)
                box = box.flatten(1)
                kept = nms(box, logits[image][order], 0.7)
                boxes.append(box[kept]), scores.append(logits[image][order][kept])
            best = torch.cat(scores).argsort(descending=True)[:1000]
            what = (
                f"proposals of image {image} of {candidates} candidates per level, by the rule in plain loops, IoU 0.7"
            )
            same(found, torch.cat(boxes)[best], what, atol=1e-3)


def test_at_most_1000_proposals():
    """Oracle: counting. 1500 boxes of one level that don't overlap leave its 1000 best; so do two levels of 700."""
    corners = torch.cartesian_prod(torch.arange(50.0), torch.arange(30.0)) * 20
    boxes = torch.cat((corners, corners + 10), dim=1)
    scores = torch.rand(1, 1500, generator=torch.Generator().manual_seed(0))
    best = boxes[scores[0].argsort(descending=True)[:1000]]
    large = torch.tensor([[2000.0, 2000.0]])
    (found,) = propose([scores], [torch.zeros(1, 1500, 4)], [boxes], large, 2000)
    same(found, best, "at most 1000 proposals, the best first", atol=1e-3)
    parts = [scores[:, :700], scores[:, 700:1400]], [torch.zeros(1, 700, 4)] * 2, [boxes[:700], boxes[700:1400]]
    (found,) = propose(*parts, large, 2000)
    best = boxes[:1400][scores[0, :1400].argsort(descending=True)[:1000]]
    same(found, best, "at most 1000 proposals, the best of all levels first", atol=1e-3)


def test_what_the_rpn_proposes_from(monkeypatch):
    """Oracle: the authors' yaml. 2000 candidates per level in training, 1000 in a test; anchors of 3 strides, for 190
    of 5; each image's own size."""
    seen = []

    def spy(objectness, codes, anchors, sizes, candidates):
        seen.append((candidates, sizes.tolist(), (anchors[0][0, 2] - anchors[0][0, 0]).item()))
        return [anchors[0][:20]] * len(sizes)

    monkeypatch.setattr(heads, "propose", spy)
    small = dataclasses.replace(ARCHS["tiny"], rcnn_anchor_size=ARCHS["49"].rcnn_anchor_size)
    detector = build_model(small, "mask_rcnn", 3, rois=8, mask_rois=2).eval()
    images = torch.zeros(2, 3, 128, 256, dtype=torch.uint8)
    with torch.no_grad():
        detector(images, make_targets(([], []), ([], [])))
        detector(images, sizes=torch.tensor([[100.0, 200.0], [128.0, 64.0]]))
    assert seen == [(2000, [[128, 256]] * 2, 24.0), (1000, [[100, 200], [128, 64]], 24.0)]
    rows = {name: (a.rcnn_channels, a.rcnn_fc_channels, a.rcnn_anchor_size) for name, a in ARCHS.items()}
    assert rows.pop("tiny") and rows.pop("49S") == (128, 512, 3) and rows.pop("190") == (384, 1024, 5)
    assert set(rows.values()) == {(256, 1024, 3)}


def test_noise_decides_what_is_sampled():
    """Oracle: repetition. The same noise gives the same losses, other noise others; none is needed."""
    torch.manual_seed(0)
    detector = build_model("tiny", "mask_rcnn", 3, rois=16, mask_rois=4).eval()
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    targets = make_targets(([[10, 10, 90, 80]], [1]), ([[30, 30, 60, 120]], [2]))
    with torch.no_grad():
        first, again, other = (detector(images, targets | {"noise": torch.tensor(n)}) for n in ([3, 4], [3, 4], [5, 6]))
        del targets["noise"]
        assert first == again, "the same noise gives the same losses"
        assert first["rpn_class"] != other["rpn_class"] and first["class"] != other["class"], "other noise gives others"
        assert detector(images, targets)["class"].isfinite(), "no noise is needed"


def test_random_keys():
    """Oracle: statistics and repetition. Different within an image, uniform, unlike between images and streams, and the
    same for an image in any batch."""
    noise = torch.tensor([0, 1, 2**32 - 1, 12345])
    keys = random_keys(noise, 0, 100_000)
    assert keys.min() >= 0 and keys.max() < 2**32
    assert all(len(row.unique()) == 100_000 for row in keys)
    share = torch.histc(keys.double() / 2**32, 50, 0, 1) / keys.numel()
    assert (share - 0.02).abs().max() < 0.001
    others = torch.cat((keys, random_keys(noise, 1, 100_000)))
    correlation = torch.corrcoef(others.double()) - torch.eye(8)
    assert correlation.abs().max() < 0.02
    assert torch.equal(random_keys(noise[2:3], 0, 50), keys[2:3, :50])


def test_pick():
    """Oracle: by hand. The candidates of the highest keys, and fillers that say so where there are too few."""
    keys = torch.tensor([[5, 9, 7, 1], [5, 9, 7, 1]])
    index, real = pick(torch.tensor([[True, False, True, True], [False, False, False, True]]), keys, 2)
    assert index.shape == real.shape == (2, 2), "(B, limit) indices, and which are real"
    assert index[0].tolist() == [2, 0], "the candidates of the highest keys, by falling key"
    assert real.tolist() == [[True, True], [True, False]], "what fills up where candidates are too few is not real"
    assert index[1, 0] == 3, "what is real comes first"
    large = torch.arange(2**32 - 8, 2**32).roll(3)[None]
    index, real = pick(torch.ones(1, 8, dtype=torch.bool), large, 8)
    assert index[0].tolist() == [2, 1, 0, 7, 6, 5, 4, 3], "keys up to 2^32 - 1 are told apart: they are int64"
    assert real.all(), "a candidate is real, whatever its key"
    index, real = pick(torch.tensor([[True, False]]), torch.tensor([[0, 1]]), 2)
    assert index[0, 0] == 0 and real.tolist() == [[True, False]], "a candidate is real, also with the key 0"


def test_anchors_between_the_thresholds_are_ignored():
    """Oracle: by hand. IoU 0.7 and more: object; under 0.3: background; between: ignored, unless it is a claim."""
    anchors = torch.tensor([[0.0, 0, 10, 7], [0, 0, 10, 6.9], [0, 0, 10, 3], [0, 0, 10, 2.9], [50, 50, 60, 60]])
    box = torch.tensor([[0.0, 0, 10, 10]])
    labels, boxes = match_anchors(anchors, box, torch.tensor([5]), 0.7, 0.3)
    between = "anchors below background_iou, 0.3, are background, -1, and from it on to the threshold ignored, -2"
    assert labels.tolist() == [5, -2, -2, -1, -1], between
    same(boxes, torch.cat((box, anchors[1:])), "an anchor's box is its own where it is background or ignored")
    labels, _ = match_anchors(anchors[1:], box, torch.tensor([5]), 0.7, 0.3)
    assert labels.tolist() == [5, -2, -1, -1], "an object's best anchor is its own, also below the threshold"
    for count in (0, 1):
        labels, _ = match_anchors(anchors, box[:count], torch.full((count,), -1), 0.7, 0.3)
        assert labels.tolist() == [-1] * 5, "without objects all anchors are background"


def random_case(seed, counts=(5, 0, 1)):
    generator = torch.Generator().manual_seed(seed)
    objectness = [torch.randn(len(counts), n, generator=generator, requires_grad=True) for n in PER_LEVEL]
    codes = [torch.randn(len(counts), n, 4, generator=generator, requires_grad=True) for n in PER_LEVEL]
    targets = make_targets(*[(random_boxes(generator, n), torch.arange(n)) for n in counts], noise=seed)
    return objectness, codes, targets


def sampled(anchors, targets, image=0):
    """The gradient of the RPN's class loss with respect to one image's objectness, times 256 B: logits 0, a level."""
    images = len(targets["labels"])
    logits = torch.zeros(images, len(anchors), requires_grad=True)
    losses = rpn_loss([logits], [torch.zeros(images, len(anchors), 4)], [anchors], targets)
    (gradient,) = torch.autograd.grad(losses["rpn_class"], logits)
    return gradient[image] * 256 * images


def test_few_anchors_are_divided_as_256():
    """Oracle: by hand. 3 positive, 5 background and 300 ignored anchors in each of two images, all logits 0:
    16 log 2 / 512."""
    kinds = torch.tensor([[0.0, 0, 10, 10]] * 3 + [[50, 50, 60, 60]] * 5 + [[0, 0, 10, 5]] * 300)
    targets = make_targets(*[([[0, 0, 10, 10]], [0])] * 2)
    gradient = sampled(kinds, targets)
    assert not gradient[8:].any(), "anchors between the thresholds, IoU 0.3 to 0.7, are ignored, not background"
    assert gradient[:8].sign().tolist() == [-1] * 3 + [1] * 5, "positive anchors towards 1, background towards 0"
    losses = rpn_loss([torch.zeros(2, 308)], [torch.zeros(2, 308, 4)], [kinds], targets)
    divided = "the class loss is divided by 256 for each image, also where fewer anchors are there"
    assert losses["rpn_class"].item() == pytest.approx(16 * math.log(2) / 512, rel=1e-5), divided


def test_rpn_samples_at_most_half_positive():
    """Oracle: counting the anchors that get a gradient: of 600 positive ones 128 and 128 others, of 10 all and 246."""
    for positive, expected in ((600, (128, 128)), (10, (10, 246))):
        anchors = torch.zeros(1000, 4) + torch.tensor([0.0, 0, 10, 10])
        anchors[positive:] += 50
        gradient = sampled(anchors, make_targets(([[0, 0, 10, 10]], [0])))
        counts = ((gradient[:positive] < 0).sum().item(), (gradient[positive:] > 0).sum().item())
        what = f"of {positive} positive anchors at most 128 are sampled, and background takes the rest of 256"
        assert counts == expected, f"{what}: {counts}"


def test_rpn_samples_by_the_noise_alone():
    """Oracle: repetition. An image's sample is the same in any batch, at any place, and other with other noise."""
    anchors = torch.zeros(1000, 4) + torch.tensor([0.0, 0, 10, 10])
    anchors[500:] += 50
    image, other = ([[0, 0, 10, 10]], [0]), ([], [])
    alone = sampled(anchors, make_targets(image, noise=5))
    beside = make_targets(other, image)
    beside["noise"] = torch.tensor([7, 5])
    same(sampled(anchors, beside, 1), alone, "an image's sample follows from its noise alone, not from the batch")
    different = "other noise samples others"
    assert not torch.equal(sampled(anchors, make_targets(image, noise=6)), alone), different


def test_rpn_boxes_by_hand(request):
    """Oracle: by hand. Huber's loss, delta 1/9, over all positive anchors: a mean over a level's coordinates, over all
    ranks, and a sum over the levels, of which one has none."""
    levels = [torch.zeros(count, 4) + torch.tensor([0.0, 0, 10, 10]) for count in (300, 100, 5)]
    levels[2] += 50
    anchors, targets = list(levels), make_targets(([[0, 0, 10, 10]], [0]))
    miss = [0.1, 0.5, torch.inf]
    codes = [torch.full((1, len(level), 4), m, requires_grad=True) for level, m in zip(levels, miss)]
    logits = [torch.zeros(1, len(level)) for level in levels]
    loss = rpn_loss(logits, codes, anchors, targets)["rpn_box"]
    assert loss.isfinite(), (
        "a level without a positive anchor adds 0; background's codes are selected away, not times 0"
    )
    expected = 0.5 * 0.1**2 + (0.5 - 0.5 / 9) / 9
    what = "Huber's loss, delta 1/9: a mean over the coordinates of a level's positive anchors, summed over the levels"
    assert loss.item() == pytest.approx(expected, rel=1e-4), what
    gradients = torch.autograd.grad(loss, codes)
    assert all(g.all() for g in gradients[:2]), "all positive anchors have a box loss, also those not sampled"
    assert not gradients[2].any(), "background has no box loss"
    request.getfixturevalue("as_one_of_two_ranks")
    found = rpn_loss(logits, codes, anchors, targets)["rpn_box"].item()
    assert found == pytest.approx(expected * 2 / 3, rel=1e-4), (
        "a level's mean is over all ranks: times ranks / all counted"
    )


def test_rpn_loss_equals_a_plain_loop():
    """Oracle: the rule in loops: 256 anchors of each image by their keys, at most 128 positive, over 256 B; boxes over
    all positive anchors, a mean per level, summed."""
    anchors = torch.cat(rpn_anchors())
    for seed in range(3):
        objectness, codes, targets = random_case(seed)
        losses = rpn_loss(objectness, codes, rpn_anchors(), targets)
        keys, class_loss = random_keys(targets["noise"], 0, 1023), 0.0
        per_level = [[] for _ in LEVELS]
        of_level = np.repeat(np.arange(5), PER_LEVEL)
        for b, logits in enumerate(torch.cat(objectness, 1)):
            labels, boxes = match_anchors(anchors, targets["boxes"][b], targets["labels"][b], 0.7, 0.3)
            by_key = keys[b].argsort(descending=True).tolist()
            positive = [a for a in by_key if labels[a] >= 0][:128]
            negative = [a for a in by_key if labels[a] == -1][: 256 - len(positive)]
            assert len(positive) + len(negative) == 256
            for a in positive + negative:
                label = torch.tensor(float(a in positive))
                class_loss += F.binary_cross_entropy_with_logits(logits[a], label).item()
            for a in (labels >= 0).nonzero().flatten().tolist():
                code = torch.cat(codes, 1)[b, a]
                target = encode_boxes(boxes[a], anchors[a])
                per_level[of_level[a]] += F.huber_loss(code, target, reduction="none", delta=1 / 9).tolist()
        what = "the class loss of the anchors with the highest keys of stream 0, positive ones and background"
        assert losses["rpn_class"].item() == pytest.approx(class_loss / (256 * 3), rel=1e-4), what
        box_loss = sum(np.mean(level) for level in per_level if level)
        assert losses["rpn_box"].item() == pytest.approx(box_loss, rel=1e-4), "the box loss, by the rule in plain loops"


def test_roi_sampling():
    """Oracle: by hand and by torchvision's box_iou: foreground first and at most a quarter, objects themselves
    included, 0.5 exactly is neither, no RoI twice, the object of most overlap."""
    half = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 5.1], [0, 0, 10, 4.9]])
    rois = sample_rois([half], make_targets(([[0, 0, 10, 10]], [7])), 8, 3)
    assert rois.labels[0, 0] >= 0, "foreground comes first"
    assert rois.labels[0, 0] == 7, "the label of foreground is its object's"
    taken = sorted(rois.boxes[0, :2].tolist())
    assert taken[1] == [0, 0, 10, 10], "the objects themselves are among the foreground"
    assert taken[0] == [0, 0, 10, pytest.approx(5.1)], "an IoU above 0.5 is foreground"
    neither = "an IoU of exactly 0.5 is neither foreground nor background; below it is background, the rest padding, -2"
    assert rois.labels.tolist() == [[7, 7, -1, -2, -2, -2, -2, -2]], neither
    assert rois.boxes[0, 2].tolist() == [0, 0, 10, pytest.approx(4.9)], "background after the foreground"
    assert not rois.boxes[0, 3:].any(), "padding is zero boxes"

    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(generator, 6)
    near = boxes.repeat(100, 1) + torch.randn(600, 4, generator=generator) * 3
    proposals = [torch.cat((near, random_boxes(generator, 400)))] * 2
    targets = make_targets((boxes, [3, 1, 4, 1, 5, 2]), (boxes[:0], []))
    rois = sample_rois(proposals, targets, 512, 128)
    assert rois.boxes.shape == (2, 512, 4), "`count` RoIs per image"
    most = "at most `foreground_count` are foreground, and they come first; background takes all other places"
    assert (rois.labels[0] >= 0).sum() == 128 and (rois.labels[0, :128] >= 0).all(), most
    assert (rois.labels[0, 128:] == -1).all() and (rois.labels[1] == -1).all(), most
    assert len(rois.boxes[0].unique(dim=0)) == 512, "no RoI is drawn twice"
    iou, matched = box_iou(rois.boxes[0], boxes).max(dim=1)
    assert (iou[:128] > 0.5).all() and (iou[128:] < 0.5).all(), "foreground and background are parted by IoU 0.5"
    same(rois.objects[0, :128], matched[:128], "a foreground RoI's object is the one that it overlaps most")
    same(
        rois.labels[0, :128],
        torch.tensor([3, 1, 4, 1, 5, 2])[matched[:128]],
        "a foreground RoI's label is its object's",
    )


def test_rois_are_sampled_by_the_noise_alone():
    """Oracle: repetition. An image's RoIs are the same in any batch, at any place, also beside an image with more
    proposals, and other with other noise."""
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(generator, 6)
    image, other = (boxes, range(6)), ([], [])
    near = boxes.repeat(40, 1) + torch.randn(240, 4, generator=generator) * 3
    alone = sample_rois([near], make_targets(image, noise=5), 32, 8)
    beside = make_targets(other, image)
    beside["noise"] = torch.tensor([7, 5])
    found = sample_rois([random_boxes(generator, 700), near], beside, 32, 8)
    for name in alone._fields[:2]:
        what = f"{name}: an image's RoIs follow from its noise alone, not from the batch"
        same(getattr(found, name)[1], getattr(alone, name)[0], what)
    different = sample_rois([near], make_targets(image, noise=6), 32, 8)
    assert not torch.equal(different.boxes, alone.boxes), "other noise samples others"


def test_roi_sampling_equals_a_plain_loop():
    """Oracle: the rule in loops: by the keys of stream 1, of which a proposal has its number's, an object its number's
    after 1000, whatever the number of proposals."""
    generator = torch.Generator().manual_seed(1)
    objects = [random_boxes(generator, count) for count in (6, 2, 0)]
    targets = make_targets(*[(boxes, range(len(boxes))) for boxes in objects], noise=3)
    proposals = [
        torch.cat((boxes.repeat(30, 1) + torch.randn(30 * len(boxes), 4, generator=generator) * 4, extra))
        for boxes, extra in zip(objects, (random_boxes(generator, 20), random_boxes(generator, 300), torch.zeros(0, 4)))
    ]
    rois = sample_rois(proposals, targets, 64, 16)
    keys = random_keys(targets["noise"], 1, 1100)
    for b, (drawn, boxes) in enumerate(zip(proposals, objects)):
        number = [*range(len(drawn)), *range(1000, 1000 + len(boxes))]
        kinds = ([], [])
        for n, box in sorted(zip(number, [*drawn, *boxes]), key=lambda pair: -keys[b, pair[0]].item()):
            iou = box_iou(box[None], boxes)[0].max().item() if len(boxes) else 0.0
            kinds[iou > 0.5].append(box.tolist())
        foreground = kinds[True][:16]
        background = kinds[False][: 64 - len(foreground)]
        found = [box for box, label in zip(rois.boxes[b].tolist(), rois.labels[b].tolist()) if label >= 0]
        what = "with the highest keys of stream 1, over the proposals, padded to 1000, and then the objects"
        assert sorted(found) == sorted(foreground), f"the foreground of image {b} is that {what}"
        found = [box for box, label in zip(rois.boxes[b].tolist(), rois.labels[b].tolist()) if label == -1]
        assert sorted(found) == sorted(background), f"the background of image {b} is that {what}"


def test_roi_sampling_is_uniform():
    """Oracle: statistics. Over many images each of 20 foreground RoIs is among the 5 drawn a quarter of the time."""
    proposals = torch.tensor([[0.0, 0, 10, 10 + k / 100] for k in range(1, 20)])
    targets = make_targets(*[([[0, 0, 10, 10]], [0])] * 400)
    rois = sample_rois([proposals] * 400, targets, 20, 5)
    drawn = rois.boxes[:, :5, 3].flatten()
    counts = torch.stack([(drawn == bottom).sum() for bottom in [10.0, *proposals[:, 3]]])
    assert counts.sum() == 2000 and (counts - 100).abs().max() < 40  # a standard deviation is 9


def test_few_or_no_proposals():
    """Oracle: by hand. Without a proposal, objects are the foreground, the rest is padding; without both, all is."""
    none = torch.zeros(0, 4)
    rois = sample_rois([none, none], make_targets(([[0, 0, 10, 10]], [7]), ([], [])), 8, 2)
    what = "without a proposal the object is the foreground, and what is not there is padding, -2, and no background"
    assert rois.labels.tolist() == [[7] + [-2] * 7, [-2] * 8], what
    rois = sample_rois(
        [torch.tensor([[50.0, 50, 50, 50]]), none], make_targets(([[0, 0, 10, 10]], [7]), ([], [])), 8, 2
    )
    what = "a proposal without area is background, though its IoU with padding is 0 / 0"
    assert rois.labels.tolist() == [[7, -1] + [-2] * 6, [-2] * 8], what


def rois_of(boxes, labels, objects):
    return RoIs(torch.tensor([boxes], dtype=torch.float32), torch.tensor([labels]), torch.tensor([objects]))


def test_box_head_loss_by_hand(request):
    """Oracle: by hand. Cross-entropy over real RoIs; Huber, delta 1, over the foreground's 4 coordinates; own class."""
    targets = make_targets(([[10, 10, 30, 30], [50, 50, 90, 70]], [0, 2]))
    rois = rois_of(
        [[50, 50, 90, 71], [0, 0, 10, 10], [0, 0, 0, 0], [0, 0, 0, 0]], [2, -1, -2, -1], [1, 0, 0, 0]
    )  # a foreground, a background, padding, a background without area
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    codes = torch.full((4, 4, 4), 9.0)
    codes[1:] = torch.inf  # of what is not foreground
    wanted = encode_boxes(targets["boxes"][0, 1], rois.boxes[0, 0], (10.0, 5.0))
    codes[0, 3] = wanted
    exact = "the box loss is of the foreground RoI's own class, k + 1, against its object's code in BOX_CODE_WEIGHTS"
    loss = box_head_loss(logits, codes, rois, targets)["box"]
    assert loss.isfinite(), "what is not foreground is selected away, not multiplied by 0: inf * 0 is NaN"
    assert loss.item() == pytest.approx(0, abs=1e-6), exact
    codes[0, 3] += torch.tensor([0.5, -3.0, 0, 1.0])
    losses = box_head_loss(logits, codes, rois, targets)
    huber = "Huber's loss, delta 1, is a mean over the 4 coordinates of the foreground"
    assert losses["box"].item() == pytest.approx((0.125 + 2.5 + 0 + 0.5) / 4, rel=1e-5), huber
    logp = logits.log_softmax(1)
    expected = -(logp[0, 3] + logp[1, 0] + logp[3, 0]).item() / 3
    what = (
        "cross-entropy is a mean over real RoIs, foreground and background, not padding; output 0 is the background's"
    )
    assert losses["class"].item() == pytest.approx(expected, rel=1e-5), what
    nothing = box_head_loss(logits, codes, rois._replace(labels=torch.full((1, 4), -2)), targets)
    assert nothing["class"] == nothing["box"] == 0, "where all is padding the losses are 0, not NaN"
    request.getfixturevalue("as_one_of_two_ranks")
    for name, value in box_head_loss(logits, codes, rois, targets).items():
        what = f"{name}: a mean over all ranks: times ranks / all counted"
        assert value.item() == pytest.approx(losses[name].item() * 2 / 3, rel=1e-5), what


def blob(generator):
    """A random smooth 112 x 112 mask, uint8."""
    field = F.interpolate(torch.randn(1, 1, 6, 6, generator=generator), (112, 112), mode="bicubic")
    return (field[0, 0] > 0).byte()


def test_mask_targets_of_the_object_itself():
    """Oracle: F.interpolate. A RoI that is its object's box has the mask resized to 28 x 28 (4 of 112 cells a side)."""
    targets = make_targets(([[1, 2, 3, 4], [8, 16, 40, 80]], [0, 0]))
    targets["masks"][0, 1] = blob(torch.Generator().manual_seed(1))
    found = mask_targets(rois_of([[8, 16, 40, 80], [8, 16, 40, 80]], [0, -1], [1, 1]), targets)
    assert found.shape == (1, 2, 28, 28), "(B, M, 28, 28)"
    expected = F.interpolate(targets["masks"][:, 1:2].float(), (28, 28), mode="bilinear", align_corners=False)
    what = "of a RoI that is its object's box: the mask, bilinearly, at each cell's centre"
    same(found[0, 0], expected[0, 0], what, atol=1e-5)
    assert not found[0, 1].any(), "of a RoI that is not foreground the target is 0"


def test_mask_targets_in_the_frame_of_the_roi():
    """Oracle: by hand. Of a mask whose right lower quarter is set, a RoI on that quarter sees 1, one on its left half
    sees its lower half empty; one moved by a quarter of the box beyond its edge is cut off there."""
    targets = make_targets(([[40, 20, 80, 100]], [0]))
    targets["masks"][0, 0, 56:, 56:] = 1
    boxes = [[60, 60, 80, 100], [40, 20, 60, 100], [60, 20, 80, 100], [60, 60, 100, 140]]
    (found,) = mask_targets(rois_of(boxes, [0] * 4, [0] * 4), targets)
    lower = (torch.arange(28) >= 14).float()[:, None].expand(28, 28)
    frame = "the mask's frame is its object's box, the target's is the RoI: a RoI on the mask's "
    same(found[0], torch.ones(28, 28), frame + "right lower quarter sees nothing else", atol=1e-4)
    assert not found[1].any(), frame + "left half sees nothing of it"
    same(found[2], lower, frame + "right half sees it below", atol=1e-4)
    same(found[3, :14, :14], torch.ones(14, 14), frame + "quarter and beyond sees it in a quarter", atol=1e-4)
    beyond = "where a cell's centre is outside of the object's box the target is 0, without fading"
    assert not found[3, 14:].any() and not found[3, :, 14:].any(), beyond


def test_mask_targets_equal_torchvision():
    """Oracle: torchvision.ops.roi_align on the mask, one bilinear sample at each cell's centre, for RoIs inside the
    object's box and reaching beyond it, where the target is 0."""
    generator = torch.Generator().manual_seed(0)
    box = torch.tensor([20.0, 30, 90, 120])
    targets = make_targets((box[None], [4]))
    targets["masks"][0, 0] = blob(generator)
    rois = box + torch.randn(50, 4, generator=generator) * 6
    found = mask_targets(rois_of(rois.tolist(), [4] * 50, [0] * 50), targets)
    scale = 112 / (box[2:] - box[:2]).repeat(2)
    in_mask = (rois - box[:2].repeat(2)) * scale
    pooled = roi_align(targets["masks"][:, :1].float(), [in_mask], 28, sampling_ratio=1, aligned=True)[:, 0]
    centre = (torch.arange(28) + 0.5) / 28
    x = rois[:, None, 0] + centre * (rois[:, 2] - rois[:, 0])[:, None]
    y = rois[:, None, 1] + centre * (rois[:, 3] - rois[:, 1])[:, None]
    inside = ((x >= 20) & (x <= 90))[:, None, :] & ((y >= 30) & (y <= 120))[:, :, None]
    assert 0.8 < inside.float().mean() < 0.99
    what = (
        "the mask, bilinearly and not rounded, at each cell's centre, 0 outside of the object's box, as by torchvision"
    )
    same(found[0], torch.where(inside, pooled, 0.0), what, atol=1e-3)
    soft = (found > 0.01) & (found < 0.99)
    assert 0.02 < soft.float().mean() < 0.5  # values between are kept


def test_mask_loss_by_hand(request):
    """Oracle: F.binary_cross_entropy on the foreground's own class; background and padding count for nothing."""
    targets = make_targets(([[10, 10, 30, 30], [50, 50, 90, 70]], [0, 2]))
    targets["masks"][0, 1] = blob(torch.Generator().manual_seed(2))
    rois = rois_of([[50, 50, 88, 70], [0, 0, 10, 10], [0, 0, 0, 0]], [2, -1, -2], [1, 0, 0])
    logits = torch.randn(3, 4, 28, 28, generator=torch.Generator().manual_seed(0))
    logits[1:] = torch.inf  # of what is not foreground
    logits.requires_grad_()
    value = mask_loss(logits, rois, targets)["mask"]
    assert value.isfinite(), "what is not foreground is selected away, not multiplied by 0: inf * 0 is NaN"
    value.backward()
    gradient = logits.grad.flatten(2).any(2).tolist()
    own = "the loss is of the foreground RoI's own class, k + 1, alone: not of other classes, background or padding"
    assert gradient == [[False, False, False, True], [False] * 4, [False] * 4], own
    expected = F.binary_cross_entropy(logits[0, 3].sigmoid(), mask_targets(rois, targets)[0, 0])
    mean = "binary cross-entropy, a mean over the foreground's 28 x 28 cells"
    assert value.item() == pytest.approx(expected.item(), rel=1e-5), mean
    nothing = mask_loss(logits, rois._replace(labels=torch.tensor([[-1, -1, -2]])), targets)["mask"]
    assert nothing == 0, "without foreground the loss is 0, not NaN"
    request.getfixturevalue("as_one_of_two_ranks")
    found = mask_loss(logits, rois, targets)["mask"].item()
    assert found == pytest.approx(value.item() * 2 / 3, rel=1e-5), "a mean over all ranks: times ranks / all counted"


def test_losses_of_rois_are_means_over_the_batch():
    """Oracle: the same RoIs in one image. In two images of the same objects, with 2 and 1 of the foreground and 3 and 1
    real ones, each RoI weighs as much."""
    generator = torch.Generator().manual_seed(0)
    targets = make_targets(([[10, 10, 30, 30], [50, 50, 90, 70]], [0, 2]))
    targets["masks"][0, :2] = blob(generator)
    boxes = [[50, 50, 88, 70], [10, 12, 30, 30], [0, 0, 9, 9], [48, 50, 90, 70], [0, 0, 0, 0], [0, 0, 0, 0]]
    one = rois_of(boxes, [2, 0, -1, 2, -2, -2], [1, 0, 0, 1, 0, 0])
    two = RoIs(*(field.reshape(2, 3, *field.shape[2:]) for field in one))
    logits, codes = torch.randn(6, 4, generator=generator), torch.randn(6, 4, 4, generator=generator)
    maps = torch.randn(6, 4, 28, 28, generator=generator)
    twice = {name: torch.cat((values, values)) for name, values in targets.items()}
    alone = box_head_loss(logits, codes, one, targets) | mask_loss(maps, one, targets)
    for name, value in (box_head_loss(logits, codes, two, twice) | mask_loss(maps, two, twice)).items():
        what = f"{name}: a mean over the RoIs of all images, not of the images' means"
        assert value.item() == pytest.approx(alone[name].item(), rel=1e-5), what


@pytest.mark.parametrize("training", [True, False])
def test_an_image_without_objects_or_with_empty_rois(training):
    """Oracle: finiteness. No object at all; objects of almost no area; RoIs without area: losses and gradients stay
    finite, in a batch and alone."""
    torch.manual_seed(0)
    detector = build_model("tiny", "mask_rcnn", 5, rois=64, mask_rois=16).train(training)
    with torch.no_grad():
        detector.rpn.box_predict.bias[2::4] = -30.0  # proposals without width
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    empty = make_targets(([], []), ([], []))
    tiny = make_targets(([[5, 5, 5.01, 90], [60, 60, 60.01, 60.01]], [1, 4]), ([[0, 0, 128, 128]], [0]))
    for targets in (empty, tiny):
        losses = detector(images, targets)
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values()) and losses["class"] > 0
        assert all(p.grad.isfinite().all() for p in detector.parameters())
        assert (losses["box"] > 0) == (losses["mask"] > 0) == (losses["rpn_box"] > 0) == (targets is tiny)


def test_detections_have_masks_of_their_class():
    """Oracle: the heads run by hand on the detected boxes. Masks follow the label, image and box; sizes clip."""
    torch.manual_seed(0)
    detector = build_model("tiny", "mask_rcnn", 3).eval()
    with torch.no_grad():
        detector.box_head.class_predict.weight.zero_()  # every class is as likely
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        found = detector(images, sizes=torch.tensor([[128.0, 96.0], [64.0, 128.0]]))
        pyramid = pack_pyramid(detector.backbone(detector.normalize(images)))
        logits = detector.mask_head(roi_features(pyramid, [one["boxes"] for one in found], 14))
    assert all(5 < len(one["boxes"]) <= 100 for one in found)
    labels = torch.cat([one["labels"] for one in found])
    assert len(labels.unique()) > 1
    masks = torch.cat([one["masks"] for one in found])
    assert torch.allclose(masks, logits[torch.arange(len(labels)), labels + 1].sigmoid(), atol=1e-6)
    assert found[0]["boxes"][:, 2].max() <= 96 and found[1]["boxes"][:, 3].max() <= 64
    assert found[0]["boxes"].min() >= 0 and all((one["scores"] > 0.05).all() for one in found)


def test_no_detections():
    """Oracle: by hand. Nothing above the threshold gives empty boxes and masks, for one image of two or both."""
    torch.manual_seed(0)
    detector = build_model("tiny", "mask_rcnn", 3).eval()
    with torch.no_grad():
        detector.box_head.class_predict.bias[0] = 20.0
        for found in detector(torch.zeros(2, 3, 128, 128, dtype=torch.uint8)):
            assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 28, 28) and len(found["labels"]) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_give_a_loss_that_is_not_finite(bad):
    """Oracle: by hand. After a divergence the loss says so; no box that is not finite reaches RoIAlign's memory."""
    torch.manual_seed(0)
    detector = build_model("tiny", "mask_rcnn", 3, rois=16, mask_rois=4).train()
    with torch.no_grad():
        detector.rpn.box_predict.bias.fill_(bad)
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    losses = detector(images, make_targets(([[10, 10, 90, 80]], [1]), ([], [])))
    assert not sum(losses.values()).isfinite()
