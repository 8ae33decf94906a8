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

import data
import evaluate
import look
import train
from data import TRAIN, load_annotations
from model import UserError

JSON = f"annotations/instances_{TRAIN}.json"
BOX = [1, 2, 30, 20]
RIGHT_BOXES = [[BOX] * 100, [BOX], [], []]  # 101 objects
RUNS = {"size": [48, 64], "counts": [100, 20, 48 * 64 - 120]}
NOTHING = {"size": [48, 64], "counts": [48 * 64]}
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


def renamed(name):
    """A change of all files' names."""

    def change(content):
        for row in content["images"]:
            row["file_name"] = name(row["file_name"])

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


FOUR, SIDE, OUTSIDE = (
    "whose bbox is not four numbers",
    "whose bbox is without positive sides",
    r"whose bbox is outside of its image by more than half, or two corners in place of \[x, y, width, height\]",
)
UNIT = r"whose bbox is in 0\.\.1: it looks normalized, multiply it by the image's size"
PIXEL = "whose segmentation is without a pixel in its bbox"
RENAMED = "4 files have other names: "
RIGHT, MEASURED = r"101 objects of 1 classes[^\n]*\n", "images without height and width were measured"
UNSOUND = "whose segmentation is neither polygons in pixels nor run lengths of its image"


def dropped(rule, value, **fields):
    """Object 50 is broken by that rule, and dropped; the words give its value."""
    says = rf"100 objects[\s\S]*dropped as broken: 1 {rule}, as annotation id 50: {re.escape(value)}\n"
    return Case(says, 0, first("annotations", 50, **fields))


def unsound(segmentation, value, rule=None):
    """The same with --masks, where all other objects are sound; without, nobody looks at the segmentation."""
    case = dropped(rule or UNSOUND, value, segmentation=segmentation)
    return case._replace(change=both(every("annotations", segmentation=RUNS), case.change), flags=("--masks",))


def kept(change=None, edit=None, says="101 objects", flags=()):
    return Case(rf"{says}(?![\s\S]*broken)[\s\S]*0 of \d images are bad", 0, change, edit, flags)


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
    "image id of text": Case(r"images\[1\], id 'a', has id 'a': not a whole number of 64 bits \(1 such\)", change=first(
        "images", 1, id="a")),
    "image id of nothing": Case(r"images\[1\], id None, has id None: not a whole", change=first("images", 1, id=None)),
    "image id half a number": Case(r"images\[1\], id 0.5, has id 0.5: not a whole", change=first("images", 1, id=0.5)),
    "image id beyond 64 bits": Case(r"images\[1\].* has id 9223372036854775808: not a whole number",
                                    change=first("images", 1, id=2**63)),
    "reference half a number": Case(r"annotations\[3\], id 3, has image_id 0.5: not the id of one of its images",
                                    change=first("annotations", 3, image_id=0.5)),
    "reference of NaN": Case(r"annotations\[3\], id 3, has category_id nan: not the id of one of its categories",
                             change=first("annotations", 3, category_id=math.nan)),
    "no width": kept(first("images", width=None), says=f"{RIGHT}  1 {MEASURED}"),
    "no height": kept(first("images", height=0), says=f"{RIGHT}  1 {MEASURED}"),
    "width half a number": kept(first("images", width=64.5), says=f"{RIGHT}  1 {MEASURED}"),
    "no sizes at all": kept(every("images", width=None, height=None), says=f"{RIGHT}  4 {MEASURED}"),
    "sizes of text": kept(every("images", width="64", height=" 48 ")),
    "sizes of words": kept(every("images", width="wide", height=-48), says=f"{RIGHT}  4 {MEASURED}"),
    "no size and no image": Case(r"cannot decode .*1\.png", change=first("images", 1, width=None), edit=image(b"")),
    "iscrowd 0 in text": kept(every("annotations", iscrowd="0"), says=r"101 objects of 1 classes, 0 crowds"),
    "iscrowd 1 in text": kept(first("annotations", 50, 3, iscrowd="1"), says=r"98 objects of 1 classes, 3 crowds"),
    "iscrowd a float": kept(first("annotations", 50, 3, iscrowd=1.0), says=r"98 objects of 1 classes, 3 crowds"),
    "iscrowd true": kept(first("annotations", 50, 3, iscrowd=True), says=r"98 objects of 1 classes, 3 crowds"),
    "iscrowd null": kept(lambda c: c["annotations"][9].update(iscrowd=None), says=r"101 objects of 1 .*, 0 crowds"),
    "iscrowd a word": dropped("whose iscrowd is neither 0 nor 1", "'no'", iscrowd="no"),
    "iscrowd 2": dropped("whose iscrowd is neither 0 nor 1", "2", iscrowd=2),
    "boxes in 0..1": Case(rf"of 101 objects 101 are broken: 101 {UNIT}, as annotation id 0: \[0\.1, 0\.2, 0\.3, 0\.4\]",
                          change=every("annotations", bbox=[0.1, 0.2, 0.3, 0.4])),
    "one box in 0..1": dropped(UNIT, "[0, 0, 1.0, 1.0]", bbox=[0, 0, 1.0, 1.0]),
    "polygons in 0..1": unsound([[0.1, 0.2, 0.9, 0.2, 0.9, 0.8]], "[[0.1, 0.2, 0.9, 0.2, 0.9, 0.8]]"),
    "polygon mirrored": unsound([[-v for v in POLYGON]], str([[-v for v in POLYGON]]), PIXEL),
    "polygon shifted": unsound([[v + 33 for v in POLYGON]], str([[v + 33 for v in POLYGON]]), PIXEL),
    "polygon of points on a line": unsound([[1, 2, 11, 2, 21, 2]], "[[1, 2, 11, 2, 21, 2]]", PIXEL),
    "run lengths of nothing": unsound(NOTHING, str(NOTHING), PIXEL),
    "one file under two ids": Case(r"has 0\.png under the image ids \[0, 1\] \(1 such\)",
                                   change=first("images", 1, file_name="0.png")),
    "one file under three ids, otherwise spelled": Case(
        r"has 0\.png under the image ids \[0, 1, 2\] \(1 such\)",
        change=first("images", 1, 2, file_name="./0.png")),
    "ids in text": kept(lambda c: [row.update({k: str(row[k]) for k in row if k in ("id", "image_id", "category_id")})
                                   for part in ("images", "categories", "annotations") for row in c[part]] and None),
    "ids of 64 bits": kept(lambda c: [row.update({key: row[key] + 2**63 - 4}) for part, key in (
        ("images", "id"), ("annotations", "image_id")) for row in c[part]] and None),
    "id beyond 64 bits in text": Case(r"images\[1\].*has id '9223372036854775808': not a whole number of 64 bits",
                                      change=first("images", 1, id=str(2**63))),
    "names with backslashes": kept(renamed(lambda name: "x\\" + name), says=rf"{RIGHT}  {RENAMED}"),
    "names with a URL": kept(renamed(lambda name: f"https://x/a%20b/{name}?y=1"), says=rf"{RIGHT}  {RENAMED}"),
    "names with a path": kept(renamed(lambda name: f"/home/me/{name}"), says=rf"{RIGHT}  {RENAMED}"),
    "names in another case": kept(renamed(lambda name: name.upper()), says=rf"{RIGHT}  {RENAMED}'0.PNG' is"),
    "names in another Unicode form": kept(first("images", 1, file_name="u\u0308.png"), lambda root: (
        root / TRAIN / "1.png").rename(root / TRAIN / "\u00fc.png"), says=rf"{RIGHT}  1 files have other names: "),
    "files in a folder more": kept(edit=lambda root: ((root / TRAIN / "more").mkdir(), (root / TRAIN / "1.png").rename(
        root / TRAIN / "more" / "1.png")), says=rf"{RIGHT}  1 files have other names: '1.png' is 'more/1.png'"),
    "two files near a name": Case(
        r"has no file '1\.png', which .*image id 1 \(1 such\); near it is \['(a|b)/1\.png', '(a|b)/1\.png'\]",
        edit=lambda root: [(root / TRAIN / name).mkdir() or shutil.copy(root / TRAIN / "1.png", root / TRAIN / name)
                           for name in "ab"] and (root / TRAIN / "1.png").unlink()),
    "two classes of one name": kept(lambda c: c["categories"].append({"id": 2, "name": "thing"}), says=(
        r"101 objects of 2 classes[\s\S]*several classes have the name 'thing'")),
    "a class without an object": kept(lambda c: c["categories"].append({"id": 0, "name": "root"}), says=(
        r"101 objects of 2 classes[\s\S]*classes without an object: 1, as \['root'\]")),
    "no annotations key": kept(lambda c: c.pop("annotations") and None, says="0 objects of 1 classes"),
    "file name that is no text": Case(
        r"has no file '\\ud800.jpg', which .* names for image id 0", change=first("images", file_name="\ud800.jpg")),
    "file name a number": Case("has no file '7', which .* names for image id 0", change=first("images", file_name=7)),
    "file name of nothing": Case("has no file .* names for image id 0", change=first("images", file_name=None)),
    "file name a folder": Case("has no file '', which .* names for image id 0", change=first("images", file_name="")),
    "xyxy taken for xywh": Case(rf"of 101 objects 101 are broken: 101 {OUTSIDE}, as annotation id 0: "
                                r"\[30, 20, 60, 45\]; correct them",
                                change=every("annotations", bbox=[30, 20, 60, 45])),
    "no bbox at all": Case(rf"of 101 objects 101 are broken: 101 {FOUR}, as annotation id 0: \[\];",
                           change=every("annotations", bbox=[])),
    "boxes of two lines": Case(rf"of 101 objects 101 are broken: 101 {FOUR}", change=every("annotations", bbox="a\nb")),
    "RLE of another size": Case(rf"of 101 objects 101 are broken: 101 {UNSOUND}, as annotation id 0: ",
                                change=every("annotations", segmentation={"size": [4, 4], "counts": [16]}),
                                flags=("--masks",)),
    "masks wanted and absent": Case(rf"of 101 objects 101 are broken: 101 {UNSOUND}, as annotation id 0: None;.*"
                                    r" or use --head retinanet", flags=("--masks",)),
    "10 broken of 101": Case(rf" 91 objects[\s\S]*dropped as broken: 10 {SIDE}, as annotation id 30:", 0,
                             first("annotations", 30, 10, bbox=[1, 2, -3, 4])),
    "11 broken of 101": Case(rf"of 101 objects 11 are broken: 11 {SIDE}, as annotation id 30:",
                             change=first("annotations", 30, 11, bbox=[1, 2, -3, 4])),
    "12 broken of 101": Case(rf"of 101 objects 12 are broken: 12 {SIDE}, as annotation id 30:",
                             change=first("annotations", 30, 12, bbox=[1, 2, -3, 4])),
    "11 broken of 1100": Case(rf" 1089 objects[\s\S]*dropped as broken: 11 {SIDE}, as annotation id 30:", 0,
                              both(more, first("annotations", 30, 11, bbox=[1, 2, -3, 4]))),
    "12 broken of 1100": Case(rf"of 1100 objects 12 are broken: 12 {SIDE}, as annotation id 30:",
                              change=both(more, first("annotations", 30, 12, bbox=[1, 2, -3, 4]))),
    "each way to be broken": Case(
        rf" 97 objects[\s\S]*dropped as broken: 1 {FOUR}, as annotation id 50: \[1\], 1 {SIDE}, as annotation "
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


def test_ten_faults_at_once(tmp_path, capsys):
    """Oracle: by hand. One look finds and names all of a set with ten faults, each with its count and the first id."""

    def spoil(content):
        images, objects = content["images"], content["annotations"]
        images += [dict(images[0], id=4), dict(images[1], id=5, file_name="absent.png"), dict(images[3])]
        images += [dict(images[3], id="x", file_name="2.png")]
        objects[20]["image_id"], objects[21]["category_id"], objects[22]["id"] = 77, 8, 0
        for k, fields in enumerate(
            [dict(bbox=["1", "2", "3", "4"]), dict(bbox=[1, 2, 0, 4]), dict(bbox=[0.1, 0.1, 0.2, 0.2])]
            + [dict(bbox=[60, 40, 60, 40]), dict(iscrowd="no"), dict(segmentation=[]), dict(segmentation=NOTHING)]
        ):
            objects[30 + k] |= fields

    root = write_coco(tmp_path / "set", RIGHT_BOXES, change=both(every("annotations", segmentation=RUNS), spoil))
    (root / TRAIN / "2.png").write_bytes(b"")
    code, printed, _ = command(look.main, ["--data", root, "--check", "--masks"], capsys)
    assert code == 2
    for says in (
        r"images\[7\], id 'x', has id 'x': not a whole number of 64 bits \(1 such\)",
        r"images has the id 3 twice \(1 such\)",
        r"annotations\[20\], id 20, has image_id 77: not the id of one of its images \(1 such\)",
        r"annotations\[21\], id 21, has category_id 8: not the id of one of its categories \(1 such\)",
        r"annotations has the id 0 twice \(1 such\)",
        r"no file 'absent\.png', which .* names for image id 5 \(1 such\)",
        r"0\.png under the image ids \[0, 4\] \(1 such\)",
        rf"1 {FOUR}, as annotation id 30: ",
        rf"1 {SIDE}, as annotation id 31: ",
        rf"1 {UNIT}, as annotation id 32: ",
        rf"1 {OUTSIDE}, as annotation id 33: ",
        r"1 whose iscrowd is neither 0 nor 1, as annotation id 34: 'no'",
        rf"1 {UNSOUND}, as annotation id 35: \[\]",
        rf"1 {PIXEL}, as annotation id 36: ",
        r"cannot decode .*2\.png \(image id 2\)",
    ):
        assert re.search(says, printed), (says, printed)


@pytest.mark.parametrize("area", [0, -7, None, "30", math.nan])
def test_an_area_that_is_none(area, tmp_path):
    """Oracle: by hand. An area that is not positive, or lacks, is the box's, and with masks the mask's."""
    segmentation = {"size": [48, 64], "counts": [100, 20, 48 * 64 - 120]}
    change = first("annotations", 0, area=area, segmentation=segmentation, bbox=[1, 1, 30, 20])
    root = write_coco(tmp_path, [[BOX]], change=change)
    assert load_annotations(root).area.tolist() == [600]
    assert load_annotations(root, masks=True).area.tolist() == [20]


MODES = {  # every mode of PIL's that a file can have: what is done with it
    **dict.fromkeys(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"), "converted"),
    **dict.fromkeys(("I;16", "I;16L", "I;16B"), "its upper 8 bits"),
    **dict.fromkeys(("I", "F"), "refused"),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_an_image(mode, tmp_path, monkeypatch):
    """Oracle: by hand. A grey of 128 is 128 in each mode that is taken, or 119 where it is a lightness; numbers without
    a known range are refused with what to do."""
    grey = Image.new("RGB", (4, 4), (128, 128, 128))
    if mode.startswith("I;16"):
        made = Image.frombytes(mode, (4, 4), np.full((4, 4), 128 << 8, ">u2" if mode == "I;16B" else "<u2").tobytes())
    elif mode in ("I", "F", "LAB"):
        made = Image.new(mode, (4, 4), (128, 128, 128) if mode == "LAB" else 128)
    elif mode == "P":
        made = grey.quantize()
    else:
        made = (grey.convert("L") if mode in ("1", "LA", "PA") else grey).convert(mode)
    assert made.mode == mode
    monkeypatch.setattr(data.Image, "open", lambda path: made)
    if MODES[mode] == "refused":
        with pytest.raises(UserError, match="save it as 8-bit PNG or JPEG"):
            data.read_image(tmp_path, "image id 1")
        return
    pixels = np.asarray(data.read_image(tmp_path, "image id 1")).astype(int)
    assert pixels.shape == (4, 4, 3)
    assert set(pixels.ravel()) <= {0, 255} if mode == "1" else abs(pixels - (119 if mode == "LAB" else 128)).max() <= 1


@pytest.mark.parametrize("mode, kind", [("F", "TIFF"), ("I", "TIFF"), ("I;16", "PNG"), ("I;16", "TIFF")])
def test_deep_images_from_files(mode, kind, tmp_path):
    """Oracle: by hand. As they come from a file: 16 bits are taken, floats and 32 bits refused, not made black."""
    path = tmp_path / f"image.{kind.lower()}"
    kinds = {"F": np.float32, "I": np.int32, "I;16": np.uint16}
    Image.fromarray(np.full((4, 4), 0.5 if mode == "F" else 128 << 8, kinds[mode])).save(path, format=kind)
    if mode != "I;16":
        with pytest.raises(
            UserError, match=f"the numbers of its mode {mode} have no known range; save it as 8-bit PNG"
        ):
            data.read_image(path, "image id 1")
    else:
        assert (np.asarray(data.read_image(path, "image id 1")) == 128).all()


def test_an_image_of_too_many_pixels(tmp_path, monkeypatch):
    """Oracle: by hand. The sentence says so and what to do, and does not speak of an attack."""
    Image.new("L", (40, 40)).save(tmp_path / "image.png")
    monkeypatch.setattr(data, "MAX_PIXELS", 1599)
    with pytest.raises(UserError, match="more than 1,599 pixels; scale it down, and its boxes") as error:
        data.read_image(tmp_path / "image.png", "image id 1")
    assert "attack" not in str(error.value) and Image.MAX_IMAGE_PIXELS is None


def roboflow(root):
    """A set in another layout: each split's json beside its images."""
    (root / TRAIN).rename(root / "train")
    (root / JSON).rename(root / "train" / "_annotations.coco.json")
    (root / "annotations").rmdir()


def test_another_layout(tmp_path, capsys):
    """Oracle: by hand. The sentence says that the layout is another, which jsons there are and how to name them, and
    sends nobody to download COCO; named, they are taken."""
    root = write_coco(tmp_path / "set", RIGHT_BOXES)
    roboflow(root)
    code, _, said = command(look.main, ["--data", root], capsys)
    assert code == 2 and f"{root} is not in COCO's layout; of json files it has {root}/train/_annotations" in said
    assert "--train or --val JSON IMAGES" in said and "wget" not in said
    for flag in ("--train", "--val"):
        code, printed, _ = command(look.main, [flag, root / "train/_annotations.coco.json", root / "train"], capsys)
        assert code == 0 and "4 images, 101 objects" in printed
    code, _, said = command(look.main, ["--train", root / "none.json", root / "train"], capsys)
    assert code == 2 and f"{root}/none.json not found" in said and "wget" not in said and "COCO's layout" not in said


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
    said = "error: out/results.json can't be read or written: No space left on device\n"
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
