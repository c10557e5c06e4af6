"""Which blocks stay: pure functions from scores to masks. A block may be a single weight, a neuron or a head.

Scores of weights that FSDP2 has cut over the ranks are cut as well, and so are their masks, which are those of the
whole scores. All ranks have to ask together. A share of all matrices is found without gathering them; else they are
gathered one by one.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_compress.training.shards import as_part, cut_like, is_sharded, over_ranks, own, whole

SCOPES = ("class-blind", "class-uniform", "class-distribution", "row", "bank")


def keep_largest(
    scores: Sequence[Tensor], sparsity: float, *, scope: str = "class-blind", bank_size: int | None = None
) -> list[Tensor]:
    """True for the blocks that stay, when a share `sparsity` of those with the lowest scores goes.

    scores     one tensor (rows, columns) for each matrix
    scope      what the share is a share of (the first three as See et al. 2016, https://arxiv.org/abs/1606.09274):
               class-blind: all matrices together; class-uniform: each matrix; row: each row of each matrix (Wanda);
               bank: each run of `bank_size` blocks of a row (bank-balanced, Cao et al. 2019,
               https://doi.org/10.1145/3289602.3293898; N:M is banks of M, a share 1 - N/M of which goes);
               class-distribution: all together, with scores in units of their matrix's standard deviation, which is
               the caller's to divide by, since it is that of the weights
    returns    boolean tensors, shaped as the scores. The number that goes is rounded down; of equals the first go.
    """
    is_cut = bool(scores) and is_sharded(scores[0])
    if is_cut and scope in ("class-blind", "class-distribution"):
        return _keep_over_ranks(scores, sparsity)
    if is_cut:
        gathered = (
            (score, keep_largest([whole(score)], sparsity, scope=scope, bank_size=bank_size)[0]) for score in scores
        )
        return [cut_like(mask, score) for score, mask in gathered]
    if scope in ("class-blind", "class-distribution"):
        flat = torch.cat([score.flatten() for score in scores])
        kept = _keep(flat[None], sparsity)[0].split([score.numel() for score in scores])
        return [mask.view_as(score) for mask, score in zip(kept, scores, strict=True)]
    if scope == "class-uniform":
        return [_keep(score.reshape(1, -1), sparsity).view_as(score) for score in scores]
    if scope == "row":
        return [_keep(score, sparsity) for score in scores]
    return [_keep(score.reshape(-1, bank_size), sparsity).view_as(score) for score in scores]


def grow_steepest(
    masks: Sequence[Tensor], slopes: Sequence[Tensor], share: float, *, scope: str, bank_size: int | None = None
) -> list[Tensor]:
    """`masks`, and True too for a `share` of all blocks: of those held back the ones with the largest |dL/dw|.

    Dai et al. 2017, https://arxiv.org/abs/1711.02017, section 3.1. `slopes` are shaped as the masks; `scope` says what
    the share is a share of.
    """
    pairs = zip(slopes, masks, strict=True)
    held_back = [as_part(own(slope).abs().masked_fill(own(mask), -1.0), slope) for slope, mask in pairs]
    steepest = keep_largest(held_back, 1 - share, scope=scope, bank_size=bank_size)
    return [mask | new for mask, new in zip(masks, steepest, strict=True)]


def keep_above(scores: Sequence[Tensor], thresholds: Sequence[Tensor | float]) -> list[Tensor]:
    """True where a magnitude reaches its matrix's threshold, and for the highest of each: no matrix goes as a whole."""
    masks = []
    for score, threshold in zip(scores, thresholds, strict=True):
        mine = own(score)
        highest = mine.max() if mine.numel() else mine.new_zeros(())
        masks.append(score >= min(float(threshold), float(over_ranks(highest, score, "amax"))))
    return masks


def _keep_over_ranks(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """As `_keep` for one long row of all scores, of which each rank has its part of each matrix."""
    first, mine = scores[0], [own(score).float().flatten() for score in scores]
    number = _number_gone(sum(score.numel() for score in scores), sparsity)
    if number == 0:
        return [as_part(torch.ones_like(own(score), dtype=torch.bool), score) for score in scores]
    threshold = smallest_over_ranks(mine, number, first)
    below = over_ranks(sum((row < threshold).sum() for row in mine), first)
    equal = torch.stack([(row == threshold).sum() for row in mine])
    before = _in_earlier_parts(equal, first)  # of equals: those of earlier matrices, and of earlier ranks in this one
    kept = []
    for score, row, count in zip(scores, mine, (number - below - before).clamp(min=0).tolist(), strict=True):
        gone = row < threshold
        gone[(row == threshold).nonzero()[:count, 0]] = True
        kept.append(as_part(~gone.view_as(own(score)), score))
    return kept


def smallest_over_ranks(parts: Sequence[Tensor], number: int, like: Tensor) -> Tensor:
    """The `number`-th smallest of all float32 values of all ranks that share the tensor `like`, by counting bits.

    The order of floats is that of their bits, read as whole numbers, once those of negative ones are turned round. Two
    rounds count the upper and the lower 16 bits, so ranks send 1 MiB, however many values there are.
    """
    rest, upper, device = number, 0, parts[0].device
    for is_upper in (True, False):
        counts = torch.zeros(2**16, dtype=torch.long, device=device)
        for values in parts:
            bits = (values + 0.0).view(torch.int32)  # -0.0 is 0.0
            ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() + 2**31
            chosen = ordered >> 16 if is_upper else ordered[ordered >> 16 == upper] & 0xFFFF
            counts += chosen.bincount(minlength=2**16)
        total = over_ranks(counts, like).cumsum(0)
        place = int((total < rest).sum())
        rest -= int(total[place - 1]) if place else 0
        upper, lower = (place, 0) if is_upper else (upper, place)
    key = torch.tensor((upper << 16) + lower - 2**31, device=device).int()
    return torch.where(key < 0, key ^ 0x7FFFFFFF, key).view(torch.float32)


def _in_earlier_parts(counts: Tensor, like: Tensor) -> Tensor:
    """(M,) numbers of each matrix on this rank -> (M,) sums over what comes before: by matrix, then by rank."""
    (mesh_dim,) = (number for number, place in enumerate(like.placements) if place.is_shard())
    group, rank = like.device_mesh.get_group(mesh_dim), like.device_mesh.get_local_rank(mesh_dim)
    everyones = [torch.empty_like(counts) for _ in range(like.device_mesh.size(mesh_dim))]
    dist.all_gather(everyones, counts, group=group)
    table = torch.stack(everyones, dim=1)  # (M, ranks)
    return (table.flatten().cumsum(0).view_as(table) - table)[:, rank]


def _number_gone(total: int, sparsity: float) -> int:
    return int(sparsity * total + 1e-6)  # 0.7 * 10 is below 7 in floating point


def _keep(rows: Tensor, sparsity: float) -> Tensor:
    """(R, n) -> (R, n): False for the lowest int(sparsity * n) of each row."""
    number = _number_gone(rows.shape[1], sparsity)
    if number == 0:
        return torch.ones_like(rows, dtype=torch.bool)
    if len(rows) > 1:
        order = rows.argsort(dim=1, stable=True)
        return torch.ones_like(rows, dtype=torch.bool).scatter_(1, order[:, :number], False)
    row = rows[0]  # one long row: finding the threshold is much faster than sorting
    threshold = row.kthvalue(number).values
    gone = row < threshold
    ties = (row == threshold).nonzero()[: number - int(gone.sum()), 0]
    gone[ties] = True
    return ~gone[None]
