"""What `plan` prints of the layouts: the table, the choice and its reason, what was assumed, JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from moecomm.cli.tables import Column, paragraph, rounded, scaled, text_table
from moecomm.cost import Candidate, Machine, RankMemory, Workload
from moecomm.draw.words import counted, layout_in_words, nodes_in_words, topology_in_words

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
EXCHANGES = {
    "flat": "the flat all-to-all",
    "hierarchical": "the hierarchical all-to-all",
    "shared": "the shared all-to-all",
    "relayed": "HierarchicalExchange",
}
"""What a program makes for each name in the column of all-to-alls."""
EXCHANGE_TERMS = ["inside", "between", "copy", "call", "sharing"]
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
ASSUMED_CHUNKS = """\
Two hops send in {} pieces, of which the hops of two overlap: a prediction, as HierarchicalAllToAll and \
HierarchicalExchange send in one piece."""
ASSUMED_LINKS = """\
The machine is assumed, not measured: moecomm.cost.GPU_NODES, 450 GB/s a GPU inside a node and 400 Gbit/s a GPU \
between nodes. --links takes measured figures. SharedAllToAll, for rows in host memory, is left out."""


def heading(machine: Machine, workload: Workload) -> str:
    """What is planned."""
    experts = counted(workload.experts[0], "expert")
    # One layer needs no number of layers.
    if len(workload.experts) > 1:
        layers = Counter(workload.experts)
        kinds = [f"{counted(number, 'layer')} of {count}" for count, number in layers.items()]
        experts = f"{', '.join(kinds)} experts"
    return (
        f"{nodes_in_words(machine.nodes)}; {counted(workload.tokens, 'token')} on a rank, hidden {workload.hidden:,}, "
        f"{experts}, top-{workload.top_k}; {workload.mode}"
    )


def tried(best_first: Sequence[Candidate], is_all: bool) -> str:
    """Which expert-parallel sizes there are, so that a number of experts that does not divide well is seen."""
    of_layers = []
    for experts in best_first[0].options:
        sizes = {candidate.options[experts].topology.expert for candidate in best_first}
        listed = ", ".join(map(str, sorted(sizes)))
        of_layers.append(f"{listed} for {counted(experts, 'expert')}")
    sentence = f"Expert-parallel sizes: {'; '.join(of_layers)}."
    return f"{sentence} No others are possible." if is_all else sentence


def in_words(candidate: Candidate) -> str:
    """Topology and all-to-all, of each kind of layer."""
    sentences = {}
    for experts, option in candidate.options.items():
        topology = topology_in_words(option.topology)
        sentences[experts] = f"{topology} with {EXCHANGES[option.all_to_all]}"
    # Where all layers have the same, one of them speaks for all.
    if len(set(sentences.values())) == 1:
        return next(iter(sentences.values()))
    return " and ".join(f"{sentence} for layers of {experts}" for experts, sentence in sentences.items())


# ---- the table -------------------------------------------------------------------------------------------------------


def layout_table(fitting: Sequence[Candidate], front: Sequence[Candidate], workload: Workload, wide: bool) -> str:
    """A line for each layout, the fastest first; not wide: the front, and the fastest beside it."""
    shown = list(fitting)
    if not wide:
        beaten = [candidate for candidate in fitting if candidate not in front]
        room = max(0, MOST_LINES - len(front))
        shown = [*front, *beaten[:room]]
        shown.sort(key=lambda candidate: candidate.sizes)
    table = text_table(layout_columns(shown, front, workload), wide)
    note = "> the best; * on the front: no other layout beats it in both time and memory"
    if any("relayed" in candidate.all_to_all for candidate in shown):
        note += "; relayed: HierarchicalExchange, a row for each token and node"
    hidden = len(fitting) - len(shown)
    if hidden:
        note += f"; {counted(hidden, 'more layout')} with --wide"
    return f"{table}\n{paragraph(note)}"


def layout_columns(shown: Sequence[Candidate], front: Sequence[Candidate], workload: Workload) -> list[Column]:
    """The columns of the table: what goes in, what is sent, time, memory."""
    marks = ["*" if candidate in front else "" for candidate in shown]
    marks[0] = ">"
    names = [layout_in_words(candidate.topologies) for candidate in shown]
    speeds = [num_tokens(candidate, workload) / candidate.seconds for candidate in shown]
    return [
        Column(("", ""), marks, words=True),
        Column(("layout", ""), names, words=True),
        Column(
            ("all-to-all", ""),
            [candidate.all_to_all for candidate in shown],
            words=True,
        ),
        Column(("nodes", ""), list(map(nodes_in_short, shown)), rank=2),
        *sent_columns(shown),
        # Time first loses its summands where the table is too wide, memory before that.
        milliseconds(shown, "exchange", EXCHANGE_TERMS, rank=1),
        milliseconds(shown, "experts", ["experts"], rank=1),
        milliseconds(shown, "time", list(TERMS)),
        gibibytes(shown, "weights", ["weights"], rank=4),
        gibibytes(shown, "training", ["gradients", "optimizer"], rank=4),
        gibibytes(shown, "rows", ["activations", "staging"], rank=4),
        gibibytes(shown, "memory", RankMemory._fields),
        Column(
            ("tokens", "a second"),
            [scaled(speed, "") for speed in speeds],
            rank=3,
        ),
    ]


def nodes_in_short(candidate: Candidate) -> str:
    """1/2: on how many nodes those lie that send to one another, in each kind of layer; 1 where that is the same."""
    numbers = [str(option.num_nodes) for option in candidate.options.values()]
    return "/".join(numbers) if len(set(numbers)) > 1 else numbers[0]


def sent_columns(shown: Sequence[Candidate]) -> list[Column]:
    """Messages and MiB inside nodes and between. A narrow table keeps messages between nodes: these cost most."""
    messages = [most_of_layers(candidate, "messages") for candidate in shown]
    sent = [most_of_layers(candidate, "bytes") for candidate in shown]
    columns = []
    for i, where in enumerate(("inside", "between")):
        cells = [f"{numbers[i]:,.0f}" for numbers in messages]
        columns.append(Column(("messages", where), cells, rank=0 if where == "between" else 5))
    for i, where in enumerate(("inside", "between")):
        cells = [rounded(numbers[i] / 2**20) for numbers in sent]
        columns.append(Column(("MiB sent", where), cells, rank=5))
    return columns


def milliseconds(shown: Sequence[Candidate], name: str, terms: Sequence[str], rank: int = 0) -> Column:
    """A column of the sum of some terms."""
    cells = []
    for candidate in shown:
        seconds = sum(candidate.terms[term] for term in terms)
        cells.append(rounded(1e3 * seconds))
    return Column((name, "ms"), cells, rank=rank)


def gibibytes(shown: Sequence[Candidate], name: str, kinds: Sequence[str], rank: int = 0) -> Column:
    """A column of the sum of some kinds of memory."""
    cells = []
    for candidate in shown:
        size = sum(getattr(candidate.memory, kind) for kind in kinds)
        cells.append(rounded(size / 2**30))
    return Column((name, "GiB"), cells, rank=rank)


def most_of_layers(candidate: Candidate, name: str) -> tuple[float, float]:
    """Messages or bytes, inside nodes and between, of the layer that has most."""
    numbers = [getattr(option.exchange, name) for option in candidate.options.values()]
    inside, between = map(max, zip(*numbers, strict=True))
    return inside, between


def num_tokens(candidate: Candidate, workload: Workload) -> int:
    """Tokens that go through the layers in its seconds: as many as all ranks have room for."""
    return candidate.topologies[0].world_size * workload.tokens


# ---- the choice and what it rests on ---------------------------------------------------------------------------------


def verdict(fitting: Sequence[Candidate], workload: Workload) -> str:
    """The best layout, and what it does better than the next."""
    best = fitting[0]
    tokens = num_tokens(best, workload)
    sentence = f"Take {in_words(best)}: {rounded(best.seconds * 1e3)} ms for {tokens:,} tokens"
    # The same groups with another all-to-all are no other layout.
    rivals = [candidate for candidate in fitting if candidate.topologies != best.topologies]
    if not rivals:
        longest = max(best.terms, key=lambda name: best.terms[name])
        share = best.terms[longest] / best.seconds
        return f"{sentence}, {share:.0%} of them for {TERMS[longest]}."
    rival = rivals[0]
    ratio = rival.seconds / best.seconds
    if ratio == 1:
        return f"{sentence}. {in_words(rival)} takes as long and needs no less memory."
    longer = f"{rounded(100 * (ratio - 1))} % longer"
    if ratio >= 2:
        longer = f"{rounded(ratio)} times as long"
    # The terms add up to the time, so in one of them the rival is slower.
    gains = {name: rival.terms[name] - best.terms[name] for name in TERMS}
    largest = max(gains, key=lambda name: gains[name])
    gain = rounded(1e3 * gains[largest])
    return (
        f"{sentence}. The next layout, {in_words(rival)}, takes {longer}, as it spends {gain} ms more on "
        f"{TERMS[largest]}."
    )


def assumptions(machine: Machine, workload: Workload, is_whole: bool, is_assumed: bool) -> list[str]:
    """What the figures are made of. is_whole: memory is the whole model's; is_assumed: nobody measured the links."""
    overlap = "Exchange and experts do not overlap."
    if machine.overlap:
        overlap = f"{machine.overlap:.0%} of the shorter of exchange and experts is hidden behind the longer."
    time = ASSUMED.format(
        overlap=overlap,
        flops=scaled(machine.flops, ""),
        bandwidth=scaled(machine.bandwidth, ""),
    )
    memory = ASSUMED_MEMORY[workload.mode].format(workload.dtype_bytes, f"{workload.optimizer_bytes:g}")
    beside = "of the whole model" if is_whole else "activations of other layers are left out"
    notes = [
        PASSES_IN_WORDS[workload.mode] + time,
        f"{memory}; {beside}.",
    ]
    if machine.chunks > 1:
        notes.append(ASSUMED_CHUNKS.format(machine.chunks))
    if is_assumed:
        notes.append(ASSUMED_LINKS)
    return notes


def as_json(candidate: Candidate, workload: Workload, on_front: bool) -> dict[str, object]:
    """Its entry in the list of --json. Seconds: for the tokens of all ranks; of a layer: for one round."""
    layers = []
    for experts, option in candidate.options.items():
        # A size of 1 is what a Topology has without the argument.
        topology = {name: size for name, size in asdict(option.topology).items() if size != 1}
        layers.append(
            {
                "experts": experts,
                "layers": candidate.layers[experts],
                "topology": topology,
                "all_to_all": option.all_to_all,
                "nodes": option.num_nodes,
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
