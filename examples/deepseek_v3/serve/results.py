"""Results of `bench`: results.json and a table."""

from __future__ import annotations

from .model import load_model, mismatches
from .view import ms


def collect(config, samples, seen, stats):
    """Make the contents of results.json: client measurements, mismatches with one process, loads and placements.

    Parameters
    ----------
    config : ServeConfig
    samples : list of Sample
    seen : dict
        load.summary(samples).
    stats : dict
        Router.stats().
    """
    model = load_model(config)
    checked = [mismatches(model, s.prompt, s.tokens) for s in samples if s.tokens]
    return {
        "kind": "serve",
        **seen,
        "errors": sorted({s.error for s in samples if s.error is not None}),
        "mismatched_tokens": sum(wrong for wrong, _ in checked),
        "closest_decision": min((margin for _, margin in checked), default=None),
        "acceptance": stats["units"]["decode"]["acceptance"],
        "kv_bytes": stats["units"]["prefill"]["kv_bytes"],
        "loads": {
            name: {key: unit[key] for key in ("rows_per_rank", "busiest_over_mean")}
            for name, unit in stats["units"].items()
        },
        "placements_used": {name: len(unit["placements"]) for name, unit in stats["units"].items()},
        "placements": {name: unit["placements"] for name, unit in stats["units"].items()},
        "step_seconds": {name: unit["step_seconds"] for name, unit in stats["units"].items()},
        "config": config.to_json(),
    }


def table(found):
    """Format the results as a short table."""
    out = [
        f"requests           {found['requests']:8}   failed {found['failed']}",
        f"tokens             {found['tokens']:8}   lost {found['lost_tokens']}   "
        f"{found['tokens_per_second']:.1f} per second",
        f"mismatched tokens  {found['mismatched_tokens']:8}   of one process, "
        f"{found['config']['dtype']}; closest decision "
        + ("none" if found["closest_decision"] is None else f"{found['closest_decision']:.1e}"),
    ]
    out += [f"error              {error}" for error in found["errors"]]
    for name, text in (("ttft", "first token, ms"), ("tpot", "per token, ms")):
        p = found[name]
        out.append(f"{text:18} p50 {ms(p['p50'])}   p90 {ms(p['p90'])}   p99 {ms(p['p99'])}")
    if found["acceptance"] is not None:
        out.append(f"drafts accepted    {100 * found['acceptance']:7.1f} %")
    kv = found["kv_bytes"]
    out.append(
        f"KV handed over     {kv['node'] / 1e6:8.2f} MB inside nodes, {kv['rail'] / 1e6:.2f} MB between them"
    )
    for name, load in found["loads"].items():
        changes = found["placements_used"][name]
        out.append(
            f"{name:18} rows per rank {load['rows_per_rank']}, busiest/mean {load['busiest_over_mean']:.2f}, "
            f"{changes} changes of placement"
        )
        steps = found["step_seconds"][name]
        out.append(
            " " * 19
            + "step, ms (p50): "
            + ", ".join(f"{kind} {1e3 * p['p50']:.0f}" for kind, p in steps.items())
        )
    return "\n".join(out)
