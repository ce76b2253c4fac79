// The list beside another one: the target's own, or that of another release track.

import { byId, fill, shown } from "./elements.js";

const word = (name, prefix) => name.replace(prefix, "").toLowerCase().replaceAll("_", "-");

/** Show both lists. other: null if it was not to be had. */
export function showLists(found, other, caption) {
  const { response, titles } = found;
  const title = (id) => titles[id] ?? id;
  const ranks = new Map((other?.items ?? []).map((item) => [item.item_id, item.rank]));
  fill(
    byId("list"),
    [
      ["#", (item) => String(item.rank), "number"],
      ["item", (item) => title(item.item_id)],
      ["id", (item) => item.item_id],
      ["score", (item) => shown(item.score), "number"],
      ["origin", (item) => word(item.origin, "ORIGIN_")],
      ["# beside", (item) => String(ranks.get(item.item_id) ?? "–"), "number"],
    ],
    response.items,
  );
  byId("other").hidden = !other;
  byId("other").querySelector("caption").textContent = caption;
  fill(
    byId("other"),
    [
      ["#", (item) => String(item.rank), "number"],
      ["item", (item) => title(item.item_id)],
      ["id", (item) => item.item_id],
      ["score", (item) => shown(item.score), "number"],
    ],
    other?.items ?? [],
  );
  byId("summary").textContent = summary(response, other);
  byId("prompt").replaceChildren(
    ...found.history_item_ids.map((id) => {
      const item = document.createElement("li");
      item.textContent = title(id) === id ? id : `${title(id)} (${id})`;
      return item;
    }),
  );
}

function summary(response, other) {
  const took = response.statistics;
  const facts = [
    `${word(response.mode, "MODE_")}, ${response.exactness.exact ? "exact" : "not exact"}`,
    `${took.target_passes} target passes, ${took.accepted_levels} levels accepted`,
    `${shown(took.stage_times.total_ms, 1)} ms`,
    `bundle ${response.versions.bundle}`,
    ...response.degraded_descriptions.map((text) => `degraded: ${text}`),
  ];
  if (other) {
    const ids = (list) => list.items.map((item) => item.item_id).join("\n");
    facts.push(ids(other) === ids(response) ? "both lists are equal" : "the lists differ");
  }
  return `${facts.join("; ")}.`;
}
