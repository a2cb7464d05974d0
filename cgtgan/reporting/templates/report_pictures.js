"use strict";
// Search and sorting of the report's pictures. Only the cards on the page exist; the rest is text in the data.
(() => {
  const PAGE = 24;
  const { methods, metrics, pictures } = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const search = byId("search"), metric = byId("metric"), whose = byId("whose"), turn = byId("turn");
  const cards = byId("found"), status = byId("status"), more = byId("more");
  const [ID, CAPTIONS, SCORES, REFERENCES, THUMBNAIL, PIXELS] = [0, 1, 2, 3, 4, 5];

  const element = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const option = (value, text) => Object.assign(element("option", "", text), { value });
  const formatted = (k, value, signed) => {
    if (value === null) return "–";
    const size = Math.abs(value);
    const text = metrics[k][1] ? (size * 100).toFixed(1) : size.toFixed(size < 1 ? 3 : size < 100 ? 2 : 0);
    return (value < 0 ? "−" : signed ? "+" : "") + text;
  };

  metrics.forEach(([name], k) => metric.append(option(String(k), name)));
  metric.append(option("", "Picture id"));
  methods.forEach((name, m) => whose.append(option(String(m), name)));
  methods.forEach((name, m) => m && whose.append(option(String(-m), `gain over ${name}`)));
  const cider = metrics.findIndex(([name]) => name === "CIDEr");
  metric.value = metrics.length ? String(Math.max(cider, 0)) : "";

  // a negative method stands for the gain of the first one over it
  const valueOf = (picture, m, k) => {
    const value = picture[SCORES][Math.abs(m)][k];
    if (m >= 0) return value;
    const first = picture[SCORES][0][k];
    return first === null || value === null ? null : first - value;
  };

  let texts = null; // made at the first search
  let order = [], count = 0;

  const card = (index) => {
    const picture = pictures[index], m = Number(whose.value), k = metric.value === "" ? -1 : Number(metric.value);
    const made = element("article", "card");
    made.dataset.id = picture[ID];
    const frame = element("div", picture[PIXELS] ? "picture pixels" : "picture");
    if (picture[THUMBNAIL]) {
      const image = element("img");
      image.decoding = "async";
      image.alt = `Picture ${picture[ID]}: ${picture[CAPTIONS][0] || "no caption"}`;
      image.src = picture[THUMBNAIL];
      frame.append(image);
      made.append(frame);
    }
    const words = element("div", "words");
    const caption = element("p", "caption", picture[CAPTIONS][0] || "(empty caption)");
    caption.dir = "auto";
    const meta = element("p", "meta");
    meta.append(element("span", "quiet", picture[ID]));
    if (k >= 0) {
      const value = valueOf(picture, m, k);
      const badge = element("span", "badge", `${metrics[k][0]} ${formatted(k, value, m < 0)}`);
      if (value !== null) made.dataset.value = String(value);
      if (m) badge.title = whose.selectedOptions[0].textContent;
      meta.append(badge);
    }
    words.append(caption, meta);
    // next to ours stands the method that is sorted by, or the first one; the others are folded away
    const compared = Math.abs(m) || 1;
    const others = methods.map((_, j) => j).filter((j) => j && picture[CAPTIONS][j] !== null);
    const captionsOf = (chosen) => {
      const list = element("dl", "extra");
      for (const j of chosen) {
        const group = element("div");
        const value = k >= 0 ? picture[SCORES][j][k] : null;
        const text = element("dd", "", picture[CAPTIONS][j] || "(empty caption)");
        text.dir = "auto";
        group.append(element("dt", "", value === null ? methods[j] : `${methods[j]} · ${metrics[k][0]} ${formatted(k, value)}`), text);
        list.append(group);
      }
      return list;
    };
    if (others.includes(compared)) words.append(captionsOf([compared]));
    const scored = metrics.map((_, j) => j).filter((j) => picture[SCORES][0][j] !== null);
    const rest = others.filter((j) => j !== compared);
    if (scored.length || rest.length || picture[REFERENCES].length) {
      const details = element("details", "more");
      details.append(element("summary", "", "More"));
      if (scored.length) {
        const scores = element("dl", "scores");
        for (const j of scored) {
          const group = element("div");
          group.append(element("dt", "", metrics[j][0]), element("dd", "", formatted(j, picture[SCORES][0][j])));
          scores.append(group);
        }
        details.append(scores);
      }
      if (picture[REFERENCES].length) {
        const list = element("ul", "references");
        for (const reference of picture[REFERENCES]) list.append(Object.assign(element("li", "", reference), { dir: "auto" }));
        details.append(element("p", "label", "References"), list);
      }
      if (rest.length) details.append(captionsOf(rest));
      words.append(details);
    }
    made.append(words);
    return made;
  };

  const show = () => {
    const fresh = document.createDocumentFragment();
    for (const index of order.slice(count, count + PAGE)) fresh.append(card(index));
    count = Math.min(count + PAGE, order.length);
    cards.append(fresh);
    more.hidden = count >= order.length;
    more.textContent = `Show ${Math.min(PAGE, order.length - count)} more`;
    const total = pictures.length.toLocaleString("en"), matches = order.length.toLocaleString("en");
    status.textContent = `${matches} of ${total} pictures, ${count.toLocaleString("en")} of them on the page.`;
  };

  const update = () => {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (wanted.length && !texts) {
      texts = pictures.map((p) => [p[ID], ...p[CAPTIONS].filter((text) => text !== null), ...p[REFERENCES]].join("\n").toLowerCase());
    }
    order = [...pictures.keys()].filter((index) => wanted.every((word) => texts[index].includes(word)));
    const descending = turn.value === "highest", sign = descending ? -1 : 1, m = Number(whose.value);
    whose.disabled = metric.value === "";
    if (metric.value === "") {
      if (descending) order.reverse(); // the data is in the order of the ids
    } else {
      const k = Number(metric.value), values = pictures.map((picture) => valueOf(picture, m, k));
      // pictures without a value come last in both orders
      order.sort((a, b) => {
        const [x, y] = [values[a], values[b]];
        return x === null || y === null ? (x === null) - (y === null) : sign * (x - y);
      });
    }
    cards.replaceChildren();
    count = 0;
    show();
  };

  search.addEventListener("input", update);
  metric.addEventListener("change", update);
  whose.addEventListener("change", update);
  turn.addEventListener("change", update);
  more.addEventListener("click", () => {
    const first = count;
    show();
    const next = cards.children[first];
    if (next) {
      next.tabIndex = -1; // the button moves away: keyboard users continue at the first new card
      next.focus({ preventScroll: true });
    }
  });
  byId("unscripted").hidden = true;
  byId("pictures").hidden = false;
  for (const link of document.querySelectorAll("a[href='#pictures']")) link.hidden = false;
  update();
})();
