"""route: from a gate's logits to the expert, the weight and the row of each assignment."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from moecomm.arrays import Array, dtype_name
from moecomm.gating import host
from moecomm.gating.choices import DROPS, NOISES, NORMALIZATIONS, SCORES, UNUSABLE, Choices, Inputs
from moecomm.gating.routing import Generator, Noise, Routing

DTYPES = ("float32", "float16", "bfloat16")
NUMBERS = "?bBhHiIlLqQefdFD"
"""The dtypes of numpy, by their characters, that the kernels take."""
MAX_EXPERTS = 1024
MAX_CHOICES = 32
LEAST_SCALE = 2.0**-126
MOST_SCALE = (2 - 2.0**-23) * 2.0**127
MOST_NOISE = 1e30
"""Noise is up to 17 times as large, and stays finite in float32."""


def route(
    logits: Array,
    top_k: int,
    *,
    expert: Array | None = None,
    score: Literal["softmax", "sigmoid"] = "softmax",
    bias: Array | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    best_in_group: Literal[1, 2] = 2,
    normalize: Literal["none", "selected"] = "none",
    scale: float = 1.0,
    capacity: int | None = None,
    drop: Literal["position", "choice", "probability", "random"] = "position",
    mask: Array | None = None,
    noise: Noise | None = None,
    generator: Generator | None = None,
    align: int = 1,
    unusable: Literal["raise", "note"] = "raise",
    threads: int = 1,
) -> Routing:
    """Send each token to its top_k experts. One function for every K; every option goes with every other.

    logits      [T, E] float32, float16 or bfloat16, numpy or torch; E <= 1024; -inf: not this expert,
                unless fewer than K are left: then it is chosen with weight 0 and takes a place
    top_k       K, 1 .. min(E, 32). Ties go to the lower expert
    expert      [T, K] int32 or int64: nothing is chosen, these experts are taken, such as those that an earlier pass
                recorded; -1: none. Weights and losses follow from logits. What selects must be left out: bias, groups,
                noise
    score       of an expert for a token: softmax over the token's logits, or sigmoid of its logit
    bias        [E] float32, added to the scores for the selection alone (DeepSeek-V3's load balancing)
    num_groups  the experts are so many groups of neighbours; a token chooses within the top_groups of them whose best
    top_groups  scores (+ bias) have the largest sum. Needs num_groups to divide E, and K experts in top_groups
    best_in_group  how many scores of a group are added: its 2 best (DeepSeek-V3) or the 1 best (DeepSeek-V2)
    normalize   "selected": divide a token's weights by the sum of the scores it kept, after drops
    scale       factor of all weights
    capacity    the most assignments that an expert keeps; None: all. Rows are then [E, capacity], see `expert_capacity`
    drop        who stays where too many come, "position": the first ones, token by token; "choice": all first choices,
                then all second ones (GShard); "probability": the largest scores; "random": drawn from generator
    mask        [T] bool, False: padding; such a token goes nowhere and counts nowhere
    noise       randomises the selection; needs generator
    generator   the only source of randomness
    align       without a capacity, each expert's rows start at a multiple of it
    unusable    what NaN or +inf in logits, and ids in expert that cannot be, do on the CPU, "raise": a ValueError.
                "note": as on a GPU, they are noted in the Routing's status, here with every assignment dropped. For
                ranks that share experts: `dispatch` of such a Routing raises on all of them, where one that raised
                alone would be waited for
    threads     on the CPU, at most; the result does not depend on it. 1 suits one rank a core, as under MPI
    returns     a Routing of logits' kind and device, with slots in token order (drop="choice": in order of choice,
                then token)

    The same logits give the same Routing on every rank and run, on CPU and GPU: integers exactly, floats to rounding.
    Differentiable in logits, through weight, aux_loss and z_loss. Not collective. Raises ValueError or TypeError for
    arguments that do not fit; on the CPU also for NaN or +inf in logits, see `unusable` and `Routing.check`, and for
    ids in expert that are no expert's or stand twice in a token.
    Source: Shazeer et al. 2017 (arXiv 1701.06538); GShard (2006.16668); DeepSpeed-MoE (2201.05596), section 5.4.
    """
    inputs, choices = request(
        logits,
        top_k,
        expert=expert,
        bias=bias,
        mask=mask,
        noise=noise,
        generator=generator,
        score=score,
        num_groups=num_groups,
        top_groups=top_groups,
        best_in_group=best_in_group,
        normalize=normalize,
        scale=scale,
        capacity=capacity,
        drop=drop,
        align=align,
        unusable=unusable,
        threads=threads,
    )
    if isinstance(logits, np.ndarray):
        fields = host.route(inputs, choices)
    else:
        # torch is imported when the first tensor comes, so that numpy is enough for everybody else.
        from moecomm.gating import ops

        fields = ops.call(ops.route, inputs, choices)
    return Routing(*fields, capacity)


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, *, factor: float = 1.0, least: int = 4) -> int:
    """Rows for each expert: max(ceil(num_tokens / num_experts * factor * top_k), least), DeepSpeed's formula.

    num_tokens  T, of this rank
    factor      how many times its even share an expert can take
    """
    if num_tokens < 0 or num_experts < 1 or top_k < 1 or least < 0 or not 0 <= factor < math.inf:
        raise ValueError(
            f"expert_capacity: got num_tokens {num_tokens}, num_experts {num_experts}, top_k {top_k}, factor {factor}, "
            f"least {least}; expected num_experts and top_k >= 1, the others >= 0"
        )
    # In DeepSpeed's order of operations: another one may round to another integer.
    return max(math.ceil(num_tokens / num_experts * (factor * top_k)), least)


# ---- checks: the kernels trust what these functions let through -----------------------------------------------------


def request(
    logits: Array,
    top_k: int,
    *,
    expert: Array | None,
    bias: Array | None,
    mask: Array | None,
    noise: Noise | None,
    generator: Generator | None,
    **options: Any,
) -> tuple[Inputs, Choices]:
    """The arguments of `route` as the kernels take them. options: the fields of Choices that have the same name.

    Raises ValueError or TypeError, in the words of the caller, for what `route` cannot do.
    """
    # In an order in which each check may rely on those before it.
    num_tokens, num_experts = _logits_shape(logits)
    if noise is not None and not isinstance(noise, Noise):
        raise TypeError(f"route: noise is {noise!r}, expected a Noise or None")
    is_random = noise is not None or options.get("drop") == "random"
    if (is_random or generator is not None) and not isinstance(generator, Generator):
        raise TypeError(f"route: generator is {generator!r}, expected a Generator for noise or drop='random'")
    seed, offset, step = _counter(generator, logits)
    choices = Choices(
        top_k,
        noise="none" if noise is None else noise.kind,
        noise_scale=0.0 if noise is None else noise.scale,
        seed=seed,
        offset=offset,
        **options,
    )
    _check_words(choices)
    _check_experts(choices, num_experts)
    _check_numbers(choices)
    _check_size(choices, num_tokens, num_experts)
    inputs = Inputs(
        contiguous("route: logits", logits),
        _beside("bias", bias, logits, "float32", num_experts),
        _beside("mask", mask, logits, "bool", num_tokens),
        step,
    )
    if expert is not None:
        inputs = _with_recorded(inputs, choices, expert)
    return inputs, choices


def _with_recorded(inputs: Inputs, choices: Choices, expert: Array) -> Inputs:
    """The inputs and the recorded experts, int32 as the kernels take them. On the CPU the kernel checks the ids."""
    if inputs.bias is not None or choices.num_groups > 1 or choices.noise != "none":
        raise ValueError(
            "route: expert is given, so nothing is selected: expected no bias, no noise and num_groups = 1"
        )
    logits = inputs.logits
    num_tokens, num_experts = logits.shape
    _check_beside("expert", expert, logits)
    if dtype_name(expert) not in ("int32", "int64") or tuple(expert.shape) != (num_tokens, choices.top_k):
        raise ValueError(
            f"route: expert is {dtype_name(expert)} {tuple(expert.shape)}, expected int32 or int64 "
            f"{(num_tokens, choices.top_k)}, [T, K]"
        )
    # An id that int32 cannot hold must not become the id of an expert: it stays just outside the range.
    recorded = expert.clip(-2, num_experts)
    live = None if inputs.mask is None else inputs.mask.sum()
    if isinstance(recorded, np.ndarray):
        live = None if live is None else np.asarray(live, np.int64)
        return inputs._replace(recorded=np.ascontiguousarray(recorded, np.int32), live=live)
    import torch

    return inputs._replace(recorded=recorded.to(torch.int32).contiguous(), live=live)


def _check_words(choices: Choices) -> None:
    for name, known in (
        ("score", SCORES),
        ("normalize", NORMALIZATIONS),
        ("drop", DROPS),
        ("unusable", UNUSABLE),
    ):
        word = getattr(choices, name)
        if word not in known:
            raise ValueError(f"route: {name} is {word!r}, expected {' or '.join(map(repr, known))}")


def _check_experts(choices: Choices, num_experts: int) -> None:
    """top_k experts can be chosen within top_groups of the num_groups groups."""
    top_k, num_groups, top_groups = choices.top_k, choices.num_groups, choices.top_groups
    _within("top_k", top_k, 1, min(num_experts, MAX_CHOICES))
    _within("num_groups", num_groups, 1, num_experts)
    _within("top_groups", top_groups, 1, num_groups)
    _within("best_in_group", choices.best_in_group, 1, 2)
    if num_experts % num_groups or top_k > num_experts // num_groups * top_groups:
        raise ValueError(
            f"route: {num_experts} experts in {num_groups} groups, {top_k} chosen within {top_groups} of them: "
            "expected groups of one size, with top_k experts or more in top_groups of them"
        )


def _check_numbers(choices: Choices) -> None:
    if not LEAST_SCALE <= _number("scale", choices.scale) <= MOST_SCALE:
        raise ValueError(f"route: scale is {choices.scale}, expected a number > 0 that float32 can hold")
    # With a capacity all experts have as many rows, and there is nothing to align.
    _within("align", choices.align, 1, 2**20 if choices.capacity is None else 1)
    _within("threads", choices.threads, 1, 1024)
    if choices.capacity is not None:
        _within("capacity", choices.capacity, 0, 2**31 - 1)
    most = 1 if choices.noise == "jitter" else MOST_NOISE
    if choices.noise not in NOISES or not 0 <= _number("noise.scale", choices.noise_scale) <= most:
        raise ValueError(
            f"route: noise is Noise({choices.noise!r}, {choices.noise_scale}), "
            f"expected Noise('gumbel', 0 .. {MOST_NOISE}) or ('jitter', 0 .. 1)"
        )


def _check_size(choices: Choices, num_tokens: int, num_experts: int) -> None:
    # The tables are int32: assignments and rows are counted in them.
    rows = choices.num_rows(num_tokens, num_experts)
    if max(num_tokens * choices.top_k, rows) >= 2**31:
        raise ValueError(
            f"route: {num_tokens} tokens, top_k {choices.top_k} and {rows} rows are too many, expected < 2**31"
        )


def contiguous(name: str, array: Array) -> Array:
    """array, or a copy of it where its numbers lie apart. Raises TypeError for numpy arrays of other than numbers."""
    if not isinstance(array, np.ndarray):
        return array.contiguous()
    # numpy would take a masked array for a plain one, and the masked numbers for good ones.
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost, expected a plain one")
    if array.dtype.char not in NUMBERS or not array.dtype.isnative:
        raise TypeError(f"{name} has dtype {array.dtype}, expected native numbers (no long double) or bools")
    return np.ascontiguousarray(array)


def _logits_shape(logits: Array) -> tuple[int, int]:
    if not hasattr(logits, "shape") or not hasattr(logits, "dtype"):
        raise TypeError(f"route: logits is a {type(logits).__name__}, expected a numpy array or a torch tensor")
    if dtype_name(logits) not in DTYPES:
        raise TypeError(f"route: logits has dtype {dtype_name(logits)}, expected {', '.join(DTYPES)}")
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= MAX_EXPERTS:
        raise ValueError(f"route: logits has shape {tuple(logits.shape)}, expected [T, E] with 1 <= E <= {MAX_EXPERTS}")
    return logits.shape[0], logits.shape[1]


def _within(name: str, value: Any, least: int, most: int) -> None:
    # bool is an int to Python: threads=True is a mistake all the same.
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"route: {name} is {value!r}, expected an int")
    if not least <= value <= most:
        raise ValueError(f"route: {name} is {value}, expected {least} .. {most}")


def _number(name: str, value: Any) -> Any:
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise TypeError(f"route: {name} is {value!r}, expected a number")
    return value


def _beside(name: str, array: Any, logits: Array, dtype: str, length: int) -> Any:
    """array, contiguous, if it is [length] of that dtype, of logits' kind and on its device."""
    if array is None:
        return None
    # Nothing is converted: a mask of ints or a bias in float64 may be meant for something else.
    _check_beside(name, array, logits)
    if tuple(array.shape) != (length,) or dtype_name(array) != dtype:
        raise ValueError(f"route: {name} is {dtype_name(array)} {tuple(array.shape)}, expected {dtype} ({length},)")
    return contiguous(f"route: {name}", array)


def _check_beside(name: str, array: Any, logits: Array) -> None:
    """array is of logits' kind and on its device."""
    if isinstance(array, np.ndarray) != isinstance(logits, np.ndarray) or not hasattr(array, "shape"):
        raise TypeError(f"route: {name} is a {type(array).__name__}, expected a {type(logits).__name__} as logits is")
    if not isinstance(array, np.ndarray) and array.device != logits.device:
        raise ValueError(f"route: {name} is on {array.device}, expected {logits.device} as logits is")


def _counter(generator: Generator | None, logits: Array) -> tuple[int, int, Array | None]:
    """The seed, the offset as an int, and what the kernel adds to it from a tensor."""
    if generator is None:
        return 0, 0, None
    offset = generator.offset
    step = None
    if hasattr(offset, "device"):
        # The value must not be read now: that would wait for the device, and a CUDA graph would keep it for ever.
        step = offset
        offset = 0
        if dtype_name(step) != "int64" or step.numel() != 1 or step.device != logits.device:
            raise ValueError(f"route: generator.offset is {step!r}, expected one int64 on {logits.device}")
    _within("generator.seed", generator.seed, 0, 2**63 - 1)
    _within("generator.offset", offset, 0, 2**63 - 1)
    return generator.seed, offset, step
