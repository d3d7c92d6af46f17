// Drives the page in a real Chromium: node drive.mjs CHROMIUM ADDRESS FOLDER < tasks.json
// Each task is done in a fresh page; answers are printed as a JSON list. tests/test_page.py asks.

import { chromium } from "playwright-core";
import { readFileSync } from "node:fs";
import { basename, join } from "node:path";

const [executablePath, address, folder] = process.argv.slice(2);
const tasks = JSON.parse(readFileSync(0, "utf8"));
const PATIENCE_MS = 300_000;

/** Drops a file on the page, as a user does. */
async function drop(page, path) {
  const bytes = readFileSync(path).toString("base64");
  await page.evaluate(
    ({ bytes, name }) => {
      const data = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([data], name));
      document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer }));
    },
    { bytes, name: basename(path) },
  );
}

/** Chooses a file. */
const choose = (page, path) => page.setInputFiles("#file", path);
const status = (page) => page.textContent("#status");
const whole = (page) =>
  page.waitForFunction(() => globalThis.mt3.isWhole, null, { timeout: PATIENCE_MS });
const readNotes = (page) => page.evaluate(() => globalThis.mt3.notes);

async function save(page, kind, name) {
  const [download] = await Promise.all([
    page.waitForEvent("download"),
    page.click(`#save-${kind}`),
  ]);
  const path = join(folder, `${name}-${download.suggestedFilename()}`);
  await download.saveAs(path);
  return path;
}

const actions = {
  /** Notes, files saved, time taken. */
  async transcribe(page, { file, saves = [], name = "saved", pictures = [] }) {
    await drop(page, file);
    await whole(page);
    const answer = { notes: await readNotes(page), status: await status(page), saved: {} };
    answer.seconds = await page.evaluate(() => globalThis.mt3.seconds);
    for (const kind of saves) answer.saved[kind] = await save(page, kind, name);
    for (const [width, height, scheme] of pictures) {
      await page.setViewportSize({ width, height });
      await page.emulateMedia({ colorScheme: scheme });
      await page.waitForTimeout(300);
      await page.screenshot({ path: join(folder, `${width}-${scheme}.png`), fullPage: true });
    }
    return answer;
  },
  /** What the page says of files that it does not transcribe. */
  async refuse(page, { files }) {
    const errors = [];
    for (const file of files) {
      await choose(page, file);
      await page.waitForFunction(
        (name) => document.querySelector("#error:not([hidden])")?.textContent.startsWith(name),
        basename(file),
      );
      errors.push(await page.textContent("#error"));
    }
    return { errors };
  },
  async microphone(page, { isAllowed }) {
    if (isAllowed) await page.context().grantPermissions(["microphone"]);
    await page.click("#record");
    if (!isAllowed) {
      await page.waitForSelector("#error:not([hidden])");
      return { error: await page.textContent("#error") };
    }
    await page.waitForFunction(() => document.querySelector("#status").textContent.includes("…"));
    await page.waitForTimeout(1500);
    await page.click("#record");
    await whole(page);
    return { status: await status(page) };
  },
  /** What it says while it works on a long file, and after Stop. */
  async stop(page, { file }) {
    await choose(page, file);
    await page.waitForFunction(() => document.querySelector("#status").textContent.includes("left"));
    const working = await status(page);
    await page.click("#cancel");
    await whole(page);
    return { working, stopped: await status(page) };
  },
  /** Everything that a user can do with a result. */
  async use(page, { file }) {
    await choose(page, file);
    await whole(page);
    const before = await readNotes(page);
    await page.fill("#limit", "0.8");
    await page.waitForFunction((n) => globalThis.mt3.notes.length < n, before.length);
    const fewer = await readNotes(page);
    await page.click("#play");
    await page.waitForFunction(() => document.querySelector("#play").textContent === "Pause");
    await page.waitForFunction(() => !document.querySelector("#time").textContent.startsWith("0:00"));
    await page.click("#play");
    const played = { time: await page.textContent("#time"), status: await status(page) };
    const first = page.locator(".part").first();
    await first.locator("select").selectOption("40");
    await first.locator("input").fill("Fiddle");
    await first.locator("input").blur();
    await first.getByRole("button", { name: /Solo/ }).click();
    const midi = await save(page, "midi", "solo");
    await page.focus("#scroller");
    for (const key of ["Home", "n", "n"]) await page.keyboard.press(key);
    const note = await page.textContent("#note");
    await page.click("#list summary");
    await page.waitForSelector("#rows tr");
    const rows = await page.locator("#rows tr").count();
    const nameless = await page.evaluate(() =>
      [...document.querySelectorAll("button, input, select, progress, summary, fieldset")]
        .filter((one) => one.id !== "file")
        .filter((one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.length ||
          one.getAttribute("aria-labelledby")))
        .map((one) => one.outerHTML),
    );
    return { fewer, played, midi, note, rows, nameless };
  },
};

const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--use-fake-device-for-media-stream"],
});
const answers = [];
for (const task of tasks) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 } });
  const foreign = [];
  const failures = [];
  await context.route(
    (url) => !url.href.startsWith(address) && !/^(blob|data):/.test(url.href),
    (route) => (foreign.push(route.request().url()), route.abort()),
  );
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE_MS);
  page.on("pageerror", (error) => failures.push(error.message));
  await page.goto(address);
  await page.waitForFunction(() => document.querySelector("#model").textContent);
  answers.push({ ...(await actions[task.do](page, task)), foreign, failures });
  await context.close();
}
await browser.close();
console.log(JSON.stringify(answers));
