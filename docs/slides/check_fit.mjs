// Every slide of the decks must fit its page, with its formulas and pictures drawn, without a
// network. Given --shots=FOLDER as well, writes a picture of each slide there.
//
//     node docs/slides/check_fit.mjs build/decks/slides/*.html

import { createRequire } from "node:module";
import { mkdirSync } from "node:fs";
import { basename, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const MIN_PICTURE = 220; // points of height, of 720
const puppeteer = createRequire(resolve("build/marp/package.json"))("puppeteer-core");

// In the browser: what is wrong with each slide, as [number, words].
function faults(minPicture) {
  const found = [];
  const slides = [...document.querySelectorAll("svg[data-marpit-svg] section")];
  for (const [index, slide] of slides.entries()) {
    const say = (words) => found.push([index + 1, words]);
    const over = slide.scrollHeight - slide.clientHeight;
    const beyond = slide.scrollWidth - slide.clientWidth;
    if (over > 1) say(`is ${over} points too high`);
    if (beyond > 1) say(`is ${beyond} points too wide`);
    for (const box of slide.querySelectorAll("pre, .picture, table, mjx-container, svg")) {
      if (box.getBoundingClientRect().right > slide.getBoundingClientRect().right) {
        say(`has a ${box.tagName} that is too wide`);
      }
    }
    for (const image of slide.querySelectorAll(".picture img")) {
      if (!image.complete || image.naturalWidth === 0) say("has a picture that is not drawn");
      if (image.clientHeight < minPicture) say(`has a picture only ${image.clientHeight} high`);
    }
    if (slide.querySelector("[data-mml-node=merror], mjx-merror")) say("has a formula with an error");
    if (slide.querySelectorAll(":scope > :not(footer)").length < 2) say("shows nothing");
    if (/\$[^$]*\\[a-z]+/i.test(slide.innerText)) say("has a formula that is not drawn");
  }
  return { found, slides: slides.length };
}

async function check(browser, file, shots) {
  const page = await browser.newPage();
  const asked = [];
  page.on("request", (request) => {
    if (!/^(file|data|about):/.test(request.url())) asked.push(request.url());
  });
  await page.setViewport({ width: 1280, height: 720 });
  await page.emulateMediaType("print"); // else all slides but one are hidden
  await page.goto(pathToFileURL(resolve(file)).href);
  const { found, slides } = await page.evaluate(faults, MIN_PICTURE);
  const words = found.map(([number, fault]) => `${basename(file)}: slide ${number} ${fault}`);
  for (const url of asked) words.push(`${basename(file)} asks for ${url}`);
  if (shots) await takeShots(page, file, shots);
  await page.close();
  return { words, slides };
}

async function takeShots(page, file, folder) {
  mkdirSync(folder, { recursive: true });
  const slides = await page.$$("svg[data-marpit-svg]");
  for (const [index, slide] of slides.entries()) {
    const number = String(index + 1).padStart(2, "0");
    await slide.screenshot({ path: `${folder}/${basename(file, ".html")}-${number}.png` });
  }
}

const options = process.argv.slice(2);
const shots = options.find((word) => word.startsWith("--shots="))?.slice("--shots=".length);
const files = options.filter((word) => !word.startsWith("--"));
const browser = await puppeteer.launch({
  executablePath: process.env.CHROME_PATH,
  args: ["--no-sandbox", "--hide-scrollbars"],
});
let total = 0;
const faulty = [];
for (const file of files) {
  const { words, slides } = await check(browser, file, shots);
  total += slides;
  faulty.push(...words);
}
await browser.close();
for (const words of faulty) console.error(words);
console.log(`${total} slides in ${files.length} decks, ${faulty.length} faults`);
process.exitCode = faulty.length ? 1 : 0;
