// What pages do beyond links and forms; without it they work all the same.

/** @type {(selector: string, within?: ParentNode) => HTMLElement[]} */
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
/** @type {(selector: string, within?: ParentNode) => HTMLElement | null} */
const one = (selector, within = document) => within.querySelector(selector);

document.documentElement.classList.add("has-script");

// ---------------------------------------------------------------------------------------------------------- settings

/** @param {string} name */
function remembered(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

/** @param {string} name @param {string | null} value */
function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, value);
  } catch {
    // it holds for this page, then
  }
}

const themeSwitch = one("[data-theme-switch]");
if (themeSwitch) {
  const root = document.documentElement;
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const tell = () => themeSwitch.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
  themeSwitch.hidden = false;
  tell();
  themeSwitch.addEventListener("click", () => {
    const wanted = isDark() ? "light" : "dark";
    const usual = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    if (wanted === usual) delete root.dataset.theme;
    else root.dataset.theme = wanted;
    remember("segqc-theme", wanted === usual ? null : wanted);
    tell();
  });
}

// -------------------------------------------------------------------------------------------------------------- live

const lost = one("[data-lost]");

/** Keep a part of the page as the server has it now. @param {HTMLElement} part */
function keepLive(part) {
  const pause = 1000 * Number(part.dataset.seconds);
  const next = (factor = 1) => setTimeout(look, pause * factor);
  async function look() {
    if (document.hidden) return next();
    try {
      const answer = await fetch(part.dataset.live, { headers: { Accept: "text/html" }, credentials: "same-origin" });
      if (!answer.ok) throw new Error(String(answer.status));
      const text = await answer.text();
      if (lost) lost.hidden = true;
      if (part.dataset.shown !== text) {
        const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
        part.innerHTML = text;
        part.dataset.shown = text;
        if (focused) document.getElementById(focused)?.focus();
      }
      if (one("[data-reload-pictures]", part)) location.reload();
      else if (!("once" in part.dataset) || text.trim().includes("role=\"status\"")) next();
    } catch {
      if (lost) lost.hidden = false;
      next(3);
    }
  }
  next();
}
for (const part of all("[data-live]")) if (!("idle" in part.dataset)) keepLive(part);

// ------------------------------------------------------------------------------------------------------------- queue

const bulk = one("[data-bulk]");
if (bulk) {
  const chooseAll = /** @type {HTMLInputElement} */ (one("[data-choose-all]", bulk));
  const boxes = /** @type {HTMLInputElement[]} */ (all("input[name=scan]", bulk));
  const bar = one("[data-bulk-bar]", bulk);
  const count = one("[data-bulk-count]", bulk);
  const tell = () => {
    const chosen = boxes.filter((box) => box.checked).length;
    bar.hidden = chosen === 0;
    count.textContent = `${chosen} ${chosen === 1 ? "scan" : "scans"} chosen`;
    chooseAll.checked = chosen === boxes.length;
    chooseAll.indeterminate = chosen > 0 && chosen < boxes.length;
  };
  chooseAll.addEventListener("change", () => {
    for (const box of boxes) box.checked = chooseAll.checked;
    tell();
  });
  bulk.addEventListener("change", tell);
  bulk.addEventListener("submit", (event) => {
    const reason = /** @type {HTMLInputElement} */ (one("input[name=reason]", bulk));
    const decision = /** @type {HTMLButtonElement | null} */ (event.submitter)?.value;
    reason.setCustomValidity(decision === "exclude" && !reason.value.trim() ? "Say why the scans are excluded." : "");
    if (!reason.reportValidity()) event.preventDefault();
  });
  one("input[name=reason]", bulk).addEventListener("input", (event) => event.target.setCustomValidity(""));
  // what the browser has kept of an earlier visit counts, too
  addEventListener("pageshow", tell);
  tell();
}

for (const picture of /** @type {HTMLImageElement[]} */ (all(".picture img, .strip img"))) {
  picture.addEventListener("error", () => picture.classList.add("missing"));
}

// -------------------------------------------------------------------------------------------------------------- scan

const strip = one("[data-strip]");
/** @type {(step: number) => void} */
let step = () => undefined;
/** @type {(step: number) => void} */
let stepWorst = () => undefined;
if (strip) {
  const slices = all("[data-index]", strip);
  const picture = /** @type {HTMLImageElement} */ (one("[data-slice]"));
  const unit = one("[data-slice-value]").textContent.replace(/^[\d,]+/, "");
  const ranks = slices.toSorted((a, b) => Number(a.dataset.rank) - Number(b.dataset.rank));
  let current = slices.findIndex((slice) => slice.getAttribute("aria-current"));

  /** @param {number} index */
  const show = (index) => {
    current = Math.min(Math.max(index, 0), slices.length - 1);
    for (const [number, slice] of slices.entries()) {
      if (number === current) slice.setAttribute("aria-current", "true");
      else slice.removeAttribute("aria-current");
    }
    const chosen = slices[current];
    picture.classList.add("loading");
    picture.src = chosen.dataset.view;
    picture.alt = picture.alt.replace(/^Slice \d+/, `Slice ${current}`);
    one("[data-slice-name]").textContent = `Slice ${current} of 0–${slices.length - 1}`;
    one("[data-slice-value]").textContent = chosen.dataset.value === undefined ? "" : chosen.dataset.value + unit;
    /** @type {HTMLInputElement} */ (one("[data-slice-field]")).value = String(current);
    const address = new URL(location.href);
    address.searchParams.set("slice", String(current));
    history.replaceState(null, "", address);
    into(chosen);
    for (const near of [slices[current + 1], slices[current - 1]]) if (near) new Image().src = near.dataset.view;
  };
  /** Scroll the strip alone: the page stays where it is. @param {HTMLElement} slice */
  const into = (slice) => {
    const place = slice.getBoundingClientRect();
    const frame = strip.getBoundingClientRect();
    if (place.left < frame.left || place.right > frame.right) {
      strip.scrollLeft += place.left + place.width / 2 - frame.left - frame.width / 2;
    }
  };
  step = (by) => show(current + by);
  stepWorst = (by) => {
    const rank = ranks.indexOf(slices[current]) + by;
    if (ranks[rank]) show(slices.indexOf(ranks[rank]));
  };
  picture.addEventListener("load", () => picture.classList.remove("loading"));
  picture.addEventListener("error", () => picture.classList.remove("loading"));
  strip.addEventListener("click", (event) => {
    const slice = event.target.closest("[data-index]");
    if (!slice || event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    show(Number(slice.dataset.index));
  });
  for (const button of all("[data-step], [data-goto]")) {
    button.addEventListener("click", (event) => {
      event.preventDefault();
      if (button.dataset.goto !== undefined) show(Number(button.dataset.goto));
      else step(Number(button.dataset.step));
    });
  }
  if (current >= 0) into(slices[current]);
}

const layers = /** @type {HTMLFormElement | null} */ (one("[data-layers]"));
layers?.addEventListener("change", () => layers.requestSubmit());

for (const sheet of /** @type {HTMLDetailsElement[]} */ (all("details.act"))) {
  sheet.addEventListener("toggle", () => {
    if (!sheet.open) return;
    for (const other of all("details.act[open]")) if (other !== sheet) other.removeAttribute("open");
    one("input:not([type=hidden]), a", sheet)?.focus();
  });
  sheet.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    sheet.open = false;
    one("summary", sheet).focus();
  });
}
document.addEventListener("click", (event) => {
  for (const sheet of all("details.act[open]")) if (!sheet.contains(event.target)) sheet.removeAttribute("open");
});

// ---------------------------------------------------------------------------------------------------------- keyboard

const keysDialog = /** @type {HTMLDialogElement} */ (one("[data-keys-dialog]"));
const keysOn = /** @type {HTMLInputElement} */ (one("[data-keys-on]"));
const keysButton = one("[data-keys]");
keysButton.hidden = false;
keysButton.addEventListener("click", () => keysDialog.showModal());
keysOn.checked = remembered("segqc-keys") !== "off";
keysOn.addEventListener("change", () => remember("segqc-keys", keysOn.checked ? null : "off"));

const rows = all(".queue tbody tr");
let row = -1;
/** @param {number} by */
function moveRow(by) {
  if (!rows.length) return;
  rows[row]?.classList.remove("at");
  row = Math.min(Math.max(row + by, 0), rows.length - 1);
  rows[row].classList.add("at");
  one("[data-row]", rows[row]).focus();
}

/** @param {string} name */
const toggle = (name) => () => layers && one(`input[name=${name}]`, layers)?.click();
/** @type {Record<string, () => void>} */
const actions = {
  "/": () => one("[data-search]")?.focus(),
  "?": () => keysDialog.showModal(),
  j: () => moveRow(1),
  k: () => moveRow(-1),
  x: () => one("input[name=scan]", rows[row] ?? document.createElement("p"))?.click(),
  n: () => stepWorst(1),
  p: () => stepWorst(-1),
  m: toggle("mask"),
  h: toggle("heat"),
  b: toggle("boxes"),
  ArrowLeft: () => step(-1),
  ArrowRight: () => step(1),
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || keysDialog.open) return;
  const target = /** @type {HTMLElement} */ (event.target);
  const takesText = target.closest("textarea, select, [contenteditable], input:not([type=checkbox])");
  const isArrow = event.key.startsWith("Arrow");
  if (takesText || (!isArrow && !keysOn.checked) || !Object.hasOwn(actions, event.key)) return;
  if (isArrow && (!strip || target.closest(".scroll, summary"))) return;
  event.preventDefault();
  actions[event.key]();
});
