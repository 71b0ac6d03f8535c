"""Makes quant/: blocks of every format with the values the `gguf` Python package gives them.

    pip install gguf numpy && python crates/kernels/goldens/quant.py

NAME.blocks are block bytes (random codes, sane scales); NAME.values the f32 they decode to.
quantize.values are f32 inputs; quantize.NAME.blocks the bytes they encode to.
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

OUT = Path(__file__).parent / "quant"
rng = np.random.default_rng(7)

# Byte offsets of the half-precision numbers of a block.
HALVES = {
    T.F16: [0], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
}


def blocks(kind: T) -> np.ndarray:
    block_len, block_bytes = GGML_QUANT_SIZES[kind]
    n = 4 if block_len == 256 else 8 if block_len == 32 else 256
    if kind in (T.F32, T.BF16):
        f32 = rng.normal(0, 1, n).astype("<f4").view("<u4")
        return (f32 if kind == T.F32 else (f32 >> 16).astype("<u2")).view(np.uint8)
    raw = rng.integers(0, 256, (n, block_bytes), dtype=np.uint8)
    for at in HALVES[kind]:
        raw[:, at:at + 2] = rng.normal(0, 0.1, (n, 1)).astype("<f2").view(np.uint8)
    return raw.reshape(-1)


def inputs() -> np.ndarray:
    rows = [rng.normal(0, 0.05, 32) for _ in range(24)]
    rows += [np.zeros(32), np.full(32, 0.25), -np.full(32, 3.0), np.arange(32) - 15.5]
    rows += [np.linspace(-1, 1, 32), rng.normal(0, 1e-6, 32), rng.normal(0, 1e4, 32)]
    rows += [np.where(np.arange(32) == 5, -7.0, 7.0)]
    return np.concatenate(rows).astype("<f4")


OUT.mkdir(exist_ok=True)
for kind in [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0,
             T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K]:
    raw = blocks(kind)
    if kind == T.F32:
        values = raw.view("<f4")
    elif kind == T.F16:
        values = raw.view("<f2").astype("<f4")
    else:
        values = dequantize(raw, kind)
    raw.tofile(OUT / f"{kind.name}.blocks")
    values.astype("<f4").tofile(OUT / f"{kind.name}.values")

x = inputs()
x.tofile(OUT / "quantize.values")
for kind in [T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1]:
    quantize(x, kind).view(np.uint8).tofile(OUT / f"quantize.{kind.name}.blocks")
