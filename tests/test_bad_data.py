"""Bad and odd data as a user meets it: one table of what is wrong with a folder, and what the command says."""

import json
import math
import re
import shutil
import subprocess
import sys
from typing import Callable, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from test_data import write_coco

import evaluate
import look
import train
from data import TRAIN
from model import UserError

JSON = f"annotations/instances_{TRAIN}.json"
BOX = [1, 2, 30, 20]
RIGHT_BOXES = [[BOX] * 100, [BOX], [], []]  # 101 objects
RUNS = {"size": [48, 64], "counts": [100, 20, 48 * 64 - 120]}
POLYGON = [1, 2, 31, 2, 31, 22]


class Case(NamedTuple):
    """What is done to a sound folder, and what `python tools/look.py --check` makes of it."""

    says: str  # in the one sentence of an error, or in what is printed
    code: int = 2
    change: Callable | None = None  # edits the json's content, or gives another
    edit: Callable | None = None  # edits the folder
    flags: tuple = ()


def first(part, number=0, count=1, **fields):
    """A change that sets fields of rows of one of the json's lists, one row if no count is given; a field of None
    goes."""

    def change(content):
        for row in content[part][number:][:count]:
            row.update(fields)
            for name in [k for k, v in fields.items() if v is None]:
                del row[name]

    return change


def every(part, **fields):
    return first(part, 0, None, **fields)


def both(*changes):
    def change(content):
        for one in changes:
            one(content)

    return change


def more(content):
    """1100 objects in all."""
    row, rows = content["annotations"][0], content["annotations"]
    rows += [row | {"id": 1000 + k} for k in range(1100 - len(rows))]


def floats(content):
    """Every id and size is a float of a whole number."""
    for part in ("images", "categories", "annotations"):
        for row in content[part]:
            names = row.keys() & {"id", "height", "width", "image_id", "category_id"}
            row |= {name: float(row[name]) for name in names}


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


FOUR, SIDE, OUTSIDE = (
    "whose bbox is not four numbers",
    "whose bbox is without positive sides",
    "whose bbox is outside of its image by more than half",
)
UNSOUND = "whose segmentation is neither polygons nor run lengths of its image"


def dropped(rule, value, **fields):
    """Object 50 is broken by that rule, and dropped; the words give its value."""
    says = rf"100 objects.*, dropped as broken: 1 {rule}, as annotation id 50: {re.escape(value)}\n"
    return Case(says, 0, first("annotations", 50, **fields))


def unsound(segmentation, value):
    """The same with --masks, where all other objects are sound; without, nobody looks at the segmentation."""
    case = dropped(UNSOUND, value, segmentation=segmentation)
    return case._replace(change=both(every("annotations", segmentation=RUNS), case.change), flags=("--masks",))


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
    "image twice": Case("images has the id 0 twice", change=lambda c: c | {"images": c["images"] * 2}),
    "category twice": Case("categories has the id 1 twice", change=lambda c: c | {"categories": c["categories"] * 2}),
    "annotation twice": Case("annotations has the id 0 twice",
                             change=lambda c: c | {"annotations": c["annotations"] * 2}),
    "unknown image": Case(r"annotations\[3\], id 3, has image_id 77: not the id of one of its images",
                          change=first("annotations", 3, image_id=77)),
    "unknown category": Case(r"annotations\[3\], id 3, has category_id 9: not the id of one of its categories",
                             change=first("annotations", 3, category_id=9)),
    "image id of text": Case(r"images\[1\], id 'a', has id 'a': not a whole number in", change=first(
        "images", 1, id="a")),
    "image id of nothing": Case(r"images\[1\], id None, has id None: not a whole", change=first("images", 1, id=None)),
    "image id half a number": Case(r"images\[1\], id 0.5, has id 0.5: not a whole", change=first("images", 1, id=0.5)),
    "image id beyond 64 bits": Case(r"images\[1\].* has id 9223372036854775808: not a whole number",
                                    change=first("images", 1, id=2**63)),
    "reference half a number": Case(r"annotations\[3\], id 3, has image_id 0.5: not the id of one of its images",
                                    change=first("annotations", 3, image_id=0.5)),
    "reference of NaN": Case(r"annotations\[3\], id 3, has category_id nan: not the id of one of its categories",
                             change=first("annotations", 3, category_id=math.nan)),
    "no width": Case(r"images\[0\], id 0, has width None: not a whole number in 1 \.\. ",
                     change=first("images", width=None)),
    "no height": Case(r"images\[0\], id 0, has height 0: not a whole number in 1 \.\. ",
                      change=first("images", height=0)),
    "width half a number": Case(r"images\[0\], id 0, has width 64.5: not a whole", change=first("images", width=64.5)),
    "file name that is no text": Case(
        r"has no file '\\ud800.jpg', which .* names for image id 0", change=first("images", file_name="\ud800.jpg")),
    "file name a number": Case("has no file '7', which .* names for image id 0", change=first("images", file_name=7)),
    "file name of nothing": Case("has no file .* names for image id 0", change=first("images", file_name=None)),
    "file name a folder": Case("has no file '', which .* names for image id 0", change=first("images", file_name="")),
    "xyxy taken for xywh": Case(rf"of 101 objects 101 are broken: 101 {OUTSIDE}, as annotation id 0: "
                                r"\[30, 20, 60, 45\]; .*\[x, y, width, height\].*corners",
                                change=every("annotations", bbox=[30, 20, 60, 45])),
    "no bbox at all": Case(rf"of 101 objects 101 are broken: 101 {FOUR}, as annotation id 0: \[\];",
                           change=every("annotations", bbox=[])),
    "boxes of two lines": Case(rf"of 101 objects 101 are broken: 101 {FOUR}", change=every("annotations", bbox="a\nb")),
    "RLE of another size": Case(rf"of 101 objects 101 are broken: 101 {UNSOUND}, as annotation id 0: ",
                                change=every("annotations", segmentation={"size": [4, 4], "counts": [16]}),
                                flags=("--masks",)),
    "masks wanted and absent": Case(rf"of 101 objects 101 are broken: 101 {UNSOUND}, as annotation id 0: None;.*"
                                    r" or use --head retinanet", flags=("--masks",)),
    "10 broken of 101": Case(rf" 91 objects.*, dropped as broken: 10 {SIDE}, as annotation id 30:", 0,
                             first("annotations", 30, 10, bbox=[1, 2, -3, 4])),
    "11 broken of 101": Case(rf"of 101 objects 11 are broken: 11 {SIDE}, as annotation id 30:",
                             change=first("annotations", 30, 11, bbox=[1, 2, -3, 4])),
    "12 broken of 101": Case(rf"of 101 objects 12 are broken: 12 {SIDE}, as annotation id 30:",
                             change=first("annotations", 30, 12, bbox=[1, 2, -3, 4])),
    "11 broken of 1100": Case(rf" 1089 objects.*, dropped as broken: 11 {SIDE}, as annotation id 30:", 0,
                              both(more, first("annotations", 30, 11, bbox=[1, 2, -3, 4]))),
    "12 broken of 1100": Case(rf"of 1100 objects 12 are broken: 12 {SIDE}, as annotation id 30:",
                              change=both(more, first("annotations", 30, 12, bbox=[1, 2, -3, 4]))),
    "each way to be broken": Case(
        rf" 97 objects.*, dropped as broken: 1 {FOUR}, as annotation id 50: \[1\], 1 {SIDE}, as annotation "
        rf"id 51: \[1, 2, 0, 4\], 1 {OUTSIDE}, as annotation id 52: \[70, 2, 3, 4\], 1 {UNSOUND}, as "
        r"annotation id 53: \[\]\n", 0, both(
            every("annotations", segmentation=RUNS), first("annotations", 50, bbox=[1], segmentation=[]),
            first("annotations", 51, bbox=[1, 2, 0, 4], segmentation=7), first("annotations", 52, bbox=[70, 2, 3, 4]),
            first("annotations", 53, segmentation=[])), flags=("--masks",)),
    "box NaN": dropped(FOUR, "[nan, 2, 3, 4]", bbox=[math.nan, 2, 3, 4]),
    "box infinite": dropped(FOUR, "[0, 0, inf, 4]", bbox=[0, 0, math.inf, 4]),
    "box of three numbers": dropped(FOUR, "[1, 2, 3]", bbox=[1, 2, 3]),
    "box of text": dropped(FOUR, "['1', '2', '3', '4']", bbox=["1", "2", "3", "4"]),
    "box of nothing": dropped(FOUR, "None", bbox=None),
    "box a number": dropped(FOUR, "7", bbox=7),
    "box huge": dropped(FOUR, "[0, 0, 1e+300, 1e+300]", bbox=[0, 0, 1e300, 1e300]),
    "box of long text": Case(rf"dropped as broken: 1 {FOUR}, as annotation id 50: '?x{{59,60}}\n", 0,
                             first("annotations", 50, bbox="x" * 1000)),
    "box with a negative side": dropped(SIDE, "[1, 2, -3, 4]", bbox=[1, 2, -3, 4]),
    "box without a side": dropped(SIDE, "[1, 2, 0, 4]", bbox=[1, 2, 0, 4]),
    "box outside": dropped(OUTSIDE, "[70, 2, 3, 4]", bbox=[70, 2, 3, 4]),
    "box mostly outside": dropped(OUTSIDE, "[60, 40, 60, 40]", bbox=[60, 40, 60, 40]),
    "box half outside": kept(first("annotations", 50, bbox=[-10, 2, 20, 4])),
    "no segmentation": unsound(None, "None"),
    "polygon of 2 points": unsound([[1, 2, 3, 4]], "[[1, 2, 3, 4]]"),
    "polygon of 7 numbers": unsound([[1, 2, 3, 4, 5, 6, 7]], "[[1, 2, 3, 4, 5, 6, 7]]"),
    "polygon with a NaN": unsound([[1, 2, 3, 4, 5, math.nan]], "[[1, 2, 3, 4, 5, nan]]"),
    "polygon of text": unsound(["polygon"], "['polygon']"),
    "polygon far outside": unsound([[1, 2, 3, 4, 1e7, 6]], "[[1, 2, 3, 4, 10000000.0, 6]]"),
    "RLE without counts": unsound({"size": [48, 64]}, "{'size': [48, 64]}"),
    "one RLE of another size": unsound({"size": [4, 4], "counts": [16]}, "{'size': [4, 4], 'counts': [16]}"),
    "segmentation a number": unsound(7, "7"),
    "unsound segmentations that nobody asked for": kept(every("annotations", segmentation=[[1, 2, 3, 4]])),
    "one bad polygon of two": kept(both(
        every("annotations", segmentation=RUNS),
        first("annotations", 50, segmentation=[POLYGON, [1, 2, 3, 4]]),
        first("annotations", 51, segmentation=[[1, 2, 3, 4, 5, math.nan], POLYGON])), flags=("--masks",)),
    "sound": kept(),
    "empty segmentation": kept(every("annotations", segmentation=[])),
    "uncompressed RLE": kept(every("annotations", segmentation=RUNS), flags=("--masks",)),
    "compressed RLE": kept(
        every("annotations", segmentation={
            "size": [48, 64], "counts": coco_mask.frPyObjects(RUNS, 48, 64)["counts"].decode()}), flags=("--masks",)),
    "ids and sizes of whole floats": kept(floats),
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
        with evaluate.one_sentence():
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
    code, printed, said = command(look.main, ["--data", root, "--check", *case.flags], capsys)
    heard = said if code and "images are bad" not in printed else printed

    assert code == case.code and re.search(case.says, heard), (code, printed, said)
    assert not code or heard == printed or said.count("error: ") == 1
    # Only where to get COCO takes more than a line.
    assert not said or "Get COCO with" in said or said.strip().count("\n") == 0, said


def test_a_size_that_no_image_has(tmp_path):
    """Oracle: the image's own size. A json that says a million by a million pixels, with run lengths of them, is a
    sentence, from a process of its own; not a crash or a traceback."""
    size = [10**6, 10**6]
    lie = both(
        every("annotations", segmentation=RUNS),
        first("images", 1, height=size[0], width=size[1]),
        first("annotations", 100, segmentation={"size": size, "counts": "0"}),
    )
    root = write_coco(tmp_path / "set", RIGHT_BOXES, change=lie)
    command = [sys.executable, look.__file__, "--data", root, "--check", "--masks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    assert "1000000" in done.stdout + done.stderr


def test_a_folder_that_can_not_be_written(tmp_path, monkeypatch):
    """Oracle: by hand. It is refused before anything slow."""
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "out"):  # neither is a folder, nor can be
        with pytest.raises(UserError, match=f"the folder {path} can't be made or written; give another --out"):
            evaluate.make_folder(path)
    assert evaluate.make_folder(tmp_path / "a" / "b").is_dir()
    monkeypatch.setattr(evaluate.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="can't be made or written; give another --out"):
        evaluate.make_folder(tmp_path / "out")


@pytest.mark.parametrize("flags", [("--size", 0), ("--show", -1), ("--jitter", 2, 1), ("--jitter", 0, 1)])
def test_bad_arguments(flags, tmp_path, capsys):
    """Oracle: by hand. One sentence and exit code 2."""
    code, _, said = command(look.main, ["--data", write_coco(tmp_path / "set", [[BOX]]), *flags], capsys)
    assert code == 2 and said.startswith("error: --size must be positive, --show not negative")


def test_an_error_of_the_code_is_not_hidden(capsys):
    """Oracle: torch's and the system's messages. A dead worker, a full device and a full disk are sentences; an error
    that the code raised in a worker stays what it is."""
    with pytest.raises(SystemExit), evaluate.one_sentence():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(SystemExit), evaluate.one_sentence():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    assert "2 GiB. Free the device, or use a smaller --micro-batch" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop, evaluate.one_sentence():
        raise OSError(28, "No space left on device", "out/results.json")
    said = "error: out/results.json failed: No space left on device\n"
    assert stop.value.code == 2 and capsys.readouterr().err == said
    with pytest.raises(RuntimeError, match="size mismatch"), evaluate.one_sentence():
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
