// One model's answer as it streams, and its branches: what was kept, which token was chosen, and the way back.

import { stream } from "./api.js";
import { announce, complain, element, plural } from "./dom.js";
import { Strip } from "./strip.js";
import { textOf, visible } from "./tokens.js";

const TOP = 10; // alternatives beside each token
const ENDS = {
  stop: "the model ended it", length: "at the limit of tokens", stopped: "stopped by you", failed: "broken off",
  chosen: "you chose its end",
};

/**
 * An answer, or a branch of one.
 * @typedef {import("./tokens.js").Token} Token
 * @typedef {{promptIds: number[], tokens: Token[], kept: number, name: string, finish: string}} Version
 * `kept`: tokens before the chosen one; -1 if none was chosen.
 */

export class Column {
  /**
   * @param {string} model
   * @param {{ends: number[]}} shape as /inspect/models describes it
   * @param {(controller: AbortController, done: Promise<void>) => void} onStream told of each branch that streams
   */
  constructor(model, shape, onStream) {
    Object.assign(this, { model, onStream });
    this.ends = new Set(shape.ends);
    this.turns = [];
    this.streams = 0; // that run: a branch may begin while the first answer still comes
    this.parts = {
      turns: element("ol", { class: "turns", "aria-label": `Conversation with ${model}` }),
      versions: element("ol", { class: "versions", "aria-label": "Branches" }),
      strip: element("div", { class: "strip answer", "aria-label": `Answer of ${model}, token by token` }),
      status: element("p", { class: "note status" }),
      error: element("p", { class: "error", role: "alert", hidden: true }),
      copy: element("button", { type: "button", class: "quiet", hidden: true }, "Copy"),
    };
    this.parts.copy.addEventListener("click", () => this.#copy());
    this.strip = new Strip(this.parts.strip, { onBranch: (at, alternative) => this.#branch(at, alternative) });
    const { turns, versions, strip, status, error, copy } = this.parts;
    const foot = element("div", { class: "foot" }, status, copy);
    const parts = [element("h3", {}, model), turns, versions, strip, foot, error];
    this.place = element("section", { class: "column", "aria-label": model }, ...parts);
    this.#forget();
  }

  /** A new answer. @param {object} settings of the request @param {AbortSignal} signal */
  async complete(prompt, settings, signal) {
    this.turns = [];
    await this.#answer("/v1/completions", { prompt }, settings, signal);
  }

  /** The next turn of a chat; the answer that is shown becomes part of it. */
  async chat(system, message, settings, signal) {
    if (!this.isEmpty) {
      const content = textOf(this.shown.tokens);
      this.turns.push({ role: "user", content: this.message }, { role: "assistant", content });
    }
    this.message = message;
    const messages = [...this.turns, { role: "user", content: message }];
    if (system) messages.unshift({ role: "system", content: system });
    this.#showTurns(messages);
    await this.#answer("/v1/chat/completions", { messages }, settings, signal);
  }

  get isEmpty() {
    return !this.shown?.tokens.length;
  }

  async #answer(path, body, settings, signal) {
    this.#forget();
    this.settings = settings;
    this.#show(this.#version({ promptIds: [], tokens: [], kept: -1, name: "first answer" }));
    await this.#stream(path, body, settings.max_tokens, this.shown, signal);
  }

  /** Goes on from another token than the one that came. */
  #branch(at, alternative) {
    const from = this.shown;
    const came = from.tokens[at];
    const tokens = [...from.tokens.slice(0, at), { ...alternative, top: came.top }];
    const place = `from ${this.versions.indexOf(from) + 1} at token ${at + 1}`;
    const name = `${place}: “${visible(alternative)}” instead of “${visible(came)}”`;
    const version = this.#version({ promptIds: from.promptIds, tokens, kept: at, name });
    this.#show(version);
    this.strip.focus(at);
    if (this.ends.has(alternative.id)) return this.#finish(version, "chosen");
    const prompt = [...from.promptIds, ...tokens.map((token) => token.id)];
    const left = Math.max(1, this.settings.max_tokens - tokens.length);
    const mine = new AbortController();
    this.onStream(mine, this.#stream("/v1/completions", { prompt }, left, version, mine.signal));
  }

  async #stream(path, body, most, version, signal) {
    const asked = { model: this.model, ...body, ...this.settings, max_tokens: most, details: TOP };
    const began = version.tokens.length;
    let first = 0;
    complain(this.parts.error, "");
    this.#busy(1);
    announce(""); // so that the same end as before is said again
    try {
      for await (const event of stream(path, asked, signal)) {
        if (version.promptIds.length === 0) version.promptIds = event.prompt_token_ids?.[0] ?? [];
        for (const choice of event.choices) {
          first ||= performance.now();
          for (const token of choice.details ?? []) this.#add(version, token);
          if (choice.finish_reason) version.finish = choice.finish_reason;
        }
        version.rate = (version.tokens.length - began - 1) / ((performance.now() - first) / 1000);
        this.#tell(version);
      }
      this.#finish(version, version.finish);
    } catch (error) {
      this.#finish(version, signal.aborted ? "stopped" : "failed");
      if (!signal.aborted) complain(this.parts.error, error);
    } finally {
      this.#busy(-1);
    }
  }

  #busy(change) {
    this.streams += change;
    this.place.setAttribute("aria-busy", String(this.streams > 0));
  }

  #add(version, token) {
    version.tokens.push(token);
    if (version === this.shown) this.strip.add(token);
  }

  #finish(version, finish) {
    version.finish = finish;
    if (version === this.shown) this.strip.end();
    this.#tell(version);
    announce(`${this.model}: ${plural(version.tokens.length, "token")}, ${ENDS[finish]}.`);
  }

  #tell(version) {
    if (version !== this.shown) return;
    const rate = version.rate > 0 && Number.isFinite(version.rate) ? ` · ${version.rate.toFixed(1)} tokens/s` : "";
    const prompt = version.promptIds.length ? ` · prompt of ${plural(version.promptIds.length, "token")}` : "";
    const end = version.finish ? ` · ${ENDS[version.finish]}` : " · streaming";
    this.parts.status.textContent = `${plural(version.tokens.length, "token")}${rate}${prompt}${end}`;
    this.parts.copy.hidden = version.tokens.length === 0 || !navigator.clipboard; // plain http from afar has none
  }

  #version(fields) {
    const version = { finish: "", rate: 0, ...fields };
    this.versions.push(version);
    return version;
  }

  /** @param {Version} version */
  #show(version) {
    this.shown = version;
    this.strip.clear();
    const mark = (at) => (at < version.kept ? "kept" : at === version.kept ? "chosen" : "");
    version.tokens.forEach((token, at) => this.strip.add(token, mark(at)));
    if (version.finish) this.strip.end();
    this.#showVersions();
    this.#tell(version);
  }

  #showVersions() {
    const item = (version, at) => {
      const choose = { click: () => this.#choose(version, at) };
      const current = version === this.shown ? { "aria-current": "true" } : {};
      const settings = { type: "button", on: choose, ...current };
      return element("li", {}, element("button", settings, `${at + 1} · ${version.name}`));
    };
    this.parts.versions.replaceChildren(...this.versions.map(item));
    this.parts.versions.hidden = this.versions.length < 2;
  }

  #choose(version, at) {
    this.#show(version);
    this.parts.versions.children[at].firstChild.focus();
  }

  #showTurns(messages) {
    const parts = ({ role, content }) => [element("strong", {}, role), element("div", { class: "turn" }, content)];
    this.parts.turns.replaceChildren(...messages.map((message) => element("li", {}, ...parts(message))));
  }

  #forget() {
    /** @type {Version[]} */
    this.versions = [];
    this.parts.versions.hidden = true;
  }

  async #copy() {
    await navigator.clipboard.writeText(textOf(this.shown.tokens));
    announce("Copied.");
    this.parts.copy.textContent = "Copied";
    setTimeout(() => (this.parts.copy.textContent = "Copy"), 1500);
  }
}
