"""torchtitan's small DeepSeek-V3 on two gloo processes, with its own token dispatcher and with moecomm's.

PYTHONPATH=build/torchtitan python tests/programs/train_torchtitan.py        what `make torchtitan` does

Both runs begin with the same weights and see the same tokens. It fails unless the losses of all steps agree.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
import torch.multiprocessing as mp

RANKS = 2
STEPS = 20
VOCABULARY = 2048
TOLERANCE = 1e-4  # both add in float32, each in its own order, and the experts' products are in bfloat16
COMMAND = f"""--module deepseek_v3 --config deepseek_v3_debugmodel
    --training.steps {STEPS} --training.local_batch_size 2 --training.seq_len 64 --training.disable_cuda_graphs
    --training.mixed_precision_param float32 --parallelism.expert_parallel_degree {RANKS}
    --parallelism.spmd_backend partial_dtensor --metrics.log_freq 1 --debug.seed 0"""
OVERRIDES = {"torchtitan": [], "moecomm": ["moecomm.integrations.torchtitan.dispatcher"]}


class Cpu:
    """torch.cpu, with what torchtitan asks of a module such as torch.cuda."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_device_name(self, _: Any = None) -> str:
        return "CPU"

    def get_device_properties(self, _: Any = None) -> Any:
        return SimpleNamespace(total_memory=1)

    def memory_stats(self, _: Any = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self) -> None:
        """There are none."""

    def empty_cache(self) -> None:
        """There is none."""


# torchtitan takes the device for one with CUDA where torch names none; it looks when it is imported.
torch._utils._get_available_device_type = lambda: "cpu"
torch._utils._get_device_module = lambda _: Cpu()

from torchtitan.config import ConfigManager, derive, override  # noqa: E402
from torchtitan.distributed import utils as distributed  # noqa: E402
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention  # noqa: E402


@override(target=FlexAttention.Config)
def attention(config: Any) -> Any:
    """FlexAttention has no backward pass on a CPU."""
    return derive(config, ScaledDotProductAttention.Config)


def batches(rank: int, shape: tuple[int, int]) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Tokens that are drawn from a few words, so that there is something to learn."""
    generator = torch.Generator().manual_seed(rank)
    while True:
        tokens = torch.randint(VOCABULARY // 64, (shape[0], shape[1] + 1), generator=generator)
        yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()


def train(rank: int, overrides: list[str], folder: Path) -> None:
    """Train on this rank; rank 0 writes [[loss, norm of the gradient] of each step]."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does where it makes the group

    imports = [f"{__name__}.attention", *overrides]
    arguments = [*COMMAND.split(), "--dump_folder", str(folder), "--override.imports", *imports]
    config = ConfigManager().parse_args(arguments)
    # The wheel has neither the text nor the tokenizer of the tests.
    config.tokenizer = SimpleNamespace(build=lambda **_: None)
    shape = (config.training.local_batch_size, config.training.seq_len)
    config.dataloader = SimpleNamespace(build=lambda dp_rank, **_: batches(dp_rank, shape))
    # Of torch 2.15 and later.
    distributed.set_pg_timeouts = lambda **_: None

    trainer = config.build()
    for module in trainer.model_parts[0].modules():
        # gloo has no sum with a factor.
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
    steps: list[tuple[float, float]] = []
    trainer.metrics_processor.log = lambda step, loss, most, norm, **_: steps.append((loss, norm))
    trainer.train()
    trainer.close()
    torch.distributed.destroy_process_group()
    if rank == 0:
        (folder / "steps.json").write_text(json.dumps(steps))


def main() -> int:
    """Train twice and compare; 0 if all losses agree."""
    runs = {}
    for name, overrides in OVERRIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(train, (overrides, Path(folder)), RANKS, start_method="spawn")
            runs[name] = json.loads(Path(folder, "steps.json").read_text())
    print("step   loss, torchtitan   loss, moecomm   gradients, torchtitan   gradients, moecomm")
    wrong = 0
    for step, (theirs, ours) in enumerate(zip(*runs.values(), strict=True), 1):
        print(f"{step:4} {theirs[0]:18.6f} {ours[0]:15.6f} {theirs[1]:23.6f} {ours[1]:20.6f}")
        wrong += abs(theirs[0] - ours[0]) > TOLERANCE
    print(f"{STEPS - wrong} passed, {wrong} failed")
    return int(wrong > 0 or len(runs["moecomm"]) != STEPS)


if __name__ == "__main__":
    sys.exit(main())
