"""What a check of data can find: the kinds, how severe each is, and what to do about it."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning"]


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        severity ("error" | "warning"): an error stops a run or makes its numbers wrong.
        title (str): what such findings are, in the plural.
        action (str): what to do about one.
    """

    severity: Severity
    title: str
    action: str


KINDS = {
    "unreadable-annotations": Kind("error", "splits that cannot be read", "restore or correct the file"),
    "malformed-file": Kind(
        "error", "annotation files missing or unreadable", "restore the file, or take it off the list"
    ),
    "malformed-image": Kind("error", "image records that cannot be used", "correct the record or remove it"),
    "malformed-category": Kind("error", "categories that cannot be used", "correct the category"),
    "malformed-annotation": Kind("error", "annotations that cannot be read", "correct or remove them"),
    "missing-image": Kind("error", "images without a file", "restore the file or remove the image"),
    "unreadable-image": Kind("error", "images that cannot be decoded", "fetch the file again or remove it"),
    "image-size": Kind(
        "error",
        "images of another size than their annotations say",
        "correct width and height, and see whether the boxes fit this file",
    ),
    "duplicate-image-id": Kind("error", "image ids that occur before", "give each image an id of its own"),
    "duplicate-annotation-id": Kind(
        "error", "annotation ids that occur before", "give each annotation an id of its own"
    ),
    "duplicate-category-id": Kind(
        "error", "category ids that occur before", "give each category an id of its own"
    ),
    "category-mismatch": Kind(
        "error", "splits with other categories than the first", "use one list of categories in all splits"
    ),
    "unknown-image": Kind("error", "annotations of no known image", "add the image or remove them"),
    "unknown-category": Kind("error", "annotations of no known category", "add the category or remove them"),
    "box-not-finite": Kind("error", "boxes with NaN or infinity", "draw the box again or remove it"),
    "box-no-area": Kind("error", "boxes of no area", "draw the box again or remove it"),
    "box-outside": Kind("error", "boxes beyond the border of their image", "clip or remove the box"),
    "bad-mask": Kind("error", "masks that cannot be used", "draw the mask again or remove it"),
    "image-in-two-splits": Kind(
        "error", "images that are in two splits", "keep each in one split: the scores are too good otherwise"
    ),
    "duplicate-image": Kind("warning", "images that occur before in their split", "keep one of them"),
    "duplicate-category-name": Kind("warning", "names of two categories", "tell the categories apart"),
    "duplicate-box": Kind("warning", "boxes that occur before", "remove all but one"),
    "near-duplicate-box": Kind(
        "warning", "boxes nearly as another of their class", "look whether both are meant"
    ),
    "mask-box": Kind("warning", "masks that do not fill their box", "see which of the two is right"),
    "missing-area": Kind("warning", "annotations without `area`", "the box's is taken; --fix writes it"),
    "missing-iscrowd": Kind("warning", "annotations without `iscrowd`", "0 is taken; --fix writes it"),
    "category-gap": Kind(
        "warning",
        "lists of category ids with gaps",
        "drcnn numbers the classes by rising id; see that other tools do",
    ),
    "class-without-examples": Kind(
        "warning", "classes without a training example", "add examples or remove the class"
    ),
}
"""All kinds, errors first."""


@dataclass(frozen=True)
class Finding:
    """One problem of a data set.

    Attributes:
        kind (str): a key of ``KINDS``.
        split (str): name of the split.
        file (str): the file that is to be corrected.
        place (str): where in it, such as "annotation 7" or "line 3"; empty for all of it.
        message (str): what is wrong there.
        image_id (int | None): id of the image.
        annotation_id (int | None): id of the annotation.
        other_id (int | None): id of the image or annotation that this one repeats.
        severity ("error" | "warning"): that of the kind, unless the case is milder.
        index (int): place in the list of images or annotations, for the repair; -1 for none.
    """

    kind: str
    split: str
    file: str
    place: str
    message: str
    image_id: int | None = None
    annotation_id: int | None = None
    other_id: int | None = None
    severity: Severity = "error"
    index: int = field(default=-1, repr=False)

    @property
    def action(self) -> str:
        """What to do about it."""
        return KINDS[self.kind].action

    def text(self) -> str:
        """Returns one line that names the file, the place and what is wrong."""
        image = f" (image {self.image_id})" if self.image_id is not None and self.place else ""
        image = "" if self.place.startswith("image ") else image
        return f"{self.file}: {self.place}{image}{': ' if self.place else ''}{self.message}"

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain types, with the action."""
        plain = asdict(self) | {"action": self.action}
        del plain["index"]
        return plain


class Notes:
    """Collects the findings of a split.

    Args:
        split (str): its name.
        file (str): its annotations, the file of a finding that names no other.
    """

    def __init__(self, split: str, file: str) -> None:
        self.split, self.file = split, file
        self.findings: list[Finding] = []

    def add(
        self,
        kind: str,
        message: str,
        place: str = "",
        *,
        file: str = "",
        image_id: int | None = None,
        annotation_id: int | None = None,
        other_id: int | None = None,
        severity: Severity | None = None,
        index: int = -1,
    ) -> None:
        """Notes a finding; see :class:`Finding` for the arguments."""
        severity = severity or KINDS[kind].severity
        where = (self.split, file or self.file, place)
        ids = (image_id, annotation_id, other_id)
        self.findings.append(Finding(kind, *where, message, *ids, severity, index))
