"""A data set of one's own, from a checkpoint of another to predictions: the README's recipe."""

import json

import pytest
from PIL import Image

import evaluate
import look
import train
from data import TRAIN, VAL, split_paths
from model import load_checkpoint


@pytest.fixture
def mine(shapes, tmp_path):
    """3 classes of other names and ids, 20 images of each split, in COCO's layout."""
    root = tmp_path / "mine"
    kept = {1: (7, "coin"), 2: (3, "stamp"), 9: (11, "bandage")}
    (root / "annotations").mkdir(parents=True)
    for split in (TRAIN, VAL):
        path = split_paths(shapes, split)[0]
        content = json.loads(path.read_text())
        content["images"] = content["images"][:20]
        ids = {image["id"] for image in content["images"]}
        objects = [o for o in content["annotations"] if o["image_id"] in ids and o["category_id"] in kept]
        content["annotations"] = [o | {"category_id": kept[o["category_id"]][0]} for o in objects]
        content["categories"] = [{"id": k, "name": name} for k, name in kept.values()]
        split_paths(root, split)[0].write_text(json.dumps(content))
        (root / split).mkdir()
        for image in content["images"]:
            (root / split / image["file_name"]).symlink_to(shapes / split / image["file_name"])
    return root


def test_own_data_from_start_to_end(run, mine, tmp_path, capsys):
    """Oracle: by hand. From 6 classes to 3 others: the class layers are new and named, all else is taken; evaluation
    and prediction speak of the new names and ids."""
    look.main(["--data", str(mine), "--check"])
    assert "20 images" in (out := capsys.readouterr().out) and "of 3 classes" in out
    flags = "--arch tiny --size 128 --protocol toy --device cpu --workers 0 --batch-size 4 --epochs 2".split()
    out = tmp_path / "out"
    train.main([*flags, "--data", str(mine), "--weights", str(run / "best.pt"), "--out", str(out)])
    said = capsys.readouterr().out
    assert "new: ['head.class_predict.weight', 'head.class_predict.bias']" in said and "evaluated 20/20" in said
    categories = load_checkpoint(out / "best.pt")["categories"]
    assert categories == [[3, "stamp"], [7, "coin"], [11, "bandage"]]

    evaluate.main(["--weights", str(out / "best.pt"), "--data", str(mine), "--per-class", "--workers", "0"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("stamp", "coin", "bandage")) and "evaluated 20/20" in said
    photo = next((mine / VAL).iterdir())
    flags = ["--weights", str(out / "best.pt"), "--images", str(photo), "--out", str(tmp_path / "seen"), "--score", "0"]
    evaluate.main(flags)
    assert Image.open(tmp_path / "seen" / f"{photo.name}.png").size == Image.open(photo).size
    found = json.loads((tmp_path / "seen" / "predictions.json").read_text())
    assert {(row["category_id"], row["category"]) for row in found} <= {(3, "stamp"), (7, "coin"), (11, "bandage")}
