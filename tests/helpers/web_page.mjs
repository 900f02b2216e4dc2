// Drives a page in headless Chromium for tests: a command as a line of JSON on stdin, its answer on stdout.
//   node web_page.mjs CHROMIUM [FLAG ...]
// {init: source to be run before each page's own}
// {open: url} {drop: [paths]} {choose: path, into: selector} {click: selector} {call: source, with: value} {screenshot: path}
import { readFileSync } from "node:fs";
import { basename } from "node:path";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const browser = await chromium.launch({ executablePath: process.argv[2], args: ["--no-sandbox", ...process.argv.slice(3)] });
const page = await browser.newPage();
const uncaught = [];
page.on("pageerror", (error) => uncaught.push(String(error)));

// Base64 and not a path: the page must get the files as from a hand that drops them.
function drop(files) {
  const transfer = new DataTransfer();
  for (const { name, content } of files) {
    transfer.items.add(new File([Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))], name));
  }
  const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
  document.querySelector("h1").dispatchEvent(event);
  if (!event.defaultPrevented) throw new Error("the browser would have opened the file in place of the page");
}

async function act(command) {
  if (command.init) return page.addInitScript(command.init).then(() => {});
  if (command.open) await page.goto(command.open);
  if (command.drop) {
    await page.evaluate(drop, command.drop.map((path) => ({ name: basename(path), content: readFileSync(path, "base64") })));
  }
  if (command.choose) await page.setInputFiles(command.into, command.choose);
  if (command.click) await page.click(command.click);
  if (command.screenshot) return page.screenshot({ path: command.screenshot, fullPage: true });
  if (command.call) return page.evaluate(`(${command.call})(${JSON.stringify(command.with)})`);
  if (command.wait !== false) await page.waitForFunction(() => document.body.ariaBusy === "false", null, { timeout: 60000 });
  return page.evaluate(() => {
    const text = (id) => document.getElementById(id)?.textContent;
    return Object.fromEntries(["message", "status", "where", "shown", "json"].map((id) => [id, text(id)]));
  });
}

for await (const line of createInterface({ input: process.stdin })) {
  const answer = await act(JSON.parse(line)).then((value) => ({ value }), (error) => ({ error: error.message }));
  console.log(JSON.stringify({ ...answer, uncaught: uncaught.splice(0) }));
}
await browser.close();
