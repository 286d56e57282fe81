"""The style sheet of the report, with light and dark colours and two narrow layouts."""

CSS = """
:root {
  --paper: #fcfbf9; --ink: #1c1e21; --quiet: #6a6e74; --line: #e3e1dc; --wash: #f3f1ec;
  --teacher: #1c1e21; --start: #a9a59c; --hard: #c2701c; --distilled: #0f6f8c; --other: #7a5ea8;
  --bad: #b3261e; --heat: #f2803a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --ink: #e9e7e2; --quiet: #9a9da3; --line: #2c3036; --wash: #1c1f24;
    --teacher: #e9e7e2; --start: #6f737a; --hard: #e59a4a; --distilled: #4fb6d6; --other: #b49be0;
    --bad: #ff8a80; --heat: #b34714;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 Inter, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main { max-width: 1040px; margin: 0 auto; padding: 56px 32px 96px; }
.kicker { margin: 0 0 14px; color: var(--quiet); font-size: 13px; letter-spacing: .02em; }
h1 {
  margin: 0; max-width: 31em; font-size: 29px; line-height: 1.28; font-weight: 600;
  letter-spacing: -.018em; text-wrap: pretty;
}
.about { margin: 14px 0 0; max-width: 46em; color: var(--quiet); }
h2 { margin: 0 0 22px; font-size: 18px; font-weight: 600; letter-spacing: -.01em; }
h3 { margin: 20px 0 6px; font-size: 13px; font-weight: 600; color: var(--quiet); }
section { margin-top: 56px; padding-top: 24px; border-top: 1px solid var(--line); }
small {
  display: block; color: var(--quiet); font-size: 12.5px; font-weight: 400; line-height: 1.4;
}
.bad { color: var(--bad); font-weight: 400; }

.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 28px; margin: 40px 0 0; }
.tiles div { display: flex; flex-direction: column; }
.tiles dd {
  margin: 0; font-size: 30px; font-weight: 600; letter-spacing: -.025em; line-height: 1.2;
}
.tiles .bad { font-size: 18px; letter-spacing: 0; }
.tiles dt {
  margin-top: 4px; max-width: 15em; color: var(--quiet); font-size: 13px; line-height: 1.4;
}

.panels, .charts { display: grid; grid-template-columns: repeat(3, 1fr); gap: 28px 44px; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 32px 40px; }
.charts figure { display: flex; flex-direction: column; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 12px; font-weight: 600; font-size: 14px; }
.row {
  display: grid; grid-template-columns: 96px 1fr 54px; gap: 12px; align-items: center;
  font-size: 13px;
}
.row > span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--quiet); }
.row > b { font-weight: 500; text-align: right; line-height: 1.2; }
.track { position: relative; height: 28px; }
.track::before {
  content: ""; position: absolute; left: 0; right: 0; top: 50%;
  border-top: 1px solid var(--line);
}
.grid { position: absolute; background: var(--line); }
.track .grid { top: 0; bottom: 0; width: 1px; }
.dot {
  display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: currentColor;
}
.track .dot {
  position: absolute; top: 50%; width: 11px; height: 11px; margin: -5.5px 0 0 -5.5px;
}
.axis .track { height: 20px; }
.axis .track::before { display: none; }
.track .bad {
  position: absolute; top: 50%; left: 8px; padding: 0 6px; background: var(--paper);
  line-height: 1.6; transform: translateY(-50%);
}
.axis .track span {
  position: absolute; transform: translateX(-50%); font-size: 12px; color: var(--quiet);
}
.teacher { color: var(--teacher); } .start { color: var(--start); } .hard { color: var(--hard); }
.distilled { color: var(--distilled); } .other { color: var(--other); }

.wide { margin-top: 44px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
.results { table-layout: fixed; min-width: calc(88px + 64px * var(--models)); }
.results td .bad { white-space: normal; }
.results thead td { width: 34%; }
td { white-space: nowrap; }
th, td {
  padding: 9px 0 9px 16px; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line);
}
thead th { font-size: 13px; font-weight: 600; white-space: nowrap; }
thead th .dot { margin-right: 7px; }
thead td, tbody th { padding-left: 0; text-align: left; font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }

.gap {
  display: grid; grid-template-columns: minmax(0, 1fr) 220px 64px; gap: 4px 28px;
  align-items: center;
  padding: 12px 0; border-bottom: 1px solid var(--line);
}
.gap:last-child { border-bottom: 0; }
.gap strong { font-weight: 500; }
.gap > b { text-align: right; font-weight: 600; }
.gap em {
  grid-column: 2 / -1; text-align: right; font-style: normal; font-size: 12.5px;
  color: var(--bad);
}
.gap em:empty { display: none; }
.bar { height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; }
.bar i { display: block; height: 100%; background: currentColor; }

.legend {
  display: flex; flex-wrap: wrap; gap: 4px 24px; margin: -8px 0 24px; font-size: 13px;
  color: var(--quiet);
}
.legend .dot { margin-right: 7px; }
.plot { position: relative; height: 150px; margin: auto 0 26px 40px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path {
  fill: none; stroke: currentColor; stroke-width: 1; vector-effect: non-scaling-stroke;
  stroke-linejoin: round;
}
.plot .raw { opacity: .3; } .plot .mean { stroke-width: 2; stroke-linecap: round; }
.plot .grid { left: 0; right: 0; height: 1px; }
.plot span {
  position: absolute; font-size: 12px; line-height: 1; white-space: nowrap; color: var(--quiet);
}
.plot .y { right: calc(100% + 10px); transform: translateY(-50%); }
.plot .x { top: calc(100% + 9px); transform: translateX(-50%); }

.view > label { margin: 0 18px 0 4px; font-size: 13px; white-space: nowrap; }
.view > label .dot { margin: 0 6px 0 3px; }
.view > input { margin: 0; accent-color: var(--ink); }
.scale { gap: 4px; margin: 16px 0 0; align-items: center; }
.scale span:first-child { margin-right: 6px; }
.scale .t { padding: 1px 7px; color: var(--ink); }
.text {
  position: relative; min-height: 236px; padding-right: 372px; font-size: 15px; line-height: 1.85;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.t {
  padding: 2px 0; border-radius: 3px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone;
  background: color-mix(in srgb, var(--heat) calc(var(--k, 0) * 100%), transparent);
}
.text label { cursor: pointer; }
.text input { position: absolute; width: 1px; height: 1px; margin: 0; opacity: 0; }
.text label:hover .t { box-shadow: 0 0 0 1px var(--ink); }
.text input:checked + .t { box-shadow: 0 2px 0 var(--ink); }
.text input:focus-visible + .t { outline: 2px solid var(--ink); outline-offset: 1px; }
q { quotes: none; opacity: .6; }
.tip {
  display: none; position: absolute; top: 0; right: 0; width: 340px; min-height: 236px;
  padding: 12px 14px; grid-template-columns: 1fr 1fr; gap: 8px 18px; align-content: start;
  background: var(--wash); border-radius: 6px; font-size: 13px; line-height: 1.45;
  cursor: default;
}
.text input:checked ~ .tip { display: grid; }
.text label:hover .tip { display: grid; z-index: 1; }
.tip > b { grid-column: 1 / -1; font-weight: 600; font-size: 15px; }
.tip u { text-decoration: none; font-weight: 600; }
.tip small { min-height: 36px; margin-bottom: 6px; }
.col { min-width: 0; }
.col > i {
  display: block; position: relative; padding-right: 50px; font-style: normal;
  white-space: pre; overflow: hidden; text-overflow: ellipsis;
}
.col > i b { position: absolute; top: 0; right: 0; font-weight: 400; color: var(--quiet); }
.col > .x { font-weight: 600; } .col > .x b { font-weight: 600; color: inherit; }
.s0, .s1, .s2 { display: none; }
#s0:checked ~ .text .s0, #s1:checked ~ .text .s1, #s2:checked ~ .text .s2 { display: block; }
#s0:checked ~ .text .t { --k: var(--k0, 0); }
#s1:checked ~ .text .t { --k: var(--k1, 0); }
#s2:checked ~ .text .t { --k: var(--k2, 0); }

.generation + .generation { margin-top: 36px; }
blockquote {
  margin: 0 0 14px; padding: 10px 14px; background: var(--wash); border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 18px 28px;
}
.cards h3 { margin: 0 0 4px; color: var(--ink); }
.cards h3 .dot { margin-right: 7px; }
.cards p { margin: 0; font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere; }

.costs { max-width: 640px; }
.costs thead th { color: var(--quiet); font-weight: 400; }
pre, code { font: 12.5px/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre {
  margin: 0; padding: 12px 14px; overflow-x: auto; background: var(--wash); border-radius: 6px;
}
code { overflow-wrap: anywhere; }
details { margin-top: 14px; }
summary { cursor: pointer; font-weight: 500; font-size: 14px; }
.facts { color: var(--quiet); font-size: 13px; overflow-wrap: anywhere; }

@media (max-width: 820px) {
  .panels { grid-template-columns: 1fr; }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: 24px; }
  .text { padding: 0 0 252px; }
  .tip { top: auto; bottom: 0; left: 0; width: auto; }
}
@media (max-width: 560px) {
  main { padding: 32px 18px 64px; }
  h1 { font-size: 22px; }
  section { margin-top: 40px; }
  .tiles dd { font-size: 25px; }
  .results { font-size: 12px; letter-spacing: -.02em; }
  .results thead td { width: 24%; }
  .results thead th { white-space: normal; line-height: 1.3; vertical-align: bottom; }
  .results thead th .dot { display: block; margin: 0 0 4px auto; }
  .results small { display: none; }
  th, td { padding: 8px 0 8px 5px; }
  .gap { grid-template-columns: minmax(0, 1fr) 64px; }
  .gap > div:first-child { grid-column: 1 / -1; }
  .gap em { grid-column: 1 / -1; text-align: left; }
}
@media print { section { break-inside: avoid; } details { display: none; } }
"""
