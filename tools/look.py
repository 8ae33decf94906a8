"""Looks at a data set as training sees it: counts, bad images, augmented samples.

python tools/look.py --data D                       count its images and objects
python tools/look.py --data D --check               all that is wrong with it: ids, files, objects, images
python tools/look.py --data D --show 8 --masks      write augmented training samples with their boxes and masks
"""

import argparse
import math
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import TRAIN, TrainSet, load_annotations, read_checked  # noqa: E402
from evaluate import draw_objects, make_folder, one_sentence, resolve_root  # noqa: E402
from model import UserError, refuse  # noqa: E402


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


def check(annotations, faults):
    """Decode every image, print the faults and what is wrong with the bad images; exit code 2 if there is anything."""
    bad, there = [], [i for i in range(len(annotations.ids)) if Path(annotations.path(i)).exists()]
    for i in tqdm(there, desc="decoding", disable=None):
        try:
            read_checked(annotations, i)
        except UserError as error:
            bad.append(str(error))
    print("\n".join([f"fault: {fault}" for fault in faults] + bad + [f"{len(bad)} of {len(there)} images are bad"]))
    if bad or faults:
        raise SystemExit(2)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Look at a data set as training sees it.")
    add = parser.add_argument
    add("--data", default="data/coco", help="a folder in COCO's layout, or `shapes` (default data/coco)")
    add("--split", default=TRAIN, help=f"default {TRAIN}")
    names = dict(nargs=2, metavar=("JSON", "IMAGES"))
    add("--train", "--val", dest="paths", **names, help="any json and its images, instead of --data and --split")
    add("--masks", action="store_true", help="with masks, as Mask R-CNN is trained")
    add("--check", action="store_true", help="find and list all that is wrong, decoding every image")
    add("--show", type=int, default=0, metavar="N", help="write N augmented samples with their objects")
    add("--size", type=int, default=640, help="side of the network's input (default 640)")
    add("--jitter", type=float, nargs=2, default=(0.5, 2.0), metavar=("LOW", "HIGH"))
    add("--out", type=Path, default=Path("runs/show"), help="where --show writes (default runs/show)")
    args = parser.parse_args(argv)
    if args.size <= 0 or args.show < 0 or not 0 < args.jitter[0] <= args.jitter[1] < math.inf:
        raise UserError("--size must be positive, --show not negative, and --jitter 0 < LOW <= HIGH")

    faults = []
    report = faults.append if args.check else refuse
    annotations = load_annotations(resolve_root(args.data), args.split, args.masks, args.paths, report)
    print(f"{args.split}: {annotations.summary()}")
    if args.show:
        show(TrainSet(annotations, args.size, args.jitter), args.show, args.out)
    if args.check:
        check(annotations, faults)


if __name__ == "__main__":
    with one_sentence():
        main()
