"""Which token comes next: greedy, or drawn from the logits by a generator that counts and remembers nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Choices(NamedTuple):
    """How each of S sequences chooses, all [S].

    seed, sequence, position  int64, which random number: the same three give the same one
    temperature               float64; 0: the likeliest token, ties to the lower id
    top_k                     int64: of the k likeliest, ties to the lower id
    top_p                     float64: of the smallest prefix of these, sorted downwards, that reaches p
    """

    seed: Tensor
    sequence: Tensor
    position: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor

    def first(self, size: int) -> Choices:
        """Views of the first sequences."""
        return Choices(*[values[:size] for values in self])


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random words for a counter of four words, all int64 [...] below 2**32.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The products wrap around in int64, which leaves their 64 bits as they are.
        p0 = c0 * MULTIPLIERS[0]
        p1 = c2 * MULTIPLIERS[1]
        c0, c2 = (p1 >> 32 & LOW) ^ c1 ^ k0, (p0 >> 32 & LOW) ^ c3 ^ k1
        c1, c3 = p1 & LOW, p0 & LOW
        k0 = k0 + INCREMENTS[0] & LOW
        k1 = k1 + INCREMENTS[1] & LOW
    return c0, c1, c2, c3


def uniform(seed: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
    """[S] float64 in [0, 1), of 53 random bits."""
    counter = (
        position & LOW,
        position >> 32 & LOW,
        sequence & LOW,
        sequence >> 32 & LOW,
    )
    high, low, _, _ = philox(counter, (seed & LOW, seed >> 32 & LOW))
    return ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53


def sample(logits: Tensor, choices: Choices, greedy: bool) -> tuple[Tensor, Tensor]:
    """A token for each row of logits [S, V] float32, and its log-probability: int64 [S], float32 [S].

    greedy  whether all temperatures are 0, which needs no sorting

    The log-probability is that of the softmax of the logits themselves, without temperature and cuts. No host waits for
    the device in here. Not collective: the same logits give the same tokens.
    """
    tokens = _likeliest(logits) if greedy else _drawn(logits, choices)
    logarithms = logits.log_softmax(-1).gather(1, tokens[:, None])
    return tokens, logarithms[:, 0]


def _likeliest(logits: Tensor) -> Tensor:
    # argmax does not promise which of equal ones it gives.
    ids = torch.arange(logits.shape[1], device=logits.device)
    best = logits == logits.amax(-1, keepdim=True)
    return ids.masked_fill(~best, logits.shape[1]).amin(-1)


def _drawn(logits: Tensor, choices: Choices) -> Tensor:
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(logits.shape[1], device=logits.device)
    temperature = choices.temperature[:, None]
    draws = temperature > 0
    # Of a row that is greedy the first place is taken below.
    scaled = values.double() / torch.where(draws, temperature, 1.0)
    scaled = scaled.masked_fill(place >= choices.top_k[:, None], -torch.inf)
    chances = scaled.softmax(-1)
    # What comes before a place has not reached p yet. The sum may be rounded to 1 before its end.
    before = chances.cumsum(-1).roll(1, -1)
    before[:, 0] = 0
    kept = (before < choices.top_p[:, None]) | (choices.top_p[:, None] >= 1)
    total = (chances * kept).cumsum(-1)
    threshold = uniform(choices.seed, choices.sequence, choices.position)[:, None] * total[:, -1:]
    index = (total <= threshold).sum(-1, keepdim=True)
    # A threshold that is rounded up to the whole sum would pass all places.
    index = torch.minimum(index, kept.sum(-1, keepdim=True) - 1)
    return ids.gather(1, torch.where(draws, index, 0))[:, 0]
