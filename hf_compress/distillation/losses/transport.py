"""The cheapest way to move mass between two sets: the transport problem behind the earth mover's distance, exactly."""

import numpy as np
import torch
from torch import Tensor

NOTHING = 1e-12  # mass below it counts as none


def optimal_flow(costs: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    """The flow (M, L) >= 0 with rows that sum to `supply` (M,), columns to `demand` (L,), and the least total cost.

    costs (M, L) may be any finite numbers; supply and demand are positive with equal sums. Returns a float64 tensor on
    the CPU. Sends mass along the cheapest path that is left, which may take back earlier flow (successive shortest
    paths), until none is left: for the tens of layers of two models that is a millisecond.
    """
    C = costs.detach().double().cpu().numpy()
    left, wanted = (mass.detach().double().cpu().numpy().copy() for mass in (supply, demand))
    C = C / max(np.abs(C).max(), NOTHING)  # so that rounding stays below NOTHING
    flow = np.zeros_like(C)
    while left.max() > NOTHING and wanted.max() > NOTHING:
        path = _cheapest_path(C, flow, left > NOTHING, wanted > NOTHING)
        forward, back = path, [(path[n + 1][0], path[n][1]) for n in range(len(path) - 1)]
        mass = min(left[path[0][0]], wanted[path[-1][1]], *(flow[edge] for edge in back))
        for edge in forward:
            flow[edge] += mass
        for edge in back:
            flow[edge] -= mass
        left[path[0][0]] -= mass
        wanted[path[-1][1]] -= mass
    return torch.from_numpy(np.where(flow > NOTHING, flow, 0.0))


def _cheapest_path(C: np.ndarray, flow: np.ndarray, is_source: np.ndarray, is_sink: np.ndarray) -> list[tuple]:
    """The edges (row, column) of the cheapest path from a source row to a sink column, in order.

    Between two of its edges the path goes back from a column to a row that sends mass there. Bellman and Ford's
    distances: a negative edge leads back, but no circle is negative, since the flow so far is the cheapest of its size.
    """
    to_row = np.where(is_source, 0.0, np.inf)
    to_column = np.full(C.shape[1], np.inf)
    row_before, column_before = np.zeros(C.shape[1], dtype=int), np.full(C.shape[0], -1)
    for _ in range(sum(C.shape)):
        through = to_row[:, None] + C
        better = through.min(axis=0) < to_column - NOTHING
        row_before[better] = through.argmin(axis=0)[better]
        to_column = np.where(better, through.min(axis=0), to_column)
        through = np.where(flow > NOTHING, to_column - C, np.inf)
        shorter = through.min(axis=1) < to_row - NOTHING
        column_before[shorter] = through.argmin(axis=1)[shorter]
        to_row = np.where(shorter, through.min(axis=1), to_row)
        if not shorter.any():
            break
    column = int(np.where(is_sink, to_column, np.inf).argmin())
    path = []
    while column >= 0:
        row = int(row_before[column])
        path.append((row, column))
        column = int(column_before[row])
    return path[::-1]
