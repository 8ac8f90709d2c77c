// The page: which view the address asks for, the header, and the keyboard.
//
//   #/                          curves, and what to look at first
//   #/run/0/update/10           rows of an update
//   #/run/0/update/10/row/3     tokens of a row
//   #/run/0/prompt/5            responses to one prompt over the run
"use strict";

(() => {
  const { element, number, visible } = textgym;
  const main = document.getElementById("main");
  const state = { run: 0, update: null, row: null, sort: "index", direction: 1, search: "", filter: "all", limited: "score", side: "least", limit: "", grouped: false, quantity: "kl" };
  let index = null;
  let shown = 0; // number of the latest view, so that a slow load does not replace it

  const updatesOf = (run) => index.runs[run].records.map((record) => record.update);
  const go = (address) => { location.hash = address; };
  const address = (run, update, row) => `#/run/${run}/update/${update}${row === undefined ? "" : `/row/${row}`}`;

  function overview() {
    const { warnings } = index.runs[state.run];
    return [
      ...warnings.map((warning) => element("p", { class: "warning", role: "alert" }, visible(warning))),
      textgym.lookFirst(index.runs[state.run], state.run),
      textgym.curves(index.runs),
      settings(),
    ];
  }

  // Settings of all runs; those that differ are marked.
  function settings() {
    const names = [...new Set(index.runs.flatMap((run) => Object.keys(run.config)))].sort();
    if (!names.length) return null;
    const rows = names.map((name) => {
      const values = index.runs.map((run) => run.config[name] ?? "\u2013");
      const differs = new Set(values).size > 1;
      return element("tr", { class: differs ? "differs" : null }, element("th", { scope: "row" }, visible(name)), values.map((value) => element("td", {}, visible(value))));
    });
    const head = element("tr", {}, element("td", {}), index.runs.map((run) => element("th", { scope: "col" }, visible(run.name))));
    return element("details", {}, element("summary", {}, "Settings"),
      element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, rows))));
  }

  const option = (record, selected) => element("option", { value: record.update, selected },
    `${record.update}: score ${number(record.score)}, KL ${number(record.kl)}`);

  function updateChoice(run, update) {
    const updates = updatesOf(run);
    const place = updates.indexOf(update);
    const step = (by, label, key) => element("a", { class: "button", "aria-label": `${label} update`, title: `${label} (${key})`,
      "data-step": by, href: updates[place + by] === undefined ? null : address(run, updates[place + by]) }, by < 0 ? "\u2039" : "\u203a");
    const choice = element("select", { id: "update", "aria-label": "Update", onchange: () => go(address(run, Number(choice.value))) },
      index.runs[run].records.map((record) => option(record, record.update === update)));
    return element("div", { class: "tools" }, element("label", {}, "Update ", choice), step(-1, "Previous", "["), step(1, "Next", "]"));
  }

  async function updateView(run, update) {
    const record = await textgym.load(run, update);
    return [
      updateChoice(run, update),
      element("h2", {}, `Update ${update}`),
      element("p", {}, element("small", {}, `${visible(record.agent)}, ${record.episodes} episodes, KL coefficient ${number(record.kl_coef)}`)),
      ...textgym.rows(record, state, (row) => address(run, update, row.index)),
    ];
  }

  async function rowView(run, update, index_) {
    const record = await textgym.load(run, update);
    const row = record.rows[index_];
    if (!row) throw new Error(`Update ${update} has no row ${index_ + 1}.`);
    const history = index.runs[run].histories.findIndex(({ prompt }) => prompt === row.promptKey);
    const order = textgym.rowOrder(record, state);
    const place = order.indexOf(index_);
    const step = (by, label, key) => element("a", { class: "button", "aria-label": `${label} row`, title: `${label} (${key})`,
      href: order[place + by] === undefined || place < 0 ? null : address(run, update, order[place + by]) }, by < 0 ? "\u2039" : "\u203a");
    const facts = [["score", row.score === null ? "unscored, not trained on" : number(row.score)], ["KL", number(row.kl)],
      ["tokens", row.length], ["end", row.stopped ? "stop" : "length limit"],
      ...textgym.rewardsOf(record).map((name) => [visible(name), number(row[name])])];
    const [view, draw] = textgym.tokens(record, row, state);
    return [[
      element("div", { class: "tools" },
        element("a", { class: "button", href: address(run, update) }, `All rows of update ${update}`), step(-1, "Previous", "k"), step(1, "Next", "j"),
        history < 0 ? null : element("a", { class: "button", href: `#/run/${run}/prompt/${history}` }, "This prompt over the run")),
      element("h2", {}, `Update ${update}, row ${index_ + 1}`),
      element("dl", { class: "facts" }, facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value))))),
      element("p", { class: "prompt response" }, visible(row.promptText)),
      view,
    ], draw];
  }

  function promptView(run, place) {
    const history = index.runs[run].histories[place];
    if (!history) throw new Error("The run has no such prompt.");
    const updates = [...new Set(history.places.map(([update]) => update))];
    const prompt = element("p", { class: "prompt response" });
    const holder = element("div", { "aria-live": "polite" });
    const fill = async () => {
      for (const update of updates) { // one at a time: records are large, and few stay in memory
        const record = await textgym.load(run, update);
        if (!holder.isConnected) return;
        const own = history.places.filter(([other]) => other === update).map(([, row]) => record.rows[row]);
        prompt.textContent = visible(own[0].promptText);
        const cards = own.map((row) =>
          textgym.rowCard(row, address(run, update, row.index), `update ${update}, row ${row.index + 1}`));
        holder.append(element("ul", { class: "cards" }, cards));
      }
    };
    return [[element("h2", {}, "One prompt over the run"), prompt, holder], fill];
  }

  function parse() {
    const parts = location.hash.replace(/^#\/?/, "").split("/");
    const at = (name) => (parts.includes(name) ? Number(parts[parts.indexOf(name) + 1]) : null);
    return { run: at("run") ?? state.run, update: at("update"), row: at("row"), prompt: at("prompt") };
  }

  async function show() {
    const turn = ++shown;
    const wanted = parse();
    try {
      if (!index.runs[wanted.run]) throw new Error("There is no such run.");
      Object.assign(state, { run: wanted.run, update: wanted.update, row: wanted.row });
      let content, draw = null;
      if (wanted.prompt !== null) [content, draw] = promptView(wanted.run, wanted.prompt);
      else if (wanted.update === null) content = overview();
      else if (wanted.row === null) content = await updateView(wanted.run, wanted.update);
      else [content, draw] = await rowView(wanted.run, wanted.update, wanted.row);
      if (turn !== shown) return;
      main.replaceChildren(...content.filter((part) => part !== null));
      textgym.forgetPlots();
      header();
      window.scrollTo(0, 0);
      await draw?.();
    } catch (error) {
      if (turn === shown) main.replaceChildren(element("p", { class: "warning", role: "alert" }, error.message));
      header();
    }
  }

  function header() {
    const updates = updatesOf(state.run);
    const last = updates[updates.length - 1];
    const tab = (label, href, current) => element("a", { href, "aria-current": current ? "page" : null }, label);
    document.getElementById("tabs").replaceChildren(
      tab("Overview", "#/", state.update === null),
      ...(updates.length ? [tab("Responses", address(state.run, state.update ?? last), state.update !== null)] : []));
    const choice = document.getElementById("run");
    choice.replaceChildren(...index.runs.map((run, i) => element("option", { value: i, selected: i === state.run }, visible(run.name))));
    document.getElementById("run-choice").hidden = index.runs.length < 2;
  }

  // Addresses have the place of a prompt, so prompts that were known keep theirs.
  function inPlace(before, now) {
    const known = new Map(now.map((history) => [history.prompt, history]));
    const kept = before.map((history) => known.get(history.prompt) ?? history);
    return [...kept, ...now.filter(({ prompt }) => !before.some((history) => history.prompt === prompt))];
  }

  // A newer index of the same runs. What is being looked at stays where it is: curves get longer, and choices get more.
  function renew(newest) {
    newest.runs.forEach((run, i) => { run.histories = inPlace(index.runs[i].histories, run.histories); });
    index = newest;
    textgym.renewCurves(index.runs);
    const choice = document.getElementById("update");
    if (choice) {
      const there = new Set([...choice.options].map((known) => Number(known.value)));
      choice.append(...index.runs[state.run].records.filter(({ update }) => !there.has(update)).map((record) => option(record, false)));
      const next = updatesOf(state.run)[updatesOf(state.run).indexOf(state.update) + 1];
      if (next !== undefined) document.querySelector("[data-step='1']")?.setAttribute("href", address(state.run, next));
    }
    if (!document.activeElement.closest("header")) header();
    status();
  }

  function status() {
    const lengths = index.runs.map((run) => run.metrics.x.length);
    const live = document.getElementById("live");
    live.hidden = !index.live;
    live.textContent = `live, ${lengths.join(" and ")} updates`;
  }

  function chooseRun(run) {
    state.run = run;
    const updates = updatesOf(run);
    const here = state.update === null || !updates.length ? "#/" : address(run, updates.includes(state.update) ? state.update : updates[updates.length - 1]);
    if (location.hash === here) show();
    else go(here);
  }

  function step(by) {
    const updates = updatesOf(state.run);
    const next = updates[updates.indexOf(state.update) + by];
    if (state.update !== null && next !== undefined) go(address(state.run, next));
  }

  async function stepRow(by) {
    if (state.update === null) return;
    const order = textgym.rowOrder(await textgym.load(state.run, state.update), state);
    const next = state.row === null ? order[0] : order[order.indexOf(state.row) + by];
    if (next !== undefined) go(address(state.run, state.update, next));
  }

  const KEYS = {
    "o": ["overview", () => go("#/")],
    "r": ["responses", () => document.querySelector("#tabs a:nth-child(2)")?.click()],
    "[": ["previous update", () => step(-1)],
    "]": ["next update", () => step(1)],
    "k": ["previous row", () => stepRow(-1)],
    "j": ["next row", () => stepRow(1)],
    "/": ["search", () => (document.getElementById("search") ?? document.getElementById("metric-filter"))?.focus()],
    "c": ["next colour", () => {
      const choice = document.getElementById("quantity");
      if (!choice) return;
      choice.selectedIndex = (choice.selectedIndex + 1) % choice.options.length;
      choice.dispatchEvent(new Event("change"));
    }],
    "?": ["this list", () => document.getElementById("help").click()],
  };

  function help() {
    const dialog = element("dialog", { "aria-label": "Keyboard shortcuts" },
      element("dl", { class: "facts" }, Object.entries(KEYS).map(([key, [label]]) => element("div", {}, element("dt", {}, element("kbd", {}, key)), element("dd", {}, label)))),
      element("p", {}, "Arrow keys go from token to token."),
      element("form", { method: "dialog" }, element("button", { autofocus: true }, "Close")));
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  }

  function theme(choice) {
    document.documentElement.dataset.theme = choice;
    textgym.redraw();
    try {
      localStorage.setItem("textgym-theme", choice);
    } catch {
      // A browser that keeps nothing for files.
    }
  }

  function savedTheme() {
    try {
      return localStorage.getItem("textgym-theme");
    } catch {
      return null;
    }
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = savedTheme() ?? (dark.matches ? "dark" : "light");
  document.getElementById("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  document.getElementById("help").addEventListener("click", help);
  document.getElementById("run").addEventListener("change", (event) => chooseRun(Number(event.target.value)));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
    const found = KEYS[event.key];
    if (!found) return;
    event.preventDefault();
    found[1]();
  });
  window.addEventListener("resize", () => textgym.redraw());
  window.addEventListener("hashchange", show);
  window.addEventListener("load", async () => {
    try {
      index = await textgym.ready;
    } catch (error) {
      main.replaceChildren(element("p", { class: "warning", role: "alert" }, error.message));
      return;
    }
    show();
    status();
    textgym.follow(index, renew);
  });
})();
