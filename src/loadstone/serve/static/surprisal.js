// Surprisal of a text: how little the model expected each token, and what it would have said instead.

import { ask } from "./api.js";
import { announce, bits, byId, complain, element, latest, plural } from "./dom.js";
import { Strip } from "./strip.js";
import { legend } from "./tokens.js";

let strip = null;

export function start() {
  strip = new Strip(byId("surprisal-strip"));
  byId("surprisal-legend").append(legend());
  byId("surprisal-form").addEventListener("submit", (event) => {
    event.preventDefault();
    measure();
  });
}

/** Another model was chosen. */
export function forget() {
  measured.cancel();
  strip.clear();
  byId("surprisal-result").hidden = true;
}

const measured = latest(async (signal) => {
  const asked = { model: byId("model").value, text: byId("surprisal-text").value, top: 10 };
  const { tokens } = await ask("/inspect/surprisal", asked, signal);
  strip.clear();
  tokens.forEach((token) => strip.add(token));
  strip.end();
  byId("surprisal-result").hidden = false;
  const figures = totals(tokens);
  byId("surprisal-totals").replaceChildren(
    ...figures.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
  announce(`Measured: ${figures.map((pair) => pair.join(" ")).join(", ")}.`);
});

async function measure() {
  complain(byId("surprisal-error"), "");
  await measured().catch((error) => complain(byId("surprisal-error"), error));
}

/** @param {import("./tokens.js").Token[]} tokens The first has no probability, and is left out. */
function totals(tokens) {
  const scored = tokens.filter((token) => token.logprob != null);
  const nats = -scored.reduce((sum, token) => sum + token.logprob, 0);
  const bytes = scored.reduce((sum, token) => sum + token.bytes.length, 0);
  if (scored.length === 0) return [["tokens", `${tokens.length}; the first has no probability`]];
  return [
    ["scored", plural(scored.length, "token")],
    ["total", `${bits(-nats).toFixed(1)} bits = ${nats.toFixed(1)} nats`],
    ["per token", `${(bits(-nats) / scored.length).toFixed(2)} bits`],
    ["per byte", `${(bits(-nats) / bytes).toFixed(2)} bits`],
    ["perplexity", Math.exp(nats / scored.length).toPrecision(4)],
  ];
}
