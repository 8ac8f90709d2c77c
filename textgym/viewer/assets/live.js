// A page whose runs are in progress reads its index again every few seconds, until it says that they have ended.
"use strict";

(() => {
  const INTERVAL = 3000; // milliseconds

  // Calls `changed` with each new index. A file that is missing, because it is being replaced, is tried again later.
  textgym.follow = (index, changed) => {
    if (!index.live) return;
    setTimeout(() => {
      const script = document.createElement("script");
      script.src = `data/index.js?${Date.now()}`; // so that no server or browser answers with an old one
      const next = async () => {
        script.remove();
        const newest = await textgym.ready.catch(() => index);
        if (newest !== index) changed(newest);
        textgym.follow(newest, changed);
      };
      script.onload = next;
      script.onerror = next;
      document.head.append(script);
    }, INTERVAL);
  };
})();
