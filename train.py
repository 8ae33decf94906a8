"""What is the recipe, and the loop? Protocols, learning rate, checkpoints, one loop for 1 CPU to N GPUs.

Read on to `fit`: the tables of the recipe, the learning rate, one optimizer step, and the loop. What these stand on
follows, to be looked up: checkpoints and log, how arguments become a recipe, what comes before the first step.

Dimensions: B images of a micro-batch on one rank; an optimizer step sees ranks x B x accumulation images.

    python train.py --arch tiny --size 128 --protocol toy --data shapes
    torchrun --nproc_per_node 8 train.py --arch 49 --size 640 --protocol B
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from blocks import BN_MOMENTUM
from data import (
    TRAIN,
    VAL,
    Annotations,
    TrainSet,
    UserError,
    collate,
    load_annotations,
    make_folder,
    make_loader,
    micro_batches,
    one_sentence,
    require_split,
    resolve_root,
    split_paths,
)
from evaluate import AMP, Place, evaluate, finish, first_of_machine_first, load_checkpoint, start, write_grid
from loss import MASK_ROIS, ROIS
from model import ARCHS, HEADS, MULTIPLE, build_model, check_size


@dataclass(frozen=True)
class Protocol:
    """One training recipe (paper section 5.1 and its tables' captions; authors' yaml files)."""

    jitter: tuple  # scale jitter: the range of the scale
    epochs: int
    activation: str = "relu"
    drop_path: float = 0.0  # stochastic depth at the last block
    drop_rate: float = 0.0  # DropBlock. Departure: the paper names it for A and gives no number
    batch_size: int = 256  # global: over all devices and accumulation steps
    lr: float = 0.28  # per 256 images
    clip: float = 10.0  # global norm of the gradient
    rois: int = ROIS  # Mask R-CNN: regions of interest per image
    mask_rois: int = MASK_ROIS  # and how many of them may be foreground, the ones that get masks
    flip: bool = True
    bn_momentum: float = BN_MOMENTUM
    eval_every: int = 10  # epochs


PROTOCOLS = {
    "A": Protocol((0.8, 1.2), 250, drop_rate=0.1),
    "B": Protocol((0.5, 2.0), 350),
    "C": Protocol((0.5, 2.0), 500, activation="swish", drop_path=0.2),
    # Not in the paper: for shapes on a CPU.
    "toy": Protocol((0.8, 1.2), 26, batch_size=16, lr=1.2, rois=64, mask_rois=16, eval_every=13),
}
# What a head changes in every protocol (authors' yaml files): Mask R-CNN's gradient is not clipped.
HEAD_FIELDS = {"retinanet": {}, "mask_rcnn": dict(clip=math.inf)}
# What the authors' yaml files change for one arch, by (protocol, arch, head).
EXCEPTIONS = {
    ("C", "143", "retinanet"): dict(jitter=(0.1, 1.9), drop_path=0.16),
    ("C", "190", "retinanet"): dict(jitter=(0.1, 1.9), epochs=400, lr=0.3),
    ("C", "190", "mask_rcnn"): dict(jitter=(0.1, 2.0), epochs=400),
    ("toy", "tiny", "mask_rcnn"): dict(epochs=16, eval_every=8),  # not in the paper: a step takes longer
}
# What --overfit changes in any protocol. In few steps a momentum of 0.01 does not forget batch norm's initial variance.
OVERFIT = dict(jitter=(1.0, 1.0), flip=False, epochs=400, eval_every=100, bn_momentum=0.1)

MOMENTUM, WEIGHT_DECAY = 0.9, 4e-5
WARMUP_LR, WARMUP_STEPS = 0.0067, 2000  # both for a batch of 256
LR_BATCH = 256
DROPS = (30, 10)  # epochs before the end at which the learning rate is divided by 10
# Departure, for runs that the paper has not: under 60 epochs the drops are shares of the run, and the warm-up is at
# most a tenth of any run.
SHORT_RUN, SHORT_DROPS, LONGEST_WARMUP = 60, (11 / 12, 35 / 36), 1 / 10

RECOMPUTE = (0, 2, 7)  # --recompute: keep all activations; recompute the stem's level; recompute every block group
# What a step needs under autocast with ReLU, in GB: whatever the images (16 bytes per parameter), and for each image of
# this size with --recompute 0, 2, 7. By account, not by measurement: tests/bench_step.py --memory. Other sizes scale by
# area. Swish keeps its inputs, DropBlock its masks: with either, an image needs at most SWISH times as much.
MEMORY = {  # (head, arch): (size, fixed, (per image))
    ("retinanet", "49S"): (640, 0.18, (0.415, 0.320, 0.284)),
    ("retinanet", "49"): (640, 0.45, (0.589, 0.460, 0.405)),
    ("retinanet", "96"): (1024, 0.68, (2.018, 1.386, 1.037)),
    ("retinanet", "143"): (1280, 1.07, (4.129, 2.671, 1.799)),
    ("retinanet", "190"): (1280, 2.61, (6.870, 4.411, 2.859)),
    ("retinanet", "tiny"): (640, 0.03, (0.235, 0.179, 0.165)),
    ("mask_rcnn", "49S"): (640, 0.22, (0.585, 0.490, 0.454)),
    ("mask_rcnn", "49"): (640, 0.65, (0.901, 0.772, 0.717)),
    ("mask_rcnn", "96"): (1024, 0.88, (2.112, 1.480, 1.130)),
    ("mask_rcnn", "143"): (1280, 1.27, (4.022, 2.564, 1.692)),
    ("mask_rcnn", "190"): (1536, 2.82, (9.473, 5.932, 3.696)),
    ("mask_rcnn", "tiny"): (640, 0.03, (0.291, 0.234, 0.221)),
}
SWISH = 1.46
PLANNED = 14 / 16  # of a device's memory: the rest is for what the account leaves out
SAVE_SECONDS = 15 * 60
PRINT_EVERY = 50  # steps
MAX_WAITING = 0.2  # share of the time that may be spent on waiting for data without a warning


def schedule(epochs, steps_per_epoch, batch_size, lr):
    """(peak, warm-up's first rate, warm-up's steps, step of the first drop, step of the second, all steps)."""
    scale, total = batch_size / LR_BATCH, epochs * steps_per_epoch
    warmup = min(WARMUP_STEPS / scale, total * LONGEST_WARMUP)
    if epochs < SHORT_RUN:
        first, second = (math.ceil(total * share) for share in SHORT_DROPS)
    else:
        first, second = ((epochs - before) * steps_per_epoch for before in DROPS)
    return lr * scale, WARMUP_LR * scale, warmup, first, second, total


def lr_at(step, epochs, steps_per_epoch, batch_size=LR_BATCH, lr=Protocol.lr):
    """The learning rate of a step, a pure function: linear warm-up, then the peak, a tenth, a hundredth of it.

    `lr` is per 256 images; the peak is lr * batch_size / 256. Source: paper section 5.1; authors' yaml files.
    """
    peak, start, warmup, first, second, _ = schedule(epochs, steps_per_epoch, batch_size, lr)
    if step < warmup:
        return start + (step / warmup) * (peak - start)
    return peak if step < first else peak / 10 if step < second else peak / 100


def make_optimizer(model):
    """SGD with momentum; decay on the weights of convolutions and linear layers only, not on biases and batch norm."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM)


def make_scaler(place):
    """The gradient scaler of float16; switched off in any other precision."""
    return torch.amp.GradScaler(place.device.type, enabled=place.amp is torch.float16)


def train_step(model, batches, accumulate, optimizer, scaler, lr, clip, place, noise_key=(0, 0)):
    """One optimizer step: {name: 0-dim tensor} of the rank's mean losses, and the gradient's norm before clipping.

    The first `accumulate` micro-batches of the iterable `batches` are used and their losses averaged. noise_key is
    (seed, step): from it, the micro-step and the rank, stochastic depth and DropBlock draw. Nothing is read back
    from the device but by GradScaler.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    means = {}
    for t, batch in enumerate(itertools.islice(batches, accumulate)):
        torch.manual_seed(int(np.random.SeedSequence((*noise_key, t, place.rank)).generate_state(1)[0]))
        targets = {k: v.to(place.device, non_blocking=True) for k, v in batch.items() if k != "image"}
        last = t == accumulate - 1
        with contextlib.nullcontext() if last or place.world == 1 else model.no_sync():
            with place.autocast():
                losses = model(place.move(batch["image"]), targets, targets["region"])
            scaler.scale(sum(losses.values()) / accumulate).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach() / accumulate
    scaler.unscale_(optimizer)
    # Departure: the authors' clipped gradient contains weight decay's; SGD adds it after the clipping here.
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    return means, norm


def read_step(means, norm, stop, place):
    """The step's one host read: ({name: loss, mean over the ranks}, gradient norm, whether any rank asks to stop)."""
    values = torch.stack([*means.values(), torch.full_like(norm, float(stop))])
    if place.world > 1:
        dist.all_reduce(values)
    *losses, stop, norm = torch.cat((values / place.world, norm[None])).tolist()
    return dict(zip(means, losses)), norm, stop > 0


# The loop.


@dataclass
class Run:
    """The parts of one training run; `model` is `detector`, wrapped where there are several ranks."""

    recipe: dict
    place: Place
    out: Path
    workers: int
    train: Annotations
    val: Annotations
    detector: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    state: dict  # step, evaluated (the step of the last evaluation), best (AP), skipped (fp16 overflows)
    tensorboard: bool = False

    @property
    def samples(self):
        """The training samples, by their numbers."""
        return TrainSet(self.train, *(self.recipe[name] for name in ("size", "jitter", "flip", "seed")))

    @property
    def steps_per_epoch(self):
        return math.ceil(len(self.train.ids) / self.recipe["batch_size"])

    @property
    def accumulate(self):
        """Micro-steps per optimizer step."""
        return self.recipe["batch_size"] // self.recipe["micro_batch"] // self.recipe["devices"]


def fit(run):
    """The loop: from the run's step to the last, or until a signal asks to stop. Returns whether it came to the end.

    last.pt is written at every epoch, before and after every evaluation, and at least every 15 minutes.
    """
    recipe, place, state = run.recipe, run.place, run.state
    batch_size, per_epoch, seed = recipe["batch_size"], run.steps_per_epoch, recipe["seed"]
    total = recipe["epochs"] * per_epoch
    order = micro_batches(state["step"], total, batch_size, recipe["micro_batch"], place.rank, place.world)
    waits = []
    batches = timed(iter(make_loader(run.samples, order, run.workers, place.device.type == "cuda")), waits)
    log = Log(run.out / "log.jsonl", place, state, run.tensorboard)
    stop, saved = Stop(), time.monotonic()
    report = Report(run, total)
    run.model.train()
    while True:
        step = state["step"]
        due = step == total or (step > 0 and step % (per_epoch * recipe["eval_every"]) == 0)
        if due and state["evaluated"] < step:
            evaluate_now(run, log)
        if step == total:
            return True

        began = time.perf_counter()
        waits.clear()
        lr = lr_at(step, recipe["epochs"], per_epoch, batch_size, recipe["lr"])
        means, norm = train_step(
            run.model, batches, run.accumulate, run.optimizer, run.scaler, lr, recipe["clip"], place, (seed, step)
        )
        losses, norm, asked = read_step(means, norm, stop.asked, place)
        refuse_divergence(run, losses, norm, lr)

        state["step"] += 1
        state["skipped"] += not math.isfinite(norm)
        row = {"step": state["step"], "epoch": state["step"] / per_epoch, "lr": lr, "loss": sum(losses.values())}
        row |= losses | {"seconds": time.perf_counter() - began, "waited": sum(waits), "skipped": state["skipped"]}
        row["grad_norm"] = norm if math.isfinite(norm) else None
        log.write(row)
        report.step(row)
        if asked or state["step"] % per_epoch == 0 or time.monotonic() - saved > SAVE_SECONDS:
            save_as(run, "last.pt")
            saved = time.monotonic()
        if asked:
            return False


def evaluate_now(run, log):
    """Evaluate, log, write the picture grid, and keep the best weights in best.pt."""
    if run.place.world > 1:  # without SyncBN (on CPUs) every rank has statistics of its own: rank 0's are the model's
        for buffer in run.detector.buffers():
            dist.broadcast(buffer, 0)
    size, step = run.recipe["size"], run.state["step"]
    metrics = evaluate(run.detector, run.val, size, run.place, run.recipe["micro_batch"], run.workers, out=run.out)
    log.write({"eval_step": step, "epoch": step / run.steps_per_epoch} | metrics)
    if run.place.rank == 0:
        write_grid(run.detector, run.val, size, run.place, run.out / "grid.png")
        log.show(run.out / "grid.png", step)
    run.state["evaluated"] = step
    if metrics["AP"] > run.state["best"]:
        run.state["best"] = metrics["AP"]
        save_as(run, "best.pt")
    save_as(run, "last.pt")


def save_as(run, name):
    """Rank 0 writes the run's checkpoint: plain types and tensors, names without wrappers."""
    if run.place.rank == 0:
        parts = {"model": run.detector, "optimizer": run.optimizer, "scaler": run.scaler}
        checkpoint = {key: part.state_dict() for key, part in parts.items()}
        categories = [list(category) for category in run.train.categories]
        save(run.out / name, checkpoint | run.state | {"recipe": run.recipe, "categories": categories})


def refuse_divergence(run, losses, norm, lr):
    """End every rank at a step whose loss (or, without GradScaler, gradient) is not finite."""
    finite = all(map(math.isfinite, losses.values()))
    if finite and (math.isfinite(norm) or run.scaler.is_enabled()):
        return
    if run.place.rank > 0:
        raise SystemExit(1)
    step, batch_size = run.state["step"], run.recipe["batch_size"]
    images = [run.samples.image_of(n)[1] for n in range(step * batch_size, (step + 1) * batch_size)]
    before = f"; {run.out}/last.pt is from before" if (run.out / "last.pt").exists() else ""
    terms = ", ".join(f"{name} loss {value:.4g}" for name, value in losses.items())
    raise SystemExit(
        f"error: training diverged at step {step + 1}: {terms}, gradient norm {norm:.4g}, learning rate {lr:.4g}, "
        f"image ids {run.train.ids[images].tolist()}; try a lower --lr, or look for broken boxes with "
        f"data.py --data FOLDER --show 8{before}"
    )


# What the loop stands on: checkpoints, the log, signals, progress.


def save(path, checkpoint):
    """Write a checkpoint so that at every moment `path` is whole: the old one or the new one."""
    draft = path.with_suffix(".tmp")
    try:
        with open(draft, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        draft.unlink(missing_ok=True)
        raise UserError(
            f"could not write {path} ({error}); what it held before is intact: make room and --resume"
        ) from None


class Log:
    """log.jsonl, written by rank 0: {"step": n, ...} after the n-th step, {"eval_step": n, ...} after an evaluation.

    A resumed run first drops the lines that it is going to write again.
    """

    def __init__(self, path, place, state, tensorboard=False):
        self.file = self.board = None
        if place.rank > 0:
            return
        old = path.read_text().splitlines() if state["step"] and path.exists() else []
        kept = []
        for line in old:
            with contextlib.suppress(ValueError):  # a kill can cut the last line
                row = json.loads(line)
                if row.get("step", 0) <= state["step"] and row.get("eval_step", 0) <= state["evaluated"]:
                    kept.append(line + "\n")
        draft = path.with_suffix(".tmp")
        draft.write_text("".join(kept))
        os.replace(draft, path)
        self.file = open(path, "a", buffering=1)
        if tensorboard:
            self.board = tensorboard_writer()(path.parent, purge_step=state["step"] + 1)

    def write(self, row):
        if self.file:
            self.file.write(json.dumps(row) + "\n")
        if self.board:
            kind, step = ("train", row["step"]) if "step" in row else ("eval", row["eval_step"])
            for name in row.keys() - {"step", "eval_step"}:
                if isinstance(row[name], (int, float)):
                    self.board.add_scalar(f"{kind}/{name}", row[name], step)

    def show(self, path, step):
        """A picture from a file, for tensorboard."""
        if self.board:
            self.board.add_image("detections", np.asarray(Image.open(path)), step, dataformats="HWC")
            self.board.flush()


def tensorboard_writer():
    """torch's SummaryWriter, which needs a package that nothing else here does; else a UserError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package more: pip install tensorboard, or leave the flag out") from None
    return SummaryWriter


class Stop:
    """`asked` once SIGTERM or the first Ctrl-C has come; a second Ctrl-C ends the process at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def timed(batches, waits):
    """The same batches; the seconds that each was waited for are added to the list `waits`."""
    while True:
        began = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - began)
        yield batch


class Report:
    """Rank 0's progress: a bar on a terminal, else a line every PRINT_EVERY steps; a warning where data is late."""

    def __init__(self, run, total):
        self.run, self.total, self.recent = run, total, []
        self.bar = tqdm(total=total, initial=run.state["step"], disable=run.place.rank > 0 or None, smoothing=0.05)

    def step(self, row):
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{row['lr']:.3g}", refresh=False)
        self.bar.update()
        self.recent = [*self.recent[-PRINT_EVERY + 1 :], row]
        if row["step"] % PRINT_EVERY or self.run.place.rank > 0:
            return
        seconds, waited = (sum(r[name] for r in self.recent) for name in ("seconds", "waited"))
        speed = len(self.recent) * self.run.recipe["batch_size"] / seconds
        if self.bar.disable:
            loss = f"loss {row['loss']:.3f}, lr {row['lr']:.3g}"
            print(f"step {row['step']}/{self.total}: {loss}, {speed:.1f} images/s", flush=True)
        if waited > MAX_WAITING * seconds:
            self.bar.write(
                f"warning: {100 * waited / seconds:.0f} % of the time went on waiting for data; raise --workers (now "
                f"{self.run.workers}), or see tests/bench_data.py for what a core can do"
            )


# Arguments become a recipe.


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train SpineNet on COCO, or on anything in COCO's layout.")
    add = parser.add_argument
    add("--arch", default="49", choices=ARCHS)
    add("--size", type=int, default=640, help=f"side of the square input, a multiple of {MULTIPLE} (default 640)")
    add("--protocol", default="B", choices=PROTOCOLS, help="the recipe's row; the flags below change one field of it")
    add("--head", default="retinanet", choices=HEADS)
    add("--data", default="data/coco", help="a folder in COCO's layout, or `shapes` (default data/coco)")
    add("--out", type=Path, help="folder of the run (default runs/ARCH_SIZE_PROTOCOL_HEAD)")
    add("--batch-size", type=int, help="global batch: images per optimizer step over all devices")
    add("--micro-batch", type=int, help="images per device at once; divides batch size / devices")
    add("--epochs", type=int)
    add("--lr", type=float, help="learning rate per 256 images of the global batch")
    add("--jitter", type=float, nargs=2, metavar=("LOW", "HIGH"), help="scale jitter's range")
    add("--eval-every", type=int, help="epochs between evaluations")
    share = min(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 8)
    add("--workers", type=int, default=share, help="data processes per device (default: its share of the cores, to 8)")
    add("--seed", type=int, default=0)
    add("--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one, else cpu")
    add("--amp", choices=AMP, default="auto", help="auto: by compute capability, off on a CPU")
    recompute = "save memory: compute blocks up to this level again in backward; 2 is cheap, 7 saves most"
    add("--recompute", type=int, default=0, choices=RECOMPUTE, metavar="LEVEL", help=recompute)
    add("--compile", action="store_true", help="torch.compile the model")
    add("--tensorboard", action="store_true", help="write curves and pictures for tensorboard into --out, too")
    add("--resume", nargs="?", const="", metavar="FILE", help="go on where a run stopped (default OUT/last.pt)")
    add("--weights", type=Path, help="start from a checkpoint's weights: what fits is taken, the rest is new")
    add("--overfit", type=int, metavar="N", help="train and evaluate on the first N images with objects, as they are")
    add("--limit", type=int, metavar="N", help="the first N images of every split")
    return parser.parse_args(argv)


def resolve(args):
    """The recipe as a plain dict: the protocol's row, the head's, their exception for an arch, --overfit, the flags."""
    fields = dataclasses.asdict(PROTOCOLS[args.protocol])
    fields |= HEAD_FIELDS[args.head] | EXCEPTIONS.get((args.protocol, args.arch, args.head), {})
    if args.overfit:
        fields |= OVERFIT | {"batch_size": args.overfit}
    # A recipe has no fields that only another head knows, such as RoI counts.
    others = {name for head in HEADS.values() for name in head.options} - set(HEADS[args.head].options)
    fields = {name: value for name, value in fields.items() if name not in others}
    flags = ("batch_size", "epochs", "lr", "jitter", "eval_every")
    fields |= {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    kept = ("arch", "size", "protocol", "head", "seed", "overfit", "limit")
    recipe = {name: getattr(args, name) for name in kept} | fields | {"jitter": list(fields["jitter"])}
    for name, low in (("overfit", 1), ("limit", 1), ("seed", 0), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name} is {value}, but must be at least {low}")
    for name in ("size", "batch_size", "epochs", "lr", "eval_every"):
        if not recipe[name] > 0:
            raise UserError(f"--{name.replace('_', '-')} is {recipe[name]}, but must be positive")
    if not 0 < recipe["jitter"][0] <= recipe["jitter"][1] < math.inf:
        raise UserError(f"--jitter {recipe['jitter']}: give LOW and HIGH with 0 < LOW <= HIGH")
    try:
        check_size(recipe["size"], recipe["size"])
    except ValueError as error:
        raise UserError(f"--size: {error}") from None
    return recipe


def split_batch(recipe, micro_batch, recompute, place):
    """Images per micro-batch of one rank; what doesn't divide is refused. Departure: batch norm sees devices x this."""
    share, rest = divmod(recipe["batch_size"], place.world)
    if rest:
        raise UserError(f"--batch-size {recipe['batch_size']} doesn't divide into {place.world} devices")
    if micro_batch is None:
        size, fixed, each = MEMORY[recipe["head"], recipe["arch"]]
        each = each[RECOMPUTE.index(recompute)] * (recipe["size"] / size) ** 2 * (1 if place.amp else 2)
        each *= SWISH if recipe["activation"] == "swish" or recipe["drop_rate"] else 1
        fits = max(int((PLANNED * place.memory() - fixed) / each), 1)
        micro_batch = max(m for m in range(1, min(share, fits) + 1) if share % m == 0)
    if micro_batch <= 0 or share % micro_batch:
        raise UserError(f"--micro-batch {micro_batch} must divide {share}, which is --batch-size / devices")
    synchronized = place.world if place.device.type == "cuda" else 1
    if (recipe["size"] // MULTIPLE) ** 2 * micro_batch * synchronized == 1:
        raise UserError(
            f"--size {recipe['size']} with --micro-batch 1 leaves batch norm a single value per channel on P7; use a "
            "micro-batch of 2 or a larger size"
        )
    return micro_batch


# Before the first step.


def check_quickly(args):
    """What can be refused before anything slow: (recipe, out, path to resume from, its checkpoint)."""
    recipe = resolve(args)
    out = args.out or Path("runs") / f"{args.arch}_{args.size}_{args.protocol}_{args.head}"
    if args.tensorboard:
        tensorboard_writer()
    if args.resume is not None and args.weights:
        raise UserError("--resume goes on with its own weights: leave out --weights")
    resume = None if args.resume is None else Path(args.resume or out / "last.pt")
    if (out / "last.pt").exists() and not (resume and resume.parent.resolve() == out.resolve()):
        raise UserError(f"{out} already holds a run: continue that one with --resume, or give another --out")
    if args.data != "shapes":
        require_split(args.data, TRAIN)
    return recipe, out, resume, load_checkpoint(resume) if resume else None


@contextlib.contextmanager
def said_once():
    """A UserError that all processes of a machine find is said by the first of them."""
    try:
        yield
    except UserError:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            time.sleep(5)  # torchrun ends all processes at the first one's end
            raise SystemExit(2) from None
        raise


def load_splits(args, recipe, place):
    """(annotations to train on, annotations to evaluate on)."""
    root, masks = resolve_root(args.data), HEADS[recipe["head"]].masks
    train = load_annotations(root, TRAIN, masks).select(slice(recipe["limit"]))
    if recipe["overfit"]:
        chosen = np.flatnonzero(train.positives())[: recipe["overfit"]]
        if len(chosen) < recipe["overfit"]:
            raise UserError(f"--overfit {recipe['overfit']}: only {len(chosen)} images of {root} have an object")
        train = train.select(chosen)
        return train, train
    val_json = split_paths(root, VAL)[0]
    if not val_json.exists():
        if place.rank == 0:
            print(f"{val_json} not found: evaluating on {TRAIN}")
        return train, train
    val = load_annotations(root, VAL, masks)
    if val.categories != train.categories:
        raise UserError(f"{root}: {TRAIN} and {VAL} have different categories; export them again together")
    return train, val.select(slice(recipe["limit"]))


def load_weights(detector, path, categories):
    """Take from a checkpoint every tensor whose name and shape fit; the class layers only if the classes agree."""
    checkpoint = load_checkpoint(path)
    own, given = detector.state_dict(), checkpoint["model"]
    if [tuple(c) for c in checkpoint["categories"]] != categories:
        given = {name: value for name, value in given.items() if not name.startswith(detector.class_layers)}
    fits = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    new = [name for name in own if name not in fits]
    if not any(value.ndim > 1 for value in fits.values()):
        arch = checkpoint["recipe"]["arch"]
        raise UserError(
            f"--weights {path}: it has arch {arch}, and no layer of it fits this model; choose --arch {arch}"
        )
    detector.load_state_dict(fits, strict=False)
    more = f" and {len(new) - 8} more" if len(new) > 8 else ""
    return f"weights: {len(fits)} of {len(own)} tensors from {path}; new: {new[:8]}{more}"


def check_resume(checkpoint, recipe, categories, steps, path, rank):
    """Refuse to resume as another model; say which other fields of the recipe have changed."""
    old = checkpoint["recipe"] | {"classes": [list(c) for c in checkpoint["categories"]]}
    new = recipe | {"classes": [list(c) for c in categories]}
    for name in ("arch", "size", "head", "classes"):
        if old[name] != new[name]:
            was = "" if name == "classes" else f" ({old[name]}, not {new[name]})"
            raise UserError(f"--resume {path}: the checkpoint's {name} differs{was}; use --weights to start from it")
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in recipe if old.get(name) != new[name]]
    if checkpoint["step"] > steps:
        raise UserError(f"--resume {path}: it has {checkpoint['step']} steps behind it, and this recipe only {steps}")
    if changed and rank == 0:
        print(f"resuming with a changed recipe: {', '.join(changed)}")


def prepare(args):
    """Everything before the first step: a Run, new or resumed."""
    with said_once():
        recipe, out, resume, checkpoint = check_quickly(args)
    place = start(args.device, args.amp)
    with said_once():
        recipe |= {"micro_batch": split_batch(recipe, args.micro_batch, args.recompute, place), "devices": place.world}
    with first_of_machine_first(place):  # which writes the generated set, and the packed form of a large json
        train, val = load_splits(args, recipe, place)

    torch.manual_seed(recipe["seed"])
    options = {name: recipe[name] for name in HEADS[recipe["head"]].options}
    detector = build_model(recipe["arch"], recipe["head"], len(train.categories), **options)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = recipe["bn_momentum"]
    state = {"step": 0, "evaluated": 0, "best": -math.inf, "skipped": 0}
    with said_once():
        if checkpoint:
            steps = recipe["epochs"] * math.ceil(len(train.ids) / recipe["batch_size"])
            check_resume(checkpoint, recipe, train.categories, steps, resume, place.rank)
            detector.load_state_dict(checkpoint["model"])
            state = {name: checkpoint[name] for name in state}
        elif args.weights:
            note = load_weights(detector, args.weights, train.categories)
            if place.rank == 0:
                print(note)
    place.move(detector)
    detector.backbone.recompute = args.recompute
    if place.world > 1 and place.device.type == "cuda":
        detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    if args.compile:
        detector.compile()
    optimizer, scaler = make_optimizer(detector), make_scaler(place)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # it is empty where the run was not in float16 so far
            scaler.load_state_dict(checkpoint["scaler"])
    model = detector
    if place.world > 1:
        devices = [place.device] if place.device.type == "cuda" else None
        model = DistributedDataParallel(detector, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    parts = dict(train=train, val=val, detector=detector, model=model, optimizer=optimizer, scaler=scaler, state=state)
    return Run(recipe, place, make_folder(out), args.workers, tensorboard=args.tensorboard, **parts)


def describe(run):
    """Print everything the run is about to do."""
    recipe, place = run.recipe, run.place
    peak, first_lr, warmup, first, second, total = schedule(
        recipe["epochs"], run.steps_per_epoch, recipe["batch_size"], recipe["lr"]
    )
    precision = str(place.amp or torch.float32).removeprefix("torch.")
    parameters = sum(p.numel() for p in run.detector.parameters())
    print("recipe: " + ", ".join(f"{name} {value}" for name, value in recipe.items() if value is not None))
    print(f"train: {run.train.summary()}")
    print(f"evaluate: {'the same images' if run.val is run.train else run.val.summary()}")
    print(
        f"batch: {recipe['batch_size']} = {place.world} device(s) x {recipe['micro_batch']} images x {run.accumulate} "
        f"micro-steps on {place.device.type}, {precision}; {parameters:,} parameters"
    )
    print(
        f"learning rate: {recipe['lr']} x {recipe['batch_size']} / {LR_BATCH} = {peak:.5g}, after a warm-up from "
        f"{first_lr:.3g} over {warmup:.0f} steps; / 10 at step {first}, / 100 at {second} of {total} "
        f"({recipe['epochs']} epochs of {run.steps_per_epoch})"
    )
    resuming = f", resuming at step {run.state['step']}" if run.state["step"] else ""
    print(f"writing to {run.out}{resuming}", flush=True)


@contextlib.contextmanager
def memory_in_words(recipe, recompute, place):
    """A device without memory left becomes a UserError that says what was used and what to try."""
    try:
        yield
    except torch.OutOfMemoryError:
        micro, share = recipe["micro_batch"], recipe["batch_size"] // place.world
        smaller = max((m for m in range(1, micro) if share % m == 0), default=None)
        cures = [f"--micro-batch {smaller}"] * (micro > 1) + ["--recompute 7"] * (recompute < 7)
        peak = torch.cuda.max_memory_allocated() / 2**30
        raise UserError(
            f"--micro-batch {micro} of --size {recipe['size']} does not fit into the memory of {place.device}: "
            f"{peak:.1f} GiB were in use at most; try {', '.join([*cures, 'or a smaller --size'])}"
        ) from None


def rehearse(run):
    """Forward and backward of one micro-batch with 100 objects in every image: what doesn't fit fails now, not later.

    Leaves no trace: weights, batch norm's averages, gradients, the optimizer and the random state are as before.
    """
    recipe, place = run.recipe, run.place
    batch = collate([run.samples[0]] * recipe["micro_batch"])
    corners = torch.rand(*batch["boxes"].shape[:2], 2, generator=torch.Generator().manual_seed(0))  # (B, 100, 2)
    corners *= recipe["size"] - 64
    batch |= {"boxes": torch.cat((corners, corners + 64), dim=2), "labels": torch.zeros_like(batch["labels"])}
    images = batch.pop("image")
    batch.pop("region")  # so that the whole square counts as image
    averages = {name: value.clone() for name, value in run.detector.named_buffers()}
    # SGD makes its momenta in the first step: until then, others take their memory.
    momenta = [] if run.optimizer.state else [torch.empty_like(p) for p in run.detector.parameters()]
    run.model.train()
    devices = [place.device] if place.device.type == "cuda" else []
    alone = run.model.no_sync() if place.world > 1 else contextlib.nullcontext()
    with torch.random.fork_rng(devices), alone:
        with place.autocast():
            losses = run.model(place.move(images), {name: value.to(place.device) for name, value in batch.items()})
        run.scaler.scale(sum(losses.values())).backward()
    run.optimizer.zero_grad(set_to_none=True)
    del losses, momenta
    for name, value in run.detector.named_buffers():
        value.copy_(averages[name])


def main(argv=None):
    run = prepare(parse_args(argv))
    if run.place.rank == 0:
        describe(run)
    began = time.perf_counter()
    with memory_in_words(run.recipe, run.detector.backbone.recompute, run.place):
        if run.place.device.type == "cuda":
            rehearse(run)
        finished = fit(run)
    if run.place.rank == 0:
        how = f"best AP {run.state['best']:.3f}" if finished else "stopped as asked; go on with --resume"
        print(f"step {run.state['step']} after {(time.perf_counter() - began) / 60:.1f} minutes: {how}; {run.out}")
    finish(run.place)


if __name__ == "__main__":
    with one_sentence():
        main()
