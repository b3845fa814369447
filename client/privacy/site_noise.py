"""A site's part of client-level differential privacy: its whole update clipped, and its share of the noise.

Masked updates are only ever seen as a sum, so each site adds a part of the noise, and the sum has all of it (Kairouz et
al. 2021, https://arxiv.org/abs/2102.06387). Clip and noise are in one function, so that neither can be had alone.
"""

from __future__ import annotations

import numpy as np
import torch

from medfl.client.privacy.clipped import clip_factors
from medfl.client.privacy.randomness import NoiseSource, noisy
from medfl.shared.privacy.noised_encoding import share_of_noise
from medfl.shared.weights import Flat


def clipped_and_noised(
    update: Flat, *, clip_norm: float, noise_multiplier: float, survivors: int, generator: NoiseSource
) -> Flat:
    """``update`` scaled down to an l2 norm of at most ``clip_norm`` over all values, plus this site's share of noise.

    Args:
        update: float32, one axis; finite.
        clip_norm: largest norm of one site's part of the sum.
        noise_multiplier: standard deviation of the noise on the sum, in clip norms.
        survivors: see :func:`~medfl.shared.privacy.noised_encoding.share_of_noise`.
        generator: the site's :class:`~medfl.client.privacy.randomness.SecureGenerator`.
    """
    exact = torch.from_numpy(update.astype(np.float64))
    exact *= float(clip_factors(exact.norm(), clip_norm))
    out: Flat = noisy(exact, share_of_noise(noise_multiplier, clip_norm, survivors), generator).float().numpy()
    return out


def noised_half(update: Flat, *, clip_norm: float, count_noise: float, survivors: int, generator: NoiseSource) -> float:
    """One site's part of how many updates are within ``clip_norm``: 1/2 or -1/2, plus its share of the count's noise.

    ``count_noise`` is the standard deviation on the sum of all parts; ``survivors`` as for :func:`clipped_and_noised`.
    """
    within = float(np.linalg.norm(update.astype(np.float64))) <= clip_norm
    half = torch.tensor([0.5 if within else -0.5], dtype=torch.float64)
    return float(noisy(half, share_of_noise(count_noise, 1.0, survivors), generator))
