"""How good is it, and what does it see? COCO metrics, pictures, prediction on any image (paper section 5).

Boxes are xyxy float pixels: of the network's input inside the model, of the original image from `to_original` on.
Masks are 28 x 28 probabilities inside their boxes until `paste_mask` makes run lengths of the original image of them.
The last part says where a process runs: its device, its rank, its precision, and what becomes of an error.

    python evaluate.py --weights runs/x/best.pt --data data/coco               COCO's twelve lines, results.json
    torchrun --nproc_per_node 8 evaluate.py --weights ... --data ...           the same on 8 GPUs
    python evaluate.py --weights runs/x/best.pt --images photo.jpg --out seen  pictures and a json
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid
from tqdm import tqdm

from data import VAL, EvalSet, crop_mask, full_view, load_annotations, make_loader, read_checked, read_image
from model import HEADS, UserError, load_checkpoint, load_model

with contextlib.suppress(ImportError):  # Windows has none
    import fcntl

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
GRID_IMAGES, GRID_SIDE, GRID_SCORE = 8, 320, 0.3  # the grid; the lowest score in it


@torch.no_grad()
def evaluate(model, annotations, size, place, micro_batch=8, workers=0, categories=None, out=None, per_class=False):
    """COCO's metrics of a model on one split, by all ranks together: {"AP": ..., ...}, the same on every rank.

    Rank 0 writes results.json to `out`, if given, and prints COCO's twelve lines, for boxes and, if the annotations
    have masks, for masks ("mask_AP", ...). `categories` are the model's, by default the data set's.
    """
    began, was_training = time.perf_counter(), model.training
    model.eval()
    mine = range(place.rank, len(annotations.ids), place.world)
    batches = [mine[k : k + micro_batch] for k in range(0, len(mine), micro_batch)]
    loader = iter(make_loader(EvalSet(annotations, size), batches, workers, place.device.type == "cuda"))
    if place.world > 1:  # without SyncBN, on CPUs, every rank has statistics of its own: rank 0's are the model's
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    rows = {}  # {index of an image: its result dicts}
    for batch in tqdm(loader, "evaluating", len(batches), disable=place.rank > 0 or None, leave=False):
        with place.autocast():
            detections = model(place.move(batch["image"]), sizes=batch["region"])
        for i, found in zip(batch["index"].tolist(), detections):
            original = int(annotations.ids[i]), int(annotations.heights[i]), int(annotations.widths[i])
            rows[i] = coco_rows(found, *original, size, categories or annotations.categories)
    model.train(was_training)
    gathered, metrics = [rows] * place.world, [None]  # filled by the collectives
    if place.world > 1:
        dist.all_gather_object(gathered, rows)
    if place.rank == 0:
        rows = {i: own for part in gathered for i, own in part.items()}  # of all ranks
        if not sum(map(len, gathered)) == len(rows) == len(annotations.ids):
            raise RuntimeError("an image of the data set was evaluated twice or never")
        results = [row for i in sorted(rows) for row in rows[i]]
        if out is not None:
            Path(out, "results.json").write_text(json.dumps(results))
        print(f"evaluated {len(rows)}/{len(annotations.ids)} images in {time.perf_counter() - began:.1f} s")
        metrics = [coco_metrics(annotations, results, per_class)]
    if place.world > 1:
        dist.broadcast_object_list(metrics, device=place.device)
    return metrics[0]


def coco_rows(found, image_id, height, width, size, categories):
    """One image's detections as COCO's result dicts: original ids and pixels, xywh, masks as run-length codes.

    found: boxes (n, 4) in the network's input of that `size`, labels (n,), scores (n,) and, or not, masks (n, 28, 28).
    """
    boxes = to_original(found["boxes"], height, width, size)
    xywh = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
    rows = [
        {"image_id": image_id, "category_id": categories[label][0], "bbox": box, "score": score}
        for label, box, score in zip(found["labels"].tolist(), xywh.tolist(), found["scores"].tolist())
    ]
    if "masks" in found:
        for row, mask, box in zip(rows, found["masks"].cpu().numpy(), boxes):
            code = paste_mask(mask, box, height, width)
            row["segmentation"] = {"size": [height, width], "counts": code["counts"].decode()}
    return rows


def to_original(boxes, height, width, size):
    """Boxes (n, 4) in the network's input -> float64 in the pixels of the original image."""
    view = full_view(height, width, size)
    return boxes.cpu().numpy().astype(np.float64) * np.array([width / view.width, height / view.height] * 2)


def paste_mask(mask, box, height, width):
    """A mask (m, m) in 0..1 inside a box (4,) xyxy of an image as COCO's run-length code, as pycocotools has it.

    A pixel is the object's where the mask, read bilinearly at the pixel's centre and padded with a cell of 0, is above
    0.5. Departure: the authors round the box to whole pixels first.
    """
    image = np.zeros((height, width), dtype=np.uint8, order="F")
    low = np.floor(box[:2]).clip(0, (width, height)).astype(int)
    high = np.ceil(box[2:]).clip(low, (width, height)).astype(int)
    tents = []
    for axis in (0, 1):  # bilinear interpolation is a product with a matrix per axis, of which x is the first
        pixels = np.arange(low[axis], high[axis]) + 0.5
        cells = (pixels - box[axis]) * (len(mask) / max(box[axis + 2] - box[axis], 1e-9)) - 0.5  # 1e-9: an empty box
        tents.append((1 - np.abs(cells[:, None] - np.arange(len(mask)))).clip(0).astype(np.float32))  # (pixels, m)
    inside = tents[1] @ np.asarray(mask, dtype=np.float32) @ tents[0].T > 0.5  # (h, m) (m, m) (m, w)
    image[low[1] : high[1], low[0] : high[0]] = inside
    return coco_mask.encode(image)


def coco_metrics(annotations, results, per_class=False):
    """Print COCO's twelve lines for result dicts on a split; {"AP": ..., ..., "ARl": ...}. If the annotations have
    masks, twelve more for them, called "mask_AP" and so on."""
    if not annotations.positives().any():
        print("warning: there is no truth to score, as the split has no object but crowds, or none: AP is -1")
    elif not results:
        print("warning: there is not one detection above the score threshold, so AP is 0")
    metrics, truth = {}, ground_truth(annotations)
    for kind, prefix in (("bbox", ""), ("segm", "mask_"))[: 1 if annotations.codes is None else 2]:
        print(kind.capitalize())
        # As COCO.loadRes would, which takes the box's area where there are both.
        found = [row | {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in results]
        for row in found if kind == "segm" else ():  # singly: pycocotools 2.0.11 fails on over 255 codes under numpy 2
            row["area"] = float(coco_mask.area(row["segmentation"]))
        with contextlib.redirect_stdout(io.StringIO()):
            judge = COCOeval(coco_index(annotations, truth), coco_index(annotations, found), kind)
            judge.evaluate()
            judge.accumulate()
        judge.summarize()
        metrics |= {prefix + name: value for name, value in zip(METRICS, judge.stats.tolist())}
        if per_class:
            precision = judge.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, K), all areas, 100 detections
            for k, (_, name) in enumerate(annotations.categories):
                valid = precision[..., k][precision[..., k] > -1]
                print(f" {name:<20} AP = {valid.mean() if len(valid) else -1:.3f}")
    return metrics


def ground_truth(annotations):
    """A split's objects, crowds included, as COCO annotation dicts."""
    a, objects = annotations, []
    for i, (start, stop) in enumerate(a.spans.tolist()):
        for m in range(start, stop):
            o = {"image_id": int(a.ids[i]), "category_id": a.categories[a.labels[m]][0], "iscrowd": int(a.crowd[m])}
            o |= {"bbox": a.boxes[m].tolist(), "area": float(a.area[m])}
            if a.codes is not None:
                o["segmentation"] = a.mask(i, m)
            objects.append(o)
    return objects


def coco_index(annotations, objects):
    """A pycocotools COCO of a split with the given objects, whose ids count from 1: to COCOeval 0 means unmatched."""
    index, a = COCO(), annotations
    images = [dict(id=i, height=h, width=w) for i, h, w in zip(a.ids.tolist(), a.heights.tolist(), a.widths.tolist())]
    index.dataset = {"images": images, "categories": [{"id": k, "name": name} for k, name in a.categories]}
    index.dataset["annotations"] = [o | {"id": k} for k, o in enumerate(objects, 1)]
    index.createIndex()
    return index


PALETTE = ((230, 60, 60), (60, 160, 240), (60, 200, 90), (240, 190, 40), (190, 90, 220), (40, 200, 200), (250, 130, 40))


def draw_objects(image, boxes, labels, names, scores=None, masks=None):
    """uint8 (3, H, W) with boxes (n, 4) xyxy drawn in their class's colour and named, with scores and masks if given:
    (n, m, m), numbers in 0..1 inside each box."""
    if not len(boxes):
        return image
    scores = [""] * len(labels) if scores is None else [f" {score:.2f}" for score in scores.tolist()]
    texts = [names[k] + score for k, score in zip(labels.tolist(), scores)]
    label = torch.tensor([5 * max(map(len, texts)), 14])  # pixels of the longest, which covers what is nearer
    near = ((boxes[:, None, :2] - boxes[:, :2]).abs() < label).all(2).tril(-1).any(1)
    texts = [None if hidden else text for text, hidden in zip(texts, near)]
    colours = [PALETTE[k % len(PALETTE)] for k in labels.tolist()]
    for mask, box, colour in zip(() if masks is None else masks, boxes.numpy(), colours):
        pixels = coco_mask.decode(paste_mask(mask, box, *image.shape[1:]))
        image = draw_segmentation_masks(image, torch.from_numpy(pixels).bool(), alpha=0.5, colors=[colour])
    return draw_bounding_boxes(image, boxes, texts, colours, width=2, label_colors="black", fill_labels=True)


@torch.no_grad()
def see(model, image, size, place, score):
    """The detections of at least this score on one PIL image, boxes in the network's input, on the CPU."""
    view = full_view(image.height, image.width, size)
    with place.autocast():
        (found,) = model(place.move(view.image(image, size)[None]), sizes=view.region()[None])
    return {name: value[found["scores"] >= score].cpu() for name, value in found.items()}


def write_grid(model, annotations, size, place, path):
    """A PNG of a few images, evenly spaced over the split: the ground truth and, to its right, the detections."""
    was_training, panels = model.training, []
    model.eval()
    names = [name for _, name in annotations.categories]
    for i in np.linspace(0, len(annotations.ids) - 1, min(GRID_IMAGES, len(annotations.ids))).astype(int).tolist():
        image, (boxes, labels), masks = read_checked(annotations, i), annotations.objects(i), None
        view = full_view(image.height, image.width, GRID_SIDE)
        if annotations.codes is not None:
            masks = [crop_mask(annotations.mask(i, m), box) for m, box in zip(annotations.rows(i), boxes)]
        found = see(model, image, size, place, GRID_SCORE)
        found["boxes"] = to_original(found["boxes"], image.height, image.width, size)
        for objects in ({"boxes": boxes, "labels": labels, "masks": masks}, found):
            objects["boxes"] = torch.from_numpy(view.boxes(objects["boxes"]))
            panels.append(draw_objects(view.image(image, GRID_SIDE), names=names, **objects))
    model.train(was_training)
    grid = make_grid(torch.stack(panels), nrow=4, padding=4, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def predict(model, source, out, categories, size, place, score):
    """Detect on the image `source`, or on every image in that folder; write pictures and predictions.json to out."""
    kinds, files = Image.registered_extensions(), [source]
    if source.is_dir():
        files = sorted(p for p in source.iterdir() if kinds.get(p.suffix.lower()) in Image.OPEN)
    if not files or not files[0].is_file():
        raise UserError(f"--images {source}: no image there")
    names, rows = dict(categories), []
    for file in files:
        image = ImageOps.exif_transpose(read_image(file, "--images"))  # a photo is shown upright
        found = see(model, image, size, place, score)
        for row in coco_rows(found, file.name, image.height, image.width, size, categories):
            rows.append({"file": row.pop("image_id"), "category": names[row["category_id"]]} | row)
        found["boxes"] = torch.from_numpy(to_original(found["boxes"], image.height, image.width, size))
        drawn = draw_objects(torch.from_numpy(np.array(image)).permute(2, 0, 1), names=list(names.values()), **found)
        Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(out / f"{file.name}.png")
    (out / "predictions.json").write_text(json.dumps(rows, indent=1))
    print(f"{len(rows)} objects of score >= {score} on {len(files)} images: {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="COCO metrics of a checkpoint, or its detections on any image.")
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="a checkpoint of train.py")
    add("--data", default="data/coco", help="a folder in COCO's layout, or `shapes` (default data/coco)")
    add("--split", default=VAL, help=f"default {VAL}")
    add("--val", nargs=2, metavar=("JSON", "IMAGES"), help="any json and its images, instead of --data and --split")
    add("--limit", type=int, metavar="N", help="only the first N images")
    add("--per-class", action="store_true", help="print AP by class, too")
    add("--images", type=Path, help="an image or a folder of images to predict on, instead of --data")
    add("--score", type=float, default=GRID_SCORE, help=f"with --images: the lowest to show (default {GRID_SCORE})")
    add("--out", type=Path, help="folder of results.json or of the pictures (default: beside the weights)")
    add("--micro-batch", type=int, default=8, help="images at once per device (default 8)")
    add("--workers", type=int, default=2)
    add("--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one, else cpu")
    add("--amp", choices=AMP, default="auto")
    args = parser.parse_args(argv)
    if args.micro_batch <= 0 or args.workers < 0 or (args.limit is not None and args.limit <= 0):
        raise UserError("--micro-batch and --limit must be positive, --workers not negative")
    checkpoint = load_checkpoint(args.weights)
    recipe, categories = checkpoint["recipe"], checkpoint["categories"]
    out = make_folder(args.out or args.weights.parent / ("seen" if args.images else ""))
    place = start(args.device, args.amp)
    if args.images:
        predict(load_model(checkpoint, place), args.images, out, categories, recipe["size"], place, args.score)
    else:
        with one_process_first(place):
            split = load_annotations(resolve_root(args.data), args.split, HEADS[recipe["head"]].masks, args.val)
        lacking = {tuple(c) for c in split.categories} - {tuple(c) for c in categories}
        if lacking:
            what = f"{args.weights} was trained on other classes; it lacks {len(lacking)}, as {sorted(lacking)[:5]}"
            raise UserError(f"{what}; train on this data, with --weights to start from that checkpoint")
        split, detector = split.select(slice(args.limit)), load_model(checkpoint, place)
        options = dict(categories=categories, out=out, per_class=args.per_class)
        evaluate(detector, split, recipe["size"], place, args.micro_batch, args.workers, **options)
    finish(place)


# Where a process runs.

AMP = {"auto": None, "off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Place(NamedTuple):
    """Where a process runs: its device, its rank among `world` processes, and the autocast dtype (None: float32)."""

    device: torch.device
    rank: int = 0
    world: int = 1
    amp: torch.dtype | None = None
    local: int = 0  # its rank among the processes of its machine

    def autocast(self):
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)

    def move(self, value):
        """A module or a batch of images to the device, channels last except in float32 on CUDA, where it is slower."""
        layout = torch.contiguous_format if self.device.type == "cuda" and not self.amp else torch.channels_last
        return value.to(self.device, memory_format=layout, non_blocking=True)


def launched():
    """(rank, processes, rank on this machine) as torchrun says, (0, 1, 0) without it. Half of that is a UserError."""
    given = {k: os.environ.get(k, "").strip() for k in "RANK WORLD_SIZE LOCAL_RANK MASTER_PORT MASTER_ADDR".split()}
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1"
    if tasks != "1" and not given["RANK"]:
        raise UserError(f"SLURM has {tasks} tasks, each a run of its own; let srun start one torchrun per machine")
    if given["RANK"] in ("", "0") and given["WORLD_SIZE"] in ("", "1"):
        return 0, 1, 0
    numbers = {k: int(v) for k, v in given.items() if v.isdecimal() and int(v) < 2**16}  # the highest port is below
    wrong = [f"{k} is {v!r}" for k, v in given.items() if k not in numbers and not (v and k == "MASTER_ADDR")]
    if wrong:
        raise UserError(f"the launcher's {', '.join(wrong)}; start with torchrun, or unset {', '.join(given)}")
    return numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]


def start(device_name=None, amp="auto"):
    """Check that the device can be used, join torchrun's process group if there is one, and say where this runs.
    amp "auto" is bf16 from compute capability 8 on, fp16 below, off without CUDA. Raises UserError."""
    rank, world, local = launched()
    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = name == "cuda"
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine or this torch build has no MPS; use --device cpu")
    if cuda:
        if local >= torch.cuda.device_count():
            found = f"--device cuda: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices"
            raise UserError(f"{found} for process {local}; check nvidia-smi, or use --device cpu")
        torch.cuda.set_device(local)
        name = f"cuda:{local}"
    if amp == "auto":  # torch.cuda.is_bf16_supported() says yes on a V100, too, by emulation: hence the capability
        amp = ("bf16" if torch.cuda.get_device_capability(local)[0] >= 8 else "fp16") if cuda else "off"
    if amp == "fp16" and not cuda:
        raise UserError("--amp fp16 needs a CUDA device; use bf16 or off")
    place = Place(torch.device(name), rank, world, AMP[amp], local)
    if cuda:
        try_device(place)
    if world > 1 and not dist.is_initialized():
        hour = datetime.timedelta(hours=1)  # rank 0 alone runs COCOeval while the others wait, for minutes
        dist.init_process_group("nccl" if cuda else "gloo", timeout=hour)
    return place


def try_device(place):
    """Raise UserError where the installed torch or its cuDNN has no kernels for the device."""
    try:
        with place.autocast():
            layer = place.move(torch.nn.Conv2d(8, 8, 3))
            layer(place.move(torch.zeros(2, 8, 8, 8))).sum().backward()
        torch.cuda.synchronize(place.device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        build = f"torch {torch.__version__} can't compute on this device ({str(error).splitlines()[0]})"
        cure = "for a V100, whose kernels newer builds lack: pip install torch==2.10.0 torchvision==0.25.0"
        raise UserError(f"{build}; {cure}") from None


def finish(place):
    """Leave the process group, all ranks together."""
    if place.world > 1:
        dist.barrier()  # in torch 2.10 to destroy the group while a gloo thread ends an all-reduce can lock both
        dist.destroy_process_group()


def resolve_root(data):
    """The folder that `--data` names; for the name `shapes`, the generated set in data/shapes, written on first use."""
    if data == "shapes":
        sys.path.append(str(Path(__file__).with_name("tools")))
        from make_shapes import write_shapes  # only here: nothing else at the root needs tools/

        write_shapes(Path("data/shapes"))
    return Path("data/shapes" if data == "shapes" else data)


@contextlib.contextmanager
def one_process_first(place):
    """One process of each machine goes through the block, writing what it writes, before the others do."""
    if place.world > 1 and place.local > 0:
        dist.barrier()
    try:
        yield
    finally:  # where it fails, too: the others then come to the same fault, instead of waiting
        if place.world > 1 and place.local == 0:
            dist.barrier()


def make_folder(path):
    """Make a folder for output, and its parents; a UserError where that, or writing there, can't be."""
    with contextlib.suppress(OSError):
        Path(path).mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK) or not Path(path).is_dir():
        raise UserError(f"the folder {path} can't be made or written; give another --out")
    return Path(path)


def hold(folder):
    """The lock of an output folder, which is this process's until it drops it or ends, however. Raises UserError."""
    lock = open(Path(folder, ".lock"), "w")
    with contextlib.suppress(NameError, OSError):  # some file systems have no locks
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process; give another --out, or end that one") from None
    return lock


@contextlib.contextmanager
def one_sentence():
    """A script runs inside: what is no fault of the code is one sentence and exit code 2; after Ctrl-C 130."""
    for stream in (sys.stdout, sys.stderr):  # a class may have letters that the terminal has not
        hasattr(stream, "reconfigure") and stream.reconfigure(errors="backslashreplace")
    try:
        yield
        return
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        sentence = str(error).rpartition("UserError: ")[2].strip()  # a DataLoader worker puts its traceback before it
    except OSError as error:
        sentence = f"{error.filename or 'a file'} can't be read or written: {error.strerror or error}"
    except torch.OutOfMemoryError as error:
        sentence = f"{str(error).splitlines()[0]} Free the device, or use a smaller --micro-batch"
    except dist.DistError as error:
        sentence = f"the processes don't find each other: {str(error).splitlines()[0]}"
    except RuntimeError as error:  # a dead worker's is raised by a signal, wherever the main process then is
        if not (line := re.search(r".*(DataLoader worker \(pid|shared memory|file </torch_).*", str(error))):
            raise
        sentence = f"{line[0].strip()} Memory ran out: use fewer --workers; docker run --shm-size 8g, or --workers 0"
    if os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
        time.sleep(5)  # where the first process says the same, torchrun ends this one before, if not in training
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


if __name__ == "__main__":
    with one_sentence():
        main()
