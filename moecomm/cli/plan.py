"""python -m moecomm plan: which layout and which all-to-all, before the ranks are there."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from moecomm.cli.plan_report import as_json, assumptions, heading, in_words, layout_table, tried, verdict
from moecomm.cli.tables import paragraph, scaled
from moecomm.cli.topology import add_wide, positive, ranks
from moecomm.cost import (
    GPU_NODES,
    Candidate,
    Links,
    Machine,
    RankMemory,
    Sizes,
    Workload,
    candidates,
    layers_memory,
    pareto_front,
)
from moecomm.draw.layouts import layouts_svg
from moecomm.draw.words import counted
from moecomm.nodes import Nodes
from moecomm.topology import Topology

if TYPE_CHECKING:
    from moecomm.nn import Config

SUMMARY = "predict time and memory of layers with experts in every layout, by each all-to-all, and say which to take"
EXAMPLES = """examples:
  python -m moecomm plan --ranks 1024 --experts 128 --top-k 2 --tensor 1,2,4,8 --memory 80GiB --svg plan.svg
  python -m moecomm plan --ranks 128 --experts 1.3b-pr-moe-64-128          # a model of moecomm.nn.CONFIGS
  python -m moecomm plan --ranks 64 --experts 32x10,64x2 --inference --tokens 8    # a pyramid, decoding
  python -m moecomm plan --ranks 64 --ranks-per-node 16 --experts 64 --links links.json --json
links.json is what moecomm.cost.measure(comm, nodes).to_json() gave on the machine.
"""
MODEL_SIZES = {
    "hidden": (4096, "numbers in a row"),
    "top_k": (1, "experts of a token"),
    "ffn": (None, "numbers inside an expert (4 x hidden)"),
    "dense": (0, "parameters beside experts and gates, as 1.3G"),
}
"""What a Config says of a model, name -> default and meaning; default None: it depends on another."""
MATRICES = {"gelu": 2, "swiglu": 3}
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    f"{prefix}i": 1024.0**power for power, prefix in enumerate("KMGT", start=1)
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    model = parser.add_argument_group("the layers")
    model.add_argument(
        "--experts",
        required=True,
        metavar="E[,E]|CONFIG",
        help="experts of each layer: 64, or 32x10,64x2 for ten layers and two; or the name of a moecomm.nn.CONFIGS",
    )
    # Their defaults come later: a CONFIG has sizes of its own, and refuses others.
    for name, (default, meaning) in MODEL_SIZES.items():
        known = meaning if default is None else f"{meaning} ({default})"
        kind = quantity if name == "dense" else positive
        model.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=known)
    model.add_argument("--activation", choices=MATRICES, help="gelu: experts of two matrices; swiglu: three (gelu)")
    model.add_argument("--tokens", type=positive, default=4096, metavar="N", help="tokens on a rank (4096)")
    model.add_argument("--dtype-bytes", type=positive, default=2, metavar="N", help="bytes of a number (2)")
    model.add_argument("--inference", action="store_true", help="forward pass alone, as for decoding; else training")
    model.add_argument(
        "--optimizer-bytes", type=quantity, default=12, metavar="N", help="of a parameter (12: Adam in float32)"
    )

    layout = parser.add_argument_group("the layouts to compare")
    layout.add_argument("--ranks", type=ranks, required=True, metavar="P", help="number of ranks")
    layout.add_argument("--ranks-per-node", type=positive, default=8, metavar="G", help="a node is a block (8)")
    layout.add_argument(
        "--expert", type=sizes, metavar="N[,N]", help="ranks among which experts are divided (all that divide)"
    )
    layout.add_argument("--tensor", type=sizes, default=[1], metavar="L[,L]", help="ranks with the same tokens (1)")
    layout.add_argument("--expert-tensor", type=sizes, default=[1], metavar="N[,N]", help="slices of an expert (1)")
    layout.add_argument(
        "--memory", type=size_in_bytes, default=inf, metavar="SIZE", help="of a rank, as 141GiB: the most to use"
    )

    add_machine_options(parser)
    output = parser.add_argument_group("the output")
    output.add_argument("--svg", type=Path, metavar="FILE", help="draw time against memory too")
    output.add_argument("--json", action="store_true", help="print all layouts as JSON, the best first")
    add_wide(output)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """What the links and the ranks can do."""
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--links", type=Path, metavar="FILE", help="its measured figures: Links.to_json()")
    machine.add_argument(
        "--flops", type=quantity, default=400e12, metavar="N", help="operations a second of a rank's experts (400T)"
    )
    machine.add_argument(
        "--bandwidth", type=quantity, default=3e12, metavar="N", help="bytes a second of a rank's memory (3T)"
    )
    machine.add_argument(
        "--overlap", type=share, default=0.0, metavar="0..1", help="of exchange and experts, the shorter one hidden (0)"
    )
    machine.add_argument(
        "--chunks", type=positive, default=1, metavar="N", help="pieces whose hops overlap, if hierarchical (1)"
    )


# ---- what the options mean -------------------------------------------------------------------------------------------


def sizes(text: str) -> list[int]:
    """Whole numbers >= 1, with commas between them, without repetitions."""
    return list(dict.fromkeys(map(positive, text.split(","))))


def quantity(text: str) -> float:
    """A number >= 0 with a prefix or none: 400T, 1.3e9."""
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)([kMGTP]?|[KMGT]i)", text)
    # 1.2.3 matches too, and 1e400 is infinite.
    try:
        value = float(match[1]) * UNITS[match[2]] if match else inf
    except ValueError:
        value = inf
    if value == inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number >= 0, such as 400T or 1.3e9")
    return value


def size_in_bytes(text: str) -> float:
    """141GiB or 80GB as bytes."""
    if not text.endswith("B"):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 141GiB or 80GB")
    return quantity(text[:-1])


def share(text: str) -> float:
    """A number in 0 .. 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    # Written so that nan is refused.
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number in 0 .. 1")
    return value


def experts_of(text: str) -> tuple[int, ...]:
    """The experts of each layer: 64 or 32x10,64x2. ArgumentTypeError for something else."""
    layers: list[int] = []
    for entry in text.split(","):
        count, times, repeats = entry.partition("x")
        layers += [positive(count)] * (positive(repeats) if times else 1)
    return tuple(layers)


def config_of(options: argparse.Namespace) -> Config | None:
    """The Config that --experts names; None if it has numbers. ValueError for an unknown name or without torch."""
    # 350m-moe-128 begins with a digit too.
    if re.fullmatch(r"[0-9x,]+", options.experts):
        return None
    # Only here, as torch is slow to import and numbers of experts do not need it.
    try:
        from moecomm.nn import config_named
    except ModuleNotFoundError as error:
        raise ValueError(f"--experts {options.experts}: needs {error.name}: pip install 'moecomm[torch]'") from None
    config = config_named(options.experts)
    if not config.experts:
        raise ValueError(f"--experts {options.experts}: the model has no experts")
    for name in (*MODEL_SIZES, "activation"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: {options.experts} has its own; give numbers to --experts")
    return config


def workload_of(options: argparse.Namespace, config: Config | None) -> Workload:
    """The layers and their tokens."""
    if config is not None:
        experts = tuple(count for count in config.experts if count)
        hidden, ffn, top_k, activation = config.hidden, config.ffn, config.top_k, config.activation
        dense = 0.0
    else:
        experts = experts_of(options.experts)
        hidden = options.hidden or 4096
        ffn = options.ffn or 4 * hidden
        top_k = options.top_k or 1
        activation = options.activation or "gelu"
        dense = options.dense or 0.0
    if top_k > min(experts):
        raise ValueError(f"--top-k: {top_k} is more than the {min(experts)} experts of a layer")
    return Workload(
        experts=experts,
        hidden=hidden,
        ffn=ffn,
        top_k=top_k,
        tokens=options.tokens,
        dtype_bytes=options.dtype_bytes,
        matrices=MATRICES[activation],
        mode="inference" if options.inference else "training",
        optimizer_bytes=options.optimizer_bytes,
        dense=dense,
    )


def memory_of_model(config: Config, workload: Workload) -> Callable[[dict[int, Topology]], RankMemory]:
    """What a rank needs for the whole model, not for its layers with experts alone: nn.memory_estimate."""
    import torch

    from moecomm.nn import memory_estimate

    dtypes = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    if workload.dtype_bytes not in dtypes:
        raise ValueError(f"--dtype-bytes: {workload.dtype_bytes}, expected one of {list(dtypes)} for a model by name")
    known: dict[tuple[Topology, ...], RankMemory] = {}

    def memory_of(topologies: dict[int, Topology]) -> RankMemory:
        # Where groups lie does not matter, so that most layouts are known.
        unspread = {count: replace(topology, inner="expert") for count, topology in topologies.items()}
        key = tuple(unspread.values())
        if key not in known:
            # A layer without experts is in the list too: its topology has no meaning beside that of the dense weights.
            of_layers = [unspread.get(count, key[0]) for count in config.experts]
            estimate = memory_estimate(
                config,
                of_layers,
                sequences=1,
                length=workload.tokens,
                dtype=dtypes[workload.dtype_bytes],
            )
            known[key] = RankMemory(
                estimate.weights,
                estimate.gradients,
                # The optimizer has as many numbers for each parameter as there are gradients.
                estimate.gradients / workload.dtype_bytes * workload.optimizer_bytes,
                estimate.activations + estimate.buffers,
            )
        if workload.mode == "training":
            return known[key]
        # A forward pass alone keeps nothing, and has the rows of one layer at a time.
        rows = layers_memory(workload, topologies).activations
        return RankMemory(known[key].weights, 0, 0, rows)

    return memory_of


# ---- what is printed -------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Print the layouts, the best of them, and why; draw them."""
    # Whatever can be refused comes before the first line is printed: an error is the only output.
    try:
        config = config_of(options)
        workload = workload_of(options, config)
        machine = machine_of(options)
        to_try = Sizes(options.tensor, options.expert_tensor, options.expert)
        memory_of = memory_of_model(config, workload) if config is not None else None
        best_first = candidates(machine, workload, to_try, memory_of)
        fitting = within(best_first, options.memory)
        title = heading(machine, workload)
        if options.svg is not None:
            picture = layouts_svg(best_first, title, options.memory)
            # bytes, so that Windows does not change the ends of lines
            options.svg.write_bytes(picture.encode())
    except (ValueError, OSError, argparse.ArgumentTypeError) as error:
        options.parser.error(str(error))
    front = pareto_front(fitting)
    if options.json:
        entries = [as_json(candidate, workload, candidate in front) for candidate in fitting]
        print(json.dumps(entries, indent=1))
        return
    print(paragraph(title), paragraph(tried(best_first, options.expert is None)), "", sep="\n")
    print(layout_table(fitting, front, workload, options.wide), "", sep="\n")
    print(paragraph(verdict(fitting, workload)))
    num_large = len(best_first) - len(fitting)
    if num_large:
        limit = scaled(options.memory, "B", 1024)
        print(paragraph(f"{counted(num_large, 'layout')} of {len(best_first)} would need more than {limit}."))
    is_whole = config is not None
    is_assumed = options.links is None
    print("", *map(paragraph, assumptions(machine, workload, is_whole, is_assumed)), sep="\n")


def machine_of(options: argparse.Namespace) -> Machine:
    """The machine, measured or assumed."""
    links = GPU_NODES if options.links is None else Links.from_json(options.links.read_text())
    nodes = Nodes.of_size(options.ranks_per_node, options.ranks)
    return Machine(nodes, links, options.flops, options.bandwidth, options.overlap, options.chunks)


def within(best_first: Sequence[Candidate], limit: float) -> list[Candidate]:
    """Those that need no more than the limit. ValueError that says the least that is needed if there are none."""
    fitting = [candidate for candidate in best_first if candidate.memory.total <= limit]
    if not fitting:
        least = min(best_first, key=lambda candidate: candidate.memory.total)
        needed = scaled(least.memory.total, "B", 1024)
        raise ValueError(
            f"--memory: no layout fits into {scaled(limit, 'B', 1024)}; the least is {needed}, with {in_words(least)}"
        )
    return fitting
