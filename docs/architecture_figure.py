"""The map of docs/architecture.md: the rooms of the package, and which uses which, as its import statements say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import grimp

from moecomm.draw.svg import INK, MARGIN, MUTED, PALE, Box, Canvas, color_of, mixed, text_width

WIDTH, HEIGHT, GAP = 244, 66, 14
"""px: of a room, and between two."""
LABEL_WIDTH, TITLE_HEIGHT = 30, 28
"""px for the number of a level, left of its rooms, and for the name of a frame, above them."""
CORE_COLOR, WING_COLOR = color_of(0), color_of(4)


class Room(NamedTuple):
    """Some modules of the package that belong together."""

    name: str
    about: str
    modules: tuple[str, ...]
    """Without `moecomm.`; a package stands for all in it that no other room names."""


CORE = [
    Room("errors", "what fails, told to all ranks", ("errors", "failures", "identity", "json_objects", "profiling")),
    Room("arrays", "numpy, torch and cupy alike", ("arrays",)),
    Room("comm", "a group of ranks: seam 1", ("comm", "together")),
    Room("nodes, topology", "who is where, as arithmetic", ("nodes", "topology")),
    Room("transports", "which wires", ("transports",)),
    Room("groups", "the Comms of a Topology", ("groups",)),
    Room("all_to_all", "which hops: seam 2", ("all_to_all",)),
    Room("gating", "which expert, what weight", ("gating",)),
    Room("exchange", "tokens to experts and back: seam 3", ("exchange",)),
]
HOPS = ("all_to_all.shared", "all_to_all.streams", "all_to_all.auto")
GPU = (
    "cuda",
    "gating.cuda",
    "gating.cuda_rows",
    "gating.kernel",
    "exchange.symmetric",
    "exchange.direct",
)
WINGS = [
    Room("shared_memory", "memory that the ranks of a node share", ("shared_memory",)),
    Room("cost", "predicted times and bytes", ("cost", "traffic")),
    Room("hops", "hops that need more than a Comm", HOPS),
    Room("gpu", "kernels and what launches them", GPU),
    Room("plan", "pictures and the command line", ("draw", "cli", "__main__")),
    Room("nn", "layers, checkpoints, a model", ("nn",)),
    Room("train", "programs that train", ("train", "distill")),
    Room("serve", "a model that answers", ("serve",)),
    Room("integrations", "inside other libraries", ("integrations",)),
    Room("testing", "suites that check an implementation", ("testing", "conformance", "gating.reference")),
]
FACES = ("moecomm", "moecomm.all_to_all", "moecomm.gating", "moecomm.exchange")
"""Packages whose __init__.py names what users import, of the core and of wings: their imports are no use."""


def room_of(module: str) -> Room:
    """The room that names the module, or the nearest package around it."""
    name = module.removeprefix("moecomm.")
    while name:
        for room in [*CORE, *WINGS]:
            if name in room.modules:
                return room
        name = name.rpartition(".")[0]
    raise ValueError(f"room_of: {module} is in no room of docs/architecture_figure.py")


def uses() -> dict[str, set[str]]:
    """For each room, by name, the rooms that its modules import."""
    graph = grimp.build_graph("moecomm", exclude_type_checking_imports=True)
    used: dict[str, set[str]] = {room.name: set() for room in [*CORE, *WINGS]}
    for module in sorted(graph.modules - set(FACES)):
        for imported in graph.find_modules_directly_imported_by(module) - {"moecomm"}:  # that is the C++ module
            used[room_of(module).name].add(room_of(imported).name)
    for name, others in used.items():
        others.discard(name)
    return used


def levels(used: dict[str, set[str]]) -> dict[str, int]:
    """For each room 0, or one more than the highest that it uses. Raises ValueError if rooms use each other."""
    level: dict[str, int] = {}
    while len(level) < len(used):
        ready = [name for name, others in used.items() if name not in level and others <= level.keys()]
        if not ready:
            raise ValueError(f"levels: rooms use each other in a circle: {sorted(used.keys() - level.keys())}")
        level |= {name: 1 + max((level[other] for other in used[name]), default=-1) for name in ready}
    return level


def _essential(used: dict[str, set[str]], name: str) -> list[str]:
    """The rooms that `name` uses, without those that are used by another of these."""
    below = used[name]
    return sorted(other for other in below if not any(other in used[between] for between in below))


def architecture_svg() -> str:
    """The core at the left and the wings at the right, each room above all those that it uses."""
    used = uses()
    used["gating"] -= {"gpu"}  # the exempt edge, drawn as such
    level = levels(used)
    canvas = Canvas("The rooms of moecomm", "each uses only rooms below it; the core uses no wing")
    highest = max(level.values())
    left, top = float(MARGIN + LABEL_WIDTH), canvas.bottom + GAP
    for name, rooms, color in (("core", CORE, CORE_COLOR), ("wings", WINGS, WING_COLOR)):
        columns = _most_on_a_level(rooms, level)
        frame = Box(left, top, GAP + columns * (WIDTH + GAP), TITLE_HEIGHT + (highest + 1) * (HEIGHT + GAP))
        canvas.frame(frame, name)
        for height in range(highest + 1):
            y = _y_of(top, highest - height)
            for column, room in enumerate(room for room in rooms if level[room.name] == height):
                below = ", ".join(_essential(used, room.name)) or "nothing"
                _draw_room(canvas, Box(left + GAP + column * (WIDTH + GAP), y, WIDTH, HEIGHT), room, below, color)
        left += frame.width + 2 * GAP
    for height in range(highest + 1):
        canvas.text((MARGIN, _y_of(top, highest - height) + HEIGHT / 2 + 5), str(height), 14, color=MUTED)
    y = canvas.bottom + 26
    canvas.text((MARGIN, y), 'A room also uses what the rooms after its word "uses" use.', 12, color=MUTED)
    words = "gating reaches gpu through torch's operators: the one exempt edge, which is not drawn."
    canvas.text((MARGIN, y + 18), words, 12, color=MUTED)
    return canvas.svg()


def _y_of(top: float, row: int) -> float:
    """px: where the row of rooms begins, counted from the top of the frames."""
    return top + TITLE_HEIGHT + row * (HEIGHT + GAP)


def _most_on_a_level(rooms: Iterable[Room], level: dict[str, int]) -> int:
    heights = [level[room.name] for room in rooms]
    return max(heights.count(height) for height in heights)


def _draw_room(canvas: Canvas, box: Box, room: Room, below: str, color: str) -> None:
    canvas.rect(box, mixed(color, PALE), color, 6, f"{room.name}: {room.about}")
    canvas.text((box.x + 10, box.y + 20), room.name, 14, bold=True, color=INK)
    canvas.text((box.x + 10, box.y + 38), room.about, 11, color=INK)
    line = f"uses {below}"
    size = 11 if text_width(line, 11) <= box.width - 20 else 9
    canvas.text((box.x + 10, box.y + 55), line, size, color=MUTED)
