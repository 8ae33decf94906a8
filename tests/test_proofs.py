"""Longer proofs, each a command of the README or close to it, run as a user runs it.

A bar on AP is the mean less four standard deviations of what five seeds gave, rounded down."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
TRAIN = [sys.executable, str(ROOT / "train.py")]
SHORTER = ["--epochs", "250", "--eval-every", "250"]  # of --overfit

pytestmark = pytest.mark.slow


def run(*command, cwd):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=1500, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def best_ap(out):
    return float(re.search(r"best AP (\S+);", out)[1])


def test_the_first_command_of_the_readme(tmp_path):
    """Oracle: pycocotools, on 200 images that training has not seen: AP of at least 0.52, and the files it promises.
    Measured over five seeds: 0.611 ± 0.021."""
    out = run(*TRAIN, "--arch", "tiny", "--size", "128", "--protocol", "toy", "--data", "shapes", cwd=tmp_path)
    folder = tmp_path / "runs" / "tiny_128_toy_retinanet"
    assert best_ap(out) >= 0.52
    assert {"last.pt", "best.pt", "log.jsonl", "results.json", "grid.png"} <= {p.name for p in folder.iterdir()}


def last_metrics(folder):
    """What the last evaluation of a run has logged."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval_step" in row][-1]


def test_mask_rcnn_on_shapes(tmp_path):
    """Oracle: pycocotools, on 200 images that training has not seen: box AP of at least 0.40, mask AP of 0.25, after
    two thirds of the README's epochs. Measured over five seeds, on a GPU in float32: 0.533 ± 0.031, 0.436 ± 0.045."""
    flags = ["--arch", "tiny", "--size", "128", "--protocol", "toy", "--head", "mask_rcnn", "--data", "shapes"]
    run(*TRAIN, *flags, "--epochs", "12", "--eval-every", "12", "--out", "run", cwd=tmp_path)
    metrics = last_metrics(tmp_path / "run")
    assert metrics["AP"] >= 0.40 and metrics["mask_AP"] >= 0.25
    assert (tmp_path / "run" / "grid.png").exists()


def test_overfitting_masks_of_real_images(coco_sample, tmp_path):
    """Oracle: pycocotools, on the four real images that were trained on: box AP of at least 0.52, mask AP of 0.34,
    after 250 steps. Measured over five seeds: 0.624 ± 0.024, 0.431 ± 0.021; after the usual 400, two: 0.718, 0.765
    and 0.531, 0.598."""
    flags = ["--arch", "tiny", "--size", "256", "--protocol", "toy", "--head", "mask_rcnn", "--overfit", "4"]
    run(*TRAIN, *flags, "--data", coco_sample, *SHORTER, "--out", "run", cwd=tmp_path)
    metrics = last_metrics(tmp_path / "run")
    assert metrics["AP"] >= 0.52 and metrics["mask_AP"] >= 0.34


def test_overfitting_real_images(coco_sample, tmp_path):
    """Oracle: pycocotools, on the four real images that were trained on: AP of at least 0.60, after 250 steps.
    Measured over five seeds: 0.817 ± 0.053; after the usual 400, two: 0.847, 0.854."""
    flags = ["--arch", "tiny", "--size", "256", "--protocol", "toy", "--data", coco_sample, "--overfit", "4"]
    assert best_ap(run(*TRAIN, *flags, *SHORTER, cwd=tmp_path)) >= 0.60


def test_paper_scale_on_a_cpu(coco_sample, tmp_path):
    """Oracle: it ends, counting steps and images. SpineNet-49 at 640 under B trains and evaluates on real images in two
    processes, and goes on in one."""
    flags = ["--arch", "49", "--size", "640", "--protocol", "B", "--data", coco_sample, "--batch-size", "4"]
    flags += ["--micro-batch", "1", "--limit", "4", "--device", "cpu", "--out", tmp_path / "run"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py"]
    out = run(*two, *flags, "--epochs", "1", cwd=tmp_path)
    assert "4 = 2 device(s) x 1 images x 2 micro-steps" in out
    assert "evaluated 4/4 images" in out and "step 1 after" in out
    out = run(*TRAIN, *flags, "--epochs", "2", "--resume", cwd=tmp_path)
    assert "4 = 1 device(s) x 1 images x 4 micro-steps" in out and "resuming at step 1" in out
    assert "evaluated 4/4 images" in out and "step 2 after" in out


def test_mask_rcnn_at_paper_scale_on_a_cpu(coco_sample, tmp_path):
    """Oracle: it ends, counting steps and images. A step of 512 RoIs and an evaluation with SpineNet-96 at 1024, on a
    real image."""
    flags = ["--arch", "96", "--size", "1024", "--protocol", "B", "--head", "mask_rcnn", "--data", coco_sample]
    flags += ["--batch-size", "1", "--limit", "1", "--epochs", "1", "--device", "cpu", "--out", tmp_path / "run"]
    out = run(*TRAIN, *flags, cwd=tmp_path)
    assert "evaluated 1/1 images" in out and "step 1 after" in out and "Segm" in out
    assert all(name in last_metrics(tmp_path / "run") for name in ("AP", "mask_AP"))
