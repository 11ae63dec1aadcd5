// Starts Swagger UI, and shows new users the steps from registration to their first task.
"use strict";

(() => {
  // URLs are relative to this file, because a proxy may serve the API under a prefix.
  const root = new URL("../", document.currentScript.src);
  let signedIn = null;

  // Links in the document are relative to /docs without a trailing slash.
  if (location.pathname.endsWith("/")) {
    history.replaceState(null, "", location.pathname.slice(0, -1) + location.search + location.hash);
  }

  function show(step, email) {
    for (const hint of document.querySelectorAll("#hint > p")) {
      hint.hidden = hint.id !== step;
    }
    for (const element of document.querySelectorAll(`#${step} .email`)) {
      element.textContent = email;
    }
  }

  // Returns the claims of an access token, or null if it is malformed. For display only: the
  // signature is not verified.
  function parseClaims(token) {
    try {
      const payload = token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/");
      const bytes = Uint8Array.from(atob(payload), (character) => character.charCodeAt(0));
      return JSON.parse(new TextDecoder().decode(bytes));
    } catch {
      return null;
    }
  }

  // Fills in the user_id of every operation: no other ID is valid for the signed-in user.
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

  const authorizationHints = {
    statePlugins: {
      auth: {
        wrapActions: {
          authorize: (authorize, system) => (given) => {
            const user = parseClaims(given.bearer?.value ?? "");
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

  function showTokenHint(response) {
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
    // Tokens must not outlive the tab.
    persistAuthorization: false,
    plugins: [authorizationHints],
    responseInterceptor: showTokenHint,
    tryItOutEnabled: true,
    // Swagger's validator is a third-party site.
    validatorUrl: null,
  });

  // Swagger UI follows deep links only when it loads, so those of the hints are handled here.
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
      // Browsers provide no clipboard to pages from other hosts over plain HTTP.
      button.textContent = "Cannot copy here; copy it from the response";
    }
  });
})();
