"use strict";

// before the page is drawn: a page that changes its colours afterwards flashes
try {
  const theme = localStorage.getItem("segqc-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // no storage: the system's colours
}
