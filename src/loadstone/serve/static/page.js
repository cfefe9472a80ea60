// The page's start: which models there are, the tabs, and settings that stay in the address.

import { ask } from "./api.js";
import * as attention from "./attention.js";
import { byId, complain, element, plural, rove } from "./dom.js";
import * as report from "./report.js";
import * as surprisal from "./surprisal.js";
import * as write from "./write.js";

const KEPT = [
  "model", "beside", "mode-chat", "system", "prompt", "temperature", "top-k", "top-p", "max-tokens", "seed",
  "surprisal-text", "attention-text", "layer", "head",
];
const LONGEST = 2000; // characters of a text that the address still keeps
let shapes = {};

async function start() {
  tabs();
  try {
    shapes = await ask("/inspect/models");
  } catch (error) {
    complain(byId("page-error"), error);
    return;
  }
  complain(byId("page-error"), "");
  byId("model").append(...Object.keys(shapes).map((name) => element("option", { value: name }, name)));
  for (const part of [write, surprisal, attention, report]) part.start(shapes);
  restore();
  byId("model").addEventListener("change", changed);
  document.addEventListener("input", keep);
  byId("whole").hidden = false;
}

/** Another model was chosen. */
function changed() {
  const shape = shapes[byId("model").value];
  const counts = ["parameter", "layer", "head"].map((word) => plural(shape[`${word}s`], word));
  const facts = [shape.architecture, ...counts, `context ${shape.context.toLocaleString("en")}`];
  byId("model-facts").textContent = facts.join(" · ");
  for (const part of [write, surprisal, attention]) part.forget();
  if (!byId("panel-report").hidden) report.show();
}

function tabs() {
  const list = byId("tabs");
  rove(list, "[role=tab]", { next: ["ArrowRight"], back: ["ArrowLeft"], wraps: true, chosen: select });
  list.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) select(tab);
  });
}

function select(tab) {
  for (const each of byId("tabs").querySelectorAll("[role=tab]")) {
    each.setAttribute("aria-selected", String(each === tab));
    each.tabIndex = each === tab ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = each !== tab;
  }
  if (tab.id === "tab-report") report.show();
  keep();
}

/** What was typed and set goes into the address (after the #, which no server gets to see). */
function keep() {
  if (Object.keys(shapes).length === 0) return;
  const found = new URLSearchParams({ tab: byId("tabs").querySelector("[aria-selected=true]").id });
  for (const name of KEPT) {
    const field = byId(name);
    const value = field.type === "radio" ? String(field.checked) : field.value;
    if (value.length <= LONGEST) found.set(name, value);
  }
  history.replaceState(null, "", `#${found}`);
}

function restore() {
  const found = new URLSearchParams(location.hash.slice(1));
  if (found.has("model")) set(byId("model"), found.get("model"));
  changed(); // first: how many layers there are, and whether it chats, is the model's
  for (const name of KEPT.filter((each) => found.has(each))) set(byId(name), found.get(name));
  write.forget();
  for (const part of [write, attention]) part.showValues();
  const tab = byId(found.get("tab"));
  if (tab?.matches("[role=tab]")) select(tab);
}

/** A value from the address, if the field takes it. */
function set(field, value) {
  if (field.type === "radio") field.checked = value === "true";
  else if (!field.options || [...field.options].some((option) => option.value === value)) field.value = value;
}

start();
