"""Reports of a Plan: a table for a terminal, JSON, and one self-contained HTML page."""

from __future__ import annotations

from typing import Any

import html
import io
from dataclasses import asdict

TITLES = {
    "sms": "SMs",
    "node_limit": "node limit M",
    "precision": "dispatch rows",
    "ranks": "EP size",
    "tokens": "tokens per rank",
}
ATTENTION_US = (50, 100, 200, 500, 1000)


def summary(plan: Any) -> Any:
    """[(label, text)] of the question and its prediction."""
    q, p = plan.question, plan.prediction
    one, rank = plan.tokens_per_second(p, q.tokens)
    lines = [
        (
            "question",
            f"{q.model_name}, {q.cluster.name}: {q.ranks} ranks = {q.nodes} node{'s' * (q.nodes > 1)} x "
            f"{q.ranks_per_node}, {q.tokens} tokens per rank, {q.slots} slots ({q.slots // q.ranks} per rank), "
            f"top-{q.top_k}{' with the shared expert' if q.shared_is_routed else ''}, {q.top_groups} of {q.groups} "
            f"groups, {q.routing if q.routing in ('uniform', 'zipf') else 'recorded'} routing",
        ),
        (
            "path",
            f"{'decode: one put per token and rank' if q.decode else 'throughput: two hops'}, "
            f"dispatch in {q.quant or 'bf16'}, combine in bf16, {q.num_sms} SMs",
        ),
        ("dispatch", f"{p.dispatch_us:.1f} us (slowest rank {p.dispatch_slowest_us:.1f})"),
        ("combine", f"{p.combine_us:.1f} us (slowest rank {p.combine_slowest_us:.1f})"),
        ("rail", f"{_bytes(p.rail_bytes)} leave a rank (most {_bytes(p.rail_bytes_most)})"),
        ("node", f"{_bytes(p.node_bytes)} leave a rank (most {_bytes(p.node_bytes_most)})"),
        ("hottest link", f"{p.hottest}, busy {p.hottest_share:.0%} of the step"),
        ("memory", f"{_bytes(p.buffer_bytes)} reserved per rank"),
    ]
    if "sms" in plan.sweeps:
        lines.append(("enough SMs", f"{plan.enough_sms}: at most 5% slower than the fastest step"))
    lines.append(
        (
            f"{plan.layers} layers",
            f"{plan.step_ms(p):.2f} ms of communication per step of two micro-batches: "
            f"at most {one:.1f} tokens/s per request, {rank:.0f} tokens/s per rank",
        )
    )
    if plan.slo_ms and "tokens" in plan.sweeps:
        fits = plan.within_slo()
        lines.append(
            (
                "within the SLO",
                f"{plan.slo_ms:g} ms per step: "
                + (f"up to {fits} tokens per rank and micro-batch" if fits else "not even the fewest tokens"),
            )
        )
    for attention in (plan.attention_us,) if plan.attention_us else ATTENTION_US:
        lines.append(
            (
                f"behind {attention:g} us",
                f"{plan.hidden_share(attention):.0%} of the communication is hidden by the other micro-batch",
            )
        )
    return lines


def text(plan: Any) -> str:
    """Summary and one table per sweep, as text."""
    out = [f"{what:>16}  {value}" for what, value in summary(plan)]
    for name, swept in plan.sweeps.items():
        out += [
            "",
            f"{TITLES[name]:>16}  {'dispatch us':>12}{'slowest':>10}{'combine us':>12}{'slowest':>10}"
            f"{'rail MB':>10}{'node MB':>10}",
        ]
        out += [
            f"{value!s:>16}  {p.dispatch_us:12.1f}{p.dispatch_slowest_us:10.1f}"
            f"{p.combine_us:12.1f}{p.combine_slowest_us:10.1f}"
            f"{p.rail_bytes / 1e6:10.3f}{p.node_bytes / 1e6:10.3f}"
            for value, p in swept
        ]
    return "\n".join(out)


def as_dict(plan: Any) -> Any:
    """The plan as plain values: question, prediction, figures of the summary, sweeps."""
    q = asdict(plan.question)
    q["cluster"] = plan.question.cluster.name
    per_request, per_rank = plan.tokens_per_second(plan.prediction, plan.question.tokens)
    return dict(
        question=q,
        prediction=asdict(plan.prediction),
        layers=plan.layers,
        step_ms=plan.step_ms(plan.prediction),
        tokens_per_second=dict(request=per_request, rank=per_rank),
        enough_sms=plan.enough_sms if "sms" in plan.sweeps else None,
        hidden_share={
            str(a): plan.hidden_share(a)
            for a in ((plan.attention_us,) if plan.attention_us else ATTENTION_US)
        },
        slo_ms=plan.slo_ms,
        tokens_within_slo=plan.within_slo() if plan.slo_ms and "tokens" in plan.sweeps else None,
        sweeps={
            name: [dict(value=value, **asdict(p)) for value, p in swept]
            for name, swept in plan.sweeps.items()
        },
    )


def page(plan: Any) -> str:
    """One self-contained HTML page. The charts need matplotlib, of the extra `bench`."""
    q = plan.question
    rows = "\n".join(
        f"<tr><th>{html.escape(what)}</th><td>{html.escape(value)}</td></tr>" for what, value in summary(plan)
    )
    charts = "\n".join(f"<figure>{_chart(name, swept)}</figure>" for name, swept in plan.sweeps.items())
    title = html.escape(f"{q.model_name} on {q.cluster.name}, EP{q.ranks}, {q.tokens} tokens per rank")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #0f172a; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
th {{ text-align: left; color: #475569; font-weight: 600; padding: .2rem 1rem .2rem 0; }}
th {{ white-space: nowrap; vertical-align: top; }}
figure {{ display: inline-block; margin: 1.2rem 1rem 0 0; width: 500px; }} figure svg {{ width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
<table>{rows}</table>
<p>Predicted by a simulation that runs the protocol over modeled links. docs/simulation.md describes what the model
covers and what it leaves out.</p>
{charts}
</body></html>
"""


def _chart(name: str, swept: Any) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    at = range(len(swept))
    for label, color, median, slowest in (
        ("dispatch", "#0f766e", "dispatch_us", "dispatch_slowest_us"),
        ("combine", "#c2410c", "combine_us", "combine_slowest_us"),
    ):
        axis.plot(
            at,
            [getattr(p, slowest) for _, p in swept],
            color=color,
            marker="o",
            label=f"{label}, slowest rank",
        )
        axis.plot(
            at, [getattr(p, median) for _, p in swept], color=color, linestyle=":", label=f"{label}, median"
        )
    axis.set_xticks(at, [str(value) for value, _ in swept])
    axis.set_xlabel(TITLES[name])
    axis.set_ylabel("us")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def _bytes(n: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:.4g} GB"
