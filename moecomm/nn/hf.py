"""What `parallelize` was is now `moecomm.integrations.transformers`, for all models of transformers."""

from __future__ import annotations

from typing import NoReturn


def parallelize(*arguments: object, **options: object) -> NoReturn:
    """Gone. Raises NotImplementedError, which names what to call."""
    raise NotImplementedError(
        "parallelize: gone. Call moecomm.integrations.transformers.register() and load the model by "
        "from_pretrained(name, distributed_config=DistributedConfig(fsdp_size=N, ep_size=N, "
        'ep_implementation="moecomm")) of transformers: docs/integrations.md'
    )
