"""What of somebody else's data could not be used: counted and named, never dropped in silence."""

from __future__ import annotations

from polarmask_tf.errors import InputError, one_line


class Unusable(Exception):
    """An image or an annotation that has to be skipped; the text is the reason, the same for all of a kind.

    `detail` is what is known of this one beyond that.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


class Report:
    """What was skipped and what is worth knowing: reason -> [count, first example]."""

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.skipped: dict[str, list] = {}
        self.notes: dict[str, list] = {}
        self.objects = 0  # of what was skipped: annotations, and not images

    def skip(self, reason: str | Unusable, where: str, count: int = 1) -> None:
        detail = getattr(reason, "detail", "")
        reason, where = str(reason), one_line(f"{where}: {detail}" if detail else where, 200)
        if self.strict:
            raise InputError(f"{where}: {reason}; mend it, or leave out --strict to skip such things")
        self.skipped.setdefault(reason, [0, where])[0] += count

    def skip_object(self, reason: str | Unusable, where: str, count: int = 1) -> None:
        """As `skip`, of an annotation: a set of which none is left is not taken for one of background."""
        self.objects += count
        self.skip(reason, where, count)

    def note(self, reason: str, where: str, count: int = 1) -> None:
        self.notes.setdefault(reason, [0, one_line(where, 200)])[0] += count

    def merge(self, other: Report) -> None:
        self.objects += other.objects
        for mine, theirs in ((self.skipped, other.skipped), (self.notes, other.notes)):
            for reason, (count, example) in theirs.items():
                mine.setdefault(reason, [0, example])[0] += count

    def lines(self) -> list[str]:
        kinds = (("skipped", self.skipped), ("note:", self.notes))
        return [f"{kind} {n} x {reason} (first: {where})" for kind, found in kinds for reason, (n, where) in found.items()]
