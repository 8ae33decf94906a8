"""Writes the generated set: drawn shapes with boxes and masks, in COCO's layout; the same files at every time.

python tools/make_shapes.py [--out data/shapes]

`--data shapes` does it on first use. An image is a function of (split, number): see `random_scene`.
"""

import argparse
import colorsys
import json
import os
import shutil
import sys
import uuid
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import TRAIN, VAL, split_paths  # noqa: E402
from model import UserError  # noqa: E402

# Ranges are uniform unless said otherwise; docs/COURSE.md states them.
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


def runs_of(mask):
    """The run lengths of a mask (H, W) bool in column-major order, background first: COCO's uncompressed counts."""
    changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
    return np.diff(changes, prepend=0, append=mask.size).tolist()


def coco_object(o):
    """A scene's object as COCO writes it: a polygon where it suffices, else uncompressed run lengths."""
    if o["polygon"] is not None:
        low, high = o["polygon"].min(axis=0), o["polygon"].max(axis=0)
        segmentation, box = [o["polygon"].ravel().tolist()], [*low, *(high - low)]
    else:
        segmentation = {"size": list(o["mask"].shape), "counts": runs_of(o["mask"])}
        box = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(o["mask"], dtype=np.uint8)))
    row = {"bbox": [round(float(v), 2) for v in box], "area": float(o["mask"].sum())}
    return {k: o[k] for k in ("category_id", "iscrowd")} | row | {"segmentation": segmentation}


def write_split(root, split, number):
    """Write one split, the set's `number`-th: its images, then its json."""
    path, folder = split_paths(root, split)
    folder.mkdir(parents=True)
    path.parent.mkdir(exist_ok=True)
    images, annotations = [], []
    for k in range(SHAPES["images"][split]):
        scene, objects = random_scene(np.random.default_rng((0, number, k)))
        image_id = (number + 1) * 10000 + 7 * k
        name = f"{image_id:012d}.jpg"
        Image.fromarray(scene).save(folder / name, quality=92)
        images.append({"id": image_id, "file_name": name, "height": scene.shape[0], "width": scene.shape[1]})
        for o in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id} | coco_object(o))
    categories = [{"id": k, "name": name} for k, name in SHAPES["classes"].items()]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))


def write_shapes(root):
    """Write the generated set under `root`, unless it is there; UserError where something else is, or nothing can."""
    if all(split_paths(root, split)[0].exists() for split in SHAPES["images"]):
        return
    if Path(root).exists():
        raise UserError(f"{root} exists, but is not the generated set; remove it, and it will be written again")
    print(f"writing the generated shapes to {root}", flush=True)
    draft = Path(f"{root}.{uuid.uuid4().hex}.tmp")
    try:
        for number, split in enumerate(SHAPES["images"]):
            write_split(draft, split, number)
        os.rename(draft, root)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not Path(root).exists():  # else another process has just put its own, equal copy there
            reason = error.strerror or error
            raise UserError(f"{root} can't be written ({reason}); make room, or work in another folder") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write the generated set in COCO's layout, unless it is there.")
    parser.add_argument("--out", type=Path, default=Path("data/shapes"), help="a new folder (default data/shapes)")
    args = parser.parse_args(argv)
    try:
        write_shapes(args.out)
    except UserError as error:
        parser.error(str(error))
    print(f"the generated shapes are in {args.out}")


if __name__ == "__main__":
    main()
