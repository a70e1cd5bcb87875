// Open the page in a browser without a window, sample, and write what it shows (PNG) and what it computed (JSON).
//
//   npm --prefix examples install --no-save onnxruntime-web puppeteer-core
//   python examples/web/serve.py out &
//   node examples/web/screenshot.mjs http://localhost:8000 page.png result.json      (CHROMIUM: the browser)

import { writeFile } from "node:fs/promises";

import puppeteer from "puppeteer-core";

const [url, picture, result] = process.argv.slice(2);
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
try {
  const page = await browser.newPage();
  await page.setViewport({ width: 1000, height: 560 });
  page.on("pageerror", (error) => console.error(error.message));
  await page.goto(url);
  await page.waitForFunction("!/Loading/.test(document.getElementById('status').textContent)", { timeout: 60_000 });
  const status = await page.$eval("#status", (element) => element.textContent);
  if (status !== "Ready.") throw new Error(status);
  await page.click("#start");
  await page.waitForFunction("window.result", { timeout: 600_000 });
  await page.screenshot({ path: picture });
  await writeFile(result, JSON.stringify(await page.evaluate("window.result")));
} finally {
  await browser.close();
}
