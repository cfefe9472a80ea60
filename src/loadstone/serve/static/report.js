// What loading the model proved: its facts, the checks of `verify`, and the plan, tensor by tensor.

import { ask } from "./api.js";
import { byId, complain, element, latest, plural } from "./dom.js";

const MARKS = new Map([[true, ["good", "✓ ok"]], [false, ["bad", "✗ FAIL"]], [null, ["open", "– skipped"]]]);
let plan = [];
let loaded = ""; // the model whose report is shown

export function start() {
  byId("filter").addEventListener("input", showPlan);
}

/** Another model was chosen, or the tab was opened. */
export async function show() {
  const model = byId("model").value;
  if (loaded === model) return;
  complain(byId("report-error"), "");
  await fetched(model).catch((error) => complain(byId("report-error"), error));
}

const fetched = latest(async (signal, model) => {
  const report = await ask(`/inspect/report/${encodeURIComponent(model)}`, null, signal);
  plan = report.plan;
  byId("facts").replaceChildren(...facts(report));
  showChecks(report.verify);
  showPlan();
  byId("report-result").hidden = false;
  loaded = model;
});

function facts({ container, model }) {
  const turned = model.orientation;
  const rows = [
    ["file", `${container.name} (${container.format}), ${size(container.bytes)}`],
    ["tensors", container.tensors.toLocaleString("en")],
    ["types", Object.entries(container.dtypes).map(([name, bytes]) => `${name} ${size(bytes)}`).join(", ")],
    ["model", `${model.architecture}, ${plural(model.parameters, "parameter")}`],
    ["names of", `${model.dialect}, sizes from ${model.config_source}`],
    ["head", model.tie],
    ["orientation", turned && `${turned.stored}: ${turned.agree} of ${turned.of} matrices that can tell agree`],
    ["assumed", words(model.assumed)],
    ["left out", words(Object.entries(model.not_parameters).map(([name, value]) => `${name} ${value}`))],
    ["notes", words([...container.notes, ...model.problems])],
  ];
  const given = rows.filter(([, value]) => value);
  return given.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

const words = (list) => list.map((each) => (typeof each === "string" ? each : JSON.stringify(each))).join("; ");

function size(bytes) {
  const units = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["bytes", 1]];
  const [unit, one] = units.find(([, each]) => bytes >= each) ?? units.at(-1);
  return `${(bytes / one).toLocaleString("en", { maximumSignificantDigits: 4 })} ${unit}`;
}

function showChecks(found) {
  byId("unverified").hidden = Boolean(found);
  byId("checks").hidden = !found;
  byId("explanation").textContent = found?.explanation.join("\n") ?? "";
  if (!found) return;
  const rows = found.checks.map((check) => {
    const [kind, mark] = MARKS.get(check.ok);
    return [element("span", { class: `mark ${kind}` }, mark), check.name, check.detail];
  });
  fill(byId("checks"), ["Result", "Check", "What was found"], rows);
}

function showPlan() {
  const wanted = byId("filter").value.toLowerCase();
  const rows = plan
    .map((row) => [code(row.source), lines(row.targets), row.ops.join(", "), row.shape.join(" × "), row.dtype])
    .filter((row) => row.some((cell) => textOf(cell).toLowerCase().includes(wanted)));
  fill(byId("plan"), ["In the file", "Becomes", "By", "Shape", "Type"], rows);
  byId("plan-count").textContent = `${rows.length} of ${plural(plan.length, "tensor")}`;
}

const textOf = (cell) => (typeof cell === "string" ? cell : cell.textContent);
const code = (text) => element("code", {}, text);
const lines = (list) => element("span", {}, ...list.flatMap((each) => [code(each), element("br")]));

/** Rows into a table. Roles are said aloud, as small screens show rows as blocks, which takes a table's own away. */
function fill(table, heads, rows) {
  table.setAttribute("role", "table");
  const row = (cells) => element("tr", { role: "row" }, ...cells);
  const head = heads.map((name) => element("th", { role: "columnheader", scope: "col" }, name));
  const cells = (each) => each.map((cell, at) => element("td", { role: "cell", "data-head": heads[at] }, cell));
  table.tHead.replaceChildren(row(head));
  table.tBodies[0].replaceChildren(...rows.map((each) => row(cells(each))));
}
