"""heads.py and loss.py: anchors, box code, matching, focal and Huber losses, detections."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import batched_nms, box_iou, sigmoid_focal_loss

import heads
import loss
from heads import clip_boxes, decode_boxes, detect, encode_boxes, make_anchors
from loss import focal_loss, match_anchors, retinanet_loss
from model import build_model

OFFICIAL = np.load(Path(__file__).parent / "official_targets.npz")
XY = [1, 0, 3, 2]  # the authors put y first, in boxes and in codes


def official(prefix, width):
    """The levels 3..7 of one official array, joined: (A, width), or (A,) for width 0."""
    shape = (-1, width) if width else (-1,)
    return torch.cat([torch.from_numpy(OFFICIAL[f"{prefix}_{L}"]).reshape(shape) for L in range(3, 8)])


@pytest.mark.parametrize("anchor_size", [3, 4])
def test_anchors_equal_the_official_code(anchor_size):
    """Oracle: the authors' anchors, to the last bit but for the order of x and y."""
    anchors = make_anchors((128, 128), anchor_size)
    assert anchors.dtype == torch.float32
    assert torch.equal(anchors, torch.from_numpy(OFFICIAL[f"anchors_{anchor_size}"])[:, XY])


def test_anchors_of_a_non_square_image():
    """Oracle: by hand. Count, order and centre where height and width differ."""
    anchors = make_anchors((128, 384), 3)
    assert anchors.shape == (9 * (16 * 48 + 8 * 24 + 4 * 12 + 2 * 6 + 1 * 3), 4)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres[0].tolist() == [4, 4] and centres[9].tolist() == [12, 4] and centres[9 * 48].tolist() == [4, 12]
    sides = anchors[:, 2:] - anchors[:, :2]
    assert sides[0].tolist() == [24, 24]
    assert sides[1].tolist() == pytest.approx([24 * 2**0.5, 24 / 2**0.5])  # aspect 2 is wide


@pytest.mark.parametrize("case", ["s0", "s1"])
def test_targets_and_losses_equal_the_official_code(case):
    """Oracle: the authors' labels exactly; box targets and both losses to 1e-5 relative."""
    anchors = make_anchors((128, 128), 3)
    boxes = torch.zeros(1, 100, 4)
    labels = torch.full((1, 100), -1)
    gt, cls = torch.from_numpy(OFFICIAL[f"{case}_gt"]), torch.from_numpy(OFFICIAL[f"{case}_cls"])
    boxes[0, : len(gt)], labels[0, : len(gt)] = gt[:, XY], cls[:, 0].long()

    matched_labels, matched_boxes = match_anchors(anchors, boxes[0], labels[0])
    assert torch.equal(matched_labels, official(f"{case}_ct", 0).long())
    positive = matched_labels >= 0
    codes, expected = encode_boxes(matched_boxes, anchors)[positive], official(f"{case}_bt", 4)[positive][:, XY]
    assert torch.allclose(codes, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(matched_boxes[~positive], anchors[~positive])

    positives, class_loss, box_loss = OFFICIAL[f"{case}_loss"].tolist()
    assert positive.sum() == positives
    logits = official(f"{case}_co", 7)[None]  # output 0, the background's, is one more class that never occurs
    codes = official(f"{case}_bo", 4)[None][..., XY]
    losses = retinanet_loss(logits, codes, anchors, dict(boxes=boxes, labels=labels))
    assert losses["class"].item() == pytest.approx(class_loss, rel=1e-5)
    assert losses["box"].item() / 50 == pytest.approx(box_loss, rel=1e-5)


def random_boxes(generator, count, size=128):
    """(count, 4) boxes whose sides are at least 4 pixels."""
    corners = torch.rand(count, 2, 2, generator=generator) * size
    return torch.cat((corners.amin(1), corners.amax(1) + 4), dim=1)


def test_encode_and_decode_are_inverse():
    """Oracle: identity on random boxes and anchors, both ways; the clamp bounds the side."""
    generator = torch.Generator().manual_seed(0)
    boxes, anchors = random_boxes(generator, 1000), random_boxes(generator, 1000)
    assert torch.allclose(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, atol=1e-3)
    codes = torch.randn(1000, 4, generator=generator)
    assert torch.allclose(encode_boxes(decode_boxes(codes, anchors), anchors), codes, atol=1e-3)
    wide = decode_boxes(torch.tensor([[0.0, 0.0, 99.0, 1.0]]), torch.tensor([[0.0, 0.0, 8.0, 8.0]]))
    assert (wide[0, 2] - wide[0, 0]).item() == pytest.approx(8 * 1000 / 16)


def test_clipping():
    """Oracle: by hand. Each image's boxes are clipped to its own (height, width)."""
    boxes = torch.tensor([[[-5.0, -6, 30, 40], [10, 10, 20, 20]]]).repeat(2, 1, 1)
    clipped = clip_boxes(boxes, torch.tensor([[32.0, 24], [15, 18]]))
    assert clipped.tolist() == [[[0, 0, 24, 32], [10, 10, 20, 20]], [[0, 0, 18, 15], [10, 10, 18, 15]]]


def test_encode_by_hand():
    """Oracle: by hand."""
    code = encode_boxes(torch.tensor([10.0, 20.0, 30.0, 30.0]), torch.tensor([0.0, 20.0, 20.0, 40.0]))
    assert code.tolist() == pytest.approx([0.5, -0.25, 0.0, np.log(0.5)])


def slow_match(anchors, boxes, labels, threshold=0.5):
    """The matching rule, an anchor and an object at a time."""
    iou = box_iou(boxes, anchors)
    result = []
    real = [g for g in range(len(boxes)) if labels[g] >= 0]
    claims = {}
    for g in real:
        claims.setdefault(int((iou[g] == iou[g].max()).nonzero()[0]), g)
    for a in range(len(anchors)):
        best = max(real, key=lambda g: (iou[g, a].item(), -g), default=None)
        if a in claims:
            result.append(claims[a])
        else:
            result.append(best if best is not None and iou[best, a] >= threshold else -1)
    return result


@pytest.mark.parametrize("seed", range(5))
def test_matching_of_random_boxes(seed):
    """Oracle: the rule as a plain double loop over anchors and objects, with torchvision's box_iou."""
    generator = torch.Generator().manual_seed(seed)
    anchors = make_anchors((128, 128), 3)[::3]
    boxes, labels = random_boxes(generator, 12), torch.arange(12)
    labels[9:] = -1
    expected = torch.tensor(slow_match(anchors, boxes, labels))
    matched_labels, matched_boxes = match_anchors(anchors, boxes, labels)
    assert torch.equal(matched_labels, expected)  # the labels are the objects' own numbers
    assert torch.equal(matched_boxes[expected >= 0], boxes[expected[expected >= 0]])


def test_matching_ties_and_claims():
    """Oracle: by hand. Equal anchors: the first; contested anchor: the first object; a claim beats a better IoU."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]])
    same = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    labels, _ = match_anchors(anchors, same, torch.tensor([4, 7]))
    assert labels.tolist() == [4, 4, -1]  # both claim anchor 0: the first wins; anchor 1 ties to the first

    # Object 1 overlaps anchor 2 best by far; object 0, tiny, has no better anchor than 2 and so claims it.
    boxes = torch.tensor([[50.0, 50, 51, 51], [50, 50, 60, 59]])
    labels, matched = match_anchors(anchors, boxes, torch.tensor([1, 2]))
    assert labels.tolist() == [-1, -1, 1] and torch.equal(matched[2], boxes[0])

    # Padding never claims, not even if its box is a perfect match.
    labels, _ = match_anchors(anchors, same, torch.tensor([-1, -1]))
    assert labels.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("count", [0, 1, 100])
def test_matching_of_any_number_of_boxes(count):
    """Oracle: padding. The first `count` rows alone give what 100 padded rows give."""
    anchors, generator = make_anchors((128, 128), 3), torch.Generator().manual_seed(1)
    boxes, labels = torch.zeros(100, 4), torch.full((100,), -1)
    boxes[:count], labels[:count] = random_boxes(generator, count), torch.arange(count)
    padded, bare = match_anchors(anchors, boxes, labels), match_anchors(anchors, boxes[:count], labels[:count])
    assert torch.equal(padded[0], bare[0]) and torch.equal(padded[1], bare[1])
    assert (padded[0] >= 0).any() == (count > 0)


def test_focal_loss_and_its_gradient():
    """Oracle: torchvision.ops.sigmoid_focal_loss, value and gradient, for several alpha and gamma."""
    torch.manual_seed(0)
    labels = torch.randint(-1, 5, (2, 300))
    one_hot = F.one_hot(labels + 1, 6)[..., 1:].float()
    for alpha, gamma in ((0.25, 1.5), (0.25, 2.0), (0.6, 1.0)):
        ours = (torch.randn(2, 300, 5) * 4).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        value = focal_loss(ours, labels, alpha, gamma)
        expected = sigmoid_focal_loss(theirs, one_hot, alpha, gamma, reduction="sum")
        (value * 2).backward(), (expected * 2).backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_focal_loss_of_extreme_logits():
    """Oracle: by hand. At +-200 and in float16 the loss is finite and linear in the logit, its gradient too."""
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    value = focal_loss(logits, torch.tensor([1]))
    assert value.item() == pytest.approx(0.75 * 200 + 0.25 * 200)
    value.backward()
    assert logits.grad.tolist() == [[pytest.approx(0.75), pytest.approx(-0.25)]]
    assert focal_loss(torch.full((4, 3), 30.0, dtype=torch.float16), torch.zeros(4).long()).dtype == torch.float32


def saved_bytes(function, *args):
    """Bytes of the distinct storages that autograd keeps for the backward of function(*args)."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*args)
    return sum(storages.values())


def test_focal_loss_saves_little():
    """Oracle: autograd's own saved tensors. Backward holds about one copy of the logits; torchvision's loss, many."""
    logits, labels = torch.randn(2, 5000, 80, requires_grad=True), torch.randint(-1, 80, (2, 5000))
    copy = logits.numel() * 4
    one_hot = F.one_hot(labels + 1, 81)[..., 1:].float()
    # checkpoint() keeps its inputs through its own hooks, so count the graph it leaves and its argument.
    assert saved_bytes(focal_loss, logits, labels) <= 1.1 * copy
    assert saved_bytes(lambda x: sigmoid_focal_loss(x, one_hot, 0.25, 1.5, "sum"), logits) > 5 * copy


def test_background_only():
    """Oracle: by hand. Without objects the box loss is 0, the normalizer 1, and every gradient finite."""
    anchors = make_anchors((128, 128), 2)
    logits = torch.zeros(2, len(anchors), 3, requires_grad=True)
    codes = torch.randn(2, len(anchors), 4, requires_grad=True)
    losses = retinanet_loss(logits, codes, anchors, dict(boxes=torch.zeros(2, 100, 4), labels=torch.full((2, 100), -1)))
    assert losses["box"].item() == 0
    assert losses["class"].item() == pytest.approx(logits.numel() * 0.75 * 0.5**1.5 * np.log(2), rel=1e-4)
    sum(losses.values()).backward()
    assert logits.grad.isfinite().all() and not codes.grad.any()


def test_huber_by_hand():
    """Oracle: by hand. One positive anchor: delta 0.1, sum over coordinates / 4, weight 50, normalizer 2."""
    anchors = make_anchors((128, 128), 3)
    boxes, labels = torch.zeros(1, 100, 4), torch.full((1, 100), -1)
    boxes[0, 0], labels[0, 0] = torch.tensor([0.0, 0, 1, 1]), 0  # only its claimed anchor
    codes = torch.zeros(1, len(anchors), 4)
    matched_labels, matched = match_anchors(anchors, boxes[0], labels[0])
    (index,) = (matched_labels >= 0).nonzero()[0].tolist()
    codes[0, index] = encode_boxes(matched, anchors)[index] + torch.tensor([0.05, -0.3, 0.0, 0.1])
    box = retinanet_loss(torch.zeros(1, len(anchors), 1), codes, anchors, dict(boxes=boxes, labels=labels))["box"]
    huber = 0.5 * 0.05**2 + 0.1 * (0.3 - 0.05) + 0.5 * 0.1**2
    assert box.item() == pytest.approx(50 * huber / 4 / 2, rel=1e-4)


class Forbid(TorchDispatchMode):
    """Raises where an operation not `allowed` would wait for the device or give a shape that depends on the data."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal", "nms")

    def __init__(self, *allowed):
        super().__init__()
        self.allowed, self.calls = allowed, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        self.calls[name] += 1
        waits = any(name.startswith(n) or name.startswith("_" + n) for n in self.NAMES)
        assert not waits or name in self.allowed, name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), f"{name} by bool"
        return function(*args, **(kwargs or {}))


def shapes_of(value):
    """The shapes of a nested structure of tensors."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: shapes_of(v) for key, v in value.items()}
    return [shapes_of(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_the_shapes_that_comments_name(monkeypatch):
    """Oracle: the shape comments and docstrings, at the boundaries between files. B = 2, K = 7, S = 256."""
    seen = {}

    def spy(module, name):
        function = getattr(module, name)

        def wrapper(*args):
            result = function(*args)
            seen[name] = shapes_of(args), shapes_of(result)
            return result

        monkeypatch.setattr(module, name, wrapper)

    for name in ("make_anchors", "propose", "pack_pyramid", "roi_features", "detect"):
        spy(heads, name)
    for name in ("retinanet_loss", "rpn_loss", "sample_rois", "box_head_loss", "mask_targets", "mask_loss"):
        spy(loss, name)
    images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    targets = dict(boxes=torch.zeros(2, 100, 4), labels=torch.full((2, 100), -1), noise=torch.arange(2))
    targets["boxes"][:, 0], targets["labels"][:, 0] = torch.tensor([10.0, 10, 190, 170]), 3
    targets["masks"] = torch.ones(2, 100, 112, 112, dtype=torch.uint8)
    cells = [(256 // 2**L) ** 2 for L in range(3, 8)]
    A = 9 * sum(cells)

    detector = build_model("tiny", "retinanet", 7).train()
    losses = detector(images, targets)
    assert seen["make_anchors"][1] == (A, 4)
    assert seen["retinanet_loss"][0][:3] == [(2, A, 7), (2, A, 4), (A, 4)]
    assert all(value.shape == () and value.dtype == torch.float32 for value in losses.values())
    found = detector.eval()(images)
    assert seen["detect"][0] == [(A, 7), (A, 1, 4), (2,)]
    assert all(
        shapes_of(one) == {"boxes": (n, 4), "scores": (n,), "labels": (n,)}
        for one in found
        for n in [len(one["boxes"])]
    )

    detector = build_model("tiny", "mask_rcnn", 7, rois=32, mask_rois=8).train()
    losses = detector(images, targets)
    levels = [(2, 3 * n) for n in cells], [(2, 3 * n, 4) for n in cells], [(3 * n, 4) for n in cells]
    assert seen["propose"][0][:4] == [*levels, (2, 2)] and seen["rpn_loss"][0][:3] == list(levels)
    assert all(len(shape) == 2 and shape[0] <= 1000 and shape[1] == 4 for shape in seen["propose"][1])
    assert seen["pack_pyramid"][1][0] == (2, 64, sum(256 // 2**L + 1 for L in range(3, 8)), 33)
    assert seen["sample_rois"][1] == [(2, 32, 4), (2, 32), (2, 32)]
    assert seen["box_head_loss"][0][:2] == [(64, 8), (64, 8, 4)]
    assert seen["roi_features"][1] == (16, 64, 14, 14) and seen["mask_loss"][0][0] == (16, 8, 28, 28)
    assert seen["mask_targets"][1] == (2, 8, 28, 28)
    assert all(value.shape == () and value.dtype == torch.float32 for value in losses.values())
    found = detector.eval()(images)
    assert all(one["masks"].shape == (len(one["boxes"]), 28, 28) for one in found)


def test_forbidding_works():
    """Oracle: by hand. The mode below does catch what it is there to catch."""
    x = torch.arange(4.0)
    for wait in (lambda: x[0].item(), lambda: x[x > 1], lambda: x.nonzero(), lambda: bool(x.sum()), lambda: x.unique()):
        with pytest.raises(AssertionError), Forbid():
            wait()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("head, waits", [("retinanet", {}), ("mask_rcnn", {"nms": 2 * 5})])
def test_a_step_never_waits_for_the_device(head, waits, autocast):
    """Oracle: the operations dispatched from the batch's arrival to the end of backward, with objects and without. Only
    torchvision's NMS waits, once per image and level."""
    detector = build_model("tiny", head, 7, activation="swish", drop_path=0.2, drop_rate=0.1).train()
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    targets = dict(boxes=torch.zeros(2, 100, 4), labels=torch.full((2, 100), -1), noise=torch.arange(2))
    targets["boxes"][0, 0], targets["labels"][0, 0] = torch.tensor([10.0, 10, 90, 70]), 3
    targets["masks"] = torch.ones(2, 100, 112, 112, dtype=torch.uint8)
    with Forbid(*waits) as mode, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = detector(images, targets)
        sum(losses.values()).backward()
    assert {name: mode.calls[name] for name in ("nms",) if mode.calls[name]} == waits
    assert all(value.dtype == torch.float32 and value > 0 for value in losses.values())
    assert all(p.grad is not None for p in detector.parameters())


def test_detections_by_hand():
    """Oracle: by hand. Threshold, clipping to the image's own region, order, labels."""
    anchors = torch.tensor([[0.0, 0, 20, 20], [100, 100, 140, 120], [60, 0, 80, 20]])
    scores = torch.full((3, 2), 1e-4)
    scores[0, 1], scores[1, 0], scores[2, 0] = 0.5, 0.9, 0.0497
    codes = torch.zeros(3, 4)
    codes[0] = torch.tensor([0.5, 0.0, 0.0, np.log(2.0)])
    found = detect(scores, decode_boxes(codes, anchors)[:, None], torch.tensor([110.0, 128.0]))
    assert found["labels"].tolist() == [0, 1]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5])
    assert found["boxes"].tolist() == [[100, 100, 128, 110], [10, 0, 30, 30]]


@pytest.mark.parametrize("shared", [True, False])
def test_detections_of_random_outputs(shared):
    """Oracle: torchvision.ops.batched_nms over every (anchor, class) pair above the threshold, with boxes that the
    classes share and with a box for each class."""
    generator = torch.Generator().manual_seed(0)
    anchors = make_anchors((128, 128), 3)
    scores = (torch.randn(len(anchors), 3, generator=generator) * 2 - 4).sigmoid()
    codes = torch.randn(len(anchors), 1 if shared else 3, 4, generator=generator) * 0.3
    boxes = decode_boxes(codes, anchors[:, None])
    found = detect(scores, boxes, torch.tensor([128.0, 128.0]))
    anchor, label = (scores > 0.05).nonzero(as_tuple=True)
    assert 1000 < len(anchor) < 5000
    boxes, scores = boxes[anchor, 0 if shared else label].clamp(0, 128), scores[anchor, label]
    kept = batched_nms(boxes, scores, label, 0.5)[:100]
    assert len(found["boxes"]) == 100
    assert torch.allclose(found["boxes"], boxes[kept]) and torch.equal(found["labels"], label[kept])
    assert torch.equal(found["scores"], scores[kept])


def test_no_detections():
    """Oracle: by hand. Nothing above the threshold gives empty tensors of the right shapes."""
    found = detect(torch.full((50, 4), 0.05), torch.zeros(50, 1, 4), torch.tensor([128.0, 128.0]))
    assert found["boxes"].shape == (0, 4) and found["scores"].shape == (0,) and found["labels"].shape == (0,)
