"""How good is it, and what does it see? COCO metrics, pictures, prediction on any image (paper section 5).

Boxes are xyxy float pixels: of the network's input inside the model, of the original image from `to_original` on.
Masks are 28 x 28 probabilities inside their boxes until `paste_mask` makes run lengths of the original image of them.

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
import pickle
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from data import (
    MIN_SIDE,
    VAL,
    EvalSet,
    UserError,
    full_view,
    load_annotations,
    make_folder,
    make_loader,
    one_sentence,
    read_checked,
    read_image,
    resolve_root,
)
from model import ARCHS, HEADS, build_model

KINDS = {"bbox": "", "segm": "mask_"}  # what COCO compares: the prefix of the metrics' names
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
GRID_IMAGES, GRID_SIDE, GRID_SCORE = 8, 320, 0.3  # the picture grid of an evaluation
CHECKPOINT_KEYS = {"model", "optimizer", "scaler", "step", "evaluated", "best", "skipped", "recipe", "categories"}
AMP = {"auto": None, "off": None, "fp16": torch.float16, "bf16": torch.bfloat16}
V100_PIP = "pip install torch==2.10.0 torchvision==0.25.0"


class Place(NamedTuple):
    """Where a process runs: its device, its rank among `world` processes, and the autocast dtype (None: float32)."""

    device: torch.device
    rank: int = 0
    world: int = 1
    amp: torch.dtype | None = None

    def autocast(self):
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)

    def memory(self):
        """GB of the smallest device of all ranks; 16 are assumed where it doesn't say."""
        cuda = self.device.type == "cuda"
        bytes_ = torch.cuda.get_device_properties(self.device).total_memory if cuda else 16e9
        smallest = torch.tensor(bytes_ / 1e9, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return smallest.item()

    def move(self, value):
        """A module or a batch of images to the device, channels last but in float32 on CUDA, where that is slower."""
        slower = self.device.type == "cuda" and self.amp is None
        layout = torch.contiguous_format if slower else torch.channels_last
        return value.to(self.device, memory_format=layout, non_blocking=True)


def start(device_name=None, amp="auto"):
    """Check that the device can be used, join torchrun's process group if there is one, and say where this runs.

    amp "auto" is bf16 from compute capability 8 on, fp16 below, off without CUDA. Raises UserError.
    """
    rank, world, local_rank = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine or this torch build has no MPS; use --device cpu")
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            found = f"torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices"
            raise UserError(f"--device cuda: {found} for process {local_rank}; check nvidia-smi, or use --device cpu")
        check_capability(torch.cuda.get_device_capability(local_rank), torch.cuda.get_arch_list())
        torch.cuda.set_device(local_rank)
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if amp == "auto":  # torch.cuda.is_bf16_supported() says yes on a V100, too, by emulation: hence the capability
        cuda = device.type == "cuda"
        amp = ("bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16") if cuda else "off"
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs a CUDA device; use bf16 or off")
    if world > 1 and not dist.is_initialized():
        # Rank 0 alone runs COCOeval while the others wait: minutes on a large set, never an hour.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    return Place(device, rank, world, AMP[amp])


def finish(place):
    """Leave the process group, all ranks together."""
    if place.world > 1:
        # torch 2.10's gloo threads need the interpreter to drop a finished all-reduce: destroying the group before that
        # can lock both for ever. The barrier lets them end.
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def first_of_machine_first(place):
    """One process of each machine goes through the block, writing what it writes, before the others do."""
    first = int(os.environ.get("LOCAL_RANK", place.rank)) == 0
    if place.world > 1 and not first:
        dist.barrier()
    yield
    if place.world > 1 and first:
        dist.barrier()


def check_capability(capability, arch_list):
    """Raise UserError where the torch build has no kernels for the GPU, such as PyPI's from 2.11 on for a V100."""
    major, minor = capability
    for arch in arch_list:
        kind, _, number = arch.partition("_")
        built = int("".join(c for c in number if c.isdigit()) or 0)
        # Machine code (sm) runs within its major version, intermediate code (compute) on anything newer.
        runs = built <= 10 * major + minor and (kind == "compute" or built // 10 == major)
        if runs or kind not in ("sm", "compute"):  # the latter: a ROCm build, which names its GPUs otherwise
            return
    raise UserError(
        f"this GPU has compute capability {major}.{minor}, but the installed torch {torch.__version__} was built for "
        f"{' '.join(arch_list)} only; for a V100 (7.0) run: {V100_PIP}"
    )


def load_checkpoint(path):
    """A checkpoint's dict, loaded without running any code in it. Raises UserError where it can't be read."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; train.py writes last.pt and best.pt into its --out") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not a checkpoint of tensors and plain values, so it was not loaded") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} can't be read as a checkpoint ({reason}); it may be truncated") from None
    lacking = CHECKPOINT_KEYS - set(checkpoint) if isinstance(checkpoint, dict) else CHECKPOINT_KEYS
    if lacking:
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(sorted(lacking))}")
    recipe = checkpoint["recipe"] if isinstance(checkpoint["recipe"], dict) else {}
    if recipe.get("arch") not in ARCHS or recipe.get("head") not in HEADS:
        raise UserError(f"{path} has an arch or a head that model.py doesn't know; add its row there")
    return checkpoint


def load_model(checkpoint, place):
    """The detector that a checkpoint describes, in evaluation mode, on its device."""
    recipe = checkpoint["recipe"]
    classes = len(checkpoint["categories"])
    detector = build_model(recipe["arch"], recipe["head"], classes, activation=recipe["activation"])
    detector.load_state_dict(checkpoint["model"])
    return place.move(detector).eval()


class Objects(NamedTuple):
    """What is found, or known to be, in an image, in its own pixels."""

    boxes: np.ndarray  # (n, 4) float64 xyxy
    labels: np.ndarray  # (n,)
    scores: np.ndarray | None = None  # (n,)
    masks: np.ndarray | list | None = None  # (n, m, m) inside the boxes; or n run-length codes of the image

    def surer(self, score):
        """Those of at least this score."""
        return Objects(*(part if part is None else part[self.scores >= score] for part in self))

    def pasted(self, height, width):
        """The same with masks as COCO's run-length codes of the image, made one at a time."""
        if self.masks is None:
            return self
        return self._replace(masks=[paste_mask(*pair, height, width) for pair in zip(self.masks, self.boxes)])


def to_original(found, width, height, size):
    """One image's detections as Objects: to numpy, the boxes to the original image's pixels."""
    view = full_view(height, width, size)
    scale = np.array([width / view.width, height / view.height] * 2)
    found = {name: value.cpu().numpy() for name, value in found.items()}
    return Objects(**found | {"boxes": found["boxes"].astype(np.float64) * scale})


def known_objects(annotations, i):
    """The ground truth of image i as Objects, crowds left out."""
    boxes, labels = annotations.objects(i)
    if annotations.masks is None:
        return Objects(boxes, labels)
    rows = zip(annotations.rows(i), boxes)
    return Objects(boxes, labels, None, [annotations.masks.crop(m, b, int(annotations.heights[i])) for m, b in rows])


def paste_mask(mask, box, height, width):
    """A mask (m, m) in 0..1 of a box (4,) xyxy, in image pixels, as COCO's compressed run-length code of the image.

    A pixel is the object's where the mask, bilinearly at the pixel's centre, is above 0.5; outside the centres of its
    outer cells the mask falls to 0 as if it were padded. Only the box's own pixels are computed.
    """
    low = np.floor(box[:2]).clip(0, (width, height)).astype(int)
    high = np.ceil(box[2:]).clip(low, (width, height)).astype(int)
    side = len(mask)
    tents = []
    for axis in (0, 1):  # bilinear interpolation is a product of a matrix per axis
        pixels = np.arange(low[axis], high[axis]) + 0.5
        place = (pixels - box[axis]) * (side / max(box[axis + 2] - box[axis], MIN_SIDE)) - 0.5
        tents.append((1 - np.abs(place[:, None] - np.arange(side))).clip(0).astype(np.float32))
    inside = tents[0] @ np.asarray(mask, dtype=np.float32).T @ tents[1].T > 0.5  # (w, h): columns are contiguous
    column, row = np.nonzero(np.diff(inside.astype(np.int8), axis=1, prepend=0, append=0))
    changes = (low[0] + column) * height + low[1] + row  # of the whole image's pixels, column by column
    same = np.flatnonzero(changes[1:] == changes[:-1])  # a run that goes on into the next column
    counts = np.diff(np.delete(changes, [same, same + 1]), prepend=0, append=height * width)
    counts = counts[: len(counts) - (counts[-1] == 0)]
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)


PALETTE = ((230, 60, 60), (60, 160, 240), (60, 200, 90), (240, 190, 40), (190, 90, 220), (40, 200, 200), (250, 130, 40))


def draw_objects(image, boxes, labels, names, scores=None, masks=None):
    """uint8 (3, H, W) with boxes (n, 4) xyxy drawn in their class's colour and named, with scores and masks if given.

    masks (n, m, m): numbers in 0..1 inside each box.
    """
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks  # only here: see blocks.py

    if not len(boxes):
        return image
    texts = [names[k] for k in labels.tolist()]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores.tolist())]
    colours = [PALETTE[k % len(PALETTE)] for k in labels.tolist()]
    for mask, box, colour in zip(() if masks is None else masks, boxes.numpy(), colours):
        pixels = coco_mask.decode(paste_mask(mask, box, *image.shape[1:]))
        image = draw_segmentation_masks(image, torch.from_numpy(pixels).bool(), alpha=0.5, colors=[colour])
    return draw_bounding_boxes(
        image, boxes, texts, colours, width=2, label_colors="black", label_background_colors=colours, fill_labels=True
    )


class Stopwatch:
    """Seconds by what they went on: `lap` books the time since the lap before."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def __str__(self):
        total = sum(self.seconds.values())
        parts = ", ".join(f"{name} {100 * seconds / max(total, 1e-9):.0f} %" for name, seconds in self.seconds.items())
        return f"{total:.1f} s: {parts}"


@torch.no_grad()
def detect_all(model, annotations, size, place, micro_batch, workers, watch):
    """{index: Objects} of this rank's images, every world-th of them; masks as run-length codes."""
    mine = list(range(place.rank, len(annotations.ids), place.world))
    batches = [mine[k : k + micro_batch] for k in range(0, len(mine), micro_batch)]
    loader = make_loader(EvalSet(annotations, size), batches, workers, place.device.type == "cuda")
    found = {}
    for batch in tqdm(loader, desc="evaluating", total=len(batches), disable=place.rank > 0 or None, leave=False):
        watch.lap("data")
        with place.autocast():
            detections = model(place.move(batch["image"]), sizes=batch["region"])
        detections = [{name: value.cpu() for name, value in one.items()} for one in detections]
        watch.lap("model")
        for i, detection in zip(batch["index"].tolist(), detections):
            width, height = int(annotations.widths[i]), int(annotations.heights[i])
            found[i] = to_original(detection, width, height, size).pasted(height, width)
        watch.lap("pasting")
    return found


def evaluate(model, annotations, size, place, micro_batch=8, workers=0, categories=None, out=None, per_class=False):
    """COCO's metrics of a model on one split: {"AP": ..., ...}, the same on every rank.

    Rank 0 prints COCO's twelve lines, for boxes and, if the annotations have masks, for masks ("mask_AP", ...), and,
    given `out`, writes results.json there. `categories` are the model's, if they are not the data set's. Every image
    is seen once, whatever the number of ranks.
    """
    was_training, watch = model.training, Stopwatch()
    model.eval()
    found = detect_all(model, annotations, size, place, micro_batch, workers, watch)
    model.train(was_training)
    parts = [found] * place.world
    if place.world > 1:
        dist.all_gather_object(parts, found)
        watch.lap("other ranks")
    metrics = [None]
    if place.rank == 0:
        seen = [i for part in parts for i in part]
        if sorted(seen) != list(range(len(annotations.ids))):
            raise RuntimeError(f"{len(seen)} evaluated images are not the {len(annotations.ids)} of the data set")
        print(f"evaluated {len(seen)}/{len(annotations.ids)} images")
        found = {i: value for part in parts for i, value in part.items()}
        results = coco_results(found, annotations, categories or annotations.categories)
        metrics = [coco_metrics(annotations, results, per_class)]
        watch.lap("COCOeval")
        if out is not None:
            try:
                Path(out, "results.json").write_text(json.dumps(results))
            except OSError as error:
                raise UserError(f"could not write {out}/results.json ({error.strerror}); make room") from None
        print(f"evaluation took {watch}")
    if place.world > 1:
        dist.broadcast_object_list(metrics, device=place.device)
    return metrics[0]


def coco_results(found, annotations, categories):
    """COCO's result dicts: original image and category ids, xywh in original pixels, masks as run-length codes."""
    results = []
    for i in sorted(found):
        image = {"image_id": int(annotations.ids[i])}
        results += [image | row for row in result_rows(found[i], categories)]
    return results


def result_rows(objects, categories):
    """COCO's result dicts of one image, whose id is still to be added; masks have been pasted."""
    boxes = np.concatenate((objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]), axis=1)
    rows = [
        {"category_id": categories[label][0], "bbox": box, "score": score}
        for label, box, score in zip(objects.labels.tolist(), boxes.tolist(), objects.scores.tolist())
    ]
    for row, code in zip(rows, objects.masks or ()):
        row["segmentation"] = {"size": list(code["size"]), "counts": code["counts"].decode()}
    return rows


def coco_index(annotations, objects):
    """A pycocotools COCO of a split's images and categories with the given objects, whose ids count from 1."""
    index = COCO()
    index.dataset = {
        "info": {},
        "images": [
            {"id": i, "height": h, "width": w}
            for i, h, w in zip(annotations.ids.tolist(), annotations.heights.tolist(), annotations.widths.tolist())
        ],
        "categories": [{"id": k, "name": name} for k, name in annotations.categories],
        "annotations": [o | {"id": k + 1} for k, o in enumerate(objects)],
    }
    index.createIndex()
    return index


def ground_truth(annotations):
    """A split's objects, crowds included, as COCO annotation dicts."""
    a, objects = annotations, []
    for i, (start, stop) in enumerate(a.spans.tolist()):
        image = {"image_id": int(a.ids[i])}
        for m in range(start, stop):
            o = image | {"category_id": a.categories[a.labels[m]][0], "iscrowd": int(a.crowd[m])}
            o |= {"bbox": a.boxes[m].tolist(), "area": float(a.area[m])}
            if a.masks is not None:
                o["segmentation"] = a.masks.coco(m, int(a.heights[i]), int(a.widths[i]))
            objects.append(o)
    return objects


def coco_metrics(annotations, results, per_class=False):
    """Print COCO's twelve lines for result dicts on a split; {"AP": ..., ..., "ARl": ...}.

    If the annotations have masks, twelve more for them, called "mask_AP" and so on.
    """
    if not annotations.positives().any():
        print("warning: the split has no objects to find, so AP is -1")
    elif not results:
        print("warning: there is not one detection above the score threshold, so AP is 0")
    metrics, truth = {}, ground_truth(annotations)
    for kind in KINDS if annotations.masks is not None else ("bbox",):
        if annotations.masks is not None:
            print(kind.capitalize())
        judge = coco_judge(annotations, truth, results, kind)
        judge.summarize()
        metrics |= {KINDS[kind] + name: value for name, value in zip(METRICS, judge.stats.tolist())}
        if per_class:
            precision = judge.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, K), all areas, 100 detections
            for k, (_, name) in enumerate(annotations.categories):
                valid = precision[..., k][precision[..., k] > -1]
                print(f" {name:<20} AP = {valid.mean() if len(valid) else -1:.3f}")
    return metrics


def coco_judge(annotations, truth, results, kind):
    """pycocotools' COCOeval of one kind, accumulated. A detection's area is that of what is compared: box or mask."""
    # One mask at a time: pycocotools 2.0.11 fails on lists of more than 255 under numpy 2.
    area = {"bbox": lambda r: r["bbox"][2] * r["bbox"][3], "segm": lambda r: float(coco_mask.area(r["segmentation"]))}
    objects = [r | {"area": area[kind](r), "iscrowd": 0} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(coco_index(annotations, truth), coco_index(annotations, objects), kind)
        judge.evaluate()
        judge.accumulate()
    return judge


def panel(image, objects, names):
    """A PIL image and its objects drawn on a GRID_SIDE square, uint8 (3, GRID_SIDE, GRID_SIDE)."""
    view = full_view(image.height, image.width, GRID_SIDE)
    objects = objects._replace(boxes=torch.from_numpy(view.boxes(objects.boxes)))
    return draw_objects(view.image(image, GRID_SIDE), names=names, **objects._asdict())


@torch.no_grad()
def see(model, image, size, place):
    """The detections on one PIL image, as Objects."""
    view = full_view(image.height, image.width, size)
    with place.autocast():
        (found,) = model(place.move(view.image(image, size)[None]), sizes=view.region()[None])
    return to_original(found, image.width, image.height, size)


def write_grid(model, annotations, size, place, path):
    """A PNG of a few images, evenly spaced over the split: the ground truth and, to its right, the detections."""
    from torchvision.utils import make_grid  # only here: see blocks.py

    was_training = model.training
    model.eval()
    names = [name for _, name in annotations.categories]
    count, panels = min(GRID_IMAGES, len(annotations.ids)), []
    for i in np.linspace(0, len(annotations.ids) - 1, count).astype(int).tolist():
        image = read_checked(annotations, i)
        for objects in (known_objects(annotations, i), see(model, image, size, place).surer(GRID_SCORE)):
            panels.append(panel(image, objects, names))
    model.train(was_training)
    grid = make_grid(torch.stack(panels), nrow=4, padding=4, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def predict(model, source, out, categories, size, place, score):
    """Detect on the image `source`, or on every image in that folder; write pictures and predictions.json to out."""
    files = [source]
    if source.is_dir():
        kinds = Image.registered_extensions()
        files = sorted(p for p in source.iterdir() if kinds.get(p.suffix.lower()) in Image.OPEN)
    if not files or not files[0].is_file():
        raise UserError(f"--images {source}: no image there")
    names, rows = dict(categories), []
    for file in files:
        image = ImageOps.exif_transpose(read_image(file, "--images"))  # a photo is shown upright
        objects = see(model, image, size, place).surer(score)
        drawn = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        boxes = {"boxes": torch.from_numpy(objects.boxes)}
        drawn = draw_objects(drawn, names=list(names.values()), **objects._asdict() | boxes)
        Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(out / f"{file.name}.png")
        for row in result_rows(objects.pasted(image.height, image.width), categories):
            rows.append({"file": file.name, "category": names[row["category_id"]]} | row)
    (out / "predictions.json").write_text(json.dumps(rows, indent=1))
    print(f"{len(rows)} objects of score >= {score} on {len(files)} images: {out}")


def check_categories(annotations, categories, path):
    """Raise UserError unless every category of the data set is one of the model's, by id and name."""
    lacking = [c for c in annotations.categories if tuple(c) not in {tuple(k) for k in categories}]
    if lacking:
        raise UserError(
            f"{path} was trained on other classes: it lacks {len(lacking)} of the data set's, such as (id, name) "
            f"{lacking[:5]}; train on this data, with --weights to start from that checkpoint"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description="COCO metrics of a checkpoint, or its detections on any image.")
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="a checkpoint of train.py")
    add("--data", default="data/coco", help="a folder in COCO's layout, or `shapes` (default data/coco)")
    add("--split", default=VAL, help=f"default {VAL}")
    add("--limit", type=int, metavar="N", help="only the first N images")
    add("--per-class", action="store_true", help="print AP by class, too")
    add("--images", type=Path, help="an image or a folder of images to predict on, instead of --data")
    add("--score", type=float, default=0.3, help="with --images: draw detections from here on (default 0.3)")
    add("--out", type=Path, help="folder of results.json or of the pictures (default: beside the weights)")
    add("--micro-batch", type=int, default=8, help="images at once per device (default 8)")
    add("--workers", type=int, default=2)
    add("--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one, else cpu")
    add("--amp", choices=AMP, default="auto")
    args = parser.parse_args(argv)

    if args.micro_batch <= 0 or args.workers < 0 or (args.limit is not None and args.limit <= 0):
        raise UserError("--micro-batch and --limit must be positive, --workers not negative")
    checkpoint = load_checkpoint(args.weights)
    categories, recipe = checkpoint["categories"], checkpoint["recipe"]
    out = args.out or args.weights.parent / ("seen" if args.images else "")
    place, annotations = start(args.device, args.amp), None
    if not args.images:
        with first_of_machine_first(place):
            annotations = load_annotations(resolve_root(args.data), args.split, HEADS[recipe["head"]].masks)
        annotations = annotations.select(slice(args.limit))
        check_categories(annotations, categories, args.weights)
    detector = load_model(checkpoint, place)
    make_folder(out)
    size = recipe["size"]
    if args.images:
        predict(detector, args.images, out, categories, size, place, args.score)
    else:
        evaluate(detector, annotations, size, place, args.micro_batch, args.workers, categories, out, args.per_class)
    finish(place)


if __name__ == "__main__":
    with one_sentence():
        main()
