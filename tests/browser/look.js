// Runs in a page: what a reader would miss, as lists of short descriptions. Empty lists are good.
const width = arguments[0];
const article = document.querySelector("article, main") || document.body;
const brief = element => (element.outerHTML || element.textContent).slice(0, 120);
const seen = element => element.getClientRects().length > 0 && element.getBoundingClientRect().height > 0;
const list = (selector, bad) => Array.from(article.querySelectorAll(selector)).filter(bad).map(brief);

const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
const tex = [];
while (texts.nextNode()) {
  const text = texts.currentNode;
  const kept = text.parentElement.closest("pre, code, script, style, mjx-container, textarea");
  if (!kept && /\$\$|\\[(\[]|\\(frac|sum|mathbb|text|cdot)\b/.test(text.data)) tex.push(text.data.trim().slice(0, 120));
}

return {
  formulas: list(".math", e => !e.querySelector("mjx-container") || e.querySelector("mjx-merror, [data-mjx-error]"))
    .concat(list(".math", e => e.previousSibling && /\$\s*$/.test(e.previousSibling.data)), tex),
  widgets: list('script[type="application/vnd.jupyter.widget-view+json"]',
    e => !e.previousElementSibling || !e.previousElementSibling.matches(".widget-subarea") || !seen(e.previousElementSibling))
    .concat(list(".jupyter-widgets-error, .jupyter-widgets.widget-error", () => true),
      list(".explore-states", e => !e.querySelector(".explore-state") || !seen(e.querySelector(".explore-state")))),
  wordless: list("img", e => !e.alt.trim() || /\.(png|svg|jpe?g)$/.test(e.alt))
    .concat(list(".explore-state", e => !(e.getAttribute("aria-label") || "").trim()),
      list(".noUi-handle, .widget-play button", e => !(e.getAttribute("aria-label") || "").trim())),
  sideways: document.documentElement.scrollWidth > width
    ? list("*", e => e.getBoundingClientRect().right > width + 1 && !e.closest("pre, mjx-container, .explore-states")).slice(0, 5)
        .concat(`page ${document.documentElement.scrollWidth} px, window ${width} px`)
    : [],
};
