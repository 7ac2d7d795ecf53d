"""Rank an MLP's neurons by second order: the neurons that others can replace best come first.

Removing neuron j and refitting the down projection W on the rest costs ``|w_j|^2 / [M^-1]_jj``. M is the second moment
of the neurons' outputs, and w_j is the column of W (optimal brain surgeon on a least-squares objective; arXiv
2203.04466 and 2302.04089 prune whole structures this way). Neurons are removed in small groups. After each group, M^-1
and W are updated.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 1e-2  # times the mean of the diagonal of M; without it, dead neurons would make M singular
_GROUP = 48  # neurons removed at once; smaller groups take longer and choose hardly better


def removal_order(moments: Tensor, down: Tensor) -> Tensor:
    """Returns each neuron's rank in the removal order, [neurons] int64; rank 0 is removed first.

    Args:
        moments: [neurons, neurons]; sum over tokens of the outer products of the neurons' outputs.
        down: [hidden, neurons]; the projection that reads the neurons.
    """
    count = len(moments)
    damped = moments.double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean() + torch.finfo(torch.float64).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    columns = down.T.double()  # [alive, hidden]
    alive = torch.arange(count)
    order = []
    while len(alive) > _GROUP:
        cost = columns.square().sum(1) / inverse.diagonal()
        removed = cost.topk(_GROUP, largest=False).indices
        stays = torch.ones(len(alive), dtype=torch.bool)
        stays[removed] = False
        stays = stays.nonzero().squeeze(1)
        among = inverse[removed][:, removed]
        between = inverse[stays][:, removed]  # [stay, removed]
        columns = columns[stays] - between @ torch.linalg.solve(among, columns[removed])
        inverse = inverse[stays][:, stays] - between @ torch.linalg.solve(among, between.T)
        order.append(alive[removed])
        alive = alive[stays]
    cost = columns.square().sum(1) / inverse.diagonal()
    order.append(alive[cost.argsort()])
    places = torch.empty(count, dtype=torch.int64)
    places[torch.cat(order)] = torch.arange(count)
    return places
