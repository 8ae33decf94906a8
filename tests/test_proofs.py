"""Longer proofs, each a command of the README or close to it, run as a user runs it, the trainings on one thread.

A bar on AP is the mean less four standard deviations of what five seeds gave, rounded down."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
TRAIN = [sys.executable, str(ROOT / "train.py")]
SHORTER = ["--epochs", "250", "--eval-every", "250"]  # of --overfit
MASKS = ["--head", "mask_rcnn", "--out", "run"]
TRAININGS = {  # name: (side, flags)
    "first command": (128, ["--data", "shapes"]),
    "masks on shapes": (128, ["--data", "shapes", *MASKS, "--epochs", "12", "--eval-every", "12"]),
    "overfit": (256, ["--overfit", "4", *SHORTER, "--out", "run"]),
    "overfit masks": (256, ["--overfit", "4", *SHORTER, *MASKS]),
}

pytestmark = pytest.mark.slow


def run(*command, cwd, **env):
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=1500, cwd=cwd, env=os.environ | env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(coco_sample, tmp_path_factory):
    """A function from a name of TRAININGS to (what that training prints, its folder). They run two at a time, each
    on one thread, which takes little more than half the time of one after the other on two."""

    def one(name):
        side, flags = TRAININGS[name]
        if "shapes" not in flags:
            flags = [*flags, "--data", coco_sample]
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"), numbered=False)
        command = [*TRAIN, "--arch", "tiny", "--size", side, "--protocol", "toy", *flags]
        return run(*command, cwd=folder, OMP_NUM_THREADS="1"), next(folder.rglob("log.jsonl")).parent

    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(one, name) for name in TRAININGS}
        yield lambda name: futures[name].result()


def last_metrics(folder):
    """What the last evaluation of a run has logged."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval_step" in row][-1]


def test_the_first_command_of_the_readme(trained):
    """Oracle: pycocotools, on 200 images that training has not seen: AP of at least 0.52, and the files it promises.
    Measured over five seeds: 0.611 ± 0.021."""
    out, folder = trained("first command")
    assert folder.parts[-2:] == ("runs", "tiny_128_toy_retinanet")
    assert float(re.search(r"best AP (\S+);", out)[1]) >= 0.52
    assert {"last.pt", "best.pt", "log.jsonl", "results.json", "grid.png"} <= {p.name for p in folder.iterdir()}


def test_mask_rcnn_on_shapes(trained):
    """Oracle: pycocotools, on 200 images that training has not seen: box AP of at least 0.40, mask AP of 0.25, after
    two thirds of the README's epochs. Measured over five seeds, on a GPU in float32: 0.533 ± 0.031, 0.436 ± 0.045."""
    _, folder = trained("masks on shapes")
    metrics = last_metrics(folder)
    assert metrics["AP"] >= 0.40 and metrics["mask_AP"] >= 0.25
    assert (folder / "grid.png").exists()


def test_overfitting_masks_of_real_images(trained):
    """Oracle: pycocotools, on the four real images that were trained on: box AP of at least 0.52, mask AP of 0.34,
    after 250 steps. Measured over five seeds: 0.624 ± 0.024, 0.431 ± 0.021; after the usual 400, two: 0.718, 0.765
    and 0.531, 0.598."""
    metrics = last_metrics(trained("overfit masks")[1])
    assert metrics["AP"] >= 0.52 and metrics["mask_AP"] >= 0.34


def test_overfitting_real_images(trained):
    """Oracle: pycocotools, on the four real images that were trained on: AP of at least 0.60, after 250 steps.
    Measured over five seeds: 0.817 ± 0.053; after the usual 400, two: 0.847, 0.854."""
    assert last_metrics(trained("overfit")[1])["AP"] >= 0.60


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
