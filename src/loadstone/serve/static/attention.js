// Attention of one head: which tokens each token takes from, as a matrix and over the text itself.

import { ask } from "./api.js";
import { announce, byId, complain, latest, percent, plural } from "./dom.js";
import { draw, placeOf } from "./heatmap.js";
import { Strip } from "./strip.js";
import { visible } from "./tokens.js";

const SAID = 5; // sources that are named in words
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

let strip = null;
let shapes = {};
/** @type {{tokens: import("./tokens.js").Token[], weights: number[][]}|null} */
let shown = null;
let at = { row: 0, column: 0 };

/** @param {Object<string, {layers: number, heads: number}>} models */
export function start(models) {
  shapes = models;
  strip = new Strip(byId("attention-strip"), { shaded: false, onPoint: (row) => point(row, null) });
  byId("attention-form").addEventListener("submit", (event) => {
    event.preventDefault();
    look();
  });
  for (const name of ["layer", "head"]) {
    byId(name).addEventListener("input", () => {
      showValues();
      if (shown) look();
    });
  }
  byId("no-first").addEventListener("change", () => shown && refresh());
  listen(byId("heatmap"));
}

function listen(canvas) {
  canvas.addEventListener("pointermove", (event) => pointAt(event));
  canvas.addEventListener("pointerdown", (event) => pointAt(event));
  canvas.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step || !shown) return;
    event.preventDefault();
    const row = Math.max(0, Math.min(at.row + step[0], shown.tokens.length - 1));
    point(row, Math.max(0, Math.min((at.column ?? row) + step[1], row)));
  });
  new ResizeObserver(() => shown && paint()).observe(canvas.parentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => shown && paint());
}

/** Another model was chosen. */
export function forget() {
  looked.cancel();
  const { layers, heads } = shapes[byId("model").value];
  byId("layer").max = layers - 1;
  byId("head").max = heads - 1;
  showValues();
  shown = null;
  strip.clear();
  byId("attention-result").hidden = true;
}

export function showValues() {
  for (const name of ["layer", "head"]) {
    const text = `${byId(name).value} of 0–${byId(name).max}`;
    byId(`${name}-value`).textContent = text;
    byId(name).setAttribute("aria-valuetext", text);
  }
}

const looked = latest(async (signal) => {
  const number = (name) => byId(name).valueAsNumber;
  const text = byId("attention-text").value;
  const asked = { model: byId("model").value, text, layer: number("layer"), head: number("head") };
  const answer = await ask("/inspect/attention", asked, signal);
  const same = shown?.tokens.map((token) => token.id).join() === answer.tokens.map((token) => token.id).join();
  shown = answer;
  byId("attention-result").hidden = false;
  if (!same) {
    strip.clear();
    shown.tokens.forEach((token) => strip.add(token));
    strip.end();
    at = { row: shown.tokens.length - 1, column: null };
  }
  refresh();
  if (!same) announce(`Attention of ${plural(shown.tokens.length, "token")}. ${inWords()}`);
});

async function look() {
  complain(byId("attention-error"), "");
  await looked().catch((error) => complain(byId("attention-error"), error));
}

/** The weights as they are drawn: without the first token where that is asked for. */
function refresh() {
  const skips = byId("no-first").checked;
  shown.rows = skips ? shown.weights.map(([, ...others]) => [0, ...others]) : shown.weights;
  shown.most = Math.max(...shown.rows.slice(1).flat(), 1e-9); // the first row is 100% of itself, whatever the head does
  byId("strongest").textContent = percent(shown.most);
  show();
}

function pointAt(event) {
  const place = shown && placeOf(byId("heatmap"), event, shown.tokens.length);
  if (place && place.column <= place.row) point(place.row, place.column);
}

function point(newRow, column) {
  at = { row: newRow, column };
  show();
}

/** The chosen row over the text, in the matrix, and in words. */
function show() {
  const weights = shown.rows[at.row];
  const most = Math.max(...weights, 1e-9);
  [...byId("attention-strip").children].forEach((span, number) => {
    span.style.setProperty("--weight", number <= at.row ? (weights[number] / most).toFixed(3) : "0");
    span.classList.toggle("source", number === at.row);
    span.classList.toggle("later", number > at.row);
  });
  byId("attention-words").textContent = inWords();
  paint();
}

function paint() {
  draw(byId("heatmap"), { rows: shown.rows, most: shown.most, names: shown.tokens.map(visible), at });
}

function inWords() {
  const name = (number) => `“${visible(shown.tokens[number])}”`;
  const numbered = (number) => `${name(number)} (token ${number + 1})`;
  const weights = shown.weights[at.row];
  if (at.column !== null) {
    return `${numbered(at.row)} takes ${percent(weights[at.column])} from ${numbered(at.column)}.`;
  }
  const order = weights.map((_, column) => column).sort((one, other) => weights[other] - weights[one]);
  const sources = order.slice(0, SAID).map((column) => `${percent(weights[column])} from ${name(column)}`);
  return `${numbered(at.row)} takes ${sources.join(", ")}.`;
}
