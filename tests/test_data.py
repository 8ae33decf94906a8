"""data.py: annotations, scale jitter, the sampler; tools/make_shapes.py and tools/look.py."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from make_shapes import SHAPES, write_shapes
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision.transforms.functional import normalize

import data
import look
from data import (
    MAX_OBJECTS,
    PAD,
    TRAIN,
    VAL,
    TrainSet,
    UserError,
    View,
    draw_view,
    full_view,
    load_annotations,
    make_loader,
    micro_batches,
    read_image,
)
from evaluate import resolve_root
from model import PIXEL_MEAN, PIXEL_STD, Normalize


def index(root, split=TRAIN):
    return COCO(root / "annotations" / f"instances_{split}.json")


@pytest.mark.parametrize("which", ["coco_sample", "shapes"])
def test_annotations_equal_pycocotools(which, request):
    """Oracle: pycocotools. Ids, sizes, files, boxes, classes, crowds and areas of every image."""
    root = request.getfixturevalue(which)
    coco, a = index(root), load_annotations(root)
    assert a.ids.tolist() == sorted(coco.imgs)
    assert a.categories == [(k, coco.cats[k]["name"]) for k in sorted(coco.cats)]
    for i, image_id in enumerate(a.ids.tolist()):
        info, rows = coco.imgs[image_id], slice(*a.spans[i])
        assert (info["height"], info["width"]) == (a.heights[i], a.widths[i])
        assert a.path(i) == str(root / TRAIN / info["file_name"])
        theirs = coco.imgToAnns[image_id]
        assert a.boxes[rows].tolist() == [o["bbox"] for o in theirs]
        assert [a.categories[k][0] for k in a.labels[rows]] == [o["category_id"] for o in theirs]
        assert a.crowd[rows].tolist() == [bool(o["iscrowd"]) for o in theirs]
        assert a.area[rows].tolist() == [o["area"] for o in theirs]
        assert len(a.objects(i)[0]) == sum(not o["iscrowd"] for o in theirs) == a.positives()[i]


def test_crowds_and_empty_images_are_counted(coco_sample):
    """Oracle: pycocotools. The start-up line counts objects, crowds and images without objects."""
    coco, text = index(coco_sample), load_annotations(coco_sample).summary()
    crowds = sum(o["iscrowd"] for o in coco.anns.values())
    empty = sum(not any(not o["iscrowd"] for o in coco.imgToAnns[i]) for i in coco.imgs)
    assert crowds and empty
    assert f"50 images, {len(coco.anns) - crowds} objects of 80 classes, {crowds} crowds" in text
    assert f"{empty} images without objects (negatives)" in text


def test_annotations_are_packed(shapes):
    """Oracle: the types. Whatever grows with the images or the objects is an array of numbers, bytes or text."""
    for masks in (False, True):
        a = load_annotations(shapes, masks=masks)
        growing = [v for v in a if hasattr(v, "__len__") and len(v) >= len(a.ids) and not isinstance(v, str)]
        assert len(growing) == (11 if masks else 9)
        assert all(isinstance(v, np.ndarray) and v.dtype.kind in "iufbU" for v in growing)


def same(first, second):
    """Whether two Annotations hold equal arrays, of the same types, and values."""
    return all(
        x.dtype == y.dtype and np.array_equal(x, y) if isinstance(x, np.ndarray) else type(x) is type(y) and x == y
        for x, y in zip(first, second, strict=True)
    )


@pytest.fixture
def always_kept(monkeypatch):
    """Every json is large enough for its arrays to be kept."""
    monkeypatch.setattr(data, "KEPT_FROM", 0)


def link(root, folder):
    """A data set like that at `root`, with a copy of its annotations."""
    shutil.copytree(root / "annotations", folder / "annotations")
    for split in (TRAIN, VAL):
        if (root / split).exists():
            (folder / split).symlink_to(root / split)
    return folder


def parse(root, masks):
    """The split's Annotations straight from its json."""
    return data.pack(*data.split_paths(root, TRAIN), masks)


def kept_files(root):
    """What lies beside the json that is not one, drafts included."""
    return sorted(p.name for p in (root / "annotations").iterdir() if p.suffix != ".json")


@pytest.mark.parametrize("masks", [False, True])
def test_the_kept_arrays_equal_the_parsed_ones(masks, shapes, tmp_path, always_kept, monkeypatch, capsys):
    """Oracle: the parsed json. A later start maps equal arrays into memory, without parsing; boxes alone and with
    masks are kept apart; the file that is written is told of, once."""
    root, kind = link(shapes, tmp_path / "set"), "masks" if masks else "boxes"
    parsed = parse(root, masks)
    first = load_annotations(root, masks=masks)
    assert kept_files(root) == [f"instances_{TRAIN}.{kind}.pt"] and kept_files(root)[0] in capsys.readouterr().out
    monkeypatch.setattr(data, "pack", None)
    later = load_annotations(root, masks=masks)
    assert same(first, parsed) and same(later, parsed) and capsys.readouterr().out == ""
    if os.path.exists("/proc/self/maps"):
        lines = open("/proc/self/maps").read().splitlines()
        assert {line.split()[-1] for line in lines if line.endswith(".pt")} == {
            str(root / "annotations" / f"instances_{TRAIN}.{kind}.pt")
        }
    with pytest.raises(TypeError):  # the other kind has to be parsed, which `pack` can't any more
        load_annotations(root, masks=not masks)
    assert same(later.select([3, 5]), parsed.select([3, 5]))
    for n in range(8):
        sample, again = (TrainSet(a, 128, (0.5, 2))[n] for a in (later, parsed))
        assert all(torch.equal(torch.as_tensor(sample[k]), torch.as_tensor(v)) for k, v in again.items())


def test_boxes_and_masks_are_kept_apart(shapes, tmp_path, always_kept):
    """Oracle: the parsed json. Whichever comes first, each start has what it asked for, and both files lie there."""
    root = link(shapes, tmp_path / "set")
    for masks in (True, False, True, False):
        assert same(load_annotations(root, masks=masks), parse(root, masks))
    assert kept_files(root) == [f"instances_{TRAIN}.boxes.pt", f"instances_{TRAIN}.masks.pt"]


def test_a_small_json_is_parsed_each_time(shapes, tmp_path, capsys):
    """Oracle: the folder. Below the limit nothing is written beside the json, and nothing is said."""
    root = link(shapes, tmp_path / "set")
    assert same(load_annotations(root), parse(root, False))
    assert kept_files(root) == [] and capsys.readouterr().out == ""


def test_what_is_dropped_is_told_at_every_start(tmp_path, always_kept):
    """Oracle: the first start. The kept arrays say what was broken in the json, and the folder is today's."""
    root = write_coco(tmp_path / "set", [[[1, 2, 30, 20]] * 5 + [[1, 2, 30, -1]]])
    first = load_annotations(root)
    assert "1 whose bbox is without positive sides" in first.summary()
    root.rename(tmp_path / "moved")
    later = load_annotations(tmp_path / "moved")
    assert later.summary() == first.summary() and later.path(0) == str(tmp_path / "moved" / TRAIN / "0.png")


def test_a_changed_json_is_read_again(shapes, tmp_path, always_kept):
    """Oracle: by hand. An edited json, one of the same length too, is parsed anew, and the old arrays go."""
    root = link(shapes, tmp_path / "set")
    path = data.split_paths(root, TRAIN)[0]
    first = load_annotations(root)
    text = path.read_text()
    assert '"disc"' in text
    path.write_text(text.replace('"disc"', '"dusk"'))
    os.utime(path, ns=(1, first.boxes.size))
    assert load_annotations(root).categories[0] == (1, "dusk")
    assert kept_files(root) == [f"instances_{TRAIN}.boxes.pt"]
    assert load_annotations(root).categories[0] == (1, "dusk")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_folder_that_takes_no_file(error, shapes, tmp_path, always_kept, monkeypatch):
    """Oracle: the parsed json. Where the arrays can't be kept, be it half-way through, every start parses the json, all
    else is the same, and no draft stays behind."""
    root, calls, pack = link(shapes, tmp_path / "set"), [], data.pack

    def refuse(fields, path):
        path.write_bytes(b"half of it")
        raise error

    def counted(*arguments):
        calls.append(arguments)
        return pack(*arguments)

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(data, "pack", counted)
    for starts in (1, 2):
        assert same(load_annotations(root, masks=True), pack(*data.split_paths(root, TRAIN), True))
        assert len(calls) == starts and kept_files(root) == []


def test_a_damaged_file_is_read_again(shapes, tmp_path, always_kept):
    """Oracle: the parsed json. A file of kept arrays that is cut short, empty, other content, of another form, a
    folder or gone is not used."""
    root = link(shapes, tmp_path / "set")
    parsed = parse(root, True)
    kept = root / "annotations" / f"instances_{TRAIN}.masks.pt"

    def other_form(**fields):
        torch.save(torch.load(kept, weights_only=True) | fields, kept)

    for damage in (
        lambda: kept.write_bytes(kept.read_bytes()[:-500]),
        lambda: kept.write_bytes(kept.read_bytes()[:-500000]),
        lambda: kept.write_bytes(b""),
        lambda: torch.save({"boxes": torch.zeros(3)}, kept),
        lambda: torch.save([1, 2], kept),
        lambda: other_form(another=1),
        lambda: other_form(stamp=[data.KEPT_VERSION - 1, *torch.load(kept, weights_only=True)["stamp"][1:]], notes="x"),
        kept.unlink,
        lambda: (kept.unlink(), kept.mkdir()),
    ):
        assert same(load_annotations(root, masks=True), parsed) and kept.is_file()
        damage()
    assert same(load_annotations(root, masks=True), parsed)


def test_a_missing_image_is_named_at_a_later_start(shapes, tmp_path, always_kept):
    """Oracle: by hand. Files are looked for at every start, also where the annotations are kept."""
    root = link(shapes, tmp_path / "set")
    a = load_annotations(root)
    (root / TRAIN).unlink()
    (root / TRAIN).mkdir()
    with pytest.raises(UserError, match=f"no file .*image id {a.ids[0]}"):
        load_annotations(root)


def test_select(coco_sample):
    """Oracle: the whole split. A selection has the same objects for its images, and nothing else."""
    a = load_annotations(coco_sample)
    chosen = [0, 3, 4, 31, 49]
    part = a.select(chosen)
    assert part.ids.tolist() == a.ids[chosen].tolist() and part.positives().tolist() == a.positives()[chosen].tolist()
    assert part.boxes is a.boxes and a.select(slice(None)).ids.tolist() == a.ids.tolist()
    crowds = sum(a.crowd[slice(*a.spans[i])].sum() for i in chosen)
    assert f"5 images, {part.positives().sum()} objects of 80 classes, {crowds} crowds" in part.summary()
    for k, i in enumerate(chosen):
        assert all(np.array_equal(x, y) for x, y in zip(part.objects(k), a.objects(i)))
        assert part.path(k) == a.path(i)


def crowds_at(*places):
    """A `change` for write_coco: the objects at these places of the json become crowds."""

    def change(content):
        for place in places:
            content["annotations"][place]["iscrowd"] = 1

    return change


def test_objects_by_hand(tmp_path):
    """Oracle: by hand. Boxes of the image that is asked for, xyxy, float64, clipped to it; crowds, also the first, left
    out; the annotations stay as they are."""
    rows = [[5, 6, 7, 8], [-0.5, -1, 30, 20], [50, 30, 16, 20], [1, 2, 3, 4], [10, 10, 20.3, 5]]
    root = write_coco(tmp_path, [[[1, 1, 9, 9]], rows, []], names="abc", change=crowds_at(1, 4))
    a = load_annotations(root)
    before = a.boxes.copy(), a.labels.copy()
    wanted = [
        ([[1, 1, 10, 10]], [0]),
        ([[0, 0, 29.5, 19], [50, 30, 64, 48], [10, 10, 30.3, 15]], [1, 2, 1]),
        ([], []),
    ]
    for i, (boxes, labels) in enumerate(wanted):
        found, classes = a.objects(i)
        said = f"boxes of image {i} are {np.shape(found)}, wanted {(len(boxes), 4)}, which leaves out crowds"
        assert np.shape(found) == (len(boxes), 4), said
        assert found.dtype == np.float64, f"boxes of image {i} are {found.dtype}, wanted float64"
        apart = np.abs(found - np.reshape(boxes, (-1, 4))).max(initial=0)
        assert apart < 1e-9, f"boxes of image {i}, 64 x 48: {found.tolist()}, wanted {boxes}"
        classes = np.asarray(classes).tolist()
        assert classes == labels, f"labels of image {i}: {classes}, wanted {labels}"
    same = np.array_equal(a.boxes, before[0]) and np.array_equal(a.labels, before[1])
    assert same, "objects() has changed the annotations themselves"


def weights(outputs, scale, start, inputs):
    """(outputs, inputs): the antialiased bilinear (triangle) filter at start + (k + 1/2) * scale, over all inputs."""
    centre = start + (np.arange(outputs) + 0.5) * scale
    reach = max(scale, 1.0)
    w = np.clip(1 - np.abs(np.arange(inputs) + 0.5 - centre[:, None]) / reach, 0, None)
    return w / w.sum(1, keepdims=True)


def resize_all(image, view):
    """The view's pixels by a filter over the whole image, nothing cut away: (h, w, 3) float."""
    x = weights(view.width, (view.right - view.left) / view.width, view.left, image.shape[1])
    y = weights(view.height, (view.bottom - view.top) / view.height, view.top, image.shape[0])
    return np.einsum("yh,hwc,xw->yxc", y, image.astype(np.float64), x, optimize=True)


def test_one_resize_equals_resize_then_crop(coco_sample):
    """Oracle: the triangle filter over the whole image, itself checked against PIL's resize. Pixels within 3/255 but
    for 3 px inside the window's cut edges; where nothing is cut, everywhere."""
    a = load_annotations(coco_sample)
    image = read_image(a.path(0), "")
    full = full_view(image.height, image.width, 300)
    pil = np.asarray(image.resize((full.width, full.height), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(resize_all(np.asarray(image), full) - pil).max() <= 2

    cut = 0
    for i in range(25):
        image = read_image(a.path(i), "")
        rng = np.random.default_rng(i)
        view = draw_view(rng, image.height, image.width, 256, (0.5, 2.0))._replace(flip=False)
        ours = view.image(image, 256)[:, : view.height, : view.width].permute(1, 2, 0).numpy().astype(float)
        error = np.abs(ours - resize_all(np.asarray(image), view)).max(axis=2)
        edges = slice(3 * (view.top > 0), view.height - 3 * (view.bottom < image.height))
        sides = slice(3 * (view.left > 0), view.width - 3 * (view.right < image.width))
        assert error[edges, sides].max() <= 3, i
        cut += view.left > 0 or view.top > 0
    assert cut > 5


def test_window_by_the_official_rule():
    """Oracle: the authors' rule (input_utils.py) by hand, from the draws that draw_view makes, in its order. Sizes
    exactly; boxes within half a source pixel, exactly where nothing is cut."""
    for seed in range(300):
        rng = np.random.default_rng(seed)
        height, width, size = (int(v) for v in rng.integers(60, 700, 3))
        box = np.sort(rng.uniform(0, 1, (2, 2)), axis=0) * [width, height]
        view = draw_view(np.random.default_rng(seed), height, width, size, (0.5, 2.0))

        again = np.random.default_rng(seed)
        ratio = round(again.uniform(0.5, 2.0) * size) / max(height, width)
        scaled = np.array([round(width * ratio), round(height * ratio)])
        offset = np.array([again.integers(0, max(side - size, 0), endpoint=True) for side in scaled])
        flip = again.random() < 0.5
        limit = np.minimum(scaled, size)
        expected = (box * (scaled / [width, height]) - offset).clip(0, limit)
        if flip:
            expected[:, 0] = limit[0] - expected[::-1, 0]
        assert (view.width, view.height, view.flip) == (*limit, flip)
        error = np.abs(view.boxes(box.reshape(1, 4)).reshape(2, 2) - expected) / (scaled / [width, height])
        assert (error <= 0.5 + 1e-6).all()
        assert (error[:, scaled <= size] < 1e-6).all()


def test_whole_pixel_windows_equal_pil(coco_sample):
    """Oracle: PIL, resizing the whole image to twice its size and cropping at the official offset. Where that offset is
    a whole source pixel, the one resize is the same within 3/255, but for 3 px inside the cut edges."""
    a = load_annotations(coco_sample)
    checked = 0
    for seed in range(120):
        image = read_image(a.path(seed % 5), "").resize((160, 120))
        view = draw_view(np.random.default_rng(seed), 120, 160, 160, (2.0, 2.0), flip=False)
        again = np.random.default_rng(seed)
        again.uniform(2.0, 2.0)
        x, y = (again.integers(0, side - 160, endpoint=True) for side in (320, 240))
        if x % 2 or y % 2:
            continue
        assert (view.left, view.top, view.width, view.height) == (x // 2, y // 2, 160, 160)
        whole = np.asarray(image.resize((320, 240), Image.Resampling.BILINEAR)).astype(int)
        ours = view.image(image, 160).permute(1, 2, 0).numpy().astype(int)
        error = np.abs(ours - whole[y : y + 160, x : x + 160])
        assert error[3:-3, 3:-3].max() <= 3
        checked += 1
    assert checked > 15


BOXES = {  # source box -> in the network's input, by the view below: 40 x 80 pixels become 80 x 40, from (10, 20) on
    "inside the window": ([15, 30, 45, 60], [10, 5, 70, 20]),
    "over its left and upper edge": ([0, 0, 30, 40], [0, 0, 40, 10]),
    "over its right and lower edge": ([45, 90, 70, 120], [70, 35, 80, 40]),
    "as large as the image": ([0, 0, 200, 200], [0, 0, 80, 40]),
    "outside of it": ([60, 110, 70, 120], [80, 40, 80, 40]),
}


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_of_a_view_by_hand(flip):
    """Oracle: by hand. Boxes are moved, scaled along each axis, clipped to the region and, with it, flipped; the given
    ones stay as they are, and none are taken, too."""
    view = View(10, 20, 50, 100, 80, 40, flip)
    given = np.array([source for source, _ in BOXES.values()], dtype=float)
    found = view.boxes(given)
    assert isinstance(found, np.ndarray) and found.shape == (5, 4), f"boxes() gives {type(found)}, {np.shape(found)}"
    for (case, (source, (x1, y1, x2, y2))), box in zip(BOXES.items(), found.tolist()):
        wanted = [80 - x2, y1, 80 - x1, y2] if flip else [x1, y1, x2, y2]
        assert box == pytest.approx(wanted, abs=1e-6), f"{view}, a box {case}, {source}: {box}, wanted {wanted}"
    kept = given.tolist() == [source for source, _ in BOXES.values()]
    assert kept, f"boxes() has changed the boxes that it was given, to {given.tolist()}"
    none = view.boxes(np.zeros((0, 4)))
    assert none.shape == (0, 4), f"boxes() of no boxes gives {none.shape}, wanted (0, 4)"


VIEWS = {
    "the whole image, smaller": View(0, 0, 120, 90, 50, 38),
    "the whole image, larger": View(0, 0, 120, 90, 128, 96),
    "a window, smaller": View(31, 7, 112, 80, 27, 36),
    "a window, larger": View(15, 40, 75, 90, 128, 100),
    "one pixel": View(60, 50, 61, 51, 5, 3),
}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("case", VIEWS)
def test_pixels_of_a_view(case, flip):
    """Oracle: the triangle filter over the rectangle of a noisy image, within 2/255 but for 3 px inside the window's
    cut edges; a region that is flipped stays where it is; around it lies PAD."""
    view, size = VIEWS[case]._replace(flip=flip), 128
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    found = view.image(Image.fromarray(pixels), size)
    said = f"{found.dtype} {tuple(found.shape)}"
    assert said == "torch.uint8 (3, 128, 128)", f"image() gives {said}, wanted uint8 (3, 128, 128)"
    assert found.permute(1, 2, 0).is_contiguous(), f"image() is not channels last in memory: strides {found.stride()}"
    found = found.permute(1, 2, 0).numpy().astype(int)
    around = np.ones((size, size), dtype=bool)
    around[: view.height, : view.width] = False
    colours = np.unique(found[around], axis=0).tolist()
    assert colours in ([], [PAD.tolist()]), f"{view}: around the region are {colours[:4]}, wanted {PAD.tolist()} alone"
    cut = pixels[view.top : view.bottom, view.left : view.right]
    wanted = resize_all(cut, View(0, 0, *cut.shape[1::-1], view.width, view.height))
    rows = slice(3 * (view.top > 0), view.height - 3 * (view.bottom < 90))
    columns = slice(3 * (view.left > 0), view.width - 3 * (view.right < 120))
    ours = found[: view.height, : view.width]
    error = ((ours[:, ::-1] if flip else ours) - wanted)[rows, columns]
    worst, mean = np.abs(error).max(initial=0), error.mean() if error.size > 1000 else 0
    assert worst <= 2, f"{case}, {view}: a pixel of the region is {worst:.0f} from the antialiased bilinear resize"
    assert abs(mean) < 0.2, f"{case}, {view}: on average {mean:.2f} from that resize, whose values are rounded, not cut"


FULL_VIEWS = [  # height, width, size, scale -> width and height in the network's input
    (480, 640, 640, 1.0, 640, 480),
    (640, 480, 320, 1.0, 240, 320),
    (333, 500, 640, 1.0, 640, 426),  # of 426.24
    (500, 334, 640, 1.0, 428, 640),  # of 427.52
    (500, 334, 640, 0.7, 299, 448),  # of 299.26
    (200, 101, 128, 1.803, 117, 231),  # of 116.7 and 230.8
    (1, 1, 128, 1.0, 128, 128),
    (20, 10000, 128, 1.0, 128, 1),  # of 0.256
]


@pytest.mark.parametrize("height, width, size, scale, wide, high", FULL_VIEWS)
def test_the_whole_image_by_hand(height, width, size, scale, wide, high):
    """Oracle: by hand. The long side is size * scale, the other in proportion, rounded; nothing is cut or flipped."""
    found, wanted = full_view(height, width, size, scale), View(0, 0, width, height, wide, high)
    assert found == wanted, f"{height} x {width} at {scale} * {size}: {found}, wanted {wanted}"


def near_even(counts, expected, what):
    """Fail if counts differ from those expected of a fair draw by more than five standard deviations."""
    expected = np.broadcast_to(expected, np.shape(counts))
    wrong = int((np.abs(counts - expected) > 5 * np.sqrt(expected) + 1).sum())
    assert wrong == 0, f"{what}: {np.asarray(counts).tolist()}, expected {expected.round().astype(int).tolist()}"


def test_the_scale_is_drawn_evenly():
    """Oracle: counting 4000 views, of which nothing is cut. Scales are as many in each tenth of the range; both sides
    have the same; half of the views are flipped, none where that is not wanted."""
    rng, jitter = np.random.default_rng(0), (0.5, 0.9)
    views = [draw_view(rng, 300, 400, 1000, jitter) for _ in range(4000)]
    whole = {view[:4] for view in views}
    said = f"where nothing is cut, the rectangle is {list(whole)[:3]}, wanted (0, 0, 400, 300)"
    assert whole == {(0, 0, 400, 300)}, said
    long, short = (np.array([getattr(view, side) for view in views]) for side in ("width", "height"))
    said = f"scales from U{jitter} make 1000 pixels {long.min()} to {long.max()}"
    assert 500 <= long.min() <= 502 and 898 <= long.max() <= 900, said
    near_even(np.histogram(long, np.linspace(500, 900, 11))[0], 400, "scales by tenths of their range")
    apart = np.abs(short - 0.75 * long).max()
    assert apart <= 1, f"a height is {apart:.1f} pixels from 3/4 of its width: one scale is for both sides"
    flips = sum(bool(view.flip) for view in views)
    near_even([flips, 4000 - flips], 2000, "views that are flipped and not")
    flips = sum(bool(draw_view(rng, 300, 400, 1000, jitter, flip=False).flip) for _ in range(100))
    assert flips == 0, f"{flips} of 100 views are flipped, though flip=False"


def test_the_window_is_drawn_evenly():
    """Oracle: counting 5200 windows of 50 x 50 in a 30 x 40 image, scaled to 75 x 100. They begin at each whole source
    pixel as often as an even draw of the offset, times 0.4 and rounded, comes there; x and y do not go together."""
    rng, draws = np.random.default_rng(0), 5200
    views = [draw_view(rng, 30, 40, 50, (2.0, 2.0)) for _ in range(draws)]
    sizes = {view[4:6] for view in views}
    assert sizes == {(50, 50)}, f"windows of 50 x 50 have the sizes {list(sizes)[:3]}"
    for first, last, source, scaled in (("left", "right", 40, 100), ("top", "bottom", 30, 75)):
        low, high = (np.array([getattr(view, name) for view in views]) for name in (first, last))
        said = f"{first} is {low.min()} to {low.max()}, {last} {high.min()} to {high.max()}, the image's side {source}"
        assert low.min() >= 0 and high.max() <= source, said
        widths = np.unique(high - low).tolist()
        assert widths == [20], f"50 of {scaled} pixels are 20 of {source}, but {last} - {first} is {widths}"
        edges = np.round(np.arange(scaled - 50 + 1) * 0.4).astype(int)
        expected = np.bincount(edges) * draws / len(edges)
        near_even(np.bincount(low, minlength=len(expected)), expected, f"windows by {first}")
    together = np.corrcoef([view.left for view in views], [view.top for view in views])[0, 1]
    assert abs(together) < 0.1, f"offsets along x and y go together: correlation {together:.2f}"


def test_each_edge_of_the_window_is_rounded():
    """Oracle: by hand. Of 31 x 43 pixels, scaled to 68 x 95, windows of 50 x 50 are 22.8 x 22.6 source pixels, from
    every offset: either edge is rounded to the nearest whole pixel, by itself."""
    rng = np.random.default_rng(0)
    views = [draw_view(rng, 31, 43, 50, (1.9, 1.9)) for _ in range(2000)]
    for first, last, source, scaled in (("left", "right", 43, 95), ("top", "bottom", 31, 68)):
        found = {(getattr(view, first), getattr(view, last)) for view in views}
        offsets = range(scaled - 50 + 1)
        wanted = {(round(o * source / scaled), round((o + 50) * source / scaled)) for o in offsets}
        what = f"({first}, {last}) of windows of 50 of {scaled} pixels, {source} in the source, each edge rounded"
        assert found == wanted, f"{what}: found, not wanted {sorted(found - wanted)}, missing {sorted(wanted - found)}"


def test_only_the_longer_side_is_cut():
    """Oracle: by hand. Of 30 x 100 pixels, scaled to 75 x 250, a window of 100 has all rows and 40 of the columns."""
    rng = np.random.default_rng(0)
    for view in (draw_view(rng, 30, 100, 100, (2.5, 2.5)) for _ in range(50)):
        wide, high = (view.right - view.left, view.width), (view.top, view.bottom, view.height)
        assert wide == (40, 100), f"{view}: {wide[0]} columns become {wide[1]}, wanted 40 and 100"
        assert high == (0, 30, 75), f"{view}: rows {high[0]} to {high[1]} become {high[2]}, wanted 0 to 30, and 75"


def test_views_come_from_the_generator():
    """Oracle: repetition. Equal generators give equal views, others others."""
    first, again, other = ([draw_view(np.random.default_rng(s), 300, 400, 320, (1.5, 2)) for s in k] for k in SEEDS)
    differ = [s for s, (x, y) in enumerate(zip(first, again)) if x != y]
    assert not differ, f"the view from default_rng({differ[0]}) differs at its second call"
    assert len({*first, *other}) >= 39, f"only {len({*first, *other})} different views from 40 generators"


SEEDS = range(20), range(20), range(20, 40)


@pytest.mark.parametrize("height, width", [(1, 1), (50, 10000), (10000, 50), (700, 3)])
def test_a_view_has_pixels(height, width):
    """Oracle: by hand. A view of an image of any shape lies inside it, and has a pixel at least on either side."""
    rng = np.random.default_rng(0)
    for view in (draw_view(rng, height, width, 128, (0.1, 8.0)) for _ in range(200)):
        inside = 0 <= view.left < view.right <= width and 0 <= view.top < view.bottom <= height
        assert inside, f"{view} is no rectangle of an image of {height} x {width}"
        sizes = 1 <= view.width <= 128 and 1 <= view.height <= 128
        assert sizes, f"{view} of an image of {height} x {width} should have sides of 1 to 128"


def test_boxes_follow_the_pixels():
    """Oracle: a drawn rectangle's own pixels, found again after 100 random views, flips among them."""
    seen = flips = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        height, width = (int(v) for v in rng.integers(100, 500, 2))
        x1, y1 = rng.integers(0, width - 40), rng.integers(0, height - 40)
        x2, y2 = rng.integers(x1 + 30, width + 1), rng.integers(y1 + 30, height + 1)
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[y1:y2, x1:x2] = 255
        view = draw_view(rng, height, width, 256, (0.5, 2.0))
        out = view.image(Image.fromarray(pixels), 256)[0, : view.height, : view.width].numpy() > 127
        (box,) = view.boxes(np.array([[x1, y1, x2, y2]], dtype=float))
        if (box[2:] - box[:2] < 3).any():
            continue
        rows, columns = np.flatnonzero(out.any(1)), np.flatnonzero(out.any(0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        error = np.abs(box - found).max()
        assert error <= 1, f"{view}: the box of a rectangle is {box.round(1).tolist()}, its pixels are in {found}"
        seen, flips = seen + 1, flips + view.flip
    assert seen > 70 and 20 < flips < 80, f"{seen} of 100 views show the rectangle, {flips} of these are flipped"


def test_a_sample(coco_sample):
    """Oracle: by hand. Types, shapes, padding, padding colour; the same twice, another in another epoch."""
    a = load_annotations(coco_sample)
    dataset = TrainSet(a, 256, (0.4, 0.6), seed=3)
    for n in range(10):
        sample = dataset[n]
        boxes, labels, image = sample["boxes"], sample["labels"], sample["image"]
        assert image.dtype == torch.uint8 and image.shape == (3, 256, 256)
        assert boxes.shape == (MAX_OBJECTS, 4) and boxes.dtype == torch.float32 and labels.dtype == torch.int64
        real = labels >= 0
        assert real.sum() <= a.positives()[dataset.image_of(n)[1]]
        assert not boxes[~real].any() and (labels[~real] == -1).all()
        assert (boxes[real][:, 2:] > boxes[real][:, :2]).all() and boxes.min() >= 0 and boxes.max() <= 154
        assert tuple(image[:, 255, 255].tolist()) == (124, 116, 104)
        assert 0 <= sample["noise"] < 2**32 and sample["noise"] != dataset[n + 1]["noise"]
        again = TrainSet(a, 256, (0.4, 0.6), seed=3)[n]
        assert all(torch.equal(torch.as_tensor(sample[k]), torch.as_tensor(again[k])) for k in sample)
    later = next(n for n in range(50, 100) if dataset.image_of(n)[1] == dataset.image_of(0)[1])
    assert not torch.equal(dataset[later]["image"], dataset[0]["image"])


def test_an_epoch_sees_every_image_once(tmp_path):
    """Oracle: counting. Samples n of epoch n // N are a permutation of the images, another in the next epoch and for
    another seed, the same at every call."""
    a = load_annotations(write_coco(tmp_path, [[]] * 13))
    orders = {}
    for seed in (0, 1):
        for epoch in (2, 0, 1):
            found = [TrainSet(a, 128, (1, 1), seed=seed).image_of(n) for n in range(13 * epoch, 13 * epoch + 13)]
            epochs, order = (list(part) for part in zip(*found))
            what = f"seed {seed}, samples {13 * epoch} to {13 * epoch + 12} of 13 images"
            assert epochs == [epoch] * 13, f"{what}: epochs {epochs}, wanted {epoch}"
            assert sorted(order) == list(range(13)), f"{what}: images {order}, wanted each once"
            orders[seed, epoch] = tuple(order)
    different = len(set(orders.values()))
    assert different == 6, f"{different} different orders of 3 epochs for 2 seeds: {orders}"
    dataset = TrainSet(a, 128, (1, 1), seed=1)
    for n in (38, 0, 17, 0):
        found, wanted = dataset.image_of(n)[1], orders[1, n // 13][n % 13]
        assert found == wanted, f"sample {n} is image {found} at one call and {wanted} at another"


def test_a_sample_of_shapes(shapes):
    """Oracle: the annotations. Without jitter or flip a sample's boxes are all objects that are no crowds, scaled; the
    range of the scale is the one that was given."""
    a = load_annotations(shapes)
    plain, half = (TrainSet(a, 256, (scale, scale), flip=False) for scale in (1.0, 0.5))
    crowds = 0
    for n in range(60):
        sample, i = plain[n], plain.image_of(n)[1]
        rows = [m for m in range(*a.spans[i]) if not a.crowd[m]]
        crowds += a.spans[i, 1] - a.spans[i, 0] - len(rows)
        scale = 256 / max(a.heights[i], a.widths[i])
        region = [int(a.heights[i] * scale + 0.5), int(a.widths[i] * scale + 0.5)]
        what = f"sample {n}, image {i} of {a.heights[i]} x {a.widths[i]}"
        found = sample["labels"].tolist()
        wanted = a.labels[rows].tolist() + [-1] * (100 - len(rows))
        assert found == wanted, f"{what}: labels {found[:9]}..., wanted {wanted[:9]}..."
        found, wanted = sample["boxes"].numpy(), np.zeros((100, 4))
        wanted[: len(rows)] = a.boxes[rows] @ [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]] * scale
        error = np.abs(found - wanted).max(axis=1)
        k = error.argmax()
        assert error[k] < 1, f"{what}: box {k} is {found[k].tolist()}, wanted {wanted[k].round(1).tolist()}"
        found = sample["region"].tolist()
        assert found == pytest.approx(region, abs=1), f"{what}: region {found}, wanted (height, width) {region}"
        found = half[n]["region"].max().item() if n < 5 else 128
        assert found == 128, f"{what}: the region's long side is {found} of 256 pixels at scale 0.5"
    assert crowds > 0


def fixed_view(monkeypatch, view):
    """Let every sample be seen by this view."""
    monkeypatch.setattr(data, "draw_view", lambda *arguments, **options: view)


def masks_at_corners(*crowds):
    """A `change` for write_coco: object k's mask is its box without the k-th corner; some objects are crowds."""

    def change(content):
        for k, o in enumerate(content["annotations"]):
            x, y, w, h = o["bbox"]
            corners = [x, y], [x + w, y], [x + w, y + h], [x, y + h]
            o["segmentation"] = [sum((c for j, c in enumerate(corners) if j != k % 4), [])]
            o["iscrowd"] = int(k in crowds)

    return change


KINDS = {
    "image": "torch.uint8 (3, 96, 96)",
    "boxes": "torch.float32 (100, 4)",
    "labels": "torch.int64 (100,)",
    "region": "torch.float32 (2,)",
    "masks": "torch.uint8 (100, 112, 112)",
}


@pytest.mark.parametrize("flip", [False, True])
def test_a_sample_by_hand(flip, tmp_path, monkeypatch):
    """Oracle: by hand, for a given view. Types and shapes; what is left out: crowds, also the first, and what the view
    leaves less than 0.01 px of, as 0.008 and 0.0; the others' boxes, labels and masks, in order; the pixels."""
    rows = [[12, 10, 20, 20], [20, 30, 24, 20], [0, 0, 10, 48], [40, 20, 24, 28], [16, 16, 9, 9], [49.996, 12, 9, 20]]
    rows += [[1, 1, 40, 40], [49.98, 12, 9, 20]]
    root = write_coco(tmp_path, [rows], names="abcdefgh", change=masks_at_corners(0, 4))
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / TRAIN / "0.png")
    a, view = load_annotations(root, masks=True), View(10, 8, 50, 48, 80, 60, flip)
    fixed_view(monkeypatch, view)
    sample = TrainSet(a, 96, (1, 1))[0]
    bare = TrainSet(load_annotations(root), 96, (1, 1))[0]
    wanted = sorted([*KINDS, "noise"])
    assert sorted(sample) == wanted, f"with masks, a sample has {sorted(sample)}, wanted {wanted}"
    assert bare.keys() == sample.keys() - {"masks"}, f"without masks, a sample has {sorted(bare)}"
    for name, kind in KINDS.items():
        found = f"{sample[name].dtype} {tuple(sample[name].shape)}"
        assert found == kind, f"{name} is {found}, wanted {kind}"
    found = sample["region"].tolist()
    assert found == [60, 80], f"region is {found}, wanted (height, width) [60, 80]"
    wanted = {1: [20, 33, 68, 60], 3: [60, 18, 80, 60], 6: [0, 0, 62, 49.5], 7: [79.96, 6, 80, 36]}
    labels = sample["labels"].tolist()
    said = f"labels {labels[:9]}..., wanted {[*wanted]} and -1: which objects are left out, and how is it padded?"
    assert labels == [*wanted] + [-1] * 96, said
    for k, (x1, y1, x2, y2) in enumerate(wanted.values()):
        found, box = sample["boxes"][k].tolist(), [80 - x2, y1, 80 - x1, y2] if flip else [x1, y1, x2, y2]
        assert found == pytest.approx(box, abs=1e-3), f"flip {flip}: box {k} is {found}, wanted {box}"
    assert not sample["boxes"][4:].any(), "behind the objects, boxes are not 0"
    wrong = (sample["image"] != view.image(Image.fromarray(noise), 96)).float().mean().item()
    assert wrong == 0, f"{wrong:.0%} of the pixels are not those of the view's own image"
    for k, m in enumerate(wanted):
        share = wrong_cells(sample["masks"][k], a, m, 0, view)
        assert share < 0.01, f"flip {flip}: {share:.0%} of mask {k} is not what the window shows of object {m}'s"
    assert not sample["masks"][4:].any(), "behind the objects, masks are not 0"


def wrong_cells(found, a, m, i, view):
    """The share of a target mask's cells that aren't the pixel of object m, of image i, under the cell's centre, in the
    part of the object's box that the view shows."""
    bitmap = coco_mask.decode(a.mask(i, m))
    x, y, w, h = a.boxes[m]
    left, right = (min(max(v, view.left, 0), view.right, bitmap.shape[1]) for v in (x, x + w))
    top, bottom = (min(max(v, view.top, 0), view.bottom, bitmap.shape[0]) for v in (y, y + h))
    cells = (np.arange(112) + 0.5) / 112
    columns = (left + (cells[::-1] if view.flip else cells) * (right - left)).astype(int)
    wanted = bitmap[(top + cells * (bottom - top)).astype(int)][:, columns]
    return (found.numpy() != wanted).mean()


def test_a_file_of_another_size_is_refused(tmp_path):
    """Oracle: by hand. A sample of an image that is not as large as the json says is a UserError."""
    root = write_coco(tmp_path, [[[1, 2, 30, 20]]])
    dataset = TrainSet(load_annotations(root), 128, (1, 1))
    Image.new("RGB", (48, 64)).save(root / TRAIN / "0.png")
    with pytest.raises(UserError, match="48x64 pixels, but the json says 64x48"):
        dataset[0]


def test_each_sample_has_its_own_draws(tmp_path):
    """Oracle: counting. Of 12 equal images, in 3 epochs of 2 seeds, no two samples have the same window or the same
    noise; a sample is the same whatever was asked for before. Noise is an int of 32 random bits."""
    root = write_coco(tmp_path, [[[0, 0, 256, 192]]] * 12, size=(256, 192))
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8))
    for i in range(12):
        pixels.save(root / TRAIN / f"{i}.png")
    a = load_annotations(root)
    samples = {(seed, n): TrainSet(a, 256, (1.2, 2.0), seed=seed)[n] for seed in (0, 1) for n in range(36)}
    for what, value in (("pixels", lambda sample: sample["image"].numpy().tobytes()), ("noise", lambda s: s["noise"])):
        seen = {}
        for key, sample in samples.items():
            other = seen.setdefault(value(sample), key)
            assert other == key, f"the same {what} for (seed, n) {key} as for {other}, in epochs of 12 equal images"
    noise = [sample["noise"] for sample in samples.values()]
    kinds = {type(v).__name__ for v in noise}
    assert kinds == {"int"}, f"noise is {kinds}, wanted int"
    assert min(noise) >= 0 and max(noise) < 2**32, f"noise is from {min(noise)} to {max(noise)}, wanted 0 to 2**32 - 1"
    for bit in range(32):
        ones = sum(v >> bit & 1 for v in noise)
        assert 14 < ones < 58, f"bit {bit} of noise is set in {ones} of 72 samples, wanted about half"
    dataset = TrainSet(a, 256, (1.2, 2.0), seed=1)
    for n in (35, 3, 20, 3):
        for name, value in dataset[n].items():
            same = torch.equal(torch.as_tensor(value), torch.as_tensor(samples[1, n][name]))
            assert same, f"{name} of sample {n} depends on which samples were asked for before"


def test_normalize_by_hand():
    """Oracle: torchvision's normalize of the image in 0..1, and by hand: a pixel of PIXEL_MEAN's colour and others."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 5, 6), dtype=torch.uint8)
    images[0, :, 0, 0], images[0, :, 0, 1] = 0, 255
    before = images.clone()
    given = Normalize()(images)
    assert given.dtype == torch.float32 and given.shape == images.shape, "float32 of the same shape"
    assert torch.equal(images, before), "the images themselves stay as they are"
    try:
        device = Normalize().to("meta")(images.to("meta")).device.type
    except Exception as error:
        device = repr(error)
    assert device == "meta", f"images of the device that the module was moved to stay there; on meta: {device}"
    expected = normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    mean, std = (torch.tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    mistakes = {
        "it divides before it subtracts": images / std - mean,
        "the channels are taken as BGR": (images - mean.flip(0)) / std.flip(0),
        "the channels are turned round": (images.flip(1) - mean) / std,
        "pixels are in 0..255, as PIXEL_MEAN is, not in 0..1": (images / 255 - mean) / std,
        "the subtraction is not one of uint8, which has no negative numbers": (images - mean.to(torch.uint8)) / std,
        "it does not divide by PIXEL_STD": images - mean,
    }
    said = [what for what, value in mistakes.items() if torch.allclose(given, value, atol=1e-4)]
    assert torch.allclose(given, expected, atol=1e-4), f"PIXEL_MEAN is to be 0: {said[0] if said else 'another value'}"


def test_padding_normalizes_to_zero():
    """Oracle: by hand. The padding's colour is the mean, rounded, so it is 0 within half a grey level."""
    image = PAD.view(1, 3, 1, 1)
    assert PAD.tolist() == [round(m) for m in PIXEL_MEAN]
    assert Normalize()(image).abs().max() < 0.5 / 57, "the padding's colour, which is PIXEL_MEAN's, becomes 0"


@pytest.mark.parametrize("world, micro", [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)])
def test_global_batches_do_not_depend_on_the_hardware(world, micro):
    """Oracle: by hand. Steps 3 to 5 hold samples 24 to 47 in order, read micro-step by micro-step, rank by rank."""
    per_rank = [[list(b) for b in micro_batches(3, 6, 8, micro, rank, world)] for rank in range(world)]
    whose = f"{world} ranks, micro-batches of {micro}, steps 3 to 5 of 8 samples: "
    sizes = {len(batch) for batches in per_rank for batch in batches}
    assert sizes == {micro}, f"{whose}micro-batches of {sorted(sizes)} samples"
    counts, each = [len(batches) for batches in per_rank], 24 // world // micro
    assert counts == [each] * world, f"{whose}{counts} micro-batches, wanted {each} for each rank"
    found = sum((batch for batches in zip(*per_rank) for batch in batches), [])
    assert found == list(range(24, 48)), f"{whose}rank by rank the samples are {found}, wanted 24 to 47 in order"


def test_micro_batches_by_hand():
    """Oracle: by hand. Two of two ranks' micro-batches of steps 1 and 2, with batches of 8 in micro-batches of 2."""
    wanted = [[8, 9], [12, 13], [16, 17], [20, 21]], [[10, 11], [14, 15], [18, 19], [22, 23]]
    for rank in (0, 1):
        found = [list(batch) for batch in micro_batches(1, 3, 8, 2, rank, 2)]
        assert found == wanted[rank], f"rank {rank} of 2: {found}, wanted {wanted[rank]}"
    found = list(micro_batches(4, 4, 8, 2))
    assert found == [], f"from step 4 to step 4: {found}, wanted nothing"


def test_batches_are_channels_last(shapes):
    """Oracle: the samples. A batch is their stack, of which the images are channels last, from a worker, too."""
    dataset = TrainSet(load_annotations(shapes), 128, (0.5, 2.0))
    for workers in (0, 1):
        (batch,) = make_loader(dataset, [[3, 4, 5]], workers)
        assert batch["image"].is_contiguous(memory_format=torch.channels_last) and batch["image"].shape == (
            3,
            3,
            128,
            128,
        )
        for k, n in enumerate((3, 4, 5)):
            assert all(torch.equal(batch[name][k], torch.as_tensor(value)) for name, value in dataset[n].items())


def test_workers_do_not_matter(shapes):
    """Oracle: the samples in this process. 0 or 2 workers give the same batches in the same order."""
    dataset = TrainSet(load_annotations(shapes), 128, (0.5, 2.0), seed=1)
    runs = [list(make_loader(dataset, micro_batches(2, 5, 4, 2), workers)) for workers in (0, 2)]
    assert len(runs[0]) == len(runs[1]) == 6
    for numbers, first, second in zip(micro_batches(2, 5, 4, 2), *runs):
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert all(
            torch.equal(v, torch.stack([torch.as_tensor(dataset[n][k]) for n in numbers])) for k, v in first.items()
        )


def test_more_than_100_objects(tmp_path):
    """Oracle: counting. 100 of 130 objects are kept, drawn anew in each epoch, each with its own label and mask; the
    image is counted."""
    boxes = [[x, y, 9, 9] for y in range(0, 100, 10) for x in range(0, 130, 10)]
    root = write_coco(tmp_path, [boxes], size=(130, 100), names="abcd", change=masks_at_corners())
    a = load_annotations(root, masks=True)
    assert "1 with more than 100" in a.summary()
    dataset, drawn = TrainSet(a, 130, (1, 1), flip=False), []
    for n in range(20):
        sample = dataset[n]
        count = (sample["labels"] >= 0).sum().item()
        assert count == 100, f"of 130 objects sample {n} has {count}, wanted 100"
        objects = [round(x / 10) + 13 * round(y / 10) for x, y, *_ in sample["boxes"].tolist()]
        assert len(set(objects)) == 100, f"sample {n} has {len(set(objects))} different objects, wanted 100"
        for k, m in enumerate(objects if n < 2 else []):
            assert sample["labels"][k] == m % 4, f"sample {n}: object {m} has the label of another"
            share = wrong_cells(sample["masks"][k], a, m, 0, View(0, 0, 130, 100, 130, 100))
            assert share < 0.01, f"sample {n}: {share:.0%} of the mask of object {m} is not that object's"
        drawn.append(set(objects))
    assert drawn[0] != drawn[1], "the same 100 of 130 objects are kept in two epochs"
    never = sorted(set(range(130)).difference(*drawn))
    assert never == [], f"in 20 epochs the objects {never} of 130 were never kept"


def test_100_are_drawn_of_those_that_are_seen(tmp_path, monkeypatch):
    """Oracle: counting. Of 130 objects the window shows 70, which are all kept; or 120, of which 100 are."""
    boxes = [[x, y, 9, 9] for y in range(0, 100, 10) for x in range(0, 130, 10)]
    dataset = TrainSet(load_annotations(write_coco(tmp_path, [boxes], size=(130, 100))), 130, (1, 1))
    for right, wanted in ((70, 70), (120, 100)):
        fixed_view(monkeypatch, View(0, 0, right, 100, right, 100))
        for n in range(3):
            count = (dataset[n]["labels"] >= 0).sum().item()
            what = f"the window shows {right} of 130 objects, and {count} are kept, wanted {wanted}"
            assert count == wanted, what


def write_coco(root, boxes, size=(64, 48), change=None, split=TRAIN, names=("thing",)):
    """A COCO folder with one image per list of boxes; `change` edits the json's content before it is written."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, objects = [], []
    for i, rows in enumerate(boxes):
        Image.new("RGB", size, (90, 20 * i % 255, 40)).save(root / split / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]})
        for k, box in enumerate(rows):
            category = k % len(names) + 1
            objects.append({"id": len(objects), "image_id": i, "category_id": category, "bbox": box})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    content = {"images": images, "annotations": objects, "categories": categories}
    content = change(content) or content if change else content
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def test_what_is_merely_unusual_is_kept(tmp_path):
    """Oracle: by hand. Ids of 0; no area, iscrowd or segmentation; a box a little outside; no objects."""
    root = write_coco(tmp_path, [[[-0.5, -1, 30, 20], [50, 30, 16, 20]], []], names=("a", "b"))
    a = load_annotations(root)
    assert a.area.tolist() == [600, 320] and not a.crowd.any() and a.labels.tolist() == [0, 1]
    assert a.objects(0)[0].tolist() == [[0, 0, 29.5, 19], [50, 30, 64, 48]]
    sample = TrainSet(a, 128, (1, 1), flip=False)
    assert sorted((sample[n]["labels"] >= 0).sum().item() for n in (0, 1)) == [0, 2]
    none = load_annotations(write_coco(tmp_path / "none", [[], []]))
    assert "0 objects" in none.summary() and none.boxes.shape == (0, 4)


def test_an_image_of_crowds_only(tmp_path):
    """Oracle: by hand. Crowds are never targets: an image that has nothing else is a negative."""

    def all_crowds(content):
        for o in content["annotations"]:
            o["iscrowd"] = 1

    a = load_annotations(write_coco(tmp_path, [[[1, 2, 30, 20]] * 3], change=all_crowds))
    assert (
        a.crowd.all() and "0 objects of 1 classes, 3 crowds (never positive), 1 images without objects" in a.summary()
    )
    assert (TrainSet(a, 128, (1, 1))[0]["labels"] == -1).all()


def test_300_classes(tmp_path):
    """Oracle: by hand. Labels are contiguous in the order of the original ids."""
    root = write_coco(tmp_path, [[[1, 2, 30, 20]] * 300], names=[f"c{k}" for k in range(300)])
    assert load_annotations(root).labels.tolist() == list(range(300))


def png(path, image, **options):
    image.save(path, **options)
    return path


def test_every_kind_of_image_becomes_rgb(tmp_path):
    """Oracle: PIL's own pixel values. Grey, palette, alpha, CMYK, 16 bits; EXIF's rotation is ignored."""
    grey = Image.fromarray(np.full((6, 9), 100, np.uint8))
    wide = Image.fromarray(np.full((6, 9), 100 * 256 + 7, np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    files = {
        "grey": png(tmp_path / "g.png", grey),
        "palette": png(tmp_path / "p.png", grey.convert("RGB").quantize(4)),
        "alpha": png(tmp_path / "a.png", grey.convert("RGBA")),
        "cmyk": png(tmp_path / "c.jpg", grey.convert("CMYK")),
        "16 bits": png(tmp_path / "w.png", wide),
        "grey jpeg": png(tmp_path / "g.jpg", grey),
        "exif": png(tmp_path / "e.jpg", grey.convert("RGB"), exif=exif),
        "1-bit": png(tmp_path / "b.png", grey.convert("1")),
    }
    for name, path in files.items():
        image = read_image(path, "")
        assert image.mode == "RGB" and image.size == (9, 6), name
        if name != "1-bit":
            assert np.abs(np.asarray(image).astype(int) - 100).max() <= 2, name


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 truncated"])
def test_a_bad_image_is_named(content, tmp_path, capsys):
    """Oracle: by hand. The sentence names file and image id, from a worker, too; --check finds it."""
    root = write_coco(tmp_path, [[[1, 2, 30, 20]]] * 3)
    (root / TRAIN / "1.png").write_bytes(content)
    a = load_annotations(root)
    dataset = TrainSet(a, 128, (1, 1))
    bad = next(n for n in range(3) if dataset.image_of(n)[1] == 1)
    with pytest.raises(UserError, match=r"cannot decode .*1\.png \(image id 1\)"):
        dataset[bad]
    with pytest.raises(SystemExit):
        look.main(["--data", str(tmp_path), "--check"])
    assert "1.png (image id 1)" in (out := capsys.readouterr().out) and "1 of 3 images are bad" in out
    if not content:  # once: torch waits 5 seconds for a worker that raised
        with pytest.raises(UserError) as error:
            list(make_loader(dataset, [[bad]], 1))
        assert "image id 1" in str(error.value).rpartition("UserError: ")[2]


def test_a_truncated_photo_is_named(coco_sample, tmp_path):
    """Oracle: by hand. Half of a real JPEG is an error, not a half-grey image."""
    a = load_annotations(coco_sample)
    half = tmp_path / "half.jpg"
    content = open(a.path(0), "rb").read()
    half.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot decode .*half.jpg"):
        read_image(half, "image id 1")


@pytest.mark.parametrize("size", [(1, 1), (10000, 50), (50, 10000), (3, 700)])
def test_extreme_shapes(size, tmp_path):
    """Oracle: by hand. Images of any shape give whole samples and boxes inside them."""
    root = write_coco(tmp_path, [[[0, 0, size[0], size[1]]]], size=size)
    dataset = TrainSet(load_annotations(root), 128, (0.1, 2.0))
    for n in range(20):
        sample = dataset[n]
        assert sample["image"].shape == (3, 128, 128), f"sample {n}: image {tuple(sample['image'].shape)}"
        boxes = sample["boxes"]
        inside = boxes.isfinite().all() and 0 <= boxes.min() and boxes.max() <= 128
        assert inside, f"sample {n}: box {boxes[0].tolist()} is not in 128 x 128"


def test_shapes_is_what_its_table_says(shapes):
    """Oracle: pycocotools' own decoding, against the ranges of SHAPES and of the README."""
    for split, count in ((TRAIN, 60), (VAL, 24)):
        coco = index(shapes, split)
        assert len(coco.imgs) == count and sorted(coco.cats) == list(SHAPES["classes"]) == [1, 2, 4, 5, 9, 12]
        overlapping = 0
        kinds = set()
        for image_id, info in coco.imgs.items():
            sides = info["width"], info["height"]
            objects = [o for o in coco.imgToAnns[image_id] if not o["iscrowd"]]
            assert 160 <= min(sides) and max(sides) <= 256 and 1 <= len(objects) <= 6
            assert Image.open(shapes / split / info["file_name"]).size == sides
            for o in coco.imgToAnns[image_id]:
                mask = coco.annToMask(o)
                kinds.add((type(o["segmentation"]), o["iscrowd"]))
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                if isinstance(o["segmentation"], list):  # rasterizing may lose a thin tip
                    points = np.reshape(o["segmentation"], (-1, 2))
                    tight = [*points.min(0), *points.max(0)]
                x, y, w, h = o["bbox"]
                assert mask.sum() == o["area"] > 0
                assert [x, y, x + w, y + h] == pytest.approx(tight, abs=0.02)
                longer = max(w, h) / min(sides)
                assert longer <= 0.86 and (longer >= 0.19 or isinstance(o["segmentation"], dict))
            boxes = np.array([o["bbox"] for o in objects])
            low, high = boxes[:, None, :2], (boxes[:, :2] + boxes[:, 2:])[:, None]
            both = (np.minimum(high, high.swapaxes(0, 1)) > np.maximum(low, low.swapaxes(0, 1))).all(-1)
            overlapping += both.sum() > len(boxes)
        assert overlapping >= 0.15 * count
        assert kinds == {(list, 0), (dict, 0), (dict, 1)}
        assert len({(i["width"] / i["height"] > 1) for i in coco.imgs.values()}) == 2


def test_shapes_is_deterministic(shapes, tmp_path, monkeypatch):
    """Oracle: a second writing. Every file is the same to the byte; a third call writes nothing."""
    monkeypatch.setitem(SHAPES, "images", {TRAIN: 60, VAL: 24})
    write_shapes(tmp_path / "again")
    files = sorted(p.relative_to(shapes) for p in shapes.rglob("*") if p.is_file())
    assert len(files) == 60 + 24 + 2
    assert all((shapes / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    marker = tmp_path / "again" / TRAIN / "marker"
    marker.touch()
    write_shapes(tmp_path / "again")
    assert marker.exists()


def test_shapes_by_name(tmp_path, monkeypatch, capsys):
    """Oracle: a set written by hand. The name `shapes` is data/shapes here, written on first use; any other is a
    folder, and nothing is written."""
    monkeypatch.setitem(SHAPES, "images", {TRAIN: 3, VAL: 2})
    write_shapes(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    assert str(resolve_root("elsewhere")) == "elsewhere" and not os.path.exists("elsewhere")
    for said in ("writing the generated shapes to data/shapes\n", ""):
        capsys.readouterr()
        root = resolve_root("shapes")
        assert str(root) == "data/shapes" and capsys.readouterr().out == said
        first, second = (load_annotations(where, VAL, masks=True) for where in (root, "own"))
        assert same(first._replace(folder=""), second._replace(folder="")) and len(first.ids) == 2


def test_command_line(shapes, tmp_path, capsys):
    """Oracle: by hand. --show writes pictures, --check finds a bad file and exits with 2."""
    look.main(["--data", str(shapes), "--show", "3", "--size", "256", "--out", str(tmp_path / "show")])
    assert sorted(p.name for p in (tmp_path / "show").iterdir()) == ["000.png", "001.png", "002.png"]
    picture = np.asarray(Image.open(tmp_path / "show" / "000.png"))
    assert picture.shape == (256, 256, 3) and picture.std() > 10
    shutil.copytree(shapes, tmp_path / "bad")
    victim = next((tmp_path / "bad" / TRAIN).iterdir())
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(SystemExit) as stop:
        look.main(["--data", str(tmp_path / "bad"), "--check"])
    assert stop.value.code == 2
    assert victim.name in (out := capsys.readouterr().out) and "1 of 60 images are bad" in out
