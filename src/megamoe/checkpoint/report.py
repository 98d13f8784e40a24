# SPDX-License-Identifier: Apache-2.0
"""The two reports of a conversion: report.json with every weight, report.html with one page of plots.

Both depend on the source and the options alone: no times, no paths, so that a conversion that was stopped and finished
writes the same bytes. The page is one file without scripts or references to other files.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megamoe.checkpoint.manifest import Record
from megamoe.checkpoint.rounding import HISTOGRAM_BINS, HISTOGRAM_LOWEST

FORMAT = 1
NUM_WORST = 20


def make(
    records: Sequence[Record],
    *,
    options: Mapping[str, Any],
    producer: tuple[str, str],
    source: str,
    source_bytes: int,
    made_bytes: int,
    carried_bytes: int,
    input_scales: str,
) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
        records: one for every converted weight.
        options: what the user chose.
        producer: name and version.
        source: name of the source.
        source_bytes: bytes of its tensors.
        made_bytes: bytes of the tensors that were written.
        carried_bytes: of these, bytes of weights and tensors that were not converted.
        input_scales: "calibrated" or "uncalibrated".
    """
    tensors = sorted(records, key=lambda record: str(record["name"]))
    groups: dict[str, dict[str, Any]] = {}
    for record in tensors:
        key = f"{record['group']}: {record['from']} to {record['to']}"
        group = groups.setdefault(key, _empty_group(record))
        group["weights"] += 1
        group["bytes_before"] += record["bytes_before"]
        group["bytes_after"] += record["bytes_after"]
        group["blocks"] += record.get("blocks", 0)
        group["inexact_blocks"] += record.get("inexact_blocks", 0)
        for span, count in record.get("exponent_spans", {}).items():
            group["exponent_spans"][span] = group["exponent_spans"].get(span, 0) + count
        if "histogram" in record:
            group["rounded_weights"] += 1
            group["zero_errors"] += record["zero_errors"]
            group["histogram"] = [a + b for a, b in zip(group["histogram"], record["histogram"], strict=True)]
            group["worst_relative_l2"] = max(group["worst_relative_l2"], record["relative_l2"] or 0.0)
            group["mean_relative_l2"] += record["relative_l2"] or 0.0
    for group in groups.values():
        group["mean_relative_l2"] /= max(group["rounded_weights"], 1)
        group["exponent_spans"] = dict(sorted(group["exponent_spans"].items(), key=lambda item: int(item[0])))
    return {
        "format": FORMAT,
        "producer": {"name": producer[0], "version": producer[1]},
        "source": source,
        "options": dict(options),
        "input_scales": input_scales,
        "bytes": {"before": source_bytes, "after": made_bytes, "carried_over": carried_bytes},
        "weights": len(tensors),
        "proved_exact": sum(1 for record in tensors if record["method"] == "recoded"),
        "inexact_blocks": sum(record.get("inexact_blocks", 0) for record in tensors),
        "groups": dict(sorted(groups.items())),
        "worst": [str(record["name"]) for record in worst(tensors)],
        "tensors": tensors,
    }


def encode_report(content: Mapping[str, Any]) -> bytes:
    """Return report.json: indented, but with one line for every weight."""
    head = json.dumps({key: value for key, value in content.items() if key != "tensors"}, indent=2)
    lines = ",\n    ".join(json.dumps(record) for record in content["tensors"])
    return f'{head.removesuffix("}").rstrip()},\n  "tensors": [\n    {lines}\n  ]\n}}\n'.encode()


def worst(records: Iterable[Record]) -> list[Record]:
    """Return the weights with the largest relative error, worst first."""
    rounded = [record for record in records if record.get("relative_l2")]
    return sorted(rounded, key=lambda record: (-record["relative_l2"], str(record["name"])))[:NUM_WORST]


def _empty_group(record: Record) -> dict[str, Any]:
    return {
        "group": record["group"],
        "from": record["from"],
        "to": record["to"],
        "weights": 0,
        "bytes_before": 0,
        "bytes_after": 0,
        "blocks": 0,
        "inexact_blocks": 0,
        "exponent_spans": {},
        "rounded_weights": 0,
        "mean_relative_l2": 0.0,
        "worst_relative_l2": 0.0,
        "zero_errors": 0,
        "histogram": [0] * HISTOGRAM_BINS,
    }


# The page

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2530; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #dde3ea }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } code { font-size: .9em }
figure { margin: 1rem 0 } figcaption { color: #5a6676; font-size: .9em }
svg text { font: 11px system-ui, sans-serif; fill: #5a6676 }
.before { fill: #a9b6c6 } .after { fill: #2f6fb0 } .bad { color: #a62014 }
"""


def render_html(content: Mapping[str, Any]) -> str:
    """Return the page for the content of report.json."""
    groups = content["groups"]
    before, after = content["bytes"]["before"], content["bytes"]["after"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>Conversion of {_text(content['source'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Conversion of {_text(content['source'])}</h1>",
        f"<p>{_text(content['producer']['name'])} {_text(content['producer']['version'])}; "
        + ", ".join(f"{_text(key)} <code>{_text(value)}</code>" for key, value in content["options"].items())
        + f"; input scales {_text(content['input_scales'])}.</p>",
        f"<p><strong>{content['proved_exact']:,}</strong> of {content['weights']:,} converted weights were proved "
        "equal to the source: every block was read back and compared after dequantization. ",
        _inexact_sentence(content),
        f" Tensors took {_gigabytes(before)} before and take {_gigabytes(after)} now.</p>",
        "<h2>What was converted</h2>",
        _group_table(groups),
        "<h2>Bytes before and after</h2>",
        _figure(_byte_bars(content), "Stored bytes of each kind of weight: grey before, blue after."),
    ]
    for name, group in groups.items():
        if group["exponent_spans"]:
            caption = (
                "Blocks of 32 by how far their scale lies below the largest that shares their tensor scale, in powers "
                "of two. Up to 17 is exact; blocks beyond it are exact only if they are all zeros."
            )
            parts += [f"<h2>Scales: {_text(name)}</h2>", _figure(_span_bars(group["exponent_spans"]), caption)]
    for name, group in groups.items():
        if group["rounded_weights"]:
            total = sum(group["histogram"]) + group["zero_errors"]
            caption = (
                f"Values by |error| over the root mean square of their weight, in half octaves; "
                f"{100 * group['zero_errors'] / max(total, 1):.1f} % of {total:,} values have no error at all. "
                f"Relative L2: mean {group['mean_relative_l2']:.4f}, worst {group['worst_relative_l2']:.4f}."
            )
            parts += [f"<h2>Errors: {_text(name)}</h2>", _figure(_error_bars(group["histogram"]), caption)]
    by_name = {str(record["name"]): record for record in content["tensors"]}
    if content["worst"]:
        parts += ["<h2>Worst weights</h2>", _worst_table([by_name[name] for name in content["worst"]])]
    if listed := [record for record in content["tensors"] if record.get("inexact_blocks")]:
        parts += ["<h2>Weights with blocks that could not be exact</h2>", _inexact_table(listed)]
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _inexact_sentence(content: Mapping[str, Any]) -> str:
    count = content["inexact_blocks"]
    if not count:
        return "No block had to be rounded for want of an equal."
    return f'<span class="bad">{count:,} blocks had no equal and were rounded; they are listed below.</span>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marked = (
            f"<{tag}{' class=n' if index >= numeric_from else ''}>{cell}</{tag}>" for index, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _group_table(groups: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["weights", "number", "before", "after", "rounded", "blocks without an equal"]
    rows = [
        [
            _text(name),
            f"{group['weights']:,}",
            _gigabytes(group["bytes_before"]),
            _gigabytes(group["bytes_after"]),
            f"{group['rounded_weights']:,}",
            f"{group['inexact_blocks']:,} of {group['blocks']:,}" if group["blocks"] else "–",
        ]
        for name, group in groups.items()
    ]
    return _table(head, rows)


def _worst_table(records: Sequence[Record]) -> str:
    largest = max(record["relative_l2"] for record in records)
    rows = [
        [
            f"<code>{_text(record['name'])}</code>",
            _text(record["method"]),
            f"{record['relative_l2']:.5f}",
            f"{record['cosine']:.6f}" if record["cosine"] is not None else "–",
            f"{record['max_error']:.3g}",
            _bar(record["relative_l2"] / largest),
        ]
        for record in records
    ]
    return _table(["weight", "how", "relative L2", "cosine", "largest error", ""], rows, numeric_from=2)


def _inexact_table(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        blocks = record.get("listed_blocks", [])
        shown = ", ".join(f"[{row}, {block}]" for row, block in blocks[:NUM_WORST])
        more = record["inexact_blocks"] - min(len(blocks), NUM_WORST)
        shown += f" and {more:,} more in report.json" if more else ""
        rows.append([f"<code>{_text(record['name'])}</code>", shown, f"{record['inexact_blocks']:,}"])
    return _table(["weight", "[row, block of 32]", "blocks"], rows, numeric_from=2)


def _bar(share: float) -> str:
    return (
        '<svg width="120" height="10" role="img"><rect class="after" width="'
        f'{max(1.0, 120 * share):.1f}" height="10"/></svg>'
    )


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _byte_bars(content: Mapping[str, Any]) -> str:
    rows = [(name, group["bytes_before"], group["bytes_after"]) for name, group in content["groups"].items()]
    carried = content["bytes"]["carried_over"]
    rows.append(("carried over", carried, carried))
    largest = max(1, *(max(before, after) for _, before, after in rows))
    parts = []
    for index, (name, before, after) in enumerate(rows):
        top = 44 * index
        parts.append(f'<text x="0" y="{top + 12}">{_text(name)}</text>')
        for offset, kind, count in ((16, "before", before), (28, "after", after)):
            width = 620 * count / largest
            parts.append(f'<rect class="{kind}" x="0" y="{top + offset}" width="{width:.1f}" height="10"/>')
            parts.append(f'<text x="{width + 6:.1f}" y="{top + offset + 9}">{_gigabytes(count)}</text>')
    return _svg(760, 44 * len(rows), parts)


def _span_bars(spans: Mapping[str, int]) -> str:
    top = max(18, *(int(span) for span in spans)) if spans else 18
    counts = [(str(span) if span < 255 else "≥255", spans.get(str(span), 0)) for span in range(min(top, 24) + 1)]
    if top > 24:
        counts.append((">24", sum(count for span, count in spans.items() if int(span) > 24)))
    return _columns(counts)


def _error_bars(histogram: Sequence[int]) -> str:
    labels = [f"2^{HISTOGRAM_LOWEST + index // 2}" if index % 4 == 0 else "" for index in range(len(histogram))]
    return _columns(list(zip(labels, histogram, strict=True)))


def _columns(counts: Sequence[tuple[str, int]]) -> str:
    """Columns on a logarithmic scale: what is rare decides here."""
    largest = max(1, *(count for _, count in counts))
    height, width = 150, 720 / len(counts)
    steps = max(1.0, math.log10(largest) + 1.0)
    parts = []
    for power in range(int(math.log10(largest)) + 1):
        y = height - height * (power + 1.0) / steps
        parts.append(f'<line x1="30" x2="760" y1="{y:.1f}" y2="{y:.1f}" stroke="#eef1f5"/>')
        parts.append(f'<text x="0" y="{y + 4:.1f}">1e{power}</text>')
    for index, (label, count) in enumerate(counts):
        x = 34 + index * width
        tall = height * (math.log10(count) + 1.0) / steps if count else 0.0
        title = f"<title>{_text(label)}: {count:,}</title>"
        parts.append(
            f'<rect class="after" x="{x:.1f}" y="{height - tall:.1f}" width="{width * 0.8:.1f}" height="{tall:.1f}">'
            f"{title}</rect>"
        )
        parts.append(f'<text x="{x:.1f}" y="{height + 14}">{_text(label)}</text>')
    return _svg(770, height + 20, parts)


def _svg(width: int, height: int, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 -10 {width} {height + 10}" width="100%" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(parts)}</svg>"
    )
