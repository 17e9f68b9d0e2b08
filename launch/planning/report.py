"""A plan as text (torch-free)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from launch.planning.advice import advise, largest_microbatch
from launch.planning.book import Moment
from launch.planning.forecast import GIB, Plan
from launch.planning.traffic import sent

_SHOWN = GIB // 200
"""Parts below this are summed up."""


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"


def aligned(rows: Iterable[Sequence[str]], indent: str = "  ") -> Iterator[str]:
    """Rows of a table: the first column to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield indent + "  ".join((first.ljust(widths[0]), *cells)).rstrip()


def report(plan: Plan) -> str:
    """The whole plan."""
    parts = (_headline(plan), _memory(plan), _traffic(plan), _time(plan), _disk(plan), _assumed(plan))
    return "\n".join(line for part in (*parts, _verdict(plan)) for line in (*part, "")).rstrip()


def _headline(plan: Plan) -> Iterator[str]:
    layout, train = plan.layout, plan.config.train
    yield (
        f"{plan.config.objective.name}, {plan.num_parameters / 1e6:,.1f}M weights, on "
        f"{layout.cluster.num_nodes} nodes x {layout.cluster.gpus_per_node} {plan.assumptions.gpu}"
    )
    yield (
        f"dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard} x tp {layout.tp}; "
        f"{train.batch_size} sequences a step, {layout.rows_per_rank} per data-parallel rank in "
        f"{len(layout.microbatches)} microbatches of {layout.microbatch_size}; "
        f"recompute {plan.config.parallel.recompute}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    peak = plan.peak
    yield f"Memory of one GPU at the peak ({peak.name}), GiB"
    shown = {name: size for name, size in peak.parts.items() if size >= _SHOWN}
    rows = [(name, gib(size)) for name, size in shown.items()]
    rows += [("other tensors", gib(peak.tensors - sum(shown.values())))]
    rows += [("kernels' workspace", gib(peak.workspace)), ("reserve", gib(plan.reserve))]
    yield from aligned([*rows, ("total", gib(plan.needed))])
    if peak.offloaded:
        host = max(sum(moment.offloaded.values()) for moment in plan.moments)
        yield f"Memory of the host for each GPU: {gib(host)} GiB"
    yield "Other moments, GiB without the reserve"
    yield from aligned((moment.name, gib(moment.total)) for moment in _highest(plan.moments))


def _highest(moments: Iterable[Moment]) -> Iterable[Moment]:
    """One moment of each name, in the order of a step."""
    found: dict[str, Moment] = {}
    for moment in moments:
        before = found.get(moment.name)
        found[moment.name] = moment if before is None or moment.total > before.total else before
    return found.values()


def _traffic(plan: Plan) -> Iterator[str]:
    yield "Sent by one GPU in a step, MB (1e6 bytes); * the computation waits for it"
    rows: list[tuple[str, ...]] = [("", "axis", "kind", "in the node", "to other nodes")]
    total = [0.0, 0.0]
    for transfer in plan.traffic:
        out = sent(transfer, plan.layout)
        total = [total[0] + out.intra_node, total[1] + out.inter_node]
        sizes = [f"{size / 1e6:,.3f}" for size in (out.intra_node, out.inter_node)]
        rows.append(
            (transfer.what + " *" * transfer.exposed, transfer.axis, transfer.kind, sizes[0], sizes[1])
        )
    rows.append(("total", "", "", *(f"{size / 1e6:,.3f}" for size in total)))
    yield from aligned(rows)


def _time(plan: Plan) -> Iterator[str]:
    timing, assumed = plan.timing, plan.assumptions
    yield "Time"
    rows = [
        ("computation", f"{timing.compute_s:.3f} s"),
        ("communication beside it", f"{timing.beside_s:.3f} s"),
        ("communication it waits for", f"{timing.exposed_s:.3f} s"),
        ("one step", f"{timing.step_s:.3f} s"),
        ("tokens per second", f"{plan.tokens_per_s:,.0f}"),
        (f"{plan.config.train.steps:,} steps", f"{plan.run_hours / 24:.2f} days"),
        ("tokens in all", f"{plan.config.train.steps * plan.config.tokens_per_step / 1e9:,.2f}e9"),
        ("GPU hours", f"{plan.gpu_hours:,.0f}"),
    ]
    if assumed.gpu_hour_price is not None:
        rows.append(("price", f"{plan.gpu_hours * assumed.gpu_hour_price:,.0f}"))
    yield from aligned(rows)


def _disk(plan: Plan) -> Iterator[str]:
    one, count = plan.checkpoint_bytes, plan.checkpoints_kept
    yield "Disk, GiB"
    yield from aligned([("one checkpoint", gib(one)), (f"checkpoints at most ({count})", gib(one * count))])


def _assumed(plan: Plan) -> Iterator[str]:
    assumed, teacher = plan.assumptions, plan.teacher
    yield "Assumed"
    if teacher is not None:
        origin = "assumed, no config.json there" if teacher.assumed else "read"
        reader = "" if plan.concepts is None else "; its autoencoder keeps concepts.top_k latents"
        yield (
            f"  teacher ({origin}): width {teacher.d_model}, {teacher.n_layer} blocks, vocabulary "
            f"{teacher.vocab_size}{reader}"
        )
    elif plan.concepts is not None and plan.config.reads_labels:
        yield "  targets are read from the label cache; the time to fill it is not in the plan"
    yield (
        f"  the computation alone reaches {assumed.mfu:.0%} of the {plan.config.train.precision} peak of "
        f"{assumed.gpu} (exact FLOPs per token: {plan.flops.total:.4g})"
    )
    yield (
        f"  a GPU sends {assumed.intra_gbps:g} GB/s in its node and {assumed.inter_gbps:g} GB/s to others "
        "(1e9 bytes per second, one direction), rings, no latency"
    )
    yield (
        "  block weights and gradients travel beside the computation; the root's weights before each "
        "microbatch, its gradients and all tensor-parallel exchange do not"
    )
    yield (
        f"  reserve: {assumed.context_gib:g} GiB for CUDA, NCCL and cuBLAS, {assumed.fragmentation:.0%} of "
        "the tensors for fragmentation; flash attention; eager execution, also where blocks are compiled"
    )
    if plan.config.parallel.offload_parameters:
        yield (
            f"  offloaded shards and gradients travel at {assumed.host_gbps:g} GB/s, and the optimizer reads "
            "and writes the host's memory at as much"
        )
    yield "  validation, text samples, saving and restarts cost no time; a step that writes metrics is shown"


def _verdict(plan: Plan) -> Iterator[str]:
    limit = plan.assumptions.gpu_memory_gb
    if plan.fits:
        free = limit * GIB - plan.needed
        yield f"Fits: {gib(plan.needed)} of {limit:g} GiB, {gib(free)} GiB free."
        yield f"The largest train.microbatch_size that fits (a power of two): {largest_microbatch(plan)}."
        return
    yield f"DOES NOT FIT: {gib(plan.needed)} GiB are needed, a GPU has {limit:g}."
    advices = advise(plan)
    if advices:
        yield "One switch alone, by what it saves:"
        rows = [("", "saves GiB", "needs GiB", "", "step time")]
        for advice in advices:
            fits = "fits" if advice.fits else "too large"
            rows.append(
                (advice.switch, gib(advice.saved), gib(advice.needed), fits, f"x{advice.slowdown:.2f}")
            )
        yield from aligned(rows)
    else:
        yield "No single switch would save memory."


MARKDOWN_COLUMNS = (
    "parameters",
    "optimizer",
    "accumulated gradients",
    "gathered weights",
    "activations",
    "head gradients",
    "logits",
    "teacher + SAE",
    "workspace + reserve",
    "total",
    "sent in the node, GB",
    "to other nodes, GB",
    "step, s",
    "Mtokens/s",
    "GPU hours",
)


def markdown_head() -> str:
    """Header of a table of plans."""
    columns = ("config", "tp", *MARKDOWN_COLUMNS)
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def markdown_row(name: str, plan: Plan) -> str:
    """One plan as a row; GiB of one GPU at its peak, GB per GPU and step."""
    parts = dict(plan.peak.parts)
    known = {
        "parameters": parts.pop("parameters", 0),
        "optimizer": parts.pop("optimizer", 0),
        "accumulated gradients": parts.pop("accumulated gradients", 0),
        "gathered weights": parts.pop("gathered weights", 0) + parts.pop("gather buffer", 0),
        "teacher": parts.pop("teacher", 0) + parts.pop("SAE", 0),
        "heads": parts.pop("LM head gradients", 0) + parts.pop("concept head gradients", 0),
        "logits": parts.pop("logits", 0),
    }
    out = [sent(transfer, plan.layout) for transfer in plan.traffic]
    cells = (
        *(
            gib(known[key])
            for key in ("parameters", "optimizer", "accumulated gradients", "gathered weights")
        ),
        gib(sum(parts.values())),
        *(gib(known[key]) for key in ("heads", "logits", "teacher")),
        gib(plan.peak.workspace + plan.reserve),
        gib(plan.needed),
        f"{sum(part.intra_node for part in out) / 1e9:.2f}",
        f"{sum(part.inter_node for part in out) / 1e9:.2f}",
        f"{plan.timing.step_s:.3f}",
        f"{plan.tokens_per_s / 1e6:.2f}",
        f"{plan.gpu_hours:,.0f}",
    )
    return f"| {name} | {plan.layout.tp} | {' | '.join(cells)} |"
