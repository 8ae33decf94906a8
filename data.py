"""How does a COCO folder become batches? Packed annotations, scale jitter, the samples, and who gets which.

The way from files to batches is the first part, to `make_loader`. What it stands on follows, to be looked up: reading
and checking the json, masks, pictures, the generated set `shapes`, the command line.

Dimensions: N images, M objects, B images of a batch, S side of the network's square input, G = 100 targets.
Boxes are xyxy float pixels, but in the json files and `Annotations.boxes`, which are COCO's xywh.

    python data.py --data D --check         decode every image, list the bad ones
    python data.py --data D --show 8        write augmented training samples with their boxes (--masks: and masks)
"""

import argparse
import contextlib
import functools
import json
import math
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

MAX_OBJECTS = 100  # G: targets per image (authors' yaml, max_num_instances)
MASK_SIDE = 112  # cells of a target's mask, per side of its box (authors' yaml, gt_mask_size)
PAD = torch.tensor((124, 116, 104), dtype=torch.uint8)  # the mean colour: 0 after normalization, within rounding
MIN_SIDE = 0.01  # pixels: what the window leaves of an object's box below this is no object
MAX_BROKEN = 0.01  # a larger share of broken objects means that the format is wrong, not an object
TRAIN, VAL = "train2017", "val2017"
PACKED_FROM = 50e6  # bytes of a json, from which its packed form is kept
CACHE_VERSION = 2  # of that form

HELP = """Get COCO with
  mkdir -p {root} && cd {root}
  wget http://images.cocodataset.org/zips/train2017.zip && unzip -q train2017.zip
  wget http://images.cocodataset.org/zips/val2017.zip && unzip -q val2017.zip
  wget http://images.cocodataset.org/annotations/annotations_trainval2017.zip && unzip -q annotations_trainval2017.zip
or start without it, on generated images:
  python train.py --arch tiny --size 128 --protocol toy --data shapes"""


class UserError(Exception):
    """A mistake in the arguments or a fault in the data: one sentence that says what, where and what to do."""


def make_folder(path):
    """Make a folder for output, and its parents; a UserError where that can't be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} can't be made ({error.strerror}); give another folder") from None
    return Path(path)


@contextlib.contextmanager
def one_sentence():
    """Every script's main runs inside: a UserError, or a dead data worker, ends it with a sentence and exit code 2."""
    try:
        yield
    except UserError as error:
        # A DataLoader worker puts its traceback before the sentence, which follows the exception's name.
        sentence = str(error).rpartition("UserError: ")[2].strip()
    except RuntimeError as error:  # a dead worker's is raised by a signal, wherever the main process then is
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0].strip()
        sentence = f"{reason} Most often memory ran out, the machine's or /dev/shm: use fewer --workers, and --resume"
    else:
        return
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Annotations(NamedTuple):
    """One split as packed arrays, which forked workers share: no Python object is kept per annotation.

    The objects of image i are the rows first[i] to first[i + 1] of boxes, labels, crowd and area, and of masks.
    """

    folder: str
    categories: list  # (original id, name) in the order of their ids; label k means categories[k]
    ids: np.ndarray  # (N,) int64, ascending
    files: np.ndarray  # (N,) bytes, relative to folder
    heights: np.ndarray  # (N,) int64
    widths: np.ndarray  # (N,) int64
    first: np.ndarray  # (N + 1,) int64
    boxes: np.ndarray  # (M, 4) float64 xywh, as the json has them
    labels: np.ndarray  # (M,) int64 in 0..K-1
    crowd: np.ndarray  # (M,) bool
    area: np.ndarray  # (M,) float64: of the segmentation
    masks: "Masks | None" = None
    broken: tuple = ()  # ids of the annotations that were dropped

    def path(self, i):
        """Where the file of image i is."""
        return os.path.join(self.folder, os.fsdecode(bytes(self.files[i])))

    def rows(self, i):
        """The rows (n,) of image i's objects, crowds left out."""
        rows = np.arange(self.first[i], self.first[i + 1])
        return rows[~self.crowd[rows]]

    def objects(self, i):
        """Boxes (n, 4) xyxy float64, clipped to the image, and labels (n,) of image i, crowds left out."""
        rows = self.rows(i)
        x, y, w, h = self.boxes[rows].T
        boxes = np.stack((x, y, x + w, y + h), axis=1)
        return boxes.clip(0, [self.widths[i], self.heights[i]] * 2), self.labels[rows]

    def first_images(self, limit):
        """The same split with only the first `limit` images, or, for None, all."""
        return self if limit is None else self.select(range(len(self.ids))[:limit])

    def select(self, images):
        """The same split with only these images (indices, ascending)."""
        images = np.asarray(images, dtype=np.int64)
        rows, first = ragged_rows(self.first, images)
        fields = {name: getattr(self, name)[images] for name in ("ids", "files", "heights", "widths")}
        fields |= {name: getattr(self, name)[rows] for name in ("boxes", "labels", "crowd", "area")}
        return self._replace(first=first, masks=self.masks and self.masks.select(rows), **fields)

    def positives(self):
        """(N,) number of objects that are not crowds, by image."""
        return np.diff(np.concatenate(([0], (~self.crowd).cumsum()))[self.first])

    def summary(self):
        """The counts that a start-up prints."""
        positives = self.positives()
        text = (
            f"{len(self.ids)} images, {positives.sum()} objects of {len(self.categories)} classes, "
            f"{self.crowd.sum()} crowds (never positive), "
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

    def clip(self, boxes):
        """Source boxes (n, 4) xyxy, clipped to the source region."""
        return boxes.clip([self.left, self.top] * 2, [self.right, self.bottom] * 2)

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
        # channels_last in all strides, the batch's too: without, the resize takes up to 4 times as long.
        region = torch.from_numpy(region)[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
        # Departure: the authors' bilinear resize is not antialiased.
        region = F.interpolate(region, (self.height, self.width), mode="bilinear", antialias=True)[0]
        region = region.permute(1, 2, 0)  # (h', w', 3)
        canvas = torch.empty(size, size, 3, dtype=torch.uint8)
        canvas[: self.height, : self.width] = region.flip(1) if self.flip else region
        canvas[self.height :] = canvas[: self.height, self.width :] = PAD
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
            f"cannot decode {path} ({what}): {reason}; replace the file, or list all bad ones with "
            "python data.py --check"
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
    own clipped box. Only crowds and boxes outside the window are left out.
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
            rows, visible = a.rows(i)[kept], view.clip(source_boxes[kept])
            for k, (row, box) in enumerate(zip(rows, visible)):
                mask = a.masks.crop(row, box, int(a.heights[i]))
                sample["masks"][k] = torch.from_numpy(mask[:, ::-1].copy() if view.flip else mask)
        return sample | {"image": view.image(read_checked(a, i), self.size), "region": view.region()}


class TestSet(Dataset):
    """The images of a split as a test sees them: a dict of image uint8 (3, S, S), region (2,) float32: the image's
    (height, width) in it, and index."""

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(self, annotations, size):
        self.annotations, self.size = annotations, size

    def __getitem__(self, i):
        image = read_checked(self.annotations, i)
        view = full_view(image.height, image.width, self.size)
        return {"image": view.image(image, self.size), "region": view.region(), "index": i}


def micro_batches(first, last, batch, micro, rank=0, world=1):
    """Sample numbers of this rank's micro-batches of the steps first..last-1: step k has k * batch and on, whatever
    the ranks and the micro-batch, and its t-th micro-step's world * micro samples are contiguous."""
    for step in range(first, last):
        for start in range(step * batch + rank * micro, (step + 1) * batch, world * micro):
            yield list(range(start, start + micro))


def collate(samples):
    """A batch of samples, stacked; the images stay channels last in memory, as the network wants them."""
    batch = default_collate([sample | {"image": sample["image"].permute(1, 2, 0)} for sample in samples])
    return batch | {"image": batch["image"].permute(0, 3, 1, 2)}  # (B, 3, S, S)


def make_loader(dataset, batches, workers, pin_memory=False):
    """A DataLoader over an iterable of lists of sample numbers."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=own_process_group,
    )


def own_process_group(worker):
    """Ctrl-C and SIGTERM go to a whole process group: out of it, a worker lives until the main process is done."""
    os.setpgrp()


# Reading and checking: a json becomes Annotations once, where it enters.


def split_paths(root, split):
    """(annotation file, image folder) of a split, in COCO's layout."""
    return Path(root) / "annotations" / f"instances_{split}.json", Path(root) / split


def require_split(root, split):
    """The paths of a split, which must exist; else a UserError that names all missing ones and how to get them."""
    path, folder = split_paths(root, split)
    missing = " and ".join(str(p) for p in (folder, path) if not p.exists())
    if missing:
        raise UserError(f"{missing} not found. {HELP.format(root=root)}")
    return path, folder


def load_annotations(root, split=TRAIN, masks=False):
    """Read and check one split of a COCO folder: root/annotations/instances_{split}.json and root/{split}/.

    With `masks`, segmentations are kept, and an object without one is broken. A large json is packed at the first time,
    into a folder beside it, from which its arrays are memory-mapped from then on.
    Raises UserError where a path is missing, the json isn't COCO's, an id is unknown or stands twice, a file
    is missing, or more than 1 % of the objects are broken. Fewer broken objects are dropped and counted.
    """
    path, folder = require_split(root, split)
    caches = cache_files(path, masks) if path.stat().st_size >= PACKED_FROM else []
    opened = (open_cache(cache, folder) for cache in caches)
    annotations = next((a for a in opened if a is not None), None)
    if annotations is None:
        annotations = pack(path, folder, masks, caches) if caches else parse_annotations(path, folder, masks)
    check_files(annotations, path)
    return annotations


def pack(path, folder, masks, caches):
    """Parse a json, keep its packed form in the first of the caches that can be written, and say what it took."""
    print(f"reading {path}, once: its packed form will be kept", flush=True)
    began = time.perf_counter()
    annotations = parse_annotations(path, folder, masks)
    kept = next((cache for cache in caches if write_cache(cache, annotations)), None)
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak /= 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    where = f"packed into {kept}" if kept else "no folder for its packed form is writable"
    print(f"read {path} in {seconds:.0f} s, {peak:.1f} GiB of memory at most; {where}", flush=True)
    return (kept and open_cache(kept, folder)) or annotations


def cache_files(path, masks):
    """Where the packed form of a json may be: beside it, or in the user's cache. Their name changes with the json."""
    stat = path.stat()
    kind = "masks" if masks else "boxes"
    name = f"{path.stem}.{kind}.v{CACHE_VERSION}.{stat.st_size}.{stat.st_mtime_ns}.packed"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return [path.parent / name, home / "spinenet" / name]


def write_cache(cache, annotations):
    """Write Annotations to a file, all or nothing, in place of older ones of the same json; whether that worked."""
    content = annotations._asdict() | {"files": annotations.files.view(np.uint8)}  # torch has no arrays of text
    content["masks"] = annotations.masks and annotations.masks._asdict()
    draft = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(map_arrays(torch.from_numpy, content), draft)
        for old in cache.parent.glob(cache.name.rsplit(".", 3)[0] + ".*.packed"):
            old.unlink()
        os.replace(draft, cache)
    except (OSError, RuntimeError):  # a full disk is a RuntimeError to torch
        with contextlib.suppress(OSError):
            draft.unlink()
    return cache.is_file()


def open_cache(cache, folder):
    """The Annotations in a cache, memory-mapped; None where there is none, or not a whole one."""
    try:
        content = map_arrays(torch.Tensor.numpy, torch.load(cache, mmap=True, weights_only=True))
        content["files"] = content["files"].view(f"S{content['files'].size // len(content['ids'])}")
        content["masks"] = content["masks"] and Masks(**content["masks"])
        return Annotations(**content | {"folder": str(folder)})
    except Exception:  # whatever the file holds, the json is still there to be read
        return None


def map_arrays(function, content):
    """The same with function(a) in place of every array a of a dict and of the dicts in it."""
    if isinstance(content, dict):
        return {key: map_arrays(function, value) for key, value in content.items()}
    return function(content) if isinstance(content, (np.ndarray, torch.Tensor)) else content


def parse_annotations(path, folder, masks):
    """The Annotations in a json file; see `load_annotations`."""
    images, objects, categories = read_coco(path)

    ids = column(images, "id", "image", path)
    order = np.argsort(ids, kind="stable")
    images, ids = [images[k] for k in order], ids[order]
    heights, widths = column(images, "height", "image", path), column(images, "width", "image", path)
    category_ids = np.sort(column(categories, "id", "category", path))
    object_ids = [o.get("id", f"number {k}") for k, o in enumerate(objects)]
    owner, category = column(objects, "image_id", "object", path), column(objects, "category_id", "object", path)
    check_ids("image", ids.tolist(), owner, object_ids, path)
    check_ids("category", category_ids.tolist(), category, object_ids, path)
    check_ids("annotation", object_ids, [], [], path)
    if (np.minimum(heights, widths) <= 0).any():
        bad = ids[np.minimum(heights, widths) <= 0][0]
        raise UserError(f"{path}: image id {bad} has no positive height and width; correct them")
    names = file_names(images, ids, path)

    owner = np.searchsorted(ids, owner)
    boxes = np.array([numbers(o.get("bbox"), 4) for o in objects], dtype=np.float64).reshape(-1, 4)
    area = np.array([numbers([o.get("area")], 1)[0] for o in objects], dtype=np.float64)
    broken = broken_objects(objects, boxes, heights[owner], widths[owner], masks)
    broken_ids = tuple(object_ids[k] for k in np.flatnonzero(broken))
    if len(broken_ids) > MAX_BROKEN * len(objects):
        raise UserError(
            f"{path}: {len(broken_ids)} of {len(objects)} objects are broken, such as annotation ids "
            f"{list(broken_ids[:5])}: a bbox must be [x, y, width, height] in pixels (not two corners) with positive "
            "sides inside its image, a polygon [x1, y1, x2, y2, ...] 3 points, an RLE its image's size"
            + (", and every object a segmentation, without which only --head retinanet can be trained" if masks else "")
            + "; correct them"
        )
    rows = np.flatnonzero(~broken)
    rows = rows[np.argsort(owner[rows], kind="stable")]
    counts = np.bincount(owner[rows], minlength=len(ids))
    name_of = {c["id"]: str(c.get("name", c["id"])) for c in categories}
    return Annotations(
        folder=str(folder),
        categories=[(k, name_of[k]) for k in category_ids.tolist()],
        ids=ids,
        files=np.array([os.fsencode(name) for name in names]),
        heights=heights,
        widths=widths,
        first=np.concatenate(([0], counts.cumsum())),
        boxes=boxes[rows],
        labels=np.searchsorted(category_ids, category[rows]),
        crowd=np.array([bool(objects[k].get("iscrowd")) for k in rows], dtype=bool),
        area=np.where(np.isfinite(area), area, boxes[:, 2] * boxes[:, 3])[rows],
        masks=Masks.pack([objects[k]["segmentation"] for k in rows]) if masks else None,
        broken=broken_ids,
    )


def broken_objects(objects, boxes, heights, widths, masks):
    """(M,) bool: no finite box of positive sides at least half of which is in its image, or an unsound mask, or none
    where `masks` are needed."""
    x, y, w, h = boxes.T
    with np.errstate(invalid="ignore"):
        visible_w = (np.minimum(x + w, widths) - np.maximum(x, 0)).clip(0)
        visible_h = (np.minimum(y + h, heights) - np.maximum(y, 0)).clip(0)
        sound = (w > 0) & (h > 0) & (visible_w * visible_h >= w * h / 2)  # NaN compares false
    sizes = zip(heights.tolist(), widths.tolist())
    sound_masks = [sound_mask(o.get("segmentation"), size, masks) for o, size in zip(objects, sizes)]
    return ~(sound & np.array(sound_masks, dtype=bool))


def sound_mask(segmentation, size, needed):
    """Polygons of 3 points or more, at most an image's side outside of it, or run lengths of the image's (height,
    width), or, if not `needed`, nothing at all."""
    side = max(size)
    try:
        if isinstance(segmentation, dict):
            sized, counts = numbers(segmentation["size"], 2) == list(size), segmentation["counts"]
            if not needed or not sized:
                return sized
            runs = run_lengths(counts)
            return runs.ndim == 1 and runs.min() >= 0 and runs.sum() == size[0] * size[1]
        for p in segmentation or ():
            if len(p) < 6 or len(p) % 2 or not math.isfinite(sum(p)) or min(p) < -side or max(p) > 2 * side:
                return False
        return bool(segmentation or not needed)
    except (TypeError, ValueError, KeyError, OverflowError):
        return False


def read_coco(path):
    """(images, annotations, categories) of a json file: lists of dicts, the first and the last not empty."""
    try:
        content = json.loads(path.read_bytes())
        parts = [content[key] for key in ("images", "annotations", "categories")]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a COCO annotation file ({type(error).__name__}: {error}): it must be an object with the "
            "lists images, annotations and categories; download or export it again"
        ) from None
    for key, part in zip(("images", "annotations", "categories"), parts):
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


def numbers(values, count):
    """`values` if they are a list of `count` numbers, else as many NaN."""
    sound = isinstance(values, list) and len(values) == count
    sound = sound and all(isinstance(v, (int, float)) and abs(v) < 1e9 for v in values)
    return values if sound else [math.nan] * count


def check_ids(what, known, used, objects, path):
    """Raise UserError where an id stands twice in `known`, or an object uses one that isn't there."""
    seen = set()
    for value in known:
        if str(value) in seen:
            raise UserError(f"{path} has the {what} id {value} twice; export it again")
        seen.add(str(value))
    unknown = np.flatnonzero(~np.isin(used, known))
    if len(unknown):
        k = unknown[0]
        raise UserError(
            f"{path}: annotation id {objects[k]} has {what}_id {used[k]}, which the file's list of {what} ids "
            "doesn't have; correct or remove it"
        )


def file_names(images, ids, path):
    """The images' file names, which must be text."""
    names = [image.get("file_name") for image in images]
    for name, image_id in zip(names, ids):
        if not isinstance(name, str) or not name or "\0" in name:
            raise UserError(f"{path}: image id {image_id} has the file_name {name!r}; correct it")
    return names


def check_files(annotations, path):
    """Raise UserError unless every image's file is there."""
    folder = Path(annotations.folder)
    present = np.array([os.fsencode(entry.name) for entry in os.scandir(folder)] if folder.is_dir() else [], dtype="S")
    for i in np.flatnonzero(~np.isin(annotations.files, present)).tolist():
        if not os.path.isfile(annotations.path(i)):
            name = os.fsdecode(bytes(annotations.files[i]))
            raise UserError(
                f"{folder} has no file {name!r}, which {path} names for image id {annotations.ids[i]}; unpack the "
                "images there again"
            )


# Masks: packed, cropped to their boxes, and pasted back.


def ragged_rows(first, chosen):
    """For rows first[k] to first[k + 1] that belong to k: (those of the chosen k, joined; their own `first`)."""
    counts = np.diff(first)[chosen]
    start = np.concatenate(([0], counts.cumsum()))
    return np.repeat(first[chosen] - start[:-1], counts) + np.arange(start[-1]), start


class Masks(NamedTuple):
    """The segmentations of M objects, packed: each has either polygons or the run lengths of its image's pixels.

    The polygons of object m are first_polygon[m] to first_polygon[m + 1], the points of polygon q are first_point[q] to
    first_point[q + 1]; its runs are first_run[m] to first_run[m + 1].
    """

    points: np.ndarray  # (V, 2) float64: x, y in image pixels
    first_point: np.ndarray  # (Q + 1,) int64
    first_polygon: np.ndarray  # (M + 1,) int64
    runs: np.ndarray  # (R,) int64: lengths in column-major order, background first
    first_run: np.ndarray  # (M + 1,) int64

    @classmethod
    def pack(cls, segmentations):
        """From COCO's form: lists of polygons, or dicts with run lengths of either kind."""
        polygons = [s if isinstance(s, list) else [] for s in segmentations]
        flat = [np.asarray(p, dtype=np.float64) for parts in polygons for p in parts]
        runs = [run_lengths(s["counts"]) if isinstance(s, dict) else np.zeros(0, np.int64) for s in segmentations]
        return cls(
            np.concatenate([np.zeros(0), *flat]).reshape(-1, 2),
            np.cumsum([0] + [len(p) // 2 for p in flat]),
            np.cumsum([0] + [len(parts) for parts in polygons]),
            np.concatenate([np.zeros(0, np.int64), *runs]),
            np.cumsum([0] + [len(r) for r in runs]),
        )

    def select(self, objects):
        """The same for these objects (indices) only."""
        polygons, first_polygon = ragged_rows(self.first_polygon, objects)
        points, first_point = ragged_rows(self.first_point, polygons)
        runs, first_run = ragged_rows(self.first_run, objects)
        return Masks(self.points[points], first_point, first_polygon, self.runs[runs], first_run)

    def polygons(self, m):
        """The polygons of object m, arrays (n, 2)."""
        return [
            self.points[self.first_point[q] : self.first_point[q + 1]]
            for q in range(self.first_polygon[m], self.first_polygon[m + 1])
        ]

    def coco(self, m, height, width):
        """The segmentation of object m in COCO's form."""
        runs = self.runs[self.first_run[m] : self.first_run[m + 1]].tolist()
        return {"size": [height, width], "counts": runs} if runs else [p.ravel().tolist() for p in self.polygons(m)]

    def crop(self, m, box, height):
        """Object m inside a box (4,) xyxy of its image: (112, 112) uint8, 1 where a cell's centre is in the object.

        Read straight from the points or runs: no bitmap of the image is made, whatever its size or the box's.
        """
        centres = (np.arange(MASK_SIDE) + 0.5) / MASK_SIDE
        x, y = box[0] + centres * (box[2] - box[0]), box[1] + centres * (box[3] - box[1])
        runs = self.runs[self.first_run[m] : self.first_run[m + 1]]
        if len(runs):  # odd runs are the object's
            pixels = x.astype(np.int64) * height + y.astype(np.int64)[:, None]
            return (np.searchsorted(runs.cumsum(), pixels, side="right") % 2).astype(np.uint8)
        mask = np.zeros((MASK_SIDE, MASK_SIDE), dtype=np.uint8)
        for points in self.polygons(m):
            mask |= inside_polygon(points, x, y)
        return mask


def run_lengths(counts):
    """(n,) int64 from COCO's run lengths: a list of them, or their compressed string.

    The string's characters, less 48, are groups of 5 bits, low ones first, 32 marking that more follow, as a signed
    number: from the fourth run on, the difference to the run before the last. Source: pycocotools' maskApi.c.
    """
    if not isinstance(counts, (str, bytes)):
        return np.asarray(counts, dtype=np.int64)
    code = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((code & 32) == 0)
    starts = np.concatenate(([0], ends + 1))[: len(ends)]
    place = np.arange(len(code)) - np.repeat(starts, np.diff(starts, append=len(code)))
    values = np.add.reduceat((code & 31) << (5 * place), starts) if len(ends) else code[:0]
    values -= ((code[ends] & 16) > 0).astype(np.int64) << (5 * (ends - starts + 1))  # the sign
    for odd in (0, 1):
        values[2 - odd :: 2] = values[2 - odd :: 2].cumsum()
    return values


def inside_polygon(points, x, y):
    """(len(y), len(x)) uint8: 1 where (x, y) is inside the polygon (n, 2), by the parity of the edges to its left."""
    ends = np.roll(points, -1, axis=0)
    edge, row = np.nonzero((points[:, 1:] <= y) != (ends[:, 1:] <= y))  # the edges that cross each row
    (x0, y0), (x1, y1) = points[edge].T, ends[edge].T
    crossing = x0 + (y[row] - y0) * (x1 - x0) / (y1 - y0)
    column = np.searchsorted(x, crossing)  # the first x that it lies left of
    toggles = np.bincount(row * (len(x) + 1) + column, minlength=len(y) * (len(x) + 1))
    return (toggles.reshape(len(y), -1)[:, :-1].cumsum(axis=1) % 2).astype(np.uint8)


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


# The generated set. Ranges are uniform unless said otherwise; the README states them.
SHAPES = {
    "images": {TRAIN: 600, VAL: 200},
    "classes": {1: "disc", 2: "square", 4: "triangle", 5: "star", 9: "cross", 12: "ring"},  # original id: outline
    "short_side": (160, 208),  # pixels
    "aspect": (1.0, 1.1, 1.23),  # long side / short side, one of these; sides lie in 160..256
    "objects": (1, 6),  # per image
    "object_side": (0.2, 0.85),  # longer side / the image's short side, log-uniform
    "stretch": (0.8, 1.25),  # width / height of an outline that is not turned
    "turn": (-20, 20),  # degrees
    "hue_spread": 12,  # degrees, standard deviation around the class's typical hue; those are 60 degrees apart
    "visible": 0.6,  # no object is covered beyond this share of its pixels
    "crowd_share": 0.08,  # of the images: a crowd of 8 to 14 small outlines of one class, a single RLE mask
}


def outline(kind):
    """The polygon of a class: (n, 2), the longer side about 1. A ring's hole is cut later."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    if kind in ("disc", "ring"):
        return np.stack((np.cos(turn), np.sin(turn)), axis=1) / 2
    if kind == "star":
        radius = np.where(np.arange(10) % 2, 0.2, 0.5)
        return np.stack((radius * np.sin(turn[::4]), -radius * np.cos(turn[::4])), axis=1)
    arm = 1 / 6  # of a cross, half its width
    half = {
        "square": [(0.5, -0.5), (0.5, 0.5)],
        "triangle": [(0.5, 0.45), (-0.5, 0.45), (0, -0.45)],
        "cross": [(arm, -0.5), (arm, -arm), (0.5, -arm), (0.5, arm), (arm, arm), (arm, 0.5)],
    }[kind]
    return np.array(half if kind == "triangle" else half + [(-x, -y) for x, y in half])


def random_outline(rng, kind, side, size):
    """A polygon (n, 2) in pixels, of longer side `side`, turned, stretched and placed inside (width, height)."""
    angle, stretch = np.deg2rad(rng.uniform(*SHAPES["turn"])), rng.uniform(*SHAPES["stretch"])
    rotation = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    polygon = (outline(kind) * [stretch**0.5, stretch**-0.5]) @ rotation
    polygon = (polygon - polygon.min(axis=0)) * (side / np.ptp(polygon, axis=0).max())
    return polygon + rng.uniform(0, 1, 2) * (size - polygon.max(axis=0))


def rasterize(polygon, size):
    """(H, W) bool: the pixels inside a polygon (n, 2), as pycocotools sees them."""
    codes = coco_mask.frPyObjects([polygon.ravel().tolist()], int(size[1]), int(size[0]))
    return coco_mask.decode(codes)[..., 0].astype(bool)


def random_object(rng, kind, side, size, crowd):
    """(mask (H, W) bool, polygon (n, 2), or None where only a run-length code can tell the mask)."""
    if crowd:
        mask = np.zeros(size[::-1].astype(int), dtype=bool)
        corner = rng.uniform(0, 1, 2) * (size - side)
        for _ in range(rng.integers(8, 15)):
            mask |= rasterize(random_outline(rng, kind, side / 5, np.array([side, side])) + corner, size)
        return mask, None
    polygon = random_outline(rng, kind, side, size).round(2)
    mask = rasterize(polygon, size)
    if kind == "ring":
        middle = polygon.mean(axis=0)
        return mask & ~rasterize((polygon - middle) * 0.5 + middle, size), None
    return mask, polygon


def random_ground(rng, size):
    """(H, W, 3) float: pale blotches, stripes and grain."""
    coarse = rng.integers(60, 200, (rng.integers(3, 9), rng.integers(3, 9), 3), dtype=np.uint8)
    image = np.array(Image.fromarray(coarse).resize(size.tolist(), Image.Resampling.BICUBIC), dtype=np.float64)
    image = 0.6 * image.mean(axis=2, keepdims=True) + 0.4 * image
    y, x = np.mgrid[: size[1], : size[0]]
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 30)
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    return image + rng.uniform(0, 22) * stripes[..., None] + rng.normal(0, rng.uniform(2, 12), image.shape)


def paint(rng, image, mask, hue):
    """Paint a mask (H, W) of the image (H, W, 3) in one colour of the given hue (degrees), shaded, with grain."""
    hsv = [hue / 360 * 255 % 255, rng.uniform(0.55, 0.95) * 255, rng.uniform(0.6, 0.95) * 255]
    rgb = np.array(Image.new("HSV", (1, 1), tuple(int(v) for v in hsv)).convert("RGB"))[0, 0]
    shade = np.linspace(1 - 0.12, 1 + 0.12, image.shape[1])[:: rng.choice((-1, 1))]
    columns = np.nonzero(mask)[1]
    image[mask] = rgb * shade[columns, None] + rng.normal(0, 6, (len(columns), 3))


def random_scene(rng):
    """An image (H, W, 3) uint8 and its objects: dicts of category_id, iscrowd, mask (H, W) bool, polygon or None."""
    short = rng.integers(*SHAPES["short_side"], endpoint=True)
    size = np.array([int(short * rng.choice(SHAPES["aspect"])), short])[:: rng.choice((1, 1, -1))]  # width, height
    image, objects = random_ground(rng, size), []
    ids = list(SHAPES["classes"])
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
        hue = ids.index(category) * 360 / len(ids) + rng.normal(0, SHAPES["hue_spread"])
        paint(rng, image, mask, hue)
        new = {"category_id": category, "iscrowd": int(crowd), "mask": mask, "whole": mask.sum(), "polygon": polygon}
        objects.append(new)
    return image.clip(0, 255).astype(np.uint8), objects


def write_shapes(root, seed=0):
    """Write the generated set under `root`, in COCO's layout, unless it is there; the same files at every call."""
    if all(split_paths(root, split)[0].exists() for split in SHAPES["images"]):
        return
    if Path(root).exists():
        raise UserError(f"{root} exists, but is not the generated set; remove it, and it will be written again")
    print(f"writing the generated shapes to {root}", flush=True)
    draft = Path(f"{root}.{os.getpid()}.tmp")
    for s, (split, count) in enumerate(SHAPES["images"].items()):
        path, folder = split_paths(draft, split)
        folder.mkdir(parents=True)
        path.parent.mkdir(exist_ok=True)
        images, annotations = [], []
        for k in range(count):
            scene, objects = random_scene(np.random.default_rng((seed, s, k)))
            image_id = (s + 1) * 10000 + 7 * k
            name = f"{image_id:012d}.jpg"
            Image.fromarray(scene).save(folder / name, quality=92)
            images.append({"id": image_id, "file_name": name, "height": scene.shape[0], "width": scene.shape[1]})
            for o in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id} | coco_object(o))
        categories = [{"id": k, "name": name} for k, name in SHAPES["classes"].items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path.write_text(json.dumps(content | {"info": {"description": "generated shapes"}, "licenses": []}))
    with contextlib.suppress(OSError):  # another process has just put its own, equal copy there
        os.rename(draft, root)
    shutil.rmtree(draft, ignore_errors=True)


def coco_object(o):
    """A scene's object as COCO writes it: polygons where they suffice, else uncompressed run lengths."""
    mask = np.asfortranarray(o["mask"])
    code = coco_mask.encode(mask.astype(np.uint8))
    if o["polygon"] is not None:
        low, high = o["polygon"].min(axis=0), o["polygon"].max(axis=0)
        segmentation, box = [o["polygon"].ravel().tolist()], [*low, *(high - low)]
    else:
        segmentation = {"size": list(mask.shape), "counts": run_lengths(code["counts"]).tolist()}
        box = coco_mask.toBbox(code)
    box = [round(float(v), 2) for v in box]
    area = float(coco_mask.area(code))
    return {k: o[k] for k in ("category_id", "iscrowd")} | {"bbox": box, "area": area, "segmentation": segmentation}


def resolve_root(data):
    """The folder that `--data` names; for the name `shapes`, the generated set in data/shapes, written on first use."""
    if data != "shapes":
        return Path(data)
    root = Path("data/shapes")
    write_shapes(root)
    return root


# The command line.


def check(annotations):
    """Decode every image; the sentences that say which are bad."""
    bad = []
    for i in tqdm(range(len(annotations.ids)), desc="decoding", disable=None):
        try:
            read_checked(annotations, i)
        except UserError as error:
            bad.append(str(error))
    return bad


def show(dataset, count, out):
    """Write the first `count` augmented samples, with their boxes and masks, as PNG files."""
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
    parser.add_argument(
        "--data", default="data/coco", help="a folder in COCO's layout, or `shapes` (default data/coco)"
    )
    parser.add_argument("--split", default=TRAIN, help=f"default {TRAIN}")
    parser.add_argument("--masks", action="store_true", help="with masks, as Mask R-CNN is trained")
    parser.add_argument("--check", action="store_true", help="decode every image and list the bad ones")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="write N augmented samples with their objects")
    parser.add_argument("--size", type=int, default=640, help="side of the network's input (default 640)")
    parser.add_argument("--jitter", type=float, nargs=2, default=(0.5, 2.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/show"), help="where --show writes (default runs/show)")
    args = parser.parse_args(argv)

    annotations = load_annotations(resolve_root(args.data), args.split, args.masks)
    print(f"{args.split}: {annotations.summary()}")
    dataset = TrainSet(annotations, args.size, args.jitter, seed=args.seed)
    if args.show:
        show(dataset, args.show, args.out)
    if args.check:
        bad = check(annotations)
        print("\n".join(bad + [f"{len(bad)} of {len(annotations.ids)} images are bad"]))
        if bad:
            raise SystemExit(2)


if __name__ == "__main__":
    with one_sentence():
        main()
