// What the page knows: the index, which is there from the start, and records, which are loaded when they are shown.
"use strict";

const textgym = {};

(() => {
  const BASE = 93; // of packed columns, see textgym/viewer/packing.py
  const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~";
  const VALUES = new Map([...DIGITS].map((digit, value) => [digit.charCodeAt(0), value]));
  const KEPT = 16; // records in memory

  const held = new Map(); // compressed records of a page that is a single file, by "run/update"
  const waiting = new Map(); // what takes the compressed record of a script that is being loaded
  const records = new Map();

  // Base 85, five digits for four bytes.
  function bytes(text) {
    const padding = (5 - (text.length % 5)) % 5;
    const length = (text.length + padding) / 5;
    const view = new DataView(new ArrayBuffer(4 * length));
    for (let group = 0; group < length; group++) {
      let value = 0;
      for (let i = 5 * group; i < 5 * group + 5; i++) {
        value = value * 85 + (i < text.length ? VALUES.get(text.charCodeAt(i)) : 84);
      }
      view.setUint32(4 * group, value);
    }
    return new Uint8Array(view.buffer, 0, 4 * length - padding);
  }

  async function decompressed(text) {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("This browser cannot decompress the data: use one of 2023 or later.");
    }
    const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function unpack(packed) {
    if (Array.isArray(packed)) return packed;
    const values = new Array(packed.length);
    for (let i = 0; i < packed.length; i++) {
      const code = packed.charCodeAt(i) - BASE - 1;
      values[i] = code < 0 ? null : code % 2 ? -(code + 1) / 2 : code / 2;
    }
    return values;
  }

  function unpackNumbers({ unit, values }) {
    return unpack(values).map((value) => (value === null ? null : Number((value * unit).toPrecision(6))));
  }

  function mapped(object, change) {
    return Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value, name)]));
  }

  function unpackAlternatives(packed, each) {
    const found = mapped(packed, (columns) => mapped(columns, unpack));
    if (found.policy && found.reference) {
      const { piece, percent } = found.reference;
      piece.forEach((code, i) => {
        const place = i - (i % each) + code;
        piece[i] = code < each ? found.policy.piece[place] : code - each;
        if (code < each) percent[i] += found.policy.percent[place];
      });
    }
    return found;
  }

  // A record with its columns unpacked, and `rows`: where the tokens of each response begin, and its outcomes.
  function read(record, prompts) {
    const tokens = mapped(record.tokens, (column, name) => (name === "reward" ? unpackNumbers(column) : unpack(column)));
    tokens.mine ??= tokens.piece.map(() => 1); // the environment inserted none
    const numbers = mapped(record.numbers, unpackNumbers);
    if (!numbers.reference_log_prob) {
      const { kl } = numbers; // k1, the difference of the log-probs
      numbers.reference_log_prob = numbers.log_prob.map((value, i) => (value === null || kl[i] === null ? null : value - kl[i]));
    }
    const sum = (column, from, to) => column.slice(from, to).reduce((total, value) => total + (value ?? 0), 0);
    const mean = (column, from, to) => (column && to > from ? sum(column, from, to) / (to - from) : null);
    let start = 0;
    let first = 0;
    const rows = record.rows.length.map((length, index) => {
      const end = start + length;
      const last = first + sum(tokens.mine, start, end);
      const pieces = tokens.piece.slice(start, end);
      const row = {
        index, start, end, first, last,
        ...mapped(record.rows, (column) => column[index]),
        promptText: record.prompts[record.rows.prompt[index]],
        promptKey: prompts[record.rows.prompt[index]],
        text: record.texts[index] ?? pieces.map((piece) => record.pieces[piece]).join(""),
        kl: sum(numbers.kl, first, last),
        entropy: mean(numbers.entropy, first, last),
        advantage: mean(numbers.advantage, first, last),
        clippedShare: mean(numbers.clipped, first, last),
      };
      [start, first] = [end, last];
      return row;
    });
    const alternatives = unpackAlternatives(record.alternatives, record.each);
    return { ...record, tokens, numbers, alternatives, rows };
  }

  textgym.index = (text) => {
    textgym.ready = decompressed(text);
  };

  // Scripts with records call this, with a name of each prompt by which its rows in other records are found.
  textgym.record = (key, prompts, text) => {
    const take = waiting.get(key);
    if (take) take([prompts, text]); // it is in a file, so it need not be held
    else held.set(key, [prompts, text]);
    waiting.delete(key);
  };

  function fetched(run, update, key) {
    return new Promise((resolve, reject) => {
      waiting.set(key, resolve);
      const script = document.createElement("script");
      script.src = `data/run${run}-update${update}.js`;
      script.onerror = () => reject(new Error(`The file ${script.src} is missing: run textgym view again.`));
      script.onload = () => script.remove();
      document.head.append(script);
    });
  }

  // The record of an update. Several calls share one load.
  textgym.load = (run, update) => {
    const key = `${run}/${update}`;
    if (!records.has(key)) {
      const compressed = held.has(key) ? Promise.resolve(held.get(key)) : fetched(run, update, key);
      records.set(key, compressed.then(async ([prompts, text]) => read(await decompressed(text), prompts)));
      records.get(key).catch(() => records.delete(key));
      if (records.size > KEPT) records.delete(records.keys().next().value);
    }
    return records.get(key);
  };

  textgym.inMemory = () => ({ records: records.size, compressed: held.size });

  // An element. Strings become text, never HTML.
  textgym.element = (tag, properties = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  };

  // Characters that command or cannot be seen are shown as symbols: the same as in textgym/display.py.
  const UNSEEN = /[\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\u{e0000}-\u{e007f}]/gu;
  textgym.visible = (text) =>
    text
      .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
      .replace(UNSEEN, (c) => `\u27e8U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`);

  textgym.number = (value) => {
    if (value === null || value === undefined) return "\u2013";
    if (Number.isInteger(value)) return String(value);
    const size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : value.toFixed(size >= 100 ? 1 : size >= 1 ? 2 : 3);
  };
})();
