"""The sizes of language models: those of the DeepSpeed-MoE paper, and small ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moecomm.nn.linear import Activation, check_activation
from moecomm.nn.pyramid import pyramid
from moecomm.nn.seeds import Portion


@dataclass(frozen=True)
class Config:
    """A GPT-like model with experts in every other layer: layers 2, 4, 6 ...

    experts          of each of these layers, num_layers // 2 of them; 0: dense. (): a dense model
    residual         "none": MoE. "sum", "learned": ResidualMoE, which needs top_k 1
    normalize        "selected": a token's weights add up to 1, as in DeepSpeed's top-2; "none": they are its scores, as
                     in its top-1
    capacity_factor  as for MoE; None: nothing is dropped
    eval_capacity_factor  in evaluation
    aux_loss         how much of each layer's load-balancing loss, and
    z_loss           of its z-loss, is added to the model's
    std              of the first weights

    Raises ValueError for sizes that do not fit together.
    """

    num_layers: int
    hidden: int
    heads: int
    experts: tuple[int, ...] = ()
    top_k: int = 1
    residual: Literal["none", "sum", "learned"] = "none"
    vocabulary: int = 51200
    context: int = 2048
    activation: Activation = "gelu"
    capacity_factor: float | None = None
    aux_loss: float = 0.01
    z_loss: float = 0.0
    std: float = 0.02
    normalize: Literal["none", "selected"] = "none"
    eval_capacity_factor: float | None = None

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"Config: hidden is {self.hidden}, which {self.heads} heads cannot share")
        if self.experts and len(self.experts) != self.num_layers // 2:
            raise ValueError(
                f"Config: experts has {len(self.experts)} entries, expected {self.num_layers // 2}: one for every "
                f"second of {self.num_layers} layers"
            )
        check_activation("Config", self.activation)
        known = {
            "residual": ("none", "sum", "learned"),
            "normalize": ("none", "selected"),
        }
        for name, kinds in known.items():
            if getattr(self, name) not in kinds:
                expected = ", ".join(map(repr, kinds[:-1]))
                raise ValueError(f"Config: {name} is {getattr(self, name)!r}, expected {expected} or {kinds[-1]!r}")
        # The one expert corrects the MLP; the answers of several would have to be weighed against it.
        if self.residual != "none" and self.top_k != 1:
            raise ValueError(f"Config: top_k is {self.top_k}, expected 1 with residual={self.residual!r}")

    @property
    def ffn(self) -> int:
        """Inner width of every feed-forward layer and expert."""
        return 4 * self.hidden

    def experts_of(self, layer: int) -> int:
        """How many experts a layer has, counted from 0; 0: it is dense."""
        return self.experts[layer // 2] if layer % 2 and self.experts else 0

    def layers_of(self, stage: int, num_stages: int, function: str) -> range:
        """The layers of a pipeline stage. Raises ValueError if the stages cannot share them. function: that asks."""
        if self.num_layers % num_stages:
            raise ValueError(f"{function}: {self.num_layers} layers, which pipeline={num_stages} stages cannot share")
        count = self.num_layers // num_stages
        return range(stage * count, (stage + 1) * count)

    def num_parameters(self) -> int:
        """Of the whole model, with tied input and output embeddings. Arithmetic: nothing is allocated."""
        total = self.num_in_ends()
        for layer in range(self.num_layers):
            # Each expert has a row of the gate.
            experts = self.experts_of(layer) * (self.num_in_expert() + self.hidden)
            total += self.num_dense(layer) + experts
        return total

    def num_in_ends(self, stage: int = 0, num_stages: int = 1) -> int:
        """Parameters of a pipeline stage outside its layers: embeddings of tokens and positions, and the last norm."""
        rows = 0
        if stage == 0:
            rows += self.context
        # Both ends have the embedding: it is the matrix of the logits, too.
        if stage in (0, num_stages - 1):
            rows += self.vocabulary
        if stage == num_stages - 1:
            rows += 2
        return rows * self.hidden

    def num_dense(self, layer: int, tensor: int = 1) -> int:
        """Parameters of a layer on each of so many tensor ranks, without its experts and gate."""
        h = self.hidden
        # Slices of four matrices and of the biases of three; whole are the fourth bias and two norms.
        total = (4 * h + 3) * h // tensor + 5 * h
        experts = self.experts_of(layer)
        if not experts or self.residual != "none":
            total += self.num_in_mlp(tensor)
        if experts and self.residual == "learned":
            total += 2 * h + 2
        return total

    def num_in_mlp(self, tensor: int = 1) -> int:
        """Parameters of a dense feed-forward layer on each of so many ranks."""
        matrices = 3 if self.activation == "swiglu" else 2
        # Of the biases the last is whole on each rank.
        return (matrices * (self.hidden + 1) - 1) * (self.ffn // tensor) + self.hidden

    def num_in_expert(self, portion: Portion = (0, 1)) -> int:
        """Parameters of slice i of n of an expert, portion = (i, n)."""
        number, slices = portion
        if self.activation == "swiglu":
            return 3 * self.hidden * (self.ffn // slices)
        # Slice 0 alone has the bias of the answer.
        return (2 * self.hidden + 1) * (self.ffn // slices) + self.hidden * (number == 0)


_350M = Config(24, 1024, 16)
_1_3B = Config(24, 2048, 16)
_SMALL = Config(4, 64, 4, (4, 8), residual="sum", vocabulary=256, context=128)

CONFIGS = {
    "350m-moe-128": replace(_350M, experts=pyramid(12, 128, "standard")),
    "1.3b-moe-128": replace(_1_3B, experts=pyramid(12, 128, "standard")),
    "350m-pr-moe-32-64": replace(_350M, experts=pyramid(12, 32), residual="sum"),
    "1.3b-pr-moe-64-128": replace(_1_3B, experts=pyramid(12, 64), residual="sum"),
    "350m-pr-moe-mos-21": replace(_350M, num_layers=21, experts=pyramid(10, 32), residual="sum"),
    "1.3b-pr-moe-mos-21": replace(_1_3B, num_layers=21, experts=pyramid(10, 64), residual="sum"),
    "6.7b": Config(32, 4096, 32),
    "tiny": replace(_SMALL, hidden=16, heads=2, context=32),
    "small": _SMALL,
    "small-top-2": replace(_SMALL, residual="none", top_k=2, normalize="selected"),
    "medium": Config(8, 512, 8, pyramid(4, 8), residual="sum", vocabulary=256, context=512),
    "medium-top-2": Config(
        8,
        512,
        8,
        pyramid(4, 8),
        top_k=2,
        normalize="selected",
        vocabulary=256,
        context=512,
    ),
}
"""By name. The first six are the paper's, in its order, then the dense model that it sets beside the second one; the
others read bytes."""


def config_named(name: str) -> Config:
    """CONFIGS[name]. Raises ValueError that says the known names."""
    if name not in CONFIGS:
        raise ValueError(f"config is {name!r}, expected one of {', '.join(CONFIGS)}")
    return CONFIGS[name]
