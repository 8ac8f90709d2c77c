// One response: its tokens, coloured by a quantity, the numbers of the token under the pointer, and plots along the text.
"use strict";

(() => {
  const { element, number, visible } = textgym;
  const CHUNK = 2000; // tokens that are added to the page at once

  // Label, and the centre of a scale that has one.
  const QUANTITIES = {
    kl: ["KL", 0], advantage: ["advantage", 0], log_prob: ["log-prob"], reference_log_prob: ["reference log-prob"],
    entropy: ["entropy"], value: ["value"], return: ["return"], reward: ["reward", 0], ratio: ["ratio new / old", 1],
    clipped: ["clipped"], mine: ["mask"],
  };

  // The index among the tokens that the policy generated, or null for those of the environment.
  function places(record, row) {
    let next = row.first;
    const found = [];
    for (let i = row.start; i < row.end; i++) {
      found.push(record.tokens.mine[i] === 1 ? next++ : null);
    }
    return found;
  }

  function valueOf(record, name, token, place) {
    if (name === "reward" || name === "mine") return record.tokens[name]?.[token] ?? null;
    return place === null ? null : record.numbers[name][place];
  }

  function available(record) {
    return Object.keys(QUANTITIES).filter((name) =>
      name === "reward" || name === "mine" ? record.tokens[name] : record.numbers[name]);
  }

  // A token as it is shown: line breaks are seen and broken at.
  function shown(piece) {
    return visible(piece).replace(/\n/g, "\u21b5\n").replace(/\t/g, "\u21e5");
  }

  function alternativesTable(record, model, place) {
    const { piece, percent } = record.alternatives[model];
    const rows = [];
    for (let i = place * record.each; i < (place + 1) * record.each; i++) {
      const share = percent[i] === 0 ? "<1%" : `${percent[i]}%`;
      rows.push(element("tr", {}, element("td", {}, element("code", {}, shown(record.pieces[piece[i]]))), element("td", {}, share)));
    }
    return element("table", { class: "alternatives" }, element("caption", {}, model), element("tbody", {}, rows));
  }

  function details(record, row, i, place) {
    const token = row.start + i;
    const rows = available(record).map((name) =>
      element("tr", {},
        element("th", { scope: "row" }, QUANTITIES[name][0]),
        element("td", {}, name === "clipped" || name === "mine"
          ? ["no", "yes"][valueOf(record, name, token, place)] ?? "\u2013"
          : number(valueOf(record, name, token, place)))));
    const head = element("p", {}, `token ${i + 1} `, element("code", {}, shown(record.pieces[record.tokens.piece[token]])),
      place === null ? " of the environment" : "");
    const tables = place === null ? [] : Object.keys(record.alternatives).map((model) => alternativesTable(record, model, place));
    return [head, element("div", { class: "numbers" }, element("table", {}, element("tbody", {}, rows)), element("div", { class: "numbers" }, tables))];
  }

  function legend(scale, label) {
    return [
      element("span", {}, number(scale.low)),
      element("i", { class: "gradient", style: `background:linear-gradient(to right, ${scale.gradient})`, role: "img",
        "aria-label": `${label} from ${number(scale.low)} to ${number(scale.high)}` }),
      element("span", {}, number(scale.high)),
    ];
  }

  // Value, return and advantage along the text; the token under the pointer is selected in the text.
  function strip(record, row, generated, select) {
    const names = ["value", "return", "advantage"].filter((name) => record.numbers[name]);
    const holder = element("div", { class: "strip", role: "img", "aria-label": `${names.join(", ")} along the text` });
    if (!names.length) return [null, null];
    const data = [generated.map((_, i) => i + 1), ...names.map((name) => generated.map((place) => place === null ? null : record.numbers[name][place]))];
    const draw = () => {
      const plot = new uPlot(
        {
          width: holder.clientWidth,
          height: 150,
          scales: { x: { time: false } },
          axes: [textgym.axis(), textgym.axis({ size: 50, values: (_, ticks) => ticks.map(number) })],
          series: [{ label: "token" }, ...names.map((name, i) => ({
            label: name, stroke: textgym.runColour(i), width: 1.5, dash: name === "return" ? [4, 3] : undefined,
            points: { show: generated.length < 2 }, value: (_, value) => number(value) }))],
          hooks: { setCursor: [(u) => { if (u.cursor.event && u.cursor.idx !== null) select(u.cursor.idx); }] },
        },
        data,
        holder,
      );
      textgym.keep(plot, holder);
      holder.plot = plot;
    };
    return [holder, draw];
  }

  textgym.tokens = (record, row, state) => {
    const generated = places(record, row);
    const names = available(record);
    const turns = generated.includes(null); // the environment spoke, too
    const aside = element("aside", { class: "details", "aria-live": "polite" }, element("p", {}, "Point at a token, or use the arrow keys."));
    const text = element("div", { class: "tokens", role: "group", "aria-label": "Tokens of the response" });
    const key = element("span", { class: "legend" });
    const spans = [];
    let selected = null;
    let scale = null;

    const paint = (i) => {
      const value = valueOf(record, state.quantity, row.start + i, generated[i]);
      const colour = generated[i] === null ? null : scale.colour(value);
      spans[i].style.background = colour ? colour.background : "";
      spans[i].style.color = colour ? colour.colour : "";
    };

    const select = (i) => {
      if (i === selected || !spans[i]) return;
      spans[selected ?? 0].classList.remove("selected");
      spans[selected ?? 0].tabIndex = -1;
      selected = i;
      spans[i].classList.add("selected");
      spans[i].tabIndex = 0;
      aside.replaceChildren(...details(record, row, i, generated[i]));
    };

    const add = () => {
      const end = Math.min(spans.length + CHUNK, generated.length);
      const added = document.createDocumentFragment();
      for (let i = spans.length; i < end; i++) {
        const span = element("span", { class: generated[i] === null ? "token other" : "token", tabindex: i === 0 ? 0 : -1 },
          shown(record.pieces[record.tokens.piece[row.start + i]]));
        span.dataset.token = i;
        spans.push(span);
        if (turns && (i === 0 || (generated[i] === null) !== (generated[i - 1] === null))) {
          added.append(element("span", { class: "role" }, generated[i] === null ? "environment" : "policy"));
        }
        added.append(span);
        paint(i);
      }
      text.append(added);
      more.hidden = end === generated.length;
      more.textContent = `Show ${Math.min(CHUNK, generated.length - end)} more of ${generated.length} tokens`;
    };
    const more = element("button", { type: "button", onclick: add });

    const recolour = () => {
      const centre = QUANTITIES[state.quantity][1];
      const column = record.tokens[state.quantity] ?? record.numbers[state.quantity];
      scale = textgym.scale(column, centre);
      key.replaceChildren(...legend(scale, QUANTITIES[state.quantity][0]));
      spans.forEach((_, i) => paint(i));
    };

    if (!names.includes(state.quantity)) state.quantity = names[0];
    const choice = element("select", { id: "quantity", "aria-label": "Colour tokens by",
      onchange: () => { state.quantity = choice.value; recolour(); } },
      names.map((name) => element("option", { value: name, selected: name === state.quantity }, QUANTITIES[name][0])));
    recolour();
    add();

    const [holder, draw] = strip(record, row, generated, select);
    const pointed = (event) => {
      const span = event.target.closest("[data-token]");
      if (!span) return;
      const i = Number(span.dataset.token);
      select(i);
      holder?.plot?.setCursor({ left: holder.plot.valToPos(i + 1, "x"), top: 10 });
    };
    text.addEventListener("pointerover", pointed);
    text.addEventListener("click", pointed);
    text.addEventListener("focusin", pointed);
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const target = Math.min(Math.max((selected ?? 0) + step, 0), generated.length - 1);
      if (target >= spans.length) add();
      spans[target].focus();
    });

    return [element("div", { class: "row-view" },
      element("div", {},
        element("div", { class: "tools" }, element("label", {}, "Colour by ", choice), key),
        text, more, holder),
      aside), draw];
  };
})();
