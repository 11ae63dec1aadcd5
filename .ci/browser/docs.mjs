// A new user in /docs registers, authorizes, creates a task and completes it. The console must show no
// errors and no policy violations, and the page must send no requests to other hosts.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { join } from "node:path";

import { baseUrl, withBrowser } from "./browser.mjs";

const { origin } = new URL(baseUrl);
const PASSWORD = "blue kettle sings at dawn";
const screenshot = (name) => ({ path: join(process.env.SCREENSHOT_DIR, `${name}.png`) });

await withBrowser(async (browser) => {
  const page = await browser.newPage();
  const problems = [];
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) problems.push(message.text());
  });
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("request", (request) => {
    const url = new URL(request.url());
    const isAllowed = ["data:", "blob:"].includes(url.protocol) || url.origin === origin;
    if (!isAllowed) problems.push(`a request to ${url.origin}`);
  });
  await page.addInitScript(() => {
    document.addEventListener("securitypolicyviolation", (event) => {
      console.error(`policy: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
    });
  });

  const operation = (id) => page.locator(`[id$="-${id}"].opblock`);
  async function open(id) {
    if (!(await operation(id).locator(".execute").isVisible())) {
      await operation(id).locator(".opblock-summary-control").click();
    }
  }
  // Clicks Execute and reads the response from the page.
  async function execute(id) {
    await operation(id).locator(".execute").click();
    const row = operation(id).locator(".live-responses-table tbody tr").first();
    const status = Number((await row.locator(".response-col_status").innerText()).trim().split(/\s/)[0]);
    const shown = await row.locator(".highlight-code code").first().innerText();
    return { status, body: JSON.parse(shown) };
  }
  async function fill(id, name, value) {
    await operation(id).locator(`tr[data-param-name="${name}"] input`).fill(value);
  }

  const response = await page.goto(`${baseUrl}/`);
  assert.equal(page.url(), `${baseUrl}/docs`, "`/` redirects to /docs");
  const policy = response.headers()["content-security-policy"] ?? "";
  assert.match(policy, /default-src 'none'/);
  assert.doesNotMatch(policy, /unsafe|https?:|\*/, "the policy allows only the own origin");
  await page.locator(".opblock").first().waitFor();
  await page.screenshot(screenshot("docs"));

  await page.locator("#hint a", { hasText: "register" }).click();
  const email = `browser-${randomUUID()}@example.com`;
  await operation("register").locator("textarea").fill(JSON.stringify({ email, password: PASSWORD }, null, 2));
  const registered = await execute("register");
  assert.equal(registered.status, 201);
  assert.equal(registered.body.user.email, email);
  await page.locator("#hint-signed-in", { hasText: email }).waitFor();
  await page.screenshot(screenshot("registered"));

  await page.locator(".auth-wrapper .authorize").click();
  await page.locator(".modal-ux input").fill(registered.body.access_token);
  await page.screenshot(screenshot("authorize"));
  await page.locator(".modal-ux .authorize").click();
  await page.locator(".modal-ux .btn-done").click();
  await page.locator("#hint-authorized", { hasText: email }).waitFor();

  await page.locator("#hint a", { hasText: "create a task" }).click();
  const userId = operation("createTask").locator('tr[data-param-name="user_id"] input');
  assert.equal(await userId.inputValue(), registered.body.user.id, "user_id is filled in");
  const created = await execute("createTask");
  assert.equal(created.status, 201);
  assert.equal(created.body.completed, false);
  await operation("createTask").locator(".live-responses-table").evaluate((table) => table.scrollIntoView());
  await page.screenshot(screenshot("created"));

  await open("setTaskCompletion");
  await fill("setTaskCompletion", "id", created.body.id);
  const completed = await execute("setTaskCompletion");
  assert.equal(completed.status, 200);
  assert.deepEqual({ ...completed.body, updated_at: null }, { ...created.body, completed: true, updated_at: null });
  await operation("setTaskCompletion").locator(".live-responses-table").evaluate((table) => table.scrollIntoView());
  await page.screenshot(screenshot("completed"));

  // Another user's id is rejected, and the problem page explains the response.
  await open("listTasks");
  await fill("listTasks", "user_id", created.body.id);
  assert.deepEqual(problems, []);
  const refused = await execute("listTasks");
  assert.equal(refused.body.code, "forbidden");
  // The browser logs every response of 400 and above.
  assert.deepEqual(problems.splice(0).filter((text) => !text.includes("status of 403")), []);
  await page.goto(baseUrl + refused.body.type);
  await page.getByText("What to do").waitFor();
  await page.screenshot(screenshot("problem"));

  // A trailing slash does not change the targets of links.
  await page.goto(`${baseUrl}/docs/`);
  const link = page.locator(".info a", { hasText: "forbidden" });
  assert.equal(await link.evaluate((a) => a.href), `${baseUrl}/problems/forbidden`);
  await page.goto(`${baseUrl}/problems/forbidden/`);
  await page.getByText("API documentation").click();
  await page.locator(".opblock").first().waitFor();
  assert.equal(page.url(), `${baseUrl}/docs`);

  const document = await (await page.request.get(`${baseUrl}/openapi.json`)).json();
  const codes = document.components.schemas.Problem.properties.code.enum;
  for (const code of codes) {
    const problem = await page.goto(`${baseUrl}/problems/${code}`);
    assert.equal(problem.status(), 200, code);
    assert.match(await page.locator("main").innerText(), new RegExp(code));
  }
  assert.deepEqual(problems, []);
  console.log(`docs at ${baseUrl}: registered ${email}, created and completed ${created.body.id}, read ${codes.length} problem pages`);
});
