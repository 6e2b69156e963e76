// The chat page of `lapidary serve` in a headless Chromium: a question is asked, answered, and another one stopped.
//
// Usage: node --experimental-websocket scripts/serve_page.mjs http://127.0.0.1:8080 [SCREENSHOT.png [MESSAGE]]
// Needs chromium on the path; LAPIDARY_CHROMIUM names another.

import { spawn } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

const [address, screenshot, message = 'What is the capital of France?'] = process.argv.slice(2);
const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'lapidary-page-'));
const chromium = spawn(process.env.LAPIDARY_CHROMIUM ?? 'chromium', [
  '--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0', `--user-data-dir=${profile}`,
  '--window-size=900,640', 'about:blank',
], { stdio: ['ignore', 'ignore', 'pipe'] });

function end(status, text) {
  chromium.kill('SIGKILL');
  console.log(text);
  process.exit(status);
}

const browser = await new Promise(resolve => {
  let text = '';
  chromium.stderr.on('data', data => {
    text += data;
    const found = text.match(/DevTools listening on (ws:\/\/\S+)/);
    if (found) resolve(found[1]);
  });
});
const socket = new WebSocket(browser);
await new Promise(resolve => socket.addEventListener('open', resolve));
const waiting = new Map();
const problems = [];
let number = 0;
socket.addEventListener('message', event => {
  const answer = JSON.parse(event.data);
  if (answer.id) waiting.get(answer.id)?.(answer);
  if (answer.method === 'Runtime.exceptionThrown') problems.push(answer.params.exceptionDetails.text);
  if (answer.method === 'Log.entryAdded' && answer.params.entry.level === 'error') problems.push(answer.params.entry.text);
});
let session;
function call(method, params = {}) {
  return new Promise(resolve => {
    waiting.set(++number, resolve);
    socket.send(JSON.stringify({ id: number, method, params, ...(session ? { sessionId: session } : {}) }));
  });
}
const { result: { targetId } } = await call('Target.createTarget', { url: 'about:blank' });
session = (await call('Target.attachToTarget', { targetId, flatten: true })).result.sessionId;
for (const part of ['Runtime', 'Log', 'Page']) await call(`${part}.enable`);
const run = async expression => {
  const { result } = await call('Runtime.evaluate', { expression, returnByValue: true, awaitPromise: true });
  if (result.exceptionDetails) end(1, `${expression}: ${result.exceptionDetails.exception?.description}`);
  return result.result.value;
};
const pause = ms => new Promise(resolve => setTimeout(resolve, ms));
async function until(expression, what, seconds = 300) {
  for (let i = 0; i < seconds * 10; i++) {
    if (await run(expression)) return;
    await pause(100);
  }
  end(1, `${what} did not happen`);
}
const type = text => run(`get("text").value = ${JSON.stringify(text)}; get("form").requestSubmit(); true`);

await call('Page.navigate', { url: address });
await until('document.readyState === "complete" && get("model").options.length > 0', 'the list of models', 30);
await type(message);
await until('running === null && messages.length === 2', 'an answer');
const status = await run('get("status").textContent');
if (!/\d+ prompt tokens .* \d+ tokens/.test(status)) end(1, `the page says ${status}`);
if (screenshot) {
  const { result: { data } } = await call('Page.captureScreenshot', { format: 'png' });
  fs.writeFileSync(screenshot, Buffer.from(data, 'base64'));
}
// What a message holds is text, and never a part of the page.
await run('show("user", "<b id=wrong>x</b>"); true');
if (await run('document.getElementById("wrong") !== null')) end(1, 'text became a part of the page');
await type('Tell a long story.');
await until('running !== null && (document.querySelector("article:last-child").textContent.length > 0)', 'a second answer');
await run('get("form").requestSubmit(); true');
await until('running === null', 'the stop', 30);
// A refusal is shown.
await run('get("tokens").value = "-1"; true');
await type('x');
await until('document.querySelector("article.error") !== null', 'an error', 30);
await run('get("clear").click(); true');
if (await run('document.querySelectorAll("article").length') !== 0) end(1, 'the chat was not cleared');
const serious = problems.filter(text => !/status of 400|favicon/.test(text));
end(serious.length, serious.length ? serious.join('\n') : `the page works: ${status}`);
