// Tokens on the screen: their bytes as text, and a strip in which each can be pointed at, or reached by the arrow keys.

import { bits, element, percent, rove } from "./dom.js";
import { card } from "./card.js";

/**
 * A token as the server describes it.
 * @typedef {{id: number, text: string, bytes: number[], logprob?: number|null, top?: Token[]}} Token
 */

const SIGNS = { " ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽" };
const HEAVY = [1, 2, 4, 7, 10]; // bits of surprisal from which the next shade holds
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const hex = (byte) => `\\x${byte.toString(16).padStart(2, "0")}`;

/** A token's text with its white space to be seen; bytes that are no characters as \x... */
export function visible(token) {
  let text;
  try {
    text = strict.decode(new Uint8Array(token.bytes));
  } catch {
    return token.bytes.map(hex).join("");
  }
  if (!text) return "(empty)";
  const signs = (character) => SIGNS[character] ?? `U+${character.codePointAt(0).toString(16).padStart(4, "0")}`;
  return text.replace(/^ +| +$|[\n\r\t\u00a0]|[\p{Cc}\p{Cf}]/gu, (found) => [...found].map(signs).join(""));
}

/** The text of all tokens: bytes are joined first, as a character may be cut into several tokens. */
export function textOf(tokens) {
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(tokens.flatMap((token) => token.bytes)));
}

/** Shade 0 (expected) to 5 (a surprise). */
export const shade = (logprob) => HEAVY.filter((least) => bits(logprob) >= least).length;

/** What the shades stand for. */
export function legend() {
  const names = HEAVY.map((least, at) => `${least}${HEAVY[at + 1] ? `–${HEAVY[at + 1]}` : " and more"}`);
  const keys = ["below 1", ...names].map((name, at) => element("li", {}, element("span", { class: `key shade${at}` }), name));
  return element("ul", { class: "legend", "aria-label": "Bits of surprisal" }, element("li", {}, "Surprisal in bits:"), ...keys);
}

/** Tokens one after the other, as text, in an element; `onBranch(at, alternative)` makes alternatives clickable. */
export class Strip {
  /** @param {HTMLElement} place @param {{shaded?: boolean, onBranch?: Function, onPoint?: Function}} options */
  constructor(place, { shaded = true, onBranch = null, onPoint = null } = {}) {
    Object.assign(this, { place, shaded, onBranch, onPoint });
    place.setAttribute("role", "group");
    rove(place, ".token", { next: ["ArrowRight"], back: ["ArrowLeft"] });
    for (const event of ["pointerover", "focusin"]) place.addEventListener(event, (found) => this.#point(found));
    for (const event of ["pointerout", "focusout"]) place.addEventListener(event, (found) => this.#leave(found));
    place.addEventListener("click", (found) => this.#open(found, false));
    place.addEventListener("keydown", (found) => {
      if (found.key === "Enter" || found.key === " " || found.key === "ArrowDown") this.#open(found, true);
    });
    this.clear();
  }

  clear() {
    if (this.onBranch !== undefined) card.closeIn(this.place);
    this.place.replaceChildren();
    /** @type {Token[]} */
    this.tokens = [];
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  }

  /** @param {Token} token @param {string} mark "kept", "chosen" or nothing */
  add(token, mark = "") {
    const text = this.decoder.decode(new Uint8Array(token.bytes), { stream: true });
    const made = element("span", {
      class: `token ${mark}`, role: "button", tabIndex: this.tokens.length ? -1 : 0, "aria-label": label(token, mark),
    });
    if (this.shaded && token.logprob != null) made.classList.add(`shade${shade(token.logprob)}`);
    if (!text) made.classList.add("piece");
    made.dataset.at = this.tokens.length;
    text.split("\n").forEach((line, at) => made.append(...(at ? [element("span", { class: "newline" }), "\n"] : []), line));
    this.place.append(made);
    this.tokens.push(token);
  }

  /** All tokens are there: what is left of a character that was cut off. */
  end() {
    const rest = this.decoder.decode();
    if (rest) this.place.lastElementChild?.append(rest);
  }

  spans() {
    return [...this.place.children];
  }

  /** The span of an event's token, and which it is. */
  #found(event) {
    const span = event.target.closest(".token");
    return span && { span, at: Number(span.dataset.at) };
  }

  #point(event) {
    const found = this.#found(event);
    if (!found) return;
    this.onPoint?.(found.at);
    if (this.tokens[found.at].top) card.show(found.span, this.tokens[found.at], this.#chooser(found.at));
  }

  #leave(event) {
    if (!this.#found(event)) return;
    this.onPoint?.(null);
    card.leave();
  }

  #open(event, byKey) {
    const found = this.#found(event);
    if (!found || !this.tokens[found.at].top) return;
    event.preventDefault();
    card.show(found.span, this.tokens[found.at], this.#chooser(found.at));
    card.pin(byKey);
  }

  #chooser(at) {
    return this.onBranch && ((alternative) => this.onBranch(at, alternative));
  }
}

function label(token, mark) {
  const likely = token.logprob == null ? "" : `, ${percent(Math.exp(token.logprob))}`;
  return `${visible(token)}${likely}${mark === "chosen" ? ", chosen by you" : ""}`;
}
