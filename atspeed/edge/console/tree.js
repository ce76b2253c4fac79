// The token tree by level, drawn with d3, and the same as a table. Shape and colour both tell the origin (Okabe and Ito's colours).

import { byId, fill, shown } from "./elements.js";

const DRAWN = 400;
const COLUMN = 190; // pixels from level to level
const KINDS = {
  NODE_ORIGIN_ROOT: { text: "root", colour: "#4a4f58", symbol: "symbolStar" },
  NODE_ORIGIN_DRAFTED: { text: "drafted", colour: "#0072b2", symbol: "symbolCircle" },
  NODE_ORIGIN_PREFETCHED: { text: "prefetched", colour: "#009e73", symbol: "symbolSquare" },
  NODE_ORIGIN_RECOVERED: { text: "recovered after a miss", colour: "#d55e00", symbol: "symbolTriangle" },
  NODE_ORIGIN_FORCED: { text: "forced", colour: "#cc79a7", symbol: "symbolDiamond" },
  NODE_ORIGIN_UNEVALUATED: { text: "not evaluated", colour: "#6b7079", symbol: "symbolCross" },
};

/** Show the nodes of a search. titles: by item id. */
export function showTree(found) {
  const nodes = found.nodes.map((node, index) => ({ ...node, index, kind: KINDS[node.origin] ?? KINDS.NODE_ORIGIN_UNEVALUATED }));
  const drawn = mostProbable(nodes);
  const left = nodes.length + found.nodes_left_out - drawn.length;
  const used = nodes.filter((node) => node.used).length;
  const note = left ? ` ${left} less probable ones are not drawn; the table has up to 4096 nodes.` : "";
  byId("tree-note").textContent = `${nodes.length} nodes, ${used} of them beams.${note}`;
  showLegend(nodes);
  draw(drawn, found.titles);
  showTable(nodes, found.titles);
}

/** At most so many nodes: beams first, then by score. A parent always comes before its children. */
function mostProbable(nodes) {
  const score = (node) => node.score ?? -Infinity;
  const order = [...nodes].sort((a, b) => b.used - a.used || score(b) - score(a) || a.index - b.index);
  return order.slice(0, DRAWN).sort((a, b) => a.index - b.index);
}

function showLegend(nodes) {
  const entries = [];
  for (const [origin, kind] of Object.entries(KINDS)) {
    const of = nodes.filter((node) => node.origin === origin);
    const used = of.filter((node) => node.used).length;
    if (used) entries.push([kind, true, `${kind.text}${kind.text === "root" ? "" : `, used: ${used}`}`]);
    if (of.length > used) entries.push([kind, false, `${kind.text}, in vain: ${of.length - used}`]);
  }
  const items = d3.select(byId("legend")).selectAll("li").data(entries).join("li");
  items.text("");
  const icon = items.append("svg").attr("width", 16).attr("height", 16).attr("aria-hidden", "true");
  mark(icon.append("g").attr("transform", "translate(8,8)"), ([kind, full]) => ({ kind, used: full }));
  items.append("span").text(([, , text]) => text);
}

/** A symbol: full for a beam, hollow for a node that no search used. */
function mark(selection, of) {
  selection
    .append("path")
    .attr("d", (data) => d3.symbol(d3[of(data).kind.symbol], 70)())
    .attr("fill", (data) => (of(data).used ? of(data).kind.colour : "transparent"))
    .attr("stroke", (data) => of(data).kind.colour)
    .attr("stroke-width", 1.5);
}

function draw(nodes, titles) {
  byId("tree-frame").replaceChildren();
  byId("node").textContent = "";
  if (!nodes.length) return;
  const root = d3.stratify().id((node) => node.index).parentId((node) => (node.parent < 0 ? null : node.parent))(nodes);
  root.sort((a, b) => (a.data.beam_rank || 1e9) - (b.data.beam_rank || 1e9) || a.data.index - b.data.index);
  d3.tree().nodeSize([22, COLUMN])(root);
  const [top, bottom] = d3.extent(root, (place) => place.x);
  const width = COLUMN * (root.height + 1) + 140;
  const svg = d3.select(byId("tree-frame")).append("svg").attr("class", "tree").attr("role", "tree");
  svg.attr("aria-label", "Token tree of the search").attr("aria-describedby", "tree-help");
  svg.attr("width", width).attr("height", bottom - top + 40);
  const plot = svg.append("g").attr("role", "none").attr("transform", `translate(20,${20 - top})`);
  plot
    .append("g")
    .attr("aria-hidden", "true")
    .selectAll("path")
    .data(root.links())
    .join("path")
    .attr("class", (link) => (link.target.data.used ? "link used" : "link"))
    .attr("d", d3.linkHorizontal().x((place) => place.y).y((place) => place.x));
  const items = plot
    .selectAll("g.item")
    .data(root.descendants())
    .join("g")
    .attr("class", "item")
    .attr("role", "treeitem")
    .attr("aria-level", (place) => place.depth + 1)
    .attr("aria-label", (place) => `${label(place.data, titles)}. ${words(place.data, titles)}`) // with the visible text, for voice control
    .attr("aria-selected", "false")
    .attr("tabindex", (place) => (place.depth ? -1 : 0))
    .attr("transform", (place) => `translate(${place.y},${place.x})`);
  items.append("circle").attr("class", "halo").attr("r", 10);
  mark(items, (place) => place.data);
  const leaf = (place) => place.data.item_ids.length > 0 || !place.children;
  items
    .append("text")
    .attr("x", (place) => (leaf(place) ? 12 : 2))
    .attr("dy", (place) => (leaf(place) ? "0.32em" : "-0.75em"))
    .text((place) => label(place.data, titles));
  items
    .on("click", (event) => event.currentTarget.focus())
    .on("focus", (event, place) => {
      items.attr("tabindex", -1).attr("aria-selected", "false");
      d3.select(event.currentTarget).attr("tabindex", 0).attr("aria-selected", "true");
      byId("node").textContent = words(place.data, titles);
    })
    .on("keydown", (event, place) => {
      const next = neighbour(root, place, event.key);
      if (!next) return;
      event.preventDefault();
      items.filter((other) => other === next).node().focus();
    });
}

function neighbour(root, place, key) {
  const level = root.descendants().filter((other) => other.depth === place.depth);
  const at = level.indexOf(place);
  return {
    ArrowLeft: place.parent,
    ArrowRight: place.children?.[0],
    ArrowUp: level[at - 1],
    ArrowDown: level[at + 1],
    Home: root,
  }[key];
}

/** Code, p and q in short, and the items of a leaf. */
function label(node, titles) {
  if (!node.level) return "root";
  const items = node.item_ids.map((id) => titles[id] ?? id).join(", ");
  const facts = [code(node)];
  if (node.log_p !== undefined) facts.push(`p ${Math.exp(node.log_p).toPrecision(2)}`);
  if (node.log_q !== undefined) facts.push(`q ${Math.exp(node.log_q).toPrecision(2)}`);
  if (items) facts.push(items.length > 44 ? `${items.slice(0, 43)}…` : items);
  return facts.join("  ");
}

const code = (node) => (node.code < 0 ? "end" : String(node.code));

function words(node, titles) {
  if (!node.level) return `Root${node.pass_number ? `, pass ${node.pass_number}` : ""}`;
  const facts = [`Level ${node.level}, code ${code(node)}`, `${node.kind.text}${node.used ? "" : ", in vain"}`];
  if (node.pass_number) facts.push(`pass ${node.pass_number}`);
  if (node.beam_rank) facts.push(`rank ${node.beam_rank} of the beams`);
  facts.push(`log p ${shown(node.log_p)}`);
  if (node.log_q !== undefined) facts.push(`log q ${shown(node.log_q)}`);
  facts.push(`score ${shown(node.score)}`);
  if (node.item_ids.length) facts.push(node.item_ids.map((id) => titles[id] ?? id).join(", "));
  return facts.join("; ");
}

function showTable(nodes, titles) {
  const path = (node) => (node.parent < 0 ? [] : [...path(nodes[node.parent]), code(node)]);
  fill(
    byId("nodes"),
    [
      ["level", (node) => String(node.level), "number"],
      ["path", (node) => path(node).join("-") || "root"],
      ["origin", (node) => node.kind.text],
      ["beam", (node) => (node.used ? `rank ${node.beam_rank}` : "no")],
      ["pass", (node) => String(node.pass_number || "–"), "number"],
      ["log p", (node) => shown(node.log_p), "number"],
      ["log q", (node) => shown(node.log_q), "number"],
      ["score", (node) => shown(node.score), "number"],
      ["items", (node) => node.item_ids.map((id) => titles[id] ?? id).join(", ")],
    ],
    nodes,
  );
}
