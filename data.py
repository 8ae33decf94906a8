"""How does a COCO folder become batches? Annotations as arrays, scale jitter, the samples, and who gets which.

From top to bottom: a json becomes arrays (`load_annotations`), a window of an image is drawn (`draw_view`), both make a
sample (`TrainSet`), and samples make batches (`make_loader`). Dimensions: N images, M objects, n objects of an image, B
images of a batch, S side of the network's input. Boxes: xyxy pixels; in the json and `Annotations.boxes` COCO's xywh.
"""

import contextlib
import functools
import json
import math
import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset, default_collate

from model import PIXEL_MEAN, UserError, refuse

MAX_OBJECTS = 100  # targets per image (authors' yaml, max_num_instances)
MASK_SIDE = 112  # cells of a target's mask, per side of its box (authors' yaml, gt_mask_size)
PAD = torch.tensor(PIXEL_MEAN).round().to(torch.uint8)  # (124, 116, 104): 0 after normalization, within rounding
MIN_SIDE = 0.01  # pixels of the network's input: what the window leaves of an object's box below this is no object
MAX_BROKEN = 10, 0.01  # broken objects: more than so many, and than this share, mean that the format is wrong
TRAIN, VAL = "train2017", "val2017"
UNIT, LARGE = 1.05, 32  # no coordinate beyond that, on an image of so many pixels a side: it looks normalized
MAX_PIXELS, Image.MAX_IMAGE_PIXELS = 178_956_970, None  # of an image: PIL's limit, in read_image's words
KEPT_FROM, KEPT_VERSION = 50e6, 2  # the arrays of a json of more bytes are kept in a file beside it; its version


class Annotations(NamedTuple):
    """One split as arrays, which forked workers share: no Python object is kept per annotation.

    The objects of image i, with its crowds, are rows spans[i, 0] to spans[i, 1] of boxes, labels, crowd, area, starts.
    """

    folder: str
    categories: list  # (original id, name) in the order of their ids; label k means categories[k]
    ids: np.ndarray  # (N,) int64, ascending
    files: np.ndarray  # (N,) text, relative to folder
    heights: np.ndarray  # (N,) int64
    widths: np.ndarray  # (N,) int64
    spans: np.ndarray  # (N, 2) int64
    boxes: np.ndarray  # (M, 4) float64 xywh, as the json has them
    labels: np.ndarray  # (M,) int64 in 0..K-1
    crowd: np.ndarray  # (M,) bool
    area: np.ndarray  # (M,) float64: of the segmentation
    codes: np.ndarray | None = None  # (C,) uint8: the masks' compressed run-length codes, one after another
    starts: np.ndarray | None = None  # (M + 1,) int64: the code of object m is codes[starts[m] : starts[m + 1]]
    notes: str = ""  # what was dropped or done to take it, a line for each

    def path(self, i):
        """Where the file of image i is."""
        return os.path.join(self.folder, self.files[i])

    def rows(self, i):
        """The rows (n,) of image i's objects, crowds left out."""
        rows = np.arange(*self.spans[i])
        return rows[~self.crowd[rows]]

    def objects(self, i):
        """Image i's boxes (n, 4) xyxy float64, new and clipped to the image, and labels (n,), both without crowds."""
        rows = self.rows(i)
        x, y, w, h = self.boxes[rows].T
        boxes = np.stack((x, y, x + w, y + h), axis=1)
        return boxes.clip(0, [self.widths[i], self.heights[i]] * 2), self.labels[rows]

    def mask(self, i, m):
        """The mask of object m, one of image i's, as pycocotools takes it."""
        counts = self.codes[self.starts[m] : self.starts[m + 1]].tobytes()
        return {"size": [int(self.heights[i]), int(self.widths[i])], "counts": counts}

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
        positives = self.positives()
        return (
            f"{len(self.ids)} images, {positives.sum()} objects of {len(self.categories)} classes, "
            f"{np.diff(self.spans).sum() - positives.sum()} crowds (never positive), "
            f"{(positives == 0).sum()} images without objects (negatives), "
            f"{(positives > MAX_OBJECTS).sum()} with more than {MAX_OBJECTS} (which keep {MAX_OBJECTS}){self.notes}"
        )


HELP = """Get COCO with
  mkdir -p {root} && cd {root}
  wget http://images.cocodataset.org/zips/train2017.zip && unzip -q train2017.zip
  wget http://images.cocodataset.org/zips/val2017.zip && unzip -q val2017.zip
  wget http://images.cocodataset.org/annotations/annotations_trainval2017.zip && unzip -q annotations_trainval2017.zip
or start without it: python train.py --arch tiny --size 128 --protocol toy --data shapes"""


def split_paths(root, split):
    """(annotation file, image folder) of a split, in COCO's layout: of test-dev2017 image_info_... and test2017."""
    path, folder = Path(root, "annotations", f"instances_{split}.json"), Path(root, split)
    info, other = path.with_name(f"image_info_{split}.json"), folder.with_name(split.replace("-dev", ""))
    return path if path.exists() or not info.exists() else info, folder if folder.exists() else other


def load_annotations(root, split=TRAIN, masks=False, paths=None, report=refuse):
    """One split of a COCO folder: root/annotations/instances_{split}.json and root/{split}/, or the two `paths`.

    With `masks`, segmentations are kept, and an object without one is broken. Broken objects are dropped and counted.
    Too many of them, wrong ids, missing files are told to `report`, which by default raises UserError.
    """
    path, folder = map(Path, paths or split_paths(root, split))
    try:
        return read_annotations(path, folder, masks, report)
    except (FileNotFoundError, NotADirectoryError):
        missing = " and ".join(str(p) for p in (folder, path) if not p.exists())
    found = ", ".join(sorted(str(p) for kind in ("*.json", "*/*.json") for p in Path(root).glob(kind))[:4]) or "none"
    what = f"{root} is not in COCO's layout; of json files it has {found}; any will do: --train or --val JSON IMAGES"
    raise UserError(f"{missing} not found. {'' if paths else what if Path(root).exists() else HELP.format(root=root)}")


def read_annotations(path, folder, masks, report=refuse):
    """The Annotations in a json. Those of a large one are kept in a file beside it, which later starts map."""
    stat, kept = path.stat(), path.with_suffix(".masks.pt" if masks else ".boxes.pt")
    stamp, known = [KEPT_VERSION, stat.st_size, stat.st_mtime_ns], None
    with contextlib.suppress(Exception):  # whatever that file holds, the json is still there to be read
        saved = torch.load(kept, mmap=True, weights_only=True)
        saved |= {key: v.numpy() for key, v in saved.items() if isinstance(v, torch.Tensor)}
        known = Annotations(**saved | {"folder": str(folder)}) if saved.pop("stamp") == stamp else None
    if known:
        return known._replace(files=find_files(folder, known.files, known.ids, path, report)[0])
    if stat.st_size < KEPT_FROM:
        return pack(path, folder, masks, report)
    print(f"reading {path}, which takes a while; its arrays will be kept in {kept}, if that can be written", flush=True)
    annotations, draft = pack(path, folder, masks, report), kept.with_suffix(f".{os.urandom(8).hex()}.tmp")
    fields = annotations._asdict() | {"files": annotations.files.tolist(), "stamp": stamp}
    with contextlib.suppress(OSError, RuntimeError):  # a full disk is a RuntimeError to torch
        torch.save({k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in fields.items()}, draft)
        os.replace(draft, kept)
    with contextlib.suppress(OSError):
        draft.unlink()
    return annotations


# Lists of the json: {key: the list whose ids it must be one of, or none for an id of its own}.
KEYS = dict(images={"id": ""}, categories={"id": ""}, annotations={"image_id": "images", "category_id": "categories"})


def whole(value):
    """A whole number of 64 bits as an int, also if it is a float or stands in text; else None."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value.strip()):
        value = int(value)
    return int(value) if isinstance(value, (int, float)) and -(2**63) <= value < 2**63 and value == int(value) else None


def read_columns(path, report):
    """(a json's lists as in KEYS, {(list, key): (rows,) int64} of their ids) without wrong ids, which are reported.
    Images and categories are sorted by id; a test split has no annotations. A UserError if the json isn't COCO's."""
    fault = f"{path} is not a COCO annotation file; correct it or export it again:"
    try:
        content, lists, columns = json.loads(path.read_bytes()), [], {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{fault} {type(error).__name__}, {error}") from None
    for part, keys in KEYS.items():
        rows = content.get(part, [] if part == "annotations" else None) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{fault} {part!r} is not a list of objects")
        if not rows and part != "annotations":
            raise UserError(f"{fault} it has no {part}")
        good, own = np.ones(len(rows), dtype=bool), [str(row.get("id", f"none, {k}")) for k, row in enumerate(rows)]
        for key, other in keys.items():
            values = [whole(row.get(key)) for row in rows]
            columns[part, key] = np.array([v or 0 for v in values], dtype=np.int64)
            fits = np.array([v is not None for v in values], dtype=bool)
            if other:
                fits &= np.isin(columns[part, key], columns[other, "id"])
            if not fits.all():
                k, row = fits.argmin(), rows[fits.argmin()]
                what = f"the id of one of its {other}" if other else "a whole number of 64 bits"
                what = f"has {key} {row.get(key)!r:.60}: not {what} ({(~fits).sum()} such)"
                report(f"{fault} {part}[{k}], id {row.get('id')!r}, {what}")
            good, own = good & fits, own if other else columns[part, key]
        kept, first = np.flatnonzero(good), np.unique(np.asarray(own)[good], return_index=True)[1]
        if len(first) < len(kept):
            report(f"{fault} {part} has the id {own[np.delete(kept, first)[0]]} twice ({len(kept) - len(first)} such)")
        kept = kept[np.sort(first) if part == "annotations" else first]  # the others in the order of their ids
        lists.append([rows[k] for k in kept])
        columns |= {(part, key): columns[part, key][kept] for key in keys}
    return lists, columns


def base_name(name):
    """A file's name without what other systems put before it or change: URL, folders, \\, case, Unicode's form."""
    return unicodedata.normalize("NFC", re.split(r"[/\\]", unquote(name).split("?")[0])[-1]).casefold()


def find_files(folder, names, ids, path, report):
    """((N,) the images' files, relative to the folder; what was done, in words). Lost ones are found by `base_name`."""
    there, near = set(os.listdir(folder)), {}
    lost = [i for i, name in enumerate(names) if name not in there and not os.path.isfile(os.path.join(folder, name))]
    for file in folder.rglob("*") if lost else ():
        near.setdefault(base_name(file.name), []).append(str(file.relative_to(folder)))
    new = {i: files[0] for i in lost if len(files := near.get(base_name(names[i]), [])) == 1}
    unclear = [i for i in lost if i not in new]
    if unclear:
        i, name = unclear[0], names[unclear[0]]
        what = f"{folder} has no file {name!r}, which {path} names for image id {ids[i]} ({len(unclear)} such)"
        report(f"{what}; near it is {near.get(base_name(name), 'nothing')}; unpack the images there again")
    note = [f"{len(new)} files have other names: {names[i]!r} is {new[i]!r}" for i in lost[:1] if not unclear]
    names = [new.get(i, name) for i, name in enumerate(names)]
    files, which, counts = np.unique([os.path.normpath(n) for n in names], return_inverse=True, return_counts=True)
    if counts.max() > 1:
        what = f"{path} has {files[counts.argmax()]} under the image ids {ids[which == counts.argmax()].tolist()}"
        report(f"{what} ({(counts > 1).sum()} such): objects of one would be background in the others; join them")
    return np.array(names), note


def check_objects(objects, sizes, masks, path, report):
    """What is sound of a json's J objects: ({"boxes", "crowd", "area"} as in Annotations, codes as of `encode_mask`,
    sound (J,) bool, faults in words). sizes (J, 2): (width, height) of each one's image."""
    boxes = np.array([numbers(o.get("bbox"), 4) for o in objects], dtype=np.float64).reshape(-1, 4)
    low, sides = boxes[:, :2], boxes[:, 2:]
    seen = (np.minimum(low + sides, sizes) - np.maximum(low, 0)).clip(0)  # (J, 2): of each box, in its image
    outside = seen.prod(axis=1) < sides.prod(axis=1) / 2
    in_unit = ((low + sides).max(axis=1, initial=0) <= UNIT) & (sizes.min(axis=1) >= LARGE)
    crowd = np.array([whole(o.get("iscrowd") or 0) for o in objects], dtype=object)  # the text "0" would be true
    area, own = np.array([numbers([o.get("area")], 1) for o in objects], dtype=np.float64).ravel(), sides.prod(axis=1)
    codes, inside = [b""] * len(objects), np.ones(len(objects))
    for j in np.flatnonzero((sides > 0).all(axis=1)) if masks else ():
        codes[j] = encode_mask(objects[j].get("segmentation"), *sizes[j, ::-1].tolist())
        if codes[j] is not None:
            own[j], inside[j] = mask_in_box(codes[j], boxes[j], *sizes[j].tolist())
    rules = {  # (key, in words): (J,) bool; an object is counted under the first that it breaks
        ("bbox", "not four numbers"): np.isnan(boxes).any(axis=1),
        ("bbox", "without positive sides"): (sides <= 0).any(axis=1),
        ("bbox", "in 0..1: it looks normalized, multiply it by the image's size"): in_unit,
        ("bbox", "outside of its image by more than half, or two corners in place of [x, y, width, height]"): outside,
        ("iscrowd", "neither 0 nor 1"): (crowd != 0) & (crowd != 1),
        ("segmentation", "neither polygons in pixels nor run lengths of its image"): [c is None for c in codes],
        ("segmentation", "without a pixel in its bbox"): inside == 0,
    }
    sound, words = np.ones(len(objects), dtype=bool), []
    for (key, rule), breaks in rules.items():
        broken = np.flatnonzero(np.asarray(breaks, dtype=bool) & sound)
        sound[broken] = False
        if len(broken):
            o = objects[broken[0]]
            words.append(f"{len(broken)} whose {key} is {rule}, as annotation id {o.get('id')!r}: {o.get(key)!r:.60}")
    if (~sound).sum() > max(MAX_BROKEN[0], MAX_BROKEN[1] * len(objects)):
        what = f"of {len(objects)} objects {(~sound).sum()} are broken: {', '.join(words)}"
        report(f"{path}: {what}; correct them{', or use --head retinanet' if masks else ''}")
    area = np.where(area > 0, area, own)  # of NaN or 0 COCO's metrics would make small objects, or none
    return {"boxes": boxes, "crowd": crowd == 1, "area": area}, codes, sound, ", ".join(words)


def mask_in_box(code, box, width, height):
    """The pixels of a mask, and how many of them are among those that the box (4,) xywh touches."""
    (left, top), (right, bottom) = np.floor(box[:2]).clip(0), np.ceil(box[:2] + box[2:]).clip(None, [width, height])
    mask, corners = {"size": [height, width], "counts": code}, [left, top, right, top, right, bottom, left, bottom]
    inside = coco_mask.merge([mask, *coco_mask.frPyObjects([corners], height, width)], intersect=True)
    return coco_mask.area(mask), coco_mask.area(inside)


def pack(path, folder, masks, report=refuse):
    """The Annotations in a json, without its broken objects. Raises UserError where it isn't COCO's."""
    (images, categories, objects), columns = read_columns(path, report)
    ids, category_ids = columns["images", "id"], columns["categories", "id"]
    files, renamed = find_files(folder, [str(row.get("file_name")) for row in images], ids, path, report)
    sizes = np.array([[whole(row.get(key)) or 0 for key in ("width", "height")] for row in images], dtype=np.int64)
    unknown = np.flatnonzero((sizes < 1).any(axis=1))  # measured; a file that can't be read is found when it is
    for i in unknown:
        with contextlib.suppress(OSError), Image.open(os.path.join(folder, files[i])) as image:
            sizes[i] = image.size
    owner = np.searchsorted(ids, columns["annotations", "image_id"])  # (J,): the index of its image
    fields, codes, sound, broken = check_objects(objects, sizes[owner].clip(1), masks, path, report)
    kept = np.flatnonzero(sound)[np.argsort(owner[sound], kind="stable")]  # (M,): the sound ones, image by image
    bounds, codes = np.searchsorted(owner[kept], np.arange(len(ids) + 1)), [codes[j] for j in kept]
    fields["labels"] = np.searchsorted(category_ids, columns["annotations", "category_id"])
    names = [str(row.get("name", row["id"])) for row in categories]
    unused = [names[k] for k in np.setdiff1d(np.arange(len(names)), fields["labels"]) if objects]
    notes = renamed + [f"several classes have the name {name!r}" for name in set(names) if names.count(name) > 1]
    notes += [f"classes without an object: {len(unused)}, as {unused[:5]}"] * (len(unused) > 0)
    notes += [f"{len(unknown)} images without height and width were measured"] * (len(unknown) > 0)
    notes += [f"dropped as broken: {broken}"] * (broken > "")
    return Annotations(
        str(folder),
        list(zip(category_ids.tolist(), names)),
        *(ids, files, *sizes.T[::-1], np.stack((bounds[:-1], bounds[1:]), axis=1)),
        codes=np.frombuffer(b"".join(codes), dtype=np.uint8) if masks else None,
        starts=np.cumsum([0, *map(len, codes)]) if masks else None,
        notes="".join(f"\n  {note}" for note in notes),
        **{name: values[kept] for name, values in fields.items()},
    )


def numbers(values, count, limit=1e9):
    """`values` itself if it is a list of `count` numbers of a size below the limit, else `count` NaNs."""
    sound = isinstance(values, list) and len(values) == count
    sound = sound and all(isinstance(v, (int, float)) and abs(v) < limit for v in values)  # NaN compares false
    return values if sound else [math.nan] * count


def encode_mask(segmentation, height, width):
    """Polygons, but for broken ones, or run lengths of either kind as COCO's compressed code; None where not sound."""
    if isinstance(segmentation, list):
        polygons = [p for p in segmentation if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
        polygons = [p for p in polygons if numbers(p, len(p), 2 * max(height, width)) is p]  # not far outside
        polygons = [p for p in polygons if max(map(abs, p)) > UNIT or min(height, width) < LARGE]
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"] if polygons else None
    code, pixels = segmentation if isinstance(segmentation, dict) else {}, height * width
    counts = code.get("counts") if code.get("size") == [height, width] and pixels < 2**29 else None  # PIL opens no more
    if isinstance(counts, list):
        whole = all(isinstance(v, int) and v >= 0 for v in counts) and sum(counts) == pixels
        return coco_mask.frPyObjects(code, height, width)["counts"] if whole else None
    # A compressed code: after "P" to "o" a number goes on, with "0" to "O" it ends.
    sound = isinstance(counts, str) and re.fullmatch("([P-o]{0,5}[0-O])+", counts) and runs_fit(counts, pixels)
    return counts.encode() if sound and not runs_fit(counts, pixels - 1) else None


def runs_fit(counts, pixels):
    """Whether a compressed code's runs are of that many pixels at most: beyond them pycocotools decodes nothing."""
    try:
        return coco_mask.decode({"size": [pixels, 1], "counts": counts.encode()}) is not None
    except ValueError:
        return False


def crop_mask(code, box):
    """A mask, as pycocotools takes it, inside a box (4,) xyxy of its image: (112, 112) uint8, 0 or 1.

    A cell is the pixel under its centre. Departure: the authors resize the bitmap.
    """
    cells = (np.arange(MASK_SIDE)[:, None] + 0.5) / MASK_SIDE
    x, y = (box[:2] + cells * (box[2:] - box[:2])).astype(np.int64).T
    return coco_mask.decode(code)[:, x][y]


class View(NamedTuple):
    """How an image is seen: a rectangle of the source, the size it gets in the network's input, and the flip."""

    left: int  # whole pixels of the source, as the next three
    top: int
    right: int
    bottom: int
    width: int  # pixels of the network's input, as the next
    height: int
    flip: bool = False

    def region(self):
        """(2,) float32: the image's (height, width) in the network's input, which the model calls its size."""
        return torch.tensor([self.height, self.width], dtype=torch.float32)

    def boxes(self, boxes):
        """Source boxes (n, 4) xyxy -> new ones in the network's input, numpy both: clipped to the region, flipped."""
        scale = np.array([self.width / (self.right - self.left), self.height / (self.bottom - self.top)] * 2)
        boxes = ((boxes - [self.left, self.top] * 2) * scale).clip(0, [self.width, self.height] * 2)
        if self.flip:
            boxes[:, [0, 2]] = self.width - boxes[:, [2, 0]]
        return boxes

    def image(self, image, size):
        """PIL image -> uint8 (3, S, S), channels last in memory: the rectangle, resized at once (bilinear, antialiased,
        as PIL's BILINEAR) and flipped by `flip`, in the upper left corner of a square of the colour PAD."""
        pixels = np.array(image.crop((self.left, self.top, self.right, self.bottom)))  # (h, w, 3)
        # The batch's dimension first: only then are all strides those of channels_last, and the resize 4 times as fast.
        pixels = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
        # Departure: the authors' bilinear resize is not antialiased and has no half-pixel centres.
        pixels = F.interpolate(pixels, (self.height, self.width), mode="bilinear", antialias=True)
        pixels = pixels[0].permute(1, 2, 0)  # (h', w', 3)
        canvas = PAD.repeat(size, 1).repeat(size, 1, 1)  # (S, S, 3)
        canvas[: self.height, : self.width] = pixels.flip(1) if self.flip else pixels
        return canvas.permute(2, 0, 1)


def full_view(height, width, size, scale=1.0):
    """The whole image, its long side round(scale * size), the short one by that ratio, rounded, 1 at least; no flip."""
    ratio = round(scale * size) / max(height, width)
    return View(0, 0, width, height, max(round(width * ratio), 1), max(round(height * ratio), 1))


def draw_view(rng, height, width, size, jitter, flip=True):
    """Scale jitter (paper section 5.1, protocols A to C; authors' input_utils.py), drawn from a numpy Generator.

    The image is scaled as in `full_view` by a scale from U(jitter). Of a side that is then longer than `size`, `size`
    pixels are kept, from any whole offset with equal chances, x and y drawn apart. With `flip` half of the views are
    mirrored. Draws come in any order. The View has the source pixels under the window. Departure: its edges are
    rounded to whole pixels, one stays at least: it moves by half of one, and stretches by one, at most."""
    full = full_view(height, width, size, rng.uniform(*jitter))
    edges = []
    for scaled, source in ((full.width, width), (full.height, height)):
        offset = rng.integers(0, max(scaled - size, 0), endpoint=True)
        start = min(round(offset * source / scaled), source - 1)
        stop = round((offset + min(scaled, size)) * source / scaled)
        edges.append((start, max(stop, start + 1)))  # one pixel at least
    (left, right), (top, bottom) = edges
    flip = bool(flip and rng.random() < 0.5)
    return View(left, top, right, bottom, min(full.width, size), min(full.height, size), flip)


def read_image(path, what):
    """A decoded PIL image in RGB; EXIF's rotation is ignored, as COCO's boxes do. Of 16 bits the upper 8 are taken;
    numbers of 32 bits have no range that is known, and are refused. Raises UserError, naming `what`."""
    try:
        image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has more than {MAX_PIXELS:,} pixels; scale it down, and its boxes")
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # in which I has 16 bits
            raise ValueError(f"the numbers of its mode {image.mode} have no known range; save it as 8-bit PNG or JPEG")
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
            return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # PIL raises many kinds for a bad file
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise UserError(f"cannot decode {path} ({what}): {reason}; tools/look.py --check lists all such") from None


def read_checked(annotations, i):
    """Image i of a split, of the size that the json states; else UserError."""
    what, stated = f"image id {annotations.ids[i]}", (annotations.widths[i], annotations.heights[i])
    image = read_image(annotations.path(i), what)
    if image.size != stated:
        sizes = "{}x{} pixels, but the json says {}x{}".format(*image.size, *stated)
        raise UserError(f"{annotations.path(i)} ({what}) is {sizes}; replace the file or correct the json")
    return image


@functools.lru_cache(maxsize=4)
def permutation(seed, epoch, count):
    """The order of an epoch's images: (count,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class TrainSet(Dataset):
    """Training samples, pure functions of (seed, n); N images make an epoch. Departure: batches go on into the next."""

    def __init__(self, annotations, size, jitter, flip=True, seed=0):
        self.annotations, self.size, self.jitter, self.flip, self.seed = annotations, size, jitter, flip, seed

    def image_of(self, n):
        """(epoch, index of the image) of sample n: n // N, and entry n mod N of a shuffle by (seed, epoch)."""
        epoch, place = divmod(n, len(self.annotations.ids))
        return epoch, int(permutation(self.seed, epoch, len(self.annotations.ids))[place])

    def __getitem__(self, n):
        """A dict: image uint8 (3, S, S), `read_checked`, as the View of `draw_view` shows it; boxes (100, 4) float32
        xyxy and labels (100,) int64 in the annotations' order, then zeros and -1; region (2,) float32, the View's;
        noise, an int of 32 random bits from which the model draws anchors and RoIs; and, if the annotations have masks,
        masks (100, 112, 112) uint8: `crop_mask` of the part of each object's box that is seen, flipped with the View.
        Left out are crowds, boxes of which the View leaves a side under MIN_SIDE and, of over 100 others, all but 100,
        drawn anew each epoch (departure), in any order. Seed by i + 1: to numpy (seed, epoch, 0) is (seed, epoch)."""
        (epoch, i), a = self.image_of(n), self.annotations
        image = read_checked(a, i)
        rng = np.random.default_rng((self.seed, epoch, i + 1))
        view = draw_view(rng, image.height, image.width, self.size, self.jitter, self.flip)
        source_boxes, labels = a.objects(i)
        boxes = view.boxes(source_boxes).astype(np.float32)  # before the comparison: rounding can close a sliver
        kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1))
        if len(kept) > MAX_OBJECTS:
            kept = np.sort(rng.choice(kept, MAX_OBJECTS, replace=False))
        noise = int(np.random.SeedSequence((self.seed, n)).generate_state(1)[0])
        sample = {"image": view.image(image, self.size), "region": view.region(), "noise": noise}
        sample |= {"boxes": torch.zeros(MAX_OBJECTS, 4), "labels": torch.full((MAX_OBJECTS,), -1)}
        sample["boxes"][: len(kept)] = torch.from_numpy(boxes[kept])
        sample["labels"][: len(kept)] = torch.from_numpy(labels[kept])
        if a.codes is not None:
            sample["masks"] = torch.zeros(MAX_OBJECTS, MASK_SIDE, MASK_SIDE, dtype=torch.uint8)
            visible = source_boxes[kept].clip([view.left, view.top] * 2, [view.right, view.bottom] * 2)
            for k, (m, box) in enumerate(zip(a.rows(i)[kept], visible)):
                mask = torch.from_numpy(crop_mask(a.mask(i, m), box))
                sample["masks"][k] = mask.flip(1) if view.flip else mask
        return sample


class EvalSet(Dataset):
    """The whole images of a split: a dict of image uint8 (3, S, S), region (2,) float32 as in TrainSet, and index."""

    def __init__(self, annotations, size):
        self.annotations, self.size = annotations, size

    def __getitem__(self, i):
        image = read_checked(self.annotations, i)
        view = full_view(image.height, image.width, self.size)
        return {"image": view.image(image, self.size), "region": view.region(), "index": i}


def micro_batches(first, last, batch, micro, rank=0, world=1):
    """Sample numbers of this rank's micro-batches of the steps first..last-1.

    Step k has k * batch to (k + 1) * batch - 1, its micro-step t the t-th world * micro, rank r of it the r-th micro.
    """
    for step in range(first, last):
        for start in range(step * batch + rank * micro, (step + 1) * batch, world * micro):
            yield list(range(start, start + micro))


def collate(samples):
    """A batch of samples, stacked; the images stay channels last in memory, as the network wants them."""
    batch = default_collate([sample | {"image": sample["image"].permute(1, 2, 0)} for sample in samples])
    return batch | {"image": batch["image"].permute(0, 3, 1, 2)}  # (B, 3, S, S)


def make_loader(dataset, batches, workers, pin_memory=False):
    """A DataLoader over lists of sample numbers. Fork it before a collective, whose threads' locks it would inherit."""
    # Forked workers share the annotations, and leave the process group, which is signalled as a whole: main stops them.
    fork = {"multiprocessing_context": "fork", "worker_init_fn": lambda worker: os.setpgrp()}
    options = {"num_workers": workers} | (fork if workers and sys.platform == "linux" else {})
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, pin_memory=pin_memory, **options)
