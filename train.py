"""What is the recipe, and the loop? Protocols, learning rate, one step, one loop for 1 CPU to N GPUs.

An optimizer step sees ranks x micro-batch x accumulation images.

    python train.py --arch tiny --size 128 --protocol toy --data shapes
    torchrun --nproc_per_node 8 train.py --arch 49 --size 640 --protocol B
"""

import argparse
import contextlib
import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from blocks import BN_MOMENTUM
from data import TRAIN, VAL, TrainSet, load_annotations, make_loader, micro_batches, split_paths
from evaluate import AMP, evaluate, finish, hold, make_folder, one_process_first, one_sentence, resolve_root, start
from evaluate import write_grid
from loss import MASK_ROIS, ROIS
from model import ARCHS, HEADS, MULTIPLE, Arch, UserError, build_model, differences, load_checkpoint, load_weights

# The recipe: a dict, from these tables to the checkpoint (paper section 5.1 and its tables' captions; authors' yaml
# files). batch_size is global, over devices and accumulation steps; lr per 256 images; clip the gradient's norm;
# drop_path stochastic depth's rate at the last block; drop_rate DropBlock's (departure: the paper names it for A and
# gives no number); eval_every in epochs.
SHARED = dict(batch_size=256, lr=0.28, clip=10.0, activation="relu", drop_path=0.0, drop_rate=0.0)
SHARED |= dict(bn_momentum=BN_MOMENTUM, flip=True, eval_every=10)
PROTOCOLS = {  # jitter: the range of the scale
    "A": SHARED | dict(jitter=[0.8, 1.2], epochs=250, drop_rate=0.1),
    "B": SHARED | dict(jitter=[0.5, 2.0], epochs=350),
    "C": SHARED | dict(jitter=[0.5, 2.0], epochs=500, activation="swish", drop_path=0.2),
    "toy": SHARED | dict(jitter=[0.8, 1.2], epochs=28, batch_size=16, lr=1.8, eval_every=14),  # not in the paper
}
# What a head adds to every protocol (authors' yaml files). Mask R-CNN's gradient is not clipped; its images have `rois`
# regions of interest, of which `mask_rois` may be foreground, the ones that get masks.
HEAD_FIELDS = {"retinanet": {}, "mask_rcnn": dict(clip=math.inf, rois=ROIS, mask_rois=MASK_ROIS)}
# What the authors' yaml files, and toy's rows, change by (protocol, head) or (protocol, head, arch).
EXCEPTIONS = {
    ("C", "retinanet", "143"): dict(jitter=[0.1, 1.9], drop_path=0.16),
    ("C", "retinanet", "190"): dict(jitter=[0.1, 1.9], epochs=400, lr=0.3),
    ("C", "mask_rcnn", "190"): dict(jitter=[0.1, 2.0], epochs=400),
    ("toy", "mask_rcnn"): dict(rois=64, mask_rois=16),
    ("toy", "mask_rcnn", "tiny"): dict(epochs=18, eval_every=9),
}
# Departure of --overfit, in any protocol: in few steps a momentum of 0.01 does not forget batch norm's first variance.
OVERFIT = dict(jitter=[1.0, 1.0], flip=False, epochs=400, eval_every=100, bn_momentum=0.1)
MOMENTUM, WEIGHT_DECAY = 0.9, 4e-5
LR_BATCH, WARMUP_LR, WARMUP_STEPS = 256, 0.0067, 2000  # rates and the warm-up's length are for a batch of 256
DROPS = (30, 10)  # epochs before the end at which the learning rate is divided by 10
# Departure, for runs that the paper has not: under 60 epochs the drops are shares of the run, and the warm-up is at
# most a tenth of any run.
SHORT_RUN, SHORT_DROPS, LONGEST_WARMUP = 60, (11 / 12, 35 / 36), 1 / 10
# Images of 640 x 640 that 16 GB hold under autocast with ReLU, (RetinaNet, Mask R-CNN): by an account that agrees with
# a GPU's peaks (docs/RESULTS.md, "Memory"). Swish keeps its inputs, DropBlock its masks: divided by SWISH, either fits.
FITS = {"tiny": (41, 47), "49S": (26, 23), "49": (19, 14), "96": (15, 11), "143": (11, 9), "190": (6, 4)}
SWISH = 1.46
SAVE_SECONDS, PRINT_STEPS, MAX_SKIPPED = 15 * 60, 50, 50  # the last: float16's overflows in a row that end a run
MAX_WAITING = 0.2  # share of the time, above which a warning comes


def schedule(epochs, steps_per_epoch, batch_size, lr):
    """The learning rate's corners, four (step, rate), by the constants above: warm-up's start and end, the two drops.
    Batch b: rates b / LR_BATCH times as high, the warm-up as much shorter (a fraction). SHORT_DROPS are rounded up."""
    scale, total = batch_size / LR_BATCH, epochs * steps_per_epoch
    warmup = min(WARMUP_STEPS / scale, total * LONGEST_WARMUP)
    drops = [(epochs - before) * steps_per_epoch for before in DROPS]
    if epochs < SHORT_RUN:
        drops = [math.ceil(total * share) for share in SHORT_DROPS]
    peak = lr * scale
    return (0, WARMUP_LR * scale), (warmup, peak), (drops[0], peak / 10), (drops[1], peak / 100)


def lr_at(step, epochs, steps_per_epoch, batch_size=LR_BATCH, lr=SHARED["lr"]):
    """The learning rate of a step, a pure function: linear warm-up, then the peak, a tenth of it from the first drop's
    step on, a hundredth from the second's. `lr` is per 256 images (paper section 5.1; authors' yaml files)."""
    (_, lowest), (warmup, peak), *drops = schedule(epochs, steps_per_epoch, batch_size, lr)
    if step < warmup:
        return lowest + (step / warmup) * (peak - lowest)
    return min([peak, *(rate for drop, rate in drops if step >= drop)])


def make_optimizer(model):
    """SGD with momentum; decay on the weights of convolutions, transposed too, and linear layers, on nothing else."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM)


def train_step(model, batches, recipe, optimizer, scaler, lr, place, step):
    """One optimizer step at rate lr: {name: 0-dim tensor} of the rank's mean losses, and the norm before clipping.

    batches: this rank's micro-batches. Each goes through `model(images, targets, sizes)` in place.autocast(): targets
    are all but the image, sizes the regions. The gradients of its losses' sum are averaged over micro-batches and, in
    the last backward only (no_sync), over ranks, then clipped to recipe["clip"]. Before each forward torch is seeded by
    recipe["seed"], step, micro-step, rank, to resume alike. Only GradScaler and SyncBN read back from the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    means = {}
    for t, batch in enumerate(batches):
        torch.manual_seed(int(np.random.SeedSequence((recipe["seed"], step, t, place.rank)).generate_state(1)[0]))
        targets = {k: v.to(place.device, non_blocking=True) for k, v in batch.items() if k != "image"}
        last = t == len(batches) - 1
        with contextlib.nullcontext() if last or place.world == 1 else model.no_sync():
            with place.autocast():
                losses = model(place.move(batch["image"]), targets, targets["region"])
            scaler.scale(sum(losses.values()) / len(batches)).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach() / len(batches)
    scaler.unscale_(optimizer)
    # Departure: the authors clip each core's own gradient, with weight decay's; here the mean over ranks, without it.
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
    scaler.step(optimizer)
    scaler.update()
    return means, norm


def read_step(means, norm, stop, place):
    """The loop's one host read: ({name: loss, mean over the ranks}, gradient norm, whether any rank asks to stop), as
    floats and a bool. The norm is the averaged gradient's, so all ranks have the same."""
    values = torch.stack([*means.values(), torch.full_like(norm, float(stop))])
    if place.world > 1:
        dist.all_reduce(values)
    *losses, stop, norm = torch.cat((values / place.world, norm[None])).tolist()
    return dict(zip(means, losses)), norm, stop > 0


def fit(parts, state, samples, val, place, out, workers):
    """The loop: from state["step"] to the last step, or until a signal asks to stop; whether it came to the end.

    parts: {"model", "optimizer", "scaler"}; state: the rest of a checkpoint, {"step", "evaluated" (the step of the last
    evaluation), "best" (box AP), "skipped", "recipe", "categories"}. last.pt is written at every epoch, after every
    evaluation, and at least every 15 minutes."""
    recipe, model, optimizer, scaler = state["recipe"], parts["model"], parts["optimizer"], parts["scaler"]
    batch_size, per_epoch = recipe["batch_size"], math.ceil(len(samples.annotations.ids) / recipe["batch_size"])
    total, accumulate = recipe["epochs"] * per_epoch, batch_size // place.world // recipe["micro_batch"]
    order = micro_batches(state["step"], total, batch_size, recipe["micro_batch"], place.rank, place.world)
    loader = iter(make_loader(samples, order, workers, place.device.type == "cuda"))
    if place.world > 1:  # parts keep the bare model, for evaluation, which broadcasts its buffers, and for checkpoints
        model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    log, asked = open_log(out / "log.jsonl", state, place), catch_signals()
    bar = tqdm(total=total, initial=state["step"], disable=place.rank > 0 or None)  # None: where there is no terminal
    recent, saved = [], time.monotonic()
    model.train()
    while True:
        step = state["step"]
        # Before the step, because a run that is resumed may have been stopped before its evaluation.
        if step > state["evaluated"] and (step == total or step % (per_epoch * recipe["eval_every"]) == 0):
            evaluate_now(parts, state, val, place, out, workers, log)
        if step == total:
            return True
        began, lr = time.perf_counter(), lr_at(step, recipe["epochs"], per_epoch, batch_size, recipe["lr"])
        batches = [next(loader) for _ in range(accumulate)]
        waited = time.perf_counter() - began
        means, norm = train_step(model, batches, recipe, optimizer, scaler, lr, place, step)
        losses, norm, stop = read_step(means, norm, bool(asked), place)
        refuse_divergence(state, losses, norm, lr, scaler, recent, samples, place)
        state |= {"step": step + 1, "skipped": state["skipped"] + (not math.isfinite(norm))}
        row = {"step": step + 1, "epoch": (step + 1) / per_epoch, "lr": lr, "loss": sum(losses.values())} | losses
        row |= {"grad_norm": norm if math.isfinite(norm) else None, "skipped": state["skipped"]}
        row |= {"seconds": time.perf_counter() - began, "waited": waited}
        log(row)
        recent = [*recent, row][-PRINT_STEPS:]
        show_progress(bar, recent, batch_size, workers, place)
        if stop or (step + 1) % per_epoch == 0 or time.monotonic() - saved > SAVE_SECONDS:
            save(out / "last.pt", parts, state, place)
            saved = time.monotonic()
        if stop:
            return False


def evaluate_now(parts, state, val, place, out, workers, log):
    """Evaluate, log, write the picture grid, and keep the best weights in best.pt."""
    recipe, model = state["recipe"], parts["model"]
    metrics = evaluate(model, val, recipe["size"], place, recipe["micro_batch"], workers, out=out)
    log({"eval_step": state["step"]} | metrics)
    if place.rank == 0:
        write_grid(model, val, recipe["size"], place, out / "grid.png")
    state["evaluated"] = state["step"]
    score = metrics["AP"] if metrics["AP"] >= 0 else -math.inf  # -1 or NaN: no object was there to be found
    if score == -math.inf and place.rank == 0:
        print("without an AP to compare, best.pt is the latest")
    if score > state["best"] or state["best"] == -math.inf:
        state["best"] = score
        save(out / "best.pt", parts, state, place)
    save(out / "last.pt", parts, state, place)


# What the loop stands on: checkpoints, the log, signals, progress.


def save(path, parts, state, place):
    """Rank 0 writes a checkpoint, so that at every moment `path` is whole: the old one or the new one."""
    if place.rank > 0:
        return
    draft = path.with_suffix(".tmp")
    try:
        with open(draft, "wb") as file:
            torch.save({name: part.state_dict() for name, part in parts.items()} | state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"could not write {path} ({error}); what it held is intact: make room and --resume") from None


def open_log(path, state, place):
    """A function that appends a row to rank 0's log.jsonl: {"step": n, ...} after the n-th step, {"eval_step": n, ...}
    after an evaluation. What a resumed run will write again is dropped first."""
    if place.rank > 0:
        return lambda row: None
    lines = path.read_text().splitlines() if state["step"] and path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill can cut the last line
    rows = [r for r in rows if r.get("step", 0) <= state["step"] and r.get("eval_step", 0) <= state["evaluated"]]
    path.with_suffix(".tmp").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(path.with_suffix(".tmp"), path)
    file = open(path, "a", buffering=1)
    return lambda row: file.write(json.dumps(row) + "\n")


def catch_signals():
    """A list that is filled by SIGTERM or Ctrl-C, which end the run after the step; a Ctrl-C after either, at once."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: (asked.append(n), signal.signal(signal.SIGINT, signal.default_int_handler)))
    return asked


def refuse_divergence(state, losses, norm, lr, scaler, recent, samples, place):
    """End every rank at a loss or gradient that isn't finite; float16's gradients are skipped, up to 50 in a row."""
    half, skips = scaler.is_enabled(), [row["grad_norm"] is None for row in recent[1 - MAX_SKIPPED :]]
    stuck = all(skips) and len(skips) == MAX_SKIPPED - 1
    if all(map(math.isfinite, losses.values())) and (math.isfinite(norm) or (half and not stuck)):
        return
    if place.rank > 0:  # rank 0 says why
        raise SystemExit(1)
    first, batch_size = state["step"] * state["recipe"]["batch_size"], state["recipe"]["batch_size"]
    ids = [int(samples.annotations.ids[samples.image_of(n)[1]]) for n in range(first, first + batch_size)]
    terms = ", ".join(f"{name} loss {value:.4g}" for name, value in losses.items())
    what = f"at step {state['step'] + 1}: {terms}, gradient norm {norm:.4g}, learning rate {lr:.4g}, image ids {ids}"
    why = f"{MAX_SKIPPED} steps in a row overflowed float16, the last" if half and stuck else "training diverged"
    cure = f"try {'--amp off, ' * half}a lower --lr, or look for broken boxes with tools/look.py --data FOLDER --show 8"
    raise SystemExit(f"error: {why} {what}; {cure}; last.pt is from before")


def show_progress(bar, recent, batch_size, workers, place):
    """Rank 0's progress in the last steps: a bar on a terminal, else lines; a warning where data is late."""
    row, seconds = recent[-1], sum(r["seconds"] for r in recent)
    late = sum(r["waited"] for r in recent) / seconds  # share of the time that the steps waited for data
    text = f"loss {row['loss']:.3f}, lr {row['lr']:.3g}, {len(recent) * batch_size / seconds:.1f} images/s"
    text += f", skipped {row['skipped']}" if row["skipped"] else ""
    bar.set_postfix_str(text, refresh=False)
    bar.update()
    if row["step"] % PRINT_STEPS == 0 and place.rank == 0:
        if bar.disable:
            print(f"step {row['step']}/{bar.total}: {text}", flush=True)
        if late > MAX_WAITING:
            bar.write(f"warning: {late:.0%} of the time went on waiting for data; raise --workers (now {workers})")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train SpineNet on COCO, or on anything in COCO's layout.")
    add = parser.add_argument
    add("--arch", default="49", choices=ARCHS)
    add("--size", type=int, default=640, help=f"side of the square input, a multiple of {MULTIPLE} (default 640)")
    add("--protocol", default="B", choices=PROTOCOLS, help="the recipe's row; the flags below change one field of it")
    add("--head", default="retinanet", choices=HEADS)
    add("--data", default="data/coco", help="a folder in COCO's layout, or `shapes` (default data/coco)")
    names = dict(nargs=2, metavar=("JSON", "IMAGES"))
    add("--train", **names, help="any json and the folder of its images, instead of --data's")
    add("--val", **names, help="the same to evaluate on (default: with --train the same images)")
    add("--out", type=Path, help="folder of the run (default runs/ARCH_SIZE_PROTOCOL_HEAD)")
    add("--batch-size", type=int, help="global batch: images per optimizer step over all devices")
    add("--micro-batch", type=int, help="images per device at once (default: what fits); divides batch size / devices")
    add("--epochs", type=int)
    add("--lr", type=float, help="learning rate per 256 images of the global batch")
    add("--jitter", type=float, nargs=2, metavar=("LOW", "HIGH"), help="scale jitter's range")
    add("--eval-every", type=int, help="epochs between evaluations")
    share = min(os.cpu_count() // max(int(n) if (n := os.environ.get("LOCAL_WORLD_SIZE", "")).isdecimal() else 1, 1), 8)
    add("--workers", type=int, default=share, help="data processes per device (default: its share of the cores, to 8)")
    add("--seed", type=int, default=0)
    add("--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one, else cpu")
    add("--amp", choices=AMP, default="auto", help="auto: by compute capability, off on a CPU")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", nargs="?", const="", metavar="FILE", help="go on where a run stopped (default OUT/last.pt)")
    either("--weights", type=Path, help="start from a checkpoint's weights: what fits is taken, the rest is new")
    add("--overfit", type=int, metavar="N", help="train and evaluate on the first N images with objects, as they are")
    add("--limit", type=int, metavar="N", help="the first N images of every split")
    return parser.parse_args(argv)


def resolve(args, arch=None):
    """The recipe: the protocol's row, the head's, their exceptions, --overfit, the flags; and the network."""
    counts = ("size", "batch_size", "micro_batch", "epochs", "eval_every", "overfit", "limit")
    for name, low in (dict.fromkeys(counts, 1) | {"lr": 1e-12, "seed": 0, "workers": 0}).items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be at least {low}")
    recipe = {name: getattr(args, name) for name in ("arch", "size", "protocol", "head", "seed", "overfit", "limit")}
    recipe |= PROTOCOLS[args.protocol] | HEAD_FIELDS[args.head] | EXCEPTIONS.get((args.protocol, args.head), {})
    recipe |= EXCEPTIONS.get((args.protocol, args.head, args.arch), {})
    recipe |= (OVERFIT | {"batch_size": args.overfit}) if args.overfit else {}
    for name in ("batch_size", "epochs", "lr", "jitter", "eval_every"):
        recipe[name] = recipe[name] if getattr(args, name) is None else getattr(args, name)
    if not 0 < recipe["jitter"][0] <= recipe["jitter"][1] < math.inf:
        raise UserError(f"--jitter {recipe['jitter']}: give LOW and HIGH with 0 < LOW <= HIGH")
    if args.size % MULTIPLE:
        raise UserError(f"--size is {args.size}, but must be a multiple of {MULTIPLE}, the stride of P7")
    return recipe | {"network": (arch or ARCHS[args.arch]).plain()}


def split_batch(recipe, micro_batch, place):
    """Images per micro-batch of one rank; what doesn't divide is refused. Departure: batch norm sees devices x this."""
    cuda, masks = place.device.type == "cuda", HEADS[recipe["head"]].masks
    share, rest = divmod(recipe["batch_size"], place.world)
    if rest:
        raise UserError(f"--batch-size {recipe['batch_size']} doesn't divide into {place.world} devices")
    if micro_batch is None:
        memory = torch.cuda.get_device_properties(place.device).total_memory if cuda else 16e9
        memory = torch.tensor(memory / 16e9, device=place.device)
        if dist.is_initialized():
            dist.all_reduce(memory, dist.ReduceOp.MIN)  # of the smallest device
        fits = FITS.get(recipe["arch"], (1, 1))[masks] * memory.item() * (1 if place.amp else 1 / 2)
        fits *= min((640 / recipe["size"]) ** 2, 1 if masks else math.inf)  # the RoIs' part is the same at any size
        fits /= SWISH if recipe["activation"] == "swish" or recipe["drop_rate"] else 1
        micro_batch = max(m for m in range(1, share + 1) if share % m == 0 and m <= max(fits, 1))
    if share % micro_batch:
        raise UserError(f"--micro-batch {micro_batch} must divide {share}, which is --batch-size / devices")
    if (recipe["size"] // MULTIPLE) ** 2 * micro_batch * (place.world if cuda else 1) == 1:
        what = f"--size {recipe['size']} with --micro-batch 1 leaves batch norm a single value per channel on P7"
        raise UserError(f"{what}; use a micro-batch of 2 or a larger size")
    return micro_batch


def load_splits(args, recipe):
    """(annotations to train on, annotations to evaluate on: the same where there are no others, or with --overfit)."""
    root, masks, count = resolve_root(args.data), HEADS[recipe["head"]].masks, recipe["overfit"]
    train = load_annotations(root, TRAIN, masks, args.train).select(slice(recipe["limit"]))
    if not train.positives().any():
        crowds = " but crowds (iscrowd 1), from which nothing is learned" if np.diff(train.spans).any() else ""
        raise UserError(f"{args.train[0] if args.train else root} has no object to train on{crowds}")
    if count:
        train = train.select(np.flatnonzero(train.positives())[:count])
        if len(train.ids) < count:
            raise UserError(f"--overfit {count}: only {len(train.ids)} images of {root} have an object")
    if count or not (args.val or (not args.train and split_paths(root, VAL)[0].exists())):
        return train, train
    val = load_annotations(root, VAL, masks, args.val)
    places = {category: k for k, category in enumerate(train.categories)}
    if other := [category for category in val.categories if category not in places]:
        what = f"{args.val[0] if args.val else root}: {len(other)} classes to evaluate are not trained, as {other[:5]}"
        raise UserError(f"{what}, against {train.categories[:5]}; export both splits again, together")
    labels = np.array([places[category] for category in val.categories])[val.labels]  # it may list fewer
    return train, val._replace(categories=train.categories, labels=labels).select(slice(recipe["limit"]))


def make_parts(recipe, categories, place):
    """What a run trains, new: {"model", "optimizer", "scaler"}."""
    torch.manual_seed(recipe["seed"])
    options = {name: recipe[name] for name in HEADS[recipe["head"]].options}
    detector = build_model(Arch.of(recipe["network"]), recipe["head"], len(categories), **options)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = recipe["bn_momentum"]
    place.move(detector)
    if place.world > 1 and place.device.type == "cuda":
        detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)  # departure: in torch it waits in every layer
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.amp is torch.float16)
    return {"model": detector, "optimizer": make_optimizer(detector), "scaler": scaler}


def resume_from(checkpoint, state, parts, total, path):
    """Fill state and parts from a checkpoint, unless it is another model's or past the end; says what has changed."""
    old, new = (one["recipe"] | {"classes": one["categories"]} for one in (checkpoint, state))
    for name in ("network", "size", "head", "classes"):
        if old[name] != new[name]:
            was = differences(old["network"], new["network"]) if name == "network" else f"{old[name]} -> {new[name]}"
            raise UserError(f"--resume {path}: the checkpoint's {name} differs ({was:.200}); use --weights instead")
    if checkpoint["step"] > total:
        raise UserError(f"--resume {path}: it has {checkpoint['step']} steps behind it, and this recipe only {total}")
    state |= {name: checkpoint[name] for name in ("step", "evaluated", "best", "skipped")}
    for name, part in parts.items():
        if checkpoint[name]:  # the scaler's is empty where the run was not in float16 so far
            part.load_state_dict(checkpoint[name])
    changed = differences(old, new)
    return f"resuming at step {state['step']}" + (f" with a changed recipe: {changed}" if changed else "")


def main(argv=None, arch=None):
    """Train as the arguments say; `arch`: an Arch of one's own in place of the row that --arch names."""
    args = parse_args(argv)
    recipe = resolve(args, arch)
    out = args.out or Path("runs", "{arch}_{size}_{protocol}_{head}".format(**recipe))
    resume = None if args.resume is None else Path(args.resume or out / "last.pt")
    if (out / "last.pt").exists() and not (resume and resume.parent.resolve() == out.resolve()):
        raise UserError(f"{out} already holds a run: continue that one with --resume, or give another --out")
    checkpoint = load_checkpoint(resume or args.weights) if resume or args.weights else None
    place = start(args.device, args.amp)
    say = print if place.rank == 0 else lambda *text, **options: None
    micro, batch_size = split_batch(recipe, args.micro_batch, place), recipe["batch_size"]
    recipe |= {"micro_batch": micro, "devices": place.world}
    with one_process_first(place):  # which writes the generated set, and the arrays of a large json
        train, val = load_splits(args, recipe)
    samples = TrainSet(train, recipe["size"], recipe["jitter"], recipe["flip"], recipe["seed"])
    say("recipe: " + ", ".join(f"{k} {v}" for k, v in recipe.items() if v is not None and k != "network"))
    say(f"train: {train.summary()}")
    say(f"evaluate: {val.summary()}" if val is not train else f"evaluating on {TRAIN}: the same images")
    categories, per_epoch = [list(category) for category in train.categories], math.ceil(len(train.ids) / batch_size)
    parts, total = make_parts(recipe, categories, place), recipe["epochs"] * per_epoch
    split = f"{place.world} device(s) x {micro} images x {batch_size // place.world // micro} micro-steps"
    parameters = f"{sum(p.numel() for p in parts['model'].parameters()):,} parameters"
    say(f"batch: {batch_size} = {split} on {place.device.type}, {place.amp or torch.float32}; {parameters}")
    corners = schedule(recipe["epochs"], per_epoch, batch_size, recipe["lr"])
    rates = ", ".join(f"{rate:.4g} at step {step:.0f}" for step, rate in corners)
    say(f"learning rate: {recipe['lr']} x {batch_size} / {LR_BATCH}: {rates} of {total}, {per_epoch} an epoch")
    state = {"step": 0, "evaluated": 0, "best": -math.inf, "skipped": 0, "recipe": recipe, "categories": categories}
    note = f"writing to {out}"
    if resume:
        note += ", " + resume_from(checkpoint, state, parts, total, resume)
    elif args.weights:
        note += "; " + load_weights(parts["model"], checkpoint, categories, args.weights)
    say(note, flush=True)
    began, checkpoint = time.perf_counter(), None  # whose memory is needed no more
    _lock = hold(make_folder(out)) if place.rank == 0 else None  # until the end
    finished = fit(parts, state, samples, val, place, out, args.workers)
    how = f"best AP {state['best']:.3f}" if finished else "stopped as asked; go on with --resume"
    say(f"step {state['step']} after {(time.perf_counter() - began) / 60:.1f} minutes: {how}; {out}")
    finish(place)


if __name__ == "__main__":
    with one_sentence():
        main()
