"""The dtypes of tensors in files and in computation, and their names."""

from __future__ import annotations

import torch

from stoker.parallel.shards import ITEM_BYTES

DTYPES = {  # by their names in safetensors files
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The compute dtypes by their names in configs. fp8 is bf16 with products of linear layers in float8.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
