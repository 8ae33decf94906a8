"""How does a COCO folder become batches? Packed annotations, scale jitter, the samples, and who gets which.

Read on to `make_loader`: that is the way from files to batches. What it stands on follows, part by part, to be looked
up: errors, reading and checking a json, the packed form of a large one, masks, the generated set, the command line.

Dimensions: N images, M objects, B images of a batch, S side of the network's square input.
Boxes are xyxy float pixels, but in the json files and `Annotations.boxes`, which are COCO's xywh.

    python data.py --data D --check         decode every image, list the bad ones
    python data.py --data D --show 8        write augmented training samples with their boxes (--masks: and masks)
"""

import argparse
import collections
import colorsys
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

MAX_OBJECTS = 100  # targets per image (authors' yaml, max_num_instances)
MASK_SIDE = 112  # cells of a target's mask, per side of its box (authors' yaml, gt_mask_size)
PAD = torch.tensor((124, 116, 104), dtype=torch.uint8)  # the mean colour: 0 after normalization, within rounding
MIN_SIDE = 0.01  # pixels: what the window leaves of an object's box below this is no object
MAX_BROKEN = 0.01  # a larger share of broken objects means that the format is wrong, not an object
TRAIN, VAL = "train2017", "val2017"
PACKED_FROM = 50e6  # bytes of a json, from which its packed form is kept
CACHE_VERSION = 3  # of that form


class Annotations(NamedTuple):
    """One split as packed arrays, which forked workers share: no Python object is kept per annotation.

    The objects of image i are the rows spans[i, 0] to spans[i, 1] of boxes, labels, crowd and area, and of masks.
    """

    folder: str
    categories: list  # (original id, name) in the order of their ids; label k means categories[k]
    ids: np.ndarray  # (N,) int64, ascending
    files: np.ndarray  # (N,) bytes, relative to folder
    heights: np.ndarray  # (N,) int64
    widths: np.ndarray  # (N,) int64
    spans: np.ndarray  # (N, 2) int64
    boxes: np.ndarray  # (M, 4) float64 xywh, as the json has them
    labels: np.ndarray  # (M,) int64 in 0..K-1
    crowd: np.ndarray  # (M,) bool
    area: np.ndarray  # (M,) float64: of the segmentation
    masks: "Masks | None" = None
    broken: tuple = ()  # ids of the annotations that were dropped

    def path(self, i):
        """Where the file of image i is."""
        return os.path.join(self.folder, os.fsdecode(self.files[i]))

    def rows(self, i):
        """The rows (n,) of image i's objects, crowds left out."""
        rows = np.arange(*self.spans[i])
        return rows[~self.crowd[rows]]

    def objects(self, i):
        """Boxes (n, 4) xyxy float64, clipped to the image, and labels (n,) of image i, crowds left out."""
        rows = self.rows(i)
        x, y, w, h = self.boxes[rows].T
        boxes = np.stack((x, y, x + w, y + h), axis=1)
        return boxes.clip(0, [self.widths[i], self.heights[i]] * 2), self.labels[rows]

    def select(self, images):
        """The same split with only these images (indices or a slice, ascending); the objects' arrays are shared."""
        fields = {name: getattr(self, name)[images] for name in ("ids", "files", "heights", "widths", "spans")}
        return self._replace(**fields)

    def positives(self):
        """(N,) number of objects that are not crowds, by image."""
        before = np.append(0, (~self.crowd).cumsum())  # how many stand before each row
        return before[self.spans[:, 1]] - before[self.spans[:, 0]]

    def summary(self):
        """The counts that a start-up prints."""
        positives, objects = self.positives(), np.diff(self.spans).sum()
        text = (
            f"{len(self.ids)} images, {positives.sum()} objects of {len(self.categories)} classes, "
            f"{objects - positives.sum()} crowds (never positive), "
            f"{(positives == 0).sum()} images without objects (negatives), "
            f"{(positives > MAX_OBJECTS).sum()} with more than {MAX_OBJECTS} (which keep {MAX_OBJECTS})"
        )
        if self.broken:
            text += f", {len(self.broken)} broken objects dropped (annotation ids {list(self.broken[:5])})"
        return text


class View(NamedTuple):
    """How an image is seen: the source region (whole pixels), its size in the network's input, and the flip."""

    left: int
    top: int
    right: int
    bottom: int
    width: int
    height: int
    flip: bool = False

    def region(self):
        """(2,) float32: the image's (height, width) in the network's input."""
        return torch.tensor([self.height, self.width], dtype=torch.float32)

    def boxes(self, boxes):
        """Source boxes (n, 4) xyxy -> boxes (n, 4) in the network's input, clipped to the region."""
        scale = np.array([self.width / (self.right - self.left), self.height / (self.bottom - self.top)] * 2)
        boxes = (boxes - [self.left, self.top] * 2) * scale
        boxes = boxes.clip(0, [self.width, self.height] * 2)
        if self.flip:
            boxes[:, [0, 2]] = self.width - boxes[:, [2, 0]]
        return boxes

    def image(self, image, size):
        """PIL image -> uint8 (3, S, S), channels last in memory: the region, resized at once and padded."""
        region = np.array(image.crop((self.left, self.top, self.right, self.bottom)))  # (h, w, 3)
        # The batch's dimension first: only then are all strides those of channels_last, and the resize 4 times as fast.
        region = torch.from_numpy(region)[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
        # Departure: the authors' bilinear resize is not antialiased.
        region = F.interpolate(region, (self.height, self.width), mode="bilinear", antialias=True)[0]
        region = region.permute(1, 2, 0)  # (h', w', 3)
        canvas = torch.empty(size, size, 3, dtype=torch.uint8)
        canvas[: self.height, : self.width] = region.flip(1) if self.flip else region
        pad = PAD.repeat(size, 1)  # (S, 3): rows are copied faster than pixels
        canvas[self.height :], canvas[: self.height, self.width :] = pad, pad[self.width :]
        return canvas.permute(2, 0, 1)


def full_view(height, width, size, scale=1.0):
    """The whole image, its long side scaled to round(scale * size): what a test sees (authors' input_utils.py)."""
    ratio = round(scale * size) / max(height, width)
    return View(0, 0, width, height, max(round(width * ratio), 1), max(round(height * ratio), 1))


def draw_view(rng, height, width, size, jitter, flip=True):
    """Scale jitter (paper section 5.1, protocols A to C; authors' input_utils.py), drawn from a numpy Generator.

    The image is scaled as in `full_view` by a scale from U(jitter); a size x size window is cut from it at a
    uniform integer offset. Only the source pixels under the window are kept, to be resized once.
    Departure: their edges are rounded to whole pixels, so that the window moves by half of one at most.
    """
    full = full_view(height, width, size, rng.uniform(*jitter))
    edges = []
    for scaled, source in ((full.width, width), (full.height, height)):
        offset = rng.integers(0, max(scaled - size, 0), endpoint=True)
        start = min(round(offset * source / scaled), source - 1)
        stop = round((offset + min(scaled, size)) * source / scaled)
        edges.append((start, max(stop, start + 1)))
    (left, right), (top, bottom) = edges
    flip = bool(flip and rng.random() < 0.5)
    return View(left, top, right, bottom, min(full.width, size), min(full.height, size), flip)


def read_image(path, what):
    """A decoded PIL image in RGB; EXIF's rotation is ignored, as COCO's boxes do. Raises UserError, naming `what`."""
    try:
        image = Image.open(path)
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
            return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # PIL raises many kinds for a bad file
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise UserError(
            f"cannot decode {path} ({what}): {reason}; replace the file (python data.py --data FOLDER --check lists "
            "all bad ones of a data set)"
        ) from None


def read_checked(annotations, i):
    """Image i of a split, of the size that the json states; else UserError."""
    what = f"image id {annotations.ids[i]}"
    image = read_image(annotations.path(i), what)
    stated = (annotations.widths[i], annotations.heights[i])
    if image.size != stated:
        raise UserError(
            f"{annotations.path(i)} ({what}) is {image.width}x{image.height} pixels, but the json says "
            f"{stated[0]}x{stated[1]}; replace the file or correct the json"
        )
    return image


@functools.lru_cache(maxsize=4)
def permutation(seed, epoch, count):
    """The order of an epoch's images: (count,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class TrainSet(Dataset):
    """Training samples as a pure function of (seed, n): dataset[n] is image perm(n // N)[n mod N] of epoch n // N.

    A sample is a dict: image uint8 (3, S, S) RGB; boxes (100, 4) float32 xyxy and labels (100,) int64, padded
    with zeros and -1; region (2,) float32, the image's (height, width) in the square; noise, 32 random bits from which
    the model draws anchors and RoIs; and, if the annotations have masks, masks (100, 112, 112) uint8, each inside its
    own clipped box. Left out are only crowds, boxes outside the window, and what is drawn to be above 100.
    """

    def __init__(self, annotations, size, jitter, flip=True, seed=0):
        self.annotations, self.size, self.jitter, self.flip, self.seed = annotations, size, jitter, flip, seed

    def image_of(self, n):
        """(epoch, index of the image) of sample n."""
        epoch, place = divmod(n, len(self.annotations.ids))
        return epoch, int(permutation(self.seed, epoch, len(self.annotations.ids))[place])

    def __getitem__(self, n):
        epoch, i = self.image_of(n)
        a = self.annotations
        # image + 1, because (seed, epoch, 0) is the same seed to numpy as (seed, epoch).
        rng = np.random.default_rng((self.seed, epoch, i + 1))
        view = draw_view(rng, int(a.heights[i]), int(a.widths[i]), self.size, self.jitter, self.flip)
        source_boxes, labels = a.objects(i)
        boxes = view.boxes(source_boxes).astype(np.float32)  # before the comparison: rounding can close a sliver
        kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1))
        if len(kept) > MAX_OBJECTS:
            kept = np.sort(rng.choice(kept, MAX_OBJECTS, replace=False))
        noise = int(np.random.SeedSequence((self.seed, n)).generate_state(1)[0])
        sample = {"boxes": torch.zeros(MAX_OBJECTS, 4), "labels": torch.full((MAX_OBJECTS,), -1), "noise": noise}
        sample["boxes"][: len(kept)] = torch.from_numpy(boxes[kept])
        sample["labels"][: len(kept)] = torch.from_numpy(labels[kept])
        if a.masks is not None:
            sample["masks"] = torch.zeros(MAX_OBJECTS, MASK_SIDE, MASK_SIDE, dtype=torch.uint8)
            rows = a.rows(i)[kept]
            visible = source_boxes[kept].clip([view.left, view.top] * 2, [view.right, view.bottom] * 2)
            for k, (row, box) in enumerate(zip(rows, visible)):
                mask = a.masks.crop(row, box, int(a.heights[i]))
                sample["masks"][k] = torch.from_numpy(mask[:, ::-1].copy() if view.flip else mask)
        return sample | {"image": view.image(read_checked(a, i), self.size), "region": view.region()}


class EvalSet(Dataset):
    """The whole images of a split: a dict of image uint8 (3, S, S), region (2,) float32: the image's (height, width) in
    it, and index."""

    def __init__(self, annotations, size):
        self.annotations, self.size = annotations, size

    def __getitem__(self, i):
        image = read_checked(self.annotations, i)
        view = full_view(image.height, image.width, self.size)
        return {"image": view.image(image, self.size), "region": view.region(), "index": i}


def micro_batches(first, last, batch, micro, rank=0, world=1):
    """Sample numbers of this rank's micro-batches of the steps first..last-1.

    Step k has k * batch to (k + 1) * batch - 1, whatever the ranks and the micro-batch, and its t-th micro-step's
    world * micro samples are contiguous.
    """
    for step in range(first, last):
        for start in range(step * batch + rank * micro, (step + 1) * batch, world * micro):
            yield list(range(start, start + micro))


def collate(samples):
    """A batch of samples, stacked; the images stay channels last in memory, as the network wants them."""
    batch = default_collate([sample | {"image": sample["image"].permute(1, 2, 0)} for sample in samples])
    return batch | {"image": batch["image"].permute(0, 3, 1, 2)}  # (B, 3, S, S)


def leave_signals_to_main(worker):
    """Ctrl-C and SIGTERM go to a whole process group: out of it, a worker lives until the main process is done."""
    os.setpgrp()


def make_loader(dataset, batches, workers, pin_memory=False):
    """A DataLoader over an iterable of lists of sample numbers."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_main,
        # Forked workers share the annotations; Python 3.14's default would copy them into each.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


# A mistake of the user's is a sentence.


class UserError(Exception):
    """A mistake in the arguments or a fault in the data: one sentence that says what, where and what to do."""


def make_folder(path):
    """Make a folder for output, and its parents; a UserError where that, or writing there, can't be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"the folder {path} can't be made or written ({error.strerror}); give another --out") from None
    return Path(path)


@contextlib.contextmanager
def one_sentence():
    """What uses data runs inside: a UserError, a dead data worker or a full device is one sentence and exit code 2."""
    try:
        yield
    except UserError as error:
        # A DataLoader worker puts its traceback before the sentence, which follows the exception's name.
        sentence = str(error).rpartition("UserError: ")[2].strip()
    except torch.OutOfMemoryError as error:
        sentence = f"{str(error).splitlines()[0]} Free the device, or use a smaller --micro-batch"
    except RuntimeError as error:  # a dead worker's is raised by a signal, wherever the main process then is
        if "DataLoader worker (pid" not in str(error):
            raise
        reason = str(error).splitlines()[0].strip()
        sentence = f"{reason} Most often memory ran out, the machine's or /dev/shm: use fewer --workers"
    else:
        return
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# Reading and checking: a json becomes Annotations once, where it enters.


def split_paths(root, split):
    """(annotation file, image folder) of a split, in COCO's layout."""
    return Path(root) / "annotations" / f"instances_{split}.json", Path(root) / split


HELP = """Get COCO with
  mkdir -p {root} && cd {root}
  wget http://images.cocodataset.org/zips/train2017.zip && unzip -q train2017.zip
  wget http://images.cocodataset.org/zips/val2017.zip && unzip -q val2017.zip
  wget http://images.cocodataset.org/annotations/annotations_trainval2017.zip && unzip -q annotations_trainval2017.zip
or start without it, on generated images:
  python train.py --arch tiny --size 128 --protocol toy --data shapes"""


def require_split(root, split):
    """The paths of a split, which must exist; else a UserError that names all missing ones and how to get them."""
    path, folder = split_paths(root, split)
    missing = " and ".join(str(p) for p, there in ((folder, folder.is_dir()), (path, path.is_file())) if not there)
    if missing:
        raise UserError(f"{missing} not found. {HELP.format(root=root)}")
    return path, folder


def load_annotations(root, split=TRAIN, masks=False):
    """Read and check one split of a COCO folder: root/annotations/instances_{split}.json and root/{split}/.

    With `masks`, segmentations are kept, and an object without one is broken. A large json is parsed only once
    with them and once without.
    Raises UserError where a path is missing, the json isn't COCO's, an id is unknown or stands twice, a file
    is missing, or more than 1 % of the objects are broken. Fewer broken objects are dropped and counted.
    """
    path, folder = require_split(root, split)
    read = read_packed if path.stat().st_size >= PACKED_FROM else parse_annotations
    annotations = read(path, folder, masks)
    check_files(annotations, path)
    return annotations


def parse_annotations(path, folder, masks):
    """The Annotations in a json file; see `load_annotations`."""
    images, objects, categories = read_coco(path)
    images, ids = by_id(images, "image", path)
    categories, category_ids = by_id(categories, "category", path)
    check_unique([o.setdefault("id", f"number {k}") for k, o in enumerate(objects)], "annotation", path)
    heights, widths = column(images, "height", "image", path), column(images, "width", "image", path)
    for image in images:
        if min(image["height"], image["width"]) <= 0:
            raise UserError(f"{path}: image id {image['id']} has no positive height and width; correct them")
    owner, label = places(objects, "image_id", ids, path), places(objects, "category_id", category_ids, path)

    sizes = np.stack((heights, widths), axis=1)[owner].tolist()
    sound = np.array([sound_object(o, size, masks) for o, size in zip(objects, sizes)], dtype=bool)
    broken = tuple(objects[k]["id"] for k in np.flatnonzero(~sound))
    if len(broken) > MAX_BROKEN * len(objects):
        raise UserError(
            f"{path}: {len(broken)} of {len(objects)} objects are broken, such as annotation ids {list(broken[:5])}: "
            "a bbox must be [x, y, width, height] in pixels (not two corners) with positive sides inside its image, "
            "a polygon [x1, y1, x2, y2, ...] 3 points, an RLE its image's size"
            + (", and every object a segmentation, without which only --head retinanet can be trained" if masks else "")
            + "; correct them"
        )
    rows = np.flatnonzero(sound)
    rows = rows[np.argsort(owner[rows], kind="stable")]
    kept = [objects[k] for k in rows]
    stops = np.bincount(owner[rows], minlength=len(ids)).cumsum()
    boxes = np.array([o["bbox"] for o in kept], dtype=np.float64).reshape(-1, 4)
    area = [o["area"] if are_numbers([o.get("area")], 1) else o["bbox"][2] * o["bbox"][3] for o in kept]
    return Annotations(
        folder=str(folder),
        categories=[(k, str(row.get("name", k))) for k, row in zip(category_ids.tolist(), categories)],
        ids=ids,
        files=np.array([file_name(image, path) for image in images]),
        heights=heights,
        widths=widths,
        spans=np.stack((np.append(0, stops[:-1]), stops), axis=1),
        boxes=boxes,
        labels=label[rows],
        crowd=np.array([bool(o.get("iscrowd")) for o in kept], dtype=bool),
        area=np.array(area, dtype=np.float64),
        masks=Masks.from_coco([o["segmentation"] for o in kept]) if masks else None,
        broken=broken,
    )


def read_coco(path):
    """(images, annotations, categories) of a json file: lists of dicts, the first and the last not empty."""
    keys = ("images", "annotations", "categories")
    try:
        content = json.loads(path.read_bytes())
        parts = [content[key] for key in keys]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a COCO annotation file ({type(error).__name__}: {error}): it must be an object with the "
            "lists images, annotations and categories; download or export it again"
        ) from None
    for key, part in zip(keys, parts):
        if not isinstance(part, list) or not all(isinstance(row, dict) for row in part):
            raise UserError(f"{path}: {key!r} is not a list of objects as COCO has it; export the file again")
        if not part and key != "annotations":
            raise UserError(f"{path} has no {key}; export it again")
    return parts


def column(rows, key, what, path):
    """(len(rows),) int64: row[key] of every row. Raises UserError at the first that has no integer there."""
    for k, row in enumerate(rows):
        value = row.get(key)
        if not isinstance(value, (int, float)) or not abs(value) < 2**53 or value != int(value):
            where = f"id {row['id']}" if "id" in row and key != "id" else f"number {k}"
            raise UserError(f"{path}: {what} {where} has {key} {value!r}, which is not an integer; correct it")
    return np.array([row[key] for row in rows], dtype=np.int64)


def by_id(rows, what, path):
    """(the rows in the order of their ids, those ids (n,) int64). Raises UserError where one stands twice."""
    ids = column(rows, "id", what, path)
    check_unique(ids.tolist(), what, path)
    order = np.argsort(ids)
    return [rows[k] for k in order], ids[order]


def check_unique(ids, what, path):
    """Raise UserError where one of the ids stands twice."""
    for value, count in collections.Counter(map(str, ids)).most_common(1):
        if count > 1:
            raise UserError(f"{path} has the {what} id {value} twice; export it again")


def places(objects, key, known, path):
    """(M,) int64: where the object's `key` is in the ascending ids `known`. Raises UserError where it isn't."""
    used = column(objects, key, "annotation", path)
    unknown = np.flatnonzero(~np.isin(used, known))
    if len(unknown):
        k = unknown[0]
        raise UserError(
            f"{path}: annotation id {objects[k]['id']} has {key} {used[k]}, which the file has no entry for; correct "
            "or remove it"
        )
    return np.searchsorted(known, used)


def file_name(image, path):
    """An image's file name, as the bytes that the system knows it by."""
    try:
        name = os.fsencode(image.get("file_name"))
    except (TypeError, UnicodeEncodeError):
        name = b""
    if not name or b"\0" in name:
        raise UserError(f"{path}: image id {image['id']} has the file_name {image.get('file_name')!r}; correct it")
    return name


def are_numbers(values, count):
    """Whether this is a list of that many finite numbers, of a size that pixels can have."""
    sound = isinstance(values, list) and len(values) == count
    return sound and all(isinstance(v, (int, float)) and abs(v) < 1e9 for v in values)  # NaN compares false


def sound_object(o, size, masks):
    """Whether an object has a box of positive sides, at least half of it in its image of that (height, width), and a
    sound mask, which only has to be there if `masks` are needed."""
    if not are_numbers(o.get("bbox"), 4):
        return False
    x, y, w, h = o["bbox"]
    seen_w, seen_h = min(x + w, size[1]) - max(x, 0), min(y + h, size[0]) - max(y, 0)
    if w <= 0 or h <= 0 or max(seen_w, 0) * max(seen_h, 0) < w * h / 2:
        return False
    segmentation = o.get("segmentation")
    if not segmentation:
        return not masks
    return (sound_runs if isinstance(segmentation, dict) else sound_polygons)(segmentation, size, masks)


def sound_runs(segmentation, size, masks):
    """Whether these are run lengths of the image's (height, width); what they say is only read if `masks` need it."""
    try:
        if segmentation["size"] != list(size) or not masks:
            return segmentation["size"] == list(size) and "counts" in segmentation
        runs = run_lengths(segmentation["counts"])
        return runs.ndim == 1 and runs.min() >= 0 and runs.sum() == size[0] * size[1]
    except (TypeError, ValueError, KeyError, OverflowError):
        return False


def sound_polygons(segmentation, size, masks):
    """Whether these are polygons of 3 points or more, at most an image's side outside of it."""
    side = max(size)
    try:
        for p in segmentation:
            if len(p) < 6 or len(p) % 2 or not math.isfinite(sum(p)) or min(p) < -side or max(p) > 2 * side:
                return False
        return True
    except (TypeError, OverflowError):
        return False


def check_files(annotations, path):
    """Raise UserError unless every image's file is there."""
    folder = annotations.folder
    present = {os.fsencode(entry.name) for entry in os.scandir(folder)}
    for i, name in enumerate(annotations.files.tolist()):
        if name not in present and not os.path.isfile(annotations.path(i)):  # it may be in a folder of the folder
            raise UserError(
                f"{folder} has no file {os.fsdecode(name)!r}, which {path} names for image id {annotations.ids[i]}; "
                "unpack the images there again"
            )


# A large json's packed form: the arrays of its Annotations in one file, to be memory-mapped.


def read_packed(path, folder, masks):
    """`parse_annotations` once, which says what it takes; later its packed form, while the json stays as it is."""
    stat, caches = path.stat(), cache_files(path, masks)
    stamp = [CACHE_VERSION, stat.st_size, stat.st_mtime_ns]
    for cache in caches:
        annotations = open_cache(cache, folder, stamp)
        if annotations is not None:
            return annotations
    print(f"reading {path}, once: its packed form will be kept", flush=True)
    began = time.perf_counter()
    annotations = parse_annotations(path, folder, masks)
    kept = next((cache for cache in caches if write_cache(cache, annotations, stamp)), None)
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak /= 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    where = f"packed into {kept}" if kept else "no folder for its packed form is writable"
    print(f"read {path} in {seconds:.0f} s, {peak:.1f} GiB of memory at most; {where}", flush=True)
    mapped = kept and open_cache(kept, folder, stamp)  # which lets the parsed arrays go
    return mapped or annotations


def cache_files(path, masks):
    """Where the packed form of a json may be: beside it, or in the user's cache."""
    name = f"{path.stem}.{'masks' if masks else 'boxes'}.packed"
    own = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [path.with_name(name), Path(home, "spinenet", own, name)]


def write_cache(cache, annotations, stamp):
    """Write Annotations to a file, all or nothing; whether that worked."""
    fields = annotations._asdict() | (annotations.masks._asdict() if annotations.masks else {})
    fields |= {"masks": None, "files": annotations.files.view(np.uint8), "stamp": stamp}  # torch has no arrays of text
    fields = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in fields.items()}
    draft = cache.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(fields, draft)
        os.replace(draft, cache)
        return True
    except (OSError, RuntimeError):  # a full disk is a RuntimeError to torch
        with contextlib.suppress(OSError):
            draft.unlink()
        return False


def open_cache(cache, folder, stamp):
    """The Annotations in a cache, memory-mapped; None where there is none, or not a whole one of this stamp."""
    try:
        fields = torch.load(cache, mmap=True, weights_only=True)
        if fields.pop("stamp") != stamp:
            return None
        fields = {key: v.numpy() if isinstance(v, torch.Tensor) else v for key, v in fields.items()}
        if "rle" in fields:
            fields["masks"] = Masks(*(fields.pop(key) for key in Masks._fields))
        fields["files"] = fields["files"].view(f"S{fields['files'].size // len(fields['ids'])}")
        return Annotations(**fields | {"folder": str(folder)})
    except Exception:  # whatever the file holds, the json is still there to be read
        return None


# Masks: packed, and cropped to their boxes.


class Masks(NamedTuple):
    """The segmentations of M objects, packed.

    Those of object m are the parts first_part[m] to first_part[m + 1], and the numbers of part p are first_value[p] to
    first_value[p + 1]: a polygon's x, y, x, y, ... in image pixels; or, where rle[m], run lengths in column-major
    order, background first.
    """

    values: np.ndarray  # (V,) float64
    first_value: np.ndarray  # (P + 1,) int64
    first_part: np.ndarray  # (M + 1,) int64
    rle: np.ndarray  # (M,) bool

    @classmethod
    def from_coco(cls, segmentations):
        """From COCO's form: lists of polygons, or dicts with run lengths of either kind."""
        parts = [[run_lengths(s["counts"])] if isinstance(s, dict) else s for s in segmentations]
        flat = [np.asarray(p, dtype=np.float64) for one in parts for p in one]
        return cls(
            np.concatenate([np.zeros(0), *flat]),
            np.cumsum([0] + [len(p) for p in flat]),
            np.cumsum([0] + [len(one) for one in parts]),
            np.array([isinstance(s, dict) for s in segmentations], dtype=bool),
        )

    def parts(self, m):
        """The parts of object m: polygons (2 n,), or run lengths (n,)."""
        return [self.values[slice(*self.first_value[p : p + 2])] for p in range(*self.first_part[m : m + 2])]

    def coco(self, m, height, width):
        """The segmentation of object m in COCO's form."""
        parts = [part.tolist() for part in self.parts(m)]
        return {"size": [height, width], "counts": [int(run) for run in parts[0]]} if self.rle[m] else parts

    def crop(self, m, box, height):
        """Object m inside a box (4,) xyxy of its image: (112, 112) uint8, 1 where a cell's centre is in the object.

        Read straight from the points or runs: no bitmap of the image is made, whatever its size or the box's.
        """
        centres = (np.arange(MASK_SIDE) + 0.5) / MASK_SIDE
        x, y = box[0] + centres * (box[2] - box[0]), box[1] + centres * (box[3] - box[1])
        if self.rle[m]:  # odd runs are the object's
            pixels = x.astype(np.int64) * height + y.astype(np.int64)[:, None]
            return (np.searchsorted(self.parts(m)[0].cumsum(), pixels, side="right") % 2).astype(np.uint8)
        mask = np.zeros((MASK_SIDE, MASK_SIDE), dtype=np.uint8)
        for polygon in self.parts(m):
            mask |= inside_polygon(polygon.reshape(-1, 2), x, y)
        return mask


def run_lengths(counts):
    """(n,) int64 from COCO's run lengths: a list of them, or their compressed string.

    The string's characters, less 48, are groups of 5 bits, low ones first, 32 marking that more follow, as a signed
    number: from the fourth run on, the difference to the run before the last. Source: pycocotools' maskApi.c.
    """
    if not isinstance(counts, (str, bytes)):
        return np.asarray(counts, dtype=np.int64)
    code = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((code & 32) == 0)  # the last character of each number, and its first
    starts = np.concatenate(([0], ends + 1))[: len(ends)]
    place = np.arange(len(code)) - np.repeat(starts, np.diff(starts, append=len(code)))  # of a character in its number
    values = np.add.reduceat((code & 31) << (5 * place), starts) if len(ends) else code[:0]
    values -= ((code[ends] & 16) > 0).astype(np.int64) << (5 * (ends - starts + 1))  # the sign
    for start in (1, 2):
        values[start::2] = values[start::2].cumsum()
    return values


def inside_polygon(points, x, y):
    """(len(y), len(x)) uint8: 1 where (x, y) is inside the polygon (n, 2), by the parity of the edges to its left."""
    ends = np.roll(points, -1, axis=0)
    edge, row = np.nonzero((points[:, 1:] <= y) != (ends[:, 1:] <= y))  # the edges that cross each row
    (x0, y0), (x1, y1) = points[edge].T, ends[edge].T
    crossing = x0 + (y[row] - y0) * (x1 - x0) / (y1 - y0)
    column = np.searchsorted(x, crossing)  # the first x that it lies left of
    # Counts by row and column; the last column is of the crossings that no x lies right of.
    toggles = np.bincount(row * (len(x) + 1) + column, minlength=len(y) * (len(x) + 1)).reshape(len(y), -1)
    return (toggles[:, :-1].cumsum(axis=1) % 2).astype(np.uint8)


# The generated set. Ranges are uniform unless said otherwise; the README states them.
SHAPES = {
    "images": {TRAIN: 600, VAL: 200},
    "classes": {1: "disc", 2: "square", 4: "triangle", 5: "star", 9: "cross", 12: "ring"},  # by original id
    "short_side": (160, 208),  # pixels
    "aspect": (1.0, 1.1, 1.23),  # long side / short side, one of these; sides lie in 160..256
    "objects": (1, 6),  # per image
    "object_side": (0.2, 0.85),  # longer side / the image's short side, log-uniform
    "stretch": (0.8, 1.25),  # of the width against the height
    "turn": (-20, 20),  # degrees
    "hue_spread": 12,  # degrees, standard deviation around the class's typical hue; those are 60 degrees apart
    "visible": 0.6,  # share of an object's pixels that stays uncovered
    "crowd_share": 0.08,  # of the images: a crowd of 8 to 14 small outlines of one class, a single RLE mask
}
# (n, corners): each corner is (direction in degrees, distance), and stands n times around the centre. A ring is a disc
# with a hole.
OUTLINES = {
    "disc": (40, [(0, 1)]), "square": (4, [(45, 1)]), "triangle": (3, [(-90, 1)]), "ring": (40, [(0, 1)]),
    "star": (5, [(-90, 1), (-54, 0.4)]), "cross": (4, [(-18.4, 1), (18.4, 1), (45, 0.447)]),
}  # fmt: skip


def random_outline(rng, kind, side, size):
    """A polygon (n, 2) in pixels, of longer side `side`, turned, stretched and placed inside (width, height)."""
    repeats, corners = OUTLINES[kind]
    direction, distance = np.array(corners).T
    angle = np.deg2rad(rng.uniform(*SHAPES["turn"]) + direction + np.arange(repeats)[:, None] * 360 / repeats)
    stretch = rng.uniform(*SHAPES["stretch"]) ** 0.5
    polygon = np.stack((distance * np.cos(angle) * stretch, distance * np.sin(angle) / stretch), axis=-1).reshape(-1, 2)
    polygon = (polygon - polygon.min(axis=0)) * (side / np.ptp(polygon, axis=0).max())
    return polygon + rng.uniform(0, 1, 2) * (size - polygon.max(axis=0))


def rasterize(polygon, size):
    """(H, W) bool: the pixels inside a polygon (n, 2), as pycocotools sees them."""
    codes = coco_mask.frPyObjects([polygon.ravel().tolist()], int(size[1]), int(size[0]))
    return coco_mask.decode(codes)[..., 0].astype(bool)


def random_object(rng, kind, side, size, crowd):
    """(mask (H, W) bool, polygon (n, 2), or None where only a run-length code can tell the mask)."""
    if crowd:
        corner, room = rng.uniform(0, 1, 2) * (size - side), np.array([side, side])
        parts = [random_outline(rng, kind, side / 5, room) + corner for _ in range(rng.integers(8, 15))]
        return np.any([rasterize(part, size) for part in parts], axis=0), None
    polygon = random_outline(rng, kind, side, size).round(2)
    if kind == "ring":
        middle = polygon.mean(axis=0)
        return rasterize(polygon, size) & ~rasterize((polygon + middle) / 2, size), None
    return rasterize(polygon, size), polygon


def random_ground(rng, size):
    """(H, W, 3) float64: blotches, stripes and grain."""
    blotches = rng.integers(60, 200, (*rng.integers(3, 9, 2), 3), dtype=np.uint8)
    image = np.array(Image.fromarray(blotches).resize(size.tolist(), Image.Resampling.BICUBIC), dtype=np.float64)
    image = 0.6 * image.mean(axis=2, keepdims=True) + 0.4 * image
    y, x = np.mgrid[: size[1], : size[0]]
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 30)
    image += rng.uniform(0, 22) * np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)[..., None]
    return image + rng.normal(0, rng.uniform(2, 12), image.shape)


def random_scene(rng):
    """An image (H, W, 3) uint8 and its objects: dicts of category_id, iscrowd, mask (H, W) bool, polygon or None,
    and whole: the number of its pixels before others came to cover it."""
    short = rng.integers(*SHAPES["short_side"], endpoint=True)
    size = np.array([int(short * rng.choice(SHAPES["aspect"])), short])[:: rng.choice((1, 1, -1))]  # width, height
    image = random_ground(rng, size)
    objects, ids = [], list(SHAPES["classes"])
    count = rng.integers(*SHAPES["objects"], endpoint=True)
    for k in range(count + (rng.random() < SHAPES["crowd_share"])):
        crowd, category = k == count, int(rng.choice(ids))
        side = short * (0.5 if crowd else np.exp(rng.uniform(*np.log(SHAPES["object_side"]))))
        for _ in range(20):  # other places, until enough of what lies below stays visible
            mask, polygon = random_object(rng, SHAPES["classes"][category], side, size, crowd)
            if all((o["mask"] & ~mask).sum() >= SHAPES["visible"] * o["whole"] for o in objects):
                break
        else:
            continue
        for o in objects:
            if (o["mask"] & mask).any():
                o["mask"], o["polygon"] = o["mask"] & ~mask, None
        hue = ids.index(category) / len(ids) + rng.normal(0, SHAPES["hue_spread"]) / 360
        colour = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.55, 0.95), rng.uniform(0.6, 0.95))) * 255
        shade = 1 + rng.choice((-0.12, 0.12)) * np.linspace(-1, 1, size[0])[np.nonzero(mask)[1]]
        image[mask] = colour * shade[:, None] + rng.normal(0, 6, (len(shade), 3))
        new = {"category_id": category, "iscrowd": int(crowd), "mask": mask, "whole": mask.sum(), "polygon": polygon}
        objects.append(new)
    return image.clip(0, 255).astype(np.uint8), objects


def coco_object(o):
    """A scene's object as COCO writes it: a polygon where it suffices, else uncompressed run lengths."""
    code = coco_mask.encode(np.asfortranarray(o["mask"], dtype=np.uint8))
    if o["polygon"] is not None:
        low, high = o["polygon"].min(axis=0), o["polygon"].max(axis=0)
        segmentation, box = [o["polygon"].ravel().tolist()], [*low, *(high - low)]
    else:
        segmentation = {"size": list(o["mask"].shape), "counts": run_lengths(code["counts"]).tolist()}
        box = coco_mask.toBbox(code)
    row = {"bbox": [round(float(v), 2) for v in box], "area": float(coco_mask.area(code))}
    return {k: o[k] for k in ("category_id", "iscrowd")} | row | {"segmentation": segmentation}


def write_shapes(root):
    """Write the generated set under `root`, in COCO's layout, unless it is there; the same files at every call."""
    if all(split_paths(root, split)[0].exists() for split in SHAPES["images"]):
        return
    if Path(root).exists():
        raise UserError(f"{root} exists, but is not the generated set; remove it, and it will be written again")
    print(f"writing the generated shapes to {root}", flush=True)
    draft = Path(f"{root}.{uuid.uuid4().hex}.tmp")
    for s, (split, count) in enumerate(SHAPES["images"].items()):
        path, folder = split_paths(draft, split)
        make_folder(folder)
        make_folder(path.parent)
        images, annotations = [], []
        for k in range(count):
            scene, objects = random_scene(np.random.default_rng((0, s, k)))
            image_id = (s + 1) * 10000 + 7 * k
            name = f"{image_id:012d}.jpg"
            Image.fromarray(scene).save(folder / name, quality=92)
            images.append({"id": image_id, "file_name": name, "height": scene.shape[0], "width": scene.shape[1]})
            for o in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id} | coco_object(o))
        categories = [{"id": k, "name": name} for k, name in SHAPES["classes"].items()]
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        path.write_text(json.dumps(content))
    try:
        os.rename(draft, root)
    except OSError:
        shutil.rmtree(draft)
        if not Path(root).exists():  # else another process has just put its own, equal copy there
            raise


def resolve_root(data):
    """The folder that `--data` names; for the name `shapes`, the generated set in data/shapes, written on first use."""
    if data != "shapes":
        return Path(data)
    root = Path("data/shapes")
    write_shapes(root)
    return root


# The command line.


def show(dataset, count, out):
    """Write the first `count` augmented samples, with their boxes and masks, as PNG files."""
    from evaluate import draw_objects  # only here: evaluate.py imports this file

    make_folder(out)
    names = [name for _, name in dataset.annotations.categories]
    for n in range(count):
        sample = dataset[n]
        real = sample["labels"] >= 0
        masks = sample["masks"][real] if "masks" in sample else None
        drawn = draw_objects(sample["image"], sample["boxes"][real], sample["labels"][real], names, masks=masks)
        Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(out / f"{n:03d}.png")
    print(f"wrote {count} samples to {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Look at a data set as training sees it.")
    add = parser.add_argument
    add("--data", default="data/coco", help="a folder in COCO's layout, or `shapes` (default data/coco)")
    add("--split", default=TRAIN, help=f"default {TRAIN}")
    add("--masks", action="store_true", help="with masks, as Mask R-CNN is trained")
    add("--check", action="store_true", help="decode every image and list the bad ones")
    add("--show", type=int, default=0, metavar="N", help="write N augmented samples with their objects")
    add("--size", type=int, default=640, help="side of the network's input (default 640)")
    add("--jitter", type=float, nargs=2, default=(0.5, 2.0), metavar=("LOW", "HIGH"))
    add("--out", type=Path, default=Path("runs/show"), help="where --show writes (default runs/show)")
    args = parser.parse_args(argv)
    if args.size <= 0 or args.show < 0 or not 0 < args.jitter[0] <= args.jitter[1] < math.inf:
        raise UserError("--size must be positive, --show not negative, and --jitter 0 < LOW <= HIGH")

    annotations = load_annotations(resolve_root(args.data), args.split, args.masks)
    print(f"{args.split}: {annotations.summary()}")
    dataset = TrainSet(annotations, args.size, args.jitter)
    if args.show:
        show(dataset, args.show, args.out)
    if args.check:
        bad = []
        for i in tqdm(range(len(annotations.ids)), desc="decoding", disable=None):
            try:
                read_checked(annotations, i)
            except UserError as error:
                bad.append(str(error))
        print("\n".join(bad + [f"{len(bad)} of {len(annotations.ids)} images are bad"]))
        if bad:
            raise SystemExit(2)


if __name__ == "__main__":
    with one_sentence():
        main()
