"""DoCo's patch discriminator: does this image estimate come from the concept, or from its anchor?

The network, its losses and its optimizer step, averaged over ranks. The image estimates are made in
``methods/doco.py``.

The released network is four strided convolutions with batch norm and sees the estimate alone. Estimates are up to 14.6
times as loud at the noisy end as at the clean one, so by default ours is told the timestep, and it uses group norm,
which does not depend on how a batch is spread over ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional

from fastunlearn.gradients.guard import FiniteGuard

WIDTHS = (64, 128, 256, 512)
EMBEDDING = 128
SMALLEST = 4  # side of the feature map under the last convolution, whose kernel is 4 x 4


class Discriminator(nn.Module):
    """(B, C, H, W) image estimates and (B,) timesteps to (B, 1, h, w) patch logits; positive means the concept."""

    def __init__(self, channels: int, size: int, *, released: bool, seed: int) -> None:
        super().__init__()
        depth = min(len(WIDTHS), max(1, int(math.log2(size / SMALLEST))))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = (channels, *WIDTHS[:depth])
            self.convolutions = nn.ModuleList(
                nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths)
            )
            norms = [nn.BatchNorm2d(b) if released else nn.GroupNorm(8, b) for b in widths[2:]]
            self.norms = nn.ModuleList([nn.Identity(), *norms])
            self.head = nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1)
            self.time = None
            if not released:
                self.waves = Timesteps(EMBEDDING, flip_sin_to_cos=True, downscale_freq_shift=0)
                self.time = TimestepEmbedding(EMBEDDING, widths[1])

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        """Logits in fp32."""
        hidden = images.float()
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            hidden = norm(convolution(hidden))
            if i == 0 and self.time is not None:
                hidden = hidden + self.time(self.waves(timesteps))[:, :, None, None]
            hidden = functional.leaky_relu(hidden, 0.2)
        return self.head(hidden)


def bce_to(logits: Tensor, label: float) -> Tensor:
    """Binary cross-entropy of the logits against one label for all patches."""
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


class DiscriminatorTrainer:
    """The discriminator with its Adam. ``generator_loss`` is the student's side, the rest its own."""

    def __init__(
        self,
        channels: int,
        size: int,
        device: torch.device,
        *,
        released: bool,
        learning_rate: float,
        seed: int,
        max_skipped: int = 10,
    ) -> None:
        self.network = Discriminator(channels, size, released=released, seed=seed).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate, betas=(0.5, 0.999))
        self.guard = FiniteGuard(max_skipped, "the discriminator's gradient", "doco.discriminator_learning_rate")

    def generator_loss(self, concept: Tensor, timesteps: Tensor) -> Tensor:
        """The loss of a student that wants its estimates taken for the anchor's. No gradient reaches the network's
        parameters: left there, it would be added to the network's next step, against its purpose."""
        self.network.requires_grad_(False)
        return bce_to(self.network(concept, timesteps), 0.0)

    def discriminator_loss(self, concept: Tensor, anchor: Tensor, timesteps: Tensor, share: float) -> Tensor:
        """Accumulate ``share`` of the gradient of telling the two apart; returns the loss."""
        self.network.requires_grad_(True)
        loss = bce_to(self.network(concept.detach(), timesteps), 1.0) + bce_to(self.network(anchor, timesteps), 0.0)
        (share * loss).backward()
        return loss.detach()

    def step(self) -> None:
        """One Adam step with the gradient's mean over ranks; none where that is not finite, since a NaN would stay.
        Collective.

        Raises:
            UserError: ``max_skipped`` of them in a row were not finite.
        """
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        _average(gradients)
        if self.guard.allows(*(~gradient.isfinite().all() for gradient in gradients)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """Weights, optimizer state, and the counts of the guard."""
        network, optimizer = self.network.state_dict(), self.optimizer.state_dict()
        return {"network": network, "optimizer": optimizer, "guard": self.guard.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])


def _average(gradients: Iterable[Tensor]) -> None:
    tensors = list(gradients)
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
