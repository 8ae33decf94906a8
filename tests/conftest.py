"""Fixtures: the COCO sample, a small generated set, and the files of a run."""

import os
import signal
from pathlib import Path

import make_shapes
import pytest
import torch
from make_assignment import ASSIGNMENTS

import train
from data import TRAIN, VAL

torch.set_num_threads(1)  # the tensors are small, and graders run two at a time


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests of each assignment: a1 to a8."""
    for item in items:
        for name, assignment in ASSIGNMENTS.items():
            if item.originalname in assignment.tests or item.name in assignment.tests:
                item.add_marker(getattr(pytest.mark, name))


@pytest.fixture(scope="session")
def coco_sample():
    """The root of a small real COCO sample, which COCO_SAMPLE names; CI always has it."""
    root = os.environ.get("COCO_SAMPLE")
    if not root and not os.environ.get("CI"):
        pytest.skip("set COCO_SAMPLE to a folder in COCO's layout")
    assert root and Path(root, "annotations", "instances_train2017.json").exists(), f"COCO_SAMPLE={root}"
    return Path(root)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The root of a generated set: the first 60 and 24 images of the full one."""
    root = tmp_path_factory.mktemp("shapes") / "shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(make_shapes.SHAPES, "images", {TRAIN: 60, VAL: 24})
        make_shapes.write_shapes(root)
    return root


@pytest.fixture(scope="session")
def run(shapes, tmp_path_factory):
    """The folder of a short finished training run on the generated set."""
    out = tmp_path_factory.mktemp("run") / "run"
    flags = "--arch tiny --size 128 --protocol toy --epochs 1 --workers 0 --device cpu".split()
    train.main([*flags, "--data", str(shapes), "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def mask_run(shapes, tmp_path_factory):
    """The same for Mask R-CNN, two steps of it."""
    out = tmp_path_factory.mktemp("run") / "masks"
    flags = "--arch tiny --size 128 --protocol toy --head mask_rcnn --limit 24 --workers 0 --device cpu".split()
    train.main([*flags, "--epochs", "1", "--batch-size", "12", "--data", str(shapes), "--out", str(out)])
    return out


@pytest.fixture
def as_one_of_two_ranks(monkeypatch):
    """torch.distributed as on one of two ranks, where the other has counted twice what this one has."""
    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, *_, **__: count.mul_(3))


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own is the same at every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals_restored():
    """train.main takes over SIGTERM and Ctrl-C; give them back to pytest."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
