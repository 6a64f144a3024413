/* Say aloud what ipywidgets leaves unsaid: names of handles and buttons, values as the reader sees them, which picture
   is on the screen. The widgets come and go, so one observer dresses whatever appears. */
(function () {
  "use strict";

  function set(element, name, value) {
    // Writing an equal value would wake the observer again, for ever.
    if (element && element.getAttribute(name) !== value) element.setAttribute(name, value);
  }

  function label(widget) {
    const text = widget.querySelector(".widget-label");
    return text ? text.textContent.trim() : "";
  }

  function slider(widget) {
    const handle = widget.querySelector(".noUi-handle");
    const readout = widget.querySelector(".widget-readout");
    if (!handle || !readout) return;
    set(handle, "aria-label", label(widget));
    set(handle, "aria-valuetext", readout.textContent);
    set(readout, "contenteditable", "false"); // it names a choice; typing into it does nothing
  }

  function radios(widget, index) {
    set(widget, "role", "radiogroup");
    set(widget, "aria-label", label(widget));
    // One name a group: then the arrow keys walk through it and Tab leaves it.
    widget.querySelectorAll("input").forEach(input => set(input, "name", "choice-" + index));
  }

  function play(widget) {
    const [start, stop, repeat] = widget.querySelectorAll("button");
    set(start, "aria-label", start.querySelector(".fa-pause") ? "Pause" : "Play");
    set(stop, "aria-label", "Back to the first");
    set(repeat, "aria-label", "Repeat");
    set(repeat, "aria-pressed", String(repeat.classList.contains("mod-active")));
  }

  function explorer(widget) {
    const names = Array.from(widget.querySelectorAll(".explore-controls .widget-label"), e => e.textContent.trim());
    set(widget, "role", "group");
    set(widget, "aria-label", "Picture to explore by " + names.join(", "));
    // A reader who moved a control hears the new picture; a running animation would never stop talking.
    set(widget.querySelector(".explore-states"), "aria-live", widget.querySelector(".fa-pause") ? "off" : "polite");
  }

  function dress() {
    document.querySelectorAll(".widget-slider").forEach(slider);
    document.querySelectorAll(".widget-radio").forEach(radios);
    document.querySelectorAll(".widget-play").forEach(play);
    document.querySelectorAll(".explore").forEach(explorer);
  }

  // The widget manager asks for formulas in the manner of MathJax 2, and MathJax 3 has no Hub: without this it throws.
  window.addEventListener("load", function () {
    const mathjax = window.MathJax;
    if (mathjax && mathjax.typesetPromise && !mathjax.Hub)
      mathjax.Hub = { Queue: ([, , element]) => mathjax.typesetPromise([element]) };
  });

  // Loaded with `defer`, so the page is parsed; widgets are drawn after the load event.
  let waiting = false;
  new MutationObserver(function () {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(function () { waiting = false; dress(); });
  }).observe(document.querySelector("main") || document.body, {
    subtree: true, childList: true, attributes: true,
    attributeFilter: ["aria-valuetext", "contenteditable", "class"],
  });
  dress();
})();
