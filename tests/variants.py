"""Wrong and right bodies of the assignments' functions: the graders refuse the wrong, in words, and take the right.

python tools/make_assignment.py --check-variants
"""

from typing import NamedTuple


class Variant(NamedTuple):
    """One function as a student might have written it."""

    function: str  # module.function or module.Class.method
    what: str  # the mistake; of a right one, how its form differs from the solution's
    body: tuple | str  # pairs (text of the solution's body, what stands in its place), or a whole body
    says: str = ""  # of a wrong one: a regular expression that is found in the failing test's message


VARIANTS = {
    "a1": {
        "wrong": (
            Variant(
                "blocks.ResidualBase.forward",
                "activating before the sum",
                (("(shortcut + branch)", "(shortcut) + branch"),),
                "block",
            ),
        ),
        "right": (
            Variant(
                "blocks.ResidualBase.forward",
                "adds the other way round",
                (("shortcut + branch", "branch + shortcut"),),
            ),
        ),
    },
    "a2": {
        "wrong": (),
        "right": (),
    },
    "a3": {
        "wrong": (),
        "right": (),
    },
    "a4": {
        "wrong": (),
        "right": (),
    },
    "a5": {
        "wrong": (),
        "right": (),
    },
    "a6": {
        "wrong": (),
        "right": (),
    },
    "a7": {
        "wrong": (),
        "right": (),
    },
    "a8": {
        "wrong": (),
        "right": (),
    },
}
