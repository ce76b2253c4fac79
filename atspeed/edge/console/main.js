// The console: a request, its list and its search. The token stays in the page's field and is sent with calls alone.

import { showAnswers } from "./absent.js";
import { call } from "./api.js";
import { byId } from "./elements.js";
import { showLists } from "./lists.js";
import { showTime } from "./waterfall.js";
import { showTree } from "./tree.js";

const EXPLAIN = "/v1/recommendations:explain";
const LIST = "/v1/recommendations";
let asked = null; // the request on the page, for the answers to why not

const value = (id) => byId(id).value.trim();
const ids = (id) => value(id).split(",").map((item) => item.trim()).filter(Boolean);
const pair = (text) => [text.split("=", 1)[0].trim(), text.slice(text.indexOf("=") + 1).trim()];
const access = (track) => ({ token: value("token"), track });

function request() {
  const user = value("user");
  const history = ids("history");
  if (Boolean(user) === Boolean(history.length)) throw new Error("Give either a stored user or a history.");
  if (!ids("user_fields").every((text) => text.includes("="))) throw new Error("Give fields of the user as NAME=VALUE.");
  return {
    ...(user ? { user_id: user } : { history: { item_ids: history } }),
    k: Number(value("k")),
    beam_width: Number(value("beam_width")),
    mode: value("mode"),
    exclude_seen: byId("exclude_seen").checked,
    tenant: value("tenant"),
    user_fields: Object.fromEntries(ids("user_fields").map(pair)),
  };
}

/** The list beside the first one, with its caption. */
async function beside(body) {
  const compared = value("compared");
  const alone = compared === "target";
  const caption = alone ? "The target alone" : `Release track ${compared}`;
  const other = await call(LIST, alone ? { ...body, mode: "MODE_TARGET_ONLY" } : body, access(alone ? value("track") : compared));
  return [other, caption];
}

/** Run a task of a form: its button rests, and its error is said. */
async function during(form, text, task) {
  const button = form.querySelector("button");
  button.disabled = true;
  byId("error").textContent = "";
  byId("status").textContent = text;
  try {
    await task();
    byId("status").textContent = "Done.";
  } catch (error) {
    byId("status").textContent = "";
    byId("error").textContent = error.message;
  } finally {
    button.disabled = false;
  }
}

byId("request").addEventListener("submit", (event) => {
  event.preventDefault();
  during(event.currentTarget, "Searching.", async () => {
    const body = request();
    const found = await call(EXPLAIN, { request: body }, access(value("track")));
    asked = body;
    byId("results").hidden = false;
    showLists(found, null, "");
    showTree(found);
    showTime(found);
    byId("answers").replaceChildren();
    byId("results").focus();
    showLists(found, ...(await beside(body)));
  });
});

byId("absent").addEventListener("submit", (event) => {
  event.preventDefault();
  during(event.currentTarget, "Asking.", async () => {
    showAnswers(await call(EXPLAIN, { request: asked, item_ids: ids("items") }, access(value("track"))));
  });
});

/** Say which service this is. A service that needs a token is asked again when one is given. */
async function introduce() {
  try {
    const info = await call("/v1/info", null, access(""));
    byId("service").textContent =
      `${info.bundle_name}: ${info.catalogue_items} items, ${info.levels} levels, bundle ${info.versions.bundle}, AtSpeed Serving ${info.service_version}.`;
  } catch (error) {
    byId("service").textContent = error.message;
  }
}
byId("token").addEventListener("change", introduce);
introduce();
