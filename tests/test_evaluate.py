"""evaluate.py: COCO's metrics, several processes, results, pictures, prediction on any image."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

import evaluate as evaluation
import train
from data import TRAIN, VAL, full_view, load_annotations, make_loader
from evaluate import METRICS, Place, coco_metrics, coco_rows, evaluate, main, predict, to_original, write_grid
from model import ARCHS, UserError, build_model, load_checkpoint, load_model

CPU = Place(torch.device("cpu"))
SIZE = 256


class Oracle(nn.Module):
    """Answers with the ground truth of the images it is shown, known from their order, its boxes moved by `noise`."""

    def __init__(self, annotations, order, noise=0.0):
        super().__init__()
        self.annotations, self.order, self.noise = annotations, iter(order), noise

    def forward(self, images, sizes):
        return [self.answer(next(self.order)) for _ in images]

    def answer(self, i):
        boxes, labels = self.annotations.objects(i)
        boxes = full_view(self.annotations.heights[i], self.annotations.widths[i], SIZE).boxes(boxes)
        rng = np.random.default_rng(i)
        boxes = torch.from_numpy(boxes + rng.normal(0, self.noise, boxes.shape)).float()
        scores = torch.from_numpy(rng.uniform(0.5, 1, len(labels))).float()
        return {"boxes": boxes, "scores": scores, "labels": torch.from_numpy(labels)}


@pytest.mark.parametrize("which, split", [("coco_sample", TRAIN), ("shapes", VAL)])
def test_ground_truth_scores_one(which, split, request, tmp_path, capsys):
    """Oracle: pycocotools' definition. The ground truth fed back as detections has AP 1.000, crowds or not."""
    a = load_annotations(request.getfixturevalue(which), split)
    metrics = evaluate(Oracle(a, range(len(a.ids))), a, SIZE, CPU, micro_batch=4, out=tmp_path)
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == pytest.approx(1.0, abs=1e-9)
    out = capsys.readouterr().out
    assert re.search(rf"^evaluated {len(a.ids)}/{len(a.ids)} images in \d+\.\d s$", out, re.M)
    lines = [line for line in out.splitlines() if line.startswith(" Average")]
    assert len(lines) == 12 == len(METRICS)
    assert lines[0] == " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 1.000"
    assert re.fullmatch(
        r" Average Recall     \(AR\) @\[ IoU=0.50:0.95 \| area= large \| maxDets=100 \] = -?\d\.\d{3}", lines[11]
    )


def test_results_json_is_coco_format(coco_sample, tmp_path):
    """Oracle: pycocotools on the json itself. results.json loads there and has the same twelve numbers."""
    a = load_annotations(coco_sample)
    metrics = evaluate(Oracle(a, range(len(a.ids)), noise=4.0), a, SIZE, CPU, micro_batch=4, out=tmp_path)
    coco = COCO(coco_sample / "annotations" / f"instances_{TRAIN}.json")
    judge = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), "bbox")
    judge.evaluate(), judge.accumulate(), judge.summarize()
    assert list(metrics.values()) == pytest.approx(judge.stats.tolist(), abs=1e-12)
    assert 0.2 < metrics["AP"] < 0.95


def test_no_detections(shapes, tmp_path, capsys):
    """Oracle: by hand. Nothing found is AP 0.0 with a warning, not a crash or -1."""
    a = load_annotations(shapes, VAL)
    metrics = coco_metrics(a, [])
    assert metrics["AP"] == metrics["AR100"] == 0.0
    assert "warning" in capsys.readouterr().out


def test_a_split_without_objects(shapes, capsys):
    """Oracle: pycocotools' convention. With nothing to find AP is -1, and a line says why."""
    a = load_annotations(shapes, VAL)
    assert coco_metrics(a.select([])._replace(ids=a.ids[:1], spans=np.zeros((1, 2), int)), [])["AP"] == -1
    assert "there is no truth to score" in capsys.readouterr().out


def test_per_class(shapes, capsys):
    """Oracle: by hand. Perfect detections of one class only: its AP is 1, the others' 0, the mean 1 / K."""
    a = load_annotations(shapes, VAL)
    truth = [o for o in evaluation.ground_truth(a) if not o["iscrowd"] and o["category_id"] == 4]
    results = [{k: o[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for o in truth]
    metrics = coco_metrics(a, results, per_class=True)
    lines = dict(re.findall(r"^ (\w+) +AP = (\S+)$", capsys.readouterr().out, re.M))
    assert lines == {name: "1.000" if name == "triangle" else "0.000" for _, name in a.categories}
    assert metrics["AP"] == pytest.approx(1 / 6)


def evaluate_in_a_process(rank, world, root, folder):
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    a = load_annotations(root, VAL)
    a = a.select(range(7))
    place = CPU._replace(rank=rank, world=world)
    metrics = evaluate(Oracle(a, range(rank, 7, world), noise=3.0), a, SIZE, place, micro_batch=2, out=folder)
    Path(folder, f"{world}_{rank}.json").write_text(json.dumps(metrics))
    evaluation.finish(place)


def test_any_number_of_processes_gives_the_same(shapes, tmp_path):
    """Oracle: one process. AP on 7 images is equal, on every rank, for 1 and 3 processes, and so is results.json."""
    results, metrics = [], []
    for world in (1, 3):
        mp.spawn(evaluate_in_a_process, args=(world, shapes, tmp_path), nprocs=world)
        results.append((tmp_path / "results.json").read_text())
        metrics += [json.loads((tmp_path / f"{world}_{rank}.json").read_text()) for rank in range(world)]
    assert len(metrics) == 4 and all(m == metrics[0] for m in metrics) and 0.1 < metrics[0]["AP"] < 1
    assert results[0] == results[1]


def test_boxes_map_back_per_axis():
    """Oracle: by hand. 100 x 61 pixels become 128 x 78: the axes' factors differ by rounding."""
    boxes = torch.tensor([[0.0, 0, 128, 78], [64, 39, 96, 78]])
    assert to_original(boxes, 61, 100, 128).tolist() == [[0, 0, 100, 61], [50, 30.5, 75, 61]]
    found = {"boxes": boxes, "scores": torch.ones(2), "labels": torch.tensor([0, 1])}
    rows = coco_rows(found, 7, 61, 100, 128, [(3, "a"), (8, "b")])
    assert [row["bbox"] for row in rows] == [[0, 0, 100, 61], [50, 30.5, 25, 30.5]]
    assert [(row["image_id"], row["category_id"], row["score"]) for row in rows] == [(7, 3, 1), (7, 8, 1)]


@pytest.fixture(scope="module", params=["retinanet", "mask_rcnn"])
def lively(request, run, mask_run, tmp_path_factory):
    """A checkpoint that detects something everywhere: a run's, its class biases drawn anew."""
    torch.manual_seed(0)
    if request.param == "retinanet":
        checkpoint = load_checkpoint(run / "last.pt")
        checkpoint["model"]["head.class_predict.bias"] = torch.randn(9 * 6) - 2
    else:
        checkpoint = load_checkpoint(mask_run / "last.pt")
        checkpoint["model"]["box_head.class_predict.weight"] *= 0
        checkpoint["model"]["box_head.class_predict.bias"] = torch.tensor([0.0, 1, 2, 3, 4, 5, 6]) / 3
        checkpoint["model"]["mask_head.mask_predict.bias"] += 0.5
    path = tmp_path_factory.mktemp("lively") / "last.pt"
    torch.save(checkpoint, path)
    return path


def test_command_line(lively, shapes, tmp_path, capsys):
    """Oracle: `evaluate` called from here: the same twelve lines; the json is complete."""
    flags = ["--data", str(shapes), "--out", str(tmp_path), "--per-class", "--micro-batch", "16", "--device", "cpu"]
    main(["--weights", str(lively), *flags])
    out = capsys.readouterr().out
    assert "evaluated 24/24 images" in out and re.search("^ disc +AP", out, re.M)
    model = load_model(load_checkpoint(lively), CPU)
    evaluate(model, load_annotations(shapes, VAL, masks=model.masks), 128, CPU, micro_batch=16)
    again = capsys.readouterr().out
    assert [x for x in out.splitlines() if "Average" in x] == [x for x in again.splitlines() if "Average" in x]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len({row["image_id"] for row in results}) == 24
    assert {row["category_id"] for row in results} <= {1, 2, 4, 5, 9, 12}
    assert all(("segmentation" in row) == model.masks for row in results)


def test_prediction_on_photos(lively, coco_sample, tmp_path, capsys):
    """Oracle: by hand. Every image of a folder gets a picture of its own size, turned as EXIF says."""
    folder = tmp_path / "photos"
    folder.mkdir()
    photo = Image.open(next((coco_sample / TRAIN).iterdir()))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=exif)
    photo.convert("L").save(folder / "grey.png")
    (folder / "notes.txt").write_text("not an image")
    flags = ["--weights", str(lively), "--device", "cpu", "--out", str(tmp_path / "seen")]
    main([*flags, "--images", str(folder), "--score", "0.1"])
    assert "on 2 images" in capsys.readouterr().out
    assert Image.open(tmp_path / "seen" / "turned.jpg.png").size == photo.size[::-1]
    assert Image.open(tmp_path / "seen" / "grey.png.png").size == photo.size
    rows = json.loads((tmp_path / "seen" / "predictions.json").read_text())
    assert {row["file"] for row in rows} == {"turned.jpg", "grey.png"}
    assert all(row["score"] >= 0.1 and min(row["bbox"]) >= 0 for row in rows)
    with_masks = load_checkpoint(lively)["recipe"]["head"] == "mask_rcnn"
    assert rows and all(("segmentation" in row) == with_masks for row in rows)
    for row in rows:
        if with_masks and row["file"] == "grey.png":
            assert row["segmentation"]["size"] == [photo.height, photo.width]
            pixels = coco_mask.decode(row["segmentation"])
            left, top, width, height = row["bbox"]
            pixels[int(top) : int(top + height) + 1, int(left) : int(left + width) + 1] = 0
            assert not pixels.any()  # no mask leaves its box
    for bad in (tmp_path / "none", tmp_path / "seen" / "none.jpg"):
        with pytest.raises(UserError, match="no image there"):
            main([*flags, "--images", str(bad)])


def test_predictions_equal_the_evaluation(lively, shapes, tmp_path):
    """Oracle: results.json of an evaluation, an image at a time. A picture is seen as the evaluation sees it, to the
    last bit, with every field; --score leaves out what is below it."""
    a = load_annotations(shapes, VAL)
    model = load_model(load_checkpoint(lively), CPU)
    evaluate(model, a.select([4, 5]), 128, CPU, micro_batch=1, out=tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    expected = [row for row in rows if row["image_id"] == a.ids[5]]
    names, scores = dict(a.categories), sorted(row["score"] for row in expected)
    assert len(scores) > 10 and all(("segmentation" in row) == model.masks for row in expected)
    for score in (0.0, scores[len(scores) // 2]):
        predict(model, Path(a.path(5)), tmp_path, a.categories, 128, CPU, score)
        found = json.loads((tmp_path / "predictions.json").read_text())
        for row in found:
            assert row.pop("file") == Path(a.path(5)).name and row.pop("category") == names[row["category_id"]]
        # The threshold is compared in the scores' float32.
        assert [row | {"image_id": int(a.ids[5])} for row in found] == [r for r in expected if r["score"] >= score]


OWN = dataclasses.replace(ARCHS["tiny"], alpha=1.0, endpoint_channels=48)


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_a_network_of_ones_own(head, shapes, tmp_path, monkeypatch, capsys):
    """Oracle: a network built here from that Arch, with the checkpoint's weights. A checkpoint whose network is no row
    of ARCHS, nor its --arch of this name any more, is trained, evaluates with --data and predicts with --images."""
    assert OWN not in ARCHS.values()
    flags = f"--arch tiny --size 128 --protocol toy --head {head} --limit 8 --epochs 1 --batch-size 4".split()
    flags += ["--workers", "0", "--device", "cpu", "--data", str(shapes)]
    train.main([*flags, "--out", str(tmp_path / "run")], arch=OWN)
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    model = checkpoint["model"]  # after two steps it is sure of nothing: the same scores everywhere, and some are high
    if head == "retinanet":
        model["head.class_predict.bias"] += 3
    else:
        model["box_head.class_predict.weight"] *= 0
        model["box_head.class_predict.bias"] = torch.arange(7) / 3
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    detector = build_model(OWN, head, 6)
    detector.load_state_dict(checkpoint["model"])  # strictly: every tensor, of its shape
    with pytest.raises(RuntimeError, match="size mismatch"):
        build_model("tiny", head, 6).load_state_dict(checkpoint["model"])
    detector = CPU.move(detector).eval()

    monkeypatch.delitem(ARCHS, "tiny")
    weights = ["--weights", str(tmp_path / "run" / "last.pt"), "--device", "cpu"]
    capsys.readouterr()
    main([*weights, "--data", str(shapes), "--limit", "6", "--workers", "0", "--out", str(tmp_path)])
    a = load_annotations(shapes, VAL, masks=detector.masks)
    assert "evaluated 6/6 images" in capsys.readouterr().out
    theirs = (tmp_path / "results.json").read_text()
    evaluate(detector, a.select(range(6)), 128, CPU, out=tmp_path)
    assert theirs == (tmp_path / "results.json").read_text() and len(json.loads(theirs)) > 6

    main([*weights, "--images", a.path(3), "--score", "0", "--out", str(tmp_path / "seen")])
    rows = json.loads((tmp_path / "seen" / "predictions.json").read_text())
    (batch,) = make_loader(evaluation.EvalSet(a, 128), [[3]], 0)
    with torch.no_grad():
        (found,) = detector(CPU.move(batch["image"]), sizes=batch["region"])
    assert [row["score"] for row in rows] == found["scores"].tolist() != []
    assert Image.open(tmp_path / "seen" / f"{Path(a.path(3)).name}.png").size == (a.widths[3], a.heights[3])


@pytest.mark.parametrize("network", ["absent", None, {}, {"alpha": 1.0}, "spine", "more"])
def test_a_checkpoint_that_does_not_say_its_network(network, run, tmp_path):
    """Oracle: by hand. Without "network", or with one that makes no Arch, as another version may have written it, a
    checkpoint is refused with a sentence that names it."""
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    recipe = checkpoint["recipe"]
    if network == "absent":
        del recipe["network"]
    elif network == "spine":
        recipe["network"]["spine"] = ((2, 2),)
    elif network == "more":
        recipe["network"]["depth"] = 7
    else:
        recipe["network"] = network
    torch.save(checkpoint, tmp_path / "old.pt")
    for flags in (["--data", str(tmp_path)], ["--images", str(tmp_path)]):
        with pytest.raises(UserError, match=r"old\.pt doesn't say its network: another version of train\.py wrote it"):
            main(["--weights", str(tmp_path / "old.pt"), "--device", "cpu", *flags])


def test_picture_grid(shapes, tmp_path):
    """Oracle: by hand. Ground truth beside detections: 8 pairs in 4 columns; an oracle's two halves look alike."""
    a = load_annotations(shapes, VAL)
    chosen = np.linspace(0, len(a.ids) - 1, 8).astype(int)

    class Same(Oracle):
        def forward(self, images, sizes):
            (answer,) = super().forward(images, sizes)
            return [answer | {"scores": torch.ones(len(answer["labels"]))}]

    evaluation_size, globals()["SIZE"] = SIZE, 128
    try:
        write_grid(Same(a, chosen), a, 128, CPU, tmp_path / "grid.png")
    finally:
        globals()["SIZE"] = evaluation_size
    grid = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    assert grid.shape == (4 * 324 + 4, 4 * 324 + 4, 3)
    pairs = (
        grid[4:, 4:].reshape(4, 324, 4, 324, 3)[:, :320, :, :320].transpose(0, 2, 1, 3, 4).reshape(8, 2, 320, 320, 3)
    )
    assert all((np.abs(left - right).max(-1) > 0).mean() < 0.08 for left, right in pairs)


def test_other_classes_are_refused(run, coco_sample):
    """Oracle: by hand. A model whose classes don't cover the data set's is refused, naming some of them."""
    with pytest.raises(UserError, match="trained on other classes.*person"):
        main(["--weights", str(run / "last.pt"), "--data", str(coco_sample), "--split", TRAIN, "--device", "cpu"])


def test_a_missing_split_that_was_asked_for(run, coco_sample):
    """Oracle: by hand. A bad request is one sentence and exit code 2, without a traceback."""
    script = Path(evaluation.__file__)
    command = [sys.executable, script, "--weights", run / "last.pt", "--data", coco_sample]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "val2017" in done.stderr and "Traceback" not in done.stderr


def test_labels_do_not_cover_each_other(monkeypatch):
    """Oracle: by hand. Of labels that would lie on an earlier one's place only the earlier, of a higher score, is
    drawn; boxes are all drawn."""
    seen = []
    monkeypatch.setattr(evaluation, "draw_bounding_boxes", lambda image, *given, **style: seen.append(given))
    boxes = torch.tensor(
        [[10.0, 10, 90, 90], [15, 14, 95, 95], [15, 40, 60, 80], [100, 12, 150, 60], [98, 13, 150, 50]]
    )
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    evaluation.draw_objects(torch.zeros(3, 160, 160, dtype=torch.uint8), boxes, torch.arange(5) % 2, "ab", scores)
    assert torch.equal(seen[0][0], boxes) and seen[0][1] == ["a 0.90", None, "a 0.70", "b 0.60", None]
