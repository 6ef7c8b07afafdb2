"""Floating dtypes by the names that a configuration has for them, and by those that safetensors has."""

from __future__ import annotations

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}  # those of schema.fields.WeightDtype
SHORT_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SAFETENSORS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}
