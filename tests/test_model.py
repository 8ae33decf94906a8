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


@pytest.mark.parametrize("arch", BACKBONES)
def test_backbone_parameters(arch):
    """Oracle: the authors' code run on TensorFlow, endpoints included."""
    with torch.device("meta"):
        backbone = SpineNet(ARCHS[arch])
    assert sum(p.numel() for p in backbone.parameters()) == BACKBONES[arch]


@pytest.mark.parametrize("arch, size", [("49", (640, 640)), ("49S", (384, 768)), ("190", (1280, 128))])
def test_feature_shapes(arch, size):
    """Oracle: by hand. P3..P7 have stride 2^L and the endpoint's channels."""
    with torch.device("meta"):
        features = SpineNet(ARCHS[arch])(torch.empty(2, 3, *size))
    expected = [(2, ARCHS[arch].endpoint_channels, size[0] // 2**L, size[1] // 2**L) for L in range(3, 8)]
    assert [tuple(f.shape) for f in features] == expected


@pytest.mark.parametrize("size", [(640, 600), (0, 128), (100, 128), (127, 127)])
def test_other_sizes_are_refused(size):
    """Oracle: the stride of P7. The message names the size and the multiple."""
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*multiples of 128"), torch.device("meta"):
        SpineNet(ARCHS["tiny"])(torch.empty(1, 3, *size))


def test_unresampled_parent_follows_the_rule():
    """Oracle: the authors' rule (spinenet.py:450-458), re-derived: when an output block is built, every earlier
    block nobody has consumed yet, of its level and width, is added to it and so consumed."""
    consumed, derived, seen = set(), {}, []
    for block in SPINE:
        consumed.update(block.parents)
        if block.output:
            alike = [b for b in seen if (b.level, b.kind) == (block.level, block.kind) and not b.output]
            derived[block.number] = tuple(b.number for b in alike if b.number not in consumed)
            consumed.update(derived[block.number])
        seen.append(block)
    assert derived == {12: (), 13: (), 14: (11,), 15: (), 16: ()}
    assert {b.number: b.as_is for b in SPINE if b.output} == derived
    assert all(not b.as_is for b in SPINE if not b.output)


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
    """Oracle: SPEC section 3. RPN N(0, 0.01^2), Glorot's fc, He's convolutions by fan-out, predictors; all biases 0."""
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
    order = run_order(backbone)
    with torch.no_grad():
        backbone(x)
        load_official(golden, order, skip=("retinanet", "rpn_head", "fast_rcnn_head", "mask_head"))
        features = backbone(x)
    for L, feature in zip(model.LEVELS, features):
        official = torch.from_numpy(golden[f"out_f_{L}"]).permute(0, 3, 1, 2)
        assert official.std() > 0.01 and (feature - official).abs().max() <= 1e-4


def test_features_and_head_equal_the_official_code():
    """Oracle: the authors' code run on TensorFlow with random weights: features and RetinaNet outputs to 1e-4."""
    golden = np.load(GOLDEN)
    arch = Arch(0.0625, 0.5, 1, 8, 8, 2, 3)
    backbone, head = SpineNet(arch).eval(), RetinaNetHead(8, 8, 2, 6).eval()
    x = torch.from_numpy(golden["x"]).permute(0, 3, 1, 2)
    order = run_order(backbone)
    with torch.no_grad():
        backbone(x)
        order += tower_layers((head.class_tower, [head.class_predict]), (head.box_tower, [head.box_predict]))
        load_official(golden, order, skip=("rpn_head", "fast_rcnn_head", "mask_head"))
        features = backbone(x)
        logits, codes = head(features)
    for L, feature in zip(model.LEVELS, features):
        official = torch.from_numpy(golden[f"out_f_{L}"]).permute(0, 3, 1, 2)
        assert (feature - official).abs().max() <= 1e-4
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
    assert all(golden[name].std() > 0.1 for name in ("out_rs_3", "out_rb_3"))
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


@pytest.mark.parametrize("kernel, stride", [(3, 2), (5, 4)])
def test_max_pool_pads_as_tensorflow(kernel, stride):
    """Oracle: TensorFlow's SAME rule by hand: total padding k - s, the smaller half first (1 -> 0 left, 1 right)."""
    x = torch.randn(1, 2, 16, 8)
    padded = F.pad(x, (0, 1, 0, 1), value=-torch.inf)
    assert torch.equal(max_pool_same(x, kernel, stride), F.max_pool2d(padded, kernel, stride))


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


def test_drop_block():
    """Oracle: DropBlock's definition. Squares vanish, the mean is kept; small maps and float16 work, too."""
    torch.manual_seed(0)
    x = torch.ones(8, 16, 32, 32)
    dropped = drop_block(x, 0.1, training=True)
    assert 0.05 < (dropped == 0).float().mean() < 0.15
    assert dropped.mean().item() == pytest.approx(1, abs=1e-3)
    edges = (dropped == 0).long().diff(dim=-1).ne(0).float().mean()
    assert edges < 0.06  # isolated pixels at this rate would give 0.18
    assert drop_block(x, 0.1, training=False) is x and drop_block(x, 0.0, training=True) is x
    for side in (1, 2, 4, 6):
        assert drop_block(torch.ones(2, 2, side, side), 0.1, training=True).isfinite().all()
    large = drop_block(torch.ones(2, 64, 64, 64, dtype=torch.float16), 0.1, training=True)
    assert (
        large.dtype == torch.float16 and large.max() < 2 and large.float().mean().item() == pytest.approx(1, abs=2e-3)
    )


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
        assert torch.allclose(layer(x), expected, atol=1e-6) and expected.shape == (2, 6, 4, 4)
    always = ConvBN(4, 6, 1, activation="relu", drop_rate=0.3).train()
    torch.manual_seed(0)
    zeros = (always(torch.randn(2, 4, 32, 32)) == 0).float().mean()
    assert zeros > 0.55  # the activation's half, and squares


def test_a_block_by_hand():
    """Oracle: act(shortcut + branch) written out, with and without a projection; stochastic depth drops the branch."""
    x = torch.randn(2, 8, 5, 6)
    for block in (Residual(8, 8).eval(), Bottleneck(8, 2).eval()):
        assert block.project is None and torch.equal(block(x), F.relu(x + block.branch(x)))
    block = Bottleneck(8, 4, "swish").eval()
    assert torch.equal(block(x), F.silu(block.project(x) + block.branch(x)))
    block = Bottleneck(8, 2, drop_path=1 - 1e-9).train()
    assert torch.equal(block(x), F.relu(x))


@pytest.mark.parametrize("parent, level", [(2, 3), (3, 5), (2, 6), (4, 4), (6, 3)])
def test_resample_by_hand(parent, level):
    """Oracle: the paper's Figure 5 written out: squeeze; halve by a convolution and pool, or repeat; expand."""
    resample = Resample(16, 8, parent, 12, level, 0.5).eval()
    x = torch.randn(1, 16, 2 ** (8 - parent), 2 ** (8 - parent))
    y = resample.squeeze(x)
    if level > parent:
        y = resample.down(y)
        if level > parent + 1:
            stride = 2 ** (level - parent - 1)
            y = F.max_pool2d(F.pad(y, (0, 1, 0, 1), value=-torch.inf), stride + 1, stride)
    else:
        y = y.repeat_interleave(2 ** (parent - level), 2).repeat_interleave(2 ** (parent - level), 3)
    assert torch.equal(resample(x), resample.expand(y)) and resample.expand.activation is None


def test_initializer():
    """Oracle: statistics. Zero mean, standard deviation sqrt(1 / fan_in), nothing beyond 2 / 0.87962566 of it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 256, 3)
    with torch.no_grad():
        conv.weight.zero_()
    init_conv_(conv)
    std = (1 / (64 * 9)) ** 0.5
    assert conv.weight.std().item() == pytest.approx(std, rel=0.01) and abs(conv.weight.mean().item()) < std / 50
    assert 1.9 < conv.weight.abs().max().item() / std * 0.87962566 <= 2.0001


@pytest.mark.parametrize("parent, level", [(2, 3), (2, 4), (2, 5), (2, 6), (4, 4), (6, 3)])
def test_resample_shapes(parent, level):
    """Oracle: by hand. A parent of one level arrives at the other's size and channels."""
    resample = Resample(64, 16, parent, 40, level, 0.5)
    out = resample(torch.randn(2, 64, 2 ** (8 - parent), 2 ** (8 - parent)))
    assert out.shape == (2, 40, 2 ** (8 - level), 2 ** (8 - level))
    assert resample.squeeze.conv.out_channels == 8


def test_table_of_the_command_line(capsys, monkeypatch):
    """Oracle: the counts above. `python model.py` prints each row's figures beside the paper's."""
    monkeypatch.setattr(model, "count", count)
    model.print_table()
    out = capsys.readouterr().out
    for _, arch, size, parameters, _ in COUNTS:
        assert any(line.split()[:3] == [arch, str(size), f"{parameters:,}"] for line in out.splitlines())
    assert "tiny" in out
