"""The page's style sheet."""

from __future__ import annotations

CSS = """
:root { --ink: #1f2328; --soft: #5b626c; --line: #e1e4e8; --tint: #f6f7f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif; overflow-wrap: anywhere; }
main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .25rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; }
p { margin: .35rem 0 .8rem; max-width: 46rem; }
.soft, figcaption, .lead { color: var(--soft); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .84em; }
p.wide { max-width: none; }
.signature { display: inline-block; background: var(--tint); padding: .15rem .5rem; border-radius: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); gap: .75rem;
  margin: 1.2rem 0; }
.tile { background: var(--tint); border-radius: 8px; padding: .75rem .95rem; }
.tile .name { color: var(--soft); font-size: .82rem; }
.tile .value { font-size: 1.35rem; font-weight: 600; letter-spacing: -.01em; line-height: 1.3; }
.tile .note { color: var(--soft); font-size: .82rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: .8rem 0; padding: 0; list-style: none; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 1.6rem 2rem;
  margin-top: 1rem; }
figure { margin: 0; min-width: 0; max-width: 620px; display: flex; flex-direction: column;
  justify-content: space-between; }
figcaption { font-size: .87rem; line-height: 1.45; }
figcaption b { display: block; color: var(--ink); font-size: .95rem; }
svg { display: block; width: 100%; max-width: 100%; height: auto; margin-top: .3rem; stroke-linejoin: round;
  stroke-linecap: butt; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial,
  sans-serif !important; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .35rem 1.1rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
thead th.number { text-align: right; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
thead th { border-bottom-color: #b9bec5; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: .55rem 0; }
details[open] > summary { font-weight: 600; }
pre { background: var(--tint); border-radius: 6px; padding: .9rem 1rem; overflow-x: auto; white-space: pre-wrap; }
.records { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: .4rem 2rem;
  margin-bottom: 1rem; }
.records ol { list-style: none; margin: 0; padding: 0; }
.records li { display: grid; grid-template-columns: 3.4rem 1fr; gap: .6rem; padding: .28rem 0;
  border-top: 1px solid var(--line); font-size: .93rem; line-height: 1.45; }
.reward { color: var(--soft); font-variant-numeric: tabular-nums; text-align: right; }
.text { white-space: pre-wrap; margin: 0; }
.labelled { display: grid; grid-template-columns: 5.2rem 1fr; gap: .1rem .8rem; margin: .2rem 0 .8rem; }
.labelled dt { color: var(--soft); font-size: .87rem; } .labelled dd { margin: 0; }
@media (max-width: 480px) { main { padding: 1.2rem .9rem 3rem; }
  .tiles { grid-template-columns: 1fr 1fr; } .tile .value { font-size: 1.1rem; }
  .labelled { grid-template-columns: 1fr; } }
@media print { .tile, pre, .signature { border: 1px solid var(--line); } figure, article { break-inside: avoid; } }
"""
