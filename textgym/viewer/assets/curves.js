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

  function draw(holder, name, runs) {
    const having = runs.map((run, i) => [run, i]).filter(([run]) => run.metrics.columns[name]);
    const data = uPlot.join(having.map(([run]) => [run.metrics.x, run.metrics.columns[name]]));
    const budget = name === "objective/kl" ? having.map(([run]) => Number(run.config.kl_target)).find(Number.isFinite) : undefined;
    const series = having.map(([run, i]) => ({
      label: runs.length > 1 ? visible(run.name) : "value",
      stroke: textgym.runColour(i),
      width: 1.5,
      spanGaps: true,
      points: { show: run.metrics.columns[name].filter((value) => value !== null).length < SPARSE },
      value: (_, value) => number(value),
    }));
    if (budget) {
      data.push(data[0].map(() => budget));
      series.push({ label: "budget", stroke: styleOf("--mark"), dash: [6, 4], points: { show: false } });
    }
    const plot = new uPlot(
      {
        width: holder.clientWidth,
        height: 170,
        cursor: { sync: { key: "curves" } },
        scales: { x: { time: false } },
        axes: [textgym.axis(), textgym.axis({ size: 56, values: (_, ticks) => ticks.map(number) })],
        series: [{ label: having[0][0].metrics.clock }, ...series],
        hooks: { draw: [marks(having.flatMap(([run]) => checkpoints(run)))] },
      },
      data,
      holder,
    );
    drawn.push([plot, holder]);
  }

  // Curves are drawn when they are scrolled to, because a run has dozens.
  function curve(name, runs, observer) {
    const holder = element("div", { class: "plot" });
    const last = runs.map((run) => number(run.metrics.columns[name]?.findLast((value) => value !== null)));
    const figure = element(
      "figure",
      { "data-metric": name, role: "group", "aria-label": `Curve of ${visible(name)}, last value ${last.join(" and ")}` },
      element("figcaption", {}, visible(name)),
      holder,
    );
    holder.draw = () => draw(holder, name, runs);
    observer.observe(holder);
    return figure;
  }

  function names(runs) {
    const all = new Set(runs.flatMap((run) => Object.keys(run.metrics.columns)));
    return [...FIRST.filter((name) => all.has(name)), ...[...all].filter((name) => !FIRST.includes(name)).sort()];
  }

  textgym.curves = (runs) => {
    const observer = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        target.draw();
      }
    }, { rootMargin: "200px" });
    const grid = element("div", { class: "grid" }, names(runs).map((name) => curve(name, runs, observer)));
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
      names(runs).length ? grid : element("p", {}, "No metrics yet."),
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
