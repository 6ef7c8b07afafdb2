"""Every attention backend computes the same: against diffusers' processor on whole U-Nets, and alone against fp64.

The rule for one kernel: its error against fp64 (a norm) is at most twice that of matrix products and softmax in the
same dtype.
What needs a GPU is in the same tables and skipped without one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from tiny import tiny_unet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastunlearn.acceleration import attention
from fastunlearn.acceleration.attention import (
    Sdpa,
    TokensFirst,
    UNetAttention,
    build_kernel,
    check_attention,
    install_attention,
)
from fastunlearn.errors import UserError
from fastunlearn.schema.attention_rules import CHOICES, attention_refusal
from fastunlearn.utils.dtypes import SHORT_NAMES

CPU = torch.device("cpu")
GPU_ONLY = ("sdpa-cudnn", "sdpa-efficient", "xformers", "flash3")
SIXTEEN_BIT_ON_GPU = ("sdpa-flash", "sdpa-cudnn", "flash3")
ON_CPU = ("auto", "sdpa", "sdpa-flash", "sdpa-math")
DTYPES = (torch.float32, torch.bfloat16)
# queries, keys, heads, width: SD 1.x has widths of 40, 80 and 160, SD 2.x and SDXL 64, and a prompt has 77 tokens.
SHAPES = [(1024, 1024, 2, 64), (256, 77, 3, 40), (63, 77, 2, 80), (64, 154, 1, 160), (1, 5, 2, 8), (127, 127, 1, 64)]
# What PyTorch's dispatcher calls for a pinned backend on the CPU.
CPU_KERNELS = {"sdpa-flash": "_scaled_dot_product_flash_attention_for_cpu", "sdpa-math": "bmm"}


def sd_unet(**changes: object) -> UNet2DConditionModel:
    """A tiny U-Net with the attention of SD 1.x; ``changes`` make it another's."""
    torch.manual_seed(3)
    settings: dict[str, object] = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, cross_attention_dim=16, norm_num_groups=4,
    )  # fmt: skip
    return UNet2DConditionModel(**(settings | changes))


UNETS: dict[str, Callable[[], UNet2DConditionModel]] = {
    "sdxl": tiny_unet,
    "sd1": sd_unet,
    "sd2": lambda: sd_unet(attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True),
    # only_cross_attention: the first attention of a block looks at the prompt as well
    "cross": lambda: sd_unet(only_cross_attention=True),
    # a spatial input with group norm, residual connection and rescaled output
    "spatial": lambda: sd_unet(
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        mid_block_scale_factor=2.0,
    ),
}  # fmt: skip


def run(unet: UNet2DConditionModel, masked: bool = False) -> tuple[Tensor, list[Tensor]]:
    """A prediction and the gradient of every parameter."""
    draw = torch.Generator().manual_seed(5)
    sample = torch.randn(2, 4, 8, 8, generator=draw)
    hidden = torch.randn(2, 5, 16, generator=draw)
    kwargs: dict = {"encoder_hidden_states": hidden}
    if unet.config["addition_embed_type"] == "text_time":
        pooled = torch.randn(2, 8, generator=draw)
        kwargs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.ones(2, 6)}
    if masked:
        kwargs["encoder_attention_mask"] = torch.tensor([[True, True, True, False, False], [True] * 5])
    unet.zero_grad()
    out = unet(sample, torch.tensor([3, 700]), return_dict=False, **kwargs)[0]
    (out * torch.randn(out.shape, generator=draw)).sum().backward()
    return out.detach(), [p.grad.clone() for p in unet.parameters() if p.grad is not None]


@pytest.mark.parametrize("choice", ON_CPU)
@pytest.mark.parametrize("kind", UNETS)
def test_unet_equals_diffusers_processor(kind: str, choice: str) -> None:
    unet = UNETS[kind]()
    unet.set_attn_processor(AttnProcessor2_0())
    expected, gradients = run(unet)
    install_attention(unet, choice)
    assert all(type(processor) is UNetAttention for processor in unet.attn_processors.values())
    got, got_gradients = run(unet)
    if choice in ("auto", "sdpa"):  # the same calls of PyTorch: the same bits
        assert torch.equal(got, expected)
        assert all(torch.equal(a, b) for a, b in zip(got_gradients, gradients, strict=True))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_gradients, gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", ["auto", "sdpa", "sdpa-math", "sdpa-flash"])
def test_a_mask_is_followed_or_refused(choice: str) -> None:
    unet = tiny_unet()
    unet.set_attn_processor(AttnProcessor2_0())
    expected, _ = run(unet, masked=True)
    assert not torch.allclose(expected, run(unet)[0], atol=1e-4)
    install_attention(unet, choice)
    if choice == "sdpa-flash":
        with pytest.raises(UserError, match="mask"):
            run(unet, masked=True)
        return
    torch.testing.assert_close(run(unet, masked=True)[0], expected, rtol=1e-5, atol=1e-5)


def layer_of(**settings: object) -> Attention:
    torch.manual_seed(1)
    layer = Attention(query_dim=32, heads=4, dim_head=8, **settings)  # SpatialNorm wants 32 channels
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


LAYERS: dict[str, dict[str, object]] = {
    "norm_cross": {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
    "qk_norm": {"qk_norm": "layer_norm"},
    "residual": {"residual_connection": True, "rescale_output_factor": 1.7, "norm_num_groups": 4, "bias": True},
    "spatial_norm": {"spatial_norm_dim": 4, "_from_deprecated_attn_block": True},
}


@pytest.mark.parametrize("kind", LAYERS)
def test_rare_settings_of_a_layer(kind: str) -> None:
    layer = layer_of(**LAYERS[kind])
    picture = torch.randn(2, 32, 4, 4)
    tokens = picture.flatten(2).transpose(1, 2).contiguous()
    context = torch.randn(2, 7, 12) if kind == "norm_cross" else None
    where = torch.randn(2, 4, 2, 2) if kind == "spatial_norm" else None
    given = picture if kind in ("residual", "spatial_norm") else tokens
    layer.set_processor(AttnProcessor2_0())
    expected = layer(given, encoder_hidden_states=context, temb=where)
    layer.set_processor(UNetAttention(Sdpa()))
    assert torch.equal(layer(given, encoder_hidden_states=context, temb=where), expected)


def test_a_layer_without_scaled_scores() -> None:
    """Which ``AttnProcessor2_0`` gets wrong, and the older processor right."""
    layer = layer_of(scale_qk=False)
    tokens = torch.randn(2, 9, 32)
    layer.set_processor(AttnProcessor())
    expected = layer(tokens)
    layer.set_processor(UNetAttention(Sdpa()))
    torch.testing.assert_close(layer(tokens), expected, rtol=1e-5, atol=1e-5)


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v on [B, N, H, D], in the dtype of its arguments."""
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), value)


def with_gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output, and the gradients of query, key and value."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs[:3]]
    out = attend(*leaves)
    out.backward(inputs[3].to(out.dtype))
    return [out.detach()] + [leaf.grad for leaf in leaves if leaf.grad is not None]


def cases() -> Iterator[object]:
    for choice in (*ON_CPU, *GPU_ONLY):
        for dtype in DTYPES:
            for shape in SHAPES:
                yield pytest.param(choice, dtype, shape, id=f"{choice}-{str(dtype)[6:]}-{'x'.join(map(str, shape))}")


@pytest.mark.parametrize(("choice", "dtype", "shape"), list(cases()))
def test_kernel_against_fp64(choice: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and choice in GPU_ONLY:
        pytest.skip("needs an NVIDIA GPU")
    if refusal := attention_refusal(choice, device.type, SHORT_NAMES[dtype], attention._capability(device)):
        pytest.skip(refusal)
    queries, keys, heads, width = shape
    if choice == "sdpa-cudnn" and width > 128:
        pytest.skip("cuDNN's limit for most GPUs; the trial at installation says so")
    sizes = [(2, n, heads, width) for n in (queries, keys, keys, queries)]
    inputs = [torch.randn(size, device=device).to(dtype) for size in sizes]
    reference = with_gradients(eager, [tensor.double() for tensor in inputs])
    plain = with_gradients(eager, inputs)
    kernel, _ = build_kernel(choice, device)
    got = with_gradients(lambda q, k, v: kernel(q, k, v, None, None), inputs)
    for name, ours, theirs, exact in zip(("out", "dq", "dk", "dv"), got, plain, reference, strict=True):
        assert ours.shape == exact.shape and ours.dtype == dtype
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm(), name


class Called(TorchDispatchMode):
    """The names of all operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("choice", CPU_KERNELS)
def test_the_pinned_backend_is_the_one_that_runs(choice: str) -> None:
    kernel, _ = build_kernel(choice, CPU)
    query = torch.randn(1, 16, 2, 8)
    with Called() as called:
        kernel(query, query, query, None, None)
    assert CPU_KERNELS[choice] in called.names
    assert not {name for other, name in CPU_KERNELS.items() if other != choice} & called.names


class FakeOps:
    """``xformers.ops`` as far as we use it: keeps what it is given, and computes it plainly."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, ...]] = []

    def memory_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: object = None, p: float = 0.0, scale: object = None
    ) -> Tensor:
        assert attn_bias is None and p == 0.0 and scale is None
        self.given.append((query, key, value))
        return eager(query, key, value)


@pytest.fixture
def fake_xformers(monkeypatch: pytest.MonkeyPatch) -> FakeOps:
    ops = FakeOps()
    package, module = ModuleType("xformers"), ModuleType("xformers.ops")
    package.__spec__ = ModuleSpec("xformers", None)
    module.memory_efficient_attention = ops.memory_efficient_attention  # type: ignore[attr-defined]
    package.ops = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    return ops


def test_xformers_gets_the_projections_themselves(fake_xformers: FakeOps) -> None:
    """[batch, tokens, heads, width] on the very memory that the projections wrote: nothing permuted, nothing copied."""
    unet = tiny_unet()
    unet.set_attn_processor(UNetAttention(build_kernel("xformers", CPU)[0]))
    projected: list[Tensor] = []
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            module.register_forward_hook(lambda _, __, out: projected.append(out))
    run(unet)
    given = [tensor for call in fake_xformers.given for tensor in call]
    assert len(given) == len(projected) > 0
    heads = {module.heads for module in unet.modules() if isinstance(module, Attention)}
    for tensor, source in zip(given, projected, strict=True):
        batch, tokens, channels = source.shape
        assert tensor.shape[:2] == (batch, tokens) and tensor.shape[2] in heads
        assert tensor.shape[2] * tensor.shape[3] == channels
        assert tensor.data_ptr() == source.data_ptr() and tensor.is_contiguous()


def test_gradients_flow_through_xformers(fake_xformers: FakeOps) -> None:
    unet = tiny_unet()
    unet.set_attn_processor(AttnProcessor2_0())
    expected, gradients = run(unet)
    unet.set_attn_processor(UNetAttention(build_kernel("xformers", CPU)[0]))
    got, got_gradients = run(unet)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_gradients, gradients, rtol=1e-4, atol=1e-4)


def test_xformers_without_a_mask_only(fake_xformers: FakeOps) -> None:
    unet = tiny_unet()
    unet.set_attn_processor(UNetAttention(build_kernel("xformers", CPU)[0]))
    with pytest.raises(UserError, match="mask"):
        run(unet, masked=True)


def fake_flash3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as its second generation is: [B, N, H, D], and the logarithms of the rows beside the result."""
    module = ModuleType("flash_attn_interface")
    module.flash_attn_func = lambda q, k, v, softmax_scale=None: (eager(q, k, v), None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)


def test_flash3_by_its_own_interface_where_pytorch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flash3(monkeypatch)
    monkeypatch.setattr(attention.torch_attention, "list_flash_attention_impls", list)
    kernel, line = build_kernel("flash3", CPU)
    assert isinstance(kernel, TokensFirst) and "flash_attn_interface" in line
    query, key = torch.randn(2, 9, 2, 8), torch.randn(2, 7, 2, 8)
    torch.testing.assert_close(kernel(query, key, key, None, None), eager(query, key, key))


def test_flash3_behind_pytorch_ends_with_the_next_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces the flash kernels of the whole process, and must not stay there for "sdpa-flash"."""
    active: list[str] = []
    monkeypatch.setattr(attention.torch_attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(attention.torch_attention, "list_flash_attention_impls", lambda: ["FA3"])
    monkeypatch.setattr(
        attention.torch_attention, "current_flash_attention_impl", lambda: active[-1] if active else None
    )
    monkeypatch.setattr(attention.torch_attention, "restore_flash_attention_impl", active.clear)
    kernel, line = build_kernel("flash3", CPU)
    assert active == ["FA3"] and kernel == Sdpa((attention.SDPBackend.FLASH_ATTENTION,), ()) and "flash3" in line
    build_kernel("sdpa-flash", CPU)
    assert active == []


def test_flash3_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"flash3.*cannot be loaded.*use 'auto'"):
        build_kernel("flash3", CPU)


# choice, device, dtype, capability, installed -> words of the refusal, or None
RULES: list[tuple[str, str, str, tuple[int, int] | None, bool, tuple[str, ...] | None]] = [
    *((choice, "cpu", dtype, None, False, None) for choice in (*ON_CPU, "eager") for dtype in ("fp32", "bf16")),
    *((choice, "cpu", "bf16", None, True, ("needs a GPU", choice, "'auto'")) for choice in GPU_ONLY),
    *((choice, "cuda", "fp32", (9, 0), True, ("16 bits", "mixed_precision")) for choice in SIXTEEN_BIT_ON_GPU),
    *((choice, "cuda", "fp32", None, True, ("16 bits",)) for choice in SIXTEEN_BIT_ON_GPU),
    *((choice, "cuda", "bf16", (9, 0), True, None) for choice in CHOICES),
    *((choice, "cuda", "bf16", None, True, None) for choice in CHOICES),
    *((choice, "cuda", "bf16", (9, 0), False, (choice, "not installed")) for choice in ("xformers", "flash3")),
    *((choice, "cuda", "fp32", (8, 0), True, None) for choice in ("xformers", "sdpa-efficient", "sdpa-math", "auto")),
    ("sdpa-flash", "cuda", "bf16", (7, 5), True, ("8.0", "7.5")),
    ("sdpa-cudnn", "cuda", "bf16", (7, 5), True, ("8.0", "7.5")),
    ("xformers", "cuda", "fp16", (7, 0), True, ("7.5", "7.0")),
    ("flash3", "cuda", "bf16", (8, 9), True, ("9.0", "8.9")),
    ("flash3", "cuda", "bf16", (10, 0), True, ("9.0", "10.0")),
    ("sdpa-flash", "cuda", "bf16", (12, 0), True, None),
]


@pytest.mark.parametrize(("choice", "device", "dtype", "capability", "installed", "words"), RULES)
def test_refusals(
    choice: str,
    device: str,
    dtype: str,
    capability: tuple[int, int] | None,
    installed: bool,
    words: tuple[str, ...] | None,
) -> None:
    refusal = attention_refusal(choice, device, dtype, capability, lambda module: installed)
    if words is None:
        assert refusal is None
        return
    assert refusal is not None and refusal.startswith("model.attention: ") and "\n" not in refusal
    assert not [word for word in words if word not in refusal], refusal


@pytest.mark.parametrize("choice", GPU_ONLY)
def test_installing_what_cannot_run_changes_nothing(choice: str) -> None:
    unet = tiny_unet()
    before = dict(unet.attn_processors)
    with pytest.raises(UserError, match=rf"model\.attention: .{choice}. needs a GPU"):
        install_attention(unet, choice, device=CPU, dtype=torch.bfloat16)
    assert unet.attn_processors == before


def test_an_unknown_choice_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"sdpa-flsh.*nearest: sdpa-flash"):
        check_attention("sdpa-flsh", CPU, torch.float32)


def test_an_explicit_choice_is_tried_in_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that refuses one of the U-Net's head widths is refused before the first update."""

    def picky(query: Tensor, *_: object) -> Tensor:
        if query.shape[-1] > 4:
            raise RuntimeError("head width too large\nmore")
        return F.silu(query)

    monkeypatch.setattr(attention, "build_kernel", lambda choice, device: (picky, "picky"))
    narrow, wide = sd_unet(attention_head_dim=2), sd_unet(attention_head_dim=(2, 2))
    assert {m.inner_dim // m.heads for m in narrow.modules() if isinstance(m, Attention)} == {4, 8}
    for unet in (narrow, wide):
        with pytest.raises(UserError, match=r"width 8 in fp32 on this cpu \(head width too large\)"):
            install_attention(unet, "sdpa-math")
    assert install_attention(sd_unet(block_out_channels=(8, 8)), "sdpa-math") == "picky"


def test_a_kernel_that_cannot_be_differentiated_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "build_kernel", lambda choice, device: (lambda q, *_: q.detach(), ""))
    with pytest.raises(UserError, match="cannot run"):
        install_attention(tiny_unet(), "sdpa-math")


def test_lines_for_the_log() -> None:
    unet = tiny_unet()
    assert install_attention(unet, "auto") == "attention: sdpa, PyTorch's choice of flash and math (auto: no GPU)"
    assert install_attention(unet, "sdpa-flash") == "attention: sdpa-flash"
    assert install_attention(unet, "eager").startswith("attention: eager")
    assert all(type(processor) is AttnProcessor for processor in unet.attn_processors.values())


def test_auto_leaves_out_what_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN: never with a mask, and not at all on sm_100."""
    cudnn = attention.SDPBackend.CUDNN_ATTENTION
    gpu = torch.device("cuda")
    for capability in ((8, 9), (9, 0), (12, 0)):
        kernel, line = attention._auto(gpu, capability)
        assert isinstance(kernel, Sdpa) and kernel.backends is None and kernel.masked and cudnn not in kernel.masked
        assert f"sm_{capability[0]}{capability[1]}" in line
    kernel, line = attention._auto(gpu, (10, 0))
    assert isinstance(kernel, Sdpa) and kernel.backends and cudnn not in kernel.backends and "cuDNN" in line


def test_a_unet_of_another_family_is_refused() -> None:
    unet = sd_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    )  # fmt: skip
    with pytest.raises(UserError, match="added keys"):
        install_attention(unet, "auto")
