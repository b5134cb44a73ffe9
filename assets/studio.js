// The page's script: keys, clicks on rendered HTML, elapsed time, the address bar, the theme, dropped videos, and two
// videos in sync. Loaded once, before gradio mounts the page.
window.studio = (() => {
  "use strict";
  const $ = (selector, root = document) => root.querySelector(selector);

  // ---- theme: the visitor's choice, else the system's -------------------------------------------------------------
  const applyTheme = () => {
    const saved = localStorage.getItem("studio-theme"), body = document.body.classList;
    if (saved && body.contains("dark") !== (saved === "dark")) body.toggle("dark");
  };
  const toggleTheme = () => {
    const dark = !document.body.classList.contains("dark");
    localStorage.setItem("studio-theme", dark ? "dark" : "light");
    applyTheme();
  };

  // ---- clicks: every [data-act] inside an HTML component becomes one event of it -------------------------------------
  const local = {
    theme: toggleTheme,
    copy: (target) => {
      const code = $("code", target.closest("figure"));
      const copied = () => {
        target.classList.add("copied");
        setTimeout(() => target.classList.remove("copied"), 1500);
      };
      if (navigator.clipboard) return navigator.clipboard.writeText(code.textContent).then(copied);
      getSelection().selectAllChildren(code); // over http from another machine a page has no clipboard
      if (document.execCommand("copy")) copied();
    },
    play: (target) => {
      const videos = pair(target);
      const paused = videos.every((video) => video.paused);
      videos.forEach((video) => (paused ? video.play() : video.pause()));
      target.textContent = paused ? "❚❚" : "▶";
    },
  };
  const actions = (element, trigger) => {
    element.addEventListener("click", (event) => {
      const target = event.target.closest("[data-act]");
      if (!target || target.disabled) return;
      if (local[target.dataset.act]) return local[target.dataset.act](target);
      const send = () => trigger("act", { ...target.dataset });
      if (target.dataset.act === "example") typeInto($("#prompt textarea"), target.dataset.text);
      if (target.dataset.ask && now() - Number(target.dataset.since) > ASK_SECONDS) ask(target.dataset, send);
      else send();
    });
    keepFocus(element);
  };

  // ---- a question before a run of more than a few seconds is stopped ---------------------------------------------------
  const ASK_SECONDS = 5;
  const ask = ({ ask: text, yes, no }, then) => {
    const dialog = document.createElement("dialog");
    dialog.className = "ask";
    dialog.setAttribute("aria-label", text);
    dialog.innerHTML = '<form method="dialog"><p></p><button class="btn" value="no"></button><button class="btn stop" value="yes"></button></form>';
    $("p", dialog).textContent = text;
    $("[value=no]", dialog).textContent = no;
    $("[value=yes]", dialog).textContent = yes;
    dialog.addEventListener("close", () => {
      if (dialog.returnValue === "yes") then();
      dialog.remove();
    });
    $(".gradio-container").append(dialog);
    dialog.showModal();
  };

  // ---- an example replaces the prompt as typing does, so that the browser's own undo brings the old one back -----------
  const typeInto = (area, text) => {
    if (matchMedia("(hover: none)").matches) return; // focus would open a phone's keyboard; the server fills it in
    const before = document.activeElement;
    area.focus({ preventScroll: true });
    area.select();
    document.execCommand("insertText", false, text);
    before?.focus({ preventScroll: true });
  };

  // ---- focus: after a row has moved, the same button of the same run keeps the keyboard focus ---------------------------
  const keepFocus = (element) => {
    let at = null;
    element.addEventListener("focusin", (event) => (at = { ...event.target.closest("[data-act]")?.dataset }));
    new MutationObserver(() => {
      const language = $("[data-act=language][aria-pressed=true]", element);
      if (language) document.documentElement.lang = language.lang;
      const held = document.activeElement;
      if (!at?.id || !element.contains(held) || (held.dataset.id === at.id && !held.disabled)) return;
      const same = [...element.querySelectorAll("button[data-id]")].filter((b) => b.dataset.id === at.id && !b.disabled);
      (same.find((button) => button.dataset.act === at.act) || same[0])?.focus({ preventScroll: true });
    }).observe(element, { childList: true, subtree: true, attributes: true });
  };

  // ---- the preset list: a button and a listbox, with keyboard support -------------------------------------------------
  const picker = (element, props, trigger) => {
    const list = () => $("[role=listbox]", element);
    const button = () => $("[role=combobox]", element);
    const options = () => [...element.querySelectorAll("[role=option]")];
    const open = () => !list().hidden;
    const show = (visible) => {
      list().hidden = !visible;
      button().setAttribute("aria-expanded", visible);
      if (visible) fit();
      if (visible) mark(Math.max(0, options().findIndex((o) => o.getAttribute("aria-selected") === "true")));
    };
    // The list ends inside the window, whatever the place of its button, and scrolls.
    const fit = () => {
      const room = () => innerHeight - list().getBoundingClientRect().top - 12;
      if (room() < 240) button().scrollIntoView({ block: "center" });
      list().style.maxHeight = `${Math.max(160, Math.min(560, room()))}px`;
    };
    const mark = (index) => {
      options().forEach((option, i) => option.classList.toggle("at", i === index));
      const option = options()[index];
      button().setAttribute("aria-activedescendant", option ? option.id : "");
      option?.scrollIntoView({ block: "nearest" });
    };
    const at = () => options().findIndex((option) => option.classList.contains("at"));
    const choose = (option) => {
      show(false);
      if (option && option.getAttribute("aria-selected") !== "true") trigger("pick", { name: option.dataset.name });
    };
    element.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) return choose(option);
      if (event.target.closest("[role=combobox]")) show(!open());
    });
    element.addEventListener("keydown", (event) => {
      const count = options().length;
      const steps = { ArrowDown: 1, ArrowUp: -1 };
      if (event.key in steps) {
        open() ? mark((at() + steps[event.key] + count) % count) : show(true);
      } else if (open() && event.key === "Home") mark(0);
      else if (open() && event.key === "End") mark(count - 1);
      else if (open() && (event.key === "Enter" || event.key === " ")) choose(options()[at()]);
      else if (open() && (event.key === "Escape" || event.key === "Tab")) {
        show(false);
        if (event.key === "Tab") return;
        event.stopPropagation();
      } else return;
      event.preventDefault();
    });
    document.addEventListener("pointerdown", (event) => {
      if (open() && !element.contains(event.target)) show(false);
    });
  };

  // ---- keys: Ctrl+Enter generates; Escape leaves a change of a waiting run, else stops unless a field handles it ------
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      // Let the text box report its value before the button reads it.
      setTimeout(() => ($("#generate button") || $("#generate")).click(), 60);
    }
    if (event.key === "Escape" && !event.target.closest("input, textarea, [role=combobox], dialog")) {
      ($("[data-act=stop_editing]") || $("[data-act=stop][data-key=Escape]"))?.click();
    }
  });

  // ---- on a narrow screen the stage is below the button: scroll to it when a run starts --------------------------------
  let pressed = false;
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#generate")) return;
    pressed = true;
    waiting(true); // the answer may take a while on a busy machine
    setTimeout(waiting, 15000, false);
  });
  const waiting = (on) => $("#go")?.classList.toggle("waiting", on);
  const scrollToStage = (state) => {
    if (!pressed || !["queued", "running"].includes(state)) return;
    pressed = false;
    if (innerWidth <= 820) $("#theatre")?.scrollIntoView({ behavior: "smooth", block: "start" });
  };

  // ---- elapsed time of the running job, and the job in the address bar ------------------------------------------------
  let skew = 0; // seconds by which the server's clock is ahead of ours
  const now = () => Date.now() / 1000 + skew;
  const clockText = (seconds) => {
    const s = Math.max(0, Math.floor(seconds));
    const two = (n) => String(n).padStart(2, "0");
    return s >= 3600 ? `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}` : `${Math.floor(s / 60)}:${two(s % 60)}`;
  };
  const tick = () => {
    const elapsed = $(".elapsed[data-since]");
    if (elapsed && !document.body.classList.contains("lost")) elapsed.textContent = clockText(now() - Number(elapsed.dataset.since));
  };
  setInterval(tick, 250);

  // ---- the tab's title: progress for who looks at something else, and a mark until they come back ----------------------
  const MARKS = { done: "✓", failed: "✗", interrupted: "✗" };
  let shown = "";
  const retitle = (state) => {
    const plain = document.title.replace(/^(\d+% · |[✓✗] )/, "");
    const percent = $("#status [role=progressbar]")?.getAttribute("aria-valuenow");
    const ended = ["running", "queued"].includes(shown) && document.hidden && MARKS[state];
    if (ended) document.title = `${ended} ${plain}`;
    else if (state === "running" && percent) document.title = `${percent}% · ${plain}`;
    else if (!document.hidden) document.title = plain;
    shown = state;
  };
  document.addEventListener("visibilitychange", () => retitle(shown));

  // ---- radio buttons: one stop of the Tab key for each group, arrows inside it; gradio names every one differently ------
  const nameRadios = () => {
    for (const radio of document.querySelectorAll("#left input[type=radio]")) {
      const group = radio.closest(".block[id]")?.id;
      if (group && radio.name !== group) radio.name = group;
    }
  };
  new MutationObserver(nameRadios).observe(document.documentElement, { childList: true, subtree: true });

  // ---- a lost connection: nothing on the page may look as if it went on ------------------------------------------------
  const LOST_SECONDS = 3;
  const alive = async () => {
    let answered = true;
    try {
      await fetch("studio/alive", { cache: "no-store", signal: AbortSignal.timeout(LOST_SECONDS * 1000) });
    } catch {
      answered = false;
    }
    document.body.classList.toggle("lost", !answered);
  };
  setInterval(() => document.hidden || alive(), LOST_SECONDS * 1000);
  addEventListener("offline", alive);
  const watched = (element) => {
    waiting(false);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) element.querySelectorAll("video[autoplay]").forEach(still);
    const root = $("[data-now]", element);
    if (root) skew = Number(root.dataset.now) - Date.now() / 1000;
    const stage = $(".stage[data-job]", element);
    if (stage) {
      if (!opened) setTimeout(retype, 150); // after gradio has filled in the stored fields
      opened = true;
      const url = new URL(location.href);
      const job = stage.dataset.job;
      if ((url.searchParams.get("job") || "") !== job) {
        job ? url.searchParams.set("job", job) : url.searchParams.delete("job");
        history.replaceState(history.state, "", url);
      }
      scrollToStage(stage.dataset.state);
    }
    retitle($("#stage .stage")?.dataset.state ?? "");
    tick();
  };

  // A visitor who asked for less motion starts every video by hand.
  const still = (video) => {
    video.autoplay = false;
    video.controls = !video.classList.contains("ambient");
    video.pause();
  };

  // ---- texts typed while the connection was lost: restored when the page has reloaded itself --------- ------------------
  const texts = () => [...document.querySelectorAll("#prompt textarea, #negative_prompt textarea")];
  addEventListener("pagehide", () => sessionStorage.setItem("studio-texts", JSON.stringify(texts().map((t) => t.value))));
  const retype = () => {
    const kept = JSON.parse(sessionStorage.getItem("studio-texts") || "[]");
    texts().forEach((text, i) => {
      if (!kept[i] || text.value === kept[i]) return;
      text.value = kept[i];
      text.dispatchEvent(new Event("input", { bubbles: true }));
    });
  };
  let opened = false;

  // ---- sent with every event: the version of each part that the page shows, or that the part is in use - ---------------
  const sendVersions = (values) => {
    const parts = [...document.querySelectorAll("[data-part]")];
    const inUse = (part) => $("[aria-expanded=true]", part);
    values[0] = Object.fromEntries(parts.map((part) => [part.dataset.part, inUse(part) ? "in use" : part.dataset.version]));
    return values;
  };

  const give = (input, file) => {
    const files = new DataTransfer();
    files.items.add(file);
    input.files = files.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };

  // ---- a video dropped anywhere goes to the file input of the restore button ------------------------------------------
  const isVideo = (event) => [...(event.dataTransfer?.items || [])].some((item) => item.kind === "file" && item.type.startsWith("video/"));
  document.addEventListener("dragover", (event) => {
    if (!isVideo(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener(
    "drop",
    (event) => {
      document.body.classList.remove("dropping");
      const file = [...(event.dataTransfer?.files || [])].find((f) => f.type.startsWith("video/"));
      const input = $("#past input[type=file]");
      if (!file || !input) return;
      event.preventDefault();
      event.stopPropagation();
      give(input, file);
    },
    true,
  );
  // A pasted picture becomes the first frame.
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files || [])].find((f) => f.type.startsWith("image/"));
    const input = $("#image_path input[type=file]");
    if (!file || !input) return;
    event.preventDefault();
    give(input, file);
  });

  // ---- two videos in sync: the second follows the first -------------------------------------------------------------
  const pair = (inside) => [...inside.closest(".compare").querySelectorAll("video")];
  const inStep = (element) => {
    element.addEventListener("input", (event) => {
      if (!event.target.matches(".seek")) return;
      pair(event.target).forEach((video) => (video.currentTime = (event.target.value / 1000) * (video.duration || 0)));
    });
    const follow = () => {
      const [lead, other] = element.querySelectorAll(".compare video");
      if (lead && other && !lead.paused) {
        const share = lead.currentTime / (lead.duration || 1);
        const wanted = share * (other.duration || 0);
        if (Math.abs(other.currentTime - wanted) > 0.12) other.currentTime = wanted;
        const seek = $(".seek", element);
        if (seek && document.activeElement !== seek) seek.value = Math.round(share * 1000);
      }
      requestAnimationFrame(follow);
    };
    requestAnimationFrame(follow);
  };

  // gradio sets its theme class while it mounts; ours has to win.
  const keepTheme = () => {
    applyTheme();
    new MutationObserver(applyTheme).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  };
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", keepTheme) : keepTheme();
  return { actions, picker, sendVersions, watched, inStep };
})();
