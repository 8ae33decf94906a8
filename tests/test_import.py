"""Is a released checkpoint of the authors' read right? tests/official has two small ones, written by their code and by
TensorFlow's Saver after a real step of training, with the outputs that their code has for them."""

import json
import math
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import import_official
import make_shapes
import numpy as np
import pytest
import torch
from import_official import CATEGORIES, OUTPUTS, RELEASED

import evaluate
import heads
import model
import train
from data import TRAIN, VAL
from model import ARCHS, LEVELS, UserError, load_checkpoint

OFFICIAL = Path(__file__).parent / "official"
SMALL = replace(ARCHS["49"], filter_scale=0.0625, endpoint_channels=8)
SMALLS = {
    "retinanet": replace(SMALL, head_channels=8, head_convs=2),
    "mask_rcnn": replace(SMALL, rcnn_channels=8, rcnn_fc_channels=32),
}
EPSILONS = {"retinanet": 1e-4, "mask_rcnn": 1e-3}
WIDE_49S = replace(ARCHS["49S"], endpoint_channels=256)  # as it was released

tensorflow = pytest.mark.tensorflow


def layout(head, arch):
    """[(name, bytes)] of a training checkpoint's variables, sorted as its files have them."""
    files = [("global_step", 8)]
    for own, (name, shape) in import_official.variables(head, arch).items():
        trained = [] if "running" in own else [(f"{name}/Momentum", 4 * math.prod(shape))]
        files += [(name, 4 * math.prod(shape)), *trained]
    return sorted(files)


@pytest.mark.parametrize(
    "head, arch, with_slots, without, size",
    [
        ("retinanet", "49", 1321, 831, 228_783_808),
        ("retinanet", "96", 1697, 1066, 344_371_904),
        ("mask_rcnn", "49", 1195, 743, 326_419_856),
        ("mask_rcnn", "190", 2383, 1484, 1_346_799_824),
    ],
)
def test_the_variables_of_the_released_files(head, arch, with_slots, without, size):
    """Oracle: the authors' graph, whose variables were counted and their bytes summed. Those that are asked for, their
    momenta and the step are as many and as large."""
    files = layout(head, ARCHS[arch])
    assert (len(files), sum(bytes for _, bytes in files)) == (with_slots, size)
    assert len([name for name, _ in files if not name.endswith("/Momentum")]) == without


@pytest.mark.parametrize(
    "arch, first",
    [
        ("143", "spinenet/sub_policy7/resample_with_alpha_resample_7_1/conv2d_1/kernel"),
        ("190", "spinenet/sub_policy12/resample_with_alpha_resample_12_0/conv2d_1/kernel"),
    ],
)
def test_where_two_released_files_were_once_cut(arch, first):
    """Oracle: users of the Mask R-CNN files that were uploaded with 536,870,913 bytes: the first variable that they
    could not read (tensorflow/tpu, issue 775). It is the one that the sorted variables put across that byte."""
    end = 0
    for name, size in layout("mask_rcnn", ARCHS[arch]):
        end += size
        if end > 536_870_913:
            break
    assert name == first


@pytest.mark.parametrize("head, name", RELEASED)
def test_a_released_network_is_found(head, name):
    """Oracle: ARCHS. From the shapes of a released file's variables come its head, its row and its Arch."""
    row = name.split("-")[1]
    arch = WIDE_49S if row == "49S" else ARCHS[row]
    shapes = dict(import_official.variables(head, arch).values())
    assert import_official.find_network(shapes) == (head, row, arch)
    size, protocol, published = RELEASED[head, name]
    assert any(row[:3] == (head, name.split("-")[1], size) for row in model.PUBLISHED)
    assert train.PROTOCOLS[protocol]["activation"] == ("swish" if "best" in name or row == "190" else "relu")
    assert 39 < float(published.split()[0]) < 53


def test_the_categories(coco_sample):
    """Oracle: COCO's own json."""
    categories = json.loads((coco_sample / "annotations" / "instances_train2017.json").read_text())["categories"]
    assert CATEGORIES == [[c["id"], c["name"]] for c in categories] and len(CATEGORIES) == 80


@pytest.mark.parametrize("head, anchors, each", [("retinanet", 9, 1), ("mask_rcnn", 1, 1), ("mask_rcnn", 1, 4)])
def test_classes_land_in_their_places(head, anchors, each):
    """Oracle: by hand. Of outputs that each hold their own category id, the k-th category's holds its id."""
    ids = torch.arange(OUTPUTS).repeat_interleave(each).repeat(anchors)
    kept = import_official.of_coco(ids, head).view(anchors, -1, each)
    background = [0] if head == "mask_rcnn" else []
    expected = torch.tensor([*background, *(number for number, _ in CATEGORIES)])
    assert torch.equal(kept, expected[None, :, None].expand_as(kept))


def written(folder, shapes):
    """A folder in place of a checkpoint, and a function to be put in place of TensorFlow's reader of it."""
    folder.mkdir(exist_ok=True)
    (folder / "model.ckpt.index").touch()

    def read_checkpoint(prefix):
        return dict(shapes), lambda name: torch.zeros(shapes[name])

    return folder, read_checkpoint


@pytest.mark.parametrize(
    "name, change, flags, sentence",
    [
        ("x", {"spinenet/conv2d_9/kernel": None}, [], "lacks a SpineNet of these widths: 1 variables, as spinenet"),
        ("x", {"spinenet/other": [3]}, [], "has more than a SpineNet of these widths: 1 variables, as spinenet/other"),
        ("x", {"spinenet/conv2d_1/kernel": [1, 1, 64, 17]}, [], r"another shape.* spinenet/conv2d_1/kernel is"),
        ("x", None, [], "is no RetinaNet or Mask R-CNN with SpineNet: its variables are of fpn, resnet50, retinanet"),
        ("x", {"spinenet/sub_policy1/scale_permuted_block_3/conv2d/kernel": None}, [], "are not those of a SpineNet"),
        ("x", {}, [], "is not a released file's name for RetinaNet; say --size, and --protocol B"),
        ("spinenet-49", {}, [], "is not what its name, spinenet-49, says: its shapes are of no row of ARCHS"),
        ("x", {}, ["--arch", "96"], "is not what --arch 96 says"),
        ("x", {}, ["--size", "100", "--protocol", "B"], "--size is 100, but must be a multiple of 128"),
        ("x", {}, ["--epsilon", "0"], "--epsilon is 0.0, but must be between 0 and 1"),
    ],
)
def test_another_file_is_refused(name, change, flags, sentence, tmp_path, monkeypatch):
    """Oracle: by hand. What is wrong is said in one sentence, and nothing is written."""
    shapes = dict(import_official.variables("retinanet", SMALLS["retinanet"]).values()) | {"global_step": []}
    if change is None:
        shapes = dict.fromkeys(("resnet50/conv2d/kernel", "fpn/l3/kernel", "retinanet/class_net/class-0/bias"), [1])
    shapes |= change or {}
    folder, reader = written(tmp_path / name, {name: shape for name, shape in shapes.items() if shape is not None})
    monkeypatch.setattr(import_official, "read_checkpoint", reader)
    with pytest.raises(UserError, match=sentence):
        import_official.main([str(folder), "--out", str(tmp_path / "out.pt"), *flags])
    assert not (tmp_path / "out.pt").exists()


def test_what_is_no_checkpoint(tmp_path, monkeypatch):
    """Oracle: by hand. No such file, an archive cut short or of something else, folders of none and of two."""
    archive = tmp_path / "spinenet-49.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(OFFICIAL / "mask_rcnn" / "model.ckpt.data-00000-of-00001", "spinenet-49/model.ckpt.data-00000-of-00001")
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[:500_000])
    (tmp_path / "text.tar.gz").write_text("<html>not found</html>")
    (tmp_path / "none").mkdir()
    for path, sentence in (
        (tmp_path / "nothing", "no checkpoint at .*nothing: give a released tar.gz"),
        (tmp_path / "cut.tar.gz", "cut.tar.gz can't be unpacked .* cut short; download it again"),
        (tmp_path / "text.tar.gz", "text.tar.gz can't be unpacked"),
        (archive, "holds 0 checkpoints"),
        (tmp_path / "none", "holds 0 checkpoints"),
        (OFFICIAL / "retinanet", r"holds 2 checkpoints .*'model.ckpt.index', 'snappy.ckpt.index'\]; name one"),
    ):
        with pytest.raises(UserError, match=sentence):
            import_official.main([str(path), "--out", str(tmp_path / "out.pt")])
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"pip install tensorflow-cpu \(207 MB\)"):
        import_official.main([str(OFFICIAL / "retinanet" / "model.ckpt"), "--out", str(tmp_path / "out.pt")])


def files_of(head, folder):
    """The files of a small checkpoint under both of its indexes, plain and compressed with Snappy."""
    folder.mkdir(exist_ok=True)
    for kind in ("model", "snappy"):
        shutil.copy(OFFICIAL / head / f"{kind}.ckpt.index", folder)
        data = OFFICIAL / head / "model.ckpt.data-00000-of-00001"
        shutil.copy(data, folder / f"{kind}.ckpt.data-00000-of-00001")
    return folder


@tensorflow
@pytest.mark.parametrize("kind", ["model", "snappy"])
@pytest.mark.parametrize("head", SMALLS)
def test_outputs_equal_the_authors(head, kind, tmp_path, monkeypatch):
    """Oracle: the authors' code on the same checkpoint (outputs.npz). Every output of every head agrees to 1e-5, on a
    model that was full of NaN before; each variable is read once. With another epsilon than the file's they don't."""
    asked, make_parts, read_checkpoint = [], train.make_parts, import_official.read_checkpoint

    def poisoned(recipe, *others):
        parts = make_parts(recipe | {"categories": None}, *others)
        for value in parts["model"].state_dict().values():
            if value.is_floating_point():
                value.fill_(math.nan)
        return parts

    def counted(prefix):
        shapes, read = read_checkpoint(prefix)
        return shapes, lambda name: (asked.append(name), read(name))[1]

    monkeypatch.setattr(train, "make_parts", poisoned)
    monkeypatch.setattr(import_official, "read_checkpoint", counted)
    prefix = files_of(head, tmp_path / head) / f"{kind}.ckpt"
    parts, state, said = import_official.import_checkpoint(prefix, 128, "B", EPSILONS[head])
    assert model.Arch.of(state["recipe"]["network"]) == SMALLS[head] and f"{len(asked)} variables taken" in said
    assert len(asked) == len(set(asked)) == 742
    detector = parts["model"].eval()
    assert all(value.isfinite().all() for value in detector.state_dict().values())

    golden = np.load(OFFICIAL / head / "outputs.npz")
    x = torch.from_numpy(np.load(OFFICIAL / "retinanet" / "outputs.npz")["x"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        pairs = compared(detector, x, {name: torch.from_numpy(golden[name]) for name in golden.files})
    differences = {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}
    print(head, kind, {name: f"{value:.1e}" for name, value in differences.items()})
    assert max(differences.values()) < 1e-5, differences
    assert all(theirs.abs().max() > 0.01 for _, theirs in pairs.values())
    other = import_official.import_checkpoint(prefix, 128, "B", 1e-3 + 1e-4 - EPSILONS[head])[0]["model"].eval()
    with torch.no_grad():
        assert (other.backbone(x)[0] - detector.backbone(x)[0]).abs().max() > 1e-4


def compared(detector, x, golden):
    """{output: (ours, the authors' in our layout)} of a detector; of 91 classes those of COCO."""
    features = detector.backbone(x)
    pairs = {f"P{L}": (ours.permute(0, 2, 3, 1), golden[f"features_{L}"]) for L, ours in zip(LEVELS, features)}
    ids = [number for number, _ in CATEGORIES]
    to_xy = [1, 0, 3, 2]
    if not detector.masks:
        (logits, codes), start = detector.head(features), 0
        for L, feature in zip(LEVELS, features):
            h, w = feature.shape[2:]
            own = slice(start, start + h * w * 9)
            start += h * w * 9
            thinned = {3: (slice(None, None, 8), slice(None, None, 4)), 4: (slice(None, None, 4), slice(None, None, 2))}
            rows, columns = thinned.get(L, (slice(None), slice(None)))  # as the file has it, to be small
            theirs = golden[f"cls_outputs_{L}"].unflatten(3, (9, OUTPUTS))[..., ids]
            pairs[f"class {L}"] = logits[:, own].view(1, h, w, 9, 80)[:, rows, columns], theirs
            theirs = golden[f"box_outputs_{L}"].unflatten(3, (9, 4))[..., to_xy]
            pairs[f"box {L}"] = codes[:, own].view(1, h, w, 9, 4), theirs
        return pairs
    for L, logits, codes in zip(LEVELS, *detector.rpn(features)):
        pairs[f"objectness {L}"] = logits.flatten(), golden[f"rpn_score_outputs_{L}"].flatten()
        theirs = golden[f"rpn_box_outputs_{L}"].unflatten(3, (3, 4))[..., to_xy]
        pairs[f"RPN box {L}"] = codes.flatten(), theirs.flatten()
    pyramid = heads.pack_pyramid(features)
    small, large = (golden[f"roi_features_{side}"][0].permute(0, 3, 1, 2) for side in (7, 14))
    for side, theirs in ((7, small), (14, large)):
        pairs[f"RoIs {side}"] = heads.roi_features(pyramid, golden[f"rois_{side}"][..., to_xy], side), theirs
    logits, codes = detector.box_head(small)
    pairs["RoI class"] = logits, golden["class_outputs"][0][:, [0, *ids]]
    pairs["RoI box"] = codes, golden["box_outputs"][0].unflatten(1, (OUTPUTS, 4))[:, [0, *ids]][..., to_xy]
    known = [i for i, k in enumerate(golden["mask_classes"][0].tolist()) if k in ids]
    places = [1 + ids.index(golden["mask_classes"][0, i].item()) for i in known]
    pairs["mask"] = detector.mask_head(large)[known, places], golden["mask_logits"][0][known]
    assert known
    return pairs


@tensorflow
def test_a_file_cut_short(tmp_path):
    """Oracle: by hand. A data file that lacks its second half is a sentence that says which variable can't be read."""
    prefix = files_of("retinanet", tmp_path / "files") / "model.ckpt"
    data = Path(f"{prefix}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(UserError, match="can't be read .*spinenet/.* cut short: download it again"):
        import_official.main([str(prefix), "--out", str(tmp_path / "out.pt"), "--size", "128", "--protocol", "B"])
    Path(f"{prefix}.index").write_bytes(b"no table")
    with pytest.raises(UserError, match="can't be read"):
        import_official.main([str(prefix), "--out", str(tmp_path / "out.pt"), "--size", "128", "--protocol", "B"])


@tensorflow
@pytest.mark.parametrize("head", SMALLS)
def test_from_the_archive_to_another_data_set(head, coco_sample, tmp_path, capsys):
    """Oracle: pycocotools and the files. A tar.gz is imported; the checkpoint predicts, is evaluated on COCO's images,
    and a set of other classes is trained from it, all but the class layers taken."""
    archive, out = tmp_path / "mine.tar.gz", tmp_path / "imported.pt"
    with tarfile.open(archive, "w:gz") as tar:
        for kind in ("index", "data-00000-of-00001"):
            tar.add(OFFICIAL / head / f"model.ckpt.{kind}", f"mine/model.ckpt.{kind}")
    import_official.main([str(archive), "--out", str(out), "--size", "128", "--protocol", "B"])
    said = capsys.readouterr().out
    assert "SpineNet-?, endpoints 8 wide" in said and "742 variables taken" in said and f"wrote {out}" in said
    checkpoint = load_checkpoint(out)
    assert checkpoint["categories"] == CATEGORIES and checkpoint["recipe"]["size"] == 128

    common = ["--weights", str(out), "--device", "cpu"]
    image = sorted((coco_sample / TRAIN).iterdir())[0]
    evaluate.main([*common, "--images", str(image), "--out", str(tmp_path / "seen"), "--score", "0.0"])
    rows = json.loads((tmp_path / "seen" / "predictions.json").read_text())
    assert rows and {row["category"] for row in rows} <= {name for _, name in CATEGORIES}
    options = ["--data", str(coco_sample), "--split", TRAIN, "--limit", "4", "--workers", "0"]
    evaluate.main([*common, *options, "--out", str(tmp_path)])
    assert "evaluated 4/4 images" in capsys.readouterr().out
    ids = {row["category_id"] for row in json.loads((tmp_path / "results.json").read_text())}
    assert ids and ids <= {number for number, _ in CATEGORIES}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(make_shapes.SHAPES, "images", {TRAIN: 6, VAL: 2})
        make_shapes.write_shapes(tmp_path / "shapes")
    flags = ["--arch", "49", "--size", "128", "--protocol", "B", "--head", head, "--data", str(tmp_path / "shapes")]
    flags += ["--weights", str(out), "--overfit", "2", "--epochs", "1", "--workers", "0", "--device", "cpu"]
    train.main([*flags, "--micro-batch", "2", "--out", str(tmp_path / "run")], SMALLS[head])
    said = capsys.readouterr().out
    new = 2 if head == "retinanet" else 6
    total = len(checkpoint["model"])
    assert f"weights: {total - new} of {total} tensors from {out}" in said and "step 1 after" in said
