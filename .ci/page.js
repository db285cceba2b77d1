// A reader's side of the status page: Chromium as Debian has it, and axe-core's rules.
// `node page.js JOBS`: for each job of a JSON list, an object with `mode` and `url`, a JSON line:
//
//     look, scheme, width     what is seen, what was fetched, what axe-core objects to
//     badge                   the boxes of its texts
//     picture, file           take the README's picture

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

async function open(browser, options, url) {
  const page = await (await browser.newContext(options)).newPage();
  const seen = { requests: [], events: [] };
  page.on("request", (request) => seen.requests.push(request.url()));
  for (const event of ["dialog", "pageerror", "console", "popup", "download"]) {
    page.on(event, (what) => seen.events.push(`${event} ${what.text?.() ?? what}`));
  }
  await page.goto(url, { waitUntil: "load" });
  return { page, seen };
}

// Return what lies beyond the window's sides.
const beyond = (page) => page.evaluate(() => {
  const root = document.documentElement;
  const outside = [...document.querySelectorAll("main *")].filter((element) => {
    const box = element.getBoundingClientRect();
    return box.width > 0 && (box.left < -0.5 || box.right > root.clientWidth + 0.5);
  });
  return [...(root.scrollWidth > root.clientWidth ? ["the page scrolls sideways"] : []),
    ...outside.map((element) => element.outerHTML.slice(0, 200))];
});

const modes = {
  async look(browser, { url, scheme, width }) {
    const options = { colorScheme: scheme, viewport: { width, height: 800 } };
    const { page, seen } = await open(browser, options, url);
    const closed = await beyond(page);
    await page.evaluate(() => {
      for (const one of document.querySelectorAll("details")) one.open = true;
    });
    const opened = await beyond(page);
    await page.evaluate(axe);
    const { violations, passes } = await page.evaluate(() => window.axe.run());
    const facts = await page.evaluate(() => ({
      title: document.title,
      text: document.body.innerText,
      elements: [...new Set([...document.querySelectorAll("*")].map((one) => one.localName))],
      paper: getComputedStyle(document.body).backgroundColor,
    }));
    const link = page.locator("ul a").first();
    const reached = (await link.count()) === 0 || (await link.click().then(() =>
      page.evaluate(() => {
        const box = document.querySelector(":target")?.getBoundingClientRect();
        return Boolean(box) && box.top >= 0 && box.top < innerHeight;
      })));
    return {
      ...facts, ...seen, reached, beyond: [...closed, ...opened], passes: passes.length,
      violations: violations.map(({ id, nodes: [node] }) =>
        `${id}: ${node.html}: ${node.failureSummary}`),
    };
  },
  async badge(browser, { url }) {
    const { page, seen } = await open(browser, {}, url);
    const facts = await page.evaluate(() => ({
      role: document.documentElement.getAttribute("role"),
      title: document.querySelector("title").textContent,
      width: document.documentElement.width.baseVal.value,
      texts: [...document.querySelectorAll("text")].map((one) => {
        const { x, width } = one.getBBox();
        return { text: one.textContent, left: x, right: x + width };
      }),
    }));
    return { ...facts, ...seen };
  },
  async picture(browser, { url, file }) {
    const { page } = await open(browser, {
      colorScheme: "light", viewport: { width: 800, height: 640 }, deviceScaleFactor: 1.5 }, url);
    await page.screenshot({ path: file, clip: { x: 0, y: 24, width: 800, height: 588 } });
    return null;
  },
};

const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
try {
  for (const job of JSON.parse(process.argv[2])) {
    console.log(JSON.stringify(await modes[job.mode](browser, job)));
  }
} finally {
  await browser.close();
}
