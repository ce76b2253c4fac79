// Small builders of tables. Text is always set as text, so that no title is read as markup.

export const byId = (id) => document.getElementById(id);

/** A number for people; a dash for none. */
export const shown = (value, digits = 3) => (value === undefined || value === null ? "–" : Number(value).toFixed(digits));

/** Fill a table. columns: [title, cell of a row, "number" or ""] of each column; a cell is text or an element. */
export function fill(table, columns, rows) {
  const head = document.createElement("tr");
  for (const [title, , kind] of columns) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = title;
    if (kind) cell.className = kind;
    head.append(cell);
  }
  table.querySelector("thead").replaceChildren(head);
  table.querySelector("tbody").replaceChildren(
    ...rows.map((row, place) => {
      const line = document.createElement("tr");
      for (const [, cellOf, kind] of columns) {
        const cell = document.createElement("td");
        cell.append(cellOf(row, place));
        if (kind) cell.className = kind;
        line.append(cell);
      }
      return line;
    }),
  );
}

/** A table of its own with a caption. */
export function tableOf(caption, columns, rows) {
  const table = document.createElement("table");
  table.append(document.createElement("caption"), document.createElement("thead"), document.createElement("tbody"));
  table.querySelector("caption").textContent = caption;
  fill(table, columns, rows);
  return table;
}

/** A paragraph. */
export function paragraph(text) {
  const made = document.createElement("p");
  made.textContent = text;
  return made;
}
