"""A pass of the model over new positions, whose earlier ones are in the paged cache; and one step of a batch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moecomm.nn import TransformerLM
from moecomm.nn.transformer import Attention
from moecomm.serve.cache import PAGE, PagedCache, pages_for
from moecomm.serve.sampling import Choices, sample


class Positions(NamedTuple):
    """Where the new positions of S sequences are in the cache.

    pages, offsets  [S, C] of each new one
    tables          [S, P] pages of each sequence; 0 where it has none
    mask            [S, 1, C, P * PAGE] which positions a new one may see
    """

    pages: Tensor
    offsets: Tensor
    tables: Tensor
    mask: Tensor


def logits_of(model: TransformerLM, cache: PagedCache, tokens: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
    """tokens, positions [S, C], tables [S, P] -> logits [S, V] float32 behind each sequence's last new token.

    The new positions are added to the cache, whose tables must have pages for them. Collective over the tensor ranks;
    the same on all of them.
    """
    columns = torch.arange(tables.shape[1] * PAGE, device=tables.device)
    places = Positions(
        tables.gather(1, positions // PAGE),
        positions % PAGE,
        tables,
        (columns <= positions[..., None])[:, None],
    )
    x = F.embedding(tokens, model.embedding) + model.position[positions]
    for number, block in enumerate(model.blocks.values()):
        pages = cache.keys[number], cache.values[number]
        x = x + _attention(block.attention, block.norms[0](x), pages, places)
        y = block.ffn(block.norms[1](x))
        # A layer with experts returns its routing beside the answer.
        x = x + (y[0] if isinstance(y, tuple) else y)
    return _head(model, model.norm(x[:, -1]))


def _attention(attention: Attention, x: Tensor, cache: tuple[Tensor, Tensor], places: Positions) -> Tensor:
    """x [S, C, hidden] -> the same; cache: keys and values [pages, heads, PAGE, d] of the layer. Collective."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.heads, -1)).unbind(2)
    keys, values = [_appended(pages, new, places) for pages, new in zip(cache, (k, v), strict=True)]
    y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=places.mask)
    return attention.out(y.transpose(1, 2).flatten(2))


def _appended(pages: Tensor, new: Tensor, places: Positions) -> Tensor:
    """Write new [S, C, heads, d] into pages, and return what their tables list: [S, heads, P * PAGE, d]."""
    pages[places.pages, :, places.offsets] = new
    return pages[places.tables].transpose(1, 2).flatten(2, 3)


def _head(model: TransformerLM, x: Tensor) -> Tensor:
    """x [S, hidden] -> logits [S, V]; each tensor rank computes those of its slice of the vocabulary. Collective."""
    tensor = None if model.groups is None else model.groups.tensor
    if tensor is None or tensor.size == 1:
        return F.linear(x, model.embedding).float()
    # Any vocabulary: slices may differ by one.
    bounds = [rank * model.config.vocabulary // tensor.size for rank in range(tensor.size + 1)]
    part = model.embedding[bounds[tensor.rank] : bounds[tensor.rank + 1]]
    counts = [end - start for start, end in pairwise(bounds)]
    rows = F.linear(part, x).float()
    return tensor.all_gather(rows, counts).T.contiguous()


class Batch:
    """The inputs of a step in tensors that stay where they are, and the step.

    size    sequences at most
    length  positions of a sequence at most

    The step of a bucket, S rows and P columns of tables, is one function of these tensors: its shapes depend on the
    bucket alone, so that a CUDA graph can hold it. On a CPU, and through exchanges whose counts go over the host, it
    runs eagerly.
    """

    def __init__(self, size: int, length: int, device: Any) -> None:
        rows = bucket(size)
        whole = {"dtype": torch.int64, "device": device}
        self.tokens = torch.zeros(rows, **whole)
        self.lengths = torch.zeros(rows, **whole)
        self.tables = torch.zeros(rows, bucket(pages_for(length)), **whole)
        self.choices = Choices(
            seed=torch.zeros(rows, **whole),
            sequence=torch.zeros(rows, **whole),
            position=torch.zeros(rows, **whole),
            temperature=torch.zeros(rows, dtype=torch.float64, device=device),
            top_k=torch.ones(rows, **whole),
            top_p=torch.ones(rows, dtype=torch.float64, device=device),
        )

    def step(self, model: TransformerLM, cache: PagedCache, rows: int, columns: int, greedy: bool) -> Tensor:
        """[2, rows] float64: the next token of each row and its log-probability. Collective over the tensor ranks."""
        tokens = self.tokens[:rows, None]
        positions = self.lengths[:rows, None]
        logits = logits_of(model, cache, tokens, positions, self.tables[:rows, :columns])
        # As one tensor: the host fetches it at once. Any token is exact in float64.
        return torch.stack([values.double() for values in sample(logits, self.choices.first(rows), greedy)])


def bucket(count: int) -> int:
    """The smallest power of two that is not below count."""
    return 1 << (count - 1).bit_length()
