// Starts Swagger UI, and leads a newcomer from registering to the first task.
"use strict";

(() => {
  // A proxy may serve the API under a prefix, so every address is relative to this file's.
  const root = new URL("../", document.currentScript.src);
  let signedIn = null;

  // The document's links are relative to /docs, without a slash at the end.
  if (location.pathname.endsWith("/")) {
    history.replaceState(null, "", location.pathname.slice(0, -1) + location.search + location.hash);
  }

  function show(step, email) {
    for (const hint of document.querySelectorAll("#hint > p")) {
      hint.hidden = hint.id !== step;
    }
    for (const place of document.querySelectorAll(`#${step} .email`)) {
      place.textContent = email;
    }
  }

  // The claims of an access token, or null where the text is none. Only shown, never trusted.
  function claims(token) {
    try {
      const payload = token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/");
      const bytes = Uint8Array.from(atob(payload), (character) => character.charCodeAt(0));
      return JSON.parse(new TextDecoder().decode(bytes));
    } catch {
      return null;
    }
  }

  // Puts the user's id into every operation that asks for it: whoever is signed in has no other.
  function fillInUserId(system, id) {
    system.specSelectors.specJson().get("paths").forEach((item, path) => {
      if (!path.includes("{user_id}")) return;
      item.keySeq()
        .filter((key) => key !== "parameters")
        .forEach((method) => {
          system.specActions.changeParam([path, method], "user_id", "path", id, false);
        });
    });
  }

  const guide = {
    statePlugins: {
      auth: {
        wrapActions: {
          authorize: (authorize, system) => (given) => {
            const user = claims(given.bearer?.value ?? "");
            if (user) {
              fillInUserId(system, user.user_id);
              show("hint-authorized", user.email);
            }
            return authorize(given);
          },
          logout: (logout) => (names) => {
            show("hint-start");
            return logout(names);
          },
        },
      },
    },
  };

  function noticeSignIn(response) {
    const path = new URL(response.url, location.href).pathname;
    if (response.ok && /\/api\/v1\/auth\/(register|login|refresh)$/.test(path)) {
      signedIn = JSON.parse(response.text);
      document.getElementById("copy-token").textContent = "Copy access token";
      show("hint-signed-in", signedIn.user.email);
    }
    return response;
  }

  const ui = SwaggerUIBundle({
    url: new URL("openapi.json", root).href,
    dom_id: "#swagger-ui",
    deepLinking: true,
    defaultModelsExpandDepth: 0,
    displayRequestDuration: true,
    // A token kept by the browser would outlive the tab that it was meant for.
    persistAuthorization: false,
    plugins: [guide],
    responseInterceptor: noticeSignIn,
    tryItOutEnabled: true,
    // Swagger's validator is a site of somebody else's.
    validatorUrl: null,
  });

  // Swagger UI follows a deep link when it loads; the hints' links come later.
  window.addEventListener("hashchange", () => {
    ui.getSystem().layoutActions.parseDeepLinkHash(location.hash);
    document.getElementById(`operations-${location.hash.slice(2).replace("/", "-")}`)?.scrollIntoView();
  });

  document.getElementById("use-token").addEventListener("click", () => {
    const { authActions, specSelectors } = ui.getSystem();
    const schema = specSelectors.specJson().getIn(["components", "securitySchemes", "bearer"]).toJS();
    authActions.authorize({ bearer: { name: "bearer", schema, value: signedIn.access_token } });
  });

  document.getElementById("copy-token").addEventListener("click", async (event) => {
    const button = event.currentTarget;
    try {
      await navigator.clipboard.writeText(signedIn.access_token);
      button.textContent = "Copied";
    } catch {
      // A browser has no clipboard for pages that come over plain HTTP from another machine.
      button.textContent = "Not allowed here; copy it out of the answer";
    }
  });
})();
