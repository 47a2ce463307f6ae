"""The plots of the report, as inline SVG that takes the page's text colour (light or dark)."""

import io
import re

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator  # noqa: E402

INK = "#010203"  # stands for the page's text colour; replaced by currentColor in the SVG
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#3b82d6", "#e07b22", "#2f9e6b", "#d1495b", "#8b6fc9", "#8a8f98"
PASSAGE_COLOURS = (BLUE, ORANGE)

_STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.8,
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "path",
    "svg.hashsalt": "subbyte",
}


def _svg(figure, title):
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", pad_inches=0.04)
    plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    prefix = re.sub(r"\W+", "", title)  # ids are global to the page that holds several plots
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ([^>]*?)height="[^"]*" ([^>]*?)width="[^"]*"',
        lambda m: f'<svg role="img" aria-label="{title}" ' + "".join(g for g in m.groups() if g),
        svg,
        count=1,
    )


def _plain_ticks(axis, values):
    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def perplexity_plot(reference, rows, passages):
    """Perplexity over the dense model's, against stored bits a weight: all settings, and those that still work, larger."""
    usable = 2.0
    with plt.rc_context(_STYLE):
        figure, (whole, near) = plt.subplots(1, 2, figsize=(9.6, 4.1), width_ratios=(1, 1.25))
        top = 1.0
        for passage, colour in zip(passages, PASSAGE_COLOURS):
            for field, filled in (("perplexity", True), ("perplexity_a8", False)):
                points = [(r["bits_per_weight"], r[field][passage] / reference[passage], r) for r in rows if r.get(field)]
                if not points:
                    continue
                uniform, mixed = (sorted(p[:2] for p in points if p[2]["mixed"] == kind) for kind in (False, True))
                top = max([top] + [p[1] for p in points])
                face = colour if filled else "none"
                for axes in (whole, near):
                    axes.plot(
                        *zip(*uniform),
                        color=colour,
                        lw=1.6 if filled else 1,
                        ls="-" if filled else ":",
                        marker="o",
                        ms=6,
                        markerfacecolor=face,
                        markeredgecolor=colour,
                        zorder=3,
                        label=f"{passage}, x in {'float' if filled else 'int8'}",
                    )
                    if mixed:
                        axes.plot(
                            *zip(*mixed),
                            ls="none",
                            marker="*",
                            ms=14 if filled else 12,
                            markerfacecolor=face,
                            markeredgecolor=colour,
                            zorder=4,
                        )
        whole.plot([], [], ls="none", marker="*", ms=12, color=GREY, label="mixed width")
        for axes in (whole, near):
            axes.axhline(1, color=INK, lw=1)
            axes.set_xlabel("bits per weight, scales and offsets included")
            _plain_ticks(axes.xaxis, range(2, 10))
        whole.set_yscale("log")
        _plain_ticks(whole.yaxis, [t for t in (1, 2, 5, 10, 100, 1000, 10000, 100000, 1000000) if t <= top * 1.3])
        whole.set_ylim(0.9, top * 1.6)
        whole.set_ylabel("perplexity / perplexity of float32")
        whole.set_title("all settings", fontsize=10.5)
        near.set_ylim(0.98, usable)
        near.set_xlim(3.8, 8.8)
        near.set_title("4 bits and more", fontsize=10.5)
        figure.legend(*whole.get_legend_handles_labels(), loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.1))
        figure.tight_layout()
        return _svg(figure, "Perplexity against bits per weight")


def error_plot(rows):
    """Relative error of the 7 matrices of each block: mean as a line, smallest to largest as a band."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(8.6, 4.4))
        colours = (GREEN, BLUE, PURPLE, ORANGE, RED, GREY, "#b08968")
        ends = []
        for row, colour in zip(rows, colours):
            blocks = {}
            for name, error in row["errors"].items():
                blocks.setdefault(int(name.split(".")[2]), []).append(100 * error)
            x = sorted(blocks)
            mean = [sum(blocks[b]) / len(blocks[b]) for b in x]
            axes.fill_between(x, [min(blocks[b]) for b in x], [max(blocks[b]) for b in x], color=colour, alpha=0.13, lw=0)
            axes.plot(x, mean, color=colour, lw=1.8)
            ends.append([mean[-1], row["label"], colour])
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis, [0.3, 0.5, 1, 2, 5, 10, 20, 50])
        axes.margins(x=0.01)
        axes.set_xlabel("block of the network")
        axes.set_ylabel("error of the weights, %")
        # Labels at the right end, pushed apart where lines end close together (log axis: by a factor).
        previous = 0.0
        for y, label, colour in sorted(ends):
            place = max(y, previous * 1.27)
            previous = place
            axes.annotate(
                label,
                (x[-1], place),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=10,
                annotation_clip=False,
            )
        return _svg(figure, "Error of the weights by block")


def size_plot(rows):
    """Megabytes in memory: what the matrices' codes, their scales and offsets, and the rest take."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(9.0, 0.36 * len(rows) + 0.9))
        labels = [r["label"] for r in rows]
        parts = (
            ("codes_bytes", "codes", BLUE),
            ("affine_bytes", "scales, offsets", ORANGE),
            ("embedding_bytes", "embedding and head", GREEN),
            ("other_bytes", "norms", GREY),
        )
        left = [0.0] * len(rows)
        for field, name, colour in parts:
            width = [r["size"][field] / 1e6 for r in rows]
            axes.barh(labels, width, left=left, color=colour, height=0.66, label=name)
            left = [a + b for a, b in zip(left, width)]
        for i, total in enumerate(left):
            axes.annotate(f"{total:.0f} MB", (total, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9.5)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, max(left) * 1.12)
        axes.set_xlabel("megabytes")
        axes.legend(loc="lower right")
        return _svg(figure, "Size of the model")


def speed_plot(rows):
    """Tokens a second: three panels, one bar a setting and kind of x."""
    with plt.rc_context(_STYLE):
        fields = (
            ("decode", "decoding, whole model"),
            ("matrices", "decoding, matrices alone"),
            ("prefill", "prompt of one window"),
        )
        figure, panels = plt.subplots(1, 3, figsize=(9.6, 0.44 * len(rows) + 1.2), sharey=True)
        for axes, (field, title) in zip(panels, fields):
            longest = 0.0
            for i, row in enumerate(rows):
                bars = [(row["speed"].get(field), GREY if row["dense"] else BLUE), (row["speed"].get(field + "_a8"), ORANGE)]
                bars = [b for b in bars if b[0]]
                for j, (value, colour) in enumerate(bars):
                    y = i + (j - (len(bars) - 1) / 2) * 0.38
                    axes.barh(y, value, height=0.36, color=colour)
                    axes.annotate(
                        f"{value:.0f}", (value, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8.5
                    )
                    longest = max(longest, value)
            axes.set_xlim(0, longest * 1.2)
            axes.set_title(title, fontsize=10.5)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("tokens / s")
        panels[0].set_yticks(range(len(rows)), [r["label"] for r in rows])
        panels[0].invert_yaxis()
        handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (GREY, BLUE, ORANGE)]
        figure.legend(
            handles,
            ["PyTorch, dense", "subbyte, x as it is", "subbyte, x in int8"],
            loc="upper center",
            ncols=3,
            bbox_to_anchor=(0.5, 1.06),
        )
        figure.tight_layout()
        return _svg(figure, "Speed")
