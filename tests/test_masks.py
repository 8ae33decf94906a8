"""data.py and evaluate.py: masks from the json to 112 x 112 crops, from 28 x 28 predictions to COCO's AP."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

import evaluate as evaluation
from data import (
    MASK_SIDE,
    TRAIN,
    VAL,
    Annotations,
    Masks,
    TrainSet,
    UserError,
    draw_view,
    inside_polygon,
    load_annotations,
    main,
    run_lengths,
)
from evaluate import (
    PALETTE,
    Place,
    coco_metrics,
    coco_results,
    draw_objects,
    evaluate,
    known_objects,
    paste_mask,
)

CPU = Place(torch.device("cpu"))
SIZE = 256


def random_masks(count, seed=0):
    """Blobs of many sizes and shapes, some touching every edge, some full or empty: uint8 (H, W)."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        height, width = rng.integers(1, 90, 2)
        field = torch.from_numpy(rng.normal(0, 1, (1, 1, *rng.integers(1, 9, 2))))
        smooth = F.interpolate(field, (height, width), mode="bilinear")[0, 0].numpy()
        yield np.asfortranarray((smooth > (-9, 9, 0)[k % 10 if k % 10 < 2 else 2]).astype(np.uint8))


def test_run_lengths_equal_pycocotools():
    """Oracle: pycocotools' encoder and decoder, on blobs, full and empty masks: as a list, text or bytes."""
    for mask in random_masks(200):
        code = coco_mask.encode(mask)
        pixels = mask.ravel(order="F")
        changes = np.flatnonzero(np.diff(pixels, prepend=0))
        runs = np.diff(changes, prepend=0, append=pixels.size)
        for counts in (code["counts"], code["counts"].decode(), runs.tolist()):
            assert np.array_equal(run_lengths(counts)[: len(runs)], runs) and run_lengths(counts).sum() == pixels.size


def test_polygons_equal_a_point_in_polygon_test():
    """Oracle: by hand, a point and an edge at a time; stars that cross themselves follow the parity rule."""
    rng = np.random.default_rng(0)
    x, y = np.arange(12) + 0.5, np.arange(9) + 0.5
    for _ in range(50):
        points = rng.uniform(-3, 14, (rng.integers(3, 9), 2))
        found = inside_polygon(points, x, y)
        for row, column in np.ndindex(found.shape):
            crossings = 0
            for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
                if (y0 <= y[row]) != (y1 <= y[row]):
                    crossings += x0 + (y[row] - y0) * (x1 - x0) / (y1 - y0) <= x[column]
            assert found[row, column] == crossings % 2
    assert not inside_polygon(points + 100, x, y).any()


@pytest.mark.parametrize("which", ["coco_sample", "shapes"])
def test_packed_segmentations_equal_the_json(which, request):
    """Oracle: the json. Every object's polygons or run lengths come back, also from a selection; arrays of numbers."""
    root = request.getfixturevalue(which)
    a = load_annotations(root, masks=True)
    assert all(isinstance(part, np.ndarray) and part.dtype.kind in "ifb" for part in a.masks)
    coco = COCO(root / "annotations" / f"instances_{TRAIN}.json")
    kinds = set()
    for part in (a, a.select([3, 4, 20, 49])):
        for i, image_id in enumerate(part.ids.tolist()):
            theirs = coco.imgToAnns[image_id]
            assert len(theirs) == np.diff(part.spans[i])
            for m, o in zip(range(*part.spans[i]), theirs):
                assert part.masks.coco(m, int(part.heights[i]), int(part.widths[i])) == o["segmentation"]
                kinds.add(type(o["segmentation"]))
    assert kinds == {list, dict}


def test_crops_of_run_lengths_equal_the_bitmap():
    """Oracle: pycocotools' decoded bitmap, read at the pixel under each cell's centre. Both kinds of run lengths."""
    for k, mask in enumerate(random_masks(60, seed=1)):
        height, width = mask.shape
        code = coco_mask.encode(mask)
        counts = code["counts"].decode() if k % 2 else run_lengths(code["counts"]).tolist()
        corners = np.sort(np.random.default_rng(k).uniform(0, 1, (2, 2)), axis=0) * [width, height]
        found = Masks.from_coco([[], {"size": [height, width], "counts": counts}]).crop(1, corners.ravel(), height)
        x, y = (corners[0] + (np.arange(MASK_SIDE)[:, None] + 0.5) / MASK_SIDE * (corners[1] - corners[0])).T.astype(
            int
        )
        assert found.shape == (MASK_SIDE, MASK_SIDE) and found.dtype == np.uint8
        assert np.array_equal(found, mask[y[:, None], x])


def test_an_object_of_several_polygons_is_their_union():
    """Oracle: by hand. Two overlapping squares and one apart: overlap is not a hole."""
    square = np.array([0.0, 0, 4, 0, 4, 4, 0, 4])
    parts = [square.tolist(), (square + 2).tolist(), (square + [8, 0] * 4).tolist()]
    masks = Masks.from_coco([parts])
    found = masks.crop(0, np.array([0.0, 0, 14, 14]), 14).reshape(14, 8, 14, 8)
    expected = np.zeros((14, 14))
    expected[:4, :4] = expected[2:6, 2:6] = expected[:4, 8:12] = 1
    assert np.array_equal(found.mean(axis=(1, 3)), expected)


def iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def test_mask_targets_equal_the_full_resolution_masks(coco_sample):
    """Oracle: pycocotools' full-size decode, cut and resized like the image, under jitter and flip. Mean IoU of the
    target masks, put back into their boxes, over coco50: 0.97 for objects of 32^2 pixels and more, else 0.90."""
    a, size = load_annotations(coco_sample, masks=True), 640
    coco = COCO(coco_sample / "annotations" / f"instances_{TRAIN}.json")
    dataset = TrainSet(a, size, (0.5, 2.0), seed=5)
    scores = {True: [], False: []}
    flips = 0
    for n in range(len(a.ids)):
        epoch, i = dataset.image_of(n)
        sample = dataset[n]
        rng = np.random.default_rng((5, epoch, i + 1))
        view = draw_view(rng, int(a.heights[i]), int(a.widths[i]), size, (0.5, 2.0))
        flips += view.flip
        objects = [o for o in coco.imgToAnns[int(a.ids[i])] if not o["iscrowd"]]
        visible = [o for o, box in zip(objects, view.boxes(a.objects(i)[0])) if (box[2:] - box[:2] >= 0.01).all()]
        assert len(visible) == (sample["labels"] >= 0).sum()
        for k, o in enumerate(visible):
            whole = torch.from_numpy(coco.annToMask(o)[view.top : view.bottom, view.left : view.right])[None, None]
            seen = F.interpolate(whole.float(), (view.height, view.width), mode="bilinear", antialias=True)[0, 0] > 0.5
            seen = (seen.flip(1) if view.flip else seen).numpy()
            box = sample["boxes"][k].double().numpy()
            ours = coco_mask.decode(paste_mask(sample["masks"][k].numpy(), box, view.height, view.width)).astype(bool)
            if seen.any():
                scores[o["area"] >= 32**2].append(iou(ours, seen))
    assert 10 < flips < 40 and min(map(len, scores.values())) > 100
    print({large: (np.mean(s), len(s)) for large, s in scores.items()})
    assert np.mean(scores[True]) >= 0.97 and np.mean(scores[False]) >= 0.90


def dense_paste(mask, box, height, width):
    """The mask padded with zeros and read at every pixel of the image by grid_sample."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    grid = torch.stack(((x - box[0]) / (box[2] - box[0]), (y - box[1]) / (box[3] - box[1])), dim=-1) * 2 - 1
    values = F.grid_sample(torch.from_numpy(mask)[None, None], grid[None].float(), align_corners=False)[0, 0]
    return (values > 0.5).numpy()


def test_pasting_equals_a_dense_paste():
    """Oracle: grid_sample over the whole image, and pycocotools' encoder of its bitmap, character by character; boxes
    of a pixel, at the edges and as large as the image."""
    rng = np.random.default_rng(0)
    overlaps, exact = [], 0
    for k in range(120):
        height, width = (int(v) for v in rng.integers(8, 160, 2))
        corners = np.sort(rng.uniform(0, 1, (2, 2)), axis=0)
        corners[1] += np.minimum(4 / np.array([width, height]), 1 - corners[1])
        if k % 4 == 0:
            corners = np.array([[0.0, 0], [1, 1]])
        if k % 4 == 1:
            corners[:, 1] = 0, 1  # full height: runs go on from column to column
        box = (corners * [width, height]).ravel()
        mask = F.interpolate(torch.from_numpy(rng.uniform(-0.5, 1.5, (1, 1, 5, 5))), (28, 28), mode="bilinear")
        mask = mask[0, 0].clip(0, 1).numpy().astype(np.float32)
        dense = dense_paste(mask, box, height, width)
        code = paste_mask(mask, box, height, width)
        assert code["size"] == [height, width]
        overlaps.append(iou(coco_mask.decode(code).astype(bool), dense) if dense.any() else 1.0)
        exact += code["counts"] == coco_mask.encode(np.asfortranarray(dense.astype(np.uint8)))["counts"]
    assert min(overlaps) >= 0.99 and exact > 110


@pytest.mark.parametrize("box", [[3.0, 3, 3, 9], [0, 0, 0, 0], [20, 30, 20, 30], [19.99, 29.99, 20, 30]])
def test_pasting_into_nothing(box):
    """Oracle: by hand. A box without area, wherever it is, has no pixels, and an empty code."""
    code = paste_mask(np.ones((28, 28), np.float32), np.array(box), 30, 20)
    assert coco_mask.area(code) == 0


def test_a_full_mask_covers_its_box():
    """Oracle: by hand. Ones over whole pixels give exactly these pixels; a whole image is one run."""
    ones = np.ones((28, 28), np.float32)
    found = coco_mask.decode(paste_mask(ones, np.array([3.0, 2, 9, 12]), 15, 12))
    assert found[2:12, 3:9].all() and found.sum() == 60
    whole = paste_mask(ones, np.array([0.0, 0, 12, 15]), 15, 12)
    assert run_lengths(whole["counts"]).tolist() == [0, 180]


@pytest.mark.parametrize("which, split", [("coco_sample", TRAIN), ("shapes", VAL)])
def test_ground_truth_masks_score_one(which, split, request, capsys):
    """Oracle: pycocotools' definition. The ground truth as run-length codes has segm AP exactly 1.000, and box AP."""
    a = load_annotations(request.getfixturevalue(which), split, masks=True)
    results = []
    for o in evaluation.ground_truth(a):
        if not o["iscrowd"]:
            i = int(np.flatnonzero(a.ids == o["image_id"])[0])
            size = int(a.heights[i]), int(a.widths[i])
            parts = o["segmentation"]
            codes = coco_mask.frPyObjects(parts, *size)
            code = coco_mask.merge(codes) if isinstance(codes, list) else codes
            row = {"image_id": o["image_id"], "category_id": o["category_id"], "bbox": o["bbox"], "score": 0.9}
            results.append(row | {"segmentation": {"size": size, "counts": code["counts"].decode()}})
    metrics = coco_metrics(a, results)
    for name in ("AP", "AP50", "AR100", "mask_AP", "mask_AP50", "mask_AR100", "mask_APs", "mask_APm", "mask_APl"):
        assert metrics[name] == pytest.approx(1.0, abs=1e-9), name
    lines = capsys.readouterr().out.splitlines()
    assert lines.index("Bbox") < lines.index("Segm") and sum(line.startswith(" Average") for line in lines) == 24


class Ideal(nn.Module):
    """Answers with the objects' boxes and the best 28 x 28 masks of them: the mean of 4 x 4 cells of the 112."""

    def __init__(self, annotations, noise=0.0):
        super().__init__()
        self.annotations, self.order, self.noise = annotations, iter(range(len(annotations.ids))), noise

    def forward(self, images, sizes):
        return [self.answer(next(self.order)) for _ in images]

    def answer(self, i):
        a = self.annotations
        boxes, labels, _, masks = known_objects(a, i)
        boxes = evaluation.full_view(int(a.heights[i]), int(a.widths[i]), SIZE).boxes(boxes)
        rng = np.random.default_rng(i)
        boxes = boxes + rng.normal(0, self.noise, boxes.shape)
        masks = np.reshape(masks, (-1, 28, 4, 28, 4)).mean(axis=(2, 4))
        scores = rng.uniform(0.5, 1, len(labels)).astype(np.float32)
        found = {"boxes": boxes.astype(np.float32), "scores": scores, "labels": labels, "masks": masks.astype("f")}
        return {name: torch.from_numpy(value) for name, value in found.items()}


def test_the_ceiling_of_28_by_28_masks(coco_sample, tmp_path):
    """Oracle: pycocotools. Ideal 28 x 28 masks, pasted, reach segm AP50 0.99 and AP 0.89 on coco50; results.json, read
    by pycocotools with the json itself, has the same numbers, the area of a detection being its mask's."""
    a = load_annotations(coco_sample, masks=True)
    metrics = evaluate(Ideal(a), a, SIZE, CPU, micro_batch=4, out=tmp_path)
    print(metrics["mask_AP"], metrics["mask_AP50"])
    assert metrics["AP"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["mask_AP50"] >= 0.99 and metrics["mask_AP"] >= 0.89
    coco = COCO(coco_sample / "annotations" / f"instances_{TRAIN}.json")
    results = json.loads((tmp_path / "results.json").read_text())
    for row in results:
        del row["bbox"]  # else pycocotools takes the box's area for the mask's
    judge = COCOeval(coco, coco.loadRes(results), "segm")
    judge.evaluate(), judge.accumulate(), judge.summarize()
    assert [metrics["mask_" + name] for name in evaluation.METRICS] == pytest.approx(judge.stats.tolist(), abs=1e-12)


def test_no_masks_found(shapes, capsys):
    """Oracle: by hand. Nothing found is mask AP 0.0, not a crash."""
    a = load_annotations(shapes, VAL, masks=True)
    metrics = coco_metrics(
        a, coco_results({0: evaluation.Objects(np.zeros((0, 4)), np.zeros(0), np.zeros(0), [])}, a, [])
    )
    assert metrics["mask_AP"] == metrics["mask_AR100"] == 0.0 and "warning" in capsys.readouterr().out


def peak():
    """The most memory that this process has held, in MiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def large_image():
    """Peak memory (MiB), beyond what was used before, of evaluating 100 masks on a 4000 x 3000 image."""
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (100, 2, 2)), axis=1)
    corners[:10] = [[0, 0], [1, 1]]
    found = {
        "boxes": torch.from_numpy((corners * [1280, 960]).reshape(100, 4)).float(),
        "scores": torch.from_numpy(rng.uniform(0.1, 1, 100)),
        "labels": torch.zeros(100, dtype=torch.int64),
        "masks": torch.from_numpy(rng.uniform(0, 1, (100, 28, 28))).float(),
    }
    image = {"ids": [7], "files": [b"x"], "heights": [3000], "widths": [4000], "spans": [[0, 1]]}
    objects = {"boxes": [[0.0, 0, 9, 9]], "labels": [0], "crowd": [False], "area": [81.0]}
    fields = {name: np.array(value) for name, value in (image | objects).items()}
    a = Annotations("", [(1, "a")], **fields, masks=Masks.from_coco([[[0, 0, 9, 0, 9, 9, 0, 9]]]))
    before = peak()
    found = evaluation.to_original(found, 4000, 3000, 1280).pasted(3000, 4000)
    coco_metrics(a, coco_results({0: found}, a, a.categories))
    return peak() - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_of_100_masks_on_a_large_image():
    """Oracle: the kernel's peak of a fresh process. A 4000 x 3000 image with 100 detections, ten of them the whole
    image, is evaluated with less than 1 GB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        extra = pool.apply(large_image)
    print(extra)
    assert 10 < extra < 1000


def test_a_data_set_without_masks_is_refused(coco_sample, tmp_path):
    """Oracle: by hand. Where masks are needed and the json has none, one sentence says so; boxes alone still load."""
    content = json.loads((coco_sample / "annotations" / f"instances_{TRAIN}.json").read_text())
    for o in content["annotations"]:
        o["segmentation"] = []
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / f"instances_{TRAIN}.json").write_text(json.dumps(content))
    (tmp_path / TRAIN).symlink_to(coco_sample / TRAIN)
    assert len(load_annotations(tmp_path).boxes) == len(content["annotations"])
    with pytest.raises(UserError, match="every object a segmentation, without which only --head retinanet"):
        load_annotations(tmp_path, masks=True)


def test_a_sample_with_masks(coco_sample):
    """Oracle: DESIGN's contract, and the sample without masks, which is otherwise the same."""
    with_masks, without = (TrainSet(load_annotations(coco_sample, masks=m), 128, (0.5, 2.0)) for m in (True, False))
    found = 0
    for n in range(8):
        sample, bare = with_masks[n], without[n]
        masks = sample.pop("masks")
        assert masks.shape == (100, 112, 112) and masks.dtype == torch.uint8 and masks.max() <= 1
        assert sample.keys() == bare.keys() == {"image", "boxes", "labels", "noise", "region"}
        assert all(torch.equal(torch.as_tensor(sample[k]), torch.as_tensor(bare[k])) for k in bare)
        real = sample["labels"] >= 0
        assert not masks[~real].any()
        found += (masks[real].flatten(1).any(dim=1) / real.sum()).sum().item() / 8
    assert found > 0.6


UNSOUND = {  # broken only where masks are needed
    "none": [],
    "too few runs": {"size": [48, 64], "counts": [5, 6]},
    "a negative run": {"size": [48, 64], "counts": [3080, -8]},
    "runs of runs": {"size": [48, 64], "counts": [[3072]]},
    "no runs": {"size": [48, 64], "counts": []},
    "text that is no code": {"size": [48, 64], "counts": "12 24"},
    "a code cut short": {"size": [48, 64], "counts": "T1X2o"},
    "an empty code": {"size": [48, 64], "counts": ""},
    "a number": {"size": [48, 64], "counts": 3072},
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_masks_are_dropped_where_masks_are_needed(case, coco_sample, tmp_path):
    """Oracle: by hand. One unsound mask among many is dropped, counted and named; without masks its box stays."""
    content = json.loads((coco_sample / "annotations" / f"instances_{TRAIN}.json").read_text())
    bad = next(o for o in content["annotations"] if not o["iscrowd"])
    size = next([i["height"], i["width"]] for i in content["images"] if i["id"] == bad["image_id"])
    segmentation = UNSOUND[case]
    bad["segmentation"] = segmentation | {"size": size} if isinstance(segmentation, dict) else segmentation
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / f"instances_{TRAIN}.json").write_text(json.dumps(content))
    (tmp_path / TRAIN).symlink_to(coco_sample / TRAIN)
    assert load_annotations(tmp_path).broken == ()
    a = load_annotations(tmp_path, masks=True)
    assert a.broken == (bad["id"],) and len(a.masks.rle) == len(a.boxes) == len(content["annotations"]) - 1


def test_masks_flip_with_the_image(shapes):
    """Oracle: the unflipped sample. The same view flipped has every mask and box mirrored."""
    a = load_annotations(shapes, masks=True)
    plain, either = TrainSet(a, 128, (0.7, 1.5), flip=False), TrainSet(a, 128, (0.7, 1.5))
    flipped = 0
    for n in range(12):
        first, second = plain[n], either[n]
        if not torch.equal(first["boxes"], second["boxes"]):
            real, width = first["labels"] >= 0, first["region"][1]
            assert torch.equal(first["masks"].flip(2), second["masks"])
            mirrored = torch.stack((width - first["boxes"][:, 2], width - first["boxes"][:, 0]), dim=1)
            assert torch.allclose(mirrored[real], second["boxes"][real][:, [0, 2]], atol=1e-4)
            flipped += not torch.equal(first["masks"], second["masks"])
    assert flipped > 2


@pytest.mark.parametrize("height, width", [(60, 90), (128, 128)])
def test_masks_are_drawn(height, width):
    """Oracle: by hand. A mask tints its pixels half-way to its class's colour; without it, only the frame is drawn."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    mask = np.zeros((1, 28, 28), np.float32)
    mask[0, 14:] = 1  # the lower half
    boxes, labels = torch.tensor([[20.0, 30, 60, 54]]), np.array([0])
    drawn = draw_objects(image, boxes, labels, [""], masks=mask)
    bare = draw_objects(image, boxes, labels, [""])
    tinted = (drawn != bare).any(dim=0)
    assert tinted[44:52, 24:57].all() and not tinted[:41].any() and not tinted[:, :19].any() and not tinted[56:].any()
    assert drawn[:, 48, 40].tolist() == [round(value / 2) for value in PALETTE[0]]


def test_pictures_of_a_data_set_with_masks(shapes, tmp_path, capsys):
    """Oracle: `python data.py --show` without masks. With them, inside the objects' boxes the pictures differ."""
    flags = ["--data", str(shapes), "--size", "128", "--show", "3", "--jitter", "1", "1"]
    main([*flags, "--out", str(tmp_path / "boxes")]), main([*flags, "--masks", "--out", str(tmp_path / "masks")])
    for name in ("000.png", "001.png", "002.png"):
        boxes, masks = (np.asarray(Image.open(tmp_path / kind / name)).astype(int) for kind in ("boxes", "masks"))
        assert 0.01 < (boxes != masks).any(axis=2).mean() < 0.9
