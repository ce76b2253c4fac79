// The waterfall of a request's time: a table with a bar in each row.

import { byId, fill, shown } from "./elements.js";

const COLOURS = {
  STAGE_ADMISSION: "#6b7079",
  STAGE_HISTORY: "#009e73",
  STAGE_PLAN: "#0072b2",
  STAGE_PASS: "#d55e00",
  STAGE_SELECTION: "#cc79a7",
};

/** Show the stages. */
export function showTime(found) {
  const last = found.stages.at(-1);
  const total = last ? last.start_ms + last.duration_ms : 1;
  const place = d3.scaleLinear([0, total], [0, 100]);
  fill(
    byId("waterfall"),
    [
      ["stage", name],
      ["start", (span) => shown(span.start_ms, 1), "number"],
      ["duration", (span) => shown(span.duration_ms, 1), "number"],
      ["queue", (span) => (isPass(span) ? shown(span.queue_ms, 1) : ""), "number"],
      ["model", (span) => (isPass(span) ? shown(span.forward_ms, 1) : ""), "number"],
      ["nodes", (span) => String(span.nodes || ""), "number"],
      ["", (span) => bar(span, place)],
    ],
    found.stages,
  );
}

const isPass = (span) => span.stage === "STAGE_PASS";

function name(span) {
  const text = span.stage.replace("STAGE_", "").toLowerCase();
  return `${text}${isPass(span) ? ` ${span.pass_number}` : ""}${span.in_advance ? ", made in advance" : ""}`;
}

function bar(span, place) {
  const frame = d3.create("div").attr("class", "bar").attr("aria-hidden", "true");
  frame
    .append("span")
    .style("left", `${place(span.start_ms)}%`)
    .style("width", `${place(span.duration_ms)}%`)
    .style("background", COLOURS[span.stage] ?? "#6b7079");
  return frame.node();
}
