"""heads.py and loss.py: proposals, RoI features, sampling, and the five losses of Mask R-CNN."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, nms, roi_align

import heads
from heads import decode_boxes, encode_boxes, make_anchors, pack_pyramid, propose, roi_features, roi_levels
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
    assert torch.equal(anchors, nine[:, :3].flatten(0, 1)) and len(anchors) == sum(PER_LEVEL) == 1023


def test_box_code_weights():
    """Oracle: by hand, and the identity. Weights (10, 5) multiply the code; the clamp stays at log(1000 / 16)."""
    box, anchor = torch.tensor([10.0, 20, 30, 30]), torch.tensor([0.0, 20, 20, 40])
    code = encode_boxes(box, anchor, (10.0, 5.0))
    assert code.tolist() == pytest.approx([5.0, -2.5, 0.0, 5 * np.log(0.5)])
    assert torch.allclose(decode_boxes(code, anchor, (10.0, 5.0)), box, atol=1e-4)
    wide = decode_boxes(torch.tensor([0.0, 0, 999, 0]), anchor, (10.0, 5.0))
    assert (wide[2] - wide[0]).item() == pytest.approx(20 * 1000 / 16)


def test_roi_levels():
    """Oracle: by hand. P4 at 224 pixels, one level per doubling of the root of the area, from P3 to P7, 0 included."""
    sides = [0, 1e-3, 111, 112, 223.9, 224, 447.9, 448, 895, 896, 1791, 1792, 1e6]
    boxes = torch.tensor([[3.0, 5, 3 + s, 5 + s] for s in sides])
    assert roi_levels(boxes).tolist() == [3, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert roi_levels(torch.tensor([[0.0, 0, 448, 112], [9, 9, 900, 9]])).tolist() == [4, 3]


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
    assert torch.allclose(ours, theirs, atol=2e-4)  # coordinates near 2000 resolve to 1e-4 of a pixel
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((x * weight).sum(), features) for x in (ours, theirs)]
    assert all(torch.allclose(a, b, atol=5e-3) for a, b in zip(*gradients))


def test_roi_features_sample_the_centre_of_each_cell():
    """Oracle: by hand. On a ramp, a cell's feature is its centre's x / stride (and not half a pixel less)."""
    ramp = [torch.arange(128 / 2**L).expand(1, 1, 128 // 2**L, -1).contiguous() for L in LEVELS]
    (found,) = roi_features(pack_pyramid(ramp), [torch.tensor([[16.0, 0, 72, 56]])], 7)
    assert found[0, 0].tolist() == pytest.approx([(16 + 8 * (k + 0.5)) / 8 for k in range(7)])


def test_proposals_equal_a_plain_loop():
    """Oracle: the rule, an image and a level at a time, with torchvision's nms: top k, decode, clip, NMS, best."""
    generator = torch.Generator().manual_seed(0)
    anchors = rpn_anchors()
    objectness = [torch.randn(2, n, generator=generator) for n in PER_LEVEL]
    codes = [torch.randn(2, n, 4, generator=generator) * 0.5 for n in PER_LEVEL]
    for candidates in (100, 2000):
        for image, found in enumerate(propose(objectness, codes, anchors, SIZES, candidates)):
            boxes, scores = [], []
            for logits, code, level in zip(objectness, codes, anchors):
                order = logits[image].argsort(descending=True)[:candidates]
                box = decode_boxes(code[image], level)[order].clamp(0, 128)
                kept = nms(box, logits[image][order], 0.7)
                boxes.append(box[kept]), scores.append(logits[image][order][kept])
            best = torch.cat(scores).argsort(descending=True)[:1000]
            assert torch.equal(found, torch.cat(boxes)[best])


def test_proposals_by_hand():
    """Oracle: by hand. Equal boxes of one level become one, of two levels stay two; small ones stay; best first; boxes
    are clipped to their image's own region before NMS."""
    anchors = (torch.tensor([[0.0, 0, 40, 40], [0, 0, 40, 41], [90, 90, 190, 190]]), torch.tensor([[0.0, 0, 40, 40]]))
    objectness = [torch.tensor([[1.0, 2.0, -5.0]]), torch.tensor([[3.0]])]
    codes = [torch.zeros(1, 3, 4), torch.zeros(1, 1, 4)]
    (found,) = propose(objectness, codes, anchors, SIZES[:1], 1000)
    assert found.tolist() == [[0, 0, 40, 40], [0, 0, 40, 41], [90, 90, 128, 128]]
    (found,) = propose(objectness, codes, anchors, torch.tensor([[20.0, 100.0]]), 1000)
    assert found.tolist() == [[0, 0, 40, 20], [0, 0, 40, 20], [90, 20, 100, 20]]
    codes[0][0, 2, 2:] = -20  # almost no side at all
    (found,) = propose(objectness, codes, anchors, SIZES[:1], 1000)
    assert len(found) == 3 and (found[2, 2:] - found[2, :2]).max() < 1e-4


def test_at_most_1000_proposals():
    """Oracle: counting. 1500 boxes of one level that don't overlap leave its 1000 best; so do two levels of 700."""
    corners = torch.cartesian_prod(torch.arange(50.0), torch.arange(30.0)) * 20
    boxes = torch.cat((corners, corners + 10), dim=1)
    scores = torch.rand(1, 1500, generator=torch.Generator().manual_seed(0))
    best = boxes[scores[0].argsort(descending=True)[:1000]]
    large = torch.tensor([[2000.0, 2000.0]])
    (found,) = propose([scores], [torch.zeros(1, 1500, 4)], [boxes], large, 2000)
    assert torch.equal(found, best)
    parts = [scores[:, :700], scores[:, 700:1400]], [torch.zeros(1, 700, 4)] * 2, [boxes[:700], boxes[700:1400]]
    (found,) = propose(*parts, large, 2000)
    assert torch.equal(found, boxes[:1400][scores[0, :1400].argsort(descending=True)[:1000]])


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
        assert first == again and first["rpn_class"] != other["rpn_class"] and first["class"] != other["class"]
        assert detector(images, targets)["class"].isfinite()


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
    assert index[0].tolist() == [2, 0] and real.tolist() == [[True, True], [True, False]] and index[1, 0] == 3


def test_anchors_between_the_thresholds_are_ignored():
    """Oracle: by hand. IoU 0.7 and more: object; under 0.3: background; between: ignored, unless it is a claim."""
    anchors = torch.tensor([[0.0, 0, 10, 7], [0, 0, 10, 6.9], [0, 0, 10, 3], [0, 0, 10, 2.9], [50, 50, 60, 60]])
    box = torch.tensor([[0.0, 0, 10, 10]])
    labels, boxes = match_anchors(anchors, box, torch.tensor([5]), 0.7, 0.3)
    assert labels.tolist() == [5, -2, -2, -1, -1]
    assert torch.equal(boxes[0], box[0]) and torch.equal(boxes[1:], anchors[1:])
    labels, _ = match_anchors(anchors[1:], box, torch.tensor([5]), 0.7, 0.3)
    assert labels.tolist() == [5, -2, -1, -1]  # its best anchor, below the threshold


def random_case(seed, counts=(5, 0, 1)):
    generator = torch.Generator().manual_seed(seed)
    objectness = [torch.randn(len(counts), n, generator=generator, requires_grad=True) for n in PER_LEVEL]
    codes = [torch.randn(len(counts), n, 4, generator=generator, requires_grad=True) for n in PER_LEVEL]
    targets = make_targets(*[(random_boxes(generator, n), torch.arange(n)) for n in counts], noise=seed)
    return objectness, codes, targets


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
        assert losses["rpn_class"].item() == pytest.approx(class_loss / (256 * 3), rel=1e-4)
        box_loss = sum(np.mean(level) for level in per_level if level)
        assert losses["rpn_box"].item() == pytest.approx(box_loss, rel=1e-4)


def test_rpn_samples_at_most_half_positive():
    """Oracle: counting the anchors that get a gradient, where 600 anchors are positive: 128 of them and 128 others."""
    anchors = torch.zeros(1000, 4) + torch.tensor([0.0, 0, 10, 10])
    anchors[600:] += 50
    targets = make_targets(([[0, 0, 10, 10]], [0]))
    logits = torch.zeros(1, 1000, requires_grad=True)
    rpn_loss([logits], [torch.zeros(1, 1000, 4)], [anchors], targets)["rpn_class"].backward()
    chosen = logits.grad[0] != 0
    assert (logits.grad[0, :600] <= 0).all() and (logits.grad[0, 600:] >= 0).all()
    assert (chosen[:600].sum(), chosen[600:].sum()) == (128, 128)


def test_few_anchors_are_divided_as_256():
    """Oracle: by hand. 3 positive, 5 background and 300 ignored anchors in each of two images, all logits 0:
    16 log 2 / 512."""
    kinds = [[0.0, 0, 10, 10]] * 3 + [[50, 50, 60, 60]] * 5 + [[0, 0, 10, 5]] * 300
    targets = make_targets(*[([[0, 0, 10, 10]], [0])] * 2)
    losses = rpn_loss([torch.zeros(2, 308)], [torch.zeros(2, 308, 4)], [torch.tensor(kinds)], targets)
    assert losses["rpn_class"].item() == pytest.approx(16 * math.log(2) / 512, rel=1e-5)


def test_roi_sampling():
    """Oracle: by hand and by torchvision's box_iou: foreground first and at most a quarter, objects themselves
    included, 0.5 exactly is neither, no RoI twice, the object of most overlap."""
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(generator, 6)
    near = boxes.repeat(100, 1) + torch.randn(600, 4, generator=generator) * 3
    proposals = [torch.cat((near, random_boxes(generator, 400)))] * 2
    targets = make_targets((boxes, [3, 1, 4, 1, 5, 2]), (boxes[:0], []))
    rois = sample_rois(proposals, targets, 512, 128)
    assert rois.boxes.shape == (2, 512, 4)
    assert (rois.labels[0] >= 0).sum() == 128 and (rois.labels[0, :128] >= 0).all()
    assert (rois.labels[0, 128:] == -1).all() and (rois.labels[1] == -1).all()
    assert len(rois.boxes[0].unique(dim=0)) == 512
    iou, matched = box_iou(rois.boxes[0], boxes).max(dim=1)
    assert (iou[:128] > 0.5).all() and (iou[128:] < 0.5).all()
    assert torch.equal(rois.objects[0, :128], matched[:128])
    assert torch.equal(rois.labels[0, :128], torch.tensor([3, 1, 4, 1, 5, 2])[matched[:128]])
    other = sample_rois(proposals, targets | {"noise": targets["noise"] + 7}, 512, 128)
    assert not torch.equal(other.boxes[0], rois.boxes[0])

    half = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 5.1], [0, 0, 10, 4.9]])
    rois = sample_rois([half], make_targets(([[0, 0, 10, 10]], [7])), 8, 3)
    assert rois.labels.tolist() == [[7, 7, -1, -2, -2, -2, -2, -2]]  # the object and the second; the third; padding
    assert sorted(rois.boxes[0, :2].tolist()) == [[0, 0, 10, pytest.approx(5.1)], [0, 0, 10, 10]]
    assert rois.boxes[0, 2].tolist() == [0, 0, 10, pytest.approx(4.9)] and not rois.boxes[0, 3:].any()


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
    assert rois.labels.tolist() == [[7] + [-2] * 7, [-2] * 8]


def rois_of(boxes, labels, objects):
    return RoIs(torch.tensor([boxes], dtype=torch.float32), torch.tensor([labels]), torch.tensor([objects]))


def test_box_head_loss_by_hand():
    """Oracle: by hand. Cross-entropy over real RoIs; Huber, delta 1, over the foreground's 4 coordinates; own class."""
    targets = make_targets(([[10, 10, 30, 30], [50, 50, 90, 70]], [0, 2]))
    rois = rois_of(
        [[50, 50, 90, 71], [0, 0, 10, 10], [0, 0, 0, 0], [0, 0, 0, 0]], [2, -1, -2, -1], [1, 0, 0, 0]
    )  # a foreground, a background, padding, a background without area
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    codes = torch.full((4, 4, 4), 9.0)
    wanted = encode_boxes(targets["boxes"][0, 1], rois.boxes[0, 0], (10.0, 5.0))
    codes[0, 3] = wanted + torch.tensor([0.5, -3.0, 0, 1.0])
    losses = box_head_loss(logits, codes, rois, targets)
    logp = logits.log_softmax(1)
    assert losses["class"].item() == pytest.approx(-(logp[0, 3] + logp[1, 0] + logp[3, 0]).item() / 3, rel=1e-5)
    assert losses["box"].item() == pytest.approx((0.125 + 2.5 + 0 + 0.5) / 4, rel=1e-5)


def blob(generator):
    """A random smooth 112 x 112 mask, uint8."""
    field = F.interpolate(torch.randn(1, 1, 6, 6, generator=generator), (112, 112), mode="bicubic")
    return (field[0, 0] > 0).byte()


def test_mask_targets_equal_torchvision():
    """Oracle: torchvision.ops.roi_align on the mask, one bilinear sample at each cell's centre, for RoIs inside the
    object's box and reaching beyond it, where the target is 0."""
    generator = torch.Generator().manual_seed(0)
    box = torch.tensor([20.0, 30, 90, 120])
    targets = make_targets((box[None], [4]))
    targets["masks"][0, 0] = blob(generator)
    rois = box + torch.randn(50, 4, generator=generator) * 6
    found = mask_targets(rois_of(rois.tolist(), [4] * 50, [0] * 50), targets)
    assert found.shape == (1, 50, 28, 28)
    scale = 112 / (box[2:] - box[:2]).repeat(2)
    in_mask = (rois - box[:2].repeat(2)) * scale
    pooled = roi_align(targets["masks"][:, :1].float(), [in_mask], 28, sampling_ratio=1, aligned=True)[:, 0]
    centre = (torch.arange(28) + 0.5) / 28
    x = rois[:, None, 0] + centre * (rois[:, 2] - rois[:, 0])[:, None]
    y = rois[:, None, 1] + centre * (rois[:, 3] - rois[:, 1])[:, None]
    inside = ((x >= 20) & (x <= 90))[:, None, :] & ((y >= 30) & (y <= 120))[:, :, None]
    assert 0.8 < inside.float().mean() < 0.99
    assert torch.allclose(found[0], torch.where(inside, pooled, 0.0), atol=1e-3)
    soft = (found > 0.01) & (found < 0.99)
    assert 0.02 < soft.float().mean() < 0.5  # values between are kept


def test_mask_targets_of_the_object_itself():
    """Oracle: F.interpolate. A RoI that is its object's box has the mask resized to 28 x 28 (4 of 112 cells a side)."""
    targets = make_targets(([[8, 16, 40, 80]], [0]))
    targets["masks"][0, 0] = blob(torch.Generator().manual_seed(1))
    found = mask_targets(rois_of([[8, 16, 40, 80]], [0], [0]), targets)
    expected = F.interpolate(targets["masks"][:, :1].float(), (28, 28), mode="bilinear", align_corners=False)
    assert torch.allclose(found[0], expected[0], atol=1e-5)


def test_mask_loss_by_hand():
    """Oracle: F.binary_cross_entropy on the foreground's own class; background and padding count for nothing."""
    targets = make_targets(([[10, 10, 30, 30], [50, 50, 90, 70]], [0, 2]))
    targets["masks"][0, 1] = blob(torch.Generator().manual_seed(2))
    rois = rois_of([[50, 50, 88, 70], [0, 0, 10, 10], [0, 0, 0, 0]], [2, -1, -2], [1, 0, 0])
    logits = torch.randn(3, 4, 28, 28, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = mask_loss(logits, rois, targets)["mask"]
    expected = F.binary_cross_entropy(logits[0, 3].sigmoid(), mask_targets(rois, targets)[0, 0])
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    assert logits.grad[0, 3].any() and not logits.grad[0, :3].any() and not logits.grad[1:].any()


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
