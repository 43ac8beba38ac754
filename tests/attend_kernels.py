"""What the tests of the attend's kernels share: problems, the formula, a call of a backend's functions."""

import functools

import torch

from fusedrnn.budget import check

SCORES = ["additive", "dot"]
MASKS = ["none", "lengths", "bool", "added", "all"]
INF = float("inf")


@functools.cache
def problem(score, shape, kind="none", dtype=torch.float32, size=1.0):
    """query, key, value, v, mask, lengths."""
    torch.manual_seed(sum(shape))
    B, N, Tq, Tk, D, Dv = shape
    query, key, value = torch.randn(B, N, Tq, D), torch.randn(B, N, Tk, D), torch.randn(B, N, Tk, Dv)
    v = torch.randn(D).to(dtype) if score == "additive" else None
    mask = lengths = None
    if kind in ("lengths", "all"):
        lengths = torch.randint(0, Tk + 1, (B,))
        lengths[0] = Tk
    if kind == "bool":
        mask = torch.rand(B, 1, Tq, Tk) < 0.7
        mask[-1, 0, -1] = False
    if kind in ("added", "all"):
        mask = torch.randn(1, N, 1 if kind == "all" else Tq, Tk).to(dtype)
        mask[torch.rand(mask.shape) < 0.3] = -INF
        mask[0, 0, -1] = -INF
    query, key = query * size, key * size
    return query.to(dtype), key.to(dtype), value.to(dtype), v, mask, lengths


def mix(x):
    x = x ^ x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def kept(shape, dropout, seed):
    """Which of all weights dropout keeps."""
    index = torch.arange(torch.Size(shape).numel()).reshape(shape)
    low, high = index & 0xFFFFFFFF, index >> 32
    inner = mix(low ^ seed & 0xFFFFFFFF)
    drawn = mix(inner + high * 0x9E3779B9 + (seed >> 32) & 0xFFFFFFFF) >> 8
    return drawn * 2.0**-24 >= dropout


def formula(score, query, key, value, v, mask, lengths, scale, keep=None, dropout=0.0):
    """Context and weights in plain torch."""
    if score == "additive":
        e = torch.tanh(query[..., :, None, :] + key[..., None, :, :]) @ v
    else:
        e = scale * (query @ key.transpose(-1, -2))
    if lengths is not None:
        inside = torch.arange(key.shape[2], device=key.device) < lengths[:, None]
        e = e.masked_fill(~inside[:, None, None], -INF)
    if mask is not None:
        e = e.masked_fill(~mask, -INF) if mask.dtype is torch.bool else e + mask
    empty = (e == -INF).all(-1, keepdim=True)
    weights = e.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    if keep is not None:
        weights = weights * keep / (1 - dropout)
    return weights @ value, weights


NAMES = ["query", "key", "value", "v", "mask"]


def by_torch(score, args, scale, grads, dtype, **dropout):
    """Outputs and gradients of `formula` in a precision, by name."""
    cast = [t if t is None or not t.is_floating_point() else t.to(dtype) for t in args]
    leaves = {
        n: t.detach().requires_grad_() for n, t in zip(NAMES, cast) if t is not None and t.dtype is dtype
    }
    context, weights = formula(
        score, *(leaves.get(n, t) for n, t in zip(NAMES, cast)), cast[5], scale, **dropout
    )
    results = {"context": context, "weights": weights}
    loss = sum((o * g.to(dtype)).sum() for o, g in zip((context, weights), grads) if g is not None)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: t.detach() for n, t in results.items()} | {f"grad {n}": g for n, g in zip(leaves, found)}


def run(attend, score, args, scale=1.0, *, weights=False, save=False):
    return attend.forward(score, *args, scale, 0.0, 0, weights, save)


def by_kernel(attend, score, args, scale, grads, dropout=0.0, seed=0):
    query, key, value, v, mask, lengths = args
    call = (score, query, key, value, v, mask, lengths, scale, dropout, seed)
    context, weights, saved = attend.forward(*call, True, True)
    copies = [t.clone() for t in saved]
    needs = (True, True, True, v is not None, mask is not None and mask.is_floating_point())
    found = attend.backward(*call, saved, *grads, needs)
    assert [g is not None for g in found] == list(needs)
    assert all(torch.equal(a, b) for a, b in zip(saved, copies) if not a.isnan().any()), "wrote into saved"
    results = {"context": context, "weights": weights}
    return results | {f"grad {n}": g for n, g in zip(NAMES, found) if g is not None}


def assert_parity(attend, score, args, scale=0.3, use=(True, True), **options):
    torch.manual_seed(0)
    query, key, value = args[:3]
    shapes = [(*query.shape[:3], value.shape[3]), (*query.shape[:3], key.shape[2])]
    grads = [torch.randn(s).to(query) if wanted else None for s, wanted in zip(shapes, use)]
    ours = by_kernel(attend, score, args, scale, grads, **options)
    dropped = {}
    if options:
        dropped = {
            "keep": kept(shapes[1], options["dropout"], options["seed"]).to(query.device),
            "dropout": options["dropout"],
        }
    theirs = by_torch(score, args, scale, grads, query.dtype, **dropped)
    parity = check(ours, theirs, lambda: by_torch(score, args, scale, grads, torch.float64, **dropped))
    assert parity, f"\n{parity}"
    return ours
