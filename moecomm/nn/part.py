"""Part: a module whose state_dict says which part of a whole layer it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moecomm.nn.seeds import Slice

SUFFIX = "_extra_state"
"""What torch calls a state that is neither parameter nor buffer; strict loading knows it."""


class Part(nn.Module):
    """A layer of which each rank has another part, under the same names and in the same shapes.

    Its state_dict has one entry more, int64 [2 + number of experts]: the place. `load_state_dict` refuses that of
    another part, as it does another shape, and takes one without a place. `checkpoint` has names that every split
    understands, and needs no place.
    """

    slices: dict[str, Slice]
    """weight -> which slice of it is here."""

    def place(self) -> list[int]:
        """[i, n, ids...]: slice i of n, and the global ids of the experts where it is a bank of some of them."""
        return [*next(iter(self.slices.values())).portion]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _, size, *experts = place = self.place()
        if size > 1 or experts:
            # A module of a user's may have no weights.
            device = next((weight.device for weight in self.parameters()), None)
            destination[prefix + SUFFIX] = torch.tensor(place, device=device)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        saved = state_dict.get(prefix + SUFFIX)
        if isinstance(saved, Tensor) and not saved.is_meta:
            # A cast of all tensors of a state_dict has cast the place, too.
            place = torch.tensor(self.place()).to(saved.dtype)
            if not torch.equal(saved.cpu(), place):
                errors.append(
                    f"{prefix[:-1] or type(self).__name__}: the state_dict has {_words(saved.long().tolist())}, this "
                    f"rank {_words(self.place())}; moecomm.nn.checkpoint saves and loads the parts of all ranks."
                )
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        # A place that is right is read here, and by nothing in torch.
        if prefix + SUFFIX in unexpected:
            unexpected.remove(prefix + SUFFIX)


def _words(place: list[int]) -> str:
    number, size, *experts = place
    return f"slice {number} of {size}" + (f" of experts {experts}" if experts else "")
