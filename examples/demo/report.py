"""demo_output/report.html: one page, nothing loaded from elsewhere."""

import html

from . import plots

_CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --paper: #ffffff; --page: #f3f5f8; --line: #dde2e9; --good: #1f7a4d;
        --bad: #b3362f; --accent: #2563b8; --best: #e8f2ff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa5b4; --paper: #1a1f27; --page: #12161c; --line: #2e3641; --good: #5cc98f; --bad: #f0857d;
          --accent: #7fb2f5; --best: #1f2f45; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
p { margin: .5rem 0; max-width: 54rem; }
.lead { color: var(--soft); font-size: 1.05rem; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 1.3rem 1.5rem; margin: 1.2rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .9rem; margin: 1.4rem 0; }
.tile { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .9rem; display: block; line-height: 1.35; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: right; color: var(--soft); padding: .3rem .45rem; vertical-align: bottom; line-height: 1.25; }
th.group { text-align: center; border-bottom: 1px solid var(--line); }
td { text-align: right; padding: .34rem .45rem; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.base td { color: var(--soft); }
tr.mixed td { background: var(--best); }
small, .note { color: var(--soft); font-size: .88rem; }
svg { width: 100%; height: auto; display: block; margin: .6rem 0 .2rem; }
ul.checks { list-style: none; padding: 0; margin: .4rem 0; }
ul.checks li { padding: .25rem 0 .25rem 1.7rem; position: relative; }
ul.checks li::before { content: "\\2713"; position: absolute; left: .2rem; font-weight: 700; color: var(--good); }
ul.checks li.no::before { content: "\\2717"; color: var(--bad); }
dl.samples { margin: .4rem 0 0; }
dl.samples dt { font-weight: 600; margin-top: .8rem; }
dl.samples dd { margin: .15rem 0 0; padding: .1rem 0 .1rem .9rem; border-left: 3px solid var(--line); white-space: pre-wrap;
                overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.45; margin: .6rem 0 0; padding: .8rem; background: var(--page); border-radius: 8px; }
table.plain td, table.plain th { text-align: left; white-space: normal; }
"""


def _number(value, digits=2):
    if value is None:
        return "&ndash;"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}f}"


def _table(results):
    passages = list(results["passages"])
    head = (
        '<tr><th rowspan="2">setting</th><th rowspan="2">bits per<br>weight</th><th rowspan="2">model<br>MB</th>'
        '<th rowspan="2">error of<br>weights</th>'
        + "".join(f'<th class="group" colspan="2">perplexity<br>{html.escape(p)}</th>' for p in passages)
        + '<th class="group" colspan="2">decoding<br>tokens/s</th><th class="group"'
        ' colspan="2">prompt<br>tokens/s</th></tr><tr>' + "<th>float x</th><th>int8 x</th>" * (len(passages) + 2) + "</tr>"
    )
    body = []
    for row in results["rows"]:
        errors = list(row["errors"].values())
        cells = [
            html.escape(row["label"]),
            _number(row["bits_per_weight"]),
            _number(row["size"]["total_bytes"] / 1e6, 1),
            "exact" if errors and max(errors) == 0 else f"{100 * sum(errors) / len(errors):.2f} %" if errors else "&ndash;",
        ]
        for passage in passages:
            cells += [_number((row.get(field) or {}).get(passage)) for field in ("perplexity", "perplexity_a8")]
        for field in ("decode", "prefill"):
            cells += [
                _number(row["speed"].get(field), 1 if field == "decode" else 0),
                _number(row["speed"].get(field + "_a8"), 1 if field == "decode" else 0),
            ]
        kind = "base" if row["dense"] else "mixed" if row["mixed"] else ""
        body.append(f'<tr class="{kind}">' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def _checks(results):
    items = "".join(f'<li class="{"" if c["holds"] else "no"}">{html.escape(c["text"])}</li>' for c in results["checks"])
    return f'<ul class="checks">{items}</ul>'


def _tiles(results):
    tiles = "".join(
        f"<div class='tile'><b>{html.escape(t['value'])}</b><span>{html.escape(t['text'])}</span></div>"
        for t in results["tiles"]
    )
    return f'<div class="tiles">{tiles}</div>'


def _widths(results):
    mixed = results["mixed"]
    rows = "".join(
        "<tr><td>"
        + html.escape(kind)
        + "</td>"
        + "".join(f"<td>{counts.get(str(b)) or '&middot;'}</td>" for b in mixed["widths"])
        + "</tr>"
        for kind, counts in mixed["histogram"].items()
    )
    head = "<tr><th>matrix</th>" + "".join(f"<th>{b} bits</th>" for b in mixed["widths"]) + "</tr>"
    return f'<div class="scroll"><table style="max-width:34rem"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def write(results, path):
    passages = list(results["passages"])
    rows, dense = results["rows"], [r for r in results["rows"] if r["dense"]]
    twin_rows = [r for r in rows if not r["dense"] and not r["imported"]]
    reference = dense[0]["perplexity"]
    first = next(iter(results["passages"].values()))
    samples = "".join(f"<dt>{html.escape(r['label'])}</dt><dd>{html.escape(r['sample'])}</dd>" for r in rows if r.get("sample"))
    environment = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in results["environment"].items()
    )
    example = results["example"]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>subbyte: SmolLM2-135M in 2 to 8 bits</title><style>{_CSS}</style></head><body><main>
<h1>SmolLM2-135M-Instruct in 2 to 8 bits</h1>
<p class="lead">What packing the weights of a real language model gains in size and speed, and what it costs in quality, measured on this
machine: {html.escape(results["environment"]["processor"])}, {html.escape(results["environment"]["date"])}.</p>
{_tiles(results)}
<section><h2>What must be exact, is</h2>{_checks(results)}</section>
<section><h2>All settings</h2>{_table(results)}
<p class="note">Perplexity: {first["windows"]} windows of {first["length"]} tokens of each text, lower is better. Bits per weight: codes, scales and
offsets of the {results["model"]["matrices"]} matrices inside the blocks. Model: everything in memory, the tied embedding and head
included (8 bits in every packed setting, groups of 32). Error of weights: Frobenius norm of the difference over that of the weights, mean over the matrices.
&ldquo;int8 x&rdquo; is <code>linear_a8</code>: x is quantized to 8 bits a row on the way in and the product runs in integers.
Speeds are end to end through transformers' Python code, the best of a few runs; g64 means groups of 64 weights that share a scale.</p></section>
<section><h2>Why the quality rows use a twin of the model</h2>
<p>The file holds Q4_1 weights: every group of 32 neighbours already lies on a grid of 16 levels. Quantizing them to 4 bits in groups of 32
finds the same grids again and loses nothing. That proves exactness and says nothing about quality. So every row but
the imported one is measured on a <em>twin</em>: the same function with its channels in another order (the residual stream, the hidden channels of
each MLP, the heads and their value channels, permuted consistently), so that neighbours no longer share a grid.
The twin's float32 logits differ from the model's by at most {results["twin"]["max_difference"]:.1e} where logits reach {results["twin"]["largest_logit"]:.0f}: rounding.</p></section>
<section><h2>Quality against size</h2>{plots.perplexity_plot(reference, twin_rows, passages)}
<p>{html.escape(results["texts"]["quality"])}</p></section>
<section><h2>The mixed-width setting</h2><p>{html.escape(results["texts"]["mixed"])}</p>{_widths(results)}</section>
<section><h2>Error of the weights, block by block</h2>{plots.error_plot(twin_rows)}
<p>{html.escape(results["texts"]["error"])}</p></section>
<section><h2>Size</h2>{plots.size_plot(rows)}
<p>{html.escape(results["texts"]["size"])}</p></section>
<section><h2>Speed</h2>{plots.speed_plot(rows)}
<p>{html.escape(results["texts"]["speed"])}</p></section>
<section><h2>What it writes</h2><p>Question: <em>{html.escape(results["question"])}</em> Greedy decoding, weights packed, x in float.</p>
<dl class="samples">{samples}</dl></section>
<section><h2>The same weights without Python and without PyTorch</h2>
<p>{html.escape(example["text"])}</p><pre>{html.escape(example["output"])}</pre></section>
<section><h2>Machine and versions</h2><table class="plain">{environment}</table></section>
</main></body></html>
"""
    path.write_text(page)
