"""How fast is a training step, and what does it keep in memory? Every row of the paper's tables.

python tools/bench_step.py                          time and peak memory of a step, beside torchvision's detectors
python tools/bench_step.py --memory                 what a step needs by account, on no device at all

On a GPU the rows run at their own size; on a CPU at 256, to finish. Data is not part of it: see bench_data.py.
"""

import argparse
import contextlib
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import detection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import heads  # noqa: E402
import loss  # noqa: E402
import train  # noqa: E402
from evaluate import start  # noqa: E402
from model import HEADS, build_model  # noqa: E402

ROWS = (  # head, arch, size, images on one 32 GB GPU in float32 of an earlier re-implementation, as divisors of 32
    ("retinanet", "49S", 640, 32),
    ("retinanet", "49", 640, 16),
    ("retinanet", "49", 896, 8),
    ("retinanet", "96", 1024, 8),
    ("retinanet", "143", 1280, 2),
    ("retinanet", "190", 1280, 1),
    ("mask_rcnn", "49S", 640, 16),
    ("mask_rcnn", "49", 640, 16),
    ("mask_rcnn", "96", 1024, 4),
    ("mask_rcnn", "143", 1280, 2),
    ("mask_rcnn", "190", 1536, 1),
)
CLASSES = 80
PER_PARAMETER = 16  # bytes: weight, gradient, momentum and, rounded up, the half-precision copy
# Of the class or mask logits in float32, at the start of backward: what the losses recompute, and gradients. With 7 the
# account is a GPU's peaks within 9 % (docs/RESULTS.md).
LOGIT_COPIES = {"retinanet": 7, "mask_rcnn": 3}
SHARE = 14 / 16  # of a device's memory that is planned with


def objects_of(images, size, device, masks):
    """Targets of 100 objects in every image: as many as there can be."""
    corners = torch.rand(images, 100, 2, device=device) * (size - 64)
    targets = {
        "boxes": torch.cat((corners, corners + 64), dim=2),
        "labels": torch.zeros(images, 100, dtype=torch.int64, device=device),
        "noise": torch.arange(images, device=device),
    }
    if masks:
        targets["masks"] = torch.ones(images, 100, 112, 112, dtype=torch.uint8, device=device)
    return targets


def saved_bytes(detector, images, size, masks, amp):
    """Bytes of the tensors that one forward of so many images saves for backward, parameters left out.

    Fake tensors have shapes and no memory. The number of proposals depends on the data: it is set to its maximum.
    """
    storages, propose = {}, heads.propose
    own = {value.untyped_storage()._cdata for value in (*detector.parameters(), *detector.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # kept, so that its address is not given to another
        return tensor

    heads.make_anchors.cache_clear()  # which must not mix fake anchors with real ones
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            heads.propose = lambda *inputs: [torch.zeros(heads.MAX_PROPOSALS, 4)] * images
            batch = torch.zeros(images, 3, size, size, dtype=torch.uint8)
            targets = objects_of(images, size, "cpu", masks)
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=amp),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            ):
                losses = detector(batch, targets)
                del losses
        return sum(storage.nbytes() for storage in storages.values())
    finally:
        heads.propose = propose
        heads.make_anchors.cache_clear()


def account(head, arch, size, activation="relu", amp=True):
    """(bytes a step needs for each image, bytes it needs whatever their number), by account.

    The first: what is saved for backward, and LOGIT_COPIES of the class logits (for Mask R-CNN, the mask logits).
    """
    detector = build_model(arch, head, CLASSES, activation=activation).train()
    one, two = (saved_bytes(detector, images, size, detector.masks, amp) for images in (1, 2))
    if detector.masks:
        logits = loss.MASK_ROIS * (CLASSES + 1) * loss.MASK_TARGET_SIDE**2
    else:
        logits = len(heads.make_anchors((size, size), detector.anchor_size)) * CLASSES
    parameters = sum(p.numel() for p in detector.parameters())
    return two - one + LOGIT_COPIES[head] * 4 * logits, PER_PARAMETER * parameters


def memory(rows, activations):
    print("by account under autocast: GB, and the images that fit 14 GB of 16 and 28 of 32, beside train.FITS there")
    print(f"{'':>20} {'':>6} {'fixed':>6} {'each':>6} | {'16 GB':>6} {'FITS':>5} | {'32 GB':>6} {'FITS':>5}")
    for head, arch, size, _ in rows:
        for activation in activations:
            each, fixed = account(head, arch, size, activation)
            cells = []
            for capacity in (16, 32):
                fits = int((SHARE * capacity * 1e9 - fixed) / each)
                planned = train.FITS[arch][HEADS[head].masks] * capacity / 16 * (640 / size) ** 2
                planned /= train.SWISH if activation == "swish" else 1
                cells.append(f"{fits:6d} {int(planned):5d}")
            name = f"{head} {arch}@{size}"
            print(f"{name:>20} {activation:>6} {fixed / 1e9:6.2f} {each / 1e9:6.3f} | " + " | ".join(cells), flush=True)


class Clock:
    """Seconds by name, with the device's work included."""

    def __init__(self, device):
        self.device, self.seconds = device, defaultdict(float)

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name, function):
        def wrapper(*args, **kwargs):
            began = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += self.now() - began

        return wrapper


LOSSES = ("retinanet_loss", "sample_rois", "rpn_loss", "box_head_loss", "mask_loss")


def split(step, place, rounds):
    """Milliseconds of (forward, loss, backward, optimizer) in `step`, each waited for.

    `step` takes a function that wraps its parts by name.
    """
    clock = Clock(place.device)
    originals = {name: getattr(loss, name) for name in LOSSES}
    try:
        for name, function in originals.items():
            setattr(loss, name, clock.timed("loss", function))
        for _ in range(rounds):
            step(clock.timed)
    finally:
        for name, function in originals.items():
            setattr(loss, name, function)
    seconds = clock.seconds
    seconds["forward"] -= seconds["loss"]
    return [1000 * seconds[part] / rounds for part in ("forward", "loss", "backward", "optimizer")]


def ours(head, arch, size, images, place):
    """A function that does one training step of this project's, on the same batch again and again."""
    detector = place.move(build_model(arch, head, CLASSES).train())
    batch = place.move(torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8))
    targets = objects_of(images, size, place.device, detector.masks)
    return stepper(detector, lambda: detector(batch, targets), place)


def torchvisions(head, size, images, place):
    """The same of torchvision's ResNet-50 FPN v2 detector of that kind."""
    make = {"retinanet": detection.retinanet_resnet50_fpn_v2, "mask_rcnn": detection.maskrcnn_resnet50_fpn_v2}[head]
    detector = make(weights=None, weights_backbone=None, num_classes=CLASSES, min_size=size, max_size=size)
    detector = detector.to(place.device).train()
    batch = list(torch.rand(images, 3, size, size, device=place.device))
    targets = objects_of(images, size, place.device, False)
    rows = [{"boxes": b, "labels": k + 1} for b, k in zip(targets["boxes"], targets["labels"])]
    if head == "mask_rcnn":
        full = torch.ones(100, size, size, dtype=torch.uint8, device=place.device)
        rows = [row | {"masks": full} for row in rows]
    return stepper(detector, lambda: detector(batch, rows), place)


def stepper(detector, forward, place):
    optimizer = train.make_optimizer(detector)
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.amp is torch.float16)

    def update():
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()

    def step(timed=lambda name, function: function):
        optimizer.zero_grad(set_to_none=True)
        with place.autocast():
            losses = timed("forward", forward)()
        timed("backward", scaler.scale(sum(losses.values())).backward)()
        timed("optimizer", update)()

    return step


def measure(name, step, images, place, rounds):
    """Print one row: images per second without waiting inside, the split with it, peak memory, TFLOP/s."""
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with FlopCounterMode(display=False) as counter:  # the first step, which warms up
        step()
    step()
    clock = Clock(place.device)
    began = clock.now()
    for _ in range(rounds):
        step()
    seconds = (clock.now() - began) / rounds
    parts = split(step, place, rounds)
    if place.device.type == "cuda":
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:6.1f}"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = "     -"  # where the system doesn't say
        with contextlib.suppress(ImportError):
            import resource  # not on Windows

            peak = f"<{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:5.1f}"  # of all rows so far
    tflops = counter.get_total_flops() / seconds / 1e12
    shares = " ".join(f"{part:8.0f}" for part in parts)
    print(f"{name:>34} {images:4d} {images / seconds:9.2f} {shares} {peak} {tflops:8.3f}", flush=True)


def run(rows, args, place):
    torch.manual_seed(0)
    cuda = place.device.type == "cuda"
    kind = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{kind}, torch {torch.__version__}, {place.amp or torch.float32}; milliseconds of the parts "
        "(torchvision's losses are in its forward), GB, TFLOP/s"
    )
    print(
        f"{'':>34} {'B':>4} {'images/s':>9} {'forward':>8} {'loss':>8} {'backward':>8} {'update':>8} {'memory':>6} "
        "TFLOP/s"
    )
    for head, arch, full_size, full_batch in rows:
        size, images = args.size or (full_size if cuda else 256), args.batch or (full_batch if cuda else 2)
        name = f"{head} {arch}@{size}"
        makers = {name: lambda: ours(head, arch, size, images, place)}  # noqa: B023
        makers[f"torchvision's with ResNet-50@{size}"] = lambda: torchvisions(head, size, images, place)  # noqa: B023
        for what, make in makers.items():
            try:
                measure(what, make(), images, place, args.rounds)
            except torch.OutOfMemoryError:
                print(f"{what:>34} {images:4d} does not fit", flush=True)
            if cuda:
                torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description="Measure a training step of every row, or account for its memory.")
    parser.add_argument("--memory", action="store_true", help="account for the memory instead")
    parser.add_argument("--rows", nargs="*", default=[""], help="only rows whose name contains one of these")
    parser.add_argument("--size", type=int, help="instead of the row's")
    parser.add_argument("--batch", type=int, help="images, instead of the row's")
    parser.add_argument("--rounds", type=int, default=None, help="steps per figure (default 10, on a CPU 2)")
    parser.add_argument("--activations", nargs="*", default=["relu", "swish"], choices=["relu", "swish"])
    parser.add_argument("--memory-limit", type=float, metavar="GB", help="of the CUDA device")
    parser.add_argument("--amp", default="auto", choices=("auto", "off", "fp16", "bf16"))
    parser.add_argument("--device", choices=("cuda", "cpu"))
    args = parser.parse_args()
    rows = [row for row in ROWS if any(part in f"{row[0]} {row[1]}@{row[2]}" for part in args.rows)]
    if args.memory:
        memory(rows, args.activations)
        return
    place = start(args.device, args.amp)
    if args.memory_limit:
        capacity = torch.cuda.get_device_properties(place.device).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory_limit * 1e9 / capacity)
    args.rounds = args.rounds or (10 if place.device.type == "cuda" else 2)
    run(rows, args, place)


if __name__ == "__main__":
    main()
