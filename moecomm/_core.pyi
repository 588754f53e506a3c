import numpy as np
from numpy.typing import NDArray

def copy_blocks(
    dst: NDArray[np.uint8],
    src: NDArray[np.uint8],
    order: NDArray[np.int64],
    rows: NDArray[np.int64] | None,
    row_bytes: int,
) -> None: ...
