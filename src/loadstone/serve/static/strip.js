// A strip of tokens: running text in which each token can be pointed at, or reached by the arrow keys.

import { card } from "./card.js";
import { element, percent, rove } from "./dom.js";
import { begun, shade, visible } from "./tokens.js";

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
    card.closeIn(this.place);
    this.place.replaceChildren();
    /** @type {import("./tokens.js").Token[]} */
    this.tokens = [];
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  }

  /** @param {import("./tokens.js").Token} token @param {string} mark "kept", "chosen" or nothing */
  add(token, mark = "") {
    const text = this.decoder.decode(new Uint8Array(token.bytes), { stream: true });
    const made = element("span", {
      class: `token ${mark}`, role: "button", tabIndex: this.tokens.length ? -1 : 0, "aria-label": label(token, mark),
    });
    if (this.shaded && token.logprob != null) made.classList.add(`shade${shade(token.logprob)}`);
    if (!text) made.classList.add("piece");
    made.dataset.at = this.tokens.length;
    const [line, ...others] = text.split("\n");
    made.append(line, ...others.flatMap((other) => [element("span", { class: "newline" }), "\n", other]));
    this.place.append(made);
    this.tokens.push(token);
  }

  /** All tokens are there: what is left of a character that was cut off. */
  end() {
    const rest = this.decoder.decode();
    if (rest) this.place.lastElementChild?.append(rest);
  }

  /** Puts the focus on a token, without its card. */
  focus(at) {
    this.place.children[at].focus();
    card.hide();
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
    if (event.type === "pointerover" && card.pinned) return; // it was clicked: the way into it leads over others
    if (this.tokens[found.at].top) this.#show(found);
  }

  #leave(event) {
    if (this.#found(event)) card.leave();
  }

  #open(event, byKey) {
    const found = this.#found(event);
    if (!found || !this.tokens[found.at].top) return;
    event.preventDefault();
    this.#show(found);
    card.pin(byKey);
  }

  #show({ span, at }) {
    const choose = this.onBranch && ((alternative) => this.onBranch(at, alternative));
    card.show(span, this.tokens[at], { choose, before: begun(this.tokens.slice(Math.max(0, at - 3), at)) });
  }
}

function label(token, mark) {
  const likely = token.logprob == null ? "" : `, ${percent(Math.exp(token.logprob))}`;
  return `${visible(token)}${likely}${mark === "chosen" ? ", chosen by you" : ""}`;
}
