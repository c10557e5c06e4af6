"""A teacher's distribution over a vocabulary by classes drawn from it: few bytes a token, and no bias.

Anshumann et al., 2025, "Sparse Logit Sampling", https://arxiv.org/abs/2503.16870 (random sampling knowledge
distillation): a class drawn c times of N gets the share c / N, whose expectation is the teacher's probability. So is
that of the gradient of the cross entropy to the shares, which is linear in them; the k largest logits have a bias that
no amount of text averages away.

The N draws of a position are taken at even distances over the cumulative distribution from one random start (systematic
sampling), in place of N random ones: the same expectation, while each share is within 1 / N of its probability.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_compress.distillation.teachers.example_keys import GOLDEN, mix

DRAWN = "drawn_classes", "drawn_shares", "entropy"  # what a cache gives of each token
MOST_DRAWS = 255  # sizes and counts fit in a byte
ROWS_AT_ONCE = 256  # positions whose probabilities are held together in float64
START_BITS = 40  # of a random start: fine beside 1 / N, and never rounded up to the next draw


class Drawn(NamedTuple):
    """What is stored of M positions with E different classes among their draws, position after position.

    codes    (E, bytes) uint8    `class * N + count - 1`, lowest byte first
    sizes    (M,) uint8          different classes of each position
    entropy  (M, 1) float16      of the teacher's distribution, in nats: with it the loss is a divergence without bias
    """

    codes: Tensor
    sizes: Tensor
    entropy: Tensor


def code_bytes(classes: int, draws: int) -> int:
    """Bytes of one stored class with its count: 3 for any vocabulary of up to 2^24 / draws."""
    return ((classes * draws - 1).bit_length() + 7) // 8


def starts(keys: Tensor, places: Tensor) -> Tensor:
    """The random starts of positions, float64 in (0, 1), by the example's key and the place in it, both (M,) int64.

    The same in every run, batch and process.
    """
    bits = mix(mix(keys) + places * GOLDEN) & ((1 << START_BITS) - 1)
    return (bits.double() + 0.5) / (1 << START_BITS)


def draw(logits: Tensor, start: Tensor, draws: int) -> Drawn:
    """Draw `draws` classes at each position. logits (M, C), start (M,) as of `starts`."""
    parts = [
        _draw(part, u, draws) for part, u in zip(logits.split(ROWS_AT_ONCE), start.split(ROWS_AT_ONCE), strict=True)
    ]
    return Drawn(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _draw(logits: Tensor, start: Tensor, draws: int) -> Drawn:
    logits = logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
    log_p = logits.double().log_softmax(dim=-1)
    if faults := int(log_p.isnan().any(dim=-1).sum()):
        raise ValueError(f"The teacher's logits are not finite at {faults} of {len(log_p)} positions: nothing to draw.")
    classes, counts, sizes = systematic(log_p.exp(), start.to(log_p.device), draws)
    code = classes * draws + counts - 1
    width = code_bytes(logits.shape[-1], draws)
    codes = torch.stack([(code >> (8 * i)) & 255 for i in range(width)], dim=-1)
    entropy = torch.special.entr(log_p.exp()).sum(dim=-1, keepdim=True)
    return Drawn(codes.to(torch.uint8).cpu(), sizes.to(torch.uint8).cpu(), entropy.half().cpu())


def systematic(p: Tensor, start: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws from p (M, C) float64 at (start + j) / draws of the cumulative distribution, start (M,) in (0, 1).

    Returns the different classes of all positions and how often each was drawn, both (E,), and the number of different
    ones of each position, (M,). A class is drawn floor or ceil of `draws * p` times.
    """
    reached = p.cumsum(dim=-1)
    points = (start[:, None] + torch.arange(draws, device=p.device)) / draws * reached[:, -1:]  # (M, N), ascending
    drawn = torch.searchsorted(reached, points, right=True).clamp(max=p.shape[-1] - 1)
    is_first = torch.ones_like(drawn, dtype=torch.bool)
    is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    begins = is_first.flatten().nonzero().squeeze(1)
    counts = torch.diff(begins, append=begins.new_tensor([drawn.numel()]))
    return drawn[is_first], counts, is_first.sum(dim=-1)


def shares(codes: Tensor, sizes: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Stored draws as classes and their shares, (M, most classes of a position); the rest of a row has share 0."""
    code = sum(codes[:, i].long() << (8 * i) for i in range(codes.shape[1]))
    sizes = sizes.long()
    is_there = torch.arange(int(sizes.max()) if len(sizes) else 0, device=codes.device) < sizes[:, None]
    classes = torch.zeros(is_there.shape, dtype=torch.long, device=codes.device)
    found = torch.zeros(is_there.shape, device=codes.device)
    classes[is_there] = code // draws
    found[is_there] = (code % draws + 1) / draws
    return classes, found
