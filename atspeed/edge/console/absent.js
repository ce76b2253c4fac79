// Answers to why items are not in the list.

import { byId, paragraph, shown, tableOf } from "./elements.js";

/** Show the answers, one article for each item. */
export function showAnswers(found) {
  byId("answers").replaceChildren(...found.items.map((item) => answer(item, found)));
}

function answer(item, found) {
  const made = document.createElement("article");
  const head = document.createElement("h3");
  const title = found.titles[item.item_id];
  head.textContent = title ? `${title} (${item.item_id})` : item.item_id;
  made.append(head, paragraph(`${item.description[0].toUpperCase()}${item.description.slice(1)}.`));
  if (found.wider_beam_width && item.path.length) {
    const width = found.wider_beam_width;
    const rank = item.wider_rank ? `rank ${item.wider_rank}` : "no rank";
    made.append(paragraph(`It has ${rank} in the target's own list with beam width ${width}.`));
  }
  const last = found.response.items.at(-1);
  if (item.score !== undefined && last) {
    made.append(paragraph(`Its score is ${shown(item.score)}; that of the list's last item is ${shown(last.score)}.`));
  }
  if (item.path.length) made.append(steps(item));
  return made;
}

function steps(item) {
  const rank = (step) => (step.rank ? String(step.rank) : "not compared");
  return tableOf(
    "Its path, level by level",
    [
      ["level", (_, place) => String(place + 1), "number"],
      ["code", (step) => (step.code < 0 ? "end" : String(step.code)), "number"],
      ["log p", (step) => shown(step.log_p), "number"],
      ["score", (step) => shown(step.score), "number"],
      ["rank of the candidates", rank, "number"],
      ["beams kept", (step) => String(step.beam_width), "number"],
      ["", (_, place) => (place + 1 === item.lost_level ? "lost here" : "")],
    ],
    item.path,
  );
}
