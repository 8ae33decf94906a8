"""Cuts an assignment from the solution: functions lose their bodies and keep their signatures and docstrings.

python tools/make_assignment.py a3 --out DIR        then, in DIR: python -m pytest -m a3

The docstring is the problem statement (a method's may be its class's); the tests of ASSIGNMENTS are the grader.
"""

import argparse
import ast
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    *("*.py", "*.txt", "*.toml", "*.md", ".gitignore", "LICENSE", "CITATION.cff"),
    *("tools/*.py", "tests/*.py", "tests/*.npz", "docs/*"),
)


class Assignment(NamedTuple):
    """What one assignment is about, the functions that are blanked, and the tests that grade it."""

    title: str
    functions: tuple  # module.function or module.Class.method
    tests: tuple  # names; with [parameters], only that case


ASSIGNMENTS = {
    "a1": Assignment(
        "Blocks and resampling",
        (
            "blocks.drop_block",
            "blocks.ConvBN.forward",
            "blocks.ResidualBase.forward",
            "blocks.Resample.forward",
            "blocks.max_pool_same",
            "blocks.init_conv_",
        ),
        (
            "test_conv_bn_by_hand",
            "test_a_block_by_hand",
            "test_resample_by_hand",
            "test_resample_shapes",
            "test_max_pool_pads_as_tensorflow",
            "test_drop_block",
            "test_initializer",
        ),
    ),
    "a2": Assignment(
        "The scale-permuted network",
        ("model.Arch.width", "model.SpineNet.forward", "model.Normalize.forward", "model.check_size"),
        (
            "test_features_equal_the_official_code",
            "test_feature_shapes",
            "test_backbone_parameters",
            "test_other_sizes_are_refused",
            "test_padding_normalizes_to_zero",
            "test_unresampled_parent_follows_the_rule",
        ),
    ),
    "a3": Assignment(
        "Anchors, boxes, matching",
        ("heads.make_anchors", "heads.encode_boxes", "heads.decode_boxes", "heads.clip_boxes", "loss.match_anchors"),
        (
            "test_anchors_equal_the_official_code",
            "test_anchors_of_a_non_square_image",
            "test_encode_and_decode_are_inverse",
            "test_encode_by_hand",
            "test_clipping",
            "test_matching_of_random_boxes",
            "test_matching_ties_and_claims",
            "test_matching_of_any_number_of_boxes",
            "test_anchors_between_the_thresholds_are_ignored",
        ),
    ),
    "a4": Assignment(
        "Focal loss and RetinaNet's head",
        (
            "heads.Tower.forward",
            "heads.RetinaNetHead.forward",
            "heads.per_anchor",
            "heads.detect",
            "loss.focal_loss",
            "loss.retinanet_loss",
        ),
        (
            "test_features_and_head_equal_the_official_code",
            "test_focal_loss_and_its_gradient",
            "test_focal_loss_of_extreme_logits",
            "test_focal_loss_saves_little",
            "test_background_only",
            "test_huber_by_hand",
            "test_targets_and_losses_equal_the_official_code",
            "test_detections_by_hand",
            "test_detections_of_random_outputs",
        ),
    ),
    "a5": Assignment(
        "Data and augmentation",
        (
            "data.Annotations.objects",
            "data.View.boxes",
            "data.View.image",
            "data.full_view",
            "data.draw_view",
            "data.TrainSet.image_of",
            "data.TrainSet.__getitem__",
        ),
        (
            "test_window_by_the_official_rule",
            "test_boxes_follow_the_pixels",
            "test_a_sample_of_shapes",
            "test_an_epoch_sees_every_image_once",
            "test_more_than_100_objects",
            "test_a_sliver_is_no_object",
            "test_extreme_shapes",
            "test_what_is_merely_unusual_is_kept",
        ),
    ),
    "a6": Assignment(
        "The recipe, the step, several processes",
        (
            "train.schedule",
            "train.lr_at",
            "train.make_optimizer",
            "train.train_step",
            "train.read_step",
            "data.micro_batches",
        ),
        (
            "test_learning_rate_of_the_official_schedule",
            "test_learning_rate_of_other_batches_and_short_runs",
            "test_weight_decay_groups",
            "test_global_batches_do_not_depend_on_the_hardware",
            "test_noise_depends_on_seed_step_and_micro_step",
            "test_all_ranks_see_one_rank_stop_or_diverge",
            "test_two_processes_equal_one[1-None-retinanet]",
            "test_two_processes_equal_one[2-None-retinanet]",
        ),
    ),
    "a7": Assignment(
        "Mask R-CNN",
        (
            "heads.RPNHead.forward",
            "heads.BoxHead.forward",
            "heads.MaskHead.forward",
            "heads.propose",
            "heads.roi_levels",
            "heads.roi_features",
            "loss.pick",
            "loss.rpn_loss",
            "loss.sample_rois",
            "loss.box_head_loss",
            "loss.mask_targets",
            "loss.mask_loss",
        ),
        (
            "test_two_stage_heads_equal_the_official_code",
            "test_roi_levels",
            "test_roi_features_equal_torchvision_level_by_level",
            "test_roi_features_sample_the_centre_of_each_cell",
            "test_proposals_equal_a_plain_loop",
            "test_proposals_by_hand",
            "test_pick",
            "test_noise_decides_what_is_sampled",
            "test_few_anchors_are_divided_as_256",
            "test_two_processes_equal_one[1-None-mask_rcnn]",
            "test_rpn_loss_equals_a_plain_loop",
            "test_rpn_samples_at_most_half_positive",
            "test_roi_sampling",
            "test_few_or_no_proposals",
            "test_box_head_loss_by_hand",
            "test_mask_targets_equal_torchvision",
            "test_mask_targets_of_the_object_itself",
            "test_mask_loss_by_hand",
        ),
    ),
}


def find(source, qualified):
    """The ast node of a function or Class.method in a module's source."""
    node = ast.parse(source)
    for name in qualified.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == name)
    return node


def extent(source, qualified):
    """(first line, last line, indent) of a function's body without its docstring; lines from 0, the last out."""
    node = find(source, qualified)
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        raise ValueError(f"{qualified} has no body but its docstring")
    return body[0].lineno - 1, node.end_lineno, " " * body[0].col_offset


def body_of(source, qualified):
    """The lines of that body."""
    first, last, _ = extent(source, qualified)
    return source.splitlines()[first:last]


def blank(source, qualified, message):
    """The source with that body replaced by a NotImplementedError."""
    first, last, indent = extent(source, qualified)
    lines = source.splitlines(keepends=True)
    lines[first:last] = [f'{indent}raise NotImplementedError("{message}")\n']
    return "".join(lines)


def cut(name, out, functions=None):
    """Write the project to the folder `out` with the assignment's functions (or only these of it) blanked."""
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            target = out / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for function in ASSIGNMENTS[name].functions if functions is None else functions:
        module, qualified = function.split(".", 1)
        path = out / f"{module}.py"
        path.write_text(blank(path.read_text(), qualified, f"{name}: {function}"))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write a copy of the project with an assignment's functions blanked.")
    parser.add_argument("name", choices=ASSIGNMENTS)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()):
        print(f"error: {args.out} is not empty; give a new folder", file=sys.stderr)
        raise SystemExit(2)
    cut(args.name, args.out)
    print(f"{args.name}, {ASSIGNMENTS[args.name].title}: in {args.out}, write the bodies of")
    for function in ASSIGNMENTS[args.name].functions:
        module, qualified = function.split(".", 1)
        print(f"  {module}.py: {qualified}")
    print(f"and run there: python -m pytest -m {args.name}")


if __name__ == "__main__":
    main()
