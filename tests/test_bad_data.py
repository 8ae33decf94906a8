"""Bad and odd data as a user meets it: one table of what is wrong with a folder, and what the command says."""

import json
import math
import re
import shutil
from typing import Callable, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from test_data import write_coco

import data
import train
from data import TRAIN

JSON = f"annotations/instances_{TRAIN}.json"
BOX = [1, 2, 30, 20]
RIGHT_BOXES = [[BOX] * 100, [BOX], [], []]  # one broken object of 101 is under 1 %
RUNS = {"size": [48, 64], "counts": [100, 20, 48 * 64 - 120]}


class Case(NamedTuple):
    """What is done to a sound folder, and what `python data.py --check` makes of it."""

    says: str  # in the one sentence of an error, or in what is printed
    code: int = 2
    change: Callable | None = None  # edits the json's content, or gives another
    edit: Callable | None = None  # edits the folder
    flags: tuple = ()


def first(part, number=0, **fields):
    """A change that sets fields of one row of one of the json's lists; a field of None goes."""

    def change(content):
        row = content[part][number]
        row.update(fields)
        for name in [k for k, v in fields.items() if v is None]:
            del row[name]

    return change


def every(part, **fields):
    def change(content):
        for row in content[part]:
            row.update(fields)

    return change


def text(written):
    return lambda root: (root / JSON).write_text(written)


def image(content):
    """An edit that puts other bytes, or another picture, in place of image 1's."""

    def edit(root):
        path = root / TRAIN / "1.png"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path)

    return edit


def picture(mode, size=(64, 48)):
    """A picture of another mode, in a file whose name says PNG; PIL goes by the content."""

    def edit(root):
        path = root / TRAIN / "1.png"
        if mode == "I;16":
            Image.fromarray(np.full(size[::-1], 30000, np.uint16)).save(path)
        elif mode == "EXIF":
            exif = Image.Exif()
            exif[0x0112] = 6  # rotated by a quarter, which COCO's sizes don't follow
            Image.new("RGB", size).save(path, format="JPEG", exif=exif)
        else:
            Image.new("RGB", size, (90, 120, 30)).convert(mode).save(path, format="JPEG" if mode == "CMYK" else "PNG")

    return edit


def resized(width, height):
    """The whole set at another size."""

    def edit(root):
        content = json.loads((root / JSON).read_text())
        for row in content["images"]:
            row |= {"width": width, "height": height}
            Image.new("RGB", (width, height)).save(root / TRAIN / row["file_name"])
        for row in content["annotations"]:
            row["bbox"] = [0, 0, width, height]
        (root / JSON).write_text(json.dumps(content))

    return edit


def dropped(**fields):
    """Object 50 is broken, and dropped."""
    return Case(
        r"100 objects.*, 1 broken objects dropped \(annotation ids \[50\]\)", 0, first("annotations", 50, **fields)
    )


def kept(change=None, edit=None, says="101 objects", flags=()):
    return Case(rf"{says}(?!.*broken)[\s\S]*0 of \d images are bad", 0, change, edit, flags)


NOT_COCO = r"instances_train2017\.json is not a COCO annotation file"
CASES = {
    "folder missing": Case(r"train2017 and .*_train2017\.json not found\.[\s\S]*train2017\.zip[\s\S]*--data shapes",
                           edit=lambda root: shutil.rmtree(root)),
    "json missing": Case(r"instances_train2017\.json not found\.", edit=lambda root: (root / JSON).unlink()),
    "images missing": Case(r"/train2017 not found\.", edit=lambda root: shutil.rmtree(root / TRAIN)),
    "an image missing": Case("has no file '1.png', which .* names for image id 1",
                             edit=lambda root: (root / TRAIN / "1.png").unlink()),
    "json empty": Case(NOT_COCO, edit=text("")),
    "json truncated": Case(NOT_COCO, edit=text('{"images": [], "annotations": [')),
    "json of nothing": Case(NOT_COCO, edit=text("null")),
    "json of bytes": Case(NOT_COCO, edit=lambda root: (root / JSON).write_bytes(b"\x00\xff\xfe")),
    "json nested without end": Case(NOT_COCO, edit=text("[" * 100_000)),
    "a list": Case(NOT_COCO, change=lambda c: [c]),
    "no images key": Case("'images'", change=lambda c: {k: v for k, v in c.items() if k != "images"}),
    "images a dict": Case("'images' is not a list", change=lambda c: c | {"images": {"a": 1}}),
    "images of numbers": Case("'images' is not a list", change=lambda c: c | {"images": [1, 2]}),
    "no images": Case("has no images", change=lambda c: c | {"images": [], "annotations": []}),
    "no categories": Case("has no categories", change=lambda c: c | {"categories": [], "annotations": []}),
    "image twice": Case("image id 0 twice", change=lambda c: c | {"images": c["images"] * 2}),
    "category twice": Case("category id 1 twice", change=lambda c: c | {"categories": c["categories"] * 2}),
    "annotation twice": Case("annotation id 0 twice", change=lambda c: c | {"annotations": c["annotations"] * 2}),
    "unknown image": Case("annotation id 3 has image_id 77", change=first("annotations", 3, image_id=77)),
    "unknown category": Case("annotation id 3 has category_id 9", change=first("annotations", 3, category_id=9)),
    "image id of text": Case("image number 1 has id 'a', which is not an integer", change=first("images", 1, id="a")),
    "no width": Case("image id 0 has width None", change=first("images", width=None)),
    "no height": Case("image id 0 has no positive height", change=first("images", height=0)),
    "file name that is no text": Case(
        "image id 0 has the file_name .*ud800.jpg", change=first("images", file_name="\ud800.jpg")),
    "file name a number": Case("image id 0 has the file_name 7", change=first("images", file_name=7)),
    "xyxy taken for xywh": Case(r"101 of 101 .* broken.*annotation ids \[0, 1.*\[x, y, width, height\].*corners",
                                change=every("annotations", bbox=[30, 20, 60, 45])),
    "no bbox at all": Case("101 of 101 objects are broken", change=every("annotations", bbox=[])),
    "RLE of another size": Case("101 of 101 objects are broken.*an RLE its image's size",
                                change=every("annotations", segmentation={"size": [4, 4], "counts": [16]})),
    "masks wanted and absent": Case("every object a segmentation, without which only --head retinanet",
                                    flags=("--masks",)),
    "box NaN": dropped(bbox=[math.nan, 2, 3, 4]),
    "box infinite": dropped(bbox=[0, 0, math.inf, 4]),
    "box with a negative side": dropped(bbox=[1, 2, -3, 4]),
    "box without a side": dropped(bbox=[1, 2, 0, 4]),
    "box outside": dropped(bbox=[70, 2, 3, 4]),
    "box mostly outside": dropped(bbox=[60, 40, 60, 40]),
    "box of three numbers": dropped(bbox=[1, 2, 3]),
    "box of text": dropped(bbox=["1", "2", "3", "4"]),
    "box of nothing": dropped(bbox=None),
    "box huge": dropped(bbox=[0, 0, 1e300, 1e300]),
    "polygon of 2 points": dropped(segmentation=[[1, 2, 3, 4]]),
    "polygon of 7 numbers": dropped(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
    "polygon with a NaN": dropped(segmentation=[[1, 2, 3, 4, 5, math.nan]]),
    "polygon of text": dropped(segmentation=["polygon"]),
    "polygon far outside": dropped(segmentation=[[1, 2, 3, 4, 1e7, 6]]),
    "RLE without counts": dropped(segmentation={"size": [48, 64]}),
    "one RLE of another size": dropped(segmentation={"size": [4, 4], "counts": [16]}),
    "segmentation a number": dropped(segmentation=7),
    "sound": kept(),
    "empty segmentation": kept(every("annotations", segmentation=[])),
    "uncompressed RLE": kept(every("annotations", segmentation=RUNS), flags=("--masks",)),
    "compressed RLE": kept(
        every("annotations", segmentation={
            "size": [48, 64], "counts": coco_mask.frPyObjects(RUNS, 48, 64)["counts"].decode()}), flags=("--masks",)),
    "category id 0": kept(lambda c: every("annotations", category_id=0)(c) or first("categories", id=0)(c)),
    "no info, licenses, iscrowd, area": kept(lambda c: [c.pop(k, None) for k in ("info", "licenses")] and None),
    "no annotations": kept(lambda c: c | {"annotations": []}, says="0 objects of 1 classes.* 4 images without objects"),
    "categories without objects": kept(
        lambda c: c["categories"].extend({"id": k, "name": str(k)} for k in range(2, 301)), says="of 300 classes"),
    "crowds only": kept(every("annotations", iscrowd=1), says=r"0 objects of 1 classes, 101 crowds \(never positive\)"),
    "image of no bytes": Case(r"cannot decode .*1\.png \(image id 1\)[\s\S]*1 of 4 images are bad", edit=image(b"")),
    "image of text": Case(r"cannot decode .*1\.png \(image id 1\)", edit=image(b"not an image")),
    "image cut short": Case(r"cannot decode .*1\.png \(image id 1\)", edit=lambda root: image(
        (root / TRAIN / "1.png").read_bytes()[:60])(root)),
    "image a folder": Case(r"cannot decode .*1\.png \(image id 1\)", edit=lambda root: (
        (root / TRAIN / "1.png").unlink(), (root / TRAIN / "1.png").mkdir())),
    "image of another size": Case(r"1\.png \(image id 1\) is 48x64 pixels, but the json says 64x48",
                                  edit=image(Image.new("RGB", (48, 64)))),
    "grey": kept(edit=picture("L")),
    "1 bit": kept(edit=picture("1")),
    "palette": kept(edit=picture("P")),
    "alpha": kept(edit=picture("RGBA")),
    "CMYK": kept(edit=picture("CMYK")),
    "16 bits": kept(edit=picture("I;16")),
    "EXIF rotation": kept(edit=picture("EXIF")),
    "1 x 1": kept(edit=resized(1, 1)),
    "10000 x 50": kept(edit=resized(10000, 50)),
}  # fmt: skip


def command(main, flags, capsys):
    """(exit code, what is printed, what is said on stderr) of a script's main."""
    code = 0
    try:
        with data.one_sentence():
            main([str(flag) for flag in flags])
    except SystemExit as stop:
        code = stop.code
    printed, said = capsys.readouterr()
    return code, printed, said


@pytest.mark.parametrize("name", CASES)
def test_data_as_the_command_line_takes_it(name, tmp_path, capsys):
    """Oracle: the table. An error is one sentence and exit code 2; what is only odd is taken, and counted."""
    case = CASES[name]
    root = write_coco(tmp_path / "set", RIGHT_BOXES, change=case.change)
    if case.edit:
        case.edit(root)
    code, printed, said = command(data.main, ["--data", root, "--check", *case.flags], capsys)
    heard = said if code and "images are bad" not in printed else printed

    assert code == case.code and re.search(case.says, heard), (code, printed, said)
    assert not code or heard == printed or said.count("error: ") == 1


def test_a_folder_that_can_not_be_written(tmp_path, monkeypatch):
    """Oracle: by hand. It is refused before anything slow."""
    monkeypatch.setattr(data.os, "access", lambda path, mode: False)
    with pytest.raises(data.UserError, match="can't be made or written .Permission denied.; give another --out"):
        data.make_folder(tmp_path / "out")


@pytest.mark.parametrize("flags", [("--size", 0), ("--show", -1), ("--jitter", 2, 1), ("--jitter", 0, 1)])
def test_bad_arguments(flags, tmp_path, capsys):
    """Oracle: by hand. One sentence and exit code 2."""
    code, _, said = command(data.main, ["--data", write_coco(tmp_path / "set", [[BOX]]), *flags], capsys)
    assert code == 2 and said.startswith("error: --size must be positive, --show not negative")


def test_an_error_of_the_code_is_not_hidden(capsys):
    """Oracle: torch's messages. A dead worker and a full device are sentences; an error that the code raised
    in a worker stays what it is."""
    with pytest.raises(SystemExit), data.one_sentence():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(SystemExit), data.one_sentence():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    assert "2 GiB. Free the device, or use a smaller --micro-batch" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="size mismatch"), data.one_sentence():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback ... size mismatch")


@pytest.mark.parametrize("name", ["json truncated", "unknown category", "xyxy taken for xywh", "an image missing"])
def test_training_refuses_the_same(name, tmp_path, capsys):
    """Oracle: the table. train.py says the same sentence before its first step, and writes nothing."""
    case = CASES[name]
    root = write_coco(tmp_path / "set", RIGHT_BOXES, change=case.change)
    if case.edit:
        case.edit(root)
    flags = ["--arch", "tiny", "--size", 128, "--protocol", "toy", "--device", "cpu", "--out", tmp_path / "out"]
    code, _, said = command(train.main, [*flags, "--data", root], capsys)
    assert code == 2 and said.count("error: ") == 1 and said.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()
