// Lists every benchmark item and shows the chosen one. The address keeps the state:
// items.html#run=NAME&source=MMMU&sort=error&item=12
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = { run: data.runs[0], source: "", policy: "", find: "", sort: "error", item: "" };
const LABELS = { "1": ["correct", "✓ correct"], "-1": ["error", "✗ error"], "0": ["neutral", "– neutral"] };

// Makes an element with attributes and children; text is never parsed as HTML.
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const scoresOf = (item) => data.scores[state.run][item.index];
const isWrong = (label, score) => label !== 0 && (score >= data.threshold) !== (label === 1);

// Mean squared error of the labelled steps, as in the workdir's page; -1 if there is none.
function errorOf(item) {
  const scores = scoresOf(item);
  let sum = 0, count = 0;
  item.labels.forEach((label, i) => {
    if (label !== 0) { sum += (scores[i] - (label === 1)) ** 2; count += 1; }
  });
  return count ? sum / count : -1;
}

const wrongSteps = (item) =>
  item.labels.filter((label, i) => isWrong(label, scoresOf(item)[i])).length;

const ORDERS = {
  index: (rows) => rows.sort((a, b) => a.item.index - b.item.index),
  source: (rows) => rows.sort((a, b) => a.item.source.localeCompare(b.item.source)),
  policy: (rows) => rows.sort((a, b) => a.item.policy.localeCompare(b.item.policy)),
  wrong: (rows) => rows.sort((a, b) => b.wrong - a.wrong),
  error: (rows) => rows.sort((a, b) => b.error - a.error),
};

function shownRows() {
  const words = state.find.toLowerCase();
  const holds = (item) => (!state.source || item.source === state.source) &&
    (!state.policy || item.policy === state.policy) &&
    (!words || [item.question, ...item.steps].some((text) => text.toLowerCase().includes(words)));
  const rows = data.items.filter(holds).map((item) =>
    ({ item, error: errorOf(item), wrong: wrongSteps(item) }));
  return (ORDERS[state.sort] || ORDERS.error)(rows);
}

function showList() {
  const rows = shownRows();
  const body = make("tbody", {});
  for (const { item, error, wrong } of rows) {
    const cells = [item.index, item.source, item.policy, `${wrong} / ${item.steps.length}`,
      error < 0 ? "–" : error.toFixed(3)];
    const row = make("tr", { "data-item": item.index },
      ...cells.map((text) => make("td", {}, String(text))));
    body.append(row);
  }
  byId("rows").replaceChildren(...body.children);
  byId("count").textContent = `${rows.length} of ${data.items.length} items`;
  if (!rows.some(({ item }) => String(item.index) === state.item)) {
    state.item = rows.length ? String(rows[0].item.index) : "";
  }
  showItem();
}

function stepElement(item, i) {
  const score = scoresOf(item)[i], label = item.labels[i];
  const [kind, words] = LABELS[label];
  const marks = make("span", { class: "marks" },
    make("span", { class: "score" }, score.toFixed(2)));
  if (isWrong(label, score)) marks.append(" ", make("span", { class: "wrong" }, "misjudged"));
  marks.append(make("br", {}), make("span", { class: `label ${kind}` }, words));
  const mc = item.mc?.[i] ?? "none";
  if (item.mc) marks.append(make("br", {}), make("span", { class: "small quiet" }, `MC ${mc}`));
  return make("li", { class: "step", style: `--score:${score}` },
    make("span", { class: "text" }, item.steps[i]), marks);
}

function showItem() {
  for (const row of document.querySelectorAll("tr.chosen")) row.classList.remove("chosen");
  const item = data.items.find((one) => String(one.index) === state.item);
  if (!item) { byId("item").replaceChildren(); return; }
  const row = document.querySelector(`tr[data-item="${item.index}"]`);
  if (row) { row.classList.add("chosen"); row.scrollIntoView({ block: "nearest" }); }
  const images = item.images.map((file) => make("img", { src: file, alt: "image of the item" }));
  byId("item").replaceChildren(
    make("article", { class: "card item" },
      make("div", { class: "images" }, ...images),
      make("div", {},
        make("h3", { class: "small quiet" },
          `item ${item.index}, ${item.source}, solved by ${item.policy}`),
        make("div", { class: "question" }, item.question),
        make("ol", { class: "steps" }, ...item.steps.map((_, i) => stepElement(item, i))),
        make("p", { class: "small quiet" }, `Answer: ${item.answer}`))));
  history.replaceState(null, "", "#" + new URLSearchParams(
    Object.entries(state).filter(([, value]) => value)));
}

function choose(changes) {
  Object.assign(state, changes);
  showList();
}

function fill(id, options, first) {
  byId(id).append(...(first ? [new Option(first, "")] : []),
    ...options.map((option) => new Option(option, option)));
  byId(id).value = state[id];
  byId(id).addEventListener("input", () => choose({ [id]: byId(id).value }));
}

for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
  if (key in state) state[key] = value;
}
if (!data.runs.includes(state.run)) state.run = data.runs[0];
const distinct = (key) => [...new Set(data.items.map((item) => item[key]))].sort();
fill("run", data.runs);
fill("source", distinct("source"), "every source");
fill("policy", distinct("policy"), "every policy model");
byId("find").value = state.find;
byId("find").addEventListener("input", () => choose({ find: byId("find").value }));
byId("heads").addEventListener("click", (event) => choose({ sort: event.target.dataset.sort }));
byId("rows").addEventListener("click", (event) => {
  state.item = event.target.closest("tr").dataset.item;
  showItem();
});
document.addEventListener("keydown", (event) => {
  const row = document.querySelector("tr.chosen");
  const next = { ArrowDown: row?.nextElementSibling, ArrowUp: row?.previousElementSibling }[event.key];
  if (!next || event.target.matches("input, select")) return;
  event.preventDefault();
  state.item = next.dataset.item;
  showItem();
});
showList();
