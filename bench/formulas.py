"""The published formulas of one-shot pruners in plain PyTorch, written from the papers.

Nothing of this library is imported: the programs that compare both sides do that.
"""

import math

import torch

DAMP = 0.01


# Scores (Sun et al. 2023, Zhang et al. 2024).


def n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keeps the n best of every m consecutive inputs."""
    groups = scores.reshape(len(scores), -1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    keep.scatter_(2, groups.topk(n, dim=2).indices, True)
    return keep.reshape(scores.shape)


def magnitude(w: torch.Tensor, h: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """|W|."""
    del h
    return torch.where(n_of_m(w.abs(), n, m), w, 0)


def wanda(w: torch.Tensor, h: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """|W| times the norm of the input."""
    return torch.where(n_of_m(w.abs() * h.diagonal().sqrt(), n, m), w, 0)


def ria(w: torch.Tensor, h: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Relative importance times the root of the norm of the input."""
    size = w.abs()
    share = size / size.sum(0, keepdim=True) + size / size.sum(1, keepdim=True)
    return torch.where(n_of_m(share * h.diagonal() ** 0.25, n, m), w, 0)


# Weights that move.


def sparsegpt(
    w: torch.Tensor, h: torch.Tensor, n: int, m: int, block: int = 128
) -> torch.Tensor:
    """Frantar & Alistarh 2023: columns in turn, errors pushed to the right."""
    w = w.clone()
    columns = w.shape[1]
    h = h + DAMP * h.diagonal().mean() * torch.eye(columns)
    u = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True
    )
    keep = torch.zeros_like(w, dtype=torch.bool)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        part, local = w[:, first:last], u[first:last, first:last]
        errors = torch.zeros_like(part)
        for i in range(last - first):
            if i % m == 0:
                scores = (part[:, i : i + m] / local.diagonal()[i : i + m]) ** 2
                keep[:, first + i : first + i + m] = n_of_m(scores, n, m)
            gone = torch.where(keep[:, first + i], 0, part[:, i])
            error = gone / local[i, i]
            part[:, i:] -= error[:, None] * local[i, i:]
            errors[:, i] = error
        w[:, last:] -= errors @ u[first:last, last:]
    return torch.where(keep, w, 0)


def alps(w: torch.Tensor, h: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Meng et al. 2024: ADMM with a growing penalty, then conjugate gradients."""
    h = h + DAMP * h.diagonal().mean() * torch.eye(len(h))
    scale = h.diagonal().sqrt() + 1e-8
    h = h / (scale[:, None] * scale)
    start = w * scale
    g = start @ h
    values, vectors = (x.float() for x in torch.linalg.eigh(h.double()))
    values = values.clamp(min=0)

    def inverse(rho: float) -> torch.Tensor:
        return (vectors / (values + rho)) @ vectors.T

    def project(x: torch.Tensor) -> torch.Tensor:
        return n_of_m(x.abs(), n, m)

    rho, raised = 0.1, False
    b, v, keep = start, torch.zeros_like(start), project(start)
    d, last, shrunk = torch.where(keep, b, 0), keep, inverse(rho)
    for step in range(1, 301):
        b = (g - v + rho * d) @ shrunk
        x = b + v / rho
        keep = project(x)
        d = torch.where(keep, x, 0)
        v = v + rho * (b - d)
        if step % 3:
            continue
        changed = int((keep != last).sum())
        share, last = changed / int(keep.sum()), keep
        if share > 0.005:
            rho, raised = min(rho * (1.3 if share > 0.1 else 1.2), 1e6), True
        elif raised and (changed == 0 or (step > 30 and share < 3e-4)):
            break
        elif raised:
            rho = min(rho * 1.1, 1e6)
        else:
            rho /= 5
            b, v, keep = start, torch.zeros_like(start), project(start)
            d, last = torch.where(keep, b, 0), keep
        shrunk = inverse(rho)
    b = torch.where(keep, start, 0)
    residual = torch.where(keep, g - b @ h, 0)
    direction, size = residual, (residual**2).sum(1, keepdim=True)
    for _ in range(10):
        image = direction @ h
        alpha = size / (direction * image).sum(1, keepdim=True).clamp(min=1e-8)
        b = b + alpha * direction
        residual = torch.where(keep, residual - alpha * image, 0)
        fresh = (residual**2).sum(1, keepdim=True)
        direction, size = residual + fresh / size.clamp(min=1e-8) * direction, fresh
    return b / scale


# Transposable masks (TSENOR): entropic transport with capacities, then rounding.


def dykstra(a: torch.Tensor, n: int, k: float = 20.0, sweeps: int = 50) -> torch.Tensor:
    """tau * A - u - v of tiles a[B, M, M], from a start at the thresholds."""
    tau = k / a.mean((1, 2), keepdim=True).clamp(min=1e-30)

    def threshold(x: torch.Tensor, dim: int) -> torch.Tensor:
        top = x.topk(n + 1, dim=dim).values
        return (top.narrow(dim, n - 1, 1) + top.narrow(dim, n, 1)) / 2

    v = threshold(a, 1)
    u = threshold(a - v, 2)
    scaled, u, v = tau * a, tau * u, tau * v
    for _ in range(sweeps):
        x = (scaled - u - v).clamp(max=0)
        r = x.logsumexp(2, keepdim=True) - math.log(n)
        c = (x - r).logsumexp(1, keepdim=True) - math.log(n)
        u, v = u + r, v + c
    return scaled - u - v


def rounded(p: torch.Tensor, a: torch.Tensor, n: int) -> torch.Tensor:
    """Greedy by p, then swaps until every row and column keeps n."""
    tiles, m = p.shape[:2]
    one = torch.arange(tiles)
    rows = torch.zeros(tiles, m, dtype=torch.int32)
    columns = rows.clone()
    keep = torch.zeros(tiles, m, m, dtype=torch.bool)
    order = p.reshape(tiles, -1).argsort(dim=1, descending=True, stable=True)
    for flat in order.T:
        i, j = flat // m, flat % m
        free = (rows[one, i] < n) & (columns[one, j] < n)
        keep[one, i, j] = free
        rows[one, i] += free
        columns[one, j] += free
    for _ in range(2 * m):
        lacks_row, lacks_column = n - keep.sum(2), n - keep.sum(1)
        open_ = (lacks_row.sum(1) > 0).nonzero()[:, 0]
        if not len(open_):
            break
        s, score = keep[open_], a[open_]
        i, j = lacks_row[open_].argmax(1), lacks_column[open_].argmax(1)
        b = torch.arange(len(open_))
        gain = score[b, i][:, None] + score[b, :, j][:, :, None] - score
        legal = s & ~s[b, i][:, None] & ~s[b, :, j][:, :, None]
        best = gain.masked_fill(~legal, -torch.inf).reshape(len(b), -1).argmax(1)
        i2, j2 = best // m, best % m
        direct = ~s[b, i, j]
        s[b, i2, j2] &= direct
        s[b, i, j2] |= ~direct
        s[b, i2, j] |= ~direct
        s[b, i, j] = True
        keep[open_] = s
    return keep


def transposable(a: torch.Tensor, n: int) -> torch.Tensor:
    """Masks of tiles a[B, M, M]."""
    return rounded(dykstra(a, n), a, n)
