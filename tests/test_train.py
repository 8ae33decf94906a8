"""train.py: the learning rate, the recipe, exact resume, several processes, and what happens when things go wrong."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import evaluate
import heads
import train
from data import TrainSet, load_annotations, make_loader, micro_batches
from evaluate import Place, finish, try_device
from model import ARCHS, HEADS, Arch, UserError, build_model, load_checkpoint, load_model, load_weights
from train import PROTOCOLS, lr_at, main, make_optimizer, parse_args, read_step, resolve, save, split_batch, train_step

ROOT = Path(train.__file__).parent
CPU = Place(torch.device("cpu"))
TINY = ["--arch", "tiny", "--size", "128", "--protocol", "toy", "--device", "cpu"]
slow = pytest.mark.slow


def check_rates(rates, wanted, run):
    """Fail at the first step whose rate differs: rates are a function of the step, wanted {step: rate}."""
    for step, rate in wanted.items():
        assert rates(step) == pytest.approx(rate), f"{run}: rate {rates(step):.6g} at step {step}, wanted {rate:.6g}"


@pytest.mark.parametrize("epochs, first, second", [(350, 320, 340), (500, 470, 490), (250, 220, 240)])
def test_learning_rate_of_the_official_schedule(epochs, first, second):
    """Oracle: the authors' step counts, 463 per epoch at 256: warm-up of 2000 steps, drops at 320/340 and 470/490."""
    wanted = {0: 0.0067, 1: 0.00683665, 500: 0.075025, 1000: 0.14335, 1500: 0.211675, 2000: 0.28, 2001: 0.28}
    wanted |= {first * 463 - 1: 0.28, first * 463: 0.028, second * 463 - 1: 0.028, second * 463: 0.0028}
    wanted |= {epochs * 463 - 1: 0.0028}
    check_rates(lambda step: lr_at(step, epochs, 463), wanted, f"{epochs} epochs of 463 steps")


RUNS = [  # what it is, (epochs, steps per epoch, batch, lr), {step: rate}
    ("a batch of 64", (350, 1849, 64, 0.28), {0: 0.001675, 4000: 0.0358375, 8000: 0.07, 591679: 0.07, 591680: 0.007}),
    ("a batch of 224", (350, 529, 224, 0.28), {0: 0.0058625, 1000: 0.11048516, 2286: 0.245, 100000: 0.245}),
    ("an lr of 0.8", (350, 463, 256, 0.8), {0: 0.0067, 1000: 0.40335, 2000: 0.8, 148160: 0.08, 157420: 0.008}),
    ("36 epochs", (36, 10, 256, 0.8), {18: 0.40335, 36: 0.8, 329: 0.8, 330: 0.08, 349: 0.08, 350: 0.008, 359: 0.008}),
    ("59 epochs", (59, 7, 256, 0.28), {378: 0.28, 379: 0.028, 401: 0.028, 402: 0.0028}),  # 378.6 and 401.5 of 413
    ("60 epochs", (60, 7, 256, 0.28), {209: 0.28, 210: 0.028, 349: 0.028, 350: 0.0028}),
    ("200 epochs of a step", (200, 1, 8, 1.2), {0: 0.0067 / 32, 10: 0.01885469, 20: 0.0375, 169: 0.0375, 170: 0.00375}),
]


@pytest.mark.parametrize("run, given, wanted", RUNS, ids=[name for name, *_ in RUNS])
def test_learning_rate_of_other_batches_and_short_runs(run, given, wanted):
    """Oracle: by hand. Rates go with the batch, and the warm-up against it; it is at most a tenth of the run; under 60
    epochs the drops are at 11/12 and 35/36 of the run."""
    check_rates(lambda step: lr_at(step, *given), wanted, f"{run}, (epochs, steps each, batch, lr) {given}")


def test_corners_of_the_schedule():
    """Oracle: by hand. Four pairs (step, rate): the paper's run; a quarter of the batch; a short run, whose drops are
    the next whole steps."""
    for given, wanted in (
        ((350, 463, 256, 0.28), [(0, 0.0067), (2000, 0.28), (148160, 0.028), (157420, 0.0028)]),
        ((350, 1849, 64, 0.28), [(0, 0.001675), (8000, 0.07), (591680, 0.007), (628660, 0.0007)]),
        ((59, 7, 256, 0.8), [(0, 0.0067), (41.3, 0.8), (379, 0.08), (402, 0.008)]),
        ((36, 10, 512, 0.8), [(0, 0.0134), (36, 1.6), (330, 0.16), (350, 0.016)]),
    ):
        found = [tuple(map(float, corner)) for corner in train.schedule(*given)]
        said = f"schedule{given} is {found}, wanted {wanted}"
        assert len(found) == 4, said
        for corner, right in zip(found, wanted):
            assert corner == pytest.approx(right), said


def recipe_of(*flags):
    return resolve(parse_args([str(flag) for flag in flags]))


def test_protocols():
    """Oracle: the paper's protocols and the authors' yaml files."""
    a, b, c = (SimpleNamespace(**PROTOCOLS[name]) for name in "ABC")
    assert [p.jitter for p in (a, b, c)] == [[0.8, 1.2], [0.5, 2.0], [0.5, 2.0]]
    assert [p.epochs for p in (a, b, c)] == [250, 350, 500]
    assert [(p.activation, p.drop_path, p.drop_rate) for p in (a, b, c)] == [
        ("relu", 0, 0.1),
        ("relu", 0, 0),
        ("swish", 0.2, 0),
    ]
    assert {(p.batch_size, p.lr, p.clip, p.flip) for p in (a, b, c)} == {(256, 0.28, 10.0, True)}
    rois = [recipe_of("--protocol", name, "--head", "mask_rcnn") for name in "ABC"]
    assert {(recipe["rois"], recipe["mask_rois"], recipe["clip"]) for recipe in rois} == {(512, 128, math.inf)}


def test_recipe_rows_exceptions_and_flags():
    """Oracle: by hand. A row, its exception for an arch, --overfit, and flags, in this order."""
    default = recipe_of()
    assert (default["arch"], default["size"], default["head"], default["epochs"]) == ("49", 640, "retinanet", 350)
    exception = recipe_of("--arch", 190, "--protocol", "C")
    assert (exception["epochs"], exception["lr"], exception["jitter"]) == (400, 0.3, [0.1, 1.9])
    assert recipe_of("--arch", 143, "--protocol", "C")["drop_path"] == 0.16
    masks = recipe_of("--arch", 190, "--size", 1536, "--protocol", "C", "--head", "mask_rcnn")
    assert (masks["epochs"], masks["lr"], masks["jitter"], masks["activation"]) == (400, 0.28, [0.1, 2.0], "swish")
    assert (masks["clip"], masks["rois"], masks["mask_rois"], masks["drop_path"]) == (math.inf, 512, 128, 0.2)
    assert default["clip"] == 10 and "rois" not in default and "mask_rois" not in default
    assert recipe_of("--arch", 143, "--jitter", 0.1, 1.9)["jitter"] == [0.1, 1.9]
    toy = recipe_of("--arch", 49, "--protocol", "toy", "--head", "mask_rcnn")
    assert (toy["rois"], toy["mask_rois"], toy["epochs"], toy["eval_every"]) == (64, 16, 28, 14)
    tiny = recipe_of("--arch", "tiny", "--protocol", "toy", "--head", "mask_rcnn")
    assert (tiny["rois"], tiny["mask_rois"], tiny["epochs"], tiny["eval_every"]) == (64, 16, 18, 9)
    overfit = recipe_of("--overfit", 8, "--epochs", 7)
    assert (overfit["jitter"], overfit["flip"], overfit["batch_size"], overfit["epochs"]) == ([1, 1], False, 8, 7)
    assert default["network"] == ARCHS["49"].plain()
    assert PROTOCOLS["B"]["jitter"] == [0.5, 2.0] and PROTOCOLS["B"]["epochs"] == 350  # the tables stay as they are


@pytest.mark.parametrize("head", HEADS)
def test_weight_decay_groups(head):
    """Oracle: by hand. Decay 4e-5 on the weights of convolutions and linear layers, never on a bias or batch norm."""
    with torch.device("meta"):
        model = build_model("tiny", head, 3)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    weights, found = {id(m.weight) for m in layers}, {}
    for group in make_optimizer(model).param_groups:
        for p in group["params"]:
            found.setdefault(id(p), []).append(group["weight_decay"])
    for name, p in model.named_parameters():
        decay, wanted = found.get(id(p), []), [4e-5 if id(p) in weights else 0]
        assert decay == wanted, f"weight decay of {name}, by the groups that have it: {decay}, wanted {wanted}"


def test_steps_of_the_optimizer_by_hand():
    """Oracle: by hand. Three steps of v = 0.9 v + gradient + decay * p, p = p - lr * v, with decay on weights alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2))
    for p in model.parameters():
        nn.init.normal_(p, std=1000.0)  # so that decay is seen
    optimizer = make_optimizer(model)
    wanted = {name: (p.detach().clone(), 0.0) for name, p in model.named_parameters()}
    for step in range(1, 4):
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape) / 10
            value, speed = wanted[name]
            speed = 0.9 * speed + p.grad + (4e-5 * value if name in ("0.weight", "2.weight") else 0)
            wanted[name] = value - 0.5 * speed, speed
        optimizer.step()
        for name, p in model.named_parameters():
            start = wanted[name][0]
            error = (p.detach() - start).abs().max().item()
            assert error < 1e-3, f"after step {step} {name} is {error:.2g} from SGD with momentum 0.9 and decay 4e-5"


class Toy(nn.Module):
    """Losses that are linear in two parameters, so that their gradients are known; it notes how it is called.

    The class loss is `weight` times each channel's mean pixel, the box loss `bias` times the mean first label. It draws
    so many random numbers as `noise` says, as if for DropBlock, and notes the first."""

    def __init__(self, noise=0):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), nn.Parameter(torch.tensor([4.0]))
        self.noise, self.draws, self.autocast, self.forwards, self.backwards = noise, [], [], [], []
        self.alone = False  # inside no_sync

    def forward(self, images, targets=None, sizes=None):
        lacking = {"boxes", "labels", "region", "noise"} - set(targets or ())
        assert not lacking, f"targets are all of a batch but the image; they lack {sorted(lacking)}"
        for name, value in [("images", images), ("sizes", sizes), *targets.items()]:
            found = getattr(value, "device", None)
            assert found == self.weight.device, f"{name} are on {found}, the model on {self.weight.device}"
        assert sizes.is_meta or torch.equal(sizes, targets["region"]), f"sizes are {sizes}, wanted {targets['region']}"
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        self.forwards.append(self.alone)
        if self.noise:
            self.draws.append(torch.rand(self.noise)[0].item())
        weight, bias = self.weight.clone(), self.bias.clone()
        if weight.requires_grad:
            weight.register_hook(lambda gradient: self.backwards.append(self.alone))
        pixels = images.float().mean(dim=(0, 2, 3))  # (3,)
        return {"class": (weight * pixels).sum(), "box": (bias * targets["labels"][:, 0].float().mean()).sum()}

    def no_sync(self):
        raise AssertionError("with one process alone the model is not in DistributedDataParallel, and has no no_sync")


class Wrapped(Toy):
    """The same with what DistributedDataParallel has."""

    @contextlib.contextmanager
    def no_sync(self):
        self.alone = True
        yield
        self.alone = False


def toy_batch(*pixels, label=0):
    """A micro-batch of two images, of whose channels these are the means."""
    image = torch.tensor(pixels, dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4).contiguous()
    labels = torch.full((2, 100), label)
    targets = {"boxes": torch.zeros(2, 100, 4), "labels": labels, "region": torch.full((2, 2), 4.0)}
    return {"image": image, "noise": torch.arange(2)} | targets


BATCHES = [toy_batch(6, 0, 9, label=3), toy_batch(0, 3, 0, label=6), toy_batch(0, 0, 0, label=0)]
ONE = ([6.0, 0, 9], 3.0, {"class": 33.0, "box": 12.0})  # gradients of weight and bias, losses of the first batch
THREE = ([2.0, 1, 3], 3.0, {"class": 13.0, "box": 12.0})  # the means over all
OFF = torch.amp.GradScaler("cpu", enabled=False)


def toy_step(batches, clip=math.inf, model=None, scaler=OFF, place=CPU, seed=0, step=0):
    """(the model, its optimizer, what train_step gave) for one step of plain SGD at rate 0.5, with old gradients."""
    model = model or Toy()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=77.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e6)
    recipe = {"seed": seed, "clip": clip}
    return model, optimizer, train_step(model, batches, recipe, optimizer, scaler, 0.5, place, step)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "scaled"])
@pytest.mark.parametrize("clip", [math.inf, 2.0])
@pytest.mark.parametrize("batches, wanted", [(BATCHES[:1], ONE), (BATCHES, THREE)], ids=["one", "three"])
def test_a_step_by_hand(batches, wanted, clip, precision):
    """Oracle: by hand. Losses and gradients are means over one or three micro-batches, without what was there before;
    the norm is told before clipping; the learning rate is set in every group; under autocast where that is on; all the
    same where a GradScaler multiplies by 1024."""
    place = CPU._replace(amp=torch.bfloat16 if precision == "bfloat16" else None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=precision == "scaled")
    model, optimizer, (losses, norm) = toy_step(batches, clip, scaler=scaler, place=place)
    weight, bias, means = wanted
    what = f"{len(batches)} micro-batches, clip {clip}, {precision}: "
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.5, 0.5], f"{what}learning rates of the groups {rates}, wanted 0.5"
    assert model.autocast == [precision == "bfloat16"] * len(batches), f"{what}under autocast? {model.autocast}"
    assert losses.keys() == means.keys(), f"{what}losses {sorted(losses)}, wanted {sorted(means)}"
    for name, value in losses.items():
        kind = type(value).__name__, getattr(value, "shape", None), getattr(value, "requires_grad", None)
        assert kind == ("Tensor", (), False), f"{what}{name} loss is {kind}, wanted a 0-dim tensor without gradient"
        assert value.item() == pytest.approx(means[name]), f"{what}{name} loss {value.item()}, wanted {means[name]}"
    length = math.hypot(*weight, bias)
    assert float(norm) == pytest.approx(length), f"{what}norm {float(norm)}, wanted {length}, of before clipping"
    factor = 0.5 * min(clip / length, 1)
    for name, start, gradient in (("weight", [1, 2, 3], weight), ("bias", [4], [bias])):
        found = [round(a - b, 5) for a, b in zip(start, getattr(model, name).tolist())]
        right = [round(factor * g, 5) for g in gradient]
        assert found == pytest.approx(right, abs=2e-5), f"{what}{name} moves by {found}, wanted {right}"
    if precision == "scaled":
        found = scaler.state_dict()["_growth_tracker"]
        assert found == 1, f"{what}the scaler counts {found} sound steps, wanted 1: is it updated once?"


def test_a_step_that_overflows_is_skipped():
    """Oracle: by hand. Where a scaled gradient is infinite, the weights stay, and the scale is halved."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, enabled=True)
    model, _, (_, norm) = toy_step(BATCHES, 2.0, scaler=scaler)
    found = model.weight.tolist()
    assert found == [1, 2, 3], f"after an infinite gradient the weights are {found}, wanted [1, 2, 3]"
    assert not math.isfinite(norm), f"the norm of an infinite gradient is {float(norm)}"
    assert scaler.get_scale() == 2.0**126, f"after an overflow the scale is {scaler.get_scale()}, wanted half of 2^127"


class Nowhere(Place):
    """A device without values: whatever waits for one to read it is an error."""

    def autocast(self):
        return contextlib.nullcontext()


def test_a_step_reads_nothing_back():
    """Oracle: torch's meta device, which has shapes but no values to read. All inputs are moved to the device."""
    place, model = Nowhere(torch.device("meta")), Toy().to("meta")
    try:
        _, _, (losses, norm) = toy_step(BATCHES, 2.0, model=model, place=place)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        pytest.fail(f"train_step waits for the device, or leaves something on another: {error}")
    where = {
        value.device.type if isinstance(value, torch.Tensor) else type(value) for value in (*losses.values(), norm)
    }
    assert where == {"meta"}, f"losses and norm are on {where}, wanted tensors on the device"


def test_ranks_average_in_the_last_backward():
    """Oracle: counting. With several ranks all micro-steps but the last run, forward and backward, inside no_sync."""
    for count, wanted in ((1, [False]), (3, [True, True, False])):
        for rank in (0, 1):
            place = CPU._replace(rank=rank, world=2)
            model, *_ = toy_step(BATCHES[:count], model=Wrapped(), place=place)
            for what, found in (("forward", model.forwards), ("backward", model.backwards)):
                said = f"{count} micro-steps: {what} inside no_sync {found}, wanted {wanted}"
                assert found == wanted, said


def test_noise_depends_on_seed_step_and_micro_step():
    """Oracle: repetition. Torch's draws are the same at the same seed, step, micro-step and rank, whatever was drawn
    before them, and others where one of these is another, also if two change places."""
    seen = {}
    for seed, step, rank in itertools.product((0, 1, 2), (0, 1, 2, 1000), (0, 1, 2)):
        place, draws = CPU._replace(rank=rank, world=3), []
        for count in (1, 3):
            torch.manual_seed(count)
            draws.append(toy_step(BATCHES, model=Wrapped(count), place=place, seed=seed, step=step)[0].draws)
        what = f"seed {seed}, step {step}, rank {rank}: the micro-steps draw"
        assert draws[0] == draws[1], f"{what} {draws[0]}, and {draws[1]} after other draws"
        for t, draw in enumerate(draws[0]):
            key = dict(seed=seed, step=step, micro_step=t, rank=rank)
            assert seen.setdefault(draw, key) == key, f"{key} draws the same as {seen[draw]}"


def test_what_one_rank_reads():
    """Oracle: by hand. One rank alone reads its own losses, as floats by name, its norm and its wish to stop."""
    for stop in (False, True):
        means = {"class": torch.tensor(1.5), "box": torch.tensor(0.25), "mask": torch.tensor(3.0)}
        losses, norm, asked = read_step(means, torch.tensor(7.0), stop, CPU)
        wanted = {"class": 1.5, "box": 0.25, "mask": 3.0}
        assert losses == wanted, f"losses {losses}, wanted {wanted}"
        kinds = {type(value).__name__ for value in (*losses.values(), norm)}
        assert kinds == {"float"}, f"losses and norm are {kinds}, wanted floats"
        assert norm == 7, f"norm {norm}, wanted 7"
        assert asked == stop, f"stop {asked}, wanted {stop}"


def spawn(function, *arguments, nprocs):
    """Run it in processes of their own; if one fails, its last line is said first."""
    try:
        mp.spawn(function, args=arguments, nprocs=nprocs)
    except mp.ProcessRaisedException as error:
        pytest.fail(f"{str(error).strip().splitlines()[-1]}\n{error}")


def ask_to_stop(rank, world, folder):
    """A rank of several: means of losses, wishes and norms of all."""
    torch.set_num_threads(1)
    place = CPU._replace(rank=rank, world=world)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    loss, other = torch.tensor([1.0, 3.0][rank]), torch.tensor([10.0, 0.0][rank])
    for who in (0, 1, None):
        losses, norm, asked = read_step({"box": loss, "class": other}, torch.tensor(1.5), rank == who, place)
        assert losses == {"box": 2, "class": 5}, f"rank {rank}: losses {losses}, wanted the ranks' means, 2 and 5"
        assert norm == 1.5, f"rank {rank}: norm {norm}, wanted 1.5, which every rank has"
        assert asked == (who is not None), f"rank {rank}: stop {asked}, though rank {who} asks for it"
    losses, norm, asked = read_step({"box": loss / (1 - rank)}, torch.tensor(math.inf), False, place)
    assert not np.isfinite(losses["box"]), f"rank {rank}: box loss {losses['box']}, but rank 1's is infinite"
    assert norm == math.inf, f"rank {rank}: norm {norm}, wanted inf"
    assert not asked, f"rank {rank}: stop, which no rank asks for"
    finish(place)


def test_all_ranks_see_one_rank_stop_or_diverge(tmp_path):
    """Oracle: by hand. What one of two ranks reads, a wish to stop or an infinite loss, the other reads, too."""
    spawn(ask_to_stop, 2, tmp_path, nprocs=2)


def test_batch_is_split_the_same_everywhere():
    """Oracle: arithmetic. The micro-batch is what the table says fits, or what is given; it divides the share."""
    half = CPU._replace(amp=torch.bfloat16)  # 16 GB are assumed of a CPU
    for world, micro, expected in ((8, None, 16), (1, None, 16), (8, 4, 4), (2, 128, 128), (32, None, 8)):
        assert split_batch(recipe_of(), micro, half._replace(world=world)) == expected
    assert split_batch(recipe_of(), None, CPU) == 8  # float32 takes twice the memory
    assert split_batch(recipe_of("--protocol", "A"), None, half) == 8  # DropBlock 1.46 times
    assert split_batch(recipe_of("--protocol", "C", "--batch-size", 22), None, half) == 11  # 15 fit with swish
    assert split_batch(recipe_of("--batch-size", 224), 28, CPU._replace(world=8)) == 28
    assert split_batch(recipe_of("--arch", 96, "--size", 1024), None, half._replace(world=8)) == 4
    assert split_batch(recipe_of("--arch", 49, "--size", 896), None, half._replace(world=8)) == 8
    assert split_batch(recipe_of("--arch", 190, "--size", 1280, "--protocol", "C"), None, half) == 1
    with pytest.raises(UserError, match="--batch-size 256 doesn't divide into 3 devices"):
        split_batch(recipe_of(), None, CPU._replace(world=3))


def test_default_batch_at_other_sizes():
    """Oracle: arithmetic. What fits goes with the image's area; Mask R-CNN's, whose RoIs need the same at any size, is
    no larger below 640. An arch that is not in the table gets one image of 640 x 640."""
    half, retinanet, masks = CPU._replace(amp=torch.bfloat16), [], []
    for size in (128, 384, 640, 1280):
        flags = ("--size", size, "--batch-size", 1024)
        retinanet.append(split_batch(recipe_of(*flags), None, half))
        masks.append(split_batch(recipe_of(*flags, "--head", "mask_rcnn"), None, half))
    assert retinanet == [256, 32, 16, 4]  # of 475, 52.8, 19 and 4.75
    assert masks == [8, 8, 8, 2]  # of 14, 14, 14 and 3.5
    for size, expected in ((640, 1), (128, 16), (1280, 1)):
        assert split_batch(recipe_of("--size", size) | {"arch": "own"}, None, half) == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", "600"], "--size is 600, but must be a multiple of 128"),
        (["--workers", "-1"], "--workers is -1, but must be at least 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--epochs", "-1"], "--epochs is -1"),
        (["--jitter", "2", "0.5"], "LOW <= HIGH"),
        (["--overfit", "0"], "--overfit is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--batch-size", "16", "--micro-batch", "5"], "--micro-batch 5 must divide 16"),
        (["--micro-batch", "0"], "--micro-batch is 0"),
        (["--eval-every", "0"], "--eval-every is 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--lr", "-1"], "--lr is -1"),
        (["--jitter", "nan", "1"], "LOW <= HIGH"),
        (["--size", "128", "--micro-batch", "1"], "single value per channel"),
        (["--data", "nowhere"], "nowhere/train2017 and nowhere/annotations.* not found"),
        (["--resume", "gone.pt"], "no checkpoint at gone.pt"),
        (["--weights", "gone.pt"], "no checkpoint at gone.pt"),
        (["--amp", "fp16"], "--amp fp16 needs a CUDA device"),
        (["--limit", "0"], "--limit is 0"),
        (["--out", __file__ + "/out"], "the folder .*test_train.py/out can't be made"),
        (["--jitter", "1", "inf"], "--jitter"),
        (["--overfit", "-3"], "--overfit is -3"),
    ],
)
def test_bad_arguments(flags, message, shapes, tmp_path):
    """Oracle: by hand. Each mistake is one sentence that says what and where, before anything is written."""
    with pytest.raises(UserError, match=message):
        main([*TINY, "--data", str(shapes), "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag, values", [("--arch", ARCHS), ("--protocol", PROTOCOLS), ("--head", HEADS)])
def test_unknown_names(flag, values, capsys):
    """Oracle: the tables. What is not in a table is refused with exit code 2, and the names that are in it."""
    with pytest.raises(SystemExit) as stop:
        parse_args([flag, "52"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and flag in said and all(name in said for name in values)


def test_resume_and_weights_exclude_each_other(capsys):
    """Oracle: by hand. A run goes on with its own weights: both flags together are refused, and both are named."""
    with pytest.raises(SystemExit) as stop:
        parse_args(["--resume", "--weights", "a.pt"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--weights: not allowed with argument --resume" in said


def test_cuda_asked_for_and_absent(monkeypatch, shapes, tmp_path):
    """Oracle: by hand. The sentence says what torch finds."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="--device cuda: torch .* finds 0 CUDA devices"):
        main([*TINY[:-1], "cuda", "--data", str(shapes), "--out", str(tmp_path / "out")])


def test_a_device_that_this_torch_has_no_kernels_for(monkeypatch):
    """Oracle: the message of CUDA on a V100 under torch 2.11. It becomes a sentence with the pip line; a device without
    memory left stays what it is, and what computes is accepted."""

    def failing(error):
        def raising(*inputs):
            raise error

        return raising

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    try_device(CPU)
    lines = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be"
    monkeypatch.setattr(torch.nn, "Conv2d", failing(RuntimeError(lines)))
    with pytest.raises(UserError) as refused:
        try_device(CPU)
    said = str(refused.value)
    assert f"torch {torch.__version__} can't compute on this device (CUDA error: no kernel image" in said
    assert "pip install torch==2.10.0 torchvision==0.25.0" in said and "\n" not in said
    monkeypatch.setattr(torch.nn, "Conv2d", failing(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        try_device(CPU)


def test_the_first_use_of_cuda_is_tried(monkeypatch):
    """Oracle: by hand. On a machine whose torch says it has a GPU, `start` tries it before anything else."""
    tried = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(evaluate, "try_device", tried.append)
    for capability, amp in (((7, 0), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        place = evaluate.start("cuda")
        assert place == Place(torch.device("cuda:0"), amp=amp) and tried[-1] == place
    assert len(tried) == 2 and evaluate.start("cpu") == CPU and len(tried) == 2


def python(*arguments, code=0, **options):
    """Run a script in a process of its own, and return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_missing_coco(tmp_path):
    """Oracle: by hand. The default command without COCO: every missing path, what to do, exit code 2, no traceback."""
    out = python(ROOT / "train.py", "--arch", "49", "--size", "640", "--protocol", "B", cwd=tmp_path, code=2)
    for part in ("data/coco/train2017", "instances_train2017.json", "wget", "--data shapes"):
        assert part in out
    assert "Traceback" not in out and out.count("error:") == 1


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def equal(first, second):
    """Whether two checkpoints are equal to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


@pytest.mark.parametrize(
    "how, head, protocol",
    [pytest.param(signal.SIGTERM, "retinanet", "C", marks=slow), (signal.SIGKILL, "mask_rcnn", "toy")],
)
def test_resume_is_exact(how, head, protocol, shapes, tmp_path):
    """Oracle: the run that was not interrupted. Weights, momentum, best AP and log are the same to the last bit after a
    kill or a polite stop in mid-epoch, with two workers, jitter, stochastic depth or sampled RoIs."""
    flags = "--limit 16 --batch-size 4 --micro-batch 2 --epochs 2 --eval-every 1 --workers 2".split()
    command = [ROOT / "train.py", *TINY, *flags, "--head", head, "--protocol", protocol, "--data", shapes]
    python(*command, "--out", tmp_path / "straight")
    broken = tmp_path / "broken"
    victim = subprocess.Popen(
        [sys.executable, *map(str, command), "--out", str(broken)], stdout=subprocess.PIPE, text=True
    )
    while not (broken / "log.jsonl").exists() or '"step": 6' not in (broken / "log.jsonl").read_text():
        assert victim.poll() is None
        time.sleep(0.02)
    victim.send_signal(how)
    printed = victim.communicate(timeout=60)[0]
    stopped_at = load_checkpoint(broken / "last.pt")["step"]
    if how == signal.SIGTERM:
        assert victim.returncode == 0 and "go on with --resume" in printed and 6 <= stopped_at < 8
    else:
        assert victim.returncode == -signal.SIGKILL and stopped_at == 4
    assert "resuming at step" in python(*command, "--out", broken, "--resume")

    straight, resumed = (load_checkpoint(out / "last.pt") for out in (tmp_path / "straight", broken))
    assert straight["step"] == 8 and equal(straight, resumed)
    times = {"seconds", "waited"}
    logs = [
        [{k: v for k, v in row.items() if k not in times} for row in rows(out)]
        for out in (tmp_path / "straight", broken)
    ]
    assert logs[0] == logs[1] and [row["step"] for row in logs[0] if "step" in row] == list(range(1, 9))
    assert [row["eval_step"] for row in logs[0] if "eval_step" in row] == [4, 8]


def new_model(head):
    options = {"rois": 32, "mask_rois": 8} if head == "mask_rcnn" else {}
    return build_model("tiny", head, 6, **options)


def fixed_proposals(objectness, codes, anchors, sizes, candidates):
    """The same boxes for every image: between real ones near ties can fall otherwise in a batch of another size."""
    return [torch.cat(anchors)[::4].clamp(0, 128)] * len(sizes)


def steps_in_a_process(rank, world, micro, accumulate, root, folder, empty_rank, training, head):
    """Three steps of one of `world` processes; rank 0 saves the parameters it ends with."""
    torch.set_num_threads(1)
    if not training:
        heads.propose = fixed_proposals
    place = CPU._replace(rank=rank, world=world)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}{micro}", rank=rank, world_size=world)
    torch.manual_seed(0)
    annotations = load_annotations(root, masks=HEADS[head].masks)
    model = new_model(head).train(training)
    optimizer, scaler = make_optimizer(model), torch.amp.GradScaler("cpu", enabled=False)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    batch = world * micro * accumulate
    loader = make_loader(TrainSet(annotations, 128, (0.8, 1.2)), micro_batches(0, 3, batch, micro, rank, world), 0)

    def batches():
        for sample in loader:
            if empty_rank is not None:  # as if these images had no objects
                half = torch.arange(rank * micro, (rank + 1) * micro) // (world * micro // 2) == empty_rank
                sample["boxes"][half], sample["labels"][half] = 0, -1
            yield sample

    stream, recipe = batches(), {"seed": 0, "clip": 10.0}
    for step in range(3):
        some = [next(stream) for _ in range(accumulate)]
        means, norm = train_step(wrapped, some, recipe, optimizer, scaler, 0.02, place, step)
        losses, norm, _ = read_step(means, norm, False, place)
        assert np.isfinite([*losses.values(), norm]).all()
    if rank == 0:
        torch.save((model.state_dict(), losses), f"{folder}/{world}_{micro}.pt")
    finish(place)


SPLITS = [(2, None), (1, None), (1, 1)]  # micro-steps; a rank whose images have no objects


@pytest.mark.parametrize(
    "accumulate, empty_rank, head",
    [pytest.param(a, k, h, marks=[slow] * ((a, h) != (2, "retinanet"))) for a, k in SPLITS for h in HEADS],
)
def test_two_processes_equal_one(accumulate, empty_rank, head, shapes, tmp_path):
    """Oracle: a single process with twice the micro-batch. What 3 steps change of the parameters agrees, and the
    losses do, with accumulation on both sides, too, and where one rank has only images without objects (batch norm in
    evaluation mode; Mask R-CNN's proposals given)."""
    for world, micro in ((1, 4), (2, 2)):
        arguments = (world, micro, accumulate, shapes, tmp_path, empty_rank, False, head)
        spawn(steps_in_a_process, *arguments, nprocs=world)
    (one, one_losses), (two, two_losses) = (torch.load(tmp_path / name) for name in ("1_4.pt", "2_2.pt"))
    torch.manual_seed(0)
    start = new_model(head).state_dict()
    moved = {
        k: (v - start[k]).double() for k, v in one.items() if v.is_floating_point() and not torch.equal(v, start[k])
    }
    apart = {k: (two[k] - one[k]).double() for k in moved}
    most = max(v.abs().max().item() for v in moved.values())
    assert len(moved) > 200 and most > 1e-2, f"{len(moved)} tensors moved, by {most:.2g} at most"

    def norm(parts):
        return torch.cat([v.flatten() for v in parts]).norm().item()

    # Rounding can turn a ReLU that is as good as 0, and with it some gradients of one layer.
    share = norm(apart.values()) / norm(moved.values())
    assert share <= 1e-3, f"two processes' parameters are {share:.2g} of the way from those of one"
    for k in moved:
        share = norm([apart[k]]) / norm([moved[k]])
        assert share <= 0.02, f"two processes' {k} is {share:.2g} of the way from that of one"
    assert two_losses == pytest.approx(one_losses, rel=1e-5), f"losses of two {two_losses}, of one {one_losses}"


@pytest.mark.parametrize("head", HEADS)
def test_a_rank_with_only_empty_images(head, shapes, tmp_path):
    """Oracle: it ends. In training mode, with one of two ranks seeing no object at all, losses stay finite."""
    spawn(steps_in_a_process, 2, 2, 1, shapes, tmp_path, 1, True, head, nprocs=2)
    state, losses = torch.load(tmp_path / "2_2.pt")
    assert all(value.isfinite().all() for value in state.values()) and losses["box"] > 0


def test_torchrun(shapes, tmp_path):
    """Oracle: counting. Two processes train, evaluate every image once, resume, and log each step once."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    flags = "--limit 16 --batch-size 4 --eval-every 1 --workers 1 --head mask_rcnn".split()
    command = [*launch, ROOT / "train.py", *TINY, *flags, "--data", shapes, "--out", tmp_path / "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = python(*command, "--epochs", 1, env=environment)
    assert out.count("evaluated 16/16 images") == 1 and "4 = 2 device(s) x 2 images x 1 micro-steps" in out
    out = python(*command, "--epochs", 2, "--resume", env=environment)
    assert out.count("resuming at step 4") == 1 and "epochs 1 -> 2" in out
    assert [row["step"] for row in rows(tmp_path / "run") if "step" in row] == list(range(1, 9))


def test_sigterm_on_one_rank_stops_all(shapes, tmp_path):
    """Oracle: exit codes. SIGTERM to one of two processes: both save at the same step and exit with 0."""
    command = [sys.executable, ROOT / "train.py", *TINY, "--data", shapes, "--batch-size", "8", "--epochs", "20"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        flags = [*map(str, command), "--workers", "1", "--out", str(tmp_path / "run")]
        ranks.append(subprocess.Popen(flags, env=os.environ | environment, stdout=subprocess.PIPE, text=True))
    while not (tmp_path / "run" / "log.jsonl").exists() or '"step": 3' not in (tmp_path / "run/log.jsonl").read_text():
        assert all(process.poll() is None for process in ranks)
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=60)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert "stopped as asked; go on with --resume" in printed[0] and "step" not in printed[1]
    logged = [row["step"] for row in rows(tmp_path / "run")]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == logged[-1] < 160


def test_files_of_a_run(run):
    """Oracle: by hand. Checkpoints of plain types, a log, results and a picture."""
    assert {"last.pt", "best.pt", "log.jsonl", "results.json", "grid.png", ".lock"} == {p.name for p in run.iterdir()}
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    assert checkpoint["step"] == 4 and checkpoint["categories"][0] == [1, "disc"]
    assert checkpoint["recipe"]["arch"] == "tiny" and checkpoint["recipe"]["micro_batch"] == 16
    assert rows(run)[0].keys() >= {"step", "epoch", "lr", "loss", "class", "box", "grad_norm", "seconds", "waited"}


def test_an_existing_run_is_not_overwritten(run, shapes):
    """Oracle: by hand."""
    before = (run / "last.pt").read_bytes()
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        main([*TINY, "--data", str(shapes), "--out", str(run)])
    other = run / "other" / "last.pt"
    other.parent.mkdir()
    shutil.copy(run / "last.pt", other)
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        main([*TINY, "--data", str(shapes), "--out", str(run), "--resume", str(other)])
    assert (run / "last.pt").read_bytes() == before


def test_resume_of_a_linked_checkpoint(run, shapes, tmp_path, capsys):
    """Oracle: by hand. last.pt may be a link to another disk."""
    (tmp_path / "last.pt").symlink_to(run / "last.pt")
    main([*TINY, "--data", str(shapes), "--out", str(tmp_path), "--epochs", "1", "--workers", "0", "--resume"])
    assert f"writing to {tmp_path}, resuming at step 4\nstep 4 after" in capsys.readouterr().out


def test_overfit_within_a_limit(shapes):
    """Oracle: by hand. --limit counts first."""
    args = parse_args([*TINY, "--data", str(shapes), "--overfit", "2", "--limit", "3"])
    assert len(train.load_splits(args, resolve(args))[0].ids) == 2
    args.overfit = 5
    with pytest.raises(UserError, match="only 3 images"):
        train.load_splits(args, resolve(args))


def resumed(checkpoint, scaler):
    """(state, scaler) of a run that goes on from a checkpoint with a given scaler."""
    recipe, categories = checkpoint["recipe"], checkpoint["categories"]
    parts = train.make_parts(recipe, categories, CPU) | {"scaler": scaler}
    state = {"step": 0, "evaluated": 0, "best": -math.inf, "skipped": 0, "recipe": recipe, "categories": categories}
    assert train.resume_from(checkpoint, state, parts, 4, "last.pt") == "resuming at step 4"
    assert equal(parts["model"].state_dict(), checkpoint["model"])
    assert equal(parts["optimizer"].state_dict(), checkpoint["optimizer"])
    return state, parts["scaler"]


def test_resume_in_another_precision(run):
    """Oracle: by hand. A run that had no gradient scaler goes on with one, and the other way round."""
    plain, on, off = load_checkpoint(run / "last.pt"), {"enabled": True}, {"enabled": False}
    assert plain["scaler"] == {}
    state, scaler = resumed(plain, torch.amp.GradScaler("cpu", **on))
    assert scaler.get_scale() == 2.0**16 and state["step"] == state["evaluated"] == 4 and state["best"] == plain["best"]
    scaled = plain | {"scaler": torch.amp.GradScaler("cpu", init_scale=4.0).state_dict()}
    assert resumed(scaled, torch.amp.GradScaler("cpu", **on))[1].get_scale() == 4
    assert not resumed(scaled, torch.amp.GradScaler("cpu", **off))[1].is_enabled()
    assert not train.make_parts(plain["recipe"], plain["categories"], CPU)["scaler"].is_enabled()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arch", "49S"], r"network differs \(filter_scale 0.25 -> 0.65, endpoint_channels 64 -> 128"),
        (["--size", "256"], r"size differs \(128 -> 256\)"),
        (["--head", "mask_rcnn"], r"head differs \(retinanet -> mask_rcnn\)"),
    ],
)
def test_resume_as_another_model_is_refused(flags, message, run, shapes):
    """Oracle: by hand. The sentence says what differs and offers --weights."""
    with pytest.raises(UserError, match=message + ".*--weights"):
        main([*TINY, "--data", str(shapes), "--out", str(run), "--resume", *flags])


def test_resume_past_the_end_is_refused(run, shapes):
    """Oracle: by hand. A checkpoint of 4 steps can't go on in a run of 1."""
    with pytest.raises(UserError, match="4 steps behind it, and this recipe only 1"):
        main([*TINY, "--data", str(shapes), "--out", str(run), "--resume", "--epochs", "1", "--batch-size", "60"])


OWN = dataclasses.replace(ARCHS["tiny"], filter_scale=0.2, head_channels=32)
FEW = [*TINY, "--limit", "8", "--batch-size", "4", "--epochs", "2", "--eval-every", "1", "--workers", "0"]


def test_an_arch_of_ones_own_resumes_exactly(shapes, tmp_path, monkeypatch, capsys):
    """Oracle: the run that was not interrupted. An Arch that is no row of ARCHS trains, stops after each step as a
    signal asks, and goes on to the same bits; without it, and with another, it is refused, and what differs is said."""
    assert OWN not in ARCHS.values()
    straight, broken = ([*FEW, "--data", str(shapes), "--out", str(tmp_path / name)] for name in "ab")
    main(straight, OWN)
    with monkeypatch.context() as patch:
        patch.setattr(train, "catch_signals", lambda: [signal.SIGTERM])
        main(broken, OWN)
        main([*broken, "--resume"], OWN)
        main([*broken, "--resume"], OWN)
    assert "step 3 after" in capsys.readouterr().out
    for other, said in (
        (None, "network differs (filter_scale 0.2 -> 0.25, head_channels 32 -> 64)"),
        (dataclasses.replace(OWN, repeats=2), "network differs (repeats 1 -> 2)"),
    ):
        with pytest.raises(UserError) as refused:
            main([*broken, "--resume"], other)
        assert said in str(refused.value) and "--weights" in str(refused.value)
    main([*broken, "--resume"], OWN)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert a["step"] == 4 and equal(a, b) and Arch.of(a["recipe"]["network"]) == OWN
    times = {"seconds", "waited"}
    logs = [[{k: v for k, v in r.items() if k not in times} for r in rows(tmp_path / name)] for name in "ab"]
    assert logs[0] == logs[1] and [r["step"] for r in logs[0] if "step" in r] == [1, 2, 3, 4]


@pytest.mark.parametrize("row", [OWN, None])
def test_a_row_of_archs_may_change_or_vanish(row, run, shapes, tmp_path, monkeypatch, capsys):
    """Oracle: the checkpoint, which says its own network. When its row has another value, or is gone, it is loaded and
    evaluated as before, and resumed where the same network is given, under whatever name."""
    same, checkpoint = ARCHS["tiny"], load_checkpoint(run / "last.pt")
    monkeypatch.setitem(ARCHS, "tiny", row) if row else monkeypatch.delitem(ARCHS, "tiny")
    model = load_model(checkpoint, CPU)
    assert model.arch == same and equal(model.state_dict(), checkpoint["model"])
    shutil.copytree(run, tmp_path / "run")
    where = ["--data", str(shapes), "--device", "cpu", "--workers", "0"]
    evaluate.main([*where, "--weights", str(tmp_path / "run" / "last.pt"), "--limit", "3"])
    assert "evaluated 3/3 images" in capsys.readouterr().out
    resume = [*where, "--size", "128", "--protocol", "toy", "--epochs", "1", "--out", str(tmp_path / "run"), "--resume"]
    resume += ["--arch", "tiny" if row else "49"]
    with pytest.raises(UserError, match=r"network differs \(filter_scale 0.25 -> "):
        main(resume)
    capsys.readouterr()
    main(resume, same)
    renamed = "" if row else " with a changed recipe: arch tiny -> 49"
    assert f"resuming at step 4{renamed}\nstep 4 after" in capsys.readouterr().out


def test_late_data_is_warned_of(capsys):
    """Oracle: by hand. Over 20 % of 50 steps' time gives one warning with its cure; 20 % none; rank 1 is silent."""
    for waited, rank, warnings in ((0.3, 0, 1), (0.2, 0, 0), (0.3, 1, 0)):
        bar, recent = tqdm(total=99, disable=True), []
        for step in range(1, 60):
            recent = [*recent, {"step": step, "loss": 1.0, "lr": 0.1, "skipped": 0, "seconds": 1.0, "waited": waited}][
                -50:
            ]
            train.show_progress(bar, recent, 8, 1, CPU._replace(rank=rank))
        printed = "".join(capsys.readouterr())
        assert printed.count("30% of the time") == printed.count("raise --workers (now 1)") == warnings
        assert printed.count("step 50/99: loss 1.000, lr 0.1, 8.0 images/s") == (rank == 0)


class Collective(Exception):
    """Raised in place of a collective, when it is reached."""


def test_workers_are_forked_before_a_collective(shapes, tmp_path, monkeypatch):
    """Oracle: by hand. Of several ranks, training and evaluation start their workers first: a worker that is forked
    while a thread of the collective enters Python inherits a lock that nobody opens, and hangs (seen once)."""
    events, a = [], load_annotations(shapes)

    class Loader:
        def __iter__(self):
            events.append("fork")
            return iter(())

    def collective(*given, **options):
        raise Collective

    for module in (train, evaluate):
        monkeypatch.setattr(module, "make_loader", lambda *given: Loader())
    monkeypatch.setattr(train, "DistributedDataParallel", collective)
    monkeypatch.setattr(dist, "broadcast", collective)
    place = Place(CPU.device, rank=1, world=2)
    recipe = train.resolve(train.parse_args(["--arch", "tiny", "--size", "128", "--protocol", "toy"]))
    state = {"step": 0, "recipe": recipe | {"micro_batch": 8}}
    parts = {"model": nn.BatchNorm2d(1), "optimizer": None, "scaler": None}
    with pytest.raises(Collective):
        train.fit(parts, state, train.TrainSet(a, 128, (1, 1)), a, place, tmp_path, 2)
    with pytest.raises(Collective):
        evaluate.evaluate(parts["model"], a, 128, place)
    assert events == ["fork", "fork"]


def renamed_shapes(shapes, folder):
    """The generated set with other category names."""
    for split in ("train2017", "val2017"):
        path = shapes / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category["name"] = "other " + category["name"]
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / path.name).write_text(json.dumps(content))
        (folder / split).symlink_to(shapes / split)
    return folder


def test_weights_from_another_detector(run, shapes, tmp_path, capsys):
    """Oracle: by hand. Mask R-CNN starts from a RetinaNet's backbone; all of its heads are new and said to be; its own
    weights with other classes leave out every layer that depends on them."""
    flags = [*TINY, "--head", "mask_rcnn", "--limit", "2", "--batch-size", "2", "--epochs", "1", "--workers", "0"]
    first = tmp_path / "first"
    main([*flags, "--data", str(shapes), "--weights", str(run / "best.pt"), "--out", str(first)])
    out = capsys.readouterr().out
    backbone = sum(name.startswith("backbone.") for name in load_checkpoint(first / "last.pt")["model"])
    assert f"weights: {backbone} of" in out and "new: ['rpn.tower.convs.0.weight'" in out
    renamed = str(renamed_shapes(shapes, tmp_path / "renamed"))
    main([*flags, "--data", renamed, "--weights", str(first / "last.pt"), "--out", str(tmp_path / "second")])
    layers = ("box_head.class_predict", "box_head.box_predict", "mask_head.mask_predict")
    assert f"new: {[f'{n}.{p}' for n in layers for p in ('weight', 'bias')]}" in capsys.readouterr().out


def test_weights_of_other_classes(run, shapes, tmp_path, capsys):
    """Oracle: by hand. What fits is taken; the class layer is new and named; a bad file is refused."""
    renamed = renamed_shapes(shapes, tmp_path / "renamed")
    flags = [*TINY, "--data", str(renamed), "--limit", "4", "--batch-size", "2", "--epochs", "1", "--workers", "0"]
    main([*flags, "--weights", str(run / "best.pt"), "--out", str(tmp_path / "new")])
    out = capsys.readouterr().out
    assert "new: ['head.class_predict.weight', 'head.class_predict.bias']" in out and "evaluated 4/4 images" in out
    with pytest.raises(UserError, match="classes differs .*disc.* -> .*other disc"):
        main([*flags, "--resume", str(run / "last.pt"), "--out", str(tmp_path / "no")])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "cut.pt").write_bytes((run / "last.pt").read_bytes()[:5000])
    for name in ("text.pt", "cut.pt"):
        with pytest.raises(UserError, match=name):
            main([*flags, "--weights", str(tmp_path / name), "--out", str(tmp_path / "no")])


def test_weights_compare_networks_not_names(run, shapes, tmp_path, monkeypatch, capsys):
    """Oracle: by hand. An equal Arch under another name takes every tensor, and nothing is said of the network; another
    Arch under the same name takes what fits, and what differs is said."""
    monkeypatch.setitem(ARCHS, "same", dataclasses.replace(ARCHS["tiny"]))
    flags = [*TINY, "--data", str(shapes), "--limit", "4", "--batch-size", "4", "--epochs", "1", "--workers", "0"]
    flags += ["--lr", "1e-9", "--weights", str(run / "best.pt")]
    given = load_checkpoint(run / "best.pt")["model"]
    main([*flags, "--arch", "same", "--out", str(tmp_path / "same")])
    out = capsys.readouterr().out
    assert f"weights: {len(given)} of {len(given)} tensors from {run / 'best.pt'}; new: []" in out
    assert "network is another" not in out
    main([*flags, "--out", str(tmp_path / "other")], dataclasses.replace(ARCHS["tiny"], head_channels=32, alpha=0.5))
    out = capsys.readouterr().out
    assert "its network is another: head_channels 64 -> 32; new: ['head." in out
    started = load_checkpoint(tmp_path / "other" / "last.pt")["model"]
    changed = [name for name in given if started[name].shape != given[name].shape]
    assert changed and all(name.startswith("head.") for name in changed)
    assert f"weights: {len(started) - len(changed)} of {len(started)} tensors" in out
    kept = [name for name in given if name not in changed and name.endswith("weight") and given[name].ndim == 4]
    assert len(kept) > 100 and all(torch.allclose(started[name], given[name], atol=1e-5) for name in kept)


def test_weights_without_a_layer_that_fits(run):
    """Oracle: by hand. Where no layer fits, the sentence says how the networks differ, and nothing is taken."""
    checkpoint = load_checkpoint(run / "best.pt")
    detector = build_model(OWN, num_classes=6)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    few = {name: value for name, value in checkpoint["model"].items() if value.ndim < 2}
    renamed = {f"other.{name}": value for name, value in checkpoint["model"].items()}
    for given in (few, renamed, {}):
        with pytest.raises(UserError, match="--weights a.pt: no layer of it fits.*filter_scale 0.25 -> 0.2, head_chan"):
            load_weights(detector, checkpoint | {"model": given}, checkpoint["categories"], "a.pt")
    assert equal(detector.state_dict(), before)


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


def test_a_checkpoint_with_code_is_not_run(tmp_path, monkeypatch):
    """Oracle: by hand. It is refused with a sentence, and the code in it leaves no trace."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful(), "recipe": {}, "categories": []}, "bad.pt")
    with pytest.raises(UserError, match="bad.pt is not a checkpoint of tensors and plain values"):
        load_checkpoint("bad.pt")
    assert not Path("harmed").exists()


def test_a_failed_save_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    """Oracle: by hand. The disk is full: the old file stays, the draft goes, a sentence says so. Only rank 0 writes."""
    path, parts = tmp_path / "last.pt", {"model": nn.Linear(1, 1)}
    save(path, parts, {"step": 0}, CPU._replace(rank=1, world=2))
    assert not path.exists()
    save(path, parts, {"step": 1}, CPU)

    def full(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=f"could not write {path} .*No space left on device.*what it held is intact"):
        save(path, parts, {"step": 2}, CPU)
    kept = torch.load(path, weights_only=True)
    assert (
        kept["step"] == 1 and equal(kept["model"], parts["model"].state_dict()) and len(list(tmp_path.iterdir())) == 1
    )


def test_divergence_stops_the_run(shapes, tmp_path, capsys):
    """Oracle: by hand. A loss that is not finite ends the run, naming step, rate, terms, images; last.pt is sound."""
    out = tmp_path / "out"
    flags = [*TINY, "--data", str(shapes), "--overfit", "4", "--workers", "0", "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--lr", "1e30", "--epochs", "50"])
    message = str(stop.value.code)
    ids = load_annotations(shapes).ids[:4].tolist()
    assert "training diverged at step" in message and "class loss" in message and "learning rate" in message
    assert all(str(i) in message for i in ids)
    last = load_checkpoint(out / "last.pt")
    assert 0 < last["step"] < int(message.split("at step ")[1].split(":")[0])
    assert all(value.isfinite().all() for value in last["model"].values())


def test_without_a_validation_split(coco_sample, tmp_path, capsys):
    """Oracle: by hand. One line says that train2017 is evaluated; --overfit takes the first images with objects."""
    flags = [*TINY, "--data", str(coco_sample), "--batch-size", "2", "--epochs", "1", "--workers", "0"]
    main([*flags, "--limit", "2", "--out", str(tmp_path / "a")])
    out = capsys.readouterr().out
    assert out.count("evaluating on train2017") == 1 and "evaluated 2/2 images" in out
    main([*flags, "--overfit", "3", "--out", str(tmp_path / "b")])
    a = load_annotations(coco_sample)
    ids = a.ids[a.positives() > 0][:3].tolist()
    found = {row["image_id"] for row in json.loads((tmp_path / "b" / "results.json").read_text())}
    assert "3 images" in capsys.readouterr().out and found <= set(ids)


def test_exceptions_are_fields():
    """Oracle: the recipe's fields. Every row has the same, and what a head or an exception changes is a field."""
    assert train.HEAD_FIELDS.keys() == HEADS.keys()
    assert all(row.keys() == PROTOCOLS["B"].keys() for row in PROTOCOLS.values())
    for (protocol, head, *arch), changed in train.EXCEPTIONS.items():
        assert (
            changed.keys() <= PROTOCOLS[protocol].keys() | train.HEAD_FIELDS[head].keys() and set(arch) <= ARCHS.keys()
        )
    assert train.OVERFIT.keys() <= PROTOCOLS["B"].keys()
    for head, detector in HEADS.items():
        assert set(detector.options) <= PROTOCOLS["B"].keys() | train.HEAD_FIELDS[head].keys()
