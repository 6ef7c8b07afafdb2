"""How trainable tensors are grouped, so that it suits ZeRO and bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fastunlearn.models.parameter_names import is_small

# bitsandbytes counts elements in int32; half of that leaves room for padding.
MAX_GROUP_NUMEL = 2**30


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict]:
    """Split trainable parameters into groups: small tensors apart, and no group above ``MAX_GROUP_NUMEL`` elements."""
    small: list[nn.Parameter] = []
    large: list[list[nn.Parameter]] = [[]]
    filled = 0
    for _, parameter in named_parameters:
        if is_small(parameter.numel()):
            small.append(parameter)
            continue
        if filled + parameter.numel() > MAX_GROUP_NUMEL and large[-1]:
            large.append([])
            filled = 0
        large[-1].append(parameter)
        filled += parameter.numel()
    groups = [{"params": group, "name": f"matrices{i}", "bits": 8} for i, group in enumerate(large) if group]
    if small:
        groups.append({"params": small, "name": "small", "bits": 32})
    return groups


def split_note(groups: list[dict]) -> str | None:
    """A line for the user where ``MAX_GROUP_NUMEL`` made several groups out of one; None where it did not."""
    large = [sum(p.numel() for p in group["params"]) for group in groups if group["bits"] == 8]
    if len(large) < 2:
        return None
    sizes = ", ".join(f"{size:,}" for size in large)
    return f"optimizer: {len(large)} groups of {sizes} parameters, because a group may hold {MAX_GROUP_NUMEL:,}"
