"""Tiles of the Gram matrix and of the small products behind it, as functions of the sizes alone."""

from __future__ import annotations

from .config import GemmConfig, PassConfig
from .passes import ceil_div, next_power_of_2
from .split import ELEMENT_BYTES

FLUSH_ROWS = 512
"""Rows that one accumulator takes up before it is added to another."""
MIN_STEPS = 4
"""Steps of the shortest part worth a program of its own."""


def has_pivot(dtype: str) -> bool:
    """Whether the Gram kernel subtracts a pivot: of all data but bfloat16's, whose digits its sums hold anyway."""
    return dtype != "bfloat16"


def is_centred(dtype: str) -> bool:
    """Whether the gradients subtract means on load: of wide data, whose every digit counts."""
    return ELEMENT_BYTES.get(dtype, 2) > 2


def gram_tiles(p: int, block_n: int) -> int:
    """Tiles of the upper triangle, the diagonal included."""
    tiles = ceil_div(p, block_n)
    return tiles * (tiles + 1) // 2


def gram_config(
    rows: int,
    p: int,
    sm_count: int = 132,
    *,
    itemsize: int = 2,
    group_products: bool = False,
    pivots: bool = False,
    interpreter: bool = False,
) -> GemmConfig:
    """The Gram matrix of ``rows`` x ``p``: square tiles ``block_m`` = ``block_n``, ``block_k`` rows at a time.

    ``split`` fills the processors once. The partials, written and read once, stay below a quarter of the input,
    unless that would leave processors idle. ``group_products``: the target's; with them longer steps fit the registers.
    ``pivots``: of 16-bit data; beside a pivot's registers long steps would leave fewer programs.
    """
    most = 128 if itemsize == 2 else 64
    block_n = min(max(next_power_of_2(p), 16), most)
    if interpreter:
        return GemmConfig(block_n, block_n, 128, split=max(1, min(2, rows // 128)))
    # Registers decide: the steps that do not spill beside two accumulators, and the programs that an SM then holds.
    tiles = gram_tiles(p, block_n)
    block_k = 16 if itemsize > 2 else 64 if not pivots and (block_n <= 64 or group_products) else 32
    programs = (3 if block_n <= 64 else 1) * sm_count
    affordable = rows * p * itemsize // (4 * 4 * tiles * block_n * block_n)
    split = min(max(affordable, sm_count // tiles), programs // tiles, ceil_div(rows, block_k) // MIN_STEPS)
    warps = 8 if block_n > 64 or itemsize > 2 else 4  # wide data has accumulators of 64 bits
    stages = 4 if block_k == 64 else 6
    return GemmConfig(block_n, block_n, block_k, num_warps=warps, num_stages=stages, split=max(1, split))


def gram_finalize_config(p: int, *, parts: int = 0, wide: bool = False, interpreter: bool = False) -> GemmConfig:
    """V = W Cov: few output channels a program, for many programs; rows of Cov as wide as registers allow.

    ``parts``: bfloat16 products, which need fewer of them; ``wide``: those of float64, which need more.
    """
    if interpreter:
        block_n = min(max(next_power_of_2(p), 16), 64)
        return GemmConfig(64, block_n, block_n)
    block_n = min(max(next_power_of_2(p), 16), 256 if parts else 64 if wide else 128)
    return GemmConfig(16, block_n, min(8192 // block_n, block_n, 32 if wide else 64), num_warps=8, num_stages=3)


def gram_rows_config(p: int, *, interpreter: bool = False) -> PassConfig:
    """The row sums of backward: whole rows of W [q, p] up to 512 wide, ``block_m`` of them a program."""
    block_c = min(next_power_of_2(p), 512)
    return PassConfig(block_m=64 if interpreter else 8, block_c=block_c)


def gram_product_config(p: int, *, interpreter: bool = False) -> GemmConfig:
    """P = Wᵀ(S∘A∘W): small tiles, whose number is all the parallelism there is."""
    if interpreter:
        return GemmConfig(64, 64, 64)
    return GemmConfig(32, 32, 64, num_warps=4, num_stages=4)


def gram_reduce_config(split: int) -> PassConfig:
    """The sum over the Gram matrix's parts: ``block_m`` of them at once, most often all, ``block_c`` elements each."""
    block_m = min(next_power_of_2(split), 512)
    block_c = max(16, 2048 // block_m)
    return PassConfig(block_m, block_c, num_warps=max(4, block_m * block_c // 1024))


def gram_bias_config(p: int, *, interpreter: bool = False) -> PassConfig:
    """Column sums of A∘W and P: few columns a program, and so many rows at once that two or three steps do."""
    return PassConfig(block_m=512, block_c=min(next_power_of_2(p), 64 if interpreter else 16), num_warps=8)
