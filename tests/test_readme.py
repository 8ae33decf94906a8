"""What the README promises: symbols, commands, tables."""

import dataclasses
import importlib
import re
import shlex

import pytest
import torch
from make_assignment import ASSIGNMENTS, ROOT, body_of

import data
import evaluate
import train

TEXT = (ROOT / "README.md").read_text()
MODULES = ("blocks", "model", "heads", "loss", "data", "train", "evaluate")
SYMBOLS = sorted(set(re.findall(rf"`((?:{'|'.join(MODULES)})\.(?!py)[\w.]+)`", TEXT)))


def test_every_symbol_exists():
    """Oracle: the modules. Each `file.symbol` of the README is there, fields of dataclasses included."""
    assert len(SYMBOLS) > 60
    for symbol in SYMBOLS:
        module, *names = symbol.split(".")
        value = importlib.import_module(module)
        for name in names:
            fields = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
            assert hasattr(value, name) or name in fields, symbol
            value = getattr(value, name, None)


def commands(script):
    """The flags of every command of the README that runs the script, without placeholders."""
    found = re.findall(rf"(?:python|torchrun[^\n`]*?) {script}((?: [^\n`|#&()]*)?)", TEXT)
    return [shlex.split(flags.strip()) for flags in found]


ROWS = re.findall(r"`(--arch [^`]*--batch-size[^`]*)`", TEXT)


@pytest.mark.parametrize("flags", [*map(shlex.split, ROWS), *commands(r"train\.py")], ids=" ".join)
def test_training_commands_are_accepted(flags):
    """Oracle: the parser and the recipe. Every training command of the README resolves to a recipe; in the accuracy
    table's the micro-batch divides what 8 devices share."""
    args = train.parse_args(flags)
    recipe = train.resolve(args)
    if "--batch-size" in flags and "--weights" not in flags:
        train.split_batch(recipe, args.micro_batch, args.recompute, evaluate.Place(torch.device("cpu"), world=8))


def test_there_are_commands():
    """Oracle: counting, so that the test above can't run out of them unseen."""
    assert len(ROWS) == 18 and len(commands(r"train\.py")) >= 8


def test_the_shapes_table():
    """Oracle: data.SHAPES. The README says its ranges."""
    names, shapes = ", ".join(data.SHAPES["classes"].values()), data.SHAPES
    assert names in TEXT and ", ".join(map(str, shapes["classes"])) in TEXT
    assert f"{shapes['object_side'][0]} – {shapes['object_side'][1]}" in TEXT
    assert f"{shapes['images'][data.TRAIN]} training and {shapes['images'][data.VAL]} validation images" in TEXT


def test_the_memory_table():
    """Oracle: train.MEMORY. The README's table says the same, at each row's size."""
    fits = r"([\d.]+): (\d+), (\d+)"
    rows = re.findall(
        rf"\| (RetinaNet|Mask R-CNN) (\w+), (\d+) \| {fits.replace(':', ' [|]')} \| {fits} \| {fits} \|", TEXT
    )
    assert len(rows) == 11
    for head, arch, size, *numbers in rows:
        head = {"RetinaNet": "retinanet", "Mask R-CNN": "mask_rcnn"}[head]
        own, fixed, each = train.MEMORY[head, arch]
        for k, per_image in enumerate(each):
            per_image *= (int(size) / own) ** 2
            gigabytes, small, large = numbers[3 * k : 3 * k + 3]
            assert float(gigabytes) == pytest.approx(per_image, abs=0.0051)
            fits = [int((train.PLANNED * capacity - fixed) / per_image) for capacity in (16, 32)]
            assert [int(small), int(large)] == fits


def test_the_assignments_table():
    """Oracle: tests/make_assignment.py. The README has a row for each, in order, with the lines that are blanked."""
    rows = re.findall(r"^\| (a\d) \| [^|]+ \| (\d+) \|", TEXT, re.MULTILINE)
    assert [name for name, _ in rows] == list(ASSIGNMENTS)
    for name, lines in rows:
        count = 0
        for function in ASSIGNMENTS[name].functions:
            module, qualified = function.split(".", 1)
            body = body_of((ROOT / f"{module}.py").read_text(), qualified)
            count += sum(bool(line.strip()) and not line.strip().startswith("#") for line in body)
        assert abs(int(lines) - count) <= 5, (name, count)
