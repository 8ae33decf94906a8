"""Does a whole training step equal the authors'? tests/official_step.npz has two optimizer steps of their RetinaNet,
run by their own code: labels, losses, decay, clipping, momentum, batch norm."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from import_official import convert, variables
from torch import nn

import loss
import train
from blocks import BN_EPSILON
from evaluate import Place
from heads import make_anchors
from model import Arch, build_model

CPU = Place(torch.device("cpu"))
ARCH = Arch(0.0625, 0.5, 1, 8, 8, 2, 1)
OUTPUTS = 91  # of which 0 is never any anchor's label
THEIR_EPSILON, THEIR_MOMENTUM = 1e-4, 0.003


@pytest.fixture(scope="module")
def official():
    with np.load(Path(__file__).parent / "official_step.npz") as file:
        return dict(file)


def unpacked(official, stage):
    """{the authors' name: value} of one of the file's raveled rows."""
    values, at = {}, 0
    for name, shape, trainable in zip(official["names"].astype(str), official["shapes"], official["trainable"]):
        if trainable or not stage.startswith("momentum"):
            shape = shape[shape > 0]
            values[name] = torch.from_numpy(official[stage][at : at + shape.prod()].reshape(shape))
            at += shape.prod()
    assert at == len(official[stage])
    return values


def ours(official, stage):
    """The same under our names, in our layout."""
    theirs = unpacked(official, stage)
    table = variables("retinanet", ARCH)
    assert len(table) == len(official["names"])
    return {own: convert(theirs[name], own, BN_EPSILON) for own, (name, _) in table.items() if name in theirs}


def batch_of(official, k):
    """The k-th batch as TrainSet would give it."""
    boxes, labels = torch.from_numpy(official[f"boxes{k}"]), torch.from_numpy(official[f"classes{k}"]).long()
    return {
        "image": torch.from_numpy(official[f"pixels{k}"]).permute(0, 3, 1, 2),
        "boxes": boxes[..., [1, 0, 3, 2]].float().clamp(min=0),
        "labels": labels,
        "region": torch.tensor([official[f"pixels{k}"].shape[1:3]] * len(labels), dtype=torch.float32),
    }


def two_steps(official):
    """Train for two steps from the authors' weights: the model, the optimizer, what each step says, and how many values
    each batch norm saw of a channel."""
    model = build_model(ARCH, "retinanet", OUTPUTS).train()
    state = model.state_dict()
    assert {name for name in state if not name.endswith("num_batches_tracked")} == set(ours(official, "before"))
    model.load_state_dict(state | ours(official, "before"))
    model.double()  # in float32 the order of a sum, so the number of threads, can turn a ReLU: 5.6e-4 of the momenta
    model.backbone.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = THEIR_EPSILON, THEIR_MOMENTUM
            module.register_forward_hook(
                lambda module, inputs, _, name=name: seen.__setitem__(name, inputs[0].numel() // inputs[0].shape[1])
            )
    optimizer, scaler, said = train.make_optimizer(model), torch.amp.GradScaler("cpu", enabled=False), []
    recipe = {"seed": 0, "clip": train.PROTOCOLS["B"]["clip"]}
    for k in (1, 2):
        lr = float(official[f"lr{k}"])
        said.append(train.train_step(model, [batch_of(official, k)], recipe, optimizer, scaler, lr, CPU, k))
        said[-1] += ({name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()},)
        said[-1] += ({name: value.clone() for name, value in model.state_dict().items()},)
    return said, seen


def decay_inside(monkeypatch):
    """Clip with the gradient of weight decay inside, as the authors do."""
    clip = nn.utils.clip_grad_norm_

    def theirs(parameters, limit):
        parameters = list(parameters)
        decayed = [p for p in parameters if p.ndim > 1]
        for p in decayed:
            p.grad.add_(p.detach(), alpha=train.WEIGHT_DECAY)
        norm = clip(parameters, limit)
        for p in decayed:  # which the optimizer adds
            p.grad.sub_(p.detach(), alpha=train.WEIGHT_DECAY)
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", theirs)


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def is_before_batch_norm(name):
    """Whether this is such a bias, whose gradient is all rounding."""
    return ".convs." in name and name.endswith("bias")


def by_kind(found, wanted):
    """{kind of parameter: relative error} of dicts under our names, but of biases before a batch norm."""
    kinds = {}
    for name, value in wanted.items():
        kind = {1: "batch norms and biases", 2: "kernels"}[min(value.ndim, 2)]
        if not is_before_batch_norm(name):
            kinds.setdefault(kind, []).append((found[name].flatten(), value.flatten()))
    return {kind: relative(*(torch.cat(part) for part in zip(*pairs))) for kind, pairs in kinds.items()}


@pytest.mark.parametrize("inside", [False, True], ids=["as it is", "decay inside the clipping"])
def test_two_steps_equal_the_authors(inside, official, monkeypatch):
    """Oracle: the authors' training graph. Losses, gradient norm, momenta, weights and moving means of two steps agree
    (the network's in float64, theirs in float32). The norm that is clipped by is theirs without weight decay's part,
    and with it once that is put inside; moving variances are theirs but for the factor n / (n - 1) of torch's."""
    if inside:
        decay_inside(monkeypatch)
    said, seen = two_steps(official)
    before = previous = ours(official, "before")
    for k, (losses, norm, momenta, state) in enumerate(said, 1):
        assert losses["class"].item() == pytest.approx(float(official[f"class_loss{k}"]), rel=1e-5)
        assert losses["box"].item() / 50 == pytest.approx(float(official[f"box_loss{k}"]), rel=1e-5)
        name = f"gradient_norm{k}" if inside else f"gradient_norm_without_decay{k}"
        assert norm.item() == pytest.approx(float(official[name]), rel=1e-5)

        wanted = ours(official, f"momentum_after{k}")
        slots = by_kind(momenta, wanted)
        assert max(slots.values()) < 5e-4, slots
        for name in filter(is_before_batch_norm, wanted):
            assert (momenta[name] - wanted[name]).abs().max() < 1e-6, name
        after = ours(official, f"after{k}")
        weights = {name: value for name, value in after.items() if "running" not in name}
        differ = by_kind(state, weights)
        assert max(differ.values()) < 1e-5, differ
        for name, theirs in after.items():
            if name.endswith("running_mean"):
                assert (state[name] - theirs).abs().max() < 1e-5 * max(theirs.abs().max().item(), 1), name
            elif name.endswith("running_var"):
                n = seen[name.removesuffix(".running_var")]
                update = theirs - (1 - THEIR_MOMENTUM) * before[name]
                found = state[name] - (1 - THEIR_MOMENTUM) * previous[name]
                assert relative(found, update * n / (n - 1)) < 1e-3, name
                assert n > 100 or relative(found, update) > 0.5 / n, name
        before, previous = after, state


def test_labels_equal_the_authors(official):
    """Oracle: the authors' anchor labeler. Every anchor of the two batches has their class, or is background."""
    anchors = make_anchors(official["pixels1"].shape[1:3], ARCH.anchor_size)
    for k in (1, 2):
        labels, _ = loss.match_all(anchors, batch_of(official, k))
        wanted = torch.from_numpy(official[f"class_targets{k}"]).long()
        torch.testing.assert_close(labels, wanted, rtol=0, atol=0)
        assert (labels >= 0).sum(1).tolist() == official[f"positives{k}"].tolist()


def test_where_decay_is_clipped_is_the_difference(official, monkeypatch):
    """Oracle: the authors' training graph. Where the clipping acts, the kernels' momenta come twice as near to theirs
    and more once weight decay is inside it."""
    wanted = [ours(official, f"momentum_after{k}") for k in (1, 2)]
    far = [by_kind(step[2], theirs)["kernels"] for step, theirs in zip(two_steps(official)[0], wanted)]
    decay_inside(monkeypatch)
    near = [by_kind(step[2], theirs)["kernels"] for step, theirs in zip(two_steps(official)[0], wanted)]
    acts = [official[f"gradient_norm{k}"] > train.PROTOCOLS["B"]["clip"] for k in (1, 2)]
    assert all(a > 2 * b for a, b, act in zip(far, near, acts) if act), (far, near)


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr("loss.HUBER_DELTA", 0.11),
        lambda patch: patch.setattr("train.MOMENTUM", 0.91),
        lambda patch: patch.setattr("train.WEIGHT_DECAY", 8e-4),
        lambda patch: patch.setattr("loss.BOX_WEIGHT", 51.0),
        lambda patch: patch.setattr("test_official_step.THEIR_EPSILON", 1.1e-4),
        lambda patch: patch.setitem(train.PROTOCOLS["B"], "clip", 10.1),
        lambda patch: patch.setattr("loss.focal_loss", functools.partial(loss.focal_loss, gamma=1.52)),
        lambda patch: patch.setattr("blocks.max_pool_same", lambda x, k, s: nn.functional.max_pool2d(x, k, s, k // 2)),
    ],
    ids=["delta", "momentum", "decay", "box weight", "epsilon", "clip", "gamma", "pooling"],
)
def test_a_wrong_step_differs(change, official, monkeypatch):
    """Oracle: the authors' training graph. Each of these faults is seen by the comparison above."""
    change(monkeypatch)
    said, _ = two_steps(official)
    wrong = []
    for k, (losses, norm, momenta, state) in enumerate(said, 1):
        wrong.append(abs(losses["class"].item() / float(official[f"class_loss{k}"]) - 1) / 1e-5)
        wrong.append(abs(losses["box"].item() / 50 / float(official[f"box_loss{k}"]) - 1) / 1e-5)
        wrong.append(abs(norm.item() / float(official[f"gradient_norm_without_decay{k}"]) - 1) / 1e-5)
        wrong += [error / 5e-4 for error in by_kind(momenta, ours(official, f"momentum_after{k}")).values()]
        weights = {n: v for n, v in ours(official, f"after{k}").items() if "running" not in n}
        wrong += [error / 1e-5 for error in by_kind(state, weights).values()]
    assert max(wrong) > 3, wrong
