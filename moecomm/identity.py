"""What belongs to one rank of one job: never copied, never stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from typing_extensions import Self


class Identity:
    """An object that stands for communicators, threads or shared memory of this process.

    copy.copy and copy.deepcopy return the object itself, so that a copied model sends its tokens through the groups of
    the first one; whoever frees them frees them for both. Pickling raises TypeError.
    """

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"cannot pickle {type(self).__name__}: it belongs to this rank of this job. Save a model with "
            "moecomm.nn.checkpoint.save or its state_dict(), and after loading build the groups and exchanges again"
        )
