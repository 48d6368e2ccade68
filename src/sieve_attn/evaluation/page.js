"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const layers = data.layers.map((layer) => ({ ...layer, maps: layer.maps.map(bytes) }));
let chosen = { layer: 0, head: 0 };
let cursor = null;

const by = (id) => document.getElementById(id);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const whole = (x) => Math.round(x).toLocaleString("en");
const percent = (x) => (100 * x).toFixed(x < 0.1 && x > 0 ? 1 : 0) + " %";
const power = (x) => (x === 0 ? "0" : x.toExponential(1).replace("e-", "e−").replace("e+", "e"));

/* Round numbers from 0 to at most n. */
function nice(n) {
  const unit = 10 ** Math.floor(Math.log10(n / 4 || 1));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => n / s <= 5);
  return Array.from({ length: Math.floor(n / step) + 1 }, (_, i) => i * step);
}

function bytes(text) {
  const raw = atob(text);
  return Uint8Array.from(raw, (c) => c.charCodeAt(0));
}

/* Heat maps: 0..254 is the kept share of a cell, 255 is a cell that no query sees. Colour goes with its square root, so that
   a single kept block in a large cell shows. */
function paint(canvas, layer, head, mark) {
  const [rows, columns] = data.cells;
  const cells = layers[layer].maps[head];
  const low = style("--low").split(",").map(Number), high = style("--high").split(",").map(Number);
  const hex = (name) => style(name).match(/\w\w/g).map((c) => parseInt(c, 16));
  const plain = hex("--hidden"), hatch = hex("--hatch");
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  for (let i = 0; i < cells.length; i++) {
    const row = Math.floor(i / columns), column = i % columns, share = Math.sqrt(cells[i] / 254);
    const color = cells[i] === 255 ? ((row + column) % 5 ? plain : hatch) : low.map((l, c) => l + (high[c] - l) * share);
    image.data.set([...color, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
  if (mark) {
    context.strokeStyle = style("--second");
    context.strokeRect(mark[1] - 0.5, mark[0] - 0.5, 2, 2);
  }
}

function drawLarge() {
  const { layer, head } = chosen;
  by("large-title").textContent =
    `Layer ${layers[layer].layer}, ${data.head_kind} ${head}: density ${percent(layers[layer].head_density[head])}`;
  const ticks = nice(data.length).map((t) => t / data.length);
  const at = (share, axis) => `<span class="tick" style="${axis}">${whole(share * data.length)}</span>`;
  by("large").innerHTML =
    `<div class="plot"><canvas tabindex="0" role="img" aria-label="Kept share by query and key position"></canvas>` +
    ticks.map((t) => at(t, `left:calc(4.4rem + (100% - 4.4rem) * ${t});bottom:1.5rem;transform:translateX(-50%)`)).join("") +
    ticks.map((t) => at(t, `right:calc(100% - 4.1rem);top:calc((100% - 2.9rem) * ${t});transform:translateY(-50%)`)).join("") +
    `<span class="axis" style="left:4.4rem;right:0;bottom:0;text-align:center">key position (tokens)</span>` +
    `<span class="axis" style="left:.6rem;top:calc((100% - 2.9rem) / 2);transform:translate(-50%,-50%) rotate(-90deg)">query position (tokens)</span></div>`;
  const canvas = by("large").querySelector("canvas");
  paint(canvas, layer, head, cursor);
  canvas.onmousemove = (event) => {
    const box = canvas.getBoundingClientRect();
    const pick = (part, size, n) => Math.max(0, Math.min(n - 1, Math.floor((part / size) * n)));
    read([pick(event.clientY - box.top, box.height, data.cells[0]), pick(event.clientX - box.left, box.width, data.cells[1])]);
  };
  canvas.onkeydown = (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const from = cursor || data.cells.map((n) => n >> 1);
    cursor = from.map((x, i) => Math.max(0, Math.min(data.cells[i] - 1, x + move[i])));
    paint(canvas, chosen.layer, chosen.head, cursor);
    read(cursor);
  };
}

function read([row, column]) {
  const cell = layers[chosen.layer].maps[chosen.head][row * data.cells[1] + column];
  const range = (i, n) => `${whole((i * data.length) / n)}–${whole(((i + 1) * data.length) / n - 1)}`;
  by("readout").textContent =
    `Queries ${range(row, data.cells[0])}, keys ${range(column, data.cells[1])}: ` + (cell === 255 ? "not visible" : `${percent(cell / 254)} kept`);
}

function drawSmall() {
  const box = by("small");
  box.innerHTML = layers
    .map((layer, l) => `<div class="row"><span>layer ${layer.layer}</span><div>` + layer.maps
      .map((_, h) => `<button class="thumb" role="radio" data-layer="${l}" data-head="${h}"><canvas aria-hidden="true"></canvas>` +
        `${data.head_kind} ${h} · ${percent(layer.head_density[h])}</button>`).join("") + "</div></div>").join("");
  const thumbs = [...box.querySelectorAll(".thumb")];
  thumbs.forEach((thumb, i) => {
    paint(thumb.firstChild, +thumb.dataset.layer, +thumb.dataset.head);
    thumb.onclick = () => choose(thumb);
    thumb.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: layers[0].maps.length, ArrowUp: -layers[0].maps.length }[event.key];
      const next = step && thumbs[i + step];
      if (!next) return;
      event.preventDefault();
      choose(next);
      next.focus();
    };
  });
  mark();
}

function mark() {
  for (const thumb of document.querySelectorAll(".thumb")) {
    const on = +thumb.dataset.layer === chosen.layer && +thumb.dataset.head === chosen.head;
    thumb.setAttribute("aria-checked", on);
    thumb.tabIndex = on ? 0 : -1;
    thumb.setAttribute("aria-label", `Layer ${layers[thumb.dataset.layer].layer}, ${data.head_kind} ${thumb.dataset.head}`);
  }
}

function choose(thumb) {
  chosen = { layer: +thumb.dataset.layer, head: +thumb.dataset.head };
  mark();
  drawLarge();
  drawCharts();
}

/* Charts: one frame with labelled axes, then marks inside it. */
function frame(options, inside) {
  const W = 520, H = 300, left = 62, right = 10, top = 10, bottom = 46;
  const axis = (spec, from, to) => {
    const f = spec.log ? Math.log10 : (v) => v;
    const [a, b] = [f(spec.min), f(spec.max)];
    return (v) => from + ((f(Math.max(v, spec.log ? spec.min : -Infinity)) - a) / (b - a || 1)) * (to - from);
  };
  const x = axis(options.x, left, W - right), y = axis(options.y, H - bottom, top);
  const grid = options.y.ticks.map((t) => `<line class="grid" x1="${left}" x2="${W - right}" y1="${y(t)}" y2="${y(t)}"/>` +
    `<text x="${left - 8}" y="${y(t) + 4}" text-anchor="end">${options.y.format(t)}</text>`).join("");
  const below = options.x.ticks.map((t) => `<text x="${x(t)}" y="${H - bottom + 18}" text-anchor="middle">${options.x.format(t)}</text>`).join("");
  return `<svg viewBox="0 0 ${W} ${H}" role="img" aria-label="${options.label}">${grid}${below}` +
    `<text class="name" x="${(left + W - right) / 2}" y="${H - 6}" text-anchor="middle">${options.x.name}</text>` +
    `<text class="name" transform="translate(13 ${(top + H - bottom) / 2}) rotate(-90)" text-anchor="middle">${options.y.name}</text>` +
    inside(x, y) + "</svg>";
}
const line = (points, x, y, color, width, extra = "") =>
  `<polyline fill="none" stroke="${color}" stroke-width="${width}" stroke-linejoin="round" ${extra} points="${points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ")}"/>`;
const dot = (a, b, x, y, color, r, title, hollow) =>
  `<circle cx="${x(a).toFixed(1)}" cy="${y(b).toFixed(1)}" r="${r}" ${hollow ? `fill="none" stroke="${color}" stroke-width="2"` : `fill="${color}"`}><title>${title}</title></circle>`;
const key = (items) => `<p class="key">${items.map(([kind, color, text]) => `<span><i class="${kind}" style="--c:${color}"></i>${text}</span>`).join("")}</p>`;
const share = { min: 0, max: 1, ticks: [0, 0.25, 0.5, 0.75, 1], format: (t) => 100 * t + " %" };
/* Mass axes begin at the even power of ten below what occurs, and not below 1e−8; smaller values are drawn on the axis. */
const smallest = Math.min(1e-2, ...layers.flatMap((l) => (l.true_curve || []).filter((v) => v > 0)));
const FLOOR = 10 ** (2 * Math.floor(Math.log10(Math.max(smallest, 1e-8)) / 2 + 1e-9));
const exponent = (t) => "1e−" + Math.round(-Math.log10(t));
const mass = (name, largest) => {
  const max = 10 ** Math.ceil(Math.log10(Math.max(largest, 10 * FLOOR)));
  const ticks = [];
  for (let t = FLOOR; t <= max * 1.01; t *= 100) ticks.push(t);
  return { log: true, min: FLOOR, max, ticks, name, format: (t) => (t > 0.5 ? whole(t) : (t === FLOOR ? "≤" : "") + exponent(t)) };
};
const numbers = () => ({ min: -0.5, max: layers.length - 0.5, ticks: every(layers.map((_, i) => i), 16), format: (i) => layers[i].layer, name: "layer" });
const every = (list, most) => list.filter((_, i) => i % Math.ceil(list.length / most) === 0);

function drawCharts() {
  const accent = "var(--accent)", second = "var(--second)", soft = "var(--soft)", active = layers[chosen.layer];
  by("density-layers").innerHTML = frame({ x: numbers(), y: { ...share, name: "density" }, label: "Density by layer and head" }, (x, y) =>
    line(layers.map((l, i) => [i, l.density]), x, y, accent, 1.5) +
    layers.map((l, i) => l.head_density.map((d, h) => dot(i, d, x, y, accent, 4, `layer ${l.layer}, ${data.head_kind} ${h}: ${percent(d)}`)).join("") +
      dot(i, l.decode_density, x, y, second, 5, `layer ${l.layer}, decode: ${percent(l.decode_density)}`, true)).join("")) +
    key([["", accent, `prompt, one dot a ${data.head_kind}`], ["line", accent, "prompt, layer mean"], ["ring", second, "decode steps, layer mean"]]);

  const along = { min: 0, max: data.length, ticks: nice(data.length), format: whole, name: "query position (tokens)" };
  /* each mean over its whole range, so that the curve spans the prompt even where it is one tile long */
  const curve = (l) => l.density_by_position.flatMap((d, i, all) => [[(i * data.length) / all.length, d], [((i + 1) * data.length) / all.length, d]]);
  by("density-position").innerHTML = frame({ x: along, y: { ...share, name: "density" }, label: "Density along the prompt" }, (x, y) =>
    layers.map((l) => line(curve(l), x, y, soft, 1, 'opacity=".35"')).join("") + line(curve(active), x, y, accent, 2.5)) +
    key([["line", accent, `layer ${active.layer}`], ["line", soft, "other layers"]]);

  const measured = layers.filter((l) => l.certified);
  const none = '<p class="key">Nothing was measured: this cache cannot go back.</p>';
  by("curve-title").textContent = `Layer ${active.layer}: sampled queries in order of their dropped mass`;
  by("scatter-title").textContent = `Layer ${active.layer}: certified against true, one dot a query and head`;
  if (!measured.length) {
    for (const id of ["error-layers", "error-curve", "error-scatter"]) by(id).innerHTML = none;
    return;
  }
  const masses = mass("dropped mass", 1);
  by("error-layers").innerHTML = frame({ x: numbers(), y: masses, label: "Certified and true dropped mass by layer" }, (x, y) =>
    layers.map((l, i) => [["certified", accent, -0.13], ["true", second, 0.13]].map(([name, color, shift]) => {
      const q = l[name];
      return q ? line([[i + shift, q.p50], [i + shift, q.max]], x, y, color, 1.5) +
        [["p50", 4], ["p99", 3], ["max", 2.5]].map(([n, r]) => dot(i + shift, q[n], x, y, color, r, `layer ${l.layer}, ${name} ${n}: ${power(q[n])}`)).join("") : "";
    }).join("")).join("")) + key([["", accent, "certified"], ["", second, "true"]]) +
    '<p class="key">From the large dot up: median, 99 % quantile, maximum of the sampled queries.</p>';

  const ranks = { min: 0, max: 1, ticks: [0, 0.25, 0.5, 0.75, 1], format: (t) => 100 * t + " %", name: "share of sampled queries with less" };
  const sorted = (list) => list.map((v, i) => [data.ranks[i], v]);
  by("error-curve").innerHTML = frame({ x: ranks, y: masses, label: "Sorted dropped mass" }, (x, y) =>
    line(sorted(active.certified_curve), x, y, accent, 2.5) + line(sorted(active.true_curve), x, y, second, 2.5)) +
    key([["line", accent, "certified"], ["line", second, "true"]]);

  by("error-scatter").innerHTML = frame({ x: { ...masses, name: "true dropped mass" }, y: { ...masses, name: "certified dropped mass" }, label: "Certified against true dropped mass" }, (x, y) =>
    line([[FLOOR, FLOOR], [1, 1]], x, y, second, 1.5, 'stroke-dasharray="5 4"') +
    active.pairs.map(([t, c]) => `<circle cx="${x(t).toFixed(1)}" cy="${y(c).toFixed(1)}" r="2" fill="${accent}" fill-opacity=".45"/>`).join("")) +
    key([["", accent, "a query (above the line: the certificate holds)"], ["line", second, "certified = true"]]);
}

function drawAll() {
  if (!layers.length) return;
  drawSmall();
  drawLarge();
  drawCharts();
}
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
