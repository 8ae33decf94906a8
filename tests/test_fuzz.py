"""Seeded mutations of the annotation json and of JPEG bytes: an error in one sentence, or sound samples; never else."""

import copy
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import TRAIN, EvalSet, TrainSet, UserError, crop_mask, full_view, load_annotations
from evaluate import coco_metrics, coco_rows

SCRIPT = Path(__file__).parents[1] / "tools" / "look.py"
JSON = f"annotations/instances_{TRAIN}.json"
JUNK = (
    None,
    True,
    -1,
    0,
    7,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    2**70,
    "",
    "x",
    "x\ny",
    "\x00",
    "../x",
    [],
    {},
    [[]],
    [None],
)


@pytest.fixture
def small(shapes, tmp_path):
    """A folder with the first 6 generated images, writable, and its json's content."""
    content = json.loads((shapes / JSON).read_text())
    content["images"] = content["images"][:6]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [o for o in content["annotations"] if o["image_id"] in ids]
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    (tmp_path / "set" / TRAIN).mkdir()
    for image in content["images"]:
        shutil.copy(shapes / TRAIN / image["file_name"], tmp_path / "set" / TRAIN)
    return tmp_path / "set", content


def nodes(value, path=()):
    """Every path into a json value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(min(len(value), 8)):
            yield from nodes(value[key], (*path, key))


def mutated_tree(rng, content):
    """The json with one to three values replaced by junk, removed or doubled."""
    content = copy.deepcopy(content)
    for _ in range(rng.integers(1, 4)):
        paths = [path for path in nodes(content) if path]
        if not paths:
            break
        *parents, key = paths[rng.integers(len(paths))]
        holder = content
        for parent in parents:
            holder = holder[parent]
        what = rng.integers(5)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[key] = JUNK[rng.integers(len(JUNK))]
    return json.dumps(content).encode()


def mutated_bytes(rng, content):
    """Bytes with one to four stretches removed, repeated or overwritten, now and then cut short."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        start = int(rng.integers(len(content) + 1))
        length = int(rng.integers(1, 40))
        what = rng.integers(4)
        if what == 0:
            del content[start : start + length]
        elif what == 1:
            content[start:start] = content[start : start + length]
        elif what == 2:
            content[start : start + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif rng.random() < 0.3:
            del content[start:]
    return bytes(content)


def hang(number, frame):
    raise TimeoutError("a mutation took longer than 20 seconds")


@pytest.fixture
def no_hang():
    before = signal.signal(signal.SIGALRM, hang)
    yield lambda: signal.alarm(20)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def use(root, masks):
    """Go the whole way from the json to samples and to COCOeval; whether it was sound. Samples are checked."""
    try:
        annotations = load_annotations(root, masks=masks)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000
        return False
    assert len(annotations.summary().splitlines()) <= 5
    for n in range(len(annotations.ids)):
        try:
            sample = TrainSet(annotations, 128, (0.5, 2.0))[n]
            test = EvalSet(annotations, 128)[n]
        except UserError as error:
            assert "image id" in str(error)
            return False
        assert sample["image"].shape == test["image"].shape == (3, 128, 128)
        real = sample["labels"] >= 0
        boxes = sample["boxes"]
        assert boxes.isfinite().all() and boxes.min() >= 0 and boxes.max() <= 128
        assert (boxes[real][:, 2:] > boxes[real][:, :2]).all() and sample["labels"].max() < len(annotations.categories)
        if masks:
            assert sample["masks"].max() <= 1
    results = []
    for i, (image_id, height, width) in enumerate(
        zip(annotations.ids.tolist(), annotations.heights.tolist(), annotations.widths.tolist())
    ):
        boxes, labels = annotations.objects(i)
        found = {"boxes": full_view(height, width, 128).boxes(boxes), "labels": labels, "scores": np.ones(len(labels))}
        if masks:
            cells = [crop_mask(annotations.mask(i, m), box) for m, box in zip(annotations.rows(i), boxes)]
            found["masks"] = np.reshape(cells, (-1, data.MASK_SIDE, data.MASK_SIDE))
        found = {name: torch.from_numpy(value) for name, value in found.items()}
        results += coco_rows(found, image_id, height, width, 128, annotations.categories)
    metrics = coco_metrics(annotations, results)
    assert 0 <= metrics["AP"] <= 1
    return True


@pytest.mark.parametrize("masks", [False, True])
def test_mutated_json(masks, small, no_hang, capsys):
    """Oracle: the contract. 150 mutations of a sound json, half of its bytes, half of its values: a UserError of one
    line, or samples and an AP that are sound."""
    root, content = small
    text = json.dumps(content).encode()
    rng = np.random.default_rng(masks)
    sound = 0
    for k in range(150):
        written = mutated_tree(rng, content) if k % 2 else mutated_bytes(rng, text)
        (root / JSON).write_bytes(written)
        no_hang()
        try:
            sound += use(root, masks)
        except Exception as error:
            raise AssertionError(f"mutation {k}: {type(error).__name__}: {error}") from error
    assert 20 < sound < 130, sound


def test_mutated_images(small, no_hang):
    """Oracle: the contract. 200 mutations of a JPEG's bytes: a UserError that names the file, or an image of the stated
    size in RGB."""
    root, content = small
    (root / JSON).write_text(json.dumps(content))
    annotations = load_annotations(root)
    whole = Path(annotations.path(0)).read_bytes()
    rng = np.random.default_rng(2)
    sound = 0
    for k in range(200):
        where = slice(0, None) if k % 2 else slice(0, 700)  # the headers, half of the time
        Path(annotations.path(0)).write_bytes(mutated_bytes(rng, whole[where]) + (b"" if k % 2 else whole[700:]))
        no_hang()
        try:
            image = data.read_checked(annotations, 0)
            assert image.mode == "RGB" and image.size == (annotations.widths[0], annotations.heights[0])
            sound += 1
        except UserError as error:
            assert annotations.path(0) in str(error) and "\n" not in str(error)
    assert 20 < sound < 200


@pytest.mark.slow
def test_mutations_on_the_command_line(small):
    """Oracle: the contract. Ten mutations, each in a process of its own: exit code 0, or 2 and a sentence."""
    root, content = small
    rng = np.random.default_rng(3)
    for k in range(10):
        (root / JSON).write_bytes(
            mutated_tree(rng, content) if k % 2 else mutated_bytes(rng, json.dumps(content).encode())
        )
        done = subprocess.run(
            [sys.executable, SCRIPT, "--data", root, "--check", "--masks"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode in (0, 2) and "Traceback" not in done.stdout + done.stderr, (k, done.stderr)
        if done.returncode:
            assert "error: " in done.stderr or "images are bad" in done.stdout
