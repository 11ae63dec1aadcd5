// The pages to which mails lead. The token is in the fragment of the URL, which browsers never send: only
// the button uses it, so a scanner that opens the link changes nothing.
"use strict";

(() => {
  // URLs are relative to this file, because a proxy may serve the API under a prefix.
  const api = new URL("../api/v1/", document.currentScript.src);
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  const [withToken, withoutToken] = /verify\/?$/.test(location.pathname) ? ["verify", "resend"] : ["reset", "forgot"];
  const field = (id) => document.getElementById(id);
  const form = field(token ? withToken : withoutToken);
  const message = field("message");
  // Password managers would otherwise fill in the hidden forms.
  [...document.forms].filter((other) => other !== form).forEach((other) => other.remove());

  // Returns the address in a token. For display only: the signature is not verified.
  function parseAddress() {
    try {
      const payload = token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/");
      const bytes = Uint8Array.from(atob(payload), (character) => character.charCodeAt(0));
      return JSON.parse(new TextDecoder().decode(bytes)).email;
    } catch {
      return "";
    }
  }

  function show(...content) {
    message.replaceChildren(...content);
    message.hidden = false;
  }

  async function send(body) {
    const response = await fetch(new URL(form.dataset.path, api), {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    if (response.ok) {
      form.hidden = true;
      show(form.dataset.done);
      message.focus();
      // The token must not stay in the history.
      history.replaceState(null, "", location.pathname);
      return;
    }
    const problem = await response.json();
    if (problem.code === "invalid_mail_token") {
      const link = document.createElement("a");
      link.href = location.pathname;
      link.textContent = "Get a new mail";
      show("This link is no longer valid: it has expired or been used, or your password or address has changed. ", link);
    } else {
      show(problem.detail.charAt(0).toUpperCase() + problem.detail.slice(1));
      form.querySelector("input:not([readonly])")?.focus();
    }
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    message.hidden = true;
    if (form.id === "reset" && field("new-password").value !== field("repeated").value) {
      show("The passwords differ.");
      field("repeated").focus();
      return;
    }
    const button = form.querySelector("button");
    button.disabled = true;
    try {
      await send({ token, ...Object.fromEntries(new FormData(form)) });
    } catch {
      show("The service cannot be reached. Check your connection and try again.");
    }
    button.disabled = false;
  });

  form.addEventListener("input", () => {
    message.hidden = true;
  });

  field("show")?.addEventListener("change", (event) => {
    for (const id of ["new-password", "repeated"]) {
      field(id).type = event.target.checked ? "text" : "password";
    }
  });

  // A link that is opened in the same tab changes only the fragment.
  window.addEventListener("hashchange", () => location.reload());

  for (const element of form.querySelectorAll(".address")) {
    element.value = parseAddress();
  }
  document.title = form.querySelector("h1").textContent;
  form.hidden = false;
})();
