"use strict";
// Filters: a section shows the elements whose data fits every choice; `data-kind` holds several words.
for (const section of document.querySelectorAll(".filterable")) {
  const selects = [...section.querySelectorAll("select[data-filter]")];
  const show = () => {
    let shown = 0;
    for (const element of section.querySelectorAll("[data-task]")) {
      element.hidden = !selects.every(({ value, dataset }) => {
        const own = element.dataset[dataset.filter] || "";
        return !value || own === value || (dataset.filter === "kind" && own.split(" ").includes(value));
      });
      shown += !element.hidden;
    }
    const count = section.querySelector(".count");
    if (count) count.textContent = shown;
  };
  selects.forEach((select) => select.addEventListener("change", show));
  const kind = section.querySelector("select[data-filter=kind]");
  if (kind && kind.options.length > 1) kind.selectedIndex = 1;
  show();
}
// Tables: a click on a head sorts by its column, numbers largest first; what has no number stays below.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const numeric = head.classList.contains("number");
    const up = head.getAttribute("aria-sort") === (numeric ? "descending" : null);
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => {
      const cell = row.cells[column];
      if (!numeric) return cell.textContent;
      return cell.dataset.value === "" ? null : Number(cell.dataset.value);
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (up ? 1 : -1) * (numeric ? x - y : x.localeCompare(y));
    });
    table.tBodies[0].append(...rows);
  }));
}
