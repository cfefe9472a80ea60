// The page's own client of the server: JSON, server-sent events, and the key if the server asks for one.

import { byId, complain } from "./dom.js";

const KEY = "loadstone-api-key"; // of sessionStorage: gone when the tab is closed, and never in the address

/** The answer to GET, or to POST if there is a body. Throws what the server says, in its words. */
export async function ask(path, body, signal) {
  return (await request(path, body, signal)).json();
}

/** The events of a streamed answer, one object each. Throws what the server says, also in the middle. */
export async function* stream(path, body, signal) {
  const response = await request(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer broke off: the server ended the connection.");
    const lines = (buffer + value).split("\n");
    buffer = lines.pop();
    for (const line of lines.filter((each) => each.startsWith("data: "))) {
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function request(path, body, signal) {
  for (;;) {
    const response = await once(path, body, signal);
    if (response.ok) return response;
    const message = await worded(response);
    if (response.status !== 401) throw new Error(message);
    await askForKey(message);
  }
}

async function once(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { headers, signal, method: body ? "POST" : "GET", body: body && JSON.stringify(body) };
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Does it still run?");
  }
}

/** The message of an error in OpenAI's form; the status if what came is something else (a proxy's page, say). */
async function worded(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

let asking = null; // one dialog for all requests that wait for the key

/** Resolves when a key was entered; rejects if the dialog is left. */
function askForKey(message) {
  asking ??= keyFromDialog(message).finally(() => (asking = null));
  return asking;
}

function keyFromDialog(message) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  const wasWrong = sessionStorage.getItem(KEY) !== null;
  complain(byId("key-error"), wasWrong ? message : "");
  sessionStorage.removeItem(KEY);
  field.value = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, field.value.trim());
      dialog.onclose = null;
      dialog.close();
      resolve();
    };
    byId("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => reject(new Error(message));
  });
}
