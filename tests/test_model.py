"""blocks.py and model.py against the paper, its released code and counts made with it."""

import dataclasses
import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_heads_loss import same
from torch import nn
from torch.overrides import TorchFunctionMode

import model
from blocks import (
    BN_EPSILON,
    BN_MOMENTUM,
    Bottleneck,
    ConvBN,
    Resample,
    Residual,
    drop_block,
    init_conv_,
    max_pool_same,
)
from heads import BoxHead, MaskHead, RetinaNetHead, RPNHead
from model import ARCHS, SPINE, Arch, SpineNet, build_model

GOLDEN = Path(__file__).parent / "official_small.npz"
OTHER_SPINE = tuple(block._replace(as_is=()) for block in SPINE)

# head, arch, size, parameters, billions of multiply-adds: the authors' code, run with 91 outputs. Mask R-CNN's are of
# class, box and mask predictors alike, the background's included.
COUNTS = [
    ("retinanet", "49S", 640, 11_265_942, 30.779),
    ("retinanet", "49", 640, 28_543_383, 85.282),
    ("retinanet", "49", 896, 28_543_383, 167.153),
    ("retinanet", "96", 1024, 42_974_871, 265.024),
    ("retinanet", "143", 1280, 66_959_511, 523.338),
    ("retinanet", "190", 1280, 163_637_351, 1881.660),
    ("mask_rcnn", "49S", 640, 13_946_608, 59.7),
    ("mask_rcnn", "49", 640, 40_753_521, 215.4),
    ("mask_rcnn", "96", 1024, 55_185_009, 314.1),
    ("mask_rcnn", "143", 1280, 79_169_649, 497.6),
    ("mask_rcnn", "190", 1536, 168_210_497, 1683.0),
]
count = functools.cache(model.count)  # a second or two each
BACKBONES = {"49S": 9_089_215, "49": 21_831_488, "96": 36_262_976, "143": 60_247_616, "190": 126_587_664}


@pytest.mark.parametrize("arch, widths", [("49S", (41, 83, 166)), ("49", (64, 128, 256)), ("190", (83, 166, 332))])
def test_widths_by_hand(arch, widths):
    """Oracle: by hand. 64, 128 and from level 4 on 256 channels times 0.65, 1 and 1.3, as integers, rounded down."""
    for level, expected in zip(range(2, 8), (*widths, *widths[2:] * 3)):
        width = ARCHS[arch].width(level)
        assert type(width) is int, f"a width is an integer, not {width!r}"
        how = "BASE_WIDTH of that level times filter_scale, rounded down"
        assert width == expected, f"the width of SpineNet-{arch} at level {level} is {expected}, not {width}: {how}"


def refusal(call, *args):
    """What a call is refused with, "" where it isn't."""
    try:
        call(*args)
    except NotImplementedError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


REFUSED = [
    (640, 600),
    (600, 640),
    (0, 128),
    (128, 0),
    (0, 0),
    (100, 128),
    (127, 127),
    (129, 128),
    (192, 128),
    (128, 64),
    (-128, 128),
    (128, -128),
]


@pytest.mark.parametrize("size", REFUSED)
def test_other_sizes_are_refused(size):
    """Oracle: the stride of P7. The message names the size and the multiple, of the function and of the network."""
    what = f"{size[0]}x{size[1]}"
    with torch.device("meta"):
        network = SpineNet(ARCHS["tiny"])
        refusals = {"check_size": refusal(model.check_size, *size)}
        if min(size) >= 0:
            refusals["the network"] = refusal(network, torch.empty(1, 3, *size))
        for name, said in refusals.items():
            assert said, f"{name} takes {what}, where a side is not a positive multiple of 128"
            assert said.startswith("ValueError: "), f"{name} refuses {what} with a ValueError, not with {said}"
            assert what in said and "128" in said.replace(what, ""), f"{name} says {what} and 128, not {said!r}"


@pytest.mark.parametrize("size", [(128, 128), (640, 896), (1280, 384)])
def test_right_sizes_are_taken(size):
    """Oracle: the stride of P7."""
    assert not refusal(model.check_size, *size), f"{size[0]}x{size[1]} are multiples of 128, and taken"


ANY_SPINE = tuple(b._replace(as_is={8: (4,), 12: (7, 5), 14: (10,)}.get(b.number, ())) for b in SPINE)
ANY_SPINE = tuple(b._replace(level=3, kind="bottleneck") if b.number == 8 else b for b in ANY_SPINE)
# P5 leaves from block 11, which is not the last of its level.
ANY_SPINE = tuple(b._replace(output={11: True, 14: False}.get(b.number, b.output)) for b in ANY_SPINE)
ANY_SPINE = tuple(b._replace(parents=(6, 8, 4)) if b.number == 9 else b for b in ANY_SPINE)


def test_the_network_is_its_table():
    """Oracle: by hand, module by module, with a table that has unresampled parents of its own. What each block is given
    is made of what the blocks in its row gave, and what leaves is in the order of the levels."""
    torch.manual_seed(0)
    # 0.25: the stem is as wide as block 0, so that block 1 could take either. In training values are of size 1.
    backbone = SpineNet(Arch(0.25, 0.5, 1, 8, 8, 2, 3, spine=ANY_SPINE), "swish").train()
    names = ["stem", *(f"groups.{n}" for n in range(17)), *(f"endpoints.{L}" for L in model.LEVELS)]
    names += [f"resamples.{b.number}.{k}" for b in ANY_SPINE for k in range(len(b.parents))]
    seen = {name: [] for name in names}
    for name in names:
        note = lambda _, args, out, name=name: seen[name].append((args[0].clone(), out.clone()))  # noqa: E731
        backbone.get_submodule(name).register_forward_hook(note)
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 128, 128))
    runs = {name: len(calls) for name, calls in seen.items() if len(calls) != 1}
    assert not runs, f"every part of the network runs once, but these so often: {runs}"
    given, gave = ({name: seen[name][0][k] for name in names} for k in range(2))
    assert torch.equal(given["groups.0"], gave["stem"]), "block 0 is given what the stem gave"
    assert torch.equal(given["groups.1"], gave["groups.0"]), "block 1 is given what block 0 gave, not the stem"

    act = F.silu  # not relu, with which twice is once
    for block in ANY_SPINE:
        number, resampled = block.number, []
        for k, parent in enumerate(block.parents):
            name = f"resamples.{number}.{k}"
            assert torch.equal(given[name], gave[f"groups.{parent}"]), f"{name} is given what block {parent} gave"
            resampled.append(gave[name])
        as_is = [gave[f"groups.{parent}"] for parent in block.as_is]
        parts = resampled + as_is
        near = lambda value: torch.allclose(given[f"groups.{number}"], value, rtol=1e-4, atol=1e-6)  # noqa: B023, E731
        mistakes = {
            "the sum is not activated": sum(parts),
            "the sum is activated twice": act(act(sum(parts))),
            "each part is activated before the sum": sum(act(part) for part in parts),
            "the blocks in its `as_is` are not in the sum": act(sum(resampled)),
            "the blocks in its `as_is` are added after the activation": act(sum(resampled)) + sum(as_is),
            "only the first in its `as_is` is in the sum": act(sum(resampled + as_is[:1])),
        }
        said = [what for what, value in mistakes.items() if near(value)]
        what = f"block {number} is given act(sum of {block.parents} resampled and {block.as_is} as they are)"
        assert near(act(sum(parts))), f"{what}: {said[0] if said else 'this is another value'}"

    assert len(features) == 5, "what leaves is P3..P7"
    for feature, L in zip(features, model.LEVELS):
        number = next(b.number for b in ANY_SPINE if b.output and b.level == L)
        assert torch.equal(given[f"endpoints.{L}"], gave[f"groups.{number}"]), (
            f"P{L} is made of block {number}, an output"
        )
        assert torch.equal(feature, gave[f"endpoints.{L}"]), f"what leaves is P3..P7, in the order of the levels: P{L}"


@pytest.mark.parametrize("head, arch, size, parameters, gmacs", COUNTS)
def test_parameters_and_multiply_adds(head, arch, size, parameters, gmacs):
    """Oracle: the authors' code run on TensorFlow. Parameters to the unit, multiply-adds within 0.1 %."""
    counted, macs = count(arch, size, head)
    assert counted == parameters
    assert macs / 1e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize("head, arch, size, paper_parameters, paper_macs", model.PUBLISHED)
def test_published_figures(head, arch, size, paper_parameters, paper_macs):
    """Oracle: the paper's figures as printed, but for RetinaNet 49S, whose checkpoint has wider endpoints."""
    parameters, macs = count(arch, size, head)
    close = parameters / 1e6 == pytest.approx(float(paper_parameters), rel=0.005)
    close = close and macs / 1e9 == pytest.approx(float(paper_macs), rel=0.005 if head == "retinanet" else 0.01)
    assert close == ((head, arch) != ("retinanet", "49S"))


@pytest.mark.parametrize(
    "head, arch, size, change, parameters, gmacs",
    [
        ("retinanet", "49S", 640, dict(endpoint_channels=256), 11_944_598, 33.75),
        ("mask_rcnn", "190", 1536, dict(rpn_convs=7), 176_198_465, 2074.0),
    ],
)
def test_the_two_explained_figures(head, arch, size, change, parameters, gmacs):
    """Oracle: the authors' code, run as RetinaNet 49S was published, and as Mask R-CNN 190's yaml says."""
    counted, macs = model.count(replace(ARCHS[arch], **change), size, head)
    assert counted == parameters and macs / 1e9 == pytest.approx(gmacs, rel=1e-3)


class Counted(nn.Module):
    """A detector whose layers can be counted by hand, one of each kind, and which notes how it is called."""

    said = None

    def __init__(self, arch, num_classes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.up, self.fc = nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(4, num_classes)
        self.frozen = nn.Conv2d(4, 5, 1).requires_grad_(False)
        self.asked = arch

    def every_layer(self, x):
        Counted.said = (self.asked, tuple(x.shape), self.training, x.device.type, self.conv.weight.device.type)
        x = self.up(F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3))), self.frozen(x), self.frozen(x[..., ::2, ::2])


def test_count_by_hand(monkeypatch):
    """Oracle: by hand. The weights that are trained, and one product for each weight and place it is used at."""
    monkeypatch.setitem(model.HEADS, "counted", Counted)
    monkeypatch.setattr(Counted, "said", None)
    monkeypatch.setitem(model.PUBLISHED_CLASSES, "counted", 7)
    parameters, macs = model.count("tiny", 256, "counted")
    assert Counted.said, "the detector of `head` is built by build_model, and its every_layer run"
    arch, shape, training, *devices = Counted.said
    assert arch == ARCHS["tiny"] and shape == (1, 3, 256, 256), f"one image of size 256 is asked for, not {shape}"
    assert not training, "a model is counted in evaluation mode, model.eval()"
    assert devices == ["meta", "meta"], f"image and weights are on the meta device, not {devices}"
    trained = (27 * 8 + 8) + (8 + 8) + (8 * 4 * 4 + 4) + (4 * 7 + 7)
    what = "trainable parameters, without buffers and what is frozen, of a model of PUBLISHED_CLASSES"
    assert parameters == trained, f"{parameters} is not the number of {what}: {trained}"
    products = 128**2 * 27 * 8 + 128**2 * 8 * 4 * 4 + 4 * 7 + (256**2 + 128**2) * 4 * 5
    what = "multiply-adds of convolutions (one runs twice, as the towers' do), transposed ones and the linear layer"
    assert macs == products, f"{macs} is not the number of {what}: {products}; that is {macs / products:.4f} times it"


class BlockThree(nn.Module):
    """Block 3 of a SpineNet with the resampling of its two parents, as a detector that can be counted."""

    def __init__(self, arch, num_classes):
        super().__init__()
        backbone = SpineNet(arch)
        self.resamples, self.group = backbone.resamples["3"], backbone.groups["3"]

    def every_layer(self, x):
        parents = x.new_empty(2, 1, 256, x.shape[2] // 4, x.shape[3] // 4)
        return self.group(sum(resample(parent) for resample, parent in zip(self.resamples, parents)))


def test_count_of_a_block_by_hand(monkeypatch):
    """Oracle: by hand, as in docs/COURSE.md. Block 3 of SpineNet-49 at 640: a residual block at level 4, whose parents
    0 and 1, at level 2, have 256 channels and width 64, so that they are resampled on 32."""
    monkeypatch.setitem(model.HEADS, "block", BlockThree)
    monkeypatch.setitem(model.PUBLISHED_CLASSES, "block", 1)
    parameters, macs = model.count("49", 640, "block")
    resampling = 256 * 32, 9 * 32 * 32, 32 * 256  # squeeze, halve, expand: weights
    convolution = 9 * 256 * 256
    norms = 2 * (2 * (32 + 32 + 256) + 2 * 256)
    trained = f"block 3 has 1,233,152 parameters that are trained (a buffer is none), not {parameters:,}"
    assert parameters == 2 * sum(resampling) + 2 * convolution + norms == 1_233_152, trained
    resampling = sum(weights * side**2 for weights, side in zip(resampling, (160, 80, 40)))
    products = f"block 3 takes 2,451,046,400 multiply-adds at 640, not {macs:,}"
    assert macs == 2 * resampling + 2 * convolution * 40**2 == 2_451_046_400, products


class Backbone(nn.Module):
    """A SpineNet alone, as a detector that can be counted."""

    def __init__(self, arch, num_classes):
        super().__init__()
        self.every_layer = SpineNet(arch)


@pytest.mark.parametrize("arch, size, gmacs", [(arch, size, gmacs) for head, arch, size, _, gmacs in COUNTS[:4]])
def test_count_of_the_backbones(arch, size, gmacs, monkeypatch):
    """Oracle: the authors' code run on TensorFlow, less the two towers and two predictors of RetinaNet by hand."""
    monkeypatch.setitem(model.HEADS, "backbone", Backbone)
    monkeypatch.setitem(model.PUBLISHED_CLASSES, "backbone", 1)
    parameters, macs = model.count(arch, size, "backbone")
    assert parameters == BACKBONES[arch], f"SpineNet-{arch} has {BACKBONES[arch]:,} parameters, not {parameters:,}"
    row, pixels = ARCHS[arch], sum((size // 2**L) ** 2 for L in model.LEVELS)
    channels = [row.endpoint_channels] + [row.head_channels] * row.head_convs
    tower = sum(9 * a * b for a, b in zip(channels, channels[1:]))
    head = pixels * (2 * tower + 9 * row.head_channels * 9 * (91 + 4))
    close = macs / 1e9 == pytest.approx(gmacs - head / 1e9, abs=1e-3 * gmacs)
    assert close, f"SpineNet-{arch} at {size} has {gmacs - head / 1e9:.2f} G multiply-adds, not {macs / 1e9:.2f} G"


@pytest.mark.parametrize("arch", BACKBONES)
def test_backbone_parameters(arch):
    """Oracle: the authors' code run on TensorFlow, endpoints included."""
    with torch.device("meta"):
        backbone = SpineNet(ARCHS[arch])
    parameters = sum(p.numel() for p in backbone.parameters())
    assert parameters == BACKBONES[arch], f"SpineNet-{arch} has {BACKBONES[arch]:,} parameters, not {parameters:,}"


@pytest.mark.parametrize("arch, size", [("49", (640, 640)), ("49S", (384, 768)), ("190", (1280, 128))])
def test_feature_shapes(arch, size):
    """Oracle: by hand. P3..P7 have stride 2^L and the endpoint's channels."""
    with torch.device("meta"):
        features = SpineNet(ARCHS[arch])(torch.empty(2, 3, *size))
    expected = [(2, ARCHS[arch].endpoint_channels, size[0] // 2**L, size[1] // 2**L) for L in range(3, 8)]
    assert [tuple(f.shape) for f in features] == expected, "what leaves is P3..P7, in the order of the levels"


def unresampled(spine):
    """{output block: what joins its sum unresampled} by the authors' rule (spinenet.py:450-458): when an output block
    is built, every earlier block nobody has consumed yet, of its level and width, is added to it and so consumed."""
    consumed, derived, seen = set(), {}, []
    for block in spine:
        consumed.update(block.parents)
        if block.output:
            alike = [b for b in seen if (b.level, b.kind) == (block.level, block.kind) and not b.output]
            derived[block.number] = tuple(b.number for b in alike if b.number not in consumed)
            consumed.update(derived[block.number])
        seen.append(block)
    return derived


def test_unresampled_parent_follows_the_rule():
    """Oracle: the authors' rule, re-derived. In SPINE it yields one such parent for one output block."""
    derived = unresampled(SPINE)
    assert sorted(map(len, derived.values())) == [0, 0, 0, 0, 1]
    wrong = [b.number for b in SPINE if b.as_is != derived.get(b.number, ())]
    assert not wrong, "the `as_is` of a block is not what the authors' rule yields: see the comment above SPINE"


@pytest.mark.parametrize("head", model.HEADS)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_batch_norm_and_bias(arch, head):
    """Oracle: the authors' yaml and code. Epsilon, momentum, gamma, and who has a bias, over the whole module."""
    with torch.device("meta"):
        detector = build_model(arch, head, 91)
    norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 100 and all(type(m) is nn.BatchNorm2d for m in norms)
    assert {(m.eps, m.momentum, m.affine, m.track_running_stats) for m in norms} == {(1e-3, 0.01, True, True)}
    assert (BN_EPSILON, BN_MOMENTUM) == (1e-3, 0.01)
    for name, m in detector.named_modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            assert (m.bias is None) == name.startswith("backbone."), name


def test_initial_values():
    """Oracle: the authors' initializers. Backbone std sqrt(1 / fan_in) cut at 2 sigma, gammas 1, head's normals."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 512, 3)
    init_conv_(conv)
    target = (1 / (64 * 9)) ** 0.5
    assert conv.weight.std().item() == pytest.approx(target, rel=0.01)
    assert conv.weight.abs().max().item() <= 2 * target / 0.87962566 + 1e-6
    detector = build_model("tiny", "retinanet", 7)
    assert all((m.weight == 1).all() for m in detector.modules() if isinstance(m, nn.BatchNorm2d))
    for name, conv in detector.named_modules():
        if isinstance(conv, nn.Conv2d) and name.startswith("head."):
            assert conv.weight.std().item() == pytest.approx(1e-5 if "predict" in name else 0.01, rel=0.05)
    bias = detector.head.class_predict.bias
    assert torch.allclose(bias.sigmoid(), torch.full_like(bias, 0.01))
    assert not detector.head.box_predict.bias.any()


def test_initial_values_of_mask_rcnn():
    """Oracle: the authors' heads.py. RPN N(0, 0.01^2), Glorot's fc, He's convolutions by fan-out; all biases 0."""
    torch.manual_seed(0)
    detector = build_model(dataclasses.replace(ARCHS["tiny"], rcnn_channels=128), "mask_rcnn", 20)
    expected = {
        "rpn.tower.convs.0": 0.01,
        "rpn.class_predict": 0.01,
        "rpn.box_predict": 0.01,
        "box_head.convs.0.conv": (2 / (128 * 9)) ** 0.5,
        "box_head.fc": (2 / (128 * 49 + 256)) ** 0.5,  # Glorot's uniform distribution has this standard deviation
        "box_head.class_predict": 0.01,
        "box_head.box_predict": 0.001,
        "mask_head.convs.0.conv": (2 / (128 * 9)) ** 0.5,
        "mask_head.up.conv": (2 / (128 * 4)) ** 0.5,
        "mask_head.mask_predict": (2 / 21) ** 0.5,
    }
    layers = dict(detector.named_modules())
    for name, std in expected.items():
        assert layers[name].weight.std().item() == pytest.approx(std, rel=0.05), name
    bound = (6 / (128 * 49 + 256)) ** 0.5
    assert 0.99 * bound < layers["box_head.fc"].weight.abs().max().item() <= bound
    heads = [m for n, m in detector.named_modules() if hasattr(m, "bias") and not n.startswith("backbone.")]
    assert len(heads) > 20 and not any(m.bias.any() for m in heads)


def official_order(backbone):
    """A backbone's convolutions and batch norms in the order of the authors' variables: that of the table, whatever the
    order in which a forward runs them."""
    parts = [backbone.stem, backbone.groups["0"], backbone.groups["1"]]
    parts += [part[str(b.number)] for b in backbone.spine for part in (backbone.resamples, backbone.groups)]
    parts += [backbone.endpoints[str(L)] for L in model.LEVELS]
    return [m for part in parts for m in part.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]


def run_order(*modules):
    """Hooks that list convolutions and batch norms in the order in which they first run."""
    order = []
    for module in modules:
        for m in module.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)):
                m.register_forward_pre_hook(lambda m, _: order.append(m) if m not in order else None)
    return order


def load_official(golden, order, skip=()):
    """Copy the official variables, in their order, into the modules that run in the same order."""
    names = [k for k in golden.files if k.startswith("w") and not any(s in k for s in skip)]
    values = iter([torch.from_numpy(golden[k]) for k in names])
    with torch.no_grad():
        for m in order:
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                value = next(values)
                if value.ndim == 4:  # (kh, kw, in, out) -> (out, in, kh, kw), or the same with in and out changed
                    value = value.permute(3, 2, 0, 1)
                elif value.shape[0] == 7 * 7 * 8:  # (H W C, out) -> (out, C H W)
                    value = value.unflatten(0, (7, 7, 8)).permute(3, 2, 0, 1).flatten(1)
                else:  # (in, out) -> (out, in)
                    value = value.T
                m.weight.copy_(value)
                if m.bias is not None:
                    m.bias.copy_(next(values))
            else:
                for parameter in (m.weight, m.bias, m.running_mean, m.running_var):
                    parameter.copy_(next(values))
    assert next(values, None) is None, "official variables were left over"


def tower_layers(*towers):
    """The layers of pairs (tower, [last layers]) as the authors' variables go, in whatever order they run: level by
    level, of which the later ones add their batch norms alone."""
    order = []
    for level in range(len(model.LEVELS)):
        for tower, last in towers:
            for conv, norm in zip(tower.convs, tower.norms[level]):
                order += [conv, norm]
            order += last
    return list(dict.fromkeys(order))


def test_features_equal_the_official_code():
    """Oracle: the authors' code run on TensorFlow with random weights: features P3..P7 to 1e-4."""
    golden = np.load(GOLDEN)
    backbone = SpineNet(Arch(0.0625, 0.5, 1, 8, 8, 2, 3)).eval()
    x = torch.from_numpy(golden["x"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        load_official(golden, official_order(backbone), skip=("retinanet", "rpn_head", "fast_rcnn_head", "mask_head"))
        features = backbone(x)
    for L, feature in zip(model.LEVELS, features):
        official = torch.from_numpy(golden[f"out_f_{L}"]).permute(0, 3, 1, 2)
        far = (feature - official).abs().max()
        assert official.std() > 0.01 and far <= 1e-4, f"P{L} is {far:.4f} away from the authors' code"


def test_features_and_head_equal_the_official_code():
    """Oracle: the authors' code run on TensorFlow with random weights: features and RetinaNet outputs to 1e-4."""
    golden = np.load(GOLDEN)
    arch = Arch(0.0625, 0.5, 1, 8, 8, 2, 3)
    backbone, head = SpineNet(arch).eval(), RetinaNetHead(8, 8, 2, 6).eval()
    x = torch.from_numpy(golden["x"]).permute(0, 3, 1, 2)
    order = official_order(backbone)
    order += tower_layers((head.class_tower, [head.class_predict]), (head.box_tower, [head.box_predict]))
    with torch.no_grad():
        load_official(golden, order, skip=("rpn_head", "fast_rcnn_head", "mask_head"))
        features = backbone(x)
        logits, codes = head(features)
    for L, feature in zip(model.LEVELS, features):
        official = torch.from_numpy(golden[f"out_f_{L}"]).permute(0, 3, 1, 2)
        same(feature, official, f"P{L} is the authors'", atol=1e-4)
    for ours, key, what in ((logits, "out_cls", "class logits"), (codes, "out_box", "box codes")):
        levels = [torch.from_numpy(golden[f"{key}_{L}"]).reshape(1, -1, ours.shape[-1]) for L in model.LEVELS]
        assert torch.cat(levels, 1).std() > 0.1
        same(ours, torch.cat(levels, 1), f"{what} are the authors'", atol=1e-4)


def test_rpn_head_equals_the_official_code():
    """Oracle: the authors' code run on TensorFlow with random weights: objectness and box codes by level to 1e-4."""
    golden, rpn = np.load(GOLDEN), RPNHead(8, 8, 1).eval()
    features = [torch.from_numpy(golden[f"out_f_{L}"]).permute(0, 3, 1, 2) for L in model.LEVELS]
    order = tower_layers((rpn.tower, [rpn.class_predict, rpn.box_predict]))
    load_official(golden, order, skip=("spinenet", "retinanet", "fast_rcnn_head", "mask_head"))
    with torch.no_grad():
        objectness, codes = rpn(features)
    assert min(golden[name].std() for name in ("out_rs_3", "out_rb_3")) > 0.1
    for L, logits, code in zip(model.LEVELS, objectness, codes, strict=True):
        official = [torch.from_numpy(golden[f"{name}_{L}"]) for name in ("out_rs", "out_rb")]
        same(logits, official[0].reshape(1, -1), f"the objectness logits of P{L} are the authors'", atol=1e-4)
        same(code, official[1].reshape(1, -1, 4), f"the box codes of P{L} are the authors'", atol=1e-4)


def test_box_and_mask_heads_equal_the_official_code():
    """Oracle: the authors' code run on TensorFlow with random weights: box-head and mask-head outputs to 1e-4."""
    golden = np.load(GOLDEN)
    box_head, mask_head = BoxHead(8, 8, 4, 64, 5).eval(), MaskHead(8, 8, 4, 5).eval()
    small, large = (torch.from_numpy(golden[name])[0].permute(0, 3, 1, 2) for name in ("roi7", "roi14"))
    order = [layer for head in (box_head, mask_head) for layer in head.modules() if hasattr(layer, "weight")]
    load_official(golden, order, skip=("spinenet", "retinanet", "rpn_head"))
    with torch.no_grad():
        class_logits, box_codes = box_head(small)
        masks = mask_head(large)
    masks = masks[torch.arange(5), torch.arange(1, 6)]  # a RoI of each class but the background
    found = {"out_fc": class_logits, "out_fb": box_codes, "out_mo": masks}
    for key, what in (("out_fc", "class logits"), ("out_fb", "box codes"), ("out_mo", "mask logits")):
        official = torch.from_numpy(golden[key][0])
        assert official.std() > 0.1
        same(found[key], official.reshape(found[key].shape), f"the {what} are the authors'", atol=1e-4)


@pytest.mark.parametrize("kernel, stride", [(3, 2), (5, 4), (9, 8)])
def test_max_pool_pads_as_tensorflow(kernel, stride):
    """Oracle: TensorFlow's SAME rule by hand: total padding k - s, the smaller half first (1 -> 0 left, 1 right). Of
    negative numbers, among which a padded zero would be the maximum; each another, so that no window's is ambiguous."""
    torch.manual_seed(0)
    x = -1.0 - torch.randperm(2 * 32 * 16).view(1, 2, 32, 16)
    given = max_pool_same(x, kernel, stride)
    assert given.shape == (1, 2, 32 // stride, 16 // stride), f"a pooled side is side / {stride}, not {given.shape}"
    assert (given < 0).all(), "the padding is never the maximum: zeros win over negative numbers"
    for name, pooled, expected in (
        ("inner windows, which need no padding,", given[..., :-1, :-1], F.max_pool2d(x, kernel, stride)),
        ("all windows", given, F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), kernel, stride)),
    ):
        wrong = f"a window begins at a multiple of {stride} and has {kernel} rows and columns, padded right and bottom"
        assert torch.equal(pooled, expected), f"{name} have another maximum: {wrong}"


class CountCalls(TorchFunctionMode):
    """Counts how often each torch function is called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls[function] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", model.HEADS)
@pytest.mark.parametrize("name, used, unused", [("relu", F.relu, F.silu), ("swish", F.silu, F.relu)])
def test_one_activation_everywhere(name, used, unused, head):
    """Oracle: the functions called. `activation` is one function for the whole detector, heads included."""
    with torch.device("meta"):
        detector = build_model("tiny", head, 3, activation=name).eval()
        with CountCalls() as counter:
            detector.every_layer(torch.empty(1, 3, 128, 128))
    assert counter.calls[unused] == 0 and counter.calls[used] > 80


def test_stochastic_depth_is_linear_by_block_and_per_image():
    """Oracle: the rule r (i - 1) / 15 by hand; a dropped image's branch is exactly its shortcut."""
    arch = dataclasses.replace(ARCHS["tiny"], repeats=2)
    backbone = SpineNet(arch, "swish", drop_path=0.3)
    for number, group in backbone.groups.items():
        expected = 0.3 * (int(number) - 1) / 15 if int(number) >= 2 else 0.0
        assert [block.drop_path for block in group] == pytest.approx([expected] * 2)

    block = backbone.groups["16"][0].train()  # rate 0.3
    torch.manual_seed(0)
    x = torch.randn(1, 256, 2, 2).expand(400, -1, -1, -1)
    shortcut = F.silu(x)
    dropped = (block(x) == shortcut).flatten(1).all(1)
    assert 0.2 < dropped.float().mean() < 0.4
    assert not (block.eval()(x) == shortcut).flatten(1).all(1).any()


def whole_squares(zeros, side):
    """Whether what is true in (B, C, H, W) is made of whole squares of that side, of which one at least is alone."""
    if not zeros.any():
        return False
    inside = -F.max_pool2d(-zeros.float(), side, 1)  # where a square that is all true begins
    counts = zeros.flatten(2).sum(2)
    alone = int(counts[counts > 0].min()) == side * side
    return alone and torch.equal(F.max_pool2d(F.pad(inside, [side - 1] * 4), side, 1), zeros.float())


@pytest.mark.parametrize(
    "height, width, side", [(32, 32, 7), (20, 9, 7), (7, 7, 7), (6, 40, 5), (5, 5, 5), (4, 4, 3), (2, 3, 1), (1, 1, 1)]
)
def test_drop_block(height, width, side):
    """Oracle: DropBlock's definition. Squares of the side that fits vanish, in each channel and image others, as many
    as equation 1 makes them; what is left is scaled by one factor, which keeps the mean."""
    torch.manual_seed(0)
    x = torch.rand(64, 64 if height * width > 100 else 256, height, width) + 1
    torch.manual_seed(1)
    given = drop_block(x, 0.1, True)
    assert given.shape == x.shape, f"of {tuple(x.shape)} came {tuple(given.shape)}"
    assert given.dtype == x.dtype, f"of {x.dtype} came {given.dtype}"
    zeros = given == 0
    assert zeros.any(), "in training something vanishes"
    assert whole_squares(zeros, side), f"on a {height} x {width} map whole {side} x {side} squares vanish, nothing else"
    assert not torch.equal(zeros[:, 0], zeros[:, 1]), "each channel has its own squares"
    assert not torch.equal(zeros[0], zeros[1]), "each image has its own squares"
    begins = torch.ones(1, 1, height - side + 1, width - side + 1)
    covered = F.avg_pool2d(F.pad(begins, [side - 1] * 4), side, 1) * side**2  # by how many places, pixel by pixel
    gamma = 0.1 * height * width / (side**2 * begins.numel())
    expected = (1 - (1 - gamma) ** covered).mean().item()
    share = zeros.float().mean().item()
    assert share == pytest.approx(expected, rel=0.15), f"at rate 0.1 {share:.3f} of it vanishes, not {expected:.3f}"
    scale = (given / x)[~zeros]
    factor = f"what is left is scaled by elements / elements left of the whole batch, {1 / (1 - share):.4f}, not by "
    factor += f"{scale.min():.4f} to {scale.max():.4f}"
    assert torch.allclose(scale, torch.full_like(scale, 1 / (1 - share)), rtol=1e-4), factor
    torch.manual_seed(1)
    apart = (drop_block(torch.where(x > 1.5, x, 0), 0.1, True) - torch.where(x > 1.5, given, 0)).abs().max().item()
    assert apart < 1e-3, "zeros of x, as a ReLU makes them, are among the elements left: they change no factor"


def test_drop_block_of_everything():
    """Oracle: by hand. Where nothing is left the result is 0, not NaN."""
    given = drop_block(torch.ones(1, 1, 1, 1), 1 - 1e-6, training=True).item()
    assert given == 0, (
        f"of the one element, which vanishes, {given} is left: elements / elements left of none is no factor"
    )


def test_drop_block_is_off():
    """Oracle: identity. In evaluation and at rate 0 the result is `x` itself, no copy."""
    x = torch.ones(8, 16, 32, 32)
    assert drop_block(x, 0.1, training=False) is x, "in evaluation DropBlock gives x itself"
    assert drop_block(x, 0.0, training=True) is x, "at rate 0 DropBlock gives x itself"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_drop_block_in_half_precision(dtype):
    """Oracle: by hand. 524,288 elements, a number that float16 lacks: the dtype stays, and the mean, to its digits."""
    torch.manual_seed(0)
    given = drop_block(torch.ones(2, 64, 64, 64, dtype=dtype), 0.1, training=True)
    assert given.dtype == dtype, f"the result has the dtype of x, {dtype}, not {given.dtype}"
    assert 0 < given.max() < 1.2, f"in half precision the scale is to be counted in float32: it is {given.max():.4f}"
    assert given.float().mean().item() == pytest.approx(1, abs=5e-3), "in half precision the mean is kept"


def test_noise_is_off_unless_asked_for():
    """Oracle: determinism. In training mode the default network gives the same output twice, with noise it does not."""
    x = torch.randn(2, 3, 128, 128)
    for options, alike in (({}, True), ({"drop_path": 0.5}, False), ({"drop_rate": 0.1}, False)):
        backbone = SpineNet(ARCHS["tiny"], **options).train()
        first, second = backbone(x), backbone(x)
        assert all(torch.equal(a, b) for a, b in zip(first, second)) == alike


def test_any_arch_value_builds():
    """Oracle: by hand. An Arch that is not in the table, with a spine of its own, gives P3..P7."""
    arch = Arch(0.4, 0.75, 2, 24, 16, 1, 2.5, spine=OTHER_SPINE)
    features = SpineNet(arch)(torch.randn(1, 3, 256, 128).repeat(2, 1, 1, 1))
    assert [tuple(f.shape) for f in features] == [(2, 24, 256 // 2**L, 128 // 2**L) for L in range(3, 8)]
    assert build_model(arch, "retinanet", 5).head.class_predict.out_channels == 45


@pytest.mark.parametrize("arch", [*ARCHS.values(), Arch(0.4, 0.75, 2, 24, 16, 1, 2.5, spine=OTHER_SPINE)])
def test_an_arch_as_plain_values(arch, tmp_path):
    """Oracle: the Arch itself. What `plain` gives survives a file that may hold no code, to the last value and type,
    and `Arch.of` makes an equal Arch of it; an Arch that differs in one value does not equal it."""
    torch.save(arch.plain(), tmp_path / "arch.pt")
    plain = torch.load(tmp_path / "arch.pt", weights_only=True)
    assert plain == arch.plain() and Arch.of(plain) == Arch.of(arch.plain()) == arch
    assert all(type(block) is model.Block for block in Arch.of(plain).spine)
    assert plain.keys() == {field.name for field in dataclasses.fields(Arch)}
    assert all(type(value) in (int, float, tuple) for value in plain.values())
    assert all(type(block) is tuple for block in plain["spine"])
    assert all(Arch.of(plain | {name: 11}) != arch for name in plain if name != "spine")
    assert Arch.of(plain | {"spine": plain["spine"][1:]}) != arch


@pytest.mark.parametrize("activation", ["relu", "swish", None])
def test_conv_bn_by_hand(activation):
    """Oracle: torch's functions, one after the other, in training and in a test; half of the size, rounded up."""
    layer = ConvBN(4, 6, 3, stride=2, activation=activation)
    nn.init.normal_(layer.bn.weight)
    nn.init.normal_(layer.bn.bias)
    x = torch.randn(2, 4, 7, 8)
    act = {"relu": F.relu, "swish": F.silu, None: lambda x: x}[activation]
    for training in (True, False):
        layer.train(training)
        mean, var = layer.bn.running_mean.clone(), layer.bn.running_var.clone()
        y = F.conv2d(x, layer.conv.weight, stride=2, padding=1)
        expected = act(F.batch_norm(y, mean, var, layer.bn.weight, layer.bn.bias, training, 0.01, 1e-3))
        assert expected.shape == (2, 6, 4, 4)
        order = f"convolution, batch norm, activation {activation}, in {'training' if training else 'evaluation'}"
        assert torch.allclose(layer(x), expected, atol=1e-5), f"not as these, one after the other: {order}"


@pytest.mark.parametrize("activation", ["swish", None])
def test_drop_block_in_conv_bn(activation):
    """Oracle: torch's functions, one after the other, with a swish, which tells whether DropBlock comes before it, and
    without an activation."""
    act = {"swish": F.silu, None: nn.Identity()}[activation]
    layer = ConvBN(4, 6, 1, activation=activation, drop_rate=0.1).train()
    nn.init.normal_(layer.bn.bias, 3)  # so that nothing but DropBlock makes zeros
    torch.manual_seed(0)
    x = torch.randn(16, 4, 32, 32)
    normed = F.batch_norm(layer.conv(x), None, None, layer.bn.weight, layer.bn.bias, True, eps=1e-3)
    given = layer(x)
    zeros = given == 0
    assert whole_squares(zeros, 7), f"in training squares vanish after the batch norm; the activation is {activation}"
    expected = act(normed / (1 - zeros.float().mean())) * ~zeros
    assert torch.allclose(given, expected, atol=1e-3), "DropBlock comes before the activation, which sees its scale"
    layer.eval()
    expected = act(layer.bn(layer.conv(x)))
    assert torch.allclose(layer(x), expected, atol=1e-5), "DropBlock is off in evaluation"


class Fixed(nn.Module):
    """A layer that gives what a function says, and knows nothing of randomness."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def test_a_block_by_hand():
    """Oracle: act(shortcut + branch) written out, with and without a projection, in a test, where nothing is random."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 6)
    for block in (
        *(Residual(8, 8), Bottleneck(8, 2), Residual(8, 8, "swish"), Bottleneck(8, 4, "swish"), Residual(8, 4)),
        *(Residual(8, 8, "swish", drop_rate=0.3), Bottleneck(8, 4, "relu", 0.6, 0.3), Bottleneck(8, 2, drop_path=0.6)),
    ):
        block.eval()
        shortcut, branch = x if block.project is None else block.project(x), block.branch(x)
        act = {"relu": F.relu, "swish": F.silu}[block.activation]
        before = x.clone()
        given = block(x)
        assert torch.equal(x, before), "the block wrote into its input"
        mistakes = {
            "the sum is not activated": shortcut + branch,
            "the shortcut is activated before the sum": act(shortcut) + branch,
            "the branch is activated before the sum": shortcut + act(branch),
            "both are activated before the sum": act(shortcut) + act(branch),
            "the shortcut is not in the sum": act(branch),
            "the branch is not in the sum": act(shortcut),
        }
        said = [what for what, value in mistakes.items() if torch.allclose(given, value, atol=1e-6)]
        random = "; nothing is random in evaluation" if block.drop_path or block.drop_rate else ""
        expected = torch.allclose(given, act(shortcut + branch), atol=1e-6)
        assert expected, f"a block is act(shortcut + branch): {''.join(said[:1]) or 'this is not'}{random}"


def test_stochastic_depth_by_hand():
    """Oracle: by hand. At rate 0.25, a branch of nothing but 3 is 0 in a quarter of 4000 images, 3 / 0.75 in the
    others, all over an image, while the shortcut stays."""
    block = Residual(8, 8, drop_path=0.25).train()
    block.branch = nn.Sequential(Fixed(lambda x: torch.full_like(x, 3)))
    torch.manual_seed(0)
    given = block(torch.ones(4000, 8, 2, 2)).flatten(1)
    assert (given >= 1).all(), "stochastic depth drops the branch, never the shortcut"
    assert torch.equal(given, given[:, :1].expand_as(given)), "stochastic depth drops all of an image's branch, or none"
    branch = given[:, 0] - 1
    assert 0 < (branch == 0).sum() < 4000, "stochastic depth draws for each image of a batch on its own"
    share = (branch == 0).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.04), f"drop_path is the share of dropped branches: 0.25, not {share:.2f}"
    survived = branch[branch != 0]
    rescaled = f"a branch that survives is divided by the survival rate: 3 / 0.75 = 4, not {survived.mean():.2f}"
    assert torch.allclose(survived, torch.tensor(4.0)), rescaled
    assert torch.equal(block.eval()(torch.ones(9, 8, 2, 2)), torch.full((9, 8, 2, 2), 4.0)), "none in evaluation"


@pytest.mark.parametrize("channels", [8, 4])
def test_drop_block_on_the_shortcut(channels):
    """Oracle: by hand. A shortcut of nothing but 2, be it the input or a projection, loses squares and is scaled; the
    branch, of nothing but 1, has had its own DropBlock and stays as it is."""
    block = Residual(channels, 8, drop_rate=0.1).train()
    block.branch = nn.Sequential(Fixed(lambda x: torch.ones(len(x), 8, *x.shape[-2:])))
    if block.project is not None:
        block.project = Fixed(lambda x: torch.full((len(x), 8, *x.shape[-2:]), 2.0))
    kind = "the identity" if block.project is None else "a projection"
    torch.manual_seed(0)
    given = block(torch.full((64, channels, 32, 32), 2.0))
    assert (given >= 1).all(), "in a block DropBlock is applied to the shortcut, not to the branch or the sum"
    zeros = given == 1
    assert zeros.any(), f"DropBlock is applied to the shortcut, which is {kind} here"
    assert whole_squares(zeros, 7) and 0.08 < zeros.float().mean() < 0.11, "of the shortcut squares vanish at drop_rate"
    rest, scaled = (given[~zeros] - 1) / 2, 1 / (1 - zeros.float().mean())
    what = f"what DropBlock leaves of the shortcut is multiplied by {scaled:.4f}, elements by elements left"
    assert torch.allclose(rest, scaled, rtol=1e-4), f"{what}, not by {rest.mean():.4f}: see drop_block"
    assert (block.eval()(torch.full((64, channels, 32, 32), 2.0)) == 3).all(), "DropBlock is off in evaluation"


@pytest.mark.parametrize("parent, level", [(2, 3), (3, 5), (2, 5), (2, 6), (4, 4), (4, 3), (6, 3)])
def test_resample_by_hand(parent, level):
    """Oracle: the paper's Figure 5 written out: squeeze; halve by a convolution and pool, or repeat; expand."""
    torch.manual_seed(0)
    resample = Resample(16, 8, parent, 12, level, 0.5, "swish").eval()
    x = torch.randn(1, 16, 2 ** (9 - parent), 2 ** (8 - parent))
    y, steps = resample.squeeze(x), ["squeeze"]
    if level > parent:
        y, steps = resample.down(y), [*steps, "a convolution of stride 2"]
        if level > parent + 1:
            stride = 2 ** (level - parent - 1)
            y = F.max_pool2d(F.pad(y, (0, 1, 0, 1), value=-torch.inf), stride + 1, stride)
            steps.append(f"a max-pool of kernel {stride + 1} and stride {stride}")
    elif level < parent:
        y = y.repeat_interleave(2 ** (parent - level), 2).repeat_interleave(2 ** (parent - level), 3)
        steps.append(f"nearest neighbours, each pixel {2 ** (parent - level)} x {2 ** (parent - level)} times")
    expected, given = resample.expand(y), resample(x)
    how = f"from level {parent} to {level}, in this order: {', '.join([*steps, 'expand'])}, with no activation after it"
    assert given.shape == expected.shape, f"{how}: {tuple(expected.shape)} wanted, {tuple(given.shape)} found"
    apart = (given - expected).abs().max().item()
    assert apart < 1e-5, f"{how}; max_pool_same is on the way, too; found up to {apart:.3g} away"
    assert resample.expand.activation is None, "there is no activation after expand"


@pytest.mark.parametrize("inputs, outputs, kernel", [(64, 256, 3), (256, 1024, 1)])
def test_initializer(inputs, outputs, kernel):
    """Oracle: statistics. Zero mean, standard deviation sqrt(1 / fan_in), nothing beyond 2 / 0.87962566 of it, and as
    many within 1 / 0.87962566 of it as a normal distribution that is cut, not clipped, has: 0.7152."""
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, kernel)
    with torch.no_grad():
        conv.weight.zero_()
    init_conv_(conv)
    std = (1 / (inputs * kernel**2)) ** 0.5
    ratio = conv.weight.std().item() / std
    assert ratio == pytest.approx(1, rel=0.01), f"the standard deviation is {ratio:.3f} times sqrt(1 / fan_in)"
    assert abs(conv.weight.mean().item()) < std / 50, "the mean is not 0"
    sigmas = conv.weight.abs() / std * 0.87962566
    assert 1.9 < sigmas.max().item() <= 2.0001, f"the largest is {sigmas.max():.2f} sigma: cut at 2 sigma"
    assert (sigmas < 1).float().mean().item() == pytest.approx(0.7152, abs=0.01), "not a normal distribution, cut"
    try:
        init_conv_(nn.Conv2d(inputs, outputs, kernel, device="meta"))
    except Exception as error:
        pytest.fail(f"init_conv_ fails on the meta device, where there are no values to read: {error!r}")


@pytest.mark.parametrize("parent, level", [(2, 3), (2, 4), (2, 5), (2, 6), (4, 4), (6, 3)])
def test_resample_shapes(parent, level):
    """Oracle: by hand. A parent of one level arrives at the other's size and channels."""
    resample = Resample(64, 16, parent, 40, level, 0.5)
    out = resample(torch.randn(2, 64, 2 ** (8 - parent), 2 ** (8 - parent)))
    size = 2 ** (8 - level)
    assert out.shape == (2, 40, size, size), f"from level {parent} to {level} to 40 channels, {size} x {size} pixels"
    assert resample.squeeze.conv.out_channels == 8, "the inner width is alpha of a quarter of 64: 8"


def test_table_of_the_command_line(capsys, monkeypatch):
    """Oracle: the counts above. `python model.py` prints each row's figures beside the paper's."""
    monkeypatch.setattr(model, "count", count)
    model.print_table()
    out = capsys.readouterr().out
    for _, arch, size, parameters, _ in COUNTS:
        assert any(line.split()[:3] == [arch, str(size), f"{parameters:,}"] for line in out.splitlines())
    assert "tiny" in out
