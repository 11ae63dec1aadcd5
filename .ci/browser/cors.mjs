// Requests from pages of other origins: pages of an allowed origin can use the API and read the responses;
// the browser blocks pages of other origins.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { once } from "node:events";

import { baseUrl, withBrowser } from "./browser.mjs";

const allowed = new URL(process.env.ALLOWED_ORIGIN ?? "http://127.0.0.1:8931");

async function servePage(port) {
  const server = createServer((_, response) => {
    response.setHeader("Content-Type", "text/html; charset=utf-8");
    response.end("<!doctype html><title>other origin</title><link rel=icon href=data:,>");
  });
  server.listen(port, allowed.hostname);
  await once(server, "listening");
  return server;
}

// Runs in the page, under its origin.
async function callService(base) {
  const call = async (method, path, { headers = {}, body } = {}) => {
    const response = await fetch(base + path, {
      method,
      headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    const text = await response.text();
    const read = (name) => response.headers.get(name);
    return { status: response.status, body: text && JSON.parse(text), location: read("Location"),
      link: read("Link"), etag: read("ETag"), requestId: read("X-Request-Id"), total: read("X-Total-Count") };
  };
  const registered = await call("POST", "/api/v1/auth/register", {
    headers: { "X-Request-Id": "from-other-origin" },
    body: { email: `cors-${crypto.randomUUID()}@example.com`, password: "blue kettle sings at dawn" },
  });
  const { access_token, user } = registered.body;
  const bearer = { Authorization: `Bearer ${access_token}` };
  const tasks = `/api/v1/${user.id}/tasks`;
  const create = (title) =>
    call("POST", tasks, { headers: { ...bearer, "Idempotency-Key": crypto.randomUUID() }, body: { title } });
  const [first, second] = [await create("Buy milk"), await create("Water the plants")];
  return {
    registered, first, second,
    page: await call("GET", `${tasks}?limit=1&total=true`, { headers: bearer }),
    unchanged: await call("GET", first.location, { headers: { ...bearer, "If-None-Match": first.etag } }),
    put: await call("PUT", first.location, { headers: { ...bearer, "If-Match": first.etag }, body: { title: "Buy oat milk" } }),
    stale: await call("PATCH", first.location, { headers: { ...bearer, "If-Match": first.etag }, body: { completed: true } }),
    unauthenticated: await call("GET", tasks),
    unknownPath: await call("PATCH", "/api/v1/nowhere", { headers: bearer, body: {} }),
    wrongMethod: await call("DELETE", "/api/v1/auth/login", { headers: bearer }),
    deleted: await call("DELETE", second.location, { headers: bearer }),
  };
}

const servers = [await servePage(Number(allowed.port)), await servePage(0)];
try {
  await withBrowser(async (browser) => {
    const page = await browser.newPage();
    await page.goto(allowed.origin);
    const seen = await page.evaluate(callService, baseUrl);
    assert.equal(seen.registered.status, 201);
    assert.equal(seen.registered.location, "/api/v1/auth/me");
    assert.equal(seen.registered.requestId, "from-other-origin");
    const { user, access_token } = seen.registered.body;
    for (const created of [seen.first, seen.second]) {
      assert.equal(created.status, 201);
      assert.equal(created.location, `/api/v1/${user.id}/tasks/${created.body.id}`);
      assert.match(created.etag, /^"[^"]+"$/);
      assert.ok(created.requestId);
    }
    assert.deepEqual(seen.page.body.map((task) => task.title), ["Water the plants"]);
    assert.match(seen.page.link, /^<[^>]+>; rel="next"$/);
    assert.equal(seen.page.total, "2");
    // The browser returns its cached copy instead of a 304, if there is one.
    assert.ok([200, 304].includes(seen.unchanged.status));
    assert.equal(seen.put.status, 200);
    assert.notEqual(seen.put.etag, seen.first.etag);
    assert.equal(seen.stale.body.code, "precondition_failed");
    assert.equal(seen.unauthenticated.body.code, "missing_token");
    // The preflight succeeds on any path, so that the page sees the status instead of a network error.
    assert.equal(seen.unknownPath.body.code, "not_found");
    assert.equal(seen.wrongMethod.body.code, "method_not_allowed");
    assert.ok(seen.unauthenticated.requestId, "headers are readable on errors too");
    assert.equal(seen.deleted.status, 204);

    const blocked = `http://${allowed.hostname}:${servers[1].address().port}`;
    await page.goto(blocked);
    const attempt = (path, init) => page.evaluate(
      ([url, options]) => fetch(url, options).then((response) => `read ${response.status}`, (error) => error.name),
      [baseUrl + path, init],
    );
    const tasks = `/api/v1/${user.id}/tasks`;
    const headers = { Authorization: `Bearer ${access_token}`, "Content-Type": "application/json" };
    assert.equal(await attempt("/healthz", {}), "TypeError");
    assert.equal(await attempt(tasks, { headers }), "TypeError");
    assert.equal(await attempt(tasks, { method: "POST", headers, body: '{"title":"From another origin"}' }), "TypeError");
    // A body without a type needs no preflight. The page cannot read the response, and the request must have no effect.
    const untyped = `blocked-${crypto.randomUUID()}@example.com`;
    const account = { email: untyped, password: "blue kettle sings at dawn" };
    await page.evaluate(
      ([url, text]) => fetch(url, { method: "POST", mode: "no-cors", body: new Blob([text]) }),
      [`${baseUrl}/api/v1/auth/register`, JSON.stringify(account)],
    );
    const login = await page.request.post(`${baseUrl}/api/v1/auth/login`, { data: account });
    assert.equal(login.status(), 401, "a page of another origin registered an account");
    const left = await page.request.get(baseUrl + tasks, { headers });
    assert.deepEqual((await left.json()).map((task) => task.title), ["Buy oat milk"], "nothing was created");
    console.log(`cors: ${allowed.origin} registered and managed tasks, ${blocked} was blocked by the browser`);
  });
} finally {
  for (const server of servers) server.close();
}
