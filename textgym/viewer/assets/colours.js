// Colour scales that colour-blind readers can tell apart: viridis, and blue to orange around a centre.
"use strict";

(() => {
  const VIRIDIS = [
    [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
    [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37],
  ];
  const DIVERGING = [[8, 81, 156], [107, 174, 214], [247, 247, 247], [253, 174, 97], [191, 91, 0]];
  // Okabe and Ito's, for runs.
  const RUNS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

  function between(stops, share) {
    const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((value, i) => Math.round(value + (place - low) * (stops[low + 1][i] - value)));
  }

  function styled([red, green, blue]) {
    const light = 0.299 * red + 0.587 * green + 0.114 * blue > 140;
    return { background: `rgb(${red}, ${green}, ${blue})`, colour: light ? "#111" : "#fff" };
  }

  // Range of a scale: all but the outermost two per cent, so that one token does not bleach the others.
  function range(values, centre) {
    const known = values.filter((value) => value !== null && value !== undefined).sort((a, b) => a - b);
    if (!known.length) return [0, 1];
    const at = (share) => known[Math.round(share * (known.length - 1))];
    let [low, high] = [at(0.02), at(0.98)];
    if (low === high) [low, high] = [known[0], known[known.length - 1]];
    if (centre !== undefined) {
      const reach = Math.max(Math.abs(low - centre), Math.abs(high - centre)) || 1;
      return [centre - reach, centre + reach];
    }
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }

  // A function from numbers to colours, with its range and stops for a legend.
  textgym.scale = (values, centre) => {
    const [low, high] = range(values, centre);
    const stops = centre === undefined ? VIRIDIS : DIVERGING;
    const colour = (value) =>
      value === null || value === undefined ? null : styled(between(stops, (value - low) / (high - low)));
    return { low, high, colour, gradient: stops.map(([r, g, b]) => `rgb(${r}, ${g}, ${b})`).join(", ") };
  };

  textgym.runColour = (run) => RUNS[run % RUNS.length];
})();
