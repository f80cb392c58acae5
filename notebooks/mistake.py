"""What a student typically does wrong: planted in the right solution, to see that a lab's tests find and name it."""

from typing import NamedTuple


class Mistake(NamedTuple):
    """A mistake, by what it changes in the right solution.

    ``old`` stands once in the cell whose grade_id is ``cell``, and becomes ``new``. It costs the points of the cell
    ``loses``, and no others; what that cell says then has the words ``says`` in it.
    """

    name: str
    cell: str
    loses: str
    old: str
    new: str
    says: str
