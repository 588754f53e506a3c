"""python -m moecomm plan: which layout and which all-to-all, before the ranks are there."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from moecomm.cli.tables import Column, paragraph, rounded, scaled, text_table
from moecomm.cli.topology import add_wide, positive, ranks
from moecomm.cost import GPU_NODES, Candidate, Links, Machine, RankMemory, Sizes, Workload, candidates, pareto_front
from moecomm.draw.layouts import layouts_svg
from moecomm.draw.words import counted, layout_in_words, nodes_in_words, topology_in_words
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
MOST_LINES = 12
"""Lines of the table without --wide, unless the front is longer."""
TERMS = {
    "inside": "links inside nodes",
    "between": "links between nodes",
    "copy": "copies",
    "call": "calls",
    "sharing": "sharing answers among tensor ranks",
    "experts": "experts",
    "hidden": "what is not hidden",
}
"""The terms of a Candidate in words."""
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    f"{prefix}i": 1024.0**power for power, prefix in enumerate("KMGT", start=1)
}
PASSES_IN_WORDS = {
    "training": "Forward and backward pass; the latter exchanges as much as the former and computes twice as much. ",
    "inference": "Forward pass alone. ",
}
ASSUMED = """\
Time: dispatch, experts, combine and, with several tensor ranks, sharing the answers among them, for the tokens of all \
ranks; L tensor ranks hold the same tokens, so it takes L rounds. Messages: dispatch and combine of one layer, of the \
rank and in the group that send most, even where a message has less than a row. {overlap} Experts: {flops}FLOP/s a \
rank, or their weights read at {bandwidth}B/s where rows are few. All are equally popular; counts, other layers and \
the sum of gradients over the ranks are not in the time."""
ASSUMED_MEMORY = {
    "training": """\
Memory, of a rank: weights and gradients of {0} bytes a number, {1} bytes a parameter for the optimizer, rows and \
activations of experts for the backward pass, buffers of the exchange""",
    "inference": "Memory, of a rank: weights of {0} bytes a number, one layer's rows, buffers of the exchange",
}
ASSUMED_LINKS = """\
The machine is assumed, not measured: moecomm.cost.GPU_NODES, 450 GB/s a GPU inside a node and 400 Gbit/s a GPU \
between nodes. --links takes measured figures. SharedAllToAll, for rows in host memory, is left out."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    model = parser.add_argument_group("the layers")
    model.add_argument(
        "--experts",
        required=True,
        metavar="E[,E]|CONFIG",
        help="experts of each layer: 64, or 32x10,64x2 for ten layers and two; or the name of a moecomm.nn.CONFIGS",
    )
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
    layout.add_argument("--memory", type=size_in_bytes, metavar="SIZE", help="of a rank, as 141GiB: the most to use")

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

    output = parser.add_argument_group("the output")
    output.add_argument("--svg", type=Path, metavar="FILE", help="draw time against memory too")
    output.add_argument("--json", action="store_true", help="print all layouts as JSON, the best first")
    add_wide(output)


# ---- what the options mean -------------------------------------------------------------------------------------------


def sizes(text: str) -> list[int]:
    """Whole numbers >= 1, with commas between them, without repetitions."""
    return list(dict.fromkeys(map(positive, text.split(","))))


def quantity(text: str) -> float:
    """A number > 0 with a prefix or none: 400T, 1.3e9."""
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)([kMGTP]?|[KMGT]i)", text)
    try:
        value = float(match[1]) * UNITS[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number > 0, such as 400T or 1.3e9")
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
            dense_layer = key[0]
            of_layers = [unspread.get(count, dense_layer) for count in config.experts]
            estimate = memory_estimate(
                config, of_layers, sequences=1, length=workload.tokens, dtype=dtypes[workload.dtype_bytes]
            )
            known[key] = RankMemory(estimate.weights, 0, 0, 0)
            if workload.mode == "training":
                known[key] = RankMemory(
                    estimate.weights,
                    estimate.gradients,
                    estimate.gradients / workload.dtype_bytes * workload.optimizer_bytes,
                    estimate.activations + estimate.buffers,
                )
        return known[key]

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
        front = pareto_front(fitting)
        if options.svg is not None:
            # bytes, so that Windows does not change the ends of lines
            limit = inf if options.memory is None else options.memory
            options.svg.write_bytes(layouts_svg(best_first, heading(machine, workload), limit).encode())
    except (ValueError, OSError, argparse.ArgumentTypeError) as error:
        options.parser.error(str(error))
    if options.json:
        print(json.dumps([as_json(candidate, workload, candidate in front) for candidate in fitting], indent=1))
        return
    print(paragraph(heading(machine, workload)), paragraph(tried(best_first)), "", sep="\n")
    print(layout_table(fitting, front, workload, options.wide), "", sep="\n")
    print(paragraph(verdict(fitting, workload, machine)))
    if len(fitting) < len(best_first):
        needing = counted(len(best_first) - len(fitting), "layout")
        print(paragraph(f"{needing} of {len(best_first)} would need more than {scaled(options.memory, 'B', 1024)}."))
    print("", *map(paragraph, assumptions(options, workload, config)), sep="\n")


def machine_of(options: argparse.Namespace) -> Machine:
    """The machine, measured or assumed."""
    links = GPU_NODES if options.links is None else Links.from_json(options.links.read_text())
    nodes = Nodes.of_size(options.ranks_per_node, options.ranks)
    return Machine(nodes, links, options.flops, options.bandwidth, options.overlap, options.chunks)


def within(best_first: Sequence[Candidate], limit: float | None) -> list[Candidate]:
    """Those that need no more than the limit. ValueError that says the least that is needed if there are none."""
    fitting = [candidate for candidate in best_first if limit is None or candidate.memory.total <= limit]
    if limit is not None and not fitting:
        least = min(best_first, key=lambda candidate: candidate.memory.total)
        raise ValueError(
            f"--memory: no layout fits into {scaled(limit, 'B', 1024)}; the least is "
            f"{scaled(least.memory.total, 'B', 1024)}, with {in_words(least)}"
        )
    return fitting


def heading(machine: Machine, workload: Workload) -> str:
    """What is planned."""
    experts = str(workload.experts[0])
    if len(workload.experts) > 1:
        experts = ", ".join(f"{counted(n, 'layer')} of {count}" for count, n in Counter(workload.experts).items())
    return (
        f"{nodes_in_words(machine.nodes)}; {workload.tokens:,} tokens on a rank, hidden {workload.hidden:,}, "
        f"{experts} experts, top-{workload.top_k}; {workload.mode}"
    )


def tried(best_first: Sequence[Candidate]) -> str:
    """Which expert-parallel sizes there are, so that a number of experts that does not divide well is seen."""
    of_layers = []
    for experts in best_first[0].options:
        expert_sizes = {candidate.options[experts].topology.expert for candidate in best_first}
        of_layers.append(f"{', '.join(map(str, sorted(expert_sizes)))} for {experts} experts")
    return f"Expert-parallel sizes that divide the experts and the ranks: {'; '.join(of_layers)}."


def in_words(candidate: Candidate) -> str:
    """Topology and all-to-all, of each kind of layer."""
    choices = {(option.topology, option.all_to_all) for option in candidate.options.values()}
    kinds = []
    for experts, option in candidate.options.items():
        layers = f" for layers of {experts}" if len(choices) > 1 else ""
        kinds.append(f"{topology_in_words(option.topology)} with the {option.all_to_all} all-to-all{layers}")
    return " and ".join(dict.fromkeys(kinds))


def layout_table(fitting: Sequence[Candidate], front: Sequence[Candidate], workload: Workload, wide: bool) -> str:
    """A line for each layout, the fastest first; not wide: the front, and the fastest of the others."""
    others = [candidate for candidate in fitting if candidate not in front]
    shown = fitting if wide else [*front, *others[: max(0, MOST_LINES - len(front))]]
    shown = sorted(shown, key=lambda candidate: candidate.sizes)
    table = text_table(layout_columns(shown, front, workload), wide)
    note = "> the best; * on the front: no other layout beats it in both time and memory"
    hidden = len(fitting) - len(shown)
    if hidden:
        note += f"; {counted(hidden, 'more layout')} with --wide"
    return f"{table}\n{paragraph(note)}"


def layout_columns(shown: Sequence[Candidate], front: Sequence[Candidate], workload: Workload) -> list[Column]:
    """The columns of the table."""
    marks = ["*" if candidate in front else "" for candidate in shown]
    marks[0] = ">"
    messages = [most_of_layers(candidate, "messages") for candidate in shown]
    sent = [most_of_layers(candidate, "bytes") for candidate in shown]

    def milliseconds(name: str, *terms: str) -> Column:
        cells = [rounded(1e3 * sum(candidate.terms[term] for term in terms)) for candidate in shown]
        return Column((name, "ms"), cells, rank=0 if name == "time" else 1)

    def gibibytes(name: str, *kinds: str) -> Column:
        cells = [rounded(sum(getattr(candidate.memory, kind) for kind in kinds) / 2**30) for candidate in shown]
        return Column((name, "GiB"), cells, rank=0 if name == "memory" else 4)

    return [
        Column(("", ""), marks, words=True),
        Column(("layout", ""), [layout_in_words(candidate.topologies) for candidate in shown], words=True),
        Column(("all-to-all", ""), [candidate.all_to_all for candidate in shown], words=True),
        Column(("messages", "inside"), [f"{number:,.0f}" for number, _ in messages], rank=5),
        Column(("messages", "between"), [f"{number:,.0f}" for _, number in messages]),
        Column(("MiB sent", "inside"), [rounded(number / 2**20) for number, _ in sent], rank=5),
        Column(("MiB sent", "between"), [rounded(number / 2**20) for _, number in sent], rank=5),
        milliseconds("exchange", "inside", "between", "copy", "call", "sharing"),
        milliseconds("experts", "experts"),
        milliseconds("time", *TERMS),
        gibibytes("weights", "weights"),
        gibibytes("training", "gradients", "optimizer"),
        gibibytes("rows", "activations", "staging"),
        gibibytes("memory", *RankMemory._fields),
        Column(("tokens", "a second"), [scaled(num_tokens(c, workload) / c.seconds, "") for c in shown], rank=3),
    ]


def most_of_layers(candidate: Candidate, name: str) -> tuple[float, float]:
    """Messages or bytes, inside nodes and between, of the layer that has most."""
    numbers = [getattr(option.exchange, name) for option in candidate.options.values()]
    return max(inside for inside, _ in numbers), max(between for _, between in numbers)


def num_tokens(candidate: Candidate, workload: Workload) -> int:
    """Tokens that go through the layers in its seconds: as many as all ranks have room for."""
    return candidate.topologies[0].world_size * workload.tokens


def verdict(fitting: Sequence[Candidate], workload: Workload, machine: Machine) -> str:
    """The best layout, and what it does better than the next."""
    best = fitting[0]
    tokens = num_tokens(best, workload)
    sentence = f"Take {in_words(best)}: {rounded(best.seconds * 1e3)} ms for {tokens:,} tokens"
    others = [candidate for candidate in fitting if candidate.topologies != best.topologies]
    if not others:
        longest = max(best.terms, key=lambda name: best.terms[name])
        return f"{sentence}, {best.terms[longest] / best.seconds:.0%} of them for {TERMS[longest]}."
    second = others[0]
    longer = second.seconds / best.seconds
    if longer == 1:
        return f"{sentence}. {in_words(second)} takes as long and needs no less memory."
    much = f"{rounded(longer)} times as long" if longer >= 2 else f"{rounded(100 * (longer - 1))} % longer"
    gains = {name: second.terms[name] - best.terms[name] for name in TERMS}
    largest = max(gains, key=lambda name: gains[name])
    return (
        f"{sentence}. The next layout, {in_words(second)}, takes {much}, as it spends {rounded(1e3 * gains[largest])} "
        f"ms more on {TERMS[largest]}."
    )


def assumptions(options: argparse.Namespace, workload: Workload, config: Config | None) -> list[str]:
    """What the figures are made of."""
    overlap = "Exchange and experts do not overlap."
    if options.overlap:
        overlap = f"{options.overlap:.0%} of the shorter of exchange and experts is hidden behind the longer."
    time = ASSUMED.format(overlap=overlap, flops=scaled(options.flops, ""), bandwidth=scaled(options.bandwidth, ""))
    memory = ASSUMED_MEMORY[workload.mode].format(workload.dtype_bytes, f"{options.optimizer_bytes:g}")
    beside = "of the whole model" if config is not None else "activations of other layers are left out"
    notes = [PASSES_IN_WORDS[workload.mode] + time, f"{memory}; {beside}."]
    if options.links is None:
        notes.append(ASSUMED_LINKS)
    return notes


def as_json(candidate: Candidate, workload: Workload, on_front: bool) -> dict[str, object]:
    """Its entry in the list of --json. Seconds: for the tokens of all ranks; of a layer: for one round."""
    layers = []
    for experts, option in candidate.options.items():
        topology = {name: size for name, size in asdict(option.topology).items() if size != 1}
        layers.append(
            {
                "experts": experts,
                "layers": candidate.layers[experts],
                "topology": topology,
                "all_to_all": option.all_to_all,
                "messages": option.exchange.messages,
                "bytes": option.exchange.bytes,
                "seconds": option.seconds,
                "terms": option.terms,
            }
        )
    return {
        "seconds": candidate.seconds,
        "tokens_per_second": num_tokens(candidate, workload) / candidate.seconds,
        "terms": candidate.terms,
        "memory": {**candidate.memory._asdict(), "total": candidate.memory.total},
        "front": on_front,
        "layers": layers,
    }
