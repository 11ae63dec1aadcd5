// Registers and creates a task through types generated from the OpenAPI document.
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";

import createClient from "openapi-fetch";

import type { components, paths } from "./schema.js";

const baseUrl = process.env["BASE_URL"];
assert(baseUrl, "BASE_URL is not set");

const client = createClient<paths>({ baseUrl });

const registered = await client.POST("/api/v1/auth/register", {
  body: { email: `typescript-${randomUUID()}@example.com`, password: "blue kettle sings at dawn" },
});
assert(registered.data, JSON.stringify(registered.error));
const { access_token, user } = registered.data;

client.use({
  onRequest({ request }) {
    request.headers.set("Authorization", `Bearer ${access_token}`);
    return request;
  },
});

const own = { user_id: user.id };
const created = await client.POST("/api/v1/{user_id}/tasks", {
  params: { path: own, header: { "Idempotency-Key": randomUUID() } },
  body: { title: "Buy milk" },
});
assert(created.data, JSON.stringify(created.error));
const task: components["schemas"]["Task"] = created.data;
assert.equal(task.title, "Buy milk");
assert.equal(task.description, null);

const path = { ...own, id: task.id };
const done = await client.PATCH("/api/v1/{user_id}/tasks/{id}/complete", {
  params: { path },
  body: { completed: true },
});
assert.equal(done.data?.completed, true);

const listed = await client.GET("/api/v1/{user_id}/tasks", {
  params: { path: own, query: { completed: true, limit: 10 } },
});
assert.deepEqual(listed.data, [done.data]);

const changes = await client.GET("/api/v1/{user_id}/changes", { params: { path: own } });
assert.deepEqual(changes.data?.tasks, [done.data]);
assert.equal(changes.data.more, false);

const refused = await client.POST("/api/v1/{user_id}/tasks", { params: { path: own }, body: { title: " " } });
assert.equal(refused.error?.code, "validation_failed");
assert.equal(refused.error.errors?.[0]?.pointer, "/title");

console.log(`typescript: ${user.email} created ${task.id}`);
