// A reader's side of the status page: Chromium as Debian has it, and axe-core's rules.
//
//     node page.js look URL            one JSON line for each scheme and width: what is seen there,
//                                      what was fetched, what axe-core objects to
//     node page.js badge URL...        one JSON line for each badge: the boxes of its texts
//     node page.js picture URL FILE    take the README's picture

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const [mode, url, ...more] = process.argv.slice(2);

async function open(browser, options, address = url) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const seen = { requests: [], events: [] };
  page.on("request", (request) => seen.requests.push(request.url()));
  for (const event of ["dialog", "pageerror", "console", "popup", "download"]) {
    page.on(event, (what) => seen.events.push(`${event} ${what.text?.() ?? what}`));
  }
  await page.goto(address, { waitUntil: "load" });
  return { page, seen };
}

async function measure(page) {
  return page.evaluate(() => {
    const root = document.documentElement;
    const beyond = [...document.querySelectorAll("main *")].filter((element) => {
      const box = element.getBoundingClientRect();
      return box.width > 0 && (box.left < -0.5 || box.right > root.clientWidth + 0.5);
    });
    return {
      scrolls: root.scrollWidth > root.clientWidth,
      beyond: beyond.map((element) => element.outerHTML.slice(0, 200)),
    };
  });
}

async function look(browser, colorScheme, width) {
  const { page, seen } = await open(browser, { colorScheme, viewport: { width, height: 800 } });
  const closed = await measure(page);
  await page.evaluate(() => document.querySelectorAll("details").forEach((one) => (one.open = true)));
  const opened = await measure(page);
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
      const target = document.querySelector(":target");
      const box = target?.getBoundingClientRect();
      return Boolean(box) && box.top >= 0 && box.top < innerHeight;
    })));
  console.log(JSON.stringify({
    colorScheme, width, ...facts, ...seen, reached,
    scrolls: closed.scrolls || opened.scrolls, beyond: [...closed.beyond, ...opened.beyond],
    passes: passes.length,
    violations: violations.map(({ id, nodes }) => `${id}: ${nodes[0].html}: ${nodes[0].failureSummary}`),
  }));
}

async function badge(browser, address) {
  const { page, seen } = await open(browser, {}, address);
  const facts = await page.evaluate(() => ({
    role: document.documentElement.getAttribute("role"),
    title: document.querySelector("title").textContent,
    width: document.documentElement.width.baseVal.value,
    texts: [...document.querySelectorAll("text")].map((one) => {
      const { x, width } = one.getBBox();
      return { text: one.textContent, left: x, right: x + width };
    }),
  }));
  console.log(JSON.stringify({ ...facts, ...seen }));
}

async function picture(browser) {
  const { page } = await open(browser, {
    colorScheme: "light", viewport: { width: 800, height: 640 }, deviceScaleFactor: 1.5 });
  await page.screenshot({ path: more[0], clip: { x: 0, y: 24, width: 800, height: 588 } });
}

const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
try {
  if (mode === "look") {
    for (const colorScheme of ["light", "dark"]) {
      for (const width of [360, 1280]) await look(browser, colorScheme, width);
    }
  } else if (mode === "badge") {
    for (const address of [url, ...more]) await badge(browser, address);
  } else {
    await picture(browser);
  }
} finally {
  await browser.close();
}
