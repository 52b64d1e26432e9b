"""Base, replicated, s-lora and block-diagonal adapters projected to 2, 4 and 8 GPUs, from times of their parts.

A step is the sum of its parts, each from a measurement, or from what the table of sources names instead:

- Base products: weights read once, and a time for each row, as measured for a whole layer on one GPU, launches in the
  bytes; from about 600 rows on, arithmetic at the measured rate. Every rank has 1/T of them.
- Attention: a launch, and keys and values read once; key/value heads are repeated where T exceeds them.
- All else in a layer (norms, rotation, SwiGLU, cache writes): launches, and bytes of rows, of which the split features'
  share falls with T and the residual stream's does not.
- Collectives: two all-reduces a layer and one of the embedding, an all-gather of the logits, a small broadcast.
- Adapters: launches (two kernels a site, and one at gate/up, where expand is inside SwiGLU), and bytes: factors of the
  adapters in use once, x once, y twice. Block-diagonal has 1/T of the matched rank on each GPU, replicated all ranks of
  one factor, s-lora 1/T of both factors. Decode steps of few rows and ranks up to 16 have base and adapters in one
  kernel, others shrink beside the base product; either spares a fixed time a site: the mean of what it spared in the
  measured layers, at any batch and T.
- s-lora besides: the product with A gathered (q/k/v, gate/up) or summed (o, down) in float32 at every site; small
  kernels that add up shrink's splits and lay the gathered product out; no expand inside SwiGLU, nothing spared.

Assumed: nothing else overlaps but what did when it was measured; the host is never what a step waits for; launches
take as long on all cards, bytes scale with the datasheets' memory bandwidths and arithmetic with their peaks; ranks
arrive at a collective together; collectives in a step take as long as alone. Whatever a real step adds to these
belongs to the base, so that the placements' differences are overstated in relation to it, not in milliseconds.

Printed: the constants with their sources; predictions for every measured row (docs/log.md's, and results/tp.jsonl, if
there) beside it, also with a shrink that waits for the base product, as engines before 24acf5d had it (lines do not say
which); the projection; s-lora against block-diagonal beside the published factors. Drawn: speed of each placement, of
the base's, against the batch. Measurements found in results/ (tp_collectives of more GPUs, lora_kernels of kinds "tp"
and "gemm") take the place of the stand-ins by themselves.

    python -m benchmarks.tp_model [--gpu H200] [--save]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, finish
from benchmarks.tp import LONG, MODELS, PLACEMENTS, PROMPT, SHORT, matched_rank
from benchmarks.tp_parts import BY_INPUTS, MEMORY, SITES, Layer, Parts, known_gpu, lora_sizes, read_lines

CONTEXT = PROMPT + (SHORT + LONG) / 2
"""Of benchmarks.tp's decode steps, on average."""
PREFILL_ROWS, PREFILL_PROMPT = 8192, 512
PUBLISHED = {"8b": 1.63, "70b": 1.79}
"""s-lora's time over block-diagonal's, at most, end to end on eight A100 (BD-LoRA, arXiv 2510.23346)."""
LOGGED = {
    "source": "docs/log.md, 2026-11-22",
    "machine": "NVIDIA H200",
    "model": "8b",
    "size": 2,
    "adapters": 4,
    "fused": False,  # that version had no expand inside SwiGLU
    "beside": False,  # and shrink waited for the product
    "rows": [
        {"placement": placement, "rank": rank, "batch": batch, "step_ms": ms}
        for placement, rank, times in (
            ("base", None, (4.00, 4.29, 4.48, 8.50)),
            ("block-diagonal", 16, (5.23, 5.79, 6.16, 10.27)),
            ("replicated", 16, (5.84, 5.96, 6.38)),
        )
        for batch, ms in zip((1, 16, 64, 256), times, strict=False)
    ],
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a model on `size` GPUs of one kind."""

    parts: Parts
    config: Any
    size: int
    rows: int
    adapters: int
    """In use at once, at most."""
    prompt: int = 0
    """Tokens of a prompt, of which the rows are some; 0: a decode step."""
    context: float = CONTEXT
    """Tokens that a decoded row attends to."""
    fused: bool = True
    """Whether expand is inside SwiGLU."""
    beside: bool = True
    """Whether decode steps spare what is not waited for."""

    @property
    def sampled(self) -> int:
        """Rows that reach the output head."""
        return max(1, self.rows // self.prompt) if self.prompt else self.rows

    def times(self, placement: str = "base", rank: int = 0) -> dict[str, float]:
        """us of its parts. rank: of the LoRA."""
        parts, config, rows = self.parts, self.config, self.rows
        layer, num_layers, hidden = Layer(config, self.size), config.num_hidden_layers, config.hidden_size
        vocab = -(-config.vocab_size // self.size)
        sites = {site: layer.site(site) for site in SITES}
        products = sum(parts.product(n_in, sum(outs), rows) for n_in, outs in sites.values())
        others = (parts.others_prefill if self.prompt else parts.others).us(1, layer.small_bytes(rows))
        attention = 0.0 if self.prompt else parts.attention.us(1, 4 * rows * self.context * layer.kv_width)
        times = {
            "products": num_layers * products + parts.product(hidden, vocab, self.sampled),
            "attention": num_layers * attention,
            "others": num_layers * others + parts.others.us(0, 2 * self.sampled * config.vocab_size),
            "collectives": (2 * num_layers + 1) * parts.collective("all_reduce", 2 * rows * hidden, self.size)
            + parts.collective("all_gather", 2 * self.sampled * vocab * self.size, self.size)
            + parts.collective("all_gather", 8 * self.sampled, self.size),
        }
        if placement != "base":
            both = [self._site(site, *sites[site], placement, rank) for site in SITES]
            times["adapters"], times["exchanges"] = (num_layers * sum(us) for us in zip(*both, strict=True))
        return times

    def ms(self, placement: str = "base", rank: int = 0) -> float:
        return sum(self.times(placement, rank).values()) / 1e3

    def _site(self, site: str, n_in: int, outs: Sequence[int], placement: str, rank: int) -> tuple[float, float]:
        """us of one site's adapter kernels, and of s-lora's collective with what goes with it."""
        parts, size = self.parts, self.size
        rank_a = rank_b = float(rank)
        exchange = 0.0
        if placement == "block-diagonal":
            rank_a = rank_b = matched_rank(self.config, rank, size) / size
        elif placement == "s-lora":
            nbytes = 4 * self.rows * len(outs) * -(-rank // size) * size
            if site in BY_INPUTS:
                outs = [out // size for out in outs]
                exchange = parts.collective("all_reduce", nbytes, size) + parts.small_kernel
            else:
                rank_a = rank / size
                exchange = parts.collective("all_gather", nbytes, size) + 2 * parts.small_kernel
        in_swiglu = self.fused and site == "gate_up" and placement != "s-lora"
        num = min(self.adapters, self.sampled)
        sizes = lora_sizes(n_in, outs, rank_a, rank_b, num, self.rows, in_swiglu=in_swiglu)
        if self.prompt:
            return parts.adapters_prefill.us(*sizes), exchange
        spared = parts.spared(self.rows, max(rank_a, rank_b)) if self.beside and placement != "s-lora" else 0.0
        return parts.adapters.us(*sizes) - spared, exchange


def config_of(model: str, layers: int | None = None) -> Any:
    return transformers.LlamaConfig(**MODELS[model] | ({"num_hidden_layers": layers} if layers else {}))


def runs(folder: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Measured lines, by run: a line of the base begins one."""
    found = [(LOGGED["source"], [LOGGED])]
    for line in read_lines(folder, "tp"):
        if len(found) == 1 or line["rows"][0]["placement"] == "base":
            found.append((f"tp.jsonl, run {len(found)}, {line['date']}", []))
        found[-1][1].append(line)
    return found


def validate(folder: Path) -> list[dict[str, Any]]:
    """Predicted and measured ms of every measured row, for the card that it was measured on; waiting_ms: predicted, had
    shrink waited for the base product.

    added: to the base of its run, so without that one's own error. Whatever an adapted step does beyond the base's
    takes time, so a run in which one is faster than the base's is `disturbed`: something else held that up. There the
    base is the fastest of the runs that are not.
    """
    rows: list[dict[str, Any]] = []
    parts: dict[str, Parts] = {}
    for source, lines in runs(folder):
        mine = [row for line in lines for row in compared(line, parts, folder)]
        decode = [row for row in mine if row["step"] == "decode"]
        base = {setting(row): row["measured_ms"] for row in decode if row["placement"] == "base"}
        disturbed = any(row["measured_ms"] < base.get(setting(row), 0.0) for row in decode)
        rows += [{"source": source, "disturbed": disturbed, **row} for row in mine]
    quiet = [row for row in rows if row["placement"] == "base" and not row["disturbed"]]
    for row in (row for row in rows if row["placement"] != "base"):
        bases = [b for b in quiet if setting(b) == setting(row) and (row["disturbed"] or b["source"] == row["source"])]
        if bases:
            fastest = min(bases, key=lambda b: b["measured_ms"])
            row |= {f"added_{k}": row[k] - fastest[k] for k in ("predicted_ms", "measured_ms")}
            row["of_base"] = fastest["measured_ms"] / row["measured_ms"]
    return rows


def setting(row: dict[str, Any]) -> tuple[Any, ...]:
    """Rows that are alike in it differ in their adapters alone."""
    return tuple(row[k] for k in ("gpu", "gpus", "model", "layers", "step", "batch"))


def compared(line: dict[str, Any], parts: dict[str, Parts], folder: Path) -> Iterator[dict[str, Any]]:
    gpu, layers = known_gpu(line), line.get("layers") or MODELS[line["model"]]["num_hidden_layers"]
    fixed = {"config": config_of(line["model"], layers), "size": line["size"], "adapters": line["adapters"]}
    fixed |= {k: line.get(k, True) for k in ("fused", "beside")} | {"parts": parts.setdefault(gpu, Parts(gpu, folder))}
    for row in (row for row in line["rows"] if "step_ms" in row):
        steps = {"decode": (Step(rows=max(2, row["batch"]), **fixed), row["step_ms"])}
        if row["batch"] * PROMPT >= 2048 and "prompts_ms" in row:  # with fewer, the host is what it waits for
            steps["prompts"] = (Step(rows=row["batch"] * PROMPT, prompt=PROMPT, **fixed), row["prompts_ms"])
        for kind, (step, measured) in steps.items():
            of = (row["placement"], row["rank"] or 0)
            ms, waiting = step.ms(*of), replace(step, beside=False).ms(*of)
            named = {"gpu": gpu, "gpus": line["size"], "model": line["model"], "layers": layers, "step": kind}
            named |= {k: row[k] for k in ("placement", "rank", "batch")}
            times = {"predicted_ms": ms, "waiting_ms": waiting, "measured_ms": measured}
            yield named | times | {"error": ms / measured - 1, "waiting_error": waiting / measured - 1}


def project(parts: Parts, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each model, number of GPUs, rank and batch: the base's ms, and the placements' speeds of the base's."""
    rows = []
    for model in args.models:
        config = config_of(model)
        for size in args.sizes:
            fixed = {"parts": parts, "config": config, "size": size, "adapters": args.adapters, "context": args.context}
            steps = {batch: Step(rows=batch, **fixed) for batch in args.batches}
            steps["prefill"] = Step(rows=PREFILL_ROWS, prompt=PREFILL_PROMPT, **fixed)
            for rank in args.lora_ranks:
                for batch, step in steps.items():
                    ms = {placement: step.ms(placement, rank) for placement in PLACEMENTS}
                    row = {"model": model, "gpus": size, "rank": rank, "bd_rank": matched_rank(config, rank, size)}
                    row |= {"batch": batch, "base_ms": ms["base"]}
                    row |= {placement: ms["base"] / ms[placement] for placement in PLACEMENTS[1:]}
                    rows.append(row | {"s_lora_over_bd": ms["s-lora"] / ms["block-diagonal"]})
    return rows


def show(parts: Parts, checks: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    console = Console(width=150)
    table = Table("part", "source", "measured", title=f"Constants, for {parts.gpu}")
    for what, where, measured in parts.sources:
        table.add_row(what, where, "yes" if measured else "NO")
    console.print(table)
    for source, disturbed in dict.fromkeys((r["source"], r["disturbed"]) for r in checks):
        names = ("GPUs", "model", "step", "placement", "rank", "batch", "predicted", "shrink waits", "measured")
        note = "; disturbed: added to, and share of, another run's base" * disturbed
        table = Table(*names, "error", "added, predicted", "measured", "of base", title=f"ms of {source}{note}")
        mine = [r for r in checks if r["source"] == source]
        for r in mine:
            cells = [f"{r['gpus']} {r['gpu']}", r["model"], r["step"], r["placement"], str(r["rank"] or "-")]
            cells += [str(r["batch"]), *(f"{r[f'{k}_ms']:.2f}" for k in ("predicted", "waiting", "measured"))]
            added = [f"{r[k]:.2f}" for k in ("added_predicted_ms", "added_measured_ms", "of_base") if k in r]
            table.add_row(*cells, f"{r['error']:+.0%}", *(added or "---"))
        console.print(table)
        for step in dict.fromkeys(r["step"] for r in mine):
            off = [mean(abs(r[k]) for r in mine if r["step"] == step) for k in ("error", "waiting_error")]
            console.print(f"{step}: mean error, without its sign {off[0]:.0%}; had shrink waited {off[1]:.0%}")
    for model, size in dict.fromkeys((r["model"], r["gpus"]) for r in rows):
        title = f"{model} on {size} {parts.gpu}: speed, of the base's"
        table = Table("rank", "BD rank", "batch", "base ms", *PLACEMENTS[1:], "s-lora / BD", title=title)
        for r in (r for r in rows if (r["model"], r["gpus"]) == (model, size)):
            cells = [str(r["rank"]), str(r["bd_rank"]), str(r["batch"]), f"{r['base_ms']:.2f}"]
            table.add_row(*cells, *(f"{r[p]:.3f}" for p in PLACEMENTS[1:]), f"{r['s_lora_over_bd']:.2f}")
        console.print(table)
    for model in dict.fromkeys(r["model"] for r in rows):
        best = max((r for r in rows if r["model"] == model), key=lambda r: r["s_lora_over_bd"])
        where = f"{best['gpus']} {parts.gpu}, rank {best['rank']}, batch {best['batch']}"
        published = f"; published: up to {PUBLISHED[model]:.2f} (eight A100)" if model in PUBLISHED else ""
        console.print(f"{model}: block-diagonal at most {best['s_lora_over_bd']:.2f} times s-lora ({where}){published}")


def plot(rows: list[dict[str, Any]], gpu: str, file: Path) -> None:
    """A panel for each model and rank, on the most GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = max(r["gpus"] for r in rows)
    models, ranks = (list(dict.fromkeys(r[k] for r in rows)) for k in ("model", "rank"))
    shape = {"figsize": (3.2 * len(ranks), 3 * len(models)), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(models), len(ranks), sharex=True, sharey=True, **shape)
    for model, line in zip(models, axes, strict=True):
        for rank, axis in zip(ranks, line, strict=True):
            mine = [r for r in rows if (r["model"], r["gpus"], r["rank"]) == (model, size, rank)]
            mine = [r for r in mine if r["batch"] != "prefill"]
            for placement in PLACEMENTS[1:]:
                axis.plot([r["batch"] for r in mine], [r[placement] for r in mine], marker="o", label=placement)
            axis.axhline(1, color="black", linestyle="--", label="base")
            axis.set(xscale="log", xlabel="batch", title=f"{model}, {size} {gpu}, LoRA rank {rank}")
            axis.set_xticks([r["batch"] for r in mine], [str(r["batch"]) for r in mine])
            axis.minorticks_off()
        line[0].set_ylabel("speed of a decode step, of the base's")
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=120)
    print(f"drew {file}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=MEMORY, default="H200")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["8b", "70b"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--lora-ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--context", type=float, default=CONTEXT, help="tokens that a decode step attends to")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measurements")
    parser.add_argument("--plot", type=Path, default=Path(os.environ.get("OUT", RESULTS)) / "tp_model.png")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args(argv)
    parts = Parts(args.gpu, args.results)
    checks, rows = validate(args.results), project(parts, args)
    show(parts, checks, rows)
    plot(rows, args.gpu, args.plot)
    settings = {"gpu": args.gpu, "adapters": args.adapters, "context": args.context, "sources": parts.sources}
    settings["checks"] = [{k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()} for r in checks]
    finish("tp_model", settings, rows, save=args.save)


if __name__ == "__main__":
    main()
