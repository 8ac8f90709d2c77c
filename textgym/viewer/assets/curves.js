// The overview: curves of all metrics, several runs over each other, and links to what is worth a look first.
"use strict";

(() => {
  const { element, number, visible } = textgym;
  const FIRST = [
    "objective/scores", "eval/score", "objective/kl", "objective/rlhf_reward", "val/response_tokens", "policy/entropy_avg",
    "val/explained_variance", "val/explained_variance_within_prompts", "policy/approxkl_avg",
    "policy/clipfrac_avg", "objective/kl_coef", "loss/value_avg",
  ];
  const SPARSE = 30; // values of a curve that are drawn as points, too
  let drawn = []; // plots on the page
  let shown = []; // runs whose curves are shown
  let observer = null;

  const styleOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  textgym.axis = (more = {}) => ({
    stroke: () => styleOf("--muted"),
    grid: { stroke: () => styleOf("--line"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
    ...more,
  });

  // Vertical marks at checkpoints.
  function marks(places) {
    return (plot) => {
      const { ctx, bbox } = plot;
      ctx.save();
      ctx.strokeStyle = styleOf("--mark");
      ctx.setLineDash([2, 4]);
      for (const place of places) {
        const x = plot.valToPos(place, "x", true);
        if (x < bbox.left || x > bbox.left + bbox.width) continue;
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
      }
      ctx.restore();
    };
  }

  // The clock reading of each checkpoint of a run.
  function checkpoints(run) {
    const episodes = run.metrics.x[0] ?? 1; // of an update, after the first one
    return run.checkpoints.map((update) => update * episodes);
  }

  // The nats that a run's KL is steered to: a target, or the upper one of two bounds. Settings are texts.
  function budgetOf({ config }) {
    const bounds = /^\[.*,\s*([^,\]]+)\]$/.exec(config.kl_bounds ?? "");
    return Number(bounds ? bounds[1] : config.kl_target);
  }

  // Runs that have a metric with their places, the columns of its plot, and the KL budget.
  function columns(name) {
    const having = shown.map((run, i) => [run, i]).filter(([run]) => run.metrics.columns[name]);
    const data = uPlot.join(having.map(([run]) => [run.metrics.x, run.metrics.columns[name]]));
    const budget = name === "objective/kl" ? having.map(([run]) => budgetOf(run)).find(Number.isFinite) : undefined;
    if (budget) data.push(data[0].map(() => budget));
    return { having, data, budget };
  }

  function draw(holder, name) {
    const { having, data, budget } = columns(name);
    const series = having.map(([run, i]) => ({
      label: shown.length > 1 ? visible(run.name) : "value",
      stroke: textgym.runColour(i),
      width: 1.5,
      spanGaps: true,
      points: { show: run.metrics.columns[name].filter((value) => value !== null).length < SPARSE },
      value: (_, value) => number(value),
    }));
    if (budget) series.push({ label: "budget", stroke: styleOf("--mark"), dash: [6, 4], points: { show: false } });
    const plot = new uPlot(
      {
        width: holder.clientWidth,
        height: 170,
        cursor: { sync: { key: "curves" } },
        scales: { x: { time: false } },
        axes: [textgym.axis(), textgym.axis({ size: 56, values: (_, ticks) => ticks.map(number) })],
        series: [{ label: having[0][0].metrics.clock }, ...series],
        hooks: { draw: [(own) => marks(shown.filter((run) => run.metrics.columns[name]).flatMap(checkpoints))(own)] },
      },
      data,
      holder,
    );
    drawn.push([plot, holder]);
  }

  // Give a plot its new points. One that is zoomed stays where it is.
  function renew(figure) {
    const name = figure.dataset.metric;
    figure.setAttribute("aria-label", labelOf(name));
    const plot = drawn.find(([, holder]) => holder === figure.lastChild)?.[0];
    if (!plot) return; // it is drawn when it is scrolled to
    const { data } = columns(name);
    if (data.length !== plot.data.length) { // another run reports it now
      plot.destroy();
      drawn = drawn.filter(([own]) => own !== plot);
      draw(figure.lastChild, name);
      return;
    }
    const { min, max } = plot.scales.x;
    const zoomed = min > plot.data[0][0] || max < plot.data[0][plot.data[0].length - 1];
    plot.setData(data, !zoomed);
    if (zoomed) plot.redraw();
  }

  // Show more of the same runs: points are added where the curves are, and curves of new metrics at the end.
  textgym.renewCurves = (runs) => {
    shown = runs;
    const grid = document.querySelector(".grid");
    if (!grid) return;
    const figures = [...grid.children];
    figures.forEach(renew);
    const there = new Set(figures.map((figure) => figure.dataset.metric));
    grid.append(...names(runs).filter((name) => !there.has(name)).map(curve));
    if (grid.children.length) grid.nextElementSibling?.remove(); // "No metrics yet."
    document.getElementById("metric-filter").dispatchEvent(new Event("input"));
  };

  function labelOf(name) {
    const last = shown.map((run) => number(run.metrics.columns[name]?.findLast((value) => value !== null)));
    return `Curve of ${visible(name)}, last value ${last.join(" and ")}`;
  }

  // Curves are drawn when they are scrolled to, because a run has dozens.
  function curve(name) {
    const holder = element("div", { class: "plot" });
    const figure = element(
      "figure",
      { "data-metric": name, role: "group", "aria-label": labelOf(name) },
      element("figcaption", {}, visible(name)),
      holder,
    );
    holder.draw = () => draw(holder, name);
    observer.observe(holder);
    return figure;
  }

  function names(runs) {
    const all = new Set(runs.flatMap((run) => Object.keys(run.metrics.columns)));
    return [...FIRST.filter((name) => all.has(name)), ...[...all].filter((name) => !FIRST.includes(name)).sort()];
  }

  textgym.curves = (runs) => {
    shown = runs;
    observer = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        target.draw();
      }
    }, { rootMargin: "200px" });
    const grid = element("div", { class: "grid" }, names(runs).map(curve));
    const filter = element("input", {
      type: "search", placeholder: "Filter metrics", "aria-label": "Filter metrics", id: "metric-filter",
      oninput: () => {
        for (const figure of grid.children) figure.hidden = !figure.dataset.metric.includes(filter.value.trim());
      },
    });
    const legend = runs.map((run, i) =>
      element("span", { class: "key" }, element("i", { style: `background:${textgym.runColour(i)}` }), visible(run.name)));
    return element(
      "section",
      { "aria-label": "Curves" },
      element("h2", {}, "Curves"),
      element("div", { class: "tools" }, filter, legend,
        element("small", {}, "Drag to zoom, double-click to reset. Dotted lines are checkpoints.")),
      grid,
      names(runs).length ? null : element("p", {}, "No metrics yet."),
    );
  };

  textgym.lookFirst = (run, number_) => {
    const lists = run.highlights.map(({ title, what, rows }) =>
      element(
        "section",
        { class: "card" },
        element("h3", {}, title),
        element("small", {}, what),
        element("ol", {}, rows.map(({ value, update, row, text }) =>
          element("li", {},
            element("a", { href: `#/run/${number_}/update/${update}/row/${row}` },
              element("b", {}, number(value)), ` update ${update}, row ${row + 1}: `, visible(text).slice(0, 90))))),
      ));
    return element(
      "section",
      { "aria-label": "What to look at first" },
      element("h2", {}, "Look at first"),
      lists.length ? element("div", { class: "cards" }, lists) : element("p", {}, "No tokens are recorded of this run."),
    );
  };

  textgym.redraw = () => {
    for (const [plot, holder] of drawn) plot.setSize({ width: holder.clientWidth, height: plot.height });
  };

  // Plots of earlier views listen to events until they are destroyed.
  textgym.forgetPlots = () => {
    drawn.filter(([, holder]) => !holder.isConnected).forEach(([plot]) => plot.destroy());
    drawn = drawn.filter(([, holder]) => holder.isConnected);
  };
  textgym.keep = (plot, holder) => drawn.push([plot, holder]);
})();
