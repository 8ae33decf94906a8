"""What only a GPU can show: run with -m gpu on a machine with CUDA."""

import warnings

import pytest
import torch
from bench_step import objects_of
from test_step import fixed_statistics

import heads
from evaluate import start
from model import HEADS, build_model
from train import make_optimizer, read_step, train_step

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_debugging_left():
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(head, amp="auto", size=256, images=2):
    """(place, detector, images, targets) on the device."""
    torch.manual_seed(0)
    place = start("cuda", amp)
    detector = place.move(build_model("tiny", head, 7)).train()
    pixels = place.move(torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8))
    return place, detector, pixels, objects_of(images, size, place.device, True)


def test_retinanet_never_waits():
    """Oracle: torch.cuda.set_sync_debug_mode("error"), from the batch's arrival to the end of backward."""
    place, detector, images, targets = on_gpu("retinanet")
    for mode in ("default", "error"):  # the first step makes the anchors
        torch.cuda.set_sync_debug_mode(mode)
        with place.autocast():
            losses = detector(images, targets)
        sum(losses.values()).backward()


def test_mask_rcnn_waits_only_in_nms():
    """Oracle: the same mode's warnings. There are as many as calls of torchvision's NMS, one per image and level, or
    fewer: the mode may not see all of what NMS does."""
    place, detector, images, targets = on_gpu("mask_rcnn")
    for mode in ("default", "warn"):
        torch.cuda.set_sync_debug_mode(mode)
        with warnings.catch_warnings(record=True) as caught, place.autocast():
            warnings.simplefilter("always")
            losses = detector(images, targets)
            sum(losses.values()).backward()
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    assert len(waits) <= 5 * len(images), [(w.filename, w.lineno) for w in waits]
    assert all("torchvision" in w.filename or "_ops.py" in w.filename for w in waits), [
        (w.filename, w.lineno) for w in waits
    ]


@pytest.mark.parametrize("head", HEADS)
def test_precisions_agree(head, monkeypatch):
    """Oracle: the losses in float32, from the same proposals. float16 and bfloat16 agree within 2 %; batch norm's
    statistics are fixed, as in tests/test_step.py."""
    results = {}
    for amp in ("off", "fp16", "bf16"):
        place, detector, images, targets = on_gpu(head, amp)
        detector = fixed_statistics(detector)
        near = targets["boxes"].repeat(1, 6, 1)
        near = near + 16 * torch.rand(near.shape, generator=torch.Generator().manual_seed(0)).to(near.device)
        monkeypatch.setattr(heads, "propose", lambda *inputs, near=near: list(near.clamp(0, 256)))
        with place.autocast():
            results[amp] = {name: value.item() for name, value in detector(images, targets).items()}
    for amp in ("fp16", "bf16"):
        assert results[amp] == pytest.approx(results["off"], rel=0.02)


def test_one_host_read_per_step():
    """Oracle: set_sync_debug_mode's warnings in a whole step: one for the losses, and GradScaler's own."""
    place, detector, images, targets = on_gpu("retinanet", "fp16")
    batch = {"image": images, "region": torch.full((2, 2), 256.0, device=images.device)} | targets
    optimizer, scaler = make_optimizer(detector), torch.amp.GradScaler("cuda")
    recipe = {"seed": 0, "clip": 10.0}
    for mode in ("default", "warn"):
        torch.cuda.set_sync_debug_mode(mode)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_step(*train_step(detector, [batch], recipe, optimizer, scaler, 0.01, place, 0), False, place)
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    own = [w for w in waits if "grad_scaler" not in w.filename]
    assert len(own) == 1, [(w.filename, w.lineno) for w in waits]
