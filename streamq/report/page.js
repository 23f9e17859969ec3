"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 700px)");
const dark = matchMedia("(prefers-color-scheme: dark)");

// What a checkpoint says comes into the page through textContent only.
function make(tag, text, className) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (className) e.className = className;
  return e;
}
// A name that may be broken behind its dots and underscores.
function named(tag, text, className) {
  const e = make(tag, undefined, className);
  for (const part of text.split(/(?<=[._])/)) e.append(part, make("wbr"));
  return e;
}
function size(n) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (n < 999.95 || unit === "GB") return (unit === "B" ? n : n.toFixed(n < 10 ? 2 : 1)) + " " + unit;
    n /= 1000;
  }
}
const short = (v) => v === 0 ? "0" : Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5 ? v.toExponential(2) : String(+v.toPrecision(3));
const files = (n) => n === 1 ? "1 file" : `${n} files`;
const percent = (v) => +(100 * v).toPrecision(3) + " %";
const FORMATS = {
  bytes_in: size, bytes_out: size, max_error: short, max_error_rms: short, clipped: percent,
  sqnr_db: (v) => typeof v === "number" ? v.toFixed(2) : v, count: String,
};
const TITLES = {
  name: "tensor", count: "tensors", bytes_in: "before", bytes_out: "after", sqnr_db: "SQNR (dB)",
  max_error: "largest error", max_error_rms: "error / RMS",
};

// --- charts ---------------------------------------------------------------------------------

let mode = "auto", metric = Object.keys(D.metrics)[0], drawn = 0;
const measured = D.total.sqnr_db !== null || D.total.exact;
const isDark = () => mode === "dark" || (mode === "auto" && dark.matches);

function config() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const phone = narrow.matches;
  const words = { labelColor: colour("--text"), titleColor: colour("--quiet"), titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11 };
  return {
    background: null, font: "system-ui, 'DejaVu Sans', sans-serif", view: { stroke: null },
    axis: { ...words, gridColor: colour("--line"), domainColor: colour("--line"), tickColor: colour("--line") },
    axisY: { titlePadding: 8, labelLimit: phone ? 118 : 260 },
    legend: { ...words, orient: phone ? "bottom" : "top", columns: phone ? 2 : 6, labelLimit: phone ? 135 : 170, symbolLimit: 40, symbolStrokeWidth: 2, offset: 8 },
  };
}
function draw(place, spec, datasets) {
  const options = { renderer: "svg", actions: false, ast: true, config: config(), tooltip: { theme: isDark() ? "dark" : "light" } };
  return vegaEmbed(place, { $schema: "https://vega.github.io/schema/vega-lite/v6.json", ...spec, datasets }, options);
}
const sizes = D.schemes.flatMap((s, order) => ["before", "after"].map((when) =>
  ({ when, order, label: s.label, tensors: s.tensors, bytes: s[when === "before" ? "bytes_in" : "bytes_out"] })));

function drawMetric() {
  for (const tab of byId("metrics").children) tab.setAttribute("aria-selected", tab.dataset.name === metric);
  byId("metric-text").textContent = {
    sqnr_db: "Energy of the weights over that of their errors: 20 dB is an error of a tenth, every bit is worth 6 dB. Higher is better.",
    against_db: "The same less the median of all cells of its scheme: what is below 0 has outliers that others have not.",
    max_error: "The largest difference between a weight and what a loader gets for it.",
    max_error_rms: "The same against the root mean square of the weights of the tensor.",
    clipped: "Weights beyond the range of their codes.",
  }[metric];
  return [draw("#heat", D.charts.heat[metric], { cells: D.cells }), draw("#lines", D.charts.lines[metric], { cells: D.cells })];
}
function drawAll() {
  const turn = ++drawn;
  delete document.body.dataset.ready;
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  byId("theme").textContent = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" }[mode];
  const all = [draw("#sizes", D.charts.sizes, { sizes }), draw("#map", D.charts.map, { cells: D.cells })];
  if (measured) {
    all.push(...drawMetric(), draw("#errors", D.charts.errors, { errors: D.errors }));
    D.worst.forEach((w, i) => all.push(draw("#worst-" + i, D.charts.weights, { bins: bins(w.histogram) })));
  }
  Promise.all(all).then(() => { if (turn === drawn) document.body.dataset.ready = "yes"; });
}
function bins(h) {
  const n = h.source.length;
  return h.source.map((count, i) => ({
    x: h.reach * ((2 * i + 1) / n - 1), source: count / h.weights, dequantized: h.dequantized[i] / h.weights,
  }));
}

// --- text -----------------------------------------------------------------------------------

function tile(value, label, className) {
  const e = make("div", undefined, "tile" + (className ? " " + className : ""));
  e.append(make("b", value), named("span", label));
  byId("tiles").append(e);
}
function summary() {
  byId("name").textContent = D.name;
  byId("subtitle").textContent = `${D.source.path} → ${D.output.format}` +
    ` · ${D.output.quantized.toLocaleString("en")} of ${D.source.tensors.toLocaleString("en")} tensors quantized`;
  tile(size(D.output.bytes), `from ${size(D.source.bytes)}, ${(D.source.bytes / D.output.bytes).toFixed(2)}x smaller`);
  if (D.output.bits_per_weight) tile(D.output.bits_per_weight.toFixed(2), "bits a quantized weight, scales included");
  if (measured) {
    tile(D.total.exact ? "exact" : D.total.sqnr_db.toFixed(2) + " dB", "SQNR of all quantized weights");
    if (D.worst.length) tile(D.worst[0].sqnr_db.toFixed(2) + " dB", "lowest: " + D.worst[0].name);
    tile(percent(D.total.clipped), "of the weights clipped");
  }
  if (D.run) tile(size(D.run.bytes_per_second) + "/s", `${D.run.seconds.toFixed(2)} s, ${D.run.workers} workers, ${D.run.backend}`);
  if (D.verification) tile(D.verification.ok ? "verified" : "failed", D.verification.ok ? "every element within its bound" : `${D.verification.failures.length} checks failed`, D.verification.ok ? "good" : "bad");
  byId("said").hidden = !D.said.length;
  for (const line of D.said) byId("said").querySelector("ul").append(make("li", line));
  byId("hidden").hidden = !D.hidden_kinds;
  byId("hidden").textContent = `${D.hidden_kinds} smaller kinds are in the table only.`;
  for (const e of document.querySelectorAll(".measured")) e.hidden = !measured;
  for (const [name, title] of Object.entries(D.metrics)) {
    const tab = make("button", title);
    tab.type = "button"; tab.role = "tab"; tab.dataset.name = name;
    tab.onclick = () => { metric = name; drawMetric(); };
    byId("metrics").append(tab);
  }
  D.worst.forEach((w, i) => {
    const e = make("div"), chart = make("div", undefined, "chart"), head = make("div");
    chart.id = "worst-" + i;
    head.append(named("h3", w.name), make("p", `${w.sqnr_db.toFixed(2)} dB · ${w.scheme} · ${w.shape.join(" x ")}`, "quiet"));
    e.append(head, chart);
    byId("worst").append(e);
  });
  byId("fused").hidden = !D.fused_groups.length;
  for (const g of D.fused_groups) {
    const row = make("tr");
    row.append(make("td", g.members), make("td", g.parent), make("td", g.fused_as), make("td", g.count, "n"), make("td", g.across_shards, "n"));
    byId("fused").querySelector("tbody").append(row);
  }
}
function made() {
  const rows = [["command", D.command, "code"], ["model", D.source.model_type],
    ["source", `${D.source.path}: ${D.source.tensors} tensors, ${D.source.parameters.toLocaleString("en")} parameters, ${size(D.source.bytes)} in ${files(D.source.files)}`],
    ["output", `${D.output.path}: ${D.output.tensors} tensors, ${size(D.output.bytes)} in ${files(D.output.files)}, format ${D.output.format}`],
    ...Object.entries(D.options).map(([k, v]) => [k.replaceAll("_", " "), Array.isArray(v) ? v.join(", ") : v]),
    ["finished", D.run && D.run.finished],
    ["versions", Object.entries(D.made_by).map(([k, v]) => `${k} ${v}`).join(", ")]];
  for (const [k, v, tag] of rows) {
    if (v === null || v === undefined) continue;
    const dd = make("dd");
    dd.append(make(tag || "span", String(v)));
    byId("made").append(make("dt", k), dd);
  }
}

// --- the table ------------------------------------------------------------------------------

const PAGE = narrow.matches ? 20 : 50;
let order = { column: 0, down: false }, first = 0, found = D.table;
const isText = (i) => D.columns[i] === "name" || D.columns[i] === "scheme" || D.columns[i] === "shape";

function sortRows() {
  const { column, down } = order, sign = down ? -1 : 1;
  const key = (row) => row[column] === "exact" && !isText(column) ? Infinity : row[column];
  found.sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null);  // what was not measured, last
    if (isText(column)) return sign * x.localeCompare(y, "en", { numeric: true });
    return sign * (x < y ? -1 : x > y ? 1 : 0);
  });
}
function showRows() {
  const body = byId("tensors").tBodies[0];
  body.replaceChildren(...found.slice(first, first + PAGE).map((cells) => {
    const row = make("tr");
    cells.forEach((v, i) => row.append(i === 0 ? named("td", v)
      : make("td", v === null ? "" : isText(i) ? v : FORMATS[D.columns[i]](v), isText(i) ? "" : "n")));
    return row;
  }));
  const last = Math.min(first + PAGE, found.length);
  byId("page").textContent = found.length ? `${first + 1} to ${last} of ${found.length.toLocaleString("en")}` : "none";
  byId("previous").disabled = first === 0;
  byId("next").disabled = last === found.length;
  [...byId("tensors").tHead.rows[0].cells].forEach((th, i) => {
    if (i === order.column) th.setAttribute("aria-sort", order.down ? "descending" : "ascending");
    else th.removeAttribute("aria-sort");
  });
}
function table() {
  byId("folded").textContent = D.folded;
  byId("folded").hidden = !D.folded;
  D.columns.forEach((name, i) => {
    const th = make("th", TITLES[name] || name, isText(i) ? "" : "n");
    th.tabIndex = 0;
    th.scope = "col";
    th.onclick = () => {
      order = { column: i, down: order.column === i && !order.down };
      first = 0;
      sortRows();
      showRows();
    };
    th.onkeydown = (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); th.onclick(); } };
    byId("tensors").tHead.rows[0].append(th);
  });
  byId("filter").oninput = (e) => {
    const text = e.target.value.toLowerCase();
    const scheme = D.columns.indexOf("scheme");
    found = D.table.filter((row) => [row[0], row[scheme]].some((said) => said.toLowerCase().includes(text)));
    first = 0;
    sortRows();
    showRows();
  };
  byId("previous").onclick = () => { first -= PAGE; showRows(); };
  byId("next").onclick = () => { first += PAGE; showRows(); };
  if (measured) order.column = D.columns.indexOf("sqnr_db");
  sortRows();
  showRows();
}

summary();
made();
table();
byId("theme").onclick = () => { mode = { auto: "light", light: "dark", dark: "auto" }[mode]; drawAll(); };
dark.addEventListener("change", drawAll);
narrow.addEventListener("change", drawAll);
drawAll();
