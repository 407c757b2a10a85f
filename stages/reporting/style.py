"""How the report page looks: one style sheet, light and dark, from a phone to a wide screen.

Hues keep apart for eyes that see no red or green (after Okabe and Ito), and never stand alone: every
mark has its name beside it, finetuned students are dashed or hollow, the teacher is grey or ink.
"""

HUES = 6  # classes hue0 ... hue5

SHEET = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f5f6f8; --ink: #16191d; --soft: #59616b; --rule: #dfe3e8;
  --track: #e9ecf0; --area: #cdd3da; --good: #00714f; --good-card: #e3f4ed;
  --shade: #16191d55;
  --hue0: #0068a8; --hue1: #c94f00; --hue2: #00805c; --hue3: #a8478a; --hue4: #946800; --hue5: #6d5bb5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1e2227; --ink: #e9ecef; --soft: #a3acb6; --rule: #343a42;
    --track: #2b3037; --area: #464e58; --good: #4cd3a5; --good-card: #17342b;
    --shade: #e9ecef66;
    --hue0: #5ab4ec; --hue1: #f58a45; --hue2: #35c99b; --hue3: #e48cc6; --hue4: #e2b53a; --hue5: #afa0f0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 40px 24px 72px; max-width: 1128px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
h1, h2, h3, p, ol, dl, dd, figure { margin: 0; }
h1 { font-size: 15px; font-weight: 600; color: var(--soft); }
h2 { font-size: 22px; line-height: 1.25; letter-spacing: -0.01em; }
h3 { font-size: 15px; line-height: 1.35; }
a { color: inherit; }
section { margin-top: 64px; }
section > h2 { padding-top: 16px; border-top: 2px solid var(--ink); }
.note { max-width: 74ch; margin-top: 6px; color: var(--soft); font-size: 14px; }
section > .note { margin-bottom: 24px; }
.after { margin-top: 16px; }
.verdict {
  max-width: 34em; margin: 8px 0 28px; font-size: clamp(21px, 2.6vw, 29px); line-height: 1.3;
  letter-spacing: -0.015em; font-weight: 600; text-wrap: pretty;
}
.about { margin-top: 2px; color: var(--soft); font-size: 14px; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(164px, 1fr)); gap: 12px; }
.card { padding: 16px; border-radius: 8px; background: var(--card); }
.card b { display: block; font-size: 32px; line-height: 1.1; letter-spacing: -0.02em; }
.card b small { font-size: 19px; font-weight: 600; }
.card span { display: block; margin-top: 6px; font-size: 14px; line-height: 1.35; }
.card i { display: block; margin-top: 2px; color: var(--soft); font: inherit; font-size: 13px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 24px; font-size: 14px; }
nav a { padding: 4px 0; color: var(--soft); text-underline-offset: 3px; }
nav a:hover { color: var(--ink); }

/* A shade at the right while there is more to scroll to: the first layer scrolls along and covers it. */
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px;
  background: linear-gradient(to left, var(--paper) 24px, transparent) right / 48px 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 24px 100% no-repeat scroll;
}
table { width: 100%; border-collapse: separate; border-spacing: 0; font-size: 14px; overflow-wrap: normal; }
th, td { padding: 9px 12px; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule); }
thead th {
  border-top: 0; color: var(--soft); font-weight: 500; line-height: 1.3;
  vertical-align: bottom; background: var(--card);
}
th:first-child {
  position: sticky; left: 0; min-width: 13em; max-width: 15em; text-align: left; white-space: normal;
  overflow-wrap: break-word; background: var(--paper); box-shadow: 1px 0 var(--rule);
}
thead th:first-child { background: var(--card); }
tbody th { font-weight: 500; }
.of { display: block; color: var(--soft); font-size: 13px; font-weight: 400; line-height: 1.35; }
.part th, .part td { padding-top: 0; border-top: 0; color: var(--soft); }
.part th:first-child { padding-left: 32px; font-weight: 400; }
td strong { padding: 1px 5px; margin-right: -5px; border-radius: 4px; background: var(--good-card); }
.tag {
  display: inline-block; margin-left: 6px; padding: 0 6px; border-radius: 4px; color: var(--good);
  background: var(--good-card); font-size: 12px; font-weight: 600; white-space: nowrap;
}
.runs { margin: 24px 0 32px; }

.panels { display: grid; gap: 32px 40px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr));
}
.pair { display: grid; gap: 32px 40px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
}
.tiny { display: grid; gap: 20px 24px; margin-top: 16px; align-items: end;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
}
.panels h3, .pair h3 { margin-bottom: 8px; }
.tiny h3 { margin-bottom: 2px; font-size: 13px; }
.tiny h3 small { font-weight: 400; font-size: inherit; color: var(--soft); }
.panels svg + svg { margin-top: 12px; }
figure { min-width: 0; }

svg { display: block; width: 100%; height: auto; overflow: visible; }
.panels svg { max-width: 400px; } .pair svg { max-width: 520px; } .tiny svg { max-width: 240px; }
svg text { font-size: 12px; fill: var(--ink); }
svg .tick { fill: var(--soft); } .tiny svg text { font-size: 11px; }
.value { font-weight: 600; }
.teacher { --tone: var(--ink); } .start { --tone: var(--soft); }
.hue0 { --tone: var(--hue0); } .hue1 { --tone: var(--hue1); } .hue2 { --tone: var(--hue2); }
.hue3 { --tone: var(--hue3); } .hue4 { --tone: var(--hue4); } .hue5 { --tone: var(--hue5); }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
svg .label { font-weight: 600; fill: var(--tone); }
.leader { stroke: var(--tone, var(--soft)); stroke-width: 1; fill: none; }
.diagonal { stroke: var(--soft); stroke-dasharray: 3 3; fill: none; }
.span { stroke: var(--soft); stroke-width: 3; }
.edge { stroke: var(--ink); stroke-width: 1.5; }
.track { fill: var(--track); } .bar { fill: var(--tone); } .second .bar { opacity: 0.6; }
.area { fill: var(--area); }
.dot { fill: var(--tone); stroke: var(--tone); stroke-width: 2; }
.dot.start, .dot.second { fill: var(--paper); }
.line { fill: none; stroke: var(--tone); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.point { fill: var(--tone); }
.second .line { stroke-dasharray: 5 4; }
.ring { fill: var(--paper); stroke: var(--tone); stroke-width: 2; }
.dots { fill: none; stroke: var(--tone); stroke-width: 4; stroke-linecap: round; opacity: 0.55; }
.swatch { display: inline-block; width: 12px; height: 12px; margin-right: 8px; vertical-align: -1px; }

details { border-top: 1px solid var(--rule); }
details:last-of-type { border-bottom: 1px solid var(--rule); }
summary { padding: 12px 0; cursor: pointer; font-weight: 600; }
summary small { font-weight: 400; font-size: 14px; color: var(--soft); }
.odd { display: grid; gap: 8px 32px; padding: 14px 0; align-items: start;
  grid-template-columns: 1fr 1fr 220px;
}
.odd + .odd { border-top: 1px solid var(--rule); }
.odd p { font-size: 15px; line-height: 1.45; }
.odd div { font-size: 13px; color: var(--soft); } .odd div b { color: var(--ink); }
.odd svg { max-width: 220px; }
.query summary { font-size: 17px; }
.answers { display: grid; gap: 20px; padding: 4px 0 20px;
  grid-template-columns: repeat(auto-fit, minmax(220px, 1fr));
}
.answers h4 { margin: 0; padding-bottom: 6px; border-bottom: 1px solid var(--rule); font-size: 14px; }
ol { padding: 0; list-style: none; counter-reset: rank; }
li {
  display: grid; grid-template-columns: 1.2em 1fr auto; gap: 0 8px; padding: 7px 8px; margin: 0 -8px;
  border-radius: 6px; font-size: 14px; line-height: 1.4; counter-increment: rank;
}
li::before { content: counter(rank); color: var(--soft); }
li.hit { background: var(--good-card); }
li.hit + li.hit { margin-top: 2px; }
li span { color: var(--soft); font-size: 13px; }
li.hit span b { color: var(--good); }
.made { display: grid; gap: 6px 24px; margin-top: 20px; font-size: 14px;
  grid-template-columns: fit-content(16em) minmax(0, 1fr);
}
dt { color: var(--soft); }

@media (max-width: 640px) {
  body { padding: 24px 16px 48px; }
  section { margin-top: 48px; }
  .cards { grid-template-columns: 1fr 1fr; }
  .card:last-child:nth-child(odd) { grid-column: span 2; }
  .card { padding: 12px; } .card b { font-size: 27px; }
  .odd { grid-template-columns: 1fr; }
  .odd p + p { padding-top: 8px; border-top: 1px dashed var(--rule); }
  .answers { grid-template-columns: 1fr; }
  th:first-child { min-width: 9em; max-width: 9em; }
  .tag { margin-left: 0; }
  .made { grid-template-columns: 1fr; gap: 0; } .made dd { margin-bottom: 10px; }
}
@media print { details::details-content { content-visibility: visible; } }
"""
