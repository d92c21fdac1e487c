"""gate_stats_, zero_filters_ and restore_filters_: what supervision does at every step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import psap_kernels
from benchmarks import limits, shapes, tensors
from benchmarks.registry import DTYPES, Case, Options, register
from benchmarks.timing import Run

ERROR = 5e-7


@register("supervise")
def cases(options: Options, device: torch.device, threads: int) -> Iterator[Case]:
    """Gates on the affine pairs, gates on the filters, and rows cleared and put back."""
    for name in options.names():
        network = shapes.network(name)
        for dtype in options.dtype:
            kind = DTYPES[dtype]
            if dtype != "channels_last":  # vectors have no memory format
                pairs = [
                    torch.randn(n, device=device).to(kind) for n in network.norms for _ in "wb"
                ]
                groups = [i // 2 for i in range(len(pairs))]
                yield _gates(network.name, dtype, pairs, groups, threads, options)
            w, momentum = (tensors.like_weights(network, dtype, device) for _ in range(2))
            if name == "vgg16":
                groups = list(range(len(w)))
                yield _gates(f"{network.name} without norms", dtype, w, groups, threads, options)
            yield _zero(network, dtype, [*w, *momentum])
            yield _restore(network, dtype, [*w, *momentum])


def _gates(
    name: str, dtype: str, live: list[Tensor], groups: list[int], threads: int, options: Options
) -> Case:
    """A quarter of the channels is gated: their values come from saved copies."""
    generator, device = torch.Generator().manual_seed(0), live[0].device
    sizes = [next(t.shape[0] for t, g in zip(live, groups, strict=True) if g == group)
             for group in range(groups[-1] + 1)]  # fmt: skip
    gated = [torch.randperm(n, generator=generator)[: n // 4].sort().values for n in sizes]
    grads = [torch.randn_like(t) for t in live]
    saved = [torch.randn_like(t[gated[g].to(device)]) for t, g in zip(live, groups, strict=True)]
    terms, offsets = _terms(groups, sizes, gated, len(live))
    values, both = [*live, *saved], [*grads, *grads]
    sums = torch.zeros(2, sum(sizes), dtype=torch.float64, device=device)
    seen = torch.zeros(2, dtype=torch.int64, device=device)
    table, starts = terms.to(device), offsets.to(device)
    eager = _eager(live, grads, saved, groups, sizes, gated, sums, seen)

    def fault() -> str | None:
        got, count = torch.zeros_like(sums), torch.zeros_like(seen)
        psap_kernels.gate_stats_(got, count, values, both, table, starts)
        d, magnitude = eager["exact"](), eager["magnitude"]()
        error = ((got[0] - d).abs() / magnitude.clamp_min(1e-30)).max().item()
        if not error <= ERROR or count.tolist() != [1, 0]:
            return f"a derivative is off by {error:.2g}, allowed {ERROR:.2g}; seen {count.tolist()}"
        return None

    baselines = {"naive": eager["naive"], "tuned": eager["tuned"]}
    if options.compile:
        baselines["compile"] = tensors.compiled(eager["tuned"])
    return Case(
        op="gate_stats_",
        name=name,
        shape=f"{len(sizes)} groups of channels, {sum(sizes)} channels, a quarter gated",
        dtype=dtype,
        bytes=2 * tensors.size(live) + 2 * sums.nbytes + tensors.size([table, starts]),
        fused=lambda: psap_kernels.gate_stats_(sums, seen, values, both, table, starts),
        verify=fault,
        baselines=baselines,
        limit=limits.read([*live, *grads, table, starts, sums], threads),
    )


def _terms(
    groups: list[int], sizes: list[int], gated: list[Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """For every channel its row in each tensor of its group, or that of the saved copy."""
    found: list[tuple[int, int, int]] = []
    offsets = [0]
    for group, size in enumerate(sizes):
        places = {row: at for at, row in enumerate(gated[group].tolist())}
        members = [k for k, g in enumerate(groups) if g == group]
        for row in range(size):
            at = places.get(row)
            found += [(k, row, row) if at is None else (count + k, at, row) for k in members]
            offsets.append(len(found))
    return torch.tensor(found, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)


def _eager(
    live: list[Tensor],
    grads: list[Tensor],
    saved: list[Tensor],
    groups: list[int],
    sizes: list[int],
    gated: list[Tensor],
    sums: Tensor,
    seen: Tensor,
) -> dict[str, Run]:
    """The same in PyTorch: tensor by tensor; and with one gather over all channels."""
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    spans = [slice(starts[g], starts[g + 1]) for g in groups]
    rows = [gated[g].to(sums.device) for g in groups]
    places = torch.cat([torch.arange(s.start, s.stop) for s in spans]).to(sums.device)

    def rowwise(t: Tensor) -> Tensor:
        return tensors.rows(t) if t.dim() > 1 else t[:, None]

    def derivative(magnitude: bool = False, exact: bool = True) -> Tensor:
        d = torch.zeros_like(sums[0])
        for t, g, old, at, span in zip(live, grads, saved, rows, spans, strict=True):
            v = t.index_copy(0, at, old)
            v, g = (rowwise(x).double() if exact else rowwise(x) for x in (v, g))
            products = (v * g).abs() if magnitude else v * g
            d[span] += products.sum(1)
        return d

    def add(d: Tensor) -> None:
        finite = d.isfinite().all()
        d = torch.where(finite, d, 0.0)
        sums.add_(torch.stack([d, d * d]))
        seen.add_(torch.stack([finite, ~finite]))

    def tuned() -> None:
        values = [t.index_copy(0, at, old) for t, at, old in zip(live, rows, saved, strict=True)]
        products = torch._foreach_mul(values, grads)
        each = torch.cat([p if p.dim() == 1 else rowwise(p).sum(1) for p in products])
        add(torch.zeros_like(sums[0]).index_add_(0, places, each.double()))

    return {
        "exact": derivative,
        "magnitude": lambda: derivative(magnitude=True),
        "naive": lambda: add(derivative(exact=False)),
        "tuned": tuned,
    }


def _zero(network: shapes.Network, dtype: str, whole: list[Tensor]) -> Case:
    keep = []
    for tensor, rows in zip(whole, tensors.keeps(whole, 0), strict=True):
        keep.append(torch.zeros(len(tensor), dtype=torch.bool, device=rows.device))
        keep[-1][rows] = True
    columns = [k.view(-1, 1, 1, 1) for k in keep]
    dropped = [~c for c in columns]

    def fault() -> str | None:
        for tensor, kept in zip(whole, keep, strict=True):
            copy = tensor.clone(memory_format=torch.preserve_format)
            psap_kernels.zero_filters_([copy], [kept])
            if copy[~kept].any() or not torch.equal(copy[kept], tensor[kept]):
                return "rows to clear are not zero, or others were touched"
        return None

    cleared = [t[~k] for t, k in zip(whole, keep, strict=True)]
    return Case(
        op="zero_filters_",
        name=network.name,
        shape=f"{tensors.summary(network)}, with momentum, half cleared",
        dtype=dtype,
        bytes=tensors.size(cleared),
        fused=lambda: psap_kernels.zero_filters_(whole, keep),
        verify=fault,
        baselines={
            "masked_fill_": lambda: [
                t.masked_fill_(d, 0) for t, d in zip(whole, dropped, strict=True)
            ],
            "mul_": lambda: [t.mul_(c) for t, c in zip(whole, columns, strict=True)],
        },
        limit=limits.clear(cleared),
    )


def _restore(network: shapes.Network, dtype: str, whole: list[Tensor]) -> Case:
    rows = tensors.keeps(whole, 0)
    saved = [torch.randn_like(t[r]) for t, r in zip(whole, rows, strict=True)]

    def fault() -> str | None:
        psap_kernels.restore_filters_(whole, rows, saved)
        same = [torch.equal(t[r], s) for t, r, s in zip(whole, rows, saved, strict=True)]
        return None if all(same) else f"tensor {same.index(False)} does not hold the saved rows"

    def eager() -> list[Tensor]:
        return [t.index_copy_(0, r, s) for t, r, s in zip(whole, rows, saved, strict=True)]

    return Case(
        op="restore_filters_",
        name=network.name,
        shape=f"{tensors.summary(network)}, with momentum, half restored",
        dtype=dtype,
        bytes=2 * tensors.size(saved) + tensors.size(rows),
        fused=lambda: psap_kernels.restore_filters_(whole, rows, saved),
        verify=fault,
        baselines={"index_copy_": eager},
        limit=limits.copy(saved),
        capturable=False,  # the ranges of the rows are looked at on the host
    )
