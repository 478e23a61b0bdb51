"""Output of `python -m bench decode`."""

from __future__ import annotations


def table(r):
    """Format one record as lines of text."""
    own = r["contenders"]["decode"]["median_us"]
    lines = [
        f"# {r['nodes']} x {r['ranks'] // r['nodes']} ranks, {r['tokens']} tokens per rank, hidden "
        f"{r['hidden']}, {r['experts']} experts, "
        f"top-{r['top_k']}; {r['steps']} steps; one-way latency of a put with its flag: {r['put_us']:.1f} us",
        f"# {'':12}{'median us':>11}{'p99 us':>11}{'/ decode':>10}{'#wrong':>8}",
    ]
    for name, c in r["contenders"].items():
        lines.append(
            f"  {name:12}{c['median_us']:11.1f}{c['p99_us']:11.1f}{c['median_us'] / own:10.2f}{c['wrong']:8}"
        )
    lines.append("  phases: " + ", ".join(f"{name} {us:.1f} us" for name, us in r["parts_us"].items()))
    for name, hops in r["bytes"].items():
        lines.append(
            f"  bytes of {name}: "
            + ", ".join(
                f"{hop} {b['logical'] / 1e6:.2f} MB logical, {b['physical'] / 1e6:.2f} MB physical"
                for hop, b in hops.items()
            )
        )
    return lines
