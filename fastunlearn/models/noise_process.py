"""The noise process of a model: its levels, what noising does, what a prediction says, and one step of a sampler.

Everything that depends on alpha-bar is here, always for (B,) timesteps: methods, samplers and losses speak to this
object and to ``denoisers.Predictors`` only. The arithmetic is that of ``fastunlearn_kernels``.

Legend, at timestep t: A alpha-bar, x the noisy latents, x0 the clean ones, n the noise, s the noise level of a sampler
that works on x0 + s n:
    x = sqrt(A) x0 + sqrt(1 - A) n          s = sqrt((1 - A) / A)
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fastunlearn.schema.fields import LossWeighting
from fastunlearn_kernels import add_noise, guided_euler_step, guided_step, to_epsilon
from fastunlearn_kernels.latent.prediction import prediction_number, training_target

LEAST_SIGNAL = 2.0**-24  # alpha-bar of a schedule that ends in pure noise, as diffusers' Euler takes it: s stays finite


class NoiseProcess:
    """The noise schedule and prediction type of one loaded model, on its device."""

    def __init__(self, scheduler: DDIMScheduler, device: torch.device) -> None:
        self.scheduler = scheduler
        self.device = device
        self.alphas_cumprod = scheduler.alphas_cumprod.to(device)
        """(T,) fp32, alpha-bar of each timestep."""
        self._grids: dict[int, list[int]] = {}

    def __len__(self) -> int:
        """T, the number of timesteps of the training schedule."""
        return len(self.alphas_cumprod)

    @property
    def prediction_type(self) -> str:
        """ "epsilon", "v_prediction" or "sample"."""
        return self.scheduler.config["prediction_type"]

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the latents from which sampling starts."""
        return float(self.scheduler.init_noise_sigma)

    def timesteps(self, num_inference_steps: int) -> list[int]:
        """Those of a sampler with so many steps, from the noisy end, spaced as the model's scheduler says; always whole
        numbers, also for Euler with spacing "linspace"."""
        if num_inference_steps not in self._grids:
            scheduler = DDIMScheduler.from_config(self.scheduler.config)
            scheduler.set_timesteps(num_inference_steps)
            self._grids[num_inference_steps] = scheduler.timesteps.tolist()
        return list(self._grids[num_inference_steps])

    def share(self, timestep: int) -> float:
        """A timestep's place in the schedule, from 0 to 1 for the noisiest."""
        return timestep / (len(self) - 1)

    def expand(self, timestep: int, batch: int) -> Tensor:
        """One timestep for a whole batch: (B,) int64 on the device."""
        return torch.full((batch,), timestep, dtype=torch.long, device=self.device)

    def alpha_bar(self, timesteps: Tensor) -> Tensor:
        """(B,) fp32."""
        return self.alphas_cumprod[timesteps]

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x of x0 and n, (B, C, H, W) each."""
        return add_noise(clean, noise, timesteps, self.alphas_cumprod)

    def to_epsilon(self, prediction: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction implies; gradients flow."""
        return to_epsilon(prediction, latents, self.alpha_bar(timesteps), self.prediction_type)

    def to_x0(self, prediction: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction implies, in fp32; gradients flow."""
        alpha = self.alpha_bar(timesteps).view(-1, 1, 1, 1)
        signal, noise_level = alpha.sqrt(), (1 - alpha).sqrt()
        if self.prediction_type == "sample":
            return prediction.float()
        if self.prediction_type == "v_prediction":  # also where nothing but noise is left, and epsilon says nothing
            return signal * latents.float() - noise_level * prediction.float()
        return (latents.float() - noise_level * prediction.float()) / signal

    def target(self, noise: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
        """What the model is to predict where ``clean`` was noised with ``noise``."""
        alpha = self.alpha_bar(timesteps).view(-1, 1, 1, 1)
        return training_target(noise, clean, alpha, prediction_number(self.prediction_type))

    def loss_arguments(self, timesteps: Tensor, weighting: LossWeighting = "epsilon") -> dict[str, Any]:
        """How the losses of ``fastunlearn_kernels`` are to read predictions at these timesteps: their target, and the
        weight of a timestep. ``guided_noise_loss`` is one between noise estimates whatever the model predicts, or, with
        ``weighting`` "prediction", between predictions as they are: all its targets are affine combinations of them, so
        that it is the same loss times what a prediction's change weighs in epsilon."""
        if weighting == "prediction":
            return {"alpha_t": self.alpha_bar(timesteps), "prediction_type": "epsilon"}
        return {"alpha_t": self.alpha_bar(timesteps), "prediction_type": self.prediction_type}

    def levels(self, timesteps: Tensor, num_inference_steps: int) -> tuple[Tensor, Tensor]:
        """(alpha-bar at the timesteps, alpha-bar where a sampler with so many steps goes from there), (B,) each."""
        following = timesteps - len(self) // num_inference_steps
        final = self.scheduler.final_alpha_cumprod.to(self.device)
        known = self.alphas_cumprod[following.clamp(min=0)]
        return self.alpha_bar(timesteps), torch.where(following >= 0, known, final)

    def sigmas(self, timesteps: Tensor, num_inference_steps: int) -> tuple[Tensor, Tensor]:
        """(s at the timesteps, s at the next ones of a sampler with so many steps: 0 after the last), (B,) each."""
        grid = torch.tensor([*self.timesteps(num_inference_steps), -1], device=self.device)
        following = grid[(grid >= timesteps[:, None]).sum(1)]
        sigma, next_sigma = (self._sigma(each) for each in (timesteps, following.clamp(min=0)))
        return sigma, torch.where(following < 0, 0.0, next_sigma)

    def _sigma(self, timesteps: Tensor) -> Tensor:
        alpha = self.alpha_bar(timesteps).clamp(min=LEAST_SIGNAL)
        return ((1 - alpha) / alpha).sqrt()

    def step(
        self,
        cond: Tensor,
        uncond: Tensor,
        latents: Tensor,
        timesteps: Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        sampler: str = "ddim",
    ) -> Tensor:
        """One step with classifier-free guidance, no noise added: the latents at the next timestep.

        ``sampler``: "ddim" (arXiv 2010.02502, eta 0), or "euler" (arXiv 2206.00364, algorithm 2 without churn), which
        takes the same steps on x0 + s n and ends at s = 0 where DDIM ends at the schedule's first level.
        """
        kind = self.prediction_type
        if sampler == "ddim":
            level, next_level = self.levels(timesteps, num_inference_steps)
            return guided_step(cond, uncond, latents, level, next_level, guidance=guidance_scale, prediction_type=kind)
        sigmas = self.sigmas(timesteps, num_inference_steps)
        scale, scale_next = ((sigma * sigma + 1).sqrt().view(-1, 1, 1, 1) for sigma in sigmas)
        moved = guided_euler_step(cond, uncond, latents * scale, *sigmas, guidance=guidance_scale, prediction_type=kind)
        return moved / scale_next
