"""The picture of docs/models.md: which parts of a model, and which tokens, are on which rank."""

from __future__ import annotations

from collections.abc import Callable

from moecomm import Topology
from moecomm.draw.svg import INK, MARGIN, MUTED, PALE, Box, Canvas, color_of, mixed, text_width
from moecomm.draw.words import topology_in_words

WIDTH, HEIGHT, GAP = 74, 34, 8
"""px: a box, and between two."""
ABOUT = 11
"""px: the size of the letters below a row's name."""
Look = tuple[str, int]
"""What is written in a box, and its colour: the same in a row where ranks have the same."""


def models_svg(topology: Topology, num_experts: int) -> str:
    """A column for each rank, a row for each kind of what it has."""
    each = num_experts // topology.expert

    def experts(rank: int) -> Look:
        place = topology.coords(rank)["expert"]
        return ", ".join(map(str, range(place * each, (place + 1) * each))), 2 + place

    def attention(rank: int) -> Look:
        place = topology.coords(rank)["tensor"]
        return f"{place + 1} of {topology.tensor}", place

    rows: list[tuple[str, str, Callable[[int], Look]]] = [
        ("tokens", "one micro-batch each tensor group", lambda rank: (f"batch {place(rank)}", place(rank))),
        ("embeddings, norms, gates", "on every rank", lambda rank: ("whole", 7)),
        ("attention, MLP", "sliced over tensor ranks", attention),
        ("experts", "spread over expert ranks", experts),
    ]

    def place(rank: int) -> int:
        return topology.coords(rank)["data"]

    canvas = Canvas("What lives where", f"{topology_in_words(topology)}, {num_experts} experts")
    top = canvas.bottom + 34
    widths = [max(text_width(name, bold=True), text_width(about, ABOUT)) for name, about, _ in rows]
    left = MARGIN + max(widths) + GAP
    for rank in range(topology.world_size):
        x = left + rank * (WIDTH + GAP)
        canvas.text((x + WIDTH / 2, top - 10), f"rank {rank}", anchor="middle", bold=True)
        for number, (name, _, look) in enumerate(rows):
            words, index = look(rank)
            box = Box(x, top + number * (HEIGHT + 2 * GAP), WIDTH, HEIGHT)
            canvas.rect(box, mixed(color_of(index), PALE), color_of(index), 4, f"rank {rank}: {name} {words}")
            canvas.text((box.center[0], box.center[1] + 5), words, anchor="middle", color=INK)
    for number, (name, about, _) in enumerate(rows):
        y = top + number * (HEIGHT + 2 * GAP)
        canvas.text((MARGIN, y + 14), name, bold=True)
        canvas.text((MARGIN, y + 30), about, ABOUT, color=MUTED)
    y = canvas.bottom + 26
    for line in (
        "One colour in a row: the same there. Gradients and the states of the optimizer lie beside their weights.",
        "Gradients of experts are summed over the ranks with the same experts, all others averaged over data ranks.",
    ):
        canvas.text((MARGIN, y), line, 12, color=MUTED)
        y += 18
    return canvas.svg()
