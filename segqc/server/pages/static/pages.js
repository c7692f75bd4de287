// What pages do beyond links and forms; without it they work all the same.

/**
 * The elements of a kind that a selector finds.
 * @template {HTMLElement} T
 * @param {new () => T} kind
 * @param {string} selector
 * @param {ParentNode} within
 * @returns {T[]}
 */
function all(kind, selector, within = document) {
  /** @type {(found: Element) => found is T} */
  const isKind = (found) => found instanceof kind;
  return [...within.querySelectorAll(selector)].filter(isKind);
}

/**
 * The first of them, if there is one.
 * @template {HTMLElement} T
 * @param {new () => T} kind
 * @param {string} selector
 * @param {ParentNode} within
 * @returns {T | null}
 */
function find(kind, selector, within = document) {
  return all(kind, selector, within)[0] ?? null;
}

/**
 * The first of them, which the template has put there.
 * @template {HTMLElement} T
 * @param {new () => T} kind
 * @param {string} selector
 * @param {ParentNode} within
 * @returns {T}
 */
function need(kind, selector, within = document) {
  const found = find(kind, selector, within);
  if (!found) throw new Error(`the page lacks ${selector}`);
  return found;
}

/** The element that an event came from. @param {Event} event */
const source = (event) => (event.target instanceof Element ? event.target : document.body);

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

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const themeSwitch = need(HTMLButtonElement, "[data-theme-switch]");
const root = document.documentElement;
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches);
const nameThemeSwitch = () =>
  themeSwitch.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
themeSwitch.hidden = false;
nameThemeSwitch();
systemIsDark.addEventListener("change", nameThemeSwitch);
themeSwitch.addEventListener("click", () => {
  const wanted = isDark() ? "light" : "dark";
  const usual = systemIsDark.matches ? "dark" : "light";
  if (wanted === usual) delete root.dataset.theme;
  else root.dataset.theme = wanted;
  remember("segqc-theme", wanted === usual ? null : wanted);
  nameThemeSwitch();
});

// -------------------------------------------------------------------------------------------------------------- live

const lost = need(HTMLElement, "[data-lost]");

/** Keep a part of the page as the server has it now. @param {HTMLElement} part @param {string} address */
function keepLive(part, address) {
  const pause = 1000 * Number(part.dataset.seconds);
  let shown = "";
  const next = (factor = 1) => setTimeout(look, pause * factor);
  async function look() {
    if (document.hidden) return next();
    try {
      const answer = await fetch(address, { headers: { Accept: "text/html" }, credentials: "same-origin" });
      if (answer.redirected) return location.reload(); // to sign in again
      if (!answer.ok) throw new Error(String(answer.status));
      const text = await answer.text();
      lost.hidden = true;
      if (text !== shown) {
        const focused = document.activeElement && part.contains(document.activeElement) ? document.activeElement.id : "";
        part.innerHTML = text;
        shown = text;
        if (focused) document.getElementById(focused)?.focus();
      }
      if (find(HTMLElement, "[data-reload-pictures]", part)) location.reload();
      else if (!("once" in part.dataset) || find(HTMLElement, "[data-goes-on]", part)) next();
    } catch {
      lost.hidden = false;
      next(3);
    }
  }
  next();
}
for (const part of all(HTMLElement, "[data-live]")) {
  if (part.dataset.live && !("idle" in part.dataset)) keepLive(part, part.dataset.live);
}

// ------------------------------------------------------------------------------------------------------------- queue

const bulk = find(HTMLFormElement, "[data-bulk]");
if (bulk) {
  const chooseAll = need(HTMLInputElement, "[data-choose-all]", bulk);
  const boxes = all(HTMLInputElement, "input[name=scan]", bulk);
  const bar = need(HTMLElement, "[data-bulk-bar]", bulk);
  const count = need(HTMLElement, "[data-bulk-count]", bulk);
  const reason = need(HTMLInputElement, "input[name=reason]", bulk);
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
    const excludes = event.submitter instanceof HTMLButtonElement && event.submitter.value === "exclude";
    reason.setCustomValidity(excludes && !reason.value.trim() ? "Say why the scans are excluded." : "");
    if (!reason.reportValidity()) event.preventDefault();
  });
  reason.addEventListener("input", () => reason.setCustomValidity(""));
  // what the browser has kept of an earlier visit counts, too
  addEventListener("pageshow", tell);
  tell();
}

for (const picture of all(HTMLImageElement, ".picture img, .strip img")) {
  picture.addEventListener("error", () => picture.classList.add("missing"));
}

// -------------------------------------------------------------------------------------------------------------- scan

const strip = find(HTMLElement, "[data-strip]");
/** @type {(by: number) => void} */
let step = () => undefined;
/** @type {(by: number) => void} */
let stepWorst = () => undefined;
if (strip) {
  const slices = all(HTMLElement, "[data-index]", strip);
  const picture = need(HTMLImageElement, "[data-slice]");
  const name = need(HTMLElement, "[data-slice-name]");
  const value = need(HTMLElement, "[data-slice-value]");
  const field = need(HTMLInputElement, "[data-slice-field]");
  const unit = (value.textContent ?? "").replace(/^[\d,]+/, "");
  const ranks = [...slices].sort((a, b) => Number(a.dataset.rank) - Number(b.dataset.rank));
  let current = slices.findIndex((slice) => slice.getAttribute("aria-current"));

  /** Scroll the strip alone: the page stays where it is. @param {HTMLElement} slice */
  const into = (slice) => {
    const place = slice.getBoundingClientRect();
    const frame = strip.getBoundingClientRect();
    if (place.left < frame.left || place.right > frame.right) {
      strip.scrollLeft += place.left + place.width / 2 - frame.left - frame.width / 2;
    }
  };
  /** @param {number} index */
  const show = (index) => {
    current = Math.min(Math.max(index, 0), slices.length - 1);
    for (const [number, slice] of slices.entries()) {
      if (number === current) slice.setAttribute("aria-current", "true");
      else slice.removeAttribute("aria-current");
    }
    const chosen = slices[current];
    picture.classList.add("loading");
    picture.src = chosen.dataset.view ?? "";
    picture.alt = picture.alt.replace(/^Slice \d+/, `Slice ${current}`);
    name.textContent = `Slice ${current} of 0–${slices.length - 1}`;
    value.textContent = chosen.dataset.value === undefined ? "" : chosen.dataset.value + unit;
    field.value = String(current);
    const address = new URL(location.href);
    address.searchParams.set("slice", String(current));
    history.replaceState(null, "", address);
    into(chosen);
    for (const near of [slices[current + 1], slices[current - 1]]) {
      if (near?.dataset.view) new Image().src = near.dataset.view;
    }
  };
  step = (by) => show(current + by);
  stepWorst = (by) => {
    const next = ranks[ranks.indexOf(slices[current]) + by];
    if (next) show(slices.indexOf(next));
  };
  for (const event of ["load", "error"]) picture.addEventListener(event, () => picture.classList.remove("loading"));
  strip.addEventListener("click", (event) => {
    const slice = source(event).closest("[data-index]");
    if (!(slice instanceof HTMLElement) || event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    show(Number(slice.dataset.index));
  });
  for (const button of all(HTMLElement, "[data-step], [data-goto]")) {
    button.addEventListener("click", (event) => {
      event.preventDefault();
      if (button.dataset.goto !== undefined) show(Number(button.dataset.goto));
      else step(Number(button.dataset.step));
    });
  }
  if (current >= 0) into(slices[current]);
}

const layers = find(HTMLFormElement, "[data-layers]");
layers?.addEventListener("change", () => layers.requestSubmit());

const sheets = all(HTMLDetailsElement, "details.act");
for (const sheet of sheets) {
  sheet.addEventListener("toggle", () => {
    if (!sheet.open) return;
    for (const other of sheets) if (other !== sheet) other.open = false;
    find(HTMLElement, "input:not([type=hidden]), a", sheet)?.focus();
  });
  sheet.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    sheet.open = false;
    need(HTMLElement, "summary", sheet).focus();
  });
}
document.addEventListener("click", (event) => {
  for (const sheet of sheets) if (!sheet.contains(source(event))) sheet.open = false;
});

// ---------------------------------------------------------------------------------------------------------- keyboard

const keysDialog = need(HTMLDialogElement, "[data-keys-dialog]");
const keysOn = need(HTMLInputElement, "[data-keys-on]");
const keysButton = need(HTMLButtonElement, "[data-keys]");
keysButton.hidden = false;
keysButton.addEventListener("click", () => keysDialog.showModal());
keysOn.checked = remembered("segqc-keys") !== "off";
keysOn.addEventListener("change", () => remember("segqc-keys", keysOn.checked ? null : "off"));

const rows = all(HTMLElement, ".queue tbody tr");
let row = -1;
/** @param {number} by */
function moveRow(by) {
  if (!rows.length) return;
  rows[row]?.classList.remove("at");
  row = Math.min(Math.max(row + by, 0), rows.length - 1);
  rows[row].classList.add("at");
  need(HTMLElement, "[data-row]", rows[row]).focus();
}
/** @param {string} selector */
const pressInRow = (selector) => rows[row] && find(HTMLElement, selector, rows[row])?.click();

/** @param {string} name */
const toggle = (name) => () => layers && find(HTMLInputElement, `input[name=${name}]`, layers)?.click();
/** @type {Record<string, () => unknown>} */
const actions = {
  "/": () => find(HTMLElement, "[data-search]")?.focus(),
  "?": () => keysDialog.showModal(),
  j: () => moveRow(1),
  k: () => moveRow(-1),
  x: () => pressInRow("input[name=scan]"),
  r: () => pressInRow("[data-right]"),
  o: () => pressInRow("[data-open]"),
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
  const isArrow = event.key.startsWith("Arrow");
  const takesText = source(event).closest("textarea, select, [contenteditable], input:not([type=checkbox])");
  // in Swagger UI and in tables that scroll, keys are theirs
  const isElsewhere = source(event).closest(isArrow ? ".scroll, summary" : "#api") || (isArrow && !strip);
  if (takesText || isElsewhere || (!isArrow && !keysOn.checked) || !Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
});
