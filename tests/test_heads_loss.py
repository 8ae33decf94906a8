"""heads.py and loss.py: anchors, box code, matching, focal and Huber losses, detections."""

import gc
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
from heads import RetinaNetHead, Tower, clip_boxes, decode_boxes, detect, encode_boxes, make_anchors, per_anchor
from loss import focal_loss, match_anchors, retinanet_loss
from model import build_model

OFFICIAL = np.load(Path(__file__).parent / "official_targets.npz")
XY = [1, 0, 3, 2]  # the authors put y first, in boxes and in codes


def official(prefix, width):
    """The levels 3..7 of one official array, joined: (A, width), or (A,) for width 0."""
    shape = (-1, width) if width else (-1,)
    return torch.cat([torch.from_numpy(OFFICIAL[f"{prefix}_{L}"]).reshape(shape) for L in range(3, 8)])


def same(ours, expected, what, rtol=0.0, atol=0.0):
    """Fails where a tensor is not the expected one, and says of what, and how it differs first."""
    assert isinstance(ours, torch.Tensor), f"{what}: no tensor, but {type(ours).__name__}"
    for name, found, wanted in (("shape", ours.shape, expected.shape), ("dtype", ours.dtype, expected.dtype)):
        assert found == wanted, f"{what}: {name} {found}, not {wanted}"
    near = torch.isclose(ours, expected, rtol=rtol, atol=atol) if ours.is_floating_point() else ours == expected
    if not near.all():
        first = (~near).nonzero()[0].tolist()
        row = tuple(first[:-1] if ours.ndim > 1 and ours.shape[-1] <= 4 else first)
        found, wanted = ours[row].tolist(), expected[row].tolist()
        raise AssertionError(f"{what}: {(~near).sum()} of {near.numel()} differ, at {list(row)} {found}, not {wanted}")


def test_anchors_by_hand():
    """Oracle: by hand. Count, order, centres and sides where height and width differ; other scales and aspects."""
    anchors = make_anchors((128, 384), 3)
    expected = (9 * (16 * 48 + 8 * 24 + 4 * 12 + 2 * 6 + 1 * 3), 4)
    assert anchors.shape == expected, f"9 anchors (4 sides each) of each location of P3 to P7: not {expected}"
    centres, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    assert centres[0].tolist() == [4, 4], "the first location's centre is half a stride from the corner: (4, 4)"
    after = "locations go row by row, x first, over 384 / 8 = 48 columns and 16 rows"
    assert centres[9].tolist() == [12, 4] and centres[9 * 48].tolist() == [4, 12], after
    assert centres[9 * 48 * 16].tolist() == [8, 8], "P4's anchors begin where P3's end, with stride 16"
    assert sides[0].tolist() == [24, 24], "the first anchor has scale 1 and aspect 1: 3 strides of 8 pixels a side"
    wide = [24 * 2**0.5, 24 / 2**0.5]
    assert sides[3].tolist() != pytest.approx(wide), "an anchor's number is scale-major: all aspects of the first scale"
    assert sides[1].tolist() == pytest.approx(wide), "an anchor of aspect 2 is wide: s sqrt(2) by s / sqrt(2)"
    assert sides[3].tolist() == pytest.approx([24 * 2 ** (1 / 3)] * 2), "the second scale is the cube root of 2"
    other = make_anchors((128, 128), 4, "cpu", (0.5, 2.0), (4.0,))
    sides = (other[:, 2:] - other[:, :2])[:2].tolist()
    assert sides == [[32, 8], [128, 32]], "with scales (0.5, 2) and aspects (4,), from 4 strides of 8 pixels"
    assert make_anchors((128, 128), 3, "meta").device.type == "meta", "the anchors are on the device that was asked for"


@pytest.mark.parametrize("anchor_size", [3, 4])
def test_anchors_equal_the_official_code(anchor_size):
    """Oracle: the authors' anchors, to the last bit but for the order of x and y."""
    official_anchors = torch.from_numpy(OFFICIAL[f"anchors_{anchor_size}"])[:, XY]
    what = "anchors are the authors' to the last bit, with float64 sides, and float32 after that"
    same(make_anchors((128, 128), anchor_size), official_anchors, what)


def random_boxes(generator, count, size=128):
    """(count, 4) boxes whose sides are at least 4 pixels."""
    corners = torch.rand(count, 2, 2, generator=generator) * size
    return torch.cat((corners.amin(1), corners.amax(1) + 4), dim=1)


def test_encode_by_hand():
    """Oracle: by hand."""
    code = encode_boxes(torch.tensor([10.0, 20.0, 30.0, 30.0]), torch.tensor([0.0, 20.0, 20.0, 40.0]))
    assert code[:2].tolist() == pytest.approx([0.5, -0.25]), "dx, dy: from the anchor's centre to the box's, in sides"
    assert code[2:].tolist() == pytest.approx([0.0, np.log(0.5)], abs=1e-6), "log of the box's side by the anchor's"
    code = encode_boxes(torch.tensor([0.0, 0.0, 8.0, 2.0]), torch.tensor([0.0, 0.0, 4.0, 16.0]))
    expected = [0.5, -7 / 16, np.log(2), np.log(1 / 8)]
    assert code.tolist() == pytest.approx(expected), "dx and dw by the anchor's width, dy and dh by its height"


def test_box_code_weights():
    """Oracle: by hand, and the identity. Weights (10, 5) multiply the code; the clamp stays at log(1000 / 16)."""
    box, anchor = torch.tensor([10.0, 20, 30, 30]), torch.tensor([0.0, 20, 20, 40])
    code = encode_boxes(box, anchor, (10.0, 5.0))
    expected = [5.0, -2.5, 0.0, 5 * np.log(0.5)]
    assert code.tolist() == pytest.approx(expected), "weights multiply the code: the first dx, dy, the second log sides"
    same(decode_boxes(code, anchor, (10.0, 5.0)), box, "decoding divides by the weights", atol=1e-4)
    wide = decode_boxes(torch.tensor([0.0, 0, 999, 0]), anchor, (10.0, 5.0))
    clamped = "what is clamped is the log of the side, after its weight is divided away"
    assert (wide[2] - wide[0]).item() == pytest.approx(20 * 1000 / 16), clamped


def test_encode_and_decode_are_inverse():
    """Oracle: identity on random boxes and anchors, both ways; the clamp bounds the side, from above alone."""
    anchor = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    wide = decode_boxes(torch.tensor([[0.0, 0.0, 99.0, 1.0]]), anchor)
    assert (wide[0, 2] - wide[0, 0]).item() == pytest.approx(8 * 1000 / 16), "a side is at most 62.5 anchors'"
    small = decode_boxes(torch.tensor([[0.0, 0.0, -8.0, 0.0]]), anchor)
    assert (small[0, 2] - small[0, 0]).item() == pytest.approx(8 * np.exp(-8), rel=0.01), "only large sides are clamped"
    generator = torch.Generator().manual_seed(0)
    boxes, anchors = random_boxes(generator, 1000), random_boxes(generator, 1000)
    same(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, "decoding inverts encoding", atol=1e-3)
    codes = torch.randn(1000, 4, generator=generator)
    decoded = decode_boxes(codes.clone(), anchors)
    same(encode_boxes(decoded, anchors), codes, "encoding inverts decoding", atol=1e-3)


def test_decoding_half_precision_for_many_classes():
    """Oracle: the same in float32, and a box at a time. The leading dimensions broadcast; boxes are float32."""
    generator = torch.Generator().manual_seed(0)
    anchors, codes = random_boxes(generator, 50), torch.randn(2, 50, 3, 4, generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = codes.to(dtype).float()
        expected = [decode_boxes(rounded[b, a, k], anchors[a]) for b in range(2) for a in range(50) for k in range(3)]
        what = f"codes (2, 50, 3, 4) of {dtype} on anchors (50, 1, 4), as float32"
        found = decode_boxes(codes.to(dtype), anchors[:, None])
        same(found, torch.stack(expected).reshape(2, 50, 3, 4), what, rtol=1e-5, atol=1e-4)


def test_clipping():
    """Oracle: by hand. Each image's boxes are clipped to its own (height, width)."""
    boxes = torch.tensor([[[-5.0, -6, 30, 40], [10, 10, 20, 20], [50, -9, 60, -7]]]).repeat(2, 1, 1)
    clipped = clip_boxes(boxes, torch.tensor([[32.0, 24], [15, 18]]))
    expected = [
        [[0, 0, 24, 32], [10, 10, 20, 20], [24, 0, 24, 0]],
        [[0, 0, 18, 15], [10, 10, 18, 15], [18, 0, 18, 0]],
    ]
    what = "x is clipped to 0..width, y to 0..height, of each image its own"
    same(clipped, torch.tensor(expected, dtype=torch.float32), what)


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


def match(anchors, boxes, labels, *thresholds):
    """The labels as a list, and the boxes, of `match_anchors`."""
    matched = match_anchors(torch.tensor(anchors), torch.tensor(boxes), torch.tensor(labels), *thresholds)
    assert matched[0].dtype == torch.int64, "an anchor's label is int64"
    return matched[0].tolist(), matched[1]


def test_matching_ties_and_claims():
    """Oracle: by hand. Equal anchors: the first; contested anchor: the first object; a claim beats a better IoU, and
    needs none; a match may have the threshold exactly; anchors without an object have their own box."""
    square, far = [0.0, 0, 10, 10], [50.0, 50, 60, 60]
    labels, matched = match([square, far], [[0.0, 0, 10, 9]], [3])
    assert labels == [3, -1], "an anchor that overlaps an object by 0.9 has its label, one that overlaps none has -1"
    own = "without an object, an anchor's box is its own, so that nothing takes the logarithm of padding"
    same(matched, torch.tensor([[0.0, 0, 10, 9], far]), own)
    labels, _ = match([square, [0.0, 0, 10, 5], [0.0, 0, 10, 4.9]], [square], [3])
    assert labels == [3, 3, -1], "an IoU of exactly the threshold, 0.5, is a match; one below is none"

    labels, _ = match([square, square, far], [square, square], [4, 7])
    assert labels[0] == 4, "an anchor that two objects claim goes to the first in the list"
    assert labels == [4, 4, -1], "an anchor that two objects overlap alike goes to the first in the list"
    labels, _ = match([far, [0.0, 0, 4, 10], [6.0, 0, 10, 10]], [[3.0, 0, 7, 10]], [5])
    assert labels == [-1, 5, -1], "an object claims an anchor, whatever the IoU; of two alike, the first"
    labels, _ = match([far, square], [[80.0, 80, 90, 90]], [5])
    assert labels == [5, -1], "an object claims an anchor also with IoU 0: the first"

    # Object 1 overlaps anchor 2 best by far; object 0, tiny, has no better anchor than 2 and so claims it.
    boxes = [[50.0, 50, 51, 51], [50, 50, 60, 59]]
    labels, matched = match([square, square, far], boxes, [1, 2])
    assert labels == [-1, -1, 1], "a claim overrides a match; of two claims the first object's counts, not the better"
    same(matched[2], torch.tensor(boxes[0]), "the box of a claimed anchor is its claimant's")

    labels, matched = match([square, far], [square, square], [-1, -1])
    assert labels == [-1, -1], "padding never claims and never matches, not even if its box is an anchor"
    same(matched, torch.tensor([square, far]), own)
    labels, _ = match([square, square, far], [square, [0.0, 0, 10, 9]], [-1, 5])
    assert labels == [5, 5, -1], "padding never claims and never matches, whatever its box"


@pytest.mark.parametrize("seed", range(5))
def test_matching_of_random_boxes(seed):
    """Oracle: the rule as a plain double loop over anchors and objects, with torchvision's box_iou. Two objects claim
    one anchor."""
    generator = torch.Generator().manual_seed(seed)
    anchors = make_anchors((128, 128), 3)[::3]
    boxes, labels = random_boxes(generator, 12), torch.arange(12)
    boxes[1], labels[9:] = boxes[0] + 0.1, -1
    first, second = box_iou(boxes[:2], anchors).argmax(dim=1).tolist()
    assert first == second, "the two objects' best anchor is one"
    expected = torch.tensor(slow_match(anchors, boxes, labels))
    matched_labels, matched_boxes = match_anchors(anchors, boxes, labels)
    same(matched_labels, expected, "labels of anchors, by the rule in plain loops")  # they are the objects' own numbers
    same(matched_boxes, torch.where(expected[:, None] >= 0, boxes[expected], anchors), "boxes of anchors")


@pytest.mark.parametrize("count", [0, 1, 100])
def test_matching_of_any_number_of_boxes(count):
    """Oracle: padding. The first `count` rows alone give what 100 padded rows give."""
    anchors, generator = make_anchors((128, 128), 3), torch.Generator().manual_seed(1)
    boxes, labels = torch.zeros(100, 4), torch.full((100,), -1)
    boxes[:count], labels[:count] = random_boxes(generator, count), torch.arange(count)
    padded, bare = match_anchors(anchors, boxes, labels), match_anchors(anchors, boxes[:count], labels[:count])
    for ours, expected, what in zip(padded, bare, ("labels", "boxes")):
        same(ours, expected, f"{what} of {count} objects, padded to 100, and of these alone")
    assert (padded[0] >= 0).any() == (count > 0), f"{count} objects, so there are {'some' if count else 'no'} positives"


def randomized(module):
    """The module with weights, biases and statistics of batch norms drawn anew, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for name, values in module.state_dict().items():
        if values.is_floating_point():
            values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
            if name.endswith("weight") and values.ndim > 1:
                values.sub_(1).mul_(2)
    return module


@torch.no_grad()
@pytest.mark.parametrize("activation, act", [("relu", F.relu), ("swish", F.silu)])
def test_a_tower_by_hand(activation, act):
    """Oracle: torch's functions, one after the other. Convolutions are shared; a batch norm is its level's own."""
    tower = randomized(Tower(6, 6, 3, activation)).eval()
    for level in (0, 3):
        expected = x = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(level))
        for conv, norm in zip(tower.convs, tower.norms[level]):
            expected = F.conv2d(expected, conv.weight, conv.bias, padding=1)
            expected = F.batch_norm(expected, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)
            expected = act(expected)
        what = f"each convolution, then its batch norm of level {level}, then {activation}"
        same(tower(x, level), expected, what, rtol=1e-4, atol=1e-4)
    tower.train()(x, 3)
    counts = [[int(norm.num_batches_tracked) for norm in norms] for norms in tower.norms]
    assert counts == [[0] * 3] * 3 + [[1] * 3] + [[0] * 3], (
        "in training, only this level's batch norms see its features"
    )


def test_outputs_per_anchor():
    """Oracle: indexing. Locations go row by row; a location's channels are anchor-major."""
    x = torch.arange(2 * 6 * 3 * 4).reshape(2, 6, 3, 4)
    expected = [
        [
            [x[b, anchor * 2 + k, i, j].item() for k in range(2)]
            for i in range(3)
            for j in range(4)
            for anchor in range(3)
        ]
        for b in range(2)
    ]
    what = "(2, 3 anchors of 2 values, 3, 4): row by row, at each location anchor by anchor, its values together"
    same(per_anchor(x, 2), torch.tensor(expected), what)


@torch.no_grad()
def test_a_retinanet_head_by_hand():
    """Oracle: the towers and last layers, a level at a time, where the levels are not square."""
    head = randomized(RetinaNetHead(6, 6, 2, 3, "swish")).eval()
    features = [torch.randn(2, 6, 2 ** (4 - k), 2 ** (5 - k)) for k in range(5)]
    logits, codes = head(features)
    for ours, tower, last, values, name in (
        (logits, head.class_tower, head.class_predict, 3, "class logits"),
        (codes, head.box_tower, head.box_predict, 4, "box codes"),
    ):
        outputs = [last(tower(x, level)) for level, x in enumerate(features)]
        expected = torch.cat([out.permute(0, 2, 3, 1).reshape(2, -1, values) for out in outputs], 1)
        same(ours, expected, f"{name}, from their own tower, with each level's number, from P3 to P7", 1e-4, 1e-4)


def test_focal_loss_by_hand():
    """Oracle: by hand. With logits 0 all p are 1/2: what remains are alpha, gamma, the logarithm of 2 and the sum."""
    logits, log2 = torch.zeros(2, 3, 4), np.log(2)
    nothing, first = torch.full((2, 3), -1), torch.zeros(2, 3, dtype=torch.int64)
    ratio = (focal_loss(logits, nothing, 0.3, 3.0) / focal_loss(logits, nothing, 0.3, 1.0)).item()
    assert ratio == pytest.approx(0.5**2), "gamma is the exponent of 1 - p_t, whatever it is: here 3, and 1"
    ratio = (focal_loss(logits, nothing) / focal_loss(logits[:1], nothing[:1])).item()
    assert ratio == pytest.approx(2), (
        "the loss is a sum over all entries: of two images alike it is twice one's, no mean"
    )
    absent = "a class that is absent weighs 1 - alpha"
    assert focal_loss(logits, nothing, 0.3, 1.0).item() == pytest.approx(24 * 0.7 * 0.5 * log2), absent
    present = "the class that is present weighs alpha, the others 1 - alpha; it is the label's, the first is 0"
    assert focal_loss(logits, first, 0.3, 1.0).item() == pytest.approx(6 * (0.3 + 3 * 0.7) * 0.5 * log2), present
    expected = 24 * 0.75 * 0.5**1.5 * log2
    assert focal_loss(logits, nothing).item() == pytest.approx(expected), "without a word alpha is 0.25, gamma 1.5"
    logits[..., 0] = 2.0
    found, p = focal_loss(logits, first, 1.0, 2.0).item(), 1 / (1 + np.exp(-2))
    assert found == pytest.approx(-6 * (1 - p) ** 2 * np.log(p)), "p_t is p where the class is present: (1 - p)^2 log p"
    found = focal_loss(logits, first + 1, 0.0, 2.0).item() - 12 * 0.25 * log2
    assert found == pytest.approx(-6 * p**2 * np.log(1 - p), rel=1e-4), "p_t is 1 - p where the class is absent"


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
        assert value.item() == pytest.approx(expected.item(), rel=1e-5), "the value is torchvision's"
        same(ours.grad, theirs.grad, "the gradient is torchvision's", rtol=1e-4, atol=1e-6)


def test_focal_loss_of_extreme_logits():
    """Oracle: by hand. At +-200 the loss is finite and linear in the logit, its gradient, too; half precision's is
    computed in float32."""
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    value = focal_loss(logits, torch.tensor([1]))
    stable = "where p is 0 or 1 in float32, log p is still the logit's: no logarithm of a sigmoid"
    assert value.item() == pytest.approx(0.75 * 200 + 0.25 * 200), stable
    value.backward()
    assert logits.grad.tolist() == [[pytest.approx(0.75), pytest.approx(-0.25)]], f"the gradient, {stable}"
    for dtype in (torch.float16, torch.bfloat16):
        logits = (torch.randn(4000, 30, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
        value = focal_loss(logits, torch.zeros(4000).long())
        assert value.dtype == torch.float32, "the loss is float32, also of logits of half precision"
        expected = focal_loss(logits.float(), torch.zeros(4000).long()).item()
        assert value.item() == pytest.approx(expected, rel=1e-4), (
            "the arithmetic is float32, also of half-precision logits"
        )


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
    copies = saved_bytes(focal_loss, logits, labels) / copy
    assert copies <= 1.1, f"backward holds {copies:.1f} copies of the logits and not the logits alone"
    value = focal_loss(logits.detach().bfloat16().requires_grad_(), labels)
    gc.collect()
    alike = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == logits.shape]
    wide = sum(x.dtype == torch.float32 and x is not logits and x is not one_hot for x in alike)
    assert value.requires_grad and wide == 0, "of half-precision logits backward holds a float32 copy"
    assert saved_bytes(lambda x: sigmoid_focal_loss(x, one_hot, 0.25, 1.5, "sum"), logits) > 5 * copy


def test_background_only():
    """Oracle: by hand. Without objects the box loss is 0, the normalizer 1, and every gradient finite."""
    anchors = make_anchors((128, 128), 2)
    logits = torch.zeros(2, len(anchors), 3, requires_grad=True)
    codes = torch.randn(2, len(anchors), 4, requires_grad=True)
    losses = retinanet_loss(logits, codes, anchors, dict(boxes=torch.zeros(2, 100, 4), labels=torch.full((2, 100), -1)))
    expected = logits.numel() * 0.75 * 0.5**1.5 * np.log(2)
    assert losses["class"].item() == pytest.approx(expected, rel=1e-4), "1 + the number of positive anchors is never 0"
    assert losses["box"].item() == 0, "background has no box loss: it is not trained towards any box"
    sum(losses.values()).backward()
    assert logits.grad.isfinite().all() and not codes.grad.any(), "gradients are finite, of background's codes 0"


def test_huber_by_hand():
    """Oracle: by hand. One positive anchor: delta 0.1, sum over coordinates / 4, weight 50, normalizer 2."""
    anchors = make_anchors((128, 128), 3)
    boxes, labels = torch.zeros(1, 100, 4), torch.full((1, 100), -1)
    boxes[0, 0], labels[0, 0] = torch.tensor([0.0, 0, 1, 1]), 0  # only its claimed anchor
    codes = torch.full((1, len(anchors), 4), torch.inf)  # what background says of a box is selected away
    matched_labels, matched = match_anchors(anchors, boxes[0], labels[0])
    (index,) = (matched_labels >= 0).nonzero()[0].tolist()
    for offset, huber, what in (
        ([0.05, 0, 0, 0.08], 0.5 * (0.05**2 + 0.08**2), "within delta: the squares, halved,"),
        ([0, -0.3, 0.2, 0], 0.1 * (0.3 - 0.05) + 0.1 * (0.2 - 0.05), "beyond delta, 0.1: linear,"),
    ):
        codes[0, index] = encode_boxes(matched, anchors)[index] + torch.tensor(offset)
        losses = retinanet_loss(torch.zeros(1, len(anchors), 1), codes, anchors, dict(boxes=boxes, labels=labels))
        assert losses["box"].isfinite(), "background's codes are selected away, not multiplied by 0: inf * 0 is NaN"
        what = f"50 x Huber loss, {what} summed over the coordinates of positive anchors / 4 / (1 + 1 positive anchor)"
        assert losses["box"].item() == pytest.approx(50 * huber / 4 / 2, rel=1e-4), what
    entries = (len(anchors) - 1) * 0.75 + 0.25
    what = "focal loss / (1 + 1 positive anchor)"
    assert losses["class"].item() == pytest.approx(entries * 0.5**1.5 * np.log(2) / 2, rel=1e-4), what


def two_images(generator):
    """(anchors, logits, codes, targets) of two images with few and many objects; an image alone: `part` below."""
    anchors = make_anchors((128, 128), 3)
    boxes, labels = torch.zeros(2, 100, 4), torch.full((2, 100), -1)
    for image, count in enumerate((2, 20)):
        boxes[image, :count], labels[image, :count] = random_boxes(generator, count), torch.arange(count) % 3
    shape = (2, len(anchors))
    logits, codes = torch.randn(*shape, 3, generator=generator), torch.randn(*shape, 4, generator=generator)
    return anchors, logits, codes, dict(boxes=boxes, labels=labels)


def test_one_normalizer_for_the_batch():
    """Oracle: the images alone. Their sums of losses are added, and divided once, by 1 + all positive anchors."""
    anchors, logits, codes, targets = two_images(torch.Generator().manual_seed(0))
    counts = [(match_anchors(anchors, *pair)[0] >= 0).sum().item() for pair in zip(targets["boxes"], targets["labels"])]
    assert 0 < 3 * counts[0] < counts[1]
    together, sums = retinanet_loss(logits, codes, anchors, targets), {"class": 0.0, "box": 0.0}
    for k in (0, 1):
        part = slice(k, k + 1)
        alone = retinanet_loss(logits[part], codes[part], anchors, {n: v[part] for n, v in targets.items()})
        sums = {name: total + alone[name].item() * (1 + counts[k]) for name, total in sums.items()}
    for name, total in sums.items():
        what = f"{name}: one normalizer for the batch, 1 + the number of its positive anchors, not one for each image"
        assert together[name].item() == pytest.approx(total / (1 + sum(counts)), rel=1e-4), what


def test_the_normalizer_counts_over_all_ranks(request):
    """Oracle: by hand. The loss is this rank's sum, by the mean over the ranks of what both have counted, as DDP's
    average of gradients wants it."""
    anchors, logits, codes, targets = two_images(torch.Generator().manual_seed(0))
    alone = retinanet_loss(logits, codes, anchors, targets)
    count = sum(
        (match_anchors(anchors, *pair)[0] >= 0).sum().item() for pair in zip(targets["boxes"], targets["labels"])
    )
    request.getfixturevalue("as_one_of_two_ranks")
    for name, value in retinanet_loss(logits, codes, anchors, targets).items():
        what = f"{name}: divided by (1 + positive anchors over all ranks) / ranks"
        assert value.item() == pytest.approx(alone[name].item() * (1 + count) * 2 / (1 + 3 * count), rel=1e-5), what


@pytest.mark.parametrize("case", ["s0", "s1"])
def test_targets_and_losses_equal_the_official_code(case):
    """Oracle: the authors' labels exactly; box targets and both losses to 1e-5 relative."""
    anchors = make_anchors((128, 128), 3)
    boxes = torch.zeros(1, 100, 4)
    labels = torch.full((1, 100), -1)
    gt, cls = torch.from_numpy(OFFICIAL[f"{case}_gt"]), torch.from_numpy(OFFICIAL[f"{case}_cls"])
    boxes[0, : len(gt)], labels[0, : len(gt)] = gt[:, XY], cls[:, 0].long()

    matched_labels, matched_boxes = match_anchors(anchors, boxes[0], labels[0])
    same(matched_labels, official(f"{case}_ct", 0).long(), "the anchors' labels are the authors'")
    positive = matched_labels >= 0
    codes, expected = encode_boxes(matched_boxes, anchors)[positive], official(f"{case}_bt", 4)[positive][:, XY]
    same(codes, expected, "the positive anchors' codes are the authors'", rtol=1e-5, atol=1e-6)
    same(matched_boxes[~positive], anchors[~positive], "the other anchors' boxes are their own")

    positives, class_loss, box_loss = OFFICIAL[f"{case}_loss"].tolist()
    assert positive.sum() == positives
    logits = official(f"{case}_co", 7)[None]  # output 0, the background's, is one more class that never occurs
    codes = official(f"{case}_bo", 4)[None][..., XY]
    losses = retinanet_loss(logits, codes, anchors, dict(boxes=boxes, labels=labels))
    assert losses["class"].item() == pytest.approx(class_loss, rel=1e-5), "the class loss is the authors'"
    assert losses["box"].item() / 50 == pytest.approx(box_loss, rel=1e-5), "the box loss is the authors', times 50"


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
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5]), "scores above 0.05, best first"
    assert found["labels"].tolist() == [0, 1], "each with its class"
    clipped = "each with its box, clipped to the region's (height, width)"
    assert found["boxes"].tolist() == [[100, 100, 128, 110], [10, 0, 30, 30]], clipped
    own = torch.tensor([[[0.0, 0, 20, 20], [50, 0, 70, 20]], [[0, 50, 20, 70], [50, 50, 70, 70]]])
    found = detect(torch.tensor([[0.9, 0.8], [0.7, 0.6]]), own, torch.tensor([128.0, 128.0]))
    assert found["labels"].tolist() == [0, 1, 0, 1] and found["boxes"].tolist() == own.flatten(0, 1).tolist(), (
        "where classes have boxes of their own, a detection's is its class's"
    )


def detections(scores, boxes, size=(128.0, 128.0)):
    """`detect` of scores (A, K) and boxes (A, 4), as lists."""
    found = detect(torch.tensor(scores), torch.tensor(boxes)[:, None], torch.tensor(size))
    return {name: values.tolist() for name, values in found.items()}


def test_what_suppresses_what():
    """Oracle: by hand. NMS is of each class alone, at IoU 0.5, of boxes that were clipped before."""
    box, near = [0.0, 0, 20, 20], [0.0, 0, 20, 19]
    assert detections([[0.6], [0.7]], [box, near])["boxes"] == [near], (
        "of two boxes that overlap by 0.95 the best stays"
    )
    found = detections([[0.6, 0.1], [0.1, 0.7]], [box, near])
    assert found["labels"] == [1, 0] and found["boxes"] == [near, box], "a box suppresses none of another class"
    apart = [0.0, 0, 20, 9]
    assert len(detections([[0.6], [0.7]], [box, apart])["boxes"]) == 2, "boxes that overlap by 0.45 both stay"
    wide, high = [100.0, 100, 300, 120], [100.0, 100, 120, 300]
    found = detections([[0.6], [0.7]], [wide, high], (120.0, 120.0))
    assert found["boxes"] == [[100, 100, 120, 120]], "boxes are clipped before NMS: these two become one"


def test_at_most_100_detections_of_5000_candidates():
    """Oracle: counting. 150 boxes apart leave the 100 best; what is not among the 5000 best scores is not detected."""
    corners = np.stack(np.meshgrid(np.arange(15.0), np.arange(10.0)), -1).reshape(-1, 2) * 8
    scores = np.random.default_rng(0).permutation(150) / 300 + 0.1
    found = detections(scores[:, None].astype(np.float32).tolist(), np.hstack((corners, corners + 4)).tolist())
    assert len(found["scores"]) == 100, "at most 100 detections"
    assert found["scores"] == pytest.approx(sorted(scores, reverse=True)[:100]), "the best 100 stay, best first"
    boxes = [[0.0, 0, 20, 20]] * 2500 + [[50.0, 50, 70, 70]]
    for many, last, expected in ((0.8, 0.3, [0.9, 0.8]), (0.01, 0.3, [0.9, 0.8, 0.3]), (0.8, 0.95, [0.95, 0.9, 0.8])):
        found = detections([[0.9, 0.8]] * 2499 + [[0.9, many], [last, 0.01]], boxes)
        only = "only the 5000 best scores above 0.05, of all classes together, go into NMS"
        assert found["scores"] == pytest.approx(expected), only


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
    for name, values in (("scores", scores), ("labels", label), ("boxes", boxes)):
        what = f"{name}, as by torchvision's batched_nms of all pairs of an anchor and a class"
        same(found[name], values[kept], what, atol=1e-3 if name == "boxes" else 0)


def test_nothing_likely():
    """Oracle: by hand. Nothing above the threshold gives empty tensors of the right shapes."""
    found = detect(torch.full((50, 4), 0.05), torch.zeros(50, 1, 4), torch.tensor([128.0, 128.0]))
    shapes = {name: tuple(values.shape) for name, values in found.items()}
    empty = "scores of exactly the threshold, 0.05, are not above it: (0, 4) boxes, (0,) scores and labels"
    assert shapes == {"boxes": (0, 4), "scores": (0,), "labels": (0,)}, empty
