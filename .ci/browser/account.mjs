// Users open the links in their mails: they verify their address and choose a new password. The pages are
// used with the keyboard, in light and dark, on a phone and a desktop. The console must show no errors and
// no policy violations.
//
// MAILDIR  where the mails arrive

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { readFile, readdir } from "node:fs/promises";
import { join } from "node:path";

import { baseUrl, withBrowser } from "./browser.mjs";

const PASSWORD = "blue kettle sings at dawn";
const NEW_PASSWORD = "green kettle hums at noon";
const email = `account-${randomUUID()}@example.com`;
const inbox = join(process.env.MAILDIR, "new");

async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return fetch(`${baseUrl}/api/v1/auth/${path}`, { method: "POST", headers, body: JSON.stringify(body) });
}

// Waits for a mail to the user and returns its link to this page.
async function receiveLink(page) {
  for (let attempt = 0; attempt < 300; attempt += 1) {
    for (const file of await readdir(inbox).catch(() => [])) {
      const mail = (await readFile(join(inbox, file), "latin1")).replace(/=\r?\n/g, "").replaceAll("=3D", "=");
      const link = mail.match(/^http\S*#token=\S+/m)?.[0];
      if (mail.includes(`To: ${email}`) && link?.includes(page)) return link;
    }
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(`no mail with ${page}`);
}

await withBrowser(async (browser) => {
  const page = await browser.newPage();
  const problems = [];
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) problems.push(message.text());
  });
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("request", (request) => {
    // The browser does not send the fragment, but this URL contains it.
    const sent = request.url().split("#")[0] + (request.headers().referer ?? "");
    if (sent.includes("token=")) problems.push("the token was sent outside of a body");
  });
  await page.addInitScript(() => {
    document.addEventListener("securitypolicyviolation", (event) => console.error(`policy: ${event.violatedDirective}`));
  });
  const screenshot = (name) => page.screenshot({ path: join(process.env.SCREENSHOT_DIR, `${name}.png`) });
  const message = page.locator("#message");
  // The browser logs each response of 400 and above.
  const expectRefusal = (status) =>
    assert.deepEqual(problems.splice(0).filter((text) => !text.includes(`status of ${status}`)), []);

  assert.equal((await post("register", { email, password: PASSWORD })).status, 201);
  const verifyLink = await receiveLink("/account/verify");
  assert.ok(verifyLink.startsWith(`${baseUrl}/account/verify#token=`));
  await page.goto(verifyLink);
  await page.getByText(email).waitFor();
  await screenshot("verify");
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await page.getByText("Your address is confirmed").waitFor();
  assert.equal(new URL(page.url()).hash, "", "the token does not stay in the history");
  await screenshot("verified");

  await page.emulateMedia({ colorScheme: "dark" });
  await page.setViewportSize({ width: 375, height: 720 });
  await page.goto(`${baseUrl}/account/reset`);
  await page.getByLabel("E-mail address").fill(email);
  await screenshot("forgot-dark-phone");
  await page.keyboard.press("Enter");
  await page.getByText("a mail with a link is on its way").waitFor();

  const resetLink = await receiveLink("/account/reset");
  await page.goto(resetLink);
  const [username, password, repeated] = ["Account", "New password", "Repeat the new password"]
    .map((label) => page.getByLabel(label, { exact: true }));
  await password.waitFor();
  assert.equal(await username.inputValue(), email);
  assert.equal(await username.getAttribute("autocomplete"), "username");
  assert.equal(await password.getAttribute("autocomplete"), "new-password");
  await password.fill("password1");
  await repeated.fill("password1");
  await page.keyboard.press("Enter");
  await page.getByText("too easy to guess").waitFor();
  expectRefusal(422);
  await screenshot("weak-dark-phone");
  assert.ok(await password.evaluate((field) => field === document.activeElement), "the field has the focus");
  await page.setViewportSize({ width: 1280, height: 900 });
  await page.emulateMedia({ colorScheme: "light" });
  await password.fill(NEW_PASSWORD);
  await repeated.fill(PASSWORD);
  await page.keyboard.press("Enter");
  await page.getByText("The passwords differ").waitFor();
  await page.getByLabel("Show the passwords").check();
  await repeated.fill(NEW_PASSWORD);
  await screenshot("reset");
  await page.keyboard.press("Enter");
  await page.getByText("Your password has been changed").waitFor();
  await screenshot("done");
  assert.equal((await post("login", { email, password: NEW_PASSWORD })).status, 200);
  assert.equal((await post("login", { email, password: PASSWORD })).status, 401);

  await page.goto("about:blank");
  await page.goto(resetLink);
  await password.fill(PASSWORD);
  await repeated.fill(PASSWORD);
  await page.keyboard.press("Enter");
  await page.getByText("no longer valid").waitFor();
  expectRefusal(401);
  await screenshot("used");
  await page.getByText("Get a new mail").click();
  await page.getByText("Forgot your password?").waitFor();
  assert.deepEqual(problems, []);

  // What screen readers announce.
  for (const path of ["verify", "reset"]) {
    await page.goto(`${baseUrl}/account/${path}#token=x.e30.x`);
    for (const field of await page.locator("form:visible input").all()) {
      assert.ok(await field.evaluate((input) => input.labels.length), "each field has a label");
    }
    assert.equal(await page.locator("h1:visible").count(), 1);
    assert.equal(await message.getAttribute("role"), "alert");
    assert.equal(await page.locator("html").getAttribute("lang"), "en");
  }
  console.log(`account pages at ${baseUrl}: verified and reset ${email}`);
});
