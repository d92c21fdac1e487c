"""The style sheet and the script of the page. The page is complete without the script."""

from __future__ import annotations

_LIGHT = """
--bg:#f7f6f3;--surface:#ffffff;--ink:#1b1e23;--muted:#5a616b;--faint:#6b727c;--line:#e5e2dc;
--kept:#1f62a8;--before:#cbd8e8;--restored:#e07b00;--alarm:#ad5c00;--gone:#a39d92;--sparsity:#7b4fa3;
--ratio:#d9d4ca;--dense:#e9eef6;--prune:#fbeed9;--finetune:#e2f1e8;--other:#f0efec;
--shadow:0 1px 2px rgba(30,28,22,.05),0 8px 24px rgba(30,28,22,.04);color-scheme:light;
"""

_DARK = """
--bg:#121417;--surface:#1a1d22;--ink:#e9e7e2;--muted:#a7adb6;--faint:#858c96;--line:#2d3138;
--kept:#64a6ee;--before:#2f4560;--restored:#f5a442;--alarm:#f5a442;--gone:#6d6a64;--sparsity:#bd94e4;
--ratio:#3c3f45;--dense:#1e242d;--prune:#2b2418;--finetune:#1a2822;--other:#22252a;
--shadow:none;color-scheme:dark;
"""

_BASE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;-webkit-font-smoothing:antialiased}
code,pre,.name{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
code{font-size:.86em;overflow-wrap:anywhere}
main{max-width:1060px;margin:0 auto;padding:56px 28px 72px}
header{margin-bottom:28px}
.eyebrow{margin:0 0 10px;color:var(--faint);font-size:13px;letter-spacing:.02em}
.eyebrow b{color:var(--kept);font-weight:650}
h1{margin:0 0 14px;font-size:clamp(28px,5vw,42px);line-height:1.1;letter-spacing:-.025em;
font-weight:680;overflow-wrap:anywhere;text-wrap:balance}
.lede{margin:0;max-width:44em;font-size:clamp(16px,2.1vw,19px);color:var(--muted)}
.lede b{color:var(--ink);font-weight:600}
h2{margin:0 0 4px;font-size:22px;letter-spacing:-.012em;font-weight:650;line-height:1.25}
h3{margin:32px 0 4px;font-size:16px;font-weight:650}
section{background:var(--surface);border:1px solid var(--line);border-radius:14px;
padding:28px 32px;margin:20px 0;box-shadow:var(--shadow)}
section>p{margin:0 0 14px;color:var(--muted);max-width:46em}
.note{margin:12px 0 0;color:var(--muted);font-size:14px}
.faint{color:var(--faint)}
"""

_TILES = """
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;
margin:28px 0;background:var(--surface);border:1px solid var(--line);border-radius:14px;
overflow:hidden;box-shadow:var(--shadow)}
.tile{box-shadow:0 0 0 1px var(--line);padding:20px 18px 18px;display:flex;flex-direction:column}
.tile dt{color:var(--muted);font-size:13px;margin-bottom:4px}
.tile dd{margin:0;flex:1;display:flex;flex-direction:column}
.tile strong{font-size:clamp(21px,2.4vw,27px);line-height:1.2;font-weight:660;
letter-spacing:-.025em;white-space:nowrap}
.tile strong:has(sup){font-size:clamp(19px,2vw,23px);line-height:32px}
sup{font-size:.68em;line-height:0}
.tile small{margin-top:auto;padding-top:8px;color:var(--faint);font-size:13px;line-height:1.4}
.meter{height:4px;border-radius:2px;background:var(--before);margin-top:8px;overflow:hidden}
.meter i{display:block;height:100%;background:var(--kept)}
.silhouette{margin:34px 0 0}
.silhouette figcaption{display:flex;justify-content:space-between;gap:12px;margin-top:10px;
color:var(--faint);font-size:13px}
.silhouette figcaption span:nth-child(2){text-align:center}
"""

_CHARTS = """
figure{margin:0}
.over{overflow:visible;display:block}
svg text{fill:var(--muted);font-size:12px}
svg .name{font-size:11.5px;fill:var(--ink)}
svg .tick{fill:var(--faint);font-size:11.5px}
svg .head{fill:var(--ink);font-size:12.5px;font-weight:600}
svg .faint{fill:var(--faint)}
.end{text-anchor:end}.middle{text-anchor:middle}.mid{dominant-baseline:central}
.grid{stroke:var(--line);stroke-width:1;shape-rendering:crispEdges}
rect.before{fill:var(--before)}rect.kept{fill:var(--kept)}
.row:hover .name{fill:var(--kept)}
.curve{fill:none;stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round;
stroke-linecap:round}
.curve.sparsity{stroke:var(--sparsity)}
.curve.average{stroke:var(--sparsity);stroke-width:1.5;stroke-dasharray:2 4;opacity:.8}
.curve.accuracy,.curve.macs{stroke:var(--kept)}.curve.loss{stroke:var(--restored)}
.dot{stroke:var(--surface);stroke-width:1}
.dot.sparsity{fill:var(--sparsity)}.dot.accuracy,.dot.macs{fill:var(--kept)}
.dot.loss{fill:var(--restored)}
svg .last{font-weight:650;font-size:12.5px;fill:var(--kept)}svg .last.loss{fill:var(--alarm)}
rect.ratio{fill:var(--ratio)}
.heat.sparsity{fill:var(--sparsity)}.heat.ratio{fill:var(--kept)}
svg .cell{font-size:10.5px;text-anchor:middle;dominant-baseline:central;fill:var(--ink);
pointer-events:none}
svg .over-strong{fill:var(--surface)}
.hover{fill:var(--ink);fill-opacity:0}.hover:hover{fill-opacity:.07}
.phase.dense{fill:var(--dense)}.phase.prune{fill:var(--prune)}
.phase.finetune{fill:var(--finetune)}.phase.other{fill:var(--other)}
svg .phase-name{font-size:12px;font-weight:600;fill:var(--muted)}
.step{stroke:var(--restored);stroke-width:1;stroke-dasharray:3 3}
svg .step-name{font-size:11px;fill:var(--muted)}
.reference{stroke:var(--muted);stroke-width:1;stroke-dasharray:5 4}
.whisker{stroke:var(--ink);stroke-width:1.25}
.tall{max-height:75vh;overflow:auto;border:1px solid var(--line);border-radius:8px;padding:10px}
.multiples{display:grid;grid-template-columns:repeat(auto-fill,minmax(212px,1fr));gap:26px 26px;
align-items:end}
.multiples figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 8px;
margin-bottom:10px;font-size:13px;color:var(--muted)}.multiples code{color:var(--ink)}
.multiples figcaption small{flex-basis:100%}
.maps{display:grid;gap:9px}.maps+p,.tall+p{margin-top:20px}
.group{display:grid;grid-template-columns:264px minmax(0,1fr);gap:16px;align-items:start}
.group p{margin:0;font-size:13px;line-height:12px;color:var(--muted);display:grid;
grid-template-columns:1fr max-content 22px;gap:0 10px;white-space:nowrap}
.group code{color:var(--ink)}.group small{grid-column:1/-1;line-height:16px}
b.restored{color:var(--alarm);font-weight:650}
.map{display:block;width:100%;height:auto;overflow:visible}
.cells.kept{fill:var(--kept)}.cells.alone{fill:var(--before)}
.cells.restored{fill:var(--restored)}.cells.gone{fill:var(--gone)}
.cells.returned{fill:var(--kept)}.cells.returned .mark{fill:var(--surface)}
.cells.again{fill:var(--gone)}.cells.again .mark{fill:var(--restored)}
.cells:hover{stroke:var(--ink);stroke-width:1.5}
"""

_PARTS = """
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 18px;font-size:13px;
color:var(--muted);max-width:none}.legend>span{white-space:nowrap}
.swatch{display:inline-block;width:11px;height:11px;border-radius:2px;margin:0 6px 0 0;
vertical-align:-1px}
.swatch.gone:not(:first-child){margin-left:10px}
.silhouette .swatch{margin-left:8px}
.swatch.kept{background:var(--kept)}.swatch.before,.swatch.alone{background:var(--before)}
.swatch.restored{background:var(--restored)}.swatch.gone{background:var(--gone)}
.swatch.returned{background:radial-gradient(circle,var(--surface) 0 28%,var(--kept) 32%)}
.swatch.again{background:radial-gradient(circle,var(--restored) 0 28%,var(--gone) 32%)}
.swatch.ratio{background:var(--ratio)}
.swatch.line{width:18px;height:0;border-top:2px solid;border-radius:0;vertical-align:4px}
.swatch.line.sparsity{border-color:var(--sparsity)}
.swatch.line.average{border-top:2px dotted var(--sparsity)}
.swatch.line.reference{border-top:1px dashed var(--muted)}
.swatch.upright{width:0;height:12px;border-left:1px dashed var(--restored)}
.swatch.phase{border:1px solid var(--line)}
.swatch.dense{background:var(--dense)}.swatch.prune{background:var(--prune)}
.swatch.finetune{background:var(--finetune)}.swatch.other{background:var(--other)}
details{margin-top:18px}
summary{cursor:pointer;color:var(--muted);font-size:14px;width:fit-content;border-radius:4px}
summary:hover{color:var(--ink)}
.scroll{overflow-x:auto;max-height:60vh;margin-top:10px}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--kept);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:6px 14px 6px 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:500}thead th{color:var(--muted);font-size:13px;white-space:nowrap;position:sticky;
top:0;background:var(--surface)}
.n{text-align:right;white-space:nowrap}.n+:not(.n){padding-left:14px}td:last-child,th:last-child{padding-right:0}
.compare table{font-size:15px}.compare td,.compare th{padding-top:9px;padding-bottom:9px}
.compare .plot{margin-top:26px}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:6px 24px;margin:0;
font-size:14px}.facts dt{color:var(--muted)}.facts dd{margin:0;overflow-wrap:anywhere}
.why{list-style:none;margin:0;padding:0;display:grid;gap:16px}
.why p{margin:0 0 4px;font-weight:550}.why code{color:var(--muted);margin-right:12px}
pre{background:var(--bg);border:1px solid var(--line);border-radius:8px;padding:12px 14px;
margin:10px 0 18px;overflow:auto;max-height:60vh;font-size:13px;line-height:1.45;
white-space:pre-wrap;overflow-wrap:anywhere}
section>details:only-child{margin:0}section>details:only-child>summary{color:var(--ink);
font-size:16px;font-weight:600}
footer{color:var(--faint);font-size:13px;margin-top:28px}
#tip{position:fixed;z-index:9;max-width:320px;padding:7px 10px;border-radius:7px;
pointer-events:none;
background:var(--ink);color:var(--bg);font-size:12.5px;line-height:1.4;white-space:pre-line}
#tip[hidden]{display:none}
#theme{float:right;border:1px solid var(--line);background:var(--surface);color:var(--muted);
border-radius:99px;padding:4px 13px;font:inherit;font-size:13px;cursor:pointer}
#theme:hover{color:var(--ink)}
"""

_NARROW = """
@media (max-width:990px){.tiles{grid-template-columns:repeat(3,minmax(0,1fr))}}
@media (max-width:640px){main{padding:28px 14px 48px}section{padding:20px 16px;border-radius:12px}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.tile{padding:14px}.tile strong{font-size:24px}
.group{grid-template-columns:1fr;gap:6px}.maps{gap:14px}svg .cell,svg .phase-name{display:none}
.compare table{font-size:14px}.compare td .faint{display:block;font-size:12px}
td,th{padding-right:10px}
.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:8px}
.silhouette figcaption span:first-child,.silhouette figcaption span:last-child{display:none}
.silhouette figcaption{justify-content:center}}
"""

_PRINT = (
    "@media print{:root,:root[data-theme=dark]{"
    + _LIGHT
    + """}
@page{margin:14mm}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
body{background:#fff;font-size:11pt}main{max-width:none;padding:0}
section{border:0;box-shadow:none;padding:0;margin:26px 0;border-radius:0}
.tall,.scroll,pre{max-height:none;overflow:visible;border:0}
.tiles,.group,.multiples figure,.silhouette,tr,h2,.legend{break-inside:avoid}
h2,h3,.legend{break-after:avoid}#theme,#tip{display:none}thead th{position:static}}
"""
)

STYLE = (
    f":root{{{_LIGHT}}}"
    f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{_DARK}}}}}"
    f":root[data-theme=dark]{{{_DARK}}}" + _BASE + _TILES + _CHARTS + _PARTS + _NARROW + _PRINT
)

# Hover text without the browser's delay, a switch between light and dark, all tables open in print.
SCRIPT = """
"use strict";
(() => {
  const root = document.documentElement, tip = document.createElement("div");
  tip.id = "tip"; tip.hidden = true; document.body.append(tip);
  const hints = new WeakMap();
  for (const title of document.querySelectorAll("svg g>title,svg rect>title")) {
    hints.set(title.parentNode, title.textContent);
    title.remove();
  }
  addEventListener("pointermove", (event) => {
    let at = event.target;
    while (at && !hints.has(at)) at = at.parentNode;
    tip.hidden = !at;
    if (!at) return;
    tip.textContent = hints.get(at);
    const box = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    let y = event.clientY + 16;
    if (y + box.height > innerHeight - 8) y = event.clientY - box.height - 10;
    tip.style.left = Math.max(8, x) + "px";
    tip.style.top = Math.max(8, y) + "px";
  });
  const dark = matchMedia("(prefers-color-scheme:dark)");
  const button = document.createElement("button");
  const shown = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const name = () => { button.textContent = shown() === "dark" ? "Light" : "Dark"; };
  button.id = "theme"; button.type = "button";
  button.setAttribute("aria-label", "Switch between light and dark");
  button.onclick = () => { root.dataset.theme = shown() === "dark" ? "light" : "dark"; name(); };
  name(); dark.onchange = name;
  document.querySelector("header").prepend(button);
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const part of closed) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of closed) part.open = false; });
})();
"""
