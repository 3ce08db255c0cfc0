"""The HTML that the pages of reports are made of: text without markup, sections, and the style sheet."""

import math
import re
from collections.abc import Iterable
from html import escape

from flux.parity.plots import DARK, LIGHT, Drawing

# ---------------------------------------------------------------- text


def said(value: object) -> str:
    """Text as XML may hold it: no markup, and no control characters or halves of surrogate pairs, which a prompt may have."""
    return escape(
        re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(value))
    )


def number(value: float, form: str = ".2e") -> str:
    """0 is the very number 0; what is not known is a dash."""
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else "0" if value == 0 else format(value, form)


def many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def section(title: str, body: str, text: str = "") -> str:
    lead = f'<p class="lead">{text}</p>' if text else ""
    return f"<section><h2>{title}</h2>{lead}{body}</section>"


def figure(title: str, text: str, drawing: Drawing | None) -> str:
    return section(title, f'<figure class="card">{drawing.svg()}</figure>', text) if drawing else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)
        + "</dl>"
    )


# ---------------------------------------------------------------- the page


def style() -> str:
    light, dark = (
        ";".join(f"--{name}:{colour}" for name, colour in colours.items())
        for colours in (LIGHT, DARK)
    )
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{STYLE}"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1260px;margin:0 auto;padding:56px 24px 96px}
code,.rows th[scope=row],.recipe td,.s{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em}
code{overflow-wrap:anywhere}
header{margin-bottom:56px}
.eyebrow{margin:0;color:var(--muted);font-size:13px;letter-spacing:.09em;text-transform:uppercase}
h1{margin:4px 0 20px;font-size:44px;line-height:1.1;letter-spacing:-.02em;font-weight:680}
h1::before{content:"";display:inline-block;width:.5em;height:.5em;margin-right:.4em;vertical-align:.1em;background:currentColor}
h1.over,b.over{color:var(--over)}
h1.over::before{transform:rotate(45deg)}
h1.fine{color:var(--first)}
h1.fine::before{border-radius:50%}
.where{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline;margin:0 0 12px}
.where code{font-size:20px;font-weight:600}
.where span,.sides span{color:var(--muted);font-size:13px}
.verdict,.lead{max-width:76ch;margin:0 0 20px;color:var(--muted)}
.verdict{overflow-wrap:anywhere}
.sides{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;align-items:baseline;margin:0 0 28px}
.note{margin:10px 0;padding:8px 14px;border-left:3px solid var(--muted);background:var(--surface);overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px 24px;margin:0 0 8px}
.facts dt{color:var(--muted);font-size:13px}
.facts dd{margin:0;font-variant-numeric:tabular-nums}
header .facts{gap:16px}
header .facts>div{padding:14px 18px;background:var(--surface);border:1px solid var(--grid);border-radius:10px}
header .facts dd{font-size:26px;line-height:1.25;font-weight:600}
section{margin:0 0 52px}
h2{margin:0 0 6px;font-size:22px;letter-spacing:-.01em;font-weight:640}
.card{margin:0;padding:22px;background:var(--surface);border:1px solid var(--grid);border-radius:12px}
figure{margin:0}
figcaption{margin-top:8px;color:var(--muted);font-size:13px}
svg{display:block;width:100%;height:auto;margin:0 auto;font-family:inherit;font-variant-numeric:tabular-nums}
.split{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:28px;align-items:start}
.split .facts{grid-template-columns:repeat(2,minmax(0,1fr))}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:20px}
.pictures img{display:block;width:100%;height:auto;border-radius:6px;image-rendering:pixelated}
.pictures figure{max-width:512px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:4px 8px;text-align:left;vertical-align:baseline;border-top:1px solid var(--grid)}
thead th{border:0;color:var(--muted);font-weight:500;white-space:nowrap}
tbody th{font-weight:400}
.scroll{overflow:auto}
.recipe th{white-space:nowrap;color:var(--muted)}
.recipe td{overflow-wrap:anywhere;min-width:16ch}
.recipe td.mark{min-width:0}
.differs th,.differs td{color:var(--ink);font-weight:600;background:var(--equal)}
.mark,tr.over .mark{color:var(--over);padding-right:0}
.list{padding:0;overflow:hidden}
.list .scroll{max-height:70vh;border-top:1px solid var(--grid)}
.list thead th{position:sticky;top:0;background:var(--surface);box-shadow:0 1px var(--grid);z-index:1}
.rows td,.rows .n{text-align:right;white-space:nowrap}
.rows .s,.rows td[colspan]{text-align:left}
.rows .s{color:var(--muted)}
.rows th[scope=row]{white-space:nowrap}
tr.over th,tr.over td{background:var(--equal)}
tr.over th[scope=row]{font-weight:600}
tr{scroll-margin-top:40px}
tr:target{outline:2px solid var(--over);outline-offset:-2px}
a{color:inherit}
.rows i{display:inline-block;width:9px;height:9px;margin-right:7px;border-radius:2px}
details+details{border-top:1px solid var(--grid)}
summary{display:flex;flex-wrap:wrap;gap:4px 16px;align-items:baseline;padding:11px 20px;cursor:pointer}
summary::before{content:"▸";color:var(--muted);width:.7em}
[open]>summary::before{content:"▾"}
summary code{min-width:9em;font-weight:600}
summary span{color:var(--muted);font-size:13px}
summary b{font-size:13px;font-weight:600}
summary:focus-visible{outline:2px solid var(--first);outline-offset:-2px}
@media (max-width:760px){main{padding:32px 14px}h1{font-size:34px}.split{grid-template-columns:minmax(0,1fr)}}
@media print{body{background:none}.list .scroll{max-height:none}.card{break-inside:avoid}}
"""
