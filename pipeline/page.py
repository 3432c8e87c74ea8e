"""The report as one HTML file that needs nothing else: no scripts, no requests, readable in light and dark."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

from PIL import Image

from pipeline.charts import columns, curve, histogram
from pipeline.evaluate import Evaluation
from pipeline.gates import Result
from pipeline.report import LOSSY, Report

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def as_html(report: Report) -> str:
    """The report as one page: no scripts, no requests, light and dark."""
    style = resources.files("pipeline").joinpath("report.css").read_text(encoding="utf-8")
    cards = [_headline(report), _comparison(report), *_charts(report), _terms(report.main), _classes(report.main)]
    cards += [_uniformity(report), _round_trips(report.main), _conditioning(report), _recognition(report)]
    cards += [_picture(*picture) for picture in report.pictures]
    cards += [_gates(report.gates), _lineage(report.lineage)]
    lead = (
        f"{_count(report)} images of split {report.split}, {report.main.bits} bits a value, dataset {report.data[:12]}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        f'<header><h1>{escape(report.title)}</h1><p class="lead">{escape(lead)}</p></header>\n'
        f'<div class="cards">\n{"".join(cards)}</div>\n'
        "<footer>Bits per dimension of exact likelihoods under fixed noise per image, mean ± standard error over "
        "images. File formats are counted whole, on the same quantised pixels.</footer>\n</main></body></html>\n"
    )


def _card(title: str, note: str, body: str, kind: str = "") -> str:
    head = f"<h2>{escape(title)}</h2>" if title else ""
    about = f'<p class="note">{note}</p>' if note else ""
    return f'<section class="{kind}">{head}{about}{body}</section>\n'


def _headline(report: Report) -> str:
    figure = report.main.bits_per_dim
    ratios = "".join(
        f"<div><b>{figure.mean / codec.mean:.2f}×</b> of {_codec_name(name)}</div>"
        for name, codec in report.codecs.items()
    )
    first = report.curves.get("val", [])[:1]
    if first and first[0][1] - figure.mean > 0:
        ratios += f"<div><b>{first[0][1] - figure.mean:.2f}</b> below its first evaluation</div>"
    caveat = "" if report.lossless else f'<p class="failed">{LOSSY}</p>'
    body = (
        f'<div class="figure">{figure.mean:.3f}</div>'
        f'<div class="unit">bits/dim, held out, ± {figure.stderr:.3f}{caveat}</div><div class="versus">{ratios}</div>'
    )
    return _card("", "", body, "third")


def _comparison(report: Report) -> str:
    figures = {_weights_name(name): found.bits_per_dim for name, found in report.evaluations.items()}
    mine = next(iter(figures))
    figures |= {_codec_name(name): found for name, found in report.codecs.items()}
    widest = max(figure.mean for figure in figures.values())
    rows = (
        _row(name, f"{figure.mean:.3f}", f"± {figure.stderr:.3f}", bar=_bar(figure.mean / widest, name == mine),
             mine=name == mine)
        for name, figure in figures.items()
    )  # fmt: skip
    note = "Fewer is better: what one value of one pixel costs, by the model and in files of the same pixels."
    return _card("Beside file formats", note, _table(("bits/dim", "s.e."), rows), "rest")


def _charts(report: Report) -> list[str]:
    cards = []
    if report.curves:
        references = {_codec_name(name, short=True): codec.mean for name, codec in report.codecs.items()}
        colours = {"train": "var(--third)", "val": "var(--accent)"}
        names = {"train": "training images", "val": "held-out images, averaged weights"}
        legend = "".join(
            f'<span><i class="key" style="background:{colours[name]}"></i>{names[name]}</span>'
            for name in report.curves
        )
        chart = curve(report.curves, references, "images seen", "bits/dim")
        cards.append(_card("Learning", "", f'<div class="legend">{legend}</div>{chart}', "half"))
    values = [value for value in report.main.values if math.isfinite(value)]
    if len(values) > 1:
        chart = histogram(values, report.main.bits_per_dim.mean, "bits/dim of single images")
        legend = '<div class="legend"><span><i class="key" style="background:var(--second)"></i>mean</span></div>'
        cards.append(_card("Image by image", "", legend + chart, "half"))
    return cards


def _terms(evaluation: Evaluation) -> str:
    terms = {"bin size (bits)": float(evaluation.bits), "log-determinant": evaluation.log_det}
    terms |= {f"prior of level {level}": share for level, share in enumerate(evaluation.priors, start=1)}
    terms |= {"variational noise": evaluation.noise} if evaluation.uniform_noise else {}
    widest = max(abs(value) for value in terms.values())
    shares = {name: _bar(abs(value) / widest, False, value < 0) for name, value in terms.items()}
    rows = [_row(name, _signed(value), bar=shares[name]) for name, value in terms.items()]
    rows.append(_row("sum", f"{evaluation.bits_per_dim.mean:.3f}", bar="", mine=True))
    error = evaluation.round_trip
    exact = f"decode(encode(x)) differs from x by at most {error:.1e}." if error >= 0 else ""
    note = f"Where the bits go, level 1 being the finest. {exact}"
    return _card("Terms", note, _table(("bits/dim",), rows), "half")


def _uniformity(report: Report) -> str:
    if not report.main.pit:
        return ""
    tests = dict(enumerate(report.own_samples))
    rows = "".join(
        f'<tr><td>level&nbsp;{level}</td><td class="pit">{columns(found.counts)}</td>'
        f'<td class="n">{found.mean:.3f}</td><td class="n">{12 * found.variance:.3f}</td>'
        f'<td class="n">{tests[level - 1].p if level - 1 in tests else math.nan:.2f}</td></tr>'
        for level, found in enumerate(report.main.pit, start=1)
    )
    head = (
        '<tr><th></th><th>Φ of latents</th><th class="n">mean</th><th class="n">12 × var.</th>'
        '<th class="n">own p</th></tr>'
    )
    note = (
        "Held-out images: flat, with mean 0.5 and 12 × variance 1, where the model is right; a hump: their latents are "
        "narrower than it takes them for, a bowl: wider. Own p: Kolmogorov and Smirnov's test on its own samples."
    )
    return _card("Data to the standard normal", note, _scrolling(head, rows), "half")


def _conditioning(report: Report) -> str:
    if not report.conditioning:
        return ""
    rows = (
        _row(name.replace("_", " "), f"{found.present:.0%}", f"{found.absent:.0%}", f"{found.judge:.1%}",
             bar=_bar((found.present + found.absent) / 2, True))
        for name, found in report.conditioning.items()
    )  # fmt: skip
    heads = ("there when asked", "gone when asked", "judge, held out")
    note = "Samples asked for an attribute, and asked to be without it, as a classifier of held-out accuracy sees them."
    return _card("Conditioning", note, _table(heads, rows))


def _recognition(report: Report) -> str:
    if not report.recognition:
        return ""
    rows = (
        _row(name.replace("_", " "), f"{found.right:.0%}", f"{found.chance:.0%}", f"{found.bits:.2f}",
             bar=_bar(found.right, found.right > found.chance))
        for name, found in report.recognition.items()
    )  # fmt: skip
    images = max(found.images for found in report.recognition.values())
    note = (
        f"p(condition | image) by Bayes’ rule from the likelihoods of {images} held-out images, both signs equally "
        "probable beforehand: how much of a condition the density itself knows."
    )
    return _card("Recognition", note, _table(("told right", "by chance", "bits of surprise"), rows))


def _round_trips(evaluation: Evaluation) -> str:
    if not evaluation.latent_round_trips:
        return ""
    named = {"pixels, decode(encode(x)) − x": evaluation.round_trip}
    named |= {f"latents of level {i}": error for i, error in enumerate(evaluation.latent_round_trips, start=1)}
    rows = [_row(name, f"{error:.1e}") for name, error in named.items()]
    rows.append(_row("images exact to the bit", f"{evaluation.exact:.1%}"))
    note = "Float32 rounding, over the first held-out images."
    return _card("There and back", note, _table(("largest error",), rows, bars=False), "half")


def _classes(evaluation: Evaluation) -> str:
    if not evaluation.classes:
        return ""
    widest = max(figure.mean for figure in evaluation.classes.values())
    rows = (
        _row(name, str(figure.images), f"{figure.mean:.3f}", f"± {figure.stderr:.3f}",
             bar=_bar(figure.mean / widest, False))
        for name, figure in evaluation.classes.items()
    )  # fmt: skip
    table = _table(("images", "bits/dim", "s.e."), rows)
    return _card("Classes", "Each image under its own class and attributes.", table, "half")


def _picture(title: str, note: str, picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "png", optimize=True)
    source = base64.b64encode(data.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    body = f'<figure><img {size} alt="{escape(title)}" src="data:image/png;base64,{source}"></figure>'
    return _card(title, escape(note), body)


def _gates(results: Sequence[Result]) -> str:
    if not results:
        return ""
    rows = "".join(
        f'<tr><td>{escape(result.gate)}</td><td class="{"ok" if result.passed else "failed"}">'
        f'{"passed" if result.passed else "failed"}</td><td class="n">{_number(result.value)}</td>'
        f'<td class="n">{_number(result.limit)}</td><td>{escape(result.detail)}</td></tr>'
        for result in results
    )
    head = '<tr><th>gate</th><th></th><th class="n">value</th><th class="n">limit</th><th></th></tr>'
    return _card("Gates", "What a version must pass to become champion.", _scrolling(head, rows))


def _lineage(lineage: Mapping[str, str]) -> str:
    if not lineage:
        return ""
    rows = "".join(f"<dt>{escape(key)}</dt><dd><code>{escape(value)}</code></dd>" for key, value in lineage.items())
    return _card("Lineage", "", f"<dl>{rows}</dl>")


def _table(heads: Sequence[str], rows: Iterable[str], bars: bool = True) -> str:
    """A table of named rows: figures under `heads`, then bars."""
    head = "".join(f'<th class="n">{name}</th>' for name in heads) + "<th></th>" * bars
    return _scrolling(f"<tr><th></th>{head}</tr>", "".join(rows))


def _row(name: str, *figures: str, bar: str | None = None, mine: bool = False) -> str:
    cells = "".join(f'<td class="n">{figure}</td>' for figure in figures)
    cells += "" if bar is None else f'<td class="bar">{bar}</td>'
    return f'<tr class="{"mine" * mine}"><td>{escape(name)}</td>{cells}</tr>'


def _scrolling(head: str, rows: str) -> str:
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _bar(share: float, mine: bool, minus: bool = False) -> str:
    kind = "fill" + " mine" * mine + " minus" * minus
    return f'<div class="{kind}" style="width:{100 * share:.1f}%"></div>'


def _count(report: Report) -> str:
    done = report.main.bits_per_dim.images
    return f"All {done}" if done == report.samples else f"The first {done} of {report.samples}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _weights_name(name: str) -> str:
    return {"ema": "Model, averaged weights", "raw": "Model, last weights"}.get(name, f"Model, {name}")


def _codec_name(name: str, short: bool = False) -> str:
    title = {"png": "PNG", "webp": "WebP"}.get(name, name)
    return title if short else {"PNG": "PNG, optimised", "WebP": "WebP, lossless"}.get(title, title)
