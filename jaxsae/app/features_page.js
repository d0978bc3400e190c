// The page of `jaxsae features`. Tokens are text from anywhere: they become text nodes and nothing else.
"use strict";

const byId = (id) => document.getElementById(id);
const svgName = "http://www.w3.org/2000/svg";

/** An element; attributes that are null are left out, children that are strings become text. */
function make(tag, attributes = {}, ...children) {
  const element = tag.startsWith("svg:")
    ? document.createElementNS(svgName, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) element.setAttribute(name, value);
  element.append(...children.filter((child) => child != null));
  return element;
}

// --- Numbers

const digits = [1, 2, 3, 4].map((n) =>
  new Intl.NumberFormat("en", { minimumSignificantDigits: n, maximumSignificantDigits: n }));
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 2 });

function number(value, precision = 3) {
  if (value == null) return "–";
  if (value === 0) return "0";
  const small = value !== 0 && Math.abs(value) < 1e-4;
  const text = small ? value.toExponential(precision - 1).replace("e-", "e−") : digits[precision - 1].format(value);
  return text.replace("-", "−");
}
const count = (value) => value.toLocaleString("en");
const percent = (value, precision) => value == null ? "–" : number(100 * value, precision) + "%";
const signed = (value, form = number) => value == null ? "–" : (value > 0 ? "+" : "") + form(value);

// --- Data: each latent is compressed by itself, many of them in a part, which is in the page or in a file beside it

let index, columns, size;
const places = new Map(); // of latents, in `columns`
const parts = new Map(), arrive = new Map();

async function inflate(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let n = 0; n < binary.length; n++) bytes[n] = binary.charCodeAt(n);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

/** Called by the scripts beside the page. */
window.part = (n, text) => arrive.get(n)?.(text);

function load(n) {
  if (!parts.has(n)) {
    parts.set(n, new Promise((resolve, reject) => {
      if (!index.files.length) return resolve(byId(`part-${n}`).textContent);
      arrive.set(n, resolve);
      const script = make("script", { src: index.files[n] });
      script.onload = () => script.remove();
      script.onerror = () => {
        parts.delete(n);
        reject(new Error(`${decodeURIComponent(index.files[n])} is missing; keep that folder beside this page.`));
      };
      document.head.append(script);
    }));
    if (parts.size > 8) parts.delete(parts.keys().next().value); // memory
  }
  return parts.get(n);
}

async function latentAt(place) {
  const n = index.starts.findLastIndex((start) => start <= place);
  return inflate((await load(n)).split(" ")[place - index.starts[n]]);
}

// --- Tokens

const special = /(\r\n|[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}\ufffd])/u;
const shown = { "\n": "⏎", "\r\n": "␍⏎", "\r": "␍", "\t": "→", "\ufffd": "\ufffd" };
const rightToLeft = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/gu;

const mark = (text) => make("bdi", { class: "mark" }, text);

/** The nodes that show a token, with marks for what one would not see; `alone` if no other token is beside it. */
function visible(token, alone) {
  if (token === "") return [mark("∅")];
  if (/^<0x[0-9A-Fa-f]{2}>$/.test(token)) return [mark(token)]; // a byte
  if (/^[\p{Zs}\t\r\n]+$/u.test(token)) return [mark(token.replace(/\r\n|[^]/g, (each) => shown[each] ?? "·"))];
  const spaces = alone ? [/^ +/.exec(token)?.[0].length ?? 0, / +$/.exec(token)?.[0].length ?? 0] : [0, 0];
  const found = token.slice(spaces[0], token.length - spaces[1]).split(special);
  const nodes = found.map((part, n) => {
    if (n % 2 === 0) return alone && /^\p{M}/u.test(part) ? "◌" + part : part;
    if (/[\u200c\u200d]/.test(part) && found[n - 1] && found[n + 1]) return part; // joins letters of one token
    const code = part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return mark(shown[part] ?? `U+${code}`);
  });
  const [before, after] = spaces.map((length) => (length ? mark("·".repeat(length)) : null));
  return [before, ...nodes, after];
}

/** Tokens on their own, each in its direction. */
const words = (tokens) => tokens.map((token) => make("bdi", { class: "word" }, ...visible(token, true)));

function direction(tokens) {
  const text = tokens.join(""), letters = text.match(/\p{L}/gu) ?? [];
  return 2 * (text.match(rightToLeft) ?? []).length > letters.length ? "rtl" : "ltr";
}

/** Shades of a value: `--e` and `--r`, shares of the largest value. */
function shade(element, value, refined, scale) {
  const share = (x) => (x ? Math.max(0.08, Math.min(1, Math.abs(x) / scale)) : 0);
  element.style.setProperty("--e", share(value));
  element.style.setProperty("--r", share(refined));
  element.classList.toggle("negative", value < 0 || refined < 0);
  return element;
}

/** The text of an example. It is set as its language is read; that no mark can turn it round, `visible` sees to. */
function passage(example, scale, label) {
  const peak = example.position == null || example.first == null ? null : example.position - example.first;
  const spans = example.tokens.map((token, n) => {
    const values = { value: example.values?.[n], refined: example.refined_values?.[n] };
    const span = shade(make("span", { class: "token" }, ...visible(token)), values.value, values.refined, scale);
    span.classList.toggle("peak", n === peak);
    span.classList.toggle("gap", example.values != null && values.value === null);
    span.about = { ...values, token, position: example.first == null ? null : example.first + n };
    return span;
  });
  const name = `${label}; arrow keys read the tokens`;
  const about = { class: "text", role: "group", tabindex: 0, "aria-label": name, dir: direction(example.tokens) };
  return make("div", about, ...spans);
}

// --- The numbers of a token, on hover and focus

const tip = byId("tip");

function showTip(token) {
  const { token: text, position, value, refined } = token.about;
  const line = value == null ? "no activation was recorded here"
    : `encoder ${number(value, 4)}, refined ${number(refined, 4)}${value ? ` (${change(refined / value)})` : ""}`;
  tip.replaceChildren(...words([text]), position == null ? "" : ` at ${position}`, make("div", {}, line));
  tip.hidden = false;
  const at = token.getClientRects()[0], own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left + at.width / 2 - own.width / 2), innerWidth - own.width - 8);
  const above = at.top - own.height - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above < 4 ? at.bottom + 6 : above}px`;
}

const change = (ratio) => (ratio === 1 ? "unchanged" : signed(ratio - 1, (x) => percent(x, 2)));
const hideTip = () => { tip.hidden = true; };
const tokenOf = (event) => event.target.closest?.(".token");
document.addEventListener("pointerover", (event) => (tokenOf(event) ? showTip(tokenOf(event)) : hideTip()));
document.addEventListener("focusin", (event) => (tokenOf(event) ? showTip(tokenOf(event)) : hideTip()));
document.addEventListener("scroll", hideTip, { capture: true, passive: true });

/** Arrow keys go through the tokens of a text. */
function readTokens(event) {
  const text = event.target.closest?.(".text");
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!text || !step || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const along = event.key.endsWith("t") && text.dir === "rtl" ? -step : step; // left and right as one sees them
  const at = [...text.children].indexOf(event.target);
  const peak = text.querySelector(".peak") ?? text.firstElementChild;
  const next = at < 0 ? peak : text.children[at + along];
  if (!next) return;
  if (at >= 0) event.target.removeAttribute("tabindex");
  next.tabIndex = -1;
  next.setAttribute("aria-describedby", "tip");
  next.focus();
}

// --- Pictures

/** A patch or an atom, with bytes by row, column and channel. */
function picture(bytes, label) {
  const { height, width, channels } = index.patch;
  const canvas = make("canvas", { width, height, role: "img", "aria-label": label });
  const image = new ImageData(width, height);
  for (let n = 0; n < width * height; n++) {
    for (let c = 0; c < 3; c++) image.data[4 * n + c] = bytes[channels * n + (c % channels)];
    image.data[4 * n + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

const chart = { width: 320, height: 150, left: 40, right: 312, top: 12, bottom: 126 };
const drawText = (x, y, anchor, text) => make("svg:text", { x, y, "text-anchor": anchor }, text);
const drawPath = (css, d) => make("svg:path", { class: css, d });

/** Bars of equal width between edges, without empty ones at the ends: a series filled, another as a line over it. */
function histogram(edges, series, label, at) {
  const { width, height, left, right, top, bottom } = chart;
  const beside = edges.indexOf(at); // an edge that is always seen, and marked
  const empty = (n) => series.every(({ counts }) => !counts[n]) && n !== beside - 1 && n !== beside;
  let first = 0, last = edges.length - 1;
  while (first < last - 1 && empty(first)) first++;
  while (last > first + 1 && empty(last - 1)) last--;
  const most = Math.max(1, ...series.flatMap(({ counts }) => counts.slice(first, last)));
  const x = (n) => left + ((n - first) / (last - first)) * (right - left);
  const y = (value) => bottom - (value / most) * (bottom - top);
  const bins = Array.from({ length: last - first }, (_, n) => first + n);
  const bar = (n, css, from, title) => make("svg:rect",
    { class: css, x: x(n) + 0.5, y: from, width: x(n + 1) - x(n) - 0.8, height: bottom - from }, title);
  const line = ({ css, counts }) => drawPath(`line ${css}`,
    `M${left} ${bottom}${bins.map((n) => `V${y(counts[n])}H${x(n + 1)}`).join("")}V${bottom}`);
  const about = (n) => { // values outside are in the outermost bins
    const ends = [n ? number(edges[n]) : "less", n < edges.length - 2 ? number(edges[n + 1]) : "more"];
    const lines = [ends.join(" to "), ...series.map(({ name, counts }) => `${name} ${count(counts[n])}`)];
    return bar(n, "over", top, make("svg:title", {}, lines.join("\n")));
  };
  return make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    drawPath("grid", `M${left} ${top}H${right}M${left} ${(top + bottom) / 2}H${right}`),
    drawText(left - 6, top + 4, "end", short.format(most)), drawText(left - 6, bottom + 4, "end", "0"),
    ...ticks(edges, first, last, Math.max(0, beside)).map(([n, text]) => drawText(x(n), bottom + 16, "middle", text)),
    beside < 0 ? null : drawPath("base", `M${x(beside)} ${top}V${bottom}`),
    ...bins.map((n) => bar(n, series[0].css, y(series[0].counts[n]))),
    ...series.slice(1).map(line),
    drawPath("base", `M${left} ${bottom}H${right}`),
    ...bins.map(about));
}

/** Some edges, among them a given one if it is seen, and their labels. */
function ticks(edges, first, last, at) {
  const step = [1, 2, 4, 8, 16, 32].find((each) => (last - first) / each <= 5) ?? 64;
  const places = edges.map((_, n) => n).filter((n) => n >= first && n <= last && (n - at) % step === 0);
  const beyond = (n) => (edges[n] === 0 ? "" : n === 0 ? "≤" : n === edges.length - 1 ? "≥" : "");
  return places.map((n) => [n, beyond(n) + short.format(edges[n]).replace("-", "−")]);
}

// --- The list: only the rows in sight exist, at their places in a box as high as all of them

const fields = [
  { key: "index", name: "latent", form: String },
  { key: "density", name: "density", form: percent, about: "share of the rows on which it is active" },
  { key: "max", name: "max", form: number, about: "the encoder's largest value" },
  { key: "mean", name: "mean", form: number, about: "mean of the encoder's values where it is active" },
  { key: "shrinkage", name: "shrinkage", form: (value) => times(value),
    about: "refined values by the encoder's: above 1, those of the encoder are too small" },
  { key: "loss_effect", name: "loss effect", form: (x) => signed(x) },
];
const [grid, rows, search] = ["grid", "rows", "search"].map(byId);
const sort = { key: "index", down: false };
const drawn = new Map(); // rows by place in `order`
let order = [], active = 0, open = null, rowHeight, haystack;

function arrange() {
  haystack ??= columns.words.map((found, n) => [...found, ...columns.promotes[n]].join("\n").toLowerCase());
  const wanted = search.value.trim().toLowerCase(), values = columns[sort.key], sign = sort.down ? -1 : 1;
  const matches = (n) => !wanted || haystack[n].includes(wanted) || String(columns.index[n]).startsWith(wanted);
  const kept = order[active];
  order = columns.index.map((_, n) => n).filter(matches);
  order.sort((a, b) => {
    if (values[a] === null || values[b] === null) return (values[a] === null) - (values[b] === null) || a - b;
    return sign * (values[a] - values[b]) || a - b;
  });
  active = Math.max(0, wanted ? 0 : order.indexOf(kept));
  const whole = order.length === size ? `${count(size)} latents` : `${count(order.length)} of ${count(size)} latents`;
  byId("count").textContent = whole;
  grid.setAttribute("aria-rowcount", order.length + 1);
  rows.style.height = `${order.length * rowHeight}rem`;
  byId("key").value = sort.key;
  byId("turn").textContent = sort.down ? "↓" : "↑";
  byId("turn").setAttribute("aria-label", sort.down ? "largest first" : "smallest first");
  const beside = sort.key === "index" ? "density" : sort.key; // what a narrow list shows
  grid.dataset.beside = beside;
  for (const cell of byId("head").children) {
    const sorted = cell.dataset.key === sort.key;
    cell.setAttribute("aria-sort", sorted ? (sort.down ? "descending" : "ascending") : "none");
    cell.classList.toggle("beside", cell.dataset.key === beside);
  }
  drawn.clear();
  rows.replaceChildren();
  draw();
}

function row(n) {
  const place = order[n], name = columns.index[place];
  const cells = fields.map(({ key, form }) => {
    const content = key === "index" ? make("a", { href: `#${name}`, tabindex: -1 }, name) : form(columns[key][place]);
    return make("div", { role: "gridcell", class: `number ${key === grid.dataset.beside ? "beside" : key}` }, content);
  });
  const atom = columns.atom[place];
  const seen = atom === null ? words(columns.words[place]) : [picture(bytesOf(atom), `atom ${name}`)];
  if (!columns.density[place]) seen.push(mark("dead"));
  cells.splice(1, 0, make("div", { role: "gridcell", class: "words" }, ...seen));
  cells.splice(2, 0, make("div", { role: "gridcell", class: "words promotes" }, ...words(columns.promotes[place])));
  const element = make("div", { class: "row", role: "row", id: `row-${n}`, "aria-rowindex": n + 2 }, ...cells);
  element.style.top = `${n * rowHeight}rem`;
  element.onclick = (event) => {
    active = n;
    if (!event.target.closest("a")) location.hash = name;
  };
  return element;
}
const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

function draw() {
  const height = rowHeight * parseFloat(getComputedStyle(document.documentElement).fontSize);
  const seen = grid.getBoundingClientRect(), top = rows.getBoundingClientRect().top;
  const [above, below] = [Math.max(0, seen.top), Math.min(innerHeight, seen.bottom)];
  const first = Math.floor((above - top) / height) - 8, last = Math.ceil((below - top) / height) + 8;
  const wanted = new Set(order.length ? [active] : []); // the active row always exists, for those who listen
  for (let n = Math.max(0, first); n < Math.min(order.length, last); n++) wanted.add(n);
  for (const [n, element] of drawn) {
    if (!wanted.has(n)) {
      element.remove();
      drawn.delete(n);
    }
  }
  for (const n of [...wanted].sort((a, b) => a - b)) {
    if (!drawn.has(n)) {
      drawn.set(n, row(n));
      rows.append(drawn.get(n));
    }
    const element = drawn.get(n);
    element.classList.toggle("active", n === active);
    element.setAttribute("aria-selected", order[n] === open);
  }
  if (order.length) grid.setAttribute("aria-activedescendant", `row-${active}`);
  else grid.removeAttribute("aria-activedescendant");
}

function reveal() {
  draw();
  drawn.get(active)?.scrollIntoView({ block: "nearest" });
  draw();
}

function sortBy(key, down) {
  Object.assign(sort, { key, down });
  arrange();
}

/** Names of latents are small from the start; of all else one first wants the largest. */
const turned = (key) => (key === sort.key ? !sort.down : key !== "index");

function makeList() {
  const used = fields.filter(({ key }) => columns[key].some((value) => value !== null));
  fields.splice(0, fields.length, ...used);
  const seen = { index: "latent", words: index.patch ? "atom" : "most active on", promotes: "promotes" };
  rowHeight = index.patch ? 3.5 : 2.25;
  grid.style.setProperty("--row", `${rowHeight}rem`);
  grid.classList.toggle("wordless", !index.patch && columns.words.every((found) => !found.length));
  grid.classList.toggle("promoteless", columns.promotes.every((found) => !found.length));
  grid.style.setProperty("--numbers", used.length - 1);
  const head = (key, content, css) => make("div", { role: "columnheader", class: css, "data-key": key }, content);
  const cells = used.map(({ key, name, about }) => {
    const button = make("button", { type: "button", tabindex: -1, title: about }, name);
    button.onclick = () => sortBy(key, turned(key));
    return head(key, button, `number ${key}`);
  });
  cells.splice(1, 0, head("words", seen.words, "words"), head("promotes", seen.promotes, "words promotes"));
  byId("head").append(...cells);
  byId("key").append(...used.map(({ key, name }) => make("option", { value: key }, name)));
  byId("key").onchange = (event) => sortBy(event.target.value, event.target.value !== "index");
  byId("turn").onclick = () => sortBy(sort.key, !sort.down);
  search.oninput = () => {
    arrange();
    if (order.length) reveal();
  };
  document.addEventListener("scroll", draw, { capture: true, passive: true });
  addEventListener("resize", draw);
}

// --- The view of a latent

/** A value and its refinement, in their shades. */
function both(value, refined, scale) {
  if (value == null && refined == null) return "–";
  const one = (x, css, ...values) => shade(make("span", { class: `token ${css}` }, number(x)), ...values, scale);
  return make("span", { class: "both" }, one(value, "before", value, 0), " → ", one(refined, "after", 0, refined));
}

function section(name, note, ...content) {
  if (!content.some(Boolean)) return null;
  return make("section", {}, make("h3", {}, name), note ? make("p", { class: "note" }, note) : null, ...content);
}

function example(found, scale, n) {
  const places = ["row", "document", "context", "position"].filter((name) => found[name] != null);
  const where = places.map((name) => `${name} ${count(found[name])}`).join(" · ");
  const label = `Example ${n + 1}, row ${found.row}: encoder ${number(found.value)}, refined ${number(found.refined)}`;
  const about = make("div", { class: "about" }, both(found.value, found.refined, scale), make("small", {}, where));
  if (found.tokens) return make("li", {}, about, passage(found, scale, label));
  return make("li", {}, found.pixels && picture(found.pixels, label), about);
}

function examples(found, scale) {
  if (!found.length) return null;
  const kind = found[0].tokens ? "passages" : found[0].pixels ? "patches" : "plain";
  return make("ol", { class: kind }, ...found.map((one, n) => example(one, scale, n)));
}

/** A link to a latent, if this page has it. */
function link(name) {
  return places.has(name) ? make("a", { href: `#${name}` }, name) : make("span", { title: "not on this page" }, name);
}

/** A table of other latents, with columns of names and forms. */
function neighbours(found, ...shown) {
  if (!found.length) return null;
  const lines = found.map((other) => {
    const place = places.get(other.index), atom = columns.atom[place];
    const seen = atom ? [picture(bytesOf(atom), "")] : words((columns.words[place] ?? []).slice(0, 3));
    return make("tr", {}, make("th", { scope: "row" }, link(other.index)), make("td", { class: "words" }, ...seen),
      ...shown.map(([, form]) => make("td", {}, form(other))));
  });
  const head = ["latent", "", ...shown.map(([name]) => name)].map((name) => make("th", { scope: "col" }, name));
  return make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...lines));
}

/** Tokens with their logits as bars. */
function logits(found, name) {
  if (!found?.length) return null;
  const most = Math.max(...found.map(({ logit }) => Math.abs(logit)));
  const lines = found.map(({ token, logit }) => {
    const line = make("li", {}, ...words([token]), make("span", {}, signed(logit, (x) => number(x))));
    line.style.setProperty("--share", `${most ? (100 * Math.abs(logit)) / most : 0}%`);
    return line;
  });
  return make("div", {}, make("h4", {}, name), make("ul", { class: "logits" }, ...lines));
}

function figure(name, note, drawing) {
  const caption = make("figcaption", {}, make("strong", {}, name), make("span", {}, note));
  return make("figure", {}, caption, drawing);
}

function histograms(latent) {
  const series = [
    { name: "encoder", css: "before", counts: latent.values },
    { name: "refined", css: "after", counts: latent.refined_values },
  ];
  const ratios = [{ name: "rows", css: "ratio", counts: latent.ratios }];
  return [
    figure("Values", "the encoder's (filled) and refined (line), by rows",
      histogram(index.edges, series, `Histograms of the ${count(latent.count)} values, before and after refinement`)),
    figure("Refined / encoder", "right of the line, the encoder's is too small",
      histogram(index.ratio_edges, ratios, "Histogram of refined values by the encoder's", 1)),
  ];
}

/** What the numbers say. */
function sentences(latent) {
  if (!latent.count) return [`Dead: it is active on none of the ${count(index.rows)} rows.`];
  const { shrinkage, loss_effect: loss } = latent;
  const sum = Math.abs(shrinkage - 1) < 5e-4 ? "leaves the sum of its values as it is"
    : `${shrinkage > 1 ? "raises" : "lowers"} the sum of its values by ${percent(Math.abs(shrinkage - 1), 2)}`;
  const change = loss === 0 ? "is the same"
    : `${loss > 0 ? "rises" : "falls"} by ${number(Math.abs(loss))} nats per token`;
  return [
    `Active on ${count(latent.count)} of ${count(index.rows)} rows.`,
    shrinkage == null ? "" : `Refinement ${sum}.`,
    loss == null ? "" : `Without it, the loss ${change}.`,
  ].filter(Boolean);
}

const times = (value) => (value == null ? "–" : `×${number(value)}`);

function headline(latent, scale) {
  const items = [
    ["density", percent(latent.density)],
    ["largest value", both(latent.max, latent.max_refined, scale)],
    ["mean value", both(latent.mean, latent.mean_refined, scale)],
    ["shrinkage", times(latent.shrinkage)],
    ["loss effect", signed(latent.loss_effect)],
  ];
  const tiles = items.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  return make("dl", { class: "facts" }, ...tiles.slice(0, columns.loss_effect.some((x) => x !== null) ? 5 : 4));
}

function legend() {
  const one = (text, e, r, css) => shade(make("span", { class: `token ${css ?? ""}` }, text), e, r, 1);
  return make("p", { class: "note legend" }, one(" encoder ", 0.6, 0), one(" refined ", 0, 0.8),
    one(" both ", 0.8, 1), one(" the row itself ", 0.4, 0.5, "peak"), one(" no row ", 0, 0, "gap"));
}

function bar(latent) {
  const at = order.indexOf(open);
  const beside = (n, name, arrow) => {
    const place = at < 0 ? undefined : order[n];
    return place === undefined ? null : make("a", { href: `#${columns.index[place]}`, "aria-label": name }, arrow);
  };
  return make("div", { class: "bar" }, make("h2", { tabindex: -1 }, `Latent ${latent.index}`),
    make("nav", { "aria-label": "Other latents" }, beside(at - 1, "previous in the list", "←"),
      beside(at + 1, "next in the list", "→"), make("a", { href: "#latents" }, "all latents")));
}

function view(latent) {
  const all = [...latent.top, ...latent.bands.flatMap((band) => band.examples)];
  const values = [latent.max, latent.max_refined, ...all.flatMap((one) => [one.value, one.refined])];
  const scale = Math.max(...values.map((value) => Math.abs(value ?? 0))) || 1;
  const bands = latent.bands.flatMap(({ low, high, examples: found }) =>
    [make("h4", {}, `${number(low)} to ${number(high)}`), examples(found, scale)]);
  const atom = latent.atom && picture(latent.atom, `Atom of latent ${latent.index}`);
  const text = make("div", {}, make("p", {}, sentences(latent).join(" ")), headline(latent, scale));
  const given = [["given this", (one) => percent(one.given)], ["lift", (one) => times(one.lift)]];
  const short = latent.coactive_error ? ` The true shares may be up to ${percent(latent.coactive_error, 2)} more.` : "";
  const cosine = ["cosine", (one) => number(one.cosine)];
  return [
    bar(latent),
    make("div", { class: "lead" }, atom, text),
    latent.loss_effect != null && index.ablation ? make("details", {}, make("summary", {}, "What the loss effect is"),
      make("p", {}, index.ablation)) : null,
    latent.count ? panels(...histograms(latent)) : null,
    section("Largest activations", null, latent.top[0]?.tokens && legend(), examples(latent.top, scale)),
    section("Over its range", "Rows sampled from quantiles of its activation.", ...bands),
    section("Next token", "Tokens whose logits its atom raises and lowers most.", panels(
      logits(latent.promotes, "promotes"), logits(latent.suppresses, "suppresses"))),
    panels(
      section("Active together", "Of the rows where this latent is active, how many have the other, and how many "
        + `times as many of them as of all rows.${short}`, neighbours(latent.coactive, ...given)),
      section("Nearest atoms", "Cosine of the two atoms.", neighbours(latent.nearest, cosine))),
  ].filter(Boolean);
}

/** What there is, side by side. */
const panels = (...found) => (found.some(Boolean) ? make("div", { class: "panels" }, ...found) : null);

// --- Which of them is shown: the address says it, so that links, and going back, work

let turns = 0, keepFocus = false;

async function route(event) {
  const found = /^#(\d+)$/.exec(location.hash), turn = ++turns, stay = keepFocus;
  const place = found ? places.get(Number(found[1])) : undefined;
  keepFocus = false;
  problem(found && place === undefined ? `Latent ${found[1]} is not on this page.` : "");
  open = place ?? null;
  if (place !== undefined && order.includes(place)) active = order.indexOf(place);
  const article = byId("latent");
  if (open === null) {
    const was = !article.hidden;
    article.hidden = true;
    document.body.classList.remove("open");
    document.title = document.title.replace(/^Latent \d+: /, "");
    if (!was) return draw();
    reveal();
    return grid.focus({ preventScroll: true });
  }
  try {
    const latent = await latentAt(place);
    if (turn !== turns) return; // another one has been asked for
    article.replaceChildren(...view(latent));
  } catch (error) {
    article.replaceChildren();
    problem(error.message);
  }
  article.hidden = false;
  document.body.classList.add("open");
  document.title = `Latent ${columns.index[place]}: ${document.title.replace(/^Latent \d+: /, "")}`;
  scrollTo(0, 0);
  reveal();
  if (event && !stay) article.querySelector("h2")?.focus({ preventScroll: true });
}

function problem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

// --- Keys

const moves = {
  ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity,
};

function move(event) {
  const by = moves[event.key];
  if (event.key === "Enter" && order.length) location.hash = columns.index[order[active]];
  else if (by === undefined || !order.length) return;
  event.preventDefault();
  if (event.key === "Enter") return;
  active = Math.max(0, Math.min(order.length - 1, active + by));
  reveal();
  if (open === null) return;
  keepFocus = true; // one goes down the list and sees each of them
  location.replace(`#${columns.index[order[active]]}`);
}

function pressed(event) {
  if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey) return;
  const typing = event.target.closest?.("input, select");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    if (open !== null && !byId("list").offsetParent) location.hash = "latents";
    search.focus();
    search.select();
  } else if (event.key === "Escape") {
    if (!tip.hidden) hideTip();
    else if (typing === search && search.value) {
      search.value = "";
      arrange();
    } else if (open !== null) location.hash = "latents";
  } else if (event.target === search && ["ArrowDown", "Enter"].includes(event.key)) {
    event.preventDefault();
    grid.focus();
    if (event.key === "Enter") move(event);
  } else if (event.target === grid) move(event);
  else readTokens(event);
}

async function start() {
  try {
    index = await inflate(byId("index").textContent);
    columns = index.columns;
    size = columns.index.length;
    columns.index.forEach((name, n) => places.set(name, n));
    makeList();
    byId("app").hidden = false;
    arrange();
    addEventListener("hashchange", route);
    document.addEventListener("keydown", pressed);
    await route();
  } catch (error) {
    problem(`This page cannot be shown here (${error.message}); use a browser of 2023 or later.`);
  }
}
start();
