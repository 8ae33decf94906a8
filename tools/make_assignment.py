"""Cuts assignments from the solution, grades what students made of them, and proves that the grader grades.

python tools/make_assignment.py a3 --out DIR        a copy whose functions of a3 have no body; in DIR: pytest -m a3
python tools/make_assignment.py a4 --out DIR --keep OLD     with the functions that were solved in the copy OLD
python tools/make_assignment.py --grade DIR...      a line for each: tests passed, the first that failed
python tools/make_assignment.py [a3] --check-variants    the wrong and right bodies of tests/variants.py

The docstring is the problem statement (a method's may be its class's); the tests of ASSIGNMENTS are the grader.
"""

import argparse
import ast
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evaluate import one_sentence  # noqa: E402
from model import UserError  # noqa: E402

COPIED = (
    *("*.py", "*.txt", "*.toml", "*.md", ".gitignore", "LICENSE", "CITATION.cff"),
    *("tools/*.py", "tests/*.py", "tests/*.npz", "docs/*"),
)
NOT_COPIED = ("variants.py", "test_assignments.py")  # which show bodies, and test this file
NAME_FILE = "ASSIGNMENT"  # in a copy: which one it is


class Assignment(NamedTuple):
    """What one assignment is about, the functions that are blanked, and the tests that grade it."""

    title: str
    functions: tuple  # module.function or module.Class.method
    tests: tuple  # names; with [parameters], only that case
    removed: tuple = ()  # pairs (module, text): what is to be filled in besides bodies


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
            "test_drop_block_in_conv_bn",
            "test_a_block_by_hand",
            "test_stochastic_depth_by_hand",
            "test_drop_block_on_the_shortcut",
            "test_resample_by_hand",
            "test_resample_shapes",
            "test_max_pool_pads_as_tensorflow",
            "test_drop_block",
            "test_drop_block_is_off",
            "test_drop_block_of_everything",
            "test_drop_block_in_half_precision",
            "test_initializer",
        ),
    ),
    "a2": Assignment(
        "The scale-permuted network",
        (
            "model.Arch.width",
            "model.SpineNet.forward",
            "model.Normalize.forward",
            "model.check_size",
            "model.count",
        ),
        (
            "test_normalize_by_hand",
            "test_padding_normalizes_to_zero",
            "test_widths_by_hand",
            "test_other_sizes_are_refused",
            "test_right_sizes_are_taken",
            "test_the_network_is_its_table",
            "test_count_by_hand",
            "test_count_of_a_block_by_hand",
            "test_count_of_the_backbones",
            "test_backbone_parameters",
            "test_feature_shapes",
            "test_unresampled_parent_follows_the_rule",
            "test_features_equal_the_official_code",
        ),
        removed=(("model", ", as_is=(11,)"),),
    ),
    "a3": Assignment(
        "Anchors, boxes, matching",
        ("heads.make_anchors", "heads.encode_boxes", "heads.decode_boxes", "heads.clip_boxes", "loss.match_anchors"),
        (
            "test_anchors_by_hand",
            "test_anchors_equal_the_official_code",
            "test_anchors_of_one_scale",
            "test_encode_by_hand",
            "test_box_code_weights",
            "test_encode_and_decode_are_inverse",
            "test_decoding_half_precision_for_many_classes",
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
            "test_a_tower_by_hand",
            "test_outputs_per_anchor",
            "test_a_retinanet_head_by_hand",
            "test_last_layers_compute_in_float32[RetinaNetHead]",
            "test_features_and_head_equal_the_official_code",
            "test_focal_loss_by_hand",
            "test_focal_loss_and_its_gradient",
            "test_focal_loss_of_extreme_logits",
            "test_focal_loss_saves_little",
            "test_background_only",
            "test_huber_by_hand",
            "test_one_normalizer_for_the_batch",
            "test_the_normalizer_counts_over_all_ranks",
            "test_targets_and_losses_equal_the_official_code",
            "test_detections_by_hand",
            "test_what_suppresses_what",
            "test_at_most_100_detections_of_5000_candidates",
            "test_detections_of_random_outputs",
            "test_nothing_likely",
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
            "test_objects_by_hand",
            "test_boxes_of_a_view_by_hand",
            "test_pixels_of_a_view",
            "test_the_whole_image_by_hand",
            "test_the_scale_is_drawn_evenly",
            "test_the_window_is_drawn_evenly",
            "test_each_edge_of_the_window_is_rounded",
            "test_only_the_longer_side_is_cut",
            "test_views_come_from_the_generator",
            "test_a_view_has_pixels",
            "test_boxes_follow_the_pixels",
            "test_a_sample_of_shapes",
            "test_a_sample_by_hand",
            "test_a_file_of_another_size_is_refused",
            "test_each_sample_has_its_own_draws",
            "test_an_epoch_sees_every_image_once",
            "test_more_than_100_objects",
            "test_100_are_drawn_of_those_that_are_seen",
            "test_extreme_shapes",
            "test_masks_of_shapes",
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
            "test_corners_of_the_schedule",
            "test_weight_decay_groups",
            "test_steps_of_the_optimizer_by_hand",
            "test_a_step_by_hand",
            "test_a_step_that_overflows_is_skipped",
            "test_a_step_reads_nothing_back",
            "test_ranks_average_in_the_last_backward",
            "test_noise_depends_on_seed_step_and_micro_step",
            "test_what_one_rank_reads",
            "test_all_ranks_see_one_rank_stop_or_diverge",
            "test_global_batches_do_not_depend_on_the_hardware",
            "test_micro_batches_by_hand",
            "test_two_processes_equal_one[2-None-retinanet]",
        ),
    ),
    "a7": Assignment(
        "Mask R-CNN: proposals",
        (
            "heads.RPNHead.forward",
            "heads.propose",
            "loss.pick",
            "loss.rpn_loss",
            "loss.sample_rois",
        ),
        (
            "test_an_rpn_head_by_hand",
            "test_last_layers_compute_in_float32[RPNHead]",
            "test_rpn_head_equals_the_official_code",
            "test_proposals_by_hand",
            "test_proposals_equal_a_plain_loop",
            "test_at_most_1000_proposals",
            "test_pick",
            "test_few_anchors_are_divided_as_256",
            "test_rpn_samples_at_most_half_positive",
            "test_rpn_samples_by_the_noise_alone",
            "test_rpn_boxes_by_hand",
            "test_rpn_loss_equals_a_plain_loop",
            "test_roi_sampling",
            "test_rois_are_sampled_by_the_noise_alone",
            "test_roi_sampling_equals_a_plain_loop",
            "test_few_or_no_proposals",
        ),
    ),
    "a8": Assignment(
        "Mask R-CNN: regions and masks",
        (
            "heads.roi_levels",
            "heads.roi_features",
            "heads.BoxHead.forward",
            "heads.MaskHead.forward",
            "loss.box_head_loss",
            "loss.mask_targets",
            "loss.mask_loss",
        ),
        (
            "test_box_and_mask_heads_by_hand",
            "test_last_layers_compute_in_float32[BoxHead]",
            "test_last_layers_compute_in_float32[MaskHead]",
            "test_box_and_mask_heads_equal_the_official_code",
            "test_roi_levels",
            "test_roi_features_sample_the_centre_of_each_cell",
            "test_roi_features_of_the_own_image_and_level",
            "test_roi_features_equal_torchvision_level_by_level",
            "test_noise_decides_what_is_sampled",
            "test_two_processes_equal_one[1-None-mask_rcnn]",
            "test_box_head_loss_by_hand",
            "test_losses_of_rois_are_means_over_the_batch",
            "test_mask_targets_of_the_object_itself",
            "test_mask_targets_in_the_frame_of_the_roi",
            "test_mask_targets_equal_torchvision",
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


def rewrite(source, qualified, body):
    """The source with that body replaced by other lines, which are indented to fit."""
    first, last, indent = extent(source, qualified)
    lines = source.splitlines(keepends=True)
    lines[first:last] = [textwrap.indent(textwrap.dedent(body).strip("\n"), indent) + "\n"]
    return "".join(lines)


def blank(source, qualified, message):
    """The source with that body replaced by a NotImplementedError."""
    return rewrite(source, qualified, f'raise NotImplementedError("{message}")')


def solved(source, qualified):
    """That body, or None where it is blank, or where nothing of that name is there."""
    try:
        body = "\n".join(body_of(source, qualified))
    except (StopIteration, ValueError):
        return None
    return None if 'raise NotImplementedError("a' in body else body


def parsed(path):
    """The source of a file. Raises UserError if it is not Python."""
    try:
        ast.parse(source := path.read_text(), path.name)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not Python: {error}")
    return source


def change(folder, module, make):
    """Replace a module's source in a folder by make(source)."""
    path = folder / f"{module}.py"
    path.write_text(make(path.read_text()))


def copy(out):
    """Write the project to the folder `out`."""
    for pattern in COPIED:
        for path in sorted(p for p in ROOT.glob(pattern) if p.name not in NOT_COPIED):
            target = out / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def cut(name, out, functions=None, keep=None):
    """Write the project to the folder `out` with the assignment's functions (or only these of it) blanked.

    keep: a folder from which the bodies of all other assignments' functions are taken, where they are solved there;
    the list of them, as far as they differ from the solution, is returned. Raises UserError if a file there is broken.
    """
    earlier = {path.stem: parsed(path) for path in sorted(keep.glob("*.py"))} if keep else {}
    copy(out)
    (out / NAME_FILE).write_text(f"{name}\n")
    for function in ASSIGNMENTS[name].functions if functions is None else functions:
        module, qualified = function.split(".", 1)
        change(out, module, lambda source: blank(source, qualified, f"{name}: {function}"))  # noqa: B023
    for module, text in ASSIGNMENTS[name].removed if functions is None else ():
        for name_of_file in (module, "tools/make_assignment"):
            change(out, name_of_file, lambda source: source.replace(text, "", 1))  # noqa: B023
        (out / "docs" / "spinenet49.svg").unlink(missing_ok=True)  # which shows it; tools/draw_network.py draws it anew
    kept = []
    for other, assignment in ASSIGNMENTS.items() if keep else ():
        for function in assignment.functions if other != name else ():
            module, qualified = function.split(".", 1)
            body = solved(earlier.get(module, ""), qualified)
            if body and body != solved((ROOT / f"{module}.py").read_text(), qualified):
                change(out, module, lambda source: rewrite(source, qualified, body))  # noqa: B023
                kept.append(function)
    return kept


# Grading: the tests of a folder run in a process of their own, which is ended after a limit, with all that it started.


class Recorder:
    """A plugin of pytest that writes what happens to a file, line by line, so that also a killed run has said it."""

    def __init__(self, path):
        self.file = open(path, "w", buffering=1)

    def write(self, **row):
        self.file.write(json.dumps(row) + "\n")

    def pytest_collection_finish(self, session):
        self.write(count=len(session.items))

    def pytest_runtest_logstart(self, nodeid):
        self.write(started=nodeid.split("::")[-1])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.write(failed=report.nodeid.split("::")[-1], message=crash.message if crash else str(report.longrepr))
        elif report.when == "call":
            self.write(passed=report.nodeid.split("::")[-1])


class Grade(NamedTuple):
    """What the tests said: how many there are, names of the passed, {name: message} of the failed."""

    count: int
    passed: list
    failed: dict
    ended: str  # why the run came to no end, or ""

    def first(self):
        """(test, message) of the first failure, or of what ended the run, or ("", "")."""
        if self.ended:
            return "", self.ended
        return next(iter(self.failed.items()), ("", ""))


def run_pytest(folder, marks, options):
    """In a process of its own: the marked tests of the copy."""
    os.setsid()
    file = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    # A process that the tests spawn runs the main module's file first: this one, which would bring the solution along.
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.path[:] = [p for p in sys.path if not Path(p).resolve().is_relative_to(ROOT)]
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(ROOT)) and not name.startswith("__"):
            del sys.modules[name]
    import pytest

    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-m", marks, *options]
    code = pytest.main(options, plugins=[Recorder(folder / "said.jsonl")])
    sys.stdout.flush()
    os._exit(int(code))  # whatever threads the tested code has left


def kill_session(leader):
    """Kill the processes of a session that `leader` began, in whatever group they are."""
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else [str(leader)]:
        try:
            if entry.isdecimal() and os.getsid(int(entry)) == leader:
                os.kill(int(entry), signal.SIGKILL)
        except ProcessLookupError:
            pass


def grade(folder, marks, options=(), limit=300):
    """The Grade of the marked tests of a folder, which is a copy; at most so many seconds. Threads may call it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "pycocotools.cocoeval", "PIL.Image", "pytest"])
    process = context.Process(target=run_pytest, args=(folder, marks, options))
    process.start()
    process.join(limit)
    late = process.exitcode is None
    kill_session(process.pid)
    process.kill()  # which may not have begun its session yet
    process.join()
    record = folder / "said.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    rows = {kind: [row for row in rows if kind in row] for kind in ("count", "started", "passed", "failed")}
    where = f" in {rows['started'][-1]['started']}" if rows["started"] else ""
    ended = f"ended after {limit} s{where}" if late else ""
    if not late and process.exitcode not in (0, 1):
        said = (folder / "said.txt").read_text(errors="replace").strip().splitlines() or ["nothing"]
        last = next((line for line in reversed(said) if re.match(r"E  |\w*Error", line)), said[-1])
        ended = f"pytest ended with {process.exitcode}{where}: {last.strip()}"
    failed = {row["failed"]: row["message"] for row in reversed(rows["failed"])}
    return Grade(
        sum(row["count"] for row in rows["count"]),
        [row["passed"] for row in rows["passed"]],
        dict(reversed(failed.items())),
        ended,
    )


def grade_students(folders, name, limit):
    """Print a line for each student's folder: what passes of the tests, with the folder's files at the root."""
    names = {}
    for student in folders:
        marker = student / NAME_FILE
        names[student] = name or (marker.read_text().strip() if marker.exists() else None)
        if names[student] not in ASSIGNMENTS:
            raise UserError(f"{student} has no {NAME_FILE} that names an assignment; give its name before --grade")
    print(f"{'student':<30} {'passed':>6} {'of':>4}  first failing test")
    for student, marks in names.items():
        with tempfile.TemporaryDirectory() as folder:
            copy(Path(folder))
            for path in student.glob("*.py"):  # with this project's own tests and tools
                shutil.copy(path, folder)
            result = grade(Path(folder), marks, limit=limit)
        test, message = result.first()
        what = f"{test}: {' '.join(message.split())}" if test else message
        print(f"{str(student):<30} {len(result.passed):>6} {result.count:>4}  {what[:400]}", flush=True)


# The variants: right bodies pass, wrong ones fail, in words.


def varied(variant):
    """The source of the function's module, with the function as the variant has it."""
    module, qualified = variant.function.split(".", 1)
    source, body = (ROOT / f"{module}.py").read_text(), variant.body
    if not isinstance(body, str):
        lines = textwrap.dedent("\n".join(body_of(source, qualified)))
        for old, new in body:
            if lines.count(old) != 1:
                raise ValueError(f"{variant.function}, {variant.what}: {old!r} is there {lines.count(old)} times")
            lines = lines.replace(old, new)
        body = lines
    return rewrite(source, qualified, body)


def judge(name, variant, right):
    """("" if the grader says of a variant what it should, else what it says; the test and its message; seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        change(Path(folder), variant.function.split(".")[0], lambda source: varied(variant))
        began = time.monotonic()
        result = grade(Path(folder), name, () if right else ("-x",))
    test, message = result.first()
    if right:
        fault = f"refused by {test}: {message}" if test or message else ""
    elif not test:
        fault = message or "passed"
    else:
        fault = "" if re.search(variant.says, message) else f"{test} doesn't say {variant.says!r}, but: {message}"
    return fault, test, message, time.monotonic() - began


def check_variants(names):
    """Judge every variant of these assignments, two at a time, and print what came of it; True if all is well."""
    sys.path.insert(0, str(ROOT / "tests"))
    from variants import VARIANTS

    jobs = [(n, v, right) for n in names for right in (False, True) for v in VARIANTS[n]["right" if right else "wrong"]]
    well = 0
    with ThreadPoolExecutor(2) as pool:
        for (name, variant, right), (fault, test, message, seconds) in zip(jobs, pool.map(lambda j: judge(*j), jobs)):
            kind, outcome = ("right", "passes") if right else ("wrong", f"fails {test}: {' '.join(message.split())}")
            outcome = f"NOT AS IT SHOULD: {fault}" if fault else outcome
            print(f"{name} {kind} {variant.function} ({variant.what}), {seconds:.0f} s: {outcome[:300]}", flush=True)
            well += not fault
    print(f"{well} of {len(jobs)} variants are judged as they should be")
    return well == len(jobs)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Cut an assignment, grade students, or check the grader.")
    add = parser.add_argument
    add("name", nargs="?", choices=ASSIGNMENTS)
    add("--out", type=Path, help="a new folder for the copy")
    add("--keep", type=Path, metavar="DIR", help="take what is solved in this copy of another assignment")
    add("--grade", type=Path, nargs="+", metavar="DIR", help="grade these copies")
    add("--limit", type=int, default=300, metavar="SECONDS", help="for each of them (default 300)")
    add("--check-variants", action="store_true", help="of the assignment, or of all")
    args = parser.parse_args(argv)
    if args.check_variants:
        raise SystemExit(not check_variants([args.name] if args.name else ASSIGNMENTS))
    if args.limit < 1:
        raise UserError(f"--limit is {args.limit}, but must be at least 1")
    for folder in [*(args.grade or ()), *([args.keep] if args.keep else ())]:
        if not (folder / "model.py").exists():
            raise UserError(f"{folder} is no copy of the project: it has no model.py")
    if args.grade:
        return grade_students(args.grade, args.name, args.limit)
    if not (args.name and args.out):
        parser.error("give an assignment and --out, or --grade, or --check-variants")
    if args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"{args.out} is not empty; give a new folder")
    kept = cut(args.name, args.out, keep=args.keep)
    print(f"{args.name}, {ASSIGNMENTS[args.name].title}: in {args.out}, write the bodies of")
    for function in ASSIGNMENTS[args.name].functions:
        module, qualified = function.split(".", 1)
        print(f"  {module}.py: {qualified}")
    for module, _ in ASSIGNMENTS[args.name].removed:
        print(f"  {module}.py: what docs/COURSE.md says is missing besides")
    if kept:
        print(f"taken from {args.keep}: {', '.join(kept)}")
    print(f"and run there: python -m pytest -m {args.name} --tb=short")


if __name__ == "__main__":
    with one_sentence():
        main()
