// The first tab: prompt, settings, one model or two beside each other, run and stop.

import { Column } from "./column.js";
import { byId, element } from "./dom.js";
import { legend } from "./tokens.js";

/** @type {Column[]} */
let columns = [];
const running = new Set(); // AbortControllers of what streams
let shapes = {};

/** @param {Object<string, object>} models as /inspect/models describes them */
export function start(models) {
  shapes = models;
  byId("write-legend").prepend(legend());
  byId("beside").append(...Object.keys(models).map((name) => element("option", { value: name }, name)));
  byId("beside-row").hidden = Object.keys(models).length < 2;
  byId("write-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("write-form").requestSubmit();
  });
  byId("stop").addEventListener("click", stop);
  byId("new-chat").addEventListener("click", forget);
  for (const name of ["beside", "mode-chat", "mode-completion"]) byId(name).addEventListener("change", forget);
  for (const name of ["temperature", "top-k", "top-p"]) byId(name).addEventListener("input", showValues);
  byId("settings").open = matchMedia("(min-width: 48rem)").matches; // else the answer would be far below
  byId("settings").addEventListener("invalid", () => (byId("settings").open = true), true); // or nobody sees why
  showValues();
}

/** Another model was chosen, or another way to ask it: what was answered is of the old one. */
export function forget() {
  stop();
  columns = [];
  byId("columns").replaceChildren();
  byId("write-legend").hidden = true;
  const model = byId("model").value;
  for (const option of byId("beside").options) option.hidden = option.value === model;
  if (byId("beside").value === model) byId("beside").value = "";
  const chats = chosen().every((name) => shapes[name].chat);
  byId("mode-chat").disabled = !chats;
  if (!chats) byId("mode-completion").checked = true;
  byId("no-chat").hidden = chats;
  byId("chat-only").hidden = !isChat();
  byId("new-chat").hidden = true;
  byId("prompt-label").textContent = isChat() ? "Message" : "Prompt";
}

const isChat = () => byId("mode-chat").checked;

const chosen = () => [byId("model").value, byId("beside").value].filter(Boolean);

/** Slider positions in words. */
export function showValues() {
  const { temperature, topK, topP } = { temperature: byId("temperature"), topK: byId("top-k"), topP: byId("top-p") };
  const words = {
    temperature: temperature.valueAsNumber === 0 ? "0: always the likeliest" : temperature.valueAsNumber.toFixed(2),
    "top-k": topK.valueAsNumber === 0 ? "off" : topK.value,
    "top-p": topP.valueAsNumber === 1 ? "off" : topP.valueAsNumber.toFixed(2),
  };
  for (const [name, text] of Object.entries(words)) {
    byId(`${name}-value`).textContent = text;
    byId(name).setAttribute("aria-valuetext", text);
  }
}

/** The settings as the server wants them; what is off is left out. */
function settings() {
  const number = (name) => byId(name).valueAsNumber;
  const found = { temperature: number("temperature"), top_p: number("top-p"), max_tokens: number("max-tokens") };
  if (number("top-k") > 0) found.top_k = number("top-k");
  if (byId("seed").value !== "") found.seed = number("seed");
  return found;
}

async function run() {
  stop();
  if (columns.length === 0) {
    columns = chosen().map((name) => new Column(name, shapes[name], watch));
    byId("write-legend").hidden = false;
    byId("columns").replaceChildren(...columns.map((column) => column.place));
  }
  const mine = new AbortController();
  const asked = settings();
  const prompt = byId("prompt").value;
  const each = isChat()
    ? (column) => column.chat(byId("system").value, prompt, asked, mine.signal)
    : (column) => column.complete(prompt, asked, mine.signal);
  if (isChat()) {
    byId("prompt").value = "";
    byId("new-chat").hidden = false;
  }
  await watch(mine, Promise.all(columns.map(each)));
  const unanswered = columns.length > 0 && columns.every((column) => column.isEmpty);
  if (unanswered && byId("prompt").value === "") byId("prompt").value = prompt;
}

/** While it streams there is something to stop. */
async function watch(controller, done) {
  running.add(controller);
  byId("stop").disabled = false;
  await done;
  running.delete(controller);
  if (running.size > 0) return;
  if (document.activeElement === byId("stop")) byId("run").focus();
  byId("stop").disabled = true;
}

function stop() {
  for (const controller of running) controller.abort();
}
