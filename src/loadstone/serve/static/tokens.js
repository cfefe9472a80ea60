// Tokens as text: bytes joined into characters, white space made visible, surprisal as a shade.

import { bits, element } from "./dom.js";

/**
 * A token as the server describes it.
 * @typedef {{id: number, text: string, bytes: number[], logprob?: number|null, top?: Token[]}} Token
 */

const SIGNS = { " ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽" };
const HEAVY = [1, 2, 4, 7, 10]; // bits of surprisal from which the next shade holds
const LENGTHS = [256, 0xc0, 0xe0, 0xf0]; // least first byte of a character that is longer than so many bytes
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

/** The bytes at the end of these tokens that are the beginning of a character. @param {Token[]} tokens */
export function begun(tokens) {
  const last = tokens.slice(-3).flatMap((token) => token.bytes).slice(-3);
  for (const bytes of [last, last.slice(1), last.slice(2)]) {
    if (bytes[0] >= LENGTHS[bytes.length] && bytes.slice(1).every((byte) => byte >= 0x80 && byte < 0xc0)) return bytes;
  }
  return [];
}

/** What a token that is no text by itself completes after such bytes; nothing if it does not. */
export function completed(bytes, token) {
  if (bytes.length === 0) return "";
  try {
    return strict.decode(new Uint8Array([...bytes, ...token.bytes]));
  } catch {
    return "";
  }
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
  const key = (name, at) => element("li", {}, element("span", { class: `key shade${at}` }), name);
  const keys = [element("li", {}, "Surprisal in bits:"), ...["below 1", ...names].map(key)];
  return element("ul", { class: "legend", "aria-label": "Bits of surprisal" }, ...keys);
}
