// GitHub's side of a delivery, by its own libraries: the example payloads, and their signatures.
//
//   node github.js examples SECRET   one JSON line for each example, as JSON and as a form:
//                                    {event, form, body, signature, wrong}; `wrong` is signed
//                                    with another secret
//   node github.js verify SECRET     {body, signature} lines in, true or false lines out

import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { sign, verify } from "@octokit/webhooks-methods";

const [mode, secret] = process.argv.slice(2);

async function examples() {
  const events = createRequire(import.meta.url)("@octokit/webhooks-examples");
  for (const { name, examples } of events) {
    for (const example of examples) {
      const json = JSON.stringify(example);
      const form = new URLSearchParams({ payload: json }).toString();
      for (const body of [json, form]) {
        const line = {
          event: name, form: body === form, body,
          signature: await sign(secret, body), wrong: await sign(`${secret}.`, body),
        };
        console.log(JSON.stringify(line));
      }
    }
  }
}

async function verdicts() {
  for await (const line of createInterface({ input: process.stdin })) {
    const { body, signature } = JSON.parse(line);
    console.log(await verify(secret, body, signature));
  }
}

await (mode === "verify" ? verdicts() : examples());
