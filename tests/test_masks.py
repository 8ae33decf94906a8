"""data.py and evaluate.py: masks from the json to 112 x 112 crops, from 28 x 28 predictions to COCO's AP."""

import json
import math
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
from test_data import fixed_view, write_coco, wrong_cells
from torch import nn

import evaluate as evaluation
import look
from data import (
    MASK_SIDE,
    TRAIN,
    VAL,
    Annotations,
    TrainSet,
    UserError,
    View,
    crop_mask,
    draw_view,
    encode_mask,
    load_annotations,
)
from evaluate import PALETTE, Place, coco_metrics, coco_rows, draw_objects, evaluate, paste_mask

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


def runs_of(mask):
    """The run lengths of a mask (H, W), column by column, the background's first; a run at a time."""
    runs, value = [0], 0
    for pixel in mask.ravel(order="F").tolist():
        if pixel != value:
            value = pixel
            runs.append(0)
        runs[-1] += 1
    return runs


@pytest.mark.parametrize("which", ["coco_sample", "shapes"])
def test_masks_equal_pycocotools(which, request):
    """Oracle: pycocotools' annToRLE of the json, decoded, and its area. Every object's polygons or run lengths, crowds
    among them, come back as the same bitmap; from a selection, too."""
    root = request.getfixturevalue(which)
    a = load_annotations(root, masks=True)
    coco = COCO(root / "annotations" / f"instances_{TRAIN}.json")
    kinds, seen = set(), 0
    for part in (a, a.select([3, 4, 20, 49])):
        for i, image_id in enumerate(part.ids.tolist()):
            theirs = coco.imgToAnns[image_id]
            assert len(theirs) == np.diff(part.spans[i])
            for m, o in zip(range(*part.spans[i]), theirs):
                ours = part.mask(i, m)
                assert ours["size"] == [coco.imgs[image_id]["height"], coco.imgs[image_id]["width"]]
                assert np.array_equal(coco_mask.decode(ours), coco_mask.decode(coco.annToRLE(o)))
                kinds.add((type(o["segmentation"]), o["iscrowd"]))
                seen += 1
    assert {(list, 0), (dict, 1)} <= kinds and seen > len(coco.anns)


def test_codes_of_run_lengths_equal_the_bitmap():
    """Oracle: the bitmap. Run lengths as a list, with runs of nothing, too, and as pycocotools' text; blobs, full and
    empty masks."""
    for k, mask in enumerate(random_masks(200)):
        height, width = size = list(mask.shape)
        runs = runs_of(mask)
        for counts in (runs, [*runs, 0], [0, 0, *runs], coco_mask.encode(mask)["counts"].decode()):
            code = encode_mask({"size": size, "counts": counts}, height, width)
            assert np.array_equal(coco_mask.decode({"size": size, "counts": code}), mask), k


def broken_code(rng, mask):
    """(what was done, size, counts): a mask's run lengths, broken in one of many ways."""
    size, code, runs = list(mask.shape), coco_mask.encode(mask)["counts"].decode(), runs_of(mask)
    place = int(rng.integers(len(runs)))
    more = [r + int(rng.integers(1, 9)) * (k == place) for k, r in enumerate(runs)]
    text_of_more = coco_mask.frPyObjects({"size": size, "counts": more}, *size)["counts"].decode()
    junk = [None, True, -1, 0.5, 2**70, "", "x", "\x00", "é", "12 24", [], {}, [[]], [None], [0.5], [math.nan]]
    ways = {
        "text cut short": (size, code[: rng.integers(len(code))]),
        "text of too many pixels": (size, text_of_more),
        "text with runs far beyond": (size, code + "ooooo3" * int(rng.integers(1, 4))),
        "text of endless groups": (size, code + "o" * int(rng.integers(1, 40)) + "0"),
        "a character that is none": (size, code[:place] + "\x7f~p /!\n"[rng.integers(7)] + code[place:]),
        "bytes after the code": (size, code + "\n"),
        "too many pixels": (size, more),
        "a run left out": (size, [r for k, r in enumerate(runs) if k != place] if runs[place] else [*runs, 1]),
        "a negative run": (size, [*runs, 5, -5]),
        "runs of 2^32": (size, [*runs, 2**32]),
        "the sum beyond 64 bits": (size, [*runs, 2**64 - sum(runs), sum(runs)]),
        "a run of text": (size, [str(r) for r in runs]),
        "runs of runs": (size, [runs]),
        "sides exchanged": ([size[1], size[0] + (size[0] == size[1])], runs if place % 2 else code),
        "sides of text": ([str(side) for side in size], code),
        "one side": (size[:1], code),
        "junk": (size, junk[rng.integers(len(junk))]),
        "size of junk": (junk[rng.integers(len(junk))], code),
    }
    name = list(ways)[rng.integers(len(ways))]
    return name, *ways[name]


def test_broken_run_lengths_have_no_code():
    """Oracle: what was done to a sound code. 3000 broken ones of 18 kinds: None, and neither an error nor a crash."""
    rng = np.random.default_rng(4)
    names = set()
    for k, mask in enumerate(list(random_masks(300, seed=4)) * 10):
        name, size, counts = broken_code(rng, mask)
        assert encode_mask({"size": size, "counts": counts}, *mask.shape) is None, (k, name, size, counts)
        names.add(name)
    assert len(names) == 18
    for junk in (None, True, 7, math.nan, "x", "0", [], {}, [[]], [None], [7], ["x"], [{}], {"size": [4, 5]}):
        assert encode_mask(junk, 4, 5) is None, junk


@pytest.mark.parametrize("place", ["front", "middle", "end"])
def test_text_with_runs_of_nothing_equals_the_bitmap(place):
    """Oracle: the bitmap, as pycocotools decodes the text, too. Tools write such runs: they are as sound in text as in
    a list."""
    for mask in random_masks(30, seed=7):
        size, runs = list(mask.shape), runs_of(mask)
        middle = [runs[0] // 2, 0, runs[0] - runs[0] // 2, *runs[1:]]
        runs = {"front": [0, 0, *runs], "middle": middle, "end": [*runs, 0]}[place]
        counts = coco_mask.frPyObjects({"size": size, "counts": runs}, *size)["counts"].decode()
        assert np.array_equal(coco_mask.decode({"size": size, "counts": counts}), mask)
        code = encode_mask({"size": size, "counts": counts}, *size)
        assert code is not None, (size, runs)
        assert np.array_equal(coco_mask.decode({"size": size, "counts": code}), mask)


def test_a_number_is_no_text():
    """Oracle: COCO's format. "93" is a code of 12 pixels; the number 93 is none."""
    assert encode_mask({"size": [3, 4], "counts": "93"}, 3, 4) == b"93"
    assert encode_mask({"size": [3, 4], "counts": 93}, 3, 4) is None


def runs_in(text):
    """The runs that a text says, a character at a time; None where it ends within a number. A number is groups of 5
    bits, the low ones first, 32 where more follow; signed; from the fourth on the difference to the run before the
    last."""
    runs, value, bits = [], 0, 0
    for character in text:
        group = ord(character) - 48
        value, bits = value + ((group & 31) << bits), bits + 5
        if not group & 32:
            value -= (1 << bits) * (group >> 4 & 1)
            runs, value, bits = [*runs, value + (runs[-2] if len(runs) > 2 else 0)], 0, 0
    return None if bits else runs


def test_random_text():
    """Oracle: the format's definition, read a character at a time. Random text is a mask only if its runs are not
    negative and make up the image, and the bitmap is theirs; and always if it is the text that pycocotools writes."""
    rng, taken, refused = np.random.default_rng(5), 0, 0
    for k in range(20000):
        height, width = (int(v) for v in rng.integers(1, 5, 2))
        text = "".join(map(chr, rng.choice([*range(48, 64)] * 4 + [*range(40, 120)], rng.integers(0, 7))))
        code = encode_mask({"size": [height, width], "counts": text}, height, width)
        runs = runs_in(text) if all(48 <= ord(c) < 112 for c in text) else None
        if not runs or min(runs) < 0 or sum(runs) != height * width:
            assert code is None, (k, text, runs)
            refused += 1
            continue
        pixels = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T.astype(np.uint8)
        if code is not None:
            assert np.array_equal(coco_mask.decode({"size": [height, width], "counts": code}), pixels), (k, text, runs)
            taken += 1
        assert code is not None or coco_mask.encode(np.asfortranarray(pixels))["counts"] != text.encode(), (k, text)
    assert 100 < taken and 10000 < refused, (taken, refused)


def test_broken_polygons_are_left_out():
    """Oracle: pycocotools' merge of the sound ones alone. A bad polygon among good ones takes nothing with it; nothing
    but bad ones is no mask."""
    rng = np.random.default_rng(6)
    bad = [
        [1, 2, 3, 4],
        [1, 2, 3, 4, 5, 6, 7],
        [1, 2, 3, 4, 5, math.nan],
        [1, 2, 3, 4, 5, math.inf],
        [1, 2, 3, 4, 1e7, 6],
    ]
    bad += [[], "polygon", None, 7, {}, [[1, 2], [3, 4], [5, 6]], ["1", "2", "3", "4", "5", "6"], [1, 2, 3, 4, 5, None]]
    for k in range(200):
        height, width = (int(v) for v in rng.integers(30, 60, 2))
        good = [rng.uniform(-5, 55, 2 * rng.integers(3, 9)).tolist() for _ in range(rng.integers(1, 4))]
        both = good + [bad[j] for j in rng.integers(0, len(bad), rng.integers(1, 4))]
        expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(good, height, width)))
        code = encode_mask([both[j] for j in rng.permutation(len(both))], height, width)
        assert np.array_equal(coco_mask.decode({"size": [height, width], "counts": code}), expected), k
    for one in bad:
        assert encode_mask([one], 40, 50) is encode_mask([one, one], 40, 50) is None, one


def test_one_bad_polygon_of_two(tmp_path):
    """Oracle: by hand. The object is kept, with the mask of its sound polygon, in a sample, too."""

    def change(content):
        content["annotations"][0]["segmentation"] = [[1, 2, 3, 4], [0, 0, 20, 0, 20, 20, 0, 20]]
        content["annotations"][1]["segmentation"] = [[0, 0, 40, 0, 40, 40, 0, math.nan]]

    root = write_coco(tmp_path, [[[0, 0, 40, 40], [0, 0, 40, 40]]], size=(64, 64), change=change)
    a = load_annotations(root, masks=True)
    rule = "1 whose segmentation is neither polygons in pixels nor run lengths of its image, as annotation id 1: "
    assert len(a.boxes) == 1 and rule in a.notes
    sample = TrainSet(a, 128, (1, 1), flip=False)[0]
    expected = torch.zeros(112, 112, dtype=torch.uint8)
    expected[:56, :56] = 1
    assert torch.equal(sample["masks"][0], expected) and not sample["masks"][1:].any()


def test_crops_equal_the_bitmap():
    """Oracle: pycocotools' decoded bitmap, read at the pixel under each cell's centre, one at a time."""
    for k, mask in enumerate(random_masks(60, seed=1)):
        height, width = mask.shape
        corners = np.sort(np.random.default_rng(k).uniform(0, 1, (2, 2)), axis=0) * [width, height]
        if k % 5 == 0:
            corners = np.array([[0.0, 0], [width, height]])
        found = crop_mask(coco_mask.encode(mask), corners.ravel())
        assert found.shape == (MASK_SIDE, MASK_SIDE) and found.dtype == np.uint8
        (x1, y1), (x2, y2) = corners.tolist()
        for row in range(MASK_SIDE):
            for column in range(MASK_SIDE):
                x, y = x1 + (column + 0.5) / MASK_SIDE * (x2 - x1), y1 + (row + 0.5) / MASK_SIDE * (y2 - y1)
                assert found[row, column] == mask[int(y), int(x)], (k, row, column)


def test_an_object_of_several_polygons_is_their_union():
    """Oracle: by hand. Two overlapping squares and one apart: overlap is not a hole."""
    square = np.array([0.0, 0, 4, 0, 4, 4, 0, 4])
    parts = [square.tolist(), (square + 2).tolist(), (square + [8, 0] * 4).tolist()]
    code = {"size": [14, 14], "counts": encode_mask(parts, 14, 14)}
    found = crop_mask(code, np.array([0.0, 0, 14, 14])).reshape(14, 8, 14, 8)
    expected = np.zeros((14, 14))
    expected[:4, :4] = expected[2:6, 2:6] = expected[:4, 8:12] = 1
    assert np.array_equal(found.mean(axis=(1, 3)), expected)


def iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def test_mask_targets_equal_the_full_resolution_masks(coco_sample):
    """Oracle: pycocotools' full-size decode, cut and resized like the image, under jitter and flip. Mean IoU of the
    target masks, put back into their boxes, over coco50: 0.98 for objects of 32^2 pixels and more, else 0.96."""
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
    assert np.mean(scores[True]) >= 0.98 and np.mean(scores[False]) >= 0.96


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
    assert whole["counts"] == coco_mask.encode(np.ones((15, 12), np.uint8, order="F"))["counts"]


@pytest.mark.parametrize("which, split", [("coco_sample", TRAIN), ("shapes", VAL)])
def test_ground_truth_masks_score_one(which, split, request, capsys):
    """Oracle: pycocotools' definition. The json's own masks, by annToRLE, have segm AP exactly 1.000, and box AP."""
    root = request.getfixturevalue(which)
    a, coco = load_annotations(root, split, masks=True), COCO(root / "annotations" / f"instances_{split}.json")
    results = []
    for o in coco.anns.values():
        if not o["iscrowd"]:
            code = coco.annToRLE(o)
            row = {"image_id": o["image_id"], "category_id": o["category_id"], "bbox": o["bbox"], "score": 0.9}
            results.append(row | {"segmentation": {"size": code["size"], "counts": code["counts"].decode()}})
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
        boxes, labels = a.objects(i)
        masks = [crop_mask(a.mask(i, m), box) for m, box in zip(a.rows(i), boxes)]
        boxes = evaluation.full_view(int(a.heights[i]), int(a.widths[i]), SIZE).boxes(boxes)
        rng = np.random.default_rng(i)
        boxes = boxes + rng.normal(0, self.noise, boxes.shape)
        masks = np.reshape(masks, (-1, 28, 4, 28, 4)).mean(axis=(2, 4))
        scores = rng.uniform(0.5, 1, len(labels)).astype(np.float32)
        found = {"boxes": boxes.astype(np.float32), "scores": scores, "labels": labels, "masks": masks.astype("f")}
        return {name: torch.from_numpy(value) for name, value in found.items()}


def test_the_ceiling_of_28_by_28_masks(coco_sample, tmp_path):
    """Oracle: pycocotools. Ideal 28 x 28 masks, pasted, reach segm AP50 0.999 and AP 0.99 on coco50; results.json, read
    by pycocotools with the json itself, has the same numbers, the area of a detection being its mask's."""
    a = load_annotations(coco_sample, masks=True)
    metrics = evaluate(Ideal(a), a, SIZE, CPU, micro_batch=4, out=tmp_path)
    print(metrics["mask_AP"], metrics["mask_AP50"])
    assert metrics["AP"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["mask_AP50"] >= 0.999 and metrics["mask_AP"] >= 0.99
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
    found = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    rows = coco_rows(found | {"masks": torch.zeros(0, 28, 28)}, 7, 60, 90, SIZE, [])
    assert rows == []
    metrics = coco_metrics(a, rows)
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
    image = {"ids": [7], "files": ["x"], "heights": [3000], "widths": [4000], "spans": [[0, 1]]}
    objects = {"boxes": [[0.0, 0, 9, 9]], "labels": [0], "crowd": [False], "area": [81.0]}
    fields = {name: np.array(value) for name, value in (image | objects).items()}
    code = encode_mask([[0, 0, 9, 0, 9, 9, 0, 9]], 3000, 4000)
    a = Annotations("", [(1, "a")], **fields, codes=np.frombuffer(code, np.uint8), starts=np.array([0, len(code)]))
    before = peak()
    coco_metrics(a, coco_rows(found, 7, 3000, 4000, 1280, a.categories))
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
    with pytest.raises(
        UserError, match="whose segmentation is neither polygons in pixels nor.* or use --head retinanet"
    ):
        load_annotations(tmp_path, masks=True)


def test_a_sample_with_masks(coco_sample):
    """Oracle: by hand, and the sample without masks, which is otherwise the same."""
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
    bare = load_annotations(tmp_path)
    assert "broken" not in bare.notes and len(bare.boxes) == len(content["annotations"])
    a, rule = load_annotations(tmp_path, masks=True), "neither polygons in pixels nor run lengths of its image"
    assert f"broken: 1 whose segmentation is {rule}, as annotation id {bad['id']}: {bad['segmentation']}" in a.notes
    assert len(a.starts) - 1 == len(a.boxes) == len(content["annotations"]) - 1


def test_masks_of_shapes(shapes, monkeypatch):
    """Oracle: pycocotools' bitmaps, read cell by cell, for given views. Polygons and run lengths, cut or whole, flipped
    or not; images with crowds, and with objects that the view does not show, among them."""
    a, rng = load_annotations(shapes, masks=True), np.random.default_rng(0)
    dataset, seen = TrainSet(a, 128, (1, 1)), {"masks": 0, "crowds": 0, "left out": 0, "cut": 0}
    for n in range(60):
        i = dataset.image_of(n)[1]
        height, width = int(a.heights[i]) // 2, int(a.widths[i]) // 2
        left, top = int(rng.integers(width)), int(rng.integers(height))
        view = View(left, top, left + width, top + height, 120, 90, bool(n % 2))
        fixed_view(monkeypatch, view)
        sample, rows = dataset[n], []
        for m in range(*a.spans[i]):
            x, y, w, h = a.boxes[m]
            sides = min(x + w, left + width) - max(x, left), min(y + h, top + height) - max(y, top)
            shown = min(sides[0] * 120 / width, sides[1] * 90 / height) >= 0.01
            rows += [m] if shown and not a.crowd[m] else []
            seen["crowds"] += int(a.crowd[m])
            seen["left out"] += not shown
            seen["cut"] += shown and sum(sides) < w + h - 1
        found, wanted = sample["labels"][sample["labels"] >= 0].tolist(), a.labels[rows].tolist()
        assert found == wanted, f"sample {n}, image {i}, {view}: labels {found}, wanted {wanted}"
        for k, m in enumerate(rows):
            share = wrong_cells(sample["masks"][k], a, m, i, view)
            assert share < 0.01, f"sample {n}, {view}: {share:.0%} of mask {k} is not what it shows of object {m}'s"
            seen["masks"] += 1
    assert min(seen.values()) > 2, f"what the views showed: {seen}"


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
    """Oracle: `python tools/look.py --show` without masks. With them, inside the objects' boxes the pictures differ."""
    flags = ["--data", str(shapes), "--size", "128", "--show", "3", "--jitter", "1", "1"]
    for kind, more in (("boxes", []), ("masks", ["--masks"])):
        look.main([*flags, *more, "--out", str(tmp_path / kind)])
    for name in ("000.png", "001.png", "002.png"):
        boxes, masks = (np.asarray(Image.open(tmp_path / kind / name)).astype(int) for kind in ("boxes", "masks"))
        assert 0.01 < (boxes != masks).any(axis=2).mean() < 0.9
