// Small tools for the page's elements. Text of models goes in as text only, never as markup.

/**
 * An element with properties, attributes and children; what is no node is shown as text.
 * @param {string} name
 * @param {Object<string, any>} [settings] `class`, `role`, `aria-...`, `data-...` are attributes, `on` its listeners.
 * @param {...(Node|string)} children
 */
export function element(name, settings = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(settings)) {
    if (key === "on") Object.entries(value).forEach(([event, listener]) => made.addEventListener(event, listener));
    else if (key === "class" || key === "role" || key.includes("-")) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** 0.1234 -> "12.3%"; never "0.0%" for what can happen, nor "100%" for what need not. */
export function percent(probability) {
  const value = 100 * probability;
  if (value >= 99.95 && probability < 1) return "> 99.9%";
  if (value < 0.01) return value > 0 ? "< 0.01%" : "0%";
  return `${value >= 10 ? value.toFixed(1) : value.toFixed(2)}%`;
}

export const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

export const bits = (logprob) => -logprob / Math.LN2;

/** Says it to screen readers, once, when it is there to be read. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** Shows what went wrong in a panel's place for it; an empty text clears it. */
export function complain(place, error) {
  place.textContent = error ? String(error.message ?? error) : "";
  place.hidden = !error;
}

/** Keeps only the last of several calls: each call ends the one before, and `cancel` ends the last. */
export function latest(work) {
  let running = null;
  const call = async (...given) => {
    call.cancel();
    const mine = (running = new AbortController());
    try {
      await work(mine.signal, ...given);
    } catch (error) {
      if (!mine.signal.aborted) throw error;
    }
  };
  call.cancel = () => running?.abort();
  return call;
}

/**
 * Arrow keys within a group of which one member is in the Tab order (ARIA's roving tabindex).
 * @param {HTMLElement} group
 * @param {string} members selector
 * @param {{next: string[], back: string[], wraps?: boolean, chosen?: (member: HTMLElement) => void}} keys
 */
export function rove(group, members, { next, back, wraps = false, chosen = () => {} }) {
  group.addEventListener("focusin", (event) => {
    const member = event.target.closest(members);
    if (!member) return;
    group.querySelectorAll(`${members}[tabindex="0"]`).forEach((other) => (other.tabIndex = -1));
    member.tabIndex = 0;
  });
  group.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const all = [...group.querySelectorAll(members)];
    const at = all.indexOf(event.target.closest(members));
    if (at < 0) return;
    let to = { Home: 0, End: all.length - 1 }[event.key];
    if (next.includes(event.key)) to = at + 1;
    if (back.includes(event.key)) to = at - 1;
    if (to === undefined) return;
    event.preventDefault();
    const target = all[wraps ? (to + all.length) % all.length : Math.max(0, Math.min(to, all.length - 1))];
    target.focus();
    chosen(target);
  });
}
