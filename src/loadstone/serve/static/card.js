// The card of one token: its probability, and what else could have come. There is one, beside the token pointed at.

import { bits, byId, element, percent, rove } from "./dom.js";
import { completed, visible } from "./tokens.js";

const CHOICE = "Choose one, and the answer goes on from there.";
const PATIENCE = 250; // milliseconds to reach the card with the mouse

class Card {
  /** @type {HTMLElement|null} the token that it belongs to */
  owner = null;
  pinned = false;
  #timer = 0;

  constructor() {
    this.place = byId("card");
    rove(this.place, "button.choice", { next: ["ArrowDown"], back: ["ArrowUp"], wraps: true });
    this.place.addEventListener("pointerenter", () => clearTimeout(this.#timer));
    this.place.addEventListener("pointerleave", () => this.leave());
    this.place.addEventListener("focusout", (event) => {
      if (!this.place.contains(event.relatedTarget) && event.relatedTarget) this.hide();
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.#escape());
    document.addEventListener("pointerdown", (event) => {
      if (!this.place.contains(event.target) && !event.target.closest?.(".token")) this.hide();
    });
  }

  /**
   * @param {HTMLElement} owner
   * @param {import("./tokens.js").Token} token
   * @param {{choose: ((alternative: object) => void)|null, before: number[]}} options
   * `choose`: what a click on an alternative does; `before`: bytes of a character that the token may complete.
   */
  show(owner, token, { choose, before }) {
    clearTimeout(this.#timer);
    if (this.owner === owner) return;
    this.hide();
    this.owner = owner;
    owner.classList.add("pointed");
    const chosen = choose && ((alternative) => this.#choose(alternative, choose));
    this.place.replaceChildren(...content(token, chosen, (each) => spelt(each, before)));
    this.place.setAttribute("aria-label", `${visible(token)}: what else could have come`);
    this.place.hidden = false;
    this.#move(owner);
  }

  /** It stays until Escape or a click elsewhere; by the keyboard, the focus goes into it. */
  pin(byKey) {
    this.pinned = true;
    const hides = getComputedStyle(this.place).position === "fixed";
    if (hides) window.scrollBy(0, Math.max(0, this.owner.getBoundingClientRect().bottom - this.place.offsetTop + 8));
    if (byKey) (this.place.querySelector("button.choice") ?? this.place).focus();
  }

  leave() {
    clearTimeout(this.#timer);
    const keyboard = () => this.owner === document.activeElement || this.place.contains(document.activeElement);
    if (!this.pinned) this.#timer = setTimeout(() => keyboard() || this.hide(), PATIENCE);
  }

  hide() {
    this.owner?.classList.remove("pointed");
    this.owner = null;
    this.pinned = false;
    this.place.hidden = true;
  }

  /** Hides it if it belongs to a token in this place. */
  closeIn(place) {
    if (this.owner && place.contains(this.owner)) this.hide();
  }

  #escape() {
    const { owner } = this;
    const inside = this.place.contains(document.activeElement);
    this.hide();
    if (inside) owner?.focus();
    this.hide(); // the focus has shown it again
  }

  #choose(alternative, choose) {
    this.hide();
    choose(alternative);
  }

  /** Under its token, within the window's width; the style sheet puts it at the bottom of small screens instead. */
  #move(owner) {
    const box = owner.getClientRects()[0] ?? owner.getBoundingClientRect();
    const rightmost = document.documentElement.clientWidth - this.place.offsetWidth - 8;
    const left = Math.max(8, Math.min(box.left - 16, rightmost));
    const below = box.bottom + this.place.offsetHeight < window.innerHeight || box.top < this.place.offsetHeight;
    const top = below ? box.bottom : box.top - this.place.offsetHeight;
    this.place.style.setProperty("--left", `${left + window.scrollX}px`);
    this.place.style.setProperty("--top", `${top + window.scrollY}px`);
  }
}

/** A token's text; and the character that it completes, if it is only part of one. */
function spelt(token, before) {
  const whole = completed(before, token);
  return visible(token) + (whole ? ` = ${whole}` : "");
}

function content(token, choose, name) {
  const headline = element("p", { class: "headline" }, element("code", {}, name(token)), ` ${facts(token)}`);
  if (token.logprob == null) return [headline];
  const known = token.top.some((each) => each.id === token.id);
  const rows = known ? token.top : [...token.top, token];
  const rest = 1 - rows.reduce((sum, each) => sum + Math.exp(each.logprob), 0);
  const items = rows.map((each) => element("li", {}, row(each, name(each), each.id === token.id, choose)));
  const others = element("li", {}, bar(element("div", { class: "choice others" }), "all others", Math.max(0, rest)));
  return [
    headline,
    element("ol", {}, ...items, ...(rest > 0.00005 ? [others] : [])),
    element("p", { class: "note" }, choose ? CHOICE : "The model’s own probabilities."),
  ];
}

function facts(token) {
  if (token.logprob == null) return `the first token: nothing stands before it · id ${token.id}`;
  return `${percent(Math.exp(token.logprob))} · ${bits(token.logprob).toFixed(2)} bits · id ${token.id}`;
}

/** One alternative; the token that did come is no choice. */
function row(each, name, came, choose) {
  const probability = Math.exp(each.logprob);
  if (came) return bar(element("div", { class: "choice came" }), name, probability, "this one");
  if (!choose) return bar(element("div", { class: "choice" }), name, probability);
  const button = element("button", { class: "choice", type: "button", on: { click: () => choose(each) } });
  return bar(button, name, probability);
}

function bar(made, name, probability, note = "") {
  const drawn = element("span", { class: "bar", "aria-hidden": "true" });
  drawn.style.setProperty("--share", probability.toFixed(4));
  const tail = note ? [element("span", { class: "came-note" }, note)] : [];
  made.append(element("code", {}, name), ...tail, drawn, element("span", { class: "share" }, percent(probability)));
  return made;
}

export const card = new Card();
