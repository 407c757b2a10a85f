"""The table of `teachonce plan`: a line for each number, with how it is known."""

from __future__ import annotations

from collections.abc import Iterator

from stages.outcome import Facts, clock
from stages.params import TEACHER


def lines(facts: Facts) -> Iterator[str]:
    """What, how much, and how it is known, of the facts that `plan.run` returned."""
    counted, shards = facts["counted"], "counted, in {:,} shards"
    rows = [
        ("texts", f"{counted['texts']:,}", shards.format(counted["shards"])),
        ("to embed", f"{counted['texts_to_embed']:,}", shards.format(counted["shards_to_embed"])),
    ]
    if counted["texts_to_reuse"]:
        rows.append(("to copy from older shards", f"{counted['texts_to_reuse']:,}", "counted"))
    if at := facts["measured"].get(TEACHER):
        source = f"measured, {at['texts']:,} texts in {at['seconds']:.1f} s on {at['device']}"
        rows += [
            ("tokens of a text", f"{at['tokens_per_text']:.1f}", source),
            (f"longer than {at['max_tokens']:,} tokens", f"{100 * at['truncated']:.1f} %", source),
            ("teacher, tokens/s", f"{at['tokens_per_second']:,.0f}", source),
            ("teacher, texts/s", f"{at['texts_per_second']:,.1f}", source),
            ("teacher, to load", f"{at['load_seconds']:.1f} s", "measured"),
        ]
    if at := counted.get("api"):
        rows += _api_lines(at)
    for what, took in facts["extrapolated"].items():
        size = f", {took['bytes'] / 1e6:,.1f} MB on disk" if "bytes" in took else ""
        steps = f", {took['steps']:,} steps if it is not stopped early" if "steps" in took else ""
        rows.append((what, clock(took["seconds"]), f"extrapolated{size}{steps}"))
    rows += [(what, "?", why) for what, why in facts["not_planned"].items()]
    return (f"{what:<28}{value:>18}  {source}" for what, value, source in rows)


def _api_lines(at: Facts) -> Iterator[tuple[str, str, str]]:
    if at["texts_kept"]:
        yield "paid, not yet in a shard", f"{at['texts_kept']:,}", "counted; not asked for again"
    yield "tokens to pay", f"{at['tokens']:,}", f"{at['how']}, in {at['requests']:,} requests"
    probes = "asked for at the start of each run"
    yield "tokens of the probe texts", f"{at['probe_tokens']:,}", probes
    if "price" in at:
        yield "price", f"{at['price']:,.4f}", "by embed.api.price_per_million_tokens"
    else:
        yield "price", "?", "set embed.api.price_per_million_tokens"
    if at["tokens_spent"]:
        yield "tokens paid before", f"{at['tokens_spent']:,}", "in all runs of this model"
