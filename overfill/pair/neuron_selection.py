"""Which neurons an MLP can spare, by second order: what goes is what the others can best stand in for.

Dropping neuron j and refitting the down projection W on the rest costs ``|w_j|^2 / [M^-1]_jj``, where M is the second
moment of the neurons' outputs and w_j the column of W (optimal brain surgeon on a least-squares objective; arXiv
2203.04466 and 2302.04089 prune whole structures this way). Neurons go in small groups, and M^-1 and W follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 1e-2  # of the mean of the moments' diagonal: dead neurons would make them singular
_GROUP = 48  # neurons that go at once; smaller groups choose hardly better and take longer


def removal_order(moments: Tensor, down: Tensor) -> Tensor:
    """Place of every neuron in the order in which they go. [neurons] int64: 0 goes first.

    Args:
        moments: [neurons, neurons]; sum over tokens of the outer products of the neurons' outputs.
        down: [hidden, neurons]; the projection that reads them.
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
        goes = cost.topk(_GROUP, largest=False).indices
        stays = torch.ones(len(alive), dtype=torch.bool)
        stays[goes] = False
        stays = stays.nonzero().squeeze(1)
        among = inverse[goes][:, goes]
        between = inverse[stays][:, goes]  # [stay, go]
        columns = columns[stays] - between @ torch.linalg.solve(among, columns[goes])
        inverse = inverse[stays][:, stays] - between @ torch.linalg.solve(among, between.T)
        order.append(alive[goes])
        alive = alive[stays]
    cost = columns.square().sum(1) / inverse.diagonal()
    order.append(alive[cost.argsort()])
    places = torch.empty(count, dtype=torch.int64)
    places[torch.cat(order)] = torch.arange(count)
    return places
