// The table of an update's rows: sorted, filtered, searched, or with the responses to one prompt side by side.
"use strict";

(() => {
  const { element, number, visible } = textgym;

  // Rewards of each function, and the judge if there is one.
  textgym.rewardsOf = (record) =>
    Object.keys(record.rows[0] ?? {}).filter((name) => name.startsWith("reward/") || name === "judge");

  // Label, name, text of a row's cell, and kind.
  function columnsOf(record) {
    return [
      ["#", "index", (row) => String(row.index + 1)],
      ["prompt", "promptText", (row) => visible(row.promptText), "text"],
      ["response", "text", (row) => visible(row.text), "text"],
      ["score", "score", (row) => (row.score === null ? "unscored" : number(row.score))],
      ...textgym.rewardsOf(record).map((name) => [visible(name.replace(/^reward\//, "")), name, (row) => number(row[name])]),
      ["KL", "kl", (row) => number(row.kl)],
      ["tokens", "length", (row) => String(row.length)],
      ...(record.numbers.entropy ? [["entropy", "entropy", (row) => number(row.entropy)]] : []),
      ...(record.numbers.advantage ? [["advantage", "advantage", (row) => number(row.advantage)]] : []),
      ...(record.numbers.clipped ? [["clipped", "clippedShare", (row) => number(row.clippedShare)]] : []),
      ["end", "stopped", (row) => (row.stopped ? "stop" : "length limit")],
    ];
  }

  const FILTERS = {
    all: ["all rows", () => true],
    scored: ["scored", (row) => row.score !== null],
    unscored: ["unscored", (row) => row.score === null],
    stop: ["ended by stop", (row) => row.stopped],
    length: ["cut by the length limit", (row) => !row.stopped],
  };

  // Missing values come last in both directions.
  function compared(name, direction) {
    return (a, b) => {
      const [x, y] = [a[name], b[name]];
      if (x === null || y === null || x === undefined || y === undefined) return (x ?? null) === (y ?? null) ? 0 : (x ?? null) === null ? 1 : -1;
      return direction * (typeof x === "string" ? x.localeCompare(y) : x - y);
    };
  }

  const LIMITS = {
    least: ["at least", (value, limit) => value >= limit],
    most: ["at most", (value, limit) => value <= limit],
  };

  // Whether a row's number is within a limit: null is not, and a column that the record lacks is ignored.
  function withinLimit(row, { limited, side, limit }) {
    if (limit === "" || !(limited in row)) return true;
    return row[limited] !== null && LIMITS[side][1](row[limited], Number(limit));
  }

  function chosen(record, state) {
    const words = state.search.toLowerCase();
    return record.rows
      .filter(FILTERS[state.filter][1])
      .filter((row) => withinLimit(row, state))
      .filter((row) => !words || row.text.toLowerCase().includes(words) || row.promptText.toLowerCase().includes(words))
      .sort(compared(state.sort, state.direction));
  }

  function table(record, rows, state, link, update) {
    const columns = columnsOf(record);
    const head = columns.map(([label, name]) => {
      const sorted = state.sort === name ? (state.direction > 0 ? "ascending" : "descending") : "none";
      const sort = () => {
        state.direction = state.sort === name ? -state.direction : name === "index" || typeof record.rows[0]?.[name] === "string" ? 1 : -1;
        state.sort = name;
        update(name);
      };
      return element("th", { scope: "col", "aria-sort": sorted },
        element("button", { type: "button", onclick: sort, "data-sort": name }, label, sorted === "none" ? "" : state.direction > 0 ? " \u25b2" : " \u25bc"));
    });
    const body = rows.map((row) => {
      const cells = columns.map(([, name, text, kind]) =>
        element("td", { class: kind }, name === "index" || name === "text" ? element("a", { href: link(row), tabindex: name === "text" ? -1 : null }, text(row) || "(empty)") : text(row)));
      return element("tr", { "data-row": row.index }, cells);
    });
    return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Rows" },
      element("table", { class: "rows" }, element("thead", {}, element("tr", {}, head)), element("tbody", {}, body)));
  }

  textgym.rowCard = (row, href, label) =>
    element("li", { class: "card" },
      element("a", { href }, label), " ",
      element("b", {}, row.score === null ? "unscored" : number(row.score)),
      element("small", {}, ` KL ${number(row.kl)}, ${row.length} tokens${row.stopped ? "" : ", cut"}`),
      element("p", { class: "response" }, visible(row.text)));

  function groups(rows, link) {
    const byPrompt = Map.groupBy ? Map.groupBy(rows, (row) => row.prompt) : rows.reduce(
      (map, row) => map.set(row.prompt, [...(map.get(row.prompt) ?? []), row]), new Map());
    return element("div", {}, [...byPrompt.values()].map((group) =>
      element("section", { class: "group", "aria-label": "Responses to one prompt" },
        element("h3", { class: "response" }, visible(group[0].promptText)),
        element("ul", { class: "cards" }, group.map((row) => textgym.rowCard(row, link(row), `row ${row.index + 1}`))))));
  }

  textgym.rows = (record, state, link) => {
    const holder = element("div", {});
    const count = element("small", { role: "status" });
    const update = (sorted) => {
      const rows = chosen(record, state);
      count.textContent = `${rows.length} of ${record.rows.length} recorded rows; the update had ${record.num_rows}.`;
      holder.replaceChildren(state.grouped ? groups(rows, link) : table(record, rows, state, link, update));
      if (sorted) holder.querySelector(`[data-sort="${CSS.escape(sorted)}"]`)?.focus();
    };
    const search = element("input", { type: "search", id: "search", placeholder: "Search in texts", "aria-label": "Search in texts",
      value: state.search, oninput: () => { state.search = search.value; update(); } });
    const filter = element("select", { id: "filter", "aria-label": "Show", onchange: () => { state.filter = filter.value; update(); } },
      Object.entries(FILTERS).map(([name, [label]]) => element("option", { value: name, selected: name === state.filter }, label)));
    const grouped = element("input", { type: "checkbox", id: "grouped", checked: state.grouped,
      onchange: () => { state.grouped = grouped.checked; update(); } });
    const limited = element("select", { id: "limited", "aria-label": "Number", onchange: () => { state.limited = limited.value; update(); } },
      columnsOf(record).filter(([, name, , kind]) => kind !== "text" && name !== "index" && name !== "stopped").map(([label, name]) =>
        element("option", { value: name, selected: name === state.limited }, label)));
    const side = element("select", { id: "side", "aria-label": "At least or at most", onchange: () => { state.side = side.value; update(); } },
      Object.entries(LIMITS).map(([name, [label]]) => element("option", { value: name, selected: name === state.side }, label)));
    const limit = element("input", { type: "number", step: "any", id: "limit", placeholder: "any", "aria-label": "Limit", value: state.limit,
      oninput: () => { [state.limit, state.limited] = [limit.value, limited.value]; update(); } });
    update();
    return [element("div", { class: "tools" }, search, filter, element("span", { class: "limit" }, limited, " ", side, " ", limit),
      element("label", {}, grouped, " side by side"), count), holder];
  };

  // The rows in the order in which the table has them, for going from row to row.
  textgym.rowOrder = (record, state) => chosen(record, state).map((row) => row.index);
})();
