(() => {  // before the page is drawn, so that it is drawn once
  "use strict";
  try {
    const theme = localStorage.getItem("i2v-lab-theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch { /* storage is not allowed: the system's theme */ }
})();
