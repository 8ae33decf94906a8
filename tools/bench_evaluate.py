"""How fast is an evaluation? Pasting and encoding masks beside torchvision and pycocotools; the split of a whole one.

python tools/bench_evaluate.py                                      100 masks on a 640 x 480 image, and 4000 x 3000
python tools/bench_evaluate.py --weights FILE --data FOLDER         where the time of a checkpoint's evaluation goes
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
import heads  # noqa: E402
from data import load_annotations  # noqa: E402
from model import load_checkpoint, load_model  # noqa: E402

MASKS = 100
SIZES = ((640, 480), (4000, 3000))  # width, height


def detections(width, height):
    """Boxes (100, 4) xyxy of every size up to the image's, log-uniform, and smooth masks (100, 28, 28) float32."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(0.05), 0, (MASKS, 2))) * [width, height]
    corners = rng.uniform(0, 1, (MASKS, 2)) * ([width, height] - sides)
    noise = torch.from_numpy(rng.normal(0, 1, (MASKS, 1, 5, 5))).float()
    masks = torch.nn.functional.interpolate(noise, (28, 28), mode="bicubic").sigmoid()[:, 0]
    return np.concatenate((corners, corners + sides), axis=1), masks.numpy()


def theirs(boxes, masks, width, height):
    pasted = paste_masks_in_image(torch.from_numpy(masks)[:, None], torch.from_numpy(boxes).float(), (height, width))
    bitmaps = np.asfortranarray((pasted[:, 0] > 0.5).byte().permute(1, 2, 0).numpy())
    return coco_mask.encode(bitmaps)


def ours(boxes, masks, width, height):
    return [evaluate.paste_mask(mask, box, height, width) for mask, box in zip(masks, boxes)]


def pasting(rounds):
    print(f"{MASKS} masks, ms: {'torchvision + pycocotools':>26} {'this':>7} {'ratio':>6} {'IoU of the two':>15}")
    for width, height in SIZES:
        boxes, masks = detections(width, height)
        times, codes = {theirs: [], ours: []}, {}
        for _ in range(rounds):
            for way in times:
                began = time.perf_counter()
                codes[way] = way(boxes, masks, width, height)
                times[way].append(1000 * (time.perf_counter() - began))
        a, b = (np.median(times[way]) for way in (theirs, ours))
        same = np.mean([coco_mask.iou([x], [y], [0])[0, 0] for x, y in zip(codes[theirs], codes[ours])])
        print(f"{f'{width} x {height}':>14} {a:26.0f} {b:7.0f} {a / b:6.1f} {same:15.3f}")


def split(weights, root, limit):
    """The evaluation of a checkpoint, with the time that NMS takes of the model's."""
    checkpoint, place = load_checkpoint(weights), evaluate.start()
    model = load_model(checkpoint, place)
    annotations = load_annotations(evaluate.resolve_root(root), "val2017", model.masks).select(slice(limit))
    seconds = 0.0

    def timed(function):
        def run(*args):
            nonlocal seconds
            began = time.perf_counter()
            result = function(*args)
            seconds += time.perf_counter() - began
            return result

        return run

    heads.nms, heads.batched_nms = timed(heads.nms), timed(heads.batched_nms)
    evaluate.evaluate(model, annotations, checkpoint["recipe"]["size"], place, workers=2)
    print(f"of the model's time, NMS took {seconds:.1f} s (on a GPU with all that it had to wait for)")


def main():
    parser = argparse.ArgumentParser(description="Measure the parts of an evaluation.")
    parser.add_argument("--weights", type=Path, help="a checkpoint, to measure a whole evaluation")
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.weights:
        split(args.weights, args.data, args.limit)
    else:
        pasting(args.rounds)


if __name__ == "__main__":
    main()
