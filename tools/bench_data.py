"""How fast is the data? Training samples beside torchvision's own pipeline on one core; start-up at COCO's size.

python tools/bench_data.py --data FOLDER            a sample's milliseconds, on one core, of a folder in COCO's layout
python tools/bench_data.py --data FOLDER --base DIR the same beside another checkout of this project
python tools/bench_data.py --start                  start-up on a generated json of train2017's size, and a pass over it
python tools/bench_data.py --start --scale 0.1      the same, a tenth of it
"""

import argparse
import importlib
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402

JITTER = (0.5, 2.0)
IMAGES, OBJECTS, CLASSES = 118_287, 860_001, 80  # of train2017
POINTS = (8, 50)  # of a generated polygon: uniform; the json is about as large as train2017's


class Decoding:
    """Only the decoding of the images."""

    def __init__(self, annotations):
        self.annotations = annotations

    def __getitem__(self, n):
        path = self.annotations.path(n % len(self.annotations.ids))
        return np.asarray(Image.open(path).convert("RGB"))


class Torchvision:
    """torchvision's detection pipeline on the same files: scale jitter, crop, flip; float32, as its detectors take
    images, or stopped at uint8."""

    def __init__(self, root, size, masks, as_float):
        path, folder = data.split_paths(root, data.TRAIN)
        keys = ("boxes", "labels", "masks") if masks else ("boxes", "labels")
        transform = v2.Compose(
            [
                v2.ToImage(),
                v2.ScaleJitter((size, size), JITTER),
                v2.RandomCrop((size, size), pad_if_needed=True),
                v2.RandomHorizontalFlip(),
                v2.SanitizeBoundingBoxes(),
                *[v2.ToDtype(torch.float32, scale=True)] * as_float,
            ]
        )
        self.dataset = wrap_dataset_for_transforms_v2(
            CocoDetection(folder, path, transforms=transform), target_keys=keys
        )
        self.usable = [k for k in range(len(self.dataset)) if self.dataset.coco.imgToAnns[self.dataset.ids[k]]]

    def __getitem__(self, n):
        return self.dataset[self.usable[n % len(self.usable)]]


def milliseconds(datasets, rounds, samples):
    """{name: median over rounds of the milliseconds per sample}; the data sets take turns, so that noise is shared."""
    times = {name: [] for name in datasets}
    for _ in range(rounds):
        for name, dataset in datasets.items():
            began = time.perf_counter()
            for n in range(samples):
                dataset[n]
            times[name].append(1000 * (time.perf_counter() - began) / samples)
    return {name: float(np.median(values)) for name, values in times.items()}


def data_of(checkout):
    """The module data.py of another checkout, made with that checkout's modules; ours stay what `import` gives."""
    names = {path.stem for folder in (ROOT, checkout) for path in folder.glob("*.py")}
    ours = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module("data")
    finally:
        sys.path.remove(str(checkout))
        for name in names & set(sys.modules):
            del sys.modules[name]
        sys.modules.update(ours)


def throughput(root, base, rounds, samples):
    torch.set_num_threads(1)
    others = ("base", "decoding") if base else ("torchvision", "uint8", "decoding")
    print("ms per sample, and its ratio to this" + "; uint8: torchvision's without its detectors' float32" * (not base))
    print(f"{'':>22} {'this':>7}" + "".join(f" {name:>12} {'ratio':>6}" for name in others))
    for size, masks in ((640, False), (1024, True)):
        annotations = data.load_annotations(root, masks=masks)
        datasets = {"this": data.TrainSet(annotations, size, JITTER), "decoding": Decoding(annotations)}
        if base:
            datasets["base"] = base.TrainSet(base.load_annotations(root, masks=masks), size, JITTER)
        else:
            datasets |= {name: Torchvision(root, size, masks, name == "torchvision") for name in others[:2]}
        t = milliseconds(datasets, rounds, samples)
        cells = "".join(f" {t[name]:12.2f} {t[name] / t['this']:6.2f}" for name in others)
        print(f"{f'{size}, boxes' + ' and masks' * masks:>22} {t['this']:7.2f}{cells}", flush=True)


def write_json(root, scale):
    """A json of train2017's size, times `scale`, and the files that it names: one image, linked."""
    rng = np.random.default_rng(0)
    path, folder = data.split_paths(root, data.TRAIN)
    path.parent.mkdir(parents=True)
    folder.mkdir()
    images, objects = int(IMAGES * scale), int(OBJECTS * scale)
    names = [f"{k:012d}.jpg" for k in range(images)]
    ground = rng.integers(0, 255, (480 // 8, 640 // 8, 3), dtype=np.uint8)
    Image.fromarray(ground).resize((640, 480)).save(folder / "image.jpg")
    for name in names:
        (folder / name).symlink_to("image.jpg")
    url = "http://images.cocodataset.org/train2017/"
    rows = [
        {
            "id": k,
            "file_name": n,
            "height": 480,
            "width": 640,
            "coco_url": url + n,
            "date_captured": "2013-11-14 11:18:45",
        }
        for k, n in enumerate(names)
    ]
    categories = [{"id": k + 1, "name": f"class {k}", "supercategory": "none"} for k in range(CLASSES)]
    with open(path, "w") as file:
        file.write(f'{{"images": {json.dumps(rows)}, "categories": {json.dumps(categories)}, "annotations": [')
        owners, sides = rng.integers(0, images, objects), rng.integers(*POINTS, objects)
        for k, (owner, points) in enumerate(zip(owners.tolist(), sides.tolist())):
            angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
            radius, centre = rng.uniform(20, 90, points), rng.uniform(100, (540, 380))
            polygon = (centre + np.stack((np.cos(angle), np.sin(angle)), axis=1) * radius[:, None]).round(2)
            low, high = polygon.min(axis=0), polygon.max(axis=0)
            box = np.concatenate((low, high - low)).round(2).tolist()
            row = {"id": k + 1, "image_id": owner, "category_id": k % CLASSES + 1, "iscrowd": 0, "bbox": box}
            row |= {"area": round(box[2] * box[3] / 2, 4), "segmentation": [polygon.ravel().tolist()]}
            file.write(", " * (k > 0) + json.dumps(row))
        file.write("]}")
    return path


def anonymous(pids):
    """MiB of anonymous memory of these processes together."""
    lines = [line for pid in pids for line in open(f"/proc/{pid}/status") if line.startswith("RssAnon")]
    return sum(int(line.split()[1]) for line in lines) / 1024


def start_once(root):
    """In a process of its own: seconds to open the annotations, and what they add to its memory."""
    before, began = anonymous(["self"]), time.perf_counter()
    annotations = data.load_annotations(root, masks=True)
    print(f"{time.perf_counter() - began:.1f} s, {anonymous(['self']) - before:.0f} MiB of anonymous memory more")
    return annotations


def whole_pass(root, batch=32):
    """In a process of its own: anonymous memory of it and 2 workers early in a pass over all images, and at its end."""
    annotations = start_once(root)
    steps = len(annotations.ids) // batch
    dataset = data.TrainSet(annotations, 128, JITTER)
    loader = data.make_loader(dataset, data.micro_batches(0, steps, batch, batch), 2)
    for step, _ in enumerate(loader, 1):
        if step in (steps // 20, steps):
            pids = ["self", *(child.pid for child in multiprocessing.active_children())]
            print(
                f"after {step * batch} images: {anonymous(pids):.0f} MiB of anonymous memory in {len(pids)} processes"
            )


def start(scale):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "coco"
        size = write_json(root, scale).stat().st_size / 1e6
        print(f"a json of {size:.0f} MB, {IMAGES * scale:.0f} images, {OBJECTS * scale:.0f} polygons", flush=True)
        for what, function in (("first start", start_once), ("later start", start_once), ("a pass", whole_pass)):
            print(f"{what}:", flush=True)
            process = multiprocessing.get_context("spawn").Process(target=function, args=(root,))
            process.start()
            process.join()


def main():
    parser = argparse.ArgumentParser(description="Measure the data pipeline, or the start-up.")
    parser.add_argument("--data", type=Path, help="a folder in COCO's layout")
    parser.add_argument("--base", type=Path, metavar="DIR", help="another checkout, to measure its data.py beside ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=50, help="per round (default 50)")
    parser.add_argument("--start", action="store_true", help="measure the start-up and memory instead")
    parser.add_argument("--scale", type=float, default=1.0, help="of the generated json (default 1)")
    args = parser.parse_args()
    if args.start:
        start(args.scale)
    elif args.base and not (args.base / "data.py").is_file():
        parser.error(f"--base {args.base} has no data.py")
    elif args.data:
        throughput(args.data, args.base and data_of(args.base.resolve()), args.rounds, args.samples)
    else:
        parser.error("give --data FOLDER or --start")


if __name__ == "__main__":
    main()
